"""How every figure looks, and how it is written. Colours are the Okabe-Ito set, told apart by colour-blind eyes; each line
also has its own marker or dash, and maps rise in lightness, so greyscale print works too.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, ScalarFormatter
from PIL import Image

from ..backend.files import whole_files

BLUE, ORANGE, GREEN, PINK, GREY, BLACK = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#777777", "#222222"
DASHED = (0, (4, 2))                                       # what "--" is, but visible at these widths

STYLE: Any = {
    "font.size": 12, "axes.titlesize": 13, "axes.labelsize": 12, "legend.fontsize": 11, "axes.spines.top": False,
    "axes.spines.right": False, "axes.grid": True, "grid.color": "#e6e6e6", "grid.linewidth": 0.8, "lines.linewidth": 2.2,
    "lines.markersize": 7, "legend.frameon": False, "figure.dpi": 110, "savefig.dpi": 160, "axes.axisbelow": True,
    "svg.hashsalt": "minilora", "font.family": "DejaVu Sans",
}
SLIDE: Any = STYLE | {"font.size": 14, "axes.titlesize": 15, "axes.labelsize": 15, "legend.fontsize": 13}    # read in a hall


def save(figure: Figure, path: Path) -> None:
    """Write a figure as path.png and path.svg, without dates, so equal data give equal files."""
    with whole_files(path.parent, "a figure") as folder, matplotlib.rc_context(STYLE):
        for suffix, metadata in ((".png", {"Software": None}), (".svg", {"Date": None, "Creator": None})):
            figure.savefig(folder / path.with_suffix(suffix).name, metadata=metadata, facecolor="white")
    plt.close(figure)


def png(figure: Figure) -> bytes:
    """A figure as a PNG of 110 dots per inch that carries no software version and no time, in 256 colours, which makes a
    notebook's file a third as large. Closes the figure: else a notebook's inline backend would show it a second time."""
    drawn, written = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png", dpi=110)
    plt.close(figure)
    Image.open(drawn).convert("RGB").quantize(256).save(written, format="png", optimize=True)
    return written.getvalue()


def rank_axis(ax: Axes, ranks: Sequence[int], label: str = "LoRA rank r") -> None:
    """A logarithmic axis with the ranks themselves as its ticks."""
    ax.set_xscale("log", base=2)
    ax.set_xticks(list(ranks))
    ax.xaxis.set_major_formatter(ScalarFormatter())
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.set_xlabel(label)
