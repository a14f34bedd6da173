"""How much rank an update uses: numbers from its singular values σ₁ ≥ σ₂ ≥ … ≥ 0.

A matrix of rank 8 may be rank 1 in all but name. Each measure answers that with one number, and they differ in how much
a small singular value counts: the effective rank weighs σ, the participation ratio σ², and the stable rank compares the
whole energy Σσ² with the first direction alone. For a spectrum of r equal values all of them are r; for one value, 1.

Every function takes the singular values as a 1-D array of any device or a list, in any order, and works on the host in
float64. The measures of a zero update, ΔW = 0 (every adapter at its start), are 0, as its rank is.
All ratios are taken of σ/σ₁, so that neither large nor small updates overflow or vanish when squared.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..backend import to_host


def _descending(S: Any) -> np.ndarray:  # (r,) -> (r,)
    """Singular values in float64 on the host, largest first. Raises ValueError unless 1-D, not empty, finite, ≥ 0."""
    values = np.asarray(to_host(S), dtype=np.float64)
    if values.ndim != 1 or values.size == 0:
        raise ValueError(f"singular values: got an array of shape {values.shape}, expected (r,) with r of 1 or more; "
                         f"take S of factored_svd(B, A)")
    if not (np.isfinite(values).all() and (values >= 0).all()):
        raise ValueError("singular values: got a NaN, infinite or negative value, expected finite values of 0 or more; "
                         "take S of factored_svd(B, A)")
    return np.sort(values)[::-1]


def _relative(S: Any) -> tuple[float, np.ndarray]:  # (r,) -> σ₁ and (r,)
    """σ₁ and the values σ/σ₁ in [0, 1], largest first; of a zero update 0 and zeros."""
    values = _descending(S)
    top = float(values[0])
    return top, values / top if top > 0 else values


def frobenius_norm(S: Any) -> float:
    """‖ΔW‖_F = √Σσ², the length of the update as a vector."""
    top, x = _relative(S)
    return top * float(np.sqrt((x * x).sum()))


def spectral_norm(S: Any) -> float:
    """‖ΔW‖₂ = σ₁, the most the update stretches any input."""
    return _relative(S)[0]


def nuclear_norm(S: Any) -> float:
    """‖ΔW‖_* = Σσ. Divided by the spectral norm it is one more soft rank, between 1 and r."""
    return float(_descending(S).sum())


def effective_rank(S: Any) -> float:
    """exp(−Σ p ln p) with p = σ/Σσ, exponential of the entropy of σ (Roy & Vetterli 2007). In [1, rank], or 0."""
    top, x = _relative(S)
    if top == 0:
        return 0.0
    p = x / x.sum()
    p = p[p > 0]                      # 0 ln 0 = 0
    return float(np.exp(-(p * np.log(p)).sum()))


def stable_rank(S: Any) -> float:
    """‖ΔW‖²_F / ‖ΔW‖²₂ = Σσ² / σ₁². In [1, rank], or 0. A small change of ΔW changes it little, unlike the rank."""
    _, x = _relative(S)
    return float((x * x).sum())


def participation_ratio(S: Any) -> float:
    """(Σσ²)² / Σσ⁴, how many directions share the energy. In [1, rank], or 0."""
    top, x = _relative(S)
    energy = x * x
    return float(energy.sum() ** 2 / (energy * energy).sum()) if top > 0 else 0.0


def energy_rank(S: Any, share: float = 0.9) -> int:
    """The smallest q with Σ_{i≤q} σᵢ² ≥ share·Σσ²: the rank that keeps this share of the energy. 0 for a zero update.

    By Eckart-Young its best rank-q approximation has a relative Frobenius error of at most √(1 − share). An exact tie,
    such as σ = (3, 1) at 0.9, is met: the comparison allows for the rounding of the sums.
    Raises ValueError for a share outside (0, 1].
    """
    if not 0 < share <= 1:
        raise ValueError(f"share: got {share}, expected a fraction of the energy above 0 and up to 1, such as 0.9")
    top, x = _relative(S)
    if top == 0:
        return 0
    energy = np.cumsum(x * x)
    rounding = 2.0 * x.size * np.finfo(np.float64).eps
    return int(np.argmax(energy >= share * energy[-1] * (1.0 - rounding))) + 1


def eckart_young_errors(S: Any, relative: bool = False) -> np.ndarray:  # (r,) -> (r + 1,)
    """‖ΔW − ΔW_q‖_F = √Σ_{i>q} σᵢ² of the best rank-q approximation ΔW_q, for q = 0 … r (Eckart-Young-Mirsky).

    The first entry is ‖ΔW‖_F and the last 0. `relative` divides by ‖ΔW‖_F; a zero update has relative errors of 0.
    No LoRA of rank q comes closer to ΔW than this. The same approximation has spectral error σ_{q+1}.
    """
    top, x = _relative(S)
    tails = np.append(np.cumsum((x * x)[::-1])[::-1], 0.0)      # summed from the smallest up: small tails stay exact
    errors = np.sqrt(tails)
    if relative:
        return errors / errors[0] if top > 0 else errors
    return top * errors


def measures(S: Any) -> dict[str, Any]:
    """Every measure of one update as plain Python numbers, ready for JSON; `singular_values` falls."""
    return {
        "singular_values": _descending(S).tolist(),
        "frobenius_norm": frobenius_norm(S),
        "spectral_norm": spectral_norm(S),
        "nuclear_norm": nuclear_norm(S),
        "effective_rank": effective_rank(S),
        "stable_rank": stable_rank(S),
        "participation_ratio": participation_ratio(S),
        "energy_rank_90": energy_rank(S, 0.90),
        "energy_rank_95": energy_rank(S, 0.95),
        "energy_rank_99": energy_rank(S, 0.99),
    }
