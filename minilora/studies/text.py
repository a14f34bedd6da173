"""The real text of the studies: a byte-level GPT-2, pretrained on English prose, is adapted to Python source.

`lora_cell` and `full_cell` are the two cells that most studies are made of (see cells.py). Every adapter of a LoRA cell trains
side by side with the others. What each run forgets is its loss on the prose.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np

from ..data import Corpus, load_corpus, sample_batch
from ..lora import LoraConfig, count_parameters, delete_adapter, merge_and_unload
from ..nn import Transformer, TransformerConfig
from ..rank.report import analyze
from ..training import TrainConfig, mean_loss, sweep, train
from .common import Pretraining, pretrained_base, say, text_batches, validation

SOURCE, TARGET = "prose", "python"                         # names of the corpora
Q_V, ALL_LINEAR = ["q_proj", "v_proj"], "all-linear"
DIVERGED: dict[str, Any] = dict.fromkeys(("loss", "source_loss", "train_loss"))
SWEEP_MEMORY = 1 << 30                                     # bytes of one sweep: several may run at once


@dataclass(frozen=True)
class Setting:
    """A base and how it is adapted. steps and batch: of every run; windows: of validation; base_seed: of the pretraining;
    tokens: T of adaptation and validation, None: of the pretraining."""

    d_model: int
    n_layers: int
    pretraining: Pretraining
    steps: int
    batch: int
    windows: int
    base_seed: int = 0
    tokens: int | None = None

    @property
    def T(self) -> int:
        """The length of a window."""
        return self.tokens or self.pretraining.tokens

    @classmethod
    def of(cls, data: dict[str, Any]) -> Setting:
        """The inverse of to_dict."""
        return cls(**data | {"pretraining": Pretraining(**data["pretraining"])})

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for the arguments of a cell and for reports."""
        return asdict(self)

    @property
    def config(self) -> TransformerConfig:
        """The shape of the base."""
        return TransformerConfig.gpt2(vocab_size=256, d_model=self.d_model, n_layers=self.n_layers, n_heads=4,
                                      max_len=self.pretraining.tokens)

    def schedule(self, lr: float) -> TrainConfig:
        """How every run trains."""
        return TrainConfig(steps=self.steps, lr=lr, warmup=0.1, schedule="cosine", weight_decay=0.0, clip=1.0, progress=False)

    def facts(self) -> dict[str, Any]:
        """What a report says of the data and the base."""
        return {"from": "English prose", "to": "Python source", "sha256": {name: load_corpus(name).sha256
                                                                           for name in (SOURCE, TARGET)},
                "model": self.config.to_dict(), "parameters": count_parameters(base_of(self))["total"], "steps": self.steps,
                "batch": self.batch, "tokens": self.T, "base": base_losses(self)}


@dataclass(frozen=True)
class Grid:
    """How much a study of ranks computes: how many seeds, which ranks, and the rates among which each finds its best."""

    setting: Setting
    seeds: int
    ranks: list[int]
    lora_rates: list[float]
    full_rates: list[float]


@lru_cache(maxsize=4)
def base_of(setting: Setting) -> Transformer:
    """The pretrained base, made or read once in a process."""
    return pretrained_base(setting.config, load_corpus(SOURCE), setting.pretraining, setting.base_seed, say)


def windows_of(setting: Setting, name: str) -> list[tuple[np.ndarray, np.ndarray]]:
    """Validation batches of a corpus."""
    return validation(load_corpus(name), 64, setting.T, setting.windows)


def base_losses(setting: Setting) -> dict[str, float]:
    """The frozen base's losses on the target and on the source."""
    base = base_of(setting)
    return {"loss": mean_loss(base, windows_of(setting, TARGET)), "source_loss": mean_loss(base, windows_of(setting, SOURCE))}


def training_text(limit: int | None) -> Corpus:
    """The target corpus, or one whose training half is only its first `limit` bytes."""
    corpus = load_corpus(TARGET)
    return corpus if limit is None else replace(corpus, train=corpus.train[:limit])


def task_on(setting: Setting, limit: int | None = None) -> Callable[[int, np.random.Generator], Any]:
    """The batches of a sweep."""
    corpus = training_text(limit)
    return lambda step, rng: sample_batch(corpus.train, setting.batch, setting.T, rng)


def lora_cell(setting: dict[str, Any], configs: list[dict[str, Any]], seeds: list[int], lrs: list[float],
              limit: int | None = None, learned: bool = False) -> list[dict[str, Any]]:
    """Adapters of every config (arguments of LoraConfig), seed and rate, all on one set of modules.

    Rows: rank, alpha, seed, lr, trainable, loss (on the validation half), source_loss, train_loss (the mean of the last tenth
    of the updates); None where the run diverged. limit: train on that many bytes only. learned: also the mean effective rank
    and energy rank of ΔW, and the losses with the adapter and merged.
    """
    given = Setting.of(setting)
    base = base_of(given)
    valid, source = windows_of(given, TARGET), windows_of(given, SOURCE)

    result = sweep(base, task_on(given, limit), [LoraConfig(**config) for config in configs], seeds=seeds, lrs=lrs,
                   train=given.schedule(0.0), evaluate=valid, memory=SWEEP_MEMORY)
    rows = []
    for k, cell in enumerate(result.rows):
        row = {key: cell[key] for key in ("rank", "alpha", "use_rslora", "seed", "lr")} | {"trainable": cell["parameters"]}
        row |= DIVERGED
        if np.isfinite(cell["eval_loss"]) and not cell["diverged"]:
            result.install(base, k, "cell")
            row |= {"loss": cell["eval_loss"], "source_loss": mean_loss(base, source),
                    "train_loss": tail_mean(result.losses[:, k].tolist())}
            if learned:
                found = analyze(base, name="cell").summary()
                row |= {"effective_rank": found["mean_effective_rank"], "energy_rank_90": found["mean_energy_rank_90"],
                        "merge": {"adapter": mean_loss(base, valid), "merged": mean_loss(merge_and_unload(base), valid)}}
            delete_adapter(base, "cell")
        rows.append(row)
    return rows


def full_cell(setting: dict[str, Any], seed: int, lr: float, limit: int | None = None) -> dict[str, Any]:
    """Full fine-tuning of a copy of the base: a row as of lora_cell."""
    given = Setting.of(setting)
    model, losses = tuned(given, seed, lr, limit)
    row: dict[str, Any] = {"seed": seed, "lr": lr, "trainable": count_parameters(model)["trainable"]}
    if losses is None:
        return row | DIVERGED
    return row | {"loss": mean_loss(model, windows_of(given, TARGET)), "train_loss": tail_mean(losses),
                  "source_loss": mean_loss(model, windows_of(given, SOURCE))}


def tuned(setting: Setting, seed: int, lr: float, limit: int | None = None) -> tuple[Transformer, list[float] | None]:
    """A copy of the base with all weights trained, and its losses; None where it diverged."""
    model = copy_of(base_of(setting)).unfreeze()
    try:
        with np.errstate(all="ignore"):
            history = train(model, text_batches(training_text(limit), setting.batch, setting.T, seed),
                            setting.schedule(lr))
    except FloatingPointError:
        return model, None
    return model, history.loss


def copy_of(model: Transformer) -> Transformer:
    """Another model with the same weights."""
    copy = Transformer(model.cfg)
    copy.load_state_dict(model.state_dict())
    return copy


def tail_mean(losses: Sequence[float]) -> float:
    """The mean of the last tenth."""
    return float(np.mean(losses[-max(1, len(losses) // 10) :]))


def mean_and_sd(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation (of the sample; 0 for one value)."""
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def best_rate(rows: Sequence[dict[str, Any]], key: str = "loss") -> float:
    """The learning rate with the lowest mean over seeds, among those at which no seed diverged."""
    means = {lr: [row[key] for row in rows if row["lr"] == lr] for lr in {row["lr"] for row in rows}}
    whole = {lr: float(np.mean(values)) for lr, values in means.items() if None not in values}
    if not whole:
        raise FloatingPointError(f"every run diverged, at rates {sorted(means)}: lower them")
    return min(whole, key=lambda lr: whole[lr])
