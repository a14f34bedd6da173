"""What a fine-tuning was worth, as a table, as JSON, and as the model card of its adapter."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..nn import Transformer
from ..pretrained import Tokenizer
from ..training import History
from .presets import TASKS


@dataclass
class FinetuneReport:
    """The result of `finetune`.

    facts: base, task, data with their SHA-256, labels, numbers of examples, settings. before, after: the metrics on the
    held-out examples. history: loss and learning rate of every update. truncated: examples that lost their end to max_length.
    parameters: trainable and total. out: the adapter's folder. model, tokenizer: ready to use.
    """

    facts: dict[str, Any]
    before: dict[str, Any]
    after: dict[str, Any]
    history: History
    truncated: int
    parameters: dict[str, Any]
    seconds: float
    out: str | None
    model: Transformer = field(repr=False)
    tokenizer: Tokenizer = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Everything but the model, ready for JSON."""
        return {"facts": self.facts, "before": self.before, "after": self.after, "history": asdict(self.history),
                "truncated": self.truncated, "parameters": self.parameters, "seconds": self.seconds, "out": self.out}

    def table(self) -> str:
        """The report as text."""
        facts, lines = self.facts, []
        examples, history = facts["examples"], self.history
        lines.append(f"{facts['task']}: {facts['base']} on {facts['data']['name']}, {examples['train']:,} examples, "
                     f"{examples['held_out']:,} held out")
        lines.append(f"trained {self.parameters['trainable']:,} of {self.parameters['total']:,} numbers "
                     f"({self.parameters['share']:.2%}) in {len(history.loss):,} steps, {history.seconds:.0f} s, "
                     f"{history.tokens / max(history.seconds, 1e-9):,.0f} tokens/s")
        if self.truncated:
            lines.append(f"note: {self.truncated:,} examples were longer than {facts['max_length']} tokens and lost their end")
        lines += ["", *columns([["held out", "before", "after"], *metric_rows(self.before, self.after)])]
        if classes := self.after.get("per_class"):
            lines += ["", *columns([["after", "precision", "recall", "F1", "support"], *(
                [name, *(f"{row[key]:.3f}" for key in ("precision", "recall", "f1")), f"{row['support']:,}"]
                for name, row in classes.items())])]
        if self.out:
            lines += ["", f"adapter, model card and numbers: {self.out}"]
        return "\n".join(lines)

    __str__ = table

    def card(self, base: str) -> str:
        """The model card, README.md: what it is, how it came about, how good it is, how to load it. base: its name."""
        facts, settings = self.facts, self.facts["settings"]
        kind = TASKS[facts["task"]]
        rows = [["held out", "before", "after"], *metric_rows(self.before, self.after)]
        shown = {name: value for name, value in settings.items() if value is not None} | {"seed": facts["seed"]}
        evaluated = (f"`{facts['eval']['name']}` (SHA-256 `{facts['eval']['sha256']}`)" if facts["eval"] else
                     f"{facts['eval_share']:.0%} of it, held out by seed {facts['seed']}"
                     f"{' (of one plain text its end)' if facts['task'] == 'text' else ''}")
        labels = facts["labels"]
        options = "" if labels is None else f", num_labels={len(labels)}, id2label={dict(enumerate(labels))!r}"
        place, bits = Path(base), settings["quantise"]
        if bits in ("nf4", "fp4"):
            options += (", quantization_config=BitsAndBytesConfig(\n        load_in_4bit=True, bnb_4bit_quant_type="
                        f'"{bits}", bnb_4bit_use_double_quant=True)')
        options = f'"{place.parent}", gguf_file="{place.name}"{options}' if place.suffix == ".gguf" else f'"{base}"{options}'
        return CARD.format(
            base=base, task=facts["task"], data=facts["data"]["name"], digest=facts["data"]["sha256"], evaluated=evaluated,
            train=facts["examples"]["train"], held=facts["examples"]["held_out"], auto=kind.auto, options=options,
            metrics="\n".join("| " + " | ".join(row) + " |" for row in [rows[0], ["---"] * 3, *rows[1:]]),
            settings="\n".join(f"| {name} | {value} |" for name, value in shown.items()),
            updates=len(self.history.loss), trainable=self.parameters["trainable"], share=self.parameters["share"],
            use=USE[facts["task"]], more=", BitsAndBytesConfig" if bits in ("nf4", "fp4") else "")


CARD = """---
base_model: {base}
library_name: peft
tags: [lora, minilora]
---

# LoRA for {task} on {base}

Trained with minilora on `{data}` (SHA-256 `{digest}`):
{train:,} examples, {updates:,} updates, {trainable:,} trained numbers ({share:.2%}).
Evaluated on {held:,} examples: {evaluated}.

{metrics}

## How to use it

In minilora:

```python
import minilora as ml

{use}
```

In PEFT:

```python
from peft import PeftModel
from transformers import {auto}{more}

base = {auto}.from_pretrained(
    {options})
model = PeftModel.from_pretrained(base, "THIS_FOLDER")
```

The labels, the longest length and the base stand in `minilora.json`, all numbers and the loss of every update in
`report.json`.

## Settings

| | |
|---|---|
{settings}
"""

USE = {
    "sentiment": 'predictor = ml.tasks.load("THIS_FOLDER")\n'
                 'predictor.predict(["a text to classify"])                # [Prediction(label=…, score=…, scores={…})]',
    "ner": 'predictor = ml.tasks.load("THIS_FOLDER")\n'
           'predictor.predict(["words to tag , separated by blanks"])  # [[("words", "O"), …]]',
    "text": 'predictor = ml.tasks.load("THIS_FOLDER")\n'
            'predictor.predict(["a prompt"], max_new_tokens=60)         # [the continuation]',
}
NAMES = {"loss": "loss, nats", "macro_f1": "macro F1", "f1": "entity F1", "precision": "entity precision",
         "recall": "entity recall"}


def metric_rows(before: dict[str, Any], after: dict[str, Any]) -> list[list[str]]:
    """[name, before, after] of every metric that is one number."""
    return [[NAMES.get(key, key), f"{before[key]:.4f}", f"{value:.4f}"] for key, value in after.items()
            if isinstance(value, float)]


def columns(rows: list[list[str]]) -> list[str]:
    """Lines that line up: the first column on the left, the others on the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths))).rstrip()
            for row in rows]
