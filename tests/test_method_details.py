"""What is special to one method of adaptation. (What all have in common is in test_methods.py.)"""

from __future__ import annotations

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from small_models import IDS, build, run
from test_methods import adapters_of, add, layer_of, shake, trained

from minilora import (
    AdaLoraConfig,
    GateProx,
    LoraConfig,
    LoraFAConfig,
    LoRAFAdamW,
    RankAllocator,
    SoRAConfig,
    analyze,
    loraplus_groups,
)
from minilora.autograd import GradcheckError, cross_entropy, gradcheck, tensor
from minilora.backend import to_device, to_host
from minilora.lora import Adapter, add_adapter, set_scale
from minilora.lora.files import save_adapter
from minilora.methods import DoRA, IA3Config
from minilora.methods.dora import row_norm
from minilora.methods.lora_fa import projected_gradient
from minilora.methods.residual import randomised_svd
from minilora.methods.sora import soft_threshold
from minilora.training import SGD, AdamW, TrainConfig, train

# --- DoRA -------------------------------------------------------------------------------------------


def dora_gradients(layer, x):
    """The gradients of the input and of all parameters, for one random cotangent."""
    x = tensor(x, requires_grad=True)
    own = dict(layer.adaptation.adapters["default"].named_parameters())
    for p in own.values():
        p.grad = None
    y = layer(x)
    y.backward(to_device(np.random.default_rng(6).standard_normal(y.shape)))
    return {"x": to_host(x.grad)} | {name: to_host(p.grad) for name, p in own.items()}


def test_the_detached_norm_is_the_full_gradient_with_the_norm_held_fixed(device, monkeypatch):
    layer, adapter = layer_of("dora", (5, 3))
    adapter.detach_norm, x = True, np.random.default_rng(5).standard_normal((4, 3))
    detached = dora_gradients(layer, x)
    own = [p for _, p in adapter.named_parameters()]
    with pytest.raises(GradcheckError):                    # the function's own slope is another
        gradcheck(lambda *_: layer(to_device(x)), own)
    fixed = adapter.norm(layer.weight)
    monkeypatch.setattr(DoRA, "norm", lambda self, W: fixed)
    assert gradcheck(lambda *_: layer(to_device(x)), own, eps=1e-6)
    for name, gradient in dora_gradients(layer, x).items():
        assert_allclose(detached[name], gradient, rtol=1e-13, atol=1e-13)


def test_doras_full_gradient_is_the_formula_of_the_paper(device):
    """V̄ = (m/‖V‖)(g - ⟨g, V̂⟩ V̂) with g = ȳᵀ x, and m̄ = ⟨g, V̂⟩."""
    layer, adapter = layer_of("dora", (5, 3))
    x = np.random.default_rng(5).standard_normal((4, 3))
    got = dora_gradients(layer, x)
    A, B, m, W = (to_host(p.data) for p in (adapter.lora_A, adapter.lora_B, adapter.magnitude, layer.weight))
    s, V = adapter.base_scale, to_host(layer.weight.data) + adapter.base_scale * B @ A
    n = np.linalg.norm(V, axis=1, keepdims=True)
    g = np.random.default_rng(6).standard_normal((4, 5)).T @ x
    dV = m[:, None] / n * (g - (g * V).sum(1, keepdims=True) * V / n**2)
    for name, expected in {"lora_A": s * B.T @ dV, "lora_B": s * dV @ A.T, "magnitude": (g * V / n).sum(1)}.items():
        assert_allclose(got[name], expected, rtol=1e-11, atol=1e-12)
    adapter.detach_norm = True
    assert_allclose(dora_gradients(layer, x)["lora_B"], s * (m[:, None] / n * g) @ A.T, rtol=1e-11, atol=1e-12)
    assert W.shape == (5, 3)


@pytest.mark.parametrize("planted", ["norm of the base", "norm detached", "norm squared", "no scale"])
def test_a_planted_bug_in_dora_fails(planted, monkeypatch):
    layer, adapter = layer_of("dora", (5, 3))
    if planted == "norm of the base":
        monkeypatch.setattr(DoRA, "norm", lambda self, W: row_norm(W))
    elif planted == "norm detached":
        norm = DoRA.norm
        monkeypatch.setattr(DoRA, "norm", lambda self, W: norm(self, W).data)
    elif planted == "norm squared":
        monkeypatch.setattr(DoRA, "norm", lambda self, W: (row_norm(W) * row_norm(W)))
    else:
        monkeypatch.setattr(adapter, "base_scale", adapter.base_scale + 0.0)
        monkeypatch.setattr("minilora.methods.dora.lora_linear", lambda x, W, b, A, B, s: x @ W.data.T + (x @ A.T) @ B.T * 0.5)
    x = np.random.default_rng(5).standard_normal((4, 3))
    generic = Adapter.forward(adapter, tensor(x), layer).data
    if planted == "norm detached":
        with pytest.raises(GradcheckError):
            gradcheck(lambda *_: layer(x), [p for _, p in adapter.named_parameters()], eps=1e-6)
    else:
        assert abs(layer(tensor(x)).data - generic).max() > 1e-3


@pytest.mark.parametrize("detach", [True, False])
def test_doras_thin_forward_is_its_adapted_weight(device, detach):
    layer, adapter = layer_of("dora", (5, 3))
    adapter.detach_norm = detach
    for x in (np.random.default_rng(n).standard_normal((n, 3)) for n in (1, 40)):
        x = tensor(x)
        assert_allclose(to_host(layer(x)), to_host(Adapter.forward(adapter, x, layer)), rtol=1e-12, atol=1e-13)


def test_doras_dropout_is_on_the_input_of_the_update():
    model = build()
    add_adapter(model, LoraConfig(r=2, use_dora=True, target_modules=["up_proj"], lora_dropout=0.5))
    base = run(build())
    assert_allclose(run(model.train()), base, rtol=0, atol=1e-13)      # W' = W at the start, whatever is dropped
    shake(model)
    assert (run(model) != run(model)).any()
    assert_array_equal(run(model.eval()), run(model))
    layer, adapter = layer_of("dora", (5, 3))
    adapter.dropout, x = 0.5, np.random.default_rng(7).standard_normal((4, 3))
    layer.weight.data[...], state = layer.weight.data, adapter.rng.bit_generator.state
    got = layer(tensor(x)).data
    adapter.rng.bit_generator.state = state
    mask = np.where(adapter.rng.random(x.shape, dtype="float32") >= 0.5, 2.0, 0.0)
    W, changed = layer.weight.data, adapter.adapted_weight(layer.weight).data
    assert_allclose(got, x @ W.T + (x * mask) @ (changed - W).T + layer.bias.data, rtol=1e-12, atol=1e-13)


def test_options_that_do_not_go_together():
    with pytest.raises(ValueError, match="init_lora_weights = 'nothing'"):
        LoraConfig(init_lora_weights="nothing")
    with pytest.raises(ValueError, match="without use_dora"):
        LoraConfig(init_lora_weights="pissa", use_dora=True)


def test_a_strength_is_not_lost_in_a_file(tmp_path):
    model = add(build(), "dora", ["up_proj"])
    set_scale(model, "default", 0.5)
    with pytest.raises(ValueError, match="strength other than 1"):
        save_adapter(model, tmp_path)
    assert not list(tmp_path.iterdir())


def test_blocks_that_the_files_lack_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no name of its own in the files of gpt2"):
        save_adapter(add(build(), "dora", ["q_proj"]), tmp_path)


# --- IA3 ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("form", "expected"), [
    ("gpt2", {"attn.qkv_proj": False, "mlp.down_proj": True}),
    ("llama", {"attn.k_proj": False, "attn.v_proj": False, "mlp.down_proj": True}),
    ("bert", {"attn.k_proj": False, "attn.v_proj": False, "attn.o_proj": True, "mlp.down_proj": True})])
def test_ia3s_default_targets_are_pefts(form, expected):
    model = build(form)
    add_adapter(model, IA3Config())
    found = {path.partition("layers.0.")[2]: a.on_input for path, a in adapters_of(model).items()}
    assert {path: on_input for path, on_input in found.items() if path} == expected


# --- LoRA+ --------------------------------------------------------------------------------------------


def test_loraplus_gives_B_its_own_rate():
    model = build()
    add_adapter(model, LoraConfig(r=2, target_modules=["q_proj", "up_proj", "embed"], use_dora=False))
    groups = loraplus_groups(model, 1e-3, 8.0, loraplus_weight_decay=0.1, loraplus_lr_embedding=1e-5)
    rates = {id(p): (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}
    assert len(rates) == len(trained(model))
    for path, p in model.named_parameters(trainable=True):
        lr = 1e-5 if "embedding" in path else 8e-3 if path.endswith("lora_B") else 1e-3
        assert rates[id(p)] == (pytest.approx(lr), 0.1)
    before = {path: p.data.copy() for path, p in model.named_parameters(trainable=True)}
    shake(model)
    optimizer = SGD(loraplus_groups(model, 1.0, 16.0), lr=0.0)
    for p in trained(model):
        before[id(p)], p.grad = p.data.copy(), np.ones_like(p.data)
    optimizer.step()
    for path, p in model.named_parameters(trainable=True):
        expected = 1e-6 if "embedding" in path else 16.0 if path.endswith("lora_B") else 1.0
        assert_allclose(before[id(p)] - p.data, expected, rtol=1e-9)
    with pytest.raises(ValueError, match="expected at least 1"):
        loraplus_groups(model, 1e-3, 0.5)
    with pytest.raises(ValueError, match="no parameter trains"):
        loraplus_groups(build().freeze(), 1e-3)


def test_a_ratio_of_one_is_lora():
    steps = []
    for grouped in (False, True):
        model = build()
        add_adapter(model, LoraConfig(r=2, target_modules=["up_proj"]))
        optimizer = AdamW(loraplus_groups(model, 1e-2, 1.0) if grouped else trained(model), lr=1e-2, weight_decay=0.0)
        for _ in range(3):
            optimizer.zero_grad()
            cross_entropy(model(IDS), IDS).backward()
            optimizer.step()
        steps.append(run(model))
    assert_array_equal(*steps)


# --- LoRA-FA ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("d", "k", "r", "s"), [(5, 7, 3, 2.0), (7, 5, 1, 0.3), (1, 4, 2, 1.0)])
def test_lora_fas_projection_is_least_squares(device, rng, d, k, r, s):
    full, A = rng.standard_normal((d, k)), rng.standard_normal((r, k))
    got = to_host(projected_gradient(to_device(s * full @ A.T), to_device(A), s, delta=0.0))
    expected = np.linalg.lstsq(s * A.T, full.T, rcond=None)[0].T           # min ‖s X A - full‖
    assert_allclose(got, expected, rtol=1e-11, atol=1e-12)


def test_lora_fas_optimiser_steps_along_the_projection(device):
    model = build()
    add_adapter(model, LoraFAConfig(r=2, lora_alpha=3, target_modules=["up_proj"]))
    shake(model)
    optimizer = LoRAFAdamW(model, lr=1e-2)
    cross_entropy(model(IDS), IDS).backward()
    adapter = adapters_of(model)["layers.0.mlp.up_proj"]
    g, A, B = (to_host(t).copy() for t in (adapter.lora_B.grad, adapter.lora_A.data, adapter.lora_B.data))
    expected = g @ np.linalg.inv(A @ A.T) / 1.5**2
    optimizer.step()
    step = (B - to_host(adapter.lora_B.data)) / 1e-2                       # Adam's first step: g / (|g| + ε)
    assert_allclose(step, expected / (abs(expected) + 1e-6), rtol=1e-5)
    assert_array_equal(to_host(adapter.lora_B.grad), g)
    assert_array_equal(to_host(adapter.lora_A.data), A)
    plain = build()
    add_adapter(plain, LoraConfig(r=2, target_modules=["up_proj"]))
    with pytest.raises(ValueError, match="no active LoRA-FA adapter"):
        LoRAFAdamW(plain)


# --- PiSSA, MiLoRA, OLoRA -------------------------------------------------------------------------------


@pytest.mark.parametrize(("init", "part"), [("pissa", slice(0, 2)), ("milora", slice(-2, None))])
def test_the_part_of_the_weight_that_is_trained(device, init, part):
    model = build("llama")
    add_adapter(model, LoraConfig(r=2, lora_alpha=3, init_lora_weights=init, target_modules=["q_proj", "down_proj"]))
    for path, adapter in adapters_of(model).items():
        W = to_host(model.get_module(path).weight.data)
        U, S, Vh = np.linalg.svd(W, full_matrices=False)
        expected = U[:, part] * S[part] @ Vh[part]
        B0, A0 = to_host(adapter.B0), to_host(adapter.A0)
        assert_allclose(1.5 * B0 @ A0, expected, rtol=1e-10, atol=1e-12)
        assert_allclose(B0.T @ B0, A0 @ A0.T, atol=1e-12)              # the balanced split
        assert_allclose(np.linalg.norm(W - 1.5 * B0 @ A0) ** 2, (S**2).sum() - (S[part] ** 2).sum(), rtol=1e-10)


def test_oloras_B_is_orthonormal_and_BA_is_a_part_of_QR(device):
    model = build("llama")
    add_adapter(model, LoraConfig(r=3, lora_alpha=6, init_lora_weights="olora", target_modules=["up_proj"]))
    for path, adapter in adapters_of(model).items():
        Q, R = np.linalg.qr(to_host(model.get_module(path).weight.data))
        assert_allclose(to_host(adapter.B0).T @ to_host(adapter.B0), np.eye(3), atol=1e-12)
        assert_allclose(to_host(adapter.B0) @ to_host(adapter.A0), Q[:, :3] @ R[:3], atol=1e-12)


def test_the_randomised_svd_comes_as_near_as_its_rounds_allow(device, rng):
    W = rng.standard_normal((30, 6)) @ rng.standard_normal((6, 40)) * 3 + rng.standard_normal((30, 40)) * 0.1
    S = np.linalg.svd(W, compute_uv=False)
    best, errors = np.sqrt((S[4:] ** 2).sum()), []
    for rounds in (0, 1, 8):
        U, s, Vh = (to_host(a) for a in randomised_svd(to_device(W), 4, rounds, np.random.default_rng(0)))
        errors.append(np.linalg.norm(W - U[:, :4] * s[:4] @ Vh[:4]))
        assert_allclose(U.T @ U, np.eye(10), atol=1e-12)
    assert best <= errors[2] * (1 + 1e-12) and errors[2] < best * (1 + 1e-9) < errors[0]


@pytest.mark.parametrize("init", ["pissa", "milora", "olora"])
def test_a_residual_start_is_lora_on_the_weight_without_it(device, init):
    """W + s(BA - B₀A₀) is LoRA from B₀ and A₀ on the weight W - s B₀A₀: the same outputs and the same gradients."""
    config = LoraConfig(r=2, lora_alpha=3, init_lora_weights=init, target_modules=["up_proj"])
    model, moved = build(), build()
    add_adapter(model, config)
    add_adapter(moved, LoraConfig(r=2, lora_alpha=3, target_modules=["up_proj"]))
    for (path, ours), theirs in zip(shaken(model).items(), adapters_of(moved).values(), strict=True):
        moved.get_module(path).weight.data -= ours.base_scale * (ours.B0 @ ours.A0)
        theirs.load_state_dict(ours.state_dict())
    for m in (model, moved):
        cross_entropy(m(IDS), IDS).backward()
    assert_allclose(run(model), run(moved), rtol=1e-12, atol=1e-13)
    for a, b in zip(trained(model), trained(moved), strict=True):
        assert abs(to_host(a.grad)).max() > 1e-4
        assert_allclose(to_host(a.grad), to_host(b.grad), rtol=1e-10, atol=1e-13)


def shaken(model):
    return adapters_of(shake(model))


def test_a_number_of_rounds_is_a_number():
    with pytest.raises(ValueError, match="'pissa_niter_N' with N rounds"):
        add_adapter(build(), LoraConfig(r=2, init_lora_weights="pissa_niter_many"))


# --- SoRA -----------------------------------------------------------------------------------------------


def test_soras_step_is_the_prox(device, rng):
    """It minimises ½(x - g)² + ξ|x|: found by trying all x of a fine grid."""
    grid, g = np.linspace(-3, 3, 60001), rng.uniform(-2.5, 2.5, 50)
    best = grid[np.argmin((grid - g[:, None]) ** 2 / 2 + 0.5 * abs(grid), axis=1)]
    assert_allclose(to_host(soft_threshold(to_device(g), 0.5)), best, rtol=0, atol=1e-4)
    assert to_host(soft_threshold(to_device(np.array([0.5, -0.5, 0.0, 0.75, -1.5])), 0.5)).tolist() == [0, 0, 0, 0.25, -1.0]


def test_soras_gates_close_in_training_and_stay_out_of_the_update():
    model = build(dtype="float32")
    add_adapter(model, SoRAConfig(r=4, sparse_lambda=3.0, target_modules=["up_proj", "down_proj"]))
    prox = GateProx(model)
    config = TrainConfig(steps=20, lr=1e-2, schedule="constant", progress=False)
    train(model, lambda i: (IDS, IDS), config, callback=prox.callback)
    ranks = prox.ranks()
    assert 0 < sum(ranks.values()) < 4 * len(ranks)
    assert {row["rank"] for row in analyze(model).modules.values()} == {4}
    for path, adapter in adapters_of(model).items():
        A, B, _ = adapter.factors()
        assert np.linalg.matrix_rank(B.data @ A.data) <= ranks[path]
    plain = build()
    add_adapter(plain, LoraConfig(r=2))
    with pytest.raises(ValueError, match="is not SoRA"):
        GateProx(plain)


# --- AdaLoRA --------------------------------------------------------------------------------------------


def adalora(**fields):
    model = build(dtype="float32")
    add_adapter(model, AdaLoraConfig(**{"init_r": 4, "target_r": 2, "tinit": 3, "tfinal": 4, "deltaT": 2, "total_step": 20,
                                        "target_modules": ["q_proj", "up_proj"]} | fields))
    return model


def test_the_budget_is_cubic_continuous_and_met_exactly():
    model = adalora()
    allocator = RankAllocator(model)
    modules = len(allocator.adapters)
    assert [allocator.budget(t) for t in (0, 3, 16, 20)] == [4 * modules, 4 * modules, 2 * modules, 2 * modules]
    fine = RankAllocator(adalora(total_step=40000, tinit=1000, tfinal=1000))
    budgets = [fine.budget(t) for t in range(40001)]
    assert set(-np.diff(budgets)) == {0, 1}
    seen = []

    def callback(step, model, history):
        allocator.callback(step)
        seen.append(sum(int((a.lora_E.data != 0).sum()) for a in allocator.adapters.values()))

    train(model, lambda i: (IDS, (IDS + 1) % 11), TrainConfig(steps=20, lr=1e-2, progress=False), penalty=allocator.penalty,
          callback=callback)
    for step, ranks in allocator.ranks:
        assert sum(ranks.values()) == allocator.budget(step) == seen[step - 1]
    assert [step for step, _ in allocator.ranks] == [4, 6, 8, 10, 12, 14, 16]
    assert seen[15:] == [2 * modules] * 5                  # the last choice is kept


@pytest.mark.parametrize("orth_reg", ["paper", "peft"])
def test_adaloras_penalty_and_its_gradient(device, orth_reg):
    model = build()
    add_adapter(model, AdaLoraConfig(init_r=3, target_r=2, total_step=10, orth_reg=orth_reg, target_modules=["up_proj"]))
    shake(model)
    allocator = RankAllocator(model)
    matrices = [to_host(m) for a in allocator.adapters.values() for m in (a.lora_A.data, a.lora_B.data.T)]
    norms = [np.linalg.norm(m @ m.T - np.eye(3)) for m in matrices]
    expected = sum(n**2 for n in norms) if orth_reg == "paper" else np.mean(norms)
    assert float(to_host(allocator.orthogonality().data)) == pytest.approx(expected, rel=1e-12)
    vectors = [p for a in allocator.adapters.values() for p in (a.lora_A, a.lora_B)]
    assert gradcheck(lambda *_: allocator.orthogonality(), vectors, directions=2, eps=1e-6)
    assert gradcheck(lambda *_: model.loss(IDS, IDS) + allocator.penalty(), trained(model), directions=1, eps=1e-6)


def test_adaloras_options_that_do_not_fit():
    for fields in {"target_r": 13}, {"total_step": None}, {"tinit": 10, "tfinal": 10}, {"orth_reg": "no"}, {"use_rslora": True}:
        with pytest.raises(ValueError):
            AdaLoraConfig(**{"total_step": 20} | fields)
    with pytest.raises(ValueError, match="expected at least 2 updates before the final ones"):
        RankAllocator(adalora(total_step=3, tinit=0, tfinal=2))
    with pytest.raises(ValueError, match="is not AdaLoRA"):
        model = build()
        add_adapter(model, LoraConfig(r=2))
        RankAllocator(model)
