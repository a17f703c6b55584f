"""The network against the loop-written one, in float64: logits and every site, for every field of a spec.

Tolerance: sums of at most a few hundred float64 terms over three layers, rounding 1e-16 each, amplified by norms and
softmax; 1e-10 relative to the largest entry leaves four digits over what rounding gives (about 1e-14).
"""

from __future__ import annotations

from typing import Literal, get_args, get_origin, get_type_hints

import numpy as np
import pytest
import torch

from varprop.nn import Transformer
from varprop.nn.attention import draw_kept_keys
from varprop.results import SITES
from varprop.spec import MaskSpec, ModelSpec
from varprop.spec.serialise import field_paths

from .forward import forward
from .specs import SPECS

N_TOKENS, BATCH = 7, 2


def perturbed(spec: ModelSpec) -> Transformer:
    """A network whose gains, biases and sinks are not at their initial constants."""
    model = Transformer(spec, seed=3, dtype=torch.float64)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for row in spec.tensor_table():
            if row.init_std == 0:
                parameter = model._parameters[row.name] if "." not in row.name else model.get_parameter(row.name)
                parameter.add_(0.3 * torch.randn(row.shape, generator=generator, dtype=torch.float64))
    return model


def drawn_key_masks(spec: ModelSpec, generator: torch.Generator) -> list[torch.Tensor]:
    """The key masks (B, N, T, T) that the network draws from this generator, layer by layer."""
    if spec.attention is None or spec.attention.key_mask_density == 1:
        return []
    shape = (BATCH, spec.n_heads, N_TOKENS, spec.head_dim)
    density = spec.attention.key_mask_density
    return [draw_kept_keys(torch.zeros(shape), density, generator) for _ in range(spec.n_layers)]


@pytest.mark.parametrize("name", SPECS)
def test_network_equals_loops(name: str) -> None:
    spec = SPECS[name]
    model = perturbed(spec)
    generator = torch.Generator().manual_seed(7)  # distinct tokens: equal ones tie when an expert chooses between them
    tokens = torch.stack([torch.randperm(spec.vocab_size, generator=generator)[:N_TOKENS] for _ in range(BATCH)])
    sites = {}
    with torch.no_grad():
        logits = model(
            tokens,
            lambda layer, site, x: sites.__setitem__((layer, site), x.numpy().copy()),
            torch.Generator().manual_seed(9),
        )
    assert list(sites) == [(0, "resid_post")] + [(n + 1, site) for n in range(spec.n_layers) for site in SITES]
    state = {name: value.numpy() for name, value in model.state_dict().items()}
    masks = drawn_key_masks(spec, torch.Generator().manual_seed(9))
    for b in range(BATCH):
        kept = {layer: mask[b].numpy() for layer, mask in enumerate(masks, start=1)}
        expected, expected_sites = forward(spec, state, tokens[b].tolist(), kept)
        np.testing.assert_allclose(logits[b].numpy(), expected, rtol=0, atol=1e-10 * np.abs(expected).max())
        for key, value in expected_sites.items():
            np.testing.assert_allclose(sites[key][b], value, rtol=0, atol=1e-10 * max(1.0, np.abs(value).max()))


def test_specs_cover_every_field_and_choice() -> None:
    """Every field takes two values or more, every choice of a named option occurs."""
    seen: dict[str, set] = {}
    for spec in SPECS.values():
        for path in field_paths(ModelSpec):
            value = spec
            for step in path.split("."):
                value = getattr(value, step, None)
            seen.setdefault(path, set()).add(value)
    single = {path for path, values in seen.items() if len(values) < 2}
    assert not single
    choices = {
        path: set(get_args(hint))
        for path in seen
        if get_origin(hint := _hint(path)) is Literal and not path.startswith("masks.")
    }
    missing = {path: wanted - seen[path] for path, wanted in choices.items() if wanted - seen[path]}
    assert not missing
    hints = get_type_hints(MaskSpec)
    for leaf in ("kind", "rescale"):
        assert set(get_args(hints[leaf])) <= seen[f"masks.q.{leaf}"]


def _hint(path: str) -> object:
    owner: object = ModelSpec
    for step in path.split("."):
        hint = get_type_hints(owner)[step]  # type: ignore[arg-type]
        owner = next((a for a in (hint, *get_args(hint)) if hasattr(a, "__dataclass_fields__")), hint)
    return owner
