"""Small models on disk, as transformers writes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from varprop.diagnose.open import quiet

from . import zoo

N_IDS = 260
SPECIAL = {"begin": 256, "end": 257, "pad": 258, "mask": 259}


def save_tokenizer(folder: Path, *, begins: bool) -> Tokenizer:
    """Byte by byte, and four special tokens; begins: a text is put between the first two."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({character: i for i, character in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    tokenizer.add_special_tokens([f"<{name}>" for name in SPECIAL])
    if begins:
        added = [("<begin>", SPECIAL["begin"]), ("<end>", SPECIAL["end"])]
        tokenizer.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
            single="<begin> $A <end>", special_tokens=added
        )
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"bos_token": "<begin>", "eos_token": "<end>", "pad_token": "<pad>", "mask_token": "<mask>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    return tokenizer


def save_model(folder: Path, family: str = "llama", *, begins: bool = False, **options: Any) -> Any:
    """A model of `zoo` in a new folder, with a tokenizer of 260 ids; options: of `save_pretrained`.

    family: one of the zoo, or "headless", an encoder without a head.
    """
    with quiet():
        model: Any = zoo.make("bert" if family == "headless" else family, vocab_size=N_IDS)
        model = model.bert if family == "headless" else model
        model.save_pretrained(folder, **options)
    save_tokenizer(folder, begins=begins)
    return model


def change_config(folder: Path, **fields: object) -> None:
    """Set entries of the config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
