"""Figures: plain data in (a study's or report's to_dict()), matplotlib Axes out. The only folder that imports matplotlib.

Functions that take an Axes draw into it and return it, so a notebook can arrange them as it likes; the others make a Figure.
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
from .grids import amplification, capacity, init, rank_lr, real_model, spectrum, subspaces, which_matrices
from .lesson_03 import first_steps, learned_and_forgotten, lora_to_scale
from .lesson_04 import known_ranks, ranks_and_budgets
from .studies import bench, planted_linear, planted_transformer, rank_quality, ratio_bars, text_ranks
from .style import BLACK, BLUE, GREEN, GREY, ORANGE, PINK, STYLE, rank_axis, save
from .tasks import answers, loss_curves, smoothed, twins

__all__ = ["BLACK", "BLUE", "GREEN", "GREY", "ORANGE", "PINK", "STYLE", "adapter_map", "amplification", "amplification_bars",
           "answers", "bench", "capacity", "first_steps", "init", "intruder_curves", "known_ranks", "learned_and_forgotten",
           "lora_to_scale", "loss_curves", "merge_errors", "module_map", "over_training", "planted_linear",
           "planted_transformer", "principal_angles", "rank_axis", "rank_lr", "rank_quality", "ranks_and_budgets",
           "ratio_bars", "real_model", "save", "similarity", "similarity_lines", "similarity_map", "smoothed", "spectra",
           "spectrum", "subspaces", "text_ranks", "twins", "which_matrices"]
