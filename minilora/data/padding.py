"""Sequences of different lengths as one rectangle of ids and a mask that says which are real."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def left_padded(prompts: Sequence[Sequence[int]], pad_token_id: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Prompts of different lengths as (ids, attention_mask), both (B, T), with the padding on the left for `generate`."""
    T = max(map(len, prompts))
    mask = np.arange(T) >= T - np.array([[len(prompt)] for prompt in prompts])
    ids = np.full(mask.shape, pad_token_id)
    ids[mask] = np.concatenate(prompts)
    return ids, mask.astype(np.int64)
