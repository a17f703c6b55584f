"""Networks of a point, in shards that add up: `<id>-<first network>.nc`, the layers read alone, float32.

Networks come in rounds, whole blocks of the engine (which computes no less). The first round of every point measures
its spread; the second makes the stream resolve RESOLUTION, the third the branches too. The size of a round follows from
the spread measured before it, once a round, so that stopping hardly favours samples that missed large values.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import xarray as xr
from joblib import Parallel, delayed

from experiments.common import device_work
from experiments.theory_vs_simulation.points import Point, label, layers_read, make_spec, point_id, run_arguments
from varprop import results
from varprop.compare import check
from varprop.errors import SchemaError
from varprop.simulate import sample
from varprop.simulate.block import networks_per_block

FALSE_FAIL_RATE = 0.01
"""Of the whole experiment: every call of `check` gets its share, two a point."""
RESOLUTION = 0.05
"""Error beyond the claimed one that a cell has to resolve, relative (token correlation: absolute)."""
ROUNDS = ("first", "stream", "branches")
SITES = {"stream": ("resid_mid", "resid_post"), "branches": ("attn_out", "mlp_out", "resid_mid", "resid_post")}
MARGIN = 1.15
"""Networks asked for, over those that the spread measured would need."""
VARIABLES = ("second_moment", "token_correlation")


def simulate(
    points: Sequence[Point],
    folder: Path,
    device: str,
    n_workers: int,
    most_seconds: float,
    deadline: float,
    n_points: int,
) -> list[int]:
    """Networks of each point after all rounds that the deadline (wall clock) lets begin, n_workers points at a time.

    device: `cuda` stands for every accelerator there is, in turn.
    """
    found: list[int] = []
    for goal in ROUNDS:
        calls = (
            delayed(grow)(point, goal, folder, _device(device, i), most_seconds, deadline, n_points)
            for i, point in enumerate(points)
        )
        found = list(Parallel(n_jobs=n_workers, batch_size=1)(calls))  # type: ignore[arg-type]
        print(f"{goal}: {sum(n > 0 for n in found)} of {len(points)} points, {sum(found)} networks", flush=True)
    return found


def _device(device: str, index: int) -> str:
    return f"cuda:{index % torch.cuda.device_count()}" if device == "cuda" else device


def grow(
    point: Point, goal: str, folder: Path, device: str, most_seconds: float, deadline: float, n_points: int
) -> int:
    """Add the networks that a goal needs, if the deadline is not over; how many there are then.

    A point gets most_seconds of an accelerator at most, as `device_work` estimates them, and at least one block. They
    are drawn a second at a time, so that a deadline is kept to some seconds a worker.
    """
    networks = load_networks(point, folder)
    count = 0 if networks is None else networks.sizes["network"]
    if time.time() > deadline:
        return count
    wanted = 1 if networks is None else required_networks(networks, goal, n_points)
    drawn_on = "cpu" if device == "cpu" else "cuda"
    block = networks_per_block(make_spec(point), point["n_tokens"], drawn_on)
    each = device_work(make_spec(point), point["n_tokens"], block)["seconds"] / block
    total = math.ceil(min(wanted, max(most_seconds / each, block)) / block) * block
    size = max(1, int(1 / each / block)) * block
    while count < total and time.time() < deadline:
        _draw(point, count, min(size, total - count), folder, device)
        count += min(size, total - count)
    return count


def _draw(point: Point, first: int, n_networks: int, folder: Path, device: str) -> None:
    started = time.time()
    spec, layers = make_spec(point), layers_read(point)
    networks = sample(
        spec, **run_arguments(point), n_networks=n_networks, first_network=first, device=device, progress=False
    )
    kept = networks[list(VARIABLES)].sel(layer=layers).astype(np.float32)
    kept.attrs = networks.attrs | {"device": device.split(":")[0], "draw_device": device.split(":")[0]}
    results.save(kept, folder / f"{point_id(point)}-{first:06d}.nc")
    print(f"{label(point):<60} {first:>6} +{n_networks:<6} {time.time() - started:7.1f} s", flush=True)


def required_networks(networks: xr.Dataset, goal: str, n_points: int) -> int:
    """Networks with which every cell of the goal resolves RESOLUTION beyond its claimed error, with power 0.9.

    0 for the first round. What the networks there are would detect is asked of `check`, with their own means as the
    prediction: it depends on the spread alone and falls as one over the root of the networks.
    """
    if goal not in SITES:
        return 0
    rate, count = FALSE_FAIL_RATE / (2 * n_points), networks.sizes["network"]
    means = networks.mean("network", keep_attrs=True)
    seen = [check(means, networks, variable=name, false_fail_rate=rate).dataset.detectable for name in VARIABLES]
    worst = max(float(values.sel(site=list(SITES[goal])).max()) for values in seen)
    return count if worst <= RESOLUTION else math.ceil(MARGIN * count * (worst / RESOLUTION) ** 2)


def load_networks(point: Point, folder: Path) -> xr.Dataset | None:
    """All networks of a point, from 0 without a gap; None where there are none. A damaged shard ends them."""
    pieces: list[xr.Dataset] = []
    for path in shards(point, folder):
        try:
            piece = results.load(path)
        except SchemaError:
            break
        if int(piece.network[0]) != sum(p.sizes["network"] for p in pieces):
            break
        pieces.append(piece)
    return results.merge(pieces, "network") if pieces else None


def shards(point: Point, folder: Path) -> list[Path]:
    """Files of a point, in the order of their networks."""
    return sorted(folder.glob(f"{point_id(point)}-[0-9]*.nc"))


def print_work(points: Sequence[Point], n_devices: int) -> None:
    """The first round of every point on an accelerator: points, networks and work by group; seconds are rough."""
    groups: dict[tuple[str, int, int], list[dict[str, float]]] = {}
    for point in points:
        spec = make_spec(point)
        block = networks_per_block(spec, point["n_tokens"], "cuda")
        work = {"points": 1.0, "networks": float(block), **device_work(spec, point["n_tokens"], block)}
        groups.setdefault((point["group"], point["n_tokens"], point["n_layers"]), []).append(work)
    columns = ("points", "networks", "flops", "draws", "launches", "seconds")
    print(f"{'group':<10} {'T':>5} {'L':>4}", *(f"{name:>10}" for name in columns))
    total = dict.fromkeys(columns, 0.0)
    for key, works in sorted(groups.items()):
        sums = {name: sum(work[name] for work in works) for name in columns}
        total = {name: total[name] + sums[name] for name in columns}
        print(f"{key[0]:<10} {key[1]:>5} {key[2]:>4}", *(f"{sums[name]:>10.3g}" for name in columns))
    print(f"{'sum':<21}", *(f"{total[name]:>10.3g}" for name in columns))
    print(f"about {total['seconds'] / n_devices:.0f} s on {n_devices} accelerator(s); later rounds as the spread asks")
