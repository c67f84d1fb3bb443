import math

import pandas as pd

from segtrust.main_table import Cell
from segtrust.verdict import Finding, headlines, verdict


def cells(**changed):
    """Cells of a model that ranks well, better than its baselines, and is calibrated."""
    made = {
        "auroc": Cell(0.97, 0.96, 0.98),
        "auroc_deterministic": Cell(0.90, 0.89, 0.92),
        "auroc_boundary": Cell(0.91, 0.90, 0.93),
        "mce_class_probability": Cell(0.04),
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


def test_entropy_whose_interval_meets_that_of_a_baseline_is_not_called_better():
    ranking = sentences(auroc_boundary=Cell(0.95, 0.93, 0.965))[0]
    assert ranking.level == "caution"
    assert "above distance to the predicted boundary (0.95)" in ranking.text
    assert ranking.text.endswith("but not shown to be better: intervals overlap.")


def test_entropy_that_beats_the_only_baseline_there_is_is_not_called_better():
    ranking = sentences(auroc_boundary=Cell(None))[0]
    assert ranking.level == "caution"
    assert ranking.text.endswith("above the entropy of one ordinary pass (0.90); the other baseline has no value.")


def test_a_baseline_of_fewer_patients_says_so():
    changed = {"auroc": Cell(0.97, 0.96, 0.98, n_cases=40), "auroc_boundary": Cell(0.98, n_cases=31)}
    assert "distance to the predicted boundary (0.98, for 31 of 40 patients)" in sentences(**changed)[0].text


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


def test_the_larger_error_is_named_where_it_is_not_that_of_confidence():
    changed = {"ece_class_probability": Cell(0.06, 0.055, 0.07), "ece_top_label": Cell(0.04, 0.03, 0.05)}
    calibration = sentences(**changed, gap=Cell(-0.04, -0.05, -0.03))[1]
    assert "off by 0.06 [0.06–0.07] (ece_class_probability)" in calibration.text
    assert calibration.figure == "reliability_class_probability"


def test_a_small_mean_error_over_a_bin_that_is_far_off_is_not_good():
    calibration = sentences("TC", mce_class_probability=Cell(0.30))[1]
    assert calibration.level == "caution"
    assert calibration.text == (
        "Probabilities on TC are off by 0.02 [0.01–0.03] (ece_top_label) on average, but by up to 0.30 in a bin "
        "(mce_class_probability): read TC probabilities with care."
    )


def test_an_error_beside_a_limit_is_written_so_that_one_sees_on_which_side_it_lies():
    for value, text in ((0.0953, "0.095"), (0.1004, "0.100"), (0.0504, "0.050"), (0.07, "0.07")):
        changed = {"ece_class_probability": Cell(value, value - 0.01, value + 0.01)}
        assert f"off by {text} [" in sentences(**changed)[1].text


def test_each_finding_names_the_figure_that_shows_it():
    assert [finding.figure for finding in sentences()] == ["roc", "reliability_top_label", "strata"]


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
    patients = pd.DataFrame({"patient": ["p"], "dice": [median]})
    return {"label": label, "patients": patients, "median": median, "low": low, "high": high, "apart": False}


def test_triage_is_good_when_the_uncertain_stratum_is_clearly_worse():
    triage = sentences(groups=[stratum("Q1", 0.93, 0.9, 0.95), stratum("Q4", 0.61, 0.5, 0.7)])[2]
    assert triage.text == (
        "Uncertain patients are worse: median Dice 0.61 [0.50–0.70] in Q4 against 0.93 [0.90–0.95] in Q1."
    )
    assert triage.level == "good"


def test_patients_without_a_predicted_region_are_counted_beside_triage():
    groups = [stratum("Q1", 0.93, 0.9, 0.95), stratum("Q4", 0.61, 0.5, 0.7)]
    groups += [stratum(name, 0.0, math.nan, math.nan) | {"apart": True} for name in ("missed", "absent")]
    triage = sentences("ET", groups=groups)[2]
    assert triage.text.endswith("in Q1; 2 without a predicted ET (1 missed) not counted.")


def test_triage_without_intervals_shows_nothing():
    triage = sentences(groups=[stratum("H1", 0.93, math.nan, math.nan), stratum("H2", 0.61, math.nan, math.nan)])[2]
    assert triage.level == "caution"


# --- which model to trust ---


FINE = ("good", ".", "off by 0.20", "", "read")
CARE = ("caution", ".", "off by 0.20", "", "with care")
OFF = ("bad", ".", "off by 0.20", "", "do not read")


def headlines_of(**levels):
    """Return the headlines of models with levels of ranking and findings of calibration, a list of (level, text)."""
    findings = {
        model: [Finding(ranking, "."), Finding(*calibration), Finding("good", ".")]
        for model, (ranking, calibration) in levels.items()
    }
    return [(finding.level, finding.text) for finding in headlines(findings)]


def test_models_are_sorted_by_whether_their_probabilities_can_be_read():
    said = headlines_of(a=("good", OFF), b=("caution", FINE), c=("bad", OFF))
    assert said == [
        ("good", "Read as probabilities: b (off by 0.20)."),
        ("bad", "Do not read as probabilities: a (off by 0.20), c (off by 0.20)."),
        ("good", "Ranks errors better than its baselines: a."),
    ]


def test_where_no_model_beats_its_baselines_that_is_said():
    said = headlines_of(a=("caution", CARE))
    assert said[0] == ("caution", "Read with care: a (off by 0.20).")
    assert said[1] == (
        "caution",
        "No model’s entropy is shown to rank errors better than both baselines.",
    )


def test_of_a_region_that_nobody_has_nothing_is_claimed():
    assert headlines_of(a=("unknown", ("unknown", ".", "", "", "unknown"))) == [("unknown", "Cannot be told: a.")]


def test_a_calibration_finding_has_a_short_form_for_the_headline():
    over = {"ece_top_label": Cell(0.32, 0.28, 0.36), "gap": Cell(0.31, 0.27, 0.35)}
    assert sentences(**over)[1].short == "too high by 0.31 [0.27–0.35]"
    both = {"ece_class_probability": Cell(0.20, 0.15, 0.25), "gap": Cell(0.01, -0.02, 0.04)}
    assert sentences(**both)[1].short == "off by 0.20 [0.15–0.25]"
    assert sentences()[1].short == "off by 0.02 [0.01–0.03]"


def test_a_large_error_without_an_interval_is_not_read_with_care():
    finding = sentences("WT", ece_top_label=Cell(0.62), gap=Cell(0.61))[1]
    said = headlines({"m": [Finding("caution", "."), finding, Finding("caution", ".")]})
    assert (said[0].level, said[0].text) == (
        "caution",
        "Do not read as probabilities: m (too high by 0.61, no interval).",
    )
