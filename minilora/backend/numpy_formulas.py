"""Norms, activations and rotary positions on NumPy: chains of in-place operations on blocks (see numpy_chain.py).

NumPy is slow at powers, at `where`, at the maximum with a number, and wherever an operation runs along short rows, as every
row costs a call. The formulas are arranged to avoid these. What each means stands in generic.py, and the tests hold the two
equal.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from .erf import TANH_POLYNOMIAL
from .generic import Array
from .numpy_attention import BlockAttention
from .numpy_chain import chain, like, line, outer, rows, small, unless_small

# Φ(x) = (1 + erf(x/√2))/2 ≈ (1 + tanh(x q(x²)))/2, with q from erf.py and the 1/√2 taken into its coefficients.
NORMAL_CDF = tuple(c * 0.5 ** (i + 0.5) for i, c in enumerate(TANH_POLYNOMIAL))


class BlockFormulas(BlockAttention):
    """The overrides of what works element by element or row by row."""

    @unless_small
    def layer_norm(self, x: Array, w: Array, b: Array, eps: float) -> tuple[Array, Array, Array]:
        return norm(x, w, b, eps)

    @unless_small
    def layer_norm_grad(self, dy: Array, c: Array, rho: Array, w: Array) -> Array:
        return norm_grad(dy, c, rho, w, centred=True)

    @unless_small
    def rms_norm(self, x: Array, w: Array, eps: float) -> tuple[Array, Array]:
        y, _, rho = norm(x, w, None, eps)
        return y, rho

    @unless_small
    def rms_norm_grad(self, dy: Array, x: Array, rho: Array, w: Array) -> Array:
        return norm_grad(dy, x, rho, w, centred=False)

    # Activations: the formulas fill y and, if the slope is asked for, d (which is `into`, if given), using both on the way

    def gelu(self, x: Array, slope: bool, into: Array | None = None) -> tuple[Array, Array | None]:
        if small(x) or x.dtype != np.float32:
            return placed(super().gelu(x, slope), into)

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

        return activation(formula, x, slope, into)

    def gelu_tanh(self, x: Array, slope: bool, into: Array | None = None) -> tuple[Array, Array | None]:
        if small(x):
            return placed(super().gelu_tanh(x, slope), into)
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

        return activation(formula, x, slope, into, temporaries=1)

    def silu(self, x: Array, slope: bool, into: Array | None = None) -> tuple[Array, Array | None]:
        if small(x):
            return placed(super().silu(x, slope), into)

        def formula(d, x, y):
            np.multiply(x, 0.5, out=y)
            half_tanh(y)                                           # σ(x) = (1 + tanh(x/2))/2
            if slope:                                              # d = σ + x σ (1 - σ)
                np.subtract(1.0, y, out=d)
                d *= x
                d *= y
                d += y
            y *= x

        return activation(formula, x, slope, into)

    @unless_small
    def swiglu(self, g: Array, u: Array, slopes: bool) -> tuple[Array, Array | None, Array | None]:
        y, by_g, by_u = like(g), like(g), like(g)

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

    @unless_small
    def rotary(self, x: Array, cos: Array, sin: Array) -> Array:   # (B, H, T, hd), (T, hd/2) twice -> (B, H, T, hd)
        y, half = like(x), x.shape[-1] // 2
        cos, sin = np.concatenate([cos, cos], axis=-1), np.concatenate([-sin, sin], axis=-1)

        def formula(t, x, y):                                      # y = x cos + (-x₂, x₁) sin, on whole rows
            y[...] = x
            t[..., :half], t[..., half:] = x[..., half:], x[..., :half]
            y *= cos
            t *= sin
            y += t

        chain(formula, x, y, temporaries=1)
        return y


def norm(x: Array, w: Array, b: Array | None, eps: float) -> tuple[Array, Array, Array]:
    """y = (x - μ) ⊙ ρ w + b, the centred x - μ, and ρ. Without b it is an RMS norm: μ = 0, and x itself is returned."""
    y, c, rho = like(x), x if b is None else like(x), np.empty(x.shape[:-1], x.dtype)
    share, mean, ones, scale = averaging(x, w)

    def formula(x, y, c, rho):
        if b is not None:
            np.subtract(x, outer(x @ mean, ones, out=y), out=c)
        np.multiply(row_dot(c, c), share, out=rho)
        rho += eps
        np.sqrt(rho, out=rho)
        np.divide(1.0, rho, out=rho)
        np.multiply(c, outer(rho, scale, out=y), out=y)
        if b is not None:
            y += b

    chain(formula, rows(x), rows(y), rows(c), rho.reshape(-1), products=True)
    return y, c, rho[..., None]


def norm_grad(dy: Array, c: Array, rho: Array, w: Array, centred: bool) -> Array:
    """ρ g - mean(ρ g) - c ρ² mean(ρ g ⊙ c) with g = ȳ ⊙ w and c = x - μ; an RMS norm has no mean(ρ g)."""
    dx = like(dy)
    _, mean, ones, scale = averaging(dy, w)

    def formula(t, dy, c, rho, dx):
        np.multiply(dy, outer(rho, scale, out=dx), out=dx)         # ρ g
        along = np.multiply(dx, c, out=t) @ mean
        along *= rho
        along *= rho                                               # ρ² mean(ρ g ⊙ c)
        if centred:
            dx -= outer(dx @ mean, ones, out=t)
        dx -= np.multiply(c, outer(along, ones, out=t), out=t)

    chain(formula, rows(dy), rows(c), rho.reshape(-1), rows(dx), temporaries=1, products=True)
    return dx


def averaging(x: Array, w: Array) -> tuple[float, Array, Array, Array]:
    """1/D, the vector whose product with a row is its mean, and `line` of ones and of w."""
    D = x.shape[-1]
    return 1.0 / D, np.full(D, 1.0 / D, x.dtype), line(np.ones(D, x.dtype)), line(w.astype(x.dtype, copy=False))


def row_dot(x: Array, y: Array) -> Array:                          # (n, D) twice -> (n,)
    return np.vecdot(x.conj(), y)                                  # (vecdot conjugates its first argument)


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


def activation(formula: Callable[..., None], x: Array, slope: bool, into: Array | None, temporaries: int = 0,
               ) -> tuple[Array, Array | None]:
    """The arrays y and d that formula(temporaries…, d, x, y) fills. d is one more temporary if no slope is asked for."""
    y = like(x)
    if not slope:
        chain(formula, x.reshape(-1), y.reshape(-1), temporaries=temporaries + 1)
        return y, None
    d = like(x) if into is None else into
    chain(formula, d.reshape(-1), x.reshape(-1), y.reshape(-1), temporaries=temporaries)
    return y, d


def placed(result: tuple[Array, Array | None], into: Array | None) -> tuple[Array, Array | None]:
    """An activation's result with the slope written to `into`, where both are wanted."""
    y, d = result
    if into is None or d is None:
        return y, d
    into[...] = d
    return y, into
