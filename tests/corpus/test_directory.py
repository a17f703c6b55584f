"""Corpus directories: what is read, what is checked, and when."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from varprop.corpus import directory, encode, load_corpus, tokenize, tokens
from varprop.errors import ArgumentError
from varprop.simulate import text_tokens


@pytest.fixture
def out(folder: Path) -> Path:
    tokenize(["a.txt"], "tokenizer.json", "out", validation_fraction=0.3)
    return Path("out")


def edit(out: Path, change: Callable[[dict[str, Any]], object]) -> None:
    manifest = json.loads((out / "manifest.json").read_text())
    change(manifest)
    (out / "manifest.json").write_text(json.dumps(manifest))


def replace_train(out: Path, ids: np.ndarray) -> None:
    """Other ids, and the manifest that says so."""
    (out / "train.u16").write_bytes(ids.astype("<u2").tobytes())
    digest = hashlib.sha256((out / "train.u16").read_bytes()).hexdigest()
    edit(out, lambda manifest: manifest["train"].update(tokens=len(ids), sha256=digest))


def test_a_directory_is_a_corpus(out: Path) -> None:
    corpus = load_corpus(out.resolve())
    manifest = json.loads((out / "manifest.json").read_text())
    for part, found in (("train", corpus.train), ("validation", corpus.validation)):
        assert isinstance(found, np.memmap)
        assert np.array_equal(found, np.fromfile(out / f"{part}.u16", "<u2"))
        assert np.count_nonzero(found == corpus.document_end) == manifest[part]["documents"]
    assert (corpus.vocab_size, corpus.document_end, corpus.name) == (257, 256, "out")
    joined = manifest["train"]["sha256"] + manifest["validation"]["sha256"]
    assert corpus.sha256 == hashlib.sha256(joined.encode()).hexdigest()
    assert text_tokens(8, n_sequences=2, corpus="out").max() < 257
    assert corpus.tokenizer == out.resolve() / "tokenizer.json"


def test_bytes_of_every_token(folder: Path, out: Path) -> None:
    corpus = load_corpus(out)
    assert corpus.token_bytes is not None
    assert corpus.token_bytes.tolist() == [1] * 256 + [0]
    rules = encode.load_tokenizer("tokenizer.json")
    rules.add_tokens(["naïve café"])
    rules.save("added.json")
    manifest = tokenize(["a.txt"], "added.json", "more", validation_fraction=0.3)
    corpus = load_corpus("more")
    assert corpus.token_bytes is not None
    assert (corpus.token_bytes[256], corpus.token_bytes[257]) == (0, 12)
    for part, ids in (("train", corpus.train), ("validation", corpus.validation)):
        assert 257 in ids
        assert corpus.token_bytes[ids].sum() == manifest[part]["bytes_of_text"]


@pytest.mark.parametrize("kind", ["prefix", "strip", "words"])
def test_bytes_are_not_known_where_the_tokenizer_changes_the_text(folder: Path, kind: str) -> None:
    rules = encode.load_tokenizer("tokenizer.json")
    if kind == "prefix":
        rules.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)  # type: ignore[assignment]
    elif kind == "strip":
        rules.normalizer = normalizers.Strip()  # type: ignore[assignment]
    else:
        rules = Tokenizer(models.WordLevel({"<|endoftext|>": 0, "?": 1, "▁": 2}, unk_token="?"))
    rules.save("other.json")
    manifest = tokenize(["a.txt"], "other.json", "out", validation_fraction=0.3)["validation"]
    corpus = load_corpus("out")
    assert corpus.token_bytes is None
    assert corpus.bytes_per_token == manifest["bytes_of_text"] / manifest["tokens"]


def test_the_tokenizer_is_checked(out: Path) -> None:
    path = out / "tokenizer.json"
    content = path.read_text()
    path.write_text(content.replace("<|endoftext|>", "<|end|>"))
    with pytest.raises(
        ArgumentError, match=r"corpus file='out/tokenizer\.json' is another one \(sha256 .*; expected sha"
    ):
        load_corpus(out)
    path.unlink()
    with pytest.raises(ArgumentError, match=r"tokenizer\.json' is missing; expected the tokenizer of the corpus"):
        load_corpus(out)


def test_what_has_been_checked_is_not_read_again_until_it_changes(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[str] = []
    whole = directory.sha256_of_file
    monkeypatch.setattr(directory, "sha256_of_file", lambda path: checked.append(path.name) or whole(path))
    load_corpus("out")
    assert checked == ["train.u16", "validation.u16", "tokenizer.json"]
    load_corpus("out")
    assert len(checked) == 3
    content = bytearray((out / "train.u16").read_bytes())
    content[100] ^= 1
    (out / "train.u16").write_bytes(content)
    os.utime(out / "train.u16", ns=(0, 0))
    for _ in range(2):  # what has failed is checked again
        with pytest.raises(ArgumentError, match=r"corpus file='out/train\.u16' is damaged \(sha256 "):
            load_corpus("out")
    assert checked[3:] == ["train.u16"] * 2


def test_truncated_and_missing_files_are_seen_although_they_were_checked(out: Path) -> None:
    load_corpus("out")
    path = out / "validation.u16"
    content = path.read_bytes()
    for wrong, message in (
        (content[:-2], f"is truncated ({len(content) - 2} bytes); expected {len(content)} bytes"),
        (content + b"\0\0", "is too long"),
        (b"", "is truncated (0 bytes)"),
    ):
        path.write_bytes(wrong)
        with pytest.raises(ArgumentError) as caught:
            load_corpus("out")
        assert message in str(caught.value)
    path.unlink()
    with pytest.raises(ArgumentError, match=r"corpus file='out/validation\.u16' is missing"):
        load_corpus("out")


@pytest.mark.parametrize("at_once", [7, 2**24])
def test_the_first_id_beyond_the_vocabulary_is_named(out: Path, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "CHECKED_AT_ONCE", at_once)
    ids = np.zeros(100, int)
    ids[[31, 30, 77]] = 257, 300, 301
    replace_train(out, ids)
    message = r"corpus='out/train\.u16' is wrong \(token id 300 at position 30 is beyond the vocabulary\); expected ids"
    with pytest.raises(ArgumentError, match=message):
        load_corpus("out")
    ids[[31, 30, 77]] = 256
    replace_train(out, ids)
    assert load_corpus("out").train.tolist() == ids.tolist()


def test_a_smaller_vocabulary_in_the_manifest_is_checked_again(out: Path) -> None:
    load_corpus("out")
    edit(out, lambda manifest: manifest.update(vocab_size=200, document_end=0))
    with pytest.raises(ArgumentError, match="is beyond the vocabulary"):
        load_corpus("out")


@pytest.mark.parametrize(
    "change",
    [
        lambda manifest: manifest.clear(),
        lambda manifest: manifest.update(format="other 1"),
        lambda manifest: manifest.update(dtype="int8"),
        lambda manifest: manifest.update(dtype=["uint16"]),
        lambda manifest: manifest.update(vocab_size=0),
        lambda manifest: manifest.update(vocab_size=True),
        lambda manifest: manifest.update(document_end=257),
        lambda manifest: manifest.update(document_end=None),
        lambda manifest: manifest.update(train=3),
        lambda manifest: manifest["train"].update(tokens="7"),
        lambda manifest: manifest["validation"].pop("bytes_of_text"),
        lambda manifest: manifest["validation"].update(bytes_of_text=0),
        lambda manifest: manifest["validation"].update(sha256=None),
        lambda manifest: manifest.pop("made_from"),
        lambda manifest: manifest["made_from"].pop("tokenizer_sha256"),
    ],
)
def test_broken_manifests_are_one_line(out: Path, change: Callable[[dict[str, Any]], object]) -> None:
    edit(out, change)
    with pytest.raises(ArgumentError, match=r"corpus manifest='out/manifest\.json' is missing or broken") as caught:
        load_corpus("out")
    assert "\n" not in str(caught.value)


def test_manifests_that_are_no_json(out: Path) -> None:
    for content in (b"{", b"[1]", b"\xff", b"[" * 100_000, b""):
        (out / "manifest.json").write_bytes(content)
        with pytest.raises(ArgumentError, match="is missing or broken"):
            load_corpus("out")
    (out / "manifest.json").unlink()
    with pytest.raises(ArgumentError, match="is missing or broken"):
        load_corpus("out")
