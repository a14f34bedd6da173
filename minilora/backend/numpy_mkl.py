"""float32 products by Intel's MKL, where its package is installed: pip install "minilora[mkl]".

NumPy's wheels carry OpenBLAS. On Intel's processors MKL, which PyTorch's wheels carry, multiplies the same blocks in 10 to 20 %
less time. Only the large products of numpy_fast.py come here; everything else is NumPy's. The library is asked for its
sequential form, as our own threads share out the blocks, and for bits that do not depend on where in memory an operand lies.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable
from functools import cache
from importlib import metadata
from typing import Any

import numpy as np

from .generic import Array

ROWS_FIRST, AS_IT_LIES, TRANSPOSED = 101, 111, 112                 # from <mkl_cblas.h>
LP64, SEQUENTIAL, SAME_BITS = 0, 1, 2                              # from <mkl_service.h>, <mkl_types.h>
NARROW = 32                                                        # a side below which NumPy's own product is as fast


def version() -> str | None:
    """The version of MKL that multiplies, or None."""
    return metadata.version("mkl") if _sgemm() else None


def multiply(a: Array, b: Array, out: Array) -> Array:             # (n, k), (k, m) -> (n, m)
    """np.matmul(a, b, out=out) for matrices."""
    sgemm = _sgemm()
    if sgemm is None or min(*a.shape, b.shape[1]) < NARROW or not a.dtype == b.dtype == out.dtype == np.float32:
        return np.matmul(a, b, out=out)
    (how_a, lda), (how_b, ldb), (how_out, ldc) = _layout(a), _layout(b), _layout(out)
    if not (lda and ldb and how_out == AS_IT_LIES):
        return np.matmul(a, b, out=out)
    sgemm(ROWS_FIRST, how_a, how_b, len(a), b.shape[1], len(b), 1.0, a.ctypes.data, lda, b.ctypes.data, ldb, 0.0,
          out.ctypes.data, ldc)
    return out


def _layout(a: Array) -> tuple[int, int]:
    """How a matrix lies in memory, and how many elements apart its rows (or columns, if transposed) begin: 0 if neither."""
    (row, column), (n, m), size = a.strides, a.shape, a.itemsize
    if column == size and row >= m * size and row % size == 0:
        return AS_IT_LIES, row // size
    if row == size and column >= n * size and column % size == 0:
        return TRANSPOSED, column // size
    return 0, 0


@cache
def _sgemm() -> Callable[..., None] | None:
    """cblas_sgemm of the installed package; None without one."""
    try:
        files = metadata.files("mkl") or []
        library: Any = ctypes.CDLL(next(str(file.locate()) for file in files if re.match(r"(lib)?mkl_rt\.", file.name)))
    except (metadata.PackageNotFoundError, StopIteration, OSError):
        return None
    library.MKL_Set_Interface_Layer(LP64)
    library.MKL_Set_Threading_Layer(SEQUENTIAL)
    library.MKL_CBWR_Set(SAME_BITS)
    integer, number, pointer = ctypes.c_int, ctypes.c_float, ctypes.c_void_p
    library.cblas_sgemm.argtypes = [integer] * 6 + [number, pointer, integer, pointer, integer, number, pointer, integer]
    library.cblas_sgemm.restype = None
    return library.cblas_sgemm
