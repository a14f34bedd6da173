"""The other ways to adapt, one file each, under the protocol of lora/layer.py. Importing this registers them."""


from .adalora import AdaLoRA, AdaLoraConfig
from .adalora_budget import RankAllocator
from .bitfit import BitFit, BitFitConfig
from .blocks import BlockWeight
from .choosing_stacks import AdaLoRAStack, SoRAStack
from .dora import DoRA
from .dynamic_rank import DynamicRank
from .eva import EVA, initialize_lora_eva_weights
from .four_bit import FourBit
from .full import FullConfig, FullFineTuning
from .ggml_blocks import GgmlBlocks
from .houlsby import Houlsby, HoulsbyConfig
from .ia3 import IA3, IA3Config
from .loha import LoHa, LoHaConfig
from .lokr import LoKr, LoKrConfig
from .lora_bias import LoRABias, LoRABiasEmbedding
from .lora_fa import LoRAFA, LoraFAConfig, LoRAFAdamW
from .lora_plus import loraplus_groups
from .own_bias import OwnBias
from .prefix_tuning import PrefixTuning, PrefixTuningConfig
from .prompt_tuning import PromptTuning, PromptTuningConfig
from .qlora import loftq, quantise
from .residual import MiLoRA, OLoRA, PiSSA
from .riemannian import Riemannian
from .shira import SHiRA, ShiraConfig
from .sora import GateProx, SoRA, SoRAConfig
from .stacks import LoRAFAStack, ResidualStack
from .tensor_train import TensorTrainConfig, TensorTrainLoRA
from .vera import VeRA, VeraConfig
from .vera_files import VeraFormat
from .virtual_tokens import VirtualTokens

__all__ = ["AdaLoRA", "AdaLoraConfig", "AdaLoRAStack", "BitFit", "BitFitConfig", "BlockWeight", "DoRA", "DynamicRank", "EVA",
           "FourBit", "FullConfig", "FullFineTuning", "GateProx", "GgmlBlocks", "Houlsby", "HoulsbyConfig", "IA3", "IA3Config",
           "initialize_lora_eva_weights", "loftq", "LoHa", "LoHaConfig", "LoKr", "LoKrConfig", "LoRABias", "LoRABiasEmbedding",
           "LoRAFA", "LoraFAConfig", "LoRAFAdamW", "LoRAFAStack", "loraplus_groups", "MiLoRA", "OLoRA", "OwnBias", "PiSSA",
           "PrefixTuning", "PrefixTuningConfig", "PromptTuning", "PromptTuningConfig", "quantise", "RankAllocator",
           "ResidualStack", "Riemannian", "SHiRA", "ShiraConfig", "SoRA", "SoRAConfig", "SoRAStack", "TensorTrainConfig",
           "TensorTrainLoRA", "VeRA", "VeraConfig", "VeraFormat", "VirtualTokens"]
