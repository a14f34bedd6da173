"""The other ways to adapt, one file each, under the protocol of lora/layer.py. Importing this registers them."""


from .bitfit import BitFit, BitFitConfig
from .dora import DoRA
from .full import FullConfig, FullFineTuning
from .ia3 import IA3, IA3Config
from .lora_fa import LoRAFA, LoraFAConfig, LoRAFAdamW
from .lora_plus import loraplus_groups
from .residual import MiLoRA, OLoRA, PiSSA

__all__ = ["BitFit", "BitFitConfig", "DoRA", "FullConfig", "FullFineTuning", "IA3", "IA3Config", "LoRAFA", "LoRAFAdamW",
           "LoraFAConfig", "MiLoRA", "OLoRA", "PiSSA", "loraplus_groups"]
