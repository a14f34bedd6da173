"""What people and their spreadsheets do to files, folders and options: read as it is meant, or refused in one line."""

from __future__ import annotations

import csv
import io
import json

import numpy as np
import pytest

import minilora as ml
from minilora.cli import main
from minilora.data import Passage, label_names, read_labelled, read_passages, split
from minilora.nn.generate import choose
from minilora.pretrained import Tokenizer
from minilora.tasks import Router, Run, finetune, keywords, load, predict
from minilora.tasks.encode import Encoder

tokenizers = pytest.importorskip("tokenizers")
pytest.importorskip("sklearn")
pytest.importorskip("seqeval")

SIZES = {"d_model": 8, "n_layers": 1, "n_heads": 2, "d_ff": 12, "max_len": 24}


def characters(unknown="?"):
    """A tokenizer with a token for each letter."""
    letters = [*"?abcdefghijklmnopqrstuvwxyz "]
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({c: i for i, c in enumerate(letters)}, unk_token=unknown))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    backend.decoder = tokenizers.decoders.Fuse()
    return Tokenizer(backend)


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bert")
    cfg = ml.TransformerConfig.bert(vocab_size=28, head="none", **SIZES)
    ml.save_pretrained(ml.Transformer(cfg), characters(), folder)
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    ml.save_pretrained(ml.Transformer(ml.TransformerConfig.llama(vocab_size=28, **SIZES)), characters(), folder)
    return folder


@pytest.fixture
def reviews(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("text,label\n" + "good,yes\nbad,no\n" * 10)
    return path


def test_blanks_around_a_label_make_no_new_label(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("text, label\n good, yes\nbad,yes \nbad,no\n")
    assert [(e.text, e.label) for e in read_labelled(path)] == [(" good", "yes"), ("bad", "yes"), ("bad", "no")]


def test_a_line_of_blanks_is_no_row(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("text,label\ngood,yes\n   \nbad,no\n  ")
    assert [e.line for e in read_labelled(path)] == [2, 4]


@pytest.mark.parametrize("ending", ["csv", "tsv"])
def test_a_long_text_is_a_text(tmp_path, ending):
    path, long = tmp_path / f"a.{ending}", "x" * 200_000
    path.write_text("text,label\nlong,yes\n".replace(",", "\t" if ending == "tsv" else ",").replace("long", long))
    before = csv.field_size_limit()
    assert read_labelled(path)[0].text == long and csv.field_size_limit() == before


def test_a_read_that_fails_leaves_the_library_as_it_was(tmp_path):
    """Also while somebody still holds the error, and with it the reader's frames."""
    path, before = tmp_path / "a.csv", csv.field_size_limit()
    path.write_text("text,label\ngood,yes,no\n")
    with pytest.raises(ValueError, match="got 3 fields") as held:
        read_labelled(path)
    assert csv.field_size_limit() == before and held.tb is not None


def test_endings_may_be_in_capitals(tmp_path):
    (tmp_path / "A.CSV").write_text("text,label\ngood,yes\n")
    (tmp_path / "A.TSV").write_text('text\tlabel\n"good\tyes\n')
    (tmp_path / "A.JSONL").write_text('{"prompt": "a", "completion": "b"}\n')
    assert read_labelled(tmp_path / "A.CSV")[0].text == "good" and read_labelled(tmp_path / "A.TSV")[0].text == '"good'
    assert read_passages(tmp_path / "A.JSONL")[0].prompt == "a"        # and not a plain text of braces


def test_half_a_character_is_named_with_its_line(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "good", "label": 1}\n{"text": "b\\ud800d", "label": 0}\n')
    with pytest.raises(ValueError, match="line 2: text has half of a surrogate pair"):
        read_labelled(path)
    path.write_text('{"text": "\\ud83d\\ude00", "label": 1}\n')
    assert read_labelled(path)[0].text == "\N{GRINNING FACE}"


@pytest.mark.parametrize("share", [float("nan"), float("inf"), -float("inf"), 0.0, 1.0, -0.5])
def test_a_share_is_between_0_and_1(share):
    with pytest.raises(ValueError, match="expected a share between 0 and 1"):
        split(10, share, 0)


def test_labels_may_be_given_as_numbers():
    assert label_names([], [1, 0]) == ["1", "0"]


def test_the_base_is_never_the_output(bert, llama, reviews, capsys):
    before = {path.name: path.read_bytes() for path in bert.iterdir()}
    for base in (bert, llama):
        assert main(["finetune", str(base), "--task", "sentiment", "--data", str(reviews), "--steps", "1", "-o", str(base),
                     "--force"]) == 2
        assert f"holds the base {base}: give another folder" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in bert.iterdir()} == before


def test_a_base_may_be_named(bert, reviews, tmp_path, monkeypatch):
    """The base that a name means is the one that finetune, merge and analyze work on."""
    monkeypatch.setattr("minilora.pretrained.hub._from_hub", lambda name: bert)
    finetune("some/base", reviews, "sentiment", out=tmp_path / "out", steps=1, progress=False)
    assert ml.analyze(tmp_path / "out", "some/base").to_dict() == ml.analyze(tmp_path / "out", bert).to_dict()
    ml.merge_checkpoint("some/base", tmp_path / "out", tmp_path / "named")
    ml.merge_checkpoint(bert, tmp_path / "out", tmp_path / "merged")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "named" / name).read_bytes() == (tmp_path / "merged" / name).read_bytes()
    with pytest.raises(FileNotFoundError, match="is not a path"):
        ml.merge_checkpoint("nothing", tmp_path / "out", tmp_path / "none")


def test_a_run_that_went_astray_is_not_saved(bert, reviews, tmp_path):
    with np.errstate(all="ignore"), pytest.raises(FloatingPointError, match="nothing is saved; lower the learning rate"):
        finetune(bert, reviews, "sentiment", out=tmp_path / "out", steps=1, lr=1e39, schedule="constant", warmup=0,
                 progress=False)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["checkpoint"]


def test_what_an_unfinished_run_has_else_is_named(bert, reviews, tmp_path, monkeypatch):
    out, options = tmp_path / "out", {"steps": 3, "progress": False}

    def stop(run, i):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Run, "batches", stop)
        finetune(bert, reviews, "sentiment", out=out, lr=1e-3, **options)
    with pytest.raises(ValueError, match=r"another lr: got 0.001, this run has 0.01: repeat .*, or force") as caught:
        finetune(bert, reviews, "sentiment", out=out, lr=1e-2, **options)
    assert "dropout" not in str(caught.value)                          # the settings that are equal are not listed
    (out / "checkpoint" / "run.json").write_text("{")
    with pytest.raises(ValueError, match=r"run.json is damaged, expected the state of an unfinished run: give another folder"):
        finetune(bert, reviews, "sentiment", out=out, lr=1e-3, **options)
    assert finetune(bert, reviews, "sentiment", out=out, lr=1e-3, force=True, **options).out == str(out)


@pytest.mark.parametrize("alpha", [float("nan"), float("inf")])
def test_alpha_is_finite(bert, reviews, tmp_path, alpha):
    with pytest.raises(ValueError, match=f"lora_alpha = {alpha}, .*: expected finite numbers"):
        finetune(bert, reviews, "sentiment", out=tmp_path / "out", steps=1, lora_alpha=alpha, progress=False)
    with pytest.raises(ValueError, match="expected finite numbers"):
        ml.LoraConfig(alpha_pattern={"q_proj": alpha})
    assert not (tmp_path / "out").exists()


def test_text_has_no_labels(llama, reviews):
    with pytest.raises(ValueError, match="labels with the task text"):
        finetune(llama, reviews, "text", labels=["a", "b"])


def test_every_word_of_a_sentence_is_tagged_or_none(bert, tmp_path):
    (tmp_path / "a.txt").write_text("ann B-PER\nsat O\n\n" * 10)
    finetune(bert, tmp_path / "a.txt", "ner", out=tmp_path / "out", steps=1, progress=False)
    predictor = load(tmp_path / "out")
    assert len(predictor.predict(["aa bb cc dd ee ff gg hh"])[0]) == 8      # 23 characters, 24 fit
    with pytest.raises(ValueError, match="input 1 has 9 words, expected at most 24 tokens"):
        predictor.predict(["aa", "aa bb cc dd ee ff gg hh ii"])
    with pytest.raises(ValueError, match="word 1 is 3, expected at least one character"):
        predictor.predict([["aa", 3]])


def test_a_continuation_takes_the_room_there_is(llama, tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text('{"prompt": "ab", "completion": "ba"}\n' * 10)
    finetune(llama, tmp_path / "a.jsonl", "text", out=tmp_path / "out", steps=1, progress=False)
    assert [len(text) for text in predict(tmp_path / "out", ["a" * 4, "a" * 23])] == [20, 1]
    assert main(["predict", str(tmp_path / "out"), "a" * 24]) == 2
    assert "24 tokens and at least 1 new ones are wanted, expected at most 24 together" in capsys.readouterr().err
    with pytest.raises(ValueError, match="input 0 is empty"):
        predict(tmp_path / "out", [""])


def test_a_completion_with_an_end_in_its_midst_is_learned_whole():
    backend = characters().backend
    backend.add_special_tokens(["z"])
    encoder = Encoder(Tokenizer(backend, {"eos_token": "z"}), 20)
    for completion in ("bzc", "bzcz"):
        ids = backend.encode("bzcz").ids
        assert encoder.passages([Passage(completion, 1, "a")], "a.jsonl").rows[0].targets == ids


def test_lines_of_standard_input(bert, reviews, tmp_path, capsys, monkeypatch):
    finetune(bert, reviews, "sentiment", out=tmp_path / "out", steps=1, progress=False)
    monkeypatch.setattr("sys.stdin", io.StringIO("good\r\n\r\nbad\n", newline="\n"))
    assert main(["predict", str(tmp_path / "out")]) == 0
    assert [line.split("\t")[2] for line in capsys.readouterr().out.split("\n")[:-1]] == ["good", "bad"]
    monkeypatch.setattr("sys.stdin", io.StringIO(b"good\xff".decode("utf-8", "surrogateescape")))     # as a C locale reads it
    assert main(["predict", str(tmp_path / "out")]) == 2
    assert "got 'good\\udcff', expected a text of whole characters" in capsys.readouterr().err


@pytest.mark.parametrize("change", [{"id2label": {"0": "a", "1": "a"}}, {"task": ["sentiment"]}])
def test_damaged_facts_are_said_to_be(bert, reviews, tmp_path, change):
    finetune(bert, reviews, "sentiment", out=tmp_path / "out", steps=1, progress=False)
    path = tmp_path / "out" / "minilora.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match="lacks the task, the base, the longest length or the labels"):
        load(tmp_path / "out")


def test_temperatures_at_the_edge(llama):
    logits = np.array([[1.0, 3.0, 2.0], [0.0, -np.inf, 5.0]])
    for temperature in (5e-324, 1e-300):                               # so small that it overflows is greedy
        assert choose(logits, temperature, None, 0.9, np.random.default_rng(0)).tolist() == [1, 2]
    model, tokenizer = ml.load_pretrained(llama)
    for temperature in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="expected a finite temperature >= 0"):
            ml.generate(model, [[1, 2]], 3, temperature=temperature)
    with pytest.raises(ValueError, match="-1 new tokens"):
        ml.stream_text(model, tokenizer, "a", max_new_tokens=-1)


def test_a_seed_is_not_negative(llama, capsys):
    assert main(["generate", str(llama), "--prompt", "a", "--seed", "-1"]) == 2
    assert "--seed -1: expected a whole number of at least 0" in capsys.readouterr().err


def test_every_batch_of_a_router_draws_its_own_numbers(llama):
    router = Router(*ml.load_pretrained(llama))
    texts = ["a"] * 6
    found = router.generate(texts, ["__base__"] * 6, max_new_tokens=12, batch_size=1, temperature=2.0, seed=3)
    assert len(set(found)) == 6                            # and not six times the draws of one seed
    assert router.generate(texts, ["__base__"] * 6, max_new_tokens=12, batch_size=1, temperature=2.0, seed=3) == found


@pytest.mark.parametrize("words", [[], [""], ["a", ""], "sql"])
def test_keywords_are_words(words):
    with pytest.raises(ValueError, match="expected a list of at least one word"):
        keywords({"sql": words})


def test_a_tokenizer_that_knows_no_letter_is_refused():
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[CLS]": 0, "film": 1}, unk_token="[CLS]"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    backend.normalizer = tokenizers.normalizers.Replace("a", "")
    with pytest.raises(ValueError, match="the tokenizer makes"):
        Encoder(Tokenizer(backend), 8)
