"""The tools on files against PEFT: it loads what resize, compose and extract wrote, and a merge is its merge_and_unload.

And somebody's own layer in PyTorch, judged by `minilora verify`.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
from parity_twins import FORMS, close, in_peft, logits_of, lora_layers, peft, their_model, torch, twin_config
from safetensors import safe_open
from safetensors.numpy import load_file
from safetensors.torch import save_file

import minilora as ml
from minilora.lora.files import read_adapter

pytestmark = [
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True` and a tied layer is part:UserWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True` as embedding layers found:UserWarning"),
    pytest.mark.filterwarnings("ignore:Adapter .default.. .* LoRA tensor.s. have invalid shape"),   # PEFT, of its lora_bias
]
TARGETS = {"gpt2": ["c_attn", "c_proj", "c_fc"], "bert": ["query", "value", "dense"],
           "llama": ["q_proj", "v_proj", "down_proj"]}
NAMES = ["gpt2", "bert-sequence", "llama", "llama-sequence"]
IDS = np.array([[3, 1, 4, 1, 5, 9, 2], [6, 5, 3, 5, 8, 9, 7]])


def saved_base(name, folder, dtype="float64"):
    """transformers' model in a folder, and its config for ours."""
    form, fields = FORMS[name]
    cfg = twin_config(form, **fields)
    model = their_model(cfg, dtype)
    model.save_pretrained(folder)
    return cfg, model


def saved_adapter(name, folder, seed=1, **options):
    """PEFT's adapter with random values in a folder; returns the logits with it, and PEFT's model."""
    form, fields = FORMS[name]
    cfg = twin_config(form, **fields)
    wrapped = in_peft(their_model(cfg, "float64"), cfg, {"r": 4, "lora_alpha": 6, "target_modules": TARGETS[form]} | options)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in wrapped.parameters():
            if p.requires_grad:
                p.copy_(0.3 * torch.randn(p.shape, generator=generator, dtype=torch.float64))
    wrapped.save_pretrained(folder)
    return logits_of(wrapped, IDS).detach().numpy(), wrapped


def deltas(wrapped):
    return {path: layer.get_delta_weight("default").detach().numpy() for path, layer in lora_layers(wrapped).items()}


def loaded(name, folder):
    form, fields = FORMS[name]
    return peft.PeftModel.from_pretrained(their_model(twin_config(form, **fields), "float64"), folder).eval()


@pytest.mark.parametrize("options", [
    {}, {"use_rslora": True, "rank_pattern": {}, "alpha_pattern": {}}, {"lora_bias": True}], ids=["plain", "patterns", "bias"])
@pytest.mark.parametrize("name", NAMES)
def test_merge_is_merge_and_unload(name, options, tmp_path):
    if "rank_pattern" in options:
        first = TARGETS[FORMS[name][0]][0]
        options = options | {"rank_pattern": {first: 2}, "alpha_pattern": {first: 9.0}}
    if options.get("lora_bias") and name.startswith("llama"):
        pytest.skip("Llama's layers have no bias to merge into")
    saved_base(name, tmp_path / "base")
    expected, wrapped = saved_adapter(name, tmp_path / "adapter", **options)
    wrapped.merge_and_unload().save_pretrained(tmp_path / "theirs")
    report = ml.merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "ours")
    assert report.summary["error"] < 1e-12
    ours, theirs = (load_file(tmp_path / side / "model.safetensors") for side in ("ours", "theirs"))
    assert ours.keys() == theirs.keys()
    for key in ours:
        np.testing.assert_allclose(ours[key], theirs[key], atol=1e-13, err_msg=key)
    model = their_model(twin_config(FORMS[name][0], **FORMS[name][1]), "float64")
    keys = model.load_state_dict({key: torch.from_numpy(value) for key, value in ours.items()}, strict=False)
    assert not keys.unexpected_keys
    close(logits_of(model, IDS).detach().numpy(), expected, 1e-10)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_merge_in_16_bits_is_within_a_step_of_merge_and_unload(dtype, tmp_path):
    _, model = saved_base("llama", tmp_path / "base", dtype)
    saved_adapter("llama", tmp_path / "adapter")
    ml.merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "ours")
    peft.PeftModel.from_pretrained(model, tmp_path / "adapter").merge_and_unload().save_pretrained(tmp_path / "theirs")
    with safe_open(tmp_path / "ours/model.safetensors", "pt") as a, safe_open(tmp_path / "theirs/model.safetensors", "pt") as b:
        assert sorted(a.keys()) == sorted(b.keys())
        for key in a.keys():  # noqa: SIM118
            ours, theirs = a.get_tensor(key), b.get_tensor(key)
            assert ours.dtype == theirs.dtype == getattr(torch, dtype)
            torch.testing.assert_close(ours, theirs, rtol=2**-7, atol=2**-6)


@pytest.mark.parametrize("name", NAMES)
def test_peft_loads_a_resized_adapter(name, tmp_path):
    expected, _ = saved_adapter(name, tmp_path / "in", use_rslora=True)
    whole = ml.resize(tmp_path / "in", tmp_path / "same", energy=1.0)
    assert whole.summary["measured_error"] < 1e-12
    close(logits_of(loaded(name, tmp_path / "same"), IDS).detach().numpy(), expected, 1e-10)
    ml.resize(tmp_path / "in", tmp_path / "out", rank=2)
    before, after = deltas(loaded(name, tmp_path / "in")), deltas(loaded(name, tmp_path / "out"))
    assert before.keys() == after.keys()
    for path, delta in before.items():
        U, S, Vh = np.linalg.svd(delta, full_matrices=False)
        np.testing.assert_allclose(after[path], U[:, :2] * S[:2] @ Vh[:2], atol=1e-12)


@pytest.mark.parametrize("how", ["cat", "svd"])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_peft_loads_a_composed_adapter_and_agrees_on_the_sum(name, how, tmp_path):
    for seed, use_rslora in ((1, False), (2, True)):
        saved_adapter(name, tmp_path / str(seed), seed, use_rslora=use_rslora)
    report = ml.compose([tmp_path / "1", tmp_path / "2"], tmp_path / "out", [0.7, -0.4], how)
    one, two, both = (deltas(loaded(name, tmp_path / folder)) for folder in ("1", "2", "out"))
    for path, delta in both.items():
        exact = 0.7 * one[path] - 0.4 * two[path]
        if how == "svd":
            U, S, Vh = np.linalg.svd(exact, full_matrices=False)
            exact = U[:, :4] * S[:4] @ Vh[:4]
        np.testing.assert_allclose(delta, exact, atol=1e-12)
    wrapped = loaded(name, tmp_path / "1")
    wrapped.load_adapter(tmp_path / "2", "second")
    wrapped.add_weighted_adapter(["default", "second"], [0.7, -0.4], "sum", combination_type="linear")
    for path, layer in lora_layers(wrapped).items():       # what PEFT's "linear" gets wrong is what we report
        exact, linear = 0.7 * one[path] - 0.4 * two[path], layer.get_delta_weight("sum").detach().numpy()
        error = np.linalg.norm(linear - exact) / np.linalg.norm(exact)
        assert report.modules[path]["linear_error"] == pytest.approx(error, rel=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_peft_loads_an_extracted_adapter(name, tmp_path):
    saved_base(name, tmp_path / "base")
    saved_adapter(name, tmp_path / "adapter")
    ml.merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "tuned")
    report = ml.extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "out", rank=4)
    assert report.summary["measured_error"] < 1e-6
    expected, got = deltas(loaded(name, tmp_path / "adapter")), deltas(loaded(name, tmp_path / "out"))
    assert expected.keys() == got.keys()
    assert {path for path, entry in read_adapter(tmp_path / "out")[1].items() if "A" in entry} == got.keys()
    for path in got:
        np.testing.assert_allclose(got[path], expected[path], atol=1e-5)
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert config["fan_in_fan_out"] is (name == "gpt2")
    assert config["task_type"] == ("CAUSAL_LM" if name in ("gpt2", "llama") else "SEQ_CLS")


class LoRALinear(torch.nn.Module):
    """y = x Wᵀ + s·(x Aᵀ) Bᵀ, W frozen: fifteen lines that `minilora verify` finds right."""

    def __init__(self, W, A, B, s):
        super().__init__()
        self.W, self.s = W, s
        self.A, self.B = torch.nn.Parameter(A), torch.nn.Parameter(B)

    def forward(self, x):
        return x @ self.W.T + self.s * (x @ self.A.T) @ self.B.T

    def merged(self):
        return self.W + self.s * self.B @ self.A


def test_a_layer_in_pytorch_is_verified(tmp_path):
    ml.reference.write(tmp_path / "cases")
    (tmp_path / "mine").mkdir()
    for dtype in ("float32", "float64"):
        with safe_open(tmp_path / f"cases/linear-{dtype}.safetensors", "pt") as file:
            t, o = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()            # noqa: SIM118
        layer = LoRALinear(t["W"], t["A"].clone(), t["B"].clone(), float(o["lora_alpha"]) / int(o["r"]))
        x = t["x"].clone().requires_grad_()
        y = layer(x)
        y.backward(t["dy"])
        found = {"y": y, "dx": x.grad, "dA": layer.A.grad, "dB": layer.B.grad, "merged": layer.merged()}
        found = {key: value.detach().clone() for key, value in found.items()}
        layer.A.grad, layer.B.grad = t["gA"], t["gB"]
        torch.optim.AdamW(layer.parameters(), lr=float(o["lr"]), betas=(float(o["beta1"]), float(o["beta2"])),
                          eps=float(o["eps"]), weight_decay=float(o["weight_decay"])).step()
        found |= {"A_step": layer.A.detach(), "B_step": layer.B.detach()}
        save_file(found, tmp_path / f"mine/linear-{dtype}.safetensors")
    report = ml.reference.verify(tmp_path / "cases", tmp_path / "mine")
    assert report.passed and report.summary()["right"] == 14, report.table()
