"""The figures of lesson 05: shared directions, LoRA beside full fine-tuning, learned against forgotten."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from .analysis import MARKS, ON_WHITE, intruder_curves, similarity_map
from .style import BLACK, BLUE, DASHED, GREEN, GREY, ORANGE, SLIDE, rank_axis


def shared_directions(data: Mapping[str, Mapping[str, dict[str, Any]]],
                      labels: Mapping[str, Sequence[str]] | None = None) -> Figure:
    """Module -> pair -> its `compare`: a row of heat maps for each module, and φ(n, n) of its pairs against chance.

    labels: pair -> what its two updates are called on the axes. Hatched cells are within chance (95 %).
    """
    pairs = list(next(iter(data.values())))
    with plt.rc_context(SLIDE):
        figure, axes = plt.subplots(len(data), len(pairs) + 1, figsize=(5.3 * (len(pairs) + 1), 4.5 * len(data)),
                                    layout="constrained", squeeze=False)
        for row, (module, grids) in zip(axes, data.items()):
            for ax, (pair, grid) in zip(row, grids.items()):
                similarity_map(ax, grid, "all", (labels or {}).get(pair, ("first", "second")), colour_bar=pair == pairs[-1])
                ax.set_title(f"{module}: {pair}", loc="left")
            for (pair, grid), (colour, marker, dash) in zip(grids.items(), MARKS):
                phi = np.diagonal(np.array(grid["phi"]))
                row[-1].plot(np.arange(1, len(phi) + 1), phi, color=colour, marker=marker, linestyle=dash, label=pair)
            n, k = max(max(grid["sizes"]) for grid in grids.values()), next(iter(grids.values()))["k"]
            row[-1].plot([1, n], [1 / k, n / k], color=BLACK, linestyle=DASHED, label="chance, n/k")
            row[-1].set_ylim(0, 1.03)
            row[-1].set_xlabel("n: number of directions")
            row[-1].set_ylabel("φ(n, n)")
            row[-1].set_title(f"{module}: against chance", loc="left")
            row[-1].legend()
        figure.suptitle("Which input directions do adapters share? (hatched: no more than chance)", fontsize=18)
    return figure


def beside_full(data: dict[str, Any]) -> Figure:
    """LoRA beside full fine-tuning. data: "spectra", name -> singular values of one module; "reports", name -> a dict
    with "modules" as `intruder_curves` takes it; "cut", {"ranks", "full": name -> losses of its ΔW cut to each rank,
    "lora": rank -> loss}.
    """
    with plt.rc_context(SLIDE):
        figure, axes = plt.subplots(1, 3, figsize=(18, 5.6), layout="constrained")
        for (name, values), (colour, marker, dash) in zip(data["spectra"].items(), MARKS):
            S = np.asarray(values) / max(values)
            axes[0].plot(np.arange(1, len(S) + 1), S, color=colour, marker=marker, linestyle=dash, label=name,
                         markevery=max(1, len(S) // 10))
        rank_axis(axes[0], [1, 2, 4, 8, 16, 32, 64], "i: number of the singular value")
        axes[0].set_ylabel("σᵢ / σ₁ of ΔW")
        axes[0].set_ylim(0, 1.35)
        axes[0].set_title("a   how many directions", loc="left")
        axes[0].legend(loc="upper right", ncols=2, fontsize=11)
        intruder_curves(axes[1], data["reports"])
        axes[1].legend(loc="upper left", fontsize=12, **ON_WHITE | {"framealpha": 1.0})
        looked = axes[1].get_ylim()[1]
        axes[1].set_ylim(-0.02 * looked, 1.6 * looked)
        axes[1].set_title("b   intruders, all modules", loc="left")
        cut = data["cut"]
        marks = dict(zip(data["spectra"], MARKS))                      # a run looks the same in every panel
        for name, losses in cut["full"].items():
            colour, marker, dash = marks[name]
            axes[2].plot(cut["ranks"], losses, color=colour, marker=marker, linestyle=dash, label=f"{name}, ΔW cut to rank r")
        axes[2].plot(list(cut["lora"]), list(cut["lora"].values()), color=BLUE, marker="o", markersize=11, linestyle="none",
                     label="LoRA, trained at rank r")
        axes[2].axhline(cut["base"], color=BLACK, linestyle=DASHED, linewidth=1.6, label="frozen base")
        rank_axis(axes[2], cut["ranks"], "rank r")
        axes[2].set_ylabel("validation loss on Python")
        axes[2].set_title("c   cut afterwards, or thin from the start", loc="left")
        low = min(*cut["lora"].values(), *(min(losses) for losses in cut["full"].values()))
        axes[2].set_ylim(low - 0.02, cut["base"] + 0.6 * (cut["base"] - low) + 1e-3)
        axes[2].legend(loc="upper right", fontsize=11)
    return figure


def learned_and_forgotten(data: dict[str, Any]) -> Figure:
    """Loss on the new text against loss on the old one. data: "base" (new, old); "lines" and "points", name -> list of
    (new, old) or one of them; "factors", what is written at the points of the lines.
    """
    with plt.rc_context(SLIDE):
        figure, ax = plt.subplots(figsize=(10.5, 6.2), layout="constrained")
        for (name, places), colour, marker, dash, shift in zip(data["lines"].items(), (BLUE, ORANGE), "os", ("-", DASHED),
                                                               ((-34, -6), (2, -22))):
            ax.plot(*zip(*places), color=colour, marker=marker, linestyle=dash, label=name)
            for factor, place in zip(data["factors"], places):
                if factor < 0.8:                                       # above it they lie too near each other
                    ax.annotate(f"{factor:g}", place, xytext=shift, textcoords="offset points", color=colour)
        for (name, place), colour, marker in zip(data["points"].items(), (GREEN, BLACK), "^D"):
            ax.plot(*place, color=colour, marker=marker, markersize=12, linestyle="none", label=name)
        ax.plot(*data["base"], color=GREY, marker="*", markersize=18, linestyle="none", label="frozen base")
        ax.margins(0.09)
        ax.set_xlabel("loss on Python (learned: to the left)")
        ax.set_ylabel("loss on prose (forgotten: up)")
        ax.set_title("What the update costs, and what it brings", loc="left")
        ax.legend(loc="best")
    return figure
