"""QLoRA: LoRA on a base of 4 bits; and LoftQ, which starts the adapter at what the 4 bits lost.

    quantise(model)                                        # every linear layer but head and classifier, in place
    add_adapter(model, LoraConfig(...))                    # any method; merging into 4 bits is refused

Dettmers et al. 2023 (arXiv:2305.14314), Li et al. 2023 (arXiv:2310.08659).
"""

from __future__ import annotations

from typing import Any

from ..autograd import Tensor
from ..backend import Array, array_module, to_device
from ..lora import LoraConfig, TargetConfig, adapter_names, adapters_of, add_adapter
from ..lora.config import find_targets
from ..lora.layer import dense
from ..lora.svd import low_rank_factors
from ..nn import Linear, PackedLinear, Transformer
from .four_bit import FourBit


class Rows:
    """The weights of q, k and v as one weight (3D, in): each stays in 4 bits, and they multiply one after the other."""

    def __init__(self, blocks: list[FourBit]) -> None:
        self.blocks, self.compute_dtype = blocks, blocks[0].compute_dtype
        self.shape = sum(b.shape[0] for b in blocks), blocks[0].shape[1]

    def dense(self) -> Array:
        return array_module(self.blocks[0].codes).concatenate([b.dense() for b in self.blocks])

    def linear(self, x: Array) -> Array:
        return array_module(x).concatenate([b.linear(x) for b in self.blocks], axis=-1)

    def linear_grad(self, dy: Array) -> Array:
        total, start = None, 0
        for b in self.blocks:
            part = b.linear_grad(dy[..., start : start + b.shape[0]])
            total, start = part if total is None else total + part, start + b.shape[0]
        return total


class QuantisedPacked(PackedLinear):
    """A PackedLinear whose blocks are in 4 bits. The blocks (and the adapters that will sit on them) are the old ones."""

    def __init__(self, old: PackedLinear, quant_type: str, double_quant: bool) -> None:
        self.packed_weight, self.packed_bias, self.sizes = None, old.packed_bias, old.sizes
        self.blocks, self.adaptation = old.blocks, None
        for block in self.blocks.values():
            block.weight = FourBit(block.weight.data, quant_type, double_quant)

    @property
    def weight(self) -> Any:
        return Rows([b.weight for b in self.blocks.values()])

    def parts(self) -> list[tuple[slice, Linear]]:
        slices = self._slices()
        return [(slice(0, sum(self.sizes.values())), self), *((slices[n], b) for n, b in self.blocks.items())]

    def move(self, device: str) -> None:
        self.packed_bias = None if self.packed_bias is None else to_device(self.packed_bias, device)
        self._view_blocks()

    def _view_blocks(self) -> None:
        if self.packed_bias is not None:
            for name, block in self._slices().items():
                self.blocks[name].bias.data = self.packed_bias[block]


def quantise(model: Transformer, quant_type: str = "nf4", double_quant: bool = True) -> Transformer:
    """Replace every linear weight but head and classifier by one of 4 bits, in place; the dense ones are gone. The model.

    Raises ValueError for an unknown type, a model with adapters, or one that is quantised already.
    """
    if adapter_names(model):
        raise ValueError(f"quantise with adapters {', '.join(adapter_names(model))} on the model: quantise first, then add")
    layers: list[Any] = [layer for _, _, layer in find_targets(model, TargetConfig(target_modules="all-linear"))]
    if not all(isinstance(layer.weight, Tensor) for layer in layers):
        raise ValueError("quantise: got a model that is quantised already, expected dense weights")
    model.freeze()
    packed = [(module, name, layer) for _, module in model.named_modules() for name, layer in vars(module).items()
              if isinstance(layer, PackedLinear)]
    for module, name, layer in packed:
        setattr(module, name, QuantisedPacked(layer, quant_type, double_quant))
    for layer in layers:
        if not isinstance(layer, PackedLinear) and isinstance(layer.weight, Tensor):
            layer.weight = FourBit(layer.weight.data, quant_type, double_quant)
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
