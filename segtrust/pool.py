"""Pool: the tallies of many patients, read region by region, as sums over subsets and as coarse counts per patient.

A pooled metric is that of the sum of the tallies. A bootstrap resample is a weighted sum of them; its score bins are
coarser than the tallies', and the result is shifted so that the unweighted sum gives the value of the fine bins. What
is held of every patient at a time is kept below a budget: memory does not grow with the number of measures or masks.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache, cached_property
from itertools import islice
from weakref import WeakKeyDictionary

import numpy as np
import pyarrow.parquet as pq
from threadpoolctl import threadpool_limits

from segtrust import metrics, values
from segtrust.bins import JOINT_BINS, SCORE_BINS
from segtrust.errors import SegtrustError
from segtrust.files import provenance_of
from segtrust.intervals import Draws
from segtrust.progress import progress
from segtrust.tally import (
    ALL,
    CLASS_KINDS,
    JOINT_MASKS,
    LAYOUTS,
    PARTS,
    PROBABILITY,
    TALLY_REGIONS,
    Cells,
    Tally,
    about_of,
    counts_of,
)

BUDGET = 2**30  # bytes of coarse counts held at a time
SCORE_STEP = 2  # fine score bins in one of a resample
# fine bins in one of a resample, between the edges of equal bins; most confidences crowd into a few bins
BINNED_STEP = {"probability": 3, "confidence": 1}
JOINT_STEP = 4  # rows and columns of a joint histogram in one of a resample
NEWTON_STEPS = 4
BATCH = 250  # resamples computed at a time: as many as a processor's cache holds
AHEAD = 16  # tallies read ahead

_N_COARSE = -(-len(SCORE_BINS) // SCORE_STEP)
_N_JOINT = JOINT_BINS // JOINT_STEP
_FARTHEST_FIT = 1e3  # a resample whose classes are separable has no finite fit
RECALIBRATION = ("calibration_intercept", "calibration_slope")
_WRONG = np.array([0, 1, 1, 0])  # of the outcomes TP, FP, FN, TN


# --- where tallies are --------------------------------------------------------------------------------------


# a tally does not change: its metrics are computed once, in however many cohorts it is
_METRICS = WeakKeyDictionary()


class HeldTally:
    """A tally in memory, as `pooled_metrics` reads it.

    tally : Tally, whose counts, cases and numbers are used as they are; metrics, curves : of `segtrust.values`
    early : dict from a number of passes to the HeldTally after them
    """

    def __init__(self, tally, brief=False):
        self.tally = tally
        self._brief = brief
        self.early = {passes: HeldTally(early, True) for passes, early in tally.convergence.items()}

    @property
    def metrics(self):
        if self.tally not in _METRICS:
            _METRICS[self.tally] = values.values_of(self.tally, brief=self._brief)
        return _METRICS[self.tally]

    @cached_property
    def curves(self):
        return values.curves_of(self.tally)

    def cells(self, region, parts):
        """Return the cells of some parts of a region, a dict from table to `Cells` as they are in a file."""
        return {name: cells for part in parts for name, cells in self.tally.cells(region, part).items()}


class StoredTally:
    """A tally in a file, of which cells are read when they are asked for; else as `HeldTally`.

    Raises SegtrustError, naming the file, for other bins or format, and for one without values.
    """

    def __init__(self, path):
        self._path = path
        schema = pq.read_metadata(path).schema.to_arrow_schema()  # what a file says of its columns is large
        try:
            about = about_of(schema)
        except SegtrustError as error:
            raise SegtrustError(f"{path}: {error}") from None
        if not about["values"]:
            raise SegtrustError(f"{path}: this tally was written without its metrics; make it again from voxels")
        self.provenance = provenance_of(schema)
        self.tally = Tally({}, counts_of(about), about["cases"], about["available"])
        fewer = {int(passes): part for passes, part in about["convergence"].items()}
        self.metrics, self.curves, metrics_of_fewer = values.from_text(
            about["values"], about["available"], {passes: part["available"] for passes, part in fewer.items()}
        )
        self._groups, group = {}, 0
        for passes, region, part, lengths in about["stretches"]:
            if sum(lengths):
                self._groups[passes, region, part] = group, lengths
                group += 1
        self.early = {}
        for passes, part in fewer.items():
            tally = Tally({}, counts_of(part), [], part["available"])
            self.early[passes] = _StoredEarly(self, passes, tally, metrics_of_fewer[passes])

    def cells(self, region, parts):
        return self._read(None, region, parts)

    def _read(self, passes, region, parts):
        found = {}
        with pq.ParquetFile(self._path) as file:
            for part in parts:
                names = PARTS[part]
                group, lengths = self._groups.get((passes, region, part), (None, [0] * len(names)))
                columns = ["cell", "n", *(f"sum_{column}" for column in range(max(map(_n_sums, names))))]
                if group is None:
                    rows = [np.empty(0, np.int64)] * len(columns)
                else:
                    read = file.read_row_group(group, columns=columns, use_threads=False)
                    rows = [read[name].to_numpy() for name in columns]
                last = 0
                for name, length in zip(names, lengths, strict=True):
                    cell, n, *sums = (column[last : last + length] for column in rows)
                    sums = sums[: _n_sums(name)]
                    found[name] = Cells(cell, n, np.stack(sums, axis=1) if sums else np.empty((length, 0)))
                    last += length
        return found


@dataclass
class _StoredEarly:
    whole: StoredTally
    passes: int
    tally: Tally
    metrics: dict
    early: dict = field(default_factory=dict)

    def cells(self, region, parts):
        return self.whole._read(self.passes, region, parts)


def _n_sums(name):
    return len(LAYOUTS[name].sums)


# --- reading ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Subset:
    """Cases that are pooled.

    cases : int array, numbers of the sources; draws : Draws of them, or None for no intervals
    group, group_value : column of the sheet and its value, None for the whole cohort
    """

    cases: np.ndarray
    draws: Draws | None
    group: str | None = None
    group_value: str | None = None


@dataclass
class Pooled:
    """Pooled metrics of one region, mask and measure (or kind of probability) over one subset.

    subset : its number
    metrics : dict from (metric, n_bins) to float; resampled : the same keys, float64 (n_resamples,); none without draws
    n_voxels : int64, by case of the subset
    total : Tally of the region, for curves
    ue_dice : UncertaintyErrorDice, for measures
    bands : dict from a number of bins to (n_resamples, bins): fractions of reliability diagrams, for probabilities
    """

    region: str
    mask: str
    measure: str
    subset: int
    metrics: dict
    resampled: dict
    n_voxels: np.ndarray
    total: Tally
    ue_dice: "UncertaintyErrorDice | None" = None
    bands: dict = field(default_factory=dict)


def pooled_metrics(sources, subsets, *, n_bins, threads, brief=False, fitting=None, wanted=None):
    """Yield a `Pooled` for each region, mask, measure and kind of probability, and each subset.

    sources : list of HeldTally or StoredTally
    subsets : list of Subset; the first is the whole cohort
    n_bins : list of numbers of bins of calibration errors
    threads : of the processor
    brief : of tallies after fewer passes
    fitting : sources of the calibration split, which set the threshold of `ue_dice`; None or empty: the whole cohort
    wanted : function from (region, mask, measure) to bool; None for all

    Series that only some sources have are left out.
    """
    available = frozenset.intersection(*(source.tally.available for source in sources))
    run = _Run(sources, subsets, n_bins, threads, brief, fitting or [], available, wanted or (lambda *_: True))
    found = (pooled for region in TALLY_REGIONS for pooled in run.region(region))
    # of tallies after fewer passes there are few, soon pooled
    yield from found if brief else progress(found, "measures pooled", total=run.n_pooled())


@dataclass
class _Run:
    sources: list
    subsets: list
    n_bins: list
    threads: int
    brief: bool
    fitting: list
    available: frozenset
    wanted: object

    def n_pooled(self):
        return len(self.subsets) * sum(len(held) for region in TALLY_REGIONS for held in self._held(region))

    def _held(self, region):
        """Return the (mask, measure) and the (mask, kind of probability) of a region that are pooled, two lists."""
        held = (of(region, self.available, self.brief) for of in (values.rows_of, values.kinds_of))
        return [[row for row in rows if self.wanted(region, *row)] for rows in held]

    def region(self, region):
        rows, kinds = self._held(region)
        n_cases, floats = len(self.sources), np.dtype(np.float32).itemsize
        if self.brief and rows:
            sums, coarse, held = _Sums(rows, n_cases, ()), _Coarse(rows, n_cases), _Calibrations(region, kinds, n_cases)
            totals = self._read(region, tuple(PARTS), [sums, coarse, held])
            yield from self._scores(region, rows, sums, coarse, [totals])
            yield from self._calibrations(region, kinds, held, totals)
            return
        if rows:
            sums = _Sums(rows, n_cases, JOINT_MASKS)
            of_sums = self._read(region, ["sums"], [sums])
            for some in _pieces(rows, 2 * _N_COARSE * floats * (n_cases + len(self.fitting))):
                coarse = _Coarse(some, n_cases)
                of_scores = self._read(region, ["scores"], [coarse])
                yield from self._scores(region, some, sums, coarse, [of_sums, of_scores])
                del coarse, of_scores  # as large as what comes next
        size = 3 * sum(len(_coarse_starts(kind)) for kind in ("probability", "confidence")) * floats * n_cases
        for some in _pieces(kinds, size * (len(CLASS_KINDS) if region == ALL else 1)) if kinds else ():
            held = _Calibrations(region, some, n_cases)
            totals = self._read(region, ["calibration"], [held])
            yield from self._calibrations(region, some, held, totals)
            del held, totals

    def _read(self, region, parts, held, sources=None, subsets=None):
        """Return dense sums per subset, and give every case's cells to what is held."""
        sources, subsets = sources or self.sources, subsets or self.subsets
        totals = [_Dense(parts) for _ in subsets]
        of_case = [[] for _ in sources]
        for number, subset in enumerate(subsets):
            for case in subset.cases:
                of_case[case].append(totals[number])
        with ThreadPoolExecutor(self.threads) as executor:
            waiting = (executor.submit(source.cells, region, parts) for source in sources)
            ahead = list(islice(waiting, AHEAD))
            for case in range(len(sources)):
                cells = ahead.pop(0).result()
                ahead += list(islice(waiting, 1))
                for total in of_case[case]:
                    total.add(cells)
                for one in held:
                    one.fill(case, cells)
        return totals

    def _scores(self, region, rows, sums, coarse, totals):
        """Yield what `pooled_metrics` does of measures; totals : dense sums per subset, of one or several parts."""
        fitting = None
        if self.fitting:
            fitting = _Coarse(rows, len(self.fitting))
            everyone = Subset(np.arange(len(self.fitting)), None)
            self._read(region, ["scores"], [fitting], self.fitting, [everyone])
        pooled = [
            Tally.of_cells(
                region, {name: cells for part in parts for name, cells in part.cells().items()}, self.available
            )
            for parts in zip(*totals, strict=True)
        ]

        def one(task):
            position, number = task
            (mask, measure), subset = rows[position], self.subsets[number]
            found = values.discrimination(pooled[number], region, mask, measure, self.brief)
            thresholds = None
            if fitting:
                thresholds = fitting.counts[position].sum(axis=0, dtype=np.float64)
            elif number:
                thresholds = coarse.counts[position].sum(axis=0, dtype=np.float64)
            resampled, dice = _resampled_scores(
                coarse.counts[position][subset.cases], thresholds, bool(fitting), found, subset.draws
            )
            if subset.draws is not None:
                resampled |= sums.resampled(mask, measure, subset, found)
            return Pooled(
                region, mask, measure, number,
                metrics={(name, None): value for name, value in found.items()},
                resampled={(name, None): value for name, value in resampled.items()},
                n_voxels=coarse.counts[position][subset.cases].sum(axis=(1, 2), dtype=np.float64).astype(np.int64),
                total=pooled[number],
                ue_dice=dice,
            )  # fmt: skip

        yield from self._each(one, rows)

    def _calibrations(self, region, kinds, held, totals):
        """Yield what `pooled_metrics` does of kinds of probability; totals : dense sums per subset."""
        pooled = [Tally.of_cells(region, total.cells(), self.available) for total in totals]

        def one(task):
            position, number = task
            (mask, kind), subset = kinds[position], self.subsets[number]
            found = values.calibration(pooled[number], region, mask, kind, self.brief)
            found = {key: value for key, value in found.items() if key[1] in (None, *self.n_bins)}
            resampled, bands = {}, {}
            if subset.draws is not None:
                total = pooled[number]
                more = found, self.n_bins, self.brief
                resampled, bands = held.resampled(position, mask, kind, subset, total, *more)
            return Pooled(
                region, mask, kind, number, metrics=found, resampled=resampled,
                n_voxels=held.n_voxels(position, subset.cases), total=pooled[number], bands=bands,
            )  # fmt: skip

        yield from self._each(one, kinds)

    def _each(self, function, rows) -> Iterator[Pooled]:
        """Yield the function of every row and subset, in order, computed on several threads."""
        tasks = iter([(position, number) for position in range(len(rows)) for number in range(len(self.subsets))])
        with threadpool_limits(1, user_api="blas"), ThreadPoolExecutor(self.threads) as executor:
            ahead = [executor.submit(function, task) for task in islice(tasks, 2 * self.threads)]
            while ahead:
                yield ahead.pop(0).result()
                ahead += [executor.submit(function, task) for task in islice(tasks, 1)]


def _pieces(rows, size):
    """Yield rows in pieces that stay within the budget, of near equal length; size : bytes of a row."""
    n_pieces = -(-len(rows) * size // BUDGET)
    for piece in np.array_split(np.arange(len(rows)), min(n_pieces, len(rows))):
        yield [rows[position] for position in piece]


class _Dense:
    """Sums of cells of one region, in arrays as large as there are cells."""

    def __init__(self, parts):
        names = [name for part in parts for name in PARTS[part]]
        self._n = {name: np.zeros(LAYOUTS[name].region_size, np.int64) for name in names}
        self._sums = {name: np.zeros((LAYOUTS[name].region_size, _n_sums(name))) for name in names}

    def add(self, cells):
        for name, held in cells.items():
            self._n[name][held.key] += held.n  # a tally has a cell once
            if _n_sums(name):
                self._sums[name][held.key] += held.sums

    def cells(self):
        found = {}
        for name, n in self._n.items():
            cell = np.flatnonzero(n)
            found[name] = Cells(cell, n[cell], self._sums[name][cell])
        return found


def _targets(table, rows, size, place):
    """Return where cells of a file are counted, int array (region_size,); those of other rows at `size`, behind all.

    rows : list of (mask, series); place : function from (row, outcome, bin) to a number below size
    """
    layout = LAYOUTS[table]
    mask, series, outcome, bins = layout.described()
    of_row = np.full((len(layout.masks), len(layout.series)), -1)
    for position, (name, kind) in enumerate(rows):
        of_row[layout.masks.index(name), layout.series.index(kind)] = position
    row = of_row[mask, series]
    return np.where(row >= 0, place(row, outcome, bins), size)


def _summed(target, size, cells, values):
    """Return sums of values by target, (size,); target : of every cell, from `_targets`."""
    return np.bincount(target[cells.key], values, size + 1)[:size]


# --- what is held of every case, and its resamples ----------------------------------------------------------


class _Coarse:
    """Counts of every case by {correct, wrong} and coarse score bin, from the most uncertain down.

    counts : float32 (rows, cases, 2, bins); exact below 2^24
    """

    def __init__(self, rows, n_cases):
        self.counts = np.zeros((len(rows), n_cases, 2, _N_COARSE), np.float32)
        self._size = len(rows) * 2 * _N_COARSE
        self._target = _targets(
            "scores",
            rows,
            self._size,
            lambda row, outcome, bins: (row * 2 + _WRONG[outcome] + 1) * _N_COARSE - 1 - bins // SCORE_STEP,
        )

    def fill(self, case, cells):
        scores = cells["scores"]
        n = _summed(self._target, self._size, scores, scores.n)
        self.counts[:, case] = n.reshape(len(self.counts), *self.counts.shape[2:])


@dataclass(frozen=True)
class UncertaintyErrorDice:
    """Dice between uncertain voxels and errors at the threshold that suits a set of patients best (Jungo 2020).

    value : pooled; per_case : float64 by case of the subset, NaN where a case has neither
    threshold : the lowest coarse score bin that counts as uncertain, counted from the most uncertain
    in_sample : whether the patients set the threshold themselves; then it is found anew in every resample
    resampled, resampled_mean : float64 (n_resamples,), pooled and mean over cases; None without draws
    """

    value: float
    per_case: np.ndarray
    threshold: int
    in_sample: bool
    resampled: np.ndarray | None
    resampled_mean: np.ndarray | None


def _resampled_scores(counts, thresholds, fixed, found, draws):
    """Return ({metric: resamples}, UncertaintyErrorDice) of one row.

    counts : (cases, 2, bins), from the most uncertain down
    thresholds : (2, bins), counts that set the threshold of `ue_dice`, or None for these counts
    fixed : whether they come from other patients
    found : the metrics of the fine bins, to which resamples are shifted
    """
    total = counts.sum(axis=0, dtype=np.float64)
    threshold = int(np.argmax(_ue_dice(*total.cumsum(axis=1), total[1].sum())))
    in_sample = thresholds is None
    if not in_sample:
        threshold = int(np.argmax(_ue_dice(*thresholds.cumsum(axis=1), thresholds[1].sum())))
    below = counts.cumsum(axis=2, dtype=np.float32)
    per_case = _ue_dice(below[:, 0], below[:, 1], below[:, 1, -1:])
    value = float(_ue_dice(*total.cumsum(axis=1), total[1].sum())[threshold])
    at_threshold = per_case[:, threshold].astype(np.float64)
    flag = in_sample or not fixed
    if draws is None:
        return {}, UncertaintyErrorDice(value, at_threshold, threshold, flag, None, None)
    weights = draws.weights.astype(np.float32)
    flat = below.reshape(len(counts), -1)
    parts = []
    for first in range(0, len(weights), BATCH):
        drawn = (weights[first : first + BATCH] @ flat).reshape(-1, *counts.shape[1:])
        parts.append(_ranking(drawn, None if in_sample else threshold))
    auroc, aupr, error_rate, dice, at = (np.concatenate(part) for part in zip(*parts, strict=True))
    exact = [float(part[0]) for part in _ranking(total.cumsum(axis=1)[np.newaxis], None)[:2]]
    resampled = {
        "auroc": auroc + (found["auroc"] - exact[0]),
        "aupr": aupr + (found["aupr"] - exact[1]),
        "error_rate": error_rate,
    }
    mean = None
    if in_sample:
        drawn = np.ascontiguousarray(per_case.T)[at] * weights
        exists = np.isfinite(drawn)
        mean = _ratio(np.where(exists, drawn, 0).sum(axis=1), (weights * exists).sum(axis=1))
    return resampled, UncertaintyErrorDice(value, at_threshold, threshold, flag, dice, mean)


def _ranking(drawn, threshold):
    """Return AUROC, AUPR, error rate, Dice of uncertain voxels and errors, and its threshold, (n,) each.

    drawn : (n, 2, bins), correct and wrong voxels in a bin and all more uncertain ones; threshold : None for the best
    """
    passed, hits = drawn[:, 0], drawn[:, 1]
    n_right, n_wrong = passed[:, -1].astype(np.float64), hits[:, -1].astype(np.float64)
    wrong, before = hits.copy(), passed.copy()
    wrong[:, 1:] -= hits[:, :-1]
    before[:, 1:] += passed[:, :-1]  # twice the correct voxels before the middle of a bin
    ahead = np.einsum("rb,rb->r", wrong, before, dtype=np.float64) / 2
    auroc = 1 - _ratio(ahead, n_right * n_wrong)
    flagged = passed + hits
    precision = hits / np.maximum(flagged, np.float32(1e-30))
    aupr = _ratio(np.einsum("rb,rb->r", precision, wrong, dtype=np.float64), n_wrong)
    flagged += hits[:, -1:]
    dice = np.divide(2 * hits, flagged, out=np.zeros_like(hits), where=flagged > 0)
    at = dice.argmax(axis=1) if threshold is None else np.full(len(dice), threshold)
    best = np.where(n_right + n_wrong > 0, dice[np.arange(len(dice)), at], np.nan)
    return auroc, aupr, _ratio(n_wrong, n_right + n_wrong), best.astype(np.float64), at


def _ue_dice(passed, hits, n_wrong):
    """Return the Dice of flagged voxels and errors as bins are flagged; NaN where neither exists."""
    flagged = passed + hits + n_wrong
    return np.divide(2 * hits, flagged, out=np.full(hits.shape, np.nan, hits.dtype), where=flagged > 0)


class _Sums:
    """Sums of every case over a row, and its coarse joint histograms.

    sums : float64 (rows, cases, 5); joint : float32 (joint rows, cases, 32 · 32)
    """

    def __init__(self, rows, n_cases, joint_masks):
        self._rows = {row: position for position, row in enumerate(rows)}
        self._n = np.zeros((len(rows), n_cases))
        self._sums = np.zeros((len(rows), n_cases, _n_sums("score_sums")))
        self._target = _targets("score_sums", rows, len(rows), lambda row, outcome, bins: row)
        joint = [row for row in rows if row[0] in joint_masks]
        self._joint_rows = {row: position for position, row in enumerate(joint)}
        self._joint = np.zeros((len(joint), n_cases, _N_JOINT**2), np.float32)
        if joint:
            self._joint_target = _targets("joint", joint, self._joint[:, 0].size, _coarse_joint)

    def fill(self, case, cells):
        held = cells["score_sums"]
        self._n[:, case] = _summed(self._target, len(self._n), held, held.n)
        for position, column in enumerate(held.sums.T):
            self._sums[:, case, position] = _summed(self._target, len(self._n), held, column)
        if len(self._joint):
            held, size = cells["joint"], self._joint[:, 0].size
            self._joint[:, case] = _summed(self._joint_target, size, held, held.n).reshape(len(self._joint), -1)

    def resampled(self, mask, measure, subset, found):
        """Return {metric: resamples} of the metrics that follow from sums."""
        row = self._rows[mask, measure]
        weights = subset.draws.weights
        n = weights @ self._n[row, subset.cases]
        sums = weights @ self._sums[row, subset.cases]
        resampled = {
            "mean_uncertainty": _ratio(sums[:, 0], n),
            "pearson_with_loss": metrics.pearson_with_loss(sums[:, :, np.newaxis], n[:, np.newaxis, np.newaxis]),
        }
        if (mask, measure) in self._joint_rows:
            joint = self._joint[self._joint_rows[mask, measure], subset.cases]
            total = joint.sum(axis=0, dtype=np.float64)
            drawn = np.concatenate(
                [
                    metrics.spearman_with_loss(part.reshape(-1, _N_JOINT, _N_JOINT))
                    for part in (
                        weights[first : first + BATCH].astype(np.float32) @ joint
                        for first in range(0, len(weights), BATCH)
                    )
                ]
            )
            coarse = float(metrics.spearman_with_loss(total.reshape(_N_JOINT, _N_JOINT)))
            resampled["spearman_with_loss"] = drawn + (found["spearman_with_loss"] - coarse)
        return resampled


def _coarse_joint(row, outcome, bins):
    score, loss = np.divmod(bins, JOINT_BINS)
    return (row * _N_JOINT + score // JOINT_STEP) * _N_JOINT + loss // JOINT_STEP


class _Calibrations:
    """Counts and sums of every case by coarse bin of probability and of confidence, and sums by truth."""

    def __init__(self, region, kinds, n_cases):
        self._region = region
        self._kinds = kinds
        self._confidence = _Binned("confidences", kinds, n_cases)
        # the four-class view has probabilities of classes, of the mean alone
        classes = [(mask, name) for mask, kind in kinds if kind == PROBABILITY for name in CLASS_KINDS]
        table, rows = ("class_probabilities", classes) if region == ALL else ("probabilities", kinds)
        self._probability = _Binned(table, rows, n_cases)
        self._rows = {row: position for position, row in enumerate(rows)}
        self._proper = None
        if region != ALL:
            self._target = _targets("probabilities", kinds, 2 * len(kinds), lambda row, truth, bins: row * 2 + truth)
            self._proper = np.zeros((len(kinds), n_cases, 2, 1 + _n_sums("probabilities")))

    def fill(self, case, cells):
        self._confidence.fill(case, cells)
        self._probability.fill(case, cells)
        if self._proper is not None:
            held = cells["probabilities"]
            for position, column in enumerate((held.n, *held.sums.T)):
                by_truth = _summed(self._target, 2 * len(self._kinds), held, column)
                self._proper[:, case, :, position] = by_truth.reshape(-1, 2)

    def n_voxels(self, position, cases):
        return self._confidence.n[position][cases].sum(axis=(1, 2), dtype=np.float64).astype(np.int64)

    def resampled(self, position, mask, kind, subset, pooled, found, n_bins, brief):
        """Return ({(metric, n_bins): resamples}, {(kind of bins, n_bins): fractions by bin}).

        pooled : Tally of the subset; found : its metrics, to which what follows from coarse bins is shifted
        """
        weights, cases = subset.draws.weights, subset.cases
        once = np.ones((1, len(cases)))
        names = [kind] if self._region != ALL else CLASS_KINDS if kind == PROBABILITY else []
        parts = [self._rows[mask, name] for name in names]

        def computed(weights):
            """Return {(metric, n_bins): values}, {(kind of bins, n_bins): fractions} of weighted cases."""
            bands, names = {}, values.CLASS_PROBABILITY
            each = [self._probability.errors(row, cases, weights, n_bins, names, bands) for row in parts]
            errors = {key: np.mean([found[key] for found in each], axis=0) for key in (each[0] if each else ())}
            return errors | self._confidence.errors(position, cases, weights, n_bins, values.TOP_LABEL, bands), bands

        resampled, bands = computed(weights)
        exact, _ = computed(once)
        for key in resampled:
            if key[0].startswith("ece_equal_mass"):
                resampled[key] = resampled[key] + (found[key] - exact[key][0])
        n, sums = self._confidence.n[position][cases], self._confidence.sums[position][cases]
        drawn, summed = weights @ n.sum(axis=2, dtype=np.float64), weights @ sums.sum(axis=1, dtype=np.float64)
        accuracy, confidence = _ratio(drawn[:, 1], drawn.sum(axis=1)), _ratio(summed, drawn.sum(axis=1))
        resampled["gap", None] = confidence - accuracy
        resampled |= {("accuracy", None): accuracy, ("mean_confidence", None): confidence}
        if self._proper is not None:
            n, p, p2, log_p, log_1mp = np.moveaxis(np.tensordot(weights, self._proper[position, cases], 1), -1, 0)
            one = np.newaxis
            resampled["brier", None] = metrics.brier(n[:, one], p[:, one], p2[:, one])
            resampled["brier_skill", None] = metrics.brier_skill(n[:, one], p[:, one], p2[:, one])
            resampled["nll", None] = metrics.nll(n[:, one], log_p[:, one], log_1mp[:, one])
            if not brief:
                fit = np.array([found[name, None] for name in RECALIBRATION])
                logits = self._mean_logits(pooled.probabilities(self._region, mask, kind))
                fits = self._refits(parts[0], cases, weights, logits, fit)
                shift = fit - self._refits(parts[0], cases, once, logits, fit)[:, 0]
                resampled |= {(name, None): fits[k] + shift[k] for k, name in enumerate(RECALIBRATION)}
        return resampled, bands

    def _mean_logits(self, part):
        """Return the mean logit by truth and coarse bin, (2, bins); 0 where there is no voxel."""
        n, total = (np.add.reduceat(part[name], self._probability.starts, axis=0).T for name in ("n", "sum_logit"))
        return np.divide(total, n, out=np.zeros(n.shape), where=n > 0)

    def _refits(self, row, cases, weights, logits, fit):
        """Return intercepts and slopes of resamples, (2, n_resamples); NaN where the pooled voxels have none."""
        if not np.isfinite(fit).all():
            return np.full((2, len(weights)), np.nan)
        drawn = self._probability.counts(row, cases, weights)
        return np.concatenate([_refitted(counts, logits.ravel(), fit) for counts in drawn], axis=1)


class _Binned:
    """Counts by truth (or correctness) and coarse bin, and sums by coarse bin, of every case.

    n : float32 (rows, cases, 2, bins); sums : float32 (rows, cases, bins); starts : fine bin at which each bin starts
    """

    def __init__(self, table, rows, n_cases):
        self._table, n_fine = table, LAYOUTS[table].n_bins
        self._kind = "confidence" if table == "confidences" else "probability"
        self.starts = _coarse_starts(self._kind)
        n_bins = len(self.starts)
        coarse = np.repeat(np.arange(n_bins), np.diff(np.append(self.starts, n_fine)))
        self.n = np.zeros((len(rows), n_cases, 2, n_bins), np.float32)
        self.sums = np.zeros((len(rows), n_cases, n_bins), np.float32)
        self._of_n = _targets(
            table, rows, len(rows) * 2 * n_bins, lambda row, outcome, bins: (row * 2 + outcome) * n_bins + coarse[bins]
        )
        self._of_sums = _targets(table, rows, len(rows) * n_bins, lambda row, _, bins: row * n_bins + coarse[bins])

    def fill(self, case, cells):
        held, (n_rows, _, _, n_bins) = cells[self._table], self.n.shape
        self.n[:, case] = _summed(self._of_n, n_rows * 2 * n_bins, held, held.n).reshape(n_rows, 2, n_bins)
        sums = _summed(self._of_sums, n_rows * n_bins, held, held.sums[:, 0])
        self.sums[:, case] = sums.reshape(n_rows, n_bins)

    def counts(self, row, cases, weights):
        """Yield n (resamples, 2 · bins) of weighted cases, float64, a batch at a time."""
        n = self.n[row][cases].reshape(len(cases), -1)
        for first in range(0, len(weights), BATCH):
            yield (weights[first : first + BATCH].astype(np.float32) @ n).astype(np.float64)

    def errors(self, row, cases, weights, n_bins, names, bands):
        """Return {(metric, n_bins): resamples} of ECE, ACE, MCE and equal-mass ECE, which are called `names`.

        bands : dict that receives the fraction by equal-width bin of each resample, by (kind of bins, n_bins)
        """
        n, sums = self.n[row][cases], self.sums[row][cases]
        # summed from the lowest bin up, case by case: a weighted sum of these is that of a resample
        upward = np.stack([n[:, 0] + n[:, 1], n[:, 1], sums - n[:, 1]], axis=1).cumsum(axis=2, dtype=np.float64)
        starts = {bins: np.searchsorted(self.starts, metrics.fine_starts(bins, self._kind)) for bins in n_bins}
        equal_mass = self._equal_mass(upward, weights, n_bins)
        whole, found = weights @ upward[:, 0, -1], {}
        for position, bins in enumerate(n_bins):
            held = _between(upward, starts[bins])
            voxels, hits, gap = np.moveaxis((weights @ held.reshape(len(cases), -1)).reshape(-1, *held.shape[1:]), 1, 0)
            gap, bands[self._kind, bins] = np.abs(gap), _ratio(hits, voxels)
            each = np.divide(gap, voxels, out=np.zeros_like(gap), where=voxels > 0)
            greatest = np.where(whole > 0, each.max(axis=1), np.nan)
            average = _ratio(each.sum(axis=1), (voxels > 0).sum(axis=1).astype(float))
            errors = _ratio(gap.sum(axis=1), whole), average, greatest, _ratio(equal_mass[position], whole)
            found |= {(name, bins): error for name, error in zip(names, errors, strict=True)}
        return found

    def _equal_mass(self, upward, weights, n_bins):
        """Return Σ |gap| over quantile bins for each number of bins, (n_bins, resamples).

        upward : (cases, 3, bins), voxels, positives and gaps from the lowest bin up
        """
        flat = upward[:, [0, 2]].astype(np.float32).reshape(len(upward), -1)
        parts = []
        for first in range(0, len(weights), BATCH):
            drawn = weights[first : first + BATCH].astype(np.float32) @ flat
            reached, gaps = np.split(drawn, 2, axis=1)
            ends = [metrics.quantile_ends(reached, bins) for bins in n_bins]
            parts.append([np.abs(metrics.between(gaps, end)).sum(axis=1) for end in ends])
        return np.concatenate(parts, axis=1)


def _between(upward, starts):
    """Return sums between starts (bins), float64, from sums from the lowest bin up; the bins on the last axis."""
    ends = np.append(starts[1:], upward.shape[-1]) - 1
    return np.diff(upward[..., ends].astype(np.float64), axis=-1, prepend=0)


@cache
def _coarse_starts(kind):
    n_fine = LAYOUTS["confidences" if kind == "confidence" else "probabilities"].n_bins
    edges = [metrics.fine_starts(n_bins, kind) for n_bins in values.N_BINS]
    return np.unique(np.concatenate([*edges, np.arange(0, n_fine, BINNED_STEP[kind])]))


def _refitted(counts, logits, fit):
    """Return intercept and slope of logistic recalibration, two arrays (resamples,).

    counts : (resamples, 2 · bins), truth after truth; logits : (2 · bins,), mean logits of the pooled voxels
    fit : intercept and slope of the pooled voxels, from which Newton's method starts

    NaN where a resample holds one class only, and where the method leaves the neighbourhood.
    """
    used = counts.any(axis=0)
    truth = np.repeat([0.0, 1.0], len(logits) // 2)[used]
    counts, x = counts[:, used], logits[used]
    moments = np.stack([np.ones_like(x), x, x**2], axis=1)
    intercept, slope = (np.full((len(counts), 1), value) for value in fit)
    for _ in range(NEWTON_STEPS):
        fitted = 1 / (1 + np.exp(-np.clip(intercept + slope * x, -700, 700)))
        gradient = (counts * (truth - fitted)) @ moments[:, :2]
        constant, mixed, square = ((counts * (fitted * (1 - fitted))) @ moments).T
        determinant = constant * square - mixed**2
        intercept = intercept + _ratio(square * gradient[:, 0] - mixed * gradient[:, 1], determinant)[:, np.newaxis]
        slope = slope + _ratio(constant * gradient[:, 1] - mixed * gradient[:, 0], determinant)[:, np.newaxis]
    intercept, slope = intercept[:, 0], slope[:, 0]
    positives = counts @ truth
    undefined = (positives == 0) | (positives == counts.sum(axis=1))
    undefined |= ~(np.abs(intercept) + np.abs(slope) < _FARTHEST_FIT)
    return np.where(undefined, np.nan, intercept), np.where(undefined, np.nan, slope)


def _ratio(part, whole):
    return np.divide(part, whole, out=np.full(np.shape(part), np.nan), where=whole > 0)
