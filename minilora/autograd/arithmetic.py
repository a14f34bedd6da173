"""Elementwise arithmetic, sums and maxima: the ops whose gradients fit on one line.

ȳ stands for the cotangent, the gradient of the loss with respect to the result. Where shapes were broadcast the engine sums
the gradients down again (tensor.unbroadcast), so nothing here mentions it.
"""

from __future__ import annotations

from typing import Any

from ..backend import array_module, kernels
from .tensor import Op


class Add(Op):
    """y = a + b.   ā = ȳ,   b̄ = ȳ."""

    def forward(self, a, b):
        return kernels(a, b).add(a, b)

    def backward(self, dy):
        return dy, dy


class Subtract(Op):
    """y = a - b.   ā = ȳ,   b̄ = -ȳ."""

    def forward(self, a, b):
        return a - b

    def backward(self, dy):
        return dy, -dy if self.needs[1] else None


class Multiply(Op):
    """y = a b.   ā = ȳ b,   b̄ = ȳ a.   Each factor is kept only if the other one needs a gradient."""

    def forward(self, a, b):
        self.keep(a if self.needs[1] else None, b if self.needs[0] else None)
        return a * b

    def backward(self, dy):
        a, b = self.kept
        return dy * b if self.needs[0] else None, dy * a if self.needs[1] else None


class Divide(Op):
    """y = a / b.   ā = ȳ / b,   b̄ = -ȳ a / b² = -ȳ y / b."""

    def forward(self, a, b):
        y = a / b
        self.keep(b, y if self.needs[1] else None)
        return y

    def backward(self, dy):
        b, y = self.kept
        da = dy / b
        return da, -da * y if self.needs[1] else None


class Negate(Op):
    """y = -a.   ā = -ȳ."""

    def forward(self, a):
        return -a

    def backward(self, dy):
        return -dy


class Power(Op):
    """y = a^c for a constant c.   ā = ȳ c a^(c-1)."""

    def __init__(self, exponent: float) -> None:
        self.exponent = exponent

    def forward(self, a):
        return self.keep(a) ** self.exponent

    def backward(self, dy):
        if self.exponent == 0:
            return dy * 0.0
        return dy * (self.exponent * self.kept ** (self.exponent - 1))


class Exp(Op):
    """y = e^a.   ā = ȳ y."""

    def forward(self, a):
        return self.keep(array_module(a).exp(a))

    def backward(self, dy):
        return dy * self.kept


class Log(Op):
    """y = ln a.   ā = ȳ / a."""

    def forward(self, a):
        return array_module(a).log(self.keep(a))

    def backward(self, dy):
        return dy / self.kept


class Tanh(Op):
    """y = tanh a.   ā = ȳ (1 - y²)."""

    def forward(self, a):
        return self.keep(array_module(a).tanh(a))

    def backward(self, dy):
        return dy * (1.0 - self.kept * self.kept)


class Sqrt(Op):
    """y = √a.   ā = ȳ / (2 y)."""

    def forward(self, a):
        return self.keep(array_module(a).sqrt(a))

    def backward(self, dy):
        return dy * 0.5 / self.kept


class Where(Op):
    """y = a where the condition holds, b elsewhere.   Each cotangent goes to the side that was chosen."""

    def forward(self, condition, a, b):
        self.keep(condition)
        return array_module(condition, a, b).where(condition, a, b)

    def backward(self, dy):
        return None, dy * self.kept, dy * ~self.kept


class Sum(Op):
    """y = Σ a over `axis` (None: over all).   Every summand gets the same cotangent: ā = ȳ, copied along the axis."""

    def __init__(self, axis: Any = None, keepdims: bool = False) -> None:
        self.axis, self.keepdims = axis, keepdims

    def forward(self, a):
        self.keep(a.shape)
        return a.sum(axis=self.axis, keepdims=self.keepdims)

    def backward(self, dy):
        return array_module(dy).broadcast_to(restore_axes(dy, self.axis, self.keepdims), self.kept)


class Max(Op):
    """y = max a over `axis` (None: over all).   ȳ goes to the largest element; elements that tie share it equally."""

    def __init__(self, axis: Any = None, keepdims: bool = False) -> None:
        self.axis, self.keepdims = axis, keepdims

    def forward(self, a):
        y = a.max(axis=self.axis, keepdims=True)
        self.keep(a == y)
        return y if self.keepdims else y.squeeze(self.axis)

    def backward(self, dy):
        largest = self.kept
        winners = largest.sum(axis=self.axis, keepdims=True).astype(dy.dtype)
        return restore_axes(dy, self.axis, self.keepdims) / winners * largest


def restore_axes(dy: Any, axis: Any, keepdims: bool) -> Any:
    """Give a reduced array its summed axes back with length 1. (One that was summed over all, 0-d, broadcasts as it is.)"""
    return dy if keepdims or axis is None else array_module(dy).expand_dims(dy, axis)
