"""Cohorts of 2, 20 and 200 patients whose every number is known by hand.

Probabilities lie on the levels 1/8, 1/4, 3/4 and 7/8, which float32 holds exactly, with a planned number of positives
on each: calibration errors, Brier scores and AUROCs are fractions. Entropy has two values, so its ties are planned too.

The two of `PAIR` are written out. In the cohorts of 20 and 200, patient k has a grade g (10 k and k). Of its 1,600
voxels, half are predicted; 2g on either side of 1/2 are uncertain (1/4, 3/4), the others are not (1/8, 7/8). It has d
missed voxels, all at 1/8, and d false ones, at 3/4 while there is room and then at 7/8: Dice is 1 − d/800. As a rule
d = g. In the first quarter, patients 0, 5, 10, … of 200 (0 of 20) exchange their d with their mirror image n − 1 − k:
they are sure and bad, and the mirror images unsure and good. Expected entropy is planted as d/256, a perfect score.
"""

from fractions import Fraction
from functools import cache
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from segtrust.cohort import cohort
from segtrust.tally import Tally
from segtrust.voxels import voxels

SURE_NOT, UNSURE_NOT, UNSURE, SURE = (Fraction(k, 8) for k in (1, 2, 6, 7))

# level: (voxels, positives)
PAIR = {
    "a": {SURE_NOT: (80, 5), UNSURE_NOT: (40, 20), UNSURE: (40, 40), SURE: (40, 30)},
    "b": {SURE_NOT: (50, 0), SURE: (50, 25)},
}
# a cohort of 200 takes half a minute
SLOW = pytest.mark.slow
SIZES = (20, pytest.param(200, marks=SLOW))
EXCHANGED = {20: (0,), 200: tuple(range(0, 50, 5))}
# voxels are 0.02 mm wide in the plane: every voxel of a plane is within 5 mm of every other, and of no other plane
SPACING_MM = (0.02, 0.02, 6.0)


def tally_of(patient, levels, expected_entropy=0.0, n_planes=1, enhancing="found"):
    """Return the tally of a patient whose first plane is brain and holds the levels; beyond it all is certain.

    levels : {probability: (voxels, positives)} of WT and TC, a multiple of 10 voxels
    enhancing : ET is `found` (as WT and TC), `missed` (predicted nowhere), or `absent` (nowhere at all)
    """
    p = np.concatenate([np.full(n, float(level)) for level, (n, _) in levels.items()])
    truth = np.concatenate([np.arange(n) < n_positive for n, n_positive in levels.values()])
    plane = (len(p) // 10, 10)
    shape = (*plane, n_planes)
    labels, probability = np.zeros(shape, np.uint8), np.zeros((3, *shape), np.float32)
    spread, brain = np.zeros((3, *shape), np.float32), np.zeros(shape, bool)
    labels[..., 0] = truth.reshape(plane) * (1 if enhancing == "absent" else 3)
    probability[: 3 if enhancing == "found" else 2, ..., 0] = p.reshape(plane)
    spread[..., 0], brain[..., 0] = expected_entropy, True
    votes = probability >= 0.5
    summary = SimpleNamespace(
        passes=1,
        probability=probability,
        deterministic=None,
        expected_entropy=spread,
        member_entropy=None,
        variance=None,
        votes=votes.astype(int),
        volumes=votes.sum(axis=(1, 2, 3))[np.newaxis],
    )
    return Tally.of(voxels(summary, labels, brain, brain, spacing_mm=SPACING_MM, patient=patient))


def grades(n):
    """Return the grade g of each of n patients and the number d of its missed and of its false voxels."""
    g = [k * (200 // n) for k in range(n)]
    d = list(g)
    for k in EXCHANGED[n]:
        d[k], d[n - 1 - k] = g[n - 1 - k], g[k]
    return g, d


def levels_of(g, d):
    unsure_false = min(d, 2 * g)
    return {
        SURE_NOT: (800 - 2 * g, d),
        UNSURE_NOT: (2 * g, 0),
        UNSURE: (2 * g, 2 * g - unsure_false),
        SURE: (800 - 2 * g, 800 - 2 * g - (d - unsure_false)),
    }


def evaluate(tallies, names):
    sheet = pd.DataFrame({"patient": names, "subject": names, "split": "test", "coding": "brats2021"})
    tables = cohort(tallies, sheet, model="m", n_resamples=100, failure_dice=0.8, seed=0, n_bins=[15])
    return {name: tables[name].to_pandas() for name in ("metrics", "patients", "strata")}


@cache
def pair():
    return evaluate([tally_of(name, levels, n_planes=8) for name, levels in PAIR.items()], list(PAIR))


@cache
def many(n):
    names = [f"p{k:03d}" for k in range(n)]
    enhancing = {3: "missed", 7: "absent"}
    tallies = [
        tally_of(name, levels_of(g, d), expected_entropy=d / 256, enhancing=enhancing.get(k % 10, "found"))
        for k, (name, g, d) in enumerate(zip(names, *grades(n), strict=True))
    ]
    return evaluate(tallies, names)


def row_of(tables, metric, **wanted):
    rows = tables["metrics"]
    wanted = {"metric": metric, "region": "WT", "aggregation": None, **wanted}
    for column, value in wanted.items():
        rows = rows[rows[column].isna() if value is None else rows[column] == value]
    assert len(rows) == 1, rows
    return rows.iloc[0]


def calibration(tables, metric, pooling, mask="brain", n_bins=None):
    return row_of(tables, metric, mask=mask, measure="probability", pooling=pooling, n_bins=n_bins)["value"]


def ece(tables, convention, pooling, mask="brain"):
    return calibration(tables, f"ece_{convention}", pooling, mask, 15)


def discrimination(tables, metric, pooling, mask="brain"):
    return row_of(tables, metric, mask=mask, measure="entropy", pooling=pooling)


def triage(tables, metric, measure="entropy"):
    row = row_of(tables, metric, measure=measure, aggregation="predicted_5mm_mean", pooling="patient_level")
    return row["value"]


def strata_of(tables, region="WT", scheme="quartiles"):
    rows = tables["strata"]
    wanted = {"region": region, "scheme": scheme, "measure": "entropy", "aggregation": "predicted_5mm_mean"}
    for column, value in wanted.items():
        rows = rows[rows[column] == value]
    return rows.set_index("stratum")


def patients_of(tables, region="WT"):
    rows = tables["patients"]
    return rows[rows["region"] == region].sort_values("patient")


def exactly(value):
    """Return what a sum, and a metric that follows from sums, has to equal (definitions, section 4)."""
    if isinstance(value, list):
        return pytest.approx([float(one) for one in value], rel=1e-9, abs=1e-12)
    return pytest.approx(float(value), rel=1e-9, abs=1e-12)


def harmonic(n):
    return sum(Fraction(1, k) for k in range(1, n + 1))


# --- two patients -------------------------------------------------------------------------------------------------


def test_dice_of_two_patients_is_four_fifths_and_two_thirds():
    # a: 70 found, 10 false, 25 missed; b: 25 found, 25 false
    assert list(patients_of(pair())["dice"]) == exactly([Fraction(4, 5), Fraction(2, 3)])


def test_class_probability_ece_of_two_patients_is_the_mean_of_three_twentieths_and_a_quarter():
    # a: gaps of 5, 10, 10 and 5 voxels in 200; b: of 6.25 and 18.75 in 100
    assert ece(pair(), "class_probability", "patient_mean") == exactly(Fraction(1, 5))


def test_top_label_ece_of_two_patients_is_the_mean_of_nothing_and_an_eighth():
    # a: of 120 voxels at 7/8, 105 are right, and of 80 at 3/4, 60; b: of 100 at 7/8, 75
    assert ece(pair(), "top_label", "patient_mean") == exactly(Fraction(1, 16))


def test_pooled_class_probability_ece_of_two_patients_is_eleven_sixtieths():
    # gaps of 11.25 at 1/8, 10 at 1/4, 10 at 3/4 and 23.75 at 7/8 in 300 voxels
    assert ece(pair(), "class_probability", "pooled") == exactly(Fraction(11, 60))


def test_pooled_top_label_ece_of_two_patients_is_a_twenty_fourth():
    assert ece(pair(), "top_label", "pooled") == exactly(Fraction(1, 24))


def test_mce_of_two_patients_is_the_gap_of_the_bin_at_a_quarter_or_at_seven_eighths():
    # pooled: 23.75 of 90 voxels at 7/8 against 10 of 40 at 1/4
    assert calibration(pair(), "mce_class_probability", "pooled", n_bins=15) == exactly(Fraction(95, 360))


def test_ace_of_two_patients_is_the_mean_of_four_gaps():
    gaps = Fraction(45, 4 * 130), Fraction(1, 4), Fraction(1, 4), Fraction(95, 360)
    assert calibration(pair(), "ace_class_probability", "pooled", n_bins=15) == exactly(sum(gaps) / 4)


def test_brier_of_two_patients_is_eleven_sixty_fourths_on_average():
    # 9/64 and 13/64
    assert calibration(pair(), "brier", "patient_mean") == exactly(Fraction(11, 64))


def test_pooled_brier_of_two_patients_is_weighted_by_their_voxels():
    assert calibration(pair(), "brier", "pooled") == exactly(Fraction(31, 192))


def test_gap_of_two_patients_is_positive_where_they_are_over_confident():
    assert calibration(pair(), "gap", "pooled") == exactly(Fraction(25, 600))


def test_auroc_of_two_patients_is_that_of_their_planned_ties():
    # a: (20·105 + ½ (20·60 + 15·105)) / (35·165); b: every voxel has one entropy
    expected = (Fraction(93, 154) + Fraction(1, 2)) / 2
    assert discrimination(pair(), "auroc", "patient_mean")["value"] == exactly(expected)


def test_pooled_auroc_of_two_patients_is_thirteen_twenty_fourths():
    # of 60 errors and 240 right voxels, 20 and 60 are unsure
    assert discrimination(pair(), "auroc", "pooled")["value"] == exactly(Fraction(13, 24))


def test_pooled_aupr_of_two_patients_has_two_steps():
    expected = Fraction(20, 60) * Fraction(20, 80) + Fraction(40, 60) * Fraction(60, 300)
    assert discrimination(pair(), "aupr", "pooled")["value"] == exactly(expected)


def test_error_rate_of_two_patients_is_a_fifth_of_all_voxels():
    assert discrimination(pair(), "error_rate", "pooled")["value"] == exactly(Fraction(1, 5))


def test_voxels_outside_the_brain_dilute_the_calibration_error_of_the_volume():
    # eight planes, seven of them certain and right
    assert ece(pair(), "class_probability", "pooled", "volume") == exactly(Fraction(11, 480))


def test_voxels_outside_the_brain_are_the_least_uncertain_of_the_volume():
    # 2,100 right voxels of entropy 0 join the 180 that are sure
    expected = (20 * 2280 + (20 * 60 + 40 * 180) / 2 + 40 * 2100) / (60 * 2340)
    assert discrimination(pair(), "auroc", "pooled", "volume")["value"] == exactly(expected)


def test_the_predicted_mask_holds_the_two_upper_levels_alone():
    # 10 of 40 voxels at 3/4 and 23.75 of 90 at 7/8 are off
    assert ece(pair(), "class_probability", "pooled", "predicted") == exactly(Fraction(135, 4 * 130))


def test_two_patients_form_two_halves():
    # the worse of the two has no unsure voxel, and is alone in the lower half
    rows = strata_of(pair(), scheme="halves")
    assert list(rows["median_dice"][["H1", "H2"]]) == exactly([Fraction(2, 3), Fraction(4, 5)])


def test_two_patients_have_no_quartiles():
    assert strata_of(pair(), scheme="quartiles").empty


def test_the_halves_of_two_patients_differ_by_two_fifteenths():
    assert triage(pair(), "h2_minus_h1") == exactly(Fraction(2, 15))


def test_the_risk_of_two_patients_falls_with_coverage():
    # 1/3 with one of them, the mean of 1/3 and 1/5 with both
    assert triage(pair(), "aurc") == exactly(Fraction(3, 10))


def test_the_one_failure_of_two_patients_is_ranked_last():
    # a Dice of exactly 0.8 is no failure
    assert triage(pair(), "failure_auroc") == 0


def test_two_patients_have_no_interval_anywhere():
    tables = pair()
    for name in ("metrics", "strata"):
        assert tables[name][["ci_low", "ci_high"]].isna().all(axis=None)
    assert tables["metrics"]["interval"].str.startswith("none").all()


# --- 20 and 200 patients ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", SIZES)
def test_the_dice_of_every_patient_is_the_planted_one(n):
    assert list(patients_of(many(n))["dice"]) == exactly([1 - Fraction(d, 800) for d in grades(n)[1]])


@pytest.mark.parametrize("n", SIZES)
def test_the_score_of_every_patient_is_its_mean_entropy(n):
    # H(1/4) and H(1/8) in bits; 4g of 1,600 voxels are unsure
    unsure, sure = 2 - 0.75 * np.log2(3), 3 - 0.875 * np.log2(7)
    expected = [(4 * g * unsure + (1600 - 4 * g) * sure) / 1600 for g in grades(n)[0]]
    assert list(patients_of(many(n))["score_predicted_5mm_mean_entropy"]) == exactly(expected)


@pytest.mark.parametrize(
    ("n", "value"),
    [
        # gaps of 375, 950, 760 and 1,335 voxels of 32,000 at 1/8, 1/4, 3/4 and 7/8
        (20, Fraction(171, 1600)),
        # gaps of 4,875, 9,950, 8,635 and 13,710 of 320,000
        pytest.param(200, Fraction(3717, 32000), marks=SLOW),
    ],
)
def test_pooled_class_probability_ece_is_known(n, value):
    assert ece(many(n), "class_probability", "pooled") == exactly(value)


@pytest.mark.parametrize(
    ("n", "value"),
    [
        # 190 more voxels right than expected of 7,600 at 3/4, 960 of 24,400 at 7/8
        (20, Fraction(23, 640)),
        # 1,315 of 79,600 and 8,835 of 240,400
        pytest.param(200, Fraction(203, 6400), marks=SLOW),
    ],
)
def test_pooled_top_label_ece_is_known(n, value):
    assert ece(many(n), "top_label", "pooled") == exactly(value)


@pytest.mark.parametrize(
    ("n", "value"),
    [
        # as a rule |100 − 5g/4| + g/2 + g/2 + 100 − g/4 voxels of a patient: 4,120 of 18 patients; then 180 and 295
        (20, Fraction(4595, 32000)),
        # 42,482.5 of 180 patients, 1,714 of the sure and bad ones, 2,432.5 of the unsure and good ones
        pytest.param(200, Fraction(46629, 320000), marks=SLOW),
    ],
)
def test_class_probability_ece_of_patients_is_known_on_average(n, value):
    assert ece(many(n), "class_probability", "patient_mean") == exactly(value)


@pytest.mark.parametrize(
    ("n", "value"),
    [
        # as a rule |200 − 3g/2| voxels of a patient: 1,435 of 18 patients; then 180 and 295
        (20, Fraction(1910, 32000)),
        # 14,407 of 180 patients, 1,417.5 and 2,432.5 of the others
        pytest.param(200, Fraction(18257, 320000), marks=SLOW),
    ],
)
def test_top_label_ece_of_patients_is_known_on_average(n, value):
    assert ece(many(n), "top_label", "patient_mean") == exactly(value)


@pytest.mark.parametrize("pooling", ["pooled", "patient_mean"])
@pytest.mark.parametrize(
    ("n", "sure_false"),
    [(20, 190), pytest.param(200, 1315, marks=SLOW)],
)
def test_brier_is_known_and_the_same_pooled_as_averaged_over_patients_of_one_size(n, sure_false, pooling):
    # 25 + 23g/16 of a patient's 1,600 voxels; a false voxel at 7/8 in place of 3/4 costs 1/4 more
    expected = (25 * n + Fraction(23, 16) * sum(grades(n)[0]) + Fraction(sure_false, 4)) / (1600 * n)
    assert calibration(many(n), "brier", pooling) == exactly(expected)


@pytest.mark.parametrize(
    ("n", "wrong", "right"),
    [
        # unsure and sure voxels
        (20, (1710, 2090), (5890, 22310)),
        pytest.param(200, (18585, 21215), (61015, 219185), marks=SLOW),
    ],
)
def test_pooled_auroc_is_known(n, wrong, right):
    pairs = wrong[0] * right[1] + Fraction(wrong[0] * right[0] + wrong[1] * right[1], 2)
    assert discrimination(many(n), "auroc", "pooled")["value"] == exactly(pairs / (sum(wrong) * sum(right)))


@pytest.mark.parametrize("n", SIZES)
def test_auroc_of_patients_is_known_on_average(n):
    # A patient by the rule has g errors of 4g unsure voxels and g of the others: 3 (400 − g) / (2 (800 − g)). A sure
    # and bad one has 4g unsure voxels, of which 2g wrong, and 1,202 right of the others. An unsure and good one has d
    # errors of either kind; without any it has no AUROC.
    values = []
    for g, d in zip(*grades(n), strict=True):
        if g == d:
            values.append(Fraction(3 * (400 - g), 2 * (800 - g)))
        elif g < d:
            wrong, right = (2 * g, 2 * d - 2 * g), (2 * g, 1600 - 2 * g - 2 * d)
            pairs = wrong[0] * right[1] + Fraction(wrong[0] * right[0] + wrong[1] * right[1], 2)
            values.append(pairs / (sum(wrong) * sum(right)))
        elif d:
            values.append(Fraction(1604 + 2 * d, 2 * (1600 - 2 * d)))
    row = discrimination(many(n), "auroc", "patient_mean")
    assert row["n_cases"] == n - 1
    assert row["value"] == exactly(sum(values) / len(values))


@pytest.mark.parametrize("n", SIZES)
def test_every_quartile_holds_a_quarter_of_the_patients(n):
    assert list(strata_of(many(n))["n_cases"][["Q1", "Q2", "Q3", "Q4"]]) == [n // 4] * 4


@pytest.mark.parametrize(
    ("n", "risks"),
    [
        # of 800: patients 3, 7, 12 and 16 are in the middle
        (20, (30, 70, 120, 160)),
        # ten of fifty are at the other end: ranks 25 and 26 are 31 and 32 in Q1, 167 and 168 in Q4
        pytest.param(200, (31.5, 74.5, 124.5, 167.5), marks=SLOW),
    ],
)
def test_the_median_dice_of_every_quartile_is_known(n, risks):
    expected = [1 - risk / 800 for risk in risks]
    assert list(strata_of(many(n))["median_dice"][["Q1", "Q2", "Q3", "Q4"]]) == exactly(expected)


@pytest.mark.parametrize(("n", "value"), [(20, Fraction(-13, 80)), pytest.param(200, Fraction(-17, 100), marks=SLOW)])
def test_the_difference_of_outer_quartiles_is_known(n, value):
    assert triage(many(n), "q4_minus_q1") == exactly(value)


@pytest.mark.parametrize(
    ("n", "better", "pairs"),
    [
        # the good one of Q4 beats all five of Q1, and the bad one of Q1 loses to the other four
        (20, 5 + 4, 25),
        # ten exchanged of fifty: 100 pairs of two exchanged, and 220 of the 400 of one exchanged on either side
        pytest.param(200, 100 + 2 * 220, 2500, marks=SLOW),
    ],
)
def test_cliffs_delta_of_outer_quartiles_counts_the_exchanged_patients(n, better, pairs):
    assert triage(many(n), "cliffs_delta") == exactly(Fraction(2 * better - pairs, pairs))
    assert triage(many(n), "mann_whitney_u") == exactly(better)


@pytest.mark.parametrize("n", SIZES)
def test_spearman_is_minus_one_but_for_the_exchanged_patients(n):
    # 1 − 6 Σd² / (n (n² − 1)): an exchange takes (n − 1 − 2k)² twice from the sum of squares of reversed ranks
    squares = sum((n - 1 - 2 * k) ** 2 for k in EXCHANGED[n])
    assert triage(many(n), "spearman") == exactly(-1 + Fraction(12 * squares, n * (n**2 - 1)))


@pytest.mark.parametrize(
    ("n", "pairs", "n_failures"),
    [
        # patients 17 and 18 are above 16 of 17 good ones, patient 0 above none
        (20, 32, 3),
        # 31 by the rule are above 153 good ones, and 112 times above an exchanged one; so are the 8 exchanged ones
        pytest.param(200, 31 * 153 + 112 + 112, 39, marks=SLOW),
    ],
)
def test_failure_auroc_is_known(n, pairs, n_failures):
    assert triage(many(n), "failure_auroc") == exactly(Fraction(pairs, n_failures * (n - n_failures)))


@pytest.mark.parametrize("n", SIZES)
def test_aurc_is_that_of_a_rising_risk_and_of_the_exchanged_patients(n):
    # A risk c k at place k gives c (n − 1)/4. The case at place k weighs (H_n − H_k)/n, H the harmonic numbers.
    step = Fraction(1, 4 * n)
    excess = [step * (n - 1 - 2 * k) * (harmonic(n - 1 - k) - harmonic(k)) / n for k in EXCHANGED[n]]
    assert triage(many(n), "aurc") == exactly(step * Fraction(n - 1, 4) + sum(excess))


@pytest.mark.parametrize("n", SIZES)
def test_augrc_is_that_of_a_rising_risk_and_of_the_exchanged_patients(n):
    # the case at place k weighs (n − k)/n²
    squares = sum((n - 1 - 2 * k) ** 2 for k in EXCHANGED[n])
    expected = Fraction(1, 4 * n) * (Fraction(n**2 - 1, 6 * n) + Fraction(squares, n**2))
    assert triage(many(n), "augrc") == exactly(expected)


@pytest.mark.parametrize("n", SIZES)
def test_a_planted_perfect_score_has_the_triage_of_an_ideal_one(n):
    names = ("spearman", "cliffs_delta", "failure_auroc", "e_aurc", "aurc")
    values = [triage(many(n), name, "expected_entropy") for name in names]
    assert values == exactly([-1, -1, 1, 0, Fraction(n - 1, 16 * n)])


@pytest.mark.parametrize(
    ("n", "ranks"),
    [
        # the 6th of 20 and the 86th of 200 from either end: P(Binomial(200, ½) < 86) = 0.020, < 87: 0.028
        (20, 6),
        pytest.param(200, 86, marks=SLOW),
    ],
)
def test_the_interval_of_the_median_dice_ends_at_known_patients(n, ranks):
    row = row_of(many(n), "median_dice", mask=None, measure=None, pooling="patient_level")
    step = Fraction(200, 800 * n)
    found = [row["ci_low"], row["value"], row["ci_high"]]
    assert found == exactly([1 - step * (n - ranks), 1 - step * Fraction(n - 1, 2), 1 - step * (ranks - 1)])


@pytest.mark.parametrize("n", SIZES)
def test_missing_regions_are_split_into_missed_and_absent(n):
    rows = strata_of(many(n), region="ET").loc[["missing_region", "missing_region_missed", "missing_region_absent"]]
    assert list(rows["n_cases"]) == [n // 5, n // 10, n // 10]
    assert list(rows["median_dice"]) == [0.5, 0, 1]


@pytest.mark.parametrize("n", SIZES)
def test_missing_regions_have_no_score_and_leave_the_quartiles_to_the_others(n):
    rows = strata_of(many(n), region="ET")
    assert list(rows["n_cases"][["Q1", "Q2", "Q3", "Q4"]]) == [n // 5] * 4
    assert patients_of(many(n), "ET")["score_predicted_5mm_mean_entropy"].isna().sum() == n // 5
