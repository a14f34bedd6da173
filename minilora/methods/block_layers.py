"""Weights of a few bits in the places of a model's dense ones, one by one or as q, k and v together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..backend import Array, array_module, to_device
from ..lora import TargetConfig
from ..lora.config import find_targets
from ..nn import Linear, PackedLinear, Transformer
from .blocks import BlockWeight


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
