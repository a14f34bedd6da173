"""Shared libraries opened for one caller: their functions find each other first, and nobody who looks for a name finds them.

For libraries that use each other's functions without naming each other. The loader of Linux looks for a function in what the
whole process shows (RTLD_GLOBAL) and among all that the opened library needs, here in the other order (RTLD_DEEPBIND). So it is
given a library to open that consists of needs alone, in the format ELF (System V gABI, chapters 4 and 5): a header, the program
headers, the needed names, a table of symbols with only its null entry (and no hash table, as nothing is found in it), and the
dynamic section, which says where these are. Whoever opens the same files again shares them.
"""

from __future__ import annotations

import ctypes
import os
from struct import calcsize, pack
from tempfile import NamedTemporaryFile

HEADER, SEGMENT, ENTRY = "<16sHHIQQQIHHHHHH", "<IIQQQQQQ", "<QQ"
MAGIC = b"\x7fELF\2\1\1"                                          # 64 bits, little-endian, version 1
SHARED_OBJECT, X86_64 = 3, 62
LOAD, DYNAMIC, STACK, READ_AND_WRITE = 1, 2, 0x6474E551, 6
END, NEEDED, NAMES, SYMBOLS, SIZE_OF_NAMES, SIZE_OF_A_SYMBOL = 0, 1, 5, 6, 10, 11


def open_apart(libraries: list[str]) -> ctypes.CDLL:
    """The functions of these shared libraries (paths; Linux on x86-64, with glibc).

    Raises OSError if one is missing or lacks a function, and without a folder for temporary files.
    """
    with NamedTemporaryFile(suffix=".so") as file:                 # only its name must be new: the loader keeps what it read
        file.write(_needing(libraries))
        file.flush()
        return ctypes.CDLL(file.name, os.RTLD_LOCAL | os.RTLD_DEEPBIND)


def _needing(libraries: list[str]) -> bytes:
    """A shared library that needs these and holds nothing."""
    names, needs = b"\0", []
    for library in libraries:
        needs.append((NEEDED, len(names)))
        names += os.fsencode(library) + b"\0"
    names += bytes(-len(names) % 8)
    symbols = bytes(24)
    at_names = calcsize(HEADER) + 3 * calcsize(SEGMENT)
    at_symbols = at_names + len(names)
    at_dynamic = at_symbols + len(symbols)
    places = [(NAMES, at_names), (SIZE_OF_NAMES, len(names)), (SYMBOLS, at_symbols), (SIZE_OF_A_SYMBOL, len(symbols))]
    dynamic = b"".join(pack(ENTRY, *entry) for entry in [*needs, *places, (END, 0)])
    size = at_dynamic + len(dynamic)
    segments = [pack(SEGMENT, kind, READ_AND_WRITE, at, at, at, length, length, align) for kind, at, length, align in [
        (LOAD, 0, size, 4096), (DYNAMIC, at_dynamic, len(dynamic), 8), (STACK, 0, 0, 16)]]
    header = pack(HEADER, MAGIC, SHARED_OBJECT, X86_64, 1, 0, calcsize(HEADER), 0, 0, calcsize(HEADER), calcsize(SEGMENT),
                  len(segments), 0, 0, 0)
    return header + b"".join(segments) + names + symbols + dynamic
