"""The protocol of adaptations, tried on three things that are not LoRA: a weight that is no thin product (DoRA), a bias alone
(BitFit), and a base that is not dense (4 bits)."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from small_models import IDS, D, F, L, build, run

from minilora.autograd import gradcheck, linear, sqrt, tensor
from minilora.autograd.functions import dropout_mask
from minilora.backend import array_module, device_of, to_device, to_host
from minilora.lora import (
    METHODS,
    Adapter,
    LoRA,
    LoraConfig,
    adapters_of,
    add_adapter,
    count_parameters,
    delete_adapter,
    disable_adapter,
    merge_adapter,
    merge_and_unload,
    register,
    set_adapter,
    set_scale,
    unmerge_adapter,
)
from minilora.lora.layer import dense
from minilora.nn import Linear, Parameter
from minilora.rank.report import analyze


@dataclass
class DoRAConfig(LoraConfig):
    method: ClassVar[str] = "test-dora"


@dataclass
class BitFitConfig(LoraConfig):
    method: ClassVar[str] = "test-bitfit"


@dataclass
class GateConfig(LoraConfig):
    method: ClassVar[str] = "test-gate"


@pytest.fixture(autouse=True)
def methods():
    """The three methods of this file, registered for the time of a test."""
    before = dict(METHODS)

    @register("test-dora")
    class DoRA(LoRA):
        """W' = m ⊙ V / ‖V‖_row with V = W + s·B@A (Liu et al. 2024, arXiv:2402.09353), the norm differentiated too."""

        def __init__(self, layer, config, names, rng):
            super().__init__(layer, config, names, rng)
            W = dense(layer).data
            self.magnitude = Parameter(array_module(W).linalg.norm(W, axis=1))

        def adapted_weight(self, W):
            V = super().adapted_weight(W)
            return V * (self.magnitude / sqrt((V * V).sum(axis=1))).reshape(-1, 1)

    @register("test-bitfit")
    class BitFit(Adapter):
        """b' = b + c, and nothing else (Ben Zaken et al. 2021, arXiv:2106.10199)."""

        def __init__(self, layer, config, names, rng):
            super().__init__(layer, config, names, rng)
            self.change = Parameter(to_device(np.zeros(layer.weight.shape[0], layer.dtype)))

        def adapted_bias(self, b):
            return b + self.change

    @register("test-gate")
    class Gate(Adapter):
        """W' = l ⊙ W (IA3, arXiv:2205.05638), with dropout on what it gates: a method with a forward of its own."""

        def __init__(self, layer, config, names, rng):
            super().__init__(layer, config, names, rng)
            self.gate = Parameter(to_device(np.ones((layer.weight.shape[0], 1), layer.dtype)))
            self.p = config.lora_dropout

        def adapted_weight(self, W):
            return self.gate * W

        def forward(self, x, base):
            if self.training and self.p:
                x = x * to_device(dropout_mask(x.shape, self.p, self.rng, x.dtype), device_of(x.data).name)
            return linear(x, self.adapted_weight(dense(base)), base.bias)

    yield
    METHODS.clear()
    METHODS.update(before)


def add(model, config, name="default"):
    """Add an adapter and move every number of it away from its start."""
    add_adapter(model, config, name)
    rng = np.random.default_rng(2)
    for adapter in adapters_of(model, name).values():
        for _, p in adapter.named_parameters():
            p.data += to_device((rng.standard_normal(p.shape) * 0.3).astype(p.dtype), device_of(p.data).name)
    return model


def dora_weight(W, adapter):
    """DoRA's weight in NumPy."""
    A, B0, m = (to_host(p.data) for p in (adapter.lora_A, adapter.lora_B, adapter.magnitude))
    changed = W + adapter.base_scale * B0 @ A
    return m[:, None] * changed / np.linalg.norm(changed, axis=1, keepdims=True)


# --- DoRA -----------------------------------------------------------------------------------------

TARGETS = [["up_proj"], ["q_proj"], ["q_proj", "v_proj"], ["qkv_proj", "k_proj"]]
DORA_TARGETS = pytest.mark.parametrize("targets", TARGETS, ids=str)


@DORA_TARGETS
@pytest.mark.parametrize("form", ["gpt2", "llama"])
def test_dora_starts_as_the_base_and_is_its_formula(device, form, targets):
    model = build(form)
    base, plain = run(model), build(form)
    add_adapter(model, DoRAConfig(r=2, target_modules=targets))
    assert_allclose(run(model), base, rtol=1e-12, atol=1e-12)
    delete_adapter(model, "default")
    assert_array_equal(run(model), base)
    add(model, DoRAConfig(r=2, target_modules=[targets[0]]))
    for path, adapter in adapters_of(model).items():
        weight = plain.get_module(path).weight.data
        weight[...] = to_device(dora_weight(to_host(weight), adapter))
    assert abs(run(model) - base).max() > 1e-2
    assert_allclose(run(model), run(plain), rtol=1e-12, atol=1e-12)


@DORA_TARGETS
def test_dora_gradients(device, targets):
    model = add(build(), DoRAConfig(r=2, target_modules=targets))
    trained = dict(model.named_parameters(trainable=True))
    assert sum("magnitude" in path for path in trained) == L * len(targets)
    assert gradcheck(lambda *_: model(IDS), list(trained.values()), directions=1, eps=1e-6)
    assert min(float(abs(to_host(p.grad)).max()) for p in trained.values()) > 1e-4


@DORA_TARGETS
@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-12), ("float32", 1e-5)])
def test_dora_merges_disables_and_mixes(device, targets, dtype, tolerance):
    model = build("llama", dtype)
    base, state = run(model), model.state_dict()
    add(model, DoRAConfig(r=2, target_modules=targets))
    before, close = run(model), {"rtol": tolerance, "atol": tolerance}
    mixed = run(model, adapter_names=["default", "__base__", "default"])
    assert_allclose(mixed, np.stack([before[0], base[1], before[2]]), **close)
    merge_adapter(model)
    assert_allclose(run(model), before, **close)
    with disable_adapter(model):
        assert_array_equal(run(model), base)
    assert_allclose(run(merge_and_unload(model)), before, **close)
    unmerge_adapter(model)
    assert_array_equal(run(model), before)
    assert all(value.tobytes() == state[path].tobytes() for path, value in model.state_dict().items() if path in state)


def test_a_scale_multiplies_doras_whole_update_once(device):
    model = add(build(), DoRAConfig(r=2, target_modules=["up_proj"]))
    for scale in (0.0, 1.0, 2.0, -1.0):
        set_scale(model, "default", scale)
        plain = build()
        for path, adapter in adapters_of(model).items():
            W = to_host(plain.get_module(path).weight.data)
            plain.get_module(path).weight.data[...] = to_device(W + scale * (dora_weight(W, adapter) - W))
        assert_allclose(run(model), run(plain), rtol=1e-12, atol=1e-12)
        merge_adapter(model)
        assert_allclose(run(model), run(plain), rtol=1e-12, atol=1e-12)
        unmerge_adapter(model)


@pytest.mark.parametrize("lora_targets", [["q_proj", "up_proj"], ["qkv_proj"], ["v_proj"]], ids=str)
def test_dora_and_lora_together_add_their_updates(device, lora_targets):
    model = add(build(), DoRAConfig(r=2, target_modules=["q_proj", "up_proj"]), "dora")
    add(model, LoraConfig(r=2, target_modules=lora_targets), "lora")
    set_adapter(model, ["dora", "lora"])
    plain = build()
    W = {path: to_host(plain.get_module(path).weight.data).copy() for path in adapters_of(model, "dora")}
    for path, adapter in adapters_of(model, "dora").items():
        plain.get_module(path).weight.data += to_device(dora_weight(W[path], adapter) - W[path])
    for path, adapter in adapters_of(model, "lora").items():
        A, B0, s = adapter.factors()
        weight = plain.get_module(path).weight.data
        weight += s * (B0.data @ A.data)
    assert_allclose(run(model), run(plain), rtol=1e-12, atol=1e-12)
    assert gradcheck(lambda *_: model(IDS), [p for _, p in model.named_parameters(trainable=True)], directions=1, eps=1e-6)


def test_what_dora_inherits_from_lora_does_not_pass_for_its_update():
    model = add(build(), DoRAConfig(r=2, target_modules=["up_proj"]))
    assert all(adapter.factors() is None for adapter in adapters_of(model).values())
    assert set(analyze(model).left_out) == set(adapters_of(model))
    assert all(type(a).forward is Adapter.forward for a in adapters_of(model).values())


# --- BitFit ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("targets", [["up_proj"], ["q_proj", "v_proj"], ["qkv_proj", "o_proj"]], ids=str)
def test_a_bias_alone(device, targets):
    model, plain = build(), build()
    base = run(model)
    add_adapter(model, BitFitConfig(target_modules=targets))
    assert_array_equal(run(model), base)
    assert count_parameters(model)["trainable"] == sum(plain.get_module(path).weight.shape[0] for path in adapters_of(model))
    delete_adapter(model, "default")
    add(model, BitFitConfig(target_modules=targets))
    for path, adapter in adapters_of(model).items():
        bias = plain.get_module(path).bias.data
        bias += adapter.change.data
    before = run(model)
    assert_allclose(before, run(plain), rtol=1e-12, atol=1e-12)
    assert gradcheck(lambda *_: model(IDS), [p for _, p in model.named_parameters(trainable=True)], directions=2, eps=1e-6)
    mixed = run(model, adapter_names=["__base__", "default", "__base__"])
    assert_allclose(mixed, np.stack([base[0], before[1], base[2]]), rtol=1e-12, atol=1e-12)
    merge_adapter(model)
    assert_allclose(run(model), before, rtol=1e-12, atol=1e-12)
    unmerge_adapter(model)
    set_scale(model, "default", 0.0)
    assert_array_equal(run(model), base)


def test_a_bias_and_lora_together_stay_thin(device):
    model = add(build(), BitFitConfig(target_modules=["q_proj", "up_proj"]), "bias")
    add(model, LoraConfig(r=2, target_modules=["q_proj", "up_proj"], lora_dropout=0.5), "lora")
    both = build()
    for path, adapter in adapters_of(model, "lora").items():
        A, B0, s = adapter.factors()
        layer, change = both.get_module(path), adapters_of(model, "bias")[path].change.data
        layer.weight.data += s * (B0.data @ A.data)
        layer.bias.data += change
    set_adapter(model, ["bias", "lora"])
    assert_allclose(run(model), run(both), rtol=1e-12, atol=1e-12)
    x = tensor(np.ones((1, D)))
    assert type(model.layers[0].mlp.up_proj(x).op).__name__ == "LoRALinear"
    assert (run(model.train()) != run(model)).any()        # so the dropout of LoRA is still there


# --- a method with a forward of its own -------------------------------------------------------------


@pytest.mark.parametrize("targets", [["up_proj"], ["k_proj"], ["q_proj", "v_proj"], ["qkv_proj"]], ids=str)
def test_an_own_forward_is_used_also_on_a_block_of_a_packed_layer(device, targets):
    model = add(build(), GateConfig(target_modules=targets, lora_dropout=0.5))
    plain = add(build(), GateConfig(target_modules=targets))
    assert_array_equal(run(model), run(plain))
    assert (run(model.train()) != run(plain)).any()
    merged = deepcopy(plain)
    merge_adapter(merged)
    assert_allclose(run(merged), run(plain), rtol=1e-12, atol=1e-12)
    assert gradcheck(lambda *_: plain(IDS), [p for _, p in plain.named_parameters(trainable=True)], directions=2, eps=1e-6)


# --- a base of four bits ----------------------------------------------------------------------------


class FourBits:
    """A frozen weight in sixteen levels, one scale a row: an example of what may stand in the place of a Parameter."""

    def __init__(self, W):
        xp = array_module(W)
        self.shape, self.compute_dtype = W.shape, W.dtype
        self.scales = abs(W).max(axis=1, keepdims=True) * (1.0 / 7.0)
        self.codes = xp.rint(W / self.scales).astype("int8")
        self.made = 0                                      # dense copies so far

    def dense(self):
        self.made += 1
        return self.codes.astype(self.compute_dtype) * self.scales

    def linear(self, x):
        return x @ self.dense().T

    def linear_grad(self, dy):
        return dy @ self.dense()


def quantised(dtype="float64"):
    """A model whose up_proj are quantised, and one with the same weights dense."""
    model, reference = build(dtype=dtype), build(dtype=dtype)
    for ours, theirs in zip(model.layers, reference.layers, strict=True):
        ours.mlp.up_proj.weight = FourBits(ours.mlp.up_proj.weight.data)
        theirs.mlp.up_proj.weight.data[...] = ours.mlp.up_proj.weight.dense()
    return model, reference


def kept_arrays(result):
    found, seen, ops = [], set(), [result.op]
    while ops:
        op = ops.pop()
        if op is None or op in seen:
            continue
        seen.add(op)
        queue = [op.kept]
        while queue:
            item = queue.pop()
            if isinstance(item, (list, tuple)):
                queue.extend(item)
            elif hasattr(item, "dtype"):
                found.append(item)
        ops += [edge[0] for edge in op.edges if isinstance(edge, tuple)]
    return found


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_lora_on_four_bits_is_lora_on_the_dequantised_weight(device, dtype):
    model, reference = quantised(dtype)
    assert_array_equal(run(model), run(reference))
    config = LoraConfig(r=2, target_modules=["up_proj", "down_proj"])
    for m in (model, reference):
        add(m, config)
    assert {p.dtype for _, p in model.named_parameters()} == {np.dtype(dtype)}
    tolerance = {"rtol": 1e-12 if dtype == "float64" else 1e-5, "atol": 1e-12 if dtype == "float64" else 1e-5}
    assert_allclose(run(model), run(reference), **tolerance)
    for m in (model, reference):
        result = m(IDS)
        result.backward(np.random.default_rng(3).standard_normal(result.shape).astype(dtype))
    theirs = dict(reference.named_parameters(trainable=True))
    for path, p in model.named_parameters(trainable=True):
        assert_allclose(to_host(p.grad), to_host(theirs[path].grad), **tolerance)
    if dtype == "float64":
        assert gradcheck(lambda *_: model(IDS), [p for _, p in model.named_parameters(trainable=True)], directions=1, eps=1e-6)


@pytest.mark.parametrize("config", [LoraConfig(r=2, target_modules=["up_proj"], lora_dropout=0.1),
                                    BitFitConfig(target_modules=["up_proj"])], ids=["lora", "bitfit"])
def test_the_graph_keeps_no_dense_copy_of_four_bits(device, config):
    model, _ = quantised()
    add(model, config)
    layer = model.layers[0].mlp.up_proj
    layer.weight.made = 0
    x = tensor(np.random.default_rng(4).standard_normal((20, D)), requires_grad=True)     # rows enough to form, were it dense
    result = layer(x)
    assert layer.weight.made == 1
    assert all(a.shape != (F, D) for a in kept_arrays(result))
    result.sum().backward()
    assert layer.weight.made == 2                          # dequantised again for x̄
    assert to_host(x.grad).shape == (20, D)


@pytest.mark.parametrize("config", [DoRAConfig(r=2, target_modules=["up_proj"]),
                                    GateConfig(target_modules=["up_proj"])], ids=["dora", "gate"])
def test_any_method_works_on_four_bits(device, config):
    model, reference = quantised()
    assert_allclose(run(add(model, config)), run(add(reference, config)), rtol=1e-12, atol=1e-12)
    assert gradcheck(lambda *_: model(IDS), [p for _, p in model.named_parameters(trainable=True)], directions=1, eps=1e-6)


def test_a_linear_layer_takes_four_bits_in_place_of_a_parameter(device):
    layer = Linear(FourBits(to_device(np.random.default_rng(5).standard_normal((F, D)))))
    assert isinstance(layer.weight, FourBits) and not dict(layer.named_parameters())
    x = tensor(np.ones((2, D)))
    assert_allclose(to_host(layer(x).data), to_host(x.data) @ to_host(layer.weight.dense()).T, rtol=1e-12)


def test_a_merge_into_four_bits_is_refused(device):
    model, _ = quantised()
    add(model, LoraConfig(r=2, target_modules=["up_proj", "down_proj"]))
    before = run(model)
    for refused in (merge_adapter, merge_and_unload):
        with pytest.raises(ValueError, match="got a quantised base weight, expected a dense one"):
            refused(model)
    assert_array_equal(run(model), before)
    with disable_adapter(model):
        assert_array_equal(run(model), run(quantised()[0]))


def test_the_report_reads_a_base_of_four_bits():
    model, reference = quantised()
    for m in (model, reference):
        add(m, LoraConfig(r=2, target_modules=["up_proj"]))
    assert analyze(model).to_dict() == analyze(reference).to_dict()


# --- the registry ---------------------------------------------------------------------------------


def test_a_method_that_does_not_fit_a_layer_is_refused():
    with pytest.raises(ValueError, match="method 'test-dora' cannot adapt embed, a Embedding"):
        add_adapter(build(), DoRAConfig(r=2, target_modules=["embed"]))
