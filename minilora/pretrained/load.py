"""load_pretrained: a name, a folder or a file -> our Transformer and its tokenizer.

Nothing is believed before it is checked: the config, the names and shapes of all tensors, then the model is built, and then
each tensor is checked again for finite values while it is copied, block by block, into the place where it stays.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import numpy as np

from ..backend import host_rng, to_device, to_host
from ..methods.block_layers import replace_weights
from ..methods.ggml_blocks import GgmlBlocks
from ..nn import Transformer, TransformerConfig
from ..nn.blocks import Init
from ..nn.names import file_keys, file_names, root, stored_transposed, unused
from .hf_config import from_hf, read_json
from .hub import find
from .safetensors_file import Source, open_weights, row_blocks
from .tokenizer import Tokenizer, read_tokenizer


def load_pretrained(source: str | os.PathLike[str], *, head: str | None = None, n_labels: int | None = None,
                    dropout: float | None = None, dtype: str = "float32", seed: int = 0,
                    quantised: bool = False) -> tuple[Transformer, Tokenizer | None]:
    """(model, tokenizer) of a pretrained model; the model in evaluation mode, every parameter trainable.

    source: a folder in Hugging Face layout (gpt2, bert, roberta, distilbert, llama, mistral, qwen2; sentence-transformers
    too), a GGUF file of the llama architecture, a hub id "org/name" (the cache first), or "smollm2-135m" or "minilm-l6",
    which two packages hold. tokenizer: None if the folder has none.

    head: "lm", "sequence", "token", or "none" for the hidden states; by default what the model was saved with, and "none"
    for a masked language model. n_labels: for a new classifier, drawn from `seed`, whatever head the files have (the head is
    then "sequence" unless it is given); model.drawn lists what was drawn. dropout: in place of the config's. dtype: "float32",
    or "float64" for checks. quantised: of a GGUF file in Q4_0 or Q4_1 keep the linear weights (but head and classifier) in its
    blocks, 0.56 or 0.63 bytes a number: the same model number for number, with a frozen base, for QLoRA. (Of other files, load
    the weights and `quantise` them.)

    Raises FileNotFoundError for what is not there, ImportError for a library that is not installed, and ValueError, with one
    line that says what was got and what was expected, for files that are not as they should be.
    """
    where = find(source)
    options = {"head": head, "n_labels": n_labels, "dropout": dropout}
    if where.suffix == ".gguf":
        from .gguf_file import GgufFile
        from .gguf_tokenizer import gguf_tokenizer
        gguf = GgufFile(where)
        model = build(gguf.config(**options), gguf, where, dtype, seed, fresh=n_labels is not None, quantised=quantised)
        return model, gguf_tokenizer(gguf.metadata, where, model.cfg.vocab_size)
    if quantised:
        raise ValueError(f"{where} has no blocks of 4 bits to keep, expected a GGUF file in Q4_0 or Q4_1: take NF4, by "
                         "quantise(model) after loading, or --quantise nf4")
    found = read_json(where / "config.json")
    cfg = from_hf(found, where / "config.json", **options)                         # type: ignore[arg-type]
    tokenizer = read_tokenizer(where, found, cfg.vocab_size)
    return build(cfg, open_weights(where), where, dtype, seed, fresh=n_labels is not None), tokenizer


def build(cfg: TransformerConfig, source: Any, where: Any, dtype: str = "float32", seed: int = 0, fresh: bool = False,
          quantised: bool = False) -> Transformer:
    """A Transformer with the numbers of a `Source`. fresh: its classifier is a new one, whatever the source holds. quantised:
    linear weights stay in the blocks of the source, a GgufFile.

    Raises ValueError if a tensor is missing, left over, of another shape, or not finite.
    """
    keys = standard_keys(cfg, source.shapes)               # the tensor's name in the table -> its name in the source
    shapes = {name: source.shapes[key] for name, key in keys.items()}
    _check_sizes(cfg, shapes, where)
    if cfg.head == "none" and not _stored(cfg, "pooler", shapes):
        cfg.pooler = "none"                                # the files of models with most heads come without it
    model = Transformer(cfg, seed=None, dtype=dtype)
    parameters = dict(model.named_parameters())
    new = {path for path in parameters if fresh and (path.startswith("classifier.") or (
        path.startswith("pooler.") and not _stored(cfg, "pooler", shapes)))}
    plan = file_keys(cfg, parameters.keys() - new)
    _compare(cfg, {name: _shape(cfg, name, [parameters[path].shape for path in paths]) for name, paths in plan.items()}, shapes,
             where)
    if quantised:
        held = {path: keys[name] for name, (path, *_) in plan.items()}
        replace_weights(model, lambda path, layer: _in_blocks(source, held[f"{path}.weight"], dtype, where))
        parameters = dict(model.named_parameters())
        plan = {name: paths for name, paths in plan.items() if paths[0] in parameters}
    for name, paths in plan.items():
        row = 0
        for path in paths:
            target = parameters[path].data
            for start, stop in row_blocks(target.shape):
                values = source.rows(keys[name], row + start, row + stop, _transposed(cfg, name))
                target[start:stop] = to_device(np.ascontiguousarray(values))
                del values                                 # a view of the file: without it, the file's memory is given back
                source.release()
            row += target.shape[0]
    if cfg.head == "lm" and cfg.tie_embeddings and (second := keys.get("lm_head.weight")):
        _check_tied(to_host(parameters["embed.weight"]), source, second, where)
    init = Init(host_rng(seed), dtype)
    for path in sorted(path for path in new if path.endswith(".weight")):
        parameters[path].data[...] = init.normal(*parameters[path].shape)
    model.drawn = sorted(new)
    return model.eval()


def _in_blocks(source: Any, key: str, dtype: str, where: Any) -> GgmlBlocks:
    """A linear weight in the blocks of a GGUF file."""
    raw, kind = source.blocks(key)
    try:
        return GgmlBlocks(to_device(np.array(raw)), kind, dtype)
    except ValueError as error:
        raise ValueError(f"{where}: {key} has {error}") from None
    finally:
        del raw
        source.release()


def standard_keys(cfg: TransformerConfig, keys: Iterable[str]) -> dict[str, str]:
    """The name that a tensor has in the table of its architecture -> the name it has in this checkpoint.

    Checkpoints of bare models leave out the first part ("bert."), those of models with a head have it. BERT's oldest ones
    call the weight and bias of a norm gamma and beta.
    """
    if cfg.model_type is None:
        return {key: key for key in keys}
    first = root(cfg)
    bare, own = cfg.head == "none", any(key.startswith(first) for key in keys)

    def standard(key: str) -> str:
        key = key.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
        return key.removeprefix(first) if bare else key if own else first + key

    return {standard(key): key for key in keys}


def _check_sizes(cfg: TransformerConfig, shapes: dict[str, tuple[int, ...]], where: Any) -> None:
    """Refuse a config whose sizes are not the tensors', before anything of these sizes is made."""
    if cfg.n_layers > len(shapes):
        raise ValueError(f"{where}: the config says {cfg.n_layers} layers, but the file holds {len(shapes)} tensors: do the "
                         "two belong together?")
    names, hd = file_names(cfg), cfg.head_dim
    expected = {"embed": (cfg.vocab_size, cfg.d_model), "layers.0.attn.q_proj": (cfg.n_heads * hd, cfg.d_model),
                "layers.0.attn.qkv_proj": ((cfg.n_heads + 2 * cfg.n_kv_heads) * hd, cfg.d_model),
                "layers.0.mlp.up_proj": (cfg.d_ff, cfg.d_model)}
    if cfg.position == "learned":
        expected["pos_embed"] = (cfg.position_offset + cfg.max_len, cfg.d_model)
    if cfg.n_token_types:
        expected["type_embed"] = (cfg.n_token_types, cfg.d_model)
    known = {f"{names.get(path, path)}.weight": shape for path, shape in expected.items()}
    _same_shapes({name: _shape(cfg, name, [shape]) for name, shape in known.items() if name in shapes}, shapes, where)


def _compare(cfg: TransformerConfig, expected: dict[str, tuple[int, ...]], shapes: dict[str, tuple[int, ...]],
             where: Any) -> None:
    """Refuse a source that lacks a tensor, has one too many, or one of another shape."""
    extra = {name for name in shapes.keys() - expected.keys() if not unused(cfg, name)}
    for what, odd in (("lacks", expected.keys() - shapes.keys()), ("has tensors that no module is for:", extra)):
        if odd:
            more = f" and {len(odd) - 3} more" if len(odd) > 3 else ""
            raise ValueError(f"{where} {what} {', '.join(sorted(odd)[:3])}{more}; expected the tensors of a {cfg.model_type} "
                             f"model with {cfg.n_layers} layers and head {cfg.head!r}: do config and weights belong together, "
                             "or is another head= meant?")
    _same_shapes(expected, shapes, where)


def _same_shapes(expected: dict[str, tuple[int, ...]], shapes: dict[str, tuple[int, ...]], where: Any) -> None:
    for name, shape in expected.items():
        if shapes[name] != shape:
            raise ValueError(f"{where}: {name} has shape {shapes[name]}, expected {shape} by the config: do config and weights "
                             "belong together?")


def _check_tied(embed: np.ndarray, source: Source, key: str, where: Any) -> None:
    """A second copy of a table that the config calls tied has to be a copy."""
    same = source.shapes[key] == embed.shape
    for start, stop in row_blocks(embed.shape) if same else ():
        same = same and np.array_equal(source.rows(key, start, stop).astype(embed.dtype), embed[start:stop])
        source.release()
    if not same:
        raise ValueError(f"{where}: {key} differs from the embedding table, expected the same numbers since the config says "
                         "tie_word_embeddings: set it to false in config.json if the head is one of its own")


def _stored(cfg: TransformerConfig, module: str, shapes: dict[str, tuple[int, ...]]) -> bool:
    return f"{file_names(cfg).get(module, module)}.weight" in shapes


def _transposed(cfg: TransformerConfig, name: str) -> bool:
    return name.endswith(".weight") and stored_transposed(cfg, name.removesuffix(".weight"))


def _shape(cfg: TransformerConfig, name: str, parts: list[tuple[int, ...]]) -> tuple[int, ...]:
    """The shape of a file's tensor that holds parameters of these shapes, one below the other."""
    shape = (sum(part[0] for part in parts), *parts[0][1:])
    return shape[::-1] if _transposed(cfg, name) else shape
