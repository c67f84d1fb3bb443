"""The page of one patient under one model: slices to look through, and the patient's numbers, in one HTML file.

Everything travels inside the page, because a page opened from disk can fetch nothing. Scans are pictures (WebP) with
one tile per axial slice; probabilities are bytes, and entropy follows from them; what is predicted and what is true are
bits. Slices are drawn on plain canvases: no WebGL, so that a page opens on any machine. A page depends on its own
patient alone.
"""

import base64
import io
import zlib
from dataclasses import dataclass

import nibabel as nib
import numpy as np
from PIL import Image

from segtrust.colours import ENTROPY_SHOWN_FROM, REGION_COLOURS
from segtrust.files import read_json
from segtrust.html import environment, flatten
from segtrust.measures import binary_entropy
from segtrust.pool import StoredTally
from segtrust.preprocess import MODALITIES
from segtrust.regions import REGIONS, region_masks
from segtrust.score import numbers_of
from segtrust.volumes import read_reference

# a page has at most 4 MB: where probabilities are noise all over a brain, they are on a coarser grid
LONGEST_VOLUMES = 3_850_000  # letters of base64
STEPS = (1, 2, 3, 4)
# browsers draw pictures up to so many pixels; a larger scan has every second or third voxel
MOST_PIXELS = 14_000_000

WINDOW_PERCENT = (0.5, 99.8)
# quality of pictures, in percent; the first with which the four scans of a patient are no longer than that
QUALITIES = (80, 60, 40, 20)
LONGEST_SCANS = 2_600_000  # letters of base64

# matplotlib's inferno and viridis, without their darkest parts, which a scan would hide
SCALES = {
    "probability": ("#57106e", "#7d1e6d", "#a32c61", "#c73e4c", "#e45a31", "#f68013", "#fcac11", "#f5db4c", "#fcffa4"),
    "entropy": ("#463480", "#3a538b", "#2e6f8e", "#23898e", "#1fa287", "#3bbb75", "#73d056", "#b8de29", "#fde725"),
}

MODALITY_NAMES = {"t1": "T1", "t1ce": "T1 with contrast", "t2": "T2", "flair": "FLAIR"}


@dataclass(frozen=True)
class Line:
    """A line of the page's table. digits : after the point; hint : what a good number looks like."""

    name: str
    label: str
    digits: int
    unit: str = ""
    hint: str = ""


LINES = {
    "Segmentation": (
        Line("dice", "Dice, Monte Carlo mean", 3, hint="1 is perfect overlap"),
        Line("dice_deterministic", "Dice, deterministic pass", 3),
        Line("sensitivity", "Sensitivity", 3, hint="share of the reference that is found"),
        Line("precision", "Precision", 3, hint="share of the prediction that is right"),
        Line("hd95", "HD95", 1, "mm", "0 is perfect; 95th percentile of the distance between surfaces"),
        Line("nsd_1mm", "Surface Dice at 1 mm", 3, hint="share of the surfaces that lie within 1 mm"),
    ),
    "Volume": (
        Line("volume_ml", "Predicted", 1, "ml"),
        Line("volume_low_ml", "5 % of the passes lie below", 1, "ml"),
        Line("volume_high_ml", "5 % of the passes lie above", 1, "ml"),
        Line("reference_ml", "Reference", 1, "ml"),
    ),
    "How unsure is the model?": (
        Line("score_predicted_5mm_mean_entropy", "Mean entropy", 3, "bits", "on predicted_5mm; the patient’s score"),
        Line("score_brain_mean_entropy", "Mean entropy", 4, "bits", "on brain"),
        Line("pairwise_dice", "Agreement between passes", 3, hint="mean Dice of two passes; 1 is no spread"),
    ),
    "Does uncertainty find the errors?": (
        Line("auroc", "AUROC of entropy", 3, hint="on brain; 1 is perfect, 0.5 is chance"),
        Line("auroc_deterministic", "baseline: deterministic_entropy", 3, hint="one ordinary forward pass"),
        Line("auroc_boundary", "baseline: boundary_proximity", 3, hint="distance to the predicted boundary alone"),
    ),
    "Is confidence calibrated?": (
        Line("ece_class_probability", "ece_class_probability", 3, hint="on predicted_5mm; 0 is perfect"),
        Line("ece_top_label", "ece_top_label", 3, hint="on predicted_5mm; 0 is perfect"),
        Line("gap", "gap, mean confidence − accuracy", 3, hint="positive is over-confident"),
    ),
}
# what the page's text and its program both name
SHOWN = {
    "regions": REGIONS,
    "colours": REGION_COLOURS,
    "scales": SCALES,
    "modality_names": MODALITY_NAMES,
    "shown_from": ENTROPY_SHOWN_FROM,
}
NEEDS_REFERENCE = ("Segmentation", "Does uncertainty find the errors?", "Is confidence calibrated?")


def page(scan, probability, labels, person, numbers, *, model, background, provenance):
    """Return the page of one patient, as HTML text.

    scan : `segtrust.preprocess.Preprocessed`
    probability : float32 (3, x, y, z), mean over the passes, order of `REGIONS`, on the patient's own grid
    labels : uint8 (x, y, z), canonical labels of the reference on the patient's own grid; None without one
    person : `segtrust.patients.Patient`
    numbers : of `segtrust.score`, a dict from region to a dict from name to a number, or None for null
    model : name; background : modality that is shown first, one of `MODALITIES`
    provenance : dict, shown at the end
    """
    volumes = Volumes.of(scan, probability, labels)
    shown = {
        "person": person,
        "model": model,
        "lines": table_of(numbers, labels is not None),
        "flags": flags_of(numbers, labels is not None),
        "sheet": sheet_of(person),
        "provenance": flatten(provenance),
        "has_reference": labels is not None,
        "outside": volumes.outside,
        "modalities": MODALITIES,
        "window": WINDOW_PERCENT,
        **SHOWN,
        "background": background,
    }
    about, parts, step = volumes.coded()
    about |= {**SHOWN, "patient": person.patient, "has_reference": labels is not None, "background": background}
    return environment().get_template("page.html").render(**shown, about=about, parts=parts, step=step)


def read_probability(path):
    """Return the probabilities of a map, float32 (3, x, y, z) on the patient's own grid."""
    return np.moveaxis(np.asanyarray(nib.load(path).dataobj, np.float32), -1, 0)


def read_labels(person, geometry):
    """Return the canonical labels of a patient's reference, uint8 (x, y, z); None where the sheet names none."""
    if person.seg is None:
        return None
    return read_reference(person.seg, person.coding, person.patient, geometry).labels


def read_numbers(path):
    """Return (numbers of a patient, provenance) of a tally (.parquet) or of a file of rule `score` (.json)."""
    if str(path).endswith(".json"):
        held = read_json(path)
        return held["regions"], held["provenance"]
    tally = StoredTally(path)
    return numbers_of(tally), tally.provenance


# --- numbers ---


def table_of(numbers, has_reference):
    """Return {heading: [(Line, [text per region])]}; a dash for null, no line where every region has one."""
    table = {}
    for heading, lines in LINES.items():
        if not has_reference and heading in NEEDS_REFERENCE:
            continue
        rows = [(line, [_text(numbers[region].get(line.name), line.digits) for region in REGIONS]) for line in lines]
        rows = [(line, texts) for line, texts in rows if set(texts) != {"–"}]
        if rows:
            table[heading] = rows
    return table


def _text(value, digits):
    return "–" if value is None else f"{value + 0.0:.{digits}f}".replace("-", "−")


def flags_of(numbers, has_reference):
    """Return sentences about regions that are not predicted, a list of (level, text)."""
    flags = []
    for region in REGIONS:
        case = numbers[region]
        if not case["missing_region"]:
            continue
        if not has_reference:
            flags.append(("caution", f"{region}: no voxel is predicted, so it has no score of uncertainty."))
        elif case["both_empty"]:
            flags.append(("unknown", f"{region}: absent in prediction and reference; its Dice is 1 by convention."))
        else:
            flags.append(
                ("bad", f"{region}: missed. The reference has {case['reference_ml']:.3g} ml, no voxel is predicted.")
            )
    return flags


def sheet_of(person):
    """Return [(column, text)] of what the sheet says of a patient, files left out."""
    rows = [("split", person.split), ("coding", person.coding)]
    if person.subject != person.patient:
        rows.insert(0, ("subject", person.subject))
    return rows + [(name, value) for name, value in person.extra.items() if value != ""]


# --- volumes ---


@dataclass(frozen=True)
class Volumes:
    """What a page shows, in the brain box, canonical orientation.

    scans : dict from modality to uint8 (x, y, z), 0 outside the brain
    probability : float32 (3, x, y, z)
    bits : uint8 (x, y, z); bit r is set where region r is predicted, bit 3 + r where it is in the reference
    spacing_mm : (3,); affine : float64 (4, 4), voxel of the box to world, mm
    start : voxel where the views begin, by axis; starts : the same of each region
    outside : predicted voxels of WT outside the box, which are not shown
    """

    scans: dict
    probability: np.ndarray
    bits: np.ndarray
    spacing_mm: tuple
    affine: np.ndarray
    start: tuple
    starts: dict
    outside: int

    @classmethod
    def of(cls, scan, probability, labels):
        """Return the volumes of a patient; arguments as of `page`."""
        geometry, box = scan.geometry, (..., *scan.box)
        whole = geometry.to_canonical(probability)
        thin = thinning(scan.nonzero.shape)
        every = (..., *(slice(None, None, thin),) * 3)
        probability = np.ascontiguousarray(whole[box][every])
        predicted = probability >= np.float32(0.5)
        outside = int((whole[0] >= np.float32(0.5)).sum() - (whole[0][box] >= np.float32(0.5)).sum())
        bits = np.zeros(predicted.shape[1:], np.uint8)
        reference = None if labels is None else region_masks(geometry.to_canonical(labels)[box][every])
        for place in range(len(REGIONS)):
            bits |= predicted[place].astype(np.uint8) << place
            if reference is not None:
                bits |= reference[place].astype(np.uint8) << (3 + place)
        weight = predicted != reference if reference is not None else binary_entropy(probability)
        affine = geometry.canonical_affine @ _shifted(scan.start, thin)
        return cls(
            scans={
                modality: grey(scan.image[place][every], (scan.nonzero[every] >> place) & 1 > 0)
                for place, modality in enumerate(MODALITIES)
            },
            probability=probability,
            bits=bits,
            spacing_mm=tuple(float(side) for side in np.sqrt((affine[:3, :3] ** 2).sum(axis=0))),
            affine=affine,
            start=fullest(weight.sum(axis=0)),
            starts={region: fullest(weight[place]) for place, region in enumerate(REGIONS)},
            outside=outside,
        )

    def coded(self):
        """Return (dict that the page's program reads, dict from name to text of a volume, voxels along an edge).

        Probabilities are means over cubes with the shortest edge with which all texts together fit into a page.
        """
        shape = self.bits.shape
        columns = int(np.ceil(np.sqrt(shape[2] * shape[1] / shape[0])))
        mosaics = {f"scan-{name}": mosaic(volume, columns) for name, volume in self.scans.items()}
        for quality in QUALITIES:
            parts = {name: base64_of(picture(tiles, quality)) for name, tiles in mosaics.items()}
            if sum(map(len, parts.values())) <= LONGEST_SCANS:
                break
        parts["bits"] = base64_of(packed(self.bits))
        for step in STEPS:
            for place, region in enumerate(REGIONS):
                parts[f"probability-{region}"] = base64_of(packed(angles(coarse(self.probability[place], step))))
            if sum(map(len, parts.values())) <= LONGEST_VOLUMES:
                break
        about = {
            "shape": shape,
            "columns": columns,
            "step": step,
            "spacing_mm": self.spacing_mm,
            "affine": np.round(self.affine[:3], 4).tolist(),
            "start": self.start,
            "starts": self.starts,
        }
        return about, parts, step


def thinning(shape):
    """Return the least n for which every n-th voxel along each axis gives no more than `MOST_PIXELS` voxels."""
    thin = 1
    while np.prod([-(-size // thin) for size in shape]) > MOST_PIXELS:
        thin += 1
    return thin


def _shifted(start, thin):
    moved = np.diag([float(thin)] * 3 + [1.0])
    moved[:3, 3] = start
    return moved


def grey(volume, inside):
    """Return a modality as grey levels, uint8: 1 to 255 inside, between two percentiles, and 0 outside.

    volume : float (x, y, z); inside : bool (x, y, z)
    """
    levels = np.zeros(volume.shape, np.uint8)
    if inside.any():
        values = volume[inside]
        low, high = np.percentile(values, WINDOW_PERCENT)
        levels[inside] = 1 + np.rint(254 * np.clip((values - low) / max(high - low, 1e-6), 0, 1))
    return levels


def mosaic(volume, columns):
    """Return all axial slices of a volume (x, y, z) side by side, (rows · y, columns · x); slice 0 is top left."""
    width, height, count = volume.shape
    rows = -(-count // columns)
    tiles = np.zeros((rows * columns, height, width), volume.dtype)
    tiles[:count] = volume.transpose(2, 1, 0)
    return tiles.reshape(rows, columns, height, width).swapaxes(1, 2).reshape(rows * height, columns * width)


def picture(image, quality):
    """Return the bytes of a picture; image : uint8 (rows, columns); quality : in percent."""
    written = io.BytesIO()
    Image.fromarray(image).save(written, "WEBP", quality=quality, method=2)
    return written.getvalue()


def packed(volume):
    """Return the gzip file of a uint8 volume, first axis fastest, without a date."""
    packer = zlib.compressobj(6, zlib.DEFLATED, 31)
    return packer.compress(volume.tobytes(order="F")) + packer.flush()


def angles(probability):
    """Return probabilities as bytes c with p = sin²(π c / 510).

    The steps are fine where entropy is steep: it is known to 0.006 bits everywhere.
    """
    return np.rint(np.arcsin(np.sqrt(np.clip(probability, 0, 1))) * np.float32(510 / np.pi)).astype(np.uint8)


def coarse(volume, step):
    """Return the means over cubes of step³ voxels, cut off at the far sides; the volume itself for 1."""
    for axis in range(3) if step > 1 else ():
        edges = np.arange(0, volume.shape[axis], step)
        sizes = np.diff(np.append(edges, volume.shape[axis]))
        shape = [-1 if other == axis else 1 for other in range(3)]
        volume = np.add.reduceat(volume, edges, axis=axis) / sizes.reshape(shape).astype(np.float32)
    return volume


def fullest(weight):
    """Return, for each axis, the slice with the largest sum of a volume (x, y, z); the middle one of an empty one."""
    found = []
    for axis in range(3):
        sums = weight.sum(axis=tuple(other for other in range(3) if other != axis))
        found.append(int(sums.argmax()) if sums.any() else weight.shape[axis] // 2)
    return tuple(found)


def base64_of(content):
    """Return bytes as text."""
    return base64.b64encode(content).decode()
