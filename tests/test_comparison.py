"""Two models on the same patients: differences, their intervals, and the one family of tests."""

import itertools
from functools import cache
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from test_cohort import sheet, tally_of

from segtrust import metrics, paired, pool, strata
from segtrust.cohort import PRIMARY
from segtrust.comparison import _Model, _Pair, _Triage, comparison
from segtrust.errors import Problems, SegtrustError
from segtrust.files import read_parquet
from segtrust.intervals import draw, expanded_percentile
from segtrust.pool import HeldTally
from segtrust.regions import REGIONS
from segtrust.rows import METRICS_SCHEMA
from segtrust.tables import read_tallies_of_models, write_comparison
from segtrust.tally import pooled
from segtrust.values import Key, to_text

N = 8
SETTINGS = {"n_resamples": 50, "seed": 0, "n_bins": [15], "threads": 2}
KEYS = ["model", "reference_model", "region", "mask", "measure", "aggregation", "metric", "n_bins", "pooling"]
FAMILY = [
    (None, None, "dice", None, "patient_mean"),
    ("brain", "probability", "brier", None, "patient_mean"),
    ("predicted_5mm", "probability", "ece_class_probability", 15, "pooled"),
    ("tumour_5mm", "entropy", "aupr", None, "pooled"),
    (None, "entropy", "q4_minus_q1", None, "patient_level"),
]


def people():
    """Return a sheet in which the first two patients are sessions of one person."""
    return sheet(N, subject=["p000", *(f"p{k:03d}" for k in range(N - 1))])


@cache
def good():
    return [HeldTally(tally_of(k, radius=4.5, shift=0.1 + 0.1 * k, spread=0.1 + 0.05 * k)) for k in range(N)]


@cache
def poor():
    """Return tallies of the same patients under a model that predicts too much, and is too sure of it."""
    return [HeldTally(tally_of(k, radius=4.5, shift=1.0 + 0.1 * k, noise=0.8, spread=0.2)) for k in range(N)]


@cache
def rows():
    """Return the comparisons of a good model, a poor one, and the good one once more."""
    models = {"good": (good(), people()), "poor": (poor(), people()), "again": (good(), people())}
    return comparison(models, **SETTINGS).to_pandas()


def of_pair(model, reference_model):
    found = rows()
    found = found[(found["model"] == model) & (found["reference_model"] == reference_model)]
    return found.drop(columns=["model", "reference_model"]).reset_index(drop=True)


def row_of(table, metric, **wanted):
    for column, value in {"metric": metric, "region": "WT", "n_bins": None, **wanted}.items():
        table = table[table[column].isna() if value is None else table[column] == value]
    assert len(table) == 1, table
    return table.iloc[0]


def in_family(table):
    """Return the rows of the family, named as FAMILY does."""
    return pd.concat(
        row_of(table, metric, region=region, mask=mask, measure=measure, n_bins=bins, pooling=pooling).to_frame().T
        for region in REGIONS
        for mask, measure, metric, bins, pooling in FAMILY
    )


def test_every_pair_is_compared_once_the_earlier_model_minus_the_later():
    pairs = rows()[["model", "reference_model"]].drop_duplicates()
    assert list(map(tuple, pairs.to_numpy())) == [("good", "poor"), ("good", "again"), ("poor", "again")]


def test_no_two_rows_are_about_the_same_difference():
    assert not rows().duplicated(KEYS).any()


def test_exactly_the_rows_of_the_family_have_a_p():
    tested = rows()[rows()["p_value"].notna()]
    assert len(tested) == 3 * len(REGIONS) * len(FAMILY)
    assert len(pd.concat(in_family(of_pair(*pair)) for pair in (("good", "poor"), ("good", "again")))["p_value"]) == 30
    assert in_family(of_pair("good", "poor"))["p_value"].notna().all()
    assert (rows()["p_value_holm"].notna() == rows()["p_value"].notna()).all()


def test_the_adjusted_p_is_that_of_one_family_of_all_pairs():
    tested = rows()[rows()["p_value"].notna()]
    assert tested["p_value_holm"].to_numpy() == pytest.approx(paired.holm(tested["p_value"]))
    assert (tested["p_value_holm"] >= tested["p_value"]).all()


def test_a_model_differs_from_itself_in_nothing():
    same = of_pair("good", "again")
    assert (same["value"].dropna() == 0).all()
    assert (same[["ci_low", "ci_high", "bias"]].fillna(0) == 0).all(axis=None)
    assert (same["p_value"].dropna() == 1).all()
    assert len(same["p_value"].dropna()) == 15


def test_models_the_other_way_round_have_the_opposite_differences_and_the_same_p():
    one, other = of_pair("good", "poor"), of_pair("poor", "again")
    for name, opposite in (("value", "value"), ("bias", "bias"), ("ci_low", "ci_high"), ("ci_high", "ci_low")):
        np.testing.assert_allclose(one[name], -other[opposite], rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(one["p_value"], other["p_value"], rtol=1e-12)


@pytest.mark.parametrize("region", REGIONS)
def test_the_better_model_has_more_dice_and_less_error(region):
    table = of_pair("good", "poor")
    dice = row_of(table, "dice", region=region, pooling="patient_mean")
    brier = row_of(table, "brier", region=region, mask="brain", measure="probability", pooling="patient_mean")
    keys = {"mask": "predicted_5mm", "measure": "probability", "pooling": "pooled", "n_bins": 15}
    ece = row_of(table, "ece_class_probability", region=region, **keys)
    assert dice["ci_low"] > 0
    assert brier["ci_high"] < 0
    assert ece["value"] < 0
    # all seven persons agree: two of 2⁷ changes of sign
    assert dice["p_value"] == brier["p_value"] == pytest.approx(2 / 2**7)
    assert ece["p_value"] < 0.05


def difference(region, mask, measure, metric, n_bins=None):
    key = Key(region, mask, measure, metric, n_bins)
    return np.array([a.metrics[key] - b.metrics[key] for a, b in zip(good(), poor(), strict=True)])


def test_a_patient_mean_is_that_of_the_differences_where_both_exist():
    for mask, measure, metric in (("plausible", "variance", "auroc"), ("brain", "probability", "nll")):
        each = difference("TC", mask, measure, metric)
        row = row_of(of_pair("good", "poor"), metric, region="TC", mask=mask, measure=measure, pooling="patient_mean")
        assert row["value"] == pytest.approx(np.nanmean(each), rel=1e-12)
        assert row["n_cases"] == np.isfinite(each).sum()
        assert row["interval"].startswith("studentised")


def test_sessions_of_one_person_enter_the_test_as_their_mean():
    each = difference("ET", "brain", "probability", "brier")
    persons = np.array([each[:2].mean(), *each[2:]])
    keys = {"region": "ET", "mask": "brain", "measure": "probability", "pooling": "patient_mean"}
    row = row_of(of_pair("good", "poor"), "brier", **keys)
    assert row["p_value"] == pytest.approx(stats.wilcoxon(persons, zero_method="pratt").pvalue)
    effect = row_of(of_pair("good", "poor"), "brier_hodges_lehmann", **keys)
    averages = [(a + b) / 2 for a, b in itertools.combinations_with_replacement(persons, 2)]
    assert effect["value"] == pytest.approx(np.median(averages))
    assert effect["ci_low"] <= effect["value"] <= effect["ci_high"] < 0
    assert effect["interval"].startswith("signed_rank")
    assert effect["n_cases"] == N


def test_a_pooled_row_is_the_difference_of_the_added_tallies():
    added = [pooled([source.tally for source in sources]) for sources in (good(), poor())]
    row = row_of(of_pair("good", "poor"), "auroc", mask="brain", measure="entropy", pooling="pooled")
    first, second = (float(metrics.auroc(total.scores("WT", "brain", "entropy"))) for total in added)
    assert row["value"] == pytest.approx(first - second, rel=1e-9)
    counted = [total.overlap[0, 0] / total.counts["n_predicted"][0] for total in added]
    row = row_of(of_pair("good", "poor"), "precision", pooling="pooled")
    assert row["value"] == pytest.approx(counted[0] - counted[1], rel=1e-12)


def test_both_models_have_the_same_resamples():
    weights = draw(people()["subject"], SETTINGS["n_resamples"], SETTINGS["seed"]).weights
    rates = []
    for sources in (good(), poor()):
        scores = np.stack([source.tally.scores("WT", "brain", "entropy") for source in sources]).sum(axis=1)
        drawn = weights @ scores
        rates.append((drawn[:, 1] + drawn[:, 2]) / drawn.sum(axis=1))
    row = row_of(of_pair("good", "poor"), "error_rate", mask="brain", measure="entropy", pooling="pooled")
    interval = expanded_percentile(row["value"], rates[0] - rates[1], N - 1)
    assert row["interval"] == interval.label
    # single precision in the sums of a resample
    assert [row["ci_low"], row["ci_high"]] == pytest.approx([float(interval.low), float(interval.high)], abs=1e-6)


def test_calibration_errors_have_the_envelope_of_their_difference_which_may_be_negative():
    keys = {"mask": "brain", "measure": "probability", "pooling": "pooled", "n_bins": 15}
    row = row_of(of_pair("good", "poor"), "ece_top_label", **keys)
    assert row["interval"].startswith("envelope")
    low, high = row["ci_low"] - row["value"], row["ci_high"] - row["value"]
    assert low == pytest.approx(-high)  # the wider side is reflected
    assert row["ci_high"] < 0
    assert np.isfinite(row["bias"])


def test_masks_that_hold_a_prediction_are_marked_and_the_same_masks_have_their_voxels():
    table = of_pair("good", "poor")
    keys = {"measure": "entropy", "pooling": "pooled"}
    found = {mask: row_of(table, "auroc", mask=mask, **keys) for mask in ("brain", "reference_5mm", "predicted_5mm")}
    assert {mask: bool(row["mask_depends_on_model"]) for mask, row in found.items()} == {
        "brain": False,
        "reference_5mm": False,
        "predicted_5mm": True,
    }
    assert found["brain"]["n_voxels"] == sum(source.tally.scores("WT", "brain", "entropy").sum() for source in good())
    assert np.isnan(found["predicted_5mm"]["n_voxels"])


def test_what_is_measured_by_distance_to_the_reference_says_so():
    for metric in ("buc", "ba_ece"):
        assert row_of(of_pair("good", "poor"), metric, pooling="patient_mean")["conditional_on_reference"]


# --- exchanging the two models ----------------------------------------------------------------------------------


def all_exchanges():
    """Return every way of exchanging the models' results of seven persons, bool (128, N); in the first none is."""
    persons = np.array(list(itertools.product((False, True), repeat=N - 1)))
    return persons[:, [0, *range(N - 1)]]


def exact_p(statistic):
    """Return the p over all exchanges; statistic : function of the weights (128, 2 N) of good and poor tallies."""
    exchanged = all_exchanges()
    first = statistic(np.concatenate([~exchanged, exchanged], axis=1).astype(float))
    second = statistic(np.concatenate([exchanged, ~exchanged], axis=1).astype(float))
    found = np.abs(first - second)
    return (found >= found[0] - 1e-6).mean()


def close_to(p):
    # four standard errors of a proportion of 9,999 draws, and the one that is counted in
    return pytest.approx(p, abs=4 * np.sqrt(p * (1 - p) / 9_999) + 1e-4)


@pytest.mark.parametrize("region", REGIONS)
def test_the_p_of_average_precision_is_that_of_all_exchanges_of_tallies(region):
    scores = np.stack([source.tally.scores(region, "tumour_5mm", "entropy") for source in (*good(), *poor())])
    expected = exact_p(lambda weights: metrics.aupr(np.tensordot(weights, scores, 1)))
    row = row_of(of_pair("good", "poor"), "aupr", region=region, mask="tumour_5mm", measure="entropy", pooling="pooled")
    assert row["p_value"] == close_to(expected)


@pytest.mark.parametrize("region", REGIONS)
def test_the_p_of_a_calibration_error_is_that_of_all_exchanges_of_tallies(region):
    place = region, "predicted_5mm", "probability"
    parts = [source.tally.probabilities(*place) for source in (*good(), *poor())]
    n, sums = (np.stack([part[name] for part in parts]) for name in ("n", "sum_p"))

    def statistic(weights):
        return metrics.ece_class_probability(np.tensordot(weights, n, 1), np.tensordot(weights, sums, 1), 15)

    keys = dict(zip(("region", "mask", "measure"), place, strict=True))
    row = row_of(of_pair("good", "poor"), "ece_class_probability", pooling="pooled", n_bins=15, **keys)
    assert row["p_value"] == close_to(exact_p(statistic))


@pytest.mark.parametrize("region", REGIONS)
def test_the_difference_between_the_outer_quartiles_is_tested_by_exchanging_score_and_dice(region):
    pair = _Pair.of(_Model("good", good(), people()), _Model("poor", poor(), people()), SETTINGS["n_resamples"], 0)
    tables = [model.cases[region] for model in (pair.first, pair.second)]
    scores = np.concatenate([table["scores"][PRIMARY] for table in tables])
    dice = np.concatenate([table["dice"] for table in tables])

    def one(weights):
        chosen = np.flatnonzero(weights)
        return strata.median_difference(dice[chosen], *strata.outer_strata(scores[chosen], "quartiles"))

    row = row_of(of_pair("good", "poor"), "q4_minus_q1", region=region, pooling="patient_level")
    own = np.eye(2).repeat(N, axis=1)
    assert row["value"] == pytest.approx(one(own[0]) - one(own[1]), abs=1e-12)
    assert row["p_value"] == close_to(exact_p(lambda weights: np.array([one(line) for line in weights])))
    assert row["aggregation"] == PRIMARY[0]
    assert row["interval"].endswith("; in_sample cut-offs")


def test_cut_offs_of_the_calibration_split_are_held_and_its_patients_enter_no_difference():
    patients = people().assign(split=["calibration", *["test"] * (N - 1)])
    pair = _Pair.of(_Model("good", good(), patients), _Model("poor", poor(), patients), SETTINGS["n_resamples"], 0)
    assert len(pair.cases[0]) == N - 1
    triage = _Triage(pair, "WT")
    assert not triage.in_sample
    assert triage.metric == "h2_minus_h1"  # one patient makes no quartiles
    expected = []
    for model, sources in ((pair.first, good()), (pair.second, poor())):
        score, dice = model.cases["WT"]["scores"][PRIMARY], model.cases["WT"]["dice"]
        cut = sources[0].metrics[Key("WT", "predicted_5mm", "entropy", "mean_uncertainty", None)]
        upper, lower = dice[score > cut], dice[score <= cut]
        expected.append(np.median(upper) - np.median(lower) if len(upper) and len(lower) else np.nan)
    assert triage.difference(np.ones((1, N - 1)))[0] == pytest.approx(expected[0] - expected[1], nan_ok=True)


# --- models that differ in what they have -------------------------------------------------------------------


@cache
def uneven():
    """Return the rows of models with other patients, other numbers of passes, and one without a deterministic pass."""
    plain = [HeldTally(tally_of(k, radius=4.5, shift=0.6, passes=3, deterministic=False)) for k in (5, 2, 4)]
    names = ["p005", "p002", "p004"]
    lines = []
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(pool, "TALLY_REGIONS", ("WT",))
        models = {
            "good": (good()[:5], people()[:5]),
            "poor": (poor()[2:], people()[2:]),
            "plain": (plain, sheet(3, patient=names, subject=names)),
        }
        return comparison(models, **SETTINGS, log=lines.append), lines


def test_the_columns_are_those_of_a_cohorts_metrics():
    assert uneven()[0].schema == METRICS_SCHEMA


def test_three_patients_have_differences_and_neither_intervals_nor_tests():
    table = uneven()[0]
    assert table["p_value"].null_count == table["p_value_holm"].null_count == table["ci_low"].null_count == len(table)
    assert table["value"].null_count < len(table) / 2


def test_only_shared_patients_are_compared_each_with_itself():
    table = uneven()[0].to_pandas()
    key = Key("WT", "brain", "entropy", "mean_uncertainty", None)
    keys = {
        "mask": "brain",
        "measure": "entropy",
        "pooling": "patient_mean",
        "model": "good",
        "reference_model": "poor",
    }
    row = row_of(table, "mean_uncertainty", **keys)
    assert row["n_cases"] == 3
    assert row["value"] == pytest.approx(np.mean([good()[k].metrics[key] - poor()[k].metrics[key] for k in (2, 3, 4)]))
    pooled_row = row_of(table, "mean_uncertainty", **{**keys, "pooling": "pooled"})
    assert pooled_row["n_voxels"] == sum(good()[k].tally.scores("WT", "brain", "entropy").sum() for k in (2, 3, 4))
    assert (table.query("reference_model == 'plain' and model == 'good'")["n_cases"] <= 2).all()


def test_rows_that_one_model_lacks_are_left_out_of_its_pairs_alone():
    table = uneven()[0].to_pandas()
    deterministic = table[table["measure"] == "probability_deterministic"]
    assert set(deterministic["reference_model"]) == {"poor"}
    assert set(deterministic["pooling"]) == {"pooled", "patient_mean"}


def test_other_numbers_of_passes_are_null_and_told():
    table, lines = uneven()[0].to_pandas(), uneven()[1]
    assert table.query("reference_model == 'plain'")["passes"].isna().all()
    assert (table.query("reference_model == 'poor'")["passes"] == 4).all()
    assert lines[0] == "good minus poor: 3 patients, 3 subjects"
    assert "4 and 3 passes" in lines[2]


def test_models_without_a_common_patient_are_refused_by_name():
    models = {"a": (good()[:1], people()[:1]), "b": (poor()[1:2], people()[1:2])}
    with pytest.raises(Problems, match="a and b have no patient in common"):
        comparison(models, **SETTINGS)


def test_a_single_model_is_refused():
    with pytest.raises(SegtrustError, match="needs two models, found a"):
        comparison({"a": (good(), people())}, **SETTINGS)


def test_a_model_without_test_patients_is_refused():
    patients = sheet(1, split=["calibration"])
    with pytest.raises(SegtrustError, match="b: no patient of the split `test`"):
        comparison({"a": (good()[:1], sheet(1)), "b": (good()[:1], patients)}, **SETTINGS)


# --- files --------------------------------------------------------------------------------------------------


@cache
def text():
    return to_text(good()[0].tally)


def write_tallies(folder, changes):
    """Write tallies of two patients under the models a and b; changes : {(model, patient): provenance}."""
    paths = []
    for model, patient in itertools.product("ab", ("p000", "p001")):
        provenance = {"preprocess": {"code": "1"}, "model": {"weights": model}, "tally": {"code": "1"}}
        path = folder / f"{model}_{patient}.parquet"
        good()[0].tally.write(path, provenance | changes.get((model, patient), {}), text())
        paths.append(path)
    rows = [
        {"patient": name, "subject": name, "split": "test", "coding": "x", "extra": {}} for name in ("p000", "p001")
    ]
    return read_tallies_of_models(paths, ["a", "b"], rows)


def test_tallies_are_read_model_by_model(tmp_path):
    models, provenances = write_tallies(tmp_path, {})
    assert list(models) == ["a", "b"]
    tallies, patients = models["b"]
    assert list(patients["patient"]) == ["p000", "p001"]
    assert [tally.provenance["model"]["weights"] for tally in tallies] == ["b", "b"]
    assert provenances["a"]["model"] == {"weights": "a"}


def test_models_evaluated_with_different_code_are_refused_by_name(tmp_path):
    other = {("b", name): {"tally": {"code": "2"}} for name in ("p000", "p001")}
    with pytest.raises(Problems, match="tally code: 1 in a; 2 in b"):
        write_tallies(tmp_path, other)


def test_tallies_of_one_model_that_disagree_are_refused_by_model_and_patient(tmp_path):
    with pytest.raises(Problems, match="b: model weights: b in p000; c in p001"):
        write_tallies(tmp_path, {("b", "p001"): {"model": {"weights": "c"}}})


def test_the_table_is_written_with_its_provenance_and_as_csv(tmp_path):
    paths = SimpleNamespace(metrics=tmp_path / "metrics.parquet", metrics_csv=tmp_path / "metrics.csv")
    table = METRICS_SCHEMA.empty_table()
    write_comparison(paths, table, {"models": {"a": {}}})
    held, provenance = read_parquet(paths.metrics)
    assert held.schema.remove_metadata() == METRICS_SCHEMA
    assert provenance == {"models": {"a": {}}}
    assert paths.metrics_csv.read_text().strip().replace('"', "").split(",") == METRICS_SCHEMA.names
