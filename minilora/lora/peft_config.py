"""What PEFT's adapter_config.json says: its options, their defaults, and which of them we can honour.

A key that we lack is an error only where its value is not PEFT's default, since else it changes nothing.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

from .config import LoraConfig

# PEFT's LoraConfig (0.21) with its defaults: what a key means that a config leaves out or gives as null.
OPTIONS: dict[str, Any] = {                                # our LoraConfig has them too
    "r": 8, "lora_alpha": 8, "lora_dropout": 0.0, "target_modules": None, "exclude_modules": None, "use_rslora": False,
    "init_lora_weights": True, "rank_pattern": {}, "alpha_pattern": {}, "modules_to_save": None, "layers_to_transform": None,
}
LACKING: dict[str, Any] = {                                # they change the update, or the base, in ways we do not have
    "bias": "none", "use_dora": False, "lora_bias": False, "trainable_token_indices": None, "target_parameters": None,
    "layer_replication": None, "megatron_config": None, "velora_config": None, "alora_invocation_tokens": None,
    "use_qalora": False, "monteclora_config": None, "use_bdlora": None, "arrow_config": None, "kasa_config": None,
    "ensure_weight_tying": False,
}
NEUTRAL: dict[str, Any] = {                                # they say nothing about a trained update
    "task_type": None, "auto_mapping": None, "peft_version": None, "base_model_name_or_path": None, "revision": None,
    "inference_mode": False, "fan_in_fan_out": False, "layers_pattern": None, "megatron_core": "megatron.core",
    "loftq_config": {}, "eva_config": None, "corda_config": None, "lora_ga_config": None, "qalora_group_size": 16,
}
BASE_CHANGING_INITS = re.compile("pissa|olora|corda|lora_ga|loftq")       # such an update belongs to a changed base


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _list_of(kind: type, value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(v, kind) for v in value)


FORMS = {                                                  # what the value must be, where LoraConfig does not check it
    "lora_alpha": (_number, "a number"),
    "lora_dropout": (_number, "a number"),
    "use_rslora": (lambda v: isinstance(v, bool), "true or false"),
    "init_lora_weights": (lambda v: isinstance(v, (bool, str)), "true, false or a name"),
    "target_modules": (lambda v: isinstance(v, str) or _list_of(str, v), "a regex or a list of names"),
    "exclude_modules": (lambda v: isinstance(v, str) or _list_of(str, v), "a regex or a list of names"),
    "rank_pattern": (lambda v: isinstance(v, dict), "an object of names and ranks"),
    "alpha_pattern": (lambda v: isinstance(v, dict) and all(map(_number, v.values())), "an object of names and numbers"),
    "modules_to_save": (lambda v: _list_of(str, v), "a list of names"),
    "layers_to_transform": (lambda v: isinstance(v, int) or _list_of(int, v), "layer numbers"),
}


def read_config(path: Path) -> dict[str, Any]:
    """The config with PEFT's defaults filled in, every value checked that we use. Raises ValueError, naming the key."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}): save the adapter again") from None
    kind = found.get("peft_type") if isinstance(found, dict) else type(found).__name__
    if kind != "LORA":
        raise ValueError(f'{path}: peft_type is {kind!r}, expected "LORA": adapters of other methods cannot be read')
    options = NEUTRAL | LACKING | OPTIONS | {key: value for key, value in found.items() if value is not None}
    for key, default in LACKING.items():
        if options[key] != default and (options[key] or default):
            raise ValueError(f"{path}: {key} = {options[key]!r}, expected {default!r}: this LoRA does not have the option")
    for key, (fits, expected) in FORMS.items():
        if options[key] is not None and not fits(options[key]):
            raise ValueError(f"{path}: {key} = {options[key]!r}, expected {expected}")
    patterns = [options["target_modules"], options["exclude_modules"], *options["rank_pattern"], *options["alpha_pattern"]]
    for pattern in patterns:
        try:
            re.compile(pattern if isinstance(pattern, str) else "")
        except re.error as error:
            raise ValueError(f"{path}: {pattern!r} is not a regular expression ({error})") from None
    if BASE_CHANGING_INITS.match(str(options["init_lora_weights"])):
        raise ValueError(f"{path}: init_lora_weights = {options['init_lora_weights']!r} belongs to a base that this init changed: "
                         "in PEFT, convert it with save_pretrained(path_initial_model_for_weight_conversion=...)")
    return options


def to_lora_config(options: dict[str, Any]) -> LoraConfig:
    """Our LoraConfig of a checked config. How the values began no longer matters."""
    return LoraConfig(**{key: options[key] for key in OPTIONS} | {"init_lora_weights": True})


def saved_whole(options: dict[str, Any], file: str) -> bool:
    """Whether modules_to_save names the module with this path, or one that it is a part of."""
    return any(f".{name}." in f".{file}." for name in options["modules_to_save"] or ())
