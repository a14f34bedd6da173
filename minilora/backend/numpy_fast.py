"""The primitives on NumPy, fast: chains of in-place operations on blocks that stay in the cache, on all cores.

On a large array every NumPy operation waits for memory, whatever it computes. So a formula here runs whole on one block of
rows (`chain`), then on the next. What each primitive means stands in generic.py, and the tests hold the two equal.

NumPy is slow at powers, at `where`, at the maximum with a number, and wherever an operation runs along short rows, as every
row costs a call. The formulas are arranged to avoid these.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from .erf import TANH_POLYNOMIAL
from .generic import Array
from .memory import keep_freed_memory
from .numpy_attention import BlockAttention, exponentials
from .parallel import for_blocks, one_blas_thread, scratch, spans, workers

ALONE = 1 << 18       # multiply-adds of a product that BLAS by itself leaves to one thread
PRODUCT = 1 << 21     # multiply-adds of a product below which one thread is as fast
FEW = 32              # rows of a product below which its columns are shared out instead
ROWS = 512            # rows of a product in a block
SMALL = 1 << 13       # elements that are not worth any machinery, and that BLAS by itself leaves to one thread
BLOCK = 1 << 17       # elements of one array in a block: 0.5 MB in float32; smaller ones lose more in calls than they gain

keep_freed_memory()

# Φ(x) = (1 + erf(x/√2))/2 ≈ (1 + tanh(x q(x²)))/2, with q from erf.py and the 1/√2 taken into its coefficients.
NORMAL_CDF = tuple(c * 0.5 ** (i + 0.5) for i, c in enumerate(TANH_POLYNOMIAL))


def chain(formula: Callable[..., None], *arrays: Array, temporaries: int = 0, products: bool = False) -> None:
    """Call formula(temporaries…, blocks…) on blocks of rows of the arrays (equally many rows each).

    The temporaries are shaped like the first array's block. products: the formula multiplies matrices (see for_blocks).
    """
    first = arrays[0]

    def run(block: slice) -> None:
        parts = [a[block] for a in arrays]
        formula(*scratch(first.dtype, *[parts[0].shape] * temporaries), *parts)

    if 0 < first.size <= SMALL:
        formula(*[np.empty(first.shape, first.dtype) for _ in range(temporaries)], *arrays)
    else:
        for_blocks(run, spans(len(first), BLOCK // max(1, math.prod(first.shape[1:]))), products)


class NumpyKernels(BlockAttention):
    """Overrides for NumPy; those of attention are in numpy_attention.py."""

    def matmul(self, a: Array, b: Array, ta: bool = False, tb: bool = False) -> Array:
        """a @ b on the last two axes, either one transposed first. Nothing is copied that BLAS can read as it lies."""
        a, b = a.swapaxes(-1, -2) if ta else a, b.swapaxes(-1, -2) if tb else b
        if a.ndim > b.ndim == 2:                                   # one product, not one for each leading index
            return self.matmul(a.reshape(math.prod(a.shape[:-1]), a.shape[-1]), b).reshape(*a.shape[:-1], b.shape[-1])
        a, b = for_blas(a), for_blas(b)
        if a.size * b.shape[-1] <= ALONE:
            return a @ b
        if a.ndim == b.ndim == 2:
            return self._product(a, b, None)
        if a.ndim == b.ndim == 3 and len(a) == len(b):             # K products side by side
            y = np.empty((len(a), a.shape[1], b.shape[2]), np.result_type(a, b))
            for_blocks(lambda k: np.matmul(a[k], b[k], out=y[k]), spans(len(a), -(-len(a) // workers())), products=True)
            return y
        with one_blas_thread():
            return a @ b

    def _product(self, a: Array, b: Array, bias: Array | None) -> Array:       # (n, k), (k, m), (m,) -> (n, m)
        y, all_of_it = np.empty((len(a), b.shape[1]), np.result_type(a, b)), slice(None)
        if a.size * b.shape[1] < PRODUCT:
            blocks = [(all_of_it, all_of_it)]
        elif len(a) < FEW:
            blocks = [(all_of_it, columns) for columns in spans(b.shape[1], -(-b.shape[1] // workers()))]
        else:
            blocks = [(some, all_of_it) for some in row_blocks(len(a))]

        def part(block: tuple[slice, slice]) -> None:
            some, columns = block
            np.matmul(a[some], b[:, columns], out=y[block])
            if bias is not None:
                y[block] += bias[columns]

        for_blocks(part, blocks, products=True)
        return y

    def linear(self, x: Array, W: Array, b: Array | None) -> Array:
        return super().linear(x, W, b) if x.size * len(W) <= ALONE else self._product(x, W.T, b)

    def feed_forward(self, x: Array, W1: Array, b1: Array | None, W2: Array, b2: Array | None, activation: str, slope: bool,
                     hidden: bool) -> tuple[Array, Array | None, Array | None]:
        n, F = len(x), len(W1)
        y = np.empty((n, len(W2)), x.dtype)
        s, h = np.empty((n, F), x.dtype) if slope else None, np.empty((n, F), x.dtype) if hidden else None

        def part(block: slice) -> None:                            # one block of rows all the way through
            a = x[block] @ W1.T
            if b1 is not None:
                a += b1
            act, d = getattr(self, activation)(a, slope)
            np.matmul(act, W2.T, out=y[block])
            if b2 is not None:
                y[block] += b2
            if s is not None:
                s[block] = d
            if h is not None:
                h[block] = act

        for_blocks(part, row_blocks(n), products=True)
        return y, s, h

    def feed_forward_grad(self, dy: Array, s: Array, W1: Array, W2: Array, hidden: bool) -> tuple[Array, Array | None]:
        n = len(dy)
        dx, dh = np.empty((n, W1.shape[1]), dy.dtype), np.empty(s.shape, s.dtype) if hidden else None

        def part(block: slice) -> None:
            d = np.matmul(dy[block], W2, out=None if dh is None else dh[block])
            d *= s[block]
            np.matmul(d, W1, out=dx[block])

        for_blocks(part, row_blocks(n), products=True)
        return dx, dh

    # Softmax and cross-entropy

    def softmax(self, x: Array) -> Array:                          # (..., V) -> (..., V)
        y = empty(x)

        def formula(x, y):
            total, _ = exponentials(lambda: x, out=y)
            y *= (1.0 / total)[:, None]

        chain(formula, rows(x), rows(y), products=True)
        return y

    def logsumexp(self, x: Array) -> Array:                        # (..., V) -> (...)
        lse = np.empty(x.shape[:-1], x.dtype)
        chain(logsumexp_rows, rows(x), lse.reshape(-1), temporaries=1, products=True)
        return lse

    def cross_entropy(self, logits: Array, targets: Array, smoothing: float) -> tuple[Array, Array]:
        N, V = logits.shape
        losses, lse = np.empty(N, logits.dtype), np.empty(N, logits.dtype)

        def formula(e, x, target, loss, lse):
            logsumexp_rows(e, x, lse)
            np.subtract(lse, (1.0 - smoothing) * x[np.arange(len(x)), target], out=loss)
            if smoothing:
                loss -= (smoothing / V) * x.sum(axis=-1)

        chain(formula, logits, self._inside(targets, V), losses, lse, temporaries=1, products=True)
        return losses, lse

    def cross_entropy_grad(self, logits: Array, lse: Array, targets: Array, weights: Array, smoothing: float) -> Array:
        V, p = logits.shape[1], empty(logits)

        def formula(x, lse, target, weight, p):
            np.subtract(x, lse[:, None], out=p)
            np.exp(p, out=p)
            if smoothing:
                p -= smoothing / V
            p[np.arange(len(x)), target] -= 1.0 - smoothing
            p *= weight[:, None]

        chain(formula, logits, lse, self._inside(targets, V), weights, p)
        return p

    # Norms

    def layer_norm(self, x: Array, w: Array, b: Array, eps: float) -> tuple[Array, Array, Array]:
        return norm(x, w, b, eps, centred=True)

    def layer_norm_grad(self, dy: Array, normal: Array, rho: Array, w: Array) -> Array:
        return norm_grad(dy, normal, rho, w, centred=True)

    def rms_norm(self, x: Array, w: Array, eps: float) -> tuple[Array, Array, Array]:
        return norm(x, w, None, eps, centred=False)

    def rms_norm_grad(self, dy: Array, normal: Array, rho: Array, w: Array) -> Array:
        return norm_grad(dy, normal, rho, w, centred=False)

    # Activations: the formulas fill y and, if the slope is asked for, d, using both as temporaries on the way

    def gelu(self, x: Array, slope: bool) -> tuple[Array, Array | None]:
        if x.dtype != np.float32:
            return super().gelu(x, slope)

        def formula(d, x, y):
            with np.errstate(over="ignore"):                       # x q(x²) may be infinite: then tanh is 1
                np.multiply(x, x, out=d)
                polynomial(d, NORMAL_CDF, out=y)
                y *= x
            half_tanh(y)                                           # Φ
            if slope:                                              # d = Φ + x exp(-x²/2)/√(2π)
                d *= -0.5
                np.exp(d, out=d)
                d *= x
                d *= 1.0 / math.sqrt(2.0 * math.pi)
                d += y
            y *= x

        return activation(formula, x, slope)

    def gelu_tanh(self, x: Array, slope: bool) -> tuple[Array, Array | None]:
        c = math.sqrt(2.0 / math.pi)

        def formula(t, d, x, y):
            np.multiply(x, x, out=d)
            polynomial(d, (c, 0.044715 * c), out=y)
            y *= x
            half_tanh(y)                                           # (1 + tanh u)/2, in place of Φ
            if slope:                                              # d = Φ + 2 u' x Φ (1 - Φ),   u' = c (1 + 0.134145 x²)
                d *= 2.0 * 0.134145 * c
                d += 2.0 * c
                d *= np.subtract(1.0, y, out=t)
                np.multiply(x, y, out=t)
                d *= t
                d += y
            y *= x

        return activation(formula, x, slope, temporaries=1)

    def silu(self, x: Array, slope: bool) -> tuple[Array, Array | None]:
        def formula(d, x, y):
            np.multiply(x, 0.5, out=y)
            half_tanh(y)                                           # σ(x) = (1 + tanh(x/2))/2
            if slope:                                              # d = σ + x σ (1 - σ)
                np.subtract(1.0, y, out=d)
                d *= x
                d *= y
                d += y
            y *= x

        return activation(formula, x, slope)

    def swiglu(self, g: Array, u: Array, slopes: bool) -> tuple[Array, Array | None, Array | None]:
        y, by_g, by_u = empty(g), empty(g), empty(g)

        def formula(g, u, y, by_g, by_u):
            np.multiply(g, 0.5, out=by_u)
            half_tanh(by_u)                                        # σ(g)
            if slopes:                                             # u (σ + g σ (1 - σ))
                np.subtract(1.0, by_u, out=by_g)
                by_g *= g
                by_g *= by_u
                by_g += by_u
                by_g *= u
            by_u *= g                                              # silu(g)
            np.multiply(by_u, u, out=y)

        chain(formula, *[a.reshape(-1) for a in (g, u, y, by_g, by_u)])
        return y, by_g if slopes else None, by_u if slopes else None

    # Positions

    def rotary(self, x: Array, cos: Array, sin: Array) -> Array:   # (B, H, T, hd), (T, hd/2) twice -> (B, H, T, hd)
        y, half = empty(x), x.shape[-1] // 2
        cos, sin = np.concatenate([cos, cos], axis=-1), np.concatenate([-sin, sin], axis=-1)

        def formula(t, x, y):                                      # y = x cos + (-x₂, x₁) sin, on whole rows
            y[...] = x
            t[..., :half], t[..., half:] = x[..., half:], x[..., :half]
            y *= cos
            t *= sin
            y += t

        chain(formula, x, y, temporaries=1)
        return y

    # Tables and optimisers

    def embedding_grad(self, ids: Array, dy: Array, V: int) -> Array:
        dW = np.zeros((V, dy.shape[-1]), dy.dtype)
        order = np.argsort(ids, axis=None, kind="stable")
        ids, dy = ids.reshape(-1)[order], rows(dy)[order]          # equal ids side by side
        starts = np.flatnonzero(np.diff(ids, prepend=-1)).tolist()
        for start, stop in zip(starts, [*starts[1:], len(ids)]):
            dW[ids[start]] = dy[start:stop].sum(axis=0)
        return dW

    def adamw(self, p: Array, g: Array, m: Array, v: Array, lr: Any, betas: tuple[float, float], eps: float,
              weight_decay: float, step: int) -> None:
        beta1, beta2 = betas
        root = (1.0 - beta2**step) ** 0.5                          # √v̂ = √v / root
        decay, rate = 1.0 - lr * weight_decay, lr * (root / (1.0 - beta1**step))

        def formula(t, p, g, m, v, decay, rate):
            m *= beta1
            m += np.multiply(g, 1.0 - beta1, out=t)
            v *= beta2
            np.multiply(g, g, out=t)
            t *= 1.0 - beta2
            v += t
            if weight_decay:
                p *= decay
            np.sqrt(v, out=t)
            t += eps * root
            np.divide(m, t, out=t)
            t *= rate
            p -= t

        p, g, m, v = (np.atleast_1d(a) for a in (p, g, m, v))
        chain(formula, p, g, m, v, *(np.broadcast_to(np.asarray(a, p.dtype), p.shape) for a in (decay, rate)), temporaries=1)


def row_blocks(n: int) -> list[slice]:
    """How products share out n rows: by n alone, so that the bits of a row do not depend on which op multiplies it."""
    return spans(n, min(ROWS, -(-n // workers())))


def rows(x: Array) -> Array:                                       # (..., D) -> (n, D)
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def empty(x: Array) -> Array:
    return np.empty(x.shape, x.dtype)


def for_blas(a: Array) -> Array:
    """a, copied if neither of its last two axes is contiguous: BLAS takes no such matrix."""
    return a if a.itemsize in a.strides[-2:] else np.ascontiguousarray(a)


def logsumexp_rows(e: Array, x: Array, lse: Array) -> None:        # temporary (n, V), (n, V), (n,)
    total, top = exponentials(lambda: x, out=e)
    np.log(total, out=lse)
    lse += top


def row_sum(x: Array) -> Array:                                    # (n, D) -> (n, 1)
    return np.einsum("ij->i", x)[:, None]


def row_dot(x: Array, y: Array) -> Array:                          # (n, D) twice -> (n, 1)
    return np.vecdot(x.conj(), y)[:, None]                         # (vecdot conjugates its first argument)


def norm(x: Array, w: Array, b: Array | None, eps: float, centred: bool) -> tuple[Array, Array, Array]:
    """y = w ⊙ x̂ + b, x̂ = (x - μ) ρ and ρ; without μ and b for an RMS norm."""
    y, normal, rho = empty(x), empty(x), np.empty((*x.shape[:-1], 1), x.dtype)
    share = 1.0 / x.shape[-1]

    def formula(x, y, normal, rho):
        if centred:
            x = np.subtract(x, row_sum(x) * share, out=normal)
        rho[...] = (row_dot(x, x) * share + eps) ** -0.5
        np.multiply(x, rho, out=normal)
        np.multiply(normal, w, out=y)
        if b is not None:
            y += b

    chain(formula, rows(x), rows(y), rows(normal), rows(rho))
    return y, normal, rho


def norm_grad(dy: Array, normal: Array, rho: Array, w: Array, centred: bool) -> Array:
    """ρ (g - x̂ mean(g ⊙ x̂) - mean g) with g = ȳ ⊙ w; without mean g for an RMS norm."""
    dx, share = empty(dy), 1.0 / dy.shape[-1]

    def formula(t, dy, normal, rho, g):
        np.multiply(dy, w, out=g)
        np.multiply(normal, row_dot(g, normal) * share, out=t)
        if centred:
            t += row_sum(g) * share
        g -= t
        g *= rho

    chain(formula, rows(dy), rows(normal), rows(rho), rows(dx), temporaries=1)
    return dx


def polynomial(s: Array, coefficients: tuple[float, ...], out: Array) -> None:
    """c_0 + c_1 s + c_2 s² + …, by Horner's rule."""
    np.multiply(s, coefficients[-1], out=out)
    for c in coefficients[-2:0:-1]:
        out += c
        out *= s
    out += coefficients[0]


def half_tanh(u: Array) -> None:
    """(1 + tanh u)/2, in place."""
    np.tanh(u, out=u)
    u += 1.0
    u *= 0.5


def activation(formula: Callable[..., None], x: Array, slope: bool, temporaries: int = 0) -> tuple[Array, Array | None]:
    """The arrays y and d that formula(temporaries…, d, x, y) fills. d is one more temporary if no slope is asked for."""
    y, d = empty(x), empty(x) if slope else None
    if d is None:
        chain(formula, x.reshape(-1), y.reshape(-1), temporaries=temporaries + 1)
    else:
        chain(formula, d.reshape(-1), x.reshape(-1), y.reshape(-1), temporaries=temporaries)
    return y, d
