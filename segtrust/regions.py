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

# a probability map taken for labels has millions of codes
N_LISTED = 10

_WRITTEN_CODES = {
    "brats2021": (0, 1, 2, 4),
    "brats2023": (0, 1, 2, 3),
    "brats2024": (0, 1, 2, 3),
    "msd": (0, 2, 1, 3),
}


def canonical_labels(codes, coding, patient, path, *, name="seg", setting="the column `coding` of the sheet"):
    """Translate the codes of a label file into canonical labels.

    codes : array of any shape and number type, as stored in the file
    coding : a key of `CODINGS`
    patient, path, name, setting : for the message only; what the file is, and where its coding is set

    Returns a uint8 array of the same shape. Raises PatientError for codes the coding does not know (naming
    each of the first `N_LISTED` with its voxel count) and for values that are no whole numbers.
    """
    known = CODINGS[coding]
    codes = np.asarray(codes)
    found, counts = np.unique(codes, return_counts=True)
    unknown = ~np.isin(found, list(known))
    if unknown.any():
        listed = zip(found[unknown][:N_LISTED], counts[unknown][:N_LISTED], strict=True)
        told = ", ".join(f"code {value:g} ({count:,} voxels)" for value, count in listed)
        more = f" and {unknown.sum() - N_LISTED:,} more" if unknown.sum() > N_LISTED else ""
        expected = ", ".join(str(code) for code in known)
        raise PatientError(
            f"{patient}: {name} has {told}{more}, unknown in coding {coding} ({expected}); "
            f"{_coding_hint(found, coding, setting)} File: {path}"
        )
    labels = np.zeros(codes.shape, np.uint8)
    for code, label in known.items():
        if label:
            labels[codes == code] = label
    return labels


def _coding_hint(found, coding, setting):
    fitting = [
        name
        for name, known in CODINGS.items()
        if name != coding and all(np.isfinite(value) and value in known for value in found)
    ]
    if fitting:
        return f"is this coding: {' or '.join(fitting)}? Set it in {setting}."
    return "no known coding has all of these codes; check the file."


def codes_of(labels, coding):
    """Translate canonical labels (uint8, any shape) into the codes of a coding."""
    return np.array(_WRITTEN_CODES[coding], np.uint8)[labels]


def region_masks(labels):
    """Return membership in WT, TC, ET as bool of shape (3, *labels.shape), from canonical labels."""
    enhancing = labels == ET
    core = enhancing | (labels == NCR)
    return np.stack([core | (labels == ED), core, enhancing])


def class_regions(distribution, order):
    """Return probabilities of WT, TC, ET from probabilities of the four classes.

    distribution : float array (4, …), values in [0, 1] that sum to one along the first axis
    order : the names of `CLASSES` in the order of the first axis

    Returns an array (3, …) of the same type (definitions, section 1): P(WT) = P(NCR) + P(ED) + P(ET),
    P(TC) = P(NCR) + P(ET), P(ET), at most 1, which rounding of the sums may exceed.
    """
    necrotic, oedema, enhancing = (distribution[order.index(name)] for name in ("NCR", "ED", "ET"))
    core = necrotic + enhancing
    return np.minimum(np.stack([core + oedema, core, enhancing]), 1)


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
