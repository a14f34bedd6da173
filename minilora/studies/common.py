"""What all studies share: their options, the cached pretrained base, and how results are written."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save
from tqdm import tqdm

from .. import plots, training
from ..backend.files import whole_files
from ..data import Corpus, eval_batches, sample_batch
from ..nn import Transformer, TransformerConfig

NUMBERS = re.compile(r"\[[-+\d.eE,\s]+\]")
CACHE_VERSION = 1      # raise it when pretraining changes, so that old caches are not read


@dataclass(frozen=True)
class Options:
    """What every study takes from the command line. size: "quick", "default" or "full"; seeds: how many (None: by the size);
    workers: dask://HOST:PORT, or None for this machine."""

    size: str = "default"
    seed: int = 0
    out: Path = Path("figures")
    progress: bool = True
    seeds: int | None = None
    workers: str | None = None


@dataclass(frozen=True)
class Pretraining:
    """How a base is made: byte-level, from one corpus."""

    steps: int
    batch: int
    lr: float
    tokens: int            # T


def writable_folder(path: Path, option: str = "--out") -> Path:
    """Make the folder, and prove before any work that files can be written there. Raises ValueError with the reason."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".minilora-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(f"cannot write to {option} {path}: {error.strerror}; choose another folder") from None
    return path


def write_json(path: Path, data: dict[str, Any]) -> None:
    """Write JSON so that no half file is ever seen, with each list of numbers on one line."""
    text = NUMBERS.sub(lambda found: " ".join(found[0].split()), json.dumps(data, indent=1, allow_nan=False))
    with whole_files(path.parent, "a report") as folder:
        (folder / path.name).write_text(text + "\n", encoding="utf-8")


def publish(report: dict[str, Any], figure: Any, options: Options) -> dict[str, Any]:
    """Write the report as JSON and its figure, under the study's name, into the folder of the options; returns the report."""
    name = report["study"].replace("-", "_")
    write_json(options.out / f"{name}.json", report)
    plots.save(figure, options.out / name)
    return report


def verdict_lines(report: dict[str, Any]) -> list[str]:
    """What was expected, and each claim with what was found: for every study's table."""
    return [f"expected: {report['expected']}",
            *(f"    {'as expected' if claim['agrees'] else 'NOT so here'}: {claim['claim']} ({claim['found']})"
              for claim in report["verdict"]), f"    {report['seconds']:.0f} s, beside what was stored before"]


def cache_folder() -> Path:
    """Where bases are kept: $MINILORA_CACHE, or minilora in the user's cache folder. Safe to delete at any time."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("MINILORA_CACHE") or Path(home) / "minilora")


def pretrained_base(cfg: TransformerConfig, corpus: Corpus, recipe: Pretraining, seed: int,
                    progress: Callable[[str], None] = lambda _: None) -> Transformer:
    """A base model pretrained on the corpus: from the cache if it was made before, else made now and cached.

    A file that cannot be read is made anew.
    """
    model = Transformer(cfg, seed=seed)
    try:
        model.load_state_dict(load_file(_place(cfg, corpus, recipe, seed)))
        return model
    except (OSError, SafetensorError, KeyError, ValueError):
        progress(f"pretraining the base on {corpus.name}")
    return pretrain(cfg, corpus, recipe, seed, progress)[0]


def pretrain(cfg: TransformerConfig, corpus: Corpus, recipe: Pretraining, seed: int,
             progress: Callable[[str], None] = lambda _: None, eval_every: int | None = None,
             **watched: Any) -> tuple[Transformer, training.History]:
    """Pretrain a base now, and put it where `pretrained_base` looks for it. Returns it with the history of its training.

    eval_every and watched (evaluate, callback) are as for `train`: they look at the run and change nothing.
    """
    model = Transformer(cfg, seed=seed)
    config = training.TrainConfig(steps=recipe.steps, lr=recipe.lr, warmup=0.1, schedule="cosine", weight_decay=0.01, clip=1.0,
                                  eval_every=eval_every)
    history = training.train(model, text_batches(corpus, recipe.batch, recipe.tokens, seed), config, **watched)
    path = _place(cfg, corpus, recipe, seed)
    try:
        with whole_files(path.parent, "the base") as folder:
            (folder / path.name).write_bytes(save(model.state_dict()))
    except OSError as error:                                       # a cache is a convenience: the result is there without it
        progress(f"the base is not cached ({error})")
    return model, history


def _place(cfg: TransformerConfig, corpus: Corpus, recipe: Pretraining, seed: int) -> Path:
    """Where a base is kept: the file's name is a digest of everything it depends on."""
    key = json.dumps([CACHE_VERSION, cfg.to_dict(), corpus.sha256, asdict(recipe), seed], sort_keys=True)
    return cache_folder() / f"base-{hashlib.sha256(key.encode()).hexdigest()[:20]}.safetensors"


def text_batches(corpus: Corpus, batch: int, tokens: int, seed: int) -> Callable[[int], tuple[np.ndarray, np.ndarray]]:
    """Training batches as a function of the step: random windows, repeatable."""
    return lambda step: sample_batch(corpus.train, batch, tokens, np.random.default_rng([seed, step]))


def validation(corpus: Corpus, batch: int, tokens: int, windows: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Fixed validation batches: the first `windows` windows of the corpus's validation half."""
    return eval_batches(corpus.valid, batch, tokens, limit=windows)


def say(message: str) -> None:
    """A line between progress bars."""
    tqdm.write(message)
