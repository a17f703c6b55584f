"""The whole network: names, checkpoints, recording, masks in training, and stacks of networks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from varprop.nn import Transformer, block_forward, draw_layer
from varprop.nn.init import make_generator

from ..reference.specs import SPECS


def some_tokens(vocab_size: int) -> torch.Tensor:
    return torch.stack([torch.randperm(vocab_size, generator=make_generator(n))[:7] for n in range(2)])


@pytest.mark.parametrize("name", SPECS)
def test_state_has_the_names_and_shapes_of_the_table(name: str) -> None:
    spec = SPECS[name]
    state = Transformer(spec).state_dict()
    expected = {row.name: row.shape for row in spec.tensor_table()}
    expected |= {row.name + "_mask": row.shape for row in spec.tensor_table() if row.mask is not None}
    assert {name: tuple(value.shape) for name, value in state.items()} == expected


@pytest.mark.parametrize("name", ["base", "untied", "mask_moe"])
def test_checkpoint_round_trip(name: str, tmp_path: Path) -> None:
    spec = SPECS[name]
    model, other = Transformer(spec, seed=1), Transformer(spec, seed=2)
    tokens = some_tokens(spec.vocab_size)
    assert not torch.equal(model(tokens), other(tokens))
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    other.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert torch.equal(model(tokens), other(tokens))


@pytest.mark.parametrize("name", ["base", "moe_shared", "key_mask_before", "parallel", "placement_post"])
def test_recording_changes_nothing(name: str) -> None:
    model = Transformer(SPECS[name])
    tokens = some_tokens(SPECS[name].vocab_size)
    with torch.no_grad():
        assert torch.equal(model(tokens), model(tokens, lambda layer, site, x: None))


def test_sites_add_up() -> None:
    spec = SPECS["parallel"]
    seen = {}
    Transformer(spec)(some_tokens(spec.vocab_size), lambda layer, site, x: seen.__setitem__((layer, site), x))
    x = {site: seen[2, site] for site in ("resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post")}
    torch.testing.assert_close(x["resid_mid"], 0.9 * x["resid_pre"] + x["attn_out"])
    torch.testing.assert_close(x["resid_post"], x["resid_mid"] + x["mlp_out"])


def test_absent_part_records_zeros() -> None:
    spec = SPECS["feed_forward_only"]
    seen = {}
    Transformer(spec)(some_tokens(spec.vocab_size), lambda layer, site, x: seen.__setitem__((layer, site), x))
    assert not seen[1, "attn_out"].any()
    assert torch.equal(seen[1, "resid_mid"], seen[1, "resid_pre"])


@pytest.mark.parametrize("name", SPECS)
def test_every_parameter_learns_and_masked_entries_do_not(name: str) -> None:
    """Except the router bias, which only selects, and the attention norm that a parallel post block does not use."""
    spec = SPECS[name]
    model = Transformer(spec, dtype=torch.float64)
    logits = model(some_tokens(spec.vocab_size))
    (logits * torch.randn(logits.shape, generator=make_generator(1), dtype=torch.float64)).sum().backward()
    masks = {name: mask for name, mask in model.named_buffers() if name.endswith("_mask")}
    for parameter_name, parameter in model.named_parameters():
        unused = name == "parallel_post" and "attention_norm" in parameter_name
        if unused or parameter_name.endswith("router_bias"):
            assert parameter.grad is None
            continue
        assert parameter.grad is not None, parameter_name
        assert bool(parameter.grad.isfinite().all())
        if parameter_name + "_mask" in masks:
            assert not parameter.grad[~masks[parameter_name + "_mask"]].any()


@pytest.mark.parametrize("name", SPECS)
def test_stack_of_networks_equals_a_loop_over_networks(name: str) -> None:
    """Float64: the same sums in another order."""
    spec = SPECS[name]
    if spec.attention is not None and spec.attention.key_mask_density < 1:
        spec = spec.with_fields(key_mask_density=1.0)
    x = torch.randn(3, 6, spec.d_model, generator=make_generator(1), dtype=torch.float64)
    weights = draw_layer(spec, 1, make_generator(2), (3,), dtype=torch.float64)
    stacked = block_forward(x, weights, spec, 1)
    for i in range(3):
        alone = block_forward(x[i], {key: w[i] for key, w in weights.items()}, spec, 1)
        torch.testing.assert_close(stacked[i], alone, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("name", ["base", "gqa", "moe_shared", "logits", "placement_peri", "key_mask_after"])
def test_bfloat16_autocast_and_bfloat16_weights_run(name: str) -> None:
    spec = SPECS[name]
    tokens = some_tokens(spec.vocab_size)
    exact = Transformer(spec)(tokens)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = Transformer(spec)(tokens)
    low = Transformer(spec, dtype=torch.bfloat16)(tokens)
    for value in (mixed, low):
        assert value.dtype == torch.bfloat16
        # bfloat16 keeps 8 bits; three layers of a dozen roundings each stay far below the size of the logits
        assert (value.float() - exact).norm() < 0.2 * exact.norm()


def test_key_masks_repeat_without_a_generator_and_follow_it_with_one() -> None:
    model = Transformer(SPECS["key_mask_before"])
    tokens = some_tokens(11)
    assert torch.equal(model(tokens), model(tokens))
    first, second = (model(tokens, generator=make_generator(seed)) for seed in (1, 2))
    assert not torch.equal(first, second)


def test_weights_are_the_same_in_every_type() -> None:
    single, double = (Transformer(SPECS["mask_bernoulli"], seed=4, dtype=d) for d in (torch.float32, torch.float64))
    for name, value in single.state_dict().items():
        assert torch.equal(value.double(), double.state_dict()[name].double())
