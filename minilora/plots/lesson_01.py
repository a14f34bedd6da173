"""Lesson 01's figure: how far a measured slope is from the right one, against the step ε."""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from .style import BLACK, BLUE, GREEN, ORANGE, SLIDE

CURVES = {"float32": (ORANGE, "s", "-", "central differences, float32"),
          "float64": (BLUE, "o", "-", "central differences, float64"),
          "complex": (GREEN, "^", (0, (4, 2)), "complex step, float64")}


def epsilon_valley(data: dict[str, Any]) -> Figure:
    """data: steps (n,), errors {"float32" | "float64" | "complex": (n,)} and library_eps, the step of gradcheck."""
    with plt.rc_context(SLIDE):
        figure, ax = plt.subplots(figsize=(10, 5.8), layout="constrained")
        for kind, (colour, marker, line, label) in CURVES.items():
            errors = np.maximum(data["errors"][kind], 1e-17)                   # an error of 0 has no place on a log axis
            ax.plot(data["steps"], errors, color=colour, marker=marker, linestyle=line, label=label)
        ax.axvline(data["library_eps"], color=BLACK, linestyle=":", linewidth=2)
        ax.annotate("gradcheck's ε", (data["library_eps"], 3e-16), xytext=(8, 0), textcoords="offset points", color=BLACK)
        ax.annotate("ε too large:\nthe curve bends", (0.02, 0.36), xycoords="axes fraction", color=BLACK)
        ax.annotate("ε too small:\ndigits cancel", (0.80, 0.60), xycoords="axes fraction", color=BLACK)
        ax.set_xscale("log")
        ax.set_yscale("log")
        ax.invert_xaxis()
        ax.set_ylim(1e-17, 30)
        ax.set_xlabel("step ε (smaller to the right)")
        ax.set_ylabel("largest relative error")
        ax.set_title("A right gradient, measured with different steps", loc="left")
        ax.legend(loc="upper left", bbox_to_anchor=(0.42, 0.44))
    return figure
