"""IA3: rescale what the keys, values and MLPs compute (Liu et al. 2022, arXiv:2205.05638)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from ..autograd import Tensor, linear
from ..backend import to_device
from ..lora import Adapter, TargetConfig, register
from ..lora.config import matches
from ..nn import Linear, Parameter
from .files import FileFormat

TARGETS = {"gpt2": ["c_attn", "mlp.c_proj"], "bert": ["key", "value", "output.dense"],
           "roberta": ["key", "value", "output.dense"]}
FEEDFORWARD = ["down_proj", "mlp.c_proj", "output.dense"]  # as PEFT has them; in BERT that is also the attention's output


@dataclass(kw_only=True)
class IA3Config(TargetConfig):
    """IA3 with PEFT's names. target_modules: None is keys, values and the MLP's last product.

    feedforward_modules: those among the targets whose inputs are rescaled, not their outputs (None: the MLP's last product).
    init_ia3_weights: False starts at random, to test.
    """

    method: ClassVar[str] = "ia3"

    feedforward_modules: list[str] | str | None = None
    init_ia3_weights: bool = True

    def default_targets(self, model_type: str | None) -> list[str]:
        return list(TARGETS.get(model_type or "", ("k_proj", "v_proj", "down_proj")))


@register("ia3")
class IA3(Adapter):
    """y = l ⊙ (W x + b), or in the MLP's last product y = W (l ⊙ x) + b.   Trains l, which starts at 1: exactly the base.

    l is (out, 1) or (1, in), so that W' = l ⊙ W in both cases. l̄ = Σ_tokens ȳ ⊙ (W x + b): thin, no gradient as large as W.
    """

    leaves: ClassVar[dict[str, str]] = {"ia3_l": "ia3_l"}

    def __init__(self, layer: Linear, config: Any, names: tuple[str, ...], rng: np.random.Generator) -> None:
        super().__init__(layer, config, names, rng)
        d_out, d_in = layer.weight.shape
        wanted = config.feedforward_modules
        self.on_input = matches(FEEDFORWARD if wanted is None else wanted, names)
        shape = (1, d_in) if self.on_input else (d_out, 1)
        l = np.ones(shape) if config.init_ia3_weights else rng.standard_normal(shape)
        self.ia3_l = Parameter(to_device(l.astype(layer.dtype)))

    def adapted_weight(self, W: Tensor) -> Tensor:         # (out, in) -> (out, in)
        return self.ia3_l * W

    def adapted_bias(self, b: Tensor | None) -> Tensor | None:
        return b if self.on_input or b is None else b * self.ia3_l.reshape(-1)

    def forward(self, x: Tensor, base: Linear) -> Tensor:  # (..., in) -> (..., out)
        l = self.ia3_l.reshape(-1)
        return linear(x * l, base.weight, base.bias) if self.on_input else linear(x, base.weight, base.bias) * l


class IA3Format(FileFormat):
    """PEFT wants feedforward_modules to be a part of target_modules as they are spelt: so both are whole paths."""

    def own_options(self, modules: dict[str, Any]) -> dict[str, Any]:
        return {"target_modules": sorted(modules), "feedforward_modules": sorted(f for f, a in modules.items() if a.on_input)}


IA3Format("ia3", "IA3", IA3Config, ("feedforward_modules",)).register()
