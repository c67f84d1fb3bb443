"""Comparison: what every two models of a study differ by on the patients they share (definitions, section 9).

A row has the columns of a cohort's metrics. Its value is that of `model` minus that of `reference_model`, the first
and the second of the pair in the order of the configuration. Both models have the same resamples of subjects. A mask
that holds a prediction holds other voxels for each model; `brain` and `reference_5mm` are the same for both.

One family of tests is confirmatory (`_tests`); every other row has an interval and no p.
"""

from collections import defaultdict
from dataclasses import dataclass
from itertools import combinations
from types import SimpleNamespace

import numpy as np
import pyarrow as pa

from segtrust import intervals, metrics, paired, strata
from segtrust.cohort import (
    PRIMARY,
    SEGMENTATION_RANGES,
    cases_of,
    range_of,
    studentised,
    values_table,
)
from segtrust.errors import SegtrustError, raise_if_any
from segtrust.jobs import log_line
from segtrust.patients import AGREEMENT_COLUMNS
from segtrust.pool import HeldTally, Subset, pooled_metrics
from segtrust.regions import REGIONS
from segtrust.rows import Rows
from segtrust.tally import PROBABILITY, Tally
from segtrust.values import COUNTS, Key

SEGMENTATION = (*AGREEMENT_COLUMNS, "dice_lesionwise", "volume_ml", "volume_error_ml", "pairwise_dice")
N_BINS = 15  # of the calibration error that is tested
# differences of pooled metrics that are closer than this differ by rounding: resamples are in single precision
POOLED_SLACK, MEDIAN_SLACK = 1e-6, 1e-12
ROWS_AT_ONCE = 500  # resamples of strata


class _Model:
    """One model's patients of split test, sorted by name, and the scores of those of split calibration.

    numbers : {Key: float64 (n_cases,)}, every metric of each case, NaN where it is undefined; those of segmentation
        have no measure
    cases, fitted : {region: as of `cohort.cases_of`} and {region: scores of the calibration split}
    """

    def __init__(self, name, tallies, patients):
        patients = patients.reset_index(drop=True).sort_values("patient", kind="stable")
        sources = [HeldTally(tally) if isinstance(tally, Tally) else tally for tally in tallies]
        test, calibration = (patients.index[patients["split"] == split] for split in ("test", "calibration"))
        if test.empty:
            raise SegtrustError(
                f"{name}: no patient of the split `test` has a reference, so there is nothing to compare. "
                "Give `seg` and `split: test` in the patient sheet."
            )
        self.name = name
        self.sources = [sources[k] for k in test]
        self.patients = patients.loc[test].reset_index(drop=True)
        self.passes = max(int(source.tally.scalars["passes"]) for source in self.sources)
        self.available = frozenset.intersection(*(source.tally.available for source in self.sources))
        self.cases = {region: cases_of(self.sources, region) for region in REGIONS}
        fitting = [sources[k] for k in calibration]
        self.fitted = {region: cases_of(fitting, region)["scores"].get(PRIMARY, np.empty(0)) for region in REGIONS}
        self.numbers = self._numbers()

    def _numbers(self):
        keys, table = values_table(self.sources)
        numbers = dict(zip(keys, table.T, strict=True))
        for region, table in self.cases.items():
            columns = {name: table[name] for name in SEGMENTATION}
            columns["absolute_delta_dice"] = np.abs(table["delta_dice"])
            numbers |= {Key(region, None, None, name, None): values for name, values in columns.items()}
        return numbers


@dataclass(frozen=True)
class _Pair:
    """Two models and the patients they share.

    cases : two int arrays (n,), the places of the shared patients among those of each model
    draws : intervals.Draws of the shared patients; exchanged : bool (1 + N, n), of `paired.exchanges`
    """

    first: _Model
    second: _Model
    cases: tuple
    draws: intervals.Draws
    exchanged: np.ndarray

    @classmethod
    def of(cls, first, second, n_resamples, seed):
        _, *cases = np.intersect1d(first.patients["patient"], second.patients["patient"], return_indices=True)
        subjects = first.patients["subject"].iloc[cases[0]].to_numpy()
        draws = intervals.draw(subjects, n_resamples, seed)
        return cls(first, second, tuple(cases), draws, paired.exchanges(subjects, [seed, *b"exchange"]))

    @property
    def sides(self):
        return list(zip((self.first, self.second), self.cases, strict=True))

    @property
    def available(self):
        """Return the series that both models have."""
        return self.first.available & self.second.available

    @property
    def passes(self):
        """Return the number of passes of both models, None where they differ."""
        return self.first.passes if self.first.passes == self.second.passes else None

    @property
    def keys(self):
        """Return the metrics of cases that both models have, a list."""
        return [key for key in self.first.numbers if key in self.second.numbers]

    def numbers(self, key):
        """Return a metric of each shared case under the first and under the second model, float64 (2, n)."""
        return np.stack([model.numbers[key][cases] for model, cases in self.sides])


def comparison(models, *, n_resamples, seed, n_bins, threads=1, log=log_line):
    """Return the paired differences between models, a pyarrow Table with the columns of a cohort's metrics.

    models : dict from the name of a model, in the order of the configuration, to (tallies, patients), as
        `segtrust.cohort.cohort` takes them; patients without a namesake under the other model are left out of a pair
    n_resamples, seed : of the bootstrap
    n_bins : list of numbers of bins of calibration errors
    threads : of the processor
    log : function that is told of each pair

    Only patients of the split `test` enter; those of `calibration` set the cut-offs of strata. Rows that only one model
    has (no deterministic pass, a single pass) are left out. `n_voxels` is null where the models' masks differ,
    `n_cases` counts the cases that both models have the number of, `passes` is null where the models' differ.

    Raises SegtrustError for fewer than two models, and Problems with every pair that shares no patient.
    """
    if len(models) < 2:
        raise SegtrustError(f"a comparison needs two models, found {', '.join(models) or 'none'}")
    models = [_Model(name, *held) for name, held in models.items()]
    _check_shared(models)
    pairs = [_Pair.of(*two, n_resamples, seed) for two in combinations(models, 2)]
    for pair in pairs:
        _tell(pair, log)
    tests = [_tests(pair, threads) for pair in pairs]
    adjusted = paired.holm([p for family in tests for p in family.values()])
    of_pairs = np.split(adjusted, np.cumsum([len(family) for family in tests])[:-1])
    tables = [
        _Differences(pair, family, dict(zip(family, own, strict=True)))
        for pair, family, own in zip(pairs, tests, of_pairs, strict=True)
    ]
    for rows in tables:
        _patient_means(rows)
        _overlaps(rows)
    _pooled(tables, list(n_bins), threads)
    for rows in tables:
        for region in REGIONS:
            _triage(rows, region)
    return pa.concat_tables([rows.table() for rows in tables]).combine_chunks()


def _check_shared(models):
    raise_if_any(
        [
            f"{first.name} and {second.name} have no patient in common, so they cannot be compared. They hold "
            + " and ".join(f"{len(one.patients)} ({one.patients['patient'].iloc[0]}, …)" for one in (first, second))
            + " patients of split test; evaluate the same patients under both."
            for first, second in combinations(models, 2)
            if not set(first.patients["patient"]) & set(second.patients["patient"])
        ]
    )


def _tell(pair, log):
    log(f"{pair.first.name} minus {pair.second.name}: {len(pair.cases[0])} patients, {pair.draws.n_subjects} subjects")
    if pair.passes is None:
        log(
            f"  {pair.first.passes} and {pair.second.passes} passes: `passes` is null, and part of a difference in "
            "uncertainty may come from their number"
        )


class _Differences:
    """Rows of one pair.

    p, adjusted : {(Key, pooling): p}, of the confirmatory family, and by Holm over all pairs
    """

    def __init__(self, pair, p, adjusted):
        self.pair = pair
        self._p, self._adjusted = p, adjusted
        self._rows = Rows(SimpleNamespace(model=pair.first.name, passes=pair.passes))

    def add(self, key, pooling, value, interval, n_cases, **more):
        """Append the row of a Key; more : further columns."""
        if key.measure is not None and key.mask is None and pooling == "patient_mean":
            more["conditional_on_reference"] = True  # what is measured over bands of distance to the reference
        self._rows.add(
            key.metric,
            value,
            interval,
            n_cases,
            region=key.region,
            mask=key.mask,
            measure=key.measure,
            n_bins=key.n_bins,
            pooling=pooling,
            reference_model=self.pair.second.name,
            p_value=self._p.get((key, pooling)),
            p_value_holm=self._adjusted.get((key, pooling)),
            **more,
        )

    def table(self):
        return self._rows.table()


# --- the confirmatory family --------------------------------------------------------------------------------


def _signed_ranked(region):
    """Return the metrics of patients that are tested by signed ranks, with their Hodges–Lehmann difference."""
    return Key(region, None, None, "dice", None), Key(region, "brain", PROBABILITY, "brier", None)


def _tests(pair, threads):
    """Return the p of the confirmatory family of one pair, {(Key, pooling): p}; NaN for fewer than 6 subjects.

    Patient means of Dice and of the Brier score in the brain by Wilcoxon's test. The pooled calibration error near the
    prediction, the pooled average precision near the tumour, and the Dice of the most uncertain quarter of the patients
    minus that of the least: by exchanging the two models' results within subjects. Halves are not tested.
    """
    family = {}
    for region in REGIONS:
        for key in _signed_ranked(region):
            differences = paired.subject_means(np.subtract(*pair.numbers(key)), pair.draws.subjects)
            family[key, "patient_mean"] = paired.signed_rank_p(differences)
    calibration = "predicted_5mm", PROBABILITY, "ece_class_probability", N_BINS
    ranking = "tumour_5mm", "entropy", "aupr", None
    family |= _exchanged_pools(pair, *calibration, threads, brief=True)
    family |= _exchanged_pools(pair, *ranking, threads, brief=False)
    for region in REGIONS:
        triage = _Triage(pair, region)
        if triage.metric == "q4_minus_q1":
            family[triage.key, "patient_level"] = triage.exchange_p()
    return family


def _exchanged_pools(pair, mask, measure, metric, n_bins, threads, brief):
    """Return {(Key, "pooled"): p} of one pooled metric in every region, both models' tallies exchanged.

    brief : leave out what costs most and is not asked for

    Each draw is a weighted sum of the tallies of both models: of every case those of one, or of the other.
    """
    n = len(pair.cases[0])
    sources = [model.sources[case] for model, cases in pair.sides for case in cases]
    everyone = np.arange(2 * n)
    sides = (~pair.exchanged, pair.exchanged), (pair.exchanged, ~pair.exchanged)
    subsets = [
        Subset(everyone, intervals.Draws(everyone, np.concatenate(side, axis=1, dtype=np.float32))) for side in sides
    ]
    run = pooled_metrics(
        sources,
        subsets,
        n_bins=[N_BINS],
        threads=threads,
        brief=brief,
        wanted=lambda region, *row: region in REGIONS and row == (mask, measure),
    )
    family = {}
    for first, second in zip(run, run, strict=True):
        here = (first.n_voxels[:n] > 0) & (first.n_voxels[n:] > 0)
        enough = pair.draws.count_subjects(here) >= intervals.LEAST_SUBJECTS
        # both hold the same tallies, so that what shifts resamples to the value of the fine bins is the same
        differences = first.resampled[metric, n_bins] - second.resampled[metric, n_bins]
        p = paired.exchange_p(differences, POOLED_SLACK) if enough else np.nan
        family[Key(first.region, mask, measure, metric, n_bins), "pooled"] = p
    return family


# --- rows ---------------------------------------------------------------------------------------------------


def _patient_means(rows):
    """Add the mean over patients of the difference of every metric, and the Hodges–Lehmann differences."""
    pair = rows.pair
    keys = [key for key in pair.keys if key.metric not in (*COUNTS, "auroc_certificate")]
    table = np.stack([np.subtract(*pair.numbers(key)) for key in keys], axis=1)
    ranges = [SEGMENTATION_RANGES.get(key.metric, (0, 1)) if key.measure is None else range_of(key) for key in keys]
    bounds = np.array([(low - high, high - low) for low, high in ranges], np.float64)
    for key, values, interval in zip(keys, table.T, studentised(table, pair.draws, bounds), strict=True):
        exists = np.isfinite(values)
        n_cases = exists.sum()
        value = values[exists].mean() if n_cases else np.nan
        n_voxels = _same_voxels(pair, key, exists)
        rows.add(key, "patient_mean", value, interval, n_cases, n_voxels=n_voxels)
        if key in _signed_ranked(key.region):
            value, interval = paired.hodges_lehmann(paired.subject_means(values, pair.draws.subjects))
            named = key._replace(metric=f"{key.metric}_hodges_lehmann")
            rows.add(named, "patient_mean", value, interval, n_cases, n_voxels=n_voxels)


def _same_voxels(pair, key, exists):
    """Return the number of voxels that a metric of cases is about; None where it has none, or other ones per model."""
    counted = key._replace(metric="n_voxels", n_bins=None)
    if counted not in pair.first.numbers or counted not in pair.second.numbers:
        return None
    first, second = pair.numbers(counted)
    return first[exists].sum() if np.array_equal(first, second) else None


def _overlaps(rows):
    """Add the differences of Dice, sensitivity and precision of the pooled voxels of each region."""
    pair = rows.pair
    weights = np.concatenate([np.ones((1, len(pair.cases[0]))), pair.draws.weights])
    for region in REGIONS:
        found = []
        for model, cases in pair.sides:
            table = model.cases[region]
            names = ("true_positives", "n_predicted", "n_reference")
            both, predicted, reference = (weights @ table[name][cases] for name in names)
            found.append(
                {
                    "dice": metrics.dice(both, predicted - both, reference - both),
                    "sensitivity": metrics.sensitivity(both, reference - both),
                    "precision": metrics.precision(both, predicted - both),
                }
            )
        for name in found[0]:
            value, *resampled = found[0][name] - found[1][name]
            interval = intervals.expanded_percentile(value, np.array(resampled), pair.draws.n_subjects)
            rows.add(Key(region, None, None, name, None), "pooled", value, interval, len(pair.cases[0]))


def _pooled(tables, n_bins, threads):
    """Add the differences of every metric of pooled voxels; tables : list of _Differences.

    Pairs whose models have the same series are resampled in one run, in which every model is read once.
    """
    groups = defaultdict(list)
    for rows in tables:
        groups[rows.pair.available].append(rows)
    for members in groups.values():
        first_case, sources, subsets, number = {}, [], [], {}
        for model, cases, draws in [(*side, rows.pair.draws) for rows in members for side in rows.pair.sides]:
            if model.name not in first_case:
                first_case[model.name] = len(sources)
                sources += model.sources
            if (model.name, cases.tobytes()) not in number:
                number[model.name, cases.tobytes()] = len(subsets)
                subsets.append(Subset(first_case[model.name] + cases, draws))
        run = pooled_metrics(sources, subsets, n_bins=n_bins, threads=threads)
        # a row comes once for every subset
        for held in zip(*[run] * len(subsets), strict=True):
            for rows in members:
                sides = [held[number[model.name, cases.tobytes()]] for model, cases in rows.pair.sides]
                _add_pooled(rows, *sides)


def _add_pooled(rows, first, second):
    draws = rows.pair.draws
    here = (first.n_voxels > 0) & (second.n_voxels > 0)
    n_voxels = first.n_voxels.sum() if np.array_equal(first.n_voxels, second.n_voxels) else None
    for (metric, bins), value in first.metrics.items():
        if metric in (*COUNTS, "auroc_certificate"):
            continue
        value = value - second.metrics[metric, bins]
        resampled = first.resampled[metric, bins] - second.resampled[metric, bins]
        n_subjects = draws.count_subjects(here)
        if metric.startswith(("ece_", "ace_", "mce_")):
            # what noise adds to the error of a resample differs between models, and does not cancel
            interval = intervals.envelope(value, resampled, n_subjects, lowest=-np.inf)
        else:
            interval = intervals.expanded_percentile(value, resampled, n_subjects)
        key = Key(first.region, first.mask, first.measure, metric, bins)
        rows.add(key, "pooled", value, interval, here.sum(), n_voxels=n_voxels)


# --- triage -------------------------------------------------------------------------------------------------


class _Triage:
    """Dice of the most uncertain stratum minus that of the least, under two models, by the primary score.

    Cut-offs are each model's own: those of the calibration split are held fixed, those that the evaluated cases set
    themselves are found anew in every resample and exchange. Fewer than 8 scored cases give halves.
    """

    def __init__(self, pair, region):
        self._pair = pair
        tables = [(model.cases[region], cases) for model, cases in pair.sides]
        self._scores = np.stack([table["scores"][PRIMARY][cases] for table, cases in tables])
        self._dice = np.stack([table["dice"][cases] for table, cases in tables])
        self._cuts = [
            strata.Cutoffs.of(model.fitted[region], scores, anew=True)
            for (model, _), scores in zip(pair.sides, self._scores, strict=True)
        ]
        scored = np.isfinite(self._scores)
        self.scored = scored.all(axis=0)
        self.n_subjects = int(pair.draws.count_subjects(self.scored))
        n_fitted = min(len(cut.scores) for cut in self._cuts)
        self._scheme = strata.schemes(scored.sum(axis=1).min(), n_fitted)[0]
        self.metric = "q4_minus_q1" if self._scheme == "quartiles" else "h2_minus_h1"
        self.key = Key(region, None, PRIMARY[1], self.metric, None)
        self.in_sample = any(cut.source == "in_sample" for cut in self._cuts)

    def difference(self, weights):
        """Return the difference between the models, (n,); weights : (n, n_cases)."""
        sides = zip(self._scores, self._dice, self._cuts, strict=True)
        return np.subtract(*(self._outer(scores, dice, cut, weights) for scores, dice, cut in sides))

    def exchange_p(self):
        """Return the p of the difference: score and Dice of a subject change places together."""
        if self.n_subjects < intervals.LEAST_SUBJECTS:
            return np.nan
        scores, dice, exchanged = self._scores.ravel(), self._dice.ravel(), self._pair.exchanged
        sides = (~exchanged, exchanged), (exchanged, ~exchanged)
        found = [
            self._outer(scores, dice, cut, np.concatenate(side, axis=1))
            for side, cut in zip(sides, self._cuts, strict=True)
        ]
        return paired.exchange_p(np.subtract(*found), MEDIAN_SLACK)

    def _outer(self, scores, dice, cut, weights):
        scored = np.isfinite(scores)
        if not scored.any():
            return np.full(len(weights), np.nan)
        scores, dice, weights = scores[scored], dice[scored], weights[:, scored]
        cuts = None if cut.anew else strata.cutoffs(cut.scores, strata.SCHEMES[self._scheme])
        parts = []
        for first in range(0, len(weights), ROWS_AT_ONCE):
            part = weights[first : first + ROWS_AT_ONCE].astype(np.float64)
            parts.append(strata.median_difference(dice, *strata.outer_strata(scores, self._scheme, cuts, part)))
        return np.concatenate(parts)


def _triage(rows, region):
    """Add the difference between the models of how much worse the most uncertain patients are segmented."""
    triage, draws = _Triage(rows.pair, region), rows.pair.draws
    (value,) = triage.difference(np.ones((1, len(triage.scored))))
    interval = intervals.percentile(value, triage.difference(draws.weights), triage.n_subjects)
    if triage.in_sample:
        interval = interval._replace(label=f"{interval.label}; in_sample cut-offs")
    rows.add(triage.key, "patient_level", value, interval, triage.scored.sum(), aggregation=PRIMARY[0])
