"""Adapter folders a module at a time, whatever their model: opened without reading a value, written as they are computed.

What is said of ΔW = s·B@A needs only its thin factors: an inner product of two updates is
⟨B₁A₁, B₂A₂⟩ = Σ (B₁ᵀB₂) ⊙ (A₁A₂ᵀ), and from inner products follow norms and distances.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.std import tqdm

from ..backend.parallel import in_order
from ..lora.peft_format import (
    CONFIG,
    DTYPES,
    PREFIX,
    WEIGHTS,
    config_text,
    existing,
    leaves_of,
    module_entry,
    modules_of,
    read_config,
    to_lora_config,
)
from ..lora.svd import singular_values
from ..methods.lora_bias import SURPLUS
from ..rank.report import text_table
from .tensors import TensorFile, TensorWriter, encode

WIDEST = ("F64", "F32", "BF16", "F16")


class AdapterFolder(Mapping[str, dict[str, Any]]):
    """Module path -> its entry as `read_adapter` gives it, read when asked for; with "dtype", the file's.

    `options` is the config. known: the biases that the caller knows how to treat, as of `read_adapter`.
    Config, keys, ranks and shapes are checked when the folder is opened, values when they are read.
    Raises as `read_adapter` does.
    """

    def __init__(self, directory: str | os.PathLike[str], known: Collection[str] = ("lora_bias",)) -> None:
        self.folder = existing(directory)
        self.options = read_config(self.folder / CONFIG, known)
        self._config, self._file = to_lora_config(self.options), TensorFile(self.folder / WEIGHTS)
        self._keys = modules_of(self.folder / WEIGHTS, [key for key in self._file.places if not key.endswith(SURPLUS)])
        nothing = np.float32(0)                            # arrays of the right shapes that take no memory
        self.shapes = {path: self._entry(path, lambda key: np.broadcast_to(nothing, self._file.places[key].shape))
                       for path in self._keys}

    def _entry(self, path: str, array: Callable[[str], np.ndarray]) -> dict[str, Any]:
        keys = self._keys[path]
        entry = module_entry(path, {leaf: array(key) for leaf, key in keys.items()}, self.options, self._config)
        return entry | {"dtype": widest(self._file.places[key].dtype for key in keys.values())}

    def __getitem__(self, path: str) -> dict[str, Any]:
        return self._entry(path, self._file.array)

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


def widest(dtypes: Iterable[str]) -> str:
    """The dtype that holds them all; F16 and BF16 together make F32."""
    found = set(dtypes)
    if found == {"F16", "BF16"}:
        return "F32"
    return next((dtype for dtype in WIDEST if dtype in found), "F32")


def write_modules(folder: Path, options: dict[str, Any], dtypes: Mapping[str, str], compute: Callable[[str], Any],
                  what: str, progress: bool) -> list[tuple[str, Any]]:
    """Compute the modules side by side and write them as they come: compute(path) -> (entry, facts); returns the facts.

    dtypes: module path -> dtype of its tensors. Wide ones come first in the file, so that every tensor lies aligned.
    """
    paths = sorted(dtypes, key=lambda path: (-np.dtype(DTYPES[dtypes[path]]).itemsize, path))
    facts, factors, whole, lora_bias = [], dict[str, tuple[int, float]](), set[str](), False
    keys = [f"{PREFIX}{path}.lora_embedding_A" for path in paths for _ in range(3)]
    with TensorWriter(folder / WEIGHTS, keys, {"format": "pt"}) as file:
        for path, (entry, said) in zip(paths, tqdm(in_order(compute, paths), what, len(paths), delay=2, leave=False,
                                                   disable=None if progress else True)):
            for leaf, array in leaves_of(entry).items():
                file.add(f"{PREFIX}{path}.{leaf}", array, dtypes[path])
            if "A" in entry:
                factors[path] = entry["A"].shape[0], float(entry["scale"])
                lora_bias |= "lora_bias" in entry
            else:
                whole.add(path)
            facts.append((path, said))
    (folder / CONFIG).write_bytes(config_text(options | {"lora_bias": lora_bias}, factors, whole))
    return sorted(facts)


def stored(entry: dict[str, Any], dtype: str) -> dict[str, Any]:
    """The factors as the file will hold them, so that what is measured is what is written."""
    rounded = {}
    for name in ("A", "B", "lora_bias"):
        if name in entry:
            rounded[name] = value = encode(name, entry[name], dtype)
            if dtype == "BF16":
                rounded[name] = (value.astype(np.uint32) << 16).view(np.float32)
    return entry | rounded


def inner(B1: np.ndarray, A1: np.ndarray, B2: np.ndarray, A2: np.ndarray) -> float:  # (d, r), (r, k), (d, q), (q, k)
    """⟨B₁A₁, B₂A₂⟩ = Σ (B₁ᵀB₂) ⊙ (A₁A₂ᵀ), of float64 factors."""
    return float(np.vdot(B1.T @ B2, A1 @ A2.T))


def norm(B: np.ndarray, A: np.ndarray) -> float:  # (d, r), (r, k)
    """‖B@A‖_F, for factors whose product has nothing that cancels."""
    B, A = B.astype(np.float64), A.astype(np.float64)
    return max(0.0, inner(B, A, B, A)) ** 0.5


def distance(B1: np.ndarray, A1: np.ndarray, B2: np.ndarray, A2: np.ndarray, size: float) -> float:
    """‖B₁A₁ - B₂A₂‖_F, where size = ‖B₁A₁‖_F is known, from size² - 2⟨B₁A₁, B₂A₂⟩ + ‖B₂A₂‖².

    That sum is off by about 1e-16 of size². Where less than 1e-5 of size is left, the slower SVD of the factors side by side,
    [B₁, -B₂] [A₁; A₂], takes its place.
    """
    B1, A1, B2, A2 = (np.asarray(factor, np.float64) for factor in (B1, A1, B2, A2))
    found = max(0.0, size**2 - 2 * inner(B1, A1, B2, A2) + inner(B2, A2, B2, A2)) ** 0.5
    if found > 1e-5 * size:
        return found
    return float(np.linalg.norm(singular_values(np.concatenate([B1, -B2], axis=1), np.concatenate([A1, A2]))))


def relative(error: float, size: float) -> float | None:
    """error / size; None where there is nothing to compare with."""
    return error / size if size else None


@dataclass
class EditReport:
    """What an operation on files did. modules: path -> numbers; summary: numbers of all together; notes: lines to read."""

    modules: dict[str, dict[str, Any]]
    summary: dict[str, Any]
    notes: list[str] = field(default_factory=list)
    columns: dict[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """{"modules", "summary", "notes"}, ready for JSON."""
        return {"modules": self.modules, "summary": self.summary, "notes": self.notes}

    def table(self) -> str:
        """The modules as rows of text, the summary, and the notes."""
        total = ", ".join(f"{key.replace('_', ' ')} {f'{value:.4g}' if isinstance(value, float) else value}"
                          for key, value in self.summary.items() if value is not None)
        return "\n".join([*text_table(self.columns, self.modules), total, *(f"note: {note}" for note in self.notes)])

    __str__ = table
