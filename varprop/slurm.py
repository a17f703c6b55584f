"""Checks of what a SLURM job script is filled with."""

from __future__ import annotations

import re

from varprop.errors import ArgumentError, require

TIME = re.compile(r"\d{1,9}(:\d{1,2}){0,2}|\d{1,9}-\d{1,2}(:\d{1,2}){0,2}", re.ASCII)
MOST = 10**6


def require_time(text: str) -> None:
    """`ArgumentError` unless `text` is a limit as SLURM takes it."""
    domain = "minutes, h:mm:ss, or days-h[:mm[:ss]]"
    require(TIME.fullmatch(text) is not None, ArgumentError, "time", text, "no limit of SLURM", domain)


def require_count(name: str, number: int) -> None:
    """`ArgumentError` unless `number`, of jobs, nodes or processes, is in 1..`MOST`."""
    require(1 <= number <= MOST, ArgumentError, name, number, "outside the domain", f"an integer in 1..{MOST}")
