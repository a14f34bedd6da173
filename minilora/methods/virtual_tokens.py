"""Virtual tokens: what prompt tuning and prefix tuning share. They change no weight, but what stands before the sequence.

    tuned = VirtualTokens(model)                           # the same weights, seen with room for virtual tokens in front
    add_adapter(tuned, PromptTuningConfig(num_virtual_tokens=8))
    train(tuned, …); generate(tuned, …); save_adapter(tuned, DIR); load_adapter(tuned, DIR)

Nothing in nn/ knows of them: a prompt enters through the embedding, a prefix as a key-value cache that is there beforehand.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ..autograd import Tensor
from ..backend import Array, to_host
from ..lora import Adapter, TargetConfig
from ..nn import Embedding, Transformer


@dataclass(kw_only=True)
class VirtualTokensConfig(TargetConfig):
    """num_virtual_tokens p in front of every sequence; they count towards max_len. Raises ValueError for less than one."""

    num_virtual_tokens: int = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        p = self.num_virtual_tokens
        if not isinstance(p, int) or isinstance(p, bool) or p < 1:
            raise ValueError(f"num_virtual_tokens = {p!r}: expected a whole number of at least 1")

    def default_targets(self, model_type: str | None) -> list[str]:
        return ["embed"]


class Front(Adapter):
    """An adapter that lengthens the sequence: it sits on the embedding of a VirtualTokens, and computes the hidden states."""

    def __init__(self, layer: Any, config: Any, names: tuple[str, ...], rng: np.random.Generator) -> None:
        super().__init__(layer, config, names, rng)
        if not isinstance(layer, RoomInFront):
            raise ValueError(f"method {config.method!r} on {names[0]} of a plain model, expected the embedding of one with "
                             "room in front: add_adapter(VirtualTokens(model), config)")
        self.p, self.cfg = config.num_virtual_tokens, layer.cfg
        if self.p >= self.cfg.max_len:
            raise ValueError(f"num_virtual_tokens = {self.p}: expected less than max_len = {self.cfg.max_len}")

    def adapted_weight(self, W: Tensor) -> Tensor:
        raise ValueError("virtual tokens are no change of a weight: they cannot be merged; keep the model as it is")

    def look_up_change(self, ids: Array, base: Embedding) -> Any:
        return 0.0                                         # the tokens themselves stay as they are

    def hidden(self, model: VirtualTokens, ids: np.ndarray, mask: Any, inputs: dict[str, Any], cache: Any) -> Tensor:
        """The hidden states (B, T, D) of ids behind the virtual tokens. inputs: what else the model takes for these ids."""
        raise TypeError(f"{type(self).__name__} defines no hidden")


class RoomInFront(Embedding):
    """The embedding table of `old`, which embeds columns of -1 as the virtual tokens of the active prompt."""

    def __init__(self, old: Embedding, cfg: Any) -> None:
        self.weight, self.adaptation, self.cfg = old.weight, old.adaptation, cfg

    def forward(self, ids: Array) -> Tensor:                       # (B, T) -> (B, T, D)
        front = self.front()
        if front is None or ids.shape[1] <= front.p or (ids[:, : front.p] != -1).any():
            return super().forward(ids)
        return front.before(super().forward(ids[:, front.p :]))

    def front(self) -> Any:
        """The virtual tokens at work, or None. Raises ValueError for several, a strength other than 1, or a mixed batch."""
        terms = [] if self.adaptation is None else self.adaptation.terms()
        found = [(adapter, rows) for adapter, rows in terms if isinstance(adapter, Front)]
        if len(found) > 1 or any(rows is not None or adapter.strength != 1.0 for adapter, rows in found):
            raise ValueError(f"{len(found)} adapters of virtual tokens, or one in a mixed batch or with a strength: expected "
                             "one for all rows, with strength 1")
        return found[0][0] if found else None


class VirtualTokens(Transformer):
    """A model with room for virtual tokens in front: the very modules of `model`, which itself stays as it is.

    Calls, losses and hidden states are those of the real tokens. Without an active adapter of the kind, it is `model`.
    """

    embed: RoomInFront

    def __init__(self, model: Transformer) -> None:
        vars(self).update(vars(model))
        self.embed = RoomInFront(model.embed, model.cfg)

    def hidden(self, ids: Any, *, attention_mask: Any = None, token_type_ids: Any = None, position_ids: Any = None,
               cache: Any = None, read: np.ndarray | None = None) -> Tensor:
        """As in a Transformer. Raises ValueError if virtual and real tokens together are more than max_len, or for padding
        between them in a model with rotary positions."""
        inputs = {"token_type_ids": token_type_ids, "position_ids": position_ids, "read": read}
        front, ids = self.embed.front(), np.asarray(to_host(ids))
        if front is None or ids.ndim != 2:
            return super().hidden(ids, attention_mask=attention_mask, cache=cache, **inputs)
        mask = None if attention_mask is None else ahead(attention_mask, front.p, 1)
        if mask is not None and self.cfg.position == "rope" and ((mask[:, :-1] == 0) & (mask[:, 1:] != 0)).any():
            raise ValueError("virtual tokens before padding on the left with rotary positions, expected padding on the right: "
                             "the gap would change their distances; take rows of one length")
        inputs = {name: np.asarray(to_host(value)) for name, value in inputs.items() if value is not None}
        return front.hidden(self, ids, mask, inputs, cache)


def ahead(array: Any, p: int, value: int) -> np.ndarray:           # (B, T) -> (B, p + T)
    """p columns of a value in front."""
    return np.pad(np.asarray(to_host(array)), ((0, 0), (p, 0)), constant_values=value)
