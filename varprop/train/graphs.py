"""The kernels of a step, recorded once as two CUDA graphs and launched together: no gaps between them.

Two, because measurements look at weights and gradients between the backward pass and the update.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class StepGraphs:
    """Forward and backward pass, and update, of batches of one shape. Recording runs nothing.

    forward_backward, update: what is recorded; all that they change is on the device, and they wait for nothing. What
    they return is overwritten by the next call. Memory of the passes stays taken between steps.
    """

    def __init__(
        self, tokens: Tensor, forward_backward: Callable[[Tensor], dict[str, Tensor]], update: Callable[[], Tensor]
    ) -> None:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        self._tokens = tokens.clone()
        self._passes, self._update = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._passes, capture_error_mode="thread_local"):
            self._record = forward_backward(self._tokens)
        with torch.cuda.graph(self._update, pool=self._passes.pool(), capture_error_mode="thread_local"):
            self._norm = update()

    def forward_backward(self, tokens: Tensor) -> dict[str, Tensor]:
        """Leave the gradients of a batch in the parameters; what is recorded of it."""
        self._tokens.copy_(tokens, non_blocking=True)
        self._passes.replay()
        return self._record

    def update(self) -> Tensor:
        """Make the update from the gradients that are there; their norm before clipping."""
        self._update.replay()
        return self._norm
