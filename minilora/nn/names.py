"""Our module paths and the names that the same modules have in the ecosystem's files, one table per architecture.

`config.model_type` picks the table. Adapters and checkpoints on disk speak the file names; everything in memory speaks ours.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

import numpy as np

from .config import TransformerConfig

GPT2 = {
    "embed": "transformer.wte",
    "pos_embed": "transformer.wpe",
    "layers.{i}.attn_norm": "transformer.h.{i}.ln_1",
    "layers.{i}.attn.qkv_proj": "transformer.h.{i}.attn.c_attn",
    "layers.{i}.attn.o_proj": "transformer.h.{i}.attn.c_proj",
    "layers.{i}.mlp_norm": "transformer.h.{i}.ln_2",
    "layers.{i}.mlp.up_proj": "transformer.h.{i}.mlp.c_fc",
    "layers.{i}.mlp.down_proj": "transformer.h.{i}.mlp.c_proj",
    "final_norm": "transformer.ln_f",
    "head": "lm_head",
    "classifier": "score",
}
BERT = {
    "embed": "bert.embeddings.word_embeddings",
    "pos_embed": "bert.embeddings.position_embeddings",
    "type_embed": "bert.embeddings.token_type_embeddings",
    "embed_norm": "bert.embeddings.LayerNorm",
    "layers.{i}.attn.q_proj": "bert.encoder.layer.{i}.attention.self.query",
    "layers.{i}.attn.k_proj": "bert.encoder.layer.{i}.attention.self.key",
    "layers.{i}.attn.v_proj": "bert.encoder.layer.{i}.attention.self.value",
    "layers.{i}.attn.o_proj": "bert.encoder.layer.{i}.attention.output.dense",
    "layers.{i}.attn_norm": "bert.encoder.layer.{i}.attention.output.LayerNorm",
    "layers.{i}.mlp.up_proj": "bert.encoder.layer.{i}.intermediate.dense",
    "layers.{i}.mlp.down_proj": "bert.encoder.layer.{i}.output.dense",
    "layers.{i}.mlp_norm": "bert.encoder.layer.{i}.output.LayerNorm",
    "pooler": "bert.pooler.dense",
    "classifier": "classifier",
}
LLAMA = {
    "embed": "model.embed_tokens",
    "layers.{i}.attn_norm": "model.layers.{i}.input_layernorm",
    "layers.{i}.attn.q_proj": "model.layers.{i}.self_attn.q_proj",
    "layers.{i}.attn.k_proj": "model.layers.{i}.self_attn.k_proj",
    "layers.{i}.attn.v_proj": "model.layers.{i}.self_attn.v_proj",
    "layers.{i}.attn.o_proj": "model.layers.{i}.self_attn.o_proj",
    "layers.{i}.mlp_norm": "model.layers.{i}.post_attention_layernorm",
    "layers.{i}.mlp.gate_proj": "model.layers.{i}.mlp.gate_proj",
    "layers.{i}.mlp.up_proj": "model.layers.{i}.mlp.up_proj",
    "layers.{i}.mlp.down_proj": "model.layers.{i}.mlp.down_proj",
    "final_norm": "model.norm",
    "head": "lm_head",
    "classifier": "score",
}
DISTILBERT = {
    "embed": "distilbert.embeddings.word_embeddings",
    "pos_embed": "distilbert.embeddings.position_embeddings",
    "embed_norm": "distilbert.embeddings.LayerNorm",
    "layers.{i}.attn.q_proj": "distilbert.transformer.layer.{i}.attention.q_lin",
    "layers.{i}.attn.k_proj": "distilbert.transformer.layer.{i}.attention.k_lin",
    "layers.{i}.attn.v_proj": "distilbert.transformer.layer.{i}.attention.v_lin",
    "layers.{i}.attn.o_proj": "distilbert.transformer.layer.{i}.attention.out_lin",
    "layers.{i}.attn_norm": "distilbert.transformer.layer.{i}.sa_layer_norm",
    "layers.{i}.mlp.up_proj": "distilbert.transformer.layer.{i}.ffn.lin1",
    "layers.{i}.mlp.down_proj": "distilbert.transformer.layer.{i}.ffn.lin2",
    "layers.{i}.mlp_norm": "distilbert.transformer.layer.{i}.output_layer_norm",
    "pooler": "pre_classifier",
    "classifier": "classifier",
}
ROBERTA = {ours: theirs.replace("bert.", "roberta.", 1) for ours, theirs in BERT.items()}
TABLES = {"gpt2": GPT2, "bert": BERT, "roberta": ROBERTA, "distilbert": DISTILBERT, "llama": LLAMA, "mistral": LLAMA,
          "qwen2": LLAMA}
BY_HEAD = {("roberta", "sequence"): {"pooler": "classifier.dense", "classifier": "classifier.out_proj"}}
GGUF = {                                               # llama.cpp's names, for the llama architecture
    "embed": "token_embd",
    "layers.{i}.attn_norm": "blk.{i}.attn_norm",
    "layers.{i}.attn.q_proj": "blk.{i}.attn_q",
    "layers.{i}.attn.k_proj": "blk.{i}.attn_k",
    "layers.{i}.attn.v_proj": "blk.{i}.attn_v",
    "layers.{i}.attn.o_proj": "blk.{i}.attn_output",
    "layers.{i}.mlp_norm": "blk.{i}.ffn_norm",
    "layers.{i}.mlp.gate_proj": "blk.{i}.ffn_gate",
    "layers.{i}.mlp.up_proj": "blk.{i}.ffn_up",
    "layers.{i}.mlp.down_proj": "blk.{i}.ffn_down",
    "final_norm": "output_norm",
    "head": "output",
}
TRANSPOSED = {"gpt2": ("c_attn", "c_proj", "c_fc")}    # modules whose weight the files store as (in, out)
DEFAULT_TARGETS = {"gpt2": ("qkv_proj",)}              # PEFT's default targets; q_proj and v_proj everywhere else
BLOCKS = ("q_proj", "k_proj", "v_proj")                # the row blocks of qkv_proj, in order

# What files hold beyond the tables: constants that are no weights, and heads that we do not build.
CONSTANTS = re.compile(r"(.*\.)?(attn\.(masked_)?bias|position_ids|rotary_emb\.inv_freq)")
HEADS = {
    "bert": r"cls\..*|classifier\..*|qa_outputs\..*|(bert\.)?pooler\..*",
    "roberta": r"lm_head\..*|classifier\..*|qa_outputs\..*|(roberta\.)?pooler\..*",
    "distilbert": r"vocab_.*|pre_classifier\..*|classifier\..*|qa_outputs\..*",
}
CAUSAL_HEADS = r"lm_head\..*|score\..*"


def file_names(cfg: TransformerConfig, table: dict[str, str] | None = None) -> dict[str, str]:
    """Our module path -> the file's module path, for every module of this architecture; empty without a model_type.

    A model without a head has the names of the bare model, without the first part ("bert."). table: another one to fill in.
    """
    if table is None:
        table = TABLES.get(cfg.model_type or "", {}) | BY_HEAD.get((cfg.model_type or "", cfg.head), {})
        if cfg.head == "none":
            table = {ours: theirs.removeprefix(root(cfg)) for ours, theirs in table.items()}
    return {ours.format(i=i): theirs.format(i=i) for ours, theirs in table.items()
            for i in range(cfg.n_layers if "{i}" in ours else 1)}


def root(cfg: TransformerConfig) -> str:
    """What the names of a model with a head begin with, and those of the bare model do not: "bert.", "model." …"""
    return TABLES[cfg.model_type or ""]["embed"].partition(".")[0] + "."


def unused(cfg: TransformerConfig, key: str) -> bool:
    """Whether a checkpoint may hold this key although the model has no place for it."""
    return bool(CONSTANTS.fullmatch(key) or re.fullmatch(HEADS.get(cfg.model_type or "", CAUSAL_HEADS), key))


def stored_transposed(cfg: TransformerConfig, file_path: str) -> bool:
    """Whether the files store this module's weight as (in, out), as GPT-2's Conv1D does."""
    return file_path.rpartition(".")[2] in TRANSPOSED.get(cfg.model_type or "", ())


def file_keys(cfg: TransformerConfig, paths: Iterable[str]) -> dict[str, list[str]]:
    """The tensors of a checkpoint -> the parameters (our paths) that each holds: one, or the row blocks of a packed weight.

    Raises ValueError for a parameter that the architecture's files do not have, such as an adapter's.
    """
    names, keys = file_names(cfg), dict[str, list[str]]()
    for path in paths:
        module, _, leaf = path.rpartition(".")
        prefix, _, block = module.rpartition(".")
        packed = f"{prefix}.qkv_proj" if block in BLOCKS else module
        if names and not names.keys() & {module, packed}:
            raise ValueError(f"{path} has no name in the files of {cfg.model_type} models: merge adapters first, or use a "
                             "model without model_type")
        keys.setdefault(f"{names.get(module) or names.get(packed, module)}.{leaf}", []).append(path)
    for held in keys.values():
        if len(held) > 1:
            held.sort(key=lambda path: BLOCKS.index(path.split(".")[-2]))
    return keys


def import_state(cfg: TransformerConfig, tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A checkpoint's tensors under our paths: GPT-2's weights transposed, its c_attn cut into q, k and v.

    Keys that belong to no module of the table are returned under their own name, so that load_state_dict reports them.
    """
    ours = {theirs: path for path, theirs in file_names(cfg).items()}
    widths = np.cumsum([cfg.n_heads * cfg.head_dim, cfg.n_kv_heads * cfg.head_dim])
    state = {}
    for key, array in tensors.items():
        module, _, leaf = key.rpartition(".")
        path = ours.get(module, module)
        if leaf == "weight" and stored_transposed(cfg, module):
            array = array.T
        if path.endswith("qkv_proj"):
            for block, part in zip(BLOCKS, np.split(array, widths), strict=True):
                state[f"{path.removesuffix('qkv_proj')}{block}.{leaf}"] = part
        elif not (path == "head" and cfg.tie_embeddings):
            state[f"{path}.{leaf}"] = array
    return state


def export_state(cfg: TransformerConfig, state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The inverse of `import_state`: our state_dict under the file's names (our own without a model_type).

    Raises ValueError as file_keys does.
    """
    tensors = {}
    for key, paths in file_keys(cfg, state).items():
        array = state[paths[0]] if len(paths) == 1 else np.concatenate([state[path] for path in paths])
        transposed = key.endswith(".weight") and stored_transposed(cfg, key.removesuffix(".weight"))
        tensors[key] = np.ascontiguousarray(array.T if transposed else array)
    return tensors
