"""Triage: does a patient's uncertainty predict a bad segmentation?

Everything here works on one score and one Dice per case. A high score means uncertain, risk = 1 − Dice, and
cases whose prediction is empty have no score (NaN): an empty prediction is not confidence. Formulas:
definitions §8.

Functions that are resampled take `weights`, whole numbers of shape (…, n_cases) that say how often each case
counts, and return the leading shape; without weights every case counts once. Copies of a case are ties.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from segtrust import intervals

SCHEMES = {"quartiles": 4, "halves": 2}
STRATA = {"quartiles": ("Q1", "Q2", "Q3", "Q4"), "halves": ("H1", "H2")}
LEAST_CASES_FOR_QUARTILES = 8
N_PERMUTATIONS = 9_999
MISSING_LAST = "_missing_last"
_UNDEFINED = intervals.Intervals(np.nan, np.nan, np.nan, "none: undefined")


@dataclass(frozen=True)
class Cutoffs:
    """Where the cut-offs of strata come from.

    scores : float64 without NaN, whose quantiles they are
    source : "calibration", or "in_sample" where they are those of the evaluated cases
    anew : whether a bootstrap resample finds its own; what the evaluated cases themselves set is set anew
    """

    scores: np.ndarray
    source: str
    anew: bool

    @classmethod
    def of(cls, calibration, evaluated, anew):
        """Return cut-offs from the calibration split where it has a score, else from the evaluated cases.

        calibration, evaluated : float64, NaN where a case has no score
        anew : False where `evaluated` holds more cases than are stratified
        """
        fitted = calibration[np.isfinite(calibration)]
        if len(fitted):
            return cls(fitted, "calibration", False)
        return cls(evaluated[np.isfinite(evaluated)], "in_sample", anew)


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


def stratify(scores, dice, absent, subjects, cut):
    """Return the strata of one score: a list of dicts, one per scheme and stratum.

    scores : float64 (n_cases,), NaN where the prediction is empty
    dice : float64 (n_cases,)
    absent : bool (n_cases,), the reference holds no such region; splits the missing ones
    subjects : (n_cases,), any values
    cut : Cutoffs

    Every scheme lists its strata from the lowest score to the highest, then the cases without a score, in all
    and split into missed and truly absent. An empty stratum keeps a row with null values.
    """
    scored = np.isfinite(scores)
    groups = {"missing_region": ~scored, "missing_region_missed": ~scored & ~absent}
    groups["missing_region_absent"] = ~scored & absent
    rows = []
    for scheme in schemes(scored.sum(), len(cut.scores)):
        number = np.full(len(scores), -1)
        if len(cut.scores):
            number[scored] = assign(scores[scored], cutoffs(cut.scores, SCHEMES[scheme]))
        members = {name: number == k for k, name in enumerate(STRATA[scheme])} | groups
        for name, inside in members.items():
            rows.append({"scheme": scheme, "stratum": name, "cutoff_source": cut.source})
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
    order, start, _ = _sorted_groups(dice)
    upper, lower = (np.add.reduceat(part[..., order], start, axis=-1) for part in (highest, lowest))
    below = np.cumsum(lower, axis=-1)
    n_lower = below[..., -1]
    # pairs below minus pairs above: those up to and including the group's, twice, less the group's own, less all
    wins = (upper * (2 * below - lower - n_lower[..., np.newaxis])).sum(axis=-1)
    return _ratio(wins, upper.sum(axis=-1) * n_lower)


def permutation_p(dice, highest, lowest, subjects, seed):
    """Return the two-sided p of a difference of medians over 9,999 random relabellings, (1 + #)/(1 + N).

    dice : float64 (n_cases,)
    highest, lowest : bool (n_cases,), the cases of each stratum; NaN where one is empty
    subjects : (n_cases,), any values

    Sessions of one person are not exchangeable with those of another one by one. Persons are: the Dice of all sessions
    of a person changes places with that of another with as many sessions in the two strata.
    """
    used = highest | lowest
    dice, highest, subjects = dice[used], highest[used], np.asarray(subjects)[used]
    if not highest.any() or highest.all():
        return np.nan
    _, number, size = np.unique(subjects, return_inverse=True, return_counts=True)
    shuffled = np.tile(dice, (N_PERMUTATIONS, 1))
    generator = np.random.default_rng(seed)
    for n_sessions in np.unique(size):
        of_size = np.flatnonzero(size[number] == n_sessions)
        blocks = of_size[np.argsort(number[of_size], kind="stable")].reshape(-1, n_sessions)
        order = generator.permuted(np.tile(np.arange(len(blocks)), (N_PERMUTATIONS, 1)), axis=1)
        shuffled[:, blocks.ravel()] = dice[blocks[order]].reshape(N_PERMUTATIONS, -1)
    drawn = np.median(shuffled[:, highest], axis=1) - np.median(shuffled[:, ~highest], axis=1)
    # Equal medians may differ by rounding when they are means of two order statistics.
    as_extreme = (np.abs(drawn) >= abs(np.median(dice[highest]) - np.median(dice[~highest])) - 1e-12).sum()
    return float((1 + as_extreme) / (1 + N_PERMUTATIONS))


class Cases:
    """The cases of one region, as every score of them is judged.

    dice : float64 (n_cases,)
    volumes : dict of float64 (n_cases,) with keys `predicted_volume` and `reference_volume`
    draws : intervals.Draws of the cases; None for no intervals
    subjects : (n_cases,), any values
    failure_dice : a segmentation with a lower Dice has failed
    """

    def __init__(self, dice, volumes, draws, subjects, failure_dice):
        self.dice = dice
        self.volumes = volumes
        self.draws = draws
        self.subjects = np.asarray(subjects)
        self.failure_dice = failure_dice
        self._parts = {}

    def part(self, inside):
        """Return what scores of some of the cases share, computed once; inside : bool (n_cases,)."""
        key = inside.tobytes()
        if key not in self._parts:
            self._parts[key] = _Part(self, inside)
        return self._parts[key]


class _Part:
    """Some cases, with the ranks of their Dice and volumes in the cohort and in every resample."""

    def __init__(self, cases, inside):
        self.dice = cases.dice[inside]
        self.volumes = {name: volume[inside] for name, volume in cases.volumes.items()}
        self.failed = self.dice < cases.failure_dice
        self.draws = cases.draws
        self.n_subjects = int(cases.draws.count_subjects(inside)) if cases.draws else 0
        self.weights = [np.ones((1, len(self.dice)))]
        if cases.draws:
            # single precision holds the ranks of a resample exactly
            self.weights.append(cases.draws.weights[:, inside].astype(np.float32))

    @cached_property
    def ranked(self):
        """Return {name: [_Ranked in the cohort, and in resamples]} of the Dice and the volumes."""
        values = {"dice": self.dice, **self.volumes}
        return {name: [_Ranked(value, weights) for weights in self.weights] for name, value in values.items()}

    @cached_property
    def least_area(self):
        """Return the areas under the risk–coverage curve of the risk itself, [in the cohort, in resamples]."""
        return [_area(1 - self.dice, 1 - self.dice, weights) for weights in self.weights]


def triage(scores, cases, cut, seed):
    """Return how well one score finds bad segmentations: a list of dicts, one per metric.

    scores : float64 (n_cases,), NaN where the prediction is empty
    cases : Cases
    cut : Cutoffs
    seed : of the permutation test; None for no test

    Each dict has metric, value, interval (intervals.Intervals), n_cases, p_value. Metrics are over the cases with
    a score; those named `…_missing_last` are over all, with empty predictions as the most uncertain.
    """
    scored, draws = np.isfinite(scores), cases.draws
    rows = _ranking(scores[scored], cases.part(scored), "")
    if scored.all():
        rows += [row | {"metric": row["metric"] + MISSING_LAST} for row in rows]
    else:
        rows += _ranking(np.where(scored, scores, np.inf), cases.part(scored | True), MISSING_LAST)
    scheme = schemes(scored.sum(), len(cut.scores))[0]
    name = "q4_minus_q1" if scheme == "quartiles" else "h2_minus_h1"
    if scored.sum() < 2 or np.ptp(scores[scored]) == 0:
        return rows + [_row(key, np.nan, _UNDEFINED, scored.sum()) for key in (name, "cliffs_delta", "mann_whitney_u")]
    scores, dice = scores[scored], cases.dice[scored]
    cuts = None if cut.anew else cutoffs(cut.scores, SCHEMES[scheme])
    highest, lowest = outer_strata(scores, scheme, cuts)
    resampled = outer_strata(scores, scheme, cuts, cases.part(scored).weights[1]) if draws else None
    for key, function in {name: median_difference, "cliffs_delta": cliffs_delta}.items():
        value, interval = function(dice, highest, lowest), _UNDEFINED
        if draws:
            interval = intervals.percentile(value, function(dice, *resampled), cases.part(scored).n_subjects)
        if cut.source == "in_sample":
            interval = interval._replace(label=f"{interval.label}; in_sample cut-offs")
        rows.append(_row(key, value, interval, len(dice)))
    if seed is not None:
        rows[-2]["p_value"] = permutation_p(dice, highest > 0, lowest > 0, cases.subjects[scored], seed)
    u = (rows[-1]["value"] + 1) / 2 * highest.sum() * lowest.sum()
    nothing = intervals.Intervals(np.nan, np.nan, np.nan, "none: see cliffs_delta")
    return [*rows, _row("mann_whitney_u", u, nothing, len(dice))]


def _ranking(scores, part, ending):
    """Return the rows of every metric that needs no strata; scores : of the cases of the part."""
    if len(scores) > 1:
        found = [_ranking_values(scores, part, number) for number in range(len(part.weights))]
    else:
        nothing = dict.fromkeys(_RANKING, np.full(1, np.nan))
        found = [nothing, {name: np.full(part.draws.n_resamples, np.nan) for name in _RANKING} if part.draws else None]
    rows = []
    for name in _RANKING:
        value, interval = found[0][name][0], _UNDEFINED
        if part.draws:
            method = intervals.percentile if "spearman" in name else intervals.expanded_percentile
            interval = method(value, found[1][name], part.n_subjects)
        rows.append(_row(name + ending, value, interval, len(scores)))
    failed, auroc = part.failed, failure_auroc(scores, part.failed)
    interval = intervals.newcombe(auroc, int(failed.sum()), int((~failed).sum()), part.n_subjects)
    rows.append(_row("failure_auroc" + ending, auroc, interval, len(scores)))
    return rows


_VOLUMES = ("predicted_volume", "reference_volume")
_RANKING = ("spearman", *(f"partial_spearman_{name}" for name in _VOLUMES), "aurc", "e_aurc", "augrc")


def _ranking_values(scores, part, number):
    """Return {metric: values} in the cohort (number 0) or in resamples (1)."""
    weights, risk = part.weights[number], 1 - part.dice
    score, dice = _Ranked(scores, weights), part.ranked["dice"][number]
    found = {"spearman": _correlation(score, dice)}
    for name in _VOLUMES:
        found[f"partial_spearman_{name}"] = _partial(score, dice, part.ranked[name][number])
    varies = np.min(scores) < np.max(scores)
    area = _area(scores, risk, weights) if varies else np.full(len(weights), np.nan)
    general = _general_area(scores, risk, weights) if varies else np.full(len(weights), np.nan)
    return found | {"aurc": area, "e_aurc": area - part.least_area[number], "augrc": general}


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
    return _correlation(_Ranked(first, weights), _Ranked(second, weights))[()]


def partial_spearman(first, second, given, weights=None):
    """Return Spearman's ρ of first and second given a third: the correlation of the rank residuals."""
    weights = _weights(first, weights)
    return _partial(*(_Ranked(values, weights) for values in (first, second, given)))[()]


class _Ranked:
    """Ranks of values that count `weights` times each, ties with their mean rank.

    ranks : (…, n_cases), less their mean; weighted : the same times the weights; spread : (…,), Σ weight · rank²
    """

    def __init__(self, values, weights):
        order, start, number = _sorted_groups(values)
        size = weights[..., order]
        if len(start) < len(order):
            size = np.add.reduceat(size, start, axis=-1)
        rank = np.cumsum(size, axis=-1)
        n = rank[..., -1:]
        rank = rank - size / 2 - n / 2  # less the mean rank, (n + 1)/2
        self.ranks = rank[..., number]
        self.weighted = self.ranks * weights
        self.spread = np.einsum("...i,...i->...", self.ranks, self.weighted)


def _correlation(first, second):
    together = np.einsum("...i,...i->...", first.ranks, second.weighted)
    # in double precision: products of two spreads are large
    spread = np.sqrt(np.asarray(first.spread, np.float64) * second.spread)
    return np.divide(together, spread, out=np.full(np.shape(spread), np.nan), where=spread > 0)


def _partial(first, second, given):
    direct = _correlation(first, second)
    through = [_correlation(ranked, given) for ranked in (first, second)]
    rest = (1 - through[0] ** 2) * (1 - through[1] ** 2)
    with np.errstate(invalid="ignore", divide="ignore"):
        # Nothing is left to correlate where a rank follows from the third; below this there is rounding of a square.
        least = 1e-12 if first.ranks.dtype == np.float64 else 1e-5
        return np.where(rest > least, (direct - through[0] * through[1]) / np.sqrt(np.maximum(rest, 0)), np.nan)


def failure_auroc(scores, failed):
    """Return the AUROC of the score for failed cases (bool), ties count one half; NaN if undefined."""
    if not failed.any() or failed.all() or scores.min() == scores.max():
        return np.nan
    succeeded = np.sort(scores[~failed])
    below = np.searchsorted(succeeded, scores[failed], side="left")
    not_above = np.searchsorted(succeeded, scores[failed], side="right")
    return float((below + not_above).sum() / 2 / (failed.sum() * len(succeeded)))


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
    return np.where(np.min(scores) < np.max(scores), _general_area(scores, risk, weights), np.nan)[()]


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


def _groups(scores, risk, weights):
    """Return sizes, mean risks and what precedes each group of tied scores, lowest score first."""
    weights = _weights(scores, weights)
    order, start, _ = _sorted_groups(scores)
    size = weights[..., order]
    total = size * risk[order]
    if len(start) < len(order):
        size, total = (np.add.reduceat(part, start, axis=-1) for part in (size, total))
    end = np.cumsum(size, axis=-1)
    mean = np.divide(total, size, out=np.zeros_like(total), where=size > 0)
    before = np.cumsum(total, axis=-1) - total
    return {
        "size": size,
        "mean": mean,
        "total": total,
        "start": end - size,
        "end": end,
        "risk_before": before,
        "n": end[..., -1],
    }


def _area(scores, risk, weights):
    group = _groups(scores, risk, weights)
    harmonic = np.concatenate([[0.0], np.cumsum(1 / np.arange(1, int(group["n"].max()) + 1))])
    reached = harmonic[group["end"].astype(np.int32)]
    steps = np.diff(reached, axis=-1, prepend=0)  # a group begins where the one before ends
    rest = group["risk_before"] - group["start"] * group["mean"]
    return _ratio((group["total"].sum(axis=-1) + np.einsum("...i,...i->...", rest, steps)), group["n"])


def _general_area(scores, risk, weights):
    group = _groups(scores, risk, weights)
    size = group["size"]
    parts = np.einsum("...i,...i->...", size, group["risk_before"])
    parts = parts + np.einsum("...i,...i->...", group["total"], size + 1) / 2
    return _ratio(parts, group["n"].astype(np.float64) ** 2)


def _ratio(total, n):
    return np.divide(total, n, out=np.full(np.shape(total), np.nan), where=n > 0)
