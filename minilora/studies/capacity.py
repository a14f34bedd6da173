"""How much can LoRA learn? Loss on the training text against rank, for texts of growing length: where does LoRA leave full
fine-tuning?
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

from .. import plots
from .cells import compute
from .common import Options, Pretraining, publish, say, verdict_lines, writable_folder
from .text import ALL_LINEAR, Grid, Setting, best_rate, full_cell, lora_cell, mean_and_sd

QUESTION = "How much text can a rank hold? Training loss against rank, for texts of growing length"
EXPECTED = ("LoRA Without Regret: LoRA follows full fine-tuning as long as it has more parameters than the data has "
            "information, and falls behind beyond.")
ALPHA = 32.0
LIMITS = [1 << 10, 1 << 12, 1 << 14, 1 << 17]
BEHIND = 0.05                    # nats per byte above full fine-tuning that count as having left it


@dataclass(frozen=True)
class Size(Grid):
    """As Grid, for training texts of several lengths: limits, in bytes."""

    limits: list[int]


SIZES = {
    "quick": Size(Setting(64, 1, Pretraining(60, 16, 3e-3, 64), 12, 4, 32), 1, [1, 16], [2e-2], [3e-3], [512, 8192]),
    "default": Size(Setting(64, 2, Pretraining(500, 32, 3e-3, 64), 300, 16, 64), 2, [1, 2, 4, 8, 16, 32, 64],
                    [1e-2], [3e-3], LIMITS),
    "full": Size(Setting(64, 2, Pretraining(500, 32, 3e-3, 64), 600, 16, 64), 3, [1, 2, 4, 8, 16, 32, 64],
                 [1e-2, 2e-2], [3e-3, 6e-3], LIMITS),
}


def run(options: Options) -> dict[str, Any]:
    """Compute the grid, write figures/capacity.{png,svg,json}, and return the report."""
    size, start = SIZES[options.size], time.perf_counter()
    writable_folder(options.out)
    seeds = [options.seed + i for i in range(options.seeds or size.seeds)]
    facts, setting = size.setting.facts(), size.setting.to_dict()
    configs = [{"r": r, "lora_alpha": ALPHA, "target_modules": ALL_LINEAR} for r in size.ranks]
    places = [(limit, seed) for limit in size.limits for seed in seeds]
    lora = compute(lora_cell, [{"setting": setting, "configs": configs, "seeds": [seed], "lrs": size.lora_rates, "limit": limit}
                               for limit, seed in places], options, "LoRA")
    full = compute(full_cell, [{"setting": setting, "seed": seed, "lr": lr, "limit": limit}
                               for limit, seed in places for lr in size.full_rates], options, "full fine-tuning")
    groups = []
    for limit in size.limits:
        mine = [row for (at, _), rows in zip(places, lora, strict=True) if at == limit for row in rows]
        ranks = [{"rank": r} | at_best([row for row in mine if row["rank"] == r]) for r in size.ranks]
        whole = [row for i, row in enumerate(full) if places[i // len(size.full_rates)][0] == limit]
        groups.append({"bytes": limit, "rows": ranks, "full": at_best(whole)})
        say(f"    {limit} bytes: done")
    report = {"study": "capacity", "size": options.size, "seed": options.seed, "text": facts | {"seeds": len(seeds)},
              "alpha": ALPHA, "behind": BEHIND, "expected": EXPECTED, "groups": groups, "verdict": verdict(groups, facts),
              "seconds": time.perf_counter() - start}
    return publish(report, plots.capacity(report), options)


def at_best(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The training loss at its best rate, mean and spread over seeds."""
    lr = best_rate(rows, "train_loss")
    mean, sd = mean_and_sd([row["train_loss"] for row in rows if row["lr"] == lr])
    return {"lr": lr, "loss_mean": mean, "loss_sd": sd, "trainable": rows[0]["trainable"]}


def least_rank(group: dict[str, Any]) -> dict[str, Any] | None:
    """The row of the smallest rank from which on LoRA stays within BEHIND of full fine-tuning; None if there is none."""
    least = None
    for row in reversed(group["rows"]):
        if row["loss_mean"] > group["full"]["loss_mean"] + BEHIND:
            break
        least = row
    return least


def verdict(groups: list[dict[str, Any]], facts: dict[str, Any]) -> list[dict[str, Any]]:
    """What the literature expects, and whether it is so here."""
    def bits(group: dict[str, Any]) -> float:              # what full fine-tuning took out of the text, beyond the base
        return group["bytes"] * (facts["base"]["loss"] - group["full"]["loss_mean"]) / math.log(2.0)

    found = [(group["bytes"], least_rank(group), bits(group)) for group in groups]
    needed = [math.inf if row is None else row["rank"] for _, row, _ in found]
    said = "; ".join(f"{size:,} bytes: " + ("above all ranks" if row is None else
                                            f"r = {row['rank']}, {row['trainable'] / max(1.0, bits_):.2g} parameters a bit")
                     for size, row, bits_ in found)
    return [{"claim": "longer texts need higher ranks", "found": said,
             "agrees": needed == sorted(needed) and needed[0] < needed[-1]}]


def table(report: dict[str, Any]) -> str:
    """The report as text."""
    text = report["text"]
    ranks = [row["rank"] for row in report["groups"][0]["rows"]]
    lines = [f"{text['to']}, {text['steps']} steps of {text['batch']} × {text['tokens']} bytes, {text['seeds']} seeds, LoRA on "
             f"all linear layers, best rates; training loss, nats per byte (the base: {text['base']['loss']:.3f} on new text)",
             f"    {'bytes':>9}" + "".join(f"{'r=' + str(r):>9}" for r in ranks) + f"{'full':>9}"]
    lines += [f"    {group['bytes']:>9,}" + "".join(f"{row['loss_mean']:>9.3f}" for row in group["rows"])
              + f"{group['full']['loss_mean']:>9.3f}" for group in report["groups"]]
    return "\n".join([*lines, "", *verdict_lines(report)])
