"""Finding patients by the way their files are named."""

import json

import numpy as np
import pytest
from conftest import save

from segtrust.errors import Problems, SegtrustError
from segtrust.layouts import find_patients, sheet_path


def touch(*paths):
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def test_brats_2021_names_are_found(tmp_path):
    for name in ("BraTS2021_00001", "BraTS2021_00002"):
        touch(*(tmp_path / name / f"{name}_{ending}.nii.gz" for ending in ("t1", "t1ce", "t2", "flair", "seg")))
    layout, rows = find_patients(tmp_path)
    assert layout == "BraTS 2017–2021"
    assert [row["patient"] for row in rows] == ["BraTS2021_00001", "BraTS2021_00002"]
    assert rows[0]["coding"] == "brats2021"
    assert rows[0]["t1ce"].endswith("BraTS2021_00001/BraTS2021_00001_t1ce.nii.gz")


def test_brats_2023_names_are_found_without_references(tmp_path):
    name = "BraTS-GLI-00003-000"
    touch(*(tmp_path / f"{name}-{ending}.nii.gz" for ending in ("t1n", "t1c", "t2w", "t2f")))
    layout, rows = find_patients(tmp_path)
    assert layout == "BraTS 2023"
    assert (rows[0]["t1"][-10:], rows[0]["coding"]) == ("t1n.nii.gz", "brats2023")
    assert "seg" not in rows[0]


def test_patients_with_missing_files_are_all_named(tmp_path):
    for name in ("a", "b"):
        touch(*(tmp_path / f"{name}_{ending}.nii.gz" for ending in ("t1", "t2", "flair")))
    with pytest.raises(Problems) as caught:
        find_patients(tmp_path)
    assert [message[:23] for message in caught.value.problems] == ["a: no file for t1ce; fo", "b: no file for t1ce; fo"]


def test_a_patient_whose_file_is_there_twice_is_named(tmp_path):
    for folder in ("one", "two"):
        touch(*(tmp_path / folder / f"a_{ending}.nii.gz" for ending in ("t1", "t1ce", "t2", "flair")))
    with pytest.raises(Problems, match="a: 2 files for t1"):
        find_patients(tmp_path)


def test_a_decathlon_folder_is_found(tmp_path):
    (tmp_path / "dataset.json").write_text(
        json.dumps({"modality": {"0": "FLAIR", "1": "T1w", "2": "t1gd", "3": "T2w"}})
    )
    touch(tmp_path / "imagesTr" / "BRATS_001.nii.gz", tmp_path / "imagesTr" / "._BRATS_001.nii.gz")
    touch(tmp_path / "labelsTr" / "BRATS_001.nii.gz")
    layout, rows = find_patients(tmp_path)
    assert layout == "Medical Segmentation Decathlon"
    assert [(row["patient"], row["coding"]) for row in rows] == [("BRATS_001", "msd")]
    assert rows[0]["image"].endswith("imagesTr/BRATS_001.nii.gz")
    assert rows[0]["seg"].endswith("labelsTr/BRATS_001.nii.gz")


def test_an_nnunet_folder_is_found_with_its_own_channel_order(tmp_path):
    names = {"0": "T1", "1": "T1ce", "2": "T2", "3": "Flair"}
    (tmp_path / "dataset.json").write_text(json.dumps({"channel_names": names}))
    touch(*(tmp_path / "imagesTr" / f"case_7_{channel:04d}.nii.gz" for channel in range(4)))
    layout, rows = find_patients(tmp_path)
    assert layout == "nnU-Net raw"
    assert (rows[0]["patient"], rows[0]["t1ce"][-11:]) == ("case_7", "0001.nii.gz")


def test_unknown_names_say_what_was_expected(tmp_path):
    save(tmp_path / "brain.nii.gz", np.zeros((2, 2, 2)))
    with pytest.raises(SegtrustError, match=r"1 NIfTI files seen.*_t1ce\.nii\.gz"):
        find_patients(tmp_path)


def test_paths_of_a_sheet_are_relative_within_a_shared_folder():
    assert sheet_path("/data/brats/a.nii.gz", "/data/study") == "../brats/a.nii.gz"
    assert sheet_path("/data/brats/a.nii.gz", "/home/study") == "/data/brats/a.nii.gz"


def test_linked_folders_are_followed_and_hidden_files_are_not_seen(tmp_path):
    touch(*(tmp_path / "store" / f"a_{ending}.nii.gz" for ending in ("t1", "t1ce", "t2", "flair")))
    touch(tmp_path / "store" / "._a_t1.nii.gz")
    (tmp_path / "cohort").mkdir()
    (tmp_path / "cohort" / "a").symlink_to(tmp_path / "store")
    (tmp_path / "store" / "back").symlink_to(tmp_path / "cohort")
    assert [row["patient"] for row in find_patients(tmp_path / "cohort")[1]] == ["a"]


@pytest.mark.parametrize(
    ("labels", "coding"),
    [
        ({"0": "background", "1": "edema", "2": "non-enhancing tumor", "3": "enhancing tumour"}, "msd"),
        ({"background": 0, "whole tumor": [1, 2, 3], "tumor core": [2, 3], "enhancing tumor": 3}, "msd"),
        ({"background": 0, "whole tumor": [1, 2, 3], "tumor core": [1, 3], "enhancing tumor": 3}, "brats2023"),
        ({"background": 0, "NCR": 1, "Oedema": 2, "ET": 3}, "brats2023"),
        ({}, "msd"),
    ],
)
def test_the_coding_of_a_dataset_follows_its_labels(tmp_path, labels, coding):
    names = {"0": "T1", "1": "T1ce", "2": "T2", "3": "Flair"}
    (tmp_path / "dataset.json").write_text(json.dumps({"channel_names": names, "labels": labels}))
    touch(*(tmp_path / "imagesTr" / f"case_7_{channel:04d}.nii.gz" for channel in range(4)))
    assert find_patients(tmp_path)[1][0]["coding"] == coding
