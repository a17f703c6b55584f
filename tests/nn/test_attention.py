"""Attention: its two paths agree, its limits hold, and no output depends on a later token."""

from __future__ import annotations

import pytest
import torch

from varprop.errors import ArgumentError
from varprop.nn import Transformer, draw_layer
from varprop.nn.attention import _turns, attention, draw_kept_keys, rotate
from varprop.nn.init import make_generator

from ..reference.specs import BASE, SPECS

WITH_ATTENTION = [name for name, spec in SPECS.items() if spec.attention is not None]
CAUSAL = [
    name
    for name, spec in SPECS.items()
    if (spec.attention is None or spec.attention.pattern != "full")
    and (spec.moe is None or spec.moe.routing == "token_choice")
]


@pytest.mark.parametrize("name", WITH_ATTENTION)
def test_fused_and_explicit_paths_agree(name: str) -> None:
    """Float64, logits of order one, 9 keys: rounding is about 1e-15."""
    spec = SPECS[name]
    weights = draw_layer(spec, 1, make_generator(1), dtype=torch.float64)
    x = torch.randn(2, 9, spec.d_model, generator=make_generator(2), dtype=torch.float64)
    watchers = (None, lambda name, probabilities: None)
    fused, explicit = (attention(x, weights, spec, 1, make_generator(3), watch) for watch in watchers)
    torch.testing.assert_close(fused, explicit, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", CAUSAL)
def test_no_output_depends_on_a_later_token(name: str) -> None:
    spec = SPECS[name]
    model = Transformer(spec, seed=2, dtype=torch.float64)
    tokens = torch.randperm(spec.vocab_size, generator=make_generator(4))[None, :7]
    changed = tokens.clone()
    changed[0, 4:] = (changed[0, 4:] + 1) % spec.vocab_size
    with torch.no_grad():
        before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[:, :4], after[:, :4], rtol=0, atol=1e-12)
    assert not torch.allclose(before[:, 4:], after[:, 4:])


def test_grouped_heads_equal_repeated_heads() -> None:
    """Query head h reads key/value head h // kv_group_size."""
    grouped = BASE.with_fields(n_kv_heads=2)
    weights = draw_layer(grouped, 1, make_generator(1), dtype=torch.float64)
    repeated = dict(weights)
    for name in ("attention.k", "attention.v"):
        repeated[name] = weights[name].unflatten(0, (2, 4)).repeat_interleave(2, dim=0).flatten(0, 1)
    x = torch.randn(1, 6, 16, generator=make_generator(2), dtype=torch.float64)
    torch.testing.assert_close(attention(x, weights, grouped, 1), attention(x, repeated, BASE, 1), rtol=0, atol=1e-12)


def test_key_value_heads_as_many_as_heads_is_multi_head() -> None:
    assert BASE.with_fields(n_kv_heads=4) == BASE


def test_window_as_long_as_the_sequence_is_causal() -> None:
    spec = BASE.with_fields({"attention.pattern": "window", "window": 6})
    weights = draw_layer(BASE, 1, make_generator(1), dtype=torch.float64)
    x = torch.randn(1, 6, 16, generator=make_generator(2), dtype=torch.float64)
    torch.testing.assert_close(attention(x, weights, spec, 1), attention(x, weights, BASE, 1), rtol=0, atol=1e-12)


def test_window_of_one_gives_the_own_value() -> None:
    spec = BASE.with_fields({"attention.pattern": "window", "window": 1})
    weights = draw_layer(BASE, 1, make_generator(1), dtype=torch.float64)
    x = torch.randn(1, 6, 16, generator=make_generator(2), dtype=torch.float64)
    expected = x @ weights["attention.v"].mT @ weights["attention.o"].mT
    torch.testing.assert_close(attention(x, weights, spec, 1), expected, rtol=0, atol=1e-12)


def test_rotation_keeps_lengths_and_depends_on_distance_only() -> None:
    q, k = torch.randn(2, 1, 8, generator=make_generator(1), dtype=torch.float64)
    queries, keys = (rotate(y.expand(10, 8), *_turns(10, 100.0, 4, torch.float64, torch.device("cpu"))) for y in (q, k))
    torch.testing.assert_close(queries.norm(dim=-1), q.norm().expand(10), rtol=1e-12, atol=0)
    products = queries @ keys.mT
    for distance in range(-9, 10):
        values = products.diagonal(distance)
        torch.testing.assert_close(values, values[:1].expand_as(values), rtol=0, atol=1e-12)


def test_key_mask_needs_a_generator() -> None:
    spec = SPECS["key_mask_before"]
    with pytest.raises(ArgumentError, match="generator=None is missing"):
        attention(torch.ones(1, 3, 16), draw_layer(spec, 1, make_generator(1)), spec, 1)


def test_kept_keys_have_the_density_and_always_the_own() -> None:
    kept = draw_kept_keys(torch.zeros(4, 8, 64, 2), 0.25, make_generator(1))
    assert bool(kept.diagonal(dim1=-2, dim2=-1).all())
    others = kept[~torch.eye(64, dtype=torch.bool).expand_as(kept)].double()
    stderr = (0.25 * 0.75 / len(others)) ** 0.5
    assert abs(others.mean().item() - 0.25) < 5 * stderr  # 5 standard errors: false-fail rate 6e-7, seed fixed
