"""The figures of lesson 04: ranks with a known answer; on text, the loss against the rank and against the trained numbers."""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from .studies import planted_linear, planted_transformer, text_ranks
from .style import BLACK, BLUE, DASHED, GREEN, ORANGE, SLIDE


def known_ranks(linear: dict[str, Any], transformer: dict[str, Any]) -> Figure:
    """What studies/planted.py found, side by side: a layer on its optimum, a Transformer with its elbow."""
    with plt.rc_context(SLIDE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(14, 5.6), layout="constrained")
        planted_linear(left, linear).set_title("a   one layer: LoRA lies on the optimum", loc="center")
        planted_transformer(right, transformer).set_title("b   a Transformer: an elbow at the hidden rank", loc="center")
    return figure


def ranks_and_budgets(data: dict[str, Any]) -> Figure:
    """Validation loss against the rank, and the same runs against how many numbers they train. data: as for text_ranks."""
    with plt.rc_context(SLIDE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(14, 5.8), layout="constrained", sharey=True)
        text_ranks(left, data).set_title("a   the rank", loc="center")
        left.legend(loc="lower left")
        sizes = sorted({row["trainable"] for row in data["rows"]})
        for targets, colour, marker in (("q, v", BLUE, "o"), ("all linear", ORANGE, "s")):
            rows = [row for row in data["rows"] if row["targets"] == targets]
            right.errorbar([row["trainable"] for row in rows], [row["loss_mean"] for row in rows],
                           yerr=[row["loss_sd"] for row in rows], color=colour, marker=marker, capsize=4)
            for row in rows:
                sideways = {"xytext": (7, 6), "ha": "left"} if targets == "q, v" else {"xytext": (-8, -7), "ha": "right"}
                right.annotate(f"r = {row['rank']}", (row["trainable"], row["loss_mean"]), textcoords="offset points",
                               va="bottom" if targets == "q, v" else "top", fontsize=12, color=colour, **sideways)
        right.axhline(data["full"]["loss_mean"], color=GREEN, linestyle=(0, (6, 2)))
        right.axhline(data["base"]["loss"], color=BLACK, linestyle=DASHED)
        right.set_xscale("log", base=2)
        right.set_xticks(sizes)
        right.set_xlim(sizes[0] / 1.8, sizes[-1] * 1.4)
        right.xaxis.set_minor_locator(NullLocator())
        right.xaxis.set_major_formatter(FuncFormatter(lambda size, _: f"{size / 1024:g}k"))
        right.set_xlabel("trained numbers (1k = 1,024)")
        right.set_title("b   the same runs by what they cost", loc="center")
        low = min(data["full"]["loss_mean"], *(row["loss_mean"] for row in data["rows"]))
        left.set_ylim(low - 0.55 * (data["base"]["loss"] - low), None)
    return figure
