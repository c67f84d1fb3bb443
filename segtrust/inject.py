"""Inject: dropout in a network that was trained without it, its rate, and the scale of its uncertainty.

Both are chosen on the patients of split calibration, on the passes of the first member, unflipped (definitions,
section 10). After E. Ledda, G. Fumera and F. Roli, Dropout injection at test time for post hoc uncertainty
quantification in neural networks, Information Sciences 645:119356, 2023, which treats regression.
"""

from collections.abc import Sequence

import numpy as np

from segtrust.cases import read_with_reference
from segtrust.errors import SegtrustError
from segtrust.jobs import log_line
from segtrust.masks import predicted_5mm
from segtrust.progress import counting
from segtrust.regions import REGIONS, region_masks
from segtrust.sample import sample
from segtrust.sources import Source

RATES = (0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5)  # tried for `rate: auto`
MAX_DELTA_DICE = 0.01
EQUAL_NLL = 1e-3  # relative, where a single patient leaves no standard error
CLIP = 1e-7  # of p, in logarithms


def passes_fitted(config, model):
    """Return how many passes are drawn per patient and rate: as many as the model is asked for from each source."""
    return config["models"][model]["stochastic"].get("passes", config["sample"]["passes"])


class Calibration(Sequence):
    """The patients of split calibration, a sequence that reads each anew whenever it is asked for.

    Its items are (patient, Preprocessed, canonical labels uint8 (x, y, z) on the patient's own grid). Raises
    PatientError where a reference cannot be used.

    scans, references : lists of paths of preprocessed scans and of label files
    patients, codings : lists as long
    """

    def __init__(self, scans, references, patients, codings):
        self._rows = list(zip(scans, references, patients, codings, strict=True))

    def __len__(self):
        return len(self._rows)

    def __getitem__(self, index):
        scan, reference, patient, coding = self._rows[index]
        return patient, *read_with_reference(scan, reference, patient, coding)


def fit(cases, open_at, *, inject, passes, batch, sampling, log=log_line):
    """Choose the rate of injected dropout, and fit the scale of its uncertainty.

    The rate is the given one or, for "auto", that of `RATES` which `choose` takes. The scale is that of `scale_of`,
    with passes at that rate.

    cases : sized iterable of (patient, Preprocessed, canonical labels), such as `Calibration`, gone through once per
        rate; one patient at a time is in memory
    open_at : function that takes `rate` and returns the backend with dropout injected at it
    inject : dict with `rate`, a number or "auto"
    passes : drawn per patient and rate, from the first member, unflipped
    batch : as in `sample`; sampling : its further settings, a dict
    log : function that takes a line of text

    Returns a JSON-able dict: `rate`; `chosen`, "given" or "auto"; `scale` by region, null where it is not defined;
    `curve`, see `point`; `n_patients`; `n_empty_prediction` by region, the patients that count for Dice only, because
    the deterministic pass predicts no voxel; `passes`; and the backend's `device`, `backend` and `precision`. Raises
    SegtrustError where no rate can be chosen.
    """
    automatic = inject["rate"] == "auto"
    rates = RATES if automatic else (inject["rate"],)
    curve = []
    with counting(len(rates) * len(cases), "patients at each rate", log=log) as count:
        for rate in rates:
            backend = open_at(rate=rate)
            found = []
            for patient, scan, labels in cases:
                moments = sample(
                    scan,
                    backend,
                    passes=range(passes),
                    patient=patient,
                    source=Source(0),
                    batch=batch,
                    log=_nothing,
                    **sampling,
                )
                found.append(measure(moments, labels, passes))
                done = len(curve) * len(cases) + len(found)
                count.reached(done, f"rate {rate:g}, {patient}: {_told(found[-1])}")
            curve.append(point(rate, found))
    chosen = choose(curve) if automatic else curve[0]
    log(f"rate {chosen['rate']:g} of\n{_table(curve)}")
    return {
        "rate": chosen["rate"],
        "chosen": "auto" if automatic else "given",
        "scale": chosen["scale"],
        "curve": curve,
        "n_patients": len(cases),
        "n_empty_prediction": dict(
            zip(REGIONS, np.isnan([measured["nll"] for measured in found]).sum(axis=0).tolist(), strict=True)
        ),
        "passes": passes,
        "device": backend.device,
        "backend": backend.name,
        "precision": backend.precision,
    }


def measure(moments, labels, passes):
    """Return what the passes of one patient say about a rate, a dict of float64 arrays over the regions.

    moments : Moments that hold the deterministic pass
    labels : canonical, uint8 (x, y, z), on the patient's own grid
    passes : T

    `dice`, of the mean over passes, and `dice_deterministic`, on the whole grid (1 where prediction and reference are
    both empty); then means over the voxels of `predicted_5mm` of the **deterministic** pass, which are the same at
    every rate: `nll`, of the mean probability (nats, p clipped to [1e-7, 1 - 1e-7]), `squared_error`, (y - p̄)², and
    `variance`, over passes (0 for T = 1). NaN where the deterministic pass predicts no voxel.
    """
    summary = moments.summary(passes)
    variance = np.zeros_like(summary.probability) if summary.variance is None else summary.variance
    placed = [moments.place(array) for array in (summary.probability, moments.deterministic, variance)]
    spacing_mm = moments.geometry.spacing_mm
    regions = [_of_region(*region, spacing_mm) for region in zip(*placed, region_masks(labels), strict=True)]
    return {name: np.array([region[name] for region in regions], np.float64) for name in regions[0]}


def _of_region(mean, deterministic, variance, reference, spacing_mm):
    half = np.float32(0.5)
    near = predicted_5mm(deterministic >= half, spacing_mm)
    found = {
        "dice": _dice(mean >= half, reference),
        "dice_deterministic": _dice(deterministic >= half, reference),
        **dict.fromkeys(("nll", "squared_error", "variance"), np.nan),
    }
    if near.any():
        p, y = mean[near].astype(np.float64), reference[near]
        found["nll"] = -np.log(np.clip(np.where(y, p, 1 - p), CLIP, 1 - CLIP)).mean()
        found["squared_error"] = ((y - p) ** 2).mean()
        found["variance"] = variance[near].mean(dtype=np.float64)
    return found


def point(rate, found):
    """Return one point of the curve, a JSON-able dict; values by region are dicts, null where they are not defined.

    rate : of injected dropout
    found : list over patients of what `measure` returns

    `dice`, `dice_deterministic` and `delta_dice` by region: means over patients of Dice of the mean over passes, of
    the deterministic pass, and of the difference. `nll_by_region`: mean over the patients in which the region is
    predicted; `nll`: mean of that over regions; `nll_by_patient`: mean over the regions predicted in each. `scale` by
    region, see `scale_of`. `admissible`: whether |`delta_dice`| is below `MAX_DELTA_DICE` in every region, and
    `varies`: whether passes differ in every region that is predicted (at a small rate, no mask may drop any of a few
    channels).
    """
    over = {name: np.stack([measured[name] for measured in found]) for name in found[0]}
    delta_dice = (over["dice"] - over["dice_deterministic"]).mean(axis=0)
    nll = [_mean(values[~np.isnan(values)]) for values in over["nll"].T]
    scale = list(map(scale_of, over["squared_error"].T, over["variance"].T))
    varies = all(known is not None for known, value in zip(scale, nll, strict=True) if value is not None)
    return {
        "rate": rate,
        "dice": _by_region(over["dice"].mean(axis=0)),
        "dice_deterministic": _by_region(over["dice_deterministic"].mean(axis=0)),
        "delta_dice": _by_region(delta_dice),
        "varies": varies,
        "admissible": varies and bool((np.abs(delta_dice) < MAX_DELTA_DICE).all()),
        "nll_by_region": _by_region(nll),
        "nll": _mean([value for value in nll if value is not None]),
        "nll_by_patient": [_mean(values[~np.isnan(values)]) for values in over["nll"]],
        "scale": _by_region(scale),
    }


def scale_of(squared_error, variance):
    """Return what the uncertainty of a region is multiplied by, or None where it is not defined.

    squared_error, variance : arrays over patients, means over voxels as `measure` gives them; NaN is left out

    s = Σ_i mean_v (y - p̄)² / Σ_i mean_v variance: with it the variance is, on average over equally weighted patients,
    the squared error (method of moments). Ledda et al. (2023) take the minimiser of a Gaussian likelihood,
    s = mean_v ((y - ŷ)² / variance), for regression. Here voxels in which all passes agree have a variance of nearly
    zero, and would alone decide that mean. None without a voxel, and where the variance is zero everywhere.
    """
    counted = ~np.isnan(squared_error)
    total = variance[counted].sum()
    return float(squared_error[counted].sum() / total) if total > 0 else None


def choose(curve):
    """Return the point of a curve whose rate is taken; curve : list of what `point` returns.

    1. Admissible are the rates at which the mean ΔDice is below `MAX_DELTA_DICE` in absolute value in every region,
       and passes differ in every region that is predicted.
    2. Of these, the one with the least NLL is best; as good are the rates whose NLL exceeds it by no more than the
       standard error of that excess over patients (by no more than a thousandth, where there is one patient).
    3. Of the best, the largest is taken: more spread between passes at no cost that these patients could show.

    Raises SegtrustError where no rate is admissible, showing the curve, and where nothing is predicted at all.
    """
    if curve[0]["nll"] is None:
        raise SegtrustError(
            "the network predicts no voxel of any region in the patients of split calibration, so that no rate of "
            "injected dropout can be chosen; check channels and outputs, or give a rate (stochastic: inject: rate)"
        )
    admissible = [found for found in curve if found["admissible"]]
    if not admissible:
        raise SegtrustError(
            f"no rate of injected dropout makes passes differ and keeps |ΔDice| below {MAX_DELTA_DICE} in every region "
            f"of the patients of split calibration:\n{_table(curve)}\nInject after other layers (`segtrust layers "
            "MODEL` lists them), or give a rate (stochastic: inject: rate), which is then taken as it is."
        )
    least = min(admissible, key=lambda found: found["nll"])
    return max((found for found in admissible if _as_good(found, least)), key=lambda found: found["rate"])


def _as_good(found, least):
    """Say whether the NLL of a point is that of the least one, for all that the patients can tell."""
    pairs = zip(found["nll_by_patient"], least["nll_by_patient"], strict=True)
    excess = [value - other for value, other in pairs if value is not None]
    if len(excess) == 1:
        return excess[0] <= EQUAL_NLL * least["nll"]
    return np.mean(excess) <= np.std(excess, ddof=1) / np.sqrt(len(excess))


def _nothing(line):
    """Take a line of text and say nothing."""


def _dice(predicted, reference):
    total = np.count_nonzero(predicted) + np.count_nonzero(reference)
    return 2 * np.count_nonzero(predicted & reference) / total if total else 1.0


def _mean(values):
    return float(np.mean(values)) if len(values) else None


def _by_region(values):
    return {region: None if value is None else float(value) for region, value in zip(REGIONS, values, strict=True)}


def _told(measured):
    dice, before = measured["dice"], measured["dice_deterministic"]
    parts = [
        f"{name} {after:.3f} ({after - once:+.3f})" for name, after, once in zip(REGIONS, dice, before, strict=True)
    ]
    return f"Dice {', '.join(parts)}"


def _table(curve):
    lines = ["rate   " + "".join(f"{f'ΔDice {region}':>11}" for region in REGIONS) + f"{'NLL':>11}"]
    for found in curve:
        delta = "".join(f"{value:+11.4f}" for value in found["delta_dice"].values())
        nll = "none" if found["nll"] is None else f"{found['nll']:.5f}"
        note = "" if found["admissible"] else "   ΔDice too large" if found["varies"] else "   passes do not differ"
        lines.append(f"{found['rate']:<7g}{delta}{nll:>11}{note}")
    return "\n".join(lines)
