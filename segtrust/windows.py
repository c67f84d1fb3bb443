"""What part of a scan a network sees: crop, padding, orientation, channel order and sliding windows.

All of these are the model's. A `View` remembers how to bring the network's output back.
"""

from dataclasses import dataclass
from itertools import product

import numpy as np
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

    @property
    def inside(self):
        """Return where the kept part lies in the network's orientation, three slices."""
        turned = [self.keep[axis] for axis in self.order]
        for axis in self.flipped:
            size, side = self.image.shape[1 + axis], turned[axis]
            turned[axis] = slice(size - side.stop, size - side.start)
        return tuple(turned)

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


def slide(image, predict, window, overlap, at_once=1):
    """Return logits (passes, channels, x, y, z) of an image (channels, x, y, z); overlapping windows are averaged.

    predict : function from (windows (n, channels, …), number of the first) to logits (n, passes, channels, …);
        NumPy arrays or tensors alike
    window : (x, y, z) of sliding windows, laid as MONAI's sliding_window_inference lays them (constant weights); None
        to predict the image as one
    overlap : of neighbouring windows, in [0, 1)
    at_once : windows given to `predict` together
    """
    if window is None:
        return predict(image[None], 0)[0]
    image, inside = _at_least(image, window)
    places = window_places(tuple(image.shape[1:]), window, overlap)
    total, count = None, np.zeros(tuple(image.shape[1:]), np.float32)
    for first in range(0, len(places), at_once):
        chosen = places[first : first + at_once]
        logits = predict(_stacked([image[(slice(None), *place)] for place in chosen]), first)
        if total is None:
            total = _zeros_like(logits, (*logits.shape[1:3], *image.shape[1:]))
        for place, part in zip(chosen, logits, strict=True):
            total[(..., *place)] += part
            count[place] += 1
    total /= count if isinstance(total, np.ndarray) else total.new_tensor(count)
    return total[(..., *inside)]


def window_places(shape, window, overlap):
    """Return where windows lie in an image at least as large, a list of tuples of three slices, last axis fastest."""
    starts = []
    for side, size in zip(shape, window, strict=True):
        step = size if side == size else max(int(size * (1 - overlap)), 1)
        n_windows = -(-(side - size) // step) + 1
        starts.append([min(index * step, side - size) for index in range(n_windows)])
    return [
        tuple(slice(first, first + size) for first, size in zip(corner, window, strict=True))
        for corner in product(*starts)
    ]


def _at_least(image, window):
    """Return (image padded with zeros to at least a window, equally on both ends; where the original lies in it)."""
    missing = [max(size - side, 0) for side, size in zip(image.shape[1:], window, strict=True)]
    inside = tuple(slice(lack // 2, lack // 2 + side) for lack, side in zip(missing, image.shape[1:], strict=True))
    if not any(missing):
        return image, inside
    larger = _zeros_like(
        image, (image.shape[0], *(side + lack for side, lack in zip(image.shape[1:], missing, strict=True)))
    )
    larger[(slice(None), *inside)] = image
    return larger, inside


def _zeros_like(array, shape):
    return np.zeros(shape, array.dtype) if isinstance(array, np.ndarray) else array.new_zeros(shape)


def _stacked(arrays):
    if isinstance(arrays[0], np.ndarray):
        return np.stack(arrays)
    larger = arrays[0].new_empty((len(arrays), *arrays[0].shape))
    for place, array in zip(larger, arrays, strict=True):
        place.copy_(array)
    return larger


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
