"""Preprocessing of one patient."""

import monai.transforms
import numpy as np
import pytest
from conftest import LPS, MODALITIES, draw_scan, save, write_patient

from segtrust.errors import PatientError
from segtrust.preprocess import (
    normalise,
    preprocess,
    read_modalities,
    read_preprocessed,
    write_preprocessed,
)
from segtrust.volumes import Geometry, bounding_box


def test_z_scores_are_those_of_monai():
    scan, _ = draw_scan(0)
    reference = monai.transforms.NormalizeIntensity(nonzero=True, channel_wise=True)(scan.astype(np.float32))
    ours = np.stack([normalise(volume.astype(np.float32)) for volume in scan])
    assert np.abs(ours - np.asarray(reference)).max() < 1e-5  # MONAI computes in float32


def test_z_scores_have_mean_0_and_deviation_1_over_non_zero_voxels():
    scan, _ = draw_scan(1)
    normalised = normalise(scan[0].astype(np.float32))
    values = normalised[scan[0] != 0]
    assert abs(values.mean()) < 1e-6
    assert abs(values.std() - 1) < 1e-6
    assert not normalised[scan[0] == 0].any()


def test_a_volume_of_one_value_is_only_centred():
    assert not normalise(np.full((3, 3, 3), 7, np.float32)).any()


def test_each_modality_has_its_own_non_zero_voxels():
    scan, _ = draw_scan(2)
    scan[1, 2, 2, 2] = 0
    scan[0] = 0
    scan[0, 4:9, 4:9, 4:9] = 5
    result = preprocess(scan, Geometry(scan.shape[1:], np.eye(4)))
    bits = result.nonzero
    assert bits.shape == result.image.shape[1:]
    assert [(bits >> bit & 1).sum() for bit in range(4)] == [int((scan[bit] != 0).sum()) for bit in range(4)]


def test_the_box_is_the_smallest_that_holds_every_modality():
    scan, _ = draw_scan(3)
    result = preprocess(scan, Geometry(scan.shape[1:], np.eye(4)))
    occupied = (scan != 0).any(axis=0)
    assert result.box == bounding_box(occupied)
    assert np.array_equal(result.brain, occupied)


@pytest.mark.parametrize("affine", [LPS, np.eye(4)])
def test_the_brain_comes_back_on_the_patients_own_grid(affine):
    scan, _ = draw_scan(4)
    result = preprocess(scan, Geometry(scan.shape[1:], affine))
    assert np.array_equal(result.brain, (scan != 0).any(axis=0))
    assert np.array_equal(result.brain_t1, scan[0] != 0)


def test_patients_stored_as_ras_and_lps_look_the_same_to_a_network():
    scan, _ = draw_scan(5)
    mirrored = scan[:, ::-1, ::-1]
    first = preprocess(scan, Geometry(scan.shape[1:], np.eye(4)))
    second = preprocess(mirrored, Geometry(scan.shape[1:], LPS))
    assert np.array_equal(first.image, second.image)


def test_a_file_gives_back_what_was_written(tmp_path):
    scan, _ = draw_scan(6)
    written = preprocess(scan, Geometry(scan.shape[1:], LPS, (1, 2)))
    write_preprocessed(tmp_path / "p.safetensors", written, {"seed": 0})
    read, provenance = read_preprocessed(tmp_path / "p.safetensors")
    assert np.array_equal(read.image, written.image)
    assert np.array_equal(read.nonzero, written.nonzero)
    assert (read.start, read.geometry.form_codes, provenance) == (written.start, (1, 2), {"seed": 0})


def test_one_file_of_four_channels_equals_four_files(tmp_path):
    paths = write_patient(tmp_path, "p", 7, seg=False)
    scan, _ = draw_scan(7)
    flair_first = np.stack([scan[3], scan[0], scan[1], scan[2]], axis=-1)
    image = save(tmp_path / "p.nii.gz", flair_first)
    four, _ = read_modalities(paths, "p")
    one, _ = read_modalities({"image": image}, "p")
    assert np.array_equal(four, one)


def test_a_modality_of_zeros_is_an_error(tmp_path):
    paths = write_patient(tmp_path, "p", 8, seg=False)
    save(paths["t2"], np.zeros((20, 22, 18), np.int16))
    with pytest.raises(PatientError, match=r"p: every voxel of t2 is zero.*p_t2\.nii\.gz"):
        read_modalities(paths, "p")


def test_modalities_on_different_grids_are_named_with_both(tmp_path):
    paths = write_patient(tmp_path, "p", 9, seg=False)
    shifted = LPS.copy()
    shifted[2, 3] = 4
    save(paths["flair"], draw_scan(9)[0][3], shifted)
    with pytest.raises(PatientError, match=r"t1 has 20×22×18 .* but flair has .*origin \(0, 20, 4\)"):
        read_modalities(paths, "p")


@pytest.mark.parametrize("modality", MODALITIES)
def test_a_missing_modality_is_named(tmp_path, modality):
    paths = write_patient(tmp_path, "p", 10, seg=False)
    paths[modality] = str(tmp_path / "gone.nii.gz")
    with pytest.raises(PatientError, match=r"p: no such file: .*gone\.nii\.gz"):
        read_modalities(paths, "p")
