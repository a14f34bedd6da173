"""The small model on which methods of adaptation are tested: every size differs from its neighbours, every weight matters."""

from __future__ import annotations

import numpy as np

from minilora.backend import to_host
from minilora.nn import Transformer, TransformerConfig

V, D, F, L, B, T = 11, 8, 12, 2, 3, 4
IDS = np.random.default_rng(0).integers(0, V, (B, T))


def build(form="gpt2", dtype="float64", **fields):
    """A model of a form (gpt2, bert, llama) with random weights, biases and norms included."""
    sizes = {"vocab_size": V, "d_model": D, "n_layers": L, "n_heads": 2, "d_ff": F, "max_len": 8}
    model = Transformer(getattr(TransformerConfig, form)(**sizes | fields), dtype=dtype)
    rng = np.random.default_rng(1)
    model.load_state_dict({path: rng.standard_normal(p.shape) * 0.3 for path, p in model.named_parameters()})
    return model.eval()


def run(model, **options):
    """Its logits (B, T, V) for IDS, on the host."""
    return to_host(model(IDS, **options).data)
