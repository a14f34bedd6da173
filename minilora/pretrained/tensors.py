"""Safetensors files larger than memory: read a tensor at a time, and written a tensor at a time.

A file is 8 bytes (the header's length), the header (JSON: name -> dtype, shape, place), and the tensors' bytes without gaps.
A folder that comes from outside is not believed: its header is checked against the file by the safetensors library itself,
and an index of shards may name nothing outside its folder. A folder that we write gets its name when it is whole.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import safetensors

from ..backend.files import whole_files
from ..lora.peft_format import DTYPES, decode

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
ROOM = 160                                                 # bytes of a tensor's entry in a header, its name aside, at most
CHUNK = 1 << 24


@dataclass(frozen=True)
class Place:
    """Where a tensor lies in its file: bytes start to stop, and what they mean."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


class TensorFile:
    """One safetensors file. `places` in the file's order; nothing but the header is read before a tensor is asked for.

    Raises FileNotFoundError, and ValueError, naming the file, for one that is truncated or whose header lies.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        try:
            with safetensors.safe_open(self.path, framework="numpy") as file:      # checks sizes, shapes, gaps and overlaps
                self.metadata: dict[str, str] = file.metadata() or {}
            with open(self.path, "rb") as raw:
                size = int.from_bytes(raw.read(8), "little")
                header = json.loads(raw.read(size))
        except FileNotFoundError:
            raise FileNotFoundError(f"{self.path} does not exist: expected a safetensors file") from None
        except (safetensors.SafetensorError, ValueError, OSError) as error:
            raise ValueError(f"{self.path} is not a whole safetensors file ({error}): copy or download it again") from None
        entries = {key: Place(e["dtype"], tuple(e["shape"]), *(8 + size + offset for offset in e["data_offsets"]))
                   for key, e in header.items() if key != "__metadata__"}
        self.places = dict(sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)))

    def array(self, key: str) -> np.ndarray:
        """One tensor; BF16 becomes float32, exactly. Raises ValueError for other dtypes and for values not finite."""
        place = self.places[key]
        return decode(self.path, key, place.dtype, b"".join(self.chunks(key))).reshape(place.shape)

    def chunks(self, key: str) -> Iterator[bytes]:
        """The bytes of one tensor, as they are."""
        place = self.places[key]
        left = place.stop - place.start
        with open(self.path, "rb") as raw:
            raw.seek(place.start)
            while left > 0:
                data = raw.read(min(left, CHUNK))
                if not data:
                    raise ValueError(f"{self.path} became shorter while it was read: run this again when nothing writes to it")
                left -= len(data)
                yield data


class TensorWriter:
    """A safetensors file, written a tensor at a time, in the order of `add`.

    The header stands first but is known last, so room is left for it (as much as `keys` can need, every name that may be
    added), and what it does not need is filled with spaces, as the format allows.
    """

    def __init__(self, path: Path, keys: Iterable[str], metadata: dict[str, str] | None = None) -> None:
        self.header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
        room = len(json.dumps(self.header)) + sum(len(json.dumps(key)) + ROOM for key in keys)
        self.room, self.size = -(-room // 8) * 8, 0
        self.file: BinaryIO = open(path, "wb")             # noqa: SIM115  (closed by __exit__)
        self.file.seek(8 + self.room)

    def add(self, key: str, array: np.ndarray, dtype: str) -> None:
        """Write one tensor as `dtype`, rounded to nearest even. Raises ValueError where a finite value overflows it."""
        self.add_chunks(key, dtype, array.shape, [encode(key, array, dtype).tobytes()])

    def add_chunks(self, key: str, dtype: str, shape: tuple[int, ...], chunks: Iterable[Any]) -> None:
        """Write one tensor from its bytes."""
        start = self.size
        for chunk in chunks:
            self.size += self.file.write(chunk)
        self.header[key] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, self.size]}

    def __enter__(self) -> TensorWriter:
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        with self.file:
            if kind is None:
                text = json.dumps(self.header, separators=(",", ":")).encode()
                self.file.seek(0)
                self.file.write(self.room.to_bytes(8, "little") + text + b" " * (self.room - len(text)))


def encode(key: str, array: np.ndarray, dtype: str) -> np.ndarray:
    """The array in a file's dtype and memory order; BF16 as its 16 bits, rounded to nearest, ties to even."""
    with np.errstate(over="ignore"):
        values = np.ascontiguousarray(array, "<f4" if dtype == "BF16" else DTYPES[dtype])
    if dtype == "BF16":
        bits = values.view(np.uint32)
        values = ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)
    whole = (values & 0x7F80) != 0x7F80 if dtype == "BF16" else np.isfinite(values)
    if not whole.all():
        raise ValueError(f"{key}: got values too large for {dtype}, expected finite ones: the update is too strong for this "
                         "dtype, lower its scale or take a float32 base")
    return values


class Checkpoint:
    """A folder of weights: model.safetensors, or shards with their index. `files`: tensor name -> the file that has it.

    Raises FileNotFoundError without either, ValueError for damaged files, and for an index that names files outside the
    folder, tensors that are not where it says, or not all that the shards hold.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        if (self.folder / INDEX).exists():
            names, weight_map = self._index()
        elif (self.folder / SINGLE).exists():
            names, weight_map = [SINGLE], None
        else:
            raise FileNotFoundError(f"{self.folder} has neither {SINGLE} nor {INDEX}: expected the folder of a model, saved as "
                                    "safetensors")
        self.shards = {name: TensorFile(self.folder / name) for name in names}
        self.files = {key: file for file in self.shards.values() for key in file.places}
        if weight_map is not None and weight_map != {k: f.path.name for k, f in self.files.items()}:
            held = {k: f.path.name for k, f in self.files.items()}
            odd = min(weight_map.items() ^ held.items())[0]
            raise ValueError(f"{self.folder / INDEX}: {odd!r} is in {held.get(odd, 'no file')}, the index says "
                             f"{weight_map.get(odd, 'nothing of it')}: copy or download the folder again")

    def _index(self) -> tuple[list[str], dict[str, str]]:
        path = self.folder / INDEX
        try:
            weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
            names = sorted(set(weight_map.values()))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{path} has no weight_map of names to files ({error}): download the folder again") from None
        for name in names:
            if not isinstance(name, str) or Path(name).name != name or "\\" in name or not name.endswith(".safetensors"):
                raise ValueError(f"{path} points to {name!r}, expected plain names of .safetensors files in its own folder")
        return names, weight_map

    def array(self, key: str) -> np.ndarray:
        """One tensor; see TensorFile.array."""
        return self.files[key].array(key)

    def place(self, key: str) -> Place:
        """The dtype and shape of one tensor."""
        return self.files[key].places[key]

    def config(self) -> dict[str, Any]:
        """config.json, or {} if there is none. Raises ValueError if it is not a JSON object."""
        path = self.folder / "config.json"
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} is not JSON ({error}): copy or download it again") from None
        if not isinstance(found, dict):
            raise ValueError(f"{path} holds a {type(found).__name__}, expected an object: copy or download it again")
        return found


# What marks a folder as a model or an adapter. They get their place last, and an older one is removed first.
_MARKS = ("adapter_config.json", "config.json", INDEX)


@contextmanager
def new_folder(out: str | os.PathLike[str], inputs: Iterable[str | os.PathLike[str]] = (),
               force: bool = False) -> Iterator[Path]:
    """A temporary folder, whose files get their place in `out` when the block ends well, and are removed when it does not.

    force: `out` may hold files; weights and configs of an older model or adapter there are replaced, other files stay.
    Raises, before any work, ValueError if `out` is a file, not empty (without force), or one of the `inputs`, and OSError if it
    cannot be written.
    """
    out = Path(out)
    for source in map(Path, inputs):
        if out.exists() and source.exists() and out.samefile(source):
            raise ValueError(f"the output {out} is also an input: give another folder")
    if out.exists() and not out.is_dir():
        raise ValueError(f"the output {out} is a file, expected a folder: give another name")
    old = sorted(out.iterdir()) if out.is_dir() else []
    if old and not force:
        raise ValueError(f"the output {out} is not empty (it has {old[0].name}): give a new folder, or force to replace what "
                         "is there (--force)")
    stale = [path.name for path in old if path.suffix == ".safetensors"]
    with whole_files(out, "the result", marks=_MARKS, stale=stale) as part:
        yield part
