"""VeRA: one pair of random matrices for all layers, and two trained vectors each (Kopiczko et al. 2023, arXiv:2310.11454)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from ..autograd import Tensor, matmul
from ..backend import device_of, host_rng, to_device
from ..lora import Adapter, TargetConfig, register
from ..nn import Linear, Parameter

SHARED = ("base_model.vera_A", "base_model.vera_B")        # their keys in the file


class Projection:
    """The frozen matrices A (r, widest in) and B (widest out, r), of which each layer uses the first columns and rows.

    Drawn uniform in ±1 from a seed, column by column and row by row: so a layer's part is the same however wide the others
    are. Or read from a file. Never copied: adapters and models share it.
    """

    def __init__(self, seed: int, r: int, given: tuple[np.ndarray, np.ndarray] | None = None) -> None:
        self.seeds, self.key, self.drawn = np.random.SeedSequence(seed).spawn(2), (seed, r), given is None
        A, B = given or (np.zeros((r, 0)), np.zeros((0, r)))
        self.rows = [A.T, B]                               # (in, r) and (out, r), on the host
        self.placed: dict[Any, Any] = {}                   # (which, dtype, device) -> array

    def __deepcopy__(self, memo: Any) -> Projection:
        return self

    def part(self, which: int, n: int, dtype: Any, device: str) -> Any:    # -> (n, r)
        """The first n rows of Aᵀ (0) or B (1), a view of what all layers share. Raises ValueError if a file has fewer."""
        if len(self.rows[which]) < n:
            if not self.drawn:
                raise ValueError(f"{SHARED[which]} is for layers up to {len(self.rows[which])} wide, got one of {n}: is it the "
                                 "base?")
            self.rows[which] = host_rng(self.seeds[which]).uniform(-1.0, 1.0, (n, self.key[1]))
        key = which, str(dtype), device
        if len(self.placed.get(key, ())) < n:
            self.placed[key] = to_device(self.rows[which].astype(dtype), device)
        return self.placed[key][:n]


@dataclass(kw_only=True)
class VeraConfig(TargetConfig):
    """VeRA with PEFT's names: r, d_initial, projection_prng_key (the seed), vera_dropout on the branch's input.

    init_weights: False starts at random, to test. save_projection: must be True. Raises ValueError for values out of range.
    """

    method: ClassVar[str] = "vera"

    r: int = 256
    projection_prng_key: int = 0
    save_projection: bool = True
    vera_dropout: float = 0.0
    d_initial: float = 0.1
    init_weights: bool = True
    projection: Any = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.r, int) or self.r < 1 or not 0.0 <= self.vera_dropout < 1.0 or self.projection_prng_key < 0:
            raise ValueError(f"r = {self.r!r}, vera_dropout = {self.vera_dropout}, projection_prng_key = "
                             f"{self.projection_prng_key}: expected r >= 1, 0 <= p < 1, and a seed of at least 0")
        if not self.save_projection:
            raise ValueError("save_projection = False: expected True, since the matrices cannot be drawn again elsewhere: they "
                             "would need another library's random numbers")


@register("vera")
class VeRA(Adapter):
    """W' = W + diag(b) B diag(d) A.   Trains b (out,), which starts at 0, and d (r,), at d_initial; A and B are frozen.

    b̄ = rowsum(ĝ ⊙ B diag(d) A),  d̄ = diag((diag(b) B)ᵀ ĝ Aᵀ).  A and B are uniform in ±√(6/columns); here columns are those
    of the layer, in PEFT those of the widest one (the two differ by a constant in d; in a file the second holds).
    """

    leaves: ClassVar[dict[str, str]] = {"vera_lambda_b": "vera_lambda_b", "vera_lambda_d": "vera_lambda_d"}

    def __init__(self, layer: Linear, config: Any, names: tuple[str, ...], rng: np.random.Generator) -> None:
        super().__init__(layer, config, names, rng)
        d_out, self.d_in = layer.weight.shape
        if config.projection is None or config.projection.key != (config.projection_prng_key, config.r):
            config.projection = Projection(config.projection_prng_key, config.r)
        self.projection, self.dropout, r = config.projection, config.vera_dropout, config.r
        self.gain = 6.0 * (self.d_in * r) ** -0.5 if self.projection.drawn else 1.0      # √(6/in) of A times √(6/r) of B
        b = np.zeros(d_out) if config.init_weights else rng.standard_normal(d_out)
        d = np.full(r, config.d_initial) if config.init_weights else rng.standard_normal(r)
        self.vera_lambda_b = Parameter(to_device(b.astype(layer.dtype)))
        self.vera_lambda_d = Parameter(to_device(d.astype(layer.dtype)))

    def factors(self) -> tuple[Any, Any, Any]:
        b, d = self.vera_lambda_b, self.vera_lambda_d
        device = device_of(b.data).name
        A, B = (self.projection.part(i, n, b.dtype, device) for i, n in enumerate((self.d_in, len(b))))
        return d.reshape(-1, 1) * A.T, b.reshape(-1, 1) * B, self.gain * self.strength

    def adapted_weight(self, W: Tensor) -> Tensor:         # (out, in) -> (out, in)
        A, B, _ = self.factors()
        return W + matmul(B, A) * self.gain
