"""report: one file that needs nothing else, with everything escaped, for any mixture of results."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import numpy as np
import pytest
import xarray as xr

from varprop import presets, results
from varprop.compare import check
from varprop.errors import ArgumentError
from varprop.plot import plot_profiles
from varprop.report import Section, Table, report_for, write_report

N_LAYERS = 8
SPEC = presets.get("tiny")
ABOUT = {"spec_json": SPEC.to_json(), "spec_id": SPEC.spec_id, "n_tokens": 8}
VOID = {"meta", "img"}


class Balance(HTMLParser):
    """Tags opened and closed in order, and every address."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.seen: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        self.addresses += [value for name, value in attrs if name in ("href", "src")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def parsed(page: str) -> Balance:
    balance = Balance()
    balance.feed(page)
    assert balance.open == []
    return balance


def cells() -> np.ndarray:
    array = np.ones((N_LAYERS + 1, 5))
    array[0, :4] = np.nan
    return array


def theory(**about) -> xr.Dataset:
    return results.new({"second_moment": (("layer", "site"), cells())}, source="theory", **{**ABOUT, **about})


def simulation(n: int = 64, **about) -> xr.Dataset:
    values = cells() * np.exp(0.02 * np.random.default_rng(0).standard_normal((n, N_LAYERS + 1, 5)))
    variables = {"second_moment": (("network", "layer", "site"), values)}
    return results.new(variables, source="simulation", seed_entropy="17", **{**ABOUT, **about})


def training(n_seeds: int = 2, **about) -> xr.Dataset:
    rng = np.random.default_rng(1)
    values = cells() * np.exp(0.02 * rng.standard_normal((n_seeds, 3, N_LAYERS + 1, 5)))
    dims = ("seed", "step", "layer", "site")
    variables = {"second_moment": (dims, values), "variance": (dims, values)}
    variables["train_loss"] = (("seed", "step"), rng.random((n_seeds, 3)))
    return results.new(variables, source="training", coords={"step": [0, 5, 10]}, **{**ABOUT, **about})


def test_file_needs_nothing_else(tmp_path):
    path = write_report(tmp_path / "report.html", "Title", report_for({"t": theory(), "s": simulation()}))
    page = path.read_text()
    balance = parsed(page)
    assert "script" not in balance.seen
    assert all(a.startswith(("#", "data:image/svg+xml;base64,")) for a in balance.addresses)
    assert "@import" not in page
    assert "url(" not in page
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


def test_everything_is_escaped(tmp_path):
    attack = '<script>alert("1")</script>&'
    dataset = theory()
    dataset.attrs["command"] = attack
    figure = plot_profiles({"t": theory()})
    by_hand = Section(
        attack, [attack], [figure], [check(theory(), simulation())], [Table([attack], [[attack]], attack)]
    )
    page = write_report(tmp_path / "r.html", attack, [by_hand, *report_for({attack: dataset})], attack).read_text()
    assert "script" not in parsed(page).seen
    assert attack not in page
    assert page.count("&lt;script&gt;alert(&quot;1&quot;)&lt;/script&gt;&amp;") >= 9


def test_same_sections_give_the_same_bytes(tmp_path):
    data = {"t": theory(), "s": simulation(), "run": training()}
    pages = [write_report(tmp_path / name, "Title", report_for(data)).read_bytes() for name in ("a.html", "b.html")]
    assert pages[0] == pages[1]


@pytest.mark.parametrize("n, ratio, verdict", [(64, 1.0, "agrees"), (3, 1.0, "underpowered"), (64, 1.5, "disagrees")])
def test_verdicts_have_a_badge_and_a_full_table(tmp_path, n, ratio, verdict):
    predicted = theory()
    predicted["second_moment"] = predicted.second_moment * ratio
    outcome = check(predicted, simulation(n))
    page = write_report(tmp_path / "r.html", "Title", [Section("Check", checks=[outcome])]).read_text()
    assert f'<p><span class="badge {verdict}">{verdict}</span> second_moment: {verdict}' in page
    details = re.search(r"<details>.*</details>", page, re.DOTALL)
    assert details is not None
    assert details[0].count("<tr>") == 1 + len(outcome.rows())


def test_theory_is_joined_with_measurements_of_its_spec():
    other = {"spec_id": "f" * 12}
    data = {"t": theory(), "s": simulation(), "run": training(), "alien": simulation(**other), "lone": theory(**other)}
    sections = {s.title: s for s in report_for(data)}
    assert list(sections) == [
        "Overview",
        f"Spec {SPEC.spec_id}",
        "t against s",
        "t against run, step 0",
        "Spec ffffffffffff",
        "lone against alien",
        "Training: run",
        "Provenance",
    ]
    assert sections["t against s"].checks[0].verdict == "agrees"
    assert sections[f"Spec {SPEC.spec_id}"].text == [
        "d_model 128, 8 layers, norm pre, 4 heads on 4 key/value heads; 3,803,264 parameters, masked ones counted."
    ]
    assert [row[-1] for row in sections["Overview"].tables[0].rows] == ["agrees", "underpowered", "agrees"]


@pytest.mark.parametrize("spec", [True, False])
def test_the_scores_of_a_checkpoint_are_drawn(spec, tmp_path):
    about = ABOUT if spec else {**ABOUT, "spec_json": "", "spec_id": ""}
    layers = np.append(np.nan, np.ones(N_LAYERS))
    variables = {"second_moment": (("layer", "site"), cells()), "block_influence": (("layer",), layers)}
    found = results.new(variables, source="checkpoint", attributes={"n_sequences": 3}, **about)
    without = results.new({"loss_mean": ((), 3.0)}, source="checkpoint", **about)
    sections = {s.title: s for s in report_for({"model": found, "other": without})}
    assert [title for title in sections if title.startswith("Diagnosis")] == ["Diagnosis: model"]
    (figure,) = sections["Diagnosis: model"].figures
    assert figure.axes[0].get_title() == "block influence"
    (table,) = sections["Provenance"].tables
    assert table.rows[0][3] == 3
    assert table.caption == "replicates: networks, trainings or, of a checkpoint, sequences; 0 for a closed form"
    write_report(tmp_path / "r.html", "Title", sections.values())


def test_what_cannot_be_checked_says_why():
    data = {"t": theory(), "one": simulation(1), "long": simulation(n_tokens=9)}
    sections = {s.title: s for s in report_for(data)}
    assert sections["t against one"].checks == []
    assert "n_networks=1 is too few" in sections["t against one"].text[0]
    assert "n_tokens=9 is another; expected 8" in sections["t against long"].text[0]


def test_trainings_alone_and_their_growth():
    titles = [s.title for s in report_for({"a": training(), "b": training(1)})]
    assert titles[2:] == ["Training: a", "Training: b", "Growth of the variance, first and last step", "Provenance"]


def test_what_the_probe_read_is_drawn_and_checked_at_the_first_step():
    run = training(8)
    probed = np.tile(0.5 * cells(), (8, 2, 1, 1))
    probed[:, 1] = 0.9 * cells()
    run["token_correlation"] = (("seed", "probe_step", "layer", "site"), probed)
    overlap = np.tile(np.eye(N_LAYERS + 1), (8, 2, 1, 1))
    run["block_overlap"] = (("seed", "probe_step", "source_layer", "target_layer"), overlap)
    run = run.assign_coords(probe_step=[0, 10])
    predicted = theory()
    predicted["token_correlation"] = 0.5 * predicted.second_moment
    predicted["token_correlation_error"] = 0.01 * predicted.second_moment
    sections = {s.title: s for s in report_for({"t": predicted, "run": run})}
    assert len(sections[f"Spec {SPEC.spec_id}"].figures) == 2
    checks = {c.dataset.attrs["variable"]: c for c in sections["t against run, step 0"].checks}
    assert float(checks["token_correlation"].dataset.estimate.sel(layer=3, site="resid_post")) == pytest.approx(0.5)
    assert len(sections["Training: run"].figures) == 2


def test_saved_comparison_is_shown():
    sections = report_for({"c": check(theory(), simulation()).dataset})
    assert [s.title for s in sections] == ["Overview", "Comparison: c", "Provenance"]
    assert sections[1].checks[0].verdict == "agrees"


def test_unreadable_spec_is_no_obstacle():
    assert "cannot be read" in report_for({"t": theory(spec_json="{")})[1].text[0]


def test_provenance_has_a_row_for_each_result():
    table = report_for({"t": theory(), "s": simulation(5), "run": training()})[-1].tables[0]
    by_name = {row[0]: dict(zip(table.header, row, strict=True)) for row in table.rows}
    assert [by_name[n]["replicates"] for n in ("t", "s", "run")] == [0, 5, 2]
    assert by_name["run"]["steps"] == 3
    assert by_name["s"]["seed"] == "17"


def test_no_results():
    with pytest.raises(ArgumentError, match="expected at least one result"):
        report_for({})


def test_unwritable_path(tmp_path):
    with pytest.raises(ArgumentError, match=r"output='.*' cannot be written \(No such file or directory\)"):
        write_report(tmp_path / "none" / "r.html", "Title", [])
    (tmp_path / "folder").mkdir()
    with pytest.raises(ArgumentError, match="cannot be written"):
        write_report(tmp_path / "folder", "Title", [])
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]
