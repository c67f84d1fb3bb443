import numpy as np
import pytest
from scipy import stats

from segtrust import intervals
from segtrust.intervals import (
    draw,
    newcombe,
    newcombe_variance,
    order_statistic_rank,
    percentile,
    studentised,
    wilson,
)


def test_wilson_agrees_with_scipy():
    for successes, n in ((0, 10), (3, 17), (17, 17), (60, 126)):
        expected = stats.binomtest(successes, n).proportion_ci(method="wilson")
        interval = wilson(successes, n, n)
        assert interval.low == pytest.approx(expected.low, abs=1e-12)
        assert interval.high == pytest.approx(expected.high, abs=1e-12)


def test_newcombe_bounds_solve_the_published_equation():
    # Newcombe 2006 states V as θ(1−θ)/(mn) · (2N − 1 − (3N − 3)/((2 − θ)(1 + θ))), N = (m + n)/2.
    m, n, auroc = 12, 28, 0.83
    interval = newcombe(auroc, m, n, m + n)
    half = (m + n) / 2
    for theta in (interval.low, interval.high):
        variance = theta * (1 - theta) / (m * n) * (2 * half - 1 - (3 * half - 3) / ((2 - theta) * (1 + theta)))
        assert abs(theta - auroc) == pytest.approx(stats.norm.ppf(0.975) * np.sqrt(variance), rel=1e-6)
    assert interval.low < auroc < interval.high


def test_newcombe_of_a_perfect_score_ends_at_one_and_has_a_width():
    interval = newcombe(1.0, 8, 20, 28)
    assert interval.high == 1
    assert 0.5 < interval.low < 0.99


def test_newcombe_variance_at_one_half_is_that_of_the_null_with_equal_groups():
    # At θ = ½ Hanley and McNeil's exponential model gives (m + n + 1) / (12 m n), the Mann–Whitney null variance.
    assert newcombe_variance(0.5, 15, 25) == pytest.approx(41 / (12 * 15 * 25), rel=1e-12)


def test_fewer_than_five_failures_give_no_interval_of_a_failure_auroc():
    interval = newcombe(0.9, 4, 40, 44)
    assert np.isnan(interval.low)
    assert interval.label == "none: 4 failures and 40 successes, at least 5 of each"


def test_order_statistic_ranks_are_those_of_the_sign_test():
    # Tabulated ranks of the 95 % interval of a median (Conover, table A3).
    assert [order_statistic_rank(n) for n in (5, 6, 8, 9, 10, 20, 40, 100)] == [0, 1, 1, 2, 2, 6, 14, 40]


def test_the_median_interval_agrees_with_scipys_quantile_test():
    values = np.random.default_rng(1).normal(size=37)
    expected = stats.quantile_test(values, p=0.5).confidence_interval(0.95)
    interval = intervals.median_interval(values, 37)
    assert (interval.low, interval.high) == (expected.low, expected.high)


def test_sessions_of_few_subjects_widen_the_median_interval():
    values = np.random.default_rng(2).normal(size=40)
    alone, shared = intervals.median_interval(values, 40), intervals.median_interval(values, 10)
    assert shared.high - shared.low > alone.high - alone.low


def test_five_subjects_give_no_interval():
    draws = draw(np.arange(5), 200, 0)
    interval = studentised(np.arange(5.0)[:, np.newaxis], draws)
    assert np.isnan(interval.low[0])
    assert interval.label[0] == "none: fewer than 6 subjects"


def test_seven_subjects_are_flagged():
    draws = draw(np.arange(7), 200, 0)
    interval = studentised(np.arange(7.0)[:, np.newaxis], draws)
    assert interval.label[0] == "studentised; fewer than 10 subjects"


def test_more_than_five_percent_undefined_resamples_give_no_interval_and_their_count():
    resampled = np.linspace(0, 1, 200)
    resampled[:11] = np.nan
    interval = percentile(0.5, resampled, 20)
    assert np.isnan(interval.low)
    assert interval.label == "none: 11 of 200 resamples undefined"


def test_few_undefined_resamples_are_counted_beside_the_interval():
    resampled = np.linspace(0, 1, 200)
    resampled[:10] = np.nan
    interval = percentile(0.5, resampled, 20)
    assert interval.low == pytest.approx(np.quantile(resampled[10:], 0.025))
    assert str(interval.label) == "percentile; 10 of 200 resamples undefined"


def test_an_envelope_is_clipped_at_zero_and_reports_the_bias():
    interval = intervals.envelope(0.01, np.linspace(0.012, 0.03, 500), 40)
    assert interval.low == 0
    assert interval.bias == pytest.approx(0.011)


def test_an_envelope_is_the_wider_of_basic_and_percentile_on_each_side():
    resampled = np.linspace(0.09, 0.17, 1001)
    level = stats.norm.cdf(-np.sqrt(20 / 19) * stats.t.ppf(0.975, 19))
    lower, upper = np.quantile(resampled, [level, 1 - level])
    interval = intervals.envelope(0.12, resampled, 20)
    assert interval.low == pytest.approx(min(lower, 0.24 - upper))
    assert interval.high == pytest.approx(max(upper, 0.24 - lower))


def test_an_expanded_percentile_interval_covers_the_mean_of_twenty_normal_patients():
    generator = np.random.default_rng(11)
    samples = generator.normal(size=(20, 4_000))
    draws = draw(np.arange(20), 1_000, 0)
    resampled, n = draws.weights @ samples / 20, np.full(4_000, 20)
    covered = [
        ((interval.low <= 0) & (interval.high >= 0)).mean()
        for method in (percentile, intervals.expanded_percentile)
        for interval in [method(samples.mean(axis=0), resampled, n)]
    ]
    # four standard errors of 4,000 repetitions; the plain one covers 93 % at most
    assert covered[0] < 0.94
    assert covered[1] == pytest.approx(0.95, abs=4 * np.sqrt(0.95 * 0.05 / 4_000))


def test_draws_follow_the_subject_and_not_its_place():
    subjects = np.array(["a", "c", "b", "d"])
    first, second = draw(subjects, 50, 3), draw(subjects[::-1], 50, 3)
    assert (first.weights == second.weights[:, ::-1]).all()


def test_sessions_of_one_person_share_their_draws():
    draws = draw(["a", "b", "b", "c"], 100, 0)
    assert (draws.weights[:, 1] == draws.weights[:, 2]).all()
    assert (draws.subject_weights.sum(axis=1) == 3).all()


def test_doubled_sessions_do_not_narrow_a_studentised_interval():
    values = np.random.default_rng(4).gamma(2, size=20)
    single = studentised(values[:, np.newaxis], draw(np.arange(20), 500, 0))
    double = studentised(np.tile(values, 2)[:, np.newaxis], draw(np.tile(np.arange(20), 2), 500, 0))
    assert double.low == pytest.approx(single.low, rel=1e-9)
    assert double.high == pytest.approx(single.high, rel=1e-9)


def test_a_studentised_interval_equals_the_one_computed_resample_by_resample():
    generator = np.random.default_rng(5)
    values, draws = generator.normal(size=15), draw(np.arange(15), 300, 1)
    ratios = []
    for weights in draws.weights.astype(int):
        sample = np.repeat(values, weights)
        error = sample.std(ddof=1) / np.sqrt(15)
        ratios.append((sample.mean() - values.mean()) / error)
    error = values.std(ddof=1) / np.sqrt(15)
    lower, upper = np.quantile(ratios, [0.025, 0.975])
    interval = studentised(values[:, np.newaxis], draws)
    assert interval.low[0] == pytest.approx(values.mean() - upper * error, rel=1e-9)
    assert interval.high[0] == pytest.approx(values.mean() - lower * error, rel=1e-9)


def test_cases_without_a_value_are_left_out_of_a_mean():
    values = np.random.default_rng(6).normal(size=20)
    holes = np.concatenate([values, np.full(5, np.nan)])
    interval = studentised(np.stack([holes, holes], axis=1), draw(np.arange(25), 400, 0))
    assert interval.low[0] < values.mean() < interval.high[0]


def test_the_studentised_interval_covers_a_skewed_mean_better_than_the_percentile_interval():
    generator = np.random.default_rng(7)
    samples = generator.lognormal(sigma=1.0, size=(40, 300))
    draws = draw(np.arange(40), 400, 0)
    truth = np.exp(0.5)
    covered = studentised(samples, draws)
    covered = ((covered.low <= truth) & (truth <= covered.high)).mean()
    plain = percentile(samples.mean(axis=0), draws.weights @ samples / 40, np.full(300, 40))
    plain = ((plain.low <= truth) & (truth <= plain.high)).mean()
    assert covered > plain
    # 300 repetitions have a standard error of 1.5 points; the percentile interval covers about 90 %.
    assert covered > 0.90


def test_the_envelope_covers_the_calibration_error_of_a_calibrated_model():
    # Patients are over- or under-confident as a whole, right on average: the true calibration error is 0. (With
    # 15 independent bins instead, the envelope too starts above 0 in most cohorts, only far closer to it.)
    generator = np.random.default_rng(8)
    draws, covered_envelope, covered_percentile = draw(np.arange(40), 300, 0), 0, 0
    for _ in range(200):
        gaps = generator.normal(0, 0.05, size=(40, 1)) + generator.normal(0, 0.01, size=(40, 15))
        value = np.abs(gaps.mean(axis=0)).mean()
        resampled = np.abs(draws.weights @ gaps / 40).mean(axis=1)
        covered_envelope += intervals.envelope(value, resampled, 40).low == 0
        covered_percentile += percentile(value, resampled, 40).low <= 0
    assert covered_percentile == 0
    assert covered_envelope > 180


def test_newcombe_covers_a_failure_auroc_where_failures_are_few():
    generator, covered = np.random.default_rng(9), 0
    truth = stats.norm.cdf(1.5 / np.sqrt(2))
    for _ in range(300):
        failed, fine = generator.normal(1.5, size=6), generator.normal(0, size=34)
        auroc = (failed[:, np.newaxis] > fine).mean()
        interval = newcombe(auroc, 6, 34, 40)
        covered += interval.low <= truth <= interval.high
    assert covered / 300 > 0.91
