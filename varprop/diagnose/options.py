"""Settings of single scores: name -> default and meaning. The one list that Python and the command line read."""

from __future__ import annotations

from typing import Any

OPTIONS: dict[str, tuple[Any, str]] = {
    "n_probes": (16, "random directions of a Jacobian estimate; 0 = exact, one product for each neuron"),
    "jacobian_tokens": (1024, "tokens of the Jacobian: so many whole sequences"),
    "permutation_pairs": (48, "pairs of layers that are swapped, stratified by their distance; 0 = all"),
    "permutation_tokens": (1024, "tokens that a swap is first tried on: so many whole sequences"),
    "permutation_stderr": (0.0, "relative standard error of each pair that more sequences are added for; 0 = none are"),
    "fit_share": (0.5, "share of the sequences that a linear replacement is fitted on; the others evaluate it"),
    "usefulness_loss_ratio": (1.1, "a layer is useful where replacing it multiplies the loss by more than this"),
    "pruning_tokens": (1024, "tokens that the greedy order of removal is chosen on: so many whole sequences"),
    "most_removed": (0, "layers that are removed one after the other; 0 = half of them"),
}
