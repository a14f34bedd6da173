"""Figures of the studies on real models: losses here and in PyTorch + PEFT, metrics, answers in a form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .style import BLUE, GREY, ORANGE, STYLE


def smoothed(values: Sequence[float], width: int) -> np.ndarray:           # (n,) -> (n - width + 1,)
    """The running mean."""
    return np.convolve(values, np.ones(width) / width, mode="valid")


def loss_curves(ax: Axes, curves: dict[str, Sequence[float]]) -> Axes:
    """Training losses, as running means over a twentieth of the run; the first is drawn broad, so that equal ones show."""
    styles: list[Any] = [{"color": BLUE, "linewidth": 4.5, "alpha": 0.55}, {"color": ORANGE, "linestyle": (0, (4, 2))}]
    for (name, losses), style in zip(curves.items(), styles):
        width = max(1, len(losses) // 20)
        ax.plot(np.arange(width, len(losses) + 1), smoothed(losses, width), label=name, **style)
    ax.set_xlabel("update")
    ax.set_ylabel("training loss, nats")
    ax.legend()
    return ax


def twins(data: dict[str, Any], title: str) -> Figure:
    """Fine-tuning here and in PyTorch + PEFT: the loss curves of each row, and the metric before, here and there."""
    rows = data["rows"]
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, len(rows) + 1, figsize=(5.2 * (len(rows) + 1), 4.8), layout="constrained")
        for ax, row, letter in zip(axes, rows, "abc"):
            curves = {"minilora": row["minilora"]["losses"]}
            if "torch" in row:
                curves["PyTorch + PEFT"] = row["torch"]["losses"]
            loss_curves(ax, curves)
            agreement = f": {row['agreement']:.1%} of predictions equal" if "agreement" in row else ""
            ax.set_title(f"{letter}   {row['name']}{agreement}", loc="left")
        ax, metric = axes[-1], rows[0]["metric"]
        key = {"accuracy": "accuracy", "entity F1": "f1"}[metric]
        bars = [("before", GREY, "", [row["before"] for row in rows]),
                ("minilora", BLUE, "", [row["minilora"]["metrics"][key] for row in rows])]
        if all("torch" in row for row in rows):
            bars.append(("PyTorch + PEFT", ORANGE, "//", [row["torch"]["metrics"][key] for row in rows]))
        for i, (name, colour, hatch, values) in enumerate(bars):
            places = [j + (i - (len(bars) - 1) / 2) * 0.26 for j in range(len(rows))]
            drawn = ax.bar(places, values, 0.24, color=colour, label=name, hatch=hatch, edgecolor="white")
            ax.bar_label(drawn, [f"{value:.3f}" for value in values], padding=3, fontsize=10)
        ax.set_xticks(range(len(rows)), [row["name"] for row in rows])
        ax.set_ylim(0, 1.25 * max(max(values) for *_, values in bars))
        ax.grid(False, axis="x")
        ax.set_ylabel(metric)
        ax.set_title(f"{'abcd'[len(rows)]}   held out", loc="left")
        ax.legend(ncols=len(bars), loc="upper center", fontsize=9, columnspacing=1.0, handlelength=1.2)
        figure.suptitle(title, fontsize=16, fontweight="bold")
    return figure


def answers(data: dict[str, Any]) -> Figure:
    """A format learned: the training loss with the held-out loss before and after, and the share of answers in the form."""
    with plt.rc_context(STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.8), layout="constrained", width_ratios=(3, 2))
        loss_curves(left, {"training": data["losses"]})
        ends = [data[when]["loss"] for when in ("before", "after")]
        left.plot([0, data["steps"]], ends, "s", color=ORANGE, markersize=9, label="held out, before and after")
        left.set_ylim(0, None)
        left.set_ylabel("loss, nats a token")
        left.set_title(f"a   {data['train']} names to learn from, {data['held_out']} held out", loc="left")
        left.legend()
        bars = right.bar(["before", "after"], [data[when]["in_form"] for when in ("before", "after")], 0.5, color=[GREY, BLUE])
        right.bar_label(bars, [f"{data[when]['in_form']:.0%}" for when in ("before", "after")], padding=3, fontsize=14)
        right.set_ylim(0, 1.15)
        right.grid(False, axis="x")
        right.set_ylabel(f"share of {len(data['samples'])} greedy answers")
        right.set_title("b   answers in the form of the pairs", loc="left")
        figure.suptitle("SmolLM2-135M with LoRA: answer in JSON", fontsize=16, fontweight="bold")
    return figure


def file_tools(data: dict[str, Any]) -> Figure:
    """The time and the memory of each tool on files, with the limits of the study's claims."""
    rows = data["rows"]
    names = [f"{row['tool']}\n({'7B-shaped adapter' if row['on'] == 'adapter' else row['on']})" for row in rows]
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, 2, figsize=(13, 0.75 * len(rows) + 1.6), layout="constrained", sharey=True)
        for ax, key, unit, letter in zip(axes, ("seconds", "peak_mb"), ("seconds", "peak memory, MB"), "ab"):
            values = [row[key] for row in rows]
            theirs = ["transformers" in row["tool"] for row in rows]
            bars = ax.barh(range(len(rows)), values, color=[ORANGE if other else BLUE for other in theirs],
                           hatch=["//" if other else "" for other in theirs], edgecolor="white")
            ax.bar_label(bars, [f"{value:,.1f}" if key == "seconds" else f"{value:,.0f}" for value in values], padding=4)
            ax.set_xlim(0, 1.15 * max(values))
            ax.set_xlabel(unit)
            ax.set_title(f"{letter}   {unit}", loc="left")
            ax.grid(False, axis="y")
        axes[0].set_yticks(range(len(rows)), names)
        axes[0].invert_yaxis()
    return figure
