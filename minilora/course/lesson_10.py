"""Lesson 10: LoRA as it is often mis-explained. Can you tell by running?

Four listings to repair are judged by what a LoRA must do (course/five_tests.py), an audit by the bits of arrays, and a micro F1
by counting sets of tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from .exercise import Case, Exercise, Law, Mistake
from .five_tests import is_lora
from .listings import Listing, random_factors, scaled_copy, split, summed

COUNT = "it trains more than r(in + out) numbers, and r more: train thin factors, nothing of W's shape"
FORM = "expected three things: trained and frozen, dicts of float64 arrays, and the function weight(trained, frozen)"
NAMES = "trained should hold {names}: keep the form that the exercise asks for"
REPLACED = "the product stands in W's place: at the start the weight is zero, and not W"
NO_OP = "at the start the weight is not W, bit for bit: one factor has to begin at zero"
BASE = "W itself is not among the frozen arrays: freeze it whole, and use it from there"
USED = "weight ignores what it is given: change an array of trained, and the weight stays the same"
SCALE = "s is not the scale of the update: with twice the s, the same factors should change W twice as much"
TIMES = "the product of the factors is multiplied by something else than s: s is α/r already"
TENSORS = "weight works on arrays, but not on Tensors ({error}): use only + - * @ .T and .sum in it, no np functions"
DEAD = "nothing moves in training: each factor's gradient is multiplied by the others, and too many are zero"
RANK = "after training the change of W has a rank above r"
LEARNS = "the loss does not fall below half of the base's"
SIZES = ((12, 7, 2), (6, 10, 1))                           # out, in, r


def repaired(form: dict[str, str] | None) -> Law:
    """The law of a listing that has become a LoRA.

    form: its trained arrays with their shapes, {"a": "r in", "b": "r out"}, where the listing's form is to be kept.
    """
    def law(answer: Callable[..., Any], rng: np.random.Generator) -> str | None:
        for d, k, r in SIZES:
            W = rng.standard_normal((d, k)) / k**0.5
            hint = _judged(answer, W, r, int(rng.integers(1 << 30)), form)
            if hint is not None:
                return hint
        return None
    return law


def _judged(answer: Callable[..., Any], W: np.ndarray, r: int, seed: int, form: dict[str, str] | None) -> str | None:
    """The first thing that an answer gets wrong on one W."""
    own = W.copy()
    made = [answer(W=W, r=r, s=s, rng=np.random.default_rng(seed)) for s in (2.0, 4.0)]
    if made[0] is None or made[0] is ...:
        raise NotImplementedError
    if not np.array_equal(W, own):
        return "it changed its input W in place; make new arrays"
    if not all(_well_formed(one) for one in made):
        return FORM
    (trained, frozen, weight), (_, _, twice) = made
    if sum(array.size for array in trained.values()) > r * sum(W.shape) + r:
        return COUNT
    sizes = {"out": W.shape[0], "in": W.shape[1], "r": r}
    if form and set(trained) != set(form):
        return NAMES.format(names=", ".join(form))
    for name, axes in (form or {}).items():
        if trained[name].shape != tuple(sizes[axis] for axis in axes.split()):
            return f"{name} should have shape ({axes.replace(' ', ', ')}), and has {trained[name].shape}"
    if not any(np.array_equal(array, W) for array in frozen.values()):
        return BASE
    start = np.asarray(weight(trained, frozen))
    if start.shape != W.shape:
        return f"the weight has shape {start.shape}, expected W's {W.shape} (out, in)"
    if start.dtype != np.float64:
        return FORM
    if not start.any():
        return REPLACED
    if not np.array_equal(start, W):
        return NO_OP
    rng = np.random.default_rng(seed + 1)
    other = {name: rng.standard_normal(array.shape) for name, array in trained.items()}
    once, doubled = weight(other, frozen) - W, twice(other, frozen) - W
    if not once.any():
        return USED
    if not np.allclose(doubled, 2 * once):
        return SCALE
    ones = weight({name: np.ones(array.shape) for name, array in trained.items()}, frozen) - W      # the product is r now
    if np.ptp(ones) < 1e-9 and not np.allclose(ones, 2.0 * r):
        return TIMES
    try:
        found = is_lora(weight, trained, frozen, r=r, base=W, steps=150, lr=2e-2, seed=seed)
    except Exception as error:
        return TENSORS.format(error=" ".join(str(error).split())[:80])
    if not found.ticks["learns"]:
        return DEAD if found.loss[1] == found.loss[2] else LEARNS
    return RANK if not found.ticks["low rank"] else None if found else BASE


def _well_formed(made: Any) -> bool:
    """(trained, frozen, weight), of float64 arrays."""
    return (isinstance(made, tuple | list) and len(made) == 3 and callable(made[2])
            and all(isinstance(part, dict) for part in made[:2]) and len(made[0]) > 0
            and all(isinstance(a, np.ndarray) and a.dtype == np.float64 for part in made[:2] for a in part.values()))


def as_listed(listing: Callable[..., Listing]) -> Callable[..., Any]:
    """A listing as an unchanged answer."""
    def answer(W: np.ndarray, r: int, s: float, rng: np.random.Generator) -> Any:
        made = listing(W, r, rng)
        return made.trained, made.frozen, made.weight
    return answer


def factors(W: np.ndarray, r: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Two random thin matrices, (r, in) and (out, r)."""
    return rng.standard_normal((r, W.shape[1])) / W.shape[1] ** 0.5, rng.standard_normal((W.shape[0], r))


def pair(change: Callable[[Any, Any, np.ndarray, float], Any], start: tuple[float, float] = (1.0, 0.0),
         frozen: Callable[[np.ndarray], dict[str, np.ndarray]] = lambda W: {"W": W},
         names: tuple[str, str] = ("A", "B"), as_rows: bool = False) -> Callable[..., Any]:
    """A wrong answer with two thin factors: weight = change(A, B, W, s); start: what A and B are multiplied by at the start."""
    def answer(W: np.ndarray, r: int, s: float, rng: np.random.Generator) -> Any:
        A, B = factors(W, r, rng)
        second = start[1] * B
        return ({names[0]: start[0] * A, names[1]: second.T.copy() if as_rows else second}, frozen(W),
                lambda t, f: change(t[names[0]], t[names[1]].T if as_rows else t[names[1]], next(iter(f.values())), s))
    return answer


def pair_mistakes(**form: Any) -> tuple[Mistake, ...]:
    """What goes wrong with two factors, whatever they are called."""
    def made(change: Callable[[Any, Any, np.ndarray, float], Any], **more: Any) -> Callable[..., Any]:
        return pair(change, **(form | more))

    return (
        Mistake(REPLACED, made(lambda A, B, W, s: s * (B @ A))),
        Mistake(NO_OP, made(lambda A, B, W, s: W + s * (B @ A), start=(1.0, 1.0))),
        Mistake(DEAD, made(lambda A, B, W, s: W + s * (B @ A), start=(0.0, 0.0))),
        Mistake(SCALE, made(lambda A, B, W, s: W + B @ A)),
        Mistake(SCALE, made(lambda A, B, W, s: W + s * s * (B @ A))),
        Mistake(SCALE, made(lambda A, B, W, s: W + (B @ A) * (1 / s))),
        Mistake(TIMES, made(lambda A, B, W, s: W + s * (B @ A) * (1 / A.shape[0]))),
        Mistake(USED, made(lambda A, B, W, s: 1.0 * W)),
        Mistake(BASE, made(lambda A, B, W, s: W + s * (B @ A), frozen=lambda W: {"W": 0.5 * W})),
        Mistake(BASE, made(lambda A, B, W, s: W + s * (B @ A), frozen=lambda W: {})),
        Mistake(FORM, made(lambda A, B, W, s: W + s * (B @ A), frozen=lambda W: {"W": W.astype(np.float32)})),
    )


def three(start: tuple[float, float, float], diagonal: bool = True, add: bool = True,
          scaled: bool = True) -> Callable[..., Any]:
    """A wrong answer with U, Lambda and V; start: what they are multiplied by at the start."""
    def answer(W: np.ndarray, r: int, s: float, rng: np.random.Generator) -> Any:
        V, U = factors(W, r, rng)
        trained = {"U": start[0] * U, "Lambda": start[1] * rng.standard_normal(r if diagonal else (r, W.shape[1])),
                   "V": start[2] * V.T}
        times = s if scaled else 1.0

        def weight(t: Any, f: Any) -> Any:
            product = (t["U"] * t["Lambda"]) @ t["V"].T if diagonal else t["U"] @ t["Lambda"]
            return f["W"] + times * product if add else times * product
        return trained, {"W": W}, weight
    return answer


def audit_cases(rng: np.random.Generator) -> list[Case]:
    """States in which arrays moved a lot, by one bit, by a permutation; and one with a NaN that did not move."""
    shapes = {"up": (3, 4), "q.W": (4, 5), "q.A": (2, 5), "q.B": (4, 2), "v.A": (1, 4), "v.B": (4, 1), "norm": (5,)}
    cases: list[Any] = []
    for moved in (("up", "q.A"), ("q.W", "v.A", "v.B"), ()):
        before: dict[str, Any] = {name: rng.standard_normal(shape) for name, shape in shapes.items()}
        before["norm"][2] = np.nan
        after = {name: array.copy() for name, array in before.items()}
        for name in moved:
            after[name] = after[name] + 1.0
        cases.append({"before": before, "after": after, "trained": {"q.A", "q.B", "v.A", "v.B"}})
    last = cases[-1]["after"]
    last["up"][1, 2] = np.nextafter(last["up"][1, 2], 9.0)                 # one bit of one entry of the base
    last["q.W"][:] = last["q.W"][::-1].copy()                              # the same entries in another order
    last["q.B"][0, 0] += 1e-11
    return cases


def bits(array: np.ndarray) -> bytes:
    """An array as its bits."""
    return np.packbits(np.frombuffer(array.tobytes(), dtype=np.uint8)[:, None] >> np.arange(8) & 1).tobytes()


def what_moved(before: dict[str, Any], after: dict[str, Any], trained: set[str]) -> tuple[list[str], list[str]]:
    """By a pass over the names in order, bit by bit."""
    moved: list[str] = []
    still: list[str] = []
    for name in sorted(before):
        same = bits(before[name]) == bits(after[name])
        (still if same and name in trained else moved if not same and name not in trained else []).append(name)
    return moved, still


def by(changed: Callable[[np.ndarray, np.ndarray], bool], kept: bool = True, order: bool = False) -> Callable[..., Any]:
    """A wrong audit with this comparison; kept: whether it looks at trained; order: whether it is turned round."""
    def answer(before: dict[str, Any], after: dict[str, Any], trained: set[str]) -> Any:
        found = {name for name in before if changed(before[name], after[name])}
        first, second = (found - trained, trained - found) if kept else (found, set(before) - found)
        return sorted(first, reverse=order), sorted(second, reverse=order)
    return answer


def differs(a: np.ndarray, b: np.ndarray) -> bool:
    return not np.array_equal(a, b, equal_nan=True)


def table_cases(rng: np.random.Generator) -> list[Case]:
    """Precision, recall and support of n labels, from counts; the last label is far more frequent than the others."""
    cases = []
    for n in (2, 4, 9):
        support = rng.integers(20, 200, n) * np.where(np.arange(n) == n - 1, 40, 1)
        hits = np.maximum(1, np.floor(support * rng.uniform(0.5, 0.98, n)))
        predicted = hits + rng.integers(1, 90, n)
        cases.append({"precision": hits / predicted, "recall": hits / support, "support": support.astype(float)})
    return cases


def by_sets(precision: np.ndarray, recall: np.ndarray, support: np.ndarray) -> float:
    """The Dice coefficient of two sets of (label, token): the true ones, and the predicted ones."""
    true, said = set(), set()
    for label, (p, r, n) in enumerate(zip(precision, recall, support, strict=True)):
        hits = round(r * n)
        true |= {(label, token) for token in range(round(n))}
        said |= {(label, token) for token in range(hits)} | {(label, -1 - token) for token in range(round(hits / p) - hits)}
    both = len(true & said)
    return both / (both + len(true ^ said) / 2)


def f1(p: Any, r: Any) -> Any:
    return 2 * p * r / (p + r)


TABLE_MISTAKES: Sequence[Mistake] = (
    Mistake("this is the mean of the labels' own F1 (macro): every label counts alike, however rare",
            lambda precision, recall, support: float(f1(precision, recall).mean())),
    Mistake("this is the labels' F1 weighted by support: F1 is no mean of counts; add up the counts, then divide once",
            lambda precision, recall, support: float((f1(precision, recall) * support).sum() / support.sum())),
    Mistake("this averages precision and recall over the labels first; add up counts instead",
            lambda precision, recall, support: float(f1(precision.mean(), recall.mean()))),
    Mistake("this weights precision by support; its denominator is the number of predictions, not of true tokens",
            lambda precision, recall, support: float(f1((precision * support).sum() / support.sum(),
                                                        (recall * support).sum() / support.sum()))),
    Mistake("the last row is left out; micro takes every row of the table, O too",
            lambda precision, recall, support: by_sets(precision[:-1], recall[:-1], support[:-1])),
    Mistake("this is the recall over all tokens; wrong predictions do not count in it",
            lambda precision, recall, support: float((recall * support).sum() / support.sum())),
    Mistake("this is the precision over all tokens; what was missed does not count in it",
            lambda precision, recall, support: float((recall * support).sum() / (recall * support / precision).sum())),
    Mistake("this is the arithmetic mean of precision and recall; F1 is the harmonic one",
            lambda precision, recall, support: float(0.5 * (recall * support).sum() * (
                1 / support.sum() + 1 / (recall * support / precision).sum()))),
    Mistake("a factor 2 is missing: hits are in both of the counts below the line",
            lambda precision, recall, support: float((recall * support).sum() / (
                support.sum() + (recall * support / precision).sum()))),
    Mistake("hits = recall · support; precision · support is no count of anything",
            lambda precision, recall, support: float(2 * (precision * support).sum() / (
                support.sum() + (precision * support / recall).sum()))),
)

EXERCISES = (
    Exercise("10.1", "repair_scaled", "W = A·√d becomes a LoRA", 2, 8,
             ("What must be in frozen? Look at the one-line statement at the top.",
              "Two thin factors: their product has W's shape. Which of them starts at zero?"),
             (Mistake(COUNT, as_listed(scaled_copy)), *pair_mistakes()), laws=(repaired(None),)),
    Exercise("10.2", "repair_split", "W = A + B becomes a LoRA", 2, 6,
             ("The other summand must be zero at the start, since B is already all of W.",
              "Train two thin factors, and multiply them inside weight, not before."),
             (Mistake(COUNT, as_listed(split)), *pair_mistakes(names=("right", "left"))), laws=(repaired(None),)),
    Exercise("10.3", "repair_summed", "A sum over the rank becomes a LoRA", 2, 10,
             ("The sum over i of the outer products of b[i] and a[i] is one matrix product.",
              "Check the shapes: (out, r) times (r, in)."),
             (Mistake(COUNT, as_listed(summed)), Mistake(NAMES.format(names="a, b"), pair(lambda A, B, W, s: W + s * (B @ A))),
              *pair_mistakes(names=("a", "b"), as_rows=True)), laws=(repaired({"a": "r in", "b": "r out"}),)),
    Exercise("10.4", "repair_factors", "U·Λ·Vᵀ becomes a LoRA", 2, 8,
             ("One of the three zero is enough. Two zero are too many: why?",
              "Lambda has one axis: (U * Lambda) scales the columns of U."),
             (Mistake(NO_OP, as_listed(random_factors)), Mistake(DEAD, three((0.0, 0.0, 1.0))),
              Mistake(DEAD, three((1.0, 0.0, 0.0))),
              Mistake(COUNT, three((1.0, 0.0, 1.0), diagonal=False)), Mistake(REPLACED, three((1.0, 0.0, 1.0), add=False)),
              Mistake(SCALE, three((1.0, 0.0, 1.0), scaled=False)),
              Mistake(NAMES.format(names="U, Lambda, V"), pair(lambda A, B, W, s: W + s * (B @ A)))),
             laws=(repaired({"U": "out r", "Lambda": "r", "V": "in r"}),)),
    Exercise("10.5", "what_moved", "An audit of a training run", 2, 8,
             ("A base that moved a little passes np.allclose. One with a NaN in it is not equal to itself.",
              "array.tobytes() gives the bits."),
             (Mistake("allclose takes a base that moved a little for one that did not move; compare bit for bit",
                      by(lambda a, b: not np.allclose(a, b, equal_nan=True))),
              Mistake("allclose takes a base that moved a little for one that did not move, and NaN is not equal to NaN",
                      by(lambda a, b: not np.allclose(a, b))),
              Mistake("an array with a NaN is not equal to itself: compare the bits",
                      by(lambda a, b: not np.array_equal(a, b))),
              Mistake("a sum, like a norm, does not see entries that changed places, nor a last bit",
                      by(lambda a, b: abs(np.nansum(a) - np.nansum(b)) > 1e-9)),
              Mistake("`is` asks for the same object, and after training every array is another one: compare the bits",
                      by(lambda a, b: a is not b)),
              Mistake("trained is not used: what should move and what should not are two lists", by(differs, kept=False)),
              Mistake("the lists should be sorted by name, from a to z", by(differs, order=True))),
             expected=what_moved, cases=audit_cases, outputs=("moved", "still")),
    Exercise("10.6", "micro_f1", "The micro F1 of a printed table", 1, 8,
             ("Get the counts back: recall = hits / support, precision = hits / predicted.",
              "F1 = 2 · hits / (support + predicted), each summed over the labels."),
             tuple(TABLE_MISTAKES), expected=by_sets, cases=table_cases),
)
