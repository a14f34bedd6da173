"""Every method that PEFT has, against PEFT: the same outputs, gradients and twenty steps of training, and files both ways.

Our adapter, every number random, is saved; PEFT loads the folder as a trainable adapter. So each comparison starts from files.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
from parity_twins import TASKS, close, logits_of, peft, torch, twins
from safetensors.numpy import load_file

import minilora as ml
from minilora.backend import to_host
from minilora.lora import adapters_of, add_adapter, merge_adapter
from minilora.lora.files import load_adapter, save_adapter
from minilora.methods.files import leaves_of
from minilora.nn.names import file_names
from minilora.training import AdamW

optimizers = pytest.importorskip("peft.optimizers")
LORA = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight"}
PEFT_TARGETS = {"gpt2": ["c_attn", "c_fc"], "llama": ["q_proj", "v_proj", "down_proj"], "bert": ["query", "intermediate.dense"]}


def options(**fields):
    return lambda form: {"target_modules": PEFT_TARGETS[form]} | fields


CASES = {                                                  # name -> (our config, PEFT's, options of both)
    "rslora": (ml.LoraConfig, peft.LoraConfig, options(r=4, lora_alpha=3, use_rslora=True)),
    "dora": (ml.LoraConfig, peft.LoraConfig, options(r=3, lora_alpha=5, use_dora=True)),
    "dora-rslora": (ml.LoraConfig, peft.LoraConfig, options(r=3, lora_alpha=5, use_dora=True, use_rslora=True,
                                                            rank_pattern={"c_fc": 2, "v_proj": 1, "query": 2})),
    "ia3": (ml.IA3Config, peft.IA3Config, lambda form: {}),
    "vera": (ml.VeraConfig, peft.VeraConfig, options(r=5)),
    "loha": (ml.LoHaConfig, peft.LoHaConfig, options(r=2, alpha=3)),
    "loha-patterns": (ml.LoHaConfig, peft.LoHaConfig, options(r=2, alpha=3, rank_pattern={"c_fc": 3, "v_proj": 1, "query": 4},
                                                              alpha_pattern={"c_attn": 5, "down_proj": 7})),
    "lokr": (ml.LoKrConfig, peft.LoKrConfig, options(r=2, alpha=3)),
    "lokr-both": (ml.LoKrConfig, peft.LoKrConfig, options(r=1, alpha=3, decompose_both=True, init_weights="lycoris")),
    "lokr-factor": (ml.LoKrConfig, peft.LoKrConfig, options(r=8, alpha=2, decompose_factor=8)),
    "adalora": (ml.AdaLoraConfig, peft.AdaLoraConfig, options(init_r=4, target_r=2, lora_alpha=3, total_step=10)),
    "ia3-chosen": (ml.IA3Config, peft.IA3Config, lambda form: {
        "target_modules": PEFT_TARGETS[form], "feedforward_modules": PEFT_TARGETS[form][1:]}),
}
FORMS = {"gpt2": {}, "llama": {}, "bert": {"n_labels": 3}}
cases = pytest.mark.parametrize("name", CASES)
forms = pytest.mark.parametrize("form", FORMS)
pytestmark = [
    pytest.mark.filterwarnings("ignore:The following .*_pattern keys did not match any targeted module:RuntimeWarning"),
]


def by_key(model):
    """The key in the files -> our Parameter."""
    files = file_names(model.cfg)
    own = {}
    for path, adapter in adapters_of(model).items():
        leaves = leaves_of(adapter) if not hasattr(adapter, "lora_A") or hasattr(adapter, "leaves") else \
            {leaf: getattr(adapter, name) for name, leaf in LORA.items()}
        own |= {f"base_model.model.{files[path]}.{leaf}": p for leaf, p in leaves.items()}
    return own


def their_parameters(wrapped):
    """The key in the files -> PEFT's trainable parameter."""
    named = {name.replace(".modules_to_save.default", "").replace(".default", ""): p for name, p in wrapped.named_parameters()
             if p.requires_grad and "ranknum" not in name}
    return {name.replace("lora_magnitude_vector.weight", "lora_magnitude_vector"): p for name, p in named.items()}


def adapted_twins(name, form, tmp_path, rng):
    """(ours, theirs) with one adapter, taken over by PEFT from our files."""
    ours, theirs = twins(form, **FORMS[form])
    config, _, fields = CASES[name]
    add_adapter(ours, config(**fields(form)))
    for p in by_key(ours).values():
        p.data += rng.standard_normal(p.shape) * 0.2
    save_adapter(ours, tmp_path)
    wrapped = peft.PeftModel.from_pretrained(theirs, tmp_path, is_trainable=True).eval()
    if name == "vera":                                     # now d is in the file's units, those of PEFT
        ml.delete_adapter(ours, "default")
        load_adapter(ours, tmp_path)
    return ours, wrapped


def compare_steps(ours, wrapped, mine, other, own, their, rng):
    """Twenty steps on both sides: the same losses, and the same parameters at the end."""
    for step in range(20):
        ids = rng.integers(1, ours.cfg.vocab_size, (4, 8))
        labels = rng.integers(0, 3, (4, 8) if ours.cfg.head == "lm" else (4,))
        mine.zero_grad()
        other.zero_grad()
        loss, logits = ml.cross_entropy(ours(ids), labels), logits_of(wrapped, ids)
        expected = torch.nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), torch.from_numpy(labels).reshape(-1))
        loss.backward()
        expected.backward()
        mine.step()
        other.step()
        assert float(to_host(loss)) == pytest.approx(float(expected.detach()), rel=1e-8), f"step {step}"
    for key, p in own.items():
        close(p.data, their[key].detach().numpy(), 1e-6, key)


def skip_conv1d(name, form):
    if form == "gpt2" and name.startswith(("loha", "lokr")):
        pytest.skip("PEFT has no LoHa and LoKr for Conv1D")


@cases
@forms
def test_forward_gradients_merge_and_20_steps(name, form, tmp_path, rng):
    skip_conv1d(name, form)
    ours, wrapped = adapted_twins(name, form, tmp_path, rng)
    ids = rng.integers(1, ours.cfg.vocab_size, (2, 7))
    mine, other = ours(ids), logits_of(wrapped, ids)
    close(mine.data, other.detach().numpy(), 1e-10, "logits")
    cotangent = rng.standard_normal(mine.shape)
    mine.backward(cotangent)
    other.backward(torch.from_numpy(cotangent))
    own, their = by_key(ours), their_parameters(wrapped)
    assert own.keys() == their.keys()
    for key, p in own.items():
        close(p.grad, their[key].grad.numpy(), 1e-9, key)

    merge_adapter(ours)
    close(ours(ids).data, mine.data, 1e-10, "logits after merging")
    ml.unmerge_adapter(ours)

    compare_steps(ours, wrapped, AdamW(own.values(), lr=3e-3), torch.optim.AdamW(their.values(), lr=3e-3), own, their, rng)


@cases
@forms
def test_saved_by_peft_it_loads_here(name, form, tmp_path, rng):
    skip_conv1d(name, form)
    ours, theirs = twins(form, **FORMS[form])
    _, config, fields = CASES[name]
    extra = {} if form != "gpt2" else {"fan_in_fan_out": True}
    wrapped = peft.get_peft_model(theirs, config(**fields(form), **extra, task_type=TASKS[ours.cfg.head])).eval()
    with torch.no_grad():
        for p in their_parameters(wrapped).values():
            p += torch.from_numpy(rng.standard_normal(p.shape) * 0.2)
    wrapped.save_pretrained(tmp_path)
    load_adapter(ours, tmp_path)
    ids = rng.integers(1, ours.cfg.vocab_size, (2, 7))
    close(ours(ids).data, logits_of(wrapped, ids).detach().numpy(), 1e-10)

    save_adapter(ours, tmp_path / "again")                 # the same tensors, and no key of the config that PEFT does not know

    first, second = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path, tmp_path / "again"))
    assert first.keys() == second.keys()
    assert all(np.array_equal(first[key], second[key]) for key in first)
    written, read = (json.loads((folder / "adapter_config.json").read_text()) for folder in (tmp_path / "again", tmp_path))
    assert written.keys() <= read.keys()
    assert written["peft_type"] == read["peft_type"]


@cases
def test_a_new_adapter_starts_as_pefts_does(name, rng):
    """Both start as the base; parameters that are not random are equal."""
    ours, theirs = twins("llama")
    config, their_config, fields = CASES[name]
    add_adapter(ours, config(**fields("llama")))
    wrapped = peft.get_peft_model(theirs, their_config(**fields("llama"), task_type="CAUSAL_LM")).eval()
    their = their_parameters(wrapped)
    for key, p in by_key(ours).items():
        assert p.shape == tuple(their[key].shape)
        if name == "lokr-both" and "lokr_w1" in key:       # PEFT leaves these without values: "lycoris" with decompose_both
            continue
        if key.endswith("magnitude_vector") or not their[key].detach().std() > 0:
            np.testing.assert_allclose(p.data, their[key].detach().numpy(), rtol=1e-6, atol=1e-7)
        elif p.size >= 20:
            assert 0.3 < p.data.std() / float(their[key].detach().std()) < 3.0, key


# --- starts that take a part of W: there the base of PEFT changes, ours does not ------------------------


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_8", "olora"])
def test_residual_starts_and_20_steps(init, tmp_path, rng):
    """PEFT's own start in float32, then its training in float64 from our factors on the base that it changed; then its file."""
    fields = {"r": 3, "lora_alpha": 6, "init_lora_weights": init, "target_modules": PEFT_TARGETS["llama"]}
    ours, theirs = twins("llama", "float32")
    before = {key: p.detach().clone() for key, p in theirs.named_parameters()}
    add_adapter(ours, ml.LoraConfig(**fields))
    wrapped = peft.get_peft_model(theirs, peft.LoraConfig(**fields))
    files = file_names(ours.cfg)
    for path, adapter in adapters_of(ours).items():
        layer = wrapped.get_submodule(f"base_model.model.{files[path]}")
        taken = before[f"{files[path]}.weight"] - layer.base_layer.weight.detach()
        part, W = adapter.base_scale * adapter.B0 @ adapter.A0, before[f"{files[path]}.weight"].numpy()
        if "niter" in init:                                # random on both sides; ours draws more directions than it keeps
            assert np.linalg.norm(W - part) <= np.linalg.norm(W - taken.numpy()) * (1 + 1e-6)
        else:
            close(part, taken.numpy(), 2e-5, path)

    ours, theirs = twins("llama")
    add_adapter(ours, ml.LoraConfig(**fields))
    wrapped = peft.get_peft_model(theirs, peft.LoraConfig(**fields | {"init_lora_weights": True}))
    own, their = by_key(ours), their_parameters(wrapped)
    with torch.no_grad():
        for path, adapter in adapters_of(ours).items():
            layer = wrapped.get_submodule(f"base_model.model.{files[path]}")
            layer.base_layer.weight -= torch.from_numpy(adapter.base_scale * adapter.B0 @ adapter.A0)
        for key, p in own.items():
            their[key].copy_(torch.from_numpy(p.data))
    compare_steps(ours, wrapped, AdamW(own.values(), lr=3e-3), torch.optim.AdamW(their.values(), lr=3e-3), own, their, rng)
    ids = rng.integers(1, ours.cfg.vocab_size, (2, 7))
    save_adapter(ours, tmp_path)                           # a plain LoRA of rank 2r on the base as it was
    again = peft.PeftModel.from_pretrained(twins("llama")[1], tmp_path).eval()
    close(logits_of(again, ids).detach().numpy(), ours(ids).data, 1e-10)
    close(logits_of(wrapped, ids).detach().numpy(), ours(ids).data, 1e-6)


# --- optimisers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["llama", "gpt2"])
def test_loraplus_20_steps(form, tmp_path, rng):
    ours, wrapped = adapted_twins("dora", form, tmp_path, rng)
    own, their = by_key(ours), their_parameters(wrapped)
    mine = AdamW(ml.loraplus_groups(ours, 1e-3, 16.0, loraplus_weight_decay=0.1), lr=1e-3, eps=1e-6)
    other = optimizers.create_loraplus_optimizer(wrapped, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16.0, eps=1e-6,
                                      loraplus_weight_decay=0.1)
    compare_steps(ours, wrapped, mine, other, own, their, rng)


def test_lora_fa_20_steps(tmp_path, rng):
    ours, theirs = twins("llama")
    fields = {"r": 3, "lora_alpha": 6, "target_modules": PEFT_TARGETS["llama"], "rank_pattern": {"v_proj": 2}}
    add_adapter(ours, ml.LoraFAConfig(**fields))
    for p in by_key(ours).values():
        p.data += rng.standard_normal(p.shape) * 0.2
    save_adapter(ours, tmp_path)
    wrapped = peft.PeftModel.from_pretrained(theirs, tmp_path, is_trainable=True).eval()
    other = optimizers.create_lorafa_optimizer(wrapped, r=3, lora_alpha=6, lr=1e-3)
    own, their = by_key(ours), their_parameters(wrapped)
    own = {key: p for key, p in own.items() if p.requires_grad}
    assert own.keys() == their.keys() and all(key.endswith("lora_B.weight") for key in own)
    for group in other.param_groups:                       # its ε is not divided by the bias correction, so make it small
        group["eps"] = 1e-12
    compare_steps(ours, wrapped, ml.LoRAFAdamW(ours, 1e-3, eps=1e-12), other, own, their, rng)


# --- AdaLoRA's budget -----------------------------------------------------------------------------------


@pytest.mark.filterwarnings(r"ignore:Adapter 'default'. \d+ LoRA tensor.s. have invalid shape")         # of rank 0
@pytest.mark.parametrize(("tinit", "tfinal", "deltaT"), [(3, 5, 2), (0, 4, 1), (2, 3, 5)])
def test_adalora_chooses_the_same_triplets_and_trains_alike(tinit, tfinal, deltaT, tmp_path, rng):
    """Budget, importance, penalty and masks over a whole run; then PEFT's file, which is cut to the triplets that are on."""
    fields = {"init_r": 4, "target_r": 2, "lora_alpha": 3, "total_step": 20, "tinit": tinit, "tfinal": tfinal, "deltaT": deltaT,
              "target_modules": PEFT_TARGETS["llama"]}
    ours, theirs = twins("llama")
    add_adapter(ours, ml.AdaLoraConfig(**fields))
    for p in by_key(ours).values():
        p.data += rng.standard_normal(p.shape) * 0.2
    save_adapter(ours, tmp_path)
    wrapped = peft.PeftModel.from_pretrained(theirs, tmp_path, is_trainable=True)
    own, their, allocator = by_key(ours), their_parameters(wrapped), ml.RankAllocator(ours)
    mine, other = AdamW(own.values(), lr=3e-3), torch.optim.AdamW(their.values(), lr=3e-3)
    for step in range(1, 21):
        ids = rng.integers(1, ours.cfg.vocab_size, (4, 8))
        mine.zero_grad()
        other.zero_grad()
        loss = ours.loss(ids[:, :-1], ids[:, 1:]) + allocator.penalty()
        shifted = torch.from_numpy(ids)
        inputs, targets = shifted[:, :-1], shifted[:, 1:].contiguous()
        expected = torch.nn.functional.cross_entropy(wrapped(input_ids=inputs).logits.reshape(-1, ours.cfg.vocab_size),
                                                     targets.reshape(-1))
        grams = [p @ p.T if "lora_A" in key else p.T @ p for key, p in their.items() if "lora_E" not in key]
        expected = expected + 0.5 * sum(torch.norm(gram - torch.eye(len(gram))) for gram in grams) / len(grams)
        if step == 1:                                      # PEFT's own loss has these two terms, the first in float32
            whole = wrapped(input_ids=inputs, labels=inputs, shift_labels=targets).loss
            assert float(expected.detach()) == pytest.approx(float(whole.detach()), rel=1e-6)
        loss.backward()
        expected.backward()
        mine.step()
        other.step()
        allocator.callback(step)
        wrapped.base_model.update_and_allocate(step)
        assert allocator.budget(step) == wrapped.base_model.rankallocator.budget_schedule(step)[0]
        assert float(to_host(loss)) == pytest.approx(float(expected.detach()), rel=1e-9), f"step {step}"
        for key, p in own.items():
            if key.endswith("lora_E"):
                np.testing.assert_array_equal(p.data != 0, their[key].detach().numpy() != 0, err_msg=f"{key}, step {step}")
    assert sum(allocator.ranks[-1][1].values()) == 2 * len(adapters_of(ours))
    for key, p in own.items():
        np.testing.assert_allclose(p.data, their[key].detach().numpy(), rtol=1e-6, atol=1e-7, err_msg=key)
    wrapped.save_pretrained(tmp_path / "cut")
    again, _ = twins("llama")
    load_adapter(again, tmp_path / "cut")
    close(again(ids).data, ours(ids).data, 1e-6)


@pytest.mark.filterwarnings("ignore:Specified to not save vera_A and vera_B:UserWarning")
def test_vera_without_its_projection_is_refused(tmp_path):
    ours, theirs = twins("llama", "float32")
    config = peft.VeraConfig(r=3, target_modules=["q_proj"], save_projection=False, task_type="CAUSAL_LM")
    peft.get_peft_model(theirs, config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="was saved without its projection"):
        load_adapter(ours, tmp_path)
    with pytest.raises(ValueError, match="another library's random numbers"):
        ml.VeraConfig(r=3, save_projection=False)
