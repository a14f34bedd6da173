"""PEFT's folders of prompt tuning and prefix tuning: one tensor, `prompt_embeddings`, and what it was made for."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..backend import device_of, to_device, to_host
from ..lora import adapters_of, add_adapter
from ..lora.files import LOADERS, SAVERS, TASKS
from ..lora.peft_format import CONFIG, WEIGHTS, existing, read_safetensors, write_folder
from ..nn import Transformer

KEY = "prompt_embeddings"


@dataclass(frozen=True)
class PromptFormat:
    """How a method of virtual tokens lies in a folder. kind: its peft_type. config: our class of it."""

    method: str
    kind: str
    config: type[Any]

    def register(self) -> None:
        """Let save_adapter and load_adapter use this format."""
        SAVERS[self.method], LOADERS[self.kind] = self.save, self.load

    def save(self, model: Transformer, folder: Path, name: str, base_model: str | None) -> None:
        """Write the virtual tokens. Raises ValueError if a layer is trained beside them, which these files cannot hold."""
        adapters, cfg = adapters_of(model, name), model.cfg
        if others := adapters.keys() - {"embed"}:
            raise ValueError(f"adapter {name!r} trains {', '.join(sorted(others))} too, expected virtual tokens alone: their "
                             "files hold nothing else")
        heads = cfg.n_kv_heads if self.method == "prefix" else cfg.n_heads
        options = {"peft_type": self.kind, "task_type": TASKS[str(cfg.head)], "inference_mode": True,
                   "base_model_name_or_path": base_model, "num_virtual_tokens": adapters["embed"].p,
                   "token_dim": heads * cfg.head_dim if self.method == "prefix" else cfg.d_model,
                   "num_attention_heads": heads, "num_layers": cfg.n_layers, "num_transformer_submodules": 1}
        text = json.dumps(options, indent=2, sort_keys=True).encode()
        write_folder(folder, {KEY: np.ascontiguousarray(to_host(adapters["embed"].prompt))}, text)

    def load(self, model: Transformer, folder: Path, name: str) -> None:
        """Put the folder's virtual tokens in front of a VirtualTokens. Raises ValueError if they do not fit it."""
        options = json.loads((existing(folder) / CONFIG).read_text(encoding="utf-8"))
        tensors, p = read_safetensors(folder / WEIGHTS), options.get("num_virtual_tokens")
        if tensors.keys() != {KEY}:
            raise ValueError(f"{folder / WEIGHTS} has {', '.join(sorted(tensors))[:80] or 'nothing'}, expected {KEY} alone: "
                             "save the adapter again")
        value = tensors[KEY]
        cfg = model.cfg
        width = cfg.n_layers * 2 * cfg.n_kv_heads * cfg.head_dim if self.method == "prefix" else cfg.d_model
        if value.shape != (p, width):
            raise ValueError(f"{folder / WEIGHTS}: {KEY} of shape {value.shape}, expected ({p}, {width}) for this model and "
                             "the config's num_virtual_tokens: is it the base?")
        dtype = model.embed.weight.dtype
        with np.errstate(over="ignore"):
            value = value.astype(dtype)
        if not np.isfinite(value).all():
            raise ValueError(f"{KEY}: got values too large for the model's {dtype}: load onto a float64 model")
        add_adapter(model, self.config(num_virtual_tokens=p), name)
        prompt = adapters_of(model, name)["embed"].prompt
        prompt.data[...] = to_device(value, device_of(prompt.data).name)
