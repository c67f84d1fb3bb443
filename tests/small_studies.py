"""Small studies, drawn by code, that tests run with Snakemake as a user would."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import yaml
from conftest import draw_scan, save, write_patient, write_sheet
from scipy.ndimage import gaussian_filter

from segtrust.config import ROOT
from segtrust.patients import SAMPLED_SPLITS
from segtrust.regions import canonical_labels, region_masks

TRAINED = {
    "network": {"name": "UNet-Res", "channels": [4, 8], "strides": [2]},
    "outputs": {"softmax": ["background", "NCR", "ED", "ET"]},
    "train": {"iterations": 4, "batch": 1, "patch": [8, 8, 8], "validate_every": 2},
}
GIVEN = {"predictions": "given/{patient}_{pass}.nii.gz", "outputs": ["TC", "WT", "ET"]}
ONCE = {"predictions": "once/{patient}.nii.gz", "outputs": ["TC", "WT", "ET"]}
N_PASSES = 3


def predicted(seed, number):
    """Return probabilities (3, x, y, z), order WT, TC, ET, near the truth of a patient; one pass."""
    _, codes = draw_scan(seed)
    truth = region_masks(canonical_labels(codes, "brats2021", "p", "f"))
    smooth = np.stack([gaussian_filter(region.astype(np.float32), 1) for region in truth]).clip(1e-4, 1 - 1e-4)
    generator = np.random.default_rng([seed, number])
    logit = np.log(smooth / (1 - smooth)) + generator.normal(0, 0.7) + generator.normal(0, 0.7, smooth.shape)
    return (1 / (1 + np.exp(-logit))).astype(np.float32)


def write_prediction(path, probability):
    return save(path, np.moveaxis(probability[[1, 0, 2]], 0, -1))


def draw_study(folder, models, splits, without_reference=(), **sections):
    """Write a study: a patient p0, p1, … for each split, their predictions made elsewhere, the sheet and the config.

    without_reference : numbers of patients whose `seg` is left empty
    sections : of the config, in place of those written here
    """
    rows = []
    for number, split in enumerate(splits):
        name = f"p{number}"
        paths = write_patient(folder / "data", name, number, seg=number not in without_reference)
        relative = {column: str(Path(path).relative_to(folder)) for column, path in paths.items()}
        rows.append({"patient": name, **relative, "split": split, "site": "A <b>"})
        if split in SAMPLED_SPLITS:
            for index in range(N_PASSES):
                write_prediction(folder / "given" / f"{name}_{index}.nii.gz", predicted(number, index))
            write_prediction(folder / "once" / f"{name}.nii.gz", predicted(number, 0))
    write_sheet(folder / "patients.tsv", rows)
    config = {"models": models, "sample": {"passes": 3, "device": "cpu"}, "cohort": {"resamples": 100}, **sections}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))


def snakemake(study, *arguments, expect=0, code=ROOT):
    """Run Snakemake on a study under the profile `local`, and return what it says.

    expect : exit status; code : Path of the repository whose workflow and package are run
    """
    command = [sys.executable, "-m", "snakemake", "-s", str(code / "Snakefile"), "--directory", str(study)]
    command += ["--workflow-profile", str(code / "profiles" / "local"), "--cores", "2", *arguments]
    # what is imported is looked for in the working folder first
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=code)
    assert done.returncode == expect, done.stdout + done.stderr
    return done.stdout + done.stderr


def planned(study, *arguments):
    """Return {rule: number of jobs} of a dry run."""
    output = snakemake(study, "-n", *arguments)
    if "Nothing to be done" in output:
        return {}
    table = output.split("Job stats:")[1].split("total")[0]
    return {rule: int(count) for rule, count in re.findall(r"^(\w+)\s+(\d+)$", table, flags=re.MULTILINE)}


def changed(study, **sections):
    """Return the option that runs a study with some sections of its configuration changed."""
    config = yaml.safe_load((study / "config.yaml").read_text())
    for name, value in sections.items():
        config[name] = {**config.get(name, {}), **value} if isinstance(value, dict) else value
    (study / "changed.yaml").write_text(yaml.safe_dump(config))
    return "--configfile", str(study / "changed.yaml")
