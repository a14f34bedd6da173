"""Relatives of LoRA side by side in a sweep: starts taken from W, and LoRA-FA. Importing this makes `sweep` take them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import numpy as np

from ..autograd import Tensor, concatenate, matmul
from ..backend import Array, device_of, to_device, to_host
from ..training.sweep import STACKS, LoRAStack
from .lora_fa import LoRAFA
from .residual import MiLoRA, OLoRA, PiSSA


class ResidualStack(LoRAStack):
    """K adapters with W'_k = W + s_k (B_k A_k - B₀_k A₀_k). Plain LoRA may stand among them: its A₀ and B₀ are zero.

    Rows beyond a rank are zero in all four factors, get zero gradients, and so stay zero.
    """

    goes_with = (LoRAStack,)

    def __init__(self, adapters: Sequence[Any]) -> None:
        super().__init__(adapters)
        A, B = np.zeros(self.lora_A.shape, self.lora_A.dtype), np.zeros(self.lora_B.shape, self.lora_B.dtype)
        for k, (adapter, r) in enumerate(zip(adapters, self.ranks, strict=True)):
            if hasattr(adapter, "A0"):
                A[k, :r], B[k, :, :r] = to_host(adapter.A0), to_host(adapter.B0)
        device = device_of(self.lora_A.data).name
        self.A0, self.B0 = to_device(A, device), to_device(B, device)

    def factors(self) -> tuple[Any, Any, Array]:
        A, B = self.lora_A, self.lora_B
        return concatenate([A, A - self.A0], axis=1), concatenate([B - self.B0, Tensor(self.B0)], axis=2), self.scales

    def adapted_weight(self, W: Tensor) -> Tensor:         # (out, in) -> (K, out, in)
        A, B, scales = self.factors()
        return W + matmul(B * scales[:, None, None], A)


class LoRAFAStack(LoRAStack):
    """K adapters whose A is frozen."""

    def unfreeze(self) -> Self:
        super().unfreeze()
        self.lora_A.requires_grad = False
        return self


STACKS.update({PiSSA: ResidualStack, MiLoRA: ResidualStack, OLoRA: ResidualStack, LoRAFA: LoRAFAStack})
