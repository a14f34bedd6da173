"""The figures of lesson 10: five tests on LoRA and six listings, and the share of a model that LoRA trains against its size."""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

from .style import BLACK, BLUE, GREEN, GREY, ORANGE, SLIDE

MARKS = ((BLUE, "o", "-"), (ORANGE, "s", "--"), (GREEN, "^", "-."))


def ticks(data: dict[str, Any]) -> Figure:
    """Which of the five tests each listing passes; beside it what it trains, and its losses.

    data: {"rank", "size", "rows": [{"name", "ticks": {test: bool}, "numbers", "loss": (start, end), "unseen"}]}.
    """
    rows = data["rows"]
    tests = list(rows[0]["ticks"])
    grid = np.array([[row["ticks"][test] for test in tests] for row in rows], dtype=float)            # (rows, tests)
    with plt.rc_context(SLIDE):
        figure, ax = plt.subplots(figsize=(13.5, 0.68 * len(rows) + 1.7), layout="constrained")
        ax.imshow(grid, cmap=ListedColormap(["#f2c9b0", "#1f6fa8"]), vmin=0, vmax=1, aspect="auto", interpolation="nearest")
        for y, row in enumerate(rows):
            for x, test in enumerate(tests):
                ok = row["ticks"][test]
                ax.text(x, y, "✓" if ok else "✗", ha="center", va="center", fontsize=20, color="white" if ok else BLACK)
            start, end = row["loss"]
            for x, text in enumerate((f"{row['numbers']:,}", f"{_short(start)} → {_short(end)}", _short(row["unseen"]))):
                ax.text(len(tests) + (0, 1.25, 2.6)[x], y, text, ha="center", va="center",
                        fontweight="bold" if y == 0 else "normal")
        places = [*range(len(tests)), len(tests), len(tests) + 1.25, len(tests) + 2.6]
        heads = [test.replace(" at the start", "\nat the start") for test in tests]
        ax.set_xticks(places, [*heads, "numbers\ntrained", "training loss", "loss on\nnew data"])
        ax.xaxis.tick_top()
        ax.set_yticks(range(len(rows)), [row["name"] for row in rows])
        ax.get_yticklabels()[0].set_fontweight("bold")
        ax.set_xlim(-0.5, len(tests) + 3.15)
        ax.tick_params(length=0)
        ax.grid(False)
        ax.spines[:].set_visible(False)
        for line in range(1, len(rows)):
            ax.axhline(line - 0.5, color="white", linewidth=3)
        for line in range(1, len(tests)):
            ax.axvline(line - 0.5, color="white", linewidth=3)
        ax.set_title(f"Five tests of a LoRA of rank {data['rank']} on a {data['size']} × {data['size']} layer", loc="left",
                     pad=12, fontweight="bold")
    return figure


def _short(value: float) -> str:
    """A loss in few digits, never in powers of ten."""
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"


def shares(data: dict[str, Any]) -> Figure:
    """The share of a model's numbers that LoRA trains, by size, for several choices of matrices; and what was claimed.

    data: {"models": names, "shares": {choice: shares}, "claimed": shares}.
    """
    x = np.arange(len(data["models"]))
    with plt.rc_context(SLIDE):
        figure, ax = plt.subplots(figsize=(9, 4.6), layout="constrained")
        ax.plot(x, 100 * np.array(data["claimed"]), color=GREY, linestyle=(0, (2, 2)), marker="x",
                label="as claimed: always 0.14 %")
        for (name, values), (colour, marker, dash) in zip(data["shares"].items(), MARKS):
            ax.plot(x, 100 * np.array(values), color=colour, marker=marker, linestyle=dash, label=f"LoRA r = 8 on {name}")
        ax.set_yscale("log")
        ax.set_yticks([0.02, 0.05, 0.1, 0.2, 0.3], ["0.02 %", "0.05 %", "0.1 %", "0.2 %", "0.3 %"])
        ax.minorticks_off()
        ax.set_xticks(x, data["models"])
        ax.set_xlim(-0.2, len(x) - 0.8)
        ax.set_xlabel("model")
        ax.set_ylabel("share that trains")
        ax.set_title("The larger the model, the smaller LoRA's share", loc="left", fontweight="bold")
        ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure
