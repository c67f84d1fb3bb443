"""Time and memory of one patient's voxel metrics: the tally, beside the libraries that a user would call instead.

    python benchmarks/tally.py

Draws a patient of 240 × 240 × 155 voxels (20 passes, a nested tumour, smooth errors), writes its voxels table, and
computes every metric of every region, mask and measure from a tally. Libraries compute what they have of the same table
on a measured part: AUROC, average precision, Brier score, log loss and logistic recalibration by scikit-learn,
calibration errors with 10, 15 and 20 bins by torchmetrics, ACE by netcal, correlations by SciPy, and the QU-BraTS score
by its formulas in NumPy. The rest of their table is extrapolated in proportion to the number of voxels; what they do
not have (equal-mass bins, retention, boundary metrics) is left out of their time. Each runs in a process of its own, on
one core. The last line is JSON.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from scipy import ndimage

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from segtrust.files import write_parquet
from segtrust.masks import BANDS, MASKS, band_index
from segtrust.measures import MEASURES, binary_entropy, entropy_4class
from segtrust.moments import Summary
from segtrust.regions import REGIONS, four_class
from segtrust.tally import JOINT_MASKS, PROBABILITY, Tally
from segtrust.values import N_BINS, to_text, values_of
from segtrust.voxels import voxels

SHAPE = (240, 240, 155)
PASSES = 20
COMPARED = (
    *("auroc", "aupr", "pearson_with_loss", "spearman_with_loss", "brier", "nll", "calibration_slope"),
    *(
        "ece_class_probability",
        "mce_class_probability",
        "ece_top_label",
        "mce_top_label",
        "ace_class_probability",
        "ace_top_label",
    ),
)
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
        values = values_of(tally)
        seconds.append((counted - start, time.perf_counter() - counted))
    written = Path(path).with_name("tally.parquet")
    tally.write(written, {}, to_text(tally))
    counting, computing = min(seconds)
    return {
        "counting": counting,
        "computing": computing,
        "n_values": len(values),
        "tally_mb": written.stat().st_size / 1e6,
        "values": {name_of(key): value for key, value in values.items() if key.n_bins in (None, 15)},
    }


def name_of(key):
    return f"{key.region} {key.mask} {key.metric}" if key.measure in ("entropy", PROBABILITY) else ""


def run_libraries(path):
    """Return the seconds of the same table by libraries: measured in part, and the rest in proportion to its voxels.

    Measured are all masks and bands of ET for entropy and for one kind of probability, and the four-class view of the
    brain.
    """
    import torch
    from netcal.metrics import ACE
    from scipy.stats import pearsonr, spearmanr
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import average_precision_score, brier_score_loss, log_loss, roc_auc_score
    from torchmetrics.functional.classification import binary_calibration_error, multiclass_calibration_error

    torch.set_num_threads(1)
    table, region, values, seconds = pq.read_table(path), "ET", {}, defaultdict(float)
    truth_of = {name: np.isin(table["reference"].to_numpy(), IN_REGION[name]) for name in REGIONS}
    p_of = {name: table[f"probability_{name}"].to_numpy().astype(np.float64) for name in REGIONS}
    masks_of = {name: table[f"masks_{name}"].to_numpy() for name in REGIONS}
    n = {name: sum(int((masks_of[name] >> bit & 1).sum()) for bit in range(len(MASKS))) for name in REGIONS}

    def timed(part, function, *arguments, **more):
        start = time.perf_counter()
        value = function(*arguments, **more)
        seconds[part] += time.perf_counter() - start
        return float(value)

    def calibrations(part, p, hits, keys):
        """Compute ECE and MCE with 10, 15 and 20 bins; torchmetrics has no ACE and no equal-mass bins."""
        p, hits = torch.from_numpy(p), torch.from_numpy(hits.astype(int))
        for norm, name in (("l1", "ece"), ("max", "mce")):
            for bins in N_BINS:
                found = timed(part, binary_calibration_error, p, hits, n_bins=bins, norm=norm)
                if bins == 15:
                    values[f"{keys[0]} {name}_{keys[1]}"] = found

    def ranked(part, key, u, error):
        if error.any() and not error.all():
            values[f"{key} auroc"] = timed(part, roc_auc_score, error, u)
            values[f"{key} aupr"] = timed(part, average_precision_score, error, u)

    truth, p, bits = truth_of[region], p_of[region], masks_of[region]
    error, u = truth != (p >= 0.5), binary_entropy(p)
    loss = -np.log(np.clip(np.where(truth, p, 1 - p), 1e-7, 1 - 1e-7))
    logit = np.log(np.clip(p, 1e-7, 1 - 1e-7) / np.clip(1 - p, 1e-7, 1 - 1e-7))
    for bit, mask in enumerate(MASKS):
        inside, key = np.flatnonzero(bits >> bit & 1), f"{region} {mask}"
        y, q, wrong = truth[inside], p[inside], error[inside]
        ranked("ranking", key, u[inside], wrong)
        values[f"{key} pearson_with_loss"] = timed("ranking", lambda i=inside: pearsonr(u[i], loss[i])[0])
        if mask in JOINT_MASKS:
            correlated = timed("rank correlation", lambda i=inside: spearmanr(u[i], loss[i])[0])
            values[f"{key} spearman_with_loss"] = correlated
        calibrations("calibration", q, y, (key, "class_probability"))
        calibrations("calibration", np.maximum(q, 1 - q), ~wrong, (key, "top_label"))
        for bins in N_BINS:
            for conf, hits, name in ((q, y, "class_probability"), (np.maximum(q, 1 - q), ~wrong, "top_label")):
                # netcal folds one-dimensional confidences of two classes unless it is told that they are detections
                found = timed("ACE", ACE(bins, detection=True).measure, conf, hits.astype(int))
                if bins == 15:
                    values[f"{key} ace_{name}"] = found
        values[f"{key} nll"] = timed("calibration", log_loss, y, np.clip(q, 1e-7, 1 - 1e-7), labels=[False, True])
        if y.any() and not y.all():
            values[f"{key} brier"] = timed("calibration", brier_score_loss, y, q)
            fit = LogisticRegression(C=np.inf, solver="newton-cholesky", tol=1e-8)
            timed("calibration", lambda fit=fit, inside=inside, y=y: fit.fit(logit[inside, None], y).coef_[0, 0])
            values[f"{key} calibration_slope"] = float(fit.coef_[0, 0])
    band = band_index(table[f"distance_reference_{region}"].to_numpy())
    for number, name in enumerate(BANDS):
        inside = np.flatnonzero(band == number)
        ranked("bands", f"{region} {name}", u[inside], error[inside])

    inside = np.flatnonzero(masks_of["WT"] >> MASKS.index("brain") & 1)
    four = four_class(np.stack([p_of[name][inside] for name in REGIONS]))
    labels = table["reference"].to_numpy()[inside]
    key = "ALL brain"
    ranked("four-class view", key, entropy_4class(four), four.argmax(axis=0) != labels)
    tensors = torch.from_numpy(np.ascontiguousarray(four.T)), torch.from_numpy(labels.astype(int))
    for norm, name in (("l1", "ece"), ("max", "mce")):
        for bins in N_BINS:
            found = timed(
                "four-class view", multiclass_calibration_error, *tensors, num_classes=4, n_bins=bins, norm=norm
            )
            if bins == 15:
                values[f"{key} {name}_top_label"] = found
    for label in range(4):
        calibrations("four-class view", four[label], labels == label, (f"{key} {label}", "class_probability"))

    scores, brain = np.rint(100 * u * 1e9) / 1e9, masks_of[region] >> MASKS.index("brain") & 1 > 0
    values[f"{region} volume qu_brats"] = timed("QU-BraTS", qu_brats, scores, truth, p >= 0.5, brain)

    measured, of_regions = sum(seconds.values()), sum(n.values()) / n[region]
    n_measures = len(MEASURES) + 1  # and the deterministic entropy against its own errors
    times = {
        "ranking": of_regions * n_measures,
        "rank correlation": of_regions * n_measures,
        "bands": len(REGIONS),
        "calibration": of_regions * 2,  # of the mean and of the deterministic pass
        "four-class view": n["WT"] / len(inside),
        "ACE": of_regions * 2,
        "QU-BraTS": len(REGIONS),
    }
    parts = {part: factor * seconds[part] for part, factor in times.items()}
    return {"parts": parts, "measured": measured, "values": values}


def qu_brats(uncertainty, truth, predicted, brain):
    """Return the QU-BraTS score as its formulas read, from voxels (definitions, section 6)."""
    dsc, ftp, ftn = [], [], []
    hits, rest = truth & predicted & brain, ~truth & ~predicted & brain
    for threshold in np.arange(41) * 2.5:
        kept = uncertainty <= threshold
        both = (truth & kept).sum() + (predicted & kept).sum()
        dsc.append(2 * (truth & predicted & kept).sum() / both if both else 1)
        ftp.append(1 - (hits & kept).sum() / max(hits.sum(), 1))
        ftn.append(1 - (rest & kept).sum() / max(rest.sum(), 1))
    areas = [np.trapezoid(curve, dx=1 / 40) for curve in (dsc, ftp, ftn)]
    return (areas[0] + 1 - areas[1] + 1 - areas[2]) / 3


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
    print(f"{'libraries: measured part':44}{theirs['measured']:10.2f}{theirs['peak_gib']:10.2f}")
    for part, took in theirs["parts"].items():
        print(f"{'  whole table, extrapolated: ' + part:44}{took:10.2f}")
    every, apart = sum(theirs["parts"].values()), ("ACE", "QU-BraTS")
    usual = sum(took for part, took in theirs["parts"].items() if part not in apart)
    print(f"{'  scikit-learn, torchmetrics and SciPy':44}{usual:10.2f}{'':10}{usual / seconds:6.0f} times the tally's")
    print(
        f"{'  and ACE by netcal, QU-BraTS by NumPy':44}{every:10.2f}{'':10}{every / seconds:6.0f} times the tally's\n"
    )
    print("largest differences over the masks of ET (libraries see the rows, not the rest of the volume):")
    for metric in COMPARED:
        keys = [key for key in theirs["values"] if key.split()[-1] == metric and key in ours["values"]]
        keys = [key for key in keys if " volume " not in key]
        print(f"  {metric:24}{max(abs(ours['values'][key] - theirs['values'][key]) for key in keys):.1e}")
    result = {"seconds": seconds, "peak_gib": ours["peak_gib"], "speedup": every / seconds}
    print(json.dumps({**result, "speedup_without_ace_and_qu_brats": usual / seconds}))


if __name__ == "__main__":
    main()
