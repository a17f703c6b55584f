"""Closed forms for variance propagation at initialisation; numpy and scipy only. The main function is `predict`.

Components are imported from their files (`from varprop.theory.softmax import softmax_participation`); the ones that
take a whole spec are here too.
"""

from varprop.theory.collapse import token_collapse
from varprop.theory.depth import predict
from varprop.theory.growth import classify, classify_spec
from varprop.theory.jacobian import block_jacobian
from varprop.theory.mitigation import mitigation_table

__all__ = [
    "block_jacobian",
    "classify",
    "classify_spec",
    "mitigation_table",
    "predict",
    "token_collapse",
]
