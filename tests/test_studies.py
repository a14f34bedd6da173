"""The main job: the planted curves are where theory puts them, the cache may break, and the report is whole."""

import json
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest

from minilora import plots
from minilora.autograd import gradcheck, tensor
from minilora.data import load_corpus
from minilora.nn import TransformerConfig
from minilora.studies import STUDIES, Options, rank_quality, sentiment, style
from minilora.studies.common import Pretraining, cache_folder, pretrained_base
from minilora.studies.planted import kl_divergence, planted_linear, planted_transformer
from minilora.studies.text import Setting

TINY = replace(rank_quality.SIZES["quick"], setting=Setting(16, 1, Pretraining(4, 4, 3e-3, 16), 3, 4, 8),
               ranks={"q, v": [1, 8], "all linear": [8]}, planted_steps=(20, 6))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MINILORA_CACHE", str(tmp_path / "cache"))


def test_lora_reaches_the_eckart_young_optimum_at_every_rank():
    found = planted_linear(steps=600, seed=3)
    assert [row["rank"] for row in found["rows"]] == list(range(1, 17))
    assert len(found["spectrum"]) > 16
    for row in found["rows"]:
        assert row["optimum"] * (1 - 1e-9) <= row["loss"] <= 1.01 * row["optimum"], row


def test_too_few_steps_do_not_reach_it():
    assert planted_linear(steps=50, seed=3)["largest_excess"] > 0.01


@pytest.mark.slow
def test_the_elbow_of_the_planted_transformer_is_at_four():
    found = planted_transformer(steps=300, seeds=[0], ranks=[2, 4, 8])
    kl = {row["rank"]: row["kl"][0] for row in found["rows"]}
    assert kl[2] >= 10 * kl[4] and kl[2] >= 10 * kl[8]
    assert kl[2] < found["base"]


def test_kl_divergence_is_right_and_has_the_right_gradient(rng):
    p = rng.dirichlet(np.ones(5), (4, 3))
    q = rng.dirichlet(np.ones(5), (4, 3))
    found = kl_divergence(tensor(np.log(q)), np.log(p), 2).data
    expected = (p * np.log(p / q)).sum(-1).reshape(2, -1).mean(1)
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    assert gradcheck(lambda x: kl_divergence(x, np.log(p), 2), [np.log(q)])


@pytest.mark.slow
def test_a_study_leaves_its_table_figure_and_numbers(tmp_path, monkeypatch):
    monkeypatch.setitem(rank_quality.SIZES, "quick", TINY)
    report = STUDIES["rank-quality"].run(Options("quick", seed=1, out=tmp_path / "figures"))
    assert sorted(p.name for p in (tmp_path / "figures").iterdir()) == [f"rank_quality.{s}" for s in ("json", "png", "svg")]
    assert json.loads((tmp_path / "figures/rank_quality.json").read_text()) == json.loads(json.dumps(report))
    text = report["text"]
    assert [(row["targets"], row["rank"]) for row in text["rows"]] == [("q, v", 1), ("q, v", 8), ("all linear", 8)]
    for row in text["rows"]:
        d, layers = TINY.setting.d_model, TINY.setting.n_layers
        per_rank = 2 * 2 * d if row["targets"] == "q, v" else 4 * d + 2 * d + 5 * d + 5 * d     # packed qkv, o, up, down
        assert row["trainable"] == layers * row["rank"] * per_rank
        assert len(row["losses"]) == TINY.seeds and row["loss_mean"] == pytest.approx(np.mean(row["losses"]))
    assert text["merge"]["merged"] == pytest.approx(text["merge"]["adapter"], rel=1e-5)
    assert all(len(digest) == 64 for digest in text["sha256"].values())
    table = rank_quality.table(report)
    assert "full fine-tuning" in table and "frozen base" in table and "the same validation loss" in table


@pytest.mark.slow
def test_the_same_seed_gives_the_same_losses(tmp_path, monkeypatch):
    monkeypatch.setitem(rank_quality.SIZES, "quick", TINY)
    found = [rank_quality.run(Options("quick", out=tmp_path / name))["text"]["rows"] for name in "ab"]     # made, then cached
    assert found[0] == found[1]


def test_the_cached_base_may_be_deleted_or_broken():
    cfg = TransformerConfig.gpt2(vocab_size=256, d_model=16, n_layers=1, n_heads=2, max_len=16)
    corpus, said = load_corpus("prose"), []
    first = pretrained_base(cfg, corpus, TINY.setting.pretraining, 0, said.append).state_dict()
    file, = cache_folder().iterdir()
    whole = file.read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"\xff" * 100, None):
        file.write_bytes(content) if content is not None else file.unlink()
        said.clear()
        again = pretrained_base(cfg, corpus, TINY.setting.pretraining, 0, said.append).state_dict()
        assert said and all(np.array_equal(first[k], again[k]) for k in first)
    assert file.read_bytes() == whole
    said.clear()
    pretrained_base(cfg, corpus, TINY.setting.pretraining, 0, said.append)
    assert not said                                        # read, not made
    pretrained_base(cfg, corpus, TINY.setting.pretraining, 1, said.append)
    assert said                                            # another seed is another base


def test_a_cache_that_cannot_be_written_is_no_obstacle(tmp_path, monkeypatch):
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("MINILORA_CACHE", str(blocked / "below"))
    cfg, said = TransformerConfig.gpt2(vocab_size=256, d_model=16, n_layers=1, n_heads=2, max_len=16), []
    pretrained_base(cfg, load_corpus("prose"), TINY.setting.pretraining, 0, said.append)
    assert any("not cached" in line for line in said)


def test_committed_numbers_belong_to_the_committed_figure():
    folder = Path(__file__).parents[1] / "figures"
    report = json.loads((folder / "rank_quality.json").read_text())
    assert report["size"] == "full" and (folder / "rank_quality.png").exists() and (folder / "rank_quality.svg").exists()
    assert report["planted_linear"]["largest_excess"] < 0.01
    kl = {row["rank"]: max(row["kl"]) for row in report["planted_transformer"]["rows"]}
    assert min(row for row in report["planted_transformer"]["rows"][1]["kl"]) >= 10 * max(kl[r] for r in kl if r >= 4)
    assert abs(report["text"]["merge"]["merged"] - report["text"]["merge"]["adapter"]) < 1e-5


@pytest.fixture
def twin_report():
    """A report of two rows, as the studies against PyTorch + PEFT write it."""
    def row(name, torch=True):
        side = {"metrics": {"accuracy": 0.8}, "seconds": 3.0, "losses": [0.7, 0.5, 0.4]}
        return {"name": name, "metric": "accuracy", "before": 0.5, "train": 9, "held_out": 4, "steps": 3, "truncated": 1,
                "max_length": 8, "padding": 0.1, "settings": {"r": 2, "lora_alpha": 4}, "parameters": {"trainable": 10},
                "minilora": side} | ({"torch": side | {"seconds": 6.0}, "agreement": 0.75} if torch else {})
    return lambda torch=True: {"rows": [row("one", torch), row("two", torch)], "without": [] if torch else ["torch"],
                               "base": "b", "seconds": 1.0}


def test_a_study_says_when_pytorch_is_left_out(twin_report):
    with_torch, without = sentiment.table(twin_report()), sentiment.table(twin_report(torch=False))
    assert "75.00%" in with_torch and "0.50" in with_torch and "left out" not in with_torch
    assert "PyTorch + PEFT left out: torch not installed" in without and "75.00%" not in without
    for report in (twin_report(), twin_report(torch=False)):
        figure = plots.twins(report, "title")
        assert len(figure.axes) == 3
        plt.close(figure)


def test_pairs_for_style_do_not_repeat_and_are_in_form():
    pairs = style.pairs()
    assert len(pairs) > 300 and len({pair.prompt for pair in pairs}) == len(pairs)
    answers = [json.loads(pair.text) for pair in pairs]
    assert len({answer["summary"] for answer in answers}) == len(pairs)
    assert all(style.in_form(pair.text) for pair in pairs) and pairs == style.pairs()
    for wrong in ("", "yes", "[]", '{"name": "a"}', '{"name": "a", "kind": "b", "summary": 1}', "[" * 10**5):
        assert not style.in_form(wrong)
