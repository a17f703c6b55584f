"""How many sequences the standard errors of a score rest on."""

from __future__ import annotations

import warnings
from collections.abc import Iterable

import numpy as np

from varprop.diagnose.session import Session
from varprop.diagnose.usefulness import split
from varprop.errors import AccuracyWarning

FEWEST = 8
"""Sequences; of fewer a standard error is too rough to be taken at its word."""
BY_TOKENS = {
    "jacobian": "jacobian_tokens",
    "permutation": "permutation_tokens",
    "screening": "permutation_tokens",
    "expert_ablation": "expert_tokens",
}
"""Scores that are measured on the first sequences of so many tokens, and the option that says how many."""
HELD_OUT = ("usefulness", "pruning")
"""Scores that are evaluated on the sequences that no map was fitted on (`fit_share`)."""


def warn_of_few(session: Session, names: Iterable[str]) -> None:
    """One `AccuracyWarning` naming those of the measured scores whose errors rest on fewer than `FEWEST` sequences.

    Over n sequences the true value is within 2 stated standard errors as often as Student's t of n - 1 degrees of
    freedom is within 2: 0.70 of the time over 2 sequences, 0.86 over 4, 0.91 over 8, not 0.95.
    """
    few: dict[str, list[str]] = {}
    for name in names:
        n_sequences, option = _sequences(session, name)
        if n_sequences < FEWEST:
            few.setdefault(f"{n_sequences} ({option})", []).append(name)
    if few:
        which = "; ".join(f"{', '.join(scores)}: {count}" for count, scores in few.items())
        message = f"standard errors over fewer than {FEWEST} sequences are rough and often too small: {which}"
        warnings.warn(message, AccuracyWarning, stacklevel=3)


def _sequences(session: Session, name: str) -> tuple[int, str]:
    """Sequences of a measured score, and the option that sets them."""
    if name == "permutation":
        counts = np.asarray(session.found["permutation_sequences"][1])
        return int(counts[counts > 0].min()), BY_TOKENS[name]
    if name in BY_TOKENS:
        return session.first_sequences(session.option(BY_TOKENS[name])).stop, BY_TOKENS[name]
    if name in HELD_OUT:
        rest = split(session)[1]
        return rest.stop - rest.start, "fit_share"
    return session.n_sequences, "all sequences"
