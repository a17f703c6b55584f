"""Training: `fit` runs a network of a spec on real text and records its variance profile on the way."""

from varprop.train.checkpoint import load_model
from varprop.train.config import TrainConfig
from varprop.train.data import batch
from varprop.train.grow import grow
from varprop.train.loop import fit

__all__ = ["TrainConfig", "batch", "fit", "grow", "load_model"]
