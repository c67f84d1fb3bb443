import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn.metrics import roc_auc_score

from segtrust import intervals, strata

NOBODY = np.array([])


def rows_of(scores, dice, absent=None, subjects=None, calibration=NOBODY):
    scores, dice = np.asarray(scores, float), np.asarray(dice, float)
    absent = np.zeros(len(scores), bool) if absent is None else np.asarray(absent)
    subjects = np.arange(len(scores)) if subjects is None else np.asarray(subjects)
    cut = strata.Cutoffs.of(np.asarray(calibration, float), scores, anew=True)
    rows = strata.stratify(scores, dice, absent, subjects, cut)
    return {(row["scheme"], row["stratum"]): row for row in rows}


def test_quartiles_hold_a_quarter_each_from_the_lowest_score_to_the_highest():
    rows = rows_of(np.arange(40), np.linspace(1, 0, 40))
    assert [rows["quartiles", name]["n_cases"] for name in ("Q1", "Q2", "Q3", "Q4")] == [10, 10, 10, 10]
    assert rows["quartiles", "Q1"]["score_high"] == 9
    assert rows["quartiles", "Q1"]["median_dice"] > rows["quartiles", "Q4"]["median_dice"]


def test_planted_medians_are_found():
    planted = (0.9, 0.8, 0.6, 0.3)
    rows = rows_of(np.arange(36), np.repeat(planted, 9))
    assert tuple(rows["quartiles", f"Q{k}"]["median_dice"] for k in (1, 2, 3, 4)) == planted


def test_a_score_on_a_cut_off_goes_to_the_lower_stratum():
    # With 9 scores 0 … 8 the quartiles are scores themselves: 2, 4 and 6.
    rows = rows_of(np.arange(9), np.ones(9))
    assert [rows["quartiles", f"Q{k}"]["score_high"] for k in (1, 2, 3, 4)] == [2, 4, 6, 8]


def test_an_empty_stratum_keeps_a_null_row():
    rows = rows_of([0] * 9 + [5], np.ones(10))
    empty = rows["quartiles", "Q2"]
    assert empty["n_cases"] == 0
    assert np.isnan([empty["median_dice"], empty["ci_low"], empty["score_low"]]).all()


def test_seven_cases_give_halves_only():
    assert {scheme for scheme, _ in rows_of(np.arange(7), np.ones(7))} == {"halves"}


def test_eight_cases_give_quartiles_and_halves():
    assert {scheme for scheme, _ in rows_of(np.arange(8), np.ones(8))} == {"quartiles", "halves"}


def test_cut_offs_come_from_the_calibration_split_where_one_exists():
    rows = rows_of(np.arange(10), np.ones(10), calibration=np.arange(100, 120))
    assert rows["quartiles", "Q1"]["n_cases"] == 10
    assert rows["quartiles", "Q1"]["cutoff_source"] == "calibration"


def test_cut_offs_of_the_evaluated_cases_are_flagged():
    assert rows_of(np.arange(10), np.ones(10))["halves", "H1"]["cutoff_source"] == "in_sample"


def test_a_calibration_split_without_a_single_score_sets_no_cut_off():
    rows = rows_of(np.arange(10), np.ones(10), calibration=[np.nan] * 9)
    assert rows["quartiles", "Q1"]["cutoff_source"] == "in_sample"


def test_empty_predictions_form_their_own_stratum_split_into_missed_and_absent():
    scores = [*range(10), np.nan, np.nan, np.nan]
    absent = [False] * 11 + [True, True]
    rows = rows_of(scores, [0.5] * 10 + [0, 1, 1], absent)
    assert rows["quartiles", "missing_region"]["n_cases"] == 3
    assert rows["quartiles", "missing_region_missed"]["n_cases"] == 1
    assert rows["quartiles", "missing_region_absent"]["median_dice"] == 1


def test_empty_predictions_move_no_cut_off():
    with_missing = rows_of([*range(12), np.nan, np.nan], np.ones(14))
    without = rows_of(range(12), np.ones(12))
    assert with_missing["quartiles", "Q2"] == without["quartiles", "Q2"]


def test_a_cohort_of_empty_predictions_has_only_empty_strata_and_the_missing_one():
    rows = rows_of([np.nan] * 9, np.zeros(9))
    assert rows["halves", "H1"]["n_cases"] == rows["halves", "H2"]["n_cases"] == 0
    assert rows["halves", "missing_region"]["n_cases"] == 9


def test_the_median_of_a_stratum_has_an_order_statistic_interval():
    dice = np.random.default_rng(0).uniform(size=40)
    row = rows_of(np.arange(40), dice)["quartiles", "Q1"]
    assert (row["ci_low"], row["ci_high"]) == (np.sort(dice[:10])[1], np.sort(dice[:10])[8])


def test_a_stratum_of_five_has_no_interval():
    assert np.isnan(rows_of(np.arange(20), np.ones(20))["quartiles", "Q1"]["ci_low"])


def test_weighted_quantiles_are_those_of_the_repeated_values():
    generator = np.random.default_rng(1)
    values = generator.integers(0, 9, size=15).astype(float)
    weights = generator.multinomial(15, np.full(15, 1 / 15), size=20)
    for level in (0.25, 0.5, 0.75):
        expected = [np.quantile(np.repeat(values, row), level) for row in weights]
        assert strata.weighted_quantile(values, level, weights) == pytest.approx(expected, abs=1e-12)


def test_spearman_agrees_with_scipy_on_ties_and_on_resamples():
    generator = np.random.default_rng(2)
    first, second = generator.integers(0, 6, size=(2, 30)).astype(float)
    weights = generator.multinomial(30, np.full(30, 1 / 30), size=5)
    expected = [stats.spearmanr(np.repeat(first, row), np.repeat(second, row)).statistic for row in weights]
    assert strata.spearman(first, second, weights) == pytest.approx(expected, abs=1e-12)


def test_partial_spearman_is_the_correlation_of_rank_residuals():
    generator = np.random.default_rng(3)
    given_ = generator.normal(size=40)
    first, second = given_ + generator.normal(size=40), given_ + generator.normal(size=40)
    ranks = [stats.rankdata(values) for values in (first, second, given_)]
    residuals = [rank - np.polyval(np.polyfit(ranks[2], rank, 1), ranks[2]) for rank in ranks[:2]]
    expected = np.corrcoef(*residuals)[0, 1]
    assert strata.partial_spearman(first, second, given_) == pytest.approx(expected, abs=1e-9)


def test_failure_auroc_agrees_with_scikit_learn_on_ties():
    generator = np.random.default_rng(4)
    scores, failed = generator.integers(0, 8, size=50).astype(float), generator.random(50) < 0.3
    assert strata.failure_auroc(scores, failed) == pytest.approx(roc_auc_score(failed, scores), abs=1e-12)


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 10)), min_size=2, max_size=6))
@settings(max_examples=40, deadline=None)
def test_aurc_and_augrc_are_expectations_over_all_orderings_of_ties(cases):
    scores = np.array([score for score, _ in cases], float)
    risk = np.array([value / 10 for _, value in cases])
    if scores.min() == scores.max():
        scores[0] -= 1
    areas, generalised = [], []
    for ordering in itertools.permutations(range(len(scores))):
        ordering = np.array(ordering)
        if (np.diff(scores[ordering]) >= 0).all():
            total = np.cumsum(risk[ordering])
            areas.append((total / np.arange(1, len(risk) + 1)).mean())
            generalised.append(total.sum() / len(risk) ** 2)
    assert strata.aurc(scores, risk) == pytest.approx(np.mean(areas), abs=1e-12)
    assert strata.augrc(scores, risk) == pytest.approx(np.mean(generalised), abs=1e-12)


def test_a_resampled_aurc_is_that_of_the_repeated_cases():
    generator = np.random.default_rng(5)
    scores, risk = generator.integers(0, 6, size=12).astype(float), generator.random(12)
    weights = generator.multinomial(12, np.full(12, 1 / 12), size=6)
    for function in (strata.aurc, strata.e_aurc, strata.augrc):
        expected = [function(np.repeat(scores, row), np.repeat(risk, row)) for row in weights]
        assert function(scores, risk, weights) == pytest.approx(expected, abs=1e-12)


def test_the_ideal_score_has_no_excess_risk():
    risk = np.random.default_rng(6).random(20)
    assert strata.e_aurc(risk, risk) == pytest.approx(0, abs=1e-15)


def test_a_score_without_variance_gives_null():
    scores, risk = np.full(10, 0.3), np.linspace(0, 1, 10)
    assert np.isnan(strata.aurc(scores, risk))
    assert np.isnan(strata.augrc(scores, risk))
    assert np.isnan(strata.spearman(scores, risk))
    assert np.isnan(strata.failure_auroc(scores, risk > 0.5))


def test_the_risk_coverage_curve_has_the_aurc_as_its_mean():
    scores = np.array([1, 1, 2, 3, 3, 3.0])
    risk = np.array([0.1, 0.5, 0.2, 0.9, 0.4, 0.0])
    _, selective = strata.risk_coverage(scores, risk)
    assert selective.mean() == pytest.approx(strata.aurc(scores, risk), abs=1e-12)


def test_the_difference_between_the_outer_quartiles_is_that_of_their_medians():
    dice = np.repeat([0.9, 0.8, 0.6, 0.3], 9)
    outer = strata.outer_strata(np.arange(36.0), "quartiles")
    assert strata.median_difference(dice, *outer) == pytest.approx(-0.6)


def test_in_sample_cut_offs_are_found_anew_in_every_resample():
    generator = np.random.default_rng(7)
    scores, dice = generator.random(24), generator.random(24)
    weights = generator.multinomial(24, np.full(24, 1 / 24), size=8)
    expected = []
    for row in weights:
        repeated, its_dice = np.repeat(scores, row), np.repeat(dice, row)
        expected.append(strata.median_difference(its_dice, *strata.outer_strata(repeated, "quartiles")))
    outer = strata.outer_strata(scores, "quartiles", weights=weights)
    assert strata.median_difference(dice, *outer) == pytest.approx(expected)


def test_cut_offs_of_the_calibration_split_are_held_fixed_in_every_resample():
    scores = np.arange(12.0)
    weights = np.zeros((1, 12))
    weights[0, 3] = 12
    highest, lowest = strata.outer_strata(scores, "halves", cuts=np.array([2.5]), weights=weights)
    assert highest.sum() == 12
    assert lowest.sum() == 0


def test_cliffs_delta_agrees_with_scipys_u():
    generator = np.random.default_rng(8)
    dice = np.concatenate([generator.integers(0, 9, 12), generator.integers(3, 12, 14)]) / 10
    highest = np.arange(26) < 12
    u = stats.mannwhitneyu(dice[highest], dice[~highest]).statistic
    delta = strata.cliffs_delta(dice, highest.astype(float), (~highest).astype(float))
    assert delta == pytest.approx(2 * u / (12 * 14) - 1)


def test_separated_strata_have_the_permutation_p_of_their_count():
    # 5 against 5 without overlap: 2 of 252 divisions are as extreme in the median up to ties of medians.
    values = np.concatenate([np.arange(5), np.arange(10, 15)]) / 10
    lowest = np.arange(10) < 5
    found = strata.permutation_p(values, ~lowest, lowest, np.arange(10), seed=0)
    medians = []
    for chosen in itertools.combinations(range(10), 5):
        rest = [k for k in range(10) if k not in chosen]
        medians.append(abs(np.median(values[list(chosen)]) - np.median(values[rest])))
    exact = np.mean(np.array(medians) >= 1.0 - 1e-12)
    # 9,999 draws: four standard errors of a proportion.
    assert found == pytest.approx(exact, abs=4 * np.sqrt(exact * (1 - exact) / 9_999) + 1e-4)


def test_sessions_of_one_person_change_places_together():
    # three persons of two sessions each: the three divisions of the persons are all that there is to draw
    values, subjects = np.array([0.1, 0.2, 0.3, 0.4, 0.8, 0.9]), np.repeat([0, 1, 2], 2)
    highest = subjects == 2
    found = strata.permutation_p(values, highest, ~highest, subjects, seed=0)
    exact = 1 / 3  # only the highest pair against the others is as far apart
    assert found == pytest.approx(exact, abs=4 * np.sqrt(exact * (1 - exact) / 9_999) + 1e-4)


def triage_of(scores, dice, calibration=NOBODY, n_resamples=200):
    scores, dice = np.asarray(scores, float), np.asarray(dice, float)
    draws = intervals.draw(np.arange(len(scores)), n_resamples, 0)
    volumes = {"predicted_volume": np.arange(len(scores)) % 5, "reference_volume": np.arange(len(scores)) % 7}
    cases = strata.Cases(dice, volumes, draws, np.arange(len(scores)), 0.8)
    cut = strata.Cutoffs.of(np.asarray(calibration, float), scores, anew=True)
    rows = strata.triage(scores, cases, cut, seed=0)
    return {row["metric"]: row for row in rows}


def test_a_score_that_follows_the_risk_has_perfect_triage():
    dice = np.linspace(0.5, 1, 40)
    rows = triage_of(1 - dice, dice)
    assert rows["spearman"]["value"] == pytest.approx(-1)
    assert rows["failure_auroc"]["value"] == 1
    assert rows["e_aurc"]["value"] == pytest.approx(0, abs=1e-15)
    assert rows["cliffs_delta"]["value"] == -1
    assert rows["q4_minus_q1"]["p_value"] < 0.01


def test_empty_predictions_enter_triage_only_as_missing_last():
    dice = np.linspace(0.5, 1, 40)
    found = triage_of(1 - dice, dice)
    with_missing = triage_of([*(1 - dice), np.nan, np.nan], [*dice, 0, 0])
    assert with_missing["aurc"]["value"] == found["aurc"]["value"]
    assert with_missing["aurc"]["n_cases"] == 40
    assert with_missing["aurc_missing_last"]["n_cases"] == 42
    assert with_missing["aurc_missing_last"]["value"] > found["aurc"]["value"]


def test_a_constant_score_has_null_triage_throughout():
    rows = triage_of(np.ones(20), np.linspace(0.5, 1, 20))
    assert all(np.isnan(row["value"]) for row in rows.values())


def test_a_single_patient_has_null_triage_throughout():
    rows = triage_of([0.4], [0.9])
    assert all(np.isnan(row["value"]) for row in rows.values())
    assert all(str(row["interval"].label).startswith("none") for row in rows.values())


def test_triage_has_the_resamples_of_each_metric_alone():
    generator = np.random.default_rng(9)
    scores, dice = generator.integers(0, 12, 40) / 12, generator.random(40)
    rows, draws = triage_of(scores, dice), intervals.draw(np.arange(40), 200, 0)
    volume = np.arange(40) % 5
    alone = {
        "spearman": strata.spearman(scores, dice, draws.weights),
        "partial_spearman_predicted_volume": strata.partial_spearman(scores, dice, volume, draws.weights),
        "aurc": strata.aurc(scores, 1 - dice, draws.weights),
        "e_aurc": strata.e_aurc(scores, 1 - dice, draws.weights),
        "augrc": strata.augrc(scores, 1 - dice, draws.weights),
    }
    for name, resampled in alone.items():
        level = 0.025 if "spearman" in name else stats.norm.cdf(-np.sqrt(40 / 39) * stats.t.ppf(0.975, 39))
        expected = np.quantile(resampled, [level, 1 - level])
        # single precision in resamples
        assert [rows[name]["interval"].low, rows[name]["interval"].high] == pytest.approx(expected, abs=1e-5), name


def test_cut_offs_set_in_sample_are_flagged_where_they_count():
    rows = triage_of(np.arange(20.0), np.linspace(1, 0, 20))
    assert rows["q4_minus_q1"]["interval"].label.endswith("; in_sample cut-offs")
    assert "in_sample" not in rows["spearman"]["interval"].label
