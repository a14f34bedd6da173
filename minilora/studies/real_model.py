"""The measures of the text studies on a real model: MiniLM, learning the sentiment of film reviews.

Which matrices to adapt, which directions two adapters share, what ΔW amplifies, and whether full fine-tuning's ΔW is low-rank.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from .. import plots
from ..data import Labelled, movie_reviews, packaged_file, sha256
from ..lora import delete_adapter
from ..lora.layer import dense
from ..rank import Update, alignment, amplification, compare, gram_svd, intruder_count, measures, top_projection, updates
from ..tasks import TASKS, Run, fit, prepare
from .cells import compute
from .common import Options, publish, verdict_lines, writable_folder
from .spectrum import THRESHOLDS
from .text import mean_and_sd
from .which_matrices import SETS
from .wide import noise, overlaps, rounded

QUESTION = "Do the text studies' answers hold on a real model? MiniLM on film reviews: matrices, directions, spectra"
EXPECTED = ("As in which-matrices, subspaces, amplification and spectrum: several kinds of matrices beat one; the first "
            "direction is shared; W has more in ΔW's directions than in random ones; full fine-tuning's ΔW is of higher "
            "rank, with fewer intruders.")
SOURCE, Q_V = "minilm-l6", ["q_proj", "v_proj"]
CHOSEN = ("q", "v", "q, v", "q, k, v, o", "up, down", "all six")
LORA_LR, FULL_LR, ALPHA = 4e-3, 2e-4, 16.0


@dataclass(frozen=True)
class Size:
    """How much is computed: sentences to train on and held out, updates, seeds, kinds of matrices."""

    train: int
    held: int
    steps: int
    seeds: int
    chosen: tuple[str, ...]


SIZES = {
    "quick": Size(64, 32, 3, 1, ("q", "q, v")),
    "default": Size(1600, 500, 60, 2, CHOSEN),
    "full": Size(4000, 1000, 250, 3, CHOSEN),
}


def run(options: Options) -> dict[str, Any]:
    """Train, write figures/real_model.{png,svg,json}, and return the report."""
    size, start = SIZES[options.size], time.perf_counter()
    writable_folder(options.out)
    seeds = [options.seed + i for i in range(options.seeds or size.seeds)]
    data = {"train": size.train, "held": size.held, "steps": size.steps}
    places = [(name, seed) for name in size.chosen for seed in seeds]
    learned = compute(update_cell, [data | {"seed": seed, "grids": seed == seeds[0]} for seed in seeds], options, "updates")
    found = compute(matrices_cell, [data | {"seed": seed, "modules": SETS[name][0], "rank": SETS[name][1]}
                                    for name, seed in places], options, "choices")
    rows = []
    for name in size.chosen:
        mine = [cell for (at, _), cell in zip(places, found, strict=True) if at == name]
        mean, sd = mean_and_sd([cell["loss"] for cell in mine])
        rows.append({"matrices": name, "rank": SETS[name][1], "kinds": len(SETS[name][0]), "loss_mean": mean, "loss_sd": sd,
                     "accuracy": mean_and_sd([cell["accuracy"] for cell in mine])[0], "trainable": mine[0]["trainable"]})
    file = packaged_file("movie-reviews")
    report = {"study": "real-model", "size": options.size, "seed": options.seed, "base": SOURCE, "seeds": len(seeds), **data,
              "sha256": {file.name: sha256(file)}, "expected": EXPECTED, "rates": {"lora": LORA_LR, "full": FULL_LR},
              "matrices": rows, "updates": means(learned), "grids": learned[0]["grids"], "thresholds": THRESHOLDS}
    report |= {"verdict": verdict(report), "seconds": time.perf_counter() - start}
    return publish(report, plots.real_model(report), options)


def sentences(train: int, held: int) -> tuple[list[Labelled], list[Labelled]]:
    """The same for every seed: to train on, and held out."""
    found = movie_reviews("rotten_tomatoes")
    order = np.random.default_rng(0).permutation(len(found))[: train + held]
    return [found[i] for i in order[:train]], [found[i] for i in order[train:]]


def prepared(train: int, held: int, steps: int, seed: int, modules: list[str], rank: int, lr: float = LORA_LR) -> Run:
    """MiniLM with an adapter, ready to train."""
    settings = TASKS["sentiment"].settings.with_(r=rank, lora_alpha=ALPHA, target_modules=modules, steps=steps, batch=32,
                                                 max_length=64, lr=lr)
    return prepare(SOURCE, "sentiment", *sentences(train, held), settings, seed=seed, where="reviews", eval_where="reviews",
                   progress=False)


def matrices_cell(train: int, held: int, steps: int, seed: int, modules: list[str], rank: int) -> dict[str, Any]:
    """One choice of matrices: held-out loss and accuracy, and how many numbers were trained in them."""
    run = prepared(train, held, steps, seed, modules, rank)
    fit(run)
    after = run.evaluate()
    trained = sum(update.A.size + update.B.size for update in updates(run.model).values())
    return {"loss": after["loss"], "accuracy": after["accuracy"], "trainable": trained}


def update_cell(train: int, held: int, steps: int, seed: int, grids: bool) -> dict[str, Any]:
    """Adapters of ranks 4, 8 and 64 on q and v, one more of rank 64 from another seed, and full fine-tuning: their updates.

    "overlap": kind -> pair -> numbers; "amplification": kind -> rank -> Table 7; "spectra": of q and v of the last layer;
    "ranks" and "intruders" for r = 8, 64 and full.
    """
    runs = {"r = 4": (4, seed), "r = 8": (8, seed), "r = 64": (64, seed + 1000), "r = 64, other seed": (64, seed + 2000)}
    learned: dict[str, dict[str, Update]] = {}
    scores: dict[str, Any] = {}
    base: dict[str, Any] = {}
    for name, (rank, start) in runs.items():
        run = prepared(train, held, steps, start, Q_V, rank)
        layers: dict[str, Any] = dict(run.model.named_modules())
        base = base or {path: dense(layers[path]).data.copy() for path in updates(run.model)}
        fit(run)
        learned[name], scores[name] = updates(run.model), run.evaluate()
    learned["full"] = whole(train, held, steps, seed, base)
    result: dict[str, Any] = {part: {} for part in ("overlap", "amplification", "grids", "spectra", "ranks", "intruders")}
    rng = np.random.default_rng(seed)
    last = max(learned["r = 8"], key=lambda path: (int(path.split(".")[1]), path))
    svds = {path: gram_svd(W) for path, W in base.items()}
    for kind in Q_V:
        paths = [path for path in learned["r = 8"] if path.endswith(kind)]
        pairs: dict[str, list[Any]] = {"r = 8 in r = 64": [], "two seeds, r = 64": [], "random": []}
        for path in paths:
            shape = learned["r = 8"][path].shape
            both = {"r = 8 in r = 64": (learned["r = 8"][path], learned["r = 64"][path]),
                    "two seeds, r = 64": (learned["r = 64"][path], learned["r = 64, other seed"][path]),
                    "random": (noise(shape, rng), noise(shape, rng))}
            for name, (one, other) in both.items():
                draw = grids and path.rpartition(".")[0] == last.rpartition(".")[0]
                found = compare(one, other, draws=200 if draw else 0)
                pairs[name].append(overlaps(found))
                if draw:
                    result["grids"].setdefault(path, {})[name] = rounded(found)
        result["overlap"][kind] = {name: average(values) for name, values in pairs.items()}
        result["amplification"][kind] = {name: average([amplification(learned[name][path], base[path]) | {
            "norm": float(np.linalg.norm(learned[name][path].svd[1])),
            "projection_top": top_projection(svds[path][1], len(learned[name][path].svd[1]))} for path in paths])
            for name in ("r = 4", "r = 64")}
    for name in ("r = 4", "r = 8", "r = 64", "full"):
        measured = {path: measures(update.svd[1]) for path, update in learned[name].items()}
        result["ranks"][name] = average([{key: m[key] for key in ("effective_rank", "energy_rank_90", "frobenius_norm")}
                                         for m in measured.values()])
        cosines = [c for path, update in learned[name].items()
                   for c in alignment(update, base[path], base_svd=svds[path])["cosines"]]
        result["intruders"][name] = {"counts": [intruder_count(cosines, e) for e in THRESHOLDS], "directions": len(cosines)}
        values = np.array(measured[last]["singular_values"])
        result["spectra"][name] = (values / values[0]).tolist()
    return result | {"scores": {name: {key: score[key] for key in ("loss", "accuracy")} for name, score in scores.items()},
                     "last": last}


def whole(train: int, held: int, steps: int, seed: int, base: dict[str, Any]) -> dict[str, Update]:
    """What full fine-tuning makes of the same modules."""
    run = prepared(train, held, steps, seed, Q_V, 1, FULL_LR)
    delete_adapter(run.model, "default")
    run.model.unfreeze()
    fit(run)
    layers: dict[str, Any] = dict(run.model.named_modules())
    return {path: Update(dense(layers[path]).data - W, np.eye(len(W), dtype=W.dtype)) for path, W in base.items()}


def average(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Means, key by key."""
    return {key: float(np.mean([row[key] for row in rows])) for key in rows[0]}


def means(cells: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over the seeds; the spectra are the first seed's."""
    first = cells[0]
    return {
        **{part: {kind: {name: average([cell[part][kind][name] for cell in cells]) for name in first[part][kind]}
                  for kind in first[part]} for part in ("overlap", "amplification")},
        "ranks": {name: average([cell["ranks"][name] for cell in cells]) for name in first["ranks"]},
        "intruders": {name: {"counts": np.mean([cell["intruders"][name]["counts"] for cell in cells], axis=0).tolist(),
                             "directions": first["intruders"][name]["directions"]} for name in first["intruders"]},
        "spectra": first["spectra"], "last": first["last"]}


def verdict(report: dict[str, Any]) -> list[dict[str, Any]]:
    """What the text studies found and the literature expects, and whether it is so here."""
    found, loss = report["updates"], {row["matrices"]: row["loss_mean"] for row in report["matrices"]}
    one = min(loss[name] for name in loss if len(SETS[name][0]) == 1)
    several = min(loss[name] for name in loss if len(SETS[name][0]) > 1)
    seeds = {kind: found["overlap"][kind]["two seeds, r = 64"] for kind in Q_V}
    factors = {(kind, r): values for kind in Q_V for r, values in found["amplification"][kind].items()}
    at, ranks, intruders = THRESHOLDS.index(0.9), found["ranks"], found["intruders"]
    return [
        {"claim": "several kinds of matrices beat one", "agrees": several < one, "found": f"{several:.3f} against {one:.3f}"},
        {"claim": "two seeds share their first direction: φ(1, 8) > 0.5",
         "agrees": all(v["1 in 8"] > 0.5 for v in seeds.values()),
         "found": ", ".join(f"{kind} {v['1 in 8']:.2f}" for kind, v in seeds.items())},
        {"claim": "W has more in ΔW's directions than in random ones, less than half of its top ones'",
         "agrees": all(v["projection_random"] < v["projection"] < 0.5 * v["projection_top"] for v in factors.values()),
         "found": "; ".join(f"{kind} {r}: {v['projection']:.2f} ({v['projection_random']:.2f} … {v['projection_top']:.2f})"
                            for (kind, r), v in factors.items())},
        {"claim": "full fine-tuning's ΔW has a higher effective rank than LoRA's of r = 8",
         "agrees": ranks["full"]["effective_rank"] > ranks["r = 8"]["effective_rank"],
         "found": ", ".join(f"{name} {v['effective_rank']:.1f}" for name, v in ranks.items())},
        {"claim": "LoRA turns W's first directions further than full fine-tuning (|cos| < 0.9)",
         "agrees": all(intruders[name]["counts"][at] > intruders["full"]["counts"][at] for name in ("r = 4", "r = 8")),
         "found": ", ".join(f"{name} {v['counts'][at]:.1f} of {v['directions']}" for name, v in intruders.items())},
    ]


def table(report: dict[str, Any]) -> str:
    """The report as text."""
    found = report["updates"]
    lines = [f"{report['base']}, {report['train']:,} sentences of Rotten Tomatoes, {report['steps']} steps, {report['seeds']} "
             "seeds",
             f"    {'matrices':14}{'rank':>6}{'trained':>10}{'held-out loss':>22}{'accuracy':>11}"]
    lines += [f"    {row['matrices']:14}{row['rank']:>6}{row['trainable']:>10,}{row['loss_mean']:>14.4f} ±{row['loss_sd']:.4f}"
              f"{row['accuracy']:>11.3f}" for row in report["matrices"]]
    lines += ["", f"    {'module':8}{'compared':22}{'φ(1, 8)':>9}{'φ(8, 8)':>9}{'chance':>9}"]
    lines += [f"    {kind:8}{name:22}{v['1 in 8']:>9.2f}{v['8, 8']:>9.2f}{v['chance']:>9.3f}"
              for kind in Q_V for name, v in found["overlap"][kind].items()]
    lines += ["", f"    {'module':8}{'':8}{'‖W‖':>8}{'… ΔW':>8}{'… top':>8}{'… chance':>10}{'‖ΔW‖':>8}{'factor':>8}"]
    lines += [f"    {kind:8}{r:8}{v['base_norm']:>8.2f}{v['projection']:>8.2f}{v['projection_top']:>8.2f}"
              f"{v['projection_random']:>10.2f}{v['norm']:>8.2f}{v['amplification']:>8.1f}"
              for kind in Q_V for r, v in found["amplification"][kind].items()]
    return "\n".join([*lines, "", *verdict_lines(report)])
