"""The main job: how does quality depend on LoRA's rank?

Three answers, from known to open: (a) one linear layer, where the optimum of every rank is known; (b) a Transformer whose
hidden update has rank 4; (c) real text: a small base, pretrained on English prose, adapted to Python source with ranks
1 … 64, beside the frozen base and full fine-tuning.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from .. import plots
from .cells import compute
from .common import Options, Pretraining, say, writable_folder, write_json
from .planted import planted_linear, planted_transformer
from .text import ALL_LINEAR, Q_V, Setting, best_rate, full_cell, lora_cell, mean_and_sd

QUESTION = "How does quality depend on LoRA's rank? Planted ranks with a known answer, then real text."
ALPHA = 32.0                     # fixed for all ranks, so s = 32/r: then the best learning rate hardly depends on the rank
TARGETS: dict[str, list[str] | str] = {"q, v": Q_V, "all linear": ALL_LINEAR}


@dataclass(frozen=True)
class Size:
    """How much is computed."""

    setting: Setting
    seeds: int
    ranks: dict[str, list[int]]  # by target set
    lora_rates: list[float]
    full_rates: list[float]
    planted_steps: tuple[int, int]


ALL = [1, 2, 4, 8, 16, 32, 64]
SIZES = {
    "quick": Size(Setting(64, 1, Pretraining(60, 16, 3e-3, 64), 20, 8, 64), 2, {"q, v": [1, 8, 64], "all linear": [8]},
                  [3e-3, 1e-2], [1e-3, 3e-3], (300, 120)),
    "default": Size(Setting(64, 2, Pretraining(500, 32, 3e-3, 64), 120, 16, 256), 2, {"q, v": ALL, "all linear": [1, 8, 64]},
                    [3e-3, 1e-2, 2e-2, 4e-2], [1e-3, 3e-3, 6e-3, 1e-2], (600, 300)),
    "full": Size(Setting(96, 2, Pretraining(800, 32, 3e-3, 64), 200, 16, 384), 3, {"q, v": ALL, "all linear": ALL},
                 [1e-3, 3e-3, 1e-2, 2e-2, 4e-2], [3e-4, 1e-3, 3e-3, 6e-3, 1e-2], (1000, 400)),
}


def run(options: Options) -> dict[str, Any]:
    """Compute everything, write figures/rank_quality.{png,svg,json}, and return the report."""
    size, start = SIZES[options.size], time.perf_counter()
    out = writable_folder(options.out)
    seeds = [options.seed + i for i in range(options.seeds or size.seeds)]
    say("(a) planted rank, one linear layer")
    linear = planted_linear(size.planted_steps[0], options.seed)
    say("(b) planted rank, a Transformer")
    transformer = planted_transformer(size.planted_steps[1], seeds[:2], [1, 2, 3, 4, 6, 8])
    say("(c) real text")
    text = real_text(size, seeds, options)
    report = {"study": "rank-quality", "size": options.size, "seed": options.seed, "seconds": time.perf_counter() - start,
              "planted_linear": linear, "planted_transformer": transformer, "text": text}
    write_json(out / "rank_quality.json", report)
    plots.save(plots.rank_quality(report), out / "rank_quality")
    return report


def real_text(size: Size, seeds: list[int], options: Options) -> dict[str, Any]:
    """Base on prose, adapted to Python: every rank, target set and seed; the frozen base; full fine-tuning."""
    setting = replace(size.setting, base_seed=seeds[0])
    facts, given = setting.facts(), setting.to_dict()              # the base is made here, before the cells ask for it

    def adapters(targets: str, ranks: list[int], seed: int, rates: list[float], learned: bool) -> dict[str, Any]:
        configs = [{"r": r, "lora_alpha": ALPHA, "target_modules": TARGETS[targets]} for r in ranks]
        return {"setting": given, "configs": configs, "seeds": [seed], "lrs": rates, "learned": learned}

    lora_search = compute(lora_cell, [adapters("q, v", [8], seeds[0], size.lora_rates, False)], options, "LoRA's rate")[0]
    full_search = compute(full_cell, [{"setting": given, "seed": seeds[0], "lr": lr} for lr in size.full_rates], options,
                          "full fine-tuning's rate")
    lora_lr, full_lr = best_rate(lora_search), best_rate(full_search)
    say(f"    best learning rates at r = 8: LoRA {lora_lr:g}, full fine-tuning {full_lr:g}")

    full_loss = [row["loss"] for row in compute(full_cell, [{"setting": given, "seed": seed, "lr": full_lr} for seed in seeds],
                                                options, "full fine-tuning")]
    places = [(targets, seed) for targets in reversed(size.ranks) for seed in seeds]              # the longest first
    found = compute(lora_cell, [adapters(targets, size.ranks[targets], seed, [lora_lr], True) for targets, seed in places],
                    options, "LoRA")
    learned = [row | {"targets": targets} for (targets, _), rows in zip(places, found) for row in rows]
    full_mean, full_sd = mean_and_sd(full_loss)
    rows = []
    for targets, ranks in size.ranks.items():
        for r in ranks:
            group = [row for row in learned if row["targets"] == targets and row["rank"] == r]
            losses = [row["loss"] for row in group]
            mean, sd = mean_and_sd(losses)
            rows.append({"targets": targets, "rank": r, "trainable": group[0]["trainable"],
                         "share": group[0]["trainable"] / facts["parameters"], "losses": losses, "loss_mean": mean,
                         "loss_sd": sd, "above_full": mean - full_mean,
                         "effective_rank": mean_and_sd([row["effective_rank"] for row in group])[0],
                         "energy_rank_90": mean_and_sd([row["energy_rank_90"] for row in group])[0]})
    return facts | {"seeds": len(seeds), "alpha": ALPHA, "scale": "alpha / r", "rows": rows,
                    "search": {"rank": 8, "targets": "q, v", "seed": seeds[0],
                               "lora": [{"lr": row["lr"], "loss": row["loss"]} for row in lora_search],
                               "full": [{"lr": row["lr"], "loss": row["loss"]} for row in full_search]},
                    "lora_lr": lora_lr, "full_lr": full_lr,
                    "full": {"losses": full_loss, "loss_mean": full_mean, "loss_sd": full_sd,
                             "trainable": facts["parameters"]},
                    "merge": next(row["merge"] for row in learned if row["rank"] == 8)}


def table(report: dict[str, Any]) -> str:
    """The report as text."""
    linear, teacher, text = report["planted_linear"], report["planted_transformer"], report["text"]
    kl = {row["rank"]: float(np.mean(row["kl"])) for row in teacher["rows"]}
    lines = [
        "(a) one linear layer: LoRA against the Eckart-Young optimum, r = 1 … 16",
        f"    largest excess over the optimum {100 * max(linear['largest_excess'], 0.0):.4f} %",
        "",
        f"(b) a Transformer with a hidden update of rank {teacher['planted_rank']} on q and v: KL(teacher ‖ student), nats",
        f"    frozen base {teacher['base']:.5f};  " + ", ".join(f"r={r} {value:.2e}" for r, value in kl.items()),
        f"    KL at rank 2 is {kl[2] / max(kl[r] for r in kl if r >= 4):.0f} times the KL at rank 4 and above",
        "",
        f"(c) {text['from']} to {text['to']}: {text['parameters']:,} parameters, {text['steps']} steps of {text['batch']} × "
        f"{text['tokens']} bytes, {text['seeds']} seeds, α = {text['alpha']:g} (s = α/r)",
        f"    learning rates searched at r = 8 on q, v, seed {text['search']['seed']}: "
        + ", ".join(f"{c['lr']:g} → {c['loss']:.3f}" for c in text["search"]["lora"])
        + ";  full: " + ", ".join(f"{c['lr']:g} → {c['loss']:.3f}" for c in text["search"]["full"]),
        "",
        f"    {'':22}{'trainable':>10}{'share':>9}{'valid. loss':>18}{'above full':>12}{'eff. rank':>11}{'90 % rank':>11}",
        f"    {'frozen base':22}{0:>10}{0:>9.2%}{text['base']['loss']:>11.4f}",
    ]
    for row in text["rows"]:
        lines.append(f"    {'LoRA ' + row['targets']:16}r={row['rank']:<4}{row['trainable']:>10,}{row['share']:>9.2%}"
                     f"{row['loss_mean']:>11.4f} ±{row['loss_sd']:.4f}{row['above_full']:>+11.4f}"
                     f"{row['effective_rank']:>11.1f}{row['energy_rank_90']:>11.1f}")
    full, merge = text["full"], text["merge"]
    lines += [
        f"    {'full fine-tuning':22}{full['trainable']:>10,}{1:>9.2%}{full['loss_mean']:>11.4f} ±{full['loss_sd']:.4f}",
        "",
        f"    merged model {merge['merged']:.6f}, base plus adapter {merge['adapter']:.6f}: "
        f"{'the same' if abs(merge['merged'] - merge['adapter']) < 1e-5 else 'DIFFERENT'} validation loss (r = 8)",
        f"    {report['seconds']:.0f} s",
    ]
    return "\n".join(lines)

