"""Lesson 03: what exactly does LoRA train, and what does it leave alone?

The oracles: the library's own layer in its other order of computation, arrays that are made and counted, a search over all
ranks, differences of a function that is linear in each factor, and a real update by the library's optimisers.
"""

from __future__ import annotations

import itertools
import math
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np

from ..autograd import lora_linear, no_grad, tensor
from ..backend import to_host
from ..training import SGD, AdamW
from .exercise import Case, Exercise, Mistake

FORMED = "the numbers are right, but a matrix as large as W was formed on the way; multiply x by A first"


# ------------------------------------------------------------------------------------------------ 03.1 the forward pass
def _layers(rng: np.random.Generator) -> list[Case]:
    sizes = [(5, 7, 4, 2, 0.5), (3, 4, 6, 3, 2.0), (1, 5, 3, 1, -1.5), (4, 1, 3, 1, 3.0), (2, 3, 1, 1, 0.25)]
    return [{"x": rng.standard_normal((n, k)), "W": rng.standard_normal((d, k)), "A": rng.standard_normal((r, k)),
             "B": rng.standard_normal((d, r)), "s": s} for n, k, d, r, s in sizes]


def _by_the_formed_weight(x: np.ndarray, W: np.ndarray, A: np.ndarray, B: np.ndarray, s: float) -> np.ndarray:
    with no_grad():
        return to_host(lora_linear(tensor(x), tensor(W), None, tensor(A), tensor(B), s, formed=True))


def _stays_thin(answer: Callable[..., Any], rng: np.random.Generator) -> str | None:
    """FORMED if the answer allocates half as much as W at once."""
    n, d, k, r = 2, 600, 500, 3
    given = {"x": rng.standard_normal((n, k)), "W": rng.standard_normal((d, k)), "A": rng.standard_normal((r, k)),
             "B": rng.standard_normal((d, r)), "s": 2.0}
    return FORMED if peak_bytes(lambda: answer(**given)) > d * k * 8 / 2 else None


def peak_bytes(work: Callable[[], Any]) -> int:
    """The most bytes that a call holds at once, NumPy's arrays included, beyond what was there before."""
    was_on = tracemalloc.is_tracing()
    if not was_on:
        tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        tracemalloc.reset_peak()
        work()
        return tracemalloc.get_traced_memory()[1] - before
    finally:
        if not was_on:
            tracemalloc.stop()


LORA_FORWARD = Exercise(
    id="03.1", name="lora_forward", title="The forward pass, without forming ΔW", difficulty=2, minutes=8,
    cases=_layers, expected=_by_the_formed_weight, laws=(_stays_thin,), scalars=lambda case: {"s": case["s"]},
    hints=("Rows are examples: the plain layer is x @ W.T.", "The branch is s·x Aᵀ Bᵀ. Which of the two products is small?",
           "Put the brackets so that the first product has shape (n, r)."),
    mistakes=(
        Mistake("the scale is missing from the branch", lambda x, W, A, B, s: x @ W.T + x @ A.T @ B.T),
        Mistake("the scale belongs to the branch alone, not to the frozen layer",
                lambda x, W, A, B, s: s * (x @ W.T + x @ A.T @ B.T)),
        Mistake("the scale is applied twice", lambda x, W, A, B, s: x @ W.T + s * (x @ A.T) @ (s * B).T),
        Mistake("the scale multiplies the frozen layer instead of the branch",
                lambda x, W, A, B, s: s * x @ W.T + x @ A.T @ B.T),
        Mistake("s is given as α/r already; do not divide by r again",
                lambda x, W, A, B, s: x @ W.T + s / len(A) * x @ A.T @ B.T),
        Mistake("this is s = 1/r: use the s that is passed", lambda x, W, A, B, s: x @ W.T + x @ A.T @ B.T / len(A)),
        Mistake("the branch is subtracted", lambda x, W, A, B, s: x @ W.T - s * x @ A.T @ B.T),
        Mistake("the frozen layer is missing: x Wᵀ is still computed", lambda x, W, A, B, s: s * x @ A.T @ B.T),
        Mistake("the branch is missing: this is the frozen layer alone", lambda x, W, A, B, s: x @ W.T),
        Mistake("W is a weight, the branch is added to its output and does not multiply it",
                lambda x, W, A, B, s: (x @ W.T) * (s * x @ A.T @ B.T)),
        Mistake(FORMED, lambda x, W, A, B, s: x @ (W + s * B @ A).T),
    ))


# ----------------------------------------------------------------------------------------------------- 03.2 the count
def _shape_lists(rng: np.random.Generator) -> list[Case]:
    return [{"shapes": [(7, 5)], "r": 2}, {"shapes": [(192, 64), (64, 64), (256, 64), (64, 256)] * 2, "r": 8},
            {"shapes": [(6, 3), (3, 6)], "r": 3}, {"shapes": [(9, 1), (4, 11), (4, 11)], "r": 1}]


def _arrays_counted(shapes: list[tuple[int, int]], r: int) -> int:
    return sum(array.size for d, k in shapes for array in (np.zeros((r, k)), np.zeros((d, r))))


LORA_COUNT = Exercise(
    id="03.2", name="lora_count", title="How many numbers train?", difficulty=1, minutes=5,
    cases=_shape_lists, expected=_arrays_counted,
    hints=("Write down the shapes of A and of B for one weight (d, k).",
           "A is (r, k), B is (d, r). Add the two, then add up all weights."),
    mistakes=(
        Mistake("this counts A alone; B trains as well", lambda shapes, r: sum(r * k for d, k in shapes)),
        Mistake("this counts B alone; A trains as well", lambda shapes, r: sum(r * d for d, k in shapes)),
        Mistake("this is right for square weights only: d and k differ", lambda shapes, r: sum(2 * d * r for d, k in shapes)),
        Mistake("for wide weights this is wrong: the two sides differ", lambda shapes, r: sum(2 * k * r for d, k in shapes)),
        Mistake("this counts the frozen weights", lambda shapes, r: sum(d * k for d, k in shapes)),
        Mistake("the frozen weights do not train; count A and B alone",
                lambda shapes, r: sum(d * k + r * (d + k) for d, k in shapes)),
        Mistake("r full matrices would be r times full fine-tuning; A and B are thin",
                lambda shapes, r: sum(r * d * k for d, k in shapes)),
        Mistake("there is no r × r matrix between B and A", lambda shapes, r: sum(r * (d + k) + r * r for d, k in shapes)),
        Mistake("there are no singular values to train: two factors, not three",
                lambda shapes, r: sum(r * (d + k) + r for d, k in shapes)),
        Mistake("only the first weight was counted", lambda shapes, r: r * sum(shapes[0])),
        Mistake("weights of equal shape are still different weights: count each",
                lambda shapes, r: sum(r * (d + k) for d, k in set(shapes))),
        Mistake("the rank is missing", lambda shapes, r: sum(d + k for d, k in shapes)),
    ))


# ---------------------------------------------------------------------------------------- 03.3 when LoRA is larger than W
def _search(d: int, k: int) -> int:
    return next(r for r in itertools.count(1) if _arrays_counted([(d, k)], r) > np.zeros((d, k)).size)


FIRST_WASTEFUL_RANK = Exercise(
    id="03.3", name="first_wasteful_rank", title="When is LoRA larger than W?", difficulty=1, minutes=7,
    cases=lambda rng: [{"d": d, "k": k} for d, k in [(48, 48), (2, 96), (6, 3), (1, 5), (10, 3), (31, 17)]], expected=_search,
    hints=("LoRA is larger when r(d + k) > d·k.",
           "Solve for r. The answer is the next whole number above; what if the division is exact?"),
    mistakes=(
        Mistake("at this rank LoRA has at most as many numbers as W, in some cases exactly as many; more was asked",
                lambda d, k: math.ceil(d * k / (d + k))),
        Mistake("at this rank LoRA is still no larger than W; go one further", lambda d, k: d * k // (d + k)),
        Mistake("a rank is a whole number", lambda d, k: d * k / (d + k)),
        Mistake("rounding to the nearest is not the first rank that is larger", lambda d, k: round(d * k / (d + k))),
        Mistake("this is the largest rank that ΔW can have; LoRA is larger than W long before", lambda d, k: min(d, k)),
        Mistake("a rank above min(d, k) is impossible; LoRA is larger than W long before", lambda d, k: min(d, k) + 1),
        Mistake("half of the smaller side is right for square weights only", lambda d, k: min(d, k) // 2 + 1),
        Mistake("half of the smaller side: for square weights that is exactly as many as W, not more",
                lambda d, k: min(d, k) // 2),
        Mistake("half of the mean side is right for square weights only", lambda d, k: (d + k) // 4 + 1),
    ))


# -------------------------------------------------------------------------------------------------- 03.4 the gradients
def _branches(rng: np.random.Generator) -> list[Case]:
    sizes = [(5, 7, 4, 3, 2.0), (3, 4, 6, 2, 0.5), (1, 5, 3, 1, 4.0), (4, 1, 3, 1, -1.5), (6, 3, 1, 1, 0.25)]
    return [{"x": rng.standard_normal((n, k)), "dy": rng.standard_normal((n, d)), "A": rng.standard_normal((r, k)),
             "B": rng.standard_normal((d, r)), "s": s} for n, k, d, r, s in sizes]


def _by_differences(x: np.ndarray, dy: np.ndarray, A: np.ndarray, B: np.ndarray, s: float) -> tuple[np.ndarray, np.ndarray]:
    """The slope of Σ ȳ ⊙ s (x Aᵀ) Bᵀ in every entry. It is linear in A and in B, so a difference over any step is exact."""
    def slopes(which: np.ndarray) -> np.ndarray:
        found = np.zeros_like(which)
        for place in np.ndindex(which.shape):
            for sign in (1.0, -1.0):
                which[place] += sign
                found[place] += sign / 2 * float((dy * (s * (x @ A.T) @ B.T)).sum())
                which[place] -= sign
        return found
    return slopes(A), slopes(B)


def _pair(dA: Callable[..., Any], dB: Callable[..., Any]) -> Callable[..., Any]:
    return lambda x, dy, A, B, s: (dA(x, dy, A, B, s), dB(x, dy, A, B, s))


def _dA(x: np.ndarray, dy: np.ndarray, A: np.ndarray, B: np.ndarray, s: float) -> np.ndarray:
    return _by_differences(x, dy, A.copy(), B.copy(), s)[0]


def _dB(x: np.ndarray, dy: np.ndarray, A: np.ndarray, B: np.ndarray, s: float) -> np.ndarray:
    return _by_differences(x, dy, A.copy(), B.copy(), s)[1]


LORA_GRAD = Exercise(
    id="03.4", name="lora_grad", title="The gradients of A and B", difficulty=2, minutes=12,
    cases=_branches, expected=lambda x, dy, A, B, s: _by_differences(x, dy, A, B, s), outputs=("dA", "dB"),
    scalars=lambda case: {"s": case["s"], "n": float(len(case["x"])), "r": float(len(case["A"]))},
    hints=("Call u = x Aᵀ, of shape (n, r). Then the branch is y = s u Bᵀ: a linear layer on a linear layer.",
           "The rule of section 2: for y = u Bᵀ the gradients are dB = dyᵀ u and du = dy B. Where does s go?",
           "u = x Aᵀ is the same rule once more: dA = duᵀ x. Check the shapes: (r, k) and (d, r)."),
    mistakes=(
        Mistake("both: a factor s is missing; y = s x Aᵀ Bᵀ, so s is in every derivative",
                _pair(lambda x, dy, A, B, s: _dA(x, dy, A, B, s) / s, lambda x, dy, A, B, s: _dB(x, dy, A, B, s) / s)),
        Mistake("dA: s is missing; you have it in dB", _pair(lambda x, dy, A, B, s: _dA(x, dy, A, B, s) / s, _dB)),
        Mistake("dB: s is missing; you have it in dA", _pair(_dA, lambda x, dy, A, B, s: _dB(x, dy, A, B, s) / s)),
        Mistake("both: s is applied twice",
                _pair(lambda x, dy, A, B, s: _dA(x, dy, A, B, s) * s, lambda x, dy, A, B, s: _dB(x, dy, A, B, s) * s)),
        Mistake("both are divided by n; dy is the gradient already, add up the rows",
                _pair(lambda x, dy, A, B, s: _dA(x, dy, A, B, s) / len(x),
                      lambda x, dy, A, B, s: _dB(x, dy, A, B, s) / len(x))),
        Mistake("both are divided by r; s = α/r has it already",
                _pair(lambda x, dy, A, B, s: _dA(x, dy, A, B, s) / len(A),
                      lambda x, dy, A, B, s: _dB(x, dy, A, B, s) / len(A))),
        Mistake("the two gradients are swapped; return dA, dB", _pair(_dB, _dA)),
        Mistake("both are transposed; a gradient has the shape of its parameter",
                _pair(lambda x, dy, A, B, s: _dA(x, dy, A, B, s).T, lambda x, dy, A, B, s: _dB(x, dy, A, B, s).T)),
        Mistake("dA is transposed; it has A's shape (r, k)", _pair(lambda x, dy, A, B, s: _dA(x, dy, A, B, s).T, _dB)),
        Mistake("dB is transposed; it has B's shape (d, r)", _pair(_dA, lambda x, dy, A, B, s: _dB(x, dy, A, B, s).T)),
        Mistake("both have the wrong sign; the optimiser subtracts, the gradient does not",
                _pair(lambda x, dy, A, B, s: -_dA(x, dy, A, B, s), lambda x, dy, A, B, s: -_dB(x, dy, A, B, s))),
        Mistake("dA is zero only while B is; in general A trains too", _pair(lambda x, dy, A, B, s: 0 * A, _dB)),
        Mistake("dB is not zero, even at the start where B is", _pair(_dA, lambda x, dy, A, B, s: 0 * B)),
        Mistake("dy is not used: this is the gradient of the sum of y",
                _pair(lambda x, dy, A, B, s: _dA(x, np.ones_like(dy), A, B, s),
                      lambda x, dy, A, B, s: _dB(x, np.ones_like(dy), A, B, s))),
        Mistake("only the first row counts here; add up all rows",
                _pair(lambda x, dy, A, B, s: _dA(x[:1], dy[:1], A, B, s), lambda x, dy, A, B, s: _dB(x[:1], dy[:1], A, B, s))),
    ))


# ------------------------------------------------------------------------------------------------------ 03.5 the scale
def _by_one_update(c: float, optimizer: str) -> float:
    """‖ΔW‖ after one real update at c times α, over that at α: the library's layer and optimisers, float64."""
    rng = np.random.default_rng(0)
    x, W, A, target = (rng.standard_normal(shape) for shape in ((6, 5), (4, 5), (2, 5), (6, 4)))

    def size(s: float) -> float:
        lora_A, lora_B = tensor(A.copy(), requires_grad=True), tensor(np.zeros((4, 2)), requires_grad=True)
        error = lora_linear(tensor(x), tensor(W), None, lora_A, lora_B, s) - tensor(target)
        (error * error).sum().backward()
        kinds: dict[str, Any] = {"sgd": lambda params: SGD(params, lr=0.01),
                                 "adam": lambda params: AdamW(params, lr=0.01, weight_decay=0.0, eps=1e-30)}
        kinds[optimizer]([lora_A, lora_B]).step()
        return float(np.linalg.norm(s * to_host(lora_B) @ to_host(lora_A)))

    return size(0.5 * c) / size(0.5)


def _first(sgd: Callable[[float], float], adam: Callable[[float], float]) -> Callable[..., float]:
    return lambda c, optimizer: float(sgd(c) if optimizer == "sgd" else adam(c))


UPDATE_GROWTH = Exercise(
    id="03.5", name="update_growth", title="What α does to the first update", difficulty=2, minutes=8,
    cases=lambda rng: [{"c": c, "optimizer": name} for c in (2.0, 3.0, 0.5, 10.0) for name in ("sgd", "adam")],
    expected=_by_one_update, scalars=lambda case: {},
    hints=("After the first update only B has moved: ΔW = s · B₁ · A₀.", "B₁ = −lr · dB, and dB carries one more factor s.",
           "Adam's first update is ± lr for each number, whatever the gradient's size."),
    mistakes=(
        Mistake("under Adam the step of B does not grow with s; only one of the two factors s is left",
                _first(lambda c: c**2, lambda c: c**2)),
        Mistake("under SGD s counts twice: once in ΔW = s B A, once in the gradient of B", _first(lambda c: c, lambda c: c)),
        Mistake("the two optimisers are exchanged", _first(lambda c: c, lambda c: c**2)),
        Mistake("the scale is no learning rate, but it is not without effect either", _first(lambda c: 1, lambda c: 1)),
        Mistake("Adam takes s out of B's step, yet s still multiplies B A afterwards", _first(lambda c: c**2, lambda c: 1)),
        Mistake("both miss the s in ΔW = s B A: B's step is not the whole update", _first(lambda c: c, lambda c: 1)),
        Mistake("A has not moved yet, so its gradient adds no factor", _first(lambda c: c**3, lambda c: c)),
        Mistake("a larger scale makes the update larger, not smaller", _first(lambda c: c**-2, lambda c: 1 / c)),
        Mistake("no square root: that belongs to rsLoRA's choice of s", _first(lambda c: c, lambda c: c**0.5)),
        Mistake("this is right for c = 2 only", _first(lambda c: 2 * c, lambda c: 2)),
        Mistake("this fits c = 2 only", _first(lambda c: 4, lambda c: 2)),
    ))


EXERCISES: tuple[Exercise, ...] = (LORA_FORWARD, LORA_COUNT, FIRST_WASTEFUL_RANK, LORA_GRAD, UPDATE_GROWTH)
