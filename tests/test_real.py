"""Two real patients at full size, where SEGTRUST_REAL_DATA names their folder."""

import os
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from browser import complaints_of
from test_workflow import planned, snakemake

from segtrust import cli
from segtrust.networks import build
from segtrust.regions import REGIONS

DATA = os.environ.get("SEGTRUST_REAL_DATA")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not DATA, reason="SEGTRUST_REAL_DATA does not name a folder with real patients"),
]

# voxels of WT, TC, ET that the data's own notes give
SIZES = {"BraTS2021_00006": (137_911, 51_954, 26_448), "BraTS-GLI-00000-000": (57_305, 44_469, 32_731)}
NETWORK = {"name": "UNet-Res", "channels": [4, 8, 16], "strides": [2, 2]}


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A finished study of both patients from `segtrust init` on, with the given weights of a small network."""
    folder = tmp_path_factory.mktemp("real")
    assert cli.main(["init", DATA, str(folder)]) == 0
    torch.save(build(NETWORK, seed=0).state_dict(), folder / "weights.pt")
    model = {"network": NETWORK, "checkpoint": "weights.pt"}
    model["outputs"] = {"softmax": ["background", "NCR", "ED", "ET"]}
    config = {"models": {"unet": model}, "sample": {"passes": 3, "device": "cpu"}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    snakemake(folder)
    return folder


def test_both_patients_come_through_to_the_report(study):
    assert (study / "results/report/index.html").is_file()
    assert planned(study) == {}


def test_every_page_of_the_report_opens_and_its_links_resolve(study, chromium):
    assert complaints_of(chromium, study / "results/report") == []


def test_region_sizes_are_those_the_data_were_published_with(study):
    table = pd.read_parquet(study / "results/unet/cohort/patients.parquet").set_index(["patient", "region"])
    for patient, sizes in SIZES.items():
        for region, size in zip(REGIONS, sizes, strict=True):
            row = table.loc[(patient, region)]
            assert round(1000 * (row["volume_ml"] - row["volume_error_ml"])) == size


@pytest.mark.parametrize("patient", SIZES)
def test_maps_lie_on_the_scan(study, patient):
    scan = nib.load(next(Path(DATA, patient).glob("*seg.nii.gz")))
    for name in ("probability", "segmentation", "entropy", "mutual_information"):
        image = nib.load(study / f"results/unet/maps/{patient}_{name}.nii.gz")
        assert image.shape[:3] == scan.shape
        assert np.allclose(image.affine, scan.affine)
