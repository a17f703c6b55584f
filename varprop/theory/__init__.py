"""Closed forms for variance propagation at initialisation; numpy and scipy only. The main function is `predict`."""

from varprop.theory.depth import predict

__all__ = ["predict"]
