"""LoRA itself: W' = W + s·B@A (Hu et al. 2021, arXiv:2106.09685)."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..autograd import Tensor, embedding, matmul
from ..backend import Array, to_device
from ..nn import Embedding, Linear, Parameter
from .layer import Adapter, dense, register


class LowRank(Adapter):
    """What LoRA on a layer and on a table share: the rank, which must fit, and the scale."""

    def __init__(self, layer: Linear | Embedding, config: Any, names: tuple[str, ...], rng: np.random.Generator) -> None:
        super().__init__(layer, config, names, rng)
        r, shape = config.rank(names), tuple(layer.weight.shape)
        if r > min(shape):
            raise ValueError(f"rank {r} on {names[0]} of shape {shape}: expected at most {min(shape)}")
        self.base_scale = config.scale(names)

    @property
    def scale(self) -> Any:
        """s, times the strength that set_scale has set."""
        return self.base_scale * self.strength


@register("lora")
class LoRA(LowRank):
    """W' = W + s·B@A,   s = α/r (or α/√r).   Trains A (r, in) and B (out, r); W is frozen.

    A starts uniform in ±1/√in (variance 1/(3·in)), B at zero: so ΔW = 0 exactly at the start, and the first gradient of A is
    zero too; only B moves.
    """

    def __init__(self, layer: Linear, config: Any, names: tuple[str, ...], rng: np.random.Generator) -> None:
        super().__init__(layer, config, names, rng)
        (d_out, d_in), self.dropout = layer.weight.shape, config.lora_dropout
        A, B = initial_factors(config.init_lora_weights, d_out, d_in, config.rank(names), rng)
        self.lora_A = Parameter(to_device(A.astype(layer.dtype)))
        self.lora_B = Parameter(to_device(B.astype(layer.dtype)))

    def adapted_weight(self, W: Tensor) -> Tensor:         # (out, in) -> (out, in)
        return W + matmul(self.lora_B, self.lora_A) * self.base_scale

    def factors(self) -> tuple[Parameter, Parameter, Any]:
        return self.lora_A, self.lora_B, self.scale


@register("lora", Embedding)
class LoRAEmbedding(LowRank):
    """E' = E + s·(B@A)ᵀ for a table E (V, D).   Trains A (r, V), starting at zero, and B (D, r), starting normal(0, 1).

    With init_lora_weights False A is random too.
    """

    def __init__(self, layer: Embedding, config: Any, names: tuple[str, ...], rng: np.random.Generator) -> None:
        super().__init__(layer, config, names, rng)
        (V, D), r, dtype = layer.weight.shape, config.rank(names), layer.weight.dtype
        A = rng.standard_normal((r, V)) * 0.02 if config.init_lora_weights is False else np.zeros((r, V))
        self.lora_embedding_A = Parameter(to_device(A.astype(dtype)))
        self.lora_embedding_B = Parameter(to_device(rng.standard_normal((D, r)).astype(dtype)))

    def adapted_weight(self, W: Tensor) -> Tensor:         # (V, D) -> (V, D)
        return W + matmul(self.lora_embedding_B, self.lora_embedding_A).T * self.base_scale

    def factors(self) -> tuple[Any, Any, float]:
        """Of the table (V, D): A is our Bᵀ (r, D), B is our Aᵀ (V, r)."""
        return self.lora_embedding_B.T, self.lora_embedding_A.T, self.scale

    def look_up_change(self, ids: Array, base: Embedding) -> Tensor:       # s A[:, ids]ᵀ Bᵀ: nothing as large as the table
        picked = embedding(ids, self.lora_embedding_A.T)                   # (..., r)
        flat = matmul(picked.reshape(-1, picked.shape[-1]), self.lora_embedding_B.T) * self.scale
        return flat.reshape(*picked.shape[:-1], -1)


@register("replace")
@register("replace", Embedding)
class Replacement(Adapter):
    """A layer that is trained whole beside the frozen one: PEFT's modules_to_save, for classifiers. W' and b' are its own."""

    def __init__(self, layer: Linear | Embedding, config: Any, names: tuple[str, ...], rng: np.random.Generator) -> None:
        super().__init__(layer, config, names, rng)
        self.weight = Parameter(dense(layer).data.copy())
        self.bias = None if layer.bias is None else Parameter(layer.bias.data.copy())

    def adapted_weight(self, W: Tensor) -> Tensor:
        return self.weight

    def adapted_bias(self, b: Tensor | None) -> Tensor | None:
        return b if self.bias is None else self.bias

    def look_up_change(self, ids: Array, base: Embedding) -> Tensor:       # nothing as large as the table
        return (embedding(ids, self.weight) - embedding(ids, base.weight)) * self.strength


def initial_factors(init: bool | str, d_out: int, d_in: int, r: int, rng: np.random.Generator) -> tuple[Any, Any]:
    """A (r, in) and B (out, r) on the host, float64, drawn in this order."""
    bound = d_in**-0.5                                     # PyTorch's kaiming_uniform(a=√5), written out
    A = rng.standard_normal((r, d_in)) / r if init == "gaussian" else rng.uniform(-bound, bound, (r, d_in))
    B = rng.standard_normal((d_out, r)) * 0.02 if init is False else np.zeros((d_out, r))
    return A, B
