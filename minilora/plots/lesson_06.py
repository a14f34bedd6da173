"""The figures of lesson 06: what sums of adapters do to two tasks, and what half precision leaves of a merged update."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from .analysis import MARKS
from .style import BLACK, BLUE, GREY, ORANGE, SLIDE


def composed(rows: Mapping[str, Sequence[float]], tasks: Sequence[str], base: Sequence[float]) -> Figure:
    """Name of a combination -> its losses on two tasks, as pairs of bars, with the frozen base's losses as lines."""
    with plt.rc_context(SLIDE):
        figure, ax = plt.subplots(figsize=(14, 5.8), layout="constrained")
        for i, (task, colour, hatch, dash) in enumerate(zip(tasks, (BLUE, ORANGE), ("", "//"), ("-", (0, (4, 2))))):
            values = [losses[i] for losses in rows.values()]
            bars = ax.bar(np.arange(len(rows)) + 0.4 * (i - 0.5), values, 0.38, color=colour, hatch=hatch, edgecolor="white",
                          label=f"loss on {task}")
            ax.bar_label(bars, [f"{value:.2f}" for value in values], padding=4, fontsize=12,
                         bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8})
            ax.axhline(base[i], color=colour, linestyle=dash, linewidth=1.6, label=f"frozen base on {task}", zorder=0.5)
        ax.set_xticks(range(len(rows)), list(rows))
        ax.set_ylim(0, 1.3 * max(max(losses) for losses in rows.values()))
        ax.grid(False, axis="x")
        ax.set_ylabel("validation loss, nats per byte")
        ax.set_title("Two adapters on one base: what becomes of both tasks", loc="left")
        ax.legend(ncols=4, loc="upper center", fontsize=12)
    return figure


def half_precision(data: dict[str, Any]) -> Figure:
    """What survives of a merge. data: "relative", the sizes ‖ΔW‖/‖W‖; "share", format -> share of ΔW that survives at each;
    "parts", in how many equal parts one update was merged; "losses", format -> loss after it; "base" and "adapter", losses.
    """
    with plt.rc_context(SLIDE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(15, 5.6), layout="constrained")
        styles = {name: {"color": colour, "marker": marker, "linestyle": dash, "label": name}
                  for name, (colour, marker, dash) in zip(data["share"], MARKS)}
        for name, values in data["share"].items():
            left.plot(data["relative"], values, **styles[name])
        left.set_xscale("log")
        left.set_ylim(-0.05, 1.3)
        left.set_xlabel("size of the update, ‖ΔW‖ / ‖W‖")
        left.set_ylabel("share of ΔW that survives the merge")
        left.set_title("a   one merge, rounded to each format", loc="left")
        left.legend(loc="upper center", ncols=4, columnspacing=1.0, handlelength=1.8)
        for name, values in data["losses"].items():
            right.plot(data["parts"], values, **styles[name])
        right.axhline(data["base"], color=BLACK, linestyle=(0, (4, 2)), linewidth=1.6, label="frozen base")
        right.axhline(data["adapter"], color=GREY, linestyle=(0, (1, 1.2)), linewidth=2, label="adapter, not merged")
        right.set_xscale("log")
        right.set_xlabel("merged in so many equal parts")
        right.set_ylabel("loss on Python")
        right.set_title("b   one update, merged little by little", loc="left")
        right.legend(loc="center left")
    return figure
