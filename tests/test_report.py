"""The report: true to its tables, complete with and without references, safe and self-contained."""

import math
import re
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest
from drawn_cohorts import N_BINS, PASSES, SETTINGS, draw_cohort, metrics_table, patients_table, person, strata_table

from segtrust import report
from segtrust.cohort import AGGREGATIONS
from segtrust.errors import SegtrustError
from segtrust.figures import SCORE_AGGREGATION
from segtrust.files import write_json
from segtrust.main_table import PARTS_OF_ENTROPY, main_table
from segtrust.numerals import number
from segtrust.regions import REGIONS
from segtrust.rows import STRATA_SCHEMA
from segtrust.slices import write_slices


def make(folder, **options):
    """Draw a cohort, write its report and return (html, report folder, metrics by model)."""
    results, sheet, tables = draw_cohort(folder, **options)
    return written(results, sheet, options.get("models", ["SegResNet"])), results / "report", tables


def written(results, sheet, models, folder="report", **options):
    """Write a report beside its results and return its html."""
    report.report(list(models), results, results / folder, SETTINGS, sheet, **options)
    return (results / folder / "index.html").read_text(encoding="utf-8")


class Page(HTMLParser):
    """Collects what the tests ask about: links, images, ids, numbers of the main table, scripts and text."""

    def __init__(self, html):
        super().__init__()
        self.links, self.images, self.ids, self.scripts, self.text = [], [], set(), 0, []
        self.numbers, self._row, self._value = {}, None, None
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.ids.add(attributes.get("id"))
        self.scripts += tag == "script"
        if tag == "a":
            self.links.append(attributes["href"])
        if "data-from" in attributes:
            self.links.append(attributes["data-from"])
        if tag in ("img", "source"):
            self.images.append(attributes.get("src") or attributes["srcset"])
        if tag == "tr":
            self._row = attributes.get("data-quantity")
        if tag in ("data", "abbr") and self._row:
            self._value = attributes.get("value")
            self.numbers.setdefault(self._row, []).append([self._value, None, attributes["title"]])
            self._value = tag

    def handle_data(self, text):
        self.text.append(text)
        if self._value:
            self.numbers[self._row][-1][1] = text
            self._value = None


EVIL = "<script>alert(1)</script>"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The report of two models, nobody has ET in the second, with alarms and texts that are markup."""
    alarms = [
        {"alarm": "region_empty", "severity": "note", "model": "SegResNet", "region": "ET", "message": "ET is small."},
        {"alarm": "odd", "severity": "warning", "model": EVIL, "region": None, "message": EVIL},
        {
            "alarm": "channels",
            "severity": "error",
            "model": "SegResNet",
            "region": None,
            "message": "Swapped channels.",
        },
    ]
    models = ("SegResNet", "UNet")
    results, sheet, tables = draw_cohort(
        tmp_path_factory.mktemp("whole"), models=models, alarms=alarms, missing={"UNet": ("ET",)}
    )
    failure = {"stage": "sample", "model": "UNet", "patient": "BraTS2021_x", "reason": EVIL}
    write_json(results / "failed" / "sample" / "UNet" / "BraTS2021_x.json", failure)
    sheet += [person(EVIL, None), person("BraTS2021_x", "seg.nii.gz")]
    return written(results, sheet, models), results / "report", tables


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    """The report of one patient; returns (html, results, sheet)."""
    results, sheet, _ = draw_cohort(tmp_path_factory.mktemp("single"), n_patients=1)
    return written(results, sheet, ["SegResNet"]), results, sheet


SOURCES = "40 passes: 2 checkpoints × 4 flips × 5 dropout passes"


@pytest.fixture(scope="module")
def ensemble(tmp_path_factory):
    """The report of a model with several members, and metrics after fewer passes; ET is missing everywhere."""
    options = {"early": (5, 10), "members": True, "missing": {"SegResNet": ("ET",)}}
    results, sheet, tables = draw_cohort(tmp_path_factory.mktemp("ensemble"), **options)
    html = written(results, sheet, ["SegResNet"], sources={"SegResNet": SOURCES})
    return html, results / "report", tables["SegResNet"]


# --- truth ---


def test_every_number_of_the_main_table_is_the_value_of_its_metrics_row(whole):
    html, _, tables = whole
    page = Page(html.split('id="model-UNet"')[0])
    metrics = tables["SegResNet"]
    metrics = metrics[(metrics["passes"] == PASSES)]
    expected = {
        "dice": ("dice", "patient_mean", None, None, None, 1),
        "dice_deterministic": ("dice_deterministic", "patient_mean", None, None, None, 1),
        "delta_dice": ("delta_dice", "patient_mean", None, None, None, 1),
        "delta_dice_absolute": ("delta_dice", "patient_mean", None, None, None, -1),
        "absolute_delta_dice": ("absolute_delta_dice", "patient_mean", None, None, None, 1),
        "auroc": ("auroc", "pooled", "entropy", "brain", None, 1),
        "auroc_deterministic": ("auroc", "pooled", "deterministic_entropy", "brain", None, 1),
        "auroc_boundary": ("auroc", "pooled", "boundary_proximity", "brain", None, 1),
        "entropy": ("mean_uncertainty", "pooled", "entropy", "predicted_5mm", None, 1),
        "entropy_nats": ("mean_uncertainty", "pooled", "entropy", "predicted_5mm", None, math.log(2)),
        "entropy_brain": ("mean_uncertainty", "pooled", "entropy", "brain", None, 1),
        "entropy_brain_nats": ("mean_uncertainty", "pooled", "entropy", "brain", None, math.log(2)),
        "ece_class_probability": ("ece_class_probability", "pooled", "probability", "predicted_5mm", 15, 1),
        "ece_top_label": ("ece_top_label", "pooled", "probability", "predicted_5mm", 15, 1),
        "ece_class_probability_brain": ("ece_class_probability", "pooled", "probability", "brain", 15, 1),
        "ece_top_label_brain": ("ece_top_label", "pooled", "probability", "brain", 15, 1),
        "mce_class_probability": ("mce_class_probability", "pooled", "probability", "predicted_5mm", 15, 1),
        "gap": ("gap", "pooled", "probability", "predicted_5mm", None, 1),
    }
    assert set(page.numbers) == set(expected)
    for key, (name, pooling, measure, mask, bins, factor) in expected.items():
        for place, region in enumerate(REGIONS):
            row = metrics[(metrics["metric"] == name) & (metrics["pooling"] == pooling) & (metrics["region"] == region)]
            row = row[(row["measure"] == measure) if measure else row["measure"].isna()]
            row = row[(row["mask"] == mask) if mask else row["mask"].isna()]
            row = row[row["n_bins"] == bins] if bins else row
            value, text, _ = page.numbers[key][place]
            assert float(value) == row["value"].item() * factor
            assert text == number(row["value"].item() * factor)


def test_the_csv_of_the_main_table_has_the_unrounded_numbers(whole):
    _, folder, tables = whole
    saved = pd.read_csv(folder / "tables" / "SegResNet_main.csv").set_index(["quantity", "region"])
    metrics = tables["SegResNet"]
    row = metrics[(metrics["metric"] == "gap") & (metrics["mask"] == "predicted_5mm") & (metrics["region"] == "ET")]
    assert saved.loc[("gap", "ET"), "value"] == row["value"].item()
    assert saved.loc[("gap", "ET"), "low"] == row["ci_low"].item()


def test_the_drawn_tables_have_the_columns_of_the_cohort():
    patients = patients_table("SegResNet", ["p1"], np.random.default_rng(0))
    assert list(strata_table("SegResNet", patients).columns) == STRATA_SCHEMA.names
    assert SCORE_AGGREGATION in AGGREGATIONS


def test_two_rows_for_one_number_are_refused(tmp_path):
    metrics = metrics_table("SegResNet", 10)
    twice = pd.concat([metrics, metrics[metrics["metric"] == "gap"]])
    with pytest.raises(SegtrustError, match="expected one"):
        main_table(twice, N_BINS)


def test_points_of_the_convergence_figures_are_rows_of_metrics(ensemble):
    _, folder, metrics = ensemble
    saved = pd.read_csv(folder / "tables" / "SegResNet_convergence.csv")
    assert set(saved["region"]) == {"WT", "TC"}  # ET has no value at all
    for quantity, mask in (("auroc", "brain"), ("ece_top_label", "predicted_5mm")):
        rows = metrics[(metrics["metric"] == quantity) & (metrics["mask"] == mask) & (metrics["pooling"] == "pooled")]
        rows = rows[rows["measure"].isin(["entropy", "probability"]) & rows["n_bins"].isin([15, None, np.nan])]
        expected = rows[rows["region"] == "TC"].sort_values("passes")
        found = saved[(saved["quantity"] == quantity) & (saved["region"] == "TC")]
        assert found["passes"].tolist() == expected["passes"].tolist() == [5, 10, PASSES]
        assert found["value"].tolist() == expected["value"].tolist()
        assert found["low"].tolist() == expected["ci_low"].tolist()


def test_without_rows_after_fewer_passes_nothing_is_said_of_convergence(whole):
    html, folder, _ = whole
    assert "Convergence" not in html
    assert not list(folder.rglob("*convergence*"))


def test_parts_of_entropy_are_shown_for_several_members_alone(ensemble, whole):
    numbers = Page(ensemble[0]).numbers
    shown = [float(numbers[key][0][0]) for key in ("expected_entropy", "within_members", "between_members")]
    assert shown == [0.2, 0.07, 0.04]
    assert PARTS_OF_ENTROPY not in whole[0]


def test_the_page_says_where_passes_come_from(ensemble):
    assert f"{SOURCES} for each patient." in " ".join(Page(ensemble[0]).text)


def test_a_bare_ece_is_never_printed(whole):
    text = " ".join(Page(whole[0]).text)
    assert not re.search(r"\bECE\b", text)


def test_the_same_files_give_the_same_bytes(single):
    html, results, sheet = single
    written(results, sheet, ["SegResNet"], "again")
    files = [path.relative_to(results / "report") for path in (results / "report").rglob("*.*")]
    n_charts = html.count("data-chart=")
    assert n_charts == 11 * 3
    # SVG for light and dark pages, PDF, PNG, caption; slices; tables; charts for the browser and what draws them; page
    assert len(files) == 5 * n_charts + 4 + (4 + 3) + 2 + 1
    for path in files:
        first, again = ((results / folder / path).read_bytes() for folder in ("report", "again"))
        if path.suffix == ".pdf":  # whose dictionaries have no order
            first, again = len(first), len(again)
        assert first == again, path


def test_files_of_an_earlier_report_are_removed_and_pages_stay(tmp_path):
    results, sheet, _ = draw_cohort(tmp_path, n_patients=4, references=False)
    stale = [results / "report" / name for name in ("assets/vega.js", "figures/old_roc_WT.svg", "tables/old_main.csv")]
    page = results / "report" / "patients" / "SegResNet" / "p.html"
    for path in (*stale, page):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("old")
    written(results, sheet, ["SegResNet"])
    assert not any(path.exists() for path in stale)
    assert page.exists()


# --- the page ---


def assert_links_resolve(page, folder):
    for link in page.links + page.images:
        assert link[1:] in page.ids if link.startswith("#") else (folder / link).is_file(), link


def test_all_links_and_images_of_the_page_resolve(whole):
    html, folder, _ = whole
    page = Page(html)
    # eleven figures of three regions; nobody has ET in the second model: it has strata of missing patients alone
    charts = 11 * 3 + (11 * 2 + 1)
    compared = 1 + 3
    assert html.count("data-chart=") == charts + compared
    assert len(page.images) == 2 * (charts + compared) + 2 * 3 * 4  # two themes; four panels of three patients
    assert_links_resolve(page, folder)


def test_convergence_adds_three_charts_whose_links_resolve(ensemble):
    html, folder, _ = ensemble
    page = Page(html)
    assert len(page.images) == 2 * (11 * 2 + 1 + 3) + 3 * 4
    assert_links_resolve(page, folder)


def test_the_page_names_no_network_address(whole):
    markup, _, script = whole[0].rpartition("<script>")
    assert not re.search(r"(https?:)?//[a-z]", markup)
    assert not re.search(r"https?:|import|fetch", script)
    assert Page(whole[0]).scripts == 1  # the report's own


def test_alarms_come_first_and_by_severity(whole):
    html = whole[0]
    places = [html.index("Swapped channels."), html.index("ET is small."), html.index("Verdict: which")]
    assert places == sorted(places)


def test_file_names_are_made_of_checked_ids_alone(whole):
    names = [path.name for path in whole[1].rglob("*.*")]
    assert all(re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name) for name in names)
    assert not any(name.startswith(".partial") for name in names)


def test_a_model_name_that_leaves_the_folder_is_refused(tmp_path):
    with pytest.raises(SegtrustError, match="cannot be the name of a model"):
        report.report(["../elsewhere"], tmp_path, tmp_path / "report", SETTINGS, [])


def test_markup_in_ids_reasons_and_alarms_is_shown_as_text(whole):
    page = Page(whole[0])
    assert page.scripts == 1
    # model and message of the alarm; for each of two models the id without reference and the reason of the failure
    assert "".join(page.text).count(EVIL) == 2 + 2 * 2


def test_an_id_that_is_no_file_name_gets_no_file(tmp_path):
    run = report.ModelFiles("SegResNet", mapped=["../x"])
    shown = write_slices(run, tmp_path, tmp_path / "out", "t1ce", [person("../x", None)], {})
    assert (shown[0]["panels"], "cannot be part of a file name" in shown[0]["problem"]) == ([], True)


def test_patients_left_out_are_listed_with_the_reason():
    sheet = [person("a", "s"), person("b", None), person("c", "s"), person("d", "s", "train"), person("e", "s")]
    rows = report.left_out(sheet, ["a"], {"c": "failed in sample: out of memory", "f": "truncated"})
    assert rows == [
        ("b", "no reference in the sheet"),
        ("c", "failed in sample: out of memory"),
        ("e", "no result of this patient in the cohort tables"),
        ("f", "truncated"),
    ]


# --- small, empty and odd cohorts ---


def test_a_single_patient_gives_a_report_without_intervals(single):
    page = Page(single[0])
    assert all(title.startswith("no interval: fewer than 6") for row in page.numbers.values() for _, _, title in row)
    assert "the only patient, mean Dice" in single[0]
    assert "no interval: fewer than 6 subjects" in " ".join(page.text)


def test_without_any_reference_the_report_says_so_and_shows_maps(tmp_path):
    html, folder, _ = make(tmp_path, n_patients=4, references=False)
    assert "none with a reference, so nothing is evaluated" in html
    assert html.count("no reference in the sheet") == 4
    assert len(list((folder / "figures").glob("*.png"))) == 12
    assert '<table class="main">' not in html


def test_a_region_missing_everywhere_is_a_dash_with_its_reason(whole):
    page = Page(whole[0].split('id="model-UNet"')[1])
    value, text, title = page.numbers["auroc"][2]
    assert (value, text) == (None, "–")
    assert title == "no voxel of brain has a value in any patient"
    assert title in " ".join(page.text)
    assert "ET: no voxels in predicted_5mm or brain" in " ".join(page.text)


def test_maps_that_were_not_kept_are_named(tmp_path):
    (tmp_path / "SegResNet" / "maps").mkdir(parents=True)
    run = report.ModelFiles("SegResNet", mapped=["p1"])
    shown = write_slices(run, tmp_path, tmp_path / "out", "t1ce", [person("p1", None)], {})
    assert "p1_entropy.nii.gz" in shown[0]["problem"]
    assert "was not made in this run" in shown[0]["problem"]


def test_a_model_without_results_is_refused(tmp_path):
    with pytest.raises(SegtrustError, match="neither cohort tables nor maps"):
        report.report(["SegResNet"], tmp_path, tmp_path / "out", SETTINGS, [])
