"""Is a gradient right? Compare it with the slope that finite differences measure.

For a function f and a random cotangent c, the analytic gradient of g(x) = Σ c ⊙ f(x) must equal, element by element,
    (g(x + ε e_i) - g(x - ε e_i)) / 2ε            (central differences, error ~ ε² + rounding/ε)
or  Im g(x + i h e_i) / h                         (the complex step, exact to rounding, where f accepts complex numbers).

The cotangent is random, never all ones: the outputs of a softmax sum to 1, so with ones even a backward that returns zero
would pass. Everything is float64, where ε = 1e-5 leaves an error of about 1e-10; in float32 the method fails.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ..backend import device_of, to_device, to_host
from .tensor import Tensor, no_grad, tensor


class GradcheckError(AssertionError):
    """A gradient disagrees with finite differences. The message says where and by how much."""


def gradcheck(fn: Callable[..., Any], inputs: Sequence[Any], *, eps: float = 1e-5, rtol: float = 1e-6, atol: float = 1e-8,
              seed: int = 0, method: str = "central", directions: int | None = None) -> bool:
    """Check the gradients of fn(*inputs) towards every floating-point input; True, or raises GradcheckError.

    fn: takes Tensors, returns a Tensor or a tuple of them. inputs: arrays, or Tensors (a model's parameters, say; these are
    perturbed in place and put back). eps: the step. A slope passes if |analytic - numeric| ≤ atol + rtol·|numeric|.
    seed: of the cotangent and the directions. method: "central", or "complex" for the complex step (h = 1e-20) where fn is
    made of analytic operations. directions: None compares every element; a number compares the slope along that many
    random directions instead, for whole models.

    Raises TypeError for float32 inputs, ValueError for an unknown method.
    """
    if method not in ("central", "complex"):
        raise ValueError(f"method {method!r}: expected 'central' or 'complex'")
    tensors = [x if isinstance(x, Tensor) else _input(x) for x in inputs]
    checked = [i for i, t in enumerate(tensors) if t.requires_grad]
    if not checked:
        raise ValueError("nothing to check: no input is floating-point with requires_grad=True")
    for i in checked:
        if tensors[i].dtype != np.float64:
            raise TypeError(f"input {i} is {tensors[i].dtype}, expected float64: in less precision differences are noise")

    rng = np.random.default_rng(seed)
    for i in checked:
        tensors[i].grad = None
    outputs = _outputs(fn(*tensors))
    cotangents = [rng.standard_normal(y.shape) for y in outputs]
    total: Any = None
    for y, c in zip(outputs, cotangents, strict=True):
        term = (y * to_device(c, _device(y))).sum()
        total = term if total is None else total + term
    if not total.requires_grad:
        raise GradcheckError("the result does not depend on any input that requires a gradient: is the graph cut somewhere?")
    total.backward()

    def value() -> complex:
        with no_grad():
            return sum((to_host(y.data) * c).sum() for y, c in zip(_outputs(fn(*tensors)), cotangents, strict=True))

    for i in checked:
        t = tensors[i]
        analytic = np.zeros(t.shape) if t.grad is None else to_host(t.grad)
        steps = _unit_steps(t.shape) if directions is None else _random_steps(t.shape, directions, rng)
        for where, step in steps:
            if method == "central":
                slope = _central(t, step, eps, value)
            else:
                slope = _complex(t, step, value, [tensors[j] for j in checked])
            expected = float((analytic * step).sum())
            if not abs(expected - slope) <= atol + rtol * abs(slope):
                raise GradcheckError(_message(i, t, where, expected, slope, atol + rtol * abs(slope)))
    return True


def _central(t: Tensor, step: np.ndarray, eps: float, value: Callable[[], complex]) -> float:
    """The slope along `step`, moving the tensor's own array there and back."""
    start = t.data.copy()
    try:
        t.data[...] = to_device(to_host(start) + eps * step, _device(t))
        above = value()
        t.data[...] = to_device(to_host(start) - eps * step, _device(t))
        below = value()
    finally:
        t.data[...] = start
    return (above - below).real / (2.0 * eps)


def _complex(t: Tensor, step: np.ndarray, value: Callable[[], complex], tensors: list[Tensor], h: float = 1e-20) -> float:
    """The slope along `step`. All `tensors` are complex meanwhile, so that ops may add one to another in place."""
    starts = [other.data for other in tensors]
    try:
        for other in tensors:
            other.data = other.data.astype("complex128")
        t.data += to_device(1j * h * step, _device(t))
        result = value()
    finally:
        for other, start in zip(tensors, starts, strict=True):
            other.data = start
    if not np.iscomplexobj(result):
        raise TypeError("the complex step needs a function that keeps complex numbers; this one returned a real number: "
                        "use method='central'")
    return result.imag / h


def _unit_steps(shape: tuple[int, ...]) -> Any:
    for where in np.ndindex(*shape):
        step = np.zeros(shape)
        step[where] = 1.0
        yield where, step


def _random_steps(shape: tuple[int, ...], count: int, rng: np.random.Generator) -> Any:
    for n in range(count):
        step = rng.standard_normal(shape)
        yield f"random direction {n}", step / np.linalg.norm(step)


def _message(i: int, t: Tensor, where: Any, analytic: float, numeric: float, allowed: float) -> str:
    place = f"element {where}" if isinstance(where, tuple) else where
    hint = ""
    if analytic == 0.0:
        hint = "; the backward gives zero here: is a term missing, or the graph cut?"
    elif numeric and abs(analytic / numeric + 1.0) < 1e-4:
        hint = "; the sign is wrong"
    elif numeric and abs(analytic / numeric) > 1e-12:
        hint = f"; the ratio is {analytic / numeric:.6g}"
    return (f"wrong gradient for input {i} (shape {t.shape}) at {place}: backward gives {analytic:.10g}, "
            f"finite differences give {numeric:.10g}, difference {abs(analytic - numeric):.3g}, allowed {allowed:.3g}{hint}")


def _outputs(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def _input(x: Any) -> Tensor:
    array = x if hasattr(x, "dtype") else np.asarray(x)        # numbers and lists are float64 here
    return tensor(array, requires_grad=array.dtype.kind == "f")


def _device(t: Tensor) -> str:
    return device_of(t.data).name
