"""The Transformer: token ids in, logits out. One class for the GPT-2, BERT and Llama forms."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from ..autograd import Tensor, cross_entropy, in_shards, linear_cross_entropy, recomputed, tanh, where
from ..backend import Array, device_of, host_rng, kernels, to_device, to_host
from .blocks import NORMS, Init, KVCache, Rope, Run, build_layer, unrotated
from .config import TransformerConfig
from .layers import Dropout, Embedding, Linear
from .module import Module

POOLERS: dict[str, Any] = {"tanh": tanh, "relu": lambda x: where(x.data > 0, x, 0.0)}        # BERT, RoBERTa; DistilBERT


class Transformer(Module):
    """embed -> layers -> norm -> head.

    Paths of its modules: embed, pos_embed, type_embed, embed_norm, layers.{i}.attn.{q,k,v,o}_proj,
    layers.{i}.mlp.{up,down,gate}_proj, layers.{i}.{attn,mlp}_norm, final_norm, head, pooler, classifier.

    seed: of the initial weights and of dropout, drawn on the host; None leaves all weights 0, for a file to fill. dtype:
    "float32" to train, "float64" to check.

    recompute: set it to True to save memory: of each layer only the input is kept, and backward computes its activations
    again (a third more time). Not with dropout, whose masks would differ: ValueError.
    """

    recompute = False
    initial = Init                           # draws the initial weights

    def __init__(self, cfg: TransformerConfig, seed: int | None = 0, dtype: str = "float32") -> None:
        self.cfg = cfg
        self.rng = host_rng(seed or 0)
        init = self.initial(self.rng, dtype, blank=seed is None)
        D = cfg.d_model
        learned = cfg.position == "learned"
        self.embed = Embedding(init.normal(cfg.vocab_size, D))
        self.pos_embed = Embedding(init.normal(cfg.position_offset + cfg.max_len, D)) if learned else None
        self.type_embed = Embedding(init.normal(cfg.n_token_types, D)) if cfg.n_token_types else None
        self.embed_norm = None if cfg.norm_first else NORMS[cfg.norm](D, cfg.norm_eps, dtype)
        self.embed_dropout = Dropout(cfg.dropout, self.rng)
        rotate = unrotated if learned else Rope(cfg, dtype)
        self.layers = [build_layer(cfg, init, rotate, i) for i in range(cfg.n_layers)]
        self.final_norm = NORMS[cfg.norm](D, cfg.norm_eps, dtype) if cfg.norm_first else None
        self.head: Any = None                                      # each of the three a Linear, or None
        self.pooler: Any = None
        self.classifier: Any = None
        if cfg.head == "lm":
            self.head = Linear(self.embed.weight if cfg.tie_embeddings else init.normal(cfg.vocab_size, D))
        if cfg.pooler != "none":
            self.pooler = init.linear(D, D, True)
        if cfg.n_labels is not None and cfg.head != "lm":
            self.classifier = init.linear(D, cfg.n_labels, not cfg.causal)
        self.adapter_configs: dict[str, Any] = {}                  # by adapter name, kept by lora/
        self.drawn: list[str] = []                                 # parameters that a checkpoint did not hold, by pretrained/

    def __call__(self, ids: Any, *, attention_mask: Any = None, token_type_ids: Any = None,
                 position_ids: Any = None, adapter_names: Sequence[str] | None = None,
                 cache: list[KVCache] | None = None, last: bool = False) -> Tensor:
        """Logits for token ids (B, T): (B, T, V), or by the config's head (B, n_labels) or (B, T, n_labels).

        attention_mask (B, T): 0 marks padding, which nobody attends to. token_type_ids (B, T): BERT's segments, 0 if left
        out. position_ids (B, T): rows of the table of learned positions, where they are not 0, 1, 2 … (behind padding on the
        left, say; rotary positions need none, since they see distances only). adapter_names: for each row of the batch the
        adapter it uses, "__base__" for none. cache: from `new_cache`, for generation: the ids continue the sequence that the
        cache holds, and attention_mask is for all of it. last: of logits (B, T, V) only those of the last position, (B, 1, V),
        without the arithmetic for the others that these do not need (transformers' logits_to_keep=1).

        Raises IndexError for an id outside the vocabulary, ValueError for a sequence longer than max_len or masks, types,
        positions and names that do not fit the batch.
        """
        with self._rows_use(adapter_names, ids):
            x = self.hidden(ids, attention_mask=attention_mask, token_type_ids=token_type_ids, position_ids=position_ids,
                            cache=cache, read=self._read(ids, attention_mask, last))
            return self.answer(x)

    def loss(self, ids: Any, targets: Any, *, ignore_index: int = -100, label_smoothing: float = 0.0, groups: int | None = None,
             attention_mask: Any = None, token_type_ids: Any = None, adapter_names: Sequence[str] | None = None) -> Tensor:
        """cross_entropy(model(ids), targets): () or, for K groups of rows, (K,). Does not shift.

        The same number, but under a frozen language-model head the array of all logits (B, T, V) is never made. Arguments and
        errors as in calling the model and as for `cross_entropy`.
        """
        counting: Any = {"ignore_index": ignore_index, "label_smoothing": label_smoothing, "groups": groups}
        with self._rows_use(adapter_names, ids):
            x = self.hidden(ids, attention_mask=attention_mask, token_type_ids=token_type_ids,
                            read=self._read(ids, attention_mask))
            if self.head is not None and self.head.plain and not self.head.weight.requires_grad:
                return linear_cross_entropy(x, self.head.weight, targets, **counting)
            return cross_entropy(self.answer(x), targets, **counting)

    def hidden(self, ids: Any, *, attention_mask: Any = None, token_type_ids: Any = None, position_ids: Any = None,
               cache: list[KVCache] | None = None, read: np.ndarray | None = None) -> Tensor:
        """The last hidden states (B, T, D), before the head. Arguments as in calling the model.

        read (B,), negative: one position of each row, counted from the end, whose states alone are wanted: (B, 1, D). After it
        may come nothing but padding. The last layer then does its work for this position only, all but keys and values.
        """
        shape = np.shape(to_host(ids))
        if len(shape) != 2 or 0 in shape:
            raise ValueError(f"ids of shape {shape}, expected (B, T) with at least one token; one sequence is ids[None, :]")
        start = 0 if cache is None else cache[0].start
        T = shape[1]
        if start + T > self.cfg.max_len:
            raise ValueError(f"sequence of {start + T} tokens, expected at most max_len = {self.cfg.max_len}: cut or split it")
        for what, given, table, fields in (("token_type_ids", token_type_ids, self.type_embed, "n_token_types > 0"),
                                           ("position_ids", position_ids, self.pos_embed, 'position "learned"')):
            if given is not None and (table is None or np.shape(to_host(given)) != shape):
                raise ValueError(f"{what} of shape {np.shape(to_host(given))}, expected {shape} and a model with {fields}")
        run = Run(self._key_mask(attention_mask, (shape[0], start + T)), start, cache, None if T == 1 else read)
        x = self.embed(to_host(ids))                               # checked there, on the host, once
        if self.pos_embed is not None:
            x = x + self.pos_embed(self.positions(to_host(ids), start) if position_ids is None else to_host(position_ids))
        if self.type_embed is not None:
            types = np.zeros(shape, np.int64) if token_type_ids is None else token_type_ids
            x = x + self.type_embed(to_host(types))
        if self.embed_norm is not None:
            x = self.embed_norm(x)
        x = self.embed_dropout(x)
        return in_shards(lambda x, rows: self._through(x, run.of(rows)), x, self._shards(x, run))

    def _through(self, x: Tensor, run: Run) -> Tensor:             # (B, T, D) -> (B, T, D), or (B, 1, D)
        again = self.recompute and run.cache is None
        if again and not all(module.repeatable for _, module in self.named_modules()):
            raise ValueError("recompute with dropout or adapter_names: a second pass would not do the same; use model.eval(), "
                             "dropout 0, or recompute = False")
        runs = [replace(run, read=None)] * (len(self.layers) - 1) + [run]
        for layer, run in zip(self.layers, runs):
            x = recomputed(partial(layer, run=run), x) if again else layer(x, run)
        return x if self.final_norm is None else self.final_norm(x)

    def positions(self, ids: np.ndarray, start: int) -> np.ndarray:
        """The rows of the position table: (1, T), or by RoBERTa's count, which leaves out padding, (B, T)."""
        padding = self.cfg.position_offset - 1
        if padding < 0:
            return np.arange(start, start + ids.shape[1])[None]
        return padding + np.cumsum(ids != padding, axis=1) * (ids != padding)

    def _shards(self, x: Tensor, run: Run) -> list[slice]:
        """The rows of the batch, shared out to threads where that is worth while and nothing forbids it."""
        shards = kernels(x.data).shards(len(x), x.size)
        apart = len(shards) == 1 or (run.cache is None and all(module.rowwise for _, module in self.named_modules()))
        return shards if apart else [slice(0, len(x))]

    def _read(self, ids: Any, mask: Any, last: bool = False) -> np.ndarray | None:       # (B, T) twice -> (B,)
        """Where the answer is made from, counted from the end; None: from everywhere. A pooler reads the first position, a
        classifier without one the last that is no padding."""
        shape, sequence = np.shape(to_host(ids)), self.cfg.head == "sequence"
        if len(shape) != 2 or not (last or sequence):
            return None
        if sequence and self.pooler is not None:           # of a causal model the one query would see what comes after it
            return None if self.cfg.causal else np.full(shape[0], -shape[1])
        if not sequence or mask is None or np.ndim(to_host(mask)) != 2 or not np.size(to_host(mask)):
            return np.full(shape[0], -1)                   # a mask that does not fit is refused in `hidden`
        return -1 - np.argmax(to_host(mask)[:, ::-1] != 0, axis=1)

    def answer(self, x: Tensor) -> Tensor:
        """What the config's head makes of the last hidden states: (B, T, D), or for a classifier of sequences (B, 1, D)."""
        if self.cfg.head == "none":
            return x
        if self.cfg.head == "sequence":
            x = x[:, 0] if self.pooler is None else POOLERS[self.cfg.pooler](self.pooler(x[:, 0]))
        return (self.head or self.classifier)(x)

    def new_cache(self) -> list[KVCache]:
        """An empty key-value cache for `model(ids, cache=...)`."""
        return [KVCache(self.cfg.max_len) for _ in self.layers]

    @contextmanager
    def _rows_use(self, names: Sequence[str] | None, ids: Any) -> Iterator[None]:
        """Tell every adapted layer which adapter each row of the batch uses, for the time of one forward pass."""
        if names is None:
            yield
            return
        adaptations = [a for _, m in self.named_modules() if (a := getattr(m, "adaptation", None)) is not None]
        if len(names) != len(ids):
            raise ValueError(f"{len(names)} adapter names for a batch of {len(ids)} rows: give one for each row")
        unknown = set(names) - {"__base__"} - {name for a in adaptations for name in a.adapters}
        if unknown:
            raise ValueError(f"no adapter named {sorted(unknown)[0]!r} on this model: add or load it first")
        for a in adaptations:
            a.row_names = names
        try:
            yield
        finally:
            for a in adaptations:
                a.row_names = None

    def _key_mask(self, mask: Any, shape: tuple[int, int]) -> Array | None:
        if mask is not None and np.shape(to_host(mask)) != shape:
            raise ValueError(f"attention_mask of shape {np.shape(to_host(mask))}, expected {shape}, one entry for each key")
        return None if mask is None else to_device(to_host(mask), device_of(self.embed.weight.data).name)
