"""Volumes: NIfTI files, the patient's own grid, and the canonical (RAS) orientation networks see.

Arrays have their spatial axes last: (…, x, y, z).
"""

import gzip
import zlib
from dataclasses import dataclass

import nibabel as nib
import numpy as np
from nibabel.orientations import apply_orientation, inv_ornt_aff, io_orientation, ornt_transform
from nibabel.spatialimages import HeaderDataError

from segtrust.errors import PatientError
from segtrust.files import replacing
from segtrust.regions import CAVITY_CODES, canonical_labels

CANONICAL = np.array([[0, 1], [1, 1], [2, 1]])  # axes towards right, anterior, superior

# affines of one patient's files may differ by rounding (an origin of -0.0, a float32 sform): far below a voxel
AFFINE_TOLERANCE_MM = 1e-3


@dataclass(frozen=True)
class Geometry:
    """The patient's own grid.

    shape : (x, y, z), voxels of the file
    affine : float64 (4, 4), voxel to world, mm
    form_codes : (qform, sform) codes of the file's header, so that maps carry the same
    """

    shape: tuple
    affine: np.ndarray
    form_codes: tuple = (1, 1)

    def to_json(self):
        """Return the grid as a JSON-able dict."""
        return {"shape": list(self.shape), "affine": self.affine.tolist(), "form_codes": list(self.form_codes)}

    @classmethod
    def from_json(cls, value):
        """Return the grid that `to_json` described."""
        return cls(tuple(value["shape"]), np.array(value["affine"], np.float64), tuple(value["form_codes"]))

    @property
    def orientation(self):
        """Return the axis codes of the file, such as ('L', 'P', 'S')."""
        return nib.aff2axcodes(self.affine)

    @property
    def spacing_mm(self):
        """Return the voxel size along the file's own axes, float64 (3,), mm."""
        return np.sqrt((self.affine[:3, :3] ** 2).sum(axis=0))

    @property
    def canonical_shape(self):
        """Return the shape of the grid once its axes are canonical."""
        own = io_orientation(self.affine)
        shape = [0, 0, 0]
        for axis, (target, _) in enumerate(own):
            shape[int(target)] = self.shape[axis]
        return tuple(shape)

    @property
    def canonical_affine(self):
        """Return the affine of the canonical grid, float64 (4, 4)."""
        return self.affine @ inv_ornt_aff(io_orientation(self.affine), self.shape)

    def to_canonical(self, array):
        """Return the array (…, own grid) with its last three axes canonical; no voxel is interpolated."""
        return _reorient(array, io_orientation(self.affine))

    def to_own(self, array):
        """Return the array (…, canonical grid) on the patient's own grid; the inverse of `to_canonical`."""
        return _reorient(array, ornt_transform(CANONICAL, io_orientation(self.affine)))

    def place(self, array, start):
        """Return an array (…, x, y, z) of a box, canonical, on the patient's own grid; zero outside the box.

        start : (3,) offset of the box in the canonical grid, voxels
        """
        whole = np.zeros((*array.shape[:-3], *self.canonical_shape), array.dtype)
        box = tuple(slice(first, first + size) for first, size in zip(start, array.shape[-3:], strict=True))
        whole[(..., *box)] = array
        return self.to_own(whole)

    def agrees_with(self, other):
        """Say whether two grids are the same: equal shapes, affines within `AFFINE_TOLERANCE_MM`."""
        return self.shape == other.shape and np.allclose(self.affine, other.affine, rtol=0, atol=AFFINE_TOLERANCE_MM)

    def describe(self):
        """Return shape, spacing, orientation and origin as text for messages."""
        shape = "×".join(str(size) for size in self.shape)
        spacing = "×".join(f"{size:g}" for size in np.round(self.spacing_mm, 4))
        origin = ", ".join(f"{value:g}" for value in np.round(self.affine[:3, 3], 3) + 0.0)
        return f"{shape} voxels of {spacing} mm, {''.join(self.orientation)}, origin ({origin})"


def _reorient(array, orientation):
    spatial = np.moveaxis(array, (-3, -2, -1), (0, 1, 2))
    return np.moveaxis(apply_orientation(spatial, orientation), (0, 1, 2), (-3, -2, -1))


def bounding_box(membership):
    """Return the smallest box that holds a bool array, as a tuple of slices; None for an empty one."""
    box = []
    for axis in range(membership.ndim):
        others = tuple(other for other in range(membership.ndim) if other != axis)
        found = np.flatnonzero(membership.any(axis=others))
        if not found.size:
            return None
        box.append(slice(int(found[0]), int(found[-1]) + 1))
    return tuple(box)


def load_image(path, patient):
    """Open a NIfTI file without reading its voxels.

    Raises PatientError when the file is missing or no image, or its affine cannot be inverted.
    """
    try:
        image = nib.load(path)
    except FileNotFoundError as error:
        raise PatientError(f"{patient}: no such file: {path}; correct the sheet or restore the file.") from error
    except (nib.filebasedimages.ImageFileError, HeaderDataError, EOFError, OSError, zlib.error) as error:
        raise PatientError(
            f"{patient}: not a readable NIfTI file ({_first_line(error)}): {path}; copy it again."
        ) from error
    if not (np.isfinite(image.affine).all() and np.linalg.det(image.affine[:3, :3])):
        raise PatientError(
            f"{patient}: the header's affine, {np.round(image.affine[:3], 3).tolist()}, places no voxel: {path}; "
            "export the volume again."
        )
    return image


def geometry_of(image):
    """Return the Geometry of a NIfTI image (its first three axes)."""
    codes = (1, 1)
    if isinstance(image, nib.Nifti1Image) and (image.header["qform_code"] or image.header["sform_code"]):
        codes = (int(image.header["qform_code"]), int(image.header["sform_code"]))
    return Geometry(tuple(int(size) for size in image.shape[:3]), np.asarray(image.affine, np.float64), codes)


def read_voxels(image, patient, path, dtype=np.float32):
    """Read the voxels of an opened image, (x, y, z) or (x, y, z, c).

    Raises PatientError for a truncated or damaged file and for NaN or infinite voxels (naming how many).
    """
    try:
        voxels = np.asanyarray(image.dataobj).astype(dtype, copy=False)
        _check_sum(path)
    except (EOFError, OSError, ValueError, zlib.error) as error:
        raise PatientError(
            f"{patient}: the file ends early or is damaged ({_first_line(error)}): {path}; copy it again."
        ) from error
    if np.issubdtype(voxels.dtype, np.floating):
        bad = voxels.size - int(np.isfinite(voxels).sum())
        if bad:
            raise PatientError(
                f"{patient}: {bad:,} voxels are NaN or infinite, finite values are expected: {path}; "
                "export the volume again."
            )
    return voxels


@dataclass(frozen=True)
class Reference:
    """Reference labels on the patient's own grid.

    labels : uint8 (x, y, z), canonical
    cavity : bool (x, y, z), the resection cavity of BraTS 2024 (canonically background); None in other codings
    """

    labels: np.ndarray
    cavity: np.ndarray | None


def read_reference(path, coding, patient, geometry):
    """Read a label file.

    coding : a key of `segtrust.regions.CODINGS`
    geometry : the grid of the patient's scan; the labels must lie on it

    Returns a `Reference`. Raises PatientError for another grid, a damaged file and unknown codes.
    """
    image = load_image(path, patient)
    found = geometry_of(image)
    if not found.agrees_with(geometry):
        raise PatientError(
            f"{patient}: seg lies on another grid than the scan: {found.describe()}; expected "
            f"{geometry.describe()}: {path}; resample the labels onto the scan."
        )
    codes = read_voxels(image, patient, path)
    if codes.ndim != 3:
        raise PatientError(f"{patient}: seg has shape {codes.shape}, a 3-D label file is expected: {path}")
    labels = canonical_labels(codes, coding, patient, path)
    return Reference(labels, codes == CAVITY_CODES[coding] if coding in CAVITY_CODES else None)


def write_volume(path, array, geometry, description):
    """Write an array (x, y, z) or (c, x, y, z) as NIfTI on the patient's own grid; channels go last in the file.

    description : at most 79 letters, kept in the header's `descrip`
    """
    channels_last = np.moveaxis(array, 0, -1) if array.ndim == 4 else array
    image = nib.Nifti1Image(np.ascontiguousarray(channels_last), geometry.affine)
    image.header.set_xyzt_units("mm")
    image.header["descrip"] = description
    qform_code, sform_code = geometry.form_codes
    image.set_qform(geometry.affine, code=qform_code)
    image.set_sform(geometry.affine, code=sform_code)
    with replacing(path) as partial:
        nib.save(image, partial)


def _check_sum(path):
    """Read a compressed file to its end, where its checksum stands; nibabel stops at the last voxel."""
    if str(path).endswith(".gz"):
        with gzip.open(path) as file:
            while file.read(2**20):
                pass


def _first_line(error):
    return (str(error).splitlines() or [type(error).__name__])[0]
