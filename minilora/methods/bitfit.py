"""BitFit: train the biases and nothing else (Ben Zaken et al. 2021, arXiv:2106.10199)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from ..autograd import Tensor
from ..backend import to_device
from ..lora import Adapter, TargetConfig, register
from ..nn import Linear, Parameter
from .files import FileFormat


@dataclass(kw_only=True)
class BitFitConfig(TargetConfig):
    """BitFit on the targeted linear layers (None: all of them but the head)."""

    method: ClassVar[str] = "bitfit"

    target_modules: list[str] | str | None = "all-linear"


@register("bitfit")
class BitFit(Adapter):
    """b' = b + c.   Trains c (out,), which starts at 0: exactly the base. W is untouched, and its input is not kept.

    The paper trains the biases of layer norms too; here they stay frozen.
    """

    leaves: ClassVar[dict[str, str]] = {"change": "bias_change"}

    def __init__(self, layer: Linear, config: Any, names: tuple[str, ...], rng: np.random.Generator) -> None:
        super().__init__(layer, config, names, rng)
        if layer.bias is None:
            raise ValueError(f"BitFit on {names[0]}, which has no bias: leave it out of target_modules, or take another method "
                             "(Llama models have no biases)")
        self.change = Parameter(to_device(np.zeros(layer.weight.shape[0], layer.dtype)))

    def adapted_bias(self, b: Tensor | None) -> Tensor | None:     # (out,) -> (out,)
        return None if b is None else b + self.change


FileFormat("bitfit", "BITFIT", BitFitConfig).register()
