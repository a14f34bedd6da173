"""Parity: minilora against PyTorch, transformers and PEFT, on random weights and small shapes.

Without those libraries the tests skip, unless MINILORA_REQUIRE_PARITY is set: then their absence is an error.
"""

from __future__ import annotations

import importlib.util
import os
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minilora.nn import Transformer, TransformerConfig
from minilora.nn.names import import_state

os.environ.setdefault("HF_HUB_OFFLINE", "1")               # PEFT would ask the hub about a base's vocabulary
MISSING = [name for name in ("torch", "transformers", "peft") if importlib.util.find_spec(name) is None]
if MISSING and os.environ.get("MINILORA_REQUIRE_PARITY"):
    raise pytest.UsageError(f"MINILORA_REQUIRE_PARITY is set, but {', '.join(MISSING)} cannot be imported: "
                            'pip install "minilora[parity]"')
if not MISSING:
    with warnings.catch_warnings():                        # what these libraries say about each other while being imported
        warnings.simplefilter("ignore")
        import peft  # noqa: F401
        import torch
        import transformers

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.parity)


def twin_config(form: str, **fields: Any) -> TransformerConfig:
    """A small config, no two of whose sizes are equal."""
    sizes = {"vocab_size": 37, "d_model": 24, "n_layers": 2, "n_heads": 6, "d_ff": 40, "max_len": 20}
    return getattr(TransformerConfig, form)(**sizes | ({"n_kv_heads": 2} if form == "llama" else {}) | fields)


def their_model(cfg: TransformerConfig, dtype: str, seed: int = 0) -> Any:
    """The transformers model with the shape of `cfg`; every parameter random, norms and biases too."""
    common = {"vocab_size": cfg.vocab_size, "num_labels": cfg.n_labels or 2, "pad_token_id": 0}
    if cfg.model_type == "gpt2":
        config = transformers.GPT2Config(n_embd=cfg.d_model, n_layer=cfg.n_layers, n_head=cfg.n_heads, n_inner=cfg.d_ff,
                                         n_positions=cfg.max_len, layer_norm_epsilon=cfg.norm_eps, resid_pdrop=cfg.dropout,
                                         embd_pdrop=cfg.dropout, attn_pdrop=cfg.dropout,
                                         tie_word_embeddings=cfg.tie_embeddings, **common)
        kinds = {"lm": "GPT2LMHeadModel", "sequence": "GPT2ForSequenceClassification"}
    elif cfg.model_type == "bert":
        config = transformers.BertConfig(hidden_size=cfg.d_model, num_hidden_layers=cfg.n_layers, num_attention_heads=cfg.n_heads,
                                         intermediate_size=cfg.d_ff, max_position_embeddings=cfg.max_len,
                                         layer_norm_eps=cfg.norm_eps, type_vocab_size=cfg.n_token_types,
                                         hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **common)
        kinds = {"sequence": "BertForSequenceClassification", "token": "BertForTokenClassification"}
    else:
        config = transformers.LlamaConfig(hidden_size=cfg.d_model, num_hidden_layers=cfg.n_layers,
                                          num_attention_heads=cfg.n_heads, num_key_value_heads=cfg.n_kv_heads,
                                          intermediate_size=cfg.d_ff, max_position_embeddings=cfg.max_len,
                                          rms_norm_eps=cfg.norm_eps, tie_word_embeddings=cfg.tie_embeddings,
                                          rope_parameters={"rope_type": "default", "rope_theta": cfg.rope_theta}, **common)
        kinds = {"lm": "LlamaForCausalLM", "sequence": "LlamaForSequenceClassification",
                 "token": "LlamaForTokenClassification"}
    model = getattr(transformers, kinds[cfg.head])(config).to(getattr(torch, dtype)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            centre = 1.0 if p.ndim == 1 and name.endswith("weight") else 0.0
            p.copy_(centre + 0.2 * torch.randn(p.shape, generator=generator, dtype=torch.float64))
    if cfg.model_type == "llama" and dtype == "float64":
        without_float32(model, cfg)
    return model


def without_float32(model: Any, cfg: TransformerConfig) -> None:
    """transformers computes Llama's norms and angles in float32 even in a float64 model: 1e-7, where we compare to 1e-10."""
    def tables(x: Any, position_ids: Any) -> Any:
        frequencies = cfg.rope_theta ** (-torch.arange(0, cfg.head_dim, 2, dtype=torch.float64) / cfg.head_dim)
        angles = torch.cat(2 * [position_ids[..., None].double() * frequencies], dim=-1)
        return angles.cos(), angles.sin()

    model.model.rotary_emb.forward = tables
    for module in model.modules():
        if type(module).__name__ == "LlamaRMSNorm":
            module.forward = partial(torch.nn.functional.rms_norm, normalized_shape=(cfg.d_model,), weight=module.weight,
                                     eps=module.variance_epsilon)


@pytest.fixture
def twins() -> Callable[..., Any]:
    """twins(form, dtype="float64", **fields) -> (ours, theirs): two models with the same random weights."""
    def make(form: str, dtype: str = "float64", **fields: Any) -> tuple[Transformer, Any]:
        cfg = twin_config(form, **fields)
        theirs = their_model(cfg, dtype)
        ours = Transformer(cfg, dtype=dtype)
        ours.load_state_dict(import_state(cfg, {key: value.numpy() for key, value in theirs.state_dict().items()}))
        return ours.eval(), theirs
    return make


@pytest.fixture
def close() -> Callable[..., None]:
    """close(got, expected, tolerance): the largest difference, relative to the largest expected value."""
    def check(got: Any, expected: Any, tolerance: float, what: str = "values") -> None:
        got, expected = np.asarray(got), np.asarray(expected)
        assert got.shape == expected.shape, f"{what}: shape {got.shape}, expected {expected.shape}"
        size = abs(expected).max()
        assert size > 0, f"{what}: nothing to compare, all expected values are 0"
        error = abs(got - expected).max() / size
        assert error <= tolerance, f"{what}: relative error {error:.2e}, expected at most {tolerance:.0e}"
    return check
