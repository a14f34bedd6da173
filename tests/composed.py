"""The composed twins: each fused formula again, from one-line ops, as a textbook writes it.

Nothing here is fast or short of memory. The derivatives follow from the primitives alone (arithmetic.py, shaping.py and
matmul, which finite differences judge), so a twin is an oracle for the derivation of the fused op beside it. The exact GELU
has no primitive to be made of; its oracle is Python's `math.erf`, point by point.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from minilora.autograd import Tensor, concatenate, exp, log, matmul, stack, tanh, where
from minilora.backend import device_of, to_device


def constant(array: Any, like: Tensor) -> Tensor:
    """A host array as a constant beside `like`: its device and its precision."""
    array = np.asarray(array)
    dtype = array.dtype if array.dtype.kind in "biu" else like.dtype
    return Tensor(to_device(array.astype(dtype), device_of(like.data).name))


def swap(x: Tensor) -> Tensor:
    """The last two axes exchanged."""
    return x.transpose(*range(x.ndim - 2), x.ndim - 1, x.ndim - 2)


# Softmax and cross-entropy

def softmax(x: Tensor) -> Tensor:                              # (..., V) -> (..., V)
    e = exp(x - x.max(-1, keepdims=True).detach())             # shifting a row changes nothing
    return e / e.sum(-1, keepdims=True)


def log_softmax(x: Tensor) -> Tensor:                          # (..., V) -> (..., V)
    shifted = x - x.max(-1, keepdims=True).detach()
    return shifted - log(exp(shifted).sum(-1, keepdims=True))


def cross_entropy(logits: Tensor, targets: np.ndarray, ignore_index: int = -100, label_smoothing: float = 0.0,
                  groups: int | None = None) -> Tensor:        # (..., V), (...) -> () or (K,)
    """-Σ q log p for each row that counts, averaged over them (in each group)."""
    V, targets = logits.shape[-1], np.asarray(targets).reshape(-1)
    logp = log_softmax(logits.reshape(-1, V))
    means = []
    for part in np.split(np.arange(targets.size), groups or 1):
        counted = [n for n in part if targets[n] != ignore_index]
        q = np.full((len(counted), V), label_smoothing / V)
        q[np.arange(len(counted)), targets[counted]] += 1.0 - label_smoothing
        total = -(logp[np.array(counted)] * constant(q, logits)).sum()
        means.append(total * (1.0 / len(counted)))
    return means[0] if groups is None else stack(means)


# Norms

def layer_norm(x: Tensor, w: Tensor, b: Tensor, eps: float) -> Tensor:
    centred = x - x.mean(-1, keepdims=True)
    return centred / ((centred * centred).mean(-1, keepdims=True) + eps) ** 0.5 * w + b


def rms_norm(x: Tensor, w: Tensor, eps: float) -> Tensor:
    return x / ((x * x).mean(-1, keepdims=True) + eps) ** 0.5 * w


# Activations

def gelu_oracle(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """x Φ(x) and its slope Φ(x) + x φ(x), from the erf of Python's math library."""
    cdf = np.vectorize(lambda a: 0.5 * math.erfc(-a / math.sqrt(2.0)))(x)       # erfc: also exact far to the left
    density = np.vectorize(lambda a: math.exp(-0.5 * a * a) / math.sqrt(2.0 * math.pi))(x)
    return x * cdf, cdf + x * density


def gelu_tanh(x: Tensor) -> Tensor:
    return 0.5 * x * (1.0 + tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x ** 3)))


def silu(x: Tensor) -> Tensor:
    return x / (1.0 + exp(-x))


def swiglu(g: Tensor, u: Tensor) -> Tensor:
    return silu(g) * u


# Positions and attention

def rotary(x: Tensor, angles: np.ndarray) -> Tensor:           # (B, H, T, hd), (T, hd/2) -> (B, H, T, hd)
    """Each position's vector times that position's rotation matrix, written out in full."""
    T, half = angles.shape
    R = np.zeros((T, 2 * half, 2 * half))
    for t in range(T):
        for i in range(half):
            c, s = math.cos(angles[t, i]), math.sin(angles[t, i])
            R[t, i, i], R[t, i, i + half] = c, -s
            R[t, i + half, i], R[t, i + half, i + half] = s, c
    columns = x.reshape(*x.shape, 1)                           # (B, H, T, hd, 1)
    return matmul(constant(R, x), columns).reshape(*x.shape)


def attention(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, key_mask: np.ndarray | None = None,
              scale: float | None = None) -> Tensor:           # (B, H, T, hd), (B, KV, S, hd) twice -> (B, H, T, hd)
    """Every head by itself: grouped keys and values are repeated, hidden keys get the weight 0."""
    B, H, T, hd = q.shape
    KV, S = k.shape[1:3]
    repeated = np.repeat(np.arange(KV), H // KV)               # head h uses key head h // (H/KV)
    k, v = (a[:, repeated] for a in (k, v))
    seen = np.ones((B, 1, T, S), dtype=bool)
    for b, i, j in np.ndindex(B, T, S):
        later = causal and j > i + (S - T)
        padded = key_mask is not None and not key_mask[b, j]
        seen[b, 0, i, j] = not (later or padded)
    scores = matmul(q, swap(k)) * (scale if scale is not None else 1.0 / math.sqrt(hd))
    weights = where(constant(seen, q), exp(scores), 0.0)       # (B, H, T, S)
    nobody = constant(~seen.any(axis=-1, keepdims=True), q)    # rows that see no key: 0 / 1
    return matmul(weights / where(nobody, 1.0, weights.sum(-1, keepdims=True)), v)


# Linear layers

def linear(x: Tensor, W: Tensor, b: Tensor | None = None) -> Tensor:           # (..., in) -> (..., out)
    y = matmul(x.reshape(-1, x.shape[-1]), swap(W)).reshape(*x.shape[:-1], W.shape[0])
    return y if b is None else y + b


def lora_linear(x: Tensor, W: Tensor, b: Tensor | None, factors: list[tuple[Tensor, Tensor]], scales: list[float],
                blocks: list[slice], masks: list[np.ndarray | None]) -> Tensor:
    """x Wᵀ + b, and for each adapter s (x ⊙ m) Aᵀ Bᵀ between zeros for the rows of W that it does not touch."""
    y = linear(x, W, b)
    for (A, B), scale, block, mask in zip(factors, scales, blocks, masks, strict=True):
        branch = x if mask is None else x * constant(mask, x)
        change = linear(linear(branch, A), B) * scale
        before, after = ((*x.shape[:-1], n) for n in (block.start, W.shape[0] - block.stop))
        y = y + concatenate([constant(np.zeros(before), x), change, constant(np.zeros(after), x)], axis=-1)
    return y
