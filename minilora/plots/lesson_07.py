"""The figure of lesson 07: what the methods of one family reach, against how many numbers they train."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .style import BLACK, BLUE, GREEN, GREY, ORANGE, PINK, SLIDE

KINDS = {"product B A": (BLUE, "o"), "another change of W": (ORANGE, "s"), "biases only": (PINK, "D"),
         "a network beside": (GREEN, "^")}                 # what a method changes -> how its point looks


def family_points(ax: Axes, data: dict[str, Any]) -> Axes:
    """Validation loss against trained numbers, one point a method, with the frozen base and full fine-tuning as lines.

    data: {"rows": [{"method", "kind" (one of KINDS), "numbers", "loss"}], "base": loss, "full": {"numbers", "loss"}}.
    """
    rows, full = sorted(data["rows"], key=lambda row: row["loss"]), data["full"]
    values = [row["loss"] for row in rows] + [data["base"], full["loss"]]
    low, high = min(values), max(values)
    gap, right = 0.058 * (high - low), full["numbers"]
    ax.set_xscale("log")
    ax.set_ylim(low - 0.09 * (high - low), high + 0.09 * (high - low))
    ax.set_xlim(min(row["numbers"] for row in rows) / 2.6, right * 1.1)
    ax.axhline(data["base"], color=BLACK, linestyle=(0, (4, 2)))
    ax.axhline(full["loss"], color=GREY, linestyle=":")
    for text, at, above in ("frozen base", data["base"], 4), (f"full fine-tuning, {right:,} numbers", full["loss"], -16):
        ax.annotate(text, (0.01, at), xycoords=("axes fraction", "data"), xytext=(0, above), textcoords="offset points",
                    fontsize=13, color=BLACK)
    for kind, (colour, marker) in KINDS.items():
        chosen = [row for row in rows if row["kind"] == kind]
        if chosen:
            ax.plot([row["numbers"] for row in chosen], [row["loss"] for row in chosen], marker, color=colour, markersize=11,
                    markeredgecolor="white", label=kind)
    first = max(rows, key=lambda row: sum(_near(row, other) for other in rows))
    crowd = [row for row in rows if _near(row, first)]     # their labels stand in a column, so that none overlap
    for row, at in zip(crowd, spread([row["loss"] for row in crowd], gap), strict=True):
        ax.annotate(row["method"], (row["numbers"], row["loss"]), xytext=(first["numbers"] * 2.1, at), fontsize=14, va="center",
                    arrowprops={"arrowstyle": "-", "color": GREY, "linewidth": 0.8, "shrinkB": 5, "relpos": (0, 0.5)})
    for row in rows:
        if row not in crowd:
            ax.annotate(row["method"], (row["numbers"], row["loss"]), xytext=(-10, -5), textcoords="offset points",
                        fontsize=14, ha="right")
    ax.set_xlabel("numbers that train")
    ax.set_ylabel("validation loss, nats per byte")
    ax.legend(loc="upper right", bbox_to_anchor=(1.0, 0.93))
    return ax


def family(data: dict[str, Any]) -> Figure:
    """`family_points` as a figure of a slide's shape."""
    with plt.rc_context(SLIDE):
        figure, ax = plt.subplots(figsize=(11, 6.2), layout="constrained")
        family_points(ax, data)
        ax.set_title(f"One budget, one protocol: {data['steps']} steps, one seed", fontsize=16, loc="left")
    return figure


def spread(values: Sequence[float], gap: float) -> list[float]:
    """Places for labels of ascending values: at least `gap` apart, and moved as little as that allows (least squares)."""
    blocks: list[list[float]] = []                         # of values less i·gap: wherever they fall, they share their mean
    for i, value in enumerate(values):
        blocks.append([value - i * gap])
        while len(blocks) > 1 and np.mean(blocks[-2]) > np.mean(blocks[-1]):
            last = blocks.pop()
            blocks[-1] += last
    places = [float(np.mean(block)) for block in blocks for _ in block]
    return [place + i * gap for i, place in enumerate(places)]


def _near(row: dict[str, Any], other: dict[str, Any]) -> bool:
    return bool(0.8 < row["numbers"] / other["numbers"] < 1.25)
