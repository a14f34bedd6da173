"""The corpora and the planted task, each against what can be counted: bytes, shifts, singular values, a dense SVD."""

import hashlib
import math
import re
import sys
import textwrap
from pydoc_data.topics import topics

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minilora.data import (
    Corpus,
    PlantedLinear,
    corpora,
    decode,
    encode,
    eval_batches,
    load_corpus,
    planted_update,
    reference_entropies,
    sample_batch,
)

NAMES = ("prose", "python")

# (SHA-256, bytes for training, bytes for validation) in Python 3.11.7
KNOWN = {
    "prose": ("fa1c5d3441b3a4782907da55c859cf96e41959e5659cb27669b76c07cca55509", 419_727, 46_390),
    "python": ("982cb8333dd4d51b002a3c1d5e62db5af6d177143500bd02c2e575351f7c44a7", 1_050_949, 110_317),
}


@pytest.fixture(scope="module", params=NAMES)
def corpus(request):
    return load_corpus(request.param)


def texts_of(corpus):
    return {d.name: getattr(corpus, d.split)[d.start : d.stop].tobytes() for d in corpus.documents}


def paragraphs(text):
    blocks = (" ".join(block.split()) for block in re.split(r"\n\s*\n", text.decode()))
    return {block for block in blocks if len(block) >= 60}


# -------------------------------------------------------------------------------------------------------------- corpora


def test_documents_tile_each_split_and_none_is_in_both(corpus):
    for split in ("train", "valid"):
        documents = [d for d in corpus.documents if d.split == split]
        assert documents[0].start == 0
        assert [d.stop for d in documents] == [d.start for d in documents[1:]] + [getattr(corpus, split).size]
    names = [d.name for d in corpus.documents]
    assert len(set(names)) == len(names)


def test_documents_hold_the_text_of_their_source():
    assert texts_of(load_corpus("prose")) == {name: text.encode() for name, text in topics.items()}
    with open(textwrap.__file__, encoding="utf-8") as source:
        assert texts_of(load_corpus("python"))["textwrap"] == source.read().encode()
    assert set(texts_of(load_corpus("python"))) == set(corpora.PYTHON_MODULES)


def test_no_paragraph_is_in_training_and_validation(corpus):
    texts = texts_of(corpus)
    seen = {split: set() for split in ("train", "valid")}
    for document in corpus.documents:
        seen[document.split] |= paragraphs(texts[document.name])
    assert len(seen["valid"]) > 50
    assert not seen["train"] & seen["valid"]


def test_sizes_are_sane(corpus):
    total = corpus.train.size + corpus.valid.size
    assert 0.08 <= corpus.valid.size / total <= 0.1
    low, high = {"prose": (400_000, 900_000), "python": (900_000, 1_500_000)}[corpus.name]
    assert low < total < high
    for tokens in (corpus.train, corpus.valid):
        assert tokens.dtype == np.uint8
        assert not tokens.flags.writeable


def test_loading_is_deterministic(corpus):
    again = load_corpus(corpus.name)
    assert again.sha256 == corpus.sha256 and again.documents == corpus.documents
    assert np.array_equal(again.train, corpus.train) and np.array_equal(again.valid, corpus.valid)


def test_known_digest_and_sizes(corpus):
    digest, train, valid = KNOWN[corpus.name]
    if corpus.sha256 != digest:
        pytest.skip(f"the {corpus.name} text of this Python has another digest ({corpus.sha256[:12]}) than 3.11.7's")
    assert (corpus.train.size, corpus.valid.size) == (train, valid)


def test_digest_covers_names_and_text_and_not_their_order():
    documents = {"b": b"x" * 9, "a": b"y" * 90}
    digest = Corpus.from_documents("c", documents).sha256
    assert digest == hashlib.sha256(b"a\n90\n" + b"y" * 90 + b"b\n9\n" + b"x" * 9).hexdigest()
    assert Corpus.from_documents("c", dict(reversed(documents.items()))).sha256 == digest
    for other in ({"b": b"z" * 9, "a": b"y" * 90}, {"d": b"x" * 9, "a": b"y" * 90}, {"b": b"x" * 8, "a": b"y" * 90}):
        assert Corpus.from_documents("c", other).sha256 != digest


def test_documents_that_quote_each_other_stay_together():
    own = [f"Document number {i} says something of its own, in a line that no other has.\n\n".encode()
           for i in range(200)]
    shared = "A sentence that is long enough to be told from chance, and in three documents."
    own[0] += shared.encode()
    own[1] += b"    " + shared.replace(" long", "\n    long").encode() + b"\n\n" + own[199]  # wrapped; quotes 199 too
    own[2] += shared.encode() + b"\n"
    together, free = set(), set()
    for salt in range(60):  # the split hangs on the names, so try several
        documents = {f"{salt}-{i}": text for i, text in enumerate(own)}
        where = {d.name: d.split for d in Corpus.from_documents("c", documents).documents}
        together.add(tuple(where[f"{salt}-{i}"] for i in (0, 1, 2, 199)))
        free.add(tuple(where[f"{salt}-{i}"] for i in (0, 3)))
    assert together == {("train",) * 4, ("valid",) * 4}
    assert len(free) >= 3  # unrelated documents do go apart


def test_file_corpus(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_bytes(bytes(range(256)) * 4)
    corpus = Corpus.from_file(path)
    assert corpus.name == "notes.txt"
    assert corpus.train.tobytes() + corpus.valid.tobytes() == path.read_bytes()
    assert corpus.valid.size == 102
    assert [(d.split, d.stop) for d in Corpus.from_file(str(path)).documents] == [("train", 922), ("valid", 102)]
    path.write_bytes(b"ab")
    assert (Corpus.from_file(path).train.tobytes(), Corpus.from_file(path).valid.tobytes()) == (b"a", b"b")


@pytest.mark.parametrize("text", [b"", b"a"])
def test_file_without_text_is_one_line(tmp_path, text):
    path = tmp_path / "empty.txt"
    path.write_bytes(text)
    with pytest.raises(ValueError, match=rf"got {len(text)} bytes, expected at least 2; give") as error:
        Corpus.from_file(path)
    assert "\n" not in str(error.value)
    with pytest.raises(FileNotFoundError):
        Corpus.from_file(tmp_path / "absent.txt")


def test_corpus_errors(monkeypatch):
    with pytest.raises(ValueError, match=r"got corpus 'poems', expected one of \['prose', 'python'\]; .*from_file"):
        load_corpus("poems")
    for nothing in ({}, {"a": b""}):
        with pytest.raises(ValueError, match="got no text"):
            Corpus.from_documents("mine", nothing)
    with pytest.raises(ValueError, match="got no document, or group that quotes each other, within 10% of 12 bytes"):
        Corpus.from_documents("mine", {"only": b"one document"})
    monkeypatch.setattr(corpora, "PYTHON_MODULES", ("textwrap", "no_such_module"))
    with pytest.raises(FileNotFoundError, match="got no source of the module no_such_module"):
        load_corpus("python")
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(FileNotFoundError, match=r"got no source of the module pydoc_data\.topics"):
        load_corpus("prose")


def test_a_module_of_the_readers_own_is_not_the_corpus(tmp_path, monkeypatch):
    digest = load_corpus("python").sha256
    (tmp_path / "tokenize.py").write_text("raise RuntimeError('imported')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert load_corpus("python").sha256 == digest


def test_text_to_ids_and_back():
    ids = encode("naïve\n")
    assert ids.dtype == np.int64 and ids.tolist() == list("naïve\n".encode())
    assert decode(ids) == "naïve\n"
    assert decode(ids[:3]) == "na\ufffd"  # half of ï
    assert decode(encode("")) == ""
    for bad in ([256], [-1], [[65, 66]], 5):
        with pytest.raises(ValueError, match=r"expected one row of 0 to 255"):
            decode(np.array(bad))


# -------------------------------------------------------------------------------------------------------------- batches


def test_sampled_windows_lie_in_the_text_and_targets_follow():
    tokens = np.arange(200, dtype=np.uint8)  # each value is its own position
    ids, targets = sample_batch(tokens, 5000, 7, np.random.default_rng(0))
    assert ids.shape == targets.shape == (5000, 7)
    assert ids.dtype == targets.dtype == np.int64
    assert np.array_equal(targets, ids + 1)
    assert np.array_equal(ids, ids[:, :1] + np.arange(7))
    assert set(ids[:, 0].tolist()) == set(range(193))  # every window, the first and the last included


def test_sampling_follows_the_generator(corpus):
    first, second = (sample_batch(corpus.train, 3, 16, np.random.default_rng(5)) for _ in range(2))
    other = sample_batch(corpus.train, 3, 16, np.random.default_rng(6))
    assert np.array_equal(first, second)
    assert not np.array_equal(first, other)


@settings(deadline=None)  # a busy machine is no failure
@given(size=st.integers(2, 60), batch=st.integers(1, 5), length=st.integers(1, 12))
def test_eval_windows_cover_the_text_once(size, batch, length):
    tokens = np.arange(size, dtype=np.uint8)
    if size < length + 1:
        with pytest.raises(ValueError, match="got a text of"):
            eval_batches(tokens, batch, length)
        return
    batches = eval_batches(tokens, batch, length)
    assert all(ids.shape == targets.shape and ids.shape[1] == length for ids, targets in batches)
    assert all(len(ids) == batch for ids, _ in batches[:-1]) and 1 <= len(batches[-1][0]) <= batch
    ids = np.concatenate([ids.ravel() for ids, _ in batches])
    targets = np.concatenate([targets.ravel() for _, targets in batches])
    assert np.array_equal(ids, np.arange(ids.size))
    assert np.array_equal(targets, ids + 1)
    assert 0 <= size - 1 - targets.size < length  # only a remainder shorter than a window is left out


@settings(deadline=None)  # a busy machine is no failure
@given(windows=st.integers(1, 40), limit=st.integers(1, 50), batch=st.integers(1, 6))
def test_limited_evaluation_is_spread_over_the_text(windows, limit, batch):
    length = 3
    tokens = np.arange(windows * length + 1, dtype=np.uint8)
    starts = np.concatenate([ids[:, 0] for ids, _ in eval_batches(tokens, batch, length, limit)])
    assert starts.size == min(limit, windows)
    assert starts[0] == 0 and (starts % length == 0).all()
    gaps = np.diff(np.append(starts, windows * length)) // length
    assert gaps.min() >= 1 and gaps.max() - gaps.min() <= 1


def test_batch_errors():
    tokens, rng = np.arange(10, dtype=np.uint8), np.random.default_rng(0)
    assert sample_batch(tokens, 2, 9, rng)[0].tolist() == [list(range(9))] * 2  # the text is exactly one window
    for call in (lambda *a: sample_batch(*a, rng), eval_batches):
        with pytest.raises(ValueError, match=r"got a text of 10 tokens, expected at least 11"):
            call(tokens, 2, 10)
        with pytest.raises(ValueError, match="got batch=0, length=3"):
            call(tokens, 0, 3)
        with pytest.raises(ValueError, match="got batch=1, length=0"):
            call(tokens, 1, 0)
        with pytest.raises(ValueError, match=r"got shape \(2, 5\)"):
            call(tokens.reshape(2, 5), 1, 3)
        with pytest.raises(ValueError, match="of float64, expected"):
            call(tokens.astype(np.float64), 1, 3)
    with pytest.raises(ValueError, match="got limit=0"):
        eval_batches(tokens, 1, 3, limit=0)


# ------------------------------------------------------------------------------------------------------------ entropies


def test_entropies_equal_counting_by_hand(tmp_path):
    path = tmp_path / "ab.txt"
    path.write_bytes(b"ab" * 9 + b"ba")  # 18 bytes for training, "ba" for validation
    entropies = reference_entropies(Corpus.from_file(path))
    p_a = (9 + 1) / (18 + 256)
    assert entropies["uniform"] == math.log(256)
    assert entropies["unigram"] == pytest.approx(-math.log(p_a), rel=1e-12)
    assert entropies["bigram"] == pytest.approx(-math.log((8 + 16 * p_a) / (8 + 16)), rel=1e-12)  # b: 8 times
    path.write_bytes(b"ab")
    with pytest.raises(ValueError, match="got 1 validation bytes, expected 2 or more"):
        reference_entropies(Corpus.from_file(path))


def test_models_behind_the_entropies_are_distributions(tmp_path):
    path = tmp_path / "all.bin"
    total = {"unigram": 0.0, "bigram": 0.0}
    for byte in range(256):  # validation is "a" and `byte`: the value is -ln p(byte | a)
        path.write_bytes(b"abcabdaaccabadbaba" + bytes([97, byte]))
        entropies = reference_entropies(Corpus.from_file(path))
        for model in total:
            total[model] += math.exp(-entropies[model])
    assert total == pytest.approx({"unigram": 1.0, "bigram": 1.0}, rel=1e-12)


def test_entropies_fall_in_order(corpus):
    entropies = reference_entropies(corpus)
    assert entropies["uniform"] > entropies["unigram"] + 1 > entropies["bigram"] + 1.5
    assert entropies["bigram"] > 2


# --------------------------------------------------------------------------------------------------------- planted task

SPECTRUM = [2.0 ** (-i / 4) for i in range(20)]
SHAPES = [(24, 20), (20, 33), (31, 31)]


@pytest.mark.parametrize("dtype, tolerance", [(np.float64, 1e-13), (np.float32, 1e-6)])
@pytest.mark.parametrize("d, k", [*SHAPES, (1, 5), (5, 1), (1, 1)])
def test_planted_spectrum_is_the_svd(d, k, dtype, tolerance):
    spectrum = SPECTRUM[: min(d, k)]
    delta = planted_update(d, k, spectrum[::-1], np.random.default_rng(1), dtype)  # any order
    assert delta.shape == (d, k) and delta.dtype == dtype
    expected = np.zeros(min(d, k))
    expected[: len(spectrum)] = spectrum
    assert np.linalg.svd(delta, compute_uv=False) == pytest.approx(expected, abs=tolerance)


def test_planted_update_takes_repeated_and_zero_singular_values():
    delta = planted_update(9, 6, [3.0, 3.0, 3.0, 3.0], np.random.default_rng(2), np.float64)
    assert np.linalg.svd(delta, compute_uv=False) == pytest.approx([3, 3, 3, 3, 0, 0], abs=1e-13)
    assert not planted_update(9, 6, [0.0], np.random.default_rng(2)).any()


def test_planted_directions_are_uniform():
    rng = np.random.default_rng(3)
    draws = np.stack([planted_update(3, 2, [1.0], rng, np.float64) for _ in range(4000)])  # u vᵀ: E Δ = 0, E Δ² = 1/dk
    assert abs(draws.mean(0)).max() < 5 * (1 / 6 / 4000) ** 0.5
    assert draws.var(0) == pytest.approx(np.full((3, 2), 1 / 6), rel=0.1)    # five standard errors of 4,000 draws' variance


@pytest.mark.parametrize("n", [20, 21, 64])
def test_inputs_are_exactly_white(n):
    task = PlantedLinear.create(24, 20, SPECTRUM, np.random.default_rng(0), np.float64)
    x, y = task.batch(np.random.default_rng(1), n)
    assert x.shape == (n, 20) and y.shape == (n, 24)
    assert x.T @ x == pytest.approx(n * np.eye(20), abs=1e-10)
    assert y == pytest.approx(x @ (task.W + task.delta).T, abs=1e-12)
    x32, y32 = PlantedLinear.create(24, 20, SPECTRUM, np.random.default_rng(0)).batch(np.random.default_rng(1), n)
    assert x32.dtype == y32.dtype == np.float32
    assert x32.T @ x32 / n == pytest.approx(np.eye(20), abs=1e-6)


@pytest.mark.parametrize("d, k", SHAPES)
@pytest.mark.parametrize("r", [0, 1, 4, 16, 19, 20, 25])
def test_optimum_is_the_loss_of_the_dense_truncated_svd(d, k, r):
    task = PlantedLinear.create(d, k, SPECTRUM, np.random.default_rng(4), np.float64)
    x, y = task.batch(np.random.default_rng(5), 40)
    U, sigma, Vt = np.linalg.svd(task.delta)
    best = (U[:, :r] * sigma[:r]) @ Vt[:r] if r <= min(d, k) else task.delta
    loss = (((x @ (task.W + best).T - y) ** 2).sum(axis=1)).mean()  # summed over outputs, mean over rows
    assert task.optimum(r) == pytest.approx(loss, rel=1e-11, abs=1e-24)
    if 0 < r < 20:  # and a step away from it, within rank r, is worse
        step = np.random.default_rng(6).standard_normal((d, r)) @ Vt[:r] * 1e-3
        assert (((x @ (task.W + best + step).T - y) ** 2).sum(axis=1)).mean() > task.optimum(r)


def test_optimum_of_a_spectrum_in_any_order():
    task = PlantedLinear.create(5, 4, [1.0, 3.0, 2.0], np.random.default_rng(0))
    assert task.spectrum.tolist() == [3.0, 2.0, 1.0]
    assert [task.optimum(r) for r in range(5)] == [14.0, 5.0, 1.0, 0.0, 0.0]


def test_loss_is_the_frobenius_distance_in_every_batch():
    task = PlantedLinear.create(7, 5, [2.0, 1.0], np.random.default_rng(7), np.float64)
    guess = np.random.default_rng(8).standard_normal((7, 5))
    for seed, n in ((0, 5), (1, 5), (2, 300)):
        x, y = task.batch(np.random.default_rng(seed), n)
        loss = ((x @ (task.W + guess).T - y) ** 2).sum() / n
        assert loss == pytest.approx(((guess - task.delta) ** 2).sum(), rel=1e-12)


def test_planted_task_follows_its_generator():
    first, second, other = (PlantedLinear.create(6, 5, [1.0], np.random.default_rng(seed)) for seed in (0, 0, 1))
    assert np.array_equal(first.W, second.W) and np.array_equal(first.delta, second.delta)
    assert not np.array_equal(first.W, other.W) and not np.array_equal(first.delta, other.delta)


def test_planted_errors():
    rng = np.random.default_rng(0)
    for bad in ([], [1.0] * 4, [[1.0]], 2.0):
        with pytest.raises(ValueError, match=r"expected 1 to min\(d, k\) = 3 singular values"):
            planted_update(5, 3, bad, rng)
    for bad in ([1.0, -1.0], [float("nan")], [float("inf")]):
        with pytest.raises(ValueError, match="expected finite numbers >= 0"):
            PlantedLinear.create(5, 3, bad, rng)
    task = PlantedLinear.create(5, 3, [1.0], rng)
    with pytest.raises(ValueError, match=r"got n=2 rows, expected at least k=3"):
        task.batch(rng, 2)
    with pytest.raises(ValueError, match=r"got rank r=-1"):
        task.optimum(-1)
