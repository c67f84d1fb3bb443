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
from segtrust.bins import FN, FP, SCORE_BINS, TN, TP, score_of_coarse
from segtrust.errors import SegtrustError
from segtrust.masks import BANDS, MASKS
from segtrust.measures import ENTROPY_4CLASS, MEASURES, MEMBER_MEASURES, OWN_ERRORS
from segtrust.patients import AGREEMENT_COLUMNS, CASE_COLUMNS
from segtrust.pool import SCORE_STEP, HeldTally, Subset, pooled_metrics
from segtrust.regions import REGIONS
from segtrust.rows import SCALED_MEASURES, STRATA_SCHEMA, Curves, Rows, without_nan
from segtrust.tally import ALL, DETERMINISTIC, PROBABILITY, Tally
from segtrust.values import BRIEF_BINS, CLASS_PROBABILITY, COUNTS, RETENTION, TOP_LABEL, Key

# score of a patient: aggregation -> (mask, what becomes of the voxels' sum)
AGGREGATIONS = {
    "predicted_5mm_mean": ("predicted_5mm", "mean"),
    "brain_mean": ("brain", "mean"),
    "brain_sum": ("brain", "sum"),
}
CASE = "case"  # aggregation of scores that belong to the case as a whole
PAIRWISE_DICE = "pairwise_dice"
PREDICTED_VOLUME = "predicted_volume"

# the score whose strata are tested; those of all others have an interval and no p
PRIMARY = ("predicted_5mm_mean", "entropy")
# a column of the sheet makes groups when it has at most so many values
MOST_GROUPS = 12
LEAST_CASES_OF_GROUP = 10
TOO_SMALL = f"none: fewer than {LEAST_CASES_OF_GROUP} cases in the group"

LEAST_PASSES_FOR_VOLUMES = 19
CURVE_POINTS = 101
# measures in bits whose values on wrong and correct voxels are shown; edges of score bins fall on these bins' edges
DISTRIBUTED = ("entropy", "deterministic_entropy")
DISTRIBUTION_BINS = 40


@dataclass(frozen=True)
class Evaluated:
    """What the tables are made of: one entry of each list per test patient, sorted by name.

    sources : list of `pool.HeldTally` or `pool.StoredTally`; patients : DataFrame with `patient`, `subject` and further
    columns; draws : intervals.Draws; model : name; passes : int, the most passes of any patient; n_bins : list
    threads : of the processor
    """

    sources: list
    patients: pd.DataFrame
    draws: intervals.Draws
    model: str
    passes: int
    n_bins: list
    threads: int

    @property
    def names(self):
        return list(self.patients["patient"])

    @property
    def tallies(self):
        return [source.tally for source in self.sources]

    @property
    def available(self):
        """Return the series that all patients have."""
        return frozenset.intersection(*(tally.available for tally in self.tallies))

    @property
    def measures(self):
        """Return the measures that have rows: those of every model, and the parts of members where they exist."""
        held = set().union(*(tally.available for tally in self.tallies))
        return (*MEASURES, *(measure for measure in MEMBER_MEASURES if measure in held))

    def on(self, subset):
        """Return the evaluated patients of a subset."""
        return replace(
            self,
            sources=[self.sources[case] for case in subset.cases],
            patients=self.patients.iloc[subset.cases].reset_index(drop=True),
            draws=subset.draws,
        )


def cohort(
    tallies,
    patients,
    *,
    model,
    n_resamples,
    failure_dice,
    seed,
    n_bins,
    scales=None,
    groups=(),
    threads=1,
):
    """Return the tables of one model's cohort.

    tallies : list, one per patient, of Tally, or of `pool.StoredTally`, which takes less memory
    patients : DataFrame with a row per tally in the same order: `patient`, `subject`, `split`, and further columns
    model : name; n_resamples, seed : of the bootstrap; failure_dice : a Dice below it is a failure
    n_bins : list of numbers of bins of calibration metrics
    scales : dict from region to the factor > 0 that mutual information and variance are also given with, as
        `<measure>_scaled`, None for a region without one; or None
    groups : columns of `patients`; every value of each has the rows of the whole cohort too. Or "auto": all further
        columns that have between 2 and 12 values, and at most half as many as there are patients
    threads : of the processor

    Returns a dict: `metrics`, `patients`, `strata`, `curves` (pyarrow Tables) and `alarms` (list of dicts). Only
    patients of the split `test` enter; those of `calibration` set the cut-offs of strata and thresholds of uncertainty.
    Their order does not matter. Raises SegtrustError when there is no test patient.
    """
    patients = patients.reset_index(drop=True)
    order = patients.sort_values("patient", kind="stable").index
    test, fitting = ([k for k in order if patients["split"][k] == split] for split in ("test", "calibration"))
    if not test:
        raise SegtrustError(
            f"{model}: no patient of the split `test` has a reference, so there is nothing to evaluate. "
            "Give `seg` and `split: test` in the patient sheet."
        )
    sources = [HeldTally(tally) if isinstance(tally, Tally) else tally for tally in tallies]
    evaluated = Evaluated(
        sources=[sources[k] for k in test],
        patients=patients.loc[test].reset_index(drop=True),
        draws=intervals.draw(patients.loc[test, "subject"], n_resamples, seed),
        model=model,
        passes=max(int(sources[k].tally.scalars["passes"]) for k in test),
        n_bins=list(n_bins),
        threads=threads,
    )
    fitting = [sources[k] for k in fitting]
    subsets = _subsets(evaluated, groups, n_resamples, seed)
    rows, curves = Rows(evaluated), Curves(model)
    tables = {region: cases_of(evaluated.sources, region) for region in REGIONS}
    of_calibration = {region: cases_of(fitting, region)["scores"] for region in REGIONS}
    found = _voxel_metrics(rows, curves, evaluated, subsets, fitting, tables)
    _mean_curves(curves, evaluated)
    stratum_rows = []
    for number, subset in enumerate(subsets):
        part, keys = evaluated.on(subset), {"group": subset.group, "group_value": subset.group_value}
        _two_views(rows, part, keys)
        for region, table in tables.items():
            own = _of_cases(table, subset.cases)
            volumes = {"predicted_volume": own["volume_ml"], "reference_volume": own["reference_ml"]}
            cases = strata.Cases(own["dice"], volumes, subset.draws, part.patients["subject"], failure_dice)
            _segmentation(rows, part, region, own, keys)
            for key, scores in own["scores"].items():
                fitted = of_calibration[region].get(key, np.empty(0))
                cut = strata.Cutoffs.of(fitted, table["scores"][key], anew=not number)
                tested = seed if not number and key == PRIMARY else None
                stratum_rows += _triage(rows, part, region, own, key, scores, cases, cut, tested, keys)
                if not number:
                    _risk_coverage(curves, region, own, key, scores)
    if scales:
        rows.add_scaled(scales)
    return {
        "metrics": pa.concat_tables([rows.table(), *_convergence(evaluated)]).combine_chunks(),
        "patients": _patients_table(evaluated, tables, scales),
        "strata": pa.Table.from_pylist(without_nan(stratum_rows), schema=STRATA_SCHEMA),
        "curves": curves.table(),
        "alarms": found + _alarms(evaluated, tables),
    }


def _subsets(evaluated, groups, n_resamples, seed):
    """Return the whole cohort and its groups; a group of fewer than 10 cases has no draws, and so no intervals."""
    patients = evaluated.patients
    if groups == "auto":
        known = {"patient", "subject", "split", "coding"}
        n_values, most = patients.replace("", None).nunique(), min(MOST_GROUPS, len(patients) // 2)
        groups = [name for name in patients if name not in known and 2 <= n_values[name] <= most]
    missing = [name for name in groups if name not in patients]
    if missing:
        raise SegtrustError(
            f"groups by {', '.join(missing)} were asked for, but the patient sheet has no such column; its further "
            f"columns are {', '.join(patients.columns[4:]) or 'none'}"
        )
    subsets = [Subset(np.arange(len(patients)), evaluated.draws)]
    for name in groups:
        text = patients[name].astype(object).where(patients[name].notna(), "").astype(str)
        for value in sorted(set(text) - {""}):
            cases = np.flatnonzero(text == value)
            enough = len(cases) >= LEAST_CASES_OF_GROUP
            # groups are drawn independently of each other
            stream = [seed, *f"{name}={value}".encode()]
            draws = intervals.draw(patients["subject"].iloc[cases], n_resamples, stream) if enough else None
            subsets.append(Subset(cases, draws, name, value))
    return subsets


def _add_patient_means(rows, evaluated, values, ranges, n_voxels, **keys):
    """Add a row per metric: its mean over the cases where it exists, with a studentised interval.

    values : {(metric, n_bins): float64 (n_cases,)}; ranges : {metric: (lowest, highest)}, [0, 1] where not given
    n_voxels : int64 (n_cases,), or None
    """
    table = np.stack(list(values.values()), axis=1)
    bounds = np.array([ranges.get(metric, (0, 1)) for metric, _ in values], np.float64)
    interval = studentised(table, evaluated.draws, bounds)
    exists = np.isfinite(table)
    for column, (metric, bins) in enumerate(values):
        here = exists[:, column]
        rows.add(
            metric,
            float(table[here, column].mean()) if here.any() else np.nan,
            interval[column],
            here.sum(),
            pooling="patient_mean",
            n_bins=bins,
            n_voxels=None if n_voxels is None else n_voxels[here].sum(),
            **keys,
        )


def studentised(table, draws, bounds):
    """Return a list of intervals, one per column of (n_cases, columns); without draws there are none."""
    if draws is None:
        return [_nothing(TOO_SMALL)] * table.shape[1]
    found = []
    for first in range(0, table.shape[1], COLUMNS_AT_ONCE):
        part = slice(first, first + COLUMNS_AT_ONCE)
        interval = intervals.studentised(table[:, part], draws, bounds[part, 0], bounds[part, 1])
        found += [_at(interval, column) for column in range(len(interval.low))]
    return found


def _at(interval, place):
    low, high, bias, label = (field[place] for field in interval)
    return intervals.Intervals(float(low), float(high), float(bias), str(label))


def _nothing(label):
    return intervals.Intervals(np.nan, np.nan, np.nan, label)


# --- metrics of voxels --------------------------------------------------------------------------------------------

COLUMNS_AT_ONCE = 256
DISCRIMINATION = ("auroc", "aupr", "error_rate", "mean_uncertainty")
VALUE_RANGES = {
    "gap": (-1, 1),
    "nll": (0, np.inf),
    "brier_skill": (-np.inf, 1),
    "pearson_with_loss": (-1, 1),
    "spearman_with_loss": (-1, 1),
    "retention_area_normalised": (-np.inf, 1),
    "calibration_intercept": (-np.inf, np.inf),
    "calibration_slope": (-np.inf, np.inf),
}
BOUND = _nothing("none: a bound")


def _voxel_metrics(rows, curves, evaluated, subsets, fitting, tables):
    """Add the rows of every metric of voxels, of each patient and pooled, and their curves; return alarms.

    curves, tables : None for the tallies after fewer passes
    """
    brief, found = tables is None, []
    means = [_means_by_row(evaluated.on(subset)) for subset in subsets]
    run = pooled_metrics(
        evaluated.sources,
        subsets,
        n_bins=evaluated.n_bins,
        threads=evaluated.threads,
        brief=brief,
        fitting=fitting,
    )
    for pooled in run:
        subset, keys = subsets[pooled.subset], _keys(pooled, subsets)
        place = pooled.region, pooled.mask, pooled.measure
        _add_means(rows, means[pooled.subset].pop(place), **keys)
        _add_pooled(rows, subset.draws, pooled, keys)
        if pooled.ue_dice is not None and pooled.mask in MASKS and not brief:
            _add_ue_dice(rows, subset.draws, pooled, keys)
        if curves and not pooled.subset:
            _pooled_curves(curves, evaluated.draws, pooled)
            if pooled.measure in (PROBABILITY, DETERMINISTIC) and pooled.region in tables:
                found += _feasibility(evaluated, pooled, tables[pooled.region])
    for number, subset in enumerate(subsets):
        keys = {"group": subset.group, "group_value": subset.group_value}
        for (region, mask, measure), held in means[number].items():  # what is no metric of one mask
            more = {"conditional_on_reference": True} if mask is None else {}
            _add_means(rows, held, region=region, mask=mask, measure=measure, **keys, **more)
        if not brief:
            _add_undefined(rows, evaluated, keys)
    return found


def _keys(pooled, subsets):
    subset = subsets[pooled.subset]
    place = {"region": pooled.region, "mask": pooled.mask, "measure": pooled.measure}
    return {**place, "group": subset.group, "group_value": subset.group_value}


def _means_by_row(evaluated):
    """Return {(region, mask, measure): list of what a row of a patient mean holds}."""
    keys, table = values_table(evaluated.sources)
    wanted = [position for position, key in enumerate(keys) if key.n_bins in (None, *evaluated.n_bins)]
    keys, table = [keys[position] for position in wanted], table[:, wanted]
    column = {key: position for position, key in enumerate(keys)}
    bounds = np.array([range_of(key) for key in keys], np.float64)
    held = studentised(table, evaluated.draws, bounds)
    rows = defaultdict(list)
    for position, key in enumerate(keys):
        if key.metric in COUNTS:
            continue
        here = np.isfinite(table[:, position])
        # what is measured over bands has the voxels of all of them
        counted = [
            key._replace(mask=mask, metric="n_voxels", n_bins=None) for mask in ([key.mask] if key.mask else BANDS)
        ]
        voxels = [column[count] for count in counted if count in column]
        rows[key.region, key.mask, key.measure].append(
            {
                "metric": key.metric,
                "n_bins": key.n_bins,
                "value": float(table[here, position].mean()) if here.any() else np.nan,
                "interval": BOUND if key.metric == "auroc_certificate" else held[position],
                "n_cases": int(here.sum()),
                "n_voxels": int(table[:, voxels][here].sum()) if voxels else None,
            }
        )
    return rows


def values_table(sources):
    """Return (keys that all sources have, float64 (n_sources, n_keys)) of their metrics."""
    first = list(sources[0].metrics)
    if all(list(source.metrics) == first for source in sources):
        return first, np.array([list(source.metrics.values()) for source in sources])
    keys = [key for key in first if all(key in source.metrics for source in sources)]
    return keys, np.array([[source.metrics[key] for key in keys] for source in sources])


def range_of(key):
    if key.metric == "mean_uncertainty":
        return (-np.inf, 0) if key.measure == "boundary_proximity" else (0, 1)
    return VALUE_RANGES.get(key.metric, (0, 1))


def _add_means(rows, held, **keys):
    for row in held:
        rows.add(pooling="patient_mean", **row, **keys)


def _add_pooled(rows, draws, pooled, keys):
    """Add a row per metric of the pooled voxels."""
    here = pooled.n_voxels > 0
    n_subjects = None if draws is None else draws.count_subjects(here)
    for (metric, bins), value in pooled.metrics.items():
        if metric in COUNTS:
            continue
        if metric == "auroc_certificate":
            interval = BOUND
        elif draws is None:
            interval = _nothing(TOO_SMALL)
        else:
            errors = metric.startswith(("ece_", "ace_", "mce_"))
            method = intervals.envelope if errors else intervals.expanded_percentile
            interval = method(value, pooled.resampled[metric, bins], n_subjects)
        n_voxels = pooled.n_voxels.sum()
        rows.add(metric, value, interval, here.sum(), pooling="pooled", n_bins=bins, n_voxels=n_voxels, **keys)


def _add_ue_dice(rows, draws, pooled, keys):
    """Add the Dice between uncertain voxels and errors, and the threshold above which a voxel is uncertain."""
    dice = pooled.ue_dice
    exists = np.isfinite(dice.per_case)
    mean = float(dice.per_case[exists].mean()) if exists.any() else np.nan
    if draws is None:
        of_mean = of_pool = _nothing(TOO_SMALL)
    else:
        of_pool = intervals.expanded_percentile(dice.value, dice.resampled, draws.count_subjects(pooled.n_voxels > 0))
        if dice.resampled_mean is not None:
            of_mean = intervals.expanded_percentile(mean, dice.resampled_mean, draws.count_subjects(exists))
        else:
            of_mean = _at(intervals.studentised(dice.per_case[:, np.newaxis], draws, 0, 1), 0)
    if dice.in_sample:
        of_mean, of_pool = (_flagged(interval, "in_sample threshold") for interval in (of_mean, of_pool))
    n_voxels, here = pooled.n_voxels, pooled.n_voxels > 0
    used = n_voxels[exists].sum()
    rows.add("ue_dice", mean, of_mean, exists.sum(), pooling="patient_mean", n_voxels=used, **keys)
    rows.add("ue_dice", dice.value, of_pool, here.sum(), pooling="pooled", n_voxels=n_voxels.sum(), **keys)
    threshold = score_of_coarse(dice.threshold, SCORE_STEP, pooled.measure) if n_voxels.any() else np.nan
    label = (
        _flagged(_nothing("none: a threshold"), "in_sample threshold")
        if dice.in_sample
        else _nothing("none: a threshold")
    )
    rows.add("ue_dice_threshold", threshold, label, here.sum(), pooling="pooled", n_voxels=n_voxels.sum(), **keys)


def _flagged(interval, flag):
    return interval._replace(label=f"{interval.label}; {flag}")


def _add_undefined(rows, evaluated, keys):
    """Add null rows of the measures that do not exist in this cohort (no deterministic pass, a single pass)."""
    held, nothing = evaluated.available, _nothing("none: not defined for these passes")

    def add(names, **more):
        for pooling in ("patient_mean", "pooled"):
            for name in names:
                rows.add(name, np.nan, nothing, 0, pooling=pooling, **more, **keys)

    for region in (*REGIONS, ALL):
        measures = [measure for measure in (*evaluated.measures, OWN_ERRORS) if measure not in held]
        kinds = [kind for kind in (PROBABILITY, DETERMINISTIC) if kind not in held]
        if region == ALL:
            measures = [ENTROPY_4CLASS] if ENTROPY_4CLASS not in held else []
        for mask in MASKS:
            for measure in measures:
                add(DISCRIMINATION, region=region, mask=mask, measure=measure)
            for kind in kinds:
                place = {"region": region, "mask": mask, "measure": kind}
                add(("gap", "accuracy", "mean_confidence"), **place)
                for bins in evaluated.n_bins:
                    add((*TOP_LABEL, *CLASS_PROBABILITY), n_bins=bins, **place)
                if region != ALL:
                    add(("brier", "brier_skill", "nll"), **place)
        for measure in measures if region != ALL else ():
            if measure != OWN_ERRORS:
                for name in RETENTION:
                    place = {"region": region, "mask": "brain", "measure": measure}
                    rows.add(name, np.nan, nothing, 0, pooling="patient_mean", **place, **keys)


def _ratio(part, whole):
    return np.divide(part, whole, out=np.full(np.shape(part), np.nan), where=whole > 0)


def _feasibility(evaluated, pooled, table):
    """Return alarms of cases whose calibration contradicts their Dice."""
    region, mask, kind = pooled.region, pooled.mask, pooled.measure
    measure, ending = ("entropy", "") if kind == PROBABILITY else (OWN_ERRORS, "_deterministic")

    def each(*key):
        return np.array([source.metrics[Key(region, mask, *key)] for source in evaluated.sources])

    inside = {
        f"{name} ({bins} bins)" if bins else name: each(kind, name, bins)
        for name, bins in pooled.metrics
        if name not in ("calibration_intercept", "calibration_slope", *COUNTS)
    }
    inside["true_positives"] = each(measure, "n_true_positives", None)
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


# --- curves -------------------------------------------------------------------------------------------------------


def _pooled_curves(curves, draws, pooled):
    """Add the curves of one row of pooled voxels."""
    keys = {"region": pooled.region, "mask": pooled.mask, "measure": pooled.measure}
    if pooled.ue_dice is not None:
        scores = pooled.total.scores(*keys.values())
        _ranking_curves(curves, scores, keys)
        if pooled.measure in DISTRIBUTED:
            _distributions(curves, scores, keys)
        return
    n_subjects = draws.count_subjects(pooled.n_voxels > 0)
    for (kind, bins), fractions in pooled.bands.items():
        name = "reliability_top_label" if kind == "confidence" else "reliability_class_probability"
        if kind == "probability" and pooled.region == ALL:
            continue
        held = pooled.total.confidences if kind == "confidence" else pooled.total.probabilities
        part = held(*keys.values())
        x, y, n = metrics.reliability(part["n"], part["sum_c" if kind == "confidence" else "sum_p"], bins, kind)
        band = intervals.expanded_percentile(y, fractions, n_subjects)
        more = {"low": band.low, "high": band.high, "n": n, "n_bins": bins, "pooling": "pooled"}
        curves.add(name, x, y, **more, **keys)


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


def _distributions(curves, total, keys):
    """Add how the scores of wrong and of correct pooled voxels are distributed, in equal bins on [0, 1].

    total : (n_score_bins, 4), voxels that are TP, FP, FN, TN; a point is the middle of a bin and its share of voxels
    """
    edges = np.arange(DISTRIBUTION_BINS + 1) / DISTRIBUTION_BINS
    bins = np.minimum(np.searchsorted(edges, SCORE_BINS.edges[: len(total)], side="right") - 1, DISTRIBUTION_BINS - 1)
    counts = np.zeros((DISTRIBUTION_BINS, 4), np.int64)
    np.add.at(counts, bins, total)
    for outcome, n in (("wrong", counts[:, FP] + counts[:, FN]), ("correct", counts[:, TP] + counts[:, TN])):
        if n.any():
            middles = (edges[1:] + edges[:-1]) / 2
            curves.add(f"distribution_{outcome}", middles, n / n.sum(), pooling="pooled", n=n, **keys)


def _thinned(path):
    """Return indices of about 100 points that divide an increasing path evenly, the last included."""
    wanted = np.linspace(path[0], path[-1], CURVE_POINTS)
    return np.unique(np.minimum(np.searchsorted(path, wanted), len(path) - 1))


def _mean_curves(curves, evaluated):
    """Add the means over patients of the QU-BraTS curves and of retention."""
    shared = [key for key in evaluated.sources[0].curves if all(key in source.curves for source in evaluated.sources)]
    for key in shared:
        of_scores = key.name.startswith("qu_brats")
        x = metrics.QU_BRATS_THRESHOLDS if of_scores else metrics.RETENTION_FRACTIONS
        y = np.stack([source.curves[key] for source in evaluated.sources])
        exists = np.isfinite(y).all(axis=1)
        if not exists.any():
            continue
        band = intervals.studentised(np.where(exists[:, np.newaxis], y, np.nan), evaluated.draws, 0, 1)
        curves.add(
            key.name, x, y[exists].mean(axis=0), low=band.low, high=band.high, n=np.full(len(x), exists.sum()),
            pooling="patient_mean", region=key.region, mask="volume" if of_scores else "brain", measure=key.measure,
        )  # fmt: skip


# --- segmentation -------------------------------------------------------------------------------------------------


def cases_of(sources, region):
    """Return what is known of each case on one region: a dict of float64 (n_cases,), and `scores`, a dict of them.

    NaN where a number does not exist; scores also where the prediction is empty.
    """
    place, tallies = REGIONS.index(region), [source.tally for source in sources]
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
    table["scores"] = _scores(sources, region, table)
    return table


def _of_cases(table, cases):
    """Return the part of a table of `cases_of` that belongs to some cases."""
    scores = {key: values[cases] for key, values in table["scores"].items()}
    return {name: scores if name == "scores" else values[cases] for name, values in table.items()}


def _volume_quantiles(volumes):
    """Return the 5 %, 50 % and 95 % quantiles of the volumes of passes, at positions (T + 1) p.

    volumes : float64 (T,) or None. All NaN without passes to compare; the outer two for T < 19, where no pass
    reaches so far out.
    """
    if volumes is None or len(volumes) < 2:
        return np.full(3, np.nan)
    low, median, high = np.quantile(volumes, [0.05, 0.5, 0.95], method="weibull")
    return np.array([low, median, high] if len(volumes) >= LEAST_PASSES_FOR_VOLUMES else [np.nan, median, np.nan])


def _scores(sources, region, table):
    """Return the triage scores of each case, {(aggregation, measure): float64 (n_cases,)}, high = uncertain.

    NaN where the prediction is empty. A small predicted volume counts as uncertain: small regions are segmented
    worse, so this baseline is −volume.
    """
    scores = {}
    for measure in (*MEASURES, *MEMBER_MEASURES):
        for aggregation, (mask, form) in AGGREGATIONS.items():
            mean, n_voxels = (Key(region, mask, measure, name, None) for name in ("mean_uncertainty", "n_voxels"))
            if not sources or any(mean not in source.metrics for source in sources):
                continue
            score = np.array([source.metrics[mean] for source in sources])
            if form == "sum":
                score = score * [source.metrics[n_voxels] for source in sources]
            scores[aggregation, measure] = score
    if np.isfinite(table["pairwise_dice"]).all():
        scores[CASE, PAIRWISE_DICE] = 1 - table["pairwise_dice"]
    scores[CASE, PREDICTED_VOLUME] = -table["volume_ml"]
    return {key: np.where(table["missing_region"], np.nan, score) for key, score in scores.items()}


SEGMENTATION_RANGES = {
    "delta_dice": (-1, 1),
    "hd95": (0, np.inf),
    "hd95_brats": (0, np.inf),
    "volume_ml": (0, np.inf),
    "volume_error_ml": (-np.inf, np.inf),
}


def _segmentation(rows, evaluated, region, table, keys):
    """Add the rows of segmentation metrics: means and medians over patients, pooled Dice, and counts."""
    names = (*AGREEMENT_COLUMNS, "dice_lesionwise", "volume_ml", "volume_error_ml", "pairwise_dice")
    values = {(name, None): table[name] for name in names}
    values["absolute_delta_dice", None] = np.abs(table["delta_dice"])
    _add_patient_means(rows, evaluated, values, SEGMENTATION_RANGES, None, region=region, **keys)
    draws, n_cases = evaluated.draws, len(evaluated.sources)
    n_subjects = evaluated.patients["subject"].nunique()

    def judged(make, exists):
        """Return an interval from the number of subjects with a case that exists."""
        return _nothing(TOO_SMALL) if draws is None else make(int(draws.count_subjects(exists)))

    level = {"region": region, "pooling": "patient_level", **keys}
    for name in ("dice", "dice_deterministic", "hd95"):
        exists = np.isfinite(table[name])
        held = table[name][exists]
        value = float(np.median(held)) if len(held) else np.nan
        interval = judged(lambda n, held=held: intervals.median_interval(held, n), exists)
        rows.add(f"median_{name}", value, interval, len(held), **level)
    found, predicted, reference = (table[name] for name in ("true_positives", "n_predicted", "n_reference"))
    overlaps = {
        "dice": metrics.dice(found.sum(), (predicted - found).sum(), (reference - found).sum()),
        "sensitivity": metrics.sensitivity(found.sum(), (reference - found).sum()),
        "precision": metrics.precision(found.sum(), (predicted - found).sum()),
    }
    resampled = {}
    if draws is not None:
        found, predicted, reference = (draws.weights @ part for part in (found, predicted, reference))
        resampled = {
            "dice": metrics.dice(found, predicted - found, reference - found),
            "sensitivity": metrics.sensitivity(found, reference - found),
            "precision": metrics.precision(found, predicted - found),
        }
    for name, value in overlaps.items():
        interval = (
            intervals.expanded_percentile(value, resampled[name], n_subjects) if resampled else _nothing(TOO_SMALL)
        )
        rows.add(name, float(value), interval, n_cases, region=region, pooling="pooled", **keys)
    count = _nothing("none: a count")
    rows.add("n_both_empty", float(table["both_empty"].sum()), count, n_cases, **level)
    present = (table["n_reference"] > 0) | table["in_any_pass"]
    known = present & np.isfinite(table["volume_low_ml"])
    reference = table["reference_ml"]
    # Volumes are whole voxels times a size: equal ones may differ in the last digit.
    slack = 1e-9 * reference
    covered = known & (table["volume_low_ml"] <= reference + slack) & (reference - slack <= table["volume_high_ml"])
    value = covered.sum() / known.sum() if known.any() else np.nan
    interval = judged(lambda n: intervals.wilson(int(covered.sum()), int(known.sum()), n), known)
    rows.add("volume_coverage", float(value), interval, known.sum(), **level)


def _two_views(rows, evaluated, keys):
    """Add the share of voxels where the most probable class is not what the overlay of the regions says."""
    differs, n_voxels = (
        np.array([tally.counts[name] for tally in evaluated.tallies]) for name in ("n_argmax_differs", "n_voxels")
    )
    value, draws = differs.sum() / n_voxels.sum(), evaluated.draws
    interval = _nothing(TOO_SMALL)
    if draws is not None:
        drawn = _ratio(draws.weights @ differs, draws.weights @ n_voxels)
        interval = intervals.expanded_percentile(value, drawn, draws.n_subjects)
    more = {"region": ALL, "pooling": "pooled", "n_voxels": n_voxels.sum(), **keys}
    rows.add("argmax_differs", float(value), interval, len(n_voxels), **more)


# --- triage -------------------------------------------------------------------------------------------------------


def _triage(rows, evaluated, region, table, key, score, cases, cut, seed, keys):
    """Add the patient-level rows of one score; return its strata.

    key : (aggregation, measure); cases : strata.Cases; cut : strata.Cutoffs; seed : of the test, None for no test
    """
    (aggregation, measure), draws = key, evaluated.draws
    for row in strata.triage(score, cases, cut, seed):
        interval = _nothing(TOO_SMALL) if draws is None else row["interval"]
        rows.add(
            row["metric"],
            float(row["value"]),
            interval,
            row["n_cases"],
            region=region,
            measure=measure,
            aggregation=aggregation,
            pooling="patient_level",
            p_value=row["p_value"],
            **keys,
        )
    absent = table["n_reference"] == 0
    about = {"model": evaluated.model, "region": region, "measure": measure, "aggregation": aggregation, **keys}
    found = strata.stratify(score, cases.dice, absent, cases.subjects, cut)
    if draws is None:
        found = [row | {"ci_low": np.nan, "ci_high": np.nan} for row in found]
    return [about | row for row in found]


def _risk_coverage(curves, region, table, key, score):
    """Add the risk–coverage curve of one score."""
    (aggregation, measure), scored = key, np.isfinite(score)
    if aggregation == "brain_sum" or not scored.any():
        return
    coverage, risk = strata.risk_coverage(score[scored], 1 - table["dice"][scored])
    mask = AGGREGATIONS[aggregation][0] if aggregation in AGGREGATIONS else None
    n = np.arange(1, len(risk) + 1)
    keys = {"region": region, "mask": mask, "measure": measure, "pooling": "patient_level"}
    curves.add("risk_coverage", coverage, risk, n=n, **keys)


def _patients_table(evaluated, tables, scales):
    """Return one row per patient and region, with the scores and the sheet's further columns.

    scales : as of `cohort`; scores of the scaled measures come last

    Scores that do not exist (no deterministic pass, a single pass) are null, and keep their columns.
    """
    common = ("patient", "subject", "split")
    keys = [(aggregation, measure) for aggregation in AGGREGATIONS for measure in evaluated.measures]
    keys += [(CASE, PAIRWISE_DICE), (CASE, PREDICTED_VOLUME)]
    unknown = np.full(len(evaluated.sources), np.nan)
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
    known = set.intersection(*(set(source.early) for source in evaluated.sources))
    return [_after(passes, evaluated) for passes in sorted(known)]


def _after(passes, evaluated):
    early = [source.early[passes] for source in evaluated.sources]
    early = replace(evaluated, sources=early, passes=passes, n_bins=list(BRIEF_BINS))
    rows, whole = Rows(early), Subset(np.arange(len(early.sources)), early.draws)
    _voxel_metrics(rows, None, early, [whole], [], None)
    for place, region in enumerate(REGIONS):
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
    classes = np.stack([tally.counts["classes"] for tally in tallies])
    found = alarms.few_patients(evaluated.draws.n_subjects, model)
    # regions in another order are classes in another order too: the first says it more simply
    found += alarms.channel_order(overlap, predicted, reference, model) or alarms.class_order(classes, model)
    if "coding" in evaluated.patients:
        found += alarms.coding(classes, list(evaluated.patients["coding"]), model)
    found += alarms.empty_regions(predicted, reference, model)
    found += alarms.differing_measures([tally.available for tally in tallies], names, model)
    variance = np.full(predicted.shape, np.nan)
    for place, region in enumerate(REGIONS):
        mean = Key(region, "brain", "variance", "mean_uncertainty", None)
        variance[:, place] = [source.metrics.get(mean, np.nan) for source in evaluated.sources]
    found += alarms.zero_variance(variance, model)
    found += alarms.unequal_passes(np.array([tally.scalars["passes"] for tally in tallies]), names, model)
    breaks = np.array([int(tally.counts["n_nesting_breaks"]) for tally in tallies])
    found += alarms.nesting_breaks(breaks, predicted, names, model)
    for region, table in tables.items():
        hits, share, n = (
            np.array([source.metrics[Key(region, "volume", "entropy", name, None)] for source in evaluated.sources])
            for name in ("n_true_positives", "error_rate", "n_voxels")
        )
        second = metrics.dice(hits, share * n, 0)
        found += alarms.differing_dice(table["dice"], second, region, names, model)
    return found
