"""What goes wrong on a cluster, done on purpose to a real SLURM.

After each fault the same command finishes the work, with the results of a run that nothing disturbed; what was
finished is not done again, and nothing that was written by half is taken for whole. `make stress-slurm` repeats all
of it, with the faults that take long.
"""

import filecmp
import os
import re
import signal
import subprocess
from contextlib import contextmanager

import pytest
from brakes import Brake, wait_until

pytestmark = pytest.mark.slow

MODEL = "results/tiny"
SAMPLES, MAPS = f"{MODEL}/samples/p3/member0_2-3.safetensors", f"{MODEL}/maps/p3_entropy.nii.gz"
VOXELS, TALLY = f"{MODEL}/voxels/p3.parquet", f"{MODEL}/tally/p3.parquet"
EVERY_MAP = f"{MODEL}/maps/p3_*"
COHORT = f"{MODEL}/cohort/*"


class Check:
    """Take results out of a finished study, and see later that all came back and nothing else was touched."""

    def __init__(self, study, undisturbed, *taken):
        self._study, (self._reference, _) = study, undisturbed
        for pattern in taken:
            paths = list(study.folder.glob(pattern))
            assert paths, pattern
            for path in paths:
                path.unlink()
        self._finished = self._states()

    def _files(self, folder):
        return {path.relative_to(folder) for path in (folder / "results").rglob("*") if path.is_file()}

    def _states(self):
        files = self._files(self._study.folder)
        return {path: (self._study.folder / path).stat() for path in files}

    def passed(self):
        here, there = self._study.folder, self._reference.folder
        assert not list(here.rglob(".partial-*"))
        assert self._files(here) == self._files(there)
        others = [path for path in self._files(there) if not filecmp.cmp(here / path, there / path, shallow=False)]
        assert not others, f"other results than undisturbed: {others}"
        now = self._states()
        redone = [
            path
            for path, state in self._finished.items()
            if (now[path].st_ino, now[path].st_mtime_ns) != (state.st_ino, state.st_mtime_ns)
        ]
        assert not redone, f"finished, and done again: {redone}"


def in_flight(study):
    """Return the id of the one job that runs."""
    (job,) = [job for job in study.cluster.queue() if job["state"] == "RUNNING"]
    return job["id"]


def half(path):
    """Cut a file in the middle."""
    os.truncate(path, path.stat().st_size // 2)


def states(study, run, rule):
    return [job["State"].split()[0] for job in study.cluster.accounted(run.id()) if f"rule_{rule}" in job["Comment"]]


def test_a_cancelled_job_comes_back_with_twice_the_memory_in_the_same_run(study, undisturbed, tmp_path):
    check = Check(study, undisturbed, SAMPLES)
    brake = Brake(tmp_path, f"*{SAMPLES}")
    run = study.start(SAMPLES, **brake.environment)
    _, partial = brake.wait(run)
    half(study.folder / partial)
    study.cluster("scancel", in_flight(study))
    brake.release()
    run.finish()
    assert states(study, run, "sample") == ["CANCELLED", "COMPLETED"]
    assert [job["ReqMem"] for job in study.cluster.accounted(run.id())] == ["4000M", "8000M"]
    check.passed()


def test_a_job_whose_python_is_killed_between_two_of_its_files_comes_back(study, undisturbed, tmp_path):
    check = Check(study, undisturbed, EVERY_MAP)
    brake = Brake(tmp_path, f"*{MAPS}")
    run = study.start(MAPS, **brake.environment)
    process, partial = brake.wait(run)
    half(study.folder / partial)
    os.kill(process, signal.SIGKILL)
    brake.release()
    run.finish()
    assert states(study, run, "maps") == ["FAILED", "COMPLETED"]
    check.passed()


def test_after_the_death_of_snakemake_unlock_and_one_command_finish_the_work(study, undisturbed, tmp_path):
    check = Check(study, undisturbed, VOXELS, TALLY)
    brake = Brake(tmp_path, f"*{VOXELS}")
    run = study.start(TALLY, **brake.environment)
    brake.wait(run)
    os.killpg(run.process.pid, signal.SIGKILL)
    run.process.wait(timeout=10)
    brake.release()
    # what SLURM was given runs on to its end
    wait_until(lambda: not study.cluster.queue(), "the end of the jobs in flight")
    assert "Unlocked" in study.run("--unlock")
    study.run(TALLY)
    check.passed()


def test_after_the_death_of_snakemake_segtrust_run_ends_its_jobs_and_finishes_the_work(study, undisturbed, tmp_path):
    check = Check(study, undisturbed, VOXELS, TALLY)
    brake = Brake(tmp_path, f"*{VOXELS}")
    run = study.start_segtrust(TALLY, **brake.environment)
    brake.wait(run)
    job = in_flight(study)
    os.killpg(run.process.pid, signal.SIGKILL)
    run.process.wait(timeout=10)
    said = study.start_segtrust(TALLY).finish()
    assert f"Cancelling 1 SLURM job(s), which a dead run has left: {job}." in said
    assert "Removing the lock" in said
    assert states(study, run, "voxels") == ["CANCELLED"]
    check.passed()


def test_two_snakemakes_on_one_study_are_refused_and_the_first_goes_on(study, undisturbed, tmp_path):
    check = Check(study, undisturbed, TALLY)
    brake = Brake(tmp_path, f"*{TALLY}")
    first = study.start(TALLY, **brake.environment)
    brake.wait(first)
    assert "cannot be locked" in study.run(TALLY, expect=1)
    brake.release()
    first.finish()
    assert states(study, first, "tally") == ["COMPLETED"]
    check.passed()


def test_jobs_wait_while_the_node_is_drained_and_go_on_when_it_is_back(study, undisturbed, tmp_path):
    check = Check(study, undisturbed, VOXELS, TALLY)
    brake = Brake(tmp_path, f"*{VOXELS}")
    run = study.start(TALLY, **brake.environment)
    brake.wait(run)
    node = f"nodename={study.cluster.node}"
    study.cluster("scontrol", "update", node, "state=drain", "reason=test")
    try:
        brake.release()
        waiting = wait_until(
            lambda: [job for job in study.cluster.queue() if "rule_tally" in job["comment"]],
            "the next job is submitted",
        )
        assert waiting[0]["state"] == "PENDING"
        assert not (study.folder / TALLY).exists()
    finally:
        study.cluster("scontrol", "update", node, "state=resume")
    run.finish()
    assert states(study, run, "voxels") == states(study, run, "tally") == ["COMPLETED"]
    check.passed()


def test_a_job_that_is_killed_for_its_memory_comes_back_with_more(study, undisturbed):
    check = Check(study, undisturbed, COHORT)
    # 100 MB are too little for any Python that imports what a job needs; 3,200 MB are enough
    run = study.start(f"{MODEL}/cohort/metrics.parquet", "--set-resources", "cohort:mem_mb=100 * 32 ** (attempt - 1)")
    assert "exceeded memory limit" in run.finish()
    assert states(study, run, "cohort") == ["FAILED", "COMPLETED"]
    assert [job["ReqMem"] for job in study.cluster.accounted(run.id())] == ["100M", "3200M"]
    check.passed()


def test_a_full_disk_leaves_no_result_and_one_command_finishes_when_there_is_room(study, undisturbed):
    check = Check(study, undisturbed, VOXELS)
    with small_disk(study.folder / f"{MODEL}/voxels", "16k") as disk:
        said = study.run(VOXELS, "--retries", "0", expect=1)
        assert re.search("No space left on device", said)
        assert not (study.folder / VOXELS).exists()
        assert not list(disk.rglob(".partial-*"))
        subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True, timeout=10)
        study.run(VOXELS)
        made = (study.folder / VOXELS).read_bytes()
    (study.folder / VOXELS).write_bytes(made)
    check.passed()


@contextmanager
def small_disk(folder, size):
    """Put a disk of a given size in the place of a folder; skips where mounting is not allowed."""
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder]
    done = subprocess.run(mount, capture_output=True, text=True, timeout=10, check=False)
    if done.returncode:
        pytest.skip(f"a small disk needs the privilege to mount one: {done.stderr.strip()}")
    # Snakemake removes folders that a failed job leaves empty, which a disk's own cannot be
    (folder / "other").touch()
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True, timeout=10)


@pytest.mark.stress
def test_a_job_over_its_time_comes_back_with_twice_as_much(study, undisturbed, tmp_path):
    check = Check(study, undisturbed, TALLY)
    brake = Brake(tmp_path, f"*{TALLY}")
    run = study.start(TALLY, "--set-resources", "tally:runtime=attempt", **brake.environment)
    brake.wait(run)
    wait_until(lambda: states(study, run, "tally")[:1] == ["TIMEOUT"], "the job is over its time", timeout_s=150)
    brake.release()
    run.finish()
    assert states(study, run, "tally") == ["TIMEOUT", "COMPLETED"]
    check.passed()


@pytest.mark.stress
@pytest.mark.parametrize("ends_first", ["the old job", "the new run"])
def test_a_job_that_outlives_its_snakemake_does_no_harm_to_the_next_run(study, undisturbed, tmp_path, ends_first):
    check = Check(study, undisturbed, VOXELS, TALLY)
    brake = Brake(tmp_path, f"*{VOXELS}")
    run = study.start(TALLY, **brake.environment)
    brake.wait(run)
    os.killpg(run.process.pid, signal.SIGKILL)
    run.process.wait(timeout=10)
    study.run("--unlock")
    second = study.start(TALLY)
    if ends_first == "the old job":
        wait_until(lambda: len(study.cluster.queue()) == 2, "both jobs are with SLURM")
        brake.release()
        second.finish()
    else:
        second.finish()
        brake.release()
    wait_until(lambda: not study.cluster.queue(), "the end of the old job")
    check.passed()


@pytest.mark.stress
def test_a_node_that_fails_with_a_job_in_flight_costs_that_job_only(study, undisturbed, tmp_path):
    check = Check(study, undisturbed, TALLY)
    brake = Brake(tmp_path, f"*{TALLY}")
    run = study.start(TALLY, **brake.environment)
    _, partial = brake.wait(run)
    half(study.folder / partial)
    node = f"nodename={study.cluster.node}"
    study.cluster("scontrol", "update", node, "state=down", "reason=test")
    study.cluster("scontrol", "update", node, "state=resume")
    brake.release()
    # the plugin leaves the failed node out for the rest of its run, and here there is no other
    if run.process.wait(timeout=200):
        study.run(TALLY)
    assert states(study, run, "tally")[0] == "NODE_FAIL"
    check.passed()
