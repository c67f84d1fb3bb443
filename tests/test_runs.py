"""What a Snakemake that was killed leaves, and the command that goes on from there."""

import os
import signal
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from brakes import Brake, wait_until
from conftest import write_patient, write_sheet

from segtrust import runs
from segtrust.errors import SegtrustError

CONFIG = """
models:
  given:
    predictions: data/{patient}/{patient}_seg.nii.gz
    outputs: {labels: brats2021}
"""
HEAD = "SNAKEMAKE\n=========\n  Host: {host}\n"
SLURM = "SLURM run ID: {name}\n"
HERE = socket.gethostname()


class Started:
    """A `segtrust run` that works in the background, in a group of processes of its own."""

    def __init__(self, study, **environment):
        self.words = study / "said.txt"
        command = [sys.executable, "-c", "from segtrust.cli import main; raise SystemExit(main())", "run", str(study)]
        with self.words.open("wb") as output:
            self.process = subprocess.Popen(
                [*command, "--cores", "2", *TARGET], env={**os.environ, **environment}, stdout=output, stderr=output,
                start_new_session=True,
            )  # fmt: skip

    def said(self):
        return self.words.read_text()

    def finish(self):
        assert self.process.wait(timeout=120) == 0, self.said()
        return self.said()


TARGET = ["results/preprocessed/p0.safetensors", "results/preprocessed/p1.safetensors"]


@pytest.fixture
def study(tmp_path):
    rows = [{"patient": f"p{i}", **write_patient(tmp_path / "data", f"p{i}", i)} for i in range(2)]
    write_sheet(tmp_path / "patients.tsv", rows)
    (tmp_path / "config.yaml").write_text(CONFIG)
    yield tmp_path
    for process in runs.processes_in(tmp_path):
        process.kill()


def snakemake_of(study):
    (process,) = [process for process in runs.processes_in(study) if runs._is_snakemake(process)]
    return process


@pytest.mark.slow
def test_one_command_goes_on_after_the_death_of_snakemake(study, tmp_path):
    brake = Brake(tmp_path, "*/preprocessed/p1*")
    dead = Started(study, **brake.environment)
    orphan, partial = brake.wait(dead)
    wait_until(lambda: "1 of 2 steps" in dead.said(), "the other patient is done", timeout_s=60)
    finished = (study / TARGET[0]).stat()
    snakemake_of(study).send_signal(signal.SIGKILL)
    dead.process.wait(timeout=30)
    said = Started(study).finish()
    assert f"Ending process {orphan}" in said
    assert "Removing the lock" in said
    assert (study / TARGET[1]).is_file()
    assert not (study / partial).exists()
    now = (study / TARGET[0]).stat()
    assert (now.st_ino, now.st_mtime_ns) == (finished.st_ino, finished.st_mtime_ns)
    assert not runs.processes_in(study)


@pytest.mark.slow
def test_a_run_that_lives_is_left_alone(study, tmp_path):
    brake = Brake(tmp_path, "*/preprocessed/p1*")
    first = Started(study, **brake.environment)
    brake.wait(first)
    (line,) = runs.prepare(study, unlock=refuse)
    assert f"process {snakemake_of(study).pid}" in line
    brake.release()
    first.finish()


def refuse():
    raise AssertionError("the lock of a run that may live was to be removed")


def write_log(study, date, text):
    """Write a log of Snakemake; date such as 2026-01-02T030405.000000."""
    path = study / ".snakemake" / "log" / f"{date}.snakemake.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def lock(study):
    path = study / ".snakemake" / "locks" / "0.input.lock"
    path.parent.mkdir(parents=True)
    path.write_text("a\n")


def test_a_study_without_traces_needs_nothing(tmp_path):
    assert runs.prepare(tmp_path, unlock=refuse) == []


def test_the_lock_of_another_machine_is_left_alone_and_named(tmp_path):
    write_log(tmp_path, "2026-01-02T030405.000000", HEAD.format(host="login-7"))
    lock(tmp_path)
    # a later run was refused here
    write_log(tmp_path, "2126-01-02T030405.000000", HEAD.format(host=HERE))
    (line,) = runs.prepare(tmp_path, unlock=refuse)
    assert "login-7 at 2026-01-02 03:04" in line
    assert "--unlock" in line


@pytest.fixture
def queue(tmp_path, monkeypatch):
    """A `squeue` that lists the jobs in a file by name, and a `scancel` that takes them out of it."""
    jobs = tmp_path / "queue"
    jobs.write_text("11 ours\n12 ours\n13 theirs\n")
    programs = tmp_path / "bin"
    programs.mkdir()
    squeue = f"""#!{sys.executable}
import sys
names = [name for word in sys.argv if word.startswith("--name=") for name in word[7:].split(",")]
for line in open({str(jobs)!r}):
    job, name = line.split()
    if not names or name in names:
        print(job)
"""
    scancel = f"""#!{sys.executable}
import sys
lines = [line for line in open({str(jobs)!r}) if line.split()[0] not in sys.argv]
open({str(jobs)!r}, "w").writelines(lines)
"""
    for name, text in (("squeue", squeue), ("scancel", scancel)):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    return jobs


def test_jobs_of_dead_runs_are_cancelled_and_no_others(tmp_path, queue):
    write_log(tmp_path, "2026-01-02T030405.000000", HEAD.format(host=HERE) + SLURM.format(name="ours"))
    unlocked = []
    lock(tmp_path)
    said = runs.prepare(tmp_path, unlock=lambda: unlocked.append(True))
    assert said[0].startswith("Cancelling 2 SLURM job(s)")
    assert "11, 12" in said[0]
    assert queue.read_text() == "13 theirs\n"
    assert unlocked == [True]


def test_a_slurm_that_fails_is_told_in_its_words(tmp_path, queue, monkeypatch):
    write_log(tmp_path, "2026-01-02T030405.000000", HEAD.format(host=HERE) + SLURM.format(name="ours"))
    squeue = Path(queue.parent / "bin/squeue")
    squeue.write_text("#!/bin/sh\necho slurm_load_jobs error: Unable to contact slurm controller >&2\nexit 1\n")
    assert squeue.stat().st_mode & stat.S_IXUSR
    with pytest.raises(SegtrustError, match="Unable to contact"):
        runs.prepare(tmp_path, unlock=refuse)
