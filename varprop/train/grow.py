"""Gradual depth growing: the start of a deep model from the blocks of a trained shallow one.

The shallow run ends; its blocks are duplicated; the deep run starts from them and trains on. From 3 to 6 layers the
sources are `stack` 1 2 3 1 2 3 (Gong et al., ICML 2019) and `interleave` 1 1 2 2 3 3. arXiv 2512.08819 asks
whether models whose depth grows during training use it better than models trained at full depth from the beginning;
which blocks are duplicated, and that it is done once, is not taken from there.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, get_args

import torch
from torch.distributed.tensor import DTensor, distribute_tensor

from varprop.errors import ArgumentError, require
from varprop.spec import ModelSpec
from varprop.train.checkpoint import last_whole, load_model, require_path

Method = Literal["stack", "interleave"]
Moments = Literal["copied", "dropped"]
LAYER = re.compile(r"(?<![^.])layers\.(\d+)\.")
"""The block of a tensor in its name, counted from 0."""
OPTIMIZER = "optimizer."
"""What the names of AdamW's tensors begin with."""


def layer_sources(shallow: ModelSpec, deep: ModelSpec, method: Method = "stack") -> tuple[int, ...]:
    """For every layer 1..L of the deep spec the layer 1..L0 of the shallow one that it starts as.

    stack: ((l - 1) mod L0) + 1. interleave: ceil(l L0 / L). L need not be a multiple of L0: some layers then come once
    more often than the others. Raises `ArgumentError` for an unknown method, for specs that differ in more than
    n_layers (the first other field is named), for a deep spec that is not deeper, and where a layer would take its
    block from one of another kind (dense or mixture, window, norm placement, where these change over the layers).

    >>> from varprop import presets
    >>> shallow, deep = (presets.tiny().with_fields(n_layers=n) for n in (3, 5))
    >>> layer_sources(shallow, deep), layer_sources(shallow, deep, "interleave")
    ((1, 2, 3, 1, 2), (1, 2, 2, 3, 3))
    """
    require(method in get_args(Method), ArgumentError, "method", method, "unknown", " or ".join(get_args(Method)))
    found, wanted = shallow.to_dict(), {**deep.to_dict(), "n_layers": shallow.n_layers}
    name = next((name for name in found if found[name] != wanted[name]), "n_layers")
    if name != "n_layers":
        raise ArgumentError(f"{name}={wanted[name]!r} is not that of the shallow model; expected {found[name]!r}")
    domain = f"more than the {shallow.n_layers} of the shallow model"
    require(deep.n_layers > shallow.n_layers, ArgumentError, "n_layers", deep.n_layers, "too small", domain)
    layers = range(1, deep.n_layers + 1)
    if method == "stack":
        sources = tuple((layer - 1) % shallow.n_layers + 1 for layer in layers)
    else:
        sources = tuple(-(-layer * shallow.n_layers // deep.n_layers) for layer in layers)
    for layer, source in zip(layers, sources, strict=True):
        if deep.kind(layer) != shallow.kind(source):
            wrong = f"a layer {layer} whose block is of another kind than layer {source} of the shallow model"
            raise ArgumentError(f"n_layers={deep.n_layers} gives {wrong}; expected a depth that fits the patterns")
    return sources


def grown_state(
    tensors: Mapping[str, torch.Tensor],
    shallow: ModelSpec,
    deep: ModelSpec,
    method: Method = "stack",
    moments: Moments = "dropped",
) -> dict[str, torch.Tensor]:
    """The tensors of the deep model: blocks by `layer_sources`, everything else as it is; copies share no memory.

    tensors: by the names of the shallow model's state, masks too, and `optimizer.<name>.<key>` of AdamW's where it is
    given. moments: whether the latter are copied with their block (each copy has the source's moments and step count)
    or dropped, so that the optimiser starts anew.
    The network computes another function than the shallow one: each block acts again. It is the shallow function where
    `o` and `down` of the copies are zero. Multipliers that depend on depth (`residual.rule`, `lns`) are the deep
    spec's. Raises `ArgumentError` as `layer_sources`, and for tensors that are not those of all the shallow blocks.

    >>> from varprop import presets
    >>> from varprop.nn import Transformer
    >>> shallow, deep = (presets.tiny().with_fields(n_layers=n) for n in (2, 4))
    >>> model = Transformer(deep)
    >>> model.load_state_dict(grown_state(Transformer(shallow).state_dict(), shallow, deep))
    <All keys matched successfully>
    """
    require(moments in get_args(Moments), ArgumentError, "moments", moments, "unknown", " or ".join(get_args(Moments)))
    sources = layer_sources(shallow, deep, method)
    wanted = {name: tensor for name, tensor in tensors.items() if moments == "copied" or not name.startswith(OPTIMIZER)}
    blocks = {int(match[1]) for name in wanted if (match := LAYER.search(name))}
    expected = f"{shallow.n_layers}, those of the shallow model"
    whole = blocks == set(range(shallow.n_layers))
    require(whole, ArgumentError, "tensors", sorted(blocks), "not a whole model's blocks, counted from 0", expected)
    grown = {name: tensor.clone() for name, tensor in wanted.items() if not LAYER.search(name)}
    for block, source in enumerate(sources):
        for name, tensor in wanted.items():
            match = LAYER.search(name)
            if match and int(match[1]) == source - 1:
                grown[f"{name[: match.start()]}layers.{block}.{name[match.end() :]}"] = tensor.clone()
    return grown


def grow(
    run_dir: str | Path, deep: ModelSpec, method: Method = "stack", moments: Moments = "dropped"
) -> dict[str, torch.Tensor]:
    """The state from which a run of the deep spec starts, grown from the run in `run_dir`.

    moments `dropped`: the final weights of a finished run, float32 on the CPU by name, masks included. `copied`: the
    weights of its last whole checkpoint and, as `optimizer.<name>.<key>`, their AdamW state, for `load_moments`.
    Raises `ArgumentError` for a directory without a finished run (a whole checkpoint) and as `grown_state`.
    """
    if moments == "dropped":
        model = load_model(run_dir)
        return grown_state(model.state_dict(), model.spec, deep, method)
    require_path(run_dir)
    last = last_whole(Path(run_dir))
    if last is None:
        raise ArgumentError(f"run_dir={str(run_dir)!r} has no checkpoint; expected one, or moments='dropped'")
    tensors = {
        name: torch.empty(shape, dtype=getattr(torch, dtype.removeprefix("torch.")))
        for name, (shape, dtype) in last.tensors.items()
        if name.startswith(("model.", OPTIMIZER))
    }
    last.read_into(tensors)
    named = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    return grown_state(named, ModelSpec.from_dict(last.run["spec"]), deep, method, moments)


def load_moments(model: torch.nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, torch.Tensor]) -> None:
    """Put the AdamW state of `tensors`, as `grow` gives it, into `optimizer`, made from the parameters of `model`.

    model: a `Transformer`, sharded or not. Without `optimizer.` tensors nothing is changed.
    """
    for name, parameter in model.named_parameters():
        for key in ("step", "exp_avg", "exp_avg_sq"):
            tensor = tensors.get(f"{OPTIMIZER}{name}.{key}")
            if tensor is None:
                continue
            tensor = tensor.to(parameter.device)
            if isinstance(parameter, DTensor) and tensor.dim():
                tensor = distribute_tensor(tensor, parameter.device_mesh, parameter.placements)
            optimizer.state[parameter][key] = tensor.clone()
