"""Charts of the report, in Altair: each function takes a table and returns a chart, for pages and papers alike.

A region has one colour everywhere. Colours of paper, ink and lines are names of the page's style sheet (`PAPER`, …), so
that one chart suits light and dark pages; `segtrust.drawing` puts colours in their place for papers. Where a table has
several masks, the parameter `mask` chooses one. Points of patients carry `href`, the patient's page.
"""

from itertools import pairwise

import altair as alt
import numpy as np

from segtrust.colours import REGION_COLOURS
from segtrust.regions import REGIONS

PAPER, INK, MUTED, LINE = "var(--paper)", "var(--ink)", "var(--muted)", "var(--line)"
WIDTH, HEIGHT = 262, 230
COUNTS_HEIGHT = 58
# an axis shows at least this much of [0, 1]: a smaller change over passes means nothing
LEAST_SPAN = 0.05

SOLID, DASHED, DOTTED, DASH_DOTTED = [1, 0], [6, 3], [2, 2], [7, 2, 2, 2]
# how a measure is drawn: those of the passes in the region's colour, baselines in grey
LOOKS = {
    "entropy": ("region", SOLID),
    "mutual_information": ("region", DASHED),
    "variance": ("region", DOTTED),
    "deterministic_entropy": (MUTED, SOLID),
    "boundary_proximity": (MUTED, DASHED),
    "predicted_volume": (MUTED, DOTTED),
}
BANDS_IN_ORDER = {
    "outside_over_10mm": "> 10",
    "outside_5_10mm": "5–10",
    "outside_3_5mm": "3–5",
    "outside_2_3mm": "2–3",
    "outside_1_2mm": "1–2",
    "outside_0_1mm": "0–1",
    "inside_0_1mm": "0–1 in",
    "inside_1_2mm": "1–2 in",
    "inside_2_3mm": "2–3 in",
    "inside_3_5mm": "3–5 in",
    "inside_5_10mm": "5–10 in",
    "inside_over_10mm": "> 10 in",
}

_CONFIG = {
    "font": "Liberation Sans, Arial, Helvetica, sans-serif",
    "background": PAPER,
    "padding": 6,
    "view": {"stroke": None},
    "axis": {
        "domainColor": MUTED,
        "tickColor": MUTED,
        "gridColor": LINE,
        "labelColor": INK,
        "titleColor": INK,
        "labelFontSize": 10.5,
        "titleFontSize": 11,
        "titleFontWeight": "normal",
        "labelOverlap": True,
    },
    "axisY": {"minExtent": 34, "maxExtent": 34},
    "legend": {
        "orient": "top",
        "title": None,
        "labelColor": INK,
        "labelFontSize": 10.5,
        "labelLimit": 0,
        "symbolStrokeWidth": 2,
        "symbolSize": 120,
        "offset": 6,
        "rowPadding": 2,
        "columnPadding": 10,
    },
    "title": {"anchor": "start", "fontSize": 13, "offset": 8},
    "line": {"strokeWidth": 1.8},
    "point": {"filled": True, "size": 34},
}


def _values(table):
    """Return a table as Altair takes it: as CSV, a quarter of what JSON takes; numbers with five digits."""
    table = table.astype({name: int for name in table.columns if table[name].dtype == bool})
    kinds = {"i": "number", "u": "number", "f": "number"}
    parse = {name: kinds.get(table[name].dtype.kind, "string") for name in table.columns}
    text = table.to_csv(index=False, float_format="%.5g", lineterminator="\n")
    return alt.InlineData(values=text, format=alt.CsvDataFormat(type="csv", parse=parse))


def _finished(chart, title):
    return chart.properties(title=alt.TitleParams(title, color=INK)).configure(**_CONFIG)


def _of_region(chart, region):
    """Return a chart of the usual size under the name of a region."""
    return _finished(chart.properties(width=WIDTH, height=HEIGHT), region)


def _axis(channel, title, domain, **axis):
    """Return the encoding of the column `x` or `y`, over a domain."""
    name = "x:Q" if channel is alt.X else "y:Q"
    return channel(name, title=title, scale=alt.Scale(domain=list(domain)), axis=alt.Axis(**axis))


def _ranges(base, axis):
    """Return where intervals are drawn: a chart from `low` to `high` on the axis (alt.Y) of a value, without nulls."""
    low = axis.copy()
    low.shorthand = "low:Q"
    return base.transform_filter("isValid(datum.low)").encode(y=low, y2="high:Q")


def _number(name, title, form=".3f"):
    return alt.Tooltip(f"{name}:Q", title=title, format=form)


def _mask(table):
    """Return the parameter that chooses one of the masks of a table; the first is drawn in papers."""
    return alt.param(name="mask", value=str(table["mask"].iloc[0]))


def _by_measure(table, region):
    """Return colour and dash by measure, of the measures that a table has, with one legend."""
    measures = [name for name in LOOKS if name in set(table["measure"])]
    colours = [REGION_COLOURS[region] if LOOKS[name][0] == "region" else LOOKS[name][0] for name in measures]
    dashes = [LOOKS[name][1] for name in measures]
    legend = alt.Legend(columns=2, symbolType="stroke")
    return {
        "color": alt.Color("measure:N", scale=alt.Scale(domain=measures, range=colours), legend=legend),
        "strokeDash": alt.StrokeDash("measure:N", scale=alt.Scale(domain=measures, range=dashes), legend=legend),
        "strokeWidth": alt.condition("datum.measure == 'entropy'", alt.value(2.4), alt.value(1.4)),
    }


def _reference_line(points):
    """Return a thin dotted line through points, a list of (x, y)."""
    values = [{"x": x, "y": y} for x, y in points]
    look = {"color": MUTED, "strokeDash": DOTTED, "strokeWidth": 1}
    return alt.Chart(alt.Data(values=values)).mark_line(**look).encode(x="x:Q", y="y:Q")


def _note(x, y, text, align):
    """Return small words inside a chart; align : left or right."""
    chart = alt.Chart(alt.Data(values=[{"x": x, "y": y, "text": text}]))
    shift = 4 if align == "left" else -4
    return chart.mark_text(color=MUTED, fontSize=9.5, align=align, dx=shift).encode(x="x:Q", y="y:Q", text="text:N")


def reliability(points, region, kind, n_bins):
    """Draw a reliability diagram above the number of voxels in each bin; `brain` is dashed beside the mask chosen.

    points : DataFrame with `mask`, `x`, `y`, `low`, `high` (NaN where there is no band), `n`: the non-empty bins
    kind : `class_probability` or `top_label`; n_bins : equal-width bins on [0, 1]
    """
    top_label = kind == "top_label"
    first, colour = (0.5 if top_label else 0), REGION_COLOURS[region]
    place = np.clip(np.floor(points["x"] * n_bins), 0, n_bins - 1)
    table = points.assign(bin=place / n_bins, end=(place + 1) / n_bins)
    base = (
        alt.Chart(_values(table))
        .transform_filter("datum.mask == mask || datum.mask == 'brain'")
        .transform_calculate(role="datum.mask == mask ? 'chosen' : 'brain'")
    )
    chosen = base.transform_filter("datum.role == 'chosen'")
    scale = alt.Scale(domain=["chosen", "brain"], range=[SOLID, DASHED])
    named = alt.Legend(symbolType="stroke", labelExpr="datum.label == 'chosen' ? mask : 'brain'", columns=2)
    means = "mean confidence of the bin" if top_label else "mean probability of the bin"
    x = _axis(alt.X, None, (first, 1), labels=False, ticks=False)
    y = _axis(alt.Y, "fraction of voxels correct" if top_label else "fraction of voxels in reference", (0, 1))
    tooltip = [
        alt.Tooltip("mask:N"),
        _number("x", means),
        _number("y", "fraction"),
        _number("low", "band from"),
        _number("high", "to"),
        _number("n", "voxels", ","),
    ]
    filled = alt.condition("datum.role == 'chosen'", alt.value(0.55), alt.value(0))
    size = alt.condition("datum.role == 'chosen'", alt.value(38), alt.value(20))
    diagram = alt.layer(
        _reference_line([(first, first), (1, 1)]).encode(x=x, y=y),
        _ranges(chosen, y).mark_area(color=colour, opacity=0.2).encode(x=x),
        base.mark_line(color=colour).encode(x=x, y=y, strokeDash=alt.StrokeDash("role:N", scale=scale, legend=named)),
        base.mark_point(color=colour, opacity=1).encode(x=x, y=y, tooltip=tooltip, size=size),
        _note(1, 0.03, "over-confident" if top_label else "probability too high", "right"),
        _note(first, 0.97, "under-confident" if top_label else "too low", "left"),
    ).properties(width=WIDTH, height=HEIGHT)
    counts = base.mark_bar(color=colour, stroke=colour, clip=True).encode(
        x=alt.X("bin:Q", title=means, scale=alt.Scale(domain=[first, 1]), axis=alt.Axis(tickCount=5)),
        x2="end:Q",
        y=alt.Y("n:Q", title="voxels", scale=alt.Scale(type="log"), axis=alt.Axis(tickCount=3, format="~s")),
        y2=alt.value(COUNTS_HEIGHT),
        fillOpacity=filled,
        tooltip=tooltip,
    )
    both = alt.vconcat(diagram, counts.properties(width=WIDTH, height=COUNTS_HEIGHT), spacing=6)
    return _finished(both.add_params(_mask(table)), region)


def roc(points, region):
    """Draw how many wrong voxels are found against how many correct ones are flagged, by measure.

    points : DataFrame with `mask`, `measure` (of `LOOKS`), `x`, `y`, and `auroc` of the whole curve
    """
    return _ranking(
        points, region, "correct voxels flagged", "wrong voxels flagged", "auroc", "AUROC", [(0, 0), (1, 1)]
    )


def precision_recall(points, region):
    """Draw how many of the flagged voxels are wrong against how many wrong voxels are flagged, by measure.

    points : DataFrame with `mask`, `measure` (of `LOOKS`), `x`, `y`, and of the whole curve `aupr` and `error_rate`
    """
    return _ranking(points, region, "wrong voxels flagged", "flagged voxels that are wrong", "aupr", "AUPR", None)


def _ranking(points, region, x_title, y_title, metric, name, reference):
    base = alt.Chart(_values(points)).transform_filter("datum.mask == mask")
    x, y = _axis(alt.X, x_title, (0, 1)), _axis(alt.Y, y_title, (0, 1))
    tooltip = [alt.Tooltip("measure:N"), alt.Tooltip("mask:N"), _number(metric, name), _number("x", x_title)]
    tooltip += [_number("y", y_title)]
    lines = base.mark_line().encode(x=x, y=y, order="point:Q", **_by_measure(points, region))
    # what the pointer meets: wider than the line that is seen
    found = base.mark_line(strokeWidth=9, opacity=0.001).encode(
        x=x, y=y, order="point:Q", detail="measure:N", tooltip=tooltip[:3]
    )
    if reference:
        below = _reference_line(reference).encode(x=x, y=y)
    else:
        rate = base.transform_aggregate(y="max(error_rate)")
        below = rate.mark_rule(color=MUTED, strokeDash=DOTTED, strokeWidth=1).encode(
            y=y, tooltip=[_number("y", "error rate", ".3g")]
        )
    return _of_region(alt.layer(below, lines, found).add_params(_mask(points)), region)


def distribution(points, region):
    """Draw how entropy is distributed over wrong and over correct voxels.

    points : DataFrame with `mask`, `outcome` (wrong, correct), `low`, `high` (of the bin, bits), `y` (share), `n`
    """
    base = alt.Chart(_values(points[points["y"] > 0])).transform_filter("datum.mask == mask")
    colour = alt.Color(
        "outcome:N",
        scale=alt.Scale(domain=["wrong", "correct"], range=[REGION_COLOURS[region], MUTED]),
        legend=alt.Legend(columns=2, symbolType="square"),
    )
    tooltip = [alt.Tooltip("outcome:N"), alt.Tooltip("mask:N"), _number("low", "from"), _number("high", "to")]
    tooltip += [_number("y", "share", ".3g"), _number("n", "voxels", ",")]
    bars = base.mark_bar(opacity=0.45, binSpacing=0).encode(
        x=alt.X("low:Q", title="entropy, bits", scale=alt.Scale(domain=[0, 1])),
        x2="high:Q",
        y=alt.Y(
            "y:Q",
            title="share of the voxels",
            scale=alt.Scale(type="log", domain=[1e-4, 1], clamp=True),
            axis=alt.Axis(values=[1e-4, 1e-3, 0.01, 0.1, 1], format="~g"),
        ),
        y2=alt.value(HEIGHT),
        color=colour,
        tooltip=tooltip,
    )
    return _of_region(bars.add_params(_mask(points)), region)


def distances(points, region):
    """Draw error rate and mean entropy by distance to the surface of the reference.

    points : DataFrame with `band` (of `BANDS_IN_ORDER`), `quantity` (error rate, mean entropy), `y`, `low`, `high`, `n`
    """
    table = points.assign(place=points["band"].map(BANDS_IN_ORDER))
    order = [name for name in BANDS_IN_ORDER.values() if name in set(table["place"])]
    quantities = ["error rate", "mean entropy, bits"]
    legend = alt.Legend(columns=2, symbolType="stroke")
    base = alt.Chart(_values(table)).encode(
        x=alt.X(
            "place:N",
            sort=order,
            title="distance to the reference’s surface, mm",
            axis=alt.Axis(labelAngle=-45, labelOverlap=False),
        ),
        color=alt.Color(
            "quantity:N", scale=alt.Scale(domain=quantities, range=[REGION_COLOURS[region], MUTED]), legend=legend
        ),
        strokeDash=alt.StrokeDash(
            "quantity:N", scale=alt.Scale(domain=quantities, range=[SOLID, DASHED]), legend=legend
        ),
    )
    y = _axis(alt.Y, "per voxel", (0, 1))
    tooltip = [
        alt.Tooltip("quantity:N"),
        alt.Tooltip("place:N", title="mm"),
        _number("y", "value"),
        _number("n", "voxels", ","),
    ]
    lines = base.mark_line().encode(y=y)
    ranges = _ranges(base, y).mark_rule(opacity=0.6, strokeDash=SOLID)
    dots = base.mark_point(opacity=1).encode(y=y, tooltip=tooltip)
    return _of_region(alt.layer(lines, ranges, dots), region)


def retention(points, region):
    """Draw mean Dice against the fraction of voxels that are replaced by the reference, most uncertain first.

    points : DataFrame with `measure` (of `LOOKS`), `x`, `y`, `low`, `high`
    """
    base = alt.Chart(_values(points))
    x, y = (
        _axis(alt.X, "fraction of the brain replaced by the reference", (0, 1)),
        _axis(alt.Y, "mean Dice", (0, 1)),
    )
    entropy = base.transform_filter("datum.measure == 'entropy'")
    tooltip = [alt.Tooltip("measure:N"), _number("x", "replaced"), _number("y", "mean Dice")]
    band = _ranges(entropy, y).mark_area(color=REGION_COLOURS[region], opacity=0.15, clip=True).encode(x=x)
    lines = base.mark_line(clip=True).encode(x=x, y=y, tooltip=tooltip, **_by_measure(points, region))
    return _of_region(alt.layer(band, lines), region)


def risk_coverage(points, region):
    """Draw the mean risk, 1 − Dice, of the patients kept, the most certain first.

    points : DataFrame with `measure` (of `LOOKS`), `x` (coverage), `y` (risk), `n` (patients)
    """
    base = alt.Chart(_values(points))
    highest = min(1, float(np.ceil(points["y"].max() * 10) / 10) or 0.1)
    x, y = _axis(alt.X, "share of patients kept", (0, 1)), _axis(alt.Y, "mean risk, 1 − Dice", (0, highest))
    tooltip = [alt.Tooltip("measure:N"), _number("n", "patients", ","), _number("y", "mean risk")]
    whole = float(points.sort_values("x")["y"].iloc[-1])
    lines = base.mark_line(point=alt.OverlayMarkDef(size=20), interpolate="linear").encode(
        x=x, y=y, tooltip=tooltip, **_by_measure(points, region)
    )
    return _of_region(alt.layer(_reference_line([(0, whole), (1, whole)]).encode(x=x, y=y), lines), region)


def strata(patients, medians, region):
    """Draw every patient's Dice by stratum of uncertainty, with the median and its interval.

    patients : DataFrame with `stratum`, `patient`, `y` (Dice), `apart` (whether it has no score), `href`
    medians : DataFrame with `stratum`, `y`, `low`, `high` (NaN where there is none), `n`, in the order of the axis
    """
    colour, order = REGION_COLOURS[region], medians["stratum"].tolist()
    counts = dict(zip(medians["stratum"], medians["n"], strict=True))
    labels = alt.Axis(labelAngle=0, labelExpr=f"[datum.label, 'n = ' + {counts!r}[datum.label]]", grid=False)
    x = alt.X("stratum:N", sort=order, scale=alt.Scale(domain=order), title=None, axis=labels)
    y = _axis(alt.Y, "Dice of the patient", (0, 1))
    table = patients.assign(spread=_spread(patients["y"]))
    dots = (
        alt.Chart(_values(table))
        .mark_point(color=colour, stroke=colour, strokeWidth=0.8, size=30, cursor="pointer")
        .encode(
            x=x,
            xOffset=alt.XOffset("spread:Q", scale=alt.Scale(domain=[-1, 1])),
            y=y,
            fillOpacity=alt.condition("datum.apart", alt.value(0), alt.value(0.5)),
            tooltip=[alt.Tooltip("patient:N"), _number("y", "Dice")],
            href="href:N",
        )
    )
    base = alt.Chart(_values(medians)).encode(x=x)
    ticks = base.mark_tick(color=INK, thickness=2, size=34).encode(
        y=y, tooltip=[alt.Tooltip("stratum:N"), _number("y", "median"), _number("low", "from"), _number("high", "to")]
    )
    ranges = _ranges(base, y).mark_rule(color=INK, strokeWidth=1.2)
    return _of_region(alt.layer(dots, ranges, ticks), region)


def _spread(values):
    """Return sideways offsets in [-0.6, 0.6] that keep close points apart; the same for the same values."""
    golden = 0.6180339887498949
    order = np.argsort(np.argsort(values, kind="stable"), kind="stable")
    return ((order * golden + 0.5) % 1 - 0.5) * 1.2


def scatter(patients, region, threshold):
    """Draw Dice against the score of each patient; the area of a point is the predicted volume.

    patients : DataFrame with `patient`, `x` (score, bits), `y` (Dice), `volume_ml`, `href`
    threshold : Dice below which a segmentation counts as failed
    """
    colour = REGION_COLOURS[region]
    x = alt.X("x:Q", title="entropy near the predicted region, bits", axis=alt.Axis(tickCount=5))
    y = _axis(alt.Y, "Dice of the patient", (0, 1))
    size = alt.Size(
        "volume_ml:Q",
        scale=alt.Scale(range=[12, 260]),
        legend=alt.Legend(
            title="predicted, ml",
            titleColor=INK,
            titleFontWeight="normal",
            format="~g",
            values=_round(patients["volume_ml"]),
        ),
    )
    dots = (
        alt.Chart(_values(patients))
        .mark_point(color=colour, stroke=colour, strokeWidth=0.8, fillOpacity=0.45, cursor="pointer")
        .encode(
            x=x,
            y=y,
            size=size,
            tooltip=[
                alt.Tooltip("patient:N"),
                _number("y", "Dice"),
                _number("x", "entropy, bits"),
                _number("volume_ml", "predicted, ml", ".1f"),
            ],
            href="href:N",
        )
    )
    failed = (
        alt.Chart(alt.Data(values=[{"y": threshold}]))
        .mark_rule(color=MUTED, strokeDash=DOTTED)
        .encode(y=y, tooltip=[_number("y", "failed below", ".2f")])
    )
    return _of_region(alt.layer(failed, dots), region)


def _round(values):
    """Return a small, a middle and a large round number within positive values, for a legend."""
    largest = float(np.nanmax(values)) if len(values) else 1.0
    power = 10 ** np.floor(np.log10(max(largest, 1e-3)))
    top = float(np.floor(largest / power) * power)
    return [float(f"{top * share:.1g}") for share in (0.1, 0.5, 1)]


def convergence(points, title, mask, from_zero):
    """Draw a metric against the number of passes, with intervals, a line a region.

    points : DataFrame with `region`, `passes`, `value`, `low`, `high` (NaN where there is none)
    mask : the voxels that count; from_zero : whether the axis begins at 0, as for an error
    """
    regions = [region for region in REGIONS if region in set(points["region"])]
    colour = alt.Color(
        "region:N",
        scale=alt.Scale(domain=regions, range=[REGION_COLOURS[region] for region in regions]),
        legend=alt.Legend(columns=3, symbolType="circle"),
    )
    passes = sorted(int(value) for value in points["passes"].unique())
    # intervals of regions stand beside each other, well within the distance of two numbers of passes
    step = min([1.05, *((later / earlier) ** 0.25 for earlier, later in pairwise(passes))])
    beside = points["region"].map(
        {region: step ** (place - (len(regions) - 1) / 2) for place, region in enumerate(regions)}
    )
    base = alt.Chart(_values(points.assign(x=points["passes"] * beside)))
    x = alt.X(
        "x:Q",
        title="passes",
        scale=alt.Scale(type="log", domain=[passes[0] / 1.2, passes[-1] * 1.2]),
        axis=alt.Axis(values=passes, format="d", labelOverlap="greedy"),
    )
    scale = alt.Scale(domain=_limits(points, from_zero), zero=False)
    y = alt.Y("value:Q", title=f"on {mask}", scale=scale)
    tooltip = [alt.Tooltip("region:N"), alt.Tooltip("passes:Q"), _number("value", title, ".4f")]
    lines = base.mark_line().encode(x=x, y=y, color=colour)
    ranges = _ranges(base, y).mark_rule(opacity=0.7).encode(x=x, color=colour)
    dots = base.mark_point(opacity=1).encode(x=x, y=y, color=colour, tooltip=tooltip)
    chart = alt.layer(ranges, lines, dots).properties(width=WIDTH, height=190)
    return _finished(chart, title)


def _limits(points, from_zero):
    """Return the ends of an axis that holds values and intervals in [0, 1], and does not blow up small differences."""
    held = points[["value", "low", "high"]].to_numpy(float)
    low, high = (0, np.nanmax(held)) if from_zero else (np.nanmin(held), np.nanmax(held))
    span = max(high - low, LEAST_SPAN)
    middle = (low + high) / 2
    low, high = (0, 1.08 * span) if from_zero else (middle - 0.58 * span, middle + 0.58 * span)
    beyond = max(high - 1, 0)
    return [float(max(low - beyond, 0)), float(high - beyond)]


def qu_brats(points, region):
    """Draw the three curves of the QU-BraTS score: what is left as voxels above a threshold of entropy are dropped.

    points : DataFrame with `part` (Dice kept, filtered TP, filtered TN), `x` (100 × bits), `y`, `low`, `high`
    """
    parts = ["Dice kept", "filtered TP", "filtered TN"]
    dashes = alt.Scale(domain=parts, range=[SOLID, DASHED, DOTTED])
    base = alt.Chart(_values(points))
    x, y = _axis(alt.X, "threshold τ, 100 × bits", (0, 100)), _axis(alt.Y, "mean over patients", (0, 1))
    tooltip = [alt.Tooltip("part:N"), _number("x", "τ", ".1f"), _number("y", "value")]
    legend = alt.Legend(columns=3, symbolType="stroke")
    band = _ranges(base, y).mark_area(color=REGION_COLOURS[region], opacity=0.12).encode(x=x, detail="part:N")
    lines = base.mark_line(color=REGION_COLOURS[region]).encode(
        x=x, y=y, strokeDash=alt.StrokeDash("part:N", scale=dashes, legend=legend), tooltip=tooltip
    )
    return _of_region(alt.layer(band, lines), region)


def differences(rows, title):
    """Draw differences between two models with their intervals, by region: a strip a quantity, on an axis of its own.

    rows : DataFrame with `region`, `quantity`, `value`, `low`, `high`, `p_value_holm`, in the order they are shown
    """
    strips = [_strip(part, quantity) for quantity, part in rows.groupby("quantity", sort=False)]
    return _finished(alt.vconcat(*strips, spacing=4), title)


def _strip(rows, quantity):
    regions = [region for region in REGIONS if region in set(rows["region"])]
    colours = alt.Scale(domain=regions, range=[REGION_COLOURS[region] for region in regions])
    held = np.append(rows[["value", "low", "high"]].to_numpy(float), 0)
    margin = 0.05 * (np.nanmax(held) - np.nanmin(held)) or 0.05
    scale = alt.Scale(domain=[float(np.nanmin(held) - margin), float(np.nanmax(held) + margin)], nice=False)
    axis = alt.Axis(tickCount=6)
    base = alt.Chart(_values(rows)).encode(
        y=alt.Y("region:N", sort=regions, title=None, axis=alt.Axis(grid=False, ticks=False, domain=False)),
        color=alt.Color("region:N", scale=colours, legend=None),
    )
    tooltip = [
        alt.Tooltip("quantity:N"),
        alt.Tooltip("region:N"),
        _number("value", "difference", ".4f"),
        _number("low", "from", ".4f"),
        _number("high", "to", ".4f"),
        _number("p_value_holm", "p (Holm)", ".3g"),
    ]
    zero = alt.Chart(alt.Data(values=[{"x": 0}])).mark_rule(color=MUTED, strokeDash=DOTTED)
    ranges = base.transform_filter("isValid(datum.low)").mark_rule(strokeWidth=1.6)
    dots = base.mark_point(opacity=1, size=44)
    return alt.layer(
        zero.encode(x=alt.X("x:Q", title=None, scale=scale, axis=axis)),
        ranges.encode(x=alt.X("low:Q", title=None, scale=scale, axis=axis), x2="high:Q"),
        dots.encode(x=alt.X("value:Q", title=None, scale=scale, axis=axis), tooltip=tooltip),
        title=alt.TitleParams(quantity, fontSize=11, fontWeight="normal", color=INK, offset=4),
    ).properties(width=330, height=54)


def agreement(patients, region, first, second):
    """Draw the Dice of each patient under two models.

    patients : DataFrame with `patient`, `x` (Dice under `first`), `y` (under `second`), `href`
    """
    colour = REGION_COLOURS[region]
    x, y = _axis(alt.X, f"Dice, {first}", (0, 1)), _axis(alt.Y, f"Dice, {second}", (0, 1))
    tooltip = [alt.Tooltip("patient:N"), _number("x", first), _number("y", second)]
    dots = (
        alt.Chart(_values(patients))
        .mark_point(color=colour, stroke=colour, strokeWidth=0.8, fillOpacity=0.45, size=34, cursor="pointer")
        .encode(x=x, y=y, tooltip=tooltip, href="href:N")
    )
    return _of_region(alt.layer(_reference_line([(0, 0), (1, 1)]).encode(x=x, y=y), dots), region)
