"""Twins for the parity tests: one of our models and the transformers model with the same weights; one LoRA on both.

Importing this skips the test module if PyTorch, transformers or PEFT is missing.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open

from minilora.lora import adapters_of
from minilora.nn import Transformer, TransformerConfig
from minilora.nn.names import file_names, import_state

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

# name -> (form, fields): every head that both sides have.
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


def twin_config(form: str, **fields: Any) -> TransformerConfig:
    """A small config, no two of whose sizes are equal."""
    sizes = {"vocab_size": 37, "d_model": 24, "n_layers": 2, "n_heads": 6, "d_ff": 40, "max_len": 20}
    return getattr(TransformerConfig, form)(**sizes | ({"n_kv_heads": 2} if form == "llama" else {}) | fields)


def their_model(cfg: TransformerConfig, dtype: str, seed: int = 0) -> Any:
    """The transformers model with the shape of `cfg`; every parameter random, norms and biases too."""
    common = {"vocab_size": cfg.vocab_size, "num_labels": cfg.n_labels or 2, "pad_token_id": 0}
    if cfg.model_type == "gpt2":
        config = transformers.GPT2Config(n_embd=cfg.d_model, n_layer=cfg.n_layers, n_head=cfg.n_heads, n_inner=cfg.d_ff,
                                         n_positions=cfg.max_len, layer_norm_epsilon=cfg.norm_eps, resid_pdrop=cfg.dropout,
                                         embd_pdrop=cfg.dropout, attn_pdrop=cfg.dropout,
                                         tie_word_embeddings=cfg.tie_embeddings, **common)
        kinds = {"lm": "GPT2LMHeadModel", "sequence": "GPT2ForSequenceClassification"}
    elif cfg.model_type == "bert":
        config = transformers.BertConfig(hidden_size=cfg.d_model, num_hidden_layers=cfg.n_layers,
                                         num_attention_heads=cfg.n_heads, intermediate_size=cfg.d_ff,
                                         max_position_embeddings=cfg.max_len,
                                         layer_norm_eps=cfg.norm_eps, type_vocab_size=cfg.n_token_types,
                                         hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **common)
        kinds = {"sequence": "BertForSequenceClassification", "token": "BertForTokenClassification"}
    else:
        config = transformers.LlamaConfig(hidden_size=cfg.d_model, num_hidden_layers=cfg.n_layers,
                                          num_attention_heads=cfg.n_heads, num_key_value_heads=cfg.n_kv_heads,
                                          intermediate_size=cfg.d_ff, max_position_embeddings=cfg.max_len,
                                          rms_norm_eps=cfg.norm_eps, tie_word_embeddings=cfg.tie_embeddings,
                                          attention_bias=cfg.qkv_bias, mlp_bias=cfg.bias,
                                          rope_parameters={"rope_type": "default", "rope_theta": cfg.rope_theta}, **common)
        kinds = {"lm": "LlamaForCausalLM", "sequence": "LlamaForSequenceClassification",
                 "token": "LlamaForTokenClassification"}
    model = getattr(transformers, kinds[cfg.head])(config).to(getattr(torch, dtype)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            centre = 1.0 if p.ndim == 1 and name.endswith("weight") else 0.0
            p.copy_(centre + 0.2 * torch.randn(p.shape, generator=generator, dtype=torch.float64))
    if cfg.model_type == "llama" and dtype == "float64":
        without_float32(model, cfg)
    return model


def without_float32(model: Any, cfg: TransformerConfig) -> None:
    """transformers computes Llama's norms and angles in float32 even in a float64 model: 1e-7, where we compare to 1e-10."""
    def tables(x: Any, position_ids: Any) -> Any:
        frequencies = cfg.rope_theta ** (-torch.arange(0, cfg.head_dim, 2, dtype=torch.float64) / cfg.head_dim)
        angles = torch.cat(2 * [position_ids[..., None].double() * frequencies], dim=-1)
        return angles.cos(), angles.sin()

    model.model.rotary_emb.forward = tables
    for module in model.modules():
        if type(module).__name__ == "LlamaRMSNorm":
            module.forward = partial(torch.nn.functional.rms_norm, normalized_shape=(cfg.d_model,), weight=module.weight,
                                     eps=module.variance_epsilon)


def twins(form: str, dtype: str = "float64", **fields: Any) -> tuple[Transformer, Any]:
    """(ours, theirs): two models with the same random weights."""
    cfg = twin_config(form, **fields)
    theirs = their_model(cfg, dtype)
    ours = Transformer(cfg, dtype=dtype)
    ours.load_state_dict(import_state(cfg, {key: value.numpy() for key, value in theirs.state_dict().items()}))
    return ours.eval(), theirs


def opened_in_peft(theirs: Any, folder: Any, ids: np.ndarray) -> np.ndarray:
    """The logits of the transformers model under the adapter that PEFT reads from a folder."""
    return logits_of(peft.PeftModel.from_pretrained(theirs, folder).eval(), ids).detach().numpy()


def close(got: Any, expected: Any, tolerance: float, what: str = "values") -> None:
    """The largest difference is at most `tolerance` times the largest expected value."""
    got, expected = np.asarray(got), np.asarray(expected)
    assert got.shape == expected.shape, f"{what}: shape {got.shape}, expected {expected.shape}"
    size = abs(expected).max()
    assert size > 0, f"{what}: nothing to compare, all expected values are 0"
    error = abs(got - expected).max() / size
    assert error <= tolerance, f"{what}: relative error {error:.2e}, expected at most {tolerance:.0e}"


def random_options(form: str, i: int, rng: np.random.Generator) -> dict[str, Any]:
    """A LoRA config in PEFT's words: the i-th choice of targets, the rest drawn.

    The first pattern that matches counts, and PEFT's files sort them: unless they are sorted already, PEFT's adapters change
    their meaning when they are saved.
    """
    def pattern(draw: Any) -> dict[str, Any]:
        return {str(key): draw() for key in sorted(rng.permutation(PATTERNS[form])[: rng.integers(0, 4)])}

    targets = TARGETS[form][i]
    tables = isinstance(targets, list) and any("emb" in name or name.startswith("w") for name in targets)
    options = {
        "r": int(rng.integers(1, 3 if tables else 5)),     # BERT's table of token types has 2 rows
        "lora_alpha": float(rng.choice([1, 3, 8, 0.5])), "use_rslora": bool(rng.integers(2)),
        "rank_pattern": pattern(lambda: int(rng.integers(1, 6))), "alpha_pattern": pattern(lambda: float(rng.integers(1, 9))),
        "target_modules": targets,
    }
    if targets == "all-linear" and rng.random() < 0.5:
        options["exclude_modules"] = {"gpt2": ["c_proj"], "bert": ["key"], "llama": ["up_proj"]}[form]
    if isinstance(targets, list) and not tables and rng.random() < 0.3 and "." not in targets[0]:
        options["layers_to_transform"] = [1]
    return options


def in_peft(theirs, cfg, options, name="default"):
    """PEFT's model with an adapter of the same options."""
    options = options | {"fan_in_fan_out": cfg.model_type == "gpt2"}
    if cfg.head == "token" and options["target_modules"] == "all-linear":
        options["target_modules"] = ["query", "key", "value", "dense"]     # PEFT's choice includes the classifier, and fails
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


def randomise(parameters, rng):
    for p in parameters:
        p.data[...] = rng.standard_normal(p.shape) * 0.3


def randomised(ours, rng, name="default"):
    """Random values for all of an adapter of ours."""
    for adapter in adapters_of(ours, name).values():
        randomise([p for _, p in adapter.named_parameters()], rng)


def randomise_theirs(wrapped, rng):
    with torch.no_grad():
        for p in wrapped.parameters():
            if p.requires_grad:
                p.copy_(torch.from_numpy(rng.standard_normal(p.shape) * 0.3))


def keys_of(folder):
    with safe_open(folder / "adapter_model.safetensors", "np") as file:
        return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}, file.metadata()      # noqa: SIM118
