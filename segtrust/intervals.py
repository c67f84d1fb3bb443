"""Confidence intervals of cohort numbers: 95 %, on the level of subjects.

Voxels of one patient are not independent, so a resample draws whole subjects, and the sessions of one person
share its draws. One set of draws serves every row of a cohort: a resample of a pooled metric is the metric of
a weighted sum of tallies. Which quantity gets which interval is fixed in definitions §9.

An interval is null where it would not mean anything: fewer than 6 subjects, fewer than 5 failures or
5 successes, more than 5 % of the resamples undefined. Its `label` then begins with "none:" and says why.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from scipy import optimize, stats

ALPHA = 0.05
LEAST_SUBJECTS = 6
FLAGGED_BELOW_SUBJECTS = 10
LEAST_EVENTS = 5
MOST_UNDEFINED = 0.05


class Intervals(NamedTuple):
    """Intervals of one or several numbers; all fields have the shape of the numbers.

    low, high : float64, NaN where there is no interval
    bias : float64, mean of the resamples minus the value; NaN where it is not reported
    label : str, the method, followed by what a reader must know about it
    """

    low: np.ndarray
    high: np.ndarray
    bias: np.ndarray
    label: np.ndarray


@dataclass(frozen=True)
class Draws:
    """Bootstrap draws of subjects, shared by all rows of a cohort.

    subjects : int64 (n_cases,), the number of each case's subject
    subject_weights : float64 (n_resamples, n_subjects), how often a resample drew each subject
    """

    subjects: np.ndarray
    subject_weights: np.ndarray

    @property
    def n_resamples(self):
        return self.subject_weights.shape[0]

    @property
    def n_subjects(self):
        return self.subject_weights.shape[1]

    @cached_property
    def weights(self):
        """float64 (n_resamples, n_cases): how often a resample holds each case."""
        return self.subject_weights[:, self.subjects]

    def count_subjects(self, defined):
        """Return how many subjects have a case that is defined; defined : bool (n_cases, …)."""
        per_subject = np.zeros((self.n_subjects, *defined.shape[1:]), dtype=bool)
        np.logical_or.at(per_subject, self.subjects, defined)
        return per_subject.sum(axis=0)


def draw(subjects, n_resamples, seed):
    """Return the Draws for cases that belong to `subjects` (n_cases,), any sortable values.

    Subjects are drawn with replacement, as many as there are. The same subjects in another order
    get the same draws.
    """
    names, number = np.unique(np.asarray(subjects), return_inverse=True)
    generator = np.random.default_rng(seed)
    weights = generator.multinomial(len(names), np.full(len(names), 1 / len(names)), size=n_resamples)
    return Draws(number, weights.astype(np.float64))


def studentised(values, draws, lowest=-np.inf, highest=np.inf):
    """Return the intervals of patient means by the studentised bootstrap.

    values : float64 (n_cases, …), NaN where a case has no value; each column has its own mean
    lowest, highest : range of the quantity, to which the interval is clipped

    The standard error of a mean of n_d values that come in subjects s is that of a ratio,
    se² = n_s/(n_s − 1) · Σ_s (Σ_{i in s} (x_i − mean))² / n_d²  (Efron & Tibshirani 1993, ch. 12, with the
    linearised variance of a cluster sample).
    """
    values = np.asarray(values, dtype=np.float64)
    shape = values.shape[1:]
    values = values.reshape(len(values), -1)
    defined = np.isfinite(values)
    count = _per_subject(defined.astype(np.float64), draws)
    n_defined = defined.sum(axis=0)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = np.where(defined, values, 0).sum(axis=0) / n_defined
        total = _per_subject(np.where(defined, values - mean, 0), draws)
        n_subjects = (count > 0).sum(axis=0)
        error = np.sqrt(n_subjects / (n_subjects - 1) * (total**2).sum(axis=0)) / n_defined
        weights = draws.subject_weights
        drawn = weights @ count
        shift = (weights @ total) / drawn
        square = weights @ total**2 - 2 * shift * (weights @ (total * count)) + shift**2 * (weights @ count**2)
        n_drawn = weights @ (count > 0)
        spread = np.sqrt(np.maximum(square, 0) * n_drawn / (n_drawn - 1)) / drawn
        # A resample without spread has only rounding left of it; it says nothing about the scale.
        scale = np.abs(total).max(axis=0, initial=0)
        spread = np.where(spread * drawn > 1e-7 * scale, spread, np.nan)
        ratio = shift / spread
    lower, upper, n_undefined = _quantiles(ratio)
    low = np.clip(mean - upper * error, lowest, highest)
    high = np.clip(mean - lower * error, lowest, highest)
    nothing = np.full_like(low, np.nan)
    result = _judged("studentised", low, high, nothing, n_subjects, n_undefined, draws.n_resamples)
    return Intervals(*(field.reshape(shape) for field in result))


def percentile(value, resampled, n_subjects):
    """Return the percentile intervals of rank statistics and differences of medians.

    value : float64 (…); resampled : float64 (n_resamples, …), NaN where undefined
    n_subjects : int (…), subjects that contribute
    """
    lower, upper, n_undefined = _quantiles(resampled)
    return _of_quantiles("percentile", value, lower, upper, n_subjects, n_undefined, len(resampled))


def expanded_percentile(value, resampled, n_subjects):
    """Return the percentile intervals of pooled numbers, at the level that suits the number of subjects.

    Resamples of n subjects spread by √((n − 1)/n) too little, and normal quantiles stand where those of Student's t
    belong: 93 % instead of 95 % with 20 subjects. The quantiles at Φ(−√(n/(n − 1)) t) make up for both, t being the
    97.5 % quantile of n − 1 degrees of freedom (Hesterberg 2015, The American Statistician 69:371). Arguments as in
    `percentile`.
    """
    lower, upper, n_undefined = _quantiles(resampled, _expanded(n_subjects))
    return _of_quantiles("expanded_percentile", value, lower, upper, n_subjects, n_undefined, len(resampled))


def envelope(value, resampled, n_subjects, lowest=0):
    """Return the intervals of calibration errors, or of differences of them, and the resampling bias.

    A resample's calibration error exceeds that of the cohort, because noise in a bin counts as error. The basic
    interval [2·value − upper, 2·value − lower] reflects that excess back; where gaps are small, an absolute value has a
    kink and it reflects too much. On each side the wider one of the basic and the percentile interval is taken, both
    at the level of `expanded_percentile`, clipped at `lowest` (a difference is not: minus infinity). Other arguments as
    in `percentile`.
    """
    value = np.asarray(value, dtype=np.float64)
    lower, upper, n_undefined = _quantiles(resampled, _expanded(n_subjects))
    finite = np.isfinite(resampled)
    with np.errstate(invalid="ignore", divide="ignore"):
        bias = np.where(finite, resampled, 0).sum(axis=0) / finite.sum(axis=0) - value
    low = np.maximum(np.minimum(lower, 2 * value - upper), lowest)
    high = np.maximum(upper, 2 * value - lower)
    return _judged("envelope", low, high, bias, n_subjects, n_undefined, len(resampled))


def _expanded(n_subjects):
    n = np.maximum(n_subjects, 2)
    return stats.norm.cdf(-np.sqrt(n / (n - 1)) * stats.t.ppf(1 - ALPHA / 2, n - 1))


def _of_quantiles(method, value, lower, upper, n_subjects, n_undefined, n_resamples):
    """Return intervals between quantiles; none where the value itself is undefined."""
    undefined, nothing = ~np.isfinite(np.asarray(value, np.float64)), np.full_like(lower, np.nan)
    low, high = (np.where(undefined, np.nan, bound) for bound in (lower, upper))
    return _judged(method, low, high, nothing, n_subjects, n_undefined, n_resamples)


def wilson(successes, n, n_subjects):
    """Return the Wilson score interval of a proportion (Wilson 1927).

    Where sessions share a subject, successes and n are scaled down to the number of subjects.
    """
    if n_subjects < LEAST_SUBJECTS:
        return _nothing(f"none: fewer than {LEAST_SUBJECTS} subjects")
    successes, n = successes * n_subjects / n, n_subjects
    z = stats.norm.ppf(1 - ALPHA / 2)
    centre = (successes + z**2 / 2) / (n + z**2)
    half = z / (n + z**2) * np.sqrt(successes * (n - successes) / n + z**2 / 4)
    return _one(max(centre - half, 0.0), min(centre + half, 1.0), "wilson" + _small(n_subjects))


def newcombe(auroc, n_failures, n_successes, n_subjects):
    """Return Newcombe's interval of an AUROC from independent cases.

    Method 5 of Newcombe (2006, Statistics in Medicine 25:559): the θ with |auroc − θ| = z √V(θ),
    V(θ) = θ(1−θ)/(mn) · (1 + N (1−θ)/(2−θ) + N θ/(1+θ)), N = (m+n)/2 − 1.
    Where sessions share a subject, m and n are scaled down to the number of subjects.
    """
    if n_subjects < LEAST_SUBJECTS:
        return _nothing(f"none: fewer than {LEAST_SUBJECTS} subjects")
    if min(n_failures, n_successes) < LEAST_EVENTS:
        return _nothing(f"none: {n_failures} failures and {n_successes} successes, at least {LEAST_EVENTS} of each")
    if not np.isfinite(auroc):
        return _nothing("none: undefined")
    scale = n_subjects / (n_failures + n_successes)
    m, n = n_failures * scale, n_successes * scale
    z = stats.norm.ppf(1 - ALPHA / 2)

    def distance(theta):
        return (theta - auroc) ** 2 - z**2 * newcombe_variance(theta, m, n)

    low = 0.0 if auroc <= 0 else optimize.brentq(distance, 0.0, auroc - 1e-9)
    high = 1.0 if auroc >= 1 else optimize.brentq(distance, auroc + 1e-9, 1.0)
    return _one(low, high, "newcombe" + _small(n_subjects))


def newcombe_variance(theta, m, n):
    """Return V(θ) of an AUROC θ from m failures and n successes, as in `newcombe`."""
    half = (m + n) / 2 - 1
    return theta * (1 - theta) / (m * n) * (1 + half * (1 - theta) / (2 - theta) + half * theta / (1 + theta))


def median_interval(values, n_subjects):
    """Return the order-statistic interval of a median.

    values : float64 (n_cases,), without NaN. The interval runs from the k-th smallest to the k-th largest,
    with the greatest k for which a Binomial(n, ½) lies below k with a probability of at most 2.5 %.
    Where sessions share a subject, k is found for the number of subjects and scaled up to the cases.
    """
    if n_subjects < LEAST_SUBJECTS:
        return _nothing(f"none: fewer than {LEAST_SUBJECTS} subjects")
    ordered = np.sort(values)
    rank = order_statistic_rank(n_subjects) * len(ordered) // n_subjects
    # A subject with several sessions can leave fewer subjects than ranks: the extremes then bound the median.
    rank = max(rank, 1)
    return _one(ordered[rank - 1], ordered[-rank], "order_statistic" + _small(n_subjects))


def order_statistic_rank(n):
    """Return the greatest k with P(Binomial(n, ½) < k) ≤ 2.5 %; 0 where there is none (n < 6)."""
    below = stats.binom.cdf(np.arange(n), n, 0.5)
    return int((below <= ALPHA / 2).sum())


def _per_subject(values, draws):
    """Return the sums over the cases of each subject: (n_cases, k) → (n_subjects, k)."""
    sums = np.zeros((draws.n_subjects, values.shape[1]))
    np.add.at(sums, draws.subjects, values)
    return sums


def _quantiles(resampled, level=ALPHA / 2):
    """Return quantiles over axis 0 of the finite resamples, at a level and its opposite, and the count of the others.

    level : float, or one for each number
    """
    finite = np.isfinite(resampled)
    n_finite = finite.sum(axis=0)
    ordered = np.sort(np.where(finite, resampled, np.inf), axis=0)
    bounds = []
    for share in (level, 1 - level):
        position = np.maximum(n_finite - 1, 0) * share
        below = np.floor(position).astype(np.int64)
        above = np.minimum(below + 1, np.maximum(n_finite - 1, 0))
        start = np.take_along_axis(ordered, below[np.newaxis], axis=0)[0]
        end = np.take_along_axis(ordered, above[np.newaxis], axis=0)[0]
        start, end = (np.where(n_finite > 0, edge, np.nan) for edge in (start, end))
        bounds.append(start + (position - below) * (end - start))
    return bounds[0], bounds[1], len(resampled) - n_finite


def _judged(method, low, high, bias, n_subjects, n_undefined, n_resamples):
    """Apply the null rules to intervals and label each."""
    low, high, bias = (np.array(field, dtype=np.float64) for field in (low, high, bias))
    n_subjects, n_undefined = np.broadcast_to(n_subjects, low.shape), np.broadcast_to(n_undefined, low.shape)
    label = np.empty(low.shape, dtype=object)
    for place in np.ndindex(low.shape):
        undefined = f"{n_undefined[place]} of {n_resamples} resamples undefined"
        if n_subjects[place] < LEAST_SUBJECTS:
            label[place] = f"none: fewer than {LEAST_SUBJECTS} subjects"
        elif n_undefined[place] > MOST_UNDEFINED * n_resamples:
            label[place] = f"none: {undefined}"
        elif not np.isfinite(low[place]):
            label[place] = "none: undefined"
        else:
            label[place] = method + _small(n_subjects[place]) + (f"; {undefined}" if n_undefined[place] else "")
        if label[place].startswith("none"):
            low[place] = high[place] = bias[place] = np.nan
    return Intervals(low, high, bias, label)


def _small(n_subjects):
    return f"; fewer than {FLAGGED_BELOW_SUBJECTS} subjects" if n_subjects < FLAGGED_BELOW_SUBJECTS else ""


def _one(low, high, label):
    return Intervals(float(low), float(high), np.nan, label)


def _nothing(label):
    return Intervals(np.nan, np.nan, np.nan, label)
