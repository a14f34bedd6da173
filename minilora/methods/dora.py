"""DoRA: the direction of every row is trained by LoRA, its length by itself (Liu et al. 2024, arXiv:2402.09353)."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from ..autograd import Tensor, dropout, linear, lora_linear, no_grad, sqrt
from ..backend import device_of
from ..lora import LoRA, LoraConfig, register
from ..lora.layer import dense
from ..lora.peft_options import LACKING
from ..nn import Linear, Parameter
from .files import FileFormat


@register("dora")
class DoRA(LoRA):
    """W' = m ⊙ V / ‖V‖_row  with  V = W + s·B@A.   Trains A (r, in), B (out, r) and m (out,), which starts at ‖V‖_row.

    With V̂ = V / ‖V‖ and g the gradient of W', each row has  m̄ = ⟨g, V̂⟩,  V̄ = (m/‖V‖) (g - ⟨g, V̂⟩ V̂).  By default, as in
    section 4.3 of the paper and in PEFT, ‖V‖ counts as a constant:  V̄ = (m/‖V‖) g,  which costs less and trains as well.
    (Finite differences rightly disagree with that one.) LoraConfig(use_dora=True, detach_norm=False) takes the full gradient.

    Dropout is on the input of the update: y = W x + (W' - W) dropout(x).
    """

    leaves: ClassVar[dict[str, str]] = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight",
                                        "magnitude": "lora_magnitude_vector"}

    def __init__(self, layer: Linear, config: Any, names: tuple[str, ...], rng: np.random.Generator) -> None:
        super().__init__(layer, config, names, rng)
        self.detach_norm = config.detach_norm
        W = dense(layer)
        self.to(device_of(W.data).name)                    # for this product; the model may be elsewhere than new arrays
        with no_grad():
            self.magnitude = Parameter(row_norm(super().adapted_weight(W)).data)

    def adapted_weight(self, W: Tensor) -> Tensor:         # (out, in) -> (out, in)
        V = super().adapted_weight(W)
        norm = row_norm(V)
        return V * (self.magnitude / (norm.data if self.detach_norm else norm)).reshape(-1, 1)

    def forward(self, x: Tensor, base: Linear) -> Tensor:  # (..., in) -> (..., out)
        """The same by thin products: y = (m/‖V‖) ⊙ (x Wᵀ + s (x Aᵀ) Bᵀ) + b, and V only for its norm."""
        gain = self.magnitude / self.norm(dense(base))
        masked = x if self.repeatable else dropout(x, self.dropout, self.rng)
        y = lora_linear(masked, base.weight, None, self.lora_A, self.lora_B, self.base_scale) * gain
        if masked is not x:
            y = y + (linear(x, base.weight) - linear(masked, base.weight))
        return y if base.bias is None else y + base.bias

    def norm(self, W: Tensor) -> Any:                      # (out, in) -> (out,)
        """‖V‖_row, a constant if it is detached."""
        if not self.detach_norm:
            return row_norm(super().adapted_weight(W))
        with no_grad():
            return row_norm(super().adapted_weight(W)).data


def row_norm(V: Tensor) -> Tensor:                         # (out, in) -> (out,)
    """‖V_i‖₂ of every row."""
    return sqrt((V * V).sum(axis=1))


FileFormat("dora", "DORA", LoraConfig,
           ("r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern", "use_dora"),
           {"bias": "none"}, {key: value for key, value in LACKING.items() if key != "use_dora"}, "LORA").register()
