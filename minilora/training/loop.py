"""The training loop: batches in, one optimiser step after the other, a History out.

One update, `update`, serves a single run and a sweep. Nothing in it waits for the device: losses stay arrays and come to
the host together, every `log_every` steps.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import numpy as np
from tqdm.std import tqdm

from ..autograd import Tensor, cross_entropy, no_grad
from ..backend import Array, array_module, device_of, enough_memory, to_host
from ..lora.model import adaptations
from ..nn import Module, Transformer
from .checkpoint import generator_states, load_checkpoint, load_generator_states, load_parameters, save_checkpoint
from .optim import AdamW, clip_grad_norm
from .schedule import SCHEDULES, schedule

Batch = Any     # (ids, targets), or {"ids", "targets", further arguments of the model such as "attention_mask"}
Batches = Iterable[Batch] | Callable[[int], Batch]

NOT_PART_OF_THE_RUN = ("progress", "log_every", "checkpoint", "checkpoint_every")      # they change no number

FACTS = {"step": int, "done": bool, "waited": int, "config": dict, "history": dict, "generators": dict}    # of a checkpoint


@dataclass(kw_only=True)
class TrainConfig:
    """How to train.

    steps: optimiser updates. lr: the peak learning rate; schedule "linear" (as the LoRA paper), "cosine" or "constant", after
    warmup updates (or that share of all, below 1). weight_decay, betas, eps: of AdamW. clip: the largest norm of the gradient
    (None: no clipping). accumulate: batches per update; their mean counts every target once, as one big batch would.
    eval_every: updates between evaluations (None: only at the end). patience: stop after that many evaluations in a row
    without a new best, and end with the best parameters. log_every: updates between looks at the losses, which wait for the
    device. progress: a bar, when run in a terminal. checkpoint: a directory; a run that finds its checkpoint there goes on
    from it. checkpoint_every: updates between checkpoints (None: a tenth of the run). ignore_index, label_smoothing: of the
    default loss.

    Raises ValueError, naming the field, for values out of range.
    """

    steps: int
    lr: float = 1e-4
    warmup: float = 0
    schedule: str = "linear"
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    clip: float | None = None
    accumulate: int = 1
    eval_every: int | None = None
    patience: int | None = None
    log_every: int = 10
    progress: bool = True
    checkpoint: str | None = None
    checkpoint_every: int | None = None
    ignore_index: int = -100
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        for name in ("steps", "accumulate", "log_every", "eval_every", "patience", "checkpoint_every"):
            value = getattr(self, name)
            optional = name in ("eval_every", "patience", "checkpoint_every")
            if not (isinstance(value, int) and value >= 1) and not (value is None and optional):
                raise ValueError(f"TrainConfig.{name} = {value!r}: expected a whole number of at least 1")
        for name, low, inside in (("lr", 0.0, True), ("weight_decay", 0.0, True), ("eps", 0.0, False), ("clip", 0.0, False)):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and (value > low or (inside and value == low))):
                raise ValueError(f"TrainConfig.{name} = {value!r}: expected a finite number {'>=' if inside else '>'} 0")
        if len(self.betas) != 2 or not all(0.0 <= beta < 1.0 for beta in self.betas):
            raise ValueError(f"TrainConfig.betas = {self.betas!r}: expected two numbers with 0 <= β < 1")
        if not 0.0 <= self.label_smoothing < 1.0:
            raise ValueError(f"TrainConfig.label_smoothing = {self.label_smoothing}: expected 0 <= ε < 1")
        if self.schedule not in SCHEDULES:
            raise ValueError(f"TrainConfig.schedule = {self.schedule!r}: expected one of {', '.join(SCHEDULES)}")
        if not 0 <= self.warmup <= self.steps:
            raise ValueError(f"TrainConfig.warmup = {self.warmup} with steps = {self.steps}: expected 0 <= warmup <= steps")
        if self.patience is not None and self.eval_every is None:
            raise ValueError(f"TrainConfig.patience = {self.patience} without eval_every: say how often to evaluate")

    def factor(self, step: int) -> float:
        """What the schedule multiplies the learning rate by in update `step`, counted from 0."""
        return schedule(self.schedule, step, self.steps, self.warmup)


@dataclass
class History:
    """What a run did: loss and lr of every update, eval and best as (updates done, value), tokens seen, seconds."""

    loss: list[float] = field(default_factory=list)
    lr: list[float] = field(default_factory=list)
    eval: list[tuple[int, float]] = field(default_factory=list)
    tokens: int = 0
    seconds: float = 0.0
    best: tuple[int, float] | None = None


def train(model: Module, batches: Batches, config: TrainConfig, *, loss: Callable[[Any, Batch], Tensor] | None = None,
          penalty: Callable[[Any], Tensor] | None = None, evaluate: Callable[[Any], float] | Iterable[Batch] | None = None,
          optimizer: Any = None, callback: Callable[[int, Any, History], Any] | None = None) -> History:
    """Train the parameters of `model` that require a gradient, in place.

    batches: an iterable of batches, or a function batches(i) of the number i = 0, 1, … of the batch (what a repeatable run
    wants). A batch is (ids, targets), or a dict of "ids", "targets" and further arguments of the model ("attention_mask",
    "token_type_ids"): host integers. loss(model, batch) -> () replaces the mean cross-entropy; with `accumulate` its values
    are then averaged with equal weights. penalty(model) -> () is added to the loss of every update, and to no evaluation.
    evaluate: a list of batches (their mean loss), or a function of the model, where lower is better; it runs in evaluation
    mode, without gradients. optimizer: in place of AdamW, anything with step(factor), zero_grad(), state_dict() and
    load_state_dict(); its own rates count, not config.lr. callback(step, model, history) comes after each update, gradients
    still in place; history.loss is filled only every log_every updates.

    The model is left in the mode it was in. A run that was cut off and goes on from its checkpoint equals the uncut one bit
    for bit on NumPy, if the batches are repeatable: an iterable is read again from its start, and what was used is skipped.

    Raises ValueError if nothing trains, adapters are merged, batches run out, or the checkpoint is another run's;
    FloatingPointError, naming the step, if the loss is not finite; MemoryError, saying what to change, if memory runs out.
    """
    run = _Run(model, config, loss, penalty, evaluate, optimizer)
    run.resume()
    source = batch_source(batches, run.step * config.accumulate, config.steps * config.accumulate)
    bar = tqdm(total=config.steps, initial=run.step, leave=False, disable=None if config.progress else True, unit="step")
    try:
        with enough_memory(device_of(next(iter(run.params.values())).data).name), in_mode(model, True), bar:
            while not run.done:
                run.advance([next(source) for _ in range(config.accumulate)])
                bar.update()
                if callback is not None:
                    callback(run.step, model, run.history)
                run.look(bar)
    finally:
        for p in run.params.values():
            p.grad = None
    return run.history


class _Run:
    """The state of one call of `train`: what a checkpoint holds, and what is done after an update."""

    def __init__(self, model: Any, config: TrainConfig, loss: Any, penalty: Any, evaluate: Any, optimizer: Any) -> None:
        self.model, self.config, self.loss, self.penalty = model, config, loss, penalty
        self.evaluate = evaluate if evaluate is None or callable(evaluate) else eval_batches(evaluate)
        if config.patience is not None and evaluate is None:
            raise ValueError(f"TrainConfig.patience = {config.patience}, but evaluate is None: give batches or a function")
        if any(a.saved is not None for a in adaptations(model)):
            raise ValueError("train while adapters are merged: unmerge_adapter(model) first")
        self.params = dict(model.named_parameters(trainable=True))
        if not self.params:
            raise ValueError("nothing trains: no parameter requires a gradient; add_adapter or set_adapter, or unfreeze()")
        self.optimizer = optimizer or AdamW(self.params.values(), config.lr, config.betas, config.eps, config.weight_decay)
        self.history = History()
        self.step, self.done = 0, False                        # updates made; whether the run is over
        self.best: dict[str, Array] = {}                       # the parameters of the best evaluation, with patience
        self.waited = 0                                        # evaluations since then
        self.pending: list[Array] = []                         # losses that have not come to the host
        self.clock = time.perf_counter()
        self.seen = self.clock, 0                              # when the bar last showed numbers, and the tokens until then

    def advance(self, window: list[Batch]) -> None:
        """One update from the batches of a window. Nothing here waits for the device."""
        config, factor = self.config, self.config.factor(self.step)
        losses: Iterable[Tensor]
        if self.loss is None:
            shares = target_shares(window, config.ignore_index)[:, 0].tolist()
            losses = (model_loss(self.model, batch, config) * share for batch, share in zip(window, shares))
        else:
            losses = (self.loss(self.model, batch) * (1.0 / len(window)) for batch in window)
        losses = itertools.chain(losses, (added(self.model) for added in (self.penalty,) if added is not None))
        self.pending.append(update(losses, self.params.values(), self.optimizer, config.clip, factor))
        groups = getattr(self.optimizer, "groups", None)
        self.history.lr.append((groups[0]["lr"] if groups else config.lr) * factor)
        self.history.tokens += sum(tokens_in(batch) for batch in window)
        self.step += 1

    def look(self, bar: tqdm) -> None:
        """After an update: log, evaluate, stop, save, each when it is due."""
        config, step = self.config, self.step
        self.done = step == config.steps
        evaluates = self.evaluate is not None and (self.done or (config.eval_every and step % config.eval_every == 0))
        saves = config.checkpoint and step % (config.checkpoint_every or max(1, config.steps // 10)) == 0
        if step % config.log_every == 0 or self.done or evaluates or saves:
            self.collect()
            bar.set_postfix(self.shown(), refresh=False)
        if evaluates:
            self.judge()
        if self.done:
            for path, values in self.best.items():
                self.params[path].data[...] = values
        if self.done or saves:
            now = time.perf_counter()
            self.history.seconds, self.clock = self.history.seconds + now - self.clock, now
        if config.checkpoint and (self.done or saves):
            self.save()

    def shown(self) -> dict[str, str]:
        """For the bar: the last loss and learning rate, and tokens a second since the last look."""
        now, history = time.perf_counter(), self.history
        rate = (history.tokens - self.seen[1]) / max(now - self.seen[0], 1e-9)
        self.seen = now, history.tokens
        return {"loss": f"{history.loss[-1]:.4f}", "lr": f"{history.lr[-1]:.2e}", "tokens/s": f"{rate:,.0f}"}

    def collect(self) -> None:
        """Bring the pending losses to the host, together."""
        if not self.pending:
            return
        losses = to_host(array_module(*self.pending).stack(self.pending)).astype(float).tolist()
        self.pending = []
        start = len(self.history.loss)
        self.history.loss += losses
        for i, value in enumerate(losses):
            if not math.isfinite(value):
                raise FloatingPointError(f"the loss is {value} in step {start + i + 1} of {self.config.steps}: lower the "
                                         "learning rate, warm up longer, or set clip=1.0; the parameters are spoilt")

    def judge(self) -> None:
        """Evaluate, keep the parameters if they are the best so far, and stop when patience is at its end."""
        value, history = self.value(), self.history
        history.eval.append((self.step, value))
        if value < (history.best[1] if history.best else math.inf):
            history.best, self.waited = (self.step, value), 0
            if self.config.patience is not None:
                self.best = {path: p.data.copy() for path, p in self.params.items()}
        else:
            self.waited += 1
            self.done = self.done or (self.config.patience is not None and self.waited >= self.config.patience)

    def value(self) -> float:
        """The evaluation of the model as it is, in evaluation mode and without gradients."""
        with in_mode(self.model, False), no_grad():
            if callable(self.evaluate):
                return float(self.evaluate(self.model))
            if self.loss is not None:
                return float(np.mean([self.loss(self.model, batch).item() for batch in self.evaluate]))
            return mean_loss(self.model, self.evaluate, self.config.ignore_index)

    def save(self) -> None:
        arrays = {f"model.{path}": to_host(p.data).copy() for path, p in self.params.items()}
        arrays |= {f"best.{path}": to_host(a).copy() for path, a in self.best.items()}
        arrays |= {f"optimizer.{name}": array for name, array in self.optimizer.state_dict().items()}
        facts = {"step": self.step, "done": self.done, "waited": self.waited, "config": self._identity(),
                 "history": asdict(self.history), "generators": generator_states(self.model)}
        save_checkpoint(str(self.config.checkpoint), arrays, facts)

    def resume(self) -> None:
        """Go on from the checkpoint, if the config names a directory that holds one."""
        found = load_checkpoint(self.config.checkpoint) if self.config.checkpoint else None
        if found is None:
            return
        arrays, facts = found
        where = f"the checkpoint in {self.config.checkpoint}"
        for name, kind in FACTS.items():
            if type(facts.get(name)) is not kind:
                raise ValueError(f"{where} has {name} = {facts.get(name)!r}, expected a {kind.__name__}: it is damaged; delete "
                                 "it to start the run again")
        own = self._identity()
        for name in own:
            saved = facts["config"].get(name)
            if saved != own[name]:
                raise ValueError(f"{where} is of a run with {name} = {saved!r}, this one has {own[name]!r}: choose another "
                                 "directory, or delete it")
        parts: dict[str, dict[str, np.ndarray]] = {"model": {}, "best": {}, "optimizer": {}}
        for name, array in arrays.items():
            part, _, rest = name.partition(".")
            parts.setdefault(part, {})[rest] = array
        if parts["best"]:
            load_parameters(self.params, parts["best"], where)
            self.best = {path: p.data.copy() for path, p in self.params.items()}
        load_parameters(self.params, parts["model"], where)
        self.optimizer.load_state_dict(parts["optimizer"])
        load_generator_states(self.model, facts["generators"], where)
        history: dict[str, Any] = {f.name: facts["history"].get(f.name) for f in fields(History)}
        history |= {"eval": [tuple(pair) for pair in history["eval"]], "best": history["best"] and tuple(history["best"])}
        self.history = History(**history)
        self.step, self.done, self.waited = facts["step"], facts["done"], facts["waited"]
        self.seen = self.clock, self.history.tokens

    def _identity(self) -> dict[str, Any]:
        """The fields of the config that change numbers, as JSON gives them back."""
        values = {f.name: getattr(self.config, f.name) for f in fields(self.config) if f.name not in NOT_PART_OF_THE_RUN}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


@contextmanager
def in_mode(model: Module, training: bool) -> Iterator[None]:
    """Training or evaluation mode inside the block; afterwards every module is in the mode it was in."""
    found = [(module, module.training) for _, module in model.named_modules()]
    model.train(training)
    try:
        yield
    finally:
        for module, mode in found:
            module.training = mode


def update(losses: Iterable[Tensor], params: Iterable[Any], optimizer: Any, clip: float | None, factor: float,
           groups: int | None = None) -> Array:
    """One optimiser step on the sum of `losses`, each () or, for K adapters side by side (groups=K), (K,). Returns the sum.

    The losses are computed one after the other, so the graph of only one of them lives at a time.
    """
    optimizer.zero_grad()
    total: Array = None
    for loss in losses:
        loss.sum().backward()
        total = loss.data if total is None else total + loss.data
    if clip is not None:
        clip_grad_norm(params, clip, groups)
    optimizer.step(factor)
    return total


def as_dict(batch: Batch) -> dict[str, Any]:
    """A batch in its long form. Raises ValueError for what is neither a pair nor a dict with "ids" and "targets"."""
    if isinstance(batch, (tuple, list)) and len(batch) == 2:
        return {"ids": batch[0], "targets": batch[1]}
    if isinstance(batch, dict) and {"ids", "targets"} <= batch.keys():
        return batch
    got = f"a dict of {', '.join(map(repr, batch))}" if isinstance(batch, dict) else f"a {type(batch).__name__}"
    raise ValueError(f"batch: got {got}, expected (ids, targets) or a dict with 'ids' and 'targets'")


def model_loss(model: Any, batch: Batch, config: TrainConfig, groups: int | None = None) -> Tensor:
    """Mean cross-entropy of the model on a batch: () or, for K groups of rows, (K,)."""
    counting: Any = {"ignore_index": config.ignore_index, "label_smoothing": config.label_smoothing, "groups": groups}
    if isinstance(model, Transformer):
        inputs = dict(as_dict(batch))
        return model.loss(inputs.pop("ids"), inputs.pop("targets"), **inputs, **counting)
    logits, targets = logits_and_targets(model, batch)
    return cross_entropy(logits, targets, **counting)


def logits_and_targets(model: Any, batch: Batch) -> tuple[Tensor, Any]:
    """The model's answer to a batch, and what it should be."""
    inputs = dict(as_dict(batch))
    ids, targets = inputs.pop("ids"), inputs.pop("targets")
    return model(ids, **inputs), targets


def mean_loss(model: Any, batches: Iterable[Batch], ignore_index: int = -100) -> float:
    """The mean cross-entropy in nats over all counted targets of all batches, without smoothing or gradients.

    The model stays in the mode it is in. Raises ValueError if there is no batch.
    """
    config, batches = TrainConfig(steps=1, ignore_index=ignore_index), eval_batches(batches)
    with no_grad():
        losses = [model_loss(model, batch, config).data for batch in batches]
    weights = [target_counts(batch, ignore_index)[0] for batch in batches]
    return float(np.average(to_host(array_module(*losses).stack(losses)).astype(float), weights=weights))


def eval_batches(batches: Iterable[Batch]) -> list[Batch]:
    """Batches that are used again and again. Raises ValueError if there are none."""
    batches = list(batches)
    if not batches:
        raise ValueError("evaluate: got no batches, expected at least one")
    return batches


def target_counts(batch: Batch, ignore_index: int, groups: int = 1) -> np.ndarray:                 # -> (groups,)
    """How many targets count in each group of rows."""
    return (to_host(as_dict(batch)["targets"]) != ignore_index).reshape(groups, -1).sum(axis=1)


def target_shares(window: Sequence[Batch], ignore_index: int, groups: int = 1) -> np.ndarray:      # -> (batches, groups)
    """Each batch's share of the counted targets of the window: the weights that make means of batches a mean of targets."""
    counts = np.stack([target_counts(batch, ignore_index, groups) for batch in window])
    return counts / np.maximum(counts.sum(axis=0), 1)


def tokens_in(batch: Batch) -> int:
    """The number of tokens of a batch, without padding where its mask says so; 0 for a form of a user's own."""
    if isinstance(batch, dict):
        return int(np.sum(to_host(batch["attention_mask"]))) if "attention_mask" in batch else np.size(batch.get("ids", ()))
    return np.size(batch[0]) if isinstance(batch, (tuple, list)) and batch else 0


def batch_source(batches: Batches, start: int, total: int) -> Iterator[Batch]:
    """The batches from number `start` on. Raises ValueError when an iterable has fewer than `total`."""
    if callable(batches):
        for i in range(start, total):
            yield batches(i)
        return
    got = 0
    for batch in batches:
        got += 1
        if got > start:
            yield batch
    raise ValueError(f"the batches ran dry: got {got}, expected steps × accumulate = {total}; pass more, "
                     "itertools.cycle(batches), or a function batches(i)")
