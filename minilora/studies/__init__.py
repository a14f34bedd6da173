"""One file, one question, one table, one figure. `minilora study NAME` runs one."""

from . import rank_quality
from .common import Options

STUDIES = {"rank-quality": rank_quality}

__all__ = ["STUDIES", "Options"]
