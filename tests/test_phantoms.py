"""Phantoms: the layout of BraTS 2021, brains with tumours in it, and the same ones every time."""

import csv
import hashlib
from functools import cache

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from segtrust.errors import SegtrustError
from segtrust.phantoms import MODALITIES, draw_traits, phantom, smooth_field, write_cohort
from segtrust.regions import canonical_labels, region_masks

SHAPE = (48, 54, 42)
PATIENTS = range(1, 17)
NECROSIS, OEDEMA, ENHANCING = 1, 2, 4


@cache
def drawn(index):
    """Return patient `index` of one cohort, drawn once for all tests."""
    return phantom(seed=5, index=index, shape=SHAPE)


def traits(index):
    """Return what was drawn for that patient before any voxel was."""
    return draw_traits(np.random.default_rng([5, index]))


def around(mask):
    """Return the shell from 1 to 3 voxels outside a mask."""
    return ndimage.binary_dilation(mask, iterations=3) & ~ndimage.binary_dilation(mask)


def white_matter(index):
    """Return the healthy voxels of a patient that are brightest on T1, where nothing else is as bright."""
    t1, labels = drawn(index).images["t1"], drawn(index).labels
    healthy = (labels == 0) & (t1 > 0)
    return healthy & (t1 > np.percentile(t1[healthy], 60))


def digests(folder):
    """Return file name → digest of its bytes for everything under a folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    """A cohort of three on a grid of three different sides, one patient in each of two splits."""
    folder = tmp_path_factory.mktemp("cohort")
    write_cohort(folder, 3, (30, 34, 26), seed=1, splits={"train": 1, "validation": 1})
    return folder


# ------------------------------------------------------------------------------------------------ repetition


def test_the_same_arguments_draw_the_same_patient():
    first, again = phantom(3, 2, (30, 34, 26)), phantom(3, 2, (30, 34, 26))
    assert np.array_equal(first.labels, again.labels)
    assert all(np.array_equal(first.images[name], again.images[name]) for name in MODALITIES)


def test_another_seed_draws_another_patient():
    assert not np.array_equal(phantom(3, 2, (30, 34, 26)).labels, phantom(4, 2, (30, 34, 26)).labels)


def test_another_index_draws_another_patient():
    assert not np.array_equal(drawn(1).labels, drawn(2).labels)


def test_files_are_byte_identical_when_written_again(cohort, tmp_path):
    write_cohort(tmp_path, 3, (30, 34, 26), seed=1, splits={"train": 1, "validation": 1})
    assert digests(tmp_path) == digests(cohort)


def test_a_larger_cohort_begins_with_the_patients_of_a_smaller_one(cohort, tmp_path):
    write_cohort(tmp_path, 4, (30, 34, 26), seed=1)
    larger = digests(tmp_path)
    scans = {name: digest for name, digest in digests(cohort).items() if name.endswith(".nii.gz")}
    assert scans.items() <= larger.items()


# ----------------------------------------------------------------------------------------------------- files


def test_files_have_the_names_of_brats_2021(cohort):
    names = {path.relative_to(cohort).as_posix() for path in cohort.rglob("*.nii.gz")}
    assert names == {f"phantom_000{i}/phantom_000{i}_{part}.nii.gz" for i in (1, 2, 3) for part in (*MODALITIES, "seg")}


@pytest.mark.parametrize(("part", "dtype"), [*((name, np.int16) for name in MODALITIES), ("seg", np.uint8)])
def test_files_have_the_number_types_of_brats_2021_and_no_scaling(cohort, part, dtype):
    image = nib.load(cohort / "phantom_0001" / f"phantom_0001_{part}.nii.gz")
    assert image.get_data_dtype() == dtype
    assert (image.dataobj.slope, image.dataobj.inter) == (1, 0)


@pytest.mark.parametrize("part", [*MODALITIES, "seg"])
def test_files_are_lps_with_1_mm_voxels_and_the_origin_of_brats_2021(cohort, part):
    image = nib.load(cohort / "phantom_0001" / f"phantom_0001_{part}.nii.gz")
    assert image.shape == (30, 34, 26)
    assert np.array_equal(image.affine, [[-1, 0, 0, 0], [0, -1, 0, 33], [0, 0, 1, 0], [0, 0, 0, 1]])
    assert nib.aff2axcodes(image.affine) == ("L", "P", "S")


@pytest.mark.parametrize("part", ["t1", "seg"])
def test_qform_and_sform_agree_in_scanner_space_and_millimetres(cohort, part):
    header = nib.load(cohort / "phantom_0001" / f"phantom_0001_{part}.nii.gz").header
    assert (int(header["qform_code"]), int(header["sform_code"])) == (1, 1)
    assert np.array_equal(header.get_qform(), header.get_sform())
    assert header.get_xyzt_units()[0] == "mm"


def test_written_files_hold_what_was_drawn(cohort):
    content = phantom(1, 2, (30, 34, 26))
    for part, array in {**content.images, "seg": content.labels}.items():
        stored = nib.load(cohort / "phantom_0002" / f"phantom_0002_{part}.nii.gz")
        assert np.array_equal(np.asanyarray(stored.dataobj), array)


def test_the_sheet_names_every_file_relative_to_itself(cohort):
    with (cohort / "patients.tsv").open(newline="") as lines:
        rows = list(csv.DictReader(lines, delimiter="\t"))
    assert list(rows[0]) == ["patient", "t1", "t1ce", "t2", "flair", "seg", "coding", "split"]
    assert {row["coding"] for row in rows} == {"brats2021"}
    assert all((cohort / row[part]).is_file() for row in rows for part in (*MODALITIES, "seg"))


def test_splits_are_given_out_in_order_and_the_rest_is_test(cohort):
    with (cohort / "patients.tsv").open(newline="") as lines:
        rows = list(csv.DictReader(lines, delimiter="\t"))
    assert [(row["patient"], row["split"]) for row in rows] == [
        ("phantom_0001", "train"),
        ("phantom_0002", "validation"),
        ("phantom_0003", "test"),
    ]


def test_splits_for_more_patients_than_there_are_are_refused(tmp_path):
    with pytest.raises(SegtrustError, match="at least 3"):
        write_cohort(tmp_path, 2, (30, 34, 26), seed=0, splits={"train": 3})
    assert not any(tmp_path.iterdir())


def test_a_grid_too_small_for_a_brain_is_refused():
    with pytest.raises(SegtrustError, match="24 voxels"):
        phantom(0, 1, (64, 64, 20))


# --------------------------------------------------------------------------------------------- brain, tumour


def test_smooth_fields_have_mean_0_and_variance_1_at_every_voxel():
    generator = np.random.default_rng(0)
    fields = np.array([smooth_field(generator, (6, 5, 7), 2.7) for _ in range(2000)])
    # standard errors over 2,000 fields: 0.022 of a mean, 0.032 of a variance; 5 of them for 210 voxels
    assert np.abs(fields.mean(axis=0)).max() < 0.11
    assert np.abs(fields.var(axis=0) - 1).max() < 0.16


def test_neighbouring_voxels_of_a_smooth_field_differ_little():
    field = smooth_field(np.random.default_rng(1), (40, 40, 40), 8)
    assert np.abs(np.diff(field, axis=0)).mean() < 0.2


@pytest.mark.parametrize("index", PATIENTS)
def test_all_modalities_are_zero_outside_one_and_the_same_brain(index):
    masks = [image > 0 for image in drawn(index).images.values()]
    assert all(np.array_equal(mask, masks[0]) for mask in masks)
    assert all(image.min() == 0 for image in drawn(index).images.values())
    assert not drawn(index).labels[~masks[0]].any()


@pytest.mark.parametrize("index", PATIENTS)
def test_the_brain_is_one_piece_that_leaves_the_grid_s_sides_empty(index):
    brain = drawn(index).images["t1"] > 0
    sizes = np.bincount(ndimage.label(brain)[0].ravel())[1:]
    assert sizes.max() > 0.99 * sizes.sum()
    assert 0.15 < brain.mean() < 0.40
    assert not brain[[0, -1]].any()


@pytest.mark.parametrize("index", PATIENTS)
def test_labels_are_codes_of_brats_2021_and_hold_a_tumour_with_a_core(index):
    labels = drawn(index).labels
    assert set(np.unique(labels)) <= {0, 1, 2, 4}
    whole, core, enhancing = region_masks(canonical_labels(labels, "brats2021", "phantom", "seg"))
    brain = (drawn(index).images["t1"] > 0).sum()
    assert enhancing.sum() <= core.sum() < whole.sum()
    assert 0.002 * brain < core.sum()
    assert whole.sum() < 0.3 * brain


def test_about_a_fifth_of_the_patients_do_not_enhance():
    share = np.mean([not traits(index).enhances for index in range(1, 401)])
    assert abs(share - 0.2) < 0.06  # three standard errors of a share of 0.2 in 400


@pytest.mark.parametrize("index", PATIENTS)
def test_only_patients_that_enhance_have_code_4(index):
    assert (drawn(index).labels == ENHANCING).any() == traits(index).enhances


def test_both_kinds_of_patients_occur_among_those_looked_at():
    assert {traits(index).enhances for index in PATIENTS} == {True, False}


def test_some_tumours_have_two_foci():
    assert {len(traits(index).lesions) for index in range(1, 41)} == {1, 2}


# ------------------------------------------------------------------------------------------------- contrasts


@pytest.mark.parametrize("index", [i for i in PATIENTS if traits(i).enhances])
def test_the_enhancing_rim_is_brighter_than_its_surroundings_on_t1ce(index):
    image, rim = drawn(index).images["t1ce"], drawn(index).labels == ENHANCING
    assert image[rim].mean() > 1.1 * image[around(rim) & (image > 0)].mean()


@pytest.mark.parametrize("index", PATIENTS)
def test_oedema_is_brighter_than_white_matter_on_flair_and_t2(index):
    images, oedema, white = drawn(index).images, drawn(index).labels == OEDEMA, white_matter(index)
    for name in ("flair", "t2"):
        assert np.median(images[name][oedema]) > 1.1 * np.median(images[name][white])


@pytest.mark.parametrize("index", PATIENTS)
def test_the_core_is_darker_than_white_matter_on_t1_and_brighter_on_t2(index):
    images, core, white = drawn(index).images, drawn(index).labels == NECROSIS, white_matter(index)
    assert np.median(images["t1"][core]) < 0.95 * np.median(images["t1"][white])
    assert np.median(images["t2"][core]) > 1.1 * np.median(images["t2"][white])


@pytest.mark.parametrize("index", PATIENTS)
def test_fluid_is_bright_on_t2_and_dark_on_t1_and_flair(index):
    images, labels = drawn(index).images, drawn(index).labels
    healthy = (labels == 0) & (images["t1"] > 0)
    fluid = healthy & (images["t2"] > np.percentile(images["t2"][healthy], 98))
    for name in ("t1", "flair"):
        assert images[name][fluid].mean() < 0.9 * np.median(images[name][healthy])


@pytest.mark.parametrize("name", MODALITIES)
def test_intensities_are_of_the_order_of_real_files(name):
    medians = [np.median(drawn(index).images[name][drawn(index).images[name] > 0]) for index in PATIENTS]
    assert all(300 < median < 4000 for median in medians)


def test_enhancement_is_clear_in_some_patients_and_faint_in_others():
    ratios = []
    for index in (i for i in PATIENTS if traits(i).enhances):
        image, rim = drawn(index).images["t1ce"], drawn(index).labels == ENHANCING
        ratios.append(image[rim].mean() / image[around(rim) & (image > 0)].mean())
    assert max(ratios) - 1 > 2 * (min(ratios) - 1)


def test_difficult_patients_have_more_noise_and_less_contrast():
    drawn_traits = [traits(index) for index in range(1, 201)]
    difficulty = [t.difficulty for t in drawn_traits]
    assert np.corrcoef(difficulty, [t.contrast_enhancing for t in drawn_traits])[0, 1] < -0.5
    assert np.corrcoef(difficulty, [t.noise["t1ce"] for t in drawn_traits])[0, 1] > 0.5


def test_a_finer_grid_shows_the_same_patient_with_a_brain_of_the_same_share():
    coarse, fine = (drawn(3).images["t1"] > 0), (phantom(5, 3, (64, 72, 56)).images["t1"] > 0)
    assert abs(coarse.mean() - fine.mean()) < 0.03


@pytest.mark.slow
def test_at_full_size_the_brain_takes_the_share_of_a_real_one():
    content = phantom(5, 1, (240, 240, 155))
    assert 0.14 < (content.images["t1"] > 0).mean() < 0.20  # 0.166 and 0.170 in two real files
    assert 5_000 < (content.labels > 0).sum() < 400_000
