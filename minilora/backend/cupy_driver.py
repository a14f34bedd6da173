"""The driver of a real GPU: kernels compiled by CuPy (NVRTC), products by cuBLAS. The only file that imports CuPy.

Nothing here waits for the device. CuPy passes a Python int to a kernel as long long and a float as double, as
cupy_sources.py expects. The cuBLAS calls go through `cupy_backends`, because cupy.matmul copies transposed batched operands.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from .cupy_kernels import CupyKernels
from .cupy_sources import source

DEFAULT_MATH, TF32_MATH = 0, 3              # of cublasMath_t
NO_TRANSPOSE, TRANSPOSE = 0, 1              # of cublasOperation_t


class DeviceError(RuntimeError):
    """No CuPy, no GPU, or a CuPy that does not fit the driver. The message says what to install or change, in one line."""


@contextmanager
def enough_memory(device: str) -> Iterator[None]:
    """What runs out of memory inside this block raises a MemoryError that says, in one line, what to change."""
    try:
        yield
    except MemoryError as error:
        if str(error).startswith("out of memory on device"):
            raise
        raise MemoryError(f"out of memory on device {device!r} ({' '.join(str(error).split())}): use fewer rows or shorter "
                          "sequences in a batch (TrainConfig(accumulate=...) keeps the sum), fewer cells of a sweep at once "
                          "(chunk=...), or a smaller model") from None


class CupyDriver:
    """Launches and products on CuPy's current device and stream."""

    def __init__(self, cupy: Any, cublas: Any) -> None:
        self.cupy, self.cublas = cupy, cublas
        self.handle = cupy.cuda.device.get_cublas_handle           # one for each thread and device
        self.functions: dict[tuple[str, str], Any] = {}            # (kernel, dtype) -> what launches it
        self.modules: dict[str, Any] = {}                          # compiled at first use, then kept on disk by CuPy
        self.gemm = {"float32": (cublas.sgemm, cublas.sgemmStridedBatched),
                     "float64": (cublas.dgemm, cublas.dgemmStridedBatched)}
        self.numbers = {dtype: np.array([1.0, 0.0], dtype) for dtype in self.gemm}     # cuBLAS reads its α and β on the host

    def put(self, host: np.ndarray) -> Any:
        """A copy on the GPU. Raises MemoryError, saying what to change, if it has no room."""
        with enough_memory("gpu"):
            return self.cupy.asarray(host)

    def launch(self, name: str, dtype: Any, blocks: int, threads: int, *arguments: Any) -> None:
        """Run the kernel `name` for this dtype; arguments are arrays, ints and floats. Does not wait for it."""
        key = name, str(dtype)
        if key not in self.functions:
            if key[1] not in self.modules:
                self.modules[key[1]] = self.cupy.RawModule(code=source(key[1]), options=("-std=c++17",))
            self.functions[key] = self.modules[key[1]].get_function(name)
        self.functions[key]((blocks,), (threads,), arguments)

    def multiply(self, dtype: Any, sizes: tuple[int, ...], a: tuple[Any, ...], b: tuple[Any, ...], out: tuple[Any, ...],
                 tf32: bool) -> None:
        """cuBLAS's gemm or gemmStridedBatched, in its own terms. sizes: m, n, k, count. a, b: (array, transposed, ld, stride);
        out: (array, ld, stride)."""
        one, many = self.gemm[str(dtype)]
        one_and_zero = self.numbers[str(dtype)]
        alpha = one_and_zero.ctypes.data
        beta = alpha + one_and_zero.itemsize
        m, n, k, count = sizes
        (A, ta, lda, step_a), (B, tb, ldb, step_b), (C, ldc, step_c) = a, b, out
        handle = self.handle()
        self.cublas.setMathMode(handle, TF32_MATH if tf32 else DEFAULT_MATH)
        operations = TRANSPOSE if ta else NO_TRANSPOSE, TRANSPOSE if tb else NO_TRANSPOSE
        if count == 1:                      # gemm may cut a long k into parts that run at once; the batched one does not
            one(handle, *operations, m, n, k, alpha, A.data.ptr, lda, B.data.ptr, ldb, beta, C.data.ptr, ldc)
        else:
            many(handle, *operations, m, n, k, alpha, A.data.ptr, lda, step_a, B.data.ptr, ldb, step_b, beta, C.data.ptr, ldc,
                 step_c, count)


def open_gpu(tf32: bool) -> tuple[Any, CupyKernels]:
    """CuPy and its kernels. Raises DeviceError, in one line that says what to install or change, if they cannot run."""
    extras = 'pip install "minilora[cuda13]" (or [cuda12], to match the CUDA version that nvidia-smi prints)'
    try:
        import cupy
    except ModuleNotFoundError as error:
        if error.name != "cupy":
            raise DeviceError(f'device "gpu": CuPy is installed but does not load ({one_line(error)}): {extras}') from None
        raise DeviceError(f'device "gpu" needs CuPy, which is not installed: {extras}') from None
    except ImportError as error:
        raise DeviceError(f'device "gpu": CuPy is installed but does not load ({one_line(error)}): keep one CuPy package, '
                           f"{extras}") from None
    if not cupy.is_available():
        raise DeviceError(f'device "gpu": {why_not_available(cupy)}')
    try:                                    # the two libraries that a wheel without its extra [ctk] lacks
        from cupy_backends.cuda.libs import cublas
        cupy.cuda.nvrtc.getVersion()
    except (ImportError, RuntimeError, OSError) as error:
        raise DeviceError(f'device "gpu": CuPy finds no cuBLAS or NVRTC of its CUDA version ({one_line(error)}): {extras}, '
                           "which brings both") from None
    return cupy, CupyKernels(cupy, CupyDriver(cupy, cublas), tf32)


def why_not_available(cupy: Any) -> str:
    """Why an installed CuPy has no GPU: a driver older than the CUDA version that its wheel is built for, or none at all."""
    try:
        built, driver = cupy.cuda.runtime.runtimeGetVersion() // 1000, cupy.cuda.runtime.driverGetVersion() // 1000
    except (AttributeError, RuntimeError):  # no driver that could be asked
        built = driver = 0
    if 0 < driver < built:
        return (f"CuPy is built for CUDA {built}, but the NVIDIA driver knows only CUDA {driver}: pip uninstall "
                f'cupy-cuda{built}x, then pip install "minilora[cuda{driver}]", or update the driver')
    return 'CuPy is installed but finds no usable NVIDIA GPU or driver; check nvidia-smi, or use set_device("cpu")'


def one_line(error: BaseException) -> str:
    """The first telling line of a message: CuPy frames its own in lines of ===."""
    lines = [line.strip() for line in str(error).splitlines()]
    return next((line for line in lines if line.strip("= ")), type(error).__name__)[:200]
