"""The report on an adapter: for every module, how large its update is, how much rank it uses, and what it does to W.

Of a model, `adapters_of` gives the factors; of a directory, PEFT's files do. Either way ΔW = s·B@A is never formed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from os import PathLike
from statistics import fmean
from typing import Any, ClassVar

from tqdm.std import tqdm

from ..backend import Array, device_of, to_device
from ..backend.parallel import in_order
from ..lora import disable_adapter
from ..lora.config import module_names
from ..lora.layer import dense
from ..lora.svd import singular_values
from ..nn import Transformer
from .base import alignment, amplification, gram_svd, intruder_count, top_projection
from .measures import measures
from .update import Update, found_in

MEANS = ("rank", "effective_rank", "stable_rank", "participation_ratio", "energy_rank_90", "relative_norm", "amplification",
         "intruder_count")


@dataclass
class Report:
    """What `analyze` found.

    modules: name -> its numbers, as in `to_dict`. left_out: name -> why this module has none.
    """

    modules: dict[str, dict[str, Any]]
    left_out: dict[str, str]

    columns: ClassVar[dict[str, str]] = {
        "shape": "shape", "rank": "rank", "scale": "s", "frobenius_norm": "‖ΔW‖", "relative_norm": "‖ΔW‖/‖W‖",
        "amplification": "amplif.", "intruder_count": "intruders", "effective_rank": "eff. rank", "stable_rank": "stable",
        "energy_rank_90": "90 %"}

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
        energy_rank_90 …), rank, scale and shape (out, in), and with base weights what `analyze` says of them: amplification
        is None where it is not defined (an update of zero, or directions in which W is zero).
        """
        return {"modules": self.modules, "summary": self.summary(), "left_out": self.left_out}

    def table(self) -> str:
        """The modules as rows of text, and a line that sums them up."""
        columns = {key: head for key, head in self.columns.items() if any(key in row for row in self.modules.values())}
        left = (f"left out: {name}, {why}" for name, why in self.left_out.items())
        return "\n".join([*text_table(columns, self.modules), self.ending(), *left])

    def ending(self) -> str:
        """The line below the table."""
        total = self.summary()
        text = f"{total['modules']} modules, {total['parameters']:,} parameters, ‖ΔW‖ = {total['frobenius_norm']:.4g} in all"
        if self.modules:
            text += f", mean effective rank {total['mean_effective_rank']:.3g} of {total['mean_rank']:.3g}"
        return text

    def __str__(self) -> str:
        return self.table()


def analyze(model_or_directory: Transformer | str | PathLike[str], base: Any = None, name: str = "default", *,
            intruders: bool | None = None) -> Report:
    """The singular values of every ΔW = s·B@A of an adapter, and what they say about it.

    model_or_directory: a model, whose adapter `name` is read and whose module names are used; or a directory with an adapter
    in PEFT's files, under the files' own names. base: the model whose weights W the update is compared with (or what has
    weight_of(name) -> W, as a directory read by minilora.analyze has); a model serves itself. With a base each module gets

        relative_norm = ‖ΔW‖_F / ‖W‖_F,      amplification = ‖ΔW‖_F / ‖Uᵀ W V‖_F,

    U and V being the left and right singular vectors of ΔW: how much stronger the update is than what W already does in the
    update's own directions (Hu et al. 2021, arXiv:2106.09685, section 7.3).

    intruders: whether to do what takes W's SVD (`rank/base.py` states the cost); by default when a base is given. It adds
    intruder_count, of the 10 first left singular vectors of W + ΔW those with all |cos| < 0.5 to W's; intruder_cosines, their
    largest |cos|; rotation, the angles by which W's 10 first were turned, in radians; and the other numbers of section 7.3's
    table: base_norm, and what W does in ΔW's directions (projection), in its own top ones and in random ones.

    Raises KeyError if there is no such adapter or the base lacks a module, ValueError for factors that are not finite or do
    not have the base's shape, TypeError for a base that is neither, and for a directory as read_adapter does.
    """
    if not (base is None or isinstance(base, Transformer) or hasattr(base, "weight_of")):
        raise TypeError(f"base: got {type(base).__name__}, expected a Transformer; load one with load_pretrained")
    intruders = base is not None if intruders is None else intruders
    updates, left_out = found_in(model_or_directory, name)
    if base is None and isinstance(model_or_directory, Transformer):
        base = model_or_directory
    weights = _weights(base, list(updates)) if base is not None else {}
    model = base if isinstance(base, Transformer) else None
    on_host = model is None or device_of(model.embed.weight.data).name == "cpu"
    with disable_adapter(model) if model is not None else nullcontext():   # W is the plain base, whatever is merged into it
        one = partial(_row, weights, intruders)
        rows = (in_order if on_host else map)(one, updates.items())
        return Report(dict(zip(updates, tqdm(rows, "analyze", len(updates), delay=2, disable=None, leave=False))), left_out)


def _weights(base: Any, names: list[str]) -> dict[str, Callable[[], Array]]:
    """name -> what gives the base's weight (out, in). Names of a model are ours or the files'."""
    if not isinstance(base, Transformer):
        return {name: partial(base.weight_of, name) for name in names}
    paths, layers = {name: path for path, known in module_names(base).items() for name in known}, dict(base.named_modules())
    missing = [name for name in names if name not in paths]
    if missing:
        raise KeyError(f"the base has no module {missing[0]!r}: expected the model that the adapter was trained on")
    return {name: partial(lambda layer: dense(layer).data, layers[paths[name]]) for name in names}


def _row(weights: Mapping[str, Callable[[], Array]], intruders: bool, item: tuple[str, Update]) -> dict[str, Any]:
    """All that is said about one module."""
    name, update = item
    row = {"rank": update.A.shape[0], "scale": update.scale, "shape": list(update.shape)}
    row = measures(singular_values(update.B, update.A, update.scale)) | row
    if name not in weights:
        return row
    W = weights[name]()                                                    # (out, in)
    if W.shape != update.shape:
        raise ValueError(f"{name}: got an update of shape {update.shape}, expected the base weight's {tuple(W.shape)}; "
                         "compare with the model that the adapter was trained on")
    device = device_of(W).name
    update = Update(to_device(update.A, device), to_device(update.B, device), update.scale)
    sizes = amplification(update, W)
    row |= {key: sizes.pop(key) for key in ("relative_norm", "amplification")}
    if intruders:
        svd = gram_svd(W)
        found = alignment(update, W, base_svd=svd)
        row |= sizes | {"projection_top": top_projection(svd[1], len(update.svd[1])), "rotation": found["rotation"],
                        "intruder_cosines": found["cosines"], "intruder_count": intruder_count(found["cosines"])}
    return row


def text_table(columns: Mapping[str, str], rows: Mapping[str, Mapping[str, Any]], first: str = "module") -> list[str]:
    """Lines of text that line up: a head, then each row's name and its values under `columns` (key -> head)."""
    lines = [[first, *columns.values()], *([name, *(_text(row.get(key)) for key in columns)] for name, row in rows.items())]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return ["  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths)))
            for line in lines]


def _text(value: Any) -> str:
    if isinstance(value, list):
        return "×".join(map(str, value))
    return "-" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)
