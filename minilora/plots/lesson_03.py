"""The figures of lesson 03: LoRA's three matrices drawn to scale, the first updates, and what is learned against forgotten."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from .style import BLACK, BLUE, DASHED, GREEN, GREY, ORANGE, PINK, SLIDE
from .tasks import smoothed


def lora_to_scale(layers: Sequence[dict[str, Any]]) -> Figure:
    """W + s·B@A as boxes to scale, one panel a layer: {"name", "d_out", "d_in", "rank"}. Frozen grey, trained in colour."""
    widths = [1.25 + 2 * layer["d_in"] / max(layer["d_out"], layer["d_in"]) for layer in layers]
    with plt.rc_context(SLIDE):
        figure, axes = plt.subplots(1, len(layers), figsize=(2.9 * sum(widths), 4.9), layout="constrained", squeeze=False,
                                    width_ratios=widths)
        for ax, layer, width in zip(axes[0], layers, widths):
            _boxes(ax, layer["d_out"], layer["d_in"], layer["rank"], width)
            ax.set_title(f"{layer['name']}, r = {layer['rank']}", pad=10)
    return figure


def _boxes(ax: Axes, d_out: int, d_in: int, r: int, width: float) -> None:
    """One layer, `width` wide. The longest side of W is 1; a box thinner than a line is drawn as a line."""
    unit = 1.0 / max(d_out, d_in)
    high, wide, thin, gap = d_out * unit, d_in * unit, r * unit, 0.32

    def box(x: float, width: float, height: float, colour: str, name: str, size: str, face: bool) -> float:
        ax.add_patch(Rectangle((x, -height), width, height, facecolor=colour, edgecolor=colour, linewidth=1.5))
        inside = (x + width / 2, -height / 2)
        if face:
            ax.text(*inside, name, ha="center", va="center", fontsize=24, color="white", fontweight="bold")
        else:
            ax.text(x + width / 2, 0.03, name, ha="center", va="bottom", fontsize=20, color=colour, fontweight="bold")
        ax.text(x + width / 2, -height - 0.04, size, ha="center", va="top", fontsize=13, color=colour)
        return x + width

    x = box(0.0, wide, high, GREY, "W", f"{d_out:,} × {d_in:,}\nfrozen", True)
    ax.text(x + gap / 2, -high / 2, "+  s", ha="center", va="center", fontsize=22)
    x = box(x + gap, thin, high, ORANGE, "B", f"{d_out:,} × {r}", False)
    x = box(x + 0.2, wide, thin, BLUE, "A", f"{r} × {d_in:,}", False)
    share = r * (d_out + d_in) / (d_out * d_in)
    ax.text(x - wide, -0.55 * high, f"trained:\n{r * (d_out + d_in):,}\nof {d_out * d_in:,}\n= {share:.2%}", va="center",
            fontsize=16)
    ax.set_xlim(-0.15, width - 0.15)
    ax.set_ylim(-1.22, 0.2)
    ax.set_aspect("equal")
    ax.axis("off")


def first_steps(data: dict[str, Sequence[float]]) -> Figure:
    """The norms of both gradients and how far both factors moved, for each of the first updates.

    data: "grad_A", "grad_B", "moved_A", "moved_B", one number an update.
    """
    steps = range(1, len(data["grad_A"]) + 1)
    with plt.rc_context(SLIDE):
        figure, axes = plt.subplots(1, 2, figsize=(13, 5.2), layout="constrained")
        for ax, what, label in ((axes[0], "grad", "‖gradient‖"), (axes[1], "moved", "‖now − start‖")):
            ax.plot(steps, data[f"{what}_B"], color=ORANGE, marker="s", markersize=5, label="B")
            ax.plot(steps, data[f"{what}_A"], color=BLUE, marker="o", markersize=5, label="A")
            ax.plot(1, data[f"{what}_A"][0], "o", markersize=17, markerfacecolor="none", markeredgecolor=BLACK,
                    markeredgewidth=2, clip_on=False, zorder=5)
            ax.set_xlabel("update")
            ax.set_ylabel(label)
            ax.set_ylim(0, None)
            ax.legend(loc="upper right" if what == "grad" else "upper left")
        axes[0].set_title("a   the gradients: A's first one is exactly 0", loc="left")
        axes[1].set_title("b   so the first update moves B alone", loc="left")
    return figure


def learned_and_forgotten(data: dict[str, Any]) -> Figure:
    """Training losses, and every run's loss on the new text against its loss on the old one.

    data: "base" and "runs", {name: {"loss", "source_loss", "curve"}}; the base has no curve.
    """
    marks: list[Any] = [(BLUE, "o", "-"), (ORANGE, "s", "-"), (GREEN, "D", DASHED), (PINK, "^", "-.")]
    with plt.rc_context(SLIDE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(11.4, 4.8), layout="constrained")
        base = data["base"]
        right.plot(base["loss"], base["source_loss"], "*", color=BLACK, markersize=20)
        right.annotate("frozen base", (base["loss"], base["source_loss"]), xytext=(-12, -4), textcoords="offset points",
                       ha="right", va="center")
        for (name, run), (colour, marker, style) in zip(data["runs"].items(), marks):
            width = max(1, len(run["curve"]) // 10)
            steps = range(width, len(run["curve"]) + 1)
            left.plot(steps[:: max(1, width // 3)], smoothed(run["curve"], width)[:: max(1, width // 3)], color=colour,
                      linestyle=style, label=name)
            right.annotate("", (run["loss"], run["source_loss"]), (base["loss"], base["source_loss"]),
                           arrowprops={"arrowstyle": "-", "color": colour, "alpha": 0.5, "linewidth": 1.5,
                                       "antialiased": False})
            right.plot(run["loss"], run["source_loss"], marker, color=colour, markersize=12)
            place = {"xytext": (3, -11), "ha": "right", "va": "top"} if marker == "^" else {"xytext": (13, 6)}
            right.annotate(name, (run["loss"], run["source_loss"]), textcoords="offset points", color=colour, **place)
        left.set_xlabel("update")
        left.set_ylabel("training loss, nats per byte")
        left.set_title("a   while training (running mean)", loc="left")
        left.legend()
        right.set_xlabel("loss on Python (learned: to the left)")
        right.set_ylabel("loss on prose (forgotten: up)")
        right.set_title("b   afterwards, on text not seen", loc="left")
        right.margins(0.2)
    return figure
