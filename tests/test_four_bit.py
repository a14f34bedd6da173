"""Bases in 4 bits: the codes, the packing, products by parts, QLoRA with every method, LoftQ."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from small_models import IDS, B, T, V, build, run
from test_methods import CASES, shake, trained

from minilora import LoraConfig, loftq, quantise
from minilora.autograd import gradcheck
from minilora.backend import to_device, to_host
from minilora.lora import adapters_of, add_adapter, disable_adapter, merge_adapter
from minilora.lora.layer import dense
from minilora.methods import blocks
from minilora.methods.codes import byte_values, code_values, nearest
from minilora.methods.four_bit import FourBit

NF4 = [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
       -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
       0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0]


def test_the_codes_are_those_of_the_paper_and_of_bitsandbytes():
    assert_allclose(code_values("nf4"), NF4, rtol=0, atol=1.2e-7)
    fp4 = code_values("fp4")
    assert_array_equal(np.sort(abs(fp4)) * 12, np.repeat([0, 0.0625, 2, 3, 4, 6, 8, 12], 2))
    assert_array_equal(fp4[8:], -fp4[:8])
    assert byte_values().shape == (256,) and byte_values()[[0, -1]].tolist() == [-0.99296875, 1.0]
    with pytest.raises(ValueError, match="expected 'nf4' or 'fp4'"):
        code_values("int4")


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_every_number_gets_the_nearest_code(device, rng, quant_type):
    x, values = rng.uniform(-1.2, 1.2, 4000), code_values(quant_type)
    got = values[to_host(nearest(to_device(x), values))]
    assert_array_equal(abs(x - got), abs(x[:, None] - values).min(axis=1))
    W = rng.standard_normal((40, 64))
    back = to_host(FourBit(to_device(W), quant_type, double_quant=False).dense())
    gap = np.diff(np.sort(values)).max() / 2
    assert (abs(back - W) <= gap * abs(W).max(axis=1, keepdims=True) * (1 + 1e-6)).all()
    assert_allclose(abs(back).max(axis=1), abs(W).max(axis=1) if quant_type == "fp4" else abs(back).max(axis=1), rtol=1e-6)


@pytest.mark.parametrize("shape", [(5, 3), (1, 64), (7, 65), (64, 1), (130, 200), (3, 128)], ids=str)
@pytest.mark.parametrize("double", [True, False])
def test_products_by_parts_are_those_of_the_dense_weight(device, rng, shape, double, monkeypatch):
    monkeypatch.setattr(blocks, "ROWS", 300)             # several parts, which begin and end inside blocks
    W = FourBit(to_device(rng.standard_normal(shape)), double_quant=double)
    whole = to_host(W.dense())
    assert whole.shape == shape == W.shape
    x, dy = rng.standard_normal((2, 3, shape[1])), rng.standard_normal((2, 3, shape[0]))
    assert_allclose(to_host(W.linear(to_device(x))), x @ whole.T, rtol=1e-12, atol=1e-12)
    assert_allclose(to_host(W.linear_grad(to_device(dy))), dy @ whole, rtol=1e-12, atol=1e-12)


def test_packing_is_two_codes_a_byte_the_first_in_the_high_bits():
    W = FourBit(np.array([[1.0, -1.0, 0.0, 0.5]]))
    assert W.codes[:2].tolist() == [0xF0, 0x7C] and W.codes.dtype == np.uint8


def test_zeros_stay_zeros(device):
    W = np.zeros((4, 64))
    W[2] = np.linspace(-1, 1, 64)
    for double in (True, False):
        back = to_host(FourBit(to_device(W), double_quant=double).dense())
        assert np.isfinite(back).all() and (double or not back[[0, 1, 3]].any())


@pytest.mark.parametrize(("double", "most"), [(True, 0.517), (False, 0.563)])
def test_bytes_a_number_and_the_error(rng, double, most):
    W = rng.standard_normal((512, 512)).astype("float32")
    four = FourBit(W, double_quant=double)
    assert four.nbytes / W.size <= most
    # The error of NF4 with blocks of 64 on normal numbers: 0.092 by our own run of 2²² numbers, of which these are 2¹⁸.
    assert np.linalg.norm(four.dense() - W) / np.linalg.norm(W) == pytest.approx(0.092, abs=0.002)
    assert four.dense().dtype == np.float32


@pytest.mark.slow_on_the_stand_in
@pytest.mark.parametrize("form", ["gpt2", "llama"])
@pytest.mark.parametrize("name", [n for n in CASES if n not in ("full", "bitfit")])
def test_every_method_on_a_base_of_four_bits(device, form, name):
    """The model equals the one whose weights are the dense copies; gradients too; a merge is refused."""
    model, reference = quantise(build(form)), build(form)
    for path, layer in reference.named_modules():
        if hasattr(layer, "weight") and isinstance(getattr(model.get_module(path), "weight", None), FourBit):
            layer.weight.data[...] = model.get_module(path).weight.dense()
    base = run(model)
    assert_allclose(base, run(reference), rtol=1e-12, atol=1e-12)
    targets = ["q_proj", "v_proj", "up_proj"] if form == "gpt2" else ["qkv_proj", "down_proj"]
    for m in (model, reference):
        add_adapter(m, CASES[name].config(targets))
        shake(m)
    assert_allclose(run(model), run(reference), rtol=1e-11, atol=1e-11)
    cotangent = np.random.default_rng(3).standard_normal((B, T, V))
    for m in (model, reference):
        m(IDS).backward(to_device(cotangent))
    for mine, theirs in zip(trained(model), trained(reference), strict=True):
        assert_allclose(to_host(mine.grad), to_host(theirs.grad), rtol=1e-10, atol=1e-11)
    if device == "cpu":
        assert gradcheck(lambda *_: model(IDS), trained(model), directions=1, eps=1e-6)
    with pytest.raises(ValueError, match=r"quantised base weight|cannot be merged"):
        merge_adapter(model)
    with disable_adapter(model):
        assert_array_equal(run(model), base)


def test_loftq_starts_nearer_to_the_base(device):
    targets = ["q_proj", "v_proj", "up_proj", "down_proj"]
    sizes = {"d_model": 64, "d_ff": 96}
    base, plain, model = build("llama", **sizes), quantise(build("llama", **sizes)), build("llama", **sizes)
    errors = loftq(model, LoraConfig(r=8, lora_alpha=4, target_modules=targets), iterations=5)
    assert errors.keys() == adapters_of(model).keys()
    for path, found in errors.items():
        assert len(found) == 5 and found[-1] < found[0]
        W = to_host(base.get_module(path).weight.data)
        layer, adapter = model.get_module(path), adapters_of(model)[path]
        near = to_host(adapter.adapted_weight(dense(layer)).data)
        assert np.linalg.norm(near - W) / np.linalg.norm(W) == pytest.approx(found[-1], rel=1e-9)
        assert found[-1] < np.linalg.norm(to_host(plain.get_module(path).weight.dense()) - W) / np.linalg.norm(W)
    assert abs(run(model) - run(base)).mean() < abs(run(plain) - run(base)).mean()


def test_what_cannot_be_quantised_is_refused():
    model = build()
    add_adapter(model, LoraConfig(r=2))
    with pytest.raises(ValueError, match="quantise first"):
        quantise(model)
    with pytest.raises(ValueError, match="quantised already"):
        quantise(quantise(build()))
    with pytest.raises(ValueError, match="expected q_proj, k_proj and v_proj"):
        loftq(build(), LoraConfig(r=2, target_modules=["qkv_proj"]))
    with pytest.raises(ValueError, match="plain LoRA"):
        loftq(build(), LoraConfig(r=2, use_dora=True))
