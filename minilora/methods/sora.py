"""SoRA: LoRA with a gate on every rank, which a proximal step closes exactly (Ding et al. 2023, arXiv:2311.11696)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from ..autograd import Tensor, matmul
from ..backend import Array, array_module, to_device, to_host
from ..lora import LoRA, LoraConfig, adapters_of, register
from ..nn import Linear, Parameter, Transformer
from .own_bias import without_biases


@dataclass(kw_only=True)
class SoRAConfig(LoraConfig):
    """SoRA: LoRA's options, r being the largest rank. sparse_lambda λ: the weight of ‖g‖₁, which `GateProx` enforces."""

    method: ClassVar[str] = "sora"                         # type: ignore[assignment]  # in the place of LoRA's property

    sparse_lambda: float = 10.0

    def __post_init__(self) -> None:
        super().__post_init__()
        without_biases(self)
        if not self.sparse_lambda >= 0.0 or self.use_dora:
            raise ValueError(f"sparse_lambda = {self.sparse_lambda}, use_dora = {self.use_dora}: expected >= 0, and no DoRA")


@register("sora")
class SoRA(LoRA):
    """W' = W + s·B diag(g) A.   Trains A (r, in), B (out, r) and g (r,), which starts normal(0, 1); B starts at 0.

    With ĝ the gradient of W':  ḡ_i = s (Bᵀ ĝ Aᵀ)_ii.  Saved as a plain LoRA with g inside A.
    """

    def __init__(self, layer: Linear, config: Any, names: tuple[str, ...], rng: np.random.Generator) -> None:
        super().__init__(layer, config, names, rng)
        self.gate = Parameter(to_device(rng.standard_normal(len(self.lora_A)).astype(layer.dtype)))

    def factors(self) -> tuple[Any, Any, Any]:
        return self.lora_A * self.gate.reshape(-1, 1), self.lora_B, self.scale

    def adapted_weight(self, W: Tensor) -> Tensor:         # (out, in) -> (out, in)
        A, B, _ = self.factors()
        return W + matmul(B, A) * self.base_scale


def soft_threshold(g: Array, xi: Any) -> Array:
    """sign(g) max(|g| - ξ, 0): the point x that makes ½(x - g)² + ξ|x| least."""
    xp = array_module(g)
    return xp.sign(g) * xp.maximum(abs(g) - xi, 0.0)


class GateProx:
    """After every optimiser step, the proximal step of λ‖g‖₁: g ← T_ξ(g) with ξ = η λ.

        train(model, batches, TrainConfig(...), callback=GateProx(model).callback)

    (The authors' optimiser sets to zero all that is below 2ξ; this is the step that the paper writes.)
    Raises ValueError if the adapter is not SoRA.
    """

    def __init__(self, model: Transformer, name: str = "default") -> None:
        self.adapters = {path: a for path, a in adapters_of(model, name).items() if isinstance(a, SoRA)}
        if not self.adapters:
            raise ValueError(f"GateProx: adapter {name!r} is not SoRA; add_adapter(model, SoRAConfig(...)) first")
        self.weight = float(model.adapter_configs[name].sparse_lambda)

    def callback(self, step: int, model: Any, history: Any) -> None:
        """For `train`: η is the rate of the update that was just made."""
        self.step(history.lr[-1])

    def step(self, lr: float) -> None:
        """One proximal step of all gates."""
        for adapter in self.adapters.values():
            adapter.gate.data[...] = soft_threshold(adapter.gate.data, float(lr) * self.weight)

    def ranks(self) -> dict[str, int]:
        """How many gates of each module are open."""
        return {path: int((to_host(a.gate.data) != 0).sum()) for path, a in self.adapters.items()}
