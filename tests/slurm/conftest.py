"""A SLURM for the time of the tests, and one study that ran through it undisturbed."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from brakes import wait_until
from conftest import write_patient, write_sheet

from segtrust.config import ROOT

from .cluster import ACCOUNT, PARTITION, Cluster, processes_with, why_not

REPEAT = int(os.environ.get("SEGTRUST_REPEAT", "1"))
REQUIRED = os.environ.get("SEGTRUST_REQUIRE") == "1"
RUN_S = 480
SPLITS = {"p0": "train", "p1": "validation", "p2": "test", "p3": "test"}
MODEL = {
    "network": {"name": "UNet-Res", "channels": [4, 8], "strides": [2]},
    "outputs": {"softmax": ["background", "NCR", "ED", "ET"]},
    "train": {"iterations": 4, "batch": 1, "patch": [8, 8, 8], "validate_every": 2},
}
# a GPU is asked for where the device is not `cpu`; where the node has none that computes, `auto` takes the processor
CONFIG = {
    "models": {"tiny": MODEL},
    "sample": {"passes": 4, "passes_per_job": 2, "device": "auto"},
    "cohort": {"resamples": 100},
}
# what the pretended node and the patience of a test ask for, beside the profile as users have it
OPTIONS = [
    *("--slurm-init-seconds-before-status-checks", "1", "--latency-wait", "10"),
    *("--set-threads", "train=2"),
]
SITE = ["--default-resources", f"slurm_account={ACCOUNT}", f"slurm_partition={PARTITION}"]


def pytest_generate_tests(metafunc):
    """Repeat the faults as often as SEGTRUST_REPEAT says."""
    if metafunc.module.__name__.endswith("test_faults") and REPEAT > 1:
        metafunc.fixturenames.append("repetition")
        metafunc.parametrize("repetition", range(REPEAT))


def pytest_collection_modifyitems(items):
    """Let every fault come once before any comes again, so that a stress that is stopped has seen them all."""
    items.sort(key=lambda item: (getattr(item, "callspec", None) and item.callspec.params.get("repetition")) or 0)


@pytest.fixture(scope="session")
def cluster():
    """A SLURM of our own; skips, or with SEGTRUST_REQUIRE=1 fails, where there can be none."""
    if reason := why_not():
        (pytest.fail if REQUIRED else pytest.skip)(reason)
    slurm = Cluster()
    try:
        slurm.start()
        yield slurm
    finally:
        slurm.stop()


@dataclass
class Run:
    """A Snakemake that was started on a study.

    process : `subprocess.Popen`
    words : Path of the file of all it says
    """

    process: subprocess.Popen
    words: Path

    def said(self):
        return self.words.read_text(errors="replace")

    def id(self):
        """Return the name that all its jobs have in SLURM."""
        return re.search("SLURM run ID: (\\S+)", self.said())[1]

    def finish(self, expect=0):
        """Wait for its end, and return what it said."""
        try:
            status = self.process.wait(timeout=RUN_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise AssertionError(f"Snakemake has not ended within {RUN_S} s:\n{self.said()}") from None
        assert status == expect, self.said()
        return self.said()


@dataclass
class Study:
    """A folder with patients and a configuration, and the SLURM it runs on."""

    folder: Path
    cluster: Cluster

    def start(self, *arguments, profile=("--workflow-profile", "profiles/slurm"), site=SITE, **environment):
        """Start Snakemake as a user does, and return a `Run`.

        site : what a user would write into the lines of the profile that are marked SITE
        """
        command = ["-m", "snakemake", "--directory", str(self.folder), *arguments, *profile]
        return self._started(command, site, environment)

    def start_segtrust(self, *arguments, site=SITE, **environment):
        """Start `segtrust run`, and return a `Run`."""
        code = "from segtrust.cli import main; raise SystemExit(main())"
        command = ["-c", code, "run", str(self.folder), "--profile", "slurm", *arguments]
        return self._started(command, site, environment)

    def _started(self, command, site, environment):
        words = self.folder / f"snakemake-{time.monotonic_ns()}.out"
        with words.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, *command, *OPTIONS, *site], cwd=ROOT, env={**self.cluster.environment, **environment},
                stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        return Run(process, words)

    def abandon(self):
        """End what a test that failed has left running."""
        for process in processes_with(str(self.folder)):
            os.kill(process, signal.SIGKILL)
        for job in self.cluster.queue():
            self.cluster("scancel", "--full", job["id"])
        wait_until(lambda: not self.cluster.queue(), "the end of all jobs")

    def run(self, *arguments, expect=0, **options):
        return self.start(*arguments, **options).finish(expect)


def write_study(folder):
    rows = []
    for number, (patient, split) in enumerate(SPLITS.items()):
        paths = write_patient(folder / "data", patient, number)
        relative = {column: str(Path(path).relative_to(folder)) for column, path in paths.items()}
        rows.append({"patient": patient, **relative, "split": split})
    write_sheet(folder / "patients.tsv", rows)
    (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG))


@pytest.fixture(scope="session")
def undisturbed(cluster, tmp_path_factory):
    """A study that ran through SLURM once, with nothing in its way, and its `Run`; nobody may change it."""
    # the name has a space and letters that are not ASCII, as a user's may
    study = Study(tmp_path_factory.mktemp("a quiet stüdy"), cluster)
    write_study(study.folder)
    run = study.start()
    run.finish()
    return study, run


@pytest.fixture
def study(undisturbed, tmp_path):
    """A copy of the study that has run, to take results from and to run again."""
    finished, _ = undisturbed
    study = Study(Path(shutil.copytree(finished.folder, tmp_path / "study")), finished.cluster)
    yield study
    study.abandon()
