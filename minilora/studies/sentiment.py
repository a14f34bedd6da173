"""LoRA on MiniLM for sentiment: Rotten Tomatoes sentences, then IMDB reviews, here and in PyTorch + PEFT from the same start.

Same base, order of the data, initial A, B and classifier, hyperparameters, and no dropout: what differs is the arithmetic.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .. import plots
from ..data import movie_reviews, packaged_file, sha256
from ..tasks import TASKS, prepare
from .common import Options, say, writable_folder, write_json
from .torch_twin import against_twin, missing, rows_table

QUESTION = "How good is LoRA on MiniLM at sentiment, and does PyTorch + PEFT give the same predictions?"
SOURCE = "minilm-l6"


@dataclass(frozen=True)
class Part:
    """One corpus, and how much of it."""

    name: str
    corpus: str
    train: int
    held: int
    max_length: int
    settings: dict[str, Any] = field(default_factory=dict)         # beside the task's own


# The whole comparison has the settings of the task: of three others tried on 1,000 further sentences none was better by more
# than the noise, 1.2 points. At four times the rate rounding errors grow by e every 15 updates, and after three epochs the
# two sides are at two solutions, equally good, whose predictions agree on 88 %.
SIZES = {
    "quick": [Part("Rotten Tomatoes", "rotten_tomatoes", 120, 40, 64, {"steps": 8, "lr": 4e-3}),
              Part("IMDB", "imdb", 24, 16, 64, {"steps": 3, "lr": 4e-3, "batch": 8})],
    "default": [Part("Rotten Tomatoes", "rotten_tomatoes", 4000, 1000, 128),
                Part("IMDB", "imdb", 1000, 500, 256)],
    "full": [Part("Rotten Tomatoes", "rotten_tomatoes", 4000, 1000, 128),
             Part("IMDB", "imdb", 4000, 1000, 256)],
}


def run(options: Options) -> dict[str, Any]:
    """Train both sides on each corpus, write figures/sentiment.{png,svg,json}, and return the report."""
    start, out = time.perf_counter(), writable_folder(options.out)
    file, rows = packaged_file("movie-reviews"), []
    for part in SIZES[options.size]:
        say(f"{part.name}: {part.train:,} to train on, {part.held:,} held out")
        found = movie_reviews(part.corpus)
        order = np.random.default_rng(options.seed).permutation(len(found))
        examples = [found[i] for i in order[: part.train + part.held]]
        settings = TASKS["sentiment"].settings.with_(max_length=part.max_length, **part.settings)
        prepared = prepare(SOURCE, "sentiment", examples[: part.train], examples[part.train :], settings, seed=options.seed,
                           where=file, eval_where=file, progress=options.progress)
        rows.append(against_twin(prepared, SOURCE, part.name))
    report = {"study": "sentiment", "size": options.size, "seed": options.seed, "base": SOURCE,
              "sha256": {file.name: sha256(file)}, "rows": rows, "without": missing(), "seconds": time.perf_counter() - start}
    write_json(out / "sentiment.json", report)
    plots.save(plots.twins(report, "LoRA on MiniLM: sentiment of film reviews"), out / "sentiment")
    return report


def table(report: dict[str, Any]) -> str:
    """The report as text."""
    first = report["rows"][0]
    lines = [f"LoRA (r = {first['settings']['r']}, α = {first['settings']['lora_alpha']:g}) on q and v of {report['base']}: "
             f"{first['parameters']['trainable']:,} trained numbers", ""]
    lines += rows_table(report["rows"], report["without"])
    lines += ["", *(f"    {row['name']}: {row['train']:,} examples, {row['steps']:,} steps, {row['held_out']:,} held out, "
                    f"{row['truncated']:,} cut to {row['max_length']} tokens, {row['padding']:.1%} padding"
                    for row in report["rows"]), f"    {report['seconds']:.0f} s"]
    return "\n".join(lines)
