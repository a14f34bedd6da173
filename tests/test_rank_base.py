"""What an update does to W, against dense SVDs of W and W + ΔW: amplification, intruders and their mitigation, rotation."""

import json
import math

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

import minilora as ml
from minilora.backend import to_host
from minilora.lora import LoraConfig, adapter_names, adapters_of, add_adapter, disable_adapter, set_adapter
from minilora.nn import Transformer, TransformerConfig
from minilora.rank import (
    Update,
    alignment,
    amplification,
    gram_svd,
    intruder_correction,
    intruder_count,
    reduce_intruders,
    top_projection,
    updates,
)

SHAPES = [(14, 14), (12, 20), (20, 12), (1, 9), (9, 1)]


def dense(update):
    return update.scale * to_host(update.B) @ to_host(update.A)


def pair(put, shape, r=3, seed=0, scale=0.4):
    """(W, update) with normal entries."""
    rng = np.random.default_rng(seed)
    W = rng.standard_normal(shape)
    return put(W), Update(put(rng.standard_normal((r, shape[1]))), put(rng.standard_normal((shape[0], r))), scale)


def spiked(put, c, seed, shape=(128, 128)):
    """A normal W, and ΔW = c·σ₁ u vᵀ with random unit u and v. Below the edge of W's bulk a spike has no vector of its own.

    (In small matrices two close values of W can share one vector so evenly that none of the two is above ½: seeds matter.)
    """
    rng = np.random.default_rng(seed)
    W = rng.standard_normal(shape)
    u, v = (rng.standard_normal(n) for n in shape)
    size = c * np.linalg.norm(W, 2)
    return put(W), Update(put(v[None] / np.linalg.norm(v)), put(size * u[:, None] / np.linalg.norm(u)))


# --- the SVD of W and of W + ΔW -------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("changed", [False, True])
def test_gram_svd_is_the_dense_svd(put, shape, changed):
    W, update = pair(put, shape, r=min(3, *shape))
    M = to_host(W) + (dense(update) if changed else 0)
    U, S, Vh = (to_host(a) for a in gram_svd(W, update if changed else None))
    u, s, vh = np.linalg.svd(M, full_matrices=False)
    assert_allclose(S, s, rtol=1e-9)
    assert_allclose((U * S) @ Vh, M, atol=1e-9)
    assert_allclose(np.abs(np.sum(U * u, axis=0)), 1.0, rtol=1e-9)
    assert_allclose(np.abs(np.sum(Vh * vh, axis=1)), 1.0, rtol=1e-9)


def test_directions_in_which_W_does_nothing_are_left_out(put):
    rng = np.random.default_rng(0)
    W = rng.standard_normal((15, 4)) @ rng.standard_normal((4, 11))
    for M in (W, W.T):
        U, S, Vh = (to_host(a) for a in gram_svd(put(M)))
        assert len(S) == 4
        assert_allclose((U * S) @ Vh, M, atol=1e-10)
    assert [len(part) for part in gram_svd(put(0 * W))[1:]] == [0, 0]
    with pytest.raises(ValueError, match="W: got NaN or infinite"):
        gram_svd(put(np.full((3, 3), math.nan)))


# --- amplification: the paper's Table 7 -----------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_amplification_is_that_of_the_dense_svd(put, shape):
    W, update = pair(put, shape, r=min(3, *shape))
    found, q = amplification(update, W), min(3, *shape)
    U, _, Vh = np.linalg.svd(dense(update))
    size, whole = np.linalg.norm(dense(update)), np.linalg.norm(to_host(W))
    within = np.linalg.norm(U[:, :q].T @ to_host(W) @ Vh[:q].T)
    assert_allclose([found["base_norm"], found["projection"], found["amplification"], found["relative_norm"]],
                    [whole, within, size / within, size / whole], rtol=1e-10)
    u, s, vh = np.linalg.svd(to_host(W))
    top = np.linalg.norm(u[:, :q].T @ to_host(W) @ vh[:q].T)
    assert_allclose([top_projection(gram_svd(W)[1], q), np.linalg.norm(s[:q])], top, rtol=1e-10)


def test_the_projection_on_random_directions_is_a_root_mean_square(put):
    rng = np.random.default_rng(0)
    W, update = pair(put, (10, 16), r=2)
    squares = []
    for _ in range(2000):
        U, V = (np.linalg.qr(rng.standard_normal((n, 2)))[0] for n in (10, 16))
        squares.append(np.linalg.norm(U.T @ to_host(W) @ V) ** 2)
    expected = amplification(update, W)["projection_random"] ** 2
    error = np.std(squares) / len(squares) ** 0.5
    assert error < 0.02 * expected and abs(np.mean(squares) - expected) < 4 * error


def test_random_directions_of_gpt3_give_the_papers_numbers():
    """Table 7, ‖W_q‖ = 61.95 at 12288 × 12288: it prints 0.02 for r = 4 and 0.33 for r = 64, from one draw each."""
    assert round(61.95 * 4 / 12288, 2) == 0.02 and abs(61.95 * 64 / 12288 - 0.33) < 0.01
    d = 96                                                                 # the formula as it is coded, on a W of that norm
    W = np.eye(d) * 61.95 / d**0.5
    update = Update(np.eye(4, d), np.eye(d, 4))
    assert_allclose(amplification(update, W)["projection_random"], 61.95 * 4 / d, rtol=1e-12)


def test_an_update_of_zero_amplifies_nothing(put):
    W, update = pair(put, (6, 5))
    found = amplification(Update(update.A, 0 * update.B), W)
    assert found["amplification"] is None and found["projection"] == found["relative_norm"] == 0.0


# --- intruders ------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("side", ["output", "input"])
def test_the_alignment_is_that_of_dense_svds(put, shape, side):
    W, update = pair(put, shape, r=min(3, *shape), scale=1.5)
    found = alignment(update, W, top=4, side=side)
    parts = [np.linalg.svd(M, full_matrices=False) for M in (to_host(W), to_host(W) + dense(update))]
    X, Y = (u.T if side == "output" else vh for u, _, vh in parts)
    C = np.abs(Y @ X.T)
    assert_allclose(found["matrix"], C[:4, :4], atol=1e-8)
    assert_allclose(found["cosines"], C[:4].max(axis=1), atol=1e-8)
    assert_allclose(np.cos(found["rotation"]), C[:, :4].max(axis=0), atol=1e-8)
    assert_allclose(found["sigma"], parts[1][1][:4], rtol=1e-9)
    assert_allclose(found["base_sigma"], parts[0][1][:4], rtol=1e-9)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    spared = alignment(update, W, top=4, side=side, base_svd=gram_svd(W), tuned_svd=gram_svd(W, update))
    assert spared == found


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("c, intruders", [(1.0, 1), (2.0, 1), (10.0, 1), (0.5, 0), (0.25, 0), (0.0, 0)])
def test_a_spike_is_one_intruder_if_it_is_as_strong_as_W(put, c, intruders, seed):
    W, update = spiked(put, c, seed)
    cosines = alignment(update, W)["cosines"]
    assert intruder_count(cosines, 0.5) == intruders
    if c >= 2:
        assert cosines[0] < 0.5                                            # and it is the strongest direction


def test_the_threshold_may_be_swept():
    cosines = [0.1, 0.99, 0.5, 0.3]
    assert intruder_count(cosines) == 2 and isinstance(intruder_count(cosines), int)
    assert_array_equal(intruder_count(cosines, [0.0, 0.2, 0.5, 0.51, 1.0]), [0, 1, 2, 3, 4])


def test_a_planted_rotation_is_found(put):
    """ΔW turns W's first left vector by θ towards a direction that W does not have: nothing else moves."""
    Q = np.linalg.qr(np.random.default_rng(0).standard_normal((12, 6)))[0]
    V = np.linalg.qr(np.random.default_rng(1).standard_normal((7, 7)))[0]
    sigma = np.array([9.0, 5.0, 4.0, 3.0, 2.0])
    W = (Q[:, :5] * sigma) @ V[:, :5].T
    for theta in (0.3, 1.2):
        turned = math.cos(theta) * Q[:, 0] + math.sin(theta) * Q[:, 5]
        update = Update(put(V[:, :1].T), put(9.0 * (turned - Q[:, 0])[:, None]))
        found = alignment(update, put(W), top=5)
        assert_allclose(found["rotation"], [theta, 0, 0, 0, 0], atol=1e-6)
        assert_allclose(found["cosines"], [math.cos(theta), 1, 1, 1, 1], atol=1e-9)
        assert_allclose(alignment(update, put(W), top=5, side="input")["rotation"], 0.0, atol=1e-6)


def test_a_direction_that_only_became_weaker_was_not_rotated(put):
    """ΔW takes nearly all of W's first direction away: it is the last of W + ΔW, and still there."""
    W = np.diag(np.arange(20.0, 4.0, -1.0))
    update = Update(put(np.eye(1, 16)), put(-19.9 * np.eye(16, 1)))
    found = alignment(update, put(W), top=3)
    assert_allclose(found["rotation"], 0.0, atol=1e-6)
    assert_allclose(found["sigma"], [19, 18, 17], rtol=1e-9)


def test_an_update_of_a_zero_weight_is_all_intruders(put):
    W, update = pair(put, (8, 6), r=2)
    found = alignment(update, 0 * W)
    assert found["cosines"] == [0.0, 0.0] and found["rotation"] == []


def test_alignment_refuses(put):
    W, update = pair(put, (8, 6))
    for call, message in ((lambda: alignment(update, W, side="left"), "got side 'left' and top 10"),
                          (lambda: alignment(update, W, top=0), "top 0, expected .* at least 1"),
                          (lambda: alignment(update, W.T), r"W: got shape \(6, 8\), expected the update's \(8, 6\)"),
                          (lambda: intruder_correction(update, W, factor=math.nan), "factor: got nan, expected a finite")):
        with pytest.raises(ValueError, match=message):
            call()


# --- their mitigation -----------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("shape", [(40, 50), (50, 40)])
def test_the_correction_is_the_papers(put, factor, shape):
    """W + ΔW + (λ − 1) Σ σ u vᵀ, formed densely: the intruder's value is λσ, and the others are what they were."""
    W, update = spiked(put, 2.0, 3, shape)
    part, facts = intruder_correction(update, W, factor)
    before, after = to_host(W) + dense(update), to_host(W) + dense(update + part)
    u, s, vh = np.linalg.svd(before, full_matrices=False)
    assert facts["intruders"] == [0]
    assert_allclose(facts["sigma"], s[:1], rtol=1e-9)
    assert_allclose(after, before + (factor - 1) * s[0] * np.outer(u[:, 0], vh[0]), atol=1e-8)
    assert_allclose(np.linalg.svd(after, compute_uv=False), np.sort(np.append(s[1:], factor * s[0]))[::-1], atol=1e-8)
    assert_allclose([facts["norm"], facts["relative_norm"]],
                    [(1 - factor) * s[0], (1 - factor) * s[0] / np.linalg.norm(dense(update))], atol=1e-8)
    if factor != 0.3:                                                      # removed, or left as it was
        assert intruder_count(alignment(update + part, W)["cosines"]) == factor


def test_without_intruders_there_is_no_correction(put):
    W, update = spiked(put, 0.2, 0)
    part, facts = intruder_correction(update, W)
    assert part is None and facts["intruders"] == [] and facts["norm"] == 0.0


def model_with_intruders(targets, **fields):
    cfg = TransformerConfig.llama(vocab_size=13, d_model=16, n_layers=2, n_heads=2, d_ff=24, max_len=8, **fields)
    model = Transformer(cfg, dtype="float64")
    add_adapter(model, LoraConfig(r=3, target_modules=targets))
    rng = np.random.default_rng(0)
    for path, adapter in adapters_of(model).items():
        for _, p in adapter.named_parameters():
            p.data[...] = ml.to_device(rng.standard_normal(p.shape) * (not path.startswith("layers.1")))
    return model


@pytest.mark.parametrize("targets", [["q_proj", "down_proj"], ["embed"]])
def test_intruders_of_a_model_are_softened_by_a_second_adapter(device, targets):
    model = model_with_intruders(targets)
    ids = np.arange(6).reshape(1, 6)
    before, parameters = to_host(model(ids)), {p: to_host(v.data).copy() for p, v in model.named_parameters()}
    old = updates(model)
    facts = reduce_intruders(model, factor=0.0)
    assert adapter_names(model) == ["default", "correction"] and facts
    assert not any(path.startswith("layers.1") for path in facts)          # updates of zero have none
    corrections = updates(model, "correction")
    assert corrections.keys() == facts.keys()
    assert all(model.get_module(path).adaptation.active == ["default", "correction"] for path in facts)
    for path, part in corrections.items():
        layer = model.get_module(path)
        with disable_adapter(model):
            expected, said = intruder_correction(old[path], layer.weight.data, 0.0)
        assert facts[path] == said
        assert_allclose(dense(part), dense(expected), atol=1e-12)
        assert_allclose(np.linalg.norm(dense(part)), facts[path]["norm"], rtol=1e-9)
    assert np.abs(to_host(model(ids)) - before).max() > 1e-6
    with disable_adapter(model):
        for path, part in corrections.items():
            together = alignment(old[path] + part, model.get_module(path).weight.data)
            assert intruder_count(together["cosines"]) < len(facts[path]["intruders"]) + 1
    set_adapter(model, "default")
    assert_array_equal(to_host(model(ids)), before)
    for path, value in parameters.items():
        assert_array_equal(to_host(dict(model.named_parameters())[path].data), value)


def test_a_model_without_intruders_gets_no_second_adapter():
    model = model_with_intruders(["q_proj"])
    for adapter in adapters_of(model).values():
        adapter.lora_B.data[...] *= 1e-3
    assert reduce_intruders(model) == {} and adapter_names(model) == ["default"]
    with pytest.raises(KeyError, match="no adapter 'other'"):
        reduce_intruders(model, name="other")
