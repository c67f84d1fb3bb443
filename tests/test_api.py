import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import average_precision_score, brier_score_loss, log_loss, roc_auc_score

import segtrust
from segtrust import metrics
from segtrust.errors import SegtrustError
from segtrust.measures import binary_entropy
from segtrust.values import frame_of, values_of

SHAPE = (14, 12, 10)


def drawn(seed=0, n_passes=6):
    """Return (labels, passes, deterministic) of nested balls."""
    generator = np.random.default_rng(seed)
    distance = np.linalg.norm(np.indices(SHAPE) - np.array([7, 6, 5])[:, None, None, None], axis=0)
    radii = np.array([5.0, 3.5, 2.2])[:, None, None, None]
    inside = distance <= radii
    labels = np.select([inside[2], inside[1], inside[0]], [3, 1, 2], 0).astype(np.uint8)
    logit = radii + 0.4 - distance + 0.5 * generator.normal(size=(n_passes, 3, *SHAPE))
    passes = 1 / (1 + np.exp(-2 * logit))
    return labels, passes, 1 / (1 + np.exp(-2 * logit.mean(axis=0)))


def flat(seed=1, n=20_000):
    generator = np.random.default_rng(seed)
    p = generator.beta(0.3, 0.5, size=n)
    return p, generator.random(n) < p**1.3


def test_metrics_of_arrays_are_those_of_scikit_learn():
    p, truth = flat()
    found, error, u = metrics.compute(p, truth), truth != (p >= 0.5), binary_entropy(p)
    assert found["auroc"] == pytest.approx(roc_auc_score(error, u), abs=1e-4)
    assert found["aupr"] == pytest.approx(average_precision_score(error, u), abs=1e-3)
    assert found["brier"] == pytest.approx(brier_score_loss(truth, p), rel=1e-9)
    assert found["nll"] == pytest.approx(log_loss(truth, np.clip(p, 1e-7, 1 - 1e-7)), rel=1e-9)
    assert found["dice"] == pytest.approx(2 * (truth & (p >= 0.5)).sum() / (truth.sum() + (p >= 0.5).sum()))


def test_metrics_of_arrays_are_those_of_a_tally():
    labels, passes, _ = drawn()
    tally = segtrust.Tally.of_arrays(labels, passes)
    table = tally.metrics().set_index(["region", "mask", "measure", "metric", "n_bins"])["value"]
    p = passes.astype(np.float32).mean(axis=0, dtype=np.float64)[0]
    found = metrics.compute(p, labels > 0)
    for name, value in found.items():
        if name in ("dice", "sensitivity", "precision", "ue_dice"):
            continue
        bins = 15 if name.startswith(("ece", "ace", "mce")) else pd.NA
        measure = "entropy" if name in metrics.compute(p, labels > 0, RANKING) else "probability"
        # probabilities are kept in steps of 2^-24
        assert table["WT", "brain", measure, name, bins] == pytest.approx(value, abs=1e-5), name


RANKING = [
    *("auroc", "aupr", "error_rate", "mean_uncertainty"),
    *("pearson_with_loss", "spearman_with_loss", "auroc_certificate"),
]


def test_only_the_metrics_asked_for_are_given():
    p, truth = flat()
    assert list(metrics.compute(p, truth, ["brier", "ece_top_label"], n_bins=20)) == ["brier", "ece_top_label"]


def test_any_uncertainty_can_be_judged():
    p, truth = flat()
    error = truth != (p >= 0.5)
    assert metrics.compute(p, truth, ["auroc"], uncertainty=error.astype(float))["auroc"] == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"probability": np.array([0.2, np.nan])}, "probability has 1 values outside"),
        ({"probability": np.array([0.2, 1.2])}, r"largest 1\.2"),
        ({"reference": np.array([0, 2])}, "other than 0 and 1"),
        ({"reference": np.zeros(3)}, r"\(2,\), \(3,\) and \(2,\)"),
        ({"uncertainty": np.array([0.0, 3.0])}, "uncertainty has 1 values"),
        ({"names": ["ece"]}, "no metric is called ece; there are"),
    ],
)
def test_what_cannot_be_computed_is_refused_in_words(changes, message):
    arguments = {"probability": np.array([0.2, 0.7]), "reference": np.array([False, True]), **changes}
    with pytest.raises(SegtrustError, match=message):
        metrics.compute(**arguments)


def test_passes_can_be_given_one_by_one():
    labels, passes, deterministic = drawn()
    whole = segtrust.Tally.of_arrays(labels, passes, deterministic=deterministic)
    streamed = segtrust.Tally.of_arrays(labels, (one for one in passes), deterministic=deterministic)
    assert values_of(whole) == pytest.approx(values_of(streamed), nan_ok=True)
    assert "deterministic_entropy" in set(whole.metrics()["measure"])


def test_a_single_probability_has_no_variance():
    labels, passes, _ = drawn()
    tally = segtrust.Tally.of_arrays(labels, [passes.mean(axis=0)])
    assert "variance" not in set(tally.metrics()["measure"])


def test_added_tallies_have_the_pooled_metrics_and_come_back_from_a_file(tmp_path):
    first, second = (segtrust.Tally.of_arrays(*drawn(seed)[:2]) for seed in (0, 1))
    both = first + second
    both.write(tmp_path / "both.parquet")
    read, _ = segtrust.Tally.read(tmp_path / "both.parquet")
    pd.testing.assert_frame_equal(read.metrics(), both.metrics())
    rate = both.metrics().query("region == 'WT' and mask == 'volume' and metric == 'error_rate'")["value"]
    errors = [
        ((passes.astype(np.float32).mean(axis=0)[0] >= 0.5) != (labels > 0)).mean()
        for labels, passes, _ in (drawn(0), drawn(1))
    ]
    assert rate.iloc[0] == pytest.approx(np.mean(errors), rel=1e-9)
    assert len(both.metrics()) == len(frame_of(values_of(first)))


def test_no_pass_is_refused():
    with pytest.raises(SegtrustError, match="no pass was given"):
        segtrust.Tally.of_arrays(np.zeros(SHAPE, np.uint8), [])


def test_probabilities_out_of_range_are_refused_with_their_range():
    labels, passes, _ = drawn()
    with pytest.raises(SegtrustError, match="outside"):
        segtrust.Tally.of_arrays(labels, passes * 100)


def test_importing_segtrust_imports_nothing_heavy():
    code = "import sys, segtrust; print(sorted({'torch', 'monai', 'pandas', 'pyarrow'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
