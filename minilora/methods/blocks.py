"""A frozen weight in blocks of a few bits, multiplied a part of its rows at a time.

A dense copy of the whole never exists but in `dense()`, and a part dies with its product.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from ..backend import Array, array_module, kernels
from ..nn import Module

ROWS = 1 << 20                                             # numbers that are dense at one time


class BlockWeight(Module):
    """W (out, in), row after row in blocks of `size` numbers. A format says how it stores them and defines `decode`."""

    size: int                                              # numbers in a block
    codes: Array                                           # what the blocks are stored in; tells the device
    shape: tuple[int, int]
    compute_dtype: Any                                     # of the dense numbers, and of x and y

    def decode(self, blocks: slice, out: Array) -> None:   # out (n, size)
        """Write the numbers of some blocks."""
        raise TypeError(f"{type(self).__name__} defines no decode")

    def rows(self, start: int, stop: int) -> Array:        # -> (stop - start, in)
        """Some rows, dense. They may begin and end inside a block."""
        d_in, K = self.shape[1], kernels(self.codes)
        first, last = start * d_in // self.size, -(-stop * d_in // self.size)
        dense = array_module(self.codes).empty((last - first, self.size), dtype=self.compute_dtype)
        K.side_by_side(lambda part: self.decode(slice(first + part.start, first + part.stop), dense[part]),
                       K.shards(len(dense), dense.size))
        skip = start * d_in - first * self.size
        return dense.reshape(-1)[skip : skip + (stop - start) * d_in].reshape(-1, d_in)

    def parts(self) -> Iterator[tuple[slice, Array]]:
        """(rows, their dense weight), a few at a time."""
        step = max(1, math.ceil(ROWS / self.shape[1]))
        for start in range(0, self.shape[0], step):
            rows = slice(start, min(start + step, self.shape[0]))
            yield rows, self.rows(rows.start, rows.stop)

    def dense(self) -> Array:                              # -> (out, in)
        parts = [part for _, part in self.parts()]
        return parts[0] if len(parts) == 1 else array_module(self.codes).concatenate(parts)

    def linear(self, x: Array) -> Array:                   # (..., in) -> (..., out)
        y = [kernels(x).matmul(x, W, tb=True) for _, W in self.parts()]
        return y[0] if len(y) == 1 else array_module(x).concatenate(y, axis=-1)

    def linear_grad(self, dy: Array) -> Array:             # (..., out) -> (..., in)
        total = None
        for rows, W in self.parts():
            part = kernels(dy).matmul(dy[..., rows], W)
            total = part if total is None else total + part
        return total
