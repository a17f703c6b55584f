"""Ablations against one full pass of the model with hooks on its own modules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.diagnose import zoo
from varprop import presets
from varprop.diagnose import Batch, Limits, Replay, Session, measure
from varprop.diagnose.ablation import BRANCHES, WHOLE, ablation
from varprop.errors import BranchesWarning, UnsuitedError
from varprop.nn import Transformer

N_SEQUENCES, N_TOKENS = 4, 10
ROUNDING = 1e-7
"""Of a float64 model: transformers computes norms and routers in float32."""
ADDED = {
    "llama": ("self_attn", "mlp"),
    "qwen2": ("self_attn", "mlp"),
    "olmo2": ("post_attention_layernorm", "post_feedforward_layernorm"),
    "gpt2": ("attn", "mlp"),
    "gpt_neox": ("attention", "mlp"),
    "gemma2": ("post_attention_layernorm", "post_feedforward_layernorm"),
    "gemma3": ("post_attention_layernorm", "post_feedforward_layernorm"),
    "phi": ("self_attn", "mlp"),
    "mixtral": ("self_attn", "mlp"),
    "olmoe": ("self_attn", "mlp"),
    "deepseek_v3": ("self_attn", "mlp"),
    "bert": ("attention.output.dense", "output.dense"),
    "esm": ("attention.output.dense", "output.dense"),
}
"""Modules of a layer whose output is what attention and feed-forward add to the stream."""


def stream(value: Any) -> Tensor:
    return value[0] if isinstance(value, tuple) else value


def with_stream(output: Any, new: Tensor) -> Any:
    return (new, *output[1:]) if isinstance(output, tuple) else new


def given(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    return args[0] if args else kwargs["hidden_states"]


def plain(model: nn.Module, layers: Any, tokens: Tensor, branches: tuple[str, str]) -> np.ndarray:
    """(L, I): every entry from one ordinary pass of the model with a hook on the module that is changed."""

    def loss(module: nn.Module | None = None, hook: Callable[..., Any] | None = None) -> float:
        handle = None if module is None else module.register_forward_hook(hook, with_kwargs=True)  # type: ignore[arg-type]
        out = model(tokens)
        if handle is not None:
            handle.remove()
        logits = getattr(out, "logits", out)[:, :-1].mT
        return functional.cross_entropy(logits, tokens[:, 1:], reduction="sum").item()

    def mean_of(module: nn.Module, *, contribution: bool) -> Tensor:
        seen: list[Tensor] = []

        def watch(_: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
            seen.append(stream(out) - given(args, kwargs) if contribution else stream(out))

        loss(module, watch)
        return seen[0].mean(dim=(0, 1))

    table = []
    for layer in layers:
        mean = mean_of(layer, contribution=True)
        row = [
            loss(layer, lambda _, args, kwargs, out: with_stream(out, given(args, kwargs))),
            loss(layer, lambda _, args, kwargs, out, mean=mean: with_stream(out, given(args, kwargs) + mean)),
            loss(),
        ]
        for branch in map(layer.get_submodule, branches):
            mean = mean_of(branch, contribution=False)
            zero = torch.zeros_like(mean)
            for value in (zero, mean):
                row.append(
                    loss(
                        branch,
                        lambda _, __, ___, out, value=value: with_stream(out, value.expand_as(stream(out)).clone()),
                    )
                )
        table.append(row)
    return np.array(table) / loss()


@zoo.each_family(*ADDED)
def test_is_its_definition(family: str) -> None:
    model = zoo.make(family, torch.float64)
    session = Session(Replay(model), Batch.causal(zoo.tokens(N_SEQUENCES, N_TOKENS)))
    variables = ablation(session)
    assert variables["intervention"][1] == [*WHOLE, *BRANCHES]
    with torch.no_grad():
        expected = plain(model, session.replay.layers, session.batch.tokens, ADDED[family])
    found = variables["ablation_loss_ratio"][1]
    assert np.isnan(found[0]).all()
    np.testing.assert_allclose(found[1:], expected, rtol=ROUNDING)
    null = WHOLE.index("null")
    assert (np.abs(np.delete(found[1:], null, axis=1) - 1) > ROUNDING).all()


def test_small_memory_gives_the_same() -> None:
    model, batch = zoo.make("llama", torch.float64), Batch.causal(zoo.tokens(N_SEQUENCES, N_TOKENS))
    expected = ablation(Session(Replay(model), batch))
    session = Session(Replay(model), batch)
    session.replay.limits = Limits(4.0 * 4 * 10 * 32 * 8)  # one sequence a batch
    assert session.batch_size() == 1
    found = ablation(session)
    for name in ("ablation_loss_ratio", "ablation_loss_ratio_stderr"):
        np.testing.assert_allclose(found[name][1], expected[name][1], rtol=1e-9, atol=1e-12)


def test_standard_error_is_that_of_a_paired_ratio() -> None:
    """Delta method: of a ratio of means a / b it is the standard deviation of a_i - (a/b) b_i over sqrt(S) mean b."""
    model, tokens = zoo.make("llama", torch.float64), zoo.tokens(100, 6, 5)
    replay = Replay(model)
    found = ablation(Session(replay, Batch.causal(tokens)))

    def losses() -> np.ndarray:
        logits = model(tokens).logits[:, :-1].mT
        return functional.cross_entropy(logits, tokens[:, 1:], reduction="none").sum(dim=1).numpy()

    with torch.no_grad():
        b = losses()
        for i, layer in enumerate(replay.layers):
            hook = layer.register_forward_hook(lambda _, args, out: with_stream(out, args[0]))
            a = losses()
            hook.remove()
            expected = (a - a.mean() / b.mean() * b).std(ddof=1) / 10 / b.mean()
            # 400 resamples: the standard error itself is known to 3.5 %; four of them
            assert found["ablation_loss_ratio_stderr"][1][i + 1, 0] == pytest.approx(expected, rel=0.15)


def test_result_has_the_interventions_as_labels() -> None:
    result = measure(zoo.make("gpt2"), zoo.tokens(3, 8), scores="ablation")
    assert result.ablation_loss_ratio.sel(intervention="null", layer=2).item() == pytest.approx(1, abs=1e-5)
    assert result.ablation_loss_ratio.dims == result.ablation_loss_ratio_stderr.dims == ("layer", "intervention")


def test_layers_without_two_branches_are_taken_as_a_whole() -> None:
    model = Transformer(presets.tiny().with_fields(n_layers=2, feed_forward=None, vocab_size=96))
    with pytest.warns(BranchesWarning, match="Transformer"):
        result = measure(model, zoo.tokens(3, 8), scores="ablation")
    assert tuple(result.intervention.values) == WHOLE


@pytest.mark.gpu
@zoo.each_family("llama", "gpt2", "gemma3", "olmoe")
def test_accelerator_in_bfloat16_gives_what_the_processor_gives(family: str) -> None:
    found = []
    for device in ("cpu", "cuda"):
        session = Session(Replay(zoo.make(family, torch.bfloat16).to(device)), Batch.causal(zoo.tokens(8, 16)))
        found.append(np.asarray(ablation(session)["ablation_loss_ratio"][1]))
    np.testing.assert_allclose(*found, rtol=0.02)


def test_model_without_logits_is_refused() -> None:
    headless = Session(Replay(zoo.make("llama").get_submodule("model")), Batch.causal(zoo.tokens(2, 8)))
    with pytest.raises(UnsuitedError, match="without logits"):
        ablation(headless)
