"""The probe against float64 numpy definitions, and against what simulations record under the same names."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from varprop import results
from varprop.measure.tokens import QUANTILES
from varprop.nn import Transformer, block_forward
from varprop.nn.init import make_generator
from varprop.results import SITES
from varprop.simulate.recorder import Recorder
from varprop.spec import ModelSpec, MoESpec
from varprop.train import probe as probing
from varprop.train.probe import probe
from varprop.train.weights import WeightSnapshot, gradient_norms, weight_statistics

N_SEQUENCES, N_TOKENS = 3, 9
MOE = {"feed_forward": None, "moe": MoESpec(n_experts=4, top_k=2, d_expert=16, n_shared_experts=1)}
VARIANTS: list[dict[str, Any]] = [
    {},
    {"block": "parallel", "n_heads": 4, "n_kv_heads": 2, "embedding_scale": 3.0},
    {"norm.placement": "peri", "norm.kind": "layer", "norm.bias": True, "density": 0.5},
    {"norm.placement": "lns", "sink_logit": True, "logit_softcap": 2.0},
    {"norm.placement": "post", "attention.qk_norm": "head"},
    {"norm.placement": "reordered", "pattern": "window", "window": 3},
    {"key_mask_density": 0.5},
    {"key_mask_density": 0.5, "key_mask_place": "after_softmax", "pattern": "full"},
    MOE,
    {**MOE, "routing": "expert_choice", "moe.router": "sigmoid", "block": "parallel"},
]


def tokens() -> torch.Tensor:
    return torch.randint(32, (N_SEQUENCES, N_TOKENS), generator=make_generator(7))


def network(spec: ModelSpec, seed: int = 1) -> Transformer:
    """In float64, with weights so large that attention is far from uniform and logits are capped."""
    model = Transformer(spec.with_fields({"init.gain": 1.5}), seed=seed, dtype=torch.float64)
    for name, parameter in model.named_parameters():
        if "gain" in name or "sink" in name:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=make_generator(seed, len(name))).double()
    return model


def read(model: Transformer, rows: torch.Tensor | None = None, **options: Any) -> dict[str, torch.Tensor]:
    """The probe in the type of the weights."""
    dtype = next(model.parameters()).dtype
    return probe(model, tokens() if rows is None else rows, **{"compute_dtype": dtype, **options})


class Observed:
    """Streams, attention probabilities and gates of the forward pass of one sequence after another, in numpy."""

    def __init__(self, model: Transformer, spec: ModelSpec) -> None:
        self.streams: list[dict[tuple[int, str], np.ndarray]] = []
        self.seen: list[dict[tuple[int, str], np.ndarray]] = []
        recorder = Recorder(spec, N_TOKENS, N_SEQUENCES, "cpu")
        with torch.no_grad():
            for row in tokens():
                self.streams.append({})
                self.seen.append({})
                self._run(model, spec, row[None])
            self._record(recorder)
        self.simulated = recorder.arrays()

    def _run(self, model: Transformer, spec: ModelSpec, row: torch.Tensor) -> None:
        def record(layer: int, site: str, x: torch.Tensor) -> None:
            self.streams[-1][layer, site] = x[0].double().numpy().copy()

        def observe(layer: int, what: str, values: torch.Tensor) -> None:
            self.seen[-1][layer, what] = values[0].double().numpy().copy()

        x = model.get_parameter("embed")[row] * spec.embedding_scale
        record(0, "resid_post", x)
        for layer, block in enumerate(model.layers, start=1):
            generator = make_generator(block.seed, layer, probing.KEY_MASK_STREAM)  # type: ignore[arg-type]
            x = block_forward(x, block.weights(), spec, layer, record, generator, observe)  # type: ignore[operator]

    def _record(self, recorder: Recorder) -> None:
        """Sequences as the networks of a simulation."""
        for key in self.streams[0]:
            recorder(*key, torch.from_numpy(np.stack([one[key] for one in self.streams])))
        for key in self.seen[0]:
            if key[1] in ("attention", "gates"):
                recorder.observe(*key, torch.from_numpy(np.stack([one[key] for one in self.seen])))

    def stream(self, layer: int, site: str) -> np.ndarray:
        """(S, T, D)."""
        return np.stack([one[layer, site] for one in self.streams])


@pytest.mark.parametrize("changes", VARIANTS, ids=lambda changes: ",".join(changes) or "plain")
def test_probe_equals_the_definitions(spec: ModelSpec, changes: dict[str, Any]) -> None:
    """In float64, to the rounding of sums in another order."""
    spec = spec.with_fields(changes)
    model = network(spec)
    found = {name: value.numpy() for name, value in read(model, chunk=1).items()}
    seen = Observed(model, spec)
    layers = range(1, spec.n_layers + 1)
    for layer, site in seen.streams[0]:
        x, at = seen.stream(layer, site), (layer, SITES.index(site))
        others = x[:, 1:].reshape(-1, x.shape[-1])  # no sinks but the first positions in a network like this
        for name, values in (("second_moment", (others**2).mean(axis=-1)), ("variance", others.var(axis=-1))):
            np.testing.assert_allclose(found[f"{name}_quantile"][at], np.quantile(values, QUANTILES), rtol=1e-9)
        gap = others - others.mean(axis=-1, keepdims=True)
        skewness = (gap**3).mean(axis=-1) / others.var(axis=-1) ** 1.5
        kurtosis = (gap**4).mean(axis=-1) / others.var(axis=-1) ** 2 - 3
        assert found["skewness_median"][at] == pytest.approx(np.median(skewness), rel=1e-9, abs=1e-9)
        assert found["excess_kurtosis_median"][at] == pytest.approx(np.median(kurtosis), rel=1e-9, abs=1e-9)
        assert found["sink_second_moment"][at] == pytest.approx((x[:, 0] ** 2).mean(), rel=1e-9)
    assert found["sink_count"] == N_SEQUENCES
    increments = {0: seen.stream(0, "resid_post")}
    increments |= {k: seen.stream(k, "attn_out") + seen.stream(k, "mlp_out") for k in layers}
    for k in range(spec.n_layers + 1):
        for j in range(spec.n_layers + 1):
            expected = float((increments[k] * increments[j]).mean())
            assert found["block_overlap"][k, j] == pytest.approx(expected, rel=1e-9, abs=1e-12)
            for number, site in enumerate(("attn_out", "mlp_out")):
                if j and k:
                    expected = float((seen.stream(k, site) * seen.stream(j, site)).mean())
                    assert found["branch_overlap"][number, k, j] == pytest.approx(expected, rel=1e-9, abs=1e-12)
                else:
                    assert np.isnan(found["branch_overlap"][number, k, j])
    for layer in layers:
        p = np.stack([one[layer, "attention"] for one in seen.seen])  # (S, N, T, T)
        entropy = -(p * np.log(np.where(p > 0, p, 1.0))).sum(axis=-1)
        for what, rows in (("concentration", (p**2).sum(axis=-1)), ("entropy", entropy), ("sink_mass", p[..., 0])):
            by_head = rows.mean(axis=(0, 2))
            np.testing.assert_allclose(found[f"head_{what}"][layer], by_head, rtol=1e-9, atol=1e-12)
            assert found[f"attention_{what}"][layer] == pytest.approx(by_head.mean(), rel=1e-9, abs=1e-12)
    for name in ("token_correlation", "attention_concentration", "attention_entropy"):
        np.testing.assert_allclose(found[name], seen.simulated[name].mean(axis=0), rtol=1e-9, atol=1e-12)
    if spec.moe is None:
        assert not {"gate_second_moment", "expert_load"} & set(found)
        return
    for name in ("gate_second_moment", "expert_load_concentration"):
        np.testing.assert_allclose(found[name], seen.simulated[name].mean(axis=0), rtol=1e-9)
    for layer in layers:
        active = np.stack([one[layer, "gates"] for one in seen.seen]) != 0
        load = active.sum(axis=(0, 1))
        np.testing.assert_allclose(found["expert_load"][layer], load / load.sum(), rtol=1e-12)
        logits = np.stack([one[layer, "router_logits"] for one in seen.seen])
        scores = np.exp(logits) if spec.moe.router == "softmax" else 1 / (1 + np.exp(-logits))
        scores /= scores.sum(axis=-1, keepdims=True)
        expected = -(scores * np.log(scores)).sum(axis=-1).mean()
        assert found["router_entropy"][layer] == pytest.approx(expected, rel=1e-9)


def test_chunks_do_not_change_the_numbers(spec: ModelSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of sequences, of queries and of tokens, the last of them smaller."""
    model = network(spec)
    whole = read(model)
    monkeypatch.setattr("varprop.measure.attention.CHUNK_NUMBERS", 4 * spec.n_heads * N_TOKENS)
    monkeypatch.setattr("varprop.measure.overlap.CHUNK_NUMBERS", 5 * 4 * spec.d_model)
    for chunk in (1, 2):
        for name, value in read(model, chunk=chunk).items():
            torch.testing.assert_close(value, whole[name], rtol=1e-12, atol=1e-13, equal_nan=True)


def test_block_overlaps_sum_to_the_second_moment_of_the_stream(spec: ModelSpec) -> None:
    model = network(spec)
    overlap = read(model)["block_overlap"]
    seen = Observed(model, spec)
    for layer in range(spec.n_layers + 1):
        expected = float((seen.stream(layer, "resid_post") ** 2).mean())
        assert float(overlap[: layer + 1, : layer + 1].sum()) == pytest.approx(expected, rel=1e-12)


def test_massive_activations_are_sinks_at_every_layer(spec: ModelSpec) -> None:
    """One token id with an embedding 30 times as large: its positions leave the quantiles and enter the sink mean."""
    model = network(spec.with_fields(tied_embeddings=False))
    rows = tokens()
    rows[0, 4] = rows[2, 0] = 31
    model.get_parameter("embed").data[31] *= 30
    found = read(model, rows)
    massive = rows == 31
    massive[:, 0] = True
    assert int(found["sink_count"]) == int(massive.sum()) > N_SEQUENCES
    x = model.get_parameter("embed")[rows].square().mean(dim=-1).detach()
    place = (0, SITES.index("resid_post"))
    assert float(found["sink_second_moment"][place]) == pytest.approx(float(x[massive].mean()), rel=1e-12)
    assert float(found["second_moment_quantile"][place][-1]) < float(x[massive].max()) / 100


def test_nothing_of_the_network_changes_and_it_repeats(spec: ModelSpec) -> None:
    model = network(spec)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    first, second = (read(model) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value.nan_to_num(7.0), second[name].nan_to_num(7.0))
        assert not value.requires_grad
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    assert all(parameter.grad is None for parameter in model.parameters())


def test_bfloat16_is_near(spec: ModelSpec) -> None:
    """A product of numbers rounded to 8 bits is off by 2^-8 of itself; medians of sums of them by less than 3 %."""
    model = Transformer(spec, seed=1)
    wide = read(model)
    narrow = probe(model, tokens(), compute_dtype=torch.bfloat16)
    median = QUANTILES.index(0.5)
    ratio = narrow["variance_quantile"][..., median] / wide["variance_quantile"][..., median]
    assert float((ratio - 1).nan_to_num().abs().max()) < 0.03
    assert not torch.equal(narrow["attention_entropy"][1:], wide["attention_entropy"][1:])


@pytest.mark.parametrize("changes", [{}, MOE, {"attention": None}, {"feed_forward": None}], ids=lambda c: ",".join(c))
def test_every_variable_has_its_dimensions_and_passes_the_schema(spec: ModelSpec, changes: dict[str, Any]) -> None:
    spec = spec.with_fields(changes)
    found = read(Transformer(spec))
    variables = {}
    for name, value in found.items():
        dims = probing.DIMENSIONS[name]
        assert value.dim() == len(dims)
        assert value.dtype == torch.float64
        variables[name] = (("seed", "probe_step", *dims), value.numpy()[None, None])
    about = {"spec_json": spec.to_json(), "spec_id": spec.spec_id, "n_tokens": N_TOKENS}
    made = results.new(
        variables, source="training", coords={**probing.coordinates(spec), "seed": [0], "probe_step": [0]}, **about
    )
    assert ("attention_entropy" in made) == (spec.attention is not None)
    assert ("expert_load" in made) == (spec.moe is not None)
    assert made["quantile"].values.tolist() == list(QUANTILES)
    assert made.branch_overlap.sel(branch="mlp", source_layer=1, target_layer=2).size == 1


@pytest.mark.parametrize("changes", [{}, {"pattern": "window", "window": 3}, {"pattern": "full"}], ids=str)
def test_documents_are_read_as_if_alone(spec: ModelSpec, changes: dict[str, Any]) -> None:
    """Rotary positions are relative, so a document in the middle of a sequence is the document by itself."""
    model = network(spec.with_fields(changes))
    rows, ends = tokens(), (0, 4, N_TOKENS)
    documents = torch.tensor([0] * 4 + [7] * 5, dtype=torch.int32).expand_as(rows)
    together = read(model, rows, documents=documents, chunk=2)
    for name in ("attention_concentration", "attention_entropy"):
        parts = [read(model, rows[:, i:j])[name][1:] * (j - i) / N_TOKENS for i, j in itertools.pairwise(ends)]
        torch.testing.assert_close(together[name][1:], sum(parts), rtol=1e-9, atol=0.0)
    first = read(model, rows[:, :4])["attention_sink_mass"][1:] * 4 / N_TOKENS  # none from the second document
    torch.testing.assert_close(together["attention_sink_mass"][1:], first, rtol=1e-9, atol=0.0)


def read_sharded(rank: int, n_ranks: int, store: str, spec: ModelSpec) -> None:
    """On each of the ranks: a sharded network gives bitwise what the whole one gives, and is left as it was."""
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=n_ranks)
    try:
        expected = read(Transformer(spec)) | weight_statistics(Transformer(spec), spec)
        model = Transformer(spec)
        mesh = init_device_mesh("cpu", (n_ranks,))
        for block in model.layers:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        before = WeightSnapshot(model, spec)
        found = read(model) | weight_statistics(model, spec)
        for name, value in expected.items():
            assert torch.equal(found[name].nan_to_num(7.0), value.nan_to_num(7.0)), name
        assert float(before.update_ratios(model)["update_ratio"].nansum()) == 0.0
        assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
        model(tokens()).logsumexp(dim=-1).mean().backward()
        norms = gradient_norms(model, spec)["matrix_gradient_norm"]
        whole = Transformer(spec)
        whole(tokens()).logsumexp(dim=-1).mean().backward()
        torch.testing.assert_close(norms, gradient_norms(whole, spec)["matrix_gradient_norm"], equal_nan=True)
    finally:
        distributed.destroy_process_group()


@pytest.mark.parametrize("n_ranks", [1, pytest.param(2, marks=pytest.mark.long)])
def test_sharded_over_ranks(spec: ModelSpec, tmp_path: Path, n_ranks: int) -> None:
    arguments = (n_ranks, str(tmp_path / "store"), spec.with_fields({**MOE, "density": 0.5}))
    if n_ranks == 1:
        read_sharded(0, *arguments)
    else:
        torch.multiprocessing.spawn(read_sharded, arguments, nprocs=n_ranks)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("changes", [{}, MOE], ids=lambda changes: ",".join(changes) or "plain")
def test_cuda_agrees_with_cpu(spec: ModelSpec, changes: dict[str, Any]) -> None:
    """float32: sums of some hundred products in another order, through two layers. In bfloat16 the same variables."""
    spec = spec.with_fields(changes)
    cpu, cuda = Transformer(spec), Transformer(spec, device="cuda")
    expected = read(cpu) | weight_statistics(cpu, spec)
    found = probe(cuda, tokens().cuda()) | weight_statistics(cuda, spec)
    for name, value in expected.items():
        torch.testing.assert_close(found[name].cpu(), value, rtol=1e-3, atol=1e-4, equal_nan=True, msg=name)
    narrow = probe(cuda, tokens().cuda(), compute_dtype=torch.bfloat16)
    for name, value in narrow.items():
        assert torch.equal(value.isnan(), found[name].isnan())
