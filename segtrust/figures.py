"""Charts of the report: each function takes tables or arrays and returns a matplotlib Figure.

A region has one colour and one marker everywhere. The colours differ by at least 30 CIELAB units from one another
under simulated protanopia, deuteranopia and tritanopia, and stand out from white and from near-black paper alike.
"""

import re
from io import StringIO

import matplotlib as mpl
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, NullLocator

from segtrust.colours import ENTROPY_SHOWN_FROM, REGION_COLOURS
from segtrust.files import replacing
from segtrust.regions import REGIONS

REGION_MARKERS = dict(zip(REGIONS, ("o", "s", "^"), strict=True))

# an axis shows at least this much of [0, 1]: a smaller change over passes means nothing
LEAST_SPAN = 0.05

# paper and ink of a chart, and what takes their place on a dark page; no other part of a chart has these colours
PAPER, INK, MUTED, GRID = "#ffffff", "#1b1f24", "#5b6470", "#e1e5ea"
DARK = {PAPER: "#1b1f26", INK: "#e8eaed", MUTED: "#a3acb7", GRID: "#343b45"}

_STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.major.size": 3,
    "ytick.major.size": 3,
    "svg.hashsalt": "segtrust",  # the same tables give the same bytes
    "svg.fonttype": "path",
}


def save_chart(figure, folder, name):
    """Write a chart as `name.svg` for light and `name_dark.svg` for dark pages; the same chart gives the same bytes."""
    text = StringIO()
    with mpl.rc_context(_STYLE):
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None}, facecolor=PAPER)
    light = text.getvalue()
    for ending, svg in ((".svg", light), ("_dark.svg", darkened(light))):
        with replacing(folder / f"{name}{ending}") as partial:
            partial.write_text(svg, encoding="utf-8")


def darkened(svg):
    """Return the text of an SVG with paper and ink exchanged for those of a dark page."""
    return re.sub("|".join(DARK), lambda match: DARK[match[0]], svg)


def save_slice(figure, path):
    """Write a picture of a scan as PNG, without a date inside."""
    with mpl.rc_context(_STYLE), replacing(path) as partial:
        figure.savefig(partial, metadata={"Software": None}, facecolor=figure.get_facecolor(), dpi=160)


def reliability(curves, region, kind, n_bins):
    """Draw a reliability diagram above the number of voxels in each bin.

    curves : dict of mask name to (x, y, low, high, n), arrays over the non-empty bins: mean probability, fraction,
        bootstrap band of the fraction (NaN where there is none) and voxels. The first mask is drawn solid, a second
        one dashed.
    region : WT, TC or ET
    kind : `class_probability` or `top_label`
    n_bins : number of equal-width bins on [0, 1]
    """
    top_label = kind == "top_label"
    with mpl.rc_context(_STYLE):
        figure = _figure((3.5, 4.5), left=0.19, right=0.965, bottom=0.1, top=0.93, hspace=0.09)
        diagram, counts = figure.subplots(2, 1, sharex=True, height_ratios=(3.4, 1))
        for axes in (diagram, counts):
            _dress(axes)
        diagram.plot([0, 1], [0, 1], color=MUTED, linewidth=0.9, linestyle=(0, (1, 2)))
        for (mask, (x, y, low, high, n)), dashed in zip(curves.items(), (False, True), strict=False):
            _draw_reliability(diagram, x, y, low, high, region, mask, dashed)
            _draw_counts(counts, x, n, n_bins, region, dashed)
        too_high, too_low = ("over-confident", "under-confident") if top_label else ("probability too high", "too low")
        note = {"fontsize": 7.5, "color": MUTED, "transform": diagram.transAxes}
        diagram.text(0.97, 0.04, too_high, ha="right", va="bottom", **note)
        diagram.text(0.03, 0.97, too_low, ha="left", va="top", **note)
        diagram.set_xlim(0.5 if top_label else 0, 1)
        diagram.set_ylim(0, 1)
        diagram.set_title(region, loc="left", color=REGION_COLOURS[region], fontweight="bold", fontsize=11, pad=9)
        diagram.set_ylabel("fraction of voxels correct" if top_label else "fraction of voxels in reference")
        counts.set_xlabel("mean confidence of the bin" if top_label else "mean probability of the bin")
        counts.set_ylabel("voxels")
        counts.set_yscale("log")
        counts.yaxis.set_major_locator(LogLocator(numticks=4))
        counts.yaxis.set_major_formatter(EngFormatter(sep=""))
        counts.yaxis.set_minor_locator(NullLocator())
        diagram.legend(
            loc="lower right",
            bbox_to_anchor=(1.01, 1.02),
            ncols=2,
            frameon=False,
            fontsize=7.5,
            labelcolor=INK,
            handlelength=2.4,
            columnspacing=1.2,
            borderaxespad=0,
        )
        for axes in (diagram, counts):
            axes.yaxis.set_label_coords(-0.15, 0.5)
    return figure


def _draw_reliability(axes, x, y, low, high, region, mask, dashed):
    colour = REGION_COLOURS[region]
    if not dashed:
        axes.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)
    axes.plot(
        x,
        y,
        color=colour,
        marker=REGION_MARKERS[region],
        markersize=3.5 if dashed else 4.5,
        markerfacecolor="none" if dashed else colour,
        linewidth=1 if dashed else 1.6,
        linestyle="--" if dashed else "-",
        label=mask,
        clip_on=False,
        zorder=3,
    )


def _draw_counts(axes, x, n, n_bins, region, dashed):
    bins = np.clip(np.floor(np.asarray(x) * n_bins), 0, n_bins - 1)
    colour = REGION_COLOURS[region]
    look = (
        {"fill": False, "edgecolor": colour, "linestyle": "--", "linewidth": 0.9}
        if dashed
        else {"color": colour, "alpha": 0.75, "linewidth": 0}
    )
    axes.bar((bins + 0.5) / n_bins, n, width=0.86 / n_bins, **look)


def strata(groups, region):
    """Draw every patient's Dice by stratum of uncertainty, with the median and its interval.

    groups : list of dicts in the order of the axis: `label`, `dice` (array), `median`, `low`, `high` (NaN where
        there is none) and `apart` (True for patients without a score)
    region : WT, TC or ET
    """
    colour = REGION_COLOURS[region]
    with mpl.rc_context(_STYLE):
        figure = _figure((3.5, 3.3), left=0.19, right=0.965, bottom=0.15, top=0.9)
        axes = figure.subplots()
        _dress(axes)
        for position, group in enumerate(groups):
            axes.scatter(
                position + _spread(group["dice"]),
                group["dice"],
                s=15,
                marker=REGION_MARKERS[region],
                facecolor="none" if group["apart"] else colour,
                edgecolor=colour,
                linewidth=0.8,
                alpha=0.55,
                clip_on=False,
            )
            if np.isfinite(group["median"]):
                axes.hlines(group["median"], position - 0.3, position + 0.3, color=INK, linewidth=2, zorder=4)
            if np.isfinite(group["low"]) and np.isfinite(group["high"]):
                axes.vlines(position, group["low"], group["high"], color=INK, linewidth=1.2, zorder=4)
        apart = [position for position, group in enumerate(groups) if group["apart"]]
        if apart and apart[0] > 0:
            axes.axvline(apart[0] - 0.5, color=MUTED, linewidth=0.8, linestyle=(0, (1, 2)))
        labels = [f"{group['label']}\nn = {len(group['dice'])}" for group in groups]
        axes.set_xticks(range(len(groups)), labels, fontsize=8)
        axes.set_xlim(-0.55, len(groups) - 0.45)
        axes.set_ylim(0, 1)
        axes.set_ylabel("Dice of the patient")
        axes.set_title(region, loc="left", color=colour, fontweight="bold", fontsize=11, pad=9)
    return figure


def _spread(values):
    """Return sideways offsets in [-0.28, 0.28] that keep close points apart; the same for the same values."""
    golden = 0.6180339887498949
    order = np.argsort(np.argsort(values, kind="stable"), kind="stable")
    return ((order * golden + 0.5) % 1 - 0.5) * 0.56


def convergence(points, title, mask, from_zero):
    """Draw a metric against the number of passes, with intervals.

    points : dict from region to a table with `passes` (ascending), `value`, `low`, `high` (NaN where there is none)
    title : of the metric
    mask : the voxels that count
    from_zero : whether the axis begins at 0, as for an error
    """
    with mpl.rc_context(_STYLE):
        figure = _figure((3.5, 2.9), left=0.19, right=0.965, bottom=0.165, top=0.81)
        axes = figure.subplots()
        _dress(axes)
        passes = np.unique(np.concatenate([table["passes"] for table in points.values()]))
        ratios = passes[1:] / passes[:-1]
        # intervals of regions stand beside each other, well within the distance of two numbers of passes
        step = min(1.05, ratios.min() ** 0.25)
        for place, (region, table) in enumerate(points.items()):
            x = table["passes"].to_numpy(float) * step ** (place - (len(points) - 1) / 2)
            y, low, high = (table[name].to_numpy(float) for name in ("value", "low", "high"))
            colour = REGION_COLOURS[region]
            axes.vlines(x, low, high, color=colour, linewidth=1.1, alpha=0.7)
            look = {"marker": REGION_MARKERS[region], "markersize": 4.5, "linewidth": 1.4}
            axes.plot(x, y, color=colour, label=region, clip_on=False, zorder=3, **look)
        axes.set_xscale("log")
        # a label so close to the next that the two would touch is left out
        apart = np.append(ratios > 1.15, True)
        axes.set_xticks(passes, np.where(apart, passes.astype(int).astype(str), ""))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlim(passes[0] / 1.2, passes[-1] * 1.2)
        axes.set_ylim(*_limits(points.values(), from_zero))
        axes.set_xlabel("passes")
        axes.set_ylabel(f"on {mask}")
        axes.yaxis.set_label_coords(-0.15, 0.5)
        axes.set_title(title, loc="left", color=INK, fontweight="bold", fontsize=10, pad=22)
        axes.legend(
            loc="lower left",
            bbox_to_anchor=(-0.01, 1.0),
            ncols=3,
            frameon=False,
            fontsize=8,
            labelcolor=INK,
            handlelength=1.8,
            columnspacing=1.4,
            borderaxespad=0.2,
        )
    return figure


def _limits(tables, from_zero):
    """Return the ends of an axis that holds values and intervals in [0, 1], and does not blow up small differences."""
    held = np.concatenate([table[["value", "low", "high"]].to_numpy(float).ravel() for table in tables])
    low, high = (0, np.nanmax(held)) if from_zero else (np.nanmin(held), np.nanmax(held))
    span = max(high - low, LEAST_SPAN)
    middle = (low + high) / 2
    low, high = (0, 1.08 * span) if from_zero else (middle - 0.58 * span, middle + 0.58 * span)
    beyond = max(high - 1, 0)
    return max(low - beyond, 0), high - beyond


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


def _figure(size_inches, **margins):
    """Return an empty chart; its margins are fixed, so that neighbouring charts line up."""
    figure = Figure(figsize=size_inches, facecolor=PAPER)
    FigureCanvasAgg(figure)
    figure.subplots_adjust(**margins)
    return figure


def _dress(axes):
    axes.set_facecolor(PAPER)
    axes.grid(color=GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(colors=MUTED, labelcolor=INK)
    for spine in axes.spines.values():
        spine.set_color(MUTED)
    axes.xaxis.label.set_color(INK)
    axes.yaxis.label.set_color(INK)
