"""Figures that set methods, or codes of 4 bits, beside each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .analysis import module_map, over_training
from .style import BLACK, BLUE, GREEN, GREY, ORANGE, PINK, STYLE

DASHED = (0, (4, 2))
LEADER = {"arrowstyle": "-", "color": GREY, "linewidth": 0.6, "shrinkA": 1, "shrinkB": 4}      # from a label to its point
PAPER = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}
LEVELS = {"frozen base": (0, (6, 2)), "full fine-tuning": (0, (1, 1.5))}
FAMILIES = {                                               # colour and marker -> the methods that have it
    (BLUE, "o"): ("LoRA", "rsLoRA", "LoRA+", "LoRA-FA", "PiSSA", "MiLoRA", "OLoRA", "DoRA", "AdaLoRA", "SoRA"),
    (GREEN, "s"): ("LoHa", "LoKr", "TT-LoRA", "VeRA", "SHiRA"),
    (ORANGE, "^"): ("IA3", "BitFit"),
    (PINK, "D"): ("Houlsby", "prompt tuning", "prefix tuning"),
}
NAMES = ("LoRA and its kin", "other updates of W", "vectors only", "beside the weights")


def look(method: str) -> tuple[str, str]:
    """The colour and the marker of a method."""
    return next((key for key, methods in FAMILIES.items() if method in methods), (BLACK, "x"))


def spread(values: Sequence[float] | np.ndarray, gap: float) -> np.ndarray:  # (n,) -> (n,)
    """Places for labels: as near to the values as may be, in their order, and at least `gap` apart (least squares)."""
    order = np.argsort(values, kind="stable")
    wanted = np.asarray(values, float)[order] - gap * np.arange(len(order))        # apart, if these do not fall
    blocks: list[list[float]] = []                         # [sum, count] of neighbours that share a place
    for value in wanted:
        blocks.append([value, 1.0])
        while len(blocks) > 1 and blocks[-2][0] / blocks[-2][1] > blocks[-1][0] / blocks[-1][1]:
            total, count = blocks.pop()
            blocks[-1] = [blocks[-1][0] + total, blocks[-1][1] + count]
    level = np.concatenate([np.full(int(count), total / count) for total, count in blocks])
    places = np.empty(len(order))
    places[order] = level + gap * np.arange(len(order))
    return places


def against_numbers(ax: Axes, rows: list[dict[str, Any]], key: str, lines: dict[str, float]) -> Axes:
    """Quality against trained numbers: one labelled point a method, and LEVELS to compare with. Labels stand in columns at
    the sides, in the order of the points."""
    counts = np.array([row["trainable"] for row in rows], float)
    means, sds = (np.array([row[f"{key}_{part}"] for row in rows]) for part in ("mean", "sd"))
    reach = [*(means - sds), *(means + sds), *lines.values()]
    low, high = min(reach), max(reach)
    pad = 0.06 * (high - low or 1.0)
    left = counts < 0.5 * np.median(counts)
    ax.set_xscale("log")
    ax.set_xlim(counts.min() / 50.0, counts.max() * 20.0)
    for side, x, align in ((left, counts.min() / 5.0, "right"), (~left, counts.max() * 3.5, "left")):
        chosen = np.flatnonzero(side)
        if not len(chosen):
            continue
        gap = min(0.045 * (high - low + 2.0 * pad), (high - low + 2.0 * pad) / len(chosen))
        places = spread(means[chosen], gap)
        places += min(0.0, high + pad - places.max() - gap / 2) + max(0.0, low - pad - places.min() + gap / 2)
        for i, y in zip(chosen, places):
            ax.annotate(f"{rows[i]['method']}  {means[i]:.3f}", (counts[i], means[i]), (x, y), fontsize=10, ha=align,
                        va="center", arrowprops=LEADER, bbox=PAPER)
    for row, count, mean, sd in zip(rows, counts, means, sds):
        colour, marker = look(row["method"])
        ax.errorbar(count, mean, yerr=sd, color=colour, marker=marker, linestyle="none", elinewidth=1.2, zorder=3)
    for name, value in lines.items():
        ax.axhline(value, color=BLACK, linestyle=LEVELS[name], linewidth=1.6, label=name, zorder=1)
    for (colour, marker), name in zip(FAMILIES, NAMES):
        ax.plot([], [], color=colour, marker=marker, linestyle="none", label=name)
    ax.set_ylim(low - pad, high + pad)
    ax.set_xlabel("trained numbers")
    return ax


def across(ax: Axes, values: dict[str, float], sds: dict[str, float] | None = None, reference: float | None = None) -> Axes:
    """A value for each method, one below the other."""
    for i, (name, value) in enumerate(values.items()):
        colour, marker = look(name)
        ax.errorbar(value, i, xerr=(sds or {}).get(name), color=colour, marker=marker, capsize=3, linestyle="none")
    if reference is not None:
        ax.axvline(reference, color=BLACK, linestyle=DASHED, linewidth=1.6)
    ax.set_yticks(range(len(values)), list(values), fontsize=10)
    ax.set_ylim(len(values) - 0.4, -0.6)
    return ax


def methods(data: dict[str, Any]) -> Figure:
    """Loss against trained numbers, forgetting, the time of a step; below, where it was measured, the real model."""
    text, reviews, full = data["text"], data["reviews"], "full fine-tuning"
    real = "rows" in reviews
    rows = [row for row in data["rows"] if row["method"] != full]
    whole = next(row for row in data["rows"] if row["method"] == full)
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1 + real, 3, figsize=(20, 8.4 * (1 + real)), layout="constrained", squeeze=False,
                                    width_ratios=(2, 1, 1))
        a, b, c = axes[0]
        against_numbers(a, rows, "loss", {"frozen base": text["base"]["loss"], full: whole["loss_mean"]})
        a.set_ylabel("validation loss on the target, nats per byte")
        a.set_title(f"a   {text['from']} to {text['to']}, {text['parameters']:,} parameters, {text['seeds']} seeds", loc="left")
        across(b, {row["method"]: row["source_loss_mean"] for row in data["rows"]},
               {row["method"]: row["source_loss_sd"] for row in data["rows"]}, text["base"]["source_loss"])
        b.set_xlabel(f"loss on {text['from']} afterwards (dashed: before)")
        b.set_title("b   forgetting", loc="left")
        times(c, data["costs"])
        c.set_title(f"c   a step, d_model {data['costs']['model']['d_model']}", loc="left")
        if real:
            d, e, f = axes[1]
            whole = next(row for row in reviews["rows"] if row["method"] == full)
            against_numbers(d, [row for row in reviews["rows"] if row["method"] != full], "loss", {full: whole["loss_mean"]})
            d.set_ylabel("held-out loss, nats")
            d.set_title(f"d   {reviews['base']}, sentiment, {reviews['steps']} steps, {reviews['seeds']} seeds", loc="left")
            across(e, {name: row["peak_mb"] for name, row in reviews["costs"]["rows"].items() if row["peak_mb"] is not None})
            e.set_xlabel("MB at the peak of training")
            e.set_xlim(left=0)
            e.set_title("e   memory", loc="left")
            times(f, reviews["costs"])
            f.set_title(f"f   a step of {reviews['base']}", loc="left")
        figure.legend(*a.get_legend_handles_labels(), loc="outside lower center", ncols=6)
        figure.suptitle(f"Every way to adapt, at about {data['budget']:,} trained numbers where it can, each at its own "
                        "best learning rate", fontsize=16)
    return figure


def times(ax: Axes, costs: dict[str, Any]) -> Axes:
    """The time of a training step of each method over full fine-tuning's."""
    across(ax, {name: row["step"] for name, row in costs["rows"].items()}, reference=1.0)
    ax.set_xlabel("time of a step, full fine-tuning = 1")
    ax.set_xlim(left=0)
    return ax


def quantisation(data: dict[str, Any]) -> Figure:
    """Errors of the codes on real weights, losses on each base, and what weights and training take in memory."""
    rows, errors = data["rows"], data["errors"]
    codes = list(errors[0]["codes"])
    with plt.rc_context(STYLE):
        figure, (a, b, c) = plt.subplots(1, 3, figsize=(20, 6.4), layout="constrained", width_ratios=(4, 4, 3))
        for i, (code, colour, marker) in enumerate(zip(codes, (BLUE, BLUE, ORANGE, ORANGE, GREEN), "osD^v")):
            at = np.arange(len(errors)) + 0.14 * (i - (len(codes) - 1) / 2)
            found = [row["codes"][code] for row in errors]
            a.errorbar(at, [f["mean"] for f in found], color=colour, marker=marker, linestyle="none", capsize=3, label=code,
                       yerr=[[f["mean"] - f["least"] for f in found], [f["most"] - f["mean"] for f in found]],
                       markerfacecolor="white" if "double" in code else colour)
        a.set_xticks(range(len(errors)), [f"{row['weights']}\n{row['matrices']} matrices" for row in errors], fontsize=10)
        a.set_ylabel("‖W − Q(W)‖ / ‖W‖: mean, least, most")
        a.set_title("a   what the codes lose", loc="left")
        a.legend(fontsize=10)
        for i, row in enumerate(rows):
            b.plot(row["start_mean"], i, color=GREY, marker="|", markersize=16, markeredgewidth=3, linestyle="none",
                   label=None if i else "before training")
            b.errorbar(row["loss_mean"], i, xerr=row["loss_sd"], color=BLUE, marker="o", capsize=4, linestyle="none",
                       label=None if i else f"LoRA, r = {data['rank']}, trained")
        b.axvline(rows[0]["loss_mean"], color=BLACK, linestyle=DASHED, linewidth=1.6)
        b.set_xlabel("validation loss on the target, nats per byte")
        b.set_title(f"b   {data['text']['from']} to {data['text']['to']}, {data['text']['seeds']} seeds", loc="left")
        b.legend(fontsize=10)
        memory = data["memory"]["rows"]
        for i, row in enumerate(memory):
            c.barh(i, row["peak_mb"], 0.62, color=GREY, alpha=0.45, label=None if i else "peak of training")
            c.barh(i, row["weights_mb"], 0.34, color=BLUE, label=None if i else "model and adapter")
        c.set_xlabel(f"MB ({data['memory']['name']})")
        c.set_title("c   memory", loc="left")
        c.legend(fontsize=10, loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=2)
        for ax, names in ((b, [row["base"] for row in rows]), (c, [row["base"] for row in memory])):
            ax.set_yticks(range(len(names)), names)
            ax.set_ylim(len(names) - 0.4, -0.6)
        figure.suptitle("LoRA on a base of 4 bits", fontsize=16)
    return figure


def chosen_ranks(data: dict[str, Any]) -> Figure:
    """The ranks of methods that choose them: above over training, by kind of module; below at the end, layer by layer."""
    rows = data["rows"][1:]                                # the first has equal ranks
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(2, len(rows), figsize=(6 * len(rows), 9.6), layout="constrained", squeeze=False)
        for i, (row, above, below) in enumerate(zip(rows, *axes)):
            over_training(above, {"steps": row["updates"], "modules": {path: {"rank": r} for path, r in row["ranks"].items()}},
                          "rank", ranges=False)
            above.axhline(data["rank"], color=GREY, linewidth=1.2)
            above.set_ylim(0, 1.75 * data["rank"])
            above.set_ylabel("rank, median over layers")
            above.set_title(f"{'abc'[i]}   {row['method']}: loss {row['loss_mean']:.3f}, mean rank {row['mean_rank']:.1f}",
                            loc="left")
            above.get_legend().remove()
            last = {path: {"rank_at_the_end": r[-1]} for path, r in row["ranks"].items()}
            module_map(below, {"modules": last}, "rank_at_the_end").images[0].set_clim(0, 1.5 * data["rank"])
        figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=6)
        figure.suptitle(f"Who gets the rank? {data['text']['from']} to {data['text']['to']}, {data['text']['seeds']} seeds; "
                        f"LoRA with r = {data['rank']} everywhere: loss {data['rows'][0]['loss_mean']:.3f}", fontsize=16)
    return figure
