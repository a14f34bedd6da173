"""VeRA's files: PEFT keeps the two shared matrices beside the vectors, under keys that belong to no module."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ..backend import to_host
from ..lora.peft_format import PREFIX
from .files import FileFormat
from .vera import SHARED, Projection, VeraConfig


class VeraFormat(FileFormat):
    """The widest A and B go into the file; every d is rescaled to their bounds, so that the product stays the same."""

    def extra(self, modules: dict[str, Any]) -> dict[str, np.ndarray]:
        adapters = list(modules.values())
        first, r = adapters[0].projection, len(adapters[0].vera_lambda_d)
        widest = max(a.d_in for a in adapters), max(len(a.vera_lambda_b) for a in adapters)
        dtype = adapters[0].vera_lambda_b.dtype
        bounds = ((6.0 / widest[0]) ** 0.5, (6.0 / r) ** 0.5) if first.drawn else (1.0, 1.0)
        A, B = (first.part(i, n, dtype, "cpu") * bounds[i] for i, n in enumerate(widest))
        d = {f"{PREFIX}{file}.vera_lambda_d": to_host(a.vera_lambda_d.data) * (a.gain / (bounds[0] * bounds[1]))
             for file, a in modules.items()}
        return dict(zip(SHARED, (np.ascontiguousarray(A.T), B), strict=True)) | d

    def to_config(self, options: dict[str, Any], tensors: dict[str, np.ndarray], folder: Path) -> Any:
        if not (options["save_projection"] and set(SHARED) <= tensors.keys()):
            raise ValueError(f"{folder} was saved without its projection, expected {SHARED[0]} and {SHARED[1]}: drawing them "
                             "again needs another library's random numbers; save it with save_projection=True")
        A, B = (tensors.pop(key) for key in SHARED)
        if A.ndim != 2 or B.ndim != 2 or not len(A) == B.shape[1] == options["r"]:
            raise ValueError(f"{folder}: got vera_A {A.shape} and vera_B {B.shape}, expected (r, in) and (out, r) with r = "
                             f"{options['r']}")
        config = super().to_config(options, tensors, folder)
        config.projection = Projection(config.projection_prng_key, config.r, (A, B))
        return config


VeraFormat("vera", "VERA", VeraConfig, ("r", "projection_prng_key", "save_projection", "vera_dropout", "d_initial",
                                        "init_weights"), {"bias": "none"}, {"bias": "none"}).register()
