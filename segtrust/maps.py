"""Turn moments into maps of probability and uncertainty, in the patient's own space."""

from pathlib import Path

import numpy as np

from segtrust import measures
from segtrust.files import write_json
from segtrust.regions import codes_of, four_class, overlay
from segtrust.volumes import write_volume

MAPS = (
    "probability",
    "segmentation",
    "entropy",
    "expected_entropy",
    "mutual_information",
    "variance",
    "entropy_4class",
)


def make_map(name, summary, coding):
    """Return one map of a `Summary`, or None where it is undefined: a single pass has no spread.

    name : one of `MAPS`
    coding : the coding of the patient's labels, for `segmentation`

    Returns float32 (3, x, y, z) in the order WT, TC, ET; uint8 (x, y, z) for `segmentation`; float32 (x, y, z)
    for `entropy_4class`. Entropies are in bits, the four-class one divided by log2 4.
    """
    probability = summary.probability
    if name == "probability":
        return probability
    if name == "segmentation":
        return codes_of(overlay(probability >= 0.5), coding)
    if name == "entropy":
        return measures.binary_entropy(probability).astype(np.float32)
    if name == "expected_entropy":
        return summary.expected_entropy
    if name == "variance":
        return summary.variance
    if name == "entropy_4class":
        return measures.entropy_4class(four_class(probability)).astype(np.float32)
    if name == "mutual_information":
        if summary.passes == 1:
            return None
        return measures.mutual_information(probability, summary.expected_entropy).astype(np.float32)
    raise KeyError(name)


_UNITS = {
    "probability": "mean probability over passes; volumes WT, TC, ET",
    "segmentation": "labels; 0 is background",
    "entropy": "predictive entropy, bits; volumes WT, TC, ET",
    "expected_entropy": "mean entropy of the passes, bits; volumes WT, TC, ET",
    "mutual_information": "entropy - expected entropy, bits; volumes WT, TC, ET",
    "variance": "variance over passes; volumes WT, TC, ET",
    "entropy_4class": "four-class entropy / log2 4, in [0, 1]",
}


def write_maps(paths, moments, passes, coding, provenance):
    """Write maps of moments as NIfTI on the patient's own grid, each with its provenance as JSON beside it.

    paths : dict from the name of a map to its path (….nii.gz)
    passes : the number of passes of each source to use

    A map that is undefined is NaN everywhere.
    """
    summary = moments.summary(passes)
    for name, path in paths.items():
        volume = make_map(name, summary, coding)
        own = moments.place(summary.probability if volume is None else volume)
        if volume is None:
            own.fill(np.nan)
        write_volume(path, own, moments.geometry, f"segtrust: {_UNITS[name]}")
        write_json(sidecar(path), {"map": name, "meaning": _UNITS[name], "passes": summary.passes, **provenance})


def map_paths(paths, patient):
    """Return a dict from the name of a map to its path, for paths …/<patient>_<map>.nii.gz."""
    return {Path(path).name.removeprefix(f"{patient}_").removesuffix(".nii.gz"): path for path in paths}


def sidecar(path):
    """Return the path of the JSON file beside a NIfTI file."""
    return str(path).removesuffix(".nii.gz") + ".json"
