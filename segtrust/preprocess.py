"""Preprocess one patient: four modalities on one grid, canonical orientation, z-scored, cropped to the brain box.

Knows no model: crop, padding and channel order are the model's and are applied when sampling.
"""

import json
from dataclasses import dataclass

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from segtrust.errors import PatientError
from segtrust.files import canonical_json, replacing
from segtrust.volumes import Geometry, bounding_box, geometry_of, load_image, read_voxels

MODALITIES = ("t1", "t1ce", "t2", "flair")
MSD_CHANNELS = ("flair", "t1", "t1ce", "t2")


@dataclass(frozen=True)
class Preprocessed:
    """A patient's scan as networks see it.

    image : float32 (4, x, y, z) in the order of `MODALITIES`, z-scored over the non-zero voxels of each modality,
        zero where that modality is zero; canonical orientation, cropped to the brain box
    nonzero : uint8 (x, y, z); bit m is set where modality m is non-zero in the file
    start : (3,) offset of the box in the canonical grid, voxels
    geometry : the patient's own grid
    """

    image: np.ndarray
    nonzero: np.ndarray
    start: tuple
    geometry: Geometry

    def place(self, array):
        """Return an array of the box, (…, x, y, z), on the patient's own grid; zero outside the box."""
        return self.geometry.place(array, self.start)

    @property
    def brain(self):
        """Return where any modality is non-zero, bool on the patient's own grid."""
        return self.place(self.nonzero > 0)

    @property
    def brain_t1(self):
        """Return where T1 is non-zero, bool on the patient's own grid."""
        return self.place(self.nonzero & 1 > 0)

    @property
    def box(self):
        """Return the slices of the brain box in the canonical grid."""
        return tuple(slice(first, first + size) for first, size in zip(self.start, self.nonzero.shape, strict=True))


def read_modalities(scan, patient):
    """Read the four modalities of a patient.

    scan : dict from each of `MODALITIES` to a path; or {"image": path} of one 4-D file whose channels are in the
        order flair, t1, t1ce, t2, as the Medical Segmentation Decathlon has them

    Returns (voxels float32 (4, x, y, z) on the patient's own grid, Geometry). Raises PatientError for a missing or
    damaged file, grids that differ between modalities, NaN or infinite voxels, and a modality that is zero
    everywhere.
    """
    volumes, geometry = _read_one_file(scan["image"], patient) if "image" in scan else _read_four(scan, patient)
    for modality, volume in zip(MODALITIES, volumes, strict=True):
        if not volume.any():
            raise PatientError(
                f"{patient}: every voxel of {modality} is zero, a skull-stripped scan is expected: "
                f"{scan.get(modality, scan.get('image'))}; replace the file."
            )
    return volumes, geometry


def _read_one_file(path, patient):
    image = load_image(path, patient)
    check_shape(image.shape, "image", patient, path)
    voxels = read_voxels(image, patient, path)
    order = [MSD_CHANNELS.index(modality) for modality in MODALITIES]
    return np.stack([voxels[..., channel] for channel in order]), geometry_of(image)


def _read_four(scan, patient):
    images = {modality: load_image(scan[modality], patient) for modality in MODALITIES}
    for modality, image in images.items():
        check_shape(image.shape, modality, patient, scan[modality])
    problem = grid_problem({modality: geometry_of(image) for modality, image in images.items()}, patient)
    if problem:
        raise PatientError(problem)
    volumes = np.stack([read_voxels(image, patient, scan[modality]) for modality, image in images.items()])
    return volumes, geometry_of(images[MODALITIES[0]])


def check_shape(shape, column, patient, path):
    """Raise PatientError when a file of the sheet's column `column` cannot have this shape."""
    if column == "image" and (len(shape) != 4 or shape[3] != len(MODALITIES)):
        raise PatientError(
            f"{patient}: the file has shape {shape}, expected (x, y, z, {len(MODALITIES)}) with the channels "
            f"{', '.join(MSD_CHANNELS)}: {path}"
        )
    if column != "image" and len(shape) != 3:
        raise PatientError(f"{patient}: {column} has shape {shape}, a 3-D volume is expected: {path}")


def grid_problem(geometries, patient):
    """Return a message when the grids of a patient's files differ, else None.

    geometries : dict from the name of a column to its Geometry; the first is what the others are held against
    """
    (first, expected), *others = geometries.items()
    differing = [f"{name} has {found.describe()}" for name, found in others if not found.agrees_with(expected)]
    if not differing:
        return None
    return (
        f"{patient}: the files lie on different grids: {first} has {expected.describe()}, but "
        f"{'; '.join(differing)}; resample them onto one grid."
    )


def normalise(volume):
    """Return the z-score of a volume over its non-zero voxels; zero voxels stay zero.

    volume : float array (x, y, z) with at least one non-zero voxel

    Uses the population standard deviation, as MONAI's NormalizeIntensity(nonzero=True) does; a volume of one
    value is only centred. Returns float32.
    """
    brain = volume != 0
    values = volume[brain].astype(np.float64)
    scale = values.std() or 1.0
    normalised = np.zeros(volume.shape, np.float32)
    normalised[brain] = (values - values.mean()) / scale
    return normalised


def preprocess(volumes, geometry):
    """Return the `Preprocessed` scan of four modalities, float32 (4, x, y, z) on the patient's own grid."""
    canonical = geometry.to_canonical(volumes)
    nonzero = np.zeros(canonical.shape[1:], np.uint8)
    for bit, volume in enumerate(canonical):
        nonzero |= (volume != 0).astype(np.uint8) << bit
    box = bounding_box(nonzero > 0)
    return Preprocessed(
        image=np.stack([normalise(volume[box]) for volume in canonical]),
        nonzero=nonzero[box],
        start=tuple(side.start for side in box),
        geometry=geometry,
    )


def write_preprocessed(path, preprocessed, provenance):
    """Write a preprocessed scan and its provenance as a safetensors file."""
    metadata = {
        "start": list(preprocessed.start),
        "geometry": preprocessed.geometry.to_json(),
        "provenance": provenance,
    }
    tensors = {
        "image": np.ascontiguousarray(preprocessed.image),
        "nonzero": np.ascontiguousarray(preprocessed.nonzero),
    }
    with replacing(path) as partial:
        save_file(tensors, partial, {"segtrust": canonical_json(metadata)})


def read_preprocessed(path):
    """Return (Preprocessed, provenance) of a file written by `write_preprocessed`."""
    with safe_open(path, "numpy") as file:
        metadata = json.loads(file.metadata()["segtrust"])
        scan = Preprocessed(
            image=file.get_tensor("image"),
            nonzero=file.get_tensor("nonzero"),
            start=tuple(metadata["start"]),
            geometry=Geometry.from_json(metadata["geometry"]),
        )
    return scan, metadata["provenance"]
