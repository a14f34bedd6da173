"""Do two updates point the same way? The subspace similarity of the LoRA paper, and the angles behind it.

Directions are orthonormal **rows**, most important first: the `Vh` (r, k) of an SVD, that is, right singular vectors,
directions of the layer's input in R^k. (For directions of its output pass `U.T`.) The paper takes them from A alone
(Hu et al. 2021, arXiv:2106.09685, section 7.2; its appendix says left singular vectors, of the transposed matrix):
`directions(A)`. The directions of the update itself are the Vh of `factored_svd(B, A)`.

A similarity means nothing without its baseline: two random subspaces overlap by max(i, j)/k, which is 1 when one fills
R^k.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..backend import Array, array_module
from ..lora.svd import as_float64, float_dtype

_ORTHONORMAL = 1e-3  # far above float32 rounding, far below what a matrix that is not orthonormal shows


def directions(A: Array) -> Array:  # (r, k) -> (min(r, k), k)
    """Orthonormal rows spanning the rows of A, by falling singular value: the paper's directions of one LoRA factor.

    If A has rank q < r (zero rows, say), the rows past q are arbitrary: slice them off. float32 in, float32 out.
    Raises ValueError for an array that is not a finite matrix.
    """
    xp = array_module(A)
    _, _, Vh = xp.linalg.svd(as_float64("A", A), full_matrices=False)
    return Vh.astype(float_dtype(A))


def _overlap(Vh1: Array, Vh2: Array) -> Array:  # (r1, k), (r2, k) -> (r1, r2)
    """The cosines V1 V2ᵀ. Raises ValueError unless both have orthonormal rows of one length."""
    xp = array_module(Vh1, Vh2)
    for name, V in (("Vh1", Vh1), ("Vh2", Vh2)):
        if V.ndim != 2 or not 1 <= V.shape[0] <= V.shape[1]:
            raise ValueError(f"{name}: got shape {tuple(V.shape)}, expected (r, k) with 1 ≤ r ≤ k, one direction a row")
        error = float(abs(V @ V.T - xp.eye(V.shape[0], dtype=V.dtype)).max())
        if not error < _ORTHONORMAL:
            raise ValueError(f"{name}: its rows are not orthonormal, V Vᵀ is {error:.1e} from the identity; "
                             f"pass directions(A) or the Vh of factored_svd(B, A)")
    if Vh1.shape[1] != Vh2.shape[1]:
        raise ValueError(f"got directions in R^{Vh1.shape[1]} and in R^{Vh2.shape[1]}, expected one input width; "
                         f"compare the same module of both adapters")
    return Vh1 @ Vh2.T


def similarity_grid(Vh1: Array, Vh2: Array) -> Array:  # (r1, k), (r2, k) -> (r1, r2)
    """φ(i, j) = ‖V1ⁱ V2ʲᵀ‖²_F / min(i, j) for all i and j at once, φ(i, j) at [i − 1, j − 1]; Vⁱ is the first i rows.

    φ is in [0, 1]: 1 when the smaller subspace lies in the larger one, 0 when they are orthogonal. The squared cosines
    are summed along both axes, so the whole grid costs one (r1, k) by (k, r2) product.

    With p = min(i, j) and the projection distance d² = p − Σ cos²θ, φ = 1 − d²/p. The paper prints (1 − d²)/p, which is
    a misprint: it is negative as soon as d² > 1.

    Raises ValueError for rows that are not orthonormal or of different widths.
    """
    xp = array_module(Vh1, Vh2)
    C = _overlap(Vh1, Vh2)
    sums = xp.cumsum(xp.cumsum(C * C, axis=0), axis=1)
    i = xp.arange(1, C.shape[0] + 1, dtype=C.dtype)
    j = xp.arange(1, C.shape[1] + 1, dtype=C.dtype)
    return sums / xp.minimum(i[:, None], j[None, :])


def subspace_similarity(Vh1: Array, Vh2: Array, i: int, j: int) -> float:
    """φ(i, j) of the first i rows of Vh1 (r1, k) and the first j of Vh2 (r2, k); see `similarity_grid`.

    Raises ValueError for i outside 1 … r1 or j outside 1 … r2, and as `similarity_grid`.
    """
    if not (1 <= i <= Vh1.shape[0] and 1 <= j <= Vh2.shape[0]):
        raise ValueError(f"got i={i} and j={j}, expected 1 ≤ i ≤ {Vh1.shape[0]} and 1 ≤ j ≤ {Vh2.shape[0]}, "
                         f"the numbers of directions")
    C = _overlap(Vh1[:i], Vh2[:j])
    return float((C * C).sum()) / min(i, j)


def random_baseline(i: Any, j: Any, k: int) -> Any:
    """E φ(i, j) = max(i, j)/k of two independent random subspaces of R^k; i, j: numbers or host arrays that broadcast.

    A fixed unit vector and a random one have E cos² = 1/k; there are i·j pairs, and i·j / (k min(i, j)) = max(i, j)/k.
    Raises ValueError for more directions than R^k has, or fewer than one.
    """
    i, j = np.asarray(i), np.asarray(j)
    if min(i.min(), j.min()) < 1 or max(i.max(), j.max()) > k:
        raise ValueError(f"got i up to {i.max()} and j up to {j.max()} in R^{k}, "
                         f"expected numbers of directions from 1 to {k}")
    baseline = np.maximum(i, j) / k
    return baseline if baseline.ndim else float(baseline)


def null_similarity(r1: int, r2: int, k: int, quantiles: Sequence[float] = (0.05, 0.5, 0.95), draws: int = 200,
                    seed: int = 0) -> tuple[np.ndarray, np.ndarray]:      # -> (len(quantiles), r1, r2), (min(r1, r2),)
    """What chance gives: quantiles of φ(i, j) between random directions in R^k, and the medians of their principal angles.

    Only the relative place of the two subspaces matters, so the first is e₁ … e_r1 and the second the Q of a normal matrix
    G = QR (k, r2), of which its first r1 rows are needed. The other rows count through their own R alone, whose law is known
    (Bartlett: χ on the diagonal, normal above it), so a draw costs the same for every k. On the host.
    Raises ValueError for more directions than R^k has.
    """
    random_baseline(r1, r2, k)                                                # checks the sizes
    rng = np.random.default_rng(seed)
    head, rest = rng.standard_normal((draws, r1, r2)), rng.standard_normal((draws, min(r2, k - r1), r2))
    if r2 <= k - r1:
        rest = np.triu(rest)
        rest[:, range(r2), range(r2)] = np.sqrt(rng.chisquare(k - r1 - np.arange(r2), (draws, r2)))
    C = np.linalg.qr(np.concatenate([head, rest], axis=1))[0][:, :r1]         # (draws, r1, r2), the cosines
    grids = np.cumsum(np.cumsum(C * C, axis=1), axis=2)
    grids /= np.minimum(np.arange(1, r1 + 1)[:, None], np.arange(1, r2 + 1))
    cosines = np.linalg.svd(C, compute_uv=False)
    return np.quantile(grids, quantiles, axis=0), np.median(np.arccos(np.minimum(cosines, 1.0)), axis=0)


def principal_angles(Vh1: Array, Vh2: Array) -> Array:  # (r1, k), (r2, k) -> (min(r1, r2),)
    """The principal angles θ₁ ≤ θ₂ ≤ … in [0, π/2], in radians, between two row spaces (Björck & Golub 1973).

    cos θ are the singular values of V1 V2ᵀ; sin θ those of what the larger space leaves of the smaller. The angle is
    taken from both: the arc cosine alone loses half the digits near 0, the arc sine near π/2. φ(r1, r2) = mean cos²θ.

    Raises ValueError for rows that are not orthonormal or of different widths.
    """
    xp = array_module(Vh1, Vh2)
    C = _overlap(Vh1, Vh2)                                                    # (r1, r2)
    if C.shape[0] < C.shape[1]:                                               # the larger space first
        Vh1, Vh2, C = Vh2, Vh1, C.T
    cosines = xp.linalg.svd(C, compute_uv=False)                              # falling
    sines = xp.linalg.svd(Vh2 - C.T @ Vh1, compute_uv=False)[::-1]            # rising
    return xp.arctan2(sines, cosines)
