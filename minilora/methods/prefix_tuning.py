"""Prefix tuning: trained keys and values in front of every attention layer's own (Li & Liang 2021, arXiv:2101.00190)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from ..autograd import Tensor, concatenate
from ..backend import device_of, to_device
from ..lora import register
from ..nn import Embedding, Parameter, Transformer
from .virtual_files import PromptFormat
from .virtual_tokens import Front, VirtualTokens, VirtualTokensConfig


@dataclass(kw_only=True)
class PrefixTuningConfig(VirtualTokensConfig):
    """Prefix tuning with PEFT's names. init_weights: None is normal with standard deviation 0.02, "zero" is zeros.

    Without the paper's two-layer network that makes the prefix while training (prefix_projection), as by PEFT's default.
    """

    method: ClassVar[str] = "prefix"

    init_weights: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.init_weights not in (None, "zero"):
            raise ValueError(f"init_weights = {self.init_weights!r}: expected None or 'zero'")


class Prefixed:
    """A key-value cache of one layer that holds the prefix, and passes gradients: for one forward pass without a cache."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values, self.start = keys, values, keys.shape[2]

    def extend(self, k: Tensor, v: Tensor, start: int) -> tuple[Tensor, Tensor]:   # (B, KV, T, hd) -> (B, KV, p + T, hd)
        return concatenate([self.keys, k], axis=2), concatenate([self.values, v], axis=2)


@register("prefix", Embedding)
class PrefixTuning(Front):
    """k' = [K_l; k],  v' = [V_l; v] in every layer l.   Trains K_l and V_l (p, KV·hd): 2·L·p·KV·hd numbers.

    Every token sees the whole prefix; the tokens' own positions begin at p. Rotary positions do not turn K_l. The start is not
    the base: zeros too take a share p/(p + t) of the attention at position t. It rests on the key-value cache, so it is refused
    on a model that is not causal; `recompute` has no effect under it. Nothing can be merged.
    """

    def __init__(self, layer: Any, config: Any, names: tuple[str, ...], rng: np.random.Generator) -> None:
        super().__init__(layer, config, names, rng)
        cfg = self.cfg
        if not cfg.causal:
            raise ValueError("prefix tuning on a model that is not causal, expected one with a key-value cache (GPT-2, Llama): "
                             "take PromptTuningConfig")
        width = cfg.n_layers * 2 * cfg.n_kv_heads * cfg.head_dim
        start = rng.standard_normal((self.p, width)) * 0.02 if config.init_weights is None else np.zeros((self.p, width))
        self.prompt = Parameter(to_device(start.astype(layer.weight.dtype)))

    def parts(self, batch: int) -> list[tuple[Tensor, Tensor]]:    # -> (keys, values) of every layer, (B, KV, p, hd) each
        cfg = self.cfg
        shape = self.p, cfg.n_layers, 2, cfg.n_kv_heads, cfg.head_dim
        whole = self.prompt.reshape(*shape).transpose(1, 2, 3, 0, 4)               # (L, 2, KV, p, hd)
        device = device_of(self.prompt.data).name
        rows = Tensor(to_device(np.zeros((batch, 1, 1, 1), self.prompt.dtype), device))        # one copy for each row
        return [(whole[i, 0] + rows, whole[i, 1] + rows) for i in range(cfg.n_layers)]

    def hidden(self, model: VirtualTokens, ids: np.ndarray, mask: Any, inputs: dict[str, Any], cache: Any) -> Tensor:
        if "position_ids" in inputs:
            inputs["position_ids"] = inputs["position_ids"] + self.p
        if cache is None:
            cache = [Prefixed(k, v) for k, v in self.parts(len(ids))]
        elif cache[0].start == 0:
            for layer, (k, v) in zip(cache, self.parts(len(ids))):
                layer.extend(k, v, 0)
        return Transformer.hidden(model, ids, attention_mask=mask, cache=cache, **inputs)


PromptFormat("prefix", "PREFIX_TUNING", PrefixTuningConfig).register()
