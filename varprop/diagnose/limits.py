"""How much is computed at a time: from a stated amount of memory, and less after the memory ran out."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch

from varprop.errors import LessMemoryWarning, ShortMemoryError

Result = TypeVar("Result")
HALVINGS = 6
GIBIBYTE = 2**30
DEFAULT_GIB = {"cpu": 2.0, "cuda": 4.0}
"""Memory beside the model, by type of device."""


@dataclass
class Limits:
    """memory: bytes beside the model's weights that a score may hold at a time."""

    memory: float

    @classmethod
    def of(cls, device: torch.device | str, memory_gib: float | None = None) -> Limits:
        """The default of a device, or a stated number of GiB.

        >>> Limits.of("cpu", 1.5).memory / 2**30
        1.5
        """
        kind = torch.device(device).type
        return cls(GIBIBYTE * (DEFAULT_GIB.get(kind, 2.0) if memory_gib is None else memory_gib))

    def head_tokens(self, vocab_size: int) -> int:
        """Tokens whose logits are held at a time: half of the memory, three float32 copies of the logits."""
        return max(16, math.floor(self.memory / 2 / (12 * max(vocab_size, 1))))

    def stack_variants(self, bytes_per_variant: int) -> int:
        """Streams that are held at a time: a quarter of the memory."""
        return max(1, math.floor(self.memory / 4 / bytes_per_variant))

    def batch_sequences(self, bytes_per_sequence: int) -> int:
        """Sequences of a pass whose streams are all kept: a quarter of the memory."""
        return max(1, math.floor(self.memory / 4 / bytes_per_sequence))

    def call_tokens(self, bytes_per_token: int) -> int:
        """Tokens that a layer is called on at a time: a quarter of the memory."""
        return max(1, math.floor(self.memory / 4 / bytes_per_token))

    def retried(self, compute: Callable[[], Result]) -> Result:
        """What `compute` gives; where the memory runs out it is called again with half as much stated.

        Raises `ShortMemoryError` where half a dozen halvings do not help.
        """
        for _ in range(HALVINGS):
            try:
                return compute()
            except (torch.OutOfMemoryError, RuntimeError) as error:
                if not _is_memory(error):
                    raise
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            self.memory /= 2
            gib = self.memory / GIBIBYTE
            warnings.warn(
                f"out of memory: going on with {gib:.3g} GiB beside the model", LessMemoryWarning, stacklevel=2
            )
        gib = self.memory / GIBIBYTE
        raise ShortMemoryError(f"memory={gib:.3g} GiB is still too much; expected fewer or shorter sequences at a time")


def _is_memory(error: Exception) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
