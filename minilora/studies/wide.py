"""A wider base, for what needs room: adapters of ranks 4, 8 and 64 on q and v, and what their updates look like.

At d_model 64 any two updates of rank 64 fill the whole space and are alike by necessity. Here the space has 256 dimensions.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..lora import LoraConfig, delete_adapter
from ..lora.layer import dense
from ..rank import Update, amplification, compare, gram_svd, top_projection, updates
from ..training import sweep
from .cells import compute
from .common import Options, Pretraining, writable_folder
from .text import Q_V, SWEEP_MEMORY, TARGET, Setting, base_of, best_rate, lora_cell, task_on, windows_of

ALPHA = 32.0
RANKS = (4, 8, 64)


@dataclass(frozen=True)
class Size:
    """How much is computed. pairs: of seeds."""

    setting: Setting
    pairs: int
    rates: list[float]


SIZES = {
    "quick": Size(Setting(256, 1, Pretraining(20, 8, 2e-3, 64), 8, 4, 16), 1, [1e-2]),
    "default": Size(Setting(256, 2, Pretraining(400, 24, 2e-3, 64), 150, 16, 128), 3, [3e-3, 1e-2, 2e-2]),
    "full": Size(Setting(256, 2, Pretraining(400, 24, 2e-3, 64), 300, 16, 256), 5, [3e-3, 1e-2, 2e-2]),
}


def learned(study: str, options: Options, expected: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The beginning of a study's report, and one update_cell for each pair of seeds. The learning rate is searched at r = 8."""
    size, start = SIZES[options.size], time.perf_counter()
    writable_folder(options.out)
    facts, given = size.setting.facts(), size.setting.to_dict()
    config = {"r": 8, "lora_alpha": ALPHA, "target_modules": Q_V}
    search = compute(lora_cell, [{"setting": given, "configs": [config], "seeds": [options.seed], "lrs": [lr]}
                                 for lr in size.rates], options, "learning rate")
    lr = best_rate([row for rows in search for row in rows])
    pairs = [[options.seed + 2 * i, options.seed + 2 * i + 1] for i in range(options.seeds or size.pairs)]
    cells = [{"setting": given, "seeds": pair, "lr": lr, "grids": i == 0} for i, pair in enumerate(pairs)]
    found = compute(update_cell, cells, options, "adapters")
    return {"study": study, "size": options.size, "seed": options.seed, "text": facts | {"pairs": len(pairs)}, "lr": lr,
            "alpha": ALPHA, "expected": expected, "seconds": time.perf_counter() - start}, found


def update_cell(setting: dict[str, Any], seeds: list[int], lr: float, grids: bool) -> dict[str, Any]:
    """Adapters of every rank and of two seeds on q and v, trained side by side, and their updates module by module.

    "modules": path -> {"overlap": φ(i, i) of r = 8 in r = 64, of two seeds at r = 64 and of two random matrices (and the first
    direction's φ(1, 8)), "amplification": rank -> Table 7}. With grids, "grids": the whole `compare` of the last layer.
    """
    given = Setting.of(setting)
    base = base_of(given)
    configs = [LoraConfig(r=r, lora_alpha=ALPHA, target_modules=Q_V) for r in RANKS]
    result = sweep(base, task_on(given), configs, seeds=seeds, lrs=[lr], train=given.schedule(lr),
                   evaluate=windows_of(given, TARGET), memory=SWEEP_MEMORY)
    found = {}
    for k, row in enumerate(result.rows):
        result.install(base, k, "cell")
        found[row["rank"], row["seed"]] = updates(base, "cell")
        delete_adapter(base, "cell")
    first, second = seeds
    rng = np.random.default_rng(first)
    layers: dict[str, Any] = dict(base.named_modules())
    modules: dict[str, Any] = {}
    drawn: dict[str, Any] = {}
    for path in found[8, first]:
        # Of two seeds: the A of one seed starts with the same rows at every rank.
        pairs = {"r = 8 in r = 64": (found[8, first][path], found[64, second][path]),
                 "two seeds, r = 64": (found[64, first][path], found[64, second][path]),
                 "random": (noise(found[64, first][path].shape, rng), noise(found[64, first][path].shape, rng))}
        compared = {name: compare(one, other, draws=200 if grids else 0) for name, (one, other) in pairs.items()}
        modules[path] = {"overlap": {name: overlaps(data) for name, data in compared.items()}, "amplification": {}}
        W = dense(layers[path]).data
        _, S, _ = gram_svd(W)
        for r in (4, 64):
            update = found[r, first][path]
            modules[path]["amplification"][str(r)] = amplification(update, W) | {
                "norm": float(np.linalg.norm(update.svd[1])), "projection_top": top_projection(S, len(update.svd[1]))}
        if grids and path.startswith(f"layers.{given.n_layers - 1}."):
            drawn[path] = {name: rounded(data) for name, data in compared.items()}
    return {"seeds": seeds, "losses": {f"{row['rank']}, seed {row['seed']}": row["eval_loss"] for row in result.rows},
            "modules": modules, "grids": drawn}


def noise(shape: tuple[int, int], rng: np.random.Generator) -> Update:
    """A random update of rank 64."""
    return Update(rng.standard_normal((64, shape[1])), rng.standard_normal((shape[0], 64)))


def overlaps(data: dict[str, Any]) -> dict[str, float]:
    """A few numbers of a `compare`: φ(1, 8), φ(n, n) for n = 1, 4, 8, and what chance gives at 8."""
    phi = np.array(data["phi"])
    return {"1 in 8": float(phi[0, 7])} | {f"{n}, {n}": float(phi[n - 1, n - 1]) for n in (1, 4, 8)} | {"chance": 8 / data["k"]}


def rounded(data: Any) -> Any:
    """The same with four decimals: a grid of 64 × 64 is for looking at."""
    if isinstance(data, dict):
        return {key: rounded(value) for key, value in data.items()}
    if isinstance(data, list):
        return [rounded(value) for value in data]
    return round(data, 4) if isinstance(data, float) else data
