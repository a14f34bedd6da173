"""Parameter, Module, layers, and the Transformer in its GPT-2, BERT and Llama forms."""

from .config import TransformerConfig
from .generate import generate, stream
from .layers import Adaptable, Dropout, Embedding, LayerNorm, Linear, PackedLinear, RMSNorm
from .module import Module, Parameter
from .transformer import Transformer

__all__ = ["Adaptable", "Dropout", "Embedding", "LayerNorm", "Linear", "Module", "PackedLinear", "Parameter", "RMSNorm",
           "Transformer", "TransformerConfig", "generate", "stream"]
