"""The report: true to its tables, complete with and without references, safe and self-contained."""

import math
import re
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from segtrust import figures, report
from segtrust.cohort import AGGREGATIONS
from segtrust.errors import SegtrustError
from segtrust.files import write_json, write_parquet
from segtrust.measures import BETWEEN_MEMBERS, WITHIN_MEMBERS
from segtrust.patients import Patient
from segtrust.preprocess import preprocess, write_preprocessed
from segtrust.regions import REGIONS, codes_of, overlay
from segtrust.report import Cell, number, verdict
from segtrust.rows import CURVES_SCHEMA, METRICS_SCHEMA, STRATA_SCHEMA
from segtrust.volumes import Geometry, write_volume

SETTINGS = {"title": "Can the confidence be trusted?", "background": "t1ce", "n_bins": 15}
N_BINS = 15
PASSES = 20

METRIC_COLUMNS = METRICS_SCHEMA.names
PARTS = ("expected_entropy", WITHIN_MEMBERS, BETWEEN_MEMBERS)

# what the tables of the drawn cohort say: over-confident on ET, fine on WT
DICE = {"WT": 0.91, "TC": 0.86, "ET": 0.73}
AUROC = {"WT": 0.991, "TC": 0.982, "ET": 0.971}
GAP = {"WT": 0.012, "TC": 0.061, "ET": 0.312}


# --- a small cohort, drawn ---


def metric(model, region, name, value, pooling, n_cases, measure=None, mask=None, n_bins=None, passes=PASSES):
    row = dict.fromkeys(METRIC_COLUMNS)
    bounded = n_cases >= 6 and value is not None
    n_voxels = 0 if value is None else 1_000 * n_cases
    row |= {
        "model": model,
        "region": region,
        "metric": name,
        "value": value,
        "pooling": pooling,
        "measure": measure,
        "mask": mask,
        "n_bins": n_bins,
        "passes": passes,
        "recalibration": "none",
        "n_cases": n_cases,
        "n_voxels": None if mask is None else n_voxels,
        "ci_low": value - 0.0123 if bounded else None,
        "ci_high": value + 0.0123 if bounded else None,
        "interval": "envelope" if bounded else "none: fewer than 6 subjects",
        "conditional_on_reference": False,
        "mask_depends_on_model": mask == "predicted_5mm",
    }
    return row


def metrics_table(model, n_cases, missing=(), early=(), members=False):
    """Return metrics of a model; regions in `missing` are empty everywhere. Distractors differ in one key each.

    early : numbers of passes that AUROC and calibration errors are given after, too
    members : whether entropy is given in parts
    """
    rows = []
    for region in REGIONS:
        gone = region in missing

        def add(name, value, pooling, region=region, gone=gone, **keys):
            rows.append(metric(model, region, name, None if gone else value, pooling, n_cases, **keys))

        add("dice", DICE[region], "patient_mean")
        add("dice_deterministic", DICE[region] + 0.004, "patient_mean")
        for name, value in (("delta_dice", -0.004), ("absolute_delta_dice", 0.006)):
            add(name, value, "patient_mean")
        for mask in ("brain", "volume"):
            for shift, measure in ((0, "entropy"), (-0.015, "deterministic_entropy"), (0.002, "boundary_proximity")):
                add("auroc", AUROC[region] + shift + 0.001 * (mask == "volume"), "pooled", measure=measure, mask=mask)
                add("auroc", AUROC[region] - 0.05, "patient_mean", measure=measure, mask=mask)
        for mask, share in (("predicted_5mm", 1), ("brain", 0.05), ("union", 3)):
            add("mean_uncertainty", 0.31 * share / 3, "pooled", measure="entropy", mask=mask)
            for bins in (10, 15, 20):
                for kind, factor in (("class_probability", 0.8), ("top_label", 1.0)):
                    value = GAP[region] * share * factor + bins / 1e4
                    add(f"ece_{kind}", value, "pooled", measure="probability", mask=mask, n_bins=bins)
            add("gap", GAP[region] * share, "pooled", measure="probability", mask=mask)
        add("dice", 0.1, "patient_mean", passes=5)
        for passes in early:
            add("auroc", AUROC[region] - 0.2 / passes, "pooled", measure="entropy", mask="brain", passes=passes)
            for kind in ("class_probability", "top_label"):
                keys = {"measure": "probability", "mask": "predicted_5mm", "n_bins": 15, "passes": passes}
                add(f"ece_{kind}", GAP[region] + 0.1 / passes, "pooled", **keys)
        for measure, part in zip(PARTS, (0.2, 0.07, 0.04), strict=True) if members else ():
            add("mean_uncertainty", part, "pooled", measure=measure, mask="predicted_5mm")
    return pd.DataFrame(rows, columns=METRIC_COLUMNS)


def patients_table(model, ids, generator, missing=()):
    rows = []
    for place, patient in enumerate(ids):
        for region in REGIONS:
            absent = region in missing or (region == "ET" and place % 9 == 4)
            missed = region == "ET" and place % 9 == 7
            score = generator.beta(3, 9)
            dice = float(np.clip(DICE[region] - 1.2 * (score - 0.25) + generator.normal(0, 0.05), 0, 1))
            rows.append(
                {
                    "model": model,
                    "patient": patient,
                    "subject": patient,
                    "split": "test",
                    "region": region,
                    "dice": 1.0 if absent else 0.0 if missed else dice,
                    "both_empty": absent,
                    "score_predicted_5mm_mean_entropy": math.nan if absent or missed else score,
                    "site": "A",
                }
            )
    return pd.DataFrame(rows)


def strata_table(model, patients):
    rows = []
    for region in REGIONS:
        people = patients[patients["region"] == region]
        score = people["score_predicted_5mm_mean_entropy"]
        names = ("Q1", "Q2", "Q3", "Q4") if score.notna().sum() >= 8 else ("H1", "H2")
        rank = (score.rank() - 1) * len(names) // max(score.notna().sum(), 1)
        groups = {name: rank == place for place, name in enumerate(names)}
        groups["missing_region"] = score.isna()
        groups["missing_region_missed"] = score.isna() & ~people["both_empty"]
        groups["missing_region_absent"] = score.isna() & people["both_empty"]
        for name, inside in groups.items():
            dice = people.loc[inside, "dice"]
            enough = len(dice) >= 6
            rows.append(
                {
                    "model": model,
                    "region": region,
                    "measure": "entropy",
                    "aggregation": "predicted_5mm_mean",
                    "scheme": "quartiles" if len(names) == 4 else "halves",
                    "stratum": name,
                    "cutoff_source": "in_sample",
                    "n_cases": len(dice),
                    "median_dice": dice.median(),
                    "ci_low": dice.quantile(0.2) if enough else math.nan,
                    "ci_high": dice.quantile(0.8) if enough else math.nan,
                    "score_low": score[inside].min(),
                    "score_high": score[inside].max(),
                    "group": None,
                    "group_value": None,
                }
            )
    return pd.DataFrame(rows)


def curves_table(model, missing=()):
    rows = []
    for region in (name for name in REGIONS if name not in missing):
        for kind in ("class_probability", "top_label"):
            for mask in ("predicted_5mm", "brain"):
                for place in range(N_BINS if kind == "class_probability" else 8):
                    middle = (place + 0.5) / N_BINS if kind == "class_probability" else 0.5 + (place + 0.5) / 16
                    bent = middle - GAP[region] * 1.5 * middle * (1.2 - middle)
                    edge = 1 + 40 * (place in (0, N_BINS - 1, 7 if kind == "top_label" else 0))
                    rows.append(
                        {
                            "model": model,
                            "curve": f"reliability_{kind}",
                            "region": region,
                            "mask": mask,
                            "measure": "probability",
                            "pooling": "pooled",
                            "n_bins": N_BINS,
                            "point": place,
                            "x": middle,
                            "y": bent + 0.02 * (mask == "brain"),
                            "low": bent - 0.03,
                            "high": bent + 0.03,
                            "n": 700 * edge * (1 + 20 * (mask == "brain" and place == 0)),
                        }
                    )
    return pd.DataFrame(rows, columns=CURVES_SCHEMA.names)


def ball(shape, centre, radius):
    grid = np.indices(shape).T - np.array(centre)
    return np.sqrt((grid**2).sum(axis=-1)).T - radius


def draw_volumes(results, folder, model, patient, shape=(22, 28, 12)):
    """Write the maps, the preprocessed scan and the reference of a patient on an LPS grid; return the reference."""
    geometry = Geometry(shape, np.diag([-1.0, -1.0, 2.0, 1.0]))
    middle = np.array(shape) / 2
    brain = ball(shape, middle, 10.0) < 0
    texture = np.random.default_rng(len(patient)).normal(0, 4, shape)
    tumour = [ball(shape, middle + np.array([3, 2, 0]), radius) for radius in (5.0, 3.4, 2.2)]
    scan = np.where(brain, 100 + texture + 30 * (tumour[1] < 0) + 40 * (tumour[2] < 0), 0).astype(np.float32)
    write_preprocessed(
        results / "preprocessed" / f"{patient}.safetensors", preprocess(np.stack([scan] * 4), geometry), {"code": "0"}
    )
    probability = np.stack([1 / (1 + np.exp(distance * 1.2)) for distance in tumour]).astype(np.float32)
    probability = np.where(brain, probability, 1e-6)
    entropy = -(probability * np.log2(probability) + (1 - probability) * np.log2(1 - probability))
    maps = results / model / "maps"
    write_volume(maps / f"{patient}_probability.nii.gz", probability.astype(np.float32), geometry, "probability")
    write_volume(maps / f"{patient}_entropy.nii.gz", entropy.astype(np.float32), geometry, "entropy")
    labels = codes_of(overlay(probability >= 0.5), "brats2021")
    write_volume(maps / f"{patient}_segmentation.nii.gz", labels, geometry, "labels")
    truth = np.stack([ball(shape, middle + np.array([2, 3, 0]), radius) < 0 for radius in (4.6, 3.0, 1.8)])
    write_volume(folder / f"{patient}_seg.nii.gz", codes_of(overlay(truth), "brats2021"), geometry, "reference")
    return str(folder / f"{patient}_seg.nii.gz")


def draw_cohort(
    folder, n_patients=18, models=("SegResNet",), missing=None, references=True, alarms=(), early=(), members=False
):
    """Write the result files of a run and return (results, sheet, metrics by model).

    missing : {model: regions that nobody has}; alarms : those of the first model
    early, members : as of `metrics_table`
    """
    results, generator = folder / "results", np.random.default_rng(7)
    ids = [f"BraTS2021_{place:05d}" for place in range(n_patients)]
    paths, tables = {}, {}
    for model in models:
        gone = (missing or {}).get(model, ())
        patients = patients_table(model, ids, generator, gone)
        shown = [patient for _, patient in report.showcase(patients if references else None, ids)]
        for patient in shown:
            paths[patient] = draw_volumes(results, folder, model, patient)
        if not references:
            continue
        metrics = metrics_table(model, n_patients, gone, early, members)
        tables[model] = metrics
        written = {"metrics": metrics, "patients": patients, "strata": strata_table(model, patients)}
        written["curves"] = curves_table(model, gone)
        provenance = {
            "settings": "5f2c" * 16,
            "seed": 1,
            "versions": {"segtrust": "0.1", "torch": "2.13"},
            "cohort": {"n_resamples": 2000, "failure_dice": 0.8, "n_bins": [10, 15, 20]},
        }
        for name, table in written.items():
            rows = pa.Table.from_pandas(table, preserve_index=False)
            write_parquet(results / model / "cohort" / f"{name}.parquet", rows, provenance)
        write_json(results / model / "cohort" / "alarms.json", list(alarms) if model == models[0] else [])
    sheet = [person(patient, paths.get(patient, "elsewhere.nii.gz") if references else None) for patient in ids]
    return results, sheet, tables


def person(patient, seg, split="test"):
    return Patient(patient, patient, split, "brats2021", {}, seg)


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
    assert report.SCORE_AGGREGATION in AGGREGATIONS


def test_two_rows_for_one_number_are_refused(tmp_path):
    metrics = metrics_table("SegResNet", 10)
    twice = pd.concat([metrics, metrics[metrics["metric"] == "gap"]])
    with pytest.raises(SegtrustError, match="expected one"):
        report.main_table(twice, N_BINS)


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
    assert report.PARTS_OF_ENTROPY not in whole[0]


def test_the_page_says_where_passes_come_from(ensemble):
    assert f"{SOURCES} for each patient." in " ".join(Page(ensemble[0]).text)


def test_a_bare_ece_is_never_printed(whole):
    text = " ".join(Page(whole[0]).text)
    assert not re.search(r"\bECE\b", text)


def test_the_same_files_give_the_same_bytes(single):
    _, results, sheet = single
    written(results, sheet, ["SegResNet"], "again")
    files = [path.relative_to(results / "report") for path in (results / "report").rglob("*.*")]
    assert len(files) == 2 * 9 + 4 + 4 + 1  # charts in two themes, slices, tables, page
    assert all((results / "report" / path).read_bytes() == (results / "again" / path).read_bytes() for path in files)


# --- numbers in words ---


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.7142, "0.714"),
        (0.99991, "0.9999"),
        (0.00042, "0.0004"),
        (-0.0042, "−0.004"),
        (1.0, "1.000"),
        (0, "0.000"),
        (None, "–"),
        (3e-9, "3.0e−09"),
        (2.5, "2.500"),
    ],
)
def test_rounding_never_turns_a_number_into_zero_or_one(value, text):
    assert number(value) == text


def test_an_interval_that_reaches_below_zero_is_written_with_to():
    assert report.interval_text(-0.01, 0.02) == "[−0.010 to 0.020]"
    assert report.interval_text(0.27, 0.35, 2) == "[0.27–0.35]"
    assert report.interval_text(None, None) == ""


# --- verdicts ---


def cells(**changed):
    """Cells of a model that ranks well, better than its baselines, and is calibrated."""
    made = {
        "auroc": Cell(0.97, 0.96, 0.98),
        "auroc_deterministic": Cell(0.90),
        "auroc_boundary": Cell(0.91),
        "ece_class_probability": Cell(0.010, 0.005, 0.015),
        "ece_top_label": Cell(0.020, 0.012, 0.028),
        "gap": Cell(0.001, -0.001, 0.003),
    }
    return made | changed


def sentences(region="ET", groups=(), **changed):
    return verdict(region, cells(**changed), list(groups))


def test_a_baseline_as_good_as_entropy_is_named():
    ranking = sentences(auroc_boundary=Cell(0.98))[0]
    assert (
        ranking.text
        == "Uncertainty ranks errors well (AUROC 0.97), but so does distance to the predicted boundary (0.98)."
    )
    assert ranking.level == "caution"


def test_entropy_that_beats_its_baselines_is_good():
    ranking = sentences()[0]
    assert ranking.level == "good"
    assert (
        "better than distance to the predicted boundary (0.91) and the entropy of one ordinary pass (0.90)"
        in ranking.text
    )


def test_an_auroc_without_baselines_is_not_judged():
    ranking = sentences(auroc_deterministic=Cell(None), auroc_boundary=Cell(None))[0]
    assert ranking.level == "caution"
    assert "cannot be judged" in ranking.text


def test_a_low_auroc_is_called_poor():
    ranking = sentences(auroc=Cell(0.60, 0.55, 0.65))[0]
    assert (ranking.level, "poorly" in ranking.text, "no better than" in ranking.text) == ("bad", True, True)


def test_over_confidence_is_said_with_its_interval_and_what_to_do():
    changed = {"ece_top_label": Cell(0.32, 0.28, 0.36), "gap": Cell(0.31, 0.27, 0.35)}
    calibration = sentences(**changed)[1]
    assert calibration.text == (
        "Confidence on ET is too high by 0.31 [0.27–0.35]: do not read ET probabilities as probabilities."
    )
    assert calibration.level == "bad"


def test_under_confidence_is_said_as_a_positive_amount():
    changed = {"ece_top_label": Cell(0.08, 0.06, 0.10), "gap": Cell(-0.07, -0.09, -0.05)}
    calibration = sentences("TC", **changed)[1]
    assert calibration.text == "Confidence on TC is too low by 0.07 [0.05–0.09]: read TC probabilities with care."


def test_without_an_interval_nothing_is_called_good_or_bad():
    findings = sentences(auroc=Cell(0.99), ece_top_label=Cell(0.32), gap=Cell(0.31))
    assert [finding.level for finding in findings[:2]] == ["caution", "caution"]
    assert "too high by 0.31 (no interval)" in findings[1].text


def test_errors_in_both_directions_are_no_direction():
    changed = {"ece_class_probability": Cell(0.20, 0.15, 0.25), "gap": Cell(0.01, -0.02, 0.04)}
    calibration = sentences(**changed)[1]
    assert "off by 0.20 [0.15–0.25] (ece_class_probability) on average" in calibration.text


def test_calibration_is_good_only_with_an_interval_that_says_so():
    assert sentences()[1].level == "good"
    assert sentences(ece_top_label=Cell(0.02, 0.0, 0.09))[1].level == "caution"
    assert sentences(ece_top_label=Cell(0.02))[1].level == "caution"


def test_what_is_null_is_not_judged():
    gone = Cell(None, reason="no patient has a value")
    findings = sentences(auroc=gone, ece_class_probability=gone, ece_top_label=gone, gap=gone)
    assert [finding.level for finding in findings] == ["unknown"] * 3
    assert all("no patient has a value" in finding.text for finding in findings[:2])


def stratum(label, median, low, high):
    return {"label": label, "dice": np.array([median]), "median": median, "low": low, "high": high, "apart": False}


def test_triage_is_good_when_the_uncertain_stratum_is_clearly_worse():
    triage = sentences(groups=[stratum("Q1", 0.93, 0.9, 0.95), stratum("Q4", 0.61, 0.5, 0.7)])[2]
    assert triage.text == (
        "Uncertain patients are worse: median Dice 0.61 [0.50–0.70] in Q4 against 0.93 [0.90–0.95] in Q1."
    )
    assert triage.level == "good"


def test_triage_without_intervals_shows_nothing():
    triage = sentences(groups=[stratum("H1", 0.93, math.nan, math.nan), stratum("H2", 0.61, math.nan, math.nan)])[2]
    assert triage.level == "caution"


# --- strata and slices ---


def test_every_patient_is_a_point_of_exactly_one_stratum():
    patients = patients_table("SegResNet", [f"p{place}" for place in range(40)], np.random.default_rng(3))
    groups = report.stratum_groups(strata_table("SegResNet", patients), patients, "ET")
    drawn = np.sort(np.concatenate([group["dice"] for group in groups]))
    assert np.array_equal(drawn, np.sort(patients.loc[patients["region"] == "ET", "dice"].to_numpy()))
    assert [group["label"] for group in groups] == ["Q1", "Q2", "Q3", "Q4", "missed", "absent"]


def test_best_median_and_worst_are_different_patients_with_maps():
    patients = pd.DataFrame({"patient": list("abcd"), "region": "WT", "dice": [0.9, 0.2, 0.5, 0.7]})
    assert [patient for _, patient in report.showcase(patients, list("abcd"))] == ["a", "c", "b"]
    assert [patient for _, patient in report.showcase(patients, ["a", "b"])] == ["a", "b"]
    assert [patient for _, patient in report.showcase(patients, [])] == []
    assert [patient for _, patient in report.showcase(None, list("dcba"))] == ["a", "b", "c"]


def test_a_slice_shows_the_right_of_the_patient_on_the_left():
    plane = np.zeros((4, 3))  # columns towards the right of the patient, rows towards anterior
    plane[3, 2] = 1
    assert figures._radiological(plane)[0, 0] == 1


# --- the page ---


def assert_links_resolve(page, folder):
    for link in page.links + page.images:
        assert link[1:] in page.ids if link.startswith("#") else (folder / link).is_file(), link


def test_all_links_and_images_of_the_page_resolve(whole):
    html, folder, _ = whole
    page = Page(html)
    charts = (6 + 3) + (4 + 3)  # no reliability diagrams of a region that nobody has
    assert len(page.images) == 2 * charts + 2 * 3 * 4  # two themes; four panels of three patients of two models
    assert_links_resolve(page, folder)


def test_convergence_adds_three_charts_whose_links_resolve(ensemble):
    html, folder, _ = ensemble
    page = Page(html)
    assert len(page.images) == 2 * (4 + 3 + 3) + 3 * 4
    assert_links_resolve(page, folder)


def test_the_page_names_no_network_address(whole):
    assert not re.search(r"(https?:)?//[a-z]", whole[0])
    assert Page(whole[0]).scripts == 0


def test_alarms_come_first_and_by_severity(whole):
    html = whole[0]
    places = [html.index("Swapped channels."), html.index("ET is small."), html.index("Verdict")]
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
    assert page.scripts == 0
    # model and message of the alarm; for each of two models the id without reference and the reason of the failure
    assert "".join(page.text).count(EVIL) == 2 + 2 * 2


def test_an_id_that_is_no_file_name_gets_no_file(tmp_path):
    run = report.ModelFiles("SegResNet", mapped=["../x"])
    shown = report._write_slices(run, tmp_path, tmp_path / "out", SETTINGS, [person("../x", None)])
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
    shown = report._write_slices(run, tmp_path, tmp_path / "out", SETTINGS, [person("p1", None)])
    assert "p1_entropy.nii.gz" in shown[0]["problem"]
    assert "was not made in this run" in shown[0]["problem"]


def test_a_model_without_results_is_refused(tmp_path):
    with pytest.raises(SegtrustError, match="neither cohort tables nor maps"):
        report.report(["SegResNet"], tmp_path, tmp_path / "out", SETTINGS, [])


# --- figures ---


def test_a_reliability_diagram_draws_the_points_of_its_table():
    x, y = np.array([0.1, 0.9]), np.array([0.2, 0.7])
    points = (x, y, y - 0.1, y + 0.1, np.array([10, 20]))
    figure = figures.reliability({"predicted_5mm": points}, "ET", "class_probability", 15)
    drawn = figure.axes[0].lines[-1]
    assert np.array_equal(drawn.get_xydata(), np.stack([x, y], axis=1))
    assert [bar.get_height() for bar in figure.axes[1].patches] == [10, 20]
    assert drawn.get_color() == figures.REGION_COLOURS["ET"]


def test_a_mask_without_voxels_draws_no_contour():
    scan = np.arange(1.0, 21).reshape(4, 5)
    nothing = np.zeros((3, 4, 5), bool)
    figure = figures.scan_panel(scan, nothing, nothing, (1, 1), "t1ce")
    assert not figure.axes[0].collections


def points_of(values):
    return pd.DataFrame({"passes": [5, 10], "value": values, "low": np.array(values) - 0.001, "high": np.nan})


def test_a_convergence_figure_draws_the_points_of_its_table():
    figure = figures.convergence({"TC": points_of([0.2, 0.3])}, "gap", "brain", from_zero=True)
    (line,) = figure.axes[0].lines
    assert line.get_ydata().tolist() == [0.2, 0.3]
    assert line.get_xdata() == pytest.approx([5, 10])
    assert line.get_color() == figures.REGION_COLOURS["TC"]
    assert figure.axes[0].get_ylim()[0] == 0


def test_a_small_change_over_passes_is_not_blown_up():
    tables = {"WT": points_of([0.998, 0.999]), "TC": points_of([0.997, 0.998])}
    low, high = figures.convergence(tables, "AUROC", "brain", from_zero=False).axes[0].get_ylim()
    assert high - low >= figures.LEAST_SPAN
    assert low < 0.996 < 0.999 < high <= 1
