"""Parameter and Module: a tree of named arrays.

A Module's parameters and children are simply its attributes (also inside lists and dicts), in the order of assignment; their
path joins the attribute names with dots. A parameter that is reachable twice (tied embeddings, the blocks of a packed weight)
is listed once, under its first path.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Self

import numpy as np

from ..autograd import Tensor
from ..backend import device_of, to_device, to_host


class Parameter(Tensor):
    """A leaf Tensor of a model. Its array is allocated once and written in place: `p.data[...] = values`."""

    __slots__ = ()

    def __init__(self, data: Any, requires_grad: bool = True) -> None:
        super().__init__(data, requires_grad)


class Module:
    """The base of all layers. Subclasses define `forward`; calling the module calls it."""

    training = True

    @property
    def repeatable(self) -> bool:
        """Whether a second call would do the same (its children not counted): no random numbers, nothing set for one pass."""
        return True

    @property
    def rowwise(self) -> bool:
        """Whether, besides, every row of the batch is treated by itself, so that threads may share the rows out."""
        return self.repeatable

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError(f"{type(self).__name__} defines no forward")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.forward(*args, **kwargs)

    def named_modules(self, prefix: str = "") -> Iterator[tuple[str, Module]]:
        """(path, module) of this module and all below it, each once."""
        return ((path, item) for path, item in _walk(self, prefix, set()) if isinstance(item, Module))

    def named_parameters(self, trainable: bool | None = None) -> Iterator[tuple[str, Parameter]]:
        """(path, Parameter), in order. trainable: only those that require a gradient (True), or do not (False)."""
        for path, item in _walk(self, "", set()):
            if isinstance(item, Parameter) and trainable in (None, item.requires_grad):
                yield path, item

    def named_generators(self) -> Iterator[tuple[str, np.random.Generator]]:
        """(path, numpy Generator): the sources of dropout masks, whose states belong into a checkpoint."""
        return ((path, item) for path, item in _walk(self, "", set()) if isinstance(item, np.random.Generator))

    def get_module(self, path: str) -> Module:
        """The module at a path such as "layers.0.attn.q_proj". Raises KeyError if there is none."""
        for name, module in self.named_modules():
            if name == path:
                return module
        raise KeyError(f"no module {path!r} in this model")

    def freeze(self) -> Self:
        """Let no parameter require a gradient. Returns the module."""
        for _, parameter in self.named_parameters():
            parameter.requires_grad = False
        return self

    def unfreeze(self) -> Self:
        """Let every parameter require a gradient (full fine-tuning). Returns the module."""
        for _, parameter in self.named_parameters():
            parameter.requires_grad = True
        return self

    def zero_grad(self) -> None:
        """Forget all gradients."""
        for _, parameter in self.named_parameters():
            parameter.grad = None

    def train(self, mode: bool = True) -> Self:
        """Training mode: dropout is active. Nothing is merged or unmerged by it."""
        for _, module in self.named_modules():
            module.training = mode
        return self

    def eval(self) -> Self:
        """Evaluation mode: dropout is off."""
        return self.train(False)

    def to(self, device: str) -> Self:
        """Move all arrays to "cpu" or "gpu". The one occasion on which a parameter's array is replaced. Returns the module."""
        for _, module in self.named_modules():
            module.move(device)
        return self

    def move(self, device: str) -> None:
        """Move this module's own arrays (not its children's)."""
        for value in vars(self).values():
            if isinstance(value, Parameter):
                value.data, value.grad = to_device(value.data, device), None

    def state_dict(self) -> dict[str, np.ndarray]:
        """Copies of all parameters on the host, by path."""
        return {path: to_host(p.data).copy() for path, p in self.named_parameters()}

    def load_state_dict(self, state: dict[str, np.ndarray]) -> None:
        """Write values into the parameters, in place.

        Raises KeyError for missing or unexpected paths and ValueError for a wrong shape; then nothing has been written.
        """
        own = dict(self.named_parameters())
        missing, unexpected = own.keys() - state.keys(), state.keys() - own.keys()
        if missing or unexpected:
            raise KeyError(f"state does not fit the model: missing {_some(missing)}, unexpected {_some(unexpected)}")
        for path, p in own.items():
            if tuple(state[path].shape) != p.shape:
                raise ValueError(f"{path}: got shape {tuple(state[path].shape)}, expected {p.shape}")
        values = {path: np.asarray(state[path], dtype=p.dtype) for path, p in own.items()}     # raises before the first write
        for path, p in own.items():
            p.data[...] = to_device(values[path], device_of(p.data).name)


def _some(names: Any) -> str:
    names = sorted(names)
    return "none" if not names else ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _walk(item: Any, path: str, seen: set[int]) -> Iterator[tuple[str, Any]]:
    """(path, object) of every Module, Parameter and Generator below `item`, depth first, each once."""
    if isinstance(item, (Module, Parameter, np.random.Generator)):
        if id(item) in seen:
            return
        seen.add(id(item))
        yield path, item
    children: Any = ()
    if isinstance(item, Module):
        children = vars(item).items()
    elif isinstance(item, dict):
        children = item.items()
    elif isinstance(item, (list, tuple)):
        children = enumerate(item)
    for name, child in children:
        yield from _walk(child, f"{path}.{name}" if path else str(name), seen)
