"""SoRA and AdaLoRA side by side in a sweep: each cell with gates, or a budget, of its own. `Companion` is what they do beside
the optimiser."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..autograd import Tensor, sqrt, where
from ..backend import device_of, to_device
from ..nn import Parameter
from ..training.stacks import STACKS, Companion, LoRAStack, Stack
from .adalora import AdaLoRA
from .adalora_budget import TripletBudget, from_orthonormal
from .sora import SoRA, soft_threshold


class Gates(Companion):
    """The proximal step of K SoRA adapters, each with its own rate and λ."""

    def __init__(self, stacks: dict[str, Any], configs: Sequence[Any]) -> None:
        self.gates = [each.gate.data for each in stacks.values() if isinstance(each, SoRAStack)]
        self.weights = np.array([config.sparse_lambda for config in configs])

    def after(self, step: int, lrs: np.ndarray) -> None:
        for g in self.gates:
            xi = to_device((lrs * self.weights).astype(g.dtype)[:, None], device_of(g).name)
            g[...] = soft_threshold(g, xi)


class SoRAStack(LoRAStack):
    """K adapters with gates (K, r_max)."""

    gate: Parameter
    companion = Gates

    def factors(self) -> tuple[Any, Any, Any]:
        return self.lora_A * self.gate.reshape(*self.gate.shape, 1), self.lora_B, self.scales


class Budgets(Companion):
    """A `TripletBudget` for each of K AdaLoRA adapters, and their penalties together."""

    def __init__(self, stacks: dict[str, Any], configs: Sequence[Any]) -> None:
        self.stacks = {path: each for path, each in stacks.items() if isinstance(each, AdaLoRAStack)}
        self.budgets = [TripletBudget({path: _Own(each, k) for path, each in self.stacks.items()}, config)
                        for k, config in enumerate(configs)]
        first = next(iter(self.stacks.values())).lora_A
        device, r = device_of(first.data).name, first.shape[1]
        own = np.arange(r) < np.array([config.init_r for config in configs])[:, None]                  # (K, r)
        self.eyes = to_device((np.eye(r) * own[:, :, None]).astype(first.dtype), device)
        self.of_paper = to_device(np.array([config.orth_reg == "paper" for config in configs]), device)
        # γ of each cell, by the number of matrices where R is a mean
        self.weights = to_device(np.array([config.orth_reg_weight / (1 if config.orth_reg == "paper" else 2 * len(self.stacks))
                                           for config in configs], first.dtype), device)

    def penalty(self) -> Tensor:                           # () -> (K,)
        """γ R of each cell, as `TripletBudget.orthogonality` has it."""
        total: Any = 0.0
        for m in [m for each in self.stacks.values() for m in (each.lora_A, each.lora_B.transpose(0, 2, 1))]:      # (K, r, …)
            square = from_orthonormal(m, self.eyes)
            total = where(self.of_paper, square, sqrt(square)) + total
        return total * self.weights

    def after(self, step: int, lrs: np.ndarray) -> None:
        for each in self.budgets:
            each.after(step)


class _Own:
    """Adapter k of a stack: its parameters are views of the stack's, with their gradients."""

    def __init__(self, whole: Stack, k: int) -> None:
        self.whole, self.k = whole, k

    def __getattr__(self, name: str) -> Tensor:
        p, part = getattr(self.whole, name), (self.k, *map(slice, self.whole.shapes[self.k][name]))
        own = p[part]
        own.grad = None if p.grad is None else p.grad[part]
        return own


class AdaLoRAStack(LoRAStack):
    """K adapters with λ (K, r_max, 1)."""

    lora_E: Parameter
    companion = Budgets

    def factors(self) -> tuple[Any, Any, Any]:
        return self.lora_A * self.lora_E, self.lora_B, self.scales


STACKS.update({SoRA: SoRAStack, AdaLoRA: AdaLoRAStack})
