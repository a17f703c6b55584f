"""config.json and specs: round trips, real configurations, and what is refused, in one line that names the field."""

from __future__ import annotations

from typing import Any

import pytest

from tests.hf.specs import BASE, FOLDED, HELD
from varprop import hf, presets
from varprop.errors import SpecError

MOE: dict[str, Any] = {"feed_forward": None, "n_experts": 4, "top_k": 2, "d_expert": 8}


@pytest.mark.parametrize("name", HELD)
def test_round_trip(name: str) -> None:
    spec = HELD[name]
    assert hf.folded_fields(spec) == ()
    config = hf.config_of(spec)
    assert config["model_type"] == name.split()[0]
    assert hf.spec_of(config).with_fields(init=spec.init) == spec


@pytest.mark.parametrize("name", FOLDED)
def test_round_trip_of_a_folded_spec(name: str) -> None:
    spec = FOLDED[name]
    plain = hf.plain_spec(spec)
    assert hf.folded_fields(spec) != ()
    assert hf.plain_spec(plain) == plain
    assert hf.spec_of(hf.config_of(spec)).with_fields(init=spec.init) == plain


@pytest.mark.parametrize("name", presets.names())
def test_every_preset_is_held(name: str) -> None:
    spec = presets.get(name)
    assert hf.spec_of(hf.config_of(spec)).with_fields(init=spec.init) == hf.plain_spec(spec)


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"placement": "post"}, "norm.placement='post' is held by no Hugging Face family; expected 'pre'"),
        ({"placement": "peri"}, "norm.placement='peri' is held"),
        ({"placement": "mix"}, "norm.placement='mix' is held"),
        ({"placement": "reordered"}, "norm.placement='reordered' is held by no .* family; expected 'pre'"),
        ({"norm.kind": "layer"}, "norm.kind='layer' is held by no Hugging Face family; expected 'rms'"),
        ({"norm.final": False}, "norm.final=False is held"),
        ({"skip_multiplier": 0.9}, r"skip_scale=0\.9 is held"),
        ({"block": "parallel"}, "block='parallel' is held"),
        ({"gated": False}, "feed_forward.gated=False is held"),
        ({"rope_theta": None}, "attention.rope_theta=None is held .* expected a rotary base"),
        ({"rope_fraction": 0.5}, r"attention.rope_fraction=0\.5 is held"),
        ({"logit_softcap": 2.0}, r"attention.logit_softcap=2\.0 is held"),
        ({"key_mask_density": 0.5}, r"attention.key_mask_density=0\.5 is held"),
        ({"pattern": "full"}, "attention.pattern='full' is held"),
        ({"attention": None}, "attention=None is held .* expected attention"),
        ({"feed_forward": None}, "feed_forward=None is held"),
        ({"output_bias": True}, r"attention.qkv_bias, output_bias=\(False, True\) is held"),
        (
            {"qk_norm": "head", "pattern": "window", "window": 2},
            "attention.pattern='window' is held .* qwen3, has",
        ),
        ({**MOE, "moe.router": "sigmoid"}, "moe.router='sigmoid' is held"),
        ({**MOE, "routing": "expert_choice"}, "moe.routing='expert_choice' is held"),
        ({**MOE, "n_shared_experts": 1, "qk_norm": "head"}, "moe.n_shared_experts=1 is held .* family, qwen3_moe, has"),
    ],
)
def test_a_spec_that_no_family_holds(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message) as caught:
        hf.config_of(BASE.with_fields(changes))
    assert "\n" not in str(caught.value)


def test_configurations_as_published() -> None:
    """Keys as in the released config.json files, with the keys that older ones leave out."""
    llama = {
        **{"model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32},
        **{"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "rope_theta": 500000.0},
        **{"rms_norm_eps": 1e-05, "hidden_act": "silu", "tie_word_embeddings": False, "rope_scaling": None},
    }
    assert hf.spec_of(llama).parameter_counts()["total"] == 8_030_261_248
    mixtral = {
        **{"model_type": "mixtral", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32},
        **{"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32000, "num_local_experts": 8},
        **{"num_experts_per_tok": 2, "rms_norm_eps": 1e-05, "rope_theta": 1000000.0, "sliding_window": None},
    }
    assert hf.spec_of(mixtral).parameter_counts()["total"] == 46_702_792_704
    olmoe = {
        **{"model_type": "olmoe", "hidden_size": 2048, "intermediate_size": 1024, "num_hidden_layers": 16},
        **{"num_attention_heads": 16, "num_key_value_heads": 16, "vocab_size": 50304, "num_experts": 64},
        **{"num_experts_per_tok": 8, "norm_topk_prob": False, "clip_qkv": None},
    }
    assert hf.spec_of(olmoe).parameter_counts()["total"] == 6_919_161_856
    qwen = {
        **{"model_type": "qwen2_moe", "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 24},
        **{"moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632, "num_experts": 60},
        **{"num_attention_heads": 16, "num_key_value_heads": 16, "vocab_size": 151936, "num_experts_per_tok": 4},
        **{"norm_topk_prob": False, "decoder_sparse_step": 1, "use_sliding_window": False, "sliding_window": 32768},
    }
    spec = hf.spec_of(qwen)
    assert spec.parameter_counts()["total"] == 14_315_784_192
    assert spec.moe is not None
    assert spec.moe.n_shared_experts == 4
    assert spec.attention is not None
    assert spec.attention.qkv_bias


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"model_type": "gpt2"}, "model_type='gpt2' is not known; expected one of llama"),
        ({"model_type": None}, "model_type=None is not known"),
        ({"auto_map": {"AutoModel": "x.y"}}, "auto_map=.* is remote code"),
        ({"quantization_config": {"bits": 4}}, "quantization_config=.* is given"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope_type='yarn' is a scaled RoPE"),
        ({"rope_parameters": {"rope_type": "llama3"}}, "rope_type='llama3' is a scaled RoPE"),
        ({"partial_rotary_factor": 0.5}, r"partial_rotary_factor=0\.5 is not held"),
        ({"use_sliding_window": True}, "use_sliding_window=True is a window by layer"),
        ({"clip_qkv": 8.0}, r"clip_qkv=8\.0 is given"),
        ({"hidden_act": "mish"}, "hidden_act='mish' is unknown"),
        ({"hidden_size": "wide"}, "config.json of a llama: d_model='wide' is a str"),
        ({"hidden_size": None}, "d_model"),
        ({"num_attention_heads": 0}, "n_heads"),
        ({"rope_theta": "x"}, "rope_theta='x' is not a number"),
        ({"rope_theta": []}, r"rope_theta=\[\] is not a number"),
        ({"rope_theta": 0}, "rope_theta=0"),
        ({"rope_parameters": {"rope_theta": 0}}, "rope_theta=0"),
        ({"num_key_value_heads": 0}, "n_kv_heads=0"),
        ({"num_hidden_layers": ...}, "num_hidden_layers is missing"),
    ],
)
def test_a_configuration_that_is_refused(changes: dict[str, Any], message: str) -> None:
    config = {**hf.config_of(BASE), **changes}
    config = {key: value for key, value in config.items() if value is not ...}
    with pytest.raises(SpecError, match=message) as caught:
        hf.spec_of(config)
    assert "\n" not in str(caught.value)


def test_dense_and_expert_layers_in_turn() -> None:
    config = hf.config_of(HELD["qwen2_moe pattern"])
    assert (config["mlp_only_layers"], config["decoder_sparse_step"]) == ([0, 2], 1)
    by_step = {**config, "mlp_only_layers": [], "decoder_sparse_step": 2}
    assert hf.spec_of(by_step) == hf.spec_of(config)
    with pytest.raises(SpecError, match=r"mlp_only_layers=.* is every layer"):
        hf.spec_of({**config, "mlp_only_layers": [0, 1, 2]})
    with pytest.raises(SpecError, match="shared_expert_intermediate_size=25 is no whole experts"):
        hf.spec_of({**config, "shared_expert_intermediate_size": 25})


@pytest.mark.parametrize("name", ["llama", "mixtral window", "qwen2_moe pattern", "qwen3_moe pattern"])
@pytest.mark.parametrize("value", [None, -1, 0, 2.5, "x", [], [1], {}, {"a": 1}, True, float("nan"), 10**30])
def test_any_value_of_any_key_is_a_spec_or_one_line(name: str, value: Any) -> None:
    config = hf.config_of(HELD[name]) | {"rope_scaling": None, "rope_parameters": None, "layer_types": None}
    messages = []
    for key in config:
        try:
            hf.spec_of({**config, key: value})
        except SpecError as error:
            messages.append(str(error))
    assert messages
    assert not any("\n" in message for message in messages)
