from varprop.theory.depth import predict

__all__ = ["predict"]
