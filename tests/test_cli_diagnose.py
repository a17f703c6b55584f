"""`varprop diagnose`: a result, its table and figure; a stopped command goes on; bad input is one line."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.command_line import assert_refused
from tests.diagnose.checkpoints import change_config, save_model
from varprop import diagnose, hf, presets, results
from varprop.__main__ import main
from varprop.corpus.load import TOKENIZER
from varprop.diagnose import causal
from varprop.diagnose.open import open_model
from varprop.diagnose.text import sequences
from varprop.errors import LeftOutWarning, ShortMemoryError
from varprop.nn import Transformer

SMALL = ("--scores", "causal", "--n-sequences", 4, "--length", 16, "--device", "cpu", "--data", "text.txt")


def run(*words: object) -> int:
    return main(["diagnose", *map(str, words)])


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    save_model(tmp_path / "model")
    (tmp_path / "text.txt").write_text("".join(f"{i:03} " for i in range(200)))
    return tmp_path


def test_the_result_is_that_of_python(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("model", *SMALL, "--out", "x.nc", "--figure", "x.png", "--seed", 3) == 0
    said = capsys.readouterr()
    assert said.err == ""
    assert said.out.startswith("layer ")
    assert said.out.endswith("wrote x.nc\nwrote x.png\n")
    assert sorted(path.name for path in folder.iterdir()) == ["model", "text.txt", "x.nc", "x.png"]
    model, tokens = open_model("model", device="cpu")
    batch = sequences("text.txt", tokens, vocab_size=260, n_sequences=4, length=16, seed=3)
    expected = diagnose.measure(model, batch, scores=["causal"], seed=3)
    found = results.load("x.nc")
    assert found.equals(expected)
    assert found.attrs["model"] == "model"
    assert found.attrs["data"] == "text.txt"
    assert f"causal_score {expected.causal_score.item():.4g} ± {expected.causal_score_stderr.item():.2g}\n" in said.out


def test_settings_arrive(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}
    own = diagnose.measure

    def watch(*arguments: Any, **options: Any) -> Any:
        seen.update(options, batch=arguments[1])
        return own(*arguments, **options)

    monkeypatch.setattr(diagnose, "measure", watch)
    words = ("--memory", 0.5, "--option", "n_probes=4", "--option", "fit_share=0.25", "--dtype", "bfloat16")
    assert run("model", *SMALL, *words, "--out", "x.nc", "--begin", "yes", "--keep-parts") == 0
    assert (seen["memory_gib"], seen["options"]) == (0.5, {"n_probes": 4, "fit_share": 0.25})
    assert (seen["batch"].tokens[:, 0] == 256).all()
    assert results.load("x.nc").attrs["dtype"] == "bfloat16"
    assert [path.name for path in Path("x.nc.parts").glob("*.safetensors")] == ["causal-0-4.safetensors"]


def test_the_spot_check_stores_how_far_the_types_are_apart(folder: Path) -> None:
    assert run("model", *SMALL, "--out", "x.nc", "--spot-check") == 0
    found = results.load("x.nc")
    assert 0 < abs(found.causal_score_precision_gap.item()) < 0.1
    assert "causal_score_stderr_precision_gap" not in found


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_command_goes_on(
    number: int, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("model", *SMALL, "--memory", 0.00005)  # one sequence at a time
    assert run(*words, "--out", "whole.nc") == 0
    capsys.readouterr()
    own, calls = causal._of_batch, []

    def stopping(at: int) -> Callable[..., Any]:
        def of_batch(*arguments: Any) -> Any:
            calls.append(at)
            if len(calls) == at:
                os.kill(os.getpid(), number)
            return own(*arguments)

        return of_batch

    handlers = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)]
    monkeypatch.setattr(causal, "_of_batch", stopping(3))
    assert run(*words, "--out", "x.nc") == 3
    expected = "varprop: stopped; what is done is kept in x.nc.parts, and the same command goes on from there\n"
    assert capsys.readouterr().err == expected
    assert not Path("x.nc").exists()
    assert len(list(Path("x.nc.parts").glob("*.safetensors"))) == 2
    assert handlers == [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)]
    calls.clear()
    monkeypatch.setattr(causal, "_of_batch", stopping(0))
    assert run(*words, "--out", "x.nc") == 0
    assert len(calls) == 2
    assert results.identical(results.load("x.nc"), results.load("whole.nc"))
    assert not Path("x.nc.parts").exists()


def test_parts_of_another_measurement_are_left_alone(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("model", *SMALL, "--out", "x.nc", "--keep-parts") == 0
    Path("x.nc").unlink()
    capsys.readouterr()
    words = ["diagnose", "model", *SMALL, "--out", "x.nc", "--seed", 1]
    assert_refused(words, "parts='x.nc.parts' is of another measurement", folder, capsys)
    assert_refused(words, "delete the folder, or choose another (--out)", folder, capsys)
    assert len(list(Path("x.nc.parts").iterdir())) == 2


def test_bad_input_found_late_leaves_no_parts(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["diagnose", "model", *SMALL[2:], "--out", "x.nc"]
    late = ["--scores", "causal,usefulness", "--n-sequences", 1]  # found when the causal part is done
    assert_refused([*words, *late], "sequences=1 is too few for usefulness", folder, capsys)
    assert main(list(map(str, [*words, "--scores", "causal"]))) == 0


def test_what_was_done_is_kept_where_the_memory_did_not_suffice(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def short(session: Any) -> Any:
        raise ShortMemoryError("memory=1 is too little; expected more")

    monkeypatch.setitem(diagnose.SCORES, "usefulness", short)
    assert run("model", *SMALL[2:], "--scores", "causal,usefulness", "--out", "x.nc") == 2
    assert len(list(Path("x.nc.parts").glob("*.safetensors"))) == 1


def test_scores_without_a_panel_or_a_column(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.warns(LeftOutWarning, match=r"--figure='x.png' is not written: the scores weights have no panel"):
        assert run("model", *SMALL[2:], "--scores", "weights", "--out", "x.nc", "--figure", "x.png") == 0
    said = capsys.readouterr().out
    assert said.startswith("no table of these scores; variables: weight_norm, ")
    assert said.endswith("wrote x.nc\n")
    assert not Path("x.png").exists()


def test_the_help_lists_scores_and_settings(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run("--help")
    said = capsys.readouterr().out
    for name, score in diagnose.SCORES.items():
        assert f"\n  {name}: {str(score.__doc__).splitlines()[0]}\n" in said
    assert "defects (this alone)" in said
    assert "\n  n_probes=16: random directions" in said


def test_a_run_of_ours_and_an_encoder(folder: Path) -> None:
    hf.save_run(Transformer(presets.tiny().with_fields(n_layers=2)), "run")
    shutil.copy(TOKENIZER, "run/tokenizer.json")
    save_model(folder / "encoder", "bert", begins=True)
    save_model(folder / "headless", "headless", begins=True)
    for name in ("run", "encoder", "headless"):
        assert run(name, *SMALL, "--out", f"{name}.nc") == 0
        assert results.load(f"{name}.nc").causal_score.item() > 0


def test_scores_that_a_model_lacks_something_for_are_left_out(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_model(folder / "headless", "headless", begins=True)
    short = ("headless", *SMALL[2:], "--out", "x.nc", "--option", "jacobian_tokens=16")
    with pytest.warns(LeftOutWarning) as said:
        assert run(*short, "--scores", "standard") == 0
    wrong = "is left out: architecture='BertModel' is without logits"
    lines = [str(one.message) for one in said if one.category is LeftOutWarning]
    assert [line.split()[0] for line in lines] == ["usefulness", "permutation"]
    assert all(wrong in line for line in lines)
    found = results.load("x.nc")
    assert {"variance", "block_influence", "causal_score", "jacobian_norm"} <= set(found)
    assert run(*short, "--scores", "usefulness") == 2
    assert "is without logits (usefulness); expected" in capsys.readouterr().err


def nan(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model" / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(tensors, folder / "model" / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    "words, message",
    [
        (["--scores", "magic"], "scores='magic' is unknown; expected some of"),
        (["--scores", "causal,magic"], "scores='magic' is unknown"),
        (["--option", "n_probes=many"], "n_probes='many' is outside the domain"),
        (["--option", "n_probes=3"], "n_probes=3 is outside the domain; expected 0 or an integer >= 4"),
        (
            ["--scores", "pruning", "--option", "most_removed=9"],
            "most_removed=9 is outside the domain; expected 0 to 3, the model",
        ),
        (["--option", "probes=1"], "options='probes' is unknown"),
        (["--option", "n_probes"], "--option='n_probes' is not an assignment"),
        (["--length", "65"], "length=65 is beyond the model's positions; expected at most 64"),
        (["--n-sequences", "50"], "n_sequences=50 is more than the 49 windows of 16 tokens in the text"),
        (["--data", "nowhere.txt"], "data='nowhere.txt' cannot be read"),
        (["--data", "ids.npy"], "token id=260 is beyond the vocabulary; expected ids below 260"),
        (["--out", "none/x.nc"], "out='none/x.nc' cannot be written"),
        (["--figure", "x.doc"], "figure='x.doc' is of an unknown kind"),
        (["--memory", "0"], "memory=0.0 is outside the domain; expected a number of GiB > 0"),
        (["--dtype", "int8"], "invalid choice: 'int8'"),
        (["--device", "abacus"], "device='abacus' is not available"),
        (["--definition", "other"], "invalid choice: 'other'"),
    ],
)
def test_bad_input(words: list[str], message: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save("ids.npy", np.full(200, 260))
    assert_refused(["diagnose", "model", *SMALL, "--out", "x.nc", *words], message, folder, capsys)


def test_the_figure_does_not_replace_the_result(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["diagnose", "model", *SMALL, "--out", "x.png", "--figure", "./x.png"]
    assert_refused(words, "figure='x.png' is the file of the result (--out); expected another name", folder, capsys)


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda folder: change_config(folder / "model", auto_map={"AutoModel": "m.M"}), "remote code"),
        (lambda folder: (folder / "model" / "model.safetensors").rename(folder / "model" / "a.bin"), "pickled weights"),
        (lambda folder: change_config(folder / "model", vocab_size=200), "tensor='lm_head.weight' is of shape"),
        (nan, "activations='NaN or infinite' is first after layer 2; expected finite"),
        (lambda folder: (folder / "model" / "tokenizer.json").unlink(), "has no tokenizer.json"),
    ],
)
def test_bad_models(
    spoil: Callable[[Path], object], message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil(folder)
    assert_refused(["diagnose", "model", *SMALL, "--out", "x.nc"], message, folder, capsys)
