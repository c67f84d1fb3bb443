"""The whole workflow through `sbatch`, on a real SLURM with two pretended GPUs."""

import re
from itertools import pairwise

import pytest

from segtrust.config import ROOT

from .cluster import N_GPUS
from .conftest import SITE

pytestmark = pytest.mark.slow

N_TRAINED, N_SAMPLED = 1, 4  # two test patients, two chunks of passes each


@pytest.fixture(scope="module")
def jobs(undisturbed):
    """What SLURM's accounting says about the jobs of the undisturbed run, and which GPUs each has seen."""
    study, run = undisturbed
    devices = study.cluster.devices()
    jobs = study.cluster.accounted(run.id())
    return [{**job, "rule": rule_of(job), "devices": devices.get(job["JobIDRaw"], "")} for job in jobs]


def rule_of(job):
    return re.match("rule_([a-z]+)", job["Comment"])[1]


def with_gpu(jobs):
    return [job for job in jobs if "gres/gpu=1" in job["AllocTRES"]]


def test_the_whole_workflow_runs_through_slurm(undisturbed, jobs):
    study, _ = undisturbed
    assert {job["State"] for job in jobs} == {"COMPLETED"}
    assert {job["rule"] for job in jobs} == {
        *("preprocess", "train", "sample", "maps", "voxels", "tally", "cohort", "triage", "page", "report"),
    }
    assert (study.folder / "results/report/index.html").is_file()
    assert (study.folder / "results/tiny/cohort/metrics.parquet").is_file()
    assert not list(study.folder.rglob(".partial-*"))


def test_a_finished_study_has_nothing_to_do(undisturbed):
    study, _ = undisturbed
    assert "Nothing to be done" in study.run("-n")


def test_only_training_and_sampling_get_gpus(jobs):
    assert sorted(job["rule"] for job in with_gpu(jobs)) == ["sample"] * N_SAMPLED + ["train"] * N_TRAINED
    for job in jobs:
        seen = job["devices"]
        assert (seen in ("0", "1")) if job["rule"] in ("train", "sample") else not seen, job


def test_all_gpus_are_used_and_none_by_two_jobs_at_a_time(jobs):
    assert {job["devices"] for job in with_gpu(jobs)} == {str(index) for index in range(N_GPUS)}
    for device in range(N_GPUS):
        times = sorted((job["Start"], job["End"]) for job in with_gpu(jobs) if job["devices"] == str(device))
        assert len(times) >= 2
        for (_, end), (start, _) in pairwise(times):
            assert end <= start, f"two jobs at a time on GPU {device}: {times}"


def test_jobs_ask_for_the_memory_of_their_rules(jobs):
    asked = {job["rule"]: job["ReqMem"] for job in jobs}
    assert asked["sample"] == "4000M"
    assert asked["tally"] == "2500M"


def test_an_efficiency_report_is_left_among_the_logs(undisturbed):
    study, run = undisturbed
    lines = (study.folder / f"logs/slurm/efficiency_report_{run.id()}.csv").read_text().splitlines()
    assert "MaxRSS_MB" in lines[0]
    assert any("rule_sample" in line for line in lines)


@pytest.mark.parametrize(
    ("option", "command", "site"), [("--profile", "squeue", []), ("--workflow-profile", "sacct", SITE)]
)
def test_the_profile_serves_with_both_options_and_both_status_commands_and_without_an_account(
    study, option, command, site
):
    target = "results/tiny/maps/p2_entropy.nii.gz"
    (study.folder / target).unlink()
    profile = (option, str(ROOT / "profiles/slurm"))
    said = study.run(target, "--slurm-status-command", command, "--verbose", profile=profile, site=site)
    assert set(re.findall("Status query timing .*command=(\\w+)", said)) == {command}
    assert (study.folder / target).is_file()
