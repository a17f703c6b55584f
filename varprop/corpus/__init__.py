"""Real text as token ids: what training and simulation read."""

from varprop.corpus.build import tokenize
from varprop.corpus.load import embedded_text, load_corpus, require_same_tokenizer
from varprop.corpus.tokens import Corpus
from varprop.corpus.windows import n_windows, window_starts, windows

__all__ = [
    "Corpus",
    "embedded_text",
    "load_corpus",
    "n_windows",
    "require_same_tokenizer",
    "tokenize",
    "window_starts",
    "windows",
]
