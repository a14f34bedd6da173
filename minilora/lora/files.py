"""An adapter onto a model from PEFT's folder, and off it: the names, layouts and packings of the files against ours.

Everything that could be wrong is checked before the model is touched.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from ..autograd import no_grad
from ..backend import device_of, to_device, to_host
from ..nn import Embedding, PackedLinear, Transformer
from ..nn.names import file_names, stored_transposed
from .config import LoraConfig, find_targets, in_layers, matches, module_names
from .layer import adapted
from .lora import Replacement
from .model import adapters_of, add_adapter, disable_adapter
from .peft_format import CONFIG, by_module, kind_of, read_adapter, saved_whole, to_lora_config, write_adapter

__all__ = ["load_adapter", "read_adapter", "save_adapter", "write_adapter"]

SAVERS: dict[str, Any] = {}    # method -> save(model, folder, name, base_model), for those of methods/ that are no s·B@A
LOADERS: dict[str, Any] = {}   # kind_of(folder) -> load(model, folder, name)

TASKS = {"lm": "CAUSAL_LM", "sequence": "SEQ_CLS", "token": "TOKEN_CLS", "none": "FEATURE_EXTRACTION"}


def load_adapter(model: Transformer, directory: str | os.PathLike[str], name: str = "default") -> None:
    """Put the adapter of a folder (ours or PEFT's own) onto a model, under `name`, and make it the active one.

    A sub-directory called `name` is taken before the folder itself, since save_adapter writes one for names but "default".
    Raises as read_adapter does, and ValueError if the adapter does not fit the model; then the model is unchanged.
    """
    folder = _folder(directory, name)
    folder = folder if (folder / CONFIG).exists() else Path(directory)
    if (kind := kind_of(folder)) in LOADERS:
        return LOADERS[kind](model, folder, name)
    options, modules = read_adapter(folder)
    names, layers = module_names(model), dict(model.named_modules())
    theirs = bool(file_names(model.cfg)) and options.get("module_names") != "minilora"
    files = {path: known[-1 if theirs else 0] for path, known in names.items() if len(known) == 2 or not theirs}
    root = f"{files['embed'].partition('.')[0]}." if theirs else ""
    if not any(file.startswith(root) for file in modules):                 # saved for the bare model, without a head
        files = {path: file.removeprefix(root) for path, file in files.items()}
    ours = {file: path for path, file in files.items()}
    _refuse("has tensors of modules that this model does not have", modules.keys() - ours.keys())
    factors = {ours[file] for file, entry in modules.items() if "A" in entry}
    whole = {ours[file] for file, entry in modules.items() if "weight" in entry}
    targets, saved = wanted_modules(model, options, files)
    _refuse("lacks tensors of modules that its config names", {files[path] for path in (targets - factors) | (saved - whole)})
    _refuse("has tensors of modules that its config does not target", {files[path] for path in factors - targets})
    values = {ours[file]: _fitted(model, file, layers[ours[file]], entry) for file, entry in modules.items()}

    config = to_lora_config(options)
    ranks = {path: config.rank((files[path],)) for path in sorted(factors)}
    alphas = {path: config.alpha((files[path],)) for path in ranks}
    (config.r, config.rank_pattern), (config.lora_alpha, config.alpha_pattern) = by_module(ranks), by_module(alphas)
    config.target_modules, config.modules_to_save = shortest(factors, names.keys() - whole), sorted(whole) or None
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
    ranks; where they keep them apart, an adapter on qkv_proj becomes three. (A notes.txt beside the files says so.) A
    strength set by set_scale is folded into the alphas, and into the values of modules saved whole. base_model: name or path
    of the base, for the config.

    Raises KeyError without such an adapter, ValueError for one that is no LoRA, OSError if the folder cannot be written.
    """
    folder, adapters = _folder(directory, name), adapters_of(model, name)
    if (method := model.adapter_configs[name].method) in SAVERS:
        return SAVERS[method](model, folder, name, base_model)
    layers: dict[str, Any] = dict(model.named_modules())
    files, entries = file_names(model.cfg) or {path: path for path in layers}, dict[str, dict[str, Any]]()
    with no_grad(), disable_adapter(model):                # also while merged, the layers have their base weights
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
                raise ValueError(f"{path} has a {type(adapter).__name__}, whose update is no product s·B@A, so PEFT's LoRA "
                                 "files cannot hold it: take merge_and_unload(model) instead")
    note = _pack_as_in_files(entries, layers, files) if model.cfg.model_type else ""
    if nameless := entries.keys() - files.keys():
        raise ValueError(f"{min(nameless)} has no name of its own in the files of {model.cfg.model_type} models: leave it out "
                         "of target_modules and modules_to_save")
    modules = {files[path]: entry for path, entry in entries.items()}
    targets = {file for file, entry in modules.items() if "A" in entry}
    visible = {files[path] for path in module_names(model) if path in files} - (modules.keys() - targets)
    head = str(model.cfg.head)
    config = {key: getattr(model.adapter_configs[name], key) for key in ("lora_dropout", "use_rslora", "init_lora_weights")}
    if config["init_lora_weights"] not in (True, False, "gaussian"):
        config["init_lora_weights"] = True                 # a method's own start is in the factors
    own = {} if model.cfg.model_type else {"module_names": "minilora"}
    write_adapter(folder, config | own | {
        "task_type": TASKS[head] if model.cfg.causal or head != "lm" else None, "base_model_name_or_path": base_model,
        "fan_in_fan_out": any(stored_transposed(model.cfg, f) for f in files.values()),
    }, modules, shortest(targets, visible), note)


def wanted_modules(model: Transformer, options: dict[str, Any], files: dict[str, str]) -> tuple[set[str], set[str]]:
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
    chosen = in_layers(chosen, layers) - saved
    return {path for path in chosen if not (excluded and matches(excluded, (files[path],)))}, saved


def _fitted(model: Transformer, file: str, layer: Any, entry: dict[str, Any]) -> list[np.ndarray]:
    """The entry's arrays in the order of the adapter's parameters and in the base's dtype, checked to fit the base."""
    shape, dtype, bias = tuple(layer.weight.shape), getattr(layer, "dtype", model.embed.weight.dtype), layer.bias
    flip = stored_transposed(model.cfg, file)
    entry = {key: array.T if flip and key.endswith("weight") else array for key, array in entry.items()}
    for key, own in ("base_weight", layer.weight), ("base_bias", bias):
        if key in entry and (own is None or not np.array_equal(entry[key].astype(dtype), to_host(own))):
            raise ValueError(f"{file}: the adapter brings its own base of shape {entry[key].shape}, which is not this model's: "
                             "load it onto the base it was trained on, with the vocabulary resized as it was")
    if "A" in entry and entry["embedding"] != isinstance(layer, Embedding):
        raise ValueError(f"{file}: lora_embedding_A and _B belong to an embedding table, lora_A and lora_B to a linear layer")
    expected: dict[str, Any] = {}
    if "A" in entry:
        expected = {"A": (len(entry["A"]), shape[1]), "B": (shape[0], len(entry["A"]))}
    elif "weight" in entry:
        expected = {"weight": shape, "bias": None if bias is None else tuple(bias.shape)}
    got = {key: entry[key].shape if key in entry else None for key in expected}
    if got != expected:
        raise ValueError(f"{file}: got shapes {got}, expected {expected} to fit this model: is it the base?")
    with np.errstate(over="ignore"):
        values = [entry[key].astype(dtype) for key in expected if key in entry]
    if not all(np.isfinite(value).all() for value in values):
        raise ValueError(f"{file}: got values too large for the model's {dtype}: load the adapter onto a float64 model")
    return [value.T for value in values[::-1]] if entry.get("embedding") else values


def _pack_as_in_files(entries: dict[str, Any], layers: dict[str, Any], files: dict[str, str]) -> str:
    """Change the entries of q, k and v to the modules that the files have, one that is packed, or three; and say so."""
    said = []
    for path in [path for path, layer in layers.items() if isinstance(layer, PackedLinear)]:
        parts = zip(("qkv_proj", *layers[path].sizes), layers[path].parts(), strict=True)
        rows = {path.removesuffix("qkv_proj") + block_name: block for block_name, (block, _) in parts}
        held = {p: (block, entries.pop(p)) for p, block in rows.items() if "A" in entries.get(p, ())}
        for target in sorted(rows.keys() & files.keys()):
            inside = {p: term for p, term in held.items() if len(_overlap(term[0], rows[target]))}
            if inside.keys() == {target}:
                entries[target] = held[target][1]
            elif inside:
                entries[target] = _stacked(rows[target], list(inside.values()))
                said.append(f"{files[target]} is {', '.join(inside)}, each on its own rows")
    return "\n".join(said)


def _stacked(rows: slice, terms: list[tuple[slice, dict[str, Any]]]) -> dict[str, Any]:
    """One module (Σr, in), (rows, Σr) that does what the terms do, each on its own rows. Scales that differ go into B."""
    scales = {entry["scale"] for _, entry in terms}
    scale = scales.pop() if len(scales) == 1 else 1.0
    A = np.concatenate([entry["A"] for _, entry in terms])
    B, start = np.zeros((rows.stop - rows.start, len(A)), A.dtype), 0
    for block, entry in terms:
        common, stop = _overlap(block, rows), start + len(entry["A"])
        part = entry["B"][common.start - block.start : common.stop - block.start]
        part = part if entry["scale"] == scale else part * entry["scale"]
        B[common.start - rows.start : common.stop - rows.start, start:stop] = part
        start = stop
    return {"A": A, "B": B, "scale": scale, "embedding": False}


def _overlap(a: slice, b: slice) -> range:
    return range(max(a.start, b.start), min(a.stop, b.stop))


def _folder(directory: str | os.PathLike[str], name: str) -> Path:
    if Path(name).name != name or name in ("", ".."):
        raise ValueError(f"adapter name {name!r}: expected a plain name, since it may become the name of a folder")
    return Path(directory) if name == "default" else Path(directory) / name


def _refuse(what: str, modules: set[str]) -> None:
    if modules:
        some, more = ", ".join(sorted(modules)[:3]), f" and {len(modules) - 3} more" if len(modules) > 3 else ""
        raise ValueError(f"the adapter {what}: {some}{more}; expected the base it was trained on, and the whole file")


def shortest(chosen: set[str], everything: set[str]) -> list[str]:
    """The last names of the chosen paths, if they mean just these, else the paths."""
    leaves = {path.rpartition(".")[2] for path in chosen}
    return sorted(leaves if {p for p in everything if p.rpartition(".")[2] in leaves} == chosen else chosen)
