"""The tables of 4-bit and 8-bit codes, and the nearest code of a number."""

from __future__ import annotations

from functools import cache
from statistics import NormalDist

import numpy as np

from ..backend import Array, array_module, device_of, to_device


@cache
def code_values(quant_type: str) -> np.ndarray:            # -> (16,), the value of each code, of absolute value at most 1
    """NF4: quantiles of N(0, 1), 8 above zero, 7 below, and zero; the largest is 1. FP4: as bitsandbytes numbers them.

    The 4-bit float has 1 sign, 2 exponent and 1 mantissa bit. Raises ValueError for another name.
    """
    if quant_type == "nf4":
        quantile, offset = NormalDist().inv_cdf, 0.9677083
        above = [quantile(p) for p in np.linspace(offset, 0.5, 9)[:-1]]
        below = [-quantile(p) for p in np.linspace(offset, 0.5, 8)[:-1]]
        values = np.array(sorted([*below, 0.0, *above]))
        return values / values.max()
    if quant_type == "fp4":
        half = np.array([0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0]) / 12.0
        return np.concatenate([half, -half])
    raise ValueError(f"quant_type = {quant_type!r}: expected 'nf4' or 'fp4'")


@cache
def code_pairs(quant_type: str, dtype: str) -> np.ndarray:         # -> (256,)
    """byte -> the values of its two codes, the high bits' first, side by side in one complex number."""
    values = code_values(quant_type).astype(dtype)
    pairs = np.stack([np.repeat(values, 16), np.tile(values, 16)], axis=1)
    return pairs.view(np.result_type(dtype, np.complex64)).reshape(-1)


@cache
def byte_values() -> np.ndarray:                           # -> (256,), sorted
    """bitsandbytes' dynamic 8-bit code, in which the scales are stored: seven powers of ten, each finer than the one below."""
    values = [0.0, 1.0]
    for i in range(7):
        edges = np.linspace(0.1, 1.0, 2**i + 1)
        middles = 10.0 ** (i - 6) * (edges[:-1] + edges[1:]) / 2
        values += [*middles, *-middles]
    return np.sort(values)


def nearest(x: Array, values: np.ndarray) -> Array:        # (...) -> (...) uint8
    """The number of the value nearest to each x. Half way between two it is the smaller value's."""
    order = np.argsort(values, kind="stable")
    middles = (values[order][1:] + values[order][:-1]) / 2
    place = array_module(x).searchsorted(to_device(middles.astype(x.dtype), device_of(x).name), x)
    return to_device(order.astype("uint8"), device_of(x).name)[place]
