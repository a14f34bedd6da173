"""One file, one question, one table, one figure. `minilora study NAME` runs one."""

from . import (
    amplification,
    capacity,
    chosen_ranks,
    entities,
    file_tools,
    init,
    methods,
    quantisation,
    rank_lr,
    rank_quality,
    real_model,
    sentiment,
    spectrum,
    style,
    subspaces,
    which_matrices,
)
from .common import Options

STUDIES = {
    "rank-quality": rank_quality, "which-matrices": which_matrices, "rank-lr": rank_lr, "subspaces": subspaces,
    "amplification": amplification, "spectrum": spectrum, "capacity": capacity, "init": init,
    "real-model": real_model, "methods": methods, "chosen-ranks": chosen_ranks,
    "quantisation": quantisation,
    "sentiment": sentiment, "entities": entities, "style": style,
    "file-tools": file_tools,
}

__all__ = ["STUDIES", "Options"]
