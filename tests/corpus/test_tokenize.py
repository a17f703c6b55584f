"""`tokenize` and the directories it writes: the ids, which documents are held out, what is refused."""

from __future__ import annotations

import gzip
import hashlib
import json
import lzma
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from varprop.__main__ import main
from varprop.corpus import load, load_corpus, tokenize
from varprop.corpus import tokenize as module
from varprop.corpus.encode import is_held_out
from varprop.errors import ArgumentError

TOKENIZER = load.ASSETS / "bpe8192.json"
END = load.DOCUMENT_END
TEXTS = [f"Document {number} says: naïve café 中文 🙂.\r\n Line two.\n" for number in range(40)]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same documents as text and as JSON lines."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_bytes(END.join(TEXTS).encode())
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text, "n": 1}) for text in TEXTS) + "\n\n")
    return tmp_path


def encoded(texts: list[str], tokenizer: Path = TOKENIZER) -> list[int]:
    """The independent way: the library, one document after another."""
    rules = Tokenizer.from_file(str(tokenizer))
    rules.no_truncation()
    rules.no_padding()
    end = rules.token_to_id(END)
    return [i for text in texts for i in [*rules.encode(text, add_special_tokens=False).ids, end]]
