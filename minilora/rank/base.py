"""An update against its base, the weight it is added to: does it amplify directions of W, turn them, or bring new ones?

Amplification is section 7.3 of the LoRA paper (Hu et al. 2021, arXiv:2106.09685, its Table 7). Intruder dimensions are
singular vectors of W + ΔW that resemble none of W (Shuttleworth et al. 2024, arXiv:2410.21228).

Amplification needs thin products only. The rest needs W's own SVD: two symmetric eigenproblems of size m = min(d, k) for each
module, O(m³ + d k m) work and O(d k) memory, in float64. W + ΔW is never formed: its Gram matrix is W's and a thin term.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..backend import Array, array_module, device_of, to_device, to_host
from ..lora import LoraConfig, adapters_of, add_adapter, disable_adapter, set_adapter
from ..lora.layer import dense
from ..lora.model import adaptations
from ..lora.svd import as_float64
from ..nn import Transformer
from .update import Update, set_factors, updates

FLOOR = 1e-6            # of σ₁: below it the Gram matrix does not tell a direction of W, and W has none worth the name


def amplification(update: Update, W: Array) -> dict[str, float | None]:
    """‖ΔW‖_F and ‖W‖_F, and what W does in a few directions: the paper's Table 7, W itself aside. W is (d, k).

    projection = ‖UᵀWVᵀ‖_F with U (d, q) and V (q, k) the singular vectors of ΔW; projection_random, its root mean square for
    random directions, ‖W‖ q/√(dk); amplification = ‖ΔW‖_F / projection, None for ΔW = 0, or where W does nothing in its
    directions; relative_norm = ‖ΔW‖_F / ‖W‖_F. W's own top directions: `top_projection`.

    Raises ValueError for factors that are not finite.
    """
    U, S, Vh = update.svd
    norm = array_module(W).linalg.norm
    size, whole = float(norm(S.astype(np.float64))), float(norm(W))
    within = float(norm(U.T @ W @ Vh.T)) if len(S) else 0.0
    return {"base_norm": whole, "relative_norm": size / whole if whole else None, "projection": within,
            "projection_random": whole * len(S) / (W.shape[0] * W.shape[1]) ** 0.5,
            "amplification": size / within if within else None}


def gram_svd(W: Array, update: Update | None = None) -> tuple[Array, Array, Array]:
    # (d, k) -> (d, m), (m,), (m, k)
    """(U, S, Vh) of W, or of W + ΔW, from the eigenvectors of the smaller Gram matrix; values below 1e-6 σ₁ are left out.

    For d ≤ k, M Mᵀ = E diag(σ²) Eᵀ gives U = E and Vh = Uᵀ M / σ; with P = W V S and M = W + U S Vᵀ,

        M Mᵀ = W Wᵀ + P Uᵀ + U Pᵀ + U S² Uᵀ.

    An eigenproblem takes a third of the time of an SVD. Squaring costs digits only of the small σ, hence the limit.
    Raises ValueError for a W that is no finite matrix.
    """
    xp, W = array_module(W), as_float64("W", W)
    if W.shape[0] > W.shape[1]:
        turned = None if update is None else Update(update.B.T, update.A.T, update.scale)
        U, S, Vh = gram_svd(W.T, turned)
        return Vh.T, S, U.T
    gram = W @ W.T
    if update is not None:
        u, s, vh = (part.astype(np.float64) for part in update.svd)
        cross = (W @ vh.T * s + 0.5 * u * s**2) @ u.T
        gram += cross + cross.T
    values, E = xp.linalg.eigh(gram)                                       # rising
    S = xp.sqrt(xp.maximum(values[::-1], 0.0))
    m = int((to_host(S) > FLOOR * float(S[0])).sum())
    U, S = E[:, ::-1][:, :m], S[:m]
    Vh = U.T @ W
    if update is not None:
        Vh = Vh + (U.T @ u * s) @ vh
    return U, S, Vh / S[:, None]


def top_projection(S: Array, q: int) -> float:
    """‖UᵀWVᵀ‖_F in W's own q top directions, √Σ_{i≤q} σᵢ² of its singular values S: Table 7's third number."""
    return float(np.linalg.norm(to_host(S)[:q]))


def alignment(update: Update, W: Array, top: int = 10, side: str = "output", *, base_svd: Any = None,
              tuned_svd: Any = None) -> dict[str, Any]:
    """How the `top` singular vectors y_j of W + ΔW lie to those of W, x_i: intruders, and how x_i were rotated. Plain data.

    cosines: for each y_j the largest |cos| with any x_i, all of them; `intruder_count` counts those below a threshold.
    sigma: the values of y_j. rotation: for each of the first x_i the angle to the nearest y, all of them, in radians. matrix:
    |⟨y_j, x_i⟩| for i, j < top. base_sigma: the first values of W. side: "output", left singular vectors, as the paper has
    it, or "input". base_svd and tuned_svd: what `gram_svd` gave for W and for W + ΔW, to spare the time of doing it again.

    Raises ValueError for another side, for a top below 1 and for values that are not finite.
    """
    if side not in ("output", "input") or top < 1:
        raise ValueError(f'got side {side!r} and top {top}, expected "output" or "input" and at least 1 direction')
    if W.shape != update.shape:
        raise ValueError(f"W: got shape {tuple(W.shape)}, expected the update's {update.shape}")
    before, after = base_svd or gram_svd(W), tuned_svd or gram_svd(W, update)
    X, Y = (parts[0].T if side == "output" else parts[2] for parts in (before, after))
    rows, columns = to_host(abs(Y[:top] @ X.T)), to_host(abs(Y @ X[:top].T))               # (top, m), (m', top)
    rotation = np.arccos(np.minimum(columns.max(axis=0, initial=0.0), 1.0))
    return {"side": side, "cosines": rows.max(axis=1, initial=0.0).tolist(), "sigma": to_host(after[1][:top]).tolist(),
            "rotation": rotation.tolist(), "matrix": rows[:, :top].tolist(), "base_sigma": to_host(before[1][:top]).tolist()}


def intruder_count(cosines: Any, epsilon: Any = 0.5) -> Any:
    """How many of the `cosines` are below epsilon: a number, or for several thresholds an array of the same shape."""
    counts = (np.asarray(cosines)[:, None] < np.asarray(epsilon, float).reshape(1, -1)).sum(axis=0)
    return counts.reshape(np.shape(epsilon)) if np.ndim(epsilon) else int(counts[0])


def intruder_correction(update: Update, W: Array, factor: float = 0.7, epsilon: float = 0.5, top: int = 10,
                        ) -> tuple[Update | None, dict[str, Any]]:
    """(factor − 1) Σ σⱼ uⱼvⱼᵀ over the intruders among the `top` singular triplets of W + ΔW, and what it changes.

    Added to ΔW it scales them to factor·σⱼ: 1 changes nothing, 0 removes them (arXiv:2410.21228, section 5.3). None without
    an intruder. The facts: intruders, their places j from 0; cosines and sigma; norm, of the correction, ‖·‖_F; and
    relative_norm, that over ‖ΔW‖_F. Raises ValueError for a factor that is not finite, and as `alignment` does.
    """
    if not np.isfinite(factor):
        raise ValueError(f"factor: got {factor}, expected a finite number: 1 as trained, 0 to remove intruders, 0.7 to soften")
    U, S, Vh = after = gram_svd(W, update)
    cosines = np.array(alignment(update, W, top, tuned_svd=after)["cosines"])
    found = np.flatnonzero(cosines < epsilon)
    sigma = to_host(S)[found]
    norm = abs(factor - 1) * float(np.linalg.norm(sigma))
    size = float(np.linalg.norm(to_host(update.svd[1])))
    facts = {"intruders": found.tolist(), "cosines": cosines[found].tolist(), "sigma": sigma.tolist(), "norm": norm,
             "relative_norm": norm / size if size else 0.0}
    if not len(found):
        return None, facts
    places = to_device(found, device_of(W).name)
    return Update(Vh[places], U[:, places] * S[places], factor - 1.0), facts


def reduce_intruders(model: Transformer, factor: float = 0.7, epsilon: float = 0.5, top: int = 10, name: str = "default",
                     correction: str = "correction") -> dict[str, dict[str, Any]]:
    """Soften the intruders of an adapter by a second one: their singular values are multiplied by `factor`.

    The correction is a LoRA of its own (rank: the number of intruders of each module, s = 1), active beside what was active,
    so nothing is lost: set_adapter(model, name) undoes it, save_adapter and compose make one adapter of both. Returns what
    changed, module -> the facts of `intruder_correction`; modules without intruders have none, and if there are none at all
    no adapter is added.

    Raises KeyError without the adapter, ValueError if `correction` is taken or adapters are merged, and as
    intruder_correction does.
    """
    found: dict[str, tuple[Update, dict[str, Any]]] = {}
    active = list(dict.fromkeys(n for a in adaptations(model) for n in a.active))
    layers: dict[str, Any] = dict(model.named_modules())
    for path, update in updates(model, name).items():
        with disable_adapter(model):
            part, facts = intruder_correction(update, dense(layers[path]).data, factor, epsilon, top)
        if part is not None:
            found[path] = part, facts
    if found:
        ranks = {path: len(part.A) for path, (part, _) in found.items()}
        add_adapter(model, LoraConfig(r=1, lora_alpha=1, target_modules=list(ranks), rank_pattern=ranks,
                                      alpha_pattern=dict(ranks)), correction)
        for path, adapter in adapters_of(model, correction).items():
            if path in found:
                part = found[path][0]
                set_factors(adapter, part.A, part.scale * part.B)
        set_adapter(model, [*active, correction])
    return {path: facts for path, (_, facts) in found.items()}
