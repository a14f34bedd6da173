"""Attention on NumPy, a block of heads at a time, so that the scores stay in the cache, and the blocks on all cores.

NumPy is slow along short rows: finding the maximum of 64 scores takes as long as 500 multiplications. So the row maximum is
subtracted only where leaving it out would not be safe; the division by the sum waits until o, which is smaller than P; and
in the gradient -log Σ exp comes in through the product, as one more feature: [q, -lse]·[k, 1] = q·k - lse.

BLAS is slow at many small products with the second matrix transposed: kᵀ and vᵀ are written out. Queries under a causal mask
are worked on in chunks, each without the keys that none of it sees.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, NamedTuple

import numpy as np

from .generic import LOWEST, TINY, Array, Kernels
from .parallel import for_blocks, scratch, spans

SMALL = 1 << 13       # scores that are not worth any machinery
SCORES = 1 << 17      # scores in a block
CHUNK = 64            # queries in a chunk
SAFE = 40.0           # e^±40, its sums and its products are far inside the range of float32


class Chunk(NamedTuple):
    """Some queries, the keys that they see, and what is added to their scores: None, or -inf at keys that come later."""

    queries: slice
    keys: slice
    mask: Array | None                                             # (queries, keys)

    def scores_in(self, memory: Array) -> Array:                   # (nb, ng, G, C, S) -> (nb, ng, G, queries, keys)
        """A contiguous array for the scores of this chunk, at the beginning of `memory`."""
        shape = *memory.shape[:3], self.queries.stop - self.queries.start, self.keys.stop
        return memory.reshape(-1)[: math.prod(shape)].reshape(shape)

    def hide(self, scores: Array, key_mask: Array | None) -> Array:
        """Add the masks in place; key_mask (nb, 1, 1, S)."""
        if self.mask is not None:
            scores += self.mask
        if key_mask is not None:
            scores += key_mask[:, :, None, :, self.keys]
        return scores


class BlockAttention(Kernels):
    """The overrides of attention. Arrays are (B, KV, G, …) inside: KV key heads, each used by G query heads."""

    def attention(self, q: Array, k: Array, v: Array, causal: bool, key_mask: Array | None, scale: float,
                  ) -> tuple[Array, Array]:
        """As in Kernels. o lies in memory as (B, T, H, hd), which the output projection wants."""
        if not pays(q, k, causal):
            return super().attention(q, k, v, causal, key_mask, scale)
        q, k, v = grouped(q, k, v)                                 # (B, KV, G, T, hd), (B, KV, G, S, hd) twice
        (B, KV, G, T, hd), S = q.shape, k.shape[3]
        mask = self.scores_mask(1, S, False, key_mask, q.dtype)    # (B, 1, 1, S) or None
        blocks, chunks, C = plan(q, S, causal)
        o, lse = np.empty((B, T, KV, G, hd), q.dtype), np.empty((B, KV, G, T), q.dtype)

        def run(block):
            b, g = block                                           # some batch items, some key heads
            heads = q[b, g].shape[:3]
            kT, v_block, memory = scratch(q.dtype, (*heads, hd, S), (*heads, S, hd), (*heads, C, S))
            kT[...], v_block[...] = k[b, g].swapaxes(3, 4), v[b, g]
            kT *= scale

            def scores(chunk, p):
                np.matmul(q[b, g][..., chunk.queries, :], kT[..., chunk.keys], out=p)
                return chunk.hide(p, None if mask is None else mask[b])

            for chunk in chunks:
                p = chunk.scores_in(memory)
                total, top = exponentials(partial(scores, chunk, p), out=p, lowest=LOWEST)
                total += TINY
                o_chunk = p @ v_block[..., chunk.keys, :]
                o_chunk *= (1.0 / total)[..., None]
                o[b, chunk.queries, g] = o_chunk.transpose(0, 3, 1, 2, 4)
                lse[b, g, :, chunk.queries] = np.log(total) + top

        for_blocks(run, blocks, products=True)
        return o.reshape(B, T, KV * G, hd).swapaxes(1, 2), lse.reshape(B, KV * G, T)

    def attention_grad(self, do: Array, q: Array, k: Array, v: Array, lse: Array, causal: bool, key_mask: Array | None,
                       scale: float) -> tuple[Array, Array, Array]:
        """As in Kernels. The results lie in memory as (B, T, H, hd)."""
        if not pays(q, k, causal):
            return super().attention_grad(do, q, k, v, lse, causal, key_mask, scale)
        q, k, v = grouped(q, k, v)
        (B, KV, G, T, hd), S = q.shape, k.shape[3]
        do, lse = do.reshape(q.shape), lse.reshape(B, KV, G, T)
        mask = self.scores_mask(1, S, False, key_mask, q.dtype)
        blocks, chunks, C = plan(q, S, causal)
        if S == T:                                                 # side by side in one array, so that `join` need not copy
            whole = np.empty((B, T, KV * (G + 2), hd), q.dtype)
            dq, dk, dv = np.split(whole, [KV * G, KV * (G + 1)], axis=2)
            dq = dq.reshape(B, T, KV, G, hd)
        else:
            dq, dk, dv = (np.empty(shape, q.dtype) for shape in ((B, T, KV, G, hd), (B, S, KV, hd), (B, S, KV, hd)))

        def run(block):
            b, g = block
            heads = q[b, g].shape[:3]
            qx, kx, k_block, vT, do_block, dk_block, dv_block, memory, dmemory = scratch(
                q.dtype, (*heads, T, hd + 1), (*heads, hd + 1, S), (*heads, S, hd), (*heads, hd, S), (*heads, T, hd),
                (*heads, S, hd), (*heads, S, hd), (*heads, C, S), (*heads, C, S))
            k_block[...], vT[...], do_block[...] = k[b, g], v[b, g].swapaxes(3, 4), do[b, g]
            qx[..., :hd], qx[..., hd] = q[b, g], -lse[b, g]
            kx[..., :hd, :], kx[..., hd, :] = k_block.swapaxes(3, 4), 1.0
            kx[..., :hd, :] *= scale
            for chunk in reversed(chunks):                         # the last one sees all keys: it sets k̄ and v̄, the others add
                t, keys = chunk.queries, chunk.keys
                p, dp = chunk.scores_in(memory), chunk.scores_in(dmemory)
                np.matmul(qx[..., t, :], kx[..., keys], out=p)
                chunk.hide(p, None if mask is None else mask[b])
                np.exp(p, out=p)                                               # P
                np.matmul(do_block[..., t, :], vT[..., keys], out=dp)          # P̄
                dp -= np.vecdot(dp, p)[..., None]
                dp *= p                                                        # S̄ = P ⊙ (P̄ - ⟨P̄, P⟩)
                add_product(dv_block, p.swapaxes(3, 4), do_block[..., t, :])
                add_product(dk_block, dp.swapaxes(3, 4), qx[..., t, :hd])
                dq_chunk = dp @ k_block[..., keys, :]
                dq_chunk *= scale
                dq[b, t, g] = dq_chunk.transpose(0, 3, 1, 2, 4)
            dk_block *= scale
            for gradient, from_heads in ((dk, dk_block), (dv, dv_block)):
                gradient[b, :, g] = (from_heads.sum(axis=2) if G > 1 else from_heads[:, :, 0]).swapaxes(1, 2)

        for_blocks(run, blocks, products=True)
        return dq.reshape(B, T, KV * G, hd).swapaxes(1, 2), dk.swapaxes(1, 2), dv.swapaxes(1, 2)

    def join(self, parts: list[Array]) -> Array:
        """Without a copy where the parts are the consecutive columns of one array, as attention_grad returns q̄, k̄ and v̄."""
        whole, start = parts[0].base, 0
        width = sum(part.shape[-1] for part in parts) * parts[0].itemsize
        for part in parts:
            if part.base is not whole or whole is None or not whole.flags.c_contiguous or (
                    part.ctypes.data != whole.ctypes.data + start or part.strides[-2:] != (width, part.itemsize)):
                return super().join(parts)
            start += part.shape[-1] * part.itemsize
        if whole.size * whole.itemsize != width * math.prod(parts[0].shape[:-1]):
            return super().join(parts)
        return whole.reshape(*parts[0].shape[:-1], -1)


def pays(q: Array, k: Array, causal: bool) -> bool:
    """Not for one query, where kᵀ would cost more than the product, nor for few scores; and it is not made for complex numbers,
    nor for queries before all keys."""
    (B, H, T, _), S = q.shape, k.shape[2]
    return T > 1 and not 0 < B * H * T * S <= SMALL and q.dtype.kind == "f" and not (causal and S < T)


def grouped(q: Array, k: Array, v: Array) -> tuple[Array, Array, Array]:
    """Views of q as (B, KV, G, T, hd), and of k and v as (B, KV, G, S, hd), the same for all G."""
    (B, H, T, hd), KV = q.shape, k.shape[1]
    k, v = (np.broadcast_to(a[:, :, None], (B, KV, H // KV, *a.shape[2:])) for a in (k, v))
    q = q if q.strides[-1] == q.itemsize else np.ascontiguousarray(q)          # as BLAS wants it
    return q.reshape(B, KV, H // KV, T, hd), k, v


def plan(q: Array, S: int, causal: bool) -> tuple[list[tuple[slice, slice]], list[Chunk], int]:
    """The blocks (batch items, key heads), the chunks of queries of each, and the length of a chunk."""
    B, KV, G, T = q.shape[:4]
    C = min(T, CHUNK) if causal else T
    n = SCORES // max(1, G * C * S)                                # key heads in a block
    blocks = [(b, g) for b in spans(B, n // KV) for g in spans(KV, n)]
    if not causal:
        return blocks, [Chunk(slice(0, T), slice(0, S), None)], C
    ends = [(start, min(start + C, T)) for start in range(0, T, C)]
    return blocks, [Chunk(slice(start, stop), slice(0, stop + S - T), later(stop - start, stop + S - T, q.dtype))
                    for start, stop in ends], C


@lru_cache(maxsize=64)
def later(T: int, S: int, dtype: Any) -> Array:
    """(T, S): -inf at the keys that come later than the query, where the last query is at the last key."""
    return np.where(np.arange(S) > np.arange(T)[:, None] + (S - T), -np.inf, 0.0).astype(dtype)


def exponentials(scores: Callable[[], Array], out: Array, lowest: float = -math.inf) -> tuple[Array, Any]:
    """out = exp(S - top); returns its sum along the last axis, and top.

    top is 0, or the row maximum (at least `lowest`) where a score is large or a row has next to nothing. `scores` returns S,
    which may be `out` itself, and is called again then.
    """
    s = scores()
    ones = np.ones(s.shape[-1], s.dtype)
    if s.max() < SAFE:
        np.exp(s, out=out)
        total = out @ ones
        if total.min() > math.exp(-SAFE):
            return total, 0.0
        s = scores()
    top = np.maximum(s.max(axis=-1), lowest)
    np.subtract(s, top[..., None], out=out)
    np.exp(out, out=out)
    return out @ ones, top


def add_product(total: Array, a: Array, b: Array) -> None:         # (…, S, hd), (…, seen, C), (…, C, hd)
    """Set total to a @ b if all keys are seen, else add it to the rows of those that are."""
    seen = a.shape[-2]
    if seen == total.shape[-2]:
        np.matmul(a, b, out=total)
    else:
        total[..., :seen, :] += a @ b
