"""EVA: A starts at the main directions of the layer's inputs (Paischer et al. 2024, arXiv:2410.07170)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from ..autograd import Tensor, linear, no_grad
from ..backend import Array, array_module, device_of, to_device, to_host
from ..lora import LoRA, disable_adapter, register
from ..nn import Module, PackedLinear, Transformer
from ..training.loop import as_dict
from .refactored import plain_lora, refactored


@register("lora:eva")
class EVA(LoRA):
    """W' = W + s·B@A, LoRA itself. Until `initialize_lora_eva_weights` has seen data it starts as LoRA does."""


class InputPCA(Module):
    """The main directions of all inputs of a linear layer, batch by batch; while it watches, it hangs on the layer.

    With n inputs before, of mean μ, components V and singular values S, and m new ones X of mean ν: the SVD of the rows
    [S V; X - ν; √(nm/(n+m)) (μ - ν)], cut to `size` again (Ross et al. 2008). The same as of all inputs at once while they
    span no more than `size` directions.
    """

    rowwise = False                                        # sees the rows of a batch in one piece

    def __init__(self, size: int) -> None:
        self.size, self.count, self.total = size, 0, 0.0   # total: Σ ‖x - μ‖² of all inputs
        self.mean: Any = None
        self.S: Any = np.zeros(0)
        self.V: Any = None
        self.similar = np.zeros(0)                         # |cos| of each direction with its last one
        self.mask: np.ndarray | None = None                # (B, T), 0 at padding

    def terms(self) -> list[Any]:                          # the layer is not just a product while it is watched
        return [self]

    def forward(self, x: Tensor, base: Any) -> Tensor:
        X = x.data.reshape(-1, x.shape[-1])
        self.add(X if self.mask is None else X[to_device(np.flatnonzero(self.mask), device_of(X).name)])
        return linear(x, base.weight, base.bias)

    def add(self, X: Array) -> None:                       # (m, in)
        """Take in some more inputs."""
        xp, X, n, m = array_module(X), X.astype("float64"), self.count, len(X)
        mean = X.sum(axis=0) * (1.0 / m)
        rows, last = [X - mean], self.V
        if n:
            drift = (self.mean - mean) * (n * m / (n + m)) ** 0.5
            rows = [self.S[:, None] * self.V, rows[0], drift[None]]
            self.total += float((drift * drift).sum())
        self.total += float(((X - mean) ** 2).sum())
        _, S, V = xp.linalg.svd(xp.concatenate(rows), full_matrices=False)
        self.S, self.V, self.count = S[: self.size], V[: self.size], n + m
        self.mean = mean if not n else (self.mean * n + mean * m) * (1.0 / (n + m))
        if last is not None:
            q = min(len(last), len(self.V))
            self.similar = abs(to_host((last[:q] * self.V[:q]).sum(axis=1)))


def initialize_lora_eva_weights(model: Transformer, batches: Iterable[Any], name: str = "default", *, rho: float = 2.0,
                                tau: float = 0.99, whiten: bool = False) -> dict[str, int]:
    """Start a new adapter with init_lora_weights="eva" from data; returns {module: rank}. PEFT's name and options.

    A = the first right singular vectors of the layer's centred inputs, B = 0: the base is untouched. The Σ r ranks go to the
    directions that explain the largest shares of their layer's variance, at most ρ·r (rounded) to a layer; a layer that
    gets none loses its adapter. Every s stays what it was. batches: as for `train`, without gradients and targets, padding left
    out; reading stops when every direction that is used turned by less than cos = τ. whiten: divide each vector by √σ, as PEFT.

    Raises ValueError for another kind of adapter, one that has been trained, no batches, or rho < 1.
    """
    adapters, modules = plain_lora(model, name, "EVA"), dict[str, Any](model.named_modules())
    if not all(isinstance(a, EVA) and not to_host(a.lora_B.data).any() for a in adapters.values()) or not rho >= 1.0:
        raise ValueError(f"EVA: rho = {rho} and adapter {name!r}: expected rho >= 1, and a new one of "
                         'LoraConfig(init_lora_weights="eva")')
    packed = {id(b): m for m in modules.values() if isinstance(m, PackedLinear) for b in m.blocks.values()}
    product = {path: packed.get(id(modules[path]), modules[path]) for path in adapters}        # the layer that sees the input
    most = {path: min(round(rho * len(a.lora_A)), *modules[path].weight.shape) for path, a in adapters.items()}
    watches = {id(p): InputPCA(max(most[q] for q in adapters if product[q] is p)) for p in product.values()}
    ranks: dict[str, int] = {}
    with no_grad(), disable_adapter(model):
        hung = {id(p): (p, p.adaptation) for p in product.values()}
        try:
            for p, _ in hung.values():
                p.adaptation = watches[id(p)]
            for batch in batches:
                inputs = as_dict(batch)
                for watch in watches.values():
                    watch.mask = to_host(inputs["attention_mask"]) if "attention_mask" in inputs else None
                model.hidden(**{key: value for key, value in inputs.items() if key not in ("targets", "adapter_names")})
                ranks = shared_out(adapters, {path: watches[id(p)] for path, p in product.items()}, most)
                if all((watches[id(p)].similar[: ranks[path]] >= tau).all() and len(watches[id(p)].similar) >= ranks[path]
                       for path, p in product.items()):
                    break
        finally:
            for p, adaptation in hung.values():
                p.adaptation = adaptation
    if not ranks:
        raise ValueError("EVA: got no batches, expected at least one")
    found = {path: watches[id(product[path])] for path, r in ranks.items() if r}
    rows = {path: w.V[: ranks[path]] * (w.S[: ranks[path], None] ** -0.5 if whiten else 1.0) for path, w in found.items()}
    refactored(model, name, {path: (A, 0.0) for path, A in rows.items()})
    return {path: ranks[path] for path in found}


def shared_out(adapters: dict[str, Any], watches: dict[str, InputPCA], most: dict[str, int]) -> dict[str, int]:
    """The rank of every module: its place among the Σ r largest shares of variance S²/Σ‖x - μ‖² of all modules."""
    shares = [(-float(s) ** 2 / (w.total or 1.0), path) for path, w in watches.items() for s in to_host(w.S)[: most[path]]]
    budget = sum(len(a.lora_A) for a in adapters.values())
    chosen = [path for _, path in sorted(shares, key=lambda entry: entry[0])[:budget]]
    return {path: chosen.count(path) for path in adapters}
