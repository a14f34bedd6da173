"""Figures: plain data in (a study's or report's to_dict()), matplotlib Axes out. The only folder that imports matplotlib.

Functions that take an Axes draw into it and return it, so a notebook can arrange them as it likes; the others make a Figure.
What only one lesson of the course draws is in lesson_NN.py, imported by its notebook.
"""

from .analysis import (
    adapter_map,
    amplification_bars,
    intruder_curves,
    merge_errors,
    module_map,
    over_training,
    principal_angles,
    similarity,
    similarity_lines,
    similarity_map,
    spectra,
)
from .family import against_numbers, chosen_ranks, methods, quantisation, spread
from .grids import amplification, capacity, init, rank_lr, real_model, spectrum, subspaces, which_matrices
from .studies import bench, planted_linear, planted_transformer, rank_quality, ratio_bars, text_ranks
from .style import BLACK, BLUE, GREEN, GREY, ORANGE, PINK, STYLE, png, rank_axis, save
from .tasks import answers, file_tools, loss_curves, smoothed, twins

__all__ = ["BLACK", "BLUE", "GREEN", "GREY", "ORANGE", "PINK", "STYLE", "adapter_map", "against_numbers", "amplification",
           "amplification_bars", "answers", "bench", "capacity", "chosen_ranks", "file_tools", "init", "intruder_curves",
           "loss_curves", "merge_errors", "methods", "module_map", "over_training", "planted_linear", "planted_transformer",
           "png", "principal_angles", "quantisation", "rank_axis", "rank_lr", "rank_quality", "ratio_bars", "real_model",
           "save", "similarity", "similarity_lines", "similarity_map", "smoothed", "spectra", "spectrum", "spread", "subspaces",
           "text_ranks", "twins", "which_matrices"]
