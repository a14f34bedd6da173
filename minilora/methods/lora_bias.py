"""PEFT's two options for biases beside LoRA: a bias of B (lora_bias), and the base's own biases trained along (bias).

PEFT trains the base's biases in place, so that switching its adapter off no longer gives the base. Here an adapter has copies
of them: the base stays as it is, adapters do not disturb each other, and the files are the same.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from ..autograd import Tensor, dropout, linear, lora_linear
from ..backend import to_device, to_host
from ..lora import LoRA, LoraConfig, LoRAEmbedding, register
from ..lora.peft_format import read_config
from ..lora.peft_options import OPTIONS
from ..nn import Embedding, Linear, Parameter
from .files import FileFormat
from .own_bias import own_bias

SURPLUS = (".original_module.bias", ".modules_to_save.bias")           # of a classifier, beside the bias that counts


@register("lora:bias")
class LoRABias(LoRA):
    """W' = W + s·B@A  and  b' = b₁ + s·c.   Trains A (r, in), B (out, r), and one or both of c (out,) and b₁ (out,).

    c is the bias of B (lora_bias=True), which starts at 0. b₁ is the adapter's copy of the base's bias (bias="lora_only" or
    "all"); where that is off, it is the base's b itself. b̄₁ = Σ ȳ over rows, c̄ = s b̄₁. The start is exactly the base.
    """

    leaves: ClassVar[dict[str, str]] = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight", "lora_B_bias": "lora_B.bias",
                                        "bias": "base_layer.bias"}

    def __init__(self, layer: Linear, config: Any, names: tuple[str, ...], rng: np.random.Generator) -> None:
        super().__init__(layer, config, names, rng)
        d_out, dtype = layer.weight.shape[0], layer.dtype
        c = rng.standard_normal(d_out) * 0.02 if config.init_lora_weights is False else np.zeros(d_out)
        self.lora_B_bias = Parameter(to_device(c.astype(dtype))) if config.lora_bias else None
        self.bias = own_bias(layer) if config.bias != "none" else None
        if layer.bias is None:
            self.brought_bias = self.lora_B_bias

    def adapted_bias(self, b: Tensor | None) -> Tensor | None:     # (out,) -> (out,)
        own = b if self.bias is None else self.bias
        if self.lora_B_bias is None:
            return own
        change = self.lora_B_bias * self.base_scale
        return change if own is None else own + change

    def forward(self, x: Tensor, base: Linear) -> Tensor:  # (..., in) -> (..., out)
        """By thin products, for the rows of a mixed batch; dropout is on the input of the update."""
        bias = self.adapted_bias(base.bias)
        if self.repeatable:
            return lora_linear(x, base.weight, bias, self.lora_A, self.lora_B, self.base_scale)
        masked = dropout(x, self.dropout, self.rng)
        return linear(x, base.weight, bias) + linear(linear(masked, self.lora_A), self.lora_B) * self.base_scale


@register("lora:bias", Embedding)
class LoRABiasEmbedding(LoRAEmbedding):
    """An embedding has no bias, so with bias= it has plain LoRA. Raises ValueError for lora_bias, as PEFT does."""

    leaves: ClassVar[dict[str, str]] = {"lora_embedding_A": "lora_embedding_A", "lora_embedding_B": "lora_embedding_B"}

    def __init__(self, layer: Embedding, config: Any, names: tuple[str, ...], rng: np.random.Generator) -> None:
        super().__init__(layer, config, names, rng)
        if config.lora_bias:
            raise ValueError(f"lora_bias on {names[0]}, an embedding table: expected linear layers only; leave it out of "
                             "target_modules")


class LoRABiasFormat(FileFormat):
    """A LORA folder whose config has lora_bias or a bias: it differs from a plain one by the tensors of the biases."""

    def read_config(self, path: Path) -> dict[str, Any]:
        return read_config(path, known=("bias", "lora_bias"))

    def to_config(self, options: dict[str, Any], tensors: dict[str, np.ndarray], folder: Path) -> LoraConfig:
        own = {key: options[key] for key in (*OPTIONS, "bias", "lora_bias")}
        return LoraConfig(**own | {"init_lora_weights": True})

    def is_copy(self, key: str, value: np.ndarray, layers: dict[str, Any]) -> bool:
        """PEFT saves along a second and third bias of a classifier, and the table under an adapted embedding."""
        module, base, _ = key.partition(".base_layer.weight")
        if base and module in layers:
            weight = layers[module].weight
            return bool(np.array_equal(value.astype(weight.dtype), to_host(weight)))
        return key.endswith(SURPLUS)


LoRABiasFormat("lora:bias", "LORA_BIAS", LoraConfig,
               ("r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern", "bias", "lora_bias"),
               {"use_dora": False}, peft_type="LORA").register()
