"""LoRA's biases: what trains, mixed batches, two adapters at once, strengths, quantised bases, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from small_models import IDS, build, run
from test_methods import shake, trained

from minilora import AdaLoraConfig, LoraConfig, LoraFAConfig, SoRAConfig
from minilora.autograd import cross_entropy, gradcheck, tensor
from minilora.lora import (
    adapters_of,
    add_adapter,
    delete_adapter,
    disable_adapter,
    merge_adapter,
    merge_and_unload,
    set_adapter,
    set_scale,
    unmerge_adapter,
)
from minilora.lora.files import load_adapter, save_adapter

FORMS = {"gpt2": {}, "bert": {"n_labels": 3}, "llama": {"bias": True}, "llama-none": {}}
OPTIONS = [{"bias": "all"}, {"lora_bias": True, "bias": "all"}, {"lora_bias": True}]
TARGETS = (["q_proj", "up_proj"], ["qkv_proj"], ["q_proj", "qkv_proj", "embed"])


def made(form, dtype="float64"):
    return build(form.partition("-")[0], dtype, **FORMS[form])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("targets", TARGETS, ids=str)
def test_two_adapters_and_a_mixed_batch(form, options, targets, rng):
    """Each row as its adapter alone; a new adapter changes no bit of the norms; off, all is the base; gradients are right."""
    if "embed" in targets and "lora_bias" in options:
        targets = targets[:2]
    model = made(form)
    base = run(model)
    alone = {"__base__": base}
    for name, own in ("a", options), ("b", {}):
        add_adapter(model, LoraConfig(r=2, target_modules=targets, **own), name)
        assert_allclose(run(model), base, rtol=0, atol=1e-13)
        shake(model, name)
        alone[name] = run(model)
        assert abs(alone[name] - base).max() > 1e-3
    rows = ["b", "__base__", "a"]
    expected = np.stack([alone[name][i] for i, name in enumerate(rows)])
    assert_allclose(run(model, adapter_names=rows), expected, rtol=1e-12, atol=1e-12)
    set_adapter(model, "a")
    assert_allclose(run(model), alone["a"], rtol=1e-13, atol=1e-13)
    labels = rng.integers(0, 3, run(model).shape[:-1])
    for names in None, rows:
        assert gradcheck(lambda *_, names=names: cross_entropy(model(IDS, adapter_names=names), labels), trained(model),
                         directions=1, eps=1e-6)
    set_adapter(model, ["a", "b"])
    both = run(model)
    if form != "llama-none" or "lora_bias" not in options:
        merge_adapter(model)
        assert_allclose(run(model), both, rtol=1e-12, atol=1e-12)
        with disable_adapter(model):
            assert_array_equal(run(model), base)
        assert_allclose(run(merge_and_unload(model)), both, rtol=1e-12, atol=1e-12)
        unmerge_adapter(model)
    with disable_adapter(model):
        assert_array_equal(run(model), base)
    set_scale(model, "a", 0.0)
    set_adapter(model, "b")
    only_b = run(model)
    set_adapter(model, ["a", "b"])
    assert_allclose(run(model), only_b, rtol=1e-13, atol=1e-13)
    for name in "a", "b":
        delete_adapter(model, name)
    assert_array_equal(run(model), base)
    assert not any(".adaptation" in path for path, _ in model.named_modules())


@pytest.mark.parametrize("form", ["gpt2", "bert", "llama", "untyped"])
def test_all_biases_are_saved_and_loaded(device, form, tmp_path):
    def fresh():
        model = made("gpt2" if form == "untyped" else form, "float32")
        model.cfg.model_type = None if form == "untyped" else model.cfg.model_type
        return model

    model = fresh()
    add_adapter(model, LoraConfig(r=2, target_modules=["o_proj", "up_proj"], bias="all", lora_bias=True))
    shake(model)
    save_adapter(model, tmp_path)
    again = fresh()
    load_adapter(again, tmp_path)
    assert_array_equal(run(again), run(model))
    assert adapters_of(again).keys() == adapters_of(model).keys()
    assert {path.rpartition(".")[2] for path in adapters_of(model)} >= ({"o_proj"} if form == "llama" else {"mlp_norm"})


def test_the_bias_of_b_is_scaled_and_its_dropout_is_the_branchs():
    """y = W x + b + s (B A x + c): with B = 0 the whole change is s·c, which dropout leaves alone."""
    model = build("gpt2")
    add_adapter(model, LoraConfig(r=2, lora_alpha=6, target_modules=["up_proj"], lora_bias=True, lora_dropout=0.5))
    layer, adapter = model.layers[0].mlp.up_proj, adapters_of(model)["layers.0.mlp.up_proj"]       # its B starts at 0
    adapter.lora_B_bias.data[...] = np.arange(12.0)
    x = tensor(np.random.default_rng(0).standard_normal((2, 3, 8)))
    expected = x.data @ layer.weight.data.T + layer.bias.data + 3.0 * np.arange(12.0)
    for training in True, False:
        model.train(training)
        assert_allclose(layer(x).data, expected, rtol=1e-13, atol=1e-13)
        assert_allclose(adapter.forward(x, layer).data, expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize(("make", "message"), [
    (lambda: LoraConfig(bias="q_only"), "bias = 'q_only'"), (lambda: LoraConfig(lora_bias="yes"), "lora_bias = 'yes'"),
    (lambda: LoraConfig(bias="all", use_dora=True), "use_dora goes without biases"),
    (lambda: LoraConfig(lora_bias=True, init_lora_weights="pissa"), "without use_dora and biases"),
    (lambda: LoraFAConfig(bias="all"), "only plain LoRA has biases"), (lambda: SoRAConfig(lora_bias=True), "only plain LoRA"),
    (lambda: AdaLoraConfig(bias="lora_only", total_step=9), "only plain LoRA")])
def test_a_config_that_has_no_biases_says_so(make, message):
    with pytest.raises(ValueError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_a_table_has_no_bias_of_b():
    model = build("gpt2")
    with pytest.raises(ValueError, match="lora_bias on embed"):
        add_adapter(model, LoraConfig(r=2, target_modules=["embed"], lora_bias=True))
    assert not model.adapter_configs


def test_a_strength_is_not_saved(tmp_path):
    model = build("gpt2")
    add_adapter(model, LoraConfig(r=2, bias="all"))
    set_scale(model, "default", 0.5)
    with pytest.raises(ValueError, match="strength other than 1"):
        save_adapter(model, tmp_path)
