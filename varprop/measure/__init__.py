"""What is read off tensors, once for all readers."""

from varprop.measure.moments import BRANCH_STREAM, branch_correlation, second_moment, token_correlation, variance

__all__ = ["BRANCH_STREAM", "branch_correlation", "second_moment", "token_correlation", "variance"]
