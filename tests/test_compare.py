"""Updates as objects, two of them compared, and what merging them would do: against dense algebra and planted angles."""

import json
import math
import tracemalloc

import numpy as np
import pytest
from numpy.testing import assert_allclose

from minilora.backend import to_host
from minilora.rank import (
    Update,
    advise,
    amplification,
    compare,
    directions,
    inner_product,
    interference,
    measures,
    null_similarity,
    random_baseline,
    similarity_grid,
)
from minilora.rank import advice as advice_module

D, K = 17, 23


def dense(update):
    return update.scale * to_host(update.B) @ to_host(update.A)


def random_update(put, r, seed, scale=0.7, d=D, k=K):
    rng = np.random.default_rng(seed)
    return Update(put(rng.standard_normal((r, k))), put(rng.standard_normal((d, r))), scale)


def planted(put, V, seed, spectrum=None, d=D):
    """An update whose input directions are the rows of V (r, k), with this spectrum and random output directions."""
    r = len(V)
    U = np.linalg.qr(np.random.default_rng(seed).standard_normal((d, r)))[0]
    return Update(put(V), put(U * (np.arange(r, 0, -1.0) if spectrum is None else spectrum)), 1.0)


def basis(n, k, seed=0):
    return np.linalg.qr(np.random.default_rng(seed).standard_normal((k, n)))[0].T


# --- one update -----------------------------------------------------------------------------------


@pytest.mark.parametrize("r", [1, 4])
def test_the_directions_of_an_update_are_its_singular_vectors(put, r):
    update = random_update(put, r, 0)
    u, s, vh = np.linalg.svd(dense(update))
    assert update.shape == (D, K)
    assert_allclose(to_host(update.svd[1]), s[:r], rtol=1e-12)
    for side, expected in (("input", vh[:r]), ("output", u[:, :r].T)):
        found = to_host(update.directions(side))
        assert_allclose(abs(found @ expected.T), np.eye(r), atol=1e-12)
    assert_allclose(to_host(update.directions("A")), to_host(directions(update.A)), atol=0)


def test_an_update_has_as_many_directions_as_its_rank(put):
    rng = np.random.default_rng(0)
    A, B = rng.standard_normal((4, K)), rng.standard_normal((D, 4))
    B[:, 2:] = B[:, :2]
    update = Update(put(A), put(B))
    assert [len(to_host(update.directions(side))) for side in ("input", "output", "A")] == [2, 2, 4]
    with pytest.raises(ValueError, match="got an update of zero, expected one that has directions"):
        Update(put(A), put(0 * B)).directions()
    with pytest.raises(ValueError, match=r"^side: got 'left', expected"):
        update.directions("left")


def test_a_dense_update_is_one_with_an_identity(put):
    change = np.random.default_rng(0).standard_normal((5, 7))
    update = Update(put(np.eye(7)), put(change))
    assert_allclose(to_host(update.svd[1]), np.linalg.svd(change, compute_uv=False), rtol=1e-12)


def test_a_sum_of_updates_is_the_dense_sum(put):
    one, two = random_update(put, 2, 0), random_update(put, 3, 1, scale=-2.0)
    assert_allclose(dense(one + two), dense(one) + dense(two), rtol=1e-13, atol=1e-13)
    with pytest.raises(ValueError, match=r"shapes \(17, 23\) and \(17, 20\), expected one shape"):
        one + random_update(put, 2, 0, k=20)


# --- two updates ----------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["input", "output"])
def test_an_update_is_like_itself(put, side):
    update = random_update(put, 5, 0)
    found = compare(update, update, side)
    assert_allclose(np.diagonal(found["phi"]), 1.0, rtol=1e-12)
    assert_allclose(found["angles"], 0.0, atol=1e-12)
    assert (found["k"], found["sizes"], found["side"]) == (K if side == "input" else D, [5, 5], side)
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_planted_angles_come_back_from_whole_updates(put):
    theta = np.array([0.0, 0.2, 0.9, math.pi / 2])
    Q = basis(8, K)
    V2 = np.cos(theta)[:, None] * Q[:4] + np.sin(theta)[:, None] * Q[4:]
    one, two = planted(put, Q[:4], 1), planted(put, V2, 2)
    found = compare(one, two)
    assert_allclose(found["angles"], theta, atol=1e-9)
    assert_allclose(np.diagonal(found["phi"]), np.cumsum(np.cos(theta) ** 2) / np.arange(1, 5), atol=1e-9)
    turned = [Update(u.B.T, u.A.T) for u in (one, two)]                    # ΔWᵀ has these directions on its output side
    assert_allclose(compare(*turned, side="output")["angles"], theta, atol=1e-9)


@pytest.mark.parametrize("seed", range(3))
def test_what_is_said_of_updates_does_not_depend_on_their_factors(put, seed):
    """A → R A, B → B R⁻¹ leaves ΔW as it was, and so every measure of it; only the directions of A alone move."""
    rng = np.random.default_rng(seed)
    one, two = random_update(put, 3, seed), random_update(put, 4, seed + 10)
    R = rng.standard_normal((3, 3)) * [1.0, 5.0, 0.3] + 2 * np.eye(3)
    other = Update(put(R @ to_host(one.A)), put(to_host(one.B) @ np.linalg.inv(R)), one.scale)
    W = put(rng.standard_normal((D, K)))
    for call in (lambda u: measures(u.svd[1]), lambda u: compare(u, two), lambda u: compare(u, two, "output"),
                 lambda u: interference(u, two), lambda u: amplification(u, W)):
        before, after = call(one), call(other)
        assert before.keys() == after.keys()
        for key, value in before.items():
            if not isinstance(value, str):
                assert_allclose(after[key], value, rtol=1e-8, atol=1e-8, err_msg=key)
    moved = np.abs(np.array(compare(one, two, "A")["phi"]) - compare(other, two, "A")["phi"]).max()
    assert moved > 0.01


@pytest.mark.parametrize("r1, r2, k", [(2, 3, 40), (3, 2, 5), (3, 4, 5), (4, 4, 4), (1, 1, 1)])
def test_the_null_distribution_is_that_of_random_subspaces(r1, r2, k):
    """Against subspaces drawn the plain way, also where they must meet because R^k is small."""
    rng, draws = np.random.default_rng(0), 1500
    plain = np.array([similarity_grid(basis(r1, k, rng.integers(2**32)), basis(r2, k, rng.integers(2**32)))
                      for _ in range(draws)])
    levels = np.linspace(0.01, 0.99, 50)
    found, angles = null_similarity(r1, r2, k, levels, draws=6000, seed=1)
    assert found.shape == (50, r1, r2) and angles.shape == (min(r1, r2),)
    spread = plain.std(axis=0) + 1e-12
    # Two samples of 1,500 and 6,000 draws: a quantile at 1 % or 99 % is uncertain by about sqrt(0.01·0.99/1500)/0.027 ≈ 0.1
    # standard deviations, and this is the worst of 50 levels at every place. The mean's own error is below 5 %.
    assert (abs(found - np.quantile(plain, levels, axis=0)).max(axis=0) < 0.35 * spread + 1e-9).all()
    baseline = random_baseline(np.arange(1, r1 + 1)[:, None], np.arange(1, r2 + 1), k)
    assert_allclose(found.mean(axis=0), baseline, rtol=0.05)


def test_the_null_band_of_a_comparison_holds_random_updates(put):
    inside = []
    for seed in range(12):
        found = compare(random_update(put, 3, seed), random_update(put, 4, seed + 100), seed=seed)
        phi, low, high = (np.array(found[key]) for key in ("phi", "null_low", "null_high"))
        assert phi.shape == low.shape == np.array(found["null_median"]).shape
        inside.append(((low <= phi) & (phi <= high))[-1, -1])
    assert sum(inside) >= 8                                                # 90 % of 12 is 10.8; seven or fewer: 0.4 %
    assert "null_low" not in compare(random_update(put, 3, 0), random_update(put, 3, 1), draws=0)


# --- interference ---------------------------------------------------------------------------------


def test_interference_is_that_of_the_dense_updates(put):
    one, two = random_update(put, 3, 0), random_update(put, 4, 1, scale=-1.3)
    X = np.random.default_rng(2).standard_normal((9, K))
    found = interference(one, two, put(X))
    a, b = dense(one), dense(two)
    size = [np.linalg.norm(a), np.linalg.norm(b)]
    assert_allclose(inner_product(one, two), (a * b).sum(), rtol=1e-12)
    assert_allclose(found["cosine"], (a * b).sum() / (size[0] * size[1]), rtol=1e-12)
    (U1, _, V1), (U2, _, V2) = np.linalg.svd(a), np.linalg.svd(b)
    assert_allclose(found["overlap_input"], np.linalg.norm(V1[:3] @ V2[:4].T) ** 2 / 3, rtol=1e-12)
    assert_allclose(found["overlap_output"], np.linalg.norm(U1[:, :3].T @ U2[:, :4]) ** 2 / 3, rtol=1e-12)
    assert (found["random_input"], found["random_output"]) == (4 / K, 4 / D)
    assert_allclose(found["disturbance"], [np.linalg.norm(b @ V1[:3].T) / size[0], np.linalg.norm(a @ V2[:4].T) / size[1]],
                    rtol=1e-12)
    assert_allclose(found["measured_disturbance"], np.linalg.norm(X @ b.T) / np.linalg.norm(X @ a.T), rtol=1e-12)
    assert_allclose([found["norm"], found["predicted_norm"]], [np.linalg.norm(a + b), math.hypot(*size)], rtol=1e-12)
    S = np.linalg.svd(a + b, compute_uv=False)[:7]
    assert_allclose(found["errors"][:-1], np.sqrt(np.cumsum(S[::-1] ** 2)[::-1]) / np.linalg.norm(S), rtol=1e-10)
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_orthogonal_updates_do_not_interfere_and_equal_ones_add_up(put):
    Q, P = basis(7, K), basis(7, D, 1)
    one = Update(put(Q[:3]), put((P[:3] * [[3.0], [2.0], [1.0]]).T))
    two = Update(put(Q[3:]), put((P[3:] * [[4.0], [2.5], [0.5], [0.1]]).T))
    found = interference(one, two, put(np.random.default_rng(0).standard_normal((4, 3)) @ Q[:3]))
    for key in ("cosine", "overlap_input", "overlap_output", "disturbance", "measured_disturbance"):
        assert_allclose(found[key], 0.0, atol=1e-12)
    assert_allclose(found["errors"], found["predicted_errors"], atol=1e-12)
    assert_allclose(found["norm"], found["predicted_norm"], rtol=1e-12)
    same = interference(one, one)
    assert_allclose([same["cosine"], same["norm"] / same["predicted_norm"]], [1, 2**0.5], rtol=1e-12)
    assert_allclose(same["disturbance"], [1, 1], rtol=1e-12)
    assert_allclose(same["errors"][3:], 0.0, atol=1e-12)                   # rank 3, not 6: what the prediction does not know
    assert same["predicted_errors"][3] > 0.3


def test_random_inputs_of_the_first_task_are_disturbed_as_predicted(put):
    """Inputs that ΔW₁ reads with equal gain: the prediction without data is then the measured one."""
    V = basis(4, K)
    one, two = planted(put, V, 1, spectrum=np.ones(4)), random_update(put, 5, 2)
    X = np.random.default_rng(3).standard_normal((20_000, 4)) @ V
    found = interference(one, two, put(X))
    # A mean over 20,000 random inputs stands for its expectation: its error is about 1/sqrt(20000) = 0.7 %, three of them 2 %.
    assert_allclose(found["measured_disturbance"], found["disturbance"][0], rtol=0.02)


def test_the_random_disturbance_is_the_root_mean_square_over_random_directions(put):
    two = random_update(put, 4, 1)
    one = [planted(put, basis(3, K, seed), 0) for seed in range(300)]
    squares = np.array([interference(u, two)["disturbance"][0] ** 2 for u in one])
    expected = interference(one[0], two)["random_disturbance"][0] ** 2
    assert abs(squares.mean() - expected) < 4 * squares.std() / 300**0.5


def test_updates_that_cannot_be_compared_are_refused(put):
    one = random_update(put, 2, 0)
    with pytest.raises(ValueError, match=r"shapes \(17, 23\) and \(17, 20\)"):
        interference(one, random_update(put, 2, 0, k=20))
    with pytest.raises(ValueError, match="got an update of zero"):
        interference(one, Update(one.A, 0 * one.B))
    with pytest.raises(ValueError, match=r"inputs: got shape \(4, 5\), expected \(n, 23\)"):
        interference(one, one, put(np.zeros((4, 5))))
    with pytest.raises(ValueError, match=r"R\^23 and in R\^20"):
        compare(one, random_update(put, 2, 0, k=20))
    with pytest.raises(ValueError, match="A: got NaN or infinite"):
        compare(one, Update(put(np.full((2, K), math.nan)), one.B))


def test_comparing_large_updates_takes_the_memory_of_their_factors(monkeypatch):
    """d = k = 40,000: a dense ΔW would take 12.8 GB."""
    def put(a):
        return a
    one, two = (random_update(put, 4, seed, d=40_000, k=40_000) for seed in (0, 1))
    monkeypatch.setattr(advice_module, "found_in", lambda *_: ({"m": one}, {}))
    tracemalloc.start()
    try:
        compare(one, two)
        interference(one, two, np.ones((3, 40_000)))
        advise("folder")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 30 * (one.A.nbytes + one.B.nbytes)
