"""Slices of a few patients: the scan with contours, and the entropy of each region."""

import re

import matplotlib as mpl
import nibabel as nib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure

from segtrust.colours import ENTROPY_SHOWN_FROM, REGION_COLOURS
from segtrust.files import replacing
from segtrust.numerals import number
from segtrust.preprocess import MODALITIES, read_preprocessed
from segtrust.regions import REGIONS, region_masks
from segtrust.volumes import read_reference

# an id that can be part of a file's name
PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")

_STYLE = {"font.family": "DejaVu Sans", "font.size": 9}


def save_slice(figure, path):
    """Write a picture of a scan as PNG, without a date inside."""
    with mpl.rc_context(_STYLE), replacing(path) as partial:
        figure.savefig(partial, metadata={"Software": None}, facecolor=figure.get_facecolor(), dpi=160)


def scan_panel(scan, segmentation, reference, spacing_mm, title):
    """Draw a slice of the scan with contours of all regions: predicted solid, reference dashed.

    scan : float (columns, rows), a canonical axial slice
    segmentation : bool (3, columns, rows), order of `REGIONS`
    reference : the same, or None
    spacing_mm : (2,), voxel size along columns and rows
    """
    with mpl.rc_context(_STYLE):
        figure, axes = _slice(scan, spacing_mm, title)
        for index, region in enumerate(REGIONS):
            colour = REGION_COLOURS[region]
            _contour(axes, segmentation[index], colour, "solid", 1.3)
            if reference is not None:
                _contour(axes, reference[index], colour, "dashed", 1.1)
    return figure


def entropy_panel(scan, entropy, segmentation, reference, spacing_mm, region):
    """Draw the entropy of one region over a slice of the scan, with a colour bar in bits.

    scan, entropy : float (columns, rows); entropy in [0, 1] bits
    segmentation, reference : bool (columns, rows); reference may be None
    """
    with mpl.rc_context(_STYLE):
        figure, axes = _slice(scan, spacing_mm, f"entropy {region}")
        colours = ListedColormap(mpl.colormaps["viridis"](np.linspace(0.15, 1, 256)))
        shown = np.ma.masked_less(_radiological(entropy), ENTROPY_SHOWN_FROM)
        image = axes.imshow(shown, cmap=colours, norm=Normalize(ENTROPY_SHOWN_FROM, 1), alpha=0.85)
        image.set_extent(axes.images[0].get_extent())
        _contour(axes, segmentation, REGION_COLOURS[region], "solid", 1.8)
        if reference is not None:
            _contour(axes, reference, "#ffffff", "dashed", 0.9)
        below = axes.get_position().y0
        bar_axes = figure.add_axes([0.1, 0.62 * below, 0.8, 0.2 * below])
        bar = figure.colorbar(image, cax=bar_axes, orientation="horizontal")
        bar.set_ticks([ENTROPY_SHOWN_FROM, 0.5, 1], labels=[f"{ENTROPY_SHOWN_FROM:g}", "0.5", "1 bit"])
        bar.ax.minorticks_off()
        bar.ax.tick_params(colors="#e8eaed", labelsize=7.5, length=2)
        bar.outline.set_visible(False)
    return figure


def _slice(scan, spacing_mm, title):
    """Return (figure, axes) with a slice in radiological view: the patient's right is on the left, anterior on top."""
    width, height = (size * step for size, step in zip(scan.shape, spacing_mm, strict=True))
    # inches: three wide, a strip above for the title and one below for a colour bar, so that all panels line up
    above, below, picture = 0.28, 0.36, 3 * height / width
    total = above + picture + below
    figure = Figure(figsize=(3, total), facecolor="#000000")
    FigureCanvasAgg(figure)
    axes = figure.add_axes([0, below / total, 1, picture / total])
    tissue = scan[scan != 0]
    low, high = np.percentile(tissue, (1, 99.5)) if tissue.size else (0, 1)
    grey = np.where(scan != 0, np.clip((scan - low) / max(high - low, 1e-6), 0, 1), 0)
    axes.imshow(_radiological(grey), cmap="gray", vmin=0, vmax=1, extent=(0, width, height, 0))
    axes.set_axis_off()
    letters = {"color": "#c9d1d9", "fontsize": 9, "transform": axes.transAxes, "va": "center"}
    axes.text(0.01, 0.5, "R", ha="left", **letters)
    axes.text(0.99, 0.5, "L", ha="right", **letters)
    axes.set_title(title, color="#e8eaed", fontsize=9.5, pad=4)
    return figure, axes


def _radiological(plane):
    return np.asarray(plane).T[::-1, ::-1]


def _contour(axes, membership, colour, linestyle, linewidth):
    """Draw the outline of a membership; nothing where it is empty or full."""
    if not np.any(membership) or np.all(membership):
        return
    left, right, bottom, top = axes.images[0].get_extent()
    plane = np.pad(_radiological(membership).astype(np.float32), 1)
    rows, columns = np.array(plane.shape) - 2
    x = left + (np.arange(-1, columns + 1) + 0.5) * (right - left) / columns
    y = top + (np.arange(-1, rows + 1) + 0.5) * (bottom - top) / rows
    axes.contour(x, y, plane, levels=[0.5], colors=[colour], linestyles=linestyle, linewidths=linewidth)
    axes.set_xlim(left, right)
    axes.set_ylim(bottom, top)


def showcase(patients, mapped):
    """Choose the patients whose slices are shown.

    patients : table of patients with `patient`, `region`, `dice`; None without any reference
    mapped : ids of the patients with maps

    Returns [(caption, patient)]: the best, the median (the lower of two) and the worst by mean Dice over the regions,
    ties by id; without references the first three ids. Nobody appears twice.
    """
    if patients is None:
        return [("no reference", patient) for patient in sorted(mapped)[:3]]
    means = patients[patients["patient"].isin(mapped)].groupby("patient")["dice"].mean().dropna()
    ranked = sorted(means.items(), key=lambda item: (item[1], item[0]))
    if not ranked:
        return []
    if len(ranked) == 1:
        chosen = {"the only patient": 0}
    elif len(ranked) == 2:
        chosen = {"best": 1, "worst": 0}
    else:
        chosen = {"best": -1, "median": (len(ranked) - 1) // 2, "worst": 0}
    return [(f"{name}, mean Dice {number(ranked[place][1], 2)}", ranked[place][0]) for name, place in chosen.items()]


def write_slices(run, results, folder, background, sheet, pages):
    """Write slices of the best, the median and the worst patient of a model; return what the template says of them.

    run : `segtrust.report.ModelFiles`; results, folder : Paths of all results and of the report
    background : modality under the contours; sheet : list of Patient; pages : {patient: address of its page}
    """
    people = {person.patient: person for person in sheet}
    shown = []
    for caption, patient in showcase(run.patients, [patient for patient in run.mapped if patient in people]):
        entry = {"caption": caption, "patient": patient, "page": pages.get(patient), "panels": [], "problem": ""}
        shown.append(entry)
        if not PATTERN.fullmatch(patient):
            entry["problem"] = "This id cannot be part of a file name, so no slice is drawn."
            continue
        maps = {
            name: results / run.name / "maps" / f"{patient}_{name}.nii.gz"
            for name in ("segmentation", "entropy", "probability")
        }
        scan = results / "preprocessed" / f"{patient}.safetensors"
        absent = [path.name for path in (*maps.values(), scan) if not path.exists()]
        if absent:
            entry["problem"] = f"No slice is drawn: {', '.join(absent)} was not made in this run."
            continue
        entry.update(_draw_slices(run.name, people[patient], maps, scan, folder, background))
    return shown


def _draw_slices(model, person, maps, scan, folder, background):
    """Write the panels of one patient, and return what the template says about them."""
    preprocessed, _ = read_preprocessed(scan)
    geometry = preprocessed.geometry
    box = (..., *preprocessed.box)
    probability, entropy = (
        geometry.to_canonical(np.moveaxis(np.asanyarray(nib.load(maps[name]).dataobj), -1, 0))[box]
        for name in ("probability", "entropy")
    )
    predicted = probability >= 0.5
    reference = None
    if person.seg:
        labels = read_reference(person.seg, person.coding, person.patient, geometry).labels
        reference = region_masks(geometry.to_canonical(labels)[box])
    level = busiest_slice(predicted[0] if reference is None else predicted[0] | reference[0])
    spacing = np.abs(np.diag(geometry.canonical_affine)[:2])
    image = preprocessed.image[MODALITIES.index(background)][..., level]
    drawn = {"scan": scan_panel(image, predicted[..., level], _at(reference, level), spacing, background)}
    for index, region in enumerate(REGIONS):
        known = None if reference is None else reference[index, ..., level]
        drawn[f"entropy_{region}"] = entropy_panel(
            image, entropy[index, ..., level], predicted[index, ..., level], known, spacing, region
        )
    panels = []
    for name, figure in drawn.items():
        path = f"figures/{model}_slice_{person.patient}_{name}.png"
        save_slice(figure, folder / path)
        panels.append({"name": name, "path": path})
    return {"panels": panels, "has_reference": reference is not None, "level": level + preprocessed.start[2]}


def _at(volume, level):
    return None if volume is None else volume[..., level]


def busiest_slice(membership):
    """Return the axial slice with most voxels of a membership (x, y, z), the middle one when there are none."""
    voxels = membership.sum(axis=(0, 1))
    return int(voxels.argmax()) if voxels.any() else membership.shape[2] // 2
