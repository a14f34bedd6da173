"""An adapter of plain LoRA that gets other ranks: the same name, modules and scales, new factors."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

from ..backend import Array
from ..lora import LoRA, Replacement, adapters_of, add_adapter, delete_adapter
from ..nn import Transformer


def refactored(model: Transformer, name: str, factors: dict[str, tuple[Array, Array]]) -> None:
    """Replace an adapter's factors by A (r', in) and B (out, r'), or a number, of each module; one left out loses its adapter.

    The scales s stay (rank_pattern and alpha_pattern say so), and so do the layers that are trained whole. The parameters are
    new, so an optimiser has to be made after this, and the adapter is the active one.
    """
    old, config = adapters_of(model, name), deepcopy(model.adapter_configs[name])
    config.target_modules, config.exclude_modules, config.layers_to_transform = sorted(factors), None, None
    config.rank_pattern = {path: len(A) for path, (A, _) in factors.items()}
    root = 0.5 if config.use_rslora else 1.0
    config.alpha_pattern = {path: old[path].base_scale * len(A) ** root for path, (A, _) in factors.items()}
    delete_adapter(model, name)
    add_adapter(model, config, name)
    for path, adapter in adapters_of(model, name).items():
        adapter.strength = old[path].strength
        if path in factors:
            adapter.lora_A.data[...], adapter.lora_B.data[...] = factors[path]
        else:
            adapter.load_state_dict(old[path].state_dict())


def plain_lora(model: Transformer, name: str, who: str) -> dict[str, Any]:
    """Module path -> adapter, of an adapter whose update is s·B@A in its own two factors. Raises ValueError for another."""
    found = {path: a for path, a in adapters_of(model, name).items() if isinstance(a, LoRA)}
    for path, a in adapters_of(model, name).items():
        if not isinstance(a, Replacement) and (path not in found or (a.factors() or (None,))[0] is not a.lora_A
                                               or len(list(a.named_parameters())) != 2):
            raise ValueError(f"{who}: {path} has a {type(a).__name__}, expected plain LoRA, whose update is s·B@A alone")
    if not found:
        raise ValueError(f"{who}: adapter {name!r} is not LoRA on linear layers; add_adapter(model, LoraConfig(...)) first")
    return found
