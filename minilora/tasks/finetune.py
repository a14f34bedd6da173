"""finetune: a base, a file and a task in; an adapter, measured before and after, out.

The steps in order, each a function: read the file, hold some of it out, load the base with the head of the task, put LoRA on
it, evaluate, train, evaluate, save. A run that is cut off goes on from its checkpoint when the same call is made again.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..data import (
    Buckets,
    Passage,
    label_names,
    read_labelled,
    read_passages,
    read_tagged,
    sha256,
    split,
)
from ..lora import LoraConfig, add_adapter, count_parameters
from ..nn import Transformer
from ..pretrained import Tokenizer
from ..training import History, TrainConfig, train
from . import metrics
from .base import load_base
from .encode import IGNORED, Encoded, Encoder, collate
from .folder import CHECKPOINT, begin, finish, remember, usable
from .presets import Settings, task_named
from .report import FinetuneReport


@dataclass
class Run:
    """A fine-tuning that is ready to train: the model with its adapter, the rows on both sides, and the batches."""

    task: str
    model: Transformer
    tokenizer: Tokenizer
    encoder: Encoder
    labels: list[str] | None
    train: Encoded
    held: Encoded
    settings: Settings
    config: TrainConfig
    buckets: Buckets
    truth: list[list[str]]                                 # the tags of the held-out sentences

    def batches(self, i: int) -> dict[str, np.ndarray]:
        """Training batch i."""
        return collate([self.train.rows[j] for j in self.buckets(i)], self.encoder.padding)

    def evaluate(self) -> dict[str, Any]:
        """The metrics of the task on the held-out rows."""
        rows, padding = self.held.rows, self.encoder.padding
        if self.task == "text":
            return metrics.text_loss(self.model, rows, padding)
        return self.score(*metrics.predictions(self.model, rows, padding))

    def score(self, logits: list[np.ndarray], loss: float) -> dict[str, Any]:
        """The metrics of given logits for the held-out rows, of a task with labels."""
        rows, labels = self.held.rows, self.labels or []
        if self.task == "ner":
            return {"loss": loss} | metrics.entities(self.truth, metrics.tags_of(rows, logits, labels))
        return {"loss": loss} | metrics.classification(
            [row.targets for row in rows], [int(values.argmax()) for values in logits], labels)


def finetune(source: str | os.PathLike[str], data: str | os.PathLike[str], task: str, *,
             eval: str | os.PathLike[str] | None = None, out: str | os.PathLike[str] | None = None, force: bool = False,
             text_column: str = "text", label_column: str = "label", labels: Sequence[str] | None = None,
             eval_share: float = 0.1, limit: int | None = None, seed: int = 0, progress: bool = True,
             **settings: Any) -> FinetuneReport:
    """Fine-tune a pretrained model on a file with LoRA, and say what it was worth.

    source: as for load_pretrained. task: "sentiment" (a label for a text: data is .csv, .tsv or .jsonl with the columns
    text_column and label_column), "ner" (a tag for each word: CoNLL-style lines) or "text" (plain text, or .jsonl lines
    {"text"} or {"prompt", "completion"}; of the latter only the completion is learned, in the tokenizer's chat template if it
    has one). eval: a file to evaluate on; without one a share of the data, eval_share, is held out by the seed (of one
    plain text its end). labels: their order (default: sorted). limit: use only so many examples, drawn by the seed. settings:
    in place of the task's own, by the names in `Settings`.

    out: the folder to write the adapter to, in PEFT's format, with a model card (README.md), minilora.json and report.json; an
    unfinished run keeps its state in out/checkpoint, and the same call goes on from there to the same numbers. force: replace
    what is there. Without out nothing is written: the report has the model.

    Raises ValueError, FileNotFoundError, ImportError or OSError, with one line that says what was got and what was expected.
    """
    kind, start = task_named(task), time.perf_counter()
    chosen = kind.settings.with_(**settings)
    if labels is not None and task == "text":
        raise ValueError("labels with the task text, expected none: it has no labels (--labels)")
    if seed < 0 or (limit is not None and limit < 1):
        raise ValueError(f"seed = {seed}, limit = {limit}: expected a seed of at least 0, and a limit of at least 1 or none")
    for library in {"sentiment": ("sklearn.metrics",), "ner": ("seqeval.metrics",)}.get(task, ()):
        metrics.need(library)
    examples = _limited(_read(data, task, text_column, label_column), limit, seed)
    folder = None if out is None else usable(Path(out), force, Path(source))
    held = None if eval is None else _limited(_read(eval, task, text_column, label_column), limit, seed)
    run = prepare(source, task, examples, held, chosen, seed=seed, labels=labels, eval_share=eval_share, where=data,
                  eval_where=eval, progress=progress)
    facts = {"base": os.fspath(source), "task": task, "data": _file(data), "eval": None if eval is None else _file(eval),
             "labels": run.labels, "examples": {"train": len(run.train.rows), "held_out": len(run.held.rows)},
             "chat": task == "text" and any(example.prompt is not None for example in examples),
             "columns": [text_column, label_column] if task == "sentiment" else None, "eval_share": eval_share,
             "limit": limit, "seed": seed, "max_length": run.encoder.max_length, "settings": chosen.to_dict()}
    before = None if folder is None else begin(folder, facts, force)
    if before is None:
        before = run.evaluate()
    if folder is not None:
        remember(folder, facts, before)
        run.config.checkpoint = str(folder / CHECKPOINT)
    history = fit(run)
    after = run.evaluate()
    if math.isfinite(before["loss"]) and not math.isfinite(after["loss"]):
        raise FloatingPointError(f"the loss on the held-out examples is {after['loss']} after training, {before['loss']:.4g} "
                                 "before: nothing is saved; lower the learning rate, or train longer with it warmed up")
    report = FinetuneReport(
        facts=facts, before=before, after=after, history=history, truncated=run.train.truncated + run.held.truncated,
        parameters=count_parameters(run.model), seconds=time.perf_counter() - start,
        out=None if folder is None else str(folder), model=run.model, tokenizer=run.tokenizer)
    if folder is not None:
        finish(folder, report)
    return report


def prepare(source: Any, task: str, examples: Sequence[Any], held: Sequence[Any] | None, settings: Settings, *, seed: int = 0,
            labels: Sequence[str] | None = None, eval_share: float = 0.1, where: Any = "data", eval_where: Any = None,
            progress: bool = True) -> Run:
    """Everything up to the first update: labels, split, the base with its head and adapter, the encoded rows, the batches.

    where, eval_where: what the examples are called in errors. Raises as `finetune` does.
    """
    kind = task_named(task)
    names = _labels(task, examples, labels)
    if held is None:
        examples, held = _held_out(examples, eval_share, seed)
        eval_where = where
    model, tokenizer = load_base(source, settings.quantise, head=kind.head, n_labels=None if names is None else len(names),
                                 dropout=settings.dropout, seed=seed)
    encoder = Encoder(tokenizer, min(settings.max_length, model.cfg.max_len))
    train_rows, held_rows = (_encoded(encoder, task, found, names, file) for found, file in
                             ((examples, where), (held, eval_where)))
    train_rows.rows = [row for row in train_rows.rows if np.any(np.asarray(row.targets) != IGNORED)]
    add_adapter(model, LoraConfig(
        r=settings.r, lora_alpha=settings.lora_alpha, lora_dropout=settings.lora_dropout,
        target_modules=settings.target_modules, modules_to_save=_saved_whole(model, settings)), seed=seed)
    size: dict[str, Any] = {"tokens": settings.tokens} if settings.tokens else {"rows": settings.batch}
    buckets = Buckets(train_rows.lengths(), seed=seed, **size)
    steps = settings.steps or buckets.steps(settings.epochs)
    config = TrainConfig(steps=steps, lr=settings.lr, schedule=settings.schedule, clip=settings.clip, progress=progress,
                         warmup=settings.warmup if settings.warmup < 1 else min(settings.warmup, steps),
                         weight_decay=settings.weight_decay)
    truth = [list(example.tags) for example in held] if task == "ner" else []
    return Run(task, model, tokenizer, encoder, names, train_rows, held_rows, settings, config, buckets, truth)


def fit(run: Run) -> History:
    """Train a prepared run."""
    return train(run.model, run.batches, run.config)


def _read(path: Any, task: str, text_column: str, label_column: str) -> Sequence[Any]:
    if task == "sentiment":
        return read_labelled(path, text_column, label_column)
    return read_tagged(path) if task == "ner" else read_passages(path)


def _limited(examples: Sequence[Any], limit: int | None, seed: int) -> Sequence[Any]:
    """So many of the examples, drawn by the seed, in the file's order."""
    if limit is None or limit >= len(examples):
        return examples
    return [examples[i] for i in sorted(np.random.default_rng(seed).permutation(len(examples))[:limit])]


def _labels(task: str, examples: Sequence[Any], given: Sequence[str] | None) -> list[str] | None:
    """The labels of a task that has some. A kind of entity has both of its tags, also where only one is in the data."""
    if task == "text":
        return None
    if task == "sentiment":
        return label_names((example.label for example in examples), given)
    kinds = {tag[2:] for example in examples for tag in example.tags if tag != "O"}
    return label_names(["O", *(f"{part}-{kind}" for kind in kinds for part in "BI")], given)


def _held_out(examples: Sequence[Any], share: float, seed: int) -> tuple[Sequence[Any], Sequence[Any]]:
    """(train, held out): by the seed, or of a single plain text its last part, from a line's end on."""
    only = examples[0]
    if len(examples) == 1 and isinstance(only, Passage) and only.prompt is None:
        at = only.text.find("\n", int(len(only.text) * (1 - share))) + 1
        if not 0.0 < share < 1.0 or not only.text[:at].strip() or not only.text[at:].strip():
            raise ValueError(f"a held-out share of {share} of one text leaves a side empty, expected some lines on both: give "
                             "more text, or a file of its own (--eval)")
        return [Passage(only.text[:at], 1)], [Passage(only.text[at:], only.text[:at].count("\n") + 1)]
    train_rows, held = split(len(examples), share, seed)
    return [examples[i] for i in train_rows], [examples[i] for i in held]


def _encoded(encoder: Encoder, task: str, examples: Sequence[Any], labels: list[str] | None, where: Any) -> Encoded:
    if task == "text":
        return encoder.passages(examples, where)
    return (encoder.labelled if task == "sentiment" else encoder.tagged)(examples, labels or [], where)


def _saved_whole(model: Transformer, settings: Settings) -> list[str] | None:
    """modules_to_save: the settings' own, and each layer that the checkpoint did not hold, or it would be lost."""
    drawn = [path.rpartition(".")[0] for path in model.drawn]
    return list(dict.fromkeys([*(settings.modules_to_save or ()), *drawn])) or None


def _file(path: Any) -> dict[str, str]:
    return {"name": Path(path).name, "sha256": sha256(path)}
