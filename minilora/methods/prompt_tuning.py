"""Prompt tuning: a few trained vectors in front of the embedded tokens (Lester et al. 2021, arXiv:2104.08691)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from ..autograd import Tensor, concatenate, embedding
from ..backend import to_device, to_host
from ..lora import register
from ..nn import Embedding, Parameter, Transformer
from .virtual_files import PromptFormat
from .virtual_tokens import Front, VirtualTokens, VirtualTokensConfig, ahead


@dataclass(kw_only=True)
class PromptTuningConfig(VirtualTokensConfig):
    """Prompt tuning with PEFT's names. prompt_tuning_init: "RANDOM" or "SAMPLE_VOCAB", rows of the table drawn by the seed."""

    method: ClassVar[str] = "prompt"

    prompt_tuning_init: str = "RANDOM"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.prompt_tuning_init not in ("RANDOM", "SAMPLE_VOCAB"):
            raise ValueError(f"prompt_tuning_init = {self.prompt_tuning_init!r}: expected RANDOM or SAMPLE_VOCAB")


@register("prompt", Embedding)
class PromptTuning(Front):
    """x' = [P; E[ids]], and the p first outputs are left out.   Trains P (p, D): p·D numbers.

    P̄ is the sum over the batch of the gradients at the first p positions. They take positions 0 … p-1, like any tokens. P is
    normal with the table's standard deviation, or rows of the table, which the paper finds better in small models. Nothing
    can be merged; at inference the sequence is p longer.
    """

    def __init__(self, layer: Any, config: Any, names: tuple[str, ...], rng: np.random.Generator) -> None:
        super().__init__(layer, config, names, rng)
        table = to_host(layer.weight)
        if config.prompt_tuning_init == "RANDOM":
            P = rng.standard_normal((self.p, table.shape[1])) * float(table.std())
        else:
            P = table[rng.integers(0, len(table), self.p)]
        self.prompt = Parameter(to_device(P.astype(table.dtype)))

    def before(self, x: Tensor) -> Tensor:                 # (B, T, D) -> (B, p + T, D)
        places = np.broadcast_to(np.arange(self.p), (len(x), self.p))
        return concatenate([embedding(places, self.prompt), x], axis=1)

    def hidden(self, model: VirtualTokens, ids: np.ndarray, mask: Any, inputs: dict[str, Any], cache: Any) -> Tensor:
        p = 0 if cache is not None and cache[0].start else self.p          # later tokens find the prompt in the cache
        if p and "token_type_ids" in inputs:
            inputs["token_type_ids"] = ahead(inputs["token_type_ids"], p, 0)
        if "position_ids" in inputs:
            inputs["position_ids"] = ahead(inputs["position_ids"] + self.p, p, 0)
            inputs["position_ids"][:, :p] = np.arange(p)
        x = Transformer.hidden(model, ahead(ids, p, -1), attention_mask=mask, cache=cache, **inputs)
        return x if "read" in inputs else x[:, p:]


PromptFormat("prompt", "PROMPT_TUNING", PromptTuningConfig).register()
