"""Is full fine-tuning's ΔW low-rank? Its spectrum beside LoRA's, the intruder dimensions of both, and what both forget."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from .. import plots
from ..autograd import Tensor, linear, lora_linear, tensor
from ..lora import LoraConfig, delete_adapter
from ..lora.config import find_targets
from ..lora.layer import dense
from ..nn import Linear, Transformer
from ..rank import Update, alignment, intruder_count, measures, updates
from ..training import AdamW, mean_loss, sweep
from .cells import compute
from .common import Options, Pretraining, publish, verdict_lines, writable_folder
from .text import ALL_LINEAR, SOURCE, SWEEP_MEMORY, TARGET, Grid, Setting, base_of, mean_and_sd, task_on, tuned, windows_of

QUESTION = "Is full fine-tuning's ΔW low-rank? Spectra, intruder dimensions and forgetting, beside LoRA's"
EXPECTED = ("LoRA Learns Less and Forgets Less (arXiv:2405.09673): full fine-tuning's ΔW needs 10 to 100 times LoRA's usual "
            "ranks, and it forgets more. Intruder dimensions (arXiv:2410.21228): LoRA has them up to high ranks, full "
            "fine-tuning hardly; they grow with the rate. But forgetting less is no law: see tasks with inputs of their own.")
ALPHA, FULL = 32.0, 0            # FULL: in place of a rank
DRAWN = "up_proj"                # whose spectra the figure shows, in the last layer
THRESHOLDS = (0.3, 0.5, 0.7, 0.9)


SIZES = {
    "quick": Grid(Setting(64, 1, Pretraining(60, 16, 3e-3, 64), 12, 4, 32), 1, [1, 16], [1e-2], [2e-3]),
    "default": Grid(Setting(128, 2, Pretraining(400, 24, 2e-3, 64), 150, 16, 128), 2, [1, 4, 16, 64], [5e-3, 1e-2, 2e-2],
                    [5e-4, 1e-3, 2e-3]),
    "full": Grid(Setting(128, 2, Pretraining(400, 24, 2e-3, 64), 300, 16, 256), 4, [1, 2, 4, 8, 16, 32, 64, 128],
                 [5e-3, 1e-2, 2e-2], [5e-4, 1e-3, 2e-3]),
}


def run(options: Options) -> dict[str, Any]:
    """Compute the grid, write figures/spectrum.{png,svg,json}, and return the report."""
    size, start = SIZES[options.size], time.perf_counter()
    writable_folder(options.out)
    seeds = [options.seed + i for i in range(options.seeds or size.seeds)]
    facts, setting = size.setting.facts(), size.setting.to_dict()
    places = [(r, lr) for r in reversed(size.ranks) for lr in size.lora_rates] + [(FULL, lr) for lr in size.full_rates]
    found = compute(spectrum_cell, [{"setting": setting, "rank": r, "lr": lr, "seeds": seeds} for r, lr in places], options,
                    "runs")
    rows = [{"rank": r, "lr": lr} | averaged(cells) for (r, lr), cells in zip(places, found, strict=True)]
    rows.sort(key=lambda row: (row["rank"] == FULL, row["rank"], row["lr"]))
    both = [two_tasks(seed) for seed in seeds]
    own_inputs = {key: float(np.mean([row[key] for row in both])) for key in both[0]}
    report = {"study": "spectrum", "size": options.size, "seed": options.seed, "text": facts | {"seeds": len(seeds)},
              "alpha": ALPHA, "thresholds": THRESHOLDS, "drawn": DRAWN, "expected": EXPECTED, "rows": rows,
              "own_inputs": own_inputs, "verdict": verdict(rows, own_inputs), "seconds": time.perf_counter() - start}
    return publish(report, plots.spectrum(report), options)


def spectrum_cell(setting: dict[str, Any], rank: int, lr: float, seeds: list[int]) -> list[dict[str, Any]]:
    """Runs of one rank (0: full fine-tuning) and rate: losses and the measures of ΔW, for each seed."""
    given = Setting.of(setting)
    base, found = base_of(given), []
    if rank == FULL:
        for seed in seeds:
            model, _ = tuned(given, seed, lr)
            found.append(judged(given, model, dense_updates(base, model)))
        return found
    config = LoraConfig(r=rank, lora_alpha=ALPHA, target_modules=ALL_LINEAR)
    result = sweep(base, task_on(given), [config], seeds=seeds, lrs=[lr], train=given.schedule(lr), memory=SWEEP_MEMORY)
    for k in range(len(seeds)):
        result.install(base, k, "cell")
        found.append(judged(given, base, updates(base, "cell")))
        delete_adapter(base, "cell")
    return found


def dense_updates(base: Transformer, model: Transformer) -> dict[str, Update]:
    """What full fine-tuning changed in each linear layer: the modules that "all-linear" means."""
    before, after = (dict(m.named_modules()) for m in (base, model))
    found = {}
    for path, _, _ in find_targets(base, LoraConfig(target_modules=ALL_LINEAR)):
        old, new = before[path], after[path]
        assert isinstance(old, Linear) and isinstance(new, Linear)
        delta = dense(new).data - dense(old).data
        found[path] = Update(delta, np.eye(len(delta), dtype=delta.dtype))
    return found


def judged(setting: Setting, model: Transformer, changes: dict[str, Update]) -> dict[str, Any]:
    """Losses on both texts, and of ΔW: means over modules, intruders at each threshold, one spectrum."""
    layers: dict[str, Any] = dict(base_of(setting).named_modules())
    measured = {path: measures(update.svd[1]) for path, update in changes.items()}
    cosines = [cosine for path, update in changes.items()
               for cosine in alignment(update, dense(layers[path]).data)["cosines"]]
    drawn = next(path for path in reversed(changes) if path.endswith(DRAWN))
    values = measured[drawn]["singular_values"]
    return {"loss": mean_loss(model, windows_of(setting, TARGET)), "source_loss": mean_loss(model, windows_of(setting, SOURCE)),
            **{key: float(np.mean([m[key] for m in measured.values()])) for key in ("effective_rank", "energy_rank_90")},
            "norm": float(np.sqrt(sum(m["frobenius_norm"] ** 2 for m in measured.values()))),
            "intruders": [intruder_count(cosines, epsilon) for epsilon in THRESHOLDS], "directions": len(cosines),
            "spectrum": [float(value / values[0]) for value in values]}


def averaged(cells: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over seeds, spreads of the losses, and the first seed's spectrum."""
    row = {key: float(np.mean([cell[key] for cell in cells])) for key in ("effective_rank", "energy_rank_90", "norm")}
    for key in ("loss", "source_loss"):
        row[f"{key}_mean"], row[f"{key}_sd"] = mean_and_sd([cell[key] for cell in cells])
    return row | {"intruders": np.mean([cell["intruders"] for cell in cells], axis=0).tolist(),
                  "directions": cells[0]["directions"], "spectrum": cells[0]["spectrum"]}


def two_tasks(seed: int, width: int = 64, rank: int = 8, steps: int = 300, lr: float = 1e-2) -> dict[str, float]:
    """A linear layer whose new task uses other inputs than the old one: by how much do its old answers change?

    The old inputs fill the first half of the features, the new ones the second. Full fine-tuning's gradient ȳᵀx is zero in the
    columns of the old inputs, so it changes none of the old answers. LoRA's A starts random there, and B turns that into ΔW.
    "blind" is LoRA whose A starts at zero there: it changes none of them either. METHOD_left is the part of the new task not
    learned.
    """
    rng, half = np.random.default_rng(seed), width // 2
    old, new = np.zeros((256, width)), np.zeros((256, width))
    old[:, :half], new[:, half:] = rng.standard_normal((256, half)), rng.standard_normal((256, half))
    goal = rng.standard_normal((width, rank)) @ rng.standard_normal((rank, width)) / width
    W = rng.uniform(-1.0, 1.0, (width, width)) / width**0.5
    target, result = tensor(new @ (W + goal).T), {}
    start = rng.uniform(-1.0, 1.0, (rank, width)) / width**0.5
    for method in ("lora", "full", "blind"):
        seen = start * (np.arange(width) >= half) if method == "blind" else start.copy()
        A, B = tensor(seen, True), tensor(np.zeros((width, rank)), True)
        weight = tensor(W, method == "full")

        def answer(x: Any, weight: Tensor = weight, A: Tensor = A, B: Tensor = B) -> Tensor:
            return linear(tensor(x), weight) if weight.requires_grad else lora_linear(tensor(x), weight, None, A, B)

        optimizer = AdamW([weight] if method == "full" else [A, B], lr=lr, weight_decay=0.0)
        for _ in range(steps):
            error = answer(new) - target
            loss = (error * error).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        before = old @ W.T
        result[method] = float(np.linalg.norm(answer(old).data - before) / np.linalg.norm(before))
        result[f"{method}_left"] = loss.item() / float(np.mean((new @ goal.T) ** 2))
    return result


def best(rows: list[dict[str, Any]], rank: int) -> dict[str, Any]:
    """The row of a rank with the lowest loss on the target."""
    return min((row for row in rows if row["rank"] == rank), key=lambda row: row["loss_mean"])


def verdict(rows: list[dict[str, Any]], own_inputs: dict[str, float]) -> list[dict[str, Any]]:
    """What the literature expects, and whether it is so here. Every rank at its best rate."""
    ranks = sorted({row["rank"] for row in rows} - {FULL})
    full, lora = best(rows, FULL), {r: best(rows, r) for r in ranks}
    at = THRESHOLDS.index(0.5)
    low = [r for r in ranks if r <= 16]
    rates = {r: [row["source_loss_mean"] for row in rows if row["rank"] == r] for r in (*ranks, FULL)}
    return [
        {"claim": "full fine-tuning's ΔW needs more directions for 90 % of its energy than LoRA's of any rank",
         "agrees": all(full["energy_rank_90"] > row["energy_rank_90"] for row in lora.values()),
         "found": f"{full['energy_rank_90']:.0f} against " + ", ".join(
             f"r={r} {row['energy_rank_90']:.1f}" for r, row in lora.items())},
        {"claim": "LoRA of rank up to 16 has more intruders (ε = 0.5) than full fine-tuning",
         "agrees": all(lora[r]["intruders"][at] > full["intruders"][at] for r in low),
         "found": f"full {full['intruders'][at]:.1f}, " + ", ".join(
             f"r={r} {row['intruders'][at]:.1f}" for r, row in lora.items()) + f" of {full['directions']}"},
        {"claim": "LoRA forgets less than full fine-tuning at every rank",
         "agrees": all(row["source_loss_mean"] < full["source_loss_mean"] for row in lora.values()),
         "found": f"loss on the source: full {full['source_loss_mean']:.3f}, " + ", ".join(
             f"r={r} {row['source_loss_mean']:.3f}" for r, row in lora.items())},
        {"claim": "a higher rate forgets more, at every rank and in full fine-tuning",
         "agrees": all(values == sorted(values) for values in rates.values()),
         "found": "; ".join(f"{'full' if r == FULL else f'r={r}'} " + " ".join(f"{value:.2f}" for value in values)
                            for r, values in rates.items())},
        {"claim": "where two tasks have inputs of their own, LoRA forgets and full fine-tuning does not",
         "agrees": own_inputs["full"] < 1e-12 < 0.01 < own_inputs["lora"],
         "found": f"old answers changed by {own_inputs['lora']:.1%} and {own_inputs['full']:.1%}"},
    ]


def table(report: dict[str, Any]) -> str:
    """The report as text."""
    text, base = report["text"], report["text"]["base"]
    lines = [f"{text['from']} to {text['to']}: d_model {text['model']['d_model']}, {text['steps']} steps, {text['seeds']} "
             "seeds, all linear layers; means over modules",
             f"    {'':8}{'rate':>8}{'target':>10}{'source':>10}{'eff. rank':>11}{'90 % rank':>11}{'‖ΔW‖':>8}"
             f"{'intruders at ε = ' + ', '.join(f'{e:g}' for e in THRESHOLDS):>36}",
             f"    {'base':8}{'':8}{base['loss']:>10.3f}{base['source_loss']:>10.3f}"]
    for row in report["rows"]:
        counts = ", ".join(f"{count:.0f}" for count in row["intruders"])
        name = "full" if row["rank"] == FULL else f"r = {row['rank']}"
        lines.append(f"    {name:8}{row['lr']:>8g}{row['loss_mean']:>10.3f}{row['source_loss_mean']:>10.3f}"
                     f"{row['effective_rank']:>11.1f}{row['energy_rank_90']:>11.1f}{row['norm']:>8.1f}"
                     f"{counts + ' of ' + str(row['directions']):>36}")
    return "\n".join([*lines, "", *verdict_lines(report)])
