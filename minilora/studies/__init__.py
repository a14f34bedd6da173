"""One file, one question, one table, one figure. `minilora study NAME` runs one."""

from . import entities, rank_quality, sentiment, style
from .common import Options

STUDIES = {"rank-quality": rank_quality, "sentiment": sentiment, "entities": entities, "style": style}

__all__ = ["STUDIES", "Options"]
