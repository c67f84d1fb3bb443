"""Voxels: one row per voxel that counts, with the reference, for one patient under one model.

Rows are the voxels of the brain and of every mask but `volume`; the rest of the volume enters as a tally in the
table's metadata. The stored values define every metric (definitions, sections 2 to 5).
"""

import numpy as np
import pyarrow as pa
from scipy import ndimage

from segtrust.errors import PatientError
from segtrust.files import canonical_json, write_parquet
from segtrust.masks import (
    BIT,
    BOUNDARY_MM,
    BOX_MARGIN_VOXELS,
    DILATION_MM,
    PLAUSIBLE_ABOVE,
    padded,
    reference_box,
    within,
)
from segtrust.regions import REGIONS, overlay, region_masks
from segtrust.tally import CASE_KEY, CONVERGENCE_KEY, REST_KEY, Columns, pooled, tally_columns, tally_quiet
from segtrust.volumes import bounding_box

_WORST_HD95 = 373.13  # the diagonal of 240 × 240 × 155 voxels of 1 mm, as BraTS sets it
_LESION_DILATIONS = 3
_LEAST_LESION_MM3 = 50

_REST_CHUNK = 1_000_000  # voxels at a time outside the rows, where a model predicts there at all


def voxels(summary, labels, brain, brain_t1, *, spacing_mm, patient, cavity=None, convergence=None):
    """Return the voxels table of a patient, a pyarrow Table with the columns of the public contract.

    summary : `segtrust.moments.Summary` on the patient's own grid: `probability` float32 (3, x, y, z),
        `expected_entropy`, `votes`, `passes`, `volumes` int (T, 3), and `deterministic`, `member_entropy`,
        `variance` or None
    labels : uint8 (x, y, z), canonical
    brain, brain_t1 : bool (x, y, z), any modality, T1 non-zero
    spacing_mm : (3,) voxel size along the axes of the arrays
    patient : for messages
    cavity : bool (x, y, z) or None: voxels that the coding calls a resection cavity (canonical label 0)
    convergence : dict from a smaller number of passes to the Tally after them, to be carried along; or None

    Raises PatientError for shapes that differ and for values out of range or NaN.
    """
    grid = labels.shape
    spacing_mm = tuple(float(side) for side in spacing_mm)
    _check(summary, labels, brain, brain_t1, cavity, patient)
    probability = summary.probability
    predicted = probability >= np.float32(0.5)
    reference = region_masks(labels)
    plausible = probability > np.float32(PLAUSIBLE_ABOVE)

    # everything but the distance to the prediction is known to be empty outside this box
    occupied = brain | brain_t1 | reference[0] | predicted.any(axis=0) | plausible.any(axis=0)
    held = bounding_box(occupied)
    box = tuple(slice(0, size) for size in grid)
    if held is not None:
        margins = [max(BOX_MARGIN_VOXELS, int(np.ceil(DILATION_MM / side)) + 1) for side in spacing_mm]
        box = padded(held, margins, grid)

    distance_predicted = [signed_distance(member, spacing_mm) for member in predicted]
    distance_reference = [signed_distance(member[box], spacing_mm) for member in reference]
    half = np.float32(min(spacing_mm) / 2)
    near_predicted = [within(distance[box] + half, DILATION_MM) for distance in distance_predicted]
    near_reference = [within(distance + half, DILATION_MM) for distance in distance_reference]
    masks = []
    for position in range(3):
        member = {
            "volume": True,
            "brain": brain[box],
            "brain_t1": brain_t1[box],
            "predicted": predicted[position][box],
            "predicted_5mm": predicted[position][box] | near_predicted[position],
            "plausible": plausible[position][box],
            "tumour_5mm": predicted[0][box] | near_predicted[0] | reference[0][box] | near_reference[0],
            "union": predicted[position][box] | reference[position][box],
            "reference": reference[position][box],
            "reference_5mm": reference[position][box] | near_reference[position],
            "boundary_3mm": within(np.abs(distance_predicted[position][box]), BOUNDARY_MM)
            | within(np.abs(distance_reference[position]), BOUNDARY_MM),
        }
        bits = np.zeros(distance_reference[0].shape, np.uint16)
        for mask, where in member.items():
            bits |= where * BIT[mask]
        inner = reference_box(reference[position])
        if inner is not None:
            bits[_relative(inner, box)] |= BIT["box"]
        masks.append(bits)

    chosen = np.zeros(masks[0].shape, bool)
    for member in masks:
        chosen |= member != BIT["volume"]
    place = np.flatnonzero(chosen)
    origin = np.unravel_index(place, chosen.shape)
    index = np.ravel_multi_index([axis + side.start for axis, side in zip(origin, box, strict=True)], grid)
    segmentation = overlay(predicted)

    def rows(array):
        return np.ascontiguousarray(array.reshape(-1)[index])

    def half_rows(array):
        return rows(array).astype(np.float16)

    columns = {
        "index": index.astype(np.uint32),
        "reference": rows(labels),
        "prediction": rows(segmentation),
        "in_brain": rows(brain),
    }
    if cavity is not None:
        columns["reference_code"] = np.where(rows(cavity), np.uint8(4), columns["reference"])
    for position, region in enumerate(REGIONS):
        columns[f"probability_{region}"] = rows(probability[position])
        if summary.deterministic is not None:
            columns[f"deterministic_probability_{region}"] = rows(summary.deterministic[position])
        columns[f"expected_entropy_{region}"] = half_rows(summary.expected_entropy[position])
        if summary.member_entropy is not None:
            columns[f"member_entropy_{region}"] = half_rows(summary.member_entropy[position])
        if summary.variance is not None:
            columns[f"variance_{region}"] = half_rows(summary.variance[position])
        columns[f"distance_predicted_{region}"] = half_rows(distance_predicted[position])
        from_reference = distance_reference[position].reshape(-1)[place]
        columns[f"distance_reference_{region}"] = from_reference.astype(np.float16)
        columns[f"masks_{region}"] = masks[position].reshape(-1)[place]

    rest = np.ones(grid, bool)
    rest.reshape(-1)[index] = False
    metadata = {CASE_KEY: canonical_json(_case(summary, predicted, reference, spacing_mm)).encode()}
    if rest.any():
        tally = _tally_rest(np.flatnonzero(rest), summary, labels, segmentation, distance_predicted, cavity)
        metadata[REST_KEY] = tally.to_text().encode()
    if convergence:
        early = {str(passes): tally.to_text() for passes, tally in convergence.items()}
        metadata[CONVERGENCE_KEY] = canonical_json(early).encode()
    return pa.table(columns).replace_schema_metadata(metadata)


def write_voxels(path, table, provenance):
    """Write a voxels table; a third smaller than by Parquet's own choice of encodings."""
    floating = [field.name for field in table.schema if pa.types.is_floating(field.type)]
    encodings = {"index": "DELTA_BINARY_PACKED", **dict.fromkeys(floating, "BYTE_STREAM_SPLIT")}
    repeating = [name for name in table.column_names if name not in encodings]
    write_parquet(path, table, provenance, use_dictionary=repeating, column_encoding=encodings)


def signed_distance(membership, spacing_mm):
    """Return the signed distance to the boundary of a mask, float32 mm, negative inside.

    From a voxel's centre to the nearest centre of the opposite class, minus half the smallest spacing. NaN
    everywhere when the mask is empty or full.

    membership : bool (x, y, z)
    spacing_mm : (3,)
    """
    inner = bounding_box(membership)
    if inner is None or membership.all():
        return np.full(membership.shape, np.nan, np.float32)
    distance = _distance_to(membership, spacing_mm)
    # the voxels around its box belong to the other class: the inside needs no more than those
    around = padded(inner, (1, 1, 1), membership.shape)
    member = membership[around]
    distance[around] -= _distance_to(~member, spacing_mm)
    half = np.float32(min(spacing_mm) / 2)
    distance -= half
    distance[around][member] += 2 * half
    return distance


def _distance_to(membership, spacing_mm):
    """Return the distance of each voxel to the nearest one of a non-empty mask, float32 mm; 0 inside."""
    return ndimage.distance_transform_edt(~membership, spacing_mm).astype(np.float32)


def _relative(box, outer):
    return tuple(
        slice(side.start - outside.start, side.stop - outside.start) for side, outside in zip(box, outer, strict=True)
    )


def _check(summary, labels, brain, brain_t1, cavity, patient):
    grid = labels.shape
    for name, array in (("brain", brain), ("brain_t1", brain_t1), ("cavity", cavity)):
        if array is not None and (array.shape != grid or array.dtype != bool):
            raise PatientError(f"{patient}: {name} is {array.dtype} {array.shape}, expected bool {grid}")
    if labels.size and labels.max() > 3:
        raise PatientError(f"{patient}: labels reach {labels.max()}, expected canonical labels 0 to 3")
    limits = {"probability": 1, "deterministic": 1, "expected_entropy": 1, "member_entropy": 1, "variance": 0.5}
    for name, high in limits.items():
        values = getattr(summary, name)
        if values is None:
            continue
        if values.shape != (3, *grid):
            raise PatientError(f"{patient}: {name} has shape {values.shape}, expected {(3, *grid)}")
        low, top = float(values.min()), float(values.max())
        if not (low >= 0 and top <= high):  # NaN fails both
            bad = int((~((values >= 0) & (values <= high))).sum())
            raise PatientError(
                f"{patient}: {name} has {bad:,} values outside [0, {high:g}] or NaN (smallest {low:g}, largest {top:g})"
            )


# --- numbers of the case ------------------------------------------------------------------------------------


def _case(summary, predicted, reference, spacing_mm):
    case = {
        "passes": int(summary.passes),
        "spacing_mm": list(spacing_mm),
        "voxel_ml": float(np.prod(spacing_mm)) / 1000,
        "pass_voxels": np.asarray(summary.volumes).tolist(),
        "no_boundary": [bool(not member.any() or member.all()) for member in predicted],
        "pairwise_dice": _pairwise_dice(summary),
    }
    agreements = []
    for region in range(3):
        box = bounding_box(predicted[region] | reference[region]) or ()
        pair = predicted[region][box], reference[region][box]
        agreements.append(
            {**surface_agreement(*pair, spacing_mm), "dice_lesionwise": lesionwise_dice(*pair, spacing_mm)}
        )
    for name in agreements[0]:
        case[name] = [agreement[name] for agreement in agreements]
    return case


def _pairwise_dice(summary):
    """Return the agreement between passes per region, 1 where no pass votes for any voxel; None for T = 1."""
    passes = int(summary.passes)
    if passes < 2:
        return None
    agreement = []
    for votes in summary.votes:
        k = np.bincount(votes.reshape(-1), minlength=passes + 1)
        number = np.arange(len(k))
        total = int((k * number).sum())
        agreement.append(int((k * number * (number - 1)).sum()) / ((passes - 1) * total) if total else 1.0)
    return agreement


def surface_agreement(predicted, reference, spacing_mm):
    """Return `hd95`, `hd95_brats` and `nsd_1mm` of two masks, a dict of floats or None.

    Surfaces are the voxels of a mask with a face neighbour outside it (as MONAI's metrics); distances run
    between voxel centres, mm. `hd95` is the greater of the two directed 95th percentiles, null if a mask is
    empty; `hd95_brats` is then 0 (both empty) or 373.13. `nsd_1mm` is the share of surface voxels within 1 mm of the
    other surface; null if both masks are empty, 0 if one is.

    predicted, reference : bool (x, y, z); spacing_mm : (3,)
    """
    empty = not predicted.any(), not reference.any()
    if any(empty):
        both = all(empty)
        return {"hd95": None, "hd95_brats": 0.0 if both else _WORST_HD95, "nsd_1mm": None if both else 0.0}
    edges = [_surface(member) for member in (predicted, reference)]
    directed = [
        _distance_to(edges[1], spacing_mm)[edges[0]].astype(np.float64),
        _distance_to(edges[0], spacing_mm)[edges[1]].astype(np.float64),
    ]
    hd95 = float(max(np.percentile(distance, 95) for distance in directed))
    near = sum(int(within(distance, 1.0).sum()) for distance in directed)
    return {"hd95": hd95, "hd95_brats": hd95, "nsd_1mm": near / sum(len(distance) for distance in directed)}


def _surface(membership):
    return membership & ~ndimage.binary_erosion(membership)


def lesionwise_dice(predicted, reference, spacing_mm):
    """Return the lesion-wise Dice of BraTS 2023 (adult glioma rule), a float; 1 where both masks are empty.

    Reference lesions are the components of the mask dilated three times (18 neighbours). The prediction's part of a
    lesion is every predicted component that touches its dilation. The Dice of all lesions above 50 mm³ is summed and
    divided by their number plus that of predicted components that touch no lesion. Components have 26 neighbours.

    predicted, reference : bool (x, y, z), cropped or not; spacing_mm : (3,)
    """
    touching = np.ones((3, 3, 3), bool)
    part, n_parts = ndimage.label(predicted, touching)
    dilated, n_lesions = np.zeros(reference.shape, np.int32), 0
    box = bounding_box(reference)
    if box is not None:
        around = padded(box, (_LESION_DILATIONS + 1,) * 3, reference.shape)
        grown = ndimage.binary_dilation(
            reference[around], ndimage.generate_binary_structure(3, 2), iterations=_LESION_DILATIONS
        )
        dilated[around], n_lesions = ndimage.label(grown, touching)
    shape = (n_lesions + 1, n_parts + 1)

    def pairs(lesion):
        both = np.flatnonzero((lesion > 0) & (part > 0))
        key = lesion.reshape(-1)[both] * shape[1] + part.reshape(-1)[both]
        return np.bincount(key, minlength=shape[0] * shape[1]).reshape(shape)

    matched = pairs(dilated) > 0
    lesion = dilated * reference
    size = np.bincount(lesion.reshape(-1), minlength=shape[0])
    part_size = np.bincount(part.reshape(-1), minlength=shape[1])
    overlap = (pairs(lesion) * matched).sum(axis=1)
    counted = (size * np.prod(spacing_mm) > _LEAST_LESION_MM3)[1:]
    lesion_dice = 2 * overlap[1:] / (size[1:] + matched[1:] @ part_size)
    denominator = counted.sum() + (~matched[:, 1:].any(axis=0)).sum()
    return float(lesion_dice[counted].sum() / denominator) if denominator else 1.0


# --- the rest of the volume ---------------------------------------------------------------------------------


def _tally_rest(index, summary, labels, segmentation, distance_predicted, cavity):
    """Return the tally of the voxels that have no row; mask `volume` alone.

    Most of them no model touches: all probabilities and spreads are exactly zero. Those are counted by distance.
    """
    spreads = [summary.expected_entropy, summary.member_entropy, summary.variance]
    active = np.zeros(len(index), bool)
    for source in [summary.probability, summary.deterministic, *spreads]:
        if source is not None:
            for region in source:
                active |= region.reshape(-1)[index] != 0
    if cavity is not None:
        active |= cavity.reshape(-1)[index]
    parts = []
    busy = index[active]
    for start in range(0, len(busy), _REST_CHUNK):
        chunk = busy[start : start + _REST_CHUNK]
        columns = _rest_columns(chunk, summary, labels, segmentation, distance_predicted, cavity)
        parts.append(tally_columns(columns, {}))
    quiet = index[~active]
    if len(quiet):
        distances = [distance.reshape(-1)[quiet].astype(np.float16) for distance in distance_predicted]
        others = summary.deterministic, summary.member_entropy, summary.variance
        parts.append(tally_quiet(distances, *(other is not None for other in others)))
    return pooled(parts)


def _rest_columns(index, summary, labels, segmentation, distance_predicted, cavity):
    def rows(array, dtype):
        return None if array is None else [region.reshape(-1)[index].astype(dtype) for region in array]

    nowhere = np.full(len(index), np.nan, np.float16)
    return Columns(
        labels=labels.reshape(-1)[index],
        prediction=segmentation.reshape(-1)[index],
        cavity=None if cavity is None else cavity.reshape(-1)[index],
        probability=rows(summary.probability, np.float32),
        deterministic=rows(summary.deterministic, np.float32),
        expected_entropy=rows(summary.expected_entropy, np.float16),
        member_entropy=rows(summary.member_entropy, np.float16),
        variance=rows(summary.variance, np.float16),
        distance_predicted=rows(distance_predicted, np.float16),
        distance_reference=[nowhere] * 3,
        masks=[np.full(len(index), BIT["volume"], np.uint16)] * 3,
    )
