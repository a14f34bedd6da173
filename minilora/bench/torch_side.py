"""PyTorch + PEFT's half of a case: transformers' model with the same weights, PEFT's LoRA with the same factors.

The adapters of a sweep are all on the model before anything is timed, and train one after another. Attention is
transformers' default.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from ..backend.parallel import workers
from ..training.sweep import task_batches
from .cases import LR, WEIGHT_DECAY, Case

TASKS = {"lm": "CAUSAL_LM", "sequence": "SEQ_CLS"}


class TorchStep:
    """One adapter: forward, backward, AdamW."""

    def __init__(self, case: Case, folder: str) -> None:
        self.case, self.folder, self.batches = case, Path(folder), case.batches()

    def prepare(self) -> dict[str, Any]:
        """Build the model; what trains, and with which versions. Raises RuntimeError if PyTorch finds no GPU for a GPU case."""
        import peft
        import torch
        import transformers

        self.torch, self.device = torch, "cuda" if self.case.device == "gpu" else "cpu"
        if self.device == "cuda" and not torch.cuda.is_available():
            raise RuntimeError(f"PyTorch {torch.__version__} finds no GPU: install a build of it for CUDA")
        torch.set_num_threads(workers())
        torch.backends.cuda.matmul.allow_tf32 = self.case.tf32
        transformers.logging.set_verbosity_error()
        model = their_model(self.case.config)
        state = {name: torch.from_numpy(array) for name, array in load_file(self.folder / "base.safetensors").items()}
        missing, unexpected = model.load_state_dict(state, strict=False)
        if unexpected or any(self.case.config.tie_embeddings is False or name != "lm_head.weight" for name in missing):
            raise RuntimeError(f"the weights do not fit transformers' model: missing {missing}, unexpected {unexpected}")
        self.model = self._with_adapters(model).to(self.device)
        versions = {library.__name__: library.__version__.split("+")[0] for library in (torch, transformers, peft)}
        return {"trainable": self._finish(), "versions": versions}

    def _with_adapters(self, model: Any) -> Any:
        """The model with PEFT's adapters "0", "1", …, whose factors are those of the file."""
        import peft

        factors = load_file(self.folder / "adapters.safetensors")
        cfg = self.case.config
        for k, (config, _) in enumerate(self.case.cells()):
            own = {name.partition("/")[2]: array for name, array in factors.items() if name.startswith(f"{k}/")}
            targets = sorted({name.rpartition("/")[0] for name in own})
            options = peft.LoraConfig(r=config.r, lora_alpha=config.lora_alpha, target_modules=targets,
                                      fan_in_fan_out=cfg.model_type == "gpt2", task_type=TASKS[cfg.head])
            if k == 0:
                model = peft.get_peft_model(model, options, "0")
            else:
                model.add_adapter(str(k), options)
            modules = dict(model.base_model.model.named_modules())
            for name, array in own.items():
                path, _, factor = name.rpartition("/")
                getattr(modules[path], factor)[str(k)].weight.data = self.torch.from_numpy(array)
        return model

    def _finish(self) -> int:
        self.model.train()
        self.optimizer = self._optimizer()
        return sum(p.numel() for p in self._trainable())

    def _trainable(self) -> list[Any]:
        return [p for p in self.model.parameters() if p.requires_grad]

    def _optimizer(self) -> Any:
        return self.torch.optim.AdamW(self._trainable(), lr=LR, weight_decay=WEIGHT_DECAY)

    def step(self) -> float:
        """The loss. To bring it to the host is to wait until the device has done the step."""
        return self.update(next(self.batches), self.optimizer)

    def update(self, batch: tuple[np.ndarray, np.ndarray], optimizer: Any) -> float:
        """Forward, backward, AdamW."""
        ids, targets = (self.torch.from_numpy(array).to(self.device) for array in batch)
        logits = self.model(input_ids=ids).logits
        loss = self.torch.nn.functional.cross_entropy(logits.flatten(0, -2), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    def check(self) -> dict[str, Any]:
        """The losses of the first steps."""
        return {"values": [self.step() for _ in range(3)]}

    def device_mb(self) -> float | None:
        """The most that tensors took of a GPU's memory; None on the CPU."""
        return self.torch.cuda.max_memory_allocated() / 2**20 if self.device == "cuda" else None


class TorchSweep(TorchStep):
    """One adapter after another. A step of the benchmark is one update of all."""

    def _finish(self) -> int:
        self.model.train()
        self.optimizers, trainable = [], 0
        for _ in self._adapters():
            self.optimizers.append(self._optimizer())
            trainable += sum(p.numel() for p in self._trainable())
        return trainable

    def _adapters(self) -> Iterator[int]:
        for k in range(len(self.case.cells())):
            self.model.set_adapter(str(k))
            yield k

    def run(self, steps: int) -> list[list[float]]:        # (K, steps)
        """The losses of the next updates of every adapter, on the batches that its cell begins with."""
        seeds = [seed for _, seed in self.case.cells()]
        return [[self.update(task_batches(self.case.draw, seeds[k])(i), self.optimizers[k]) for i in range(steps)]
                for k in self._adapters()]

    def step(self) -> float:
        """The mean of the last losses."""
        return float(np.mean([losses[-1] for losses in self.run(self.case.updates)]))

    def check(self) -> dict[str, Any]:
        """The losses of the first steps of every adapter, adapter after adapter."""
        return {"values": [loss for losses in self.run(3) for loss in losses]}


class TorchDecode(TorchStep):
    """transformers' greedy generation with its key-value cache; the adapter, if there is one, is merged."""

    def _finish(self) -> int:
        if self.case.cells():
            self.model = self.model.merge_and_unload()
        self.model.eval()
        ids, _ = next(self.batches)
        self.prompt = self.torch.from_numpy(ids).to(self.device)
        return 0

    def step(self) -> Any:                                 # (B, T + new_tokens)
        """Prompt and new tokens."""
        ids = self.model.generate(self.prompt, attention_mask=self.torch.ones_like(self.prompt), do_sample=False,
                                  max_new_tokens=self.case.new_tokens, use_cache=True, pad_token_id=0)
        return ids.cpu()

    def check(self) -> dict[str, Any]:
        """The new tokens (row after row), and the largest logit where each of them was chosen."""
        ids, T = self.step(), self.case.tokens
        with self.torch.no_grad():
            logits = self.model(ids[:, :-1].to(self.device)).logits.cpu()
        return {"tokens": ids[:, T:].flatten().tolist(), "values": logits[:, T - 1 :].amax(-1).flatten().tolist()}


KINDS = {"step": TorchStep, "sweep": TorchSweep, "decode": TorchDecode}


def their_model(cfg: Any) -> Any:
    """transformers' model of the same shape, without dropout; no token ends a text."""
    import transformers

    common = {"vocab_size": cfg.vocab_size, "num_labels": cfg.n_labels or 2, "tie_word_embeddings": cfg.tie_embeddings,
              "use_cache": False, "bos_token_id": None, "eos_token_id": None}
    if cfg.model_type == "gpt2":
        return transformers.GPT2LMHeadModel(transformers.GPT2Config(
            n_positions=cfg.max_len, n_embd=cfg.d_model, n_layer=cfg.n_layers, n_head=cfg.n_heads, n_inner=cfg.d_ff,
            activation_function="gelu_new", resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, layer_norm_epsilon=cfg.norm_eps,
            **common))
    if cfg.model_type == "bert":
        return transformers.BertForSequenceClassification(transformers.BertConfig(
            max_position_embeddings=cfg.max_len, hidden_size=cfg.d_model, num_hidden_layers=cfg.n_layers,
            num_attention_heads=cfg.n_heads, intermediate_size=cfg.d_ff, hidden_act="gelu", layer_norm_eps=cfg.norm_eps,
            type_vocab_size=cfg.n_token_types, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **common))
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(
        max_position_embeddings=cfg.max_len, hidden_size=cfg.d_model, num_hidden_layers=cfg.n_layers,
        num_attention_heads=cfg.n_heads, num_key_value_heads=cfg.n_kv_heads, intermediate_size=cfg.d_ff,
        rms_norm_eps=cfg.norm_eps, rope_parameters={"rope_type": "default", "rope_theta": cfg.rope_theta}, **common))
