"""Maps return to the patient's own space."""

import json

import nibabel as nib
import numpy as np
import pytest
from conftest import LPS

from segtrust.maps import MAPS, map_paths, write_maps
from segtrust.moments import Accumulator, merge
from segtrust.volumes import Geometry

GEOMETRY = Geometry((12, 11, 10), LPS, (1, 1))
START, SHAPE = (2, 3, 1), (6, 5, 7)


@pytest.fixture
def moments():
    generator = np.random.default_rng(0)
    accumulator = Accumulator(SHAPE, "member0")
    for number in range(5):
        nested = np.sort(generator.random((3, *SHAPE)), axis=0)[::-1].astype(np.float32)
        accumulator.add(number, nested)
    return accumulator.moments(START, GEOMETRY)


def write(tmp_path, moments, passes=5):
    paths = {name: tmp_path / f"p_{name}.nii.gz" for name in MAPS}
    write_maps(paths, moments, passes, "brats2021", {"seed": 0})
    return {name: nib.load(path) for name, path in paths.items()}


def test_every_map_lies_on_the_patients_grid(tmp_path, moments):
    for name, image in write(tmp_path, moments).items():
        assert image.shape[:3] == GEOMETRY.shape, name
        assert np.array_equal(image.affine, LPS), name


def test_voxels_outside_the_box_are_background_without_uncertainty(tmp_path, moments):
    outside = np.ones(GEOMETRY.shape, bool)
    inside = tuple(slice(first, first + size) for first, size in zip(START, SHAPE, strict=True))
    canonical = np.zeros(GEOMETRY.canonical_shape, bool)
    canonical[inside] = True
    outside = ~GEOMETRY.to_own(canonical)
    for name, image in write(tmp_path, moments).items():
        assert not np.asarray(image.dataobj)[outside].any(), name


def test_the_probability_map_is_the_mean_over_passes(tmp_path, moments):
    probability = np.moveaxis(np.asarray(write(tmp_path, moments)["probability"].dataobj), -1, 0)
    assert np.array_equal(probability, moments.place(moments.summary(5).probability))


def test_the_segmentation_has_the_codes_of_the_patients_coding(tmp_path, moments):
    segmentation = write(tmp_path, moments)["segmentation"]
    assert segmentation.get_data_dtype() == np.uint8
    assert set(np.unique(np.asarray(segmentation.dataobj))) <= {0, 1, 2, 4}
    assert np.array_equal(
        np.asarray(segmentation.dataobj) == 4,
        moments.place((moments.summary(5).probability[2] >= 0.5)[None])[0],
    )


def test_entropy_is_at_most_one_bit_and_holds_its_parts(tmp_path, moments):
    images = {name: np.asarray(image.dataobj) for name, image in write(tmp_path, moments).items()}
    assert images["entropy"].max() <= 1
    assert images["entropy_4class"].max() <= 1
    parts = images["expected_entropy"] + images["mutual_information"]
    assert np.abs(parts - images["entropy"]).max() < 1e-6


def test_spread_of_a_single_pass_is_nan_and_never_zero(tmp_path):
    accumulator = Accumulator(SHAPE, "member0")
    accumulator.add(0, np.full((3, *SHAPE), 0.5, np.float32))
    images = write(tmp_path, accumulator.moments(START, GEOMETRY), passes=1)
    for name in ("mutual_information", "variance"):
        assert np.isnan(np.asarray(images[name].dataobj)).all(), name


def test_each_map_has_its_provenance_beside_it(tmp_path, moments):
    write(tmp_path, moments)
    sidecar = json.loads((tmp_path / "p_entropy.json").read_text())
    assert (sidecar["map"], sidecar["passes"], sidecar["seed"]) == ("entropy", 5, 0)
    assert "bits" in sidecar["meaning"]


def test_the_sidecar_counts_the_passes_of_all_sources(tmp_path, moments):
    other = Accumulator(SHAPE, "member1")
    for number in range(5):
        other.add(number, np.full((3, *SHAPE), 0.25, np.float32))
    write(tmp_path, merge([moments, other.moments(START, GEOMETRY)]))
    assert json.loads((tmp_path / "p_entropy.json").read_text())["passes"] == 10


def test_names_of_maps_are_found_behind_the_patients_name():
    paths = ["results/m/maps/a_b_entropy.nii.gz", "results/m/maps/a_b_expected_entropy.nii.gz"]
    assert list(map_paths(paths, "a_b")) == ["entropy", "expected_entropy"]
