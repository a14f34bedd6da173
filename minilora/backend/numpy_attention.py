"""Attention on NumPy, a block of heads at a time, so that the scores stay in the cache and no core waits for another.

NumPy is slow along short rows: finding the maximum of 64 scores takes as long as 500 multiplications. So the usual steps of a
softmax are avoided where they can be. What is added to all scores of a key (its mask) or of a query (-log Σ exp, in the
gradient) goes through the product, as one more feature: [q, -lse, 1]·[k, 1, mask] = q·k - lse + mask. The row maximum is
subtracted only where leaving it out would not be safe. And the division by the sum waits until o, which is smaller than P.

The operands of a block are gathered side by side first, since products of many small matrices that are strided or transposed
take twice as long. Queries under a causal mask are worked on in chunks, each without the keys that none of it sees.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from .generic import LOWEST, TINY, Array, Kernels
from .parallel import for_blocks, scratch, spans

SCORES = 1 << 17      # scores in a block
CHUNK = 64            # queries in a chunk
SAFE = 40.0           # e^±40, its sums and its products are far inside the range of float32


class BlockAttention(Kernels):
    """The overrides of attention. Arrays are (B, KV, G, …) inside: KV key heads, each used by G query heads."""

    def attention(self, q: Array, k: Array, v: Array, causal: bool, key_mask: Array | None, scale: float,
                  ) -> tuple[Array, Array]:
        """As in Kernels. o lies in memory as (B, T, H, hd), which the output projection wants."""
        if not pays(q, k, causal):
            return super().attention(q, k, v, causal, key_mask, scale)
        q, k, v = grouped(q, k, v)                                 # (B, KV, G, T, hd), (B, KV, G, S, hd) twice
        B, KV, G, T, hd = q.shape
        S = k.shape[3]
        mask = self.scores_mask(1, S, False, key_mask, q.dtype)    # (B, 1, 1, S) or None
        blocks, chunks, C = plan(q, k, causal)
        o, lse = np.empty((B, T, KV, G, hd), q.dtype), np.empty((B, KV, G, T), q.dtype)

        def run(block):
            b, g = block                                           # some batch items, some key heads
            heads = q[b, g].shape[:3]
            qx, kx, vx, s = scratch(q.dtype, (*heads, T, hd + 1), (*heads, hd + 1, S), (*heads, S, hd), (*heads, C * S))
            qx[..., :hd], qx[..., hd] = q[b, g], 1.0
            kx[..., :hd, :], kx[..., hd, :] = k[b, g].swapaxes(3, 4), 0.0 if mask is None else mask[b]
            kx[..., :hd, :] *= scale
            vx[...] = v[b, g]

            def scores(t, seen):
                return hide_later(np.matmul(qx[..., t, :], kx[..., :seen], out=matrices(s, t, seen)), causal)

            for t, seen in chunks:
                p, total, top = exponentials(scores, t, seen)
                o_t = p @ vx[..., :seen, :]
                o_t *= (1.0 / total)[..., None]
                o[b, t, g] = o_t.transpose(0, 3, 1, 2, 4)
                lse[b, g, :, t] = np.log(total) + top

        for_blocks(run, blocks, products=True)
        return o.reshape(B, T, KV * G, hd).swapaxes(1, 2), lse.reshape(B, KV * G, T)

    def attention_grad(self, do: Array, q: Array, k: Array, v: Array, lse: Array, causal: bool, key_mask: Array | None,
                       scale: float) -> tuple[Array, Array, Array]:
        """As in Kernels. The results lie in memory as (B, T, H, hd)."""
        if not pays(q, k, causal):
            return super().attention_grad(do, q, k, v, lse, causal, key_mask, scale)
        q, k, v = grouped(q, k, v)
        B, KV, G, T, hd = q.shape
        S = k.shape[3]
        do, lse = do.reshape(q.shape), lse.reshape(B, KV, G, T)
        mask = self.scores_mask(1, S, False, key_mask, q.dtype)
        blocks, chunks, C = plan(q, k, causal)
        dq, dk, dv = (np.empty(shape, q.dtype) for shape in ((B, T, KV, G, hd), (B, S, KV, hd), (B, S, KV, hd)))

        def run(block):
            b, g = block
            heads = q[b, g].shape[:3]
            qx, kx, kr, vx, dor, s, ds, dkr, dvr = scratch(
                q.dtype, (*heads, T, hd + 2), (*heads, hd + 2, S), (*heads, S, hd), (*heads, hd, S), (*heads, T, hd),
                (*heads, C * S), (*heads, C * S), (*heads, S, hd), (*heads, S, hd))
            qx[..., :hd], qx[..., hd], qx[..., hd + 1] = q[b, g], -lse[b, g], 1.0
            kr[...] = k[b, g]
            kx[..., :hd, :], kx[..., hd, :], kx[..., hd + 1, :] = kr.swapaxes(3, 4), 1.0, 0.0 if mask is None else mask[b]
            kx[..., :hd, :] *= scale
            vx[...], dor[...] = v[b, g].swapaxes(3, 4), do[b, g]
            dkr[...], dvr[...] = 0.0, 0.0
            for t, seen in chunks:
                p = hide_later(np.matmul(qx[..., t, :], kx[..., :seen], out=matrices(s, t, seen)), causal)
                np.exp(p, out=p)                                               # P
                dp = np.matmul(dor[..., t, :], vx[..., :seen], out=matrices(ds, t, seen))
                dp -= np.vecdot(dp, p)[..., None]
                dp *= p                                                        # S̄ = P ⊙ (P̄ - ⟨P̄, P⟩)
                dvr[..., :seen, :] += p.swapaxes(3, 4) @ dor[..., t, :]
                dkr[..., :seen, :] += dp.swapaxes(3, 4) @ qx[..., t, :hd]
                dq[b, t, g] = (dp @ kr[..., :seen, :]).transpose(0, 3, 1, 2, 4)
            dk[b, :, g], dv[b, :, g] = dkr.sum(axis=2).swapaxes(1, 2), dvr.sum(axis=2).swapaxes(1, 2)
            dq[b, :, g] *= scale
            dk[b, :, g] *= scale

        for_blocks(run, blocks, products=True)
        return dq.reshape(B, T, KV * G, hd).swapaxes(1, 2), dk.swapaxes(1, 2), dv.swapaxes(1, 2)


def pays(q: Array, k: Array, causal: bool) -> bool:
    """Not for one query, where gathering costs more than the product; nor for complex numbers, or queries before all keys."""
    return q.shape[2] > 1 and q.dtype.kind == "f" and not (causal and k.shape[2] < q.shape[2])


def grouped(q: Array, k: Array, v: Array) -> tuple[Array, Array, Array]:
    """Views of q as (B, KV, G, T, hd), and of k and v as (B, KV, G, S, hd), the same for all G."""
    B, H, T, hd = q.shape
    KV = k.shape[1]
    k, v = (np.broadcast_to(a[:, :, None], (B, KV, H // KV, *a.shape[2:])) for a in (k, v))
    return q.reshape(B, KV, H // KV, T, hd), k, v


def plan(q: Array, k: Array, causal: bool) -> tuple[list[tuple[slice, slice]], list[tuple[slice, int]], int]:
    """Blocks (batch items, key heads); chunks (queries, how many keys the last of them sees); the queries in a chunk."""
    (B, KV, G, T), S = q.shape[:4], k.shape[3]
    C = min(T, CHUNK) if causal else T
    n = SCORES // max(1, G * C * S)                                # key heads in a block
    blocks = [(b, g) for b in spans(B, n // KV) for g in spans(KV, n)]
    queries = [slice(i, min(i + C, T)) for i in range(0, T, C)]
    return blocks, [(t, t.stop + S - T if causal else S) for t in queries], C


def matrices(memory: Array, t: slice, seen: int) -> Array:         # (nb, ng, G, C·S) -> (nb, ng, G, queries, seen)
    shape = *memory.shape[:3], t.stop - t.start, seen
    return memory.reshape(-1)[: math.prod(shape)].reshape(shape)


def hide_later(scores: Array, causal: bool) -> Array:              # (..., queries, seen)
    """Add -inf in place where the key comes later than the query. The last query sees the last key."""
    if causal:
        C = scores.shape[-2]
        scores[..., -C:] += np.triu(np.full((C, C), -np.inf, scores.dtype), 1)
    return scores


def exponentials(scores: Callable[..., Array], *chunk: Any) -> tuple[Array, Array, Any]:
    """exp(S - top), its sum over keys, and top: 0, or the row maximum where a score is large or a row has next to nothing."""
    p = scores(*chunk)
    ones = np.ones(p.shape[-1], p.dtype)
    if p.max() < SAFE:
        np.exp(p, out=p)
        total = p @ ones
        if total.min() > math.exp(-SAFE):
            return p, total, 0.0
        p = scores(*chunk)
    top = np.maximum(p.max(axis=-1), LOWEST)
    p -= top[..., None]
    np.exp(p, out=p)
    return p, p @ ones + TINY, top
