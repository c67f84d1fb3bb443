"""Metrics: pure functions of tally counts (definitions, sections 4, 6 and 7).

Every function takes arrays whose last axes are (bins, outcomes), as the accessors of `segtrust.tally.Tally` return
them, and whose leading axes are free (patients, bootstrap resamples); counts may be weighted, so they may be
fractions. It returns arrays of the leading shape, float64, NaN where the metric is undefined (empty mask, one class).
`compute` gives all of them from arrays of voxels in one call.
"""

from functools import cache, partial

import numpy as np

from segtrust.bins import (
    CLIP,
    CONFIDENCE_BINS,
    FN,
    FP,
    JOINT_BINS,
    PROBABILITY_BINS,
    SCORE_BINS,
    TN,
    TP,
    joint_groups,
    loss_index,
    sums_by,
)
from segtrust.errors import SegtrustError
from segtrust.masks import BANDS
from segtrust.measures import binary_entropy

QU_BRATS_THRESHOLDS = np.arange(41) * 2.5
RETENTION_FRACTIONS = np.arange(101) / 100


def _ratio(numerator, denominator):
    """Return a quotient, NaN where the denominator is zero."""
    numerator, denominator = np.broadcast_arrays(np.asarray(numerator, float), np.asarray(denominator, float))
    return np.divide(numerator, denominator, out=np.full(denominator.shape, np.nan), where=denominator != 0)


# --- discrimination: score bins × {TP, FP, FN, TN} ----------------------------------------------------------


def _errors(scores):
    """Return errors and correct voxels by score bin, float64 (…, bins) each."""
    scores = np.asarray(scores)
    return (scores[..., FP] + scores[..., FN]).astype(float), (scores[..., TP] + scores[..., TN]).astype(float)


def auroc(scores):
    """Return the probability that an error has a higher score than a correct voxel, ties counting one half."""
    errors, correct = _errors(scores)
    below = np.cumsum(correct, axis=-1) - correct / 2
    return _ratio((errors * below).sum(axis=-1), errors.sum(axis=-1) * correct.sum(axis=-1))


def auroc_certificate(scores):
    """Return the most by which ties within bins can change `auroc`: half the sum of products of shares per bin."""
    errors, correct = _errors(scores)
    return _ratio((errors * correct).sum(axis=-1) / 2, errors.sum(axis=-1) * correct.sum(axis=-1))


def aupr(scores):
    """Return the average precision of the score for errors: step rule, from the highest score down."""
    errors, correct = _errors(scores)
    errors, correct = errors[..., ::-1], correct[..., ::-1]
    caught = np.cumsum(errors, axis=-1)
    flagged = caught + np.cumsum(correct, axis=-1)
    precision = np.divide(caught, flagged, out=np.zeros_like(caught), where=flagged > 0)
    return _ratio((errors * precision).sum(axis=-1), errors.sum(axis=-1))


def roc_curve(scores):
    """Return (false positive rate, true positive rate) as each bin is flagged, highest first: (…, bins + 1) each."""
    errors, correct = _errors(scores)
    return tuple(_from_top(part, part.sum(axis=-1, keepdims=True)) for part in (correct, errors))


def precision_recall_curve(scores):
    """Return (recall, precision) as each bin is flagged, highest first: (…, bins) each; NaN while none is."""
    errors, correct = _errors(scores)
    caught = np.cumsum(errors[..., ::-1], axis=-1)
    flagged = caught + np.cumsum(correct[..., ::-1], axis=-1)
    return _ratio(caught, errors.sum(axis=-1, keepdims=True)), _ratio(caught, flagged)


def _from_top(part, total):
    flagged = np.cumsum(part[..., ::-1], axis=-1)
    return _ratio(np.concatenate([np.zeros_like(total), flagged], axis=-1), total)


def error_rate(scores):
    """Return the share of errors."""
    errors, correct = _errors(scores)
    return _ratio(errors.sum(axis=-1), (errors + correct).sum(axis=-1))


def mean_uncertainty(score_sums, scores):
    """Return the mean of the measure over a mask.

    score_sums : (…, 5, 4), the sums of the tally; scores : (…, bins, 4)
    """
    return _ratio(np.asarray(score_sums)[..., 0, :].sum(axis=-1), np.asarray(scores).sum(axis=(-2, -1)))


def pearson_with_loss(score_sums, scores):
    """Return Pearson's correlation of the measure with the voxel's loss; NaN where either does not vary."""
    n = np.asarray(scores).sum(axis=(-2, -1)).astype(float)
    means = _ratio(np.asarray(score_sums).sum(axis=-1), n[..., None])
    u, u2, loss, loss2, product = np.moveaxis(means, -1, 0)
    spread = _variance(u, u2) * _variance(loss, loss2)
    return _ratio(product - u * loss, np.sqrt(spread))


def _variance(mean, mean_square):
    # what subtraction leaves of a constant is rounding, about 1e-16 of its square
    variance = mean_square - mean**2
    return np.where(variance > 1e-13 * mean_square, variance, np.where(np.isnan(variance), np.nan, 0))


def spearman_with_loss(joint):
    """Return Spearman's correlation of the measure with the voxel's loss from a joint histogram (…, 256, 256).

    Ranks within a bin are tied (mean rank).
    """
    joint = np.asarray(joint, float)
    n = joint.sum(axis=(-2, -1))
    shares = [_ratio(joint.sum(axis=axis), n[..., None]) for axis in (-1, -2)]
    u, loss = (np.cumsum(share, axis=-1) - share / 2 - 0.5 for share in shares)
    covariance = _ratio((joint * u[..., :, None] * loss[..., None, :]).sum(axis=(-2, -1)), n)
    spread = (shares[0] * u**2).sum(axis=-1) * (shares[1] * loss**2).sum(axis=-1)
    return _ratio(covariance, np.sqrt(np.where(spread > 1e-24, spread, 0)))


def ue_dice(scores, first_bin):
    """Return the Dice between the voxels in bins from `first_bin` on and the errors (Jungo 2020).

    NaN if neither exists.
    """
    errors, correct = (part[..., first_bin:].sum(axis=-1) for part in _errors(scores))
    missed = _errors(scores)[0][..., :first_bin].sum(axis=-1)
    return _ratio(2 * errors, 2 * errors + correct + missed)


# --- calibration: bins × {0, 1} -----------------------------------------------------------------------------


@cache
def fine_starts(n_bins, kind):
    """Return the fine bin at which each of `n_bins` equal bins of [0, 1] starts."""
    edges = (PROBABILITY_BINS if kind == "probability" else CONFIDENCE_BINS).edges
    wanted = np.arange(n_bins) / n_bins
    if kind == "confidence":
        wanted = wanted[wanted >= edges[1]]  # confidence below 1/4 does not exist: all of it is in the first bin
    start = np.searchsorted(edges, wanted)
    if not np.array_equal(edges[start], wanted):
        raise ValueError(f"{n_bins} bins are not unions of the tally's: n_bins must divide 60 or 960")
    return start if kind == "probability" else np.concatenate([[0], start])


def _equal_width(n, sums, n_bins, kind):
    """Return voxels, positives (or correct), and summed probability (or confidence) by bin."""
    start = fine_starts(n_bins, kind)
    n, sums = np.asarray(n, float), np.asarray(sums, float)
    return tuple(np.add.reduceat(part, start, axis=-1) for part in (n.sum(axis=-1), n[..., 1], sums.sum(axis=-1)))


def _equal_mass(n, sums, n_bins):
    """Return the same by quantile bins (`quantile_ends`): bins without voxels vanish."""
    n, sums = np.asarray(n, float), np.asarray(sums, float)
    upward = [np.cumsum(part, axis=-1) for part in (n.sum(axis=-1), n[..., 1], sums.sum(axis=-1))]
    ends = quantile_ends(upward[0], n_bins)
    return tuple(between(part, ends) for part in upward)


def quantile_ends(reached, n_bins):
    """Return where quantile bins end, (…, n_bins): the number of fine bins before the end.

    reached : (…, fine bins), voxels in a fine bin and all lower ones

    Equal values stay together. A bin starts at the quantile k/n_bins, which belongs to it: the least value that a share
    k/n_bins of the voxels does not exceed. Copies of all voxels leave it where it is, which an interpolated quantile
    does not.
    """
    shape, n_fine = reached.shape[:-1], reached.shape[-1]
    reached = reached.reshape(-1, n_fine).astype(np.float64)
    total = reached[:, -1:]
    position = np.ceil(total * np.arange(1, n_bins) / n_bins - 1e-9) - 1
    # one search for all rows: each is moved beyond the one before
    row = np.arange(len(reached))[:, np.newaxis]
    apart = row * (total.max(initial=0) + 1)
    inner = np.searchsorted((reached + apart).ravel(), (position + apart).ravel(), side="right")
    inner = np.clip(inner.reshape(position.shape) - row * n_fine, 0, n_fine)
    return np.concatenate([inner, np.full_like(inner[:, :1], n_fine)], axis=1).reshape(*shape, n_bins)


def between(upward, ends):
    """Return sums between ends, (…, bins), float64.

    upward : (…, fine bins), sums of a fine bin and all lower ones; ends : as of `quantile_ends`
    """
    at_ends = np.take_along_axis(upward, np.maximum(ends - 1, 0), axis=-1).astype(np.float64)
    return np.diff(np.where(ends > 0, at_ends, 0), axis=-1, prepend=0)


def _expected(voxels, positives, sums):
    return _ratio(np.abs(sums - positives).sum(axis=-1), voxels.sum(axis=-1))


def _average(voxels, positives, sums):
    gaps = _ratio(np.abs(sums - positives), voxels)
    return _ratio(np.nansum(gaps, axis=-1), (voxels > 0).sum(axis=-1))


def _maximum(voxels, positives, sums):
    gaps = np.divide(np.abs(sums - positives), voxels, out=np.zeros_like(sums), where=voxels > 0)
    return np.where(voxels.sum(axis=-1) > 0, gaps.max(axis=-1), np.nan)


def reliability(n, sums, n_bins, kind):
    """Return the reliability diagram by equal-width bins: (mean, fraction, voxels), each (…, bins).

    kind : `probability` (n, sum_p by truth: fraction of positives) or `confidence` (n, sum_c by correctness: fraction
        correct; its first bin holds everything below the first edge that is at least 1/4)

    Mean and fraction are NaN in empty bins.
    """
    voxels, positives, sums = _equal_width(n, sums, n_bins, kind)
    return _ratio(sums, voxels), _ratio(positives, voxels), voxels


def ece_class_probability(n, sum_p, n_bins):
    """Return Σ_b (n_b/N) |mean p in b - fraction of positives in b| over equal-width bins of p in [0, 1].

    n, sum_p : (…, probability bins, 2) by truth; n_bins : a divisor of 60 or 960
    """
    return _expected(*_equal_width(n, sum_p, n_bins, "probability"))


def ece_top_label(n, sum_c, n_bins):
    """Return Σ_b (n_b/N) |mean c in b - fraction correct in b| over equal-width bins of c in [0, 1].

    n, sum_c : (…, confidence bins, 2) by correctness; n_bins : a divisor of 60 or 960
    """
    return _expected(*_equal_width(n, sum_c, n_bins, "confidence"))


def ace_class_probability(n, sum_p, n_bins):
    """Return the unweighted mean over non-empty bins of the gap of `ece_class_probability`."""
    return _average(*_equal_width(n, sum_p, n_bins, "probability"))


def ace_top_label(n, sum_c, n_bins):
    """Return the unweighted mean over non-empty bins of the gap of `ece_top_label`."""
    return _average(*_equal_width(n, sum_c, n_bins, "confidence"))


def mce_class_probability(n, sum_p, n_bins):
    """Return the greatest gap of `ece_class_probability` over non-empty bins."""
    return _maximum(*_equal_width(n, sum_p, n_bins, "probability"))


def mce_top_label(n, sum_c, n_bins):
    """Return the greatest gap of `ece_top_label` over non-empty bins."""
    return _maximum(*_equal_width(n, sum_c, n_bins, "confidence"))


def ece_equal_mass_class_probability(n, sum_p, n_bins):
    """Return `ece_class_probability` over quantile bins; equal values stay together."""
    return _expected(*_equal_mass(n, sum_p, n_bins))


def ece_equal_mass_top_label(n, sum_c, n_bins):
    """Return `ece_top_label` over quantile bins; equal values stay together."""
    return _expected(*_equal_mass(n, sum_c, n_bins))


def accuracy(n):
    """Return the share of correct voxels; n : (…, confidence bins, 2)."""
    n = np.asarray(n)
    return _ratio(n[..., 1].sum(axis=-1), n.sum(axis=(-2, -1)))


def mean_confidence(n, sum_c):
    """Return the mean confidence; n, sum_c : (…, confidence bins, 2)."""
    return _ratio(np.asarray(sum_c).sum(axis=(-2, -1)), np.asarray(n).sum(axis=(-2, -1)))


def gap(n, sum_c):
    """Return mean confidence minus accuracy: positive is over-confident."""
    return mean_confidence(n, sum_c) - accuracy(n)


def brier(n, sum_p, sum_p2):
    """Return the mean of (p - y)²; arrays (…, probability bins, 2) by truth."""
    n, sum_p, sum_p2 = (np.asarray(part, float).sum(axis=-2) for part in (n, sum_p, sum_p2))
    return _ratio(sum_p2.sum(axis=-1) - 2 * sum_p[..., 1] + n[..., 1], n.sum(axis=-1))


def brier_skill(n, sum_p, sum_p2):
    """Return 1 - Brier / (Brier of the prevalence); NaN where only one class occurs."""
    classes = np.asarray(n, float).sum(axis=-2)
    prevalence = _ratio(classes[..., 1], classes.sum(axis=-1))
    return 1 - _ratio(brier(n, sum_p, sum_p2), prevalence * (1 - prevalence))


def nll(n, sum_log_p, sum_log_1mp):
    """Return the mean negative log-likelihood, nats; p was clipped to [1e-7, 1 - 1e-7]."""
    total = np.asarray(sum_log_p)[..., 1].sum(axis=-1) + np.asarray(sum_log_1mp)[..., 0].sum(axis=-1)
    return _ratio(-total, np.asarray(n).sum(axis=(-2, -1)))


def logistic_recalibration(n, sum_logit):
    """Return (intercept, slope) of the logistic regression of truth on logit p, maximum likelihood.

    n, sum_logit : (…, probability bins, 2) by truth

    Each bin and truth enters with its mean logit. NaN where only one class occurs, p does not vary, or the classes
    are separable. Newton's method with halved steps; the likelihood is concave.
    """
    n = np.asarray(n, float)
    shape = n.shape[:-2]
    weight = n.reshape(-1, n.shape[-2] * 2)
    x = np.divide(np.asarray(sum_logit).reshape(weight.shape), weight, out=np.zeros_like(weight), where=weight > 0)
    y = np.broadcast_to([0.0, 1.0], n.shape[-2:]).reshape(-1)
    fits = [_fit_logistic(w[w > 0], a[w > 0], y[w > 0]) for w, a in zip(weight, x, strict=True)]
    return tuple(np.array(part).reshape(shape) for part in zip(*fits, strict=True)) if fits else (n[..., 0, 0],) * 2


def _fit_logistic(weight, x, y):
    undefined = (np.nan, np.nan)
    if not len(y) or y.min() == y.max() or x.max() - x.min() < 1e-9:
        return undefined
    if x[y == 1].min() >= x[y == 0].max() or x[y == 1].max() <= x[y == 0].min():
        return undefined
    weight = weight / weight.sum()
    design = np.stack([np.ones_like(x), x])

    def loss(coefficients):
        z = coefficients @ design
        return float(weight @ (np.logaddexp(0, z) - y * z))

    coefficients = np.array([0.0, 1.0])
    current = loss(coefficients)
    for _ in range(100):
        fitted = 1 / (1 + np.exp(-np.clip(coefficients @ design, -700, 700)))
        gradient = design @ (weight * (y - fitted))
        information = (design * (weight * fitted * (1 - fitted))) @ design.T
        information += 1e-12 * np.trace(information) * np.eye(2)
        step = np.linalg.solve(information, gradient)
        while (new := loss(coefficients + step)) > current + 1e-15 and np.abs(step).max() > 1e-12:
            step /= 2
        coefficients, current = coefficients + step, new
        if np.abs(step).max() < 1e-10:
            return tuple(coefficients)
    return undefined


def calibration_intercept(n, sum_logit):
    """Return the intercept of `logistic_recalibration`; 0 is calibrated."""
    return logistic_recalibration(n, sum_logit)[0]


def calibration_slope(n, sum_logit):
    """Return the slope of `logistic_recalibration`; 1 is calibrated, below 1 is over-confident."""
    return logistic_recalibration(n, sum_logit)[1]


# --- segmentation -------------------------------------------------------------------------------------------


def dice(tp, fp, fn):
    """Return 2 TP / (2 TP + FP + FN); 1 where prediction and reference are both empty."""
    tp, fp, fn = (np.asarray(part, float) for part in (tp, fp, fn))
    overlap = _ratio(2 * tp, 2 * tp + fp + fn)
    return np.where(2 * tp + fp + fn == 0, 1.0, overlap)


def sensitivity(tp, fn):
    """Return TP / (TP + FN); NaN where the reference is empty."""
    return _ratio(tp, np.asarray(tp) + fn)


def precision(tp, fp):
    """Return TP / (TP + FP); NaN where the prediction is empty."""
    return _ratio(tp, np.asarray(tp) + fp)


# --- QU-BraTS -----------------------------------------------------------------------------------------------


@cache
def _kept_bins():
    """Return how many score bins are kept at each of the 41 thresholds: those with u ≤ τ/100."""
    return np.searchsorted(SCORE_BINS.edges, np.arange(41) / 40, side="right")


def qu_brats(volume_scores, brain_scores):
    """Return the QU-BraTS score and its parts, a dict (definitions, section 6; Mehta 2022).

    volume_scores, brain_scores : (…, score bins, 4) of a measure in [0, 1], over the whole volume and over the brain

    `qu_brats`, `auc_dsc`, `auc_ftp`, `auc_ftn`, the references `qu_brats_zero` (an all-zero map) and
    `qu_brats_oracle` (100 on errors) have the leading shape; the curves `dsc`, `ftp`, `ftn` one more axis of 41
    thresholds 0, 2.5, …, 100. NaN where the volume holds no voxel.
    """
    kept = _kept_bins() - 1
    volume = np.cumsum(np.asarray(volume_scores, float), axis=-2)[..., kept, :]
    brain = np.cumsum(np.asarray(brain_scores, float), axis=-2)[..., kept, :]
    empty = volume[..., -1, :].sum(axis=-1) == 0
    dsc = dice(volume[..., TP], volume[..., FP], volume[..., FN])
    filtered = {}
    for name, outcome in (("ftp", TP), ("ftn", TN)):
        total = brain[..., -1:, outcome]
        filtered[name] = np.nan_to_num(_ratio(total - brain[..., outcome], total), nan=0.0)
    curves = {"dsc": dsc, **filtered}
    areas = {f"auc_{name}": np.trapezoid(curve, dx=1 / 40, axis=-1) for name, curve in curves.items()}
    whole = dsc[..., -1]
    parts = {
        **areas,
        "qu_brats": (areas["auc_dsc"] + (1 - areas["auc_ftp"]) + (1 - areas["auc_ftn"])) / 3,
        "qu_brats_zero": (whole + 2) / 3,
        "qu_brats_oracle": ((1 - 1 / 40) + (1 + whole) / 80 + 2) / 3,
        **curves,
    }
    return {
        name: np.where(empty if part.shape == empty.shape else empty[..., None], np.nan, part)
        for name, part in parts.items()
    }


# --- retention ----------------------------------------------------------------------------------------------


def retention(scores):
    """Return what it brings to replace the most uncertain voxels by the reference, a dict (definitions, section 7).

    scores : (…, score bins, 4), over `brain`

    `curve`, `random` and `ideal` are Dice at the fractions 0, 0.01, …, 1 replaced, (…, 101): by the score (ties by
    expected counts), at random, and errors first, false negatives before false positives. `area` is the area under
    the curve, `area_normalised` is 0 for random and 1 for ideal (NaN where the two agree). NaN for an empty mask.
    """
    scores = np.asarray(scores, float)
    total = scores.sum(axis=-2)
    n = total.sum(axis=-1)
    from_top = np.cumsum(scores[..., ::-1, :], axis=-2)
    from_top = np.concatenate([np.zeros_like(from_top[..., :1, :]), from_top], axis=-2)
    replaced = _interpolated(from_top, RETENTION_FRACTIONS * n[..., None])
    curve = _dice_after(total, replaced)
    random = _dice_after(total, RETENTION_FRACTIONS[:, None] * total[..., None, :])
    budget = RETENTION_FRACTIONS * n[..., None]
    ideal_replaced = np.zeros((*budget.shape, 4))
    ideal_replaced[..., FN] = np.minimum(budget, total[..., None, FN])
    ideal_replaced[..., FP] = np.minimum(budget - ideal_replaced[..., FN], total[..., None, FP])
    ideal = _dice_after(total, ideal_replaced)
    areas = [np.trapezoid(values, dx=0.01, axis=-1) for values in (curve, random, ideal)]
    result = {
        "curve": curve,
        "random": random,
        "ideal": ideal,
        "area": areas[0],
        "area_normalised": _ratio(areas[0] - areas[1], areas[2] - areas[1]),
    }
    return {
        name: np.where(n == 0 if value.shape == n.shape else (n == 0)[..., None], np.nan, value)
        for name, value in result.items()
    }


def _interpolated(cumulative, position):
    """Return cumulative outcome counts (…, bins + 1, 4) at positions (…, k) of their total, linear within bins."""
    count = cumulative.sum(axis=-1)
    shape = position.shape
    count, position = count.reshape(-1, count.shape[-1]), position.reshape(-1, shape[-1])
    upper = np.stack(
        [np.searchsorted(c, p, side="left") for c, p in zip(count, position, strict=True)] or [position]
    ).astype(np.intp)
    upper = np.clip(upper, 1, count.shape[1] - 1)
    low, high = (np.take_along_axis(count, at, axis=1) for at in (upper - 1, upper))
    share = np.divide(position - low, high - low, out=np.zeros_like(position), where=high > low)[..., None]
    flat = cumulative.reshape(-1, *cumulative.shape[-2:])
    low, high = (np.take_along_axis(flat, at[..., None], axis=1) for at in (upper - 1, upper))
    return (low + share * (high - low)).reshape(*shape, 4)


def _dice_after(total, replaced):
    tp = total[..., None, TP] + replaced[..., FN]
    return dice(tp, total[..., None, FP] - replaced[..., FP], total[..., None, FN] - replaced[..., FN])


# --- bands of distance to the reference surface -------------------------------------------------------------

_MIDPOINTS_MM = np.tile([0.5, 1.5, 2.5, 4.0, 7.5, 12.5], 2)
_NEAR = [BANDS.index(f"{side}_{width}") for side in ("inside", "outside") for width in ("0_1mm", "1_2mm", "2_3mm")]
_INTERIOR = [BANDS.index(f"inside_{width}") for width in ("3_5mm", "5_10mm", "over_10mm")]


def buc(band_sums, band_scores):
    """Return mean u in the 3 mm boundary band / (that + mean u in the interior); NaN for 0/0 or without either.

    band_sums : (…, 12, 5, 4); band_scores : (…, 12, bins, 4), in the order of `segtrust.masks.BANDS`
    """
    total = np.asarray(band_sums)[..., 0, :].sum(axis=-1)
    n = np.asarray(band_scores).sum(axis=(-2, -1))
    near, interior = (_ratio(total[..., part].sum(axis=-1), n[..., part].sum(axis=-1)) for part in (_NEAR, _INTERIOR))
    return _ratio(near, near + interior)


def ba_ece(band_sums, band_scores):
    """Return Σ_k w_k |mean u_k / 2 - error rate_k| over the bands that hold voxels (after Zeevi 2025).

    u is an entropy in bits; w_k ∝ exp(-midpoint_k / 3 mm), Σ w = 1. Arrays as for `buc`.
    """
    n = np.asarray(band_scores).sum(axis=(-2, -1)).astype(float)
    mean = _ratio(np.asarray(band_sums)[..., 0, :].sum(axis=-1), n)
    weight = np.where(n > 0, np.exp(-_MIDPOINTS_MM / 3), 0)
    terms = np.nan_to_num(weight * np.abs(mean / 2 - error_rate(band_scores)), nan=0.0)
    return _ratio(terms.sum(axis=-1), weight.sum(axis=-1))


# --- from arrays --------------------------------------------------------------------------------------------


def compute(probability, reference, names=None, *, uncertainty=None, n_bins=15):
    """Return metrics of the voxels of one region and mask, a dict from name to float.

    probability : float array of any shape, values in [0, 1], of the voxel belonging to the region; select the voxels of
        a mask before, `probability[mask]`
    reference : bool array of the same shape, whether it does
    names : which metrics, all where None: `auroc`, `aupr`, `error_rate`, `mean_uncertainty`, `pearson_with_loss`,
        `spearman_with_loss`, `auroc_certificate`, `ue_dice` (at the best threshold), `ece_class_probability`,
        `ece_top_label` and the same with `ace_`, `mce_`, `ece_equal_mass_`, `gap`, `accuracy`, `mean_confidence`,
        `brier`, `brier_skill`, `nll`, `calibration_intercept`, `calibration_slope`, `dice`, `sensitivity`, `precision`
    uncertainty : float array of the same shape, values in [0, 1], high where uncertain; the entropy of the probability
        in bits where None
    n_bins : of calibration errors, a divisor of 60 or 960

    A voxel is predicted where its probability is at least 1/2, and an error where that differs from the reference. The
    numbers are those that a tally of the same voxels has. NaN where a metric is undefined. Raises SegtrustError for
    shapes that differ, values outside [0, 1] or NaN, and unknown names.
    """
    p, truth = np.asarray(probability, np.float64), np.asarray(reference)
    u = p if uncertainty is None else np.asarray(uncertainty, np.float64)
    _check_arrays(p, truth, u)
    u = binary_entropy(p) if uncertainty is None else u
    p, u, truth = p.ravel(), u.ravel(), truth.ravel().astype(np.int64)
    predicted = (p >= 0.5).astype(np.int64)
    outcome = 3 - 2 * predicted - truth
    log_p, log_1mp = (np.log(np.clip(value, CLIP, 1 - CLIP)) for value in (p, 1 - p))
    loss = -np.where(truth == 1, log_p, log_1mp)
    confidence = np.maximum(p, 1 - p)

    bins = SCORE_BINS.index(u)
    scores = _counted(bins, outcome, len(SCORE_BINS), 4)
    sums = np.stack([sums_by(outcome, values, 4) for values in (u, u * u, loss, loss * loss, u * loss)])
    joint = np.bincount(joint_groups().take(bins) * JOINT_BINS + loss_index(loss), minlength=JOINT_BINS**2)
    p_bins, c_bins = PROBABILITY_BINS.index(p), CONFIDENCE_BINS.index(confidence)
    by_p = [_counted(p_bins, truth, len(PROBABILITY_BINS), 2, values) for values in (None, p, p * p, log_p, log_1mp)]
    n, sum_p, sum_p2, sum_log_p, sum_log_1mp = by_p
    n_c, sum_c = (_counted(c_bins, predicted == truth, len(CONFIDENCE_BINS), 2, v) for v in (None, confidence))
    found = np.bincount(outcome, minlength=4)
    fit = []

    def recalibrated(position):
        fit[:] = fit or logistic_recalibration(n, sum_log_p - sum_log_1mp)
        return fit[position]

    functions = {
        "auroc": lambda: auroc(scores),
        "aupr": lambda: aupr(scores),
        "error_rate": lambda: error_rate(scores),
        "mean_uncertainty": lambda: mean_uncertainty(sums, scores),
        "pearson_with_loss": lambda: pearson_with_loss(sums, scores),
        "spearman_with_loss": lambda: spearman_with_loss(joint.reshape(JOINT_BINS, JOINT_BINS)),
        "auroc_certificate": lambda: auroc_certificate(scores),
        "ue_dice": lambda: np.nanmax([ue_dice(scores, first) for first in np.flatnonzero(scores.any(axis=1))]),
    }
    for name in ("ece", "ace", "mce", "ece_equal_mass"):
        functions[f"{name}_class_probability"] = partial(globals()[f"{name}_class_probability"], n, sum_p, n_bins)
        functions[f"{name}_top_label"] = partial(globals()[f"{name}_top_label"], n_c, sum_c, n_bins)
    functions |= {
        "gap": lambda: gap(n_c, sum_c),
        "accuracy": lambda: accuracy(n_c),
        "mean_confidence": lambda: mean_confidence(n_c, sum_c),
        "brier": lambda: brier(n, sum_p, sum_p2),
        "brier_skill": lambda: brier_skill(n, sum_p, sum_p2),
        "nll": lambda: nll(n, sum_log_p, sum_log_1mp),
        "calibration_intercept": lambda: recalibrated(0),
        "calibration_slope": lambda: recalibrated(1),
        "dice": lambda: dice(found[TP], found[FP], found[FN]),
        "sensitivity": lambda: sensitivity(found[TP], found[FN]),
        "precision": lambda: precision(found[TP], found[FP]),
    }
    unknown = [name for name in names or () if name not in functions]
    if unknown:
        raise SegtrustError(f"no metric is called {', '.join(unknown)}; there are {', '.join(functions)}")
    return {name: float(functions[name]()) for name in names or functions}


def _check_arrays(probability, reference, uncertainty):
    if not probability.shape == reference.shape == uncertainty.shape:
        shapes = f"{probability.shape}, {reference.shape} and {uncertainty.shape}"
        raise SegtrustError(f"probability, reference and uncertainty have shapes {shapes}, expected the same")
    if not np.isin(reference, (0, 1)).all():
        raise SegtrustError("reference has values other than 0 and 1; give one region, such as `labels > 0`")
    for name, values in (("probability", probability), ("uncertainty", uncertainty)):
        bad = ~((values >= 0) & (values <= 1))  # NaN fails both
        if bad.any():
            raise SegtrustError(
                f"{name} has {int(bad.sum()):,} values outside [0, 1] or NaN (smallest {values.min():g}, largest "
                f"{values.max():g})"
            )


def _counted(bins, second, n_bins, n_second, values=None):
    """Return counts (n_bins, n_second), or sums of values, by bin and a second number."""
    key, size = bins.astype(np.int64) * n_second + second, n_bins * n_second
    found = np.bincount(key, minlength=size) if values is None else sums_by(key, values, size)
    return found.reshape(n_bins, n_second)
