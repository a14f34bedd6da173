"""Relatives of LoRA side by side in a sweep: every method whose update is s·B@A. Importing this makes `sweep` take them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import numpy as np

from ..autograd import Tensor, concatenate, stack
from ..backend import device_of, to_device
from ..nn import Parameter
from ..training.stacks import STACKS, Companion, LoRAStack, Stack, product_added, side_by_side
from .adalora import AdaLoRA
from .adalora_budget import TripletBudget
from .lora_fa import LoRAFA
from .residual import MiLoRA, OLoRA, PiSSA
from .sora import SoRA, soft_threshold
from .tensor_train import TensorTrainLoRA, chains
from .vera import VeRA


class ResidualStack(LoRAStack):
    """K adapters with W'_k = W + s_k (B_k A_k - B₀_k A₀_k). Plain LoRA may stand among them: its A₀ and B₀ are zero."""

    goes_with = (LoRAStack,)

    def __init__(self, adapters: Sequence[Any]) -> None:
        super().__init__(adapters)
        self.A0, self.B0 = (side_by_side([getattr(a, start, getattr(a, now).data * 0.0) for a in adapters])
                            for start, now in (("A0", "lora_A"), ("B0", "lora_B")))

    def factors(self) -> tuple[Any, Any, Any]:
        A, B = self.lora_A, self.lora_B
        return concatenate([A, A - self.A0], axis=1), concatenate([B - self.B0, Tensor(self.B0)], axis=2), self.scales


class LoRAFAStack(LoRAStack):
    """K adapters whose A is frozen."""

    def unfreeze(self) -> Self:
        super().unfreeze()
        self.lora_A.requires_grad = False
        return self


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
    """A `TripletBudget` for each of K AdaLoRA adapters."""

    def __init__(self, stacks: dict[str, Any], configs: Sequence[Any]) -> None:
        mine = {path: each for path, each in stacks.items() if isinstance(each, AdaLoRAStack)}
        self.budgets = [TripletBudget({path: _Own(each, k) for path, each in mine.items()}, config)
                        for k, config in enumerate(configs)]

    def penalty(self) -> Tensor:                           # () -> (K,)
        return stack([each.orthogonality() * float(each.config.orth_reg_weight) for each in self.budgets])

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


class VeRAStack(Stack):
    """K adapters with b (K, out) and d (K, r_max), and the frozen A (K, r_max, in) and B (K, out, r_max) of each."""

    vera_lambda_b: Parameter
    vera_lambda_d: Parameter

    def __init__(self, adapters: Sequence[Any]) -> None:
        super().__init__(adapters)
        device, dtype = device_of(self.vera_lambda_b.data).name, self.vera_lambda_b.dtype
        widths = adapters[0].d_in, self.vera_lambda_b.shape[1]
        A, B = (side_by_side([a.projection.part(i, n, dtype, device) for a in adapters]) for i, n in enumerate(widths))
        self.A, self.B = A.swapaxes(1, 2), B               # parts are (in, r) and (out, r)
        self.scales = to_device(np.array([a.gain * a.strength for a in adapters], dtype), device)

    def factors(self) -> tuple[Any, Any, Any]:
        b, d = self.vera_lambda_b, self.vera_lambda_d
        return d.reshape(*d.shape, 1) * self.A, b.reshape(*b.shape, 1) * self.B, self.scales

    def adapted_weight(self, W: Tensor) -> Tensor:         # (out, in) -> (K, out, in)
        return product_added(W, self.factors())


class TensorTrainStack(Stack):
    """K adapters with cores (K, r_max, n_i, r_max), of one order."""

    out0: Parameter

    def __init__(self, adapters: Sequence[Any]) -> None:
        if len({a.order for a in adapters}) > 1:
            raise ValueError(f"sweep: orders {sorted({a.order for a in adapters})}: expected one number of cores in all cells")
        super().__init__(adapters)
        self.order, dtype = adapters[0].order, self.out0.dtype
        self.scales = to_device(np.array([a.base_scale * a.strength for a in adapters], dtype), device_of(self.out0.data).name)

    def factors(self) -> tuple[Any, Any, Any]:
        B, A = chains(self, self.order)
        return A, B, self.scales

    def adapted_weight(self, W: Tensor) -> Tensor:         # (out, in) -> (K, out, in)
        return product_added(W, self.factors())


STACKS.update({PiSSA: ResidualStack, MiLoRA: ResidualStack, OLoRA: ResidualStack, LoRAFA: LoRAFAStack, SoRA: SoRAStack,
               AdaLoRA: AdaLoRAStack, VeRA: VeRAStack, TensorTrainLoRA: TensorTrainStack})
