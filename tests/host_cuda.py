"""The GPU kernels without a GPU: their CUDA source compiled by g++, launched on arrays of the CPU or of the stand-in device.

`HostDriver` stands in the place of `CupyDriver`: with it `CupyKernels`, launches and all, runs here. Threads of a block take
turns (see host_cuda.h), from the first to the last or from the last to the first. Its product reads memory by the strides
that it is told, as cuBLAS would.
"""

from __future__ import annotations

import ctypes
import hashlib
import re
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import fake_device
import numpy as np
from numpy.lib.stride_tricks import as_strided

from minilora.backend.cupy_sources import source

HEADER = Path(__file__).with_name("host_cuda.h")
COMPILER = shutil.which("g++")
KERNEL = re.compile(r'extern "C" __global__ void (\w+)\(([^)]*)\)')


def kernel_names(text: str) -> list[str]:
    return [name for name, _ in KERNEL.findall(text)]


def waiting_kernels(text: str) -> set[str]:
    """Those that call a function of the whole block: `block_...`, or one that does."""
    bodies = re.split(r"\n(?=extern|__device__|struct|//)", text)
    helpers = {m[1] for b in bodies if b.startswith("__device__") and "block_" in b and (m := re.search(r"(\w+)\(", b))}
    return {KERNEL.search(b)[1] for b in bodies if KERNEL.search(b) and re.search("block_|" + "|".join(helpers) + "|__sync", b)}


@cache
def library(text: str, *options: str) -> ctypes.CDLL:
    """The source compiled for the CPU. Kept in the temporary folder, for the other processes of a test run."""
    program = "\n".join([HEADER.read_text(), text, *(f"ON_HOST({name})" for name in kernel_names(text))])
    folder = Path(tempfile.gettempdir()) / "minilora-host-cuda"
    folder.mkdir(exist_ok=True)
    path = folder / f"{hashlib.sha256((program + str(options)).encode()).hexdigest()[:24]}.so"
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=folder) as own:
            (Path(own) / "k.cpp").write_text(program)
            subprocess.run([COMPILER, "-std=c++17", "-O1", "-shared", "-fPIC", "-ffp-contract=off", *options, "-o",
                            f"{own}/k.so", f"{own}/k.cpp"], check=True)
            Path(own, "k.so").replace(path)
    return ctypes.CDLL(str(path))


def memory(array: Any) -> np.ndarray:
    return array._host if isinstance(array, fake_device.FakeArray) else array


class HostDriver:
    """What CupyKernels needs of a device, on the CPU."""

    def __init__(self, change: tuple[str, str] | None = None, backwards: bool = False) -> None:
        self.change, self.backwards = change, backwards            # change: a bug to plant in the source, (old, new)
        self.launched: list[str] = []
        self.tf32: list[bool] = []

    def put(self, host: np.ndarray) -> Any:
        return fake_device.xp.asarray(host)

    def launch(self, name: str, dtype: Any, blocks: int, threads: int, *arguments: Any) -> None:
        fake_device._add(launches=1)
        self.launched.append(name)
        text = source(str(dtype))
        if self.change:
            assert self.change[0] in text
            text = text.replace(*self.change)
        assert 0 < blocks < 1 << 31 and threads % 32 == 0 and 0 < threads <= 1024
        kinds = [kind.rpartition(" ")[0].removeprefix("const ") for kind in dict(KERNEL.findall(text))[name].split(",")]
        kinds = [" ".join(kind.split()).removeprefix("const ") for kind in kinds]
        lib = library(text)
        assert len(arguments) == len(kinds) == getattr(lib, f"parameters_of_{name}")()
        cells = [self._cell(kind, value, str(dtype)) for kind, value in zip(kinds, arguments)]
        pointers = (ctypes.c_void_p * len(cells))(*(ctypes.addressof(cell) for cell in cells))
        waits = int(name in waiting_kernels(text))
        stuck = getattr(lib, f"run_{name}")(pointers, ctypes.c_longlong(blocks), threads, waits, int(self.backwards))
        assert not stuck, f"{name}: some threads wait at a barrier to which others do not come"

    def _cell(self, kind: str, value: Any, dtype: str) -> Any:
        """One argument as CuPy hands it over: int -> long long, float -> double, array -> its address."""
        if kind.endswith("*"):
            if isinstance(value, int) and value == 0:
                return ctypes.c_longlong(0)
            host = memory(value)
            wanted = {"T*": (dtype,), "long long*": ("int64",), "unsigned char*": ("bool", "uint8")}[kind]
            assert str(host.dtype) in wanted, f"{kind} got {host.dtype}"
            return ctypes.c_void_p(host.ctypes.data)
        assert type(value) is {"long long": int, "double": float}[kind], f"{kind} got {value!r}"
        return ctypes.c_longlong(value) if kind == "long long" else ctypes.c_double(value)

    def multiply(self, dtype: Any, sizes: tuple[int, ...], a: tuple[Any, ...], b: tuple[Any, ...], out: tuple[Any, ...],
                 tf32: bool) -> None:
        """gemmStridedBatched: matrices by columns, entry (i, j) of matrix c at c·stride + j·ld + i."""
        fake_device._add(launches=1)
        self.launched.append("gemm")
        self.tf32.append(tf32)
        m, n, k, count = sizes
        assert min(sizes) > 0

        def matrices(array: Any, transposed: bool, ld: int, stride: int, rows: int, columns: int) -> np.ndarray:
            host = memory(array)
            assert host.dtype == dtype and ld >= max(1, columns if transposed else rows), "cuBLAS would refuse this"
            step = host.itemsize
            height, width = (columns, rows) if transposed else (rows, columns)
            whole = host.base if host.base is not None else host       # nothing outside the allocation may be read
            while whole.base is not None and isinstance(whole.base, np.ndarray):
                whole = whole.base
            last = host.ctypes.data + step * ((count - 1) * stride + (width - 1) * ld + height)
            assert stride >= 0 and last <= whole.ctypes.data + whole.nbytes
            first = host[(slice(0, 1),) * host.ndim].reshape(-1)
            found = as_strided(first, (count, height, width), (stride * step, step, ld * step))
            return found.swapaxes(1, 2) if transposed else found

        A, B = matrices(*a, m, k), matrices(*b, k, n)
        C = matrices(out[0], False, *out[1:], m, n)
        with np.errstate(all="ignore"):
            C[...] = A @ B
