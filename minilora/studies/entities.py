"""LoRA on MiniLM for names in tweets: entity-level F1, here and in PyTorch + PEFT from the same start."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from .. import plots
from ..data import packaged_file, read_tagged, sha256
from ..tasks import TASKS, prepare
from .common import Options, say, writable_folder, write_json
from .torch_twin import against_twin, missing, rows_table

QUESTION = "How good is LoRA on MiniLM at finding names in tweets, and does PyTorch + PEFT find the same ones?"
SOURCE = "minilm-l6"
SIZES: dict[str, dict[str, Any]] = {                       # of all 2,394 tweets a fifth is held out
    "quick": {"tweets": 120, "settings": {"steps": 8}},
    "default": {"tweets": None, "settings": {"epochs": 4.0}},
    "full": {"tweets": None, "settings": {"epochs": 8.0}},
}


def run(options: Options) -> dict[str, Any]:
    """Train both sides, write figures/entities.{png,svg,json}, and return the report."""
    start, out, size = time.perf_counter(), writable_folder(options.out), SIZES[options.size]
    file = packaged_file("tweets")
    tweets = read_tagged(file)
    order = np.random.default_rng(options.seed).permutation(len(tweets))[: size["tweets"]]
    say(f"{len(order):,} tweets, a fifth held out")
    prepared = prepare(SOURCE, "ner", [tweets[i] for i in order], None, TASKS["ner"].settings.with_(**size["settings"]),
                       seed=options.seed, eval_share=0.2, where=file, progress=options.progress)
    row = against_twin(prepared, SOURCE, "tweets")
    report = {"study": "entities", "size": options.size, "seed": options.seed, "base": SOURCE,
              "sha256": {file.name: sha256(file)}, "rows": [row], "without": missing(),
              "seconds": time.perf_counter() - start}
    write_json(out / "entities.json", report)
    plots.save(plots.twins(report, "LoRA on MiniLM: names in tweets"), out / "entities")
    return report


def table(report: dict[str, Any]) -> str:
    """The report as text."""
    row, = report["rows"]
    lines = [f"LoRA (r = {row['settings']['r']}, α = {row['settings']['lora_alpha']:g}) on all linear layers of "
             f"{report['base']}: {row['parameters']['trainable']:,} trained numbers, {row['train']:,} tweets, "
             f"{row['steps']:,} steps, {row['held_out']:,} held out", ""]
    lines += [*rows_table([row], report["without"]), ""]
    lines += [f"    {kind:14} F1 {found['f1']:.3f}  precision {found['precision']:.3f}  recall {found['recall']:.3f}  "
              f"of {found['support']:,}" for kind, found in row["minilora"]["metrics"]["per_class"].items()]
    return "\n".join([*lines, f"    {report['seconds']:.0f} s"])
