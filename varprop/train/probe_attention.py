"""Attention of a network's sequences, read without ever holding the probabilities of all heads.

Shape suffixes: `S` sequences, `T` tokens, `D` d_model.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from varprop.measure import AttentionStatistics, attention_statistics
from varprop.nn.attention import sequence_probabilities
from varprop.nn.linear import Weights
from varprop.spec import ModelSpec


def sequence_attention(
    y: Tensor,
    weights: Weights,
    spec: ModelSpec,
    layer: int,
    masks: Mapping[int, Tensor] | None,
    generator: torch.Generator,
) -> list[AttentionStatistics]:
    """The attention of a layer in each of the sequences, from what its branch reads, y (S, T, D).

    masks, generator: as of `nn.attention.sequence_probabilities`.
    """
    n_tokens = y.shape[-2]
    sequences = sequence_probabilities(y, weights, spec, layer, masks, generator)
    return [attention_statistics(part, n_tokens, spec.n_heads * n_tokens) for part in sequences]
