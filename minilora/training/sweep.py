"""A sweep is one run: K adapters of several ranks, seeds and learning rates train side by side on one frozen base.

Their parameters lie along a leading axis (stacks.py): LoRA's are A (K, r_max, in) and B (K, out, r_max). Rows of A and columns
of B beyond an adapter's rank are zero, get zero gradients (each is a product with the other's zeros), and so stay zero. The
batch is K groups of rows, the loss is (K,), and the gradient of its sum is, for each adapter, exactly the one it would get
alone. So are its start, its batches, its learning rate, its clipping and its optimiser's state. The cost is K times the
arithmetic, but one set of launches and one Python loop.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
from tqdm.std import tqdm

from ..autograd import Tensor, no_grad
from ..backend import Array, array_module, device_of, enough_memory, to_device, to_host
from ..lora import Adapter, Replacement, TargetConfig, adapters_of, add_adapter, delete_adapter, set_adapter
from ..lora.model import adaptations
from ..nn import Dropout, Linear, Transformer
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
from .stacks import STACKS, stack_for

NAME = "sweep"                                                     # of the adapters that carry the axis K, while they train
Task = Callable[[int, np.random.Generator], Batch]
Loss = Callable[[Tensor, Any, int], Tensor]


@dataclass(frozen=True)
class Cell:
    """One adapter of a sweep: its place along K, and what it trains with."""

    index: int
    config: TargetConfig
    seed: int
    lr: float


@dataclass(frozen=True)
class TrainedAdapter:
    """An adapter that a sweep has trained: module path -> {parameter: array on the host}, cut to its own rank."""

    config: TargetConfig
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

    losses (steps, K), with the penalty of a method that has one; evals [(updates done, mean losses (K,))], without it; rows:
    one dict a cell, with "cell", "rank", "alpha", "use_rslora", "seed", "lr", "parameters" (how many it trains), "train_loss"
    (of the last update), "diverged" (a loss that is not finite), and "eval_loss" (the last) if the sweep evaluates.
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


def sweep(model: Transformer, task: Task, configs: Sequence[TargetConfig], *, seeds: Sequence[int] = (0,),
          lrs: Sequence[float] | None = None, train: TrainConfig, evaluate: Iterable[Batch] | None = None,
          loss: Loss | None = None, chunk: int | None = None, memory: int = 2 << 30,
          loraplus_lr_ratio: float = 1.0) -> SweepResult:
    """Train every combination of config, seed and learning rate, K cells side by side.

    task(i, rng) -> batch i, (ids (B, T), targets) or a dict as for `train`, host integers of one shape; rng depends on the
    cell's seed and on i alone, and the task on nothing else, so every cell sees the batches it would see alone
    (`task_batches`). A task may also return a batch for each cell, ids (K, B, T). configs: without dropout, on one common
    set of modules: LoRA with any start (True, "pissa", "olora" … may stand side by side), or in all cells LoRA-FA, VeRA,
    tensor-train LoRA, SoRA (with its proximal steps), or AdaLoRA (with its penalty and its budget for each cell).
    lrs: None means (train.lr,). train: all but patience and checkpoint applies; clipping is by each adapter's own norm.
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
        _check_stackable(adapters, dict(model.named_modules()))
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
        k, config = cell.index, cast(Any, cell.config)
        rows.append({"cell": k, "rank": getattr(config, "init_r", config.r), "alpha": getattr(config, "lora_alpha", None),
                     "use_rslora": getattr(config, "use_rslora", False), "seed": cell.seed, "lr": cell.lr, "parameters": size,
                     "train_loss": float(losses[-1, k]),
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
    trained = [(name, p) for stack in stacks.values() for name, p in stack.named_parameters(trainable=True)]
    if ratio != 1.0 and {name for name, _ in trained} - {"lora_A", "lora_B", "weight", "bias"}:
        raise ValueError(f"sweep: loraplus_lr_ratio = {ratio} with parameters besides A and B, expected LoRA: leave it at 1")
    params, lrs = [p for _, p in trained], np.array([cell.lr for cell in cells])
    decay = config.weight_decay
    groups: list[dict[str, Any]] = [{"params": params, "lr": lrs, "weight_decay": decay}]
    if ratio != 1.0:                                               # LoRA+: biases are in the group of B, without decay
        sides = (("lora_A", "weight"), 1.0, decay), (("lora_B",), ratio, decay), (("bias",), ratio, 0.0)
        groups = [{"params": own, "lr": lrs * times, "weight_decay": share} for names, times, share in sides
                  if (own := [p for name, p in trained if name in names])]
    optimizer = AdamW(groups, lrs, config.betas, config.eps, decay)
    device, dtype = device_of(params[0].data).name, params[0].dtype
    makers, own_configs = dict.fromkeys(stack.companion for stack in stacks.values()), [cell.config for cell in cells]
    beside = [make(stacks, own_configs) for make in makers if make is not None]
    run = _Chunk(np.empty((config.steps, K)), [], [{} for _ in cells])
    pending: list[Array] = []
    for step in range(config.steps):
        window = [_side_by_side(task, cells, step * config.accumulate + j) for j in range(config.accumulate)]
        if loss is None:
            shares = target_shares(window, config.ignore_index, K).astype(dtype)                           # (accumulate, K)
            losses = (model_loss(model, batch, config, K) * to_device(share, device) for batch, share in zip(window, shares))
        else:
            losses = (loss(*logits_and_targets(model, batch), K) * (1.0 / len(window)) for batch in window)
        penalties = (added for one in beside if (added := one.penalty()) is not None)
        pending.append(update(itertools.chain(losses, penalties), params, optimizer, config.clip, config.factor(step), K))
        done = step + 1
        for one in beside:
            one.after(done, lrs * config.factor(step))
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
    weights = sum(2 * math.prod(modules[path].weight.shape) for path in adapters)
    # Factors that are no parameters (VeRA's) are made anew in every step, each from a frozen matrix, with a gradient.
    made = sum(3 * math.prod(t.shape) for adapter in adapters.values() for t in (adapter.factors() or ())[:2]
               if all(t is not p for _, p in adapter.named_parameters()))
    return model.embed.weight.dtype.itemsize * (max(activations, evaluation) + weights + made + 5 * _size(adapters))


def _size(adapters: dict[str, Adapter], trainable: bool | None = None) -> int:
    return sum(p.size for adapter in adapters.values() for _, p in adapter.named_parameters(trainable))


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
        for dropout in ("lora_dropout", "vera_dropout"):
            if getattr(cell.config, dropout, 0.0):
                raise ValueError(f"sweep: {dropout} = {getattr(cell.config, dropout)}, expected 0: adapters side by side draw "
                                 "no masks; train those with dropout one by one")
    if any(isinstance(m, Dropout) and m.p and m.training for _, m in model.named_modules()):
        raise ValueError("sweep: the model has dropout, expected none: call model.eval() first, and the sweep trains without")
    if any(a.saved is not None for a in adaptations(model)):
        raise ValueError("sweep while adapters are merged: unmerge_adapter(model) first")


def _check_stackable(adapters: list[dict[str, Adapter]], layers: dict[str, Any]) -> None:
    """One set of modules for all cells, and on them only what can lie along an axis K."""
    paths = adapters[0].keys()
    for k, own in enumerate(adapters):
        if own.keys() != paths:
            odd = sorted(own.keys() ^ paths)[0]
            raise ValueError(f"sweep: cell {k} differs from cell 0 in whether it adapts {odd}: one sweep has one set of "
                             "target_modules; run one sweep for each set")
        for path, adapter in own.items():
            if type(adapter) not in STACKS or (isinstance(adapter, Replacement) and not isinstance(layers[path], Linear)):
                raise ValueError(f"sweep: {path} has a {type(adapter).__name__}, which cannot be stacked: "
                                 f"expected one of {', '.join(sorted(kind.__name__ for kind in STACKS))} on linear layers; "
                                 "train the others one by one")
            if stack_for([adapters[0][path], adapter]) is None:
                raise ValueError(f"sweep: cell {k} has a {type(adapter).__name__} on {path} where cell 0 has a "
                                 f"{type(adapters[0][path]).__name__}: run one sweep for each method")
            if dict(adapter.named_parameters()).keys() != dict(adapters[0][path].named_parameters()).keys():
                raise ValueError(f"sweep: cell {k} has other parameters on {path} than cell 0: run one sweep for each order of "
                                 "tensor trains")
