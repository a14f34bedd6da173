"""Two updates of one module: how much their directions overlap, beside chance, and what merging them would do."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..backend import Array, array_module, to_host
from .measures import eckart_young_errors
from .subspace import null_similarity, principal_angles, random_baseline, similarity_grid
from .update import Update


def compare(first: Update, second: Update, side: str = "input", draws: int = 200, seed: int = 0) -> dict[str, Any]:
    """The overlap of two updates as plain data, for figures and JSON: of two ranks, two seeds, two layers.

    side: as in Update.directions. The result has phi, the grid φ(i, j) (r1, r2); baseline, max(i, j)/k; null_low, null_median
    and null_high, the 5 %, 50 % and 95 % quantiles of φ between random subspaces, from `draws` samples (0: none); angles, the
    principal angles in radians, rising; null_angles, their medians between random subspaces; sizes [r1, r2] and k.

    Raises ValueError for updates of zero and for directions in spaces of different widths.
    """
    V1, V2 = first.directions(side), second.directions(side)
    (r1, k), r2 = V1.shape, len(V2)
    grid = to_host(similarity_grid(V1, V2))
    result = {"side": side, "k": k, "sizes": [r1, r2], "phi": grid.tolist(),
              "baseline": random_baseline(np.arange(1, r1 + 1)[:, None], np.arange(1, r2 + 1), k).tolist(),
              "angles": to_host(principal_angles(V1, V2)).tolist()}
    if draws:
        quantiles, angles = null_similarity(r1, r2, k, draws=draws, seed=seed)
        result |= dict(zip(("null_low", "null_median", "null_high"), quantiles.tolist())) | {"null_angles": angles.tolist()}
    return result


def inner_product(first: Update, second: Update) -> float:
    """⟨ΔW₁, ΔW₂⟩ = Σ ΔW₁ ⊙ ΔW₂ = s₁s₂ Σ (B₁ᵀB₂) ⊙ (A₁A₂ᵀ): thin products alone. In float64."""
    B1, A1, B2, A2 = (part.astype(np.float64) for update in (first, second) for part in (update.B, update.A))
    return first.scale * second.scale * float(((B1.T @ B2) * (A1 @ A2.T)).sum())


def interference(first: Update, second: Update, inputs: Array | None = None) -> dict[str, Any]:
    """What merging two adapters would do to each of them in this module, before they are merged.

    cosine: ⟨ΔW₁, ΔW₂⟩ / ‖ΔW₁‖‖ΔW₂‖, between −1 (they cancel) and 1. overlap_input and overlap_output: φ(r1, r2) of their
    directions, with random_input and random_output, what chance gives. disturbance: what the other one does to the inputs that
    the first listens to, ‖ΔW₂V₁ᵀ‖_F / ‖ΔW₁‖_F (V₁ the rows of ΔW₁'s input directions), and the other way round;
    random_disturbance: the same, root mean square, if the directions were random, ‖ΔW₂‖ √(r₁/k) / ‖ΔW₁‖.

    Predicted against true: were the directions orthogonal on both sides, the sum would have the singular values of both, and
    norm √(‖ΔW₁‖² + ‖ΔW₂‖²). predicted_norm, predicted_errors (the relative Eckart-Young errors of that spectrum, for
    q = 0 … r1 + r2) stand beside norm and errors, those of the sum itself. With inputs X (n, k) of the layer from the first
    adapter's task, measured_disturbance is ‖XΔW₂ᵀ‖_F / ‖XΔW₁ᵀ‖_F, which `disturbance` predicts without data.

    Raises ValueError for updates of zero or of different shapes, and for inputs that do not fit.
    """
    both, k, d = first + second, first.shape[1], first.shape[0]
    sides = {side: (first.directions(side), second.directions(side)) for side in ("input", "output")}
    norm = array_module(first.A).linalg.norm
    S = [to_host(update.svd[1]).astype(np.float64) for update in (first, second)]
    sizes = [float(np.linalg.norm(values)) for values in S]
    r1, r2 = map(len, S)
    union = np.concatenate(S)                                              # (r1 + r2,)
    true = np.zeros(r1 + r2)
    found = to_host(both.svd[1])[: r1 + r2]
    true[: len(found)] = found

    def response(update: Update, X: Array) -> float:                       # (n, k) -> ‖X ΔWᵀ‖_F
        return abs(update.scale) * float(norm((X @ update.A.T) @ update.B.T))

    result: dict[str, Any] = {"cosine": inner_product(first, second) / (sizes[0] * sizes[1])}
    for side, width in (("input", k), ("output", d)):
        V1, V2 = sides[side]
        result |= {f"overlap_{side}": float(similarity_grid(V1, V2)[-1, -1]), f"random_{side}": random_baseline(r1, r2, width)}
    V1, V2 = sides["input"]
    result |= {"disturbance": [response(second, V1) / sizes[0], response(first, V2) / sizes[1]],
               "random_disturbance": [sizes[1] * (r1 / k) ** 0.5 / sizes[0], sizes[0] * (r2 / k) ** 0.5 / sizes[1]],
               "predicted_norm": float(np.linalg.norm(sizes)), "norm": float(np.linalg.norm(true)),
               "predicted_errors": eckart_young_errors(union, relative=True).tolist(),
               "errors": eckart_young_errors(true, relative=True).tolist()}
    if inputs is not None:
        if inputs.ndim != 2 or inputs.shape[1] != k:
            raise ValueError(f"inputs: got shape {tuple(inputs.shape)}, expected (n, {k}), rows that the layer is given")
        own = response(first, inputs)
        result["measured_disturbance"] = response(second, inputs) / own if own else None
    return result
