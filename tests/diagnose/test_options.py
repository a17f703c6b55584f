"""Settings: every default passes, and other kinds of values do not."""

from __future__ import annotations

from typing import Any

import pytest

from varprop.diagnose.options import OPTIONS, require_options
from varprop.errors import ArgumentError


def test_defaults_are_in_their_domain() -> None:
    require_options({name: default for name, (default, _) in OPTIONS.items()})
    require_options({"fit_share": 1, "n_probes": 0})


@pytest.mark.parametrize(
    "options, message",
    [
        ({"probes": 3}, "options='probes' is unknown; expected some of"),
        ({"n_probes": -1}, "n_probes=-1 is outside the domain; expected an integer >= 0"),
        ({"n_probes": 1.5}, "n_probes=1.5 is outside"),
        ({"n_probes": True}, "n_probes=True is outside"),
        ({"n_probes": "many"}, "n_probes='many' is outside"),
        ({"fit_share": float("nan")}, "fit_share=nan is outside the domain; expected a number >= 0"),
        ({"fit_share": float("inf")}, "fit_share=inf is outside"),
    ],
)
def test_other_values_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        require_options(options)
