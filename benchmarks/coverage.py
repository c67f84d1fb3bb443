"""Coverage of the intervals: how often an interval of 95 % holds the population's value, in simulated cohorts.

    python benchmarks/coverage.py [--cohorts 500] [--resamples 2000] [--seed 0]

Draws cohorts of 20, 40 and 126 patients as arrays of tallies (bins × outcomes per patient) from populations whose
values are known, and gives each the interval that a cohort's tables have (definitions, section 9), by the functions of
`segtrust.intervals`. Patients differ by random effects; within a patient, voxels are drawn independently. Formulas,
results and what follows from them: docs/coverage.md. The table is Markdown; its last column is the Monte Carlo standard
error of the coverage, which is that of the intervals that exist. The last line is JSON.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy import special, stats

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from segtrust import intervals, metrics, strata
from segtrust.bins import FP, PROBABILITY_BINS, TN

SIZES = (20, 40, 126)
BLOCK = 50  # cohorts that share bootstrap draws
ACCEPTED = (0.92, 0.98)  # under mild skew


class Quantity(NamedTuple):
    """A number of a cohort.

    name : of the quantity and its population; method : of the interval; value : in the population
    mild : whether the requirement of 92 % to 98 % is about it
    """

    name: str
    method: str
    value: float
    mild: bool = False


# --- means over patients ------------------------------------------------------------------------------------------

# a metric of one patient
PATIENT_VALUES = {
    "symmetric": stats.beta(5, 5),
    "mild skew": stats.gamma(4, scale=0.05),
    "strong skew": stats.lognorm(1, scale=0.05),
}


def patient_mean_quantities():
    return [
        Quantity(f"patient mean, {kind}", "studentised", float(distribution.mean()), kind == "mild skew")
        for kind, distribution in PATIENT_VALUES.items()
    ]


def patient_means(generator, draws, n_cohorts):
    found = []
    for distribution in PATIENT_VALUES.values():
        values = distribution.rvs(size=(draws.n_subjects, n_cohorts), random_state=generator)
        found.append(intervals.studentised(values, draws, lowest=0))
    return found


# --- pooled ratios ------------------------------------------------------------------------------------------------

RATE, RATE_VOXELS, RATE_CORRELATION = 0.02, 30_000, 0.3
# standard deviations of log voxels and of the log error rate of a patient; their correlation is above
RATE_SPREADS = {"mild skew": (0.2, 0.25), "strong skew": (0.6, 0.8)}


def error_rate_quantities():
    # E[n r] / E[n] of log-normal n and r
    return [
        Quantity(
            f"pooled error rate, {kind}",
            "expanded_percentile",
            RATE * np.exp(RATE_CORRELATION * size * rate),
            kind == "mild skew",
        )
        for kind, (size, rate) in RATE_SPREADS.items()
    ]


def error_rates(generator, draws, n_cohorts):
    found, n = [], draws.n_subjects
    for size, rate in RATE_SPREADS.values():
        first, second = generator.normal(size=(2, n_cohorts, n))
        second = RATE_CORRELATION * first + np.sqrt(1 - RATE_CORRELATION**2) * second
        voxels = np.rint(RATE_VOXELS * np.exp(size * first)).astype(np.int64)
        wrong = generator.binomial(voxels, np.minimum(RATE * np.exp(rate * second - rate**2 / 2), 1))
        counts = scores_of(wrong, voxels - wrong)
        drawn = scores_of(draws.weights @ wrong.T, draws.weights @ (voxels - wrong).T)
        value = metrics.error_rate(counts.sum(axis=1)[..., np.newaxis, :])
        resampled = metrics.error_rate(drawn[..., np.newaxis, :])
        found.append(intervals.expanded_percentile(value, resampled, n))
    return found


def scores_of(wrong, right):
    """Return counts by outcome (…, 4) of wrong and right voxels, as the scores of `ALL` have them."""
    counts = np.zeros((*wrong.shape, 4))
    counts[..., FP], counts[..., TN] = wrong, right
    return counts


# --- pooled ranking of voxels -------------------------------------------------------------------------------------

SEPARATION, N_WRONG, N_RIGHT = 1.5, 600, 30_000
SCORE_EDGES = np.concatenate([[-np.inf], np.linspace(-3, 6, 39), [np.inf]])
# standard deviations, over patients, of log right voxels, log wrong voxels, level of uncertainty and separation
RANKING_SPREADS = {"mild skew": (0.2, 0.25, 0.3, 0.2), "strong skew": (0.6, 0.8, 0.6, 0.4)}
# patients with more errors are more uncertain, and their errors harder to tell
RANKING_CORRELATION = np.array([[1, 0.3, 0, 0], [0.3, 1, 0.3, -0.3], [0, 0.3, 1, 0], [0, -0.3, 0, 1]])


def shares(mean, variance=1.0):
    """Return the shares of a normal score in the bins; mean, variance : (…) → (…, bins)."""
    edges = (SCORE_EDGES - np.asarray(mean)[..., np.newaxis]) / np.sqrt(variance)
    return np.diff(special.ndtr(edges), axis=-1)


def ranking_quantities():
    quantities = []
    for kind, spreads in RANKING_SPREADS.items():
        covariance = RANKING_CORRELATION * np.outer(spreads, spreads)
        # weighting patients by their log-normal voxels moves the mean of a normal effect by their covariance
        wrong_mean = SEPARATION + covariance[1, 2] + covariance[1, 3]
        wrong_variance = 1 + covariance[2, 2] + covariance[3, 3] + 2 * covariance[2, 3]
        wrong = N_WRONG * np.exp(covariance[1, 1] / 2) * shares(wrong_mean, wrong_variance)
        right = N_RIGHT * np.exp(covariance[0, 0] / 2) * shares(covariance[0, 2], 1 + covariance[2, 2])
        counts, mild = scores_of(wrong, right), kind == "mild skew"
        quantities.append(Quantity(f"pooled AUROC, {kind}", "expanded_percentile", float(metrics.auroc(counts)), mild))
        quantities.append(Quantity(f"pooled AUPR, {kind}", "expanded_percentile", float(metrics.aupr(counts)), mild))
    return quantities


def rankings(generator, draws, n_cohorts):
    found, n = [], draws.n_subjects
    for spreads in RANKING_SPREADS.values():
        covariance = RANKING_CORRELATION * np.outer(spreads, spreads)
        effects = generator.multivariate_normal(np.zeros(4), covariance, size=(n_cohorts, n))
        log_right, log_wrong, level, separation = np.moveaxis(effects, -1, 0)
        wrong, right = (
            generator.multinomial(np.rint(mean * np.exp(log_voxels)).astype(np.int64), shares(score))
            for mean, log_voxels, score in (
                (N_WRONG, log_wrong, level + SEPARATION + separation),
                (N_RIGHT, log_right, level),
            )
        )
        values = scores_of(wrong.sum(axis=1), right.sum(axis=1))
        resampled = np.stack([ranked(draws.weights, *one) for one in zip(wrong, right, strict=True)], axis=2)
        for metric, again in zip((metrics.auroc, metrics.aupr), resampled, strict=True):
            found.append(intervals.expanded_percentile(metric(values), again, n))
    return found


def ranked(weights, wrong, right):
    """Return AUROC and AUPR of each resample of a cohort, (2, n_resamples); wrong, right : (n_patients, bins)."""
    drawn = scores_of(weights @ wrong, weights @ right)
    return np.stack([metrics.auroc(drawn), metrics.aupr(drawn)])


# --- pooled calibration errors ------------------------------------------------------------------------------------

N_BINS = 15
CENTRES = (np.arange(N_BINS) + 0.5) / N_BINS
BIN_SHARES = 1 / (CENTRES * (1 - CENTRES)) / (1 / (CENTRES * (1 - CENTRES))).sum()
BIN_CONCENTRATION = 50
CALIBRATION_VOXELS, CALIBRATION_SPREAD = 20_000, 0.4
# slope of logistic recalibration
SLOPES = {"clearly over-confident": 0.5, "slightly over-confident": 0.9, "calibrated": 1.0}
CALIBRATION_METRICS = ("ece", "ace", "mce")


def fraction_positive(slope):
    """Return the fraction of positives in each bin of the population."""
    return CENTRES**slope / (CENTRES**slope + (1 - CENTRES) ** slope)


def calibration_quantities():
    quantities = []
    for name, slope in SLOPES.items():
        values = errors_of_calibration(BIN_SHARES, BIN_SHARES * (CENTRES - fraction_positive(slope)))
        for metric, value in zip(CALIBRATION_METRICS, values, strict=True):
            quantities.append(
                Quantity(f"pooled {metric.upper()}, {name}", "envelope", float(value), name != "calibrated")
            )
    return quantities


def errors_of_calibration(voxels, excess):
    """Return ECE, ACE and MCE, (3, …), of voxels and of Σp minus positives by bin, (…, bins)."""
    gaps = np.divide(np.abs(excess), voxels, out=np.zeros_like(excess), where=voxels > 0)
    expected = np.abs(excess).sum(axis=-1) / voxels.sum(axis=-1)
    return np.stack([expected, gaps.sum(axis=-1) / (voxels > 0).sum(axis=-1), gaps.max(axis=-1)])


def calibrations(generator, draws, n_cohorts):
    found, n = [], draws.n_subjects
    shape = (n_cohorts, n)
    for slope in SLOPES.values():
        voxels, positives = draw_calibration(generator, shape, slope)
        values = pooled_calibration(voxels.sum(axis=1), positives.sum(axis=1))
        excess = voxels * CENTRES - positives
        resampled = np.stack(
            [
                errors_of_calibration(draws.weights @ one, draws.weights @ other)
                for one, other in zip(voxels, excess, strict=True)
            ],
            axis=2,
        )
        found += [intervals.envelope(value, again, n) for value, again in zip(values, resampled, strict=True)]
    return found


def draw_calibration(generator, shape, slope):
    """Return voxels and positives, (*shape, bins) each, of patients whose own calibration varies about the model's."""
    profile = generator.standard_gamma(BIN_CONCENTRATION * BIN_SHARES, size=(*shape, N_BINS))
    profile /= profile.sum(axis=-1, keepdims=True)
    total = np.rint(CALIBRATION_VOXELS * np.exp(CALIBRATION_SPREAD * generator.normal(size=shape))).astype(np.int64)
    voxels = generator.multinomial(total, profile)
    # as a whole too many or too few positives, and too sure or not sure enough; both within ±1/2, and 0 on average
    too_many, too_sure = generator.beta(2, 2, size=(2, *shape, 1)) - 0.5
    fraction = fraction_positive(slope)
    fraction = fraction + fraction * (1 - fraction) * (too_many + too_sure * np.sign(0.5 - CENTRES))
    return voxels, generator.binomial(voxels, fraction)


def pooled_calibration(voxels, positives):
    """Return ECE, ACE and MCE of pooled voxels, (3, n_cohorts), by the tally's bins."""
    place = np.searchsorted(PROBABILITY_BINS.edges, CENTRES, side="right") - 1
    n = np.zeros((len(voxels), len(PROBABILITY_BINS), 2))
    n[:, place] = np.stack([voxels - positives, positives], axis=-1)
    sum_p = np.zeros_like(n)
    sum_p[:, place] = n[:, place] * CENTRES[:, np.newaxis]
    return np.stack(
        [getattr(metrics, f"{metric}_class_probability")(n, sum_p, N_BINS) for metric in CALIBRATION_METRICS]
    )


# --- detection of failures ----------------------------------------------------------------------------------------

# AUROC and share of failures
DETECTION = ((0.75, 0.3), (0.9, 0.3), (0.9, 0.1))


def detection_quantities():
    return [
        Quantity(f"failure AUROC {auroc}, {share:.0%} failures", "newcombe", auroc, True) for auroc, share in DETECTION
    ]


def detections(generator, draws, n_cohorts):
    found, n = [], draws.n_subjects
    for auroc, share in DETECTION:
        failed = generator.random((n_cohorts, n)) < share
        scores = generator.normal(size=failed.shape) + np.sqrt(2) * special.ndtri(auroc) * failed
        found.append(
            stacked(
                intervals.newcombe(strata.failure_auroc(one, which), int(which.sum()), int((~which).sum()), n)
                for one, which in zip(scores, failed, strict=True)
            )
        )
    return found


def stacked(each):
    """Return the Intervals of several cohorts as one."""
    return intervals.Intervals(*(np.array(field) for field in zip(*each, strict=True)))


# --- medians and proportions --------------------------------------------------------------------------------------

# Dice = Φ(location + scale · normal)
DICE = {"mild skew": (1.2, 0.4), "strong skew": (1.8, 1.0)}
COVERED = (0.9, 0.7, 0.5)


def median_quantities():
    return [
        Quantity(f"median Dice, {kind}", "order_statistic", float(special.ndtr(location)), kind == "mild skew")
        for kind, (location, _) in DICE.items()
    ]


def medians(generator, draws, n_cohorts):
    n = draws.n_subjects
    return [
        stacked(
            intervals.median_interval(dice, n)
            for dice in special.ndtr(location + scale * generator.normal(size=(n_cohorts, n)))
        )
        for location, scale in DICE.values()
    ]


def proportion_quantities():
    return [Quantity(f"volume coverage of {share}", "wilson", share, True) for share in COVERED]


def proportions(generator, draws, n_cohorts):
    n = draws.n_subjects
    return [
        stacked(intervals.wilson(int(covered), n, n) for covered in generator.binomial(n, share, size=n_cohorts))
        for share in COVERED
    ]


# --- triage -------------------------------------------------------------------------------------------------------

TRIAGE_CORRELATION = -0.6  # of the normal scores of uncertainty and Dice
GRID = 2_000


def triage_quantities():
    """Return the quantities of triage, from a grid of 2,000 × 2,000 equally probable patients."""
    level = special.ndtri((np.arange(GRID) + 0.5) / GRID)
    latent = correlated(level[:, np.newaxis], level)
    quarter = GRID // 4
    lowest, highest = latent[:quarter].ravel(), np.sort(latent[-quarter:].ravel())
    better = np.searchsorted(highest, lowest).mean() / len(highest)
    quantities = [
        Quantity("spearman", "percentile", 6 / np.pi * np.arcsin(TRIAGE_CORRELATION / 2), True),
        Quantity("cliffs_delta of Q4 against Q1", "percentile", float(1 - 2 * better), True),
    ]
    for kind, (location, scale) in DICE.items():
        dice, mild = special.ndtr(location + scale * latent), kind == "mild skew"
        lowest, highest = np.median(dice[:quarter]), np.median(dice[-quarter:])
        risk = np.cumsum(1 - dice.mean(axis=1)) / np.arange(1, GRID + 1)
        quantities += [
            Quantity(f"q4_minus_q1, {kind}", "percentile", float(highest - lowest), mild),
            Quantity(f"aurc, {kind}", "expanded_percentile", float(risk.mean()), mild),
            Quantity(f"median Dice of Q4, {kind}", "order_statistic", float(highest), mild),
        ]
    return quantities


def correlated(scores, independent):
    """Return normal numbers that have the planned correlation with normal scores."""
    return TRIAGE_CORRELATION * scores + np.sqrt(1 - TRIAGE_CORRELATION**2) * independent


def triages(generator, draws, n_cohorts):
    n, weights = draws.n_subjects, draws.weights
    scores, latent = generator.normal(size=(2, n_cohorts, n))
    latent = correlated(scores, latent)
    here = [strata.outer_strata(one, "quartiles") for one in scores]
    drawn = [strata.outer_strata(one, "quartiles", None, weights) for one in scores]

    def of_strata(function, values):
        return [
            (function(one, *outer), function(one, *again))
            for one, outer, again in zip(values, here, drawn, strict=True)
        ]

    def of_ranks(function, values):
        return [
            (function(score, one), function(score, one, weights)) for score, one in zip(scores, values, strict=True)
        ]

    found = [percentile_of(of_ranks(strata.spearman, latent), n)]
    found.append(percentile_of(of_strata(strata.cliffs_delta, latent), n))
    for location, scale in DICE.values():
        dice = special.ndtr(location + scale * latent)
        found.append(percentile_of(of_strata(strata.median_difference, dice), n))
        found.append(percentile_of(of_ranks(strata.aurc, 1 - dice), n, intervals.expanded_percentile))
        members = [one[highest > 0] for one, (highest, _) in zip(dice, here, strict=True)]
        found.append(stacked(intervals.median_interval(inside, len(inside)) for inside in members))
    return found


def percentile_of(pairs, n, method=intervals.percentile):
    """Return the percentile Intervals of cohorts; pairs : (value, resampled (n_resamples,)) of each."""
    values, resampled = zip(*pairs, strict=True)
    return method(np.array(values), np.stack(resampled, axis=1), n)


# --- the study ----------------------------------------------------------------------------------------------------

STUDIES = (
    (patient_mean_quantities, patient_means),
    (error_rate_quantities, error_rates),
    (ranking_quantities, rankings),
    (calibration_quantities, calibrations),
    (detection_quantities, detections),
    (median_quantities, medians),
    (proportion_quantities, proportions),
    (triage_quantities, triages),
)


def study(quantities, simulate, n_cohorts, n_resamples, seed):
    """Return {(name, n): result} of the quantities, a dict of numbers each."""
    results = {}
    for n in SIZES:
        generator = np.random.default_rng([seed, n])
        found = [[] for _ in quantities]
        for block, start in enumerate(range(0, n_cohorts, BLOCK)):
            draws = intervals.draw(np.arange(n), n_resamples, [seed, n, block])
            parts = simulate(generator, draws, min(BLOCK, n_cohorts - start))
            for held, part in zip(found, parts, strict=True):
                held.append((part.low, part.high))
        for quantity, held in zip(quantities, found, strict=True):
            low, high = np.concatenate(held, axis=1)
            results[quantity.name, n] = summary(low, high, quantity.value)
    return results


def summary(low, high, value):
    """Return how intervals (n_cohorts,), NaN where there is none, lie about a value; shares are of those that exist."""
    exists = np.isfinite(low)
    low, high = low[exists], high[exists]
    n = len(low)
    below, above = ((value < low).mean(), (value > high).mean()) if n else (np.nan, np.nan)
    coverage = 1 - below - above
    return {
        "coverage": coverage,
        "value_below": below,
        "value_above": above,
        "mean_width": (high - low).mean() if n else np.nan,
        "null": 1 - exists.mean(),
        "standard_error": np.sqrt(coverage * (1 - coverage) / n) if n else np.nan,
    }


def table_of(quantities, results):
    """Return the lines of a Markdown table."""
    heads = "quantity | interval | value | n | coverage % | value below % | value above % | mean width | null % | ±"
    lines = [f"| {heads} |", "|---|---|" + "---:|" * 8]
    for quantity in quantities:
        for n in SIZES:
            found = results[quantity.name, n]
            numbers = [found[name] for name in ("coverage", "value_below", "value_above")]
            coverage, below, above = ("–" if np.isnan(number) else f"{100 * number:.1f}" for number in numbers)
            width = "–" if np.isnan(found["mean_width"]) else f"{found['mean_width']:.3g}"
            error = "–" if np.isnan(found["standard_error"]) else f"{100 * found['standard_error']:.1f}"
            cells = (quantity.name, quantity.method, f"{quantity.value:.3g}", n, coverage, below, above, width)
            lines.append(f"| {' | '.join(map(str, cells))} | {100 * found['null']:.0f} | {error} |")
    return lines


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cohorts", type=int, default=500, help="simulated cohorts of each size (500)")
    parser.add_argument("--resamples", type=int, default=2000, help="bootstrap resamples of each cohort (2000)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    every, results = [], {}
    for describe, simulate in STUDIES:
        quantities = describe()
        every += quantities
        results |= study(quantities, simulate, arguments.cohorts, arguments.resamples, arguments.seed)

    print("\n".join(table_of(every, results)))
    error = 100 * np.sqrt(0.95 * 0.05 / arguments.cohorts)
    print(f"\n{arguments.cohorts} cohorts, {arguments.resamples} resamples. Shares are of the intervals that exist.")
    print(f"A coverage of 95 % has a Monte Carlo standard error of {error:.1f} points, more where intervals are null.")
    outside = [
        f"  {quantity.name}, n = {n}: {100 * coverage:.1f} %"
        for quantity in every
        for n in SIZES
        if quantity.mild and not np.isnan(coverage := results[quantity.name, n]["coverage"])
        if not ACCEPTED[0] <= coverage <= ACCEPTED[1]
    ]
    print("Under mild skew, outside 92 to 98 %:" if outside else "Under mild skew, all within 92 to 98 %.")
    print("\n".join(outside))
    numbers = {
        quantity.name: {
            str(n): {key: rounded(number) for key, number in results[quantity.name, n].items()} for n in SIZES
        }
        for quantity in every
    }
    print(json.dumps({"coverage": numbers}))


def rounded(number):
    return None if np.isnan(number) else float(f"{number:.6g}")


if __name__ == "__main__":
    main()
