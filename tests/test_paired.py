import itertools

import numpy as np
import pytest

from segtrust import paired


def test_differences_without_zeros_and_ties_have_scipys_exact_p():
    differences = np.array([6, 8, 14, 16, 23, 24, 28, 30, 41, -48, 49, 56, 60, -67, 75.0])
    # Wilcoxon 1945, table II: T = 24 of 15, in scipy's documentation
    assert paired.signed_rank_p(differences) == pytest.approx(0.041259765625)


def test_zeros_keep_their_ranks_and_have_no_sign():
    differences = np.array([0, 0, 1, 2, 3, -4, 5, 6.0])
    ranks = np.array([3, 4, 5, 6, 7, 8])  # the two zeros hold the ranks 1 and 2
    found = ranks[[0, 1, 2, 4, 5]].sum()
    drawn = np.array(list(itertools.product((0, 1), repeat=6))) @ ranks
    expected = 2 * min((drawn >= found).mean(), (drawn <= found).mean())
    assert paired.signed_rank_p(differences) == pytest.approx(expected)


def test_nothing_but_zeros_has_p_1():
    assert paired.signed_rank_p(np.zeros(20)) == 1


def test_five_subjects_have_no_p_and_six_have_one():
    assert np.isnan(paired.signed_rank_p(np.arange(1.0, 6)))
    assert paired.signed_rank_p(np.arange(1.0, 7)) == pytest.approx(2 / 64)


def test_a_change_of_sign_keeps_the_p():
    differences = np.random.default_rng(0).normal(0.3, 1, 70).round(1)
    assert paired.signed_rank_p(-differences) == pytest.approx(paired.signed_rank_p(differences), rel=1e-12)


def test_sessions_of_one_subject_enter_as_their_mean():
    values, subjects = np.array([1, 3, 10, np.nan, np.nan, 5.0]), np.array(list("baabcc"))
    assert paired.subject_means(values, subjects) == pytest.approx([6.5, 1, 5])


def test_a_subject_without_a_value_is_left_out():
    assert paired.subject_means(np.array([np.nan, 2.0]), np.array([0, 1])) == pytest.approx([2])


def test_the_estimate_is_the_median_of_the_walsh_averages():
    # averages of 1, 2 and 9: 1, 1.5, 2, 5, 5.5, 9
    assert paired.hodges_lehmann(np.array([9.0, 1, 2]))[0] == pytest.approx(3.5)


def test_the_interval_of_six_runs_over_all_walsh_averages():
    # P(T⁺ = 0) = 1/64 is below 2.5 %, P(T⁺ ≤ 1) = 2/64 is above
    differences = np.array([3.0, -1, 2, 8, 5, 4])
    estimate, interval = paired.hodges_lehmann(differences)
    assert (interval.low, interval.high) == (-1, 8)
    assert -1 < estimate < 8
    assert interval.label == "signed_rank; fewer than 10 subjects"


# critical values of T for a two-sided level of 5 %, as statistical tables print them
@pytest.mark.parametrize(("n", "critical"), [(6, 0), (7, 2), (10, 8), (15, 25), (20, 52), (25, 89), (50, 434)])
def test_the_interval_leaves_out_as_many_averages_as_the_critical_value(n, critical):
    assert paired.signed_rank_quantile(n) == critical + 1


def test_the_normal_approximation_continues_the_exact_ranks():
    exact = paired.signed_rank_quantile(paired.MOST_EXACT)
    n = paired.MOST_EXACT
    assert abs(n * (n + 1) / 4 - 1.96 * np.sqrt(n * (n + 1) * (2 * n + 1) / 24) - exact) < 2
    assert exact < paired.signed_rank_quantile(n + 1) < exact + n


def test_the_interval_holds_zero_exactly_where_the_test_accepts_it():
    generator = np.random.default_rng(1)
    accepted = set()
    for shift in np.linspace(0, 1.2, 40):
        differences = generator.normal(shift, 1, 15)
        _, interval = paired.hodges_lehmann(differences)
        holds = interval.low <= 0 <= interval.high
        assert holds == (paired.signed_rank_p(differences) > 0.05)
        accepted.add(holds)
    assert accepted == {True, False}


def test_equal_differences_have_an_interval_of_no_length():
    estimate, interval = paired.hodges_lehmann(np.zeros(12))
    assert (estimate, interval.low, interval.high) == (0, 0, 0)


def test_few_or_no_differences_have_no_interval():
    estimate, interval = paired.hodges_lehmann(np.arange(5.0))
    assert estimate == 2
    assert np.isnan(interval.low)
    assert interval.label == "none: fewer than 6 subjects"
    assert np.isnan(paired.hodges_lehmann(np.array([]))[0])


def test_holm_multiplies_the_smallest_by_their_number_and_never_descends():
    # sorted 0.01, 0.03, 0.04 times 3, 2, 1, made monotone
    assert paired.holm([0.03, 0.01, 0.04]) == pytest.approx([0.06, 0.03, 0.06])


def test_holm_stops_at_1():
    assert paired.holm([0.6, 0.9]) == pytest.approx([1, 1])


def test_a_missing_p_does_not_count_in_the_family():
    found = paired.holm([0.03, np.nan, 0.01, 0.04])
    assert np.isnan(found[1])
    assert found[[0, 2, 3]] == pytest.approx([0.06, 0.03, 0.06])
    assert np.isnan(paired.holm([np.nan])).all()
    assert len(paired.holm([])) == 0


def test_sessions_of_one_subject_change_places_together():
    drawn = paired.exchanges(np.array(["a", "b", "a", "c"]), 0)
    assert drawn.shape == (10_000, 4)
    assert not drawn[0].any()
    assert (drawn[:, 0] == drawn[:, 2]).all()
    assert (drawn[:, 0] != drawn[:, 1]).any()
    # four standard errors of a proportion of one half
    assert drawn[1:].mean(axis=0) == pytest.approx(np.full(4, 0.5), abs=0.02)


def test_exchanges_follow_the_subjects_and_not_their_order():
    subjects, order = np.array(["a", "b", "c", "d"]), np.array([2, 0, 3, 1])
    assert (paired.exchanges(subjects[order], 5) == paired.exchanges(subjects, 5)[:, order]).all()


def test_a_difference_that_no_exchange_reaches_has_the_least_p():
    assert paired.exchange_p(np.array([5.0, *[1.0] * 9_999]), 1e-12) == 1e-4


def test_differences_within_rounding_are_as_extreme():
    assert paired.exchange_p(np.array([1.0, 1 - 1e-9, -1 + 1e-9, 0.5]), 1e-6) == pytest.approx(3 / 4)


def test_an_undefined_exchange_counts_against_the_difference():
    assert paired.exchange_p(np.array([1.0, np.nan, 0.0, 0.0]), 1e-6) == pytest.approx(2 / 4)
    assert np.isnan(paired.exchange_p(np.array([np.nan, 0.0, 1.0]), 1e-6))


def test_p_of_exchangeable_models_is_uniform():
    generator, n = np.random.default_rng(2), 12
    exchanged = paired.exchanges(np.arange(n), 3)[:1_000]
    signs = np.where(exchanged, -1.0, 1.0)
    found = []
    for _ in range(400):
        # a ratio of sums, as pooled metrics are
        size, errors = generator.integers(1, 50, n), generator.gamma(2, size=(2, n))
        first = ((1 + signs) / 2) @ (errors[0] * size) + ((1 - signs) / 2) @ (errors[1] * size)
        total = (errors * size).sum()
        found.append(paired.exchange_p((2 * first - total) / size.sum(), 1e-12))
    # four standard errors of a distribution function from 400 draws
    for level in (0.05, 0.25, 0.5, 0.75):
        assert np.mean(np.array(found) <= level) == pytest.approx(level, abs=4 * np.sqrt(level * (1 - level) / 400))
