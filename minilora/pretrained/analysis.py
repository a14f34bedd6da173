"""The rank report with a base read from disk, a tensor at a time and under the files' own names, without a model."""

from __future__ import annotations

import os

import numpy as np

from ..nn import Transformer
from ..rank import report
from .adapters import AdapterFolder
from .hub import located
from .load import load_pretrained
from .merge import BIASES, HEAD, adapter_plan, stored_flipped, tied_table
from .tensors import Checkpoint


class StoredBase:
    """The weights that an adapter's folder changes, in the checkpoint of its base.

    Raises FileNotFoundError and ValueError for damaged folders and a base that does not fit the adapter.
    """

    def __init__(self, base: str | os.PathLike[str], directory: str | os.PathLike[str]) -> None:
        self.checkpoint, self.adapter = Checkpoint(base), AdapterFolder(directory, BIASES)
        plan = adapter_plan(self.checkpoint, self.adapter)
        table = tied_table(self.checkpoint, plan)
        self.keys = {path: table if key == HEAD and key not in self.checkpoint.files else key
                     for key, (path, kind) in plan.items() if kind == "delta"}

    def weight_of(self, path: str) -> np.ndarray:          # -> (out, in)
        """The weight of one module: turned where it is stored (in, out), as GPT-2's are; BF16 as float32."""
        W = self.checkpoint.array(str(self.keys[path]))
        return W.T if stored_flipped(self.adapter, path, W.shape) else W


def analyze(model_or_directory: Transformer | str | os.PathLike[str],
            base: Transformer | str | os.PathLike[str] | None = None, name: str = "default", *,
            intruders: bool | None = None) -> report.Report:
    """The singular values of every ΔW = s·B@A of an adapter, and what they say about it, beside its base if one is given.

    model_or_directory: a model with the adapter `name`, or a folder with an adapter in PEFT's files (any model's; modules have
    the files' own names). base: a model, a folder with safetensors, or what load_pretrained takes. The report and `intruders`
    are described at rank.report.analyze: report.to_dict()["modules"][NAME] has singular_values, effective_rank …, and with a
    base relative_norm, amplification, intruder_count …

    Raises KeyError if there is no such adapter or the base model lacks a module, ValueError for values that are not finite,
    damaged files and a base of other shapes, FileNotFoundError for folders that are not there, TypeError for another base.
    """
    if isinstance(base, (str, os.PathLike)):
        if not isinstance(model_or_directory, Transformer) and (folder := located(base)).is_dir():
            return report.analyze(model_or_directory, StoredBase(folder, model_or_directory), intruders=intruders)
        base = load_pretrained(str(base))[0]
    return report.analyze(model_or_directory, base, name, intruders=intruders)
