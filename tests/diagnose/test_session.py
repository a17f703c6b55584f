"""Sessions: batches joined in order, parts kept and found again, whatever interrupts a measurement."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from safetensors.numpy import save_file
from torch import Tensor

from varprop.diagnose import session as module
from varprop.diagnose.causal import causal
from varprop.diagnose.limits import Limits
from varprop.diagnose.options import OPTIONS
from varprop.diagnose.replay import Batch, Captured, Replay
from varprop.diagnose.session import Session, prepare_parts
from varprop.errors import ArgumentError, LessMemoryWarning

from . import zoo


def session(parts: Path | None = None, n_sequences: int = 5) -> Session:
    return Session(Replay(zoo.make("llama")), Batch.causal(zoo.tokens(n_sequences, 8)), parts=parts)


def first_tokens(captured: Captured) -> dict[str, Tensor]:
    return {"token": captured.batch.tokens[:, 0]}


class Killed(Exception):  # noqa: N818
    """Stands for a signal that ends the process."""


def test_batches_are_joined_in_order() -> None:
    given, seen = session(), []
    given.progress = lambda name, done, total: seen.append((name, done, total))
    for size in (1, 2, 5, 100):
        found = given.each_batch("tokens", first_tokens, batch_size=size)["token"]
        np.testing.assert_array_equal(found, given.batch.tokens[:, 0])
    assert seen[:5] == [("tokens", done, 5) for done in range(1, 6)]
    some = given.each_batch("tokens", first_tokens, slice(1, 4), batch_size=2)["token"]
    np.testing.assert_array_equal(some, given.batch.tokens[1:4, 0])


def test_batches_follow_the_memory() -> None:
    given = session()
    one = 4 * 8 * zoo.WIDTH * 4  # streams of one sequence: layers 0..3, tokens, neurons, bytes
    given.replay.limits = Limits(4.0 * 2 * one)
    assert given.batch_size() == 2
    assert given.batch_size(kept=2) == 1
    given.replay.limits = Limits(1e12)
    assert given.batch_size() == 5


def test_what_was_done_before_a_kill_is_not_done_again(tmp_path: Path) -> None:
    done: list[int] = []

    def compute(captured: Captured, fails_at: int = -1) -> dict[str, Tensor]:
        if len(done) == fails_at:
            raise Killed
        done.append(len(done))
        return first_tokens(captured)

    with pytest.raises(Killed):
        session(tmp_path).each_batch("tokens", lambda captured: compute(captured, 3), batch_size=1)
    assert len(list(tmp_path.iterdir())) == 3
    resumed = session(tmp_path).each_batch("tokens", compute, batch_size=1)["token"]
    assert len(done) == 5
    np.testing.assert_array_equal(resumed, session().batch.tokens[:, 0])


def test_a_score_resumed_is_the_same_to_the_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def few(given: Session) -> Session:
        given.replay.limits = Limits(4.0 * 4 * 8 * zoo.WIDTH * 4)
        return given

    whole = causal(few(session()))
    capture, calls = Session.capture, []

    def failing(self: Session, rows: slice) -> Captured:
        calls.append(rows)
        if len(calls) == 4:
            raise Killed
        return capture(self, rows)

    monkeypatch.setattr(Session, "capture", failing)
    with pytest.raises(Killed):
        causal(few(session(tmp_path)))
    resumed = causal(few(session(tmp_path)))
    assert len(calls) == 4 + 2
    for name, (_, values) in whole.items():
        np.testing.assert_array_equal(resumed[name][1], values, err_msg=name)


@pytest.mark.parametrize("damage", [b"", b"not a file of tensors", None])
def test_a_damaged_part_is_computed_again(damage: bytes | None, tmp_path: Path) -> None:
    session(tmp_path).each_batch("tokens", first_tokens, batch_size=2)
    part = tmp_path / "tokens-2-4.safetensors"
    whole = part.read_bytes()
    part.write_bytes(whole[:-3] if damage is None else damage)
    found = session(tmp_path).each_batch("tokens", first_tokens, batch_size=2)["token"]
    np.testing.assert_array_equal(found, session().batch.tokens[:, 0])
    assert part.read_bytes() == whole


@pytest.mark.parametrize("arrays", [{}, {"other": np.ones(2)}, {"token": np.ones(1)}])
def test_a_part_without_its_arrays_is_computed_again(arrays: dict[str, np.ndarray], tmp_path: Path) -> None:
    session(tmp_path).each_batch("tokens", first_tokens, batch_size=2)
    part = tmp_path / "tokens-2-4.safetensors"
    whole = part.read_bytes()
    save_file(arrays, part)
    found = session(tmp_path).each_batch("tokens", first_tokens, batch_size=2)["token"]
    np.testing.assert_array_equal(found, session().batch.tokens[:, 0])
    assert part.read_bytes() == whole


def test_a_full_disk_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(module, "save_file", full)
    with pytest.raises(ArgumentError, match=r"tokens-0-5.safetensors' cannot be written .*No space left") as error:
        session(tmp_path).each_batch("tokens", first_tokens)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_a_damaged_identity_is_that_of_another_measurement(tmp_path: Path) -> None:
    (tmp_path / "measurement.json").write_bytes(b"\xff\xfe{")
    with pytest.raises(ArgumentError, match="of another measurement"):
        prepare_parts(tmp_path, {"seed": 0})


def test_parts_of_another_measurement_are_not_taken(tmp_path: Path) -> None:
    folder = prepare_parts(tmp_path / "parts", {"seed": 0})
    assert prepare_parts(tmp_path / "parts", {"seed": 0}) == folder
    with pytest.raises(ArgumentError) as error:
        prepare_parts(tmp_path / "parts", {"seed": 1})
    assert (
        "of another measurement (model, text or options); expected those of this one: delete the folder, or choose"
        in str(error.value)
    )


def test_numbers_that_are_not_finite_name_the_layer() -> None:
    model = zoo.make("llama")
    with torch.no_grad():
        zoo.layers_of(model)[1].mlp.down_proj.weight.fill_(float("inf"))
    given = Session(Replay(model), Batch.causal(zoo.tokens(2, 8)))
    with pytest.raises(ArgumentError, match="activations='NaN or infinite' is first after layer 2; expected finite"):
        causal(given)
    kept = session().each_batch("x", lambda captured: {"token": torch.full((5,), torch.nan)})
    assert np.isnan(kept["token"]).all()  # a finite model: what a score lacks


def test_random_numbers_have_names() -> None:
    given = session()
    draw = lambda name: torch.rand(3, generator=given.rng(name)).tolist()  # noqa: E731
    assert draw("a") == draw("a")
    assert draw("a") != draw("b")
    other = session()
    other.seed = 1
    assert torch.rand(3, generator=other.rng("a")).tolist() != draw("a")


def test_options_and_first_sequences() -> None:
    given = session()
    assert given.option("n_probes") == OPTIONS["n_probes"][0]
    given.options = {"n_probes": 3}
    assert given.option("n_probes") == 3
    assert [given.first_sequences(n).stop for n in (1, 8, 17, 10**6)] == [2, 2, 2, 5]
    assert given.first_sequences(1, fewest=1).stop == 1
    assert session(n_sequences=1).first_sequences(8).stop == 1


def test_fewer_sequences_at_a_time_where_the_memory_is_short() -> None:
    """A computation that fails for more than two sequences gives what it gives for each."""
    given, seen = session(), []

    def compute(captured: Captured) -> dict[str, Tensor]:
        seen.append(captured.n_sequences)
        if captured.n_sequences > 2:
            raise torch.OutOfMemoryError("out of memory")
        return {"first": captured.batch.tokens[:, 0]}

    with pytest.warns(LessMemoryWarning):
        found = given.each_batch("halves", compute)
    assert np.array_equal(found["first"], given.batch.tokens[:, 0].numpy())
    assert min(seen) <= 2
