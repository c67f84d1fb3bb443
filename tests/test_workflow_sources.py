"""Every source of uncertainty through the whole chain: ensemble, flips, injected dropout, nnU-Net, label maps."""

import json
import os
import pickle
from contextlib import contextmanager

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import yaml
from conftest import LPS, draw_scan, save, write_patient, write_sheet
from test_workflow import N_PASSES, changed, planned, predicted, snakemake

from segtrust.moments import read_and_merge
from segtrust.regions import codes_of, overlay

pytestmark = pytest.mark.slow

NETWORK = {"name": "UNet-Res", "channels": [4, 8], "strides": [2]}
TRAIN = {"iterations": 2, "batch": 1, "patch": [8, 8, 8], "validate_every": 2}
COMMON = {"network": NETWORK, "outputs": {"softmax": ["background", "NCR", "ED", "ET"]}}
MODELS = {
    "first": {**COMMON, "train": TRAIN},
    "mixed": {**COMMON, "train": {**TRAIN, "seed": 7},
              "stochastic": {"ensemble": [{"model": "first"}], "flips": [1], "passes": 6}},
    "injected": {**COMMON, "checkpoint": {"model": "first"},
                 "stochastic": {"dropout": False, "inject": {"after": ["model.0"], "rate": "auto"}}},
    "nnunet": {"predictions": "nnunet/fold_{pass}/{patient}.npz", "outputs": ["WT", "TC", "ET"]},
    "raters": {"predictions": "raters/{patient}_{pass}.nii.gz", "outputs": {"labels": "brats2021"}},
}  # fmt: skip
N_TEST = 2


def write_elsewhere(folder, name, seed):
    """Write the predictions of a patient as nnU-Net's folds and as label maps."""
    origin = (LPS[:3, 3] * [-1, -1, 1]).tolist()
    stuff = {"spacing": (1.0, 1.0, 1.0), "origin": tuple(origin), "direction": (1.0, 0, 0, 0, 1.0, 0, 0, 0, 1.0)}
    for index in range(N_PASSES):
        probability = predicted(seed, index)
        fold = folder / "nnunet" / f"fold_{index}"
        fold.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(fold / f"{name}.npz", probabilities=probability.transpose(0, 3, 2, 1))
        (fold / f"{name}.pkl").write_bytes(pickle.dumps({"sitk_stuff": stuff}))
        save(folder / "raters" / f"{name}_{index}.nii.gz", codes_of(overlay(probability >= 0.5), "brats2021"))


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources")
    rows = []
    for number, split in enumerate(["train", "validation", "calibration"] + ["test"] * N_TEST):
        name = f"p{number}"
        rows.append({"patient": name, **write_patient(folder / "data", name, number), "split": split})
        if split in ("calibration", "test"):
            write_elsewhere(folder, name, number)
    write_sheet(folder / "patients.tsv", rows)
    config = {"models": MODELS, "sample": {"passes": 6, "device": "cpu"}, "cohort": {"resamples": 100}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    snakemake(folder)
    return folder


def metrics(study, model, **keys):
    table = pd.read_parquet(study / f"results/{model}/cohort/metrics.parquet")
    for key, value in keys.items():
        table = table[table[key] == value]
    return table


def test_a_second_run_has_nothing_to_do(study):
    assert planned(study) == {}


def test_every_checkpoint_and_flip_has_a_file_of_its_own(study):
    names = sorted(path.name for path in (study / "results/mixed/samples/p3").iterdir())
    sources = ["member0", "member0-flip1", "member1", "member1-flip1"]
    assert names == sorted(f"{source}_0-5.safetensors" for source in sources)


def test_the_tables_count_the_passes_of_all_sources(study):
    assert metrics(study, "mixed")["passes"].max() == 24
    assert metrics(study, "injected")["passes"].max() == 6
    assert metrics(study, "nnunet")["passes"].max() == N_PASSES


def test_members_are_computed_with_their_own_weights(study):
    paths = sorted((study / "results/mixed/samples/p3").iterdir())
    _, provenance = read_and_merge(paths)
    digests = {name: (study / f"results/{name}/train/checkpoint.sha256").read_text().split()[0]
               for name in ("first", "mixed")}  # fmt: skip
    assert provenance["model"]["weights"] == {"member0": digests["mixed"], "member1": digests["first"]}
    assert digests["mixed"] != digests["first"]


def test_entropy_is_the_sum_of_its_parts(study):
    rows = metrics(study, "mixed", metric="mean_uncertainty", mask="brain", pooling="pooled", passes=24, region="WT")
    value = rows.set_index("measure")["value"]
    parts = ("expected_entropy", "mutual_information_within_members", "mutual_information_between_members")
    # columns are stored as float16: half a part in 1,024 each
    assert value["entropy"] == pytest.approx(sum(value[part] for part in parts), rel=2e-3)
    assert (value[list(parts)] > 0).all()


def test_models_of_one_member_have_no_such_parts(study):
    assert not metrics(study, "first")["measure"].astype(str).str.contains("members").any()


def test_convergence_has_rows_after_five_passes_of_each_source(study):
    assert set(metrics(study, "first")["passes"]) == {5, 6}
    assert set(metrics(study, "mixed")["passes"]) == {20, 24}
    assert len(metrics(study, "first", passes=5, metric="auroc", measure="entropy"))
    assert len(metrics(study, "first", passes=5, metric="ece_top_label"))


def test_the_rate_is_chosen_on_the_calibration_split_and_recorded(study):
    fitted = json.loads((study / "results/injected/inject/rate.json").read_text())
    assert fitted["n_patients"] == 1
    assert fitted["rate"] in [point["rate"] for point in fitted["curve"]]
    _, provenance = read_and_merge([study / "results/injected/samples/p3/member0_0-5.safetensors"])
    assert provenance["model"]["rate"] == fitted["rate"]


def test_scaled_measures_are_the_measures_times_the_scale(study):
    fitted = json.loads((study / "results/injected/inject/rate.json").read_text())
    keys = {"metric": "mean_uncertainty", "mask": "brain", "pooling": "pooled", "passes": 6}
    checked = 0
    for region, scale in fitted["scale"].items():
        if scale is not None:
            value = metrics(study, "injected", region=region, **keys).set_index("measure")["value"]
            assert value["variance_scaled"] == pytest.approx(scale * value["variance"], rel=1e-9)
            checked += 1
    assert checked


def test_nnunet_and_label_maps_give_what_their_passes_say(study):
    table = {
        model: pd.read_parquet(study / f"results/{model}/cohort/patients.parquet") for model in ("nnunet", "raters")
    }
    for number in range(3, 3 + N_TEST):
        passes = np.stack([predicted(number, index) for index in range(N_PASSES)])
        _, codes = draw_scan(number)
        votes = {"nnunet": passes.mean(axis=0), "raters": (passes >= 0.5).mean(axis=0)}
        for model, mean in votes.items():
            truth = codes > 0
            both = ((mean[0] >= 0.5) & truth).sum()
            dice = 2 * both / ((mean[0] >= 0.5).sum() + truth.sum())
            row = table[model].query(f"patient == 'p{number}' and region == 'WT'")
            assert row["dice"].item() == pytest.approx(dice, rel=1e-9)


def test_the_report_says_where_passes_come_from(study):
    page = (study / "results/report/index.html").read_text()
    assert "24 passes: 2 checkpoints × 2 flips × 6 dropout passes" in page
    assert "6 injected dropout passes" in page


def test_another_flip_draws_only_the_new_sources(study):
    models = {**MODELS, "mixed": {**MODELS["mixed"], "stochastic": {**MODELS["mixed"]["stochastic"], "flips": [0, 1]}}}
    jobs = planned(study, *changed(study, models=models))
    # two more flips of each of two members
    assert jobs["sample"] == 2 * 2 * (N_TEST + 1)
    assert not {"train", "inject", "gather"} & set(jobs)


def test_a_given_rate_needs_no_choice_but_is_fitted_a_scale(study):
    inject = {**MODELS["injected"]["stochastic"]["inject"], "rate": 0.1}
    models = {**MODELS, "injected": {**MODELS["injected"], "stochastic": {"dropout": False, "inject": inject}}}
    jobs = planned(study, *changed(study, models=models))
    assert jobs["inject"] == 1
    assert jobs["sample"] == N_TEST + 1


def test_a_rate_cannot_be_chosen_without_a_calibration_split(study, tmp_path):
    sheet = (study / "patients.tsv").read_text().replace("\tcalibration", "\ttest")
    (study / "other.tsv").write_text(sheet)
    output = snakemake(study, "-n", *changed(study, patients="other.tsv"), expect=1)
    assert "models.injected: inject.rate auto is chosen on patients of split calibration" in output


def test_an_npz_without_its_properties_stops_before_anything_runs(study):
    hidden = study / "nnunet/fold_1/p4.pkl"
    content = hidden.read_bytes()
    hidden.unlink()
    try:
        assert "p4: an .npz is read with nnU-Net's properties file" in snakemake(study, "-n", expect=1)
    finally:
        hidden.write_bytes(content)


@contextmanager
def put_back(*paths):
    """Give files the content and dates they had; tests run in whatever order on one study."""
    held = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in paths}
    try:
        yield
    finally:
        for path, (content, date) in held.items():
            path.write_bytes(content)
            os.utime(path, ns=(date, date))


def test_passes_depend_on_the_rate_and_on_nothing_else_that_is_fitted(study):
    # a corrected reference in the calibration split: the rate is chosen anew, and comes out the same
    path = study / "data/p2/p2_seg.nii.gz"
    fitted = {name: study / f"results/injected/inject/{name}.json" for name in ("rate", "chosen")}
    with put_back(path, *fitted.values()):
        image = nib.load(path)
        codes = np.asanyarray(image.dataobj).copy()
        codes[5, 6, 4] = 0
        nib.save(nib.Nifti1Image(codes, image.affine), path)
        before = {name: file.read_text() for name, file in fitted.items()}
        snakemake(study, "results/injected/inject/rate.json")
        after = {name: file.read_text() for name, file in fitted.items()}
        assert after["rate"] != before["rate"]
        assert after["chosen"] == before["chosen"]
        assert "sample" not in planned(study)
    assert planned(study) == {}
