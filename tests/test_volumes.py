"""Grids, orientation and reading of NIfTI files."""

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from conftest import LPS, save

from segtrust.errors import PatientError
from segtrust.volumes import Geometry, geometry_of, load_image, read_reference, read_voxels, write_volume

OBLIQUE_ORDER = np.array([[0, 0, 2.0, 5], [-1.0, 0, 0, 9], [0, -3.0, 0, 30], [0, 0, 0, 1]])  # axes P, I, R


@pytest.mark.parametrize("affine", [LPS, np.diag([1.0, 1, 1, 1]), OBLIQUE_ORDER])
def test_canonical_arrays_are_those_of_nibabel(affine):
    array = np.random.default_rng(0).random((4, 5, 6))
    canonical = nib.as_closest_canonical(nib.Nifti1Image(array, affine))
    geometry = Geometry(array.shape, affine)
    assert np.array_equal(geometry.to_canonical(array), np.asarray(canonical.dataobj))
    assert np.allclose(geometry.canonical_affine, canonical.affine)
    assert geometry.canonical_shape == canonical.shape


@pytest.mark.parametrize("affine", [LPS, OBLIQUE_ORDER])
def test_there_and_back_changes_no_voxel(affine):
    array = np.random.default_rng(0).random((3, 4, 5, 6))
    geometry = Geometry((4, 5, 6), affine)
    assert np.array_equal(geometry.to_own(geometry.to_canonical(array)), array)


def test_an_origin_of_minus_zero_is_the_same_grid():
    other = LPS.copy()
    other[0, 3] = -0.0
    assert Geometry((4, 4, 4), LPS).agrees_with(Geometry((4, 4, 4), other))


def test_a_shift_of_a_hundredth_of_a_millimetre_is_another_grid():
    other = LPS.copy()
    other[0, 3] = 0.01
    assert not Geometry((4, 4, 4), LPS).agrees_with(Geometry((4, 4, 4), other))


def test_spacing_follows_the_axes_of_the_file():
    assert Geometry((4, 5, 6), OBLIQUE_ORDER).spacing_mm.tolist() == [1, 3, 2]


def test_a_written_volume_has_the_affine_and_form_codes_of_the_scan(tmp_path):
    geometry = Geometry((4, 5, 6), LPS, (1, 3))
    write_volume(tmp_path / "a.nii.gz", np.zeros((3, 4, 5, 6), np.float32), geometry, "three regions")
    image = nib.load(tmp_path / "a.nii.gz")
    assert image.shape == (4, 5, 6, 3)
    assert geometry_of(image).agrees_with(geometry)
    assert geometry_of(image).form_codes == (1, 3)


def test_the_same_volume_is_written_as_the_same_bytes(tmp_path):
    array = np.random.default_rng(0).random((4, 5, 6)).astype(np.float32)
    for name in ("a", "b"):
        write_volume(tmp_path / name / "x.nii.gz", array, Geometry((4, 5, 6), LPS), "x")
    assert (tmp_path / "a" / "x.nii.gz").read_bytes() == (tmp_path / "b" / "x.nii.gz").read_bytes()


def test_a_truncated_file_is_an_error_that_names_patient_and_file(tmp_path):
    path = save(tmp_path / "p_t1.nii.gz", np.random.default_rng(0).random((30, 30, 30)))
    content = (tmp_path / "p_t1.nii.gz").read_bytes()
    (tmp_path / "p_t1.nii.gz").write_bytes(content[: len(content) // 2])
    with pytest.raises(PatientError, match=r"p9: .*p_t1\.nii\.gz; copy it again"):
        read_voxels(load_image(path, "p9"), "p9", path)


def test_a_file_that_is_no_image_is_an_error(tmp_path):
    (tmp_path / "a.nii.gz").write_text("hello")
    with pytest.raises(PatientError, match="not a readable NIfTI"):
        load_image(tmp_path / "a.nii.gz", "p")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_voxels_that_are_not_finite_are_counted_in_the_error(tmp_path, value):
    array = np.ones((4, 5, 6), np.float32)
    array[0, 0, :2] = value
    path = save(tmp_path / "a.nii.gz", array)
    with pytest.raises(PatientError, match="2 voxels are NaN or infinite"):
        read_voxels(load_image(path, "p"), "p", path)


def test_labels_on_another_grid_are_refused(tmp_path):
    path = save(tmp_path / "seg.nii.gz", np.zeros((4, 5, 7), np.uint8))
    with pytest.raises(PatientError, match=r"4×5×7 .* expected 4×5×6"):
        read_reference(path, "brats2021", "p", Geometry((4, 5, 6), LPS))


def test_the_cavity_of_2024_is_kept_apart(tmp_path):
    codes = np.zeros((4, 5, 6), np.uint8)
    codes[0, 0, 0] = 4
    path = save(tmp_path / "seg.nii.gz", codes)
    reference = read_reference(path, "brats2024", "p", Geometry((4, 5, 6), LPS))
    assert reference.labels.sum() == 0
    assert reference.cavity.sum() == 1


def test_a_compressed_file_whose_bytes_changed_is_refused_by_its_checksum(tmp_path):
    path = save(tmp_path / "a.nii.gz", np.random.default_rng(0).integers(0, 999, (12, 12, 12)).astype(np.int16))
    content = bytearray(Path(path).read_bytes())
    content[-6] ^= 255
    Path(path).write_bytes(content)
    with pytest.raises(PatientError, match=r"damaged \(CRC check failed"):
        read_voxels(load_image(path, "a"), "a", path)


@pytest.mark.parametrize("value", [0, np.nan])
def test_an_affine_that_places_no_voxel_is_refused(tmp_path, value):
    image = nib.Nifti1Image(np.ones((3, 3, 3), np.uint8), None)
    image.header["sform_code"] = 1
    for row in ("srow_x", "srow_y", "srow_z"):
        image.header[row] = value
    (tmp_path / "a.nii").write_bytes(image.header.binaryblock + bytes(4 + 27))
    with pytest.raises(PatientError, match="places no voxel"):
        load_image(tmp_path / "a.nii", "a")
