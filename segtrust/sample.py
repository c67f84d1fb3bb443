"""Sample: the deterministic pass and Monte Carlo dropout passes of one patient, summed into moments.

One pass is one network: its masks are drawn once and held for all sliding windows of the volume. A pass depends on
the weights, the sampling settings, the seed, the patient, the source and its number alone (definitions, section 10).
"""

import time

import torch

from segtrust.dropout import Stochastic, check_stochastic, draw_masks, logits_of, stack_masks
from segtrust.moments import Accumulator
from segtrust.networks import arithmetic, divisor, region_probability, torch_device
from segtrust.windows import slide, view


def log_line(message):
    """Print a line at once, so that a log can be followed."""
    print(message, flush=True)


def sample(
    scan,
    network,
    *,
    passes,
    patient,
    seed,
    source,
    channels,
    outputs,
    crop,
    window,
    overlap,
    orientation,
    flip,
    precision,
    device,
    batch,
    log=log_line,
):
    """Return the Moments of some passes of one patient; with pass 0 comes the deterministic pass.

    scan : Preprocessed
    network : module with its weights, as `networks.build` and `load_weights` give it, or a Stochastic of it, which it
        becomes
    passes : range of pass numbers
    patient, seed, source : what the masks are drawn from (besides pass and layer); source names member and flip
    channels, outputs, crop, orientation, flip : how the model sees a scan and what it returns, see
        `windows.view` and `networks.region_probability`
    window, overlap : see `windows.slide`
    precision : "float32" (no TF32) or "bfloat16" (autocast)
    device : "auto", "cuda" or "cpu"
    batch : passes computed together. Every batch is filled up, so that the same passes give the same bits however
        they are split over jobs. On a CPU two or more are several times faster than one on small volumes, where
        PyTorch computes single images without oneDNN
    log : function that takes a line of text

    Memory does not depend on the number of passes. Raises SegtrustError when several passes are asked for and
    nothing in the network is stochastic, when there is no GPU for `cuda`, and when the network does not take the
    window.
    """
    stochastic = network if isinstance(network, Stochastic) else Stochastic(network)
    check_stochastic(stochastic.network, passes.stop)
    place = torch_device(device)
    seen = view(
        scan,
        channels=channels,
        crop=crop,
        divisor=1 if window else divisor(stochastic, len(channels)),
        orientation=orientation,
        flip=flip,
    )
    stochastic.to(place, memory_format=torch.channels_last_3d)
    image = torch.from_numpy(seen.image)[None].to(place)
    shapes = stochastic.mask_shapes((len(channels), *(window or image.shape[2:])))
    accumulator = Accumulator(seen.shape)
    size = "×".join(str(side) for side in image.shape[2:])
    log(f"{patient}: {source}, passes {passes.start}–{passes.stop - 1} on {size} voxels, {place.type} {precision}")
    with torch.inference_mode(), arithmetic(place, precision):
        if passes.start == 0:
            began = time.perf_counter()
            logits = predict(stochastic, image, None, window, overlap)
            accumulator.set_deterministic(seen.back(region_probability(logits, outputs)[0].cpu().numpy()))
            log(f"{patient}: deterministic pass, {time.perf_counter() - began:.1f} s")
        for first in range(passes.start, passes.stop, batch):
            began = time.perf_counter()
            numbers = list(range(first, min(first + batch, passes.stop)))
            drawn = [draw_masks(stochastic.layers, shapes, seed, patient, source, number) for number in numbers]
            filled = drawn + drawn[-1:] * (batch - len(numbers))
            logits = predict(stochastic, image, filled, window, overlap)
            for number, one_pass in zip(numbers, logits.split(1), strict=False):
                probability = region_probability(one_pass, outputs)[0].cpu().numpy()
                accumulator.add(number, seen.back(probability))
            seconds = (time.perf_counter() - began) / len(numbers)
            log(f"{patient}: pass {numbers[-1]} of {passes.start}–{passes.stop - 1}, {seconds:.1f} s per pass")
    return accumulator.moments(seen.start, scan.geometry)


def predict(stochastic, image, masks, window, overlap):
    """Return logits (passes, channels, x, y, z) of one image under the masks of several passes.

    image : tensor (1, channels, x, y, z)
    masks : list over passes of what `draw_masks` returns, the same for all windows; None for the deterministic pass
    """
    n_passes = 1 if masks is None else len(masks)
    stacked = None if masks is None else stack_masks(masks, image.device)

    def network_of_passes(part):
        repeated = part.expand(n_passes, *part.shape[1:]).contiguous(memory_format=torch.channels_last_3d)
        logits = logits_of(stochastic(repeated, stacked)).float()
        return logits.reshape(1, -1, *logits.shape[2:])

    logits = slide(image, network_of_passes, window, overlap)
    return logits.reshape(n_passes, -1, *logits.shape[2:])
