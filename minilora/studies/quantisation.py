"""QLoRA: what a base of 4 bits loses, what it saves, and what LoRA makes good: on real weights, on text, in memory."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .. import plots
from ..lora import LoraConfig, TargetConfig, add_adapter
from ..lora.config import find_targets
from ..lora.layer import dense
from ..lora.svd import low_rank_factors
from ..methods import FourBit, loftq, quantise
from ..nn import Transformer, TransformerConfig
from ..pretrained import load_pretrained
from ..training import mean_loss, train
from .cells import compute
from .common import Options, Pretraining, publish, text_batches, verdict_lines, writable_folder
from .costs import costs_of_bases
from .methods import search
from .text import SOURCE, TARGET, Setting, base_of, best_rate, copy_of, mean_and_sd, training_text, windows_of

QUESTION = "What does a base of 4 bits lose and save, and does LoRA on it reach LoRA on the float base? (QLoRA, LoftQ)"
EXPECTED = ("QLoRA (arXiv:2305.14314): NF4 is more exact than FP4 on weights; double quantisation loses nothing and saves 0.37 "
            "bits a number; LoRA on NF4 reaches LoRA on the float base. LoftQ (arXiv:2310.08659): a start at what the 4 bits "
            "lost begins, and ends, nearer.")
ALPHA, ROUNDS = 32.0, 5          # LoftQ's rounds
APART = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"]       # LoftQ takes q, k and v one by one
CODES: dict[str, dict[str, Any]] = {
    "NF4": {"quant_type": "nf4", "double_quant": False}, "NF4, double": {"quant_type": "nf4", "double_quant": True},
    "FP4": {"quant_type": "fp4", "double_quant": False}, "FP4, double": {"quant_type": "fp4", "double_quant": True},
}
FLOAT, LOFTQ = "float32", "NF4, double, LoftQ"
BASES = (FLOAT, *CODES, LOFTQ)
MINILM = TransformerConfig.bert(vocab_size=30522, d_model=384, n_layers=6, n_heads=12, d_ff=1536, n_labels=2)
REAL = {"minilm-l6": "MiniLM-L6", "smollm2-135m": "SmolLM2-135M"}


@dataclass(frozen=True)
class Size:
    """How much is computed. rates, widen: of the search of rates (methods.py). sources: real models, of which `layers` layers,
    spread evenly, are taken. shape, batch, turns: of the model on which memory and time are measured, its batches, and how
    often."""

    setting: Setting
    seeds: int
    rank: int
    rates: int
    widen: int
    sources: tuple[str, ...]
    layers: int
    shape: TransformerConfig
    batch: int
    turns: int


SMALL = TransformerConfig.gpt2(vocab_size=256, d_model=64, n_layers=1, n_heads=4, max_len=64)
SIZES = {
    "quick": Size(Setting(64, 1, Pretraining(60, 16, 3e-3, 64), 8, 4, 16), 1, 4, 1, 0, ("minilm-l6",), 1, SMALL, 4, 1),
    "default": Size(Setting(64, 2, Pretraining(500, 32, 3e-3, 64), 120, 16, 256), 3, 8, 3, 2, tuple(REAL), 3, MINILM, 16, 3),
    "full": Size(Setting(96, 2, Pretraining(800, 32, 3e-3, 64), 200, 16, 384), 5, 8, 3, 2, tuple(REAL), 6, MINILM, 16, 7),
}


def run(options: Options) -> dict[str, Any]:
    """Compute everything, write figures/quantisation.{png,svg,json}, and return the report."""
    size, start = SIZES[options.size], time.perf_counter()
    writable_folder(options.out)
    seeds = [options.seed + i for i in range(options.seeds or size.seeds)]
    facts, setting = size.setting.facts() | {"seeds": len(seeds)}, size.setting.to_dict()
    found = search(text_cell, {"setting": setting}, {name: {"size": size.rank} for name in BASES}, dict.fromkeys(BASES, 1e-2),
                   seeds, options, tried=size.rates, widen=size.widen, what="bases")
    prose = compute(prose_cell, [{"setting": setting, "way": name, "size": size.rank} for name in BASES], options, "before")
    rows = [summary(name, found[name], seeds[0]) | {"prose": loss} for name, loss in zip(BASES, prose, strict=True)]
    errors, left_out = [], {}
    for source in size.sources:
        try:
            errors += compute(error_cell, [{"source": source, "layers": size.layers, "rank": size.rank}], options, source)
        except (FileNotFoundError, ImportError) as error:
            left_out[source] = str(error)
    errors += compute(base_cell, [{"setting": setting, "rank": size.rank}], options, "the base's own")
    report = {"study": "quantisation", "size": options.size, "seed": options.seed, "text": facts, "rank": size.rank,
              "alpha": ALPHA, "expected": EXPECTED, "rows": rows, "errors": errors, "left_out": left_out}
    measured = costs_of_bases(size.shape, {FLOAT: None, **CODES}, size.rank, size.batch, size.setting.T, size.turns)
    name = f"d_model {size.shape.d_model}, {size.shape.n_layers} layers, {size.batch} × {size.setting.T} tokens"
    report["memory"] = {"name": name, "model": size.shape.to_dict(), "rows": measured}
    report |= {"verdict": verdict(report), "seconds": time.perf_counter() - start}
    return publish(report, plots.quantisation(report), options)


def on_base(base: Transformer, name: str, rank: int, seed: int) -> Transformer:
    """A base of that name with LoRA on it."""
    config = LoraConfig(r=rank, lora_alpha=ALPHA, target_modules=APART)
    if name == LOFTQ:
        loftq(base, config, iterations=ROUNDS)             # its start is no matter of chance
        return base
    if name != FLOAT:
        quantise(base, **CODES[name])
    add_adapter(base, config, seed=seed)
    return base


def text_cell(setting: dict[str, Any], way: str, size: int, seed: int, lr: float) -> dict[str, Any]:
    """One run: losses before and after, and the bytes of the linear weights. None for losses where it diverged."""
    given = Setting.of(setting)
    model, windows = on_base(copy_of(base_of(given)), way, size, seed), windows_of(given, TARGET)
    weights = [layer.weight for _, _, layer in find_targets(model, TargetConfig(target_modules=APART))]
    numbers = sum(int(np.prod(weight.shape)) for weight in weights)
    stored = sum(weight.nbytes if isinstance(weight, FourBit) else 4 * weight.size for weight in weights)
    row: dict[str, Any] = {"seed": seed, "lr": lr, "bits": 8.0 * stored / numbers, "start": mean_loss(model, windows),
                           "loss": None, "source_loss": None}
    try:
        with np.errstate(all="ignore"):
            train(model, text_batches(training_text(None), given.batch, given.T, seed), given.schedule(lr))
            losses = {"loss": mean_loss(model, windows), "source_loss": mean_loss(model, windows_of(given, SOURCE))}
    except FloatingPointError:
        return row
    return row | losses if np.isfinite(list(losses.values())).all() else row


def prose_cell(setting: dict[str, Any], way: str, size: int) -> float:
    """The loss on the base's own text before any training: there each lost bit counts."""
    given = Setting.of(setting)
    return mean_loss(on_base(copy_of(base_of(given)), way, size, 0), windows_of(given, SOURCE))


def summary(name: str, cells: list[dict[str, Any]], first: int) -> dict[str, Any]:
    """Means over the seeds at the best rate of the first one."""
    lr = best_rate([cell for cell in cells if cell["seed"] == first])
    best = [cell for cell in cells if cell["lr"] == lr and cell["loss"] is not None]
    row = {"base": name, "lr": lr, "bits": best[0]["bits"], "runs": len(best)}
    for key in ("start", "loss", "source_loss"):
        row[f"{key}_mean"], row[f"{key}_sd"] = mean_and_sd([cell[key] for cell in best])
    return row


def error_cell(source: str, layers: int, rank: int) -> dict[str, Any]:
    """The errors of the codes on some layers of a real model."""
    model, _ = load_pretrained(source)
    last = model.cfg.n_layers - 1
    taken = sorted({round(i * last / max(1, layers - 1)) for i in range(layers)})
    return {"weights": REAL[source]} | errors_of(weights_of(model, taken), rank)


def base_cell(setting: dict[str, Any], rank: int) -> dict[str, Any]:
    """The errors of the codes on the base of the text task, and on random matrices of its shapes."""
    given = Setting.of(setting)
    matrices = list(weights_of(base_of(given), list(range(given.n_layers))))
    rng = np.random.default_rng(0)
    random = errors_of([rng.standard_normal(W.shape).astype("float32") for W in matrices], rank)
    return {"weights": "the text base"} | errors_of(matrices, rank) | {"random": random["codes"]}


def weights_of(model: Transformer, layers: list[int]) -> Iterator[np.ndarray]:
    """The linear weights of some layers, q, k and v apart."""
    config = TargetConfig(target_modules=r"layers\.\d+\..*(q|k|v|o|up|down|gate)_proj", exclude_modules=["qkv_proj"],
                          layers_to_transform=layers)
    layers_found: list[Any] = [layer for _, _, layer in find_targets(model, config)]
    return (dense(layer).data for layer in layers_found)


def errors_of(matrices: Sequence[np.ndarray] | Iterator[np.ndarray], rank: int) -> dict[str, Any]:
    """{"matrices": how many, "codes": code -> {"mean", "least", "most"} of ‖W - Q(W)‖/‖W‖, with what LoftQ leaves at last}."""
    found: dict[str, list[float]] = {name: [] for name in (*CODES, f"LoftQ, r = {rank}")}
    for W in matrices:
        norm = float(np.linalg.norm(W))
        for name, code in CODES.items():
            found[name].append(float(np.linalg.norm(W - FourBit(W, **code).dense())) / norm)
        found[f"LoftQ, r = {rank}"].append(loftq_error(W, rank) / norm)
    return {"matrices": len(found["NF4"]), "codes": {
        name: {"mean": float(np.mean(values)), "least": min(values), "most": max(values)} for name, values in found.items()}}


def loftq_error(W: np.ndarray, rank: int) -> float:        # (out, in)
    """‖W - Q - BA‖ after LoftQ's rounds, as `loftq` has them on a model."""
    product = np.zeros_like(W)
    error = 0.0
    for _ in range(ROUNDS):
        rest = W - FourBit(W - product, **CODES["NF4, double"]).dense()
        U, S, Vh = np.linalg.svd(rest, full_matrices=False)
        B, A = low_rank_factors(U[:, :rank], S[:rank], Vh[:rank], 1.0)
        product = B @ A
        error = float(np.linalg.norm(rest - product))
    return error


def verdict(report: dict[str, Any]) -> list[dict[str, Any]]:
    """What the papers expect, and whether it is so here."""
    rows, errors = {row["base"]: row for row in report["rows"]}, report["errors"]
    mean = {row["weights"]: {code: found["mean"] for code, found in row["codes"].items()} for row in errors}
    last = f"LoftQ, r = {report['rank']}"
    plain, best = rows[FLOAT], rows["NF4, double"]
    spread = max(plain["loss_sd"], best["loss_sd"])
    double = max(abs(m[f"{code}, double"] / m[code] - 1.0) for m in mean.values() for code in ("NF4", "FP4"))
    memory = {row["base"]: row for row in report["memory"]["rows"]}

    def each(text: Any) -> str:
        return "; ".join(f"{name}: {text(m)}" for name, m in mean.items())

    return [
        {"claim": "NF4's error is below FP4's on all weights", "agrees": all(m["NF4"] < m["FP4"] for m in mean.values()),
         "found": each(lambda m: f"{m['NF4']:.4f} against {m['FP4']:.4f}")},
        {"claim": "double quantisation changes the error by less than 2 % and saves 0.37 bits a number",
         "agrees": double < 0.02 and abs(rows["NF4"]["bits"] - best["bits"] - 0.373) < 0.02,
         "found": f"at most {double:.1%}; {rows['NF4']['bits']:.3f} and {best['bits']:.3f} bits"},
        {"claim": "before training the base's loss on its own text rises less with NF4 than with FP4",
         "agrees": rows["NF4"]["prose"] - plain["prose"] < rows["FP4"]["prose"] - plain["prose"],
         "found": f"from {plain['prose']:.4f} to {rows['NF4']['prose']:.4f} and {rows['FP4']['prose']:.4f}"},
        {"claim": "LoRA on NF4 reaches LoRA on the float base (within the spread over seeds)",
         "agrees": best["loss_mean"] - plain["loss_mean"] <= spread,
         "found": f"{best['loss_mean']:.4f} against {plain['loss_mean']:.4f}, ± {spread:.4f}"},
        {"claim": "LoftQ leaves less error than NF4 alone", "agrees": all(m[last] < m["NF4, double"] for m in mean.values()),
         "found": each(lambda m: f"{m[last]:.4f} against {m['NF4, double']:.4f}")},
        {"claim": "LoftQ begins nearer to the float base on that text than QLoRA",
         "agrees": rows[LOFTQ]["prose"] < best["prose"],
         "found": f"{rows[LOFTQ]['prose']:.4f} against {best['prose']:.4f}"},
        {"claim": "LoftQ ends below QLoRA by more than the spread over seeds",
         "agrees": best["loss_mean"] - rows[LOFTQ]["loss_mean"] > max(rows[LOFTQ]["loss_sd"], best["loss_sd"]),
         "found": f"{rows[LOFTQ]['loss_mean']:.4f} ± {rows[LOFTQ]['loss_sd']:.4f} against {best['loss_mean']:.4f}"},
        {"claim": "training on 4 bits takes less memory at its peak",
         "agrees": memory["NF4, double"]["peak_mb"] < memory[FLOAT]["peak_mb"],
         "found": f"{memory['NF4, double']['peak_mb']:.0f} MB against {memory[FLOAT]['peak_mb']:.0f} MB; a step takes "
                  f"{memory['NF4, double']['step']:.1f} times as long"},
    ]


def table(report: dict[str, Any]) -> str:
    """The report as text."""
    text = report["text"]
    lines = [f"{text['from']} to {text['to']}: LoRA r = {report['rank']} on all linear layers, {text['steps']} steps, "
             f"{text['seeds']} seeds, each base at its best rate",
             f"    {'base':20}{'bits':>7}{'rate':>9}{'prose before':>14}{'before':>9}{'loss':>17}{'prose':>9}"]
    lines += [f"    {row['base']:20}{row['bits']:>7.3f}{row['lr']:>9.2g}{row['prose']:>14.4f}{row['start_mean']:>9.4f}"
              f"{row['loss_mean']:>9.4f} "
              f"±{row['loss_sd']:.4f}{row['source_loss_mean']:>9.4f}" for row in report["rows"]]
    lines += ["", "    ‖W - Q(W)‖/‖W‖, mean over matrices",
              f"    {'weights':20}" + "".join(f"{code:>14}" for code in report["errors"][0]["codes"])]
    shown = [(row["weights"], row["codes"]) for row in report["errors"]] + [("random, normal", report["errors"][-1]["random"])]
    lines += [f"    {name:20}" + "".join(f"{found['mean']:>14.4f}" for found in codes.values()) for name, codes in shown]
    if any(name == REAL["smollm2-135m"] for name, _ in shown):
        lines.append("    (SmolLM2's package holds 4-bit weights already, in another code: Q4_1)")
    lines += [f"    {source} is left out: {why}" for source, why in report["left_out"].items()]
    lines += ["", f"    {'memory, ' + report['memory']['name']:50}{'weights MB':>12}{'peak MB':>9}{'step':>7}"]
    lines += [f"    {row['base']:50}{row['weights_mb']:>12.0f}{row['peak_mb']:>9.0f}{row['step']:>7.2f}"
              for row in report["memory"]["rows"]]
    return "\n".join([*lines, "", *verdict_lines(report)])
