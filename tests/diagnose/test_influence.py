"""Influence of layers against float64 numpy definitions on the models' own passes."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.diagnose import zoo
from tests.diagnose.observed import MODULES, Sites, observed
from varprop.diagnose import Batch, Limits, Replay, Session, measure
from varprop.diagnose.bootstrap import stderr
from varprop.diagnose.influence import _last_change, influence
from varprop.errors import BranchesWarning

TOKENS = zoo.tokens(3, 12)
LAYERS = range(1, zoo.N_LAYERS + 1)
ENDS = {"attn": ("resid_pre", "attn_out", "resid_mid"), "mlp": ("resid_mid", "mlp_out", "resid_post")}


def found_of(model: torch.nn.Module, tokens: Tensor = TOKENS, memory: float | None = None) -> dict[str, np.ndarray]:
    session = Session(Replay(model, None if memory is None else Limits(memory)), Batch.causal(tokens))
    return {name: np.asarray(array) for name, (_, array) in influence(session).items()}


def cosine(x: np.ndarray, y: np.ndarray) -> float:
    return float(x @ y / np.sqrt((x @ x) * (y @ y)))


def size(x: np.ndarray) -> float:
    return float(np.sqrt(x @ x))


def token_by_token(*streams: np.ndarray) -> list[tuple[np.ndarray, ...]]:
    """The vectors of every token of streams (S, T, D)."""
    return list(zip(*(x.reshape(-1, x.shape[-1]) for x in streams), strict=True))


def check(found: dict[str, np.ndarray], sites: Sites, rtol: float) -> None:
    """Every statistic, in loops over layers and tokens."""

    def close(name: str, at: tuple[int, ...], value: Any) -> None:
        np.testing.assert_allclose(found[name][at], value, rtol=rtol, atol=rtol, err_msg=f"{name} {at}")

    for layer in LAYERS:
        pairs = token_by_token(sites[layer, "resid_pre"], sites[layer, "resid_post"])
        ratios = [size(y - x) / size(x) for x, y in pairs]
        close("block_influence", (layer,), np.mean([1 - cosine(x, y) for x, y in pairs]))
        close("relative_update", (layer,), np.mean(ratios))
        close("relative_update_median", (layer,), np.median(ratios))
        close("relative_update_l1", (layer,), np.mean([np.abs(y - x).sum() / np.abs(x).sum() for x, y in pairs]))
        close("update_cosine", (layer,), np.mean([cosine(y - x, x) for x, y in pairs]))
        close("update_norm", (layer,), np.mean([size(y - x) for x, y in pairs]))
        for branch, ends in enumerate(ENDS.values()):
            triples = token_by_token(*(sites[layer, site] for site in ends))
            at = layer, branch
            close("branch_influence", at, np.mean([1 - cosine(before, after) for before, _, after in triples]))
            close("branch_relative_update", at, np.mean([size(f) / size(before) for before, f, _ in triples]))
            close("branch_cosine", at, np.mean([cosine(before, f) for before, f, _ in triples]))
    for k, l in itertools.product((0, *LAYERS), repeat=2):  # noqa: E741
        x, y = sites[k, "resid_post"], sites[l, "resid_post"]
        angles = [np.arccos(min(1.0, cosine(*pair))) / np.pi if k != l else 0.0 for pair in token_by_token(x, y)]
        lasts = np.reshape(angles, x.shape[:2])[:, -1]
        close("angular_distance", (k, l), np.mean(angles))
        close("angular_distance_last", (k, l), np.mean(lasts))
        close("layer_similarity", (k, l), cosine(x.mean(axis=(0, 1)), y.mean(axis=(0, 1))))
    for layer in (0, *LAYERS):
        norms = [size(x) for (x,) in token_by_token(sites[layer, "resid_post"])]
        close("stream_norm", (layer,), np.mean(norms))


@pytest.mark.parametrize("family", MODULES)
def test_influence_is_its_definition(family: str) -> None:
    """In float64; mixtures, which have no kernels for it, in float32."""
    mixture = family in zoo.MIXTURES
    model = zoo.make(family, torch.float32 if mixture else torch.float64)
    found = found_of(model)
    check(found, observed(family, model, TOKENS), rtol=1e-5 if mixture else 1e-9)
    assert all(np.isnan(found[name][0]).all() for name in ("block_influence", "branch_cosine"))


def test_scalars_by_hand() -> None:
    """From the layers' own numbers, with eight layers so that the cosines change sign."""
    found = found_of(zoo.make("llama", torch.float64, n_layers=8))
    influences = found["block_influence"][1:]
    expected = influences.sum() ** 2 / (influences**2).sum()
    assert found["effective_layers_block_influence"] == pytest.approx(expected, rel=1e-12)
    mean_of_three = np.mean([found["update_cosine"], *found["branch_cosine"].T], axis=0)
    for name, cosines in (
        ("effective_depth_update_cosine", found["update_cosine"]),
        ("effective_depth_cosine", mean_of_three),
    ):
        changes = [layer for layer in range(1, 8) if cosines[layer] < 0 <= cosines[layer + 1]]
        assert found[name] == (changes[-1] if changes else 0)


def test_effective_depth_is_the_last_change_to_positive() -> None:
    cosines = np.array([[-1.0, 2, -1, 0, 1, -3], [1, 2, 3, 4, 5, 6], [1, -1, 2, -1, 2, 3]])
    assert _last_change(cosines).tolist() == [3, 0, 4]
    assert _last_change(cosines[:, :1]).tolist() == [0, 0, 0]


def test_a_layer_that_does_nothing_has_no_influence() -> None:
    model: Any = zoo.make("llama", torch.float64)
    layer = model.model.layers[1]
    for part in (layer.self_attn.o_proj, layer.mlp.down_proj):
        part.weight.data.zero_()
    found = found_of(model)
    for name in ("block_influence", "relative_update", "relative_update_l1", "update_norm", "update_cosine"):
        assert found[name][2] == pytest.approx(0.0, abs=1e-12), name
    assert found["angular_distance"][1, 2] == pytest.approx(0.0, abs=1e-7)  # arccos near 1: the root of the rounding
    assert found["effective_layers_block_influence"] <= zoo.N_LAYERS - 1


def test_zero_streams_give_zeros() -> None:
    """The embedding of one token is zero: its cosine and ratios at the first layer are 0, and nothing is infinite."""
    model: Any = zoo.make("llama", torch.float64)
    model.get_input_embeddings().weight.data[31] = 0
    found = found_of(model, torch.full((2, 4), 31))
    assert found["relative_update"][1] == found["update_cosine"][1] == 0
    assert found["block_influence"][1] == 1
    assert found["angular_distance"][0, 1] == 0.5


def test_batches_and_chunks_do_not_change_the_numbers() -> None:
    model = zoo.make("gpt_neox", torch.float64)
    whole, parts = found_of(model), found_of(model, memory=2.0**11)
    for name, value in whole.items():
        np.testing.assert_allclose(parts[name], value, rtol=1e-9, atol=1e-7, err_msg=name)


def test_standard_errors() -> None:
    """Of a mean over sequences the bootstrap's own noise is 3.5 %, here at four times that; of a mean vector's cosine
    against the bootstrap written out."""
    tokens = zoo.tokens(24, 6)
    model = zoo.make("gpt2", torch.float64)
    found = found_of(model, tokens)
    sites = observed("gpt2", model, tokens)
    pre, post = sites[2, "resid_pre"], sites[2, "resid_post"]
    each = [np.mean([1 - cosine(x, y) for x, y in zip(*pair, strict=True)]) for pair in zip(pre, post, strict=True)]
    expected = np.std(each, ddof=1) / np.sqrt(len(each))
    assert found["block_influence_stderr"][2] == pytest.approx(expected, rel=0.14)
    one, two = pre.mean(axis=1), post.mean(axis=1)

    def similarity(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return np.array([cosine(*pair) for pair in zip(x, y, strict=True)])

    assert found["layer_similarity_stderr"][1, 2] == pytest.approx(stderr(similarity, one, two), rel=1e-9)


def test_models_whose_branches_cannot_be_told_apart() -> None:
    model = zoo.make("opt", torch.float64)
    with pytest.warns(BranchesWarning, match="OPTForCausalLM"):
        found = measure(model, TOKENS, scores="influence")
    with torch.no_grad():
        streams = [x.numpy() for x in model(TOKENS, output_hidden_states=True).hidden_states[: zoo.N_LAYERS]]
    for layer in range(1, zoo.N_LAYERS):
        pairs = token_by_token(streams[layer - 1], streams[layer])
        expected = np.mean([1 - cosine(x, y) for x, y in pairs])
        assert float(found.block_influence[layer]) == pytest.approx(expected, rel=1e-9)
    assert not {"branch_influence", "effective_depth_cosine"} & set(found)


def test_the_result_is_valid_and_labelled() -> None:
    found = measure(zoo.make("esm"), Batch.causal(TOKENS), scores="influence")
    assert found.branch_influence.sel(layer=1, branch="attn").size == 1
    np.testing.assert_array_equal(found.angular_distance, found.angular_distance.values.T)
    assert float(found.angular_distance_stderr.max()) > 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("family", ["llama", "gpt_neox", "olmoe"])
def test_on_a_gpu_as_on_the_cpu(family: str) -> None:
    """float32 streams: rounding of some hundred products through three layers; scalars that count layers are left."""
    expected, found = found_of(zoo.make(family)), found_of(zoo.make(family).cuda())
    for name, value in expected.items():
        if not name.startswith("effective_depth"):
            np.testing.assert_allclose(found[name], value, rtol=2e-3, atol=2e-3, err_msg=name)
    narrow = found_of(zoo.make(family, torch.bfloat16).cuda())
    for name, value in expected.items():
        assert (np.isnan(narrow[name]) == np.isnan(value)).all(), name
