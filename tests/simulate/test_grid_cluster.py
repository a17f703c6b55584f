"""The workers of a grid as tasks of a Dask cluster, through joblib."""

from __future__ import annotations

from pathlib import Path

import joblib
import pytest

from varprop import presets, results
from varprop.simulate import grid

distributed = pytest.importorskip("dask.distributed", reason="dask.distributed is not installed")
SPEC = presets.tiny().with_fields(n_layers=2, d_model=32, d_ff=48)


def test_a_dask_cluster_with_a_shared_directory_gives_the_same(tmp_path: Path) -> None:
    axes, options = {"density": [1.0, 0.5]}, {"n_networks": 24, "n_tokens": 5, "round_networks": 4}
    alone = grid(SPEC, axes, directory=tmp_path / "alone", **options)
    with (
        distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster,
        distributed.Client(cluster),
        joblib.parallel_config(backend="dask"),
    ):
        together = grid(SPEC, axes, directory=tmp_path / "dask", n_workers=2, **options)
    assert results.identical(together, alone)
    shards = list((tmp_path / "dask").glob("*/*.nc"))
    assert len(shards) == 12
    local = {results.load(path).attrs["process"] for path in (tmp_path / "alone").glob("*/*.nc")}
    assert {results.load(path).attrs["process"] for path in shards}.isdisjoint(local)  # Dask's workers did it all
