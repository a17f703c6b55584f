"""The training loop: what it records, that it learns, that it repeats, and what it refuses."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from torch.nn import functional

from varprop import results
from varprop.corpus import load_corpus
from varprop.errors import ArgumentError
from varprop.nn import Transformer
from varprop.spec import AttentionSpec, FeedForwardSpec, InitSpec, ModelSpec, MoESpec
from varprop.train import TrainConfig, fit, load_model
from varprop.train.data import batch, evaluation_windows

CPU = TrainConfig(device="cpu")


def by_hand(model: Transformer, tokens: torch.Tensor) -> dict[tuple[str, int, str], float]:
    """The statistics of a forward pass, from their definitions, in numpy loops over sequences."""
    seen: dict[tuple[int, str], np.ndarray] = {}
    with torch.no_grad():
        model.hidden(tokens, lambda layer, site, x: seen.update({(layer, site): x.double().numpy().copy()}))
    values: dict[tuple[str, int, str], float] = {}
    for (layer, site), x in seen.items():
        values["variance", layer, site] = float(np.mean([row.var() for sequence in x for row in sequence]))
        values["second_moment", layer, site] = float((x**2).mean())
        if site in ("attn_out", "mlp_out"):
            before = "resid_pre" if site == "attn_out" else "resid_mid"
            stream = seen[layer, before]
            cosines = [(s * b).sum() / np.linalg.norm(s) / np.linalg.norm(b) for s, b in zip(stream, x, strict=True)]
            values["branch_correlation", layer, site.removesuffix("_out")] = float(np.mean(cosines))
    return values


def token_correlation(model: Transformer, tokens: torch.Tensor) -> list[float]:
    """Of the stream after each layer."""
    seen: list[np.ndarray] = []
    with torch.no_grad():
        model.hidden(
            tokens, lambda _, site, x: seen.append(x.double().numpy().copy()) if site == "resid_post" else None
        )
    products = [x @ x.transpose(0, 2, 1) for x in seen]
    others = ~np.eye(tokens.shape[1], dtype=bool)
    return [float(np.mean([p[others].mean() / np.diag(p).mean() for p in each])) for each in products]


def check_record(ds: xr.Dataset, step: int, model: Transformer, tokens: torch.Tensor) -> None:
    """Sums of float32 numbers over 16 neurons, then float64 means."""
    for (name, layer, place), value in by_hand(model, tokens).items():
        along = "branch" if name == "branch_correlation" else "site"
        recorded = ds[name].sel({"step": step, "layer": layer, along: place}).item()
        assert recorded == pytest.approx(value, rel=1e-5, abs=1e-6), (name, layer, place)


@pytest.mark.parametrize("changes", [{}, {"block": "parallel"}, {"key_mask_density": 0.5}])
def test_record_equals_a_computation_by_hand(
    spec: ModelSpec, config: TrainConfig, tmp_path: Path, changes: dict[str, Any]
) -> None:
    spec, config = spec.with_fields(changes), dataclasses.replace(config, seed=2, clip_norm=None)
    ds = fit(spec, config, run_dir=tmp_path)
    corpus = load_corpus(config.corpus)
    model, trained = Transformer(spec, seed=config.seed), load_model(tmp_path)
    for step, at in ((0, model), (10, trained)):
        tokens = batch(corpus, config.seed, step, config.batch_size, config.n_tokens)
        check_record(ds, step, at, tokens[:, :-1])
        at.zero_grad()
        loss = functional.cross_entropy(at(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        norm = sum(float(p.grad.double().square().sum()) for p in at.parameters() if p.grad is not None) ** 0.5
        # float32 sums of 64 losses, and of some thousand squares
        assert ds.train_loss.sel(step=step).item() == pytest.approx(loss.item(), rel=1e-6)
        assert ds.gradient_norm.sel(step=step).item() == pytest.approx(norm, rel=1e-5)
        if not changes:  # a key mask is drawn for the sequences of a batch
            probed = torch.from_numpy(evaluation_windows(corpus, config.n_probe_sequences, config.n_tokens)[:, :-1])
            recorded = ds.token_correlation.sel(probe_step=step, site="resid_post")[0]
            np.testing.assert_allclose(recorded, token_correlation(at, probed), rtol=1e-5)


def test_evaluations_by_hand(spec: ModelSpec, config: TrainConfig, tmp_path: Path) -> None:
    """Mean over the tokens of held-out windows, at the fixed length and with as many tokens at the training length."""
    config = dataclasses.replace(config, evaluation_length=6, n_evaluation_sequences=11, evaluate_every=4)
    ds = fit(spec, config, run_dir=tmp_path)
    assert ds.evaluation_step.values.tolist() == [0, 4, 8, 10]
    assert ds.validation_loss.dims == ("seed", "evaluation_step", "evaluation")
    assert ds.evaluation.values.tolist() == ["fixed_length", "training_length"]
    assert ds.evaluation_length.values.tolist() == [[6, 16]]
    validation = load_corpus(config.corpus).validation
    for step, model in ((0, Transformer(spec, seed=0)), (10, load_model(tmp_path))):
        for column, (length, count) in enumerate(((6, 11), (16, 4))):  # 66 tokens, 64 tokens
            n_windows = (len(validation) - 1) // length
            starts = [i * n_windows // count * length for i in range(count)]
            ids = torch.tensor(np.stack([validation[s : s + length + 1].astype(np.int64) for s in starts]))
            loss = functional.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()).item()
            assert ds.validation_loss.sel(evaluation_step=step)[0, column].item() == pytest.approx(loss, rel=1e-6)


def test_labels_and_attributes(spec: ModelSpec, config: TrainConfig) -> None:
    config = dataclasses.replace(config, seed=5, probe_every=3, evaluate_every=7)
    ds = fit(spec, config)
    results.validate(ds)
    assert ds.step.values.tolist() == [0, 4, 8, 10]
    assert ds.probe_step.values.tolist() == [0, 3, 6, 9, 10]
    assert ds.update_step.values.tolist() == [0, 3, 6, 9]  # the last state makes no update
    assert ds.evaluation_step.values.tolist() == [0, 7, 10]
    assert ds.seed.values.tolist() == [5]
    assert ds.tokens_seen.values.tolist() == [[0, 256, 512, 640]]
    assert ds.variance.dims == ("seed", "step", "layer", "site")
    assert ds.branch_correlation.dims == ("seed", "step", "layer", "branch")
    assert ds.token_correlation.dims == ("seed", "probe_step", "layer", "site")
    assert ds.update_ratio.dims == ("seed", "update_step", "layer", "matrix")
    assert "bits_per_byte" not in ds  # the tokeniser of a plain file is not known
    assert ds.attrs["source"] == "training"
    assert ModelSpec.from_json(ds.attrs["spec"]) == spec
    assert TrainConfig.from_json(ds.attrs["config"]) == config
    assert ds.attrs["corpus_sha256"] == load_corpus(config.corpus).sha256
    assert (ds.attrs["seed_entropy"], ds.attrs["n_tokens"], ds.attrs["end_condition"]) == ("5", 16, "complete")
    assert ds.attrs["initial"] == ""


def test_same_seed_same_result_and_another_seed_another(spec: ModelSpec, config: TrainConfig) -> None:
    first = fit(spec, config)
    assert results.identical(first, fit(spec, config))
    other = fit(spec, dataclasses.replace(config, seed=1))
    assert float(other.train_loss[0, 0]) != float(first.train_loss[0, 0])


def test_recording_does_not_change_the_run(spec: ModelSpec, config: TrainConfig) -> None:
    often = fit(spec, dataclasses.replace(config, record_every=1))
    seldom = fit(spec, dataclasses.replace(config, record_every=5, probe_every=5, evaluate_every=5))
    assert (
        often.sel(step=[0, 5, 10])
        .drop_dims(["probe_step", "update_step", "evaluation_step"])
        .equals(seldom.drop_dims(["probe_step", "update_step", "evaluation_step"]))
    )
    for name in ("validation_loss", "token_correlation"):
        dimension = seldom[name].dims[1]
        assert often[name].sel({dimension: [0, 10]}).equals(seldom[name].sel({dimension: [0, 10]}))


def test_overfits_one_batch(spec: ModelSpec, tmp_path: Path) -> None:
    """A text that repeats 16 distinct tokens: each decides the next, which the network learns by heart."""
    tokens = np.random.default_rng(0).permutation(32)[:16]
    np.tile(tokens, 40).astype("<u2").tofile(tmp_path / "repeated.u16")
    config = dataclasses.replace(CPU, n_steps=150, batch_size=1, n_tokens=16, learning_rate=1e-2, warmup_steps=5)
    config = dataclasses.replace(config, evaluation_length=16)
    ds = fit(spec, dataclasses.replace(config, corpus=str(tmp_path / "repeated.u16")))
    assert float(ds.train_loss[0, 0]) > np.log(16)
    assert float(ds.train_loss[0, -1]) < 0.05


def test_loss_falls_on_the_embedded_text() -> None:
    spec = ModelSpec(
        d_model=32,
        n_layers=2,
        attention=AttentionSpec(n_heads=2),
        feed_forward=FeedForwardSpec(d_ff=64),
        init=InitSpec(embedding_std=0.2),  # logits of order one: the first loss is near ln 8192 = 9.01
    )
    config = dataclasses.replace(CPU, n_steps=20, warmup_steps=2, learning_rate=1e-2, n_evaluation_sequences=2)
    ds = fit(spec, config)
    # measured: 2.3 to 2.5 nats below, seeds 0 to 4
    assert (ds.validation_loss[0, -1] < ds.validation_loss[0, 0] - 1.0).all()
    corpus, lengths = load_corpus(), [config.evaluation_length, config.n_tokens]
    assert corpus.token_bytes is not None
    assert ds.attrs["bits_per_byte"] == "exact"
    for column, (length, n) in enumerate(zip(lengths, (2, 2 * lengths[0] // lengths[1]), strict=True)):
        n_bytes = corpus.token_bytes[evaluation_windows(corpus, n, length)[:, 1:]].mean()
        bits = ds.validation_loss[0, :, column] / np.log(2) / n_bytes
        np.testing.assert_allclose(ds.bits_per_byte[0, :, column], bits, rtol=1e-12)
        assert abs(n_bytes / corpus.bytes_per_token - 1) > 1e-3


MOE = {"feed_forward": None, "moe": MoESpec(n_experts=4, top_k=2, d_expert=16, n_shared_experts=1)}


@pytest.mark.parametrize(
    "changes",
    [
        MOE,
        {**MOE, "routing": "expert_choice", "router_bias": True},
        {"n_kv_heads": 1},
        {"density": 0.5},
        {"norm.placement": "post"},
        {"norm.placement": "peri", "norm.kind": "layer", "norm.bias": True},
        {"residual.rule": "deepnorm", "norm.placement": "post"},
        {"norm.final": False, "tied_embeddings": False},
        {"attention": None},
        {"feed_forward": None},
        {"key_mask_density": 0.5},
        {"sink_logit": True, "logit_softcap": 20.0},
        {"attention.pattern": "window", "window_pattern": [4, 0]},
    ],
    ids=lambda changes: ",".join(changes),
)
def test_other_architectures_train(spec: ModelSpec, config: TrainConfig, changes: dict[str, Any]) -> None:
    ds = fit(spec.with_fields(changes), dataclasses.replace(config, n_steps=6, record_every=3))
    assert np.isfinite(ds.train_loss).all()
    assert np.isfinite(ds.variance.sel(layer=slice(1, None))).all()
    assert len(np.unique(ds.train_loss)) == 3


def test_masked_entries_stay_without_effect(spec: ModelSpec, config: TrainConfig, tmp_path: Path) -> None:
    spec = spec.with_fields(density=0.5)
    fit(spec, dataclasses.replace(config, weight_decay=0.0), run_dir=tmp_path)
    before, after = Transformer(spec, seed=0).state_dict(), load_model(tmp_path).state_dict()
    masked = [name for name in before if name.endswith("_mask")]
    assert masked
    for name in masked:
        weight = name.removesuffix("_mask")
        assert torch.equal(before[name], after[name])
        removed = ~before[name]
        assert torch.equal(before[weight][removed], after[weight][removed])
        assert not torch.equal(before[weight][~removed], after[weight][~removed])


def test_bfloat16_is_near_float32(spec: ModelSpec, config: TrainConfig) -> None:
    wide = fit(spec, dataclasses.replace(config, precision="float32"))
    narrow = fit(spec, dataclasses.replace(config, precision="bfloat16"))
    assert narrow.attrs["dtype"] == "bfloat16"
    # before the first update; a product rounded to 8 bits is off by 2^-9 of itself, sums of them by less than 2 %
    for name in ("train_loss", "variance"):
        np.testing.assert_allclose(narrow[name][0, 0], wide[name][0, 0], rtol=0.02)
    assert not narrow.equals(wide)


def test_bad_input(spec: ModelSpec, config: TrainConfig) -> None:
    with pytest.raises(ArgumentError, match="vocab_size=16 is too small; expected a vocab_size of at least 32"):
        fit(spec.with_fields(vocab_size=16), config)
    with pytest.raises(ArgumentError, match="device='cuda:77' is not available"):
        fit(spec, dataclasses.replace(config, device="cuda:77"))
    with pytest.raises(ArgumentError, match="device='tpuu' is not available"):
        fit(spec, dataclasses.replace(config, device="tpuu"))
    with pytest.raises(ArgumentError, match="n_tokens=250 is too long for a held-out text of 200 tokens"):
        fit(spec, dataclasses.replace(config, n_tokens=250))
    with pytest.raises(ArgumentError, match="evaluation_length=200 is too long for a held-out text of 200 tokens"):
        fit(spec, dataclasses.replace(config, evaluation_length=200))
    with pytest.raises(ArgumentError, match="corpus='nope' is unknown"):
        fit(spec, dataclasses.replace(config, corpus="nope"))


def test_progress_bar_only_on_a_terminal(
    spec: ModelSpec, config: TrainConfig, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fit(spec, config)
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "")
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    fit(spec, config, progress=False)
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("TERM", "xterm")
    fit(spec, config, progress=True)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "10/10" in captured.err
    assert "loss" in captured.err


@pytest.mark.long
def test_compiled_run_agrees(spec: ModelSpec, config: TrainConfig) -> None:
    plain = fit(spec, config)
    compiled = fit(spec, dataclasses.replace(config, compile=True))
    # ten updates of a float32 network: sums in another order, amplified by training
    np.testing.assert_allclose(compiled.train_loss, plain.train_loss, rtol=1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("compiled", [False, True])
def test_cuda_agrees_with_cpu(spec: ModelSpec, config: TrainConfig, tmp_path: Path, compiled: bool) -> None:
    cpu = fit(spec, config)
    cuda = fit(
        spec, dataclasses.replace(config, device="cuda", precision="float32", compile=compiled), run_dir=tmp_path
    )
    # ten updates of a float32 network: sums in another order, amplified by training
    np.testing.assert_allclose(cuda.train_loss, cpu.train_loss, rtol=1e-3)
    np.testing.assert_allclose(cuda.variance[:, 0, 1:], cpu.variance[:, 0, 1:], rtol=1e-4)
    auto = fit(spec, dataclasses.replace(config, device="auto"))
    assert (auto.attrs["device"], auto.attrs["dtype"]) == ("cuda", "bfloat16")
    np.testing.assert_allclose(auto.train_loss[:, 0], cpu.train_loss[:, 0], rtol=0.02)
