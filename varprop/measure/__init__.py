"""What is read off tensors, once for all readers."""

from varprop.measure.moments import branch_correlation, second_moment, token_correlation, variance

__all__ = ["branch_correlation", "second_moment", "token_correlation", "variance"]
