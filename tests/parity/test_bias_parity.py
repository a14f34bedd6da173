"""LoRA's two options for biases against PEFT: what trains, 20 steps of training, merges, and files both ways."""

from __future__ import annotations

import json

import numpy as np
import pytest
from parity_twins import close, in_peft, keys_of, logits_of, opened_in_peft, peft, randomise_theirs, randomised, torch, twins
from safetensors.numpy import load_file

import minilora
from minilora.autograd import cross_entropy
from minilora.backend import to_host
from minilora.lora import (
    LoraConfig,
    adapters_of,
    add_adapter,
    disable_adapter,
    merge_adapter,
    merge_and_unload,
    unmerge_adapter,
)
from minilora.lora.files import load_adapter, save_adapter
from minilora.training import AdamW

pytestmark = [
    pytest.mark.filterwarnings("ignore:Careful, disabling adapter layers with bias configured:UserWarning"),
    pytest.mark.filterwarnings("ignore:.lora_bias=True. was passed but the targeted layer"),
    pytest.mark.filterwarnings(r"ignore:Adapter 'default'. \d+ LoRA tensor.s. have invalid shape"),       # of its own lora_bias
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True` as embedding layers found:UserWarning"),
    pytest.mark.filterwarnings("ignore:Could not find a config file in:UserWarning"),
]
BIASED = {"qkv_bias": True, "o_bias": True}                # as Qwen2 has them, and on o too
MODELS = {
    "gpt2": ("gpt2", {}, ["c_attn", "mlp.c_proj"]), "bert": ("bert", {"n_labels": 3}, ["query", "output.dense"]),
    "qwen2": ("llama", BIASED, ["q_proj", "o_proj", "up_proj"]), "llama": ("llama", {}, ["q_proj", "down_proj"]),
    "gpt2-embed": ("gpt2", {}, ["wte", "c_fc"]),
}
OPTIONS = {"B": {"lora_bias": True}, "only": {"bias": "lora_only"}, "all": {"bias": "all"},
           "both": {"lora_bias": True, "bias": "all"}}
CASES = [(name, which) for name in MODELS for which in OPTIONS
         if not (name == "llama" and which != "B") and not (name == "gpt2-embed" and which in ("B", "both"))]
SURPLUS = (".original_module.bias", ".modules_to_save.bias", ".base_layer.weight")        # copies of what is there anyway


def made(name, which, dtype="float64", **more):
    form, fields, targets = MODELS[name]
    ours, theirs = twins(form, dtype, **fields)
    options = {"r": 3, "lora_alpha": 5.0, "target_modules": targets, **OPTIONS[which], **more}
    return ours, theirs, options


def the_same_start(ours, wrapped, tmp_path):
    """Give PEFT's model the values of ours, by the files."""
    save_adapter(ours, tmp_path)
    result = peft.set_peft_model_state_dict(wrapped, peft.utils.load_peft_weights(tmp_path, "cpu"))
    assert not result.unexpected_keys


@pytest.mark.parametrize(("name", "which"), CASES)
def test_training_20_steps(name, which, tmp_path, rng):
    """AdamW with weight decay, which shows that a bias itself decays, not its change; and the same numbers train."""
    ours, theirs, options = made(name, which)
    ids = rng.integers(1, ours.cfg.vocab_size, (4, 8))
    base = ours(ids).data.copy()
    add_adapter(ours, LoraConfig(**options))
    np.testing.assert_array_equal(ours(ids).data, base)    # nothing has changed yet, to the last bit
    wrapped = in_peft(theirs, ours.cfg, options)
    the_same_start(ours, wrapped, tmp_path)
    mine = [p for _, p in ours.named_parameters(trainable=True)]
    other = [p for p in wrapped.parameters() if p.requires_grad]
    assert sorted(p.size for p in mine) == sorted(p.numel() for p in other)
    mine, other = AdamW(mine, lr=3e-3, weight_decay=0.05), torch.optim.AdamW(other, lr=3e-3, weight_decay=0.05)
    for step in range(20):
        x = rng.integers(1, ours.cfg.vocab_size, (4, 8))
        labels = rng.integers(0, 3, (4,) if ours.cfg.head == "sequence" else (4, 8))
        mine.zero_grad()
        other.zero_grad()
        loss, logits = cross_entropy(ours(x), labels), logits_of(wrapped, x)
        expected = torch.nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), torch.from_numpy(labels).reshape(-1))
        loss.backward()
        expected.backward()
        mine.step()
        other.step()
        assert float(to_host(loss)) == pytest.approx(float(expected.detach()), rel=1e-9), f"step {step}"
    close(ours(ids).data, logits_of(wrapped, ids).detach().numpy(), 1e-7)
    wrapped.save_pretrained(tmp_path / "theirs")
    save_adapter(ours, tmp_path / "ours")
    got, expected = (peft.utils.load_peft_weights(tmp_path / side, "cpu") for side in ("ours", "theirs"))
    assert got.keys() == {key for key in expected if not key.endswith(SURPLUS)}
    for key, value in got.items():
        close(value.numpy(), expected[key].numpy(), 1e-6, key)
    with disable_adapter(ours):
        np.testing.assert_array_equal(ours(ids).data, base)


@pytest.mark.parametrize(("name", "which"), CASES)
def test_files_both_ways(name, which, tmp_path, rng):
    ours, theirs, options = made(name, which, use_rslora=True)
    wrapped = in_peft(theirs, ours.cfg, options)
    randomise_theirs(wrapped, rng)
    wrapped.save_pretrained(tmp_path / "theirs")
    load_adapter(ours, tmp_path / "theirs")
    ids = rng.integers(1, ours.cfg.vocab_size, (2, 7))
    expected = logits_of(wrapped, ids).detach().numpy()
    close(ours(ids).data, expected, 1e-10)
    save_adapter(ours, tmp_path / "ours")
    keys, metadata = keys_of(tmp_path / "theirs")
    assert keys_of(tmp_path / "ours") == ({k: v for k, v in keys.items() if not k.endswith(SURPLUS)}, metadata)
    written, read = (json.loads((tmp_path / side / "adapter_config.json").read_text()) for side in ("ours", "theirs"))
    for key in ("bias", "lora_bias", "r", "lora_alpha", "use_rslora", "fan_in_fan_out", "peft_type", "task_type", "use_dora"):
        assert written[key] == read[key], key
    assert written.keys() <= read.keys()
    fresh, other, _ = made(name, which)
    close(opened_in_peft(other, tmp_path / "ours", ids), expected, 1e-10)
    load_adapter(fresh, tmp_path / "ours", "again")
    np.testing.assert_array_equal(fresh(ids).data, ours(ids).data)


@pytest.mark.parametrize(("name", "which"), [case for case in CASES if case[0] != "llama"])          # which has no biases
def test_merging_files(name, which, tmp_path, rng):
    """PEFT's folder merged into its base's folder, without a model, gives the logits of PEFT; and analyze reads it."""
    ours, theirs, options = made(name, which)
    options["target_modules"] = [target for target in options["target_modules"] if target not in ("up_proj", "wte")]
    theirs.save_pretrained(tmp_path / "base")
    wrapped = in_peft(theirs, ours.cfg, options)
    randomise_theirs(wrapped, rng)
    wrapped.save_pretrained(tmp_path / "adapter")
    minilora.merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    merged = made(name, which)[1]
    tensors = load_file(tmp_path / "merged" / "model.safetensors")
    keys = merged.load_state_dict({key: torch.from_numpy(value) for key, value in tensors.items()}, strict=False)
    assert not keys.unexpected_keys
    ids = rng.integers(1, ours.cfg.vocab_size, (2, 7))
    close(logits_of(merged, ids).detach().numpy(), logits_of(wrapped, ids).detach().numpy(), 1e-10)
    targets = {path for path, module in wrapped.base_model.model.named_modules() if hasattr(module, "lora_A")}
    assert set(minilora.analyze(tmp_path / "adapter", tmp_path / "base").modules) == targets


@pytest.mark.parametrize(("name", "which"), [case for case in CASES if case[0] in ("gpt2", "bert", "qwen2")])
def test_merging(name, which, tmp_path, rng):
    """The merged model gives PEFT's logits, unmerging the base, bit for bit."""
    ours, theirs, options = made(name, which)
    options["target_modules"] = [target for target in options["target_modules"] if target != "up_proj"]      # it has no bias
    before = ours.state_dict()
    add_adapter(ours, LoraConfig(**options))
    randomised(ours, rng)
    wrapped = in_peft(theirs, ours.cfg, options)
    the_same_start(ours, wrapped, tmp_path)
    ids = rng.integers(1, ours.cfg.vocab_size, (2, 7))
    expected = ours(ids).data
    close(logits_of(wrapped, ids).detach().numpy(), expected, 1e-10)
    close(logits_of(wrapped.merge_and_unload(), ids).detach().numpy(), expected, 1e-10)
    close(merge_and_unload(ours)(ids).data, expected, 1e-12)
    merge_adapter(ours)
    close(ours(ids).data, expected, 1e-12)
    unmerge_adapter(ours)
    after = ours.state_dict()
    for path, value in before.items():
        np.testing.assert_array_equal(after[path], value)
    np.testing.assert_array_equal(ours(ids).data, expected)


@pytest.mark.parametrize("refuse", [merge_adapter, merge_and_unload])
def test_a_bias_without_a_place_is_not_merged(refuse, rng):
    """Llama's layers have none; PEFT refuses too, but we leave nothing half merged."""
    ours, _, options = made("llama", "B")
    add_adapter(ours, LoraConfig(**options))
    randomised(ours, rng)
    before, ids = ours.state_dict(), rng.integers(1, ours.cfg.vocab_size, (2, 7))
    expected = ours(ids).data
    with pytest.raises(ValueError, match="lora_bias"):
        refuse(ours)
    np.testing.assert_array_equal(ours(ids).data, expected)
    assert all((value == before[path]).all() for path, value in ours.state_dict().items())


def test_bias_all_is_what_pefts_is(rng):
    """All biases but the frozen classifier's, in BERT's 2 layers: 6 linear, 2 norms; the norm at the input; the pooler."""
    ours, _, options = made("bert", "all")
    add_adapter(ours, LoraConfig(**options))
    assert sum(getattr(a, "beside", False) for a in adapters_of(ours).values()) == 2 * (6 + 2 - 3) + 2
