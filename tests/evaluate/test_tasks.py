"""BLiMP, cloze and the packed loss on small models and texts."""

from __future__ import annotations

import lzma
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from varprop import evaluate, hf, presets
from varprop.corpus import load_corpus, window_starts
from varprop.errors import ArgumentError, SchemaError
from varprop.evaluate import Pair, book_cloze, minimal_pairs
from varprop.nn import Transformer

SPEC = presets.tiny().with_fields(d_model=16, n_layers=1, d_ff=24)
PAIRS = [
    Pair(f"paradigm_{i % 3}", f"term_{i % 3 // 2}", f"The {word} is here.", f"The {word} are here.")
    for i, word in enumerate(["cat", "house", "river", "book", "woman", "table"])
]


@pytest.fixture(scope="module")
def model() -> Transformer:
    return Transformer(SPEC, seed=1)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return hf.load_tokenizer()


@pytest.fixture(scope="module")
def novel() -> np.ndarray:
    return np.asarray(load_corpus().validation[:30_000])


# BLiMP ----------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_pairs_are_scored_after_the_end_of_a_document(model: Transformer, tokenizer: Tokenizer) -> None:
    scores = evaluate.score_pairs(model, PAIRS, tokenizer, 0)
    for row, pair in zip(scores, PAIRS, strict=True):
        for value, text in zip(row, (pair.good, pair.bad), strict=True):
            ids = torch.tensor([[0, *tokenizer.encode(text).ids]])
            log_p = model(ids[:, :-1]).log_softmax(dim=-1).gather(-1, ids[:, 1:, None])
            assert value == pytest.approx(log_p.sum().item(), rel=1e-5)
    assert (evaluate.score_pairs(model, PAIRS, tokenizer, 7) != scores).all()


def test_the_first_token_is_that_of_the_tokenizer(
    model: Transformer, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[int]] = []
    score = minimal_pairs.score
    monkeypatch.setattr(minimal_pairs, "score", lambda m, ids, n: seen.extend(ids) or score(m, ids, n))
    evaluate.score_pairs(model, PAIRS, tokenizer, 777)
    assert [row[0] for row in seen] == [777] * 12
    assert seen[0][1:] == tokenizer.encode(PAIRS[0].good).ids


def test_blimp_counts_pairs(model: Transformer, tokenizer: Tokenizer) -> None:
    scores = evaluate.score_pairs(model, PAIRS, tokenizer, 0)
    found = evaluate.blimp(model, PAIRS, tokenizer, 0)
    # The same with good and bad in the places that give known outcomes.
    sorted_pairs = [
        pair if better else pair._replace(good=pair.bad, bad=pair.good)
        for pair, better in zip(PAIRS, scores[:, 0] > scores[:, 1], strict=True)
    ]
    assert found.blimp_accuracy.item() == np.mean(scores[:, 0] > scores[:, 1])
    all_right = evaluate.blimp(model, sorted_pairs, tokenizer, 0)
    assert all_right.blimp_accuracy.item() == 1
    wrong = sorted_pairs[0]._replace(good=sorted_pairs[0].bad, bad=sorted_pairs[0].good)
    known = evaluate.blimp(model, [wrong, *sorted_pairs[1:]], tokenizer, 0)
    assert known.blimp_accuracy.item() == 5 / 6
    assert known.blimp_accuracy_stderr.item() == pytest.approx(math.sqrt(5 / 6 * 1 / 6 / 5))
    assert known.blimp_paradigm_accuracy.sel(paradigm=["paradigm_0", "paradigm_1"]).values.tolist() == [0.5, 1.0]
    assert known.blimp_term_accuracy.sel(term=["term_0", "term_1"]).values.tolist() == [0.75, 1.0]
    assert known.blimp_pairs.item() == 6
    assert (known.attrs["source"], known.attrs["spec_id"]) == ("checkpoint", SPEC.spec_id)
    same = [pair._replace(bad=pair.good) for pair in PAIRS]
    assert evaluate.blimp(model, same, tokenizer, 0).blimp_accuracy.item() == 0


def _write(folder: Path, pairs: Sequence[Pair]) -> None:
    text = "".join("\t".join(pair) + "\n" for pair in pairs)
    (folder / "blimp.tsv.xz").write_bytes(lzma.compress(text.encode()))


def test_pairs_of_a_file(tmp_path: Path, model: Transformer, tokenizer: Tokenizer) -> None:
    _write(tmp_path, [*PAIRS, PAIRS[0], PAIRS[3]])
    assert evaluate.load_pairs(tmp_path) == [*PAIRS, PAIRS[0], PAIRS[3]]
    assert evaluate.load_pairs(tmp_path, limit=2) == PAIRS
    with pytest.raises(ArgumentError, match="limit=1 is too small"):
        evaluate.load_pairs(tmp_path, limit=1)
    with pytest.raises(ArgumentError, match=r"is without blimp\.tsv\.xz"):
        evaluate.load_pairs(tmp_path / "x")
    (tmp_path / "blimp.tsv.xz").write_bytes(lzma.compress(b"one\ttwo\n"))
    with pytest.raises(ArgumentError, match="is damaged; expected four columns"):
        evaluate.load_pairs(tmp_path)
    (tmp_path / "blimp.tsv.xz").write_bytes(b"x")
    with pytest.raises(ArgumentError, match="is damaged"):
        evaluate.load_pairs(tmp_path)
    with pytest.raises(ArgumentError, match="pairs=0 is empty"):
        evaluate.blimp(model, [], tokenizer, 0)
    with pytest.raises(ArgumentError, match="pairs of paradigm_1=1 is too few for a standard error"):
        evaluate.blimp(model, [PAIRS[0], PAIRS[3], PAIRS[1]], tokenizer, 0)


# Cloze ----------------------------------------------------------------------------------------------------------------


def test_passages_are_of_the_same_book_and_apart(novel: np.ndarray) -> None:
    """Every token of the text is another number, so that a passage says where it is from."""
    text = np.arange(1, 5001)
    text[[1999, 2080]] = 0  # two long books and one too short
    sequences = np.array(book_cloze._passages(text, book_cloze.books_of(text, 0), 200, 20, 8, np.random.default_rng(0)))
    items = sequences.reshape(200, 4, 28)
    assert (items[:, :, :20] == items[:, :1, :20]).all()
    starts = items[:, 0, 0] - 1
    assert (items[:, 0] == starts[:, None] + 1 + np.arange(28)).all()
    others = items[:, 1:, 20:]
    assert (np.diff(others, axis=-1) == 1).all()
    begin, end = others[..., 0] - 1, others[..., -1]
    assert ((end <= starts[:, None]) | (begin >= starts[:, None] + 28)).all()
    assert ((begin < 1999) == (starts[:, None] < 1999)).all()
    assert not ((begin > 1999) & (end < 2080)).any()
    assert (starts < 1999).mean() == pytest.approx(0.4, abs=0.12)  # a book as often as it is long


def test_last_words_occur_before(novel: np.ndarray, tokenizer: Tokenizer) -> None:
    found = book_cloze._last_words(novel, book_cloze.books_of(novel, 0), tokenizer, 64)
    assert len(found) > 200
    assert any(end - start > 1 for start, end in found)
    for start, end in found[::10]:
        word = tokenizer.decode(novel[start:end].tolist())
        assert word[0] == " "
        assert word[1:].isalpha()
        assert len(word) > 5
        assert word in tokenizer.decode(novel[start - 64 : start].tolist())
    text = novel[:3000].copy()
    text[1500] = 0
    for start, end in book_cloze._last_words(text, book_cloze.books_of(text, 0), tokenizer, 64):
        assert start - 64 > 1500 or end <= 1500


def test_cloze_of_a_model_that_knows_nothing(novel: np.ndarray, tokenizer: Tokenizer) -> None:
    """An untrained model is at chance; the items follow the seed."""
    chance = evaluate.cloze(
        Transformer(SPEC, seed=1), novel, tokenizer, document_end=0, n_items=200, n_context=40, n_next=12
    )
    continuation, word = chance.cloze_accuracy.sel(cloze_task=["continuation", "last_word"]).values
    error = chance.cloze_accuracy_stderr.sel(cloze_task="continuation").item()
    assert abs(continuation - 0.25) < 4 * error
    assert word < 0.05
    again = evaluate.cloze(
        Transformer(SPEC, seed=1), novel, tokenizer, document_end=0, n_items=200, n_context=40, n_next=12
    )
    assert again.equals(chance)
    other = evaluate.cloze(
        Transformer(SPEC, seed=1), novel, tokenizer, document_end=0, n_items=200, n_context=40, n_next=12, seed=1
    )
    assert not other.equals(chance)


class Oracle(Transformer):
    """Knows a text by heart: after eight tokens of it, the one that follows their first occurrence is certain."""

    def __init__(self, text: np.ndarray) -> None:
        super().__init__(SPEC.with_fields(d_model=4, n_heads=1, d_ff=4))
        self.after: dict[tuple[int, ...], int] = {}
        for i in range(len(text) - 8):
            self.after.setdefault(tuple(text[i : i + 8].tolist()), int(text[i + 8]))

    def hidden(self, tokens: torch.Tensor, *_: object) -> torch.Tensor:  # type: ignore[override]
        rows = [
            [self.after.get(tuple(row[max(0, i - 7) : i + 1]), 1) for i in range(len(row))] for row in tokens.tolist()
        ]
        return torch.tensor(rows)[..., None].float()

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return 20 * torch.nn.functional.one_hot(hidden[..., 0].long(), self.spec.vocab_size).float()


def test_who_knows_the_text_answers_all(novel: np.ndarray, tokenizer: Tokenizer) -> None:
    text = novel[:4000]
    found = evaluate.cloze(Oracle(text), text, tokenizer, document_end=0, n_items=30, n_context=40, n_next=16)
    assert found.cloze_accuracy.sel(cloze_task="continuation").item() == 1
    assert found.cloze_accuracy.sel(cloze_task="last_word").item() > 0.9


def test_books_end_where_the_tokenizer_says(
    novel: np.ndarray, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No item crosses the end of a document, whatever its id."""
    text, seen = novel[:4000].copy(), []
    score = book_cloze.score
    monkeypatch.setattr(book_cloze, "score", lambda m, ids, n: seen.append(ids) or score(m, ids, n))
    end = next(i for i in range(2, 8192) if i not in text)
    text[400::400] = end
    assert book_cloze.books_of(text, end)[:2] == [(0, 400), (401, 800)]
    assert book_cloze.books_of(text, 0) == [(0, 4000)]
    for document_end in (end, 0):
        evaluate.cloze(
            Transformer(SPEC), text, tokenizer, document_end=document_end, n_items=20, n_context=40, n_next=12
        )
    assert [any(end in row for row in ids) for ids in seen] == [False, False, True, True]


def test_too_short_for_cloze(model: Transformer, novel: np.ndarray, tokenizer: Tokenizer) -> None:
    with pytest.raises(ArgumentError, match="tokens=300 is too short; expected a text with a document of at least 448"):
        evaluate.cloze(model, novel[:300], tokenizer, document_end=0)
    with pytest.raises(ArgumentError, match=r"n_items=2000 is too many for a text with .* repeated words"):
        evaluate.cloze(model, novel[:1500], tokenizer, document_end=0, n_context=8, n_next=2)
    with pytest.raises(ArgumentError, match="n_items=1 is too small"):
        evaluate.cloze(model, novel, tokenizer, document_end=0, n_items=1)
    with pytest.raises(ArgumentError, match="n_next=0 is too small"):
        evaluate.cloze(model, novel, tokenizer, document_end=0, n_next=0)


# Loss -----------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_packed_loss_is_the_mean_over_windows(model: Transformer, novel: np.ndarray) -> None:
    text = novel[:1001]
    found = evaluate.packed_loss(model, text, 50, bytes_of_text=3.7, text="novel")
    ids = torch.from_numpy(text.astype(np.int64))
    rows = torch.stack([ids[i : i + 51] for i in range(0, 1000, 50)])
    losses = torch.nn.functional.cross_entropy(model(rows[:, :-1]).mT, rows[:, 1:], reduction="none").mean(dim=1)
    at = found.sel(text="novel", length=50)
    assert at.loss.item() == pytest.approx(losses.mean().item(), rel=1e-6)
    assert at.loss_stderr.item() == pytest.approx((losses.std() / len(losses) ** 0.5).item(), rel=1e-4)
    assert at.bits_per_byte.item() == pytest.approx(losses.mean().item() / math.log(2) / 3.7, rel=1e-6)
    assert at.loss_sequences.item() == 20
    sizes = np.random.default_rng(0).integers(0, 9, SPEC.vocab_size)
    exact = evaluate.packed_loss(model, text, 50, n_sequences=5, bytes_of_text=sizes)
    chosen = window_starts(text, 50, 0, range(5)) // 50
    nats, n_bytes = 50 * losses[chosen].sum().item(), sizes[rows[chosen, 1:]].sum()
    assert exact.bits_per_byte.item() == pytest.approx(nats / math.log(2) / n_bytes, rel=1e-6)
    fewer = evaluate.packed_loss(model, text, 50, n_sequences=5)
    assert fewer.loss_sequences.item() == 5
    assert "bits_per_byte" not in fewer
    with pytest.raises(ArgumentError, match=r"n_sequences=21 is outside the domain; expected an integer in 2\.\.20"):
        evaluate.packed_loss(model, text, 50, n_sequences=21)
    with pytest.raises(ArgumentError, match="n_tokens=5000 is too long for a text of 1001 tokens"):
        evaluate.packed_loss(model, text, 5000)


def test_join_and_table(model: Transformer, novel: np.ndarray, tokenizer: Tokenizer) -> None:
    text = novel[:1001]
    parts = [evaluate.packed_loss(model, text, n, text=name) for name in ("a", "b") for n in (20, 50)]
    joined = evaluate.join([*parts, evaluate.blimp(model, PAIRS, tokenizer, 0)])
    assert dict(joined.loss.sizes) == {"text": 2, "length": 2}
    lines = evaluate.table(joined).splitlines()
    assert len(lines) == 4 + 1 + 2
    assert lines[1].split()[:3] == ["loss", "a", "50"]
    with pytest.raises(SchemaError, match="loss"):
        evaluate.join(parts[:3])
    other = evaluate.packed_loss(Transformer(SPEC, seed=2), text, 20, text="a")
    with pytest.raises(SchemaError, match="datasets differ"):
        evaluate.join([parts[0], other])
