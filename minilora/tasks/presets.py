"""Settings that work, one set a task. Every one of them can be overridden."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from typing import Any

QUANTISED = ("blocks", "nf4", "fp4")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How to fine-tune.

    r, lora_alpha, lora_dropout, target_modules: of the LoraConfig. dropout: of the base, in place of its own. lr: the peak
    learning rate; schedule, warmup, weight_decay, clip: as in TrainConfig. epochs: passes over the data; steps: updates, in
    place of epochs. batch: examples in a batch; tokens: at most so many tokens in a batch, in place of batch. max_length: of
    an example, in tokens; the model's own limit counts too. modules_to_save: layers trained whole, besides the classifier.
    quantise: the base in 4 bits (QLoRA): "nf4" or "fp4", or "blocks", those of a GGUF file in Q4_0 or Q4_1; None: dense.
    """

    r: int = 8
    lora_alpha: float = 16
    lora_dropout: float = 0.0
    target_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    dropout: float = 0.0
    quantise: str | None = None
    lr: float = 1e-3
    schedule: str = "linear"
    warmup: float = 0.06
    weight_decay: float = 0.0
    clip: float | None = 1.0
    epochs: float = 3.0
    steps: int | None = None
    batch: int = 16
    tokens: int | None = None
    max_length: int = 128

    def with_(self, **changes: Any) -> Settings:
        """These settings with others in the place of some; None leaves a setting as it is.

        Raises ValueError for an unknown name or a value out of range.
        """
        known = {f.name for f in fields(self)}
        if odd := sorted(changes.keys() - known):
            raise ValueError(f"unknown setting {odd[0]!r}: expected one of {', '.join(sorted(known))}")
        settings = replace(self, **{name: value for name, value in changes.items() if value is not None})
        for name in ("batch", "steps", "tokens", "max_length"):
            value = getattr(settings, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise ValueError(f"{name} = {value!r}: expected a whole number of at least 1")
        if settings.quantise not in (None, *QUANTISED):
            raise ValueError(f"quantise = {settings.quantise!r}: expected one of {', '.join(QUANTISED)}, or None")
        if not 0 < settings.epochs < 1e6:
            raise ValueError(f"epochs = {settings.epochs!r}: expected a number above 0")
        return settings

    def to_dict(self) -> dict[str, Any]:
        """All settings, ready for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Task:
    """A kind of task: the model's head, its settings, and what it is called elsewhere."""

    head: str
    settings: Settings
    peft: str                                              # PEFT's name
    auto: str                                              # transformers' class for it
    measure: tuple[str, str]                               # the metric that counts: its key, and its name for readers


TASKS = {
    "sentiment": Task("sequence", Settings(target_modules=["q_proj", "v_proj"]), "SEQ_CLS",
                      "AutoModelForSequenceClassification", ("accuracy", "accuracy")),
    "ner": Task("token", Settings(target_modules="all-linear", epochs=8.0), "TOKEN_CLS", "AutoModelForTokenClassification",
                ("f1", "entity F1")),
    "text": Task("lm", Settings(target_modules=["q_proj", "v_proj"], lr=5e-4, schedule="cosine", batch=8, max_length=256),
                 "CAUSAL_LM", "AutoModelForCausalLM", ("loss", "loss, nats a token")),
}


def task_named(name: str) -> Task:
    """A task by its name. Raises ValueError, naming them all, for another one."""
    if name not in TASKS:
        raise ValueError(f"task {name!r}: expected one of {', '.join(TASKS)}")
    return TASKS[name]
