"""The GPU kernels equal the readable primitives of generic.py, and their CUDA source compiles, on a machine without a GPU.

Their source is compiled by g++ and runs on the arrays of the stand-in device, threads of a block taking turns in both orders
(host_cuda.py). So everything but CuPy's launch itself is what a GPU gets. With a GPU the same tests run on CuPy too.
"""

from __future__ import annotations

import ctypes
import importlib.util
import math
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import fake_device
import host_cuda
import numpy as np
import pytest
from conftest import why_no_gpu

from minilora.backend import get_device, kernels, to_device, to_host
from minilora.backend.cupy_driver import CupyDriver
from minilora.backend.cupy_kernels import CupyKernels, strided, threads_for
from minilora.backend.cupy_sources import source
from minilora.backend.generic import Kernels

GENERIC = Kernels(np)
TOLERANCE = {"float64": 1e-13, "float32": 2e-6}                    # of the largest number in the array
DTYPES = list(TOLERANCE)
needs_compiler = pytest.mark.skipif(host_cuda.COMPILER is None, reason="needs g++ to run the kernels on the CPU")


@pytest.fixture(params=["forwards", "backwards", pytest.param("cupy", marks=pytest.mark.cupy)])
def gpu(request):
    """(the kernels of a GPU, the name of the device of their arrays): on the stand-in, in both orders of threads, or real."""
    if request.param == "cupy":
        if reason := why_no_gpu():
            pytest.skip(reason)
        return get_device("gpu").kernels, "gpu"
    if host_cuda.COMPILER is None:
        pytest.skip("needs g++ to run the kernels on the CPU")
    return CupyKernels(fake_device.xp, host_cuda.HostDriver(backwards=request.param == "backwards")), "fake"


def launches(own: CupyKernels) -> list[str]:
    return own.driver.launched if isinstance(own.driver, host_cuda.HostDriver) else []


def agree(gpu, name, *args, exactly=(), n_launches=1, dtypes=DTYPES, tolerance=TOLERANCE):
    """The GPU's primitive equals the generic one in float64. Floats in args are cast; the `exactly` ones go in as they are."""
    own, device = gpu
    for dtype in dtypes:
        hosts = [cast(a, dtype) for a in args]
        wide = [cast(a, "float64") for a in hosts]
        arrays = [upload(a, device) if isinstance(a, np.ndarray) else a for a in hosts]
        launches(own).clear()
        got = getattr(own, name)(*arrays, *exactly)
        with np.errstate(all="ignore"):
            want = getattr(GENERIC, name)(*wide, *exactly)
        got, want = ((r if isinstance(r, tuple) else (r,)) for r in (got, want))
        assert len(got) == len(want)
        for g, w in zip(got, want):
            if w is None:
                assert g is None
                continue
            assert g.shape == w.shape and g.dtype == dtype and g.flags.c_contiguous
            np.testing.assert_allclose(to_host(g), w, rtol=0, atol=tolerance[dtype] * max(1.0, np.abs(w).max(initial=0.0)))
        for a, before in zip(arrays, hosts):
            if isinstance(before, np.ndarray):
                np.testing.assert_array_equal(to_host(a), before)              # the inputs are left alone
        assert device == "gpu" or len(launches(own)) == n_launches, launches(own)


def cast(a, dtype):
    """Floats in another dtype, lying in memory as they did."""
    if not isinstance(a, np.ndarray) or a.dtype.kind != "f":
        return a
    if a.flags.c_contiguous or a.flags.f_contiguous:
        return a.astype(dtype, order="K")
    room = np.zeros((*a.shape[:-1], 2 * a.shape[-1]), dtype)
    room[..., ::2] = a
    return room[..., ::2]


def upload(a, device):
    """On the device, lying in memory as on the host: not even columns or rows contiguous, if they are not."""
    if a.flags.c_contiguous:
        return to_device(a.copy(), device)
    if a.flags.f_contiguous:
        return to_device(np.ascontiguousarray(a.T), device).T
    return to_device(np.repeat(a, 2, axis=-1), device)[..., ::2]


ROWS = {
    "one row": (1, 7), "one column": (5, 1), "one number": (1,), "three axes": (3, 1, 11), "a warp": (3, 32),
    "more than a warp": (2, 33), "long rows": (3, 300), "longer than a block": (2, 2100), "no rows": (0, 4),
    "empty leading axis": (3, 0, 4),
}


@pytest.fixture(params=[*ROWS, "transposed", "every other column"])
def x(request):
    r = np.random.default_rng(0)
    if request.param == "transposed":
        return r.standard_normal((4, 3, 5)).T
    if request.param == "every other column":
        return r.standard_normal((6, 10))[:, ::2]
    return r.standard_normal(ROWS[request.param])


def like(x, seed=1):
    return np.random.default_rng(seed).standard_normal(x.shape)


# Rows

def test_softmax_and_logsumexp(gpu, x):
    for name in ("softmax", "logsumexp"):
        agree(gpu, name, 10.0 * x, n_launches=x.size > 0)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("shape", [(1, 1), (5, 3), (7, 1), (3, 301)])
def test_cross_entropy(gpu, smoothing, shape, rng):
    logits, targets = 4.0 * rng.standard_normal(shape), rng.integers(0, shape[1], shape[0])
    targets[::3] = -100                                            # ignored: counts as class 0 with weight 0
    lse = GENERIC.logsumexp(logits)
    for ids in (targets, targets.astype("int32")):
        agree(gpu, "cross_entropy", logits, ids, smoothing)
        agree(gpu, "cross_entropy_grad", logits, lse, ids, rng.standard_normal(shape[0]), smoothing)


def test_norms(gpu, x, rng):
    D, n = x.shape[-1], int(x.size > 0)
    w, b, dy = rng.standard_normal(D), rng.standard_normal(D), like(x)
    x = 3.0 * x + 5.0
    agree(gpu, "layer_norm", x, w, b, exactly=(1e-5,), n_launches=n)
    agree(gpu, "rms_norm", x, w, exactly=(1e-6,), n_launches=n)
    _, c, rho = GENERIC.layer_norm(x, w, b, 1e-5)
    agree(gpu, "layer_norm_grad", dy, c, rho, w, n_launches=n, tolerance={"float64": 1e-12, "float32": 1e-5})
    _, rho = GENERIC.rms_norm(x, w, 1e-6)
    agree(gpu, "rms_norm_grad", dy, x, rho, w, n_launches=n, tolerance={"float64": 1e-12, "float32": 1e-5})


# Elements

@pytest.mark.parametrize("slope", [True, False])
@pytest.mark.parametrize("name", ["gelu", "gelu_tanh", "silu"])
def test_activations(gpu, name, slope, x):
    agree(gpu, name, 3.0 * x, exactly=(slope,), n_launches=x.size > 0)


@pytest.mark.parametrize("name", ["gelu", "gelu_tanh", "silu"])
def test_activations_far_out_and_of_a_number(gpu, name):
    agree(gpu, name, np.array([-1e4, -3e3, -90.0, -12.0, -5.6, -0.0, 0.0, 5.6, 12.0, 90.0, 3e3, 1e4]), exactly=(True,))
    agree(gpu, name, np.array(0.7), exactly=(True,))


@pytest.mark.parametrize("slopes", [True, False])
def test_swiglu(gpu, x, slopes):
    agree(gpu, "swiglu", 2.0 * x, like(x), exactly=(slopes,), n_launches=x.size > 0)


@pytest.mark.parametrize("shape", [(1, 1, 1, 2), (2, 3, 5, 4), (2, 1, 7, 6)])
def test_rotary_reads_heads_as_they_lie(gpu, shape, rng):
    B, H, T, hd = shape
    own, device = gpu
    cos, sin = rng.standard_normal((2, T, hd // 2))
    agree(gpu, "rotary", rng.standard_normal(shape), cos, sin)
    packed = rng.standard_normal((B, T, 3 * H * hd))               # as the heads of k come: a transposed slice of q, k and v
    def heads(a):
        return a[..., H * hd : 2 * H * hd].reshape(B, T, H, hd).transpose(0, 2, 1, 3)
    with fake_device.count() as counts:
        y = own.rotary(heads(to_device(packed, device)), to_device(cos, device), to_device(sin, device))
    assert device == "gpu" or counts.launches <= 1 + (B > 1)       # a copy only where reshape makes one
    np.testing.assert_allclose(to_host(y), GENERIC.rotary(heads(packed), cos, sin), rtol=0, atol=1e-13)


@pytest.mark.parametrize("shape", [(4, 3), (1, 1), (2, 3, 5)])
@pytest.mark.parametrize("dtype", ["int64", "int32"])
def test_embedding_grad_adds_up_repeated_ids(gpu, shape, dtype, rng):
    ids = rng.integers(0, 3, shape).astype(dtype)                  # few ids: many meet
    agree(gpu, "embedding_grad", ids, rng.standard_normal((*shape, 37)), exactly=(6,), n_launches=1)


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("rates", [False, True])
@pytest.mark.parametrize("n", [1, 3, 16, 35])
def test_adamw_takes_many_parameters_in_a_launch(gpu, decay, rates, n, rng):
    own, device = gpu
    shapes = [(3,), (3, 300), (3, 4, 5), (3, 1, 1)]
    shapes = [shapes[i % 4] if rates else [(), (7, 1), *shapes[1:3]][i % 4] for i in range(n)]
    for dtype in DTYPES:
        wide = [[np.asarray(rng.random(shape), dtype).astype("float64") for _ in range(4)] for shape in shapes]
        mine = [[to_device(a.astype(dtype), device) for a in ones] for ones in wide]
        host_lr = rng.random(3).astype(dtype) * 0.1
        lr = to_device(host_lr, device) if rates else 0.01
        wide_lr = host_lr.astype("float64") if rates else 0.01
        for step in (1, 2, 7):
            launches(own).clear()
            own.adamw_all([(*ones, step) for ones in mine], lr, (0.9, 0.99), 1e-8, decay)
            GENERIC.adamw_all([(*ones, step) for ones in wide], wide_lr, (0.9, 0.99), 1e-8, decay)
            assert device == "gpu" or launches(own) == ["adamw"] * math.ceil(n / 16)
        for ones, others in zip(mine, wide):
            for a, b in zip(ones, others):
                assert a.dtype == dtype
                np.testing.assert_allclose(to_host(a), b, rtol=0, atol=TOLERANCE[dtype] * max(1.0, np.abs(b).max()))


def test_adamw_of_what_does_not_go_together(gpu, rng):
    """Different steps and dtypes go apart; a parameter with holes, a float16 one and an empty one are right too."""
    own, device = gpu
    hosts = [rng.random((4, *shape)).astype(f"float{bits}")
             for shape, bits in (((5,), 32), ((5,), 32), ((2, 3), 64), ((2, 6), 32), ((4,), 16), ((0,), 32))]
    mine = [[to_device(a.copy(), device) for a in host] for host in hosts]
    wide = [list(host.astype("float64")) for host in hosts]
    mine[3], wide[3] = ([a[:, ::2] for a in ones[3]] for ones in (mine, wide))
    launches(own).clear()
    for kernels_, ones in ((own, mine), (GENERIC, wide)):
        kernels_.adamw_all([(*arrays, 1 + (i == 1)) for i, arrays in enumerate(ones)], 0.1, (0.9, 0.99), 1e-4, 0.1)
    assert device == "gpu" or launches(own) == ["adamw"] * 3
    for ones, others, tolerance in zip(mine, wide, (1e-6, 1e-6, 1e-13, 1e-6, 1e-2, 0)):
        for a, b in zip(ones, others):
            np.testing.assert_allclose(to_host(a), b, rtol=0, atol=tolerance)


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "silu"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("n", "D", "F"), [(1, 1, 1), (5, 3, 7), (33, 4, 300)])
def test_feed_forward_adds_its_bias_in_the_activation(gpu, activation, bias, n, D, F, rng):
    x, W1, W2 = rng.standard_normal((n, D)), rng.standard_normal((F, D)), rng.standard_normal((D, F))
    b1, b2 = (rng.standard_normal(F), rng.standard_normal(D)) if bias else (None, None)
    agree(gpu, "feed_forward", x, W1, b1, W2, b2, activation, True, True, n_launches=3,
          tolerance={"float64": 1e-13, "float32": 1e-5})
    agree(gpu, "feed_forward", x, W1, b1, W2, b2, activation, False, False, n_launches=3,
          tolerance={"float64": 1e-13, "float32": 1e-5})


# Attention

@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("masked", [None, "int64", "bool", "float32"])
@pytest.mark.parametrize(("H", "KV", "T", "S", "hd"), [(2, 2, 5, 5, 4), (4, 2, 3, 7, 6), (1, 1, 1, 1, 1), (2, 1, 1, 40, 2),
                                                       (3, 3, 33, 70, 5)])
def test_attention(gpu, causal, masked, H, KV, T, S, hd, rng):
    q, o_bar = rng.standard_normal((2, 2, H, T, hd))
    k, v = rng.standard_normal((2, 2, KV, S, hd))
    mask = None
    if masked:
        mask = (rng.random((2, S)) > 0.4).astype(masked)
        mask[0] = 0                                                # this one sees no key at all
    tail = (causal, mask, 0.7)
    own, device = gpu
    exactly = (causal, None if mask is None else to_device(mask, device), 0.7)
    for dtype in DTYPES:
        arrays = [to_device(a.astype(dtype), device) for a in (q, k, v, o_bar)]
        launches(own).clear()
        o, lse = own.attention(*arrays[:3], *exactly)
        want_o, want_lse = GENERIC.attention(q, k, v, *tail)
        tolerance = 100 * TOLERANCE[dtype]
        seen = want_lse > -1e29
        np.testing.assert_allclose(to_host(o), want_o, rtol=0, atol=tolerance)
        np.testing.assert_allclose(to_host(lse)[seen], want_lse[seen], rtol=0, atol=tolerance)
        assert (to_host(lse)[~seen] < -1e29).all() and (to_host(o)[~seen] == 0).all()
        found = own.attention_grad(arrays[3], *arrays[:3], o, lse, *exactly)
        for got, want in zip(found, GENERIC.attention_grad(o_bar, q, k, v, want_o, want_lse, *tail)):
            assert got.shape == want.shape and got.dtype == dtype
            np.testing.assert_allclose(to_host(got), want, rtol=0, atol=tolerance)
        assert device == "gpu" or launches(own) == ["gemm", "attention_softmax", "gemm", "gemm", "gemm",
                                                    "attention_softmax_grad", "gemm", "gemm", "gemm", "heads"]


@pytest.mark.parametrize("views", [(), (0,), (1, 2), (0, 1, 2, 3)])
def test_heads_are_copied_in_one_launch(gpu, views, rng):
    """q, k, v and ō as the model has them: transposed slices of (B, T, …), of which some lie by rows already."""
    own, device = gpu
    B, T, hd = 2, 5, 3
    for dtype in DTYPES:
        hosts = [rng.standard_normal((B, T, 3 * H * hd)).astype(dtype) for H in (4, 2, 2, 4)]
        arrays = []
        for i, host in enumerate(hosts):
            x = to_device(host, device).reshape(B, T, -1, hd).transpose(0, 2, 1, 3)[:, 1 : 5 if i in (0, 3) else 3]
            arrays.append(x if i in views else own.xp.ascontiguousarray(x))
        launches(own).clear()
        found = own._whole_heads(*arrays)
        assert device == "gpu" or launches(own) == ["heads"] * bool(views)
        beside = own._copied_heads(arrays, side_by_side=True)
        for x, y, z in zip(arrays, found, beside):
            np.testing.assert_array_equal(to_host(y), to_host(x))
            np.testing.assert_array_equal(to_host(z), to_host(x))
            assert y.flags.c_contiguous and z.transpose(0, 2, 1, 3).flags.c_contiguous


# NaN and infinity come out where they come out of the generic primitives

ODD = [np.nan, np.inf, -np.inf]


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("place", [0, 3, 40])
def test_odd_numbers_spread_as_in_the_generic_version(gpu, odd, place, rng):
    own, device = gpu
    x = rng.standard_normal((3, 50))
    x[1, place] = odd
    w, b, dy = rng.standard_normal(50), rng.standard_normal(50), rng.standard_normal(x.shape)
    targets = np.array([1, place, 2])
    cases = {"softmax": (x,), "logsumexp": (x,), "cross_entropy": (x, targets, 0.1), "layer_norm": (x, w, b, 1e-5),
             "rms_norm": (x, w, 1e-5), "gelu": (x, True), "gelu_tanh": (x, True), "silu": (x, True), "swiglu": (x, dy, True),
             "layer_norm_grad": (x, dy, np.ones((3, 1)), w), "rms_norm_grad": (x, dy, np.ones((3, 1)), w),
             "cross_entropy_grad": (x, np.ones(3), targets, np.ones(3), 0.0)}
    for name, args in cases.items():
        got = getattr(own, name)(*(to_device(a, device) if isinstance(a, np.ndarray) else a for a in args))
        with np.errstate(all="ignore"):
            want = getattr(GENERIC, name)(*args)
        for g, w_ in zip(got if isinstance(got, tuple) else (got,), want if isinstance(want, tuple) else (want,)):
            np.testing.assert_allclose(to_host(g), w_, rtol=1e-12, atol=1e-12, err_msg=name)


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("where", ["seen", "hidden by causality", "hidden by the mask"])
def test_odd_scores(gpu, odd, where, rng):
    own, device = gpu
    q, k, v, do = rng.standard_normal((4, 1, 1, 4, 2))
    k[0, 0, {"seen": 0, "hidden by causality": 3, "hidden by the mask": 1}[where], 0] = odd
    mask = np.array([[1, 0, 1, 1]])
    arrays = [to_device(a, device) for a in (q, k, v, do)]
    o, lse = own.attention(*arrays[:3], True, to_device(mask, device), 1.0)
    with np.errstate(all="ignore"):
        want, want_lse = GENERIC.attention(q, k, v, True, mask, 1.0)
        grads = GENERIC.attention_grad(do, q, k, v, want, want_lse, True, mask, 1.0)
    np.testing.assert_allclose(to_host(o), want, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(to_host(lse), want_lse, rtol=1e-12, atol=1e-12)
    for got, expected in zip(own.attention_grad(arrays[3], *arrays[:3], o, lse, True, to_device(mask, device), 1.0), grads):
        np.testing.assert_allclose(to_host(got), expected, rtol=1e-12, atol=1e-12)


# Products

def operands(rng, lead, n, m, layout):
    """A matrix (..., n, m) that lies in memory as `layout` says."""
    if layout == "columns":
        return rng.standard_normal((*lead, m, n)).swapaxes(-1, -2)
    if layout == "slice of columns":
        return rng.standard_normal((*lead, n, 3 * m))[..., m : 2 * m]
    if layout == "slice of rows":
        return rng.standard_normal((*lead, 2 * n, m))[..., n:, :]
    if layout == "slice of a transpose":
        return rng.standard_normal((*lead, m, 3 * n)).swapaxes(-1, -2)[..., n : 2 * n, :]
    if layout == "heads":
        return rng.standard_normal((*lead[:1], n, *lead[1:], m)).transpose(0, 2, 1, 3) if len(lead) == 2 else operands(
            rng, lead, n, m, "rows")
    if layout == "every other column":
        return rng.standard_normal((*lead, n, 2 * m))[..., ::2]
    return rng.standard_normal((*lead, n, m))


LAYOUTS = ["rows", "columns", "slice of columns", "slice of rows", "slice of a transpose", "heads", "every other column"]


@needs_compiler
@pytest.mark.parametrize("lead", [(), (3,), (2, 3), (1, 2), (2, 1), (1,)])
@pytest.mark.parametrize("layout_b", LAYOUTS)
@pytest.mark.parametrize("layout_a", LAYOUTS)
def test_products_of_all_layouts(layout_a, layout_b, lead, rng):
    driver = host_cuda.HostDriver()
    own = CupyKernels(np, driver)
    for n, k, m in ((4, 5, 6), (1, 5, 6), (4, 1, 6), (4, 5, 1), (1, 1, 1)):
        for ta, tb in ((False, False), (True, False), (False, True), (True, True)):
            a = operands(rng, lead, *((k, n) if ta else (n, k)), layout_a)
            b = operands(rng, lead, *((m, k) if tb else (k, m)), layout_b)
            got, want = own.matmul(a, b, ta, tb), GENERIC.matmul(a, b, ta, tb)
            assert got.shape == want.shape
            np.testing.assert_allclose(got, want, rtol=1e-13, atol=1e-13)
    assert driver.launched.count("gemm") == len(driver.launched) == 20


@pytest.mark.parametrize("layout", LAYOUTS)
def test_which_layouts_are_read_as_they_lie(layout, rng):
    copied = {"every other column": [(), (3,), (2, 3)], "slice of columns": [], "heads": [(2, 3)], "slice of rows": []}
    for lead in ((), (3,), (2, 3)):
        a = operands(rng, lead, 4, 5, layout)
        assert (strided(a) is None) == (lead in copied.get(layout, [])), lead
    assert strided(np.broadcast_to(rng.standard_normal((4, 1)), (4, 5))) is None
    assert strided(rng.standard_normal((3, 4, 5))[::-1]) is None and strided(rng.standard_normal((4, 5))[::-1]) is None
    assert strided(np.broadcast_to(rng.standard_normal((4, 5)), (3, 4, 5))) == (False, 5, 0)


def test_products_that_do_not_fit_say_so(gpu):
    own, device = gpu
    a = to_device(np.zeros((2, 3)), device)
    with pytest.raises(ValueError, match=r"shapes \(2, 3\) and \(2, 3\).*3 and 2 should be equal"):
        own.matmul(a, a)


def test_other_products_take_the_generic_way(gpu, rng):
    own, device = gpu
    for a, b in ((rng.standard_normal((3, 2, 4)), rng.standard_normal((4, 5))), (np.zeros((2, 0)), np.zeros((0, 3))),
                 (rng.standard_normal((2, 3)) + 1j, rng.standard_normal((3, 2)) + 1j)):
        np.testing.assert_allclose(to_host(own.matmul(to_device(a, device), to_device(b, device))), a @ b, rtol=1e-12)


@pytest.mark.parametrize("name", ["softmax", "logsumexp"])
def test_other_dtypes_take_the_generic_way(gpu, name, rng):
    own, device = gpu
    x = rng.standard_normal((3, 5)).astype("float16")
    launches(own).clear()
    got = getattr(own, name)(to_device(x, device))
    assert got.dtype == "float16" and not launches(own)
    np.testing.assert_allclose(to_host(got), getattr(GENERIC, name)(x), rtol=0, atol=4e-3)   # two float16 ulps between 2 and 4


def test_threads():
    assert [threads_for(n) for n in (1, 128, 129, 1024, 2048, 2049, 1 << 20)] == [32, 32, 64, 256, 512, 512, 512]


# Every override has its generic twin, and the tests see what a wrong kernel does

def test_each_kernel_is_launched_by_a_primitive_of_its_name():
    names = set(host_cuda.kernel_names(source("float32")))
    primitives = {name for name in vars(CupyKernels) if not name.startswith("_")}
    assert primitives <= set(vars(Kernels))
    composed = {"matmul", "feed_forward", "adamw_all", "attention", "attention_grad"}      # of products and the kernels below
    assert names - {"adamw", "heads", "attention_softmax", "attention_softmax_grad"} == primitives - composed


BUGS = {
    "no barrier after the parts are written": ("parts[threadIdx.x / 32] = x;\n    __syncthreads();",
                                               "parts[threadIdx.x / 32] = x;"),
    "some threads leave before the others wait": ("*top = m = block_larger(m);",
                                                  "*top = m; if (threadIdx.x < 32) return m; *top = m = block_larger(m);"),
    "only the first warp counts": ("lane < warps ? parts[lane] : T(0)", "parts[0]"),
    "a row too far": ("x += blockIdx.x * V, y += blockIdx.x * V;", "x += V, y += blockIdx.x * V;"),
    "the tail of a row is left out": ("j += blockDim.x)", "j += n)"),
}


@needs_compiler
@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_seen(bug, rng):
    x, seen = rng.standard_normal((3, 300)), 0
    for backwards in (False, True):
        try:
            y = CupyKernels(np, host_cuda.HostDriver(BUGS[bug], backwards)).softmax(x)
            seen += not np.allclose(y, GENERIC.softmax(x), rtol=1e-6)
        except AssertionError as error:
            assert "barrier" in str(error)
            seen += 1
    assert seen


# Real compilers

def nvrtc():
    """The library of NVIDIA's runtime compiler, from its wheel or the system; None if there is none."""
    spec = importlib.util.find_spec("nvidia")
    places = [Path(p) for p in (spec.submodule_search_locations or [])] if spec else []
    found = [str(f) for place in places for f in sorted(place.glob("*/lib/libnvrtc.so.*"))]
    for name in [*found, "libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so"]:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    return None


NVRTC = nvrtc()


def compiled_by_nvrtc(text: str, arch: str) -> str:
    """The PTX of a source; AssertionError with the compiler's log if it has an error or a warning."""
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    assert NVRTC.nvrtcCreateProgram(ctypes.byref(program), text.encode(), b"kernels.cu", 0, None, None) == 0
    options = [f"--gpu-architecture={arch}".encode(), b"-std=c++17"]
    failed = NVRTC.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options))
    NVRTC.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    NVRTC.nvrtcGetProgramLog(program, log)
    assert not failed and not log.value.strip(), log.value.decode()
    NVRTC.nvrtcGetPTXSize(program, ctypes.byref(size))
    ptx = ctypes.create_string_buffer(size.value)
    NVRTC.nvrtcGetPTX(program, ptx)
    NVRTC.nvrtcDestroyProgram(ctypes.byref(program))
    return ptx.value.decode()


@pytest.mark.skipif(NVRTC is None, reason="needs NVRTC: pip install nvidia-cuda-nvrtc-cu12")
@pytest.mark.parametrize("arch", ["compute_75", "compute_80", "compute_90"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nvrtc_compiles_the_source(dtype, arch):
    ptx = compiled_by_nvrtc(source(dtype), arch)
    for name in host_cuda.kernel_names(source(dtype)):
        assert f".entry {name}(" in ptx
    if dtype == "float32":                                         # float stays float: only arguments come as double
        for heavy in ("sqrt.rn.f64", "fma.rn.f64", "div.rn.f64", "mul.f64", "add.f64"):
            assert heavy not in ptx, heavy


@pytest.mark.skipif(NVRTC is None, reason="needs NVRTC: pip install nvidia-cuda-nvrtc-cu12")
def test_nvrtc_refuses_a_wrong_source():
    with pytest.raises(AssertionError, match="undefined"):
        compiled_by_nvrtc(source("float32") + 'extern "C" __global__ void wrong(T* x) { x[0] = nothing; }', "compute_80")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
@pytest.mark.parametrize("dtype", DTYPES)
def test_nvcc_compiles_the_source(dtype, tmp_path):
    """Down to machine code, for each generation of GPUs."""
    (tmp_path / "k.cu").write_text(source(dtype))
    archs = [f"-gencode=arch=compute_{n},code=sm_{n}" for n in (75, 80, 90)]
    run = subprocess.run(["nvcc", "-std=c++17", "-fatbin", *archs, "-o", "k.fatbin", "k.cu"], cwd=tmp_path,
                         capture_output=True, text=True)
    assert run.returncode == 0 and not run.stderr.strip(), run.stderr


# CuPy's driver, before a CuPy that notes what it is asked

class Noted:
    """Stands for cupy and cublas: launches are noted, and a product reads and writes the memory at its pointers."""

    def __init__(self):
        self.launched, self.compiled, self.modes, self.called = [], [], [], []
        self.cuda = SimpleNamespace(device=SimpleNamespace(get_cublas_handle=lambda: 77))

    def RawModule(self, code, options):
        self.compiled.append((code, options))
        return SimpleNamespace(get_function=lambda name: lambda *launch: self.launched.append((name, *launch)))

    def setMathMode(self, handle, mode):
        self.modes.append((handle, mode))

    def __getattr__(self, name):
        if name not in ("sgemm", "dgemm", "sgemmStridedBatched", "dgemmStridedBatched"):
            raise AttributeError(name)
        number = ctypes.c_float if name[0] == "s" else ctypes.c_double

        def gemm(handle, ta, tb, m, n, k, alpha, A, lda, *rest):
            self.called.append(name)
            if name.endswith("Batched"):
                sa, B, ldb, sb, beta, C, ldc, sc, count = rest
            else:
                (B, ldb, beta, C, ldc), sa, sb, sc, count = rest, 0, 0, 0, 1
            assert handle == 77 and number.from_address(alpha).value == 1.0 and number.from_address(beta).value == 0.0

            def entry(base, ld, stride, c, i, j):
                return number.from_address(base + ctypes.sizeof(number) * (c * stride + j * ld + i))
            for c, i, j in np.ndindex(count, m, n):
                of_a = [entry(A, lda, sa, c, *((p, i) if ta else (i, p))).value for p in range(k)]
                of_b = [entry(B, ldb, sb, c, *((j, p) if tb else (p, j))).value for p in range(k)]
                entry(C, ldc, sc, c, i, j).value = np.dot(of_a, of_b)
        return gemm



@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lead", [(), (1,), (3,), (2, 2)])
def test_the_driver_multiplies(dtype, lead, rng):
    noted = Noted()
    driver = CupyDriver(noted, noted)

    class Pointed(CupyDriver):
        def multiply(self, dtype, sizes, a, b, out, tf32):
            def pointed(x):
                return SimpleNamespace(data=SimpleNamespace(ptr=x.ctypes.data))
            driver.multiply(dtype, sizes, (pointed(a[0]), *a[1:]), (pointed(b[0]), *b[1:]), (pointed(out[0]), *out[1:]), tf32)

    own = CupyKernels(np, Pointed(noted, noted))
    for ta, tb in ((False, False), (True, False), (False, True), (True, True)):
        a = rng.standard_normal((*lead, *((3, 2) if ta else (2, 3)))).astype(dtype)
        b = rng.standard_normal((*lead, *((4, 3) if tb else (3, 4)))).astype(dtype)
        np.testing.assert_allclose(own.matmul(a, b, ta, tb), GENERIC.matmul(a, b, ta, tb), rtol=1e-5, atol=1e-6)
    letter = "s" if dtype == "float32" else "d"
    assert set(noted.called) == {f"{letter}gemm" + ("StridedBatched" if math.prod(lead) > 1 else "")}
    assert set(noted.modes) == {(77, 0)}
    own.tf32 = True
    own.matmul(a, b, ta, tb)
    assert noted.modes[-1] == (77, 3)


def test_the_driver_compiles_once_for_each_dtype():
    noted = Noted()
    driver = CupyDriver(noted, noted)
    for dtype in ("float32", "float64", "float32"):
        for name in ("softmax", "gelu"):
            driver.launch(name, np.dtype(dtype), 5, 64, 1, 2.0)
    assert noted.launched == [("softmax", (5,), (64,), (1, 2.0)), ("gelu", (5,), (64,), (1, 2.0))] * 3
    assert noted.compiled == [(source(dtype), ("-std=c++17",)) for dtype in ("float32", "float64")]


@pytest.mark.cupy
def test_a_gpu_has_these_kernels():
    if reason := why_no_gpu():
        pytest.skip(reason)
    assert isinstance(kernels(to_device(np.ones(2), "gpu")), CupyKernels)
