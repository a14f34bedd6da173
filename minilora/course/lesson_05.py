"""Lesson 05: what does ΔW contain that W did not? Similarity, amplification, intruders."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..rank import Update, alignment, intruder_correction, intruder_count
from .exercise import Case, Exercise, Mistake

Pair = tuple[Any, Any]


def _right(A: np.ndarray, i: int) -> np.ndarray:                     # (r, k) -> (i, k), the first right singular vectors
    return np.linalg.svd(A, full_matrices=False)[2][:i]


# ---------------------------------------------------------------------------------------------------------- 05.1 similarity

def _similarity_cases(rng: np.random.Generator) -> list[Case]:
    sizes = [(4, 16, 64, 1, 8), (5, 3, 17, 4, 2), (2, 6, 9, 2, 6), (1, 1, 5, 1, 1), (6, 6, 23, 3, 3)]
    return [{"A1": rng.standard_normal((r1, k)), "A2": rng.standard_normal((r2, k)), "i": i, "j": j}
            for r1, r2, k, i, j in sizes]


def _projector(A: np.ndarray, i: int) -> np.ndarray:                 # (r, k) -> (k, k), onto its i strongest input directions
    E = np.linalg.eigh(A.T @ A)[1][:, -i:]
    return np.asarray(E @ E.T)


def _similarity(A1: np.ndarray, A2: np.ndarray, i: int, j: int) -> Pair:
    """By projectors: φ = tr(P₁P₂) / min(i, j), and the mean of tr(P₁P₂) over all rotations is i·j/k."""
    pairs = np.linalg.matrix_rank(_projector(A1, i)) * np.linalg.matrix_rank(_projector(A2, j))
    return (float((_projector(A1, i) * _projector(A2, j)).sum()) / min(i, j), float(pairs) / A1.shape[1] / min(i, j))


def _similarity_wrong(size: Any = min, power: int = 2, chance: Any = max, vectors: Any = _right) -> Any:
    """A wrong φ: another divisor, another power, another chance or other vectors."""
    def answer(A1: np.ndarray, A2: np.ndarray, i: int, j: int) -> Pair:
        C = vectors(A1, i) @ vectors(A2, j).T
        return float((np.abs(C) ** power).sum()) / size(i, j), chance(i, j) / A1.shape[1]
    return answer


def _spectral(A1: np.ndarray, A2: np.ndarray, i: int, j: int) -> Pair:
    return float(np.linalg.norm(_right(A1, i) @ _right(A2, j).T, 2) ** 2) / min(i, j), max(i, j) / A1.shape[1]


def _norm_not_squared(A1: np.ndarray, A2: np.ndarray, i: int, j: int) -> Pair:
    return float(np.linalg.norm(_right(A1, i) @ _right(A2, j).T)) / min(i, j), max(i, j) / A1.shape[1]


def _misprint(A1: np.ndarray, A2: np.ndarray, i: int, j: int) -> Pair:
    d2 = min(i, j) - float(((_right(A1, i) @ _right(A2, j).T) ** 2).sum())
    return (1 - d2) / min(i, j), max(i, j) / A1.shape[1]


def _first_rows(A: np.ndarray, i: int) -> np.ndarray:
    return A[:i] / np.linalg.norm(A[:i], axis=1, keepdims=True)


def _same_is_one(answer: Any, rng: np.random.Generator) -> str | None:
    A, Q = rng.standard_normal((3, 7)), np.linalg.qr(rng.standard_normal((3, 3)))[0]
    if not abs(float(answer(A.copy(), A.copy(), 2, 3)[0]) - 1) < 1e-7:
        return "phi of a subspace and a larger one that contains it must be 1"
    if not abs(float(answer(A.copy(), Q @ A, 2, 2)[0]) - 1) < 1e-7:
        return "phi must not change when A is replaced by Q A with an orthogonal Q: the singular directions are the same"
    return None


# ------------------------------------------------------------------------------------------------------- 05.2 amplification

def _amplify_cases(rng: np.random.Generator) -> list[Case]:
    return [{"W": rng.standard_normal((d, k)), "B": rng.standard_normal((d, r)), "A": rng.standard_normal((r, k)), "s": s}
            for d, k, r, s in [(12, 7, 2, 3.0), (5, 9, 1, 0.5), (8, 8, 3, 2.0)]]


def _amplify(W: np.ndarray, B: np.ndarray, A: np.ndarray, s: float) -> Pair:
    """By pseudo-inverses: U Uᵀ = B B⁺ and V Vᵀ = A⁺ A, and a product with orthonormal columns keeps the norm."""
    within = float(np.linalg.norm((B @ np.linalg.pinv(B)) @ W @ (np.linalg.pinv(A) @ A)))
    return within, float(np.sqrt(np.einsum("ir,rj->ij", s * B, A).reshape(-1) @ (s * B @ A).reshape(-1))) / within


def _thin(B: np.ndarray, A: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    r = len(A)
    U, S, Vh = np.linalg.svd(B @ A)
    return U[:, :r], S[:r], Vh[:r]


def _amplify_wrong(how: str) -> Any:
    """A wrong row of Table 7, named by what went wrong."""
    def answer(W: np.ndarray, B: np.ndarray, A: np.ndarray, s: float) -> Pair:
        U, S, Vh = _thin(B, A)
        core = U.T @ W @ Vh.T
        within, size = float(np.linalg.norm(core)), s * float(np.linalg.norm(S))
        if how == "of W":
            U, S, Vh = np.linalg.svd(W)
            within = float(np.linalg.norm(S[: len(A)]))
        if how == "spectral":
            within, size = float(np.linalg.norm(core, 2)), s * float(S[0])
        if how == "factors":
            within = float(np.linalg.norm(B.T @ W @ A.T))
        if how == "all":
            within = float(np.linalg.norm(W))
        if how == "columns":
            within = float(np.linalg.norm(U.T @ W @ np.linalg.svd(s * B @ A)[2][:, : len(A)]))
        if how == "spectral projection":
            within = float(np.linalg.norm(core, 2))
        if how == "itself":
            within = size
        if how == "first":
            within = float(abs(core[0, 0]))
        if how == "tuned":
            within = float(np.linalg.norm(U.T @ (W + s * B @ A) @ Vh.T))
        if how == "trace":
            within = abs(float(np.trace(core)))
        if how == "one side":
            within = float(np.linalg.norm(U.T @ W))
        other = {"no s": size / s / within, "whole": size / float(np.linalg.norm(W)), "inverse": within / size,
                 "W above": float(np.linalg.norm(W)) / within}
        return within, other.get(how, size / within)
    return answer


# ------------------------------------------------------------------------------------- 05.3 intruders, 05.4 softening them

def _planted(rng: np.random.Generator, d: int, k: int, spikes: tuple[float, ...], bend: float) -> Case:
    """W with falling singular values, and an update of rank len(spikes) + 1 whose first directions are σ₁ times the spikes.

    A spike's output direction is new to W, spread over its singular vectors; the last direction of the update is W's own second
    one, strengthened by bend, which is no intruder. d ≤ k, so that the full and the reduced SVD have the same U.
    """
    m = min(d, k)
    U, V = np.linalg.qr(rng.standard_normal((d, d)))[0], np.linalg.qr(rng.standard_normal((k, k)))[0]
    S = 2.0 * 0.8 ** np.arange(m)
    W = (U[:, :m] * S) @ V[:, :m].T
    signs = np.linalg.qr(rng.standard_normal((d, d)))[0][:, : len(spikes)]
    inputs = np.linalg.qr(rng.standard_normal((k, k)))[0][:, : len(spikes)]
    B = np.concatenate([signs * (2.0 * np.array(spikes)), bend * U[:, 1:2]], axis=1)
    A = np.concatenate([inputs.T, V[:, 1:2].T])
    return {"W": W, "B": B / 0.5, "A": A, "s": 0.5, "epsilon": 0.6, "top": 6}


def _well_apart(case: Case) -> bool:
    """Whether no cosine is near the threshold, no two singular values of W + ΔW are near each other, and further down than
    `top` there are vectors that a wrong answer takes for intruders.
    """
    tuned = case["W"] + case["s"] * case["B"] @ case["A"]
    U, S, _ = np.linalg.svd(tuned)
    top, epsilon = case["top"], case["epsilon"]
    best = np.abs(U.T @ np.linalg.svd(case["W"], full_matrices=False)[0]).max(axis=1)
    gaps, found = -np.diff(S[: top + 1]), best < epsilon
    return bool((abs(best[:top] - epsilon) > 0.01).all() and gaps.min() > 0.01 and found[:top].any() and found[top:].any())


def _intruder_cases(rng: np.random.Generator) -> list[Case]:
    cases: list[Case] = []
    for d, k, spikes, bend in [(24, 40, (3.0, 1.6), 1.0), (30, 30, (2.0,), 0.5), (24, 36, (2.5, 1.5), 0.7)]:
        found = (_planted(rng, d, k, spikes, bend) for _ in range(1000))
        cases.append(next(case for case in found if _well_apart(case)))
    return cases


def _intruders(W: np.ndarray, B: np.ndarray, A: np.ndarray, s: float, epsilon: float, top: int) -> Pair:
    """The library's way, by the eigenvectors of Gram matrices."""
    cosines = alignment(Update(A, B, s), W, top)["cosines"]
    return np.array(cosines), intruder_count(cosines, epsilon)


def _cosines(how: str = "") -> Any:
    """A wrong list of largest cosines, or a wrong count of them."""
    def answer(W: np.ndarray, B: np.ndarray, A: np.ndarray, s: float, epsilon: float, top: int) -> Pair:
        update = B @ A if how == "no s" else s * B @ A
        X, _, Xh = np.linalg.svd(W, full_matrices=False)
        Y, _, Yh = np.linalg.svd(update if how == "of the update" else W + update, full_matrices=False)
        C = Yh[:top] @ Xh.T if how == "input" else Y[:, :top].T @ X
        C = C[:, :top] if how == "top only" else C
        C = Y[:top] @ X.T if how == "rows" else C
        if how == "input, full":
            C = np.linalg.svd(W + update)[2][:top] @ np.linalg.svd(W)[2].T
        best = {"signed": C.max(axis=1), "in place": np.abs(np.diag(C[:, :top])), "length": np.linalg.norm(C, axis=1),
                "other way": np.abs(Y.T @ X[:, :top]).max(axis=0)}.get(how, np.abs(C).max(axis=1))
        return best, int((best >= epsilon).sum() if how == "above" else (best < epsilon).sum())
    return answer


def _soften_cases(rng: np.random.Generator) -> list[Case]:
    return [case | {"factor": factor} for case, factor in zip(_intruder_cases(rng), (0.7, 0.0, 0.3))]


def _soften(W: np.ndarray, B: np.ndarray, A: np.ndarray, s: float, epsilon: float, top: int, factor: float) -> np.ndarray:
    """The library's correction, by Gram matrices, added as a second update."""
    own = Update(A, B, s)
    more = intruder_correction(own, W, factor, epsilon, top)[0]
    total = own if more is None else own + more
    return np.asarray(total.scale * total.B @ total.A)


def _soften_wrong(how: str) -> Any:
    """A wrong softened update."""
    def answer(W: np.ndarray, B: np.ndarray, A: np.ndarray, s: float, epsilon: float, top: int, factor: float) -> Any:
        update = s * B @ A
        X = np.linalg.svd(W, full_matrices=False)[0]
        U, S, Vh = np.linalg.svd(update if how == "of the update" else W + update, full_matrices=False)
        found = (np.abs(U.T @ X).max(axis=1) < epsilon) & (np.arange(len(S)) < (len(S) if how == "all" else top))
        found = ~found & (np.arange(len(S)) < top) if how == "the others" else ~found if how == "all others" else found
        part = (U[:, found] * S[found]) @ Vh[found]
        if how == "whole":
            return factor * update
        if how == "only":
            return factor * part
        if how == "change":
            return (factor - 1) * part
        taken = {"factor": factor, "removed": 1.0, "added": -factor, "nothing": 0.0}.get(how, 1 - factor)
        return update - taken * part + (W if how == "W too" else 0)
    return answer


EXERCISES: tuple[Exercise, ...] = (
    Exercise(
        "05.1", "similarity", "φ and what chance gives", 2, 15,
        hints=("The directions of A are the rows of Vh in its SVD, strongest first: take i of one and j of the other.",
               "All i·j cosines at once are one product of two thin matrices. φ needs their squares.",
               "One random unit vector and one fixed one have a mean squared cosine of 1/k. How many pairs are summed?"),
        expected=_similarity, cases=_similarity_cases, outputs=("phi", "chance"), laws=(_same_is_one,),
        mistakes=(
            Mistake("phi: divide by the size of the smaller subspace; it can then reach 1", _similarity_wrong(size=max)),
            Mistake("phi: i·j is the number of pairs, but orthonormal vectors cannot all be alike; the most that the sum can "
                    "be is smaller", _similarity_wrong(size=lambda i, j: i * j)),
            Mistake("phi: the cosines are summed without being squared", _similarity_wrong(power=1)),
            Mistake("phi: this is the norm of the cosines; its square is meant", _norm_not_squared),
            Mistake("phi: these are rows of A, not its singular directions: they are neither orthogonal nor sorted",
                    _similarity_wrong(vectors=_first_rows)),
            Mistake("phi: this is the formula as the paper prints it, (1 − d²)/p; it is negative for d² > 1: φ = 1 − d²/p",
                    _misprint),
            Mistake("phi: these are rows of A, not its singular directions: neither of length 1 nor orthogonal nor sorted",
                    _similarity_wrong(vectors=lambda A, i: A[:i])),
            Mistake("phi: the directions are the rows of Vh, not its columns",
                    _similarity_wrong(vectors=lambda A, i: np.linalg.svd(A)[2][:, :i].T)),
            Mistake("phi: the strongest directions come first; these are the last ones",
                    _similarity_wrong(vectors=lambda A, i: _right(A, len(A))[-i:])),
            Mistake("phi: the spectral norm sees one pair of directions alone; take the Frobenius norm", _spectral),
            Mistake("chance: random directions are not orthogonal: the mean of a square is not zero",
                    _similarity_wrong(chance=lambda i, j: 0)),
            Mistake("chance: 1/k is the mean for one pair; φ sums i·j pairs and divides by min(i, j)",
                    _similarity_wrong(chance=lambda i, j: 1)),
            Mistake("chance: the larger subspace decides: it is the one that may catch the other",
                    _similarity_wrong(chance=min)),
            Mistake("chance: i·j/k is the mean of the sum of squares; divide it as you divide φ",
                    _similarity_wrong(chance=lambda i, j: i * j)))),
    Exercise(
        "05.2", "amplify", "One row of the paper's Table 7", 2, 12,
        hints=("The directions of ΔW are those of its SVD; only r of them mean anything.",
               "UᵀWVᵀ is an r×r matrix: what W does from ΔW's input directions to ΔW's output directions.",
               "‖·‖ is the Frobenius norm, and the factor compares ‖ΔW‖ (with its scale s) with that projection."),
        expected=_amplify, cases=_amplify_cases, outputs=("projection", "factor"),
        mistakes=(
            Mistake("factor: the update is s·B@A; its scale is missing", _amplify_wrong("no s")),
            Mistake("factor: this compares ‖ΔW‖ with all of W; compare with what W does in ΔW's directions",
                    _amplify_wrong("whole")),
            Mistake("factor: upside down", _amplify_wrong("inverse")),
            Mistake("factor: this is ‖W‖ over the projection; the update belongs above the line", _amplify_wrong("W above")),
            Mistake("projection: after the r-th, ΔW's singular values are zero and their directions mean nothing; keep r",
                    _amplify_wrong("all")),
            Mistake("projection: the input directions are the rows of Vh, not its columns", _amplify_wrong("columns")),
            Mistake("projection: this is the norm of ΔW in its own directions; put W between them", _amplify_wrong("itself")),
            Mistake("projection: this is the first direction alone; take all r", _amplify_wrong("first")),
            Mistake("projection: W alone is asked for, before the update", _amplify_wrong("tuned")),
            Mistake("projection: this is the largest singular value of UᵀWVᵀ; the Frobenius norm adds all entries",
                    _amplify_wrong("spectral projection")),
            Mistake("projection: these are W's own top directions; take those of ΔW", _amplify_wrong("of W")),
            Mistake("projection: this is the spectral norm; the paper's table has Frobenius norms", _amplify_wrong("spectral")),
            Mistake("projection: B and A are not orthonormal; take the singular vectors of their product",
                    _amplify_wrong("factors")),
            Mistake("projection: the diagonal alone is not the norm of the r×r matrix", _amplify_wrong("trace")),
            Mistake("projection: U alone keeps all inputs of W; project both sides", _amplify_wrong("one side")))),
    Exercise(
        "05.3", "intruders", "Count the intruder dimensions", 2, 15,
        hints=("Two SVDs: of W and of W + ΔW. The left singular vectors are the columns of U.",
               "For each of the first `top` vectors of W + ΔW, the largest |cos| with any vector of W.",),
        expected=_intruders, cases=_intruder_cases, outputs=("cosines", "count"), rtol=1e-6,
        mistakes=(
            Mistake("cosines: a singular vector has no sign; take absolute values", _cosines("signed")),
            Mistake("cosines: compare with all of W's singular vectors, not with its first ones alone", _cosines("top only")),
            Mistake("cosines: these are input directions (Vh); the definition is on output directions, the columns of U",
                    _cosines("input")),
            Mistake("cosines: these are input directions (Vh); the definition is on output directions, the columns of U",
                    _cosines("input, full")),
            Mistake("cosines: place by place is too strict, since order changes; take the largest over W's vectors",
                    _cosines("in place")),
            Mistake("cosines: this is how much of the vector lies in W's whole column space; take the largest single cosine",
                    _cosines("length")),
            Mistake("cosines: the other way round; ask for each vector of W + ΔW whether W has one like it",
                    _cosines("other way")),
            Mistake("cosines: these are the vectors of ΔW; intruders are vectors of W + ΔW", _cosines("of the update")),
            Mistake("cosines: the update is s·B@A; its scale is missing", _cosines("no s")),
            Mistake("cosines: the left singular vectors are the columns of U, not its rows", _cosines("rows")),
            Mistake("count: an intruder is a vector whose largest cosine is below epsilon", _cosines("above")))),
    Exercise(
        "05.4", "soften", "Soften the intruders", 3, 25,
        hints=("W + ΔW = Σ σⱼ uⱼvⱼᵀ. Find the intruders j among the first `top`, as in 05.3.",
               "Multiply their σⱼ by factor and leave all else as it is. What is then the update to W?",
               "The change is (factor − 1) Σ σⱼ uⱼvⱼᵀ over the intruders; add it to s·B@A."),
        expected=_soften, cases=_soften_cases, rtol=1e-6,
        mistakes=(
            Mistake("return the update, not W plus the update", _soften_wrong("W too")),
            Mistake("this shrinks the whole update; only the intruders are to be softened", _soften_wrong("whole")),
            Mistake("the intruders are removed whatever factor is; they are to keep factor times their σ",
                    _soften_wrong("removed")),
            Mistake("factor is what remains of an intruder, not what is taken away", _soften_wrong("factor")),
            Mistake("these are singular triplets of ΔW; intruders are triplets of W + ΔW", _soften_wrong("of the update")),
            Mistake("only the first `top` triplets are looked at; further down are small directions of no weight",
                    _soften_wrong("all")),
            Mistake("this softens all but the intruders", _soften_wrong("the others")),
            Mistake("this softens all but the intruders", _soften_wrong("all others")),
            Mistake("this is the change alone; add it to s·B@A", _soften_wrong("change")),
            Mistake("this adds factor times the intruders to what is there already; they are to shrink",
                    _soften_wrong("added")),
            Mistake("this is the update as it was: no intruder was found or softened", _soften_wrong("nothing")),
            Mistake("this is the softened intruders alone; the rest of the update stays as it was", _soften_wrong("only")))),
)
