"""The main job in small: every file is written and readable, and the screen says what the files say."""

from __future__ import annotations

from pathlib import Path

import pytest

from varprop import demo, presets, results
from varprop.__main__ import main


@pytest.fixture(scope="module")
def small_demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("demo") / "out"
    specs = {}
    for label, name in demo.VARIANTS.items():
        spec = presets.get(name)
        width = {"d_expert": 16} if spec.moe is not None else {"d_ff": 48}
        specs[label] = spec.with_fields({"d_model": 32, "n_layers": 2, **width})
    return folder, demo.run(folder, n_steps=4, n_networks=16, specs=specs)


def test_every_file_is_there_and_valid(small_demo: tuple[Path, str]) -> None:
    folder, _ = small_demo
    kinds = {"predicted": 5, "simulated": 5, "check": 5, "expected": 2, "trained": 2}
    for kind, count in kinds.items():
        files = list(folder.glob(f"{kind}-*.nc"))
        assert len(files) == count
        for file in files:
            results.load(file)


def test_the_report_is_self_contained(small_demo: tuple[Path, str]) -> None:
    page = (small_demo[0] / "report.html").read_text()
    assert "What was found" in page
    assert page.count("<figure>") >= 9
    for outside in ("http://", "https://", "<script", "<link"):
        assert outside not in page


def test_the_screen_agrees_with_the_files(small_demo: tuple[Path, str]) -> None:
    folder, text = small_demo
    assert len(text.splitlines()) <= 30
    check = results.load(folder / "check-dense.nc")
    last = check.sel(site="resid_post").isel(layer=-1)
    row = next(line for line in text.splitlines() if line.startswith("dense "))
    assert f"{last.prediction.item():.4g}" in row
    assert row.endswith(check.attrs["verdict"])
    trained = results.load(folder / "trained-dense.nc")
    assert f"{results.at_step(trained).bits_per_byte.sel(evaluation='fixed_length').item():.2f}" in text


def test_findings_follow_the_numbers(small_demo: tuple[Path, str]) -> None:
    """Swapping the two predictions must turn the sentence about growth round."""
    folder, _ = small_demo
    dense, sparse = (results.load(folder / f"predicted-{name}.nc") for name in ("dense", "masked-1-4"))
    labels = demo.TRAINED
    forward = demo.Outcome(dict(zip(labels, (dense, sparse), strict=True)), {}, {}, {}, {})
    backward = demo.Outcome(dict(zip(labels, (sparse, dense), strict=True)), {}, {}, {}, {})
    assert "lowers q_L/q_0" in demo.findings(forward)[1]
    assert "raises q_L/q_0" in demo.findings(backward)[1]


def test_a_folder_that_cannot_be_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert main(["demo", "--out", str(tmp_path / "file" / "x")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
