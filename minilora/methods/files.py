"""The folders of adapters that are no plain LoRA: PEFT's files where PEFT has the method, else that form under our own type.

A method says which of its parameters stands under which key (`leaves` of its class) and which options the config holds
(`FileFormat`). Everything that could be wrong is checked before the model is touched.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from ..backend import device_of, host_rng, to_device, to_host
from ..lora import METHODS, Adapter, adapters_of, add_adapter
from ..lora.config import by_pattern, find_targets, module_names
from ..lora.files import LOADERS, SAVERS, TASKS, shortest, wanted_modules
from ..lora.layer import BESIDE
from ..lora.peft_format import CONFIG, PREFIX, WEIGHTS, by_module, existing, read_safetensors, write_folder
from ..lora.peft_options import NEUTRAL
from ..nn import Embedding, Linear, Transformer
from ..nn.names import file_names, stored_transposed

WHOLE = {"weight": "weight", "bias": "bias"}               # the leaves of a module that is saved whole
WHERE: dict[str, Any] = {"target_modules": None, "exclude_modules": None, "layers_to_transform": None, "modules_to_save": None}
BY_MODULE = ("r", "lora_alpha", "alpha", "rank_pattern", "alpha_pattern")      # their values in a file are those of the modules


@dataclass(frozen=True)
class FileFormat:
    """How one method lies in a folder.

    kind: what `kind_of` says of such a folder; peft_type: its name in the config. config: our class of it. options: the fields
    of that class that the file has, under the same names. fixed: further keys that are always written. lacking: PEFT's options
    that we do not have, with the defaults that they must keep. layout: whether PEFT's config has fan_in_fan_out.
    """

    method: str
    kind: str
    config: type[Any]
    options: tuple[str, ...] = ()
    fixed: Mapping[str, Any] = field(default_factory=dict)
    lacking: Mapping[str, Any] = field(default_factory=dict)
    peft_type: str = ""
    layout: bool = True

    def register(self) -> FileFormat:
        """Let save_adapter and load_adapter use this format."""
        SAVERS[self.method], LOADERS[self.kind] = self.save, self.load
        return self

    def save(self, model: Transformer, folder: Path, name: str, base_model: str | None) -> None:
        """Write an adapter. Raises ValueError for one that the files cannot hold, OSError if they cannot be written."""
        adapters, config, cfg = adapters_of(model, name), model.adapter_configs[name], model.cfg
        names = module_names(model)
        files = file_names(cfg) or {path: path for path in (*names, *adapters)}
        if nameless := adapters.keys() - files.keys():
            raise ValueError(f"{min(nameless)} has no name of its own in the files of {cfg.model_type} models: target a module "
                             "that the files have (GPT-2: qkv_proj; others: q_proj, k_proj, v_proj)")
        if any(adapter.strength != 1.0 for adapter in adapters.values()):
            raise ValueError(f"adapter {name!r} has a strength other than 1, which these files cannot hold: "
                             "set_scale(model, name, 1.0) before saving")
        whole = {path for path, adapter in adapters.items() if not hasattr(adapter, "leaves")}
        targets = {path for path in adapters.keys() - whole if not getattr(adapters[path], "beside", False)}
        options: dict[str, Any] = {key: getattr(config, key) for key in self.options if key not in BY_MODULE}
        for key, pattern in ("r", "rank_pattern"), ("lora_alpha", "alpha_pattern"), ("alpha", "alpha_pattern"):
            if key in self.options:
                found = getattr(config, pattern, {}), getattr(config, key)
                usual, others = by_module({files[path]: by_pattern(found[0], names[path], found[1])
                                           for path in targets})
                options |= {key: usual} | ({pattern: others} if pattern in self.options else {})
        head, modules = str(cfg.head), {files[path]: adapter for path, adapter in adapters.items() if path not in whole}
        if self.layout:
            options["fan_in_fan_out"] = any(stored_transposed(cfg, f) for f in files.values())
        options |= {**self.fixed, "peft_type": self.peft_type or self.kind, "inference_mode": True,
                    "task_type": TASKS[head] if cfg.causal or head != "lm" else None, "base_model_name_or_path": base_model,
                    "target_modules": shortest({files[p] for p in targets},
                                               {files[p] for p in names.keys() & files.keys() - whole}),
                    "modules_to_save": sorted(files[path] for path in whole) or None,
                    **({} if cfg.model_type else {"module_names": "minilora"}),
                    **self.own_options(modules)}
        tensors = {f"{PREFIX}{files[path]}.{leaf}": np.ascontiguousarray(_laid(model, files[path], leaf, to_host(p.data)))
                   for path, adapter in adapters.items() for leaf, p in leaves_of(adapter).items()}
        write_folder(folder, tensors | self.extra(modules), json.dumps(options, indent=2, sort_keys=True).encode())

    def own_options(self, modules: dict[str, Any]) -> dict[str, Any]:
        """Keys of the config that depend on the adapters (by their modules' names in the file)."""
        return {}

    def extra(self, modules: dict[str, Any]) -> dict[str, np.ndarray]:
        """Tensors of the file that are no parameter of one module."""
        return {}

    def load(self, model: Transformer, folder: Path, name: str) -> None:
        """Put the folder's adapter onto a model. Raises ValueError if it does not fit; then the model is unchanged."""
        options = self.read_config(existing(folder) / CONFIG)
        tensors = read_safetensors(folder / WEIGHTS)
        names, layers = module_names(model), dict[str, Any](model.named_modules())
        theirs = bool(file_names(model.cfg)) and options.get("module_names") != "minilora"
        files = {path: known[-1 if theirs else 0] for path, known in names.items() if len(known) == 2 or not theirs}
        ours = {file: path for path, file in files.items()}
        config = self.to_config(options, tensors, folder)
        targets, saved = wanted_modules(model, options, files)
        config.target_modules, config.modules_to_save = sorted(targets), sorted(saved) or None
        config.exclude_modules = config.layers_to_transform = None
        trial: dict[str, Any] = {path: METHODS[config.method, _kind(layer)](layer, config, known, host_rng(0))
                                 for path, known, layer in find_targets(model, config)}
        trial |= {path: METHODS["replace", _kind(layers[path])](layers[path], config, names[path], host_rng(0))
                  for path in saved}
        if config.method in BESIDE:
            taken = [layers[path] for path in trial]
            for path, (_, adapter) in BESIDE[config.method](model, config, taken, host_rng(0)).items():
                trial[path], files[path] = adapter, file_names(model.cfg)[path] if theirs else path
        expected = {f"{PREFIX}{files[path]}.{leaf}": (path, leaf, p) for path, adapter in trial.items()
                    for leaf, p in leaves_of(adapter).items()}
        held = {f"{PREFIX}{file}": layers[path] for path, file in files.items()}
        tensors = {key: value for key, value in tensors.items() if key in expected or not self.is_copy(key, value, held)}
        if expected.keys() != tensors.keys():
            odd = min(expected.keys() ^ tensors.keys())
            known = odd.removeprefix(PREFIX).rpartition(".")[0] in ours
            raise ValueError(f"{folder / WEIGHTS} {'lacks' if odd in expected else 'has an unexpected'} {odd}"
                             f"{'' if known else ', of a module that this model does not have'}: expected the base and config "
                             "that it was trained with")
        values: dict[str, dict[str, np.ndarray]] = {}
        for key, (path, leaf, p) in expected.items():
            value = _laid(model, files[path], leaf, tensors[key])
            if value.shape != p.shape:
                raise ValueError(f"{key}: got shape {value.shape}, expected {p.shape} to fit this model: is it the base?")
            with np.errstate(over="ignore"):
                values.setdefault(path, {})[leaf] = value.astype(p.dtype)
            if not np.isfinite(values[path][leaf]).all():
                raise ValueError(f"{key}: got values too large for the model's {p.dtype}: load onto a float64 model")
        add_adapter(model, config, name)
        for path, adapter in adapters_of(model, name).items():
            for leaf, p in leaves_of(adapter).items():
                p.data[...] = to_device(values[path][leaf], device_of(p.data).name)

    def is_copy(self, key: str, value: np.ndarray, layers: dict[str, Any]) -> bool:
        """Whether a tensor that is not expected only repeats what the base (its layers, by key) or another tensor holds."""
        return False

    def to_config(self, options: dict[str, Any], tensors: dict[str, np.ndarray], folder: Path) -> Any:
        """The config that the options mean; it may take tensors that belong to no module out of `tensors`."""
        return self.config(**{key: options[key] for key in self.options})

    def read_config(self, path: Path) -> dict[str, Any]:
        """The file's options with defaults filled in, all of them checked. Raises ValueError, naming the key."""
        found = {key: value for key, value in json.loads(path.read_text(encoding="utf-8")).items() if value is not None}
        defaults = {f.name: getattr(self.config(**_REQUIRED.get(self.method, {})), f.name) for f in fields(self.config)}
        options = NEUTRAL | WHERE | dict(self.lacking) | {key: defaults[key] for key in self.options} | found
        for key, default in self.lacking.items():
            if options[key] != default and (options[key] or default):
                raise ValueError(f"{path}: {key} = {options[key]!r}, expected {default!r}: the method here lacks the option")
        for key in self.options:
            if not _alike(key, options[key], defaults[key]):
                raise ValueError(f"{path}: {key} = {options[key]!r}, expected something like {defaults[key]!r}")
        for key in WHERE:
            parts = options[key] if isinstance(options[key], list) else [options[key]]
            if not all(isinstance(p, int if key == "layers_to_transform" else str) for p in parts if options[key] is not None):
                raise ValueError(f"{path}: {key} = {options[key]!r}, expected names or layer numbers")
        return options


_REQUIRED: dict[str, dict[str, Any]] = {"adalora": {"total_step": 1}}          # fields without a default


def leaves_of(adapter: Adapter) -> dict[str, Any]:
    """The last part of the key -> Parameter, of everything that a file holds of an adapter."""
    known = getattr(adapter, "leaves", WHOLE)
    return {leaf: p for name, leaf in known.items() if (p := getattr(adapter, name, None)) is not None}


def _laid(model: Transformer, file: str, leaf: str, array: np.ndarray) -> np.ndarray:
    """Between our layout and the file's: a whole Conv1D weight lies the other way round."""
    return array.T if leaf == "weight" and stored_transposed(model.cfg, file) else array


def _kind(layer: Any) -> type:
    return Embedding if isinstance(layer, Embedding) else Linear


def _alike(key: str, value: Any, default: Any) -> bool:
    """Whether an option's value is of its default's kind. (A start may have a name.)"""
    if isinstance(default, bool) or default is None:
        return default is None or isinstance(value, bool) or (isinstance(value, str) and key.startswith("init"))
    if isinstance(default, (int, float)):
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return isinstance(value, type(default))
