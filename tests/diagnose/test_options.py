"""Settings: every default passes, and other kinds of values do not."""

from __future__ import annotations

from typing import Any

import pytest

from varprop.diagnose.options import OPTIONS, require_options
from varprop.errors import ArgumentError


def test_defaults_are_in_their_domain() -> None:
    require_options({name: option.default for name, option in OPTIONS.items()})
    require_options({"fit_share": 0.9, "permutation_pairs": 4, "n_probes": 0})


@pytest.mark.parametrize(
    "options, message",
    [
        ({"probes": 3}, "options='probes' is unknown; expected some of"),
        ({"n_probes": -1}, "n_probes=-1 is outside the domain; expected 0 or an integer >= 4"),
        ({"n_probes": 1.5}, "n_probes=1.5 is outside"),
        ({"n_probes": True}, "n_probes=True is outside"),
        ({"n_probes": "many"}, "n_probes='many' is outside"),
        ({"fit_share": float("nan")}, "fit_share=nan is outside the domain; expected a number between 0 and 1"),
        ({"fit_share": float("inf")}, "fit_share=inf is outside"),
        ({"fit_share": 0}, "fit_share=0 is outside"),
        ({"fit_share": 1}, "fit_share=1 is outside"),
        ({"n_probes": 3}, "n_probes=3 is outside"),
        ({"permutation_pairs": 3}, "permutation_pairs=3 is outside the domain; expected 0 or an integer >= 4"),
        ({"jacobian_stderr": 1.0}, "jacobian_stderr=1.0 is outside the domain; expected a number >= 0 and below 1"),
        ({"permutation_stderr": -0.1}, "permutation_stderr=-0.1 is outside"),
        ({"usefulness_loss_ratio": float("inf")}, "usefulness_loss_ratio=inf is outside"),
        ({"pruning_tokens": 0}, "pruning_tokens=0 is outside the domain; expected an integer >= 1"),
        ({"in_sample": 1}, "in_sample=1 is outside the domain; expected true or false"),
    ],
)
def test_other_values_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        require_options(options)
