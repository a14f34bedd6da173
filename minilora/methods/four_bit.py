"""A frozen weight in 4 bits: NF4 or FP4 codes, two a byte, one scale for 64 numbers (Dettmers et al. 2023, 2305.14314)."""

from __future__ import annotations

from typing import Any

from ..backend import Array, array_module, device_of, to_device
from .blocks import BlockWeight
from .codes import byte_values, code_pairs, code_values, nearest

BLOCK, OUTER = 64, 256                                     # numbers for a scale, scales for a scale of scales


class FourBit(BlockWeight):
    """W (out, in) as codes: W_i ≈ c_b · value[code_i] for the i-th number, in block b = i // 64, with c_b = max |W| of it.

    0.5 bytes a number, and 4/64 for c in float32. double_quant stores c - mean(c) in 8 bits with a scale for 256 of them
    instead: 1/64 + 4/(64·256), together 0.516 bytes.
    """

    size = BLOCK

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

    def block_scales(self, blocks: slice) -> Array:        # -> (n,)
        """c of some blocks."""
        if self.outer is None:
            return self.scales[blocks].astype(self.compute_dtype)
        xp = array_module(self.codes)
        table = to_device(byte_values().astype(self.compute_dtype), device_of(self.codes).name)
        outer = self.outer[xp.arange(blocks.start, blocks.stop) // OUTER].astype(self.compute_dtype)
        return table[self.scales[blocks]] * outer + self.mean

    def decode(self, blocks: slice, out: Array) -> None:   # out (n, 64)
        """Both values of a byte are taken from a table at once, as if they were one complex number; then the scales."""
        table = to_device(code_pairs(self.quant_type, str(out.dtype)), device_of(self.codes).name)
        pairs = table[self.codes[blocks.start * BLOCK // 2 : blocks.stop * BLOCK // 2]]
        array_module(out).multiply(pairs.view(out.dtype).reshape(-1, BLOCK), self.block_scales(blocks)[:, None], out=out)

    def move(self, device: str) -> None:
        self.codes, self.scales = to_device(self.codes, device), to_device(self.scales, device)
        self.outer = None if self.outer is None else to_device(self.outer, device)
