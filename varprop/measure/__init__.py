"""What is read off tensors, once for all readers."""

from varprop.measure.mixing import (
    attention_concentration,
    attention_entropy,
    expert_load_concentration,
    gate_second_moment,
)
from varprop.measure.moments import (
    BRANCH_STREAM,
    PowerSums,
    branch_correlation,
    cosine,
    fourth_moment,
    second_moment,
    token_correlation,
    variance,
)

__all__ = [
    "BRANCH_STREAM",
    "PowerSums",
    "attention_concentration",
    "attention_entropy",
    "branch_correlation",
    "cosine",
    "expert_load_concentration",
    "fourth_moment",
    "gate_second_moment",
    "second_moment",
    "token_correlation",
    "variance",
]
