"""ModelSpec: validation, canonical JSON, changed copies, the tensor table and the paper's parameter counts."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given

from varprop import presets
from varprop.errors import ArgumentError, SpecError
from varprop.spec import (
    AttentionSpec,
    FeedForwardSpec,
    MaskSpec,
    ModelSpec,
    ResidualSpec,
    WeightMasks,
    layer_table,
)
from varprop.testing import model_specs


def small(**fields: object) -> ModelSpec:
    base = ModelSpec(d_model=64, n_layers=4, attention=AttentionSpec(n_heads=4), feed_forward=FeedForwardSpec(d_ff=96))
    return base.with_fields(fields)


@given(model_specs())
def test_json_round_trip(spec: ModelSpec) -> None:
    again = ModelSpec.from_json(spec.to_json())
    assert again == spec
    assert hash(again) == hash(spec)
    assert again.spec_id == spec.spec_id
    assert json.dumps(json.loads(spec.to_json()), sort_keys=True, separators=(",", ":")) == spec.to_json()


@given(model_specs())
def test_tensor_table_is_consistent(spec: ModelSpec) -> None:
    rows = spec.tensor_table()
    assert len({row.name for row in rows}) == len(rows)
    counts = spec.parameter_counts()
    assert counts["total"] == sum(row.n_parameters for row in rows)
    assert counts["active"] <= counts["total"]
    for layer in range(1, spec.n_layers + 1):
        for name, row in layer_table(spec, layer).items():
            assert row.name == f"layers.{layer - 1}.{name}"
            if row.matrix in ("q", "k", "v", "o", "gate", "up", "down", "router"):
                assert row.shape[-2:] == (row.fan_out, row.fan_in)


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"n_kv_heads": 3}, "n_kv_heads=3 is not a divisor of n_heads=4"),
        ({"density": 0.0}, "density=0.0 is outside the domain; expected a number in (0, 1], not below 1e-12"),
        ({"density": 1.5}, "density=1.5 is outside the domain"),
        ({"masks.q": {"density": float("nan")}}, "density=nan is outside the domain"),
        ({"masks.q": {"density": 0.3, "kind": "n_of_m"}}, "not a multiple of 1/4"),
        ({"n_heads": 5}, "n_heads=5 is not a divisor of d_model=64"),
        ({"d_model": 0}, "d_model=0 is too small"),
        ({"d_model": 6.4}, "d_model=6.4 is a float; expected int"),
        ({"n_layers": True}, "n_layers=True is a bool; expected int"),
        ({"activation": "swish"}, "activation='swish' is unknown; expected one of relu"),
        ({"nheads": 4}, "nheads is an unknown field; expected 'n_heads'?"),
        ({"bogus": 1}, "bogus is an unknown field"),
        ({"norm.kind": "batch"}, "kind='batch' is unknown; expected one of rms, layer"),
        ({"rule": "fan_in"}, "rule is ambiguous; expected one of residual.rule, init.rule"),
        ({"window": 8}, "window=8 is given with pattern='causal'"),
        ({"pattern": "window"}, "window=None is missing"),
        ({"rope_fraction": 0.3}, "rotated dimensions"),
        ({"residual.rule": "deepnorm"}, "norm.placement='post'"),
        ({"moe": {"n_experts": 4, "top_k": 2, "d_expert": 8}}, "moe_pattern=() is missing"),
        ({"feed_forward": None, "moe": {"n_experts": 4, "top_k": 5, "d_expert": 8}}, "top_k=5 is larger"),
        ({"feed_forward": None, "moe": {"n_experts": 4, "top_k": 5}}, "moe.d_expert is missing"),
        ({"attention": None, "feed_forward": None}, "a block with no part"),
        ({"block": "parallel", "norm.placement": "post"}, "block='parallel' is given with norm.placement='post'"),
        (
            {"masks.q": {"kind": "n_of_m", "density": 0.4, "group": 5}},
            "masks.q.group=5 is not a divisor of the 64 inputs",
        ),
        ({"init.overrides": {"qq": 0.1}}, "overrides='qq' is an unknown matrix"),
    ],
)
def test_bad_fields_give_one_clear_line(changes: dict, message: str) -> None:
    with pytest.raises(SpecError) as caught:
        small().with_fields(changes)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ['{"d_model": 64,', "[]", "", '{"d_model": 64}', '{"d_model": 64, "n_layers": "4"}'])
def test_broken_json_gives_one_clear_line(text: str) -> None:
    with pytest.raises(SpecError) as caught:
        ModelSpec.from_json(text)
    assert "\n" not in str(caught.value)


def test_equal_models_have_one_form() -> None:
    assert small(n_kv_heads=4) == small()
    assert small(head_dim=16) == small()
    assert small(n_kv_heads=2).kv_group_size == 2
    assert small(density=1.0) == small()
    assert small(density=0.5).with_fields(density=1) == small()


def test_density_stands_for_every_block_matrix() -> None:
    masks = small(density=0.5).masks
    assert {name for name in ("q", "k", "v", "o", "gate", "up", "down") if masks.of(name) == MaskSpec(density=0.5)} == {
        *("q", "k", "v", "o", "gate", "up", "down")
    }
    assert masks.router is None
    assert WeightMasks.uniform(0.5) == masks


def test_init_rules() -> None:
    def std(name: str, spec: ModelSpec) -> float:
        return layer_table(spec, 1)[name].init_std

    fan_in = small()
    assert std("attention.q", fan_in) == 64**-0.5
    assert std("mlp.down", fan_in) == 1 / math.sqrt(96)
    assert fan_in.tensor_table()[0].init_std == 1.0
    xavier = small(n_kv_heads=2).with_fields({"init.rule": "xavier"})
    assert std("attention.v", xavier) == pytest.approx((2 / (64 + 32)) ** 0.5, rel=1e-15)
    scaled = small(output_scaling="inverse_sqrt_2L")
    assert std("attention.o", scaled) == pytest.approx(64**-0.5 / 8**0.5, rel=1e-15)
    assert std("attention.v", scaled) == std("attention.v", fan_in)
    fixed = small().with_fields({"init.rule": "fixed", "init.overrides": {"embed": 1.0, "q": 0.5}})
    assert fixed.tensor_table()[0].init_std == 1.0
    assert (std("attention.q", fixed), std("attention.k", fixed)) == (0.5, 0.02)
    deepnorm = small().with_fields({"residual.rule": "deepnorm", "norm.placement": "post"})
    assert std("attention.v", deepnorm) == pytest.approx(64**-0.5 * 32**-0.25, rel=1e-15)
    assert std("attention.q", deepnorm) == 64**-0.5
    assert deepnorm.skip_scale == pytest.approx(8**0.25, rel=1e-15)


def test_depth_rules() -> None:
    values = {rule: small().with_fields({"residual.rule": rule}).branch_scale for rule in ("one", "inverse_L")}
    assert values == {"one": 1.0, "inverse_L": 0.25}
    assert small().with_fields({"residual.rule": "inverse_sqrt_L"}).branch_scale == 0.5
    assert small().with_fields({"residual.rule": "inverse_sqrt_2L", "branch_multiplier": 2}).branch_scale == (
        pytest.approx(2 / 8**0.5, rel=1e-15)
    )
    assert ResidualSpec().rule == "one"


def test_patterns_cycle() -> None:
    spec = small(pattern="window", window_pattern=[8, 8, 0])
    assert [spec.window(layer) for layer in range(1, 5)] == [8, 8, None, 8]
    moe = small(moe={"n_experts": 4, "top_k": 2, "d_expert": 8}, moe_pattern=[False, True])
    assert [moe.is_moe(layer) for layer in range(1, 5)] == [False, True, False, True]
    mixed = small(placement="mix")
    assert [mixed.norm_placement(layer) for layer in range(1, 5)] == ["post", "pre", "pre", "pre"]


# Golden: counts that the released code's own model class gives (millions; total, without input embedding, and for the
# mixtures active with and without it), computed from its configurations.
@pytest.mark.parametrize(
    "name,total,without,active,active_without",
    [
        ("paper_dense_1b", 1279.9, 1176.8, None, None),
        ("paper_dense_1b_l12", 1011.4, 908.4, None, None),
        ("paper_dense_1b_l24", 1816.8, 1713.7, None, None),
        ("paper_dense_1b_l32", 2353.7, 2250.6, None, None),
        ("paper_dense_400m", 475.4, 398.2, None, None),
        ("paper_moe_7b_1b", 13361.5, 13258.5, 2087.3, 1984.2),
        ("paper_moe_2b_400m", 1984.0, 1945.4, 398.5, 359.9),
        ("paper_moe_l32", 7982.6, 7926.3, 1239.0, 1182.6),
    ],
)
def test_paper_parameter_counts(
    name: str, total: float, without: float, active: float | None, active_without: float | None
) -> None:
    counts = presets.get(name).parameter_counts()
    assert round(counts["total"] / 1e6, 1) == total
    assert round(counts["without_input_embedding"] / 1e6, 1) == without
    if active is not None:
        assert round(counts["active"] / 1e6, 1) == active
        assert round(counts["active_without_input_embedding"] / 1e6, 1) == active_without


def test_group_sizes_of_the_paper() -> None:
    assert [presets.get(f"paper-dense-1b{end}").kv_group_size for end in ("", "-g4", "-g16")] == [1, 4, 16]
    assert [presets.get(name).kv_group_size for name in ("d512_mha", "d512_gqa4", "d512_gqa16")] == [1, 4, 16]
    assert presets.get("d512_mha").head_dim == 32
    assert presets.get("d512").head_dim == 128


@pytest.mark.parametrize("name", presets.names())
def test_every_preset_describes_itself(name: str) -> None:
    spec = presets.get(name)
    text = spec.describe()
    assert f"{spec.parameter_counts()['total']:,}" in text
    assert presets.summary(name).endswith(".")


def test_unknown_preset() -> None:
    with pytest.raises(ArgumentError, match=r"preset='tinny' is unknown; expected 'tiny'\?"):
        presets.get("tinny")
