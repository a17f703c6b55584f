"""What each process of a grid does: claim missing rounds and compute them until none is left."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from varprop.simulate import shards
from varprop.simulate.plan import Plan, Point, Span, first_gap, missing_rounds
from varprop.simulate.stop import StopRule

PAUSE = 0.2
"""Seconds between two looks at rounds that other processes compute."""


Read = Callable[[Path, Point, Span], xr.Dataset | None]


class Needs:
    """How many networks a point needs, as far as its finished rounds tell. Remembers the rule's values in them.

    read: reads a round, or removes it and gives None.
    """

    def __init__(self, plan: Plan, directories: Sequence[Path], read: Read = shards.read_or_discard) -> None:
        self.plan = plan
        self.directories = tuple(directories)
        self._read = read
        self._values: dict[Path, NDArray[np.float64]] = {}

    def of(self, point: Point, found: dict[Span, Path]) -> tuple[int, bool]:
        """Networks to have before the next decision, and whether they are all there and enough."""
        present, wanted, rule = first_gap(list(found)), self.plan.first_look(point), self.plan.stop
        while rule is not None and wanted < self.plan.most_networks and present >= wanted:
            values = self._of_rule(point, found, rule, wanted)
            if values is None:  # a damaged round was removed
                return self.of(point, shards.spans(self.directories, point))
            if rule.error(values) <= rule.stderr:
                break
            wanted = min((wanted // point.round_size + 1) * point.round_size, self.plan.most_networks)
        return wanted, present >= wanted

    def error(self, point: Point, found: dict[Span, Path], n_networks: int) -> float:
        """The rule's standard error on the first networks of a point; NaN for fewer than 2 or without a rule."""
        if self.plan.stop is None or n_networks < 2:
            return float("nan")
        values = self._of_rule(point, found, self.plan.stop, n_networks)
        return float("nan") if values is None else float(self.plan.stop.error(values))

    def _of_rule(
        self, point: Point, found: dict[Span, Path], rule: StopRule, n_networks: int
    ) -> NDArray[np.float64] | None:
        """The rule's variable of the first networks; None if a round turned out to be damaged."""
        values = np.empty(n_networks)
        for (first, stop), path in sorted(found.items()):
            if first >= n_networks:
                continue
            if path not in self._values:
                dataset = self._read(path, point, (first, stop))
                if dataset is None:
                    return None
                self._values[path] = dataset[rule.variable].sel(site=rule.site).isel(layer=-1).values
            values[first:stop] = self._values[path][: n_networks - first]
        return values


def drain(
    plan: Plan,
    directory: Path,
    device: str,
    *,
    points: Sequence[Point],
    wait: bool,
    seconds: float | None = None,
) -> int:
    """Compute rounds of `points`, in this order, until all are finished or only other processes are at them.

    wait: go on looking until those have finished or died. seconds: no round begins later.
    Returns the rounds computed here.
    """
    needs, deadline = Needs(plan, [directory]), float("inf") if seconds is None else time.monotonic() + seconds
    computed, open_points, idle_looks = 0, list(points), 0
    while open_points and time.monotonic() < deadline:
        before, left = computed, []
        for point in open_points:
            done, finished = _advance(needs, point, directory, device, deadline)
            computed += done
            if not finished:
                left.append(point)
        idle_looks = idle_looks + 1 if computed == before else 0
        if left and idle_looks:
            if idle_looks > 1 and not wait:  # one look may meet that of `status` at a lock
                break
            time.sleep(PAUSE)
        open_points = left
    return computed


def _advance(needs: Needs, point: Point, directory: Path, device: str, deadline: float) -> tuple[int, bool]:
    """Rounds of a point computed here, and whether it is finished."""
    computed = 0
    while True:
        found = shards.spans([directory], point)
        wanted, finished = needs.of(point, found)
        if finished:
            return computed, True
        before = computed
        for span in missing_rounds(found, wanted, point.round_size):
            if time.monotonic() >= deadline:
                return computed, False
            computed += shards.compute(directory, point, span, device)
        if computed == before:  # other processes are at what is missing
            return computed, False
