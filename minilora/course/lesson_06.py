"""Lesson 06: can adapters be added like numbers? Sums, sums at a rank, merging, mixed batches, half precision."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..lora.peft_format import from_bf16
from ..pretrained.safetensors_file import to_bf16
from .exercise import Case, Exercise, Mistake

Pair = tuple[Any, Any]


def _two(rng: np.random.Generator, d: int, k: int, r1: int, r2: int) -> Case:
    """Two adapters of one layer, with their scales and their weights in the sum."""
    return {"B1": rng.standard_normal((d, r1)), "A1": rng.standard_normal((r1, k)), "s1": 2.0,
            "B2": rng.standard_normal((d, r2)), "A2": rng.standard_normal((r2, k)), "s2": 0.5, "w1": 0.7, "w2": 1.5}


def _dense(B1: Any, A1: Any, s1: float, B2: Any, A2: Any, s2: float, w1: float, w2: float) -> Any:
    """w₁ΔW₁ + w₂ΔW₂, entry by entry."""
    return np.einsum("ir,rj->ij", w1 * s1 * B1, A1) + np.einsum("ir,rj->ij", w2 * s2 * B2, A2)


# ---------------------------------------------------------------------------------------------------------- 06.1 exact sum

def _add_cases(rng: np.random.Generator) -> list[Case]:
    """Both of one rank, so that a sum of factors gives numbers too; other ranks come in the law."""
    return [_two(rng, *sizes) for sizes in [(9, 7, 2, 2), (5, 8, 1, 1), (7, 7, 3, 3)]]


def _added(**case: Any) -> Pair:
    """A as asked, and the only B that gives the dense sum with it, by least squares (A has full row rank)."""
    A = np.concatenate([case["A1"], case["A2"]])
    return np.linalg.lstsq(A.T, _dense(**case).T, rcond=None)[0].T, A


def _other_ranks(answer: Any, rng: np.random.Generator) -> str | None:
    case = _two(rng, 6, 9, 1, 3)
    B, A = answer(**case)
    return None if np.shape(A) == (4, 9) and np.allclose(B @ A, _dense(**case)) else "wrong where the two ranks differ"


def _scaled_a(B1: Any, A1: Any, s1: float, B2: Any, A2: Any, s2: float, w1: float, w2: float) -> Pair:
    return np.hstack([B1, B2]), np.vstack([w1 * s1 * A1, w2 * s2 * A2])


def _add_wrong(first: Any, second: Any, factors: bool = False) -> Any:
    """A wrong sum: other coefficients, or the factors added."""
    def answer(B1: Any, A1: Any, s1: float, B2: Any, A2: Any, s2: float, w1: float, w2: float) -> Pair:
        c1, c2 = first(s1, w1), second(s2, w2)
        if factors:
            return c1 * B1 + c2 * B2, A1 + A2
        return np.hstack([c1 * B1, c2 * B2]), np.vstack([A1, A2])
    return answer


def _both_factors(B1: Any, A1: Any, s1: float, B2: Any, A2: Any, s2: float, w1: float, w2: float) -> Pair:
    return np.hstack([w1 * s1 * B1, w2 * s2 * B2]), np.vstack([w1 * s1 * A1, w2 * s2 * A2])


def _roots(B1: Any, A1: Any, s1: float, B2: Any, A2: Any, s2: float, w1: float, w2: float) -> Pair:
    c1, c2 = (w1 * s1) ** 0.5, (w2 * s2) ** 0.5
    return np.hstack([c1 * B1, c2 * B2]), np.vstack([c1 * A1, c2 * A2])


def _turned(B1: Any, A1: Any, s1: float, B2: Any, A2: Any, s2: float, w1: float, w2: float) -> Pair:
    return np.hstack([w1 * s1 * B1, w2 * s2 * B2]), np.vstack([A2, A1])


def _second_first(B1: Any, A1: Any, s1: float, B2: Any, A2: Any, s2: float, w1: float, w2: float) -> Pair:
    return np.hstack([w2 * s2 * B2, w1 * s1 * B1]), np.vstack([A2, A1])


# ------------------------------------------------------------------------------------------------------ 06.2 sum at a rank

def _rank_cases(rng: np.random.Generator) -> list[Case]:
    return [_two(rng, *sizes) | {"q": q} for *sizes, q in [(12, 9, 3, 3, 3), (7, 10, 2, 1, 2), (8, 8, 4, 4, 1)]]


def _best(q: int, **case: Any) -> Pair:
    """By the eigenvectors of the sum's Gram matrix, and the error of what is left."""
    total = _dense(**case)
    E = np.linalg.eigh(total @ total.T)[1][:, -q:]
    best = E @ (E.T @ total)
    return best, float(np.linalg.norm(total - best)) / float(np.linalg.norm(total))


def _cut(M: np.ndarray, q: int) -> np.ndarray:
    U, S, Vh = np.linalg.svd(M, full_matrices=False)
    return np.asarray((U[:, :q] * S[:q]) @ Vh[:q])


def _rank_wrong(how: str) -> Any:
    """A wrong sum of rank q."""
    def answer(B1: Any, A1: Any, s1: float, B2: Any, A2: Any, s2: float, w1: float, w2: float, q: int) -> Pair:
        one, two = s1 * B1 @ A1, s2 * B2 @ A2
        total = one + two if how == "no weights" else w1 * one + w2 * two
        S = np.linalg.svd(total, compute_uv=False)
        best = _cut(total, q)
        if how == "each first":
            best = w1 * _cut(one, q) + w2 * _cut(two, q)
        if how == "all":
            return total, 0.0
        if how == "one more":
            best = _cut(total, q + 1)
        if how == "first columns":
            best = np.hstack([w1 * s1 * B1, w2 * s2 * B2])[:, :q] @ np.vstack([A1, A2])[:q]
        tail, size = float(S[q:] @ S[q:]), float(S @ S)
        error = {"absolute": tail**0.5, "squared": tail / size, "kept": (1 - tail / size) ** 0.5,
                 "next": float(S[q] / S[0]), "sum": float(S[q:].sum() / S.sum())}.get(how, (tail / size) ** 0.5)
        return best, error
    return answer


# -------------------------------------------------------------------------------------------------- 06.4 merge and unmerge

DRIFT = "the weight at the end is not W bit for bit: subtracting what was added leaves rounding errors; keep W instead"


def _serve_cases(rng: np.random.Generator) -> list[Case]:
    return [{"W": rng.standard_normal((d, k)), "updates": [(rng.standard_normal((d, r)), rng.standard_normal((r, k)), s)
                                                           for r, s in sizes]}
            for d, k, sizes in [(6, 4, [(2, 2.0), (1, 0.5), (3, 1.5)]), (3, 7, [(1, 3.0)]), (5, 5, [(2, 1.5), (2, 0.7)])]]


def _served(W: np.ndarray, updates: list[Any]) -> Pair:
    """The merged weights column by column, W(eⱼ) + s·B(A eⱼ), and W."""
    every = np.eye(W.shape[1])
    return np.stack([np.stack([W @ e + s * (B @ (A @ e)) for e in every], axis=1) for B, A, s in updates]), W


def _serve_wrong(how: str) -> Any:
    """A wrong way to serve one adapter after the other."""
    def answer(W: np.ndarray, updates: list[Any]) -> Pair:
        live, merged = W.copy(), []
        for B, A, s in updates:
            update = B @ A if how == "no s" else s * B @ A
            live = live + update
            merged.append(update if how == "update" else live)
            live = live if how == "stays" else live - (B @ A if how == "half" else update)
        return np.stack(merged), merged[-1] if how == "merged" else W.copy() if how in ("no s", "update") else live
    return answer


def _second_name(W: np.ndarray, updates: list[Any]) -> Pair:
    """Put back by a second name: `live = kept`, and the next += writes into what was kept."""
    live, kept, merged = W.copy(), W.copy(), []
    for B, A, s in updates:
        live += s * B @ A
        merged.append(live.copy())
        live = kept
    return np.stack(merged), live


def _bit_for_bit(answer: Any, rng: np.random.Generator) -> str | None:
    W = rng.standard_normal((9, 8))
    updates = [(rng.standard_normal((9, 2)) * 10.0**i, rng.standard_normal((2, 8)), 0.7) for i in range(4)]
    merged, last = answer(W.copy(), updates)
    if not np.array_equal(np.asarray(last), W):
        return DRIFT
    backwards = np.asarray(answer(W.copy(), updates[::-1])[0])[::-1]
    return None if np.array_equal(np.asarray(merged), backwards) else (
        "what is merged must not depend on which adapter was served before, not even in its last bit")


# --------------------------------------------------------------------------------------------------------- 06.3 mixed batch

def _mixed_cases(rng: np.random.Generator) -> list[Case]:
    cases = []
    for d, k, ranks, which in [(5, 7, (2, 3, 1), [2, 0, -1, 1, 0, 2]), (4, 3, (1, 2), [1, -1, 0, 1]), (6, 6, (2,), [0, -1])]:
        cases.append({"x": rng.standard_normal((len(which), k)), "W": rng.standard_normal((d, k)),
                      "Bs": [rng.standard_normal((d, r)) for r in ranks], "As": [rng.standard_normal((r, k)) for r in ranks],
                      "scales": [0.5 + r for r in ranks], "which": np.array(which)})
    return cases


def _mixed(x: Any, W: Any, Bs: Any, As: Any, scales: Any, which: Any) -> Any:
    """By merged weights, one for each row."""
    merged = [*(W + s * B @ A for B, A, s in zip(Bs, As, scales, strict=True)), W]       # -1 takes the last: W itself
    return np.einsum("ndk,nk->nd", np.stack([merged[i] for i in which]), x)


def _mixed_wrong(how: str) -> Any:
    """A wrong mixed batch."""
    def answer(x: Any, W: Any, Bs: Any, As: Any, scales: Any, which: Any) -> Any:
        y = x @ W.T
        for n, i in enumerate(which):
            if i < 0 and how != "last":
                continue
            i = int(which[0]) if how == "first" else int(i)
            s = 1.0 if how == "no s" else scales[i]
            y[n] = (0 if how == "no base" else y[n]) + s * Bs[i] @ (As[i] @ x[n])
            if how == "all":
                y[n] = x[n] @ W.T + sum(s * B @ (A @ x[n]) for B, A, s in zip(Bs, As, scales))
        return y
    return answer


def _mixed_all(x: Any, W: Any, Bs: Any, As: Any, scales: Any, which: Any) -> Any:
    return x @ W.T + sum(s * x @ A.T @ B.T for B, A, s in zip(Bs, As, scales, strict=True))


# -------------------------------------------------------------------------------------------------------- 06.5 half precision

def _smallest() -> tuple[float, float]:
    """By trying: powers of two from 1 downwards, rounded to nearest even by the library and by NumPy."""
    ways = (lambda x: float(from_bf16(to_bf16(np.array([x], np.float32)))[0]), lambda x: float(np.float16(x)))
    return tuple(min(2.0**-n for n in range(30) if way(1 + 2.0**-n) != 1) for way in ways)  # type: ignore[return-value]


EXERCISES: tuple[Exercise, ...] = (
    Exercise(
        "06.1", "add_adapters", "The exact sum of two adapters", 1, 8,
        hints=("A sum of two products is one product of longer factors: side by side for B, one above the other for A.",
               "Leave A1 and A2 as they are; each block of B takes its own weight and its own scale."),
        expected=_added, cases=_add_cases, outputs=("B", "A"), laws=(_other_ranks,),
        mistakes=(
            Mistake("B: each block needs its adapter's scale s as well as its weight",
                    _add_wrong(lambda s, w: w, lambda s, w: w)),
            Mistake("B: the weights w1 and w2 are missing", _add_wrong(lambda s, w: s, lambda s, w: s)),
            Mistake("adding the factors gives B1@A2 and B2@A1 too, which mean nothing; stack them",
                    _add_wrong(lambda s, w: w * s, lambda s, w: w * s, factors=True)),
            Mistake("both factors are scaled, so the product is scaled twice; leave A as it is", _both_factors),
            Mistake("the product is right, but scale B alone and leave A1 and A2 as they are", _roots),
            Mistake("A: the rows of A2 stand above those of A1, but B has its blocks the other way round", _turned),
            Mistake("the product is right, but A1's rows come first, then A2's; B's blocks likewise", _second_first),
            Mistake("the product is right, but leave A1 and A2 unchanged: weights and scales go into B", _scaled_a))),
    Exercise(
        "06.2", "sum_at_rank", "The best sum at rank q, and its error in advance", 2, 15,
        hints=("Form the sum (dense is fine here), take its SVD, keep q triplets.",
               "Eckart and Young: the squared error is the sum of the squares of the σ that are cut off.",
               "Relative: divide by the norm of the whole sum, √Σσ²."),
        expected=_best, cases=_rank_cases, outputs=("best", "error"), rtol=1e-6,
        mistakes=(
            Mistake("best: the weights w1 and w2 are missing", _rank_wrong("no weights")),
            Mistake("best: each was cut before adding; add first, then cut, else the rank is not q", _rank_wrong("each first")),
            Mistake("best: this is the whole sum; cut it to rank q", _rank_wrong("all")),
            Mistake("best: one triplet too many", _rank_wrong("one more")),
            Mistake("best: these are the first columns of the stacked factors; they are not sorted by importance",
                    _rank_wrong("first columns")),
            Mistake("error: divide by the norm of the whole sum", _rank_wrong("absolute")),
            Mistake("error: the root is missing", _rank_wrong("squared")),
            Mistake("error: this is the share that is kept", _rank_wrong("kept")),
            Mistake("error: this is the next σ alone, the spectral error; all that are cut count", _rank_wrong("next")),
            Mistake("error: Frobenius norms add squares, not the σ themselves", _rank_wrong("sum")))),
    Exercise(
        "06.3", "mixed_batch", "A batch in which each row has its own adapter", 2, 15,
        hints=("x @ W.T is the same product for all rows. Only the thin branch differs.",
               "For each adapter take its rows (which == i), and add s·(x Aᵀ)Bᵀ to these rows only.",
               "−1 means no adapter. What does Python make of As[-1]?"),
        expected=_mixed, cases=_mixed_cases,
        mistakes=(
            Mistake("−1 means the base alone, but as an index it takes the last adapter", _mixed_wrong("last")),
            Mistake("every row got the adapter of the first row", _mixed_wrong("first")),
            Mistake("each branch is s·B@A; the scales are missing", _mixed_wrong("no s")),
            Mistake("rows with an adapter lost the base's x @ W.T; the branch is added to it", _mixed_wrong("no base")),
            Mistake("rows with an adapter got the sum of all adapters", _mixed_wrong("all")),
            Mistake("every row got the sum of all adapters; add each one to its own rows only", _mixed_all))),
    Exercise(
        "06.4", "serve", "Merge, unmerge, and nothing is lost", 2, 12,
        hints=("(W + x) − x is not always W in floating point.",
               "What would you have to keep to get W back without any arithmetic?"),
        expected=_served, cases=_serve_cases, outputs=("merged", "last"), laws=(_bit_for_bit,),
        mistakes=(
            Mistake(DRIFT, _serve_wrong("")),
            Mistake("merged: the earlier adapters are still in the weight; unmerge before the next merge",
                    _serve_wrong("stays")),
            Mistake("merged: the update is s·B@A; its scale is missing", _serve_wrong("no s")),
            Mistake("merged: these are the updates alone; merged means W + s·B@A", _serve_wrong("update")),
            Mistake("last: the last adapter is still merged", _serve_wrong("merged")),
            Mistake("`live = kept` makes a second name, not a second array: the next += changes what you kept; put back a copy",
                    _second_name),
            Mistake("merged: s·B@A was added, and B@A without its scale taken away", _serve_wrong("half")))),
    Exercise(
        "06.5", "smallest", "The smallest step that survives", 1, 5,
        hints=("bf16 keeps 8 significant bits (7 behind the point), fp16 keeps 11 (10 behind it).",
               "Half a step is a tie, and a tie goes to the even neighbour. Which of the two is even?"),
        expected=_smallest, outputs=("bf16", "fp16"),
        mistakes=(
            Mistake("half a step is a tie, which goes to the even neighbour: here back to 1", (2.0**-8, 2.0**-11)),
            Mistake("bf16: half a step is a tie, which goes to the even neighbour: here back to 1", (2.0**-8, 2.0**-10)),
            Mistake("fp16: half a step is a tie, which goes to the even neighbour: here back to 1", (2.0**-7, 2.0**-11)),
            Mistake("below half a step nothing changes: 1 + x rounds back to 1", (2.0**-9, 2.0**-12)),
            Mistake("there is a smaller one: 8 significant bits are 1 before the point and 7 behind it", (2.0**-6, 2.0**-9)),
            Mistake("these are the exponents; give the numbers themselves", (-7, -10)),
            Mistake("these are the numbers for float32 and float64; count the bits of the half formats", (2.0**-23, 2.0**-52)),
            Mistake("both have 16 bits in all, but not all of them are for digits", (2.0**-15, 2.0**-15)),
            Mistake("fp16 has more digits than bf16, and bf16 more range", (2.0**-7, 2.0**-7)))),
)
