"""Does the best learning rate depend on LoRA's rank? With s = α/r, and with rsLoRA's s = α/√r; and how far is it from full
fine-tuning's?
"""

from __future__ import annotations

import math
import time
from typing import Any

import numpy as np

from .. import plots
from .cells import compute
from .common import Options, Pretraining, publish, verdict_lines, writable_folder
from .text import ALL_LINEAR, Grid, Setting, best_rate, full_cell, lora_cell, mean_and_sd

QUESTION = "Does the best learning rate depend on the rank, under α/r and under α/√r? (LoRA paper, Table 6; rsLoRA)"
EXPECTED = ("LoRA Without Regret: with s = α/r, α = 32, the best rate changes by less than a factor 2 from rank 4 to 512, and "
            "is about 10 times full fine-tuning's (15 times in short runs). rsLoRA (arXiv:2312.03732): with α/√r high ranks "
            "learn at the rate of low ones.")
ALPHA, EQUAL_AT = 32.0, 8        # α of s = α/r; rsLoRA's α is chosen so that both scales are equal at this rank
POLICIES = {"alpha / r": (ALPHA, False), "alpha / sqrt(r)": (ALPHA / math.sqrt(EQUAL_AT), True)}


def doubling(first: float, count: int) -> list[float]:
    """first, 2 first, 4 first, …"""
    return [first * 2.0**i for i in range(count)]


SIZES = {
    "quick": Grid(Setting(64, 1, Pretraining(60, 16, 3e-3, 64), 12, 4, 64), 1, [1, 16], doubling(1e-2, 3), doubling(2e-3, 3)),
    "default": Grid(Setting(64, 2, Pretraining(500, 32, 3e-3, 64), 120, 16, 256), 2, [1, 4, 16, 64], doubling(1.25e-3, 7),
                    doubling(2.5e-4, 7)),
    "full": Grid(Setting(96, 2, Pretraining(800, 32, 3e-3, 64), 200, 16, 384), 3, [1, 2, 4, 8, 16, 32, 64],
                 doubling(1.25e-3, 7), doubling(2.5e-4, 7)),
}


def run(options: Options) -> dict[str, Any]:
    """Compute the grid, write figures/rank_lr.{png,svg,json}, and return the report."""
    size, start = SIZES[options.size], time.perf_counter()
    writable_folder(options.out)
    seeds = [options.seed + i for i in range(options.seeds or size.seeds)]
    facts, setting = size.setting.facts(), size.setting.to_dict()
    places = [(policy, r) for r in reversed(size.ranks) for policy in POLICIES]                   # the longest first
    cells = [{"setting": setting, "seeds": seeds, "lrs": size.lora_rates, "configs": [
        {"r": r, "lora_alpha": POLICIES[policy][0], "use_rslora": POLICIES[policy][1], "target_modules": ALL_LINEAR}]}
        for policy, r in places]
    found = compute(lora_cell, cells, options, "ranks")
    full = compute(full_cell, [{"setting": setting, "seed": seed, "lr": lr} for lr in size.full_rates for seed in seeds],
                   options, "full fine-tuning")
    by_place = dict(zip(places, found, strict=True))
    curves = [{"policy": policy, "rank": r} | curve(by_place[policy, r]) for policy in POLICIES for r in size.ranks]
    report = {"study": "rank-lr", "size": options.size, "seed": options.seed, "text": facts | {"seeds": len(seeds)},
              "targets": "all linear", "alpha": {policy: alpha for policy, (alpha, _) in POLICIES.items()},
              "expected": EXPECTED, "curves": curves, "full": curve(full), "verdict": verdict(curves, curve(full)),
              "seconds": time.perf_counter() - start}
    return publish(report, plots.rank_lr(report), options)


def curve(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean loss at each rate (None where a seed diverged), the best rate of the grid, and where the parabola through it and its
    neighbours (in log rate) has its lowest point."""
    rates, means, sds = sorted({row["lr"] for row in rows}), [], []
    for lr in rates:
        losses = [row["loss"] for row in rows if row["lr"] == lr]
        mean, sd = (None, None) if None in losses else mean_and_sd(losses)
        means.append(mean)
        sds.append(sd)
    best = best_rate(rows)
    i, fitted = rates.index(best), best
    around = [means[j] if 0 <= j < len(means) else None for j in (i - 1, i, i + 1)]
    if None not in around:
        bend, slope, _ = np.polyfit(np.log(rates[i - 1 : i + 2]), np.array(around, float), 2)
        fitted = float(np.exp(-slope / (2.0 * bend)))
    return {"rates": rates, "loss_mean": means, "loss_sd": sds, "best_rate": best, "fitted_rate": fitted,
            "best_loss": means[i], "trainable": rows[0]["trainable"], "inside": None not in around}


def verdict(curves: list[dict[str, Any]], full: dict[str, Any]) -> list[dict[str, Any]]:
    """What the literature expects, and whether it is so here."""
    fitted = {policy: {c["rank"]: c["fitted_rate"] for c in curves if c["policy"] == policy} for policy in POLICIES}
    spread = {policy: max(rates.values()) / min(rates.values()) for policy, rates in fitted.items()}
    plain, root = POLICIES
    middle = float(np.exp(np.mean(np.log(list(fitted[plain].values())))))
    found = {policy: ", ".join(f"r={r} {lr:.2g}" for r, lr in rates.items()) for policy, rates in fitted.items()}
    return [
        {"claim": "with s = α/r the best rate changes by less than a factor 2 over the ranks", "agrees": spread[plain] < 2.0,
         "found": f"factor {spread[plain]:.1f}: {found[plain]}"},
        {"claim": "with s = α/√r it changes more than with α/r", "agrees": spread[root] > spread[plain],
         "found": f"factor {spread[root]:.1f}: {found[root]}"},
        {"claim": "LoRA's best rate is 5 to 20 times full fine-tuning's", "agrees": 5.0 <= middle / full["fitted_rate"] <= 20.0,
         "found": f"{middle / full['fitted_rate']:.1f} times ({middle:.2g} against {full['fitted_rate']:.2g})"},
    ]


def table(report: dict[str, Any]) -> str:
    """The report as text."""
    text = report["text"]
    lines = [f"{text['from']} to {text['to']}: {text['parameters']:,} parameters, {text['steps']} steps, {text['seeds']} "
             f"seeds, LoRA on {report['targets']}; mean validation loss at each learning rate"]
    for name, curves in (*((policy, [c for c in report["curves"] if c["policy"] == policy]) for policy in POLICIES),
                         ("full", [report["full"]])):
        lines.append(f"    {name:16}" + "".join(f"{lr:>9g}" for lr in curves[0]["rates"]) + f"{'best rate':>12}")
        for c in curves:
            losses = "".join(f"{'diverged':>9}" if loss is None else f"{loss:>9.3f}" for loss in c["loss_mean"])
            lines.append(f"    {'r = ' + str(c['rank']) if 'rank' in c else '':16}{losses}{c['fitted_rate']:>12.2g}"
                         + ("" if c["inside"] else " (at the edge of the grid)"))
    return "\n".join([*lines, "", *verdict_lines(report)])
