"""The main job: how does quality depend on LoRA's rank?

Three answers, from known to open: (a) one linear layer, where the optimum of every rank is known; (b) a Transformer whose
hidden update has rank 4; (c) real text: a small base, pretrained on English prose, adapted to Python source with ranks
1 … 64, beside the frozen base and full fine-tuning.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from .. import plots
from ..data import Corpus, load_corpus
from ..lora import LoraConfig, count_parameters, delete_adapter, merge_and_unload
from ..nn import Transformer, TransformerConfig
from ..rank.report import analyze
from ..training import TrainConfig, mean_loss, sweep, train
from .common import Options, Pretraining, pretrained_base, say, text_batches, validation, writable_folder, write_json
from .planted import planted_linear, planted_transformer

QUESTION = "How does quality depend on LoRA's rank? Planted ranks with a known answer, then real text."
ALPHA = 32.0                     # fixed for all ranks, so s = 32/r: then the best learning rate hardly depends on the rank
TARGETS: dict[str, list[str] | str] = {"q, v": ["q_proj", "v_proj"], "all linear": "all-linear"}


@dataclass(frozen=True)
class Size:
    """How much is computed."""

    d_model: int
    n_layers: int
    pretraining: Pretraining
    steps: int                   # of every fine-tuning run
    batch: int
    windows: int                 # of validation
    seeds: int
    ranks: dict[str, list[int]]  # by target set
    lora_rates: list[float]
    full_rates: list[float]
    planted_steps: tuple[int, int]


ALL = [1, 2, 4, 8, 16, 32, 64]
SIZES = {
    "quick": Size(64, 1, Pretraining(60, 16, 3e-3, 64), 20, 8, 64, 2, {"q, v": [1, 8, 64], "all linear": [8]},
                  [3e-3, 1e-2], [1e-3, 3e-3], (300, 120)),
    "default": Size(64, 2, Pretraining(500, 32, 3e-3, 64), 120, 16, 256, 2, {"q, v": ALL, "all linear": [1, 8, 64]},
                    [3e-3, 1e-2, 2e-2, 4e-2], [1e-3, 3e-3, 6e-3, 1e-2], (600, 300)),
    "full": Size(96, 2, Pretraining(800, 32, 3e-3, 64), 200, 16, 384, 3, {"q, v": ALL, "all linear": ALL},
                 [1e-3, 3e-3, 1e-2, 2e-2, 4e-2], [3e-4, 1e-3, 3e-3, 6e-3, 1e-2], (1000, 400)),
}


def run(options: Options) -> dict[str, Any]:
    """Compute everything, write figures/rank_quality.{png,svg,json}, and return the report."""
    size, start = SIZES[options.size], time.perf_counter()
    out = writable_folder(options.out)
    seeds = [options.seed + i for i in range(size.seeds)]
    say("(a) planted rank, one linear layer")
    linear = planted_linear(size.planted_steps[0], options.seed)
    say("(b) planted rank, a Transformer")
    transformer = planted_transformer(size.planted_steps[1], seeds[:2], [1, 2, 3, 4, 6, 8])
    say("(c) real text")
    text = real_text(size, seeds)
    report = {"study": "rank-quality", "size": options.size, "seed": options.seed, "seconds": time.perf_counter() - start,
              "planted_linear": linear, "planted_transformer": transformer, "text": text}
    write_json(out / "rank_quality.json", report)
    plots.save(plots.rank_quality(report), out / "rank_quality")
    return report


def real_text(size: Size, seeds: list[int]) -> dict[str, Any]:
    """Base on prose, adapted to Python: every rank, target set and seed; the frozen base; full fine-tuning."""
    prose, python = load_corpus("prose"), load_corpus("python")
    T = size.pretraining.tokens
    cfg = TransformerConfig.gpt2(vocab_size=256, d_model=size.d_model, n_layers=size.n_layers, n_heads=4, max_len=T)
    base = pretrained_base(cfg, prose, size.pretraining, seeds[0], say)
    valid = validation(python, 64, T, size.windows)
    base_losses = {"loss": mean_loss(base, valid), "source_loss": mean_loss(base, validation(prose, 64, T, size.windows))}

    lora_search = lora_runs(base, python, size, {"q, v": [8]}, [seeds[0]], size.lora_rates, valid)
    lora_lr = min(lora_search, key=lambda row: row["loss"])["lr"]
    full_search = [full_run(base, python, size, seeds[0], lr, valid) for lr in size.full_rates]
    full_lr = min(full_search, key=lambda row: row["loss"])["lr"]
    say(f"    best learning rates at r = 8: LoRA {lora_lr:g}, full fine-tuning {full_lr:g}")

    full = [full_run(base, python, size, seed, full_lr, valid) for seed in seeds]
    full_loss = [row["loss"] for row in full]
    cells = lora_runs(base, python, size, size.ranks, seeds, [lora_lr], valid, keep=True)
    total = count_parameters(base)["total"]
    rows = []
    for targets, ranks in size.ranks.items():
        for r in ranks:
            group = [c for c in cells if c["targets"] == targets and c["rank"] == r]
            losses = [c["loss"] for c in group]
            rows.append({"targets": targets, "rank": r, "trainable": group[0]["trainable"],
                         "share": group[0]["trainable"] / total, "losses": losses, "loss_mean": float(np.mean(losses)),
                         "loss_sd": _sd(losses), "above_full": float(np.mean(losses) - np.mean(full_loss)),
                         "effective_rank": float(np.mean([c["effective_rank"] for c in group])),
                         "energy_rank_90": float(np.mean([c["energy_rank_90"] for c in group]))})
    return {"from": "English prose", "to": "Python source", "sha256": {c.name: c.sha256 for c in (prose, python)},
            "model": cfg.to_dict(), "parameters": total, "seeds": len(seeds), "steps": size.steps, "batch": size.batch,
            "tokens": T, "alpha": ALPHA, "scale": "alpha / r", "base": base_losses, "rows": rows,
            "search": {"rank": 8, "targets": "q, v", "seed": seeds[0],
                       "lora": [{"lr": c["lr"], "loss": c["loss"]} for c in lora_search],
                       "full": [{"lr": c["lr"], "loss": c["loss"]} for c in full_search]},
            "lora_lr": lora_lr, "full_lr": full_lr,
            "full": {"losses": full_loss, "loss_mean": float(np.mean(full_loss)), "loss_sd": _sd(full_loss),
                     "trainable": total},
            "merge": next(c["merge"] for c in cells if c["rank"] == 8)}


def lora_runs(base: Transformer, corpus: Corpus, size: Size, ranks: dict[str, list[int]], seeds: list[int], rates: list[float],
              valid: list[Any], keep: bool = False) -> list[dict[str, Any]]:
    """One row for every target set, rank, seed and rate; the ranks of a target set train side by side.

    keep: also analyse what each adapter learned, and check that merging it changes nothing.
    """
    T, rows = size.pretraining.tokens, []

    def task(step: int, rng: np.random.Generator) -> Any:
        return text_batches(corpus, size.batch, T, int(rng.integers(2**31)))(step)

    for targets, wanted in ranks.items():
        configs = [LoraConfig(r=r, lora_alpha=ALPHA, target_modules=TARGETS[targets]) for r in wanted]
        result = sweep(base, task, configs, seeds=seeds, lrs=rates, train=_config(size, 0.0), evaluate=valid)
        for k, cell in enumerate(result.rows):
            row = {"targets": targets, "rank": cell["rank"], "seed": cell["seed"], "lr": cell["lr"], "loss": cell["eval_loss"]}
            if keep:
                result.install(base, k, "learned")
                found = analyze(base, name="learned").summary()
                row |= {"trainable": count_parameters(base)["trainable"], "effective_rank": found["mean_effective_rank"],
                        "energy_rank_90": found["mean_energy_rank_90"],
                        "merge": {"adapter": mean_loss(base, valid), "merged": mean_loss(merge_and_unload(base), valid)}}
                delete_adapter(base, "learned")
            rows.append(row)
    return rows


def full_run(base: Transformer, corpus: Corpus, size: Size, seed: int, lr: float, valid: list[Any]) -> dict[str, Any]:
    """Full fine-tuning of a copy of the base."""
    model = Transformer(base.cfg)
    model.load_state_dict(base.state_dict())
    train(model.unfreeze(), text_batches(corpus, size.batch, size.pretraining.tokens, seed), _config(size, lr))
    return {"lr": lr, "loss": mean_loss(model, valid)}


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


def _config(size: Size, lr: float) -> TrainConfig:
    return TrainConfig(steps=size.steps, lr=lr, warmup=0.1, schedule="cosine", weight_decay=0.0, clip=1.0)


def _sd(values: list[float]) -> float:
    return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
