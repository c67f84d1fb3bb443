"""Codings and regions."""

import numpy as np
import pytest
from scipy.special import softmax

from segtrust.errors import PatientError
from segtrust.outputs import region_probability
from segtrust.regions import (
    BACKGROUND,
    CLASSES,
    CODINGS,
    ED,
    ET,
    NCR,
    canonical_labels,
    class_regions,
    codes_of,
    four_class,
    overlay,
    region_masks,
)

EXPECTED = {
    "brats2021": {0: BACKGROUND, 1: NCR, 2: ED, 4: ET},
    "brats2023": {0: BACKGROUND, 1: NCR, 2: ED, 3: ET},
    "brats2024": {0: BACKGROUND, 1: NCR, 2: ED, 3: ET, 4: BACKGROUND},
    "msd": {0: BACKGROUND, 1: ED, 2: NCR, 3: ET},
}


@pytest.mark.parametrize("coding", CODINGS)
def test_each_coding_means_what_its_publishers_say(coding):
    codes = np.array(list(EXPECTED[coding]))
    assert canonical_labels(codes, coding, "p", "f").tolist() == list(EXPECTED[coding].values())


@pytest.mark.parametrize("coding", CODINGS)
def test_labels_come_back_from_the_codes_written_for_them(coding):
    labels = np.arange(4, dtype=np.uint8)
    assert canonical_labels(codes_of(labels, coding), coding, "p", "f").tolist() == [0, 1, 2, 3]


def test_float_labels_are_read_as_their_whole_numbers():
    assert canonical_labels(np.array([0.0, 3.0], np.float32), "brats2023", "p", "f").tolist() == [0, ET]


def test_an_unknown_code_is_named_with_its_count_and_the_fitting_coding():
    codes = np.array([0, 1, 2, 3, 3])
    with pytest.raises(PatientError, match=r"p7: seg has code 3 \(2 voxels\).*brats2021 \(0, 1, 2, 4\).*brats2023"):
        canonical_labels(codes, "brats2021", "p7", "f.nii")


def test_a_cavity_in_a_2023_file_asks_for_coding_2024():
    with pytest.raises(PatientError, match="is this coding: brats2024"):
        canonical_labels(np.array([0, 1, 2, 3, 4]), "brats2023", "p", "f")


def test_a_code_between_whole_numbers_is_an_error():
    with pytest.raises(PatientError, match=r"1\.5"):
        canonical_labels(np.array([0, 1.5]), "brats2021", "p", "f")


def test_the_coding_of_a_prediction_is_set_where_its_message_says():
    with pytest.raises(
        PatientError, match=r"p: the map has code 4 .* is this coding: brats2021 or .* Set it in there\."
    ):
        canonical_labels(np.array([0, 4]), "msd", "p", "f", name="the map", setting="there")


def test_many_unknown_codes_are_listed_briefly():
    with pytest.raises(PatientError, match=r"seg has code 0\.05 .* and 9,989 more, unknown in coding msd") as raised:
        canonical_labels(np.linspace(0.05, 0.95, 9_999), "msd", "p", "f")
    assert len(str(raised.value)) < 500


def test_a_code_that_is_no_number_is_an_error():
    with pytest.raises(PatientError, match=r"code nan \(1 voxels\)"):
        canonical_labels(np.array([0, np.nan]), "brats2021", "p", "f")


def test_a_cavity_is_no_tumour():
    labels = canonical_labels(np.array([4, 3]), "brats2024", "p", "f")
    assert region_masks(labels)[:, 0].tolist() == [False, False, False]


def test_regions_are_nested():
    labels = np.array([BACKGROUND, NCR, ED, ET], np.uint8)
    assert region_masks(labels).tolist() == [
        [False, True, True, True],
        [False, True, False, True],
        [False, False, False, True],
    ]


def test_regions_of_certain_classes_are_their_masks():
    labels = np.random.default_rng(0).integers(0, 4, (5, 6, 7)).astype(np.uint8)
    distribution = np.stack([labels == number for number in range(4)]).astype(np.float32)
    assert np.array_equal(class_regions(distribution, list(CLASSES)), region_masks(labels))


def test_regions_of_classes_are_those_of_a_network_with_this_softmax():
    order = ["ET", "background", "ED", "NCR"]
    logits = np.random.default_rng(1).normal(scale=4, size=(4, 5, 6, 7)).astype(np.float32)
    regions = class_regions(softmax(logits, axis=0), order)
    assert np.array_equal(regions, region_probability(logits[None], {"softmax": order})[0])


def test_regions_of_classes_are_undone_by_four_class():
    distribution = np.random.default_rng(2).dirichlet(np.ones(4), 50).T
    assert four_class(class_regions(distribution, list(CLASSES))) == pytest.approx(distribution)


def test_sums_of_classes_that_round_beyond_one_are_one():
    certain = np.array([[0], [0.7], [0.2], [0.1]], np.float16).astype(np.float32)
    assert certain.sum() > 1
    assert class_regions(certain, list(CLASSES))[0] == 1


def test_overlay_undoes_region_masks():
    labels = np.random.default_rng(0).integers(0, 4, (5, 6, 7)).astype(np.uint8)
    assert np.array_equal(overlay(region_masks(labels)), labels)


def test_overlay_of_broken_nesting_keeps_the_inner_region():
    assert overlay(np.array([[False], [False], [True]])).tolist() == [ET]


def test_four_classes_of_nested_means_are_their_differences():
    distribution = four_class(np.array([[0.9], [0.5], [0.2]]))
    assert distribution[:, 0] == pytest.approx([0.1, 0.3, 0.4, 0.2])


def test_four_classes_sum_to_one_where_nesting_is_broken():
    distribution = four_class(np.array([[0.2], [0.5], [0.7]]))
    assert distribution.sum(axis=0) == pytest.approx(1)
    assert (distribution >= 0).all()
