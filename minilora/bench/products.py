"""Where minilora's time goes: every op timed by its name, every matrix product noted with its shape and measured alone.

The GEMM floor is what the products of a step would take by themselves: each shape's counted FLOPs over the rate that the
machine reaches at that shape (by the library's own threads or by ours, whichever is faster), on as many different operands as
a step has: what a step reads from memory, the floor reads from memory. Products inside attention belong to its op and are not
in the floor.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np

from ..autograd import Op
from ..backend import current_device, kernels, to_device, to_host

MEMORY = 256 << 20                                         # bytes of operands that measuring one shape may take
FEWEST_SECONDS = 0.01                                      # of a measurement


class Product(NamedTuple):
    """K products of (n, k) by (k, m). ta, tb: the array lies in memory transposed."""

    K: int
    n: int
    k: int
    m: int
    ta: bool = False
    tb: bool = False

    @property
    def flops(self) -> int:
        return 2 * self.K * self.n * self.k * self.m


def product(a: tuple[int, ...], b: tuple[int, ...], ta: bool = False, tb: bool = False) -> list[Product]:
    """The product of arrays of these shapes, either one transposed first: none for the small ones inside attention."""
    (n, k), m = a[-2:][:: -1 if ta else 1], b[-2 if tb else -1]
    if len(a) > 3 or len(b) > 3:
        return []
    if len(b) == 2:                                        # leading axes of a are further rows
        return [Product(1, n * (a[0] if len(a) == 3 else 1), k, m, ta and len(a) == 2, tb)]
    return [Product(b[0], n, k, m, ta, tb)]


def wait() -> None:
    """Wait until the current device has done what it was asked to do: only a copy to the host is sure to."""
    device = current_device()
    if device.xp is not np:
        to_host(device.xp.zeros(1, dtype=np.float32))


def profile(step: Callable[[], Any], steps: int) -> dict[str, Any]:
    """Run `steps` steps with every op timed: {"by_op": shares of the time, "gemm_gflop", "gemm_floor_ms": of one step}."""
    seconds: dict[str, float] = {}
    products: list[Product] = []
    with timed_ops(seconds, products):
        start = time.perf_counter()
        for _ in range(steps):
            step()
        whole = time.perf_counter() - start
    seconds["Python, optimiser, rest"] = whole - sum(seconds.values())
    shares = {op: s / whole for op, s in sorted(seconds.items(), key=lambda item: -item[1])}
    counts = Counter(products)
    floor = sum(count * product_seconds(p, count // steps) for p, count in counts.items())
    return {"by_op": shares, "gemm_gflop": sum(count * p.flops for p, count in counts.items()) / steps / 1e9,
            "gemm_floor_ms": 1e3 * floor / steps}


def product_seconds(p: Product, operands: int, repeats: int = 3) -> float:
    """The shortest time of one product, on up to `operands` different pairs of arrays in turn: a floor."""
    xp, rng = current_device().xp, np.random.default_rng(0)
    lead = (p.K,) if p.K > 1 else ()
    shapes = (*lead, *((p.k, p.n) if p.ta else (p.n, p.k))), (*lead, *((p.m, p.k) if p.tb else (p.k, p.m)))
    size = 4 * sum(int(np.prod(shape)) for shape in shapes)
    count = max(1, min(operands, MEMORY // size))
    first = [to_device(rng.random(shape, dtype=np.float32)) for shape in shapes]
    stored = [first] + [[array.copy() for array in first] for _ in range(count - 1)]
    pairs = [(a.swapaxes(-1, -2) if p.ta else a, b.swapaxes(-1, -2) if p.tb else b) for a, b in stored]
    out = xp.matmul(*pairs[0])
    ways: list[Any] = [lambda a, b: xp.matmul(a, b, out=out), kernels(out).matmul]
    return min(_seconds_each(way, pairs) for way in ways for _ in range(repeats))


def _seconds_each(multiply: Callable[[Any, Any], Any], pairs: list[tuple[Any, Any]]) -> float:
    wait()
    start, done = time.perf_counter(), 0
    while done < len(pairs) or time.perf_counter() - start < FEWEST_SECONDS:
        for a, b in pairs:
            multiply(a, b)
        wait()
        done += len(pairs)
    return (time.perf_counter() - start) / done


@contextmanager
def timed_ops(seconds: dict[str, float], products: list[Product]) -> Iterator[None]:
    """Time every op's forward and backward by name, and note the products, while the block runs.

    Meanwhile a batch is not shared out to threads as a whole: two ops at a time could not be told apart.
    """

    def timed(name: str, function: Any) -> Any:
        def call(*args: Any) -> Any:
            start = time.perf_counter()
            result = function(*args)
            wait()                                         # else a GPU is still at it, and the next op would be charged
            seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - start
            return result
        return call

    def noted(function: Any, of: Callable[..., list[Product]]) -> Any:
        """Note the products that the arguments say, and not those that the function makes of them inside."""
        def call(self: Any, *args: Any, **options: Any) -> Any:
            before = len(products)
            result = function(self, *args, **options)
            products[before:] = of(*args, **options)
            return result
        return call

    noting: dict[str, Callable[..., list[Product]]] = {
        "matmul": lambda a, b, ta=False, tb=False: product(a.shape, b.shape, ta, tb),
        "linear": lambda x, W, b: product(x.shape, W.shape, tb=True),
        "feed_forward": lambda x, W1, b1, W2, *rest: (
            product(x.shape, W1.shape, tb=True) + product((len(x), len(W1)), W2.shape, tb=True)),
        "linear_cross_entropy": lambda x, W, targets, weights, smoothing, gradient: (
            product(x.shape, W.shape, tb=True) + (product((len(x), len(W)), W.shape) if gradient else [])),
        "feed_forward_grad": lambda dy, s, W1, W2, hidden: product(dy.shape, W2.shape) + product(s.shape, W1.shape),
    }
    kernel_type: Any = type(kernels())
    patched = (*noting, "shards")
    kernels_before = {name: getattr(kernel_type, name) for name in patched}
    own = {name: name in vars(kernel_type) for name in patched}
    ops: dict[Any, Any] = {cls: (cls.forward, cls.backward) for cls in Op.registry.values()}
    try:
        for name, of in noting.items():
            setattr(kernel_type, name, noted(kernels_before[name], of))
        kernel_type.shards = lambda self, n, size: [slice(0, n)]
        for cls, (forward, backward) in ops.items():
            cls.forward, cls.backward = timed(cls.__name__, forward), timed(f"{cls.__name__} backward", backward)
        yield
    finally:
        for name, function in kernels_before.items():
            if own[name]:
                setattr(kernel_type, name, function)
            else:
                delattr(kernel_type, name)
        for cls, (forward, backward) in ops.items():
            cls.forward, cls.backward = forward, backward
