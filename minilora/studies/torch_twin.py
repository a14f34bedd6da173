"""The same fine-tuning in PyTorch + PEFT: the same base, initial adapter and head, the same batches in the same order.

What a study compares with, where those libraries are installed. Dropout is 0 on both sides, the optimiser is AdamW with the
same schedule and clipping, and the threads are as many.
"""

from __future__ import annotations

import importlib.util
import tempfile
import time
import warnings
from typing import Any

import numpy as np

from ..backend.parallel import workers
from ..lora import count_parameters
from ..lora.files import save_adapter
from ..pretrained.hub import find
from ..tasks import TASKS, Run
from ..tasks.metrics import TOKENS, batches, predictions, tags_of
from ..training import train

LIBRARIES = ("torch", "transformers", "peft")
TURN = 10             # updates


def missing() -> list[str]:
    """The libraries that are not installed."""
    return [name for name in LIBRARIES if importlib.util.find_spec(name) is None]


class Twin:
    """PEFT's adapter on the same base, from the values that run.model has when this is made. It trains as `run` would.

    source: the base, as for load_pretrained; a folder in Hugging Face layout or the name of one. losses, seconds: of the
    updates so far. Raises ImportError without the libraries.
    """

    def __init__(self, run: Run, source: str) -> None:
        with warnings.catch_warnings():                    # what these libraries say about each other
            warnings.simplefilter("ignore")
            import peft
            import torch
            import transformers

            transformers.logging.set_verbosity_error()
            transformers.utils.logging.disable_progress_bar()
            torch.set_num_threads(workers())
            quiet = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "classifier_dropout": 0.0}
            kind = getattr(transformers, TASKS[run.task].auto)
            base = kind.from_pretrained(find(source), num_labels=len(run.labels or ()) or None, dtype=torch.float32, **quiet)
            with tempfile.TemporaryDirectory() as folder:
                save_adapter(run.model, folder, base_model=str(find(source)))
                self.model = peft.PeftModel.from_pretrained(base, folder, is_trainable=True)
        self.run, self.torch, config = run, torch, run.config
        self.params = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.params, lr=config.lr, betas=config.betas, eps=config.eps,
                                           weight_decay=config.weight_decay)
        self.losses: list[float] = []
        self.seconds = 0.0
        self.versions = {library.__name__: library.__version__.split("+")[0] for library in (torch, transformers, peft)}

    def train(self, steps: int) -> None:
        """The next so many updates, or fewer where the run ends."""
        start, run, torch, config = time.perf_counter(), self.run, self.torch, self.run.config
        self.model.train()
        for step in range(len(self.losses), min(len(self.losses) + steps, config.steps)):
            batch = run.batches(step)
            logits = self.logits(batch)
            targets = torch.from_numpy(batch["targets"]).reshape(-1)
            loss = torch.nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), targets, ignore_index=-100)
            self.optimizer.zero_grad()
            loss.backward()
            if config.clip is not None:
                torch.nn.utils.clip_grad_norm_(self.params, config.clip)
            for group in self.optimizer.param_groups:
                group["lr"] = config.lr * config.factor(step)
            self.optimizer.step()
            self.losses.append(float(loss.item()))
        self.seconds += time.perf_counter() - start

    def logits(self, batch: dict[str, np.ndarray]) -> Any:
        ids, mask = self.torch.from_numpy(batch["ids"]), self.torch.from_numpy(batch["attention_mask"])
        return self.model(input_ids=ids, attention_mask=mask).logits

    def predict(self) -> list[np.ndarray]:
        """The logits of the held-out rows."""
        self.model.eval()
        rows = self.run.held.rows
        found: list[Any] = [None] * len(rows)
        with self.torch.no_grad():
            for members, batch in batches(rows, self.run.encoder.padding, TOKENS):
                for i, values in zip(members, self.logits(batch).numpy()):
                    found[i] = values[: len(rows[i].ids)] if values.ndim == 2 else values
        return found


def against_twin(run: Run, source: str, name: str) -> dict[str, Any]:
    """One row of a study: a prepared run, trained here and, where the libraries are installed, by its twin from the same start.

    The two take turns of TURN updates, so that what else the machine does meets both. "agreement" is the share of held-out
    predictions that are equal: of texts, or of words.
    """
    key, metric = TASKS[run.task].measure
    before, twin = run.evaluate(), None if missing() else Twin(run, source)

    def turn(step: int, *_: Any) -> None:
        if twin is not None and (step % TURN == 0 or step == run.config.steps):
            twin.train(TURN)

    history = train(run.model, run.batches, run.config, callback=turn)
    rows, seconds = run.held.rows, history.seconds - (0.0 if twin is None else twin.seconds)
    logits, loss = predictions(run.model, rows, run.encoder.padding)
    row: dict[str, Any] = {
        "name": name, "metric": metric, "before": before[key], "train": len(run.train.rows), "held_out": len(rows),
        "truncated": run.train.truncated + run.held.truncated, "max_length": run.encoder.max_length, "labels": run.labels,
        "padding": run.buckets.waste(), "settings": run.settings.to_dict(), "steps": run.config.steps,
        "parameters": count_parameters(run.model), "tokens": history.tokens,
        "minilora": {"metrics": run.score(logits, loss), "seconds": seconds, "losses": history.loss}}
    if twin is not None:
        differences, theirs = np.abs(np.subtract(history.loss, twin.losses)), twin.predict()
        row["torch"] = {"metrics": run.score(theirs, float("nan")), "seconds": twin.seconds, "losses": twin.losses,
                        "versions": twin.versions}
        row["torch"]["metrics"].pop("loss")
        row |= {"agreement": float(np.mean([a == b for a, b in zip(decided(run, logits), decided(run, theirs))])),
                "loss_difference": {"first_20": float(differences[:20].max()), "all": float(differences.max())}}
    return row


def decided(run: Run, logits: list[np.ndarray]) -> list[Any]:
    """The predictions, one after the other: the label of each text, or the tag of each word."""
    if run.task == "ner":
        return [tag for tags in tags_of(run.held.rows, logits, run.labels or []) for tag in tags]
    return [int(values.argmax()) for values in logits]


def rows_table(rows: list[dict[str, Any]], left_out: list[str]) -> list[str]:
    """The rows as lines of text. left_out: the libraries whose absence left the twin out."""
    lines = [f"    {'':18}{'metric':>12}{'before':>9}{'minilora':>10}{'PEFT':>9}{'agreement':>11}"
             f"{'time':>10}{'PEFT':>9}{'ratio':>7}"]
    for row in rows:
        key = next(k for k, task_metric in (task.measure for task in TASKS.values()) if task_metric == row["metric"])
        mine, twin = row["minilora"], row.get("torch")
        shown = f"    {row['name']:18}{row['metric']:>12}{row['before']:>9.4f}{mine['metrics'][key]:>10.4f}"
        if twin:
            shown += (f"{twin['metrics'][key]:>9.4f}{row['agreement']:>11.2%}{mine['seconds']:>8.0f} s{twin['seconds']:>7.0f} s"
                      f"{mine['seconds'] / twin['seconds']:>7.2f}")
        else:
            shown += f"{'':>9}{'':>11}{mine['seconds']:>8.0f} s"
        lines.append(shown)
    if left_out:
        lines.append(f"    PyTorch + PEFT left out: {', '.join(left_out)} not installed (pip install torch transformers peft)")
    return lines
