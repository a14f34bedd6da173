"""What hangs on a layer: an `Adapter` is what one method adds to one layer, an `Adaptation` all the adapters there.

An adapter is a function from small parameters to a weight.

`Adapter.adapted_weight(W)` is the meaning of a method, built from Tensor ops. From it follow, once for all methods: the
forward pass (multiply by the adapted weight), the gradients (autograd), the merge (write it into the layer), and the
analysis (adapted_weight(W) - W). A method whose update is a thin product s·B@A also says so with `factors`, and then the
forward pass never forms ΔW unless that costs less (autograd/linear.py, LoRALinear).

`Adaptation` is what hangs on a Linear, Embedding or LayerNorm: its named adapters, which are active, whether merged.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ..autograd import Tensor, concatenate, embedding, linear, where
from ..autograd.functions import dropout_mask
from ..autograd.linear import LoRALinear
from ..backend import Array, array_module, device_of, to_device
from ..nn import Embedding, LayerNorm, Linear, Module

METHODS: dict[tuple[str, type], type[Adapter]] = {}        # (method, layer type) -> its class
BESIDE: dict[str, Any] = {}    # method -> (model, config, layers taken, rng) -> {path: (layer, Adapter)} on layers not targeted


def register(method: str, layer: type = Linear) -> Callable[[type[Adapter]], type[Adapter]]:
    """Class decorator: make an Adapter known as the method that configs call `method`, for layers of a type."""
    def enter(cls: type[Adapter]) -> type[Adapter]:
        METHODS[method, layer] = cls
        return cls
    return enter


class Adapter(Module):
    """One adaptation of one layer.

    A method defines `adapted_weight` and, if it changes the bias, `adapted_bias`. It may define `factors` if ΔW = s·B@A, or
    override `forward` for speed; tests hold these equal to the adapted weight. These shortcuts are not inherited by a class
    that has an `adapted_weight` of its own: DoRA may build on LoRA, but its update is no thin product.

    adapted_weight and adapted_bias know nothing of `strength`: it is applied to what they return (and in `factors` to s).
    """

    def __init_subclass__(cls) -> None:
        if "adapted_weight" in vars(cls):
            for shortcut in {"factors", "forward", "look_up_change"} - vars(cls).keys():
                setattr(cls, shortcut, getattr(Adapter, shortcut))

    strength = 1.0                                         # set_scale: multiplies the whole update
    dropout = 0.0                                          # on the branch's input, for methods with factors
    brought_bias: Any = None                               # (out,), of a method that adds one where the layer has none

    def __init__(self, layer: Linear | Embedding, config: Any, names: tuple[str, ...], rng: np.random.Generator) -> None:
        self.rng = rng

    @property
    def repeatable(self) -> bool:
        return not (self.training and self.dropout)

    def adapted_weight(self, W: Tensor) -> Tensor:         # (out, in) -> (out, in); for an Embedding (V, D) -> (V, D)
        return W

    def adapted_bias(self, b: Tensor | None) -> Tensor | None:     # (out,) -> (out,)
        return b

    def factors(self) -> tuple[Any, Any, Any] | None:
        """(A (r, in), B (out, r), s) if the update is exactly s·B@A, else None."""
        return None

    def forward(self, x: Tensor, base: Linear) -> Tensor:  # (..., in) -> (..., out)
        return linear(x, *adapted(base, [(base.parts()[0][0], self)]))

    def look_up_change(self, ids: Array, base: Embedding) -> Tensor:       # (...) -> (..., D), on an Embedding
        return embedding(ids, strengthened(self, base.weight) - base.weight)


class Adaptation(Module):
    """All adapters of one layer. It computes the layer's output in the layer's place."""

    def __init__(self) -> None:
        self.adapters: dict[str, Adapter] = {}
        self.active: list[str] = []
        self.enabled = True
        self.row_names: Sequence[str] | None = None        # for one forward pass: the adapter of each row of the batch
        self.saved: list[Array] | None = None              # the base's arrays, bit for bit, while adapters are merged

    @property
    def repeatable(self) -> bool:
        return self.row_names is None

    def terms(self) -> list[tuple[Adapter, list[bool] | None]]:
        """The adapters at work now, and for a mixed batch the rows that use each."""
        if self.saved is not None and self.row_names is not None:
            raise ValueError("adapter_names while adapters are merged: unmerge_adapter(model) first")
        if self.saved is not None or not self.enabled:
            return []
        if self.row_names is None:
            return [(self.adapters[name], None) for name in self.active]
        return [(adapter, [row == name for row in self.row_names]) for name, adapter in self.adapters.items()
                if name in self.row_names]

    def forward(self, x: Tensor, base: Linear) -> Tensor:  # (..., in) -> (..., out)
        """The output of `base` (which may be packed) with all the terms on it and on its row blocks."""
        terms = working_terms(base)
        products = [t for t in terms if changes(t[1], "adapted_weight") or changes(t[1], "forward")]
        factors: list[Any] = [adapter.factors() for _, adapter, _ in products]
        mixed = any(chosen is not None for _, _, chosen in terms)
        if all(f is not None for f in factors) and not (mixed and any(changes(t[1], "adapted_bias") for t in terms)):
            bias = adapted_bias(base, [t[:2] for t in terms])
            if not products:
                return linear(x, base.weight, bias)
            masks = [_mask(x, adapter, chosen) for _, adapter, chosen in products]
            op = LoRALinear([s for _, _, s in factors], [block for block, _, _ in products], masks)
            return op(x, base.weight, bias, *(t for A, B, _ in factors for t in (A, B)))
        if not self.terms():                               # adapters on blocks only: each block for itself
            return concatenate([block(x) for _, block in base.parts()[1:]], axis=-1)
        if not mixed:
            return _by_weight(x, base, [t[:2] for t in terms])
        y = linear(x, base.weight, base.bias)
        for chosen in dict.fromkeys(tuple(chosen) for _, _, chosen in terms):     # a pass over x for each adapter in the batch
            own = _by_weight(x, base, [t[:2] for t in terms if tuple(t[2]) == chosen])
            y = where(_row_mask(y, chosen) != 0, own, y)
        return y

    def move(self, device: str) -> None:
        super().move(device)
        self.saved = None if self.saved is None else [to_device(array, device) for array in self.saved]

    def look_up(self, ids: Array, base: Embedding) -> Tensor:
        """Rows of the embedding (...) -> (..., D) with all the terms added."""
        return self._added(embedding(ids, base.weight), lambda adapter: adapter.look_up_change(ids, base))

    def shift(self, y: Tensor, base: LayerNorm) -> Tensor:         # (..., D) -> (..., D)
        """A norm's output with what the terms change of its bias."""
        return self._added(y, lambda adapter: strengthened(adapter, base.bias, "adapted_bias") - base.bias)

    def _added(self, y: Tensor, change_of: Callable[[Adapter], Tensor]) -> Tensor:
        for adapter, chosen in self.terms():
            change = change_of(adapter)
            y = y + (change if chosen is None else change * _row_mask(y, chosen))
        return y


def working_terms(base: Linear) -> list[tuple[slice, Adapter, Any]]:
    """(rows of the product, adapter, rows of the batch or None) for a layer and its blocks."""
    return [(block, adapter, chosen) for block, layer in base.parts() if layer.adaptation is not None
            for adapter, chosen in layer.adaptation.terms()]


def adapted(base: Linear, terms: list[tuple[slice, Adapter]]) -> tuple[Tensor, Tensor | None]:
    """The weight and bias that `base` has with these adapters on: what is multiplied, and what a merge writes.

    Several adapters on the same rows add up: W + Σ_j (adapted_weight_j(W) - W).
    """
    return _by_rows(base, dense(base), terms, "adapted_weight"), adapted_bias(base, terms)


def adapted_bias(base: Linear, terms: list[tuple[slice, Adapter]]) -> Tensor | None:
    """The bias with these adapters on. Where the layer has none and an adapter brings one, it counts as zero."""
    brought = [adapter.brought_bias.data for _, adapter in terms if adapter.brought_bias is not None]
    old = Tensor(array_module(*brought).zeros(base.weight.shape[0], brought[0].dtype)) if brought else base.bias
    return _by_rows(base, old, terms, "adapted_bias")


def _by_rows(base: Linear, old: Any, terms: list[tuple[slice, Adapter]], what: str) -> Any:
    """`combine` on all rows and on the row blocks of a packed layer; the very `old` where no adapter changes it."""
    terms = [(block, adapter) for block, adapter in terms if changes(adapter, what)]
    if old is None or not terms:
        return old
    whole = slice(0, old.shape[0])
    new = combine(old, old, [a for block, a in terms if block == whole], what)
    if all(block == whole for block, _ in terms):
        return new
    parts = []
    for cut in (block for block, _ in base.parts() if block != whole):
        old_c = old[cut]
        parts.append(combine(old_c if new is old else new[cut], old_c, [a for block, a in terms if block == cut], what))
    return concatenate(parts)


def combine(new: Tensor, old: Tensor, adapters: list[Adapter], what: str = "adapted_weight") -> Tensor:
    """Add to `new` what each adapter changes of `old`."""
    for adapter in adapters:
        changed = strengthened(adapter, old, what)
        new = changed if new is old else new + (changed - old)
    return new


def strengthened(adapter: Adapter, old: Tensor, what: str = "adapted_weight") -> Tensor:
    """The adapted weight (or bias) with the adapter's strength: W + strength (adapted_weight(W) - W)."""
    changed = getattr(adapter, what)(old)
    return changed if changed is old or adapter.strength == 1.0 else old + (changed - old) * adapter.strength


def changes(adapter: Adapter, what: str) -> bool:
    """Whether the adapter's method defines "adapted_weight" or "adapted_bias", or leaves it as it is."""
    return getattr(type(adapter), what) is not getattr(Adapter, what)


def _by_weight(x: Tensor, base: Linear, terms: list[tuple[slice, Adapter]]) -> Tensor:
    """The general way: form the adapted weight and multiply by it. An adapter that is alone may know a faster one."""
    if len(terms) == 1 and terms[0][1].strength == 1.0 and terms[0][0] == base.parts()[0][0]:
        return terms[0][1].forward(x, base)
    return linear(x, *adapted(base, terms))


def dense(base: Linear | Embedding) -> Tensor:
    """The weight of `base` as a Tensor, a quantised one for the moment of use."""
    return base.weight if isinstance(base.weight, Tensor) else Tensor(base.weight.dense())


def _mask(x: Tensor, adapter: Adapter, chosen: list[bool] | None) -> Array | None:
    """What the branch's input is multiplied by: dropout in training, and the rows of a mixed batch that use the adapter."""
    mask = None
    if adapter.training and adapter.dropout:
        mask = to_device(dropout_mask(x.shape, adapter.dropout, adapter.rng, x.dtype), device_of(x.data).name)
    if chosen is not None:
        rows = _row_mask(x, chosen)
        mask = rows if mask is None else mask * rows
    return mask


def _row_mask(x: Tensor, chosen: Sequence[bool]) -> Array:     # (B, 1, …, 1), 1 for the rows that use the adapter
    rows = np.asarray(chosen, dtype=x.dtype).reshape(-1, *[1] * (x.ndim - 1))
    return to_device(rows, device_of(x.data).name)
