"""Full fine-tuning of the targeted layers, as a method like the others: to compare with, to switch off, to merge.

`model.unfreeze()` trains the whole model in place, norms included, and costs no second copy; this keeps the base beside.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..lora import Replacement, TargetConfig, register
from ..nn import Embedding
from .files import FileFormat


@dataclass(kw_only=True)
class FullConfig(TargetConfig):
    """Full fine-tuning of the targeted layers and tables (None: all linear layers but the head)."""

    method: ClassVar[str] = "full"

    target_modules: list[str] | str | None = "all-linear"


@register("full")
@register("full", Embedding)
class FullFineTuning(Replacement):
    """W' and b' are parameters of their own, which start as copies of W and b: exactly the base.   Trains both."""

    leaves: ClassVar[dict[str, str]] = {"weight": "weight", "bias": "bias"}


FileFormat("full", "FULL", FullConfig).register()
