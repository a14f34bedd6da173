"""What the numbers of a wrong answer say by themselves: a shape, a transpose, a sign, a missing factor, a zero.

Nothing here knows an exercise. Each rule compares one output with what the oracle says. All lines that fit are given, the most
telling first, and none ever prints the right number.
"""

from __future__ import annotations

from itertools import permutations
from typing import Any

import numpy as np

COARSE = (np.float16, np.float32, np.complex64)     # their rounding hides small errors


def agree(got: Any, expected: Any, rtol: float) -> bool:
    """Whether two answers are the same: shape for shape, float64 to rtol of the largest entry, anything else exactly.

    Lists and tuples are compared item by item, dicts key by key. NaN agrees with nothing; infinities agree with their like.
    """
    if isinstance(expected, tuple | list):
        return (isinstance(got, tuple | list) and len(got) == len(expected)
                and all(agree(one, other, rtol) for one, other in zip(got, expected, strict=True)))
    if isinstance(expected, dict):
        return (isinstance(got, dict) and got.keys() == expected.keys()
                and all(agree(got[key], value, rtol) for key, value in expected.items()))
    if not _numeric(expected):
        mine, right = _python(got), _python(expected)
        if isinstance(right, np.ndarray):                                 # truth values or text
            return (isinstance(mine, np.ndarray) and mine.shape == right.shape and mine.dtype.kind == right.dtype.kind
                    and bool((mine == right).all()))
        return _kind(mine) is _kind(right) and bool(mine == right)
    if not _numeric(got):
        return False
    a, b = np.asarray(got), np.asarray(expected)
    if a.shape != b.shape or a.dtype in COARSE or (np.iscomplexobj(a) and not np.iscomplexobj(b)):
        return False
    if np.issubdtype(b.dtype, np.inexact):
        scale = float(np.abs(b[np.isfinite(b)]).max(initial=0.0))
        with np.errstate(all="ignore"):
            return bool(np.allclose(a, b, rtol=0.0, atol=rtol * scale if scale else rtol, equal_nan=False))
    return bool(np.array_equal(a, b))


def diagnose(got: Any, expected: Any, outputs: tuple[str, ...], scalars: dict[str, float], rtol: float) -> list[str]:
    """Nothing if got agrees with expected, else the lines that say what is wrong with it; the last is the most general.

    outputs: the names of the outputs, or () for one unnamed value. scalars: numbers whose missing factor may be named.
    """
    with np.errstate(all="ignore"):
        if not outputs:
            return _one("the answer", got, expected, scalars, rtol)
        if not isinstance(got, tuple | list) or len(got) != len(outputs):
            count = f"{len(got)} outputs" if isinstance(got, tuple | list) else f"one {type(got).__name__}"
            return [f"expected {len(outputs)} outputs ({', '.join(outputs)}), got {count}"]
        if agree(got, expected, rtol):
            return []
        if 1 < len(outputs) < 5 and any(agree(got, order, rtol) for order in permutations(expected)):
            return [f"the outputs are in the wrong order; return {', '.join(outputs)}"]
        each = [_one(name, mine, right, scalars, rtol) for name, mine, right in zip(outputs, got, expected, strict=True)]
        return next(lines for lines in each if lines)


def _one(name: str, got: Any, expected: Any, scalars: dict[str, float], rtol: float) -> list[str]:
    """What the first output that differs says; nothing if it does not."""
    if agree(got, expected, rtol):
        return []
    if got is None or got is ...:
        return [f"{name}: nothing returned for it yet"]
    if not _numeric(expected):
        return [_other(name, _python(got), _python(expected))]
    if not _numeric(got):
        more = {"list": "; make it an array with np.array", "tuple": "; make it an array with np.array",
                "Tensor": "; return its .data", "generator": "; use return, not yield"}.get(type(got).__name__, "")
        return [f"{name}: expected {_numbers(expected)}, got {type(got).__name__}{more}"]
    a, b = np.asarray(got), np.asarray(expected)
    if a.shape != b.shape:
        turned = a.ndim == b.ndim > 1 and a.shape in (b.shape[::-1], np.swapaxes(b, -1, -2).shape)
        return [f"{name}: {'transposed; ' if turned else ''}expected {_numbers(expected)}, got {_numbers(got)}"]
    if a.dtype in COARSE:
        return [f"{name}: computed in {a.dtype}, whose rounding hides small errors; keep the inputs' float64"]
    if np.iscomplexobj(a) and not np.iscomplexobj(b):
        return [f"{name}: expected real numbers, got complex ones"]
    if np.isnan(a).any() and not np.isnan(b).any():
        first = f", the first at {[int(i) for i in np.argwhere(np.isnan(a))[0]]}" if a.ndim else ""
        return [f"{name}: contains NaN{first}: somewhere 0/0, ∞ − ∞, 0·∞ or the logarithm of something negative"]
    if np.isinf(a).any() and not np.isinf(b).any():
        return [f"{name}: contains infinity"]
    if a.size < 2:
        return [f"{name}: not right (got {a.item()})"]
    kind = complex if np.iscomplexobj(b) else float
    return _array(name, a.astype(kind), b.astype(kind), scalars, rtol)


def _other(name: str, got: Any, expected: Any) -> str:
    """What a wrong answer says where no number was asked for."""
    mine, right = _kind(got), _kind(expected)
    if mine is not right:
        return f"{name}: expected {_named(right)}, got {_named(mine)}"
    if isinstance(expected, dict) and got.keys() != expected.keys():
        wrong = sorted(map(str, got.keys() - expected.keys()))
        return f"{name}: {f'unexpected key {wrong[0]}' if wrong else f'{len(expected) - len(got)} keys are missing'}"
    if isinstance(expected, np.ndarray) and got.shape != expected.shape:
        return f"{name}: expected shape {expected.shape}, got {got.shape}"
    if isinstance(expected, tuple | list) and len(got) != len(expected):
        return f"{name}: expected {len(expected)} items, got {len(got)}"
    if isinstance(expected, tuple | list) and sorted(map(repr, got)) == sorted(map(repr, expected)):
        return f"{name}: the right items, in another order"
    shown = repr(got)
    return f"{name}: not right (got {shown if len(shown) < 60 else shown[:57] + '...'})"


def _array(name: str, a: np.ndarray, b: np.ndarray, scalars: dict[str, float], rtol: float) -> list[str]:
    """What two arrays of one shape, with more than one entry, tell about each other."""
    if not a.any():
        return [f"{name}: all zero"]
    if agree(-a, b, rtol):
        return [f"{name}: the sign is wrong"]
    if a.ndim > 1 and a.shape[-1] == a.shape[-2] and agree(np.swapaxes(a, -1, -2), b, rtol):
        return [f"{name}: transposed"]
    finite = np.isfinite(a) & np.isfinite(b)
    norm = float((np.abs(a[finite]) ** 2).sum())
    factor = float(np.real((a[finite].conj() * b[finite]).sum())) / norm if norm else 0.0              # b = factor · a
    if factor and np.isfinite(a).all() and agree(a * factor, b, rtol):
        found = [f"{name}: {'the sign is wrong and ' if sign < 0 else ''}a factor {written} is missing"
                 for scalar, value in scalars.items() if value
                 for times, written in ((value, scalar), (1 / value, f"1/{scalar}"), (value**2, f"{scalar}²"))
                 for sign in (1, -1) if abs(times) not in (0, 1) and abs(sign * factor / times - 1) < 1e-6]
        size = f"{1 / abs(factor):.4g} times too large" if abs(factor) < 1 else f"{abs(factor):.4g} times too small"
        return [*found, f"{name}: right up to a constant factor; yours is {size}"]
    if (a == a.flat[0]).all():
        return [f"{name}: every entry is {a.flat[0]:.4g}"]
    wrong = ~np.isclose(a, b, rtol=0.0, atol=rtol * max(float(np.abs(b[finite]).max(initial=0.0)), 1e-300))
    where = tuple(int(i) for i in np.argwhere(wrong)[0]) if wrong.any() else ()
    lines = [f"{name}: {int(wrong.sum())} of {wrong.size} entries are wrong, the first at {list(where)}"]
    if wrong.ndim > 1 and len(wrong) > 1 and wrong.reshape(len(wrong), -1).any(1).sum() == 1:
        lines.insert(0, f"{name}: only row {where[0]} is wrong")
    return lines


def _numeric(value: Any) -> bool:
    """Whether a value is a number or an array of numbers (truth values, text and sets are compared exactly, as they are)."""
    if isinstance(value, np.ndarray):
        return np.issubdtype(value.dtype, np.number)
    return isinstance(value, int | float | complex | np.number) and not isinstance(value, bool)


def _python(value: Any) -> Any:
    """NumPy's own truth values and strings as Python's."""
    alone = isinstance(value, np.generic) or (isinstance(value, np.ndarray) and value.shape == ())
    return value.item() if alone else value


def _kind(value: Any) -> type:
    """The type that decides whether two things may be equal: a frozenset is a set, a list may stand for a tuple."""
    likes: tuple[tuple[Any, type], ...] = (
        (bool, bool), (str, str), (set | frozenset, set), (tuple | list, list), (dict, dict), (np.ndarray, np.ndarray))
    return next((kind for like, kind in likes if isinstance(value, like)), type(value))


def _named(kind: type) -> str:
    names: dict[type, str] = {bool: "True or False", str: "text", set: "a set", list: "a list or tuple", dict: "a dict",
                              np.ndarray: "an array"}
    return names.get(kind, f"a {kind.__name__}")


def _numbers(value: Any) -> str:
    """A number or an array, in words that do not give its value away."""
    return f"shape {np.shape(value)}" if np.shape(value) else "one number"
