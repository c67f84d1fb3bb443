"""What a user gets wrong on a cluster, done to a real SLURM: each is told in words, at the earliest place.

A login node with a disk of its own is played by a mount namespace: what Snakemake sees under `local`, SLURM's node
does not.
"""

import re
import subprocess
import sys

import pytest
import torch
import yaml
from conftest import write_patient, write_sheet

from segtrust import clusters
from segtrust.config import ROOT
from segtrust.errors import Problems
from segtrust.networks import build
from segtrust.patients import read_sheet
from segtrust.preprocess import preprocess, read_modalities, write_preprocessed

from .cluster import ACCOUNT, PARTITION, wait_until
from .conftest import OPTIONS, SITE, Run

pytestmark = pytest.mark.slow

NETWORK = {"name": "UNet-Res", "channels": [4, 8], "strides": [2]}
MAPS, VOXELS = "results/tiny/maps/p1_entropy.nii.gz", "results/tiny/voxels/p1.parquet"
SCANS, SAMPLES = "results/preprocessed/p0.safetensors", "results/tiny/samples/p1/member0_0-1.safetensors"

# a job takes less, beside the others; a status that is asked for too early is asked for again 10 s later still
PATIENCE = ["--slurm-init-seconds-before-status-checks", "10"]


def write_study(folder, data, checkpoint):
    """Write a study of two patients and a given checkpoint; data, checkpoint : Paths anywhere."""
    folder.mkdir()
    rows = [{"patient": name, **write_patient(data, name, seed)} for seed, name in enumerate(("p0", "p1"))]
    write_sheet(folder / "patients.tsv", rows)
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    torch.save(build(NETWORK, seed=0).state_dict(), checkpoint)
    model = {
        "network": NETWORK,
        "outputs": {"softmax": ["background", "NCR", "ED", "ET"]},
        "checkpoint": str(checkpoint),
    }
    config = {"models": {"tiny": model}, "sample": {"passes": 2}, "cohort": {"resamples": 100}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))


def preprocess_here(study, name):
    """Spare a run a job of SLURM."""
    patient = next(patient for patient in read_sheet(study / "patients.tsv") if patient.patient == name)
    volumes, geometry = read_modalities(patient.scan, name)
    write_preprocessed(study / f"results/preprocessed/{name}.safetensors", preprocess(volumes, geometry), {})


def start(cluster, study, *arguments, words, local=None, moved=None):
    """Start Snakemake on a login node; local : folder of a disk of its own, to which `moved` is moved first."""
    command = [sys.executable, "-m", "snakemake", "--directory", str(study), *arguments]
    command += ["--workflow-profile", "profiles/slurm", *OPTIONS, *SITE, *PATIENCE, "--retries", "0"]
    if local:
        script = 'mount -t tmpfs tmpfs "$1" && cp -r "$2" "$1" && shift 2 && exec "$@"'
        command = ["unshare", "--mount", "sh", "-c", script, "sh", str(local), str(moved), *command]
    with words.open("wb") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, env=cluster.environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    return Run(process, words)


@pytest.fixture(scope="module")
def runs(cluster, tmp_path_factory):
    """Four runs side by side, each with mistakes of its own; all have ended."""
    folder = tmp_path_factory.mktemp("what a login node sees")
    local = folder / "local"
    local.mkdir()
    started = {}
    # the whole study on the disk of the login node
    write_study(folder / "unshared", folder / "unshared/data", folder / "unshared/model.pt")
    started["study"] = start(
        cluster, local / "unshared", SCANS,
        words=folder / "study.out", local=local, moved=folder / "unshared",
    )  # fmt: skip
    # the checkpoint there
    write_study(folder / "shared", folder / "shared data", folder / "weights/model.pt")
    config = (folder / "shared/config.yaml").read_text()
    (folder / "shared/config.yaml").write_text(config.replace(f"{folder}/weights", f"{local}/weights"))
    started["checkpoint"] = start(
        cluster, folder / "shared", SCANS,
        words=folder / "checkpoint.out", local=local, moved=folder / "weights",
    )  # fmt: skip
    # the scans there
    write_study(folder / "given", folder / "given data", folder / "model.pt")
    sheet = (folder / "given/patients.tsv").read_text()
    (folder / "given/patients.tsv").write_text(sheet.replace(f"{folder}/given data", f"{local}/given data"))
    started["scans"] = start(
        cluster, folder / "given", "results/preprocessed/p0.safetensors",
        words=folder / "scans.out", local=local, moved=folder / "given data",
    )  # fmt: skip
    # names as people give them, and two rules that ask for what the cluster does not have
    odd = folder / "Studie «ü» für alle, 脑"
    write_study(odd, folder / "Daten (neu)/é", folder / "Gewichte & mehr/modèle 1.pt")
    preprocess_here(odd, "p1")
    started["names"] = start(
        cluster, odd, SCANS, MAPS, VOXELS, "--set-resources", "maps:slurm_partition=nowhere", "voxels:gpu=1",
        "voxels:gpu_model=a100", words=folder / "names.out",
    )  # fmt: skip
    try:
        for run in started.values():
            run.finish(expect=1)
        yield started
    finally:
        for run in started.values():
            if run.process.poll() is None:
                run.process.kill()


def words(run):
    """Return what is said of a run's failures on the cluster, which Snakemake shows on its standard output."""
    return re.search(r"On the cluster:\n(?:  .*\n)+", run.said())[0]


def test_a_study_that_no_node_sees_is_called_so(runs):
    assert re.search(
        r"1 ×: ended at once and without a log\. Most likely its node has no folder .*/unshared", words(runs["study"])
    )


def test_a_checkpoint_that_no_node_sees_is_named_with_its_remedy(runs):
    said = words(runs["checkpoint"])
    assert re.search(r"refused on its node.*there is no checkpoint .*/local/weights/model\.pt", said, re.DOTALL)
    assert "a disk that all nodes share" in said


def test_scans_that_no_node_sees_are_named(runs):
    said = words(runs["scans"])
    assert re.search(r"does not see 4 file\(s\) of this job", said)
    assert len(re.findall(r"  - .*/local/given data/p0/p0_(?:t1|t1ce|t2|flair)\.nii\.gz", said)) == 4
    assert "a disk that all nodes share" in said


def test_paths_with_spaces_and_letters_that_are_not_ascii_pass_through_sbatch(runs):
    study = runs["names"].words.parent / "Studie «ü» für alle, 脑"
    assert (study / SCANS).is_file()
    assert (study / SAMPLES).is_file()


def test_what_sbatch_refuses_is_told_with_a_remedy(runs):
    said = words(runs["names"])
    assert re.search("1 ×: SLURM did not take it: .*Invalid partition name specified.*`sinfo` lists", said)
    assert re.search("1 ×: SLURM did not take it: .*Requested node configuration is not available.*GPUs", said)
    assert len(said.splitlines()) == 3


@pytest.fixture
def here(cluster, monkeypatch):
    for name, value in cluster.environment.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def study(tmp_path):
    write_study(tmp_path / "study", tmp_path / "data", tmp_path / "model.pt")
    return tmp_path / "study"


def test_a_profile_that_fits_the_cluster_is_let_through(here, study):
    assert clusters.check(ROOT / "profiles/slurm", study, []) == []
    assert clusters.check(ROOT / "profiles/slurm", study, SITE) == []


def test_partitions_and_accounts_are_compared_with_those_of_the_cluster(here, study):
    wrong = ["--default-resources", "slurm_partition=nowhere", "slurm_account=nobody"]
    with pytest.raises(Problems) as raised:
        clusters.check(ROOT / "profiles/slurm", study, wrong)
    partition, account = raised.value.problems
    assert f"no partition 'nowhere'; It has {PARTITION} (GPUs; the default)" in partition
    assert re.search(rf"no account 'nobody' on this cluster; yours are .*\b{ACCOUNT}\b", account)


def test_a_cluster_without_a_default_partition_is_told_before_anything_is_submitted(here, study, cluster):
    cluster("scontrol", "update", f"partitionname={PARTITION}", "default=no")
    try:
        with pytest.raises(Problems, match="no partition is named, and the cluster has none by default"):
            clusters.check(ROOT / "profiles/slurm", study, [])
    finally:
        cluster("scontrol", "update", f"partitionname={PARTITION}", "default=yes")


def test_gpus_of_a_drained_node_are_noted(here, study, cluster):
    node = f"nodename={cluster.node}"
    cluster("scontrol", "update", node, "state=drain", "reason=test")
    try:
        assert "jobs will wait" in clusters.check(ROOT / "profiles/slurm", study, [])[0]
    finally:
        cluster("scontrol", "update", node, "state=resume")
        wait_until(lambda: "idle" in cluster("sinfo", "-h", "-o", "%T"), "the node is back")
