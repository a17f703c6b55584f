"""Real text as token ids: what training and simulation read."""

from varprop.corpus.build import tokenize
from varprop.corpus.load import load_corpus
from varprop.corpus.tokens import Corpus
from varprop.corpus.windows import n_windows, window_starts, windows

__all__ = ["Corpus", "load_corpus", "n_windows", "tokenize", "window_starts", "windows"]
