"""Does ΔW repeat what W does most, or strengthen what W has and neglects? (The LoRA paper's Table 7.)"""

from __future__ import annotations

from typing import Any

import numpy as np

from .. import plots
from . import wide
from .common import Options, publish, verdict_lines

QUESTION = "Does ΔW strengthen directions that W neglects, and by how much? (LoRA paper, Table 7)"
EXPECTED = ("Hu et al. 2021, Table 7 (GPT-3, layer 48, q): in the directions of ΔW, W has more than in random ones and far "
            "less than in its own top ones: 0.32 against 0.02 and 21.67 at r = 4 (amplified 21.5 times), 1.90 against 0.33 and "
            "37.71 at r = 64 (1.9 times).")
KEYS = ("norm", "projection", "projection_top", "projection_random", "amplification")


def run(options: Options) -> dict[str, Any]:
    """Train the adapters, write figures/amplification.{png,svg,json}, and return the report."""
    report, found = wide.learned("amplification", options, EXPECTED)
    rows = []
    for kind in ("q_proj", "v_proj"):
        for r in ("4", "64"):
            mine = [data["amplification"][r] for cell in found for path, data in cell["modules"].items() if path.endswith(kind)]
            rows.append({"module": kind, "rank": int(r), "base_norm": float(np.mean([m["base_norm"] for m in mine]))}
                        | {key: [m[key] for m in mine] for key in KEYS})
    report |= {"rows": rows, "verdict": verdict(rows)}
    return publish(report, plots.amplification(report), options)


def verdict(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the paper expects, and whether it is so here: means over layers and seeds."""
    mean = {(row["module"], row["rank"]): {key: float(np.mean(row[key])) for key in KEYS} for row in rows}

    def said(*keys: str) -> str:
        return "; ".join(f"{kind} r={r} " + " against ".join(f"{values[key]:.2f}" for key in keys)
                         for (kind, r), values in mean.items())

    return [
        {"claim": "W has more in ΔW's directions than in random ones", "found": said("projection", "projection_random"),
         "agrees": all(v["projection"] > v["projection_random"] for v in mean.values())},
        {"claim": "and less than half of what it has in its own top ones", "found": said("projection", "projection_top"),
         "agrees": all(v["projection"] < 0.5 * v["projection_top"] for v in mean.values())},
        {"claim": "r = 4 amplifies more than r = 64", "found": said("amplification"),
         "agrees": all(mean[kind, 4]["amplification"] > mean[kind, 64]["amplification"] for kind in ("q_proj", "v_proj"))},
    ]


def table(report: dict[str, Any]) -> str:
    """The report as text."""
    text = report["text"]
    lines = [f"{text['from']} to {text['to']}: d_model {text['model']['d_model']}, {text['steps']} steps at rate "
             f"{report['lr']:g}, {text['pairs']} seeds; means over layers and seeds, ‖UᵀWVᵀ‖ with U, V the directions of …",
             f"    {'module':9}{'rank':>5}{'‖W‖':>9}{'… ΔW':>9}{'… W, top':>10}{'… chance':>10}{'‖ΔW‖':>9}{'factor':>9}"]
    for row in report["rows"]:
        norm, own, top, chance, factor = (float(np.mean(row[key])) for key in KEYS)
        lines.append(f"    {row['module']:9}{row['rank']:>5}{row['base_norm']:>9.2f}{own:>9.2f}{top:>10.2f}{chance:>10.2f}"
                     f"{norm:>9.2f}{factor:>9.1f}")
    return "\n".join([*lines, "", *verdict_lines(report)])
