"""Figures of the studies on text: choices, learning rates, lengths of text, starts."""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .analysis import similarity_map
from .style import BLACK, BLUE, DASHED, GREEN, GREY, ORANGE, PINK, STYLE, rank_axis

MARKERS = "osD^vPX"


def shades(count: int) -> np.ndarray:
    """Colours from dark to light, of equal steps also in greyscale: for ranks and other ordered things."""
    return plt.get_cmap("viridis")(np.linspace(0.0, 0.85, max(2, count)))


def choices(ax: Axes, rows: list[dict[str, Any]], name: str) -> Axes:
    """Mean and spread over seeds of each row, one below the other; rows of several kinds of matrices are filled."""
    for i, row in enumerate(rows):
        many = row.get("kinds", 1) > 1
        ax.errorbar(row["loss_mean"], i, xerr=row["loss_sd"], color=ORANGE if many else BLUE, marker="s" if many else "o",
                    markerfacecolor=ORANGE if many else "white", capsize=4, linestyle="none")
    ax.set_yticks(range(len(rows)), [f"{row[name]}  (r = {row['rank']})" for row in rows])
    ax.set_ylim(len(rows) - 0.4, -0.6)
    return ax


def which_matrices(data: dict[str, Any]) -> Figure:
    """The choices at one budget, between the frozen base and full fine-tuning."""
    with plt.rc_context(STYLE):
        figure, ax = plt.subplots(figsize=(11, 6), layout="constrained")
        choices(ax, data["rows"], "matrices")
        ax.axvline(data["full"]["loss_mean"], color=GREEN, linestyle=(0, (6, 2)), label="full fine-tuning")
        ax.axvline(data["text"]["base"]["loss"], color=BLACK, linestyle=DASHED, label="frozen base")
        ax.plot([], [], "o", color=BLUE, markerfacecolor="white", label="one kind of matrix")
        ax.plot([], [], "s", color=ORANGE, label="several kinds")
        ax.set_xlabel("validation loss, nats per byte (lower is better)")
        ax.set_title(f"Which matrices, at about {data['rows'][0]['trainable']:,} trained numbers? {data['text']['from']} to "
                     f"{data['text']['to']}, {data['text']['seeds']} seeds", loc="left")
        figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def rate_curves(ax: Axes, curves: list[dict[str, Any]], full: dict[str, Any]) -> Axes:
    """Loss against learning rate, one line a rank, its best rate marked; full fine-tuning beside them."""
    for colour, marker, curve in zip(shades(len(curves)), MARKERS, curves):
        points = zip(curve["rates"], curve["loss_mean"], curve["loss_sd"])
        rates, means, sds = zip(*[point for point in points if None not in point])             # None where a seed diverged
        ax.errorbar(rates, means, yerr=sds, color=colour, marker=marker, capsize=3, label=f"LoRA, r = {curve['rank']}")
        ax.plot(curve["fitted_rate"], curve["best_loss"], marker="|", markersize=22, markeredgewidth=3, color=colour)
    known = [(lr, mean) for lr, mean in zip(full["rates"], full["loss_mean"]) if mean is not None]
    ax.plot(*zip(*known), color=BLACK, linestyle=DASHED, marker="x", label="full fine-tuning")
    ax.set_xscale("log")
    ax.set_xlabel("learning rate")
    ax.set_ylabel("validation loss, nats per byte")
    return ax


def rank_lr(data: dict[str, Any]) -> Figure:
    """Learning rate against loss under both scales."""
    policies = list(dict.fromkeys(curve["policy"] for curve in data["curves"]))
    titles = {"alpha / r": "s = α/r", "alpha / sqrt(r)": "s = α/√r (rsLoRA)"}
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, 2, figsize=(14, 5.6), layout="constrained", sharey=True)
        for ax, policy, letter in zip(axes, policies, "ab"):
            rate_curves(ax, [curve for curve in data["curves"] if curve["policy"] == policy], data["full"])
            ax.set_title(f"{letter}   {titles[policy]}, α = {data['alpha'][policy]:.3g}", loc="left")
        low = min(curve["best_loss"] for curve in [*data["curves"], data["full"]])
        axes[0].set_ylim(low - 0.03, max(data["text"]["base"]["loss"], low + 0.1) + 0.05)
        axes[0].legend()
        axes[1].set_ylabel("")
        figure.suptitle("Does the best learning rate depend on the rank? (the bar marks each best rate)", fontsize=15)
    return figure


def capacity(data: dict[str, Any]) -> Figure:
    """Training loss against rank, one line a length of text, each with full fine-tuning's level."""
    with plt.rc_context(STYLE):
        figure, ax = plt.subplots(figsize=(11, 6), layout="constrained")
        ranks = [row["rank"] for row in data["groups"][0]["rows"]]
        for colour, marker, group in zip(shades(len(data["groups"])), MARKERS, data["groups"]):
            mean, sd = ([row[key] for row in group["rows"]] for key in ("loss_mean", "loss_sd"))
            ax.errorbar(ranks, mean, yerr=sd, color=colour, marker=marker, capsize=4, label=f"{group['bytes']:,} bytes")
            ax.axhline(group["full"]["loss_mean"], color=colour, linestyle=DASHED, linewidth=1.6)
        ax.plot([], [], color=GREY, linestyle=DASHED, label="full fine-tuning on as many")
        rank_axis(ax, ranks, "LoRA rank r (all linear layers)")
        ax.set_ylabel("training loss, nats per byte")
        ax.set_title(f"How much text can a rank hold? {data['text']['to']}, {data['text']['steps']} steps, "
                     f"{data['text']['seeds']} seeds", loc="left")
        ax.legend()
    return figure


def init(data: dict[str, Any]) -> Figure:
    """The losses of the first steps from every start, and where they end on new text."""
    rows, colours = data["rows"], [BLACK, BLUE, GREEN, ORANGE, PINK, "#56B4E9", "#E69F00"]
    styles = ["-", DASHED, "-.", "-", ":", DASHED, "-."]
    with plt.rc_context(STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(14, 5.6), layout="constrained", width_ratios=(3, 2))
        low = min(min(row["curve"]) for row in rows)
        for row, colour, style in zip(rows, colours, styles):
            above = ", above the picture" if min(row["curve"][1:]) > -0.6 * low else ""
            left.plot(np.arange(1, len(row["curve"]) + 1), row["curve"], color=colour, linestyle=style,
                      label=f"{row['start']} (rate {row['lr']:g}{above})")
        left.axhline(0.0, color=GREY, linestyle=(0, (1, 1)), label="frozen base")
        left.set_xlabel("step")
        left.set_ylabel("loss minus the base's, nats per byte")
        left.set_title("a   the first steps, each start at its best rate", loc="left")
        left.set_ylim(1.08 * low, -0.6 * low)
        figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=4)
        for i, (row, colour) in enumerate(zip(rows, colours)):
            right.errorbar(row["loss_mean"], i, xerr=row["loss_sd"], color=colour, marker="o", capsize=4)
        right.set_yticks(range(len(rows)), [row["start"] for row in rows])
        right.set_ylim(len(rows) - 0.4, -0.6)
        right.set_xlabel(f"validation loss after {data['text']['steps']} steps")
        right.set_title("b   where they end", loc="left")
    return figure


def subspaces(data: dict[str, Any]) -> Figure:
    """Heat maps of φ for each module and pair in the paper's layout, and the lines against chance."""
    modules = list(data["grids"])
    pairs = list(data["grids"][modules[0]])
    labels = {"r = 8 in r = 64": ("r = 8", "r = 64"), "two seeds, r = 64": ("seed 0", "seed 1"),
              "random": ("random 1", "random 2")}
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(len(modules), 4, figsize=(19, 4.6 * len(modules)), layout="constrained", squeeze=False)
        for row, module in zip(axes, modules):
            kind = module.rpartition(".")[2]
            for ax, pair in zip(row, pairs):
                grid = data["grids"][module][pair]
                similarity_map(ax, grid, "all", labels[pair], colour_bar=pair == pairs[-1])
                ax.set_title(f"{kind}: {pair}", loc="left")
            for pair, colour, marker in zip(pairs, (BLUE, ORANGE, GREY), "os^"):
                phi = np.array(data["grids"][module][pair]["phi"])
                n = np.arange(1, min(phi.shape) + 1)
                row[3].plot(n, np.diagonal(phi), color=colour, marker=marker, markevery=max(1, len(n) // 8), label=pair)
            row[3].plot([1, 64], [1 / grid["k"], 64 / grid["k"]], color=BLACK, linestyle=DASHED, label="chance, n/k")
            row[3].set_ylim(0, 1.03)
            row[3].set_xlabel("n: number of directions")
            row[3].set_ylabel("φ(n, n)")
            row[3].legend()
        figure.suptitle(f"Which input directions do adapters share? d_model {data['text']['model']['d_model']}, last layer; "
                        "hatched: no more than chance (95 %)", fontsize=16)
    return figure


def amplification(data: dict[str, Any]) -> Figure:
    """Table 7 as bars: what W has in the directions of ΔW, in its own top ones and in random ones; and the factor."""
    rows = data["rows"]
    names = [f"{row['module'].removesuffix('_proj')}, r = {row['rank']}" for row in rows]
    bars = [("projection_top", GREEN, "", "W's own top directions"), ("projection", BLUE, "//", "ΔW's directions"),
            ("projection_random", GREY, "..", "random directions")]
    with plt.rc_context(STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(14, 5.4), layout="constrained", width_ratios=(3, 2))
        for i, (key, colour, hatch, label) in enumerate(bars):
            x = np.arange(len(rows)) + 0.27 * (i - 1)
            left.bar(x, [np.mean(row[key]) for row in rows], 0.25, yerr=[np.std(row[key]) for row in rows], color=colour,
                     hatch=hatch, edgecolor="white", label=label, capsize=3)
        left.set_yscale("log")
        left.set_xticks(range(len(rows)), names)
        left.set_ylabel("‖UᵀWVᵀ‖, what W has there")
        left.set_title("a   how strong W is in the directions of …", loc="left")
        low, high = left.get_ylim()
        left.set_ylim(low, high * (high / low) ** 0.3)
        left.legend(ncols=3, loc="upper right", fontsize=10)
        for place, row in enumerate(rows):
            spread = np.linspace(-0.15, 0.15, len(row["amplification"]))
            right.bar(place, np.mean(row["amplification"]), 0.6, color=BLUE, alpha=0.85)
            right.plot(place + spread, row["amplification"], ".", color=BLACK, label=None if place else "each layer and seed")
        right.axhline(1.0, color=GREY, linewidth=1)
        right.set_xticks(range(len(rows)), names)
        right.set_ylabel("amplification ‖ΔW‖ / ‖UᵀWVᵀ‖")
        right.set_title("b   how much ΔW amplifies its directions", loc="left")
        right.legend()
        for ax in (left, right):
            ax.grid(False, axis="x")
    return figure


def spectrum(data: dict[str, Any]) -> Figure:
    """Spectra of ΔW, intruders against rank, and what is learned against what is forgotten; full fine-tuning in black."""
    rows = data["rows"]
    ranks = sorted({row["rank"] for row in rows} - {0})
    colours = dict(zip(ranks, shades(len(ranks)))) | {0: BLACK}
    marks = dict(zip(ranks, MARKERS)) | {0: "x"}
    name = {r: f"LoRA, r = {r}" for r in ranks} | {0: "full fine-tuning"}
    best = {r: min((row for row in rows if row["rank"] == r), key=lambda row: row["loss_mean"]) for r in (*ranks, 0)}
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, 3, figsize=(18, 5.6), layout="constrained")
        for r, row in best.items():
            values = np.maximum(row["spectrum"], 1e-4)
            axes[0].plot(np.arange(1, len(values) + 1), values, color=colours[r], marker=marks[r],
                         markevery=max(1, len(values) // 10), linestyle="-" if r else DASHED, label=name[r])
        axes[0].set_xscale("log", base=2)
        axes[0].set_yscale("log")
        axes[0].xaxis.set_major_formatter("{x:g}")
        axes[0].set_xlabel("i: number of the singular value")
        axes[0].set_ylabel("σᵢ / σ₁ of ΔW")
        axes[0].set_title(f"a   spectrum ({data['drawn']}, last layer)", loc="left")
        axes[0].legend(loc="lower left")
        for i, (epsilon, colour) in enumerate(zip(data["thresholds"], shades(len(data["thresholds"])))):
            counts = [best[r]["intruders"][i] for r in ranks]
            axes[1].plot(ranks, counts, color=colour, marker=MARKERS[i], label=f"ε = {epsilon:g}")
            axes[1].axhline(best[0]["intruders"][i], color=colour, linestyle=DASHED, linewidth=1.6)
        axes[1].plot([], [], color=GREY, linestyle=DASHED, label="full fine-tuning")
        rank_axis(axes[1], ranks)
        axes[1].set_ylabel(f"intruders among {best[0]['directions']} directions")
        axes[1].set_ylim(top=1.3 * best[0]["directions"])
        axes[1].set_title("b   intruder dimensions, best rates", loc="left")
        axes[1].legend(loc="upper left", ncols=3)
        base = data["text"]["base"]
        for r in (*ranks, 0):
            mine = [row for row in rows if row["rank"] == r and row["loss_mean"] < base["loss"]]
            axes[2].errorbar([row["loss_mean"] for row in mine], [row["source_loss_mean"] for row in mine],
                             xerr=[row["loss_sd"] for row in mine], yerr=[row["source_loss_sd"] for row in mine],
                             color=colours[r], marker=marks[r], linestyle="-" if r else DASHED, label=name[r])
            for row in mine[-1:]:
                axes[2].annotate(f"{row['lr']:g}", (row["loss_mean"], row["source_loss_mean"]), fontsize=9,
                                 xytext=(5, 4), textcoords="offset points", color=GREY)
        axes[2].plot(base["loss"], base["source_loss"], marker="*", markersize=15, color=GREEN, linestyle="none",
                     label="frozen base")
        axes[2].set_xlabel("loss on the target (learned: to the left)")
        axes[2].set_ylabel("loss on the source (forgotten: up)")
        diverged = sum(row["loss_mean"] >= base["loss"] for row in rows)
        note = "lines join learning rates" + (f"\n(without {diverged} that ended worse than the base)" if diverged else "")
        axes[2].set_title("c   learned against forgotten", loc="left")
        axes[2].legend(fontsize=9.5, title=note, title_fontsize=9.5, alignment="left")
        figure.suptitle(f"Full fine-tuning's ΔW beside LoRA's: {data['text']['from']} to {data['text']['to']}", fontsize=16)
    return figure


def real_model(data: dict[str, Any]) -> Figure:
    """The same measures on a real model: choices, shared directions, what W has in ΔW's directions, spectra."""
    found = data["updates"]
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(2, 2, figsize=(15, 10.5), layout="constrained")
        choices(axes[0, 0], data["matrices"], "matrices")
        axes[0, 0].set_xlabel("held-out loss, nats (lower is better)")
        axes[0, 0].set_title("a   one budget, on which matrices?", loc="left")
        for module, dash in zip(data["grids"], ("-", DASHED)):
            for (pair, grid), colour, marker in zip(data["grids"][module].items(), (BLUE, ORANGE, GREY), "os^"):
                phi, kind = np.diagonal(np.array(grid["phi"])), module.rpartition(".")[2].removesuffix("_proj")
                axes[0, 1].plot(np.arange(1, len(phi) + 1), phi, color=colour, marker=marker, linestyle=dash,
                                markevery=max(1, len(phi) // 8), label=f"{kind}: {pair}")
        axes[0, 1].plot([1, 64], [1 / grid["k"], 64 / grid["k"]], color=BLACK, linestyle=(0, (1, 1)), label="chance, n/k")
        axes[0, 1].set_ylim(0, 1.03)
        axes[0, 1].set_xlabel("n: number of directions")
        axes[0, 1].set_ylabel("φ(n, n)")
        axes[0, 1].set_title("b   shared input directions, last layer", loc="left")
        axes[0, 1].legend(fontsize=10)
        rows = [(f"{kind.removesuffix('_proj')}, {r}", values) for kind, by_rank in found["amplification"].items()
                for r, values in by_rank.items()]
        bars = [("projection_top", GREEN, "", "W's own top directions"), ("projection", BLUE, "//", "ΔW's directions"),
                ("projection_random", GREY, "..", "random directions")]
        for i, (key, colour, hatch, label) in enumerate(bars):
            axes[1, 0].bar(np.arange(len(rows)) + 0.27 * (i - 1), [values[key] for _, values in rows], 0.25, color=colour,
                           hatch=hatch, edgecolor="white", label=label)
        axes[1, 0].set_yscale("log")
        low, high = axes[1, 0].get_ylim()
        axes[1, 0].set_ylim(low, high * (high / low) ** 0.3)
        axes[1, 0].set_xticks(range(len(rows)), [name for name, _ in rows])
        axes[1, 0].set_ylabel("‖UᵀWVᵀ‖, what W has there")
        axes[1, 0].set_title("c   how strong W is in the directions of …", loc="left")
        axes[1, 0].legend(ncols=3, loc="upper right", fontsize=10)
        axes[1, 0].grid(False, axis="x")
        colours = [*shades(len(found["spectra"]) - 1), BLACK]
        for (name, values), colour, marker in zip(found["spectra"].items(), colours, "osDx"):
            axes[1, 1].plot(np.arange(1, len(values) + 1), np.maximum(values, 1e-4), color=colour, marker=marker,
                            markevery=max(1, len(values) // 10), linestyle=DASHED if name == "full" else "-",
                            label="full fine-tuning" if name == "full" else f"LoRA, {name}")
        axes[1, 1].set_xscale("log", base=2)
        axes[1, 1].xaxis.set_major_formatter("{x:g}")
        axes[1, 1].set_yscale("log")
        axes[1, 1].set_xlabel("i: number of the singular value")
        axes[1, 1].set_ylabel("σᵢ / σ₁ of ΔW")
        axes[1, 1].set_title(f"d   spectra, {found['last']}", loc="left")
        axes[1, 1].legend(loc="lower left")
        figure.suptitle(f"On a real model: {data['base']}, sentiment of film reviews, {data['seeds']} seeds", fontsize=16)
    return figure
