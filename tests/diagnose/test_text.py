"""Sequences: which windows of which text, in which tokens, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from varprop import corpus, hf
from varprop.corpus.load import TOKENIZER, embedded_text
from varprop.diagnose.open import Tokens
from varprop.diagnose.text import sequences
from varprop.errors import ArgumentError

from .checkpoints import SPECIAL, save_tokenizer

TEXT = "".join(f"{i:03} " for i in range(200))
"""800 bytes, in which every window says where it is from."""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path


def tokens_of(folder: Path, *, begins: bool = False) -> Tokens:
    save_tokenizer(folder, begins=begins)
    found = hf.tokenizer_of(folder)
    assert found is not None
    return found


def draw(data: str | Path, tokens: Tokens | None, **options: Any) -> torch.Tensor:
    """Tokens, after a look at the targets of a causal model."""
    batch = sequences(data, tokens, **{"vocab_size": 260, "n_sequences": 3, "length": 20, **options})
    assert batch.tokens.dtype == batch.targets.dtype == torch.int64
    assert torch.equal(batch.targets[:, :-1], batch.tokens[:, 1:])
    assert (batch.targets[:, -1] == -100).all()
    return batch.tokens


def test_windows_of_a_text_do_not_overlap_and_fewer_are_the_first_of_more(folder: Path) -> None:
    tokens = tokens_of(folder)
    found = draw("text.txt", tokens, n_sequences=39)
    texts = [tokens[0].decode(row.tolist()) for row in found]
    places = [TEXT.index(text) for text in texts]
    assert sorted(places) == [20 * i for i in range(39)] != places
    assert torch.equal(draw("text.txt", tokens, n_sequences=5), found[:5])
    assert not torch.equal(draw("text.txt", tokens, n_sequences=5, seed=1), found[:5])


@pytest.mark.parametrize("begins, begin, first", [(True, "auto", True), (True, "no", False), (False, "yes", True)])
def test_the_token_that_begins_a_text(begins: bool, begin: str, first: bool, folder: Path) -> None:
    tokens = tokens_of(folder, begins=begins)
    found = draw("text.txt", tokens, begin=begin)
    assert found.shape == (3, 20)
    assert (found[:, 0] == SPECIAL["begin"]).all().item() is first
    assert (found[:, 1:] < 256).all()
    for row in found:
        assert tokens[0].decode(row.tolist()[first:]) in TEXT


def test_masked_language_models_are_asked_for_15_percent_of_the_text(folder: Path) -> None:
    tokens = tokens_of(folder, begins=True)
    options: dict[str, Any] = {"vocab_size": 260, "n_sequences": 6, "length": 42, "seed": 4}
    batch = sequences("text.txt", tokens, mask_token=SPECIAL["mask"], **options)
    asked = batch.tokens == SPECIAL["mask"]
    assert asked.sum(dim=1).tolist() == [6] * 6  # of 40, beside the two tokens that frame a text
    assert torch.equal(asked, batch.targets != -100)
    assert (batch.tokens[:, 0] == SPECIAL["begin"]).all()
    assert (batch.tokens[:, -1] == SPECIAL["end"]).all()
    whole = torch.where(asked, batch.targets, batch.tokens)
    for row in whole[:, 1:-1]:
        assert tokens[0].decode(row.tolist()) in TEXT
    assert len({tuple(row.nonzero().flatten().tolist()) for row in asked}) > 1
    again = sequences("text.txt", tokens, mask_token=SPECIAL["mask"], **options)
    assert torch.equal(again.tokens, batch.tokens)


def test_the_embedded_text_in_any_tokens(folder: Path) -> None:
    tokens = tokens_of(folder)
    for row in draw("embedded", tokens):
        assert tokens[0].decode(row.tolist()).strip("\ufffd") in embedded_text()
    own = draw("embedded", (hf.load_tokenizer(), hf.SpecialTokens(0, 0, 1)), vocab_size=8192)
    validation = corpus.load_corpus().validation
    held = np.lib.stride_tricks.sliding_window_view(validation, 20)
    assert all((held == row.numpy()).all(axis=1).any() for row in own)


def test_a_corpus_directory_gives_its_held_out_part(folder: Path) -> None:
    tokens_of(folder)
    (folder / "documents.txt").write_text("<end>".join(f"document {i} " * 9 for i in range(60)))
    corpus.tokenize(["documents.txt"], "tokenizer.json", "own", validation_fraction=0.4, document_end="<end>")
    found = hf.tokenizer_of(folder)
    assert found is not None
    held_out = found[0].decode(corpus.load_corpus("own").validation.tolist(), skip_special_tokens=False)
    for row in draw("own", found):
        assert found[0].decode(row.tolist(), skip_special_tokens=False) in held_out
    with pytest.raises(ArgumentError, match="text='own' is of another tokenizer than the model"):
        draw("own", (hf.load_tokenizer(TOKENIZER), hf.SpecialTokens()), vocab_size=8192)


def test_arrays_of_ids(folder: Path) -> None:
    for kind in (np.uint16, np.uint64):
        np.save("text.npy", np.arange(100, dtype=kind))
        found = draw("text.npy", None, n_sequences=4)
        assert sorted(found[:, 0].tolist()) == [0, 20, 40, 60]
        assert (found - found[:, :1] == torch.arange(20)).all()
    rows = np.arange(240).reshape(8, 30)
    np.save("rows.npy", rows)
    found = draw("rows.npy", tokens_of(folder, begins=True), n_sequences=8, length=10)
    assert sorted(found[:, 0].tolist()) == list(range(0, 240, 30))
    assert (found - found[:, :1] == torch.arange(10)).all()


@pytest.mark.parametrize(
    "data, options, message",
    [
        ("text.txt", {"n_sequences": 40}, "n_sequences=40 is more than the 39 windows of 20 tokens in the text"),
        ("text.txt", {"length": 900}, "n_tokens=900 is too long for a text of 800 tokens"),
        ("text.txt", {"vocab_size": 200}, "vocab_size=200 is too small for a tokenizer of 256 entries"),
        ("text.txt", {"length": 1}, "length=1 is outside the domain"),
        ("text.txt", {"n_sequences": 0}, "n_sequences=0 is outside the domain"),
        ("text.txt", {"seed": -1}, "seed=-1 is outside the domain"),
        ("text.txt", {"begin": "maybe"}, "begin='maybe' is unknown"),
        ("missing.txt", {}, "data='missing.txt' cannot be read"),
        ("latin.txt", {}, "data='latin.txt' cannot be read .*not UTF-8"),
        ("missing.npy", {}, "data='missing.npy' is missing or no array"),
        ("objects.npy", {}, "data='objects.npy' is missing or no array"),
        ("floats.npy", {}, r"data='floats.npy' is no token ids \(\(3,\) float64\)"),
        ("negative.npy", {}, "token id=-2 is negative"),
        ("large.npy", {}, r"token id=\d+ is beyond the vocabulary; expected ids below 260"),
        ("huge.npy", {}, "token id=9223372036854775813 is beyond any vocabulary"),
        ("rows.npy", {"length": 31}, "length=31 is longer than the sequences; expected at most 30"),
        ("rows.npy", {"n_sequences": 9}, "n_sequences=9 is more than the 8 sequences"),
        ("nowhere", {}, "corpus='nowhere' is unknown"),
    ],
)
def test_bad_input_is_one_line(data: str, options: dict[str, Any], message: str, folder: Path) -> None:
    (folder / "latin.txt").write_bytes("café".encode("latin-1"))
    np.save("objects.npy", np.array([{}], dtype=object))
    np.save("floats.npy", np.ones(3))
    np.save("huge.npy", np.full(300, 2**63 + 5, dtype=np.uint64))
    np.save("negative.npy", np.full(300, -2))
    np.save("large.npy", np.arange(260, 400))
    np.save("rows.npy", np.arange(240).reshape(8, 30))
    with pytest.raises(ArgumentError, match=message) as caught:
        sequences(data, tokens_of(folder), **{"vocab_size": 260, "n_sequences": 2, "length": 20, **options})
    assert "\n" not in str(caught.value)


def test_what_needs_a_tokenizer_says_so(folder: Path) -> None:
    for data in ("embedded", "text.txt"):
        with pytest.raises(ArgumentError, match="is a text, and the model has no tokenizer"):
            draw(data, None)
    save_tokenizer(folder, begins=False)
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(ArgumentError, match="begin='yes' is without a token for it"):
        draw("text.txt", hf.tokenizer_of(folder), begin="yes")


def test_tokens_beside_the_vocabulary_may_be_beyond_the_embedding(folder: Path) -> None:
    assert draw("text.txt", tokens_of(folder), vocab_size=256).max() < 256
