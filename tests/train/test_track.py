"""Records on their way: order, and what a history keeps through a checkpoint."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from varprop.corpus import Corpus
from varprop.results import validate
from varprop.spec import ModelSpec
from varprop.train import TrainConfig
from varprop.train.track import Fetcher, History, dataset

CORPUS = Corpus(np.zeros(0, np.uint16), np.zeros(0, np.uint16), 32, 2.5, "text", "0" * 64, None)
VARIANCE = torch.arange(15.0, dtype=torch.float64).view(3, 5)
VARIANCE[0, :4] = torch.nan  # the embedding has one site


def record(step: int, device: str = "cpu") -> dict[str, torch.Tensor]:
    scalar = torch.tensor(float(step), device=device)
    return {
        "train_loss": scalar,
        "variance": VARIANCE.to(device) + step,
        "gradient_norm": scalar,
    }


def check(taken: list[tuple[int, dict[str, np.ndarray]]], steps: list[int]) -> None:
    assert [step for step, _ in taken] == steps
    for step, values in taken:
        assert {name: value.shape for name, value in values.items()} == {
            "train_loss": (),
            "variance": (3, 5),
            "gradient_norm": (),
        }
        assert all(value.dtype == np.float64 for value in values.values())
        assert float(values["train_loss"]) == step
        np.testing.assert_array_equal(values["variance"], VARIANCE.numpy() + step)


def test_records_come_in_order_and_once() -> None:
    fetcher = Fetcher()
    assert fetcher.take() == []
    for step in (0, 4, 8, 12):
        fetcher.put(step, record(step))
    check(fetcher.take(0), [])
    check(fetcher.take(8), [0, 4])
    check(fetcher.take(8), [])
    check(fetcher.take(), [8, 12])
    assert fetcher.take() == []


def test_a_record_is_that_of_its_moment() -> None:
    """Also where the tensors are written again before it is taken, as those of a recorded step are."""
    fetcher, values = Fetcher(), record(3)
    fetcher.put(3, values)
    for tensor in values.values():
        tensor.zero_()
    check(fetcher.take(), [3])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_records_from_a_gpu() -> None:
    """Nothing waits when a record is put; work queued behind it may overwrite its tensors."""
    fetcher, held = Fetcher(), record(0, "cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in range(5):
            torch.cuda._sleep(10_000_000)
            for tensor, value in zip(held.values(), record(step).values(), strict=True):
                tensor.copy_(value.pin_memory(), non_blocking=True)
            fetcher.put(step, held)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    check(fetcher.take(2), [0, 1])
    check(fetcher.take(), [2, 3, 4])


def history() -> History:
    made = History()
    for step in (0, 4):
        values = {name: tensor.double().numpy() for name, tensor in record(step).items()}
        correlation = np.array([[np.nan, np.nan], [0.1, 0.2], [0.3, 0.4]])  # none at the embedding
        made.append("step", step, {**values, "branch_correlation": correlation})
    losses = np.array([3.0, 2.0])
    made.append("evaluation_step", 0, {"validation_loss": losses, "bits_per_byte": losses / np.log(2) / 2.5})
    return made


def test_a_history_comes_back_from_its_arrays() -> None:
    """Empty, and with records of some dimensions alone; going on with it is going on with the first."""
    assert History.from_arrays(History().arrays()).arrays() == {}
    first, again = history(), History.from_arrays(history().arrays())
    assert again.steps == first.steps
    for made in (first, again):
        made.append("evaluation_step", 10, {"validation_loss": np.array([2.5, 1.5]), "bits_per_byte": np.ones(2)})
    one, other = first.arrays(), again.arrays()
    assert list(one) == list(other)
    for name, values in one.items():
        np.testing.assert_array_equal(values, other[name])
        assert values.dtype == other[name].dtype
    assert [float(loss) for loss in again.of("train_loss")] == [0.0, 4.0]
    assert again.of("probe") == []
    assert one["evaluation_step"].tolist() == [0, 10]


def test_dataset(spec: ModelSpec) -> None:
    config = TrainConfig(n_steps=8, warmup_steps=4, batch_size=2, n_tokens=16, evaluation_length=8, learning_rate=1.0)
    ds = dataset(history(), spec, config, CORPUS, n_steps=8, device="cpu", dtype="float32", attributes={"initial": ""})
    validate(ds)
    assert dict(ds.sizes) == {
        "seed": 1,
        "step": 2,
        "layer": 3,
        "site": 5,
        "branch": 2,
        "evaluation_step": 1,
        "evaluation": 2,
    }
    assert ds.learning_rate.values.tolist() == [[0.25, 1.0]]
    assert ds.tokens_seen.values.tolist() == [[0, 128]]
    assert ds.evaluation_length.values.tolist() == [[8, 16]]
    expected = np.array([3.0, 2.0]) / np.log(2) / 2.5
    np.testing.assert_allclose(ds.bits_per_byte[0, 0], expected, rtol=1e-15)
    assert ds.attrs["bits_per_byte"] == "approximate"
