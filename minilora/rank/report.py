"""The report on an adapter: for every module, how large its update is, how much rank it uses, and what it amplifies.

Of a model, `adapters_of` gives the factors; of a directory, PEFT's files do. Either way ΔW = s·B@A is never formed.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from os import PathLike
from statistics import fmean
from typing import Any

import numpy as np
from tqdm.std import tqdm

from ..autograd import Tensor
from ..backend import array_module, device_of, to_device
from ..backend.parallel import in_order
from ..lora import adapters_of, disable_adapter, factored_svd
from ..lora.config import module_names
from ..lora.files import read_adapter
from ..lora.svd import singular_values
from ..nn import Transformer
from .measures import measures

MEANS = ("rank", "effective_rank", "stable_rank", "participation_ratio", "energy_rank_90", "relative_norm", "amplification")
COLUMNS = {"shape": "shape", "rank": "rank", "scale": "s", "frobenius_norm": "‖ΔW‖", "relative_norm": "‖ΔW‖/‖W‖",
           "amplification": "amplif.", "effective_rank": "eff. rank", "stable_rank": "stable", "energy_rank_90": "90 %"}
EPSILON = float(np.finfo(np.float64).eps)


@dataclass
class Report:
    """What `analyze` found.

    modules: name -> its numbers, as in `to_dict`. left_out: name -> why this module has none.
    """

    modules: dict[str, dict[str, Any]]
    left_out: dict[str, str]

    def summary(self) -> dict[str, Any]:
        """Totals and means over the modules; a mean leaves out modules that do not have the number."""
        rows = list(self.modules.values())
        total = {"modules": len(rows), "left_out": len(self.left_out),
                 "parameters": sum(row["rank"] * sum(row["shape"]) for row in rows),
                 "frobenius_norm": sum(row["frobenius_norm"] ** 2 for row in rows) ** 0.5}
        found = {key: [row[key] for row in rows if row.get(key) is not None] for key in MEANS}
        return total | {f"mean_{key}": fmean(values) for key, values in found.items() if values}

    def to_dict(self) -> dict[str, Any]:
        """{"modules": {NAME: {...}}, "summary": {...}, "left_out": {NAME: why}}, ready for JSON.

        A module has `measures` of its singular values (singular_values, frobenius_norm, effective_rank, stable_rank,
        energy_rank_90 …), rank, scale and shape (out, in), and with base weights relative_norm and amplification, which is
        None where it is not defined (an update of zero, or directions in which W is zero).
        """
        return {"modules": self.modules, "summary": self.summary(), "left_out": self.left_out}

    def table(self) -> str:
        """The modules as rows of text, and a line that sums them up."""
        columns = {key: head for key, head in COLUMNS.items() if any(key in row for row in self.modules.values())}
        text, total = text_table(columns, self.modules), self.summary()
        ending = f"{total['modules']} modules, {total['parameters']:,} parameters, ‖ΔW‖ = {total['frobenius_norm']:.4g} in all"
        if self.modules:
            ending += f", mean effective rank {total['mean_effective_rank']:.3g} of {total['mean_rank']:.3g}"
        return "\n".join([*text, ending, *(f"left out: {name}, {why}" for name, why in self.left_out.items())])

    __str__ = table


def analyze(model_or_directory: Transformer | str | PathLike[str], base: Transformer | None = None,
            name: str = "default") -> Report:
    """The singular values of every ΔW = s·B@A of an adapter, and what they say about it.

    model_or_directory: a model, whose adapter `name` is read and whose module names are used; or a directory with an adapter
    in PEFT's files, under the files' own names. base: the model whose weights W the update is compared with; a model serves
    itself. name: of a model's adapter. With a base W each module also gets

        relative_norm = ‖ΔW‖_F / ‖W‖_F,      amplification = ‖ΔW‖_F / ‖Uᵀ W V‖_F,

    U and V being the left and right singular vectors of ΔW: how much stronger the update is than what W already does in the
    update's own directions (Hu et al. 2021, arXiv:2106.09685, section 7.3).

    Raises KeyError if there is no such adapter or the base lacks a module, ValueError for factors that are not finite or do
    not have the base's shape, TypeError for a base that is no model, and for a directory as read_adapter does.
    """
    if base is not None and not isinstance(base, Transformer):
        raise TypeError(f"base: got {type(base).__name__}, expected a Transformer; load one with load_pretrained")
    factors: dict[str, tuple[Any, Any, Any]] = {}
    left_out: dict[str, str] = {}
    if isinstance(model_or_directory, Transformer):
        base = base or model_or_directory
        for path, adapter in adapters_of(model_or_directory, name).items():
            if adapter.factors() is None:
                left_out[path] = f"a {type(adapter).__name__}, whose update is no product s·B@A"
            else:
                factors[path] = adapter.factors()
    else:
        for path, entry in read_adapter(model_or_directory)[1].items():
            if "A" not in entry:
                left_out[path] = "saved whole"
            else:
                factors[path] = entry["A"], entry["B"], entry["scale"]
    layers = _layers(base, list(factors)) if base is not None else {}
    with disable_adapter(base) if base is not None else nullcontext():     # W is the plain base, whatever is merged into it
        one = partial(_row, layers)
        rows = map(one, factors.items()) if layers else in_order(one, factors.items())       # a base may be on a GPU
        return Report(dict(zip(factors, tqdm(rows, "analyze", len(factors), delay=2, disable=None, leave=False))), left_out)


def _layers(base: Transformer, names: list[str]) -> dict[str, Any]:
    """name -> layer of the base. Names are ours or the files'."""
    paths = {name: path for path, known in module_names(base).items() for name in known}
    missing = [name for name in names if name not in paths]
    if missing:
        raise KeyError(f"the base has no module {missing[0]!r}: expected the model that the adapter was trained on")
    modules = dict(base.named_modules())
    return {name: modules[paths[name]] for name in names}


def _row(layers: dict[str, Any], factors: tuple[str, tuple[Any, Any, Any]]) -> dict[str, Any]:
    """All that is said about one module."""
    name, (A, B, scale) = factors
    layer = layers.get(name)
    A, B = (t.data if isinstance(t, Tensor) else t for t in (A, B))        # (r, in), (out, r)
    row = {"rank": A.shape[0], "scale": float(scale), "shape": [B.shape[0], A.shape[1]]}
    if layer is None:
        return measures(singular_values(B, A, float(scale))) | row
    if list(layer.weight.shape) != row["shape"]:
        raise ValueError(f"{name}: got an update of shape {tuple(row['shape'])}, expected the base weight's "
                         f"{tuple(layer.weight.shape)}; compare with the model that the adapter was trained on")
    W = layer.weight.data if isinstance(layer.weight, Tensor) else layer.weight.dense()          # (out, in)
    device, norm = device_of(W).name, array_module(W).linalg.norm
    U, S, Vh = factored_svd(to_device(B, device), to_device(A, device), float(scale))
    q = int((EPSILON * max(W.shape) * S[0] < S).sum())                     # past the rank of ΔW directions are arbitrary
    size, whole = float(norm(S)), float(norm(W))
    within = float(norm(U[:, :q].T @ W @ Vh[:q].T)) if q else 0.0
    return measures(S) | row | {"relative_norm": size / whole if whole else None,
                                "amplification": size / within if within else None}


def text_table(columns: Mapping[str, str], rows: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Lines of text that line up: a head, then each row's name and its values under `columns` (key -> head)."""
    lines = [["module", *columns.values()], *([name, *(_text(row.get(key)) for key in columns)] for name, row in rows.items())]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return ["  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths)))
            for line in lines]


def _text(value: Any) -> str:
    if isinstance(value, list):
        return "×".join(map(str, value))
    return "-" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)
