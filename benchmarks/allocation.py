"""How busy an allocation keeps its GPUs: patients of a few seconds each, with warm workers and without.

    python benchmarks/allocation.py [--patients N] [--seconds S] [--gpus N] [--passes T]

Runs a study as users do, by `segtrust run STUDY --profile allocation`, from preprocessed scans with a brain box of
136 × 184 × 136 voxels to the moments of T passes under a SegResNet of the published shape, and once more with
`--set-resources sample:warm=0`, so that every job starts PyTorch and opens the network itself. The busy share of a GPU
is the time in which it computes, between the first start and the last end of computing; what comes before the first
start is in the seconds of the whole run alone.

Where there is no GPU, a STAND-IN takes its place, and only its place: for S seconds per patient it keeps one processor
busy, as PyTorch does that waits for a GPU, and returns sums of the true size. Libraries, weights, files, jobs, locks
and workers are the real ones. Without a GPU nothing starts CUDA, which jobs without a worker would do for each patient.

The last line is JSON.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import yaml
from sample import BOX, CHANNELS, NETWORK, OUTPUTS, SHAPE, draw_scan, random_network

EVENTS, STAND_IN = "ALLOCATION_BENCHMARK_EVENTS", "ALLOCATION_BENCHMARK_STAND_IN_S"

# runs in every Python process of the study, by the name that Python looks for when it starts: it replaces, or only
# times, the function that draws passes; what calls it knows nothing of it
SITE_CUSTOMIZE = """
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import PathFinder


class Timed(MetaPathFinder, Loader):
    def find_spec(self, name, path, target=None):
        if name != "segtrust.sample":
            return None
        spec = PathFinder.find_spec(name, path)
        self.loader, spec.loader = spec.loader, self
        return spec

    def create_module(self, spec):
        return None

    def exec_module(self, module):
        self.loader.exec_module(module)
        sys.path.insert(0, {folder!r})
        import allocation

        module.sample = allocation.timed(module.sample)


sys.meta_path.insert(0, Timed())
"""


def timed(sample):
    """Return a function that does what `sample` does, or the stand-in, and notes when on which GPU."""
    from functools import wraps

    stand_in_s = float(os.environ.get(STAND_IN, 0))

    @wraps(sample)
    def wrapped(scan, backend, **settings):
        began = time.monotonic()
        if stand_in_s:
            work_for(stand_in_s)
        else:
            moments = sample(scan, backend, **settings)
        event = json.dumps([os.environ["CUDA_VISIBLE_DEVICES"], began, time.monotonic()])
        with open(os.environ[EVENTS], "a") as events:
            events.write(event + "\n")
        return sums_of_true_size(scan, settings) if stand_in_s else moments

    return wrapped


def work_for(seconds):
    """Keep one processor busy, and Python's lock free, as PyTorch does that waits for a GPU."""
    import hashlib

    until, block = time.monotonic() + seconds, bytes(2**20)
    while time.monotonic() < until:
        hashlib.sha256(block)


def sums_of_true_size(scan, settings):
    """Return Moments as passes on the whole brain box leave them; their numbers mean nothing."""
    from segtrust.moments import Moments, _dtypes
    from segtrust.sources import block_of

    shape, source, passes = scan.image.shape[1:], settings["source"].name, settings["passes"]
    blocks = {block_of(number): None for number in passes}
    return Moments(
        {
            (source, block): {name: np.full((3, *shape), 1, dtype) for name, dtype in _dtypes(block).items()}
            for block in blocks
        },
        {(source, number): np.ones(3, np.int64) for number in passes},
        np.full((3, *shape), 0.5, np.float32),
        scan.start,
        scan.geometry,
    )


def write_study(folder, n_patients, n_passes):
    """Write a study whose patients are preprocessed already; they are all the same."""
    import nibabel as nib

    from segtrust.preprocess import MODALITIES, write_preprocessed

    (folder / "data").mkdir()
    nib.save(nib.Nifti1Image(np.ones((8, 8, 8), np.uint8), np.eye(4)), folder / "data/scan.nii.gz")
    lines = ["\t".join(["patient", *MODALITIES, "seg"])]
    lines += ["\t".join([f"p{number}", *["data/scan.nii.gz"] * len(MODALITIES), ""]) for number in range(n_patients)]
    (folder / "patients.tsv").write_text("\n".join(lines) + "\n")
    random_network(folder, NETWORK)
    config = {
        "models": {"m": {"network": NETWORK, "checkpoint": "weights.pt", "channels": CHANNELS, "outputs": OUTPUTS}},
        "sample": {"passes": n_passes, "backend": "torch"},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    first = folder / "results/preprocessed/p0.safetensors"
    write_preprocessed(first, draw_scan(SHAPE, BOX), {"preprocess": "drawn"})
    for number in range(1, n_patients):
        shutil.copyfile(first, first.with_name(f"p{number}.safetensors"))


def run(folder, devices, stand_in_s, *options):
    """Run the study; return ({GPU: [(start, end), …]}, seconds of the whole run)."""
    events, site, locks = folder / "events", folder / "site", folder / "locks"
    for place in (site, locks):
        place.mkdir(exist_ok=True)
    events.unlink(missing_ok=True)
    shutil.rmtree(folder / "results/m", ignore_errors=True)
    (site / "sitecustomize.py").write_text(SITE_CUSTOMIZE.format(folder=str(Path(__file__).resolve().parent)))
    environment = {
        **os.environ,
        "CUDA_VISIBLE_DEVICES": ",".join(devices),
        "PYTHONPATH": os.pathsep.join(filter(None, [str(site), os.environ.get("PYTHONPATH")])),
        "TMPDIR": str(locks),
        EVENTS: str(events),
        STAND_IN: str(stand_in_s),
    }
    command = [sys.executable, "-c", "import sys; from segtrust.cli import main; sys.exit(main())", "run", str(folder)]
    command += ["--profile", "allocation", "--until", "sample", "--retries", "0", *options]
    began = time.monotonic()
    done = subprocess.run(command, env=environment, check=False, capture_output=True, text=True)
    seconds = time.monotonic() - began
    end_workers(locks, devices)
    if done.returncode:
        raise SystemExit(done.stdout + done.stderr)
    times = {}
    for line in events.read_text().splitlines():
        device, start, end = json.loads(line)
        times.setdefault(device, []).append((start, end))
    return {device: sorted(intervals) for device, intervals in sorted(times.items())}, seconds


def end_workers(locks, devices):
    """Do not wait for the minute that workers wait."""
    from segtrust import gpus

    tempfile.tempdir = str(locks)
    for device in devices:
        gpus.dismiss(device)
    tempfile.tempdir = None


def busy_shares(times):
    """Return {GPU: share of the time between its first start and its last end in which it computes}."""
    for device, intervals in times.items():
        for (_, end), (start, _) in pairwise(intervals):
            if start < end:
                raise SystemExit(f"two jobs computed on GPU {device} at once")
    return {
        device: sum(end - start for start, end in intervals) / (intervals[-1][1] - intervals[0][0])
        for device, intervals in times.items()
    }


def main():
    from segtrust import gpus

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--patients", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=3, help="of the stand-in, per patient")
    parser.add_argument("--gpus", type=int, default=1, help="that are pretended where there is none")
    parser.add_argument("--passes", type=int, default=20)
    arguments = parser.parse_args()

    devices = gpus.visible()
    stand_in_s = 0 if devices else arguments.seconds
    device = "stand-in, no GPU here"
    if devices:
        listed = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        device = subprocess.run(listed, capture_output=True, text=True, check=True).stdout.splitlines()[0]
    devices = devices or [str(number) for number in range(arguments.gpus)]
    results = {}
    # the local folder of results is what users have in an allocation too, or slower
    with tempfile.TemporaryDirectory() as folder:
        write_study(Path(folder), arguments.patients, arguments.passes)
        for name, options in (("warm", ()), ("cold", ("--set-resources", "sample:warm=0"))):
            times, seconds = run(Path(folder), devices, stand_in_s, *options)
            results[name] = busy_shares(times), times, seconds

    work = [end - start for intervals in results["warm"][1].values() for start, end in intervals]
    print(
        f"{arguments.patients} patients, {arguments.passes} passes, {len(devices)} × {device}, "
        f"{np.mean(work):.2f} s of computing each, {len(os.sched_getaffinity(0))} processors\n"
    )
    print(f"{'':22}{'GPU':>6}{'patients':>10}{'busy share':>12}{'whole run, s':>14}")
    for name, (shares, times, seconds) in results.items():
        words = {"warm": "a worker per GPU", "cold": "every job by itself"}[name]
        for gpu, share in shares.items():
            print(f"{words:22}{gpu:>6}{len(times[gpu]):>10}{share:>12.2f}{seconds:>14.1f}")
    print(
        json.dumps(
            {
                "busy_share": min(results["warm"][0].values()),
                "busy_share_cold": min(results["cold"][0].values()),
                "patients": arguments.patients,
                "seconds_of_work": float(np.mean(work)),
                "device": device,
                "gpus": len(devices),
                "processors": len(os.sched_getaffinity(0)),
                "seconds": results["warm"][2],
                "seconds_cold": results["cold"][2],
            }
        )
    )


if __name__ == "__main__":
    main()
