"""What each family of Hugging Face's transformers holds, as tables: which specs fit it, its config keys, its names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Fields = Mapping[str, tuple[Any, ...]]
"""Field of a spec -> the values that are held."""
BIASES = "attention.qkv_bias, output_bias"
"""The two fields as one, a pair of booleans."""
ACTIVATIONS = {
    "silu": "silu",
    "gelu": "gelu",
    "gelu_tanh": "gelu_pytorch_tanh",
    "relu": "relu",
    "relu2": "relu2",
    "identity": "linear",
}
"""Our activations by their names in config.json."""
COMMON: Fields = {
    "block": ("sequential",),
    "window_pattern": ((),),
    "norm.kind": ("rms",),
    "norm.bias": (False,),
    "norm.final": (True,),
    "skip_scale": (1.0,),
    "attention.rope_fraction": (1.0,),
    "attention.logit_softcap": (None,),
    "attention.pattern": ("causal", "window"),
    "attention.n_sink_tokens": (0,),
    "attention.sink_logit": (False,),
    "attention.key_mask_density": (1.0,),
    "feed_forward.gated": (True,),
    "moe.gated": (True,),
    "moe.router": ("softmax",),
    "moe.gate_order": ("score_then_top_k",),
    "moe.router_bias": (False,),
    "moe.routing": ("token_choice",),
}
"""What all families hold, once the foldable fields are folded (`varprop.hf.fold`)."""


@dataclass(frozen=True)
class Key:
    """A key of config.json: the field it gives, and what its absence stands for (`REQUIRED`: an error)."""

    field: str
    default: Any


REQUIRED = object()
EVERY = {
    "hidden_size": Key("d_model", REQUIRED),
    "num_hidden_layers": Key("n_layers", REQUIRED),
    "vocab_size": Key("vocab_size", REQUIRED),
    "num_attention_heads": Key("attention.n_heads", REQUIRED),
    "tie_word_embeddings": Key("tied_embeddings", False),
}
_D_FF = {"intermediate_size": Key("feed_forward.d_ff", REQUIRED)}
_MLP_BIAS = {"mlp_bias": Key("feed_forward.bias", False)}
_WINDOW = {"sliding_window": Key("attention.window", None)}
_EXPERTS = {
    "num_experts": Key("moe.n_experts", REQUIRED),
    "num_experts_per_tok": Key("moe.top_k", REQUIRED),
    "norm_topk_prob": Key("moe.normalize_gates", False),
}

_OUTER = {"embed": "model.embed_tokens.weight", "final_norm.gain": "model.norm.weight", "unembed": "lm_head.weight"}
_LAYER = {
    "attention_norm.gain": "input_layernorm.weight",
    "mlp_norm.gain": "post_attention_layernorm.weight",
    **{f"attention.{name}": f"self_attn.{name}_proj.weight" for name in "qkvo"},
    **{f"attention.{name}_bias": f"self_attn.{name}_proj.bias" for name in "qkvo"},
    **{f"attention.{name}_norm.gain": f"self_attn.{name}_norm.weight" for name in "qk"},
    **{f"mlp.{name}": f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")},
    **{f"mlp.{name}_bias": f"mlp.{name}_proj.bias" for name in ("gate", "up", "down")},
    "moe.router": "mlp.gate.weight",
    **{f"moe.experts.{name}": f"mlp.experts.{{expert}}.{name}_proj.weight" for name in ("gate", "up", "down")},
    **{f"moe.shared.{name}": f"mlp.shared_expert.{name}_proj.weight" for name in ("gate", "up", "down")},
    "moe.shared_gate": "mlp.shared_expert_gate.weight",
}
_OLMO2_NAMES = {
    "attention_norm.gain": "post_attention_layernorm.weight",
    "mlp_norm.gain": "post_feedforward_layernorm.weight",
}
_MIXTRAL_NAMES = {
    "moe.router": "block_sparse_moe.gate.weight",
    "moe.experts.gate": "block_sparse_moe.experts.{expert}.w1.weight",
    "moe.experts.up": "block_sparse_moe.experts.{expert}.w3.weight",
    "moe.experts.down": "block_sparse_moe.experts.{expert}.w2.weight",
}


@dataclass(frozen=True)
class Family:
    """One `model_type` and the fields that it fixes, beyond `COMMON`.

    keys: of config.json, beyond `EVERY`. bias_key: the key that gives q, k, v (and o, where `fixed` has them equal) a
    bias; None = always as in `fixed`. defaults: of num_key_value_heads (None = as many as heads), rope_theta and
    rms_norm_eps. renamed: tensors of a layer that have other names than in most families.
    """

    model_type: str
    architecture: str
    fixed: Fields
    keys: Mapping[str, Key]
    bias_key: str | None = None
    kv_heads: int | None = None
    rope_theta: float = 10_000.0
    eps: float = 1e-6
    renamed: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_mixture(self) -> bool:
        """Whether layers have experts."""
        return "moe" not in self.fixed

    @property
    def is_mixed(self) -> bool:
        """Whether dense layers may stand among those with experts."""
        return self.is_mixture and "moe_pattern" not in self.fixed

    @property
    def has_shared_expert(self) -> bool:
        """Whether a mixture has a shared expert, of any width, 0 included."""
        return self.is_mixture and "moe.n_shared_experts" not in self.fixed

    def disk_name(self, name: str) -> str:
        """The name on disk of a tensor of the tensor table; with `{expert}` in it where there is one per expert."""
        if name in _OUTER:
            return _OUTER[name]
        _, layer, within = name.split(".", 2)
        return f"model.layers.{layer}.{self.renamed.get(within, _LAYER[within])}"


_NO_EXPERTS: Fields = {"moe": (None,)}
_ALL_EXPERTS: Fields = {"feed_forward": (None,), "moe_pattern": ((),)}
_NO_WINDOW: Fields = {"attention.pattern": ("causal",)}
_NO_MLP_BIAS: Fields = {"feed_forward.bias": (False,)}
_NO_SHARED: Fields = {"moe.n_shared_experts": (0,)}
_USUAL_HEAD: Fields = {"attention.head_dim": (None,)}
_NO_BIAS: Fields = {BIASES: ((False, False),)}
_EQUAL_BIASES: Fields = {BIASES: ((False, False), (True, True))}


def _norms(placement: str, qk_norm: str) -> Fields:
    return {"norm.placement": (placement,), "attention.qk_norm": (qk_norm,)}


FAMILIES = (
    Family(
        "llama",
        "LlamaForCausalLM",
        {**_norms("pre", "none"), **_NO_EXPERTS, **_EQUAL_BIASES, **_NO_WINDOW, "d_model % n_heads": (0,)},
        {**_D_FF, **_MLP_BIAS},
        bias_key="attention_bias",
    ),
    Family(
        "mistral",
        "MistralForCausalLM",
        {**_norms("pre", "none"), **_NO_EXPERTS, **_NO_BIAS, **_NO_MLP_BIAS},
        {**_D_FF, **_WINDOW},
        kv_heads=8,
    ),
    Family(
        "qwen2",
        "Qwen2ForCausalLM",
        {**_norms("pre", "none"), **_NO_EXPERTS, BIASES: ((True, False),), **_NO_MLP_BIAS, **_NO_WINDOW},
        _D_FF,
    ),
    Family(
        "qwen3",
        "Qwen3ForCausalLM",
        {**_norms("pre", "head"), **_NO_EXPERTS, **_EQUAL_BIASES, **_NO_MLP_BIAS, **_NO_WINDOW},
        _D_FF,
        bias_key="attention_bias",
    ),
    Family(
        "olmo2",
        "Olmo2ForCausalLM",
        {**_norms("reordered", "projection"), **_NO_EXPERTS, **_EQUAL_BIASES, **_NO_MLP_BIAS, **_NO_WINDOW},
        _D_FF,
        bias_key="attention_bias",
        eps=1e-5,
        renamed=_OLMO2_NAMES,
    ),
    Family(
        "olmoe",
        "OlmoeForCausalLM",
        {**_norms("pre", "projection"), **_ALL_EXPERTS, **_NO_SHARED, **_EQUAL_BIASES, **_USUAL_HEAD, **_NO_WINDOW},
        {**_EXPERTS, "intermediate_size": Key("moe.d_expert", REQUIRED)},
        bias_key="attention_bias",
        eps=1e-5,
    ),
    Family(
        "mixtral",
        "MixtralForCausalLM",
        {**_norms("pre", "none"), **_ALL_EXPERTS, **_NO_SHARED, **_NO_BIAS, "moe.normalize_gates": (True,)},
        {
            "num_local_experts": Key("moe.n_experts", REQUIRED),
            "num_experts_per_tok": Key("moe.top_k", REQUIRED),
            "intermediate_size": Key("moe.d_expert", REQUIRED),
            **_WINDOW,
        },
        kv_heads=8,
        rope_theta=1e6,
        eps=1e-5,
        renamed=_MIXTRAL_NAMES,
    ),
    Family(
        "qwen2_moe",
        "Qwen2MoeForCausalLM",
        {
            **_norms("pre", "none"),
            BIASES: ((False, False), (True, False)),
            **_NO_MLP_BIAS,
            **_USUAL_HEAD,
            **_NO_WINDOW,
        },
        {**_EXPERTS, "moe_intermediate_size": Key("moe.d_expert", REQUIRED)},
        bias_key="qkv_bias",
    ),
    Family(
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        {**_norms("pre", "head"), **_NO_SHARED, **_EQUAL_BIASES, **_NO_MLP_BIAS, **_NO_WINDOW},
        {**_EXPERTS, "moe_intermediate_size": Key("moe.d_expert", REQUIRED)},
        bias_key="attention_bias",
    ),
)
"""In the order in which they are tried."""
