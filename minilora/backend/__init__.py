"""NumPy or CuPy under the same lines. The only folder that imports CuPy.

generic.py holds the primitives for reading; numpy_*.py and cupy_*.py are the same, faster, and tested equal to them.
"""

from .cupy_driver import DeviceError, enough_memory
from .device import (
    Array,
    Device,
    array_module,
    current_device,
    device_of,
    get_device,
    host_rng,
    kernels,
    register_device,
    set_device,
    to_device,
    to_host,
)

__all__ = ["Array", "Device", "DeviceError", "array_module", "current_device", "device_of", "enough_memory", "get_device",
           "host_rng", "kernels", "register_device", "set_device", "to_device", "to_host"]
