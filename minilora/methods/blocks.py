"""A frozen weight in blocks of a few bits, multiplied a part of its rows at a time, in the place of a dense one.

A dense copy of the whole never exists but in `dense()`, and a part dies with its product.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

from ..backend import Array, array_module, kernels, to_device
from ..lora import TargetConfig
from ..lora.config import find_targets
from ..nn import Linear, Module, PackedLinear, Transformer

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


class Rows:
    """The weights of q, k and v as one weight (3D, in): each stays in its blocks, and they multiply one after the other."""

    def __init__(self, blocks: list[BlockWeight]) -> None:
        self.blocks, self.compute_dtype = blocks, blocks[0].compute_dtype
        self.shape = sum(b.shape[0] for b in blocks), blocks[0].shape[1]

    def dense(self) -> Array:
        return array_module(self.blocks[0].codes).concatenate([b.dense() for b in self.blocks])

    def linear(self, x: Array) -> Array:
        return array_module(x).concatenate([b.linear(x) for b in self.blocks], axis=-1)

    def linear_grad(self, dy: Array) -> Array:
        total, start = None, 0
        for b in self.blocks:
            part = b.linear_grad(dy[..., start : start + b.shape[0]])
            total, start = part if total is None else total + part, start + b.shape[0]
        return total


class BlocksPacked(PackedLinear):
    """A PackedLinear whose row blocks have weights of a few bits. The layers (and what will sit on them) are the old ones."""

    def __init__(self, old: PackedLinear) -> None:
        self.packed_weight, self.packed_bias, self.sizes = None, old.packed_bias, old.sizes
        self.blocks, self.adaptation = old.blocks, None

    @property
    def weight(self) -> Any:
        return Rows([b.weight for b in self.blocks.values()])

    def parts(self) -> list[tuple[slice, Linear]]:
        slices = self._slices()
        return [(slice(0, sum(self.sizes.values())), self), *((slices[n], b) for n, b in self.blocks.items())]

    def move(self, device: str) -> None:
        self.packed_bias = None if self.packed_bias is None else to_device(self.packed_bias, device)
        self._view_blocks()

    def _view_blocks(self) -> None:
        if self.packed_bias is not None:
            for name, block in self._slices().items():
                self.blocks[name].bias.data = self.packed_bias[block]


def replace_weights(model: Transformer, new: Callable[[str, Any], Any]) -> None:
    """Freeze the model, and put new(path, layer) in the place of every linear weight but head and classifier."""
    model.freeze()
    found: dict[str, Any] = {path: layer for path, _, layer in find_targets(model, TargetConfig(target_modules="all-linear"))}
    for path, layer in [(path, layer) for path, layer in found.items() if isinstance(layer, PackedLinear)]:
        found |= {path.replace("qkv_proj", name): block for name, block in layer.blocks.items()}
        found.pop(path)
    for module in [module for _, module in model.named_modules()]:
        for name, layer in vars(module).items():
            if isinstance(layer, PackedLinear):
                setattr(module, name, BlocksPacked(layer))
    for path, layer in found.items():
        layer.weight = new(path, layer)
