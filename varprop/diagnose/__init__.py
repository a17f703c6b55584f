"""How a model uses its depth: every layer score, on any model, with error bars."""

from varprop.diagnose.limits import Limits
from varprop.diagnose.measure import RELEASED, SCORES, STANDARD, measure
from varprop.diagnose.replay import Batch, Captured, Replay
from varprop.diagnose.session import Session
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
    "measure",
    "walk",
]
