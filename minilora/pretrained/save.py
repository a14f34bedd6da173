"""save_pretrained: a model as a folder that transformers, and load_pretrained, read.

Tensor by tensor, into a temporary folder first: an interrupted write leaves what was there before.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ..backend import to_host
from ..backend.files import whole_files
from ..methods.blocks import BlockWeight
from ..nn import Parameter, Transformer
from ..nn.names import file_keys, stored_transposed
from .hf_config import to_hf
from .safetensors_file import INDEX, WEIGHTS, WRITTEN, write_safetensors
from .tokenizer import Tokenizer


def save_pretrained(model: Transformer, tokenizer: Tokenizer | None, directory: str | os.PathLike[str], *,
                    dtype: str = "float32") -> None:
    """Write config.json, model.safetensors and, with a tokenizer, its files.

    The names are those of cfg.model_type's architecture, so transformers loads the folder; without a model_type they are ours.
    dtype: "float32", "float64", "float16" or "bfloat16" (rounded to nearest, ties to even).

    Raises ValueError for a model with adapters (merge_and_unload it first), for one that its model_type cannot be, and for
    values that are not finite; OSError if the folder cannot be written. Then the folder is as it was.
    """
    if dtype not in WRITTEN:
        raise ValueError(f"dtype {dtype!r}: expected one of {', '.join(WRITTEN)}")
    config = to_hf(model.cfg, dtype)
    if tokenizer is not None:
        config = {f"{name}_id": tokenizer.token_id(name) for name in ("bos_token", "eos_token", "pad_token")} | config
    parameters, tensors = dict(model.named_parameters()), []
    if odd := [path for path, module in model.named_modules() if getattr(module, "adaptation", None) is not None]:
        raise ValueError(f"{odd[0]} has an adapter, expected a plain model: save merge_and_unload(model), or save_adapter it")
    if odd := [path for path, module in model.named_modules() if isinstance(module, BlockWeight)]:
        raise ValueError(f"{odd[0]} is quantised, expected dense weights: load or build the model without quantising it")
    for key, paths in sorted(file_keys(model.cfg, parameters).items()):
        tensors.append((key, *_tensor(model, key, [parameters[path] for path in paths])))
    with whole_files(Path(directory), "a model", marks=["config.json"], stale=[INDEX]) as folder:    # of an older one in shards
        write_safetensors(folder / WEIGHTS, tensors, dtype)
        (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
        for name, text in (tokenizer.save() if tokenizer is not None else {}).items():
            (folder / name).write_text(text, encoding="utf-8")


def _tensor(model: Transformer, key: str, parts: list[Parameter]) -> tuple[tuple[int, ...], Callable[[], np.ndarray]]:
    """(shape, function that makes the array) of a file's tensor: parameters one below the other, in the file's layout."""
    transposed = key.endswith(".weight") and stored_transposed(model.cfg, key.removesuffix(".weight"))
    shape: Any = (sum(part.shape[0] for part in parts), *parts[0].shape[1:])

    def make() -> np.ndarray:
        arrays = [to_host(part.data) for part in parts]
        array = arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
        return array.T if transposed else array

    return shape[::-1] if transposed else shape, make
