"""A formula on large arrays: run whole on one block of rows, which stays in the cache, then on the next, on all cores.

On a large array every NumPy operation waits for memory, whatever it computes. On a block its results are still in the cache
when the next operation of the formula wants them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import wraps
from typing import Any

import numpy as np

from .generic import Array, Kernels
from .memory import empty
from .parallel import for_blocks, scratch, spans

SMALL = 1 << 13       # elements that are not worth any machinery, and that BLAS by itself leaves to one thread
BLOCK = 1 << 17       # elements of one array in a block; smaller ones lose more in calls than they gain


def chain(formula: Callable[..., None], *arrays: Array, temporaries: int = 0, products: bool = False) -> None:
    """Call formula(temporaries…, blocks…) on blocks of rows of the arrays (equally many rows each).

    The temporaries are shaped like the first array's block. products: the formula multiplies matrices (see for_blocks).
    """
    first = arrays[0]

    def run(block: slice) -> None:
        parts = [a[block] for a in arrays]
        formula(*scratch(first.dtype, *[parts[0].shape] * temporaries), *parts)

    if 0 < first.size <= SMALL:
        formula(*[empty(first.shape, first.dtype) for _ in range(temporaries)], *arrays)
    else:
        for_blocks(run, spans(len(first), BLOCK // max(1, math.prod(first.shape[1:]))), products)


def small(x: Array) -> bool:
    return x.size <= SMALL


def unless_small(fast: Callable[..., Any]) -> Callable[..., Any]:
    """A primitive that leaves small arrays to its readable form, which calls NumPy less often: on the one row of a decoding
    step in a third of the time."""
    readable = getattr(Kernels, fast.__name__)

    @wraps(fast)
    def chosen(self: Kernels, x: Array, *args: Any, **options: Any) -> Any:
        return (readable if small(x) else fast)(self, x, *args, **options)

    return chosen


def rows(x: Array) -> Array:                                       # (..., D) -> (n, D)
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def like(x: Array) -> Array:
    """A new array, uninitialised, of the shape and dtype of x."""
    return empty(x.shape, x.dtype)


def outer(a: Array, line: Array, out: Array) -> Array:             # (n,), (2, D) from `line` -> (n, D)
    """out[i, j] = a[i] b[j] for line(b), by BLAS: NumPy's broadcasting costs a call for each row.

    (One column would be slow.)
    """
    columns = np.zeros((len(a), 2), a.dtype)
    columns[:, 0] = a
    return np.matmul(columns, line, out=out)


def line(b: Array) -> Array:                                       # (D,) -> (2, D), the second row zero
    return np.stack([b, np.zeros_like(b)])
