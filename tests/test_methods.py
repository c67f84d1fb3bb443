"""The text for a paper's methods section, and what it cites."""

from types import SimpleNamespace

import pandas as pd
import pytest

from segtrust.methods import WORKS, methods
from segtrust.patients import Patient

SETTINGS = {
    "network": {"name": "SegResNet-BraTS", "init_filters": 16},
    "precision": "float32",
    "stochastic": {"dropout": True, "inject": None},
    "sample": {"crop": "foreground", "window": None, "overlap": 0.5, "masks": "independent", "seed": 3},
}
VERSIONS = {"segtrust": "0.1.0", "torch": "2.13.0", "snakemake": "9.27.1"}


def run(name="m", settings=SETTINGS, weights="ab" * 32, rate=None, patients=("p0", "p1")):
    provenance = {
        "model": {"settings": settings, "weights": weights, "rate": rate},
        "backend": "openvino",
        "device": ["cpu"],
        "precision": "bfloat16",
        "versions": VERSIONS,
        "cohort": {"n_resamples": 2000, "failure_dice": 0.8, "n_bins": [10, 15, 20]},
    }
    return SimpleNamespace(name=name, provenance=provenance, patients=pd.DataFrame({"patient": patients}))


def person(name, split="test", subject=None, coding="brats2021"):
    return Patient(name, subject or name, split, coding, {}, "seg.nii.gz")


SHEET = [person("p0"), person("p1"), person("p2"), person("c", "calibration")]


def written(*runs, sheet=SHEET, sources=None):
    paragraphs, works = methods(list(runs), sheet, sources or {}, 15)
    return " ".join(paragraphs), works


def test_it_counts_patients_and_names_those_who_are_missing():
    text, _ = written(run())
    assert "evaluated on 2 test patients with reference labels as in BraTS 2021" in text
    assert "1 test patient of 3 could not be evaluated." in text
    assert "1 further patient served to fit" in text


def test_sessions_of_one_person_are_told():
    text, _ = written(run(), sheet=[person("p0", subject="s"), person("p1", subject="s")])
    assert "2 test patients of 1 subject with" in text
    assert "could not be evaluated" not in text


def test_a_model_is_described_by_what_was_computed():
    text, works = written(run(), sources={"m": "20 dropout passes"})
    assert "SegResNet-BraTS (init_filters 16), weights with SHA-256 abababababab…" in text
    assert "mean over all passes (20 dropout passes)" in text
    assert "computed in bfloat16 by OpenVINO on CPU, with seed 3" in text
    assert "Software: segtrust 0.1.0, PyTorch 2.13.0, Snakemake 9.27.1." in text
    assert WORKS["dropout"] in works
    assert not {WORKS["injected"], WORKS["ensemble"], WORKS["flips"]} & set(works)


def test_windows_injected_dropout_flips_and_ensembles_are_told_and_cited():
    inject = {"after": ["down.*", "up"], "kind": "channel", "rate": "auto"}
    sample = {**SETTINGS["sample"], "window": [96, 96, 64], "masks": "balanced"}
    settings = {**SETTINGS, "sample": sample, "stochastic": {"dropout": False, "inject": inject}}
    weights = {"member0": "cd" * 32, "member1": "ef" * 32}
    text, works = written(run(settings=settings, weights=weights, rate=0.05), sources={"m": "2 checkpoints × 2 flips"})
    assert "sliding windows of 96×96×64 voxels with an overlap of 0.5" in text
    assert "Dropout of channels at rate 0.05 was injected after down.* and up, the rate chosen on the" in text
    assert "balanced within blocks" in text
    assert "cdcdcdcdcdcd and efefefefefef" in text
    assert {WORKS["dropout"], WORKS["injected"], WORKS["ensemble"], WORKS["flips"]} <= set(works)


def test_predictions_made_elsewhere_have_no_network():
    text, works = written(run(settings={"outputs": ["WT", "TC", "ET"]}), sources={"m": "5 predictions made elsewhere"})
    assert "Model m: 5 predictions made elsewhere; the probability" in text
    assert WORKS["monai"] not in works


@pytest.mark.parametrize(("runs", "told"), [([run()], False), ([run("a"), run("b")], True)])
def test_a_comparison_is_told_where_there_are_models_to_compare(runs, told):
    assert ("Holm" in written(*runs)[0]) == told


def test_nothing_evaluated_needs_no_methods():
    assert methods([], SHEET, {}, 15) == ([], [])


def test_another_coding_does_not_cite_brats_2021():
    sheet = [person("p0", coding="brats2023"), person("p1", coding="brats2023")]
    assert WORKS["brats2021"] not in written(run(), sheet=sheet)[1]
