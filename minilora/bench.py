"""The benchmark: one LoRA training step of minilora against PyTorch + PEFT, in one run on one machine.

Each side runs in a process of its own (so that its peak memory is its own) on the same weights, the same first A, and the
same batches. First their losses are compared; a difference ends the run. Then the two take turns: minilora, PyTorch, minilora,
PyTorch, …, while the other side sleeps. What is printed are medians of single steps, their ratio, and the GEMM floor: what
the step's matrix products alone would take, measured in the same run at the same shapes.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from .autograd import Op, cross_entropy
from .lora import LoraConfig, adapters_of, add_adapter
from .lora.config import module_names
from .nn import Transformer, TransformerConfig
from .nn.names import export_state
from .training import AdamW

LR = 1e-3


@dataclass(frozen=True)
class Case:
    """One row of the benchmark: a model, a batch, and where the adapters are."""

    config: TransformerConfig
    batch: int
    tokens: int
    targets: tuple[str, ...]                               # our module names; PEFT gets the file names of the same modules

    def batches(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Random ids and targets (B, T), the same for both sides."""
        rng = np.random.default_rng(0)
        while True:
            ids = rng.integers(0, self.config.vocab_size, (self.batch, self.tokens + 1))
            yield ids[:, :-1], ids[:, 1:]


CASES = {
    "course": Case(TransformerConfig.gpt2(vocab_size=256, d_model=128, n_layers=4, n_heads=4, max_len=64), 32, 64,
                   ("qkv_proj",)),
}


def run(names: list[str], rounds: int = 20, steps: int = 5) -> dict[str, Any]:
    """Measure the named cases: `rounds` turns of `steps` timed steps for each side. Returns a JSON-ready report.

    Raises ValueError for an unknown case, RuntimeError if PyTorch, transformers or PEFT are missing or the losses differ.
    """
    for name in names:
        if name not in CASES:
            raise ValueError(f"unknown benchmark case {name!r}: expected one of {', '.join(CASES)}")
    results = {name: _measure(name, rounds, steps) for name in names}
    return {"machine": machine(), "cases": results}


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        model = next((line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line), model)
    return {"cpu": model, "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "python": platform.python_version(), "numpy": np.__version__}


def table(report: dict[str, Any]) -> str:
    """The report as text."""
    m = report["machine"]
    lines = [f"{m['cpu']}, {m['cores']} cores, Python {m['python']}, NumPy {m['numpy']}", ""]
    for name, case in report["cases"].items():
        ours, theirs = case["minilora"], case["torch"]
        lines += [
            f"{name}: one LoRA step (forward, backward, AdamW), {case['tokens_per_step']} tokens, "
            f"{case['trainable']} trainable",
            f"{'':14}{'median':>9}{'10-90 %':>16}{'tokens/s':>11}{'peak memory':>13}{'of it, the job':>16}",
        ]
        for label, side in ((("minilora"), ours), (f"torch {theirs['version']}", theirs)):
            lines.append(f"{label:14}{side['median_ms']:7.1f} ms{side['p10_ms']:7.1f} - {side['p90_ms']:6.1f}"
                         f"{case['tokens_per_step'] / side['median_ms'] * 1e3:11.0f}"
                         f"{side['peak_mb']:10.0f} MB{side['peak_mb'] - side['idle_mb']:13.0f} MB")
        lines += [
            f"ratio of medians {case['ratio']:.2f}, of memory {case['memory_ratio']:.2f} "
            f"(losses agree to {case['loss_difference']:.1e})",
            f"GEMM floor {case['gemm_floor_ms']:.1f} ms, "
            f"{100 * case['gemm_floor_ms'] / ours['median_ms']:.0f} % of minilora's step",
            "where minilora's time goes: "
            + ", ".join(f"{op} {share:.0%}" for op, share in list(case["by_op"].items())[:8]),
            "",
        ]
    return "\n".join(lines)


def _measure(name: str, rounds: int, steps: int) -> dict[str, Any]:
    case = CASES[name]
    with tempfile.TemporaryDirectory() as folder, _worker("minilora", name, folder) as ours:
        ours_ready = ours.ask("prepare")               # writes the weights that the other side loads
        with _worker("torch", name, folder) as theirs:
            theirs_ready = theirs.ask("prepare")
            pairs = list(zip(ours.ask("losses"), theirs.ask("losses"), strict=True))
            difference = max(abs(a - b) / abs(b) for a, b in pairs)
            if difference > 1e-4:
                raise RuntimeError(f"{name}: the two sides compute different losses, {pairs}: nothing was timed")
            times: dict[str, list[float]] = {"minilora": [], "torch": []}
            for _ in range(rounds):
                times["minilora"] += ours.ask("steps", steps)
                times["torch"] += theirs.ask("steps", steps)
            memory = {"minilora": ours.ask("memory"), "torch": theirs.ask("memory")}
            profile = ours.ask("profile")
    sides = {}
    for side in times:
        ms = np.array(times[side]) * 1e3
        sides[side] = {"median_ms": float(np.median(ms)), "p10_ms": float(np.percentile(ms, 10)),
                       "p90_ms": float(np.percentile(ms, 90)), "peak_mb": memory[side]["peak"], "idle_mb": memory[side]["idle"]}
    sides["torch"]["version"] = theirs_ready["version"]
    return {**sides, "ratio": sides["minilora"]["median_ms"] / sides["torch"]["median_ms"],
            "memory_ratio": sides["minilora"]["peak_mb"] / sides["torch"]["peak_mb"], "loss_difference": difference,
            "tokens_per_step": case.batch * case.tokens, "trainable": ours_ready["trainable"], **profile}


class _Worker:
    """The other end of a pipe: a process that answers one JSON line for each JSON line."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process

    def ask(self, what: str, argument: int = 0) -> Any:
        assert self.process.stdin and self.process.stdout
        try:
            self.process.stdin.write(json.dumps([what, argument]) + "\n")
            self.process.stdin.flush()
            answer = self.process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            raise RuntimeError("a benchmark process ended early (its message is above)")
        value = json.loads(answer)
        if isinstance(value, dict) and "error" in value:
            raise RuntimeError(value["error"])
        return value


@contextmanager
def _worker(side: str, case: str, folder: str) -> Iterator[_Worker]:
    command = [sys.executable, "-m", "minilora.bench", side, case, folder]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        yield _Worker(process)
    finally:
        process.kill()
        process.communicate()


class MiniloraSide:
    """minilora's half of a case."""

    def __init__(self, case: Case, folder: str) -> None:
        self.case, self.folder, self.batches = case, folder, case.batches()

    def prepare(self, _: int) -> dict[str, Any]:
        self.model = Transformer(self.case.config, seed=0)
        save_file(export_state(self.case.config, self.model.state_dict()), Path(self.folder, "base.safetensors"))
        add_adapter(self.model, LoraConfig(target_modules=list(self.case.targets)))
        names = module_names(self.model)
        factors = {names[path][-1]: a.lora_A.data for path, a in adapters_of(self.model).items()}
        save_file(factors, Path(self.folder, "A.safetensors"))
        parameters = [p for _, p in self.model.named_parameters(trainable=True)]
        self.optimizer = AdamW(parameters, lr=LR)
        return {"trainable": sum(p.size for p in parameters)}

    def step(self) -> Any:
        ids, targets = next(self.batches)
        loss = cross_entropy(self.model(ids), targets)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss

    def value(self, loss: Any) -> float:
        return loss.item()

    def profile(self, _: int) -> dict[str, Any]:
        """Shares of the step by op, and the GEMM floor: every 2-D product of a step timed alone at its shape."""
        seconds: dict[str, float] = {}
        shapes: list[tuple[tuple[int, ...], ...]] = []
        with _timed_ops(seconds, shapes):
            for _ in range(5):
                start = time.perf_counter()
                self.step()
                seconds["whole"] = seconds.get("whole", 0.0) + time.perf_counter() - start
        whole = seconds.pop("whole")
        seconds["Python, AdamW, rest"] = whole - sum(seconds.values())
        shares = {op: s / whole for op, s in sorted(seconds.items(), key=lambda item: -item[1])}
        floor = sum(_gemm_seconds(shape) * shapes.count(shape) for shape in set(shapes)) / 5
        return {"by_op": shares, "gemm_floor_ms": 1e3 * floor}


class TorchSide:
    """PyTorch + PEFT's half of a case."""

    def __init__(self, case: Case, folder: str) -> None:
        self.case, self.folder, self.batches = case, folder, case.batches()

    def prepare(self, _: int) -> dict[str, Any]:
        try:
            import peft
            import torch
            import transformers
        except ImportError as error:
            raise RuntimeError(f"the benchmark compares with PyTorch, transformers and PEFT, and {error.name} is missing: "
                               'pip install torch "minilora[parity]"') from None
        cfg = self.case.config
        self.torch = torch
        torch.set_num_threads(machine()["cores"])
        base = transformers.GPT2LMHeadModel(transformers.GPT2Config(
            vocab_size=cfg.vocab_size, n_positions=cfg.max_len, n_embd=cfg.d_model, n_layer=cfg.n_layers, n_head=cfg.n_heads,
            n_inner=cfg.d_ff, activation_function="gelu_new", resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
            layer_norm_epsilon=cfg.norm_eps, use_cache=False))
        state = {k: torch.from_numpy(v) for k, v in load_file(Path(self.folder, "base.safetensors")).items()}
        missing, unexpected = base.load_state_dict(state, strict=False)
        if unexpected or set(missing) - {"lm_head.weight"}:
            raise RuntimeError(f"the weights do not fit transformers' model: missing {missing}, unexpected {unexpected}")
        factors = load_file(Path(self.folder, "A.safetensors"))
        config = peft.LoraConfig(target_modules=list(factors), fan_in_fan_out=True)
        self.model = peft.get_peft_model(base, config)
        for name, module in self.model.named_modules():
            if name.removeprefix("base_model.model.") in factors:
                module.lora_A["default"].weight.data = torch.from_numpy(factors[name.removeprefix("base_model.model.")])
        self.model.train()
        self.optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=LR, weight_decay=0.01)
        return {"version": torch.__version__.split("+")[0]}

    def step(self) -> Any:
        ids, targets = (self.torch.from_numpy(a) for a in next(self.batches))
        logits = self.model(input_ids=ids).logits
        loss = self.torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss

    def value(self, loss: Any) -> float:
        return loss.item()


def serve(side: str, case: str, folder: str) -> None:
    """The worker process: answer requests on standard input until it closes."""
    work: Any = {"minilora": MiniloraSide, "torch": TorchSide}[side](CASES[case], folder)
    idle = 0.0
    for line in sys.stdin:
        what, argument = json.loads(line)
        try:
            if what == "losses":
                answer: Any = [work.value(work.step()) for _ in range(3)]
            elif what == "steps":
                time.sleep(0.25)                           # until the other side's threads have stopped spinning
                answer = []
                for _ in range(argument + 1):
                    start = time.perf_counter()
                    work.value(work.step())
                    answer.append(time.perf_counter() - start)
                answer = answer[1:]                        # the first one only warms the caches up again
            elif what == "memory":
                answer = {"peak": _peak_mb(), "idle": idle}
            else:
                answer = getattr(work, what)(argument)
                idle = idle or _peak_mb()                  # after `prepare`: libraries, weights and optimiser
        except RuntimeError as error:
            answer = {"error": str(error)}
        print(json.dumps(answer), flush=True)


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024**2 if sys.platform == "darwin" else 1024)


@contextmanager
def _timed_ops(seconds: dict[str, float], shapes: list[tuple[tuple[int, ...], ...]]) -> Iterator[None]:
    """Time every op's forward and backward by name, and note the shapes of the 2-D products, while the block runs."""
    from .backend import kernels

    def timed(name: str, function: Any) -> Any:
        def call(*args: Any) -> Any:
            start = time.perf_counter()
            result = function(*args)
            seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - start
            return result
        return call

    kernel_type: Any = type(kernels(np.zeros(1)))
    matmul = kernel_type.matmul

    def noted_matmul(self: Any, a: Any, b: Any, ta: bool = False, tb: bool = False) -> Any:
        if a.ndim == b.ndim == 2:
            shapes.append((a.shape[::-1] if ta else a.shape, b.shape[::-1] if tb else b.shape))
        return matmul(self, a, b, ta, tb)

    def noted(function: Any, products: Callable[..., list[Any]]) -> Any:
        """Note the products that the arguments say, and not those that the function makes of them inside."""
        def call(self: Any, *args: Any) -> Any:
            before = len(shapes)
            result = function(self, *args)
            shapes[before:] = products(*args)
            return result
        return call

    noting = {
        "matmul": noted_matmul,
        "linear": noted(kernel_type.linear, lambda x, W, b: [(x.shape, W.shape[::-1])]),
        "feed_forward": noted(kernel_type.feed_forward, lambda x, W1, b1, W2, *rest: [
            (x.shape, W1.shape[::-1]), ((len(x), len(W1)), W2.shape[::-1])]),
        "feed_forward_grad": noted(kernel_type.feed_forward_grad, lambda dy, s, W1, W2, hidden: [
            (dy.shape, W2.shape), (s.shape, W1.shape)]),
    }
    kernels_before = {name: getattr(kernel_type, name) for name in noting}
    originals: dict[Any, Any] = {cls: (cls.forward, cls.backward) for cls in Op.registry.values()}
    try:
        for name, function in noting.items():
            setattr(kernel_type, name, function)
        for cls, (forward, backward) in originals.items():
            cls.forward, cls.backward = timed(cls.__name__, forward), timed(f"{cls.__name__} backward", backward)
        yield
    finally:
        for name, function in kernels_before.items():
            setattr(kernel_type, name, function)
        for cls, (forward, backward) in originals.items():
            cls.forward, cls.backward = forward, backward


def _gemm_seconds(shape: tuple[tuple[int, ...], ...], repeats: int = 7) -> float:
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal(s).astype(np.float32) for s in shape)
    out, times = a @ b, []
    for _ in range(repeats):
        start = time.perf_counter()
        np.matmul(a, b, out=out)
        times.append(time.perf_counter() - start)
    return float(np.median(times))


if __name__ == "__main__":
    serve(*sys.argv[1:])
