"""One self-contained HTML file: text, figures, tables and verdicts. No network, no script; readable on a phone."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
import xarray as xr
from matplotlib.figure import Figure

from varprop import plot, results
from varprop.compare import SHOWN_ROWS, VERDICTS, Check, check
from varprop.errors import ArgumentError, VarpropError
from varprop.files import write_text
from varprop.spec import ModelSpec

STYLE = """
:root { color-scheme: light dark; --ink: #1c1c1c; --page: #fff; --line: #ddd; --soft: #f5f5f5; --quiet: #666; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e6e6; --page: #16181b; --line: #3a3d42; --soft: #212429; --quiet: #a0a0a0; } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page);
  max-width: 62rem; margin: 0 auto; padding: 1rem; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.25rem; border-bottom: 1px solid var(--line); margin-top: 2.5rem; }
figure { margin: 1rem 0; background: #fff; border-radius: 6px; padding: .5rem; text-align: center; }
figure img { max-width: 100%; height: auto; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .85rem; margin: .75rem 0; overflow-wrap: normal; }
caption { text-align: left; color: var(--quiet); padding-bottom: .25rem; }
th, td { padding: .2rem .6rem; border-bottom: 1px solid var(--line); text-align: left; white-space: nowrap; }
th { background: var(--soft); } td.number { text-align: right; font-variant-numeric: tabular-nums; }
.badge { border-radius: 1rem; padding: .1rem .6rem; font-size: .85em; font-weight: 600; color: #fff; }
.agrees { background: #00704f; } .underpowered { background: #8a5a00; } .disagrees { background: #b03a00; }
summary { cursor: pointer; color: var(--quiet); } footer { color: var(--quiet); margin-top: 3rem; font-size: .85rem; }
"""
LEGEND = "p before Holm's correction; detectable: the error that would be seen with probability 0.9"
CELL_COLUMNS = ("prediction", "estimate", "stderr", "ratio", "deviation", "theory_error", "p_value", "detectable")


@dataclass(frozen=True)
class Table:
    """A table: one header, rows of strings and numbers, an optional caption."""

    header: Sequence[str]
    rows: Sequence[Sequence[object]]
    caption: str = ""


@dataclass(frozen=True)
class Section:
    """A part of a report: paragraphs, then figures, checks and tables, in this order."""

    title: str
    text: Sequence[str] = ()
    figures: Sequence[Figure] = ()
    checks: Sequence[Check] = ()
    tables: Sequence[Table] = ()


def write_report(path: str | Path, title: str, sections: Iterable[Section], subtitle: str = "") -> Path:
    """Write the sections as one HTML file under a temporary name, then rename; returns its path.

    Every text is escaped. The same sections give the same bytes. Raises `ArgumentError` if it cannot be written.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     target = write_report(Path(folder) / "report.html", "A & B", [Section("First", text=["one < two"])])
    ...     "one &lt; two" in target.read_text()
    True
    """
    sections = list(sections)
    links = "".join(f'<li><a href="#s{i}">{_escape(s.title)}</a></li>' for i, s in enumerate(sections))
    body = "\n".join(_section(i, section) for i, section in enumerate(sections))
    page = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_escape(title)}</title><style>{STYLE}</style></head>\n<body><h1>{_escape(title)}</h1>"
        f"{_paragraph(subtitle) if subtitle else ''}<nav><ul>{links}</ul></nav>\n{body}\n</body></html>\n"
    )
    return write_text(path, page)


# HTML of the parts ----------------------------------------------------------------------------------------------------


def _escape(value: object) -> str:
    return html.escape(str(value))


def _paragraph(text: str) -> str:
    return f"<p>{_escape(text)}</p>"


def _section(index: int, section: Section) -> str:
    parts = [f'<section id="s{index}"><h2>{_escape(section.title)}</h2>']
    parts += [_paragraph(text) for text in section.text]
    parts += [_figure(figure, section.title) for figure in section.figures]
    parts += [_check(outcome) for outcome in section.checks]
    parts += [_table(table) for table in section.tables]
    return "\n".join([*parts, "</section>"])


def _figure(figure: Figure, title: str) -> str:
    """The figure as SVG in a data address: sharp at any size, and its identifiers stay apart from those of others."""
    buffer = io.BytesIO()
    with mpl.rc_context({"svg.hashsalt": "varprop"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<figure><img alt="{_escape(title)}" src="data:image/svg+xml;base64,{data}"></figure>'


def _table(table: Table) -> str:
    caption = f"<caption>{_escape(table.caption)}</caption>" if table.caption else ""
    head = "".join(f"<th>{_escape(name)}</th>" for name in table.header)
    rows = "".join("<tr>" + "".join(_cell(value) for value in row) + "</tr>" for row in table.rows)
    return f'<div class="scroll"><table>{caption}<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'


def _cell(value: object) -> str:
    if isinstance(value, str):
        return f"<td>{_badge(value) if value in VERDICTS else _escape(value)}</td>"
    if isinstance(value, int):
        return f'<td class="number">{value}</td>'
    return f'<td class="number">{float(value):.4g}</td>'  # type: ignore[arg-type]


def _badge(verdict: str) -> str:
    return f'<span class="badge {_escape(verdict)}">{_escape(verdict)}</span>'


def _check(outcome: Check) -> str:
    """Badge, headline, the most telling cells, and every cell in a part that opens."""
    rows = outcome.rows()
    columns = [name for name in CELL_COLUMNS if rows and name in rows[0]]
    if "ratio" in columns:
        columns.remove("deviation")
    header = ["layer", "site", *(name.replace("_", " ") for name in columns), "verdict"]

    def table(chosen: Sequence[dict], caption: str) -> str:
        cells = [[row["layer"], row["site"], *(float(row[c]) for c in columns), str(row["verdict"])] for row in chosen]
        return _table(Table(header, cells, caption))

    head = f"<p>{_badge(outcome.verdict)} {_escape(outcome.headline())}</p>"
    telling = outcome.telling_rows()
    if len(rows) <= SHOWN_ROWS:
        return head + table(rows, "Every cell")
    rest = f"<details><summary>All {len(rows)} cells</summary>{table(rows, 'Every cell')}</details>"
    return (
        head
        + table(
            telling,
            f"The {len(telling)} most telling cells; {LEGEND}",
        )
        + rest
    )


# A report from any results --------------------------------------------------------------------------------------------


def report_for(datasets: Mapping[str, xr.Dataset], resolution: float = 0.05) -> list[Section]:
    """A report from results by name: theory joined with every measurement of its spec, trainings, saved comparisons,
    the layer scores of checkpoints.

    Measurements that cannot be checked (a single network, another number of tokens) are drawn, with the reason given.
    resolution: of the checks, as in `check`. The last section is the provenance of every result. Raises
    `ArgumentError` without any result.
    """
    if not datasets:
        raise ArgumentError("datasets={} is empty; expected at least one result")
    sections: list[Section] = []
    specs = dict.fromkeys(str(d.attrs["spec_id"]) for d in datasets.values() if d.attrs["source"] != "comparison")
    for spec_id in specs:
        members = {n: d for n, d in datasets.items() if d.attrs["spec_id"] == spec_id}
        sections += _spec_sections(spec_id, members, resolution)
    trained = {name: d for name, d in datasets.items() if d.attrs["source"] == "training" and "step" in d.dims}
    for name, dataset in trained.items():
        figures = [plot.plot_training(dataset)]
        if "block_overlap" in dataset:
            figures.append(plot.plot_depth_map(dataset))
        sections.append(Section(f"Training: {name}", figures=figures))
    comparable = {name: d for name, d in trained.items() if "variance" in d}
    if len(comparable) > 1:
        sections.append(Section("Growth of the variance, first and last step", figures=[plot.plot_growth(comparable)]))
    diagnoses = {n: d for n, d in datasets.items() if d.attrs["source"] == "checkpoint" and plot.has_panels(d)}
    for name, dataset in diagnoses.items():
        sections.append(Section(f"Diagnosis: {name}", figures=[plot.plot_diagnosis({name: dataset})]))
    for name, dataset in datasets.items():
        if dataset.attrs["source"] == "comparison":
            outcome = Check(dataset)
            sections.append(Section(f"Comparison: {name}", figures=[plot.plot_ratio(dataset)], checks=[outcome]))
    return [_overview(datasets, sections), *sections, Section("Provenance", tables=[provenance(datasets)])]


def _overview(datasets: Mapping[str, xr.Dataset], sections: Sequence[Section]) -> Section:
    """What was read, and every verdict of the report in one table."""
    kinds = [str(d.attrs["source"]) for d in datasets.values()]
    counts = ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds))
    text = (
        "Theory is a line with the error that it claims as a band; simulation is points with 95 % intervals over"
        " networks; training is lines by step. A verdict says whether a measurement lies within the claimed error:"
        " agrees, disagrees, or underpowered where too few networks were drawn to tell."
    )
    rows = [
        (section.title, str(c.dataset.attrs["variable"]), c.n_networks, c.detectable, c.verdict)
        for section in sections
        for c in section.checks
    ]
    header = ("compared", "variable", "networks", "detectable error", "verdict")
    return Section("Overview", text=[f"Results: {counts}.", text], tables=[Table(header, rows)] if rows else [])


def _spec_sections(spec_id: str, members: Mapping[str, xr.Dataset], resolution: float) -> Iterator[Section]:
    """The profiles of the stream of one spec, then each of its theories checked against each of its measurements."""
    drawable = {n: d for n, d in members.items() if d.attrs["source"] != "comparison" and "second_moment" in d}
    correlated = {n: d for n, d in drawable.items() if "token_correlation" in d}
    figures = [plot.plot_profiles(drawable)] if drawable else []
    if correlated:
        figures.append(plot.plot_profiles(correlated, variable="token_correlation"))
    yield Section(f"Spec {spec_id}", text=[_spec_line(next(iter(members.values())))], figures=figures)
    theories = {n: d for n, d in drawable.items() if d.attrs["source"] == "theory"}
    for theory_name, theory in theories.items():
        for name, dataset in drawable.items():
            if name not in theories:
                yield _check_section(f"{theory_name} against {name}", theory, dataset, resolution)


def _check_section(title: str, theory: xr.Dataset, measured: xr.Dataset, resolution: float) -> Section:
    """Verdicts with their figures; a training is checked at its first step."""
    if "step" in measured.dims:
        measured = results.at_step(measured, int(measured.step.values[0]))
        title += f", step {int(measured.step)}"
    text, figures, checks = [], [], []
    for variable in _checkable(theory, measured):
        try:
            outcome = check(theory, measured, variable=variable, resolution=resolution)
        except VarpropError as error:
            text.append(f"{variable} is not checked: {error}.")
            continue
        figures.append(plot.plot_ratio(outcome))
        checks.append(outcome)
    return Section(title, text=text, figures=figures, checks=checks)


def _checkable(theory: xr.Dataset, measured: xr.Dataset) -> list[str]:
    """Token correlations only where the theory says how exact it is about them."""
    wanted = ["second_moment", *(["token_correlation"] if "token_correlation_error" in theory else [])]
    return [name for name in wanted if name in theory and name in measured]


def _spec_line(dataset: xr.Dataset) -> str:
    try:
        spec = ModelSpec.from_json(str(dataset.attrs["spec"]))
    except VarpropError:
        return "The description of the model in these results cannot be read."
    parts = [f"d_model {spec.d_model}, {spec.n_layers} layers, norm {spec.norm.placement}"]
    if spec.attention is not None:
        parts.append(f"{spec.n_heads} heads on {spec.n_kv_heads} key/value heads")
    if spec.moe is not None:
        parts.append(f"{spec.moe.n_experts} experts, {spec.moe.top_k} active")
    densities = sorted({row.mask.density for row in spec.tensor_table() if row.mask is not None})
    if densities:
        parts.append("weight mask density " + ", ".join(f"{density:g}" for density in densities))
    return f"{', '.join(parts)}; {spec.parameter_counts()['total']:,} parameters, masked ones counted."


def provenance(datasets: Mapping[str, xr.Dataset]) -> Table:
    """One row a result: where it came from and how to run it again."""
    header = ("result", "source", "spec", "replicates", "steps", "tokens", "seed", "version", "commit", "command")
    rows = []
    for name, dataset in datasets.items():
        about, sizes = dataset.attrs, dataset.sizes
        replicates = about.get("n_networks", sizes.get("network", sizes.get("seed", about.get("n_sequences", 0))))
        commit = str(about["git_commit"])[:10] + (" (changed)" if about["git_dirty"] == "true" else "")
        numbers = (int(replicates), int(sizes.get("step", 0)), str(about["n_tokens"]), str(about["seed_entropy"]))
        told = (str(about["varprop_version"]), commit, str(about["command"]))
        rows.append((name, str(about["source"]), str(about["spec_id"]), *numbers, *told))
    caption = "replicates: networks, trainings or, of a checkpoint, sequences; 0 for a closed form"
    return Table(header, rows, caption)
