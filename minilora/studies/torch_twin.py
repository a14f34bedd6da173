"""The same fine-tuning in PyTorch + PEFT: the same base, initial adapter and head, the same batches in the same order.

What a study compares with, where those libraries are installed. Dropout is 0 on both sides, the optimiser is AdamW with the
same schedule and clipping, and the threads are as many.
"""

from __future__ import annotations

import importlib.util
import tempfile
import time
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
from tqdm import tqdm

from ..backend.parallel import workers
from ..lora.files import save_adapter
from ..pretrained.hub import find
from ..tasks import TASKS, Run
from ..tasks.metrics import TOKENS, batches

LIBRARIES = ("torch", "transformers", "peft")


@dataclass
class TwinResult:
    """What PyTorch + PEFT made of a run: the loss of every update, the held-out rows' logits, and seconds of training."""

    losses: list[float]
    logits: list[np.ndarray]
    seconds: float
    versions: dict[str, str]


def missing() -> list[str]:
    """The libraries that are not installed."""
    return [name for name in LIBRARIES if importlib.util.find_spec(name) is None]


def train_twin(run: Run, source: str, progress: bool = True) -> TwinResult:
    """Train PEFT's adapter as `run` would train its own, from the values that run.model has now: call it before `fit`.

    source: the base, as for load_pretrained; a folder in Hugging Face layout or the name of one. Raises ImportError without
    the libraries.
    """
    with warnings.catch_warnings():                        # what these libraries say about each other
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
            model = peft.PeftModel.from_pretrained(base, folder, is_trainable=True)
    params, config = [p for p in model.parameters() if p.requires_grad], run.config
    optimizer = torch.optim.AdamW(params, lr=config.lr, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay)

    def logits_of(batch: dict[str, np.ndarray]) -> Any:
        return model(input_ids=torch.from_numpy(batch["ids"]), attention_mask=torch.from_numpy(batch["attention_mask"])).logits

    model.train()
    losses, start = [], time.perf_counter()
    for step in tqdm(range(config.steps), "PyTorch", leave=False, disable=None if progress else True):
        batch = run.batches(step)
        logits = logits_of(batch)
        targets = torch.from_numpy(batch["targets"]).reshape(-1)
        loss = torch.nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), targets, ignore_index=-100)
        optimizer.zero_grad()
        loss.backward()
        if config.clip is not None:
            torch.nn.utils.clip_grad_norm_(params, config.clip)
        for group in optimizer.param_groups:
            group["lr"] = config.lr * config.factor(step)
        optimizer.step()
        losses.append(float(loss.item()))
    seconds = time.perf_counter() - start

    model.eval()
    found: list[Any] = [None] * len(run.held.rows)
    with torch.no_grad():
        for members, batch in batches(run.held.rows, run.encoder.padding, TOKENS):
            for i, values in zip(members, logits_of(batch).numpy()):
                found[i] = values[: len(run.held.rows[i].ids)] if values.ndim == 2 else values
    versions = {library.__name__: library.__version__.split("+")[0] for library in (torch, transformers, peft)}
    return TwinResult(losses, found, seconds, versions)
