"""The base's biases as an adapter's own: copies that are trained in their place, with LoRA or where there is none.

BESIDE asks, for bias="all", which layers without LoRA have a bias.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from ..autograd import Tensor
from ..lora import Adapter, LoraConfig
from ..lora.layer import BESIDE
from ..nn import Adaptable, PackedLinear, Parameter, Transformer
from ..nn.names import file_names


class OwnBias(Adapter):
    """b' is a parameter of its own, which starts as a copy of b, on a linear layer or layer norm that has no LoRA.

    beside: it is on no target of the config.
    """

    leaves: ClassVar[dict[str, str]] = {"bias": "bias"}
    beside: ClassVar[bool] = True

    def __init__(self, layer: Any, config: Any, names: tuple[str, ...], rng: np.random.Generator) -> None:
        self.rng = rng
        self.bias = own_bias(layer)

    def adapted_bias(self, b: Tensor | None) -> Tensor | None:     # (out,) -> (out,)
        return self.bias


def own_bias(layer: Any) -> Parameter | None:       # -> (out,)
    """A copy of a layer's bias, to be trained; None without one."""
    return None if layer.bias is None else Parameter(layer.bias.data.copy())


def other_biases(model: Transformer, config: LoraConfig, taken: Sequence[Any], rng: np.random.Generator) -> dict[str, Any]:
    """Path -> (layer, OwnBias), for bias="all": of every layer with a bias, layer norms too, but those already taken.

    q, k and v count as the files have them, packed or apart; apart too where one of them is taken.
    """
    if config.bias != "all":
        return {}
    modules, files = dict(model.named_modules()), file_names(model.cfg)
    left_out = {id(layer) for layer in taken}
    for path, module in modules.items():
        if isinstance(module, PackedLinear):
            blocks = {id(block) for block in module.blocks.values()}
            packed = id(module) in left_out or (path in files and not blocks & left_out)
            left_out |= blocks if packed else {id(module)}
    return {path: (module, OwnBias(module, config, (path,), rng)) for path, module in modules.items()
            if isinstance(module, Adaptable) and module.bias is not None and id(module) not in left_out}


BESIDE["lora:bias"] = other_biases


def without_biases(config: LoraConfig) -> None:
    """Raise ValueError if a relative of LoRA is asked to train biases too."""
    if config.bias != "none" or config.lora_bias:
        raise ValueError(f"bias = {config.bias!r}, lora_bias = {config.lora_bias!r} with {config.method}: expected 'none' and "
                         "False, since only plain LoRA has biases")
