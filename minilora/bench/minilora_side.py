"""minilora's half of a case: one class for each kind. What every half answers stands in worker.py."""

from __future__ import annotations

from typing import Any

from ..autograd import no_grad
from ..backend import current_device, to_host
from ..lora import add_adapter, count_parameters, merge_adapter
from ..nn import generate
from ..training import AdamW, TrainConfig, sweep
from .cases import LR, WEIGHT_DECAY, Case, build
from .products import profile


class MiniloraStep:
    """One adapter: forward, backward, AdamW."""

    def __init__(self, case: Case, folder: str) -> None:
        self.case, self.batches = case, case.batches()

    def prepare(self) -> dict[str, Any]:
        """Build the model; what trains, and where."""
        self.model = build(self.case)
        config, seed = self.case.cells()[0]
        add_adapter(self.model, config, seed=seed)
        parameters = [p for _, p in self.model.named_parameters(trainable=True)]
        self.optimizer = AdamW(parameters, lr=LR, weight_decay=WEIGHT_DECAY)
        return {"trainable": count_parameters(self.model)["trainable"], **gpu()}

    def step(self) -> Any:
        """The loss. To bring it to the host is to wait until the device has done the step."""
        ids, targets = next(self.batches)
        loss = self.model.loss(ids, targets)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.item()

    def check(self) -> dict[str, Any]:
        """The losses of the first steps."""
        return {"values": [self.step() for _ in range(3)]}

    def profile(self, steps: int) -> dict[str, Any]:
        """Where the time of a step goes."""
        found = profile(self.step, steps)
        for name in ("gemm_gflop", "gemm_floor_ms"):
            found[name] /= self.case.updates
        return found

    def device_mb(self) -> float | None:
        """The most that the model took of a GPU's memory (the pool keeps what it once had); None on the CPU."""
        return current_device().xp.get_default_memory_pool().total_bytes() / 2**20 if gpu() else None


class MiniloraSweep(MiniloraStep):
    """All adapters side by side, by `ml.sweep`. A step of the benchmark is one update of all; set-up is in its time."""

    def prepare(self) -> dict[str, Any]:
        """Build the model; what trains, and where."""
        self.model = build(self.case)
        return {"trainable": sum(row["parameters"] for row in self.run(1).rows), **gpu()}

    def run(self, steps: int) -> Any:
        """The sweep from its start."""
        config = TrainConfig(steps=steps, lr=LR, schedule="constant", weight_decay=WEIGHT_DECAY, progress=False)
        (configs, seeds) = ([config for config, seed in self.case.cells() if seed == self.case.seeds[0]], self.case.seeds)
        return sweep(self.model, self.case.draw, configs, seeds=seeds, train=config)

    def step(self) -> float:
        """The mean of the last losses."""
        return float(self.run(self.case.updates).losses[-1].mean())

    def check(self) -> dict[str, Any]:
        """The losses of the first steps of every adapter, adapter after adapter."""
        return {"values": self.run(3).losses.T.ravel().tolist()}


class MiniloraDecode(MiniloraStep):
    """Greedy generation with a key-value cache; the adapter, if there is one, is merged."""

    def prepare(self) -> dict[str, Any]:
        """Build the model, and merge its adapter."""
        self.model = build(self.case)
        for config, seed in self.case.cells():
            add_adapter(self.model, config, seed=seed)
            merge_adapter(self.model)
        self.prompt = next(self.batches)[0]                # (B, T)
        return {"trainable": 0, **gpu()}

    def step(self) -> Any:                                 # (B, T + new_tokens)
        """Prompt and new tokens."""
        return generate(self.model, self.prompt, self.case.new_tokens)

    def check(self) -> dict[str, Any]:
        """The new tokens (row after row), and the largest logit where each of them was chosen."""
        ids, T = self.step(), self.case.tokens
        with no_grad():
            logits = to_host(self.model(ids[:, :-1]).data)
        return {"tokens": ids[:, T:].ravel().tolist(), "values": logits[:, T - 1 :].max(axis=-1).ravel().tolist()}


KINDS = {"step": MiniloraStep, "sweep": MiniloraSweep, "decode": MiniloraDecode}


def gpu() -> dict[str, str]:
    """{"gpu": its name} if the current device is one, else nothing."""
    device = current_device()
    if device.name != "gpu":
        return {}
    return {"gpu": device.xp.cuda.runtime.getDeviceProperties(device.xp.cuda.runtime.getDevice())["name"].decode(),
            "cupy": device.xp.__version__}
