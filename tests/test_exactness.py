"""Exactness: tallies add up in any order, and whole-size patients agree with libraries and with formulas on voxels."""

import inspect
from dataclasses import dataclass, fields
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.metrics import calibration_binning
from scipy import special, stats
from sklearn import linear_model
from sklearn import metrics as sklearn_metrics
from torchmetrics.functional.classification import binary_auroc, binary_calibration_error

from segtrust import metrics
from segtrust.errors import SegtrustError
from segtrust.masks import BANDS, BIT, MASKS
from segtrust.measures import MEASURES, MEMBER_MEASURES, OWN_ERRORS, binary_entropy
from segtrust.moments import Accumulator
from segtrust.regions import REGIONS, overlay, region_masks
from segtrust.tally import ALL, CLASS_KINDS, DETERMINISTIC, PROBABILITY, Columns, pooled, tally_columns

# --- probabilities, float32, given the reference (bool) -----------------------------------------------------


def graded(generator, truth):
    """Most voxels are nearly certain background; the rest is graded, and miscalibrated."""
    logit = np.where(truth, generator.normal(2.5, 2.5, truth.size), generator.normal(-11, 2.5, truth.size))
    doubtful = ~truth & (generator.random(truth.size) < 0.05)
    return special.expit(np.where(doubtful, generator.normal(-1.5, 2, truth.size), logit)).astype(np.float32)


def near_zero(generator, truth):
    """The entropy of 99.9 % of the voxels is almost zero, also where the label is wrong."""
    wrong = generator.random(truth.size) < 2e-4
    doubt = 10 ** generator.uniform(np.where(wrong, -9, -12), -6)
    doubt = np.where(generator.random(truth.size) < 0.999, doubt, generator.random(truth.size))
    return np.where(truth ^ wrong, 1 - doubt, doubt).astype(np.float32)


def half_steps(generator, truth):
    """Probabilities of a network in half precision."""
    return graded(generator, truth).astype(np.float16).astype(np.float32)


def votes(generator, truth):
    """Sixteen members vote: sums are exact in any precision."""
    share = generator.beta(np.where(truth, 2, 0.1), np.where(truth, 0.5, 2))
    return (generator.binomial(16, share) / 16).astype(np.float32)


def saturated(generator, truth):
    """Most probabilities are exactly 0 or exactly 1, not all of them rightly."""
    drawn = [generator.choice([0.0, 1.0, 0.25, 0.9], truth.size, p=law) for law in _SATURATED]
    return np.where(truth, *drawn).astype(np.float32)


_SATURATED = (0.05, 0.75, 0.05, 0.15), (0.9, 0.02, 0.05, 0.03)


def tied(generator, truth):
    return np.full(truth.size, 0.3, np.float32)


DRAWS = (graded, near_zero, half_steps, votes, saturated, tied)


# --- columns, as of a voxels table


def columns_of(generator, labels, probability, deterministic, masks):
    """Return columns with every series: others are drawn, and follow the probability loosely.

    probability, deterministic : float32 (3, n)
    masks : uint16 (n,), the same for all regions
    """
    size = labels.size
    entropy = binary_entropy(probability)
    expected = (entropy * generator.uniform(0.3, 1, (3, size))).astype(np.float16)
    member = (0.5 * (entropy + expected)).astype(np.float16)
    variance = (probability * (1 - probability) * generator.uniform(0, 0.5, (3, size))).astype(np.float16)
    # centres of voxels of 1 mm are apart by roots of whole numbers; the surer, the farther
    with np.errstate(divide="ignore"):
        logit = np.minimum(np.abs(special.logit(probability)), 15)
    squared = 1 + np.rint((3 * logit * generator.random((3, size))) ** 2)
    distance = ((np.sqrt(squared) - 0.5) * np.where(probability >= np.float32(0.5), -1, 1)).astype(np.float16)
    distance_reference = generator.normal(0, 6, (3, size)).astype(np.float16)
    return Columns(
        labels=labels,
        prediction=overlay(probability >= np.float32(0.5)),
        cavity=(labels == 0) & (generator.random(size) < 0.05),
        probability=list(probability),
        deterministic=list(deterministic),
        expected_entropy=list(expected),
        member_entropy=list(member),
        variance=list(variance),
        distance_predicted=list(distance),
        distance_reference=list(distance_reference),
        masks=[masks] * 3,
    )


def bare_columns(p, truth, distance=None, weight=None):
    """Return columns of one region, WT, of which every row lies in the brain; the other regions are empty."""
    nothing, flat = np.zeros(p.size, np.float32), np.zeros(p.size, np.float16)
    return Columns(
        labels=np.where(truth, np.uint8(2), np.uint8(0)),
        prediction=None,
        cavity=None,
        probability=[p.astype(np.float32), nothing, nothing],
        deterministic=None,
        expected_entropy=[flat] * 3,
        member_entropy=None,
        variance=None,
        distance_predicted=[flat if distance is None else distance.astype(np.float16)] * 3,
        distance_reference=[np.full(p.size, np.nan, np.float16)] * 3,
        masks=[np.full(p.size, BIT["volume"] | BIT["brain"], np.uint16)] * 3,
        weight=weight,
    )


BARE_SERIES = frozenset({"entropy", PROBABILITY})


def bare_tally(p, truth, **options):
    return tally_columns(bare_columns(p, truth, **options), {}, BARE_SERIES | {"boundary_proximity"})


def rows_of(columns, rows):
    """Return some rows of columns, in the given order."""

    def taken(value):
        if isinstance(value, list):
            return [each[rows] for each in value]
        return None if value is None else value[rows]

    return Columns(**{field.name: taken(getattr(columns, field.name)) for field in fields(Columns)})


# --- tallies of small patients add up -----------------------------------------------------------------------

small_patients = st.builds(
    lambda seed, draws, size: small_columns(seed, draws, 60 * size),
    st.integers(0, 2**32 - 1),
    st.tuples(*[st.sampled_from(DRAWS)] * 3),
    st.integers(1, 5),
)
seeds = st.integers(0, 2**32 - 1)


def small_columns(seed, draws, size):
    """Return columns of all kinds of series; masks overlap at random, and all rows lie in the brain."""
    generator = np.random.default_rng(seed)
    labels = generator.choice(4, size, p=[0.7, 0.1, 0.1, 0.1]).astype(np.uint8)
    labels[:4] = range(4)  # with an empty reference, rounding decides whether the last false positive is replaced
    truth = region_masks(labels)
    probability, deterministic = (
        np.stack([draw(generator, member) for draw, member in zip(draws, truth, strict=True)]) for _ in range(2)
    )
    masks = generator.integers(0, 1 << len(MASKS), size).astype(np.uint16) | BIT["volume"] | BIT["brain"]
    return columns_of(generator, labels, probability, deterministic, masks)


def assert_one_tally(found, expected):
    """Counts are equal; of n terms of one sign, the order moves a sum by less than n · 1e-16."""
    left, right = found.to_table(), expected.to_table()
    sums = [name for name in left.column_names if name.startswith("sum_")]
    assert left.drop_columns(sums).equals(right.drop_columns(sums))
    for name in sums:
        np.testing.assert_allclose(left[name].to_numpy(), right[name].to_numpy(), rtol=1e-12, err_msg=name)
    assert found.counts.keys() == expected.counts.keys()
    for name, value in expected.counts.items():
        assert np.array_equal(found.counts[name], value), name


def metrics_of(tally, region, mask):
    """Return every metric of a region and a mask, a dict of arrays; names begin with that of the function."""
    found = {}
    for part in (of_measures, of_probabilities, of_confidences, of_overlaps):
        for function, about, *arguments in part(tally, region, mask):
            values = function(*arguments)
            if function is metrics.reliability:
                values = (*values[:2], values[2] / values[2].sum())  # voxels as shares
            if not isinstance(values, dict):
                values = dict(enumerate(values if isinstance(values, tuple) else (values,)))
            found |= {f"{function.__name__} {about} {key}": np.asarray(value, float) for key, value in values.items()}
    return found


def of_measures(tally, region, mask):
    """Yield (function, about, *arguments) of every metric of every measure."""
    of_scores = metrics.auroc, metrics.auroc_certificate, metrics.aupr, metrics.error_rate
    for measure in sorted(set(tally.available) - {PROBABILITY, DETERMINISTIC, *CLASS_KINDS}):
        scores, sums = tally.scores(region, mask, measure), tally.score_sums(region, mask, measure)
        if scores is None:
            continue
        for function in (*of_scores, metrics.roc_curve, metrics.precision_recall_curve):
            yield function, measure, scores
        yield metrics.mean_uncertainty, measure, sums, scores
        yield metrics.pearson_with_loss, measure, sums, scores
        yield metrics.spearman_with_loss, measure, tally.joint(region, mask, measure)
        yield metrics.ue_dice, measure, scores, scores.shape[0] // 2
        if region != ALL:  # which has no true positives
            yield metrics.retention, measure, scores
            yield metrics.qu_brats, measure, tally.scores(region, "volume", measure), scores
        bands = [np.stack([of(region, band, measure) for band in BANDS]) for of in (tally.score_sums, tally.scores)]
        yield metrics.buc, measure, *bands
        yield metrics.ba_ece, measure, *bands


def of_probabilities(tally, region, mask):
    """Yield the same of every kind of probability, of its bins."""
    for kind in (PROBABILITY, DETERMINISTIC, *CLASS_KINDS):
        held = tally.probabilities(region, mask, kind)
        if held is None:
            continue
        n, sum_p = held["n"], held["sum_p"]
        yield from of_calibration("class_probability", kind, n, sum_p)
        yield metrics.reliability, kind, n, sum_p, 15, "probability"
        if region == ALL:
            continue
        yield metrics.brier, kind, n, sum_p, held["sum_p2"]
        yield metrics.brier_skill, kind, n, sum_p, held["sum_p2"]
        yield metrics.nll, kind, n, held["sum_log_p"], held["sum_log_1mp"]
        for function in (metrics.logistic_recalibration, metrics.calibration_intercept, metrics.calibration_slope):
            yield function, kind, n, held["sum_logit"]


def of_confidences(tally, region, mask):
    """Yield the same of every kind of probability, of the bins of its confidence."""
    for kind in (PROBABILITY, DETERMINISTIC):
        n, sum_c = (tally.confidences(region, mask, kind)[name] for name in ("n", "sum_c"))
        yield from of_calibration("top_label", kind, n, sum_c)
        yield metrics.reliability, f"confidence of {kind}", n, sum_c, 15, "confidence"
        yield metrics.accuracy, kind, n
        yield metrics.mean_confidence, kind, n, sum_c
        yield metrics.gap, kind, n, sum_c


def of_calibration(convention, kind, n, sums):
    for name in ("ece", "ace", "mce", "ece_equal_mass"):
        for n_bins in (10, 15, 20):
            yield getattr(metrics, f"{name}_{convention}"), f"{kind} {n_bins}", n, sums, n_bins


def of_overlaps(tally, region, mask):
    """Yield the same of the segmentations."""
    if region in REGIONS:
        place = REGIONS.index(region)
        reference = tally.counts["n_reference"][place]
        for name, overlap in ("n_predicted", tally.overlap), ("n_deterministic", tally.overlap_deterministic):
            tp, predicted = overlap[place, place], tally.counts[name][place]
            yield metrics.dice, name, tp, predicted - tp, reference - tp
            yield metrics.sensitivity, name, tp, reference - tp
            yield metrics.precision, name, tp, predicted - tp


def assert_same_metrics(found, expected):
    """Agree as all that follows from sums must (definitions, section 4); undefined metrics stay undefined."""
    for region in (*REGIONS, ALL):
        left, right = (metrics_of(tally, region, "brain") for tally in (found, expected))
        assert left.keys() == right.keys()
        for name, value in right.items():
            np.testing.assert_allclose(left[name], value, rtol=1e-9, atol=1e-12, err_msg=f"{region} {name}")


@given(small_patients, seeds, st.integers(2, 5))
@settings(deadline=None, max_examples=7)
def test_any_split_of_the_voxels_merged_in_any_order_is_one_tally(columns, seed, n_parts):
    generator = np.random.default_rng(seed)
    part = generator.integers(0, n_parts, columns.labels.size)  # parts may be empty
    tallies = [tally_columns(rows_of(columns, part == number), {}) for number in range(n_parts)]
    while len(tallies) > 1:
        left, right = (tallies.pop(generator.integers(len(tallies))) for _ in range(2))
        tallies.append(left + right)
    whole = tally_columns(columns, {})
    assert_one_tally(tallies[0], whole)
    assert_same_metrics(tallies[0], whole)


@given(small_patients, seeds)
@settings(deadline=None, max_examples=8)
def test_the_order_of_voxels_changes_no_tally_and_no_metric(columns, seed):
    order = np.random.default_rng(seed).permutation(columns.labels.size)
    found, expected = tally_columns(rows_of(columns, order), {}), tally_columns(columns, {})
    assert_one_tally(found, expected)
    assert_same_metrics(found, expected)


@given(st.lists(small_patients, min_size=2, max_size=4), seeds)
@settings(deadline=None, max_examples=6)
def test_the_order_of_patients_changes_no_tally_and_no_metric(cohort, seed):
    tallies = [tally_columns(columns, {}) for columns in cohort]
    order = np.random.default_rng(seed).permutation(len(tallies))
    found, expected = pooled([tallies[place] for place in order]), pooled(tallies)
    assert_one_tally(found, expected)
    assert_same_metrics(found, expected)


@given(small_patients, st.integers(2, 7))
@settings(deadline=None, max_examples=8)
def test_a_cohort_of_copies_has_the_metrics_of_one(columns, times):
    # patients hold a multiple of 60 voxels: the quantile that begins one of 10, 15 or 20 bins is the same among copies
    one = tally_columns(columns, {})
    assert_one_tally(pooled([one] * times), one.repeated(times))
    assert_same_metrics(one.repeated(times), one)


# where bins begin and end, and all metrics at once
NO_METRICS = {"fine_starts", "quantile_ends", "between", "compute"}


def test_every_function_of_metrics_is_among_those_compared():
    tally = tally_columns(small_columns(0, DRAWS[:3], 150), {})
    public = {
        name
        for name, function in inspect.getmembers(metrics, inspect.isfunction)
        if function.__module__ == metrics.__name__ and not name.startswith("_")
    } - NO_METRICS
    assert {name.split()[0] for name in metrics_of(tally, "WT", "brain")} == public


# --- patients of whole size ---------------------------------------------------------------------------------

SIZE, N_BRAIN = 1_600_000, 1_500_000


@cache
def whole_patient(name):
    """Return (columns, tally) of a patient of whole size; each region is another case."""
    generator = np.random.default_rng(list(PATIENTS).index(name))
    draws, law = PATIENTS[name]
    labels = generator.choice(4, SIZE, p=law).astype(np.uint8)
    probability = np.stack([draw(generator, member) for draw, member in zip(draws, region_masks(labels), strict=True)])
    masks = np.full(SIZE, BIT["volume"], np.uint16)
    masks[generator.permutation(SIZE)[:N_BRAIN]] |= BIT["brain"]
    logit = special.logit(np.clip(probability, 1e-6, 1 - 1e-6))
    deterministic = special.expit(logit + generator.normal(0, 1, logit.shape)).astype(np.float32)
    columns = columns_of(generator, labels, probability, deterministic, masks)
    series = None if name == "mixed" else BARE_SERIES
    return columns, tally_columns(columns, {}, series)


def doubted(generator, truth):
    """No label reaches one half."""
    return (graded(generator, ~truth & truth) / 2.01).astype(np.float32)


PATIENTS = {
    "mixed": ((graded, near_zero, half_steps), (0.93, 0.02, 0.03, 0.02)),
    "steps": ((votes, saturated, tied), (0.85, 0.05, 0.05, 0.05)),
    # all voxels are of WT and TC, none of ET
    "one class": ((lambda g, truth: graded(g, g.random(truth.size) < 0.7), doubted, doubted), (0, 1, 0, 0)),
}
PLACES = {
    "graded": ("mixed", 0),
    "near_zero": ("mixed", 1),
    "half_steps": ("mixed", 2),
    "votes": ("steps", 0),
    "saturated": ("steps", 1),
    "tied": ("steps", 2),
    "all_positive": ("one class", 0),
    "all_wrong": ("one class", 1),
    "all_right": ("one class", 2),
}


@dataclass(frozen=True)
class Case:
    """Voxels of the brain of one region, in float64, and what the tally holds of them."""

    p: np.ndarray
    truth: np.ndarray
    scores: np.ndarray
    score_sums: np.ndarray
    joint: np.ndarray
    probabilities: dict
    confidences: dict

    @property
    def predicted(self):
        return self.p >= 0.5

    @property
    def error(self):
        return self.truth != self.predicted

    @property
    def entropy(self):
        return binary_entropy(self.p)

    @property
    def clipped(self):
        return np.clip(self.p, 1e-7, 1 - 1e-7)

    @property
    def loss(self):
        # by the probability of the other class, so that sure voxels of both classes are tied
        return -np.log1p(-np.clip(np.where(self.truth, 1 - self.p, self.p), 1e-7, 1 - 1e-7))

    def views(self):
        """Return (values, hits, counts and sums, name) of both conventions of calibration."""
        of_p, of_c = self.probabilities, self.confidences
        return (
            (self.p, self.truth, (of_p["n"], of_p["sum_p"]), "class_probability"),
            (np.maximum(self.p, 1 - self.p), ~self.error, (of_c["n"], of_c["sum_c"]), "top_label"),
        )


@cache
def whole_case(name):
    patient, place = PLACES[name]
    columns, tally = whole_patient(patient)
    inside = (columns.masks[place] & BIT["brain"]) > 0
    region = REGIONS[place]
    return Case(
        p=columns.probability[place][inside].astype(np.float64),
        truth=region_masks(columns.labels)[place][inside],
        scores=tally.scores(region, "brain", "entropy"),
        score_sums=tally.score_sums(region, "brain", "entropy"),
        joint=tally.joint(region, "brain", "entropy"),
        probabilities=tally.probabilities(region, "brain", PROBABILITY),
        confidences=tally.confidences(region, "brain", PROBABILITY),
    )


def of_cases(*names):
    return pytest.mark.parametrize("name", names)


EVERY = tuple(PLACES)
TWO_CLASSES = ("graded", "near_zero", "half_steps", "votes", "saturated", "tied")
# of summed terms and what follows from them (definitions, section 4)
EXACT = {"rel": 1e-9, "abs": 1e-12}


def assert_ranks_as_scikit_learn(scores, error, u):
    """Compare AUROC and AUPR within the tolerances of the definitions, section 4."""
    auroc, aupr = sklearn_metrics.roc_auc_score(error, u), sklearn_metrics.average_precision_score(error, u)
    # 1e-12: rounding of 1.5 million additions, where the certificate is zero
    assert abs(metrics.auroc(scores) - auroc) <= min(1e-4, metrics.auroc_certificate(scores) + 1e-12)
    assert abs(metrics.aupr(scores) - aupr) <= min(1e-3, 0.01 * aupr)


@pytest.mark.slow
def test_of_the_hard_patient_999_in_1000_entropies_are_almost_zero():
    assert np.mean(whole_case("near_zero").entropy < 1e-4) >= 0.999


@pytest.mark.slow
@of_cases(*TWO_CLASSES, "all_positive")
def test_entropy_ranks_errors_as_scikit_learn_does(name):
    case = whole_case(name)
    assert case.scores.sum() == N_BRAIN
    assert_ranks_as_scikit_learn(case.scores, case.error, case.entropy)


@pytest.mark.slow
@pytest.mark.parametrize("measure", sorted({*MEASURES, OWN_ERRORS, *MEMBER_MEASURES} - {"entropy"}))
def test_every_other_measure_ranks_errors_as_scikit_learn_does(measure):
    columns, tally = whole_patient("mixed")
    inside = (columns.masks[0] & BIT["brain"]) > 0

    def stored(column):
        return column[0][inside].astype(np.float64)

    truth = region_masks(columns.labels)[0][inside]
    p, own = stored(columns.probability), stored(columns.deterministic)
    entropy, expected, member = binary_entropy(p), stored(columns.expected_entropy), stored(columns.member_entropy)
    u = {
        "expected_entropy": expected,
        "mutual_information": np.maximum(entropy - expected, 0),
        "mutual_information_between_members": np.maximum(entropy - member, 0),
        "mutual_information_within_members": np.maximum(member - expected, 0),
        "variance": stored(columns.variance),
        "deterministic_entropy": binary_entropy(own),
        "deterministic_entropy_own": binary_entropy(own),
        "boundary_proximity": -np.abs(stored(columns.distance_predicted)),
    }[measure]
    error = truth != ((own if measure == OWN_ERRORS else p) >= 0.5)
    assert_ranks_as_scikit_learn(tally.scores("WT", "brain", measure), error, u)


@pytest.mark.slow
def test_a_variance_that_is_almost_zero_ranks_errors_as_scikit_learn_does():
    # in half precision most are exactly zero, and others differ by single steps of 6e-8
    columns, tally = whole_patient("mixed")
    inside = (columns.masks[1] & BIT["brain"]) > 0
    u = columns.variance[1][inside].astype(np.float64)
    assert np.mean(u < 1e-4) >= 0.998
    assert_ranks_as_scikit_learn(tally.scores("TC", "brain", "variance"), whole_case("near_zero").error, u)


@pytest.mark.slow
def test_where_all_scores_are_tied_auroc_is_one_half_and_aupr_the_error_rate():
    case = whole_case("tied")
    assert metrics.auroc(case.scores) == pytest.approx(0.5, rel=1e-12)
    assert metrics.aupr(case.scores) == pytest.approx(case.error.mean(), rel=1e-12)


@pytest.mark.slow
def test_where_all_labels_are_right_or_all_wrong_there_is_no_auroc():
    for name, precision in (("all_right", np.nan), ("all_wrong", 1)):
        case = whole_case(name)
        assert np.isnan(metrics.auroc(case.scores))
        assert metrics.aupr(case.scores) == pytest.approx(precision, rel=1e-12, nan_ok=True)


@pytest.mark.slow
@of_cases(*EVERY)
def test_proper_scores_of_whole_patients_are_those_of_scikit_learn(name):
    case = whole_case(name)
    n, sum_p, sum_p2 = (case.probabilities[key] for key in ("n", "sum_p", "sum_p2"))
    brier = sklearn_metrics.brier_score_loss(case.truth, case.p, labels=[0, 1])
    assert metrics.brier(n, sum_p, sum_p2) == pytest.approx(brier, **EXACT)
    columns = np.stack([1 - case.clipped, case.clipped], axis=1)
    loss = sklearn_metrics.log_loss(case.truth, columns, labels=[0, 1])
    found = metrics.nll(n, case.probabilities["sum_log_p"], case.probabilities["sum_log_1mp"])
    assert found == pytest.approx(loss, **EXACT)
    variance = case.truth.mean() * (1 - case.truth.mean())
    skill = 1 - brier / variance if variance else np.nan
    assert metrics.brier_skill(n, sum_p, sum_p2) == pytest.approx(skill, **EXACT, nan_ok=True)


@pytest.mark.slow
@of_cases(*EVERY)
def test_means_of_whole_patients_are_those_of_numpy(name):
    case = whole_case(name)
    n, sum_c = case.confidences["n"], case.confidences["sum_c"]
    confidence, right = np.maximum(case.p, 1 - case.p).mean(), (~case.error).mean()
    assert metrics.mean_uncertainty(case.score_sums, case.scores) == pytest.approx(case.entropy.mean(), **EXACT)
    assert metrics.error_rate(case.scores) == pytest.approx(case.error.mean(), **EXACT)
    assert metrics.accuracy(n) == pytest.approx(right, **EXACT)
    assert metrics.mean_confidence(n, sum_c) == pytest.approx(confidence, **EXACT)
    assert metrics.gap(n, sum_c) == pytest.approx(confidence - right, **EXACT)


@pytest.mark.slow
@of_cases("one class", "steps")
def test_whole_patients_split_in_three_and_merged_are_one_tally(name):
    columns, tally = whole_patient(name)
    part = np.random.default_rng(0).integers(0, 3, SIZE)
    parts = [tally_columns(rows_of(columns, part == number), {}, BARE_SERIES) for number in range(3)]
    assert_one_tally(parts[2] + (parts[0] + parts[1]), tally)


@pytest.mark.slow
@pytest.mark.parametrize("tie", [3e-9, 1e-3, 0.999])
def test_a_million_ties_have_the_brier_score_and_the_top_label_error_of_one(tie):
    p = np.full(N_BRAIN, tie, np.float32)
    truth = np.arange(N_BRAIN) < round(tie * N_BRAIN)
    tally = bare_tally(p, truth)
    n, sum_p, sum_p2 = (tally.probabilities("WT", "brain", PROBABILITY)[name] for name in ("n", "sum_p", "sum_p2"))
    brier = sklearn_metrics.brier_score_loss(truth, p.astype(np.float64), labels=[0, 1])
    held = tally.confidences("WT", "brain", PROBABILITY)
    confidence, right = max(float(p[0]), 1 - float(p[0])), (truth == (tie >= 0.5)).mean()
    assert metrics.brier(n, sum_p, sum_p2) == pytest.approx(brier, **EXACT)
    assert metrics.ece_top_label(held["n"], held["sum_c"], 15) == pytest.approx(abs(confidence - right), **EXACT)


# --- calibration errors


def gaps_of(values, hits, inner_edges):
    """Return n and |mean value - fraction of hits| of the non-empty bins between edges; left-closed.

    NumPy adds in pairs: one by one, a million confidences near 1 would leave an error of 1e-11.
    """
    index = np.searchsorted(inner_edges, values, side="right")
    found = [
        (values[inside].size, abs(values[inside].mean() - hits[inside].mean()))
        for inside in (index == number for number in range(len(inner_edges) + 1))
        if inside.any()
    ]
    return tuple(np.array(part) for part in zip(*found, strict=True))


@pytest.mark.slow
@of_cases(*EVERY)
def test_calibration_errors_of_whole_patients_are_those_of_their_voxels(name):
    for values, hits, counted, convention in whole_case(name).views():
        for n_bins in (10, 15, 20):
            n, gaps = gaps_of(values, hits, np.arange(1, n_bins) / n_bins)
            direct = {"ece": (n * gaps).sum() / n.sum(), "ace": gaps.mean(), "mce": gaps.max()}
            for metric, expected in direct.items():
                found = getattr(metrics, f"{metric}_{convention}")(*counted, n_bins)
                assert found == pytest.approx(expected, **EXACT), (metric, convention, n_bins)


@pytest.mark.slow
@of_cases(*(name for name in EVERY if name != "near_zero"))  # there it adds a million confidences near 1, one by one
def test_calibration_errors_of_whole_patients_are_those_of_torchmetrics_in_double_precision(name):
    # told the confidence and whether the label is right, it computes the other convention as well
    for values, hits, counted, convention in whole_case(name).views():
        below_1 = np.minimum(values, np.nextafter(1, 0))  # its last bin does not hold 1
        tensors = torch.from_numpy(below_1), torch.from_numpy(hits)
        for metric, norm in (("ece", "l1"), ("mce", "max")):
            theirs = binary_calibration_error(*tensors, n_bins=15, norm=norm, validate_args=False)
            found = getattr(metrics, f"{metric}_{convention}")(*counted, 15)
            assert found == pytest.approx(float(theirs), **EXACT), (metric, convention)


@pytest.mark.slow
def test_calibration_errors_of_votes_are_those_of_the_bins_of_monai():
    # it counts in float32, which holds sums of sixteenths up to a million exactly, and divides them; no k/15 but 0 and
    # 1 is a vote, so that its edges do not matter
    for values, hits, counted, convention in whole_case("votes").views():
        thirds = (torch.from_numpy(part.astype(np.float32).reshape(3, 1, -1)) for part in (values, hits))
        mean, fraction, n = (part[:, 0].double().numpy() for part in calibration_binning(*thirds, num_bins=15))
        sums, found = np.rint(np.nan_to_num(mean) * n * 16) / 16, np.rint(np.nan_to_num(fraction) * n)
        sums, found, n = (part.sum(axis=0) for part in (sums, found, n))
        filled = n > 0
        gaps = np.abs(sums - found)[filled] / n[filled]
        theirs = {"ece": (gaps * n[filled]).sum() / N_BRAIN, "ace": gaps.mean(), "mce": gaps.max()}
        assert n.sum() == N_BRAIN
        for metric, expected in theirs.items():
            assert getattr(metrics, f"{metric}_{convention}")(*counted, 15) == pytest.approx(expected, **EXACT), metric


@pytest.mark.slow
@of_cases("graded", "saturated")
def test_calibration_errors_of_whole_patients_are_those_of_netcal(name):
    import netcal.metrics  # takes seconds

    for values, hits, counted, convention in whole_case(name).views():
        for metric, of_netcal in (("ece", "ECE"), ("ace", "ACE"), ("mce", "MCE")):
            theirs = getattr(netcal.metrics, of_netcal)(15).measure(values, hits.astype(int))
            found = getattr(metrics, f"{metric}_{convention}")(*counted, 15)
            assert found == pytest.approx(theirs, **EXACT), (metric, convention)


@pytest.mark.slow
@of_cases(*EVERY)
def test_equal_mass_errors_of_whole_patients_are_those_of_their_quantiles(name):
    for values, hits, counted, convention in whole_case(name).views():
        edges = np.unique(np.quantile(values, np.arange(1, 15) / 15, method="inverted_cdf"))
        n, gaps = gaps_of(values, hits, edges)
        expected = (n * gaps).sum() / n.sum()
        found = getattr(metrics, f"ece_equal_mass_{convention}")(*counted, 15)
        assert abs(found - expected) <= max(1e-4, 0.02 * expected), convention


@pytest.mark.slow
@of_cases(*EVERY)
def test_copies_of_a_whole_patient_have_its_equal_mass_errors(name):
    # a quantile between two voxels moves towards one of them among copies
    for _, _, (n, sums), convention in whole_case(name).views():
        function = getattr(metrics, f"ece_equal_mass_{convention}")
        one = function(n, sums, 15)
        assert abs(function(7 * n, 7 * sums, 15) - one) <= max(1e-4, 0.02 * one), convention


@pytest.mark.slow
@of_cases("graded", "near_zero", "half_steps", "votes", "saturated")
def test_the_logistic_recalibration_of_a_whole_patient_is_that_of_scikit_learn(name):
    case = whole_case(name)
    logit = np.log(case.clipped) - np.log1p(-case.clipped)
    model = linear_model.LogisticRegression(C=np.inf, solver="newton-cholesky", tol=1e-10).fit(
        logit[:, None], case.truth
    )
    intercept, slope = metrics.logistic_recalibration(case.probabilities["n"], case.probabilities["sum_logit"])
    assert abs(intercept - model.intercept_[0]) < 1e-3
    assert abs(slope - model.coef_[0, 0]) < 1e-3


@pytest.mark.slow
@of_cases("tied", "all_positive", "all_wrong", "all_right")
def test_one_class_or_one_probability_has_no_recalibration(name):
    held = whole_case(name).probabilities
    assert np.isnan(metrics.logistic_recalibration(held["n"], held["sum_logit"])).all()


# --- correlation with the loss


@pytest.mark.slow
@of_cases(*(name for name in EVERY if name != "tied"))
def test_the_linear_correlation_with_the_loss_is_that_of_scipy(name):
    case = whole_case(name)
    exact = stats.pearsonr(case.entropy, case.loss)[0]
    assert metrics.pearson_with_loss(case.score_sums, case.scores) == pytest.approx(exact, **EXACT)


@pytest.mark.slow
@of_cases(*(name for name in EVERY if name != "tied"))
def test_the_rank_correlation_with_the_loss_is_that_of_scipy(name):
    case = whole_case(name)
    exact = stats.spearmanr(case.entropy, case.loss)[0]
    assert abs(metrics.spearman_with_loss(case.joint) - exact) < 1e-3  # definitions, section 4: of the joint histogram


@pytest.mark.slow
def test_tied_scores_have_no_correlation_with_the_loss():
    case = whole_case("tied")
    assert np.isnan(metrics.pearson_with_loss(case.score_sums, case.scores))
    assert np.isnan(metrics.spearman_with_loss(case.joint))


# --- QU-BraTS


def qu_brats_of_voxels(uncertainty, truth, predicted, brain):
    """Return the score and its areas from voxels as section 6 of the definitions writes them; U from 0 to 100."""
    curves = {"auc_dsc": [], "auc_ftp": [], "auc_ftn": []}
    tp, fp, fn = (uncertainty[part] for part in (truth & predicted, ~truth & predicted, truth & ~predicted))
    filtered = {
        "auc_ftp": uncertainty[truth & predicted & brain],
        "auc_ftn": uncertainty[~truth & ~predicted & brain],
    }
    thresholds = [2.5 * step for step in range(41)]
    for tau in thresholds:
        kept_tp, kept_fp, kept_fn = ((part <= tau).sum() for part in (tp, fp, fn))
        both = 2 * kept_tp + kept_fp + kept_fn
        curves["auc_dsc"].append(2 * kept_tp / both if both else 1)
        for name, part in filtered.items():
            curves[name].append((part.size - (part <= tau).sum()) / part.size if part.size else 0)
    areas = {name: np.trapezoid(curve, thresholds) / 100 for name, curve in curves.items()}
    return {**areas, "qu_brats": (areas["auc_dsc"] + (1 - areas["auc_ftp"]) + (1 - areas["auc_ftn"])) / 3}


@pytest.mark.slow
@of_cases(*EVERY)
def test_the_qu_brats_score_of_a_whole_patient_is_that_of_its_voxels(name):
    patient, place = PLACES[name]
    columns, tally = whole_patient(patient)
    p, truth = columns.probability[place].astype(np.float64), region_masks(columns.labels)[place]
    brain = (columns.masks[place] & BIT["brain"]) > 0
    expected = qu_brats_of_voxels(100 * binary_entropy(p), truth, p >= 0.5, brain)
    found = metrics.qu_brats(*[tally.scores(REGIONS[place], mask, "entropy") for mask in ("volume", "brain")])
    assert {name: found[name] for name in expected} == pytest.approx(expected, **EXACT)


# --- known traps --------------------------------------------------------------------------------------------


def test_float32_counts_stop_at_two_to_the_24_and_those_of_a_tally_do_not():
    # p = 1/4 is right for one voxel in four; 24 million of them
    p, truth, times = np.full(1000, 0.25, np.float32), np.arange(1000) % 4 == 0, 24_000
    many = torch.full((1000 * times,), 0.25), torch.from_numpy(np.tile(truth, times))
    theirs = float(binary_calibration_error(*many, n_bins=15, validate_args=False))
    # its count stops at 2^24, that of the positives does not
    assert theirs == pytest.approx(6e6 / 2**24 - 0.25, rel=1e-3)
    held = bare_tally(p, truth, weight=np.full(1000, float(times))).probabilities("WT", "brain", PROBABILITY)
    assert held["n"].sum() == 24_000_000
    assert metrics.ece_class_probability(held["n"], held["sum_p"], 15) == 0


def test_one_voxel_more_than_24_million_is_counted():
    # as far from 2^24 a float32 counts in twos
    p, truth = np.full(1, 0.25, np.float32), np.zeros(1, bool)
    many = bare_tally(p, truth, weight=np.full(1, 24e6)) + bare_tally(p, truth)
    assert many.counts["n_voxels"] == 24_000_001
    assert many.probabilities("WT", "brain", PROBABILITY)["n"].sum() == 24_000_001
    assert many.scores("WT", "brain", "entropy").sum() == 24_000_001


def test_one_probability_above_one_turns_all_into_logits_for_torchmetrics_and_is_refused_here():
    generator = np.random.default_rng(0)
    p = generator.random(10_000).astype(np.float32)
    truth = torch.from_numpy(generator.random(p.size) < p)
    before = float(binary_calibration_error(torch.from_numpy(p), truth))
    p[0] = np.nextafter(np.float32(1), np.float32(2))  # as rounding can leave a sum of classes
    after = float(binary_calibration_error(torch.from_numpy(p), truth))
    assert before < 0.02  # calibrated: the noise of 10,000 voxels in 15 bins
    assert after > 0.1
    with pytest.raises(SegtrustError, match="are these logits"):
        Accumulator((p.size, 1, 1), "model").add(0, np.stack([p] * 3).reshape(3, -1, 1, 1))


def test_distances_are_logits_for_torchmetrics_and_distances_for_a_tally():
    # the sigmoid of -105 is zero in float32: the farther half of a head is tied
    generator = np.random.default_rng(1)
    error = generator.random(20_000) < 0.1
    distance = np.where(error, generator.uniform(105, 135, error.size), generator.uniform(120, 200, error.size))
    distance = distance.astype(np.float16).astype(np.float64)
    exact = sklearn_metrics.roc_auc_score(error, -distance)
    assert float(binary_auroc(torch.from_numpy(-distance).float(), torch.from_numpy(error))) == 0.5
    tally = bare_tally(np.zeros(error.size), error, distance=distance)
    assert exact > 0.9
    assert abs(metrics.auroc(tally.scores("WT", "brain", "boundary_proximity")) - exact) < 1e-4


def test_two_hundred_even_thresholds_lose_the_tail_near_zero_and_a_tally_keeps_it():
    # entropies of most voxels, and of many errors, lie below the first threshold, 1/199
    generator = np.random.default_rng(3)
    error = generator.random(200_000) < 0.02
    exponent = np.where(error, generator.normal(-3, 1.2, error.size), generator.normal(-7, 1.2, error.size))
    p = np.minimum(10**exponent, 0.49).astype(np.float32)
    u = binary_entropy(p)
    exact = sklearn_metrics.roc_auc_score(error, u)
    theirs = float(binary_auroc(torch.from_numpy(u), torch.from_numpy(error).int(), thresholds=200))
    assert exact - theirs > 0.005
    assert abs(metrics.auroc(bare_tally(p, error).scores("WT", "brain", "entropy")) - exact) < 1e-4


def left_open_error(p, truth, n_bins):
    """Return the calibration error over bins (low, high], as the reference code of temperature scaling writes it."""
    total = 0.0
    for low, high in zip(np.arange(n_bins) / n_bins, np.arange(1, n_bins + 1) / n_bins, strict=True):
        inside = (p > low) & (p <= high)
        if inside.any():
            total += abs(p[inside].mean() - truth[inside].mean()) * inside.mean()
    return total


def test_left_open_bins_drop_a_probability_of_zero_and_those_of_a_tally_do_not():
    # half of the voxels have p = 0, and one in ten of them is positive; the others are calibrated to the last
    p = np.concatenate([np.zeros(2000), np.full(2000, 0.75)])
    truth = np.concatenate([np.arange(2000) % 10 == 0, np.arange(2000) % 4 > 0])
    held = bare_tally(p, truth).probabilities("WT", "brain", PROBABILITY)
    assert left_open_error(p, truth, 15) == 0
    assert metrics.ece_class_probability(held["n"], held["sum_p"], 15) == pytest.approx(0.05, rel=1e-12)


def test_a_probability_of_one_has_a_bin_of_its_own_in_torchmetrics_and_none_in_a_tally():
    # 1 for voxels of which nine in ten are positive, 0.95 for as many that all are: gaps of 0.1 and -0.05
    p = np.repeat([1.0, 0.95], 1000)
    truth = np.concatenate([np.arange(1000) % 10 > 0, np.ones(1000, bool)])
    held = bare_tally(p, truth).probabilities("WT", "brain", PROBABILITY)
    theirs = float(binary_calibration_error(torch.from_numpy(p), torch.from_numpy(truth)))
    assert theirs == pytest.approx((0.1 + 0.05) / 2, rel=1e-6)
    assert metrics.ece_class_probability(held["n"], held["sum_p"], 15) == pytest.approx((0.1 - 0.05) / 2, rel=1e-6)


def test_a_probability_on_an_edge_is_below_it_in_monai_and_above_it_in_a_tally():
    p = torch.full((1, 1, 8), 0.25)
    assert calibration_binning(p, torch.zeros_like(p), num_bins=4)[2].tolist() == [[[8, 0, 0, 0]]]
    held = bare_tally(np.full(8, 0.25), np.zeros(8, bool)).probabilities("WT", "brain", PROBABILITY)
    assert metrics.reliability(held["n"], held["sum_p"], 4, "probability")[2].tolist() == [0, 8, 0, 0]
