"""A block of networks, computed together: layer by layer, so that memory does not grow with depth.

Its random numbers depend on the entropy and on the number of the block alone, and those of a layer on the layer alone,
so that a network is bitwise the same in every run that has it, and the weights of a layer can be drawn again.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch

from varprop.errors import ReducedBatchWarning
from varprop.nn.attention import Uniform
from varprop.nn.block import block_forward
from varprop.nn.init import draw_layer, make_generator
from varprop.nn.linear import Weights
from varprop.simulate.backward import backward_statistics
from varprop.simulate.inputs import Inputs
from varprop.simulate.recorder import Recorder
from varprop.spec import ModelSpec, layer_table

MAX_NETWORKS = {"cpu": 8, "accelerator": 256}
BLOCK_NUMBERS = {"cpu": 2**26, "accelerator": 2**29}
"""Most float numbers of one layer's weights and activations that a block holds, if it has several networks."""
TOKEN_STREAM = 0
"""Key of the tokens; a layer's weights have the key of the layer, its key masks (layer, `KEY_MASKS`)."""
KEY_MASKS = 1

Draw = Callable[..., Weights]
"""`draw(spec, layer, generator, lead, device, dtype, keep)`: the weights of a layer, of the networks `keep` alone."""
LayerNumbers = Callable[[ModelSpec, int, int], int]
"""`layer_numbers(spec, layer, n_tokens)`: most random numbers of a layer that are held at a time."""


def layer_parameters(spec: ModelSpec, layer: int, n_tokens: int) -> int:
    """Numbers that `draw_layer` holds: all parameters of the layer."""
    return sum(row.n_parameters for row in layer_table(spec, layer).values())


def networks_per_block(
    spec: ModelSpec, n_tokens: int, draw_device: str = "cpu", layer_numbers: LayerNumbers = layer_parameters
) -> int:
    """Networks that are computed together: at most 8 (256 drawn on an accelerator), fewer where layers are large.

    A function of the task alone.
    """
    kind = _kind(draw_device)
    weights = max(layer_numbers(spec, layer, n_tokens) for layer in range(1, spec.n_layers + 1))
    attention = 2 * spec.attention.n_heads * n_tokens if spec.attention else 0
    inner = max(spec.feed_forward.d_ff if spec.feed_forward else 0, _slots(spec) if spec.moe else 0)
    numbers = weights + n_tokens * (attention + 4 * spec.d_model + 3 * inner)
    return max(1, min(MAX_NETWORKS[kind], BLOCK_NUMBERS[kind] // numbers))


def _kind(draw_device: str) -> str:
    return "cpu" if draw_device.startswith("cpu") else "accelerator"


def _slots(spec: ModelSpec) -> int:
    """Expert inputs and inner units a token, when the busiest expert has twice the average load."""
    assert spec.moe is not None
    return 2 * spec.moe.top_k * (spec.moe.d_expert + spec.d_model)


@dataclass
class Run:
    """What all blocks of one call of `sample` share."""

    spec: ModelSpec
    inputs: Inputs
    entropy: tuple[int, ...]
    device: str
    dtype: torch.dtype
    draw_device: str
    draw: Draw = draw_layer
    layer_numbers: LayerNumbers = layer_parameters
    backward: bool = False
    n_probes: int = 0
    """Probes of the Jacobians on the way back, 0 = exact."""
    advance: Callable[[], None] = lambda: None
    parts: int = field(default=1, init=False)
    """Pieces into which a block is cut, because memory was short before."""
    reached: int = field(default=0, init=False)
    """Steps of the block that the bar has."""

    @functools.cached_property
    def block_size(self) -> int:
        """Networks of a block."""
        return networks_per_block(self.spec, self.inputs.n_tokens, self.draw_device, self.layer_numbers)

    def generator(self, *key: int) -> torch.Generator:
        """The generator of a key: its seed is that of the CPU, its numbers are those of `draw_device`."""
        on_cpu = make_generator(self.entropy, *key)
        if self.draw_device == "cpu":
            return on_cpu
        return torch.Generator(self.draw_device).manual_seed(on_cpu.initial_seed())

    def passed(self, keep: slice, step: int) -> None:
        """Advance the bar where the last part of a block passes a layer (forward, then back) for the first time."""
        if keep.stop == self.block_size and step > self.reached:
            self.reached = step
            self.advance()

    def weights(self, block: int, layer: int, keep: slice) -> Weights:
        """Weights of a layer, of the networks `keep` of the block."""
        generator = self.generator(block, layer)
        return self.draw(self.spec, layer, generator, (self.block_size,), self.device, self.dtype, keep)

    def key_numbers(self, block: int, layer: int, keep: slice) -> Uniform:
        """Draws the key masks of a layer, of the networks `keep` of the block."""
        generator = self.generator(block, layer, KEY_MASKS)

        def draw(shape: tuple[int, ...]) -> torch.Tensor:
            whole = (self.block_size, *shape[1:])
            return torch.rand(whole, generator=generator, device=generator.device)[keep]

        return draw

    def tokens(self, block: int, keep: slice) -> torch.Tensor:
        """The stream at layer 0."""
        generator = self.generator(block, TOKEN_STREAM)
        drawn = self.inputs.draw(self.block_size, generator, first=block * self.block_size)
        return drawn[keep].to(self.device, self.dtype)


def block_statistics(run: Run, block: int) -> dict[str, np.ndarray]:
    """Statistics of the networks of one block, by name, (networks, layer, ...), float64.

    Where memory is too short, the block is cut into halves, quarters and so on, which have the same random numbers.
    """
    run.reached = 0
    while True:
        try:
            pieces = [_part(run, block, keep) for keep in _cuts(run.block_size, run.parts)]
            return {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}
        except (RuntimeError, MemoryError) as error:
            if not _is_short_of_memory(error):
                raise
            if run.parts >= run.block_size:
                raise MemoryError("out of memory with one network at a time") from None
            run.parts *= 2
            size = -(-run.block_size // run.parts)
            message = f"out of memory with {run.block_size} networks at a time; going on with {size}"
            warnings.warn(message, ReducedBatchWarning, stacklevel=2)
            release_memory()


def release_memory() -> None:
    """Give memory that torch holds in reserve back to the accelerator."""
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def _is_short_of_memory(error: Exception) -> bool:
    """On the CPU torch raises a plain RuntimeError, known by the name of the allocator."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "DefaultCPUAllocator" in str(error)


def _cuts(size: int, parts: int) -> Iterator[slice]:
    step = -(-size // parts)
    return (slice(start, min(start + step, size)) for start in range(0, size, step))


def _part(run: Run, block: int, keep: slice) -> dict[str, np.ndarray]:
    found, streams = _forward(run, block, keep)
    return found | (backward_statistics(run, block, keep, streams) if run.backward else {})


@torch.inference_mode()
def _forward(run: Run, block: int, keep: slice) -> tuple[dict[str, np.ndarray], list[torch.Tensor]]:
    """Statistics, and the stream before every layer and after the last where the way back will need it."""
    recorder = Recorder(run.spec, run.inputs.n_tokens, keep.stop - keep.start, run.device)
    x = run.tokens(block, keep)
    recorder(0, "resid_post", x)
    streams = [x] if run.backward else []
    for layer in range(1, run.spec.n_layers + 1):
        weights = run.weights(block, layer, keep)
        keys = run.key_numbers(block, layer, keep)
        x = block_forward(x, weights, run.spec, layer, recorder, keys, recorder.observe)
        del weights
        if run.backward:
            streams.append(x)
        run.passed(keep, layer)
    return recorder.arrays(), streams
