"""The SVD analysis of an update: how much rank it uses, which directions it shares with another, what it does to W."""

from .advice import Advice, Recorder, advise
from .base import (
    alignment,
    amplification,
    gram_svd,
    intruder_correction,
    intruder_count,
    reduce_intruders,
    top_projection,
)
from .compare import compare, inner_product, interference
from .measures import (
    eckart_young_errors,
    effective_rank,
    energy_rank,
    frobenius_norm,
    measures,
    nuclear_norm,
    participation_ratio,
    spectral_norm,
    stable_rank,
)
from .report import Report
from .subspace import (
    directions,
    null_similarity,
    principal_angles,
    random_baseline,
    similarity_grid,
    subspace_similarity,
)
from .update import Update, updates

__all__ = ["Advice", "Recorder", "Report", "Update", "advise", "alignment", "amplification", "compare", "directions",
           "eckart_young_errors", "effective_rank", "energy_rank", "frobenius_norm", "gram_svd", "inner_product",
           "interference", "intruder_correction", "intruder_count", "measures", "nuclear_norm", "null_similarity",
           "participation_ratio", "principal_angles", "random_baseline", "reduce_intruders", "similarity_grid",
           "spectral_norm", "stable_rank", "subspace_similarity", "top_projection", "updates"]
