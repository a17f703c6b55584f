"""Corpora: what is in them, and what is refused."""

from __future__ import annotations

import hashlib
import json
import lzma
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from varprop.corpus import cache, load, load_corpus
from varprop.errors import ArgumentError


@pytest.fixture
def corpus_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A corpus directory with a small `docs`, and an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("VARPROP_CORPUS", raising=False)
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
    manifest = json.loads((load.ASSETS / "manifest.json").read_text())
    for name in ("embedded.txt.xz", "bpe8192.json"):
        assert cache.sha256_of_file(load.ASSETS / name) == manifest[name]["sha256"]


def test_embedded_text_is_tokenised_and_held_out_by_document() -> None:
    corpus = load_corpus()
    tokenizer = load._tokenizer()
    assert corpus.document_end == 0
    assert np.count_nonzero(corpus.train == 0) == 6
    assert np.flatnonzero(corpus.validation == 0).tolist() == [len(corpus.validation) - 1]
    text = tokenizer.decode(corpus.validation.tolist(), skip_special_tokens=True)
    assert text.strip().startswith("Persuasion\n\nby\n\nJane Austen")
    assert corpus.bytes_per_token == pytest.approx(len(text.encode()) / len(corpus.validation), rel=1e-12)
    assert corpus.tokenizer == load.TOKENIZER
    assert corpus.token_bytes is not None
    assert corpus.token_bytes[corpus.validation].sum() == len(text.encode())
    some = corpus.validation[1000:2000]
    assert corpus.token_bytes[some].sum() == len(tokenizer.decode(some.tolist()).encode())
    assert text[1000:1200] not in tokenizer.decode(corpus.train.tolist())


def test_second_load_reads_the_cache_and_a_damaged_cache_is_rebuilt(
    corpus_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = load_corpus("docs", corpus_dir)
    tokens = corpus.train.tolist()
    with monkeypatch.context() as patch:
        patch.setattr(load, "_unpack", lambda path: pytest.fail("unpacked again"))
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


def test_tokenising_prints_nothing_even_when_the_caller_forks() -> None:
    """The beginnings of the embedded documents."""
    program = """
from varprop.corpus import load
documents = load._unpack(load.ASSETS / "embedded.txt.xz").decode().split(load.DOCUMENT_END)
load._unpack = lambda _: load.DOCUMENT_END.join(document[:2000] for document in documents).encode()
assert len(load._tokenise(load.ASSETS)["train"]) > 1000
os.fork() or os._exit(0)
os.wait()
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


def test_plain_files(tmp_path: Path) -> None:
    tokens = np.arange(1000)
    for suffix, dtype in ((".u16", "<u2"), (".u32", "<u4")):
        path = tmp_path / f"t{suffix}"
        tokens.astype(dtype).tofile(path)
        corpus = load_corpus(path)
        assert (len(corpus.train), len(corpus.validation), corpus.vocab_size) == (950, 50, 1000)
        assert corpus.validation[0] == 950
        assert (corpus.bytes_per_token, corpus.document_end) == (None, None)
        assert (corpus.tokenizer, corpus.token_bytes) == (None, None)
        assert isinstance(corpus.train, np.memmap)


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
    with pytest.raises(ArgumentError, match="token id 8192 at position 1 is beyond the vocabulary"):
        load_corpus("docs", corpus_dir)


def test_bad_names_and_files(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="corpus='dosc' is unknown; expected one of embedded, docs, books"):
        load_corpus("dosc")
    with pytest.raises(ArgumentError, match="is missing"):
        load_corpus(tmp_path / "none.u16")
    for content in (b"", b"\0\1\2"):
        (tmp_path / "odd.u16").write_bytes(content)
        with pytest.raises(ArgumentError, match="is truncated"):
            load_corpus(tmp_path / "odd.u16")
