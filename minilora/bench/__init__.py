"""The benchmark: minilora against PyTorch + PEFT, in one run on one machine.

Each side runs in a process of its own on the same weights, the same first factors, the same batches, and as many threads.
First their losses (or tokens) are compared; a difference ends the run. Then the two take turns: minilora, PyTorch, minilora,
PyTorch, …, while the other side sleeps. What is reported are medians of single steps, their ratio, the peak memory of each,
and the GEMM floor: what the step's matrix products alone would take, measured in the same run at the same shapes.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.std import tqdm

from .. import plots
from ..backend import get_device, numpy_mkl
from ..backend.parallel import cores, workers
from ..studies.common import writable_folder, write_json
from .cases import CASES, QUICK, Case
from .report import table
from .worker import started

__all__ = ["CASES", "QUICK", "Case", "compare", "machine", "names_of", "run", "save", "table"]

TOLERANCE = 1e-4                                           # relative, of losses and logits
QUICK_ROUNDS = 3


def names_of(wanted: Sequence[str] | None, device: str = "cpu", quick: bool = False) -> list[str]:
    """The cases that are meant: by name, or all of the device (None, or "all"), the small ones if quick.

    Raises ValueError for an unknown case, or one of another device.
    """
    own = [name for name, case in CASES.items() if case.device == device]
    if not own:
        raise ValueError(f"the benchmark has no cases for device {device!r}: expected cpu or gpu")
    if not wanted or "all" in wanted:
        return [name for name in own if name in QUICK or not quick]
    for name in wanted:
        if name not in CASES:
            raise ValueError(f"unknown benchmark case {name!r}: expected all, or one of {', '.join(own)}")
        if name not in own:
            raise ValueError(f"benchmark case {name!r} is for another device: expected one of {', '.join(own)}, or give "
                             f"--device {CASES[name].device}")
    return list(dict.fromkeys(wanted))


def run(names: Sequence[str] | None = None, *, device: str = "cpu", quick: bool = False,
        rounds: int | None = None) -> dict[str, Any]:
    """Measure the named cases (None: all of the device) and return a JSON-ready report.

    rounds: turns of each side, in place of the case's own number; quick: the small cases, at most three rounds.

    Raises ValueError for an unknown case or device, or rounds below 1; ModuleNotFoundError, saying what to install, without
    PyTorch, transformers or PEFT; RuntimeError without a GPU for device "gpu", or if the two sides compute different numbers.
    """
    names = names_of(names, device, quick)
    if rounds is not None and rounds < 1:
        raise ValueError(f"rounds = {rounds}: expected a whole number of at least 1")
    for library in ("torch", "transformers", "peft"):
        if importlib.util.find_spec(library) is None:
            raise ModuleNotFoundError(f"the benchmark compares with PyTorch, transformers and PEFT, and {library} is missing: "
                                      'pip install torch "minilora[parity]"')
    get_device(device)                                     # a missing GPU or CuPy is said before any work
    report: dict[str, Any] = {"machine": machine(), "versions": {}, "cases": {}}
    if device == "cpu" and numpy_mkl.version():
        report["machine"]["mkl"] = numpy_mkl.version()
    for name in names:
        case = CASES[name]
        count = rounds or (min(case.rounds, QUICK_ROUNDS) if quick else case.rounds)
        report["cases"][name], facts = measure(name, case, count)
        report["machine"] |= facts["gpu"]
        report["versions"] |= facts["versions"]
    return report


def save(report: dict[str, Any], out: Path) -> Path:
    """Write figure and numbers: bench_cpu, bench_cpu_mkl (where MKL multiplies) or bench_gpu_<its name>, .png, .svg and .json.

    Returns the path without suffix.
    """
    gpu, mkl = (report["machine"].get(key) for key in ("gpu", "mkl"))
    name = "bench_cpu" + "_mkl" * (mkl is not None)
    if gpu is not None:
        name = "bench_gpu_" + re.sub(r"[^a-z0-9]+", "_", gpu.lower()).strip("_")
    path = writable_folder(out) / name
    write_json(path.with_suffix(".json"), report)
    plots.save(plots.bench(report), path)
    return path


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        model = next((line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line), model)
    return {"cpu": model, "cores": cores(),
            "threads": workers(), "python": platform.python_version(), "numpy": np.__version__}


def measure(name: str, case: Case, rounds: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """One case: what the report says of it, and {"gpu", "versions"} of what it ran on."""
    environment = os.environ | {"MINILORA_TF32": str(int(case.tf32)), "PYTHONWARNINGS": "ignore::FutureWarning"}
    with tempfile.TemporaryDirectory() as folder:
        with started("start", case, folder, environment) as start:
            start.ask("start")
        with (started("minilora", case, folder, environment) as ours,
              started("torch", case, folder, environment) as theirs):
            ready, their_ready = ours.ask("prepare"), theirs.ask("prepare")
            if ready["trainable"] != their_ready["trainable"]:
                raise RuntimeError(f"{name}: minilora trains {ready['trainable']} numbers, PEFT {their_ready['trainable']}: "
                                   "nothing was timed")
            agreement = compare(name, ours.ask("check"), theirs.ask("check"))
            seconds: dict[str, list[float]] = {"minilora": [], "torch": []}
            for _ in tqdm(range(rounds), desc=name, leave=False, disable=None, unit="round"):
                seconds["minilora"] += ours.ask("turn", case.steps)
                seconds["torch"] += theirs.ask("turn", case.steps)
            memory = {"minilora": ours.ask("memory"), "torch": theirs.ask("memory")}
            profile = ours.ask("profile", case.steps)
    tokens = case.tokens_per_step()
    sides = {side: _summary(seconds[side], memory[side], tokens) for side in seconds}
    found = {"kind": case.kind, **sides, "ratio": sides["minilora"]["median_ms"] / sides["torch"]["median_ms"],
             "memory_ratio": sides["minilora"]["peak_mb"] / sides["torch"]["peak_mb"], **agreement, "tokens_per_step": tokens,
             "adapters": len(case.cells()), "trainable": ready["trainable"], "tf32": case.tf32, "rounds": rounds,
             "steps": case.steps, **profile}
    return found, {"gpu": {key: ready[key] for key in ("gpu", "cupy") if key in ready}, "versions": their_ready["versions"]}


def compare(name: str, ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    """How far the two sides agree: {"difference": relative, of losses or logits, "first_different_token": its number or None}.

    After a token that differs the texts differ, so logits are compared up to the first one. Raises RuntimeError beyond 1e-4.
    """
    a, b = ours["values"], theirs["values"]
    if len(a) != len(b):
        raise RuntimeError(f"{name}: minilora gave {len(a)} numbers, PyTorch {len(b)}: nothing was timed")
    first = next((i for i, (x, y) in enumerate(zip(ours.get("tokens", ()), theirs.get("tokens", ()))) if x != y), None)
    pairs = list(zip(a, b))[: None if first is None else first + 1]
    difference = float(np.max([abs(x - y) / abs(y) for x, y in pairs]))
    if not difference <= TOLERANCE:                        # NaN as well
        raise RuntimeError(f"{name}: the two sides compute different {'logits' if 'tokens' in ours else 'losses'}, by "
                           f"{difference:.1e}: expected at most {TOLERANCE:.0e}; nothing was timed")
    return {"difference": difference, **({"first_different_token": first} if "tokens" in ours else {})}


def _summary(seconds: list[float], memory: dict[str, float], tokens: int) -> dict[str, float]:
    ms = np.array(seconds) * 1e3
    return {"median_ms": float(np.median(ms)), "p10_ms": float(np.percentile(ms, 10)), "p90_ms": float(np.percentile(ms, 90)),
            "tokens_per_second": tokens / float(np.median(ms)) * 1e3, "peak_mb": memory["peak"], "idle_mb": memory["idle"]}
