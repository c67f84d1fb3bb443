"""Numbers of one patient: those of the cohort where there is a reference, and as much of them without one."""

import numpy as np
import pandas as pd
import pytest
from drawn_pages import drawn

from segtrust.cohort import cohort
from segtrust.patients import CASE_COLUMNS
from segtrust.pool import HeldTally
from segtrust.regions import REGIONS
from segtrust.score import VOXEL_METRICS, WITH_REFERENCE
from segtrust.tally import Tally
from segtrust.voxels import voxels


@pytest.fixture(scope="module")
def known():
    return drawn()


@pytest.fixture(scope="module")
def unknown():
    return drawn(reference=False)


@pytest.fixture(scope="module")
def tables(known):
    """The cohort's tables of this one patient."""
    table = voxels(known.summary, known.labels, known.scan.brain, known.scan.brain_t1,
                   spacing_mm=known.scan.geometry.spacing_mm, patient="p0")  # fmt: skip
    row = pd.DataFrame([{"patient": "p0", "subject": "p0", "split": "test"}])
    settings = {"n_resamples": 100, "failure_dice": 0.8, "seed": 0, "n_bins": [15]}
    return cohort([HeldTally(Tally.of(table))], row, model="m", **settings)


@pytest.mark.parametrize("region", REGIONS)
def test_numbers_are_those_of_the_cohorts_table_of_patients(known, tables, region):
    row = tables["patients"].to_pandas().set_index("region").loc[region]
    columns = [name for name in row.index if name in CASE_COLUMNS or name.startswith("score_")]
    shared = [name for name in columns if name in known.numbers[region]]
    assert {"dice", "hd95", "volume_ml", "pairwise_dice", "score_predicted_5mm_mean_entropy"} <= set(shared)
    for name in shared:
        expected = None if pd.isna(row[name]) else pytest.approx(row[name], rel=1e-12)
        assert known.numbers[region][name] == expected, name


@pytest.mark.parametrize("name", VOXEL_METRICS)
def test_metrics_of_voxels_are_those_of_the_cohorts_metrics(known, tables, name):
    mask, measure, metric, bins = VOXEL_METRICS[name]
    rows = tables["metrics"].to_pandas()
    rows = rows[(rows["region"] == "TC") & (rows["mask"] == mask) & (rows["measure"] == measure)]
    rows = rows[(rows["metric"] == metric) & (rows["pooling"] == "patient_mean")]
    rows = rows[rows["n_bins"].isna() if bins is None else rows["n_bins"] == bins]
    value = rows["value"].item()
    assert known.numbers["TC"][name] == (None if np.isnan(value) else pytest.approx(value, rel=1e-12))


def test_without_a_reference_scores_and_volumes_are_the_same(known, unknown):
    for region in REGIONS:
        for name, value in unknown.numbers[region].items():
            expected = known.numbers[region][name]
            assert value == (None if expected is None else pytest.approx(expected, rel=1e-9)), name
        assert unknown.numbers[region]["score_brain_mean_entropy"] > 0


def test_without_a_reference_nothing_is_said_that_needs_one(unknown):
    for region in REGIONS:
        assert not {*WITH_REFERENCE, *VOXEL_METRICS} & set(unknown.numbers[region])


def test_a_region_that_is_not_predicted_has_no_score_and_says_so():
    numbers = drawn(without=[2]).numbers["ET"]
    assert numbers["missing_region"] is True
    assert numbers["both_empty"] is False
    assert numbers["score_predicted_5mm_mean_entropy"] is None
    assert numbers["dice"] == 0
