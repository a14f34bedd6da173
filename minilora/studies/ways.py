"""Every way to adapt, as the study of methods sets it up: its config at a size, its optimiser, and what keeps it from a budget.

The budget is what LoRA of one rank trains on all linear layers. A method with a size of its own takes the largest that is
within it; one that cannot says why.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

from ..lora import LoraConfig, TargetConfig, adapters_of, add_adapter, count_parameters
from ..methods import (
    AdaLoraConfig,
    BitFitConfig,
    GateProx,
    HoulsbyConfig,
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    LoraFAConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    RankAllocator,
    ShiraConfig,
    SoRA,
    SoRAConfig,
    TensorTrainConfig,
    VeraConfig,
    VirtualTokens,
    loraplus_groups,
)
from ..methods.virtual_tokens import VirtualTokensConfig
from ..nn import Transformer, TransformerConfig
from ..pretrained.outline import Outline
from ..training import AdamW, History, TrainConfig, train

ALL, ALPHA, RATIO = "all-linear", 32.0, 16.0               # RATIO: LoRA+'s, of the rates of B and A
FULL, SLACK = "full fine-tuning", 1.02                     # SLACK: a budget is met within two percent
RANK, FITTED = "rank", "fitted"


@dataclass(frozen=True)
class Way:
    """One method. config: (size, updates of the run) -> its config; None: all parameters of the model train, in place.

    rate: where the search of its learning rate begins, on text. size: RANK (LoRA's rank), FITTED (the largest within the
    budget), or a number where there is nothing to choose; why says then what keeps it from the budget.
    """

    config: Callable[[int, int], TargetConfig] | None
    rate: float
    size: int | str = RANK
    why: str = ""


def _adalora(size: int, steps: int) -> AdaLoraConfig:
    """It starts at one and a half times the rank, as in its paper."""
    times: dict[str, Any] = {"init_r": size + size // 2, "target_r": size, "tinit": steps // 10, "tfinal": steps // 4,
            "deltaT": max(1, steps // 40), "total_step": steps}
    return AdaLoraConfig(lora_alpha=ALPHA, target_modules=ALL, **times)


WAYS: dict[str, Way] = {
    "LoRA": Way(lambda r, _: LoraConfig(r=r, lora_alpha=ALPHA, target_modules=ALL), 1e-2),
    "rsLoRA": Way(lambda r, _: LoraConfig(r=r, lora_alpha=ALPHA, use_rslora=True, target_modules=ALL), 1e-2),
    "LoRA+": Way(lambda r, _: LoraConfig(r=r, lora_alpha=ALPHA, target_modules=ALL), 1.25e-3),
    "LoRA-FA": Way(lambda r, _: LoraFAConfig(r=r, lora_alpha=ALPHA, target_modules=ALL), 2e-2, FITTED),
    "PiSSA": Way(lambda r, _: LoraConfig(r=r, lora_alpha=r, init_lora_weights="pissa", target_modules=ALL), 1e-2),
    "MiLoRA": Way(lambda r, _: LoraConfig(r=r, lora_alpha=r, init_lora_weights="milora", target_modules=ALL), 2e-2),
    "OLoRA": Way(lambda r, _: LoraConfig(r=r, lora_alpha=r, init_lora_weights="olora", target_modules=ALL), 1e-2),
    "AdaLoRA": Way(_adalora, 2e-2, why="starts at 1.5 times the rank, ends at it"),
    "DoRA": Way(lambda r, _: LoraConfig(r=r, lora_alpha=ALPHA, use_dora=True, target_modules=ALL), 1e-2, FITTED),
    "VeRA": Way(lambda r, _: VeraConfig(r=r, target_modules=ALL), 1e-1, 256, "two vectors a layer, r = 256"),
    "LoHa": Way(lambda r, _: LoHaConfig(r=r, alpha=ALPHA, target_modules=ALL), 1e-2, FITTED),
    "LoKr": Way(lambda r, _: LoKrConfig(r=r, alpha=ALPHA, decompose_factor=2, target_modules=ALL), 1e-2, FITTED),
    "TT-LoRA": Way(lambda r, _: TensorTrainConfig(r=r, lora_alpha=ALPHA, target_modules=ALL), 1e-2, FITTED),
    "SoRA": Way(lambda r, _: SoRAConfig(r=r + r // 2, lora_alpha=ALPHA, sparse_lambda=0.3, target_modules=ALL), 1e-2,
                why="starts at 1.5 times the rank, closes gates"),
    "SHiRA": Way(lambda r, _: ShiraConfig(r=r, target_modules=ALL), 2e-2),
    "IA3": Way(lambda _, __: IA3Config(), 5e-2, 1, "one vector a layer"),
    "BitFit": Way(lambda _, __: BitFitConfig(), 1e-2, 1, "biases only"),
    "Houlsby": Way(lambda m, _: HoulsbyConfig(bottleneck=m), 5e-3, FITTED),
    "prompt tuning": Way(lambda p, _: PromptTuningConfig(num_virtual_tokens=p, prompt_tuning_init="SAMPLE_VOCAB"), 5e-2, FITTED,
                         "vectors in front, 32 at most"),
    "prefix tuning": Way(lambda p, _: PrefixTuningConfig(num_virtual_tokens=p), 2e-1, FITTED, "vectors in front, 32 at most"),
    FULL: Way(None, 2e-3, 1, "every number of the model"),
}


def plan(cfg: TransformerConfig, rank: int, room: int,
         names: Iterable[str] = tuple(WAYS)) -> tuple[int, dict[str, dict[str, Any]]]:
    """(the budget: what LoRA of the rank trains, name -> {"size", "trainable", "why"}) for a model of this shape.

    room: virtual tokens at most. Where a method cannot adapt the model, {"why"} alone, with the reason.
    """
    budget, ways = trained(cfg, "LoRA", rank), dict[str, dict[str, Any]]()
    for name in names:
        way = WAYS[name]
        try:
            if way.size == FITTED:
                size = largest(partial(fits, cfg, name, SLACK * budget), room if name.startswith("pr") else cfg.d_model)
            else:
                size = rank if way.size == RANK else int(way.size)
            count = trained(cfg, name, size)
        except ValueError as error:
            ways[name] = {"why": str(error)}
            continue
        why = way.why or "the next size is above the budget"
        ways[name] = {"size": size, "trainable": count, "why": why if abs(count / budget - 1.0) > 0.15 else ""}
    return budget, ways


def fits(cfg: TransformerConfig, name: str, most: float, size: int) -> bool:
    """Whether a method of that size trains at most so many numbers."""
    return trained(cfg, name, size) <= most


def trained(cfg: TransformerConfig, name: str, size: int) -> int:
    """How many numbers a method trains on a model of this shape; no weight is made."""
    like = "LoRA" if name in ("PiSSA", "MiLoRA", "OLoRA") else name        # the same, without their SVD
    model = adapt(Outline(cfg), like, size, 0, 40)
    return count_parameters(model)["trainable"]


def largest(fit: Callable[[int], bool], most: int) -> int:
    """The largest n up to `most` that fits, where all smaller ones do. Raises ValueError if 1 does not."""
    low, high = 0, most + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fit(middle) else (low, middle)
    if low == 0:
        raise ValueError("its least size is above the budget")
    return low


def adapt(model: Transformer, name: str, size: int, seed: int, steps: int) -> Transformer:
    """The model to train: `model` itself with the method on it, or with room in front of it."""
    config = WAYS[name].config
    if config is None:
        return model.unfreeze()
    made = config(size, steps)
    tuned = VirtualTokens(model) if isinstance(made, VirtualTokensConfig) else model
    add_adapter(tuned, made, seed=seed)
    return tuned


def fit(model: Transformer, name: str, batches: Any, config: TrainConfig, callback: Any = None) -> History:
    """Train as the method asks: LoRA+'s groups, AdaLoRA's budget and penalty, SoRA's proximal step. Raises as `train`."""
    options: dict[str, Any] = {}
    after = [] if callback is None else [callback]
    if name == "LoRA+":
        options["optimizer"] = AdamW(loraplus_groups(model, config.lr, RATIO), config.lr, weight_decay=config.weight_decay)
    if (found := companion(model, name)) is not None:
        options["penalty"] = getattr(found, "penalty", None)
        after.append(found.callback)

    def each(step: int, model: Any, history: History) -> None:
        for one in after:
            one(step, model, history)

    return train(model, batches, config, callback=each if after else None, **options)


def companion(model: Transformer, name: str) -> Any:
    """What a method does beside the optimiser: an object with a callback, and perhaps a penalty, for `train`; or None."""
    return RankAllocator(model) if name == "AdaLoRA" else GateProx(model) if name == "SoRA" else None


def kept(model: Transformer, name: str) -> int | None:
    """The trained numbers that still count at the end, of a method that switches some off."""
    if name not in ("AdaLoRA", "SoRA"):
        return None
    total = 0
    for adapter in adapters_of(model).values():
        if hasattr(adapter, "lora_A"):
            gate = adapter.gate if isinstance(adapter, SoRA) else adapter.lora_E
            total += int((gate.data != 0).sum()) * (adapter.lora_A.shape[1] + adapter.lora_B.shape[0] + 1)
    return total
