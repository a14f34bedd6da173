"""Scaled-dot-product attention and rotary positions."""

from __future__ import annotations

from typing import Any

from ..backend import kernels
from .tensor import Op


class Rotary(Op):
    """Rotary position embedding (Su et al. 2021, arXiv:2104.09864), in the half-split layout of Llama.

    Feature i and feature i + hd/2 are the two coordinates of a point, which is turned by the angle θ = position · ω_i:
        y₁ = x₁ cos θ - x₂ sin θ,    y₂ = x₂ cos θ + x₁ sin θ.
    A rotation's transpose is the rotation back, so x̄ is ȳ turned by -θ. Nothing of x is kept.
    """

    def __init__(self, cos: Any, sin: Any) -> None:
        self.cos, self.sin = cos, sin                           # (T, hd/2)

    def forward(self, x):                                       # (B, H, T, hd) -> (B, H, T, hd)
        return kernels(x).rotary(x, self.cos, self.sin)

    def backward(self, dy):
        return kernels(dy).rotary(dy, self.cos, -self.sin)


class Attention(Op):
    """o = P v,   P = softmax(S) over keys,   S = q kᵀ/√hd + mask (Vaswani et al. 2017, arXiv:1706.03762), for each head.

    H query heads share KV ≤ H key and value heads, H/KV each (grouped queries, arXiv:2305.13245). causal: query i of T sees
    the keys up to i + (S - T), so the last query sees all S keys; this also serves a key-value cache. key_mask (B, S): keys
    marked 0 are seen by nobody. A query that sees no key at all gets o = 0.

    Backward, for each head (Softmax's rule in the middle line, where ⟨P̄, P⟩ = ⟨ō, o⟩ as o = P v):
        v̄ = Pᵀ ō,    P̄ = ō vᵀ,    S̄ = P ⊙ (P̄ - ⟨ō, o⟩),    q̄ = S̄ k/√hd,    k̄ = S̄ᵀ q/√hd.
    Kept are q, k, v, o and one number a query, log Σ exp S: P is computed again from them, so no (T, S) array outlives a
    block of heads (as in FlashAttention, arXiv:2205.14135).
    """

    def __init__(self, causal: bool = False, key_mask: Any = None, scale: float | None = None) -> None:
        self.causal, self.key_mask, self.scale = causal, key_mask, scale

    def forward(self, q, k, v):                                 # (B, H, T, hd), (B, KV, S, hd) twice -> (B, H, T, hd)
        o, lse = kernels(q, k, v).attention(q, k, v, self.causal, self.key_mask, self.scale)
        self.keep(q, k, v, o, lse)
        return o

    def backward(self, do):                                     # (B, H, T, hd) -> q̄, k̄, v̄
        return kernels(do).attention_grad(do, *self.kept, self.causal, self.key_mask, self.scale)
