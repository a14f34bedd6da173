"""A LoRA out of a full fine-tune: the best low-rank approximation of W_tuned - W_base, a matrix at a time.

Here there are no factors to start from, so the matrix is formed. A large one whose first directions alone are wanted gets the
randomised SVD (Halko, Martinsson & Tropp 2011, arXiv:0909.4061): its product with a few random vectors already spans nearly
all that the first directions do, and a few further products make up for the rest.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from typing import Any

import numpy as np

from ..lora.config import matches
from ..nn.names import TABLES, TRANSPOSED
from ..rank.measures import eckart_young_errors
from .adapters import EditReport, relative, stored, write_modules
from .edit import checked_size, chosen_rank, report
from .tensors import Checkpoint, new_folder

LARGE, OVERSAMPLING, PASSES = 1000, 16, 3                  # when to take the randomised SVD, and how
NOT_LINEAR = re.compile(r"(wte|wpe|.*embed.*|.*lm_head|score|classifier|.*norm.*|.*decoder|pooler)")     # tables and heads
TASKS = {"ForCausalLM": "CAUSAL_LM", "LMHeadModel": "CAUSAL_LM", "ForSequenceClassification": "SEQ_CLS",
         "ForTokenClassification": "TOKEN_CLS"}


def extract(base: str | os.PathLike[str], tuned: str | os.PathLike[str], out: str | os.PathLike[str], *,
            rank: int | None = None, energy: float | None = None, target_modules: list[str] | str | None = None,
            force: bool = False, progress: bool = False) -> EditReport:
    """Write to `out` the LoRA that comes closest to the checkpoint `tuned` on top of the checkpoint `base`. PEFT loads it.

    rank: of every module; or energy: the least rank of each that keeps this share of Σσ² of its change. target_modules: names
    or path suffixes, or a regex for a whole path; by default every matrix that changed, tables and heads aside. s = 1 (alpha is
    the rank). The head of a tuned classifier is saved whole with the adapter, as PEFT does. force: replace an adapter in `out`.

    The report has for each module the rank, predicted_error √(Σ_{i>q} σ² / Σσ²) where all σ are known (None after a randomised
    SVD), measured_error ‖W_tuned - W_base - ΔW‖_F / ‖W_tuned - W_base‖_F of the factors as written, and method, "exact" or
    "randomised". Tensors that changed and are in no module are named in its notes: the LoRA does not have their change.

    Raises FileNotFoundError and ValueError for checkpoints that are damaged or do not fit each other, for targets that match
    nothing or did not change, for a rank or an energy out of range, and for an `out` that cannot be used. Then nothing is
    left in `out`.
    """
    checked_size(rank, energy)
    first, second = Checkpoint(base), Checkpoint(tuned)
    renamed = _common_names(first, second)
    kind = str(first.config().get("model_type"))
    turned = TRANSPOSED.get(kind, ())
    weights = {key.removesuffix(".weight"): key for key in renamed
               if key.endswith(".weight") and len(first.place(key).shape) == 2}
    chosen = {path: key for path, key in weights.items() if _wanted(path, target_modules)}
    if not chosen:
        raise ValueError(f"target_modules {target_modules!r} are not in {first.folder}: expected names of matrices such as "
                         f"{', '.join(sorted({path.rpartition('.')[2] for path in weights})[:8])}")
    changed = [key for key in renamed if not _equal(first, key, second, renamed[key])]
    chosen = {path: key for path, key in chosen.items() if key in changed}
    if not chosen:
        raise ValueError(f"no target differs between {first.folder} and {second.folder}: expected a fine-tuned checkpoint")
    prefix = _prefix(first, kind)
    names = {prefix(path): (path, key) for path, key in chosen.items()}

    made = second.config().get("architectures") or first.config().get("architectures") or ()
    task = next((task for end, task in TASKS.items() for name in made if name.endswith(end)), None)
    heads = {path for path in ("score", "classifier") if str(task).endswith("CLS") and f"{path}.weight" in second.files}

    def one(name: str) -> tuple[dict[str, Any], Any]:
        if name in heads:
            held = {leaf: f"{name}.{leaf}" for leaf in ("weight", "bias") if f"{name}.{leaf}" in second.files}
            return {leaf: second.array(key) for leaf, key in held.items()}, None
        path, key = names[name]
        change = second.array(renamed[key]) - first.array(key)                                    # float32 at least
        if path.rpartition(".")[2] in turned:
            change = change.T
        B, A, S, method = approximate(change, rank, energy)
        entry = stored({"A": A, "B": B, "scale": 1.0}, "F32")
        size = float(np.linalg.norm(change))
        change -= entry["B"] @ entry["A"]
        return entry, {"rank": len(A), "shape": list(change.shape), "norm": size, "method": method,
                       "predicted_error": None if S is None else float(eckart_young_errors(S, relative=True)[len(A)]),
                       "measured_error": relative(float(np.linalg.norm(change)), size)}

    config = first.config()
    options = {"task_type": task, "fan_in_fan_out": bool(turned),
               "base_model_name_or_path": config.get("_name_or_path") or str(first.folder)}
    with new_folder(out, [base, tuned], force) as folder:
        facts = write_modules(folder, options, dict.fromkeys([*names, *heads], "F32"), one, "extract", progress)
    left = sorted(key for key in set(changed) | first.files.keys() ^ second.files.keys()
                  if key not in chosen.values() and key.rpartition(".")[0] not in heads)
    notes = [f"changed and not in the LoRA: {', '.join(left[:6])}{f' and {len(left) - 6} more' if len(left) > 6 else ''}"]
    return report(facts, notes if left else [])


def approximate(D: np.ndarray, rank: int | None, energy: float | None, seed: int = 0,
                ) -> tuple[np.ndarray, np.ndarray, np.ndarray | None, str]:
    """(B, A, S, method): factors of the best approximation of D (d, k), and all singular values, or None if not computed.

    Randomised where min(d, k) ≥ 1000 and the rank, with its oversampling, is at most an eighth of it. For an energy the rank
    is doubled until it holds enough; what the found directions hold is a lower bound, so the promise is kept.
    """
    small, total = min(D.shape), float(np.linalg.norm(D)) ** 2
    q = rank or 32
    while small >= LARGE and q + OVERSAMPLING <= small // 8:
        U, S, Vh = randomised_svd(D, q, np.random.default_rng(seed))
        held = np.cumsum(S * S)
        if rank is None and energy is not None:
            enough = np.flatnonzero(held >= energy * total)
            if not len(enough):
                q *= 2
                continue
            q = int(enough[0]) + 1
        root = np.sqrt(S[:q])
        return U[:, :q] * root, root[:, None] * Vh[:q], None, "randomised"
    U, S, Vh = np.linalg.svd(D.astype(np.float64), full_matrices=False)
    q = chosen_rank(S, rank, energy)
    root = np.sqrt(S[:q])
    return U[:, :q] * root, root[:, None] * Vh[:q], S, "exact"


def randomised_svd(D: np.ndarray, q: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    # (d, k) -> (d, q), (q,), (q, k)
    """The first q singular triplets of D, nearly: of QQᵀD, Q an orthonormal basis of (DDᵀ)ᵖ D Ω with Ω (k, q + 16) normal.

    The basis is made orthonormal after each product, or the small directions would drown in rounding. With p = 3 the error is
    within 1 % of the best also for a slowly falling spectrum.
    """
    width = min(q + OVERSAMPLING, *D.shape)
    Y = D @ rng.standard_normal((D.shape[1], width)).astype(D.dtype)
    for _ in range(PASSES):
        Z = np.linalg.qr(D.T @ np.linalg.qr(Y)[0])[0]
        Y = D @ Z
    Q = np.linalg.qr(Y)[0]
    u, S, Vh = np.linalg.svd(Q.T @ D, full_matrices=False)
    return (Q @ u)[:, :q], S[:q], Vh[:q]


def _wanted(path: str, target_modules: list[str] | str | None) -> bool:
    if target_modules is None or target_modules == "all-linear":
        return not NOT_LINEAR.fullmatch(path.rpartition(".")[2])
    return matches(target_modules, (path,))


def _equal(first: Checkpoint, key: str, second: Checkpoint, other: str) -> bool:
    """Whether two tensors are the same, byte for byte or as numbers."""
    if first.place(key).dtype == second.place(other).dtype:
        return all(a == b for a, b in zip(first.files[key].chunks(key), second.files[other].chunks(other), strict=True))
    return np.array_equal(first.array(key), second.array(other))


def _common_names(first: Checkpoint, second: Checkpoint) -> dict[str, str]:
    """Tensor of the base -> the same tensor of the tuned checkpoint. A new head may be on one side only.

    Raises ValueError for matrices that only one of them has, and for shapes that differ.
    """
    lone = {key for key in first.files.keys() ^ second.files.keys() if not _table_or_head(key)}
    if lone:
        key = min(lone)
        has, lacks = (first, second) if key in first.files else (second, first)
        raise ValueError(f"{key} is in {has.folder} and not in {lacks.folder}: expected a checkpoint and its fine-tune, with "
                         "the same names")
    for key in first.files.keys() & second.files.keys():
        shapes = first.place(key).shape, second.place(key).shape
        if shapes[0] != shapes[1] and not _table_or_head(key):
            raise ValueError(f"{key} is {shapes[0]} in {first.folder} and {shapes[1]} in {second.folder}: expected a "
                             "checkpoint and its fine-tune")
    return {key: key for key in first.files if key in second.files and first.place(key).shape == second.place(key).shape}


def _table_or_head(key: str) -> bool:
    return bool(NOT_LINEAR.fullmatch(key.rpartition(".")[0].rpartition(".")[2]))


def _prefix(checkpoint: Checkpoint, kind: str) -> Callable[[str], str]:
    """Module path in the checkpoint -> in the model: a base saved without its head lacks the first part of every name."""
    root = TABLES[kind]["embed"].partition(".")[0] + "." if kind in TABLES else ""
    headed = any(name.endswith(tuple(TASKS)) for name in checkpoint.config().get("architectures") or ())
    bare = headed and not any(key.startswith(root) for key in checkpoint.files)
    return lambda path: f"{root}{path}" if bare else path
