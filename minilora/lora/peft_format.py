"""PEFT's adapter folder as plain arrays: read, checked and written without PyTorch and without a model.

adapter_config.json says which LoRA, where and at what scale; adapter_model.safetensors holds the values, under the keys
"base_model.model." + the module's path in the architecture's files + ".lora_A.weight" and so on. A folder comes from
outside, so nothing in it is believed before it is checked. A config's option that we lack is an error only where its value
is not PEFT's default, since else it changes nothing.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections import Counter
from collections.abc import Collection, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from ..backend.files import whole_files
from .config import LoraConfig
from .peft_options import LACKING, NEUTRAL, OPTIONS

CONFIG, WEIGHTS, NOTES, PREFIX = "adapter_config.json", "adapter_model.safetensors", "notes.txt", "base_model.model."
DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}
LEAVES = ("lora_A.weight", "lora_B.weight", "lora_B.bias", "lora_embedding_A", "lora_embedding_B", "weight", "bias",
          "base_layer.weight", "base_layer.bias")
KEY = re.compile(rf"{re.escape(PREFIX)}(.+?)\.({'|'.join(map(re.escape, LEAVES))})")

BASE_CHANGING_INITS = re.compile("pissa|olora|corda|lora_ga|loftq")       # such an update belongs to a changed base
KEPT = ("task_type", "base_model_name_or_path", "fan_in_fan_out", "lora_dropout", "use_rslora", "init_lora_weights",
        "lora_bias", "module_names")                       # what a written config takes over; the modules say the rest


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _list_of(kind: type, value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(v, kind) for v in value)


FORMS = {                                                  # what the value must be, where LoraConfig does not check it
    **dict.fromkeys(("lora_alpha", "lora_dropout"), (_number, "a number")),
    "use_rslora": (lambda v: isinstance(v, bool), "true or false"),
    "init_lora_weights": (lambda v: isinstance(v, (bool, str)), "true, false or a name"),
    **dict.fromkeys(("target_modules", "exclude_modules"),
                    (lambda v: isinstance(v, str) or _list_of(str, v), "a regex or a list of names")),
    "rank_pattern": (lambda v: isinstance(v, dict), "an object of names and ranks"),
    "alpha_pattern": (lambda v: isinstance(v, dict) and all(map(_number, v.values())), "an object of names and numbers"),
    "modules_to_save": (lambda v: _list_of(str, v), "a list of names"),
    "layers_to_transform": (lambda v: isinstance(v, int) or _list_of(int, v), "layer numbers"),
}


def read_adapter(directory: str | os.PathLike[str], known: Collection[str] = (),
                 ) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """A PEFT LoRA folder as (config, modules), on the host.

    config: the file's keys, and PEFT's defaults for those it leaves out. modules: the module's path in the file -> {"A"
    (r, in), "B" (out, r), "scale" s, "embedding" bool}: the update of its weight (out, in), or of an embedding table (V, D),
    is s·B@A. A module that was saved whole has {"weight"} and perhaps {"bias"} instead, in the file's layout; one whose base
    PEFT saved along has "base_weight" too. F16 stays F16; BF16 becomes float32, exactly. known: as of read_config; with
    "lora_bias" entries have "lora_bias" (out,), of B, with "bias" each trained bias is a "base_bias".

    Raises FileNotFoundError if the folder or a file is missing, and ValueError for anything in them that is not as it
    should be.
    """
    folder = existing(directory)
    options = read_config(folder / CONFIG, known)
    config, tensors = to_lora_config(options), read_safetensors(folder / WEIGHTS)
    return options, {path: module_entry(path, {leaf: tensors[key] for leaf, key in keys.items()}, options, config)
                     for path, keys in modules_of(folder / WEIGHTS, tensors).items()}


def existing(directory: str | os.PathLike[str]) -> Path:
    """The folder of an adapter. Raises FileNotFoundError if it, or one of its two files, is missing."""
    folder = Path(directory)
    for part in (folder, folder / CONFIG, folder / WEIGHTS):
        if not part.exists():
            raise FileNotFoundError(f"{part} does not exist: expected a folder with {CONFIG} and {WEIGHTS}, as save_adapter "
                                    "and PEFT's save_pretrained write it")
    return folder


def kind_of(folder: Path) -> str:
    """PEFT's peft_type of a folder, or of a LORA "DORA" with use_dora, "LORA_BIAS" with biases; "" if it cannot be read."""
    with suppress(OSError, ValueError, RecursionError, AttributeError):
        found = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        biased = found.get("lora_bias") is True or found.get("bias") in ("lora_only", "all")
        own = "DORA" if found.get("use_dora") is True else "LORA_BIAS" if biased else "LORA"
        return own if found.get("peft_type") == "LORA" else str(found.get("peft_type"))
    return ""


def modules_of(path: Path, keys: Iterable[str]) -> dict[str, dict[str, str]]:
    """Module path -> {leaf: key} of the keys of a weights file. Raises ValueError for keys of another form, or none."""
    modules = dict[str, dict[str, str]]()
    for key in keys:
        match = KEY.fullmatch(key)
        if match is None:
            raise ValueError(f'{path}: unexpected key {key!r}, expected "{PREFIX}MODULE.lora_A.weight" and the like: is this a '
                             "LoRA adapter in PEFT's format?")
        modules.setdefault(match[1], {})[match[2]] = key
    if not modules:
        raise ValueError(f"{path} holds no tensors: save the adapter again")
    return modules


def write_adapter(directory: str | os.PathLike[str], config: dict[str, Any], modules: dict[str, dict[str, Any]],
                  target_modules: list[str] | None = None, note: str = "") -> None:
    """Write a folder that PEFT and read_adapter read: `modules` as read_adapter returns them, and a config for the rest.

    Ranks, alphas, modules_to_save and targets are those of the modules. target_modules: a shorter way to say these targets
    than by their whole paths. note: what a reader of the folder should know, for notes.txt. An interrupted write leaves the
    old adapter or none. Raises ValueError without a low-rank module, OSError if the folder cannot be written.
    """
    tensors = {f"{PREFIX}{path}.{leaf}": np.ascontiguousarray(array) for path, entry in modules.items()
               for leaf, array in leaves_of(entry).items()}
    text = config_text(config, {path: (e["A"].shape[0], e["scale"]) for path, e in modules.items() if "A" in e},
                       {re.sub(r"^classifier\..*", "classifier", path)              # RoBERTa's has two layers
                        for path, e in modules.items() if "A" not in e}, target_modules)
    write_folder(Path(directory), tensors, text, note)


def write_folder(folder: Path, tensors: dict[str, np.ndarray], text: bytes, note: str = "") -> None:
    """Write the files of an adapter, as write_adapter says."""
    contents = {CONFIG: text} | ({NOTES: note.encode()} if note else {})
    contents[WEIGHTS] = safetensors.numpy.save(tensors, metadata={"format": "pt"})
    same = (old := folder / CONFIG).is_file() and old.read_bytes() == text         # then an adapter is always there
    with whole_files(folder, "an adapter", marks=[] if same else [CONFIG], stale=[NOTES]) as part:
        for file, content in contents.items():
            (part / file).write_bytes(content)


def leaves_of(entry: dict[str, Any]) -> dict[str, np.ndarray]:
    """The tensors of one module under the last parts of their keys, in the file's layout: the inverse of `module_entry`."""
    if "A" not in entry:
        return {leaf: entry[leaf] for leaf in ("weight", "bias") if leaf in entry}
    if entry.get("embedding"):
        return {"lora_embedding_A": entry["B"].T, "lora_embedding_B": entry["A"].T}
    bias = {"lora_B.bias": entry["lora_bias"]} if "lora_bias" in entry else {}
    return {"lora_A.weight": entry["A"], "lora_B.weight": entry["B"]} | bias


def config_text(config: dict[str, Any], factors: dict[str, tuple[int, float]], whole: Collection[str],
                target_modules: list[str] | None = None) -> bytes:
    """adapter_config.json for modules of these (rank, scale), and others saved whole. Raises ValueError without factors."""
    if not factors:
        raise ValueError(f"no module has a low-rank update, got {', '.join(sorted(whole)) or 'none'}: no LoRA to write")
    root = 0.5 if config.get("use_rslora") else 1.0
    rank, rank_pattern = by_module({path: r for path, (r, _) in factors.items()})
    alpha, alpha_pattern = by_module({path: _plain(scale * r**root) for path, (r, scale) in factors.items()})
    return json.dumps({key: value for key, value in config.items() if key in KEPT} | {
        "peft_type": "LORA", "inference_mode": True, "use_dora": False, "bias": "none", "r": rank, "rank_pattern": rank_pattern,
        "lora_alpha": alpha, "alpha_pattern": alpha_pattern, "target_modules": target_modules or sorted(factors),
        "modules_to_save": sorted(whole) or None}, indent=2, sort_keys=True).encode()


def read_safetensors(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """The tensors of a safetensors file; BF16 becomes float32, exactly, through its 16 bits.

    Raises ValueError for a file that is truncated or does not fit its header, for other dtypes and for values that are not
    finite.
    """
    try:
        entries = safetensors.deserialize(Path(path).read_bytes())
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error}): copy or download it again") from None
    return {key: decode(path, key, entry["dtype"], entry["data"]).reshape(entry["shape"]) for key, entry in entries}


def decode(path: str | os.PathLike[str], key: str, dtype: str, data: Any) -> np.ndarray:       # bytes -> (n,)
    """The values of one tensor. Raises ValueError, naming file and key, for a dtype we lack or values not finite."""
    if dtype not in DTYPES:
        raise ValueError(f"{path}: {key} has dtype {dtype}, expected one of {', '.join(DTYPES)}: take the full-precision file")
    array = np.frombuffer(data, DTYPES[dtype])
    array = from_bf16(array) if dtype == "BF16" else array
    if not np.isfinite(array).all():
        raise ValueError(f"{path}: {key} has NaN or infinite values, expected finite numbers: the training that made it "
                         "diverged, take an earlier checkpoint")
    return array


def from_bf16(bits: np.ndarray) -> np.ndarray:             # uint16 -> float32
    """The numbers whose BF16 is the given 16 bits: the upper half of a float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def read_config(path: Path, known: Collection[str] = ()) -> dict[str, Any]:
    """The config with PEFT's defaults filled in, every value checked that we use. Raises ValueError, naming the key.

    known: options among LACKING that the caller knows how to treat.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error}): save the adapter again") from None
    kind = found.get("peft_type") if isinstance(found, dict) else type(found).__name__
    if kind != "LORA":
        raise ValueError(f'{path}: peft_type is {kind!r}, expected "LORA": only load_adapter reads some other methods')
    options = NEUTRAL | LACKING | OPTIONS | {key: value for key, value in found.items() if value is not None}
    for key, default in LACKING.items():
        if key not in known and options[key] != default and (options[key] or default):
            raise ValueError(f"{path}: {key} = {options[key]!r}, expected {default!r}: this LoRA does not have the option")
    for key, (fits, expected) in FORMS.items():
        if options[key] is not None and not fits(options[key]):
            raise ValueError(f"{path}: {key} = {options[key]!r}, expected {expected}")
    patterns = [rf"(.*\.)?({key})" for key in (*options["rank_pattern"], *options["alpha_pattern"])]         # as they are used
    for pattern in (*patterns, options["target_modules"], options["exclude_modules"]):
        try:
            re.compile(pattern if isinstance(pattern, str) else "")
        except (re.error, RecursionError, OverflowError) as error:
            raise ValueError(f"{path}: {pattern!r} is not a regular expression ({error})") from None
    init = options["init_lora_weights"]
    if BASE_CHANGING_INITS.match(str(init)):
        raise ValueError(f"{path}: init_lora_weights = {init!r} goes with a base that this init changed, "
                         "expected plain LoRA: in PEFT, save_pretrained(path_initial_model_for_weight_conversion=) converts it")
    return options


def to_lora_config(options: dict[str, Any]) -> LoraConfig:
    """Our LoraConfig of a checked config. How the values began no longer matters."""
    return LoraConfig(**{key: options[key] for key in OPTIONS} | {"init_lora_weights": True})


def saved_whole(options: dict[str, Any], file: str) -> bool:
    """Whether modules_to_save names the module with this path, or one that it is a part of."""
    return any(f".{name}." in f".{file}." for name in options["modules_to_save"] or ())


def module_entry(path: str, leaves: dict[str, Any], options: dict[str, Any], config: LoraConfig) -> dict[str, Any]:
    """One module of read_adapter's result, from the arrays of its keys."""
    table = any(leaf.startswith("lora_embedding") for leaf in leaves)
    first, second = ("lora_embedding_B", "lora_embedding_A") if table else ("lora_A.weight", "lora_B.weight")
    base = {f"base_{leaf}": leaves[f"base_layer.{leaf}"] for leaf in ("weight", "bias") if f"base_layer.{leaf}" in leaves}
    whole: dict[str, Any] = {leaf: leaves[leaf] for leaf in ("weight", "bias") if leaf in leaves}
    bias = {"lora_bias": leaves.get("lora_B.bias")} if options["lora_bias"] and not table else {}
    expected = {first, second, "lora_B.bias"} if bias else {first, second}
    if leaves.keys() - whole.keys() - {f"base_layer.{leaf}" for leaf in ("weight", "bias")} != expected:
        if set(leaves) - {"bias"} != {"weight"} and (set(leaves), options["bias"]) != ({"bias"}, "all"):
            raise ValueError(f"{path} has {', '.join(sorted(leaves))}, expected lora_A and lora_B, or a weight: save it again")
        # A table that is not in modules_to_save is PEFT's copy of a base whose vocabulary was resized.
        return whole if saved_whole(options, path) else {f"base_{leaf}": array for leaf, array in whole.items()}
    A, B, r = leaves[first], leaves[second], config.rank((path,))
    A, B = (A.T, B.T) if table else (A, B)
    if A.ndim != 2 or B.ndim != 2 or A.shape[0] != r or B.shape[1] != r:
        raise ValueError(f"{path} has {first} {leaves[first].shape} and {second} {leaves[second].shape}, expected matrices of "
                         f"the config's rank {r}: do the two files belong together?")
    return {"A": A, "B": B, "scale": float(config.scale((path,))), "embedding": table} | base | bias


def by_module(values: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The usual value, and the modules whose value is another."""
    usual = Counter(values.values()).most_common(1)[0][0]
    return usual, {path: value for path, value in values.items() if value != usual}


def _plain(alpha: float) -> float:
    """A float without the rounding in its last digit, an int if it is whole."""
    alpha = float(f"{alpha:.15g}")
    return int(alpha) if alpha.is_integer() else alpha
