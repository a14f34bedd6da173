"""Examples of a file -> rows of token ids and targets, no longer than the model's context; and rows -> batches.

    sequence   targets: the label's number
    token      targets (T,): the tag's number on the first piece of each word, -100 on its other pieces and on special tokens
    lm         targets (T,): the next token's id, -100 where it belongs to a prompt
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..data import Labelled, Passage, Tagged
from ..pretrained import Tokenizer

IGNORED = -100


@dataclass(frozen=True)
class Row:
    """One encoded example. firsts: for each word of a tagged sentence the position of its first piece, None if it has none."""

    ids: list[int]
    targets: Any
    firsts: tuple[int | None, ...] = ()


@dataclass
class Encoded:
    """The rows of a file, and how many examples were too long and lost their end."""

    rows: list[Row] = field(default_factory=list)
    truncated: int = 0

    def lengths(self) -> list[int]:
        """The tokens of each row."""
        return [len(row.ids) for row in self.rows]


class Encoder:
    """A tokenizer with a longest length: what the model expects around a text stays when a text is cut.

    Raises ValueError for a length that leaves no room for a text.
    """

    def __init__(self, tokenizer: Tokenizer, max_length: int) -> None:
        self.tokenizer, self.max_length = tokenizer, max_length
        body, whole = tokenizer.encode("a", add_special_tokens=False), tokenizer.encode("a")
        at = next((i for i in range(len(whole)) if body and whole[i : i + len(body)] == body), None)
        if at is None:
            raise ValueError(f"the tokenizer makes {body} of the text 'a', and {whole} with its special tokens, expected the "
                             "first within the second: is it a tokenizer of English text?")
        self.before, self.after = whole[:at], whole[at + len(body) :]
        if max_length < len(self.before) + len(self.after) + 1:
            raise ValueError(f"max_length = {max_length}, expected at least {len(self.before) + len(self.after) + 1}: the "
                             f"tokenizer puts {len(self.before) + len(self.after)} special tokens around a text")

    @property
    def room(self) -> int:
        """How many tokens of a text fit between the special ones."""
        return self.max_length - len(self.before) - len(self.after)

    @property
    def padding(self) -> int:
        """The id that fills up a batch: that of the tokenizer, or the end of a text, or 0. Nothing attends to it."""
        known = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, 0)
        return next(i for i in known if i is not None)

    def text(self, text: str) -> tuple[list[int], bool]:
        """(ids with the special tokens, whether the text was cut)."""
        body = self.tokenizer.encode(text, add_special_tokens=False)
        return [*self.before, *body[: self.room], *self.after], len(body) > self.room

    def words(self, words: Sequence[str]) -> tuple[list[int], tuple[int | None, ...], bool]:
        """(ids, for each word the position of its first piece or None, whether the sentence was cut)."""
        body, owners = self.tokenizer.encode_words(words, add_special_tokens=False)
        first = dict[int | None, int]()
        for at, owner in enumerate(owners[: self.room]):
            first.setdefault(owner, at + len(self.before))
        return ([*self.before, *body[: self.room], *self.after], tuple(first.get(i) for i in range(len(words))),
                len(body) > self.room)

    def labelled(self, examples: Sequence[Labelled], labels: Sequence[str], where: Any) -> Encoded:
        """Rows for the head "sequence". Raises ValueError, naming file and line, for a label that is not among the labels."""
        numbers, found = {label: i for i, label in enumerate(labels)}, Encoded()
        for example in examples:
            if example.label not in numbers:
                _unknown("label", example.label, labels, where, example.line)
            ids, cut = self.text(example.text)
            found.rows.append(Row(_some(ids, where, example.line), numbers[example.label]))
            found.truncated += cut
        return found

    def tagged(self, examples: Sequence[Tagged], labels: Sequence[str], where: Any) -> Encoded:
        """Rows for the head "token". Raises ValueError, naming file and line, for a tag that is not among the labels."""
        numbers, found = {label: i for i, label in enumerate(labels)}, Encoded()
        for example in examples:
            ids, firsts, cut = self.words(example.words)
            targets = [IGNORED] * len(ids)
            for i, (at, tag) in enumerate(zip(firsts, example.tags)):
                if tag not in numbers:
                    _unknown("tag", tag, labels, where, example.line + i)
                if at is not None:
                    targets[at] = numbers[tag]
            found.rows.append(Row(_some(ids, where, example.line), targets, firsts))
            found.truncated += cut
        return found

    def passages(self, examples: Sequence[Passage], where: Any) -> Encoded:
        """Rows for the head "lm": whole texts one after the other in windows of max_length, each prompt in a row of its own.

        Raises ValueError, naming file and line, where the context leaves nothing of a completion.
        """
        found, stream, eos = Encoded(), list[int](), self.tokenizer.eos_token_id
        for example in examples:
            if example.prompt is not None:
                row, cut = self._completion(example, where)
                found.rows.append(row)
                found.truncated += cut
            else:
                stream += self.start(example.text)
                stream += [] if eos is None else [eos]
        for start in range(0, len(stream) - 1, self.max_length):
            window = stream[start : start + self.max_length + 1]
            found.rows.append(Row(window[:-1], window[1:]))
        if not found.rows:
            raise ValueError(f"{where}: got a text of {len(stream)} tokens, expected at least two")
        return found

    def prompt(self, prompt: str) -> tuple[list[int], str]:
        """(ids, text) of a prompt as the model sees it before it answers: in its chat template, if it has one."""
        if self.tokenizer.chat_template is None:
            return self.start(prompt), prompt
        text = self.tokenizer.chat([{"role": "user", "content": prompt}])
        return self.tokenizer.encode(text, add_special_tokens=False), text

    def start(self, text: str) -> list[int]:
        """The ids of a text that goes on: with what stands before a text, and not after it."""
        return [*self.before, *self.tokenizer.encode(text, add_special_tokens=False)]

    def _completion(self, example: Passage, where: Any) -> tuple[Row, bool]:
        """A prompt and what to answer. The two are encoded apart, as they are when the model answers."""
        prompt, completion, eos = str(example.prompt), example.text, self.tokenizer.eos_token_id
        asked, text = self.prompt(prompt)
        if self.tokenizer.chat_template is not None:
            whole = self.tokenizer.chat([{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}],
                                        add_generation_prompt=False)
            if not whole.startswith(text):
                raise ValueError(f"{where}, line {example.line}: the chat template writes the prompt differently once it is "
                                 "answered, expected the same text: give {\"text\"} lines, written out")
            completion = whole[len(text) :]
        answer = self.tokenizer.encode(completion, add_special_tokens=False)
        if self.tokenizer.chat_template is not None and eos in answer:
            answer = answer[: len(answer) - answer[::-1].index(eos)]           # without the template's blanks after the end
        if eos is not None and answer[-1:] != [eos]:
            answer = [*answer, eos]
        ids = [*asked, *answer]
        if len(asked) > self.max_length:
            raise ValueError(f"{where}, line {example.line}: the prompt has {len(asked)} tokens, expected at most "
                             f"{self.max_length} so that something of the completion is left: shorten it, or raise max_length")
        targets = [IGNORED] * (len(asked) - 1) + ids[len(asked) :]
        return Row(ids[:-1][: self.max_length], targets[: self.max_length]), len(ids) - 1 > self.max_length


def collate(rows: Sequence[Row], padding: int) -> dict[str, np.ndarray]:
    """A batch: ids (B, T), targets (B,) or (B, T), attention_mask (B, T), filled up on the right to the longest row."""
    T = max(len(row.ids) for row in rows)
    ids, mask = np.full((len(rows), T), padding), np.zeros((len(rows), T), np.int64)
    for b, row in enumerate(rows):
        ids[b, : len(row.ids)], mask[b, : len(row.ids)] = row.ids, 1
    if isinstance(rows[0].targets, int):
        return {"ids": ids, "targets": np.array([row.targets for row in rows]), "attention_mask": mask}
    targets = np.full((len(rows), T), IGNORED)
    for b, row in enumerate(rows):
        targets[b, : len(row.targets)] = row.targets
    return {"ids": ids, "targets": targets, "attention_mask": mask}


def _some(ids: list[int], where: Any, line: int) -> list[int]:
    if not ids:
        raise ValueError(f"{where}, line {line}: the tokenizer makes no token of the text, expected at least one: leave it out")
    return ids


def _unknown(what: str, name: str, labels: Sequence[str], where: Any, line: int) -> None:
    known = ", ".join(labels[:12]) + (" …" if len(labels) > 12 else "")
    raise ValueError(f"{where}, line {line}: unknown {what} {name!r}, expected one of {known}: is it a slip, or missing in the "
                     "training data?")
