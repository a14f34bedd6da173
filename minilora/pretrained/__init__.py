"""Pretrained models: Hugging Face and GGUF files into our Transformer, and back."""

from .load import load_pretrained
from .save import save_pretrained
from .text import stream_text
from .tokenizer import Tokenizer

__all__ = ["Tokenizer", "load_pretrained", "save_pretrained", "stream_text"]
