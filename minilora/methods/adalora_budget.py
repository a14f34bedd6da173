"""AdaLoRA's budget: which triplets (column of P, λ, row of Q) of all modules together stay switched on (arXiv:2303.10512)."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..autograd import Tensor, matmul, sqrt
from ..backend import array_module, device_of, to_device, to_host
from ..lora import adapters_of
from ..nn import Transformer
from .adalora import AdaLoRA


class TripletBudget:
    """Which triplets of the given adapters (module -> what has lora_A, lora_B, lora_E) are on, update after update.

    Sensitivity of an entry w:  I = |w ∂L/∂w|,  Ī ← β₁Ī + (1-β₁)I,  Ū ← β₂Ū + (1-β₂)|I - Ī|,  s(w) = Ī Ū.  A triplet scores
    s(λ_i) + mean_j s(P_ji) + mean_j s(Q_ij), and the best b(t) of all keep their λ. Nothing is removed: a triplet that was
    switched off may return, since its vectors stay and its λ goes on training.

    ranks: (update, {module: rank}) of every choice. Raises ValueError if the last choice would come before any score.
    """

    def __init__(self, adapters: dict[str, Any], config: Any) -> None:
        if config.total_step - config.tfinal < 2:
            raise ValueError(f"total_step = {config.total_step} with tfinal = {config.tfinal}, expected at least 2 updates "
                             "before the final ones: the first gives the scores for the last choice")
        self.adapters, self.config = adapters, config
        self.averages: dict[tuple[str, str], tuple[Any, Any]] = {}         # (module, parameter) -> Ī, Ū
        self.masks: dict[str, Any] = {}                    # module -> (r, 1), 1 where a triplet is on
        self.ranks: list[tuple[int, dict[str, int]]] = []

    def budget(self, step: int) -> int:
        """b(t) = b₀ up to tinit, b_T from T - tfinal on, between them b_T + (b₀-b_T)(1 - (t-tinit)/(T-tfinal-tinit))³.

        The paper prints t - tinit - tfinal in the numerator; only t - tinit, as in all code, is continuous.
        """
        c, modules = self.config, len(self.adapters)
        start, end = c.init_r * modules, c.target_r * modules
        if step <= c.tinit:
            return start
        left = max(0.0, 1.0 - (step - c.tinit) / (c.total_step - c.tfinal - c.tinit))
        return int((start - end) * left**3 + end)

    def orthogonality(self) -> Tensor:
        """R: Σ (‖PᵀP - I‖²_F + ‖QQᵀ - I‖²_F) of the paper, or PEFT's mean of ‖·‖_F over all matrices."""
        matrices = [m for a in self.adapters.values() for m in (a.lora_A, a.lora_B.T)]         # rows that should be orthonormal
        squares: Any = [from_orthonormal(m, array_module(m.data).eye(m.shape[0], dtype=m.dtype)) for m in matrices]
        if self.config.orth_reg == "paper":
            return sum(squares[1:], squares[0])
        return sum(map(sqrt, squares[1:]), sqrt(squares[0])) * (1.0 / len(matrices))

    def after(self, step: int) -> None:
        """After update number `step` (from 1), with its gradients still in place: score, and choose when it is due."""
        c, final = self.config, self.config.total_step - self.config.tfinal
        if step < final:
            self.score()
        if step == final or (c.tinit < step < final and step % c.deltaT == 0):
            self.choose(step)
        elif step < final:
            return
        for path, mask in self.masks.items():
            E = self.adapters[path].lora_E.data
            E *= mask

    def score(self) -> None:
        """Take the gradients into the averages Ī and Ū."""
        b1, b2 = float(self.config.beta1), float(self.config.beta2)
        for path, adapter in self.adapters.items():
            for name in ("lora_A", "lora_B", "lora_E"):
                p = getattr(adapter, name)
                now = abs(p.data * p.grad)
                mean, spread = self.averages.get((path, name), (now * 0.0, now * 0.0))
                mean = b1 * mean + (1.0 - b1) * now
                self.averages[path, name] = mean, b2 * spread + (1.0 - b2) * abs(now - mean)

    def choose(self, step: int) -> None:
        """Switch on the b(t) triplets with the best scores. On a tie the earlier one stays, so the budget is met exactly."""
        scores = []
        for path in self.adapters:
            A, B, E = (to_host(mean * spread) for mean, spread in (self.averages[path, f"lora_{m}"] for m in "ABE"))
            scores.append(E[:, 0] + A.mean(axis=1) + B.mean(axis=0))
        on = np.zeros(len(scores) * self.config.init_r)
        on[np.argsort(-np.concatenate(scores), kind="stable")[: self.budget(step)]] = 1.0
        for (path, adapter), own in zip(self.adapters.items(), np.split(on, len(scores)), strict=True):
            E = adapter.lora_E.data
            self.masks[path] = to_device(own[:, None].astype(E.dtype), device_of(E).name)
        self.ranks.append((step, {path: int(to_host(mask).sum()) for path, mask in self.masks.items()}))


def from_orthonormal(m: Tensor, eye: Any) -> Tensor:       # (…, r, n), (…, r, r) -> (…)
    """‖m mᵀ - I‖²_F: how far the rows of m are from orthonormal ones."""
    off = matmul(m, m.transpose(*range(m.ndim - 2), -1, -2)) - eye
    return (off * off).sum(axis=(-2, -1))


class RankAllocator(TripletBudget):
    """Cuts the budget of an AdaLoRA adapter during training.

        allocator = RankAllocator(model)
        train(model, batches, TrainConfig(...), penalty=allocator.penalty, callback=allocator.callback)

    Raises ValueError if the adapter is not AdaLoRA.
    """

    def __init__(self, model: Transformer, name: str = "default") -> None:
        adapters = {path: a for path, a in adapters_of(model, name).items() if isinstance(a, AdaLoRA)}
        if not adapters:
            raise ValueError(f"RankAllocator: adapter {name!r} is not AdaLoRA; add_adapter(model, AdaLoraConfig(...)) first")
        super().__init__(adapters, model.adapter_configs[name])

    def penalty(self, model: Any = None) -> Tensor:
        """γ R, for `train` to add to each loss."""
        return self.orthogonality() * float(self.config.orth_reg_weight)

    def callback(self, step: int, model: Any = None, history: Any = None) -> None:
        """For `train`."""
        self.after(step)
