"""Statistics of attention against loops over the probabilities that eager implementations and our own layers give."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tests.diagnose.zoo import FAMILIES, MIXTURES, VOCABULARY, each_family, enlarged, make, tokens
from tests.reference.specs import SPECS
from varprop.diagnose import Batch, Limits, Replay, Session, bootstrap, measure
from varprop.diagnose import attention as module
from varprop.diagnose.attention import attention, octave_starts
from varprop.diagnose.attention_rows import attention_rows
from varprop.diagnose.session import Variables
from varprop.errors import UnsuitedError
from varprop.measure import ATTENTION_THRESHOLDS
from varprop.nn import Transformer

OWN = ("base", "gqa", "logits", "full_softcap", "window_sink", "window_pattern", "key_mask_before", "key_mask_after")
N_SEQUENCES, N_TOKENS = 3, 10


def peaked(family: str, dtype: torch.dtype) -> nn.Module:
    """A model whose attention is far from uniform."""
    changes: dict[str, Any] = {"query_pre_attn_scalar": 1} if family in ("gemma2", "gemma3") else {}
    return enlarged(make(family, dtype, **changes), 3.0)


def session(model: nn.Module, memory: float = 2.0**30) -> Session:
    return Session(Replay(model, Limits(memory)), Batch.causal(tokens(N_SEQUENCES, N_TOKENS)))


def of_eager(model: Any) -> np.ndarray:
    """Probabilities (L, S, N, T, T) of an ordinary forward pass."""
    model.config._attn_implementation = "eager"  # set_attn_implementation leaves Falcon's as it is
    with torch.no_grad():
        found = model(tokens(N_SEQUENCES, N_TOKENS), output_attentions=True).attentions
    return torch.stack(found).double().numpy()


def of_own(model: Transformer) -> np.ndarray:
    """As `of_eager`, of the sequences one by one as they come."""
    seen: list[torch.Tensor] = []

    def observe(layer: int, what: str, values: torch.Tensor) -> None:
        if what == "attention":
            seen.append(values)

    with torch.no_grad():
        model.hidden(tokens(N_SEQUENCES, N_TOKENS), observe=observe)
    return torch.stack(seen).double().numpy()


def visible_keys(causal: bool, windows: list[int | None], n_sinks: int = 0) -> np.ndarray:
    """(L, T)."""
    found = np.zeros((len(windows), N_TOKENS))
    for layer, window in enumerate(windows):
        for i in range(N_TOKENS):
            for j in range(N_TOKENS):
                in_window = window is None or abs(i - j) < window or j < n_sinks
                found[layer, i] += in_window and (j <= i or not causal)
    return found


def by_loops(p: np.ndarray, visible: np.ndarray) -> dict[str, np.ndarray]:
    """Statistics of every query, (L, S, N, T), with thresholds last."""
    shape = p.shape[:4]
    n_thresholds = len(ATTENTION_THRESHOLDS)
    found = {name: np.zeros(shape) for name in module.PLAIN}
    found |= {name: np.zeros((*shape, n_thresholds)) for name in module.BY_THRESHOLD}
    for place in np.ndindex(*shape):
        row, n = p[place], visible[place[0], place[-1]]
        found["concentration"][place] = sum(x**2 for x in row)
        found["entropy"][place] = -sum(x * np.log(x) for x in row if x > 0)
        found["sink_mass"][place], found["first_4_mass"][place] = row[0], row[:4].sum()
        found["total_mass"][place] = row.sum()
        found["effective_density"][place] = row.sum() ** 2 / (n * (row**2).sum())
        for k, threshold in enumerate(ATTENTION_THRESHOLDS):
            found["mass_above"][place][k] = sum(x for x in row if x > threshold)
            found["key_share_above"][place][k] = sum(x > threshold for x in row) / n
    return found


def check(found: Variables, p: np.ndarray, visible: np.ndarray, rtol: float) -> None:
    expected = by_loops(p, visible)
    octaves = [slice(0, 1), slice(1, 2), slice(2, 4), slice(4, 8), slice(8, 10)]
    for name, queries in expected.items():
        heads = queries.mean(axis=(1, 3))
        for where, values in (("head", heads), ("attention", heads.mean(axis=1))):
            np.testing.assert_allclose(found[f"{where}_{name}"][1][1:], values, rtol, rtol, err_msg=name)
        assert np.isnan(found[f"attention_{name}"][1][0]).all()
        if name not in module.BY_THRESHOLD:
            by_octave = np.stack([queries[:, :, :, octave].mean(axis=(1, 2, 3)) for octave in octaves], axis=1)
            np.testing.assert_allclose(found[f"attention_{name}_by_position"][1][1:], by_octave, rtol, rtol)
    per_sequence = expected["concentration"].mean(axis=(2, 3)).T
    error = bootstrap.stderr(lambda mean: mean, per_sequence)
    np.testing.assert_allclose(found["attention_concentration_stderr"][1][1:], error, 100 * rtol, rtol)
    mass, concentration = (expected[name].mean(axis=(1, 3)) for name in ("total_mass", "concentration"))
    np.testing.assert_allclose(found["head_effective_keys"][1][1:], mass**2 / concentration, rtol)
    np.testing.assert_allclose(
        found["attention_effective_keys"][1][1:], mass.mean(axis=1) ** 2 / concentration.mean(axis=1), rtol
    )


def windows_of(model: Any) -> list[int | None]:
    """Distance below which a query sees a key, by layer; of the zoo's models."""
    config = model.config
    n_layers = config.num_hidden_layers
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * n_layers
    window = getattr(config, "sliding_window", None)
    if config.model_type == "modernbert":
        window = config.local_attention // 2 + 1
    return [window if kind == "sliding_attention" else None for kind in kinds]


@each_family(*FAMILIES)
def test_equals_the_probabilities_of_eager_attention(family: str) -> None:
    dtype, rtol = (torch.float32, 2e-5) if family in MIXTURES else (torch.float64, 1e-6)  # eager: float32 softmax
    model: Any = peaked(family, dtype)
    before = model.config._attn_implementation
    found = attention(session(model))
    assert model.config._attn_implementation == before
    visible = visible_keys(family not in ("bert", "esm", "modernbert"), windows_of(model))
    p = of_eager(model)
    density = p.sum(axis=-1) ** 2 / ((p**2).sum(axis=-1) * visible[:, None, None])
    assert 0.15 < density[..., 4:].mean() < 0.9, "neither of one key nor uniform"
    check(found, p, visible, rtol)


@each_family("llama", "gemma3", "gpt2", "falcon", "bert")
def test_eager_models_give_the_same(family: str) -> None:
    expected = attention(session(peaked(family, torch.float64)))
    model: Any = peaked(family, torch.float64)
    model.config._attn_implementation = "eager"
    found = attention(session(model))
    assert model.config._attn_implementation == "eager"
    for name, (_, values) in expected.items():
        # Eager probabilities are rounded to float32; a standard error is a difference of numbers of order one.
        np.testing.assert_allclose(found[name][1], values, rtol=1e-6, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("name", OWN)
def test_equals_what_our_own_layers_observe(name: str) -> None:
    spec = SPECS[name].with_fields(vocab_size=VOCABULARY)
    model = enlarged(Transformer(spec, dtype=torch.float64), 1.5).eval()
    assert isinstance(model, Transformer)
    visible = visible_keys(
        spec._attention().pattern != "full",
        [spec.window(layer) for layer in range(1, spec.n_layers + 1)],
        spec._attention().n_sink_tokens,
    )
    check(attention(session(model)), of_own(model), visible, 1e-10)


@pytest.mark.parametrize("family", ["llama", "gemma2", "bert", "own"])
def test_little_memory_forms_few_probabilities_at_a_time_and_changes_nothing(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = enlarged(Transformer(SPECS["window_sink"].with_fields(vocab_size=VOCABULARY), dtype=torch.float64), 1.5)
    model = own.eval() if family == "own" else peaked(family, torch.float64)
    whole = attention(session(model))
    at_once: list[int] = []
    statistics = module.query_statistics

    def counted(p: torch.Tensor, n_visible: torch.Tensor) -> torch.Tensor:
        at_once.append(p.numel())
        return statistics(p, n_visible)

    monkeypatch.setattr(module, "query_statistics", counted)
    parts = attention(session(model, memory=4.0 * module.NUMBER_BYTES * 250))
    assert max(at_once) <= 250 < N_SEQUENCES * N_TOKENS**2
    for name, (_, values) in whole.items():
        np.testing.assert_allclose(parts[name][1], values, rtol=1e-10, atol=1e-12, err_msg=name)


def test_octaves() -> None:
    assert octave_starts(1) == [0]
    assert octave_starts(2) == [0, 1]
    assert octave_starts(16) == [0, 1, 2, 4, 8]
    assert octave_starts(17) == [0, 1, 2, 4, 8, 16]


def test_is_a_result_with_labels() -> None:
    found = measure(peaked("gemma3", torch.float32), tokens(N_SEQUENCES, N_TOKENS), scores=["attention"])
    assert found.attention_threshold.values.tolist() == list(ATTENTION_THRESHOLDS)
    assert found.query_position.values.tolist() == [0, 1, 2, 4, 8]
    assert found.head_mass_above.dims == ("layer", "head", "attention_threshold")
    assert (found.attention_entropy_stderr[1:] > 0).all()


def test_refuses_layers_without_a_softmax() -> None:
    one = session(make("llama"))
    captured = one.capture(slice(0, 2))
    _ = captured.streams
    layer: Any = one.replay.layers[1]
    layer.self_attn.forward = lambda hidden_states, **_: (hidden_states, None)
    with pytest.raises(UnsuitedError, match="architecture='LlamaForCausalLM' is without softmax attention in layer 2"):
        list(attention_rows(one.replay, 1, captured))


def test_refuses_implementations_whose_masks_it_does_not_read() -> None:
    model: Any = make("llama")
    one = session(model)
    captured = one.capture(slice(0, 2))
    _ = captured.streams
    model.config._attn_implementation = "flex_attention"
    with pytest.raises(UnsuitedError, match="attn_implementation='flex_attention' is unknown; expected sdpa or eager"):
        list(attention_rows(one.replay, 0, captured))
    assert model.config._attn_implementation == "flex_attention"


def test_refuses_a_model_without_attention() -> None:
    model = Transformer(SPECS["feed_forward_only"].with_fields(vocab_size=VOCABULARY))
    with pytest.raises(UnsuitedError, match="attention=None is missing"):
        attention(session(model))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@each_family("llama", "gemma2", "gpt_oss", "deepseek_v3", "bert")
def test_cuda_bfloat16_is_near_float32(family: str) -> None:
    model = make(family)
    expected = attention(session(model))["attention_concentration"][1][1:]
    found = attention(session(model.to("cuda", torch.bfloat16)))["attention_concentration"][1][1:]
    np.testing.assert_allclose(found, expected, rtol=0.02)
