"""Attention on NumPy, a block of heads at a time, so that the scores stay in the cache, and the blocks on all cores.

NumPy is slow along short rows: finding the maximum of 64 scores takes as long as 500 multiplications. So the row maximum is
subtracted only where leaving it out would not be safe; the division by the sum waits until o, which is smaller than P; and
what the gradient subtracts comes in through the products, as one more feature: [q, -lse]·[k, 1] = q·k - lse.

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
from .memory import empty
from .parallel import for_blocks, scratch, spans

SMALL = 1 << 13       # scores that are not worth any machinery
SCORES = 1 << 18      # scores in a block
CHUNK = 64            # queries in a chunk
SAFE = 40.0           # e^±40, its sums and its products are far inside the range of float32


class Chunk(NamedTuple):
    """Some queries, the keys that they see, and what is added to their scores: None, or -inf at keys that come later."""

    queries: slice
    keys: slice
    mask: Array | None                                             # (queries, keys)

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
        result, lse = empty((B, T, KV * G, hd), q.dtype), np.empty((B, KV, G, T), q.dtype)
        o = by_heads(result, G)

        def run(block):                                            # some batch items, some key heads
            heads = q[block].shape[:3]
            kT, v_block, memory = scratch(q.dtype, (*heads, hd, S), (*heads, S, hd), (*heads, C, S))
            kT[...], v_block[...] = k[block].swapaxes(3, 4), v[block]
            kT *= scale

            def scores(chunk, p):
                np.matmul(q[block][..., chunk.queries, :], kT[..., chunk.keys], out=p)
                return chunk.hide(p, None if mask is None else mask[block[0]])

            for chunk in chunks:
                t, keys = chunk.queries, chunk.keys
                p = beginning(memory, (*heads, t.stop - t.start, keys.stop))
                total, top = exponentials(partial(scores, chunk, p), out=p, lowest=LOWEST)
                total += TINY
                lse[block][..., t] = np.log(total) + top
                o_chunk = p @ v_block[..., keys, :]
                o_chunk *= (1.0 / total)[..., None]
                o[block][..., t, :] = o_chunk

        for_blocks(run, blocks, products=True)
        return result.swapaxes(1, 2), lse.reshape(B, KV * G, T)

    def attention_grad(self, do: Array, q: Array, k: Array, v: Array, o: Array, lse: Array, causal: bool,
                       key_mask: Array | None, scale: float) -> tuple[Array, Array, Array]:
        """As in Kernels. The results lie in memory as (B, T, H, hd)."""
        if not pays(q, k, causal):
            return super().attention_grad(do, q, k, v, o, lse, causal, key_mask, scale)
        q, k, v = grouped(q, k, v)
        (B, KV, G, T, hd), S = q.shape, k.shape[3]
        do, o, lse = do.reshape(q.shape), o.reshape(q.shape), lse.reshape(B, KV, G, T)
        mask = self.scores_mask(1, S, False, key_mask, q.dtype)
        blocks, chunks, C = plan(q, S, causal)
        if S == T:                                                 # side by side in one array, so that `join` need not copy
            results = np.split(empty((B, T, KV * (G + 2), hd), q.dtype), [KV * G, KV * (G + 1)], axis=2)
        else:
            results = [empty(shape, q.dtype) for shape in ((B, T, KV * G, hd), (B, S, KV, hd), (B, S, KV, hd))]
        dq, dk, dv = by_heads(results[0], G), by_heads(results[1], 1), by_heads(results[2], 1)

        def run(block):
            heads = q[block].shape[:3]
            kx, vx, k_scaled, *memory = scratch(
                q.dtype, (*heads, hd + 1, S), (*heads, hd + 1, S), (*heads, S, hd),
                *[(math.prod(heads), C, size) for size in (hd + 1, hd + 1, S, S)])
            kx[..., :hd, :], kx[..., hd, :] = k[block].swapaxes(3, 4), 1.0
            vx[..., :hd, :], vx[..., hd, :] = v[block].swapaxes(3, 4), 1.0
            np.multiply(k[block], scale, out=k_scaled)
            for chunk in reversed(chunks):                         # the last one sees all keys: it sets k̄ and v̄, the others add
                t, keys = chunk.queries, chunk.keys
                qx, dox, p, dp = (beginning(m, (*heads, t.stop - t.start, size))
                                  for m, size in zip(memory, (hd + 1, hd + 1, keys.stop, keys.stop)))
                np.multiply(q[block][..., t, :], scale, out=qx[..., :hd])
                qx[..., hd] = -lse[block][..., t]
                dox[..., :hd] = do[block][..., t, :]
                dox[..., hd] = -np.vecdot(do[block][..., t, :], o[block][..., t, :])
                np.matmul(qx, kx[..., keys], out=p)
                np.exp(chunk.hide(p, None if mask is None else mask[block[0]]), out=p)         # P
                np.matmul(dox, vx[..., keys], out=dp)                                          # P̄ - ⟨ō, o⟩
                dp *= p                                                                        # S̄
                np.matmul(dp, k_scaled[..., keys, :], out=dq[block][..., t, :])
                qx, dox, p, dp = (a.reshape(*heads[:2], 1, -1, a.shape[-1]) for a in (qx, dox, p, dp))     # all G together
                add_product(dv[block], p.swapaxes(3, 4), dox[..., :hd])
                add_product(dk[block], dp.swapaxes(3, 4), qx[..., :hd])

        for_blocks(run, blocks, products=True)
        return results[0].swapaxes(1, 2), results[1].swapaxes(1, 2), results[2].swapaxes(1, 2)

    def join(self, parts: list[Array]) -> Array:
        """Without a copy where the parts are the consecutive columns of one array, as attention_grad returns q̄, k̄ and v̄."""
        first, memory = parts[0], parts[0].base
        shape = (*first.shape[:-1], sum(part.shape[-1] for part in parts))
        strides = tuple(math.prod(shape[i + 1 :]) * first.itemsize for i in range(len(shape)))
        place = first.ctypes.data
        for part in parts:
            if memory is None or part.base is not memory or part.strides != strides or part.ctypes.data != place:
                return super().join(parts)
            place += part.shape[-1] * part.itemsize
        return np.ndarray(shape, first.dtype, memory, first.ctypes.data - memory.ctypes.data)


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


def by_heads(x: Array, G: int) -> Array:                           # (B, T, KV·G, hd) -> (B, KV, G, T, hd), a view
    B, T, H, hd = x.shape
    return x.reshape(B, T, H // G, G, hd).transpose(0, 2, 3, 1, 4)


def beginning(memory: Array, shape: tuple[int, ...]) -> Array:
    """A contiguous array at the beginning of `memory`."""
    return memory.reshape(-1)[: math.prod(shape)].reshape(shape)


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
