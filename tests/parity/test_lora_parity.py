"""LoRA against PEFT on the three forms: which modules, what scale, the same logits, gradients, merges and training."""

from __future__ import annotations

import numpy as np
import pytest

from minilora.autograd import cross_entropy
from minilora.backend import to_host
from minilora.lora import LoraConfig, adapters_of, add_adapter, merge_adapter, merge_and_unload, set_adapter, unmerge_adapter
from minilora.nn import Embedding
from minilora.nn.names import export_state, file_names
from minilora.training import AdamW

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

TASKS = {"lm": "CAUSAL_LM", "sequence": "SEQ_CLS", "token": "TOKEN_CLS"}
FORMS = {
    "gpt2": ("gpt2", {}),
    "gpt2-sequence": ("gpt2", {"n_labels": 3}),
    "bert-sequence": ("bert", {"n_labels": 3}),
    "bert-token": ("bert", {"n_labels": 5, "head": "token"}),
    "llama": ("llama", {}),
    "llama-tied": ("llama", {"tie_embeddings": True}),
    "llama-sequence": ("llama", {"n_labels": 3}),
}
TARGETS = {
    "gpt2": [None, "all-linear", ["c_attn"], ["attn.c_proj", "c_fc"], ["c_proj"], ["wte", "c_attn"], ["wpe"],
             r".*\.h\.1\.(attn\.c_attn|mlp\.c_fc)", r".*c_proj", ["transformer.h.0.mlp.c_fc"]],
    "bert": [None, "all-linear", ["query", "value"], ["dense"], ["output.dense"], ["word_embeddings", "key"],
             ["position_embeddings", "token_type_embeddings"], r"bert\.encoder\.layer\.0\..*\.(query|key|dense)"],
    "llama": [None, "all-linear", ["q_proj", "k_proj", "v_proj", "o_proj"], ["gate_proj", "up_proj", "down_proj"],
              ["embed_tokens", "v_proj"], ["mlp.up_proj"], r"model\.layers\.1\.self_attn\..*_proj"],
}
PATTERNS = {
    "gpt2": ["c_attn", "h.0.mlp.c_fc", r"^transformer.h.1.*", r"mlp\.c_proj", "wte"],
    "bert": ["query", "layer.1.attention.self.key", r".*layer\.0\..*", "output.dense", "word_embeddings"],
    "llama": ["q_proj", "layers.1.mlp.up_proj", r"^model.layers.0.*v_proj", "(k|o)_proj", "embed_tokens"],
}
CASES = [(name, i) for name, (form, _) in FORMS.items() for i in range(len(TARGETS[form]))]


def random_options(form, head, i, rng):
    """A config as a dict, in PEFT's words: the i-th choice of targets, the rest drawn."""
    def pattern(draw):
        keys = rng.permutation(PATTERNS[form])[: rng.integers(0, 4)]
        return {str(key): draw() for key in keys}
    targets = TARGETS[form][i]
    listed = isinstance(targets, list) and targets[0] not in ("wpe", "position_embeddings")
    only_one_layer = listed and "." not in targets[0] and not targets[0].startswith(("w", "e")) and rng.random() < 0.3
    small = targets is not None and "token_type_embeddings" in targets                 # a table of 2 rows
    return {
        "r": int(rng.integers(1, 3 if small else 5)), "lora_alpha": float(rng.choice([1, 3, 8, 0.5])), "use_rslora": bool(rng.integers(2)),
        "rank_pattern": pattern(lambda: int(rng.integers(1, 6))), "alpha_pattern": pattern(lambda: float(rng.integers(1, 9))),
        "target_modules": targets, "exclude_modules": [["c_proj"], ["key"], ["up_proj"]][list(TARGETS).index(form)]
        if targets == "all-linear" and rng.random() < 0.5 else None,
        "layers_to_transform": [1] if only_one_layer else None,
    }


def in_peft(theirs, cfg, options, name="default"):
    """PEFT's model with an adapter of the same options."""
    options = options | {"fan_in_fan_out": cfg.model_type == "gpt2"}
    if cfg.head == "token" and options["target_modules"] == "all-linear":
        options["target_modules"] = ["query", "key", "value", "dense"]     # PEFT's own choice includes the classifier, and fails
    config = peft.LoraConfig(**options, task_type=TASKS[cfg.head])
    if isinstance(theirs, peft.PeftModel):
        theirs.add_adapter(name, config)
        theirs.base_model.set_adapter(name)
        return theirs.eval()
    return peft.get_peft_model(theirs, config, name).eval()


def lora_layers(wrapped, name="default"):
    """The file's path -> PEFT's LoRA layer."""
    return {path.removeprefix("base_model.model."): module for path, module in wrapped.named_modules()
            if hasattr(module, "lora_A") and name in module.r}


def classifier_of(wrapped, name="default"):
    """PEFT's trained copy of the classifier, or None."""
    saved = [m.modules_to_save[name] for m in wrapped.modules() if hasattr(m, "modules_to_save") and name in m.modules_to_save]
    return saved[0] if saved else None


def their_factors(layer, name="default"):
    if name in layer.lora_embedding_A:
        return layer.lora_embedding_A[name], layer.lora_embedding_B[name]
    return layer.lora_A[name].weight, layer.lora_B[name].weight


def our_factors(adapter):
    return [p for _, p in adapter.named_parameters()]


def copy_adapter(ours, wrapped, name="default", rng=None):
    """Write our A and B (drawn first, if there is an rng) into PEFT's; both must have adapted the same modules alike."""
    files, adapters = file_names(ours.cfg), adapters_of(ours, name)
    layers = lora_layers(wrapped, name)
    assert {files[path] for path in adapters if path != "classifier"} == layers.keys()
    pairs = [(adapters[path], layers[files[path]]) for path in adapters if path != "classifier"]
    for adapter, layer in pairs:
        assert layer.r[name] == (adapter.lora_embedding_A if hasattr(adapter, "lora_embedding_A") else adapter.lora_A).shape[0]
        assert layer.scaling[name] == pytest.approx(adapter.scale, rel=1e-15)
    tensors = [pair for adapter, layer in pairs for pair in zip(our_factors(adapter), their_factors(layer, name), strict=True)]
    if "classifier" in adapters:
        theirs = classifier_of(wrapped, name)
        expected = [theirs.weight] + ([] if theirs.bias is None else [theirs.bias])
        tensors += zip(our_factors(adapters["classifier"]), expected, strict=True)
    for mine, other in tensors:
        if rng is not None:
            mine.data[...] = rng.standard_normal(mine.shape) * 0.3
        assert mine.shape == tuple(other.shape)
        with torch.no_grad():
            other.copy_(torch.from_numpy(mine.data.copy()))
    return tensors


def logits_of(theirs, ids, **extra):
    return theirs(input_ids=torch.from_numpy(ids), attention_mask=torch.ones(ids.shape, dtype=torch.int64), **extra).logits


@pytest.mark.filterwarnings("ignore:The following .*_pattern keys did not match any targeted module:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True` and a tied layer is part:UserWarning")
@pytest.mark.parametrize(("name", "i"), CASES)
def test_forward_gradients_and_merge(name, i, twins, close, rng):
    form, fields = FORMS[name]
    ours, theirs = twins(form, **fields)
    base = ours.state_dict()
    options = random_options(form, ours.cfg.head, i, np.random.default_rng(1000 * i + len(name)))
    add_adapter(ours, LoraConfig(**options))
    wrapped = in_peft(theirs, ours.cfg, options)
    tensors = copy_adapter(ours, wrapped, rng=rng)
    ids = rng.integers(1, ours.cfg.vocab_size, (2, 7))

    mine, other = ours(ids), logits_of(wrapped, ids)
    close(mine.data, other.detach().numpy(), 1e-10, "logits")
    cotangent = rng.standard_normal(mine.shape)
    mine.backward(cotangent)
    other.backward(torch.from_numpy(cotangent))
    assert sum(p.size for _, p in ours.named_parameters(trainable=True)) == sum(a.size for a, _ in tensors)
    for a, b in tensors:
        expected = b.grad.numpy()
        if abs(expected).max() < 1e-12:                    # the key's bias-like directions, or types that are all 0
            assert abs(a.grad).max() < 1e-12
        else:
            close(a.grad, expected, 1e-9, "gradient")
    assert all(p.grad is None for _, p in ours.named_parameters(trainable=False))

    merge_adapter(ours)
    close(ours(ids).data, mine.data, 1e-10, "logits after merging")
    unmerge_adapter(ours)
    for path, value in base.items():                       # bit for bit
        np.testing.assert_array_equal(ours.state_dict()[path], value)
    plain = merge_and_unload(ours)
    unloaded = wrapped.merge_and_unload()
    if not any(isinstance(layer, Embedding) for layer in (ours.embed,) if layer.adaptation) or not ours.cfg.tie_embeddings:
        expected = {key: p.detach().numpy() for key, p in unloaded.named_parameters()}
        merged = export_state(plain.cfg, plain.state_dict())
        assert merged.keys() == expected.keys()
        for key in expected:
            close(merged[key], expected[key], 1e-12, key)


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert-token"])
def test_two_adapters_add_up(name, twins, close, rng):
    form, fields = FORMS[name]
    ours, theirs = twins(form, **fields)
    first = {"r": 3, "lora_alpha": 5, "target_modules": TARGETS[form][2]}
    second = {"r": 2, "lora_alpha": 7, "use_rslora": True, "target_modules": "all-linear"}
    if ours.cfg.head != "lm":                              # two replaced classifiers do not add up in PEFT
        pytest.skip("PEFT uses one classifier at a time")
    add_adapter(ours, LoraConfig(**first), "first")
    add_adapter(ours, LoraConfig(**second), "second")
    wrapped = in_peft(theirs, ours.cfg, first, "first")
    wrapped = in_peft(wrapped, ours.cfg, second, "second")
    for adapter in ("first", "second"):
        copy_adapter(ours, wrapped, adapter, rng)
    ids = rng.integers(1, ours.cfg.vocab_size, (3, 5))
    set_adapter(ours, ["first", "second"])
    wrapped.base_model.set_adapter(["first", "second"])
    close(ours(ids).data, logits_of(wrapped, ids).detach().numpy(), 1e-10)
    rows = ["second", "__base__", "first"]                 # a mixed batch
    wrapped.eval()
    mixed = logits_of(wrapped, ids, adapter_names=rows).detach().numpy()
    close(ours(ids, adapter_names=rows).data, mixed, 1e-10)


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_training_20_steps(name, dtype, twins, close, rng):
    """The same 20 steps of AdamW from the same start: the same losses, and the same adapter at the end."""
    form, fields = FORMS[name]
    ours, theirs = twins(form, dtype, **fields)
    options = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}
    add_adapter(ours, LoraConfig(**options))
    wrapped = in_peft(theirs, ours.cfg, options)
    tensors = copy_adapter(ours, wrapped)                  # B = 0, the classifier the base's own
    mine = AdamW([p for _, p in ours.named_parameters(trainable=True)], lr=3e-3, weight_decay=0.05)
    other = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], lr=3e-3, weight_decay=0.05)
    losses = []
    for _ in range(20):
        ids = rng.integers(1, ours.cfg.vocab_size, (4, 8))
        labels = rng.integers(0, 3, {"lm": (4, 8), "token": (4, 8), "sequence": (4,)}[ours.cfg.head])
        mine.zero_grad()
        other.zero_grad()
        loss = cross_entropy(ours(ids), labels)
        logits = logits_of(wrapped, ids)
        expected = torch.nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), torch.from_numpy(labels).reshape(-1))
        loss.backward()
        expected.backward()
        mine.step()
        other.step()
        losses.append((float(to_host(loss)), float(expected.detach())))
    for step, (a, b) in enumerate(losses):
        assert a == pytest.approx(b, rel=1e-5 if dtype == "float32" else 1e-9), f"step {step}"
    if dtype == "float64":
        for a, b in tensors:
            close(a.data, b.detach().numpy(), 1e-6)
