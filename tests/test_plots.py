"""The figures of the rank analysis: axes are named, chance is always drawn, and what is shown is what was given."""

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.figure import Figure

from minilora import plots
from minilora.rank import Update, alignment, amplification, compare, interference, intruder_count, measures
from minilora.rank.base import gram_svd, top_projection

mpl.use("Agg")


@pytest.fixture
def ax():
    figure, ax = plt.subplots()
    yield ax
    plt.close(figure)


def update(r, seed, d=30, k=40, scale=1.0):
    rng = np.random.default_rng(seed)
    return Update(rng.standard_normal((r, k)), rng.standard_normal((d, r)), scale)


def report(base=True):
    rng, rows = np.random.default_rng(0), {}
    for layer in range(2):
        for name, (d, k) in {"attn.q_proj": (30, 40), "mlp.up_proj": (40, 30)}.items():
            change, W = update(3, layer, d, k), rng.standard_normal((d, k))
            row = measures(change.svd[1]) | {"rank": 3, "shape": [d, k]}
            if base:
                cosines = alignment(change, W)["cosines"]
                row |= amplification(change, W) | {"intruder_cosines": cosines, "intruder_count": intruder_count(cosines),
                                                   "projection_top": top_projection(gram_svd(W)[1], 3)}
            rows[f"layers.{layer}.{name}"] = row
    return {"modules": rows}


def legend(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


def named(ax):
    return bool(ax.get_xlabel()) and bool(ax.get_ylabel())


@pytest.mark.parametrize("part, cells", [("all", 5 * 9), ("upper", 5 * 9 - 10), ("lower", 15)])
def test_a_map_shows_phi_in_its_triangle(ax, part, cells):
    data = compare(update(5, 0), update(9, 1))
    plots.similarity_map(ax, data, part, ("r = 5", "r = 9"))
    shown = ax.images[0].get_array()
    assert shown.count() == cells and named(ax) and "r = 5" in ax.get_ylabel() and "r = 9" in ax.get_xlabel()
    where = np.argwhere(~np.ma.getmaskarray(shown))
    assert all(shown[i, j] == data["phi"][i][j] for i, j in where)
    assert ax.images[0].get_clim() == (0, 1)                               # so that figures can be compared


def test_what_is_within_chance_is_hatched_and_what_is_above_it_is_not(ax):
    one = update(4, 0)
    plots.similarity_map(ax, compare(one, one))
    assert not ax.collections                                              # φ = 1 everywhere
    plots.similarity_map(ax, compare(one, update(4, 1)))
    assert ax.collections and ax.collections[0].hatches == ["///"]


@pytest.mark.parametrize("draws", [0, 50])
def test_lines_stand_on_the_random_baseline(ax, draws):
    plots.similarity_lines(ax, compare(update(5, 0), update(9, 1), draws=draws))
    baseline = ax.lines[-1]
    assert legend(ax) == ["φ(n, n)", "φ(1, n)", "random, n/k (band: 5 to 95 %)"] and named(ax)
    np.testing.assert_allclose(baseline.get_ydata(), np.asarray(baseline.get_xdata()) / 40)
    assert len(ax.collections) == (2 if draws else 0)


def test_angles_are_in_degrees_beside_random_ones(ax):
    data = compare(update(3, 0), update(4, 1))
    plots.principal_angles(ax, {"two seeds": data, "again": compare(update(3, 2), update(4, 3))})
    np.testing.assert_allclose(ax.lines[0].get_ydata(), np.degrees(data["angles"]))
    assert legend(ax) == ["two seeds", "again", "random subspaces (median)"] and "degrees" in ax.get_ylabel() and named(ax)


def test_amplification_stands_between_random_and_top_directions(ax):
    data = report()
    plots.amplification_bars(ax, data)
    factors = [row["amplification"] for name, row in data["modules"].items() if "q_proj" in name]
    assert ax.patches[0].get_height() == pytest.approx(np.median(factors))
    assert {"were they random", "were they W's top ones"} < set(legend(ax)) and "‖ΔW‖" in ax.get_ylabel()
    assert [text.get_text() for text in ax.get_xticklabels()] == ["q_proj", "up_proj"]


def test_intruder_curves_count(ax):
    data = report()
    plots.intruder_curves(ax, {"LoRA": data})
    cosines = np.concatenate([row["intruder_cosines"] for row in data["modules"].values()])
    np.testing.assert_array_equal(ax.lines[0].get_ydata(), intruder_count(cosines, ax.lines[0].get_xdata()))
    assert legend(ax) == [f"LoRA: {intruder_count(cosines)} at ε = 0.5", "best |cos| of a random direction"] and named(ax)


def test_the_line_of_a_random_direction_is_where_random_directions_are(ax):
    plots.intruder_curves(ax, {"": report()})
    line = ax.lines[2].get_xdata()[0]
    rng = np.random.default_rng(0)
    best = [max(abs(x[:30])) for x in (v / np.linalg.norm(v) for v in rng.standard_normal((2000, 30)))]
    wide = [max(abs(x[:30])) for x in (v / np.linalg.norm(v) for v in rng.standard_normal((2000, 40)))]
    assert np.median(wide) - 0.02 < line < np.median(best) + 0.03


def test_maps_spectra_errors_and_training(ax):
    data = report(base=False)
    plots.module_map(ax, data, "stable_rank")
    np.testing.assert_allclose(ax.images[0].get_array()[1, 0], data["modules"]["layers.1.attn.q_proj"]["stable_rank"])
    recorded = {"steps": [1, 5], "modules": {"layers.0.q_proj": {"effective_rank": [1.0, 2.0]}}}
    for draw, given in ((plots.spectra, data), (plots.merge_errors, interference(update(3, 0), update(4, 1))),
                        (plots.over_training, recorded)):
        figure, one = plt.subplots()
        assert draw(one, given) is one and named(one) and legend(one)
        plt.close(figure)


@pytest.mark.parametrize("base, panels", [(False, 2), (True, 4)])
def test_the_figure_of_a_report(tmp_path, base, panels):
    figure = plots.adapter_map(report(base))
    assert isinstance(figure, Figure) and sum(bool(ax.get_title(loc="left")) for ax in figure.axes) == panels
    plots.save(figure, tmp_path / "report")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.png", "report.svg"]


def test_an_adapter_of_zero_can_be_drawn(tmp_path):
    row = measures([0.0, 0.0]) | {"rank": 2, "shape": [4, 4], "amplification": None, "intruder_cosines": [1.0, 1.0]}
    plots.save(plots.adapter_map({"modules": {"layers.0.q_proj": row}}), tmp_path / "zero")


def test_the_figure_of_a_comparison(tmp_path):
    for name, data in (("seeds", compare(update(4, 0), update(4, 1))), ("one", compare(update(1, 0), update(1, 1), "output"))):
        plots.save(plots.similarity(data, ("seed 0", "seed 1")), tmp_path / name)
    assert len(list(tmp_path.iterdir())) == 4
