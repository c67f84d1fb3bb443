from functools import cache

import numpy as np
import pytest
from test_cohort import tally_of, twelve
from test_progress import shown, terminal

from segtrust import metrics, pool, values
from segtrust.errors import SegtrustError
from segtrust.intervals import Draws, draw
from segtrust.masks import BANDS, MASKS
from segtrust.measures import MEASURES
from segtrust.pool import HeldTally, StoredTally, Subset, pooled_metrics
from segtrust.tables import read_tallies
from segtrust.tally import PROBABILITY, pooled
from segtrust.values import Key, to_text, values_of

SETTINGS = {"n_bins": [10, 15, 20], "threads": 2}


def whole(tallies, n_resamples=6):
    return Subset(np.arange(len(tallies)), draw(np.arange(len(tallies)), n_resamples, 0))


@cache
def pooled_of_twelve():
    held = [HeldTally(tally) for tally in twelve()]
    found = pooled_metrics(held, [whole(held)], **SETTINGS)
    return {(one.region, one.mask, one.measure): one for one in found}


@cache
def values_of_resamples():
    """Return the metrics of each resample, computed from the tally in which every patient is as often as drawn."""
    drawn = []
    for weights in whole(twelve()).draws.weights:
        times = [tally.repeated(int(n)) for tally, n in zip(twelve(), weights, strict=True) if n]
        drawn.append(values_of(pooled(times), ["WT", "ALL"]))
    return drawn


def test_pooled_metrics_are_those_of_the_added_tallies():
    expected = values_of(pooled(twelve()))
    for key, value in expected.items():
        if key.mask is None or key.metric in (*values.QU_BRATS, *values.RETENTION):
            continue
        found = pooled_of_twelve()[key.region, key.mask, key.measure].metrics[key.metric, key.n_bins]
        # sums of the same numbers in another order
        assert found == pytest.approx(value, rel=1e-9, abs=1e-12, nan_ok=True), key


# Coarse bins, shifted to the value, change a resample by less than this share of what resamples differ by. The masks
# of these small volumes hold as few as some hundred voxels, so that every voxel counts.
OF_SPREAD = {
    **{"auroc": 0.02, "aupr": 0.25, "spearman_with_loss": 0.25},
    **{"calibration_intercept": 0.05, "calibration_slope": 0.05},
    **{"ece_equal_mass_top_label": 0.25, "ece_equal_mass_class_probability": 0.25},
}


@pytest.mark.parametrize(
    "metric",
    [
        *("auroc", "aupr", "error_rate", "mean_uncertainty", "pearson_with_loss", "spearman_with_loss"),
        *("gap", "accuracy", "mean_confidence", "brier", "brier_skill", "nll"),
        *("calibration_intercept", "calibration_slope"),
        *values.TOP_LABEL,
        *values.CLASS_PROBABILITY,
    ],
)
def test_a_resampled_metric_is_that_of_the_repeated_tallies(metric):
    checked = 0
    for (region, mask, measure), one in pooled_of_twelve().items():
        if region in ("TC", "ET"):
            continue
        for (name, n_bins), resamples in one.resampled.items():
            if name == metric:
                expected = [drawn[Key(region, mask, measure, name, n_bins)] for drawn in values_of_resamples()]
                exists = np.isfinite(expected)
                spread = np.ptp(np.array(expected)[exists]) if exists.any() else 0
                close = max(1e-6, OF_SPREAD.get(metric, 0) * spread)  # single precision in the sums of a resample
                assert resamples == pytest.approx(expected, abs=close, nan_ok=True), (mask, measure)
                checked += exists.sum()
    assert checked >= 6


def test_a_resample_that_is_the_cohort_has_the_value_of_the_cohort():
    held = [HeldTally(tally) for tally in twelve()]
    once = Draws(np.arange(12), np.ones((1, 12)))
    for one in pooled_metrics(held, [Subset(np.arange(12), once)], **SETTINGS):
        for key, resamples in one.resampled.items():
            # single precision in sums
            assert resamples == pytest.approx(one.metrics[key], rel=1e-5, abs=1e-6, nan_ok=True), (one.mask, key)


def test_files_give_what_tallies_in_memory_give(tmp_path):
    stored = []
    for number, tally in enumerate(twelve()):
        tally.write(tmp_path / f"{number}.parquet", {}, to_text(tally))
        stored.append(StoredTally(tmp_path / f"{number}.parquet"))
    held = [HeldTally(tally) for tally in twelve()]
    for one, other in zip(
        pooled_metrics(stored, [whole(stored)], **SETTINGS),
        pooled_metrics(held, [whole(held)], **SETTINGS),
        strict=True,
    ):
        assert (one.region, one.mask, one.measure) == (other.region, other.mask, other.measure)
        np.testing.assert_equal(one.metrics, other.metrics)
        np.testing.assert_equal(one.resampled, other.resampled)
    for one, other in zip(stored, held, strict=True):
        np.testing.assert_equal(one.metrics, other.metrics)
        np.testing.assert_equal(one.curves, other.curves)


def test_little_memory_gives_the_same_numbers(monkeypatch):
    monkeypatch.setattr(pool, "BUDGET", 300_000)
    held = [HeldTally(tally) for tally in twelve()]
    found = {(one.region, one.mask, one.measure): one for one in pooled_metrics(held, [whole(held)], **SETTINGS)}
    assert set(found) == set(pooled_of_twelve())
    for key, one in found.items():
        np.testing.assert_equal(one.metrics, pooled_of_twelve()[key].metrics)
        np.testing.assert_equal(one.resampled, pooled_of_twelve()[key].resampled)


def test_a_subset_has_the_metrics_of_its_tallies_alone():
    held = [HeldTally(tally) for tally in twelve()]
    cases = np.array([1, 4, 6])
    subsets = [whole(held), Subset(cases, draw(cases, 6, 1), "site", "x")]
    found = {(one.region, one.mask, one.measure, one.subset): one for one in pooled_metrics(held, subsets, **SETTINGS)}
    expected = values_of(pooled([twelve()[case] for case in cases]))
    for mask in (*MASKS, *BANDS):
        one = found["WT", mask, "entropy", 1]
        for name in ("auroc", "aupr", "mean_uncertainty"):
            value = expected[Key("WT", mask, "entropy", name, None)]
            assert one.metrics[name, None] == pytest.approx(value, rel=1e-9, nan_ok=True)
        assert len(one.n_voxels) == 3


def test_a_subset_without_draws_has_no_resamples():
    held = [HeldTally(tally) for tally in twelve()]
    (one, *_) = pooled_metrics(held, [Subset(np.arange(12), None)], **SETTINGS)
    assert not one.resampled
    assert one.ue_dice.resampled is None


def direct_ue_dice(scores, first):
    errors, correct = scores[:, 1] + scores[:, 2], scores[:, 0] + scores[:, 3]
    flagged = errors[first:].sum() + correct[first:].sum()
    return 2 * errors[first:].sum() / (flagged + errors.sum())


@pytest.mark.parametrize("measure", MEASURES)
def test_the_threshold_of_ue_dice_is_the_best_of_all(measure):
    scores = pooled(twelve()).scores("WT", "brain", measure)
    each = [direct_ue_dice(scores, first) for first in range(len(scores))]
    found = pooled_of_twelve()["WT", "brain", measure].ue_dice
    # only every other fine bin begins a coarse one
    assert found.value == pytest.approx(max(each[::2]), rel=1e-12)
    assert found.in_sample


def test_ue_dice_of_a_case_is_at_the_common_threshold():
    found = pooled_of_twelve()["WT", "brain", "entropy"].ue_dice
    scores = pooled(twelve()).scores("WT", "brain", "entropy")
    first = int(np.argmax([direct_ue_dice(scores, first) for first in range(0, len(scores), 2)])) * 2
    expected = [float(metrics.ue_dice(tally.scores("WT", "brain", "entropy"), first)) for tally in twelve()]
    assert found.per_case == pytest.approx(expected, rel=1e-6)


def test_a_threshold_set_in_sample_is_set_anew_in_every_resample():
    found = pooled_of_twelve()["WT", "brain", "entropy"].ue_dice
    for resample, weights in zip(found.resampled, whole(twelve()).draws.weights, strict=True):
        scores = pooled([tally.repeated(int(n)) for tally, n in zip(twelve(), weights, strict=True) if n])
        scores = scores.scores("WT", "brain", "entropy")
        assert resample == pytest.approx(max(direct_ue_dice(scores, k) for k in range(0, len(scores), 2)), rel=1e-5)


def test_calibration_patients_set_the_threshold_of_ue_dice():
    fitting = [HeldTally(tally_of(50 + k, radius=4.5, shift=1.5, spread=0.5)) for k in range(3)]
    held = [HeldTally(tally) for tally in twelve()]
    run = pooled_metrics(held, [whole(held)], **SETTINGS, fitting=fitting)
    found = next(one for one in run if (one.region, one.mask, one.measure) == ("WT", "brain", "entropy")).ue_dice
    scores = pooled([source.tally for source in fitting]).scores("WT", "brain", "entropy")
    first = int(np.argmax([direct_ue_dice(scores, first) for first in range(0, len(scores), 2)])) * 2
    own = pooled(twelve()).scores("WT", "brain", "entropy")
    assert found.value == pytest.approx(direct_ue_dice(own, first), rel=1e-12)
    assert not found.in_sample
    assert found.value <= pooled_of_twelve()["WT", "brain", "entropy"].ue_dice.value


def test_a_resample_of_one_class_has_no_recalibration():
    # the second patient has no positive voxel
    held = [HeldTally(twelve()[0]), HeldTally(tally_of(3, radius=-1.0, shift=4.0))]
    draws = Draws(np.arange(2), np.array([[1.0, 1.0], [0.0, 2.0]]))
    run = pooled_metrics(held, [Subset(np.arange(2), draws)], **SETTINGS)
    one = next(one for one in run if (one.region, one.mask, one.measure) == ("TC", "brain", PROBABILITY))
    slope = one.resampled["calibration_slope", None]
    assert np.isfinite(slope[0])
    assert np.isnan(slope[1])


def test_a_file_without_metrics_is_refused_by_name(tmp_path):
    twelve()[0].write(tmp_path / "bare.parquet", {})
    with pytest.raises(SegtrustError, match=r"bare\.parquet: this tally was written without its metrics"):
        StoredTally(tmp_path / "bare.parquet")


def test_series_that_only_some_patients_have_are_left_out_of_what_is_pooled():
    held = [HeldTally(tally_of(0)), HeldTally(tally_of(1, deterministic=False))]
    measures = {one.measure for one in pooled_metrics(held, [Subset(np.arange(2), None)], **SETTINGS)}
    assert "entropy" in measures
    assert not {"deterministic_entropy", "probability_deterministic"} & measures


@pytest.mark.parametrize("wanted", [None, lambda region, mask, measure: region == "TC" and mask == "brain"])
def test_a_bar_counts_what_is_pooled(wanted):
    held = [HeldTally(tally_of(0)), HeldTally(tally_of(1))]
    subsets = [Subset(np.arange(2), None), Subset(np.arange(1), None)]
    with terminal() as sent:
        n = len(list(pooled_metrics(held, subsets, wanted=wanted, **SETTINGS)))
    (bar,) = shown(sent())
    assert n > 2
    assert bar.startswith(f"measures pooled: {n} of {n} |")


def test_a_bar_counts_the_tallies_that_are_read(tmp_path):
    rows = [dict.fromkeys(("patient", "subject", "split", "coding"), name) | {"extra": {}} for name in "ab"]
    for number, row in enumerate(rows):
        tally_of(number).write(tmp_path / row["patient"], {}, to_text(tally_of(number)))
    with terminal() as sent:
        tallies, _, _ = read_tallies([tmp_path / row["patient"] for row in rows], rows)
    assert len(tallies) == 2
    (bar,) = shown(sent())
    assert bar.startswith("tallies read: 2 of 2 |")
