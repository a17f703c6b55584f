"""Initial weights and masks: distributions, exact counts, reduction to the dense case, one draw per network."""

from __future__ import annotations

import pytest
import torch

from varprop.errors import SpecError
from varprop.nn import Block, draw_layer
from varprop.nn.init import draw_mask, draw_tensor, make_generator
from varprop.spec import MaskSpec, layer_table

from ..reference.specs import BASE, SPECS


@pytest.mark.parametrize("name", ["base", "moe_shared", "init_fixed", "init_xavier", "deepnorm"])
def test_standard_deviations_are_those_of_the_table(name: str) -> None:
    spec = SPECS[name]
    weights = draw_layer(spec, 1, make_generator(1), lead=(400,))
    for key, row in layer_table(spec, 1).items():
        values = weights[key].double()
        assert values.shape == (400, *row.shape)
        if row.init_std == 0:
            assert bool((values == row.init_mean).all())
            continue
        # relative standard error of a Gaussian's mean square is sqrt(2/n); 5 of them, false-fail rate 6e-7 each
        error = values.square().mean().item() / row.init_std**2 - 1
        assert abs(error) < 5 * (2 / values.numel()) ** 0.5


def test_networks_differ_and_a_seed_repeats() -> None:
    first, again = (draw_layer(BASE, 1, make_generator(7), lead=(2,)) for _ in range(2))
    other = draw_layer(BASE, 1, make_generator(8), lead=(2,))
    for name, value in first.items():
        assert torch.equal(value, again[name])
        if value.std() > 0:
            assert not torch.equal(value[0], value[1])
            assert not torch.equal(value, other[name])


def test_generator_streams_differ_by_key() -> None:
    keys = [(1,), (1, 0), (1, 1), (2,), (0, 1)]
    draws = {tuple(torch.rand(4, generator=make_generator(5, *key)).tolist()) for key in keys}
    assert len(draws) == len(keys)


@pytest.mark.parametrize("kind", ["bernoulli", "magnitude", "block", "n_of_m"])
@pytest.mark.parametrize("rescale", ["none", "inverse_sqrt", "inverse"])
def test_density_one_is_dense(kind: str, rescale: str) -> None:
    masked = BASE.with_fields({"masks.q": MaskSpec(kind=kind, density=1.0, rescale=rescale)})  # type: ignore[arg-type]
    (row, dense_row) = (layer_table(spec, 1)["attention.q"] for spec in (masked, BASE))
    weight, mask = draw_tensor(row, make_generator(3))
    dense, no_mask = draw_tensor(dense_row, make_generator(3))
    assert mask is not None
    assert bool(mask.all())
    assert no_mask is None
    assert torch.equal(weight, dense)
    effective = draw_layer(masked, 1, make_generator(3))
    assert torch.equal(effective["attention.q"], dense)


@pytest.mark.parametrize("name", SPECS)
def test_simulated_weights_are_those_of_the_network(name: str) -> None:
    """Masks and their factors are applied alike to the weights of a simulation and in the forward of the network."""
    spec = SPECS[name]
    drawn, effective = draw_layer(spec, 1, make_generator(6, 1)), Block(spec, 1, seed=6).weights()
    assert drawn.keys() == effective.keys()
    for key, value in drawn.items():
        assert torch.equal(value, effective[key])


def test_magnitude_keeps_the_largest_of_each_network_and_expert() -> None:
    weight = torch.randn(3, 4, 10, 6, generator=make_generator(1))
    mask = draw_mask(MaskSpec(kind="magnitude", density=0.3), weight, make_generator(2))
    assert bool((mask.sum(dim=(-2, -1)) == 18).all())
    size = weight.abs()
    smallest_kept = size.masked_fill(~mask, torch.inf).amin(dim=(-2, -1))
    largest_dropped = size.masked_fill(mask, 0.0).amax(dim=(-2, -1))
    assert bool((smallest_kept >= largest_dropped).all())


def test_n_of_m_keeps_the_largest_of_each_group_of_inputs() -> None:
    weight = torch.randn(2, 5, 12, generator=make_generator(1))
    mask = draw_mask(MaskSpec(kind="n_of_m", density=0.25, group=4), weight, make_generator(2))
    groups, kept = weight.abs().unflatten(-1, (3, 4)), mask.unflatten(-1, (3, 4))
    assert bool((kept.sum(dim=-1) == 1).all())
    assert torch.equal(groups.argmax(dim=-1), kept.int().argmax(dim=-1))


def test_n_of_m_needs_whole_groups() -> None:
    with pytest.raises(SpecError, match="group=4 is not a divisor of 6 inputs"):
        draw_mask(MaskSpec(kind="n_of_m", density=0.5), torch.ones(3, 6), make_generator(1))


def test_blocks_are_kept_or_dropped_whole() -> None:
    mask = draw_mask(MaskSpec(kind="block", density=0.5, block_size=4), torch.ones(50, 10, 8), make_generator(1))
    for rows in (slice(0, 4), slice(4, 8), slice(8, 10)):
        for columns in (slice(0, 4), slice(4, 8)):
            block = mask[:, rows, columns].flatten(1)
            assert bool((block.all(dim=1) | ~block.any(dim=1)).all())
    corners = mask[:, ::4, ::4].double()
    assert abs(corners.mean().item() - 0.5) < 5 * (0.25 / corners.numel()) ** 0.5  # 5 standard errors, fixed seed


def test_bernoulli_density() -> None:
    mask = draw_mask(MaskSpec(density=0.1), torch.ones(100, 100, 10), make_generator(1)).double()
    assert abs(mask.mean().item() - 0.1) < 5 * (0.09 / mask.numel()) ** 0.5  # 5 standard errors, fixed seed
