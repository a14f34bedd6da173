"""TransformerConfig: everything that tells one Transformer from another, in one checked dataclass."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

CHOICES = {
    "norm": ("layernorm", "rmsnorm"),
    "position": ("learned", "rope"),
    "mlp": ("gelu", "gelu_tanh", "swiglu"),
    "head": ("lm", "sequence", "token", "none"),
    "pooler": ("none", "tanh", "relu"),
}

ROPE_SCALINGS: dict[Any, set[str]] = {
    "linear": {"rope_type", "factor"},
    "llama3": {"rope_type", "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
}


@dataclass(kw_only=True)
class TransformerConfig:
    """The shape of a Transformer. Three classics are one call away: `gpt2`, `bert` and `llama`.

    vocab_size V; d_model D; n_layers L; n_heads H; n_kv_heads key and value heads shared by the H query heads (default H);
    head_dim width of a head (default D/H); d_ff width of the MLP (default 4 D); max_len longest sequence; causal: position t
    sees only positions up to t.
    norm, norm_first (norm before each sub-layer, as in GPT-2 and Llama, or after it, as in BERT), norm_eps.
    position: "learned" table, or "rope" rotation with base rope_theta. position_offset: rows of the table before that of the
    first position (RoBERTa: 2; padding, whose id is offset - 1, takes the last of them). rope_scaling: None, or "rope_type"
    "linear" with its "factor", or "llama3" with its four numbers, named as in Hugging Face's config. mlp: kind of the
    feed-forward layer. bias: biases on the linear layers (default: with layernorm yes, with rmsnorm no); qkv_bias: on q, k
    and v, o_bias: on o (default: bias).
    tie_embeddings: the head uses the embedding table. dropout p: after the embeddings and on each sub-layer's output.
    n_token_types: size of BERT's token-type table, 0 for none. head: "lm" logits (B, T, V); "sequence" (B, n_labels), from
    the first position through a tanh layer if not causal (BERT), else from the last one that is not padding; "token"
    (B, T, n_labels); "none": the hidden states (B, T, D). With n_labels given, head defaults to "sequence". pooler: what
    follows the layer on the first position that stands before the classifier, or "none" for no such layer (default: "tanh"
    for the head "sequence" if not causal). model_type: the name of the Hugging Face architecture whose file names belong to
    this model ("gpt2", "bert", "roberta", "distilbert", "llama", "mistral", "qwen2"), or None.

    Raises ValueError, naming the field, for values that do not fit.
    """

    vocab_size: int
    d_model: int
    n_layers: int
    n_heads: int
    n_kv_heads: Any = None                   # Any: None may be given, __post_init__ puts a whole number in its place
    head_dim: Any = None
    d_ff: Any = None
    max_len: int = 1024
    causal: bool = True
    norm: str = "layernorm"
    norm_first: bool = True
    norm_eps: float = 1e-5
    position: str = "learned"
    position_offset: int = 0
    rope_theta: float = 10000.0
    rope_scaling: dict[str, Any] | None = None
    mlp: str = "gelu_tanh"
    bias: Any = None                         # likewise True or False
    qkv_bias: Any = None
    o_bias: Any = None
    tie_embeddings: bool = True
    dropout: float = 0.0
    n_token_types: int = 0
    head: Any = None                         # likewise a name
    n_labels: int | None = None
    pooler: Any = None
    model_type: str | None = None

    def __post_init__(self) -> None:
        self.n_kv_heads = self.n_heads if self.n_kv_heads is None else self.n_kv_heads
        self.d_ff = 4 * self.d_model if self.d_ff is None else self.d_ff
        self.bias = self.norm == "layernorm" if self.bias is None else self.bias
        self.qkv_bias = self.bias if self.qkv_bias is None else self.qkv_bias
        self.o_bias = self.bias if self.o_bias is None else self.o_bias
        self.head = self.head or ("lm" if self.n_labels is None else "sequence")
        self.pooler = self.pooler or ("tanh" if self.head == "sequence" and not self.causal else "none")
        for name in ("vocab_size", "d_model", "n_layers", "n_heads", "n_kv_heads", "d_ff", "max_len"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"TransformerConfig.{name} = {value!r}: expected a whole number of at least 1")
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"TransformerConfig.{name} = {getattr(self, name)!r}: expected one of {', '.join(allowed)}")
        if self.head_dim is None and self.d_model % self.n_heads:
            raise ValueError(f"TransformerConfig: d_model {self.d_model} is not a multiple of n_heads {self.n_heads}")
        self.head_dim = self.d_model // self.n_heads if self.head_dim is None else self.head_dim
        for name, least in (("head_dim", 1), ("position_offset", 0)):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < least:
                raise ValueError(f"TransformerConfig.{name} = {getattr(self, name)!r}: expected a whole number of at least "
                                 f"{least}")
        if self.rope_scaling is not None and set(self.rope_scaling) != ROPE_SCALINGS.get(self.rope_scaling.get("rope_type")):
            raise ValueError(f"TransformerConfig.rope_scaling = {self.rope_scaling!r}: expected None or one of "
                             + ", ".join(f"{kind} with {', '.join(sorted(keys))}" for kind, keys in ROPE_SCALINGS.items()))
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"TransformerConfig: n_heads {self.n_heads} is not a multiple of n_kv_heads {self.n_kv_heads}")
        if self.position == "rope" and self.head_dim % 2:
            raise ValueError(f"TransformerConfig: rope needs an even head width, got head_dim = {self.head_dim}")
        if self.head in ("sequence", "token") and not self.n_labels:
            raise ValueError(f"TransformerConfig: head {self.head!r} needs n_labels, got {self.n_labels}")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"TransformerConfig.dropout = {self.dropout}: expected 0 <= p < 1")

    def to_dict(self) -> dict[str, Any]:
        """All fields, ready for JSON."""
        return asdict(self)

    @classmethod
    def gpt2(cls, **fields: Any) -> TransformerConfig:
        """GPT-2 (Radford et al. 2019): learned positions, norm first, tanh-GELU, tied head."""
        return cls(**{"mlp": "gelu_tanh", "model_type": "gpt2"} | fields)

    @classmethod
    def bert(cls, **fields: Any) -> TransformerConfig:
        """BERT (Devlin et al. 2018): bidirectional, norm after, token types, exact GELU."""
        form: dict[str, Any] = {"model_type": "bert", "causal": False, "norm_first": False, "norm_eps": 1e-12, "mlp": "gelu",
                                "n_token_types": 2, "max_len": 512}
        return cls(**form | fields)

    @classmethod
    def llama(cls, **fields: Any) -> TransformerConfig:
        """Llama (Touvron et al. 2023): rotary positions, RMSNorm, SwiGLU, no biases."""
        form: dict[str, Any] = {"model_type": "llama", "norm": "rmsnorm", "norm_eps": 1e-6, "position": "rope", "mlp": "swiglu",
                                "tie_embeddings": False}
        return cls(**form | fields)
