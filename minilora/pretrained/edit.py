"""An adapter to another rank, and several adapters to one: by the factored SVD of ΔW = s·B@A, a module at a time.

What an approximation loses is computed, never assumed: as Eckart and Young predict it, and as measured on what was written.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import numpy as np

from ..lora.svd import factored_svd, low_rank_factors
from ..rank.measures import eckart_young_errors, energy_rank
from .adapters import AdapterFolder, EditReport, distance, norm, relative, stored, widest, write_modules
from .tensors import new_folder

COLUMNS = {"shape": "shape", "rank_before": "before", "rank": "rank", "predicted_error": "predicted",
           "measured_error": "measured", "linear_error": "linear"}


def resize(directory: str | os.PathLike[str], out: str | os.PathLike[str], *, rank: int | None = None,
           energy: float | None = None, force: bool = False, progress: bool = False) -> EditReport:
    """Write to `out` the best adapter of lower rank: ΔW cut to its largest singular values. PEFT loads the result.

    rank: the same for every module (one of lower rank stays as it is, bit for bit); or energy: for every module the least
    rank that keeps this share of Σσ². Scales s stay, alphas follow the ranks. Modules saved whole are copied. force: replace
    an adapter in `out`.

    The report has for each module rank_before, rank, predicted_error (the tail √Σ_{i>q} σ² / √Σσ² of Eckart and Young) and
    measured_error ‖ΔW' - ΔW‖_F / ‖ΔW‖_F of the factors as written, in their dtype; None for an update of zero.

    Raises ValueError for a rank below 1, an energy outside (0, 1], both or neither, and an `out` that cannot be used; and as
    read_adapter does. Then nothing is left in `out`.
    """
    checked_size(rank, energy)
    source = AdapterFolder(directory)
    dtypes = {path: shape["dtype"] for path, shape in source.shapes.items()}

    def cut(path: str) -> tuple[dict[str, Any], Any]:
        entry = source[path]
        if "A" not in entry:
            return entry, None
        A, B, r = entry["A"], entry["B"], entry["A"].shape[0]
        B1, A1, S = cut_to(B, A, lambda S: chosen_rank(S, rank, energy))
        q = B1.shape[1]
        if q < r:
            entry = stored(entry | {"A": A1, "B": B1}, dtypes[path])
        size = float(np.linalg.norm(S))
        error = distance(B, A, entry["B"], entry["A"], size) if q < r else 0.0
        return entry, {"rank_before": r, "rank": min(q, r), "shape": [len(B), A.shape[1]],
                       "norm": abs(entry["scale"]) * size,
                       "predicted_error": relative(float(eckart_young_errors(S)[q]) if q < r else 0.0, size),
                       "measured_error": relative(error, size)}

    with new_folder(out, [directory], force) as folder:
        facts = write_modules(folder, source.options, dtypes, cut, "resize", progress)
    return report(facts)


def compose(directories: Sequence[str | os.PathLike[str]], out: str | os.PathLike[str],
            weights: Sequence[float] | None = None, how: str = "cat", *, rank: int | None = None, force: bool = False,
            progress: bool = False) -> EditReport:
    """Write to `out` one adapter that does Σ wᵢ ΔWᵢ = Σ wᵢ sᵢ BᵢAᵢ of several. PEFT loads the result.

    how "cat": the factors side by side, an exact sum of rank Σr. "svd": that sum cut to `rank` (default: the largest rank
    among the adapters). weights: 1 each by default. A module that only some adapters have gets their sum alone. A module
    saved whole (a classifier) is copied, and may be in one adapter only, since there is no sum without the base.

    The report has for each module the ranks, measured_error (and, for "svd", the predicted_error of Eckart and Young), and
    linear_error: what the naive sum of the factors, PEFT's combination_type "linear", would have got wrong,
    ‖(Σ √cᵢ Bᵢ)(Σ √cᵢ Aᵢ) - Σ cᵢ BᵢAᵢ‖_F / ‖Σ cᵢ BᵢAᵢ‖_F with cᵢ = wᵢsᵢ: its cross terms BᵢAⱼ mean nothing. It is None where
    the ranks differ, so that this sum does not exist.

    Raises ValueError for other values, adapters that do not fit each other and an `out` that cannot be used; and as
    read_adapter does. Then nothing is left in `out`.
    """
    weights = [1.0] * len(directories) if weights is None else [float(w) for w in weights]
    if how not in ("cat", "svd"):
        raise ValueError(f'how = {how!r}, expected "cat" (exact, the ranks add up) or "svd" (cut to a rank)')
    if not directories or len(weights) != len(directories) or not all(map(math.isfinite, weights)):
        raise ValueError(f"got {len(directories)} adapters and weights {list(weights)}, expected one finite number for each "
                         "of one or more adapters")
    if rank is not None:
        if how == "cat":
            raise ValueError(f'rank = {rank} with how = "cat", whose rank is the sum of all: take how = "svd" to cut it')
        checked_size(rank, None)
    sources = [AdapterFolder(directory) for directory in directories]
    held = {path: [i for i, source in enumerate(sources) if path in source] for source in sources for path in source}
    for path, owners in held.items():
        _fit(path, [(str(sources[i].folder), sources[i].shapes[path]) for i in owners])
    if len({bool(source.options["fan_in_fan_out"]) for source in sources}) > 1:
        raise ValueError("fan_in_fan_out is true in some of the adapters and false in others: are they of one base?")
    dtypes = {path: widest(sources[i].shapes[path]["dtype"] for i in owners) for path, owners in held.items()}
    any_bias = any("lora_bias" in shape for source in sources for shape in source.shapes.values())

    def combine(path: str) -> tuple[dict[str, Any], Any]:
        entries = [sources[i][path] for i in held[path]]
        if "A" not in entries[0]:
            return entries[0], None
        scales = [weights[i] * entry["scale"] for i, entry in zip(held[path], entries)]
        return _combined(entries, scales, how, rank, dtypes[path], any_bias)

    with new_folder(out, directories, force) as folder:
        facts = write_modules(folder, sources[0].options | {"use_rslora": False}, dtypes, combine, "compose", progress)
    names = {source.options["base_model_name_or_path"] for source in sources} - {None}
    notes = [f"the adapters name different bases: {', '.join(sorted(map(str, names)))}"] if len(names) > 1 else []
    notes += [f"{path} is copied whole from {sources[owners[0]].folder}, its weight {weights[owners[0]]:g} does not apply"
              for path, owners in sorted(held.items()) if "A" not in sources[owners[0]].shapes[path]
              and weights[owners[0]] != 1.0]
    return report(facts, notes)


def _combined(entries: list[dict[str, Any]], scales: list[float], how: str, rank: int | None, dtype: str,
              any_bias: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """Σ cᵢ BᵢAᵢ as one module, and what it lost."""
    ranks = [len(e["A"]) for e in entries]
    A = np.concatenate([e["A"] for e in entries], dtype=np.float64)                                            # (Σr, in)
    B = np.concatenate([c * e["B"].astype(np.float64) for c, e in zip(scales, entries)], axis=1)               # (out, Σr)
    made: dict[str, Any] = {"A": A, "B": B, "scale": 1.0, "embedding": entries[0]["embedding"]}
    predicted = None
    if how == "svd":
        made["B"], made["A"], S = cut_to(B, A, lambda S: min(rank or max(ranks), len(S)))
        size = float(np.linalg.norm(S))
        predicted = relative(float(eckart_young_errors(S)[len(made["A"])]), size)
    else:
        size = norm(B, A)
        if scales[0] and len(set(scales)) == 1:            # one common c stays the scale: B is not rounded again
            made |= {"B": np.concatenate([e["B"] for e in entries], axis=1), "scale": scales[0]}
    if any_bias and not made["embedding"]:
        biases = [c * e["lora_bias"].astype(np.float64) for c, e in zip(scales, entries) if "lora_bias" in e]
        made["lora_bias"] = sum(biases, np.zeros(len(B))) / made["scale"]
    made = stored(made, dtype)
    B1, A1 = made["B"].astype(np.float64) * made["scale"], made["A"].astype(np.float64)
    same = np.array_equal(A1, A)                           # then the difference is in B alone, and nothing cancels
    return made, {
        "rank_before": "+".join(map(str, ranks)), "rank": len(A1), "shape": [len(B), A.shape[1]], "norm": size,
        "predicted_error": predicted,
        "measured_error": relative(norm(B1 - B, A) if same else distance(B, A, B1, A1, size), size),
        "linear_error": relative(_linear(entries, scales, B, A, size), size) if len(set(ranks)) == 1 else None}


def _linear(entries: list[dict[str, Any]], scales: list[float], B: np.ndarray, A: np.ndarray, size: float) -> float:
    """How far the sum of the factors, (Σ √cᵢ Bᵢ)(Σ √cᵢ Aᵢ), is from B@A. A negative c has its sign on A, as in PEFT."""
    roots = [math.sqrt(abs(c)) for c in scales]
    A2 = sum(math.copysign(s, c) * e["A"].astype(np.float64) for s, c, e in zip(roots, scales, entries))
    B2 = sum(s * e["B"].astype(np.float64) for s, e in zip(roots, entries))
    return distance(B, A, np.asarray(B2), np.asarray(A2), size)


def _fit(path: str, shapes: list[tuple[str, dict[str, Any]]]) -> None:
    """Raise ValueError unless the entries of one module in several adapters can be added."""
    (first, one), *others = shapes
    for folder, shape in others:
        if "A" not in one or "A" not in shape:
            raise ValueError(f"{path} is saved whole in {first if 'A' not in one else folder} and also in another adapter: "
                             "weights saved whole cannot be added without their base; leave one adapter out")
        sizes = [(len(s["B"]), s["A"].shape[1], s["embedding"]) for s in (one, shape)]
        if sizes[0] != sizes[1]:
            raise ValueError(f"{path} is {sizes[0][0]}×{sizes[0][1]} in {first} and {sizes[1][0]}×{sizes[1][1]} in {folder}: "
                             "expected adapters of one base")


def cut_to(B: np.ndarray, A: np.ndarray, rank_of: Callable[[np.ndarray], int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    # (d, r), (r, k) -> (d, q), (q, k), (min(d, r, k),)
    """Balanced factors of the best approximation of B@A of rank q = rank_of(S), and all singular values S. float64.

    With B = Q_b R_b, Aᵀ = Q_a R_a and R_b R_aᵀ = u Σ vᵀ, they are Q_b u √Σ = B R_aᵀ v / √Σ and √Σ vᵀ Q_aᵀ = uᵀ R_b A / √Σ. So
    neither Q is needed, which is half the work, unless a σ is so small that to divide by it would cost digits.
    """
    B, A = B.astype(np.float64), A.astype(np.float64)
    R_b, R_a = triangle(B), triangle(A.T)
    u, S, vh = np.linalg.svd(R_b @ R_a.T, full_matrices=False)
    q = rank_of(S)
    if not S[q - 1] > 1e-6 * S[0]:
        U, S, Vh = factored_svd(B, A)
        return *low_rank_factors(U[:, :q], S[:q], Vh[:q]), S
    root = np.sqrt(S[:q])
    return B @ (R_a.T @ vh[:q].T / root), (u[:, :q] / root).T @ R_b @ A, S


def triangle(X: np.ndarray) -> np.ndarray:  # (n, r) -> (min(n, r), r)
    """R of X = Q R, without Q. float64.

    For a tall X by Cholesky's factor of its Gram matrix, twice (Yamamoto et al. 2015, "CholeskyQR2"): XᵀX = R₁ᵀR₁, Y = X R₁⁻¹,
    YᵀY = R₂ᵀR₂, R = R₂R₁, all of it products, in a quarter of Householder's time. R₁ alone would be off by ε κ², κ = σ₁/σ_r of
    X; but Y is orthonormal up to that, so that R₂, near the identity, puts it right up to ε κ. Householder's way from κ = 1000.
    """
    n, r = X.shape
    if n >= 4 * r:
        with np.errstate(all="ignore"), suppress(np.linalg.LinAlgError):
            R = np.linalg.cholesky(X.T @ X).T
            inverse, size = np.linalg.inv(R), float(np.linalg.norm(R, 2))
            if size * np.linalg.norm(inverse, 2) < 1e3 and 1e-100 < size < 1e100:          # squares keep their digits
                Y = X @ inverse
                return np.linalg.cholesky(Y.T @ Y).T @ R
    return np.asarray(np.linalg.qr(X, mode="r"))


def checked_size(rank: int | None, energy: float | None) -> None:
    """Raise ValueError unless one of the two is given, and in range."""
    if (rank is None) == (energy is None):
        raise ValueError(f"got rank = {rank} and energy = {energy}, expected one of them: a rank, or the share of Σσ² to keep")
    if rank is not None and (not isinstance(rank, int) or isinstance(rank, bool) or rank < 1):
        raise ValueError(f"rank = {rank!r}, expected a whole number of at least 1")
    if energy is not None and not 0 < energy <= 1:
        raise ValueError(f"energy = {energy!r}, expected a share of Σσ² above 0 and up to 1, such as 0.95")


def chosen_rank(S: np.ndarray, rank: int | None, energy: float | None) -> int:
    """The rank asked for, of singular values S: at least 1, at most all of them."""
    return min(rank, len(S)) if rank is not None else max(1, energy_rank(S, energy or 1.0))


def report(facts: list[tuple[str, Any]], notes: Sequence[str] = ()) -> EditReport:
    """The facts of all modules as a report; errors of all together are ‖all errors‖ / ‖all updates‖."""
    rows = {path: said for path, said in facts if said is not None}
    size = math.sqrt(sum(row["norm"] ** 2 for row in rows.values()))
    total: dict[str, Any] = {"modules": len(rows), "copied": len(facts) - len(rows), "norm": size,
                             "parameters": sum(row["rank"] * sum(row["shape"]) for row in rows.values())}
    for key in ("predicted_error", "measured_error", "linear_error"):
        changed = [row for row in rows.values() if row["norm"]]
        if changed and all(row.get(key) is not None for row in changed):
            total[key] = relative(math.sqrt(sum((row[key] * row["norm"]) ** 2 for row in changed)), size)
    columns = {key: head for key, head in COLUMNS.items() if any(row.get(key) is not None for row in rows.values())}
    return EditReport(rows, total, list(notes), columns)
