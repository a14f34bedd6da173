"""One file, one question, one table, one figure. `minilora study NAME` runs one."""

from . import capacity, init, rank_lr, rank_quality, which_matrices
from .common import Options

STUDIES = {"rank-quality": rank_quality, "which-matrices": which_matrices, "rank-lr": rank_lr, "capacity": capacity,
           "init": init}

__all__ = ["STUDIES", "Options"]
