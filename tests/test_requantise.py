"""What merging into 4 bits would leave of an update, and that it is not done."""

from __future__ import annotations

import json

import numpy as np
import pytest
from numpy.testing import assert_allclose
from small_models import build
from test_ggml_blocks import IDS, llama, write_gguf
from test_methods import shake

import minilora as ml
from minilora.backend import to_host
from minilora.cli import main
from minilora.lora import adapters_of
from minilora.methods.four_bit import FourBit
from minilora.pretrained.requantise import requantised


def one_layer(relative, d=512):
    """A model in NF4 whose first o_proj is random, with an update of this size on it."""
    rng = np.random.default_rng(0)
    model = ml.Transformer(ml.TransformerConfig.llama(vocab_size=9, d_model=d, n_layers=1, n_heads=8, d_ff=64, max_len=8))
    layer = model.get_module("layers.0.attn.o_proj")
    layer.weight.data[...] = rng.standard_normal((d, d)) * 0.02
    ml.quantise(model)
    ml.add_adapter(model, ml.LoraConfig(r=8, target_modules=["o_proj"]))
    shake(model)
    adapter, = adapters_of(model).values()
    W = layer.weight.dense()
    adapter.lora_B.data *= relative * np.linalg.norm(W) / np.linalg.norm(adapter.adapted_weight(ml.tensor(W)).data - W)
    return model, W, adapter.adapted_weight(ml.tensor(W)).data


@pytest.mark.parametrize(("size", "codes", "kept"), [(0.01, (0.0, 0.001), (0.0, 0.06)), (0.05, (0.0, 0.2), (0.1, 0.5)),
                                                     (1.0, (0.5, 1.0), (0.9, 1.1))])
def test_a_small_update_does_not_survive_and_a_large_one_does(size, codes, kept):
    """The report against the same numbers by hand."""
    model, W, new = one_layer(size)
    row = requantised(model).modules["layers.0.attn.o_proj"]
    again = FourBit(new)
    delta, change = (new - W).astype(float), again.dense().astype(float) - W
    old = model.get_module("layers.0.attn.o_proj").weight.codes
    moved = [(again.codes >> shift & 15) != (old >> shift & 15) for shift in (0, 4)]
    assert row["relative"] == pytest.approx(size, rel=1e-4) and row["norm"] == pytest.approx(np.linalg.norm(delta), rel=1e-6)
    assert row["codes"] == pytest.approx(np.mean(moved), rel=1e-12)
    assert row["kept"] == pytest.approx((change * delta).sum() / (delta**2).sum(), rel=1e-5)
    assert row["error"] == pytest.approx(np.linalg.norm(change - delta) / np.linalg.norm(delta), rel=1e-5)
    assert codes[0] <= row["codes"] <= codes[1] and kept[0] <= row["kept"] <= kept[1]
    assert row["error"] < 1 if size == 1.0 else row["error"] > 0.5


@pytest.mark.parametrize("config", [ml.LoraConfig(r=2, target_modules=["qkv_proj", "up_proj"]),
                                    ml.LoraConfig(r=2, target_modules=["q_proj"], use_dora=True)], ids=["packed", "dora"])
def test_every_method_is_measured_and_no_merge_is_done(config):
    model = ml.quantise(build("gpt2" if not config.use_dora else "llama"))
    ml.add_adapter(model, config)
    shake(model)
    report = requantised(model)
    assert report.modules.keys() == adapters_of(model).keys() and report.summary["modules"] == len(report.modules)
    total = sum(row["norm"] ** 2 for row in report.modules.values())
    assert report.summary["norm"] == pytest.approx(total**0.5) and "nf4" in report.table()
    for refused in ml.merge_adapter, ml.merge_and_unload:
        with pytest.raises(ValueError, match="got a quantised base weight, expected a dense one") as caught:
            refused(model)
        assert "\n" not in str(caught.value)


def test_without_a_quantised_weight_there_is_nothing_to_report():
    model = build()
    ml.add_adapter(model, ml.LoraConfig(r=2))
    with pytest.raises(ValueError, match="changes no quantised weight"):
        requantised(model)


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1"])
def test_the_command_line_refuses_or_dequantises(kind, tmp_path, capsys):
    base, folder, out = tmp_path / "m.gguf", tmp_path / "adapter", tmp_path / "out"
    write_gguf(base, llama(), kind)
    model, _ = ml.load_pretrained(base)
    ml.add_adapter(model, ml.LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    shake(model, size=0.05)
    ml.save_adapter(model, folder)
    assert main(["merge", str(base), str(folder), "-o", str(out)]) == 2
    line, = capsys.readouterr().err.splitlines()
    assert f"is in {kind}" in line and "% of the update would be left" in line and "--dequantise" in line
    assert not out.exists()
    assert main(["merge", str(base), str(folder), "-o", str(out), "--dequantise", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["modules"].keys() == adapters_of(model).keys() and "float32" in report["notes"][0]
    assert {row["format"] for row in report["modules"].values()} == {kind}
    merged, tokenizer = ml.load_pretrained(out)
    assert_allclose(to_host(merged(IDS).data), to_host(model(IDS).data), rtol=1e-4, atol=1e-4)
    assert tokenizer.decode(tokenizer.encode("ab")) == "ab"
    assert main(["merge", str(out), str(folder), "-o", str(tmp_path / "again"), "--dequantise"]) == 2
    assert "expected a GGUF file" in capsys.readouterr().err
