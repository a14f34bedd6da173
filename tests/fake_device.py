"""A stand-in for CuPy: NumPy's arithmetic under CuPy's rules, so that misuse of a GPU fails on a machine without one.

What CuPy refuses, this refuses: mixing with NumPy arrays, silent conversion, names and keywords that CuPy does not have
(`cupy_names.json` holds those of its wheel). What CuPy accepts and gets wrong or slow without a word, this refuses too:
an index repeated in an assignment or out of range, a float64 nobody asked for. What is right but costs time is counted:

    with count() as counts:
        step()
    assert counts.syncs == 0

Importing this file registers the device "fake". Views (slices, transposes, most reshapes) are free here as there. An
einsum of two operands counts as the product that CuPy makes of it; tensordot, inner and an N-D dot as one launch each.
"""

from __future__ import annotations

import inspect
import json
import operator
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from minilora.backend import Device, register_device
from minilora.backend.generic import Kernels

NAMES = json.loads(Path(__file__).with_name("cupy_names.json").read_text())  # section -> name -> parameters, or None
NUMBERS = (bool, int, float, complex, np.generic)
HOST_CLASSES = (np.generic, np.dtype, np.finfo, np.iinfo, Exception)         # the same classes in both libraries
FLOAT64 = "dD"                                                               # type codes, with complex128


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


ON_HOST = _words("""can_cast common_type broadcast_shapes iscomplexobj isdtype isfortran isrealobj isscalar issubdtype
    may_share_memory min_scalar_type ndim promote_types result_type shape shares_memory size""")
UPLOAD = _words("array asanyarray asarray")                                  # the only functions that take host arrays
CREATE = UPLOAD | _words("""arange diag_indices empty eye full identity indices linspace logspace ones tri tril_indices
    triu_indices zeros""")
SYNC = _words("""argwhere bincount compress delete extract flatnonzero intersect1d nonzero setdiff1d setxor1d trim_zeros
    union1d unique unique_all unique_counts unique_inverse unique_values""")
SCATTER = _words("add maximum minimum subtract")                             # the ufuncs whose .at is known to work
SIZES = _words("N axes axis n newshape num shape start step stop")           # parameters that go through __index__
LEFT_OUT = _words("""apply_along_axis apply_over_axes dump dumps from_dlpack frombuffer fromfile fromfunction fromiter
    fromstring genfromtxt load loadtxt piecewise save savetxt savez savez_compressed set_printoptions tobytes tofile""")


@dataclass(eq=False)
class Counts:
    """What a stretch of code asked of the device."""

    launches: int = 0            # calls that compute or copy; CuPy may need more than one kernel for some of them
    syncs: int = 0               # waits for the device: float(), bool(), item(), print, boolean masks, nonzero, unique
    transposed_copies: int = 0   # operands (or results) of a product that CuPy copies first because of their strides
    broadcast_products: int = 0  # batched products whose batch axes differ: many small GEMMs instead of one


_counters: list[Counts] = []


@contextmanager
def count() -> Iterator[Counts]:
    """Count what happens inside the block. Blocks may be nested: each sees everything that happens inside it."""
    counts = Counts()
    _counters.append(counts)
    try:
        yield counts
    finally:
        _counters.remove(counts)


def _add(**amounts: int) -> None:
    for counts in _counters:
        for kind, amount in amounts.items():
            setattr(counts, kind, getattr(counts, kind) + amount)


class FakeArray:
    """An array "on the device". Its methods are those NumPy's and CuPy's arrays share; its operators are set below."""

    __slots__ = ("_host",)
    __array_ufunc__ = None       # np.exp(x) raises; np_array * x and np.float64(2) * x come to our reflected operators
    __contains__ = None          # CuPy has none, and `3 in x` would compare row by row, waiting for each
    __hash__ = None

    def __init__(self, host: np.ndarray) -> None:
        if host.dtype.kind not in "biufc" or host.dtype.char in "gG":
            raise TypeError(f"CuPy has no arrays of dtype {host.dtype}")
        self._host = host

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        raise TypeError("implicit conversion to a NumPy array is not allowed; use to_host(array)")

    def __array_function__(self, function: Callable, types: Any, args: Any, kwargs: Any) -> Any:
        raise TypeError(f"numpy.{function.__name__} got an array of the device; call it as xp.{function.__name__} with "
                        "xp = array_module(array)")

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError("a pickled CuPy array needs a GPU to be read again; save to_host(array) instead")

    def __getattr__(self, name: str) -> Any:
        numpys = getattr(np.ndarray, name, None)
        if name not in NAMES["ndarray"] or numpys is None or name in LEFT_OUT:
            raise AttributeError(f"{name!r} is no attribute that NumPy's and CuPy's arrays share")
        if callable(numpys):
            return Function("ndarray", name, numpys, owner=self)
        value = getattr(self._host, name)
        if isinstance(value, np.ndarray):                                    # T, mT, real, imag, base
            return FakeArray(value)
        if value is None or isinstance(value, (int, tuple, np.dtype)):       # shape, ndim, dtype, ...
            return value
        raise AttributeError(f"cupy.ndarray.{name} exists, but the stand-in does not imitate it")

    @property
    def flags(self) -> SimpleNamespace:
        c, f = self._host.flags.c_contiguous, self._host.flags.f_contiguous
        return SimpleNamespace(c_contiguous=c, f_contiguous=f, forc=c or f, fnc=f and not c)

    def get(self) -> np.ndarray:
        """A copy on the host. Every look at a value comes through here, because it waits for the device."""
        _add(syncs=1)
        return self._host.copy()

    def item(self) -> Any:
        return self.get().item()

    def tolist(self) -> Any:
        return self.get().tolist()

    def __getitem__(self, key: Any) -> FakeArray:
        keys = key if isinstance(key, tuple) else (key,)
        kinds = _kinds_of_index_arrays(keys)
        if not kinds:                                                        # a view, even of a single number
            return FakeArray(self._host[keys if any(k is ... for k in keys) else (*keys, ...)])
        _add(syncs="b" in kinds)
        return _call("getitem", operator.getitem, (self, keys))

    def __setitem__(self, key: Any, value: Any) -> None:
        keys = key if isinstance(key, tuple) else (key,)
        if not isinstance(value, (FakeArray, *NUMBERS)):
            raise TypeError(f"setitem got {_kind(value)}; expected an array of the device or a number (see to_device)")
        kinds = _kinds_of_index_arrays(keys)
        if kinds - {"b"} and isinstance(value, FakeArray) and value.size > 1:
            places = np.arange(self.size).reshape(self.shape)[_unwrap(keys, [])]
            if np.unique(places).size < places.size:
                raise ValueError("repeated indices in an assignment: CuPy keeps any one of the values; use xp.add.at")
        _add(syncs="b" in kinds)
        _call("setitem", operator.setitem, (self, keys, value))

    def __len__(self) -> int:
        return len(self._host)

    def __iter__(self) -> Iterator[FakeArray]:
        return (self[i] for i in range(len(self)))

    def __copy__(self) -> FakeArray:
        return self.copy()

    def __deepcopy__(self, memo: dict) -> FakeArray:
        return self.copy()


def _operator(ufunc: np.ufunc, reflected: bool = False, in_place: bool = False) -> Callable:
    def method(x: FakeArray, *other: Any) -> Any:
        if any(not isinstance(y, FakeArray) and getattr(y, "__array_ufunc__", True) is None for y in other):
            return NotImplemented                                            # a type, such as Tensor, that knows better
        return _call(ufunc.__name__, ufunc, (*other, x) if reflected else (x, *other), {"out": x} if in_place else {})
    return method


ARITHMETIC = {"add": np.add, "sub": np.subtract, "mul": np.multiply, "matmul": np.matmul, "truediv": np.divide,
              "floordiv": np.floor_divide, "mod": np.remainder, "pow": np.power, "and": np.bitwise_and,
              "or": np.bitwise_or, "xor": np.bitwise_xor}
OTHERS = {"lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal, "eq": np.equal,
          "ne": np.not_equal, "neg": np.negative, "pos": np.positive, "abs": np.absolute, "invert": np.invert}
for _name, _ufunc in (ARITHMETIC | OTHERS).items():
    setattr(FakeArray, f"__{_name}__", _operator(_ufunc))
for _name, _ufunc in ARITHMETIC.items():
    setattr(FakeArray, f"__r{_name}__", _operator(_ufunc, reflected=True))
    if _name != "matmul":                                                    # CuPy's `a @= b` makes a new array
        setattr(FakeArray, f"__i{_name}__", _operator(_ufunc, in_place=True))
for _look in (bool, int, float, complex, repr, str, format):
    setattr(FakeArray, f"__{_look.__name__}__", lambda x, *spec, look=_look: look(x.get(), *spec))


@dataclass(frozen=True)
class Function:
    """A function of NumPy's (or a method of `owner`) that may only be called the way CuPy allows."""

    section: str
    name: str
    numpys: Callable
    owner: FakeArray | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        parameters = NAMES[self.section][self.name]
        given = kwargs
        if parameters is not None:
            try:
                given = _signature(parameters).bind(*args, **kwargs).arguments
            except TypeError as error:
                raise TypeError(f"{error}; CuPy has {self.name}({parameters})") from None
        _add(syncs=self.name in SYNC or (self.name == "where" and "x" not in given))
        return _call(self.name, self.numpys, args if self.owner is None else (self.owner, *args), kwargs, given)

    def at(self, array: FakeArray, index: Any, *values: Any) -> None:
        if self.name not in SCATTER:
            raise AttributeError(f"cupy.{self.name}.at is not among those that work: {', '.join(sorted(SCATTER))}")
        _call(f"{self.name}.at", self.numpys.at, (array, index, *values))


@cache
def _signature(parameters: str) -> inspect.Signature:
    """The signature written as "a,axis=,*,out=": "=" marks a default, "*" that the rest goes by keyword."""
    found, kind = [], inspect.Parameter.POSITIONAL_OR_KEYWORD
    for word in filter(None, parameters.split(",")):
        stars, name = len(word) - len(word.lstrip("*")), word.strip("*=")
        if stars:
            kind = inspect.Parameter.VAR_KEYWORD if stars == 2 else inspect.Parameter.VAR_POSITIONAL
        if name:
            default = None if word.endswith("=") else inspect.Parameter.empty
            found.append(inspect.Parameter(name, kind, default=default))
        if stars:
            kind = inspect.Parameter.KEYWORD_ONLY
    return inspect.Signature(found)


def _call(name: str, function: Callable, args: tuple, kwargs: dict | None = None, given: dict | None = None) -> Any:
    """One operation of the device: check the arguments, compute with NumPy, check the result, count, wrap.

    `given` holds the arguments under CuPy's names for them.
    """
    kwargs = kwargs or {}
    given = kwargs if given is None else given
    inputs: list[Any] = []                                                   # every array among the arguments
    host_args, host_kwargs = _unwrap(args, inputs), _unwrap(kwargs, inputs)
    is_ufunc, arrays = isinstance(function, np.ufunc), [x for x in inputs if isinstance(x, FakeArray)]
    uploads = name in UPLOAD and not arrays
    if not uploads:
        _check_arguments(name, [*args, *inputs] if is_ufunc else inputs, given)
    if not arrays and name not in CREATE | ON_HOST:
        raise TypeError(f"{name} got no array of the device; compute with plain numbers in Python")

    with np.errstate(all="ignore"):                                          # CuPy never warns about numbers
        result = function(*host_args, **host_kwargs)
    if name in ON_HOST:
        return result
    several = isinstance(result, (tuple, list))
    hosts = [np.array(r, copy=uploads or None) for r in (result if several else [result]) if r is not None]

    asked = given.get("dtype") is not None or any(x.dtype.char in FLOAT64 for x in inputs)
    if not asked and any(host.dtype.char in FLOAT64 for host in hosts):
        kinds = ", ".join(str(x.dtype) for x in inputs)
        raise TypeError(f"{name} made float64 of {kinds or 'numbers'}; keep constants as "
                        "Python floats, divide floats instead of integers, or ask with dtype= or astype")
    views = bool(hosts) and all(any(np.may_share_memory(host, x._host) for x in arrays) for host in hosts)
    _add(launches=is_ufunc or "out" in given or not (views or uploads or name in ("empty", "empty_like")))
    if operands := _operands_of_product(name, host_args):
        _count_product(*operands, out=host_kwargs.get("out"), lowered=name == "einsum")

    wrapped = [_wrap(host, arrays) for host in hosts]
    if several:
        return wrapped if isinstance(result, list) else tuple(wrapped)
    return wrapped[0] if wrapped else None


def _wrap(host: np.ndarray, arrays: list[FakeArray]) -> FakeArray:
    """A result as ours: the very array that was given where it is that one (out=, asarray), else a new one."""
    for x in arrays:
        if x._host is host:
            return x
    return FakeArray(host)


def _check_arguments(name: str, operands: list, given: dict) -> None:
    for x in operands:
        if not isinstance(x, (FakeArray, *NUMBERS)):
            raise TypeError(f"{name} got {_kind(x)}; expected arrays of the device and numbers (see to_device)")
    for parameter in SIZES & given.keys():
        _unwrap(given[parameter], sizes := [])
        if sizes:
            raise TypeError(f"{name}({parameter}=...) got an array; expected Python integers (CuPy has no __index__)")


def _unwrap(value: Any, found: list) -> Any:
    """`value` with NumPy arrays for ours, inside lists, tuples and dicts too; every array met is added to `found`."""
    if isinstance(value, (FakeArray, np.ndarray)):
        found.append(value)
        return value._host if isinstance(value, FakeArray) else value
    if isinstance(value, (list, tuple)):
        return type(value)([_unwrap(v, found) for v in value])
    if isinstance(value, dict):
        return {k: _unwrap(v, found) for k, v in value.items()}
    return value


def _kinds_of_index_arrays(keys: tuple) -> set[str]:
    """The kinds of the arrays and lists in an index: {"b"} a mask, {"i"} integers, empty if there is none."""
    return {np.asarray(_unwrap(k, [])).dtype.kind for k in keys if isinstance(k, (FakeArray, np.ndarray, list))}


def _operands_of_product(name: str, args: tuple) -> tuple:
    """The two arrays that CuPy's matmul gets to see; nothing if `name` is no product or one that is not looked into."""
    if name == "matmul" or (name == "dot" and max(x.ndim for x in args[:2]) <= 2):
        return args[:2]
    form = re.fullmatch(r"(\w+),(\w+)->(\w*)", args[0].replace(" ", "")) if name == "einsum" else None
    if not form:
        return ()
    left, right, output = form.groups()
    shared = set(left) & set(right)
    batch, summed = shared & set(output), shared - set(output)
    if not summed:                                                           # CuPy multiplies with broadcasting
        return ()
    by_rows = sorted(range(len(left)), key=lambda i: ((left[i] not in batch) + (left[i] in summed), left[i]))
    by_columns = sorted(range(len(right)), key=lambda i: (2 * (right[i] not in batch) - (right[i] in summed), right[i]))
    return args[1].transpose(by_rows), args[2].transpose(by_columns)         # batch, rows, summed; batch, summed, columns


def _count_product(a: np.ndarray, b: np.ndarray, out: np.ndarray | None, lowered: bool) -> None:
    """Count what CuPy does besides the GEMM (`dot` and `matmul` in its _routines_linalg.pyx).

    A 2-D operand may lie by rows or by columns; one that does neither is copied. With more axes, and always when lowered
    from einsum, each must lie by rows: a transposed or sliced one is copied. Batch axes that differ cost three kernels.
    """
    ndim = max(a.ndim, b.ndim)
    by_columns_too = ndim <= 2 and not lowered
    copies = sum(not (x.flags.c_contiguous or (by_columns_too and x.flags.f_contiguous)) for x in (a, b))
    copies += out is not None and not out.flags.c_contiguous
    batch_a, batch_b = (((1,) * ndim + x.shape[:-2])[2 - ndim:] for x in (a, b))
    broadcast = not lowered and batch_a != batch_b
    _add(launches=copies + 3 * broadcast, transposed_copies=copies, broadcast_products=broadcast)


def _kind(value: Any) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"


class Namespace:
    """A module of the device: the names that NumPy's module and CuPy's share, and those in `own`."""

    def __init__(self, section: str, module: Any, **own: Any) -> None:
        self.__name__ = f"fake.{section}"
        self._section, self._module = section, module
        vars(self).update(own)

    def __getattr__(self, name: str) -> Any:
        missing = object()
        value = getattr(self._module, name, missing)
        if name not in NAMES[self._section] or value is missing:
            raise AttributeError(f"{self._section}.{name} is no name that NumPy and CuPy {NAMES['version']} share")
        if value is None or isinstance(value, float) or (isinstance(value, type) and issubclass(value, HOST_CLASSES)):
            return value
        if isinstance(value, type) or not callable(value) or name in LEFT_OUT:
            raise AttributeError(f"{self._section}.{name} exists in CuPy, but the stand-in does not imitate it")
        return Function(self._section, name, value)


class NoRandom:
    """Stands for cupy.random, whose streams are not NumPy's: every random number is drawn on the host."""

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"random.{name} on the device: draw with backend.host_rng on the host and use to_device")


xp = Namespace("cupy", np, ndarray=FakeArray, linalg=Namespace("linalg", np.linalg), random=NoRandom(),
               asnumpy=lambda x: x.get(), is_available=lambda: True)
FAKE = register_device(Device("fake", xp, FakeArray, Kernels(xp), xp.asarray, xp.asnumpy))
