"""A study is checked as a whole before anything runs."""

import json

import pytest
from conftest import write_patient, write_sheet

from segtrust.errors import Problems
from segtrust.jobs import input_state
from segtrust.study import read_study

TRAINED = {"network": {"name": "UNet-Res"}, "train": {}}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(folder, splits, **columns):
    rows = []
    for number, split in enumerate(splits):
        paths = write_patient(folder / "data", f"p{number}", number)
        extra = {name: values[number] for name, values in columns.items()}
        rows.append({"patient": f"p{number}", **paths, "split": split, **extra})
    write_sheet(folder / "patients.tsv", rows)


def problems(config):
    with pytest.raises(Problems) as caught:
        read_study(config, check_headers=True)
    return caught.value.problems


def test_train_and_validation_patients_are_never_sampled(folder):
    write(folder, ["train", "validation", "calibration", "test"])
    assert read_study({"models": {"m": TRAINED}}, True).sampled == ["p2", "p3"]


def test_training_without_patients_to_train_on_is_refused(folder):
    write(folder, ["test"])
    assert "models.m: to be trained here" in problems({"models": {"m": TRAINED}})[0]


def test_a_training_patient_needs_a_reference(folder):
    write(folder, ["train", "train", "test"], seg=["", "", ""])
    found = problems({"models": {"m": TRAINED}})
    assert [message[:15] for message in found] == ["p0: split train", "p1: split train"]


def test_sessions_of_one_person_must_share_a_split(folder):
    write(folder, ["train", "test", "test"], subject=["a", "a", "b"])
    assert "subject a: sessions of one person must share a split" in problems({"models": {"m": TRAINED}})[0]


def test_problems_of_files_models_and_splits_come_together(folder):
    write(folder, ["train", "test"], subject=["a", "a"])
    (folder / "data/p0/p0_t1.nii.gz").unlink()
    models = {"m": {"network": {"name": "UNet"}, "checkpoint": "gone.pt"}}
    found = "\n".join(problems({"models": models}))
    assert "p0, t1: no such file" in found
    assert "gone.pt" in found
    assert "subject a" in found


def test_excluded_patients_are_left_out_with_their_reason(folder):
    write(folder, ["train", "test", "test"])
    (folder / "data/p1/p1_t1.nii.gz").unlink()
    study = read_study({"models": {"m": TRAINED}, "on_bad_patient": "exclude"}, True)
    assert study.sampled == ["p2"]
    assert "p1_t1.nii.gz" in study.not_evaluated["p1"]


def test_a_failed_patient_is_left_out_until_its_files_change(folder):
    write(folder, ["train", "test", "test"])
    scan = folder / "data/p1/p1_t1.nii.gz"
    record = {"stage": "preprocess", "patient": "p1", "model": None, "reason": "bad", "inputs": [input_state(scan)]}
    (folder / "results/failed/preprocess").mkdir(parents=True)
    (folder / "results/failed/preprocess/p1.json").write_text(json.dumps(record))
    config = {"models": {"m": TRAINED}, "on_bad_patient": "exclude"}
    assert read_study(config, True).left_out == {"p1": "preprocess: bad"}
    scan.write_bytes(scan.read_bytes() + b"\0")
    assert read_study(config, True).left_out == {}


def test_patients_without_reference_are_sampled_and_not_evaluated(folder):
    write(folder, ["train", "test", "test"], seg=["data/p0/p0_seg.nii.gz", "", "data/p2/p2_seg.nii.gz"])
    study = read_study({"models": {"m": TRAINED}}, True)
    assert study.sampled == ["p1", "p2"]
    assert study.evaluated == ["p2"]
    assert "no reference" in study.not_evaluated["p1"]


def test_a_job_does_not_look_for_the_predictions_of_all_patients_again(folder):
    write(folder, ["test", "test"])
    for number in range(3):
        (folder / f"p0_{number}.nii.gz").touch()
    config = {"models": {"m": {"predictions": "{patient}_{pass}.nii.gz"}}}
    assert "p1: no file matches" in problems(config)[0]
    assert read_study(config, check_headers=False).passes == {"m": 3}


@pytest.mark.parametrize("change", ["coding", "file", "model"])
def test_a_failed_patient_comes_back_when_the_study_asks_for_something_else(folder, change):
    write(folder, ["train", "test", "test"])
    paths = [f"data/p1/p1_{name}.nii.gz" for name in ("t1", "seg")]
    record = {"stage": "voxels", "patient": "p1", "model": "m", "coding": "brats2021", "reason": "bad"}
    record["inputs"] = [input_state(path) for path in paths]
    (folder / "results/failed/voxels/m").mkdir(parents=True)
    (folder / "results/failed/voxels/m/p1.json").write_text(json.dumps(record))
    config = {"models": {"m": TRAINED}, "on_bad_patient": "exclude"}
    sheet = (folder / "patients.tsv").read_text().replace(str(folder) + "/", "")
    (folder / "patients.tsv").write_text(sheet)
    assert read_study(config, True).left_out == {"p1": "voxels: bad"}
    if change == "coding":
        head, *lines = sheet.splitlines()
        lines = [f"{line}\t{'brats2023' if line.startswith('p1') else ''}" for line in lines]
        (folder / "patients.tsv").write_text("\n".join([f"{head}\tcoding", *lines]) + "\n")
    elif change == "file":
        (folder / "mended.nii.gz").write_bytes((folder / paths[1]).read_bytes())
        (folder / "patients.tsv").write_text(sheet.replace(paths[1], "mended.nii.gz"))
    else:
        config["models"] = {"other": TRAINED}
    assert read_study(config, True).left_out == {}


def test_predictions_that_grew_are_gathered_into_one_file(folder):
    write(folder, ["test"])
    (folder / "results/m/samples/p0").mkdir(parents=True)
    (folder / "results/m/samples/p0/predictions_0-1.safetensors").touch()
    for number in range(3):
        (folder / f"p0_{number}.nii.gz").touch()
    study = read_study({"models": {"m": {"predictions": "{patient}_{pass}.nii.gz"}}}, True)
    assert study.chunks("m", "p0") == ["results/m/samples/p0/predictions_0-2.safetensors"]
