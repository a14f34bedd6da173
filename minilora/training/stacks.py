"""K adapters on one layer as one adapter, whose parameters have a leading axis K: what a sweep trains.

Arrays of different ranks are filled up with zeros. For the methods that stand here and in methods/stacks.py the gradient of
each added entry is a product with another added entry, so it is zero, and the entry stays zero.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ..autograd import Tensor, matmul
from ..backend import Array, device_of, to_device, to_host
from ..lora import Adapter, LoRA, Replacement
from ..nn import Parameter


class Stack(Adapter):
    """The parameters of K adapters of one method, each p as (K, largest shape of p)."""

    rowwise = False                                                # the rows of a batch are K groups
    goes_with: tuple[type, ...] = ()                               # other stacks, whose adapters this one takes as well
    companion: Callable[[dict[str, Any], Sequence[Any]], Any] | None = None    # what goes on beside the steps; see `Companion`

    def __init__(self, adapters: Sequence[Adapter]) -> None:
        own = [dict(adapter.named_parameters()) for adapter in adapters]
        self.shapes = [{name: p.shape for name, p in parameters.items()} for parameters in own]
        for name in own[0]:
            setattr(self, name, Parameter(side_by_side([parameters[name].data for parameters in own])))

    def unstacked(self) -> list[dict[str, np.ndarray]]:
        """The parameters of each adapter, cut to its own shapes, on the host."""
        arrays = {name: to_host(p) for name, p in self.named_parameters()}
        return [{name: arrays[name][k][tuple(map(slice, shape))].copy() for name, shape in shapes.items()}
                for k, shapes in enumerate(self.shapes)]


class Companion:
    """What some methods do beside the optimiser, for all their stacks of a chunk together: made from (stacks, configs)."""

    def penalty(self) -> Tensor | None:                            # () -> (K,)
        """What is added to the K losses of each step."""
        return None

    def after(self, step: int, lrs: np.ndarray) -> None:           # lrs (K,): the rates of this update
        """Called after update number `step` (from 1), with its gradients still in place."""


class ProductStack(Stack):
    """K adapters whose updates are products: W'_k = W + s_k B_k A_k with factors A (K, r_max, in) and B (K, out, r_max)."""

    def set_scales(self, scales: Sequence[float]) -> None:
        """s of each adapter, for the last element of `factors`."""
        p = next(p for _, p in self.named_parameters())
        self.scales = to_device(np.array(scales, p.dtype), device_of(p.data).name)             # (K,)

    def adapted_weight(self, W: Tensor) -> Tensor:                 # (out, in) -> (K, out, in)
        A, B, scales = self.factors()
        return W + matmul(B * scales[:, None, None], A)

    def factors(self) -> tuple[Any, Any, Array]:
        raise TypeError(f"{type(self).__name__} defines no factors")


class LoRAStack(ProductStack):
    """K LoRA adapters on one layer."""

    lora_A: Parameter
    lora_B: Parameter

    def __init__(self, adapters: Sequence[LoRA]) -> None:
        super().__init__(adapters)
        self.set_scales([a.scale for a in adapters])

    def factors(self) -> tuple[Any, Any, Array]:
        return self.lora_A, self.lora_B, self.scales


class ReplacementStack(Stack):
    """K whole layers in one place (a classifier that is trained with each adapter): weight (K, out, in), bias (K, out)."""

    weight: Parameter
    bias: Parameter | None = None

    def forward(self, x: Tensor, base: Any) -> Tensor:             # (K·B, …, in) -> (K·B, …, out)
        K, out, _ = self.weight.shape
        y = matmul(x.reshape(K, -1, x.shape[-1]), self.weight.transpose(0, 2, 1))
        return (y if self.bias is None else y + self.bias.reshape(K, 1, out)).reshape(*x.shape[:-1], out)


STACKS: dict[type, Any] = {LoRA: LoRAStack, Replacement: ReplacementStack}     # methods/stacks.py has more


def stack_for(adapters: Sequence[Adapter]) -> Any:
    """The class that takes all these adapters of one module side by side, or None."""
    kinds = {STACKS.get(type(adapter)) for adapter in adapters}
    return next((kind for kind in kinds if kind and kinds <= {kind, *kind.goes_with}), None)


def side_by_side(arrays: Sequence[Array]) -> Array:                # K arrays -> (K, largest shape), on their device
    """Arrays along a new first axis, each filled up with zeros to the largest of them."""
    shape = np.max([a.shape for a in arrays], axis=0)
    whole = np.zeros((len(arrays), *shape), arrays[0].dtype)
    for own, array in zip(whole, arrays):
        own[tuple(map(slice, array.shape))] = to_host(array)
    return to_device(whole, device_of(arrays[0]).name)
