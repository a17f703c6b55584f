"""Corpora: what is in them, what is refused, and which tokens a step sees."""

from __future__ import annotations

import hashlib
import json
import lzma
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from varprop.errors import ArgumentError
from varprop.train import cache, data
from varprop.train.data import batch, load_corpus, n_windows, validation_batches


@pytest.fixture
def corpus_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A corpus directory with a small `docs`, and an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "corpus"
    folder.mkdir()
    manifest = {}
    rng = np.random.default_rng(1)
    for part, size in (("train", 500), ("val", 100)):
        content = rng.integers(0, 8192, size).astype("<u2").tobytes()
        (folder / f"docs.{part}.u16.xz").write_bytes(lzma.compress(content))
        manifest[f"docs.{part}.u16.xz"] = {"tokens": size, "sha256_of_u16": hashlib.sha256(content).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def test_assets_match_their_manifest() -> None:
    manifest = json.loads((data.ASSETS / "manifest.json").read_text())
    for name in ("embedded.txt.xz", "bpe8192.json"):
        assert cache.sha256_of_file(data.ASSETS / name) == manifest[name]["sha256"]


def test_embedded_text_is_tokenised_and_held_out_by_document() -> None:
    corpus = load_corpus()
    tokenizer = data._tokenizer()
    assert np.count_nonzero(corpus.train == 0) == 6
    assert np.flatnonzero(corpus.validation == 0).tolist() == [len(corpus.validation) - 1]
    text = tokenizer.decode(corpus.validation.tolist(), skip_special_tokens=True)
    assert text.strip().startswith("Persuasion\n\nby\n\nJane Austen")
    assert corpus.bytes_per_token == pytest.approx(len(text.encode()) / len(corpus.validation), rel=1e-12)
    assert text[1000:1200] not in tokenizer.decode(corpus.train.tolist())


def test_second_load_reads_the_cache_and_a_damaged_cache_is_rebuilt(
    corpus_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = load_corpus("docs", corpus_dir)
    tokens = corpus.train.tolist()
    with monkeypatch.context() as patch:
        patch.setattr(data, "_unpack", lambda path: pytest.fail("unpacked again"))
        assert load_corpus("docs", corpus_dir).sha256 == corpus.sha256
    cached = next(cache.cache_directory().glob("*docs.train*"))
    cached.write_bytes(b"\0" * 10)
    assert load_corpus("docs", corpus_dir).train.tolist() == tokens


def test_corpus_directory_from_the_environment(corpus_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VARPROP_CORPUS", str(corpus_dir))
    assert len(load_corpus("docs").train) == 500


def test_unwritable_cache_falls_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    occupied = tmp_path / "file"
    occupied.write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(occupied))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert cache.cache_directory().parent == tmp_path


def test_tokenising_prints_nothing_even_when_the_caller_forks(tmp_path: Path) -> None:
    program = "import os; from varprop.train import load_corpus; load_corpus(); os.fork() or os._exit(0); os.wait()"
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    run = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=120)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


def test_plain_files(tmp_path: Path) -> None:
    tokens = np.arange(1000)
    for suffix, dtype in ((".u16", "<u2"), (".u32", "<u4")):
        path = tmp_path / f"t{suffix}"
        tokens.astype(dtype).tofile(path)
        corpus = load_corpus(path)
        assert (len(corpus.train), len(corpus.validation), corpus.vocab_size) == (950, 50, 1000)
        assert corpus.validation[0] == 950
        assert corpus.bytes_per_token is None
        assert isinstance(corpus.train, np.memmap)


def test_batch_is_a_function_of_seed_and_step(token_file: Path) -> None:
    corpus = load_corpus(token_file)
    first = batch(corpus, 3, 7, 4, 16)
    assert first.shape == (4, 17)
    assert first.dtype == torch.int64
    assert torch.equal(first, batch(corpus, 3, 7, 4, 16))
    assert not torch.equal(first, batch(corpus, 4, 7, 4, 16))
    assert not torch.equal(first, batch(corpus, 3, 8, 4, 16))


def test_an_epoch_visits_every_window_once_and_the_next_in_another_order(tmp_path: Path) -> None:
    path = tmp_path / "count.u32"
    np.arange(1000, dtype="<u4").tofile(path)  # a token says where it stands
    corpus = load_corpus(path)
    size = n_windows(corpus.train, 10)
    assert size == 94
    rows = torch.cat([batch(corpus, 0, step, 47, 10) for step in range(4)])
    starts = rows[:, 0].reshape(2, size)
    for epoch in starts:
        assert sorted(epoch.tolist()) == list(range(0, 940, 10))
    assert not torch.equal(starts[0], starts[1])
    assert torch.equal(rows[:, 1:], rows[:, :-1] + 1)  # targets follow inputs


def test_sequences_do_not_depend_on_how_they_are_batched(token_file: Path) -> None:
    corpus = load_corpus(token_file)
    large = torch.cat([batch(corpus, 0, step, 8, 16) for step in range(3)])
    small = torch.cat([batch(corpus, 0, step, 2, 16) for step in range(12)])
    assert torch.equal(large, small)


def test_validation_windows_are_distinct_and_bounded(token_file: Path) -> None:
    corpus = load_corpus(token_file)  # 200 validation tokens: 12 windows of 16
    assert [len(b) for b in validation_batches(corpus, 100, 5, 16)] == [5, 5]
    assert [len(b) for b in validation_batches(corpus, 100, 20, 16)] == [12]
    assert len(torch.cat(validation_batches(corpus, 3, 4, 16)).unique(dim=0)) == 12
    assert [len(b) for b in validation_batches(corpus, 1, 5, 16)] == [5]


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def test_bad_corpus_directories(corpus_dir: Path) -> None:
    with pytest.raises(ArgumentError, match="corpus='docs' is not in the package; expected corpus_dir"):
        load_corpus("docs")
    with pytest.raises(ArgumentError, match="corpus_dir='/no/such' is missing"):
        load_corpus("docs", "/no/such")
    with pytest.raises(ArgumentError, match="no hash of books"):
        load_corpus("books", corpus_dir)
    _truncate(corpus_dir / "docs.val.u16.xz")
    with pytest.raises(ArgumentError, match=r"docs\.val\.u16\.xz' is missing or truncated"):
        load_corpus("docs", corpus_dir)
    (corpus_dir / "docs.train.u16.xz").write_bytes(lzma.compress(b"\1\2"))
    for file in cache.cache_directory().iterdir():
        file.unlink()
    with pytest.raises(ArgumentError, match=r"docs\.train\.u16' is damaged"):
        load_corpus("docs", corpus_dir)
    (corpus_dir / "manifest.json").write_text("{")
    with pytest.raises(ArgumentError, match="is missing or broken"):
        load_corpus("docs", corpus_dir)


def test_token_beyond_the_vocabulary(corpus_dir: Path) -> None:
    content = np.array([1, 8192], "<u2").tobytes()
    (corpus_dir / "docs.train.u16.xz").write_bytes(lzma.compress(content))
    manifest = json.loads((corpus_dir / "manifest.json").read_text())
    manifest["docs.train.u16.xz"]["sha256_of_u16"] = hashlib.sha256(content).hexdigest()
    (corpus_dir / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ArgumentError, match="token id 8192 is beyond the vocabulary"):
        load_corpus("docs", corpus_dir)


def test_bad_names_and_files(tmp_path: Path, token_file: Path) -> None:
    with pytest.raises(ArgumentError, match="corpus='dosc' is unknown; expected one of embedded, docs, books"):
        load_corpus("dosc")
    with pytest.raises(ArgumentError, match="is missing"):
        load_corpus(tmp_path / "none.u16")
    for content in (b"", b"\0\1\2"):
        (tmp_path / "odd.u16").write_bytes(content)
        with pytest.raises(ArgumentError, match="is truncated"):
            load_corpus(tmp_path / "odd.u16")
    corpus = load_corpus(token_file)
    with pytest.raises(ArgumentError, match="n_tokens=3800 is too long for a text of 3800 tokens"):
        batch(corpus, 0, 0, 1, 3800)
    with pytest.raises(ArgumentError, match="n_tokens=200 is too long for a text of 200 tokens"):
        validation_batches(corpus, 1, 1, 200)
