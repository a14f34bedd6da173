"""Figures: plain data in (a study's or report's to_dict()), matplotlib Axes out. The only file that imports matplotlib.

Every function draws into the Axes it is given and returns them, so a notebook can arrange them as it likes. Colours are the
Okabe-Ito set, told apart by colour-blind eyes, and each line also has its own marker or dash, so greyscale print works too.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, ScalarFormatter

BLUE, ORANGE, GREEN, PINK, GREY, BLACK = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#777777", "#222222"

STYLE: Any = {
    "font.size": 12, "axes.titlesize": 13, "axes.labelsize": 12, "legend.fontsize": 11, "axes.spines.top": False,
    "axes.spines.right": False, "axes.grid": True, "grid.color": "#e6e6e6", "grid.linewidth": 0.8, "lines.linewidth": 2.2,
    "lines.markersize": 7, "legend.frameon": False, "figure.dpi": 110, "savefig.dpi": 160, "axes.axisbelow": True,
    "svg.hashsalt": "minilora", "font.family": "DejaVu Sans",
}


def save(figure: Figure, path: Path) -> None:
    """Write a figure as path.png and path.svg, through temporary names, without dates, so equal data give equal files."""
    for suffix, metadata in ((".png", {"Software": None}), (".svg", {"Date": None, "Creator": None})):
        part = path.with_name(f".{path.name}{suffix}.part")
        with matplotlib.rc_context(STYLE):
            figure.savefig(part, format=suffix[1:], metadata=metadata, facecolor="white")
        part.replace(path.with_suffix(suffix))
    plt.close(figure)


def rank_axis(ax: Axes, ranks: Sequence[int], label: str = "LoRA rank r") -> None:
    """A logarithmic axis with the ranks themselves as its ticks."""
    ax.set_xscale("log", base=2)
    ax.set_xticks(list(ranks))
    ax.xaxis.set_major_formatter(ScalarFormatter())
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.set_xlabel(label)


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
        place = machine.get("gpu", f"{machine['cpu']}, {machine['threads']} threads")
        figure.suptitle(f"minilora against PyTorch + PEFT (below 1: minilora needs less)\n{place}", fontsize=15)
    return figure


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


def style(data: dict[str, Any]) -> Figure:
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


def adapter_map(data: dict[str, Any]) -> Figure:
    """An adapter's report: the effective rank of each module, layer by layer, and the spectra of all modules.

    A module belongs to the layer of the first number in its path; those without one come below the layers.
    """
    rows = data["modules"]
    place = {name: next((int(part) for part in name.split(".") if part.isdigit()), -1) for name in rows}
    kind = {name: ".".join(part for part in name.split(".")[-2:] if not part.isdigit()) for name in rows}
    layers, kinds = sorted(set(place.values())), list(dict.fromkeys(kind.values()))
    grid = np.full((len(layers), len(kinds)), np.nan)
    for name, row in rows.items():
        grid[layers.index(place[name]), kinds.index(kind[name])] = row["effective_rank"]
    with plt.rc_context(STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(13, 5.6), layout="constrained")
        image = left.imshow(np.ma.masked_invalid(grid), aspect="auto", cmap="cividis", origin="lower", interpolation="nearest")
        left.grid(False)
        left.set_xticks(range(len(kinds)), [name.rpartition(".")[2] for name in kinds], rotation=35, ha="right")
        step = max(1, len(layers) // 16)
        left.set_yticks(range(0, len(layers), step), ["none" if n < 0 else str(n) for n in layers[::step]])
        left.set_ylabel("layer")
        left.set_title("a   effective rank of ΔW", loc="left")
        figure.colorbar(image, ax=left)
        colours = plt.get_cmap("viridis")(np.linspace(0.0, 0.9, max(2, len(kinds))))
        dashes = ("-", "--", "-.", ":")
        for i, each in enumerate(kinds):
            for j, name in enumerate(n for n in rows if kind[n] == each):
                values = np.asarray(rows[name]["singular_values"])
                if values[0] > 0:
                    right.plot(np.arange(1, len(values) + 1), np.maximum(values / values[0], 1e-8), color=colours[i],
                               linestyle=dashes[i % 4], alpha=0.6, linewidth=1.2,
                               label=each.rpartition(".")[2] if j == 0 else None)
        right.set_yscale("log")
        right.set_xlabel("i")
        right.set_ylabel("σᵢ / σ₁")
        right.set_title("b   spectra of ΔW, one line a module", loc="left")
        if right.get_legend_handles_labels()[0]:
            right.legend(ncols=2)
    return figure
