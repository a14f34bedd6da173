"""Which weight matrices should LoRA adapt, if the number of trained parameters is given? (The LoRA paper's Table 5.)

One budget is spent on one kind of matrix at a high rank, on two at half of it, on four at a quarter, and so on; each choice
gets its own learning rate from the same grid.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from .. import plots
from .cells import compute
from .common import Options, Pretraining, publish, verdict_lines, writable_folder
from .text import Setting, best_rate, full_cell, lora_cell, mean_and_sd

QUESTION = "Which matrices to adapt, for a given number of trained parameters? (LoRA paper, Table 5)"
EXPECTED = ("Hu et al. 2021, Table 5: many matrices at a low rank beat one at a high rank; q alone and k alone are worst. "
            "LoRA Without Regret: the MLP matters, attention alone falls behind.")
ALPHA = 32.0
BUDGET = 40                      # trained numbers per layer, in units of d_model: q at rank 20

SETS: dict[str, tuple[list[str], int]] = {         # modules, and the rank that spends the budget (all six: 36 of the 40)
    "q": (["q_proj"], 20), "k": (["k_proj"], 20), "v": (["v_proj"], 20), "o": (["o_proj"], 20),
    "q, k": (["q_proj", "k_proj"], 10), "q, v": (["q_proj", "v_proj"], 10),
    "q, k, v, o": (["q_proj", "k_proj", "v_proj", "o_proj"], 5),
    "up": (["up_proj"], 8), "down": (["down_proj"], 8), "up, down": (["up_proj", "down_proj"], 4),
    "all six": (["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"], 2),
}


@dataclass(frozen=True)
class Size:
    """How much is computed."""

    setting: Setting
    seeds: int
    lora_rates: list[float]
    full_rates: list[float]


SIZES = {
    "quick": Size(Setting(64, 1, Pretraining(60, 16, 3e-3, 64), 12, 4, 64), 2, [1e-2, 4e-2], [3e-3]),
    "default": Size(Setting(64, 2, Pretraining(500, 32, 3e-3, 64), 120, 16, 256), 3, [5e-3, 1e-2, 2e-2, 4e-2],
                    [1e-3, 3e-3, 1e-2]),
    "full": Size(Setting(96, 2, Pretraining(800, 32, 3e-3, 64), 200, 16, 384), 5, [5e-3, 1e-2, 2e-2, 4e-2],
                 [1e-3, 3e-3, 1e-2]),
}


def run(options: Options) -> dict[str, Any]:
    """Compute every choice, write figures/which_matrices.{png,svg,json}, and return the report."""
    size, start = SIZES[options.size], time.perf_counter()
    writable_folder(options.out)
    seeds = [options.seed + i for i in range(options.seeds or size.seeds)]
    facts, setting = size.setting.facts(), size.setting.to_dict()
    cells = [{"setting": setting, "seeds": seeds, "lrs": size.lora_rates,
              "configs": [{"r": r, "lora_alpha": ALPHA, "target_modules": modules}]} for modules, r in SETS.values()]
    found = dict(zip(SETS, compute(lora_cell, cells, options, "choices"), strict=True))
    full = compute(full_cell, [{"setting": setting, "seed": seed, "lr": lr} for lr in size.full_rates for seed in seeds],
                   options, "full fine-tuning")
    rows = [{"matrices": name, "rank": SETS[name][1], "kinds": len(SETS[name][0])} | at_best_rate(found[name]) for name in SETS]
    report = {"study": "which-matrices", "size": options.size, "seed": options.seed, "text": facts | {"seeds": len(seeds)},
              "alpha": ALPHA, "rates": size.lora_rates, "expected": EXPECTED, "rows": rows, "full": at_best_rate(full),
              "verdict": verdict(rows), "seconds": time.perf_counter() - start}
    return publish(report, plots.which_matrices(report), options)


def at_best_rate(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The runs at the rate whose mean validation loss over seeds is lowest: mean, spread and what was trained."""
    lr = best_rate(rows)
    losses = [row["loss"] for row in rows if row["lr"] == lr]
    mean, sd = mean_and_sd(losses)
    return {"lr": lr, "losses": losses, "loss_mean": mean, "loss_sd": sd, "trainable": rows[0]["trainable"]}


def verdict(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the literature expects, and whether it is so here."""
    loss = {row["matrices"]: row["loss_mean"] for row in rows}
    one = min(loss[name] for name in ("q", "k", "v", "o"))
    worst = sorted(loss, key=lambda name: -loss[name])[:2]
    attention, mlp = min(value for name, value in loss.items() if set(name) <= set("qkvo, ")), loss["up, down"]
    return [
        {"claim": "q, k, v, o at a low rank beat the best single attention matrix", "agrees": loss["q, k, v, o"] < one,
         "found": f"{loss['q, k, v, o']:.3f} against {one:.3f}"},
        {"claim": "q, v beat q, k", "agrees": loss["q, v"] < loss["q, k"],
         "found": f"{loss['q, v']:.3f} against {loss['q, k']:.3f}"},
        {"claim": "q alone and k alone are the two worst", "agrees": set(worst) == {"q", "k"},
         "found": ", ".join(f"{name} {loss[name]:.3f}" for name in worst)},
        {"claim": "the MLP alone beats every choice of attention matrices", "agrees": mlp < attention,
         "found": f"{mlp:.3f} against {attention:.3f}"},
    ]


def table(report: dict[str, Any]) -> str:
    """The report as text."""
    text, full = report["text"], report["full"]
    lines = [f"{text['from']} to {text['to']}: {text['parameters']:,} parameters, {text['steps']} steps, {text['seeds']} "
             f"seeds; each choice at the best of the rates {', '.join(f'{lr:g}' for lr in report['rates'])}",
             f"    {'matrices':14}{'rank':>6}{'trained':>10}{'rate':>9}{'valid. loss':>14}",
             f"    {'frozen base':14}{'':6}{0:>10}{'':9}{text['base']['loss']:>14.4f}"]
    lines += [f"    {row['matrices']:14}{row['rank']:>6}{row['trainable']:>10,}{row['lr']:>9g}{row['loss_mean']:>14.4f} "
              f"±{row['loss_sd']:.4f}" for row in report["rows"]]
    lines.append(f"    {'full':14}{'':6}{full['trainable']:>10,}{full['lr']:>9g}{full['loss_mean']:>14.4f} "
                 f"±{full['loss_sd']:.4f}")
    return "\n".join([*lines, "", *verdict_lines(report)])

