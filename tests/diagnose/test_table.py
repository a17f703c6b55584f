"""The table: what is there is shown, with its standard errors, in lines of one width."""

from __future__ import annotations

from typing import Any

import numpy as np

from varprop import results
from varprop.diagnose.table import profile, table

ABOUT: dict[str, Any] = {"source": "checkpoint", "spec_json": "", "spec_id": "", "n_tokens": 8}


def test_layers_sites_and_scalars() -> None:
    sites = np.full((3, 5), 2.0)
    sites[0, :4] = np.nan
    sites[:, 4] = [1.0, 1.5, 12345.678]
    variables = {
        "variance": (("layer", "site"), sites),
        "variance_stderr": (("layer", "site"), sites / 100),
        "block_influence": (("layer",), [np.nan, 0.25, 0.125]),
        "causal_score": ((), 0.5),
        "causal_score_stderr": ((), 0.0123),
        "n_used": ((), 7),
        "causal_effect": (("source_layer", "target_layer"), np.ones((3, 3))),
    }
    assert table(results.new(variables, **ABOUT)).splitlines() == [
        "layer             variance  influence",
        "    0             1 ± 0.01           ",
        "    1          1.5 ± 0.015       0.25",
        "    2  1.235e+04 ± 1.2e+02      0.125",
        "causal_score 0.5 ± 0.012",
        "n_used 7",
        "(± one standard error, over sequences)",
    ]


def test_columns_say_what_they_are() -> None:
    variables: dict[str, Any] = {
        name: (("layer",), [np.nan, value])
        for name, value in (("relative_update", 0.5), ("jacobian_norm", 0.25), ("jacobian_norm_stderr", 0.01))
    }
    variables |= {name: (("layer",), [np.nan, 16.0]) for name in ("jacobian_n_probes", "permutation_layer_score")}
    variables["ablation_loss_ratio"] = (("layer", "intervention"), [[np.nan, np.nan], [7.0, 3.0]])
    variables["intervention"] = (("intervention",), ["mean", "skip"])
    labels = variables.pop("intervention")[1]
    lines = table(results.new(variables, coords={"intervention": labels}, **ABOUT)).splitlines()
    assert lines[:2] == [
        "layer  update / stream  permutation  skipped loss ratio  |J - I| / d",
        "    1              0.5           16                   3  0.25 ± 0.01",
    ]
    assert lines[2:] == [
        "(± one standard error, over sequences; of the permutation score also over the pairs that were drawn; "
        "of |J - I| / d over the random directions, where it was estimated with some)"
    ]


def test_scores_without_a_column_name_their_variables() -> None:
    variables = {"weight_norm": (("layer", "matrix"), np.ones((2, 3)))}
    found = results.new(variables | {"weight_norm_stderr": variables["weight_norm"]}, **ABOUT)
    assert table(found) == "no table of these scores; variables: weight_norm"


def test_without_layers() -> None:
    assert table(results.new({"loss_mean": ((), 3.0)}, **ABOUT)) == "loss_mean 3"


def test_what_is_not_known_is_left_out() -> None:
    """The causal score of the last layer, and standard errors of one sequence."""
    variables = {
        "causal_layer_score": (("layer",), [np.nan, 0.5, np.nan]),
        "causal_layer_score_stderr": (("layer",), [np.nan, np.nan, np.nan]),
        "causal_score": ((), 0.5),
        "causal_score_stderr": ((), np.nan),
    }
    result = results.new(variables, **ABOUT)
    assert profile(result, "causal_layer_score") == ["", "0.5", ""]
    assert "±" not in table(result)
