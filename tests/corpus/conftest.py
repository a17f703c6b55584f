"""Small documents, a small tokenizer and an empty cache."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

END = "<|endoftext|>"
TEXTS = [f"Document {number} says: naïve café 中文 🙂.\r\n Line two.\n" for number in range(40)]


def save_tokenizer(path: Path) -> Tokenizer:
    """Byte by byte: 256 ids, and 256 for the end of a document."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({character: i for i, character in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    tokenizer.add_special_tokens([END])
    tokenizer.save(str(path))
    return tokenizer


@pytest.fixture
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    return cache


@pytest.fixture
def folder(tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory: the same documents as a.txt and a.jsonl, and tokenizer.json."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_bytes(END.join(TEXTS).encode())
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text, "n": 1}) for text in TEXTS) + "\n\n")
    save_tokenizer(tmp_path / "tokenizer.json")
    return tmp_path
