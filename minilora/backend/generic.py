"""The primitives in their readable form: the same lines on NumPy and CuPy, through `xp`.

These are the reference. `numpy_fast.py` (and, for a GPU, CuPy kernels) override some of them with faster versions that the
tests hold equal to these. The derivations stand with the Ops in autograd/; here is only the arithmetic.

Rules of this file (they keep it right on both libraries): constants are Python floats, so float32 stays float32; sums are
divided by hand instead of `mean`; masks are -inf added to the scores; batched products get contiguous operands.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

from .erf import erf

Array = Any

LOWEST = -1e30  # stands in for a row maximum of -inf, so that a row whose keys are all masked gives exp(-inf) = 0, not NaN
TINY = 1e-30    # stands in for its sum of 0


class Kernels:
    """The primitives for one array library `xp`. Arrays in, new arrays out; nothing is changed in place unless it says so."""

    tf32: bool | None = None      # whether float32 products may round to TF32; None where the device has none

    def __init__(self, xp: Any) -> None:
        self.xp = xp
        self.reads_slices = xp.__name__ == "numpy"     # whether a product takes some columns of a matrix without a copy

    # What runs side by side

    def shards(self, n: int, size: int) -> list[slice]:
        """How n rows, `size` elements in all, are best shared out to threads that each compute a part of a model on theirs."""
        return [slice(0, n)]

    def side_by_side(self, fn: Callable[[Any], None], items: Iterable[Any]) -> None:
        """Call fn on each of the items, which do not depend on each other."""
        for item in items:
            fn(item)

    def add(self, a: Array, b: Array) -> Array:
        return a + b

    # Products

    def matmul(self, a: Array, b: Array, ta: bool = False, tb: bool = False) -> Array:
        """a @ b on the last two axes, either one transposed first. 2-D operands are not copied; batched ones are."""
        a, b = a.swapaxes(-1, -2) if ta else a, b.swapaxes(-1, -2) if tb else b
        if a.ndim == b.ndim == 2:
            return a @ b
        return self.xp.ascontiguousarray(a) @ self.xp.ascontiguousarray(b)

    def columns_product(self, x: Array, block: slice, b: Array) -> Array:      # (..., n, out), (..., w, r) -> (..., n, r)
        """x[..., block] @ b. Where a product cannot read some columns, it reads all of them, against zeros."""
        if self.reads_slices or x.shape[-1] == b.shape[-2]:
            return self.matmul(x[..., block], b)
        padded = self.xp.zeros((*b.shape[:-2], x.shape[-1], b.shape[-1]), dtype=b.dtype)
        padded[..., block, :] = b
        return self.matmul(x, padded)

    def columns_product_t(self, x: Array, block: slice, b: Array) -> Array:    # (..., n, out), (..., n, r) -> (..., w, r)
        """x[..., block]ᵀ @ b, likewise."""
        if self.reads_slices:
            return self.matmul(x[..., block], b, ta=True)
        return self.matmul(x, b, ta=True)[..., block, :]

    def add_products(self, W: Array, terms: list[tuple[slice, Array, Array]]) -> Array:
        """W with B @ A added to the given rows, in a new array. With B (K, out, r), A (K, r, in): K of them, (K, out, in)."""
        lead = terms[0][1].shape[:-2]
        result = self.xp.empty((*lead, *W.shape), dtype=W.dtype)
        result[...] = W
        for block, B, A in terms:
            result[..., block, :] += self.matmul(B, A)
        return result

    def linear(self, x: Array, W: Array, b: Array | None) -> Array:    # (n, in), (out, in), (out,) -> (n, out)
        """x Wᵀ + b."""
        y = self.matmul(x, W, tb=True)
        if b is not None:
            y += b
        return y

    def feed_forward(self, x: Array, W1: Array, b1: Array | None, W2: Array, b2: Array | None, activation: str, slope: bool,
                     hidden: bool) -> tuple[Array, Array | None, Array | None]:
        """act(x W1ᵀ + b1) W2ᵀ + b2 for rows x (n, D); and, if asked for, the slope act' and the hidden rows (n, F)."""
        h, s = getattr(self, activation)(self.linear(x, W1, b1), slope)
        return self.linear(h, W2, b2), s, h if hidden else None

    def feed_forward_grad(self, dy: Array, s: Array, W1: Array, W2: Array, hidden: bool) -> tuple[Array, Array | None]:
        """x̄ = h̄ W1 with h̄ = ȳ W2 ⊙ s (n, F); and h̄ if asked for."""
        dh = self.matmul(dy, W2) * s
        return self.matmul(dh, W1), dh if hidden else None

    # Softmax and cross-entropy

    def softmax(self, x: Array) -> Array:                          # (..., V) -> (..., V)
        y = self.xp.exp(x - x.max(axis=-1, keepdims=True))
        y /= y.sum(axis=-1, keepdims=True)
        return y

    def logsumexp(self, x: Array) -> Array:                        # (..., V) -> (...)
        top = x.max(axis=-1, keepdims=True)
        return self.xp.log(self.xp.exp(x - top).sum(axis=-1)) + top[..., 0]

    def cross_entropy(self, logits: Array, targets: Array, smoothing: float) -> tuple[Array, Array]:
        """Loss of every row and log Σ exp of every row. A target outside 0..V-1 counts as 0 (its weight will be 0)."""
        V = logits.shape[-1]
        lse = self.logsumexp(logits)                               # (N,)
        chosen = self.xp.take_along_axis(logits, self._inside(targets, V)[:, None], axis=-1)[:, 0]
        losses = lse - (1.0 - smoothing) * chosen
        if smoothing:
            losses -= (smoothing / V) * logits.sum(axis=-1)
        return losses, lse

    def cross_entropy_grad(self, logits: Array, lse: Array, targets: Array, weights: Array, smoothing: float) -> Array:
        """weights ⊙ (p - q), q the smoothed one-hot of the targets."""
        N, V = logits.shape
        p = self.xp.exp(logits - lse[:, None])
        if smoothing:
            p -= smoothing / V
        p[self.xp.arange(N), self._inside(targets, V)] -= 1.0 - smoothing
        p *= weights[:, None]
        return p

    def linear_cross_entropy(self, x: Array, W: Array, targets: Array, weights: Array, smoothing: float, gradient: bool,
                             ) -> tuple[Array, Array | None]:
        """Loss of every row for the logits x Wᵀ, and if asked for weights ⊙ (p - q) W."""
        logits = self.matmul(x, W, tb=True)
        losses, lse = self.cross_entropy(logits, targets, smoothing)
        if not gradient:
            return losses, None
        return losses, self.matmul(self.cross_entropy_grad(logits, lse, targets, weights, smoothing), W)

    def _inside(self, targets: Array, V: int) -> Array:
        return targets * ((targets >= 0) & (targets < V))

    # Norms

    def layer_norm(self, x: Array, w: Array, b: Array, eps: float) -> tuple[Array, Array, Array]:
        """y, the centred c = x - μ, and ρ (with a last axis of 1)."""
        share = 1.0 / x.shape[-1]
        c = x - x.sum(axis=-1, keepdims=True) * share
        rho = ((c * c).sum(axis=-1, keepdims=True) * share + eps) ** -0.5
        return c * rho * w + b, c, rho

    def layer_norm_grad(self, dy: Array, c: Array, rho: Array, w: Array) -> Array:
        share = 1.0 / dy.shape[-1]
        normal, g = c * rho, dy * w
        along = (g * normal).sum(axis=-1, keepdims=True) * share
        g -= g.sum(axis=-1, keepdims=True) * share
        g -= normal * along
        g *= rho
        return g

    def rms_norm(self, x: Array, w: Array, eps: float) -> tuple[Array, Array]:
        """y, and ρ (with a last axis of 1)."""
        rho = ((x * x).sum(axis=-1, keepdims=True) * (1.0 / x.shape[-1]) + eps) ** -0.5
        return x * rho * w, rho

    def rms_norm_grad(self, dy: Array, x: Array, rho: Array, w: Array) -> Array:
        normal, g = x * rho, dy * w
        g -= normal * ((g * normal).sum(axis=-1, keepdims=True) * (1.0 / dy.shape[-1]))
        g *= rho
        return g

    # Activations: y, and the slope y' if it is asked for (else None)

    def gelu(self, x: Array, slope: bool) -> tuple[Array, Array | None]:
        cdf = 0.5 * (1.0 + erf(self.xp, x * math.sqrt(0.5)))
        if not slope:
            return x * cdf, None
        return x * cdf, cdf + x * self.xp.exp(-0.5 * x * x) * (1.0 / math.sqrt(2.0 * math.pi))

    def gelu_tanh(self, x: Array, slope: bool) -> tuple[Array, Array | None]:
        c = math.sqrt(2.0 / math.pi)
        square = x * x
        t = self.xp.tanh(c * x * (1.0 + 0.044715 * square))
        y = 0.5 * x * (1.0 + t)
        if not slope:
            return y, None
        return y, 0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * (c * (1.0 + 0.134145 * square))

    def silu(self, x: Array, slope: bool) -> tuple[Array, Array | None]:
        sigma = 0.5 * (1.0 + self.xp.tanh(0.5 * x))                # 1/(1 + e^-x) without overflow
        y = x * sigma
        return y, sigma + y * (1.0 - sigma) if slope else None

    def swiglu(self, g: Array, u: Array, slopes: bool) -> tuple[Array, Array | None, Array | None]:
        """silu(g) ⊙ u, and the slopes towards g and u."""
        by_u, slope = self.silu(g, slopes)
        return by_u * u, u * slope if slopes else None, by_u if slopes else None

    # Positions and attention

    def join(self, parts: list[Array]) -> Array:                   # (..., n_0), (..., n_1), … -> (..., Σ n)
        """The parts side by side along the last axis."""
        return self.xp.concatenate(parts, axis=-1)

    def rotary(self, x: Array, cos: Array, sin: Array) -> Array:   # (B, H, T, hd), (T, hd/2) twice -> (B, H, T, hd)
        half = x.shape[-1] // 2
        y = self.xp.empty_like(x)
        a, b = x[..., :half], x[..., half:]
        y[..., :half] = a * cos - b * sin
        y[..., half:] = b * cos + a * sin
        return y

    def scores_mask(self, T: int, S: int, causal: bool, key_mask: Array | None, dtype: Any) -> Array | None:
        """What is added to the scores: 0 where query i of T may see key j of S, -inf elsewhere. (T, S) or (B, 1, 1 or T, S)."""
        xp, mask = self.xp, None
        if causal and T > 1:
            mask = xp.triu(xp.full((T, S), -xp.inf, dtype=dtype), S - T + 1)       # hidden: j > i + (S - T)
        if key_mask is not None:
            zero, hidden = xp.zeros((), dtype=dtype), xp.full((), -xp.inf, dtype=dtype)
            keys = xp.where(key_mask != 0, zero, hidden)[:, None, None, :]
            mask = keys if mask is None else mask + keys
        return mask

    def attention(self, q: Array, k: Array, v: Array, causal: bool, key_mask: Array | None, scale: float,
                  ) -> tuple[Array, Array]:
        """o (B, H, T, hd) and log Σ exp of the scores (B, H, T). Query heads that share a key head lie along its rows."""
        B, H, T, hd = q.shape
        KV, S = k.shape[1:3]
        mask = self.scores_mask(T, S, causal, key_mask, q.real.dtype)
        scores = self._scores(q, k, scale, mask)                   # (B, H, T, S)
        top = self.xp.maximum(scores.max(axis=-1, keepdims=True), LOWEST)
        p = self.xp.exp(scores - top)
        total = p.sum(axis=-1, keepdims=True) + TINY
        o = self.matmul((p / total).reshape(B, KV, -1, S), v)
        return o.reshape(B, H, T, hd), (self.xp.log(total) + top)[..., 0]

    def attention_grad(self, do: Array, q: Array, k: Array, v: Array, o: Array, lse: Array, causal: bool,
                       key_mask: Array | None, scale: float) -> tuple[Array, Array, Array]:
        """q̄, k̄, v̄. The probabilities are computed again from q, k and log Σ exp."""
        B, H, T, hd = q.shape
        KV, S = k.shape[1:3]
        mask = self.scores_mask(T, S, causal, key_mask, q.dtype)
        p = self.xp.exp(self._scores(q, k, scale, mask) - lse[..., None])
        along = (do * o).sum(axis=-1, keepdims=True)
        do, q = do.reshape(B, KV, -1, hd), q.reshape(B, KV, -1, hd)
        dp = self.matmul(do, v, tb=True).reshape(B, H, T, S)
        ds = (p * (dp - along) * scale).reshape(B, KV, -1, S)
        p = p.reshape(B, KV, -1, S)
        return self.matmul(ds, k).reshape(B, H, T, hd), self.matmul(ds, q, ta=True), self.matmul(p, do, ta=True)

    def _scores(self, q: Array, k: Array, scale: float, mask: Array | None) -> Array:
        B, H, T, hd = q.shape
        KV, S = k.shape[1:3]
        scores = self.matmul(q.reshape(B, KV, -1, hd), k, tb=True).reshape(B, H, T, S) * scale
        return scores if mask is None else scores + mask

    # Tables and optimisers

    def embedding_grad(self, ids: Array, dy: Array, V: int) -> Array:
        """(V, D): row i adds up the cotangents (..., D) of all places where ids (...) is i."""
        dW = self.xp.zeros((V, dy.shape[-1]), dtype=dy.dtype)
        self.xp.add.at(dW, ids.reshape(-1), dy.reshape(-1, dy.shape[-1]))
        return dW

    def adamw(self, p: Array, g: Array, m: Array, v: Array, lr: Any, betas: tuple[float, float], eps: float,
              weight_decay: float, step: int) -> None:
        """One AdamW step, in place on p, m and v. lr is a number or an array that broadcasts to p."""
        beta1, beta2 = betas
        m *= beta1
        m += (1.0 - beta1) * g
        v *= beta2
        v += (1.0 - beta2) * (g * g)
        if weight_decay:
            p *= 1.0 - lr * weight_decay
        update = m / (self.xp.sqrt(v) * (1.0 - beta2**step) ** -0.5 + eps)
        update *= lr * (1.0 / (1.0 - beta1**step))
        p -= update

    def adamw_all(self, due: list[tuple[Array, Array, Array, Array, int]], lr: Any, betas: tuple[float, float], eps: float,
                  weight_decay: float) -> None:
        """`adamw` for several parameters: p, g, m, v and step of each. lr is a number, or (K,) for parameters (K, ...)."""
        for p, g, m, v, step in due:
            rate = lr if isinstance(lr, float) else lr.reshape(-1, *[1] * (p.ndim - 1))
            self.adamw(p, g, m, v, rate, betas, eps, weight_decay, step)
