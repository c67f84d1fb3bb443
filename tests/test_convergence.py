"""Metrics after fewer passes are those of the passes that were drawn first."""

from functools import cache

import numpy as np
import pandas as pd
import pytest
from scipy import ndimage
from sklearn.metrics import average_precision_score, roc_auc_score

from segtrust.cohort import cohort
from segtrust.convergence import CONVERGENCE_MASKS, CONVERGENCE_MEASURES, convergence, tally_of_means
from segtrust.files import read_parquet
from segtrust.measures import binary_entropy
from segtrust.moments import Accumulator, merge
from segtrust.regions import REGIONS, region_masks
from segtrust.tally import Tally
from segtrust.volumes import Geometry
from segtrust.voxels import voxels, write_voxels

BOX, START = (15, 14, 12), (3, 2, 1)
# second axis reversed, third voxel side longer
GEOMETRY = Geometry((22, 21, 16), np.array([[-1.0, 0, 0, 5], [0, 1.0, 0, 7], [0, 0, 1.5, 0], [0, 0, 0, 1]]))
SPACING = (1.0, 1.0, 1.5)
PASSES = 20
KEYS = ["region", "mask", "measure", "metric", "n_bins", "pooling"]


def draw(seed, sources=("member0",), passes=PASSES):
    """Return (moments, passes (T, 3, x, y, z) of all sources pass by pass, labels, brain), all on the patient's grid.

    A nested tumour of smooth noise, with a few voxels outside the brain and the box that the model saw.
    """
    generator = np.random.default_rng(seed)
    radius = np.linalg.norm(np.indices(BOX) - np.array([7, 7, 6]).reshape(3, 1, 1, 1), axis=0)
    level = np.array([4.5, 3.2, 2.2]).reshape(3, 1, 1, 1)

    def noise(sigma=1.0):
        return ndimage.gaussian_filter(generator.normal(size=(3, *BOX)), (0, *[sigma] * 3)) * 4

    logit = level - radius + noise()
    parts, drawn = [], []
    for source in sources:
        own = logit + noise()
        accumulator = Accumulator(BOX, source)
        for number in range(passes):
            p = (1 / (1 + np.exp(-own - 2 * generator.normal(size=(3, *BOX))))).astype(np.float32)
            accumulator.add(number, p)
            drawn.append((number, p))
        parts.append(accumulator.moments(START, GEOMETRY))
    moments = merge(parts)
    member = (level - radius + noise()) > 0
    labels = np.select([member[2], member[1], member[0]], [3, 1, 2], 0).astype(np.uint8)
    labels = moments.place(labels[None])[0]
    labels[0, :3, 0] = 2
    brain = ndimage.binary_dilation(moments.place(np.ones((1, *BOX), bool))[0])
    order = sorted(range(len(drawn)), key=lambda place: drawn[place][0])
    return moments, np.stack([moments.place(drawn[place][1]) for place in order]), labels, brain


def tally_of(moments, passes, labels, brain):
    early = convergence(moments, passes, labels, brain, SPACING)
    summary = moments.summary(passes).on(moments.place)
    table = voxels(summary, labels, brain, brain, spacing_mm=SPACING, patient="p", convergence=early)
    return Tally.of(table)


@cache
def drawn_cohort():
    return [draw(seed, ("member0", "member0-flip0")) for seed in range(6)]


def metrics_of(tallies):
    names = [f"p{place}" for place in range(len(tallies))]
    patients = pd.DataFrame({"patient": names, "subject": names, "split": "test", "coding": "brats2021"})
    settings = {"model": "m", "n_resamples": 100, "failure_dice": 0.8, "seed": 0, "n_bins": [10, 15]}
    return cohort(tallies, patients, **settings)["metrics"].to_pandas()


@cache
def rows():
    return metrics_of([tally_of(moments, PASSES, labels, brain) for moments, _, labels, brain in drawn_cohort()])


def value_of(metric, region, mask=None, measure=None, pooling="pooled", passes=10, n_bins=None):
    found = rows().query("metric == @metric and region == @region and pooling == @pooling and passes == @passes")
    for column, value in (("mask", mask), ("measure", measure), ("n_bins", n_bins)):
        found = found[found[column].isna() if value is None else found[column] == value]
    assert len(found) == 1, found
    return found["value"].item()


def after(passes, region, mask):
    """Return (truth, p, mean entropy of the passes) of the voxels of a mask after so many passes, by patient."""
    found = []
    for _, drawn, labels, brain in drawn_cohort():
        place = REGIONS.index(region)
        p = drawn[:passes, place].astype(np.float64).mean(axis=0)
        near = ndimage.distance_transform_edt(p < 0.5, SPACING) <= 5
        inside = brain if mask == "brain" else near
        expected = binary_entropy(drawn[:passes, place]).mean(axis=0)
        found.append((region_masks(labels)[place][inside], p[inside], expected[inside]))
    return found


def ece(probability, hit, n_bins=15):
    index = np.minimum((probability * n_bins).astype(int), n_bins - 1)
    gaps = [
        abs(probability[index == k].mean() - hit[index == k].mean()) * (index == k).mean() for k in np.unique(index)
    ]
    return sum(gaps)


# 5 passes of each of two sources


@pytest.mark.parametrize("mask", CONVERGENCE_MASKS)
@pytest.mark.parametrize("region", REGIONS)
def test_discrimination_after_five_passes_is_that_of_scikit_learn(region, mask):
    patients = after(10, region, mask)
    scores = {
        "entropy": [binary_entropy(p) for _, p, _ in patients],
        "mutual_information": [np.maximum(binary_entropy(p) - expected, 0) for _, p, expected in patients],
    }
    errors = [truth != (p >= 0.5) for truth, p, _ in patients]
    for measure, each in scores.items():
        pooled = np.concatenate(errors), np.concatenate(each)
        # bins tie what lies close together
        assert value_of("auroc", region, mask, measure) == pytest.approx(roc_auc_score(*pooled), abs=1e-4)
        assert value_of("aupr", region, mask, measure) == pytest.approx(average_precision_score(*pooled), abs=1e-3)
        # expected entropy is kept in half precision
        assert value_of("mean_uncertainty", region, mask, measure) == pytest.approx(pooled[1].mean(), abs=1e-4)
        means = np.mean([roc_auc_score(*pair) for pair in zip(errors, each, strict=True)])
        assert value_of("auroc", region, mask, measure, "patient_mean") == pytest.approx(means, abs=1e-4)
    assert value_of("error_rate", region, mask, "entropy") == pytest.approx(np.concatenate(errors).mean(), rel=1e-12)


@pytest.mark.parametrize("mask", CONVERGENCE_MASKS)
@pytest.mark.parametrize("region", REGIONS)
def test_calibration_after_five_passes_is_that_of_the_passes(region, mask):
    truth, p, _ = (np.concatenate(part) for part in zip(*after(10, region, mask), strict=True))
    keys = region, mask, "probability"
    confidence, correct = np.maximum(p, 1 - p), truth == (p >= 0.5)
    # moments round a probability to 2^-24, so that a few voxels may change their bin
    assert value_of("ece_class_probability", *keys, n_bins=15) == pytest.approx(ece(p, truth), abs=1e-6)
    assert value_of("ece_top_label", *keys, n_bins=15) == pytest.approx(ece(confidence, correct), abs=1e-6)
    assert value_of("gap", *keys) == pytest.approx(confidence.mean() - correct.mean(), abs=1e-6)
    assert value_of("brier", *keys) == pytest.approx(((p - truth) ** 2).mean(), abs=1e-6)
    assert value_of("nll", *keys) == pytest.approx(-np.log(np.where(truth, p, 1 - p)).mean(), abs=1e-6)


@pytest.mark.parametrize("region", REGIONS)
def test_dice_after_five_passes_counts_the_reference_outside_the_brain(region):
    each = []
    for _, drawn, labels, brain in drawn_cohort():
        truth = region_masks(labels)[REGIONS.index(region)]
        predicted = drawn[:10, REGIONS.index(region)].mean(axis=0) >= 0.5
        each.append(2 * (truth & predicted).sum() / (truth.sum() + predicted.sum()))
        assert not brain[0, 0, 0]
        assert labels[0, 0, 0] == 2
    assert value_of("dice", region, pooling="patient_mean") == pytest.approx(np.mean(each), rel=1e-12)


def test_rows_after_fewer_passes_count_the_passes_of_all_sources():
    assert sorted(rows()["passes"].unique()) == [10, 20, 40]


def test_at_all_passes_the_way_over_fewer_gives_the_same_rows():
    tallies = []
    for moments, _, labels, brain in drawn_cohort():
        tally = tally_of(moments, PASSES, labels, brain)
        summary = moments.summary(PASSES).on(moments.place)
        tally.convergence = {
            summary.passes: tally_of_means(summary.probability, summary.expected_entropy, labels, brain, SPACING)
        }
        tallies.append(tally)
    whole, again = rows()[rows()["passes"] == 40], metrics_of(tallies)
    again = again[len(whole) :]
    assert set(again["passes"]) == {40}
    whole = whole[whole["mask"].isin(CONVERGENCE_MASKS) | (whole["metric"] == "dice")]
    both = again.merge(whole, on=KEYS, how="left", suffixes=("", "_whole"), validate="one_to_one")
    for column in ("interval", "n_cases", "n_voxels", "conditional_on_reference", "mask_depends_on_model"):
        assert both[column].equals(both[f"{column}_whole"]), column
    for column in ("value", "ci_low", "ci_high", "bias"):
        # the same terms, added in another order
        np.testing.assert_allclose(both[column], both[f"{column}_whole"], rtol=1e-9, atol=1e-12)


def test_rows_after_fewer_passes_are_of_the_reported_measures_alone():
    early = rows()[rows()["passes"] < 40]
    assert set(early["measure"].dropna()) == {*CONVERGENCE_MEASURES, "probability"}
    assert set(early["mask"].dropna()) == set(CONVERGENCE_MASKS)
    assert set(early["n_bins"].dropna()) == {15}
    assert not early["metric"].isin(["calibration_slope", "spearman_with_loss"]).any()
    assert not early.duplicated([*KEYS, "passes"]).any()


def test_a_first_block_alone_has_no_fewer_passes():
    moments, _, labels, brain = draw(0, passes=5)
    assert convergence(moments, 5, labels, brain, SPACING) == {}


def test_one_patient_without_tallies_after_fewer_passes_leaves_the_rows_out():
    tallies = [tally_of(moments, PASSES, labels, brain) for moments, _, labels, brain in drawn_cohort()[:2]]
    tallies[0].convergence = {}
    assert set(metrics_of(tallies)["passes"]) == {40}


def test_an_empty_prediction_is_near_nothing():
    _, _, labels, brain = draw(1)
    nothing = np.zeros((3, *labels.shape), np.float32)
    tally = tally_of_means(nothing, nothing, labels, brain, SPACING)
    assert tally.scores("ET", "predicted_5mm", "entropy").sum() == 0
    assert tally.scores("ET", "brain", "entropy").sum() == brain.sum()


def test_files_carry_the_tallies_after_fewer_passes(tmp_path):
    moments, _, labels, brain = draw(2)
    early = convergence(moments, PASSES, labels, brain, SPACING)
    summary = moments.summary(PASSES).on(moments.place)
    table = voxels(summary, labels, brain, brain, spacing_mm=SPACING, patient="p", convergence=early)
    write_voxels(tmp_path / "v.parquet", table, {})
    tally = Tally.of(read_parquet(tmp_path / "v.parquet")[0])
    tally.write(tmp_path / "t.parquet", {"seed": 1})
    read, _ = Tally.read(tmp_path / "t.parquet")
    assert set(read.convergence) == {5, 10}
    for passes, expected in early.items():
        found = read.convergence[passes]
        assert found.available == expected.available == {*CONVERGENCE_MEASURES, "probability"}
        assert np.array_equal(found.overlap, expected.overlap)
        for mask in CONVERGENCE_MASKS:
            a, b = (t.probabilities("TC", mask, "probability") for t in (found, expected))
            assert all(np.array_equal(a[name], b[name]) for name in a)
            a, b = (t.scores("TC", mask, "entropy") for t in (found, expected))
            assert np.array_equal(a, b)
    assert np.array_equal(read.scores("WT", "brain", "entropy"), tally.scores("WT", "brain", "entropy"))
