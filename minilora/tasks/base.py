"""The base of a fine-tuning, dense or in 4 bits: the same for the training and for what uses the adapter later."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ..methods import quantise as quantised
from ..nn import Transformer
from ..pretrained import Tokenizer, load_pretrained
from .folder import FACTS, read_object
from .presets import QUANTISED


def load_base(source: str | os.PathLike[str], quantise: str | None, **options: Any) -> tuple[Transformer, Tokenizer]:
    """`load_pretrained` with its options, the linear weights as `Settings.quantise` says.

    Raises ValueError without a tokenizer, and as load_pretrained does.
    """
    model, tokenizer = load_pretrained(source, quantised=quantise == "blocks", **options)
    if tokenizer is None:
        raise ValueError(f"{source} has no tokenizer, expected tokenizer.json beside the weights: save the tokenizer there")
    return model if quantise in (None, "blocks") else quantised(model, quantise), tokenizer


def trained_on(directory: str | os.PathLike[str]) -> str | None:
    """How the base of an adapter was quantised when it was trained; None: not, or by somebody else.

    Raises ValueError for a minilora.json that says what cannot be.
    """
    path = Path(directory) / FACTS
    found = read_object(path).get("quantise") if path.is_file() else None
    if found is not None and found not in list(QUANTISED):
        raise ValueError(f"{path}: quantise = {found!r}, expected one of {', '.join(QUANTISED)}, or null: fine-tune again")
    return found
