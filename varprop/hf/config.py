"""`config_of`: the config.json of a spec. `spec_of`: the spec of a config.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from varprop.errors import SpecError, VarpropError, require
from varprop.hf.families import ACTIVATIONS, BIASES, COMMON, EVERY, FAMILIES, REQUIRED, Family, Fields, Key
from varprop.hf.fold import plain_spec
from varprop.spec import ModelSpec

MAX_POSITIONS = 2048
"""`max_position_embeddings` where none is given: evaluation programs cut longer texts there; the model has no limit."""

MOST_LAYERS = 10_000
"""Of a model with dense layers among those with experts, whose pattern is written out."""
ALIASES = {"num_experts": "num_local_experts", "num_local_experts": "num_experts"}
"""Versions of transformers write the one or the other."""


def family_of(spec: ModelSpec) -> Family:
    """The first family that holds `spec`, foldable fields folded; `SpecError` naming the field that none holds.

    >>> from varprop import presets
    >>> family_of(presets.tiny()).model_type, family_of(presets.tiny_moe()).model_type
    ('llama', 'mixtral')
    """
    plain = plain_spec(spec)
    facts = _facts(plain)
    for name, allowed in _wrong(facts, COMMON):
        raise _unheld(name, facts[name], allowed)
    kind = [family for family in FAMILIES if family.is_mixture == (plain.moe is not None)]
    faults = [(list(_wrong(facts, family.fixed)), family) for family in kind]
    # The nearest family has the norms of the spec and, of those, the fewest other fields that differ.
    fewest, family = min(faults, key=lambda fault: (sum("norm" in name for name, _ in fault[0]), len(fault[0])))
    if fewest:
        name, allowed = fewest[0]
        raise _unheld(name, facts[name], allowed, f" as the nearest family, {family.model_type}, has")
    return family


def _unheld(name: str, value: Any, allowed: Sequence[Any], note: str = "") -> SpecError:
    choices = " or ".join(map(repr, allowed))
    return SpecError(f"{name}={value!r} is held by no Hugging Face family; expected {choices}{note}")


def _wrong(facts: Mapping[str, Any], fixed: Fields) -> list[tuple[str, tuple[Any, ...]]]:
    """The fields whose value is not held; a field of an absent part has no say."""
    return [(name, allowed) for name, allowed in fixed.items() if name in facts and facts[name] not in allowed]


def _facts(spec: ModelSpec) -> dict[str, Any]:
    """Field -> value, parts that are there as `present`, and the few facts that join two fields.

    `SpecError` for what no family lacks or joins otherwise.
    """
    facts: dict[str, Any] = {}
    if spec.attention is None:
        raise SpecError("attention=None is held by no Hugging Face family; expected attention")
    if spec.attention.rope_theta is None:
        raise SpecError("attention.rope_theta=None is held by no Hugging Face family; expected a rotary base")
    if spec.feed_forward is None and spec.moe is None:
        raise SpecError("feed_forward=None is held by no Hugging Face family; expected feed_forward or moe")
    for name, value in spec.to_dict().items():
        present = isinstance(value, dict)
        facts[name] = "present" if present else tuple(value) if isinstance(value, list) else value
        facts |= {f"{name}.{leaf}": inner for leaf, inner in value.items()} if present else {}
    facts["skip_scale"] = spec.skip_scale
    facts[BIASES] = (spec.attention.qkv_bias, spec.attention.output_bias)
    facts["d_model % n_heads"] = spec.d_model % spec.attention.n_heads
    if spec.moe is not None and spec.feed_forward is not None:
        same = spec.moe.activation == spec.feed_forward.activation
        wrong = f"another than feed_forward.activation={spec.feed_forward.activation!r}"
        require(same, SpecError, "moe.activation", spec.moe.activation, wrong, "one for both in a Hugging Face model")
    return facts


def config_of(spec: ModelSpec, *, max_positions: int = MAX_POSITIONS) -> dict[str, Any]:
    """The config.json of the family that holds `spec`, for `AutoConfig`; its foldable fields are taken as folded.

    max_positions: `max_position_embeddings`, the length that evaluation programs cut texts at.
    Raises `SpecError`, naming the field, where no family holds the spec.

    >>> from varprop import presets
    >>> config = config_of(presets.tiny_gqa())
    >>> config["model_type"], config["num_attention_heads"], config["num_key_value_heads"]
    ('llama', 4, 1)
    """
    family, plain = family_of(spec), plain_spec(spec)
    facts = _facts(plain)
    attention, part = plain._attention(), plain.moe or plain.feed_forward
    assert part is not None
    config: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        **{key: facts[of.field] for key, of in {**EVERY, **family.keys}.items()},
        "num_key_value_heads": plain.n_kv_heads,
        "rope_theta": attention.rope_theta,
        "rms_norm_eps": plain.norm.eps,
        "hidden_act": ACTIVATIONS[part.activation],
        "max_position_embeddings": max_positions,
        "attention_dropout": 0.0,
    }
    if "attention.head_dim" not in family.fixed:
        config["head_dim"] = plain.head_dim
    if family.bias_key is not None:
        config[family.bias_key] = attention.qkv_bias
    return config | (_pattern_keys(family, plain) if family.is_mixed else {})


def _pattern_keys(family: Family, plain: ModelSpec) -> dict[str, Any]:
    """Keys of the families in which some layers are dense."""
    assert plain.moe is not None
    dense = [layer - 1 for layer in range(1, plain.n_layers + 1) if not plain.is_moe(layer)]
    # Where no layer is dense the width of dense layers is not used.
    width = plain.moe.d_expert if plain.feed_forward is None else plain.feed_forward.d_ff
    shared = {"shared_expert_intermediate_size": plain.moe.n_shared_experts * plain.moe.d_expert}
    keys = {"decoder_sparse_step": 1, "mlp_only_layers": dense, "intermediate_size": width}
    return keys | (shared if family.has_shared_expert else {})


def spec_of(config: Mapping[str, Any]) -> ModelSpec:
    """The spec of a config.json, its initialisation the default one.

    `spec_of(config_of(spec))` is the spec with its foldable fields folded, patterns in their shortest form and the
    default initialisation. Raises `SpecError` for a family that is not known, code to be trusted, quantised weights, a
    missing key and whatever our networks lack (scaled RoPE, windows by layer, clipping).

    >>> from varprop import presets
    >>> spec_of(config_of(presets.tiny_moe())) == presets.tiny_moe()
    True
    """
    known = {family.model_type: family for family in FAMILIES}
    model_type = config.get("model_type")
    family = known.get(str(model_type))
    if family is None:
        raise SpecError(f"model_type={model_type!r} is not known; expected one of {', '.join(known)}")
    try:
        _refuse(config)
        return ModelSpec.from_dict(_fields(config, family))
    except VarpropError as error:
        raise SpecError(f"config.json of a {family.model_type}: {error}") from None
    except (TypeError, ValueError, ArithmeticError, AttributeError) as error:  # a list for a number, a step of zero
        raise SpecError(
            f"config.json of a {family.model_type} is wrong ({error}); expected values of its kind"
        ) from None


def _refuse(config: Mapping[str, Any]) -> None:
    """`SpecError` for a key that changes what the network computes and that no spec says."""
    trusted = not config.get("auto_map")
    require(trusted, SpecError, "auto_map", config.get("auto_map"), "remote code", "a model without code of its own")
    for key in ("quantization_config", "clip_qkv"):
        require(config.get(key) is None, SpecError, key, config.get(key), "given", "a model without it")
    rope = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    kind = rope.get("rope_type", rope.get("type", "default"))
    require(kind == "default", SpecError, "rope_type", kind, "a scaled RoPE", "'default'")
    fraction = rope.get("partial_rotary_factor", config.get("partial_rotary_factor")) or 1.0
    require(fraction == 1, SpecError, "partial_rotary_factor", fraction, "not held", "1")
    windows = config.get("use_sliding_window", False) and "sliding_attention" in (
        config.get("layer_types") or ["sliding_attention"]
    )
    require(not windows, SpecError, "use_sliding_window", True, "a window by layer", "false")


def _fields(config: Mapping[str, Any], family: Family) -> dict[str, Any]:
    """The nested fields of the spec of a config."""
    flat = {of.field: _value(config, key, of) for key, of in {**EVERY, **family.keys}.items()}
    heads, head_dim = flat["attention.n_heads"], config.get("head_dim")
    kv_heads = _given(config.get("num_key_value_heads"), family.kv_heads, heads)
    theta = _given((config.get("rope_parameters") or {}).get("rope_theta"), config.get("rope_theta"), family.rope_theta)
    act = config.get("hidden_act", "silu")
    ours = {theirs: name for name, theirs in ACTIVATIONS.items()} | {"swish": "silu", "gelu_new": "gelu_tanh"}
    require(act in ours, SpecError, "hidden_act", act, "unknown", "one of " + ", ".join(ours))
    flat |= {
        "attention.n_kv_heads": kv_heads,
        "attention.head_dim": head_dim,
        "attention.rope_theta": _number("rope_theta", theta),
        "attention.qk_norm": family.fixed["attention.qk_norm"][0],
        "norm.placement": family.fixed["norm.placement"][0],
        "norm.eps": _number("rms_norm_eps", config.get("rms_norm_eps", family.eps)),
    }
    if flat.get("attention.window") is not None:
        flat["attention.pattern"] = "window"
    biased = None if family.bias_key is None else bool(config.get(family.bias_key, family.bias_key == "qkv_bias"))
    choices = family.fixed[BIASES]
    qkv, output = next(pair for pair in choices if biased is None or pair[0] == biased)
    flat |= {"attention.qkv_bias": qkv, "attention.output_bias": output}
    if family.is_mixture:
        flat |= _mixture_fields(config, family, flat)
    for part in ("moe", "feed_forward"):
        if any(name.startswith(f"{part}.") for name in flat):
            flat[f"{part}.activation"] = ours[act]
    nested: dict[str, Any] = {}
    for name, value in flat.items():
        *parents, leaf = name.split(".")
        target = nested.setdefault(parents[0], {}) if parents else nested
        target[leaf] = value
    return nested


def _value(config: Mapping[str, Any], key: str, of: Key) -> Any:
    found = next((name for name in (key, ALIASES.get(key)) if name in config), None)
    if found is None and of.default is REQUIRED:
        raise SpecError(f"{key} is missing; expected a value in config.json")
    return of.default if found is None else config[found]


def _given(*values: Any) -> Any:
    """The first value that is not None."""
    return next((value for value in values if value is not None), None)


def _number(name: str, value: Any) -> float:
    good = isinstance(value, (int, float)) and not isinstance(value, bool)
    require(good, SpecError, name, value, "not a number", "a number")
    return float(value)


def _mixture_fields(config: Mapping[str, Any], family: Family, flat: Mapping[str, Any]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    if "moe.normalize_gates" in family.fixed:
        fields["moe.normalize_gates"] = family.fixed["moe.normalize_gates"][0]
    if not family.is_mixed:
        return fields
    size = flat["n_layers"]
    good = isinstance(size, int) and 0 < size <= MOST_LAYERS
    require(good, SpecError, "num_hidden_layers", size, "outside the domain", f"an integer in 1..{MOST_LAYERS}")
    step, dense = config.get("decoder_sparse_step", 1), set(config.get("mlp_only_layers") or ())
    pattern = tuple(i not in dense and (i + 1) % step == 0 for i in range(size))
    require(any(pattern), SpecError, "mlp_only_layers", sorted(dense), "every layer", "a layer with experts")
    if not all(pattern):
        fields |= {"feed_forward.d_ff": _value(config, "intermediate_size", Key("", REQUIRED))}
        fields["moe_pattern"] = _shortest(pattern)
    if family.has_shared_expert:
        width, one = _value(config, "shared_expert_intermediate_size", Key("", REQUIRED)), flat["moe.d_expert"]
        expected = f"a multiple of moe_intermediate_size={one}"
        require(width % one == 0, SpecError, "shared_expert_intermediate_size", width, "no whole experts", expected)
        fields |= {"moe.n_shared_experts": width // one, "moe.shared_gate": width > 0}
    return fields


def _shortest(pattern: tuple[bool, ...]) -> tuple[bool, ...]:
    """The shortest pattern that, repeated, begins with `pattern`."""
    size = len(pattern)
    return next(pattern[:n] for n in range(1, size + 1) if all(pattern[i] == pattern[i % n] for i in range(size)))
