"""What a change redoes: one finished study, one change a test, and exactly the jobs that a dry run then plans."""

import gzip
import os
import re
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from conftest import draw_scan, save, write_patient, write_sheet
from small_studies import GIVEN, ONCE, TRAINED, changed, draw_study, predicted, snakemake, write_prediction

from segtrust.config import ROOT
from segtrust.networks import build

pytestmark = pytest.mark.slow

SPLITS = ["train", "train", "validation", "calibration", "test", "test"]
SAMPLED = ("p3", "p4", "p5")
NETWORK = {"network": TRAINED["network"], "outputs": TRAINED["outputs"]}
MODELS = {
    "elsewhere": GIVEN,
    "trained": {**TRAINED, "stochastic": {"dropout": False, "inject": {"after": ["model.0"], "rate": "auto"}}},
    "weights": {**NETWORK, "checkpoint": "large.pt", "stochastic": {"ensemble": ["small.pt"]}},
}
# the logs of each stage, which name its jobs
STAGES = {
    "preprocess": ["preprocess/{patient}"],
    "train": ["train/trained"],
    "inject": ["inject/trained"],
    **{stage: [f"{stage}/{{model}}/{{patient}}"] for stage in ("maps", "voxels", "tally", "page")},
    **{stage: [f"{stage}/{{model}}"] for stage in ("cohort", "triage")},
    "comparison": ["comparison"],
    "report": ["report"],
}
PASSES = {
    "elsewhere": ["gather/elsewhere/{patient}/predictions_0-2"],
    "once": ["gather/once/{patient}/predictions_0-0"],
    "trained": ["sample/trained/{patient}/member0_0-7"],
    "weights": ["sample/weights/{patient}/member0_0-7", "sample/weights/{patient}/member1_0-7"],
}
WITHOUT_PAGE = ("p3",)  # of split calibration
POOLED = "cohort triage comparison report"
FROM_VOXELS = f"voxels tally page {POOLED}"
FROM_MOMENTS = f"maps {FROM_VOXELS}"
FROM_PASSES = f"passes {FROM_MOMENTS}"
IGNORED = shutil.ignore_patterns("__pycache__")
LONG_AGO_S = 946_684_800  # 1 January 2000
LARGE, MEGABYTE = 300_000, 1_000_000  # Snakemake compares larger files by date alone


def jobs(stages, models=MODELS, patients=SAMPLED):
    """Return the set of jobs of some stages, given in words; `passes` are jobs of `sample` and `gather`."""
    return {
        job.format(model=model, patient=patient)
        for stage in stages.split()
        for model in models
        for patient in patients
        for job in (PASSES[model] if stage == "passes" else STAGES[stage])
        if stage != "page" or patient not in WITHOUT_PAGE
    }


def plan(study, *arguments, code=ROOT):
    """Return the set of jobs that a dry run plans, each by its log, without `all`."""
    output = snakemake(study, "-n", *arguments, code=code)
    if "Nothing to be done" in output:
        return set()
    found = re.findall(r"^    log: logs/(\S+)\.log$", output, flags=re.MULTILINE)
    counted = int(re.search(r"^total\s+(\d+)$", output, flags=re.MULTILINE)[1])
    assert len(found) == len(set(found)) == counted - 1
    return set(found)


def stored(path, comment=b""):
    """Rewrite an image so that its size says nothing of its voxels; comment : bytes kept in its header."""
    image = nib.load(path)
    if comment:
        image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", comment))
    path.write_bytes(gzip.compress(image.to_bytes(), compresslevel=0))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with a finished study and, beside it, scans of one of its patients; nobody may change it.

    A model is trained here, one is an ensemble of given checkpoints over and under a megabyte, one was predicted
    elsewhere. p4 has a scan over a megabyte; the scans of p5 lie outside the study.
    """
    folder = tmp_path_factory.mktemp("a folder")
    study = folder / "study"
    draw_study(study, MODELS, SPLITS, sample={"passes": 8, "device": "cpu", "backend": "torch"})
    for seed, (name, padding) in enumerate({"large": LARGE, "small": 1}.items()):
        state = build(TRAINED["network"], seed).state_dict()
        torch.save({"model": state, "optimiser": torch.zeros(padding)}, study / f"{name}.pt")
    stored(study / "data/p4/p4_t2.nii.gz", b"-" * MEGABYTE)
    stored(study / "data/p4/p4_seg.nii.gz")
    shutil.move(study / "data/p5", folder / "scans/p5")
    sheet = (study / "patients.tsv").read_text()
    (study / "patients.tsv").write_text(sheet.replace("data/p5/", "../scans/p5/"))
    snakemake(study)
    return folder


@pytest.fixture
def study(finished, tmp_path):
    """A copy of the finished study, to change."""
    folder = shutil.copytree(finished, tmp_path / "a folder")
    yield folder / "study"
    shutil.rmtree(tmp_path)


@pytest.fixture
def code(tmp_path):
    """A fresh clone of the code, to change."""
    for name in ("segtrust", "workflow", "profiles"):
        # copyfile leaves dates behind: everything is as new as a clone is
        shutil.copytree(ROOT / name, tmp_path / "code" / name, ignore=IGNORED, copy_function=shutil.copyfile)
    shutil.copyfile(ROOT / "Snakefile", tmp_path / "code" / "Snakefile")
    return tmp_path / "code"


def rows_of(study):
    return pd.read_csv(study / "patients.tsv", sep="\t", dtype=str, keep_default_na=False).to_dict("records")


def with_model(study, model, **keys):
    """Return the option that runs a study with some keys of a model changed."""
    return changed(study, models={model: {**MODELS[model], **keys}})


def backdate(path):
    os.utime(path, (LONG_AGO_S, LONG_AGO_S))


# --- nothing ---


def test_an_unchanged_study_costs_nothing(study):
    assert plan(study) == set()


def test_touched_checkpoints_and_small_files_cost_nothing(study):
    checkpoints = [study / name for name in ("large.pt", "small.pt", "results/trained/train/checkpoint.pt")]
    assert checkpoints[0].stat().st_size > MEGABYTE > checkpoints[1].stat().st_size
    files = [path for path in [*study.glob("data/*/*"), *study.glob("given/*")] if path.stat().st_size < MEGABYTE]
    assert len(files) > 30
    for path in [*checkpoints, *files, study / "config.yaml", study / "patients.tsv"]:
        path.touch()
    assert plan(study) == set()


def test_keys_in_another_order_and_comments_cost_nothing(study):
    def turned(value):
        return {key: turned(value[key]) for key in reversed(value)} if isinstance(value, dict) else value

    config = yaml.safe_load((study / "config.yaml").read_text())
    config = {**turned(config), "models": {name: turned(model) for name, model in config["models"].items()}}
    text = yaml.safe_dump(config, sort_keys=False)
    (study / "config.yaml").write_text("# why\n" + text.replace("sample:\n", "sample:  # how\n"))
    assert plan(study) == set()


def test_a_fresh_clone_with_other_comments_docstrings_and_layout_costs_nothing(study, code):
    scripts = list((code / "workflow/scripts").glob("*.py"))
    for path in [*scripts, *(code / "segtrust").glob("*.py"), *(code / "workflow/rules").glob("*.smk")]:
        text = path.read_text()
        assert text.startswith('"""')
        path.write_text('"""Said otherwise. ' + text.removeprefix('"""') + "\n\n\n# a remark\n")
    assert plan(study, code=code) == set()


def test_a_study_moved_whole_with_its_scans_costs_nothing(study, tmp_path):
    (tmp_path / "another parent").mkdir()
    moved = shutil.move(study.parent, tmp_path / "another parent/another name")
    assert plan(Path(moved) / "study") == set()


def test_settings_that_change_no_number_cost_nothing(study):
    speed = {"device": "auto", "batch": 3, "passes_per_job": 2}
    assert plan(study, *changed(study, sample=speed, on_bad_patient="exclude")) == set()


# --- code ---


@pytest.mark.parametrize(
    ("file", "redone"),
    [
        ("workflow/scripts/tally.py", jobs(f"tally page {POOLED}")),
        ("segtrust/bins.py", jobs(FROM_VOXELS)),
        ("segtrust/report.py", jobs("report")),
        ("segtrust/train.py", jobs("train inject") | jobs(FROM_PASSES, ["trained"])),
    ],
)
def test_a_statement_redoes_the_stages_that_import_it(study, code, file, redone):
    with (code / file).open("a") as text:
        text.write("\n_CHANGED = True\n")
    assert plan(study, code=code) == redone


# --- checkpoints and models ---


@pytest.mark.parametrize(("name", "member"), [("large.pt", "member0"), ("small.pt", "member1")])
def test_a_replaced_checkpoint_redoes_its_passes_whatever_its_date_and_size(study, name, member):
    path = study / name
    size = path.stat().st_size
    content = torch.load(path, weights_only=True)
    content["model"] = build(TRAINED["network"], seed=9).state_dict()
    torch.save(content, path)
    assert path.stat().st_size == size
    backdate(path)
    passes = {f"sample/weights/{patient}/{member}_0-7" for patient in SAMPLED}
    assert plan(study) == passes | jobs(FROM_MOMENTS, ["weights"])


def test_another_member_of_an_ensemble_costs_its_own_passes(study):
    torch.save(build(TRAINED["network"], seed=9).state_dict(), study / "third.pt")
    option = with_model(study, "weights", stochastic={"ensemble": ["small.pt", "third.pt"]})
    passes = {f"sample/weights/{patient}/member2_0-7" for patient in SAMPLED}
    assert plan(study, *option) == passes | jobs(FROM_MOMENTS, ["weights"])


@pytest.mark.parametrize(
    "keys", [{"train": {**TRAINED["train"], "iterations": 5}}, {"overlap": 0.25}], ids=["iterations", "overlap"]
)
def test_what_a_training_depends_on_redoes_that_model(study, keys):
    assert plan(study, *with_model(study, "trained", **keys)) == jobs(f"train inject {FROM_PASSES}", ["trained"])


@pytest.mark.parametrize("split", ["train", "validation"])
def test_a_patient_to_train_or_validate_on_redoes_what_is_trained(study, split):
    paths = write_patient(study / "data", "p6", 6)
    write_sheet(study / "patients.tsv", [*rows_of(study), {"patient": "p6", **paths, "split": split, "site": "A <b>"}])
    assert plan(study) == {"preprocess/p6"} | jobs(f"train inject {FROM_PASSES}", ["trained"])


def test_how_a_model_sees_a_scan_redoes_its_passes(study):
    assert plan(study, *with_model(study, "weights", crop="none")) == jobs(FROM_PASSES, ["weights"])


def test_an_added_model_costs_its_own_jobs_and_what_shows_all_models(study):
    assert plan(study, *changed(study, models={"once": ONCE})) == jobs(FROM_PASSES, ["once"])


def test_a_removed_model_redoes_what_shows_all_models(study):
    config = yaml.safe_load((study / "config.yaml").read_text())
    del config["models"]["weights"]
    (study / "config.yaml").write_text(yaml.safe_dump(config))
    assert plan(study) == jobs("comparison report")


def test_models_in_another_order_redo_what_shows_all_models(study):
    config = yaml.safe_load((study / "config.yaml").read_text())
    config["models"] = dict(reversed(config["models"].items()))
    (study / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    assert plan(study) == jobs("comparison report")


# --- passes ---


def test_more_passes_draw_only_the_new_ones(study):
    sources = ("trained/{}/member0", "weights/{}/member0", "weights/{}/member1")
    added = {f"sample/{source.format(patient)}_8-9" for source in sources for patient in SAMPLED}
    assert plan(study, *changed(study, sample={"passes": 10})) == added | jobs(FROM_MOMENTS, ["trained", "weights"])


def test_fewer_passes_draw_none_where_a_block_ends(study):
    assert plan(study, *changed(study, sample={"passes": 5})) == jobs(FROM_MOMENTS, ["trained", "weights"])


def test_fewer_passes_that_end_no_block_are_drawn(study):
    drawn = {job.replace("0-7", "0-5") for job in jobs("passes", ["trained", "weights"])}
    assert plan(study, *changed(study, sample={"passes": 6})) == drawn | jobs(FROM_MOMENTS, ["trained", "weights"])


@pytest.mark.parametrize("sample", [{"precision": "bfloat16"}, {"backend": "auto"}], ids=["precision", "backend"])
def test_precision_and_backend_redo_passes_and_no_training(study, sample):
    assert plan(study, *changed(study, sample=sample)) == jobs(f"inject {FROM_PASSES}", ["trained", "weights"])


def test_the_seed_redoes_all_that_is_drawn(study):
    drawn = jobs(f"train inject {FROM_PASSES}", ["trained", "weights"])
    assert plan(study, *changed(study, seed=1)) == drawn | jobs("cohort triage")


# --- settings of maps, tables and the report ---


def test_other_maps_redo_maps_pages_and_the_report(study):
    assert plan(study, *changed(study, maps={"write": ["probability", "variance"]})) == jobs("maps page report")


@pytest.mark.parametrize("cohort", [{"resamples": 101}, {"bins": [15]}], ids=["resamples", "bins"])
def test_resampling_and_bins_redo_the_pooled_tables(study, cohort):
    assert plan(study, *changed(study, cohort=cohort)) == jobs(POOLED)


@pytest.mark.parametrize("cohort", [{"groups": ["site"]}, {"failure_dice": 0.7}], ids=["groups", "failure_dice"])
def test_what_only_cohorts_show_redoes_no_comparison(study, cohort):
    assert plan(study, *changed(study, cohort=cohort)) == jobs("cohort triage report")


@pytest.mark.parametrize(
    ("report", "redone"),
    [({"title": "Other"}, "report"), ({"background": "t2"}, "page report"), ({"pages": "none"}, "triage report")],
    ids=["title", "background", "pages"],
)
def test_report_settings_redo_what_they_show_only(study, report, redone):
    assert plan(study, *changed(study, report=report)) == jobs(redone)


# --- patients and their files ---


def test_an_added_patient_costs_its_own_jobs_and_the_pooled_tables(study):
    paths = write_patient(study / "data", "p6", 6)
    for index in range(3):
        write_prediction(study / f"given/p6_{index}.nii.gz", predicted(6, index))
    write_sheet(study / "patients.tsv", [*rows_of(study), {"patient": "p6", **paths, "site": "B"}])
    assert plan(study) == jobs(f"preprocess {FROM_PASSES}", patients=["p6"])


def test_a_removed_patient_redoes_the_pooled_tables(study):
    write_sheet(study / "patients.tsv", [row for row in rows_of(study) if row["patient"] != "p5"])
    assert plan(study) == jobs(POOLED)


def test_rows_in_another_order_redo_the_pooled_tables(study):
    write_sheet(study / "patients.tsv", rows_of(study)[::-1])
    assert plan(study) == jobs(POOLED)


@pytest.mark.parametrize("column", ["subject", "grade"])
def test_what_the_sheet_says_of_a_patient_redoes_the_pooled_tables_and_pages(study, column):
    write_sheet(study / "patients.tsv", [{**row, column: f"of {row['patient']}"} for row in rows_of(study)])
    assert plan(study) == jobs(f"page {POOLED}")


def test_another_coding_redoes_what_reads_the_reference_and_no_pass(study):
    rows = [{**row, "coding": "brats2023" if row["patient"] == "p4" else ""} for row in rows_of(study)]
    write_sheet(study / "patients.tsv", rows)
    assert plan(study) == jobs(FROM_MOMENTS, patients=["p4"])


def scan_replaced(patient):
    """Return what a replaced scan of a test patient redoes."""
    return jobs(f"preprocess {FROM_PASSES}", patients=[patient])


def test_a_scan_replaced_by_an_older_file_of_another_size_redoes_that_patient(study):
    path = study.parent / "scans/p5/p5_t1.nii.gz"
    size = path.stat().st_size
    save(path, draw_scan(10)[0][0] // 2)
    assert path.stat().st_size != size
    backdate(path)
    assert plan(study) == scan_replaced("p5")


def test_a_scan_of_the_same_size_redoes_that_patient(study):
    path = study / "data/p4/p4_t2.nii.gz"
    size = path.stat().st_size
    save(path, draw_scan(10)[0][2])
    stored(path, b"-" * MEGABYTE)
    assert path.stat().st_size == size
    assert plan(study) == scan_replaced("p4")


def test_a_touched_scan_over_a_megabyte_redoes_that_patient(study):
    path = study / "data/p4/p4_t2.nii.gz"
    assert path.stat().st_size > MEGABYTE
    path.touch()
    assert plan(study) == scan_replaced("p4")


def test_a_scan_under_another_path_redoes_that_patient(study):
    rows = rows_of(study)
    rows[5]["t1"] = str((study / rows[5]["t1"]).resolve())
    write_sheet(study / "patients.tsv", rows)
    assert plan(study) == scan_replaced("p5")


@pytest.mark.parametrize(("column", "stages"), [("t1", f"preprocess {FROM_PASSES}"), ("seg", FROM_VOXELS)])
def test_a_file_of_the_calibration_split_also_redoes_what_is_chosen_on_it(study, column, stages):
    path = study / f"data/p3/p3_{column}.nii.gz"
    save(path, np.roll(np.asanyarray(nib.load(path).dataobj), 1, axis=0))
    chosen = jobs(f"inject {FROM_PASSES}", ["trained"])
    assert plan(study) == jobs(stages, patients=["p3"]) | chosen


@pytest.mark.parametrize("old", [False, True])
def test_a_replaced_reference_redoes_voxels_and_no_pass_or_map(study, old):
    path = study / "data/p4/p4_seg.nii.gz"
    size = path.stat().st_size
    save(path, np.roll(draw_scan(4)[1], 1, axis=0))
    if old:
        backdate(path)
    else:
        stored(path)
    assert (path.stat().st_size == size) != old
    assert plan(study) == jobs(FROM_VOXELS, patients=["p4"])


def test_a_prediction_replaced_by_an_older_one_is_gathered_anew(study):
    path = study / "given/p4_1.nii.gz"
    size = path.stat().st_size
    write_prediction(path, predicted(4, 9) ** 2)
    assert path.stat().st_size != size
    backdate(path)
    assert plan(study) == jobs(FROM_PASSES, ["elsewhere"], ["p4"])


def test_whatever_is_named_and_not_there_stops_everything_at_once(study):
    gone = ["data/p0/p0_flair.nii.gz", "data/p4/p4_seg.nii.gz", "../scans/p5/p5_t1.nii.gz", "large.pt", "small.pt"]
    for name in [*gone, "given/p4_1.nii.gz"]:
        (study / name).unlink()
    output = snakemake(study, "-n", expect=1)
    assert [name for name in gone if name not in output] == []
    assert "p4: passes 1 are missing" in output
    assert "Job stats" not in output
