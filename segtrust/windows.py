"""What part of a scan a network sees: crop, padding, orientation, channel order and sliding windows.

All of these are the model's. A `View` remembers how to bring the network's output back.
"""

from dataclasses import dataclass

import numpy as np
from monai.inferers import sliding_window_inference
from nibabel.orientations import axcodes2ornt

from segtrust.preprocess import MODALITIES


@dataclass(frozen=True)
class View:
    """A scan as one network sees it.

    image : float32 (channels, x, y, z), in the network's channel order, orientation and padding
    keep : slices of the canonical padded grid that lie inside the patient's grid
    start : (3,) where the kept part begins in the canonical grid, voxels
    order, flipped : how the canonical axes were permuted, and which of the resulting axes were reversed
    """

    image: np.ndarray
    keep: tuple
    start: tuple
    order: tuple
    flipped: tuple

    @property
    def shape(self):
        """Return the shape of the kept part, (x, y, z), canonical."""
        return tuple(side.stop - side.start for side in self.keep)

    def back(self, array):
        """Return an array (n, x, y, z) in the network's orientation as canonical, cut to the kept part."""
        turned = np.flip(array, [axis + 1 for axis in self.flipped])
        canonical = turned.transpose(0, *(1 + np.argsort(self.order)))
        return np.ascontiguousarray(canonical[(slice(None), *self.keep)])


def view(scan, *, channels, crop, divisor, orientation, flip):
    """Return the View of a preprocessed scan that a network gets.

    scan : Preprocessed
    channels : the modalities in the network's order, such as ["t1ce", "t1", "t2", "flair"]
    crop : "foreground" (the brain box), "none" (the whole grid), or {"center": [x, y, z]} (about the middle of the
        whole grid, as MONAI's CenterSpatialCrop; zeros where the grid is smaller)
    divisor : sides are padded with zeros, equally on both ends (the odd voxel behind, as MONAI), to its multiples
    orientation : axis codes such as "RAS", or "stored" for that of the patient's files
    flip : axes (0, 1, 2 of the network's orientation) along which the network sees the scan reversed
    """
    order, reversed_axes = _turn(scan.geometry.orientation if orientation == "stored" else orientation)
    flipped = tuple(sorted(set(reversed_axes) ^ set(flip)))
    low, high = _bounds(scan, crop)
    grid = scan.geometry.canonical_shape
    start = tuple(max(first, 0) for first in low)
    stop = tuple(min(last, side) for last, side in zip(high, grid, strict=True))
    padded = [-(-(last - first) // divisor) * divisor for first, last in zip(low, high, strict=True)]
    origin = [first - (size - (last - first)) // 2 for first, last, size in zip(low, high, padded, strict=True)]
    image = np.zeros((len(channels), *padded), np.float32)
    target, source = [], []
    for axis, side in enumerate(scan.image.shape[1:]):
        first = max(scan.start[axis], start[axis])
        last = max(min(scan.start[axis] + side, stop[axis]), first)
        target.append(slice(first - origin[axis], last - origin[axis]))
        source.append(slice(first - scan.start[axis], last - scan.start[axis]))
    for channel, modality in enumerate(channels):
        image[(channel, *target)] = scan.image[(MODALITIES.index(modality), *source)]
    return View(
        image=np.ascontiguousarray(
            np.flip(image.transpose(0, *(1 + axis for axis in order)), [axis + 1 for axis in flipped])
        ),
        keep=tuple(slice(first - begin, last - begin) for first, last, begin in zip(start, stop, origin, strict=True)),
        start=start,
        order=order,
        flipped=flipped,
    )


def slide(image, predict, window, overlap):
    """Return logits (1, channels, x, y, z) of an image tensor (1, channels, x, y, z).

    predict : function from one window (1, channels, x, y, z) to its logits
    window : (x, y, z) of sliding windows, whose overlapping logits are averaged (MONAI's sliding_window_inference);
        None to predict the image as one
    overlap : of neighbouring windows, in [0, 1)
    """
    if window is None:
        return predict(image)
    return sliding_window_inference(image, window, 1, predict, overlap=overlap)


def padded(image, divisor):
    """Return (image padded with zeros to multiples of a divisor, slices of the original inside it).

    image : (channels, x, y, z); equal padding on both ends, the odd voxel behind
    """
    missing = [-side % divisor for side in image.shape[1:]]
    width = [(0, 0), *((lack // 2, lack - lack // 2) for lack in missing)]
    inside = tuple(slice(low, low + side) for (low, _), side in zip(width[1:], image.shape[1:], strict=True))
    return np.pad(image, width), inside


def _bounds(scan, crop):
    """Return where a crop begins and ends in the canonical grid; it may reach beyond."""
    grid = scan.geometry.canonical_shape
    if crop == "none":
        return (0, 0, 0), grid
    if crop == "foreground":
        return tuple(scan.start), tuple(
            first + side for first, side in zip(scan.start, scan.image.shape[1:], strict=True)
        )
    low = []
    for side, size in zip(grid, crop["center"], strict=True):
        low.append(side // 2 - size // 2 if side >= size else -((size - side) // 2))
    return tuple(low), tuple(first + size for first, size in zip(low, crop["center"], strict=True))


def _turn(codes):
    """Return (order, reversed axes) that turn canonical axes into an orientation such as ("L", "P", "S")."""
    orientation = axcodes2ornt(tuple(codes))
    order = tuple(int(axis) for axis in orientation[:, 0])
    return order, tuple(axis for axis in range(3) if orientation[axis, 1] < 0)
