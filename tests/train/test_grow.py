"""Growing in depth: which block goes where, and when the function is kept."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed
from torch.distributed.fsdp import fully_shard

from varprop import presets
from varprop.errors import ArgumentError, DamagedShardWarning
from varprop.nn import Transformer
from varprop.spec import ModelSpec
from varprop.train import TrainConfig, fit, load_model
from varprop.train.grow import Method, grow, grown_state, layer_sources, load_moments
from varprop.train.optim import adamw
from varprop.train.shards import own_pieces, write_manifest, write_shard

METHODS: tuple[Method, ...] = ("stack", "interleave")
TOKENS = torch.arange(12).view(2, 6) % 32


def depths(spec: ModelSpec, *n_layers: int) -> list[ModelSpec]:
    return [spec.with_fields(n_layers=n) for n in n_layers]


def test_sources() -> None:
    shallow, deep, odd = depths(presets.tiny(), 3, 6, 8)
    assert layer_sources(shallow, deep) == (1, 2, 3, 1, 2, 3)
    assert layer_sources(shallow, deep, "interleave") == (1, 1, 2, 2, 3, 3)
    assert layer_sources(shallow, odd) == (1, 2, 3, 1, 2, 3, 1, 2)
    assert layer_sources(shallow, odd, "interleave") == (1, 1, 2, 2, 2, 3, 3, 3)


def test_every_source_is_used_in_order() -> None:
    """Both methods use every layer, no layer twice more often than another; an interleaving never goes back."""
    for n_shallow, n_deep in itertools.combinations(range(1, 17), 2):
        shallow, deep = depths(presets.tiny(), n_shallow, n_deep)
        for method in METHODS:
            sources = layer_sources(shallow, deep, method)
            counts = [sources.count(layer) for layer in range(1, n_shallow + 1)]
            assert len(sources) == n_deep
            assert max(counts) - min(counts) <= 1
            assert min(counts) >= 1
        assert list(sources) == sorted(sources)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("changes", [{}, {"density": 0.5}, {"feed_forward": None, "moe.n_experts": 2}])
def test_blocks_are_copied_and_the_rest_kept(spec: ModelSpec, method: Method, changes: dict[str, Any]) -> None:
    if "moe.n_experts" in changes:
        changes = {"feed_forward": None, "moe": {"n_experts": 4, "top_k": 2, "d_expert": 8}}
    shallow, deep = depths(spec.with_fields(changes), 2, 5)
    old = Transformer(shallow, seed=1).state_dict()
    new = grown_state(old, shallow, deep, method)
    model = Transformer(deep, seed=2)
    model.load_state_dict(new)  # every name and shape is that of the deep network
    for name, tensor in new.items():
        if name.startswith("layers."):
            _, block, rest = name.split(".", 2)
            name = f"layers.{layer_sources(shallow, deep, method)[int(block)] - 1}.{rest}"
        assert torch.equal(tensor, old[name]), name
    pointers = [tensor.data_ptr() for tensor in new.values()]
    assert len(set(pointers)) == len(pointers)  # the copies train apart


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("n_layers", [4, 5])
def test_function_is_kept_where_the_copies_are_silent(spec: ModelSpec, method: Method, n_layers: int) -> None:
    """With zero `o` and `down` in all but the first copy of each layer: the shallow network's logits, bitwise."""
    shallow, deep = depths(spec, 2, n_layers)
    old = Transformer(shallow, seed=1)
    state = grown_state(old.state_dict(), shallow, deep, method)
    sources = layer_sources(shallow, deep, method)
    for block, source in enumerate(sources):
        if sources.index(source) != block:
            for name in (f"layers.{block}.attention.o", f"layers.{block}.mlp.down"):
                state[name].zero_()
    new = Transformer(deep)
    loud = Transformer(deep)
    loud.load_state_dict(grown_state(old.state_dict(), shallow, deep, method))
    new.load_state_dict(state)
    with torch.no_grad():
        assert torch.equal(new(TOKENS), old(TOKENS))
        assert not torch.allclose(loud(TOKENS), old(TOKENS))  # without silencing, the blocks act again


def trained(spec: ModelSpec, config: TrainConfig) -> tuple[Transformer, torch.optim.AdamW]:
    """A network after two updates, and its optimiser."""
    model = Transformer(spec, seed=1)
    optimizer = adamw(model, spec, config)
    for step in range(2):
        optimizer.zero_grad()
        model(TOKENS + step).square().mean().backward()
        optimizer.step()
    return model, optimizer


def with_moments(model: Transformer, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """The state by the names of `grown_state`."""
    tensors = dict(model.state_dict())
    for name, parameter in model.named_parameters():
        tensors |= {f"optimizer.{name}.{key}": value for key, value in optimizer.state[parameter].items()}
    return tensors


def test_moments_copied_or_dropped(spec: ModelSpec, config: TrainConfig) -> None:
    shallow, deep = depths(spec, 1, 2)
    state = with_moments(*trained(shallow, config))
    copied = grown_state(state, shallow, deep, moments="copied")
    names = {row.name for row in deep.tensor_table()}
    keys = {f"optimizer.{name}.{key}" for name in names for key in ("exp_avg", "exp_avg_sq", "step")}
    assert set(copied) == names | keys
    down = "optimizer.layers.{}.mlp.down.exp_avg"
    assert torch.equal(copied[down.format(1)], state[down.format(0)])
    assert set(grown_state(state, shallow, deep, moments="dropped")) == names


def test_copied_moments_are_those_of_the_optimiser(spec: ModelSpec, config: TrainConfig) -> None:
    """Loaded into an optimiser they make the update of the source: in place of growth, a copy at the same depth."""
    model, optimizer = trained(spec, config)
    state = with_moments(model, optimizer)
    other = Transformer(spec)
    other.load_state_dict({name: tensor for name, tensor in state.items() if not name.startswith("optimizer.")})
    again = adamw(other, spec, config)
    load_moments(other, again, state)
    for network, step in ((model, optimizer), (other, again)):
        step.zero_grad()
        network(TOKENS).square().mean().backward()
        step.step()
    for one, same in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, same)


def test_moments_of_sharded_parameters(spec: ModelSpec, config: TrainConfig) -> None:
    state = with_moments(*trained(spec, config))
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        model = fully_shard(Transformer(spec))
        optimizer = adamw(model, spec, config)
        load_moments(model, optimizer, state)
        held = optimizer.state[dict(model.named_parameters())["layers.1.mlp.up"]]
        assert torch.equal(held["exp_avg"].full_tensor(), state["optimizer.layers.1.mlp.up.exp_avg"])
        assert float(held["step"]) == 2
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    finally:
        distributed.destroy_process_group()


def test_moments_from_a_checkpoint(spec: ModelSpec, config: TrainConfig, tmp_path: Path) -> None:
    model, optimizer = trained(spec, config)
    folder = tmp_path / "checkpoints" / "step-00000002"
    folder.mkdir(parents=True)
    stored = {
        f"model.{n}" if not n.startswith("optimizer.") else n: t for n, t in with_moments(model, optimizer).items()
    }
    stored["history.step"] = torch.zeros(3)
    file = write_shard(folder, 0, 1, own_pieces(stored, 0, 1))
    write_manifest(folder, 2, {"spec": spec.to_dict()}, [file])
    deep = spec.with_fields(n_layers=4)
    state = grow(tmp_path, deep, "interleave", "copied")
    assert set(state) == set(grown_state(with_moments(model, optimizer), spec, deep, "interleave", "copied"))
    source = optimizer.state[dict(model.named_parameters())["layers.1.attention.o"]]["exp_avg_sq"]
    assert torch.equal(state["optimizer.layers.3.attention.o.exp_avg_sq"], source)
    (tmp_path / "checkpoints" / "step-00000003").mkdir()
    with pytest.warns(DamagedShardWarning, match=r"step-00000003.*; the checkpoint of step 2 is taken$"):
        again = grow(tmp_path, deep, "interleave", "copied")
    assert all(torch.equal(state[name], again[name]) for name in state)
    with pytest.raises(ArgumentError, match=r"has no checkpoint; expected one, or moments='dropped'$"):
        grow(tmp_path / "checkpoints", deep, moments="copied")


def test_a_trained_run_grows_and_trains_on(spec: ModelSpec, config: TrainConfig, tmp_path: Path) -> None:
    """The deep run starts from the grown weights, and from the moments where they are copied."""
    config = dataclasses.replace(config, n_steps=40, learning_rate=1e-2, record_every=1)
    fit(spec, config, run_dir=tmp_path / "run", progress=False)
    deep = spec.with_fields(n_layers=4)
    trained = load_model(tmp_path / "run").state_dict()
    states = {moments: grow(tmp_path / "run", deep, moments=moments) for moments in ("dropped", "copied")}
    for state in states.values():
        assert torch.equal(state["layers.3.attention.q"], trained["layers.1.attention.q"])
    few = dataclasses.replace(config, n_steps=2, warmup_steps=0, learning_rate=1e-3)
    losses = {moments: fit(deep, few, initial=state, progress=False).train_loss[0] for moments, state in states.items()}
    fresh = fit(deep, few, progress=False).train_loss[0]
    assert losses["dropped"][0] == losses["copied"][0] < fresh[0] - 0.3
    assert losses["dropped"][1] != losses["copied"][1]
    with pytest.raises(ArgumentError, match=r"has no model.safetensors"):
        grow(tmp_path, deep)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"n_layers": 4, "d_model": 32}, "^d_model=32 is not that of the shallow model; expected 16$"),
        ({"n_layers": 2}, "^n_layers=2 is too small; expected more than the 2 of the shallow model$"),
        ({"n_layers": 1}, "^n_layers=1 is too small; "),
        ({"n_layers": 4, "n_kv_heads": 1}, "^attention=.* is not that of the shallow model; expected "),
    ],
)
def test_specs_that_do_not_fit(spec: ModelSpec, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message) as error:
        layer_sources(spec, spec.with_fields(changes))
    assert "\n" not in str(error.value)


def test_patterns_have_to_fit(spec: ModelSpec) -> None:
    windows = spec.with_fields({"attention.pattern": "window", "window_pattern": [4, 0]})
    shallow, deep = depths(windows, 2, 4)
    assert layer_sources(shallow, deep) == (1, 2, 1, 2)
    with pytest.raises(ArgumentError, match=r"^n_layers=4 gives a layer 2 whose block is of another kind than layer 1"):
        layer_sources(shallow, deep, "interleave")
    mixed = spec.with_fields({"norm.placement": "mix", "post_fraction": 0.5})
    with pytest.raises(ArgumentError, match=r"of another kind"):
        layer_sources(*depths(mixed, 2, 4))


def test_other_bad_input(spec: ModelSpec) -> None:
    shallow, deep = depths(spec, 2, 4)
    state = Transformer(shallow).state_dict()
    with pytest.raises(ArgumentError, match=r"^method='double' is unknown; expected stack or interleave$"):
        grown_state(state, shallow, deep, "double")  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match=r"^moments='halved' is unknown; expected copied or dropped$"):
        grown_state(state, shallow, deep, moments="halved")  # type: ignore[arg-type]
    for part in (Transformer(spec.with_fields(n_layers=1)), Transformer(spec.with_fields(n_layers=3))):
        with pytest.raises(ArgumentError, match=r"^tensors=.* is not a whole model's blocks, .*; expected 2,"):
            grown_state(part.state_dict(), shallow, deep)
