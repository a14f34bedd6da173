"""The laboratory of the notebooks: one small base, one task, one clock.

Lessons 03 to 07 stand on the same byte-level GPT-2 (119 thousand parameters), pretrained on English prose and adapted to Python
source, made by the same code as the studies' and cached after its first use. MINILORA_QUICK=1 makes every run short: the cells
still run, but claims that need a trained model are asserted only at full length (`FULL`).
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from .. import plots
from ..data import Corpus, load_corpus
from ..nn import Transformer
from ..studies.common import Pretraining, text_batches
from ..studies.common import pretrain as pretrain_base
from ..studies.text import SOURCE, TARGET, Setting, base_of, copy_of, windows_of
from ..training import History

__all__ = ["FULL", "SETTING", "SOURCE", "TARGET", "Clock", "Picture", "base", "batches", "pretrain", "show", "valid"]

FULL = os.environ.get("MINILORA_QUICK", "0") in ("", "0")     # whether runs have their full length
SETTING = (Setting(64, 2, Pretraining(500, 32, 3e-3, 64), steps=150, batch=16, windows=64) if FULL
           else Setting(64, 2, Pretraining(40, 16, 3e-3, 64), steps=12, batch=8, windows=8))


def base() -> Transformer:
    """A fresh copy of the pretrained base: float32, 256 bytes as vocabulary, d_model 64, 2 layers, 4 heads, 64 tokens."""
    return copy_of(base_of(SETTING))


def pretrain(**watched: Any) -> tuple[Transformer, History]:
    """Train that base now, and keep it as what `base` gives from the next start on: the model and the history of its training.

    watched: evaluate, eval_every and callback, as for ml.train.
    """
    return pretrain_base(SETTING.config, load_corpus(SOURCE), SETTING.pretraining, SETTING.base_seed, **watched)


def batches(corpus: Corpus, seed: int = 0) -> Callable[[int], tuple[np.ndarray, np.ndarray]]:
    """Training batches of a corpus (ml.data.load_corpus) as a function of the step: (ids, targets), each (B, T)."""
    return text_batches(corpus, SETTING.batch, SETTING.pretraining.tokens, seed)


def valid(name: str = TARGET) -> list[tuple[np.ndarray, np.ndarray]]:
    """Fixed validation batches of a corpus, for ml.training.mean_loss: "python" is the task, "prose" what the base knows."""
    return windows_of(SETTING, name)


class Picture:
    """A figure as a PNG: what a notebook shows when this is a cell's last value."""

    def __init__(self, png: bytes) -> None:
        self._png = png

    def _repr_png_(self) -> bytes:
        return self._png


def show(figure: Any) -> Picture:
    """A matplotlib Figure as a PNG of 110 dots per inch that carries no software version and no time."""
    return Picture(plots.png(figure))


class Clock:
    """Seconds of a with block, in .seconds: for reading, never for asserting."""

    seconds = 0.0

    def __enter__(self) -> Clock:
        self._start = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = time.perf_counter() - self._start
