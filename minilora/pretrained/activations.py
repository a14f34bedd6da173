"""What a training step keeps between forward and backward, counted from shapes: the activations in a budget of memory.

The list is that of minilora's own graph, op by op (their docstrings say what each keeps), so on a small model it can be held
against the arrays that are really kept. It assumes: dropout 0; attention that keeps q, k, v, o and a number a query, never the
(T, T) scores; norms that keep their input once; a last layer that is worked out only where a classifier reads it; a loss
under a frozen head that keeps (B, T, D), not the logits. Not in it is what lives only within one op (the scores of a block of
heads, the logits of a block of rows), and what an allocator rounds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..nn import TransformerConfig


@dataclass(frozen=True)
class Kept:
    """What one adapted layer adds: whether its input must be kept, and how many further numbers."""

    input: bool
    more: int = 0


ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def kept_numbers(cfg: TransformerConfig, adapted: Mapping[str, Kept] | None, batch: int, tokens: int, *,
                 recompute: bool = False) -> int:
    """How many numbers one step on ids (batch, tokens) keeps for its backward pass.

    adapted: by path of the layer, what its adapter keeps; None: every parameter trains. recompute: as `Transformer.recompute`,
    the input of every layer and, for the moment, what one layer keeps.
    """
    tables = {"embed", "pos_embed", "type_embed"}
    n, total, single, live = batch * tokens, 0, 0, adapted is None or bool(tables & adapted.keys())
    for i in range(cfg.n_layers):
        if adapted is None:
            own = dict.fromkeys(ALL, Kept(True))
        else:
            prefix = f"layers.{i}."
            own = {path.rpartition(".")[2]: kept for path, kept in adapted.items() if path.startswith(prefix)}
        m = rows_of(cfg, f"layers.{i}.mlp", batch, tokens)
        layer = _attention(cfg, own, n, m, live)
        live = live or bool(own.keys() - {"gate_proj", "up_proj", "down_proj"})
        layer += _mlp(cfg, own, m, live)
        live = live or bool(own)
        total, single = total + (n * cfg.d_model if recompute and live else layer), max(single, layer)
    total += single if recompute else 0
    if not cfg.norm_first and (adapted is None or tables & adapted.keys()):
        total += _norm(cfg, n)                                     # of the embeddings
    return total + _ending(cfg, adapted, batch, n, live)


def rows_of(cfg: TransformerConfig, path: str, batch: int, tokens: int) -> int:
    """How many rows a layer works on: in the last layer all but q, k and v only those that a classifier reads, one a text."""
    last = path.startswith(f"layers.{cfg.n_layers - 1}.") and path.rpartition(".")[2] not in ("qkv_proj", *ALL[:3])
    return batch if last and cfg.head == "sequence" else batch * tokens


def _norm(cfg: TransformerConfig, n: int) -> int:
    return n * (cfg.d_model + 1)


def _attention(cfg: TransformerConfig, own: Mapping[str, Kept], n: int, m: int, live: bool) -> int:
    q, kv = cfg.n_heads * cfg.head_dim, cfg.n_kv_heads * cfg.head_dim
    of_qkv = [own[name] for name in ("qkv_proj", "q_proj", "k_proj", "v_proj") if name in own]
    total = sum(kept.more for kept in (*of_qkv, *[own[name] for name in ("o_proj",) if name in own]))
    if any(kept.input for kept in of_qkv):
        total += n * cfg.d_model
    if live or of_qkv:
        total += n * (q + 2 * kv) + m * q + m * cfg.n_heads        # q, k, v in one array; o; log Σ exp of the scores
        if cfg.position == "rope":
            total += n * kv                                        # k turned; what it was lies beside v
        if cfg.position == "rope" or m < n:
            total += m * q                                         # q turned, or the rows of it that are wanted
    elif "o_proj" in own and own["o_proj"].input:
        total += m * q                                             # else it is o, which attention keeps
    normed = live or (not cfg.norm_first and own.keys() & {*ALL[:4], "qkv_proj"})
    return total + (_norm(cfg, n if cfg.norm_first else m) if normed else 0)


def _mlp(cfg: TransformerConfig, own: Mapping[str, Kept], n: int, live: bool) -> int:
    entry, F = [own[name] for name in ("gate_proj", "up_proj") if name in own], cfg.d_ff
    total = sum(kept.more for kept in (*entry, *[own[name] for name in ("down_proj",) if name in own]))
    if any(kept.input for kept in entry):
        total += n * cfg.d_model
    if live or entry:
        total += n * F * (2 if cfg.mlp == "swiglu" else 1)         # the slopes
    if "down_proj" in own and own["down_proj"].input:
        total += n * F
    return total + (_norm(cfg, n) if live or (not cfg.norm_first and own) else 0)


def _ending(cfg: TransformerConfig, adapted: Mapping[str, Kept] | None, batch: int, n: int, live: bool) -> int:
    """The last norm, the head and the loss."""
    rows, D = batch if cfg.head == "sequence" else n, cfg.d_model
    total = _norm(cfg, rows) if cfg.norm_first and live else 0
    if cfg.head == "lm":
        head = Kept(True) if adapted is None else adapted.get("head")
        return total + (n * D if head is None else (n * D if head.input else 0) + head.more + n * (cfg.vocab_size + 1))
    if cfg.n_labels is not None:
        total += rows * (D + cfg.n_labels + 1)
    return total + (rows * D * 2 if cfg.pooler != "none" else 0)
