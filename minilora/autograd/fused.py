"""Softmax, cross-entropy and the norms: whole formulas as one Op, derived by hand.

Each could be composed from the ops of arithmetic.py, and in the tests it is: the composed twin and finite differences both
judge it. Fused it keeps less and passes over memory less often.
"""

from __future__ import annotations

from typing import Any

from ..backend import array_module, kernels
from .tensor import Op


class Softmax(Op):
    """Softmax over the last axis, y = exp(x - max x) / Σ exp(x - max x).

    ∂y_i/∂x_j = y_i (δ_ij - y_j), so with the cotangent ȳ:   x̄ = y ⊙ (ȳ - ⟨ȳ, y⟩).   Only y is kept.
    """

    def forward(self, x):                                       # (..., V) -> (..., V)
        return self.keep(kernels(x).softmax(x))

    def backward(self, dy):                                     # (..., V) -> (..., V)
        y = self.kept
        return y * (dy - (dy * y).sum(axis=-1, keepdims=True))


class LogSoftmax(Op):
    """y = x - log Σ exp x over the last axis.

    ∂y_i/∂x_j = δ_ij - p_j with p = exp y, so   x̄ = ȳ - p Σ ȳ.   Only y is kept.
    """

    def forward(self, x):                                       # (..., V) -> (..., V)
        return self.keep(x - kernels(x).logsumexp(x)[..., None])

    def backward(self, dy):
        return dy - array_module(dy).exp(self.kept) * dy.sum(axis=-1, keepdims=True)


class CrossEntropy(Op):
    """Mean cross-entropy of rows of logits against target classes, log-softmax included.

    For one row with target t and label smoothing ε the target distribution is q = (1-ε) δ_t + ε/V, and
        ℓ = -Σ_i q_i log p_i = log Σ exp x - (1-ε) x_t - (ε/V) Σ_i x_i,        ∂ℓ/∂x = p - q.
    The loss is Σ_n w_n ℓ_n, with w_n = 1/(number of counted rows), and 0 for a row whose target is `ignore_index`. So
    x̄_n = w_n (p_n - q_n) ȳ. The logits and one number a row (log Σ exp) are kept; p is computed again in backward.

    The rows are K equal groups, each with its own mean: one group, or the losses of K adapters side by side.
    """

    def __init__(self, targets: Any, weights: Any, label_smoothing: float = 0.0) -> None:
        self.targets, self.weights, self.label_smoothing = targets, weights, label_smoothing       # (N,) integers, (K, N/K) w

    def forward(self, logits):                                  # (N, V) -> (K,)
        losses, lse = kernels(logits).cross_entropy(logits, self.targets, self.label_smoothing)
        self.keep(logits, lse)
        return (losses.reshape(self.weights.shape) * self.weights).sum(axis=1)

    def backward(self, dy):                                     # (K,) -> (N, V)
        logits, lse = self.kept
        weights = (self.weights * dy[:, None]).reshape(-1)
        return kernels(logits).cross_entropy_grad(logits, lse, self.targets, weights, self.label_smoothing)


class LinearCrossEntropy(CrossEntropy):
    """CrossEntropy of the logits x Wᵀ for a frozen W (V, D), as one op, so that the (N, V) logits never lie in memory at once.

    x̄_n = w_n (p_n - q_n) W ȳ is a number ȳ times what the logits say. So it is worked out without ȳ in the forward pass, while
    a block's logits are there, and only that (N, D) array is kept.
    """

    def forward(self, x, W):                                    # (N, D), (V, D) -> (K,)
        if self.needs[1]:
            raise ValueError("LinearCrossEntropy with a weight that requires a gradient: use cross_entropy(linear(x, W), …)")
        weights = self.weights.reshape(-1)
        losses, dx = kernels(x).linear_cross_entropy(x, W, self.targets, weights, self.label_smoothing, self.needs[0])
        self.keep(dx)
        return (losses.reshape(self.weights.shape) * self.weights).sum(axis=1)

    def backward(self, dy):                                     # (K,) -> (N, D)
        dx = self.kept
        return (dx.reshape(len(dy), -1, dx.shape[-1]) * dy[:, None, None]).reshape(dx.shape), None


class LayerNorm(Op):
    """y = w ⊙ x̂ + b,   x̂ = (x - μ) ρ,   ρ = 1/√(var x + ε), over the last axis (Ba et al. 2016, arXiv:1607.06450).

    With g = ȳ ⊙ w the gradient through x̂ alone would be ρ g. But μ and ρ depend on x too: shifting x changes nothing, and
    stretching it changes nothing, so the parts of g along 1 and along x̂ are taken out:
        x̄ = ρ (g - mean g - x̂ mean(g ⊙ x̂)),    w̄ = Σ ȳ ⊙ x̂,    b̄ = Σ ȳ.      x - μ and ρ are kept.
    """

    def __init__(self, eps: float = 1e-5) -> None:
        self.eps = eps

    def forward(self, x, w, b):                                 # (..., D), (D,), (D,) -> (..., D)
        y, c, rho = kernels(x).layer_norm(x, w, b, self.eps)
        self.keep(c, rho, w)
        return y

    def backward(self, dy):
        c, rho, w = self.kept
        dx = kernels(dy).layer_norm_grad(dy, c, rho, w) if self.needs[0] else None
        dw = (dy * c * rho).reshape(-1, dy.shape[-1]).sum(axis=0) if self.needs[1] else None
        db = dy.reshape(-1, dy.shape[-1]).sum(axis=0) if self.needs[2] else None
        return dx, dw, db


class RMSNorm(Op):
    """y = w ⊙ x̂,   x̂ = x ρ,   ρ = 1/√(mean x² + ε), over the last axis (Zhang & Sennrich 2019, arXiv:1910.07467).

    As in LayerNorm without the mean, with g = ȳ ⊙ w:
        x̄ = ρ (g - x̂ mean(g ⊙ x̂)),    w̄ = Σ ȳ ⊙ x̂.      x and ρ are kept.
    """

    def __init__(self, eps: float = 1e-5) -> None:
        self.eps = eps

    def forward(self, x, w):                                    # (..., D), (D,) -> (..., D)
        y, rho = kernels(x).rms_norm(x, w, self.eps)
        self.keep(x, rho, w)
        return y

    def backward(self, dy):
        x, rho, w = self.kept
        dx = kernels(dy).rms_norm_grad(dy, x, rho, w) if self.needs[0] else None
        dw = (dy * x * rho).reshape(-1, dy.shape[-1]).sum(axis=0) if self.needs[1] else None
        return dx, dw
