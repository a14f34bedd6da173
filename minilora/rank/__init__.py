"""The SVD analysis of an update: how much rank it uses, and which directions it shares with another."""

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
from .subspace import directions, principal_angles, random_baseline, similarity_grid, subspace_similarity

__all__ = ["directions", "eckart_young_errors", "effective_rank", "energy_rank", "frobenius_norm", "measures",
           "nuclear_norm", "participation_ratio", "principal_angles", "random_baseline", "similarity_grid",
           "spectral_norm", "stable_rank", "subspace_similarity"]
