"""Products: matmul, the linear layer, and the linear layer with LoRA on it. Nearly all arithmetic of a model is in this file.

Every linear layer is one 2-D product whatever the leading axes of x: n = B·T rows. (A 3-D array times a matrix would be B
small products, on NumPy and on CuPy.)

W is an array (out, in), or any frozen weight with `linear(x)` and `linear_grad(dy)`, which is how a quantised base
multiplies without ever having a dense copy.
"""

from __future__ import annotations

from typing import Any

from ..backend import kernels
from .tensor import Op


class MatMul(Op):
    """y = a b on the last two axes; leading axes broadcast.   ā = ȳ bᵀ,   b̄ = aᵀ ȳ."""

    def forward(self, a, b):                                    # (..., n, k), (..., k, m) -> (..., n, m)
        self.keep(a if self.needs[1] else None, b if self.needs[0] else None)
        return kernels(a, b).matmul(a, b)

    def backward(self, dy):
        a, b = self.kept
        matmul = kernels(dy).matmul
        return (matmul(dy, b, tb=True) if self.needs[0] else None, matmul(a, dy, ta=True) if self.needs[1] else None)


class Linear(Op):
    """y = x Wᵀ + b.

    x̄ = ȳ W,   W̄ = ȳᵀ x,   b̄ = Σ ȳ over rows.   x is kept only for W̄: under a frozen weight it is not kept, and no W̄ is
    computed. W is kept only for x̄.
    """

    def forward(self, x, W, b):                                 # (..., in), (out, in), (out,) -> (..., out)
        self.keep(x if self.needs[1] else None, W if self.needs[0] else None, x.shape)
        y = product(rows(x), W, b)
        return y.reshape((*x.shape[:-1], y.shape[-1]))

    def backward(self, dy):                                     # (..., out)
        x, W, shape = self.kept
        dy2 = rows(dy)
        dx = product_grad(dy2, W).reshape(shape) if self.needs[0] else None
        dW = kernels(dy).matmul(dy2, rows(x), ta=True) if self.needs[1] else None
        return dx, dW, dy2.sum(axis=0) if self.needs[2] else None


class FeedForward(Op):
    """y = act(x W₁ᵀ + b₁) W₂ᵀ + b₂, the MLP of a Transformer as one op, so that it can run on blocks of rows: the hidden
    activations h = act(a), four times as wide as x, then never leave the cache.

    h̄ = ȳ W₂,   ā = h̄ ⊙ act'(a),   x̄ = ā W₁,   W̄₂ = ȳᵀ h,   W̄₁ = āᵀ x.   Under frozen weights only act'(a) is kept.
    """

    def __init__(self, activation: str) -> None:
        self.activation = activation                            # "gelu", "gelu_tanh" or "silu"

    def forward(self, x, W1, b1, W2, b2):                       # (..., D), (F, D), (F,), (D, F), (D,) -> (..., D)
        y, slope, h = kernels(x).feed_forward(rows(x), W1, b1, W2, b2, self.activation, any(self.needs), self.needs[3])
        self.keep(x if self.needs[1] else None, W1, W2, slope, h, x.shape)
        return y.reshape(x.shape[:-1] + y.shape[-1:])

    def backward(self, dy):                                     # (..., D)
        x, W1, W2, slope, h, shape = self.kept
        dy2, matmul = rows(dy), kernels(dy).matmul
        dx = da = None
        if any(self.needs[:3]):
            dx, da = kernels(dy).feed_forward_grad(dy2, slope, W1, W2, self.needs[1] or self.needs[2])
        return (dx.reshape(shape) if self.needs[0] else None,
                matmul(da, rows(x), ta=True) if self.needs[1] else None,
                da.sum(axis=0) if self.needs[2] else None,
                matmul(dy2, h, ta=True) if self.needs[3] else None,
                dy2.sum(axis=0) if self.needs[4] else None)


class LoRALinear(Op):
    """y = x Wᵀ + b + Σ_j s_j (x ⊙ m_j) A_jᵀ B_jᵀ, each term j added to its own rows (output features) of W.

    The terms are the adapters that are active at once, and those on q, k and v, which are row blocks of one packed W.
    m_j is a mask on the branch's input (dropout, or which rows of the batch use the adapter), None where there is none.

    Gradients (Hu et al. 2021, arXiv:2106.09685; with U = (x ⊙ m) Aᵀ, Z = s ȳ B, both n × r):
        Ā = Zᵀ (x ⊙ m),    B̄ = s ȳᵀ U,    x̄ = ȳ W + (Z A) ⊙ m.
    The product ȳᵀ x, as large as W, is formed for a frozen W only where ranks are so high that it costs less (from about a
    quarter of the width on, as VeRA's). Then (ȳᵀ x)ᵀ stands in the place of ȳ and 1 in that of x: the gradients are the same.

    Two orders of computation give the same numbers. Thin: the base product, then two thin ones. Formed: W_eff = W + s B A
    once, used forward and in x̄. The thin order costs 3 n r (in + out) multiply-adds beyond the base products, the formed one
    r·in·out + 2 n r (in + out), so by counted FLOPs forming pays when n > in·out / (in + out) (RunLoRA, arXiv:2312.03415). But
    W_eff is as large as W, has to be written and kept until backward: it is formed when it costs less than half as much, and
    never if there is a mask or the base is not dense.

    With a leading axis K on A (K, r, in) and B (K, out, r), K adapters run side by side: x's rows are K equal groups, and
    group k sees adapter k alone.
    """

    def __init__(self, scales: list[Any], blocks: list[slice], masks: list[Any], formed: bool | None = None) -> None:
        self.scales, self.blocks, self.masks = scales, blocks, masks
        self.formed = formed                                    # None: by counted FLOPs

    def forward(self, x, W, b, *factors):                       # factors: A_1, B_1, A_2, B_2, …
        A, sB = factors[::2], [times(s, B) for s, B in zip(self.scales, factors[1::2], strict=True)]
        groups = A[0].shape[:-2]                                # () or (K,)
        x2 = rows(x, groups)                                    # (n, in) or (K, n, in)
        formable = all(m is None for m in self.masks) and hasattr(W, "dtype")
        if self.formed is None:
            self.formed = formable and _forming_pays(x2.shape[-2], A, sB)
        elif self.formed and not formable:
            raise ValueError("formed=True with a mask on the branch or a base that is not dense: leave it None, or use False")
        multiply, U = kernels(x).matmul, None
        if self.formed:
            W = kernels(x).add_products(W, [(block, s_B, a) for block, s_B, a in zip(self.blocks, sB, A, strict=True)])
            y = multiply(x2, W, tb=True) if groups else kernels(x).linear(x2, W, b)
        else:
            y = rows(product(rows(x), W, b), groups)
            U = [multiply(masked(x, m, groups), a, tb=True) for a, m in zip(A, self.masks, strict=True)]
            for u, s_B, block in zip(U, sB, self.blocks, strict=True):
                y[..., block] += multiply(u, s_B, tb=True)
        self.keep(x if self.needs[1] or any(self.needs[3 :: 1 if self.formed else 2]) else None, W, sB, A, U)
        if b is not None and self.formed and groups:
            y += b
        return y.reshape((*x.shape[:-1], y.shape[-1]))

    def backward(self, dy):                                     # (..., out)
        x, W, sB, A, U = self.kept
        K, groups = kernels(dy), A[0].shape[:-2]
        multiply, dy2, shape = K.matmul, rows(dy, groups), (*dy.shape[:-1], A[0].shape[-1])
        needs_A, needs_B = self.needs[3::2], self.needs[4::2]
        dx = multiply(dy2, W).reshape(shape) if self.needs[0] and self.formed else None
        whole = self.formed and all(self.needs[3:]) and _whole_gradient_pays(dy2.shape[-2], dy2.shape[-1], A, sB)
        if whole:
            dy2, U = multiply(rows(x, groups), dy2, ta=True), [a.swapaxes(-1, -2) for a in A]             # (in, out), (in, r)
        elif U is None:
            U = [multiply(rows(x, groups), a, tb=True) if need else None for a, need in zip(A, needs_B, strict=True)]
        Z = [K.columns_product(dy2, block, s_B) if need or (self.needs[0] and not self.formed) else None       # (n, r)
             for block, s_B, need in zip(self.blocks, sB, needs_A, strict=True)]

        if self.needs[0] and not self.formed:
            dx = product_grad(rows(dy), W).reshape(shape)
            for z, a, m in zip(Z, A, self.masks, strict=True):
                term = multiply(z, a).reshape(shape)
                dx += term if m is None else term * m

        gradients = [multiply(rows(dy), rows(x), ta=True) if self.needs[1] else None,                      # W̄, b̄
                     rows(dy).sum(axis=0) if self.needs[2] else None]
        for j, (s, m, block) in enumerate(zip(self.scales, self.masks, self.blocks, strict=True)):
            dA = Z[j].swapaxes(-1, -2) if whole else multiply(Z[j], masked(x, m, groups), ta=True) if needs_A[j] else None
            gradients += [dA, times(s, K.columns_product_t(dy2, block, U[j])) if needs_B[j] else None]
        return dx, *gradients


def rows(x: Any, groups: tuple[int, ...] = ()) -> Any:
    """x with its leading axes joined: (..., k) -> (n, k), or (K, n, k) for K groups of rows."""
    return x.reshape((*groups, -1, x.shape[-1]))


def masked(x: Any, mask: Any, groups: tuple[int, ...]) -> Any:
    return rows(x if mask is None else x * mask, groups)


def times(scale: Any, B: Any) -> Any:
    """s B, where s is a number, or an array (K,) with one scale for each adapter of a sweep."""
    return B * (scale if isinstance(scale, float) else scale[:, None, None])


def product(x: Any, W: Any, b: Any = None) -> Any:
    """x Wᵀ + b for rows x (n, in) and a weight that is an array (out, in) or multiplies by itself."""
    if hasattr(W, "dtype"):
        return kernels(x).linear(x, W, b)
    y = W.linear(x)
    return y if b is None else y + b


def product_grad(dy: Any, W: Any) -> Any:
    """ȳ W, the gradient of x Wᵀ towards x."""
    return kernels(dy).matmul(dy, W) if hasattr(W, "dtype") else W.linear_grad(dy)


def _forming_pays(n: int, A: Any, B: Any) -> bool:
    """Counted multiply-adds: forming costs Σ r·in·out, and has to save twice that, Σ n r (in + out)."""
    return sum(a.shape[-2] * (n * (a.shape[-1] + b.shape[-2]) - 2 * a.shape[-1] * b.shape[-2])
               for a, b in zip(A, B, strict=True)) > 0


def _whole_gradient_pays(n: int, out: int, A: Any, B: Any) -> bool:
    """Counted multiply-adds of all Ā and B̄: from ȳᵀ x, n·in·out + Σ 2 r·in·out_j; by thin products Σ 2 n r (in + out_j)."""
    k, sizes = A[0].shape[-1], [b.shape[-2:] for b in B]
    return n * k * out < sum(2 * r * (n * (k + d) - k * d) for d, r in sizes)
