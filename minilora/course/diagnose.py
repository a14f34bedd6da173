"""What the numbers of a wrong answer say by themselves: a shape, a transpose, a sign, a missing factor, a zero.

Nothing here knows an exercise. Each rule compares one output with what the oracle says, and the first that holds names the
error, without ever printing the right number.
"""

from __future__ import annotations

from typing import Any

import numpy as np


def agree(got: Any, expected: Any, rtol: float) -> bool:
    """Whether two answers are the same: shape for shape, float64 to rtol of the largest entry, anything else exactly."""
    if isinstance(expected, tuple | list):
        return (isinstance(got, tuple | list) and len(got) == len(expected)
                and all(agree(one, other, rtol) for one, other in zip(got, expected, strict=True)))
    if not _numeric(expected):
        return type(got) is type(expected) and bool(got == expected)
    if not _numeric(got):
        return False
    a, b = np.asarray(got), np.asarray(expected)
    if a.shape != b.shape or a.dtype == np.float32:
        return False
    if np.issubdtype(b.dtype, np.inexact):
        scale = np.abs(b[np.isfinite(b)]).max(initial=0.0)
        return bool(np.allclose(a, b, rtol=0.0, atol=rtol * scale if scale else rtol, equal_nan=False))
    return bool(np.array_equal(a, b))


def diagnose(got: Any, expected: Any, outputs: tuple[str, ...], scalars: dict[str, float], rtol: float) -> str | None:
    """None if got agrees with expected, else one line that says what is wrong with it.

    outputs: the names of the outputs, or () for one unnamed value. scalars: numbers whose missing factor may be named.
    """
    if not outputs:
        return _one("the answer", got, expected, scalars, rtol)
    if not isinstance(got, tuple | list) or len(got) != len(outputs):
        count = f"{len(got)} outputs" if isinstance(got, tuple | list) else f"one {type(got).__name__}"
        return f"expected {len(outputs)} outputs ({', '.join(outputs)}), got {count}"
    if len(outputs) > 1 and agree(tuple(got), tuple(reversed(expected)), rtol) and not agree(got, tuple(expected), rtol):
        return f"the outputs are in the wrong order; return {', '.join(outputs)}"
    for name, mine, right in zip(outputs, got, expected, strict=True):
        hint = _one(name, mine, right, scalars, rtol)
        if hint is not None:
            return hint
    return None


def _one(name: str, got: Any, expected: Any, scalars: dict[str, float], rtol: float) -> str | None:
    """The first rule that one output breaks."""
    if agree(got, expected, rtol):
        return None
    if not _numeric(expected):
        return f"{name}: not right (got {got!r})" if type(got) is type(expected) else (
            f"{name}: expected a {type(expected).__name__}, got {type(got).__name__}")
    if not _numeric(got):
        return f"{name}: expected numbers, got {type(got).__name__}"
    a, b = np.asarray(got), np.asarray(expected)
    if a.shape != b.shape:
        if a.shape == b.shape[::-1]:
            return f"{name}: transposed; expected shape {b.shape}, got {a.shape}"
        return f"{name}: expected shape {b.shape}, got {a.shape}"
    if a.dtype == np.float32:
        return f"{name}: computed in float32, whose rounding hides small errors; keep the inputs' float64"
    if np.isnan(a).any():
        return f"{name}: contains NaN"
    if np.isinf(a).any() and not np.isinf(b).any():
        return f"{name}: contains infinity"
    if a.size < 2:
        return f"{name}: not right (got {a.item()})"
    return _array(name, a.astype(float), b.astype(float), scalars, rtol)


def _array(name: str, a: np.ndarray, b: np.ndarray, scalars: dict[str, float], rtol: float) -> str:
    """What two arrays of one shape, with more than one entry, tell about each other."""
    if not a.any():
        return f"{name}: all zero"
    if agree(-a, b, rtol):
        return f"{name}: the sign is wrong"
    if a.ndim == 2 and a.shape[0] == a.shape[1] and agree(np.ascontiguousarray(a.T), b, rtol):
        return f"{name}: transposed"
    finite = np.isfinite(a) & np.isfinite(b)
    factor = float((a[finite] * b[finite]).sum() / max(float((a[finite] ** 2).sum()), 1e-300))        # b = factor · a
    if np.isfinite(a).all() and agree(a * factor, b, rtol):
        for scalar, value in scalars.items():
            for times, written in ((value, scalar), (1 / (value or 1.0), f"1/{scalar}"), (value**2, f"{scalar}²")):
                if times not in (0, 1) and abs(factor / times - 1) < 1e-6:
                    return f"{name}: a factor {written} is missing"
        return f"{name}: right up to a constant factor; yours is {1 / factor:.4g} times too large"
    if np.ptp(a) == 0:
        return f"{name}: every entry is {a.flat[0]:.4g}"
    wrong = ~np.isclose(a, b, rtol=0.0, atol=rtol * max(float(np.abs(b[finite]).max(initial=0.0)), 1e-300))
    where = tuple(int(i) for i in np.argwhere(wrong)[0])
    if wrong.ndim > 1 and wrong.reshape(len(wrong), -1).any(1).sum() == 1 and len(wrong) > 1:
        return f"{name}: only row {where[0]} is wrong"
    return f"{name}: {int(wrong.sum())} of {wrong.size} entries are wrong, the first at {list(where)}"


def _numeric(value: Any) -> bool:
    """Whether a value is a number or an array of numbers (truth values, text and sets are compared exactly, as they are)."""
    if isinstance(value, np.ndarray):
        return np.issubdtype(value.dtype, np.number)
    return isinstance(value, int | float | np.number) and not isinstance(value, bool)
