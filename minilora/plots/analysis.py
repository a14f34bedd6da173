"""The figures of the rank analysis: what `rank.compare`, `Report.to_dict()`, `Recorder.to_dict()` and `interference` found.

Chance is always in the picture: the baseline max(i, j)/k of a similarity, the angles and cosines of random directions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import NormalDist
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import LogFormatter, MaxNLocator

from .style import BLACK, BLUE, GREEN, GREY, ORANGE, PINK, STYLE

MARKS = [(BLUE, "o", "-"), (ORANGE, "s", "--"), (GREEN, "^", "-."), (PINK, "D", ":"), (BLACK, "v", "-"), (GREY, "P", "--"),
         ("#56B4E9", "X", "-.")]
ON_WHITE: Any = {"frameon": True, "facecolor": "white", "edgecolor": "none", "framealpha": 0.9}
NOUNS = {"input": "input directions", "output": "output directions", "A": "directions of A alone"}


def similarity_map(ax: Axes, data: dict[str, Any], part: str = "all", labels: Sequence[str] = ("first", "second"),
                   colour_bar: bool = True) -> Axes:
    """The heat map of φ(i, j) of one `compare`, hatched where it is within chance (up to the 95 % quantile of random ones).

    part: "all", or as in the paper's Figure 3 "upper", the cells with j ≥ i, and "lower", its lower left corner with j ≤ i.
    labels: what the two updates are called on the axes.
    """
    phi: Any = np.array(data["phi"])                                       # (r1, r2)
    chance = np.array(data.get("null_high", data["baseline"]))
    i, j = np.indices(phi.shape)
    if part == "lower":
        n = min(phi.shape)
        phi, chance, i, j = phi[:n, :n], chance[:n, :n], i[:n, :n], j[:n, :n]
    shown = np.ones(phi.shape, bool) if part == "all" else j >= i if part == "upper" else j <= i
    extent = (0.5, phi.shape[1] + 0.5, 0.5, phi.shape[0] + 0.5)
    image = ax.imshow(np.ma.array(phi, mask=~shown), cmap="cividis", vmin=0, vmax=1, origin="lower", aspect="auto",
                      interpolation="nearest", extent=extent)
    inside = (shown & (phi <= chance)).repeat(8, 0).repeat(8, 1)          # so that the hatched area follows the cells' edges
    if inside.any():
        x, y = (np.linspace(0.5, n + 0.5, 8 * n, endpoint=False) + 1 / 16 for n in phi.shape[::-1])
        with plt.rc_context({"hatch.color": "#ffffff", "hatch.linewidth": 0.7}):
            ax.contourf(x, y, inside, levels=[0.5, 1.5], hatches=["///"], colors="none")
    ax.grid(False)
    ax.set_ylabel(f"i: top directions of {labels[0]}")
    ax.set_xlabel(f"j: top directions of {labels[1]}")
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(MaxNLocator(8, integer=True, min_n_ticks=1))
    if colour_bar:
        ax.figure.colorbar(image, ax=ax, fraction=0.05, pad=0.02).set_label("φ(i, j)")
    return ax


def similarity_lines(ax: Axes, data: dict[str, Any]) -> Axes:
    """φ(i, i), and φ(1, j): how much of the first direction lies in the other's first j; over their common baseline n/k."""
    phi, k = np.array(data["phi"]), data["k"]
    n = min(phi.shape)
    lines: list[Any] = [(np.diagonal, BLUE, "o", "φ(n, n)"), (lambda grid: grid[0], ORANGE, "s", "φ(1, n)")]
    for cut, colour, marker, label in lines:
        values = cut(phi)
        x = np.arange(1, len(values) + 1)
        if "null_low" in data:
            low, high = (cut(np.array(data[key])) for key in ("null_low", "null_high"))
            ax.fill_between(x, low, high, color=colour, alpha=0.16, linewidth=0)
        ax.plot(x, values, color=colour, marker=marker, markevery=max(1, len(x) // 12), label=label)
    widest = max(n, phi.shape[1])
    ax.plot([1, widest], [1 / k, widest / k], color=BLACK, linestyle=(0, (4, 2)), label="random, n/k (band: 5 to 95 %)")
    ax.set_ylim(0, 1.03)
    ax.xaxis.set_major_locator(MaxNLocator(8, integer=True, min_n_ticks=1))
    ax.set_xlabel("n: number of directions")
    ax.set_ylabel("similarity φ")
    ax.legend(loc="upper right")
    return ax


def similarity(data: dict[str, Any], labels: Sequence[str] = ("first", "second"), title: str = "") -> Figure:
    """One `compare` as the paper's Figure 3: the upper triangle, its lower left corner, and both against chance."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, 3, figsize=(16, 5), layout="constrained", width_ratios=[1.25, 1, 1.1])
        similarity_map(axes[0], data, "upper", labels, colour_bar=False)
        similarity_map(axes[1], data, "lower", labels)
        similarity_lines(axes[2], data)
        for ax, text in zip(axes, ("a   φ(i, j) for j ≥ i", "b   φ(i, j) for j ≤ i, its lower left corner" if
                                   len(set(data["sizes"])) > 1 else "b   φ(i, j) for j ≤ i", "c   against random directions")):
            ax.set_title(text, loc="left")
        if any(ax.collections for ax in axes[:2]):
            patch = Patch(facecolor="#00336b", edgecolor="white", hatch="///", label="no more than chance (95 %)")
            figure.legend(handles=[patch], loc="outside lower left")
        name = NOUNS[data["side"]]
        figure.suptitle(title or f"Do the updates share {name}? (in {data['k']} dimensions)", fontsize=16, fontweight="bold")
    return figure


def principal_angles(ax: Axes, data: Mapping[str, dict[str, Any]]) -> Axes:
    """The principal angles of several `compare`s, label -> its data, in degrees, with those of random subspaces."""
    for (label, found), (colour, marker, dash) in zip(data.items(), MARKS):
        x = np.arange(1, len(found["angles"]) + 1)
        ax.plot(x, np.degrees(found["angles"]), color=colour, marker=marker, linestyle=dash, label=label,
                markevery=max(1, len(x) // 12))
    drawn: set[Any] = set()
    for found in data.values():
        size = (*found["sizes"], found["k"])
        if "null_angles" in found and size not in drawn:
            x = np.arange(1, len(found["null_angles"]) + 1)
            ax.plot(x, np.degrees(found["null_angles"]), color=GREY, linestyle=(0, (1, 1.2)), linewidth=1.8,
                    label=None if drawn else "random subspaces (median)")
            drawn.add(size)
    ax.set_ylim(-2, 93)
    ax.set_yticks(range(0, 91, 15))
    ax.xaxis.set_major_locator(MaxNLocator(10, integer=True, min_n_ticks=1))
    ax.set_xlabel("i: number of the angle")
    ax.set_ylabel("principal angle θᵢ, degrees")
    ax.legend(loc="lower right")
    return ax


def module_map(ax: Axes, data: dict[str, Any], measure: str = "effective_rank") -> Axes:
    """One number of each module of a report, layer by layer: a row a layer, a column a kind of module.

    A module belongs to the layer of the first number in its path; those without one come below the layers.
    """
    rows = data["modules"]
    place, kind = _places(rows)
    layers, kinds = sorted(set(place.values())), list(dict.fromkeys(kind.values()))
    grid = np.full((len(layers), len(kinds)), np.nan)
    for name, row in rows.items():
        if row.get(measure) is not None:
            grid[layers.index(place[name]), kinds.index(kind[name])] = row[measure]
    image = ax.imshow(np.ma.masked_invalid(grid), aspect="auto", cmap="cividis", origin="lower", interpolation="nearest")
    ax.grid(False)
    ax.set_xticks(range(len(kinds)), [name.rpartition(".")[2] for name in kinds], rotation=35, ha="right")
    step = max(1, len(layers) // 16)
    ax.set_yticks(range(0, len(layers), step), ["none" if n < 0 else str(n) for n in layers[::step]])
    ax.set_ylabel("layer")
    ax.figure.colorbar(image, ax=ax).set_label(measure.replace("_", " "))
    return ax


def spectra(ax: Axes, data: dict[str, Any]) -> Axes:
    """The singular values of every module of a report over the largest, one line a module, a colour and dash a kind."""
    rows = data["modules"]
    _, kind = _places(rows)
    for (colour, _, dash), each in zip(_marks(len(set(kind.values()))), dict.fromkeys(kind.values())):
        label: str | None = each.rpartition(".")[2]
        for name in (n for n in rows if kind[n] == each):
            values = np.asarray(rows[name]["singular_values"])
            if values[0] > 0:
                ax.plot(np.arange(1, len(values) + 1), np.maximum(values / values[0], 1e-8), color=colour, linestyle=dash,
                        alpha=0.9 if len(rows) < 20 else 0.55, linewidth=1.8 if len(rows) < 20 else 1.2, label=label)
                label = None
    ax.set_yscale("log")
    ax.xaxis.set_major_locator(MaxNLocator(8, integer=True, min_n_ticks=1))
    ax.set_xlabel("i: number of the singular value")
    ax.set_ylabel("σᵢ / σ₁")
    if ax.get_legend_handles_labels()[0]:
        legend = ax.legend(ncols=2)
        for line in legend.get_lines():
            line.set(alpha=1.0, linewidth=2.2)
    return ax


def amplification_bars(ax: Axes, data: dict[str, Any]) -> Axes:
    """The amplification factor of a report with a base, by kind of module: bars are medians, dots single modules.

    Two marks say what it would be if ΔW lay in random directions of W (above), or in W's own top ones (below).
    """
    rows = {name: row for name, row in data["modules"].items() if row.get("amplification")}
    _, kind = _places(rows)
    kinds = list(dict.fromkeys(kind.values()))
    for x, each in enumerate(kinds):
        mine = [row for name, row in rows.items() if kind[name] == each]
        factors = [row["amplification"] for row in mine]
        first = x == 0
        ax.bar(x, np.median(factors), 0.62, color=BLUE, alpha=0.85, label="its own directions (median)" if first else None)
        spread = np.linspace(-0.2, 0.2, len(mine)) if len(mine) > 1 else [0.0]
        ax.plot(x + np.asarray(spread), factors, ".", color=BLACK, markersize=5, label="each module" if first else None)
        for key, colour, dash, label in (("projection_random", ORANGE, (0, (2, 1)), "were they random"),
                                         ("projection_top", GREEN, "-", "were they W's top ones")):
            values = [row["frobenius_norm"] / row[key] for row in mine if row.get(key)]
            if values:
                ax.plot([x - 0.42, x + 0.42], [np.median(values)] * 2, color=colour, linestyle=dash, linewidth=3,
                        label=label if first else None)
    ax.set_yscale("log")
    ax.yaxis.set_major_formatter("{x:g}")
    ax.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1.5, 0.4)))
    low, high = ax.get_ylim()
    ax.set_ylim(low, high * (high / low) ** 0.42)                          # room for the legend
    ax.axhline(1.0, color=GREY, linewidth=1)
    ax.grid(False, axis="x")
    ax.set_xticks(range(len(kinds)), [name.rpartition(".")[2] for name in kinds], rotation=35, ha="right")
    ax.set_ylabel("amplification ‖ΔW‖ / ‖UᵀWVᵀ‖")
    if kinds:
        ax.legend(loc="upper right", ncols=2, fontsize=10, **ON_WHITE)
    return ax


def intruder_curves(ax: Axes, data: Mapping[str, dict[str, Any]], epsilon: float = 0.5) -> Axes:
    """The number of intruders against the threshold ε, for reports with a base: label -> to_dict(). Summed over modules.

    The grey line is what a direction has that resembles none of W: the median of the largest of m random |cos| in R^d.
    """
    thresholds, chance, looked = np.linspace(0, 1, 201), [], 0
    for (label, found), (colour, marker, dash) in zip(data.items(), MARKS):
        rows = [row for row in found["modules"].values() if row.get("intruder_cosines")]
        cosines = np.concatenate([row["intruder_cosines"] for row in rows])
        chance += [NormalDist().inv_cdf((1 + 0.5 ** (1 / min(row["shape"]))) / 2) / row["shape"][0] ** 0.5 for row in rows]
        looked = max(looked, len(cosines))
        counts = (cosines[:, None] < thresholds).sum(axis=0)
        ax.plot(thresholds, counts, color=colour, linestyle=dash, marker=marker, markevery=20,
                label=f"{label}: {int((cosines < epsilon).sum())} at ε = {epsilon:g}" if label else
                f"{int((cosines < epsilon).sum())} at ε = {epsilon:g}")
    ax.axvline(epsilon, color=BLACK, linestyle=(0, (4, 2)), linewidth=1.4)
    ax.axvline(float(np.median(chance)), color=GREY, linestyle=(0, (1, 1.2)), label="best |cos| of a random direction")
    ax.axhline(looked, color="#cccccc", linewidth=1)
    ax.set_xlim(0, 1)
    ax.set_ylim(-0.02 * looked, 1.06 * looked)
    ax.set_xlabel("threshold ε on |cos| to W's singular vectors")
    ax.set_ylabel(f"intruders among {looked} directions")
    ax.legend(loc="best", **ON_WHITE)
    return ax


def merge_errors(ax: Axes, data: dict[str, Any]) -> Axes:
    """What `interference` says of merging two adapters into one of rank q: the error if they were orthogonal, and the true."""
    x = np.arange(len(data["errors"]))
    ax.plot(x, data["predicted_errors"], color=BLACK, linestyle=(0, (4, 2)), label="predicted, were they orthogonal")
    ax.plot(x, data["errors"], color=BLUE, marker="o", markevery=max(1, len(x) // 12), label="of the sum itself")
    ax.set_ylim(0, 1.03)
    ax.xaxis.set_major_locator(MaxNLocator(8, integer=True, min_n_ticks=1))
    ax.set_xlabel("rank q kept of the sum ΔW₁ + ΔW₂")
    ax.set_ylabel("relative error of the sum cut to rank q")
    ax.legend()
    return ax


def over_training(ax: Axes, data: dict[str, Any], measure: str = "effective_rank", ranges: bool = True) -> Axes:
    """What a Recorder followed: the median of a measure over the modules of each kind, with their range unless left out."""
    modules = data["modules"]
    _, kind = _places(modules)
    for (colour, marker, dash), each in zip(_marks(len(set(kind.values()))), dict.fromkeys(kind.values())):
        values = np.array([modules[name][measure] for name in modules if kind[name] == each])              # (layers, steps)
        if ranges:
            ax.fill_between(data["steps"], values.min(axis=0), values.max(axis=0), color=colour, alpha=0.12, linewidth=0)
        ax.plot(data["steps"], np.median(values, axis=0), color=colour, linestyle=dash, marker=marker,
                markevery=max(1, len(data["steps"]) // 10), label=each.rpartition(".")[2])
    ax.set_xlabel("optimiser steps")
    ax.set_ylabel(measure.replace("_", " "))
    ax.legend(ncols=2)
    return ax


def adapter_map(data: dict[str, Any]) -> Figure:
    """An adapter's report: effective ranks layer by layer, spectra, and with a base amplification and intruders."""
    based = any(row.get("intruder_cosines") for row in data["modules"].values())
    with plt.rc_context(STYLE):
        figure, grid = plt.subplots(1 + based, 2, figsize=(13, 5.4 * (1 + based)), layout="constrained", squeeze=False)
        axes = grid.ravel()
        module_map(axes[0], data)
        spectra(axes[1], data)
        titles = ["effective rank of ΔW", "spectra of ΔW, one line a module"]
        if based:
            amplification_bars(axes[2], data)
            intruder_curves(axes[3], {"": data})
            titles += ["how much stronger than W in the same directions", "intruder dimensions of W + ΔW"]
        for ax, letter, title in zip(axes, "abcd", titles):
            ax.set_title(f"{letter}   {title}", loc="left")
    return figure


def _places(rows: Mapping[str, Any]) -> tuple[dict[str, int], dict[str, str]]:
    """Each module's layer (-1: none) and its kind, the last parts of its path without numbers."""
    place = {name: next((int(part) for part in name.split(".") if part.isdigit()), -1) for name in rows}
    return place, {name: ".".join(part for part in name.split(".")[-2:] if not part.isdigit()) for name in rows}


def _marks(n: int) -> list[tuple[Any, str, Any]]:
    """n (colour, marker, dash), told apart by at least two of them."""
    return [(MARKS[i % 7][0], MARKS[(i + i // 7) % 7][1], ("-", "--", "-.", ":")[(i + i // 7) % 4]) for i in range(n)]
