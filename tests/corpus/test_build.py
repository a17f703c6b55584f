"""`tokenize`: the ids, which documents are held out, what is refused, and what a kill leaves."""

from __future__ import annotations

import gzip
import itertools
import json
import lzma
import math
import multiprocessing
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from tests.corpus.conftest import END, TEXTS, save_tokenizer
from varprop.corpus import encode, load, load_corpus, tokenize
from varprop.corpus.documents import read_documents
from varprop.corpus.encode import Chunk, Encoding, encode_all, is_held_out
from varprop.errors import ArgumentError

BPE = load.ASSETS / "bpe8192.json"


def encoded(texts: list[str], tokenizer: Path) -> list[int]:
    """Ids by the library alone, one document after another."""
    rules = Tokenizer.from_file(str(tokenizer))
    return [i for text in texts for i in [*rules.encode(text).ids, rules.token_to_id(END)]]


def sides(texts: list[str], fraction: float) -> tuple[list[str], list[str]]:
    return [t for t in texts if not is_held_out(t, fraction)], [t for t in texts if is_held_out(t, fraction)]


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# What is written ------------------------------------------------------------------------------------------------------


def test_ids_are_those_of_the_library_on_the_embedded_text(folder: Path) -> None:
    novels = [text[:40_000] for text in load._unpack(load.ASSETS / "embedded.txt.xz").decode().split(END)]
    Path("novels.txt").write_bytes(END.join(novels).encode())
    manifest = tokenize(["novels.txt"], BPE, "out", validation_fraction=0.3)
    corpus = load_corpus("out")
    train, held_out = sides(novels, 0.3)
    assert (len(train), len(held_out)) == (manifest["train"]["documents"], manifest["validation"]["documents"])
    assert corpus.train.tolist() == encoded(train, BPE)
    assert corpus.validation.tolist() == encoded(held_out, BPE)
    assert (corpus.vocab_size, corpus.document_end, corpus.name) == (8192, 0, "out")
    n_bytes = sum(len(text.encode()) for text in held_out)
    assert corpus.bytes_per_token == pytest.approx(n_bytes / len(corpus.validation), rel=1e-12)
    assert names(Path("out")) == {"train.u16", "validation.u16", "manifest.json", "tokenizer.json"}
    assert Path("out/tokenizer.json").read_bytes() == BPE.read_bytes()


@pytest.mark.long
def test_the_whole_embedded_text_is_the_embedded_corpus(folder: Path) -> None:
    tokenize([load.ASSETS / "embedded.txt.xz"], BPE, "out", validation_fraction=0.3, n_workers=2)
    found = load_corpus("out")
    embedded = load_corpus()

    def documents(tokens: np.ndarray) -> set[bytes]:
        return {part.tobytes() for part in np.split(np.asarray(tokens), np.flatnonzero(tokens == 0) + 1)} - {b""}

    assert documents(found.train) | documents(found.validation) == documents(embedded.train) | documents(
        embedded.validation
    )


def test_every_kind_of_file_gives_the_same_tokens(folder: Path) -> None:
    for name in ("a.txt", "a.jsonl"):
        Path(f"{name}.gz").write_bytes(gzip.compress(Path(name).read_bytes()))
        Path(f"{name}.xz").write_bytes(lzma.compress(Path(name).read_bytes()))
    Path("bom.txt").write_bytes(b"\xef\xbb\xbf" + Path("a.txt").read_bytes() + END.encode() + b"\n")
    train, held_out = sides(TEXTS, 0.2)
    for number, name in enumerate(("a.txt", "a.txt.gz", "a.txt.xz", "a.jsonl", "a.jsonl.gz", "a.jsonl.xz", "bom.txt")):
        tokenize([name], "tokenizer.json", f"out{number}", validation_fraction=0.2)
        corpus = load_corpus(f"out{number}")
        assert corpus.train.tolist() == encoded(train, Path("tokenizer.json"))
        assert corpus.validation.tolist() == encoded(held_out, Path("tokenizer.json"))


def test_parquet(folder: Path) -> None:
    arrow = pytest.importorskip("pyarrow", reason="needs pyarrow (the extra parquet)")
    parquet = pytest.importorskip("pyarrow.parquet", reason="needs pyarrow (the extra parquet)")
    parquet.write_table(arrow.table({"n": range(40), "body": TEXTS}), "a.parquet", row_group_size=7)
    tokenize(["a.parquet"], "tokenizer.json", "out", validation_fraction=0.2, field="body")
    assert load_corpus("out").train.tolist() == encoded(sides(TEXTS, 0.2)[0], Path("tokenizer.json"))
    parquet.write_table(arrow.table({"body": ["a", None]}), "null.parquet")
    Path("broken.parquet").write_bytes(Path("a.parquet").read_bytes()[:-9])
    for name, message in (
        ("a.parquet", "'a.parquet' is without a column 'text'; expected one of its columns n, body"),
        ("null.parquet", "without a column 'text'"),
        ("broken.parquet", "'broken.parquet' is damaged, or no parquet file"),
    ):
        with pytest.raises(ArgumentError, match=message):
            tokenize([name], "tokenizer.json", "other")
    with pytest.raises(ArgumentError, match="without a string 'body' in row 1"):
        tokenize(["null.parquet"], "tokenizer.json", "other", field="body")


def test_parquet_without_pyarrow(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("a.parquet").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ArgumentError, match=r"pyarrow is not installed; expected varprop\[parquet\]"):
        tokenize(["a.parquet"], "tokenizer.json", "out")


@pytest.mark.long
def test_processes_keep_the_order(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("varprop.corpus.build.CHUNK_CHARACTERS", 60)
    one = tokenize(["a.txt", "a.jsonl"], "tokenizer.json", "one", validation=["a.txt"])
    two = tokenize(["a.txt", "a.jsonl"], "tokenizer.json", "two", validation=["a.txt"], n_workers=2)
    assert one == two
    for name in names(Path("one")):
        assert Path("one", name).read_bytes() == Path("two", name).read_bytes()
    assert load_corpus("two").train.tolist() == 2 * load_corpus("two").validation.tolist()
    assert load_corpus("two").validation.tolist() == encoded(TEXTS, Path("tokenizer.json"))


def test_few_chunks_are_read_ahead_and_a_process_that_dies_is_one_line(folder: Path) -> None:
    read = 0

    def chunks():
        nonlocal read
        for read in itertools.count(1):
            yield Chunk([f"text {read}"], 0.0)

    parts = encode_all(chunks(), Encoding("tokenizer.json", 256, "<u2"), 2)
    for done in range(1, 31):
        expected = encoded([f"text {done}"], Path("tokenizer.json"))
        assert next(parts)[0].tokens == np.array(expected, "<u2").tobytes()
        assert read <= done + 2 * encode.CHUNKS_AHEAD
    multiprocessing.active_children()[0].kill()
    message = "n_workers=2 is too many for this machine, or they were killed .a process died.; expected fewer"
    with pytest.raises(ArgumentError, match=message):
        list(parts)
    assert not multiprocessing.active_children()


def test_a_large_vocabulary_needs_four_bytes(folder: Path) -> None:
    for size, suffix in ((65_536, "u16"), (65_537, "u32")):
        words = {END: 0, **{f"w{i}": i for i in range(1, size)}}
        tokenizer = Tokenizer(models.WordLevel(words, unk_token=END))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
        tokenizer.save("words.json")
        Path("words.txt").write_text(f"w{size - 1} w7")
        manifest = tokenize(["words.txt"], "words.json", suffix, validation=["words.txt"])
        corpus = load_corpus(suffix)
        assert manifest["vocab_size"] == corpus.vocab_size == size
        assert corpus.train.dtype.itemsize * 8 == int(suffix[1:])
        assert corpus.train.tolist() == [size - 1, 7, 0]


def test_truncation_padding_and_added_tokens_of_the_tokenizer_are_left_out(folder: Path) -> None:
    tokenizer = save_tokenizer(Path("plain.json"))
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=8)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{END} $A", special_tokens=[(END, 256)])  # type: ignore[assignment]
    tokenizer.save("chat.json")
    tokenize(["a.txt"], "chat.json", "out", validation_fraction=0.2)
    assert load_corpus("out").train.tolist() == encoded(sides(TEXTS, 0.2)[0], Path("plain.json"))


def test_progress_ends_at_the_size_of_the_files(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("varprop.corpus.build.CHUNK_CHARACTERS", 200)
    seen: list[tuple[int, int]] = []
    tokenize(["a.txt", "a.jsonl"], "tokenizer.json", "out", progress=lambda *pair: seen.append(pair))
    total = Path("a.txt").stat().st_size + Path("a.jsonl").stat().st_size
    assert seen == sorted(seen)
    assert len(seen) > 4
    assert {pair[1] for pair in seen} == {total}
    assert seen[-1][0] == total


# Held-out documents ---------------------------------------------------------------------------------------------------


def test_held_out_documents_are_a_fraction_by_their_text_alone() -> None:
    texts = [f"text {number}" for number in range(20_000)]
    for fraction in (0.01, 0.3):
        share = np.mean([is_held_out(text, fraction) for text in texts])
        assert abs(share - fraction) < 5 * math.sqrt(fraction * (1 - fraction) / 20_000)  # false-fail rate 6e-7
    assert all(is_held_out(text, 0.3) for text in texts if is_held_out(text, 0.01))
    assert is_held_out("text 71", 0.01) == (int.from_bytes(bytes.fromhex("4bb8ef1feb177698")) < 0.01 * 2**64)


def test_a_document_ends_wherever_the_end_token_stands(folder: Path) -> None:
    Path("b.jsonl").write_text(json.dumps({"text": f"one{END}two"}) + "\n" + json.dumps({"text": " \n"}) + "\n")
    manifest = tokenize(["b.jsonl"], "tokenizer.json", "out", validation=["a.txt"])
    assert manifest["train"]["documents"] == 2
    assert load_corpus("out").train.tolist() == encoded(["one", "two"], Path("tokenizer.json"))


def test_a_text_file_without_the_end_token_is_one_document(folder: Path) -> None:
    Path("one.txt").write_bytes(TEXTS[0].encode())
    Path("two.txt").write_bytes(TEXTS[1].encode())
    manifest = tokenize(["two.txt", "one.txt"], "tokenizer.json", "out", validation=["a.txt"])
    assert manifest["train"]["documents"] == 2
    assert load_corpus("out").train.tolist() == encoded([TEXTS[1], TEXTS[0]], Path("tokenizer.json"))


def test_a_separator_and_a_letter_across_blocks(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for size in (1, 2, 3, 7, 50):
        monkeypatch.setattr("varprop.corpus.documents.BLOCK_BYTES", size)
        assert [text for text, _ in read_documents(Path("a.txt"), "", END)] == TEXTS


# Bad input ------------------------------------------------------------------------------------------------------------


def write(name: str, content: bytes) -> Callable[[], list[str]]:
    def files() -> list[str]:
        Path(name).write_bytes(content)
        return [name]

    return files


@pytest.mark.parametrize(
    "inputs, message",
    [
        (list, "inputs=[] is empty"),
        (lambda: ["none.txt"], "input='none.txt' is missing, or no file"),
        (lambda: ["."], "input='.' is of an unknown kind"),
        (write("a.csv", b"x"), "input='a.csv' is of an unknown kind; expected .txt or .jsonl"),
        (write("a.parquet.gz", b"x"), "is of an unknown kind"),
        (write("a.txt", b""), "inputs files are without a document"),
        (write("a.txt", b" \n"), "inputs files are without a document"),
        (write("a.jsonl", b"\n"), "inputs files are without a document"),
        (write("b.jsonl", b'{"text": "x"}\n\n{"text"'), "input='b.jsonl' is not JSON in line 3"),
        (write("b.jsonl", b'{"text": "x"}\n{"body": "x"}'), "without a string 'text' in line 2"),
        (write("b.jsonl", b'{"text": null}'), "without a string 'text' in line 1"),
        (write("b.jsonl", b'["text"]'), "without a string 'text' in line 1"),
        (write("b.jsonl", b'{"text": "\\ud800"}'), "not text in line 1"),
        (write("b.jsonl", b'{"text": "x"}\n"\xff"'), "input='b.jsonl' is not UTF-8 in line 2"),
        (write("b.jsonl", b"[" * 100_000), "not JSON in line 1"),
        (write("b.txt", b"good \xff"), "input='b.txt' is not UTF-8 (near byte 5)"),
        (write("b.txt", "UTF-16".encode("utf-16")), "input='b.txt' is not UTF-8 (near byte 0)"),
        (write("b.txt", "é".encode()[:1]), "input='b.txt' is not UTF-8 (cut off at byte 1)"),
        (write("b.txt.gz", gzip.compress(b"x" * 99)[:-9]), "input='b.txt.gz' is truncated or damaged"),
        (write("b.txt.gz", b"plain"), "input='b.txt.gz' is truncated or damaged"),
        (write("b.txt.xz", lzma.compress(b"x" * 99)[:-9]), "input='b.txt.xz' is truncated or damaged"),
        (write("b.jsonl.xz", b"plain"), "input='b.jsonl.xz' is truncated or damaged"),
    ],
)
def test_bad_files_are_one_line_and_leave_nothing(folder: Path, inputs, message: str) -> None:
    given = inputs()
    before = names(folder)
    with pytest.raises(ArgumentError) as caught:
        tokenize(given, "tokenizer.json", "out")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert names(folder) == before


@pytest.mark.parametrize(
    "options, message",
    [
        ({"document_end": "</s>"}, "document_end='</s>' is not in the vocabulary of 'tokenizer.json'; expected one of"),
        ({"tokenizer": "none.json"}, "tokenizer='none.json' is missing or broken"),
        ({"tokenizer": "a.jsonl"}, "tokenizer='a.jsonl' is missing or broken"),
        ({"validation_fraction": 0.0}, "validation_fraction=0.0 is outside the domain"),
        ({"validation_fraction": float("nan")}, "validation_fraction=nan is outside the domain"),
        ({"validation_fraction": 1e-9}, "too small for 40 documents (validation has none)"),
        ({"validation_fraction": 1 - 1e-9}, "too large for 40 documents (train has none)"),
        ({"validation": ["empty.txt"]}, "validation files are without a document"),
        ({"n_workers": 0}, "n_workers=0 is outside the domain"),
        ({"out": "no/such/out"}, "output='no/such/out' cannot be written"),
        ({"out": "a.txt/out"}, "cannot be written"),
        ({"out": "a.txt"}, "out='a.txt' is there already"),
        ({"out": "full"}, "out='full' is there already, and not from these inputs and options"),
    ],
)
def test_bad_options_are_one_line_and_leave_nothing(folder: Path, options: dict, message: str) -> None:
    Path("empty.txt").write_bytes(b"\n")
    Path("full").mkdir()
    Path("full/manifest.json").write_text("{}")
    before = names(folder)
    with pytest.raises(ArgumentError) as caught:
        tokenize(**{"inputs": ["a.txt"], "tokenizer": "tokenizer.json", "out": "out", **options})
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert names(folder) == before


def test_a_text_that_the_tokenizer_refuses(folder: Path) -> None:
    tokenizer = Tokenizer(models.WordLevel({END: 0}, unk_token="<unk>"))
    tokenizer.save("narrow.json")
    with pytest.raises(ArgumentError, match=r"document='Document 0.* is refused by the tokenizer"):
        tokenize(["a.txt"], "narrow.json", "out")


def test_the_same_corpus_is_left_alone_and_another_is_not_overwritten(folder: Path) -> None:
    Path("out").mkdir()  # an empty directory may be filled
    first = tokenize(["a.txt"], "tokenizer.json", "out", validation_fraction=0.2)
    stamps = {path: path.stat().st_mtime_ns for path in Path("out").iterdir()}
    assert tokenize(["a.txt"], "tokenizer.json", "out", validation_fraction=0.2, n_workers=3) == first
    assert stamps == {path: path.stat().st_mtime_ns for path in Path("out").iterdir()}
    Path("a.txt").write_text("other")
    for options in ({"inputs": ["a.txt"]}, {"inputs": ["a.jsonl"]}, {"field": "n"}):
        arguments = {"inputs": ["a.jsonl"], "tokenizer": "tokenizer.json", "out": "out", **options}
        with pytest.raises(ArgumentError, match="is there already, and not from these"):
            tokenize(**arguments)
    assert stamps == {path: path.stat().st_mtime_ns for path in Path("out").iterdir()}
