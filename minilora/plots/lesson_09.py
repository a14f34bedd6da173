"""The figure of lesson 09: time as counted and as measured, and memory by what it is for."""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .style import BLACK, BLUE, GREEN, GREY, ORANGE, SLIDE

PARTS = {"weights": (GREY, ""), "gradients": (BLUE, "//"), "optimizer": (ORANGE, "\\\\"), "activations": (GREEN, "")}


def time_bars(ax: Axes, data: dict[str, Any]) -> Axes:
    """For each shape and way, time relative to full fine-tuning: counted beside measured, with the line at 1.

    data["times"]: [{"shape": text, "way": text, "counted": ratio, "measured": ratio}].
    """
    rows = data["times"]
    places = [i + 0.5 * (i // 2) for i in range(len(rows))]        # the two ways of a shape stand together
    for shift, key, colour in (-0.19, "counted", GREY), (0.19, "measured", BLUE):
        ax.bar([at + shift for at in places], [row[key] for row in rows], 0.36, color=colour, label=key)
        for at, row in zip(places, rows, strict=True):     # within the bar: the line at 1 never crosses it
            ax.annotate(f"{row[key]:.2f}", (at + shift, 0.04), color="white", fontsize=15, rotation=90, ha="center",
                        va="bottom")
    ax.axhline(1.0, color=BLACK, linestyle=(0, (4, 2)), label="full fine-tuning")
    ax.set_xticks(places, [row["way"] for row in rows])
    for i in range(0, len(rows), 2):
        ax.annotate(rows[i]["shape"], ((places[i] + places[i + 1]) / 2, 0), xycoords=("data", "axes fraction"),
                    xytext=(0, -26), textcoords="offset points", ha="center", va="top", fontsize=12)
    ax.set_ylim(0, 1.6)                                    # a bar that a busy machine makes longer is cut, its number stands
    ax.grid(False, axis="x")
    ax.set_ylabel("time of a step, full fine-tuning = 1")
    ax.legend(loc="upper right", ncols=3)
    return ax


def memory_bars(ax: Axes, data: dict[str, Any]) -> Axes:
    """Stacked memory by part for full fine-tuning and LoRA, batch by batch, relative to full; in words how much it is.

    data["memory"]: [{"batch": int, "full": {part: bytes}, "LoRA": {part: bytes}}].
    """
    rows = data["memory"]
    for i, row in enumerate(rows):
        whole = sum(row["full"].values())
        for shift, way in (-0.21, "full"), (0.21, "LoRA"):
            bottom = 0.0
            for part, (colour, hatch) in PARTS.items():
                share = row[way][part] / whole
                ax.bar(i + shift, share, 0.38, bottom=bottom, color=colour, hatch=hatch, edgecolor="white",
                       label=part if i == 0 and way == "full" else None)
                bottom += share
            ax.annotate(f"{way}\n{bottom * whole / 1e9:.0f} GB", (i + shift, bottom), xytext=(0, 4), textcoords="offset points",
                        ha="center", fontsize=12)
    ax.set_ylim(0, 1.3)
    ax.set_xticks(range(len(rows)), [f"batch {row['batch']}" for row in rows])
    ax.grid(False, axis="x")
    ax.set_ylabel("memory in training, full fine-tuning = 1")
    ax.legend(loc="upper center", ncols=4, columnspacing=0.9, handlelength=1.4, handletextpad=0.5)
    return ax


def cost(data: dict[str, Any]) -> Figure:
    """What LoRA saves: time of a layer on the left, memory of a model on the right. data: "times", "memory", "model"."""
    with plt.rc_context(SLIDE | {"hatch.color": "white", "hatch.linewidth": 0.8}):
        figure, axes = plt.subplots(1, 2, figsize=(13.5, 5.6), layout="constrained")
        time_bars(axes[0], data)
        memory_bars(axes[1], data)
        axes[0].set_title("One layer: LoRA's time against full fine-tuning's", loc="left", fontsize=15)
        axes[1].set_title(data["model"], loc="left", fontsize=15)
    return figure
