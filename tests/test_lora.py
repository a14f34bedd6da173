"""LoRA on a model: the no-op at the start, gradients, what is frozen, several adapters, merging, mixed batches, guards."""

from __future__ import annotations

from copy import deepcopy
from functools import partial
from importlib import import_module

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

from minilora.autograd import Op, cross_entropy, gradcheck, no_grad, tensor
from minilora.autograd.linear import LoRALinear
from minilora.backend import device_of, kernels, set_device, to_host
from minilora.lora import (
    LoraConfig,
    adapter_names,
    adapters_of,
    add_adapter,
    count_parameters,
    delete_adapter,
    disable_adapter,
    merge_adapter,
    merge_and_unload,
    set_adapter,
    set_scale,
    unmerge_adapter,
)
from minilora.lora.lora import initial_factors
from minilora.nn import Linear, Transformer, TransformerConfig, generate

products = import_module("minilora.autograd.linear")        # the module; minilora.autograd.linear is a function too

V, D, F, L, B, T = 13, 8, 12, 2, 3, 5
KV = D // 4                                                 # the width of k and v in the llama form: one head of four
IDS = np.random.default_rng(0).integers(0, V, (B, T))
FORMS = {"gpt2": {}, "bert": {"n_labels": 4}, "llama": {"n_kv_heads": 1, "n_heads": 4}}
EVERYTHING = {
    "gpt2": ["qkv_proj", "o_proj", "up_proj", "down_proj", "embed", "pos_embed", "head"],
    "bert": ["q_proj", "v_proj", "qkv_proj", "o_proj", "up_proj", "down_proj", "embed", "type_embed", "pooler"],
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "embed", "head"],
}
TARGETS = [(form, targets) for form in FORMS for targets in (
    ["q_proj"], ["k_proj", "v_proj"], ["attn.v_proj", "1.mlp.up_proj"], r"layers\.1\..*(q_proj|down_proj)", "all-linear",
    ["qkv_proj"], ["embed"], None, EVERYTHING[form])] + [
    ("bert", ["query", "intermediate.dense"]), ("bert", ["word_embeddings"]), ("gpt2", ["c_attn"]), ("gpt2", ["c_proj", "wte"]),
    ("gpt2", ["lm_head"]), ("llama", ["embed_tokens", "self_attn.q_proj"])]
forms = pytest.mark.parametrize("form", FORMS)


def build(form="gpt2", dtype="float64", spread=0.3, **fields):
    """A small model in evaluation mode, with weights large enough that every part of it matters."""
    sizes = {"vocab_size": V, "d_model": D, "n_layers": L, "n_heads": 2, "d_ff": F, "max_len": 16}
    model = Transformer(getattr(TransformerConfig, form)(**sizes | FORMS[form] | fields), dtype=dtype)
    rng = np.random.default_rng(1)
    model.load_state_dict({path: rng.standard_normal(p.shape) * spread for path, p in model.named_parameters()})
    return model.eval()


def add(model, targets=None, name="default", r=2, **fields):
    """Add an adapter whose every number is random, so that ΔW is not zero."""
    add_adapter(model, LoraConfig(r=r, target_modules=targets, **fields), name)
    rng = np.random.default_rng(sum(map(ord, name)))
    for adapter in adapters_of(model, name).values():
        for _, p in adapter.named_parameters():
            p.data[...] = device_of(p.data).put((rng.standard_normal(p.shape) * 0.5).astype(p.dtype))
    return model


def run(model, ids=IDS, **options):
    return to_host(model(ids, **options).data)


def loss(model, ids=IDS):
    """Of a language model: the next token. Of a classifier: the first token of the row modulo 4."""
    logits = model(ids)
    return cross_entropy(logits[:, :-1], ids[:, 1:]) if logits.ndim == 3 else cross_entropy(logits, ids[:, 0] % 4)


def base_state(model):
    return {path: value for path, value in model.state_dict().items() if ".adaptation." not in path}


def assert_same(state, other):
    assert state.keys() == other.keys()
    for path, value in state.items():
        assert value.dtype == other[path].dtype
        assert value.tobytes() == other[path].tobytes(), path


def graph_ops(result):
    """Every Op that made `result`."""
    found, queue = {}, [result.op]
    while queue:
        op = queue.pop()
        if op is not None and op not in found:
            found[op] = None
            queue += [edge[0] for edge in op.edges if isinstance(edge, tuple)]
    return list(found)


def kept_arrays(result):
    """Every array that the graph of `result` keeps for its backward pass."""
    found, queue = [], [op.kept for op in graph_ops(result)]
    while queue:
        item = queue.pop()
        if isinstance(item, (list, tuple)):
            queue.extend(item)
        elif hasattr(item, "dtype") and hasattr(item, "ndim"):
            found.append(item)
    return found


# --- the start, and what is targeted --------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("form", "targets"), TARGETS, ids=str)
def test_a_new_adapter_changes_nothing_bit_for_bit(device, form, targets, dtype):
    model = build(form, dtype)
    before, state = run(model), model.state_dict()
    add_adapter(model, LoraConfig(r=2, target_modules=targets))
    assert adapters_of(model)
    assert_array_equal(run(model), before)
    assert_same(base_state(model), state)
    merge_adapter(model)
    assert_array_equal(run(model), before)


def paths(model):
    return {path.removeprefix("layers.") for path in adapters_of(model)}


def blocks(*names):
    return {f"{i}.{name}" for i in range(L) for name in names}


QKV = ("attn.q_proj", "attn.k_proj", "attn.v_proj")
BERT_LINEAR = {*blocks(*QKV, "attn.o_proj", "mlp.up_proj", "mlp.down_proj"), "pooler", "classifier"}


def in_order(value):
    """The id of a parameter, equal in every process (the order of a set of strings is not)."""
    return str(sorted(value)) if isinstance(value, set) else str(value)


@pytest.mark.parametrize(("form", "targets", "expected"), [
    ("gpt2", None, blocks("attn.qkv_proj")),
    ("llama", None, blocks("attn.q_proj", "attn.v_proj")),
    ("bert", None, blocks("attn.q_proj", "attn.v_proj") | {"classifier"}),
    ("gpt2", "all-linear", blocks("attn.qkv_proj", "attn.o_proj", "mlp.up_proj", "mlp.down_proj")),
    ("llama", "all-linear", blocks(*QKV, "attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")),
    ("bert", "all-linear", BERT_LINEAR),
    ("gpt2", ["c_attn"], blocks("attn.qkv_proj")),
    ("gpt2", ["c_proj"], blocks("attn.o_proj", "mlp.down_proj")),
    ("gpt2", ["mlp.c_proj"], blocks("mlp.down_proj")),
    ("bert", ["query", "key"], blocks("attn.q_proj", "attn.k_proj") | {"classifier"}),
    ("llama", ["1.attn.q_proj", "embed"], {"1.attn.q_proj", "embed"}),
    ("llama", r".*(q_proj|down_proj)", blocks("attn.q_proj", "mlp.down_proj")),
    ("llama", r".*v_proj", blocks("attn.v_proj")),                     # not qkv_proj, which the regex matches too
    ("gpt2", r".*v_proj", blocks("attn.v_proj")),
    ("gpt2", r".*\.attn\..*", blocks("attn.qkv_proj", "attn.o_proj")),     # c_attn and c_proj, as PEFT sees it
    ("llama", r".*qkv_proj", blocks("attn.qkv_proj")),
    ("llama", r"model\.layers\.0\.self_attn\..*", {f"0.{name}" for name in (*QKV, "attn.o_proj")}),
], ids=in_order)
def test_targets(form, targets, expected):
    model = build(form)
    add_adapter(model, LoraConfig(r=2, target_modules=targets))
    assert paths(model) == expected


def test_targets_less_excluded_ones_and_other_layers():
    model = build("llama")
    add_adapter(model, LoraConfig(r=2, target_modules="all-linear", exclude_modules=["mlp.up_proj", "k_proj"],
                                  layers_to_transform=[1]), "a")
    assert set(adapters_of(model, "a")) == {"layers.1.attn.q_proj", "layers.1.attn.v_proj", "layers.1.attn.o_proj",
                                            "layers.1.mlp.gate_proj", "layers.1.mlp.down_proj"}
    add_adapter(model, LoraConfig(r=2, target_modules=["q_proj", "embed"], exclude_modules=r".*\.0\..*",), "b")
    assert set(adapters_of(model, "b")) == {"embed", "layers.1.attn.q_proj"}
    add_adapter(model, LoraConfig(r=2, target_modules=["q_proj"], layers_to_transform=0), "c")
    assert set(adapters_of(model, "c")) == {"layers.0.attn.q_proj"}


def test_a_config_may_change_after_it_was_used():
    config = LoraConfig(r=2, target_modules=["q_proj"])
    model = build()
    add_adapter(model, config)
    config.target_modules.append("up_proj")
    config.rank_pattern["q_proj"] = 1
    assert model.adapter_configs["default"] == LoraConfig(r=2, target_modules=["q_proj"])


def test_initial_values_are_the_papers_and_come_from_the_seed(device):
    A, B0 = initial_factors(True, 30, 400, 20, np.random.default_rng(0))
    assert abs(A).max() <= 400**-0.5 and abs(A.var() * 3 * 400 - 1.0) < 0.05 and not B0.any()
    A, B0 = initial_factors("gaussian", 30, 400, 20, np.random.default_rng(0))
    assert abs(A.std() * 20 - 1.0) < 0.05 and not B0.any()
    assert initial_factors(False, 30, 400, 20, np.random.default_rng(0))[1].all()
    states = []
    for seed in (3, 3, 4):
        model = build("llama", "float32")
        add_adapter(model, LoraConfig(r=2, target_modules=["q_proj", "embed"], init_lora_weights=False), seed=seed)
        states.append({path: v for path, v in model.state_dict().items() if ".adaptation." in path})
    assert_same(states[0], states[1])
    assert all((states[0][path] != states[2][path]).any() for path in states[0])
    assert len(states[0]) == 2 * (L + 1) and all(v.any() for v in states[0].values())


def test_adapters_start_equal_on_every_device():
    states = []
    for name in ("cpu", "fake"):
        model = build("llama", "float32").to(name)          # the current device stays the CPU: the model decides
        add_adapter(model, LoraConfig(r=2, target_modules=["q_proj", "embed"], init_lora_weights=False))
        assert {device_of(p.data).name for _, p in model.named_parameters()} == {name}
        states.append(model.state_dict())
    assert_same(*states)


# --- gradients ------------------------------------------------------------------------------------


PADDED = np.array([[1] * T, [1, 1, 1, 0, 0], [1] * T])


@forms
def test_the_gradients_of_a_whole_model(form):
    model = add(build(form), EVERYTHING[form])
    trained = [p for _, p in model.named_parameters(trainable=True)]
    assert gradcheck(lambda *_: model(IDS, attention_mask=PADDED), trained, directions=2, eps=1e-6)
    assert min(float(abs(p.grad).max()) for p in trained) > 1e-4               # the check was not one of zeros


@forms
def test_the_gradients_are_equal_on_every_device(device, form):
    found = []
    for name in ("cpu", device):
        model = add(build(form), EVERYTHING[form]).to(name)
        result = model(IDS, attention_mask=PADDED)
        result.backward(np.random.default_rng(2).standard_normal(result.shape))
        found.append({path: to_host(p.grad) for path, p in model.named_parameters(trainable=True)})
    assert found[0].keys() == found[1].keys()
    for path, gradient in found[0].items():
        assert_allclose(found[1][path], gradient, rtol=1e-11, atol=1e-12)


@forms
def test_the_gradients_with_two_adapters_on_and_the_base_trained_too(form):
    model = add(add(build(form), ["q_proj", "up_proj"], "a"), ["qkv_proj", "up_proj", "embed"], "b")
    set_adapter(model, ["a", "b"])
    set_scale(model, "b", -1.5)
    model.unfreeze()
    assert gradcheck(lambda *_: model(IDS), [p for _, p in model.named_parameters(trainable=True)], directions=1, eps=1e-6)


def test_only_B_moves_at_first(device):
    model = build("llama")
    add_adapter(model, LoraConfig(r=2, target_modules=["q_proj"]))
    loss(model).backward()
    for adapter in adapters_of(model).values():
        assert not to_host(adapter.lora_A.grad).any()
        assert to_host(adapter.lora_B.grad).any()


def orders(result):
    """The orders of computation, formed or not, of all adapted products in the graph of `result`."""
    return {op.formed for op in graph_ops(result) if isinstance(op, LoRALinear)}


@forms
def test_the_thin_and_the_formed_order_are_equal(device, form, monkeypatch):
    found = []
    for choice in (True, False):
        monkeypatch.setattr(products, "_forming_pays", lambda n, A, B, choice=choice: choice)
        model = add(add(build(form), EVERYTHING[form], "a"), ["q_proj", "down_proj"], "b")
        set_adapter(model, ["a", "b"])
        result = model(IDS)
        assert orders(result) == {choice}
        result.backward(np.random.default_rng(2).standard_normal(result.shape))
        found.append([to_host(result.data), *(to_host(p.grad) for _, p in model.named_parameters(trainable=True))])
    for formed, thin in zip(*found, strict=True):
        assert_allclose(formed, thin, rtol=1e-12, atol=1e-12 * abs(thin).max())


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@example(n=6, d=6, k=6, r=1)                                # a tie: then it is not formed
@given(n=st.integers(1, 40), d=st.integers(1, 30), k=st.integers(1, 30), r=st.integers(1, 8))
def test_the_weight_is_formed_exactly_when_that_costs_less(n, d, k, r):
    W, A, B = (tensor(np.ones(shape)) for shape in ((d, k), (r, k), (d, r)))
    op = LoRALinear([1.0], [slice(0, d)], [None])
    op(tensor(np.ones((n, k))), W, None, A, B)
    assert op.formed == (n * (d + k) > 2 * d * k)


@pytest.mark.parametrize("together", [(), (3,)], ids=["alone", "side by side"])
def test_gradients_through_the_whole_one_and_by_thin_products_are_equal(device, put, rng, monkeypatch, together):
    """On two overlapping row blocks, of ranks high and low, alone and along a leading axis."""
    n, k, d = 9, 5, 6
    shapes = [(*together, n, k), (d, k), *((*together, *shape) for shape in ((4, k), (3, 4), (1, k), (d, 1)))]
    arrays, found = [rng.standard_normal(shape) for shape in shapes], []
    for choice in (True, False):
        monkeypatch.setattr(products, "_whole_gradient_pays", lambda *_, choice=choice: choice)
        x, W, *factors = (tensor(put(array), requires_grad=i != 1) for i, array in enumerate(arrays))
        y = LoRALinear([0.5, 2.0], [slice(1, 4), slice(0, d)], [None, None], True)(x, W, None, *factors)
        y.backward(put(np.random.default_rng(1).standard_normal(y.shape)))
        found.append([to_host(t.grad) for t in (x, *factors)])
    for whole, thin in zip(*found, strict=True):
        assert_allclose(whole, thin, rtol=1e-12, atol=1e-12 * abs(thin).max())


@given(n=st.integers(1, 40), d=st.integers(1, 30), k=st.integers(1, 30), r=st.integers(1, 30))
def test_the_whole_gradient_is_formed_exactly_when_that_costs_less(n, d, k, r):
    """Multiply-adds, product by product."""
    thin = n * k * r + n * d * r + r * n * k + d * n * r       # U = x Aᵀ, Z = ȳ B, Zᵀ x, ȳᵀ U
    whole = d * n * k + k * d * r + d * k * r                  # G = xᵀ ȳ, G B, Gᵀ Aᵀ
    assert products._whole_gradient_pays(n, d, [np.ones((r, k))], [np.ones((d, r))]) == (whole < thin)


def test_the_weight_is_never_formed_under_dropout_or_in_a_mixed_batch():
    model = add(build("gpt2", max_len=64), ["up_proj"], lora_dropout=0.5)
    ids = np.zeros((4, 64), int)
    assert orders(model(ids)) == {True}
    assert orders(model(ids, adapter_names=["default", "__base__"] * 2)) == {False}
    assert orders(model.train()(ids)) == {False}


# --- what is frozen, what trains ------------------------------------------------------------------


@forms
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_training_leaves_the_base_bit_for_bit(device, form, dtype):
    model = add(build(form, dtype), EVERYTHING[form], lora_dropout=0.1).train()
    before, start = base_state(model), loss(model.eval()).item()
    model.train()
    trained = [p for _, p in model.named_parameters(trainable=True)]
    for _ in range(5):
        model.zero_grad()
        loss(model).backward()
        for p in trained:
            p.data -= 0.05 * p.grad
    assert_same(base_state(model), before)
    assert loss(model.eval()).item() < start
    with disable_adapter(model):
        assert_array_equal(run(model), run(build(form, dtype)))


@pytest.mark.parametrize(("form", "targets", "expected"), [
    ("gpt2", ["q_proj"], L * 3 * (D + D)),
    ("gpt2", ["qkv_proj"], L * 3 * (D + 3 * D)),
    ("gpt2", ["up_proj", "down_proj"], L * 3 * 2 * (D + F)),
    ("gpt2", ["embed"], 3 * (V + D)),
    ("gpt2", ["head"], 3 * (V + D)),
    ("gpt2", "all-linear", L * 3 * ((D + 3 * D) + (D + D) + 2 * (D + F))),
    ("llama", ["q_proj", "k_proj"], L * (3 * (D + D) + 2 * (D + KV))),     # k and v have rank 2 by rank_pattern
    ("bert", ["query"], L * 3 * (D + D) + 4 * D + 4),                      # and the classifier, weight and bias
    ("llama", "all-linear", L * (3 * 2 * (D + D) + 2 * 2 * (D + KV) + 3 * 3 * (D + F))),
], ids=str)
def test_the_number_of_trained_parameters(form, targets, expected):
    model = build(form)
    total = count_parameters(model)["total"]
    add_adapter(model, LoraConfig(r=3, target_modules=targets, rank_pattern={"k_proj": 2, "v_proj": 2}))
    counts = count_parameters(model)
    assert counts == {"trainable": expected, "total": total + expected, "share": expected / (total + expected)}


def test_patterns_and_rslora_set_rank_and_scale():
    model = build("bert")
    add_adapter(model, LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "v_proj", "up_proj"],
                                  rank_pattern={"query": 2, r"layers\.1\.mlp\..*": 1},
                                  alpha_pattern={"up_proj": 5, "1.attn.v_proj": 3}))
    found = {path: (a.factors()[0].shape[0], a.scale) for path, a in adapters_of(model).items() if path != "classifier"}
    assert found == {"layers.0.attn.q_proj": (2, 3.0), "layers.0.attn.v_proj": (4, 1.5), "layers.0.mlp.up_proj": (4, 1.25),
                     "layers.1.attn.q_proj": (2, 3.0), "layers.1.attn.v_proj": (4, 0.75), "layers.1.mlp.up_proj": (1, 5.0)}
    add_adapter(model, LoraConfig(r=4, lora_alpha=6, use_rslora=True, target_modules=["q_proj", "k_proj"],
                                  rank_pattern={"k_proj": 1}), "rs")
    assert {a.scale for path, a in adapters_of(model, "rs").items() if path.endswith("q_proj")} == {3.0}
    assert {a.scale for path, a in adapters_of(model, "rs").items() if path.endswith("k_proj")} == {6.0}


@pytest.mark.parametrize(("rslora", "scale"), [(False, 8 / 2), (True, 8 / 2**0.5)])
def test_the_update_is_s_B_A(device, rslora, scale):
    model = add(build("gpt2"), ["up_proj"], lora_alpha=8, use_rslora=rslora)
    layer = model.layers[0].mlp.up_proj
    adapter, x = adapters_of(model)["layers.0.mlp.up_proj"], np.random.default_rng(5).standard_normal((2, 3, D))
    A, B0, W, b = (to_host(p.data) for p in (adapter.lora_A, adapter.lora_B, layer.weight, layer.bias))
    assert_allclose(to_host(layer(tensor(x)).data), x @ (W + scale * B0 @ A).T + b, rtol=1e-12)


@forms
def test_only_active_adapters_train(form):
    model = add(add(build(form), ["q_proj", "embed"], "a"), ["q_proj", "up_proj"], "b")
    for active in ("a", ["b"], ["a", "b"], None):
        set_adapter(model, active)
        names = {path.split(".adapters.")[1].split(".")[0] for path, _ in model.named_parameters(trainable=True)}
        assert names == ({active} if isinstance(active, str) else set(active or ()))
        if names:
            model.zero_grad()
            loss(model).backward()
            with_grad = {path for path, p in model.named_parameters() if p.grad is not None}
            assert with_grad == {path for path, _ in model.named_parameters(trainable=True)}


@pytest.mark.parametrize("formed", [True, False])
def test_no_product_as_large_as_a_frozen_weight_is_made_for_its_gradient(device, formed, monkeypatch):
    """A dW sums over all n rows of the batch. The only products that do are dA and dB, which have r rows or columns."""
    monkeypatch.setattr(products, "_forming_pays", lambda n, A, B: formed)
    ids, r = np.zeros((7, 11), int), 2
    model = add(build("gpt2"), ["qkv_proj", "up_proj"], r=r)
    result, shapes = loss(model, ids), []
    multiply = type(kernels(model.embed.weight.data)).matmul

    def spy(self, a, b, ta=False, tb=False):
        y = multiply(self, a, b, ta, tb)
        shapes.append((a.shape[-2] if ta else a.shape[-1], y.shape))
        return y

    monkeypatch.setattr(type(kernels(model.embed.weight.data)), "matmul", spy)
    result.backward()
    over_rows = [shape for summed, shape in shapes if summed == 7 * 11]
    assert len(over_rows) == 2 * 2 * L
    assert all(r in shape for shape in over_rows)
    assert all(p.grad is None for path, p in model.named_parameters(trainable=False))


@pytest.mark.parametrize("formed", [True, False])
def test_the_input_of_a_frozen_layer_is_kept_only_under_an_adapter(device, formed, monkeypatch):
    monkeypatch.setattr(products, "_forming_pays", lambda n, A, B: formed)
    model = add(build("gpt2"), ["up_proj"])
    layer = model.layers[0]
    x = tensor(np.ones((2, 3, D)), requires_grad=True)

    def keeps_x(linear):
        return any(a is x.data for a in kept_arrays(linear(x)))

    assert not keeps_x(layer.attn.o_proj) and not keeps_x(layer.attn.qkv_proj)
    assert keeps_x(layer.mlp.up_proj)
    set_adapter(model, None)
    assert not keeps_x(layer.mlp.up_proj)
    set_adapter(model, "default")
    with no_grad():
        assert layer.mlp.up_proj(x).op is None
    model.freeze()                                         # an adapter that is on but does not train: x̄ needs the weights only
    assert not keeps_x(layer.mlp.up_proj)


# --- dropout --------------------------------------------------------------------------------------


def test_dropout_is_on_the_branch_only_and_off_in_evaluation(device):
    model = add(build("gpt2"), ["up_proj"], lora_dropout=0.5)
    plain = add(build("gpt2"), ["up_proj"])
    assert_array_equal(run(model), run(plain))
    model.train()
    assert (run(model) != run(plain)).any()
    set_scale(model, "default", 0.0)
    assert_array_equal(run(model), run(build("gpt2")))


def test_dropout_has_the_mean_of_the_layer_without_it():
    model = add(build("gpt2"), ["up_proj"], lora_dropout=0.25).train()
    layer, x = model.layers[0].mlp.up_proj, np.random.default_rng(1).standard_normal(D)
    with no_grad():
        samples = layer(tensor(np.tile(x, (40_000, 1)))).data
        exact = layer.adaptation.eval() and layer(tensor(x[None])).data[0]
    error = samples.std(axis=0) / 200
    assert (error > 0).all()
    assert (abs(samples.mean(axis=0) - exact) < 5 * error).all()


def test_dropout_is_reproducible_by_seed_and_differs_between_calls(device):
    outputs = []
    for seed in (5, 5, 6):
        model = build("gpt2")
        add_adapter(model, LoraConfig(r=2, target_modules=["up_proj", "q_proj"], lora_dropout=0.5, init_lora_weights=False),
                    seed=seed)
        model.train()
        outputs.append([run(model), run(model)])
    assert_array_equal(outputs[0], outputs[1])
    assert (outputs[0][0] != outputs[0][1]).any()
    assert (outputs[0][0] != outputs[2][0]).any()


def test_the_gradient_is_right_for_a_fixed_mask():
    model = add(build("llama"), ["q_proj", "v_proj", "up_proj"], lora_dropout=0.5).train()
    (_, rng), *others = [(path, g) for path, g in model.named_generators() if ".adapters." in path]
    assert not others                                      # one generator for all layers of the adapter
    state = rng.bit_generator.state

    def fn(*_):
        rng.bit_generator.state = state
        return model(IDS)

    assert gradcheck(fn, [p for _, p in model.named_parameters(trainable=True)], directions=2, eps=1e-6)


# --- several adapters -----------------------------------------------------------------------------


def by_hand(form, parts):
    """The plain model whose weights have s·B@A added by hand: parts is [(model, adapter, factor)]."""
    plain = build(form)
    for model, name, factor in parts:
        for path, adapter in adapters_of(model, name).items():
            layer = plain.get_module(path)
            if adapter.factors() is None:                  # a classifier that was trained whole
                for leaf in ("weight", "bias"):
                    change = getattr(adapter, leaf).data - getattr(build(form).classifier, leaf).data
                    getattr(layer, leaf).data += factor * change
                continue
            A, B0, s = adapter.factors()
            weight = layer.weight.data                     # of a packed layer the packed one, so this writes to its blocks
            weight += factor * s * (B0.data @ A.data)
    return plain


@forms
def test_adapters_are_added_chosen_summed_scaled_and_deleted(device, form):
    targets = [t for t in EVERYTHING[form] if t not in ("embed", "head")]
    model = build(form)
    base, state = run(model), model.state_dict()
    add(model, targets, "a", r=2)
    add(model, ["up_proj", "q_proj"], "b", r=3, lora_alpha=5)
    assert adapter_names(model) == ["a", "b"]
    one, two, both = (run(by_hand(form, [(model, name, 1.0) for name in names])) for names in (["a"], ["b"], ["a", "b"]))
    close = partial(assert_allclose, rtol=1e-11, atol=1e-11)
    close(run(model), two)                                 # the newest is active
    set_adapter(model, "a")
    close(run(model), one)
    for names in (["a", "b"], ("b", "a"), ["a", "b", "a"]):
        set_adapter(model, names)
        close(run(model), both)
    set_adapter(model, None)
    assert_array_equal(run(model), base)
    set_adapter(model, "a")
    expected = {factor: run(by_hand(form, [(model, "a", factor)])) for factor in (0.0, -1.0, 2.0)}
    for factor in expected:
        set_scale(model, "a", factor)
        close(run(model), expected[factor])
    set_scale(model, "a", 0.0)
    assert_array_equal(run(model), base)
    set_scale(model, "a", 1.0)
    set_adapter(model, ["a", "b"])
    delete_adapter(model, "b")
    assert adapter_names(model) == ["a"]
    close(run(model), one)
    delete_adapter(model, "a")
    assert_array_equal(run(model), base)
    assert_same(model.state_dict(), state)
    assert all(getattr(m, "adaptation", None) is None for _, m in model.named_modules())


@forms
def test_disable_gives_the_base_back_and_restores_also_after_an_exception(device, form):
    model = build(form)
    base = run(model)
    add(model, EVERYTHING[form])
    on = run(model)
    for merged in (False, True):
        if merged:
            merge_adapter(model)
            on = run(model)
        with disable_adapter(model):
            assert_array_equal(run(model), base)
            with disable_adapter(model):
                assert_array_equal(run(model), base)
            assert_array_equal(run(model), base)
        assert_array_equal(run(model), on)
        with pytest.raises(ZeroDivisionError), disable_adapter(model):
            raise ZeroDivisionError
        assert_array_equal(run(model), on)


def test_unmerging_while_disabled_stays_unmerged():
    model = build()
    base, state = run(model), model.state_dict()
    add(model, EVERYTHING["gpt2"])
    on = run(model)
    merge_adapter(model)
    with disable_adapter(model):
        unmerge_adapter(model)
        assert_array_equal(run(model), base)
    assert_array_equal(run(model), on)
    assert_same(base_state(model), state)


def test_a_copy_of_a_model_with_adapters_is_independent():
    model = add(build("llama"), EVERYTHING["llama"])
    copy, before = deepcopy(model), run(model)
    assert_array_equal(run(copy), before)
    merge_adapter(copy)
    assert_allclose(run(copy), before, rtol=1e-11, atol=1e-11)
    unmerge_adapter(copy)
    add(copy, ["q_proj"], "other")
    assert adapter_names(model) == ["default"]
    assert_array_equal(run(model), before)


# --- merging --------------------------------------------------------------------------------------


@forms
@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-12), ("float32", 1e-5)])
def test_merged_equals_unmerged_and_unmerge_is_exact(device, form, dtype, tolerance):
    model = build(form, dtype, spread=0.1)
    add(model, EVERYTHING[form], "a")
    add(model, ["v_proj", "up_proj", "qkv_proj"], "b")
    set_adapter(model, ["a", "b"])
    set_scale(model, "a", -0.5)
    before, state, flags = run(model), model.state_dict(), [(path, p.requires_grad) for path, p in model.named_parameters()]
    merge_adapter(model)
    merged = run(model)
    assert (merged != before).any() or dtype == "float64"
    assert_allclose(merged, before, rtol=tolerance, atol=tolerance * abs(before).max())
    merge_adapter(model)
    assert_array_equal(run(model), merged)
    model.train().eval()
    assert_array_equal(run(model), merged)                 # still merged, still once
    unmerge_adapter(model)
    assert_array_equal(run(model), before)
    assert_same(model.state_dict(), state)
    assert [(path, p.requires_grad) for path, p in model.named_parameters()] == flags
    unmerge_adapter(model)
    assert_same(model.state_dict(), state)


@forms
def test_train_and_eval_never_merge(form):
    model = add(build(form), EVERYTHING[form])
    state, arrays = base_state(model), {path: id(p.data) for path, p in model.named_parameters()}
    for mode in (True, False, True):
        model.train(mode)
        run(model)
        assert_same(base_state(model), state)
        assert {path: id(p.data) for path, p in model.named_parameters()} == arrays


@forms
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("merged", [False, True])
def test_unload_is_a_new_plain_model_and_the_old_one_stays(device, form, dtype, merged):
    model = add(build(form, dtype, spread=0.1), EVERYTHING[form])
    if merged:
        merge_adapter(model)
    before, state = run(model), model.state_dict()
    plain = merge_and_unload(model)
    tolerance = 1e-12 if dtype == "float64" else 1e-5
    assert_allclose(run(plain), before, rtol=tolerance, atol=tolerance * abs(before).max())
    assert_same(model.state_dict(), state)
    assert_array_equal(run(model), before)
    assert adapter_names(plain) == [] and adapter_names(model) == ["default"]
    assert all(".adaptation." not in path and p.requires_grad for path, p in plain.named_parameters())
    for _, p in plain.named_parameters():
        p.data[...] = 0.0                                  # they share nothing
    assert_array_equal(run(model), before)


@pytest.mark.parametrize("target", ["embed", "head"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_merged_tied_weight_unties_and_unmerge_ties_it_again(device, target, dtype):
    model = build("gpt2", dtype, spread=0.1)
    base = model.state_dict()
    add(model, [target])
    before = run(model)
    merge_adapter(model)
    assert model.head.weight is not model.embed.weight
    other = model.embed if target == "head" else model.head
    assert to_host(other.weight.data).tobytes() == base["embed.weight"].tobytes()
    assert_allclose(run(model), before, rtol=1e-4 if dtype == "float32" else 1e-11, atol=1e-6 if dtype == "float32" else 1e-12)
    plain = merge_and_unload(model)
    assert not plain.cfg.tie_embeddings and model.cfg.tie_embeddings
    assert_array_equal(run(plain), run(model))
    unmerge_adapter(model)
    assert model.head.weight is model.embed.weight
    assert_same(base_state(model), base)
    assert_array_equal(run(model), before)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_an_adapter_that_diverged_is_not_merged(device, bad):
    model = add(build("llama"), EVERYTHING["llama"])
    state = base_state(model)
    last = list(adapters_of(model).values())[-1]
    last.lora_B.data[:1, :1] = bad                         # one row of one layer
    for refused in (merge_adapter, merge_and_unload):
        with pytest.raises(ValueError, match=r"got NaN or infinite values .* expected finite numbers") as error:
            refused(model)
        assert "\n" not in str(error.value)
        assert_same(base_state(model), state)
        assert all(m.adaptation.saved is None for _, m in model.named_modules() if getattr(m, "adaptation", None) is not None)


def test_a_merged_model_can_be_moved_and_unmerged():
    model = add(build("llama"), EVERYTHING["llama"])
    before, state = run(model), model.state_dict()
    merge_adapter(model)
    model.to("fake")
    assert_allclose(run(model), before, rtol=1e-11, atol=1e-11)
    assert {device_of(p.data).name for _, p in merge_and_unload(model).named_parameters()} == {"fake"}
    unmerge_adapter(model)
    assert_same(model.state_dict(), state)
    assert_allclose(run(model.to("cpu")), before, rtol=1e-12)


def test_a_merged_model_generates_as_the_unmerged_one():
    model = add(build("llama"), "all-linear")
    tokens = generate(model, IDS[:, :2], 6)
    merge_adapter(model)
    assert_array_equal(generate(model, IDS[:, :2], 6), tokens)
    with disable_adapter(model):
        assert_array_equal(generate(model, IDS[:, :2], 6), generate(build("llama"), IDS[:, :2], 6))


# --- mixed batches --------------------------------------------------------------------------------


@forms
@pytest.mark.parametrize("active", [None, "a", ["a", "b"]])
def test_each_row_of_a_mixed_batch_is_its_adapter_alone(device, form, active):
    model = build(form)
    base = run(model)
    add(model, EVERYTHING[form], "a")
    add(model, ["q_proj", "qkv_proj", "down_proj"], "b", r=3)
    alone = {"__base__": base}
    for name in ("a", "b"):
        set_adapter(model, name)
        alone[name] = run(model)
    set_adapter(model, active)
    before = run(model)
    for names in (["a", "__base__", "b"], ["b", "b", "a"], ["__base__"] * 3, ["a"] * 3):
        mixed = run(model, adapter_names=names)
        for row, name in enumerate(names):
            assert_allclose(mixed[row], alone[name][row], rtol=1e-12, atol=1e-12)
            assert name == "__base__" or abs(mixed[row] - base[row]).max() > 1e-3
    assert_array_equal(run(model), before)


def test_dropout_in_a_mixed_batch_touches_the_adapters_rows_only(device):
    model = add(build("gpt2"), ["up_proj"], lora_dropout=0.5).train()
    names = ["default", "__base__", "default"]
    one, two = run(model, adapter_names=names), run(model, adapter_names=names)
    assert_array_equal(one[1], run(build("gpt2"))[1])
    assert_array_equal(two[1], one[1])
    assert (one[0] != two[0]).any() and (one[2] != two[2]).any()


@forms
def test_the_gradients_of_a_mixed_batch(form):
    model = add(add(build(form), EVERYTHING[form], "a"), ["q_proj", "down_proj"], "b")
    set_adapter(model, ["a", "b"])
    trained = [p for _, p in model.named_parameters(trainable=True)]
    assert gradcheck(lambda *_: model(IDS, adapter_names=["b", "__base__", "a"]), trained, directions=1, eps=1e-6)


# --- guards ---------------------------------------------------------------------------------------

REFUSED = {
    "an unknown target": ({"target_modules": ["q_proj", "nonsense"]}, {}, r"'nonsense' is not in this model: expected one of"),
    "an unknown regex": ({"target_modules": "q_pro"}, {}, r"'q_pro' is not in this model: expected"),
    "nothing left": ({"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]}, {}, r"no module is left to adapt"),
    "no such layer": ({"target_modules": ["q_proj"], "layers_to_transform": 7}, {}, r"no module is left to adapt"),
    "a rank too large": ({"r": D + 1, "target_modules": ["q_proj"]}, {}, r"rank 9 on .*q_proj .* expected at most 8"),
    "a rank too large for a table": ({"r": D + 1, "target_modules": ["embed"]}, {}, r"rank 9 on embed .* expected at most 8"),
    "a rank too large by pattern": ({"target_modules": ["up_proj"], "rank_pattern": {"1.mlp.up_proj": 99}}, {}, r"rank 99 on"),
    "a name that is taken": ({}, {"name": "first"}, r"already has an adapter 'first': choose another name"),
    "a name with a dot": ({}, {"name": "a.b"}, r"'a\.b': expected a non-empty name without dots"),
    "an empty name": ({}, {"name": ""}, r"expected a non-empty name"),
    "the name of the base": ({}, {"name": "__base__"}, r"expected .* not __base__"),
    "nothing to save": ({"modules_to_save": ["nonsense"]}, {}, r"modules_to_save: got 'nonsense', expected"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_refused_adapter_leaves_the_model_as_it_was(device, case):
    fields, options, message = REFUSED[case]
    model = add(build("gpt2"), ["up_proj"], "first")

    def snapshot():
        return ([(path, p.requires_grad, id(p.data)) for path, p in model.named_parameters()],
                [path for path, _ in model.named_modules()], adapter_names(model), run(model).tobytes())

    before = snapshot()
    with pytest.raises(ValueError, match=message) as error:
        add_adapter(model, LoraConfig(**{"r": 2} | fields), **{"name": "new"} | options)
    assert "\n" not in str(error.value)
    assert snapshot() == before


@pytest.mark.parametrize(("fields", "message"), [
    ({"r": 0}, r"rank r = 0: expected a whole number of at least 1"),
    ({"r": 2.5}, r"rank r = 2\.5"),
    ({"r": True}, r"rank r = True"),
    ({"rank_pattern": {"q_proj": 0}}, r"rank q_proj = 0: expected"),
    ({"lora_dropout": 1.0}, r"lora_dropout = 1\.0: expected 0 <= p < 1"),
    ({"lora_dropout": -0.1}, r"lora_dropout"),
    ({"init_lora_weights": "pisa"}, r"init_lora_weights = 'pisa': expected True, False or 'gaussian'"),
    ({"target_modules": "*q_proj"}, r"target_modules = '\*q_proj': expected a list of names or a regex"),
    ({"exclude_modules": "("}, r"exclude_modules = '\(': expected"),
])
def test_a_config_out_of_range_is_refused(fields, message):
    with pytest.raises(ValueError, match=message) as error:
        LoraConfig(**fields)
    assert "\n" not in str(error.value)


def test_an_unknown_adapter_is_refused():
    model = add(build("gpt2"), ["up_proj"], "first")
    before = run(model)
    for refused in (lambda: set_adapter(model, "x"), lambda: set_adapter(model, ["first", "x"]),
                    lambda: delete_adapter(model, "x"), lambda: set_scale(model, "x", 2.0), lambda: adapters_of(model, "x")):
        with pytest.raises(KeyError, match=r"no adapter 'x' on this model: it has first"):
            refused()
    with pytest.raises(ValueError, match="no adapter named 'x'"):
        model(IDS, adapter_names=["x", "first", "__base__"])
    with pytest.raises(ValueError, match="2 adapter names for a batch of 3 rows"):
        model(IDS, adapter_names=["first", "first"])
    with pytest.raises(ValueError, match="scale: got nan, expected a finite number"):
        set_scale(model, "first", float("nan"))
    with pytest.raises(KeyError, match="it has none"):
        set_adapter(build("gpt2"), "first")
    assert_array_equal(run(model), before)


def test_what_would_lose_a_merge_is_refused_while_merged():
    model = add(build("gpt2"), ["up_proj"], "first")
    merge_adapter(model)
    merged = run(model)
    for refused in (lambda: add_adapter(model, LoraConfig(r=2), "second"), lambda: set_adapter(model, "first"),
                    lambda: set_adapter(model, None), lambda: delete_adapter(model, "first"),
                    lambda: set_scale(model, "first", 2.0), lambda: model(IDS, adapter_names=["first"] * B)):
        with pytest.raises(ValueError, match=r"while adapters are merged: unmerge_adapter\(model\) first"):
            refused()
    assert_array_equal(run(model), merged)


# --- float32 --------------------------------------------------------------------------------------


@forms
@pytest.mark.parametrize("alpha", [16, np.float64(16.0)])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_no_float64_array_in_a_float32_step(device, form, alpha, dropout, monkeypatch):
    """The stand-in for CuPy refuses a float64 array wherever one comes up; on NumPy we look at all that ops take and give."""
    model = add(build(form, "float32"), EVERYTHING[form], lora_alpha=alpha, lora_dropout=dropout).train()
    set_scale(model, "default", np.float64(0.5))
    seen, call, pull = set(), Op.__call__, Op.pull

    def called(op, *inputs):
        result = call(op, *inputs)
        seen.update(str(t.dtype) for t in (result if isinstance(result, tuple) else (result,)))
        return result

    def pulled(op, cotangents, retain_graph):
        for edge, gradient in pull(op, cotangents, retain_graph):
            seen.add(str(gradient.dtype))
            yield edge, gradient

    monkeypatch.setattr(Op, "__call__", called)
    monkeypatch.setattr(Op, "pull", pulled)
    total = loss(model)
    seen.update(str(a.dtype) for a in kept_arrays(total))
    total.backward()
    assert seen - {"bool", "int64"} == {"float32"}
    assert {str(p.dtype) for _, p in model.named_parameters()} == {"float32"}
    assert {str(p.grad.dtype) for _, p in model.named_parameters(trainable=True)} == {"float32"}
    merge_adapter(model)
    assert {str(p.dtype) for _, p in model.named_parameters()} == {"float32"}


def test_a_plain_linear_layer_takes_no_adapter_by_itself():
    layer = Linear(np.ones((3, 2)))
    assert layer.adaptation is None
    assert_array_equal(layer(tensor(np.ones((1, 2)))).data, [[2.0, 2.0, 2.0]])


def test_the_current_device_does_not_decide_where_adapters_live(device):
    before = build("gpt2")
    set_device("cpu")
    try:
        assert_array_equal(run(add(before, ["q_proj", "embed"])).shape, (B, T, V))
    finally:
        set_device(device)


@pytest.mark.parametrize("targets, saved", [(["qkv_proj"], "q_proj"), (["v_proj"], "qkv_proj")])
def test_rows_are_adapted_or_saved_whole_and_not_both(targets, saved):
    """No file could hold both; rows that are not shared may do as they like."""
    model = build("llama", n_kv_heads=1, n_heads=4)
    before = model.state_dict()
    with pytest.raises(ValueError, match=f"modules_to_save: .*{saved} shares rows with a layer that is adapted"):
        add_adapter(model, LoraConfig(r=2, target_modules=targets, modules_to_save=[saved]))
    assert adapter_names(model) == [] and model.state_dict().keys() == before.keys()
    add_adapter(model, LoraConfig(r=2, target_modules=["v_proj"], modules_to_save=["q_proj"]))
