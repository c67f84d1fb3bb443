"""Values: every voxel metric of one tally, by name.

A tally of one patient gives the patient's metrics, that of pooled patients the pooled ones: both are functions of the
same counts (definitions, sections 4, 6 and 7). Those of a patient are kept in its tally's file, so that a cohort need
not compute them again.
"""

import base64
import json
import zlib
from functools import cache
from typing import NamedTuple

import numpy as np
import pandas as pd

from segtrust import metrics
from segtrust.convergence import CONVERGENCE_MASKS, CONVERGENCE_MEASURES
from segtrust.masks import BANDS, MASKS
from segtrust.measures import ENTROPY_4CLASS, MEASURES, MEMBER_MEASURES, OWN_ERRORS
from segtrust.regions import REGIONS
from segtrust.tally import ALL, CLASS_KINDS, DETERMINISTIC, JOINT_MASKS, PROBABILITY, TALLY_REGIONS, Tally

N_BINS = (10, 15, 20)
BRIEF_BINS = (15,)
TOP_LABEL = ("ece_top_label", "ace_top_label", "mce_top_label", "ece_equal_mass_top_label")
CLASS_PROBABILITY = tuple(name.replace("top_label", "class_probability") for name in TOP_LABEL)
QU_BRATS = ("qu_brats", "auc_dsc", "auc_ftp", "auc_ftn", "qu_brats_zero", "qu_brats_oracle")
RETENTION = ("retention_area", "retention_area_normalised")
BOUNDARY = ("buc", "ba_ece")
# numbers of voxels, which no table shows as metrics
COUNTS = ("n_voxels", "n_true_positives")


class Key(NamedTuple):
    """What a value is about; mask and n_bins are None where the metric has none."""

    region: str
    mask: str | None
    measure: str
    metric: str
    n_bins: int | None


def values_of(tally, regions=TALLY_REGIONS, brief=False):
    """Return every voxel metric of a tally, a dict from `Key` to float; NaN where a metric is undefined.

    tally : Tally of one patient, or of several pooled
    regions : which of WT, TC, ET and ALL
    brief : of the tallies after fewer passes (`Tally.convergence`), which have less

    Measures that do not exist (no deterministic pass, a single pass) have no keys.
    """
    values = {}
    for region in regions:
        for mask, measure in rows_of(region, tally.available, brief):
            found = discrimination(tally, region, mask, measure, brief)
            values |= {Key(region, mask, measure, name, None): value for name, value in found.items()}
        for mask, kind in kinds_of(region, tally.available, brief):
            found = calibration(tally, region, mask, kind, brief)
            values |= {Key(region, mask, kind, name, bins): value for (name, bins), value in found.items()}
        if region != ALL and not brief:
            values |= _whole(tally, region)
    return values


def rows_of(region, available, brief=False):
    """Return the (mask, measure) of a region that can rank errors, a list.

    available : the series that exist, as of `Tally.available`
    """
    if region == ALL:
        return [(mask, ENTROPY_4CLASS) for mask in MASKS if ENTROPY_4CLASS in available]
    if brief:
        return [(mask, measure) for mask in CONVERGENCE_MASKS for measure in CONVERGENCE_MEASURES]
    held = [measure for measure in (*MEASURES, OWN_ERRORS, *MEMBER_MEASURES) if measure in available]
    return [*((band, "entropy") for band in BANDS), *((mask, measure) for mask in MASKS for measure in held)]


def kinds_of(region, available, brief=False):
    """Return the (mask, kind of probability) of a region that have a calibration, a list; arguments as of `rows_of`."""
    if brief:
        return [(mask, PROBABILITY) for mask in CONVERGENCE_MASKS if region != ALL]
    if region == ALL and ENTROPY_4CLASS not in available:
        return []
    return [(mask, kind) for mask in MASKS for kind in (PROBABILITY, DETERMINISTIC) if kind in available]


def discrimination(tally, region, mask, measure, brief):
    """Return the metrics of one measure on one mask, a dict from name to float; arguments as of `values_of`."""
    counts, sums = tally.scores(region, mask, measure), tally.score_sums(region, mask, measure)
    found = {
        "auroc": metrics.auroc(counts),
        "aupr": metrics.aupr(counts),
        "error_rate": metrics.error_rate(counts),
        "mean_uncertainty": metrics.mean_uncertainty(sums, counts),
        "pearson_with_loss": metrics.pearson_with_loss(sums, counts),
        "auroc_certificate": metrics.auroc_certificate(counts),
        "n_voxels": counts.sum(),
        "n_true_positives": counts[:, 0].sum(),
    }
    if mask in JOINT_MASKS and not brief:
        found["spearman_with_loss"] = metrics.spearman_with_loss(tally.joint(region, mask, measure))
    return {name: float(value) for name, value in found.items()}


def calibration(tally, region, mask, kind, brief):
    """Return the metrics of one kind of probability on one mask, a dict from (name, n_bins) to float."""
    confidence = tally.confidences(region, mask, kind)
    kinds = (kind,)
    if region == ALL:  # the four-class view has probabilities of classes, of the mean alone
        kinds = CLASS_KINDS if kind == PROBABILITY else ()
    probabilities = [tally.probabilities(region, mask, name) for name in kinds]
    n, sum_c = confidence["n"], confidence["sum_c"]
    found = {
        ("gap", None): metrics.gap(n, sum_c),
        ("accuracy", None): metrics.accuracy(n),
        ("mean_confidence", None): metrics.mean_confidence(n, sum_c),
        ("n_voxels", None): n.sum(),
    }
    for bins in BRIEF_BINS if brief else N_BINS:
        for name in TOP_LABEL:
            found[name, bins] = getattr(metrics, name)(n, sum_c, bins)
        for name in CLASS_PROBABILITY if probabilities else ():
            classes = [getattr(metrics, name)(part["n"], part["sum_p"], bins) for part in probabilities]
            found[name, bins] = np.mean(classes)
    if region != ALL:
        (part,) = probabilities
        found["brier", None] = metrics.brier(part["n"], part["sum_p"], part["sum_p2"])
        found["brier_skill", None] = metrics.brier_skill(part["n"], part["sum_p"], part["sum_p2"])
        found["nll", None] = metrics.nll(part["n"], part["sum_log_p"], part["sum_log_1mp"])
        if not brief:
            intercept, slope = metrics.logistic_recalibration(part["n"], part["sum_logit"])
            found |= {("calibration_intercept", None): intercept, ("calibration_slope", None): slope}
    return {key: float(value) for key, value in found.items()}


def _whole(tally, region):
    """Return what is no metric of a single mask: the QU-BraTS score, boundary metrics and areas under retention."""
    scores = [tally.scores(region, mask, "entropy") for mask in ("volume", "brain")]
    score = metrics.qu_brats(*scores)
    found = {Key(region, "volume", "entropy", name, None): score[name] for name in QU_BRATS}
    sums, counts = (
        np.stack([getattr(tally, name)(region, band, "entropy") for band in BANDS]) for name in ("score_sums", "scores")
    )
    for name in BOUNDARY:
        found[Key(region, None, "entropy", name, None)] = getattr(metrics, name)(sums, counts)
    for measure in _retained(tally.available):
        areas = metrics.retention(tally.scores(region, "brain", measure))
        for name in RETENTION:
            found[Key(region, "brain", measure, name, None)] = areas[name.removeprefix("retention_")]
    return {key: float(value) for key, value in found.items()}


def _retained(available):
    return [measure for measure in (*MEASURES, *MEMBER_MEASURES) if measure in available]


class Curve(NamedTuple):
    """Which curve of a patient: `qu_brats_dsc`, `qu_brats_ftp`, `qu_brats_ftn` or `retention`."""

    name: str
    region: str
    measure: str


def curves_of(tally):
    """Return the curves of a tally that cohorts average, a dict from `Curve` to float64 (points,).

    The points are `metrics.QU_BRATS_THRESHOLDS` and `metrics.RETENTION_FRACTIONS`.
    """
    curves = {}
    for region in REGIONS:
        score = metrics.qu_brats(*(tally.scores(region, mask, "entropy") for mask in ("volume", "brain")))
        curves |= {Curve(f"qu_brats_{name}", region, "entropy"): score[name] for name in ("dsc", "ftp", "ftn")}
        for measure in _retained(tally.available):
            found = metrics.retention(tally.scores(region, "brain", measure))
            curves[Curve("retention", region, measure)] = found["curve"]
    return curves


def frame_of(values):
    """Return values as a DataFrame with the columns region, mask, measure, metric, n_bins, value."""
    frame = pd.DataFrame([(*key, value) for key, value in values.items()], columns=[*Key._fields, "value"])
    return frame.astype({"n_bins": "Int64"})


# --- as text, kept in a tally's file --------------------------------------------------------------------------------


def to_text(tally):
    """Return the values and curves of a patient's tally, and its values after fewer passes, as text."""
    parts = {"values": list(values_of(tally).values()), "curves": np.concatenate(list(curves_of(tally).values()))}
    for passes, early in tally.convergence.items():
        parts[str(passes)] = list(values_of(early, brief=True).values())
    return json.dumps({name: _packed(numbers) for name, numbers in parts.items()}, sort_keys=True)


def from_text(text, available, early):
    """Return (values, curves, {passes: values after fewer passes}) that `to_text` described.

    available : the series that the tally has; early : {passes: the series of the tally after them}
    """
    parts = {name: _unpacked(packed) for name, packed in json.loads(text).items()}
    values = dict(zip(_keys(frozenset(available), False), parts["values"].tolist(), strict=True))
    names, lengths = _curve_keys(frozenset(available))
    curves = dict(zip(names, np.split(parts["curves"], np.cumsum(lengths)[:-1]), strict=True))
    fewer = {
        passes: dict(zip(_keys(frozenset(series), True), parts[str(passes)].tolist(), strict=True))
        for passes, series in early.items()
    }
    return values, curves, fewer


def _packed(numbers):
    return base64.b64encode(zlib.compress(np.asarray(numbers, "<f8").tobytes())).decode()


def _unpacked(text):
    return np.frombuffer(zlib.decompress(base64.b64decode(text)), "<f8")


@cache
def _keys(available, brief):
    # what is computed, and in which order, hangs on what exists and on no count
    return tuple(values_of(Tally.empty(available), brief=brief))


@cache
def _curve_keys(available):
    curves = curves_of(Tally.empty(available))
    return tuple(curves), [len(points) for points in curves.values()]
