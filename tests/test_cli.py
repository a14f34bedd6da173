"""The command line: every verb shows an example, JSON is JSON, and bad input is one line and exit code 2."""

import json
import subprocess
import sys

import numpy as np
import pytest

import minilora
from minilora.cli import main, parser
from minilora.lora import LoraConfig, adapters_of, add_adapter
from minilora.lora.files import save_adapter
from minilora.nn import Transformer, TransformerConfig
from minilora.studies import STUDIES, rank_quality

VERBS = ["study", "bench", "analyze", "generate", "merge", "resize", "compose", "extract", "reference", "verify", "finetune",
         "predict", "params", "course"]


def fails(arguments, capsys, code=2):
    """The one line on standard error."""
    assert main(arguments) == code
    captured = capsys.readouterr()
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("minilora: "), captured.err
    assert "Traceback" not in captured.err
    return lines[0]


@pytest.mark.parametrize("verb", VERBS)
def test_help_shows_an_example(verb, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([verb, "--help"])
    assert stopped.value.code == 0
    assert f"example: minilora {verb}" in capsys.readouterr().out


def test_version(capsys):
    with pytest.raises(SystemExit):
        main(["--version"])
    assert minilora.__version__ in capsys.readouterr().out


def test_study_list_names_every_study(capsys):
    main(["study", "--list"])
    out = capsys.readouterr().out
    for name, study in STUDIES.items():
        assert name in out and study.QUESTION in out


def test_unknown_study(capsys):
    line = fails(["study", "rank-qualty"], capsys)
    assert "'rank-qualty'" in line and "rank-quality" in line


def test_unwritable_out_is_refused_before_any_work(tmp_path, capsys, monkeypatch):
    def work(*_):
        raise AssertionError("work was done before --out was looked at")
    monkeypatch.setattr(rank_quality, "planted_linear", work)
    blocked = tmp_path / "file"
    blocked.write_text("kept")
    line = fails(["study", "rank-quality", "--quick", "--out", str(blocked)], capsys)
    assert "--out" in line and str(blocked) in line
    assert blocked.read_text() == "kept" and list(tmp_path.iterdir()) == [blocked]


def test_devices(capsys, monkeypatch):
    assert "tpu" in fails(["study", "rank-quality", "--device", "tpu"], capsys)
    monkeypatch.setitem(sys.modules, "cupy", None)
    assert "pip install" in fails(["study", "rank-quality", "--device", "gpu"], capsys)


def test_out_of_memory_is_one_line(capsys, monkeypatch):
    def work(*_):
        raise MemoryError("out of memory on device 'gpu': use fewer rows")
    monkeypatch.setattr(rank_quality, "run", work)
    assert fails(["study", "rank-quality"], capsys).endswith("use fewer rows")


def test_negative_seed(capsys):
    assert "--seed -1" in fails(["study", "rank-quality", "--seed", "-1"], capsys)


def test_analyze_prints_a_table_and_json(tmp_path, capsys, rng):
    model = Transformer(TransformerConfig.llama(vocab_size=20, d_model=8, n_layers=1, n_heads=2))
    add_adapter(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    for adapter in adapters_of(model).values():
        adapter.lora_B.data[...] = rng.standard_normal(adapter.lora_B.shape)
    save_adapter(model, tmp_path / "adapter")
    assert main(["analyze", str(tmp_path / "adapter")]) == 0
    assert "q_proj" in capsys.readouterr().out
    assert main(["analyze", str(tmp_path / "adapter"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    name, = (n for n in found["modules"] if n.endswith("q_proj"))
    A, B = (adapters_of(model)["layers.0.attn.q_proj"].factors()[i].data.astype(float) for i in (0, 1))
    expected = np.linalg.svd(4.0 * B @ A, compute_uv=False)[:2]
    np.testing.assert_allclose(found["modules"][name]["singular_values"], expected, rtol=1e-6)


def test_analyze_with_a_base_prints_and_draws_more(tmp_path, capsys, rng):
    cfg = TransformerConfig.gpt2(vocab_size=20, d_model=8, n_layers=1, n_heads=2)
    model = Transformer(cfg)
    add_adapter(model, LoraConfig(r=2, target_modules=["qkv_proj"]))
    for adapter in adapters_of(model).values():
        adapter.lora_B.data[...] = rng.standard_normal(adapter.lora_B.shape)
    save_adapter(model, tmp_path / "adapter")
    minilora.save_pretrained(Transformer(cfg), None, tmp_path / "base")
    asked = ["analyze", str(tmp_path / "adapter"), "--base", str(tmp_path / "base")]
    assert main([*asked, "--figure", str(tmp_path / "report.png")]) == 0
    assert "amplif." in (shown := capsys.readouterr().out) and "intruders" in shown
    assert {"report.png", "report.svg"} < {path.name for path in tmp_path.iterdir()}
    assert main([*asked, "--json"]) == 0
    row, = json.loads(capsys.readouterr().out)["modules"].values()
    assert row["shape"] == [24, 8] and row["intruder_count"] >= 0 and row["amplification"] > 0
    assert "neither model.safetensors" in fails([*asked[:3], str(tmp_path)], capsys)


def test_analyze_of_nothing(tmp_path, capsys):
    line = fails(["analyze", str(tmp_path / "missing")], capsys)
    assert "missing" in line


def test_analyze_of_a_broken_file(tmp_path, capsys):
    model = Transformer(TransformerConfig.llama(vocab_size=20, d_model=8, n_layers=1, n_heads=2))
    add_adapter(model, LoraConfig(r=2))
    save_adapter(model, tmp_path / "adapter")
    file = tmp_path / "adapter/adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:50])
    fails(["analyze", str(tmp_path / "adapter")], capsys)


def test_bench_refuses_what_it_cannot_run(tmp_path, capsys, monkeypatch):
    def work(*_, **__):
        raise AssertionError("a case was measured")
    monkeypatch.setattr("minilora.bench.measure", work)
    out = ["--out", str(tmp_path)]
    line = fails(["bench", "--case", "coarse", *out], capsys)
    assert "'coarse'" in line and "course" in line
    assert "--device gpu" in fails(["bench", "--case", "gpu-d768", *out], capsys)
    assert "'tpu'" in fails(["bench", "--device", "tpu", *out], capsys)
    assert "rounds = 0" in fails(["bench", "--rounds", "0", *out], capsys)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "torch" else object())
    assert "pip install torch" in fails(["bench", *out], capsys)
    assert list(tmp_path.iterdir()) == []


def test_bench_prints_what_it_measured_and_writes_the_figure(tmp_path, capsys, monkeypatch):
    numbers = {"median_ms": 10.0, "p10_ms": 9.0, "p90_ms": 12.0, "tokens_per_second": 2100.0, "peak_mb": 90.0, "idle_mb": 60.0}
    asked = []

    def measure(name, case, rounds):
        asked.append((name, rounds))
        row = {"kind": case.kind, "minilora": numbers, "torch": numbers, "ratio": 1.0, "memory_ratio": 1.0, "difference": 0.0,
               "tokens_per_step": 1, "adapters": 1, "trainable": 1, "tf32": False, "gemm_gflop": 1.0, "gemm_floor_ms": 1.0,
               "by_op": {}}
        return row, {"gpu": {}, "versions": {"torch": "2.13"}}

    monkeypatch.setattr("minilora.bench.measure", measure)
    monkeypatch.setattr("minilora.bench.numpy_mkl.version", lambda: None)       # its figure would have another name
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    assert main(["bench", "--quick", "--out", str(tmp_path)]) == 0
    assert asked == [("course", 3), ("sweep", 3)]
    shown = capsys.readouterr().out
    assert "ratio of medians 1.00" in shown and str(tmp_path / "bench_cpu") in shown
    assert main(["bench", "--case", "decode", "--case", "gpt2", "--rounds", "2", "--json", "--out", str(tmp_path)]) == 0
    assert asked[2:] == [("decode", 2), ("gpt2", 2)]
    assert json.loads(capsys.readouterr().out) == json.loads((tmp_path / "bench_cpu.json").read_text())
    assert sorted(p.suffix for p in tmp_path.iterdir()) == [".json", ".png", ".svg"]


def test_a_measurement_that_fails_is_one_line(tmp_path, monkeypatch, capsys):
    def gone(*_, **__):
        raise RuntimeError("course: the two sides compute different losses")
    monkeypatch.setattr("minilora.bench.run", gone)
    assert "different losses" in fails(["bench", "--out", str(tmp_path)], capsys, code=1)


def test_the_module_runs_as_a_program():
    done = subprocess.run([sys.executable, "-m", "minilora", "study", "--list"], capture_output=True, text=True, check=True)
    assert "rank-quality" in done.stdout


def test_every_verb_says_what_it_does():
    verbs = next(a for a in parser()._actions if a.dest == "verb")
    assert set(verbs.choices) == set(VERBS)
