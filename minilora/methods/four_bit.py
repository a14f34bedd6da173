"""A frozen weight in 4 bits: NF4 or FP4 codes, two a byte, one scale for 64 numbers (Dettmers et al. 2023, 2305.14314)."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ..backend import Array, array_module, device_of, to_device
from ..nn import Module
from .codes import byte_values, code_values, nearest

BLOCK, OUTER = 64, 256                                     # numbers for a scale, scales for a scale of scales
ROWS = 1 << 20                                             # numbers that are dense at one time


class FourBit(Module):
    """W (out, in) as codes: W_i ≈ c_b · value[code_i] for the i-th number, in block b = i // 64, with c_b = max |W| of it.

    0.5 bytes a number, and 4/64 for c in float32. double_quant stores c - mean(c) in 8 bits with a scale for 256 of them
    instead: 1/64 + 4/(64·256), together 0.516 bytes. It multiplies a part of its rows at a time, so that a dense copy of the
    whole never exists but in `dense()`.
    """

    def __init__(self, W: Array, quant_type: str = "nf4", double_quant: bool = True) -> None:
        xp = array_module(W)
        self.shape, self.compute_dtype, self.quant_type = W.shape, W.dtype, quant_type
        flat = xp.zeros(-(-W.size // BLOCK) * BLOCK, dtype=W.dtype)
        flat[: W.size] = W.reshape(-1)
        blocks = flat.reshape(-1, BLOCK)
        scales = abs(blocks).max(axis=1)                   # (blocks,)
        self.mean: Any = 0.0
        self.scales, self.outer = scales.astype("float32"), None
        if double_quant:
            self.mean = float(scales.mean())
            padded = xp.zeros(-(-len(scales) // OUTER) * OUTER, dtype="float32")
            padded[: len(scales)] = scales - self.mean
            grid = padded.reshape(-1, OUTER)
            self.outer = abs(grid).max(axis=1)
            self.scales = nearest(grid / xp.where(self.outer > 0, self.outer, 1.0).astype("float32")[:, None], byte_values())
            self.scales = self.scales.reshape(-1)[: len(scales)]
        unit = blocks / xp.where(scales > 0, scales, 1.0).astype(W.dtype)[:, None]         # a block of zeros stays zeros
        codes = nearest(unit, code_values(quant_type)).reshape(-1, 2)
        self.codes = codes[:, 0] * 16 + codes[:, 1]        # the first in the high bits

    @property
    def nbytes(self) -> int:
        """Bytes of everything that is stored."""
        return self.codes.nbytes + self.scales.nbytes + (0 if self.outer is None else self.outer.nbytes + 4)

    def block_scales(self) -> Array:                       # -> (blocks,)
        """c of every block."""
        if self.outer is None:
            return self.scales.astype(self.compute_dtype)
        xp = array_module(self.codes)
        table = to_device(byte_values().astype(self.compute_dtype), device_of(self.codes).name)
        return table[self.scales] * xp.repeat(self.outer, OUTER)[: len(self.scales)].astype(self.compute_dtype) + self.mean

    def rows(self, start: int, stop: int, scales: Array) -> Array:         # -> (stop - start, in)
        """Some rows, dense. They may begin and end inside a block."""
        d_in = self.shape[1]
        first, last = start * d_in // BLOCK, -(-stop * d_in // BLOCK)
        values = code_values(self.quant_type).astype(self.compute_dtype)
        pairs = np.stack([np.repeat(values, 16), np.tile(values, 16)], axis=1)             # byte -> its two values
        table = to_device(pairs, device_of(self.codes).name)
        dense = table[self.codes[first * BLOCK // 2 : last * BLOCK // 2]].reshape(-1, BLOCK) * scales[first:last, None]
        skip = start * d_in - first * BLOCK
        return dense.reshape(-1)[skip : skip + (stop - start) * d_in].reshape(-1, d_in)

    def parts(self) -> Any:
        """(rows, their dense weight), a few at a time."""
        step, scales = max(1, math.ceil(ROWS / self.shape[1])), self.block_scales()
        for start in range(0, self.shape[0], step):
            stop = min(start + step, self.shape[0])
            yield slice(start, stop), self.rows(start, stop, scales)

    def dense(self) -> Array:                              # -> (out, in)
        return array_module(self.codes).concatenate([part for _, part in self.parts()])

    def linear(self, x: Array) -> Array:                   # (..., in) -> (..., out)
        y = array_module(x).empty((*x.shape[:-1], self.shape[0]), dtype=x.dtype)
        for rows, W in self.parts():
            y[..., rows] = x @ W.T
        return y

    def linear_grad(self, dy: Array) -> Array:             # (..., out) -> (..., in)
        return sum(dy[..., rows] @ W for rows, W in self.parts())

    def move(self, device: str) -> None:
        self.codes, self.scales = to_device(self.codes, device), to_device(self.scales, device)
        self.outer = None if self.outer is None else to_device(self.outer, device)
