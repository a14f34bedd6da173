"""Test cases for LoRA's relatives: each method that changes a weight, on one linear layer, its parameters given by name."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np

from ..autograd import Tensor
from ..lora import METHODS, Adaptation, LoraConfig
from ..lora.layer import adapted, changes
from ..methods import (
    AdaLoraConfig,
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    LoraFAConfig,
    ShiraConfig,
    SoRAConfig,
    TensorTrainConfig,
    VeraConfig,
)
from ..nn import Linear

Arrays = dict[str, np.ndarray]
D_IN, D_OUT, ROWS = 6, 8, 5
S = "s = lora_alpha/r"


def _lora(**fields: Any) -> Callable[[dict[str, Any]], LoraConfig]:
    return lambda o: LoraConfig(r=o["r"], lora_alpha=o["lora_alpha"], **fields)


def _dora(o: dict[str, Any]) -> LoraConfig:
    return LoraConfig(r=o["r"], lora_alpha=o["lora_alpha"], use_dora=True, detach_norm=o["detach_norm"])


def _residual(init: str) -> tuple[Any, ...]:
    return (_lora(init_lora_weights=init), {}, f"W' = W + s·(B A - B0 A0), {S}; A0 and B0 are the frozen start of lora_A and "
            "lora_B")


DORA = f"W' = magnitude ∘ V / ‖V‖ row by row, V = W + s·B A, {S}; "
CASES: dict[str, tuple[Any, ...]] = {                      # kind -> config of the options, changes of them, formula of W'
    "dora": (_dora, {}, DORA + "‖V‖ counts as a constant in the gradient (PEFT, the paper's section 4.3)"),
    "dora-full": (_dora, {"detach_norm": False}, DORA + "the gradient goes through ‖V‖"),
    "lora-fa": (lambda o: LoraFAConfig(r=o["r"], lora_alpha=o["lora_alpha"]), {}, f"W' = W + s·B A, {S}; lora_A is frozen"),
    "pissa": _residual("pissa"), "milora": _residual("milora"), "olora": _residual("olora"),
    "eva": (_lora(init_lora_weights="eva"), {}, f"W' = W + s·B A, {S}"),
    "lora-bias": (_lora(lora_bias=True, bias="lora_only"), {}, f"W' = W + s·B A, b' = bias_own + s·lora_B_bias, {S}; bias_own "
                  "is the adapter's copy, in the place of the layer's bias"),
    "ia3": (lambda o: IA3Config(feedforward_modules=[]), {}, "W' = ia3_l ∘ W, ia3_l (out, 1), and b' = ia3_l ∘ b"),
    "ia3-input": (lambda o: IA3Config(feedforward_modules=["layer"]), {}, "W' = ia3_l ∘ W, ia3_l (1, in), and b' = b"),
    "vera": (lambda o: VeraConfig(r=o["r"]), {}, "W' = W + diag(vera_lambda_b) vera_B diag(vera_lambda_d) vera_A, with vera_A "
             "(r, in) and vera_B (out, r) frozen"),
    "loha": (lambda o: LoHaConfig(r=o["r"], alpha=o["lora_alpha"]), {}, f"W' = W + s·(B1 A1)∘(B2 A2), {S}"),
    "lokr": (lambda o: LoKrConfig(r=o["r"], alpha=o["lora_alpha"]), {}, f"W' = W + s·w1 ⊗ w2, {S}"),
    "lokr-factors": (lambda o: LoKrConfig(r=o["r"], alpha=o["lora_alpha"]), {"r": 1},
                     f"W' = W + s·w1 ⊗ (w2_a w2_b), {S}"),
    "adalora": (lambda o: AdaLoraConfig(init_r=o["r"], target_r=1, lora_alpha=o["lora_alpha"], total_step=1), {},
                "W' = W + s·B diag(lora_E) A, s = lora_alpha/(r + 1e-5); no penalty"),
    "sora": (lambda o: SoRAConfig(r=o["r"], lora_alpha=o["lora_alpha"]), {}, f"W' = W + s·B diag(gate) A, {S}"),
    "shira": (lambda o: ShiraConfig(r=1), {"r": 1}, "W' = W, with values[i] added at places[i] of the flat W (row by row)"),
    "tt-lora": (lambda o: TensorTrainConfig(r=o["r"], lora_alpha=o["lora_alpha"], order=2), {}, "W' = W + s·B A, "
                "B[i1 i2, ρ] = Σ_a out0[0, i1, a] out1[a, i2, ρ], A[ρ, j1 j2] = Σ_a in0[ρ, j1, a] in1[a, j2, 0], i2 and j2 "
                f"changing fastest, {S}"),
}
RENAMED = {"bias": "bias_own"}                             # a parameter whose name is an input of the layer


def inputs_of(kind: str, options: dict[str, Any], rng: np.random.Generator) -> Arrays:
    """The inputs of one case: the layer's, the method's parameters, and what it keeps frozen. All are random."""
    given: Arrays = {"x": rng.standard_normal((ROWS, D_IN)), "W": rng.standard_normal((D_OUT, D_IN)),
                     "bias": rng.standard_normal(D_OUT), "dy": rng.standard_normal((ROWS, D_OUT)) * 0.01}
    adapter = _adapter(kind, options, Linear(given["W"], given["bias"]))
    for name, p in adapter.named_parameters():
        given[RENAMED.get(name, name)] = rng.standard_normal(p.shape)
    if kind == "vera":
        given |= {"vera_A": rng.standard_normal((options["r"], D_IN)), "vera_B": rng.standard_normal((D_OUT, options["r"]))}
    if hasattr(adapter, "A0"):
        given |= {name: rng.standard_normal(getattr(adapter, name).shape) for name in ("A0", "B0")}
    return given | ({"places": adapter.places} if kind == "shira" else {})


def answers_of(given: Arrays, options: dict[str, Any]) -> Arrays:
    """The library's answers to a case, from inputs in float64."""
    kind, layer = options["method"], Linear(given["W"].copy(), given["bias"].copy())
    layer.freeze()
    adapter = _adapter(kind, options, layer)
    for name, p in adapter.named_parameters():
        p.data[...] = given[RENAMED.get(name, name)]
    for name in {"A0", "B0", "places"} & given.keys():
        setattr(adapter, name, given[name])
    if kind == "vera":
        adapter.projection, adapter.gain = SimpleNamespace(part=lambda i, *_: (given["vera_A"].T, given["vera_B"])[i]), 1.0
    if "scale" in options:
        for name in {"base_scale", "scale"} & vars(adapter).keys():
            setattr(adapter, name, options["scale"])
    layer.adaptation = Adaptation()
    layer.adaptation.adapters, layer.adaptation.active = {"default": adapter}, ["default"]
    adapter.unfreeze()
    x = Tensor(given["x"], requires_grad=True)
    y = layer(x)
    y.backward(given["dy"] * options["gradient_scale"])
    W, b = adapted(layer, [(slice(0, D_OUT), adapter)])
    found = {"y": y.data, "dx": x.grad, "merged": W.data} | (
        {"merged_bias": b.data} if b is not None and changes(adapter, "adapted_bias") else {})
    return found | {f"d_{RENAMED.get(name, name)}": p.grad for name, p in adapter.named_parameters(trainable=True)}


def formulas_of(kind: str, keys: Any) -> dict[str, str]:
    """The formula of every answer."""
    known = {"y": f"y = x W'ᵀ + b', b' = bias if nothing else is said;  {CASES[kind][2]}", "merged": "W'", "merged_bias": "b'",
             "dx": "gradient of Σ y∘dy towards x"}
    return {key: known.get(key, f"the same towards {key.removeprefix('d_')}") for key in keys}


def _adapter(kind: str, options: dict[str, Any], layer: Linear) -> Any:
    config = CASES[kind][0](options)
    return METHODS[config.method, Linear](layer, config, ("layer",), np.random.default_rng(0))
