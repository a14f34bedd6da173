"""How long do the tools on files take, and how much memory? On an adapter of a 7B model, and on SmolLM2.

Each is run as a user runs it, as a command in a process of its own; the system says how much memory that process had. (That
is at least what the process that started it has, so nothing large is ever made in this one.)
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from .. import plots
from ..lora.files import write_adapter
from ..pretrained.hub import find
from .common import Options, publish, say, verdict_lines, writable_folder

QUESTION = "How long do analyze, resize, compose, merge and loading take, and with how much memory?"
EXPECTED = ("On two cores the tools take less than 60 s and 2 GB for an adapter of a 7B model, r = 64 on all linear layers; "
            "merging SmolLM2 takes less than 20 s, and loading it a fifth of transformers' time.")
SECONDS, MERGE_SECONDS, MB, FASTER = 60.0, 20.0, 2000.0, 5.0
BASE = "smollm2-135m"
SIZES = {"quick": (64, 172, 2, 8), "default": (4096, 11008, 32, 64), "full": (4096, 11008, 32, 64)}    # D, F, layers, r
TIMED = ("import os, sys, time; {imports}; where = sys.argv[1]; start = time.perf_counter(); model = {call}; "
         "print(time.perf_counter() - start)")
MAKE = "import sys; from minilora.studies.file_tools import make; make(sys.argv[1], *map(int, sys.argv[2:]))"
ADAPT = ("import sys, minilora as ml; model, _ = ml.load_pretrained(sys.argv[1]); "
         "ml.add_adapter(model, ml.LoraConfig(r=8, target_modules='all-linear')); ml.save_adapter(model, sys.argv[2])")
OURS = TIMED.format(imports="import minilora as ml", call="ml.load_pretrained(where)")
THEIRS = TIMED.format(imports="import transformers", call="transformers.AutoModelForCausalLM.from_pretrained("
                      "os.path.dirname(where), gguf_file=os.path.basename(where))")


def run(options: Options) -> dict[str, Any]:
    """Time every tool, write figures/file_tools.{png,svg,json}, and return the report."""
    start = time.perf_counter()
    writable_folder(options.out)
    D, F, layers, r = SIZES[options.size]
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        adapters = [Path(folder, f"adapter{i}") for i in range(2)]
        for i, path in enumerate(adapters):
            measured(["-c", MAKE, path, D, F, layers, r, options.seed + i])
        megabytes = sum(file.stat().st_size for file in adapters[0].iterdir()) / 1e6
        verbs: dict[str, list[Any]] = {
            "analyze": [adapters[0], "--json"], f"resize to r = {r // 4}": [adapters[0], "--rank", r // 4],
            "compose, exact": [*adapters], f"compose, cut to r = {r}": [*adapters, "--how", "svd", "--rank", r]}
        for name, arguments in verbs.items():
            verb, out = name.split()[0].rstrip(","), [] if name == "analyze" else ["-o", Path(folder, f"out{len(rows)}")]
            rows.append({"tool": name, "on": "adapter", **measured(["-m", "minilora", verb, *arguments, *out])})
            say(f"    {name}: {rows[-1]['seconds']:.1f} s")
        left_out = "not in the quick form" if options.size == "quick" else without()
        if left_out is None:
            rows += on_smollm2(Path(folder))
    report = {"study": "file-tools", "size": options.size, "seed": options.seed, "expected": EXPECTED, "megabytes": megabytes,
              "shape": {"d_model": D, "d_ff": F, "layers": layers, "r": r}, "base": BASE, "without": left_out, "rows": rows,
              "verdict": verdict(rows), "seconds": time.perf_counter() - start}
    return publish(report, plots.file_tools(report), options)


def make(path: str, D: int, F: int, layers: int, r: int, seed: int) -> None:
    """Write an adapter of random numbers on all linear layers of a Llama of this shape."""
    rng, modules = np.random.default_rng(seed), {}
    shapes = dict.fromkeys(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"), (D, D)) | {
        "mlp.gate_proj": (F, D), "mlp.up_proj": (F, D), "mlp.down_proj": (D, F)}
    for layer in range(layers):
        for name, (d_out, d_in) in shapes.items():
            A, B = (rng.standard_normal(shape, dtype=np.float32) for shape in ((r, d_in), (d_out, r)))
            modules[f"model.layers.{layer}.{name}"] = {"A": A, "B": B, "scale": 1.0, "embedding": False}
    write_adapter(path, {"task_type": "CAUSAL_LM"}, modules)


def on_smollm2(folder: Path) -> list[dict[str, Any]]:
    """Merging an adapter into SmolLM2, and loading it, here and by transformers."""
    measured(["-c", ADAPT, BASE, folder / "small"])
    merge = ["-m", "minilora", "merge", BASE, folder / "small", "-o", folder / "merged", "--dequantise"]
    rows = [{"tool": "merge", "on": BASE, **measured(merge)},
            {"tool": "load", "on": BASE, **measured(["-c", OURS, BASE], inner=True)}]
    if all(importlib.util.find_spec(name) for name in ("torch", "transformers", "gguf")):
        rows.append({"tool": "load, transformers", "on": BASE,
                     **measured(["-c", THEIRS, find(BASE)], inner=True)})
    return rows


def without() -> str | None:
    """Why SmolLM2 cannot be measured here; None if it can."""
    try:
        find(BASE)
    except (ImportError, FileNotFoundError) as error:
        return str(error)
    return None


def measured(arguments: list[Any], inner: bool = False) -> dict[str, float]:
    """{"seconds", "peak_mb"} of a Python process; inner: the seconds that it prints, else all of it.

    Raises RuntimeError if it fails (its message is above).
    """
    start = time.perf_counter()
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen([sys.executable, *map(str, arguments)], stdout=output)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        seconds = time.perf_counter() - start
        if process.returncode:
            raise RuntimeError(f"minilora {' '.join(map(str, arguments[2:]))} failed (its message is above)")
        output.seek(0)
        printed = output.read()
    kilobytes = usage.ru_maxrss / (1024 if sys.platform == "darwin" else 1)
    return {"seconds": float(printed.split()[-1]) if inner else seconds, "peak_mb": kilobytes * 1024 / 1e6}


def verdict(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What is asked of the tools, and whether it is so here."""
    tools, own = [row for row in rows if row["on"] == "adapter"], {row["tool"]: row for row in rows}
    slowest, largest = (max(tools, key=lambda row: row[key]) for key in ("seconds", "peak_mb"))
    claims = [{"claim": f"analyze, resize and compose take less than {SECONDS:.0f} s", "agrees": slowest["seconds"] < SECONDS,
               "found": f"at most {slowest['seconds']:.1f} s, {slowest['tool']}"},
              {"claim": f"and less than {MB / 1000:.0f} GB", "agrees": largest["peak_mb"] < MB,
               "found": f"at most {largest['peak_mb'] / 1000:.2f} GB, {largest['tool']}"}]
    if "merge" in own:
        claims.append({"claim": f"merging {BASE} takes less than {MERGE_SECONDS:.0f} s",
                       "agrees": own["merge"]["seconds"] < MERGE_SECONDS, "found": f"{own['merge']['seconds']:.1f} s"})
    if "load, transformers" in own:
        ours, theirs = (own[name]["seconds"] for name in ("load", "load, transformers"))
        claims.append({"claim": "loading it takes less than a fifth of transformers' time", "agrees": FASTER * ours < theirs,
                       "found": f"{ours:.1f} s against {theirs:.1f} s"})
    return claims


def table(report: dict[str, Any]) -> str:
    """The report as text."""
    shape = report["shape"]
    lines = [f"an adapter of {report['megabytes']:,.0f} MB: r = {shape['r']} on all linear layers of {shape['layers']} layers "
             f"of width {shape['d_model']}; and {report['base']}", f"    {'':28}{'':14}{'seconds':>9}{'peak MB':>10}"]
    lines += [f"    {row['tool']:28}{row['on']:14}{row['seconds']:>9.1f}{row['peak_mb']:>10,.0f}" for row in report["rows"]]
    if report["without"]:
        lines.append(f"    {report['base']} is left out: {report['without']}")
    return "\n".join([*lines, "", *verdict_lines(report)])
