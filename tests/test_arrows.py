"""The import arrows: a part imports only from lines above its own and from within itself."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LINES = (
    ("errors", "_version"),
    ("files", "locks", "slurm", "log_mean"),
    ("spec", "stats", "results", "points"),
    ("presets", "theory", "nn", "measure", "corpus", "summary"),
    ("hf", "simulate", "train", "diagnose", "evaluate"),
    ("compare", "attribute", "plot"),
    ("report", "testing", "formula"),
    ("demo",),
    ("cli_arguments",),
    ("cli_data", "cli_diagnose", "cli_grid", "cli_hf", "cli_runs", "cli_sweep", "cli_train"),
    ("cli",),
    ("__main__",),
)
LEVEL = {part: level for level, line in enumerate(LINES) for part in line}
MAY_USE_NEIGHBOUR = {("train", "hf"), ("simulate", "hf"), ("diagnose", "hf")}
THIRD_PARTY = {
    "errors": set(),
    "files": set(),
    "locks": {"filelock"},
    "slurm": set(),
    "points": {"numpy", "xarray"},
    "spec": set(),
    "log_mean": {"numpy"},
    "stats": {"numpy", "scipy"},
    "results": {"numpy", "xarray"},
    "theory": {"numpy", "scipy", "xarray"},
    "presets": set(),
    "corpus": {"numpy", "tokenizers"},
}


def imports(path: Path) -> set[str]:
    """Absolute module names that a file imports, in functions too."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            module = node.module or ""
            # `from varprop import stats` names the part in the alias.
            names |= {f"{module}.{alias.name}" for alias in node.names} if module == "varprop" else {module}
    return names


def files_by_part() -> list[tuple[str, Path]]:
    package = ROOT / "varprop"
    found = []
    for path in sorted(package.rglob("*.py")):
        part = path.relative_to(package).parts[0].removesuffix(".py")
        if part != "__init__":
            found.append((part, path))
    return found


def violations(part: str, names: set[str]) -> list[str]:
    wrong = []
    for name in names:
        pieces = name.split(".")
        if pieces[0] == "varprop":
            if len(pieces) == 1:
                wrong.append("varprop (the package itself)")
                continue
            target = pieces[1]
            upward = LEVEL.get(target, 99) < LEVEL[part]
            if target != part and not upward and (part, target) not in MAY_USE_NEIGHBOUR:
                wrong.append(name)
        elif pieces[0] in ("experiments", "proofs", "tests") or (
            part in THIRD_PARTY and pieces[0] not in sys.stdlib_module_names | THIRD_PARTY[part]
        ):
            wrong.append(name)
    return wrong


@pytest.mark.parametrize("part,path", files_by_part(), ids=lambda value: getattr(value, "stem", value))
def test_imports_point_upwards(part: str, path: Path) -> None:
    assert part in LEVEL, f"{path} belongs to no line of the design"
    assert not violations(part, imports(path))


@pytest.mark.parametrize(
    "part,name",
    [
        ("theory", "torch"),
        ("theory", "varprop.nn.attention"),
        ("nn", "varprop.theory"),
        ("plot", "varprop.compare"),
        ("spec", "numpy"),
        ("compare", "experiments.demo"),
    ],
)
def test_a_wrong_arrow_is_seen(part: str, name: str) -> None:
    assert violations(part, {name})


def test_only_depth_touches_results_in_theory() -> None:
    for path in (ROOT / "varprop" / "theory").glob("*.py"):
        if path.stem not in ("depth", "__init__", "growth", "trained"):
            assert not {n for n in imports(path) if n.startswith("xarray") or "results" in n}, path


def test_top_level_holds_only_what_the_design_names() -> None:
    allowed = {"varprop", "experiments", "proofs", "tests"}
    folders = {p.name for p in ROOT.iterdir() if p.is_dir() and not p.name.startswith(".")}
    generated = {"demo", "runs", "build", "dist", "varprop.egg-info"}
    assert folders - generated <= allowed
