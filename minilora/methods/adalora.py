"""AdaLoRA: an update in the form of an SVD, whose singular values can be switched off (Zhang et al. 2023, arXiv:2303.10512)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from ..autograd import Tensor, matmul
from ..backend import to_device
from ..lora import LoRA, LoraConfig, register
from ..lora.peft_format import PREFIX
from ..lora.peft_options import LACKING
from ..nn import Linear, Parameter
from .files import FileFormat
from .own_bias import without_biases

OPTIONS = ("lora_alpha", "lora_dropout", "init_r", "target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2",
           "orth_reg_weight", "total_step")


@dataclass(kw_only=True)
class AdaLoraConfig(LoraConfig):
    """AdaLoRA with PEFT's names; `RankAllocator` (adalora_budget.py) does what they say during training.

    init_r: the rank of every update at the start; target_r: the mean rank at the end. total_step: updates of the run, of which
    the first tinit keep all triplets and the last tfinal keep the final choice; between them a new choice every deltaT
    updates. beta1, beta2: of the averages of sensitivity and its uncertainty. orth_reg_weight γ, orth_reg: "peft" (mean of
    ‖PᵀP - I‖_F) or "paper" (sum of the squares). lora_alpha α: s = α/(init_r + 1e-5), whatever is switched off.

    Raises ValueError for a target_r above init_r, or steps that leave no time between tinit and tfinal.
    """

    method: ClassVar[str] = "adalora"                      # type: ignore[assignment]  # in the place of LoRA's property

    target_r: int = 8
    init_r: int = 12
    tinit: int = 0
    tfinal: int = 0
    deltaT: int = 1
    beta1: float = 0.85
    beta2: float = 0.85
    orth_reg_weight: float = 0.5
    orth_reg: str = "peft"
    total_step: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        without_biases(self)
        if not 1 <= self.target_r <= self.init_r:
            raise ValueError(f"target_r = {self.target_r} with init_r = {self.init_r}: expected 1 <= target_r <= init_r")
        if not isinstance(self.total_step, int) or not 0 <= self.tinit < self.total_step - self.tfinal <= self.total_step:
            raise ValueError(f"total_step = {self.total_step} with tinit = {self.tinit}, tfinal = {self.tfinal}: expected "
                             "the number of updates, more than tinit + tfinal")
        if self.orth_reg not in ("peft", "paper") or not (0 < self.beta1 < 1 and 0 < self.beta2 < 1) or self.deltaT < 1:
            raise ValueError(f"orth_reg = {self.orth_reg!r}, beta1 = {self.beta1}, beta2 = {self.beta2}, deltaT = "
                             f"{self.deltaT}: expected 'peft' or 'paper', 0 < β < 1, and at least 1")
        if self.rank_pattern or self.use_rslora or self.use_dora:
            raise ValueError("AdaLoraConfig with rank_pattern, use_rslora or use_dora: expected init_r and target_r alone")

    def rank(self, names: tuple[str, ...]) -> int:
        """init_r, for every module."""
        return self.init_r

    def scale(self, names: tuple[str, ...]) -> float:
        return float(self.alpha(names)) / (self.init_r + 1e-5)


@register("adalora")
class AdaLoRA(LoRA):
    """W' = W + s·P Λ Q.   Trains P (out, r), Λ = diag(λ) and Q (r, in); λ starts at 0: exactly the base; P, Q ~ N(0, 0.02²).

    With ĝ the gradient of W':  P̄ = s ĝ QᵀΛ,  Q̄ = s Λ Pᵀĝ,  λ̄_i = s (Pᵀ ĝ Qᵀ)_ii.  A penalty keeps P and Q near orthonormal, so
    that λ are the update's singular values and switching one off does not disturb the others. PEFT's names: P is lora_B, λ
    is lora_E (r, 1), Q is lora_A.
    """

    leaves: ClassVar[dict[str, str]] = {name: name for name in ("lora_A", "lora_B", "lora_E")}

    def __init__(self, layer: Linear, config: Any, names: tuple[str, ...], rng: np.random.Generator) -> None:
        super().__init__(layer, config, names, rng)
        for p in (self.lora_A, self.lora_B):
            p.data[...] = to_device((rng.standard_normal(p.shape) * 0.02).astype(layer.dtype))
        start = np.zeros((config.init_r, 1)) if config.init_lora_weights else rng.standard_normal((config.init_r, 1))
        self.lora_E = Parameter(to_device(start.astype(layer.dtype)))

    def factors(self) -> tuple[Any, Any, Any]:
        return self.lora_A * self.lora_E, self.lora_B, self.scale

    def adapted_weight(self, W: Tensor) -> Tensor:         # (out, in) -> (out, in)
        A, B, _ = self.factors()
        return W + matmul(B, A) * self.base_scale


class AdaLoraFormat(FileFormat):
    """PEFT cuts off the triplets that are switched off, and says in rank_pattern which; here they come back as zeros."""

    def to_config(self, options: dict[str, Any], tensors: dict[str, np.ndarray], folder: Path) -> Any:
        for name, kept in (options.get("rank_pattern") or {}).items():
            module, on = f"{PREFIX}{name.removesuffix('.lora_E')}", np.asarray(kept, dtype=bool).reshape(-1)
            for leaf, axis in ("lora_A", 0), ("lora_E", 0), ("lora_B", 1):
                cut = tensors.get(f"{module}.{leaf}")
                if cut is None or cut.ndim != 2 or cut.shape[axis] not in (len(on), on.sum()):
                    raise ValueError(f"{folder}: rank_pattern of {name} keeps {on.sum()} of {len(on)} triplets, got {leaf} "
                                     f"{None if cut is None else cut.shape}: do the two files belong together?")
                if cut.shape[axis] < len(on):
                    shape = (len(on), cut.shape[1]) if axis == 0 else (cut.shape[0], len(on))
                    tensors[f"{module}.{leaf}"] = whole = np.zeros(shape, cut.dtype)
                    whole[(on, slice(None)) if axis == 0 else (slice(None), on)] = cut
        return super().to_config(options, tensors, folder)


AdaLoraFormat("adalora", "ADALORA", AdaLoraConfig, OPTIONS, {"bias": "none"},
              LACKING | {"use_rslora": False, "alpha_pattern": {}}).register()
