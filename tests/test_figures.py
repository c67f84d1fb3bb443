"""Figures: the right rows of the right tables, and what is said where there are none."""

import numpy as np
import pandas as pd
import pytest
from drawn_cohorts import DICE, draw_cohort, metrics_table, patients_table, strata_table
from test_charts import data_of

from segtrust import figures
from segtrust.cohort import AGGREGATIONS
from segtrust.drawing import specification
from segtrust.report import _read_model


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A model of which nobody has ET, with metrics after fewer passes."""
    options = {"missing": {"SegResNet": ("ET",)}, "early": (5, 10)}
    results, sheet, _ = draw_cohort(tmp_path_factory.mktemp("run"), **options)
    return _read_model(results, "SegResNet", sheet)


@pytest.fixture(scope="module")
def drawn(run):
    """{key: Figure} of the model; all patients but one have a page."""
    pages = {patient: f"patients/SegResNet/{patient}.html" for patient in run.patients["patient"].unique()[1:]}
    return {figure.key: figure for figure in figures.figures_of(run, 15, pages)}


def table_of(figure, region="WT", place=0):
    (panel,) = [panel for panel in figure.panels if panel.label == region]
    return data_of(specification(panel.chart))[place]


def test_every_figure_that_is_asked_for_is_made(drawn):
    assert list(drawn) == [
        "reliability_class_probability",
        "reliability_top_label",
        "roc",
        "precision_recall",
        "distribution",
        "distances",
        "retention",
        "strata",
        "scatter",
        "risk_coverage",
        "qu_brats",
        "convergence",
    ]


def test_a_region_that_nobody_has_is_said_to_be_absent(drawn):
    for key in ("reliability_top_label", "roc", "distribution", "retention", "scatter", "qu_brats"):
        (panel,) = [panel for panel in drawn[key].panels if panel.label == "ET"]
        assert panel.chart is None
        assert panel.reason.startswith("ET: no ")


def test_curves_of_ranking_stand_beside_baselines_and_their_own_metrics(run, drawn):
    table = table_of(drawn["roc"])
    assert set(table["measure"]) == {"entropy", "mutual_information", "deterministic_entropy"}
    assert table["mask"].iloc[0] == "brain"
    assert set(table["mask"]) == {"brain", "predicted_5mm"}  # bands of distance are no choice
    rows = run.metrics[(run.metrics["metric"] == "auroc") & (run.metrics["pooling"] == "pooled")]
    rows = rows[(rows["region"] == "WT") & (rows["mask"] == "brain") & (rows["passes"] == rows["passes"].max())]
    for measure in ("entropy", "deterministic_entropy"):
        shown = table[(table["mask"] == "brain") & (table["measure"] == measure)]["auroc"].unique()
        assert shown == pytest.approx(rows[rows["measure"] == measure]["value"].tolist(), rel=1e-4)


def test_masks_to_choose_from_are_those_drawn_the_first_being_that_of_papers(drawn):
    assert drawn["reliability_top_label"].masks == ("predicted_5mm", "union")
    assert drawn["roc"].masks == ("brain", "predicted_5mm")
    assert drawn["distribution"].masks == ("brain",)
    assert drawn["strata"].masks == ()


def test_bins_of_a_distribution_lie_edge_to_edge(drawn):
    table = table_of(drawn["distribution"])
    wrong = table[table["outcome"] == "wrong"]
    assert wrong["low"].iloc[0] == pytest.approx(0, abs=1e-9)
    assert wrong["high"].iloc[-1] == pytest.approx(1)
    assert wrong["low"].to_numpy()[1:] == pytest.approx(wrong["high"].to_numpy()[:-1])


def test_errors_by_distance_are_the_rows_of_the_bands(run, drawn):
    table = table_of(drawn["distances"])
    rows = run.metrics[(run.metrics["region"] == "WT") & (run.metrics["metric"] == "error_rate")]
    expected = dict(zip(rows["mask"], rows["value"], strict=True))
    shown = table[table["quantity"] == "error rate"]
    assert dict(zip(shown["band"], shown["y"], strict=True)) == pytest.approx(expected, rel=1e-4)
    assert len(expected) == 12


def test_patients_open_their_pages_where_they_have_one(run, drawn):
    table = table_of(drawn["scatter"])
    first = run.patients["patient"].iloc[0]
    assert table.set_index("patient")["href"].isna().to_dict()[first]
    others = table[table["patient"] != first]
    assert (others["href"] == "patients/SegResNet/" + others["patient"] + ".html").all()
    assert len(others) > 5


def test_every_patient_is_a_point_of_exactly_one_stratum():
    patients = patients_table("SegResNet", [f"p{place}" for place in range(40)], np.random.default_rng(3))
    groups = figures.stratum_groups(strata_table("SegResNet", patients), patients, "ET")
    shown = pd.concat([group["patients"] for group in groups])
    assert sorted(shown["patient"]) == sorted(patients["patient"].unique())
    assert [group["label"] for group in groups] == ["Q1", "Q2", "Q3", "Q4", "missed", "absent"]


def test_points_of_strata_and_scatter_are_the_patients_of_the_table(run, drawn):
    people = run.patients[run.patients["region"] == "TC"].set_index("patient")
    strata, scatter = table_of(drawn["strata"], "TC"), table_of(drawn["scatter"], "TC")
    for table in (strata, scatter):
        assert len(table) == len(people)
        assert table["y"].to_numpy() == pytest.approx(people.loc[table["patient"], "dice"].to_numpy(), rel=1e-4)
    assert scatter["x"].to_numpy() == pytest.approx(people.loc[scatter["patient"], figures.SCORE].to_numpy(), rel=1e-4)


def test_captions_say_how_many_patients_and_never_a_bare_ece(drawn):
    for key, figure in drawn.items():
        assert figure.caption.count("`") % 2 == 0
        assert "ECE" not in figure.caption
        if key not in ("strata", "scatter"):
            assert "18 patients" in figure.caption, key


def test_where_the_score_of_patients_stands_is_a_score_of_the_cohort():
    assert figures.SCORE_AGGREGATION in AGGREGATIONS


def test_metrics_after_fewer_passes_are_not_mixed_with_the_last():
    metrics = metrics_table("SegResNet", 10, early=(5,))
    rows = figures._final(metrics, metric="dice", region="WT")
    assert rows["value"].tolist() == [DICE["WT"]]


def test_precision_and_recall_begin_at_recall_zero(drawn):
    table = table_of(drawn["precision_recall"])
    for _, part in table.groupby(["mask", "measure"]):
        part = part.sort_values("point")
        assert part["x"].iloc[0] == 0
        assert part["y"].iloc[0] == part["y"].iloc[1]


def test_lines_of_entropy_lie_above_all_others(drawn):
    for key in ("roc", "precision_recall", "retention", "risk_coverage"):
        assert table_of(drawn[key])["measure"].iloc[-1] == "entropy"
