"""QLoRA: LoRA on a base of 4 bits; and LoftQ, which starts the adapter at what the 4 bits lost.

    quantise(model)                                        # every linear layer but head and classifier, in place
    add_adapter(model, LoraConfig(...))                    # any method; merging into 4 bits is refused

Dettmers et al. 2023 (arXiv:2305.14314), Li et al. 2023 (arXiv:2310.08659).
"""

from __future__ import annotations

from typing import Any

from ..autograd import Tensor
from ..backend import array_module
from ..lora import LoraConfig, TargetConfig, adapter_names, adapters_of, add_adapter
from ..lora.config import find_targets
from ..lora.layer import dense
from ..lora.svd import low_rank_factors
from ..nn import PackedLinear, Transformer
from .block_layers import replace_weights
from .four_bit import FourBit


def quantise(model: Transformer, quant_type: str = "nf4", double_quant: bool = True) -> Transformer:
    """Replace every linear weight but head and classifier by one of 4 bits, in place; the dense ones are gone. The model.

    Raises ValueError for an unknown type, a model with adapters, or one that is quantised already.
    """
    if adapter_names(model):
        raise ValueError(f"quantise with adapters {', '.join(adapter_names(model))} on the model: quantise first, then add")
    layers: list[Any] = [layer for _, _, layer in find_targets(model, TargetConfig(target_modules="all-linear"))]
    if not all(isinstance(layer.weight, Tensor) for layer in layers):
        raise ValueError("quantise: got a model that is quantised already, expected dense weights")
    replace_weights(model, lambda path, layer: FourBit(layer.weight.data, quant_type, double_quant))
    return model


def loftq(model: Transformer, config: LoraConfig, name: str = "default", *, iterations: int = 5, quant_type: str = "nf4",
          double_quant: bool = True) -> dict[str, list[float]]:
    """Quantise the model and add a LoRA that starts at the best rank-r correction of what each adapted layer lost.

    Alternately  Q ← q(W - s B A)  and  s B A ← the SVD of W - Q cut to rank r. This replaces the base: it is near W only with
    the adapter on. Returns {module: the relative error ‖W - Q - sBA‖/‖W‖ after every round}; config: plain LoRA on modules
    that the model holds (q_proj, not qkv_proj). Raises ValueError for less than one iteration or another method.
    """
    if iterations < 1 or config.method != "lora":
        raise ValueError(f"loftq: iterations = {iterations}, method {config.method!r}: expected at least 1, and plain LoRA")
    targets: list[Any] = [(path, layer) for path, _, layer in find_targets(model, config)]
    if any(isinstance(layer, PackedLinear) for _, layer in targets):
        raise ValueError("loftq on qkv_proj: expected q_proj, k_proj and v_proj, whose weights are quantised one by one")
    weights = {path: dense(layer).data.copy() for path, layer in targets}
    quantise(model, quant_type, double_quant)
    add_adapter(model, config, name)
    errors: dict[str, list[float]] = {}
    for path, layer in targets:
        W, adapter, norm = weights.pop(path), adapters_of(model, name)[path], array_module(layer.weight.codes).linalg.norm
        A, B, s = adapter.lora_A.data, adapter.lora_B.data, adapter.base_scale
        B[...] = 0.0
        errors[path] = []
        for _ in range(iterations):
            layer.weight = FourBit(W - s * (B @ A), quant_type, double_quant)
            rest = W - layer.weight.dense()
            U, S, Vh = array_module(W).linalg.svd(rest, full_matrices=False)
            B[...], A[...] = low_rank_factors(U[:, : len(A)], S[: len(A)], Vh[: len(A)], s)
            errors[path].append(float(norm(rest - s * (B @ A)) / norm(W)))
    return errors
