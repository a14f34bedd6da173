"""The layers with weights: Linear, PackedLinear, Embedding, LayerNorm, RMSNorm; and Dropout.

A Linear, Embedding or LayerNorm carries at most one `adaptation`: the object, made by lora/, that computes the layer's output
when adapters are on it. This file knows nothing more about adapters than that.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..autograd import Tensor, dropout, embedding, layer_norm, linear, rms_norm
from ..autograd.shaping import RowBlocks
from ..backend import Array, to_device
from .module import Module, Parameter


class Adaptable(Module):
    """A layer that adapters may sit on."""

    adaptation: Any = None
    bias: Any = None

    def parts(self: Any) -> list[tuple[slice, Any]]:
        """(rows of the weight, the layer that owns them): itself, and for a packed layer its blocks."""
        return [(slice(0, self.weight.shape[0]), self)]


class Linear(Adaptable):
    """y = x Wᵀ + b with weight (out, in), an array or a Parameter to share, and bias (out,) or None.

    In place of a Parameter the weight may be a frozen one with shape, compute_dtype (of x and y), dense(), linear(x) and
    linear_grad(dy), and without a dtype: a quantised base.
    """

    def __init__(self, weight: Any, bias: Array | None = None) -> None:
        is_array = hasattr(weight, "dtype") and not isinstance(weight, Parameter)
        self.weight: Any = Parameter(weight) if is_array else weight
        self.bias = None if bias is None else Parameter(bias)

    @property
    def dtype(self) -> Any:
        """The dtype of its inputs and outputs, in which adapters are made: the weight's own, or what a quantised one names."""
        return getattr(self.weight, "compute_dtype", None) or self.weight.dtype

    @property
    def plain(self) -> bool:
        """Whether the output is just x Wᵀ + b: a dense weight, and no adapter at work."""
        return isinstance(self.weight, Parameter) and (self.adaptation is None or not self.adaptation.terms())

    def forward(self, x: Tensor) -> Tensor:                        # (..., in) -> (..., out)
        return linear(x, self.weight, self.bias) if self.adaptation is None else self.adaptation.forward(x, self)


class PackedLinear(Linear):
    """Several Linear layers on one input as one product: the row blocks of one packed weight (q, k and v of attention).

    Each block is a Linear of its own, whose weight is a view of the packed one: writing to either writes to both. Adapters
    sit on a block (`q_proj`) or on the whole (`qkv_proj`).
    """

    def __init__(self, weight: Array, bias: Array | None, sizes: dict[str, int]) -> None:
        self.packed_weight, self.packed_bias, self.sizes = weight, bias, sizes
        self.blocks = {}
        for name, block in self._slices().items():
            self.blocks[name] = Linear(weight[block], None if bias is None else bias[block])

    def _slices(self) -> dict[str, slice]:
        slices, start = {}, 0
        for name, size in self.sizes.items():
            slices[name] = slice(start, start + size)
            start += size
        return slices

    @property
    def weight(self) -> Any:
        """The packed weight: with gradients for the blocks that require one, else a constant."""
        return self._whole(self.packed_weight, [b.weight for b in self.blocks.values()])

    @property
    def bias(self) -> Tensor | None:
        return None if self.packed_bias is None else self._whole(self.packed_bias, [b.bias for b in self.blocks.values()])

    def _whole(self, buffer: Array, parts: list[Parameter]) -> Tensor:
        return RowBlocks(buffer)(*parts) if any(p.requires_grad for p in parts) else Tensor(buffer)

    def parts(self) -> list[tuple[slice, Any]]:
        slices = self._slices()
        return [(slice(0, self.packed_weight.shape[0]), self), *((slices[n], b) for n, b in self.blocks.items())]

    def move(self, device: str) -> None:
        self.packed_weight = to_device(self.packed_weight, device)
        self.packed_bias = None if self.packed_bias is None else to_device(self.packed_bias, device)
        self._view_blocks()

    def _view_blocks(self) -> None:
        for name, block in self._slices().items():
            layer = self.blocks[name]
            layer.weight.data = self.packed_weight[block]
            if self.packed_bias is not None:
                layer.bias.data = self.packed_bias[block]

    def __setstate__(self, state: dict[str, Any]) -> None:
        """After copying or unpickling, where views became arrays of their own, make the blocks views again."""
        vars(self).update(state)
        self._view_blocks()


class Embedding(Adaptable):
    """Rows of a table: ids (...), integers on the host, where they are checked -> (..., D). weight (V, D)."""

    def __init__(self, weight: Array) -> None:
        self.weight = Parameter(weight)

    def forward(self, ids: Array) -> Tensor:
        return embedding(ids, self.weight) if self.adaptation is None else self.adaptation.look_up(ids, self)


class LayerNorm(Adaptable):
    """Layer norm over the last axis, weight and bias (D,)."""

    def __init__(self, dim: int, eps: float, dtype: str) -> None:
        self.weight = Parameter(to_device(np.ones(dim, dtype)))
        self.bias = Parameter(to_device(np.zeros(dim, dtype)))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        y = layer_norm(x, self.weight, self.bias, self.eps)
        return y if self.adaptation is None else self.adaptation.shift(y, self)


class RMSNorm(Module):
    """RMS norm over the last axis, weight (D,)."""

    def __init__(self, dim: int, eps: float, dtype: str) -> None:
        self.weight = Parameter(to_device(np.ones(dim, dtype)))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class Dropout(Module):
    """In training, zero each element with probability p and divide the others by 1-p; the identity in evaluation."""

    def __init__(self, p: float, rng: np.random.Generator) -> None:
        self.p, self.rng = p, rng

    @property
    def repeatable(self) -> bool:
        return not (self.training and self.p)

    def forward(self, x: Tensor) -> Tensor:
        return dropout(x, self.p, self.rng) if self.training and self.p else x
