"""Label codings of BraTS files, and the three nested regions made of them.

Every array of regions has them on its first axis in the order of `REGIONS`. Canonical labels inside the
project are 0 background, 1 necrotic or non-enhancing core (NCR), 2 oedema (ED), 3 enhancing tumour (ET).
"""

import numpy as np

from segtrust.errors import PatientError

REGIONS = ("WT", "TC", "ET")
BACKGROUND, NCR, ED, ET = range(4)
CLASSES = ("background", "NCR", "ED", "ET")

# code in the file -> canonical label; BraTS 2024 codes the resection cavity as 4, which is no tumour
CODINGS = {
    "brats2021": {0: BACKGROUND, 1: NCR, 2: ED, 4: ET},
    "brats2023": {0: BACKGROUND, 1: NCR, 2: ED, 3: ET},
    "brats2024": {0: BACKGROUND, 1: NCR, 2: ED, 3: ET, 4: BACKGROUND},
    "msd": {0: BACKGROUND, 1: ED, 2: NCR, 3: ET},
}

CAVITY_CODES = {"brats2024": 4}

_WRITTEN_CODES = {
    "brats2021": (0, 1, 2, 4),
    "brats2023": (0, 1, 2, 3),
    "brats2024": (0, 1, 2, 3),
    "msd": (0, 2, 1, 3),
}


def canonical_labels(codes, coding, patient, path):
    """Translate the codes of a label file into canonical labels.

    codes : array of any shape and number type, as stored in the file
    coding : a key of `CODINGS`
    patient, path : for the message only

    Returns a uint8 array of the same shape. Raises PatientError for codes the coding does not know (naming
    each with its voxel count) and for values that are no whole numbers.
    """
    known = CODINGS[coding]
    codes = np.asarray(codes)
    found, counts = np.unique(codes, return_counts=True)
    unknown = [
        f"code {value:g} ({count:,} voxels)"
        for value, count in zip(found, counts, strict=True)
        if not np.isfinite(value) or value not in known
    ]
    if unknown:
        expected = ", ".join(str(code) for code in known)
        raise PatientError(
            f"{patient}: seg has {', '.join(unknown)}, unknown in coding {coding} ({expected}); "
            f"{_coding_hint(found, coding)} File: {path}"
        )
    labels = np.zeros(codes.shape, np.uint8)
    for code, label in known.items():
        if label:
            labels[codes == code] = label
    return labels


def _coding_hint(found, coding):
    fitting = [
        name
        for name, known in CODINGS.items()
        if name != coding and all(np.isfinite(value) and value in known for value in found)
    ]
    if fitting:
        return f"is this coding: {' or '.join(fitting)}? Set it in the column `coding` of the sheet."
    return "no known coding has all of these codes; check the file."


def codes_of(labels, coding):
    """Translate canonical labels (uint8, any shape) into the codes of a coding."""
    return np.array(_WRITTEN_CODES[coding], np.uint8)[labels]


def region_masks(labels):
    """Return membership in WT, TC, ET as bool of shape (3, *labels.shape), from canonical labels."""
    enhancing = labels == ET
    core = enhancing | (labels == NCR)
    return np.stack([core | (labels == ED), core, enhancing])


def overlay(membership):
    """Return canonical labels from region membership: WT is laid first, then TC, then ET.

    membership : bool array (3, …) in the order of `REGIONS`; regions need not be nested
    """
    labels = np.where(membership[0], np.uint8(ED), np.uint8(BACKGROUND))
    labels[membership[1]] = NCR
    labels[membership[2]] = ET
    return labels


def four_class(probability):
    """Return the four-class distribution that mean region probabilities imply.

    probability : float array (3, …), values in [0, 1], order WT, TC, ET

    Returns an array (4, …) in the order of `CLASSES` that sums to one (definitions, section 1): ET = p_ET,
    NCR = max(p_TC - p_ET, 0), ED = max(p_WT - p_TC, 0), background = 1 - p_WT, renormalised.
    """
    whole, core, enhancing = probability
    distribution = np.stack([1 - whole, np.maximum(core - enhancing, 0), np.maximum(whole - core, 0), enhancing])
    return distribution / distribution.sum(axis=0)
