"""What do A's starting size, B = 0 and separate learning rates for A and B do in the first 50 steps?"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from .. import plots
from ..data import load_corpus
from ..lora import LoraConfig, adapters_of, add_adapter, delete_adapter
from ..training import AdamW, mean_loss, train
from .cells import compute
from .common import Options, Pretraining, publish, text_batches, verdict_lines, writable_folder
from .text import ALL_LINEAR, TARGET, Setting, base_of, mean_and_sd, windows_of

QUESTION = "What do A's bound, B = 0 and the ratio of the learning rates of B and A do in the first 50 steps?"
EXPECTED = ("Hayou et al. 2024 (arXiv:2406.08447): A random, B = 0 learns better than B random, A = 0. LoRA+ "
            "(arXiv:2402.12354): a higher rate for B than for A learns faster. LoRA Without Regret: with Adam, scaling A's "
            "start by p while α and A's rate follow changes nothing; alone, a smaller start acts like a higher rate for A.")
RANK, ALPHA = 8, 32.0

# a, b: the starts are these multiples of U(-1/√in, 1/√in) for A, and of U(-1/√r, 1/√r) for B; ratio: B's learning rate over A's
VARIANTS: dict[str, dict[str, float]] = {
    "A random, B = 0": {"a": 1.0, "b": 0.0, "ratio": 1.0},
    "A ten times smaller": {"a": 0.1, "b": 0.0, "ratio": 1.0},
    "A ten times larger": {"a": 10.0, "b": 0.0, "ratio": 1.0},
    "B random, A = 0": {"a": 0.0, "b": 1.0, "ratio": 1.0},
    "both random": {"a": 1.0, "b": 1.0, "ratio": 1.0},
    "B's rate 4 times A's": {"a": 1.0, "b": 0.0, "ratio": 4.0},
    "B's rate 16 times A's": {"a": 1.0, "b": 0.0, "ratio": 16.0},
}


@dataclass(frozen=True)
class Size:
    """How much is computed."""

    setting: Setting
    seeds: int
    rates: list[float]


SIZES = {
    "quick": Size(Setting(64, 1, Pretraining(60, 16, 3e-3, 64), 12, 4, 32), 1, [1e-2]),
    "default": Size(Setting(64, 2, Pretraining(500, 32, 3e-3, 64), 50, 16, 128), 3, [2.5e-3, 5e-3, 1e-2, 2e-2, 4e-2]),
    "full": Size(Setting(64, 2, Pretraining(500, 32, 3e-3, 64), 50, 16, 256), 8, [2.5e-3, 5e-3, 1e-2, 2e-2, 4e-2]),
}


def run(options: Options) -> dict[str, Any]:
    """Compute every start, write figures/init.{png,svg,json}, and return the report."""
    size, start = SIZES[options.size], time.perf_counter()
    writable_folder(options.out)
    seeds = [options.seed + i for i in range(options.seeds or size.seeds)]
    facts, setting = size.setting.facts(), size.setting.to_dict()
    cells = [{"setting": setting, "lr": lr, "seeds": seeds, **values} for values in VARIANTS.values() for lr in size.rates]
    found, rows = compute(start_cell, cells, options, "starts"), []
    for i, name in enumerate(VARIANTS):
        tried = [row for row in found[i * len(size.rates) : (i + 1) * len(size.rates)] if row["losses"] is not None]
        best = min(tried, key=lambda row: float(np.mean(row["final"])))
        mean, sd = mean_and_sd(best["final"])
        rows.append({"start": name, **VARIANTS[name], "lr": best["lr"], "loss_mean": mean, "loss_sd": sd,
                     "first": float(np.mean([losses[0] for losses in best["losses"]])),
                     "curve": np.mean(np.subtract(best["losses"], best["base"]), axis=0).tolist()})
    report = {"study": "init", "size": options.size, "seed": options.seed, "text": facts | {"seeds": len(seeds)},
              "rank": RANK, "alpha": ALPHA, "rates": size.rates, "expected": EXPECTED, "rows": rows, "verdict": verdict(rows),
              "seconds": time.perf_counter() - start}
    return publish(report, plots.init(report), options)


def start_cell(setting: dict[str, Any], a: float, b: float, ratio: float, lr: float, seeds: list[int]) -> dict[str, Any]:
    """Training from one start at one rate (A's; B has ratio times it), for each seed: the losses of every step, those of the
    frozen base on the same batches, and the validation loss at the end. `losses` is None if a run diverged."""
    given = Setting.of(setting)
    base, corpus, valid = base_of(given), load_corpus(TARGET), windows_of(given, TARGET)
    row: dict[str, Any] = {"lr": lr, "losses": [], "base": [], "final": []}
    for seed in seeds:
        batches = text_batches(corpus, given.batch, given.pretraining.tokens, seed)
        row["base"].append([mean_loss(base, [batches(i)]) for i in range(given.steps)])
        add_adapter(base, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=ALL_LINEAR), "start", seed)
        try:
            rng = np.random.default_rng([seed, 1])
            As, Bs = zip(*[(adapter.lora_A, adapter.lora_B) for adapter in adapters_of(base, "start").values()])
            for A, B in zip(As, Bs):
                A.data *= a
                bound = RANK**-0.5
                B.data[...] = b * rng.uniform(-bound, bound, B.shape)
            optimizer = AdamW([{"params": As, "lr": lr}, {"params": Bs, "lr": ratio * lr}], lr=lr, weight_decay=0.0)
            with np.errstate(all="ignore"):
                history = train(base, batches, given.schedule(lr), optimizer=optimizer)
            row["losses"].append(history.loss)
            row["final"].append(mean_loss(base, valid))
        except FloatingPointError:
            return {"lr": lr, "losses": None}
        finally:
            delete_adapter(base, "start")
    return row


def verdict(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the literature expects, and whether it is so here."""
    named = {row["start"]: row for row in rows}
    usual, other, both = (named[name] for name in ("A random, B = 0", "B random, A = 0", "both random"))
    faster = min((named["B's rate 4 times A's"], named["B's rate 16 times A's"]), key=lambda row: row["loss_mean"])

    def lower(low: dict[str, Any], high: dict[str, Any]) -> dict[str, Any]:
        """Whether one ends lower than the other by more than the spread over seeds."""
        return {"agrees": high["loss_mean"] - low["loss_mean"] > max(low["loss_sd"], high["loss_sd"]),
                "found": " against ".join(f"{row['loss_mean']:.3f} ± {row['loss_sd']:.3f}" for row in (low, high))}

    return [
        {"claim": "A random, B = 0 ends lower than B random, A = 0"} | lower(usual, other),
        {"claim": "a higher rate for B than for A ends lower"} | lower(faster, usual),
        {"claim": "both random starts above the base: it is no longer the base",
         "agrees": both["first"] > usual["first"] + 0.01,
         "found": f"first loss {both['first']:.3f} against {usual['first']:.3f}"},
    ]


def table(report: dict[str, Any]) -> str:
    """The report as text."""
    text = report["text"]
    lines = [f"{text['from']} to {text['to']}: LoRA r = {report['rank']} on all linear layers, {text['steps']} steps, "
             f"{text['seeds']} seeds, each start at the best of the rates {', '.join(f'{lr:g}' for lr in report['rates'])}",
             f"    {'start':24}{'rate of A':>11}{'first loss':>12}{'valid. loss at the end':>26}"]
    lines += [f"    {row['start']:24}{row['lr']:>11g}{row['first']:>12.3f}{row['loss_mean']:>18.4f} ±{row['loss_sd']:.4f}"
              for row in report["rows"]]
    return "\n".join([*lines, "", *verdict_lines(report)])
