"""Masks: which voxels count (definitions, section 3).

A voxel's membership in all masks of a region is one uint16: bit k stands for `MASKS[k]`.
"""

import numpy as np
from scipy import ndimage

from segtrust.volumes import bounding_box

MASKS = (
    "volume",
    "brain",
    "brain_t1",
    "predicted",
    "predicted_5mm",
    "plausible",
    "tumour_5mm",
    "union",
    "reference",
    "reference_5mm",
    "box",
    "boundary_3mm",
)
BIT = {mask: np.uint16(1 << position) for position, mask in enumerate(MASKS)}

# selecting on the reference selects on the outcome: a calibrated model has ECE > 0 there
CONDITIONAL_ON_REFERENCE = {"tumour_5mm", "union", "reference", "reference_5mm", "box", "boundary_3mm"}
# these hold different voxels for different models
DEPENDS_ON_MODEL = {"predicted", "predicted_5mm", "plausible", "tumour_5mm", "union", "boundary_3mm"}

# distance to the reference surface (definitions, section 7); the signed bands divide the voxels among them
BAND_EDGES_MM = (0, 1, 2, 3, 5, 10, np.inf)
_WIDTHS = ("0_1mm", "1_2mm", "2_3mm", "3_5mm", "5_10mm", "over_10mm")
BANDS = tuple(f"{side}_{width}" for side in ("inside", "outside") for width in _WIDTHS)

PLAUSIBLE_ABOVE = 0.02
DILATION_MM = 5.0
BOUNDARY_MM = 3.0
BOX_MARGIN_VOXELS = 5

# a distance that is 5 mm on paper may come out as 5.0000005 from a float32 transform
_ROUNDING = 1 + 1e-6


def within(distance, limit_mm):
    """Return where a distance (mm; NaN is nowhere) is at most a limit, allowing for rounding."""
    with np.errstate(invalid="ignore"):
        return distance <= limit_mm * _ROUNDING


def reference_box(membership):
    """Return the bounding box of a mask plus 5 voxels, clipped, as slices; None for an empty mask.

    membership : bool (x, y, z)
    """
    box = bounding_box(membership)
    return None if box is None else padded(box, (BOX_MARGIN_VOXELS,) * membership.ndim, membership.shape)


def padded(box, margins, shape):
    """Return a box (slices) grown by a margin per axis (voxels), clipped to a shape."""
    return tuple(
        slice(max(side.start - margin, 0), min(side.stop + margin, size))
        for side, margin, size in zip(box, margins, shape, strict=True)
    )


def band_index(distance_reference):
    """Return the index into `BANDS` of signed distances to the reference surface; -1 where it is NaN.

    distance_reference : float array, mm, negative inside; a band holds its upper end
    """
    distance = np.asarray(distance_reference, np.float64)
    band = np.searchsorted(np.array(BAND_EDGES_MM[1:-1]) * _ROUNDING, np.abs(distance), side="left")
    band = band + np.where(distance > 0, len(_WIDTHS), 0)
    return np.where(np.isnan(distance), -1, band)


def predicted_5mm(predicted, spacing_mm):
    """Return the mask `predicted_5mm` of a predicted region, bool (x, y, z).

    predicted : bool (x, y, z); spacing_mm : (3,)
    """
    near = np.zeros_like(predicted)
    inner = bounding_box(predicted)
    if inner is not None:
        margins = [int(DILATION_MM / side) + 1 for side in spacing_mm]
        around = padded(inner, margins, predicted.shape)
        near[around] = within(ndimage.distance_transform_edt(~predicted[around], spacing_mm), DILATION_MM)
    return near
