"""Models of Hugging Face: config.json to spec and back, weights both ways, tokenizer files."""

from varprop.hf.config import MAX_POSITIONS, config_of, family_of, spec_of
from varprop.hf.export import Exported, export, load, save_run
from varprop.hf.fold import folded_fields, plain_spec
from varprop.hf.tokenizer import SpecialTokens, copy_tokenizer, load_tokenizer, require_fit, tokenizer_of

__all__ = [
    "MAX_POSITIONS",
    "Exported",
    "SpecialTokens",
    "config_of",
    "copy_tokenizer",
    "export",
    "family_of",
    "folded_fields",
    "load",
    "load_tokenizer",
    "plain_spec",
    "require_fit",
    "save_run",
    "spec_of",
    "tokenizer_of",
]
