"""A planted task: one linear layer whose best update of every rank is known, so a rank-vs-quality curve has a floor.

A hidden update ΔW* with a chosen spectrum moves the targets away from a known W. The inputs are exactly white
(XᵀX = n I, not only on average), so the squared error of any update is its squared Frobenius distance to ΔW*, and
Eckart and Young say how close rank r can come.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import DTypeLike


def _orthonormal(rows: int, columns: int, rng: np.random.Generator) -> np.ndarray:  # (rows, columns), columns <= rows
    """Orthonormal columns in float64, uniformly distributed (Haar).

    QR leaves the signs of R's diagonal to the implementation; making them positive makes Q uniform (Mezzadri 2007,
    arXiv:math-ph/0609050) and the same on every machine up to rounding.
    """
    q, r = np.linalg.qr(rng.standard_normal((rows, columns)))
    return q * np.where(np.diagonal(r) < 0, -1.0, 1.0)


def planted_update(
    d: int, k: int, spectrum: Sequence[float] | np.ndarray, rng: np.random.Generator, dtype: DTypeLike = np.float32
) -> np.ndarray:  # -> (d, k)
    """ΔW* = U diag(σ) Vᵀ with random orthonormal U (d, m), V (k, m): its singular values are `spectrum`, then zeros.

    Raises ValueError if the spectrum is empty, longer than min(d, k), or holds a negative or non-finite number.
    """
    sigma = _checked_spectrum(spectrum, d, k)
    U, V = _orthonormal(d, sigma.size, rng), _orthonormal(k, sigma.size, rng)
    return ((U * sigma) @ V.T).astype(dtype)


def _checked_spectrum(spectrum: Sequence[float] | np.ndarray, d: int, k: int) -> np.ndarray:  # (m,) float64, descending
    sigma = np.asarray(spectrum, dtype=np.float64)
    if sigma.ndim != 1 or not 1 <= sigma.size <= min(d, k):
        raise ValueError(
            f"spectrum: got shape {sigma.shape}, expected 1 to min(d, k) = {min(d, k)} singular values; "
            "shorten it or enlarge the layer"
        )
    if not np.isfinite(sigma).all() or (sigma < 0).any():
        raise ValueError(f"spectrum: got {sigma.tolist()}, expected finite numbers >= 0; singular values have no sign")
    return np.sort(sigma)[::-1]


@dataclass(frozen=True, eq=False)
class PlantedLinear:
    """The layer y = x (W + ΔW*)ᵀ: W (d, k) is given to the learner, delta = ΔW* (d, k) is hidden, spectrum (m,) known.

    The loss that `optimum` speaks of is the squared error summed over the d outputs and averaged over the n rows:

        L(ΔW) = 1/n Σ_i ‖x_i (W + ΔW)ᵀ - y_i‖²  =  tr(E XᵀX Eᵀ) / n  =  ‖ΔW - ΔW*‖_F²,     E = ΔW - ΔW*,   XᵀX = n I.

    It has no sampling noise: every batch gives the same value. (A mean over all n·d elements is L / d.) A rank plot
    needs a spectrum longer than its largest rank, or its floor is zero there.
    """

    W: np.ndarray
    delta: np.ndarray
    spectrum: np.ndarray

    @classmethod
    def create(
        cls,
        d: int,
        k: int,
        spectrum: Sequence[float] | np.ndarray,
        rng: np.random.Generator,
        dtype: DTypeLike = np.float32,
    ) -> PlantedLinear:
        """Draw W ~ N(0, 1/k) and ΔW* with this spectrum. Raises ValueError as `planted_update` does.

        >>> task = PlantedLinear.create(48, 32, [2.0 ** (-i / 4) for i in range(24)], np.random.default_rng(0))
        >>> task.optimum(16) > task.optimum(23) > task.optimum(24) == 0.0
        True
        """
        sigma = _checked_spectrum(spectrum, d, k)
        W = (rng.standard_normal((d, k)) / k**0.5).astype(dtype)
        return cls(W, planted_update(d, k, sigma, rng, dtype), sigma)

    def batch(self, rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:  # -> (n, k), (n, d)
        """Inputs x = √n Q with orthonormal columns, so xᵀx = n I exactly, and targets y = x (W + ΔW*)ᵀ, in W's dtype.

        Raises ValueError if n < k: fewer rows than inputs cannot be white.
        """
        k = self.W.shape[1]
        if n < k:
            raise ValueError(f"batch: got n={n} rows, expected at least k={k} to be white; take a larger batch")
        x = (n**0.5 * _orthonormal(n, k, rng)).astype(self.W.dtype)
        return x, x @ (self.W + self.delta).T

    def optimum(self, r: int) -> float:
        """The least loss L of any update of rank r: Σ_{i>r} σ_i² (Eckart and Young 1936).

        ΔW*'s truncated SVD reaches it. r = 0 is the frozen base, ‖ΔW*‖_F². Raises ValueError for a negative r.
        """
        if r < 0:
            raise ValueError(f"optimum: got rank r={r}, expected r >= 0; pass the rank of the update")
        return float(np.sum(self.spectrum[r:] ** 2))
