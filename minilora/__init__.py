"""minilora: LoRA from scratch in plain NumPy, exact enough to check other implementations against.

The public names, and nothing else. Read the folders from the bottom up: backend, autograd, nn, lora, rank, training.
"""

from . import methods, rank, tasks, training
from .autograd import (
    GradcheckError,
    Tensor,
    attention,
    cross_entropy,
    gelu,
    gelu_tanh,
    gradcheck,
    layer_norm,
    linear,
    log_softmax,
    lora_linear,
    no_grad,
    rms_norm,
    rotary,
    silu,
    softmax,
    swiglu,
    tensor,
)
from .backend import array_module, set_device, to_device, to_host
from .data import left_padded
from .lora import (
    LoraConfig,
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
from .lora.files import load_adapter, save_adapter
from .methods import (
    AdaLoraConfig,
    BitFitConfig,
    DynamicRank,
    FullConfig,
    GateProx,
    HoulsbyConfig,
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    LoraFAConfig,
    LoRAFAdamW,
    PrefixTuningConfig,
    PromptTuningConfig,
    RankAllocator,
    Riemannian,
    ShiraConfig,
    SoRAConfig,
    TensorTrainConfig,
    VeraConfig,
    VirtualTokens,
    initialize_lora_eva_weights,
    loftq,
    loraplus_groups,
    quantise,
)
from .nn import Module, Parameter, Transformer, TransformerConfig, generate, stream
from .pretrained import load_pretrained, reference, save_pretrained, stream_text
from .pretrained.analysis import analyze
from .pretrained.edit import compose, resize
from .pretrained.extract import extract
from .pretrained.merge import merge_checkpoint
from .pretrained.params import params
from .pretrained.requantise import requantised
from .training import TrainConfig, sweep, train

__version__ = "0.1.0"

__all__ = [
    "AdaLoraConfig", "BitFitConfig", "DynamicRank", "FullConfig", "GateProx", "GradcheckError", "HoulsbyConfig", "IA3Config",
    "LoHaConfig", "LoKrConfig", "LoRAFAdamW", "LoraConfig", "LoraFAConfig", "Module", "Parameter", "PrefixTuningConfig",
    "PromptTuningConfig", "RankAllocator", "Riemannian", "ShiraConfig", "SoRAConfig", "Tensor", "TensorTrainConfig",
    "TrainConfig", "Transformer", "TransformerConfig", "VeraConfig", "VirtualTokens", "add_adapter", "analyze", "array_module",
    "attention", "compose", "count_parameters", "cross_entropy", "delete_adapter", "disable_adapter", "extract", "gelu",
    "gelu_tanh", "generate", "gradcheck", "initialize_lora_eva_weights", "layer_norm", "left_padded", "linear", "load_adapter",
    "load_pretrained", "loftq", "log_softmax", "lora_linear", "loraplus_groups", "merge_adapter", "merge_and_unload",
    "merge_checkpoint", "methods", "no_grad", "params", "quantise", "rank", "reference", "requantised", "resize", "rms_norm",
    "rotary", "save_adapter", "save_pretrained", "set_adapter", "set_device", "set_scale", "silu", "softmax", "stream",
    "stream_text", "sweep", "swiglu", "tasks", "tensor", "to_device", "to_host", "train", "training", "unmerge_adapter",
]
