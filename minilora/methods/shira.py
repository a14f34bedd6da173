"""SHiRA: train a few entries of W itself, at fixed random places: sparse, of high rank (Bhardwaj et al., arXiv:2406.13175)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar
from zlib import crc32

import numpy as np

from ..autograd import Op, Tensor
from ..backend import to_device
from ..lora import Adapter, TargetConfig, register
from ..nn import Linear, Parameter
from .files import FileFormat


@dataclass(kw_only=True)
class ShiraConfig(TargetConfig):
    """SHiRA with PEFT's names. r: there are as many entries as LoRA of rank r has numbers. random_seed: of their places.

    init_weights: False starts at random, to test. Raises ValueError for a rank below 1 or a negative seed.
    """

    method: ClassVar[str] = "shira"

    r: int = 32
    random_seed: int = 0
    init_weights: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if any(not isinstance(n, int) or isinstance(n, bool) or n < least for n, least in ((self.r, 1), (self.random_seed, 0))):
            raise ValueError(f"r = {self.r!r}, random_seed = {self.random_seed!r}: expected whole numbers of at least 1 and 0")


class AddAt(Op):
    """y = W with v added at fixed places of W, each of them once.   W̄ = ȳ,  v̄ = ȳ at the places."""

    def __init__(self, places: Any) -> None:
        self.places = places                               # (m,) indices into the flat W, on W's device

    def forward(self, W, v):                               # (out, in), (m,) -> (out, in)
        y = W.copy()
        y.reshape(-1)[self.places] += v
        return y

    def backward(self, dy):
        return dy if self.needs[0] else None, dy.reshape(-1)[self.places] if self.needs[1] else None


@register("shira")
class SHiRA(Adapter):
    """W' = W + S, S zero but for m = r (out + in) places, drawn uniformly.   Trains these m values, which start at 0.

    v̄ is ĝ at the places. The places come from the seed and the layer's path, so a file need not hold them; NumPy draws them,
    and PEFT's own SHiRA files (whose places are PyTorch's) are not read.
    """

    leaves: ClassVar[dict[str, str]] = {"values": "shira_values"}

    def __init__(self, layer: Linear, config: Any, names: tuple[str, ...], rng: np.random.Generator) -> None:
        super().__init__(layer, config, names, rng)
        d_out, d_in = layer.weight.shape
        own = np.random.default_rng(np.random.SeedSequence(config.random_seed, spawn_key=(crc32(names[0].encode()),)))
        m = min(config.r * (d_out + d_in), d_out * d_in)
        self.places = to_device(np.sort(own.choice(d_out * d_in, m, replace=False, shuffle=False)))
        values = np.zeros(m) if config.init_weights else rng.standard_normal(m) * 0.02
        self.values = Parameter(to_device(values.astype(layer.dtype)))

    def move(self, device: str) -> None:
        super().move(device)
        self.places = to_device(self.places, device)

    def adapted_weight(self, W: Tensor) -> Tensor:         # (out, in) -> (out, in)
        return AddAt(self.places)(W, self.values)


FileFormat("shira", "SHIRA_NUMPY", ShiraConfig, ("r", "random_seed")).register()
