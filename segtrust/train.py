"""Train a network on the patients of split `train`, and keep the checkpoint that is best on validation patients.

What iteration k draws (patients, patches, augmentation, dropout) depends on the seed and k alone, so a training that
was stopped goes on exactly where it was.
"""

import hashlib
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import torch
from monai.losses import DiceCELoss, DiceLoss
from monai.transforms import (
    Compose,
    RandCropByPosNegLabeld,
    RandFlipd,
    RandGaussianNoised,
    RandScaleIntensityd,
    RandShiftIntensityd,
    SpatialPadd,
)

from segtrust.dropout import logits_of
from segtrust.errors import SegtrustError
from segtrust.files import canonical_json, replacing
from segtrust.jobs import log_line
from segtrust.networks import arithmetic, divisor, torch_device
from segtrust.outputs import region_probability
from segtrust.preprocess import MODALITIES
from segtrust.progress import counting
from segtrust.regions import CLASSES, REGIONS, region_masks
from segtrust.windows import padded, slide

LINES_PER_TRAINING = 100


def train(
    network,
    training,
    validation,
    *,
    channels,
    outputs,
    window,
    overlap,
    settings,
    seed,
    device,
    checkpoint,
    state,
    code,
    log=log_line,
):
    """Train a network; write its best checkpoint, and return the learning curve.

    network : module with its initial weights
    training, validation : sequences of (image float32 (4, x, y, z) as in Preprocessed, canonical labels uint8
        (x, y, z)); read at every access, so a list caches them in memory and a lazy sequence does not. Without
        validation patients, a seeded fifth of `training` (at least one) validates and does not train
    channels, outputs, window, overlap : as in `sample`
    settings : dict of
        iterations : steps of the optimiser
        batch : patches per step; on a CPU, one is slower than two
        patch : (x, y, z), multiples of the network's divisor
        positive : share of patches centred on tumour, in [0, 1]
        loss : "dice_ce" or "dice"
        learning_rate, weight_decay : of AdamW; the rate rises over the first 5 % and falls as a cosine
        validate_every : iterations between validations, and between savings of the state
        precision : "float32" or "bfloat16"
    checkpoint : path of the best weights, a plain state dict; its SHA-256 is written beside it as `.sha256`
    state : path of what is needed to go on after a stop, removed at the end; a state of other patients, settings,
        initial weights or code is not used
    code : digest of the code that trains
    log : function that takes a line of text

    Best is the highest mean validation Dice over patients and regions of the deterministic pass. Returns a
    DataFrame with the columns iteration, loss (mean since the row before), learning_rate, dice_wt, dice_tc, dice_et.
    Raises SegtrustError when there is too little to train on, or the patch does not fit the network.
    """
    training, validation = _split(training, validation, seed)
    _check_patch(network, settings["patch"], len(channels))
    place = torch_device(device)
    identity = _identity(network, training, validation, channels, outputs, window, overlap, settings, seed, code)
    network.to(place, memory_format=torch.channels_last_3d)
    optimiser = torch.optim.AdamW(
        network.parameters(), lr=settings["learning_rate"], weight_decay=settings["weight_decay"]
    )
    done, rows, best = _resume(state, identity, network, optimiser, place, log)
    loss_function = _loss(settings["loss"], outputs)
    augment = _augmentation(settings)
    order = [MODALITIES.index(modality) for modality in channels]
    step = divisor(network, len(channels)) if window is None else 1
    iterations, every = settings["iterations"], settings["validate_every"]
    losses = []
    log(f"{len(training)} patients train, {len(validation)} validate; {iterations} iterations on {place.type}")
    with (
        torch.random.fork_rng(devices=range(torch.cuda.device_count())),
        arithmetic(place, "float32"),
        counting(iterations, "iterations", first=done, log=log) as count,
    ):
        for iteration in range(done, iterations):
            images, labels = _batch(training, augment, order, settings["batch"], seed, iteration)
            rate = _learning_rate(settings["learning_rate"], iteration, iterations)
            for group in optimiser.param_groups:
                group["lr"] = rate
            torch.manual_seed(_draw(seed, "dropout", iteration).integers(2**63))
            network.train()
            with arithmetic(place, settings["precision"]):
                logits = logits_of(network(images.to(place, memory_format=torch.channels_last_3d)))
            loss = loss_function(logits.float(), _target(labels.to(place), outputs))
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), 12.0)
            optimiser.step()
            losses.append(float(loss.detach()))
            finished = iteration + 1
            if finished % max(iterations // LINES_PER_TRAINING, 1) == 0 or finished == iterations:
                count.reached(finished, f"loss {losses[-1]:.3f}")
            if finished % every == 0 or finished == iterations:
                with arithmetic(place, settings["precision"]):
                    dice = _validate(network, validation, order, outputs, window, overlap, step, place)
                rows.append([finished, float(np.mean(losses)), rate, *dice])
                losses = []
                if best is None or np.mean(dice) > best["dice"]:
                    best = {"dice": float(np.mean(dice)), "iteration": finished, "weights": _weights(network)}
                named = ", ".join(f"{region} {value:.3f}" for region, value in zip(REGIONS, dice, strict=True))
                count.say(f"validation after {finished} of {iterations}: Dice {named}; best at {best['iteration']}")
                _save(
                    state,
                    {
                        "identity": identity,
                        "done": finished,
                        "network": _weights(network),
                        "optimiser": optimiser.state_dict(),
                        "best": best,
                        "rows": rows,
                    },
                )
    _save(checkpoint, best["weights"])
    digest = hashlib.sha256(Path(checkpoint).read_bytes()).hexdigest()
    with replacing(Path(checkpoint).with_suffix(".sha256")) as partial:
        partial.write_text(f"{digest}  {Path(checkpoint).name}\n", encoding="utf-8")
    Path(state).unlink(missing_ok=True)
    columns = ["iteration", "loss", "learning_rate", *(f"dice_{region.lower()}" for region in REGIONS)]
    return pd.DataFrame(rows, columns=columns)


def curve_table(curve):
    """Return a learning curve, as `train` returns it, as a pyarrow Table."""
    return pa.Table.from_pandas(curve, preserve_index=False).replace_schema_metadata(None)


def region_dice(prediction, labels):
    """Return the Dice of each region, float64 (3,): 1 where both are empty, 0 where one is.

    prediction : bool (3, x, y, z) in the order WT, TC, ET; labels : canonical, uint8 (x, y, z)
    """
    reference = region_masks(labels)
    axes = (1, 2, 3)
    both = (prediction & reference).sum(axes)
    total = prediction.sum(axes) + reference.sum(axes)
    return np.where(total == 0, 1.0, 2 * both / np.maximum(total, 1))


def _split(training, validation, seed):
    """Return (training, validation), a seeded fifth of the former taken for the latter when there is none."""
    if len(validation):
        chosen = range(len(training))
    else:
        shuffled = _draw(seed, "split").permutation(len(training))
        n_validation = max(1, round(len(training) / 5))
        held, chosen = sorted(shuffled[:n_validation]), sorted(shuffled[n_validation:])
        validation = _Part(training, held)
    if not len(chosen):
        raise SegtrustError(
            f"{len(training)} patients have split train, and {len(validation)} validate: at least 1 and 1 are needed "
            "(2 with split train when none has split validation)"
        )
    return _Part(training, chosen), validation


class _Part:
    """Some of a sequence's items, read at every access."""

    def __init__(self, whole, indices):
        self.whole, self.indices = whole, [int(index) for index in indices]

    def __len__(self):
        return len(self.indices)

    def __getitem__(self, position):
        return self.whole[self.indices[position]]


def _check_patch(network, patch, n_channels):
    step = divisor(network, n_channels)
    if any(side % step for side in patch):
        raise SegtrustError(f"patch {list(patch)}: the sides must be multiples of {step} for {type(network).__name__}")


def _draw(seed, *purpose):
    """Return a numpy Generator for one purpose; the same whenever it is asked for."""
    digest = hashlib.sha256(canonical_json([seed, *purpose]).encode()).digest()
    return np.random.default_rng(np.frombuffer(digest, "<u4"))


def _augmentation(settings):
    """Return the MONAI transforms from a whole patient to one augmented patch."""
    both, positive = ["image", "labels"], settings["positive"]
    return Compose(
        [
            SpatialPadd(both, settings["patch"]),
            RandCropByPosNegLabeld(both, "labels", settings["patch"], pos=positive, neg=1 - positive, num_samples=1),
            *(RandFlipd(both, prob=0.5, spatial_axis=axis) for axis in range(3)),
            RandScaleIntensityd("image", factors=0.1, prob=1.0),
            RandShiftIntensityd("image", offsets=0.1, prob=1.0),
            RandGaussianNoised("image", prob=0.15, std=0.1),
        ]
    )


def _batch(training, augment, order, batch, seed, iteration):
    """Return (images (n, channels, x, y, z), labels (n, x, y, z)) of one iteration."""
    images, labels = [], []
    for position in range(iteration * batch, (iteration + 1) * batch):
        epoch, turn = divmod(position, len(training))
        image, reference = training[_draw(seed, "order", epoch).permutation(len(training))[turn]]
        augment.set_random_state(seed=int(_draw(seed, "patch", position).integers(2**32)))
        patch = augment({"image": image[order], "labels": reference[None]})[0]
        images.append(torch.as_tensor(patch["image"]))
        labels.append(torch.as_tensor(patch["labels"])[0])
    return torch.stack(images).as_subclass(torch.Tensor), torch.stack(labels).as_subclass(torch.Tensor)


def _target(labels, outputs):
    """Return what the loss compares with, float32 (n, outputs, x, y, z), from canonical labels (n, x, y, z)."""
    if isinstance(outputs, dict):
        return torch.stack([labels == CLASSES.index(name) for name in outputs["softmax"]], dim=1).float()
    enhancing = labels == CLASSES.index("ET")
    core = enhancing | (labels == CLASSES.index("NCR"))
    regions = {"WT": labels > 0, "TC": core, "ET": enhancing}
    return torch.stack([regions[name] for name in outputs], dim=1).float()


def _loss(name, outputs):
    classes = isinstance(outputs, dict)
    kind = {"dice_ce": DiceCELoss, "dice": DiceLoss}[name]
    return kind(sigmoid=not classes, softmax=classes, include_background=not classes, squared_pred=True, batch=True)


def _learning_rate(highest, iteration, iterations):
    warmup = max(iterations // 20, 1)
    if iteration < warmup:
        return highest * (iteration + 1) / warmup
    return highest * 0.5 * (1 + math.cos(math.pi * (iteration - warmup) / (iterations - warmup)))


def _validate(network, validation, order, outputs, window, overlap, step, place):
    """Return the mean Dice over the validation patients, a list of three floats."""
    network.eval()
    scores = []
    with torch.inference_mode():
        for image, labels in (validation[index] for index in range(len(validation))):
            larger, inside = padded(image[order], step)
            logits = slide(
                torch.from_numpy(larger).to(place),
                lambda part, _: logits_of(network(part)).float()[:, None],
                window,
                overlap,
            )
            probability = region_probability(logits, outputs)[0].cpu().numpy()[(slice(None), *inside)]
            scores.append(region_dice(probability >= 0.5, labels))
    return [float(value) for value in np.mean(scores, axis=0)]


def _identity(network, training, validation, channels, outputs, window, overlap, settings, seed, code):
    """Return a digest of what decides the course of a training; reads every patient once."""
    digest = hashlib.sha256(
        canonical_json(
            [len(training), len(validation), list(channels), outputs, window, overlap, settings, seed, code]
        ).encode()
    )
    for patients in (training, validation):
        for image, labels in (patients[index] for index in range(len(patients))):
            digest.update(np.ascontiguousarray(image))
            digest.update(np.ascontiguousarray(labels))
    for name, tensor in network.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _resume(state, identity, network, optimiser, place, log):
    """Load what an earlier run left; return (iterations done, rows of the curve, best checkpoint)."""
    if not Path(state).is_file():
        return 0, [], None
    saved = torch.load(state, map_location=place, weights_only=True)
    if saved["identity"] != identity:
        log(f"{state} belongs to another training; starting anew")
        return 0, [], None
    network.load_state_dict(saved["network"])
    optimiser.load_state_dict(saved["optimiser"])
    log(f"going on after iteration {saved['done']}")
    return saved["done"], saved["rows"], saved["best"]


def _weights(network):
    return {name: tensor.detach().cpu().clone() for name, tensor in network.state_dict().items()}


def _save(path, content):
    # through a file object: a file name would become part of the bytes
    with replacing(path) as partial, open(partial, "wb") as file:
        torch.save(content, file)
