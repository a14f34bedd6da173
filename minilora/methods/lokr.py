"""LoKr: a Kronecker product as the update (Yeh et al. 2023, LyCORIS, arXiv:2309.14859; Edalati et al. 2022, KronA)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from ..autograd import Tensor, matmul
from ..backend import to_device
from ..lora import Adapter, register
from ..nn import Linear, Parameter
from .files import FileFormat
from .loha import LACKING, PATTERNS, LoHaConfig, kaiming


@dataclass(kw_only=True)
class LoKrConfig(LoHaConfig):
    """LoKr with PEFT's names: r, alpha and patterns as in LoHaConfig.

    decompose_both: W₁ may be a product of rank r too. decompose_factor: of both dimensions (-1: nearest to their root).
    init_weights: True starts W₁ at 0, "lycoris" W₂ (its second factor), False neither.
    """

    method: ClassVar[str] = "lokr"

    decompose_both: bool = False
    decompose_factor: int = -1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.init_weights not in (True, False, "lycoris"):
            raise ValueError(f"init_weights = {self.init_weights!r}: expected True, False or 'lycoris'")
        if self.decompose_factor < 1 and self.decompose_factor != -1:
            raise ValueError(f"decompose_factor = {self.decompose_factor}: expected -1, or a number of at least 1")


@register("lokr")
class LoKr(Adapter):
    """W' = W + s·W₁ ⊗ W₂, with W₁ (a, b), W₂ (c, d), out = a·c, in = b·d.   Trains W₁ and W₂, each whole or as a product.

    A matrix is a product of rank r if r is less than half of its longer side (W₁ only with decompose_both). With ĝ the
    gradient of W' as (a, c, b, d):  W̄₁ = s Σ_cd ĝ W₂,  W̄₂ = s Σ_ab ĝ W₁.
    """

    leaves: ClassVar[dict[str, str]] = {name: f"lokr_{name}" for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b")}

    def __init__(self, layer: Linear, config: Any, names: tuple[str, ...], rng: np.random.Generator) -> None:
        super().__init__(layer, config, names, rng)
        d_out, d_in = layer.weight.shape
        r, self.scale = config.rank_and_scale(names)
        (a, c), (b, d) = (factorization(n, config.decompose_factor) for n in (d_out, d_in))
        zero = {True: "w1", "lycoris": "w2", False: ""}[config.init_weights]
        for name, shape, whole in (("w1", (a, b), not (config.decompose_both and r < max(a, b) / 2)),
                                   ("w2", (c, d), not r < max(c, d) / 2)):
            # of a product one factor is 0: the first of W₁, the second of W₂
            parts = {name: shape} if whole else {f"{name}_a": (shape[0], r), f"{name}_b": (r, shape[1])}
            empty = name if whole else f"{name}_{'a' if name == 'w1' else 'b'}"
            for part, size in parts.items():
                start = kaiming(size, rng) * (name != zero or part != empty)
                setattr(self, part, Parameter(to_device(start.astype(layer.dtype))))

    def adapted_weight(self, W: Tensor) -> Tensor:         # (out, in) -> (out, in)
        W1, W2 = self.matrix("w1"), self.matrix("w2")
        (a, b), (c, d) = W1.shape, W2.shape
        product = W1.reshape(a, 1, b, 1) * W2.reshape(1, c, 1, d)          # (a, c, b, d)
        return W + product.reshape(a * c, b * d) * self.scale

    def matrix(self, name: str) -> Tensor:
        """W₁ ("w1") or W₂, formed if it is a product."""
        whole = getattr(self, name, None)
        return matmul(getattr(self, f"{name}_a"), getattr(self, f"{name}_b")) if whole is None else whole


def factorization(n: int, factor: int = -1) -> tuple[int, int]:
    """n = m·(n/m) with m at most n/m, the largest such m up to `factor` (-1: any). A factor that divides n is taken as m."""
    if factor > 0 and n % factor == 0:
        return factor, n // factor
    m = max(m for m in range(1, n + 1) if n % m == 0 and m * m <= n and (factor < 0 or m <= factor))
    return m, n // m


FileFormat("lokr", "LOKR", LoKrConfig, (*PATTERNS, "init_weights", "decompose_both", "decompose_factor"), {},
           LACKING | {"rank_dropout_scale": False}, layout=False).register()
