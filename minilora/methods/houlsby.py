"""Bottleneck adapters: a small network after each half of a layer (Houlsby et al. 2019, arXiv:1902.00751)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from ..autograd import Tensor, gelu, linear
from ..backend import to_device
from ..lora import Adapter, TargetConfig, register
from ..nn import Linear, Parameter
from .files import FileFormat


@dataclass(kw_only=True)
class HoulsbyConfig(TargetConfig):
    """Bottleneck adapters of width `bottleneck` after the targets (None: o_proj and down_proj, as in the paper).

    init_std: of the weights, truncated at two deviations. Raises ValueError for a width below 1.
    """

    method: ClassVar[str] = "houlsby"

    bottleneck: int = 64
    init_std: float = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.bottleneck, int) or self.bottleneck < 1 or not self.init_std >= 0.0:
            raise ValueError(f"bottleneck = {self.bottleneck!r}, init_std = {self.init_std}: expected a whole number of at "
                             "least 1, and a standard deviation")

    def default_targets(self, model_type: str | None) -> list[str]:
        return ["o_proj", "down_proj"]


@register("houlsby")
class Houlsby(Adapter):
    """y = h + W₂ gelu(W₁ h + b₁) + b₂  with  h = W x + b.   Trains W₁ (m, out), b₁ (m,), W₂ (out, m), b₂ (out,).

    2·m·out + m + out numbers. The start is the base up to init_std² (W₁ and W₂ are small, not zero). It is no weight: nothing
    can be merged, added to another adapter, or scaled, and each says so. The paper trains the layer norms too; here they
    stay frozen.
    """

    leaves: ClassVar[dict[str, str]] = {"down": "adapter_down.weight", "down_bias": "adapter_down.bias",
                                        "up": "adapter_up.weight", "up_bias": "adapter_up.bias"}

    def __init__(self, layer: Linear, config: Any, names: tuple[str, ...], rng: np.random.Generator) -> None:
        super().__init__(layer, config, names, rng)
        d, m = layer.weight.shape[0], config.bottleneck

        def small(*shape: int) -> Parameter:
            draws = rng.standard_normal(shape)
            while (outside := abs(draws) > 2.0).any():
                draws[outside] = rng.standard_normal(int(outside.sum()))
            return Parameter(to_device((draws * config.init_std).astype(layer.dtype)))

        self.down, self.down_bias = small(m, d), Parameter(to_device(np.zeros(m, layer.dtype)))
        self.up, self.up_bias = small(d, m), Parameter(to_device(np.zeros(d, layer.dtype)))

    def forward(self, x: Tensor, base: Linear) -> Tensor:  # (..., in) -> (..., out)
        h = linear(x, base.weight, base.bias)
        return h + linear(gelu(linear(h, self.down, self.down_bias)), self.up, self.up_bias)

    def adapted_weight(self, W: Tensor) -> Tensor:
        raise ValueError("a bottleneck adapter is no change of a weight: it cannot be merged, scaled, or added to another one; "
                         "expected it alone, with strength 1")


FileFormat("houlsby", "HOULSBY", HoulsbyConfig, ("bottleneck", "init_std")).register()
