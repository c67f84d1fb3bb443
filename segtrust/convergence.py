"""Convergence: what a patient's metrics were after fewer passes (definitions, section 10).

Moments are kept in blocks, so that the means after 5, 10, 20, … passes of each source are still known. From them follow
tallies of what is reported against the number of passes: entropy, mutual information and the calibration of the
probability on two masks, and Dice.
"""

import numpy as np

from segtrust.masks import BIT, predicted_5mm
from segtrust.regions import REGIONS
from segtrust.sources import block_ends
from segtrust.tally import PROBABILITY, Columns, tally_columns

CONVERGENCE_MASKS = ("brain", "predicted_5mm")
CONVERGENCE_MEASURES = ("entropy", "mutual_information")


def convergence(moments, passes, labels, brain, spacing_mm):
    """Return the tallies of a patient after fewer passes, a dict from their number to a `segtrust.tally.Tally`.

    moments : `segtrust.moments.Moments`
    passes : T of each source; the numbers in the result are of all sources together, and smaller
    labels : uint8 (x, y, z), canonical, on the patient's own grid
    brain : bool (x, y, z)
    spacing_mm : (3,) voxel size along the axes of the arrays
    """
    tallies = {}
    for end in block_ends(passes)[:-1]:
        summary = moments.summary(end)
        means = moments.place(summary.probability), moments.place(summary.expected_entropy)
        tallies[summary.passes] = tally_of_means(*means, labels, brain, spacing_mm)
    return tallies


def tally_of_means(probability, expected_entropy, labels, brain, spacing_mm):
    """Return the brief tally of means over passes: no deterministic pass, no distances, two masks.

    probability, expected_entropy : float32 (3, x, y, z)

    Its counts are those of the whole volume, as reference voxels in neither mask are counted too.
    """
    predicted = probability >= np.float32(0.5)
    near = [predicted_5mm(member, spacing_mm) for member in predicted]
    index = np.flatnonzero(brain | (labels > 0) | near[0] | near[1] | near[2])

    def rows(array):
        return array.reshape(-1)[index]

    in_brain = rows(brain) * BIT["brain"]
    columns = Columns(
        labels=rows(labels),
        prediction=None,
        cavity=None,
        probability=[rows(region) for region in probability],
        deterministic=None,
        expected_entropy=[rows(region).astype(np.float16) for region in expected_entropy],
        member_entropy=None,
        variance=None,
        distance_predicted=None,
        distance_reference=[np.full(len(index), np.nan, np.float16)] * len(REGIONS),
        masks=[in_brain | rows(member) * BIT["predicted_5mm"] for member in near],
    )
    return tally_columns(columns, {}, {*CONVERGENCE_MEASURES, PROBABILITY}, brief=True)
