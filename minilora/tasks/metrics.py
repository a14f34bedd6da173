"""How good a model is at a task: accuracy and F1 by scikit-learn, entity-level F1 by seqeval, loss and perplexity."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from importlib import import_module
from typing import Any

import numpy as np
from tqdm.std import tqdm

from ..autograd import cross_entropy, no_grad
from ..backend import to_host
from ..data import Buckets
from ..nn import Transformer
from ..training import mean_loss
from ..training.loop import in_mode
from .encode import IGNORED, Row, collate

TOKENS = 4096                                              # of a batch in evaluation, padding counted


def need(library: str) -> Any:
    """Import a library of metrics. Raises ImportError, saying what to install."""
    try:
        return import_module(library)
    except ImportError as error:
        raise ImportError(f"{library} is not installed ({error}), expected for the metrics of a task: "
                          'pip install "minilora[tasks]"') from None


def predictions(model: Transformer, rows: Sequence[Row], padding: int, tokens: int = TOKENS) -> tuple[list[np.ndarray], float]:
    """(for each row its logits (n_labels,) or (T, n_labels), the mean cross-entropy over all counted targets).

    The loss is nan if no target counts. The model stays in the mode it was in; it runs in evaluation mode.
    """
    found: list[Any] = [None] * len(rows)
    losses, counts = [0.0], [0]
    with in_mode(model, False), no_grad():
        for members, batch in batches(rows, padding, tokens):
            targets = batch["targets"]
            logits = model(batch["ids"], attention_mask=batch["attention_mask"])
            if counted := int((targets != IGNORED).sum()):
                losses.append(cross_entropy(logits, targets).item())
                counts.append(counted)
            for i, values in zip(members, to_host(logits)):
                found[i] = values[: len(rows[i].ids)] if values.ndim == 2 else values
    return found, float(np.dot(losses, counts)) / sum(counts) if sum(counts) else math.nan


def text_loss(model: Transformer, rows: Sequence[Row], padding: int, tokens: int = TOKENS) -> dict[str, Any]:
    """{"loss" in nats a token, "perplexity" e^loss} over the counted targets, in evaluation mode."""
    with in_mode(model, False):
        loss = mean_loss(model, [batch for _, batch in batches(rows, padding, tokens)])
    return {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}


def batches(rows: Sequence[Row], padding: int, tokens: int) -> Iterator[tuple[np.ndarray, dict[str, np.ndarray]]]:
    """(indices, batch) by length, each row once."""
    order = Buckets([len(row.ids) for row in rows], tokens=tokens).sorted()
    for members in tqdm(order, "evaluate", delay=2, leave=False, disable=None):
        yield members, collate([rows[i] for i in members], padding)


def classification(truth: Sequence[int], found: Sequence[int], labels: Sequence[str]) -> dict[str, Any]:
    """Accuracy, the mean F1 of the classes, and precision, recall, F1 and support of each."""
    sklearn = need("sklearn.metrics")
    numbers = list(range(len(labels)))
    columns = sklearn.precision_recall_fscore_support(truth, found, labels=numbers, zero_division=0)
    return {"accuracy": float(sklearn.accuracy_score(truth, found)), "macro_f1": float(np.mean(columns[2])),
            "per_class": _per_class(labels, columns)}


def entities(truth: Sequence[Sequence[str]], found: Sequence[Sequence[str]]) -> dict[str, Any]:
    """Precision, recall and F1 of whole entities, of all and of each kind; the accuracy is that of words."""
    seqeval: Any = need("seqeval.metrics.sequence_labeling")
    truth, found = [list(tags) for tags in truth], [list(tags) for tags in found]
    kinds = sorted({tag[2:] for tags in (*truth, *found) for tag in tags if tag != "O"})
    total = seqeval.precision_recall_fscore_support(truth, found, average="micro", zero_division=0)
    columns = seqeval.precision_recall_fscore_support(truth, found, average=None, zero_division=0) if kinds else ([],) * 4
    return {"f1": float(total[2]), "precision": float(total[0]), "recall": float(total[1]),
            "accuracy": float(seqeval.accuracy_score(truth, found)), "per_class": _per_class(kinds, columns)}


def tags_of(rows: Sequence[Row], logits: Sequence[np.ndarray], labels: Sequence[str]) -> list[list[str]]:
    """The tag of every word, read at its first piece; a word without one (cut off, or made of nothing) is O."""
    return [["O" if at is None else labels[int(values[at].argmax())] for at in row.firsts] for row, values in zip(rows, logits)]


def _per_class(names: Sequence[str], columns: Any) -> dict[str, dict[str, Any]]:
    precision, recall, f1, support = columns
    return {name: {"precision": float(precision[i]), "recall": float(recall[i]), "f1": float(f1[i]), "support": int(support[i])}
            for i, name in enumerate(names)}
