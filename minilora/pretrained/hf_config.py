"""config.json of a Hugging Face model and our TransformerConfig: one table of names per model type, read both ways.

What a config says beyond the table either changes nothing that we compute, or has a value that we do not have and is refused.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..nn import TransformerConfig

FORMS = {"gpt2": "gpt2", "bert": "bert", "roberta": "bert", "distilbert": "bert", "llama": "llama", "mistral": "llama",
         "qwen2": "llama"}                   # model type -> the constructor of TransformerConfig that has its form
OWN = "minilora"                             # the model type of our own mixed forms, whose config.json holds our fields

_BERT = {"vocab_size": "vocab_size", "d_model": "hidden_size", "n_layers": "num_hidden_layers",
         "n_heads": "num_attention_heads", "d_ff": "intermediate_size", "max_len": "max_position_embeddings",
         "norm_eps": "layer_norm_eps", "mlp": "hidden_act", "n_token_types": "type_vocab_size",
         "dropout": "hidden_dropout_prob"}
_LLAMA = {"vocab_size": "vocab_size", "d_model": "hidden_size", "n_layers": "num_hidden_layers",
          "n_heads": "num_attention_heads", "n_kv_heads": "num_key_value_heads", "head_dim": "head_dim",
          "d_ff": "intermediate_size", "max_len": "max_position_embeddings", "norm_eps": "rms_norm_eps", "mlp": "hidden_act",
          "tie_embeddings": "tie_word_embeddings"}
FIELDS = {                                   # our field -> the key in config.json
    "gpt2": {"vocab_size": "vocab_size", "d_model": "n_embd", "n_layers": "n_layer", "n_heads": "n_head", "d_ff": "n_inner",
             "max_len": "n_positions", "norm_eps": "layer_norm_epsilon", "mlp": "activation_function",
             "dropout": "resid_pdrop", "tie_embeddings": "tie_word_embeddings"},
    "bert": _BERT,
    "roberta": _BERT,
    "distilbert": {"vocab_size": "vocab_size", "d_model": "dim", "n_layers": "n_layers", "n_heads": "n_heads",
                   "d_ff": "hidden_dim", "max_len": "max_position_embeddings", "mlp": "activation", "dropout": "dropout"},
    "llama": _LLAMA | {"qkv_bias": "attention_bias", "o_bias": "attention_bias", "bias": "mlp_bias"},
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
}
FIXED: dict[str, dict[str, Any]] = {"distilbert": {"n_token_types": 0, "norm_eps": 1e-12}, "qwen2": {"qkv_bias": True}}
REQUIRED = ("vocab_size", "d_model", "n_layers", "n_heads", "d_ff", "max_len")       # but n_inner, which may be null
KINDS: dict[str, tuple[type, ...]] = {       # int for all others
    "norm_eps": (int, float), "dropout": (int, float), "mlp": (str,), "tie_embeddings": (bool,), "qkv_bias": (bool,),
    "o_bias": (bool,), "bias": (bool,)}
ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}
MUST_BE: dict[str, Any] = {                  # options that change the arithmetic: the one value that is ours, if they are given
    "is_decoder": False, "is_encoder_decoder": False, "add_cross_attention": False, "position_embedding_type": "absolute",
    "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "partial_rotary_factor": 1.0,
}
ENDINGS = {                                  # what the architecture's name ends with -> head
    "ForCausalLM": "lm", "LMHeadModel": "lm", "ForSequenceClassification": "sequence", "ForTokenClassification": "token",
    "ForMaskedLM": "none", "ForPreTraining": "none", "ForQuestionAnswering": "none", "ForNextSentencePrediction": "none",
    "ForMultipleChoice": "none", "Model": "none",
}
CLASSES = {"gpt2": "GPT2", "bert": "Bert", "roberta": "Roberta", "distilbert": "DistilBert", "llama": "Llama",
           "mistral": "Mistral", "qwen2": "Qwen2"}


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises FileNotFoundError without the file, ValueError for anything but an object in it."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error}): copy or download it again") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__}, expected a JSON object: is it the right file?")
    return value


def from_hf(found: dict[str, Any], where: Any, *, head: str | None = None, n_labels: int | None = None,
            dropout: float | None = None) -> TransformerConfig:
    """Our config of a model's config.json. head, n_labels and dropout replace what it says.

    A sliding window (Mistral) that is shorter than the positions becomes max_len: up to there it changes nothing.
    Raises ValueError, naming the key, for another architecture or an option that we do not have.
    """
    kind = found.get("model_type")
    if kind == OWN:
        given = {"head": head or ("sequence" if n_labels else None), "n_labels": n_labels, "dropout": dropout}
        return _own(found, {key: value for key, value in given.items() if value is not None}, where)
    if kind not in FORMS:
        raise ValueError(f"{where}: model_type is {kind!r}, expected one of {', '.join(FORMS)}: other architectures "
                         "cannot be loaded")
    for key, value in MUST_BE.items():
        if found.get(key, value) not in (value, None):
            raise ValueError(f"{where}: {key} = {found[key]!r}, expected {value!r}: minilora does not have this option")
    if found.get("quantization_config"):
        raise ValueError(f"{where}: quantization_config is given, expected plain weights: take the unquantised checkpoint, or "
                         "a GGUF file")
    fields: dict[str, Any] = {"model_type": kind} | FIXED.get(kind, {})
    for ours, key in FIELDS[kind].items():
        value = found.get(key)
        if value is None and ours in REQUIRED and key != "n_inner":
            raise ValueError(f"{where}: {key} is missing, expected a number: is it the whole config?")
        allowed = KINDS.get(ours, (int,))
        if value is not None and (not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed)):
            raise ValueError(f"{where}: {key} = {value!r}, expected {' or '.join(t.__name__ for t in allowed)}")
        if value is not None:
            fields[ours] = value
    fields["mlp"] = _activation(fields.get("mlp"), FORMS[kind], where)
    if FORMS[kind] == "llama":
        fields |= _rope(found, where)
        fields["max_len"] = min(fields["max_len"], _window(found, kind) or fields["max_len"])
    if kind == "roberta":
        fields["position_offset"] = _whole(found.get("pad_token_id", 1), "pad_token_id", where) + 1
        fields["max_len"] -= fields["position_offset"]
    fields |= _head(found, kind, head, n_labels, where)
    if dropout is not None:
        fields["dropout"] = dropout
    return _built(FORMS[kind], fields, where)


def to_hf(cfg: TransformerConfig, dtype: str) -> dict[str, Any]:
    """The config.json that transformers reads, for a model of one of its architectures; else our own fields, which we read.

    Raises ValueError for a form that the architecture named by cfg.model_type cannot have.
    """
    kind = cfg.model_type
    if kind is None:
        return {"model_type": OWN, "dtype": dtype} | {OWN: cfg.to_dict()}
    found = {key: getattr(cfg, ours) for ours, key in FIELDS[kind].items()}
    found |= {"model_type": kind, "dtype": dtype, "architectures": [_architecture(cfg, kind)],
              "tie_word_embeddings": cfg.tie_embeddings}
    if FORMS[kind] == "llama":
        rope = {"rope_theta": cfg.rope_theta}
        scaling = cfg.rope_scaling or {"rope_type": "default"}
        found |= rope | {"rope_scaling": cfg.rope_scaling, "rope_parameters": rope | scaling, "hidden_act": "silu"}
        found |= {"sliding_window": None} if kind == "mistral" else {}
    else:
        key = FIELDS[kind]["mlp"]
        found[key] = {"gelu": "gelu", "gelu_tanh": "gelu_new", "swiglu": "silu"}[cfg.mlp]
    if kind == "roberta":
        found |= {"max_position_embeddings": cfg.max_len + cfg.position_offset, "pad_token_id": cfg.position_offset - 1}
    if kind == "gpt2":
        found |= {"embd_pdrop": cfg.dropout, "attn_pdrop": 0.0}
    elif FORMS[kind] == "bert":
        found |= {"attention_dropout" if kind == "distilbert" else "attention_probs_dropout_prob": 0.0}
        found |= {"seq_classif_dropout": cfg.dropout} if kind == "distilbert" else {}
    if cfg.n_labels is not None:
        found |= {"id2label": {str(i): f"LABEL_{i}" for i in range(cfg.n_labels)},
                  "label2id": {f"LABEL_{i}": i for i in range(cfg.n_labels)}}
    again, own = from_hf(found, "config").to_dict(), cfg.to_dict()
    free = {"dropout"} | ({"pooler"} if cfg.head == "none" else set())             # they change no hidden state
    for odd in (name for name in own if again[name] != own[name] and name not in free):
        raise ValueError(f"{odd} = {own[odd]!r} is not a form of {kind} models, which have {again[odd]!r}: set "
                         "model.cfg.model_type = None to save it under minilora's own names")
    return found


def _own(found: dict[str, Any], given: dict[str, Any], where: Any) -> TransformerConfig:
    fields = found.get(OWN)
    if not isinstance(fields, dict):
        raise ValueError(f"{where}: {OWN} is {fields!r}, expected the fields of a TransformerConfig: save the model again")
    return _built(None, fields | given, where)


def _built(form: str | None, fields: dict[str, Any], where: Any) -> TransformerConfig:
    try:
        return (TransformerConfig if form is None else getattr(TransformerConfig, form))(**fields)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from None


def _activation(name: str | None, form: str, where: Any) -> str:
    expected = {"silu": "swiglu", "swish": "swiglu"} if form == "llama" else ACTIVATIONS
    default = {"llama": "silu", "gpt2": "gelu_new", "bert": "gelu"}[form]
    if (name or default) not in expected:
        raise ValueError(f"{where}: activation {name!r}, expected one of {', '.join(expected)}: minilora has no other here")
    return expected[name or default]


def _rope(found: dict[str, Any], where: Any) -> dict[str, Any]:
    """rope_theta and rope_scaling, from the older keys or from rope_parameters (transformers 5)."""
    scaling = found.get("rope_parameters") or found.get("rope_scaling") or {}
    if not isinstance(scaling, dict):
        raise ValueError(f"{where}: rope_parameters = {scaling!r}, expected an object")
    scaling = dict(scaling)
    theta = scaling.pop("rope_theta", None) or found.get("rope_theta") or 10000.0
    older = scaling.pop("type", "default")
    kind = scaling.get("rope_type", older)
    numbers = {key: value for key, value in scaling.items() if key != "rope_type" and value is not None}
    if numbers.pop("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(f"{where}: partial_rotary_factor is not 1, expected rotary positions on whole heads")
    for key, value in {"rope_theta": theta, **numbers}.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
            raise ValueError(f"{where}: {key} = {value!r}, expected a positive number")
    if kind in (None, "default"):
        return {"rope_theta": float(theta)}
    if kind not in ("linear", "llama3"):
        raise ValueError(f"{where}: rope scaling of kind {kind!r}, expected default, linear or llama3: minilora has no other")
    return {"rope_theta": float(theta), "rope_scaling": {"rope_type": kind, **numbers}}


def _window(found: dict[str, Any], kind: str) -> int | None:
    """The width of sliding-window attention, if there is any."""
    if kind == "mistral":
        return found.get("sliding_window", 4096)
    return found.get("sliding_window", 4096) if kind == "qwen2" and found.get("use_sliding_window") else None


def _head(found: dict[str, Any], kind: str, head: str | None, n_labels: int | None, where: Any) -> dict[str, Any]:
    """head, n_labels and pooler: what the caller asks for, else what the architecture's name says."""
    names = found.get("architectures")
    name = names[0] if isinstance(names, list) and names and isinstance(names[0], str) else None
    causal = FORMS[kind] != "bert"
    if head is None and n_labels is not None:
        head = "sequence"
    if head is None:
        fits = name is None or name.startswith(CLASSES[kind])
        ending = "ForCausalLM" if name is None and causal else next((e for e in ENDINGS if (name or "Model").endswith(e)), None)
        if not fits or ending is None or (causal and ENDINGS[ending] == "token") or (not causal and ENDINGS[ending] == "lm"):
            raise ValueError(f"{where}: architecture {name!r}, expected {CLASSES[kind]} and one of "
                             f"{', '.join(ENDINGS)}: say which head you want, as in load_pretrained(..., head=\"none\")")
        head = ENDINGS[ending]
    if head == "lm" and not causal:
        raise ValueError(f"head 'lm' for a {kind} model, expected 'none', 'sequence' or 'token': minilora has no head for "
                         "masked words")
    if head in ("sequence", "token"):
        labels = found.get("id2label")
        n_labels = n_labels or (len(labels) if isinstance(labels, dict) else found.get("num_labels", 2))
        n_labels = _whole(n_labels, "n_labels", where)
    else:
        n_labels = None
    first = kind in ("bert", "roberta") and head == "none"             # the bare model keeps the layer that it was trained with
    pooler = "tanh" if first else {"distilbert": "relu"}.get(kind) if head == "sequence" else None
    return {"head": head, "n_labels": n_labels, "pooler": pooler}


def _architecture(cfg: TransformerConfig, kind: str) -> str:
    """The class of transformers that is this model."""
    heads = {"lm": "LMHeadModel" if kind == "gpt2" else "ForCausalLM", "sequence": "ForSequenceClassification",
             "token": "ForTokenClassification", "none": "Model"}
    if cfg.head == ("token" if cfg.causal else "lm"):
        raise ValueError(f"a {kind} model with head {cfg.head!r} has no equal among transformers' classes: set "
                         "model.cfg.model_type = None to save it under minilora's own names")
    return CLASSES[kind] + heads[cfg.head]


def _whole(value: Any, key: str, where: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{where}: {key} = {value!r}, expected a whole number")
    return value
