"""PEFT's adapter files, in and out, without PyTorch.

A folder holds adapter_config.json (which LoRA, where, at what scale) and adapter_model.safetensors, whose keys are
"base_model.model." + the module's path in the architecture's files + ".lora_A.weight" and so on. `read_adapter` and
`write_adapter` turn a folder into plain arrays and back, without a model; `load_adapter` and `save_adapter` put it onto a
model and take it off. A file comes from outside: all of it is checked before a model is touched.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from ..autograd import no_grad
from ..backend import device_of, to_device, to_host
from ..nn import Embedding, PackedLinear, Transformer
from ..nn.names import file_names, stored_transposed
from .config import LoraConfig, find_targets, matches, module_names
from .layer import adapted
from .lora import Replacement
from .model import adapters_of, add_adapter
from .peft_config import OPTIONS, read_config, saved_whole, to_lora_config

CONFIG, WEIGHTS, PREFIX = "adapter_config.json", "adapter_model.safetensors", "base_model.model."
DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}
LEAVES = ("lora_A.weight", "lora_B.weight", "lora_embedding_A", "lora_embedding_B", "weight", "bias", "base_layer.weight",
          "base_layer.bias")
KEY = re.compile(rf"{re.escape(PREFIX)}(.+?)\.({'|'.join(map(re.escape, LEAVES))})")
TASKS = {"lm": "CAUSAL_LM", "sequence": "SEQ_CLS", "token": "TOKEN_CLS"}


# ---------------------------------------------------------------------------------------------------------- a folder, no model


def read_adapter(directory: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """A PEFT LoRA folder as (config, modules), on the host.

    config: the file's keys, and PEFT's defaults for those it leaves out. modules: the module's path in the file -> {"A"
    (r, in), "B" (out, r), "scale" s, "embedding" bool}: the update of its weight (out, in), or of an embedding table (V, D),
    is s·B@A. A module that was saved whole has {"weight"} and perhaps {"bias"} instead, in the file's layout; one whose base
    PEFT saved along has "base_weight" too. F16 stays F16; BF16 becomes float32, exactly.

    Raises FileNotFoundError if the folder or a file is missing, and ValueError for anything in them that is not as it
    should be.
    """
    folder, modules = Path(directory), {}
    for part in (folder, folder / CONFIG, folder / WEIGHTS):
        if not part.exists():
            raise FileNotFoundError(f"{part} does not exist: expected a folder with {CONFIG} and {WEIGHTS}, as save_adapter "
                                    "and PEFT's save_pretrained write it")
    options = read_config(folder / CONFIG)
    config = to_lora_config(options)
    for key, array in read_safetensors(folder / WEIGHTS).items():
        match = KEY.fullmatch(key)
        if match is None:
            raise ValueError(f'{folder / WEIGHTS}: unexpected key {key!r}, expected "{PREFIX}MODULE.lora_A.weight" and the '
                             "like: is this a LoRA adapter in PEFT's format?")
        modules.setdefault(match[1], {})[match[2]] = array
    if not modules:
        raise ValueError(f"{folder / WEIGHTS} holds no tensors: save the adapter again")
    return options, {path: _module(path, leaves, options, config) for path, leaves in modules.items()}


def write_adapter(directory: str | os.PathLike[str], config: dict[str, Any], modules: dict[str, dict[str, Any]]) -> None:
    """Write a folder that PEFT and read_adapter read: `modules` as read_adapter returns them, and a config for the rest.

    Ranks, alphas and modules_to_save are taken from the modules; target_modules too, as whole paths, unless the config has
    them. Each file gets a temporary name first and the config comes last, so an interrupted write leaves the old adapter or
    none. Raises OSError if the folder cannot be written.
    """
    folder, tensors = Path(directory), dict[str, np.ndarray]()
    for path, entry in modules.items():
        if "A" not in entry:
            leaves = {leaf: entry[leaf] for leaf in ("weight", "bias") if leaf in entry}
        elif entry["embedding"]:
            leaves = {"lora_embedding_A": entry["B"].T, "lora_embedding_B": entry["A"].T}
        else:
            leaves = {"lora_A.weight": entry["A"], "lora_B.weight": entry["B"]}
        tensors |= {f"{PREFIX}{path}.{leaf}": np.ascontiguousarray(array) for leaf, array in leaves.items()}
    factors = {path: entry for path, entry in modules.items() if "A" in entry}
    root = 0.5 if config.get("use_rslora") else 1.0
    r, rank_pattern = _pattern({path: entry["A"].shape[0] for path, entry in factors.items()})
    alpha, alpha_pattern = _pattern({p: _plain(e["scale"] * e["A"].shape[0] ** root) for p, e in factors.items()})
    written = {key: config.get(key, default) for key, default in {**OPTIONS, "use_dora": False, "bias": "none"}.items()}
    written |= {key: config.get(key) for key in ("task_type", "base_model_name_or_path", "fan_in_fan_out")}
    written |= {"peft_type": "LORA", "inference_mode": True, "r": r, "rank_pattern": rank_pattern, "lora_alpha": alpha,
                "alpha_pattern": alpha_pattern, "target_modules": config.get("target_modules") or sorted(factors),
                "modules_to_save": sorted(modules.keys() - factors.keys()) or None, "exclude_modules": None,
                "layers_to_transform": None} | {k: v for k, v in config.items() if k == "module_names"}
    text = json.dumps(written, indent=2, sort_keys=True).encode()
    contents = {WEIGHTS: safetensors.numpy.save(tensors, metadata={"format": "pt"}), CONFIG: text}
    temporary = {file: folder / f".{file}.{os.getpid()}.tmp" for file in contents}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for file, content in contents.items():
            temporary[file].write_bytes(content)
        if (folder / CONFIG).exists() and (folder / CONFIG).read_bytes() != text:
            (folder / CONFIG).unlink()                     # the old config does not belong to the new weights
        for file in contents:
            os.replace(temporary[file], folder / file)
    except OSError as error:
        raise OSError(f"cannot write an adapter to {folder} ({error.strerror}): give a folder that you can write to") from None
    finally:
        for path in temporary.values():
            path.unlink(missing_ok=True) if path.parent.is_dir() else None


def read_safetensors(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """The tensors of a safetensors file; BF16 becomes float32, exactly, through its 16 bits.

    Raises ValueError for a file that is truncated or does not fit its header, for other dtypes and for values that are not
    finite.
    """
    try:
        entries = safetensors.deserialize(Path(path).read_bytes())
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error}): copy or download it again") from None
    tensors = {}
    for key, entry in entries:
        if entry["dtype"] not in DTYPES:
            raise ValueError(f"{path}: {key} has dtype {entry['dtype']}, expected one of {', '.join(DTYPES)}")
        array = np.frombuffer(entry["data"], DTYPES[entry["dtype"]]).reshape(entry["shape"])
        if entry["dtype"] == "BF16":                       # the upper half of a float32
            array = (array.astype(np.uint32) << 16).view(np.float32)
        if not np.isfinite(array).all():
            raise ValueError(f"{path}: {key} has NaN or infinite values, expected finite numbers: the training that made it "
                             "diverged, take an earlier checkpoint")
        tensors[key] = array
    return tensors


# --------------------------------------------------------------------------------------------------------------- with a model


def load_adapter(model: Transformer, directory: str | os.PathLike[str], name: str = "default") -> None:
    """Put the adapter of a folder (ours or PEFT's own) onto a model, under `name`, and make it the active one.

    A sub-directory called `name` is taken before the folder itself, since save_adapter writes one for names but "default".
    Raises as read_adapter does, and ValueError if the adapter does not fit the model; then the model is unchanged.
    """
    folder = _folder(directory, name)
    options, modules = read_adapter(folder if (folder / CONFIG).exists() else directory)
    names, layers = module_names(model), dict(model.named_modules())
    theirs = bool(file_names(model.cfg)) and options.get("module_names") != "minilora"
    files = {path: known[-1 if theirs else 0] for path, known in names.items() if len(known) == 2 or not theirs}
    ours = {file: path for path, file in files.items()}
    _refuse("has tensors of modules that this model does not have", modules.keys() - ours.keys())
    factors = {ours[file] for file, entry in modules.items() if "A" in entry}
    whole = {ours[file] for file, entry in modules.items() if "weight" in entry}
    targets, saved = _wanted(model, options, files)
    _refuse("lacks tensors of modules that its config names", {files[path] for path in (targets - factors) | (saved - whole)})
    _refuse("has tensors of modules that its config does not target", {files[path] for path in factors - targets})
    values = {ours[file]: _fitted(model, file, layers[ours[file]], entry) for file, entry in modules.items()}

    config = to_lora_config(options)
    ranks = {path: config.rank((files[path],)) for path in sorted(factors)}
    alphas = {path: config.alpha((files[path],)) for path in ranks}
    (config.r, config.rank_pattern), (config.lora_alpha, config.alpha_pattern) = _pattern(ranks), _pattern(alphas)
    config.target_modules, config.modules_to_save = _shortest(factors, names.keys() - whole), sorted(whole) or None
    config.exclude_modules = config.layers_to_transform = None
    add_adapter(model, config, name)
    for path, adapter in adapters_of(model, name).items():
        for (_, parameter), value in zip(adapter.named_parameters(), values.get(path, ())):        # (A, B) or (weight, bias)
            parameter.data[...] = to_device(value, device_of(parameter.data).name)


def save_adapter(model: Transformer, directory: str | os.PathLike[str], name: str = "default", *,
                 base_model: str | None = None) -> None:
    """Write an adapter as PEFT does: into the folder, or for a name other than "default" into a sub-directory of that name.

    The modules have the names of the architecture's files (`cfg.model_type`), so PEFT loads the folder unchanged; without a
    model_type they have our own paths, and the config says "module_names": "minilora". Where the files pack q, k and v into
    one module (GPT-2's c_attn), adapters on q_proj, k_proj and v_proj become one block-diagonal adapter, of the sum of their
    ranks; where they keep them apart, an adapter on qkv_proj becomes three. A strength set by set_scale is folded into the
    alphas, and into the values of modules saved whole. base_model: name or path of the base, for the config.

    Raises KeyError without such an adapter, ValueError for one that is no LoRA, OSError if the folder cannot be written.
    """
    folder, adapters, layers = _folder(directory, name), adapters_of(model, name), dict(model.named_modules())
    files, entries = file_names(model.cfg) or {path: path for path in layers}, {}
    with no_grad():
        for path, adapter in adapters.items():
            layer, factors = layers[path], adapter.factors()
            if isinstance(adapter, Replacement):
                weight, bias = adapted(layer, [(layer.parts()[0][0], adapter)])
                W = to_host(weight).T if stored_transposed(model.cfg, files.get(path, path)) else to_host(weight)
                entries[path] = {"weight": W} | ({} if bias is None else {"bias": to_host(bias)})
            elif factors is not None:
                entries[path] = {"A": to_host(factors[0]), "B": to_host(factors[1]), "scale": float(factors[2]),
                                 "embedding": isinstance(layer, Embedding)}
            else:
                raise ValueError(f"{path} has a {type(adapter).__name__}, whose update is no product s·B@A, so PEFT's LoRA files "
                                 "cannot hold it: take merge_and_unload(model) instead")
    if model.cfg.model_type:
        _pack_as_in_files(entries, layers, files)
    if nameless := entries.keys() - files.keys():
        raise ValueError(f"{min(nameless)} has no name of its own in the files of {model.cfg.model_type} models: leave it out "
                         "of target_modules and modules_to_save")
    modules = {files[path]: entry for path, entry in entries.items()}
    targets = {file for file, entry in modules.items() if "A" in entry}
    visible = {files[path] for path in module_names(model) if path in files} - (modules.keys() - targets)
    task = TASKS[model.cfg.head] if model.cfg.causal or model.cfg.head != "lm" else None
    config = {key: getattr(model.adapter_configs[name], key) for key in ("lora_dropout", "use_rslora", "init_lora_weights")}
    if config["init_lora_weights"] not in (True, False, "gaussian"):
        config["init_lora_weights"] = True                 # a method's own start is in the factors
    own = {} if model.cfg.model_type else {"module_names": "minilora"}
    write_adapter(folder, config | own | {
        "task_type": task, "base_model_name_or_path": base_model, "target_modules": _shortest(targets, visible),
        "fan_in_fan_out": any(stored_transposed(model.cfg, file) for file in files.values())}, modules)


# -------------------------------------------------------------------------------------------------------------------- helpers


def _module(path: str, leaves: dict[str, Any], options: dict[str, Any], config: LoraConfig) -> dict[str, Any]:
    """One module of read_adapter's result, from the arrays of its keys."""
    table = any(leaf.startswith("lora_embedding") for leaf in leaves)
    first, second = ("lora_embedding_B", "lora_embedding_A") if table else ("lora_A.weight", "lora_B.weight")
    base = {f"base_{leaf}": leaves[f"base_layer.{leaf}"] for leaf in ("weight", "bias") if f"base_layer.{leaf}" in leaves}
    whole = {leaf: leaves[leaf] for leaf in ("weight", "bias") if leaf in leaves}
    if leaves.keys() - whole.keys() - {f"base_layer.{leaf}" for leaf in ("weight", "bias")} != {first, second}:
        if set(leaves) - {"bias"} != {"weight"}:
            raise ValueError(f"{path} has {', '.join(sorted(leaves))}, expected lora_A and lora_B, or a weight: save it again")
        # A table that is not in modules_to_save is PEFT's copy of a base whose vocabulary was resized.
        return whole if saved_whole(options, path) else {f"base_{leaf}": array for leaf, array in whole.items()}
    A, B, r = leaves[first], leaves[second], config.rank((path,))
    A, B = (A.T, B.T) if table else (A, B)
    if A.ndim != 2 or B.ndim != 2 or A.shape[0] != r or B.shape[1] != r:
        raise ValueError(f"{path} has {first} {leaves[first].shape} and {second} {leaves[second].shape}, expected matrices of the "
                         f"config's rank {r}: do the two files belong together?")
    return {"A": A, "B": B, "scale": float(config.scale((path,))), "embedding": table} | base


def _wanted(model: Transformer, options: dict[str, Any], files: dict[str, str]) -> tuple[set[str], set[str]]:
    """Our paths of the modules that a config targets, as PEFT understands it, and of those it saves whole."""
    targets, excluded, layers = (options[key] for key in ("target_modules", "exclude_modules", "layers_to_transform"))
    saved = {path for path, file in files.items() if saved_whole(options, file)}
    if targets in (None, "all-linear"):
        chosen = {path for path, _, _ in find_targets(model, LoraConfig(target_modules=targets))}
    else:
        chosen = {path for path, file in files.items() if matches(targets, (file,))}
    if not chosen:
        known = ", ".join(sorted({file.rpartition(".")[2] for file in files.values()}))
        raise ValueError(f"the adapter's target_modules {targets!r} are not in this model, which has {known}: is it the base?")
    if layers is not None:
        numbers = [layers] if isinstance(layers, int) else layers
        chosen = {path for path in chosen if path.startswith("layers.") and int(path.split(".")[1]) in numbers}
    return {path for path in chosen - saved if not (excluded and matches(excluded, (files[path],)))}, saved


def _fitted(model: Transformer, file: str, layer: Any, entry: dict[str, Any]) -> list[np.ndarray]:
    """The entry's arrays in the order of the adapter's parameters and in the base's dtype, checked to fit the base."""
    shape, dtype, bias = tuple(layer.weight.shape), layer.weight.dtype, getattr(layer, "bias", None)
    flip = stored_transposed(model.cfg, file)
    entry = {key: array.T if flip and key.endswith("weight") else array for key, array in entry.items()}
    for key, own in ("base_weight", layer.weight), ("base_bias", bias):
        if key in entry and (own is None or not np.array_equal(entry[key].astype(dtype), to_host(own))):
            raise ValueError(f"{file}: the adapter brings its own base of shape {entry[key].shape}, which is not this model's: "
                             "load it onto the base it was trained on, with the vocabulary resized as it was")
    if "weight" in entry and isinstance(layer, Embedding):
        raise ValueError(f"{file}: got an embedding table in modules_to_save, expected linear layers only: merge it in PEFT")
    if "A" in entry and entry["embedding"] != isinstance(layer, Embedding):
        raise ValueError(f"{file}: lora_embedding_A and _B belong to an embedding table, lora_A and lora_B to a linear layer")
    if "A" in entry:
        r = len(entry["A"])
        expected = {"A": (r, shape[1]), "B": (shape[0], r)}
    else:
        expected = {"weight": shape, "bias": None if bias is None else tuple(bias.shape)} if "weight" in entry else {}
    got = {key: entry[key].shape if key in entry else None for key in expected}
    if got != expected:
        raise ValueError(f"{file}: got shapes {got}, expected {expected} to fit this model: is it the base?")
    with np.errstate(over="ignore"):
        values = [entry[key].astype(dtype) for key in expected if key in entry]
    if not all(np.isfinite(value).all() for value in values):
        raise ValueError(f"{file}: got values too large for the model's {dtype}: load the adapter onto a float64 model")
    return [value.T for value in values[::-1]] if isinstance(layer, Embedding) else values


def _pack_as_in_files(entries: dict[str, Any], layers: dict[str, Any], files: dict[str, str]) -> None:
    """Change the entries of q, k and v to the modules that the files have: one that is packed, or three."""
    for path in [path for path, layer in layers.items() if isinstance(layer, PackedLinear)]:
        parts = zip(("qkv_proj", *layers[path].sizes), layers[path].parts(), strict=True)
        rows = {path.removesuffix("qkv_proj") + block_name: block for block_name, (block, _) in parts}
        held = {p: (block, entries.pop(p)) for p, block in rows.items() if "A" in entries.get(p, ())}
        for target in rows.keys() & files.keys():
            inside = [(block, entry) for block, entry in held.values() if _overlap(block, rows[target])]
            if inside:
                entries[target] = inside[0][1] if held.keys() == {target} else _stacked(rows[target], inside)


def _stacked(rows: slice, terms: list[tuple[slice, dict[str, Any]]]) -> dict[str, Any]:
    """One module (Σr, in), (rows, Σr) that does what the terms do, each on its own rows. Scales that differ go into B."""
    scales = {entry["scale"] for _, entry in terms}
    scale = scales.pop() if len(scales) == 1 else 1.0
    A = np.concatenate([entry["A"] for _, entry in terms])
    B, start = np.zeros((rows.stop - rows.start, len(A)), A.dtype), 0
    for block, entry in terms:
        low, high = _overlap(block, rows)
        part = entry["B"][low - block.start : high - block.start]
        columns = slice(start, start + part.shape[1])
        B[low - rows.start : high - rows.start, columns] = part if entry["scale"] == scale else part * entry["scale"]
        start = columns.stop
    return {"A": A, "B": B, "scale": scale, "embedding": False}


def _overlap(a: slice, b: slice) -> tuple[int, int] | None:
    low, high = max(a.start, b.start), min(a.stop, b.stop)
    return (low, high) if low < high else None


def _folder(directory: str | os.PathLike[str], name: str) -> Path:
    if not name or Path(name).name != name:
        raise ValueError(f"adapter name {name!r}: expected a plain name, since it may become the name of a folder")
    return Path(directory) if name == "default" else Path(directory) / name


def _refuse(what: str, modules: set[str]) -> None:
    if modules:
        some, more = ", ".join(sorted(modules)[:3]), f" and {len(modules) - 3} more" if len(modules) > 3 else ""
        raise ValueError(f"the adapter {what}: {some}{more}; expected the base it was trained on, and the whole file")


def _pattern(values: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The usual value, and the modules whose value is another."""
    usual = Counter(values.values()).most_common(1)[0][0]
    return usual, {path: value for path, value in values.items() if value != usual}


def _plain(alpha: float) -> float:
    """A float without the rounding in its last digit, an int if it is whole."""
    alpha = float(f"{alpha:.15g}")
    return int(alpha) if alpha.is_integer() else alpha


def _shortest(chosen: set[str], everything: set[str]) -> list[str]:
    """The last names of the chosen paths, if they mean just these, else the paths."""
    leaves = {path.rpartition(".")[2] for path in chosen}
    return sorted(leaves if {p for p in everything if p.rpartition(".")[2] in leaves} == chosen else chosen)
