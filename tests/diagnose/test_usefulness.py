"""Usefulness against lstsq on all tokens and one full pass of the model for each replaced layer."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.diagnose import zoo
from varprop import presets
from varprop.diagnose import Batch, Limits, Replay, Session, measure
from varprop.diagnose.usefulness import THRESHOLDS, fit, split, usefulness
from varprop.errors import AccuracyWarning, ArgumentError, UnsuitedError
from varprop.nn import Transformer

N_SEQUENCES, N_TOKENS = 8, 12  # 48 tokens are fitted by 32 x 32 + 32 numbers for each layer
pytestmark = pytest.mark.filterwarnings("ignore::varprop.errors.AccuracyWarning")  # few tokens
ROUNDING = 1e-7
"""Of a float64 model: transformers computes norms and routers in float32."""
SPEC = presets.tiny().with_fields(d_model=32, n_layers=3, n_heads=2, head_dim=16, d_ff=48, vocab_size=96)


def session_of(model: nn.Module, *, parts: Any = None, seed: int = 1, **options: Any) -> Session:
    tokens = zoo.tokens(N_SEQUENCES, N_TOKENS, seed)
    return Session(Replay(model), Batch.causal(tokens), parts=parts, options=options)


def plain_losses(model: nn.Module, layers: Any, tokens: Tensor, n_fit: int) -> tuple[np.ndarray, np.ndarray]:
    """Summed losses (L + 1, S), the model itself last, and R^2 (L): everything from the model's ordinary pass."""
    seen: dict[int, tuple[Tensor, Tensor]] = {}

    def stream(value: Any) -> Tensor:
        return value[0] if isinstance(value, tuple) else value

    def given(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        return args[0] if args else kwargs["hidden_states"]

    def loss() -> np.ndarray:
        out = model(tokens)
        logits = getattr(out, "logits", out).double()[:, :-1].mT
        return functional.cross_entropy(logits, tokens[:, 1:], reduction="none").sum(dim=1).numpy()

    hooks = [
        layer.register_forward_hook(
            lambda _, args, kwargs, out, i=i: seen.update({i: (given(args, kwargs), stream(out))}), with_kwargs=True
        )
        for i, layer in enumerate(layers)
    ]
    base = loss()
    for hook in hooks:
        hook.remove()
    losses, r_squared = [], []
    for i, layer in enumerate(layers):
        x, y = (z[:n_fit].flatten(0, 1).double().numpy() for z in seen[i])
        ones = np.concatenate([x, np.ones((len(x), 1))], axis=1)
        solution = np.linalg.lstsq(ones, y, rcond=None)[0]
        rest, update = y - ones @ solution, y - x
        r_squared.append(1 - (rest**2).sum() / ((update - update.mean(axis=0)) ** 2).sum())
        matrix, shift = torch.from_numpy(solution[:-1]), torch.from_numpy(solution[-1])

        def replace(_: nn.Module, args: Any, kwargs: Any, out: Any, matrix=matrix, shift=shift) -> Any:
            new = (given(args, kwargs).double() @ matrix + shift).to(stream(out).dtype)
            return (new, *out[1:]) if isinstance(out, tuple) else new

        hook = layer.register_forward_hook(replace, with_kwargs=True)
        losses.append(loss())
        hook.remove()
    return np.array([*losses, base]), np.array(r_squared)


def check(model: nn.Module, tolerance: float) -> None:
    session = session_of(model, in_sample=True)
    found = {name: np.asarray(values) for name, (_, values) in usefulness(session).items()}
    with torch.no_grad():
        losses, r_squared = plain_losses(model, session.replay.layers, session.batch.tokens, N_SEQUENCES // 2)
    np.testing.assert_allclose(found["linear_r_squared"][1:], r_squared, rtol=tolerance)
    for ending, part in (("", losses[:, N_SEQUENCES // 2 :]), ("_in_sample", losses[:, : N_SEQUENCES // 2])):
        total = part.sum(axis=1)
        ratio = total[:-1] / total[-1]
        increase = (total[:-1] - total[-1]) / (part.shape[1] * (N_TOKENS - 1))
        np.testing.assert_allclose(found[f"usefulness_loss_ratio{ending}"][1:], ratio, rtol=tolerance)
        np.testing.assert_allclose(
            found[f"usefulness_loss_increase{ending}"][1:], increase, rtol=tolerance, atol=tolerance
        )
        np.testing.assert_allclose(found[f"usefulness_mean_loss_ratio{ending}"], ratio.mean(), rtol=tolerance)
        assert found[f"usefulness{ending}"] == (ratio > 1.1).mean()
        assert found[f"usefulness_curve{ending}"].tolist() == [(ratio > t).mean() for t in THRESHOLDS]


@zoo.each_family()
def test_is_its_definition_in_every_family(family: str) -> None:
    check(zoo.make(family, torch.float64), ROUNDING)


def test_is_its_definition_on_our_own_model_in_float32() -> None:
    check(Transformer(SPEC, seed=3), 2e-4)


def test_is_its_definition_where_one_token_is_a_thousand_times_larger() -> None:
    model = zoo.make("llama", torch.float64)
    with torch.no_grad():
        model.get_parameter("model.embed_tokens.weight")[int(zoo.tokens(N_SEQUENCES, N_TOKENS, 1)[0, 0])] *= 1000
    check(model, 1e-6)


def test_small_memory_gives_the_same() -> None:
    model = zoo.make("llama", torch.float64)
    expected = usefulness(session_of(model))
    session = session_of(model)
    session.replay.limits = Limits(1.5 * 32 * 16 * 32**2 / 16)  # sums of one layer at a time, batches of one sequence
    assert session.batch_size() < N_SEQUENCES // 2
    for name, (_, values) in usefulness(session).items():
        np.testing.assert_allclose(values, expected[name][1], rtol=1e-9, atol=1e-12, err_msg=name)


def test_finished_parts_are_read_again(tmp_path) -> None:
    model = zoo.make("llama", torch.float64)
    first = usefulness(session_of(model, parts=tmp_path))
    with torch.no_grad():
        next(iter(Replay(model).layers[0].parameters())).zero_()
    again = usefulness(session_of(model, parts=tmp_path))
    assert not np.array_equal(again["linear_r_squared"][1], first["linear_r_squared"][1])  # maps are not kept
    for name in (name for name in again if name.startswith("usefulness")):
        np.testing.assert_array_equal(again[name][1], first[name][1], err_msg=name)


def test_standard_error_is_that_of_a_paired_ratio() -> None:
    """Delta method: of a ratio of means a / b it is the standard deviation of a_i - (a/b) b_i over sqrt(S) mean b."""
    model, tokens = zoo.make("llama", torch.float64), zoo.tokens(120, 6, 5)
    session = Session(Replay(model), Batch.causal(tokens), options={"fit_share": 1 / 6})
    found = usefulness(session)
    with torch.no_grad():
        losses, _ = plain_losses(model, session.replay.layers, tokens, 20)
    a, b = losses[:-1, 20:], losses[-1, 20:]
    rest = a - (a.mean(axis=1) / b.mean())[:, None] * b
    expected = rest.std(axis=1, ddof=1) / 100**0.5 / b.mean()
    # 400 resamples: the standard error itself is known to 3.5 %; four of them
    np.testing.assert_allclose(found["usefulness_loss_ratio_stderr"][1][1:], expected, rtol=0.15)


def test_result_has_the_thresholds_as_labels() -> None:
    result = measure(zoo.make("gpt2"), zoo.tokens(4, 12), scores="usefulness", options={"in_sample": True})
    assert result.usefulness_curve.loss_ratio_threshold.values.tolist() == list(THRESHOLDS)
    assert result.usefulness_curve.sel(loss_ratio_threshold=1.1).item() == result.usefulness.item()
    assert np.isnan(result.usefulness_loss_ratio.sel(layer=0))
    for name in result.data_vars:
        if str(name).startswith("usefulness") and not str(name).endswith(("_stderr", "tokens")):
            assert f"{name}_stderr" in result


def test_maps_are_kept_apart_by_the_sequences_they_are_fitted_on(tmp_path) -> None:
    session = session_of(zoo.make("llama", torch.float64), parts=tmp_path)
    one, other = (fit(session, part)[0].shift for part in (slice(0, 4), slice(4, 8)))
    assert not torch.equal(one, other)


@pytest.mark.parametrize("share, expected", [(0.5, 4), (0.01, 1), (0.99, 7), (0.7, 6)])
def test_split_leaves_sequences_on_both_sides(share: float, expected: int) -> None:
    session = session_of(zoo.make("llama", torch.float64), fit_share=share)
    assert split(session) == (slice(0, expected), slice(expected, 8))


@pytest.mark.parametrize(
    "n_tokens, times",
    [
        (16, "about 1.5 times that of the best maps: 96 fit"),
        (8, "the maps are underdetermined: 24 fit tokens for 32 neurons; use at least 4"),
    ],
)
def test_few_tokens_are_said_to_be_few(n_tokens: int, times: str) -> None:
    session = Session(Replay(zoo.make("llama")), Batch.causal(zoo.tokens(12, n_tokens)))
    with pytest.warns(AccuracyWarning, match=times):
        usefulness(Session(session.replay, session.batch, options={"fit_share": 0.25 if n_tokens == 8 else 0.5}))


@pytest.mark.gpu
@zoo.each_family("llama", "gpt2", "gemma3", "olmoe")
def test_accelerator_in_bfloat16_gives_what_the_processor_gives(family: str) -> None:
    found = []
    for device in ("cpu", "cuda"):
        session = Session(Replay(zoo.make(family, torch.bfloat16).to(device)), Batch.causal(zoo.tokens(40, 32)))
        found.append({name: np.asarray(values) for name, (_, values) in usefulness(session).items()})
    np.testing.assert_allclose(found[0]["linear_r_squared"], found[1]["linear_r_squared"], atol=0.02)
    np.testing.assert_allclose(found[0]["usefulness_loss_ratio"], found[1]["usefulness_loss_ratio"], rtol=0.02)


def test_bad_input() -> None:
    model = zoo.make("llama", torch.float64)
    one = Session(Replay(model), Batch.causal(zoo.tokens(1, 12)))
    with pytest.raises(UnsuitedError, match="sequences=1 is too few for usefulness; expected at least 2"):
        usefulness(one)
    with pytest.raises(ArgumentError, match=r"fit_share=1\.0 is outside its range"):
        usefulness(session_of(model, fit_share=1.0))
    headless = session_of(zoo.make("llama").get_submodule("model"))
    with pytest.raises(UnsuitedError, match="without logits"):
        usefulness(headless)
