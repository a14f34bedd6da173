"""A segment of a model as one Op with graphs of its own inside: shared out to threads, or computed again in backward.

Shards: the rows of a batch meet nowhere in a model, only in the gradients of its parameters, which add up. So each shard has
a graph of its own, forward and backward, and the threads wait for each other only at the two ends, not after every operation.

Recomputed: a segment's graph is thrown away after the forward pass and made again in backward, so that of all segments only
one at a time has its activations in memory (Chen et al. 2016, arXiv:1604.06174).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from operator import add
from typing import Any

from ..backend import array_module, kernels
from .tensor import Op, Tensor, creation, pullback, recording


def in_shards(fn: Callable[[Tensor, slice], Tensor], x: Tensor, shards: list[slice]) -> Tensor:
    """fn(x[rows], rows) for each shard of the rows of x, and the results one below the other, (n, ...) -> (n, ...).

    fn must treat every row by itself, be safe to call from several threads at once, and use no tensors of a graph but x
    (parameters and other leaves it may): RuntimeError if it does.
    """
    if len(shards) == 1:
        return fn(x, shards[0])
    since = creation()
    inputs = [Tensor(x.data[rows], x.requires_grad) for rows in shards]
    outputs: Any = [None] * len(shards)

    def run(i: int) -> None:
        outputs[i] = fn(inputs[i], shards[i])

    kernels(x.data).side_by_side(run, range(len(shards)))
    leaves = [leaf for leaf in leaves_of(outputs, since) if leaf not in inputs]
    return Shards(shards, inputs, outputs, leaves)(x, *leaves)


class Shards(Op):
    """y = f(x), computed for each shard i of the rows: y_i = f(x_i).

    x̄_i is the pullback of ȳ_i through the shard's own graph; a leaf that several shards used gets the sum of theirs.
    """

    def __init__(self, shards: list[slice], inputs: list[Tensor], outputs: list[Tensor], leaves: list[Tensor]) -> None:
        self.shards = shards
        self.keep(inputs, outputs, leaves)

    def forward(self, x, *leaves):                              # (n, ...) -> (n, ...)
        return array_module(x).concatenate([y.data for y in self.kept[1]])

    def backward(self, dy):
        inputs, outputs, leaves = self.kept
        gradients: list[dict[Tensor, Any]] = [{} for _ in self.shards]

        def run(i: int) -> None:
            pullback(outputs[i], dy[self.shards[i]], self.retained, adding_to(gradients[i]))

        kernels(dy).side_by_side(run, range(len(self.shards)))
        dx = array_module(dy).concatenate([g[x] for g, x in zip(gradients, inputs)]) if self.needs[0] else None
        return dx, *(reduce(add, [g[leaf] for g in gradients if leaf in g]) for leaf in leaves)


def recomputed(fn: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """fn(x), keeping nothing but x for backward, where fn runs once more. fn must do the same both times: no random numbers.

    fn must use no tensors of a graph but x (parameters and other leaves it may): RuntimeError if it does.
    """
    since = creation()
    own = Tensor(x.data, x.requires_grad)
    y = fn(own)
    leaves = [leaf for leaf in leaves_of([y], since) if leaf is not own]
    return Recomputed(fn, y.data, leaves)(x, *leaves)


class Recomputed(Op):
    """y = f(x).   x̄ and the gradients of the leaves are the pullback of ȳ through the graph of a second run of f."""

    def __init__(self, fn: Callable[[Tensor], Tensor], y: Any, leaves: list[Tensor]) -> None:
        self.fn, self.y, self.leaves = fn, y, leaves

    def forward(self, x, *leaves):                              # (n, ...) -> (n, ...)
        y, self.y = self.y, None
        self.keep(x)
        return y

    def backward(self, dy):
        x = Tensor(self.kept, self.needs[0])
        gradients: dict[Tensor, Any] = {}
        with recording():                                       # whatever backward was called in
            y = self.fn(x)
        pullback(y, dy, False, adding_to(gradients))
        if gradients.keys() - {x} != set(self.leaves):
            raise RuntimeError("recomputed: the second run of the function used other parameters than the first; was an "
                               "adapter switched on or off, or frozen, between the forward pass and backward?")
        return gradients[x] if self.needs[0] else None, *(gradients[leaf] for leaf in self.leaves)


def adding_to(gradients: dict[Tensor, Any]) -> Callable[[Tensor, Any, Any], None]:
    """What `pullback` does with a gradient that arrives at a leaf: add it up here, and not in the leaf's own `grad`."""
    def deliver(leaf: Tensor, gradient: Any, sources: Any) -> None:
        gradients[leaf] = gradients[leaf] + gradient if leaf in gradients else gradient
    return deliver


def leaves_of(tensors: list[Tensor], since: int) -> list[Tensor]:
    """The leaves that the graphs of these tensors end in. Raises RuntimeError at an Op that is older than number `since`."""
    leaves: dict[Tensor, None] = {}
    ops = [y.op for y in tensors if y.op is not None]
    seen = set(ops)
    while ops:
        op: Any = ops.pop()
        if op.order < since:
            raise RuntimeError(f"in_shards: the function uses the result of {type(op).__name__}, which was computed outside of "
                               "it: compute it inside, or pass it in as x")
        for edge in op.edges:
            if isinstance(edge, Tensor):
                leaves[edge] = None
            elif edge is not None and edge[0] not in seen:
                seen.add(edge[0])
                ops.append(edge[0])
    return list(leaves)
