"""Lesson 01: backpropagation by hand. How do you know a gradient is right?

The oracle of the first two exercises is the complex step, which is exact to rounding and knows no rule of differentiation. The
third asks gradcheck itself; the fourth turns the tables: there the student's test is tested, on right and on wrong gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from ..autograd import GradcheckError, Op, Tensor, gradcheck, tanh, tensor
from ..autograd import softmax as fused_softmax
from .exercise import Case, Exercise, Mistake

Array = np.ndarray


def slopes(f: Callable[[Array], Array], x: Array, dy: Array, h: float = 1e-20) -> Array:
    """The gradient of Σ dy ⊙ f(x) by the complex step, element by element: x (...) -> (...)."""
    found = np.zeros(x.shape)
    for where in np.ndindex(*x.shape):
        z = x.astype(np.complex128)
        z[where] += 1j * h
        found[where] = (dy * f(z)).sum().imag / h
    return found


def softmax(x: Array, axis: int = -1) -> Array:
    """Softmax over an axis, also of complex numbers: (...) -> (...)."""
    e = np.exp(x - x.real.max(axis=axis, keepdims=True))
    return e / e.sum(axis=axis, keepdims=True)


def difference_errors(steps: Sequence[float], seed: int = 0) -> dict[str, Array]:
    """How far measured slopes of softmax(tanh x), x (4, 6), are from the right gradient, for each step ε.

    Central differences in "float32" and in "float64", and the "complex" step: each (steps, 24), the relative errors
    |measured - right| / (|measured| + |right|) of the elements, at most 1.
    """
    rng = np.random.default_rng(seed)
    x, dy = rng.standard_normal((4, 6)), rng.standard_normal((4, 6))
    leaf = tensor(x, requires_grad=True)
    fused_softmax(tanh(leaf)).backward(dy)
    right: Any = leaf.grad
    measured: dict[str, list[Array]] = {"float32": [], "float64": [], "complex": []}
    for eps in steps:
        for dtype in ("float32", "float64"):
            measured[dtype].append(_central(x.astype(dtype), dy.astype(dtype), eps))
        measured["complex"].append(slopes(lambda z: softmax(np.tanh(z)), x, dy, eps))
    return {kind: np.array([np.abs(found - right) / (np.abs(found) + np.abs(right)) for found in rows]).reshape(len(steps), -1)
            for kind, rows in measured.items()}


def _central(x: Array, dy: Array, eps: float) -> Array:
    """Central differences of Σ dy ⊙ softmax(tanh x) in the dtype of x."""
    found = np.zeros(x.shape)
    for where in np.ndindex(*x.shape):
        step = np.zeros_like(x)
        step[where] = eps
        found[where] = ((dy * softmax(np.tanh(x + step))).sum() - (dy * softmax(np.tanh(x - step))).sum()) / (2 * eps)
    return found


# 01.1: z = tanh(x) y, with broadcasting

def _product_cases(rng: np.random.Generator) -> list[Case]:
    shapes: list[Any] = [((3, 4), (3, 4)), ((3, 4), (4,)), ((3, 1), (2, 3, 4)), ((), (2, 3)), ((5, 2), ()), ((1, 3), (4, 1)),
                         ((1,), (1,))]
    return [{"dz": rng.standard_normal(np.broadcast_shapes(a, b)), "x": np.array(rng.standard_normal(a)),
             "y": np.array(rng.standard_normal(b))} for a, b in shapes]


def _product_expected(dz: Array, x: Array, y: Array) -> tuple[Array, Array]:
    return slopes(lambda x: np.tanh(x) * y, x, dz), slopes(lambda y: np.tanh(x) * y, y, dz)


def _summed(gradient: Array, shape: tuple[int, ...], keepdims: bool = True, add: Any = np.sum) -> Array:
    gradient = add(gradient, axis=tuple(range(gradient.ndim - len(shape))))
    return add(gradient, axis=tuple(i for i, n in enumerate(shape) if n == 1), keepdims=keepdims)


def _product(slope: Any = lambda x: 1 - np.tanh(x) ** 2, factor: Any = lambda x: np.tanh(x), dx: Any = lambda dz, y: dz * y,
             summed: Any = _summed) -> Callable[..., Any]:
    return lambda dz, x, y: (summed(dx(dz, y) * slope(x), x.shape), summed(dz * factor(x), y.shape))


tanh_times = Exercise(
    id="01.1", name="tanh_times_grad", title="Backward of tanh(x) · y, with broadcasting", difficulty=1, minutes=10,
    cases=_product_cases, expected=_product_expected, outputs=("dx", "dy"),
    hints=("Write z element by element for equal shapes first. dx is dz times the slope of z along x.",
           "The slope of tanh can be written with tanh itself.",
           "Copying forward means adding backward: sum over the axes along which an input was copied."),
    mistakes=(
        Mistake("dx and dy have the shape of z; an input that broadcasting copied gets the sum over its copies",
                _product(summed=lambda gradient, shape: gradient)),
        Mistake("axes of length 1 were summed away: they have to stay in the shape (keepdims)",
                _product(summed=partial(_summed, keepdims=False))),
        Mistake("the copies of an input are added up, not averaged: each of them moves the loss",
                _product(summed=partial(_summed, add=np.mean))),
        Mistake("dx: the slope of tanh is missing", _product(slope=np.ones_like)),
        Mistake("dx: the slope of tanh is not 1 - x²; it needs the value of tanh, not x", _product(slope=lambda x: 1 - x * x)),
        Mistake("dx: the slope of tanh has a square in it", _product(slope=lambda x: 1 - np.tanh(x))),
        Mistake("dx: this has tanh(x) where its slope belongs", _product(slope=lambda x: np.tanh(x))),
        Mistake("dx: the slope of tanh is at most 1; yours is above it", _product(slope=lambda x: 1 + np.tanh(x) ** 2)),
        Mistake("the tanh is of x alone, not of x·y", lambda dz, x, y: (
            _summed(dz * y * (1 - np.tanh(x * y) ** 2), x.shape), _summed(dz * x * (1 - np.tanh(x * y) ** 2), y.shape))),
        Mistake("dx: the other factor, y, is missing", _product(dx=lambda dz, y: dz)),
        Mistake("dy: the other factor is tanh(x), not x", _product(factor=lambda x: x)),
        Mistake("dy: the other factor is missing", _product(factor=np.ones_like)),
        Mistake("this is the slope of z alone: the cotangent dz is not in it",
                lambda dz, x, y: _product()(np.ones_like(dz), x, y)),
    ))


# 01.2: softmax

def _softmax_cases(rng: np.random.Generator) -> list[Case]:
    shapes: list[Any] = [((5,), 0), ((3, 4), 1), ((3, 4), 0), ((2, 3, 4), 1), ((1, 6), 1), ((6, 1), 0), ((2, 3, 5), -1)]
    return [{"dy": rng.standard_normal(shape), "y": softmax(rng.standard_normal(shape), axis), "axis": axis}
            for shape, axis in shapes]


softmax_op = Exercise(
    id="01.2", name="softmax_grad", title="Backward of softmax", difficulty=2, minutes=15, cases=_softmax_cases,
    expected=lambda dy, y, axis: slopes(lambda x: softmax(x, axis), np.log(y), dy),
    hints=("Start with one row: ∂y_i/∂x_j is y_i (1 - y_i) for i = j, and -y_i y_j otherwise.",
           "dx_j = Σ_i dy_i ∂y_i/∂x_j. Take y_j out of the sum.",
           "What is left of the sum is one number for each row; keepdims=True lets it broadcast back."),
    mistakes=(
        Mistake("zero is right only for dy = 1, 1, …: the check that you have in mind is too weak",
                lambda dy, y, axis: np.zeros_like(y)),
        Mistake("this is the Jacobian's diagonal alone; the sum below the fraction ties every output to every input",
                lambda dy, y, axis: dy * y * (1 - y)),
        Mistake("half of it: what the sum below the fraction does is missing", lambda dy, y, axis: dy * y),
        Mistake("this is the diagonal of the Jacobian; dy is not in it", lambda dy, y, axis: y * (1 - y)),
        Mistake("this is the gradient of log-softmax", lambda dy, y, axis: dy - y * dy.sum(axis, keepdims=True)),
        Mistake("the sum runs over the last axis, whatever axis says",
                lambda dy, y, axis: y * (dy - (dy * y).sum(-1, keepdims=True))),
        Mistake("the sum runs over the whole array, but rows do not know of each other",
                lambda dy, y, axis: y * (dy - (dy * y).sum())),
        Mistake("a mean where a sum belongs", lambda dy, y, axis: y * (dy - (dy * y).mean(axis, keepdims=True))),
        Mistake("the weighted sum is subtracted from dy, not added to it",
                lambda dy, y, axis: y * (dy + (dy * y).sum(axis, keepdims=True))),
        Mistake("y is the softmax already; here it is taken once more", lambda dy, y, axis: (
            softmax(y, axis) * (dy - (dy * softmax(y, axis)).sum(axis, keepdims=True)))),
        Mistake("the factor y in front is missing", lambda dy, y, axis: dy - (dy * y).sum(axis, keepdims=True)),
        Mistake("the term that is subtracted is a weighted sum of dy; the weights are missing",
                lambda dy, y, axis: y * (dy - dy.sum(axis, keepdims=True))),
    ))


# 01.3: the hunt. Five ops of which two are wrong.

def _op(name: str, forward: Callable[..., Any], backward: Callable[..., Any]) -> Callable[..., Any]:
    """An op from two functions: forward(op, *arrays), backward(op, dy). The library's registry does not keep it."""
    kind: Any = type(name, (Op,), {"forward": forward})
    kind.backward = backward                                   # set later, so that it is not registered
    return lambda *inputs: kind()(*inputs)


def _subtract_backward(op: Any, dy: Array) -> tuple[Array, Array]:
    a, b = op.kept
    gradients = {id(a): dy}
    gradients[id(b)] = -dy
    return gradients[id(a)], gradients[id(b)]


def _gather_backward(op: Any, dy: Array) -> tuple[Array, None]:
    table, rows = op.kept
    gradient = np.zeros_like(table)
    gradient[rows] = dy
    return gradient, None


def _mean_backward(op: Any, dy: Array) -> Array:
    return np.broadcast_to(dy[..., None], op.kept.shape) / op.kept.shape[-1]


def _log_sum_exp(op: Any, x: Array) -> Array:
    top = x.max(axis=-1, keepdims=True)
    op.keep(softmax(x))
    return (top + np.log(np.exp(x - top).sum(axis=-1, keepdims=True)))[..., 0]


SUSPECTS: dict[str, Callable[..., Tensor]] = {
    "subtract": _op("Subtract", lambda op, a, b: np.subtract(*op.keep(a, b)), _subtract_backward),          # a - b
    "gather": _op("Gather", lambda op, table, rows: op.keep(table, rows)[0][rows], _gather_backward),       # table[rows]
    "relu": _op("Relu", lambda op, x: np.maximum(op.keep(x), 0.0), lambda op, dy: dy * (op.kept > 0)),      # max(x, 0)
    "mean": _op("Mean", lambda op, x: op.keep(x).mean(axis=-1), _mean_backward),                            # over the last axis
    "log_sum_exp": _op("LogSumExp", _log_sum_exp, lambda op, dy: dy[..., None] * op.kept),                  # over the last axis
}


def _guilty() -> set[str]:
    """The suspects that gradcheck refuses on inputs that are hard and fair: repeats, size 1, one tensor twice, no kinks."""
    x, rows = np.random.default_rng(0).standard_normal((3, 4)), np.array([2, 0, 2, 2])
    fair: dict[str, list[Callable[[Tensor], Any]]] = {
        "subtract": [lambda t: SUSPECTS["subtract"](t, tanh(t)), lambda t: SUSPECTS["subtract"](t, t)],
        "gather": [lambda t: SUSPECTS["gather"](t, rows)],
        **{name: [SUSPECTS[name]] for name in ("relu", "mean", "log_sum_exp")}}
    found = set()
    for name, functions in fair.items():
        try:
            for function in functions:
                gradcheck(function, [x])
        except GradcheckError:
            found.add(name)
    return found


bug_hunt = Exercise(
    id="01.3", name="bug_hunt", title="Two of five ops are wrong", difficulty=2, minutes=15, expected=_guilty,
    hints=("gradcheck sees only the inputs that you give it. Which inputs make each op do something special?",
           "Try an index that occurs twice, sizes of 1, one tensor in both places, and zeros.",
           "A function without a slope at a point (a kink) fails there even if its gradient is right everywhere else."),
    mistakes=(
        Mistake("one of them is right, but there is a second: what if an op gets the same tensor twice?", {"gather"}),
        Mistake("one of them is right, but there is a second: what if an index occurs twice?", {"subtract"}),
        Mistake("relu is right: at 0 it has no slope, and a difference across the kink shows half of one",
                {"subtract", "gather", "relu"}),
        Mistake("only one of the two; the other one has a kink, which is no bug", {"gather", "relu"}),
        Mistake("only one of the two; the other one has no slope at 0, which is no bug", {"subtract", "relu"}),
        Mistake("a kink is no bug: relu has no slope at 0, so no gradient agrees with differences there", {"relu"}),
        *(Mistake("one of the two is right; the other one passes every fair test", {guilty, innocent})
          for guilty in ("subtract", "gather") for innocent in ("mean", "log_sum_exp")),
        Mistake("ordinary inputs pass all five; feed them unusual ones", set()),
        Mistake("not all of them; give each one inputs that are fair: float64, no kinks", set(SUSPECTS)),
    ))


# 01.4: a test is tested

def _scaled(f: Callable[[Array], Array], df: Callable[[Array], Array], wrong: Any = lambda dx: dx) -> Any:
    return f, lambda x, dy: wrong(dy * df(x))


def _one_wrong(dx: Array) -> Array:
    dx = dx.copy()
    dx[-1, -1] *= 2
    return dx


def _cancelling(dx: Array) -> Array:
    dx = dx.copy()
    dx[0, 0] += 0.5
    dx[-1, -1] -= 0.5
    return dx


def _softmax_grad(x: Array, dy: Array) -> Array:
    y = softmax(x)
    return y * (dy - (dy * y).sum(axis=-1, keepdims=True))


REJECTS_TANH = "it rejects the right gradient of tanh; central differences in float64 with ε near 1e-5 agree to about 1e-10"
TRIALS: tuple[tuple[Any, bool, str], ...] = (                                    # ((f, df), whether df is right, hint)
    (_scaled(np.tanh, lambda x: 1 - np.tanh(x) ** 2), True, REJECTS_TANH),
    (_scaled(np.tanh, lambda x: np.tanh(x) ** 2 - 1), False, "it accepts a gradient of tanh with the wrong sign"),
    (_scaled(np.sin, np.cos, _one_wrong), False, "it accepts a gradient with one wrong element: compare all of them"),
    (_scaled(np.sin, np.cos, _cancelling), False,
     "it accepts two errors that cancel: compare element by element, not their sum"),
    ((softmax, _softmax_grad), True,
     "it rejects the right gradient of softmax; take a random dy, move one element at a time and look at all outputs"),
    ((softmax, lambda x, dy: np.zeros_like(x)), False, "it accepts a softmax whose backward is zero: which dy did you use?"),
    (_scaled(lambda x: 1e6 * x**3, lambda x: 3e6 * x * x), True,
     "it rejects a right gradient of size 1e6: allow an error in proportion to the slopes"),
    (_scaled(lambda x: 1e-6 * np.sin(x), lambda x: 1.01e-6 * np.cos(x)), False,
     "it accepts an error of 1 % where gradients are small: allow an error in proportion to the slopes"),
    (_scaled(np.exp, lambda x: (1 + 1e-4) * np.exp(x)), False,
     "it accepts a gradient that is 0.01 % too large; in float64 a test can see a thousandth of that"),
)


def _tried(answer: Callable[..., Any], rng: np.random.Generator) -> str | None:
    """The law: a test says True to right gradients and False to wrong ones, and leaves x as it was."""
    for (f, df), right, hint in TRIALS:
        x = rng.standard_normal((3, 4))
        given = x.copy()
        verdict = answer(f, df, given)
        if verdict is None or verdict is ...:
            raise NotImplementedError
        if not isinstance(verdict, bool | np.bool_):
            return f"return True or False; got {type(verdict).__name__}"
        if not np.allclose(x, given, rtol=0.0, atol=1e-12):
            return "x is not what it was before the test: work on a copy"
        if bool(verdict) != right:
            return hint
    return None


def _check(f: Any, df: Any, x: Array, *, eps: float = 1e-5, rtol: float = 1e-6, atol: float = 1e-8, scale: bool = True,
           ones: bool = False, forward: bool = False, dtype: str = "float64", where: Any = None, total: bool = False,
           at_once: bool = False) -> bool:
    """A gradient test with one thing wrong."""
    x = x.astype(dtype)
    dy = np.ones(x.shape) if ones else np.random.default_rng(0).standard_normal(x.shape)
    measured, claimed = np.zeros(x.shape), df(x, dy)
    for i in np.ndindex(*x.shape):
        step = np.zeros(x.shape, dtype)
        step[i] = eps
        measured[i] = (dy * (f(x + step) - (f(x) if forward else f(x - step)))).sum() / (eps if forward else 2 * eps)
    if at_once:
        measured = dy * (f(x + eps) - f(x - eps)) / (2 * eps)
    if where is not None:
        measured, claimed = measured[where], claimed[where]
    if total:
        measured, claimed = measured.sum(), claimed.sum()
    return bool(np.allclose(claimed, measured, rtol=rtol, atol=atol * (np.abs(measured).max() if scale else 1.0)))


def _moved(f: Any, df: Any, x: Array) -> bool:
    right = _check(f, df, x)
    x += 1e-5
    return right


gradient_test = Exercise(
    id="01.4", name="gradient_test", title="Write a test that a wrong gradient fails", difficulty=2, minutes=20, laws=(_tried,),
    hints=("Draw one random dy. The claimed gradient is df(x, dy), the measured one belongs to Σ dy ⊙ f(x).",
           "For each element: a copy of x with ε added there, another with ε taken away; the slope is the difference over 2ε.",
           "np.allclose(claimed, slopes, rtol=1e-6, atol=…): make atol a small part of the largest slope."),
    mistakes=(
        Mistake(TRIALS[0][2], lambda f, df, x: False),
        Mistake(TRIALS[0][2], partial(_check, forward=True)),
        Mistake(TRIALS[0][2], partial(_check, eps=1e-12)),
        Mistake(TRIALS[0][2], partial(_check, dtype="float32")),
        Mistake(TRIALS[1][2], lambda f, df, x: True),
        Mistake(TRIALS[4][2], partial(_check, at_once=True)),
        Mistake(TRIALS[5][2], partial(_check, ones=True, scale=False)),
        Mistake(TRIALS[2][2], partial(_check, where=(0, 0))),
        Mistake(TRIALS[3][2], partial(_check, total=True)),
        Mistake(TRIALS[6][2], partial(_check, rtol=0.0, atol=1e-6, scale=False)),
        Mistake(TRIALS[7][2], partial(_check, atol=1e-4, scale=False)),
        Mistake(TRIALS[8][2], partial(_check, rtol=1e-3)),
        Mistake("x is not what it was before the test: work on a copy", _moved),
        Mistake("return True or False; got float", lambda f, df, x: float(np.abs(df(x, np.ones_like(x))).max())),
    ))

EXERCISES = (tanh_times, softmax_op, bug_hunt, gradient_test)
