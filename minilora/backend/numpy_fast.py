"""The primitives on NumPy, fast: products shared out by rows to all cores, and formulas on blocks that stay in the cache.

What each primitive means stands in generic.py, and the tests hold the two equal.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import numpy as np

from .generic import Array
from .memory import empty, keep_freed_memory
from .numpy_attention import exponentials
from .numpy_chain import chain, like, rows, unless_small
from .numpy_formulas import BlockFormulas
from .numpy_mkl import multiply
from .parallel import for_blocks, one_blas_thread, spans, workers, working

ALONE = 1 << 18       # multiply-adds of a product that BLAS by itself leaves to one thread
PRODUCT = 1 << 21     # multiply-adds of a product below which one thread is as fast
FEW = 32              # rows of a product below which its columns are shared out instead
WIDE = 16             # columns for each row above which they are, too: every thread then reads its part of b, not all of it
ROWS = 512            # rows of a product in a block
SHARDS = 1 << 15      # elements of a model's input that are worth several threads
LARGE = 1 << 17       # elements of a sum that are
LOGITS = 1 << 25      # logits in a block of rows

keep_freed_memory()


class NumpyKernels(BlockFormulas):
    """Overrides for NumPy; more of them in numpy_formulas.py and numpy_attention.py."""

    def shards(self, n: int, size: int) -> list[slice]:
        return [slice(0, n)] if size < SHARDS or working() else spans(n, -(-n // workers()))

    def side_by_side(self, fn: Callable[[Any], None], items: Iterable[Any]) -> None:
        for_blocks(fn, items, products=True)

    def add(self, a: Array, b: Array) -> Array:
        if np.size(a) <= LARGE or np.shape(a) != np.shape(b) or not a.flags.c_contiguous or not b.flags.c_contiguous:
            return a + b
        y = empty(a.shape, np.result_type(a, b))
        chain(lambda a, b, y: np.add(a, b, out=y), a.reshape(-1), b.reshape(-1), y.reshape(-1))
        return y

    def matmul(self, a: Array, b: Array, ta: bool = False, tb: bool = False) -> Array:
        """a @ b on the last two axes, either one transposed first. Nothing is copied that BLAS can read as it lies."""
        a, b = a.swapaxes(-1, -2) if ta else a, b.swapaxes(-1, -2) if tb else b
        if a.ndim > b.ndim == 2:                                   # one product, not one for each leading index
            return self.matmul(a.reshape(math.prod(a.shape[:-1]), a.shape[-1]), b).reshape(*a.shape[:-1], b.shape[-1])
        a, b = for_blas(a), for_blas(b)
        if a.size * b.shape[-1] <= ALONE or (a.ndim == b.ndim == 2 and len(a) == 1):     # one row: BLAS shares it out better
            return a @ b
        if a.ndim == b.ndim == 2:
            return self._product(a, b, None)
        if a.ndim == b.ndim == 3 and len(a) == len(b):             # K products side by side
            y = empty((len(a), a.shape[1], b.shape[2]), np.result_type(a, b))
            for_blocks(lambda k: np.matmul(a[k], b[k], out=y[k]), spans(len(a), -(-len(a) // workers())), products=True)
            return y
        with one_blas_thread():
            return a @ b

    def _product(self, a: Array, b: Array, bias: Array | None) -> Array:       # (n, k), (k, m), (m,) -> (n, m)
        y, all_of_it = empty((len(a), b.shape[1]), np.result_type(a, b)), slice(None)
        if a.size * b.shape[1] < PRODUCT:
            blocks = [(all_of_it, all_of_it)]
        elif len(a) < FEW or b.shape[1] > WIDE * len(a):
            blocks = [(all_of_it, columns) for columns in spans(b.shape[1], -(-b.shape[1] // workers()))]
        else:
            blocks = [(some, all_of_it) for some in row_blocks(len(a))]

        def part(block: tuple[slice, slice]) -> None:
            some, columns = block
            multiply(a[some], b[:, columns], y[block])
            if bias is not None:
                y[block] += bias[columns]

        for_blocks(part, blocks, products=True)
        return y

    def linear(self, x: Array, W: Array, b: Array | None) -> Array:
        return super().linear(x, W, b) if x.size * len(W) <= ALONE or len(x) == 1 else self._product(x, W.T, b)

    def feed_forward(self, x: Array, W1: Array, b1: Array | None, W2: Array, b2: Array | None, activation: str, slope: bool,
                     hidden: bool) -> tuple[Array, Array | None, Array | None]:
        n, F = len(x), len(W1)
        if n < FEW:                                                # too few rows to share out: each product shares its columns
            return super().feed_forward(x, W1, b1, W2, b2, activation, slope, hidden)
        y = empty((n, len(W2)), x.dtype)
        s, h = empty((n, F), x.dtype) if slope else None, empty((n, F), x.dtype) if hidden else None

        def part(block: slice) -> None:                            # one block of rows all the way through
            a = multiply(x[block], W1.T, empty((block.stop - block.start, F), x.dtype))
            if b1 is not None:
                a += b1
            act, _ = getattr(self, activation)(a, slope, None if s is None else s[block])
            multiply(act, W2.T, y[block])
            if b2 is not None:
                y[block] += b2
            if h is not None:
                h[block] = act

        for_blocks(part, row_blocks(n), products=True)
        return y, s, h

    def feed_forward_grad(self, dy: Array, s: Array, W1: Array, W2: Array, hidden: bool) -> tuple[Array, Array | None]:
        n = len(dy)
        if n < FEW:
            return super().feed_forward_grad(dy, s, W1, W2, hidden)
        dx, dh = empty((n, W1.shape[1]), dy.dtype), empty(s.shape, s.dtype) if hidden else None

        def part(block: slice) -> None:
            d = multiply(dy[block], W2, empty(s[block].shape, dy.dtype) if dh is None else dh[block])
            d *= s[block]
            multiply(d, W1, dx[block])

        for_blocks(part, row_blocks(n), products=True)
        return dx, dh

    # Softmax and cross-entropy

    @unless_small
    def softmax(self, x: Array) -> Array:                          # (..., V) -> (..., V)
        y = like(x)

        def formula(x, y):
            total, _ = exponentials(lambda: x, out=y)
            y *= (1.0 / total)[:, None]

        chain(formula, rows(x), rows(y), products=True)
        return y

    @unless_small
    def logsumexp(self, x: Array) -> Array:                        # (..., V) -> (...)
        lse = np.empty(x.shape[:-1], x.dtype)
        chain(logsumexp_rows, rows(x), lse.reshape(-1), temporaries=1, products=True)
        return lse

    @unless_small
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

    @unless_small
    def cross_entropy_grad(self, logits: Array, lse: Array, targets: Array, weights: Array, smoothing: float) -> Array:
        V, p = logits.shape[1], like(logits)

        def formula(x, lse, target, weight, p):
            np.subtract(x, lse[:, None], out=p)
            np.exp(p, out=p)
            if smoothing:
                p -= smoothing / V
            p[np.arange(len(x)), target] -= 1.0 - smoothing
            p *= weight[:, None]

        chain(formula, logits, lse, self._inside(targets, V), weights, p)
        return p

    def linear_cross_entropy(self, x: Array, W: Array, targets: Array, weights: Array, smoothing: float, gradient: bool,
                             ) -> tuple[Array, Array | None]:
        losses, dx = np.empty(len(x), x.dtype), like(x) if gradient else None
        for block in spans(len(x), LOGITS // len(W)):
            logits = self._product(x[block], W.T, None)
            if dx is None:
                losses[block], _ = self.cross_entropy(logits, targets[block], smoothing)
            else:
                inside = self._inside(targets[block], len(W))
                chain(partial(loss_and_gradient, smoothing), logits, inside, weights[block], losses[block], products=True)
                dx[block] = self._product(logits, W, None)
        return losses, dx

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


def loss_and_gradient(smoothing: float, x: Array, target: Array, weight: Array, loss: Array) -> None:
    """The cross-entropy of every row of the logits x (n, V), whose gradient takes their place: w (p - q)."""
    n, share = np.arange(len(x)), smoothing / x.shape[1]
    np.multiply(x[n, target], smoothing - 1.0, out=loss)
    if smoothing:
        loss -= share * x.sum(axis=-1)
    top = x.max(axis=-1)
    x -= top[:, None]
    np.exp(x, out=x)
    total = x @ np.ones(x.shape[1], x.dtype)
    loss += np.log(total) + top
    x *= (weight / total)[:, None]                                 # w p
    if smoothing:
        x -= (share * weight)[:, None]
    x[n, target] -= (1.0 - smoothing) * weight


def row_blocks(n: int) -> list[slice]:
    """How products share out n rows, one way for all ops, so that the bits of a row do not depend on which op multiplies it."""
    return spans(n, ROWS if working() else min(ROWS, -(-n // workers())))


def for_blas(a: Array) -> Array:
    """a, copied if neither of its last two axes is contiguous: BLAS takes no such matrix."""
    return a if a.itemsize in a.strides[-2:] else np.ascontiguousarray(a)


def logsumexp_rows(e: Array, x: Array, lse: Array) -> None:        # temporary (n, V), (n, V), (n,)
    total, top = exponentials(lambda: x, out=e)
    np.log(total, out=lse)
    lse += top
