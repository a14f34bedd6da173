"""The SVD of an update from its two factors: ΔW = s·B@A is never formed to be analysed.

B (d, r) and A (r, k) are thin, so a QR of each leaves everything of interest in a core no larger than r×r:

    B = Q_b R_b,   Aᵀ = Q_a R_a,   s R_b R_aᵀ = u Σ vᵀ   gives   ΔW = (Q_b u) Σ (Q_a v)ᵀ.

Q_b u and Q_a v have orthonormal columns, so this is the SVD of ΔW: O((d+k) r²) work and O((d+k) r) memory in place of
the O(d k min(d, k)) and d k of the dense way. The best rank-q approximation (Eckart-Young-Mirsky) is then a slice.
"""

from __future__ import annotations

import math

import numpy as np

from ..backend import Array, array_module


def as_float64(name: str, matrix: Array) -> Array:  # (m, n) -> (m, n)
    """`matrix` in float64, on its own device. Raises ValueError unless it is 2-D, not empty, and finite.

    Factors are analysed in float64 whatever they are stored in. The conversion is exact, the arrays are thin, and in
    float32 rounding would give a rank-deficient update a false tail of singular values near 1e-7 σ₁.
    Finiteness is checked here because LAPACK may fail to converge on a NaN and cuSOLVER does not report it.
    """
    xp = array_module(matrix)
    if matrix.ndim != 2 or 0 in matrix.shape:
        raise ValueError(f"{name}: got an array of shape {tuple(matrix.shape)}, expected a matrix with rows and "
                         f"columns; pass one factor of one module")
    if not bool(xp.isfinite(matrix).all()):
        raise ValueError(f"{name}: got NaN or infinite values, expected finite numbers; "
                         f"the training that made it diverged, take an earlier checkpoint")
    return matrix.astype(np.float64)


def float_dtype(*arrays: Array) -> np.dtype:
    """The dtype of a result: the arrays' own, float32 at least (a half-precision file gives float32)."""
    return np.result_type(np.float32, *(array.dtype for array in arrays))


def factored_svd(B: Array, A: Array, scale: float = 1.0) -> tuple[Array, Array, Array]:
    # (d, r), (r, k) -> (d, q), (q,), (q, k)
    """The reduced SVD (U, S, Vh) of ΔW = scale·B@A = U @ diag(S) @ Vh, without forming ΔW.

    q = min(d, r, k). U has orthonormal columns, Vh orthonormal rows, S ≥ 0 descends. For an update of lower rank than q
    the last values of S are zero up to rounding, and their directions are orthonormal but otherwise arbitrary.

    NumPy or CuPy arrays in, the same out, float32 for float32 (computed in float64, see `as_float64`).
    Raises ValueError for non-finite values, for arrays that are not matrices and for shapes that do not fit.
    """
    xp, dtype = array_module(B, A), float_dtype(B, A)
    B, A = _checked(B, A, scale)
    Q_b, R_b = xp.linalg.qr(B)        # (d, min(d, r)), (min(d, r), r)
    Q_a, R_a = xp.linalg.qr(A.T)      # (k, min(k, r)), (min(k, r), r)
    u, S, vh = xp.linalg.svd(float(scale) * (R_b @ R_a.T), full_matrices=False)
    return (Q_b @ u).astype(dtype), S.astype(dtype), (vh @ Q_a.T).astype(dtype)


def singular_values(B: Array, A: Array, scale: float = 1.0) -> Array:  # (d, r), (r, k) -> (q,)
    """S of `factored_svd` alone, in float64, at half the work: Q_b and Q_a are not needed. Raises as `factored_svd` does."""
    xp = array_module(B, A)
    B, A = _checked(B, A, scale)
    core = xp.linalg.qr(B, mode="r") @ xp.linalg.qr(A.T, mode="r").T
    return xp.linalg.svd(float(scale) * core, compute_uv=False)


def _checked(B: Array, A: Array, scale: float) -> tuple[Array, Array]:
    """Factors that can be multiplied, in float64."""
    if not math.isfinite(scale):
        raise ValueError(f"scale: got {scale}, expected a finite number, lora_alpha / r")
    B, A = as_float64("B", B), as_float64("A", A)
    if B.shape[1] != A.shape[0]:
        raise ValueError(f"got B {tuple(B.shape)} and A {tuple(A.shape)}, expected B (out, r) and A (r, in) of one r; "
                         f"transpose them if they are stored (in, out)")
    return B, A


def low_rank_factors(U: Array, S: Array, Vh: Array, scale: float = 1.0) -> tuple[Array, Array]:  # -> (d, q), (q, k)
    """Factors (B, A) with scale·B@A = U @ diag(S) @ Vh, each taking √(S / |scale|), so that BᵀB = AAᵀ.

    This balanced split has the least ‖B‖²_F + ‖A‖²_F of all factors of that product. `scale` is the s of the adapter
    that will hold them; its sign goes into B. To keep q directions pass U[:, :q], S[:q], Vh[:q].
    Raises ValueError for a scale that is 0 or not finite.
    """
    if scale == 0 or not math.isfinite(scale):
        raise ValueError(f"scale: got {scale}, expected a finite number other than 0, "
                         f"the lora_alpha / r of the new adapter")
    xp = array_module(U, S, Vh)
    root = xp.sqrt(S / abs(float(scale)))                               # (q,)
    return U * (root * math.copysign(1.0, scale)), root[:, None] * Vh


def truncate(B: Array, A: Array, rank: int) -> tuple[Array, Array]:  # (d, r), (r, k) -> (d, q), (q, k)
    """Balanced factors (B', A') of the best approximation of B@A of rank at most `rank` (in ‖·‖_F and ‖·‖₂).

    q = min(rank, d, r, k). A scale commutes with the truncation and needs no argument: s·B'@A' is the best
    approximation of s·B@A for every s. The error is the Eckart-Young tail √Σ_{i>q} σᵢ². For an adapter that will have
    another scale, take `low_rank_factors(..., scale=)` of a `factored_svd(..., scale=)`.
    Raises ValueError as `factored_svd` does, and for a rank below 1.
    """
    if rank < 1:
        raise ValueError(f"rank: got {rank}, expected 1 or more")
    U, S, Vh = factored_svd(B, A)
    return low_rank_factors(U[:, :rank], S[:rank], Vh[:rank])
