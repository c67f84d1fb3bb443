"""Time and memory of planning: dry runs and runs with nothing to do, of studies with many patients.

    python benchmarks/dag.py [--patients 1251 10000] [--finished 1251] [--folder FOLDER]

Writes studies of simulated patients, four modalities and a reference each, tiny but valid NIfTI files, and two models:
a network with a checkpoint of 20 MB, whose dropout is sampled (20 passes), and predictions of nnU-Net, five folds with
two files each. Two networks would have as many jobs, but ten files less a patient. Nothing is computed: what is timed
is how long Snakemake and our rules take to see what there is to do. Each line is the whole command of a user
(`segtrust run STUDY` with the profile `local`, `segtrust status STUDY`) in a process of its own; memory is that of the
largest process, and `CPU s` are processor seconds, which depend less on what else the machine does.

A finished study is one whose every output, as Snakemake's own summary lists them, is a small file, and whose records
in .snakemake/metadata are written by `snakemake --touch --forceall`, by the same function as after a real job: dates,
params, sets of inputs and checksums are what a real run leaves, and a run with nothing to do compares all of them. The
touching sleeps 0.1 s a job; that is set to 0. Two dry runs after a change show that the records are looked at: after a
scan was replaced, and after the checkpoint was, which is seen by its digest among the params alone.

The line `a job's start` is what every job on a cluster pays before its script begins, and pays twice (sbatch starts a
Snakemake, which starts another with srun): Snakemake with the options of a job, which reads configuration and sheet
again and plans this job alone; it is run dry. The last line is JSON.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

MODALITIES = ("t1", "t1ce", "t2", "flair")
FOLDS = 5
CHECKPOINT_BYTES = 20_000_000
MODELS = {
    "network": {"network": {"name": "SegResNet-BraTS"}, "checkpoint": "model.pt"},
    "nnunet": {"predictions": "nnunet/fold_{pass}/{patient}.npz", "outputs": ["WT", "TC", "ET"]},
}
SEGTRUST = "import sys; from segtrust.cli import main; sys.exit(main())"
# Snakemake, whose --touch does not sleep
TOUCH = (
    "import sys; from snakemake.executors import touch; touch.Executor.SLEEPING_TIME = 0; "
    "from snakemake.cli import main; main(sys.argv[1:])"
)


def name_of(number):
    return f"BraTS_{number:05d}"


def write_study(folder, n_patients):
    """Write sheet, configuration, scans, predictions and checkpoint of a study; each file is one of its own."""
    import nibabel as nib
    import numpy as np

    affine = np.diag([-1.0, -1.0, 1.0, 1.0])
    image = nib.Nifti1Image(np.ones((4, 4, 4), np.int16), affine)
    scan = folder / "scan.nii.gz"
    folder.mkdir(parents=True)
    nib.save(image, scan)
    content = scan.read_bytes()
    scan.unlink()
    lines = ["\t".join(["patient", *MODALITIES, "seg", "site"])]
    for fold in range(FOLDS):
        (folder / "nnunet" / f"fold_{fold}").mkdir(parents=True)
    for number in range(n_patients):
        name = name_of(number)
        paths = [f"data/{name}/{name}_{column}.nii.gz" for column in (*MODALITIES, "seg")]
        (folder / "data" / name).mkdir(parents=True)
        for path in paths:
            (folder / path).write_bytes(content)
        for fold in range(FOLDS):
            for ending in ("npz", "pkl"):
                (folder / "nnunet" / f"fold_{fold}" / f"{name}.{ending}").write_bytes(b"simulated")
        lines.append("\t".join([name, *paths, f"site{number % 3}"]))
    (folder / "patients.tsv").write_text("\n".join(lines) + "\n")
    (folder / "model.pt").write_bytes(os.urandom(CHECKPOINT_BYTES))
    (folder / "config.yaml").write_text(yaml.safe_dump({"models": MODELS, "sample": {"device": "cpu"}}))


def snakemake(folder, *options):
    return [
        *(sys.executable, "-m", "snakemake", "--snakefile", str(ROOT / "Snakefile"), "--directory", str(folder)),
        *("--workflow-profile", str(ROOT / "profiles" / "local"), *options),
    ]


def finish(folder):
    """Write every output of a study, and Snakemake's records of them."""
    from segtrust.status import summary

    for row in summary(folder):
        path = folder / row["output_file"]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"simulated")
    # many jobs at a step: the scheduler looks at all that remain at every step
    fast = ["--cores", "200", "--scheduler", "greedy", "--scheduler-subsample", "200"]
    touch = [sys.executable, "-c", TOUCH, *snakemake(folder)[3:], "--touch", "--forceall", "--quiet", "all", *fast]
    measured(touch, folder)


def measured(command, folder):
    """Run a command; return its seconds, those of processors, the GiB of its largest process, and what it wrote.

    The benchmark itself stays small: a child's peak is never below what its parent held when it was started.
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    output = folder / "output.txt"
    began = time.perf_counter()
    with output.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - began
    text = output.read_text()
    if os.waitstatus_to_exitcode(status):
        raise SystemExit(f"{' '.join(command)}\n{text[-5000:]}")
    cpu_seconds = usage.ru_utime + usage.ru_stime
    return {"seconds": seconds, "cpu_seconds": cpu_seconds, "gib": usage.ru_maxrss / 2**20, "output": text}


def run(folder, *options):
    return measured([sys.executable, "-c", SEGTRUST, "run", str(folder), *options], folder)


def jobs_in(output):
    """Return the number of jobs that a run planned."""
    if "Nothing to be done" in output:
        return 0
    return int(re.findall(r"^total\s+(\d+)$", output, re.MULTILINE)[-1])


def files_in(folder):
    return sum(len(files) for _, _, files in os.walk(folder))


def job_start(folder):
    name = name_of(0)
    options = ["--target-jobs", f"tally:model=network,patient={name}", "--allowed-rules", "tally", "--force"]
    return measured(
        snakemake(folder, *options, "--mode", "subprocess", "--nolock", "--ignore-incomplete", "-n"), folder
    )


def line(what, n_patients, result, n_jobs, n_files):
    shown = "" if n_jobs is None else f"{n_jobs:,}"
    print(
        f"{what:44}{n_patients:>10,}{shown:>10}{n_files:>10,}{result['seconds']:>10.1f}"
        f"{result['cpu_seconds']:>8.1f}{result['gib']:>8.2f}",
        flush=True,
    )


def measure_unstarted(folder, n_patients):
    """Print and return the dry run of a study of which nothing is done."""
    write_study(folder, n_patients)
    n_files = files_in(folder)
    result = run(folder, "-n")
    line("dry run, nothing done", n_patients, result, jobs_in(result["output"]), n_files)
    return result


def measure_finished(folder, n_patients):
    """Print the lines of a finished study; return what a run with nothing to do took."""
    finish(folder)
    n_files = files_in(folder)

    def show(what, result, count=True):
        n_jobs = jobs_in(result["output"]) if count else None
        line(what, n_patients, result, n_jobs, n_files)
        return n_jobs

    noop = run(folder)
    if show("run, nothing to do", noop):
        raise SystemExit(f"a finished study had something to do:\n{noop['output'][-3000:]}")
    show("dry run, nothing to do", run(folder, "-n"))
    show("segtrust status", measured([sys.executable, "-c", SEGTRUST, "status", str(folder)], folder), count=False)
    show("a job's start", job_start(folder), count=False)
    scan = folder / "data" / name_of(0) / f"{name_of(0)}_t1.nii.gz"
    scan.write_bytes(scan.read_bytes() + b"\0")
    show("dry run, a scan replaced", run(folder, "-n"))
    (folder / "model.pt").write_bytes(os.urandom(CHECKPOINT_BYTES))
    os.utime(folder / "model.pt", (0, 0))
    show("dry run, and the checkpoint (of an old date)", run(folder, "-n"))
    return noop


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--patients", type=int, nargs="+", default=[1_251, 10_000])
    parser.add_argument(
        "--finished", type=int, nargs="*", default=[1_251], help="of these, what follows a finished study"
    )
    parser.add_argument("--folder", help="keeps the studies here")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(arguments.folder or scratch)
        print(f"{'':44}{'patients':>10}{'jobs':>10}{'files':>10}{'seconds':>10}{'CPU s':>8}{'GiB':>8}")
        dry = {n: measure_unstarted(folder / str(n), n) for n in arguments.patients}
        noop = {n: measure_finished(folder / str(n), n) for n in arguments.finished}
    print(
        json.dumps(
            {
                "dry_run_seconds_1251": dry.get(1_251, {}).get("seconds"),
                "dry_run_gib_1251": dry.get(1_251, {}).get("gib"),
                "noop_seconds_1251": noop.get(1_251, {}).get("seconds"),
                "noop_gib_1251": noop.get(1_251, {}).get("gib"),
                "dry_run_seconds_10000": dry.get(10_000, {}).get("seconds"),
                "dry_run_gib_10000": dry.get(10_000, {}).get("gib"),
            }
        )
    )


if __name__ == "__main__":
    main()
