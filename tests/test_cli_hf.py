"""`varprop export | import | evaluate`; bad input is one line and exit code 2, and nothing is written."""

from __future__ import annotations

import hashlib
import json
import lzma
import shutil
from pathlib import Path

import numpy as np
import pytest

from varprop import hf, presets, results
from varprop.__main__ import main
from varprop.corpus import load_corpus
from varprop.nn import Transformer

SPEC = presets.tiny().with_fields({"d_model": 16, "n_layers": 1, "d_ff": 24, "masks.q.density": 0.5})


def run(*words: object) -> int:
    return main([str(word) for word in words])


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run directory `run` and a corpus directory `corpus`, with texts cut from the embedded novel."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("VARPROP_CORPUS", raising=False)
    hf.save_run(Transformer(SPEC, seed=1), "run")
    (tmp_path / "run" / "run.json").write_text(json.dumps({"config": {"n_tokens": 64}}))
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
    assert json.loads((folder / "model" / "config.json").read_text())["max_position_embeddings"] == 64
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
    before = sorted(path.name for path in folder.iterdir())
    assert run(*words) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert sorted(path.name for path in folder.iterdir()) == before


def test_another_tokenizer(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hf.export("run", "model", tokenizer=hf.load_tokenizer())
    path = folder / "model" / "tokenizer.json"
    changed = path.read_text().replace('"<|pad|>"', '"<|other|>"')
    path.write_text(changed)
    assert run("evaluate", "model", "--corpus-dir", "corpus", "--out", "x.nc") == 2
    assert "tasks='loss,cloze' is given for a model of another tokenizer than the corpus" in capsys.readouterr().err
    assert run("evaluate", "model", "--tasks", "blimp", "--corpus-dir", "corpus", "--out", "x.nc") == 0
    small = Transformer(SPEC.with_fields(vocab_size=50))
    shutil.rmtree("run")
    hf.save_run(small, "run")
    assert run("evaluate", "run", "--corpus-dir", "corpus", "--out", "y.nc") == 2
    assert "vocab_size=50 is too small for a tokenizer of 8192 entries" in capsys.readouterr().err
