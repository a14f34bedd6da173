"""Every method of adaptation, by one suite: a new one joins by an entry in CASES."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from safetensors.numpy import load_file, save_file
from small_models import IDS, D, F, L, V, build, run

from minilora import (
    AdaLoraConfig,
    BitFitConfig,
    FullConfig,
    HoulsbyConfig,
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    LoraFAConfig,
    ShiraConfig,
    SoRAConfig,
    TensorTrainConfig,
    VeraConfig,
)
from minilora.autograd import gradcheck
from minilora.backend import device_of, to_device, to_host
from minilora.lora import (
    METHODS,
    Adaptation,
    adapters_of,
    add_adapter,
    count_parameters,
    disable_adapter,
    merge_adapter,
    merge_and_unload,
    set_adapter,
    unmerge_adapter,
)
from minilora.lora.files import SAVERS, load_adapter, save_adapter
from minilora.lora.layer import adapted
from minilora.methods import dora
from minilora.nn import Linear
from minilora.rank.report import analyze
from minilora.training import TrainConfig, train


@dataclass
class Case:
    """A method under test.

    config(targets): its config. count(out, in): how many numbers it trains on a layer of that shape. exact: a new adapter
    changes no bit; else within rounding. thin: its update is s·B@A, so analysis and PEFT's plain LoRA files take it. frozen:
    parameters that do not train. bias: the layer must have one. merges: it is a change of weight and bias.
    """

    config: Callable[..., Any]
    count: Callable[[int, int], int]
    exact: bool = True
    thin: bool = False
    frozen: tuple[str, ...] = ()
    bias: bool = False
    merges: bool = True


def low_rank(**fields):
    return lambda targets: LoraConfig(**{"r": 2, "target_modules": targets} | fields)


def small(n):
    """The smaller of the two factors of n that are nearest to each other."""
    return max(m for m in range(1, n + 1) if n % m == 0 and m * m <= n)


def other(kind, **fields):
    return lambda targets: kind(target_modules=targets, **fields)


CASES = {
    "lora": Case(low_rank(lora_alpha=3), lambda d, k: 2 * (d + k), thin=True),
    "rslora": Case(low_rank(use_rslora=True), lambda d, k: 2 * (d + k), thin=True),
    "lora-fa": Case(other(LoraFAConfig, r=2), lambda d, k: 2 * d, thin=True, frozen=("lora_A",)),
    "dora": Case(low_rank(use_dora=True, detach_norm=False), lambda d, k: 2 * (d + k) + d, exact=False),
    "dora-rslora": Case(low_rank(use_dora=True, detach_norm=False, use_rslora=True, lora_alpha=3),
                        lambda d, k: 2 * (d + k) + d, exact=False),
    "pissa": Case(low_rank(init_lora_weights="pissa", lora_alpha=3), lambda d, k: 2 * (d + k), thin=True),
    "pissa_niter": Case(low_rank(init_lora_weights="pissa_niter_4"), lambda d, k: 2 * (d + k), thin=True),
    "milora": Case(low_rank(init_lora_weights="milora", lora_alpha=2), lambda d, k: 2 * (d + k), thin=True),
    "olora": Case(low_rank(init_lora_weights="olora"), lambda d, k: 2 * (d + k), thin=True),
    "eva": Case(low_rank(init_lora_weights="eva", lora_alpha=3), lambda d, k: 2 * (d + k), thin=True),
    "ia3": Case(other(IA3Config), lambda d, k: d),
    "ia3-input": Case(other(IA3Config, feedforward_modules=["q_proj", "v_proj", "up_proj", "qkv_proj"]), lambda d, k: k),
    "vera": Case(other(VeraConfig, r=3), lambda d, k: 3 + d, thin=True),
    "loha": Case(other(LoHaConfig, r=2, alpha=3), lambda d, k: 4 * (d + k)),
    "lokr": Case(other(LoKrConfig, r=1, alpha=3), lambda d, k: small(d) * small(k) + d // small(d) + k // small(k)),
    "lokr-both": Case(other(LoKrConfig, r=1, decompose_both=True, init_weights="lycoris", decompose_factor=4),
                      lambda d, k: d // 4 + k // 4 + 4 + 4),
    "adalora": Case(other(AdaLoraConfig, init_r=3, target_r=2, lora_alpha=3, total_step=10), lambda d, k: 3 * (d + k + 1),
                    thin=True),
    "sora": Case(other(SoRAConfig, r=2), lambda d, k: 2 * (d + k + 1), thin=True),
    "lora-bias": Case(low_rank(lora_bias=True, lora_alpha=3), lambda d, k: 2 * (d + k) + d, thin=True),
    "lora-only-bias": Case(low_rank(bias="lora_only"), lambda d, k: 2 * (d + k) + d, thin=True, bias=True),
    "lora-both-biases": Case(low_rank(lora_bias=True, bias="lora_only"), lambda d, k: 2 * (d + k + d), thin=True, bias=True),
    "shira": Case(other(ShiraConfig, r=1), lambda d, k: d + k),
    "tt-lora": Case(other(TensorTrainConfig, r=2, order=2), lambda d, k: 2 * (small(d) + k // small(k))
                    + 4 * (d // small(d) + small(k)), thin=True),
    "bitfit": Case(other(BitFitConfig), lambda d, k: d, bias=True),
    "houlsby": Case(other(HoulsbyConfig, bottleneck=3), lambda d, k: 2 * 3 * d + 3 + d, exact=False, merges=False),
    "full": Case(other(FullConfig), lambda d, k: d * k + d),
}
methods = pytest.mark.parametrize("name", CASES)
TARGETS = (["q_proj", "up_proj"], ["qkv_proj"], ["q_proj", "v_proj"])      # blocks of a packed layer, the whole, and apart


def shake(model, name="default", size=0.2):
    """Move every number of an adapter away from its start."""
    rng = np.random.default_rng(2)
    for adapter in adapters_of(model, name).values():
        for _, p in adapter.named_parameters():
            p.data += to_device((rng.standard_normal(p.shape) * size).astype(p.dtype), device_of(p.data).name)
    return model


def add(model, name, targets=TARGETS[0], adapter="default"):
    add_adapter(model, CASES[name].config(targets), adapter)
    return shake(model, adapter)


def base_of(model):
    return {path: value for path, value in model.state_dict().items() if ".adaptation." not in path}


def trained(model):
    return [p for _, p in model.named_parameters(trainable=True)]


def layer_of(name, shape):
    """One adapted Linear of a shape (out, in), every number random, and its adapter."""
    case, rng = CASES[name], np.random.default_rng(3)
    layer = Linear(to_device(rng.standard_normal(shape)), to_device(rng.standard_normal(shape[0])))
    config = case.config(["up_proj"])
    for field in {"r", "init_r"} & vars(config).keys():
        setattr(config, field, min(getattr(config, field), *shape))
    adapter = METHODS[config.method, Linear](layer, config, ("up_proj",), np.random.default_rng(4))
    for _, p in adapter.named_parameters():
        p.data += to_device(rng.standard_normal(p.shape) * 0.5)
    layer.adaptation = Adaptation()
    layer.adaptation.adapters, layer.adaptation.active = {"default": adapter}, ["default"]
    layer.freeze()
    adapter.unfreeze()
    return layer, adapter


# --- the suite --------------------------------------------------------------------------------------


@pytest.mark.slow_on_the_stand_in
@methods
@pytest.mark.parametrize("shape", [(5, 3), (3, 7), (1, 4), (4, 1)], ids=str)
def test_the_gradients_of_every_parameter_and_of_the_input(device, name, shape):
    layer, adapter = layer_of(name, shape)
    x = np.random.default_rng(5).standard_normal((2, 3, shape[1]))
    own = [p for _, p in adapter.named_parameters() if p.requires_grad]
    assert gradcheck(lambda x, *_: layer(x), [to_device(x), *own], eps=1e-6)
    if 1 not in shape:                                     # a row of one number has no direction that DoRA could turn
        assert all(abs(to_host(p.grad)).max() > 1e-6 for p in own)
    assert all(p.grad is None for _, p in adapter.named_parameters() if not p.requires_grad)


@methods
@pytest.mark.parametrize("targets", TARGETS, ids=str)
def test_the_gradients_in_a_whole_model(name, targets):
    model = add(build(), name, targets)
    assert gradcheck(lambda *_: model(IDS), trained(model), directions=1, eps=1e-6)
    assert min(float(abs(p.grad).max()) for p in trained(model)) > 1e-7


@pytest.mark.slow_on_the_stand_in
@methods
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_new_adapter_is_the_base(device, name, dtype):
    """Where its start is exact, the adapted weight and bias are the base's bit for bit, and so is the output of one product.

    (Adapters on blocks alone make three products of one packed one, whose rounding may differ.)
    """
    exact, ulp = CASES[name].exact, 1e-15 if dtype == "float64" else 1e-6
    for targets in TARGETS:
        model = build(dtype=dtype)
        base = run(model)
        add_adapter(model, CASES[name].config(targets))
        assert_allclose(run(model), base, rtol=0, atol=ulp if exact else 1e-4 if name == "houlsby" else 20 * ulp)
        if exact and targets == ["qkv_proj"]:
            assert_array_equal(run(model), base)
        layers = dict(model.named_modules())
        for path, adapter in adapters_of(model).items() if exact else ():
            W, b = adapted(layers[path], [(layers[path].parts()[0][0], adapter)])
            assert_array_equal(to_host(W.data), to_host(layers[path].weight.data))
            assert_array_equal(to_host(b.data), to_host(layers[path].bias.data))


@pytest.mark.slow_on_the_stand_in
@methods
@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-12), ("float32", 2e-5)])
def test_merged_is_unmerged_and_the_base_is_untouched(device, name, dtype, tolerance):
    for targets in TARGETS[: 1 if device == "fake" else None]:
        model = build(dtype=dtype)
        base, state = run(model), model.state_dict()
        add(model, name, targets)
        before, close = run(model), {"rtol": tolerance, "atol": tolerance}
        assert abs(before - base).max() > 1e-3
        mixed = run(model, adapter_names=["default", "__base__", "default"])
        assert_allclose(mixed, np.stack([before[0], base[1], before[2]]), **close)
        if CASES[name].merges:
            merge_adapter(model)
            merge_adapter(model)
            assert_allclose(run(model), before, **close)
            with disable_adapter(model):
                assert_array_equal(run(model), base)
            assert_allclose(run(merge_and_unload(model)), before, **close)
            unmerge_adapter(model)
        else:
            for refused in merge_adapter, merge_and_unload:
                with pytest.raises(ValueError, match="cannot be merged"):
                    refused(model)
            with disable_adapter(model):
                assert_array_equal(run(model), base)
        assert_array_equal(run(model), before)
        set_adapter(model, None)
        assert_array_equal(run(model), base)
        assert all(value.tobytes() == state[path].tobytes() for path, value in base_of(model).items())


@pytest.mark.slow_on_the_stand_in
@methods
def test_training_moves_the_adapter_and_not_the_base(device, name):
    model = build(dtype="float32")
    state = base_of(model)
    add_adapter(model, CASES[name].config(TARGETS[0]))
    start = {path: p.data.copy() for path, p in model.named_parameters(trainable=True)}
    steps, lr = (16, 5e-2) if device == "fake" else (30, 2e-2)
    config = TrainConfig(steps=steps, lr=lr, schedule="constant", progress=False)
    history = train(model, lambda i: (IDS, (IDS + 1) % V), config)
    assert history.loss[-1] < history.loss[0] - 0.02
    assert all((to_host(p.data) != to_host(start[path])).any() for path, p in model.named_parameters(trainable=True))
    assert all(value.tobytes() == state[path].tobytes() for path, value in base_of(model).items())
    assert {p.dtype for _, p in model.named_parameters()} == {np.dtype("float32")}


@methods
def test_the_trainable_count_is_its_formula(name):
    model, case = build(), CASES[name]
    add_adapter(model, case.config(["q_proj", "up_proj"]))
    assert count_parameters(model)["trainable"] == L * (case.count(D, D) + case.count(F, D))
    assert not any(path.endswith(case.frozen) for path, _ in model.named_parameters(trainable=True) if case.frozen)


@methods
@pytest.mark.parametrize("form", ["gpt2", "llama", "bert", "untyped"])
def test_saved_and_loaded_it_is_the_same(device, name, form, tmp_path):
    fields = {"n_labels": 3} if form == "bert" else {}
    if CASES[name].bias and form == "llama":
        pytest.skip("Llama has no biases")

    def fresh():
        model = build("gpt2" if form == "untyped" else form, **fields)
        model.cfg.model_type = None if form == "untyped" else model.cfg.model_type
        return model

    model = fresh()
    add(model, name, ["qkv_proj" if form == "gpt2" else "q_proj", "up_proj"])
    save_adapter(model, tmp_path, base_model="base")
    again = fresh()
    load_adapter(again, tmp_path)
    assert_allclose(run(again), run(model), rtol=1e-13, atol=1e-14)
    method = CASES[name].config(None).method
    assert again.adapter_configs["default"].method == (method if method in SAVERS else "lora")
    save_adapter(again, tmp_path / "again")
    first, second = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path, tmp_path / "again"))
    assert first.keys() == second.keys()
    assert all(first[key].tobytes() == second[key].tobytes() for key in first)


@methods
def test_what_is_wrong_in_a_file_is_refused_and_leaves_the_model_alone(name, tmp_path):
    form = "gpt2" if CASES[name].bias else "llama"
    save_adapter(add(build(form), name, ["o_proj", "up_proj"]), tmp_path)
    tensors, text = load_file(tmp_path / "adapter_model.safetensors"), (tmp_path / "adapter_config.json").read_text()
    key = min(tensors)

    def wrong(change, kind=ValueError, **config):
        values = {k: v.copy() for k, v in tensors.items()}
        change(values)
        save_file(values, tmp_path / "adapter_model.safetensors")
        (tmp_path / "adapter_config.json").write_text(json.dumps(json.loads(text) | config))
        model = build(form)
        before = model.state_dict()
        with pytest.raises(kind) as caught:
            load_adapter(model, tmp_path)
        assert "\n" not in str(caught.value)
        assert not model.adapter_configs and model.state_dict().keys() == before.keys()

    wrong(lambda t: t.pop(key))
    wrong(lambda t: t.update({key: t[key][:-1]}))
    wrong(lambda t: t.update({key + "x": t[key]}))
    wrong(lambda t: t.update({key: t[key] * np.nan}))
    wrong(lambda t: t.update({key.replace("0", "7", 1): t.pop(key)}))
    wrong(lambda t: None, target_modules=["k_proj"])
    wrong(lambda t: None, peft_type="NEW")


@methods
def test_only_a_thin_update_is_analysed(name):
    model = add(build(), name)
    report = analyze(model)
    assert set(report.modules if CASES[name].thin else report.left_out) == set(adapters_of(model))


@pytest.mark.parametrize("config", [
    *(low_rank(r=D + 1, **fields) for fields in ({}, {"use_dora": True}, {"lora_bias": True}, *(
        {"init_lora_weights": init} for init in ("pissa", "pissa_niter_2", "milora", "olora", "eva")))),
    *(other(kind, r=D + 1) for kind in (LoraFAConfig, SoRAConfig, TensorTrainConfig)),
    other(AdaLoraConfig, init_r=D + 1, target_r=2, total_step=10)])
def test_a_rank_above_the_matrix_is_refused(config):
    model = build()
    with pytest.raises(ValueError, match=r"rank 9 on .*q_proj of shape \(8, 8\): expected at most 8") as caught:
        add_adapter(model, config(["q_proj"]))
    assert "\n" not in str(caught.value) and not model.adapter_configs


def test_every_registered_method_is_in_the_suite():
    registered = {method for method, kind in METHODS if kind is Linear} - {"replace"}      # tables: test_virtual_tokens.py
    assert registered == {case.config(None).method for case in CASES.values()}


@pytest.mark.parametrize("path", sorted(Path(dora.__file__).parent.glob("*.py")), ids=lambda p: p.name)
def test_a_method_is_a_short_file(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= (400 if path.name == "files.py" else 120)
