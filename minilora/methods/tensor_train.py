"""Tensor-train LoRA: the factors A and B are themselves chains of small cores (LoRETTA, Yang et al. 2024, arXiv:2402.11417)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from ..autograd import Tensor, matmul
from ..backend import to_device
from ..lora import Adapter, TargetConfig, register
from ..nn import Linear, Parameter
from .files import FileFormat

LONGEST = 8                                                # cores on one side


@dataclass(kw_only=True)
class TensorTrainConfig(TargetConfig):
    """r: the rank of all bonds, and so of ΔW. order: cores on each side. s = lora_alpha / r.

    init_weights: False starts at random, to test. Raises ValueError for values out of range.
    """

    method: ClassVar[str] = "tt-lora"

    r: int = 5
    lora_alpha: float = 16
    order: int = 3
    init_weights: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        whole = all(isinstance(n, int) and not isinstance(n, bool) for n in (self.r, self.order))
        if not whole or self.r < 1 or not 1 <= self.order <= LONGEST:
            raise ValueError(f"r = {self.r!r}, order = {self.order!r}: expected whole numbers, r >= 1 and an order of 1 to "
                             f"{LONGEST}")


@register("tt-lora")
class TensorTrainLoRA(Adapter):
    """W' = W + s·B@A,   B[i₁…i_n, ρ] = Σ G₁[i₁] G₂[i₂] … G_n[i_n],   A[ρ, j₁…j_n] = Σ H₁[j₁] … H_n[j_n].

    out = Π n_i and in = Π m_i, as equal as their divisors allow; a core is (r, n_i, r), the first and the last one of the chain
    (1, n₁, r) and (r, m_n, 1).   Trains all cores: r n₁ + r² Σ_{i>1} n_i + r² Σ_{i<n} m_i + r m_n numbers, where LoRA has
    r (out + in). G_n starts at 0, so ΔW = 0 exactly; the H start normal, such that A's entries have LoRA's variance 1/(3·in),
    the other G with 1/√r.
    With ĝ the gradient of W', each core's is what autograd makes of the chain: L ĝ R, with the products left and right of it.
    """

    leaves: ClassVar[dict[str, str]] = {f"{side}{i}": f"tt_{side}.{i}" for side in ("out", "in") for i in range(LONGEST)}

    def __init__(self, layer: Linear, config: Any, names: tuple[str, ...], rng: np.random.Generator) -> None:
        super().__init__(layer, config, names, rng)
        (d_out, d_in), r, n = layer.weight.shape, config.r, config.order
        if r > min(d_out, d_in):
            raise ValueError(f"rank {r} on {names[0]} of shape ({d_out}, {d_in}): expected at most {min(d_out, d_in)}")
        self.order, self.base_scale = n, float(config.lora_alpha) / r
        deviation = (3.0 * d_in * r ** (n - 1)) ** (-0.5 / n)
        for side, sizes, std in ("out", divided(d_out, n), r**-0.5), ("in", divided(d_in, n), deviation):
            for i, size in enumerate(sizes):
                shape = (1 if (side, i) == ("out", 0) else r, size, 1 if (side, i) == ("in", n - 1) else r)
                empty = config.init_weights and (side, i) == ("out", n - 1)
                core = np.zeros(shape) if empty else rng.standard_normal(shape) * std
                setattr(self, f"{side}{i}", Parameter(to_device(core.astype(layer.dtype))))

    def factors(self) -> tuple[Any, Any, Any]:
        B, A = chains(self, self.order)
        return A, B, self.base_scale * self.strength

    def adapted_weight(self, W: Tensor) -> Tensor:         # (out, in) -> (out, in)
        B, A = chains(self, self.order)
        return W + matmul(B, A) * self.base_scale


def chains(adapter: Any, order: int) -> tuple[Tensor, Tensor]:
    """The products of the cores of both sides: B (…, out, r) and A (…, r, in)."""
    sides = []
    for side in ("out", "in"):
        first, *others = (getattr(adapter, f"{side}{i}") for i in range(order))
        *lead, rank, _, after = first.shape                # lead: (K,) where adapters lie side by side
        product = first.reshape(*lead, -1, after)          # (…, n₁·…·n_i, r)
        for core in others:
            before, size, after = core.shape[-3:]
            product = matmul(product, core.reshape(*lead, before, size * after)).reshape(*lead, -1, after)
        sides.append(product if side == "out" else product.reshape(*lead, rank, -1))
    return sides[0], sides[1]


def divided(n: int, parts: int) -> list[int]:
    """n as a product of so many numbers, each the divisor that is nearest to an equal share of what is left.

    >>> divided(768, 3), divided(7, 2)
    ([8, 8, 12], [1, 7])
    """
    sizes = []
    for left in range(parts, 0, -1):
        share = n ** (1.0 / left)
        divisors = (d for d in range(1, n + 1) if n % d == 0)
        size = n if left == 1 else min(divisors, key=lambda d: round(abs(np.log(d / share)), 9))       # of equals the smaller
        sizes.append(size)
        n //= size
    return sizes


FileFormat("tt-lora", "TENSOR_TRAIN", TensorTrainConfig, ("r", "lora_alpha", "order")).register()
