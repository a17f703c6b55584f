"""Variance propagation in Pre-LN transformers: theory, simulation, training, and the comparison of the three.

>>> import varprop
>>> spec = varprop.presets.get("tiny")
>>> prediction = varprop.predict(spec, n_tokens=16)
>>> prediction.second_moment.sel(layer=0, site="resid_post").item()
1.0
"""

import importlib
from types import ModuleType
from typing import TYPE_CHECKING

from varprop import presets, results
from varprop._version import __version__
from varprop.spec import ModelSpec
from varprop.summary import summarise
from varprop.theory import predict

if TYPE_CHECKING:
    from varprop import compare, diagnose, evaluate, hf, plot, report, simulate, train

__all__ = [
    "ModelSpec",
    "__version__",
    "compare",
    "diagnose",
    "evaluate",
    "hf",
    "plot",
    "predict",
    "presets",
    "report",
    "results",
    "simulate",
    "summarise",
    "train",
]

_ON_FIRST_USE = ("compare", "diagnose", "evaluate", "hf", "plot", "report", "simulate", "train")


def __getattr__(name: str) -> ModuleType:
    """Import the parts that need torch or matplotlib when they are first used."""
    if name in _ON_FIRST_USE:
        return importlib.import_module(f"varprop.{name}")
    raise AttributeError(f"module 'varprop' has no attribute {name!r}")
