"""The benchmark: both sides compute the same numbers, what is counted is what a step does. (Times are never asserted.)"""

import json
import sys
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
from matplotlib import pyplot

from minilora import bench, plots
from minilora.autograd import Op
from minilora.backend import current_device, kernels
from minilora.backend.numpy_fast import NumpyKernels
from minilora.bench import CASES, Case, minilora_side, worker
from minilora.bench.cases import write_start
from minilora.bench.products import Product, product, product_seconds, timed_ops
from minilora.nn import TransformerConfig
from minilora.studies import memory

D, LAYERS, FF, V = 24, 2, 40, 37
SMALL = Case("step", TransformerConfig.gpt2(vocab_size=11, d_model=8, n_layers=1, n_heads=2, max_len=4), 3, 4, ("qkv_proj",))


def small(name):
    """A case with every size made small."""
    case = CASES[name]
    heads = {"n_heads": 6, "n_kv_heads": 2 if case.config.model_type == "llama" else 6}
    config = replace(case.config, vocab_size=V, d_model=D, n_layers=LAYERS, d_ff=FF, head_dim=None, max_len=20, **heads)
    return replace(case, config=config, batch=1 if case.kind == "decode" else 3, tokens=7, new_tokens=case.new_tokens and 6,
                   ranks=(1, 3, 8) if case.kind == "sweep" else case.ranks, device="cpu", rounds=1, steps=1)


def side(case, tmp_path):
    return minilora_side.KINDS[case.kind](case, str(tmp_path))


@pytest.fixture
def in_process(monkeypatch):
    """The workers inside this process: the same requests and answers, as JSON, without the seconds that processes take."""
    class Local:
        def __init__(self, *arguments):
            self.server = worker.Server(*arguments)

        def ask(self, what, argument=0):
            return json.loads(json.dumps(self.server.answer(what, argument)))

    @contextmanager
    def local(name, case, folder, environment):
        yield Local(name, Case.from_dict(json.loads(json.dumps(case.to_dict()))), folder)

    monkeypatch.setattr(bench, "started", local)
    monkeypatch.setattr(worker, "PAUSE", 0.0)


# Both sides

def closed_form(name):
    """How many numbers train: r (in + out) for every adapted module of every layer, and a classifier."""
    q_v = {"llama": 2 * D + D + D // 3, "bert": 4 * D}
    every = (D + D) + 2 * (D + D // 3) + (D + D) + 3 * (D + FF)
    by_rank = {"course": 4 * D, "gpt2": 4 * D, "minilm": q_v["bert"], "smollm2": q_v["llama"], "smollm2-all": every,
               "sweep": 4 * D, "decode": 0, "decode-merged": 0}[name]
    ranks = 2 * (1 + 3 + 8) if name == "sweep" else 8
    return LAYERS * ranks * by_rank + (2 * D + 2 if name == "minilm" else 0)


@pytest.mark.parity
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.device == "cpu"])
def test_both_sides_agree_and_the_row_of_the_table_is_built(name, in_process, monkeypatch):
    for library in ("torch", "transformers", "peft"):
        pytest.importorskip(library)
    monkeypatch.setitem(CASES, name, small(name))
    report = bench.run([name])
    row = report["cases"][name]
    assert row["trainable"] == closed_form(name)
    assert row["difference"] < 1e-5 and row.get("first_different_token") is None
    assert row["adapters"] == {"sweep": 6, "decode": 0}.get(name, 1)
    assert row["tokens_per_step"] == {"sweep": 6 * 3 * 7, "decode": 6, "decode-merged": 6}.get(name, 3 * 7)
    assert abs(sum(row["by_op"].values()) - 1.0) < 1e-9 and row["gemm_gflop"] > 0 and row["gemm_floor_ms"] > 0
    for which in ("minilora", "torch"):
        numbers = row[which]
        assert 0 < numbers["p10_ms"] <= numbers["median_ms"] <= numbers["p90_ms"]
        assert numbers["peak_mb"] >= numbers["idle_mb"] > 0
    assert row["ratio"] == row["minilora"]["median_ms"] / row["torch"]["median_ms"]
    assert set(report["versions"]) == {"torch", "transformers", "peft"}
    text = bench.table(json.loads(json.dumps(report, allow_nan=False)))
    assert f"{name}: " in text and f"ratio of medians {row['ratio']:.2f}" in text and "GEMM floor" in text
    assert all(piece in text for piece in ("minilora", "PyTorch + PEFT", "tokens/s", f"torch {report['versions']['torch']}"))


@pytest.mark.parity
def test_a_wrong_factor_is_found(in_process, monkeypatch):
    """A planted error: one adapter of the sweep starts from another A. (Only a large one shows in the losses: B is 0.)"""
    torch_side = pytest.importorskip("minilora.bench.torch_side")
    pytest.importorskip("peft")
    monkeypatch.setitem(CASES, "sweep", small("sweep"))
    true = torch_side.load_file
    monkeypatch.setattr(torch_side, "load_file", lambda path: {
        name: array * 100 if name[:2] == "4/" and name.endswith("lora_A") else array for name, array in true(path).items()})
    with pytest.raises(RuntimeError, match="different losses"):
        bench.run(["sweep"])


@pytest.mark.parity
def test_another_trainable_set_is_found(in_process, monkeypatch):
    torch_side = pytest.importorskip("minilora.bench.torch_side")
    pytest.importorskip("peft")
    monkeypatch.setitem(CASES, "minilm", small("minilm"))
    monkeypatch.setitem(torch_side.TASKS, "sequence", None)                    # then PEFT freezes the classifier
    with pytest.raises(RuntimeError, match="minilora trains"):
        bench.run(["minilm"])


@pytest.mark.parity
@pytest.mark.slow
def test_a_whole_run_in_processes_of_their_own(monkeypatch, tmp_path):
    for library in ("torch", "transformers", "peft"):
        pytest.importorskip(library)
    monkeypatch.setitem(CASES, "course", small("course"))
    report = bench.run(["course"], rounds=1)
    assert report["cases"]["course"]["difference"] < 1e-5 and report["machine"]["threads"] >= 1
    path = bench.save(report, tmp_path / "figures")
    assert sorted(p.suffix for p in path.parent.iterdir()) == [".json", ".png", ".svg"]
    assert json.loads(path.with_suffix(".json").read_text()) == report


@pytest.mark.parity
def test_pytorch_without_a_gpu(tmp_path):
    torch = pytest.importorskip("torch")
    pytest.importorskip("peft")
    if torch.cuda.is_available():
        pytest.skip("PyTorch finds a GPU")
    from minilora.bench.torch_side import TorchStep
    with pytest.raises(RuntimeError, match="finds no GPU"):
        TorchStep(replace(SMALL, device="gpu"), str(tmp_path)).prepare()


# minilora's side, on every device

@pytest.mark.parametrize("name", CASES)
def test_every_case_is_the_same_on_every_device(name, device, tmp_path):
    from minilora.backend import set_device
    case, found = small(name), {}
    for where in ("cpu", device):
        set_device(where)
        ours = side(case, tmp_path)
        found[where] = ours.prepare()["trainable"], ours.check()
        assert (ours.device_mb() is None) == (where != "gpu")
    (trainable, reference), (same, values) = found["cpu"], found[device]
    assert trainable == same and reference.keys() == values.keys() and reference.get("tokens") == values.get("tokens")
    np.testing.assert_allclose(values["values"], reference["values"], rtol=2e-5)


def test_both_sides_see_the_same_batches():
    a, b = SMALL.batches(), SMALL.batches()
    for _ in range(3):
        (ids, targets), (ids_again, _) = next(a), next(b)
        assert np.array_equal(ids, ids_again) and np.array_equal(ids[:, 1:], targets[:, :-1]) and ids.shape == (3, 4)
    ids, labels = next(small("minilm").batches())
    assert ids.shape == (3, 7) and labels.shape == (3,) and set(labels.tolist()) <= {0, 1}


@pytest.mark.parametrize("name", CASES)
def test_a_case_goes_through_json(name):
    assert Case.from_dict(json.loads(json.dumps(CASES[name].to_dict()))) == CASES[name]


def test_the_start_holds_base_and_factors(tmp_path):
    from safetensors.numpy import load_file
    write_start(replace(SMALL, kind="sweep", ranks=(1, 2), seeds=(0, 1)), tmp_path)
    base, factors = load_file(tmp_path / "base.safetensors"), load_file(tmp_path / "adapters.safetensors")
    assert base["transformer.h.0.attn.c_attn.weight"].shape == (8, 24)         # as the files have it, (in, out)
    assert {name: array.shape for name, array in factors.items()} == {
        f"{k}/transformer.h.0.attn.c_attn/{factor}": (r, 8) if factor == "lora_A" else (24, r)
        for k, r in enumerate((1, 1, 2, 2)) for factor in ("lora_A", "lora_B")}
    assert not np.array_equal(*(factors[f"{k}/transformer.h.0.attn.c_attn/lora_A"] for k in (0, 1)))     # two seeds


# What is counted

def test_the_profile_counts_and_leaves_nothing_wrapped(device, tmp_path):
    ours = side(SMALL, tmp_path)
    assert ours.prepare()["trainable"] == 8 * (8 + 24)
    kernel_type, forward = type(kernels()), Op.registry["Linear"].forward
    before = {name: vars(kernel_type).get(name) for name in ("matmul", "linear", "feed_forward", "feed_forward_grad")}
    profile = ours.profile(2)
    assert abs(sum(profile["by_op"].values()) - 1.0) < 1e-9 and "LoRALinear" in profile["by_op"]
    assert profile["gemm_floor_ms"] > 0
    assert {name: vars(kernel_type).get(name) for name in before} == before and Op.registry["Linear"].forward is forward
    products = []
    with timed_ops({}, products):
        ours.step()
    assert profile["gemm_gflop"] == pytest.approx(sum(p.flops for p in products) / 1e9, rel=1e-12)


def counted(case, tmp_path):
    """Multiply-adds of one step."""
    ours, products = side(case, tmp_path), []
    ours.prepare()
    with timed_ops({}, products):
        ours.step()
    return sum(p.flops for p in products) / 2 / case.updates


def test_the_products_of_a_step_in_closed_form(device, tmp_path):
    n, d, f, v, r = 12, 8, 32, 11, 8
    base = n * d * (3 * d + d + 2 * f + v)                 # qkv, o, up and down, head: forward
    backward = base - n * d * 3 * d                        # the same again for x̄, but the first qkv's input needs none
    thin = 2 * n * r * (d + 3 * d) + n * r * 3 * d         # U and B̄, Z and Ā, and U Bᵀ
    assert n * (d + 3 * d) <= 2 * d * 3 * d                # so W + s·B@A is not formed
    assert counted(SMALL, tmp_path) == base + backward + thin


def test_the_products_of_a_sweep_in_closed_form(device, tmp_path):
    ranks, n, d, f, v, r = (1, 3, 8), 12, 8, 32, 11, 8     # each adapter has its own n rows, padded to rank 8
    base = n * d * (3 * d + d + 2 * f + v)
    alone = base + base - n * d * 3 * d + 2 * n * r * (d + 3 * d) + n * r * 3 * d
    case = replace(SMALL, kind="sweep", ranks=ranks, seeds=(0, 1), updates=2)
    assert counted(case, tmp_path) == 2 * len(ranks) * alone


def test_the_products_of_decoding_in_closed_form(tmp_path):
    case = replace(SMALL, kind="decode", batch=1, tokens=2, new_tokens=2, targets=())
    d, f, v, positions = 8, 32, 11, 2 + 1                  # the prompt, then all but the last new token
    read = positions - 1                                   # of the prompt only the last: q, k and v for all, the rest for it
    assert counted(case, tmp_path) == d * (positions * 3 * d + read * (d + 2 * f + v))


@pytest.mark.parametrize("a, b, ta, tb, expected", [
    ((5, 3), (3, 2), False, False, [(1, 5, 3, 2)]),
    ((3, 5), (2, 3), True, True, [(1, 5, 3, 2)]),
    ((4, 5, 3), (2, 3), False, True, [(1, 20, 3, 2)]),     # leading axes are rows
    ((4, 5, 3), (4, 3, 2), False, False, [(4, 5, 3, 2)]),  # K products
    ((4, 3, 5), (4, 2, 3), True, True, [(4, 5, 3, 2)]),
    ((2, 4, 5, 3), (2, 4, 3, 2), False, False, []),        # attention
])
def test_the_product_of_two_shapes(a, b, ta, tb, expected):
    assert [p[:4] for p in product(a, b, ta, tb)] == expected


@pytest.mark.parametrize("p", [Product(1, 5, 3, 2), Product(4, 5, 1, 2, ta=True), Product(1, 1, 3, 7, tb=True)])
def test_a_product_can_be_measured_in_every_layout(p, device):
    assert product_seconds(p, 3) > 0 and p.flops == 2 * p.K * p.n * p.k * p.m


def test_peak_memory_starts_anew(monkeypatch):
    size = 64 << 20
    memory.give_back_freed_memory()                                           # else the array may lie in what a test freed
    memory.forget_peak()
    before = memory.resident_mb()
    np.ones(size, np.uint8)
    risen = memory.resident_mb() - before
    assert 0 <= risen < 2 * size / 2**20
    if sys.platform == "linux":
        assert risen > 0.9 * size / 2**20
        memory.give_back_freed_memory()
        memory.forget_peak()
        assert memory.resident_mb() < before + 0.5 * size / 2**20
    monkeypatch.setattr(memory.Path, "read_text", lambda *_: "nothing here\n")
    assert memory.resident_mb() > 10                                          # of the whole process, by getrusage


# Agreement

def test_tokens_may_differ_only_where_logits_are_as_good_as_equal():
    ours = {"tokens": [5, 7, 9, 1], "values": [2.0, 3.0, 4.0, 9.0]}
    assert bench.compare("x", ours, ours) == {"difference": 0.0, "first_different_token": None}
    theirs = {"tokens": [5, 7, 8, 2], "values": [2.0, 3.0, 4.0002, 5.0]}       # after the first other token all may differ
    found = bench.compare("x", ours, theirs)
    assert found["first_different_token"] == 2 and found["difference"] == pytest.approx(5e-5, rel=1e-3)
    with pytest.raises(RuntimeError, match="different logits"):
        bench.compare("x", ours, theirs | {"values": [2.0, 3.0, 4.001, 9.0]})


@pytest.mark.parametrize("values", [[1.0, 2.001], [1.0, float("nan")], [1.0]])
def test_losses_that_differ_end_the_run(values):
    with pytest.raises(RuntimeError, match="nothing was timed"):
        bench.compare("x", {"values": [1.0, 2.0]}, {"values": values})


# Input and output

def test_names():
    cpu = [name for name in CASES if not name.startswith("gpu")]
    assert bench.names_of(None) == bench.names_of(["all"]) == cpu
    assert {"course", "minilm", "gpt2", "smollm2", "smollm2-all", "sweep", "decode", "decode-merged"} == set(cpu)
    assert bench.names_of(None, quick=True) == ["course", "sweep"]
    assert bench.names_of(["sweep", "course", "sweep"], quick=True) == ["sweep", "course"]
    assert all(CASES[name].device == "gpu" for name in bench.names_of(None, "gpu"))
    assert CASES["gpu-d2048-tf32"] == replace(CASES["gpu-d2048"], tf32=True)
    for wanted, device, message in ((["coarse"], "cpu", "'coarse'.*course"), (["gpu-d768"], "cpu", "--device gpu"),
                                    (["course"], "gpu", "--device cpu"), (None, "tpu", "'tpu'")):
        with pytest.raises(ValueError, match=message):
            bench.names_of(wanted, device)
    with pytest.raises(ValueError, match="rounds = 0"):
        bench.run(["course"], rounds=0)


@pytest.mark.parametrize("library", ["torch", "transformers", "peft"])
def test_a_missing_library(library, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == library else object())
    with pytest.raises(ModuleNotFoundError, match=f"{library} is missing: pip install"):
        bench.run(["course"])


def a_report(gpu=None):
    numbers = {"median_ms": 10.0, "p10_ms": 9.0, "p90_ms": 12.0, "tokens_per_second": 2100.0, "peak_mb": 90.0, "idle_mb": 60.0}
    row = {"kind": "step", "minilora": numbers, "torch": numbers, "ratio": 0.8, "memory_ratio": 1.25, "difference": 1e-7,
           "tokens_per_step": 21, "adapters": 1, "trainable": 5, "tf32": gpu is not None, "gemm_gflop": 1.0,
           "gemm_floor_ms": 4.0, "by_op": {"Linear": 0.7, "rest": 0.3}}
    machine = bench.machine() | ({"gpu": gpu, "cupy": "14.2"} if gpu else {})
    different = row | {"kind": "decode", "first_different_token": 3, "adapters": 0}
    return {"machine": machine, "versions": {"torch": "2.13"}, "cases": {"course": row, "decode": different}}


def test_a_gpu_gives_the_figure_its_name(tmp_path):
    report = a_report("NVIDIA H200")
    path = bench.save(report, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"bench_gpu_nvidia_h200.{s}" for s in ("json", "png", "svg")]
    assert path == tmp_path / "bench_gpu_nvidia_h200"
    text = bench.table(report)
    assert "NVIDIA H200, CuPy 14.2" in text and "TF32" in text and "40 % of minilora's step" in text
    assert "tokens agree up to number 3" in text and "no adapter" in text


@pytest.mark.parametrize(("mkl", "name", "said"), [
    (None, "bench_cpu", ""), ("2026.2.0", "bench_cpu_mkl", ", products by MKL 2026.2.0")])
def test_mkl_is_said_and_has_a_figure_of_its_own(mkl, name, said, monkeypatch, tmp_path):
    report = a_report()
    report["machine"] |= {"mkl": mkl} if mkl else {}
    assert bench.save(report, tmp_path) == tmp_path / name
    assert bench.table(report).splitlines()[0].endswith(f"NumPy {np.__version__}{said}")
    assert plots.bench(report).get_suptitle().endswith(f"threads{said}")
    pyplot.close()


def test_the_figure_shows_each_ratio():
    figure = plots.bench(a_report())
    try:
        for ax, value in zip(figure.axes, (0.8, 1.25), strict=True):
            assert [bar.get_width() for bar in ax.patches] == [value, value]
            assert [text.get_text() for text in ax.texts] == [f"{value:.2f}"] * 2
            assert [line.get_xdata()[0] for line in ax.lines] == [1.0]
            assert ax.get_ylim()[0] > ax.get_ylim()[1]                        # from top to bottom
        assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["course", "decode"]
    finally:
        pyplot.close(figure)


def test_kernels_of_numpy_are_the_fast_ones():
    assert type(kernels(np.zeros(1))) is NumpyKernels and current_device().name == "cpu"
