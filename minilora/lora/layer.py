"""An adaptation is a function from small parameters to a weight. This file says so, and puts it onto a layer.

`Adapter.adapted_weight(W)` is the meaning of a method, built from Tensor ops. From it follow, once for all methods: the
forward pass (multiply by the adapted weight), the gradients (autograd), the merge (write it into the layer), and the
analysis (adapted_weight(W) - W). A method whose update is a thin product s·B@A also says so with `factors`, and then the
forward pass never forms ΔW unless that costs less (autograd/linear.py, LoRALinear).

`Adaptation` is what hangs on a Linear or Embedding: its named adapters, which of them are active, and whether merged.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ..autograd import Tensor, concatenate, embedding, linear
from ..autograd.functions import dropout_mask
from ..autograd.linear import LoRALinear
from ..backend import Array, device_of, to_device
from ..nn import Embedding, Linear, Module

METHODS: dict[tuple[str, type], type[Adapter]] = {}        # (method, layer type) -> its class


def register(method: str, layer: type = Linear) -> Callable[[type[Adapter]], type[Adapter]]:
    """Class decorator: make an Adapter known as the method that configs call `method`, for layers of a type."""
    def enter(cls: type[Adapter]) -> type[Adapter]:
        METHODS[method, layer] = cls
        return cls
    return enter


class Adapter(Module):
    """One adaptation of one layer.

    A method defines `adapted_weight` and, if it changes the bias, `adapted_bias`. It may define `factors` if ΔW = s·B@A, or
    override `forward` for speed; tests hold these equal to the adapted weight.
    """

    strength = 1.0                                         # set_scale: multiplies the whole update
    dropout = 0.0                                          # on the branch's input, for methods with factors

    def __init__(self, layer: Linear | Embedding, config: Any, names: tuple[str, ...], rng: np.random.Generator) -> None:
        self.rng = rng

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
        return embedding(ids, _strengthened(self, base.weight) - base.weight)


class Adaptation(Module):
    """All adapters of one layer. It computes the layer's output in the layer's place."""

    def __init__(self) -> None:
        self.adapters: dict[str, Adapter] = {}
        self.active: list[str] = []
        self.enabled = True
        self.row_names: Sequence[str] | None = None        # for one forward pass: the adapter of each row of the batch
        self.saved: list[Array] | None = None              # the base's arrays, bit for bit, while adapters are merged

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
        if not terms:
            return linear(x, base.weight, base.bias)
        factors = [adapter.factors() for _, adapter, _ in terms]
        if all(f is not None for f in factors):
            masks = [_mask(x, adapter, chosen) for _, adapter, chosen in terms]
            op = LoRALinear([s for _, _, s in factors], [block for block, _, _ in terms], masks)
            bias = base.bias if _plain_bias(terms) else adapted(base, [(b, a) for b, a, _ in terms])[1]
            return op(x, base.weight, bias, *(t for A, B, _ in factors for t in (A, B)))
        if any(chosen is not None for _, _, chosen in terms):
            raise ValueError("adapter_names: a batch can be mixed only among adapters that are thin products (LoRA)")
        if len(terms) == 1 and terms[0][1].strength == 1.0 and len(base.parts()) == 1:
            return terms[0][1].forward(x, base)
        return linear(x, *adapted(base, [(block, adapter) for block, adapter, _ in terms]))

    def look_up(self, ids: Array, base: Embedding) -> Tensor:
        """Rows of the embedding (...) -> (..., D) with all the terms added."""
        y = embedding(ids, base.weight)
        for adapter, chosen in self.terms():
            change = adapter.look_up_change(ids, base)
            y = y + (change if chosen is None else change * _row_mask(y, chosen))
        return y


def working_terms(base: Linear) -> list[tuple[slice, Adapter, list[bool] | None]]:
    """(rows of the product, adapter, rows of the batch or None) for a layer and its blocks."""
    return [(block, adapter, chosen) for block, layer in base.parts() if layer.adaptation is not None
            for adapter, chosen in layer.adaptation.terms()]


def adapted(base: Linear, terms: list[tuple[slice, Adapter]]) -> tuple[Tensor, Tensor | None]:
    """The weight and bias that `base` has with these adapters on: what is multiplied, and what a merge writes.

    Several adapters on the same rows add up: W + Σ_j (adapted_weight_j(W) - W).
    """
    W, b = base.weight, base.bias
    W = W if isinstance(W, Tensor) else Tensor(W.dense())
    whole = slice(0, W.shape[0])
    W_new, b_new = _combine(W, b, W, b, [a for block, a in terms if block == whole])
    cuts = [block for block, _ in base.parts() if block != whole]
    if any(block != whole for block, _ in terms):
        parts = []
        for c in cuts:
            W_c, b_c = W[c], None if b is None else b[c]
            start = (W_c if W_new is W else W_new[c]), (b_c if b_new is b else b_new[c])
            parts.append(_combine(*start, W_c, b_c, [a for block, a in terms if block == c]))
        W_new = concatenate([w for w, _ in parts])
        b_new = None if b is None else concatenate([bias for _, bias in parts])
    return W_new, b_new


def _combine(W_new: Tensor, b_new: Tensor | None, W: Tensor, b: Tensor | None, adapters: list[Adapter]) -> tuple[Any, Any]:
    """Add to W_new and b_new what each adapter changes of W and b."""
    for adapter in adapters:
        weight, bias = _strengthened(adapter, W), adapter.adapted_bias(b)
        W_new = weight if W_new is W else W_new + (weight - W)
        if bias is not b:
            b_new = bias if b_new is b else b_new + (bias - b)
    return W_new, b_new


def _strengthened(adapter: Adapter, W: Tensor) -> Tensor:
    weight = adapter.adapted_weight(W)
    return weight if adapter.strength == 1.0 or adapter.factors() else W + (weight - W) * adapter.strength


def _plain_bias(terms: list[Any]) -> bool:
    return all(type(adapter).adapted_bias is Adapter.adapted_bias for _, adapter, _ in terms)


def _mask(x: Tensor, adapter: Adapter, chosen: list[bool] | None) -> Array | None:
    """What the branch's input is multiplied by: dropout in training, and the rows of a mixed batch that use the adapter."""
    mask = None
    if adapter.training and adapter.dropout:
        mask = to_device(dropout_mask(x.shape, adapter.dropout, adapter.rng, x.dtype), device_of(x.data).name)
    if chosen is not None:
        rows = _row_mask(x, chosen)
        mask = rows if mask is None else mask * rows
    return mask


def _row_mask(x: Tensor, chosen: list[bool]) -> Array:     # (B, 1, …, 1), 1 for the rows that use the adapter
    rows = np.asarray(chosen, dtype=x.dtype).reshape(-1, *[1] * (x.ndim - 1))
    return to_device(rows, device_of(x.data).name)
