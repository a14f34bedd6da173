"""The study of the tools on files: each is a command, its memory its own, and the verdict follows the numbers."""

from __future__ import annotations

import json

import pytest

from minilora.studies import Options, file_tools


def test_the_study_leaves_its_files_and_a_table(tmp_path):
    report = file_tools.run(Options("quick", out=tmp_path, progress=False))
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"file_tools.{s}" for s in ("json", "png", "svg")]
    assert json.loads((tmp_path / "file_tools.json").read_text()) == json.loads(json.dumps(report))
    assert [row["tool"] for row in report["rows"]] == ["analyze", "resize to r = 2", "compose, exact", "compose, cut to r = 8"]
    assert all(row["seconds"] > 0 and 30 < row["peak_mb"] < 2000 for row in report["rows"])
    text = file_tools.table(report)
    assert "left out: not in the quick form" in text and all(claim["found"] in text for claim in report["verdict"])


def test_memory_is_that_of_the_process():
    """A process that held 1,200 MB had 1,200 MB and what Python takes; one that held nothing, no more than this one."""
    few, many = (file_tools.measured(["-c", f"a = b'x' * {n}"])["peak_mb"] for n in (1, 1_200_000_000))
    assert few < 1000 and 1200 < many < 1300


def test_a_command_that_fails_is_an_error():
    with pytest.raises(RuntimeError, match="failed"):
        file_tools.measured(["-c", "raise SystemExit(3)"])


def test_the_verdict_follows_the_numbers():
    def rows(seconds, mb, merge, load):
        return [{"tool": "analyze", "on": "adapter", "seconds": seconds, "peak_mb": mb},
                {"tool": "merge", "on": file_tools.BASE, "seconds": merge, "peak_mb": 1.0},
                {"tool": "load", "on": file_tools.BASE, "seconds": load, "peak_mb": 1.0},
                {"tool": "load, transformers", "on": file_tools.BASE, "seconds": 30.0, "peak_mb": 1.0}]

    assert [claim["agrees"] for claim in file_tools.verdict(rows(59, 1999, 19, 5.9))] == [True] * 4
    assert [claim["agrees"] for claim in file_tools.verdict(rows(61, 2001, 21, 6.1))] == [False] * 4
    assert len(file_tools.verdict(rows(1, 1, 1, 1)[:1])) == 2
