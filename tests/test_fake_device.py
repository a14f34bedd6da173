"""The stand-in for CuPy keeps its promises: each misuse is planted here and must be refused or counted.

Legal code must give what NumPy gives: values, dtypes and shapes.
"""

from __future__ import annotations

import copy
import inspect
import operator
import pickle
import re

import numpy as np
import pytest
from fake_device import NAMES, FakeArray, count, xp
from numpy.testing import assert_array_equal

from minilora.backend import array_module, device_of, get_device, to_device, to_host


def on_fake(array):
    return to_device(array, "fake")


@pytest.fixture
def host(rng):                                                               # (2, 3, 4) float32
    return rng.standard_normal((2, 3, 4)).astype(np.float32)


@pytest.fixture
def x(host):
    return on_fake(host)


# What is refused

def assign(target, key, value):
    target[key] = value


def ints(*values):
    return on_fake(np.array(values))


MISUSE = {
    # Host and device mixed
    "device + host": (TypeError, "numpy.ndarray", lambda x, h: x + h),
    "host + device": (TypeError, "numpy.ndarray", lambda x, h: h + x),
    "host @ device": (TypeError, "numpy.ndarray", lambda x, h: h[0].T @ x[0]),
    "host == device": (TypeError, "numpy.ndarray", lambda x, h: h == x),
    "device += host": (TypeError, "numpy.ndarray", lambda x, h: operator.iadd(x, h)),
    "host += device": (TypeError, "__array_ufunc__", lambda x, h: operator.iadd(h, x)),
    "xp function of host": (TypeError, "numpy.ndarray", lambda x, h: xp.exp(h)),
    "xp function of both": (TypeError, "numpy.ndarray", lambda x, h: xp.concatenate([x, h])),
    "out= on the host": (TypeError, "numpy.ndarray", lambda x, h: xp.exp(x, out=h)),
    "device[...] = host": (TypeError, "numpy.ndarray", lambda x, h: assign(x, 0, h[0])),
    "device[...] = list": (TypeError, "builtins.list", lambda x, h: assign(x, (0, 0), [1.0, 2.0, 3.0, 4.0])),
    "host[...] = device": (TypeError, "implicit conversion", lambda x, h: assign(h, 0, x[0])),
    "device[host indices]": (TypeError, "numpy.ndarray", lambda x, h: x[np.array([0, 1])]),
    "host[device indices]": (TypeError, "implicit conversion", lambda x, h: h[ints(0, 1)]),
    "operand is a list": (TypeError, "builtins.list", lambda x, h: xp.maximum(x, [1.0, 2.0, 3.0, 4.0])),
    "operand is None": (TypeError, "NoneType", lambda x, h: x == None),      # noqa: E711
    # Silent conversion
    "np ufunc of device": (TypeError, "__array_ufunc__", lambda x, h: np.exp(x)),
    "np ufunc of both": (TypeError, "__array_ufunc__", lambda x, h: np.multiply(h, x)),
    "np ufunc out=device": (TypeError, "__array_ufunc__", lambda x, h: np.exp(h, out=x)),
    "np function of device": (TypeError, "numpy.sum got", lambda x, h: np.sum(x)),
    "np.concatenate": (TypeError, "numpy.concatenate got", lambda x, h: np.concatenate([x, x])),
    "np.zeros_like": (TypeError, "numpy.zeros_like got", lambda x, h: np.zeros_like(x)),
    "np.asarray": (TypeError, "implicit conversion", lambda x, h: np.asarray(x)),
    "np.array of a list": (TypeError, "implicit conversion", lambda x, h: np.array([x, x])),
    "np.float32 of 0-d": (TypeError, "implicit conversion", lambda x, h: np.float32(x.sum())),
    "pickle": (TypeError, "to_host", lambda x, h: pickle.dumps(x)),
    "array of strings": (TypeError, "dtype", lambda x, h: xp.asarray(["a"])),
    "array of objects": (TypeError, "object", lambda x, h: x.astype(object)),
    # Names and keywords that CuPy lacks
    "xp.errstate": (AttributeError, "errstate", lambda x, h: xp.errstate),
    "xp.vecdot": (AttributeError, "vecdot", lambda x, h: xp.vecdot),
    "linalg.svdvals": (AttributeError, "svdvals", lambda x, h: xp.linalg.svdvals),
    "x.ctypes": (AttributeError, "ctypes", lambda x, h: x.ctypes),
    "x.resize": (AttributeError, "resize", lambda x, h: x.resize),
    "x.flags.writeable": (AttributeError, "writeable", lambda x, h: x.flags.writeable),
    "ufunc where=": (TypeError, "'where'", lambda x, h: xp.exp(x, where=x > 0)),
    "reduction where=": (TypeError, "'where'", lambda x, h: x.sum(where=x > 0)),
    "reduction initial=": (TypeError, "'initial'", lambda x, h: xp.max(x, initial=0.0)),
    "einsum out=": (TypeError, "'out'", lambda x, h: xp.einsum("bij->b", x, out=x[:, 0, 0])),
    "clip with one bound": (TypeError, "'a_max'", lambda x, h: xp.clip(x, 0.0)),
    "clip min=, max=": (TypeError, "'a_min'", lambda x, h: xp.clip(x, min=0.0, max=1.0)),
    "take mode=": (TypeError, "'mode'", lambda x, h: xp.take(x, ints(0), mode="clip")),
    "take_along_axis without axis": (TypeError, "'axis'", lambda x, h: xp.take_along_axis(x, ints(0)[:, None, None])),
    "svd hermitian=": (TypeError, "'hermitian'", lambda x, h: xp.linalg.svd(x[0], hermitian=True)),
    "zeros device=": (TypeError, "'device'", lambda x, h: xp.zeros(3, "float32", device="cpu")),
    "item with an argument": (TypeError, "item", lambda x, h: x.item(0)),
    "multiply.at": (AttributeError, "multiply", lambda x, h: xp.multiply.at(x, ints(0), 2.0)),
    "add.reduce": (AttributeError, "reduce", lambda x, h: xp.add.reduce(x)),
    # No __index__, no __contains__, no hash
    "range(0-d)": (TypeError, "integer", lambda x, h: range(ints(3)[0])),
    "list[0-d]": (TypeError, "indices", lambda x, h: [1, 2, 3][ints(1)[0]]),
    "slice(0-d)": (TypeError, "__index__", lambda x, h: x[: ints(1)[0]]),
    "zeros(0-d)": (TypeError, "__index__", lambda x, h: xp.zeros(ints(3)[0], "float32")),
    "reshape(0-d, -1)": (TypeError, "__index__", lambda x, h: x.reshape(ints(2)[0], -1)),
    "sum(axis=0-d)": (TypeError, "__index__", lambda x, h: xp.sum(x, axis=ints(0)[0])),
    "in": (TypeError, "container", lambda x, h: 3.0 in x),
    "hash": (TypeError, "unhashable", lambda x, h: {x}),
    # Indices
    "assignment, repeated index": (ValueError, "repeated", lambda x, h: assign(x, ints(1, 1), x[:2])),
    "assignment, repeated pair": (ValueError, "repeated", lambda x, h: assign(x, (ints(0, 1, 0), ints(2, 2, 2)), x[0])),
    "assignment, -1 and the last": (ValueError, "repeated", lambda x, h: assign(x, ints(1, -1), x[:2])),
    "x[i] += y, repeated": (ValueError, "repeated", lambda x, h: operator.setitem(x, ints(0, 0), x[ints(0, 0)] + x)),
    "out of range": (IndexError, "out of bounds", lambda x, h: x[ints(0, 2)]),
    "assignment out of range": (IndexError, "out of bounds", lambda x, h: assign(x, ints(-3), 0.0)),
    "take out of range": (IndexError, "out of bounds", lambda x, h: xp.take(x, ints(2), axis=0)),
    "add.at out of range": (IndexError, "out of bounds", lambda x, h: xp.add.at(x, ints(2), 1.0)),
    # A float64 that nobody asked for
    "* np.sqrt(64)": (TypeError, "float64 of float32", lambda x, h: x * np.sqrt(64)),
    "np.sqrt(64) *": (TypeError, "float64 of float32", lambda x, h: np.sqrt(64) * x),
    "float32 * int64": (TypeError, "float64 of float32, int64", lambda x, h: x * xp.arange(4)),
    "int / int": (TypeError, "float64 of int64", lambda x, h: xp.arange(4) / 2),
    "mean of bool": (TypeError, "float64 of bool", lambda x, h: (x > 0).mean()),
    "where of two Python floats": (TypeError, "float64 of bool", lambda x, h: xp.where(x > 0, 1.0, 0.0)),
    "zeros without dtype": (TypeError, "float64 of numbers", lambda x, h: xp.zeros(3)),
    "asarray of Python floats": (TypeError, "float64 of numbers", lambda x, h: xp.asarray([1.0, 2.0])),
    "complex64 -> complex128": (TypeError, "float64", lambda x, h: x.astype("complex64") * np.complex128(1j)),
    # Work that belongs on the host
    "random": (AttributeError, "host_rng", lambda x, h: xp.random.default_rng(0)),
    "xp.sqrt of a number": (TypeError, "plain numbers", lambda x, h: xp.sqrt(64.0)),
    "xp.sum of a list": (TypeError, "plain numbers", lambda x, h: xp.sum([1.0, 2.0])),
    "files": (AttributeError, "savez", lambda x, h: xp.savez),
}


@pytest.mark.parametrize("misuse", MISUSE)
def test_misuse_is_refused(misuse, x, host):
    error, match, act = MISUSE[misuse]
    before = host.copy()
    with pytest.raises(error, match=re.escape(match)):
        act(x, host)
    assert_array_equal(host, before)


def test_the_same_misuse_passes_unnoticed_in_numpy(host):
    """Why the stand-in must look: NumPy says nothing to any of these."""
    assert (host * np.sqrt(64)).dtype == np.float64
    host[np.array([0, 0])] = host[:2]
    assert range(host.astype(int).size)


# What is allowed: the same lines on both give the same values, dtypes and shapes

LEGAL = {
    "arithmetic": lambda xp, x: 2.0 * x - x / 3.0 + (-x) ** 2 % 5.0,
    "reflected": lambda xp, x: (1.0 - x, 1.0 / x, 2.0 ** x, 7.0 // x, 7.0 % x),
    "comparison and logic": lambda xp, x: ((x > 0) & (x <= 1.0)) | ~(x != x),
    "numpy scalar of the same width": lambda xp, x: np.float32(2.0) * x + x * np.float32(0.5),
    "float64 asked for": lambda xp, x: x.astype("float64") * np.float64(2.0) + x,
    "float64 sum asked for": lambda xp, x: x.sum(axis=-1, dtype="float64"),
    "reductions": lambda xp, x: (x.sum(), xp.max(x, axis=1), x.mean(axis=(0, 2), keepdims=True), xp.argmax(x, axis=-1)),
    "softmax": lambda xp, x: xp.exp(x - x.max(axis=-1, keepdims=True)) / xp.exp(x).sum(axis=-1, keepdims=True),
    "nothing warns": lambda xp, x: xp.exp(x * 1e6),
    "products": lambda xp, x: (x @ x.swapaxes(-1, -2), x[0] @ x[1].T, xp.dot(x[0, 0], x[1, 1]),
                               xp.einsum("bij,bkj->bik", x, x)),
    "views": lambda xp, x: (x.T, x[:, 1:, ::-2], x[..., None, 0], x.reshape(6, -1), xp.moveaxis(x, 0, 1), x.mT,
                            x[1, 2, 2]),
    "joining and splitting": lambda xp, x: (xp.concatenate([x, x], axis=1), xp.stack((x, x)), *xp.split(x, 2, axis=0)),
    "indices": lambda xp, x: (x[xp.arange(2), xp.arange(2) + 1], x[:, [2, 0]], xp.take(x, xp.arange(2), axis=2)),
    "masks": lambda xp, x: (x[x > 0], xp.where(x > 0, x, 0.0), *xp.nonzero(x > 0)),
    "take_along_axis": lambda xp, x: xp.take_along_axis(x, xp.argsort(x, axis=-1), axis=-1),
    "creation": lambda xp, x: (xp.zeros((2, 3), dtype=x.dtype), xp.arange(5), xp.eye(3, dtype="float32"),
                               xp.full_like(x, 2.0)),
    "linalg": lambda xp, x: (*xp.linalg.qr(x[0].T), *xp.linalg.svd(x[0], full_matrices=False), xp.linalg.norm(x)),
    "clip with both bounds": lambda xp, x: xp.clip(x, -0.5, 0.5),
    "host questions": lambda xp, x: (xp.ndim(x), xp.shape(x), len(x), x.size, xp.finfo(x.dtype).eps,
                                     xp.result_type(x, 2.0)),
    "iteration": lambda xp, x: [row.sum(axis=0) for row in x],
}


@pytest.mark.parametrize("name", LEGAL)
@pytest.mark.parametrize("shape", [(2, 3, 4), (2, 4, 3)])
def test_legal_code_equals_numpy(name, shape, rng):
    host = rng.standard_normal(shape).astype(np.float32)
    got = LEGAL[name](xp, on_fake(host))
    with np.errstate(all="ignore"):
        expected = LEGAL[name](np, host)
    several = isinstance(expected, (tuple, list))
    for g, e in zip(got, expected, strict=True) if several else [(got, expected)]:
        if isinstance(e, (np.ndarray, np.float32)) and not isinstance(g, np.float32):
            assert type(g) is FakeArray, "a NumPy value came back from the device"
            g = to_host(g)
            assert g.dtype == e.dtype and g.shape == e.shape
        assert_array_equal(g, e)


def test_in_place_and_out(host, x):
    y = x
    y += 1.0
    y *= x
    y[:, 0] = 0.0
    y[xp.asarray([0, 1]), :, 3] = 7.0                                        # different places: fine
    y[xp.asarray([0, 0]), 1] = 5.0                                           # the same number twice: fine
    y[y > 6.5] = -1.0
    assert y is x and xp.tanh(x, out=x) is x and xp.sum(x, axis=0, out=x[0])._host.base is x._host
    h = (host + np.float32(1.0)) ** 2
    h[:, 0], h[:, :, 3], h[0, 1] = 0.0, 7.0, 5.0
    h[h > 6.5] = -1.0
    h = np.tanh(h)
    h[0] = h.sum(axis=0)
    np.testing.assert_allclose(to_host(x), h, rtol=1e-6)


def test_a_matmul_in_place_makes_a_new_array(x):
    a = x[0, :, :3]
    b = a
    b @= x[1, :, :3]
    assert b is not a


def test_repeated_indices_add_up_with_add_at(x, host):
    xp.add.at(x, ints(1, 1, 0), on_fake(np.ones((3, 4), np.float32)))
    np.add.at(host, [1, 1, 0], np.ones((3, 4), np.float32))
    assert_array_equal(to_host(x), host)


def test_a_reduction_stays_on_the_device(x):
    total = x.sum()
    assert type(total) is FakeArray and total.shape == () and device_of(total).name == "fake"


def test_crossing_copies(host):
    x = on_fake(host)
    host[0] = 9.0
    back = to_host(x)
    back[1] = 9.0
    assert not (to_host(x) == 9.0).any()
    assert to_device(x, "fake") is x and xp.asarray(x) is x and array_module(x) is xp


def test_copies_and_views(x):
    for twin in (copy.copy(x), copy.deepcopy(x), x.copy(), xp.array(x)):
        twin[...] = 0.0
        assert float(xp.abs(x).sum()) > 0.0
    x.T[3][...] = 0.0
    x[0, 0, 0][...] = 5.0                                                    # an index of numbers only is a view here
    assert to_host(x[:, :, 3]).max() == 0.0 and x[0, 0, 0].item() == 5.0


def test_another_type_may_answer_for_itself(x):
    class Other:
        __array_ufunc__ = None

        def __radd__(self, left):
            return "other"

    assert x + Other() == "other"
    with pytest.raises(TypeError, match="object"):
        x + object()


# What is counted

COUNTED = {                                                                  # launches, syncs, copies, broadcasts
    "ufunc": ((1, 0, 0, 0), lambda x: xp.exp(x)),
    "ufunc in place": ((1, 0, 0, 0), lambda x: operator.iadd(x, 1.0)),
    "ufunc, positional out": ((1, 0, 0, 0), lambda x: xp.add(x, 1.0, x)),
    "reduction": ((1, 0, 0, 0), lambda x: x.sum(axis=0)),
    "reduction with out=": ((1, 0, 0, 0), lambda x: x.sum(axis=0, out=x[0])),
    "assignment": ((1, 0, 0, 0), lambda x: assign(x, 0, 1.0)),
    "copy": ((1, 0, 0, 0), lambda x: x.copy()),
    "fancy index": ((1, 0, 0, 0), lambda x: x[[0, 1]]),
    "0-d index": ((1, 0, 0, 0), lambda x: x[ints(1)[0]]),
    "add.at": ((1, 0, 0, 0), lambda x: xp.add.at(x, ints(1, 1), 1.0)),
    "copyto": ((1, 0, 0, 0), lambda x: xp.copyto(x, 0.0)),
    "astype": ((1, 0, 0, 0), lambda x: x.astype("float64")),
    "astype to the same": ((0, 0, 0, 0), lambda x: x.astype("float32", copy=False)),
    "views": ((0, 0, 0, 0), lambda x: x.T[1:, :, None].swapaxes(0, 1)[0, 0, 0]),
    "reshape of contiguous": ((0, 0, 0, 0), lambda x: x.reshape(-1, 4).ravel()),
    "reshape of transposed": ((1, 0, 0, 0), lambda x: x.T.reshape(-1)),
    "ascontiguousarray, no-op": ((0, 0, 0, 0), lambda x: xp.ascontiguousarray(x)),
    "ascontiguousarray": ((1, 0, 0, 0), lambda x: xp.ascontiguousarray(x.T)),
    "split": ((0, 0, 0, 0), lambda x: xp.split(x, 2)),
    "empty": ((0, 0, 0, 0), lambda x: (xp.empty((3, 3), dtype=x.dtype), xp.empty_like(x))),
    "zeros": ((1, 0, 0, 0), lambda x: xp.zeros((3, 3), dtype=x.dtype)),
    "upload": ((0, 0, 0, 0), lambda x: xp.asarray([1, 2])),
    "float": ((1, 1, 0, 0), lambda x: float(x.sum())),
    "int": ((1, 1, 0, 0), lambda x: int(x.argmax())),
    "bool": ((2, 1, 0, 0), lambda x: bool((x > 0).any())),
    "item": ((0, 1, 0, 0), lambda x: x[0, 0, 0].item()),
    "tolist": ((0, 1, 0, 0), lambda x: x.tolist()),
    "get": ((0, 1, 0, 0), lambda x: x.get()),
    "to_host": ((0, 1, 0, 0), lambda x: to_host(x)),
    "asnumpy": ((0, 1, 0, 0), lambda x: xp.asnumpy(x)),
    "str": ((0, 1, 0, 0), lambda x: str(x)),
    "repr": ((0, 1, 0, 0), lambda x: repr(x)),
    "format": ((0, 1, 0, 0), lambda x: f"{x[0, 0, 0]:.3f}"),
    "mask": ((2, 1, 0, 0), lambda x: x[x > 0]),
    "mask in an assignment": ((2, 1, 0, 0), lambda x: assign(x, x > 0, 0.0)),
    "nonzero": ((1, 1, 0, 0), lambda x: xp.nonzero(x)),
    "nonzero as a method": ((1, 1, 0, 0), lambda x: x.nonzero()),
    "where with one argument": ((2, 1, 0, 0), lambda x: xp.where(x > 0)),
    "where with three": ((2, 0, 0, 0), lambda x: xp.where(x > 0, x, 0.0)),
    "unique": ((1, 1, 0, 0), lambda x: xp.unique(x)),
    "2-D product": ((1, 0, 0, 0), lambda x: x[0] @ x[1].T),
    "2-D product, both transposed": ((1, 0, 0, 0), lambda x: x[0].T @ x.reshape(2, 4, 3)[1].T),
    "2-D product of sliced columns": ((2, 0, 1, 0), lambda x: x[0, :, 1:3].T @ x[1]),
    "2-D dot of sliced columns": ((2, 0, 1, 0), lambda x: xp.dot(x[0, :, 1:3].T, x[1])),
    "batched, contiguous": ((1, 0, 0, 0), lambda x: x @ x.reshape(2, 4, 3)),
    "batched, one transposed": ((2, 0, 1, 0), lambda x: x @ x.swapaxes(-1, -2)),
    "batched, both sliced": ((3, 0, 2, 0), lambda x: x[..., :2] @ x[:, :2, :]),
    "batched, result strided": ((2, 0, 1, 0), lambda x: xp.matmul(x, x.reshape(2, 4, 3), out=x.T[:3].T)),
    "N-D @ 2-D": ((4, 0, 0, 1), lambda x: x @ x[0].reshape(4, 3)),
    "N-D @ transposed 2-D": ((5, 0, 1, 1), lambda x: x @ x[0].T),
    "batch of 1": ((4, 0, 0, 1), lambda x: x @ x[:1].reshape(1, 4, 3)),
    "batch of 1 with 2-D": ((1, 0, 0, 0), lambda x: x[:1] @ x[0].reshape(4, 3)),
    "einsum as one GEMM": ((1, 0, 0, 0), lambda x: xp.einsum("btd,do->bto", x, x[0].reshape(4, 3))),
    "einsum of 2-D, transposed": ((2, 0, 1, 0), lambda x: xp.einsum("ij,kj->ik", x[0], x[1])),
    "einsum without a sum": ((1, 0, 0, 0), lambda x: xp.einsum("ij,kij->jik", x[0], x)),
    "einsum of one": ((1, 0, 0, 0), lambda x: xp.einsum("bij->ji", x)),
    "einsum with a transpose": ((2, 0, 1, 0), lambda x: xp.einsum("bij,bkj->bik", x, x)),
}


@pytest.mark.parametrize("name", COUNTED)
def test_counts(name, x):
    expected, act = COUNTED[name]
    with count() as counts:
        act(x)
    assert (counts.launches, counts.syncs, counts.transposed_copies, counts.broadcast_products) == expected


def test_counting_blocks_nest_and_end(x):
    with count() as outer:
        x + 1.0
        with count() as inner:
            x + 1.0
    x + 1.0
    assert (outer.launches, inner.launches) == (2, 1)


# The list of names

def parameters_in_the_wheel(cupy, thing):
    """The parameters of a CuPy function as "a,axis=,*,out=" ("=" marks a default); None where CuPy does not say."""
    if isinstance(thing, cupy.ufunc):
        return "*args,out=,dtype=,casting="
    try:
        signature = None if thing is cupy.einsum else inspect.signature(thing)
    except (TypeError, ValueError):
        signature = None
    if signature is None:                                # compiled (or einsum's **kwargs): the docstring opens with it
        stated = re.match(r"[\w.]+\((.*)\)", (thing.__doc__ or "").partition("\n")[0])
        words = [word.partition("=") for word in stated[1].split(", ")] if stated else []
        names = [name.split()[-1] + equals for name, equals, _ in words if name not in ("self", "")]
        return ",".join(names) if stated else None
    parameters = [p for name, p in signature.parameters.items() if name != "self"]
    kinds = [p.kind for p in parameters]
    words = [{p.VAR_POSITIONAL: "*", p.VAR_KEYWORD: "**"}.get(p.kind, "") + p.name + "=" * (p.default is not p.empty)
             for p in parameters]
    if inspect.Parameter.KEYWORD_ONLY in kinds and inspect.Parameter.VAR_POSITIONAL not in kinds:
        words.insert(kinds.index(inspect.Parameter.KEYWORD_ONLY), "*")
    return ",".join(words)


def names_in_the_wheel(cupy):
    """What cupy_names.json holds, read off an installed CuPy (no GPU is needed)."""
    names = {"version": cupy.__version__}
    for section, owner in {"cupy": cupy, "linalg": cupy.linalg, "ndarray": cupy.ndarray, "random": cupy.random}.items():
        names[section] = {}
        for name in dir(owner):
            dunder = name.startswith("__")
            if (dunder and section == "ndarray") or not name.startswith("_"):
                thing = getattr(owner, name)
                calls = callable(thing) and not isinstance(thing, type) and not dunder and section != "random"
                names[section][name] = parameters_in_the_wheel(cupy, thing) if calls else None
    return names


def test_the_names_are_those_of_the_wheel():
    cupy = pytest.importorskip("cupy")
    if cupy.__version__ != NAMES["version"]:
        pytest.skip(f"CuPy {cupy.__version__} is installed; the names are those of {NAMES['version']}")
    assert names_in_the_wheel(cupy) == NAMES


def test_the_stand_in_has_no_operator_that_cupy_lacks():
    own = {"__contains__", "__getattr__",                                    # refused; how it works
           "__firstlineno__", "__static_attributes__"}                       # added by Python 3.13
    public = {name for name in vars(FakeArray) if not (name.startswith("_") and not name.startswith("__"))}
    assert public - own <= set(NAMES["ndarray"])


def test_the_device_is_known_by_name():
    assert get_device("fake").array_type is FakeArray
