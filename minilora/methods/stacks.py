"""Relatives of LoRA side by side in a sweep, their updates being products. Importing this makes `sweep` take them.

(Those that choose their ranks while they train are in choosing_stacks.py.)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

from ..autograd import Tensor, concatenate
from ..backend import device_of
from ..nn import Parameter
from ..training.stacks import STACKS, LoRAStack, ProductStack, side_by_side
from .lora_fa import LoRAFA
from .residual import MiLoRA, OLoRA, PiSSA
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


class VeRAStack(ProductStack):
    """K adapters with b (K, out) and d (K, r_max), and the frozen A (K, r_max, in) and B (K, out, r_max) of each."""

    vera_lambda_b: Parameter
    vera_lambda_d: Parameter

    def __init__(self, adapters: Sequence[Any]) -> None:
        super().__init__(adapters)
        device, dtype = device_of(self.vera_lambda_b.data).name, self.vera_lambda_b.dtype
        widths = adapters[0].d_in, self.vera_lambda_b.shape[1]
        A, B = (side_by_side([a.projection.part(i, n, dtype, device) for a in adapters]) for i, n in enumerate(widths))
        self.A, self.B = A.swapaxes(1, 2), B               # parts are (in, r) and (out, r)
        self.set_scales([a.gain for a in adapters])

    def factors(self) -> tuple[Any, Any, Any]:
        b, d = self.vera_lambda_b, self.vera_lambda_d
        return d.reshape(*d.shape, 1) * self.A, b.reshape(*b.shape, 1) * self.B, self.scales


class TensorTrainStack(ProductStack):
    """K adapters with cores (K, r_max, n_i, r_max), of one order."""

    def __init__(self, adapters: Sequence[Any]) -> None:
        super().__init__(adapters)
        self.order = adapters[0].order
        self.set_scales([a.base_scale for a in adapters])

    def factors(self) -> tuple[Any, Any, Any]:
        B, A = chains(self, self.order)
        return A, B, self.scales


STACKS.update({PiSSA: ResidualStack, MiLoRA: ResidualStack, OLoRA: ResidualStack, LoRAFA: LoRAFAStack, VeRA: VeRAStack,
               TensorTrainLoRA: TensorTrainStack})
