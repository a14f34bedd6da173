"""Adapters on a model: add, choose, scale, disable, merge, delete, count.

The base is never destroyed: its arrays stay bit for bit, a merge keeps a copy, and nothing merges as a side effect.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from math import prod
from typing import Any

import numpy as np

from ..autograd import Tensor, no_grad
from ..backend import array_module, device_of, host_rng
from ..nn import Adaptable, Embedding, Linear, Module, PackedLinear, Parameter, Transformer
from .config import TargetConfig, find_targets, module_names
from .layer import BESIDE, METHODS, Adaptation, adapted, working_terms


def add_adapter(model: Transformer, config: TargetConfig, name: str = "default", seed: int = 0) -> None:
    """Put a new adapter on every module that the config targets, and make it the active one; the base is frozen.

    seed: of the adapter's initial values and dropout. Raises ValueError if the name is taken, nothing matches, or the rank
    does not fit a module; then the model is unchanged.
    """
    if not name or "." in name or name == "__base__":
        raise ValueError(f"adapter name {name!r}: expected a non-empty name without dots, and not __base__ (no adapter)")
    if name in adapter_names(model):
        raise ValueError(f"the model already has an adapter {name!r}: choose another name, or delete_adapter(model, {name!r})")
    _refuse_merged(model, "add an adapter")
    rng = host_rng(seed)
    new = []
    for path, names, layer in find_targets(model, config):
        kind = METHODS.get((config.method, Embedding if isinstance(layer, Embedding) else Linear))
        if kind is None:
            raise ValueError(f"method {config.method!r} cannot adapt {path}, a {type(layer).__name__}")
        new.append((layer, kind(layer, config, names, rng)))
    wholes, targeted = _wholes(model), {id(layer) for layer, _ in new}
    for path, names, layer in layers_to_save(model, config):
        if id(layer) not in targeted and (id(wholes.get(id(layer))) in targeted or
                                          any(wholes.get(block) is layer for block in targeted)):
            raise ValueError(f"modules_to_save: {path} shares rows with a layer that is adapted, expected one of the two")
        new.append((layer, METHODS["replace", Linear](layer, config, names, rng)))
    if config.method in BESIDE:
        new += BESIDE[config.method](model, config, [layer for layer, _ in new], rng).values()
    device = device_of(model.embed.weight.data).name
    for layer, adapter in new:
        for part in wholes.get(id(layer), layer), layer:
            part.adaptation = part.adaptation or Adaptation()
        layer.adaptation.adapters[name] = adapter
        adapter.to(device).train(model.training)
    model.adapter_configs = {**model.adapter_configs, name: deepcopy(config)}
    set_adapter(model, name)


def set_adapter(model: Transformer, names: str | Sequence[str] | None) -> None:
    """Make these adapters the active ones (their updates add up), and the only ones that train; None: the plain base.

    Raises KeyError for a name that the model does not have, ValueError while adapters are merged.
    """
    wanted = [] if names is None else [names] if isinstance(names, str) else list(dict.fromkeys(names))
    _check_names(model, wanted)
    _refuse_merged(model, "set_adapter")
    model.freeze()
    for adaptation in adaptations(model):
        adaptation.active = [name for name in wanted if name in adaptation.adapters]
        for name in adaptation.active:
            adaptation.adapters[name].unfreeze()


def delete_adapter(model: Transformer, name: str) -> None:
    """Remove an adapter. Raises KeyError if there is none of that name, ValueError while adapters are merged."""
    _check_names(model, [name])
    _refuse_merged(model, "delete_adapter")
    model.adapter_configs.pop(name)
    layers: list[Any] = [m for _, m in model.named_modules() if getattr(m, "adaptation", None) is not None]
    for layer in layers:
        layer.adaptation.adapters.pop(name, None)
        layer.adaptation.active = [n for n in layer.adaptation.active if n != name]
    for layer in layers:
        if not any(adaptation.adapters for adaptation in _hung_on(layer)):
            layer.adaptation = None


def set_scale(model: Transformer, name: str, scale: float) -> None:
    """Multiply an adapter's whole update by `scale`: 1 as trained (s = α/r), 0 off, negative to subtract it."""
    _check_names(model, [name])
    _refuse_merged(model, "set_scale")
    if not np.isfinite(scale):
        raise ValueError(f"scale: got {scale}, expected a finite number: 1 as trained, 0 for off")
    for adaptation in adaptations(model):
        if name in adaptation.adapters:
            adaptation.adapters[name].strength = float(scale)


@contextmanager
def disable_adapter(model: Transformer) -> Iterator[None]:
    """Inside this block the model is its base, bit for bit, also while adapters are merged."""
    layers, found = list(_products(model)), adaptations(model)
    was_enabled, held = [a.enabled for a in found], []
    for layer in layers:
        if layer.adaptation.saved is not None:
            held.append((layer, [a.copy() for a in _arrays(layer)]))
            _write(layer, layer.adaptation.saved)
    for a in found:
        a.enabled = False
    try:
        yield
    finally:
        for a, enabled in zip(found, was_enabled, strict=True):
            a.enabled = enabled
        for layer, arrays in held:
            if layer.adaptation is not None and layer.adaptation.saved is not None:            # not unmerged meanwhile
                _write(layer, arrays)


def merge_adapter(model: Transformer) -> None:
    """Write W' of the active adapters into every layer, so that they cost nothing at inference.

    The base's arrays are kept beside (memory: once more the adapted layers), so unmerge_adapter restores them bit for bit.
    Merging twice is merging once. A merged embedding or head is untied: the other one's weight is still the base's.
    Raises ValueError if the result is not finite, or a base weight is quantised; then nothing is merged.
    """
    results = []
    for layer in _products(model):
        if terms := working_terms(layer):
            with no_grad(), np.errstate(all="ignore"):
                values = [t.data for t in adapted(layer, [t[:2] for t in terms]) if t is not None]
            if not isinstance(layer.weight, Tensor):
                raise ValueError("merge: got a quantised base weight, expected a dense one: rounding again loses the update")
            if len(values) != len(_arrays(layer)):
                raise ValueError("merge: got a lora_bias on a layer without a bias, expected one that has: leave it unmerged")
            if not all(bool(array_module(v).isfinite(v).all()) for v in values):
                raise ValueError("merge: got NaN or infinite values in a merged weight, expected finite numbers: take an "
                                 "earlier checkpoint of the adapter")
            results.append((layer, values))
    for layer, values in results:
        if layer in (model.embed, model.head) and model.head is not None and model.head.weight is model.embed.weight:
            model.head.weight = Parameter(layer.weight.data.copy(), requires_grad=False)
        saved = [a.copy() for a in _arrays(layer)]
        for adaptation in _hung_on(layer):
            adaptation.saved = saved
        _write(layer, values)


def unmerge_adapter(model: Transformer) -> None:
    """Undo merge_adapter: every weight is again exactly what it was. Without a merge, nothing happens."""
    for layer in _products(model):
        if layer.adaptation.saved is not None:
            _write(layer, layer.adaptation.saved)
            for adaptation in _hung_on(layer):
                adaptation.saved = None
            if layer in (model.embed, model.head) and model.head is not None and model.cfg.tie_embeddings:
                model.head.weight = model.embed.weight


def merge_and_unload(model: Transformer) -> Transformer:
    """A new plain Transformer, without adapters, whose weights are the merged ones. `model` stays as it is."""
    was_merged = any(a.saved is not None for a in adaptations(model))
    merge_adapter(model)
    try:
        cfg = deepcopy(model.cfg)
        cfg.tie_embeddings = model.head is not None and model.head.weight is model.embed.weight
        plain = Transformer(cfg, None, str(model.embed.weight.dtype)).to(device_of(model.embed.weight.data).name)
        own = {path for path, _ in plain.named_parameters()}
        plain.load_state_dict({path: value for path, value in model.state_dict().items() if path in own})
    finally:
        if not was_merged:
            unmerge_adapter(model)
    return plain.train(model.training)


def count_parameters(model: Module) -> dict[str, Any]:
    """{"trainable", "total", "share"}: how many numbers the model holds (adapters included, and those of few bits), and how
    many of them train."""
    sizes = [(p.size, p.requires_grad) for _, p in model.named_parameters()]
    sizes += [(prod(m.weight.shape), False) for _, m in model.named_modules()
              if isinstance(m, Linear) and not isinstance(m, PackedLinear) and not isinstance(m.weight, Tensor)]
    total, trainable = sum(s for s, _ in sizes), sum(s for s, t in sizes if t)
    return {"trainable": trainable, "total": total, "share": trainable / total}


def adapter_names(model: Transformer) -> list[str]:
    """The adapters on a model, in the order in which they came."""
    return list(model.adapter_configs)


def adapters_of(model: Transformer, name: str = "default") -> dict[str, Any]:
    """Module path -> Adapter, for one adapter. Raises KeyError if the model has none of that name."""
    _check_names(model, [name])
    adapted_modules = ((path, m.adaptation) for path, m in model.named_modules() if isinstance(m, Adaptable))
    return {path: a.adapters[name] for path, a in adapted_modules if a is not None and name in a.adapters}


def adaptations(model: Module) -> list[Adaptation]:
    """What hangs on the layers of a model."""
    return [m for _, m in model.named_modules() if isinstance(m, Adaptation)]


def layers_to_save(model: Transformer, config: TargetConfig) -> Iterator[tuple[str, tuple[str, ...], Linear | Embedding]]:
    """(path, its names, layer) of every layer that is trained whole beside the adapter: the config's, and a classifier."""
    wanted = list(config.modules_to_save or ())
    if model.classifier is not None and "classifier" not in wanted:
        wanted.append("classifier")
    names = module_names(model)
    modules: dict[str, Any] = dict(model.named_modules())
    for name in wanted:
        paths = [path for path, known in names.items()         # a parent's name (RoBERTa's classifier) means all its layers
                 if any(n == name or n.endswith(f".{name}") or n.startswith(f"{name}.") for n in known)]
        if not paths:
            raise ValueError(f"modules_to_save: got {name!r}, expected a linear layer or table of this model (classifier …)")
        yield from ((path, names[path], modules[path]) for path in paths)


def _products(model: Module) -> Iterator[Any]:
    """Every adapted layer that is one product or one table: blocks of a packed layer belong to their whole."""
    wholes = _wholes(model)
    return (m for _, m in model.named_modules() if getattr(m, "adaptation", None) is not None and id(m) not in wholes)


def _wholes(model: Module) -> dict[int, Any]:
    """The id of each row block -> the packed layer that it is a block of."""
    return {id(block): m for _, m in model.named_modules() if isinstance(m, PackedLinear) for block in m.blocks.values()}


def _hung_on(layer: Any) -> list[Adaptation]:
    return [part.adaptation for _, part in layer.parts() if part.adaptation is not None]


def _arrays(layer: Any) -> list[Any]:
    """The base's own arrays of a layer."""
    return [t.data for t in (layer.weight, layer.bias) if t is not None]


def _write(layer: Any, values: list[Any]) -> None:
    for array, value in zip(_arrays(layer), values, strict=True):
        array[...] = value


def _check_names(model: Transformer, names: list[str]) -> None:
    for name in names:
        if name not in adapter_names(model):
            raise KeyError(f"no adapter {name!r} on this model: it has {', '.join(adapter_names(model)) or 'none'}")


def _refuse_merged(model: Transformer, what: str) -> None:
    if any(a.saved is not None for a in adaptations(model)):
        raise ValueError(f"{what} while adapters are merged: unmerge_adapter(model) first")
