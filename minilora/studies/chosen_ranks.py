"""Which modules get the rank, when a method chooses for itself while it trains? (AdaLoRA's Figure 3, over time.)

AdaLoRA keeps the triplets with the best scores, SoRA closes gates, `DynamicRank` cuts what the spectrum of s·B@A does not
use. Each starts from one and a half times the rank of the LoRA beside it, on all linear layers.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from .. import plots
from ..data import load_corpus
from ..lora import adapters_of, add_adapter
from ..lora.config import in_layers
from ..methods import DynamicRank, SoRAConfig
from ..training import AdamW, mean_loss, train
from .cells import compute
from .common import Options, Pretraining, publish, text_batches, verdict_lines, writable_folder
from .text import DIVERGED, TARGET, Setting, base_of, best_rate, copy_of, mean_and_sd, windows_of
from .ways import WAYS, Way, companion

QUESTION = "Which layers get the rank when AdaLoRA, SoRA or DynamicRank choose it, update after update? (AdaLoRA, Figure 3)"
EXPECTED = ("AdaLoRA (arXiv:2303.10512), section 4.5 and Figure 3: the feed-forward layers and the upper layers get more of "
            "the budget; Table 2: at one budget the chosen ranks beat equal ones.")
MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
FIXED = "LoRA"                   # the method with equal ranks
ENERGY, SPARSE = 0.95, 2.0       # the share of ΔW's energy that DynamicRank keeps; SoRA's λ
METHODS = ("AdaLoRA", "SoRA", "DynamicRank")
LOOKS = 40                       # how often the ranks are looked at in a run
CHOICE = METHODS[0]              # of which the paper speaks


@dataclass(frozen=True)
class Size:
    """How much is computed. rank: of LoRA, and AdaLoRA's mean at the end; around: rates, as multiples of each method's own."""

    setting: Setting
    seeds: int
    rank: int
    around: list[float]


SIZES = {
    "quick": Size(Setting(64, 2, Pretraining(60, 16, 3e-3, 64), 20, 4, 32), 1, 4, [1.0]),
    "default": Size(Setting(64, 4, Pretraining(500, 32, 3e-3, 64), 200, 16, 256), 3, 4, [0.25, 0.5, 1.0, 2.0]),
    "full": Size(Setting(96, 6, Pretraining(800, 32, 3e-3, 64), 400, 16, 384), 5, 4, [0.25, 0.5, 1.0, 2.0]),
}


def run(options: Options) -> dict[str, Any]:
    """Compute every run, write figures/chosen_ranks.{png,svg,json}, and return the report."""
    size, start = SIZES[options.size], time.perf_counter()
    writable_folder(options.out)
    seeds = [options.seed + i for i in range(options.seeds or size.seeds)]
    facts, setting = size.setting.facts(), size.setting.to_dict()
    places = [(method, times * way_of(method).rate, seed)
              for method in (FIXED, *METHODS) for times in size.around for seed in seeds]
    found = compute(ranks_cell, [{"setting": setting, "method": method, "rank": size.rank, "lr": lr, "seed": seed}
                                 for method, lr, seed in places], options, "runs")
    rows = [summary(method, [row for (each, _, _), row in zip(places, found, strict=True) if each == method])
            for method in (FIXED, *METHODS)]
    report = {"study": "chosen-ranks", "size": options.size, "seed": options.seed, "text": facts | {"seeds": len(seeds)},
              "rank": size.rank, "expected": EXPECTED, "rows": rows, "verdict": verdict(rows, size.setting.n_layers),
              "seconds": time.perf_counter() - start}
    return publish(report, plots.chosen_ranks(report), options)


def way_of(method: str) -> Way:
    """How a method is set up; DynamicRank is LoRA with a hook."""
    return WAYS[FIXED if method == "DynamicRank" else method]


def ranks_cell(setting: dict[str, Any], method: str, rank: int, lr: float, seed: int) -> dict[str, Any]:
    """One run: its validation loss, and ranks: [update, {module: rank}] as they were looked at, the start first."""
    given = Setting.of(setting)
    model, row = copy_of(base_of(given)), {"lr": lr, "seed": seed} | DIVERGED
    start = rank if method == FIXED else rank + rank // 2
    config = way_of(method).config
    assert config is not None
    made = config(start if method == "DynamicRank" else rank, given.steps)
    if isinstance(made, SoRAConfig):
        made.sparse_lambda = SPARSE
    add_adapter(model, replace(made, target_modules=MODULES), seed=seed)
    ranks: list[Any] = [[0, dict.fromkeys(adapters_of(model), start)]]
    options, ranks_now = chooser(method, model, given.steps, lr)
    own = options.pop("callback", None)

    def look(step: int, model: Any, history: Any) -> None:
        if own is not None:
            own(step, model, history)
        if step % max(1, given.steps // LOOKS) == 0 or step == given.steps:
            ranks.append([step, ranks_now() or ranks[0][1]])

    try:
        with np.errstate(all="ignore"):
            train(model, text_batches(load_corpus(TARGET), given.batch, given.T, seed), given.schedule(lr), callback=look,
                  **options)
    except FloatingPointError:
        return row
    return row | {"loss": mean_loss(model, windows_of(given, TARGET)), "ranks": ranks}


def chooser(method: str, model: Any, steps: int, lr: float) -> tuple[dict[str, Any], Callable[[], dict[str, int]]]:
    """(what `train` needs for the method, a function for the ranks of now; {} before the first choice)."""
    if method == "DynamicRank":
        optimizer = AdamW([p for _, p in model.named_parameters(trainable=True)], lr, weight_decay=0.0)
        shrink = DynamicRank(model, energy=ENERGY, every=max(1, steps // LOOKS), start=steps // 10, optimizer=optimizer)
        return {"optimizer": optimizer, "callback": shrink.callback}, lambda: dict(shrink.ranks[-1][1])
    found = companion(model, method)
    if found is None:
        return {}, dict
    options = {"penalty": getattr(found, "penalty", None), "callback": found.callback}
    return options, found.ranks if method == "SoRA" else lambda: dict(found.ranks[-1][1]) if found.ranks else {}


def summary(method: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """A method at its best rate: losses over seeds, and the mean over seeds of each module's rank, look after look."""
    lr = best_rate(runs)
    chosen = [row for row in runs if row["lr"] == lr]
    mean, sd = mean_and_sd([row["loss"] for row in chosen])
    looks = [step for step, _ in chosen[0]["ranks"]]
    ranks = {path: [float(np.mean([row["ranks"][i][1][path] for row in chosen])) for i in range(len(looks))]
             for path in chosen[0]["ranks"][0][1]}
    return {"method": method, "lr": lr, "loss_mean": mean, "loss_sd": sd, "losses": [row["loss"] for row in chosen],
            "mean_rank": float(np.mean([values[-1] for values in ranks.values()])), "updates": looks, "ranks": ranks}


def verdict(rows: list[dict[str, Any]], n_layers: int) -> list[dict[str, Any]]:
    """What the paper says of AdaLoRA, and whether it is so here."""
    by_name = {row["method"]: row for row in rows}
    final = {path: values[-1] for path, values in by_name[CHOICE]["ranks"].items()}

    def mean(which: Callable[[str], bool]) -> float:
        return float(np.mean([rank for path, rank in final.items() if which(path)]))

    mlp, attention = mean(lambda path: ".mlp." in path), mean(lambda path: ".attn." in path)
    below = in_layers(set(final), list(range((n_layers + 1) // 2)))
    upper, lower = mean(lambda path: path not in below), mean(lambda path: path in below)
    chosen, fixed = by_name[CHOICE], by_name[FIXED]
    return [
        {"claim": f"{CHOICE} gives the feed-forward layers more rank than attention", "agrees": mlp > attention,
         "found": f"{mlp:.1f} against {attention:.1f}"},
        {"claim": f"{CHOICE} gives the upper half of the layers more rank than the lower", "agrees": upper > lower,
         "found": f"{upper:.1f} against {lower:.1f}"},
        {"claim": f"at the same mean rank {CHOICE} is better than {FIXED} with equal ranks",
         "agrees": chosen["loss_mean"] < fixed["loss_mean"],
         "found": f"loss {chosen['loss_mean']:.3f} ±{chosen['loss_sd']:.3f} against {fixed['loss_mean']:.3f} "
                  f"±{fixed['loss_sd']:.3f}"},
    ]


def table(report: dict[str, Any]) -> str:
    """The report as text: of each method the mean final rank of each kind of module."""
    text = report["text"]
    lines = [f"{text['from']} to {text['to']}: d_model {text['model']['d_model']}, {text['model']['n_layers']} layers, "
             f"{text['steps']} steps, {text['seeds']} seeds; mean rank at the end",
             f"    {'':12}{'rate':>8}{'valid. loss':>14}{'':8}{'all':>6}" + "".join(f"{kind[:-5]:>7}" for kind in MODULES)]
    for row in report["rows"]:
        means = [np.mean([values[-1] for path, values in row["ranks"].items() if path.endswith(kind)]) for kind in MODULES]
        lines.append(f"    {row['method']:12}{row['lr']:>8g}{row['loss_mean']:>14.4f} ±{row['loss_sd']:<6.4f}"
                     f"{row['mean_rank']:>6.2f}" + "".join(f"{value:>7.1f}" for value in means))
    return "\n".join([*lines, "", *verdict_lines(report)])
