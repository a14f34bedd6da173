"""float32 products by Intel's MKL, where its package is installed: pip install "minilora[mkl]", on Linux.

NumPy's wheels carry OpenBLAS. On Intel's processors MKL, which PyTorch's wheels carry, multiplies the same blocks in 10 to 20 %
less time. Only what numpy_fast.py shares out to threads comes here; everything else is NumPy's. The library is taken in its
sequential form, as the threads are ours, and asked for bits that do not depend on where in memory an operand lies.

Its usual entrance, libmkl_rt, shows MKL's names to the whole process: a PyTorch imported later would call inner functions of
this MKL, sequential and of another version, in place of its own. So numpy_elf.py opens its three parts out of PyTorch's sight.

MINILORA_MKL=0 in the environment leaves all to NumPy.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from importlib import metadata
from typing import Any

import numpy as np

from .generic import Array
from .numpy_elf import open_apart

ROWS_FIRST, AS_IT_LIES, TRANSPOSED = 101, 111, 112                 # from <mkl_cblas.h>
PARTS = ("libmkl_intel_lp64.so", "libmkl_sequential.so", "libmkl_core.so")
SAME_BITS, DONE = 2, 0                                             # from <mkl_service.h> and <mkl_types.h>
NARROW = 32                                                        # a side of b below which NumPy's own product is as fast


def load() -> Callable[..., None] | None:
    """cblas_sgemm of the installed package; None without one, if it does not open, or if it is not set as we need it."""
    if os.environ.get("MINILORA_MKL") == "0":
        return None
    try:
        parts = [os.path.realpath(file.locate()) for file in metadata.files("mkl") or [] if file.name.startswith(PARTS)]
        if len(parts) != len(PARTS):
            return None
        library: Any = open_apart(parts)
        agreed = library.MKL_Get_Max_Threads() == 1 and library.MKL_CBWR_Set(SAME_BITS) == DONE
        multiplication: Any = library.cblas_sgemm
    except (metadata.PackageNotFoundError, OSError, AttributeError):
        return None
    integer, number, pointer = ctypes.c_int, ctypes.c_float, ctypes.c_void_p
    multiplication.argtypes = [integer] * 6 + [number, pointer, integer, pointer, integer, number, pointer, integer]
    multiplication.restype = None
    return multiplication if agreed else None


sgemm = load()                                                     # at import: before any thread


def version() -> str | None:
    """The version of MKL that multiplies, or None."""
    return metadata.version("mkl") if sgemm else None


def multiply(a: Array, b: Array, out: Array) -> Array:             # (n, k), (k, m) -> (n, m)
    """np.matmul(a, b, out=out) for matrices. (MKL gives no warning of an overflow.)"""
    fits = a.shape[1] == len(b) and out.shape == (len(a), b.shape[1]) and a.dtype == b.dtype == out.dtype == np.float32
    if sgemm is None or not fits or min(b.shape) < NARROW:
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
