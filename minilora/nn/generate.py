"""Generation: feed the model its own words, one token at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from ..autograd import no_grad
from ..backend import host_rng, to_host
from .transformer import Transformer


def generate(model: Transformer, ids: Any, max_new_tokens: int, *, attention_mask: Any = None, temperature: float = 0.0,
             adapter_names: Sequence[str] | None = None, top_k: int | None = None, top_p: float | None = None,
             eos_token_id: int | None = None, seed: int | np.random.Generator = 0) -> np.ndarray:
    """Continue prompts ids (B, T) by up to max_new_tokens: (B, T + new) token ids on the host, prompt included.

    attention_mask (B, T): 0 at the padding on the left of prompts that are shorter (data/padding.py makes both); each row then
    gives what it gives alone. adapter_names: the adapter of each row, "__base__" for none; without them the active adapters
    are at work.

    temperature 0 takes the likeliest token (greedy); above 0 it samples from softmax(logits / temperature), restricted to
    the top_k likeliest tokens, or to the smallest set whose probability reaches top_p (with both: of the top_k's own). A row
    that has produced eos_token_id is filled with it; generation ends when all rows have. Keys and values are cached, so every
    token costs one position.

    Raises ValueError if the result would be longer than max_len, or for masks, names and options that do not fit.
    """
    new = [tokens[:, None] for tokens in stream(
        model, ids, max_new_tokens, attention_mask=attention_mask, adapter_names=adapter_names, temperature=temperature,
        top_k=top_k, top_p=top_p, eos_token_id=eos_token_id, seed=seed)]
    return np.concatenate([np.asarray(to_host(ids), dtype=np.int64), *new], axis=1)


def stream(model: Transformer, ids: Any, max_new_tokens: int, *, attention_mask: Any = None, temperature: float = 0.0,
           adapter_names: Sequence[str] | None = None, top_k: int | None = None, top_p: float | None = None,
           eos_token_id: int | None = None, seed: int | np.random.Generator = 0) -> Iterator[np.ndarray]:
    """As `generate`, but yields the tokens (B,) as they come."""
    ids = np.asarray(to_host(ids))
    mask: Any = None if attention_mask is None else np.asarray(to_host(attention_mask)) != 0
    if not model.cfg.causal or model.cfg.head != "lm":
        raise ValueError("generate needs a causal model with a language-modelling head; this one is "
                         f"causal={model.cfg.causal}, head={model.cfg.head!r}")
    if ids.ndim != 2 or max_new_tokens < 0 or ids.shape[1] + max_new_tokens > model.cfg.max_len:
        raise ValueError(f"prompt of shape {ids.shape} plus {max_new_tokens} new tokens: expected (B, T) with T + new at most "
                         f"max_len = {model.cfg.max_len}")
    if mask is not None and (mask.shape != ids.shape or not mask[:, -1:].all() or (mask[:, :-1] > mask[:, 1:]).any()):
        raise ValueError(f"attention_mask of shape {mask.shape}: expected {ids.shape}, 0 only before a row: pad on the left")
    if not 0 <= temperature < np.inf or (top_k is not None and top_k < 1) or (top_p is not None and not 0 < top_p <= 1):
        raise ValueError(f"temperature {temperature}, top_k {top_k}, top_p {top_p}: expected a finite temperature >= 0, "
                         "top_k >= 1, 0 < top_p <= 1")
    rng, cache, training = host_rng(seed), model.new_cache(), model.training
    finished, moved = np.zeros(len(ids), dtype=bool), mask is not None and model.pos_embed is not None
    model.eval()
    try:
        for _ in range(max_new_tokens):
            places = np.maximum(np.cumsum(mask, axis=1) - 1, 0)[:, -ids.shape[1] :] if moved else None
            with no_grad():
                output = model(ids, cache=cache, attention_mask=mask, position_ids=places, adapter_names=adapter_names,
                               last=True)
                logits = to_host(output[:, 0].data)                                # (B, V)
            tokens = choose(logits, temperature, top_k, top_p, rng)
            if eos_token_id is not None:
                tokens[finished] = eos_token_id
                finished |= tokens == eos_token_id
            yield tokens
            if finished.all():
                return
            ids = tokens[:, None]
            mask = None if mask is None else np.pad(mask, ((0, 0), (0, 1)), constant_values=True)
    finally:
        model.train(training)


def choose(logits: np.ndarray, temperature: float, top_k: int | None, top_p: float | None,
           rng: np.random.Generator) -> np.ndarray:
    """One token for each row of host logits (B, V), as `generate` describes."""
    if temperature == 0:
        return logits.argmax(axis=-1)
    order = np.argsort(-logits, axis=-1, kind="stable")                            # likeliest first
    ranked = np.take_along_axis(logits, order, axis=-1).astype(np.float64)
    p = np.exp((ranked - ranked[:, :1]) / max(temperature, 1e-200))                # below it the quotient may overflow
    if top_k is not None:
        p[:, top_k:] = 0.0
    p /= p.sum(axis=-1, keepdims=True)
    if top_p is not None:
        p[np.cumsum(p, axis=-1) - p >= top_p] = 0.0                                # keep the token that crosses top_p
    cumulative = np.cumsum(p, axis=-1)
    draws = rng.random((len(p), 1)) * cumulative[:, -1:]
    return np.take_along_axis(order, (cumulative <= draws).sum(axis=-1, keepdims=True), axis=-1)[:, 0]
