"""Scores: what is known of one patient under one model, region by region, with a reference or without one.

The numbers of a patient with a reference are functions of its tally, as the cohort's are. A patient without one has the
same scores of uncertainty and the same volumes: they come from a tally against an empty reference, of which only what
depends on no reference is kept.
"""

import math

import numpy as np

from segtrust.cohort import AGGREGATIONS, CASE, PAIRWISE_DICE, PREDICTED_VOLUME, cases_of
from segtrust.measures import MEASURES, MEMBER_MEASURES
from segtrust.pool import HeldTally
from segtrust.regions import REGIONS
from segtrust.tally import PROBABILITY, Tally
from segtrust.values import Key
from segtrust.voxels import voxels

N_BINS = 15

# numbers of a case that need no reference
WITHOUT_REFERENCE = (
    *("volume_ml", "volume_median_ml", "volume_low_ml", "volume_high_ml"),
    *("pairwise_dice", "missing_region"),
)
WITH_REFERENCE = (
    *("dice", "dice_deterministic", "delta_dice", "sensitivity", "precision", "hd95", "nsd_1mm"),
    *("reference_ml", "volume_error_ml", "both_empty"),
)
# metrics of voxels that a patient's page shows: name -> (mask, measure, metric, bins)
VOXEL_METRICS = {
    "auroc": ("brain", "entropy", "auroc", None),
    "auroc_deterministic": ("brain", "deterministic_entropy", "auroc", None),
    "auroc_boundary": ("brain", "boundary_proximity", "auroc", None),
    "ece_class_probability": ("predicted_5mm", PROBABILITY, "ece_class_probability", N_BINS),
    "ece_top_label": ("predicted_5mm", PROBABILITY, "ece_top_label", N_BINS),
    "gap": ("predicted_5mm", PROBABILITY, "gap", None),
}


def numbers_of(source):
    """Return the numbers of one patient, a dict from region to a dict from name to a number, None for null.

    source : `segtrust.pool.StoredTally` or `HeldTally` of the patient

    Names are those of the columns of `patients.parquet` (definitions, sections 2, 4 and 8), and `VOXEL_METRICS`.
    """
    numbers = {}
    for region in REGIONS:
        case = cases_of([source], region)
        found = {name: case[name][0] for name in (*WITHOUT_REFERENCE, *WITH_REFERENCE)}
        found |= _scores(case["scores"])
        found |= {name: source.metrics.get(Key(region, *key), math.nan) for name, key in VOXEL_METRICS.items()}
        numbers[region] = {name: _plain(value) for name, value in found.items()}
    return numbers


def _scores(scores):
    keys = [(aggregation, measure) for aggregation in AGGREGATIONS for measure in (*MEASURES, *MEMBER_MEASURES)]
    keys += [(CASE, PAIRWISE_DICE), (CASE, PREDICTED_VOLUME)]
    return {"score_{}_{}".format(*key): scores[key][0] for key in keys if key in scores}


def _plain(value):
    if isinstance(value, bool | np.bool_):
        return bool(value)
    return float(value) if math.isfinite(value) else None


def score(summary, brain, brain_t1, *, spacing_mm, patient):
    """Return the numbers of a patient without a reference, in the form of `numbers_of`.

    Arguments are those of `segtrust.voxels.voxels`.
    """
    empty = np.zeros(brain.shape, np.uint8)
    table = voxels(summary, empty, brain, brain_t1, spacing_mm=spacing_mm, patient=patient)
    return {
        region: {name: value for name, value in found.items() if name in WITHOUT_REFERENCE or name.startswith("score_")}
        for region, found in numbers_of(HeldTally(Tally.of(table))).items()
    }
