"""Blocks of a large job on all cores. NumPy lets go of Python's lock inside its loops, so plain threads work side by side.

The caller works too: with two usable cores there is one helper thread, made at first use and kept. All take the next block
from one queue, so a core that is busy with something else simply takes fewer.
"""

from __future__ import annotations

import math
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from contextvars import copy_context
from functools import cache
from typing import Any

import numpy as np
from threadpoolctl import ThreadpoolController

from .memory import empty

_own = threading.local()  # what each thread has for itself: `working`, inside for_blocks, and `memory`, for scratch


def cores() -> int:
    """How many cores this process may use, as joblib counts them: by affinity and by its container's CPU quota, rounded up."""
    import joblib  # here, as it takes 0.1 s

    return joblib.cpu_count()


@cache
def workers() -> int:
    """How many threads may work: the usable cores, but no more than the environment variable OMP_NUM_THREADS says."""
    limit = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]
    return max(1, min(cores(), int(limit))) if limit.isdecimal() else cores()


@cache
def _helpers() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(workers() - 1, thread_name_prefix="minilora")


def for_blocks(fn: Callable[[Any], None], blocks: Iterable[Any], products: bool = False) -> None:
    """Call fn(block) for every block, in several threads at once and in no particular order.

    The blocks must be independent: fn writes each block's results to a place of their own. products: fn multiplies
    matrices, so BLAS is held to one thread meanwhile. Called from inside a block, it runs in that thread alone. An
    exception of fn is raised here, after the other threads have stopped.
    """
    queue = deque(blocks)
    if working():
        for block in queue:
            fn(block)
        return
    helpers = min(workers(), len(queue)) - 1
    with one_blas_thread() if products else nullcontext():
        futures = [_helpers().submit(copy_context().run, _work, fn, queue) for _ in range(helpers)]
        try:
            _work(fn, queue)
        finally:
            for future in futures:
                if not future.cancel():  # cancelled if it never began: the helper is busy for another caller
                    future.result()


def working() -> bool:
    """Whether the caller is itself inside for_blocks."""
    return getattr(_own, "working", False)


@contextmanager
def one_worker() -> Iterator[None]:
    """for_blocks, and a model's rows, stay in the caller's thread, and BLAS too: for measurements that no cores may change."""
    before = working()
    with one_blas_thread():
        _own.working = True
        try:
            yield
        finally:
            _own.working = before


def in_order(fn: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
    """fn(item) for every item, in their order, computed in several threads a few items ahead, with one BLAS thread each.

    Only as many results as there are workers wait to be taken, so a long stream stays small. An exception of fn is raised
    where its result would come.
    """
    with one_blas_thread(), ThreadPoolExecutor(workers()) as pool:
        waiting: deque[Any] = deque()
        for item in items:
            waiting.append(pool.submit(fn, item))
            if len(waiting) > workers():
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def spans(n: int, size: int) -> list[slice]:
    """0 … n in slices of equal length, at most `size`; if more than one is needed, a multiple of the number of workers."""
    count = -(-n // max(1, size))
    if count > 1:
        count = -(-count // workers()) * workers()
    length = max(1, -(-n // max(1, count)))
    return [slice(start, min(start + length, n)) for start in range(0, n, length)]


def _work(fn: Callable[[Any], None], queue: deque[Any]) -> None:
    _own.working = True
    try:
        for block in _taken(queue):
            fn(block)
    except BaseException:
        queue.clear()                    # nothing more to do for anybody
        raise
    finally:
        _own.working = False


def _taken(queue: deque[Any]) -> Iterator[Any]:
    while True:
        try:
            block = queue.popleft()
        except IndexError:
            return
        yield block


def scratch(dtype: Any, *shapes: tuple[int, ...]) -> list[np.ndarray]:
    """Uninitialised arrays in this thread's own memory, good until its next call of `scratch`. Never hand one to a caller."""
    if getattr(_own, "layout", None) != (dtype, shapes):
        sizes = [-(-math.prod(shape) * np.dtype(dtype).itemsize // 64) * 64 for shape in shapes]
        if sum(sizes) > len(getattr(_own, "memory", b"")):
            _own.memory = empty((sum(sizes),), np.uint8)
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        _own.arrays = [np.ndarray(shape, dtype, _own.memory, start) for shape, start in zip(shapes, starts)]
        _own.layout = dtype, shapes
    return _own.arrays


# BLAS's number of threads belongs to the whole process. The first who needs one thread sets it, the last one restores it.
# Its own threads are of no use here: after a product they spin for milliseconds, on the cores that the next block needs.

_blas_lock = threading.Lock()
_blas_users: list[list[int]] = []        # for each block of code that needs one thread, what the first of them found


@cache
def _blas() -> list[Any]:
    return [library for library in ThreadpoolController().lib_controllers if library.user_api == "blas"]


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """Hold BLAS to one thread, in every thread of this process, while the block runs."""
    with _blas_lock:
        if not _blas_users:
            before = [library.get_num_threads() for library in _blas()]
            for library in _blas():
                library.set_num_threads(1)
        _blas_users.append(_blas_users[0] if _blas_users else before)
    try:
        yield
    finally:
        with _blas_lock:
            before = _blas_users.pop()
            if not _blas_users:
                for library, threads in zip(_blas(), before):
                    library.set_num_threads(threads)


if hasattr(os, "register_at_fork"):      # a child process has no threads but the one that forked
    os.register_at_fork(after_in_child=_helpers.cache_clear)
