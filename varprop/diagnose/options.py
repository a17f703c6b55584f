"""Settings of single scores: name -> default and meaning. The one list that Python and the command line read."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from varprop.errors import ArgumentError, require

OPTIONS: dict[str, tuple[Any, str]] = {
    "positions": (16, "first positions whose second moment is given by itself"),
    "n_probes": (16, "random directions of a Jacobian estimate; 0 = exact, one product for each neuron"),
    "jacobian_tokens": (1024, "tokens of the Jacobian: so many whole sequences"),
    "jacobian_stderr": (0.0, "relative standard error over directions that more are added for; 0 = none are"),
    "jacobian_spectral_steps": (8, "steps of Lanczos for the spectral norm, with attention weights T x T; 0 = none"),
    "permutation_pairs": (48, "pairs of layers that are swapped, stratified by their distance; 0 = all"),
    "permutation_tokens": (1024, "tokens that a swap is first tried on: so many whole sequences"),
    "permutation_stderr": (0.0, "relative standard error of each pair that more sequences are added for; 0 = none are"),
    "fit_share": (0.5, "share of the sequences that a linear replacement is fitted on; the others evaluate it"),
    "in_sample": (False, "whether usefulness is also evaluated on the sequences of the fit, as the paper does"),
    "usefulness_loss_ratio": (1.1, "a layer is useful where replacing it multiplies the loss by more than this"),
    "expert_tokens": (1024, "tokens that single experts are ablated on: so many whole sequences"),
    "elementwise_micro_batch": (0, "released Jacobian by its method elementwise with this micro-batch; 0 = rowwise"),
    "pruning_tokens": (1024, "tokens that the greedy order of removal is chosen on: so many whole sequences"),
    "most_removed": (0, "layers that are removed one after the other; 0 = half of them"),
}


def require_options(options: Mapping[str, Any]) -> None:
    """`ArgumentError` for an unknown name, and for a value that is negative or of another kind than the default.

    >>> require_options({"n_probes": 0, "fit_share": 0.25})
    """
    for name, value in options.items():
        require(name in OPTIONS, ArgumentError, "options", name, "unknown", "some of " + ", ".join(OPTIONS))
        default = OPTIONS[name][0]
        kind, text = {
            bool: (bool, "true or false"),
            int: (int, "an integer >= 0"),
            float: ((int, float), "a number >= 0"),
        }[type(default)]
        good = (
            isinstance(value, kind) and isinstance(value, bool) == isinstance(default, bool) and 0 <= value < math.inf
        )
        require(good, ArgumentError, name, value, "outside the domain", text)
