"""Optimisers: AdamW and SGD write their parameters in place; clipping scales gradients to a largest norm.

Nothing here waits for the device: norms stay arrays, and no decision depends on one. A learning rate may be an array (K,),
one rate for each adapter of a sweep, whose parameters all have a leading axis K.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from ..autograd import Tensor
from ..backend import Array, array_module, device_of, kernels, to_device, to_host


class Optimizer:
    """What the optimisers share: groups of parameters, each with its own options, and the state of every parameter.

    params: Parameters, or groups {"params": [...], "lr": ..., "weight_decay": ...} whose options go before the common ones.
    `state[i]` belongs to the i-th parameter: how many steps it took, and the arrays named in `slots`.

    Raises ValueError for no parameters, one given twice, an unknown option or a bad rate; TypeError for what is no Parameter.
    """

    slots: tuple[str, ...] = ()

    def __init__(self, params: Iterable[Any], **options: Any) -> None:
        given = list(params)
        groups = given if given and isinstance(given[0], dict) else [{"params": given}]
        self.groups: list[dict[str, Any]] = [{**options, **group, "params": list(group["params"])} for group in groups]
        held = [p for group in self.groups for p in group["params"]]
        for p in held:
            if not isinstance(p, Tensor):
                raise TypeError(f"optimiser got a {type(p).__name__}, expected Parameters: pass "
                                "[p for _, p in model.named_parameters(trainable=True)]")
        if not held:
            raise ValueError("optimiser got no parameters: does anything in the model have requires_grad=True?")
        if len({id(p) for p in held}) < len(held):
            raise ValueError("optimiser got one parameter twice: it would be updated twice in a step; list it in one group")
        for group in self.groups:
            unknown = sorted(group.keys() - options.keys() - {"params"})
            if unknown:
                raise ValueError(f"optimiser got the option {unknown[0]!r}, expected one of {', '.join(options)}")
            group["lr"] = _checked_rate(group["lr"], group["params"])
        self.state: list[dict[str, Any]] = [
            {"step": 0, **{slot: array_module(p.data).zeros_like(p.data) for slot in self.slots}} for p in held]

    def step(self, factor: float = 1.0) -> None:
        """Update every parameter that has a gradient, in place. factor: of the schedule; multiplies every group's rate."""
        states = iter(self.state)
        for group in self.groups:
            lr = group["lr"] * factor                          # a number, or (K,)
            due = []
            for p in group["params"]:
                state = next(states)
                if p.grad is not None:
                    state["step"] += 1
                    due.append((p, state))
            if due:
                self.update_all(due, group, lr)

    def update_all(self, due: list[tuple[Any, dict[str, Any]]], group: dict[str, Any], lr: Any) -> None:
        """One step of several parameters and their states; lr is a number, or (K,)."""
        for p, state in due:
            self.update(p, state, group, lr if isinstance(lr, float) else lr.reshape(-1, *[1] * (p.ndim - 1)))

    def update(self, p: Any, state: dict[str, Any], group: dict[str, Any], lr: Any) -> None:
        """One step of one parameter; lr is a number or broadcasts to p."""
        raise TypeError(f"{type(self).__name__} defines no update")

    def zero_grad(self) -> None:
        """Forget the gradients of all parameters held here."""
        for group in self.groups:
            for p in group["params"]:
                p.grad = None

    def state_dict(self) -> dict[str, np.ndarray]:
        """The state as copies on the host: "0.step", "0.m", … by the number of the parameter."""
        return {f"{i}.{name}": np.array(to_host(value)) for i, state in enumerate(self.state) for name, value in state.items()}

    def load_state_dict(self, saved: dict[str, np.ndarray]) -> None:
        """Take over a state. Raises ValueError if names or shapes do not fit; then nothing has changed."""
        own = self.state_dict()
        if own.keys() != saved.keys():
            odd = sorted(own.keys() ^ saved.keys())[0]
            raise ValueError(f"optimiser state does not fit: {odd!r} is only on one side; expected the state of "
                             f"{type(self).__name__} over the same parameters")
        for name, value in own.items():
            if value.shape != saved[name].shape:
                raise ValueError(f"optimiser state {name}: got shape {saved[name].shape}, expected {value.shape}")
        for i, state in enumerate(self.state):
            state["step"] = int(saved[f"{i}.step"])
            for slot in self.slots:
                array = state[slot]
                array[...] = to_device(np.asarray(saved[f"{i}.{slot}"], array.dtype), device_of(array).name)


class AdamW(Optimizer):
    """AdamW: Adam (Kingma & Ba, arXiv:1412.6980) with decoupled weight decay (Loshchilov & Hutter, arXiv:1711.05101).

        m ← β₁ m + (1-β₁) g,    v ← β₂ v + (1-β₂) g²,    m̂ = m/(1-β₁ᵗ),    v̂ = v/(1-β₂ᵗ),
        p ← p - η λ p - η m̂ / (√v̂ + ε).

    The decay acts on p itself, not through g, so it is not divided by √v̂. η is the group's lr times the schedule's factor,
    λ is weight_decay, t counts the steps in which this parameter had a gradient.
    """

    slots = ("m", "v")

    def __init__(self, params: Iterable[Any], lr: Any = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
                 weight_decay: float = 0.01) -> None:
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)

    def update_all(self, due: list[tuple[Any, dict[str, Any]]], group: dict[str, Any], lr: Any) -> None:
        arrays = [(p.data, p.grad, state["m"], state["v"], state["step"]) for p, state in due]
        kernels(*(p.data for p, _ in due)).adamw_all(arrays, lr, group["betas"], group["eps"], group["weight_decay"])


class SGD(Optimizer):
    """Stochastic gradient descent with momentum μ:   u ← μ u + g + λ p,    p ← p - η u.   (Decay as an L2 penalty.)"""

    def __init__(self, params: Iterable[Any], lr: Any, momentum: float = 0.0, weight_decay: float = 0.0) -> None:
        self.slots = ("momentum",) if momentum else ()
        super().__init__(params, lr=lr, weight_decay=weight_decay)
        self.momentum = momentum

    def update(self, p: Any, state: dict[str, Any], group: dict[str, Any], lr: Any) -> None:
        data, u = p.data, p.grad
        if group["weight_decay"]:
            u = u + group["weight_decay"] * data
        if self.momentum:
            velocity = state["momentum"]
            velocity *= self.momentum
            velocity += u
            u = velocity
        data -= lr * u


def clip_grad_norm(params: Iterable[Any], max_norm: float, groups: int | None = None) -> Array:
    """Scale all gradients by min(1, max_norm / ‖g‖), in place, and return ‖g‖ as it was: a 0-d array on the device.

    ‖g‖ is the 2-norm of all gradients together. groups=K: parameters (K, …) of K adapters side by side, each clipped by its
    own norm -> (K,). A factor of 1 is exact. Raises ValueError for max_norm <= 0, or if no parameter has a gradient.
    """
    with_grad = [p for p in params if p.grad is not None]
    if not max_norm > 0:
        raise ValueError(f"clip_grad_norm: max_norm = {max_norm}, expected a number > 0")
    if not with_grad:
        raise ValueError("clip_grad_norm: no parameter has a gradient; call backward() first")
    xp = array_module(with_grad[0].grad)
    norm = xp.sqrt(_add_up((p.grad * p.grad).reshape(groups or 1, -1).sum(axis=1) for p in with_grad))     # (1,) or (K,)
    factor = max_norm / xp.maximum(norm, max_norm)
    for p in with_grad:
        p.grad *= factor.reshape(-1, *[1] * (p.ndim - 1)) if p.ndim else factor[0]
    return norm[0] if groups is None else norm


def _add_up(arrays: Iterator[Array]) -> Array:
    total = next(arrays)
    for array in arrays:
        total = total + array
    return total


def _checked_rate(lr: Any, params: Sequence[Any]) -> Any:
    """A rate as a Python float, or an array (K,) on the parameters' device and in their dtype."""
    if isinstance(lr, (int, float, np.number)):
        if not (math.isfinite(lr) and lr >= 0):
            raise ValueError(f"learning rate {lr}, expected a finite number >= 0")
        return float(lr)
    host, p = to_host(lr), params[0].data
    if host.ndim != 1 or not (np.isfinite(host).all() and (host >= 0).all()):
        raise ValueError(f"learning rates of shape {host.shape}, expected (K,) finite numbers >= 0")
    if any(q.ndim == 0 or q.shape[0] != len(host) for q in params):
        raise ValueError(f"{len(host)} learning rates, expected parameters with a leading axis of that length")
    return to_device(host.astype(p.dtype), device_of(p).name)
