"""The error of a device that cannot be used: its message says what to install or change, in one line."""


class DeviceError(RuntimeError):
    """No CuPy, no GPU, or a CuPy that does not fit the driver."""
