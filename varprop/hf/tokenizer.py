"""Tokenizer files: those of a run or a model folder, and those that `AutoTokenizer` reads without a network."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from varprop.corpus import encode
from varprop.corpus.load import TOKENIZER
from varprop.errors import ArgumentError, require
from varprop.files import replacing, write_text

DOCUMENT_END, PADDING = "<|endoftext|>", "<|pad|>"
FILE, CONFIG, MAP = "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"


@dataclass(frozen=True)
class SpecialTokens:
    """Ids of the tokens that begin a text, end it, fill up a batch, and stand for a word that is asked for: bos, eos,
    pad and mask; None where there is none."""

    begin: int | None = None
    end: int | None = None
    padding: int | None = None
    mask: int | None = None

    @property
    def first(self) -> int | None:
        """The token that a text is read behind: the one that begins it, else the end of the one before, as `lm_eval`.

        >>> SpecialTokens(end=7).first, SpecialTokens(begin=0, end=7).first
        (7, 0)
        """
        return self.end if self.begin is None else self.begin


def load_tokenizer(path: str | Path | None = None) -> Tokenizer:
    """The tokenizer in a tokenizer.json, or the package's own; `ArgumentError` for a missing or broken file.

    >>> load_tokenizer().encode("A new day").ids == load_tokenizer().encode("A new day").ids
    True
    """
    return encode.load_tokenizer(TOKENIZER if path is None else path)


def tokenizer_of(folder: str | Path) -> tuple[Tokenizer, SpecialTokens] | None:
    """The tokenizer in the folder of a run or of a model, None without a tokenizer.json there.

    A run's text begins and ends with the `document_end` of its corpus, as run.json tells; of a model they are what
    tokenizer_config.json names, else special_tokens_map.json. Raises `ArgumentError` for a broken file.
    """
    folder = Path(folder)
    if not (folder / FILE).is_file():
        return None
    tokenizer = load_tokenizer(folder / FILE)
    if (folder / "run.json").is_file():
        return tokenizer, _of_document_end(tokenizer, _document_end(folder / "run.json"))
    names: dict[str, Any] = {}
    for path in (folder / MAP, folder / CONFIG):
        names |= _read(path) if path.is_file() else {}
    begin, end, padding, mask = (_id(tokenizer, names.get(f"{key}_token")) for key in ("bos", "eos", "pad", "mask"))
    return tokenizer, SpecialTokens(begin, end, end if padding is None else padding, mask)


def copy_tokenizer(source: str | Path, target: str | Path) -> None:
    """Copy what `tokenizer_of` reads in a model folder into another folder; nothing where there is nothing."""
    for name in (FILE, CONFIG, MAP):
        if (Path(source) / name).is_file():
            with replacing(Path(target) / name) as temporary:
                shutil.copyfile(Path(source) / name, temporary)


def require_fit(tokenizer: Tokenizer, vocab_size: int) -> None:
    """`ArgumentError` unless every id of the tokenizer is a row of the embedding."""
    size = 1 + max(tokenizer.get_vocab().values())
    wrong, expected = f"too small for a tokenizer of {size} entries", f"at least {size}, or the model's own tokenizer"
    require(size <= vocab_size, ArgumentError, "vocab_size", vocab_size, wrong, expected)


def write(folder: Path, tokenizer: Tokenizer, special: SpecialTokens | None, max_positions: int) -> dict[str, Any]:
    """Write tokenizer.json and tokenizer_config.json; the ids that belong into config.json.

    special: None for those that are named as in the package's own tokenizer, where it has them. No special token is
    added to a text but by the tokenizer itself.
    """
    tokenizer.save(str(folder / FILE))
    if special is None:
        special = _of_document_end(tokenizer, tokenizer.token_to_id(DOCUMENT_END))
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_positions,
        "clean_up_tokenization_spaces": False,
    }
    ids = {"bos": special.begin, "eos": special.end, "pad": special.padding}
    config |= {f"{key}_token": tokenizer.id_to_token(i) for key, i in ids.items() if i is not None}
    write_text(folder / CONFIG, json.dumps(config, indent=2) + "\n")
    return {f"{key}_token_id": i for key, i in ids.items()}


def _of_document_end(tokenizer: Tokenizer, end: int | None) -> SpecialTokens:
    """A document begins after the end of the one before: that is the first token of a text, too."""
    padding = tokenizer.token_to_id(PADDING)
    return SpecialTokens(end, end, end if padding is None else padding)


def _document_end(path: Path) -> int | None:
    try:
        return _read(path)["corpus"]["document_end"]
    except (KeyError, TypeError):
        wrong = "without the document_end of its corpus"
        raise ArgumentError(f"file={str(path)!r} is {wrong}; expected the run.json of a run") from None


def _read(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        raise ArgumentError(f"file={str(path)!r} is missing or broken; expected a JSON object") from None


def _id(tokenizer: Tokenizer, token: Any) -> int | None:
    """The id of a token as tokenizer_config.json names it: its text, or an object with its text."""
    text = token.get("content") if isinstance(token, dict) else token
    return tokenizer.token_to_id(text) if isinstance(text, str) else None
