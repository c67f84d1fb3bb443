"""Sample: the deterministic pass and Monte Carlo dropout passes of one patient, summed into moments.

One pass is one network: its masks are drawn once and held for all sliding windows of the volume. A pass depends on
the weights, the sampling settings, the seed, the patient, the source and its number alone (definitions, section 10).
"""

import time

import numpy as np

from segtrust.backends import open_backend, rate_of
from segtrust.draws import draw_masks, multipliers
from segtrust.errors import SegtrustError
from segtrust.jobs import log_line
from segtrust.moments import Accumulator, TensorAccumulator, write_moments
from segtrust.outputs import region_probability
from segtrust.preprocess import read_preprocessed
from segtrust.progress import counting
from segtrust.provenance import file_digest, settings_digest, versions
from segtrust.sources import source_named
from segtrust.windows import slide, view


def sample_chunk(
    request, *, digest_of=file_digest, open_with=open_backend, turn=lambda compute: compute(), log=log_line
):
    """Draw a chunk of passes of one patient: read the scan, compute, and write the moments with their provenance.

    request : dict, JSON-able, absolute paths of `scan`, `checkpoint`, `rate` (null where none was chosen here), `cache`
        and `output`; names of `model`, `patient` and `source`; numbers of the `first` and `last` pass; `settings` of
        the model as of `models.Model`; `device`, `threads` and `batch`; and `code`, the digest of what computes
    digest_of : function from the path of a checkpoint to its digest
    open_with : what opens a backend, `backends.open_backend` or one that keeps it
    turn : function that calls the function it is given when that may compute, and returns what it returns
    log : function that takes a line of text
    """
    settings = request["settings"]
    scan, provenance = read_preprocessed(request["scan"])
    weights = digest_of(request["checkpoint"])
    rate = rate_of(settings["stochastic"]["inject"], request["rate"])

    def compute():
        backend = open_with(
            request["checkpoint"],
            digest=weights,
            settings=settings,
            rate=rate,
            device=request["device"],
            threads=request["threads"],
            cache=request["cache"],
            log=log,
        )
        moments = sample(
            scan,
            backend,
            passes=range(request["first"], request["last"] + 1),
            patient=request["patient"],
            source=source_named(request["source"]),
            batch=request["batch"],
            log=log,
            **settings["sample"],
        )
        return moments, {"device": backend.device, "backend": backend.name, "precision": backend.precision}

    moments, computed = turn(compute)
    model = {
        "name": request["model"],
        "weights": weights,
        "settings": settings,
        "rate": rate,
        "settings_digest": settings_digest(settings),
        "code": request["code"],
    }
    write_moments(request["output"], moments, {**provenance, "model": model, **computed, "versions": versions()})


def sample(
    scan,
    backend,
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
    masks,
    batch,
    log=log_line,
):
    """Return the Moments of some passes of one patient from one source; with pass 0 may come the deterministic pass.

    scan : Preprocessed
    backend : what computes the network, see `segtrust.backends`
    passes : range of pass numbers
    patient, seed, source : what the masks are drawn from (besides pass and layer); source is a `sources.Source`
    channels, outputs, crop, orientation : how the model sees a scan and what it returns, see `windows.view` and
        `outputs.region_probability`
    window, overlap : see `windows.slide`
    masks : "independent"; "balanced", see `draws.draw_masks`; or "per_window", which draws masks for every sliding
        window by itself, as naive loops do: for comparison, because it blends networks where windows overlap
    batch : passes and windows computed together, or "auto". On a CPU every batch is filled up, so that the same passes
        give the same bits however they are split over jobs. A batch that does not fit a GPU's memory is halved
    log : function that takes a line of text, one per batch among them; on a terminal the default shows a bar instead

    Memory does not depend on the number of passes. Raises SegtrustError when several passes are asked for and no
    dropout layer is active, when the network does not take the window, and when a single pass does not fit.
    """
    if passes.stop > 1 and not backend.layers:
        raise SegtrustError(
            f"{passes.stop} passes were asked for, but no dropout layer with a rate above 0 is active in the network, "
            "so all passes would be the same; give it dropout (stochastic: inject), or switch it off (stochastic: "
            "{dropout: false}), which makes one pass"
        )
    seen = view(
        scan,
        channels=channels,
        crop=crop,
        divisor=1 if window else backend.divisor(len(channels)),
        orientation=orientation,
        flip=source.flip,
    )
    shapes = backend.mask_shapes((len(channels), *(window or seen.image.shape[1:])))
    image = backend.to_device(seen.image)
    drawing = {"seed": seed, "case": patient, "source": source.name, "balanced": masks == "balanced"}
    summing = Accumulator if backend.device == "cpu" else TensorAccumulator
    accumulator = summing(seen.image.shape[1:], source.name, seen.inside)
    size = "×".join(str(side) for side in seen.image.shape[1:])
    log(
        f"{patient}: {source.name}, passes {passes.start}–{passes.stop - 1} on {size} voxels, "
        f"{backend.device} {backend.precision}, {backend.name}"
    )

    def logits_of(numbers, at_once):
        if numbers is None:
            return predict_passes(backend, image, None, window, overlap, at_once)

        def draw(of_window):
            masks_of = {
                number: draw_masks(backend.layers, shapes, pass_index=number, window=of_window, **drawing)
                for number in set(numbers)
            }
            return [masks_of[number] for number in numbers]

        shared = None if masks == "per_window" else draw(None)
        return predict_passes(backend, image, lambda number: shared or draw(number), window, overlap, at_once)

    if passes.start == 0 and source.has_deterministic:
        began = time.perf_counter()
        accumulator.set_deterministic(region_probability(logits_of(None, 1), outputs)[0])
        log(f"{patient}: deterministic pass, {time.perf_counter() - began:.1f} s")
    if not backend.layers:
        batch = 1  # there is one pass
    elif batch == "auto":
        batch = backend.batch(lambda: logits_of(None, 1), int(np.prod(window or seen.image.shape[1:])))
    first = passes.start
    with counting(len(passes), f"passes of {patient}", log=log) as count:
        while first < passes.stop:
            numbers = list(range(first, min(first + batch, passes.stop)))
            n_filled = batch if backend.device == "cpu" else len(numbers)
            computed = numbers + numbers[-1:] * (n_filled - len(numbers))
            logits = None
            try:
                logits = logits_of(computed, max(batch // n_filled, 1))
            except backend.out_of_memory:
                if batch == 1:
                    raise SegtrustError(
                        f"{patient}: one pass of {size} voxels does not fit the memory of the {backend.device}; "
                        "give a smaller window or crop, or device: cpu"
                    ) from None
            if logits is None:  # out here nothing holds on to what was computed
                batch //= 2
                backend.after_out_of_memory()
                count.say(f"{patient}: out of memory; going on with batches of {batch}")
                continue
            for position, number in enumerate(numbers):
                accumulator.add(number, region_probability(logits[position : position + 1], outputs)[0])
            first += len(numbers)
            # where the log is a worker's, here it learns that its job has gone
            count.reached(first - passes.start)
    return accumulator.moments(seen.start, scan.geometry, seen.back)


def predict_passes(backend, image, drawn, window, overlap, at_once):
    """Return logits (passes, outputs, x, y, z) of one image.

    image : (channels, x, y, z), as `backend.to_device` gives it
    drawn : function from the number of a window to a list over passes of what `draws.draw_masks` returns; None for the
        deterministic pass
    at_once : windows predicted together
    """

    def predict(windows, first):
        if drawn is None:
            return backend.predict(windows, None)[:, None]
        masks = [drawn(first + index) for index in range(len(windows))]
        n_passes = len(masks[0])
        held = multipliers(backend.layers, [mask for of_window in masks for mask in of_window])
        logits = backend.predict(_repeated(windows, n_passes), held)
        return logits.reshape(len(windows), n_passes, *logits.shape[1:])

    return slide(image, predict, window, overlap, at_once)


def _repeated(images, times):
    """Return every image several times in a row, as an array or a tensor like the given one."""
    return images.repeat(times, axis=0) if isinstance(images, np.ndarray) else images.repeat_interleave(times, dim=0)
