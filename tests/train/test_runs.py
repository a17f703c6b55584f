"""The paper's runs: shapes, budgets and sweeps as its sources have them, and the twins."""

from __future__ import annotations

import dataclasses
import math

import pytest

from varprop import presets
from varprop.__main__ import main
from varprop.errors import ArgumentError, SpecError
from varprop.train import TrainConfig, fit, runs
from varprop.train.budget import n_steps
from varprop.train.config import EXECUTION_FIELDS
from varprop.train.cost import GIB, H200_MEMORY, estimate

FULL = [name for name in runs.names() if not name.endswith(runs.SMALL)]
TWINS = [name for name in runs.names() if name.endswith(runs.SMALL)]


def test_every_run_has_a_twin_and_a_source() -> None:
    assert [name + runs.SMALL for name in FULL] == TWINS
    for name in runs.names():
        run = runs.get(name)
        assert run.name == name
        assert run.source
        assert run.unstated
        assert n_steps(run.config, run.spec) > run.config.warmup_steps


@pytest.mark.parametrize(
    "name, updates",
    [
        # The released numbers of steps for 5e9 tokens at 256 sequences, and the ends of the figures' curves.
        *((f"paper-length-{t}", n) for t, n in ((256, 76_294), (512, 38_147), (1024, 19_074), (2048, 9537))),
        *((f"paper-length-{t}", n) for t, n in ((4096, 4769), (8192, 2385))),
        *((f"paper-dense-1b-l{n_layers}", 19_074) for n_layers in (12, 16, 24, 32)),
        *((f"paper-decay-{text}", 9537) for text in ("0", "0.01", "0.1", "1", "3")),
        *((name, 4769) for name in ("paper-group-1", "paper-group-16", "paper-moe-2b-400m", "paper-recipe-moe")),
    ],
)
def test_updates_of_the_figures(name: str, updates: int) -> None:
    run = runs.get(name)
    assert n_steps(run.config, run.spec) == updates


@pytest.mark.parametrize(
    "name, millions",
    [
        *(("paper-dense-1b-l12", 1011.4), ("paper-dense-1b-l24", 1816.8), ("paper-dense-1b-l32", 2353.7)),
        *(("paper-moe-7b-1b", 13_361.5), ("paper-moe-2b-400m", 1984.0), ("paper-dense-400m", 475.4)),
        ("paper-recipe-l32", 1236.7),
    ],
)
def test_sizes(name: str, millions: float) -> None:
    assert runs.get(name).spec.parameter_counts()["total"] / 1e6 == pytest.approx(millions, abs=0.05)


def test_settings_of_the_launch_script() -> None:
    for name in FULL:
        config = runs.get(name).config
        assert (config.total_tokens, config.learning_rate, config.warmup_steps) == (5_000_000_000, 1e-3, 1000)
        assert (config.schedule, config.final_lr_fraction, config.clip_norm) == ("cosine", 0.1, 1.0)
        assert (config.betas, config.eps, config.seed) == ((0.9, 0.95), 1e-8, 6198)
        assert config.document_mask is False
        layers = runs.get(name).spec.n_layers
        assert config.load_balance_weight * layers == pytest.approx(0.01)
        assert config.router_z_weight * layers == pytest.approx(0.001)


def differing(one: str, other: str) -> set[str]:
    """Fields of spec and config that two runs do not share, how they are computed apart."""
    fields = set()
    for a, b in (
        (runs.get(one).spec.to_dict(), runs.get(other).spec.to_dict()),
        (runs.get(one).config.identity(), runs.get(other).config.identity()),
    ):
        fields |= {name for name in a if a[name] != b[name]}
    return fields


@pytest.mark.parametrize("twin", ["", runs.SMALL])
def test_a_sweep_changes_one_thing(twin: str) -> None:
    for base, others, fields in (
        ("dense-1b-l16", ("dense-1b-l12", "dense-1b-l24", "dense-1b-l32"), {"n_layers"}),
        ("decay-0.1", ("decay-0", "decay-0.01", "decay-1", "decay-3"), {"weight_decay"}),
        ("length-1024", tuple(f"length-{n}" for n in (256, 512, 2048, 4096, 8192)), {"n_tokens", "batch_size"}),
        ("group-1", ("group-4", "group-16"), {"attention"}),
        ("recipe-length-4096", ("recipe-decay-0.3",), {"weight_decay"}),
        ("recipe-decay-0.3", ("recipe-group-2",), {"attention"}),
        ("recipe-group-2", ("recipe-moe",), {"feed_forward", "moe"}),
    ):
        for other in others:
            found = differing(f"paper-{base}{twin}", f"paper-{other}{twin}")
            auxiliary = {"load_balance_weight", "router_z_weight"} if "n_layers" in fields else set()
            assert found - {"batch_size"} == (fields | auxiliary) - {"batch_size"}, other


def test_the_sweep_of_lengths_keeps_sequences_in_full_and_tokens_in_the_twins() -> None:
    for n_tokens in (256, 512, 1024, 2048, 4096, 8192):
        full, twin = (runs.get(f"paper-length-{n_tokens}{end}").config for end in ("", runs.SMALL))
        assert full.batch_size == 256
        assert twin.tokens_per_step == 32_768
        assert full.evaluation_length == twin.evaluation_length == 256


@pytest.mark.parametrize("name", FULL)
def test_the_twin_keeps_what_matters(name: str) -> None:
    run, twin = runs.get(name), runs.get(name + runs.SMALL)
    full, small = run.spec, twin.spec
    assert (small.d_model, small.vocab_size, small.n_layers) == (512, 8192, full.n_layers)
    assert small.kv_group_size == full.kv_group_size
    assert small.head_dim == (32 if "group-" in name and "recipe" not in name else 128)
    assert (twin.config.n_tokens, twin.config.weight_decay) == (run.config.n_tokens, run.config.weight_decay)
    if full.moe is not None and small.moe is not None:
        assert small.moe.d_expert / 512 == full.moe.d_expert / full.d_model
        assert (small.moe.n_experts, small.moe.top_k) == (full.moe.n_experts, full.moe.top_k)
    if full.feed_forward is not None and small.feed_forward is not None:
        assert small.feed_forward.d_ff / 512 == full.feed_forward.d_ff / full.d_model
    gains = [
        {row.matrix: row.gain for row in spec.tensor_table() if row.layer == 1 and row.fan_in > 1}
        for spec in (full, small)
    ]
    for matrix in gains[0]:
        if matrix != "o" or small.n_heads * small.head_dim == 512:
            assert gains[1][matrix] == pytest.approx(gains[0][matrix]), matrix


def test_memory_and_minutes() -> None:
    """Twins take minutes on one H200; the paper's runs fit on 8, all but the largest mixtures on one."""
    for name in TWINS:
        cost = estimate(runs.get(name).spec, runs.get(name).config)
        assert cost.hours < 0.1
        assert cost.memory < H200_MEMORY
    for name in FULL:
        run = runs.get(name)
        assert estimate(run.spec, run.config, 8).memory < 0.9 * H200_MEMORY
        large = name in ("paper-moe-7b-1b", "paper-recipe-moe")
        assert (estimate(run.spec, run.config).memory > H200_MEMORY) == large
        plain = estimate(run.spec, dataclasses.replace(run.config, activation_checkpointing=False), 8)
        assert (plain.memory > H200_MEMORY) == run.config.activation_checkpointing == (name == "paper-moe-7b-1b")


def test_changes() -> None:
    run = runs.get("paper-dense-1b-l12")
    assert run.changed().config == run.config
    steps = run.changed(config={"n_steps": 5000, "micro_batch_size": 4})
    assert (steps.config.n_steps, steps.config.total_tokens) == (5000, None)
    assert set(run.config.identity()) & set(EXECUTION_FIELDS) == set()
    flops = run.changed(config={"total_flops": 1e18})
    assert (flops.config.total_flops, flops.config.total_tokens) == (1e18, None)
    with pytest.raises(ArgumentError, match=r"^config='learning_rat' is an unknown field; expected one of n_steps, "):
        run.changed(config={"learning_rat": 1})
    with pytest.raises(ArgumentError, match=r"^total_flops=1e\+18 is given with n_steps; expected one of"):
        run.changed(config={"total_flops": 1e18, "n_steps": 3})
    with pytest.raises(SpecError, match=r"^n_layer is an unknown field"):
        run.changed({"n_layer": 3})


def test_unknown_name() -> None:
    assert runs.get("PAPER_group_4") == runs.get("paper-group-4")
    with pytest.raises(ArgumentError, match=r"^run='paper-gruop-4' is unknown; expected 'paper-group-4'\?$"):
        runs.get("paper-gruop-4")
    with pytest.raises(ArgumentError, match=r"^run='x' is unknown; expected one of paper-dense-1b-l12, "):
        runs.get("x")


def test_description() -> None:
    text = runs.describe(runs.get("paper-moe-2b-400m"))
    assert "32 experts of 1536, 4 active and 1 shared" in text
    assert "1 GPU: " in text
    assert "8 GPUs: " in text
    assert "not stated: the pair: d_model 1536" in text
    assert "8 GPUs" not in runs.describe(runs.get("paper-length-8192-small"))  # 4 sequences an update
    assert "heads of 70" in runs.describe(runs.get("paper-recipe-moe")).splitlines()[-1]
    assert "heads of 70" not in runs.describe(runs.get("paper-recipe-moe-small"))
    half = runs.describe(runs.get("paper-moe-2b-400m"), mfu=0.5)
    assert "at 50% MFU" in half
    own = runs.describe(runs.Run("mine", presets.d512(), TrainConfig(batch_size=64)))
    assert own.startswith("run mine, spec ")
    assert "source" not in own


def test_table() -> None:
    lines = runs.as_markdown().splitlines()
    assert len(lines) == 2 + len(runs.names())
    assert len({line.count("|") for line in lines}) == 1
    row = next(line for line in lines if line.startswith("| paper-moe-7b-1b |"))
    cost = estimate(runs.get("paper-moe-7b-1b").spec, runs.get("paper-moe-7b-1b").config)
    assert f"| {cost.memory / GIB:.0f}* |" in row


def test_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs", "paper-group-4"]) == 0
    assert capsys.readouterr().out.strip() == runs.describe(runs.get("paper-group-4"))
    assert main(["runs", "--mfu", "0"]) == 2
    wrong = capsys.readouterr()
    assert wrong.out == ""
    assert wrong.err == "varprop: mfu=0.0 is outside the domain; expected a number in (0, 1]\n"


@pytest.mark.parametrize("name", ["paper-decay-3-small", "paper-recipe-moe-small"])
def test_a_twin_trains_when_it_is_made_smaller_still(name: str) -> None:
    """Every setting of a twin is one that `fit` takes; width, depth and length are those of a test."""
    changes = {"d_model": 32, "n_layers": 2}
    changes |= {"moe.n_experts": 8, "moe.top_k": 2, "moe.d_expert": 16} if "moe" in name else {"d_ff": 64}
    few = {"n_steps": 3, "warmup_steps": 1, "batch_size": 2, "n_tokens": 32, "evaluation_length": 32}
    here = {
        "corpus": "embedded",
        "n_evaluation_sequences": 2,
        "compile": False,
        "precision": "float32",
        "device": "cpu",
    }
    run = runs.get(name).changed(changes, {**few, **here, "n_probe_sequences": 1})
    loss = fit(run.spec, run.config, progress=False).train_loss.values[0]
    assert abs(loss[0] - math.log(8192)) < 0.1
    assert (loss < loss[0] + 0.1).all()
