"""Two texts that every Python installation carries, as bytes: prose and source code, to train on without a download.

`prose` is the language reference that `help()` shows, `python` is the source of some standard-library modules: close
enough to share an alphabet, far enough apart for fine-tuning to matter. A token is a byte, so the vocabulary is 256 and
no tokenizer is needed. Whole documents go to training or to validation, and documents that quote each other go
together: the topic "if" is also a section of the topic "compound", and after a split by name alone three quarters of
the validation text (77 % in Python 3.11) stand word for word in the training text.
The text differs between Python versions, so a corpus carries its SHA-256, and every result made from it should too.
"""

from __future__ import annotations

import hashlib
import math
import re
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.machinery import PathFinder, SourceFileLoader
from pathlib import Path

import numpy as np

VOCAB_SIZE = 256  # a token is a byte
VALID_FRACTION = 0.1  # of the bytes
SHARED_BLOCK = 60  # characters: two documents with a common paragraph this long are not independent

# Pure Python, and one file each under the same name, in 3.11 to 3.13.
PYTHON_MODULES = (
    "argparse", "calendar", "collections", "configparser", "contextlib", "csv", "dataclasses", "difflib",
    "enum", "fractions", "functools", "heapq", "ipaddress", "pickle", "random", "shutil",
    "socket", "statistics", "subprocess", "tempfile", "textwrap", "threading", "tokenize", "traceback",
)  # fmt: skip


@dataclass(frozen=True)
class Document:
    """Where one document lies: bytes start to stop of the corpus's `split` ("train" or "valid")."""

    name: str
    split: str
    start: int
    stop: int


@dataclass(frozen=True, eq=False)
class Corpus:
    """A text as bytes, split once and for all: `train` (n,) and `valid` (m,), read-only uint8.

    sha256 is the hex digest over every document's name, length and text, in order of name.
    """

    name: str
    train: np.ndarray = field(repr=False)
    valid: np.ndarray = field(repr=False)
    sha256: str
    documents: tuple[Document, ...] = field(repr=False)

    @classmethod
    def from_file(cls, path: str | Path) -> Corpus:
        """The bytes of a file: its last tenth is for validation, the rest for training.

        Raises ValueError for a file of fewer than two bytes, OSError for one that cannot be read.
        """
        path = Path(path)
        text = path.read_bytes()
        if len(text) < 2:
            raise ValueError(f"corpus file {path}: got {len(text)} bytes, expected at least 2; give a file with text")
        cut = len(text) - max(1, round(VALID_FRACTION * len(text)))
        documents = (Document(path.name, "train", 0, cut), Document(path.name, "valid", 0, len(text) - cut))
        return cls(path.name, _tokens(text[:cut]), _tokens(text[cut:]), _digest({path.name: text}), documents)

    @classmethod
    def from_documents(cls, name: str, documents: Mapping[str, bytes]) -> Corpus:
        """A corpus of named documents, about a tenth of the bytes (never more) held out for validation.

        The split depends on the documents alone: families of documents that share a paragraph are taken in the order of
        the SHA-256 of their first name, and each goes to validation if it still fits there. Documents follow each other
        in order of name. Raises ValueError if there is no text, or if no family is small enough to be held out.
        """
        total = sum(map(len, documents.values()))
        if not total:
            raise ValueError(f"corpus {name!r}: got no text, expected documents with text in them; give at least two")
        room, held_out = VALID_FRACTION * total, set()
        for family in sorted(_families(documents), key=lambda names: hashlib.sha256(names[0].encode()).digest()):
            size = sum(len(documents[member]) for member in family)
            if size <= room:
                room -= size
                held_out.update(family)

        texts = {"train": bytearray(), "valid": bytearray()}
        placed = []
        for document in sorted(documents):
            split = "valid" if document in held_out else "train"
            start = len(texts[split])
            texts[split] += documents[document]
            placed.append(Document(document, split, start, len(texts[split])))
        if not texts["valid"]:
            raise ValueError(
                f"corpus {name!r}: got no document, or group that quotes each other, within {VALID_FRACTION:.0%} of "
                f"{total} bytes, expected one to hold out; give more documents, or one file to Corpus.from_file"
            )
        return cls(name, _tokens(texts["train"]), _tokens(texts["valid"]), _digest(documents), tuple(placed))


def load_corpus(name: str) -> Corpus:
    """The corpus "prose" (Python's language reference) or "python" (source of standard-library modules).

    Raises ValueError for another name, FileNotFoundError if this Python was installed without the text.
    """
    if name not in _READERS:
        raise ValueError(
            f"got corpus {name!r}, expected one of {sorted(_READERS)}; for your own text use Corpus.from_file(path)"
        )
    return Corpus.from_documents(name, _READERS[name]())


def _read_prose() -> dict[str, bytes]:
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise _missing("prose", "pydoc_data.topics") from None
    return {topic: text.encode() for topic, text in topics.items()}


def _read_python() -> dict[str, bytes]:
    return {module: _source(module).encode() for module in PYTHON_MODULES}


_READERS = {"prose": _read_prose, "python": _read_python}


def _source(module: str) -> str:
    # Only the library's own folder is searched, and nothing is imported: a reader's own csv.py must not become the
    # corpus. get_source turns every line end into "\n", so the digest is the same on Windows.
    spec = PathFinder.find_spec(module, [sysconfig.get_path("stdlib")])
    loader = spec and spec.loader
    source = loader.get_source(module) if isinstance(loader, SourceFileLoader) else None
    if source is None:
        raise _missing("python", module)
    return source


def _missing(corpus: str, module: str) -> FileNotFoundError:
    return FileNotFoundError(
        f"corpus {corpus!r}: got no source of the module {module}, expected it in the standard library of this Python; "
        "install the full library, or use Corpus.from_file(path)"
    )


def _families(documents: Mapping[str, bytes]) -> list[list[str]]:
    """Names in groups: no paragraph of SHARED_BLOCK characters or more, white space aside, occurs in two of them."""
    parent = {name: name for name in documents}

    def root(name: str) -> str:
        while parent[name] != name:
            name = parent[name]
        return name

    first_seen: dict[str, str] = {}
    for name in sorted(documents):
        for block in re.split(r"\n\s*\n", documents[name].decode("utf-8", "replace")):
            paragraph = " ".join(block.split())
            if len(paragraph) >= SHARED_BLOCK:
                parent[root(name)] = root(first_seen.setdefault(paragraph, name))
    families: dict[str, list[str]] = {}
    for name in sorted(documents):
        families.setdefault(root(name), []).append(name)
    return list(families.values())


def _digest(documents: Mapping[str, bytes]) -> str:
    digest = hashlib.sha256()
    for name in sorted(documents):
        digest.update(f"{name}\n{len(documents[name])}\n".encode())  # the length keeps name and text apart
        digest.update(documents[name])
    return digest.hexdigest()


def _tokens(text: bytes | bytearray) -> np.ndarray:
    return np.frombuffer(bytes(text), dtype=np.uint8)  # read-only, as bytes are


def encode(text: str) -> np.ndarray:
    """Text as token ids: its UTF-8 bytes, (n,) int64."""
    return _tokens(text.encode()).astype(np.int64)


def decode(ids: np.ndarray) -> str:
    """Token ids (n,) as text; bytes that are no UTF-8 (a sample may hold some) become the replacement character.

    Raises ValueError for an id outside 0 to 255, or for more than one row.
    """
    ids = np.asarray(ids)
    outside = ids[(ids < 0) | (ids >= VOCAB_SIZE)]
    if ids.ndim != 1 or outside.size:
        raise ValueError(
            f"ids: got shape {ids.shape} with {outside.size} values out of range, expected one row of 0 to 255; "
            "pass one sample of a model over bytes"
        )
    return bytes(ids.tolist()).decode("utf-8", "replace")


def _check_window(tokens: np.ndarray, batch: int, length: int) -> None:
    if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
        raise ValueError(
            f"tokens: got shape {tokens.shape} of {tokens.dtype}, expected a 1-D array of integers; pass corpus.train"
        )
    if batch < 1 or length < 1:
        raise ValueError(f"got batch={batch}, length={length}, expected both at least 1; ask for at least one token")
    if tokens.size < length + 1:
        raise ValueError(
            f"got a text of {tokens.size} tokens, expected at least {length + 1} (length + 1); "
            "use a longer text or a shorter window"
        )


def _windows(tokens: np.ndarray, starts: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    positions = starts[:, None] + np.arange(length)  # (B, T)
    return tokens[positions].astype(np.int64), tokens[positions + 1].astype(np.int64)


def sample_batch(
    tokens: np.ndarray, batch: int, length: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:  # (n,) -> (B, T), (B, T)
    """Random windows of a text and their next tokens: ids (B, T) and targets (B, T), both int64.

    targets[:, t] is the token after ids[:, t]. Every window of the text is equally likely.
    Raises ValueError if the text holds no window of length + 1 tokens.
    """
    _check_window(tokens, batch, length)
    return _windows(tokens, rng.integers(0, tokens.size - length, size=batch), length)


def eval_batches(
    tokens: np.ndarray, batch: int, length: int, limit: int | None = None
) -> list[tuple[np.ndarray, np.ndarray]]:  # (n,) -> [((B, T), (B, T)), ...]
    """Fixed windows for validation, end to end: each token but the first is a target at most once.

    A remainder shorter than `length` is left out. `limit` keeps at most so many windows (not batches), spread evenly
    over the text. The last batch may hold fewer than B windows: weight a mean over batches by targets.size.
    Raises ValueError if the text holds no window of length + 1 tokens, or if limit is under 1.
    """
    _check_window(tokens, batch, length)
    if limit is not None and limit < 1:
        raise ValueError(f"got limit={limit}, expected at least 1 window; pass limit=None for all of them")
    count = (tokens.size - 1) // length
    kept = count if limit is None else min(limit, count)
    starts = np.arange(kept) * count // kept * length
    return [_windows(tokens, starts[first : first + batch], length) for first in range(0, kept, batch)]


def reference_entropies(corpus: Corpus) -> dict[str, float]:
    """Validation loss, in nats per byte, of three models without a network: lines that a learning curve crosses.

        uniform   ln 256
        unigram   p(b)     = (n(b) + 1) / (N + 256)                        add-one (Laplace) smoothing
        bigram    p(b | a) = (n(ab) + μ p(b)) / (n(a·) + μ),  μ = 16       Dirichlet smoothing towards p(b)

    Counts are of the training text; each value is the mean of -ln p over the validation text's bytes but the first,
    which has no predecessor. Raises ValueError if the validation text has fewer than two bytes.
    """
    train, valid = corpus.train.astype(np.int64), corpus.valid.astype(np.int64)
    if valid.size < 2:
        raise ValueError(
            f"corpus {corpus.name!r}: got {valid.size} validation bytes, expected 2 or more; use a longer text"
        )
    unigram = (np.bincount(train, minlength=VOCAB_SIZE) + 1.0) / (train.size + VOCAB_SIZE)  # (V,)
    pairs = np.bincount(train[:-1] * VOCAB_SIZE + train[1:], minlength=VOCAB_SIZE**2).reshape(VOCAB_SIZE, VOCAB_SIZE)
    prior = 16.0
    bigram = (pairs + prior * unigram) / (pairs.sum(axis=1, keepdims=True) + prior)  # (V, V), rows sum to 1
    return {
        "uniform": math.log(VOCAB_SIZE),
        "unigram": float(-np.log(unigram[valid[1:]]).mean()),
        "bigram": float(-np.log(bigram[valid[:-1], valid[1:]]).mean()),
    }
