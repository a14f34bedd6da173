"""Safetensors as a model's files are read and written: tensor by tensor, so that no second copy of a model is ever in memory.

A file is eight bytes n, then n bytes of JSON (name -> dtype, shape, first and last byte), then the numbers. It is mapped into
memory and read by blocks of rows; what was read is given back to the system at once.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import struct
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import safetensors

from ..lora.peft_format import DTYPES, from_bf16
from .hf_config import read_json

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
WRITTEN = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "float64": "F64"}


class Source(Protocol):
    """Where a model's numbers come from: a name -> shape table, and rows of a tensor as floating-point numbers."""

    shapes: dict[str, tuple[int, ...]]

    def rows(self, key: str, start: int, stop: int, transposed: bool = False) -> np.ndarray:
        """Rows start … stop of a tensor (transposed: of its transpose), checked to be finite. The caller copies them."""

    def release(self) -> None:
        """Forget what was read: views that rows() returned are no longer used."""


class SafetensorsFile:
    """One file, its header checked, its numbers mapped. Raises ValueError for a file that is not whole or lies about itself."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with safetensors.safe_open(path, framework="numpy"):         # checks the header against the file's size
                pass
            with open(path, "rb") as file:
                (n,) = struct.unpack("<Q", file.read(8))
                header = json.loads(file.read(n))
                self.map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (safetensors.SafetensorError, ValueError, struct.error) as error:
            raise ValueError(f"{path} is not a whole safetensors file ({error}): copy or download it again") from None
        header.pop("__metadata__", None)
        self.entries: dict[str, dict[str, Any]] = header
        self.shapes = {key: tuple(entry["shape"]) for key, entry in header.items()}
        self.start = 8 + n

    def rows(self, key: str, start: int, stop: int, transposed: bool = False) -> np.ndarray:
        entry = self.entries[key]
        if entry["dtype"] not in DTYPES:
            raise ValueError(f"{self.path}: {key} has dtype {entry['dtype']}, expected one of {', '.join(DTYPES)}")
        offset = self.start + entry["data_offsets"][0]
        array = np.frombuffer(self.map, DTYPES[entry["dtype"]], math.prod(entry["shape"]), offset).reshape(entry["shape"])
        array = (array.T if transposed else array)[start:stop]
        array = from_bf16(array) if entry["dtype"] == "BF16" else array
        return finite(array, f"{self.path}: {key}")

    def release(self) -> None:
        if hasattr(mmap, "MADV_DONTNEED"):   # not on Windows, where only the count of memory differs
            self.map.madvise(mmap.MADV_DONTNEED)


class Sharded:
    """The files that an index names, as one source. Raises ValueError for an index that does not fit its files."""

    def __init__(self, index: Path) -> None:
        where = read_json(index).get("weight_map")
        if not isinstance(where, dict) or not all(isinstance(name, str) for name in where.values()):
            raise ValueError(f"{index}: weight_map is missing or no table of tensors and files: copy or download it again")
        for name in sorted(set(where.values())):
            if name in ("", ".", "..") or Path(name).name != name or "\\" in name:
                raise ValueError(f"{index} names the file {name!r}, expected a file beside it: do not use this checkpoint")
            if not (index.parent / name).is_file():
                raise ValueError(f"{index} names the file {name!r}, which is not there: copy or download the whole folder")
        self.files = {name: SafetensorsFile(index.parent / name) for name in sorted(set(where.values()))}
        self.owner = {key: file for file in self.files.values() for key in file.shapes}
        odd = sorted(where.keys() ^ self.owner.keys()) or [k for k in where if self.files[where[k]] is not self.owner[k]]
        if odd:
            raise ValueError(f"{index} and its files do not agree about {odd[0]}: copy or download the whole folder")
        self.shapes = {key: file.shapes[key] for key, file in self.owner.items()}

    def rows(self, key: str, start: int, stop: int, transposed: bool = False) -> np.ndarray:
        return self.owner[key].rows(key, start, stop, transposed)

    def release(self) -> None:
        for file in self.files.values():
            file.release()


def open_weights(folder: Path) -> SafetensorsFile | Sharded:
    """The weights of a folder: model.safetensors, or the files of model.safetensors.index.json.

    Raises FileNotFoundError if there are none, saying what to do with a folder of pickled ones; ValueError as the classes.
    """
    if (folder / WEIGHTS).is_file():
        return SafetensorsFile(folder / WEIGHTS)
    if (folder / INDEX).is_file():
        return Sharded(folder / INDEX)
    pickled = sorted(path.name for path in folder.glob("*.bin"))
    advice = (f"{pickled[0]} is not opened, because unpickling runs code: load it in transformers and save_pretrained it once"
              if pickled else "expected a folder that transformers or save_pretrained wrote")
    raise FileNotFoundError(f"{folder} has neither {WEIGHTS} nor {INDEX}: {advice}")


def write_safetensors(path: Path, tensors: Iterable[tuple[str, tuple[int, ...], Callable[[], np.ndarray]]], dtype: str) -> None:
    """Write (name, shape, function that makes the array) one after the other, each made only when its turn comes.

    The file is the last to be renamed, by the caller: `path` is a temporary name. Raises ValueError for values that are not
    finite, or not in the dtype: "float32", "float64", "float16" or "bfloat16".
    """
    tensors, stop = list(tensors), 0
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for key, shape, _ in tensors:
        start, stop = stop, stop + math.prod(shape) * np.dtype(DTYPES[WRITTEN[dtype]]).itemsize
        header[key] = {"dtype": WRITTEN[dtype], "shape": list(shape), "data_offsets": [start, stop]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for key, _, make in tensors:
            for block in encoded(make(), dtype, key):
                file.write(block)
        file.flush()
        os.fsync(file.fileno())


def encoded(array: np.ndarray, dtype: str, key: str) -> Iterator[Any]:
    """The bytes of an array in a file's dtype, by blocks of about a million numbers."""
    for start, stop in row_blocks(array.shape):
        block = np.ascontiguousarray(finite(array[start:stop], key))
        with np.errstate(over="ignore"):
            bits = to_bf16(block) if dtype == "bfloat16" else block.astype(DTYPES[WRITTEN[dtype]])
        finite(from_bf16(bits) if dtype == "bfloat16" else bits, f"{key} in {dtype}")
        yield bits.tobytes()


def to_bf16(array: np.ndarray) -> np.ndarray:              # float -> uint16
    """The 16 bits of the BF16 nearest to each number, ties to the even one."""
    with np.errstate(over="ignore"):
        bits = np.ascontiguousarray(array, dtype=np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def row_blocks(shape: tuple[int, ...], numbers: int = 1 << 20) -> Iterator[tuple[int, int]]:
    """(first, last + 1) rows of blocks with about so many numbers."""
    rows = shape[0] if shape else 1
    step = max(1, numbers * rows // max(1, math.prod(shape)))
    return ((start, min(start + step, rows)) for start in range(0, rows, step))


def finite(array: np.ndarray, what: str) -> np.ndarray:
    """The array. Raises ValueError if it has NaN or infinite values."""
    if not np.isfinite(array).all():
        raise ValueError(f"{what} has NaN or infinite values, expected finite numbers: the training that made them diverged, "
                         "or they are too large for the dtype; take an earlier checkpoint, or a wider dtype")
    return array
