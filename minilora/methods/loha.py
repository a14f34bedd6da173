"""LoHa: the elementwise product of two low-rank updates (Hyeon-Woo et al. 2021, FedPara, arXiv:2108.06098; LyCORIS)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from ..autograd import Tensor, matmul
from ..backend import to_device
from ..lora import Adapter, TargetConfig, register
from ..lora.config import by_pattern
from ..nn import Linear, Parameter
from .files import FileFormat

PATTERNS = ("r", "alpha", "rank_pattern", "alpha_pattern")
LACKING = {"rank_dropout": 0.0, "module_dropout": 0.0, "use_effective_conv2d": False}      # PEFT's options that we do not have


@dataclass(kw_only=True)
class LoHaConfig(TargetConfig):
    """LoHa with PEFT's names: r of each of the two products, s = alpha/r, patterns as in LoraConfig.

    init_weights: False starts at random, to test. Raises ValueError for a rank below 1.
    """

    method: ClassVar[str] = "loha"

    r: int = 8
    alpha: float = 8
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    init_weights: bool | str = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for r in (self.r, *self.rank_pattern.values()):
            if not isinstance(r, int) or isinstance(r, bool) or r < 1:
                raise ValueError(f"rank {r!r}: expected a whole number of at least 1")

    def rank_and_scale(self, names: tuple[str, ...]) -> tuple[int, float]:
        """r and s of the module that has these names."""
        r = by_pattern(self.rank_pattern, names, self.r)
        return r, float(by_pattern(self.alpha_pattern, names, self.alpha)) / r


@register("loha")
class LoHa(Adapter):
    """W' = W + s·(B₁A₁) ⊙ (B₂A₂), of a rank up to r².   Trains all four factors; A₂ starts at 0: exactly the base.

    With ĝ the gradient of W':  T = s ĝ ⊙ (B₂A₂),  B̄₁ = T A₁ᵀ,  Ā₁ = B₁ᵀ T, and the same with 1 and 2 exchanged. In PEFT's files
    B is "a" and A is "b".
    """

    leaves: ClassVar[dict[str, str]] = {"B1": "hada_w1_a", "A1": "hada_w1_b", "B2": "hada_w2_a", "A2": "hada_w2_b"}

    def __init__(self, layer: Linear, config: Any, names: tuple[str, ...], rng: np.random.Generator) -> None:
        super().__init__(layer, config, names, rng)
        d_out, d_in = layer.weight.shape
        r, self.scale = config.rank_and_scale(names)
        for name, shape in ("B1", (d_out, r)), ("A1", (r, d_in)), ("B2", (d_out, r)), ("A2", (r, d_in)):
            start = kaiming(shape, rng) * (name != "A2" or not config.init_weights)
            setattr(self, name, Parameter(to_device(start.astype(layer.dtype))))

    def adapted_weight(self, W: Tensor) -> Tensor:         # (out, in) -> (out, in)
        return W + matmul(self.B1, self.A1) * matmul(self.B2, self.A2) * self.scale       # type: ignore[attr-defined]


def kaiming(shape: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """Uniform in ±1/√columns: PyTorch's kaiming_uniform(a=√5)."""
    bound = shape[1] ** -0.5
    return rng.uniform(-bound, bound, shape)


FileFormat("loha", "LOHA", LoHaConfig, (*PATTERNS, "init_weights"), {}, LACKING, layout=False).register()
