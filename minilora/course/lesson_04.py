"""Lesson 04: how much rank does an update need, and how much has it used?

The oracles: dense SVDs of matrices that are really formed, matrices made with given singular values, the library's measures,
and for the choice of a rank its definition, tried rank by rank.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ..rank import effective_rank, stable_rank
from .exercise import Case, Exercise, Mistake
from .lesson_03 import peak_bytes

FORMED = "the numbers are right, but a matrix as large as ΔW was formed on the way: QR of B and of Aᵀ, SVD of the small core"


# -------------------------------------------------------------------------------------------------------- 04.1 the cut
def _svd(M: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return np.linalg.svd(M, full_matrices=False)


def _longest_pairs(B: np.ndarray, A: np.ndarray, q: int) -> tuple[np.ndarray, np.ndarray]:
    chosen = np.argsort(-np.linalg.norm(B, axis=0) * np.linalg.norm(A, axis=1))[:q]
    return B[:, chosen], A[chosen]


def _dense_cut(B: np.ndarray, A: np.ndarray, q: int) -> tuple[np.ndarray, np.ndarray]:
    U, S, Vh = _svd(B @ A)
    return U[:, :q] * S[:q], Vh[:q]


def _each_cut(B: np.ndarray, A: np.ndarray, q: int) -> tuple[np.ndarray, np.ndarray]:
    (Ub, Sb, Vb), (Ua, Sa, Va) = _svd(B), _svd(A)
    left, right = (Ub[:, :q] * Sb[:q]) @ Vb[:q], (Ua[:, :q] * Sa[:q]) @ Va[:q]
    return _dense_cut(left, right, q)


def _cut_of_B(B: np.ndarray, A: np.ndarray, q: int) -> tuple[np.ndarray, np.ndarray]:
    U, S, Vh = _svd(B)
    return U[:, :q] * S[:q], Vh[:q] @ A


def _last_cut(B: np.ndarray, A: np.ndarray, q: int) -> tuple[np.ndarray, np.ndarray]:
    U, S, Vh = _svd(B @ A)
    last = slice(len(A) - q, len(A))
    return U[:, last] * S[last], Vh[last]


def _parts(split: Callable[..., Any]) -> Callable[..., Any]:
    """The mistakes that are made after a right SVD."""
    return lambda B, A, q: split(*_svd(B @ A), q)


def _core(B: np.ndarray, A: np.ndarray, q: int) -> tuple[np.ndarray, np.ndarray]:
    (Qb, Rb), (Qa, Ra) = np.linalg.qr(B), np.linalg.qr(A.T)
    u, S, vh = _svd(Rb @ Ra)
    return (Qb @ u)[:, :q] * S[:q], (vh @ Qa.T)[:q]


CUTS = (
    Mistake("the first q rows of A are in no way the important ones; sort by singular values",
            lambda B, A, q: (B[:, :q], A[:q])),
    Mistake("the longest pairs b_i, a_i are not the singular directions: they are not orthogonal", _longest_pairs),
    Mistake("cutting B and A each for itself is not cutting their product", _each_cut),
    Mistake("these are the singular directions of B alone; A changes which of them matter in BA", _cut_of_B),
    Mistake("these are the singular directions of A alone; B changes which of them matter in BA",
            lambda B, A, q: tuple(m.T for m in reversed(_cut_of_B(A.T, B.T, q)))),
    Mistake("the singular values are lost: give them to one factor, or their square root to both",
            _parts(lambda U, S, Vh, q: (U[:, :q], Vh[:q]))),
    Mistake("the singular values came in twice: give them to one factor, or their square root to both",
            _parts(lambda U, S, Vh, q: (U[:, :q] * S[:q], S[:q, None] * Vh[:q]))),
    Mistake("a square root of the singular values went to one factor and nothing to the other",
            _parts(lambda U, S, Vh, q: (U[:, :q] * np.sqrt(S[:q]), Vh[:q]))),
    Mistake("singular values fall: keep the first q of them, not the last", _last_cut),
    Mistake("the core is R_b R_aᵀ: one of the two R is transposed", _core),
    Mistake("nothing was cut: keep q directions only", lambda B, A, q: (B.copy(), A.copy())),
    Mistake("one direction too many was kept", lambda B, A, q: _dense_cut(B, A, q + 1)),
    Mistake(FORMED, _dense_cut),
)


def _best_product(answer: Callable[..., Any], rng: np.random.Generator) -> str | None:
    """B'A' must be the dense SVD's best approximation; how it is split is free."""
    for d, k, r, q in ((9, 6, 4, 2), (5, 8, 3, 1), (7, 7, 5, 3)):
        B, A = rng.standard_normal((d, r)) * 2.0 ** -np.arange(r)[::-1], rng.standard_normal((r, k))
        given = B.copy(), A.copy()
        got = answer(B=given[0], A=given[1], q=q)
        if not (np.array_equal(B, given[0]) and np.array_equal(A, given[1])):
            return "it changed its inputs in place; return new arrays"
        if not (isinstance(got, tuple | list) and len(got) == 2):
            return f"expected two outputs (B', A'), got {type(got).__name__}"
        new_B, new_A = (np.asarray(m) for m in got)
        if np.isnan(new_A).any() or np.isnan(new_B).any():
            return "contains NaN"
        if np.float32 in (new_B.dtype, new_A.dtype):
            return "computed in float32, whose rounding hides small errors; keep the inputs' float64"
        right = np.matmul(*_dense_cut(B, A, q))
        if new_B.shape != (d, q) or new_A.shape != (q, k) or not _close(new_B @ new_A, right):
            for mistake in CUTS[:-1]:
                wrong = mistake.answer(B=B, A=A, q=q)
                if [m.shape for m in wrong] == [new_B.shape, new_A.shape] and _close(new_B @ new_A, np.matmul(*wrong)):
                    return mistake.hint
            if new_B.shape != (d, q) or new_A.shape != (q, k):
                return f"expected B' {(d, q)} and A' {(q, k)}, got {new_B.shape} and {new_A.shape}"
            times = np.linalg.norm(new_B @ new_A - B @ A) / np.linalg.norm(right - B @ A)
            return f"B'A' is {times:.3g} times as far from BA as the best of rank {q}"
    return None


def _close(a: np.ndarray, b: np.ndarray) -> bool:
    return a.shape == b.shape and bool(np.abs(a - b).max() <= 1e-9 * np.abs(b).max())


def _stays_thin(answer: Callable[..., Any], rng: np.random.Generator) -> str | None:
    d, k, r = 600, 500, 4
    B, A = rng.standard_normal((d, r)), rng.standard_normal((r, k))
    return FORMED if peak_bytes(lambda: answer(B=B, A=A, q=2)) > d * k * 8 / 2 else None


def _attempted(answer: Callable[..., Any], rng: np.random.Generator) -> str | None:
    got = answer(B=np.eye(3, 2), A=np.eye(2, 3), q=1)
    if got is None or got is ...:
        raise NotImplementedError
    return None


CUT_UPDATE = Exercise(
    id="04.1", name="cut_update", title="Cut an update to rank q, without forming it", difficulty=3, minutes=15,
    laws=(_attempted, _best_product, _stays_thin), mistakes=CUTS,
    hints=("QR: B = Q_b R_b and Aᵀ = Q_a R_a. Then BA = Q_b (R_b R_aᵀ) Q_aᵀ, and the middle is r × r.",
           "SVD of the middle, u S vᵀ: then Q_b u and vᵀ Q_aᵀ are the singular vectors of BA.",
           "Keep the first q columns, values and rows; give S to one of the two factors."))


# ------------------------------------------------------------------------------------------------------ 04.2 its error
def _spectra(rng: np.random.Generator) -> list[Case]:
    return [{"S": np.sort(rng.uniform(0.1, 3, m))[::-1].copy(), "q": q} for m, q in ((5, 2), (4, 1), (6, 4), (3, 0), (2, 1))]


def _measured_error(S: np.ndarray, q: int) -> float:
    """A matrix with these singular values is made, cut and compared."""
    rng = np.random.default_rng(0)
    U, V = (np.linalg.qr(rng.standard_normal((n, len(S))))[0] for n in (len(S) + 3, len(S) + 1))
    M = (U * S) @ V.T
    u, s, vh = np.linalg.svd(M, full_matrices=False)
    return float(np.linalg.norm(M - (u[:, :q] * s[:q]) @ vh[:q]) / np.linalg.norm(M))


CUT_ERROR = Exercise(
    id="04.2", name="cut_error", title="What will the cut cost?", difficulty=1, minutes=5,
    cases=_spectra, expected=_measured_error, scalars=lambda case: {},
    hints=("What is lost are the singular values after the q-th.",
           "‖M‖² is the sum of all σ². Lost part over all, then the root."),
    mistakes=(
        Mistake("the norm adds squares: σ², not σ", lambda S, q: S[q:].sum() / S.sum()),
        Mistake("this is the share of the squares; the error is its square root",
                lambda S, q: (S[q:] ** 2).sum() / (S**2).sum()),
        Mistake("this is the absolute error; divide by ‖ΔW‖", lambda S, q: np.sqrt((S[q:] ** 2).sum())),
        Mistake("this is what is kept, not what is lost", lambda S, q: np.sqrt((S[:q] ** 2).sum() / (S**2).sum())),
        Mistake("errors of this kind do not add up to 1 with what is kept: their squares do",
                lambda S, q: 1 - np.sqrt((S[:q] ** 2).sum() / (S**2).sum())),
        Mistake("this is the error in the spectral norm; the Frobenius norm adds all that is lost", lambda S, q: S[q] / S[0]),
        Mistake("one value too few is lost: S[0] is the first, so S[q] is lost too",
                lambda S, q: np.sqrt((S[q + 1 :] ** 2).sum() / (S**2).sum())),
        Mistake("one value too many is lost: the q-th, S[q-1], is kept",
                lambda S, q: np.sqrt((S[max(q - 1, 0) :] ** 2).sum() / (S**2).sum())),
        Mistake("compare with the whole update, not with the part that is kept",
                lambda S, q: np.sqrt((S[q:] ** 2).sum() / (S[:q] ** 2).sum())),
        Mistake("the share of values that are lost says nothing of their sizes", lambda S, q: (len(S) - q) / len(S)),
        Mistake("square first, then add", lambda S, q: S[q:].sum() / np.sqrt((S**2).sum())),
    ))


# -------------------------------------------------------------------------------------------------- 04.3 two soft ranks
def _shares(S: np.ndarray, power: int = 1) -> np.ndarray:
    p = S[S > 0] ** power
    return p / p.sum()


def _entropy(p: np.ndarray) -> float:
    return float(-(p * np.log(p)).sum())


def _soft(effective: Callable[[np.ndarray], float], stable: Callable[[np.ndarray], float]) -> Callable[..., Any]:
    return lambda S: (float(effective(S)), float(stable(S)))


SOFT_RANKS = Exercise(
    id="04.3", name="soft_ranks", title="Two soft ranks", difficulty=2, minutes=8,
    cases=lambda rng: [{"S": S} for S in (np.sort(rng.uniform(0.1, 3, 5))[::-1].copy(), np.array([1.0, 0.5, 0.1, 0.01]),
                                          np.array([7.0, 2.0, 0.0]), np.full(4, 0.5), np.array([3.0]))],
    expected=lambda S: (effective_rank(S), stable_rank(S)), outputs=("effective", "stable"), scalars=lambda case: {},
    hints=("p = σ/Σσ are shares that add up to 1. Their entropy is −Σ p ln p.",
           "A zero share adds nothing: leave zeros out before ln.",
           "effective = exp(entropy); stable = Σσ² / σ₁²."),
    mistakes=(
        Mistake("effective: this is the entropy; its exponential counts directions",
                _soft(lambda S: _entropy(_shares(S)), stable_rank)),
        Mistake("effective: shares of σ, not of σ²", _soft(lambda S: np.exp(_entropy(_shares(S, 2))), stable_rank)),
        Mistake("effective: the logarithm and the exponential have different bases",
                _soft(lambda S: 2 ** _entropy(_shares(S)), stable_rank)),
        Mistake("effective: the logarithm has base 2, the exponential base e",
                _soft(lambda S: np.exp(_entropy(_shares(S)) / np.log(2)), stable_rank)),
        Mistake("effective: divide by the sum, so that the shares add up to 1",
                _soft(lambda S: np.exp(-(S[S > 0] * np.log(S[S > 0])).sum()), stable_rank)),
        Mistake("effective: the sign of the entropy is wrong", _soft(lambda S: np.exp(-_entropy(_shares(S))), stable_rank)),
        Mistake("effective: counting what is not zero is the rank; a tiny value counts in full",
                _soft(lambda S: (S > 0).sum(), stable_rank)),
        Mistake("stable: squares are missing; this is Σσ / σ₁", _soft(effective_rank, lambda S: S.sum() / S.max())),
        Mistake("stable: compare squares with a square: σ₁²", _soft(effective_rank, lambda S: (S**2).sum() / S.max())),
        Mistake("stable: this is the other way round", _soft(effective_rank, lambda S: S.max() ** 2 / (S**2).sum())),
        Mistake("stable: this is its square root, ‖ΔW‖_F / ‖ΔW‖₂",
                _soft(effective_rank, lambda S: np.sqrt((S**2).sum()) / S.max())),
        Mistake("stable: this is the participation ratio; the stable rank compares with the first value alone",
                _soft(effective_rank, lambda S: (S**2).sum() ** 2 / (S**4).sum())),
        Mistake("stable: square each value before you add", _soft(effective_rank, lambda S: S.sum() ** 2 / S.max() ** 2)),
        Mistake("return effective first, then stable", _soft(stable_rank, effective_rank)),
    ))


# --------------------------------------------------------------------------------------------------- 04.4 the decision
def _tables(rng: np.random.Generator) -> list[Case]:
    tables: list[tuple[dict[int, tuple[float, ...]], float]] = [
        ({1: (2.50, 2.54), 2: (2.40, 2.36), 4: (2.21, 2.29), 8: (2.20, 2.22), 16: (2.12, 2.24)}, 0.05),
        ({1: (2.03, 2.11), 4: (2.00, 2.05), 16: (2.03, 2.01)}, 0.04),
        ({2: (1.60, 1.80), 8: (1.69, 1.66), 32: (1.71, 1.60)}, 0.03),
        ({1: (2.50, 2.50), 4: (2.20, 2.22), 8: (2.18, 2.18), 16: (2.19, 2.21)}, 0.05),
        ({2: (1.30, 1.00), 4: (1.12, 1.20)}, 0.02), ({2: (1.00, 1.30), 4: (1.12, 1.20)}, 0.02),
        ({4: (3.1, 3.0), 8: (3.3, 3.4), 64: (3.2, 3.2)}, 0.01),
        ({1: (0.55, 0.53, 0.54), 2: (0.51, 0.55, 0.56), 8: (0.50, 0.52, 0.51)}, 0.02),
        ({2: (1.040, 1.041), 4: (1.021, 1.020), 8: (1.000, 1.001)}, 0.03),
        ({1: (2.11, 2.09), 4: (2.01, 1.99), 16: (2.05, 2.07)}, 0.05)]
    cases = []
    for table, tolerance in tables:
        rows = [{"rank": r, "seed": i, "loss": loss} for r, losses in table.items() for i, loss in enumerate(losses)]
        cases.append({"rows": [rows[i] for i in rng.permutation(len(rows))], "tolerance": tolerance})
    return cases


def _by_rank(rows: list[dict[str, Any]], of: Callable[[list[float]], float] = np.mean) -> dict[int, float]:
    return {r: float(of([row["loss"] for row in rows if row["rank"] == r])) for r in sorted({row["rank"] for row in rows})}


def _tried_in_turn(rows: list[dict[str, Any]], tolerance: float) -> int:
    table = _by_rank(rows)
    return next(r for r in table if all(table[r] - other <= tolerance for other in table.values()))


def _ship(of: Callable[[list[float]], float], limit: Callable[[dict[int, float], float], float], choose: Any = min) -> Any:
    def answer(rows: list[dict[str, Any]], tolerance: float) -> int:
        table = _by_rank(rows, of)
        return int(choose(r for r, loss in table.items() if loss <= limit(table, tolerance)))
    return answer


def _far_below(rows: list[dict[str, Any]], tolerance: float) -> int:
    table = _by_rank(rows)
    return min((r for r, loss in table.items() if loss <= min(table.values()) - tolerance), default=0)


def _first_small_step(rows: list[dict[str, Any]], tolerance: float) -> int:
    ranks, means = list(_by_rank(rows)), [*_by_rank(rows).values(), np.inf]
    return next(r for r, now, after in zip(ranks, means, means[1:]) if now - after <= tolerance)


def _first_met(rows: list[dict[str, Any]], tolerance: float) -> int:
    table = _by_rank(rows)
    return next(row["rank"] for row in rows if table[row["rank"]] <= _within(table, tolerance))


def _last_row_of_each(rows: list[dict[str, Any]], tolerance: float) -> int:
    table = {row["rank"]: row["loss"] for row in rows}
    return min(r for r, loss in table.items() if loss <= _within(table, tolerance))


def _within(table: dict[int, float], tolerance: float) -> float:
    return min(table.values()) + tolerance


RANK_TO_SHIP = Exercise(
    id="04.4", name="rank_to_ship", title="Which rank would you ship?", difficulty=2, minutes=10,
    cases=_tables, expected=_tried_in_turn, scalars=lambda case: {},
    hints=("First the mean loss of every rank: a dictionary rank → mean.",
           "Which means are at most the best mean plus the tolerance?",
           "Of those ranks, the smallest."),
    mistakes=(
        Mistake("this is the best rank; a smaller one within the tolerance is as good and cheaper",
                lambda rows, tolerance: min(_by_rank(rows), key=_by_rank(rows).__getitem__)),
        Mistake("this is the largest rank within the tolerance; the smallest was asked", _ship(np.mean, _within, max)),
        Mistake("this compares the luckiest seeds; compare the means over seeds", _ship(min, _within)),
        Mistake("this compares the unluckiest seeds; compare the means over seeds", _ship(max, _within)),
        Mistake("this uses the first seed only", lambda rows, tolerance: _ship(np.mean, _within)(
            [row for row in rows if row["seed"] == 0], tolerance)),
        Mistake("the rank of the best single run: one lucky seed decides",
                lambda rows, tolerance: min(rows, key=lambda row: row["loss"])["rank"]),
        Mistake("the tolerance is absolute, in nats; here it is taken relative to the best loss",
                _ship(np.mean, lambda table, tolerance: min(table.values()) * (1 + tolerance))),
        Mistake("the smallest rank that was tried need not be within the tolerance",
                lambda rows, tolerance: min(row["rank"] for row in rows)),
        Mistake("the largest rank need not be the best, and a smaller one may do",
                lambda rows, tolerance: max(row["rank"] for row in rows)),
        Mistake("compare with the best mean, which need not be that of the largest rank",
                _ship(np.mean, lambda table, tolerance: table[max(table)] + tolerance)),
        Mistake("the rows come in any order: look at the ranks from small to large", _first_met),
        Mistake("one row of each rank was used: a rank has one row for each seed", _last_row_of_each),
        Mistake("this is a loss; the answer is a rank", lambda rows, tolerance: min(_by_rank(rows).values())),
        Mistake("the tolerance is subtracted: nothing but the best is left", _far_below),
        Mistake("compare each rank with the best of all, not with the next one", _first_small_step),
    ))

EXERCISES: tuple[Exercise, ...] = (CUT_UPDATE, CUT_ERROR, SOFT_RANKS, RANK_TO_SHIP)
