"""How much rank would have been enough? And how did the rank of an update grow while it was trained?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from os import PathLike
from typing import Any, ClassVar

from tqdm.std import tqdm

from ..autograd import no_grad
from ..lora import adapters_of, truncate
from ..lora.svd import singular_values
from ..nn import Transformer
from .measures import eckart_young_errors, energy_rank, measures
from .report import Report
from .update import found_in, set_factors, updates

FOLLOWED = ("frobenius_norm", "effective_rank", "stable_rank", "energy_rank_90")


@dataclass
class Advice(Report):
    """What `advise` found. losses: {"before", "after"} with every module cut, if a loss was given."""

    losses: dict[str, float] = field(default_factory=dict)

    columns: ClassVar[dict[str, str]] = {"shape": "shape", "rank": "rank", "advised_rank": "advised", "error": "error",
                                         "loss_change": "loss change"}

    def summary(self) -> dict[str, Any]:
        """Numbers of all modules together: error is √Σ‖what is cut‖² / √Σ‖ΔW‖²."""
        rows = list(self.modules.values())
        size = sum(row["frobenius_norm"] ** 2 for row in rows)
        cut = sum((row["error"] * row["frobenius_norm"]) ** 2 for row in rows)
        return {"modules": len(rows), "error": (cut / size) ** 0.5 if size else 0.0,
                "parameters": sum(row["rank"] * sum(row["shape"]) for row in rows),
                "advised_parameters": sum(row["advised_rank"] * sum(row["shape"]) for row in rows)} | {
                    f"loss_{when}": value for when, value in self.losses.items()}

    def ending(self) -> str:
        """The line below the table."""
        total = self.summary()
        text = (f"{total['parameters']:,} parameters, {total['advised_parameters']:,} as advised, "
                f"error {total['error']:.3g} in all")
        return text + (f", loss {self.losses['before']:.4g} to {self.losses['after']:.4g}" if self.losses else "")


def advise(model_or_directory: Transformer | str | PathLike[str], share: float = 0.9,
           loss: Callable[[Transformer], float] | None = None, name: str = "default") -> Advice:
    """For every module of an adapter the least rank that keeps `share` of its Σσ², and what that costs.

    error is that of Eckart and Young, ‖ΔW − ΔW_q‖_F / ‖ΔW‖_F ≤ √(1 − share), which `resize(..., energy=share)` will measure.
    advised_rank is at least 1. loss(model), lower is better, is measured before and after all are cut, and with each module
    cut alone (loss, loss_change): one call for each and two more. Factors are cut in place for it, and restored bit for bit.

    Raises ValueError for a share outside (0, 1] and for a loss without a model, and as `analyze` does.
    """
    found, left_out = found_in(model_or_directory, name)
    rows: dict[str, dict[str, Any]] = {}
    for path, update in found.items():
        S = singular_values(update.B, update.A, update.scale)
        q = max(1, energy_rank(S, share))
        errors = eckart_young_errors(S, relative=True)
        rows[path] = {"rank": update.A.shape[0], "shape": list(update.shape), "advised_rank": q, "error": float(errors[q]),
                      "frobenius_norm": float(eckart_young_errors(S)[0])}
    result = Advice(rows, left_out)
    if loss is None:
        return result
    if not isinstance(model_or_directory, Transformer):
        raise ValueError("loss: got one for a directory, expected a model to measure it on: load_adapter onto its base first")
    model, adapters = model_or_directory, adapters_of(model_or_directory, name)
    kept = {path: (update.A.copy(), update.B.copy()) for path, update in found.items()}

    def measured(paths: Sequence[str]) -> float:
        try:
            for path in paths:
                B, A = truncate(kept[path][1], kept[path][0], rows[path]["advised_rank"])
                set_factors(adapters[path], A, B)
            with no_grad():
                return float(loss(model))
        finally:
            for path in paths:
                set_factors(adapters[path], *kept[path])

    result.losses = {"before": measured([]), "after": measured(list(rows))}
    for path in tqdm(rows, "advise", delay=2, disable=None, leave=False):
        rows[path]["loss"] = value = measured([path])
        rows[path]["loss_change"] = value - result.losses["before"]
    return result


class Recorder:
    """A callback for `train` that follows the rank of an adapter: `train(..., callback=Recorder(every=10))`.

    At step 1 and then every `every` updates it takes the singular values of each module from its thin factors, O((d + k) r²),
    and keeps the measures named in `follow`. steps: when; modules: path -> measure -> its values.
    """

    def __init__(self, every: int = 10, name: str = "default", follow: Sequence[str] = FOLLOWED) -> None:
        unknown = sorted(set(follow) - measures([1.0]).keys())
        if every < 1 or unknown:
            raise ValueError(f"got every = {every} and measures {list(follow)}, expected at least 1, and some of "
                             f"{', '.join(measures([1.0]))}")
        self.every, self.name, self.follow = every, name, tuple(follow)
        self.steps: list[int] = []
        self.modules: dict[str, dict[str, list[Any]]] = {}

    def __call__(self, step: int, model: Any, history: Any = None) -> None:
        if step != 1 and step % self.every:
            return
        self.steps.append(step)
        for path, update in updates(model, self.name).items():
            found = measures(singular_values(update.B, update.A, update.scale))
            kept = self.modules.setdefault(path, {key: [] for key in self.follow})
            for key in self.follow:
                kept[key].append(found[key])

    def to_dict(self) -> dict[str, Any]:
        """{"steps": [...], "modules": {path: {measure: [...]}}}, ready for JSON."""
        return {"steps": self.steps, "modules": self.modules}
