"""A sweep is one run: K adapters of several ranks, seeds and learning rates train side by side on one frozen base.

Their factors lie along a leading axis: A (K, r_max, in), B (K, out, r_max). Rows of A and columns of B beyond an adapter's
rank are zero, get zero gradients (each is a product with the other's zeros), and so stay zero. The batch is K groups of
rows, the loss is (K,), and the gradient of its sum is, for each adapter, exactly the one it would get alone. So are its
start, its batches, its learning rate, its clipping and its optimiser's state. The cost is K times the arithmetic, but one
set of launches and one Python loop.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from tqdm.std import tqdm

from ..autograd import Tensor, matmul, no_grad
from ..backend import Array, array_module, device_of, enough_memory, to_device, to_host
from ..lora import Adapter, LoRA, LoraConfig, Replacement, adapters_of, add_adapter, delete_adapter, set_adapter
from ..lora.model import adaptations
from ..nn import Dropout, Parameter, Transformer
from .loop import (
    Batch,
    TrainConfig,
    as_dict,
    eval_batches,
    logits_and_targets,
    model_loss,
    target_counts,
    target_shares,
    update,
)
from .optim import AdamW

NAME = "sweep"                                                     # of the adapters that carry the axis K, while they train
Task = Callable[[int, np.random.Generator], Batch]
Loss = Callable[[Tensor, Any, int], Tensor]


@dataclass(frozen=True)
class Cell:
    """One adapter of a sweep: its place along K, and what it trains with."""

    index: int
    config: LoraConfig
    seed: int
    lr: float


@dataclass(frozen=True)
class TrainedAdapter:
    """An adapter that a sweep has trained: module path -> {parameter: array on the host}, cut to its own rank."""

    config: LoraConfig
    seed: int
    parameters: dict[str, dict[str, np.ndarray]]

    def install(self, model: Transformer, name: str = "default") -> None:
        """Put it on a model as a normal adapter, to analyse, merge or save. Raises ValueError where `add_adapter` does."""
        add_adapter(model, self.config, name, self.seed)
        for path, adapter in adapters_of(model, name).items():
            adapter.load_state_dict(self.parameters[path])


@dataclass(frozen=True)
class SweepResult:
    """What a sweep found, for K cells in the order configs × seeds × lrs (the last changes fastest).

    losses (steps, K); evals [(updates done, mean losses (K,))]; rows: one dict a cell, with "cell", "rank", "alpha",
    "use_rslora", "seed", "lr", "parameters" (how many it trains), "train_loss" (of the last update), "diverged" (a loss that
    is not finite), and "eval_loss" (the last) if the sweep evaluates.
    """

    losses: np.ndarray
    rows: list[dict[str, Any]]
    evals: list[tuple[int, np.ndarray]]
    adapters: list[TrainedAdapter]

    def adapter(self, k: int) -> TrainedAdapter:
        """The adapter of cell k."""
        return self.adapters[k]

    def install(self, model: Transformer, k: int, name: str = "default") -> None:
        """Put the adapter of cell k on a model, as a normal adapter called `name`."""
        self.adapters[k].install(model, name)


def sweep(model: Transformer, task: Task, configs: Sequence[LoraConfig], *, seeds: Sequence[int] = (0,),
          lrs: Sequence[float] | None = None, train: TrainConfig, evaluate: Iterable[Batch] | None = None,
          loss: Loss | None = None, chunk: int | None = None, memory: int = 2 << 30,
          loraplus_lr_ratio: float = 1.0) -> SweepResult:
    """Train every combination of config, seed and learning rate, K cells side by side.

    task(i, rng) -> batch i, (ids (B, T), targets) or a dict as for `train`, host integers of one shape; rng depends on the
    cell's seed and on i alone, and the task on nothing else, so every cell sees the batches it would see alone
    (`task_batches`). A task may also return a batch for each cell, ids (K, B, T). configs: LoRA without dropout on one
    common set of modules, with any start (True, "pissa", "olora" … may stand side by side); or LoRA-FA in all cells. lrs:
    None means (train.lr,). train: all but patience and checkpoint applies; clipping is by each adapter's own norm.
    evaluate: batches on which the mean loss of every cell is taken at the end and every train.eval_every updates.
    loss(logits, targets, K) -> (K,) replaces the mean cross-entropy of each cell, for groups of rows (K·B, …). chunk: cells
    side by side at most (None: as many as fit `memory` bytes, by an estimate from the shapes); the result does not depend
    on it beyond rounding. loraplus_lr_ratio: B learns so much faster than A (LoRA+), in every cell. A diverging cell gets
    NaN and leaves the others alone.

    The model is left as it was, also after an exception; adapters that are on it are set aside meanwhile.
    Raises ValueError for configs that differ in their modules or cannot be stacked, dropout, and options out of range;
    MemoryError, saying what to change, if memory runs out.
    """
    cells = [Cell(i, config, seed, float(lr)) for i, (config, seed, lr) in
             enumerate(itertools.product(configs, seeds, (train.lr,) if lrs is None else lrs))]
    _check(model, cells, train, chunk)
    if not 1.0 <= loraplus_lr_ratio < float("inf"):
        raise ValueError(f"sweep: loraplus_lr_ratio = {loraplus_lr_ratio}, expected at least 1: B learns faster than A")
    evaluate = None if evaluate is None else eval_batches(evaluate)
    parts: list[_Chunk] = []
    order: list[int] = []
    device = device_of(model.embed.weight.data).name
    with enough_memory(device), plain_base(model), np.errstate(all="ignore"):
        adapters = [_drawn(model, cell) for cell in cells]
        _check_stackable(adapters)
        sizes = [_size(own, trainable=True) for own in adapters]
        order = sorted(range(len(cells)), key=lambda k: _size(adapters[k]))    # chunks of similar rank: little is padding
        if chunk is None:
            first = _side_by_side(task, cells[:1], 0)
            chunk = max(1, memory // bytes_per_cell(model, adapters[order[-1]], first, evaluate or []))
        with tqdm(total=train.steps * len(cells), leave=False, disable=None if train.progress else True, unit="step") as bar:
            for start in range(0, len(cells), chunk):
                chosen = order[start : start + chunk]
                parts.append(_train_chunk(model, task, [cells[k] for k in chosen], [adapters[k] for k in chosen], train,
                                          evaluate, loss, bar, loraplus_lr_ratio))
    back = np.argsort(order)                                                   # where each cell is in the order of training
    losses = np.concatenate([part.losses for part in parts], axis=1)[:, back]
    evals = [(steps, np.concatenate([part.evals[i][1] for part in parts])[back]) for i, (steps, _) in enumerate(parts[0].evals)]
    found = [parameters for part in parts for parameters in part.parameters]
    trained = [TrainedAdapter(cell.config, cell.seed, found[back[cell.index]]) for cell in cells]
    return SweepResult(losses, _rows(cells, sizes, losses, evals), evals, trained)


def _rows(cells: list[Cell], sizes: list[int], losses: np.ndarray, evals: list[Any]) -> list[dict[str, Any]]:
    rows = []
    for cell, size in zip(cells, sizes):
        k, config = cell.index, cell.config
        rows.append({"cell": k, "rank": config.r, "alpha": config.lora_alpha, "use_rslora": config.use_rslora,
                     "seed": cell.seed, "lr": cell.lr, "parameters": size, "train_loss": float(losses[-1, k]),
                     "diverged": not bool(np.isfinite(losses[:, k]).all())})
        if evals:
            rows[-1]["eval_loss"] = float(evals[-1][1][k])
    return rows


def task_batches(task: Task, seed: int) -> Callable[[int], Batch]:
    """The batches that a cell of this seed sees, in the form that `train` takes: batches(i)."""
    return lambda i: task(i, np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(i,))))


@contextmanager
def plain_base(model: Any) -> Iterator[None]:
    """Inside the block the model carries no adapters and nothing trains; afterwards it is as it was."""
    layers = [(module, module.adaptation) for _, module in model.named_modules() if hasattr(module, "adaptation")]
    needs = [(p, p.requires_grad) for _, p in model.named_parameters()]
    configs, model.adapter_configs = model.adapter_configs, {}
    for layer, _ in layers:
        layer.adaptation = None
    model.freeze()
    try:
        yield
    finally:
        for layer, adaptation in layers:
            layer.adaptation = adaptation
        for p, need in needs:
            p.requires_grad = need
        model.adapter_configs = configs


class LoRAStack(Adapter):
    """K LoRA adapters on one layer: A (K, r_max, in), B (K, out, r_max), scales (K,). W'_k = W + s_k B_k A_k."""

    rowwise = False                                                # the rows of a batch are K groups
    goes_with: tuple[type, ...] = ()                               # other stacks, whose adapters this one takes as well

    def __init__(self, adapters: Sequence[LoRA]) -> None:
        self.ranks = [a.lora_A.shape[0] for a in adapters]
        (r_max, K), first = (max(self.ranks), len(adapters)), adapters[0]
        A = np.zeros((K, r_max, first.lora_A.shape[1]), first.lora_A.dtype)
        B = np.zeros((K, first.lora_B.shape[0], r_max), first.lora_B.dtype)
        for k, (adapter, r) in enumerate(zip(adapters, self.ranks)):
            A[k, :r], B[k, :, :r] = to_host(adapter.lora_A), to_host(adapter.lora_B)
        device = device_of(first.lora_A.data).name
        self.lora_A, self.lora_B = Parameter(to_device(A, device)), Parameter(to_device(B, device))
        self.scales = to_device(np.array([a.scale for a in adapters], A.dtype), device)

    def adapted_weight(self, W: Tensor) -> Tensor:                 # (out, in) -> (K, out, in)
        return W + matmul(self.lora_B * self.scales[:, None, None], self.lora_A)

    def factors(self) -> tuple[Parameter, Parameter, Array]:
        return self.lora_A, self.lora_B, self.scales

    def unstacked(self) -> list[dict[str, np.ndarray]]:
        """The parameters of each adapter, cut to its rank, on the host."""
        A, B = to_host(self.lora_A), to_host(self.lora_B)
        return [{"lora_A": A[k, :r].copy(), "lora_B": B[k, :, :r].copy()} for k, r in enumerate(self.ranks)]


class ReplacementStack(Adapter):
    """K whole layers in one place (a classifier that is trained with each adapter): weight (K, out, in), bias (K, 1, out)."""

    rowwise = False                                                # the rows of a batch are K groups
    goes_with = ()

    def __init__(self, adapters: Sequence[Replacement]) -> None:
        self.weight, self.bias = _stacked([a.weight for a in adapters]), None
        if adapters[0].bias is not None:
            self.bias = _stacked([a.bias for a in adapters], shape=(1, -1))

    def forward(self, x: Tensor, base: Any) -> Tensor:             # (K·B, …, in) -> (K·B, …, out)
        K, out, _ = self.weight.shape
        y = matmul(x.reshape(K, -1, x.shape[-1]), self.weight.transpose(0, 2, 1))
        return (y if self.bias is None else y + self.bias).reshape(*x.shape[:-1], out)

    def unstacked(self) -> list[dict[str, np.ndarray]]:
        """The parameters of each layer, on the host."""
        W = to_host(self.weight)
        if self.bias is None:
            return [{"weight": w.copy()} for w in W]
        return [{"weight": w.copy(), "bias": b[0].copy()} for w, b in zip(W, to_host(self.bias))]


STACKS: dict[type, Any] = {LoRA: LoRAStack, Replacement: ReplacementStack}     # methods/stacks.py has more


def stack_for(adapters: Sequence[Adapter]) -> Any:
    """The class that takes all these adapters of one module side by side, or None."""
    kinds = {STACKS.get(type(adapter)) for adapter in adapters}
    return next((kind for kind in kinds if kind and kinds <= {kind, *kind.goes_with}), None)


@dataclass
class _Chunk:
    losses: np.ndarray                                             # (steps, K)
    evals: list[tuple[int, np.ndarray]]
    parameters: list[dict[str, dict[str, np.ndarray]]]             # of each cell: module path -> parameter -> array


def _train_chunk(model: Transformer, task: Task, cells: list[Cell], adapters: list[dict[str, Adapter]], config: TrainConfig,
                 evaluate: Sequence[Batch] | None, loss: Loss | None, bar: tqdm, ratio: float) -> _Chunk:
    """Train some cells side by side. No step waits for the device: the losses come to the host every log_every steps."""
    K = len(cells)
    stacks = _put_on(model, cells[0], adapters)
    faster = [p for stack in stacks.values() for name, p in stack.named_parameters(trainable=True) if name == "lora_B"]
    others = [p for stack in stacks.values() for name, p in stack.named_parameters(trainable=True) if name != "lora_B"]
    params, lrs = others + faster, np.array([cell.lr for cell in cells])
    groups = [{"params": own, "lr": rates} for own, rates in ((others, lrs), (faster, lrs * ratio)) if own]
    optimizer = AdamW(groups, lrs, config.betas, config.eps, config.weight_decay)
    device, dtype = device_of(params[0].data).name, params[0].dtype
    run = _Chunk(np.empty((config.steps, K)), [], [{} for _ in cells])
    pending: list[Array] = []
    for step in range(config.steps):
        window = [_side_by_side(task, cells, step * config.accumulate + j) for j in range(config.accumulate)]
        if loss is None:
            shares = target_shares(window, config.ignore_index, K).astype(dtype)                           # (accumulate, K)
            losses = (model_loss(model, batch, config, K) * to_device(share, device) for batch, share in zip(window, shares))
        else:
            losses = (loss(*logits_and_targets(model, batch), K) * (1.0 / len(window)) for batch in window)
        pending.append(update(losses, params, optimizer, config.clip, config.factor(step), K))
        done = step + 1
        if done % config.log_every == 0 or done == config.steps:
            run.losses[done - len(pending) : done] = to_host(array_module(*pending).stack(pending))
            bar.update(K * len(pending))
            pending = []
        if evaluate is not None and (done == config.steps or (config.eval_every and done % config.eval_every == 0)):
            run.evals.append((done, _evaluation(model, evaluate, config, loss, K)))
    delete_adapter(model, NAME)
    for path, stack in stacks.items():
        for mine, parameters in zip(run.parameters, stack.unstacked()):
            mine[path] = parameters
    return run


def _evaluation(model: Any, batches: Sequence[Batch], config: TrainConfig, loss: Loss | None, K: int) -> np.ndarray:   # (K,)
    """The mean loss of each of K cells, all on the same batches, without smoothing or gradients."""
    config = replace(config, label_smoothing=0.0)
    losses, weights = [], []
    for batch in batches:
        repeated = {key: np.concatenate([to_host(value)] * K) for key, value in as_dict(batch).items()}
        with no_grad():
            value = model_loss(model, repeated, config, K) if loss is None else loss(*logits_and_targets(model, repeated), K)
        losses.append(to_host(value.data))
        weights.append(target_counts(batch, config.ignore_index)[0] if loss is None else 1)
    return np.average(np.stack(losses).astype(float), axis=0, weights=weights)


def _drawn(model: Transformer, cell: Cell) -> dict[str, Adapter]:
    """The adapters of one cell, module path -> Adapter, exactly as `add_adapter` draws them for it alone."""
    add_adapter(model, cell.config, NAME, cell.seed)
    adapters = adapters_of(model, NAME)
    delete_adapter(model, NAME)
    return adapters


def _put_on(model: Transformer, cell: Cell, adapters: list[dict[str, Adapter]]) -> dict[str, Any]:
    """Put the adapters of several cells on the model, stacked along K: module path -> stack."""
    add_adapter(model, cell.config, NAME)
    modules: dict[str, Any] = dict(model.named_modules())
    stacks = {path: stack_for(own)(own) for path in adapters[0] for own in [[each[path] for each in adapters]]}
    for path, stack in stacks.items():
        modules[path].adaptation.adapters[NAME] = stack
    set_adapter(model, NAME)
    return stacks


def _side_by_side(task: Task, cells: Sequence[Cell], number: int) -> dict[str, np.ndarray]:
    """Batch `number` of every cell, one below the other: ids (K·B, T), targets and the rest likewise."""
    by_seed = {seed: {key: to_host(value) for key, value in as_dict(task_batches(task, seed)(number)).items()}
               for seed in dict.fromkeys(cell.seed for cell in cells)}
    own = [{key: value[cell.index] for key, value in batch.items()} if batch["ids"].ndim == 3 else batch
           for cell, batch in ((cell, by_seed[cell.seed]) for cell in cells)]
    shapes = {batch["ids"].shape for batch in own}
    if len(shapes) > 1:
        raise ValueError(f"batch {number} of the task has ids of shapes {' and '.join(map(str, sorted(shapes)))}: expected one "
                         "shape for all cells; pad or cut them")
    return {key: np.concatenate([batch[key] for batch in own]) for key in own[0]}


def bytes_per_cell(model: Any, adapters: dict[str, Adapter], batch: dict[str, np.ndarray], evaluate: Sequence[Batch]) -> int:
    """An estimate of the memory that one more cell takes while it trains: activations, adapted weights, adapter states.

    For n tokens, in numbers: each layer keeps about 12 D + 4 F a token; the head holds 3 V (logits, their exponentials and
    gradient); one layer's attention scores, 4 B H T². An adapted module may form its weight (forward, and again as
    temporary), and a parameter of the adapter comes with gradient, two moments and a temporary.
    """
    cfg, (B, T) = model.cfg, batch["ids"].shape
    n, V = B * T, cfg.n_labels or cfg.vocab_size
    activations = n * (cfg.n_layers * (12 * cfg.d_model + 4 * cfg.d_ff) + 3 * V) + 4 * B * cfg.n_heads * T * T
    evaluation = max((np.size(as_dict(b)["ids"]) * (3 * V + 4 * cfg.d_ff) for b in evaluate), default=0)
    modules: dict[str, Any] = dict(model.named_modules())
    weights = sum(2 * modules[path].weight.size for path in adapters)
    return model.embed.weight.dtype.itemsize * (max(activations, evaluation) + weights + 5 * _size(adapters))


def _size(adapters: dict[str, Adapter], trainable: bool | None = None) -> int:
    return sum(p.size for adapter in adapters.values() for _, p in adapter.named_parameters(trainable))


def _stacked(parameters: Sequence[Any], shape: tuple[int, ...] | None = None) -> Parameter:
    arrays = [p.data if shape is None else p.data.reshape(shape) for p in parameters]
    return Parameter(array_module(*arrays).stack(arrays))


def _check(model: Transformer, cells: list[Cell], train: TrainConfig, chunk: int | None) -> None:
    if not cells:
        raise ValueError("sweep: got no cells, expected at least one config, one seed and one learning rate")
    if chunk is not None and chunk < 1:
        raise ValueError(f"sweep: chunk = {chunk}, expected at least 1 cell at a time")
    for field in ("patience", "checkpoint"):
        if getattr(train, field) is not None:
            raise ValueError(f"sweep: train.{field} = {getattr(train, field)!r}, expected None: the cells of a sweep run "
                             "together from start to end")
    for cell in cells:
        if cell.config.lora_dropout:
            raise ValueError(f"sweep: lora_dropout = {cell.config.lora_dropout}, expected 0: adapters side by side draw no "
                             "masks; train those with dropout one by one")
    if any(isinstance(m, Dropout) and m.p and m.training for _, m in model.named_modules()):
        raise ValueError("sweep: the model has dropout, expected none: call model.eval() first, and the sweep trains without")
    if any(a.saved is not None for a in adaptations(model)):
        raise ValueError("sweep while adapters are merged: unmerge_adapter(model) first")


def _check_stackable(adapters: list[dict[str, Adapter]]) -> None:
    """One set of modules for all cells, and on them only what can lie along an axis K."""
    paths = adapters[0].keys()
    for k, own in enumerate(adapters):
        if own.keys() != paths:
            odd = sorted(own.keys() ^ paths)[0]
            raise ValueError(f"sweep: cell {k} differs from cell 0 in whether it adapts {odd}: one sweep has one set of "
                             "target_modules; run one sweep for each set")
        for path, adapter in own.items():
            if type(adapter) not in STACKS or (type(adapter) is LoRA and adapter.factors()[0] is not adapter.lora_A):
                raise ValueError(f"sweep: {path} has a {type(adapter).__name__}, which cannot be stacked: "
                                 "expected LoRA, LoRA-FA or a start from W on linear layers; train the others one by one")
            if stack_for([adapters[0][path], adapter]) is None:
                raise ValueError(f"sweep: cell {k} has a {type(adapter).__name__} on {path} where cell 0 has a "
                                 f"{type(adapters[0][path]).__name__}: run one sweep for each method")
