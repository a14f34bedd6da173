"""Activations. Each forward computes the slope y' beside y, in the same pass over memory, and keeps only the slope.

The slope takes exactly the room that x would, and backward is then one product.
"""

from __future__ import annotations

from ..backend import kernels
from .tensor import Op


class GELU(Op):
    """y = x Φ(x), Φ the normal distribution function: Φ(x) = (1 + erf(x/√2)) / 2 (Hendrycks & Gimpel, arXiv:1606.08415).

    y' = Φ(x) + x φ(x) with the density φ(x) = exp(-x²/2)/√(2π);   x̄ = ȳ y'.
    """

    def forward(self, x):
        y, slope = kernels(x).gelu(x, self.needs[0])
        self.keep(slope)
        return y

    def backward(self, dy):
        return dy * self.kept


class GELUTanh(Op):
    """y = x (1 + t)/2,   t = tanh u,   u = √(2/π) (x + 0.044715 x³): GPT-2's approximation of GELU.

    y' = (1 + t)/2 + x (1 - t²) u'/2 with u' = √(2/π) (1 + 0.134145 x²);   x̄ = ȳ y'.
    """

    def forward(self, x):
        y, slope = kernels(x).gelu_tanh(x, self.needs[0])
        self.keep(slope)
        return y

    def backward(self, dy):
        return dy * self.kept


class SiLU(Op):
    """y = x σ(x) with σ(x) = 1/(1 + e^-x).   y' = σ (1 + x (1 - σ));   x̄ = ȳ y'."""

    def forward(self, x):
        y, slope = kernels(x).silu(x, self.needs[0])
        self.keep(slope)
        return y

    def backward(self, dy):
        return dy * self.kept


class SwiGLU(Op):
    """y = silu(g) ⊙ u, the gate of Llama's MLP (Shazeer 2020, arXiv:2002.05202).

    ḡ = ȳ ⊙ u ⊙ silu'(g),    ū = ȳ ⊙ silu(g).   The two factors are kept, not g and u.
    """

    def forward(self, g, u):                                    # (..., F), (..., F) -> (..., F)
        y, by_g, by_u = kernels(g, u).swiglu(g, u, any(self.needs))
        self.keep(by_g, by_u)
        return y

    def backward(self, dy):
        by_g, by_u = self.kept
        return dy * by_g if self.needs[0] else None, dy * by_u if self.needs[1] else None
