"""Triage: does a patient's uncertainty predict a bad segmentation?

Everything here works on one score and one Dice per case. A high score means uncertain, risk = 1 − Dice, and
cases whose prediction is empty have no score (NaN): an empty prediction is not confidence. Formulas:
definitions §8.

Functions that are resampled take `weights`, whole numbers of shape (…, n_cases) that say how often each case
counts, and return the leading shape; without weights every case counts once. Copies of a case are ties.
"""

import numpy as np

from segtrust import intervals

SCHEMES = {"quartiles": 4, "halves": 2}
STRATA = {"quartiles": ("Q1", "Q2", "Q3", "Q4"), "halves": ("H1", "H2")}
MISSING = ("missing_region", "missing_region_missed", "missing_region_absent")
LEAST_CASES_FOR_QUARTILES = 8
N_PERMUTATIONS = 9_999


def cutoffs(scores, n_strata, weights=None):
    """Return the n_strata − 1 cut-offs of scores without NaN: shape (n_strata − 1, …).

    Quantiles by linear interpolation between order statistics, at k / n_strata.
    """
    return np.stack([weighted_quantile(scores, k / n_strata, weights) for k in range(1, n_strata)])


def assign(scores, cuts):
    """Return each score's stratum, 0 = lowest; a score on a cut-off goes to the lower stratum.

    scores : float64 (n_cases,); cuts : float64 (n_strata − 1, …), increasing. Returns int64 (…, n_cases).
    """
    return (np.asarray(scores) > cuts[..., np.newaxis]).sum(axis=0)


def schemes(n_scored, n_fitted):
    """Return the names of the schemes that so many cases allow: fewer than 8 give halves only.

    n_scored : evaluated cases with a score; n_fitted : cases that the cut-offs come from
    """
    enough = min(n_scored, n_fitted) >= LEAST_CASES_FOR_QUARTILES
    return tuple(SCHEMES) if enough else ("halves",)


def stratify(scores, dice, absent, subjects, calibration_scores):
    """Return the strata of one score: a list of dicts, one per scheme and stratum.

    scores : float64 (n_cases,), NaN where the prediction is empty
    dice : float64 (n_cases,)
    absent : bool (n_cases,), the reference holds no such region; splits the missing ones
    subjects : int64 (n_cases,)
    calibration_scores : float64 (n_calibration,), scores of the calibration split, NaN where empty; they set
        the cut-offs where at least one is a number, else the evaluated scores do (`in_sample`)

    Every scheme lists its strata from the lowest score to the highest, then the cases without a score, in all
    and split into missed and truly absent. An empty stratum keeps a row with null values.
    """
    scored = np.isfinite(scores)
    calibration_scores = calibration_scores[np.isfinite(calibration_scores)]
    source = "calibration" if len(calibration_scores) else "in_sample"
    fitted = calibration_scores if len(calibration_scores) else scores[scored]
    groups = {"missing_region": ~scored, "missing_region_missed": ~scored & ~absent}
    groups["missing_region_absent"] = ~scored & absent
    rows = []
    for scheme in schemes(scored.sum(), len(fitted)):
        number = np.full(len(scores), -1)
        if len(fitted):
            number[scored] = assign(scores[scored], cutoffs(fitted, SCHEMES[scheme]))
        members = {name: number == k for k, name in enumerate(STRATA[scheme])} | groups
        for name, inside in members.items():
            rows.append({"scheme": scheme, "stratum": name, "cutoff_source": source})
            rows[-1].update(_summary(scores[inside], dice[inside], subjects[inside]))
    return rows


def _summary(scores, dice, subjects):
    n_cases = len(dice)
    interval = intervals.median_interval(dice, len(np.unique(subjects)))
    numbers = scores[np.isfinite(scores)]
    return {
        "n_cases": n_cases,
        "median_dice": float(np.median(dice)) if n_cases else np.nan,
        "ci_low": interval.low,
        "ci_high": interval.high,
        "score_low": float(numbers.min()) if len(numbers) else np.nan,
        "score_high": float(numbers.max()) if len(numbers) else np.nan,
    }


def outer_strata(scores, scheme, cuts=None, weights=None):
    """Return how often each case counts in the highest and in the lowest stratum, two arrays (…, n_cases).

    cuts : fixed cut-offs (n_strata − 1,) from the calibration split; None: found anew in every resample
    """
    weights = _weights(scores, weights)
    if cuts is None:
        cuts = cutoffs(scores, SCHEMES[scheme], weights)
    number = assign(scores, cuts)
    return weights * (number == SCHEMES[scheme] - 1), weights * (number == 0)


def median_difference(dice, highest, lowest):
    """Return the median Dice of the highest stratum minus that of the lowest; NaN where one is empty.

    highest, lowest : as returned by `outer_strata`
    """
    return weighted_quantile(dice, 0.5, highest) - weighted_quantile(dice, 0.5, lowest)


def cliffs_delta(dice, highest, lowest):
    """Return Cliff's δ: the share of pairs in which the highest stratum has the better Dice, minus that of the worse.

    highest, lowest : as returned by `outer_strata`. In [−1, 1]; NaN where one is empty. Mann–Whitney's U of the
    highest stratum is (δ + 1)/2 times the number of pairs.
    """
    sign = np.sign(dice[:, np.newaxis] - dice)
    return _ratio(((highest @ sign) * lowest).sum(axis=-1), highest.sum(axis=-1) * lowest.sum(axis=-1))


def permutation_p(highest, lowest, seed):
    """Return the two-sided p of a difference of medians over 9,999 random relabellings, (1 + #)/(1 + N).

    highest, lowest : Dice of the cases in each stratum; NaN where one is empty
    """
    if not len(highest) or not len(lowest):
        return np.nan
    both = np.tile(np.concatenate([highest, lowest]), (N_PERMUTATIONS, 1))
    shuffled = np.random.default_rng(seed).permuted(both, axis=1)
    drawn = np.median(shuffled[:, : len(highest)], axis=1) - np.median(shuffled[:, len(highest) :], axis=1)
    # Equal medians may differ by rounding when they are means of two order statistics.
    as_extreme = (np.abs(drawn) >= abs(np.median(highest) - np.median(lowest)) - 1e-12).sum()
    return float((1 + as_extreme) / (1 + N_PERMUTATIONS))


def triage(scores, dice, volumes, draws, failure_dice, calibration_scores, seed):
    """Return how well one score finds bad segmentations: a list of dicts, one per metric.

    scores, dice : float64 (n_cases,), scores NaN where the prediction is empty
    volumes : dict of float64 (n_cases,) with keys `predicted_volume` and `reference_volume`
    draws : intervals.Draws of the cases
    failure_dice : a segmentation with a lower Dice has failed
    calibration_scores : as in `stratify`
    seed : of the permutation test

    Each dict has metric, value, interval (intervals.Intervals), n_cases, p_value. Metrics are over the cases with
    a score; those named `…_missing_last` are over all, with empty predictions as the most uncertain.
    """
    scored = np.isfinite(scores)
    rows = _ranking(scores, dice, volumes, draws, failure_dice, scored, "")
    rows += _ranking(
        np.where(scored, scores, np.inf), dice, volumes, draws, failure_dice, scored | True, "_missing_last"
    )
    fitted = calibration_scores[np.isfinite(calibration_scores)]
    scheme = schemes(scored.sum(), len(fitted) if len(fitted) else scored.sum())[0]
    name = "q4_minus_q1" if scheme == "quartiles" else "h2_minus_h1"
    n_subjects = draws.count_subjects(scored)
    if scored.sum() < 2 or np.ptp(scores[scored]) == 0:
        nothing = intervals.Intervals(np.nan, np.nan, np.nan, "none: undefined")
        return rows + [_row(key, np.nan, nothing, scored.sum()) for key in (name, "cliffs_delta", "mann_whitney_u")]
    scores, dice = scores[scored], dice[scored]
    cuts = cutoffs(fitted, SCHEMES[scheme]) if len(fitted) else None
    highest, lowest = outer_strata(scores, scheme, cuts)
    resampled = outer_strata(scores, scheme, cuts, draws.weights[:, scored])
    for key, function in ((name, median_difference), ("cliffs_delta", cliffs_delta)):
        value = function(dice, highest, lowest)
        interval = intervals.percentile(value, function(dice, *resampled), n_subjects)
        rows.append(_row(key, value, interval, len(dice)))
    rows[-2]["p_value"] = permutation_p(dice[highest > 0], dice[lowest > 0], seed)
    u = (rows[-1]["value"] + 1) / 2 * highest.sum() * lowest.sum()
    nothing = intervals.Intervals(np.nan, np.nan, np.nan, "none: see cliffs_delta")
    return [*rows, _row("mann_whitney_u", u, nothing, len(dice))]


def _ranking(scores, dice, volumes, draws, failure_dice, inside, ending):
    """Return the rows of every metric that needs no strata, over the cases inside."""
    scores, dice, weights = scores[inside], dice[inside], draws.weights[:, inside]
    n_subjects, failed, risk = draws.count_subjects(inside), dice < failure_dice, 1 - dice
    functions = {"spearman": lambda weights=None: spearman(scores, dice, weights)}
    for name, volume in volumes.items():
        functions[f"partial_spearman_{name}"] = lambda weights=None, volume=volume[inside]: partial_spearman(
            scores, dice, volume, weights
        )
    for name, function in {"aurc": aurc, "e_aurc": e_aurc, "augrc": augrc}.items():
        functions[name] = lambda weights=None, function=function: function(scores, risk, weights)
    rows = []
    for name, function in functions.items():
        if len(scores) > 1:
            value, resampled = function(), function(weights)
        else:
            value, resampled = np.nan, np.full(draws.n_resamples, np.nan)
        rows.append(_row(name + ending, value, intervals.percentile(value, resampled, n_subjects), len(scores)))
    auroc = failure_auroc(scores, failed)
    interval = intervals.newcombe(auroc, int(failed.sum()), int((~failed).sum()), n_subjects)
    rows.append(_row("failure_auroc" + ending, auroc, interval, len(scores)))
    return rows


def _row(metric, value, interval, n_cases):
    return {
        "metric": metric,
        "value": value,
        "interval": interval,
        "n_cases": int(n_cases),
        "p_value": np.nan,
    }


def spearman(first, second, weights=None):
    """Return Spearman's ρ, ties with their mean rank; NaN where either has no variance."""
    weights = _weights(first, weights)
    return _correlation(_ranks(first, weights), _ranks(second, weights), weights)


def partial_spearman(first, second, given, weights=None):
    """Return Spearman's ρ of first and second given a third: the correlation of the rank residuals."""
    weights = _weights(first, weights)
    ranks = [_ranks(values, weights) for values in (first, second, given)]
    direct = _correlation(ranks[0], ranks[1], weights)
    through = [_correlation(ranks[k], ranks[2], weights) for k in (0, 1)]
    rest = (1 - through[0] ** 2) * (1 - through[1] ** 2)
    with np.errstate(invalid="ignore", divide="ignore"):
        # Nothing is left to correlate where a rank follows from the third; 1e-12 is rounding of a square.
        return np.where(rest > 1e-12, (direct - through[0] * through[1]) / np.sqrt(np.maximum(rest, 0)), np.nan)[()]


def failure_auroc(scores, failed):
    """Return the AUROC of the score for failed cases (bool), ties count one half; NaN if undefined."""
    if not failed.any() or failed.all() or scores.min() == scores.max():
        return np.nan
    above = scores[failed][:, np.newaxis] > scores[~failed]
    tied = scores[failed][:, np.newaxis] == scores[~failed]
    return float((above.sum() + tied.sum() / 2) / above.size)


def aurc(scores, risk, weights=None):
    """Return the area under the risk–coverage curve: mean over k of the mean risk of the k most confident.

    Tied scores have no order; the result is the expectation over all orderings of them. With A cases of total
    risk R before a tied group of g cases and mean risk r, the group adds Σ_{k=A+1..A+g} (R + (k − A) r) / k
    = r g + (R − A r)(H_{A+g} − H_A), H the harmonic numbers. NaN where the score has no variance.
    """
    return np.where(np.min(scores) < np.max(scores), _area(scores, risk, weights), np.nan)[()]


def e_aurc(scores, risk, weights=None):
    """Return the excess of `aurc` over that of the ideal score, the risk itself (Geifman 2019)."""
    return aurc(scores, risk, weights) - _area(risk, risk, weights)


def augrc(scores, risk, weights=None):
    """Return the area under the generalised risk–coverage curve, (1/n²) Σ_k Σ_{j≤k} risk_j (Traub 2024).

    Expectation over the orderings of tied scores: a tied group adds g R + r g (g + 1) / 2.
    """
    group = _groups(scores, risk, weights)
    parts = group["size"] * group["risk_before"] + group["mean"] * group["size"] * (group["size"] + 1) / 2
    mean = _ratio(parts.sum(axis=-1), group["n"] ** 2)
    return np.where(np.min(scores) < np.max(scores), mean, np.nan)[()]


def risk_coverage(scores, risk):
    """Return (coverage, selective risk) for k = 1 … n of the most confident, expected over ties."""
    order = np.argsort(scores, kind="stable")
    group = _groups(scores, risk, None)
    number = np.unique(scores, return_inverse=True)[1][order]
    k = np.arange(1, len(scores) + 1)
    total = group["risk_before"][number] + (k - group["start"][number]) * group["mean"][number]
    return k / len(scores), total / k


def weighted_quantile(values, level, weights=None):
    """Return the quantile of values (n_cases,) that count weights (…, n_cases) times each; NaN if none count.

    Linear interpolation between order statistics at position (n − 1) · level, n the sum of the weights.
    """
    weights = _weights(values, weights)
    order = np.argsort(values, kind="stable")
    ordered = np.asarray(values)[order]
    reached = np.cumsum(weights[..., order], axis=-1)
    n = reached[..., -1]
    position = np.maximum(n - 1, 0) * level
    below, above = np.floor(position), np.ceil(position)
    last = len(ordered) - 1
    start = ordered[np.minimum((reached <= below[..., np.newaxis]).sum(axis=-1), last)]
    end = ordered[np.minimum((reached <= above[..., np.newaxis]).sum(axis=-1), last)]
    return np.where(n > 0, start + (position - below) * (end - start), np.nan)[()]


def _weights(values, weights):
    return np.ones(len(values)) if weights is None else weights


def _sorted_groups(values):
    """Return the order of values, where each group of equal values starts in it, and each value's group."""
    order = np.argsort(values, kind="stable")
    _, start, inverse = np.unique(np.asarray(values)[order], return_index=True, return_inverse=True)
    number = np.empty(len(order), dtype=np.int64)
    number[order] = inverse
    return order, start, number


def _ranks(values, weights):
    order, start, number = _sorted_groups(values)
    size = np.add.reduceat(weights[..., order], start, axis=-1)
    rank = np.cumsum(size, axis=-1) - size + (size + 1) / 2
    return rank[..., number]


def _correlation(first, second, weights):
    n = weights.sum(axis=-1, keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        first = first - (weights * first).sum(axis=-1, keepdims=True) / n
        second = second - (weights * second).sum(axis=-1, keepdims=True) / n
        together = (weights * first * second).sum(axis=-1)
        spread = np.sqrt((weights * first**2).sum(axis=-1) * (weights * second**2).sum(axis=-1))
        return np.where(spread > 0, together / spread, np.nan)[()]


def _groups(scores, risk, weights):
    """Return sizes, mean risks and what precedes each group of tied scores, lowest score first."""
    weights = _weights(scores, weights)
    order, start, _ = _sorted_groups(scores)
    size = np.add.reduceat(weights[..., order], start, axis=-1)
    total = np.add.reduceat((weights * risk)[..., order], start, axis=-1)
    end = np.cumsum(size, axis=-1)
    mean = np.where(size > 0, _ratio(total, size), 0)
    before = np.cumsum(total, axis=-1) - total
    return {
        "size": size,
        "mean": mean,
        "start": end - size,
        "end": end,
        "risk_before": before,
        "n": end[..., -1],
    }


def _area(scores, risk, weights):
    group = _groups(scores, risk, weights)
    harmonic = np.concatenate([[0.0], np.cumsum(1 / np.arange(1, int(group["n"].max()) + 1))])
    start, end = (group[key].astype(np.int64) for key in ("start", "end"))
    rest = group["risk_before"] - group["start"] * group["mean"]
    parts = group["mean"] * group["size"] + rest * (harmonic[end] - harmonic[start])
    return _ratio(parts.sum(axis=-1), group["n"])


def _ratio(total, n):
    return np.divide(total, n, out=np.full(np.shape(total), np.nan), where=n > 0)
