"""Settings of single scores: default, meaning and domain by name. Python and the command line both read this list."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from varprop.errors import ArgumentError, require


class Domain(NamedTuple):
    """Values that a setting takes. holds: whether a value of the right kind is one; text: what is expected."""

    text: str
    holds: Callable[[Any], bool]


class Option(NamedTuple):
    """A setting; its kind is that of the default."""

    default: Any
    meaning: str
    domain: Domain


FLAG = Domain("true or false", lambda _: True)
COUNT = Domain("an integer >= 0", lambda value: value >= 0)
POSITIVE = Domain("an integer >= 1", lambda value: value >= 1)
SEVERAL = Domain("0 or an integer >= 4", lambda value: value == 0 or value >= 4)
ERROR = Domain("a number >= 0 and below 1", lambda value: 0 <= value < 1)
SHARE = Domain("a number between 0 and 1, neither of them", lambda value: 0 < value < 1)
RATIO = Domain("a number > 0", lambda value: 0 < value < math.inf)

OPTIONS = {
    "positions": Option(16, "first positions whose second moment is given by itself", POSITIVE),
    "n_probes": Option(16, "random directions of a Jacobian estimate; 0 = exact, a product for each neuron", SEVERAL),
    "jacobian_tokens": Option(1024, "tokens of the Jacobian: so many whole sequences", POSITIVE),
    "jacobian_stderr": Option(
        0.0, "relative standard error over directions that more are added for; 0 = none are", ERROR
    ),
    "jacobian_spectral_steps": Option(
        8, "steps of Lanczos for the spectral norm, with attention weights T x T; 0 = none", COUNT
    ),
    "permutation_pairs": Option(48, "pairs of layers that are swapped, stratified by their distance; 0 = all", SEVERAL),
    "permutation_tokens": Option(1024, "tokens that a swap is first tried on: so many whole sequences", POSITIVE),
    "permutation_stderr": Option(
        0.0, "relative standard error of each pair that more sequences are added for; 0 = none are", ERROR
    ),
    "fit_share": Option(
        0.5, "share of the sequences that a linear replacement is fitted on; the others evaluate it", SHARE
    ),
    "in_sample": Option(
        False, "whether usefulness is also evaluated on the sequences of the fit, as the paper does", FLAG
    ),
    "usefulness_loss_ratio": Option(
        1.1, "a layer is useful where replacing it multiplies the loss by more than this", RATIO
    ),
    "expert_tokens": Option(1024, "tokens that single experts are ablated on: so many whole sequences", POSITIVE),
    "elementwise_micro_batch": Option(
        0, "released Jacobian by its method elementwise with this micro-batch; 0 = rowwise", COUNT
    ),
    "pruning_tokens": Option(
        1024, "tokens that the greedy order of removal is chosen on: so many whole sequences", POSITIVE
    ),
    "most_removed": Option(0, "layers that are removed one after the other; 0 = half of them", COUNT),
}


def require_options(options: Mapping[str, Any]) -> None:
    """`ArgumentError` for an unknown name, and for a value of another kind than the default or outside the domain.

    >>> require_options({"n_probes": 0, "fit_share": 0.25})
    """
    for name, value in options.items():
        require(name in OPTIONS, ArgumentError, "options", name, "unknown", "some of " + ", ".join(OPTIONS))
        default, _, domain = OPTIONS[name]
        kind = (int, float) if isinstance(default, float) else type(default)
        right_kind = isinstance(value, kind) and isinstance(value, bool) == isinstance(default, bool)
        require(right_kind and domain.holds(value), ArgumentError, name, value, "outside the domain", domain.text)


def with_defaults(options: Mapping[str, Any]) -> dict[str, Any]:
    """Every setting: as given, or its default.

    >>> with_defaults({"n_probes": 4})["n_probes"], with_defaults({})["n_probes"]
    (4, 16)
    """
    return {name: option.default for name, option in OPTIONS.items()} | dict(options)
