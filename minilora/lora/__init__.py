"""LoRA: the config, the protocol of adaptations (layer.py), LoRA itself (lora.py), adapters on a model, PEFT's files."""

from .config import LoraConfig, TargetConfig
from .layer import METHODS, Adaptation, Adapter, register
from .lora import LoRA, LoRAEmbedding, Replacement
from .model import (
    adapter_names,
    adapters_of,
    add_adapter,
    count_parameters,
    delete_adapter,
    disable_adapter,
    merge_adapter,
    merge_and_unload,
    set_adapter,
    set_scale,
    unmerge_adapter,
)
from .svd import factored_svd, truncate

__all__ = ["METHODS", "Adaptation", "Adapter", "LoRA", "LoRAEmbedding", "LoraConfig", "Replacement", "TargetConfig",
           "adapter_names", "adapters_of", "add_adapter", "count_parameters", "delete_adapter", "disable_adapter",
           "factored_svd", "merge_adapter", "merge_and_unload", "register", "set_adapter", "set_scale", "truncate",
           "unmerge_adapter"]
