"""A frozen weight in the 4-bit blocks of llama.cpp's files, Q4_0 and Q4_1, used as the file has them."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..backend import Array, array_module, to_device
from .blocks import BlockWeight

HEADERS = {"Q4_0": 1, "Q4_1": 2}                           # half-precision numbers before the codes of a block


class GgmlBlocks(BlockWeight):
    """W (out, in) in blocks of 32:  W_i = d (q_i - 8) in Q4_0, 18 bytes (0.5625 a number);  d q_i + m in Q4_1, 20 (0.625).

    d and m in float16, then 16 bytes: the low four bits are q of the first half of the block, the high ones of the second.
    The arithmetic is the gguf library's, in float32, so the numbers are those of a dense load bit for bit, in any dtype.

    raw (out, bytes of a row), uint8. Raises ValueError for another kind, or scales that are not finite.
    """

    size = 32

    def __init__(self, raw: Array, kind: str, dtype: Any = "float32") -> None:
        if kind not in HEADERS:
            raise ValueError(f"blocks of type {kind}, expected one of {', '.join(HEADERS)}: load it dense and take NF4, by "
                             "quantise(model) or --quantise nf4")
        self.kind, self.compute_dtype, head = kind, np.dtype(dtype), 2 * HEADERS[kind]
        self.shape = len(raw), raw.shape[1] // (head + 16) * 32
        blocks, xp = raw.reshape(-1, head + 16), array_module(raw)
        self.scales = xp.ascontiguousarray(blocks[:, :head]).view("float16")               # (blocks, 1 or 2)
        self.codes = xp.ascontiguousarray(blocks[:, head:])                                # (blocks, 16)
        if not bool(xp.isfinite(self.scales).all()):
            raise ValueError("blocks with scales that are NaN or infinite, expected finite numbers: copy or download it again")

    @property
    def nbytes(self) -> int:
        """Bytes of everything that is stored."""
        return self.codes.nbytes + self.scales.nbytes

    def decode(self, blocks: slice, out: Array) -> None:   # out (n, 32)
        exact = out if out.dtype == np.float32 else array_module(out).empty(out.shape, dtype="float32")
        q, scales, halves = self.codes[blocks], self.scales[blocks].astype("float32"), exact.reshape(-1, 2, 16)
        halves[:, 0], halves[:, 1] = q & 15, q // 16
        if self.kind == "Q4_0":
            exact -= 8.0
        exact *= scales[:, :1]
        if self.kind == "Q4_1":
            exact += scales[:, 1:]
        if exact is not out:
            out[...] = exact

    def move(self, device: str) -> None:
        self.codes, self.scales = to_device(self.codes, device), to_device(self.scales, device)
