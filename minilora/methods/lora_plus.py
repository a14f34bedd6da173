"""LoRA+: B learns faster than A (Hayou et al. 2024, arXiv:2402.12354). Not a method but groups for the optimiser."""

from __future__ import annotations

from typing import Any

from ..lora.lora import LoRAEmbedding
from ..nn import Module


def loraplus_groups(model: Module, lr: float, loraplus_lr_ratio: float = 16.0, *, loraplus_weight_decay: float = 0.0,
                    loraplus_lr_embedding: float = 1e-6) -> list[dict[str, Any]]:
    """Groups of a model's trainable parameters for an optimiser: η_A = lr, η_B = λ·lr with λ = loraplus_lr_ratio.

        optimizer = AdamW(loraplus_groups(model, lr=1e-4, loraplus_lr_ratio=16))

    In a network of width n, A's features change by Θ(1) in a step only for η_A = Θ(1/n), B's for η_B = Θ(1): one rate cannot
    suit both. As in PEFT's create_loraplus_optimizer, vectors (DoRA's magnitudes, biases) are in B's group, biases without
    weight decay, and the factors of embedding tables have a rate of their own.

    Raises ValueError for a ratio below 1, or if nothing trains.
    """
    if not loraplus_lr_ratio >= 1.0:
        raise ValueError(f"loraplus_lr_ratio = {loraplus_lr_ratio}, expected at least 1: B learns faster than A")
    tables = {id(p) for _, m in model.named_modules() if isinstance(m, LoRAEmbedding) for _, p in m.named_parameters()}
    found: dict[str, list[Any]] = {"A": [], "embedding": [], "B": [], "bias": []}
    for path, p in model.named_parameters(trainable=True):
        leaf = path.rpartition(".")[2]
        kind = "embedding" if id(p) in tables else "bias" if leaf == "bias" else "B" if leaf == "lora_B" or p.ndim == 1 else "A"
        found[kind].append(p)
    if not any(found.values()):
        raise ValueError("loraplus_groups: no parameter trains; add_adapter or set_adapter first")
    rates = {"A": lr, "embedding": loraplus_lr_embedding, "B": lr * loraplus_lr_ratio, "bias": lr * loraplus_lr_ratio}
    return [{"params": params, "lr": rates[kind], "weight_decay": 0.0 if kind == "bias" else loraplus_weight_decay}
            for kind, params in found.items() if params]
