"""`minilora params`: published counts, counts of real models, files and memory as they are really written and kept."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

import minilora as ml
from minilora.cli import main
from minilora.pretrained.outline import SHAPES, outline
from minilora.pretrained.params import FORMS, METHOD_NAMES, config_for, four_bits, params

QV, ATTENTION = ["q_proj", "v_proj"], ["q_proj", "k_proj", "v_proj", "o_proj"]


def lora(r, targets):
    return ml.LoraConfig(r=r, target_modules=targets)


# --- published numbers --------------------------------------------------------------------------------

TOTALS = {"gpt2": 124_439_808, "gpt2-medium": 354_823_168, "gpt2-large": 774_030_080, "minilm-l6": 22_713_216,
          "roberta-base": 124_645_632, "roberta-large": 355_359_744, "smollm2-135m": 134_515_008,
          "llama-2-7b": 6_738_415_616, "llama-2-13b": 13_015_864_320, "llama-2-70b": 68_976_648_192,
          "gpt3-175b": 174_604_259_328}


@pytest.mark.parametrize("name", SHAPES)
def test_the_whole_model(name):
    """The number of parameters of the published checkpoints (of GPT-3: 96 layers of 12288, with GPT-2's biases and norms)."""
    found = params(name, None)
    assert found.trainable == found.total == TOTALS[name] and found.share == 1.0


@pytest.mark.parametrize(("model", "r", "targets", "published"), [
    ("gpt3-175b", 1, QV, "4.7M"), ("gpt3-175b", 8, QV, "37.7M"),                       # the LoRA paper, table 4
    ("gpt3-175b", 8, ["q_proj"], "18.9M"), ("gpt3-175b", 4, ["q_proj", "k_proj"], "18.9M"),     # table 5, "18M"
    ("gpt3-175b", 4, QV, "18.9M"), ("gpt3-175b", 2, ATTENTION, "18.9M"),
    ("roberta-base", 8, ["query", "value"], "0.3M"), ("roberta-large", 8, ["query", "value"], "0.8M"),    # table 2
    ("llama-2-7b", 8, QV, "4.2M"), ("llama-2-13b", 8, QV, "6.6M"), ("llama-2-70b", 8, QV, "16.4M"),
    ("llama-2-7b", 8, ATTENTION, "8.4M"), ("llama-2-13b", 8, ATTENTION, "13.1M"), ("llama-2-70b", 8, ATTENTION, "32.8M"),
    ("llama-2-7b", 8, "all-linear", "20.0M"), ("llama-2-13b", 8, "all-linear", "31.3M"),
    ("llama-2-70b", 8, "all-linear", "103.5M"),
])
def test_published_counts_of_lora(model, r, targets, published):
    assert f"{params(model, lora(r, targets)).trainable / 1e6:.1f}M" == published


def test_gpt3_with_rank_4_on_q_and_v():
    """Section 4.2 of the LoRA paper: a checkpoint of 350 GB becomes one of "roughly 35MB", here 36 · 2²⁰ bytes."""
    found, whole = params("gpt3-175b", lora(4, QV)), params("gpt3-175b", None)
    assert found.trainable == 96 * 2 * 4 * 2 * 12288 == 18_874_368
    assert found.file_size(2) == 36 * 2**20
    # The paper's figures are rounded: 350 GB to two digits, 10,000 to one.
    assert whole.file_size(2) == pytest.approx(350e9, rel=0.003)
    assert whole.file_size(2) / found.file_size(2) == pytest.approx(10_000, rel=0.1)       # "reduced by roughly 10,000×"


def test_the_common_table_of_rank_8():
    """All linear layers: 0.297, 0.240 and 0.150 % of 7B, 13B and 70B. The share falls as the model grows."""
    shares = [params(f"llama-2-{size}", lora(8, "all-linear")) for size in ("7b", "13b", "70b")]
    assert [f"{100 * found.trainable / (found.total - found.trainable):.3f}" for found in shares] == ["0.297", "0.240", "0.150"]


def test_sixteen_bytes_a_trained_number():
    for found in (params("llama-2-7b", None), params("llama-2-7b", lora(8, QV)), params("llama-2-7b", config_for("vera", 8))):
        for precision, parts in found.memory.items():
            base = 0 if found.share == 1.0 else {"float32": 4, "bf16": 2}.get(precision)
            if base is not None:
                frozen = found.saved - found.trainable
                held = base * TOTALS["llama-2-7b"] + 4 * frozen
                assert sum(parts[p] for p in ("weights", "gradients", "optimizer")) == held + 16 * found.trainable
    in_four = params("llama-2-70b", lora(8, QV)).memory["4 bits"]["weights"]
    assert 36e9 < in_four < 37.5e9                         # QLoRA: 65B and more on one GPU of 48 GB


def test_counting_the_largest_takes_no_memory():
    import tracemalloc
    tracemalloc.start()
    try:
        params("gpt3-175b", lora(4, "all-linear"))
        assert tracemalloc.get_traced_memory()[1] < 60e6   # the norms' vectors and Python's objects
    finally:
        tracemalloc.stop()


# --- real small models --------------------------------------------------------------------------------

FORMS_OF_MODELS = {"gpt2": {}, "llama": {"n_kv_heads": 2}, "bert": {"n_labels": 3},
                   "bert-none": {"head": "none", "pooler": "tanh"}, "bert-token": {"n_labels": 3, "head": "token"},
                   "llama-labels": {"n_labels": 2}}
CONFIGS = {
    "lora": lambda t: lora(4, t), "dora": lambda t: ml.LoraConfig(r=4, use_dora=True, target_modules=t),
    "pissa": lambda t: ml.LoraConfig(r=4, init_lora_weights="pissa", target_modules=t),
    "lora-fa": lambda t: ml.LoraFAConfig(r=4, target_modules=t), "vera": lambda t: ml.VeraConfig(r=4, target_modules=t),
    "ia3": lambda t: ml.IA3Config(target_modules=t), "bitfit": lambda t: ml.BitFitConfig(target_modules=t),
    "full": lambda t: ml.FullConfig(target_modules=t),
}
TARGETS = (None, QV, ["embed", "head"], ["qkv_proj", "up_proj", "down_proj"], "all-linear", ["o_proj"])


def small(form, **fields):
    sizes = {"vocab_size": 97, "d_model": 64, "n_layers": 3, "n_heads": 4, "d_ff": 160, "max_len": 64}
    return getattr(ml.TransformerConfig, form.partition("-")[0])(**sizes | FORMS_OF_MODELS[form] | fields)


@pytest.mark.parametrize("targets", TARGETS, ids=str)
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("form", FORMS_OF_MODELS)
def test_counts_are_those_of_the_real_model(form, name, targets):
    cfg, config = small(form), CONFIGS[name](targets)
    model = ml.Transformer(cfg)
    try:
        ml.add_adapter(model, config)
    except ValueError as refused:                          # BitFit without biases, DoRA on a table, no head …
        with pytest.raises(ValueError) as caught:
            params(cfg, config)
        assert str(caught.value)[:20] == str(refused)[:20]
        return
    found = params(cfg, config)
    assert {"trainable": found.trainable, "total": found.total, "share": found.share} == ml.count_parameters(model)
    assert found.trainable == sum(row["trained"] for row in found.layers.values())


@pytest.mark.parametrize("form", FORMS_OF_MODELS)
def test_a_whole_model_and_its_source(form, tmp_path):
    cfg = small(form)
    if form == "llama":
        cfg.model_type = None                              # under our own names
    model = ml.Transformer(cfg)
    ml.save_pretrained(model, None, tmp_path)
    hub = json.loads((tmp_path / "config.json").read_text())
    for source in (cfg, model, hub, tmp_path, str(tmp_path), tmp_path / "config.json"):
        assert params(source, None).total == ml.count_parameters(model)["total"]
    paths = {path: p.shape for path, p in model.named_parameters()}
    assert {path: p.shape for path, p in outline(cfg).named_parameters()} == paths


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("form", ["gpt2", "bert"])
def test_what_is_saved_is_what_lies_in_the_file(form, name, tmp_path):
    cfg, config = small(form), CONFIGS[name](None)
    model = ml.Transformer(cfg)
    ml.add_adapter(model, config)
    ml.save_adapter(model, tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors").values()
    assert params(cfg, config).file_size(4) == sum(array.nbytes for array in tensors)


@pytest.mark.parametrize("shape", [(64, 64), (5, 13), (129, 128), (300, 70)], ids=str)
def test_the_bytes_of_four_bits(shape, rng):
    assert four_bits(shape[0] * shape[1]) == ml.methods.FourBit(rng.standard_normal(shape).astype("float32")).nbytes


@pytest.mark.parametrize("form", ["gpt2", "llama", "bert"])
def test_the_bytes_of_a_quantised_base(form):
    cfg = small(form)
    model = ml.quantise(ml.Transformer(cfg))
    weights = {id(m): m for _, m in model.named_modules() if isinstance(m, ml.methods.FourBit)}
    rest = sum(p.size for _, p in model.named_parameters())
    found = params(cfg, CONFIGS["ia3"](QV))
    own = found.trainable * 4
    assert found.memory["4 bits"]["weights"] - own == sum(m.nbytes for m in weights.values()) + 2 * rest


# --- activations: the arrays that a step really keeps -------------------------------------------------


def root(array):
    while isinstance(array.base, np.ndarray):
        array = array.base
    return array


def kept_bytes(model, ids, targets):
    """The bytes that the graph of the loss keeps alive, parameters aside."""
    loss = model.loss(ids, targets)
    own = {id(root(p.data)) for _, p in model.named_parameters()}
    own |= {id(root(m.packed_weight)) for _, m in model.named_modules() if hasattr(m, "packed_weight")}
    arrays, seen, ops = {}, set(), [loss.op]
    while ops:
        op = ops.pop()
        if op is None or op in seen:
            continue
        seen.add(op)
        ops += [edge[0] for edge in op.edges if isinstance(edge, tuple)]
        queue = [op.kept]
        while queue:
            item = queue.pop()
            if isinstance(item, (list, tuple)):
                queue += item
            elif hasattr(item, "dtype") and item.ndim and id(root(item)) not in own:
                arrays[id(root(item))] = root(item).nbytes
    return sum(arrays.values())


@pytest.mark.parametrize("targets", TARGETS[1:], ids=str)
@pytest.mark.parametrize("name", [*(name for name in CONFIGS if name != "full"), "whole"])
@pytest.mark.parametrize("form", ["gpt2", "llama", "bert", "bert-token"])
def test_the_estimate_of_activations_is_what_a_step_keeps(form, name, targets, rng):
    cfg, (B, T) = small(form), (4, 48)
    model, config = ml.Transformer(cfg), None if name == "whole" else CONFIGS[name](targets)
    if config is None:
        model.unfreeze()
    else:
        try:
            ml.add_adapter(model, config)
        except ValueError as refused:
            pytest.skip(str(refused))
    ids = rng.integers(0, 97, (B, T))
    labels = {"lm": ids, "sequence": ids[:, 0] % 3, "token": ids % 3}[cfg.head]
    measured = kept_bytes(model, ids, labels)
    found = params(cfg, config, batch=B, tokens=T)
    assert found.memory["float32"]["activations"] == pytest.approx(measured, rel=0.05)
    assert found.memory["bf16"]["activations"] == found.memory["float32"]["activations"] // 2
    model.recompute = True
    least = kept_bytes(model, ids, labels)
    again = params(cfg, config, batch=B, tokens=T, recompute=True).memory["float32"]["activations"]
    assert least < again < 0.8 * measured


# --- the command line, and what is refused ------------------------------------------------------------


def test_the_verb_prints_a_table_and_json(capsys):
    assert main(["params", "gpt3-175b", "--r", "4", "--targets", "q_proj", "v_proj"]) == 0
    shown = capsys.readouterr().out
    assert "18,874,368 of 174,623,133,696" in shown and "37.7 MB in half precision" in shown and "4 bits" in shown
    assert main(["params", "llama-2-7b", "--method", "dora", "--targets", "all-linear", "--batch", "4", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    again = params("llama-2-7b", ml.LoraConfig(use_dora=True, target_modules="all-linear"), batch=4).to_dict()
    assert found == json.loads(json.dumps(again)) and found["batch"] == 4
    for method in METHOD_NAMES:
        assert main(["params", "gpt2", "--method", method]) == 0
    assert set(METHOD_NAMES) - {"pissa"} <= FORMS.keys()


@pytest.mark.parametrize(("arguments", "message"), [
    (["llama-9"], "llama-2-7b"), (["gpt2", "--targets", "gate_proj"], "gate_proj"), (["gpt2", "--r", "769"], "at most 768"),
    (["gpt2", "--r", "0"], "rank r = 0"), (["gpt2", "--tokens", "1025"], "at most 1024"),
    (["gpt2", "--batch", "0"], "batch = 0"), (["gpt2", "--method", "full", "--targets", "q_proj"], "leave them out"),
    (["gpt2", "--method", "ia3", "--r", "4"], "no rank"), (["llama-2-7b", "--method", "bitfit"], "no bias"),
    (["gpt2", "--method", "dora", "--targets", "embed"], "cannot adapt embed"),
])
def test_bad_input_is_one_line(arguments, message, capsys):
    assert main(["params", *arguments]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and message in lines[0]


def test_what_has_no_closed_form_is_refused(tmp_path):
    with pytest.raises(ValueError, match="not counted here"):
        params("gpt2", ml.LoHaConfig(r=2))
    with pytest.raises(ValueError, match="expected one of full, lora"):
        config_for("lore")
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(FileNotFoundError, match="a GGUF file has none"):
        params(tmp_path / "model.gguf", None)
