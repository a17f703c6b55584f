"""The errors that bad input raises, and the warnings. Every error is a `ValueError` with a one-line message.

Message form: `name=value is <what is wrong>; expected <domain>`. The command line prints that line and exits with 2.
"""

from __future__ import annotations

from typing import Any


class VarpropError(ValueError):
    """Base of every error raised for bad input."""


class SpecError(VarpropError):
    """A model description is not valid."""


class AssumptionError(VarpropError):
    """A closed form was asked outside the assumptions under which it holds."""


class Stopped(Exception):  # noqa: N818
    """A signal asked a run to end before its last step; its state is saved. The command line exits with 3."""


class AccuracyWarning(UserWarning):
    """A prediction claims an error too large to be relied on; the message gives its size."""


class ReducedBatchWarning(UserWarning):
    """Memory was short: fewer networks are computed at a time. The numbers are the same."""


class LessMemoryWarning(UserWarning):
    """Memory was short: less is computed at a time. The numbers are the same to rounding."""


class BranchesWarning(UserWarning):
    """Attention and feed-forward of a model cannot be told apart; their statistics are absent."""


class LeftOutWarning(UserWarning):
    """A score that a model lacks something for is absent; the message says what."""


class DamagedShardWarning(UserWarning):
    """A file of a grid was truncated or changed; it was removed and is computed again."""


class SchemaError(VarpropError):
    """A result file or Dataset does not follow the results schema."""


class ArgumentError(VarpropError):
    """An argument of a function or command is outside its domain."""


class ShortMemoryError(ArgumentError):
    """Not even the smallest pieces of a computation have enough memory."""


class UnsuitedError(ArgumentError):
    """The model or its text lacks what a score needs, such as a head; among all scores, this one is left out."""


def require(condition: bool, error: type[VarpropError], name: str, value: Any, wrong: str, expected: str) -> None:
    """Raise `error` with the standard one-line message unless `condition` holds."""
    if not condition:
        raise error(f"{name}={value!r} is {wrong}; expected {expected}")
