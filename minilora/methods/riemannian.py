"""Riemannian preconditioning: LoRA's steps do not depend on how ΔW is split into B and A (Zhang & Pilanci 2024, 2402.02347)."""

from __future__ import annotations

from typing import Any

from ..backend import Array, array_module
from ..lora import LoRA
from ..nn import Module


class Riemannian:
    """Any optimiser, whose step sees preconditioned gradients of every pair of factors (PEFT's create_riemannian_optimizer).

        optimizer = Riemannian(model, AdamW([p for _, p in model.named_parameters(trainable=True)], lr=1e-4))
        train(model, batches, TrainConfig(...), optimizer=optimizer)

    g_A ← (BᵀB + ρI)⁻¹ g_A,   g_B ← g_B (AAᵀ + ρI)⁻¹,   with ρ = reg, since B starts at 0.

    With ρ = 0 and SGD the step of ΔW is to first order the same for every split B R, R⁻¹A of the product. Parameters that are
    no such pair are left as they are. Raises ValueError for a negative reg, or if no pair trains.
    """

    def __init__(self, model: Module, optimizer: Any, reg: float = 1e-2) -> None:
        self.optimizer, self.reg = optimizer, float(reg)
        self.pairs = [(m.lora_A, m.lora_B) for _, m in model.named_modules()
                      if isinstance(m, LoRA) and m.lora_A.requires_grad and m.lora_B.requires_grad]
        if not self.reg >= 0.0 or not self.pairs:
            raise ValueError(f"Riemannian: reg = {reg}, {len(self.pairs)} trainable pairs of lora_A and lora_B: expected reg "
                             ">= 0, and a LoRA adapter that is active")

    def step(self, factor: float = 1.0) -> None:
        """One step of the optimiser. The gradients are afterwards as backward left them."""
        kept = [(p, p.grad) for pair in self.pairs for p in pair]
        new = [(solved(B.data.T @ B.data, A.grad, self.reg), solved(A.data @ A.data.T, B.grad.T, self.reg).T)
               for A, B in self.pairs if A.grad is not None and B.grad is not None]
        pairs = [pair for pair in self.pairs if all(p.grad is not None for p in pair)]
        for (A, B), (g_A, g_B) in zip(pairs, new, strict=True):
            A.grad, B.grad = g_A, array_module(g_B).ascontiguousarray(g_B)
        try:
            self.optimizer.step(factor)
        finally:
            for p, gradient in kept:
                p.grad = gradient

    def zero_grad(self) -> None:
        """As the optimiser's."""
        self.optimizer.zero_grad()

    def state_dict(self) -> dict[str, Any]:
        """As the optimiser's: nothing is kept here."""
        return self.optimizer.state_dict()

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """As the optimiser's."""
        self.optimizer.load_state_dict(saved)


def solved(gram: Array, g: Array, reg: float) -> Array:    # (r, r), (r, n) -> (r, n)
    """(gram + ρI)⁻¹ g."""
    xp = array_module(gram, g)
    return xp.linalg.solve(gram + reg * xp.eye(len(gram), dtype=gram.dtype), g)
