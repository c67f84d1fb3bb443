"""Predictions made elsewhere become moments."""

import numpy as np
import pytest
from conftest import LPS, SHAPE, save

from segtrust.errors import PatientError, SegtrustError
from segtrust.gather import find_passes, gather, read_prediction
from segtrust.volumes import Geometry

GEOMETRY = Geometry(SHAPE, LPS)


def draw(seed):
    probability = np.zeros((3, *SHAPE), np.float32)
    probability[:, 4:12, 5:14, 3:11] = np.random.default_rng(seed).random((3, 8, 9, 8))
    return probability


def write(path, probability, outputs=("WT", "TC", "ET"), affine=LPS):
    order = [("WT", "TC", "ET").index(region) for region in outputs]
    return save(path, np.moveaxis(probability[order], 0, -1), affine)


def test_passes_are_numbered_from_the_first_file(tmp_path):
    for number in (1, 2, 10, 3, 4, 5, 6, 7, 8, 9):
        (tmp_path / f"p1_{number}.nii.gz").touch()
    found = find_passes(f"{tmp_path}/{{patient}}_{{pass}}.nii.gz", "p1")
    assert [path.rsplit("_", 1)[1] for path in found.values()] == [f"{number}.nii.gz" for number in range(1, 11)]
    assert list(found) == list(range(10))


def test_a_patients_files_are_not_those_of_one_with_a_longer_name(tmp_path):
    for name in ("p1_0.nii.gz", "p1_x_0.nii.gz", "p11_0.nii.gz"):
        (tmp_path / name).touch()
    assert len(find_passes(f"{tmp_path}/{{patient}}_{{pass}}.nii.gz", "p1")) == 1


def test_a_gap_between_passes_is_named(tmp_path):
    for number in (0, 1, 3):
        (tmp_path / f"p1_{number}.nii.gz").touch()
    with pytest.raises(SegtrustError, match="p1: passes 2 are missing"):
        find_passes(f"{tmp_path}/{{patient}}_{{pass}}.nii.gz", "p1")


def test_a_patient_without_predictions_is_named(tmp_path):
    with pytest.raises(SegtrustError, match="p1: no file matches"):
        find_passes(f"{tmp_path}/{{patient}}_{{pass}}.nii.gz", "p1")


def test_channels_are_read_in_the_order_of_outputs(tmp_path):
    probability = draw(0)
    path = write(tmp_path / "a.nii.gz", probability, ("TC", "ET", "WT"))
    assert np.array_equal(read_prediction(path, ["TC", "ET", "WT"], "p", GEOMETRY), probability)


def test_gathered_moments_are_means_on_the_patients_grid(tmp_path):
    passes = np.stack([draw(seed) for seed in range(6)])
    paths = [write(tmp_path / f"{number}.nii.gz", probability) for number, probability in enumerate(passes)]
    moments = gather(paths, outputs=["WT", "TC", "ET"], deterministic=False, patient="p", geometry=GEOMETRY)
    mean = moments.place(moments.summary(6).probability)
    assert np.abs(mean - passes.mean(axis=0)).max() < 1e-6  # float32 means of 2^-24 steps
    assert moments.deterministic is None
    assert moments.sums[(0, 5)]["probability"].shape == (3, 8, 9, 8)


def test_a_single_prediction_is_its_own_deterministic_pass(tmp_path):
    path = write(tmp_path / "a.nii.gz", draw(1))
    moments = gather([path], outputs=["WT", "TC", "ET"], deterministic=True, patient="p", geometry=GEOMETRY)
    assert np.array_equal(moments.place(moments.deterministic), draw(1))


def test_an_empty_prediction_is_gathered(tmp_path):
    path = write(tmp_path / "a.nii.gz", np.zeros((3, *SHAPE), np.float32))
    moments = gather([path], outputs=["WT", "TC", "ET"], deterministic=True, patient="p", geometry=GEOMETRY)
    assert not moments.place(moments.summary(1).probability).any()


def test_another_grid_is_refused_with_both_described(tmp_path):
    shifted = LPS.copy()
    shifted[0, 3] = 1
    path = write(tmp_path / "a.nii.gz", draw(0), affine=shifted)
    with pytest.raises(PatientError, match=r"p: the prediction lies on another grid.*origin \(1, 20, 0\).*origin \(0"):
        read_prediction(path, ["WT", "TC", "ET"], "p", GEOMETRY)


def test_logits_are_refused_with_their_range(tmp_path):
    path = write(tmp_path / "a.nii.gz", draw(0) * 12 - 6)
    with pytest.raises(PatientError, match=r"probabilities reach from -6.*logits"):
        read_prediction(path, ["WT", "TC", "ET"], "p", GEOMETRY)


def test_a_label_map_is_not_taken_for_probabilities(tmp_path):
    path = save(tmp_path / "a.nii.gz", np.zeros(SHAPE, np.uint8))
    with pytest.raises(PatientError, match=r"expected .* 3"):
        read_prediction(path, ["WT", "TC", "ET"], "p", GEOMETRY)
