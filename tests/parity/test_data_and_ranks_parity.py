"""EVA's directions and the Riemannian gradients against PEFT's own code."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.testing import assert_allclose

from minilora.methods.eva import InputPCA
from minilora.methods.riemannian import solved

torch = pytest.importorskip("torch")
pytest.importorskip("peft")


def test_the_directions_are_those_of_pefts_incremental_pca(rng):
    """Cut to 3 directions after every batch, where the result depends on how the batches are put together."""
    from peft.utils.incremental_pca import IncrementalPCA

    X = rng.standard_normal((60, 8)) * np.linspace(3.0, 0.2, 8) + rng.standard_normal(8)
    ours, theirs = InputPCA(3), IncrementalPCA(n_components=3)
    for part in np.split(X, [10, 25, 40]):
        ours.add(part)
        theirs.partial_fit(torch.tensor(part))
        assert_allclose(ours.S, theirs.singular_values_.numpy(), rtol=1e-9)
        assert_allclose(abs((ours.V * theirs.components_.numpy()).sum(axis=1)), 1.0, rtol=1e-9)
        assert_allclose(ours.S**2 / ours.total, theirs.explained_variance_ratio_.numpy(), rtol=1e-9)


def test_the_preconditioned_gradients_are_pefts(rng):
    riemannian = pytest.importorskip("peft.optimizers.riemannian")
    A, B, g_A, g_B = (rng.standard_normal(shape) for shape in ((3, 7), (5, 3), (3, 7), (5, 3)))
    pair = [torch.nn.Parameter(torch.tensor(value)) for value in (A, B)]
    for p, gradient in zip(pair, (g_A, g_B), strict=True):
        p.grad = torch.tensor(gradient)
    riemannian._RiemannianPreconditioner([tuple(pair)], 1e-2).step()
    assert_allclose(solved(B.T @ B, g_A, 1e-2), pair[0].grad.numpy(), rtol=1e-9)
    assert_allclose(solved(A @ A.T, g_B.T, 1e-2).T, pair[1].grad.numpy(), rtol=1e-9)
