"""How much memory a process has had: its high-water mark, which the system can set back."""

from __future__ import annotations

import ctypes
import resource
import sys
from pathlib import Path


def forget_peak() -> None:
    """Set the high-water mark of resident memory back to what is resident now, where the system can (proc(5), clear_refs)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def resident_mb() -> float:
    """The most memory that this process had resident, since `forget_peak` if the system can, in MB."""
    try:
        status = Path("/proc/self/status").read_text()
        return next(int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024**2 if sys.platform == "darwin" else 1024)


def give_back_freed_memory() -> None:
    """Return to the system what was freed and kept (backend/memory.py), where the C library is glibc."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError, TypeError):           # another C library
        return
