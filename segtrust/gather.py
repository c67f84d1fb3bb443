"""Gather predictions made elsewhere into moments: each file is one pass.

| file                                         | `outputs` in the config                                      |
|----------------------------------------------|--------------------------------------------------------------|
| 4-D NIfTI of region probabilities            | `[WT, TC, ET]`, in the order of the channels, which are last |
| 4-D NIfTI of class probabilities             | `{softmax: [background, NCR, ED, ET]}`, in their order       |
| .npz and .pkl of nnU-Net (v2 and v1)         | either; classes by label, regions as its dataset.json lists  |
| 3-D NIfTI of labels, each an ensemble member | `{labels: brats2021}`, or another of `regions.CODINGS`       |

nnU-Net's conversion of BraTS 2021 (Dataset137) has labels 1 ED, 2 NCR, 3 ET: `{labels: msd}`,
`{softmax: [background, ED, NCR, ET]}`, or, trained on regions, `[WT, TC, ET]`.

Every file must lie on the patient's own grid; nothing is resampled or repaired. What nnU-Net itself reoriented, and
says so, is put back exactly.
"""

import os
import pickle
import re
import zipfile
import zlib
from collections import OrderedDict
from functools import cache
from pathlib import Path

import numpy as np

from segtrust.errors import PatientError, SegtrustError
from segtrust.moments import Accumulator
from segtrust.regions import CLASSES, CODINGS, REGIONS, canonical_labels, class_regions, region_masks
from segtrust.sources import PREDICTIONS
from segtrust.volumes import Geometry, bounding_box, geometry_of, load_image, read_voxels

# float16, and interpolation, leave values a little outside [0, 1]; sums of four float16 are off by less than 1e-3
RANGE_TOLERANCE = 1e-3
SUM_TOLERANCE = 1e-2

_AS_REGIONS = f"outputs: [{', '.join(REGIONS)}]"
_AS_SOFTMAX = f"outputs: {{softmax: [{', '.join(CLASSES)}]}}"
_AS_LABELS = (
    f"outputs: {{labels: CODING}}, with CODING one of {', '.join(CODINGS)} (labels of nnU-Net's BraTS 2021 conversion, "
    "1 ED, 2 NCR, 3 ET, are msd)"
)


def find_passes(pattern, patient):
    """Return the files of a patient's passes, a dict from pass number to path.

    pattern : path with `{patient}` and perhaps `{pass}` (a whole number, from any start, without gaps), which may be
        part of a folder's name, such as "nnunet/fold_{pass}/{patient}.npz"; without `{pass}` there is one
        deterministic prediction

    Raises SegtrustError when nothing matches, passes are missing between the first and the last, or a file lacks one
    of its `companions`.
    """
    filled = pattern.replace("{patient}", patient)
    if "{pass}" not in filled:
        if not Path(filled).is_file():
            raise SegtrustError(f"{patient}: no prediction {filled}")
        return _complete({0: filled}, patient)
    if filled.count("{pass}") > 1:
        raise SegtrustError(f"predictions: {{pass}} belongs into the path once: {pattern}")
    parts = Path(filled).parts
    (place,) = (index for index, part in enumerate(parts) if "{pass}" in part)
    folder, rest = Path(*parts[:place]), parts[place + 1 :]
    before, after = parts[place].split("{pass}")
    numbered = re.compile(re.escape(before) + r"(\d+)" + re.escape(after))
    found = {}
    for entry in _names_in(folder):
        match = numbered.fullmatch(entry)
        if match and (not rest or folder.joinpath(entry, *rest).is_file()):
            number, path = int(match[1]), str(folder.joinpath(entry, *rest))
            if number in found:
                raise SegtrustError(f"{patient}: two files are pass {number}: {found[number]} and {path}")
            found[number] = path
    if not found:
        raise SegtrustError(f"{patient}: no file matches {filled}")
    numbers = sorted(found)
    missing = sorted(set(range(numbers[0], numbers[-1] + 1)) - set(numbers))
    if missing:
        raise SegtrustError(
            f"{patient}: passes {', '.join(map(str, missing))} are missing between {numbers[0]} and "
            f"{numbers[-1]} of {filled}"
        )
    return _complete({index: found[number] for index, number in enumerate(numbers)}, patient)


def companions(path):
    """Return the list of further files that a prediction needs: the properties (.pkl) of an nnU-Net .npz."""
    return [str(Path(path).with_suffix(".pkl"))] if str(path).endswith(".npz") else []


def _complete(passes, patient):
    missing = [name for path in passes.values() for name in companions(path) if not Path(name).is_file()]
    if missing:
        raise _no_properties(missing, patient)
    return passes


def _no_properties(missing, patient):
    return PatientError(
        f"{patient}: an .npz is read with nnU-Net's properties file beside it, but there is no {', '.join(missing)}; "
        "nnU-Net writes CASE.pkl with CASE.npz (--save_probabilities; --save_npz in nnU-Net v1): copy both."
    )


@cache
def _names_in(folder):
    # patients often share one folder: it is listed once, not once per patient
    return sorted(os.listdir(folder)) if folder.is_dir() else []


def read_prediction(path, outputs, patient, geometry):
    """Read one prediction as region probabilities, float32 (3, x, y, z), order WT, TC, ET, patient's own grid.

    path : .nii, .nii.gz, or .npz with its .pkl beside it
    outputs : list of the three regions, or {"softmax": list of the four classes}, in the order of the file's channels;
        or {"labels": a key of `CODINGS`}, for label maps, whose probabilities are 0 or 1

    Raises PatientError for another grid, a kind of file that `outputs` does not fit, values that are no
    probabilities, label codes unknown to the coding, and damaged or untrustworthy files.
    """
    if str(path).endswith(".npz"):
        return _read_nnunet(path, outputs, patient, geometry)
    if str(path).endswith((".nii", ".nii.gz")):
        return _read_nifti(path, outputs, patient, geometry)
    raise PatientError(f"{patient}: predictions are .nii, .nii.gz or .npz files, found {path}; convert the file.")


def _read_nifti(path, outputs, patient, geometry):
    image = load_image(path, patient)
    _check_grid(geometry_of(image), geometry, patient, path)
    if _is_labels(outputs):
        return _read_labels(image, outputs["labels"], patient, path)
    names = _channel_names(outputs)
    if image.shape[3:] != (len(names),):
        raise PatientError(
            f"{patient}: the prediction has shape {image.shape}, expected (x, y, z, {len(names)}) with channels "
            f"{', '.join(names)}: {path}; {_remedy(image.shape[3:])}"
        )
    channels = np.moveaxis(read_voxels(image, patient, path), -1, 0)
    return _regions(channels, outputs, patient, path)


def _read_labels(image, coding, patient, path):
    if len(image.shape) != 3:
        raise PatientError(
            f"{patient}: the prediction has shape {image.shape}, a label map (x, y, z) is expected: {path}; "
            f"{_remedy(image.shape[3:])}"
        )
    codes = read_voxels(image, patient, path)
    setting = "`outputs: {labels: …}` of the model"
    labels = canonical_labels(codes, coding, patient, path, name="the prediction", setting=setting)
    return region_masks(labels).astype(np.float32)


def _is_labels(outputs):
    return isinstance(outputs, dict) and "labels" in outputs


def _channel_names(outputs):
    return outputs["softmax"] if isinstance(outputs, dict) else outputs


def _remedy(channels):
    """Return what to write in `outputs` for a file; channels : its shape without the three axes of space."""
    if channels == ():
        return f"a 3-D file is read as labels: write {_AS_LABELS}"
    fitting = {(len(REGIONS),): _AS_REGIONS, (len(CLASSES),): _AS_SOFTMAX}
    if channels in fitting:
        return f"write {fitting[channels]}, in the order of the file's channels"
    return f"export {len(REGIONS)} regions ({_AS_REGIONS}) or {len(CLASSES)} classes ({_AS_SOFTMAX})"


def _check_grid(found, expected, patient, path, hint=""):
    if not found.agrees_with(expected):
        raise PatientError(
            f"{patient}: the prediction lies on another grid than the scan: {found.describe()}; expected "
            f"{expected.describe()}: {path}; export it on the scan's grid.{hint}"
        )


def _regions(channels, outputs, patient, path, padded=None):
    """Return region probabilities, float32 (3, x, y, z), from the file's channels, float32 (c, x, y, z).

    padded : bool (x, y, z), voxels that nnU-Net did not predict and filled with zeros: they are background
    """
    low, high = float(channels.min()), float(channels.max())
    if low < -RANGE_TOLERANCE or high > 1 + RANGE_TOLERANCE:
        raise PatientError(
            f"{patient}: probabilities reach from {low:g} to {high:g}, expected [0, 1]; are these logits, or "
            f"percentages? File: {path}"
        )
    channels = np.clip(channels, 0, 1)
    if not isinstance(outputs, dict):
        return np.stack([channels[outputs.index(region)] for region in REGIONS])
    total = channels.sum(axis=0)
    off = np.abs(total - 1) > SUM_TOLERANCE
    if padded is not None:
        off &= ~padded
    if off.any():
        raise PatientError(
            f"{patient}: the four classes do not sum to 1 in {int(off.sum()):,} voxels (smallest {total[off].min():g}, "
            f"largest {total[off].max():g}): {path}; are these logits, or sigmoids? A softmax has background 1 where "
            "nothing was predicted."
        )
    return class_regions(channels, outputs["softmax"])


# --- nnU-Net ---


def _read_nnunet(path, outputs, patient, geometry):
    """Read the .npz that nnU-Net exports, and place it with the .pkl beside it.

    v2 (`probabilities`) holds the whole grid, v1 (`softmax`) the box that `crop_bbox` names; both are (c, z, y, x).
    Around what v2 predicted stands background 1, in its first releases 0 in every class; regions are 0 there.
    """
    if _is_labels(outputs):
        raise PatientError(
            f"{patient}: an .npz holds probabilities, but outputs are labels: {path}; write {_AS_REGIONS} or "
            f"{_AS_SOFTMAX}, in the order of the file's channels"
        )
    properties = _read_properties(companions(path)[0], patient)
    channels = _read_channels(path, outputs, patient).transpose(0, 3, 2, 1)
    found, box, reoriented = _placement(properties, channels.shape[1:], patient, path)
    expected = Geometry(geometry.canonical_shape, geometry.canonical_affine) if reoriented else geometry
    swapped = found.shape != expected.shape and found.shape[::-1] == expected.shape
    hint = " Its axes seem to be (channels, x, y, z); nnU-Net writes (channels, z, y, x)." if swapped else ""
    _check_grid(found, expected, patient, path, hint)
    padded = ~channels.any(axis=0)
    whole = np.zeros((len(REGIONS), *found.shape), np.float32)
    whole[(slice(None), *box)] = _regions(channels, outputs, patient, path, None if padded.all() else padded)
    return geometry.to_own(whole) if reoriented else whole


def _read_channels(path, outputs, patient):
    """Return the array of an .npz, float32 (channels, z, y, x), with as many channels as outputs."""
    try:
        with open(path, "rb") as file:
            if not zipfile.is_zipfile(file):
                raise zipfile.BadZipFile("no complete zip archive")
            file.seek(0)
            with np.load(file, allow_pickle=False) as archive:
                keys = [key for key in ("probabilities", "softmax") if key in archive.files]
                stored = archive[keys[0]] if keys else None
                held = ", ".join(archive.files) or "nothing"
    except FileNotFoundError as error:
        raise PatientError(f"{patient}: no such file: {path}; restore it.") from error
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError, ValueError) as error:
        raise PatientError(f"{patient}: not a readable .npz of numbers ({error}): {path}; copy it again.") from error
    if stored is None:
        raise PatientError(
            f"{patient}: an .npz of nnU-Net has probabilities (v2) or softmax (v1), this one has {held}: {path}; "
            "predict with --save_probabilities (--save_npz in nnU-Net v1)."
        )
    names = _channel_names(outputs)
    if stored.ndim != 4 or len(stored) != len(names):
        raise PatientError(
            f"{patient}: the prediction has shape {stored.shape}, expected ({len(names)}, z, y, x) with channels "
            f"{', '.join(names)}: {path}; {_remedy(stored.shape[:1])}"
        )
    if stored.dtype.kind not in "fiub":
        raise PatientError(
            f"{patient}: the prediction holds {stored.dtype}, expected numbers: {path}; export it again."
        )
    channels = stored.astype(np.float32, copy=False)
    bad = channels.size - int(np.isfinite(channels).sum())
    if bad:
        raise PatientError(f"{patient}: {bad:,} values are NaN or infinite: {path}; export the prediction again.")
    return channels


def _placement(properties, shape, patient, path):
    """Return (grid, box, reoriented) of an array (x, y, z) of nnU-Net.

    grid : `Geometry` of the whole volume, of which the array fills the box (a tuple of slices)
    reoriented : whether nnU-Net turned the volume to RAS before it predicted
    """
    try:
        affine, reoriented = _affine_of(properties)
        size, box = tuple(shape), None
        if properties.get("crop_bbox") is not None:
            size = tuple(int(side) for side in np.asarray(properties["original_size_of_raw_data"]))[::-1]
            limits = np.asarray(properties["crop_bbox"]).reshape(3, 2)
            box = [slice(int(first), int(stop)) for first, stop in limits][::-1]
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise PatientError(
            f"{patient}: the properties beside the prediction do not say where it lies "
            f"({type(error).__name__}: {error}): {path}; expected are sitk_stuff or nibabel_stuff (nnU-Net v2), or "
            "itk_spacing, itk_origin, itk_direction (v1), of a 3-D volume: predict from NIfTI files."
        ) from error
    if not (np.isfinite(affine).all() and np.linalg.det(affine[:3, :3])):
        raise PatientError(
            f"{patient}: the affine of the properties, {np.round(affine[:3], 3).tolist()}, places no voxel: {path}; "
            "predict again."
        )
    if box is None:
        box = [slice(0, side) for side in size]
    held = tuple(side.stop - side.start for side in box)
    if held != tuple(shape) or any(not 0 <= side.start < side.stop <= n for side, n in zip(box, size, strict=True)):
        raise PatientError(
            f"{patient}: the prediction has {tuple(shape)} voxels (x, y, z), but the properties crop "
            f"{[(side.start, side.stop) for side in box]} out of {size}: {path}; copy .npz and .pkl of one export."
        )
    return Geometry(size, affine), tuple(box), reoriented


def _affine_of(properties):
    """Return (affine, reoriented) from nnU-Net's properties; affine float64 (4, 4), voxel to RAS world, mm."""
    if "nibabel_stuff" in properties:
        known = properties["nibabel_stuff"]
        reoriented = "reoriented_affine" in known
        affine = known["reoriented_affine" if reoriented else "original_affine"]
        return np.asarray(affine, np.float64).reshape(4, 4), reoriented
    if "sitk_stuff" in properties:
        known = properties["sitk_stuff"]
        return _from_itk(known["spacing"], known["origin"], known["direction"]), "original_orientation" in known
    return _from_itk(properties["itk_spacing"], properties["itk_origin"], properties["itk_direction"]), False


def _from_itk(spacing, origin, direction):
    # ITK's world is LPS, its direction has the axes as columns, row by row
    affine = np.eye(4)
    affine[:3, :3] = np.asarray(direction, np.float64).reshape(3, 3) * np.asarray(spacing, np.float64).reshape(3)
    affine[:3, 3] = np.asarray(origin, np.float64).reshape(3)
    return np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine


def _read_properties(path, patient):
    """Read the properties that nnU-Net pickled, a dict; nothing of the file is executed."""
    try:
        with open(path, "rb") as file:
            properties = _Properties(file).load()
    except FileNotFoundError as error:
        raise _no_properties([path], patient) from error
    except _Refused as error:
        raise PatientError(
            f"{patient}: the properties file asks for {error}, which nnU-Net's properties do not need: {path}; it was "
            "not read and nothing of it was executed. Do not unpickle it; take the .pkl that nnU-Net wrote."
        ) from error
    except (
        pickle.UnpicklingError,
        ArithmeticError,
        AttributeError,
        EOFError,
        LookupError,
        MemoryError,
        OSError,
        TypeError,
        ValueError,
    ) as error:
        raise PatientError(
            f"{patient}: not a readable properties file ({type(error).__name__}: {error}): {path}; copy it again."
        ) from error
    if not isinstance(properties, dict):
        raise PatientError(
            f"{patient}: the properties file holds no dict of properties: {path}; nnUNetv2_ensemble wrote "
            "probabilities into it until 2026: take the .pkl of one of the predictions that were averaged."
        )
    return properties


class _Refused(pickle.UnpicklingError):
    """A pickle asks for something that no properties file needs."""


class _Properties(pickle.Unpickler):
    """Unpickle plain Python values and numpy's arrays of numbers; whatever else a file names is refused.

    Not even numpy's own functions are handed out: a crafted state can make them read wild memory. The few names that
    pickled arrays have stand for the functions below, which build an array from its bytes.
    """

    def find_class(self, module, name):
        asked = (module.replace("numpy.core.", "numpy._core."), name)
        if asked not in _HANDED_OUT:
            raise _Refused(f"{module}.{name}")
        return _HANDED_OUT[asked]


class _Type:
    """Stand in for numpy.dtype."""

    def __init__(self, code, *_):
        if not (isinstance(code, str) and re.fullmatch(r"[biufc]\d{1,2}|[SU]\d{1,4}", code)):
            raise _Refused(f"the numpy type {code!r}")
        self.dtype = np.dtype(code)

    def __setstate__(self, state):
        self.dtype = self.dtype.newbyteorder(state[1])


class _Array:
    """Stand in for an array that is described first and filled later; numpy reads it as an array."""

    def __init__(self, *_):
        self._filled = None

    def __setstate__(self, state):
        _, shape, kind, is_fortran, content = state
        self._filled = _filled(content, kind, shape, "F" if is_fortran else "C")

    def __array__(self, dtype=None, copy=None):
        return np.array(self._filled, dtype)


def _filled(content, kind, shape, order):
    if type(kind) is not _Type:
        raise _Refused(f"an array of {type(kind).__name__}")
    return np.frombuffer(content, kind.dtype).reshape(shape, order=order)


def _scalar(kind, content):
    return _filled(content, kind, (), "C").item()


def _encoded(text, encoding):
    if encoding != "latin1":
        raise _Refused(f"the encoding {encoding!r}")
    return text.encode("latin1")


_HANDED_OUT = {
    ("collections", "OrderedDict"): OrderedDict,
    ("_codecs", "encode"): _encoded,
    ("numpy", "dtype"): _Type,
    ("numpy", "ndarray"): None,
    ("numpy._core.multiarray", "_reconstruct"): _Array,
    ("numpy._core.multiarray", "scalar"): _scalar,
    ("numpy._core.numeric", "_frombuffer"): _filled,
}


def gather(paths, *, outputs, deterministic, patient, geometry):
    """Return the moments of a patient's predictions.

    paths : list of files, one per pass
    outputs : what the files' numbers mean, as for `read_prediction`
    deterministic : whether these are deterministic predictions, of which there is one, which then is the deterministic
        pass too
    geometry : the patient's own grid

    The moments are cropped to the box outside which every pass is zero.
    """
    accumulator = Accumulator(geometry.canonical_shape, PREDICTIONS)
    occupied = np.zeros(geometry.canonical_shape, bool)
    for index, path in enumerate(paths):
        probability = geometry.to_canonical(read_prediction(path, outputs, patient, geometry))
        occupied |= (probability > 0).any(axis=0)
        accumulator.add(index, probability)
        if deterministic:
            accumulator.set_deterministic(probability)
        print(f"{patient}: pass {index + 1} of {len(paths)}, {path}", flush=True)
    box = bounding_box(occupied) or (slice(0, 1),) * 3
    return accumulator.moments((0, 0, 0), geometry).crop(box)
