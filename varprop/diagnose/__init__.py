"""How a model uses its depth: every layer score, on any model, with error bars."""

from varprop.diagnose.limits import Limits
from varprop.diagnose.measure import RELEASED, SCORES, STANDARD, measure
from varprop.diagnose.open import mask_token_of, open_model, require_length, vocab_size_of
from varprop.diagnose.precision import precision_gap, spot_check
from varprop.diagnose.replay import Batch, Captured, Replay
from varprop.diagnose.session import Session
from varprop.diagnose.table import table
from varprop.diagnose.text import sequences
from varprop.diagnose.wavefront import walk

__all__ = [
    "RELEASED",
    "SCORES",
    "STANDARD",
    "Batch",
    "Captured",
    "Limits",
    "Replay",
    "Session",
    "mask_token_of",
    "measure",
    "open_model",
    "precision_gap",
    "require_length",
    "sequences",
    "spot_check",
    "table",
    "vocab_size_of",
    "walk",
]
