"""Ranks that shrink during training: what the spectrum of s·B@A does not use is cut off. Not a method but a hook.

(Truncation is by Eckart-Young the nearest update of a rank, so unlike AdaLoRA's scores it needs no gradients and no penalty.)
"""

from __future__ import annotations

from typing import Any

from ..backend import to_host
from ..lora.svd import factored_svd, low_rank_factors
from ..nn import Transformer
from ..rank.measures import energy_rank
from .refactored import plain_lora, refactored


class DynamicRank:
    """Cuts the ranks of a LoRA adapter while it trains.

        optimizer = AdamW([p for _, p in model.named_parameters(trainable=True)], lr=1e-3)
        shrink = DynamicRank(model, energy=0.99, every=50, optimizer=optimizer)
        train(model, batches, TrainConfig(...), optimizer=optimizer, callback=shrink.callback)
        shrink.compact()                                   # smaller parameters; saved with a rank_pattern

    Every `every` updates, from update `start` on, each module's s·B@A = U Σ Vᵀ is cut to the least rank q with
    Σ_{i≤q} σ_i² ≥ energy · Σ σ_i², but no less than `least`, and at most `target_r` if that is given. The factors become
    B = U√(Σ/s) and A = √(Σ/s)Vᵀ; rows and columns beyond q are zero, get zero gradients, and are held at zero. `optimizer`: its
    moments of a cut factor begin anew, since they belong to the old directions.

    ranks: [(update, {module: rank})], the first entry before training. Raises ValueError for options out of range, a target_r
    above the adapter's rank, or an adapter that is not plain LoRA.
    """

    def __init__(self, model: Transformer, name: str = "default", *, energy: float = 0.99, every: int = 100,
                 start: int | None = None, least: int = 1, target_r: int | None = None, optimizer: Any = None) -> None:
        self.adapters = plain_lora(model, name, "DynamicRank")
        self.model, self.name, self.optimizer = model, name, optimizer
        self.energy, self.every, self.least, self.target_r = energy, every, least, target_r
        self.start = every if start is None else start
        ranks = {path: len(a.lora_A) for path, a in self.adapters.items()}
        if not 0.0 < energy <= 1.0 or every < 1 or self.start < 1 or not 1 <= least <= min(ranks.values()):
            raise ValueError(f"DynamicRank: energy = {energy}, every = {every}, start = {start}, least = {least}: expected "
                             f"0 < energy <= 1, at least 1, and a least rank of 1 to {min(ranks.values())}")
        if target_r is not None and not least <= target_r <= min(ranks.values()):
            raise ValueError(f"DynamicRank: target_r = {target_r}, expected a rank from least = {least} to the adapter's "
                             f"{min(ranks.values())}: it only shrinks")
        self.ranks: list[tuple[int, dict[str, int]]] = [(0, ranks)]

    def callback(self, step: int, model: Any = None, history: Any = None) -> None:
        """For `train`, after update number `step` (from 1)."""
        if step >= self.start and step % self.every == 0:
            self.cut(step)
        for path, r in self.ranks[-1][1].items():
            a = self.adapters[path]
            a.lora_A.data[r:], a.lora_B.data[:, r:] = 0.0, 0.0

    def cut(self, step: int) -> None:
        """Cut every module whose spectrum allows it, and record the ranks. An update of zero has no spectrum, and stays."""
        ranks = dict(self.ranks[-1][1])
        for path, a in self.adapters.items():
            r, A, B = ranks[path], a.lora_A.data, a.lora_B.data
            U, S, Vh = factored_svd(B[:, :r], A[:r], a.base_scale)
            if not float(S[0]):
                continue
            q = max(self.least, min(energy_rank(to_host(S), self.energy), self.target_r or r))
            if q < r:
                B[:, :q], A[:q] = low_rank_factors(U[:, :q], S[:q], Vh[:q], a.base_scale)
                ranks[path] = q
                self._forget(a.lora_A, a.lora_B)
        self.ranks.append((step, ranks))

    def _forget(self, *cut: Any) -> None:
        """Begin the optimiser's state of these parameters anew."""
        if self.optimizer is not None:
            held = [p for group in self.optimizer.groups for p in group["params"]]
            for p, state in zip(held, self.optimizer.state, strict=True):
                if any(p is each for each in cut):
                    state["step"] = 0
                    for slot in self.optimizer.slots:
                        state[slot][...] = 0.0

    def compact(self) -> None:
        """Replace the adapter by one whose parameters have the last ranks; its update is the same."""
        final = self.ranks[-1][1]
        refactored(self.model, self.name, {path: (a.lora_A.data[: final[path]], a.lora_B.data[:, : final[path]])
                                           for path, a in self.adapters.items()})
