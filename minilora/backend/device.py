"""Which array library is at work, and the only two doors between host and device.

The rest of minilora never imports CuPy. It asks `array_module(x)` for the library that owns x and calls the same names on
it: `xp.exp(x)` runs on the CPU when x is a NumPy array and on the GPU when it is a CuPy array. Arrays cross from one to the
other through `to_device` and `to_host`, and nowhere else, because every crossing waits for the device.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from .cupy_driver import open_gpu
from .generic import Kernels
from .numpy_fast import NumpyKernels

Array = Any  # a NumPy or CuPy array


@dataclass(frozen=True)
class Device:
    """One place where arrays live: its library `xp`, its array type, its kernels, and its two doors `put` and `get`."""

    name: str
    xp: Any
    array_type: type
    kernels: Kernels
    put: Callable[[np.ndarray], Array]  # host -> device
    get: Callable[[Array], np.ndarray]  # device -> host, waits for the device


_devices: dict[type, Device] = {}  # array type -> its device
_current: list[Device] = []        # the device on which new models are built: one entry, replaced by set_device


def register_device(device: Device) -> Device:
    """Make the arrays of `device` known to `array_module`, and its name to `set_device`."""
    _devices[device.array_type] = device
    return device


CPU = register_device(Device("cpu", np, np.ndarray, NumpyKernels(np), np.asarray, np.asarray))
_devices[np.generic] = CPU


def _gpu() -> Device:
    """CuPy as a device, imported only when somebody asks for it. Raises DeviceError if it cannot run."""
    cupy, own = open_gpu(tf32=os.environ.get("MINILORA_TF32", "0") not in ("", "0"))
    return register_device(Device("gpu", cupy, cupy.ndarray, own, own.driver.put, cupy.asnumpy))


def get_device(name: str) -> Device:
    """The device called `name` ("cpu" or "gpu"). Raises ValueError for an unknown name, DeviceError without a GPU."""
    for device in _devices.values():
        if device.name == name:
            return device
    if name == "gpu":
        return _gpu()
    known = sorted({d.name for d in _devices.values()} | {"gpu"})
    raise ValueError(f'unknown device {name!r}: expected one of {", ".join(known)}')


def set_device(name: str, *, tf32: bool | None = None) -> None:
    """Choose where new models and tensors are built: "cpu" (NumPy) or "gpu" (CuPy).

    The environment variable MINILORA_DEVICE sets the first value. Models that exist already stay where they are
    (`model.to(name)` moves one). tf32, for the GPU: True lets float32 products round their factors to 10 bits (TF32), which
    is several times as fast and good to about three digits; False, the default, does not; None leaves it as it is. The
    environment variable MINILORA_TF32=1 sets its first value.

    Raises ValueError for an unknown name, or for tf32=True on a device that has none; DeviceError (a RuntimeError), saying what
    to install or change, without CuPy or a GPU.
    """
    device = get_device(name)
    if tf32 and device.kernels.tf32 is None:
        raise ValueError(f'tf32=True on device {name!r}, which has no TF32: leave it out, or use set_device("gpu", tf32=True)')
    if tf32 is not None and device.kernels.tf32 is not None:
        device.kernels.tf32 = tf32
    _current[:] = [device]


def current_device() -> Device:
    """The device on which new models and tensors are built."""
    if not _current:
        set_device(os.environ.get("MINILORA_DEVICE", "cpu"))
    return _current[0]


def device_of(*arrays: Array) -> Device:
    """The one device that owns all the arrays (scalars and None are ignored; no array at all means the current device).

    Raises TypeError when they live on different devices, and for a type that no device owns.
    """
    found = None
    for array in arrays:
        if array is None or isinstance(array, (bool, int, float, complex)):
            continue
        device = _devices.get(type(array)) or _lookup(array)
        if found is None:
            found, first = device, array
        elif device is not found:
            raise TypeError(f"arrays of two devices in one operation: {_kind(first)} and {_kind(array)}; move one with "
                            f"to_device(array) or model.to(device), or bring both to the host with to_host(array)")
    return found or current_device()


def _lookup(array: Array) -> Device:
    """The device of an array whose exact type was not registered (a subclass, or a CuPy array seen for the first time)."""
    for array_type, device in _devices.items():
        if isinstance(array, array_type):
            return device
    if type(array).__module__.partition(".")[0] == "cupy":
        return _gpu()
    raise TypeError(f"expected a NumPy or CuPy array, got {_kind(array)}; convert it with numpy.asarray(...) first")


def _kind(array: Array) -> str:
    return f"{type(array).__module__}.{type(array).__qualname__}"


def array_module(*arrays: Array) -> Any:
    """The array library (numpy or cupy) that owns the arrays. Raises TypeError, naming both types, on a mix."""
    return device_of(*arrays).xp


def kernels(*arrays: Array) -> Kernels:
    """The primitives (softmax, layer norm, attention …) of the device that owns the arrays."""
    return device_of(*arrays).kernels


def to_device(array: Any, device: str | None = None) -> Array:
    """Copy a host array to a device (default: the current one). An array that is there already is returned as it is."""
    target = get_device(device) if device else current_device()
    if isinstance(array, target.array_type):
        return array
    return target.put(to_host(array))


def to_host(array: Any) -> np.ndarray:
    """A NumPy array with the values of an array or Tensor of any device. Waits for the device."""
    array = getattr(array, "data", array) if hasattr(array, "requires_grad") else array
    if isinstance(array, (np.ndarray, np.generic, bool, int, float, complex, list, tuple)):
        return np.asarray(array)
    return device_of(array).get(array)


def host_rng(seed: int | np.random.Generator | np.random.SeedSequence) -> np.random.Generator:
    """An explicit generator. Every random number is drawn on the host, so NumPy and CuPy start from equal numbers."""
    return seed if isinstance(seed, np.random.Generator) else np.random.default_rng(seed)
