"""A fine-tuned adapter at work: texts in, labels, tags or continuations out."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..lora.files import load_adapter
from ..nn import Transformer, generate
from ..pretrained import Tokenizer
from ..pretrained.text import new_tokens
from . import metrics
from .base import load_base, trained_on
from .encode import Encoder, Row
from .folder import FACTS, read_object
from .presets import TASKS

NEW_TOKENS = 60                                            # of a continuation at most, where nothing else is said


@dataclass(frozen=True)
class Prediction:
    """The likeliest label of a text, its probability, and those of all labels."""

    label: str
    score: float
    scores: dict[str, float]


class Predictor:
    """A model with a fine-tuned adapter. `load` makes one from the adapter's folder.

    chat: of a language model, whether it learned to answer prompts (in its chat template, if it has one), or plain texts.
    """

    def __init__(self, model: Transformer, tokenizer: Tokenizer, task: str, labels: Sequence[str], max_length: int,
                 chat: bool = True) -> None:
        self.model, self.tokenizer, self.task, self.labels = model.eval(), tokenizer, task, list(labels)
        self.encoder, self.chat = Encoder(tokenizer, max_length), chat

    def predict(self, inputs: Sequence[Any], *, max_new_tokens: int | None = None) -> list[Any]:
        """An answer to each input.

        "sentiment": texts -> Predictions. "ner": sentences, as text (words are what blanks separate) or lists of words ->
        lists of (word, tag). "text": prompts -> what the model continues them with, up to max_new_tokens tokens (default: 60,
        or what the context has room for).

        A text to label is cut to the longest length, as in training. Raises ValueError for an input that is empty, a sentence
        to tag that is longer, since the words beyond would have no tag, or a prompt that leaves no room for an answer.
        """
        if isinstance(inputs, str):
            raise ValueError(f"inputs: got the text {inputs[:20]!r}, expected a list of texts: put it in a list")
        for i, each in enumerate(inputs):
            if not (each if self.task == "text" else each.strip() if isinstance(each, str) else len(each)):
                raise ValueError(f"input {i} is empty, expected some text")
        if self.task == "text":
            return [self._continue(prompt, max_new_tokens) for prompt in inputs]
        if self.task == "sentiment":
            rows = [Row(self.encoder.text(text)[0], -100) for text in inputs]
            return [self._prediction(values) for values in self._logits(rows)]
        sentences = [each.split() if isinstance(each, str) else list(each) for each in inputs]
        rows = []
        for i, words in enumerate(sentences):
            ids, firsts, cut = self.encoder.words(words)
            if cut:
                raise ValueError(f"input {i} has {len(words)} words, expected at most {self.encoder.max_length} tokens, the "
                                 "longest length of the training: split it into sentences")
            rows.append(Row(ids, [-100] * len(ids), firsts))
        tags = metrics.tags_of(rows, self._logits(rows), self.labels)
        return [list(zip(words, found)) for words, found in zip(sentences, tags)]

    def _logits(self, rows: list[Row]) -> list[np.ndarray]:
        return metrics.predictions(self.model, rows, self.encoder.padding)[0] if rows else []

    def _prediction(self, logits: np.ndarray) -> Prediction:       # (n_labels,)
        p = np.exp(logits.astype(float) - logits.max())
        scores = dict(zip(self.labels, (p / p.sum()).tolist()))
        best = max(scores, key=lambda label: scores[label])
        return Prediction(best, scores[best], scores)

    def _continue(self, prompt: str, max_new_tokens: int | None) -> str:
        ids = self.encoder.prompt(prompt)[0] if self.chat else self.encoder.start(prompt)
        count, eos = new_tokens(self.model, ids, max_new_tokens, NEW_TOKENS), self.tokenizer.eos_token_id
        new = generate(self.model, [ids], count, eos_token_id=eos)[0, len(ids) :].tolist()
        return self.tokenizer.decode(new[: new.index(eos)] if eos in new else new, skip_special_tokens=True)


def load(directory: str | os.PathLike[str], base: str | os.PathLike[str] | None = None) -> Predictor:
    """The predictor of a folder that `finetune` wrote. base: where its base is, if not where it was.

    Raises FileNotFoundError without the folder or the base, ValueError for files that are not as they should be.
    """
    path = Path(directory) / FACTS
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: expected a folder that `minilora finetune` wrote")
    facts = read_object(path)
    labels, length = facts.get("id2label") or {}, facts.get("max_length")
    if str(facts.get("task")) not in TASKS or not isinstance(facts.get("base"), str) or not isinstance(length, int) or (
            not isinstance(labels, dict) or sorted(labels) != sorted(map(str, range(len(labels)))) or
            len(set(map(str, labels.values()))) != len(labels)):
        raise ValueError(f"{path} lacks the task, the base, the longest length or the labels: fine-tune again")
    names = [str(labels[str(i)]) for i in range(len(labels))]
    model, tokenizer = load_base(base or facts["base"], trained_on(directory), head=TASKS[facts["task"]].head,
                                 n_labels=len(names) or None, dropout=0.0)
    load_adapter(model, directory)
    return Predictor(model, tokenizer, facts["task"], names, length, facts.get("chat", True))


def predict(directory: str | os.PathLike[str], inputs: Sequence[Any], *, base: str | os.PathLike[str] | None = None,
            max_new_tokens: int | None = None) -> list[Any]:
    """load(directory, base).predict(inputs): for one question; `load` once for several."""
    return load(directory, base).predict(inputs, max_new_tokens=max_new_tokens)
