"""Paired statistics: what two models differ by on the same patients, and whether that could be chance.

Patients are compared with themselves: the differences of one patient's numbers between two models, or the two models'
results exchanged within patients. Subjects are independent of each other, the sessions of one person are not: they
enter as their mean, and are exchanged together. Which quantity gets which test: definitions, section 9.
"""

import numpy as np
from scipy import stats

from segtrust import intervals
from segtrust.strata import N_PERMUTATIONS

# up to here the distribution of signed ranks is used as it is; SciPy's test changes to the normal one there too
MOST_EXACT = 50


def subject_means(values, subjects):
    """Return the mean of each subject's finite values, (n,), for the subjects that have one.

    values : float64 (n_cases,), NaN where a case has none; subjects : (n_cases,), any sortable values
    """
    defined = np.isfinite(values)
    _, number, count = np.unique(np.asarray(subjects)[defined], return_inverse=True, return_counts=True)
    return np.bincount(number, values[defined], len(count)) / count


def signed_rank_p(differences):
    """Return the two-sided p of Wilcoxon's signed-rank test of differences (n,); NaN for n < 6.

    Zeros keep their ranks and have no sign (Pratt 1959). Exact without zeros and ties for n ≤ 50, and by all changes
    of sign for n ≤ 13; else the normal approximation. Nothing but zeros has p = 1.
    """
    if len(differences) < intervals.LEAST_SUBJECTS:
        return np.nan
    if not np.any(differences):
        return 1.0
    return float(stats.wilcoxon(differences, zero_method="pratt").pvalue)


def hodges_lehmann(differences):
    """Return (estimate, intervals.Intervals) of the location of differences (n,), without NaN.

    The estimate is the median of the Walsh averages (dᵢ + dⱼ)/2, i ≤ j. The interval runs from the k-th smallest to
    the k-th largest of them, with the greatest k for which the signed-rank statistic lies below k with a probability
    of at most 2.5 % (Hollander, Wolfe & Chicken 2014, section 3.3); null for n < 6. Ties make it wider, never narrower.
    """
    n = len(differences)
    if not n:
        return np.nan, intervals.Intervals(np.nan, np.nan, np.nan, "none: undefined")
    first, second = np.triu_indices(n)
    averages = np.sort((differences[first] + differences[second]) / 2)
    estimate = float(np.median(averages))
    if n < intervals.LEAST_SUBJECTS:
        label = f"none: fewer than {intervals.LEAST_SUBJECTS} subjects"
        return estimate, intervals.Intervals(np.nan, np.nan, np.nan, label)
    rank = signed_rank_quantile(n)
    label = "signed_rank" if n <= MOST_EXACT else "signed_rank (normal approximation)"
    if n < intervals.FLAGGED_BELOW_SUBJECTS:
        label += f"; fewer than {intervals.FLAGGED_BELOW_SUBJECTS} subjects"
    return estimate, intervals.Intervals(float(averages[rank - 1]), float(averages[-rank]), np.nan, label)


def signed_rank_quantile(n):
    """Return the greatest k with P(T⁺ < k) ≤ 2.5 %, T⁺ the signed-rank statistic of n; at least 1 for n ≥ 6."""
    if n > MOST_EXACT:
        spread = np.sqrt(n * (n + 1) * (2 * n + 1) / 24)
        return int(n * (n + 1) / 4 + stats.norm.ppf(intervals.ALPHA / 2) * spread)
    ways = np.ones(1)  # in which each sum of ranks comes about
    for rank in range(1, n + 1):
        ways = np.append(ways, np.zeros(rank)) + np.append(np.zeros(rank), ways)
    return int((np.cumsum(ways) / 2.0**n <= intervals.ALPHA / 2).sum())


def holm(p):
    """Return p adjusted for a family of tests by Holm's step-down method (Holm 1979), (n,).

    p : float64 (n,); a NaN is no test, does not count and stays NaN
    """
    p = np.asarray(p, np.float64)
    adjusted = np.full(len(p), np.nan)
    order = np.argsort(p, kind="stable")[: np.isfinite(p).sum()]
    steps = np.arange(len(order), 0, -1) * p[order]
    adjusted[order] = np.minimum(np.maximum.accumulate(steps), 1)
    return adjusted


def exchanges(subjects, seed):
    """Return in which of 9,999 draws a case's results change places between two models: bool (1 + 9,999, n_cases).

    subjects : (n_cases,), any sortable values; all sessions of one person change places together
    seed : of the draws, which depend on the subjects alone

    In the first row nothing changes place.
    """
    names, number = np.unique(np.asarray(subjects), return_inverse=True)
    drawn = np.random.default_rng(seed).integers(0, 2, (N_PERMUTATIONS, len(names)), dtype=bool)
    return np.concatenate([np.zeros((1, len(names)), bool), drawn])[:, number]


def exchange_p(differences, slack):
    """Return the two-sided p of a difference between two models, (1 + #)/(1 + N); NaN where it is undefined.

    differences : float64 (1 + N,), as found, then after each of `exchanges`; a draw without one counts as as extreme
    slack : differences that are closer than this differ by rounding
    """
    observed, drawn = np.abs(differences[0]), np.abs(differences[1:])
    if not np.isfinite(observed):
        return np.nan
    as_extreme = ~(drawn < observed - slack)
    return float((1 + as_extreme.sum()) / (1 + len(drawn)))
