"""The whole chain, run by Snakemake as a user would, on small patients."""

import json
import re

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from conftest import SHAPE, draw_scan, save
from sklearn.metrics import average_precision_score, brier_score_loss, log_loss, roc_auc_score
from small_studies import GIVEN, N_PASSES, ONCE, TRAINED, changed, draw_study, planned, predicted, snakemake

from segtrust.measures import binary_entropy
from segtrust.patients import RESERVED_COLUMNS
from segtrust.regions import REGIONS, canonical_labels, region_masks

pytestmark = pytest.mark.slow

N_TEST = 6


def write_study(folder, models, n_test=N_TEST):
    """Write a study whose last patient has no reference."""
    splits = ["train", "train", "validation"] + ["test"] * n_test
    draw_study(folder, models, splits, without_reference=[len(splits) - 1] if n_test else [])


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A finished study in a folder whose name has a space: a trained model, given passes, and a single prediction."""
    folder = tmp_path_factory.mktemp("a study")
    write_study(folder, {"trained": TRAINED, "given": GIVEN, "once": ONCE})
    snakemake(folder)
    return folder


def metrics(study, model, **keys):
    table = pd.read_parquet(study / f"results/{model}/cohort/metrics.parquet")
    for key, value in keys.items():
        table = table[table[key].isna()] if value is None else table[table[key] == value]
    return table


def voxels_of(study, model):
    """Return (probability (3, n), truth (3, n), brain (n,)) over all evaluated patients, from maps and references."""
    parts = []
    for number in range(3, 3 + N_TEST - 1):
        _, codes = draw_scan(number)
        image = nib.load(study / f"results/{model}/maps/p{number}_probability.nii.gz")
        probability = np.moveaxis(np.asarray(image.dataobj), -1, 0).reshape(3, -1)
        truth = region_masks(canonical_labels(codes, "brats2021", "p", "f")).reshape(3, -1)
        brain = (draw_scan(number)[0] != 0).any(axis=0).ravel()
        parts.append((probability.astype(np.float64), truth, brain))
    return [np.concatenate(arrays, axis=-1) for arrays in zip(*parts, strict=True)]


CONTRACT = {
    "preprocessed": ["p0.safetensors", "p8.safetensors"],
    "trained/train": ["checkpoint.pt", "checkpoint.sha256", "curve.parquet"],
    "trained/samples": ["p3/member0_0-2.safetensors"],
    "given/samples": ["p3/predictions_0-2.safetensors"],
    "trained/maps": ["p3_probability.nii.gz", "p3_segmentation.nii.gz", "p3_entropy.nii.gz", "p8_entropy.nii.gz"],
    "given/voxels": ["p3.parquet"],
    "given/tally": ["p3.parquet"],
    "trained/cohort": [
        *("metrics.parquet", "metrics.csv", "patients.parquet", "patients.csv", "strata.parquet", "strata.csv"),
        *("curves.parquet", "alarms.json"),
    ],
    "comparison": ["metrics.parquet", "metrics.csv"],
    "given/scores": ["p8.json"],
    "report": ["index.html"],
    "report/triage": ["trained.html", "given.html", "once.html"],
    "report/patients/given": ["order.js", "p3.html", "p8.html"],
}


def test_every_file_of_the_contract_is_there(study):
    missing = [f"{place}/{name}" for place, names in CONTRACT.items() for name in names
               if not (study / "results" / place / name).is_file()]  # fmt: skip
    assert not missing


def test_a_second_run_has_nothing_to_do(study):
    assert planned(study) == {}


def test_no_partial_file_is_left(study):
    assert not list(study.rglob("*.partial-*")) + list(study.rglob(".partial-*"))


@pytest.mark.parametrize("model", ["trained", "given", "once"])
@pytest.mark.parametrize("region", REGIONS)
def test_pooled_metrics_are_those_of_scikit_learn_on_the_maps(study, model, region):
    probability, truth, brain = voxels_of(study, model)
    index = REGIONS.index(region)
    p, y = probability[index][brain], truth[index][brain]
    error = (p >= 0.5) != y
    rows = metrics(study, model, region=region, mask="brain", pooling="pooled").set_index(["measure", "metric"])[
        "value"
    ]
    entropy = binary_entropy(p)
    assert rows["entropy", "error_rate"] == pytest.approx(error.mean(), rel=1e-9)
    assert rows["entropy", "auroc"] == pytest.approx(roc_auc_score(error, entropy), abs=1e-4)
    assert rows["entropy", "aupr"] == pytest.approx(average_precision_score(error, entropy), abs=1e-3, rel=1e-2)
    assert rows["entropy", "mean_uncertainty"] == pytest.approx(entropy.mean(), rel=1e-9)
    assert rows["probability", "brier"] == pytest.approx(brier_score_loss(y, p), rel=1e-9)
    assert rows["probability", "nll"] == pytest.approx(log_loss(y, p.clip(1e-7, 1 - 1e-7)), rel=1e-9)


@pytest.mark.parametrize("region", REGIONS)
def test_calibration_errors_are_those_of_a_direct_computation_on_the_maps(study, region):
    probability, truth, brain = voxels_of(study, "given")
    index = REGIONS.index(region)
    p, y = probability[index][brain], truth[index][brain]
    confidence, correct = np.maximum(p, 1 - p), (p >= 0.5) == y
    for name, score, outcome in (("class_probability", p, y), ("top_label", confidence, correct)):
        bins = np.clip(np.searchsorted(np.arange(16) / 15, score, side="right") - 1, 0, 14)
        gaps = [abs(score[bins == b].sum() - outcome[bins == b].sum()) for b in np.unique(bins)]
        keys = {"region": region, "mask": "brain", "pooling": "pooled", "measure": "probability", "n_bins": 15}
        row = metrics(study, "given", metric=f"ece_{name}", **keys)
        assert row["value"].item() == pytest.approx(sum(gaps) / len(p), rel=1e-9)


def test_dice_of_the_patients_table_is_that_of_the_maps(study):
    table = pd.read_parquet(study / "results/given/cohort/patients.parquet").set_index(["patient", "region"])
    for number in range(3, 3 + N_TEST - 1):
        _, codes = draw_scan(number)
        truth = region_masks(canonical_labels(codes, "brats2021", "p", "f"))
        mean = np.mean([predicted(number, index) for index in range(N_PASSES)], axis=0)
        for index, region in enumerate(REGIONS):
            both = ((mean[index] >= 0.5) & truth[index]).sum()
            dice = 2 * both / ((mean[index] >= 0.5).sum() + truth[index].sum())
            assert table.loc[(f"p{number}", region), "dice"] == pytest.approx(dice, rel=1e-9)


def test_a_patient_without_reference_has_maps_and_is_named_in_the_report(study):
    assert (study / "results/given/maps/p8_segmentation.nii.gz").is_file()
    assert "p8" not in set(pd.read_parquet(study / "results/given/cohort/patients.parquet")["patient"])
    assert "p8" in (study / "results/report/index.html").read_text()


def test_a_sheets_column_is_carried_and_shown_as_text(study):
    assert set(pd.read_parquet(study / "results/given/cohort/patients.parquet")["site"]) == {"A <b>"}


def test_columns_of_the_patients_table_are_those_a_sheet_may_not_have(study):
    columns = list(pd.read_parquet(study / "results/given/cohort/patients.parquet").columns)
    own = {name for name in columns if not name.startswith("score_")}
    assert own - RESERVED_COLUMNS == {"patient", "subject", "split", "coding", "site"}
    assert own >= RESERVED_COLUMNS


def test_spread_over_a_single_prediction_is_null_and_never_zero(study):
    rows = metrics(study, "once", measure="mutual_information", metric="auroc")
    assert len(rows)
    assert rows["value"].isna().all()


def test_tables_say_where_their_numbers_come_from(study):
    from segtrust.files import read_parquet

    for name in ("metrics", "patients", "strata", "curves"):
        provenance = read_parquet(study / f"results/trained/cohort/{name}.parquet")[1]
        assert re.fullmatch("[0-9a-f]{64}", provenance["model"]["weights"])
        assert provenance["model"]["settings"]["network"] == TRAINED["network"]
        assert {"preprocess", "voxels", "tally", "cohort", "versions"} <= set(provenance)


def test_a_comparison_is_the_difference_between_two_cohorts(study):
    table = pd.read_parquet(study / "results/comparison/metrics.parquet")
    pairs = set(zip(table["model"], table["reference_model"], strict=True))
    # the configuration is written in the order of the alphabet
    assert pairs == {("given", "once"), ("given", "trained"), ("once", "trained")}
    place = ["region", "mask", "measure", "metric", "n_bins"]
    rows = table.query("model == 'given' and reference_model == 'trained' and pooling == 'pooled'")
    for name in ("given", "trained"):
        cohort = metrics(study, name, pooling="pooled", passes=N_PASSES)[[*place, "value"]]
        rows = rows.merge(cohort, on=place, suffixes=("", f"_{name}"), validate="1:1")
    assert len(rows) > 1000
    np.testing.assert_allclose(rows["value"], rows["value_given"] - rows["value_trained"], rtol=1e-9, atol=1e-12)


def test_a_comparison_says_where_its_numbers_come_from(study):
    from segtrust.files import read_parquet

    provenance = read_parquet(study / "results/comparison/metrics.parquet")[1]
    assert set(provenance["models"]) == {"trained", "given", "once"}
    assert provenance["models"]["trained"]["model"]["settings"]["network"] == TRAINED["network"]
    assert provenance["comparison"]["n_resamples"] == 100


def test_two_models_are_compared_and_one_alone_is_not(tmp_path):
    write_study(tmp_path, {"given": GIVEN}, n_test=2)
    assert "comparison" not in planned(tmp_path)
    assert planned(tmp_path, *changed(tmp_path, models={"once": ONCE}))["comparison"] == 1


def test_a_maps_sidecar_names_the_weights(study):
    sidecar = json.loads((study / "results/trained/maps/p3_entropy.json").read_text())
    digest = (study / "results/trained/train/checkpoint.sha256").read_text().split()[0]
    assert sidecar["model"]["weights"] == digest


def test_a_touched_checkpoint_costs_nothing(study):
    (study / "results/trained/train/checkpoint.pt").touch()
    assert planned(study) == {}


def test_more_passes_draw_only_the_new_ones(study):
    jobs = planned(study, *changed(study, sample={"passes": 5}))
    assert jobs["sample"] == N_TEST
    assert not {"preprocess", "train", "gather"} & set(jobs)


def test_another_number_of_resamples_redoes_the_cohort_and_what_follows(study):
    jobs = planned(study, *changed(study, cohort={"resamples": 101}))
    assert set(jobs) == {"cohort", "comparison", "triage", "report", "all"}


def test_report_settings_redo_the_report_only(study):
    assert set(planned(study, *changed(study, report={"title": "other"}))) == {"report", "all"}


def test_a_replaced_scan_redoes_that_patient_and_the_cohort(tmp_path):
    write_study(tmp_path, {"given": GIVEN}, n_test=2)
    snakemake(tmp_path)
    scan, _ = draw_scan(3)
    save(tmp_path / "data/p3/p3_t2.nii.gz", scan[2] + np.int16(1) * (scan[2] != 0))
    jobs = planned(tmp_path)
    assert jobs["preprocess"] == jobs["gather"] == jobs["maps"] == 1
    assert "cohort" in jobs or jobs["report"] == 1


def test_problems_of_all_patients_stop_everything_before_a_job_runs(tmp_path):
    write_study(tmp_path, {"given": GIVEN})
    (tmp_path / "data/p0/p0_t1.nii.gz").unlink()
    save(tmp_path / "data/p4/p4_flair.nii.gz", np.ones((20, 22, 17), np.int16))
    (tmp_path / "given/p5_1.nii.gz").unlink()
    output = snakemake(tmp_path, expect=1)
    assert "p0, t1: no such file" in output
    assert "p4: the files lie on different grids" in output
    assert "p5: passes 1 are missing" in output
    assert not (tmp_path / "results").exists()


def test_a_damaged_patient_fails_alone_and_is_named(tmp_path):
    write_study(tmp_path, {"given": GIVEN}, n_test=3)
    path = tmp_path / "data/p4/p4_t2.nii.gz"
    path.write_bytes(path.read_bytes()[:2000])
    output = snakemake(tmp_path, expect=1)
    assert re.search(r"segtrust preprocess: p4: the file ends early or is damaged.*p4_t2\.nii\.gz", output)
    assert "1 patient(s) could not be used" in output
    assert "on_bad_patient: exclude" in output
    record = json.loads((tmp_path / "results/failed/preprocess/p4.json").read_text())
    assert "p4_t2.nii.gz" in record["reason"]
    assert (tmp_path / "results/given/tally/p3.parquet").is_file()
    exclude = changed(tmp_path, on_bad_patient="exclude")
    assert set(planned(tmp_path, *exclude)) == {"cohort", "triage", "report", "all"}
    snakemake(tmp_path, *exclude)
    assert "p4_t2.nii.gz" in (tmp_path / "results/report/index.html").read_text()


def test_all_bad_patients_of_a_training_are_named_and_can_be_left_out(tmp_path):
    draw_study(tmp_path, {"trained": TRAINED}, ["train", "train", "train", "validation", "test"])
    for patient in ("p0", "p3"):
        save(tmp_path / f"data/{patient}/{patient}_seg.nii.gz", np.full(SHAPE, 7, np.uint8))
    output = snakemake(tmp_path, expect=1)
    assert "p0: seg has code 7" in output
    assert "p3: seg has code 7" in output
    assert "2 patient(s) could not be used" in output
    exclude = changed(tmp_path, on_bad_patient="exclude")
    assert planned(tmp_path, *exclude)["train"] == 1
    listed = snakemake(tmp_path, "-n", *exclude)
    assert "p1_seg" in listed
    assert "p0_seg" not in listed
    assert "p3_seg" not in listed


def test_a_study_without_any_reference_gives_maps_and_a_report_that_says_so(tmp_path):
    write_study(tmp_path, {"given": GIVEN}, n_test=1)
    snakemake(tmp_path)
    assert (tmp_path / "results/given/maps/p3_entropy.nii.gz").is_file()
    assert not (tmp_path / "results/given/cohort").exists()
    assert "no reference" in (tmp_path / "results/report/index.html").read_text().lower()


def test_a_sheet_with_nobody_to_evaluate_is_refused(tmp_path):
    write_study(tmp_path, {"given": GIVEN}, n_test=0)
    assert "no patient of split test" in snakemake(tmp_path, "-n", expect=1)
