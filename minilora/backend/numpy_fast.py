"""The primitives on NumPy, fast."""

from __future__ import annotations

from .generic import Kernels


class NumpyKernels(Kernels):
    """Overrides for NumPy."""
