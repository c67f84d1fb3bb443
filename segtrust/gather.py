"""Gather predictions made elsewhere into moments: each file is one pass.

Accepted are 4-D NIfTI files of region probabilities, channels last, in the order of the model's `outputs`. They must
lie on the patient's own grid; nothing is resampled or repaired.
"""

import os
import re
from functools import cache
from pathlib import Path

import numpy as np

from segtrust.errors import PatientError, SegtrustError
from segtrust.moments import Accumulator
from segtrust.regions import REGIONS
from segtrust.volumes import bounding_box, geometry_of, load_image, read_voxels


def find_passes(pattern, patient):
    """Return the files of a patient's passes, a dict from pass number to path.

    pattern : path with `{patient}` and perhaps `{pass}` (a whole number, from any start, without gaps); without
        `{pass}` there is one deterministic prediction

    Raises SegtrustError when nothing matches, or passes are missing between the first and the last.
    """
    filled = pattern.replace("{patient}", patient)
    if "{pass}" not in filled:
        if not Path(filled).is_file():
            raise SegtrustError(f"{patient}: no prediction {filled}")
        return {0: filled}
    folder, name = Path(filled).parent, Path(filled).name
    if "{pass}" in str(folder) or name.count("{pass}") > 1:
        raise SegtrustError(f"predictions: {{pass}} belongs into the file name, once, and into no folder: {pattern}")
    before, after = name.split("{pass}")
    numbered = re.compile(re.escape(before) + r"(\d+)" + re.escape(after))
    found = {}
    for entry in _names_in(folder):
        match = numbered.fullmatch(entry)
        if match:
            number, path = int(match[1]), str(folder / entry)
            if number in found:
                raise SegtrustError(f"{patient}: two files are pass {number}: {found[number]} and {path}")
            found[number] = path
    if not found:
        raise SegtrustError(f"{patient}: no file matches {filled}")
    numbers = sorted(found)
    missing = sorted(set(range(numbers[0], numbers[-1] + 1)) - set(numbers))
    if missing:
        raise SegtrustError(
            f"{patient}: passes {', '.join(map(str, missing))} are missing between {numbers[0]} and "
            f"{numbers[-1]} of {filled}"
        )
    return {index: found[number] for index, number in enumerate(numbers)}


@cache
def _names_in(folder):
    # patients often share one folder: it is listed once, not once per patient
    return sorted(os.listdir(folder)) if folder.is_dir() else []


def read_prediction(path, outputs, patient, geometry):
    """Read one prediction as region probabilities, float32 (3, x, y, z), order WT, TC, ET, patient's own grid.

    outputs : the regions in the order of the file's channels

    Raises PatientError for another grid, another number of channels, and values that are no probabilities.
    """
    image = load_image(path, patient)
    found = geometry_of(image)
    if not found.agrees_with(geometry):
        raise PatientError(
            f"{patient}: the prediction lies on another grid than the scan: {found.describe()}; expected "
            f"{geometry.describe()}: {path}; export it on the scan's grid."
        )
    if len(image.shape) != 4 or image.shape[3] != len(REGIONS):
        raise PatientError(
            f"{patient}: the prediction has shape {image.shape}, expected (x, y, z, 3) with channels "
            f"{', '.join(outputs)}: {path}"
        )
    voxels = read_voxels(image, patient, path)
    low, high = float(voxels.min()), float(voxels.max())
    if low < 0 or high > 1:
        raise PatientError(
            f"{patient}: probabilities reach from {low:g} to {high:g}, expected [0, 1]; are these logits, or "
            f"percentages? File: {path}"
        )
    return np.stack([voxels[..., outputs.index(region)] for region in REGIONS])


def gather(paths, *, outputs, deterministic, patient, geometry):
    """Return the moments of a patient's predictions.

    paths : list of files, one per pass
    outputs : the regions in the order of the files' channels
    deterministic : whether these are deterministic predictions, of which there is one, which then is the deterministic
        pass too
    geometry : the patient's own grid

    The moments are cropped to the box outside which every pass is zero.
    """
    accumulator = Accumulator(geometry.canonical_shape)
    occupied = np.zeros(geometry.canonical_shape, bool)
    for index, path in enumerate(paths):
        probability = geometry.to_canonical(read_prediction(path, outputs, patient, geometry))
        occupied |= (probability > 0).any(axis=0)
        accumulator.add(index, probability)
        if deterministic:
            accumulator.set_deterministic(probability)
        print(f"{patient}: pass {index + 1} of {len(paths)}, {path}", flush=True)
    box = bounding_box(occupied) or (slice(0, 1),) * 3
    return accumulator.moments((0, 0, 0), geometry).crop(box)
