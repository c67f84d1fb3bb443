"""Predictions made elsewhere become moments."""

import os
import pickle
import tracemalloc
from collections import OrderedDict
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from conftest import LPS, SHAPE, draw_scan, save

from segtrust.errors import PatientError, SegtrustError
from segtrust.gather import companions, find_passes, gather, read_prediction
from segtrust.regions import CODINGS, canonical_labels, codes_of, region_masks
from segtrust.volumes import Geometry

GEOMETRY = Geometry(SHAPE, LPS)
REGIONS = ["WT", "TC", "ET"]
ORDER = ["background", "ED", "NCR", "ET"]  # as nnU-Net's conversion of BraTS 2021
SOFTMAX = {"softmax": ORDER}


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
    assert moments.sums["predictions", (0, 5)]["probability"].shape == (3, 8, 9, 8)


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


# --- class probabilities ---


def draw_classes(seed, shape=SHAPE):
    """Return float32 (4, x, y, z) that sum to one, in the order of ORDER."""
    logits = np.random.default_rng(seed).normal(scale=3, size=(4, *shape))
    return (np.exp(logits) / np.exp(logits).sum(axis=0)).astype(np.float32)


def regions_of(classes):
    _, oedema, necrotic, enhancing = classes
    return np.stack([oedema + necrotic + enhancing, necrotic + enhancing, enhancing])


def write_channels(path, channels, affine=LPS):
    return save(path, np.moveaxis(channels, 0, -1), affine)


def test_four_channels_become_regions_in_the_order_of_outputs(tmp_path):
    path = write_channels(tmp_path / "a.nii.gz", draw_classes(0))
    found = read_prediction(path, SOFTMAX, "p", GEOMETRY)
    assert found.dtype == np.float32
    assert found == pytest.approx(regions_of(draw_classes(0)), abs=1e-6)  # a few roundings of float32


def test_a_softmax_that_does_not_sum_to_one_is_refused(tmp_path):
    classes = draw_classes(0)
    classes[:, :2, 0, 0] = 0.5
    path = write_channels(tmp_path / "a.nii.gz", classes)
    with pytest.raises(PatientError, match=r"p: the four classes do not sum to 1 in 2 voxels .*sigmoids"):
        read_prediction(path, SOFTMAX, "p", GEOMETRY)


def test_a_softmax_masked_with_zeros_is_refused_in_a_nifti_file(tmp_path):
    classes = draw_classes(0)
    classes[:, 0] = 0
    path = write_channels(tmp_path / "a.nii.gz", classes)
    with pytest.raises(PatientError, match=r"smallest 0, largest 0.*background 1 where nothing was predicted"):
        read_prediction(path, SOFTMAX, "p", GEOMETRY)


@pytest.mark.parametrize(("value", "found"), [(1.0005, 1), (-0.0005, 0)])
def test_values_beyond_the_range_by_rounding_are_clamped(tmp_path, value, found):
    probability = draw(0)
    probability[0, 0, 0, 0] = value
    assert read_prediction(write(tmp_path / "a.nii.gz", probability), REGIONS, "p", GEOMETRY)[0, 0, 0, 0] == found


@pytest.mark.parametrize("value", [1.002, -0.002])
def test_values_beyond_the_range_by_more_are_refused(tmp_path, value):
    probability = draw(0)
    probability[0, 0, 0, 0] = value
    with pytest.raises(PatientError, match=rf"p: probabilities reach from .*{value}.*expected \[0, 1\]"):
        read_prediction(write(tmp_path / "a.nii.gz", probability), REGIONS, "p", GEOMETRY)


@pytest.mark.parametrize(
    ("n_channels", "outputs", "advice"),
    [
        (4, REGIONS, r"expected \(x, y, z, 3\).*write outputs: {softmax: \[background, NCR, ED, ET\]}"),
        (3, SOFTMAX, r"expected \(x, y, z, 4\).*write outputs: \[WT, TC, ET\]"),
        (2, SOFTMAX, r"export 3 regions .* or 4 classes"),
        (3, {"labels": "msd"}, r"a label map \(x, y, z\) is expected.*write outputs: \[WT, TC, ET\]"),
        (4, {"labels": "msd"}, r"a label map \(x, y, z\) is expected.*write outputs: {softmax"),
    ],
)
def test_a_file_that_outputs_do_not_fit_is_told_what_to_write(tmp_path, n_channels, outputs, advice):
    path = write_channels(tmp_path / "a.nii.gz", np.zeros((n_channels, *SHAPE), np.float32))
    with pytest.raises(PatientError, match=advice):
        read_prediction(path, outputs, "p", GEOMETRY)


def test_a_file_of_another_kind_is_refused(tmp_path):
    with pytest.raises(PatientError, match=r"p: predictions are \.nii, \.nii\.gz or \.npz files, found a\.nrrd"):
        read_prediction("a.nrrd", REGIONS, "p", GEOMETRY)


# --- label maps ---


@pytest.mark.parametrize("coding", CODINGS)
def test_a_label_map_votes_for_the_regions_of_its_coding(tmp_path, coding):
    labels = canonical_labels(draw_scan(0)[1], "brats2021", "p", "f")
    path = save(tmp_path / "a.nii.gz", codes_of(labels, coding))
    found = read_prediction(path, {"labels": coding}, "p", GEOMETRY)
    assert found.dtype == np.float32
    assert np.array_equal(found, region_masks(labels))


def test_labels_of_nnunets_brats_conversion_are_coding_msd(tmp_path):
    codes = draw_scan(0)[1]
    converted = np.zeros_like(codes)  # Dataset137_BraTS2021: 2 becomes 1, 1 becomes 2, 4 becomes 3
    for ours, theirs in ((2, 1), (1, 2), (4, 3)):
        converted[codes == ours] = theirs
    path = save(tmp_path / "a.nii.gz", converted)
    expected = region_masks(canonical_labels(codes, "brats2021", "p", "f"))
    assert np.array_equal(read_prediction(path, {"labels": "msd"}, "p", GEOMETRY), expected)


def test_a_cavity_in_a_label_map_is_no_tumour(tmp_path):
    path = save(tmp_path / "a.nii.gz", np.full(SHAPE, 4, np.uint8))
    assert not read_prediction(path, {"labels": "brats2024"}, "p", GEOMETRY).any()


def test_the_probability_of_label_maps_is_their_share_of_votes(tmp_path):
    votes = np.random.default_rng(0).integers(0, 4, (5, *SHAPE)).astype(np.uint8)
    paths = [save(tmp_path / f"{number}.nii.gz", codes) for number, codes in enumerate(votes)]
    moments = gather(paths, outputs={"labels": "brats2023"}, deterministic=False, patient="p", geometry=GEOMETRY)
    share = np.mean([region_masks(codes) for codes in votes], axis=0)
    mean = moments.place(moments.summary(5).probability)
    assert np.abs(mean - share).max() < 1e-6  # float32 means of 2^-24 steps


def test_a_code_unknown_to_the_coding_names_the_setting_of_the_model(tmp_path):
    path = save(tmp_path / "a.nii.gz", np.full(SHAPE, 3, np.uint8))
    with pytest.raises(
        PatientError, match=r"p: the prediction has code 3 \(7,920 voxels\).*msd.*`outputs: {labels: …}`"
    ):
        read_prediction(path, {"labels": "brats2021"}, "p", GEOMETRY)


@pytest.mark.parametrize("outputs", [REGIONS, SOFTMAX])
def test_a_label_map_without_coding_is_told_to_name_one(tmp_path, outputs):
    path = save(tmp_path / "a.nii.gz", np.zeros(SHAPE, np.uint8))
    with pytest.raises(PatientError, match=r"write outputs: {labels: CODING}.*brats2021.*nnU-Net.*1 ED, 2 NCR, 3 ET"):
        read_prediction(path, outputs, "p", GEOMETRY)


def test_a_label_map_on_another_grid_is_refused(tmp_path):
    path = save(tmp_path / "a.nii.gz", np.zeros(SHAPE, np.uint8), np.diag([1.0, 1, 1, 1]))
    with pytest.raises(PatientError, match=r"lies on another grid"):
        read_prediction(path, {"labels": "msd"}, "p", GEOMETRY)


# --- nnU-Net ---


def oblique(seed, spacing=(0.9, 1.1, 3.0), flips=(-1, 1, 1)):
    """Return an affine (RAS, mm): axes turned by up to a few tens of degrees and some reversed."""
    x, y, z = np.random.default_rng(seed).uniform(-0.35, 0.35, 3)
    turn = np.eye(3)
    for (first, second), angle in {(0, 1): z, (0, 2): y, (1, 2): x}.items():
        plane = np.eye(3)
        plane[[first, second], [first, second]] = np.cos(angle)
        plane[first, second], plane[second, first] = -np.sin(angle), np.sin(angle)
        turn = plane @ turn
    affine = np.eye(4)
    affine[:3, :3] = turn * np.array(flips) * np.array(spacing)
    affine[:3, 3] = (-61.25, 17.5, 40.125)
    return affine


AFFINES = {
    "brats": LPS,
    "anisotropic": np.array([[0.5, 0, 0, -7], [0, 0.75, 0, 3], [0, 0, 4, 11], [0, 0, 0, 1]]),
    "permuted": np.array([[0, 0, 2.5, -7], [-1.0, 0, 0, 3], [0, 0.75, 0, 11], [0, 0, 0, 1]]),
    "oblique": oblique(0),
    "oblique, other way": oblique(1, flips=(1, -1, -1)),
}


def itk_of(affine):
    """Return what SimpleITK says of a NIfTI file's grid: spacing, origin, direction; its world is LPS."""
    spacing = [float(np.linalg.norm(affine[:3, axis])) for axis in range(3)]
    sign = (-1, -1, 1)
    direction = [sign[row] * affine[row, axis] / spacing[axis] for row in range(3) for axis in range(3)]
    origin = [sign[row] * affine[row, 3] for row in range(3)]
    return tuple(spacing), tuple(map(float, origin)), tuple(map(float, direction))


def v2_properties(affine, shape, reader="SimpleITKIO"):
    """Return what nnU-Net v2 pickles when this reader read a scan (x, y, z)."""
    ras = nib.as_closest_canonical(nib.Nifti1Image(np.zeros(shape, np.uint8), affine))
    spacing, origin, direction = itk_of(ras.affine if reader == "SimpleITKIOWithReorient" else affine)
    stuff = {
        "SimpleITKIO": {"sitk_stuff": {"spacing": spacing, "origin": origin, "direction": direction}},
        "SimpleITKIOWithReorient": {
            "sitk_stuff": {"spacing": spacing, "origin": origin, "direction": direction, "original_orientation": "LPS"}
        },
        "NibabelIO": {"nibabel_stuff": {"original_affine": affine}},
        "NibabelIOWithReorient": {"nibabel_stuff": {"original_affine": affine, "reoriented_affine": ras.affine}},
    }[reader]
    stored = (ras.shape if "Reorient" in reader else shape)[::-1]
    return {
        **stuff,
        "spacing": list(spacing[::-1]),
        "shape_before_cropping": stored,
        "bbox_used_for_cropping": [[0, side] for side in stored],
        "shape_after_cropping_and_before_resampling": stored,
        "class_locations": {np.int64(1): np.zeros((2, 4), np.int64), (1, 2): []},  # of validation cases
    }


def v1_properties(affine, shape, box):
    """Return what nnU-Net v1 pickles; box : ((first, stop), …) along x, y, z of what it saw of the scan."""
    spacing, origin, direction = itk_of(affine)
    properties = OrderedDict()
    properties["original_size_of_raw_data"] = np.array(shape)[[2, 1, 0]]
    properties["original_spacing"] = np.array(spacing)[[2, 1, 0]]
    properties["list_of_data_files"] = ["p_0000.nii.gz"]
    properties["seg_file"] = None
    properties["itk_origin"] = origin
    properties["itk_spacing"] = spacing
    properties["itk_direction"] = direction
    properties["crop_bbox"] = [list(side) for side in box[::-1]]
    properties["classes"] = np.array([-1, 0], np.float32)
    properties["size_after_cropping"] = tuple(stop - first for first, stop in box[::-1])
    return properties


def write_nnunet(path, channels, properties, key="probabilities", protocol=pickle.DEFAULT_PROTOCOL):
    """Write channels (c, x, y, z) and properties as nnU-Net does; return the path of the .npz."""
    np.savez_compressed(path, **{key: channels.transpose(0, 3, 2, 1)})
    Path(path).with_suffix(".pkl").write_bytes(pickle.dumps(properties, protocol))
    return str(path)


def write_v2(path, channels, affine=LPS):
    return write_nnunet(path, channels, v2_properties(affine, channels.shape[1:]))


@pytest.mark.parametrize("affine", AFFINES.values(), ids=AFFINES)
@pytest.mark.parametrize("reader", ["SimpleITKIO", "NibabelIO"])
def test_an_npz_of_nnunet_is_read_on_the_patients_grid(tmp_path, affine, reader):
    path = write_nnunet(tmp_path / "p.npz", draw_classes(0), v2_properties(affine, SHAPE, reader))
    found = read_prediction(path, SOFTMAX, "p", Geometry(SHAPE, affine))
    assert found.dtype == np.float32
    assert found == pytest.approx(regions_of(draw_classes(0)), abs=1e-6)


@pytest.mark.parametrize("affine", AFFINES.values(), ids=AFFINES)
@pytest.mark.parametrize("reader", ["SimpleITKIOWithReorient", "NibabelIOWithReorient"])
def test_what_nnunet_reoriented_is_put_back(tmp_path, affine, reader):
    own = nib.Nifti1Image(np.moveaxis(draw_classes(0), 0, -1), affine)
    turned = np.moveaxis(np.asarray(nib.as_closest_canonical(own).dataobj), -1, 0)
    path = write_nnunet(tmp_path / "p.npz", turned, v2_properties(affine, SHAPE, reader))
    found = read_prediction(path, SOFTMAX, "p", Geometry(SHAPE, affine))
    assert found == pytest.approx(regions_of(draw_classes(0)), abs=1e-6)


def test_regions_of_nnunet_are_read_in_the_order_of_outputs(tmp_path):
    path = write_v2(tmp_path / "p.npz", draw(0)[[1, 2, 0]])
    assert np.array_equal(read_prediction(path, ["TC", "ET", "WT"], "p", GEOMETRY), draw(0))


@pytest.mark.parametrize("affine", AFFINES.values(), ids=AFFINES)
def test_the_box_that_nnunet_v1_saw_is_placed_in_the_volume(tmp_path, affine):
    box = ((3, 11), (2, 20), (5, 17))
    inside = (slice(None), *(slice(*side) for side in box))
    cropped = draw_classes(0)[inside].astype(np.float16)
    path = write_nnunet(tmp_path / "p.npz", cropped, v1_properties(affine, SHAPE, box), "softmax")
    expected = np.zeros((3, *SHAPE))
    expected[inside] = regions_of(cropped.astype(np.float32))
    found = read_prediction(path, SOFTMAX, "p", Geometry(SHAPE, affine))
    assert found == pytest.approx(expected, abs=2e-3)  # sums of float16 beyond one are clamped


def test_an_uncropped_softmax_of_nnunet_v1_is_read(tmp_path):
    properties = v1_properties(LPS, SHAPE, [(0, side) for side in SHAPE])
    del properties["crop_bbox"]
    path = write_nnunet(tmp_path / "p.npz", draw_classes(0), properties, "softmax")
    assert read_prediction(path, SOFTMAX, "p", GEOMETRY) == pytest.approx(regions_of(draw_classes(0)), abs=1e-6)


@pytest.mark.parametrize("box", [((3, 11), (2, 20), (5, 16)), ((3, 11), (2, 20), (7, 19)), ((-1, 7), (2, 20), (5, 17))])
def test_a_crop_box_that_the_softmax_does_not_fill_is_refused(tmp_path, box):
    cropped = draw_classes(0, (8, 18, 12))
    path = write_nnunet(tmp_path / "p.npz", cropped, v1_properties(LPS, SHAPE, box), "softmax")
    with pytest.raises(
        PatientError, match=r"p: the prediction has \(8, 18, 12\) voxels .*the properties crop .*one export"
    ):
        read_prediction(path, SOFTMAX, "p", GEOMETRY)


def test_sums_of_float16_beyond_one_are_clamped(tmp_path):
    classes = np.zeros((4, *SHAPE), np.float16)
    classes[1:] = np.array([0.7, 0.2, 0.1], np.float16)[:, None, None, None]
    assert classes.astype(np.float32).sum(axis=0).min() > 1
    found = read_prediction(write_v2(tmp_path / "p.npz", classes), SOFTMAX, "p", GEOMETRY)
    assert (found[0] == 1).all()


def test_float16_of_nnunet_is_summed_in_single_precision(tmp_path):
    stored = draw_classes(0).astype(np.float16)
    found = read_prediction(write_v2(tmp_path / "p.npz", stored), SOFTMAX, "p", GEOMETRY)
    assert found == pytest.approx(np.minimum(regions_of(stored.astype(np.float64)), 1), abs=1e-6)


def test_zeros_around_what_nnunet_predicted_are_background(tmp_path):
    classes = draw_classes(0)
    classes[:, :4] = 0
    found = read_prediction(write_v2(tmp_path / "p.npz", classes), SOFTMAX, "p", GEOMETRY)
    assert not found[:, :4].any()
    assert (found[:, 4:] > 0).all()


def test_an_npz_of_nothing_but_zeros_is_no_softmax(tmp_path):
    path = write_v2(tmp_path / "p.npz", np.zeros((4, *SHAPE), np.float32))
    with pytest.raises(PatientError, match=r"do not sum to 1 in 7,920 voxels"):
        read_prediction(path, SOFTMAX, "p", GEOMETRY)


def test_logits_in_an_npz_are_refused(tmp_path):
    path = write_v2(tmp_path / "p.npz", np.random.default_rng(0).normal(size=(4, *SHAPE)))
    with pytest.raises(PatientError, match=r"probabilities reach from -.*are these logits"):
        read_prediction(path, SOFTMAX, "p", GEOMETRY)


@pytest.mark.parametrize(("row", "axis", "by"), [(0, 3, 0.5), (2, 2, 0.01), (0, 1, 0.02)])
def test_an_npz_on_another_grid_is_refused(tmp_path, row, axis, by):
    affine = AFFINES["oblique"].copy()
    affine[row, axis] += by
    path = write_v2(tmp_path / "p.npz", draw_classes(0), affine)
    with pytest.raises(PatientError, match=r"p: the prediction lies on another grid than the scan: .*; expected "):
        read_prediction(path, SOFTMAX, "p", Geometry(SHAPE, AFFINES["oblique"]))


def test_a_reoriented_npz_of_another_volume_is_refused(tmp_path):
    affine = AFFINES["permuted"]
    own = nib.Nifti1Image(np.moveaxis(draw_classes(0), 0, -1), affine)
    turned = np.moveaxis(np.asarray(nib.as_closest_canonical(own).dataobj), -1, 0)
    path = write_nnunet(tmp_path / "p.npz", turned, v2_properties(affine, SHAPE, "NibabelIOWithReorient"))
    shifted = affine.copy()
    shifted[1, 3] += 1
    with pytest.raises(PatientError, match=r"lies on another grid"):
        read_prediction(path, SOFTMAX, "p", Geometry(SHAPE, shifted))


def test_a_grid_that_nnunet_did_not_say_it_reoriented_is_not_turned(tmp_path):
    own = nib.Nifti1Image(np.moveaxis(draw_classes(0), 0, -1), LPS)
    turned = nib.as_closest_canonical(own)
    path = write_v2(tmp_path / "p.npz", np.moveaxis(np.asarray(turned.dataobj), -1, 0), turned.affine)
    with pytest.raises(PatientError, match=r"another grid than the scan: .*RAS.*; expected .*LPS"):
        read_prediction(path, SOFTMAX, "p", GEOMETRY)


def test_transposed_axes_are_refused_with_the_order_nnunet_writes(tmp_path):
    path = write_nnunet(tmp_path / "p.npz", draw_classes(0).transpose(0, 3, 2, 1), v2_properties(LPS, SHAPE))
    with pytest.raises(PatientError, match=r"18×22×20 voxels.*expected 20×22×18.*nnU-Net writes \(channels, z, y, x\)"):
        read_prediction(path, SOFTMAX, "p", GEOMETRY)


@pytest.mark.parametrize("seed", range(5))
def test_the_grid_of_itk_is_that_of_nibabel(tmp_path, seed):
    affine = oblique(seed, spacing=(0.5 + seed, 1.25, 4.0), flips=(-1, -1, 1) if seed % 2 else (1, -1, 1))
    spacing, origin, direction = itk_of(affine)
    lps = np.array(origin) + np.array(direction).reshape(3, 3) @ (np.array(spacing) * (2, 3, 5))
    assert (affine @ (2, 3, 5, 1))[:3] == pytest.approx(lps * (-1, -1, 1))  # the same place of one voxel
    header = nib.Nifti1Image(np.zeros(SHAPE, np.uint8), affine).header
    header.set_qform(affine)  # float32 and quaternions, as ITK reads them
    path = write_v2(tmp_path / "p.npz", draw_classes(0), header.get_qform())
    assert read_prediction(path, SOFTMAX, "p", Geometry(SHAPE, affine)).shape == (3, *SHAPE)


@pytest.mark.parametrize(
    ("stored", "outputs", "advice"),
    [
        (draw_classes(0), REGIONS, r"expected \(3, z, y, x\).*write outputs: {softmax"),
        (draw(0), SOFTMAX, r"expected \(4, z, y, x\).*write outputs: \[WT, TC, ET\]"),
        (draw(0), {"labels": "msd"}, r"an \.npz holds probabilities, but outputs are labels.*write outputs: \[WT"),
    ],
)
def test_an_npz_that_outputs_do_not_fit_is_told_what_to_write(tmp_path, stored, outputs, advice):
    with pytest.raises(PatientError, match=advice):
        read_prediction(write_v2(tmp_path / "p.npz", stored), outputs, "p", GEOMETRY)


def test_an_npz_that_is_no_prediction_is_refused_with_what_it_has(tmp_path):
    path = write_nnunet(tmp_path / "p.npz", draw_classes(0), v2_properties(LPS, SHAPE), "data")
    with pytest.raises(
        PatientError, match=r"has probabilities \(v2\) or softmax \(v1\), this one has data.*--save_prob"
    ):
        read_prediction(path, SOFTMAX, "p", GEOMETRY)


def test_values_in_an_npz_that_are_no_numbers_are_counted(tmp_path):
    classes = draw_classes(0)
    classes[0, 0, 0, :3] = np.nan
    with pytest.raises(PatientError, match=r"p: 3 values are NaN or infinite"):
        read_prediction(write_v2(tmp_path / "p.npz", classes), SOFTMAX, "p", GEOMETRY)


def damage_end(content):
    return content[: len(content) // 2]


def damage_middle(content):
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 0xFF]) + content[middle + 1 :]


@pytest.mark.parametrize("damage", [damage_end, damage_middle])
def test_a_damaged_npz_is_refused(tmp_path, damage):
    path = write_v2(tmp_path / "p.npz", draw_classes(0))
    Path(path).write_bytes(damage(Path(path).read_bytes()))
    with pytest.raises(PatientError, match=r"p: not a readable \.npz of numbers .*copy it again"):
        read_prediction(path, SOFTMAX, "p", GEOMETRY)


def test_an_npz_of_objects_is_not_unpickled(tmp_path):
    path, touched = tmp_path / "p.npz", tmp_path / "touched"
    write_v2(path, draw_classes(0))
    np.savez(path, probabilities=np.array([Malicious(touched)], object))
    with pytest.raises(PatientError, match=r"not a readable \.npz of numbers .*allow_pickle"):
        read_prediction(str(path), SOFTMAX, "p", GEOMETRY)
    assert not touched.exists()


# --- properties, which nnU-Net pickles ---


class Malicious:
    """Pickles into a command that makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def write_properties(path, content):
    path = write_v2(path, draw_classes(0))
    Path(path).with_suffix(".pkl").write_bytes(content)
    return path


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("nested", [False, True])
def test_a_malicious_properties_file_is_refused_and_not_executed(tmp_path, protocol, nested):
    touched = tmp_path / "touched"
    properties = {**v2_properties(LPS, SHAPE), "x": [Malicious(touched)]} if nested else Malicious(touched)
    content = pickle.dumps(properties, protocol)
    path = write_properties(tmp_path / "p.npz", content)
    with pytest.raises(
        PatientError, match=r"p: the properties file asks for (posix|nt)\.system, .*p\.pkl; it was not read"
    ):
        read_prediction(path, SOFTMAX, "p", GEOMETRY)
    assert not touched.exists()
    pickle.loads(content)
    assert touched.exists()  # it would have worked


@pytest.mark.parametrize(
    ("content", "asked"),
    [
        (b"cbuiltins\neval\n(S'1'\ntR.", "builtins.eval"),
        (b"cnumpy\nload\n(S'x.npy'\ntR.", "numpy.load"),
        (b"cnumpy.core.multiarray\nfromfile\n.", "numpy.core.multiarray.fromfile"),
        (b"\x80\x04\x8c\x0bcollections\x8c\x14OrderedDict.fromkeys\x93.", "collections.OrderedDict.fromkeys"),
        (pickle.dumps({"affine": np.array([None])}), "the numpy type 'O8'"),
        (b"c_codecs\nencode\n(S'a'\nS'rot13'\ntR.", "the encoding 'rot13'"),
    ],
)
def test_whatever_properties_do_not_need_is_refused_by_name(tmp_path, content, asked):
    path = write_properties(tmp_path / "p.npz", content)
    with pytest.raises(PatientError) as raised:
        read_prediction(path, SOFTMAX, "p", GEOMETRY)
    assert f"the properties file asks for {asked}, which" in str(raised.value)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_properties_are_read_from_every_pickle_protocol(tmp_path, protocol):
    affine = AFFINES["oblique"]
    properties = v2_properties(np.asfortranarray(affine), SHAPE, "NibabelIO")
    path = write_nnunet(tmp_path / "p.npz", draw_classes(0), properties, protocol=protocol)
    assert read_prediction(path, SOFTMAX, "p", Geometry(SHAPE, affine)).shape == (3, *SHAPE)


@pytest.mark.parametrize("module", [b"numpy.core", b"numpy._core"])
def test_properties_of_numpy_1_and_2_are_read(tmp_path, module):
    affine = AFFINES["anisotropic"].astype(">f4")  # exact in float32, in the other byte order
    properties = {**v2_properties(affine, SHAPE, "NibabelIO"), "classes": np.float32(1), "names": np.array(["ab"])}
    content = pickle.dumps(properties, 2).replace(b"numpy._core", b"numpy.core").replace(b"numpy.core", module)
    assert module + b".multiarray\n_reconstruct" in content
    assert module + b".multiarray\nscalar" in content
    path = write_properties(tmp_path / "p.npz", content)
    assert read_prediction(path, SOFTMAX, "p", Geometry(SHAPE, affine.astype(float))).shape == (3, *SHAPE)


@pytest.mark.parametrize("content", [b"", b"no pickle", pickle.dumps(v2_properties(LPS, SHAPE))[:-40]])
def test_a_damaged_properties_file_is_refused(tmp_path, content):
    path = write_properties(tmp_path / "p.npz", content)
    with pytest.raises(PatientError, match=r"p: not a readable properties file .*p\.pkl; copy it again"):
        read_prediction(path, SOFTMAX, "p", GEOMETRY)


def test_probabilities_that_nnunets_ensemble_wrote_as_properties_are_named(tmp_path):
    path = write_properties(tmp_path / "p.npz", pickle.dumps(draw_classes(0)))
    with pytest.raises(
        PatientError, match=r"holds no dict of properties.*nnUNetv2_ensemble.*predictions that were averaged"
    ):
        read_prediction(path, SOFTMAX, "p", GEOMETRY)


@pytest.mark.parametrize(
    "properties",
    [
        {"spacing": [1.0, 1.0, 1.0]},  # of a reader of images without a grid
        {"sitk_stuff": {"spacing": (1.0, 1.0), "origin": (0.0, 0.0), "direction": (1.0, 0.0, 0.0, 1.0)}},
        {"nibabel_stuff": {"original_affine": np.eye(3)}},
        {"sitk_stuff": 1},
    ],
)
def test_properties_without_a_grid_are_refused(tmp_path, properties):
    path = write_nnunet(tmp_path / "p.npz", draw_classes(0), properties)
    with pytest.raises(PatientError, match=r"p: the properties beside the prediction do not say where it lies"):
        read_prediction(path, SOFTMAX, "p", GEOMETRY)


def test_properties_whose_affine_places_no_voxel_are_refused(tmp_path):
    path = write_v2(tmp_path / "p.npz", draw_classes(0), np.diag([1.0, 1, 1, 1]))
    flat = {"nibabel_stuff": {"original_affine": np.diag([1.0, 1, 0, 1])}}
    Path(path).with_suffix(".pkl").write_bytes(pickle.dumps(flat))
    with pytest.raises(PatientError, match=r"the affine of the properties, .*places no voxel"):
        read_prediction(path, SOFTMAX, "p", GEOMETRY)


# --- files ---


def test_the_companion_of_an_npz_is_its_properties_file():
    assert companions("fold_0/p.1.npz") == ["fold_0/p.1.pkl"]


@pytest.mark.parametrize("path", ["p.nii", "p.nii.gz"])
def test_a_nifti_file_needs_no_companion(path):
    assert companions(path) == []


@pytest.mark.parametrize("pattern", ["{patient}.npz", "{patient}_{pass}.npz"])
def test_an_npz_without_properties_names_the_file_that_is_expected(tmp_path, pattern):
    path = tmp_path / pattern.replace("{patient}", "p").replace("{pass}", "3")
    write_v2(path, draw_classes(0))
    assert find_passes(f"{tmp_path}/{pattern}", "p") == {0: str(path)}
    path.with_suffix(".pkl").unlink()
    expected = rf"p: .*there is no {path.with_suffix('.pkl')}; .*--save_probabilities"
    with pytest.raises(SegtrustError, match=expected):
        find_passes(f"{tmp_path}/{pattern}", "p")
    with pytest.raises(PatientError, match=expected):
        read_prediction(str(path), SOFTMAX, "p", GEOMETRY)


def test_passes_of_different_endings_are_gathered_together(tmp_path):
    passes = np.stack([draw_classes(seed) for seed in range(2)])
    paths = [write_v2(tmp_path / "0.npz", passes[0]), write_channels(tmp_path / "1.nii.gz", passes[1])]
    moments = gather(paths, outputs=SOFTMAX, deterministic=False, patient="p", geometry=GEOMETRY)
    mean = moments.place(moments.summary(2).probability)
    assert mean == pytest.approx(np.mean([regions_of(classes) for classes in passes], axis=0), abs=1e-6)


def test_memory_does_not_grow_with_the_number_of_passes(tmp_path):
    paths = [write_v2(tmp_path / f"{number}.npz", draw_classes(number)) for number in range(5)]

    def peak(files):
        tracemalloc.start()
        gather(files, outputs=SOFTMAX, deterministic=False, patient="p", geometry=GEOMETRY)
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    peak(paths)  # what is imported and cached once
    assert peak(paths) < peak(paths[:1]) + draw(0).nbytes / 2  # less than one pass more, where five are one block


def test_passes_may_lie_in_folders_of_their_own(tmp_path):
    for fold, patients in ((0, "ab"), (1, "ab"), (2, "b")):
        for patient in patients:
            (tmp_path / f"fold_{fold}").mkdir(exist_ok=True)
            (tmp_path / f"fold_{fold}" / f"{patient}.nii.gz").touch()
    pattern = f"{tmp_path}/fold_{{pass}}/{{patient}}.nii.gz"
    assert find_passes(pattern, "a") == {index: f"{tmp_path}/fold_{index}/a.nii.gz" for index in range(2)}
    assert list(find_passes(pattern, "b")) == [0, 1, 2]
    with pytest.raises(SegtrustError, match="c: no file matches"):
        find_passes(pattern, "c")


def test_the_number_of_a_pass_stands_in_a_path_once(tmp_path):
    with pytest.raises(SegtrustError, match="belongs into the path once"):
        find_passes(f"{tmp_path}/{{pass}}/{{patient}}_{{pass}}.nii.gz", "a")
