"""Five tests that tell a LoRA from something else, and an audit of which arrays a training run changed.

A falling loss proves nothing: recipes that are no LoRA learn too, and some learn better. What makes it LoRA is the rest: it
starts as a no-op, trains few numbers, keeps W, and its update has low rank (Hu et al. 2021, arXiv:2106.09685, section 4.1).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..autograd import Tensor

__all__ = ["Audit", "LoraReport", "audit", "is_lora"]

Arrays = dict[str, Any]


@dataclass(frozen=True)
class LoraReport:
    """What the five tests found: true only if all hold. Shown as five lines of ✓ or ✗.

    ticks: {name of the test: whether it holds}; texts: {name: what was measured}; loss: (base's, at the start, after training).
    """

    ticks: dict[str, bool]
    texts: dict[str, str]
    loss: tuple[float, float, float]

    def __bool__(self) -> bool:
        return all(self.ticks.values())

    def __repr__(self) -> str:
        return "\n".join(f"{'✓' if holds else '✗'} {name}: {self.texts[name]}" for name, holds in self.ticks.items())


def is_lora(weight_fn: Any, params: Mapping[str, Any] | None = None, frozen: Mapping[str, Any] | None = None, *, r: int,
            base: Any = None, data: tuple[Any, Any] | None = None, gradient: Callable[..., Mapping[str, Any]] | None = None,
            steps: int = 300, lr: float = 3e-3, seed: int = 0) -> LoraReport:
    """Train a recipe for an adapted weight, and say whether it is a LoRA of rank r.

    weight_fn(params, frozen) -> W_eff (out, in).  params: {name: array} that is trained; frozen: {name: array} that is not.
    Both are copied, as float64. base: the pretrained W (out, in) that the recipe should adapt; default frozen["W"].
    Or weight_fn is one of our adapters (it has adapted_weight), params is None, and base or frozen["W"] is its layer's weight.

    The five tests, by their names in `ticks`:
        no-op at the start      W_eff = W, bit for bit
        few numbers             trained numbers <= r·(in + out) + r   (the last r: a diagonal, as in AdaLoRA)
        base kept               after training some frozen array still has W's bytes, and no frozen array changed
        low rank                rank(W_eff - W) <= r after training
        learns                  the loss falls below half of the base's

    data: (x (n, in), y (n, out)); default: y = x (W + a planted update of rank r)ᵀ + noise. The loss is the mean of
    (x W_effᵀ - y)², minimised by `steps` of Adam at `lr`.
    gradient(params, frozen, G) -> {name: ∂loss/∂params[name]}, with G = ∂loss/∂W_eff (out, in). Default: autograd, weight_fn
    being called with Tensors as params (so operators, .T, .sum and ml functions work); if it is plain NumPy and cannot take
    Tensors, central differences, two calls of weight_fn for each trained number and step: keep such a recipe small.

    Raises ValueError if the base is not known, or shapes do not fit. An exception inside weight_fn is passed on.
    """
    with np.errstate(all="ignore"):                       # a recipe that blows up is a finding, not a warning
        recipe, values, kept = _recipe(weight_fn, params, frozen)
    W = kept.get("W") if base is None else np.array(base, dtype=np.float64)
    if W is None or W.ndim != 2:
        raise ValueError("is_lora needs the pretrained matrix W (out, in): give base=W, or name it 'W' among the frozen")
    W = W.copy()
    x, y = _planted(W, r, seed) if data is None else (np.asarray(part, dtype=np.float64) for part in data)
    if x.shape != (len(x), W.shape[1]) or y.shape != (len(x), W.shape[0]):
        raise ValueError(f"data of shapes {x.shape} and {y.shape} do not fit W {W.shape}: expected (n, in) and (n, out)")
    before = {name: array.tobytes() for name, array in kept.items()}
    with np.errstate(all="ignore"):
        start = _plain(recipe(values, kept))
    if start.shape != W.shape:
        raise ValueError(f"weight_fn gave shape {start.shape}, expected W's {W.shape} (out, in)")
    with np.errstate(all="ignore"):
        first = _loss(start, x, y)
        _train(recipe, values, kept, gradient, x, y, steps, lr)
        end = _plain(recipe(values, kept))
        last, own = _loss(end, x, y), _loss(W, x, y)
    count = sum(array.size for array in _arrays(values).values())
    most = r * (W.shape[0] + W.shape[1]) + r
    changed = [name for name, array in kept.items() if array.tobytes() != before[name]]
    held = [name for name, array in kept.items() if array.shape == W.shape and array.tobytes() == W.tobytes()]
    rank = _rank(end - W, W)
    away = float(np.abs(start - W).max(initial=0.0))
    found = {
        "no-op at the start": (np.array_equal(start, W),
                               "W_eff is W" if away == 0 else f"W_eff is up to {away:.1e} away from W"),
        "few numbers": (count <= most, f"{count} trained; r(in + out) + r is {most}, W has {W.size}"),
        "base kept": (bool(held) and not changed, f"frozen {', '.join(changed)} changed" if changed else (
            f"{held[0]} has W's bytes after training" if held else "no frozen array holds W")),
        "low rank": (rank is not None and rank <= r, "the update is not finite" if rank is None else
                     f"the update has rank {rank}, r is {r}"),
        "learns": (last < 0.5 * own, f"loss {first:.4g} at the start, {last:.4g} after {steps} steps; the base has {own:.4g}"),
    }
    return LoraReport({name: bool(holds) for name, (holds, _) in found.items()},
                      {name: text for name, (_, text) in found.items()}, (own, first, last))


def _recipe(weight_fn: Any, params: Any, frozen: Any) -> tuple[Callable[..., Any], dict[str, Any], Arrays]:
    """(the recipe, its trained values as Tensors or arrays, its frozen arrays), on copies in float64."""
    kept = {name: np.array(array, dtype=np.float64) for name, array in (frozen or {}).items()}
    if hasattr(weight_fn, "adapted_weight"):
        adapter = copy.deepcopy(weight_fn)
        for _, parameter in adapter.named_parameters():
            parameter.data = parameter.data.astype(np.float64)
        own = dict(adapter.named_parameters(trainable=True))
        return lambda p, f: adapter.adapted_weight(Tensor(f["W"])), own, kept
    if params is None:
        raise ValueError("is_lora(weight_fn, params, frozen, r=...): got no params; expected {name: array} that is trained")
    arrays = {name: np.array(array, dtype=np.float64) for name, array in params.items()}
    leaves: dict[str, Any] = {name: Tensor(array, requires_grad=True) for name, array in arrays.items()}
    try:
        tensors = isinstance(weight_fn(leaves, copy.deepcopy(kept)), Tensor)
    except Exception:                                     # plain NumPy does not take Tensors; a true error comes again below
        tensors = False
    return weight_fn, leaves if tensors else arrays, kept


def _train(recipe: Callable[..., Any], values: dict[str, Any], kept: Arrays, gradient: Callable[..., Any] | None,
           x: np.ndarray, y: np.ndarray, steps: int, lr: float) -> None:
    """Adam on the arrays of `values`, in place."""
    arrays = _arrays(values)
    m = {name: np.zeros_like(array) for name, array in arrays.items()}
    v = {name: np.zeros_like(array) for name, array in arrays.items()}
    for step in range(1, steps + 1):
        weight = recipe(values, kept)
        G = 2 / y.size * (x @ _plain(weight).T - y).T @ x                    # (out, in)
        if not np.isfinite(G).all():
            return
        if gradient is not None:
            grads = gradient(arrays, kept, G)
        elif isinstance(weight, Tensor):
            for leaf in values.values():
                leaf.grad = None
            (weight * Tensor(G)).sum().backward()
            grads = {name: leaf.grad for name, leaf in values.items()}
        else:
            grads = _differences(recipe, arrays, kept, G)
        for name, array in arrays.items():
            g = 0.0 if grads.get(name) is None else np.asarray(grads[name])
            m[name] += 0.1 * (g - m[name])
            v[name] += 0.001 * (g * g - v[name])
            array -= lr * (m[name] / (1 - 0.9**step)) / (np.sqrt(v[name] / (1 - 0.999**step)) + 1e-8)


def _differences(recipe: Callable[..., Any], arrays: Arrays, kept: Arrays, G: np.ndarray, eps: float = 1e-5) -> Arrays:
    """∂⟨G, W_eff⟩/∂params by central differences."""
    grads = {name: np.zeros_like(array) for name, array in arrays.items()}
    for name, array in arrays.items():
        for index in np.ndindex(array.shape):
            value = array[index]
            array[index] = value + eps
            above = recipe(arrays, kept)
            above = float((G * above).sum())
            array[index] = value - eps
            grads[name][index] = (above - float((G * recipe(arrays, kept)).sum())) / (2 * eps)
            array[index] = value
    return grads


def _planted(W: np.ndarray, r: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """x (n, in) and y (n, out) of the base plus an update of rank r that moves y by 0.5 on average, and noise of 0.02."""
    rng = np.random.default_rng(seed)
    d, k = W.shape
    update = rng.standard_normal((d, r)) @ rng.standard_normal((r, k))
    update *= 0.5 * d**0.5 / np.linalg.norm(update)
    x = rng.standard_normal((6 * k + 64, k))
    return x, x @ (W + update).T + 0.02 * rng.standard_normal((len(x), d))


def _rank(update: np.ndarray, W: np.ndarray) -> int | None:
    """The rank of W_eff - W, counting singular values above what rounding leaves; None if it is not finite."""
    if not np.isfinite(update).all():
        return None
    sigma = np.linalg.svd(update, compute_uv=False)
    return int((sigma > 1e-8 * max(float(np.linalg.norm(W, 2)), float(sigma[0]))).sum())


def _loss(W: np.ndarray, x: np.ndarray, y: np.ndarray) -> float:
    return float(np.mean((x @ W.T - y) ** 2))


def _plain(value: Any) -> np.ndarray:
    return np.array(value.data if isinstance(value, Tensor) else value, dtype=np.float64)


def _arrays(values: Mapping[str, Any]) -> Arrays:
    return {name: value.data if isinstance(value, Tensor) else value for name, value in values.items()}


@dataclass(frozen=True)
class Audit:
    """Which arrays changed, by their bytes. Shown as one line a group; the groups are tuples of names, sorted."""

    changed: tuple[str, ...]
    unchanged: tuple[str, ...]
    reshaped: tuple[str, ...]            # another shape or dtype
    appeared: tuple[str, ...]
    vanished: tuple[str, ...]
    sizes: dict[str, int]                # numbers in each array

    def __repr__(self) -> str:
        lines = []
        for group in ("changed", "unchanged", "reshaped", "appeared", "vanished"):
            names = getattr(self, group)
            if names or group in ("changed", "unchanged"):
                shown = ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
                lines.append(f"{group}: {len(names)} arrays, {sum(self.sizes[name] for name in names):,} numbers"
                             + (f" ({shown})" if names else ""))
        return "\n".join(lines)


def audit(before: Any, after: Any) -> Audit:
    """What happened between two states: {name: array} each, or anything with state_dict().

    `before` must be copies. Raises ValueError if an array of `before` shares its memory with `after`'s: both would change.
    """
    old, new = _state(before), _state(after)
    shared = [name for name in old if name in new and old[name].size and np.shares_memory(old[name], new[name])]
    if shared:
        raise ValueError(f"before and after share the memory of {shared[0]}: take copies before training, "
                         "{name: array.copy() for name, array in model.state_dict().items()}")
    both = sorted(old.keys() & new.keys())
    same_form = [name for name in both if old[name].shape == new[name].shape and old[name].dtype == new[name].dtype]
    changed = tuple(name for name in same_form if old[name].tobytes() != new[name].tobytes())
    return Audit(changed, tuple(name for name in same_form if name not in changed),
                 tuple(name for name in both if name not in same_form), tuple(sorted(new.keys() - old.keys())),
                 tuple(sorted(old.keys() - new.keys())), {name: array.size for name, array in {**old, **new}.items()})


def _state(state: Any) -> dict[str, np.ndarray]:
    found = state.state_dict() if hasattr(state, "state_dict") else state
    return {name: np.asarray(value.data if isinstance(value, Tensor) else value) for name, value in found.items()}
