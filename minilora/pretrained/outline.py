"""A model's shape without its weights: counting a model of 175 billion numbers takes no more memory than counting a small one.

Every weight of an `Outline` is a single zero that is read at every place (stride 0), so paths, shapes and targets are those of
the real model, and nothing is stored.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..backend import Array
from ..nn import Transformer, TransformerConfig
from ..nn.blocks import Init
from .hf_config import from_hf, read_json
from .hub import HUB_ID, find


def _gpt(d_model: int, n_layers: int, n_heads: int, max_len: int = 1024) -> dict[str, Any]:
    return {"model_type": "gpt2", "vocab_size": 50257, "n_embd": d_model, "n_layer": n_layers, "n_head": n_heads,
            "n_positions": max_len, "architectures": ["GPT2LMHeadModel"]}


def _bert(kind: str, d_model: int, n_layers: int, n_heads: int, vocab_size: int, positions: int, types: int) -> dict[str, Any]:
    return {"model_type": kind, "vocab_size": vocab_size, "hidden_size": d_model, "num_hidden_layers": n_layers,
            "num_attention_heads": n_heads, "intermediate_size": 4 * d_model, "max_position_embeddings": positions,
            "type_vocab_size": types, "architectures": [{"bert": "Bert", "roberta": "Roberta"}[kind] + "Model"]}


def _llama(d_model: int, n_layers: int, n_heads: int, d_ff: int, kv: int | None = None, **fields: Any) -> dict[str, Any]:
    return {"model_type": "llama", "vocab_size": 32000, "hidden_size": d_model, "num_hidden_layers": n_layers,
            "num_attention_heads": n_heads, "num_key_value_heads": kv or n_heads, "intermediate_size": d_ff,
            "max_position_embeddings": 4096, "tie_word_embeddings": False, "architectures": ["LlamaForCausalLM"]} | fields


SHAPES: dict[str, dict[str, Any]] = {                      # short name -> what a config.json says of the shape
    "gpt2": _gpt(768, 12, 12),
    "gpt2-medium": _gpt(1024, 24, 16),
    "gpt2-large": _gpt(1280, 36, 20),
    "gpt3-175b": _gpt(12288, 96, 96, 2048),                # Brown et al. 2020 (arXiv:2005.14165), table 2.1
    "minilm-l6": _bert("bert", 384, 6, 12, 30522, 512, 2),
    "roberta-base": _bert("roberta", 768, 12, 12, 50265, 514, 1),
    "roberta-large": _bert("roberta", 1024, 24, 16, 50265, 514, 1),
    "smollm2-135m": _llama(576, 30, 9, 1536, 3, vocab_size=49152, max_position_embeddings=8192, tie_word_embeddings=True),
    "llama-2-7b": _llama(4096, 32, 32, 11008),
    "llama-2-13b": _llama(5120, 40, 40, 13824),
    "llama-2-70b": _llama(8192, 80, 64, 28672, 8),
}


class _NoWeights(Init):
    def normal(self, *shape: int, std: float = 0.02) -> Array:
        return self.zeros(*shape)

    def zeros(self, *shape: int) -> Array:
        return np.broadcast_to(np.zeros((), self.dtype), shape)


class Outline(Transformer):
    """A Transformer to count and to look up modules in, not to run: its weights have shapes and take no memory."""

    initial = _NoWeights


def outline(source: str | os.PathLike[str] | Mapping[str, Any] | TransformerConfig | Transformer) -> Outline:
    """The outline of a model.

    source: a TransformerConfig; a model; what a hub's config.json says, as a dict; such a file, a folder with one, or a hub id;
    or a name of SHAPES ("gpt2", "llama-2-7b" …). Weights are neither loaded nor needed.

    Raises FileNotFoundError for what is not there, ValueError for a config that is not as it should be.
    """
    if isinstance(source, Transformer):
        return Outline(source.cfg)
    if isinstance(source, TransformerConfig):
        return Outline(source)
    if isinstance(source, Mapping):
        return Outline(from_hf(dict(source), "config"))
    path, name = Path(source), os.fspath(source)
    if name in SHAPES and not path.exists():
        return Outline(from_hf(SHAPES[name], name))
    if not path.exists() and not HUB_ID.fullmatch(name):
        raise FileNotFoundError(f"{name!r} is not a path, expected a config.json or a folder with one, a hub id like "
                                f"\"org/name\", or one of {', '.join(SHAPES)}")
    if path.is_dir() and (path / "config.json").is_file():         # its weights may be missing
        path = path / "config.json"
    elif path.suffix != ".json":
        path = find(source) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist, expected a config.json: a GGUF file has none, name the shape instead")
    return Outline(from_hf(read_json(path), path))
