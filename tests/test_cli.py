"""The command line end to end, and every bad input: one clear line, exit code 2, nothing written."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from varprop import results, simulate
from varprop.__main__ import main
from varprop.train import TrainConfig

SMALL = ["--spec", "tiny", "--set", "d_model=32", "--set", "n_layers=2", "--set", "d_ff=48"]


def run(*arguments: str) -> int:
    return main([str(a) for a in arguments])


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def predicted(folder: Path) -> Path:
    assert run("predict", *SMALL, "--n-tokens", 8, "--out", "p.nc") == 0
    return folder / "p.nc"


@pytest.fixture
def simulated(folder: Path) -> Path:
    assert run("simulate", *SMALL, "--n-tokens", 8, "--n-networks", 8, "--out", "s.nc") == 0
    return folder / "s.nc"


def test_help_of_simulate_says_the_default_method_and_what_needs_it(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run("simulate", "--help")
    text = " ".join(capsys.readouterr().out.split())
    assert "slower in narrow models (default explicit)" in text
    assert "method explicit only" in text


def test_the_main_path(predicted: Path, simulated: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = run("compare", predicted, simulated, "--resolution", 10, "--out", "c.nc")
    text = capsys.readouterr().out
    check = results.load("c.nc")
    assert check.attrs["verdict"] in text
    assert code == (0 if check.attrs["verdict"] == "agrees" else 1)
    assert run("report", predicted, simulated, "--out", "r.html") == 0
    assert "<html" in Path("r.html").read_text()


def test_set_changes_the_spec(folder: Path) -> None:
    assert run("predict", *SMALL, "--set", "density=0.5", "--set", "n_kv_heads=2", "--out", "p.nc") == 0
    spec = json.loads(results.load("p.nc").attrs["spec"])
    assert spec["masks"]["q"]["density"] == 0.5
    assert spec["attention"]["n_kv_heads"] == 2


def test_spec_file_gives_the_same_as_its_preset(folder: Path) -> None:
    assert run("presets", "tiny", "--out", "spec.json") == 0
    assert run("predict", "--spec", "spec.json", "--n-tokens", 8, "--out", "a.nc") == 0
    assert run("predict", "--spec", "tiny", "--n-tokens", 8, "--out", "b.nc") == 0
    assert results.identical(results.load("a.nc"), results.load("b.nc"))


def test_presets_are_listed_and_described(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("presets") == 0
    assert "paper_dense_1b" in capsys.readouterr().out
    assert run("presets", "paper-dense-1b") == 0
    assert "1,279,854,592" in capsys.readouterr().out


def test_training_writes_one_result(folder: Path) -> None:
    options = ["n_steps=2", "batch_size=2", "n_tokens=16", "record_every=1", "warmup_steps=1"]
    arguments = [text for option in options for text in ("--config", option)]
    assert run("train", *SMALL, *arguments, "--out", "t.nc") == 0
    dataset = results.load("t.nc")
    assert dataset.attrs["source"] == "training"
    assert {"variance", "branch_correlation", "train_loss"} <= set(dataset.data_vars)


def test_help_of_train_lists_every_field_of_the_config(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run("train", "--help")
    about, _, defaults = capsys.readouterr().out.partition("Defaults (null = None):")
    for field in dataclasses.fields(TrainConfig):
        assert field.name in about
        assert f"{field.name}=" in defaults
    assert ">>>" not in about
    assert "clip_norm=1.0" in defaults
    assert "micro_batch_size=null" in defaults


def test_a_dry_run_of_a_training(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = set(folder.iterdir())
    assert run("train", "--spec", "tiny", "--dry-run", "--run-dir", "none", "--log", "jsonl") == 0
    out = capsys.readouterr().out
    assert "\nbudget: 200 updates of 8 x 128 tokens" in out
    assert out.endswith("\ncorpus embedded: 1,221,519 tokens, 114,792 held out\n")
    assert run("train", "--run", "paper-dense-1b-l16", "--dry-run") == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("lengths and vocabulary are not checked: corpus='fineweb-edu' is unknown")
    assert set(folder.iterdir()) == before


def test_simulation_of_real_text_and_of_given_arrays(folder: Path) -> None:
    options = ["--n-networks", 4, "--seed", 3]
    assert run("simulate", *SMALL, *options, "--text", 2, "--n-tokens", 8, "--out", "text.nc") == 0
    text = results.load("text.nc")
    assert (text.attrs["n_sequences"], text.attrs["n_tokens"]) == (2, 8)
    np.save("ids.npy", simulate.text_tokens(8, n_sequences=2, seed=3))
    assert run("simulate", *SMALL, *options, "--inputs", "ids.npy", "--out", "ids.nc") == 0
    assert results.identical(text, results.load("ids.nc"))


DRY = ["train", "--spec", "tiny", "--dry-run"]
BAD = [
    (["predict", "--spec", "tinny"], "preset='tinny' is unknown; expected 'tiny'?"),
    (["predict", "--spec", "tiny", "--set", "n_head=4"], "n_head is an unknown field; expected 'n_heads'?"),
    (["predict", "--spec", "tiny", "--set", "n_kv_heads=3"], "n_kv_heads=3 is not a divisor of n_heads=4"),
    (
        ["predict", "--spec", "tiny", "--set", "density=0"],
        "density=0.0 is outside the domain; expected a number in (0, 1], not below 1e-12",
    ),
    (["predict", "--spec", "tiny", "--set", "density=1.01"], "density=1.01 is outside the domain"),
    (["predict", "--spec", "tiny-moe", "--set", "top_k=9"], "top_k=9 is larger than n_experts=8"),
    (["predict", "--spec", "tiny", "--set", "density"], "--set='density' is not an assignment"),
    (["predict", "--spec", "broken.json"], "spec JSON is broken at line 1"),
    (["predict", "--spec", "missing.json"], "spec='missing.json' cannot be read"),
    (["predict", "--spec", "binary.json"], "spec='binary.json' cannot be read"),
    (["predict", "--spec", "tiny", "--n-tokens", "0"], "n_tokens=0"),
    (["predict", "--spec", "tiny", "--n-tokens", "x"], "invalid int value: 'x'"),
    (["predict", "--spec", "tiny", "--token-correlation", "1.5"], "token_correlation=1.5"),
    (["predict", "--spec", "tiny", "--token-correlation", "nan"], "token_correlation=nan"),
    (
        ["predict", "--spec", "tiny", "--n-tokens", "5000"],
        "n_tokens=5000 is too many for a position-resolved recursion",
    ),
    (["predict", "--spec", "tiny", "--out", "no/such/folder/p.nc"], "cannot be written"),
    (["predict", "--spec", "tiny", "--out", "."], "is a directory"),
    (["simulate", "--spec", "tiny", "--n-networks", "0"], "n_networks=0"),
    (["simulate", "--spec", "tiny", "--device", "abacus"], "device='abacus'"),
    (["simulate", "--spec", "tiny", "--text", "0"], "n_sequences=0 is outside the domain"),
    (["simulate", "--spec", "tiny", "--text", "100000"], "n_sequences=100000 is more than the 19086 windows"),
    (["simulate", "--spec", "tiny", "--text", "2", "--token-correlation", "0.5"], "given with inputs"),
    (["simulate", "--spec", "tiny", "--text", "2", "--corpus", "dosc"], "corpus='dosc' is unknown"),
    (["simulate", "--spec", "tiny", "--text", "2", "--inputs", "ids.npy"], "not allowed with"),
    (["simulate", "--spec", "tiny", "--inputs", "missing.npy"], "inputs='missing.npy' cannot be read"),
    (["simulate", "--spec", "tiny", "--inputs", "binary.json"], "inputs='binary.json' is no whole array"),
    (["simulate", "--spec", "tiny", "--inputs", "objects.npy"], "inputs='objects.npy' is no whole array"),
    (["simulate", "--spec", "tiny", "--inputs", "cut.npy"], "inputs='cut.npy' is no whole array"),
    (["simulate", "--spec", "tiny", "--inputs", "ids.npy", "--n-tokens", "4"], "n_tokens=4 is given with inputs"),
    (["train", "--spec", "tiny", "--config", "n_step=3"], "config='n_step' is an unknown field"),
    (["train", "--spec", "tiny", "--config", "n_steps=0"], "n_steps=0"),
    (["train", "--spec", "tiny", "--config", "learning_rate=-1"], "learning_rate=-1"),
    ([*DRY, "--config", "micro_batch_size=3"], "micro_batch_size=3 is not a divisor; expected a divisor of the 8"),
    (
        [*DRY, "--config", "evaluation_length=200000"],
        "evaluation_length=200000 is too long for a held-out",
    ),
    ([*DRY, "--set", "vocab_size=100"], "vocab_size=100 is too small; expected a vocab_size of at least 8192"),
    ([*DRY, "--config", "corpus=elsewhere", "--config", "micro_batch_size=3"], "micro_batch_size=3 is not a divisor"),
    ([*DRY, "--log", "console,foo"], "log='foo' is unknown"),
    ([*DRY, "--log", "jsonl"], "log='jsonl' is given without a run directory"),
    ([*DRY, "--grow-method", "stack"], "grow_method='stack' is given alone"),
    ([*DRY, "--grow-from", "nowhere"], "run_dir='nowhere' has no model.safetensors"),
    ([*DRY, "--out", "no/such/folder/t.nc"], "cannot be written"),
    (["compare", "missing.nc", "missing.nc"], "file='missing.nc' is missing"),
    (["compare", "truncated.nc", "truncated.nc"], "file='truncated.nc' is truncated or no netCDF-4 file"),
    (["compare", "binary.json", "p.nc"], "file='binary.json' is truncated or no netCDF-4 file"),
    (["compare", "p.nc", "nan.nc"], "is nan at"),
    (["compare", "p.nc", "other.nc"], "spec"),
    (["compare", "s.nc", "p.nc"], "n_networks=1 is too few; expected at least 2"),
    (["compare", "p.nc", "s.nc", "s.nc"], "hold one seed twice; expected independent replicates"),
    (["compare", "p.nc", "correlated.nc"], "measured token_correlation=0.9 is another; expected 0.0"),
    (["compare", "p.nc", "s.nc", "--step", "3"], "step=3 is given for a result without steps"),
    (["predict", "--spec", "tiny", "--axis", "density=1", "--axis", "density=0.5"], "is given twice"),
    (["predict", "--spec", "twice.json"], "d_model is given twice in the spec JSON"),
    (["predict", "--spec", "tiny", "--seed", "-1"], "seed=-1 is outside the domain"),
    (["predict", "--spec", "tiny", "--set", "attention=3", "--set", "n_heads=4"], "attention=3 is no part"),
    (["predict", "--spec", "tiny", "--set", "init.overrides=[1]"], "init.overrides=[1] is not a list of pairs"),
    (["predict", "--spec", "tiny", "--set", "init.gain=1" + "0" * 400], "init.gain"),
    (["predict", "--spec", "tiny", "--set", "init.gain=1e200"], "gain=1e+200 is outside the domain"),
    (["predict", "--spec", "tiny", "--set", "d_model=1" + "0" * 20], "is too large"),
    (
        ["predict", "--spec", "tiny-moe", "--set", "moe.router=sigmoid", "--set", 'init.overrides={"router":4}'],
        "logit_std=",
    ),
    (["predict", "--spec", "tiny", "--out", "pipe"], "is a directory or a device; expected a file"),
    (["predict", "--spec", "tiny", "--out", "x" * 300], "cannot be written"),
    (["predict", "--spec", "x" * 300], "is unknown"),
    (["report", "p.nc", "p.nc"], "hold one file twice"),
    (["report", "truncated.nc"], "file='truncated.nc' is truncated"),
    (["report", "p.nc", "--out", "no/such/folder/r.html"], "cannot be written"),
    (["presets", "tinny"], "preset='tinny' is unknown"),
    (["formula", "relu_kernal"], "relu_kernel"),
    (["mitigate", "--spec", "tiny", "--strength", "magic=2"], "magic"),
    (["growth", "--spec", "tiny", "--branch-correlation", "2"], "correlation=2.0 is outside the domain"),
    (["predict", "--spec", "tiny", "--method", "exact"], "method='exact' is unknown"),
    (["predict", "--spec", "tiny", "--axis", "n_layers=1,2"], "not an axis"),
    (["predikt"], "invalid choice: 'predikt'"),
    ([], "required: COMMAND"),
    (["predict"], "required: --spec"),
]


@pytest.fixture(scope="module")
def bad_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A good prediction and simulation beside broken files of every kind."""
    folder = tmp_path_factory.mktemp("bad")
    tokens = ["--n-tokens", "8"]
    assert main(["predict", *SMALL, *tokens, "--out", str(folder / "p.nc")]) == 0
    for name, extra in (("s.nc", []), ("other.nc", ["--set", "d_ff=64"])):
        assert main(["simulate", *SMALL, *extra, *tokens, "--n-networks", "8", "--out", str(folder / name)]) == 0
    whole = (folder / "p.nc").read_bytes()
    (folder / "truncated.nc").write_bytes(whole[: len(whole) // 2])
    (folder / "broken.json").write_text('{"d_model": 32,')
    (folder / "twice.json").write_text('{"d_model": 32, "d_model": 64, "n_layers": 2}')
    os.mkfifo(folder / "pipe")
    correlated = [*SMALL, *tokens, "--n-networks", "8", "--token-correlation", "0.9"]
    assert main(["simulate", *correlated, "--out", str(folder / "correlated.nc")]) == 0
    (folder / "binary.json").write_bytes(bytes(range(128, 256)))
    np.save(folder / "ids.npy", np.arange(4))
    np.save(folder / "objects.npy", np.array([None]), allow_pickle=True)
    (folder / "cut.npy").write_bytes((folder / "ids.npy").read_bytes()[:-8])
    poisoned = results.load(folder / "s.nc")
    poisoned.second_moment[3, 1, 2] = np.nan
    poisoned.to_netcdf(folder / "nan.nc", engine="h5netcdf")
    return folder


@pytest.mark.parametrize("arguments,message", BAD, ids=[" ".join(a)[-48:] or "nothing" for a, _ in BAD])
def test_bad_input_is_one_line_and_exit_code_2(
    arguments: list[str],
    message: str,
    bad_files: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(bad_files)
    before = {p: p.read_bytes() for p in bad_files.rglob("*") if p.is_file()}
    assert run(*arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("varprop: ")
    assert captured.err.count("\n") == 1
    assert message in captured.err
    assert {p: p.read_bytes() for p in bad_files.rglob("*") if p.is_file()} == before


def test_the_installed_program_exits_with_2() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "varprop", "predict", "--spec", "tinny"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr == "varprop: preset='tinny' is unknown; expected 'tiny'?\n"
