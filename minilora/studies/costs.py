"""What a method costs beside its quality: the time of a step, memory, a slower forward pass, the size of its file.

Times are ratios: the method and full fine-tuning (or the plain base) take turns in one run, and each turn is set against its
neighbours. The peak of memory is measured in a process of its own. Weights are random: costs do not depend on them.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from ..autograd import no_grad
from ..backend import to_host
from ..lora import count_parameters, merge_adapter
from ..lora.files import save_adapter
from ..methods import quantise
from ..nn import Transformer, TransformerConfig
from ..training import TrainConfig
from .memory import forget_peak, give_back_freed_memory, resident_mb
from .ways import FULL, adapt, fit

PROGRAM = "from minilora.studies.costs import report_peak; report_peak()"
STEPS, LR = 3, 1e-4                                        # timed steps of a turn, after one that warms up


def costs(cfg: TransformerConfig, sizes: dict[str, int], batch: int, tokens: int, rounds: int) -> dict[str, dict[str, Any]]:
    """Method -> {"step", "forward", "merged": ratios, "bytes": of its file, "tasks_per_gb"}.

    step: of training on batch × tokens, against full fine-tuning; forward: of one sequence, against the plain base, before and
    (merged) after merging, None where nothing can be merged. rounds: turns of each.
    """
    draw, found = drawn(cfg, batch, tokens), dict[str, dict[str, Any]]()
    ids = draw(0)[0][:1]
    full_step = partial(step_seconds, adapt(Transformer(cfg), FULL, 1, 0, STEPS + 1), FULL, draw)
    plain_forward = partial(forward_seconds, Transformer(cfg), ids)
    for name, size in sizes.items():
        model = adapt(Transformer(cfg), name, size, 0, STEPS + 1)
        if name == FULL:
            row: dict[str, Any] = {"bytes": sum(p.size for _, p in model.named_parameters()) * 4}
            row |= dict.fromkeys(("step", "forward", "merged"), 1.0)
        else:
            turn = partial(ratio, partial(forward_seconds, model, ids), plain_forward, 8 * rounds)
            row = {"bytes": file_bytes(model), "step": ratio(partial(step_seconds, model, name, draw), full_step, rounds),
                   "forward": turn(), "merged": turn() if merges(model) else None}
        found[name] = row | {"tasks_per_gb": 1e9 / row["bytes"]}
    return found


def merges(model: Transformer) -> bool:
    """Merge the adapter, if it is a change of weights."""
    try:
        merge_adapter(model)
    except ValueError:
        return False
    return True


def drawn(cfg: TransformerConfig, batch: int, tokens: int) -> Callable[[int], tuple[np.ndarray, np.ndarray]]:
    """Random batches for a model of this shape: ids (B, T), and ids or labels (B,) to learn."""
    def batches(i: int) -> tuple[np.ndarray, np.ndarray]:
        rng = np.random.default_rng(i)
        ids = rng.integers(0, cfg.vocab_size, (batch, tokens + 1))
        return ids[:, :-1], ids[:, 1:] if cfg.n_labels is None else rng.integers(0, cfg.n_labels, batch)
    return batches


def ratio(one: Callable[[], float], other: Callable[[], float], rounds: int) -> float:
    """The median of one's time over the other's, in turns: other, one, other, one, …, other."""
    before, ratios = other(), []
    for _ in range(rounds):
        mine, after = one(), other()
        ratios.append(2.0 * mine / (before + after))
        before = after
    return median(ratios)


def step_seconds(model: Transformer, name: str, batches: Any) -> float:
    """The shortest time of a training step in one turn, by the loop itself."""
    stamps: list[float] = []
    fit(model, name, batches, TrainConfig(steps=STEPS + 1, lr=LR, clip=1.0, log_every=STEPS + 1, progress=False),
        lambda *_: stamps.append(time.perf_counter()))
    return min(np.diff(stamps).tolist())


def forward_seconds(model: Transformer, ids: np.ndarray) -> float:
    """The shortest time of a forward pass without gradients in one turn."""
    model.eval()
    seconds = []
    with no_grad():
        for _ in range(STEPS + 1):
            start = time.perf_counter()
            to_host(model(ids).data)
            seconds.append(time.perf_counter() - start)
    model.train()
    return min(seconds[1:])


def file_bytes(model: Transformer) -> int:
    """The size of the adapter's weights on disk; of one that has no file (virtual tokens with a classifier), of its numbers."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            save_adapter(model, folder)
        except ValueError:
            return 4 * int(count_parameters(model)["trainable"])
        return sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))


def peaks(cfg: TransformerConfig, ways: Sequence[dict[str, Any]], batch: int, tokens: int) -> list[dict[str, float]]:
    """For each way, {"name", "size"} and perhaps "quantised" (arguments of `quantise`): memory in MB, by `training_memory`."""
    def one(way: dict[str, Any]) -> dict[str, float]:
        task = json.dumps(way | {"config": cfg.to_dict(), "batch": batch, "tokens": tokens})
        done = subprocess.run([sys.executable, "-c", PROGRAM, task], stdout=subprocess.PIPE, text=True)
        if done.returncode:
            raise RuntimeError(f"the process that measures the memory of {way['name']} failed (its message is above)")
        return dict(json.loads(done.stdout))

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(one, ways))


def report_peak() -> None:
    """The process: measure what the command line says, and print it."""
    print(json.dumps(training_memory(**json.loads(sys.argv[1]))))


def training_memory(config: dict[str, Any], name: str, size: int, batch: int, tokens: int,
                    quantised: dict[str, Any] | None = None) -> dict[str, float]:
    """{"peak_mb": the most memory that training took, "weights_mb": what the model with its adapter took before it}.

    Both beyond what the process had resident before there was a model.
    """
    cfg = TransformerConfig(**config)
    give_back_freed_memory()
    forget_peak()
    start = resident_mb()
    model = Transformer(cfg)
    if quantised is not None:
        quantise(model, **quantised)
    model = adapt(model, name, size, 0, 3)
    give_back_freed_memory()
    forget_peak()
    weights = resident_mb() - start
    fit(model, name, drawn(cfg, batch, tokens), TrainConfig(steps=3, lr=LR, clip=1.0, progress=False))
    return {"peak_mb": resident_mb() - start, "weights_mb": weights}


def costs_of_bases(cfg: TransformerConfig, bases: dict[str, Any], rank: int, batch: int, tokens: int,
                   rounds: int) -> list[dict[str, Any]]:
    """For each base (None: as it is, or the arguments of `quantise`): {"base", "step": the time of a step of LoRA on it over
    LoRA's on the first base, "peak_mb", "weights_mb"}."""
    draw, rows = drawn(cfg, batch, tokens), []
    memory = peaks(cfg, [{"name": "LoRA", "size": rank} | ({} if given is None else {"quantised": given})
                         for given in bases.values()], batch, tokens)
    first: Any = None
    for (name, given), peak in zip(bases.items(), memory, strict=True):
        model = Transformer(cfg) if given is None else quantise(Transformer(cfg), **given)
        turn = partial(step_seconds, adapt(model, "LoRA", rank, 0, STEPS + 1), "LoRA", draw)
        first = first or turn
        rows.append({"base": name, "step": 1.0 if turn is first else ratio(turn, first, rounds), **peak})
    return rows
