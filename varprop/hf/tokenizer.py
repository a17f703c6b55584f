"""Tokenizer files that `AutoTokenizer` reads without a network."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from varprop.errors import ArgumentError, require
from varprop.files import write_text

DOCUMENT_END, PADDING = "<|endoftext|>", "<|pad|>"


def bundled() -> str:
    """The JSON of the package's tokenizer, which its corpora are written with."""
    return (files("varprop") / "assets" / "bpe8192.json").read_text(encoding="utf-8")


def load_tokenizer(path: str | Path | None = None) -> Tokenizer:
    """The tokenizer in a tokenizer.json, or the package's own; `ArgumentError` for a missing or broken file.

    >>> load_tokenizer().encode("A new day").ids == load_tokenizer().encode("A new day").ids
    True
    """
    try:
        return Tokenizer.from_str(bundled() if path is None else Path(path).read_text(encoding="utf-8"))
    except Exception as error:  # the tokenizers library raises plain Exception
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ArgumentError(f"tokenizer={str(path)!r} cannot be read ({reason}); expected a tokenizer.json") from None


def require_fit(tokenizer: Tokenizer, vocab_size: int) -> None:
    """`ArgumentError` unless every id of the tokenizer is a row of the embedding."""
    size = tokenizer.get_vocab_size()
    wrong, expected = f"too small for a tokenizer of {size} entries", f"at least {size}, or the model's own tokenizer"
    require(size <= vocab_size, ArgumentError, "vocab_size", vocab_size, wrong, expected)


def write(folder: Path, tokenizer: Tokenizer, max_positions: int) -> dict[str, Any]:
    """Write tokenizer.json and tokenizer_config.json; the ids that belong into config.json.

    A document begins after the end of the one before: `<|endoftext|>` is the first token of a text, too. No special
    token is added to a text by itself.
    """
    tokenizer.save(str(folder / "tokenizer.json"))
    end, padding = tokenizer.token_to_id(DOCUMENT_END), tokenizer.token_to_id(PADDING)
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_positions,
        "clean_up_tokenization_spaces": False,
    }
    if end is not None:
        config |= {"bos_token": DOCUMENT_END, "eos_token": DOCUMENT_END, "unk_token": None}
    if padding is not None or end is not None:
        config["pad_token"] = DOCUMENT_END if padding is None else PADDING
    write_text(folder / "tokenizer_config.json", json.dumps(config, indent=2) + "\n")
    return {"bos_token_id": end, "eos_token_id": end, "pad_token_id": end if padding is None else padding}
