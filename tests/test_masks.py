"""Masks and bands of distance."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from segtrust import masks
from segtrust.volumes import bounding_box


def test_bits_stand_in_the_order_of_the_definitions():
    names = "volume brain brain_t1 predicted predicted_5mm plausible tumour_5mm union reference reference_5mm box"
    assert (*names.split(), "boundary_3mm") == masks.MASKS
    assert [int(bit) for bit in masks.BIT.values()] == [1 << k for k in range(12)]


def test_masks_made_of_the_reference_or_the_prediction_are_masks():
    assert set(masks.MASKS) > (masks.CONDITIONAL_ON_REFERENCE | masks.DEPENDS_ON_MODEL)


def test_the_reference_box_has_five_voxels_of_margin_clipped_to_the_grid():
    member = np.zeros((20, 20, 20), bool)
    member[2, 8:12, 17] = True
    assert masks.reference_box(member) == (slice(0, 8), slice(3, 17), slice(12, 20))


def test_an_empty_mask_has_no_box():
    assert masks.reference_box(np.zeros((4, 4, 4), bool)) is None


@given(st.lists(st.tuples(*[st.integers(0, 6)] * 3), min_size=1, max_size=5))
def test_the_bounding_box_is_the_smallest_that_holds_all(voxels):
    member = np.zeros((7, 7, 7), bool)
    member[tuple(np.array(voxels).T)] = True
    low, high = np.argwhere(member).min(axis=0), np.argwhere(member).max(axis=0)
    assert bounding_box(member) == tuple(slice(a, b + 1) for a, b in zip(low, high, strict=True))


@pytest.mark.parametrize(
    ("distance", "band"),
    [
        (-0.5, "inside_0_1mm"),
        (1.0, "outside_0_1mm"),
        (1.5, "outside_1_2mm"),
        (-5.0, "inside_3_5mm"),
        (70, "outside_over_10mm"),
    ],
)
def test_a_band_holds_its_upper_end(distance, band):
    assert masks.BANDS[masks.band_index(distance)] == band


def test_without_a_reference_there_is_no_band():
    assert masks.band_index(np.array([np.nan])) == -1


def test_a_distance_off_by_rounding_alone_is_within_the_limit():
    assert masks.within(np.float32(5.0000005), 5.0)
    assert not masks.within(np.array([5.001, np.nan]), 5.0).any()
