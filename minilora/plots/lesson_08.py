"""The figure of lesson 08: a real weight beside noise and beside the update that LoRA found."""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter

from .style import BLUE, GREEN, GREY, ORANGE, SLIDE

NAMES = {"q_proj": "query", "k_proj": "key", "v_proj": "value", "o_proj": "output", "up_proj": "up", "down_proj": "down"}


def spectra(data: dict[str, Any]) -> Figure:
    """Singular values on one axis; and what the best rank-8 part of each matrix loses, by kind of matrix.

    data: {"spectra": {what: singular values}, for W, noise and ΔW in this order; "rows": [{"module", "lost", "noise"}]}.
    """
    with plt.rc_context(SLIDE):
        figure, axes = plt.subplots(1, 2, figsize=(13.5, 5), layout="constrained", width_ratios=[1.2, 1])
        marks = ((BLUE, "-", "o"), (GREY, (0, (4, 2)), ""), (ORANGE, "-", "s"))
        for (name, values), (colour, dash, marker) in zip(data["spectra"].items(), marks):
            axes[0].plot(np.arange(1, len(values) + 1), values, color=colour, linestyle=dash, marker=marker,
                         markevery=[2**i - 1 for i in range(9) if 2**i <= len(values)], label=name)
        axes[0].set_xscale("log", base=2)
        axes[0].xaxis.set_major_formatter(ScalarFormatter())
        axes[0].set_yscale("log")
        axes[0].yaxis.set_major_formatter("{x:g}")
        axes[0].set_xlabel("i: number of the singular value")
        axes[0].set_ylabel("singular value σᵢ")
        axes[0].set_title("a   W needs all its rank; LoRA's change has 8 at most", loc="left")
        axes[0].legend(loc="lower right", bbox_to_anchor=(0.93, 0.02))
        for x, kind in enumerate(NAMES):
            mine = [row for row in data["rows"] if row["module"].endswith(kind)]
            spread = np.linspace(-0.22, 0.22, len(mine)) if len(mine) > 1 else np.zeros(len(mine))
            axes[1].plot(x + spread, [row["lost"] for row in mine], "o", color=GREEN,
                         label=None if x else "a real matrix, layer by layer")
            axes[1].plot([x - 0.32, x + 0.32], [np.mean([row["noise"] for row in mine])] * 2, color=GREY,
                         linestyle=(0, (2, 1)), linewidth=3, label=None if x else "noise of that shape")
        axes[1].set_ylim(0, 1.05)
        axes[1].set_xticks(range(len(NAMES)), list(NAMES.values()))
        axes[1].set_ylabel("share lost")
        axes[1].set_title("b   what the best rank-8 part loses", loc="left")
        axes[1].legend(loc="lower left")
    return figure
