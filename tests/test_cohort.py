from functools import cache
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from test_voxels import member_entropy

from segtrust import metrics
from segtrust.cohort import (
    _volume_quantiles,
    cases_of,
    cohort,
)
from segtrust.errors import Problems, SegtrustError
from segtrust.files import write_json
from segtrust.masks import BANDS, CONDITIONAL_ON_REFERENCE, MASKS
from segtrust.measures import MEASURES, binary_entropy
from segtrust.pool import HeldTally
from segtrust.rows import CURVES_SCHEMA, METRICS_SCHEMA, STRATA_SCHEMA
from segtrust.tables import check_agreement, read_scales
from segtrust.tally import Tally, pooled
from segtrust.voxels import voxels

SHAPE = (13, 12, 11)
REGION_SHARE = np.array([1.0, 0.7, 0.45])[:, None, None, None]  # radii of WT, TC and ET


def voxels_of(
    seed, radius=4.0, shift=0.5, noise=0.4, passes=4, deterministic=True, order=(0, 1, 2), spread=0.3, n_members=None
):
    """Return the voxels of nested balls, predicted with a radius that is off by `shift` and a noise, in voxels."""
    generator = np.random.default_rng(seed)
    distance = np.linalg.norm(np.indices(SHAPE) - np.array([6, 6, 5])[:, None, None, None], axis=0)
    inside = distance <= radius * REGION_SHARE
    labels = np.select([inside[2], inside[1], inside[0]], [3, 1, 2], 0).astype(np.uint8)
    depth = radius * REGION_SHARE + shift - distance + noise * generator.normal(size=SHAPE)
    drawn = depth + spread * generator.normal(size=(passes, 1, 1, 1, 1))
    p = (1 / (1 + np.exp(-2 * drawn)))[:, list(order)]
    votes = (p >= 0.5).sum(axis=0)
    summary = SimpleNamespace(
        passes=passes,
        probability=p.mean(axis=0).astype(np.float32),
        deterministic=(1 / (1 + np.exp(-2 * depth)))[list(order)].astype(np.float32) if deterministic else None,
        expected_entropy=binary_entropy(p).mean(axis=0).astype(np.float32),
        member_entropy=member_entropy(p, n_members),
        variance=p.var(axis=0, ddof=1).astype(np.float32) if passes > 1 else None,
        votes=votes,
        volumes=(p >= 0.5).sum(axis=(2, 3, 4)),
    )
    brain = np.linalg.norm(np.indices(SHAPE) - np.array([6, 6, 5])[:, None, None, None], axis=0) < 6
    return voxels(summary, labels, brain, brain, spacing_mm=(1, 1, 1), patient=f"p{seed}")


def tally_of(seed, **options):
    """Return the tally of `voxels_of`."""
    return Tally.of(voxels_of(seed, **options))


def sheet(n, **columns):
    names = [f"p{k:03d}" for k in range(n)]
    table = {"patient": names, "subject": names, "split": ["test"] * n, "coding": ["brats2021"] * n}
    return pd.DataFrame(table | columns)


def evaluate(tallies, patients, **settings):
    settings = {"model": "m", "n_resamples": 200, "failure_dice": 0.8, "seed": 0, "n_bins": [15]} | settings
    return cohort(tallies, patients, **settings)


@cache
def twelve():
    """Return tallies of 12 patients whose prediction gets worse, and more uncertain, with their number."""
    return [tally_of(k, radius=4.5, shift=0.3 + 0.1 * k, spread=0.1 + 0.05 * k) for k in range(12)]


@cache
def tables_of_twelve():
    return frames(evaluate(twelve(), sheet(12, site=["x", "y"] * 6)))


@cache
def two_odd_ones():
    """Return a cohort with two test patients: wrong channel order, unequal passes, no deterministic pass."""
    settings = {"radius": 5.0, "order": (1, 2, 0), "deterministic": False}
    tallies = [tally_of(0, passes=3, **settings), tally_of(1, passes=4, **settings), tally_of(2, passes=4, **settings)]
    return evaluate(tallies, sheet(3, split=["test", "test", "calibration"]))


@cache
def tables_of_two_odd_ones():
    return frames(two_odd_ones())


def frames(tables):
    return {name: table if name == "alarms" else table.to_pandas() for name, table in tables.items()}


def row_of(tables, metric, **wanted):
    rows = tables["metrics"]
    for column, value in {"metric": metric, "region": "WT", "n_bins": None, "aggregation": None, **wanted}.items():
        rows = rows[rows[column].isna() if value is None else rows[column] == value]
    assert len(rows) == 1, rows
    return rows.iloc[0]


def points(tables):
    keys = ["region", "mask", "measure", "aggregation", "metric", "n_bins", "pooling"]
    return tables["metrics"].sort_values(keys, kind="stable")[[*keys, "value"]].reset_index(drop=True)


def test_tables_have_exactly_the_columns_of_the_contract():
    tables = two_odd_ones()
    assert tables["metrics"].schema == METRICS_SCHEMA
    assert tables["strata"].schema == STRATA_SCHEMA
    assert tables["curves"].schema == CURVES_SCHEMA


def test_the_patients_table_begins_with_the_columns_of_the_contract_and_ends_with_those_of_the_sheet():
    columns = list(tables_of_twelve()["patients"].columns)
    assert " ".join(columns[:21]) == (
        "model patient subject split region dice dice_deterministic delta_dice sensitivity precision hd95 hd95_brats "
        "nsd_1mm volume_ml volume_error_ml volume_median_ml volume_low_ml volume_high_ml pairwise_dice both_empty "
        "missing_region"
    )
    assert columns[-2:] == ["coding", "site"]
    assert all(name.startswith("score_") for name in columns[21:-2])


def test_no_two_rows_are_about_the_same_number():
    keys = ["region", "mask", "measure", "aggregation", "metric", "n_bins", "pooling"]
    assert not tables_of_twelve()["metrics"].duplicated(keys).any()


def test_every_mask_and_pooling_has_its_discrimination_and_calibration():
    rows = tables_of_twelve()["metrics"]
    for metric, measure in (("auroc", "mutual_information"), ("brier", "probability_deterministic")):
        found = rows[(rows["metric"] == metric) & (rows["measure"] == measure) & rows["mask"].isin(MASKS)]
        assert len(found) == 3 * len(MASKS) * 2


def test_a_pooled_row_is_the_metric_of_the_added_tallies():
    total = pooled(twelve())
    row = row_of(tables_of_twelve(), "auroc", mask="brain", measure="entropy", pooling="pooled")
    assert row["value"] == pytest.approx(metrics.auroc(total.scores("WT", "brain", "entropy")), rel=1e-12)
    assert row["n_voxels"] == total.scores("WT", "brain", "entropy").sum()


def test_a_patient_mean_row_is_the_mean_over_patients():
    values = []
    for tally in twelve():
        part = tally.probabilities("TC", "predicted_5mm", "probability")
        values.append(metrics.ece_class_probability(part["n"], part["sum_p"], 15))
    row = row_of(
        tables_of_twelve(),
        "ece_class_probability",
        region="TC",
        mask="predicted_5mm",
        measure="probability",
        n_bins=15,
        pooling="patient_mean",
    )
    assert row["value"] == pytest.approx(np.mean(values), rel=1e-12)
    assert row["n_cases"] == 12


def test_lesionwise_dice_is_averaged_over_patients():
    expected = np.mean([tally.scalars["dice_lesionwise"][2] for tally in twelve()])
    row = row_of(tables_of_twelve(), "dice_lesionwise", region="ET", pooling="patient_mean")
    assert row["value"] == pytest.approx(expected, rel=1e-12)
    assert row["n_cases"] == 12


def test_every_auroc_has_its_certificate_beside_it():
    rows = tables_of_twelve()["metrics"]
    rows = rows[rows["measure"].isin(MEASURES) & rows["mask"].notna()]
    keys = ["region", "mask", "measure", "pooling", "n_cases"]
    beside = [set(map(tuple, rows.loc[rows["metric"] == name, keys].values)) for name in ("auroc", "auroc_certificate")]
    assert beside[0] == beside[1]
    certificate = metrics.auroc_certificate(pooled(twelve()).scores("WT", "brain", "entropy"))
    row = row_of(tables_of_twelve(), "auroc_certificate", mask="brain", measure="entropy", pooling="pooled")
    assert row["value"] == pytest.approx(float(certificate), rel=1e-12)


def test_the_share_of_voxels_where_argmax_and_overlay_differ_is_reported():
    tallies = [tally_of(k, order=(2, 0, 1)) for k in range(2)]
    row = row_of(frames(evaluate(tallies, sheet(2))), "argmax_differs", region="ALL", pooling="pooled")
    counts = [tally.counts for tally in tallies]
    assert row["value"] == sum(count["n_argmax_differs"] for count in counts) / (2 * np.prod(SHAPE))
    assert row["value"] > 0


def test_what_is_measured_by_distance_to_the_reference_says_so():
    rows = tables_of_twelve()["metrics"]
    assert rows.loc[rows["metric"].isin(["buc", "ba_ece"]), "conditional_on_reference"].eq(True).all()


def test_rows_on_masks_made_from_the_reference_say_so():
    rows = tables_of_twelve()["metrics"].dropna(subset="mask")
    rows = rows[rows["mask"].isin(MASKS)]
    assert (rows["conditional_on_reference"] == rows["mask"].isin(CONDITIONAL_ON_REFERENCE)).all()


def test_intervals_hold_their_value():
    rows = tables_of_twelve()["metrics"].dropna(subset=["ci_low"])
    # A resampled area may lie off its value on few, tied cases; the studentised interval of a mean does not.
    rows = rows[rows["pooling"] == "patient_mean"]
    assert len(rows) > 1000
    assert ((rows["ci_low"] <= rows["value"] + 1e-9) & (rows["value"] <= rows["ci_high"] + 1e-9)).all()


def test_the_order_of_patients_changes_nothing():
    order = np.random.default_rng(0).permutation(12)
    patients = sheet(12, site=["x", "y"] * 6).iloc[order]
    shuffled = evaluate([twelve()[k] for k in order], patients)
    for name in ("metrics", "patients", "strata", "curves"):
        pd.testing.assert_frame_equal(shuffled[name].to_pandas(), tables_of_twelve()[name])


def test_a_cohort_taken_twice_has_the_same_point_values():
    patients = pd.concat([sheet(12), sheet(12).assign(patient=[f"r{k:03d}" for k in range(12)])])
    twice = {"metrics": evaluate(twelve() * 2, patients)["metrics"].to_pandas()}
    once, twice = points(tables_of_twelve()), points(twice)
    # Ranks, quartile cut-offs and counts of pairs follow the number of cases; what is left are means and ratios.
    held = once["pooling"].isin(["pooled", "patient_mean"])
    assert (once.loc[held, "metric"] == twice.loc[held, "metric"]).all()
    # Sums are added in another order; quantile bins may move by one voxel.
    exact = held & ~once["metric"].str.contains("equal_mass")
    np.testing.assert_allclose(twice.loc[exact, "value"], once.loc[exact, "value"], rtol=1e-6, atol=1e-9)


def test_two_patients_have_no_interval_in_any_row():
    tables = tables_of_two_odd_ones()
    assert tables["metrics"]["ci_low"].isna().all()
    assert tables["metrics"]["interval"].str.startswith("none").all()
    assert tables["strata"]["ci_low"].isna().all()
    assert tables["curves"]["low"].isna().all()


def test_a_wrong_channel_order_is_named():
    found = [alarm for alarm in tables_of_two_odd_ones()["alarms"] if alarm["alarm"] == "channel_order"]
    # The channel read as WT holds TC, the one read as TC holds ET, the one read as ET holds WT.
    assert found[0]["value"]["order"] == ["TC", "ET", "WT"]
    assert "TC in the channel read as WT" in found[0]["message"]


def test_unequal_passes_are_named():
    assert "unequal_passes" in {alarm["alarm"] for alarm in tables_of_two_odd_ones()["alarms"]}


def test_few_patients_are_named():
    assert "few_patients" in {alarm["alarm"] for alarm in tables_of_two_odd_ones()["alarms"]}


PARTS = ("mutual_information_within_members", "mutual_information_between_members")


@cache
def tables_of_ensembles():
    """Return the tables of two patients with 2 members of 3 passes each, and scales for all regions but ET."""
    tallies = [tally_of(k, passes=6, n_members=2) for k in range(2)]
    return frames(evaluate(tallies, sheet(2), scales={"WT": 3.0, "TC": 0.5, "ET": None}))


def test_entropy_is_expected_entropy_and_the_parts_within_and_between_members():
    def mean(measure):
        keys = {"region": "TC", "mask": "predicted_5mm", "pooling": "pooled"}
        return row_of(tables_of_ensembles(), "mean_uncertainty", measure=measure, **keys)["value"]

    parts = [mean(measure) for measure in ("expected_entropy", *PARTS)]
    assert min(parts) > 0
    # rounding to half precision makes a part negative in a few voxels, where it is clipped at 0
    assert sum(parts) == pytest.approx(mean("entropy"), abs=1e-4)


def test_parts_of_members_have_every_row_that_mutual_information_has():
    tables = tables_of_ensembles()
    for name, keys in {
        "metrics": ["region", "mask", "metric", "pooling", "aggregation"],
        "strata": ["region", "aggregation", "scheme", "stratum"],
    }.items():
        rows = {
            measure: set(map(tuple, tables[name].query("measure == @measure")[keys].astype(str).values))
            for measure in ("mutual_information", *PARTS)
        }
        assert rows[PARTS[0]] == rows[PARTS[1]] == rows["mutual_information"], name
    assert all(f"score_brain_mean_{part}" in tables["patients"] for part in PARTS)


def test_a_model_of_one_member_has_no_row_and_no_column_of_parts():
    tables = tables_of_twelve()
    for name in ("metrics", "strata", "curves"):
        assert not tables[name]["measure"].isin(PARTS).any(), name
    assert not [name for name in tables["patients"] if "members" in name]


@pytest.mark.parametrize("measure", ["mutual_information", "variance"])
def test_a_scaled_measure_has_the_rows_of_a_measure_that_is_multiplied(measure):
    total = pooled([tally_of(k, passes=6, n_members=2) for k in range(2)])
    for region, scale in (("WT", 3.0), ("TC", 0.5)):
        counts, sums = total.scores(region, "brain", measure), total.score_sums(region, "brain", measure)
        powers = np.array([1, 2, 0, 0, 1])[:, np.newaxis]  # of u in Σu, Σu², Σℓ, Σℓ², Σuℓ
        expected = {
            "mean_uncertainty": metrics.mean_uncertainty(sums * scale**powers, counts),
            "pearson_with_loss": metrics.pearson_with_loss(sums * scale**powers, counts),
            "auroc": metrics.auroc(counts),
            "aupr": metrics.aupr(counts),
        }
        for metric, value in expected.items():
            keys = {"region": region, "mask": "brain", "measure": f"{measure}_scaled", "pooling": "pooled"}
            assert row_of(tables_of_ensembles(), metric, **keys)["value"] == pytest.approx(float(value), rel=1e-9)


def test_scores_of_a_scaled_measure_are_multiplied():
    people = tables_of_ensembles()["patients"].set_index("region")
    for aggregation in ("predicted_5mm_mean", "brain_sum"):
        scaled, plain = (people[f"score_{aggregation}_variance{ending}"] for ending in ("_scaled", ""))
        np.testing.assert_allclose(scaled["WT"], 3 * plain["WT"], rtol=1e-12)
        assert scaled["ET"].isna().all()


def test_a_region_without_a_scale_has_null_rows():
    rows = tables_of_ensembles()["metrics"].query("region == 'ET' and measure == 'variance_scaled'")
    assert len(rows)
    assert rows["value"].isna().all()
    assert set(rows["interval"]) == {"none: no scale could be fitted"}


def test_without_scales_there_are_no_scaled_measures():
    tables = tables_of_twelve()
    assert not tables["metrics"]["measure"].astype(str).str.endswith("_scaled").any()
    assert not [name for name in tables["patients"] if name.endswith("_scaled")]


def test_scales_are_read_from_the_file_of_the_fitted_rate(tmp_path):
    write_json(tmp_path / "rate.json", {"rate": 0.1, "scale": {"WT": 2.0, "TC": 1.0, "ET": None}})
    assert read_scales(tmp_path / "rate.json") == {"WT": 2.0, "TC": 1.0, "ET": None}
    assert read_scales(None) is None


def test_a_sound_cohort_raises_no_error_alarm():
    assert [alarm for alarm in tables_of_twelve()["alarms"] if alarm["severity"] == "error"] == []


def test_without_a_deterministic_pass_its_rows_are_null_and_not_zero():
    tables = tables_of_two_odd_ones()
    rows = tables["metrics"]
    deterministic = rows[rows["measure"].isin(["deterministic_entropy", "probability_deterministic"])]
    assert len(deterministic)
    assert deterministic["value"].isna().all()
    assert tables["patients"]["dice_deterministic"].isna().all()
    assert list(tables["patients"].columns) == list(tables_of_twelve()["patients"].columns.drop("site"))
    assert tables["patients"]["score_brain_mean_deterministic_entropy"].isna().all()


def test_patients_of_the_calibration_split_enter_no_table_and_set_the_cut_offs():
    tables = tables_of_two_odd_ones()
    assert set(tables["patients"]["patient"]) == {"p000", "p001"}
    assert set(tables["strata"]["cutoff_source"]) == {"calibration"}


def test_strata_agree_with_the_scores_in_the_patients_table():
    tables = tables_of_twelve()
    people = tables["patients"].query("region == 'ET'")
    score = people["score_predicted_5mm_mean_entropy"]
    strata = tables["strata"].query(
        "region == 'ET' and measure == 'entropy' and aggregation == 'predicted_5mm_mean' and scheme == 'quartiles'"
    )
    lowest = people[score <= np.quantile(score, 0.25)]
    row = strata[strata["stratum"] == "Q1"].iloc[0]
    assert row["n_cases"] == len(lowest) == 3
    assert row["median_dice"] == lowest["dice"].median()


def test_a_patient_without_a_predicted_region_has_no_score():
    # Moved inwards by 9 voxels, the ball of radius 4 is gone.
    tallies = [tally_of(0, shift=-9), tally_of(1)]
    scores = cases_of([HeldTally(tally) for tally in tallies], "WT")["scores"]["brain_mean", "entropy"]
    assert np.isnan(scores[0])
    assert np.isfinite(scores[1])


def test_volumes_of_nineteen_passes_have_their_outermost_as_interval():
    volumes = np.arange(19.0)
    assert list(_volume_quantiles(volumes)) == [0, 9, 18]
    assert np.isnan(_volume_quantiles(volumes[:18])[0])


def test_a_cohort_without_test_patients_is_refused():
    with pytest.raises(SegtrustError, match="no patient of the split `test`"):
        evaluate(twelve()[:1], sheet(1, split=["calibration"]))


def test_results_of_different_weights_are_refused_by_name():
    provenances = {name: {"model": {"weights": "abc", "seed": 0}, "tally": {"code": "1"}} for name in ("a", "b", "c")}
    provenances["b"] = {"model": {"weights": "def", "seed": 0}, "tally": {"code": "1"}}
    with pytest.raises(Problems, match=r"model weights: abc in a, c; def in b"):
        check_agreement(provenances)


@pytest.mark.parametrize("stage", ["preprocess", "voxels"])
def test_results_of_different_code_at_any_stage_are_refused(stage):
    with pytest.raises(Problems, match=f"{stage} code: 1 in a; 2 in b"):
        check_agreement({"a": {stage: {"code": "1"}}, "b": {stage: {"code": "2"}}})


def test_all_disagreements_are_named_at_once():
    provenances = {"a": {"model": {"weights": "1"}, "tally": {}}, "b": {"model": {}, "tally": {"code": "2"}}}
    with pytest.raises(Problems) as caught:
        check_agreement(provenances)
    assert len(caught.value.problems) == 2


def test_results_made_alike_are_accepted():
    check_agreement({name: {"model": {"weights": "abc"}, "tally": {"code": "1"}} for name in ("a", "b")})


# --- groups


@cache
def tables_of_sites():
    """Return tables of 24 patients of two sites: 12 of x, whose predictions get worse, and 12 good ones of y."""
    good = [tally_of(100 + k, radius=4.5, shift=0.2, spread=0.1 + 0.01 * k) for k in range(12)]
    return frames(evaluate([*twelve(), *good], sheet(24, site=["x"] * 12 + ["y"] * 12), groups="auto"))


def of_group(table, value):
    return table[table["group_value"] == value] if value else table[table["group"].isna()]


ROW_KEYS = ["passes", "region", "mask", "measure", "aggregation", "metric", "n_bins", "pooling"]


def test_every_value_of_a_column_has_the_rows_of_the_whole_cohort():
    rows = tables_of_sites()["metrics"]
    whole, x, y = (of_group(rows, value)[ROW_KEYS].reset_index(drop=True) for value in (None, "x", "y"))
    pd.testing.assert_frame_equal(x, whole)
    pd.testing.assert_frame_equal(y, whole)
    assert set(rows["group"].dropna()) == {"site"}


def test_a_group_has_the_values_of_its_patients_alone():
    found = of_group(tables_of_sites()["metrics"], "x").set_index(ROW_KEYS)["value"]
    alone = tables_of_twelve()["metrics"].set_index(ROW_KEYS)["value"]
    # cut-offs are those of the whole cohort, and so is the threshold of uncertainty
    own = ~alone.index.get_level_values("metric").isin(
        ["q4_minus_q1", "cliffs_delta", "mann_whitney_u", "ue_dice", "ue_dice_threshold"]
    )
    pd.testing.assert_series_equal(found[own], alone[own])


def test_cut_offs_of_a_group_are_those_of_the_cohort():
    tables = tables_of_sites()
    primary = {"measure": "entropy", "aggregation": "predicted_5mm_mean", "region": "WT", "scheme": "halves"}
    strata = tables["strata"]
    for column, value in primary.items():
        strata = strata[strata[column] == value]
    counts = {site: of_group(strata, site).set_index("stratum")["n_cases"] for site in (None, "x", "y")}
    assert (counts["x"] + counts["y"] == counts[None]).all()
    assert counts["x"]["H2"] > counts["x"]["H1"]  # the worse site is the more uncertain one


def test_no_group_has_a_p_value():
    rows = tables_of_sites()["metrics"]
    assert rows.loc[rows["group"].notna(), "p_value"].isna().all()
    tested = rows[rows["p_value"].notna()]
    assert set(tested["metric"]) == {"q4_minus_q1"}
    assert set(tested["aggregation"]) == {"predicted_5mm_mean"}
    assert set(tested["measure"]) == {"entropy"}


def test_a_group_of_nine_has_values_and_no_intervals():
    tables = frames(evaluate(twelve(), sheet(12, site=["x"] * 9 + ["y"] * 3), groups=["site"]))
    rows = of_group(tables["metrics"], "x")
    assert rows["ci_low"].isna().all()
    assert rows.loc[rows["metric"] == "dice", "value"].notna().all()
    assert (rows.loc[rows["metric"] == "dice", "interval"] == "none: fewer than 10 cases in the group").all()
    assert of_group(tables["strata"], "x")["ci_low"].isna().all()


def test_patients_without_a_value_are_in_no_group():
    tables = frames(evaluate(twelve(), sheet(12, site=["x"] * 6 + ["y"] * 4 + [""] * 2), groups="auto"))
    rows = tables["metrics"]
    assert set(rows["group_value"].dropna()) == {"x", "y"}


def test_a_column_with_many_values_makes_no_groups():
    tallies = [*twelve(), tally_of(0)]
    ages = sheet(13, age=[str(40 + k) for k in range(13)])
    rows = frames(evaluate(tallies, ages, groups="auto", n_resamples=100))["metrics"]
    assert rows["group"].isna().all()


def test_groups_by_a_column_that_is_not_there_are_refused():
    with pytest.raises(SegtrustError, match=r"groups by scanner.*further columns are site"):
        evaluate(twelve(), sheet(12, site=["x"] * 12), groups=["scanner"])


# --- uncertainty-error Dice, pooled Spearman


def test_every_measure_has_its_uncertainty_error_dice_and_threshold():
    rows = tables_of_twelve()["metrics"]
    for pooling in ("patient_mean", "pooled"):
        held = rows[(rows["metric"] == "ue_dice") & (rows["pooling"] == pooling)]
        assert set(held["region"]) == {"WT", "TC", "ET", "ALL"}
        assert set(held["mask"]) == set(MASKS)
        assert held.loc[held["value"].notna(), "interval"].str.endswith("in_sample threshold").all()
    threshold = row_of(tables_of_twelve(), "ue_dice_threshold", mask="brain", measure="entropy", pooling="pooled")
    assert 0 < threshold["value"] < 1


def test_the_threshold_of_distance_is_in_millimetres():
    row = row_of(tables_of_twelve(), "ue_dice_threshold", mask="brain", measure="boundary_proximity", pooling="pooled")
    assert -10 < row["value"] <= 0


def test_a_calibration_split_sets_the_threshold_and_it_is_not_flagged():
    tables = frames(evaluate(twelve(), sheet(12, split=["test"] * 8 + ["calibration"] * 4)))
    for pooling in ("patient_mean", "pooled"):
        row = row_of(tables, "ue_dice", mask="brain", measure="entropy", pooling=pooling)
        assert "in_sample" not in row["interval"]
        assert row["ci_low"] <= row["value"] <= row["ci_high"]


def test_spearman_with_the_loss_is_pooled_too():
    row = row_of(tables_of_twelve(), "spearman_with_loss", mask="brain", measure="entropy", pooling="pooled")
    expected = metrics.spearman_with_loss(pooled(twelve()).joint("WT", "brain", "entropy"))
    assert row["value"] == pytest.approx(float(expected), rel=1e-9)
    assert row["ci_low"] < row["value"] < row["ci_high"]


def test_logistic_recalibration_is_averaged_over_patients_too():
    row = row_of(tables_of_twelve(), "calibration_slope", mask="brain", measure="probability", pooling="patient_mean")
    parts = [tally.probabilities("WT", "brain", "probability") for tally in twelve()]
    slopes = [metrics.logistic_recalibration(part["n"], part["sum_logit"])[1] for part in parts]
    assert row["value"] == pytest.approx(np.mean(slopes), rel=1e-9)


# --- all of it

SCORED = ("auroc", "aupr", "error_rate", "mean_uncertainty", "pearson_with_loss", "ue_dice")
ERRORS = [
    f"{name}_{kind}" for name in ("ece", "ace", "mce", "ece_equal_mass") for kind in ("class_probability", "top_label")
]
PROPER = ("brier", "brier_skill", "nll", "calibration_slope", "calibration_intercept")


def named_by_the_definitions():
    """Yield (region, mask, measure, metric, n_bins, pooling) of every row that the definitions ask for."""
    both = ("pooled", "patient_mean")
    measures = (*MEASURES, "deterministic_entropy_own")
    for region in ("WT", "TC", "ET", "ALL"):
        for mask in MASKS:
            for measure in measures if region != "ALL" else ["entropy_4class"]:
                for metric in SCORED:
                    yield from ((region, mask, measure, metric, None, pooling) for pooling in both)
                if mask in ("brain", "predicted_5mm"):
                    yield from ((region, mask, measure, "spearman_with_loss", None, pooling) for pooling in both)
            for kind in ("probability", "probability_deterministic"):
                for metric in ("gap", "accuracy", "mean_confidence", *(PROPER if region != "ALL" else ())):
                    yield from ((region, mask, kind, metric, None, pooling) for pooling in both)
                for metric in ERRORS:
                    if region == "ALL" and kind != "probability" and metric.endswith("class_probability"):
                        continue  # the four-class view has class probabilities of the mean alone
                    yield from (
                        (region, mask, kind, metric, bins, pooling) for bins in (10, 15, 20) for pooling in both
                    )
    for region in ("WT", "TC", "ET"):
        for band in BANDS:
            for metric in ("auroc", "aupr", "error_rate", "mean_uncertainty"):
                yield from ((region, band, "entropy", metric, None, pooling) for pooling in both)
        for metric in ("qu_brats", "auc_dsc", "auc_ftp", "auc_ftn", "qu_brats_zero", "qu_brats_oracle"):
            yield region, "volume", "entropy", metric, None, "patient_mean"
        for metric in ("buc", "ba_ece"):
            yield region, None, "entropy", metric, None, "patient_mean"
        for measure in MEASURES:
            for metric in ("retention_area", "retention_area_normalised"):
                yield region, "brain", measure, metric, None, "patient_mean"
        for metric in (
            *("dice", "dice_deterministic", "delta_dice", "absolute_delta_dice", "sensitivity", "precision", "hd95"),
            *("hd95_brats", "nsd_1mm", "dice_lesionwise", "volume_ml", "volume_error_ml", "pairwise_dice"),
        ):
            yield region, None, None, metric, None, "patient_mean"
        for metric in ("dice", "sensitivity", "precision"):
            yield region, None, None, metric, None, "pooled"
        for metric in ("median_dice", "n_both_empty", "volume_coverage"):
            yield region, None, None, metric, None, "patient_level"


def test_the_table_has_every_row_that_the_definitions_ask_for():
    tables = frames(evaluate(twelve(), sheet(12), n_bins=[10, 15, 20]))
    rows = tables["metrics"]
    rows = rows[rows["aggregation"].isna()]
    columns = ["region", "mask", "measure", "metric", "n_bins", "pooling"]
    held = {tuple(None if pd.isna(value) else value for value in row) for row in rows[columns].itertuples(index=False)}
    assert not set(named_by_the_definitions()) - held


def test_every_value_has_an_interval_or_says_why_not():
    rows = tables_of_twelve()["metrics"]
    without = rows[rows["value"].notna() & rows["ci_low"].isna()]
    assert without["interval"].str.startswith("none: ").all()
    reasons = set(without["interval"].str.removeprefix("none: ").str.split(";").str[0])
    assert {"a bound", "a count", "a threshold", "see cliffs_delta"} <= reasons


def test_distributions_of_entropy_are_histograms_of_wrong_and_correct_voxels():
    # 4 passes: means of probabilities, and many voxels at exactly the same entropy
    patients = [voxels_of(k, shift=0.3 + 0.2 * k, noise=0.1 * k) for k in range(3)]
    curves = frames(evaluate([Tally.of(found) for found in patients], sheet(3)))["curves"]
    voxels_found = pd.concat([found.to_pandas() for found in patients])
    inside = voxels_found[voxels_found["in_brain"]]
    for region, codes in (("WT", (1, 2, 3)), ("TC", (1, 3)), ("ET", (3,))):
        probability = inside[f"probability_{region}"].to_numpy(np.float64)
        wrong = (probability >= 0.5) != inside["reference"].isin(codes).to_numpy()
        for outcome, chosen in (("wrong", wrong), ("correct", ~wrong)):
            expected, _ = np.histogram(binary_entropy(probability[chosen]), bins=np.arange(41) / 40)
            keys = (curves["region"] == region) & (curves["mask"] == "brain") & (curves["measure"] == "entropy")
            found = curves[keys & (curves["curve"] == f"distribution_{outcome}")].sort_values("point")
            assert found["n"].tolist() == expected.tolist()
            assert expected.sum() > 50
            assert found["y"].to_numpy() == pytest.approx(expected / expected.sum(), abs=1e-15)
            assert found["x"].to_numpy() == pytest.approx((np.arange(40) + 0.5) / 40, abs=1e-15)
