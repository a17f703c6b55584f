"""The parameter tensors of a spec: names, shapes, counts and initial standard deviations, one table for everyone.

`nn/init.py` draws weights from it, the theory reads gains from it, `describe()` prints it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from varprop.spec.model import ModelSpec
    from varprop.spec.parts import MaskSpec

OUTPUT_MATRICES = ("o", "down")
"""Matrices that write to the residual stream (they take the scaled output init)."""


@dataclass(frozen=True)
class TensorRow:
    """One parameter tensor. `name` is its name in the network's state; matrices map fan_in (last axis) to fan_out."""

    name: str
    matrix: str
    layer: int | None
    shape: tuple[int, ...]
    fan_in: int
    fan_out: int
    init_mean: float
    init_std: float
    active_fraction: float
    mask: MaskSpec | None

    @property
    def n_parameters(self) -> int:
        """Entries, masked ones included."""
        return math.prod(self.shape)

    @property
    def n_active(self) -> float:
        """Entries that one token uses (the expected share of the experts)."""
        return self.n_parameters * self.active_fraction

    @property
    def gain(self) -> float:
        """fan_in times the variance of an entry before masking."""
        return self.fan_in * self.init_std**2


def init_std(spec: ModelSpec, matrix: str, fan_in: int, fan_out: int) -> float:
    """Initial standard deviation of an entry of a matrix, before masking (`InitSpec`)."""
    init = spec.init
    overrides = dict(init.overrides)
    if matrix in overrides:
        return overrides[matrix]
    if matrix == "embed":
        return init.embedding_std or (init.std if init.rule == "fixed" else 1.0)
    if init.rule == "fixed":
        std = init.std
    elif init.rule == "fan_in":
        std = init.gain / math.sqrt(fan_in)
    else:
        std = init.gain * math.sqrt(2.0 / (fan_in + fan_out))
    if matrix in OUTPUT_MATRICES and init.output_scaling == "inverse_sqrt_2L":
        std /= math.sqrt(2 * spec.n_layers)
    if spec.residual.rule == "deepnorm" and matrix in ("v", "o", "gate", "up", "down"):
        std *= (8 * spec.n_layers) ** -0.25
    return std


def tensor_table(spec: ModelSpec) -> tuple[TensorRow, ...]:
    """Every parameter tensor of the network in the order of its forward pass."""
    return tuple(_rows(spec))


def layer_table(spec: ModelSpec, layer: int) -> dict[str, TensorRow]:
    """The rows of one layer by their name within the layer (`attention.q`, `moe.experts.up`)."""
    return {row.name.split(".", 2)[2]: row for row in _layer_rows(spec, layer)}


def _matrix(
    spec: ModelSpec,
    name: str,
    matrix: str,
    layer: int | None,
    fan_in: int,
    fan_out: int,
    copies: int | None = None,
    active_fraction: float = 1.0,
) -> TensorRow:
    shape = (fan_out, fan_in) if copies is None else (copies, fan_out, fan_in)
    std = init_std(spec, matrix, fan_in, fan_out)
    mask = spec.masks.of(matrix)
    return TensorRow(name, matrix, layer, shape, fan_in, fan_out, 0.0, std, active_fraction, mask)


def _vector(name: str, kind: str, layer: int | None, size: int, mean: float) -> TensorRow:
    return TensorRow(name, kind, layer, (size,), 1, size, mean, 0.0, 1.0, None)


def _norm(spec: ModelSpec, name: str, layer: int | None, size: int | None = None) -> Iterator[TensorRow]:
    if spec.norm.gain:
        yield _vector(f"{name}.gain", "norm_gain", layer, size or spec.d_model, 1.0)
    if spec.norm.bias:
        yield _vector(f"{name}.bias", "norm_bias", layer, size or spec.d_model, 0.0)


def _rows(spec: ModelSpec) -> Iterator[TensorRow]:
    # An embedding row is selected by a one-hot input: fan_in 1.
    std = init_std(spec, "embed", 1, spec.d_model)
    yield TensorRow("embed", "embed", None, (spec.vocab_size, spec.d_model), 1, spec.d_model, 0.0, std, 1.0, None)
    for layer in range(1, spec.n_layers + 1):
        yield from _layer_rows(spec, layer)
    if spec.norm.final:
        yield from _norm(spec, "final_norm", None)
    if not spec.tied_embeddings:
        yield _matrix(spec, "unembed", "unembed", None, spec.d_model, spec.vocab_size)


def _layer_rows(spec: ModelSpec, layer: int) -> Iterator[TensorRow]:
    prefix = f"layers.{layer - 1}"
    peri = spec.norm_placement(layer) == "peri"
    has_feed_forward = spec.feed_forward is not None or spec.moe is not None
    if spec.attention is not None:
        yield from _norm(spec, f"{prefix}.attention_norm", layer)
        yield from _attention_rows(spec, f"{prefix}.attention", layer)
        if peri:
            yield from _norm(spec, f"{prefix}.attention_out_norm", layer)
    if has_feed_forward:
        yield from _norm(spec, f"{prefix}.mlp_norm", layer)
        if spec.is_moe(layer):
            yield from _moe_rows(spec, f"{prefix}.moe", layer)
        else:
            yield from _feed_forward_rows(spec, f"{prefix}.mlp", layer)
        if peri:
            yield from _norm(spec, f"{prefix}.mlp_out_norm", layer)


def _attention_rows(spec: ModelSpec, prefix: str, layer: int) -> Iterator[TensorRow]:
    attention = spec._attention()
    d, query_width, kv_width = spec.d_model, spec.n_heads * spec.head_dim, spec.n_kv_heads * spec.head_dim
    for name, width in (("q", query_width), ("k", kv_width), ("v", kv_width)):
        yield _matrix(spec, f"{prefix}.{name}", name, layer, d, width)
        if attention.qkv_bias:
            yield _vector(f"{prefix}.{name}_bias", "bias", layer, width, 0.0)
    if attention.qk_norm != "none":
        for name, width in (("q", query_width), ("k", kv_width)):
            size = spec.head_dim if attention.qk_norm == "head" else width
            yield _vector(f"{prefix}.{name}_norm.gain", "norm_gain", layer, size, 1.0)
    if attention.sink_logit:
        yield _vector(f"{prefix}.sink", "sink", layer, spec.n_heads, 0.0)
    yield _matrix(spec, f"{prefix}.o", "o", layer, query_width, d)
    if attention.output_bias:
        yield _vector(f"{prefix}.o_bias", "bias", layer, d, 0.0)


def _feed_forward_rows(spec: ModelSpec, prefix: str, layer: int) -> Iterator[TensorRow]:
    part = spec.feed_forward
    assert part is not None
    for name in ("gate", "up") if part.gated else ("up",):
        yield _matrix(spec, f"{prefix}.{name}", name, layer, spec.d_model, part.d_ff)
        if part.bias:
            yield _vector(f"{prefix}.{name}_bias", "bias", layer, part.d_ff, 0.0)
    yield _matrix(spec, f"{prefix}.down", "down", layer, part.d_ff, spec.d_model)
    if part.bias:
        yield _vector(f"{prefix}.down_bias", "bias", layer, spec.d_model, 0.0)


def _moe_rows(spec: ModelSpec, prefix: str, layer: int) -> Iterator[TensorRow]:
    part = spec.moe
    assert part is not None
    d, active = spec.d_model, part.top_k / part.n_experts
    names = ("gate", "up") if part.gated else ("up",)
    yield _matrix(spec, f"{prefix}.router", "router", layer, d, part.n_experts)
    if part.router_bias:
        yield _vector(f"{prefix}.router_bias", "bias", layer, part.n_experts, 0.0)
    for name in names:
        yield _matrix(spec, f"{prefix}.experts.{name}", name, layer, d, part.d_expert, part.n_experts, active)
    yield _matrix(spec, f"{prefix}.experts.down", "down", layer, part.d_expert, d, part.n_experts, active)
    if part.n_shared_experts:
        width = part.n_shared_experts * part.d_expert
        for name in names:
            yield _matrix(spec, f"{prefix}.shared.{name}", name, layer, d, width)
        yield _matrix(spec, f"{prefix}.shared.down", "down", layer, width, d)
        if part.shared_gate:
            yield _matrix(spec, f"{prefix}.shared_gate", "shared_gate", layer, d, 1)


def parameter_counts(rows: tuple[TensorRow, ...]) -> dict[str, int]:
    """Parameters in all, active for one token, and both without the input embedding or any embedding.

    `body` leaves out both embeddings; `without_input_embedding` is the count many model names use. A tied table is one
    tensor: it counts as the input embedding.
    """
    outside = {row.name for row in rows if row.matrix in ("embed", "unembed")}
    return {
        "total": sum(row.n_parameters for row in rows),
        "active": round(sum(row.n_active for row in rows)),
        "without_input_embedding": sum(row.n_parameters for row in rows if row.matrix != "embed"),
        "active_without_input_embedding": round(sum(row.n_active for row in rows if row.matrix != "embed")),
        "body": sum(row.n_parameters for row in rows if row.name not in outside),
        "active_body": round(sum(row.n_active for row in rows if row.name not in outside)),
    }


def describe(spec: ModelSpec) -> str:
    """A text table: each distinct tensor with its shape, multiplicity, parameters, init std and mask."""
    rows = spec.tensor_table()
    groups: dict[tuple[object, ...], list[TensorRow]] = {}
    for row in rows:
        short = row.name if row.layer is None else row.name.split(".", 2)[2]
        groups.setdefault((short, row.shape, row.init_mean, row.init_std, row.mask), []).append(row)
    header = f"{'tensor':<22} {'shape':<20} {'layers':>6} {'parameters':>14} {'init mean':>9} {'init std':>10}  mask"
    lines = [f"spec {spec.spec_id}: d_model {spec.d_model}, {spec.n_layers} layers, norm {spec.norm.placement}", header]
    for (short, shape, mean, std, mask), members in groups.items():
        total = sum(m.n_parameters for m in members)
        mask_text = "" if mask is None else f"{mask.kind} density {mask.density:g} rescale {mask.rescale}"  # type: ignore[attr-defined]
        line = f"{short!s:<22} {'x'.join(map(str, shape))!s:<20} {len(members):>6} {total:>14,} {mean:>9g} {std:>10.5g}"  # type: ignore[call-overload]
        lines.append(f"{line}  {mask_text}".rstrip())
    counts = spec.parameter_counts()
    lines.extend(f"{name.replace('_', ' ')} parameters: {count:,}" for name, count in counts.items())
    return "\n".join(lines)
