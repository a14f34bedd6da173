"""Ops that move numbers without changing them. The gradient of a move is the move back; of a copy, a sum."""

from __future__ import annotations

from typing import Any

from ..backend import array_module, kernels
from .tensor import Op


class Reshape(Op):
    """The same numbers in another shape. The gradient takes the old shape."""

    def __init__(self, shape: tuple[int, ...] | int) -> None:
        self.shape = shape

    def forward(self, a):
        self.keep(a.shape)
        return a.reshape(*self.shape or ((),))   # (2, 3) or ((2, 3),); nothing: 0-d

    def backward(self, dy):
        return dy.reshape(self.kept)


class Transpose(Op):
    """Axes in another order (none given: reversed). The gradient takes the inverse order."""

    def __init__(self, axes: tuple[Any, ...] = ()) -> None:
        self.axes = axes

    def forward(self, a):
        axes = self.axes[0] if self.axes and isinstance(self.axes[0], tuple) else self.axes      # (0, 2, 1) or ((0, 2, 1),)
        self.keep(axes or tuple(reversed(range(a.ndim))))
        return a.transpose(self.kept)

    def backward(self, dy):
        axes, n = self.kept, dy.ndim
        return dy.transpose(tuple(sorted(range(n), key=lambda i: axes[i] % n)))


class GetItem(Op):
    """y = a[index], for slices and for integer arrays.

    ā is zero except at the index. An element that was taken twice gets both cotangents: with integer arrays they are added
    (`add.at`), because plain assignment would keep only the last.
    """

    def __init__(self, index: Any) -> None:
        self.index = index
        parts = index if isinstance(index, tuple) else (index,)
        self.slices_only = all(p is None or p is Ellipsis or isinstance(p, (int, slice)) for p in parts)

    def forward(self, a):
        self.keep(a.shape)
        return a[self.index]

    def backward(self, dy):
        xp = array_module(dy)
        da = xp.zeros(self.kept, dtype=dy.dtype)
        if self.slices_only:
            da[self.index] = dy
        else:
            xp.add.at(da, self.index, dy)
        return da


class Concatenate(Op):
    """Arrays joined along an axis.   Each input gets its own part of the cotangent."""

    def __init__(self, axis: int = 0) -> None:
        self.axis = axis

    def forward(self, *arrays):
        self.keep([a.shape[self.axis] for a in arrays])
        return array_module(*arrays).concatenate(arrays, axis=self.axis)

    def backward(self, dy):
        return tuple(cut(dy, self.kept, self.axis))


class Stack(Op):
    """Arrays of one shape joined along a new axis.   Each input gets its own slice of the cotangent."""

    def __init__(self, axis: int = 0) -> None:
        self.axis = axis

    def forward(self, *arrays):
        return array_module(*arrays).stack(arrays, axis=self.axis)

    def backward(self, dy):
        n = dy.shape[self.axis]
        return tuple(part.squeeze(self.axis) for part in cut(dy, [1] * n, self.axis))


class Split(Op):
    """An array cut into parts of the given sizes along its last axis: several outputs, all of them views.

    The gradient is the parts' cotangents side by side; a part that nobody used contributes zeros.
    """

    def __init__(self, sizes: list[int]) -> None:
        self.sizes = sizes

    def forward(self, a):                                       # (..., Σ sizes) -> (..., size_0), (..., size_1), …
        self.keep(a.shape)
        return tuple(cut(a, self.sizes, -1))

    def backward(self, *dys):
        given = next(dy for dy in dys if dy is not None)
        zeros = array_module(given).zeros
        lead = self.kept[:-1]
        return kernels(given).join([zeros((*lead, n), dtype=given.dtype) if dy is None else dy
                                    for dy, n in zip(dys, self.sizes, strict=True)])


class RowBlocks(Op):
    """Arrays that are consecutive row blocks of one buffer, seen as the whole buffer: nothing is copied.

    This is how q_proj, k_proj and v_proj are one packed weight. The gradient is cut into the blocks' rows.
    """

    def __init__(self, whole: Any) -> None:
        self.whole = whole                                      # (Σ rows, ...), whose row blocks are the inputs

    def forward(self, *blocks):
        self.keep([b.shape[0] for b in blocks])
        return self.whole

    def backward(self, dy):
        return tuple(cut(dy, self.kept, 0))


class Embedding(Op):
    """y = W[ids], rows of a table.   W̄ adds up the cotangents of all places where a row was used."""

    def __init__(self, ids: Any) -> None:
        self.ids = ids                                          # (...) integers, already checked to lie in the table

    def forward(self, W):                                       # (V, D) -> (..., D)
        self.keep(W.shape[0])
        return W[self.ids]

    def backward(self, dy):                                     # (..., D) -> (V, D)
        return kernels(dy).embedding_grad(self.ids, dy, self.kept)


class Dropout(Op):
    """y = x ⊙ m with m = 0 (probability p) or 1/(1-p), drawn by the caller on the host.   x̄ = ȳ ⊙ m."""

    def __init__(self, mask: Any) -> None:
        self.mask = mask                                        # broadcasts to x

    def forward(self, x):
        return x * self.mask

    def backward(self, dy):
        return dy * self.mask


def cut(a: Any, sizes: list[int], axis: int) -> list[Any]:
    """Views of consecutive parts of `a` along an axis."""
    axis, parts, start = axis % a.ndim, [], 0
    for size in sizes:
        parts.append(a[(slice(None),) * axis + (slice(start, start + size),)])
        start += size
    return parts
