"""LoraConfig, with PEFT's names, meanings and defaults; what all methods' configs share; which modules of a model they mean."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import cache
from typing import Any, ClassVar

from ..nn import Embedding, Linear, PackedLinear, Transformer
from ..nn.names import DEFAULT_TARGETS, file_names
from .layer import METHODS


@dataclass(kw_only=True)
class TargetConfig:
    """Where to put an adaptation, whatever its method.

    target_modules: names or path suffixes (a list), a regex that must match a whole path (a string), "all-linear" (every
    linear layer but the head), or None for PEFT's default (for LoRA q and v; GPT-2: the packed qkv). Our module names and the
    file names of the model's architecture (`query`, `c_attn` …) both count. exclude_modules: the same forms, taken out again.
    modules_to_save: layers that are trained whole and saved with the adapter; a classifier always is. layers_to_transform:
    the layer numbers to adapt (None: all).
    """

    method: ClassVar[Any]                                  # the name of the registered adaptation (see layer.py)

    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    layers_to_transform: list[int] | int | None = None

    def default_targets(self, model_type: str | None) -> list[str]:
        """What target_modules = None means."""
        return list(DEFAULT_TARGETS.get(model_type or "", ("q_proj", "v_proj")))

    def __post_init__(self) -> None:
        for where in ("target_modules", "exclude_modules"):
            pattern = getattr(self, where)
            try:
                re.compile(pattern if isinstance(pattern, str) else "")
            except re.error as error:
                raise ValueError(f"{where} = {pattern!r}: expected a list of names or a regex ({error})") from None


@dataclass(kw_only=True)
class LoraConfig(TargetConfig):
    """What LoRA to put where (`TargetConfig` says where).

    r: the rank; lora_alpha α: the update is scaled by s = α/r, or α/√r with use_rslora (arXiv:2312.03732). lora_dropout: on
    the branch's input, in training. rank_pattern, alpha_pattern: module name or regex -> r or α where they differ.
    init_lora_weights: True (A uniform in ±1/√in, B = 0), "gaussian" (A normal with standard deviation 1/r, B = 0), False
    (B random too, to test), or a start that methods/ takes from W: "pissa", "pissa_niter_N", "milora", "olora"; or from data:
    "eva". use_dora: DoRA (arXiv:2402.09353) in place of LoRA; detach_norm: its norm is no part of the gradient, as in PEFT.
    bias: copies of the base's biases are trained and saved along, "lora_only" of the adapted layers or "all", layer norms too;
    lora_bias: so is a bias of B, in y = W x + b + s·(B A x + c). Both go with plain LoRA.

    Raises ValueError, naming the field, for values out of range.
    """

    r: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    use_rslora: bool = False
    init_lora_weights: bool | str = True
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    use_dora: bool = False
    detach_norm: bool = True
    bias: str = "none"
    lora_bias: bool = False

    @property
    def method(self) -> str:
        start = "" if self.init_lora_weights in (True, False, "gaussian") else ":" + str(self.init_lora_weights).split("_")[0]
        return ("dora" if self.use_dora else "lora") + start + (":bias" if self.lora_bias or self.bias != "none" else "")

    def __post_init__(self) -> None:
        super().__post_init__()
        for where, r in {"r": self.r, **self.rank_pattern}.items():
            if not isinstance(r, int) or isinstance(r, bool) or r < 1:
                raise ValueError(f"rank {where} = {r!r}: expected a whole number of at least 1")
        if not all(abs(alpha) < float("inf") for alpha in (self.lora_alpha, *self.alpha_pattern.values())):
            raise ValueError(f"lora_alpha = {self.lora_alpha}, alpha_pattern = {self.alpha_pattern}: expected finite numbers")
        if not 0.0 <= self.lora_dropout < 1.0:
            raise ValueError(f"lora_dropout = {self.lora_dropout}: expected 0 <= p < 1")
        if self.bias not in ("none", "lora_only", "all") or not isinstance(self.lora_bias, bool):
            raise ValueError(f"bias = {self.bias!r}, lora_bias = {self.lora_bias!r}: expected none, lora_only or all; a bool")
        if ":" in self.method and (self.method, Linear) not in METHODS:
            raise ValueError(f"init_lora_weights = {self.init_lora_weights!r}: expected True, False or 'gaussian', or without "
                             "use_dora and biases 'pissa[_niter_N]', 'milora', 'olora', 'eva'; use_dora goes without biases")

    def rank(self, names: tuple[str, ...]) -> int:
        """The rank of the module that has these names."""
        return by_pattern(self.rank_pattern, names, self.r)

    def alpha(self, names: tuple[str, ...]) -> float:
        """lora_alpha of the module that has these names."""
        return by_pattern(self.alpha_pattern, names, self.lora_alpha)

    def scale(self, names: tuple[str, ...]) -> float:
        """s = α/r, or α/√r with use_rslora, of the module that has these names."""
        alpha, r = float(self.alpha(names)), self.rank(names)              # a NumPy scalar would make float32 factors float64
        return alpha / (r**0.5 if self.use_rslora else r)


def find_targets(model: Transformer, config: TargetConfig) -> list[tuple[str, tuple[str, ...], Linear | Embedding]]:
    """(path, its names, layer) of every module that the config targets.

    Raises ValueError if a name or pattern matches nothing, or no module is left.
    """
    candidates, modules = module_names(model), dict[str, Any](model.named_modules())
    targets = config.target_modules
    if targets is None:
        targets = config.default_targets(model.cfg.model_type)
    if targets == "all-linear":
        chosen = {path for path in candidates if isinstance(modules[path], Linear) and path not in ("head", "classifier")}
        chosen -= _matched_twice(model, ".*", candidates, chosen)
    else:
        chosen = {path for path, names in candidates.items() if matches(targets, names)}
        if isinstance(targets, str):
            chosen -= _matched_twice(model, targets, candidates, chosen)
        for target in targets if isinstance(targets, (list, tuple, set)) else [targets]:
            if not any(matches(target if isinstance(targets, str) else [target], n) for n in candidates.values()):
                known = sorted({path.rpartition(".")[2] for path in candidates})
                raise ValueError(f"target module {target!r} is not in this model: expected one of {', '.join(known)}, a path, "
                                 "a regex, or 'all-linear'")
    if config.exclude_modules is not None:
        chosen = {path for path in chosen if not matches(config.exclude_modules, candidates[path])}
    chosen = in_layers(chosen, config.layers_to_transform)
    if not chosen:
        raise ValueError("no module is left to adapt: look at target_modules, exclude_modules and layers_to_transform")
    return [(path, names, modules[path]) for path, names in candidates.items() if path in chosen]


def module_names(model: Transformer) -> dict[str, tuple[str, ...]]:
    """Path -> (our path, the file's path if there is one) of every Linear and Embedding, adapters aside."""
    files = file_names(model.cfg)
    names = {path: (path, files[path]) if path in files else (path,)
             for path, module in model.named_modules() if isinstance(module, (Linear, Embedding))}
    return {path: n for path, n in names.items() if ".blocks." not in path}


def _matched_twice(model: Transformer, regex: str, candidates: dict[str, tuple[str, ...]], chosen: set[str]) -> set[str]:
    """What to leave out where a regex matches a packed layer and its blocks (".*v_proj" matches qkv_proj as well).

    The packed layer stays if the regex means it by its name in the files (GPT-2's c_attn), else the blocks do.
    """
    paths, out = {id(module): path for path, module in model.named_modules()}, set()
    for path, module in model.named_modules():
        blocks = {paths[id(b)] for b in module.blocks.values()} & chosen if isinstance(module, PackedLinear) else set()
        if path in chosen and blocks:
            out |= blocks if matches(regex, candidates[path][1:]) else {path}
    return out


def in_layers(paths: set[str], layers: list[int] | int | None) -> set[str]:
    """The paths within these layers; None: all paths."""
    numbers = [layers] if isinstance(layers, int) else layers
    return {p for p in paths if numbers is None or (p.startswith("layers.") and int(p.split(".")[1]) in numbers)}


def matches(target: list[str] | str, names: tuple[str, ...]) -> bool:
    """A string is a regex for the whole path; a list holds names and path suffixes."""
    if isinstance(target, str):
        return any(re.fullmatch(target, name) for name in names)
    return any(name == t or name.endswith(f".{t}") for name in names for t in target)


def by_pattern(pattern: dict[str, Any], names: tuple[str, ...], default: Any) -> Any:
    for key, value in pattern.items():
        if any(_whole_parts(key).fullmatch(name) for name in names):
            return value
    return default


@cache
def _whole_parts(key: str) -> re.Pattern[str]:             # a large adapter has more patterns than re's own cache holds
    return re.compile(rf"(.*\.)?({key})")
