"""Reverse-mode differentiation: a Tensor remembers the Op that made it, and `backward` walks the Ops from last to first.

An Op is a class with `forward` and `backward` side by side, on plain arrays. Calling an Op on Tensors runs `forward`, and
notes where its inputs came from (its edges). Every Op takes a number when it is made, and an Op can only use what was made
before it: so "largest number first" is a valid order for the reverse pass, and no topological sort is needed. What travels
backwards is the cotangent ȳ = ∂loss/∂y of each result y; an Op turns it into those of its inputs.

What every gradient needs is done once, here and not in the Ops: summing over broadcast axes, checks of shape, dtype and
device, adding up where a tensor was used twice, and freeing the graph as the pass goes.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import Any

import numpy as np

from ..backend import Array, array_module, device_of, kernels, to_device, to_host

_grad_enabled: ContextVar[bool] = ContextVar("grad_enabled", default=True)
_order = itertools.count()


def no_grad() -> AbstractContextManager[None]:
    """Inside this block no graph is recorded: results have requires_grad=False and nothing is kept for a backward pass."""
    return recording(False)


@contextmanager
def recording(enabled: bool = True) -> Iterator[None]:
    """Inside this block a graph is recorded, or not."""
    token = _grad_enabled.set(enabled)
    try:
        yield
    finally:
        _grad_enabled.reset(token)


class Op:
    """One application of an operation: `forward` now, `backward` later, and what is kept in between.

    `forward(*arrays)` returns an array (or a tuple of arrays). `self.needs[i]` says whether input i needs a gradient; keep
    only what those gradients use. `backward(*cotangents)` returns one gradient for each input, by position; None where
    none is needed. A gradient may have the shape of the broadcast result: the engine sums it down to the input's shape.
    """

    registry: dict[str, type[Op]] = {}  # every Op there is; the tests require each of them to be gradient-checked

    needs: tuple[bool, ...] = ()
    kept: Any = None
    retained = False                    # in backward: whether the graph is to stay for another one

    def __init_subclass__(cls) -> None:
        if "backward" in vars(cls):
            Op.registry[cls.__name__] = cls

    def forward(self, *arrays: Any) -> Any:
        raise TypeError(f"{type(self).__name__} has no forward")

    def backward(self, *cotangents: Any) -> Any:
        raise TypeError(f"{type(self).__name__} has no backward")

    def keep(self, *arrays: Any) -> Any:
        """Keep arrays for `backward`, where `self.kept` holds them (a tuple if there are several). Returns them."""
        self.kept = arrays[0] if len(arrays) == 1 else arrays
        return self.kept

    def __call__(self, *inputs: Any) -> Any:
        arrays = tuple(x.data if isinstance(x, Tensor) else x for x in inputs)
        device = _check_inputs(self, arrays)
        if _grad_enabled.get():
            self.needs = tuple(isinstance(x, Tensor) and x.requires_grad for x in inputs)
        else:
            self.needs = (False,) * len(inputs)
        result = self.forward(*arrays)
        outputs = result if isinstance(result, tuple) else (result,)
        outputs = tuple(y if isinstance(y, device.array_type) else device.xp.asarray(y) for y in outputs)
        recorded = any(self.needs)
        if recorded:
            self.order = next(_order)
            self.n_outputs = len(outputs)
            # An edge is where the gradient goes: a leaf, or (the Op that made the input, which of its outputs). It does
            # not hold the input's array, so an input that no gradient uses is freed although the graph lives on.
            self.edges: Any = tuple(_edge(x) if need else None for x, need in zip(inputs, self.needs, strict=True))
            self.specs: Any = tuple((x.shape, x.dtype) if need else None for x, need in zip(arrays, self.needs, strict=True))
        tensors = tuple(Tensor(y, recorded, self if recorded else None, i) for i, y in enumerate(outputs))
        return tensors if isinstance(result, tuple) else tensors[0]

    def pull(self, cotangents: list[Array | None], retain_graph: bool) -> Iterator[tuple[Any, Array]]:
        """Run `backward` and yield (edge, gradient) for each input that needs one, its shape and dtype checked."""
        if self.edges is None:
            raise RuntimeError(f"backward through {type(self).__name__} a second time, but its graph was freed by the first; "
                               "call backward(retain_graph=True) the first time, or run the forward pass again")
        self.retained = retain_graph
        gradients = self.backward(*cotangents)
        gradients = gradients if isinstance(gradients, tuple) else (gradients,)
        edges, specs = self.edges, self.specs
        if len(gradients) != len(edges):
            raise RuntimeError(f"{type(self).__name__}.backward returned {len(gradients)} gradients for {len(edges)} inputs: "
                               "return one for each, None where none is needed")
        if not retain_graph:
            self.kept = self.edges = self.specs = None
        for i, (edge, spec) in enumerate(zip(edges, specs, strict=True)):
            if edge is None:
                continue
            shape, dtype = spec
            gradient = None if gradients[i] is None else unbroadcast(gradients[i], shape)
            if gradient is None or gradient.shape != shape or gradient.dtype != dtype:
                got = "None" if gradient is None else f"{gradient.shape} {gradient.dtype}"
                raise RuntimeError(f"{type(self).__name__}.backward returned {got} for input {i}, expected {shape} {dtype}: "
                                   "the operation's backward is wrong")
            yield edge, gradient


class Tensor:
    """An array that may require a gradient.

    `data` is a plain NumPy or CuPy array; `grad`, an array of the same shape, is filled on leaves (tensors that no Op made)
    by `backward`, and added to when it is there already.
    """

    __slots__ = ("__weakref__", "data", "grad", "index", "op", "requires_grad")
    __array_ufunc__ = None  # numpy_array * tensor comes to Tensor.__rmul__ instead of looping over elements

    def __init__(self, data: Array, requires_grad: bool = False, op: Op | None = None, index: int = 0) -> None:
        self.data = data
        self.grad: Array | None = None
        self.requires_grad = requires_grad
        self.op = op        # the Op that made this tensor; None on a leaf
        self.index = index  # which of that Op's outputs it is

    shape = property(lambda self: self.data.shape)
    dtype = property(lambda self: self.data.dtype)
    ndim = property(lambda self: self.data.ndim)
    size = property(lambda self: self.data.size)
    T = property(lambda self: self.transpose())

    def __len__(self) -> int:
        return len(self.data)

    def __repr__(self) -> str:
        note = ", requires_grad=True" if self.requires_grad else ""
        return f"tensor({np.array2string(to_host(self.data), precision=4, prefix='tensor(')}{note})"

    def item(self) -> float:
        """The value of a one-element tensor as a Python number. Waits for the device."""
        return to_host(self.data).item()

    def detach(self) -> Tensor:
        """The same array, cut off from the graph."""
        return Tensor(self.data)

    def backward(self, grad: Any = None, retain_graph: bool = False) -> None:
        """Add ∂(Σ grad ⊙ self)/∂leaf to the `.grad` of every leaf that requires it.

        grad: the cotangent, same shape as self; may be left out (then 1) for a one-element tensor. The graph is freed as the
        pass goes, unless retain_graph=True; going through a freed graph again raises RuntimeError.
        """
        if not self.requires_grad:
            raise RuntimeError("backward on a tensor that does not require a gradient: no input or parameter on the way to it "
                               "has requires_grad=True (or it was computed inside no_grad)")
        xp = array_module(self.data)
        if grad is None:
            if self.size != 1:
                raise ValueError(f"backward without a cotangent needs a one-element tensor, got shape {self.shape}: "
                                 "sum it first, or give backward(grad) an array of that shape")
            grad = xp.ones_like(self.data)
        grad = to_device(grad.data if isinstance(grad, Tensor) else grad, device_of(self.data).name)
        if grad.shape != self.shape or grad.dtype != self.dtype:
            raise ValueError(f"cotangent of shape {grad.shape} {grad.dtype}, expected the tensor's, {self.shape} {self.dtype}: "
                             "use grad.astype(...) or grad.reshape(...)")

        pullback(self, grad, retain_graph, _accumulate)

    # Python's signs and the array methods, each one Op.
    def __add__(self, other: Any) -> Tensor:
        return arithmetic.Add()(self, other)

    def __sub__(self, other: Any) -> Tensor:
        return arithmetic.Subtract()(self, other)

    def __mul__(self, other: Any) -> Tensor:
        return arithmetic.Multiply()(self, other)

    def __truediv__(self, other: Any) -> Tensor:
        return arithmetic.Divide()(self, other)

    def __matmul__(self, other: Any) -> Tensor:
        return functions.matmul(self, other)

    def __rsub__(self, other: Any) -> Tensor:
        return arithmetic.Subtract()(other, self)

    def __rtruediv__(self, other: Any) -> Tensor:
        return arithmetic.Divide()(other, self)

    def __rmatmul__(self, other: Any) -> Tensor:
        return functions.matmul(other, self)

    __radd__, __rmul__ = __add__, __mul__

    def __neg__(self) -> Tensor:
        return arithmetic.Negate()(self)

    def __pow__(self, exponent: float) -> Tensor:
        if not isinstance(exponent, (int, float)):
            raise TypeError(f"the exponent must be a Python number, got {type(exponent).__name__}: use exp(b * log(a))")
        return arithmetic.Power(float(exponent))(self)

    def __getitem__(self, index: Any) -> Tensor:
        """self[index] for integers, slices, None, ... and integer arrays. Repeated indices add up in the gradient."""
        device = device_of(self.data).name

        def place(part: Any) -> Any:
            if part is None or part is Ellipsis or isinstance(part, (int, slice)):
                return part
            part = to_device(part.data if isinstance(part, Tensor) else part, device)
            if part.dtype.kind not in "iu":
                raise TypeError(f"an index array must hold integers, got {part.dtype}: for masks use where(condition, a, b)")
            return part

        index = tuple(place(p) for p in index) if isinstance(index, tuple) else place(index)
        return shaping.GetItem(index)(self)

    def sum(self, axis: Any = None, keepdims: bool = False) -> Tensor:
        return arithmetic.Sum(axis, keepdims)(self)

    def mean(self, axis: Any = None, keepdims: bool = False) -> Tensor:
        total = self.sum(axis, keepdims)
        return total * (total.size / self.size)

    def max(self, axis: Any = None, keepdims: bool = False) -> Tensor:
        return arithmetic.Max(axis, keepdims)(self)

    def reshape(self, *shape: int) -> Tensor:
        return shaping.Reshape(shape)(self)

    def transpose(self, *axes: int) -> Tensor:
        return shaping.Transpose(axes)(self)


def pullback(y: Tensor, dy: Array, retain_graph: bool, deliver: Callable[[Tensor, Array, list[Array | None]], None]) -> None:
    """Walk the graph of y backwards and call deliver(leaf, gradient, sources) for each gradient that arrives at a leaf.

    It may arrive in several parts, to be added up; sources are the cotangents of the Op that it comes from.
    """
    cotangents: dict[Op, list[Array | None]] = {}      # of the Ops still to come: one slot for each output
    queue: list[tuple[int, Op]] = []                   # largest order first

    def send(edge: Any, gradient: Array, sources: list[Array | None]) -> None:
        if isinstance(edge, Tensor):
            deliver(edge, gradient, sources)
            return
        op, index = edge
        if op not in cotangents:
            cotangents[op] = [None] * op.n_outputs
            heapq.heappush(queue, (-op.order, op))
        held = cotangents[op][index]
        cotangents[op][index] = gradient if held is None else kernels(held).add(held, gradient)

    send(_edge(y), dy, [dy])
    while queue:
        op = heapq.heappop(queue)[1]
        dys = cotangents.pop(op)
        for edge, gradient in op.pull(dys, retain_graph):
            send(edge, gradient, dys)


def tensor(array: Any, requires_grad: bool = False) -> Tensor:
    """A Tensor on the current device, holding its own copy of `array`.

    Arrays keep their dtype; Python numbers and lists of floats become float32. Raises TypeError if a gradient is asked for
    and the values are not floating-point.
    """
    if isinstance(array, Tensor):
        array = array.data
    if isinstance(array, (float, list, tuple)) and not isinstance(array, np.generic):
        array = np.asarray(array)
        array = array.astype(np.float32) if array.dtype == np.float64 else array
    data = to_device(np.asarray(array) if isinstance(array, (int, bool)) else array).copy()
    if requires_grad and data.dtype.kind not in "fc":
        raise TypeError(f"only floating-point tensors can require a gradient, got {data.dtype}: use array.astype('float32')")
    return Tensor(data, requires_grad)


def unbroadcast(gradient: Array, shape: tuple[int, ...]) -> Array:
    """Sum a gradient over the axes along which its input was broadcast: the adjoint of broadcasting copies, so it adds."""
    if gradient.shape == shape or gradient.ndim < len(shape):
        return gradient
    gradient = gradient.sum(axis=tuple(range(gradient.ndim - len(shape)))) if gradient.ndim > len(shape) else gradient
    stretched = tuple(i for i, (have, want) in enumerate(zip(gradient.shape, shape, strict=True)) if have != want == 1)
    return gradient.sum(axis=stretched, keepdims=True) if stretched else gradient


def creation() -> int:
    """A number larger than those of all Ops made so far, and smaller than those of all to come."""
    return next(_order)


def _edge(x: Tensor) -> Any:
    return x if x.op is None else (x.op, x.index)


def _accumulate(leaf: Tensor, gradient: Array, sources: list[Array | None]) -> None:
    """Add to a leaf's grad. It must own its array: a view, or a cotangent itself, may be somebody else's too."""
    if leaf.grad is not None:
        gradient = leaf.grad + gradient
    elif any(gradient is source for source in sources) or getattr(gradient, "base", None) is not None:
        gradient = gradient.copy()
    leaf.grad = array_module(leaf.data).asarray(gradient)     # NumPy's arithmetic on 0-d arrays gives scalars


def _check_inputs(op: Op, arrays: tuple[Any, ...]) -> Any:
    """One device for all inputs, and one floating-point precision. Returns the device.

    complex128 counts as float64, and so do integers of 32 or 64 bits beside floats: that is what NumPy would make of them.
    """
    if any(isinstance(a, (list, tuple)) for a in arrays):
        raise TypeError(f"{type(op).__name__} got a list among its operands: make it an array of the tensors' dtype first")
    owned = [a for a in arrays if hasattr(a, "dtype")]
    device = device_of(*owned)
    widths = {a.dtype.itemsize // (2 if a.dtype.kind == "c" else 1) for a in owned if a.dtype.kind in "fc"}
    if widths:
        widths |= {8 for a in owned if a.dtype.kind in "iu" and a.dtype.itemsize > 2}
    if len(widths) > 1:
        kinds = " and ".join(sorted({str(a.dtype) for a in owned if a.dtype.kind in "fciu"}))
        raise TypeError(f"{type(op).__name__} got {kinds} together: convert one with .astype(...) so that both agree "
                        "(float32 to train, float64 to check)")
    return device


from . import arithmetic, functions, shaping  # noqa: E402  at the end, because the Ops need Tensor and Op first
