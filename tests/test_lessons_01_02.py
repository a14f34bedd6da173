"""Lessons 01 and 02: their figures show what they are given, and pretraining that is watched makes the same base."""

import io

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pytest
from PIL import Image

from minilora import TransformerConfig
from minilora.course.lesson_01 import difference_errors
from minilora.data import Corpus
from minilora.plots import lesson_01, lesson_02, png
from minilora.studies.common import Pretraining, pretrain, pretrained_base

mpl.use("Agg")
LINES = {"uniform": 5.5, "unigram": 3.2, "bigram": 2.3}


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def test_a_right_gradient_is_seen_in_float64_and_by_the_complex_step_only():
    errors = {kind: rows.max(axis=1) for kind, rows in difference_errors([1e-2, 1e-5, 1e-20], seed=3).items()}
    assert errors["float64"][1] < 1e-6 < 1e-2 < errors["float32"][1] and errors["complex"][2] < 1e-11
    assert errors["float64"][0] > 100 * errors["float64"][1] and errors["float64"][2] == 1


def test_the_valley_draws_all_three_curves_and_the_step_of_gradcheck():
    errors = {"float32": np.array([1e-3, 1.0]), "float64": np.array([1e-9, 0.0]), "complex": np.array([1e-9, 1e-15])}
    ax = lesson_01.epsilon_valley({"steps": [1e-3, 1e-9], "errors": errors, "library_eps": 1e-5}).axes[0]
    assert [line.get_ydata()[0] for line in ax.lines[:3]] == [1e-3, 1e-9, 1e-9] and ax.lines[3].get_xdata()[0] == 1e-5
    assert ax.lines[1].get_ydata()[1] > 0                                  # an error of 0 is drawn at the bottom


def test_the_learning_curve_marks_the_crossings_and_prints_the_samples():
    figure = lesson_02.learning_curve({"loss": [5.0, 3.0, 2.0], "eval": [(0, 5.4), (2, 2.0)], "lines": LINES,
                                   "crossed": {"uniform": 0, "bigram": 2}, "samples": {0: ["a\nb\x00$x$", "c" * 40], 2: ["d"]}})
    curve, beside = figure.axes
    marked = [tuple(line.get_xydata()[0]) for line in curve.lines if line.get_marker() == "D"]
    assert marked == [(0, 5.5), (2, 2.3)]
    assert [text.get_text() for text in beside.texts] == [
        "after 0 updates", "a↵b·$x$\n" + "c" * 32 + "\n  " + "c" * 8, "after 2 updates", "d"]
    figure.draw_without_rendering()


def test_the_loss_by_position_stands_beside_the_lines_of_counting():
    ax = lesson_02.loss_by_position({"loss": np.array([2.3, 2.0, 1.9]), "lines": LINES}).axes[0]
    assert ax.lines[0].get_xdata().tolist() == [1, 2, 3] and list(ax.get_xticks()) == [1, 2]
    assert {line.get_ydata()[0] for line in ax.lines[1:]} == {3.2, 2.3}


def test_a_png_is_small_says_nothing_of_its_maker_and_closes_the_figure():
    figure, ax = plt.subplots(figsize=(2, 1))
    ax.imshow(np.arange(12.0).reshape(3, 4))
    image = Image.open(io.BytesIO(png(figure)))
    assert image.size == (220, 110) and image.mode == "P" and not image.info.keys() & {"Software", "Creation Time"}
    assert not plt.get_fignums()


def test_pretraining_that_is_watched_makes_the_base_that_is_cached(tmp_path, monkeypatch):
    monkeypatch.setenv("MINILORA_CACHE", str(tmp_path))
    corpus = Corpus.from_documents("counting", {f"{n}": f"{n} and {n + 1} ".encode() * 20 for n in range(30)})
    config = TransformerConfig.gpt2(vocab_size=256, d_model=8, n_layers=1, n_heads=2, max_len=8)
    recipe = Pretraining(4, 2, 1e-2, 8)
    unwatched = pretrained_base(config, corpus, recipe, 0)
    (file,) = tmp_path.glob("base-*")
    file.unlink()
    seen = []
    watched, history = pretrain(config, corpus, recipe, 0, evaluate=lambda model: 1.0, eval_every=2,
                                callback=lambda step, model, history: seen.append(step))
    assert seen == [1, 2, 3, 4] and history.eval == [(2, 1.0), (4, 1.0)] and file.exists()
    for model in (watched, pretrained_base(config, corpus, recipe, 0)):
        assert all(np.array_equal(a, model.state_dict()[name]) for name, a in unwatched.state_dict().items())
