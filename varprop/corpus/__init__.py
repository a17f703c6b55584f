"""Real text as token ids: what training and simulation read."""

from varprop.corpus.load import Corpus, load_corpus
from varprop.corpus.windows import n_windows, window_starts, windows

__all__ = ["Corpus", "load_corpus", "n_windows", "window_starts", "windows"]
