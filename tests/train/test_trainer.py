"""A step of training: gradients and records however a batch is divided, updates that are left out, documents, load."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from varprop.corpus import Corpus
from varprop.errors import ArgumentError
from varprop.spec import ModelSpec, MoESpec
from varprop.train import TrainConfig
from varprop.train.data import batch, document_ids, evaluation_windows
from varprop.train.distributed import World
from varprop.train.model import TrainingModel
from varprop.train.trainer import Trainer, deterministic_kernels

ONE = World(0, 1, 0, torch.device("cpu"))
TEXT = np.random.default_rng(0).integers(0, 32, 4000).astype(np.uint16)
CORPUS = Corpus(TEXT[:3500], TEXT[3500:], 32, 2.5, "text", "0" * 64, 0)
CONFIG = TrainConfig(n_steps=4, batch_size=8, n_tokens=16, warmup_steps=1, evaluation_length=16, device="cpu")
MOE: dict[str, Any] = {"feed_forward": None, "moe": MoESpec(n_experts=4, top_k=2, d_expert=16, router_bias=True)}


def trainer(
    spec: ModelSpec, corpus: Corpus = CORPUS, initial: dict[str, Tensor] | None = None, **fields: Any
) -> Trainer:
    return Trainer(spec, dataclasses.replace(CONFIG, **fields), corpus, ONE, initial)


def tokens_of(step: int) -> Tensor:
    return batch(CORPUS, 0, step, 8, 16)


def gradients(made: Trainer) -> dict[str, Tensor]:
    named = made.plain.transformer.named_parameters()
    return {name: parameter.grad.clone() for name, parameter in named if parameter.grad is not None}


def state(made: Trainer) -> list[Tensor]:
    """Weights and what the optimiser keeps."""
    kept = [value for parts in made.optimizer.state.values() for value in parts.values()]
    return [tensor.detach().clone() for tensor in (*made.plain.transformer.state_dict().values(), *kept)]


# Micro-batches --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("micro", [1, 2, 4])
@pytest.mark.parametrize("changes", [{}, MOE], ids=["dense", "mixture"])
def test_micro_batches_give_the_gradients_and_records_of_the_batch(
    spec: ModelSpec, changes: dict[str, Any], micro: int
) -> None:
    """But for the load-balance loss, which is not linear in the batch: each micro-batch has its own."""
    spec = spec.with_fields(changes)
    fields: dict[str, Any] = {"load_balance_weight": 0.0, "router_z_weight": 0.01}
    whole, divided = trainer(spec, **fields), trainer(spec, micro_batch_size=micro, **fields)
    expected, found = (made.forward_backward(tokens_of(0), True) for made in (whole, divided))
    assert found.keys() == expected.keys()
    for name in found.keys() - {"load_balance_loss"}:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-7, equal_nan=True, msg=name)
    ours, theirs = gradients(divided), gradients(whole)
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        limit = 1e-5 * float(gradient.abs().max())
        torch.testing.assert_close(ours[name], gradient, rtol=0, atol=limit, msg=name)
    norms = [float(made.gradient_norm()) for made in (divided, whole)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)
    for made in (divided, whole):
        made.update(0)
    if changes:  # by the load of the whole batch
        for one, other in zip(router_biases(divided), router_biases(whole), strict=True):
            assert torch.equal(one, other)


def test_gradients_do_not_add_up_over_steps(spec: ModelSpec) -> None:
    made = trainer(spec, micro_batch_size=4)
    made.forward_backward(tokens_of(0), False)
    first = gradients(made)
    assert made.forward_backward(tokens_of(0), False).keys() == {"train_loss"}
    assert all(torch.equal(first[name], gradient) for name, gradient in gradients(made).items())


def test_one_process_reads_the_whole_batch(spec: ModelSpec) -> None:
    assert trainer(spec).rows == range(8)


def test_micro_batch_size_divides(spec: ModelSpec) -> None:
    line = "^micro_batch_size=3 is not a divisor; expected a divisor of the 8 sequences of a process$"
    with pytest.raises(ArgumentError, match=line):
        trainer(spec, micro_batch_size=3)


# Updates --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("clip_norm", [None, 1.0])
def test_an_update_that_is_not_finite_changes_nothing(spec: ModelSpec, bad: float, clip_norm: float | None) -> None:
    made = trainer(spec.with_fields(MOE), clip_norm=clip_norm)
    made.forward_backward(tokens_of(0), False)
    made.update(0)
    made.forward_backward(tokens_of(1), False)
    before = state(made)
    gradient = made.plain.transformer.get_parameter("embed").grad
    assert gradient is not None
    gradient[3, 2] = bad
    assert not math.isfinite(float(made.update(1)))
    assert all(torch.equal(one, other) for one, other in zip(before, state(made), strict=True))
    made.forward_backward(tokens_of(1), False)
    made.update(1)
    assert not all(torch.equal(one, other) for one, other in zip(before, state(made), strict=True))


def router_biases(made: Trainer) -> list[Tensor]:
    return [tensor.clone() for name, tensor in made.plain.transformer.state_dict().items() if "router_bias" in name]


def test_the_router_bias_moves_against_the_load(spec: ModelSpec) -> None:
    """By router_bias_rate towards experts with less than their share, and by nothing else: it has no gradient."""
    made = trainer(spec.with_fields(MOE), router_bias_rate=0.25, decay="everything", weight_decay=0.5)
    before = router_biases(made)
    assert len(before) == 2
    for step in range(2):
        loads = made.forward_backward(tokens_of(step), True)["expert_load"][1:]
        made.update(step)
        moves = 0.25 * torch.sign(0.25 - loads.float())
        before = [bias + move for bias, move in zip(before, moves, strict=True)]
        for expected, found in zip(before, router_biases(made), strict=True):
            assert torch.equal(found, expected)
        assert (moves != 0).any()
    still = trainer(spec.with_fields(MOE), router_bias_rate=0.0)
    still.forward_backward(tokens_of(0), False)
    still.update(0)
    assert all(not bias.any() for bias in router_biases(still))


def test_balancing_evens_the_load(spec: ModelSpec) -> None:
    """A router that prefers one expert: its bias brings the largest share down without an auxiliary loss."""
    made = trainer(
        spec.with_fields(MOE), router_bias_rate=0.05, load_balance_weight=0.0, learning_rate=1e-9, clip_norm=1e-9
    )
    for block in made.plain.transformer.layers:
        block.get_parameter("moe.router_bias").data[1] = 1.0  # type: ignore[operator]
    shares = []
    for step in range(60):
        shares.append(float(made.forward_backward(tokens_of(step), True)["expert_load"][1:].max()))
        made.update(0)
    assert shares[0] == 0.5  # one of two experts of every token
    assert shares[-1] < 0.35


# Documents ------------------------------------------------------------------------------------------------------------


def test_document_mask(spec: ModelSpec) -> None:
    """Loss, evaluation and statistics are those of attention within documents."""
    plain, masked = trainer(spec), trainer(spec, document_mask=True)
    tokens = tokens_of(0)
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    assert (inputs == 0).any()
    model = TrainingModel(spec, CONFIG, device=ONE.device, compute_dtype=torch.float32)
    expected = model(inputs, targets, document_ids(inputs, 0)).cross_entropy
    loss = masked.forward_backward(tokens, True)["train_loss"]
    torch.testing.assert_close(loss.float(), expected, rtol=1e-6, atol=0)
    assert float(loss) != float(plain.forward_backward(tokens, True)["train_loss"])
    for name in ("evaluate", "probe"):
        ours, others = getattr(masked, name)(), getattr(plain, name)()
        key = "validation_loss" if name == "evaluate" else "attention_entropy"
        assert not np.array_equal(ours[key], others[key], equal_nan=True)


def test_document_mask_needs_document_ends(spec: ModelSpec) -> None:
    line = "^document_mask=True is not possible; expected a corpus that says what ends a document$"
    with pytest.raises(ArgumentError, match=line):
        trainer(spec, dataclasses.replace(CORPUS, document_end=None), document_mask=True)


# Measurements ---------------------------------------------------------------------------------------------------------


def test_bits_per_byte_are_of_the_bytes_evaluated(spec: ModelSpec) -> None:
    sizes = np.random.default_rng(1).integers(0, 9, 32)
    fields: dict[str, Any] = {"evaluation_length": 4, "n_evaluation_sequences": 12}
    known = dataclasses.replace(CORPUS, token_bytes=sizes)
    exact, mean = (trainer(spec, corpus, **fields).evaluate() for corpus in (known, CORPUS))
    losses = exact["validation_loss"]
    assert np.array_equal(mean["validation_loss"], losses)
    np.testing.assert_allclose(mean["bits_per_byte"], losses / math.log(2) / 2.5, rtol=1e-12)
    windows = [evaluation_windows(CORPUS, n, length) for n, length in ((12, 4), (3, 16))]
    n_bytes = np.array([sum(sizes[i] for row in ids for i in row[1:]) / ids[:, 1:].size for ids in windows])
    assert n_bytes[0] != n_bytes[1]
    np.testing.assert_allclose(exact["bits_per_byte"], losses / math.log(2) / n_bytes, rtol=1e-12)
    unknown = trainer(spec, dataclasses.replace(CORPUS, bytes_per_token=None), **fields).evaluate()
    assert list(unknown) == ["validation_loss"]


def test_measurements_change_nothing(spec: ModelSpec) -> None:
    """They stand between the backward pass and the update."""
    measured, plain = trainer(spec.with_fields(MOE)), trainer(spec.with_fields(MOE))
    for made in (measured, plain):
        made.forward_backward(tokens_of(0), True)
    measured.evaluate()
    measured.probe()
    before = measured.snapshot()
    assert measured.plain.training
    for made in (measured, plain):
        made.update(0)
    measured.update_ratios(before)
    assert all(torch.equal(one, other) for one, other in zip(state(measured), state(plain), strict=True))


def test_update_ratio_is_that_of_the_update(spec: ModelSpec) -> None:
    made = trainer(spec)
    made.forward_backward(tokens_of(0), False)
    before = {name: tensor.clone() for name, tensor in made.plain.transformer.state_dict().items()}
    snapshot = made.snapshot()
    made.update(0)
    ratios = made.update_ratios(snapshot)["update_ratio"]
    after = made.plain.transformer.state_dict()
    name = "layers.1.attention.q"
    expected = float((after[name] - before[name]).norm() / before[name].norm())
    assert expected > 0
    assert np.isclose(ratios[2], expected, rtol=1e-5).any()


# Initial tensors ------------------------------------------------------------------------------------------------------


def test_initial_tensors(spec: ModelSpec) -> None:
    given = {name: tensor + 0.01 for name, tensor in trainer(spec, seed=7).plain.transformer.state_dict().items()}
    made = trainer(spec, initial=given)
    assert all(torch.equal(tensor, given[name]) for name, tensor in made.plain.transformer.state_dict().items())
    made.forward_backward(tokens_of(0), False)
    made.update(0)
    assert torch.equal(given["embed"], trainer(spec, initial=given).plain.transformer.state_dict()["embed"])  # a copy
    wrong: dict[str, Any] = {
        r"initial\.embed=\(32, 16, 1\) is not that of the spec; expected \(32, 16\)": {
            "embed": given["embed"][..., None]
        },
        r"initial\.extra=\(1,\) is not that of the spec; expected absent": {"extra": torch.zeros(1)},
    }
    for line, changes in wrong.items():
        with pytest.raises(ArgumentError, match=f"^{line}$"):
            trainer(spec, initial=given | changes)
    del given["embed"]
    with pytest.raises(ArgumentError, match=r"^initial\.embed='absent' is not that of the spec; expected \(32, 16\)$"):
        trainer(spec, initial=given)


def test_deterministic_kernels_while_the_context_lasts() -> None:
    for wanted in (True, False):
        with deterministic_kernels(wanted):
            assert torch.are_deterministic_algorithms_enabled() == wanted
        assert not torch.are_deterministic_algorithms_enabled()


# GPU ------------------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("changes", [{}, MOE], ids=["dense", "mixture"])
@pytest.mark.parametrize("fields", [{}, {"compile": True}], ids=str)
def test_a_step_on_a_gpu_waits_for_nothing(spec: ModelSpec, changes: dict[str, Any], fields: dict[str, Any]) -> None:
    """Document masks are left out: torch's `create_block_mask` waits."""
    spec = spec.with_fields({"d_model": 64, "n_heads": 2, **changes})
    config = dataclasses.replace(CONFIG, device="cuda", micro_batch_size=4, **fields)
    made = Trainer(spec, config, CORPUS, World(0, 1, 0, torch.device("cuda", 0)))
    tokens = tokens_of(0).cuda()
    for step in range(2):  # what is made once
        made.forward_backward(tokens, True)
        made.update(step)
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        made.forward_backward(tokens, True)
        made.update(2)
    finally:
        torch.cuda.set_sync_debug_mode(before)
