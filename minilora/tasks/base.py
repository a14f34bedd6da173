"""The base of a fine-tuning, dense or in 4 bits: the same for the training and for what uses the adapter later."""

from __future__ import annotations

import os
from typing import Any

from ..methods import quantise as quantised
from ..nn import Transformer
from ..pretrained import Tokenizer, load_pretrained


def load_base(source: str | os.PathLike[str], quantise: str | None, **options: Any) -> tuple[Transformer, Tokenizer]:
    """`load_pretrained` with its options, the linear weights as `Settings.quantise` says. Raises ValueError without a
    tokenizer, and as load_pretrained does."""
    model, tokenizer = load_pretrained(source, quantised=quantise == "blocks", **options)
    if tokenizer is None:
        raise ValueError(f"{source} has no tokenizer, expected tokenizer.json beside the weights: save the tokenizer there")
    return model if quantise in (None, "blocks") else quantised(model, quantise), tokenizer
