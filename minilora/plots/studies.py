"""The figures of the main job and of the benchmark."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .style import BLACK, BLUE, GREEN, GREY, ORANGE, STYLE, rank_axis


def planted_linear(ax: Axes, data: dict[str, Any]) -> Axes:
    """Loss of a linear layer against rank, on the Eckart-Young optimum."""
    ranks = [row["rank"] for row in data["rows"]]
    ax.plot(ranks, [row["optimum"] for row in data["rows"]], color=BLACK, linestyle=(0, (4, 2)), label="Eckart-Young optimum")
    ax.plot(ranks, [row["loss"] for row in data["rows"]], "o", color=BLUE, label="LoRA, trained")
    ax.set_yscale("log")
    ax.set_xticks([1, 4, 8, 12, 16])
    ax.set_xlabel("LoRA rank r")
    ax.set_ylabel("squared error ‖sBA − ΔW*‖²")
    ax.set_title("One layer: LoRA reaches the optimum")
    ax.legend()
    return ax


def planted_transformer(ax: Axes, data: dict[str, Any]) -> Axes:
    """KL to a teacher whose hidden update has a known rank."""
    ranks = [row["rank"] for row in data["rows"]]
    ax.axvline(data["planted_rank"], color=GREY, linestyle=":", label=f"rank of the hidden update, {data['planted_rank']}")
    ax.axhline(data["base"], color=BLACK, linestyle=(0, (4, 2)), label="frozen base")
    for seed in range(len(data["rows"][0]["kl"])):
        values = [row["kl"][seed] for row in data["rows"]]
        ax.plot(ranks, values, "o-", color=ORANGE, alpha=0.9, label="LoRA on q, v (each seed)" if seed == 0 else None)
    ax.set_yscale("log")
    rank_axis(ax, ranks)
    ax.set_ylabel("KL(teacher ‖ student), nats per token")
    ax.set_title("A Transformer: the elbow is at the planted rank")
    ax.legend(loc="lower left")
    return ax


def text_ranks(ax: Axes, data: dict[str, Any]) -> Axes:
    """Validation loss on real text against rank, with the spread over seeds, full fine-tuning and the frozen base."""
    styles = {"q, v": (BLUE, "o"), "all linear": (ORANGE, "s")}
    for targets, (colour, marker) in styles.items():
        rows = [row for row in data["rows"] if row["targets"] == targets]
        if rows:
            mean, sd = [row["loss_mean"] for row in rows], [row["loss_sd"] for row in rows]
            ax.errorbar([row["rank"] for row in rows], mean, yerr=sd, color=colour, marker=marker, capsize=4,
                        label=f"LoRA on {targets}")
    full = data["full"]
    ax.axhline(full["loss_mean"], color=GREEN, linestyle=(0, (6, 2)), label="full fine-tuning")
    ax.axhspan(full["loss_mean"] - full["loss_sd"], full["loss_mean"] + full["loss_sd"], color=GREEN, alpha=0.15, linewidth=0)
    ax.axhline(data["base"]["loss"], color=BLACK, linestyle=(0, (4, 2)), label="frozen base")
    rank_axis(ax, sorted({row["rank"] for row in data["rows"]}))
    ax.set_ylabel("validation loss, nats per byte")
    ax.set_title(f"{data['from']} to {data['to']}, {data['seeds']} seeds")
    ax.legend(loc="upper right", bbox_to_anchor=(1.0, 0.94))       # below the line of the frozen base
    return ax


def rank_quality(data: dict[str, Any]) -> Figure:
    """The main job's figure: what is known exactly, what is planted, and what real text shows."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, 3, figsize=(16, 5.4), layout="constrained")
        planted_linear(axes[0], data["planted_linear"])
        planted_transformer(axes[1], data["planted_transformer"])
        text_ranks(axes[2], data["text"])
        for ax, letter in zip(axes, "abc", strict=True):
            title = ax.get_title()
            ax.set_title("")
            ax.set_title(f"{letter}   {title}", loc="left")
        figure.suptitle("How does quality depend on LoRA's rank?", fontsize=16, fontweight="bold")
    return figure


def ratio_bars(ax: Axes, names: Sequence[str], ratios: Sequence[float], what: str) -> Axes:
    """Horizontal bars of minilora / PyTorch, one a case from top to bottom, with the line at 1. Hatched where above it."""
    places = range(len(names))
    above = [ratio > 1 for ratio in ratios]
    bars = ax.barh(places, ratios, 0.62, color=[ORANGE if more else BLUE for more in above], edgecolor="white")
    for bar, more in zip(bars, above):
        bar.set_hatch("//" if more else "")
    ax.axvline(1.0, color=BLACK, linestyle=(0, (4, 2)))
    ax.bar_label(bars, [f"{ratio:.2f}" for ratio in ratios], padding=5, fontsize=14,
                 bbox={"facecolor": "white", "edgecolor": "none", "pad": 1})
    ax.set_yticks(places, names)
    ax.set_ylim(len(names) - 0.4, -0.6)
    ax.grid(False, axis="y")
    ax.set_xlim(0, 1.18 * max(1.0, *ratios))
    ax.set_xlabel(f"{what}: minilora / PyTorch + PEFT")
    return ax


def bench(data: dict[str, Any]) -> Figure:
    """The benchmark's figure: ratios of time and of memory, case by case. Below 1, minilora needs less."""
    names, machine = list(data["cases"]), data["machine"]
    with plt.rc_context(STYLE | {"font.size": 14, "axes.labelsize": 14}):
        figure, axes = plt.subplots(1, 2, figsize=(13, 2.2 + 0.5 * len(names)), layout="constrained", sharey=True)
        ratio_bars(axes[0], names, [case["ratio"] for case in data["cases"].values()], "median step time")
        ratio_bars(axes[1], names, [case["memory_ratio"] for case in data["cases"].values()], "peak memory")
        for ax in axes:
            ax.tick_params(axis="y", length=0)
        mkl = f", products by MKL {machine['mkl']}" if "mkl" in machine else ""
        place = machine.get("gpu", f"{machine['cpu']}, {machine['threads']} threads{mkl}")
        figure.suptitle(f"minilora against PyTorch + PEFT (below 1: minilora needs less)\n{place}", fontsize=15)
    return figure
