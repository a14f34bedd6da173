"""The options of PEFT's LoraConfig (0.21) with its defaults: what a key means that a config leaves out or gives as null."""

from __future__ import annotations

from typing import Any

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
