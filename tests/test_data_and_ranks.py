"""LoRA with a start from data (EVA), with ranks that shrink in training, and with steps that do not see how ΔW is split."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from small_models import IDS, B, L, T, V, build, run
from test_methods import shake

import minilora as ml
from minilora import DynamicRank, LoraConfig, Riemannian, initialize_lora_eva_weights
from minilora.backend import to_device, to_host
from minilora.lora import adapters_of, add_adapter, disable_adapter
from minilora.methods.eva import InputPCA
from minilora.methods.riemannian import solved
from minilora.training import SGD, AdamW, TrainConfig, train

QUIET = {"progress": False, "schedule": "constant"}


def batch_of(i):
    ids = np.random.default_rng([7, i]).integers(0, V, (B, T))
    return ids, (ids + 1) % V


# --- EVA ----------------------------------------------------------------------------------------------


def test_the_directions_of_batches_are_those_of_all_inputs(device, rng):
    X = rng.standard_normal((40, 6)) @ rng.standard_normal((6, 6)) + 3.0
    pca = InputPCA(6)
    for part in np.split(X, [7, 8, 25]):
        pca.add(to_device(part))
    centred = X - X.mean(axis=0)
    _, S, Vh = np.linalg.svd(centred, full_matrices=False)
    assert_allclose(to_host(pca.S), S, rtol=1e-10)
    assert_allclose(abs((to_host(pca.V) * Vh).sum(axis=1)), 1.0, rtol=1e-10)
    assert pca.total == pytest.approx((centred**2).sum(), rel=1e-12)


@pytest.mark.parametrize("form", ["gpt2", "llama"])
def test_A_is_the_main_directions_of_the_layers_inputs(device, form):
    """By hand: the inputs of down_proj and v_proj of the base, padding left out; q_proj and v_proj see the same ones."""
    model = build(form)
    base = run(model)
    add_adapter(model, LoraConfig(r=2, lora_alpha=3, init_lora_weights="eva", target_modules=["q_proj", "v_proj", "down_proj"]))
    seen = {path: [] for path in adapters_of(model)}
    mask = np.ones((B, T), int)
    mask[0, 2:] = 0
    ranks = initialize_lora_eva_weights(model, [{"ids": IDS, "targets": IDS, "attention_mask": mask}], rho=1.0)
    assert ranks == dict.fromkeys(seen, 2)
    with disable_adapter(model):
        for i, layer in enumerate(model.layers):
            for owner, path in ((layer.attn.qkv_proj, "attn.v_proj"), (layer.mlp.down_proj, "mlp.down_proj")):
                def watched(x, base=owner, path=f"layers.{i}.{path}"):
                    seen[path].append(to_host(x.data).reshape(-1, x.shape[-1])[np.flatnonzero(mask)])
                    return type(base).forward(base, x)
                owner.forward = watched
        model(IDS, attention_mask=mask)
    for path, (X,) in ((path, inputs) for path, inputs in seen.items() if inputs):
        _, _, Vh = np.linalg.svd(X - X.mean(axis=0), full_matrices=False)
        A = to_host(adapters_of(model)[path].lora_A.data)
        assert_allclose(abs((A * Vh[:2]).sum(axis=1)), 1.0, rtol=1e-9, err_msg=path)
    for i in range(L):
        q, v = (to_host(adapters_of(model)[f"layers.{i}.attn.{name}"].lora_A.data) for name in ("q_proj", "v_proj"))
        assert_array_equal(q, v)
    for layer in model.layers:
        del layer.attn.qkv_proj.forward, layer.mlp.down_proj.forward
    assert_allclose(run(model), base, rtol=0, atol=1e-14)
    assert all(a.base_scale == 1.5 and not to_host(a.lora_B.data).any() for a in adapters_of(model).values())


@pytest.mark.parametrize("rslora", [False, True])
def test_ranks_go_to_the_modules_whose_few_directions_explain_most(rslora, tmp_path):
    """The sum of the ranks stays, none is above ρ r, scales stay, and the files say all that."""
    model = build("llama")
    config = LoraConfig(r=3, lora_alpha=6, use_rslora=rslora, init_lora_weights="eva", target_modules=["o_proj", "down_proj"])
    add_adapter(model, config)
    scale = next(iter(adapters_of(model).values())).base_scale
    ranks = initialize_lora_eva_weights(model, [batch_of(i) for i in range(5)], rho=2.0)
    assert sum(ranks.values()) == 3 * 2 * L and max(ranks.values()) <= 6 and len(set(ranks.values())) > 1
    assert {path: len(a.lora_A) for path, a in adapters_of(model).items()} == ranks
    assert all(a.base_scale == pytest.approx(scale, rel=1e-12) for a in adapters_of(model).values())
    train(model, batch_of, TrainConfig(steps=3, lr=1e-2, **QUIET))
    ml.save_adapter(model, tmp_path)
    again = build("llama")
    ml.load_adapter(again, tmp_path)
    assert_allclose(run(again), run(model), rtol=1e-12, atol=1e-13)


def test_evas_reading_stops_when_the_directions_stand_still():
    model, read = build("llama"), []

    def batches():
        for i in range(50):
            read.append(i)
            yield IDS, IDS                                 # the same inputs: nothing turns after the first two
    add_adapter(model, LoraConfig(r=2, init_lora_weights="eva"))
    initialize_lora_eva_weights(model, batches())
    assert len(read) == 2


def test_eva_whitened_and_refused():
    models = [build("llama") for _ in range(2)]
    for model, whiten in zip(models, (False, True), strict=True):
        add_adapter(model, LoraConfig(r=2, init_lora_weights="eva"))
        initialize_lora_eva_weights(model, [batch_of(0)], rho=1.0, whiten=whiten)
    plain, white = (to_host(adapters_of(m)["layers.0.attn.q_proj"].lora_A.data) for m in models)
    assert_allclose(np.linalg.norm(plain, axis=1), 1.0, rtol=1e-12)
    lengths = np.linalg.norm(white, axis=1)
    assert lengths[0] < lengths[1] and not np.allclose(lengths, 1.0)
    model = build("llama")
    add_adapter(model, LoraConfig(r=2))
    with pytest.raises(ValueError, match='init_lora_weights="eva"'):
        initialize_lora_eva_weights(model, [batch_of(0)])
    add_adapter(model, LoraConfig(r=2, init_lora_weights="eva"), "new")
    with pytest.raises(ValueError, match="got no batches"):
        initialize_lora_eva_weights(model, [], "new")
    shake(model, "new")
    with pytest.raises(ValueError, match="a new one"):
        initialize_lora_eva_weights(model, [batch_of(0)], "new")
    assert all(layer.attn.qkv_proj.adaptation is None or not isinstance(layer.attn.qkv_proj.adaptation, InputPCA)
               for layer in model.layers)
    with pytest.raises(ValueError, match="'eva'; use_dora goes without"):
        LoraConfig(init_lora_weights="eva", use_dora=True)


# --- ranks that shrink --------------------------------------------------------------------------------


def planted(model, rank):
    """Give every update this rank, in factors of the adapter's own."""
    rng = np.random.default_rng(3)
    for a in adapters_of(model).values():
        r = len(a.lora_A)
        mix = rng.standard_normal((r, rank))
        a.lora_B.data[...] = to_device(rng.standard_normal((len(a.lora_B), rank)) @ rng.standard_normal((rank, r)))
        a.lora_A.data[...] = to_device(mix @ rng.standard_normal((rank, a.lora_A.shape[1])))


def test_a_cut_keeps_the_update_and_finds_its_rank(device):
    """Updates of rank 2 in factors of rank 5: cut to 2, the same function, and compact with the same scales."""
    model = build()
    add_adapter(model, LoraConfig(r=5, lora_alpha=7, target_modules=["q_proj", "up_proj"]))
    planted(model, 2)
    before, shrink = run(model), DynamicRank(model, energy=1.0 - 1e-12, every=1)
    shrink.callback(1)
    assert shrink.ranks == [(0, dict.fromkeys(adapters_of(model), 5)), (1, dict.fromkeys(adapters_of(model), 2))]
    assert_allclose(run(model), before, rtol=1e-10, atol=1e-12)
    for a in adapters_of(model).values():
        assert not to_host(a.lora_A.data)[2:].any() and not to_host(a.lora_B.data)[:, 2:].any()
    shrink.compact()
    assert {len(a.lora_A) for a in adapters_of(model).values()} == {2}
    assert_allclose(run(model), before, rtol=1e-10, atol=1e-12)


def test_a_cut_is_the_best_approximation():
    model = build()
    add_adapter(model, LoraConfig(r=4, target_modules=["up_proj"]))
    shake(model)
    adapter = adapters_of(model)["layers.0.mlp.up_proj"]
    delta = adapter.base_scale * adapter.lora_B.data @ adapter.lora_A.data
    DynamicRank(model, every=1, target_r=2).callback(1)
    U, S, Vh = np.linalg.svd(delta)
    assert_allclose(adapter.base_scale * adapter.lora_B.data @ adapter.lora_A.data, (U[:, :2] * S[:2]) @ Vh[:2], rtol=1e-10,
                    atol=1e-13)


def test_what_is_cut_stays_zero_in_training_and_ranks_are_recorded(device, tmp_path):
    model = build("llama", dtype="float32")
    add_adapter(model, LoraConfig(r=4, target_modules=["q_proj", "up_proj"]))
    optimizer = AdamW([p for _, p in model.named_parameters(trainable=True)], lr=1e-2, weight_decay=0.1)
    shrink = DynamicRank(model, energy=0.9, every=5, start=10, least=1, optimizer=optimizer)
    history = train(model, lambda i: batch_of(0), TrainConfig(steps=40, **QUIET), optimizer=optimizer, callback=shrink.callback)
    assert [step for step, _ in shrink.ranks] == [0, *range(10, 41, 5)]
    for (_, before), (_, after) in zip(shrink.ranks, shrink.ranks[1:], strict=False):
        assert all(1 <= after[path] <= before[path] for path in after)
    final = shrink.ranks[-1][1]
    assert min(final.values()) < 4 and history.loss[-1] < history.loss[0]
    for path, a in adapters_of(model).items():
        A, up = to_host(a.lora_A.data), to_host(a.lora_B.data)
        assert not A[final[path] :].any() and not up[:, final[path] :].any() and A[: final[path]].all()
    trained = run(model)
    shrink.compact()
    assert_allclose(run(model), trained, rtol=1e-4, atol=1e-5)
    ml.save_adapter(model, tmp_path)
    again = build("llama", dtype="float32")
    ml.load_adapter(again, tmp_path)
    assert {path: len(a.lora_A) for path, a in adapters_of(again).items()} == final
    assert_allclose(run(again), run(model), rtol=1e-4, atol=1e-5)


def test_moments_of_cut_factors_begin_anew():
    model = build()
    add_adapter(model, LoraConfig(r=3, target_modules=["up_proj"]))
    planted(model, 1)
    params = [p for _, p in model.named_parameters(trainable=True)]
    optimizer = AdamW(params, lr=0.0)
    model.loss(*batch_of(0)).backward()
    optimizer.step()
    shrink = DynamicRank(model, every=1, optimizer=optimizer)
    assert all(state["m"].any() and state["step"] == 1 for state in optimizer.state)
    shrink.callback(1)
    assert not any(state["m"].any() or state["v"].any() or state["step"] for state in optimizer.state)


@pytest.mark.parametrize(("options", "message"), [
    ({"energy": 0.0}, "energy = 0.0"), ({"energy": 1.1}, "energy = 1.1"), ({"every": 0}, "every = 0"),
    ({"least": 5}, "a least rank of 1 to 4"), ({"target_r": 5}, "target_r = 5, expected a rank from least = 1 to"),
    ({"target_r": 1, "least": 2}, "from least = 2")])
def test_options_of_dynamic_rank(options, message):
    model = build()
    add_adapter(model, LoraConfig(r=4))
    with pytest.raises(ValueError, match=message) as caught:
        DynamicRank(model, **options)
    assert "\n" not in str(caught.value)


def test_dynamic_rank_is_for_plain_lora():
    for config in LoraConfig(r=2, init_lora_weights="pissa"), LoraConfig(r=2, use_dora=True), ml.IA3Config():
        model = build()
        add_adapter(model, config)
        with pytest.raises(ValueError, match=r"DynamicRank: .*(expected plain LoRA|is not LoRA)"):
            DynamicRank(model)


# --- Riemannian preconditioning -----------------------------------------------------------------------


def gauge(model, R):
    """B, A -> B R, R⁻¹ A."""
    for a in adapters_of(model).values():
        a.lora_A.data[...] = to_device(np.linalg.solve(R, to_host(a.lora_A.data)))
        a.lora_B.data[...] = to_device(to_host(a.lora_B.data) @ R)


def change_of(model, R, make, lr=1e-6):
    """ΔW's step, divided by lr, after one update from a split by R."""
    add_adapter(model, LoraConfig(r=3, target_modules=["q_proj", "up_proj"]))
    shake(model, size=0.5)
    gauge(model, R)
    adapters = adapters_of(model)
    before = {path: to_host(a.lora_B.data) @ to_host(a.lora_A.data) for path, a in adapters.items()}
    optimizer = make(model, SGD([p for _, p in model.named_parameters(trainable=True)], lr=lr))
    model.loss(*batch_of(0)).backward()
    optimizer.step()
    return {path: (to_host(a.lora_B.data) @ to_host(a.lora_A.data) - before[path]) / lr for path, a in adapters.items()}


def test_the_step_does_not_depend_on_the_split(device):
    """ρ = 0 and SGD: to first order the same change of B A for every R; without the preconditioner it is another."""
    R = np.random.default_rng(4).standard_normal((3, 3)) + 2 * np.eye(3)
    for make, same in ((lambda m, o: Riemannian(m, o, reg=0.0), True), (lambda m, o: o, False)):
        first, second = (change_of(build(), at, make) for at in (np.eye(3), R))
        for path, change in first.items():
            assert np.allclose(change, second[path], rtol=1e-4, atol=1e-4 * abs(change).max()) == same, path


def test_the_preconditioned_gradients_are_the_formula_and_the_gradients_come_back(device):
    model = build()
    add_adapter(model, LoraConfig(r=2, target_modules=["qkv_proj"]))
    shake(model)
    seen, params = {}, [p for _, p in model.named_parameters(trainable=True)]

    class Spy(SGD):
        def step(self, factor=1.0):
            seen.update({id(p): to_host(p.grad).copy() for p in params})
            super().step(factor)

    model.loss(*batch_of(0)).backward()
    plain = {id(p): to_host(p.grad).copy() for p in params}
    optimizer = Riemannian(model, Spy(params, lr=1e-3))
    optimizer.step()
    again = build()
    add_adapter(again, LoraConfig(r=2, target_modules=["qkv_proj"]))
    shake(again)
    for path, a in adapters_of(again).items():
        A, up = to_host(a.lora_A.data), to_host(a.lora_B.data)
        own = adapters_of(model)[path]
        g_A, g_B = plain[id(own.lora_A)], plain[id(own.lora_B)]
        assert_allclose(seen[id(own.lora_A)], np.linalg.inv(up.T @ up + 0.01 * np.eye(2)) @ g_A, rtol=1e-9, atol=1e-14)
        assert_allclose(seen[id(own.lora_B)], g_B @ np.linalg.inv(A @ A.T + 0.01 * np.eye(2)), rtol=1e-9, atol=1e-14)
        assert_array_equal(to_host(own.lora_A.grad), g_A)
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.zero_grad()
    assert all(p.grad is None for p in params)


def test_it_trains_and_resumes(tmp_path):
    def run_of(steps, folder):
        model = build(dtype="float32")
        add_adapter(model, LoraConfig(r=2, target_modules=["q_proj", "up_proj"]))
        optimizer = Riemannian(model, AdamW([p for _, p in model.named_parameters(trainable=True)], lr=1e-2))
        config = TrainConfig(steps=20, checkpoint=str(folder), checkpoint_every=5, **QUIET)

        def stop(step, *_):
            if step == steps:
                raise KeyboardInterrupt
        try:
            return train(model, batch_of, config, optimizer=optimizer, callback=stop)
        except KeyboardInterrupt:
            return None

    whole = run_of(99, tmp_path / "whole")
    assert whole.loss[-1] < whole.loss[0]
    assert run_of(11, tmp_path / "cut") is None
    assert run_of(99, tmp_path / "cut").loss == whole.loss


def test_what_it_cannot_precondition():
    model = build()
    add_adapter(model, ml.IA3Config())
    sgd = SGD([p for _, p in model.named_parameters(trainable=True)], lr=0.1)
    with pytest.raises(ValueError, match="0 trainable pairs"):
        Riemannian(model, sgd)
    add_adapter(model, LoraConfig(r=2), "lora")
    with pytest.raises(ValueError, match="reg = -1"):
        Riemannian(model, sgd, reg=-1)
    assert_allclose(solved(np.eye(2) * 3, np.ones((2, 5)), 1.0), 0.25)
