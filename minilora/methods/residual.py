"""Starts that take a part of W itself: PiSSA its largest directions, MiLoRA its smallest, OLoRA the first ones of its QR.

The papers move that part out of the frozen weight: W = s·B₀A₀ + W_res, then train B and A from B₀ and A₀. Here W stays as it
is, and ΔW = s(B A - B₀A₀): the same function, but the start is the base exactly, switching off gives the base, and the update
can be saved as a plain LoRA of rank 2r for anybody's copy of the base.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from ..autograd import Tensor, concatenate, matmul
from ..backend import Array, array_module, device_of, to_device
from ..lora import LoRA, register
from ..lora.layer import dense
from ..lora.svd import low_rank_factors
from ..nn import Linear


class Residual(LoRA):
    """W' = W + s·(B A - B₀ A₀) = W + s·[B - B₀, B₀] [A; A - A₀].   Trains A (r, in) and B (out, r), from A₀ and B₀.

    Ā = s Bᵀ W̄' and B̄ = s W̄' Aᵀ as in LoRA, but neither is zero at the start. Written with the differences, the update is
    exactly zero at the start and thin: rank 2r. Dropout is on this update alone (PEFT drops the whole of B A).
    """

    def __init__(self, layer: Linear, config: Any, names: tuple[str, ...], rng: np.random.Generator) -> None:
        super().__init__(layer, config, names, rng)
        W = dense(layer).data
        self.start = str(config.init_lora_weights)
        B, A = self.first_factors(W.astype("float64"), self.lora_A.shape[0], rng)
        self.to(device_of(W).name)
        self.lora_A.data[...], self.lora_B.data[...] = A, B
        self.A0, self.B0 = self.lora_A.data.copy(), self.lora_B.data.copy()

    def first_factors(self, W: Array, r: int, rng: np.random.Generator) -> tuple[Array, Array]:
        """B₀ (out, r) and A₀ (r, in) for a weight W (out, in)."""
        raise TypeError(f"{type(self).__name__} defines no first_factors")

    def factors(self) -> tuple[Any, Any, Any]:
        A, B = self.lora_A, self.lora_B
        return concatenate([A, A - self.A0]), concatenate([B - self.B0, Tensor(self.B0)], axis=1), self.scale

    def adapted_weight(self, W: Tensor) -> Tensor:         # (out, in) -> (out, in)
        A, B, _ = self.factors()
        return W + matmul(B, A) * self.base_scale

    def move(self, device: str) -> None:
        super().move(device)
        if hasattr(self, "A0"):
            self.A0, self.B0 = to_device(self.A0, device), to_device(self.B0, device)


@register("lora:pissa")
class PiSSA(Residual):
    """W = U S Vᵀ:   s·B₀A₀ is its best approximation of rank r (Meng et al. 2024, arXiv:2404.02948).

    B₀ = U_r √(S_r/s),  A₀ = √(S_r/s) V_rᵀ. "pissa" takes the exact SVD, "pissa_niter_N" a randomised one with N rounds.
    """

    def first_factors(self, W: Array, r: int, rng: np.random.Generator) -> tuple[Array, Array]:
        match = re.fullmatch(r"pissa(?:_niter_(\d+))?", self.start)
        if match is None:
            raise ValueError(f"init_lora_weights = {self.start!r}: expected 'pissa' or 'pissa_niter_N' with N rounds, as 4")
        U, S, Vh = array_module(W).linalg.svd(W, full_matrices=False) if match[1] is None else \
            randomised_svd(W, r, int(match[1]), rng)
        return low_rank_factors(U[:, :r], S[:r], Vh[:r], self.base_scale)


@register("lora:milora")
class MiLoRA(Residual):
    """As PiSSA with the r smallest singular values: what W uses least is retrained (Wang et al. 2024, arXiv:2406.09044)."""

    def first_factors(self, W: Array, r: int, rng: np.random.Generator) -> tuple[Array, Array]:
        U, S, Vh = array_module(W).linalg.svd(W, full_matrices=False)
        return low_rank_factors(U[:, -r:], S[-r:], Vh[-r:], self.base_scale)


@register("lora:olora")
class OLoRA(Residual):
    """W = Q R:   B₀ = Q[:, :r], orthonormal, and A₀ = R[:r] (Büyükakyüz 2024, arXiv:2406.01775).

    As in the author's code neither is divided by s: the part taken out is s Q_r R_r.
    """

    def first_factors(self, W: Array, r: int, rng: np.random.Generator) -> tuple[Array, Array]:
        Q, R = array_module(W).linalg.qr(W)
        return Q[:, :r], R[:r]


def randomised_svd(W: Array, r: int, rounds: int, rng: np.random.Generator, extra: int = 6) -> tuple[Array, Array, Array]:
    # (out, in) -> (out, q), (q,), (q, in)
    """An SVD of the r strongest directions of W, from products with q = r + extra random vectors.

    Y = W Ω, then `rounds` times Y ← W (Wᵀ Q(Y)), each made orthonormal; the SVD of Q(Y)ᵀ W is small (Halko et al. 2011,
    arXiv:0909.4061, algorithm 4.4). O(out·in·q) in place of O(out·in·min(out, in)).
    """
    xp, q = array_module(W), min(r + extra, *W.shape)
    Q = xp.linalg.qr(W @ to_device(rng.standard_normal((W.shape[1], q)), device_of(W).name))[0]
    for _ in range(rounds):
        Q = xp.linalg.qr(W @ xp.linalg.qr(W.T @ Q)[0])[0]
    U, S, Vh = xp.linalg.svd(Q.T @ W, full_matrices=False)
    return Q @ U, S, Vh
