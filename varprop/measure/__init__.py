"""What is read off tensors, once for all readers."""

from varprop.measure.jacobian import jacobian_deviation, probe_jacobian_deviation, random_signs
from varprop.measure.mixing import (
    attention_concentration,
    attention_entropy,
    balance_bias,
    expert_load,
    expert_load_concentration,
    gate_second_moment,
    load_balance_loss,
    router_z_loss,
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
    "balance_bias",
    "branch_correlation",
    "cosine",
    "expert_load",
    "expert_load_concentration",
    "fourth_moment",
    "gate_second_moment",
    "jacobian_deviation",
    "load_balance_loss",
    "probe_jacobian_deviation",
    "random_signs",
    "router_z_loss",
    "second_moment",
    "token_correlation",
    "variance",
]
