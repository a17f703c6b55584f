"""Who sees whom: matrices of booleans and block masks, with windows, sinks and documents, against loops."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from varprop.nn import draw_layer
from varprop.nn.attention import Shared, attention, rotation
from varprop.nn.init import make_generator
from varprop.spec import ModelSpec
from varprop.train.attention_masks import AttentionMasks

from ..reference.specs import BASE

CPU = torch.device("cpu")
CASES: dict[str, dict[str, Any]] = {
    "causal": {},
    "full": {"attention.pattern": "full"},
    "window": {"attention.pattern": "window", "window": 3},
    "sinks": {"attention.pattern": "window", "window": 2, "n_sink_tokens": 2},
    "alternating": {"attention.pattern": "window", "window_pattern": [4, 0]},
}
T = 12
DOCUMENTS = torch.tensor([[0] * 5 + [1] * 7, [0] * 12, list(range(12))], dtype=torch.int32)


def by_hand(spec: ModelSpec, layer: int, documents: Tensor | None) -> np.ndarray:
    """(B, T, T), query by key."""
    part, window = spec.attention, spec.window(layer)
    assert part is not None
    groups = torch.zeros(1, T) if documents is None else documents
    seen = np.zeros((len(groups), T, T), bool)
    for b, q, k in np.ndindex(*seen.shape):
        allowed = k <= q or part.pattern == "full"
        if window is not None:
            allowed = allowed and (q - k < window or k < part.n_sink_tokens)
        seen[b, q, k] = allowed and bool(groups[b, q] == groups[b, k])
    return seen


def seen_by(mask: Tensor | BlockMask, n_sequences: int) -> np.ndarray:
    """A mask as (B, T, T)."""
    if isinstance(mask, BlockMask):
        b, q, k = torch.meshgrid(*(torch.arange(n) for n in (n_sequences, T, T)), indexing="ij")
        return mask.mask_mod(b, torch.zeros_like(b), q, k).expand(n_sequences, T, T).numpy()
    return mask.expand(n_sequences, 1, T, T)[:, 0].numpy()


@pytest.mark.parametrize("documents", [None, DOCUMENTS], ids=["whole", "documents"])
@pytest.mark.parametrize("name", CASES)
def test_masks(name: str, documents: Tensor | None) -> None:
    spec = BASE.with_fields(CASES[name])
    made = AttentionMasks(spec)
    shared = made.shared(T, CPU, documents)
    if documents is None and "attention.pattern" not in CASES[name]:
        assert shared.masks is None  # plain causal attention is asked for as such
        return
    if documents is None and name == "full":
        assert shared.masks is None
        return
    assert shared.masks is not None
    windows = {spec.window(layer) or 0: layer for layer in range(1, spec.n_layers + 1)}
    assert shared.masks.keys() == windows.keys()
    for window, layer in windows.items():
        expected = by_hand(spec, layer, documents)
        np.testing.assert_array_equal(seen_by(shared.masks[window], len(expected)), expected)
        block = made._blocks(layer, T, CPU, documents)  # what a GPU gets
        np.testing.assert_array_equal(seen_by(block, len(expected)), expected)


def test_what_does_not_depend_on_the_documents_is_made_once() -> None:
    made = AttentionMasks(BASE.with_fields(CASES["window"]))
    first = made.shared(T, CPU)
    again, longer = made.shared(T, CPU), made.shared(T + 4, CPU)
    assert first.masks is not None
    assert first.masks is again.masks
    assert longer.masks is not None
    assert longer.masks[3].shape == (T + 4, T + 4)
    assert made.shared(T, CPU, DOCUMENTS).masks is not first.masks


def test_rotary_angles() -> None:
    spec = BASE.with_fields(rope_fraction=0.5)
    found = AttentionMasks(spec).shared(T, CPU).rotation
    assert found is not None
    for ours, expected in zip(found, rotation(spec, T, CPU), strict=True):
        assert torch.equal(ours, expected)
    assert AttentionMasks(BASE.with_fields(rope_theta=None)).shared(T, CPU) == Shared()
    assert AttentionMasks(BASE.with_fields(attention=None)).shared(T, CPU, DOCUMENTS) == Shared()


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("changes", [{}, {"n_kv_heads": 2}, {"logit_softcap": 1.5}, {"logit_scale": 0.7}], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_attention_under_a_block_mask(name: str, changes: dict[str, Any]) -> None:
    """FlexAttention, as it is without a compiler, gives what the matrix of booleans gives."""
    spec = BASE.with_fields(d_model=64, **CASES[name]).with_fields(changes)
    x = torch.randn(len(DOCUMENTS), T, 64, generator=make_generator(0))
    weights, made = draw_layer(spec, 1, make_generator(1)), AttentionMasks(spec)
    explicit = made.shared(T, CPU, DOCUMENTS)
    blocks = explicit._replace(masks={spec.window(1) or 0: made._blocks(1, T, CPU, DOCUMENTS)})
    expected, found = (attention(x, weights, spec, 1, shared=shared) for shared in (explicit, blocks))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("changes", [{}, {"n_kv_heads": 2}, {"logit_softcap": 1.5}], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_compiled_block_masks_on_a_gpu(name: str, changes: dict[str, Any]) -> None:
    """Documents across the blocks of 128 tokens; values and the gradient of x."""
    cuda, n_tokens = torch.device("cuda"), 384
    spec = BASE.with_fields(d_model=64, **CASES[name]).with_fields(changes)
    documents = torch.stack([torch.arange(n_tokens) // 150, torch.arange(n_tokens) // 7]).int().to(cuda)
    weights = {name: tensor.to(cuda) for name, tensor in draw_layer(spec, 1, make_generator(1)).items()}
    x = torch.randn(2, n_tokens, 64, generator=make_generator(0)).to(cuda).requires_grad_()
    made = AttentionMasks(spec)
    shared = made.shared(n_tokens, cuda, documents)
    assert shared.masks is not None
    assert all(isinstance(mask, BlockMask) for mask in shared.masks.values())
    explicit = shared._replace(masks={spec.window(1) or 0: made._booleans(1, n_tokens, cuda, documents)})
    compiled = torch.compile(attention, dynamic=False, fullgraph=True)
    expected = attention(x, weights, spec, 1, shared=explicit)
    found = compiled(x, weights, spec, 1, shared=shared)
    direction = torch.randn(x.shape, generator=make_generator(1)).to(cuda)
    gradients = [torch.autograd.grad(y, x, direction)[0] for y in (found, expected)]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-2 * float(expected.detach().abs().max()))  # TF32
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-2 * float(gradients[1].abs().max()))
