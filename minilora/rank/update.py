"""The update ΔW = s·B@A of one module, as its factors and its SVD: what every comparison in this folder starts from.

`updates` reads them off a model or off a folder of PEFT's files. A dense ΔW, of full fine-tuning say, is one too:
Update(identity, ΔW).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from os import PathLike
from typing import Any

import numpy as np

from ..autograd import Tensor, no_grad
from ..backend import Array, array_module, to_host
from ..lora import adapters_of, factored_svd
from ..lora.peft_format import read_adapter
from ..nn import Transformer
from .subspace import directions

EPSILON = float(np.finfo(np.float64).eps)


@dataclass(frozen=True, eq=False)
class Update:
    """ΔW = scale·B@A with A (r, k) and B (d, r), arrays of one device."""

    A: Array
    B: Array
    scale: float = 1.0

    @property
    def shape(self) -> tuple[int, int]:
        """(d, k), of ΔW."""
        return self.B.shape[0], self.A.shape[1]

    @cached_property
    def svd(self) -> tuple[Array, Array, Array]:           # -> (d, q), (q,), (q, k)
        """(U, S, Vh) of `factored_svd`, cut to the rank that ΔW has: past it directions are arbitrary. q = 0 if ΔW = 0.

        Raises ValueError for factors that are not finite or do not fit each other.
        """
        U, S, Vh = factored_svd(self.B, self.A, self.scale)
        host = to_host(S).astype(np.float64)
        q = int((host > EPSILON * max(self.shape) * host[0]).sum())
        return U[:, :q], S[:q], Vh[:q]

    def directions(self, side: str = "input") -> Array:    # -> (q, k), or (q, d) for "output"
        """Orthonormal rows, by falling singular value: right singular vectors of ΔW (side "input"), left ones ("output").

        "A": those of A alone, as the paper has it, which depend on how ΔW is split into B and A.
        Raises ValueError for another side, and for ΔW = 0, which has no directions.
        """
        if side not in ("input", "output", "A"):
            raise ValueError(f'side: got {side!r}, expected "input", "output" or "A" (the input side, from A alone)')
        found = directions(self.A) if side == "A" else self.svd[0].T if side == "output" else self.svd[2]
        if not len(found):
            raise ValueError("got an update of zero, expected one that has directions; train the adapter first")
        return found

    def __add__(self, other: Update) -> Update:
        """The sum of two updates, its factors side by side. Raises ValueError unless both have one shape."""
        if self.shape != other.shape:
            raise ValueError(f"got updates of shapes {self.shape} and {other.shape}, expected one shape: compare the same "
                             "module of two adapters")
        xp = array_module(self.A, other.A)
        return Update(xp.concatenate([self.A, other.A]), xp.concatenate([self.scale * self.B, other.scale * other.B], axis=1))


def updates(model_or_directory: Transformer | str | PathLike[str], name: str = "default") -> dict[str, Update]:
    """Module -> Update, for an adapter on a model (our paths) or in a directory (the files' own names).

    Raises KeyError without such an adapter, and for a directory as read_adapter does.
    """
    return found_in(model_or_directory, name)[0]


def found_in(source: Transformer | str | PathLike[str], name: str) -> tuple[dict[str, Update], dict[str, str]]:
    """`updates`, and the modules that have none with the reason."""
    found: dict[str, Update] = {}
    left_out: dict[str, str] = {}
    if isinstance(source, Transformer):
        for path, adapter in adapters_of(source, name).items():
            factors: Any = adapter.factors()
            if factors is None:
                left_out[path] = f"a {type(adapter).__name__}, whose update is no product s·B@A"
            else:
                A, B = (t.data if isinstance(t, Tensor) else t for t in factors[:2])
                found[path] = Update(A, B, float(factors[2]))
    else:
        for path, entry in sorted(read_adapter(source, ("lora_bias", "bias"))[1].items(), key=lambda item: _by_number(item[0])):
            if "A" not in entry:
                left_out[path] = "a bias alone" if set(entry) == {"base_bias"} else "saved whole"
            else:
                found[path] = Update(entry["A"], entry["B"], float(entry["scale"]))
    return found, left_out


def _by_number(path: str) -> list[tuple[bool, int, str]]:
    """A key that sorts layer 2 before layer 10."""
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in path.split(".")]


def set_factors(adapter: Any, A: Array, B: Array) -> None:  # (q, k), (d, q)
    """Write factors of rank q ≤ r in an adapter's place; what they do not fill becomes zero. Its scale stays."""
    with no_grad():
        for factor, values, columns in zip(adapter.factors(), (A, B), (False, True)):
            target = factor.data.T if columns else factor.data
            target[...] = 0.0
            target[: values.shape[1 if columns else 0]] = values.T if columns else values
