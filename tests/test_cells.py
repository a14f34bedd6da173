"""A study's cells: computed once, stored at once, the same after any interruption, and on a cluster."""

import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from dataclasses import replace

import pytest

from minilora.studies import Options, cells, which_matrices
from minilora.studies.common import Pretraining
from minilora.studies.text import Setting, best_rate, full_cell, lora_cell

TINY = Setting(16, 1, Pretraining(4, 4, 3e-3, 16), 3, 4, 8)
QUIET = Options(progress=False)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MINILORA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def noted_square(x: float, log: str) -> float:
    """A cell that leaves a line each time it is computed."""
    with open(log, "a", encoding="utf-8") as file:
        file.write(f"{x}\n")
    if x == 13:
        raise FloatingPointError("thirteen")
    return x * x


@pytest.fixture
def inline(monkeypatch):
    """Cells in this process: a function of a test is not importable in another."""
    monkeypatch.setattr(cells, "_run", lambda name, pending, cluster: (
        (key, json.dumps(noted_square(**cell))) for key, cell in pending.items()))


def test_a_cell_is_computed_once(tmp_path, inline):
    log = tmp_path / "log"
    wanted = [{"x": x, "log": str(log)} for x in (3, 1, 2, 1)]
    assert cells.compute(noted_square, wanted, QUIET) == [9, 1, 4, 1]
    assert sorted(log.read_text().split()) == ["1", "2", "3"]                      # the same cell twice is one cell
    assert cells.compute(noted_square, [*wanted, {"x": 5, "log": str(log)}], QUIET) == [9, 1, 4, 1, 25]
    assert sorted(log.read_text().split()) == ["1", "2", "3", "5"]


def test_what_was_done_before_an_error_is_kept(tmp_path, inline):
    log = tmp_path / "log"
    with pytest.raises(FloatingPointError, match="thirteen"):
        cells.compute(noted_square, [{"x": x, "log": str(log)} for x in (2, 13, 4)], QUIET)
    cells.compute(noted_square, [{"x": x, "log": str(log)} for x in (2, 4)], QUIET)
    assert log.read_text().split() == ["2", "13", "4"]


def test_other_arguments_or_other_code_are_another_cell(monkeypatch):
    before = cells.cell_key("module:function", {"a": 1, "b": 2.0})
    assert cells.cell_key("module:function", {"b": 2.0, "a": 1}) == before         # order means nothing
    assert cells.cell_key("module:function", {"a": 1, "b": 2.5}) != before
    assert cells.cell_key("module:other", {"a": 1, "b": 2.0}) != before
    monkeypatch.setattr(cells, "code_digest", lambda: "other code")
    assert cells.cell_key("module:function", {"a": 1, "b": 2.0}) != before


def test_a_damaged_store_is_made_anew(tmp_path, inline, cache):
    log = tmp_path / "log"
    cells.compute(noted_square, [{"x": 3, "log": str(log)}], QUIET)
    (cache / "cells.sqlite").write_bytes(b"no database " * 1000)
    assert cells.compute(noted_square, [{"x": 3, "log": str(log)}], QUIET) == [9]
    assert cells.compute(noted_square, [{"x": 3, "log": str(log)}], QUIET) == [9]
    assert log.read_text().split() == ["3", "3"]
    with sqlite3.connect(cache / "cells.sqlite") as store:
        assert store.execute("SELECT result FROM cells").fetchall() == [("9",)]


def test_a_store_that_cannot_be_written_is_no_obstacle(tmp_path, inline, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MINILORA_CACHE", str(tmp_path / "file" / "below"))
    assert cells.compute(noted_square, [{"x": 3, "log": str(tmp_path / "log")}], QUIET) == [9]
    assert "not stored" in "".join(capsys.readouterr())


def test_the_cells_of_the_text_studies():
    given = TINY.to_dict()
    assert Setting.of(json.loads(json.dumps(given))) == TINY
    configs = [{"r": r, "lora_alpha": 8, "target_modules": ["q_proj"]} for r in (1, 4)]
    rows = lora_cell(given, configs, [0, 1], [1e-2, 1e38], learned=True)
    assert [(row["rank"], row["seed"], row["lr"]) for row in rows] == [
        (r, seed, lr) for r in (1, 4) for seed in (0, 1) for lr in (1e-2, 1e38)]
    for row in rows:
        assert (row["loss"] is None) == (row["lr"] == 1e38)
        if row["lr"] == 1e-2:
            assert row["trainable"] == 32 * row["rank"] and 1 <= row["effective_rank"] <= row["rank"]
            assert row["merge"]["merged"] == pytest.approx(row["merge"]["adapter"], rel=1e-5)
    assert best_rate(rows) == 1e-2
    whole = full_cell(given, 0, 1e-2)
    assert whole["loss"] < full_cell(given, 0, 0.0)["loss"]
    assert full_cell(given, 0, 1e-2) == whole                                      # the base is not what was trained
    assert full_cell(given, 0, 1e-2, limit=64)["train_loss"] != whole["train_loss"]


RUN = """
import sys
from dataclasses import replace
from pathlib import Path
from minilora.studies import Options, which_matrices
from minilora.studies.common import Pretraining
from minilora.studies.text import Setting
setting = Setting(32, 1, Pretraining(4, 4, 3e-3, 16), 12, 4, 8)
which_matrices.SIZES["quick"] = which_matrices.Size(setting, 2, [1e-2, 2e-2], [1e-2])
which_matrices.run(Options("quick", out=Path(sys.argv[1]), progress=False))
"""


def start(out, cache):
    with open(cache.with_suffix(".log"), "a", encoding="utf-8") as log:
        return subprocess.Popen([sys.executable, "-c", RUN, str(out)], env=os.environ | {"MINILORA_CACHE": str(cache)},
                                start_new_session=True, stdout=log, stderr=log)


@pytest.mark.slow
def test_a_study_killed_at_ten_moments_ends_with_the_same_table(tmp_path):
    began = time.monotonic()
    through = start(tmp_path / "through", tmp_path / "cache-through")
    assert through.wait(300) == 0, (tmp_path / "cache-through.log").read_text()
    whole, rng, stored = time.monotonic() - began, random.Random(0), []
    for _ in range(10):
        study = start(tmp_path / "killed", tmp_path / "cache-killed")
        time.sleep(whole * rng.uniform(0.2, 1.0))
        os.killpg(study.pid, signal.SIGKILL)
        study.wait()
        store = tmp_path / "cache-killed" / "cells.sqlite"
        if store.exists():
            with sqlite3.connect(store) as connection:
                stored.append(len(connection.execute("SELECT key FROM cells").fetchall()))
    assert stored == sorted(stored)                                                # what was stored is never lost
    last = start(tmp_path / "killed", tmp_path / "cache-killed")
    assert last.wait(300) == 0, (tmp_path / "cache-killed.log").read_text()
    found, expected = (json.loads((tmp_path / name / "which_matrices.json").read_text()) for name in ("killed", "through"))
    assert found | {"seconds": 0} == expected | {"seconds": 0}


def test_a_cluster_of_two_workers_computes_the_same_cells(monkeypatch):
    distributed = pytest.importorskip("dask.distributed")
    given = [{"setting": TINY.to_dict(), "seed": seed, "lr": 1e-2} for seed in (0, 1, 2)]
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster:
        address = cluster.scheduler_address.replace("tcp://", "dask://")
        found = cells.compute(full_cell, given, replace(QUIET, workers=address))
    assert [row["seed"] for row in found] == [0, 1, 2]
    for row, cell in zip(found, given):
        assert row["loss"] == pytest.approx(full_cell(**cell)["loss"], rel=1e-5)
    assert cells.compute(full_cell, given, replace(QUIET, workers="dask://nowhere:1")) == found      # nothing is left to do


@pytest.mark.parametrize("address", ["localhost:8786", "dask://localhost", "tcp://localhost:8786"])
def test_a_wrong_address_is_refused_in_one_line(address):
    pytest.importorskip("dask.distributed")
    with pytest.raises(ValueError, match="expected dask://HOST:PORT"):
        cells.compute(full_cell, [{"setting": TINY.to_dict(), "seed": 0, "lr": 1e-2}], replace(QUIET, workers=address))


def test_the_verdicts_of_which_matrices_follow_the_numbers():
    losses = dict.fromkeys(which_matrices.SETS, 2.0) | {"q": 2.5, "k": 2.4, "q, k": 2.3, "q, k, v, o": 1.9, "up, down": 1.8}
    rows = [{"matrices": name, "loss_mean": loss} for name, loss in losses.items()]
    assert [claim["agrees"] for claim in which_matrices.verdict(rows)] == [True, True, True, True]
    for row in rows:
        row["loss_mean"] = -row["loss_mean"]
    assert [claim["agrees"] for claim in which_matrices.verdict(rows)] == [False, False, False, False]


