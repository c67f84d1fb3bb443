"""What a job leaves when it fails."""

import json
import os
from types import SimpleNamespace

import pytest
from conftest import write_patient

from segtrust.cases import Cases, checked
from segtrust.errors import PatientError, Problems
from segtrust.jobs import input_state, job
from segtrust.preprocess import preprocess, read_modalities, write_preprocessed


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder to work in, where the descriptors 1 and 2 that a job takes over come back."""
    monkeypatch.chdir(tmp_path)
    held = [os.dup(descriptor) for descriptor in (1, 2)]
    yield tmp_path
    for descriptor, saved in zip((1, 2), held, strict=True):
        os.dup2(saved, descriptor)
        os.close(saved)


def run(body, stage="voxels", files=(), coding="brats2021", **wildcards):
    """Run a body as a job does."""
    given = SimpleNamespace(
        log=["job.log"],
        threads=1,
        wildcards=SimpleNamespace(**wildcards),
        params=SimpleNamespace(coding=coding) if coding else SimpleNamespace(),
        input=list(files),
    )
    with job(given, stage):
        body()


def raise_of(message):
    def body():
        raise PatientError(message)

    return body


def records(folder):
    return sorted(str(path.relative_to(folder / "results/failed")) for path in (folder / "results").rglob("*.json"))


def test_two_models_that_fail_on_one_patient_leave_a_record_each(folder):
    for model in ("a", "b"):
        with pytest.raises(SystemExit):
            run(raise_of("p: bad"), model=model, patient="p")
    assert records(folder) == ["voxels/a/p.json", "voxels/b/p.json"]
    run(lambda: None, model="a", patient="p")
    assert records(folder) == ["voxels/b/p.json"]


def test_a_stage_that_knows_no_model_leaves_its_record_beside(folder):
    with pytest.raises(SystemExit):
        run(raise_of("p: bad"), stage="preprocess", patient="p")
    assert records(folder) == ["preprocess/p.json"]


def test_a_job_of_many_patients_leaves_a_record_of_every_bad_one(folder, tmp_path):
    rows = {}
    for number, patient in enumerate(["p", "q", "r"]):
        paths = write_patient(tmp_path / "data", patient, number)
        modalities = {name: path for name, path in paths.items() if name != "seg"}
        write_preprocessed(f"{patient}.safetensors", preprocess(*read_modalities(modalities, patient)), {})
        rows[patient] = (f"{patient}.safetensors", paths["seg"])
    # a code 4 is unknown in the coding of 2023
    codings = ["brats2023", "brats2021", "brats2023"]
    cases = Cases(*zip(*rows.values(), strict=True), list(rows), codings)
    with pytest.raises(Problems, match="2 problems") as caught:
        checked(cases)

    def body():
        raise caught.value

    with pytest.raises(SystemExit):
        run(body, stage="train", coding=None, model="m")
    assert records(folder) == ["train/m/p.json", "train/m/r.json"]
    record = json.loads((folder / "results/failed/train/m/r.json").read_text())
    assert record["inputs"] == [input_state(path) for path in rows["r"]]
    assert (record["patient"], record["coding"], record["model"]) == ("r", "brats2023", "m")
    assert record["reason"].startswith("r: ")
