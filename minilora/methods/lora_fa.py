"""LoRA-FA: A is frozen as it was drawn, only B trains (Zhang et al. 2023, arXiv:2308.03303)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from ..backend import Array, array_module
from ..lora import LoRA, LoraConfig, register
from ..nn import Module
from ..training import AdamW
from .own_bias import without_biases


@dataclass(kw_only=True)
class LoraFAConfig(LoraConfig):
    """LoRA with a frozen A: the options are LoRA's."""

    method: ClassVar[str] = "lora-fa"                      # type: ignore[assignment]  # in the place of LoRA's property

    def __post_init__(self) -> None:
        super().__post_init__()
        without_biases(self)


@register("lora-fa")
class LoRAFA(LoRA):
    """W' = W + s·B@A.   Trains B (out, r) alone; A keeps its random rows, of which BA uses the span.

    B̄ = s ȳᵀ (x Aᵀ): of the input only U = x Aᵀ (n, r) is kept, which is where the memory is saved. Saved as a plain LoRA.
    """

    def unfreeze(self) -> Self:
        super().unfreeze()
        self.lora_A.requires_grad = False
        return self


def projected_gradient(g: Array, A: Array, scale: float, delta: float = 1e-8) -> Array:    # (out, r), (r, in) -> (out, r)
    """(1/s²) g (A Aᵀ + δ I)⁻¹ for the gradient g of B: the step of B whose s·step@A is nearest to the gradient of W'.

    With g = s ĝ Aᵀ that is the least-squares solution of min ‖s X A - ĝ‖_F, known without ever having ĝ.
    """
    xp = array_module(g, A)
    gram = A @ A.T + delta * xp.eye(A.shape[0], dtype=A.dtype)
    return xp.linalg.solve(gram, g.T).T * (1.0 / scale**2)


class LoRAFAdamW(AdamW):
    """AdamW on a model's trainable parameters that sees the projected gradient of every B under LoRA-FA (PEFT's optimiser).

    Raises ValueError if the model has no active adapter of that method.
    """

    def __init__(self, model: Module, lr: Any = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-6,
                 weight_decay: float = 0.0) -> None:
        pairs = [m for _, m in model.named_modules() if isinstance(m, LoRAFA) and m.lora_B.requires_grad]
        if not pairs:
            raise ValueError("LoRAFAdamW: no active LoRA-FA adapter; add_adapter(model, LoraFAConfig(...)) first")
        self.adapters = {id(m.lora_B): m for m in pairs}
        super().__init__([p for _, p in model.named_parameters(trainable=True)], lr, betas, eps, weight_decay)

    def update_all(self, due: Iterable[Any], group: dict[str, Any], lr: Any) -> None:
        due = list(due)
        gradients = [p.grad for p, _ in due]
        for p, _ in due:
            if id(p) in self.adapters:
                adapter = self.adapters[id(p)]
                p.grad = projected_gradient(p.grad, adapter.lora_A.data, adapter.base_scale)
        super().update_all(due, group, lr)
        for (p, _), gradient in zip(due, gradients, strict=True):
            p.grad = gradient                              # as backward left it
