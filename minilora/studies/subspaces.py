"""Do adapters of different rank, or of different seeds, learn the same directions? (The LoRA paper's Figures 3 and 4.)"""

from __future__ import annotations

from typing import Any

import numpy as np

from .. import plots
from . import wide
from .common import Options, publish, verdict_lines

QUESTION = "Do adapters of ranks 8 and 64, or of two seeds, learn the same directions? (LoRA paper, Figures 3 and 4)"
EXPECTED = ("Hu et al. 2021, section 7.2: the first direction of r = 8 lies in those of r = 64 (φ > 0.5), the others hardly; "
            "two seeds share directions, two random matrices none; ΔW of q shares more of them than ΔW of v.")
PAIRS = ("r = 8 in r = 64", "two seeds, r = 64", "random")


def run(options: Options) -> dict[str, Any]:
    """Train the adapters, write figures/subspaces.{png,svg,json}, and return the report."""
    report, found = wide.learned("subspaces", options, EXPECTED)
    rows = []
    for kind in ("q_proj", "v_proj"):
        for pair in PAIRS:
            mine = [cell["modules"][path]["overlap"][pair] for cell in found for path in cell["modules"] if path.endswith(kind)]
            rows.append({"module": kind, "pair": pair, "count": len(mine)}
                        | {key: [float(np.mean([row[key] for row in mine])), float(np.std([row[key] for row in mine]))]
                           for key in mine[0]})
    report |= {"rows": rows, "verdict": verdict(rows), "grids": found[0]["grids"]}
    return publish(report, plots.subspaces(report), options)


def verdict(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the paper expects, and whether it is so here: means over modules and seeds."""
    at = {(row["module"], row["pair"]): row for row in rows}
    kinds, chance = ("q_proj", "v_proj"), rows[0]["chance"][0]

    def said(pair: str, key: str) -> str:
        return ", ".join(f"{kind} {at[kind, pair][key][0]:.2f}" for kind in kinds)

    first, seeds, control = PAIRS
    return [
        {"claim": "the first direction of r = 8 lies in the first 8 of r = 64: φ(1, 8) > 0.5",
         "agrees": all(at[kind, first]["1 in 8"][0] > 0.5 for kind in kinds), "found": said(first, "1 in 8")},
        {"claim": "all 8 directions overlap less than the first does", "found": said(first, "8, 8"),
         "agrees": all(at[kind, first]["8, 8"][0] < at[kind, first]["1 in 8"][0] for kind in kinds)},
        {"claim": f"two seeds share more than chance, φ(8, 8) > 2 · {chance:.3f}", "found": said(seeds, "8, 8"),
         "agrees": all(at[kind, seeds]["8, 8"][0] > 2 * chance for kind in kinds)},
        {"claim": "two random matrices do not", "found": said(control, "8, 8"),
         "agrees": all(at[kind, control]["8, 8"][0] < 2 * chance for kind in kinds)},
        {"claim": "q's updates share more than v's between seeds", "found": said(seeds, "8, 8"),
         "agrees": at["q_proj", seeds]["8, 8"][0] > at["v_proj", seeds]["8, 8"][0]},
    ]


def table(report: dict[str, Any]) -> str:
    """The report as text."""
    text = report["text"]
    lines = [f"{text['from']} to {text['to']}: d_model {text['model']['d_model']}, {text['steps']} steps at rate "
             f"{report['lr']:g}, {text['pairs']} pairs of seeds; similarity φ(i, j) of input directions, mean ± sd",
             f"    {'module':9}{'compared':20}{'φ(1, 8)':>14}{'φ(1, 1)':>14}{'φ(4, 4)':>14}{'φ(8, 8)':>14}{'chance at 8':>13}"]
    for row in report["rows"]:
        values = "".join(f"{row[key][0]:>8.2f} ±{row[key][1]:.2f}" for key in ("1 in 8", "1, 1", "4, 4", "8, 8"))
        lines.append(f"    {row['module']:9}{row['pair']:20}{values}{row['chance'][0]:>13.3f}")
    return "\n".join([*lines, "", *verdict_lines(report)])
