"""Our module paths and the names that the same modules have in the ecosystem's files, one table per architecture.

`config.model_type` picks the table. Adapters and checkpoints on disk speak the file names; everything in memory speaks ours.
"""

from __future__ import annotations

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
TABLES = {"gpt2": GPT2, "bert": BERT, "llama": LLAMA}
TRANSPOSED = {"gpt2": ("c_attn", "c_proj", "c_fc")}    # modules whose weight the files store as (in, out)
DEFAULT_TARGETS = {"gpt2": ("qkv_proj",)}              # PEFT's default targets; q_proj and v_proj everywhere else
BLOCKS = ("q_proj", "k_proj", "v_proj")                # the row blocks of qkv_proj, in order


def file_names(cfg: TransformerConfig) -> dict[str, str]:
    """Our module path -> the file's module path, for every module of this architecture; empty without a model_type."""
    table = TABLES.get(cfg.model_type or "", {})
    return {ours.format(i=i): theirs.format(i=i) for ours, theirs in table.items()
            for i in range(cfg.n_layers if "{i}" in ours else 1)}


def stored_transposed(cfg: TransformerConfig, file_path: str) -> bool:
    """Whether the files store this module's weight as (in, out), as GPT-2's Conv1D does."""
    return file_path.rpartition(".")[2] in TRANSPOSED.get(cfg.model_type or "", ())


def import_state(cfg: TransformerConfig, tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A checkpoint's tensors under our paths: GPT-2's weights transposed, its c_attn cut into q, k and v.

    Keys that belong to no module of the table are returned under their own name, so that load_state_dict reports them.
    """
    ours = {theirs: path for path, theirs in file_names(cfg).items()}
    widths = np.cumsum([cfg.d_model, (cfg.n_kv_heads or cfg.n_heads) * cfg.head_dim])
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

    Raises ValueError for a module that the architecture's files do not have, such as an adapter.
    """
    names, tensors, state = file_names(cfg), {}, dict(state)
    for path in [p for p in names if p.endswith("qkv_proj")]:
        for leaf in ("weight", "bias"):
            keys = [f"{path.removesuffix('qkv_proj')}{block}.{leaf}" for block in BLOCKS]
            if keys[0] in state:
                state[f"{path}.{leaf}"] = np.concatenate([state.pop(key) for key in keys])
    for key, array in state.items():
        module, _, leaf = key.rpartition(".")
        if names and module not in names:
            raise ValueError(f"{key} has no name in the files of {cfg.model_type} models: merge adapters first, or use a model "
                             "without model_type")
        name = names.get(module, module)
        transposed = leaf == "weight" and stored_transposed(cfg, name)
        tensors[f"{name}.{leaf}"] = np.ascontiguousarray(array.T if transposed else array)
    return tensors
