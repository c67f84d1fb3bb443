"""Cohort: the tallies of all patients of one model, as tables of metrics, patients, strata and curves.

No voxel is touched. A pooled metric is the metric of the sum of the tallies, a bootstrap resample that of a
weighted sum. Names, formulas and intervals: definitions §4, §5, §8, §9; columns: the public contract.
"""

from collections import defaultdict
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import pyarrow as pa

from segtrust import alarms, intervals, metrics, strata
from segtrust.convergence import CONVERGENCE_MASKS, CONVERGENCE_MEASURES
from segtrust.errors import Problems, SegtrustError
from segtrust.masks import BANDS, CONDITIONAL_ON_REFERENCE, DEPENDS_ON_MODEL, MASKS
from segtrust.measures import ENTROPY_4CLASS, MEASURES, MEMBER_MEASURES, OWN_ERRORS
from segtrust.patients import AGREEMENT_COLUMNS, CASE_COLUMNS
from segtrust.regions import REGIONS
from segtrust.tally import ALL, CLASS_KINDS, DETERMINISTIC, JOINT_MASKS, PROBABILITY

METRICS_SCHEMA = pa.schema(
    [
        ("model", pa.string()),
        ("reference_model", pa.string()),
        ("passes", pa.int64()),
        ("group", pa.string()),
        ("group_value", pa.string()),
        ("region", pa.string()),
        ("mask", pa.string()),
        ("measure", pa.string()),
        ("aggregation", pa.string()),
        ("metric", pa.string()),
        ("n_bins", pa.int64()),
        ("pooling", pa.string()),
        ("recalibration", pa.string()),
        ("value", pa.float64()),
        ("ci_low", pa.float64()),
        ("ci_high", pa.float64()),
        ("interval", pa.string()),
        ("bias", pa.float64()),
        ("p_value", pa.float64()),
        ("p_value_holm", pa.float64()),
        ("n_cases", pa.int64()),
        ("n_voxels", pa.int64()),
        ("conditional_on_reference", pa.bool_()),
        ("mask_depends_on_model", pa.bool_()),
    ]
)
STRATA_SCHEMA = pa.schema(
    [
        ("model", pa.string()),
        ("region", pa.string()),
        ("measure", pa.string()),
        ("aggregation", pa.string()),
        ("scheme", pa.string()),
        ("stratum", pa.string()),
        ("cutoff_source", pa.string()),
        ("n_cases", pa.int64()),
        ("median_dice", pa.float64()),
        ("ci_low", pa.float64()),
        ("ci_high", pa.float64()),
        ("score_low", pa.float64()),
        ("score_high", pa.float64()),
    ]
)
CURVES_SCHEMA = pa.schema(
    [
        ("model", pa.string()),
        ("curve", pa.string()),
        ("region", pa.string()),
        ("mask", pa.string()),
        ("measure", pa.string()),
        ("pooling", pa.string()),
        ("n_bins", pa.int64()),
        ("point", pa.int64()),
        ("x", pa.float64()),
        ("y", pa.float64()),
        ("low", pa.float64()),
        ("high", pa.float64()),
        ("n", pa.int64()),
    ]
)

# score of a patient: aggregation -> (mask, what becomes of the voxels' sum)
AGGREGATIONS = {
    "predicted_5mm_mean": ("predicted_5mm", "mean"),
    "brain_mean": ("brain", "mean"),
    "brain_sum": ("brain", "sum"),
}
CASE = "case"  # aggregation of scores that belong to the case as a whole
PAIRWISE_DICE = "pairwise_dice"
PREDICTED_VOLUME = "predicted_volume"

# measures that a scale fitted for injected dropout multiplies
SCALED_MEASURES = ("mutual_information", "variance")
CONVERGENCE_BINS = (15,)

AGREEING = ("preprocess", "model", "voxels", "tally")
LEAST_PASSES_FOR_VOLUMES = 19
RESAMPLED_SCORE_BINS = 1_024
CURVE_POINTS = 101


@dataclass(frozen=True)
class Evaluated:
    """What the tables are made of: one entry of each list per test patient, sorted by name.

    tallies : list of Tally; patients : DataFrame with `patient`, `subject` and further columns
    draws : intervals.Draws; model : name; passes : int, the most passes of any patient
    """

    tallies: list
    patients: pd.DataFrame
    draws: intervals.Draws
    model: str
    passes: int

    @property
    def names(self):
        return list(self.patients["patient"])

    @property
    def measures(self):
        """Return the measures that have rows: those of every model, and the parts of members where they exist."""
        held = set().union(*(tally.available for tally in self.tallies))
        return (*MEASURES, *(measure for measure in MEMBER_MEASURES if measure in held))


def cohort(tallies, patients, *, model, n_resamples, failure_dice, seed, n_bins, scales=None):
    """Return the tables of one model's cohort.

    tallies : list of Tally, one per patient
    patients : DataFrame with a row per tally in the same order: `patient`, `subject`, `split`, and further columns
    model : name; n_resamples, seed : of the bootstrap; failure_dice : a Dice below it is a failure
    n_bins : list of numbers of bins of calibration metrics
    scales : dict from region to the factor > 0 that mutual information and variance are also given with, as
        `<measure>_scaled`, None for a region without one; or None

    Returns a dict: `metrics`, `patients`, `strata`, `curves` (pyarrow Tables) and `alarms` (list of dicts). Only
    patients of the split `test` enter; those of `calibration` set the cut-offs of strata. Their order does not
    matter. Raises SegtrustError when there is no test patient.
    """
    patients = patients.reset_index(drop=True)
    order = patients.sort_values("patient", kind="stable").index
    test, fitting = ([k for k in order if patients["split"][k] == split] for split in ("test", "calibration"))
    if not test:
        raise SegtrustError(
            f"{model}: no patient of the split `test` has a reference, so there is nothing to evaluate. "
            "Give `seg` and `split: test` in the patient sheet."
        )
    evaluated = Evaluated(
        tallies=[tallies[k] for k in test],
        patients=patients.loc[test].reset_index(drop=True),
        draws=intervals.draw(patients.loc[test, "subject"], n_resamples, seed),
        model=model,
        passes=max(int(tallies[k].scalars["passes"]) for k in test),
    )
    rows, curves, found = _Rows(evaluated), _Curves(model), []
    tables = {region: _cases(evaluated.tallies, region) for region in REGIONS}
    for region in (*REGIONS, ALL):
        for band in BANDS if region != ALL else ():
            _discrimination(rows, curves, evaluated, region, band, "entropy")
        for mask in MASKS:
            for measure in (ENTROPY_4CLASS,) if region == ALL else (*evaluated.measures, OWN_ERRORS):
                _discrimination(rows, curves, evaluated, region, mask, measure)
            for kind in (PROBABILITY, DETERMINISTIC):
                found += _calibration(rows, curves, evaluated, region, mask, kind, n_bins, tables.get(region))
    _two_views(rows, evaluated)
    stratum_rows = []
    for region, table in tables.items():
        _segmentation(rows, evaluated, region, table)
        _qu_brats(rows, curves, evaluated, region)
        _retention(rows, curves, evaluated, region)
        _boundary(rows, evaluated, region)
        calibration = _cases([tallies[k] for k in fitting], region)
        for key in table["scores"]:
            fitted = calibration["scores"].get(key, np.empty(0))
            stratum_rows += _triage(rows, curves, evaluated, region, table, key, fitted, failure_dice, seed)
    if scales:
        rows.add_scaled(scales)
    return {
        "metrics": pa.concat_tables([rows.table(), *_convergence(evaluated)]).combine_chunks(),
        "patients": _patients_table(evaluated, tables, scales),
        "strata": pa.Table.from_pylist(_without_nan(stratum_rows), schema=STRATA_SCHEMA),
        "curves": curves.table(),
        "alarms": found + _alarms(evaluated, tables),
    }


def check_agreement(provenances):
    """Raise Problems when results of several patients were made differently and may not be pooled.

    provenances : {patient: provenance}; the flat dicts under its keys `AGREEING` have to agree. Every key that
    differs is named with its values and patients.
    """
    problems = []
    for part in AGREEING:
        held = {name: provenance.get(part, {}) for name, provenance in provenances.items()}
        for key in sorted(set().union(*held.values())):
            who = defaultdict(list)
            for name in sorted(held):
                who[str(held[name].get(key, "nothing"))].append(name)
            if len(who) > 1:
                groups = sorted(who.items(), key=lambda group: (-len(group[1]), group[0]))
                problems.append(
                    f"{part} {key}: "
                    + "; ".join(f"{value} in {alarms.listed(names)}" for value, names in groups)
                    + ". Make the smaller group again with the settings of the larger one."
                )
    if problems:
        raise Problems(problems)


# --- rows ---------------------------------------------------------------------------------------------------------


class _Rows:
    """Rows of the table `metrics`."""

    def __init__(self, evaluated):
        self._rows = []
        self._common = {"model": evaluated.model, "passes": evaluated.passes, "recalibration": "none"}

    def add(self, metric, value, interval, n_cases, *, region, pooling, mask=None, n_voxels=None, **more):
        """Append a row; more : further columns, null where not given."""
        self._rows.append(
            self._common
            | {
                "region": region,
                "mask": mask,
                "metric": metric,
                "pooling": pooling,
                "value": float(value),
                "ci_low": float(interval.low),
                "ci_high": float(interval.high),
                "interval": str(interval.label),
                "bias": float(interval.bias),
                "n_cases": int(n_cases),
                "n_voxels": None if n_voxels is None else int(n_voxels),
                "conditional_on_reference": None if mask is None else mask in CONDITIONAL_ON_REFERENCE or mask in BANDS,
                "mask_depends_on_model": None if mask is None else mask in DEPENDS_ON_MODEL,
            }
            | more
        )

    def add_scaled(self, scales):
        """Append the rows on masks of the scaled measures; scales : as of `cohort`.

        A positive factor moves the mean alone: ranks and correlations stay as they are.
        """
        numbers = ("value", "ci_low", "ci_high", "bias")
        for row in [row for row in self._rows if row.get("measure") in SCALED_MEASURES and row["mask"] is not None]:
            scaled, factor = row | {"measure": f"{row['measure']}_scaled"}, scales[row["region"]]
            if not factor:
                scaled |= {**dict.fromkeys(numbers, np.nan), "n_cases": 0, "interval": "none: no scale could be fitted"}
            elif row["metric"] == "mean_uncertainty":
                scaled |= {name: factor * row[name] for name in numbers}
            self._rows.append(scaled)

    def table(self):
        return pa.Table.from_pylist(_without_nan(self._rows), schema=METRICS_SCHEMA)


class _Curves:
    """Rows of the table `curves`."""

    def __init__(self, model):
        self._model = model
        self._parts = []

    def add(
        self,
        curve,
        x,
        y,
        *,
        region,
        mask=None,
        measure=None,
        pooling,
        n_bins=None,
        low=None,
        high=None,
        n=None,
    ):
        """Append the points of a curve; x, y, and where given low, high, n : (n_points,)."""
        count = len(x)
        columns = {
            "model": self._model,
            "curve": curve,
            "region": region,
            "mask": mask,
            "measure": measure,
            "pooling": pooling,
            "n_bins": n_bins,
        }
        columns = {name: pa.array([value] * count, CURVES_SCHEMA.field(name).type) for name, value in columns.items()}
        columns["point"] = pa.array(np.arange(count))
        for name, values in {"x": x, "y": y, "low": low, "high": high}.items():
            values = np.full(count, np.nan) if values is None else np.asarray(values, np.float64)
            columns[name] = pa.array(values, from_pandas=True)
        columns["n"] = pa.nulls(count, pa.int64()) if n is None else pa.array(np.asarray(n, np.int64))
        self._parts.append(pa.table(columns, schema=CURVES_SCHEMA))

    def table(self):
        return pa.concat_tables(self._parts).combine_chunks()


def _without_nan(rows):
    return [
        {key: None if isinstance(value, float) and np.isnan(value) else value for key, value in row.items()}
        for row in rows
    ]


def _add_patient_means(rows, evaluated, values, ranges, n_voxels, **keys):
    """Add a row per metric: its mean over the cases where it exists, with a studentised interval.

    values : {(metric, n_bins): float64 (n_cases,)}; ranges : {metric: (lowest, highest)}, [0, 1] where not given
    n_voxels : int64 (n_cases,), or None
    """
    table = np.stack(list(values.values()), axis=1)
    bounds = np.array([ranges.get(metric, (0, 1)) for metric, _ in values], np.float64)
    interval = intervals.studentised(table, evaluated.draws, bounds[:, 0], bounds[:, 1])
    exists = np.isfinite(table)
    for column, (metric, bins) in enumerate(values):
        here = exists[:, column]
        rows.add(
            metric,
            float(table[here, column].mean()) if here.any() else np.nan,
            _at(interval, column),
            here.sum(),
            pooling="patient_mean",
            n_bins=bins,
            n_voxels=None if n_voxels is None else n_voxels[here].sum(),
            **keys,
        )


def _at(interval, place):
    low, high, bias, label = (field[place] for field in interval)
    return intervals.Intervals(float(low), float(high), float(bias), str(label))


def _add_pooled(rows, evaluated, values, resampled, n_voxels, **keys):
    """Add a row per metric of the pooled voxels.

    values : {(metric, n_bins): float}; resampled : same keys, float64 (n_resamples,), to be shifted to the value where
    they come from coarser bins; n_voxels : int64 (n_cases,)
    """
    n_subjects = evaluated.draws.count_subjects(n_voxels > 0)
    for (metric, bins), value in values.items():
        method = intervals.basic if metric.startswith(("ece_", "ace_", "mce_")) else intervals.percentile
        rows.add(
            metric,
            float(value),
            method(value, resampled[metric, bins], n_subjects),
            (n_voxels > 0).sum(),
            pooling="pooled",
            n_bins=bins,
            n_voxels=n_voxels.sum(),
            **keys,
        )


# --- does uncertainty rank errors? --------------------------------------------------------------------------------


def _discrimination(rows, curves, evaluated, region, mask, measure):
    """Add the rows and curves of one measure on one mask; curves : None for brief tallies."""
    keys = {"region": region, "mask": mask, "measure": measure}
    counts = [tally.scores(region, mask, measure) for tally in evaluated.tallies]
    if any(count is None for count in counts):
        _add_undefined(rows, ("auroc", "aupr", "error_rate", "mean_uncertainty"), **keys)
        return
    counts = np.stack(counts)
    sums = np.stack([tally.score_sums(region, mask, measure) for tally in evaluated.tallies])
    n_voxels = counts.sum(axis=(1, 2))
    wrong, right = counts[..., 1] + counts[..., 2], counts[..., 0] + counts[..., 3]
    total = counts.sum(axis=0)
    per_case, pooled = _discrimination_values(sums, counts), _discrimination_values(sums.sum(axis=0), total)
    weights = evaluated.draws.weights
    drawn_sums, drawn = (
        np.tensordot(weights, sums, 1),
        np.tensordot(weights, counts.sum(axis=1, keepdims=True), 1),
    )
    n_wrong, n_right = weights @ wrong.sum(axis=1), weights @ right.sum(axis=1)
    resampled = {
        ("auroc", None): _ratio(_concordant(weights, wrong, right), n_wrong * n_right),
        ("aupr", None): _resampled_aupr(weights, wrong, right, float(pooled["aupr", None])),
        ("error_rate", None): _ratio(n_wrong, n_wrong + n_right),
        ("mean_uncertainty", None): metrics.mean_uncertainty(drawn_sums, drawn),
        ("pearson_with_loss", None): metrics.pearson_with_loss(drawn_sums, drawn),
    }
    if curves and mask in JOINT_MASKS:
        joint = [metrics.spearman_with_loss(tally.joint(region, mask, measure)) for tally in evaluated.tallies]
        per_case["spearman_with_loss", None] = np.array(joint)
    ranges = {"pearson_with_loss": (-1, 1), "spearman_with_loss": (-1, 1)}
    ranges |= {"mean_uncertainty": (-np.inf, 0) if measure == "boundary_proximity" else (0, 1)}
    _add_patient_means(rows, evaluated, per_case, ranges, n_voxels, **keys)
    _add_pooled(rows, evaluated, pooled, resampled, n_voxels, **keys)
    _add_certificates(rows, counts, n_voxels, **keys)
    if curves:
        _ranking_curves(curves, total, keys)


def _discrimination_values(sums, counts):
    return {
        ("auroc", None): metrics.auroc(counts),
        ("aupr", None): metrics.aupr(counts),
        ("error_rate", None): metrics.error_rate(counts),
        ("mean_uncertainty", None): metrics.mean_uncertainty(sums, counts),
        ("pearson_with_loss", None): metrics.pearson_with_loss(sums, counts),
    }


def _add_certificates(rows, counts, n_voxels, **keys):
    """Add the most by which ties within bins can change the two rows of `auroc`."""
    bound = intervals.Intervals(np.nan, np.nan, np.nan, "none: a bound")
    each = metrics.auroc_certificate(counts)
    exists = np.isfinite(each)
    value = float(each[exists].mean()) if exists.any() else np.nan
    keys |= {"metric": "auroc_certificate", "interval": bound}
    rows.add(value=value, n_cases=exists.sum(), n_voxels=n_voxels[exists].sum(), pooling="patient_mean", **keys)
    value = float(metrics.auroc_certificate(counts.sum(axis=0)))
    rows.add(value=value, n_cases=(n_voxels > 0).sum(), n_voxels=n_voxels.sum(), pooling="pooled", **keys)


def _add_undefined(rows, names, **keys):
    """Add null rows of metrics that do not exist in this cohort (no deterministic pass, a single pass)."""
    nothing = intervals.Intervals(np.nan, np.nan, np.nan, "none: not defined for these passes")
    for pooling in ("patient_mean", "pooled"):
        for name in names:
            rows.add(name, np.nan, nothing, 0, pooling=pooling, **keys)


def _ratio(part, whole):
    return np.divide(part, whole, out=np.full(np.shape(part), np.nan), where=whole > 0)


def _concordant(weights, wrong, right):
    """Return for each resample the pairs (wrong voxel, right voxel) in which the wrong one is more uncertain.

    weights : float64 (n_resamples, n_cases); wrong, right : int64 (n_cases, n_score_bins), uncertainty ascending

    Pairs are counted once between every two cases; a resample is then a quadratic form in its weights. Ties within a
    bin count one half.
    """
    below = np.cumsum(right, axis=1) - right / 2
    pairs = wrong.astype(np.float64) @ below.T
    return ((weights @ pairs) * weights).sum(axis=1)


def _resampled_aupr(weights, wrong, right, value):
    """Return the average precision of each resample, shifted to the value of all bins.

    Only bins with wrong voxels step; the right voxels above such a bin count with it. At most
    `RESAMPLED_SCORE_BINS` of these steps are kept, neighbours merged.
    """
    steps = np.flatnonzero(wrong.any(axis=0))
    if not len(steps):
        return np.full(len(weights), np.nan)
    steps = steps[:: -(-len(steps) // RESAMPLED_SCORE_BINS)]
    # descending uncertainty, summed from the top; the lowest bins, below every error, change no step
    hits = np.add.reduceat(wrong, steps, axis=1)[:, ::-1].cumsum(axis=1).astype(np.float64)
    found = hits + np.add.reduceat(right, steps, axis=1)[:, ::-1].cumsum(axis=1)
    # single precision is enough for the spread of resamples, and takes half the time
    weights, parts = weights.astype(np.float32), (hits.astype(np.float32), found.astype(np.float32))
    result = [
        _average_precision(*(weights[start : start + 200] @ part for part in parts))
        for start in range(0, len(weights), 200)
    ]
    return np.concatenate(result) + (value - _average_precision(hits.sum(axis=0), found.sum(axis=0)))


def _average_precision(hits, found):
    """Return Σ precision × new hits / hits, from voxels summed from the most uncertain down."""
    precision = np.divide(hits, found, out=np.zeros(hits.shape, hits.dtype), where=found > 0)
    new = np.diff(hits, axis=-1, prepend=0)
    return _ratio((precision * new).sum(axis=-1, dtype=np.float64), hits[..., -1].astype(np.float64))


def _ranking_curves(curves, total, keys):
    """Add ROC and precision–recall curves of the pooled voxels, thinned to about 100 points."""
    wrong, right = (total[::-1, 1] + total[::-1, 2]).cumsum(), (total[::-1, 0] + total[::-1, 3]).cumsum()
    if not wrong[-1] or not right[-1]:
        return
    sensitivity, false_alarms = wrong / wrong[-1], right / right[-1]
    kept = _thinned(sensitivity + false_alarms)
    x, y = np.append(0, false_alarms[kept]), np.append(0, sensitivity[kept])
    curves.add("roc", x, y, pooling="pooled", n=np.append(0, (wrong + right)[kept]), **keys)
    kept = kept[wrong[kept] > 0]
    precision = wrong[kept] / (wrong + right)[kept]
    curves.add("pr", sensitivity[kept], precision, pooling="pooled", n=(wrong + right)[kept], **keys)


def _thinned(path):
    """Return indices of about 100 points that divide an increasing path evenly, the last included."""
    wanted = np.linspace(path[0], path[-1], CURVE_POINTS)
    return np.unique(np.minimum(np.searchsorted(path, wanted), len(path) - 1))


# --- is confidence calibrated? ------------------------------------------------------------------------------------

TOP_LABEL = ("ece_top_label", "ace_top_label", "mce_top_label", "ece_equal_mass_top_label")
CLASS_PROBABILITY = tuple(name.replace("top_label", "class_probability") for name in TOP_LABEL)
CALIBRATION_RANGES = {"gap": (-1, 1), "nll": (0, np.inf), "brier_skill": (-np.inf, 1)}


def _calibration(rows, curves, evaluated, region, mask, kind, n_bins, table):
    """Add the rows and curves of one kind of probability on one mask; return alarms of infeasible rows.

    curves : None for brief tallies, which cannot be recalibrated
    table : as returned by `_cases`, None for `ALL` and for brief tallies
    """
    tallies, keys = evaluated.tallies, {"region": region, "mask": mask, "measure": kind}
    kinds = (kind,)
    if region == ALL:  # the four-class view has probabilities of classes, of the mean alone
        kinds = CLASS_KINDS if kind == PROBABILITY else ()
    confidences = [tally.confidences(region, mask, kind) for tally in tallies]
    if any(confidence is None for confidence in confidences):
        _add_undefined(rows, ("gap", "accuracy", "mean_confidence"), **keys)
        for bins in n_bins:
            _add_undefined(rows, (*TOP_LABEL, *CLASS_PROBABILITY), n_bins=bins, **keys)
        if region != ALL:
            _add_undefined(rows, ("brier", "brier_skill", "nll"), **keys)
        return []
    confidence = _stacked(confidences)
    probabilities = [_stacked([tally.probabilities(region, mask, name) for tally in tallies]) for name in kinds]
    n_voxels = confidence["n"].sum(axis=(1, 2))
    per_case = _calibration_values(confidence, probabilities, n_bins)
    pooled = _calibration_values(_summed(confidence), [_summed(part) for part in probabilities], n_bins)
    resampled = _resampled_calibration(evaluated.draws.weights, confidence, probabilities, n_bins)
    if region != ALL:
        per_case |= _proper_scores(probabilities[0])
        pooled |= _proper_scores(_summed(probabilities[0]))
        resampled |= _proper_scores(_resampled_sums(evaluated.draws.weights, probabilities[0]))
    _add_patient_means(rows, evaluated, per_case, CALIBRATION_RANGES, n_voxels, **keys)
    if region != ALL and curves:
        fit, refits = _recalibration(evaluated.draws.weights, probabilities[0])
        pooled |= fit
        resampled |= refits
    _add_pooled(rows, evaluated, pooled, resampled, n_voxels, **keys)
    for bins in n_bins if curves else ():
        _reliability(curves, evaluated, confidence, "confidence", bins, keys | {"curve": "reliability_top_label"})
        if region != ALL:
            curve = keys | {"curve": "reliability_class_probability"}
            _reliability(curves, evaluated, probabilities[0], "probability", bins, curve)
    return [] if table is None else _feasibility(evaluated, region, mask, kind, table, per_case)


def _feasibility(evaluated, region, mask, kind, table, per_case):
    """Return alarms of cases whose calibration contradicts their Dice."""
    measure, ending = ("entropy", "") if kind == PROBABILITY else (OWN_ERRORS, "_deterministic")
    found = [tally.scores(region, mask, measure)[:, 0].sum() for tally in evaluated.tallies]
    inside = {f"{name} ({bins} bins)" if bins else name: values for (name, bins), values in per_case.items()}
    inside["true_positives"] = np.array(found)
    return alarms.infeasible(
        table["dice" + ending],
        table["true_positives" + ending],
        inside,
        region,
        mask,
        kind,
        evaluated.names,
        evaluated.model,
    )


def _stacked(dicts):
    return {name: np.stack([part[name] for part in dicts]) for name in dicts[0]}


def _summed(arrays):
    return {name: values.sum(axis=0) for name, values in arrays.items()}


def _resampled_sums(weights, arrays):
    """Return sums over bins of each resample, with one bin: (n_cases, bins, 2) → (n_resamples, 1, 2)."""
    return {name: (weights @ values.sum(axis=1))[:, np.newaxis] for name, values in arrays.items()}


def _calibration_values(confidence, probabilities, n_bins):
    """Return {(metric, n_bins): values} of the leading shape of the arrays; classes of `ALL` are averaged."""
    n, sum_c = confidence["n"], confidence["sum_c"]
    values = {(name, bins): getattr(metrics, name)(n, sum_c, bins) for name in TOP_LABEL for bins in n_bins}
    values |= _confidence_values(confidence)
    for name in CLASS_PROBABILITY if probabilities else ():
        for bins in n_bins:
            classes = [getattr(metrics, name)(part["n"], part["sum_p"], bins) for part in probabilities]
            values[name, bins] = np.mean(classes, axis=0)
    return values


def _confidence_values(confidence):
    n, sum_c = confidence["n"], confidence["sum_c"]
    return {
        ("gap", None): metrics.gap(n, sum_c),
        ("accuracy", None): metrics.accuracy(n),
        ("mean_confidence", None): metrics.mean_confidence(n, sum_c),
    }


def _proper_scores(part):
    return {
        ("brier", None): metrics.brier(part["n"], part["sum_p"], part["sum_p2"]),
        ("brier_skill", None): metrics.brier_skill(part["n"], part["sum_p"], part["sum_p2"]),
        ("nll", None): metrics.nll(part["n"], part["sum_log_p"], part["sum_log_1mp"]),
    }


def _resampled_calibration(weights, confidence, probabilities, n_bins):
    """Return {(metric, n_bins): float64 (n_resamples,)} for the metrics of `_calibration_values`.

    Quantile bins are those of the whole cohort in every resample.
    """
    values = _confidence_values(_resampled_sums(weights, confidence))
    for bins in n_bins:
        gaps = _resampled_gaps(weights, confidence["n"], confidence["sum_c"], bins, "confidence")
        values |= {(name, bins): gap for name, gap in zip(TOP_LABEL, gaps, strict=True)}
        classes = [_resampled_gaps(weights, part["n"], part["sum_p"], bins, "probability") for part in probabilities]
        if classes:
            averaged = np.mean(classes, axis=0)
            values |= {(name, bins): gap for name, gap in zip(CLASS_PROBABILITY, averaged, strict=True)}
    return values


def _resampled_gaps(weights, n, sums, n_bins, kind):
    """Return ECE, ACE, MCE and equal-mass ECE of each resample, four arrays (n_resamples,)."""
    voxels, positives, total = _equal_width(n, sums, n_bins, kind)
    starts = _quantile_starts(n.sum(axis=(0, 2)), n_bins)
    equal = np.add.reduceat(sums.sum(axis=2) - n[..., 1], starts, axis=1)
    drawn = weights @ np.concatenate([voxels, total - positives, equal], axis=1)
    n_held = voxels.shape[1]
    voxels, gap, equal = np.split(drawn, [n_held, 2 * n_held], axis=1)
    gap, equal = np.abs(gap), np.abs(equal)
    each = np.divide(gap, voxels, out=np.zeros_like(gap), where=voxels > 0)
    whole = voxels.sum(axis=1)
    greatest = np.where(whole > 0, each.max(axis=1), np.nan)
    average = _ratio(each.sum(axis=1), (voxels > 0).sum(axis=1).astype(float))
    return _ratio(gap.sum(axis=1), whole), average, greatest, _ratio(equal.sum(axis=1), whole)


def _equal_width(n, sums, n_bins, kind):
    """Return voxels, positives (or correct) and summed probability by equal-width bin, (n_cases, n_bins) each."""
    mean, fraction, voxels = metrics.reliability(n, sums, n_bins, kind)
    return voxels, np.nan_to_num(fraction * voxels), np.nan_to_num(mean * voxels)


def _quantile_starts(voxels, n_bins):
    """Return the fine bins at which quantile bins of the cohort start; voxels : int64 (bins,)."""
    reached = np.cumsum(voxels)
    position = np.ceil(max(reached[-1] - 1, 0) * np.arange(1, n_bins) / n_bins - 1e-9)
    starts = np.searchsorted(reached, position, side="right")
    return np.unique(np.append(0, np.minimum(starts, len(voxels) - 1)))


def _recalibration(weights, part):
    """Return intercept and slope of logistic recalibration of the pooled voxels, and of each resample.

    A resample takes one Newton step from the cohort's fit, which leaves an error of second order. NaN where it holds
    one class only.
    """
    total = _summed(part)
    fit = np.array(metrics.logistic_recalibration(total["n"], total["sum_logit"]), np.float64)
    names = (("calibration_intercept", None), ("calibration_slope", None))
    refits = np.full((len(weights), 2), np.nan)
    if np.isfinite(fit).all():
        used = total["n"] > 0
        design = np.stack([np.ones(used.sum()), total["sum_logit"][used] / total["n"][used]])
        fitted = 1 / (1 + np.exp(-fit @ design))
        truth = np.broadcast_to([0, 1], used.shape)[used]
        n = part["n"][:, used]
        gradient = weights @ ((n * (truth - fitted)) @ design.T)
        products = np.stack([design[0] ** 2, design[0] * design[1], design[1] ** 2])
        constant, mixed, square = (weights @ ((n * (fitted * (1 - fitted))) @ products.T)).T
        determinant = constant * square - mixed**2
        refits[:, 0] = fit[0] + _ratio(square * gradient[:, 0] - mixed * gradient[:, 1], determinant)
        refits[:, 1] = fit[1] + _ratio(constant * gradient[:, 1] - mixed * gradient[:, 0], determinant)
        one_class = (weights @ part["n"].sum(axis=1) == 0).any(axis=1)
        refits[one_class] = np.nan
    return dict(zip(names, fit, strict=True)), dict(zip(names, refits.T, strict=True))


def _reliability(curves, evaluated, part, kind, n_bins, keys):
    """Add a reliability diagram of the pooled voxels with a bootstrap band of the fraction."""
    sums = part["sum_c" if kind == "confidence" else "sum_p"]
    voxels, positives, total = _equal_width(part["n"], sums, n_bins, kind)
    weights = evaluated.draws.weights
    n = voxels.sum(axis=0)
    value = _ratio(positives.sum(axis=0), n)
    band = intervals.percentile(
        value, _ratio(weights @ positives, weights @ voxels), evaluated.draws.count_subjects(voxels > 0)
    )
    curves.add(
        x=_ratio(total.sum(axis=0), n),
        y=value,
        low=band.low,
        high=band.high,
        n=n,
        n_bins=n_bins,
        pooling="pooled",
        **keys,
    )


# --- segmentation -------------------------------------------------------------------------------------------------


def _cases(tallies, region):
    """Return what is known of each case on one region: a dict of float64 (n_cases,), and `scores`, a dict of them.

    NaN where a number does not exist; scores also where the prediction is empty.
    """
    place = REGIONS.index(region)
    scalars = [tally.scalars for tally in tallies]

    def column(name):
        values = [case.get(name) for case in scalars]
        return np.array([np.nan if value is None else value[place] for value in values], np.float64)

    def overlap(name):
        values = [getattr(tally, name) for tally in tallies]
        return np.array([np.nan if value is None else value[place, place] for value in values], np.float64)

    found, reference, predicted = overlap("overlap"), column("n_reference"), column("n_predicted")
    found0, predicted0 = overlap("overlap_deterministic"), column("n_deterministic")
    known0 = np.isfinite(predicted0)
    table = {
        "true_positives": found,
        "n_reference": reference,
        "n_predicted": predicted,
        "true_positives_deterministic": found0,
        "dice": metrics.dice(found, predicted - found, reference - found),
        "dice_deterministic": np.where(known0, metrics.dice(found0, predicted0 - found0, reference - found0), np.nan),
        "sensitivity": metrics.sensitivity(found, reference - found),
        "precision": metrics.precision(found, predicted - found),
        "hd95": column("hd95"),
        "hd95_brats": column("hd95_brats"),
        "nsd_1mm": column("nsd_1mm"),
        "dice_lesionwise": column("dice_lesionwise"),
        "volume_ml": column("predicted_ml"),
        "reference_ml": column("reference_ml"),
        "pairwise_dice": column("pairwise_dice"),
        "both_empty": (reference == 0) & (predicted == 0),
        "missing_region": predicted == 0,
    }
    table["delta_dice"] = table["dice"] - table["dice_deterministic"]
    table["volume_error_ml"] = table["volume_ml"] - table["reference_ml"]
    passes = [case.get("pass_ml") for case in scalars]
    quantiles = np.array([_volume_quantiles(None if volume is None else volume[:, place]) for volume in passes])
    quantiles = quantiles.reshape(len(tallies), 3)
    table |= dict(zip(("volume_low_ml", "volume_median_ml", "volume_high_ml"), quantiles.T, strict=True))
    table["in_any_pass"] = np.array([volume is not None and bool(volume[:, place].any()) for volume in passes])
    table["scores"] = _scores(tallies, region, table)
    return table


def _volume_quantiles(volumes):
    """Return the 5 %, 50 % and 95 % quantiles of the volumes of passes, at positions (T + 1) p.

    volumes : float64 (T,) or None. All NaN without passes to compare; the outer two for T < 19, where no pass
    reaches so far out.
    """
    if volumes is None or len(volumes) < 2:
        return np.full(3, np.nan)
    low, median, high = np.quantile(volumes, [0.05, 0.5, 0.95], method="weibull")
    return np.array([low, median, high] if len(volumes) >= LEAST_PASSES_FOR_VOLUMES else [np.nan, median, np.nan])


def _scores(tallies, region, table):
    """Return the triage scores of each case, {(aggregation, measure): float64 (n_cases,)}, high = uncertain.

    NaN where the prediction is empty. A small predicted volume counts as uncertain: small regions are segmented
    worse, so this baseline is −volume.
    """
    scores = {}
    for measure in (*MEASURES, *MEMBER_MEASURES):
        for aggregation, (mask, form) in AGGREGATIONS.items():
            sums = [tally.score_sums(region, mask, measure) for tally in tallies]
            if not tallies or any(part is None for part in sums):
                continue
            total = np.array([part[0].sum() for part in sums])
            n_voxels = np.array([tally.scores(region, mask, measure).sum() for tally in tallies], np.float64)
            scores[aggregation, measure] = _ratio(total, n_voxels if form == "mean" else (n_voxels > 0).astype(float))
    if np.isfinite(table["pairwise_dice"]).all():
        scores[CASE, PAIRWISE_DICE] = 1 - table["pairwise_dice"]
    scores[CASE, PREDICTED_VOLUME] = -table["volume_ml"]
    return {key: np.where(table["missing_region"], np.nan, score) for key, score in scores.items()}


QU_BRATS = ("qu_brats", "auc_dsc", "auc_ftp", "auc_ftn", "qu_brats_zero", "qu_brats_oracle")
SEGMENTATION_RANGES = {
    "delta_dice": (-1, 1),
    "hd95": (0, np.inf),
    "hd95_brats": (0, np.inf),
    "volume_ml": (0, np.inf),
    "volume_error_ml": (-np.inf, np.inf),
}


def _segmentation(rows, evaluated, region, table):
    """Add the rows of segmentation metrics: means and medians over patients, pooled Dice, and counts."""
    names = (*AGREEMENT_COLUMNS, "dice_lesionwise", "volume_ml", "volume_error_ml", "pairwise_dice")
    values = {(name, None): table[name] for name in names}
    values["absolute_delta_dice", None] = np.abs(table["delta_dice"])
    _add_patient_means(rows, evaluated, values, SEGMENTATION_RANGES, None, region=region)
    draws, weights = evaluated.draws, evaluated.draws.weights
    keys = {"region": region, "pooling": "patient_level"}
    for name in ("dice", "dice_deterministic", "hd95"):
        exists = np.isfinite(table[name])
        held = table[name][exists]
        value = float(np.median(held)) if len(held) else np.nan
        interval = intervals.median_interval(held, int(draws.count_subjects(exists)))
        rows.add(f"median_{name}", value, interval, len(held), **keys)
    n_cases = len(evaluated.tallies)
    numbers = [table[name] for name in ("true_positives", "n_predicted", "n_reference")]
    pooled, resampled = (
        metrics.dice(found, predicted - found, reference - found)
        for found, predicted, reference in (
            [number.sum() for number in numbers],
            [weights @ number for number in numbers],
        )
    )
    interval = intervals.percentile(pooled, resampled, draws.n_subjects)
    rows.add("dice", float(pooled), interval, n_cases, region=region, pooling="pooled")
    count = intervals.Intervals(np.nan, np.nan, np.nan, "none: a count")
    rows.add("n_both_empty", float(table["both_empty"].sum()), count, n_cases, **keys)
    present = (table["n_reference"] > 0) | table["in_any_pass"]
    known = present & np.isfinite(table["volume_low_ml"])
    reference = table["reference_ml"]
    # Volumes are whole voxels times a size: equal ones may differ in the last digit.
    slack = 1e-9 * reference
    covered = known & (table["volume_low_ml"] <= reference + slack) & (reference - slack <= table["volume_high_ml"])
    value = covered.sum() / known.sum() if known.any() else np.nan
    interval = intervals.wilson(int(covered.sum()), int(known.sum()), int(draws.count_subjects(known)))
    rows.add("volume_coverage", float(value), interval, known.sum(), **keys)


def _two_views(rows, evaluated):
    """Add the share of voxels where the most probable class is not what the overlay of the regions says."""
    differs, n_voxels = (
        np.array([tally.counts[name] for tally in evaluated.tallies]) for name in ("n_argmax_differs", "n_voxels")
    )
    weights, key = evaluated.draws.weights, ("argmax_differs", None)
    values = {key: differs.sum() / n_voxels.sum()}
    _add_pooled(rows, evaluated, values, {key: _ratio(weights @ differs, weights @ n_voxels)}, n_voxels, region=ALL)


def _qu_brats(rows, curves, evaluated, region):
    """Add the QU-BraTS score of entropy and its parts, and their curves over the thresholds."""
    counts = [
        np.stack([tally.scores(region, mask, "entropy") for tally in evaluated.tallies]) for mask in ("volume", "brain")
    ]
    parts = metrics.qu_brats(*counts)
    values = {(name, None): parts[name] for name in QU_BRATS}
    keys = {"region": region, "measure": "entropy"}
    _add_patient_means(rows, evaluated, values, {}, counts[0].sum(axis=(1, 2)), mask="volume", **keys)
    for name in ("dsc", "ftp", "ftn"):
        _add_mean_curve(
            curves,
            evaluated,
            f"qu_brats_{name}",
            metrics.QU_BRATS_THRESHOLDS,
            parts[name],
            mask="volume",
            **keys,
        )


def _retention(rows, curves, evaluated, region):
    """Add what it brings to replace the most uncertain voxels by the reference, for every measure."""
    keys = {"region": region, "mask": "brain"}
    for measure in evaluated.measures:
        counts = [tally.scores(region, "brain", measure) for tally in evaluated.tallies]
        if any(count is None for count in counts):
            _add_undefined(rows, ("retention_area", "retention_area_normalised"), measure=measure, **keys)
            continue
        counts = np.stack(counts)
        found = metrics.retention(counts)
        values = {(f"retention_{name}", None): found[name] for name in ("area", "area_normalised")}
        ranges = {"retention_area_normalised": (-np.inf, 1)}
        _add_patient_means(rows, evaluated, values, ranges, counts.sum(axis=(1, 2)), measure=measure, **keys)
        _add_mean_curve(
            curves,
            evaluated,
            "retention",
            metrics.RETENTION_FRACTIONS,
            found["curve"],
            measure=measure,
            **keys,
        )


def _boundary(rows, evaluated, region):
    """Add the metrics of entropy over bands of distance to the reference surface."""
    counts, sums = (
        np.stack([[getattr(tally, name)(region, band, "entropy") for band in BANDS] for tally in evaluated.tallies])
        for name in ("scores", "score_sums")
    )
    values = {("buc", None): metrics.buc(sums, counts), ("ba_ece", None): metrics.ba_ece(sums, counts)}
    n_voxels = counts.sum(axis=(1, 2, 3))
    keys = {"region": region, "measure": "entropy", "conditional_on_reference": True}
    _add_patient_means(rows, evaluated, values, {}, n_voxels, **keys)


def _add_mean_curve(curves, evaluated, curve, x, y, **keys):
    """Add the mean of a curve over the cases that have it; y : float64 (n_cases, n_points)."""
    exists = np.isfinite(y).all(axis=1)
    if not exists.any():
        return
    band = intervals.studentised(np.where(exists[:, np.newaxis], y, np.nan), evaluated.draws, 0, 1)
    n = np.full(len(x), exists.sum())
    curves.add(curve, x, y[exists].mean(axis=0), low=band.low, high=band.high, n=n, pooling="patient_mean", **keys)


# --- triage -------------------------------------------------------------------------------------------------------


def _triage(rows, curves, evaluated, region, table, key, calibration, failure_dice, seed):
    """Add the patient-level rows and the risk–coverage curve of one score; return its strata.

    key : (aggregation, measure); calibration : scores of the calibration split
    """
    (aggregation, measure), score = key, table["scores"][key]
    draws, dice = evaluated.draws, table["dice"]
    volumes = {"predicted_volume": table["volume_ml"], "reference_volume": table["reference_ml"]}
    for row in strata.triage(score, dice, volumes, draws, failure_dice, calibration, seed):
        rows.add(
            row["metric"],
            float(row["value"]),
            row["interval"],
            row["n_cases"],
            region=region,
            measure=measure,
            aggregation=aggregation,
            pooling="patient_level",
            p_value=row["p_value"],
        )
    scored = np.isfinite(score)
    mask = AGGREGATIONS[aggregation][0] if aggregation in AGGREGATIONS else None
    if aggregation != "brain_sum" and scored.any():
        coverage, risk = strata.risk_coverage(score[scored], 1 - dice[scored])
        n = np.arange(1, len(risk) + 1)
        curves.add(
            "risk_coverage",
            coverage,
            risk,
            region=region,
            mask=mask,
            measure=measure,
            pooling="patient_level",
            n=n,
        )
    absent = table["n_reference"] == 0
    keys = {"model": evaluated.model, "region": region, "measure": measure, "aggregation": aggregation}
    return [keys | row for row in strata.stratify(score, dice, absent, draws.subjects, calibration)]


def _patients_table(evaluated, tables, scales):
    """Return one row per patient and region, with the scores and the sheet's further columns.

    scales : as of `cohort`; scores of the scaled measures come last

    Scores that do not exist (no deterministic pass, a single pass) are null, and keep their columns.
    """
    common = ("patient", "subject", "split")
    keys = [(aggregation, measure) for aggregation in AGGREGATIONS for measure in evaluated.measures]
    keys += [(CASE, PAIRWISE_DICE), (CASE, PREDICTED_VOLUME)]
    unknown = np.full(len(evaluated.tallies), np.nan)
    parts = []
    for region, table in tables.items():
        part = {"model": pa.array([evaluated.model] * len(evaluated.tallies))}
        part |= {name: pa.array(evaluated.patients[name].astype(str)) for name in common}
        part["region"] = pa.array([region] * len(evaluated.tallies))
        part |= {name: pa.array(table[name], from_pandas=True) for name in CASE_COLUMNS}
        part |= {name: pa.array(table[name]) for name in ("both_empty", "missing_region")}
        for key in keys:
            part["score_{}_{}".format(*key)] = pa.array(table["scores"].get(key, unknown), from_pandas=True)
        for key in [key for key in keys if scales and key[1] in SCALED_MEASURES]:
            scaled = (scales[region] or np.nan) * table["scores"].get(key, unknown)
            part["score_{}_{}_scaled".format(*key)] = pa.array(scaled, from_pandas=True)
        for name in evaluated.patients.columns:
            if name not in part:
                part[name] = pa.array(evaluated.patients[name], from_pandas=True)
        parts.append(pa.table(part))
    whole = pa.concat_tables(parts)
    return whole.take(np.arange(len(whole)).reshape(len(parts), -1).T.ravel()).combine_chunks()


# --- fewer passes -------------------------------------------------------------------------------------------------


def _convergence(evaluated):
    """Return tables of metrics after fewer passes, one per number of passes that all patients have tallies of."""
    known = set.intersection(*(set(tally.convergence) for tally in evaluated.tallies))
    return [_after(passes, evaluated) for passes in sorted(known)]


def _after(passes, evaluated):
    early = replace(evaluated, tallies=[tally.convergence[passes] for tally in evaluated.tallies], passes=passes)
    rows = _Rows(early)
    for place, region in enumerate(REGIONS):
        for mask in CONVERGENCE_MASKS:
            for measure in CONVERGENCE_MEASURES:
                _discrimination(rows, None, early, region, mask, measure)
            _calibration(rows, None, early, region, mask, PROBABILITY, CONVERGENCE_BINS, None)
        found = np.array([tally.overlap[place, place] for tally in early.tallies])
        predicted, reference = (
            np.array([tally.counts[name][place] for tally in early.tallies]) for name in ("n_predicted", "n_reference")
        )
        dice = metrics.dice(found, predicted - found, reference - found)
        _add_patient_means(rows, early, {("dice", None): dice}, {}, None, region=region)
    return rows.table()


# --- alarms -------------------------------------------------------------------------------------------------------


def _alarms(evaluated, tables):
    """Return the alarms of a cohort, those of single rows excepted."""
    model, names, tallies = evaluated.model, evaluated.names, evaluated.tallies
    overlap = np.stack([tally.overlap for tally in tallies])
    predicted, reference = (
        np.stack([tally.counts[f"n_{name}"] for tally in tallies]) for name in ("predicted", "reference")
    )
    classes = np.stack([tally.classes("volume") for tally in tallies])
    found = alarms.few_patients(evaluated.draws.n_subjects, model)
    # regions in another order are classes in another order too: the first says it more simply
    found += alarms.channel_order(overlap, predicted, reference, model) or alarms.class_order(classes, model)
    if "coding" in evaluated.patients:
        found += alarms.coding(classes, list(evaluated.patients["coding"]), model)
    found += alarms.empty_regions(predicted, reference, model)
    found += alarms.differing_measures([tally.available for tally in tallies], names, model)
    variance = np.full(predicted.shape, np.nan)
    for place, region in enumerate(REGIONS):
        sums = [tally.score_sums(region, "brain", "variance") for tally in tallies]
        variance[:, place] = [np.nan if part is None else part[0].sum() for part in sums]
    found += alarms.zero_variance(variance, model)
    found += alarms.unequal_passes(np.array([tally.scalars["passes"] for tally in tallies]), names, model)
    breaks = np.array([int(tally.counts["n_nesting_breaks"]) for tally in tallies])
    found += alarms.nesting_breaks(breaks, predicted, names, model)
    for region, table in tables.items():
        counts = np.stack([tally.scores(region, "volume", "entropy").sum(axis=0) for tally in tallies])
        second = metrics.dice(counts[:, 0], counts[:, 1], counts[:, 2])
        found += alarms.differing_dice(table["dice"], second, region, names, model)
    return found
