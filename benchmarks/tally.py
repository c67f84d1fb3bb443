"""Time and memory of one patient's voxel metrics: the tally, beside scikit-learn and torchmetrics on the same arrays.

    python benchmarks/tally.py

Draws a patient of 240 × 240 × 155 voxels (20 passes, a nested tumour, smooth errors), writes its voxels table, and
computes every metric of every region, mask and measure from a tally. The libraries compute what they have of the
same table (AUROC, average precision, Brier score, log loss, two calibration errors) on a measured part: all masks of
one region, one measure and one probability. The rest is extrapolated row by row, in proportion to the number of
voxels. Each runs in a process of its own, on one core. The last line is JSON.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from scipy import ndimage

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from segtrust import metrics
from segtrust.files import write_parquet
from segtrust.masks import MASKS
from segtrust.measures import MEASURES, OWN_ERRORS, binary_entropy
from segtrust.moments import Summary
from segtrust.regions import REGIONS
from segtrust.tally import DETERMINISTIC, PROBABILITY, Tally
from segtrust.voxels import voxels

SHAPE = (240, 240, 155)
PASSES = 20
DRAWN = 4  # passes drawn; each counts five times, which changes no cost
REPEATS = 3
IN_REGION = {"WT": (1, 2, 3), "TC": (1, 3), "ET": (3,)}


def smooth(generator, sigma):
    field = ndimage.gaussian_filter(generator.normal(size=SHAPE).astype(np.float32), sigma)
    return field / field.std()


def draw_patient(seed):
    """Return (summary, labels, brain) of a patient with about 1.4 million brain voxels."""
    generator = np.random.default_rng(seed)
    axes = np.meshgrid(*(np.linspace(-1, 1, size, dtype=np.float32) for size in SHAPE), indexing="ij", sparse=True)
    brain = sum((axis / extent) ** 2 for axis, extent in zip(axes, (0.54, 0.68, 0.82), strict=True)) < 1
    millimetres = [(axis + 0.15) * size / 2 for axis, size in zip(axes, SHAPE, strict=True)]
    distance = np.sqrt(sum(axis**2 for axis in millimetres))
    bumps, errors = smooth(generator, 5), smooth(generator, 2.5)
    labels = np.zeros(SHAPE, np.uint8)
    mean, own, expected, variance, votes = ([] for _ in range(5))
    for radius, label in ((30, 2), (19, 1), (13, 3)):
        depth = (radius - distance + 6 * bumps) / 2
        labels[(depth > 0) & brain] = label
        logit = np.where(brain, depth + 1.5 * errors, -200)
        passes = np.stack([logit + 0.7 * smooth(generator, 1.5) for _ in range(DRAWN)])
        passes = np.where(brain, 1 / (1 + np.exp(-np.clip(passes, -80, 80))), 0)
        passes = (np.rint(passes * 2**24) / 2**24).astype(np.float32)  # as moments keep them
        mean.append(passes.mean(axis=0))
        own.append(np.where(brain, 1 / (1 + np.exp(-np.clip(logit, -80, 80))), 0).astype(np.float32))
        expected.append(sum(binary_entropy(one) for one in passes).astype(np.float32) / DRAWN)
        variance.append(passes.var(axis=0) * (PASSES / (PASSES - 1)))
        votes.append((passes >= 0.5).sum(axis=0) * (PASSES // DRAWN))
    probability = np.stack(mean)
    volumes = np.repeat((probability >= 0.5).sum(axis=(1, 2, 3))[None], PASSES, axis=0)
    summary = Summary(
        passes=PASSES,
        probability=probability,
        deterministic=np.stack(own),
        expected_entropy=np.stack(expected),
        member_entropy=None,
        variance=np.stack(variance),
        votes=np.stack(votes),
        volumes=volumes,
    )
    return summary, labels, brain


def every_metric(tally):
    """Return all metrics of a tally, a dict from (region, mask, measure, metric) to a number."""
    values = {}
    for region in REGIONS:
        for mask in MASKS:
            for measure in (*MEASURES, OWN_ERRORS):
                scores = tally.scores(region, mask, measure)
                sums = tally.score_sums(region, mask, measure)
                values[region, mask, measure, "auroc"] = metrics.auroc(scores)
                values[region, mask, measure, "auroc_certificate"] = metrics.auroc_certificate(scores)
                values[region, mask, measure, "aupr"] = metrics.aupr(scores)
                values[region, mask, measure, "error_rate"] = metrics.error_rate(scores)
                values[region, mask, measure, "mean_uncertainty"] = metrics.mean_uncertainty(sums, scores)
            for kind in (PROBABILITY, DETERMINISTIC):
                p, c = tally.probabilities(region, mask, kind), tally.confidences(region, mask, kind)
                for convention, counts in (
                    ("class_probability", (p["n"], p["sum_p"])),
                    ("top_label", (c["n"], c["sum_c"])),
                ):
                    for name in ("ece", "ace", "mce", "ece_equal_mass"):
                        metric = f"{name}_{convention}"
                        values[region, mask, kind, metric] = getattr(metrics, metric)(*counts, 15)
                values[region, mask, kind, "gap"] = metrics.gap(c["n"], c["sum_c"])
                values[region, mask, kind, "brier"] = metrics.brier(p["n"], p["sum_p"], p["sum_p2"])
                values[region, mask, kind, "brier_skill"] = metrics.brier_skill(p["n"], p["sum_p"], p["sum_p2"])
                values[region, mask, kind, "nll"] = metrics.nll(p["n"], p["sum_log_p"], p["sum_log_1mp"])
                slope = metrics.calibration_slope(p["n"], p["sum_logit"])
                values[region, mask, kind, "calibration_slope"] = slope
        volume, brain = (tally.scores(region, mask, "entropy") for mask in ("volume", "brain"))
        values[region, "volume", "entropy", "qu_brats"] = metrics.qu_brats(volume, brain)["qu_brats"]
        values[region, "brain", "entropy", "retention"] = metrics.retention(brain)["area"]
    return values


def run_draw(path):
    summary, labels, brain = draw_patient(0)
    start = time.perf_counter()
    table = voxels(summary, labels, brain, brain, spacing_mm=(1, 1, 1), patient="drawn")
    making = time.perf_counter() - start
    write_parquet(path, table, {})
    return {"making": making, "rows": table.num_rows, "voxels_mb": Path(path).stat().st_size / 1e6}


def run_tally(path):
    table = pq.read_table(path)
    Tally.of(table.slice(0, 1000))  # bins are located once per process
    seconds = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        tally = Tally.of(table)
        counted = time.perf_counter()
        values = every_metric(tally)
        seconds.append((counted - start, time.perf_counter() - counted))
    written = Path(path).with_name("tally.parquet")
    tally.write(written, {})
    counting, computing = min(seconds)
    return {
        "counting": counting,
        "computing": computing,
        "n_values": len(values),
        "tally_mb": written.stat().st_size / 1e6,
        "values": {" ".join(key): float(value) for key, value in values.items()},
    }


def run_libraries(path):
    import torch
    from sklearn.metrics import average_precision_score, brier_score_loss, log_loss, roc_auc_score
    from torchmetrics.functional.classification import binary_calibration_error

    torch.set_num_threads(1)
    table = pq.read_table(path)

    def calibration(values, hits):
        return float(binary_calibration_error(torch.from_numpy(values), torch.from_numpy(hits.astype(int)), n_bins=15))

    region, total, measured, values = "ET", 0.0, 0.0, {}
    for mask in MASKS:
        bit = MASKS.index(mask)
        n = {name: int((table[f"masks_{name}"].to_numpy() >> bit & 1).sum()) for name in REGIONS}
        inside = np.flatnonzero(table[f"masks_{region}"].to_numpy() >> bit & 1)
        truth = np.isin(table["reference"].to_numpy()[inside], IN_REGION[region])
        p = table[f"probability_{region}"].to_numpy()[inside].astype(np.float64)
        error = truth != (p >= 0.5)
        start = time.perf_counter()
        u = binary_entropy(p)
        values[region, mask, "entropy", "auroc"] = roc_auc_score(error, u)
        values[region, mask, "entropy", "aupr"] = average_precision_score(error, u)
        ranked = time.perf_counter()
        both_classes = truth.any() and not truth.all()
        values[region, mask, PROBABILITY, "brier"] = (
            brier_score_loss(truth, p) if both_classes else np.mean((p - truth) ** 2)
        )
        values[region, mask, PROBABILITY, "nll"] = log_loss(truth, np.clip(p, 1e-7, 1 - 1e-7), labels=[False, True])
        values[region, mask, PROBABILITY, "ece_class_probability"] = calibration(p, truth)
        values[region, mask, PROBABILITY, "ece_top_label"] = calibration(np.maximum(p, 1 - p), ~error)
        calibrated = time.perf_counter()
        once = 7 * (ranked - start) + 2 * (calibrated - ranked)  # seven measures, two kinds of probability
        measured += calibrated - start
        total += once * sum(n.values()) / n[region]
    return {"total": total, "measured": measured, "values": {" ".join(key): float(v) for key, v in values.items()}}


def in_a_process(which, path):
    environment = {**os.environ, **dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")}
    command = [sys.executable, __file__, "--run", which, path]
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", nargs=2, metavar=("WHICH", "TABLE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        which, path = arguments.run
        result = {"draw": run_draw, "tally": run_tally, "libraries": run_libraries}[which](path)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(json.dumps({**result, "peak_gib": peak}))
        return

    # a process is charged with the peak memory of the one that starts it: this one stays small
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "voxels.parquet")
        drawn, ours, theirs = (in_a_process(which, path) for which in ("draw", "tally", "libraries"))

    seconds = ours["counting"] + ours["computing"]
    print(f"patient: {' × '.join(map(str, SHAPE))}, {drawn['rows']:,} rows, voxels table {drawn['voxels_mb']:.0f} MB")
    print(f"voxels table made in {drawn['making']:.1f} s; tally file {ours['tally_mb']:.1f} MB\n")
    print(f"{'':44}{'seconds':>10}{'peak GiB':>10}")
    print(f"{'tally: counting':44}{ours['counting']:10.2f}")
    print(f"{'tally: ' + format(ours['n_values'], ',') + ' metrics':44}{ours['computing']:10.2f}")
    print(f"{'tally: together':44}{seconds:10.2f}{ours['peak_gib']:10.2f}")
    print(f"{'scikit-learn and torchmetrics: measured part':44}{theirs['measured']:10.2f}{theirs['peak_gib']:10.2f}")
    print(f"{'the same, whole table (extrapolated)':44}{theirs['total']:10.2f}\n")
    print("largest differences over the masks of ET (libraries see the rows, not the rest of the volume):")
    for metric in ("auroc", "aupr", "brier", "nll", "ece_class_probability", "ece_top_label"):
        keys = [key for key in theirs["values"] if key.split()[-1] == metric and " volume " not in key]
        print(f"  {metric:24}{max(abs(ours['values'][key] - theirs['values'][key]) for key in keys):.1e}")
    print(json.dumps({"seconds": seconds, "peak_gib": ours["peak_gib"], "speedup": theirs["total"] / seconds}))


if __name__ == "__main__":
    main()
