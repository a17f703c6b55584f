"""Moments against float64 numpy definitions on the models' own passes, and against what training records."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from tests.diagnose import zoo
from tests.diagnose.observed import MODULES, Sites, observed
from tests.train.test_model import training_model
from tests.train.test_probe import VARIANTS, network
from varprop.diagnose import Batch, Limits, Replay, Session, measure
from varprop.diagnose.moments import moments
from varprop.diagnose.session import Variables
from varprop.errors import BranchesWarning
from varprop.measure import QUANTILES
from varprop.results import SITES
from varprop.spec import AttentionSpec, FeedForwardSpec, ModelSpec
from varprop.train.probe import DIMENSIONS, probe
from varprop.train.track import batch_statistics

from ..reference.specs import SPECS

STREAM = {"attn_out": "resid_pre", "mlp_out": "resid_mid"}
TOKENS = zoo.tokens(3, 12)
SPEC = ModelSpec(
    d_model=16, n_layers=2, vocab_size=32, attention=AttentionSpec(n_heads=2), feed_forward=FeedForwardSpec(d_ff=32)
)


def session_of(model: torch.nn.Module, tokens: Tensor = TOKENS, **options: Any) -> Session:
    return Session(Replay(model), Batch.causal(tokens), options=options)


def values(variables: Variables) -> dict[str, np.ndarray]:
    return {name: np.asarray(array) for name, (_, array) in variables.items()}


def correlation_of_tokens(x: np.ndarray) -> float:
    """Of one sequence (T, D), pair by pair."""
    pairs = [x[i] @ x[j] for i in range(len(x)) for j in range(len(x)) if i != j]
    return float(np.mean(pairs) / np.mean([token @ token for token in x]))


def mean_over_sequences(function: Any, *arrays: np.ndarray) -> float:
    return float(np.mean([function(*rows) for rows in zip(*arrays, strict=True)]))


def share_beyond_3(x: np.ndarray) -> float:
    return float(np.mean(np.abs(x - x.mean()) > 3 * x.std()))


def share_of_10_largest(x: np.ndarray) -> float:
    return float(np.sort(x.ravel() ** 2)[-10:].sum() / (x**2).sum())


def max_over_median(x: np.ndarray) -> float:
    ordered = np.sort(np.abs(x).ravel())
    return float(ordered[-1] / ordered[(len(ordered) - 1) // 2])


def cosine(x: np.ndarray, y: np.ndarray) -> float:
    return float((x * y).sum() / np.sqrt((x * x).sum() * (y * y).sum()))


def sinks_of(sites: Sites) -> np.ndarray:
    """(S, T), as the definition of `sink_positions` has it."""
    found = np.zeros(TOKENS.shape, dtype=bool)
    found[:, 0] = True
    for (_, site), x in sites.items():
        if site == "resid_post":
            power = np.sort((x**2).mean(axis=-1).ravel())
            found |= (x**2).mean(axis=-1) > 100 * power[(len(power) - 1) // 2]
    return found


def check_sites(found: dict[str, np.ndarray], sites: Sites, rtol: float) -> None:
    """Every variable along site, in loops over layers, sites and sequences."""
    sinks = sinks_of(sites)
    assert found["sink_count"] == sinks.sum()
    for (layer, site), x in sites.items():
        at = layer, SITES.index(site)
        per_token = {"second_moment": (x**2).mean(axis=-1), "variance": x.var(axis=-1)}
        expected: dict[str, Any] = {
            "token_correlation": mean_over_sequences(correlation_of_tokens, x),
            "outlier_share_z3": mean_over_sequences(share_beyond_3, x),
            "token_outlier_share_z3": np.mean([share_beyond_3(token) for one in x for token in one]),
            "outlier_energy_share_top10": mean_over_sequences(share_of_10_largest, x),
        }
        for name, of_tokens in per_token.items():
            expected[name] = of_tokens.mean()
            expected[f"{name}_without_sinks"] = of_tokens[~sinks].mean()
            expected[f"sink_{name}"] = of_tokens[sinks].mean()
            expected[f"{name}_quantile"] = np.quantile(of_tokens[~sinks], QUANTILES)
        others = x[~sinks]
        gap = others - others.mean(axis=-1, keepdims=True)
        expected["skewness_median"] = np.median((gap**3).mean(axis=-1) / others.var(axis=-1) ** 1.5)
        expected["excess_kurtosis_median"] = np.median((gap**4).mean(axis=-1) / others.var(axis=-1) ** 2 - 3)
        for name, value in expected.items():
            np.testing.assert_allclose(found[name][at], value, rtol=rtol, atol=rtol, err_msg=f"{name} {layer} {site}")
        if site in STREAM:
            value = mean_over_sequences(cosine, sites[layer, STREAM[site]], x)
            np.testing.assert_allclose(found["branch_correlation"][layer, int(site == "mlp_out")], value, rtol, rtol)
        if site == "resid_post":
            value = mean_over_sequences(max_over_median, x)
            np.testing.assert_allclose(found["massive_activation_ratio"][layer], value, rtol)
            by_position = [(x[:, t] ** 2).mean() for t in range(found["position_second_moment"].shape[1])]
            np.testing.assert_allclose(found["position_second_moment"][layer], by_position, rtol)


def check_overlaps(found: dict[str, np.ndarray], sites: Sites, rtol: float) -> None:
    n_layers = max(layer for layer, _ in sites)
    blocks = {layer: sites[layer, "attn_out"] + sites[layer, "mlp_out"] for layer in range(1, n_layers + 1)}
    blocks[0] = sites[0, "resid_post"]
    for k in range(n_layers + 1):
        for j in range(n_layers + 1):
            np.testing.assert_allclose(found["block_overlap"][k, j], (blocks[k] * blocks[j]).mean(), rtol, rtol)
            for branch, site in enumerate(("attn_out", "mlp_out")):
                overlap = (sites[k, site] * sites[j, site]).mean() if k and j else np.nan
                np.testing.assert_allclose(found["branch_overlap"][branch, k, j], overlap, rtol, rtol)


@pytest.mark.parametrize("family", MODULES)
def test_moments_are_their_definitions(family: str) -> None:
    """On streams and branches that hooks on the modules of the family saw in an ordinary pass.

    In float64; mixtures, which have no kernels for it, in float32, where only the sums of branches round otherwise.
    """
    mixture = family in zoo.MIXTURES
    model = zoo.make(family, torch.float32 if mixture else torch.float64)
    sites = observed(family, model, TOKENS)
    found = values(moments(session_of(model, positions=5)))
    check_sites(found, sites, rtol=1e-5 if mixture else 1e-9)
    check_overlaps(found, sites, rtol=1e-5 if mixture else 1e-9)
    with torch.no_grad():
        logits = model(TOKENS).logits
    for row, loss in enumerate(found["loss"]):
        expected = functional.cross_entropy(logits[row, :-1].double(), TOKENS[row, 1:])
        assert loss == pytest.approx(float(expected), rel=1e-6)  # the replay takes losses in float32
    assert found["loss_mean"] == pytest.approx(found["loss"].mean(), rel=1e-12)
    assert found["n_targets"].tolist() == [TOKENS.shape[1] - 1] * len(TOKENS)


@pytest.mark.parametrize("changes", VARIANTS, ids=lambda changes: ",".join(changes) or "plain")
def test_own_networks_give_what_the_probe_of_a_training_gives(changes: dict[str, Any]) -> None:
    """The same names, dimensions, NaN and numbers, in float64."""
    model = network(SPEC.with_fields(changes))
    tokens = TOKENS % SPEC.vocab_size
    variables = moments(session_of(model, tokens))
    expected = probe(model, tokens, compute_dtype=torch.float64)
    joined = {name for name in expected if name in variables}
    assert joined >= {"token_correlation", "sink_count", "branch_overlap", "block_overlap", "variance_quantile"}
    for name in joined:
        dims, found = variables[name]
        assert dims == DIMENSIONS[name]
        np.testing.assert_allclose(found, expected[name].numpy(), rtol=1e-9, atol=1e-12, err_msg=name)


@pytest.mark.parametrize("name", ["parallel", "moe"])
def test_own_networks_give_what_a_training_step_records(name: str) -> None:
    """Variance, second moment and branch correlation of the training batch: sums of float32."""
    spec = next(spec for key, spec in SPECS.items() if name in key)
    model = training_model(spec).eval()
    tokens = TOKENS % spec.vocab_size
    with torch.no_grad():
        expected = batch_statistics(model(tokens, tokens), spec)
    found = values(moments(session_of(model.transformer, tokens)))
    for key in ("variance", "second_moment", "branch_correlation"):
        np.testing.assert_allclose(found[key], expected[key].numpy(), rtol=1e-5, atol=1e-6, err_msg=key)


def test_batches_and_chunks_do_not_change_the_numbers() -> None:
    session = session_of(zoo.make("llama", torch.float64))
    whole = values(moments(session))
    session.replay.limits = Limits(session.replay.limits.memory / 2**20)
    assert session.batch_size() == 1
    for name, value in values(moments(session)).items():
        np.testing.assert_allclose(value, whole[name], rtol=1e-9, atol=1e-12, err_msg=name)


def test_outliers_have_errors_over_sequences() -> None:
    """Those of a mean: the standard deviation over sequences over sqrt(S).

    25 %: seven times the noise of 400 resamples, 1 / sqrt(800).
    """
    model, tokens = zoo.make("llama", torch.float64), zoo.tokens(12, 12)
    found = values(moments(session_of(model, tokens)))
    alone = [values(moments(session_of(model, row[None]))) for row in tokens]
    names = ("outlier_share_z3", "token_outlier_share_z3", "outlier_energy_share_top10", "massive_activation_ratio")
    for name in names:
        each = np.stack([one[name] for one in alone])
        expected = each.std(axis=0, ddof=1) / len(tokens) ** 0.5
        np.testing.assert_allclose(found[f"{name}_stderr"], expected, rtol=0.25, atol=1e-12, err_msg=name)


def test_massive_activations_are_kept_apart() -> None:
    """One token id with an embedding 100 times as large."""
    model: Any = zoo.make("llama", torch.float64)
    tokens = TOKENS.clone()
    tokens[tokens == 31] = 32
    tokens[0, 4] = tokens[2, 7] = 31
    model.get_input_embeddings().weight.data[31] *= 100
    found = values(moments(session_of(model, tokens)))
    assert found["sink_count"] == len(tokens) + 2
    post = 0, SITES.index("resid_post")
    x = model.get_input_embeddings()(tokens).detach().square().mean(dim=-1).numpy()
    assert found["second_moment"][post] == pytest.approx(x.mean(), rel=1e-9)
    others = np.sort(x[:, 1:].ravel())[:-2]
    assert found["second_moment_without_sinks"][post] == pytest.approx(others.mean(), rel=1e-9)
    assert found["second_moment"][post] > 100 * found["second_moment_without_sinks"][post]


def test_standard_errors_are_those_of_means_over_sequences() -> None:
    """The bootstrap's own noise with 400 resamples is 3.5 %, here at four times that."""
    tokens = zoo.tokens(24, 6)
    model = zoo.make("gpt2", torch.float64)
    found = values(moments(session_of(model, tokens)))
    sites = observed("gpt2", model, tokens)
    x = sites[2, "mlp_out"]
    expected = (x**2).mean(axis=(1, 2)).std(ddof=1) / np.sqrt(len(x))
    assert found["second_moment_stderr"][2, SITES.index("mlp_out")] == pytest.approx(expected, rel=0.14)
    assert found["loss_mean_stderr"] == pytest.approx(found["loss"].std(ddof=1) / np.sqrt(len(x)), rel=0.14)


def test_sinks_are_counted() -> None:
    assert isinstance(moments(session_of(zoo.make("llama")))["sink_count"][1], int)


def test_losses_are_weighted_by_targets() -> None:
    """Sequences with no, one and five targets: the mean over targets is not that over sequences."""
    targets = torch.full_like(TOKENS, -100)
    targets[1, 3], targets[2, 2:7] = 9, TOKENS[2, 3:8]
    model = zoo.make("gpt2", torch.float64)
    found = values(moments(Session(Replay(model), Batch(TOKENS, targets))))
    assert found["n_targets"].tolist() == [0, 1, 5]
    assert found["loss"][0] == 0
    assert found["loss_mean"] == pytest.approx((found["loss"][1] + 5 * found["loss"][2]) / 6, rel=1e-12)
    assert found["loss_mean"] != pytest.approx(found["loss"][1:].mean(), rel=1e-3)


@pytest.mark.filterwarnings("ignore::varprop.errors.BranchesWarning")
def test_streams_of_models_whose_branches_cannot_be_told_apart() -> None:
    """OPT folds tokens into one axis inside its layers: streams are right, branches absent, and the result is valid."""
    model = zoo.make("opt", torch.float64)
    with pytest.warns(BranchesWarning, match="OPTForCausalLM"):
        found = measure(model, TOKENS, scores="moments")
    assert not {"branch_correlation", "branch_overlap", "block_overlap"} & set(found)
    with torch.no_grad():
        streams = model(TOKENS, output_hidden_states=True).hidden_states
    for layer in range(zoo.N_LAYERS):
        expected = float(streams[layer].square().mean())
        assert float(found.second_moment.sel(layer=layer, site="resid_post")) == pytest.approx(expected, rel=1e-9)
        assert float(found.second_moment.sel(layer=layer + 1, site="resid_pre")) == pytest.approx(expected, rel=1e-9)
    assert bool(found.variance.sel(site=["attn_out", "resid_mid", "mlp_out"]).isnull().all())


def test_the_result_is_valid_and_labelled() -> None:
    found = measure(zoo.make("bert"), Batch.causal(TOKENS), scores="moments")
    assert found["quantile"].values.tolist() == list(QUANTILES)
    assert found.second_moment.dims == ("layer", "site")
    assert found.branch_correlation.sel(layer=1, branch="mlp").size == 1
    for name in ("second_moment", "variance", "token_correlation", "branch_correlation", "position_second_moment"):
        assert float(found[f"{name}_stderr"].max()) > 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("family", ["llama", "gpt_neox", "olmoe"])
def test_on_a_gpu_as_on_the_cpu(family: str) -> None:
    """float32 streams: rounding of some hundred products through three layers. In bfloat16 the same variables."""
    expected = values(moments(session_of(zoo.make(family))))
    found = values(moments(session_of(zoo.make(family).cuda())))
    for name, value in expected.items():
        if not name.endswith("stderr"):
            np.testing.assert_allclose(found[name], value, rtol=1e-3, atol=1e-3, err_msg=name)
    narrow = values(moments(session_of(zoo.make(family, torch.bfloat16).cuda())))
    for name, value in expected.items():
        assert (np.isnan(narrow[name]) == np.isnan(value)).all(), name
