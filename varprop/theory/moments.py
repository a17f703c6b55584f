"""`Moments`: the state that a rule of the theory maps."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

from varprop.errors import AssumptionError

ASSUMPTIONS = ("centred", "gaussian", "exchangeable")
"""centred: E x = 0 over weights. gaussian: coordinates of the stream are Gaussian at large width, independent over
coordinates. exchangeable: all tokens have one second moment and all pairs one correlation."""


@dataclass(frozen=True)
class Moments:
    """Token Gram matrix of a stream or branch, and what may be assumed of it.

    gram: (n_recursions, P, P), entries E x_t.x_s / d, one matrix per independent sampling of the attention heads.
    P = n_tokens; where `exchangeable` holds, P = min(2, n_tokens): two tokens stand for all.

    >>> Moments.exchangeable(second_moment=2.0, token_correlation=0.5, n_tokens=1000).token_correlation
    array([0.5])
    """

    gram: np.ndarray
    n_tokens: int
    assumptions: frozenset[str] = field(default_factory=lambda: frozenset({"centred", "gaussian"}))

    @classmethod
    def exchangeable(
        cls, second_moment: float, token_correlation: float, n_tokens: int, n_recursions: int = 1
    ) -> Moments:
        """Two tokens that stand for `n_tokens` with one second moment and one correlation."""
        size = min(2, n_tokens)
        gram = second_moment * (np.full((size, size), token_correlation) + (1 - token_correlation) * np.eye(size))
        stacked = np.broadcast_to(gram, (n_recursions, size, size)).copy()
        return cls(stacked, n_tokens, frozenset(ASSUMPTIONS))

    def with_gram(self, gram: np.ndarray) -> Moments:
        """The same tokens and assumptions with another Gram matrix."""
        return replace(self, gram=gram)

    def require(self, assumption: str, rule: str) -> None:
        """Raise `AssumptionError` unless `assumption` holds."""
        if assumption not in self.assumptions:
            held = ", ".join(sorted(self.assumptions))
            raise AssumptionError(f"assumptions={held!r} is not enough for {rule}; expected {assumption!r}")

    @property
    def diagonal(self) -> np.ndarray:
        """Second moment per recursion and position, (n_recursions, P)."""
        return np.diagonal(self.gram, axis1=-2, axis2=-1)

    @property
    def second_moment(self) -> np.ndarray:
        """Mean over positions, per recursion."""
        return self.diagonal.mean(axis=-1)

    @property
    def token_correlation(self) -> np.ndarray:
        """Mean covariance of two different tokens over the mean second moment, per recursion.

        1 for a single token; 0 for a branch that is zero.
        """
        size = self.gram.shape[-1]
        second_moment = self.second_moment
        if size == 1:
            return np.where(second_moment > 0, 1.0, 0.0)
        off = (self.gram.sum(axis=(-2, -1)) - size * second_moment) / (size * (size - 1))
        return np.divide(off, second_moment, out=np.zeros_like(off), where=second_moment > 0)
