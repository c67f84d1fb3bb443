"""Time and memory of Monte Carlo dropout passes of one patient, beside the loop that is usually written by hand.

    python benchmarks/sample.py [--passes T]

Draws a scan of 240 × 240 × 155 voxels with a brain box of 136 × 184 × 136, and a SegResNet with the published shape and
random weights. The peer is MONAI's SlidingWindowInferer (window 240 × 240 × 160, overlap 0.5, as the published bundle)
called T times in float32, the passes stacked, mean, variance and entropies computed at the end. It is given the very
masks that segtrust draws, so that the two can be compared. Segtrust's times are those of T stochastic passes summed
into moments, without loading and tracing the network. Each line runs in a process of its own. A second table holds
balanced masks against independent ones. The last line is JSON; its speedups, agreement and seconds are those of
bfloat16 where the device computes it, and of float32 otherwise.
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

SHAPE, BOX = (240, 240, 155), (136, 184, 136)
WINDOW, OVERLAP = (240, 240, 160), 0.5
NETWORK = {"name": "SegResNet-BraTS"}
CHANNELS, OUTPUTS = ["t1ce", "t1", "t2", "flair"], ["TC", "WT", "ET"]
COMMON = {
    "patient": "bench", "seed": 0, "channels": CHANNELS, "outputs": OUTPUTS, "orientation": "RAS", "overlap": OVERLAP,
    "masks": "independent", "batch": "auto",
}  # fmt: skip
SAME_GEOMETRY = {"crop": "none", "window": list(WINDOW)}
CROPPED = {"crop": "foreground", "window": None}
LINES = {
    "same geometry": {**SAME_GEOMETRY, "backend": "auto", "precision": "float32"},
    "same geometry, bfloat16": {**SAME_GEOMETRY, "backend": "auto", "precision": "bfloat16"},
    "cropped": {**CROPPED, "backend": "auto", "precision": "float32"},
    "cropped, bfloat16": {**CROPPED, "backend": "auto", "precision": "bfloat16"},
    "cropped, PyTorch": {**CROPPED, "backend": "torch", "precision": "float32"},
}
SAME_GEOMETRY_LINES = [name for name in LINES if name.startswith("same geometry")]
# balanced masks: a small scan and network, many passes
SMALL_SHAPE, SMALL_NETWORK = (48, 48, 48), {"name": "SegResNet-BraTS", "init_filters": 8}
REFERENCE_PASSES, TRIALS, COMPARED_PASSES = 500, 5, (5, 10, 20, 50)


def draw_scan(shape, box):
    """Return a Preprocessed scan: noise that is smooth enough to have structure, in an ellipsoid that fills a box."""
    from scipy.ndimage import gaussian_filter

    from segtrust.preprocess import preprocess
    from segtrust.volumes import Geometry

    generator = np.random.default_rng(0)
    volumes = np.zeros((4, *shape), np.float32)
    inside = tuple(slice((side - size) // 2, (side - size) // 2 + size) for side, size in zip(shape, box, strict=True))
    axes = np.meshgrid(*(np.linspace(-1, 1, size) for size in box), indexing="ij", sparse=True)
    brain = sum(axis**2 for axis in axes) <= 1.0
    for volume in volumes:
        volume[inside] = (100 + 400 * gaussian_filter(generator.normal(size=box), 3)) * brain
    return preprocess(volumes, Geometry(shape, np.diag([-1.0, -1.0, 1.0, 1.0])))


def peak_gib():
    """Return the most memory that this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def random_network(folder, network):
    """Return the path of random weights of a network."""
    import torch

    from segtrust.networks import build

    path = Path(folder) / "weights.pt"
    torch.save(build(network, seed=0).state_dict(), path)
    return path


def opened(folder, network, line, threads):
    """Return the backend of a line."""
    from segtrust.backends import open_backend

    settings = {
        "network": network, "stochastic": {"dropout": True, "inject": None}, "backend": line["backend"],
        "precision": line["precision"], "sample": {"channels": CHANNELS, "window": line["window"]},
    }  # fmt: skip
    return open_backend(
        random_network(folder, network), digest="", settings=settings, rate=None, device="auto", threads=threads,
        cache=Path(folder) / "traced", log=print,
    )  # fmt: skip


def run_peer(folder, passes, device):
    import torch
    from monai.inferers import SlidingWindowInferer
    from torch import nn

    from segtrust.draws import draw_masks
    from segtrust.dropout import Stochastic
    from segtrust.networks import build
    from segtrust.preprocess import MODALITIES

    scan = draw_scan(SHAPE, BOX)
    whole = scan.geometry.to_canonical(scan.place(scan.image))
    image = torch.from_numpy(whole[[MODALITIES.index(name) for name in CHANNELS]])[None].to(device)
    stochastic = Stochastic(build(NETWORK, seed=0))
    shapes = stochastic.mask_shapes((4, *WINDOW))
    network = build(NETWORK, seed=0).eval().to(device)
    for module in network.modules():
        if isinstance(module, nn.Dropout3d):
            module.train()
    inferer = SlidingWindowInferer(WINDOW, 1, OVERLAP)
    held = []

    def dropout3d(features, p=0.5, training=False, inplace=False):
        return features * held[-1] / (1 - p)

    nn.functional.dropout3d = dropout3d
    order = [OUTPUTS.index(region) for region in ("WT", "TC", "ET")]
    began = time.perf_counter()
    drawn = []
    with torch.no_grad():
        for number in range(passes):
            (masks,) = draw_masks(stochastic.layers, shapes, 0, "bench", "member1", number).values()
            held.append(torch.from_numpy(masks[0]).to(device))
            drawn.append(torch.sigmoid(inferer(image, network))[0].cpu())
        p = torch.stack(drawn)
        mean, variance = p.mean(dim=0), p.var(dim=0)
        entropies = [-(q * torch.log2(q) + (1 - q) * torch.log2(1 - q)).nan_to_num(0) for q in (mean, p)]
        expected = entropies[1].mean(dim=0)
    seconds = time.perf_counter() - began
    np.savez(Path(folder) / "peer.npz", mean=mean.numpy()[order], entropy=entropies[0].numpy()[order])
    return {"seconds": seconds, "checked": float(variance.mean() + expected.mean())}


def run_line(folder, passes, name, threads):
    from segtrust.sample import sample
    from segtrust.sources import Source

    line = LINES[name]
    backend = opened(folder, NETWORK, line, threads)
    scan = draw_scan(SHAPE, BOX)
    began = time.perf_counter()
    moments = sample(
        scan, backend, passes=range(passes), source=Source(1), crop=line["crop"], window=line["window"], **COMMON
    )
    seconds = time.perf_counter() - began
    result = {
        "seconds": seconds, "device": backend.device, "backend": backend.name, "precision": backend.precision,
        "peak_gib": peak_gib(),
    }  # fmt: skip
    peer = Path(folder) / "peer.npz"
    if line["crop"] == "none" and peer.exists():
        from segtrust.measures import binary_entropy

        summary = moments.summary(passes).on(moments.place)
        theirs = np.load(peer)
        own = scan.geometry.to_canonical(summary.probability)
        first, second = own >= 0.5, theirs["mean"] >= 0.5
        dice = 2 * (first & second).sum(axis=(1, 2, 3)) / (first.sum(axis=(1, 2, 3)) + second.sum(axis=(1, 2, 3)))
        result["dice"] = float(np.nanmin(dice))
        result["entropy_difference"] = float(np.abs(binary_entropy(own) - theirs["entropy"]).mean())
    return result


def run_balanced(folder, threads):
    """Return the RMSE of mean probability and entropy against many passes, by kind of masks and T."""
    from segtrust.measures import binary_entropy
    from segtrust.sample import sample
    from segtrust.sources import Source

    line = {**CROPPED, "backend": "auto", "precision": "float32"}
    backend = opened(folder, SMALL_NETWORK, line, threads)
    scan = draw_scan(SMALL_SHAPE, SMALL_SHAPE)

    def mean_after(seed, masks, passes):
        settings = {**COMMON, "seed": seed, "masks": masks, "crop": "foreground", "window": None}
        return sample(scan, backend, passes=range(passes), source=Source(1), log=lambda line: None, **settings)

    reference = mean_after(1000, "independent", REFERENCE_PASSES).summary(REFERENCE_PASSES).probability
    found = {}
    for masks in ("independent", "balanced"):
        for passes in COMPARED_PASSES:
            squares = []
            for trial in range(TRIALS):
                summary = mean_after(trial, masks, passes).summary(passes)
                of_p = ((summary.probability - reference) ** 2).mean()
                of_h = ((binary_entropy(summary.probability) - binary_entropy(reference)) ** 2).mean()
                squares.append([of_p, of_h, summary.variance.mean()])
            means = np.mean(squares, axis=0)
            found[f"{masks} {passes}"] = [float(np.sqrt(means[0])), float(np.sqrt(means[1])), float(means[2])]
    return {"rmse": found}


def in_a_process(*arguments):
    command = [sys.executable, __file__, *map(str, arguments)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stdout + done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--passes", type=int, default=20)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--run", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    passes, threads = arguments.passes, arguments.threads
    if arguments.run:
        import torch

        torch.set_num_threads(threads)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        run = {"peer": lambda: run_peer(arguments.folder, passes, device),
               "balanced": lambda: run_balanced(arguments.folder, threads)}  # fmt: skip
        name = arguments.run
        result = run[name]() if name in run else run_line(arguments.folder, passes, name, threads)
        print(json.dumps({"peak_gib": peak_gib(), **result}))
        return

    # a process is charged with the peak memory of the one that starts it: this one stays small
    with tempfile.TemporaryDirectory() as folder:
        common = ("--folder", folder, "--passes", passes, "--threads", threads)
        results = {name: in_a_process("--run", name, *common) for name in ("peer", *LINES)}
        balanced = in_a_process("--run", "balanced", *common)

    peer = results["peer"]["seconds"]
    shape, box = (" × ".join(map(str, sides)) for sides in (SHAPE, BOX))
    print(f"{shape} voxels, brain box {box}, T = {passes}, {threads} threads\n")
    print(f"{'':32}{'s a pass':>10}{'ratio':>8}{'peak GiB':>10}  computed by")
    for name, result in results.items():
        by = f"{result['backend']}, {result['precision']}" if "backend" in result else "MONAI, PyTorch float32"
        each, ratio = result["seconds"] / passes, peer / result["seconds"]
        print(f"{name:32}{each:10.2f}{ratio:8.1f}{result['peak_gib']:10.2f}  {by}")
    print()
    for name in SAME_GEOMETRY_LINES:
        print(
            f"agreement with the peer under the same masks, {name}: Dice at least {results[name]['dice']:.5f}, "
            f"mean |Δentropy| {results[name]['entropy_difference']:.1e} bits"
        )
    print()
    print(f"RMSE to {REFERENCE_PASSES} passes (mean probability | entropy, bits | mean variance), {TRIALS} trials")
    for compared in COMPARED_PASSES:
        cells = [f"{kind} " + " | ".join(f"{value:.2e}" for value in balanced["rmse"][f"{kind} {compared}"])
                 for kind in ("independent", "balanced")]  # fmt: skip
        print(f"  T = {compared:<4}" + "    ".join(cells))
    # the fastest precision that the device computes
    ending = ", bfloat16" if results["cropped, bfloat16"]["precision"] == "bfloat16" else ""
    same, cropped = results[f"same geometry{ending}"], results[f"cropped{ending}"]
    print(
        json.dumps(
            {
                "speedup_cropped": peer / cropped["seconds"],
                "speedup_same_geometry": peer / same["seconds"],
                "dice_agreement": same["dice"],
                "mean_abs_entropy_difference_bits": same["entropy_difference"],
                "seconds_per_pass": cropped["seconds"] / passes,
                "peak_gib": max(results[name]["peak_gib"] for name in LINES),
                "device": cropped["device"],
                "precision": cropped["precision"],
                "speedup_cropped_float32": peer / results["cropped"]["seconds"],
                "speedup_same_geometry_float32": peer / results["same geometry"]["seconds"],
            }
        )
    )


if __name__ == "__main__":
    main()
