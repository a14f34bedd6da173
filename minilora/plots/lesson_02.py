"""Lesson 02's figures: a learning curve that crosses what counting alone can do, and the loss against the bytes seen."""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from .style import BLACK, BLUE, GREEN, GREY, ORANGE, SLIDE, rank_axis

LINES = {"uniform": (BLACK, "all bytes alike"), "unigram": (GREEN, "how often each byte occurs"),
         "bigram": (ORANGE, "which byte follows which")}


def learning_curve(data: dict[str, Any]) -> Figure:
    """data: loss, of every update; eval, [(updates, held-out loss)]; lines, {"uniform" | "unigram" | "bigram": nats a byte};
    crossed, {line: updates} for those lines that the held-out loss went below; samples, {updates: [text, …]}, at most three."""
    with plt.rc_context(SLIDE):
        figure, (ax, beside) = plt.subplots(1, 2, figsize=(12.5, 5.8), layout="constrained", width_ratios=(8, 6))
        ax.plot(range(len(data["loss"])), data["loss"], color=GREY, linewidth=1, alpha=0.6, label="training, each update")
        ax.plot(*zip(*data["eval"]), "o-", color=BLUE, markersize=5, label="held out")
        steps = len(data["loss"])
        for name, (colour, meaning) in LINES.items():
            ax.axhline(data["lines"][name], color=colour, linestyle=(0, (4, 2)))
            ax.annotate(f"{name}: {meaning}", (steps, data["lines"][name]), xytext=(0, 8), textcoords="offset points",
                        ha="right", color=colour, bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 1})
        for name, step in data["crossed"].items():
            ax.plot([step], [data["lines"][name]], "D", color=LINES[name][0], markersize=10, zorder=5)
        ax.set_ylim(1.5, 6.2)
        ax.set_xlabel("update")
        ax.set_ylabel("loss, nats per byte")
        ax.set_title("a   The curve crosses one line after the other", loc="left")
        ax.legend(loc="upper right", bbox_to_anchor=(1.0, 0.80))
        beside.axis("off")
        beside.set_title("b   The model writes", loc="left")
        for place, (step, texts) in zip((0.97, 0.64, 0.31), data["samples"].items()):
            beside.text(0.0, place, f"after {step} updates", transform=beside.transAxes, va="top", fontweight="bold",
                        color=BLUE)
            rows = [row for text in texts for row in folded(text, 32)]
            beside.text(0.0, place - 0.07, "\n".join(rows), transform=beside.transAxes, va="top",
                        family="DejaVu Sans Mono", fontsize=15, parse_math=False)
    return figure


def loss_by_position(data: dict[str, Any]) -> Figure:
    """data: loss (T,), held out, of the byte after 1, 2 … T bytes; lines, with "unigram" and "bigram", nats a byte."""
    with plt.rc_context(SLIDE):
        figure, ax = plt.subplots(figsize=(10, 5.4), layout="constrained")
        seen = range(1, len(data["loss"]) + 1)
        ax.plot(seen, data["loss"], "o-", color=BLUE, label="the model")
        for name in ("unigram", "bigram"):
            ax.axhline(data["lines"][name], color=LINES[name][0], linestyle=(0, (4, 2)))
            ax.annotate(f"{name}: {LINES[name][1]}", (len(data["loss"]), data["lines"][name]), xytext=(0, 5),
                        textcoords="offset points", ha="right", color=LINES[name][0])
        rank_axis(ax, [n for n in (1, 2, 4, 8, 16, 32, 64, 128) if n <= len(data["loss"])], "bytes that the model sees")
        ax.set_ylabel("loss, nats per byte")
        ax.set_title("With one byte in view the model is a table of pairs", loc="left")
        ax.legend(loc="upper right", bbox_to_anchor=(1.0, 0.80))
    return figure


def folded(text: str, width: int) -> list[str]:
    """Text in rows of a width, the later ones indented: ends of lines as ↵, and what has no shape in ASCII as ·."""
    shown = "".join("↵" if c == "\n" else c if " " <= c <= "~" else "·" for c in text)
    return [("" if i == 0 else "  ") + shown[i : i + width] for i in range(0, len(shown), width)]
