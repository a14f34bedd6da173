"""A router: several adapters on one loaded base, and for each request the one that answers it, all in one batch.

Adapters are small, so one base in memory serves many of them. Rows of a batch that use different adapters share every
product with the base's weights, and each row is what its adapter alone would give. Which adapter a text gets is said with the
request, or by a rule, or learned from examples: texts are told apart by the frozen base's own hidden states, averaged.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from ..autograd import no_grad
from ..backend import host_rng, to_host
from ..data import left_padded
from ..lora import adapter_names, disable_adapter
from ..lora.files import load_adapter
from ..nn import Transformer, generate
from ..pretrained import Tokenizer
from ..pretrained.text import pieces, prompt_ids
from ..training.loop import in_mode
from .encode import Row, collate

BASE = "__base__"                                          # PEFT's name for no adapter
METHODS = ("centroid", "logistic")


class Router:
    """A base, the adapters on it by name, and how a text finds its adapter.

        router = Router(model, tokenizer, {"sql": "adapters/sql", "poem": "adapters/poem"}, rule=keywords({"sql": ["select"]}))
        router.generate(["select all names", "roses are red"], max_new_tokens=20)
        router.logits(texts, ["sql", "__base__", "poem"])           # for models with a classifier

    adapters: name -> folder, loaded onto the model; adapters that it has already are known by their names. rule: a function
    from a text to a name. Raises as load_adapter does.
    """

    def __init__(self, model: Transformer, tokenizer: Tokenizer, adapters: Mapping[str, str | os.PathLike[str]] | None = None,
                 rule: Callable[[str], str] | None = None) -> None:
        self.model, self.tokenizer = model, tokenizer
        for name, folder in (adapters or {}).items():
            load_adapter(model, folder, name)
        self.choose: Callable[[list[str]], Sequence[str]] | None = None
        if rule is not None:
            self.choose = lambda texts: [rule(text) for text in texts]

    @property
    def names(self) -> list[str]:
        """What a request may ask for: the adapters on the model, and "__base__" for none."""
        return [*adapter_names(self.model), BASE]

    def fit(self, texts: Sequence[str], names: Sequence[str], method: str = "centroid", *, batch_size: int = 32) -> None:
        """Learn from texts and the names of their adapters which one a text needs.

        The features are those of `embed_texts`. method "centroid": the name whose mean feature is nearest (by the cosine);
        "logistic": logistic regression, by scikit-learn. Raises ValueError for names that are not on the model, fewer than two
        different ones, or an unknown method; ImportError for "logistic" without scikit-learn.
        """
        if method not in METHODS:
            raise ValueError(f"method = {method!r}, expected one of {', '.join(METHODS)}")
        names = self._checked(texts, names)
        if len(set(names)) < 2:
            raise ValueError(f"got examples of {names[0] if names else 'nothing'} alone, expected texts for two names at least")
        classifier = Centroids() if method == "centroid" else _logistic_regression()

        def features(texts: Sequence[str]) -> np.ndarray:                  # -> (n, D)
            return embed_texts(self.model, self.tokenizer, texts, batch_size=batch_size)

        classifier.fit(features(texts), names)
        self.choose = lambda texts: [str(name) for name in classifier.predict(features(texts))]

    def route(self, texts: Sequence[str]) -> list[str]:
        """The name that the rule gives each text. Raises ValueError without a rule, and for a name that is not on the model."""
        if self.choose is None:
            raise ValueError("the router has no rule: give a name with each text, a rule to Router, or examples to fit")
        return self._checked(texts, self.choose(list(texts))) if len(texts) else []

    def logits(self, texts: Sequence[str], names: Sequence[str] | None = None, *, batch_size: int = 32) -> list[np.ndarray]:
        """The model's output for each text, in the order of the texts, each by its adapter.

        An item is (n_labels,) for a sequence classifier, else (T, V), (T, n_labels) or (T, D) without padding: T is the text's
        own number of tokens. names: one for each text, by default those of `route`. Raises ValueError for names that do not
        fit, and for a text that is longer than the model's max_len or has no token.
        """
        names = self._checked(texts, names) if names is not None else self.route(texts)
        found: list[Any] = [None] * len(texts)
        for rows, ids, mask in batches(self.model, self.tokenizer, texts, batch_size):
            with no_grad(), in_mode(self.model, False):
                out = to_host(self.model(ids, attention_mask=mask, adapter_names=[names[i] for i in rows]))
            for i, row, length in zip(rows, out, mask.sum(axis=1), strict=True):
                found[i] = (row if self.model.cfg.head == "sequence" else row[:length]).copy()
        return found

    def generate(self, texts: Sequence[str], names: Sequence[str] | None = None, *, max_new_tokens: int = 64,
                 chat: bool | None = None, batch_size: int = 32, seed: int = 0, **options: Any) -> list[str]:
        """The continuation of each text, in the order of the texts, each by its adapter; prompts are padded on the left.

        chat: write the texts down as messages (default: if the tokenizer has a chat template). seed: of the sampling, for all
        texts together. options: temperature, top_k and top_p of `minilora.generate`. Raises ValueError as `logits` and
        `stream_text` do.
        """
        names = self._checked(texts, names) if names is not None else self.route(texts)
        prompts, end = [prompt_ids(self.model, self.tokenizer, text, chat) for text in texts], self.tokenizer.eos_token_id
        _fits(self.model, prompts, max_new_tokens)
        found, rng = [""] * len(texts), host_rng(seed)     # one generator: each batch has random numbers of its own
        for rows in by_length(prompts, batch_size):
            ids, mask = left_padded([prompts[i] for i in rows])
            new = generate(self.model, ids, max_new_tokens, attention_mask=mask, adapter_names=[names[i] for i in rows],
                           eos_token_id=end, seed=rng, **options)[:, ids.shape[1] :]
            for i, tokens in zip(rows, new.tolist(), strict=True):
                own = tokens[: tokens.index(end)] if end in tokens else tokens
                found[i] = "".join(pieces(self.tokenizer, prompts[i], iter(own)))
        return found

    def _checked(self, texts: Sequence[str], names: Sequence[str]) -> list[str]:
        if isinstance(texts, str) or isinstance(names, str) or len(names) != len(texts):
            raise ValueError(f"got {_count(names)} for {_count(texts)}: expected a list of texts and a list with a "
                             "name for each")
        if unknown := sorted(set(names) - set(self.names)):
            raise ValueError(f"no adapter {unknown[0]!r} on this model, expected one of {', '.join(self.names)}")
        return list(names)


class Centroids:
    """The class whose mean is nearest by the cosine."""

    def fit(self, x: np.ndarray, names: Sequence[str]) -> None:    # (n, D), n names
        self.kinds = sorted(set(names))
        self.means = np.stack([x[np.array(names) == kind].mean(axis=0) for kind in self.kinds])           # (kinds, D)
        self.means /= np.maximum(np.linalg.norm(self.means, axis=1, keepdims=True), 1e-30)

    def predict(self, x: np.ndarray) -> list[str]:                 # (n, D) -> n names
        return [self.kinds[i] for i in (x @ self.means.T).argmax(axis=1)]


def keywords(words: Mapping[str, Sequence[str]], default: str = BASE) -> Callable[[str], str]:
    """A rule: the first adapter of `words` (name -> words) of which a text has a word, in whatever case; else `default`.

    Raises ValueError for a name without words, and for an empty word, which every text would have.

    >>> rule = keywords({"sql": ["select", "table"], "poem": ["rose"]})
    >>> rule("SELECT a rose"), rule("A rose."), rule("unselected")
    ('sql', 'poem', '__base__')
    """
    for name, some in words.items():
        if isinstance(some, str) or not all(some) or not some:
            raise ValueError(f"the words of {name!r} are {some!r}, expected a list of at least one word, none of them empty")
    patterns = {name: re.compile(rf"(?<!\w)({'|'.join(map(re.escape, some))})(?!\w)", re.IGNORECASE)
                for name, some in words.items()}
    return lambda text: next((name for name, pattern in patterns.items() if pattern.search(text)), default)


def embed_texts(model: Transformer, tokenizer: Tokenizer, texts: Sequence[str], *, batch_size: int = 32) -> np.ndarray:
    """Texts as vectors (n, D) of length 1: the base's last hidden states, averaged over the tokens. Adapters are off.

    Raises ValueError for a text that is longer than the model's max_len or has no token.
    """
    found = np.zeros((len(texts), model.cfg.d_model))
    for rows, ids, mask in batches(model, tokenizer, texts, batch_size):
        with no_grad(), in_mode(model, False), disable_adapter(model):
            hidden = to_host(model.hidden(ids, attention_mask=mask)).astype(np.float64)                  # (B, T, D)
        found[rows] = (hidden * mask[..., None]).sum(axis=1) / mask.sum(axis=1)[:, None]
    return found / np.maximum(np.linalg.norm(found, axis=1, keepdims=True), 1e-30)


def batches(model: Transformer, tokenizer: Tokenizer, texts: Sequence[str],
            batch_size: int) -> Iterator[tuple[list[int], np.ndarray, np.ndarray]]:
    """(which texts, ids (B, T), mask (B, T)) of texts of about one length, padded on the right."""
    rows = [Row(tokenizer.encode(text), 0) for text in texts]
    ids = [row.ids for row in rows]
    _fits(model, ids)
    for some in by_length(ids, batch_size):
        batch = collate([rows[i] for i in some], tokenizer.pad_token_id or 0)
        yield some, batch["ids"], batch["attention_mask"]


def by_length(rows: Sequence[Sequence[int]], batch_size: int) -> list[list[int]]:
    """The numbers of the rows, the shortest first, in groups of batch_size."""
    if batch_size < 1:
        raise ValueError(f"batch_size = {batch_size}, expected at least 1")
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def _fits(model: Transformer, rows: Sequence[Sequence[int]], new: int = 0) -> None:
    for i, row in enumerate(rows):
        if not 0 < len(row) <= model.cfg.max_len - new:
            raise ValueError(f"text {i} has {len(row)} tokens, expected 1 to {model.cfg.max_len - new}"
                             f"{f', with room for {new} new ones' if new else ''}: cut it, or split it")


def _count(items: Sequence[str]) -> str:
    return repr(items) if isinstance(items, str) else f"a list of {len(items)}"


def _logistic_regression() -> Any:
    try:
        from sklearn.linear_model import LogisticRegression
    except ImportError as error:
        raise ImportError(f'scikit-learn is not installed ({error}), expected for method "logistic": '
                          'pip install "minilora[tasks]", or take "centroid"') from None
    return LogisticRegression(C=100.0, max_iter=1000)      # features of length 1 want a weak penalty
