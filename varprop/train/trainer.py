"""A network, its optimiser and what is done with them: a step, an evaluation, a probe. Nothing here touches files.

Legend: B sequences of this process, T tokens.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from varprop.corpus import Corpus
from varprop.errors import ArgumentError, require
from varprop.measure import balance_bias
from varprop.spec import ModelSpec
from varprop.train import optim
from varprop.train.budget import n_steps
from varprop.train.check import check_run
from varprop.train.config import TrainConfig
from varprop.train.data import document_ids, evaluation_windows, mean_bytes
from varprop.train.distributed import World, accumulate, compute_dtype, shard
from varprop.train.graphs import StepGraphs
from varprop.train.grow import OPTIMIZER, load_moments
from varprop.train.model import TrainingModel
from varprop.train.probe import probe
from varprop.train.track import EVALUATIONS, OF_PROBE, batch_statistics
from varprop.train.weights import WeightSnapshot, gradient_norms, weight_statistics

ATTENTION_KERNELS = [
    *(SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH),
]
"""In the order in which they are asked: cuDNN's is the fastest on Hopper; it refuses deterministic algorithms."""

EAGER_STEPS = 3
"""Steps before the kernels of a step are recorded: what is compiled or allocated once must have been."""


class Trainer:
    """The state of a training; `initial`: tensors to start from, as `train.grow` names them, in place of drawn ones."""

    def __init__(
        self,
        spec: ModelSpec,
        config: TrainConfig,
        corpus: Corpus,
        world: World,
        initial: Mapping[str, Tensor] | None = None,
    ) -> None:
        check_run(spec, config, corpus, world.size)
        self.spec, self.config, self.corpus, self.world = spec, config, corpus, world
        self.n_steps = n_steps(config, spec)
        self.dtype = compute_dtype(config, world.device)
        self.rows = world.share(config.batch_size)
        self._micro = min(config.micro_batch_size or len(self.rows), len(self.rows))
        plain = TrainingModel(spec, config, device=world.device, compute_dtype=self.dtype)
        if initial is not None:
            _load_initial(plain, {name: t for name, t in initial.items() if not name.startswith(OPTIMIZER)})
        self.model = shard(plain, world, config)
        self.plain = plain  # what `shard` may have wrapped
        self.optimizer = optim.adamw(plain.transformer, spec, config)
        load_moments(plain.transformer, self.optimizer, initial or {})
        self._graphs: StepGraphs | None = None
        self._n_eager = 0
        evaluated = [self._evaluation_windows(name) for name in EVALUATIONS]
        self._windows = [self._own_parts(ids) for ids in evaluated]
        self._bytes_per_token = [mean_bytes(corpus, ids[:, 1:]) for ids in evaluated]
        probed = evaluation_windows(corpus, config.n_probe_sequences, config.n_tokens)
        self._probe_tokens = torch.from_numpy(probed[:, :-1]).to(world.device)

    # A step -----------------------------------------------------------------------------------------------------------

    def forward_backward(self, tokens: Tensor, record: bool) -> dict[str, Tensor]:
        """Leave the gradients of a batch (B, T + 1) in the parameters; what is recorded, float64, on the device.

        record: the variables of `OF_BATCH` over all processes; else `train_loss` of the sequences of this one alone.
        """
        if self._graphs is None and self._records_steps() and self._n_eager >= EAGER_STEPS:
            self._graphs = StepGraphs(tokens, self._recorded_passes, self._update)
        self._n_eager += 1
        if self._graphs is not None:
            return self._graphs.forward_backward(tokens)
        found = self._forward_backward(tokens, record)
        return self._mean_over_ranks(found) if record else found

    def _recorded_passes(self, tokens: Tensor) -> dict[str, Tensor]:
        return self._forward_backward(tokens, True)

    def _records_steps(self) -> bool:
        return self.config.cuda_graph and self.world.device.type == "cuda" and self.world.size == 1

    def _forward_backward(self, tokens: Tensor, record: bool) -> dict[str, Tensor]:
        self.optimizer.zero_grad(set_to_none=True)
        parts = tokens.split(self._micro)
        total: dict[str, Tensor] = {}
        for number, part in enumerate(parts):
            inputs, targets = part[:, :-1], part[:, 1:]
            with accumulate(self.model, number == len(parts) - 1), self._kernels():
                found = self.model(inputs, targets, self._documents(inputs))
                (found.loss / len(parts)).backward()
            self._load = found.mixtures.get("expert_load", torch.zeros(0)) + (self._load if number else 0)
            values = batch_statistics(found, self.spec) if record else {"train_loss": found.cross_entropy.double()}
            for name, value in values.items():
                total[name] = total.get(name, 0.0) + value / len(parts)
        return total

    def update(self, step: int) -> Tensor:
        """Make update number `step` from the gradients that are there; their norm before clipping.

        A gradient that is not finite leaves everything as it was, on one device and under `ddp`.
        """
        optim.set_learning_rate(self.optimizer, self.learning_rate(step))
        return self._update() if self._graphs is None else self._graphs.update()

    def _update(self) -> Tensor:
        norm = optim.clipped_step(self.optimizer, self.config.clip_norm)
        if self.spec.moe is not None and self.spec.moe.router_bias and self.config.router_bias_rate > 0:
            self._balance(torch.isfinite(norm))
        return norm

    def learning_rate(self, step: int) -> float:
        """Of update number `step`."""
        return optim.learning_rate(self.config, self.n_steps, step)

    def gradient_norm(self) -> Tensor:
        """The global norm of the gradients that are there."""
        return optim.gradient_norm(self.optimizer)

    def _balance(self, good: Tensor) -> None:
        loads = self.world.sum(self._load)
        layers = [block for block in self.plain.transformer.layers if self.spec.is_moe(block.layer)]  # type: ignore[attr-defined]
        for block, load in zip(layers, loads, strict=True):
            bias = block.get_parameter("moe.router_bias")
            moved = balance_bias(bias.data, load, self.config.router_bias_rate)
            bias.data.copy_(torch.where(good, moved, bias.data))

    def _mean_over_ranks(self, record: dict[str, Tensor]) -> dict[str, Tensor]:
        if self.world.size == 1:
            return record
        flat = self.world.mean(torch.cat([value.flatten() for value in record.values()]))
        parts = flat.split([value.numel() for value in record.values()])
        return {name: part.view(record[name].shape) for name, part in zip(record, parts, strict=True)}

    def _documents(self, tokens: Tensor) -> Tensor | None:
        return document_ids(tokens, self.corpus.document_end) if self.config.document_mask else None

    def _kernels(self) -> contextlib.AbstractContextManager[Any]:
        if self.world.device.type != "cuda":
            return contextlib.nullcontext()
        return sdpa_kernel(ATTENTION_KERNELS, set_priority=True)

    # Measurements -----------------------------------------------------------------------------------------------------

    def _evaluation_windows(self, name: str) -> np.ndarray:
        """The windows of an evaluation (n, length + 1): as many tokens at either length."""
        config = self.config
        length = config.evaluation_length if name == "fixed_length" else config.n_tokens
        wanted = max(1, config.n_evaluation_sequences * config.evaluation_length // length)
        return evaluation_windows(self.corpus, wanted, length)

    def _own_parts(self, windows: np.ndarray) -> tuple[Tensor, ...]:
        """The windows that fall to this process, in parts: as many on every process, because a sharded model is
        gathered for each.
        """
        ids, size = torch.from_numpy(windows), self.world.size
        if len(ids) < size:  # each reads all of them
            ids = ids.repeat_interleave(size, dim=0)
        at_once = max(1, self._micro * self.config.n_tokens // windows.shape[1])
        n_parts = min(len(ids) // size, -(-len(ids) // (size * at_once)))
        return ids[self.world.rank :: size].tensor_split(n_parts)

    @torch.no_grad()
    def evaluate(self) -> dict[str, np.ndarray]:
        """validation_loss, nats per token, at the fixed evaluation length and at the training length; where the bytes
        of the tokens are known (`data.mean_bytes`), bits_per_byte = nats / ln 2 / bytes of the tokens predicted.
        """
        self.model.eval()
        losses = []
        for parts in self._windows:
            total = torch.zeros(2, dtype=torch.float64, device=self.world.device)  # of losses, of windows
            for part in parts:
                tokens = part.to(self.world.device)
                with self._kernels():
                    found = self.model(tokens[:, :-1], tokens[:, 1:], self._documents(tokens[:, :-1]))
                total += torch.stack((found.cross_entropy.double() * len(part), total.new_tensor(len(part))))
            total = self.world.sum(total)
            losses.append(total[0] / total[1])
        self.model.train()
        found = {"validation_loss": torch.stack(losses).cpu().numpy()}
        if None not in self._bytes_per_token:
            found["bits_per_byte"] = found["validation_loss"] / math.log(2) / np.array(self._bytes_per_token)
        return found

    def probe(self) -> dict[str, np.ndarray]:
        """The variables of `OF_PROBE` of the network as it is; gradients must be there."""
        documents = self._documents(self._probe_tokens)
        found = probe(self.plain.transformer, self._probe_tokens, documents=documents, compute_dtype=self.dtype)
        found |= weight_statistics(self.plain.transformer, self.spec)
        found |= gradient_norms(self.plain.transformer, self.spec)
        return {name: value.cpu().numpy() for name, value in found.items() if name in OF_PROBE}

    def snapshot(self) -> WeightSnapshot:
        """The weights before an update, for `update_ratios`."""
        return WeightSnapshot(self.plain.transformer, self.spec)

    def update_ratios(self, before: WeightSnapshot) -> dict[str, np.ndarray]:
        """update_ratio of every matrix since the snapshot."""
        return {name: value.cpu().numpy() for name, value in before.update_ratios(self.plain.transformer).items()}


def _load_initial(model: TrainingModel, initial: Mapping[str, Tensor]) -> None:
    wanted = model.transformer.state_dict()
    for name in sorted({*wanted, *initial}):
        found = tuple(initial[name].shape) if name in initial else "absent"
        expected = tuple(wanted[name].shape) if name in wanted else "absent"
        require(found == expected, ArgumentError, f"initial.{name}", found, "not that of the spec", f"{expected}")
    model.transformer.load_state_dict(dict(initial))


@contextlib.contextmanager
def deterministic_kernels(wanted: bool) -> Iterator[None]:
    """Deterministic algorithms alone, while the context lasts: the same bits at every repetition on one device."""
    if not wanted:
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # asked for by cuBLAS
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def is_finite(record: Mapping[str, np.ndarray]) -> bool:
    """Whether loss and gradient norm of a record are finite."""
    return all(math.isfinite(float(record[name])) for name in ("train_loss", "gradient_norm"))
