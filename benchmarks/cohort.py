"""Time and memory of a cohort: the tallies of many patients, pooled with intervals for every row.

    python benchmarks/cohort.py [--patients 10 100 1251 10000] [--resamples 2000] [--threads 2] [--files 1251]
        [--folder FOLDER]

Draws eight patients of 240 × 240 × 155 voxels as `benchmarks/tally.py` does, and fills the tallies of 1,251 patients
from them: each has the counts of one of the eight, multiplied bin by bin by random factors, and its metrics computed
from those. Larger cohorts use the files again, with other scores. Each number of patients runs in a process of its own.
What a user would call instead is timed too: the AUROC of voxels, by scikit-learn. The last line is JSON.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

N_DRAWN = 8
SETTINGS = {"model": "bench", "failure_dice": 0.8, "seed": 0, "n_bins": [10, 15, 20]}


def draw(folder, number):
    """Write the tally of a drawn patient, with the tallies after 5 and 10 passes that a run of 20 has."""
    from tally import draw_patient

    from segtrust.convergence import tally_of_means
    from segtrust.tally import Tally
    from segtrust.voxels import voxels

    summary, labels, brain = draw_patient(number)
    spacing = (1.0, 1.0, 1.0)
    early = {
        passes: tally_of_means(summary.probability, summary.expected_entropy, labels, brain, spacing)
        for passes in (5, 10)
    }
    table = voxels(summary, labels, brain, brain, spacing_mm=spacing, patient="drawn", convergence=early)
    Tally.of(table).write(Path(folder) / f"drawn{number}.parquet", {})


def fill(folder, first, last):
    """Write the tallies of patients from those of drawn ones."""
    from segtrust.tally import LAYOUTS, Cells, Tally
    from segtrust.values import to_text

    drawn = [Tally.read(Path(folder) / f"drawn{number}.parquet")[0] for number in range(N_DRAWN)]
    for number in range(first, last):
        generator = np.random.default_rng(number)
        scale = generator.uniform(0.5, 1.5)

        def varied(tally, generator=generator, scale=scale):
            tables = {}
            for name, layout in LAYOUTS.items():
                cells = tally._tables[name]
                # a bin holds the same voxels in many masks: they vary together
                factor = scale * np.exp(0.3 * generator.normal(size=len(layout.series) * layout.size))
                n = np.rint(cells.n * factor[cells.key % len(factor)]).astype(np.int64)
                kept = n > 0
                sums = cells.sums[kept] * (n[kept] / cells.n[kept])[:, np.newaxis]
                tables[name] = Cells(cells.key[kept], n[kept], sums)
            counts = {name: np.rint(value * scale).astype(np.int64) for name, value in tally.counts.items()}
            return Tally(tables, counts, tally.cases, tally.available, tally.settings)

        base = drawn[number % N_DRAWN]
        one = varied(base)
        one.convergence = {passes: varied(early) for passes, early in base.convergence.items()}
        one.write(Path(folder) / f"{number}.parquet", {}, to_text(one))


def run_cohort(folder, n_patients, n_resamples, threads, n_files):
    import pandas as pd
    from threadpoolctl import threadpool_limits

    from segtrust.cohort import cohort
    from segtrust.pool import StoredTally

    began = time.perf_counter()
    tallies = []
    for number in range(n_patients):
        tally = StoredTally(Path(folder) / f"{number % n_files}.parquet")
        if number >= n_files:
            factor = np.random.default_rng(number).uniform(0.9, 1.1)
            changed = {key: value * factor for key, value in tally.metrics.items() if key.metric == "mean_uncertainty"}
            tally.metrics = {**tally.metrics, **changed}
        tallies.append(tally)
    names = [f"p{number:05d}" for number in range(n_patients)]
    patients = pd.DataFrame({"patient": names, "subject": names, "split": "test", "coding": "brats2021"})
    with threadpool_limits(threads):
        tables = cohort(tallies, patients, n_resamples=n_resamples, threads=threads, **SETTINGS)
    size = sum(path.stat().st_size for path in Path(folder).glob("[0-9]*.parquet")) / 1e6
    return {
        "seconds": time.perf_counter() - began,
        "rows": len(tables["metrics"]),
        "mb": size / len(list(Path(folder).glob("[0-9]*.parquet"))),
    }


def run_library(folder):
    """Return the seconds that the AUROC of a patient's voxels takes by scikit-learn, measured on ten of them."""
    from sklearn.metrics import roc_auc_score
    from tally import draw_patient

    from segtrust.measures import binary_entropy

    summary, labels, brain = draw_patient(0)
    probability = summary.probability[0][brain]
    score, error = binary_entropy(probability), (probability >= 0.5) != (labels[brain] > 0)
    scores, errors = np.tile(score, 10), np.tile(error, 10)
    began = time.perf_counter()
    roc_auc_score(errors, scores)
    return {"seconds": (time.perf_counter() - began) / 10, "voxels": int(brain.sum())}


def in_a_process(*arguments):
    command = [sys.executable, __file__, "--run", *map(str, arguments)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stdout + done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--patients", type=int, nargs="+", default=[10, 100, 1_251, 10_000])
    parser.add_argument("--resamples", type=int, default=2_000)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--files", type=int, default=1_251, help="fills so many tallies, about 1 s each on one core")
    parser.add_argument("--folder", help="keeps the tallies here, and uses those that are there")
    parser.add_argument("--run", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        which, *rest = arguments.run
        result = run_library(*rest) if which == "library" else run_cohort(rest[0], *map(int, rest[1:]))
        print(json.dumps({**result, "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}))
        return

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(arguments.folder or scratch)
        folder.mkdir(parents=True, exist_ok=True)
        n_files = min(max(arguments.patients), arguments.files)
        with ProcessPoolExecutor(arguments.threads) as executor:
            drawn = [number for number in range(N_DRAWN) if not (folder / f"drawn{number}.parquet").exists()]
            list(executor.map(draw, [folder] * len(drawn), drawn))
            missing = [number for number in range(n_files) if not (folder / f"{number}.parquet").exists()]
            starts = range(missing[0], n_files, 25) if missing else []
            list(executor.map(fill, [folder] * len(starts), starts, [min(start + 25, n_files) for start in starts]))
        results = {
            n: in_a_process("cohort", folder, n, arguments.resamples, arguments.threads, n_files)
            for n in arguments.patients
        }
        library = in_a_process("library", folder)

    largest = results[max(results)]
    print(
        f"{largest['rows']:,} rows of metrics, {arguments.resamples:,} resamples, {arguments.threads} threads, "
        f"tallies of {largest['mb']:.1f} MB\n"
    )
    print(f"{'patients':>10}{'seconds':>10}{'s/patient':>11}{'peak GiB':>10}")
    for n, result in results.items():
        print(f"{n:10,}{result['seconds']:10.1f}{result['seconds'] / n:11.3f}{result['peak_gib']:10.2f}")
    each, whole = library["seconds"], library["seconds"] * 1_251 * arguments.resamples / 3_600
    print(
        f"\none AUROC of one patient's {library['voxels']:,} voxels by scikit-learn: {each:.2f} s; one row of 1,251 "
        f"patients with {arguments.resamples:,} resamples on voxels would take {whole:,.0f} h"
    )
    print(
        json.dumps(
            {
                "seconds_1251": results.get(1_251, {}).get("seconds"),
                "peak_gib_1251": results.get(1_251, {}).get("peak_gib"),
                "seconds_by_patients": {str(n): result["seconds"] for n, result in results.items()},
                "peak_gib_by_patients": {str(n): result["peak_gib"] for n, result in results.items()},
            }
        )
    )


if __name__ == "__main__":
    main()
