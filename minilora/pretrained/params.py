"""What a method costs on a model, from shapes alone: trained numbers (exact), the file's size (exact), memory by part.

    params("llama-2-70b", LoraConfig(r=8)).table()

Each method is its count on a layer (out, in), as its paper gives it: see `FORMS`. So a new method joins by one entry.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

from ..lora import METHODS, LoraConfig, TargetConfig
from ..lora.config import find_targets, matches
from ..lora.model import layers_to_save
from ..methods import BitFitConfig, IA3Config, LoraFAConfig, VeraConfig
from ..methods.ia3 import FEEDFORWARD
from ..nn import Embedding, Linear, PackedLinear
from ..rank.report import text_table
from .activations import Kept, kept_numbers, rows_of
from .outline import Outline, outline

PRECISIONS = ("float32", "bf16", "4 bits")
PARTS = ("weights", "gradients", "optimizer", "activations")


@dataclass(frozen=True)
class Layer:
    """One adapted layer as a method sees it: W (out, in) with or without a bias, and the rank. n: the rows it works on.

    rows: of the weight that is formed with the update in it. q, k and v have one together, counted with the first of them.
    """

    out: int
    inn: int
    bias: bool
    r: int
    n: int
    rows: int = 0
    on_input: bool = False                                 # IA3: whether the input is rescaled


@dataclass(frozen=True)
class Form:
    """A method in numbers: what it trains, what it holds frozen (its files have both), and what a step keeps for backward."""

    trained: Callable[[Layer], int]
    frozen: Callable[[Layer], int] = lambda l: 0
    kept: Callable[[Layer], Kept] = lambda l: Kept(True)


def _formed(l: Layer) -> bool:
    """Whether the product is by W + s·B@A, as autograd/linear.py counts."""
    return l.n * (l.out + l.inn) > 2 * l.out * l.inn


def _branch(l: Layer, times: int = 1) -> int:
    """sB, and W + s·B@A where it is formed, else U = x Aᵀ (n, r); at `times` the rank."""
    return times * l.r * l.out + (l.rows * l.inn if _formed(l) else times * l.r * l.n)


LORA = Form(lambda l: l.r * (l.out + l.inn), kept=lambda l: Kept(True, _branch(l)))
FORMS: dict[str, Form] = {
    "lora": LORA,
    **{f"lora:{start}": replace(LORA, frozen=LORA.trained, kept=lambda l: Kept(True, _branch(l, 2) + 2 * l.r * l.inn))  # B₀, A₀
       for start in ("pissa", "milora", "olora")},
    "dora": Form(lambda l: l.r * (l.out + l.inn) + l.out,
                 kept=lambda l: Kept(True, _branch(replace(l, rows=l.out)) + l.n * l.out)),
    "lora-fa": Form(lambda l: l.r * l.out, lambda l: l.r * l.inn, lambda l: Kept(_formed(l), _branch(l))),
    "vera": Form(lambda l: l.r + l.out, kept=lambda l: Kept(True, l.r * (l.out + l.inn) + _branch(l))),
    "ia3": Form(lambda l: l.inn if l.on_input else l.out,
                kept=lambda l: Kept(l.on_input, 0 if l.on_input else l.n * l.out)),
    "bitfit": Form(lambda l: l.out, kept=lambda l: Kept(False)),
    "full": Form(lambda l: l.out * l.inn + (l.out if l.bias else 0)),
}
SIMPLE: dict[str, Callable[..., Any]] = {                  # the command line's word -> the config
    "lora": LoraConfig, "dora": lambda **fields: LoraConfig(use_dora=True, **fields), "lora-fa": LoraFAConfig,
    "pissa": lambda **fields: LoraConfig(init_lora_weights="pissa", **fields), "vera": VeraConfig, "ia3": IA3Config,
    "bitfit": BitFitConfig}
METHOD_NAMES = ("full", *SIMPLE)


def config_for(method: str, r: int | None = None, targets: list[str] | str | None = None) -> TargetConfig | None:
    """The config of a method by its name in METHOD_NAMES; None for "full", which trains the whole model in place.

    Raises ValueError for another name, for targets of "full", and for a rank where the method has none.
    """
    if method not in METHOD_NAMES:
        raise ValueError(f"method {method!r}: expected one of {', '.join(METHOD_NAMES)}")
    if r is not None and method in ("full", "ia3", "bitfit"):
        raise ValueError(f"r = {r} with method {method}, which has no rank: leave it out")
    if method == "full":
        if targets is not None:
            raise ValueError("method full trains every parameter, got targets as well: leave them out, or take another method")
        return None
    fields: dict[str, Any] = {} if targets is None else {"target_modules": targets}
    return SIMPLE[method](**fields | ({} if r is None else {"r": r}))


@dataclass
class Params:
    """What `params` found. Sizes are in bytes.

    layers: name of the layer -> how many there are, shape (out, in), rank, trained numbers in all. trainable, total: of the
    whole model, adapters included, as `count_parameters` has them. saved: numbers in the adapter's file (or the checkpoint).
    memory: precision -> {part: bytes}; a precision in which the method cannot train is missing.
    """

    model: str
    method: str
    layers: dict[str, dict[str, Any]]
    trainable: int
    total: int
    saved: int
    batch: int
    tokens: int
    memory: dict[str, dict[str, int]]

    @property
    def share(self) -> float:
        return self.trainable / self.total

    def file_size(self, bytes_each: int = 4) -> int:
        """The tensors of the saved file: 4 bytes a number in float32, 2 in half precision."""
        return self.saved * bytes_each

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain numbers, ready for JSON."""
        return vars(self) | {"share": self.share, "file": {"float32": self.file_size(4), "float16": self.file_size(2)}}

    def table(self) -> str:
        """The layers, the totals, and the memory by part, as text. 1 MB is 10⁶ bytes."""
        lines = [f"{self.model}, {self.method}"]
        if self.layers:
            lines += text_table({"modules": "modules", "shape": "shape", "rank": "rank", "trained": "trained"},
                                {name: row | {"trained": f"{row['trained']:,}"} for name, row in self.layers.items()})
        lines += [f"trainable {self.trainable:,} of {self.total:,} numbers ({self.share:.4%}); saved: {self.saved:,} numbers, "
                  f"{_size(self.file_size(4))} in float32, {_size(self.file_size(2))} in half precision",
                  f"memory to train on {self.batch} × {self.tokens} tokens, by part (activations are an estimate):"]
        rows = {name: {part: _size(parts[part]) for part in PARTS} | {"total": _size(sum(parts.values()))}
                for name, parts in self.memory.items()}
        return "\n".join(lines + text_table({part: part for part in (*PARTS, "total")}, rows, "weights in"))

    def __str__(self) -> str:
        return self.table()


def params(source: Any, config: TargetConfig | None, *, batch: int = 1, tokens: int | None = None,
           recompute: bool = False) -> Params:
    """What training a model with a method takes, without building either.

    source: anything `outline` takes: a config, a model, a config.json, a folder, "llama-2-7b" and the like. config: of the
    method (LoRA, DoRA, LoRA-FA, VeRA, IA3, BitFit, full fine-tuning of the targets, PiSSA, MiLoRA, OLoRA); None: every
    parameter of the model trains in place. batch, tokens: the shape of the ids of one step (tokens: None is 512, or the longest
    that the model takes). recompute: of each layer only the input is kept.

    Memory: a trained number takes 16 bytes in every precision. In float32 that is 4 each for itself, its gradient and AdamW's
    two moments. In bf16 an adapter stays in float32; a whole model has weights and gradients of 2 bytes, and beside the moments
    a float32 copy. "4 bits": the linear weights in NF4 with double quantisation (0.516 bytes), everything else as in bf16.
    Activations take 4 bytes in float32, else 2; `activations.py` says what is counted.

    Raises ValueError for a target that is not there, a rank that does not fit, a method without a closed form, or a batch that
    does not fit the model.
    """
    model = outline(source)
    cfg = model.cfg
    tokens = min(512, cfg.max_len) if tokens is None else tokens
    for name, value, most in ("batch", batch, None), ("tokens", tokens, cfg.max_len):
        if not isinstance(value, int) or value < 1 or (most is not None and value > most):
            raise ValueError(f"{name} = {value!r}: expected a whole number of at least 1{f', at most {most}' if most else ''}")
    base = sum(p.size for _, p in model.named_parameters())
    label = source if isinstance(source, str) else cfg.model_type or "model"
    if config is None:
        memory = {p: _memory(model, p, batch, tokens, trained=base, whole=True, kept=None, recompute=recompute)
                  for p in PRECISIONS[:2]}
        return Params(label, "full fine-tuning", {}, base, base, base, batch, tokens, memory)
    layers, kept, trained, frozen = dict[str, dict[str, Any]](), dict[str, Kept](), 0, 0
    for path, form, layer in _adapted(model, config, batch, tokens):
        count = form.trained(layer)
        trained, frozen, kept[path] = trained + count, frozen + form.frozen(layer), form.kept(layer)
        row = layers.setdefault(path.rpartition(".")[2], {"modules": 0, "shape": [layer.out, layer.inn],
                                                          "rank": layer.r or None, "trained": 0})
        row["rank"] = row["rank"] if row["rank"] == (layer.r or None) else None            # a rank_pattern: no single one
        row["modules"] += 1
        row["trained"] += count
    if config.method == "vera":                            # one pair of matrices for all layers
        adapted = [layer for _, form, layer in _adapted(model, config, 1, 1) if form is FORMS["vera"]]
        frozen += adapted[0].r * (max(layer.out for layer in adapted) + max(layer.inn for layer in adapted))
    counted = trained + (frozen if config.method == "lora-fa" else 0)      # the others' frozen factors are no parameters
    memory = {p: _memory(model, p, batch, tokens, trained=trained, frozen=frozen, kept=kept, recompute=recompute)
              for p in PRECISIONS[: 2 if config.method == "full" else 3]}
    return Params(label, _named(config), layers, trained, base + counted, trained + frozen, batch, tokens, memory)


def _adapted(model: Outline, config: TargetConfig, batch: int, tokens: int) -> Iterable[tuple[str, Form, Layer]]:
    """(path, method, layer) of everything that trains. Raises ValueError as add_adapter does."""
    if config.method not in FORMS:
        raise ValueError(f"method {config.method!r} is not counted here, expected one of {', '.join(FORMS)}: add_adapter and "
                         "count_parameters count any method on a real model")
    packed = {id(block): whole for _, whole in model.named_modules() if isinstance(whole, PackedLinear)
              for block in whole.blocks.values()}
    counted: set[int] = set()                              # layers whose rows are
    for path, names, layer in find_targets(model, config):
        if (config.method, Embedding if isinstance(layer, Embedding) else Linear) not in METHODS:
            raise ValueError(f"method {config.method!r} cannot adapt {path}, a {type(layer).__name__}")
        (d, k), bias = layer.weight.shape, getattr(layer, "bias", None) is not None
        r = config.rank(names) if isinstance(config, LoraConfig) else getattr(config, "r", 0)
        if isinstance(config, LoraConfig) and r > min(d, k):
            raise ValueError(f"rank {r} on {path} of shape ({d}, {k}): expected at most {min(d, k)}")
        if config.method == "bitfit" and not bias:
            raise ValueError(f"BitFit on {path}, which has no bias: leave it out of the targets, or take another method (Llama "
                             "models have no biases)")
        wanted = getattr(config, "feedforward_modules", None)
        on_input = isinstance(config, IA3Config) and matches(FEEDFORWARD if wanted is None else wanted, names)
        whole = packed.get(id(layer), layer)
        rows = 0 if id(whole) in counted else whole.packed_weight.shape[0] if isinstance(whole, PackedLinear) else d
        counted.add(id(whole))
        yield path, FORMS[config.method], Layer(d, k, bias, r, rows_of(model.cfg, path, batch, tokens), rows, on_input)
    for path, _, layer in layers_to_save(model, config):
        d, k = layer.weight.shape
        yield path, FORMS["full"], Layer(d, k, getattr(layer, "bias", None) is not None, 0, batch * tokens)


def _named(config: TargetConfig) -> str:
    rank = f", r = {config.r}" if hasattr(config, "r") else ""
    targets = config.target_modules
    where = "" if targets is None else f", on {targets if isinstance(targets, str) else ', '.join(targets)}"
    return f"{config.method}{rank}{where}"


def _memory(model: Outline, precision: str, batch: int, tokens: int, *, trained: int, kept: dict[str, Kept] | None,
            frozen: int = 0, whole: bool = False, recompute: bool = False) -> dict[str, int]:
    each = 4 if precision == "float32" else 2
    base = sum(p.size for _, p in model.named_parameters()) * each
    if precision == "4 bits":
        base += sum(four_bits(size) - 2 * size for size in _quantised(model))
    activations = kept_numbers(model.cfg, kept, batch, tokens, recompute=recompute) * each
    if whole:
        master = 0 if precision == "float32" else 4
        return dict(zip(PARTS, (base, trained * each, trained * (8 + master), activations)))
    return dict(zip(PARTS, (base + 4 * (trained + frozen), 4 * trained, 8 * trained, activations)))


def four_bits(size: int) -> int:
    """Bytes of a weight of `size` numbers in NF4 with double quantisation: codes, their scales, and the scales of these."""
    blocks = -(-size // 64)
    return 32 * blocks + blocks + 4 * -(-blocks // 256) + 4


def _quantised(model: Outline) -> Iterable[int]:
    """The sizes of the weights that `quantise` puts into 4 bits: q, k and v one by one."""
    for _, _, layer in find_targets(model, TargetConfig(target_modules="all-linear")):
        blocks = layer.blocks.values() if isinstance(layer, PackedLinear) else [layer]
        yield from (block.weight.size for block in blocks)


def _size(count: int) -> str:
    """Bytes as text, in powers of ten."""
    for unit, most in ("kB", 1e6), ("MB", 1e9), ("GB", 1e12):
        if count < most:
            return f"{count / most * 1e3:.3g} {unit}" if count / most * 1e3 < 100 else f"{count / most * 1e3:.0f} {unit}"
    return f"{count / 1e12:.3g} TB"
