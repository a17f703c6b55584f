"""`varprop export | import | evaluate`; bad input is one line and exit code 2, and nothing is written."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import lzma
import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.command_line import assert_refused
from tests.corpus.conftest import END, save_tokenizer
from varprop import hf, presets, results
from varprop.__main__ import main
from varprop.corpus import load_corpus, tokenize
from varprop.corpus.load import TOKENIZER
from varprop.nn import Transformer
from varprop.train import TrainConfig, fit

SPEC = presets.tiny().with_fields({"d_model": 16, "n_layers": 1, "d_ff": 24, "masks.q.density": 0.5})


def run(*words: object) -> int:
    return main([str(word) for word in words])


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run directory `run` and a corpus directory `corpus`, with texts cut from the embedded novel."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("VARPROP_CORPUS", raising=False)
    hf.save_run(Transformer(SPEC, seed=1), "run")
    (tmp_path / "run" / "run.json").write_text(json.dumps({"config": {"n_tokens": 64}, "corpus": {"document_end": 0}}))
    shutil.copy(TOKENIZER, "run/tokenizer.json")
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    manifest = {}
    novel = np.asarray(load_corpus().validation[:9000]).astype("<u2")
    for name in ("books.train", "books.val", "docs.train", "docs.val"):
        (corpus / f"{name}.u16.xz").write_bytes(lzma.compress(novel.tobytes()))
        manifest[f"{name}.u16.xz"] = {"sha256_of_u16": hashlib.sha256(novel.tobytes()).hexdigest()}
    (corpus / "manifest.json").write_text(json.dumps(manifest))
    rows = [f"p{i % 2}\tt\tThe {w} is here.\tThe {w} are here." for i, w in enumerate(["cat", "dog", "sun", "sea"])]
    (corpus / "blimp.tsv.xz").write_bytes(lzma.compress("\n".join(rows).encode()))
    return tmp_path


def test_the_main_path(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("export", "run", "--out", "model") == 0
    assert capsys.readouterr().out == "folded into the weights: masks.q\nwrote model, a llama\n"
    config = json.loads((folder / "model" / "config.json").read_text())
    assert (config["max_position_embeddings"], config["bos_token_id"], config["pad_token_id"]) == (64, 0, 1)
    assert run("import", "model", "--out", "again") == 0
    assert hf.load("again").spec == SPEC.with_fields({"masks.q": None, "init": presets.tiny().init})
    capsys.readouterr()
    small = ("--corpus-dir", "corpus", "--lengths", "32,64", "--n-sequences", 4, "--n-items", 20)
    for model, out in (("run", "r.nc"), ("model", "m.nc"), ("again", "a.nc")):
        assert run("evaluate", model, *small, "--out", out) == 0
        assert len(capsys.readouterr().out.splitlines()) == 4 + 4 + 1 + 1 + 2 + 1
    dataset = results.load("r.nc")
    assert dict(dataset.loss.sizes) == {"text": 2, "length": 2}
    assert dataset.blimp_pairs.item() == 4
    assert dataset.cloze_items.values.tolist() == [20, 20]
    for name in ("m.nc", "a.nc"):
        np.testing.assert_allclose(results.load(name).loss, dataset.loss, rtol=1e-6)
        assert results.load(name).blimp_accuracy.equals(dataset.blimp_accuracy)
    assert run("evaluate", "run", *small, "--precision", "bfloat16", "--tasks", "loss", "--out", "b.nc") == 0
    rounded = results.load("b.nc")
    assert rounded.attrs["dtype"] == "bfloat16"
    assert 0 < abs(rounded.loss / dataset.loss - 1).max() < 0.01


def test_a_task_of_lm_eval(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("evaluate", "--write-lm-eval-task", "task", "--corpus-dir", "corpus") == 0
    assert "lm_eval --model hf --tasks blimp_local --include_path task" in capsys.readouterr().out
    assert len(list((folder / "task").iterdir())) == 5


@pytest.mark.parametrize(
    "words,message",
    [
        (["export", "nothing", "--out", "x"], "directory='nothing' is a folder without config.json or model.saf"),
        (["export", "run", "--out", "run"], "out='run' is there already; expected a new or an empty folder"),
        (["export", "run", "--out", "x", "--dtype", "int8"], "dtype='int8' is unknown; expected one of float32"),
        (["export", "run", "--out", "x", "--max-positions", "-1"], "max_positions=-1 is too small"),
        (["import", "run", "--out", "run"], "is there already"),
        (["evaluate", "--out", "x"], "model=None is missing"),
        (["evaluate", "run", "--tasks", "loss,mmlu", "--out", "x"], "tasks='mmlu' is unknown; expected some of loss"),
        (["evaluate", "run", "--tasks", "blimp", "--out", "x"], "corpus_dir=None is missing; expected --corpus-dir"),
        (["evaluate", "run", "--tasks", "blimp", "--corpus-dir", "y", "--out", "x"], "corpus='y' is without blimp"),
        (["evaluate", "run", "--tasks", "loss", "--out", "x"], "corpus='books' is not in the package; expected corpus"),
        (["evaluate", "run", "--lengths", "long", "--out", "x"], "lengths='long' is no list of integers"),
        (["evaluate", "run", "--tasks", "loss", "--texts", "embedded", "--lengths", 10**6, "--out", "x"], "n_tokens="),
        (
            ["evaluate", "run", "--lengths", "0", "--out", "x"],
            "lengths='0' is outside the domain; expected integers >=",
        ),
        (["evaluate", "run", "--lengths", "32,-5", "--out", "x"], "lengths='32,-5' is outside the domain"),
        (["evaluate", "run", "--seed", "-1", "--out", "x"], "seed=-1 is outside the domain; expected an integer >= 0"),
        (["export", "", "--out", "x"], "'' is empty; expected a path"),
        (["export", "run", "--out", ""], "--out: '' is empty; expected a path"),
        (["import", "", "--out", "x"], "'' is empty; expected a path"),
        (["import", "run", "--out", ""], "--out: '' is empty; expected a path"),
        (["evaluate", "run", "--device", "tpu9", "--out", "x"], "device='tpu9' is not available"),
        (["evaluate", "--write-lm-eval-task", "t"], "corpus_dir=None is missing"),
        (["evaluate", "--write-lm-eval-task", "run", "--corpus-dir", "corpus"], "out='run' is there already"),
    ],
)
def test_bad_input(words: list[object], message: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert_refused(words, message, folder, capsys)


def test_another_tokenizer(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hf.export("run", "model", tokenizer=hf.load_tokenizer())
    path = folder / "model" / "tokenizer.json"
    changed = path.read_text().replace('"<|pad|>"', '"<|other|>"')
    path.write_text(changed)
    assert run("evaluate", "model", "--corpus-dir", "corpus", "--out", "x.nc") == 2
    assert "text='books' is of another tokenizer than the model; expected a text of the" in capsys.readouterr().err
    assert run("evaluate", "model", "--tasks", "blimp", "--corpus-dir", "corpus", "--out", "x.nc") == 0
    small = Transformer(SPEC.with_fields(vocab_size=50))
    Path("run/model.safetensors").unlink()
    hf.save_run(small, "run")
    assert run("evaluate", "run", "--corpus-dir", "corpus", "--out", "y.nc") == 2
    assert "vocab_size=50 is too small for a tokenizer of 8192 entries" in capsys.readouterr().err


CONFIG = TrainConfig(n_steps=2, warmup_steps=1, batch_size=2, n_tokens=16, evaluation_length=16, device="cpu")


def test_a_run_on_a_text_of_ones_own(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its tokenizer, whose end of a document is not id 0, goes with the run, the model and the evaluation."""
    rules = save_tokenizer(folder / "bytes.json")
    text = "".join(f"Some café number {i}, and what is in it.\n{END}" for i in range(40))
    (folder / "text.txt").write_text(text)
    tokenize(["text.txt"], "bytes.json", "own", validation_fraction=0.4)
    config = dataclasses.replace(CONFIG, corpus="own", n_evaluation_sequences=8)
    trained = fit(SPEC.with_fields({"vocab_size": 257, "masks.q": None}), config, run_dir="mine", progress=False)
    assert run("export", "mine", "--out", "model") == 0
    exported = hf.tokenizer_of("model")
    assert exported is not None
    assert exported[0].get_vocab() == rules.get_vocab()
    assert exported[1] == hf.SpecialTokens(256, 256, 256)
    assert run("import", "model", "--out", "again") == 0
    own = ("--corpus-dir", "corpus", "--texts", "own", "--lengths", 16)
    capsys.readouterr()
    for model in ("mine", "model", "again"):
        assert run("evaluate", model, *own, "--tasks", "loss,blimp", "--out", f"{model}.nc") == 0
        assert run("evaluate", model, "--corpus-dir", "corpus", "--tasks", "blimp,cloze", "--out", "x.nc") == 2
        assert "text='books' is of another tokenizer than the model" in capsys.readouterr().err
    first = results.load("mine.nc")
    for model in ("model", "again"):
        found = results.load(f"{model}.nc")
        np.testing.assert_allclose(found.loss, first.loss, rtol=1e-6)
        np.testing.assert_allclose(found.bits_per_byte, first.bits_per_byte, rtol=1e-6)
        assert found.blimp_accuracy.equals(first.blimp_accuracy)
    held_out = load_corpus("own")
    n = first.loss_sequences.item()
    targets = held_out.validation[1 : n * 16 + 1]
    bits = first.loss.item() / np.log(2) * len(targets) / np.count_nonzero(targets != 256)  # every other is a byte
    assert first.bits_per_byte.item() == pytest.approx(bits, rel=1e-6)
    assert trained.attrs["bits_per_byte"] == "exact"


def test_a_run_on_plain_ids_has_no_tokenizer(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.asarray(load_corpus().validation[:2000]).astype("<u2").tofile("ids.u16")
    config = dataclasses.replace(CONFIG, corpus="ids.u16", n_evaluation_sequences=2)
    fit(SPEC.with_fields({"masks.q": None}), config, run_dir="plain", progress=False)
    line = (
        "varprop: tokenizer='plain/tokenizer.json' is missing; expected that of the run's corpus, or --no-tokenizer\n"
    )
    capsys.readouterr()
    assert run("export", "plain", "--out", "model") == 2
    assert capsys.readouterr().err == line
    assert run("export", "plain", "--out", "model", "--no-tokenizer") == 0
    assert hf.tokenizer_of("model") is None
    alone = ("--tasks", "loss", "--texts", "ids.u16", "--lengths", 16)
    assert run("evaluate", "plain", *alone, "--out", "plain.nc") == 0
    assert "bits_per_byte" not in results.load("plain.nc")
    for words in (("--tasks", "blimp"), ("--tasks", "loss", "--texts", "embedded")):
        capsys.readouterr()
        assert run("evaluate", "model", "--corpus-dir", "corpus", *words, "--out", "x.nc") == 2
        error = capsys.readouterr().err
        assert "tokenizer='model/tokenizer.json' is missing; expected that of the run's corpus, or the loss of" in error
        assert error.count("\n") == 1


def test_a_model_that_does_not_say_what_begins_a_text(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("export", "run", "--out", "model") == 0
    (folder / "model" / "tokenizer_config.json").write_text("{}")
    command = ("evaluate", "model", "--corpus-dir", "corpus", "--out", "x.nc")
    assert run(*command, "--tasks", "blimp") == 2
    error = capsys.readouterr().err
    assert "file='model/tokenizer_config.json' is without bos_token and eos_token; expected a token that" in error
    assert run(*command, "--tasks", "loss", "--lengths", 64) == 0
