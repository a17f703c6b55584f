"""What is read off tensors, once for all readers."""

from varprop.measure.attention import (
    ATTENTION_THRESHOLDS,
    QUERY_STATISTICS,
    AttentionStatistics,
    attention_statistics,
    query_statistics,
)
from varprop.measure.jacobian import jacobian_deviation, probe_jacobian_deviation, random_signs
from varprop.measure.mixing import (
    attention_concentration,
    attention_entropy,
    balance_bias,
    expert_load,
    expert_load_concentration,
    gate_second_moment,
    load_balance_loss,
    router_entropy,
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
from varprop.measure.outliers import largest_energy_share, max_to_median, outlier_share
from varprop.measure.overlap import overlap_sums
from varprop.measure.tokens import QUANTILES, TokenMoments, sink_positions, token_moments, token_quantiles
from varprop.measure.weights import (
    effective_density_participation,
    effective_density_threshold_tenth_rms,
    magnitude_mask_retained_variance,
    rms,
    share_above,
    spectral_norm,
    stable_rank,
)

__all__ = [
    "ATTENTION_THRESHOLDS",
    "BRANCH_STREAM",
    "QUANTILES",
    "QUERY_STATISTICS",
    "AttentionStatistics",
    "PowerSums",
    "TokenMoments",
    "attention_concentration",
    "attention_entropy",
    "attention_statistics",
    "balance_bias",
    "branch_correlation",
    "cosine",
    "effective_density_participation",
    "effective_density_threshold_tenth_rms",
    "expert_load",
    "expert_load_concentration",
    "fourth_moment",
    "gate_second_moment",
    "jacobian_deviation",
    "largest_energy_share",
    "load_balance_loss",
    "magnitude_mask_retained_variance",
    "max_to_median",
    "outlier_share",
    "overlap_sums",
    "probe_jacobian_deviation",
    "query_statistics",
    "random_signs",
    "rms",
    "router_entropy",
    "router_z_loss",
    "second_moment",
    "share_above",
    "sink_positions",
    "spectral_norm",
    "stable_rank",
    "token_correlation",
    "token_moments",
    "token_quantiles",
    "variance",
]
