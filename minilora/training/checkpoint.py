"""Checkpoints of a run: one safetensors file that holds all a run needs to go on bit for bit. Nothing is pickled.

The arrays (trainable parameters, the optimiser's state, the best values so far) are the file's tensors; the rest (step,
history, the states of all generators) is JSON in its metadata. One file, written under a temporary name and then renamed:
a run that dies while it writes leaves the checkpoint before it whole.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from ..backend import device_of, to_device

FILE = "checkpoint.safetensors"
FORMAT = "minilora checkpoint 1"


def save_checkpoint(directory: str | Path, arrays: Mapping[str, np.ndarray], facts: Mapping[str, Any]) -> Path:
    """Write host arrays and JSON-ready facts to DIRECTORY/checkpoint.safetensors, replacing what was there at once.

    Raises OSError if it cannot be written, such as on a full disk; then what was there is still whole.
    """
    target = Path(directory) / FILE
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{FILE}.{os.getpid()}")
    try:
        save_file(dict(arrays), partial, metadata={"format": FORMAT, "facts": json.dumps(facts)})
        os.replace(partial, target)
    except SafetensorError as error:
        raise OSError(f"cannot write the checkpoint to {directory} ({error}): make room, or choose another folder") from None
    finally:
        partial.unlink(missing_ok=True)
    return target


def load_checkpoint(directory: str | Path) -> tuple[dict[str, np.ndarray], dict[str, Any]] | None:
    """(arrays, facts) of the checkpoint in DIRECTORY, or None if there is none.

    Raises ValueError, naming the file, for one that is damaged, foreign, or holds values that are not finite.
    """
    path = Path(directory) / FILE
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no iteration without keys)
        facts = json.loads(metadata.get("facts", "null"))
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error}): delete it to start the run again") from None
    if metadata.get("format") != FORMAT or not isinstance(facts, dict):
        raise ValueError(f"{path}: got format {metadata.get('format')!r}, expected {FORMAT!r}; choose another directory")
    for name, array in arrays.items():
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise ValueError(f"{path}: {name} has values that are not finite; delete it to start the run again")
    return arrays, facts


def load_parameters(parameters: Mapping[str, Any], arrays: Mapping[str, np.ndarray], where: str) -> None:
    """Write arrays into parameters of the same paths, in place. Raises ValueError for other paths, shapes or dtypes."""
    if parameters.keys() != arrays.keys():
        odd = sorted(parameters.keys() ^ arrays.keys())[0]
        raise ValueError(f"{where} does not fit the model: {odd!r} is only on one side; the trainable parameters must be those "
                         "of the run that was saved")
    for path, p in parameters.items():
        if (p.shape, p.dtype) != (arrays[path].shape, arrays[path].dtype):
            raise ValueError(f"{where}: {path} is {arrays[path].shape} {arrays[path].dtype}, expected {p.shape} {p.dtype}")
    for path, p in parameters.items():
        p.data[...] = to_device(arrays[path], device_of(p.data).name)


def generator_states(model: Any) -> dict[str, Any]:
    """Path -> state of every NumPy generator of a model, as plain numbers and lists."""
    return {path: _plain(rng.bit_generator.state) for path, rng in model.named_generators()}


def load_generator_states(model: Any, states: Mapping[str, Any], where: str) -> None:
    """Set every generator of a model. Raises ValueError if the paths or the kinds of generator differ."""
    own = dict(model.named_generators())
    if own.keys() != states.keys():
        odd = sorted(own.keys() ^ states.keys())[0]
        raise ValueError(f"{where} does not fit the model: the generator {odd!r} is only on one side")
    for path, rng in own.items():
        try:
            rng.bit_generator.state = states[path]
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{where}: the state of generator {path!r} does not fit ({error})") from None


def _plain(state: Any) -> Any:
    """A generator's state with lists for arrays: some bit generators keep arrays in it."""
    if isinstance(state, dict):
        return {key: _plain(value) for key, value in state.items()}
    return state.tolist() if isinstance(state, np.ndarray) else state
