"""The fast NumPy primitives equal the readable ones of generic.py, in one thread and in several, and keep to themselves.

Each check runs the fast primitive in float64 and float32 against the generic one in float64, on the same numbers.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import joblib
import numpy as np
import pytest
from threadpoolctl import threadpool_info, threadpool_limits

from minilora.backend import numpy_attention, numpy_chain, numpy_fast, parallel
from minilora.backend.generic import Kernels
from minilora.backend.numpy_fast import NumpyKernels

GENERIC, FAST = Kernels(np), NumpyKernels(np)
TOLERANCE = {"float64": 1e-12, "float32": 2e-6}                    # of the largest number in the array


@pytest.fixture(params=["as they are", "one worker", "three workers"])
def threads(request, monkeypatch):
    """Every primitive as it is, which leaves small arrays to the readable one; on small arrays too, in one thread; and cut
    into blocks that several threads take: small ones, but for large arrays."""
    if request.param == "as they are":
        yield
        return
    monkeypatch.setattr(numpy_chain, "SMALL", 0)
    if request.param == "one worker":
        monkeypatch.setattr(parallel, "workers", lambda: 1)
        yield
        return
    if "large" not in request.node.callspec.params.values():
        monkeypatch.setattr(numpy_chain, "BLOCK", 8)
        for name in ("ALONE", "PRODUCT", "LARGE"):
            monkeypatch.setattr(numpy_fast, name, 0)
        monkeypatch.setattr(numpy_attention, "SMALL", 0)
        monkeypatch.setattr(numpy_attention, "SCORES", 64)
        monkeypatch.setattr(numpy_attention, "CHUNK", 3)
    yield from three_workers(monkeypatch)


@pytest.fixture
def three(monkeypatch):
    yield from three_workers(monkeypatch)


def three_workers(monkeypatch):
    monkeypatch.setattr(parallel, "workers", lambda: 3)
    parallel._helpers.cache_clear()
    yield
    parallel._helpers().shutdown()
    parallel._helpers.cache_clear()


def outputs(result):
    return result if isinstance(result, tuple) else (result,)


def agree(name: str, *args, exactly: tuple = (), dtypes=("float64", "float32")) -> None:
    """The fast primitive equals the generic one. Arrays of floats in args are cast; the `exactly` ones go in as they are."""
    for dtype in dtypes:
        own = [a.astype(dtype, order="K") if isinstance(a, np.ndarray) and a.dtype == np.float64 else a for a in args]
        own = [_as_laid_out(a, b) for a, b in zip(own, args)]
        before = [a.copy() if isinstance(a, np.ndarray) else a for a in own]
        got = outputs(getattr(FAST, name)(*own, *exactly))
        want = outputs(getattr(GENERIC, name)(*[a.astype("float64") if isinstance(a, np.ndarray) and a.dtype.kind == "f" else a
                                                for a in own], *exactly))
        assert len(got) == len(want)
        for g, w in zip(got, want):
            if w is None:
                assert g is None
                continue
            assert g.shape == w.shape and g.dtype == dtype
            np.testing.assert_allclose(g, w, rtol=0, atol=TOLERANCE[dtype] * max(1.0, np.abs(w).max(initial=0.0)))
            assert not any(np.shares_memory(g, a) for a in own if isinstance(a, np.ndarray))
        for a, b in zip(own, before):
            np.testing.assert_array_equal(a, b)                    # the inputs are left alone


def _as_laid_out(a, like):
    """A copy of `a` that is as little contiguous as `like` is."""
    if not isinstance(a, np.ndarray) or like.flags.c_contiguous:
        return a
    room = np.zeros((*a.shape[:-1], 2 * a.shape[-1]), a.dtype)
    room[..., ::2] = a
    return room[..., ::2]


ROWS = {
    "one row": lambda r: r.standard_normal((1, 7)),
    "one column": lambda r: r.standard_normal((5, 1)),
    "one number": lambda r: r.standard_normal((1,)),
    "no rows": lambda r: r.standard_normal((0, 4)),
    "empty leading axis": lambda r: r.standard_normal((3, 0, 4)),
    "three axes": lambda r: r.standard_normal((3, 1, 11)),
    "every other column": lambda r: r.standard_normal((6, 10))[:, ::2],
    "transposed": lambda r: r.standard_normal((4, 3, 5)).transpose(2, 0, 1),
    "large": lambda r: r.standard_normal((257, 1031)) * 3.0,       # above the size where real blocks begin
}


@pytest.fixture(params=ROWS)
def x(request):
    return ROWS[request.param](np.random.default_rng(0))


def like(x: np.ndarray, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(x.shape)


@pytest.mark.parametrize("name", ["gelu", "gelu_tanh", "silu"])
@pytest.mark.parametrize("slope", [True, False])
def test_activations(name, slope, x, threads):
    agree(name, 3.0 * x, exactly=(slope,))


@pytest.mark.parametrize("name", ["gelu", "gelu_tanh", "silu"])
def test_activations_far_out(name, threads):
    agree(name, np.array([-1e4, -3e3, -90.0, -12.0, -5.6, -0.0, 0.0, 5.6, 12.0, 90.0, 3e3, 1e4]), exactly=(True,))


def test_activations_of_a_number(threads):
    for name in ("gelu", "gelu_tanh", "silu"):
        agree(name, np.array(0.7), exactly=(True,))


@pytest.mark.parametrize("name", ["gelu", "gelu_tanh", "silu"])
@pytest.mark.parametrize("biases", [True, False])
@pytest.mark.parametrize("rows", [1, 33, 70])
def test_feed_forward(rows, biases, name, threads):
    """A few rows go through one product after the other, more of them in blocks through all."""
    r = np.random.default_rng(0)
    x, W1, W2, dy = (r.standard_normal(shape) for shape in ((rows, 5), (9, 5), (4, 9), (rows, 4)))
    b1, b2 = (r.standard_normal(9), r.standard_normal(4)) if biases else (None, None)
    for slope, hidden in ((False, False), (True, False), (True, True)):
        agree("feed_forward", x, W1, b1, W2, b2, exactly=(name, slope, hidden))
    agree("feed_forward_grad", dy, r.standard_normal((rows, 9)), W1, W2, exactly=(False,))
    agree("feed_forward_grad", dy, r.standard_normal((rows, 9)), W1, W2, exactly=(True,))


def test_swiglu(x, threads):
    agree("swiglu", 2.0 * x, like(x), exactly=(True,))
    agree("swiglu", 2.0 * x, like(x), exactly=(False,))


def test_softmax_and_logsumexp(x, threads):
    agree("softmax", 10.0 * x)
    agree("logsumexp", 10.0 * x)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("shape", [(1, 1), (5, 3), (7, 1), (0, 4), (263, 1031)])
def test_cross_entropy(smoothing, shape, threads):
    r = np.random.default_rng(0)
    logits, targets = 4.0 * r.standard_normal(shape), r.integers(0, shape[1], shape[0])
    targets[::3] = -100                                            # ignored: counts as class 0 with weight 0
    weights = r.standard_normal(shape[0])
    agree("cross_entropy", logits, targets, smoothing)
    lse = GENERIC.logsumexp(logits.astype("float32").astype("float64"))
    agree("cross_entropy_grad", logits, lse, targets, weights, smoothing)


@pytest.mark.parametrize("gradient", [False, True])
def test_linear_cross_entropy(gradient, threads, monkeypatch):
    r = np.random.default_rng(0)
    for n, D, V, block in ((1, 1, 1, 1), (7, 5, 4, 8), (40, 3, 11, 50), (9, 3, 200, 20)):
        monkeypatch.setattr(numpy_fast, "LOGITS", block)
        agree("linear_cross_entropy", r.standard_normal((n, D)), r.standard_normal((V, D)), r.integers(-1, V, n),
              r.standard_normal(n), exactly=(0.1, gradient))


def test_add(x, threads):
    agree("add", x, like(x))
    agree("add", x, like(x)[..., :1])                              # broadcast
    agree("add", x, exactly=(2.0,))


def test_norms(x, threads):
    r = np.random.default_rng(2)
    w, b, dy = r.standard_normal(x.shape[-1]), r.standard_normal(x.shape[-1]), like(x)
    agree("layer_norm", x, w, b, 1e-2)
    agree("rms_norm", x, w, 1e-2)
    _, centred, rho = GENERIC.layer_norm(x, w, b, 1e-2)
    agree("layer_norm_grad", dy, centred, rho, w)
    agree("rms_norm_grad", dy, x, GENERIC.rms_norm(x, w, 1e-2)[1], w)


@pytest.mark.parametrize("shape", [(1, 1, 1, 2), (2, 3, 5, 4), (3, 2, 1, 6), (0, 2, 3, 4), (2, 4, 65, 256)])
def test_rotary(shape, threads):
    r = np.random.default_rng(0)
    B, H, T, hd = shape
    angles = r.standard_normal((T, hd // 2))
    agree("rotary", r.standard_normal(shape), np.cos(angles), np.sin(angles))
    agree("rotary", r.standard_normal((B, T, H, hd)).transpose(0, 2, 1, 3), np.cos(angles), np.sin(angles))


# Products


@pytest.mark.parametrize("ta", [False, True])
@pytest.mark.parametrize("tb", [False, True])
@pytest.mark.parametrize("leads", [((), ()), ((3,), (3,)), ((2, 3), (2, 3)), ((2, 3), ()), ((0,), ()), ((2, 1), (1, 3))])
def test_matmul(ta, tb, leads, threads):
    (lead_a, lead_b), r = leads, np.random.default_rng(0)
    for n, k, m in ((4, 3, 5), (1, 1, 1), (2, 1, 3), (1, 4, 2), (3, 0, 2)):
        a = r.standard_normal((*lead_a, *((k, n) if ta else (n, k))))
        b = r.standard_normal((*lead_b, *((m, k) if tb else (k, m))))
        agree("matmul", a, b, exactly=(ta, tb))
        agree("matmul", np.repeat(a, 2, axis=-1)[..., ::2], b, exactly=(ta, tb))                  # no axis contiguous


def test_matmul_of_a_large_product_and_of_a_vector(threads):
    r = np.random.default_rng(0)
    a, b = r.standard_normal((301, 127)), r.standard_normal((127, 90))
    for dtype in ("float64", "float32"):
        want = a.astype(dtype).astype("float64") @ b.astype(dtype).astype("float64")
        got = FAST.matmul(a.astype(dtype), b.astype(dtype))
        np.testing.assert_allclose(got, want, rtol=0, atol=TOLERANCE[dtype] * np.abs(want).max())
    np.testing.assert_allclose(FAST.matmul(a[0], b), a[0] @ b, rtol=1e-12)
    np.testing.assert_allclose(FAST.matmul(a, b[:, 0]), a @ b[:, 0], rtol=1e-12)


@pytest.mark.parametrize("lead", [(), (2,)])
def test_add_products(lead, threads):
    r = np.random.default_rng(0)
    W = r.standard_normal((7, 5))
    terms = [(slice(0, 3), r.standard_normal((*lead, 3, 2)), r.standard_normal((*lead, 2, 5))),
             (slice(2, 7), r.standard_normal((*lead, 5, 1)), r.standard_normal((*lead, 1, 5)))]
    agree("add_products", W, exactly=(terms,), dtypes=("float64",))


# Attention

HEADS = {                                                          # B, H, KV, T, S, hd
    "smallest": (1, 1, 1, 1, 1, 1),
    "two queries": (1, 1, 1, 2, 2, 1),
    "odd": (3, 4, 4, 7, 7, 5),
    "grouped": (2, 6, 2, 5, 5, 3),
    "one key head": (2, 3, 1, 4, 4, 2),
    "behind a cache": (2, 4, 2, 3, 10, 4),
    "one query behind a cache": (2, 4, 2, 1, 10, 4),
    "fewer keys": (2, 2, 2, 6, 4, 3),
    "chunks": (2, 2, 1, 150, 150, 8),
    "blocks": (5, 4, 4, 130, 130, 8),
}


def heads(shape, contiguous=True, size=1.0, seed=0):
    """q, k, v and the cotangent of o, as the model has them: views (B, H, T, hd) of arrays (B, T, H, hd)."""
    B, H, KV, T, S, hd = shape
    r = np.random.default_rng(seed)
    q, do = (r.standard_normal((B, T, H, hd)).transpose(0, 2, 1, 3) for _ in range(2))
    k, v = (r.standard_normal((B, S, KV, hd)).transpose(0, 2, 1, 3) for _ in range(2))
    q, k, v, do = (np.ascontiguousarray(a) if contiguous else a for a in (size * q, k, v, do))
    return q, k, v, do


def attention_agrees(q, k, v, do, causal, key_mask, scale=0.4):
    """o, and the gradients from what each side keeps for itself: log Σ exp may differ where a query sees no key."""
    for dtype in ("float64", "float32"):
        arrays = [a.astype(dtype, order="K") for a in (q, k, v, do)]
        exact = [a.astype("float64") for a in arrays]
        results = []
        for kernels, (q_, k_, v_, do_) in ((FAST, arrays), (GENERIC, exact)):
            o, lse = kernels.attention(q_, k_, v_, causal, key_mask, scale)
            results.append((o, *kernels.attention_grad(do_, q_, k_, v_, o, lse, causal, key_mask, scale)))
        rounding = 2e-12 if dtype == "float64" else 4e-6
        for g, w in zip(*results):
            assert g.shape == w.shape and g.dtype == dtype
            np.testing.assert_allclose(g, w, rtol=0, atol=rounding * max(1.0, np.abs(w).max(initial=0.0)))
        for a, b in zip(arrays, (q, k, v, do)):
            np.testing.assert_array_equal(a, b.astype(dtype))      # the inputs are left alone


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("contiguous", [False, True])
@pytest.mark.parametrize("name", HEADS)
def test_attention(name, causal, contiguous, threads):
    attention_agrees(*heads(HEADS[name], contiguous), causal, None)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", HEADS)
def test_attention_with_padding(name, causal, threads):
    """Some keys are hidden; where the first ones are, some causal queries see no key at all, and get o = 0."""
    q, k, v, do = heads(HEADS[name])
    mask = (np.random.default_rng(3).random((q.shape[0], k.shape[2])) < 0.6).astype(np.int64)
    attention_agrees(q, k, v, do, causal, mask)
    if causal and q.shape[2] == k.shape[2]:
        mask[0, 0] = 0
        o = FAST.attention(q, k, v, True, mask, 0.4)[0]
        assert not o[0, :, 0].any() and np.isfinite(o).all()


@pytest.mark.parametrize("causal", [False, True])
def test_attention_with_large_scores(causal, threads):
    """Scores far beyond what exp can take: the row maximum has to be subtracted. (Far below: a row would vanish.)"""
    for size in (30.0, 3000.0):
        q, k, v, _ = heads((2, 4, 2, 9, 9, 5), size=size)
        want = GENERIC.attention(q, k, v, causal, None, 1.0)[0]
        np.testing.assert_allclose(FAST.attention(q, k, v, causal, None, 1.0)[0], want, rtol=1e-12, atol=1e-12)
    q, k, v, _ = heads((2, 4, 2, 9, 9, 5))
    q[..., 0], k[..., 0] = -1.0, 200.0                             # every score is about -200
    want = GENERIC.attention(q, k, v, causal, None, 1.0)[0]
    for dtype, tolerance in (("float64", 1e-12), ("float32", 1e-4)):
        got = FAST.attention(*(a.astype(dtype) for a in (q, k, v)), causal, None, 1.0)[0]
        np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance)


def test_attention_passes_nan_on(threads):
    q, k, v, _ = heads((1, 1, 1, 4, 4, 2))
    q[0, 0, 2, 0] = np.nan
    o = FAST.attention(q, k, v, False, None, 1.0)[0]
    assert np.isnan(o[0, 0, 2]).all() and np.isfinite(o[0, 0, [0, 1, 3]]).all()


def test_attention_without_any_batch():
    q, k, v, do = heads((0, 4, 2, 3, 3, 2))
    o, lse = FAST.attention(q, k, v, True, None, 1.0)
    assert o.shape == q.shape
    assert [a.shape for a in FAST.attention_grad(do, q, k, v, o, lse, True, None, 1.0)] == [q.shape, k.shape, v.shape]


def test_results_of_attention_lie_as_the_projections_want_them():
    """In memory as (B, T, H, hd), so that joining the heads of a position copies nothing."""
    q, k, v, do = heads((2, 4, 2, 40, 40, 4))
    o, lse = FAST.attention(q, k, v, True, None, 0.5)
    assert o.transpose(0, 2, 1, 3).flags.c_contiguous
    for a in FAST.attention_grad(do, q, k, v, o, lse, True, None, 0.5):
        B, H, T, hd = a.shape
        assert np.shares_memory(a.transpose(0, 2, 1, 3).reshape(B, T, H * hd), a)


# Tables and optimisers


@pytest.mark.parametrize("shape, V", [((7,), 3), ((2, 5), 9), ((1,), 1), ((0,), 4), ((2, 0), 4), ((900,), 50)])
def test_embedding_grad(shape, V):
    r = np.random.default_rng(0)
    agree("embedding_grad", r.integers(0, V, shape), r.standard_normal((*shape, 6)), V)
    agree("embedding_grad", np.full(shape, V - 1), r.standard_normal((*shape, 12))[..., ::2], V)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("kind", ["vector", "matrix", "view", "number", "rates", "large", "empty"])
def test_adamw(kind, weight_decay, dtype, threads):
    r = np.random.default_rng(0)
    shape = {"vector": (7,), "number": (), "large": (300_001,), "empty": (0,)}.get(kind, (3, 4, 5))
    lr = r.uniform(1e-3, 1e-2, (3, 1, 1)) if kind == "rates" else 3e-3
    start = [r.standard_normal(shape) for _ in range(3)] + [r.uniform(0.1, 1.0, shape)]
    start = [np.asarray(a, dtype) for a in start]                  # p, g, m, v
    want = [a.astype("float64") for a in start]
    if kind == "view":
        buffers = [np.zeros((3, 5, 8), dtype) for _ in start]
        got = [b.transpose(0, 2, 1)[:, ::2] for b in buffers]
        for a, s in zip(got, start):
            a[...] = s
    else:
        got = [a.copy() for a in start]
    for step in (1, 2, 7):
        FAST.adamw(*got, lr, (0.9, 0.99), 1e-8, weight_decay, step)
        GENERIC.adamw(*want, lr, (0.9, 0.99), 1e-8, weight_decay, step)
    for g, w in zip(got, want):
        np.testing.assert_allclose(g, w, rtol=10 * TOLERANCE[dtype], atol=10 * TOLERANCE[dtype])
    assert kind == "empty" or not np.array_equal(got[0], start[0])
    np.testing.assert_array_equal(got[1], start[1])                # the gradient is left alone


# Complex numbers, for the complex step of the gradient checker


def test_complex_numbers(threads):
    r = np.random.default_rng(0)
    z = r.standard_normal((5, 6)) + 1e-3j * r.standard_normal((5, 6))
    w = r.standard_normal(6)
    q, k, v = (r.standard_normal((2, 2, 4, 3)) + 1e-3j * r.standard_normal((2, 2, 4, 3)) for _ in range(3))
    for name, args in {"gelu_tanh": (z, True), "silu": (z, True), "swiglu": (z, z + 1.0, True), "softmax": (z,),
                       "logsumexp": (z,), "layer_norm": (z, w, w, 1e-5), "rms_norm": (z, w, 1e-5), "matmul": (z, z.T),
                       "rotary": (q[..., :2], w[:4, None], w[1:5, None]), "attention": (q, k, v, True, None, 0.5)}.items():
        for g, want in zip(outputs(getattr(FAST, name)(*args)), outputs(getattr(GENERIC, name)(*args))):
            np.testing.assert_allclose(g, want, rtol=1e-12, atol=1e-14)


# The threads


def test_every_block_once_and_in_several_threads(three):
    done, seen = [], set()
    meet = threading.Barrier(3, timeout=30)                        # passes only when three threads are at work together

    def fn(block):
        if block < 3:
            meet.wait()
        seen.add(threading.get_ident())
        done.append(block)

    parallel.for_blocks(fn, range(50))
    assert sorted(done) == list(range(50)) and len(seen) == 3


@pytest.mark.parametrize("outer_blocks", [1, 5])
def test_blocks_within_a_block_run_in_the_same_thread(outer_blocks, three):
    pairs = []

    def outer(i):
        me = threading.get_ident()

        def inner(j):
            pairs.append((i, j, threading.get_ident() == me))
            threading.Event().wait(0.002)                          # time for an idle helper to take the next one

        parallel.for_blocks(inner, range(4))

    parallel.for_blocks(outer, range(outer_blocks))
    assert sorted(pairs) == [(i, j, True) for i in range(outer_blocks) for j in range(4)]


def test_one_worker_keeps_blocks_and_shards_in_the_callers_thread(three):
    seen = set()

    def fn(block):
        seen.add(threading.get_ident())
        threading.Event().wait(0.002)                              # time for an idle helper to take the next one

    with pytest.raises(ZeroDivisionError), parallel.one_worker():
        parallel.for_blocks(fn, range(20))
        assert FAST.shards(8, 1 << 20) == [slice(0, 8)] and set(blas_threads()) == {1}
        raise ZeroDivisionError
    assert seen == {threading.get_ident()} and not parallel.working()
    parallel.for_blocks(fn, range(20))
    assert len(seen) == 3


@pytest.mark.parametrize("bad", [0, 1, 40])
def test_an_exception_in_a_block_comes_out_and_stops_the_rest(bad, three):
    done = []

    def fn(block):
        if block == bad:
            raise KeyError(f"block {block}")
        done.append(block)
        threading.Event().wait(0.001)

    with pytest.raises(KeyError, match=f"block {bad}"):
        parallel.for_blocks(fn, range(1000))
    assert len(done) < 999
    done.clear()
    parallel.for_blocks(lambda block: done.append(block), range(9))                # and the next job is well
    assert sorted(done) == list(range(9))


def test_blocks_see_the_callers_errstate(three):
    def fn(block):
        np.divide(np.ones(3), 0.0)

    with np.errstate(divide="ignore"):
        parallel.for_blocks(fn, range(20))
    with np.errstate(divide="raise"), pytest.raises(FloatingPointError):
        parallel.for_blocks(fn, range(20))


def test_calls_from_several_threads_do_not_meet(three):
    r = np.random.default_rng(0)
    inputs = [r.standard_normal((300, 1000)) for _ in range(4)]
    wants, got = [GENERIC.softmax(x) for x in inputs], [None] * 4

    def call(i):
        for _ in range(3):
            got[i] = FAST.softmax(inputs[i])

    callers = [threading.Thread(target=call, args=(i,)) for i in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(60)
    for g, w in zip(got, wants):
        np.testing.assert_allclose(g, w, rtol=1e-12)


def blas_threads() -> list[int]:
    """Of NumPy's BLAS. SciPy brings one of its own, which another test may have loaded, and which nothing here calls."""
    own = {library.filepath for library in parallel._blas()}
    return [library["num_threads"] for library in threadpool_info() if library["filepath"] in own]


@pytest.fixture
def blas_with_two_threads():
    parallel._blas.cache_clear()           # an earlier test may have loaded another BLAS since: SciPy brings its own
    with threadpool_limits(2, user_api="blas"):
        if 2 not in blas_threads():
            pytest.skip("this BLAS cannot be told to use two threads")
        yield blas_threads()


def test_blas_has_one_thread_within_products_and_all_of_them_after(three, blas_with_two_threads):
    within = []
    meet = threading.Barrier(3, timeout=30)

    def fn(block):
        if block < 3:
            meet.wait()
        within.append(blas_threads())

    parallel.for_blocks(fn, range(6), products=True)
    assert all(set(counts) == {1} for counts in within)
    assert blas_threads() == blas_with_two_threads
    with pytest.raises(ZeroDivisionError):
        parallel.for_blocks(lambda block: 1 // 0, range(6), products=True)
    assert blas_threads() == blas_with_two_threads


def test_overlapping_calls_restore_blas(blas_with_two_threads):
    first, second = parallel.one_blas_thread(), parallel.one_blas_thread()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)                               # the first to come is the first to go
    assert set(blas_threads()) == {1}
    second.__exit__(None, None, None)
    assert blas_threads() == blas_with_two_threads


def test_scratch_is_each_threads_own_and_grows():
    mine = parallel.scratch(np.float32, (3, 5), (2,), ())
    assert [a.shape for a in mine] == [(3, 5), (2,), ()] and all(a.dtype == np.float32 for a in mine)
    assert not np.shares_memory(mine[0], mine[1])
    theirs = []
    thread = threading.Thread(target=lambda: theirs.extend(parallel.scratch(np.float32, (3, 5), (2,), ())))
    thread.start()
    thread.join()
    assert not any(np.shares_memory(a, b) for a in mine for b in theirs)
    large, = parallel.scratch(np.float64, (1000,))
    large[...] = 1.0
    assert large.shape == (1000,) and large.dtype == np.float64


def test_no_result_is_scratch(threads):
    """What a primitive returned stays as it is when the primitive runs again on other numbers."""
    r = np.random.default_rng(0)
    x, other, w = r.standard_normal((60, 30)), r.standard_normal((60, 30)), r.standard_normal(30)
    q = r.standard_normal((2, 4, 6, 5))
    for name, make in {"softmax": lambda x: (x,), "logsumexp": lambda x: (x,), "gelu_tanh": lambda x: (x, True),
                       "swiglu": lambda x: (x, x, True), "layer_norm": lambda x: (x, w, w, 1e-5),
                       "rms_norm": lambda x: (x, w, 1e-5), "matmul": lambda x: (x, x.T),
                       "attention": lambda x: (q * x[0, 0], q, q, True, None, 0.5)}.items():
        first = outputs(getattr(FAST, name)(*make(x)))
        copies = [a.copy() for a in first]
        getattr(FAST, name)(*make(other))
        for a, c in zip(first, copies):
            np.testing.assert_array_equal(a, c)


@pytest.mark.parametrize("value, want", [("1", 1), ("1,2", 1), ("nonsense", None), ("0", 1), ("100000", None), ("", None)])
def test_number_of_workers(value, want, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", value)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    assert parallel.workers.__wrapped__() == (joblib.cpu_count() if want is None else want) <= cores
    monkeypatch.setattr(joblib, "cpu_count", lambda: 1)            # as in a container that may use one core
    assert parallel.workers.__wrapped__() == 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_a_forked_process_makes_its_own_threads():
    code = """
import os, sys, warnings
import numpy as np
from minilora.backend import parallel
from minilora.backend.numpy_fast import NumpyKernels
warnings.simplefilter("ignore")           # newer Pythons warn of every fork where there are threads
parallel.workers = lambda: 2
x = np.random.default_rng(0).standard_normal((2000, 300))
want = NumpyKernels(np).softmax(x)
pid = os.fork()
if pid == 0:
    same = np.array_equal(NumpyKernels(np).softmax(x), want)
    os._exit(0 if same and [thread.is_alive() for thread in parallel._helpers()._threads] == [True] else 1)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0


def test_spans_cover_and_are_even(monkeypatch):
    monkeypatch.setattr(parallel, "workers", lambda: 2)
    for n in range(40):
        for size in (0, 1, 2, 3, 7, 100):
            spans = parallel.spans(n, size)
            assert [i for s in spans for i in range(s.start, s.stop)] == list(range(n))
            assert all(0 < s.stop - s.start <= max(1, size) for s in spans)
            assert len(spans) <= -(-n // max(1, size)) + 1
            assert len(spans) < 2 or max(s.stop - s.start for s in spans) == spans[0].stop - spans[0].start
    assert len(parallel.spans(100, 40)) == 4 and len(parallel.spans(100, 100)) == 1
