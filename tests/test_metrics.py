"""Metrics agree with direct computation, with public libraries, and with closed forms."""

import numpy as np
import pytest
from scipy import integrate, special, stats
from sklearn import linear_model
from sklearn import metrics as sklearn_metrics
from test_voxels import draw_patient, summary_of, table_of

from segtrust import metrics
from segtrust.bins import CONFIDENCE_BINS, FN, FP, PROBABILITY_BINS, SCORE_BINS, TN, TP
from segtrust.masks import BANDS, band_index
from segtrust.measures import binary_entropy
from segtrust.tally import PROBABILITY, Tally

# --- counts of plain arrays, by the bins of the tally


def scores_of(u, truth, predicted):
    """Return score bins × outcomes of a measure in [0, 1]."""
    outcome = np.where(truth, np.where(predicted, TP, FN), np.where(predicted, FP, TN))
    counts = np.bincount(outcome * len(SCORE_BINS) + SCORE_BINS.index(u), minlength=4 * len(SCORE_BINS))
    return counts.reshape(4, -1).T


def counted(bins, values, second, terms):
    key = second.astype(int) * len(bins) + bins.index(values)
    n = np.bincount(key, minlength=2 * len(bins)).reshape(2, -1).T
    return n, *(np.bincount(key, term, 2 * len(bins)).reshape(2, -1).T for term in terms)


def probabilities_of(p, truth):
    """Return n, Σp, Σp², Σlog p, Σlog(1 - p) by probability bin × truth."""
    clipped = np.clip(p, 1e-7, 1 - 1e-7)
    return counted(PROBABILITY_BINS, p, truth, (p, p**2, np.log(clipped), np.log1p(-clipped)))


def confidences_of(p, truth):
    """Return n, Σc by confidence bin × correctness."""
    c = np.maximum(p, 1 - p)
    return counted(CONFIDENCE_BINS, c, truth == (p >= 0.5), (c,))


# --- direct computation, float64


def bin_gaps(values, hits, edges):
    """Return n, |mean value - fraction of hits| of non-empty bins; left-closed, the last closed on both sides."""
    index = np.minimum(np.searchsorted(edges, values, side="right") - 1, len(edges) - 2)
    n = np.bincount(index, minlength=len(edges) - 1)
    sums, found = (np.bincount(index, w, len(edges) - 1) for w in (values, hits.astype(float)))
    return n[n > 0], np.abs(sums - found)[n > 0] / n[n > 0]


def direct_ece(values, hits, edges):
    n, gaps = bin_gaps(values, hits, edges)
    return (n * gaps).sum() / n.sum()


def realistic(n, seed=0):
    """Return p (float32 values as float64) and truth: most voxels nearly certain background, miscalibrated."""
    generator = np.random.default_rng(seed)
    logit = np.where(generator.random(n) < 0.06, generator.normal(0.5, 3, n), generator.normal(-11, 2.5, n))
    p = special.expit(logit).astype(np.float32).astype(float)
    return p, generator.random(n) < special.expit(0.6 * logit - 0.4 * (logit > -4))


def near_zero(n, seed=0):
    """99.9 % of scores are almost zero."""
    generator = np.random.default_rng(seed)
    p = np.where(generator.random(n) < 0.999, 10 ** generator.uniform(-12, -6, n), generator.random(n))
    p = p.astype(np.float32).astype(float)
    return p, generator.random(n) < np.maximum(p, 1e-5)


def votes(n, seed=0):
    """Twenty ensemble members vote."""
    generator = np.random.default_rng(seed)
    share = generator.beta(0.1, 0.6, n)
    p = (generator.binomial(20, share) / 20).astype(np.float32).astype(float)
    return p, generator.random(n) < share


def saturated(n, seed=0):
    """Most probabilities are exactly 0 or 1."""
    generator = np.random.default_rng(seed)
    p = generator.choice([0.0, 1.0, 0.25, 0.9], n, p=[0.6, 0.3, 0.05, 0.05]).astype(np.float32).astype(float)
    return p, generator.random(n) < np.clip(p, 0.02, 0.95)


def half_steps(n, seed=0):
    """Probabilities rounded to half precision."""
    p, truth = realistic(n, seed)
    return p.astype(np.float16).astype(float), truth


CASES = pytest.mark.parametrize("draw", [realistic, near_zero, votes, saturated, half_steps], ids=lambda f: f.__name__)
SIZE = 300_000


# --- discrimination


@CASES
def test_auroc_agrees_with_scikit_learn(draw):
    p, truth = draw(SIZE)
    u, error = binary_entropy(p), truth != (p >= 0.5)
    scores = scores_of(u, truth, p >= 0.5)
    exact = sklearn_metrics.roc_auc_score(error, u)
    assert abs(metrics.auroc(scores) - exact) < 1e-4  # the contract
    assert abs(metrics.auroc(scores) - exact) <= metrics.auroc_certificate(scores) + 1e-12


@CASES
def test_aupr_agrees_with_scikit_learn(draw):
    p, truth = draw(1_500_000)  # a patient; of some dozens of errors, a single tie moves it by more
    u, error = binary_entropy(p), truth != (p >= 0.5)
    exact = sklearn_metrics.average_precision_score(error, u)
    found = metrics.aupr(scores_of(u, truth, p >= 0.5))
    assert abs(found - exact) < min(1e-3, 0.01 * exact)  # the contract


@pytest.mark.parametrize("measure", ["mutual_information", "variance", "boundary_proximity", "deterministic_entropy"])
def test_auroc_of_every_measure_agrees_with_scikit_learn(measure):
    summary, labels, brain = draw_patient(0, (60, 60, 60))
    table = table_of(summary, labels, brain)
    inside = table["in_brain"].to_numpy()
    p = table["probability_TC"].to_numpy().astype(float)
    error = (p >= 0.5) != np.isin(table["reference"].to_numpy(), (1, 3))
    u = {
        "mutual_information": binary_entropy(p) - table["expected_entropy_TC"].to_numpy().astype(float),
        "variance": table["variance_TC"].to_numpy().astype(float),
        "boundary_proximity": -np.abs(table["distance_predicted_TC"].to_numpy().astype(float)),
        "deterministic_entropy": binary_entropy(table["deterministic_probability_TC"].to_numpy()),
    }[measure]
    exact = sklearn_metrics.roc_auc_score(
        error[inside], np.where(measure == "boundary_proximity", u, np.maximum(u, 0))[inside]
    )
    assert abs(metrics.auroc(Tally.of(table).scores("TC", "brain", measure)) - exact) < 1e-4


def test_tied_scores_have_auroc_one_half():
    truth = np.arange(100) < 30
    scores = scores_of(np.full(100, 0.3), truth, np.zeros(100, bool))
    assert metrics.auroc(scores) == 0.5
    assert metrics.aupr(scores) == pytest.approx(0.3)


def test_one_class_alone_has_no_auroc():
    truth = np.zeros(50, bool)
    scores = scores_of(np.linspace(0, 1, 50), truth, truth)
    assert np.isnan(metrics.auroc(scores))
    assert np.isnan(metrics.aupr(scores))
    assert metrics.error_rate(scores) == 0


def test_curves_have_the_area_that_the_metrics_say():
    p, truth = realistic(20_000)
    scores = scores_of(binary_entropy(p), truth, p >= 0.5)
    fpr, tpr = metrics.roc_curve(scores)
    assert np.trapezoid(tpr, fpr) == pytest.approx(metrics.auroc(scores), rel=1e-12)
    recall, precision = metrics.precision_recall_curve(scores)
    steps = np.diff(recall, prepend=0)
    assert np.nansum(steps * precision) == pytest.approx(metrics.aupr(scores), rel=1e-12)


def test_correlation_with_the_loss_agrees_with_scipy():
    summary, labels, brain = draw_patient(1, (50, 50, 50))
    table = table_of(summary, labels, brain)
    tally = Tally.of(table)
    inside = table["in_brain"].to_numpy()
    p = table["probability_WT"].to_numpy().astype(float)[inside]
    clipped = np.clip(p, 1e-7, 1 - 1e-7)
    truth = table["reference"].to_numpy()[inside] > 0
    u, loss = binary_entropy(p), -np.where(truth, np.log(clipped), np.log1p(-clipped))
    sums, scores = tally.score_sums("WT", "brain", "entropy"), tally.scores("WT", "brain", "entropy")
    assert metrics.pearson_with_loss(sums, scores) == pytest.approx(stats.pearsonr(u, loss)[0], rel=1e-9)
    spearman = metrics.spearman_with_loss(tally.joint("WT", "brain", "entropy"))
    assert abs(spearman - stats.spearmanr(u, loss)[0]) < 1e-3  # the contract
    assert metrics.mean_uncertainty(sums, scores) == pytest.approx(u.mean(), rel=1e-9)


def test_a_constant_score_has_no_correlation():
    sums = np.zeros((5, 4))
    sums[:, TN] = [0.3, 0.09, 5.0, 7.0, 1.5]
    scores = np.zeros((3, 4))
    scores[1, TN] = 1
    assert np.isnan(metrics.pearson_with_loss(sums, scores))


def test_ue_dice_is_the_overlap_of_uncertain_voxels_and_errors():
    p, truth = realistic(20_000)
    u, error = binary_entropy(p), truth != (p >= 0.5)
    first = int(SCORE_BINS.index(np.array([0.5]))[0]) + 1  # u > 0.5
    found = metrics.ue_dice(scores_of(u, truth, p >= 0.5), first)
    assert found == pytest.approx(2 * (error & (u > 0.5)).sum() / (error.sum() + (u > 0.5).sum()))


# --- calibration


@CASES
@pytest.mark.parametrize("n_bins", [10, 15, 20])
def test_equal_width_errors_agree_with_a_direct_computation(draw, n_bins):
    p, truth = draw(SIZE)
    edges = np.arange(n_bins + 1) / n_bins
    n, sum_p = probabilities_of(p, truth)[:2]
    n_c, sum_c = confidences_of(p, truth)
    c, correct = np.maximum(p, 1 - p), truth == (p >= 0.5)
    for values, hits, counts, name in (
        (p, truth, (n, sum_p), "class_probability"),
        (c, correct, (n_c, sum_c), "top_label"),
    ):
        voxels, gaps = bin_gaps(values, hits, edges)
        direct = {"ece": (voxels * gaps).sum() / voxels.sum(), "ace": gaps.mean(), "mce": gaps.max()}
        for metric, expected in direct.items():
            found = getattr(metrics, f"{metric}_{name}")(*counts, n_bins)
            assert found == pytest.approx(expected, rel=1e-9, abs=1e-12), (metric, name)


@CASES
def test_equal_mass_errors_agree_with_numpy_quantiles(draw):
    p, truth = draw(SIZE)
    c, correct = np.maximum(p, 1 - p), truth == (p >= 0.5)
    for values, hits, counts, name in (
        (p, truth, probabilities_of(p, truth)[:2], "class_probability"),
        (c, correct, confidences_of(p, truth), "top_label"),
    ):
        edges = np.unique(np.quantile(values, np.arange(16) / 15, method="inverted_cdf"))
        if len(edges) == 1:
            continue
        # a value on the last edge belongs to the bin that starts there if one does
        expected = direct_ece(values, hits, np.append(edges[:-1], 2.0) if edges[-2] < edges[-1] else edges)
        found = getattr(metrics, f"ece_equal_mass_{name}")(*counts, 15)
        assert abs(found - expected) < max(1e-4, 0.02 * expected), name  # the contract


def test_torchmetrics_bins_the_probability_of_the_positive_class():
    torch = pytest.importorskip("torch")
    calibration = pytest.importorskip("torchmetrics.functional.classification")
    # away from edges and from p = 1, where its float32 bins are right
    p, truth = realistic(50_000)
    p, truth = p[(p > 1e-3) & (p < 0.999)], truth[(p > 1e-3) & (p < 0.999)]
    theirs = calibration.binary_calibration_error(torch.tensor(p), torch.tensor(truth.astype(int)), n_bins=15)
    ours = metrics.ece_class_probability(*probabilities_of(p, truth)[:2], 15)
    assert ours == pytest.approx(float(theirs), abs=1e-6)  # it computes in float32
    assert abs(ours - metrics.ece_top_label(*confidences_of(p, truth), 15)) > 1e-3


@CASES
def test_proper_scores_agree_with_scikit_learn(draw):
    p, truth = draw(SIZE)
    n, sum_p, sum_p2, sum_log_p, sum_log_1mp = probabilities_of(p, truth)
    brier = sklearn_metrics.brier_score_loss(truth, p)
    assert metrics.brier(n, sum_p, sum_p2) == pytest.approx(brier, rel=1e-9)
    assert metrics.brier_skill(n, sum_p, sum_p2) == pytest.approx(1 - brier / truth.var(), rel=1e-9)
    clipped = np.clip(p, 1e-7, 1 - 1e-7)
    nll = sklearn_metrics.log_loss(truth, np.stack([1 - clipped, clipped], axis=1))
    assert metrics.nll(n, sum_log_p, sum_log_1mp) == pytest.approx(nll, rel=1e-9)


def test_gap_is_confidence_minus_accuracy():
    p, truth = realistic(SIZE)
    n, sum_c = confidences_of(p, truth)
    correct = truth == (p >= 0.5)
    assert metrics.accuracy(n) == pytest.approx(correct.mean(), rel=1e-12)
    assert metrics.mean_confidence(n, sum_c) == pytest.approx(np.maximum(p, 1 - p).mean(), rel=1e-9)
    assert metrics.gap(n, sum_c) == pytest.approx(np.maximum(p, 1 - p).mean() - correct.mean(), rel=1e-9)


def test_logistic_recalibration_agrees_with_scikit_learn():
    p, truth = realistic(50_000)
    logit = np.clip(special.logit(np.clip(p, 1e-7, 1 - 1e-7)), None, None)
    model = linear_model.LogisticRegression(C=np.inf, tol=1e-10, max_iter=1000).fit(logit[:, None], truth)
    counts = probabilities_of(p, truth)
    intercept, slope = metrics.logistic_recalibration(counts[0], counts[3] - counts[4])
    # bins are 0.1 wide in the logit, or narrower
    assert intercept == pytest.approx(model.intercept_[0], abs=1e-3)
    assert slope == pytest.approx(model.coef_[0, 0], abs=1e-3)


def test_bins_that_are_no_unions_are_refused():
    n, sum_p = probabilities_of(*realistic(100))[:2]
    with pytest.raises(ValueError, match="7 bins are not unions"):
        metrics.ece_class_probability(n, sum_p, 7)


# --- closed forms


def test_a_calibrated_beta_law_has_the_brier_score_of_theory():
    a, b, n = 0.5, 2.0, 1_000_000
    generator = np.random.default_rng(0)
    p = generator.beta(a, b, n)
    truth = generator.random(n) < p
    counts = probabilities_of(p, truth)
    # E[p (1 - p)]; the standard error at a million draws is below 2e-4
    assert metrics.brier(*counts[:3]) == pytest.approx(a * b / ((a + b) * (a + b + 1)), abs=1e-3)
    assert metrics.ece_class_probability(*counts[:2], 15) < 3e-3  # 15 bins of noise of at most 1e-3 each
    assert metrics.calibration_slope(counts[0], counts[3] - counts[4]) == pytest.approx(1, abs=0.01)


def test_a_calibrated_uniform_law_has_an_error_auroc_of_13_eighteenths():
    # the error rate at m = min(p, 1 - p) is m: densities 8m and 8(1 - m)/3 on [0, 1/2]
    generator = np.random.default_rng(1)
    p = generator.random(1_000_000)
    truth = generator.random(p.size) < p
    scores = scores_of(binary_entropy(p), truth, p >= 0.5)
    assert metrics.auroc(scores) == pytest.approx(13 / 18, abs=2e-3)  # standard error 5e-4
    assert metrics.error_rate(scores) == pytest.approx(1 / 4, abs=2e-3)


def test_the_two_conventions_can_disagree_completely():
    # truth has probability p²: off by E[p - p²] = 1/6, though at every confidence the labels are right as often as said
    generator = np.random.default_rng(2)
    p = generator.random(1_000_000)
    truth = generator.random(p.size) < p**2
    assert metrics.ece_class_probability(*probabilities_of(p, truth)[:2], 15) == pytest.approx(1 / 6, abs=2e-3)
    assert metrics.ece_top_label(*confidences_of(p, truth), 15) < 3e-3


def test_a_planted_calibration_curve_is_found():
    # logit p is twice the true logit, which is normal: slope 1/2, intercept 0, and a Brier score by quadrature
    generator = np.random.default_rng(3)
    logit = generator.normal(0, 1.5, 1_000_000)
    truth = generator.random(logit.size) < special.expit(logit)
    p = special.expit(2 * logit)
    counts = probabilities_of(p, truth)
    intercept, slope = metrics.logistic_recalibration(counts[0], counts[3] - counts[4])
    assert slope == pytest.approx(0.5, abs=5e-3)
    assert intercept == pytest.approx(0, abs=5e-3)

    def squared_error(x):
        q, f = special.expit(x), special.expit(2 * x)
        return stats.norm.pdf(x, scale=1.5) * (q * (1 - f) ** 2 + (1 - q) * f**2)

    assert metrics.brier(*counts[:3]) == pytest.approx(integrate.quad(squared_error, -12, 12)[0], abs=2e-3)


# --- undefined


def test_an_empty_mask_is_undefined_everywhere():
    scores, n_p, n_c = (
        np.zeros((len(SCORE_BINS), 4)),
        np.zeros((len(PROBABILITY_BINS), 2)),
        np.zeros((len(CONFIDENCE_BINS), 2)),
    )
    values = [
        function(scores) for function in (metrics.auroc, metrics.auroc_certificate, metrics.aupr, metrics.error_rate)
    ]
    for convention, counts in (("class_probability", n_p), ("top_label", n_c)):
        names = [f"{name}_{convention}" for name in ("ece", "ace", "mce", "ece_equal_mass")]
        values += [getattr(metrics, name)(counts, counts, 15) for name in names]
    values += [metrics.brier(n_p, n_p, n_p), metrics.brier_skill(n_p, n_p, n_p), metrics.nll(n_p, n_p, n_p)]
    values += [metrics.gap(n_c, n_c), metrics.accuracy(n_c), *metrics.logistic_recalibration(n_p, n_p)]
    values += [metrics.mean_uncertainty(np.zeros((5, 4)), scores), metrics.spearman_with_loss(np.zeros((256, 256)))]
    values += [metrics.qu_brats(scores, scores)["qu_brats"], metrics.retention(scores)["area"]]
    assert np.isnan(values).all()


def test_one_class_alone_has_no_skill_and_no_slope():
    p, truth = np.linspace(0, 0.4, 500), np.zeros(500, bool)
    counts = probabilities_of(p, truth)
    assert np.isnan(metrics.brier_skill(*counts[:3]))
    assert np.isnan(metrics.calibration_slope(counts[0], counts[3] - counts[4]))


def test_separable_classes_have_no_slope():
    p = np.linspace(0.01, 0.99, 500)
    counts = probabilities_of(p, p > 0.5)
    assert np.isnan(metrics.calibration_slope(counts[0], counts[3] - counts[4]))


# --- leading axes


def test_many_patients_at_once_are_the_patients_one_by_one():
    patients = [realistic(3000, seed) for seed in range(4)]
    scores = np.stack([scores_of(binary_entropy(p), t, p >= 0.5) for p, t in patients]).reshape(2, 2, -1, 4)
    n, sum_p, sum_p2, log_p, log_1mp = (
        np.stack(c).reshape(2, 2, -1, 2) for c in zip(*(probabilities_of(*x) for x in patients), strict=True)
    )
    n_c, sum_c = (np.stack(c).reshape(2, 2, -1, 2) for c in zip(*(confidences_of(*x) for x in patients), strict=True))
    functions = {
        metrics.auroc: (scores,),
        metrics.aupr: (scores,),
        metrics.auroc_certificate: (scores,),
        lambda s: metrics.qu_brats(s, s)["qu_brats"]: (scores,),
        lambda s: metrics.retention(s)["area_normalised"]: (scores,),
        lambda a, b: metrics.ece_class_probability(a, b, 15): (n, sum_p),
        lambda a, b: metrics.ece_equal_mass_class_probability(a, b, 15): (n, sum_p),
        lambda a, b: metrics.mce_top_label(a, b, 15): (n_c, sum_c),
        metrics.brier_skill: (n, sum_p, sum_p2),
        metrics.nll: (n, log_p, log_1mp),
        metrics.calibration_slope: (n, log_p - log_1mp),
        metrics.gap: (n_c, sum_c),
    }
    for function, arrays in functions.items():
        together = function(*arrays)
        assert together.shape == (2, 2)
        for place in np.ndindex(2, 2):
            assert together[place] == pytest.approx(function(*(a[place] for a in arrays)), rel=1e-12)


# --- segmentation


def test_dice_of_two_empty_masks_is_one_and_of_one_empty_mask_zero():
    assert metrics.dice(np.array([0, 0, 3]), np.array([0, 5, 1]), np.array([0, 0, 0])) == pytest.approx([1, 0, 6 / 7])


def test_sensitivity_and_precision_of_nothing_are_undefined():
    assert np.isnan([metrics.sensitivity(0, 0), metrics.precision(0, 0)]).all()
    assert [metrics.sensitivity(3, 1), metrics.precision(3, 2)] == pytest.approx([0.75, 0.6])


# --- QU-BraTS


def qu_brats_direct(u, truth, predicted, brain):
    """Section 6 of the definitions, voxel by voxel."""
    uncertainty = 100 * u
    parts = {"dsc": [], "ftp": [], "ftn": []}
    hit, quiet = truth & predicted & brain, ~truth & ~predicted & brain
    for tau in np.arange(0, 100.1, 2.5):
        keep = uncertainty <= tau
        both = 2 * (truth & predicted & keep).sum() + ((truth != predicted) & keep).sum()
        parts["dsc"].append(2 * (truth & predicted & keep).sum() / both if both else 1)
        for name, part in (("ftp", hit), ("ftn", quiet)):
            parts[name].append((part.sum() - (part & keep).sum()) / part.sum() if part.sum() else 0)
    areas = {name: np.trapezoid(values, dx=2.5) / 100 for name, values in parts.items()}
    return (areas["dsc"] + (1 - areas["ftp"]) + (1 - areas["ftn"])) / 3, areas


@CASES
def test_qu_brats_agrees_with_its_definition(draw):
    p, truth = draw(50_000)
    brain = np.random.default_rng(5).random(p.size) < 0.5
    u, predicted = binary_entropy(p), p >= 0.5
    score, areas = qu_brats_direct(u, truth, predicted, brain)
    found = metrics.qu_brats(scores_of(u, truth, predicted), scores_of(u[brain], truth[brain], predicted[brain]))
    assert found["qu_brats"] == pytest.approx(score, rel=1e-9)
    for name, area in areas.items():
        assert found[f"auc_{name}"] == pytest.approx(area, rel=1e-9, abs=1e-12)


def test_qu_brats_keeps_voxels_exactly_on_a_threshold():
    u = np.arange(41) / 40
    truth = np.ones(41, bool)
    found = metrics.qu_brats(scores_of(u, truth, truth), scores_of(u, truth, truth))
    assert found["ftp"] == pytest.approx(1 - (np.arange(41) + 1) / 41)


def test_the_references_of_qu_brats_are_the_scores_of_their_maps():
    p, truth = realistic(20_000)
    predicted = p >= 0.5
    found = metrics.qu_brats(*[scores_of(binary_entropy(p), truth, predicted)] * 2)
    zero, oracle = (
        metrics.qu_brats(*[scores_of(u, truth, predicted)] * 2)["qu_brats"]
        for u in (np.zeros(p.size), (truth != predicted).astype(float))
    )
    assert found["qu_brats_zero"] == pytest.approx(zero, rel=1e-12)
    assert found["qu_brats_oracle"] == pytest.approx(oracle, rel=1e-12)


def test_an_all_zero_map_can_outscore_entropy():
    # a small, uncertain, correctly segmented region: filtering takes true positives away
    p = np.concatenate([np.full(300, 0.65), np.full(20, 0.4), np.full(50_000, 1e-6)])
    truth = np.arange(p.size) < 320
    found = metrics.qu_brats(*[scores_of(binary_entropy(p), truth, p >= 0.5)] * 2)
    assert found["qu_brats_zero"] > found["qu_brats"]


def test_qu_brats_of_two_empty_masks_loses_nothing_to_missing_classes():
    truth = np.zeros(100, bool)
    found = metrics.qu_brats(*[scores_of(np.zeros(100), truth, truth)] * 2)
    assert found["qu_brats"] == 1


# --- retention


def retention_direct(order, truth, predicted):
    """Dice after replacing the first 0, 1, …, 100 % of an order by the reference."""
    values = []
    for count in np.round(np.arange(101) / 100 * len(order)).astype(int):
        mended = predicted.copy()
        mended[order[:count]] = truth[order[:count]]
        values.append(2 * (mended & truth).sum() / (mended.sum() + truth.sum()))
    return np.array(values)


def test_retention_agrees_with_replacing_voxels():
    p, truth = realistic(20_000)
    u, predicted = binary_entropy(p), p >= 0.5
    found = metrics.retention(scores_of(u, truth, predicted))
    direct = retention_direct(np.argsort(-u, kind="stable"), truth, predicted)
    assert found["curve"] == pytest.approx(direct, abs=2e-3)  # within a bin the order is an expectation
    generator = np.random.default_rng(6)
    shuffled = [retention_direct(generator.permutation(len(u)), truth, predicted) for _ in range(20)]
    assert found["random"] == pytest.approx(np.mean(shuffled, axis=0), abs=5e-3)
    # false negatives first: each is worth more to the Dice than a false positive
    ideal = retention_direct(np.lexsort((predicted, truth == predicted)), truth, predicted)
    assert found["ideal"] == pytest.approx(ideal, abs=1e-9)


def test_retention_by_the_errors_themselves_is_ideal_but_for_their_order():
    p, truth = realistic(20_000)
    predicted = p >= 0.5
    missed = truth & ~predicted
    u = np.where(missed, 1.0, np.where(truth != predicted, 0.5, 0.0))
    assert metrics.retention(scores_of(u, truth, predicted))["area_normalised"] == pytest.approx(1, abs=1e-9)


# --- bands


def test_boundary_metrics_agree_with_the_rows():
    table = table_of(*draw_patient(2, (30, 30, 30)))
    tally = Tally.of(table)
    band = band_index(table["distance_reference_WT"].to_numpy())
    p = table["probability_WT"].to_numpy().astype(float)
    u, error = binary_entropy(p), (p >= 0.5) != (table["reference"].to_numpy() > 0)
    sums = np.stack([tally.score_sums("WT", name, "entropy") for name in BANDS])
    scores = np.stack([tally.scores("WT", name, "entropy") for name in BANDS])
    near, deep = np.isin(band, [0, 1, 2, 6, 7, 8]), np.isin(band, [3, 4, 5])
    mean_near, mean_deep = u[near].mean(), u[deep].mean()
    assert metrics.buc(sums, scores) == pytest.approx(mean_near / (mean_near + mean_deep), rel=1e-9)
    weight = np.exp(-np.array([0.5, 1.5, 2.5, 4, 7.5, 12.5] * 2) / 3)
    gaps = [abs(u[band == k].mean() / 2 - error[band == k].mean()) if (band == k).any() else np.nan for k in range(12)]
    held = ~np.isnan(gaps)
    expected = (weight[held] * np.array(gaps)[held]).sum() / weight[held].sum()
    assert metrics.ba_ece(sums, scores) == pytest.approx(expected, rel=1e-9)


# --- a whole patient


def test_a_patient_of_whole_size_agrees_with_scikit_learn():
    # 1.5 million voxels, through the table and its half-precision columns
    shape = (120, 120, 104)
    generator = np.random.default_rng(7)
    p, truth = realistic(np.prod(shape), 7)
    passes = np.stack([p, np.clip(p * generator.uniform(0.8, 1.1, p.size), 0, 1)])
    passes = np.repeat(passes.reshape(2, 1, *shape), 3, axis=1)
    summary = summary_of(passes)
    labels = np.where(truth, 3, 0).astype(np.uint8).reshape(shape)
    tally = Tally.of(table_of(summary, labels, np.ones(shape, bool)))
    mean = summary.probability[0].reshape(-1).astype(float)
    counts = tally.probabilities("WT", "brain", PROBABILITY)
    scores = tally.scores("WT", "brain", "entropy")
    error = truth != (mean >= 0.5)
    assert scores.sum() == truth.size
    assert abs(metrics.auroc(scores) - sklearn_metrics.roc_auc_score(error, binary_entropy(mean))) < 1e-4
    assert metrics.brier(counts["n"], counts["sum_p"], counts["sum_p2"]) == pytest.approx(
        sklearn_metrics.brier_score_loss(truth, mean), rel=1e-9
    )
    assert metrics.ece_class_probability(counts["n"], counts["sum_p"], 15) == pytest.approx(
        direct_ece(mean, truth, np.arange(16) / 15), rel=1e-9
    )
