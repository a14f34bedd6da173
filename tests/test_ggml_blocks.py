"""Bases straight from GGUF files: the blocks of Q4_0 and Q4_1 as they are, equal to the dense load bit for bit."""

from __future__ import annotations

import gc
import tracemalloc
import weakref

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from test_methods import shake
from test_pretrained_text import VOCAB, gguf, llama, write_gguf

import minilora as ml
from minilora.backend import current_device, set_device, to_device, to_host
from minilora.lora import adapters_of
from minilora.methods import blocks
from minilora.methods.blocks import BlockWeight
from minilora.methods.four_bit import FourBit
from minilora.methods.ggml_blocks import GgmlBlocks
from minilora.nn import Linear
from minilora.training import TrainConfig, train

KINDS = ("Q4_0", "Q4_1")
IDS = np.random.default_rng(0).integers(0, len(VOCAB), (2, 7))


def file_of(path, kind, **fields):
    """A GGUF file of a small Llama, made on the host."""
    before = current_device().name
    set_device("cpu")
    write_gguf(path, llama(**fields), kind)
    set_device(before)


def raw_blocks(W, kind):                                   # the bytes of llama.cpp's quantiser
    return gguf.quants.quantize(W.astype("float32"), gguf.GGMLQuantizationType[kind])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_numbers_are_the_librarys_and_products_by_parts_those_of_the_dense_weight(device, rng, kind, dtype, monkeypatch):
    for shape in (5, 32), (1, 96), (70, 64):
        raw = raw_blocks(rng.standard_normal(shape), kind)
        W = GgmlBlocks(to_device(raw), kind, dtype)
        whole = to_host(W.dense())
        assert whole.shape == W.shape == shape and whole.dtype == dtype
        assert_array_equal(whole, gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[kind]).astype(dtype))
        assert W.nbytes == raw.nbytes == whole.size * {"Q4_0": 18, "Q4_1": 20}[kind] / 32
        monkeypatch.setattr(blocks, "ROWS", 300)           # several parts, which begin and end inside blocks
        assert_array_equal(to_host(W.dense()), whole)
        x, dy = (rng.standard_normal((2, 3, n)).astype(dtype) for n in shape[::-1])
        close = {"rtol": 1e-12, "atol": 1e-12} if dtype == "float64" else {"rtol": 1e-4, "atol": 1e-4}
        assert_allclose(to_host(W.linear(to_device(x))), x @ whole.T, **close)
        assert_allclose(to_host(W.linear_grad(to_device(dy))), dy @ whole, **close)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fields", [{}, {"qkv_bias": True, "o_bias": True}], ids=["plain", "biases"])
def test_the_model_is_that_of_the_dense_load(device, kind, fields, tmp_path):
    """In logits, gradients and after training; every row of q and k in its place."""
    file_of(tmp_path / "m.gguf", kind, **fields)
    dense, model = (ml.load_pretrained(tmp_path / "m.gguf", dtype="float64", quantised=q)[0] for q in (False, True))
    weights = {path: m.weight for path, m in model.named_modules() if isinstance(m, Linear)
               and isinstance(m.weight, BlockWeight)}
    assert len(weights) == 7 * 2                           # q, k, v, o, gate, up and down of two layers
    for path, weight in weights.items():
        assert_array_equal(to_host(weight.dense()), to_host(dense.get_module(path).weight.data), err_msg=path)
    assert dict(model.named_parameters()).keys() == {p for p, _ in dense.named_parameters()} - {f"{w}.weight" for w in weights}
    assert not any(p.requires_grad for _, p in model.named_parameters())
    assert_allclose(to_host(model(IDS).data), to_host(dense(IDS).data), rtol=1e-12, atol=1e-12)
    losses = []
    for m in (dense, model):
        ml.add_adapter(m, ml.LoraConfig(r=2, target_modules="all-linear"))
        shake(m)
        losses.append(train(m, lambda i: (IDS, (IDS + 1) % len(VOCAB)), TrainConfig(steps=4, lr=1e-2, progress=False)).loss)
    assert_allclose(*losses, rtol=1e-11)
    for path, adapter in adapters_of(model).items():
        for name, p in adapter.named_parameters():
            assert_allclose(to_host(p.data), to_host(getattr(adapters_of(dense)[path], name).data), rtol=1e-8, atol=1e-10)


def test_it_saves_and_loads_adapters_generates_and_classifies(tmp_path):
    write_gguf(tmp_path / "m.gguf", llama(), "Q4_1")
    model, _ = ml.load_pretrained(tmp_path / "m.gguf", quantised=True)
    ml.add_adapter(model, ml.LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    shake(model)
    ml.save_adapter(model, tmp_path / "adapter")
    for quantised in (True, False):
        again, _ = ml.load_pretrained(tmp_path / "m.gguf", quantised=quantised)
        ml.load_adapter(again, tmp_path / "adapter")
        assert_allclose(again(IDS).data, model(IDS).data, rtol=1e-4, atol=1e-4)
    assert ml.generate(model, IDS[:1], 3).shape == (1, 10)
    labels, _ = ml.load_pretrained(tmp_path / "m.gguf", quantised=True, n_labels=3)
    assert labels(IDS).shape == (2, 3) and labels.drawn == ["classifier.weight"]


def test_what_cannot_stay_in_blocks_is_refused(tmp_path):
    write_gguf(tmp_path / "m.gguf", llama(), "Q8_0")
    with pytest.raises(ValueError, match=r"q_proj.weight has blocks of type Q8_0, expected one of Q4_0, Q4_1") as caught:
        ml.load_pretrained(tmp_path / "m.gguf", quantised=True)
    assert "\n" not in str(caught.value)
    write_gguf(tmp_path / "m.gguf", llama(), "Q4_0")
    model, _ = ml.load_pretrained(tmp_path / "m.gguf", quantised=True)
    with pytest.raises(ValueError, match="is quantised, expected dense weights"):
        ml.save_pretrained(model, None, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="quantised already"):
        ml.quantise(model)
    ml.save_pretrained(llama(), None, tmp_path / "folder")
    with pytest.raises(ValueError, match="expected a GGUF file"):
        ml.load_pretrained(tmp_path / "folder", quantised=True)
    raw = raw_blocks(np.ones((2, 32)), "Q4_0")
    raw[0, :2] = np.array([np.inf], np.float16).view(np.uint8)
    with pytest.raises(ValueError, match="scales that are NaN or infinite"):
        GgmlBlocks(raw, "Q4_0")


@pytest.mark.parametrize("kind", ["nf4", *KINDS])
def test_no_dense_copy_outlives_its_product(kind, monkeypatch, tmp_path):
    """Forward and backward of a whole model: every dense part is gone when the next layer's comes, and at the peak no more than
    two of them, with what a layer's product needs, are there at once."""
    write_gguf(tmp_path / "m.gguf", llama(d_model=256, d_ff=1024, n_layers=3), "F32" if kind == "nf4" else kind)
    model, _ = ml.load_pretrained(tmp_path / "m.gguf", quantised=kind != "nf4")
    model = ml.quantise(model) if kind == "nf4" else model
    ml.add_adapter(model, ml.LoraConfig(r=2, target_modules="all-linear"))
    made, alive, plain = [], [], BlockWeight.rows

    def watched(self, start, stop):
        alive.append(sum(ref() is not None for ref in made))
        array = plain(self, start, stop)
        owner = array if array.base is None else array.base
        made.append(weakref.ref(owner))
        return array

    monkeypatch.setattr(BlockWeight, "rows", watched)
    loss = model.loss(IDS, IDS)
    gc.collect()
    assert len(made) == 7 * 3 and not any(ref() is not None for ref in made)       # nothing dense waits for backward
    loss.backward()
    assert len(made) >= 2 * 7 * 3 - 3 and max(alive) <= 1 and not any(ref() is not None for ref in made)
    weights = [m.weight for _, m in model.named_modules() if isinstance(m, Linear) and isinstance(m.weight, BlockWeight)]
    dense = sum(4 * w.shape[0] * w.shape[1] for w in weights)
    tracemalloc.start()
    try:
        model.loss(IDS, IDS).backward()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < dense / 3                                # the largest weight is a ninth of them all


@pytest.mark.parametrize("make", [lambda W: FourBit(W), lambda W: GgmlBlocks(raw_blocks(W, "Q4_1"), "Q4_1")],
                         ids=["nf4", "Q4_1"])
def test_bytes_a_number(make, rng):
    weight = make(rng.standard_normal((64, 256)).astype("float32"))
    assert weight.nbytes / (64 * 256) <= (0.63 if isinstance(weight, GgmlBlocks) else 0.6)
