"""What a reader must know before believing the numbers.

Every function returns a list of alarms, empty when all is well. An alarm is a dict with `alarm` (its name),
`severity` ("error": the numbers are wrong or mean something else; "warning": read them with care; "note"),
`model`, `region` (None: all), `message` (what was found and what to do) and `value`. Rules: definitions §4.
"""

from itertools import permutations

import numpy as np

from segtrust.regions import CLASSES, CODINGS, REGIONS, region_masks

BETTER_BY = 0.1
FEW_PATIENTS = 10
# Sums over millions of voxels round in the last digits; a real contradiction is far larger.
ROUNDING = 1e-6
# canonical labels in WT, TC, ET; a cavity (4) is in none
_IN_REGION = np.append(region_masks(np.arange(4)), np.zeros((3, 1), bool), axis=1)


def alarm(name, severity, model, region, message, value=None):
    """Return one alarm; value must be writable as JSON."""
    return {
        "alarm": name,
        "severity": severity,
        "model": model,
        "region": region,
        "message": message,
        "value": value,
    }


def channel_order(overlap, predicted, reference, model):
    """Tell whether the model's region channels seem to be in another order.

    overlap : int64 (n_cases, 3, 3), voxels in predicted region a and reference region b
    predicted, reference : int64 (n_cases, 3), voxels in each region

    The mean Dice over cases and regions is computed under every order; one that is better by more than 0.1 is
    named.
    """
    dice = _dice(2 * overlap, predicted[:, :, np.newaxis] + reference[:, np.newaxis, :]).mean(axis=0)
    score = {order: dice[list(order), range(3)].mean() for order in permutations(range(3))}
    given, best = score[0, 1, 2], max(score, key=score.get)
    if score[best] - given <= BETTER_BY:
        return []
    # best[b] is the channel that fits the reference region b; what the channel called a really holds is its inverse.
    truth = ", ".join(f"{REGIONS[best.index(a)]} in the channel read as {REGIONS[a]}" for a in range(3))
    message = (
        f"The region channels seem to be in another order: with {truth}, the mean Dice over all regions is "
        f"{score[best]:.3f} instead of {given:.3f}. Check the order of `outputs` in this model's section of the "
        "config, and the coding of the references."
    )
    order = [REGIONS[best.index(a)] for a in range(3)]
    value = {"order": order, "dice": float(score[best]), "given": float(given)}
    return [alarm("channel_order", "error", model, None, message, value)]


def partial(n, asked, model):
    """Tell that patients are missing from the tables; n : those that are in them; asked : those that should be."""
    message = (
        f"These tables hold {n} of {asked} patients; missing.json says who is not in them, and why. If those who are "
        "missing are the hard ones, every number here is too good. Finish the cohort before you report any."
    )
    return [alarm("partial", "error", model, None, message, {"n": n, "of": asked})]


def class_order(classes, model):
    """Tell whether the model's classes seem to be in another order.

    classes : as for `coding`

    The mean Dice over cases and regions is computed under every order of the four predicted classes; one that is
    better by more than 0.1 is named. Only a softmax has such an order, so this is a warning.
    """
    score = {
        order: np.mean([_region_dice(table, _IN_REGION, _IN_REGION[:, order]) for table in classes])
        for order in permutations(range(4))
    }
    given, best = score[0, 1, 2, 3], max(score, key=score.get)
    if score[best] - given <= BETTER_BY:
        return []
    order = [CLASSES[label] for label in best]
    message = (
        f"The predicted classes fit the references better in another order: with {', '.join(order)} in place of "
        f"{', '.join(CLASSES)}, the mean Dice over all regions is {score[best]:.3f} instead of {given:.3f}. If the "
        "`outputs` of this model are a softmax, check the order of its classes; check the coding of the references too."
    )
    value = {"order": order, "dice": float(score[best]), "given": float(given)}
    return [alarm("class_order", "warning", model, None, message, value)]


def coding(classes, given, model):
    """Tell whether the references fit the predictions better when their codes are read in another coding.

    classes : int64 (n_cases, 4, 5), voxels of each predicted class (background, NCR, ED, ET) and canonical label,
        the fifth being a resection cavity
    given : the coding each case was read in, a key of `CODINGS`

    A coding is considered when it knows all codes that occur.
    """
    read = [[_region_dice(table, _IN_REGION) for table in classes]]
    score = {None: np.mean(read)}
    for name in CODINGS:
        memberships = [_read_again(table, own, name) for table, own in zip(classes, given, strict=True)]
        if all(membership is not None for membership in memberships):
            pairs = zip(classes, memberships, strict=True)
            score[name] = np.mean([_region_dice(table, membership) for table, membership in pairs])
    best = max(score, key=score.get)
    if best is None or score[best] - score[None] <= BETTER_BY:
        return []
    message = (
        f"The references fit the predictions better in coding {best}: mean Dice over all regions {score[best]:.3f} "
        f"instead of {score[None]:.3f} in {listed(sorted(set(given)))}. Check the column `coding` of the patient "
        "sheet against the source of the data."
    )
    value = {"coding": best, "dice": float(score[best]), "given": float(score[None])}
    return [alarm("coding", "error", model, None, message, value)]


def _read_again(table, own, other):
    """Return membership (3, 5) of the canonical labels of one case in WT, TC, ET if read in another coding."""
    occurs = table.sum(axis=0) > 0
    membership = np.zeros((3, 5), dtype=bool)
    code_of = {label: code for code, label in reversed(CODINGS[own].items())} | {4: 4}
    for label in np.flatnonzero(occurs):
        if code_of[label] not in CODINGS[other]:
            return None
        membership[:, label] = _IN_REGION[:, CODINGS[other][code_of[label]]]
    return membership


def _region_dice(table, in_reference, in_prediction=_IN_REGION[:, :4]):
    overlap = in_prediction @ table @ in_reference.T
    total = in_prediction @ table.sum(axis=1) + in_reference @ table.sum(axis=0)
    return _dice(2 * np.diag(overlap), total)


def empty_regions(predicted, reference, model):
    """Tell which regions are empty in the prediction, or in the reference, of every case; arguments as above."""
    found = []
    for b, region in enumerate(REGIONS):
        if len(reference) and not reference[:, b].any():
            message = (
                f"{region} is empty in the reference of all {len(reference)} patients, so nothing about {region} "
                "can be evaluated. Check the column `coding` of the patient sheet."
            )
            found.append(alarm("reference_always_empty", "error", model, region, message))
        if len(predicted) and not predicted[:, b].any():
            message = (
                f"The model predicts no {region} in any of {len(predicted)} patients. Check the order of `outputs`, "
                "the normalisation the checkpoint expects, and that the right checkpoint is named."
            )
            found.append(alarm("prediction_always_empty", "error", model, region, message))
    return found


def zero_variance(variance, model):
    """Tell where the passes do not differ.

    variance : float64 (n_cases, 3), variance over passes summed over the brain, NaN where there is none
    """
    found = []
    for b, region in enumerate(REGIONS):
        known = variance[np.isfinite(variance[:, b]), b]
        still = int((known == 0).sum())
        if still:
            message = (
                f"All passes are identical on {region} in {still} of {len(known)} patients, so mutual information and "
                "variance are 0 there. "
            )
            if still == len(known):
                severity, cause = "error", "Nothing random was active: check `stochastic` of this model."
            else:
                severity, cause = "warning", f"Where the model sees no {region} at all, this is to be expected."
            message += cause
            found.append(alarm("zero_variance", severity, model, region, message, still))
    return found


def unequal_passes(n_passes, patients, model):
    """Tell when patients have different numbers of passes; n_passes : int (n_cases,)."""
    numbers, count = np.unique(n_passes, return_counts=True)
    if len(numbers) < 2:
        return []
    usual = numbers[count.argmax()]
    others = [f"{name} ({n})" for name, n in zip(patients, n_passes, strict=True) if n != usual]
    message = (
        f"Patients have different numbers of passes: {usual} in most, but {listed(others)}. Entropy and variance "
        "depend on the number of passes; complete the missing passes or use fewer for all."
    )
    value = {str(number): int(n) for number, n in zip(numbers, count, strict=True)}
    return [alarm("unequal_passes", "error", model, None, message, value)]


def differing_measures(available, patients, model):
    """Tell when a measure exists for some patients only; its rows are then null.

    available : list of sets of names, one per patient
    """
    found = []
    for measure in sorted(set().union(*available).difference(set.intersection(*map(set, available)))):
        without = [name for name, names in zip(patients, available, strict=True) if measure not in names]
        message = (
            f"{measure} does not exist for {listed(without)} ({len(without)} of {len(patients)} patients), so it is "
            "null for the cohort. Give every patient the same passes, with or without a deterministic one."
        )
        found.append(
            alarm("differing_measures", "error", model, None, message, {"measure": measure, "without": without})
        )
    return found


def few_patients(n_subjects, model):
    """Tell when there are fewer than 10 subjects."""
    if n_subjects >= FEW_PATIENTS:
        return []
    interval = "intervals are wide and unreliable" if n_subjects >= 6 else "no intervals can be given"
    message = f"Only {n_subjects} patients were evaluated: {interval}. Add patients before drawing conclusions."
    return [alarm("few_patients", "warning", model, None, message, int(n_subjects))]


def nesting_breaks(breaks, predicted, patients, model):
    """Tell when predicted regions do not nest (ET in TC in WT).

    breaks : int64 (n_cases,), voxels outside the region that should hold them
    predicted : int64 (n_cases, 3), voxels in each predicted region
    """
    total, whole = int(breaks.sum()), int(predicted[:, 0].sum())
    if not total:
        return []
    worst = [f"{patients[k]} ({breaks[k]:,})" for k in np.argsort(-breaks, kind="stable")[:3] if breaks[k]]
    message = (
        f"Predicted regions do not nest in {total:,} voxels of {int((breaks > 0).sum())} patients, most in "
        f"{', '.join(worst)}. Region metrics read each channel by itself and are not affected; the "
        "written segmentation overlays TC and ET on WT."
    )
    return [alarm("nesting_breaks", "warning" if total > 0.01 * whole else "note", model, None, message, total)]


def infeasible(dice, true_positives, inside, region, mask, measure, patients, model):
    """Assert, case by case, what Dice implies for accuracy and calibration error.

    dice, true_positives : of the whole volume (n_cases,)
    inside : dict of float64 (n_cases,) within the mask: `true_positives`, `accuracy`, `mean_confidence`, and
        calibration errors by name

    On a mask that holds all true positives, accuracy ≥ Dice/(2 − Dice) and every equal-width or equal-mass
    calibration error ≤ (1 − accuracy) + min(accuracy/2, 1 − mean confidence). Both are theorems: a row that breaks
    one was computed wrongly.
    """
    accuracy, confidence = inside["accuracy"], inside["mean_confidence"]
    whole = (true_positives > 0) & (inside["true_positives"] == true_positives) & np.isfinite(accuracy)
    broken = {"accuracy": whole & (accuracy < dice / (2 - dice) - ROUNDING)}
    highest = (1 - accuracy) + np.minimum(accuracy / 2, 1 - confidence)
    for name, error in inside.items():
        if name.startswith("ece_"):
            broken[name] = error > highest + ROUNDING
    found = []
    for name, where in broken.items():
        if where.any():
            names = [patients[k] for k in np.flatnonzero(where)]
            message = (
                f"{name} of {measure} on {mask} contradicts the Dice or accuracy of the same voxels in "
                f"{listed(names)}: these rows cannot all be right. Remake the tallies; if it stays, please report it."
            )
            found.append(alarm("infeasible", "error", model, region, message, {"metric": name, "patients": names}))
    return found


def differing_dice(first, second, region, patients, model):
    """Tell when the Dice of two tables differ; first, second : float64 (n_cases,)."""
    differ = ~np.isclose(first, second, rtol=0, atol=ROUNDING, equal_nan=True)
    if not differ.any():
        return []
    names = [patients[k] for k in np.flatnonzero(differ)]
    message = (
        f"Dice of {region} differs between the overlap counts and the voxel counts of {listed(names)}. "
        "The tallies do not belong together: remake them."
    )
    return [alarm("dice_differs", "error", model, region, message, names)]


def _dice(twice_overlap, total):
    return np.where(total > 0, twice_overlap / np.maximum(total, 1), 1.0)


def listed(names, most=5):
    """Return the first names, and how many more there are, as text."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(str(name) for name in names[:most]) + more
