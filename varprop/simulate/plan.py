"""What a grid consists of: points, each a spec with run arguments and an id of its content, drawn in rounds."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from varprop.errors import ArgumentError, require
from varprop.results import DIMENSIONS, VARIABLES
from varprop.simulate.block import networks_per_block
from varprop.simulate.inputs import LARGEST_NETWORK, positive_integer, read_inputs
from varprop.simulate.sampling import DTYPES, METHODS, check_device, checked_probes
from varprop.simulate.stop import StopRule
from varprop.simulate.text import text_tokens
from varprop.spec import ModelSpec
from varprop.spec.axes import Axes, check_names, combinations

RUN_ARGUMENTS = ("n_tokens", "token_correlation")
"""Arguments of `sample` that may be axes."""
ROUND_BLOCKS = {"cpu": 8, "cuda": 1}
"""Blocks of networks that are drawn and saved at a time."""
Span = tuple[int, int]
"""Networks first..stop - 1 of a point."""


@dataclass(frozen=True, eq=False)
class Point:
    """One combination of a grid. `task` is the canonical JSON of all that decides its numbers."""

    spec: ModelSpec
    arguments: dict[str, Any]
    task: str
    round_size: int

    @functools.cached_property
    def id(self) -> str:
        """First 16 hexadecimal digits of the SHA-256 of the task."""
        return hashlib.sha256(self.task.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Plan:
    """A grid before it is run: one point per combination of the axes, the last axis fastest; points may be equal."""

    spec: ModelSpec
    axes: Axes
    points: tuple[Point, ...]
    n_networks: int
    seed: int
    device: str
    stop: StopRule | None = None

    @functools.cached_property
    def distinct(self) -> tuple[Point, ...]:
        """Every point once."""
        return tuple({point.id: point for point in self.points}.values())

    @property
    def most_networks(self) -> int:
        """Networks that a point may use: `n_networks`, or its equal share of the rule's `max_networks`."""
        if self.stop is None or self.stop.max_networks is None:
            return self.n_networks
        return min(self.n_networks, self.stop.max_networks // len(self.distinct))

    def first_look(self, point: Point) -> int:
        """Networks that a point has in any case."""
        if self.stop is None:
            return self.most_networks
        return min(self.most_networks, -(-self.stop.min_networks // point.round_size) * point.round_size)


def make_plan(
    spec: ModelSpec,
    axes: Axes,
    *,
    n_networks: int,
    n_tokens: int | None = None,
    token_correlation: Any = 0.0,
    inputs: Any = None,
    text: int | None = None,
    corpus: str = "embedded",
    seed: int = 0,
    method: str = "explicit",
    backward: bool = False,
    n_probes: int | None = None,
    dtype: str = "float32",
    device: str = "cpu",
    draw_device: str | None = None,
    stop: StopRule | None = None,
    round_networks: int | None = None,
) -> Plan:
    """The points of a grid, checked: `ArgumentError` or `SpecError` before anything runs. Arguments as of `grid`."""
    check_names(axes, DIMENSIONS, VARIABLES, "more n_networks, or a grid a seed")
    require(
        isinstance(method, str) and method in METHODS,
        ArgumentError,
        "method",
        method,
        "unknown",
        "one of " + ", ".join(METHODS),
    )
    known = isinstance(dtype, str) and dtype in DTYPES
    require(known, ArgumentError, "dtype", dtype, "unknown", "one of " + ", ".join(DTYPES))
    kind = torch.device(check_device(device)).type
    run = {
        "seed": positive_integer("seed", seed, minimum=0),
        "method": method,
        "backward": backward,
        "n_probes": n_probes,
        "dtype": dtype,
        "device": kind,
        "draw_device": kind if draw_device is None else torch.device(check_device(draw_device, "draw_device")).type,
    }
    given = {"n_tokens": n_tokens, "token_correlation": token_correlation, "inputs": inputs}
    require(text is None or inputs is None, ArgumentError, "text", text, "given with inputs", "one of them")
    given_corpus = text is None and corpus != "embedded"
    require(not given_corpus, ArgumentError, "corpus", corpus, "given without text", "text, the number of sequences")
    read = (
        None if text is None else functools.cache(lambda n: text_tokens(n, n_sequences=text, corpus=corpus, seed=seed))
    )
    size = None if round_networks is None else positive_integer("round_networks", round_networks)
    points = tuple(_point(spec, fields, given, read, run, size) for fields in combinations(axes, depths=True))
    plan = Plan(
        spec, axes, points, positive_integer("n_networks", n_networks, maximum=LARGEST_NETWORK), run["seed"], kind, stop
    )
    budget = stop.max_networks if stop else None
    enough = plan.most_networks >= min(2 if stop else 1, plan.n_networks)
    domain = f"at least 2 for each of the {len(plan.distinct)} points"
    require(enough, ArgumentError, "stop.max_networks", budget, "too few", domain)
    return plan


def _point(
    spec: ModelSpec,
    fields: dict[str, Any],
    given: dict[str, Any],
    read: Callable[[Any], Any] | None,
    run: dict[str, Any],
    size: int | None,
) -> Point:
    arguments = given | {name: fields.pop(name) for name in RUN_ARGUMENTS if name in fields}
    if read is not None:
        arguments |= {"inputs": read(positive_integer("n_tokens", arguments["n_tokens"])), "n_tokens": None}
    changed = spec.with_fields(fields)
    checked = read_inputs(changed, **arguments)
    n_probes = checked_probes(run["backward"], run["n_probes"], run["method"], checked.n_tokens * changed.d_model)
    described = {
        "spec": changed.to_dict(),
        "n_tokens": checked.n_tokens,
        **checked.attributes,
        **run,
        "n_probes": n_probes,
    }
    if size is None:
        _, layer_numbers = METHODS[run["method"]]
        block = networks_per_block(changed, checked.n_tokens, run["draw_device"], layer_numbers)
        size = ROUND_BLOCKS.get(run["draw_device"], 1) * block
    return Point(changed, arguments | run, json.dumps(described, sort_keys=True, separators=(",", ":")), size)


def missing_rounds(found: Iterable[Span], n_networks: int, size: int) -> Iterator[Span]:
    """Rounds of at most `size` networks that fill 0..n_networks - 1 where the spans `found` do not.

    >>> list(missing_rounds([(0, 4), (6, 9)], 14, 4))
    [(4, 6), (9, 12), (12, 14)]
    """
    at = 0
    for first, stop in [*sorted(found), (n_networks, n_networks)]:
        while at < min(first, n_networks):
            end = min((at // size + 1) * size, first, n_networks)
            yield at, end
            at = end
        at = max(at, stop)


def n_missing(found: Iterable[Span], n_networks: int) -> int:
    """How many of the networks 0..n_networks - 1 no span has.

    >>> n_missing([(0, 4), (6, 9), (7, 8)], 14)
    7
    """
    at = missing = 0
    for first, stop in [*sorted(found), (n_networks, n_networks)]:
        missing += max(0, min(first, n_networks) - at)
        at = max(at, stop)
    return missing


def first_gap(found: Sequence[Span]) -> int:
    """Number of the first network that no span has.

    >>> first_gap([(8, 9), (0, 4), (2, 6)])
    6
    """
    at = 0
    for first, stop in sorted(found):
        if first > at:
            break
        at = max(at, stop)
    return at
