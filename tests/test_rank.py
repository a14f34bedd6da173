"""The factored SVD, the rank measures and the subspace similarity, against dense algebra and closed forms."""

import json
import math
import tracemalloc

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from minilora.backend import to_host
from minilora.lora.svd import factored_svd, low_rank_factors, truncate
from minilora.rank import (
    directions,
    eckart_young_errors,
    effective_rank,
    energy_rank,
    frobenius_norm,
    measures,
    nuclear_norm,
    participation_ratio,
    principal_angles,
    random_baseline,
    similarity_grid,
    spectral_norm,
    stable_rank,
    subspace_similarity,
)

# The fixtures `device` and `put` only choose the array type, so one instance may serve all examples of a property.
properties = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
sizes = st.integers(1, 9)
seeds = st.integers(0, 2**32 - 1)
spectra = st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=12)


def factors(d, k, r, seed, kind="full", dtype=np.float64):
    """Random B (d, r) and A (r, k); "deficient": the last direction repeats the first; "zero": B = 0."""
    rng = np.random.default_rng(seed)
    B, A = rng.standard_normal((d, r)), rng.standard_normal((r, k))
    if kind == "deficient":
        B[:, -1] = B[:, 0]
        A[-1] = 2.0 * A[0]
    if kind == "zero":
        B[:] = 0.0
    return B.astype(dtype), A.astype(dtype)


def orthonormal(r, k, seed):
    """Random orthonormal rows (r, k)."""
    return np.linalg.qr(np.random.default_rng(seed).standard_normal((k, r)))[0].T


# --- the factored SVD -----------------------------------------------------------------------------


@properties
@example(d=1, k=1, r=1, seed=0, kind="full", scale=1.0)
@example(d=1, k=7, r=4, seed=0, kind="full", scale=-2.0)
@example(d=3, k=2, r=8, seed=0, kind="deficient", scale=0.5)
@given(d=sizes, k=sizes, r=sizes, seed=seeds, kind=st.sampled_from(["full", "deficient", "zero"]),
       scale=st.sampled_from([1.0, 0.5, -2.0, 0.0]))
def test_factored_svd_is_the_dense_svd(put, d, k, r, seed, kind, scale):
    B, A = factors(d, k, r, seed, kind)
    U, S, Vh = (to_host(a) for a in factored_svd(put(B), put(A), scale))
    q = min(d, r, k)
    assert U.shape == (d, q) and S.shape == (q,) and Vh.shape == (q, k)

    dense = scale * B @ A
    size = max(abs(scale) * np.linalg.norm(B) * np.linalg.norm(A), 1e-300)
    assert np.abs((U * S) @ Vh - dense).max() <= 1e-12 * size
    assert np.abs(S - np.linalg.svd(dense, compute_uv=False)[:q]).max() <= 1e-12 * size
    assert np.abs(U.T @ U - np.eye(q)).max() <= 1e-12
    assert np.abs(Vh @ Vh.T - np.eye(q)).max() <= 1e-12
    assert (S >= 0).all() and (np.diff(S) <= 0).all()


def test_singular_vectors_are_the_dense_ones_up_to_sign(put):
    B, A = factors(17, 11, 4, seed=3)
    U, _, Vh = (to_host(a) for a in factored_svd(put(B), put(A)))
    u, _, vh = np.linalg.svd(B @ A)
    signs = np.sign(np.sum(U * u[:, :4], axis=0))
    np.testing.assert_allclose(U * signs, u[:, :4], atol=1e-12)
    np.testing.assert_allclose(Vh * signs[:, None], vh[:4], atol=1e-12)


@properties
@given(d=sizes, k=sizes, r=st.integers(1, 5), seed=seeds)
def test_svd_does_not_depend_on_the_choice_of_factors(put, d, k, r, seed):
    """A → R A, B → B R⁻¹ leaves ΔW, hence everything computed from it, as it was."""
    B, A = factors(d, k, r, seed)
    rng = np.random.default_rng(seed)
    R = orthonormal(r, r, seed) * rng.uniform(0.5, 2.0, r) @ orthonormal(r, r, seed + 1)       # condition number ≤ 4
    one = [to_host(a) for a in factored_svd(put(B), put(A))]
    two = [to_host(a) for a in factored_svd(put(B @ np.linalg.inv(R)), put(R @ A))]
    size = np.linalg.norm(B) * np.linalg.norm(A)
    assert np.abs(one[1] - two[1]).max() <= 1e-11 * size
    assert np.abs((one[0] * one[1]) @ one[2] - (two[0] * two[1]) @ two[2]).max() <= 1e-11 * size


def test_directions_of_the_update_are_invariant_and_those_of_A_alone_are_not(put):
    B, A = factors(12, 20, 3, seed=5)
    R = np.diag([1.0, 10.0, 0.1]) @ orthonormal(3, 3, seed=6)
    Vh, Vh_R = factored_svd(put(B), put(A))[2], factored_svd(put(B @ np.linalg.inv(R)), put(R @ A))[2]
    A_dirs, RA_dirs = directions(put(A)), directions(put(R @ A))
    assert subspace_similarity(Vh, Vh_R, 1, 1) == pytest.approx(1.0, abs=1e-12)
    assert subspace_similarity(A_dirs, RA_dirs, 1, 1) < 0.9
    assert subspace_similarity(A_dirs, RA_dirs, 3, 3) == pytest.approx(1.0, abs=1e-12)         # the same row space


def test_a_large_update_takes_the_memory_of_its_factors():
    """d = k = 40,000: ΔW would take 12.8 GB in float64, its factors take 2.6 MB."""
    d = k = 40_000
    B, A = factors(d, k, 4, seed=0)
    tracemalloc.start()
    try:
        U, S, Vh = factored_svd(B, A, 0.5)
        B2, A2 = truncate(B, A, 2)
        grid = similarity_grid(Vh, directions(A2))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 20 * (B.nbytes + A.nbytes)
    assert (S**2).sum() == pytest.approx(0.25 * ((B.T @ B) * (A @ A.T)).sum(), rel=1e-12)      # ‖BA‖²_F = Σ BᵀB ∘ AAᵀ
    rows = [0, 7, d - 1]
    np.testing.assert_allclose((U[rows] * S) @ Vh, 0.5 * B[rows] @ A, atol=1e-12)
    np.testing.assert_allclose(0.5 * B2[rows] @ A2, (U[rows, :2] * S[:2]) @ Vh[:2], atol=1e-12)
    assert grid[1, 1] == pytest.approx(1.0, abs=1e-12)


def test_results_keep_float32_and_widen_half_precision(put):
    for dtype, expected in [(np.float16, np.float32), (np.float32, np.float32), (np.float64, np.float64)]:
        B, A = (put(a) for a in factors(6, 9, 3, seed=0, dtype=dtype))
        Vh = factored_svd(B, A, 0.5)[2]
        results = [*factored_svd(B, A, 0.5), *truncate(B, A, 2), *low_rank_factors(*factored_svd(B, A), scale=2.0),
                   directions(A), similarity_grid(Vh, Vh), principal_angles(Vh, Vh)]
        assert {a.dtype for a in results} == {np.dtype(expected)}
    B, A = factors(6, 9, 3, seed=0)
    assert factored_svd(put(B.astype(np.float32)), put(A))[1].dtype == np.float64


def test_float32_factors_are_decomposed_in_float64(put):
    """A rank-1 update in float32 shows no false tail: the second value is float64 rounding, not 1e-8 of the first."""
    B, A = factors(300, 200, 2, seed=1, kind="deficient", dtype=np.float32)
    S = to_host(factored_svd(put(B), put(A))[1])
    assert S[0] == pytest.approx(np.linalg.norm(B.astype(np.float64) @ A.astype(np.float64)), rel=1e-7)
    assert S[1] < 1e-13 * S[0]


def test_results_are_on_the_device_of_the_factors(put):
    B, A = (put(a) for a in factors(6, 5, 3, seed=0))
    Vh = factored_svd(B, A)[2]
    for result in (*factored_svd(B, A), *truncate(B, A, 2), directions(A), similarity_grid(Vh, Vh),
                   principal_angles(Vh, Vh)):
        assert type(result) is type(B)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("which", ["B", "A"])
def test_non_finite_factors_are_refused(put, value, which):
    B, A = factors(5, 4, 2, seed=0)
    (B if which == "B" else A)[1, 1] = value
    for call in (factored_svd, lambda B, A: truncate(B, A, 1)):
        with pytest.raises(ValueError, match=f"^{which}: got NaN or infinite[^\n]*$"):
            call(put(B), put(A))
    if which == "A":
        with pytest.raises(ValueError, match=r"^A: got NaN or infinite"):
            directions(put(A))


def test_misshapen_factors_and_scales_are_refused(put):
    B, A = (put(a) for a in factors(5, 4, 2, seed=0))
    with pytest.raises(ValueError, match=r"B \(5, 2\) and A \(4, 2\).*of one r"):
        factored_svd(B, A.T)
    with pytest.raises(ValueError, match=r"^A: got an array of shape \(4,\)"):
        factored_svd(B, A[0])
    with pytest.raises(ValueError, match=r"^B: got an array of shape \(5, 0\)"):
        factored_svd(B[:, :0], A[:0])
    with pytest.raises(ValueError, match=r"^scale: got nan"):
        factored_svd(B, A, math.nan)
    with pytest.raises(ValueError, match=r"^scale: got 0.*other than 0"):
        low_rank_factors(*factored_svd(B, A), scale=0.0)
    with pytest.raises(ValueError, match=r"^rank: got 0"):
        truncate(B, A, 0)


# --- truncation -----------------------------------------------------------------------------------


@properties
@example(d=1, k=1, r=1, rank=1, seed=0, kind="zero")
@given(d=sizes, k=sizes, r=sizes, rank=st.integers(1, 10), seed=seeds,
       kind=st.sampled_from(["full", "deficient", "zero"]))
def test_truncation_error_is_the_eckart_young_tail(put, d, k, r, rank, seed, kind):
    B, A = factors(d, k, r, seed, kind)
    B2, A2 = (to_host(a) for a in truncate(put(B), put(A), rank))
    q = min(rank, d, r, k)
    assert B2.shape == (d, q) and A2.shape == (q, k)
    dense = np.linalg.svd(B @ A, compute_uv=False)
    size = np.linalg.norm(B) * np.linalg.norm(A) + 1e-300
    assert abs(np.linalg.norm(B @ A - B2 @ A2) - np.sqrt((dense[q:] ** 2).sum())) <= 1e-12 * size
    errors = eckart_young_errors(factored_svd(put(B), put(A))[1])
    assert abs(np.linalg.norm(B @ A - B2 @ A2) - errors[q]) <= 1e-12 * size
    assert np.abs(B2.T @ B2 - A2 @ A2.T).max() <= 1e-12 * size                                 # balanced


@pytest.mark.parametrize("scale", [1.0, 0.25, -3.0])
def test_truncation_commutes_with_the_scale(put, scale):
    B, A = factors(8, 13, 5, seed=2)
    u, s, vh = np.linalg.svd(scale * B @ A)
    best = (u[:, :3] * s[:3]) @ vh[:3]
    B2, A2 = (to_host(a) for a in truncate(put(B), put(A), 3))
    np.testing.assert_allclose(scale * B2 @ A2, best, atol=1e-12)
    U, S, Vh = factored_svd(put(B), put(A), scale)                                             # and into another scale
    B3, A3 = (to_host(a) for a in low_rank_factors(U[:, :3], S[:3], Vh[:3], scale=-scale / 2))
    np.testing.assert_allclose(-scale / 2 * B3 @ A3, best, atol=1e-12)
    np.testing.assert_allclose(B3.T @ B3, A3 @ A3.T, atol=1e-12)


# --- the measures ---------------------------------------------------------------------------------


def test_measures_of_a_known_spectrum(put):
    m = measures(put(np.array([10.0, 5.0, 1.0, 0.1])))
    assert m["singular_values"] == [10.0, 5.0, 1.0, 0.1]
    assert m["effective_rank"] == pytest.approx(2.3705, abs=5e-5)
    assert m["stable_rank"] == pytest.approx(126.01 / 100, rel=1e-14)
    assert m["participation_ratio"] == pytest.approx(126.01**2 / 10626.0001, rel=1e-14)
    assert m["participation_ratio"] == pytest.approx(1.4943, abs=5e-5)
    assert m["frobenius_norm"] == pytest.approx(math.sqrt(126.01), rel=1e-14)
    assert m["nuclear_norm"] / m["spectral_norm"] == pytest.approx(1.61, rel=1e-14)
    assert (m["energy_rank_90"], m["energy_rank_95"], m["energy_rank_99"]) == (2, 2, 2)       # shares .794, .992, …
    p = [s / 16.1 for s in (10.0, 5.0, 1.0, 0.1)]
    assert m["effective_rank"] == pytest.approx(math.exp(-math.fsum(q * math.log(q) for q in p)), rel=1e-14)


def test_measures_are_plain_numbers_for_json(put):
    m = measures(put(np.array([3.0, 1.0], dtype=np.float32)))
    assert json.loads(json.dumps(m)) == m
    assert {key: type(value) for key, value in m.items()} == {
        "singular_values": list, "frobenius_norm": float, "spectral_norm": float, "nuclear_norm": float,
        "effective_rank": float, "stable_rank": float, "participation_ratio": float,
        "energy_rank_90": int, "energy_rank_95": int, "energy_rank_99": int}


@given(spectra)
def test_norms_are_those_of_the_matrix(S):
    matrix = orthonormal(len(S), 14, seed=1).T * np.array(S) @ orthonormal(len(S), 13, seed=2)
    assert frobenius_norm(S) == pytest.approx(np.linalg.norm(matrix), rel=1e-12)
    assert spectral_norm(S) == pytest.approx(np.linalg.norm(matrix, 2), rel=1e-12)
    assert nuclear_norm(S) == pytest.approx(np.linalg.norm(matrix, "nuc"), rel=1e-12)


@given(spectra, st.sampled_from([1e-200, 1.0, 1e200]), seeds)
def test_rank_measures_ignore_order_and_size(S, size, seed):
    shuffled = np.random.default_rng(seed).permutation(S) * size
    for measure in (effective_rank, stable_rank, participation_ratio):
        assert measure(shuffled) == pytest.approx(measure(S), rel=1e-12)
        assert 1.0 - 1e-12 <= measure(S) <= len(S) * (1.0 + 1e-12)
    assert frobenius_norm(shuffled) == pytest.approx(frobenius_norm(S) * size, rel=1e-12)


@pytest.mark.parametrize("r", [1, 2, 7])
def test_equal_values_count_in_full_and_zeros_not_at_all(r):
    S = [0.3] * r + [0.0] * 4
    for measure in (effective_rank, stable_rank, participation_ratio):
        assert measure(S) == pytest.approx(r, rel=1e-14)
    assert energy_rank(S, 1.0) == r
    assert nuclear_norm(S) / spectral_norm(S) == pytest.approx(r, rel=1e-14)


def test_a_zero_update_measures_zero(put):
    B, A = factors(6, 5, 3, seed=0, kind="zero")
    m = measures(factored_svd(put(B), put(A))[1])
    assert m.pop("singular_values") == [0.0, 0.0, 0.0]
    assert set(m.values()) == {0}
    np.testing.assert_array_equal(eckart_young_errors([0.0, 0.0]), [0.0, 0.0, 0.0])
    np.testing.assert_array_equal(eckart_young_errors([0.0, 0.0], relative=True), [0.0, 0.0, 0.0])


def test_energy_rank_meets_an_exact_tie_and_the_full_share():
    assert energy_rank([3.0, 1.0], 0.9) == 1                      # 9 of 10
    assert energy_rank([3.0, 1.0], 0.9 + 1e-9) == 2
    assert energy_rank([1.0] * 25, 0.28) == 7                     # 7 of 25, but 0.28 * 25 rounds to more than 7
    assert energy_rank([1.0, 1.0, 1e-3], 1.0) == 3
    for share in (0.0, -0.5, 1.0001, math.nan):
        with pytest.raises(ValueError, match=r"^share: got"):
            energy_rank([1.0], share)


@given(spectra, st.floats(0.01, 0.999))
def test_energy_rank_is_the_least_rank_with_that_error(S, share):
    errors = eckart_young_errors(S, relative=True)
    q = energy_rank(S, share)
    assert errors[q] ** 2 <= 1.0 - share + 1e-12
    assert errors[q - 1] ** 2 >= 1.0 - share - 1e-12


def test_eckart_young_errors():
    S, errors = [12.0, 3.0, 4.0], np.array([13.0, 5.0, 3.0, 0.0])
    np.testing.assert_allclose(eckart_young_errors(S), errors, rtol=1e-14)
    np.testing.assert_allclose(eckart_young_errors(S, relative=True), errors / 13.0, rtol=1e-14)
    assert eckart_young_errors([1.0, 1e-9])[1] == pytest.approx(1e-9, rel=1e-14)      # not lost beside the large values


@pytest.mark.parametrize("S", [[], [[1.0]], [math.nan, 1.0], [math.inf], [-1.0]])
def test_what_is_no_spectrum_is_refused(S):
    for call in (measures, eckart_young_errors, energy_rank, effective_rank, stable_rank, frobenius_norm, nuclear_norm):
        with pytest.raises(ValueError, match=r"^singular values: got [^\n]*$"):
            call(np.array(S))


# --- subspaces ------------------------------------------------------------------------------------


@properties
@given(r=sizes, extra=st.integers(0, 6), seed=seeds)
def test_directions_are_orthonormal_rows_that_span_A(put, r, extra, seed):
    A = np.random.default_rng(seed).standard_normal((r, max(1, r - 3 + extra)))
    V = to_host(directions(put(A)))
    assert V.shape == (min(A.shape), A.shape[1])
    assert np.abs(V @ V.T - np.eye(len(V))).max() <= 1e-12
    np.testing.assert_allclose(A @ V.T @ V, A, atol=1e-12)
    in_order = np.linalg.svd(A, compute_uv=False)
    np.testing.assert_allclose(np.linalg.norm(V @ A.T, axis=1), in_order, atol=1e-12)


@properties
@given(r1=st.integers(1, 6), r2=st.integers(1, 6), extra=st.integers(0, 5), seed=seeds)
def test_similarity_grid_is_the_definition(put, r1, r2, extra, seed):
    k = max(r1, r2) + extra
    V1, V2 = orthonormal(r1, k, seed), orthonormal(r2, k, seed + 1)
    grid = to_host(similarity_grid(put(V1), put(V2)))
    assert grid.shape == (r1, r2)
    for i in range(1, r1 + 1):
        for j in range(1, r2 + 1):
            phi = np.linalg.norm(V1[:i] @ V2[:j].T) ** 2 / min(i, j)
            assert grid[i - 1, j - 1] == pytest.approx(phi, abs=1e-12)
            assert subspace_similarity(put(V1), put(V2), i, j) == pytest.approx(phi, abs=1e-12)
    cosines = np.cos(to_host(principal_angles(put(V1), put(V2))))
    assert grid[-1, -1] == pytest.approx((cosines**2).mean(), abs=1e-12)


def test_similarity_of_equal_nested_and_orthogonal_subspaces(put):
    V = orthonormal(8, 30, seed=0)
    np.testing.assert_allclose(to_host(similarity_grid(put(V), put(V))), np.ones((8, 8)), atol=1e-12)    # nested: all 1
    np.testing.assert_allclose(to_host(similarity_grid(put(V[:3]), put(V[3:]))), np.zeros((3, 5)), atol=1e-12)
    swapped = to_host(similarity_grid(put(V[[1, 0]]), put(V[:2])))
    np.testing.assert_allclose(swapped, [[0.0, 1.0], [1.0, 1.0]], atol=1e-12)


def test_similarity_is_one_minus_the_projection_distance_over_p(put):
    """φ = 1 − d²/p, with d² = ‖P1 − P2‖²_F / 2; the paper's (1 − d²)/p is negative here, and φ is not."""
    p, k = 4, 20
    V1, V2 = orthonormal(p, k, seed=1), orthonormal(p, k, seed=2)
    d2 = np.linalg.norm(V1.T @ V1 - V2.T @ V2) ** 2 / 2
    phi = subspace_similarity(put(V1), put(V2), p, p)
    assert phi == pytest.approx(1 - d2 / p, abs=1e-12)
    assert (1 - d2) / p < 0 < phi


def test_random_directions_overlap_by_the_baseline():
    """The mean φ of 1,000 random pairs: within four standard errors (each under 2 %) of max(i, j)/k in every cell."""
    rng = np.random.default_rng(0)
    r1, r2, k, draws = 4, 8, 48, 1000
    pairs = ((rng.standard_normal((r1, k)), rng.standard_normal((r2, k))) for _ in range(draws))
    grids = np.array([similarity_grid(directions(A1), directions(A2)) for A1, A2 in pairs])[:, 1:, 3:]
    i, j = np.arange(2, r1 + 1), np.arange(4, r2 + 1)
    expected = random_baseline(i[:, None], j, k)
    standard_error = grids.std(axis=0, ddof=1) / math.sqrt(draws)
    assert (standard_error < 0.02 * expected).all()
    assert (np.abs(grids.mean(axis=0) - expected) < 4 * standard_error).all()


def test_random_baseline_values():
    assert random_baseline(3, 8, 100) == 0.08
    assert isinstance(random_baseline(3, 8, 100), float)
    assert random_baseline(1, 64, 64) == 1.0                     # a subspace that fills R^k holds every direction
    np.testing.assert_array_equal(random_baseline(np.arange(1, 4)[:, None], np.arange(1, 3), 4),
                                  [[0.25, 0.5], [0.5, 0.5], [0.75, 0.75]])
    for i, j, k in [(0, 1, 4), (1, 5, 4)]:
        with pytest.raises(ValueError, match="expected numbers of directions from 1 to 4"):
            random_baseline(i, j, k)


@pytest.mark.parametrize("more", [0, 3])
def test_planted_principal_angles_come_back(put, more):
    """cos θ qᵢ + sin θ q_{p+i} makes the angle θ with qᵢ; rotating the rows of either basis changes nothing."""
    theta = np.array([0.0, 1e-9, 1e-4, 0.3, 1.2, math.pi / 2 - 1e-9, math.pi / 2])
    p = len(theta)
    Q = orthonormal(2 * p + more, 40, seed=4)
    V2 = np.cos(theta)[:, None] * Q[:p] + np.sin(theta)[:, None] * Q[p:2 * p]
    V1 = np.concatenate([Q[:p], Q[2 * p:]])
    V1, V2 = orthonormal(p + more, p + more, seed=5) @ V1, orthonormal(p, p, seed=6) @ V2
    for a, b in [(V1, V2), (V2, V1)]:
        np.testing.assert_allclose(to_host(principal_angles(put(a), put(b))), theta, rtol=0, atol=1e-14)


def test_what_is_not_orthonormal_is_refused(put):
    A = np.random.default_rng(0).standard_normal((3, 7))
    V = orthonormal(3, 7, seed=0)
    bad = V.copy()
    bad[0, 0] = math.nan
    for call in (similarity_grid, principal_angles, lambda a, b: subspace_similarity(a, b, 3, 3)):
        with pytest.raises(ValueError, match=r"^Vh1: its rows are not orthonormal"):
            call(put(A), put(V))
        with pytest.raises(ValueError, match=r"^Vh2: its rows are not orthonormal"):
            call(put(V), put(bad))
        with pytest.raises(ValueError, match=r"R\^7 and in R\^9"):
            call(put(V), put(orthonormal(3, 9, seed=1)))
    with pytest.raises(ValueError, match=r"^Vh1: got shape \(7, 3\)"):
        similarity_grid(put(V.T), put(V))
    for i, j in [(0, 1), (1, 0), (4, 1), (1, 4)]:
        with pytest.raises(ValueError, match="expected 1 ≤ i ≤ 3 and 1 ≤ j ≤ 3"):
            subspace_similarity(put(V), put(V), i, j)
