"""Figures of one model: which rows of its tables each chart draws, and the caption that says how to read it."""

from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from segtrust import charts
from segtrust.main_table import CALIBRATION_MASKS, CONVERGING, KINDS, MAIN_TABLE, find_row
from segtrust.numerals import interval_text, number, plain
from segtrust.order import SCORE
from segtrust.regions import REGIONS

# the score of a patient that strata are cut by (definitions, section 8)
SCORE_MEASURE = "entropy"
SCORE_AGGREGATION = "predicted_5mm_mean"

# cases whose prediction is empty have no score and stand apart
UNSCORED = {"missing_region_missed": "missed", "missing_region_absent": "absent"}

# masks to choose from, the one that papers show first; reliability diagrams have `brain` beside the one chosen
CALIBRATION_CHOICE = ("predicted_5mm", "plausible", "predicted", "union", "reference", "brain")
RANKING_CHOICE = ("brain", "predicted_5mm", "plausible", "tumour_5mm", "union", "boundary_3mm")
DISTRIBUTION_CHOICE = ("predicted_5mm", "brain", "plausible", "tumour_5mm")

# in the order they are drawn: what lies above others comes last
RANKED = ("boundary_proximity", "deterministic_entropy", "variance", "mutual_information", "entropy")
TRIAGED = ("predicted_volume", "boundary_proximity", "deterministic_entropy", "entropy")
PARTS_OF_QU_BRATS = {"qu_brats_dsc": "Dice kept", "qu_brats_ftp": "filtered TP", "qu_brats_ftn": "filtered TN"}

CONDITIONAL = (
    "Masks built from the reference (`tumour_5mm`, `union`, `reference`, `boundary_3mm`) select on the outcome: there, "
    "a perfectly calibrated model has errors above 0."
)
BASELINES = (
    "Grey: baselines that need no passes, `deterministic_entropy` of one ordinary pass and `boundary_proximity`, the "
    "distance to the predicted boundary alone. Uncertainty from passes is worth something where its line beats both."
)


@dataclass(frozen=True)
class Panel:
    """A chart of a figure.

    name : of its files; chart : None where there is nothing to draw, with the reason why; masks : it can be drawn on
    """

    name: str
    label: str
    chart: object = None
    alt: str = ""
    reason: str = ""
    masks: tuple = ()


@dataclass(frozen=True)
class Figure:
    """Charts side by side under one caption, in which `code` is marked by backticks. masks : to choose from."""

    key: str
    heading: str
    caption: str
    panels: list = field(default_factory=list)
    masks: tuple = ()

    @property
    def drawn(self):
        return [panel for panel in self.panels if panel.chart is not None]


def figures_of(run, n_bins, pages):
    """Return the Figures of an evaluated model, without those of which nothing can be drawn.

    run : `segtrust.report.ModelFiles`; n_bins : of calibration; pages : {patient: address of its page}
    """
    people = run.patients["patient"].nunique()
    found = [
        *(_reliability(run, kind, n_bins, people) for kind in KINDS),
        _roc(run, people),
        _precision_recall(run, people),
        _distribution(run, people),
        _distances(run, people),
        _retention(run, people),
        _strata(run, pages),
        _scatter(run, pages),
        _risk_coverage(run, people),
        _qu_brats(run, people),
        _convergence(run, n_bins, people),
    ]
    return [figure for figure in found if figure.drawn]


def _where(table, **wanted):
    """Return the rows of a table whose columns have the values wanted; None is null, a tuple is any of it."""
    chosen = pd.Series(True, index=table.index)
    for column, value in wanted.items():
        if value is None:
            chosen &= table[column].isna()
        elif isinstance(value, tuple):
            chosen &= table[column].isin(value)
        else:
            chosen &= table[column] == value
    return table[chosen]


def _in_order(table, column, order):
    """Return a table's rows by the order of one of its columns, and otherwise as they were."""
    places = {name: place for place, name in enumerate(order)}
    return table.assign(_place=table[column].map(places)).sort_values("_place", kind="stable").drop(columns="_place")


def _panels(run, key, chart_of, nothing):
    """Return a Panel a region; chart_of : region → (chart, alt, masks if any), or None where there is nothing."""
    panels = []
    for region in REGIONS:
        name, (chart, said, masks) = f"{run.name}_{key}_{region}", (*(chart_of(region) or (None, "")), ())[:3]
        panels.append(Panel(name, region, chart, said, "" if chart else f"{region}: {nothing}.", tuple(masks)))
    return panels


def _masks_in(choice, tables):
    held = set().union(*(table["mask"].unique() for table in tables))
    return tuple(mask for mask in choice if mask in held)


def _final(metrics, **wanted):
    """Return rows of metrics after all passes, without recalibration."""
    rows = _where(metrics, **wanted)
    rows = rows[rows["passes"].isna() | (rows["passes"] == metrics["passes"].max())]
    return rows[rows["recalibration"].isna() | (rows["recalibration"] == "none")]


# --- calibration ---


def reliability_points(curves, kind, region, n_bins):
    """Return the non-empty bins of the pooled reliability diagrams of a region, by mask in the order of choice."""
    rows = _where(
        curves, curve=f"reliability_{kind}", region=region, measure="probability", pooling="pooled", n_bins=n_bins
    )
    rows = _where(rows[rows["n"] > 0], mask=CALIBRATION_CHOICE).sort_values("x", kind="stable")
    return _in_order(rows, "mask", CALIBRATION_CHOICE)[["mask", "x", "y", "low", "high", "n"]]


def _reliability(run, kind, n_bins, people):
    tables = {region: reliability_points(run.curves, kind, region, n_bins) for region in REGIONS}

    def chart_of(region):
        points = tables[region]
        if points.empty:
            return None
        said = "; ".join(
            f"{mask}: {len(part)} bins, {int(part['n'].sum()):,} voxels"
            for mask, part in points.groupby("mask", sort=False)
            if mask in CALIBRATION_MASKS
        )
        return charts.reliability(points, region, kind, n_bins), said, points["mask"].unique()

    if kind == "class_probability":
        heading = "Is a probability of 0.8 right eight times in ten?"
        reading = (
            "Across: mean probability of the region in a bin. Up: fraction of its voxels that the reference calls the "
            "region. A calibrated model follows the dotted diagonal; below it, probabilities are too high. This is "
            "what `ece_class_probability` sums up."
        )
    else:
        heading = "Is the chosen label right as often as its confidence says?"
        reading = (
            "Across: mean confidence in a bin, the probability of the label that was chosen (at least 0.5). Up: "
            "fraction of its voxels that are labelled right. Below the dotted diagonal, the model is over-confident. "
            "This is what `ece_top_label` sums up."
        )
    caption = (
        f"{reading} Solid: the chosen mask (in papers `predicted_5mm`, the predicted region and 5 mm around it), with "
        "its 95 % bootstrap band over subjects; dashed: `brain`. Below, voxels in each bin on a logarithmic axis: a "
        f"point over few voxels weighs little. {CONDITIONAL} {people:,} patients pooled, {n_bins} bins, probabilities "
        "in [0, 1]."
    )
    panels = _panels(
        run, f"reliability_{kind}", chart_of, "no voxels in predicted_5mm or brain, so there is no diagram"
    )
    masks = tuple(mask for mask in _masks_in(CALIBRATION_CHOICE, tables.values()) if mask != "brain")
    return Figure(f"reliability_{kind}", heading, caption, panels, masks)


# --- ranking of errors ---


def _ranking_points(run, curve, region, metrics):
    """Return the points of pooled curves of a region, with the metrics of each whole curve beside them."""
    rows = _where(run.curves, curve=curve, region=region, measure=RANKED, mask=RANKING_CHOICE)
    points = rows[["mask", "measure", "point", "x", "y"]]
    for metric in metrics:
        values = _final(run.metrics, region=region, metric=metric, pooling="pooled", aggregation=None)
        values = values[["mask", "measure", "value"]].rename(columns={"value": metric})
        points = points.merge(values, on=["mask", "measure"], how="left")
    return _in_order(_in_order(points, "measure", RANKED), "mask", RANKING_CHOICE)


def _ranking(run, key, curve, metrics, draw, heading, caption):
    tables = {region: _ranking_points(run, curve, region, metrics) for region in REGIONS}
    if curve == "pr":
        tables = {region: _from_zero(points) for region, points in tables.items()}

    def chart_of(region):
        points = tables[region]
        if points.empty:
            return None
        first = points[points["mask"] == points["mask"].iloc[0]].drop_duplicates("measure").iloc[::-1]
        named = ", ".join(f"{row.measure} {number(getattr(row, metrics[0]))}" for row in first.itertuples())
        return draw(points, region), f"on {first['mask'].iloc[0]}: {named}", points["mask"].unique()

    panels = _panels(run, key, chart_of, "no mask has both wrong and correct voxels, so there is no curve")
    return Figure(key, heading, caption, panels, _masks_in(RANKING_CHOICE, tables.values()))


def _from_zero(points):
    """Return precision–recall curves from recall 0 on: what is flagged first is as precise as its whole step."""
    first = points[points["point"] == points.groupby(["mask", "measure"])["point"].transform("min")]
    return pd.concat([first.assign(x=0.0, point=-1), points])


def _roc(run, people):
    caption = (
        "ROC of uncertainty against error. As the threshold falls, more voxels are flagged as uncertain. Up: share of "
        "the wrong voxels that are flagged; across: share of the correct ones. The higher and further left, the "
        f"better; the area is the AUROC, 0.5 (the diagonal) is chance. {BASELINES} On a mask with many easy voxels, "
        f"such as `brain`, every line is high. {people:,} patients pooled."
    )
    return _ranking(run, "roc", "roc", ("auroc",), charts.roc, "Are wrong voxels the uncertain ones?", caption)


def _precision_recall(run, people):
    caption = (
        "Precision and recall of uncertainty against error. As the threshold falls, more voxels are flagged. Across: "
        "share of the wrong voxels that are flagged; up: share of the flagged voxels that are wrong. Dotted: the error "
        "rate, what chance would reach; a precision is unreadable without it. Where few voxels are wrong, this says "
        f"more than the ROC. {BASELINES} {people:,} patients pooled."
    )
    draw = charts.precision_recall
    heading = "If only uncertain voxels were checked, how many would be wrong?"
    return _ranking(run, "precision_recall", "pr", ("aupr", "error_rate"), draw, heading, caption)


def _distribution(run, people):
    def points_of(region):
        names = {"distribution_wrong": "wrong", "distribution_correct": "correct"}
        rows = _where(run.curves, curve=tuple(names), region=region, measure="entropy", mask=DISTRIBUTION_CHOICE)
        half = rows["x"].min() if len(rows) else 0
        rows = rows.assign(outcome=rows["curve"].map(names), low=rows["x"] - half, high=rows["x"] + half)
        return _in_order(rows, "mask", DISTRIBUTION_CHOICE)[["mask", "outcome", "low", "high", "y", "n"]]

    tables = {region: points_of(region) for region in REGIONS}

    def chart_of(region):
        points = tables[region]
        if points.empty:
            return None
        sums = points[points["mask"] == points["mask"].iloc[0]].groupby("outcome")["n"].sum()
        said = "; ".join(f"{n:,} {outcome} voxels" for outcome, n in sums.items())
        return charts.distribution(points, region), said, points["mask"].unique()

    caption = (
        "Entropy of wrong voxels (coloured) and of correct ones (grey): share of each kind of voxel in 40 bins, on a "
        "logarithmic axis. Good: the coloured distribution lies to the right of the grey one. Wrong voxels at the left "
        f"edge are errors made with confidence, which no threshold finds. {people:,} patients pooled."
    )
    panels = _panels(run, "distribution", chart_of, "no voxels, so there is no distribution")
    masks = _masks_in(DISTRIBUTION_CHOICE, tables.values())
    return Figure("distribution", "How sure are wrong voxels?", caption, panels, masks)


def _distances(run, people):
    names = {"error_rate": "error rate", "mean_uncertainty": "mean entropy, bits"}

    def chart_of(region):
        rows = _final(run.metrics, region=region, metric=tuple(names), pooling="pooled", measure="entropy")
        rows = _where(rows, mask=tuple(charts.BANDS_IN_ORDER)).dropna(subset="value")
        if rows.empty:
            return None
        columns = {"mask": "band", "value": "y", "ci_low": "low", "ci_high": "high", "n_voxels": "n"}
        points = rows.assign(quantity=rows["metric"].map(names)).rename(columns=columns)
        points = points[["band", "quantity", "y", "low", "high", "n"]].astype({"n": float})
        near = points[points["band"] == "outside_0_1mm"]
        said = ", ".join(f"{row.quantity} {number(row.y, 2)}" for row in near.itertuples())
        return charts.distances(points, region), f"within 1 mm outside: {said}" if said else ""

    caption = (
        "By distance to the surface of the reference, outside to the left and inside to the right: how often a voxel "
        "is labelled wrong (coloured) and how uncertain it is (grey, dashed), with 95 % intervals over subjects. "
        "Errors lie at the surface. Good: entropy falls with the error rate on both sides. Entropy that stays low "
        "while errors reach far from the surface misses whole parts of a tumour, and that is what boundary distance "
        f"cannot tell either. {people:,} patients pooled."
    )
    panels = _panels(run, "distances", chart_of, "no voxel has a distance to its reference")
    return Figure("distances", "Where do errors and uncertainty lie?", caption, panels)


def _retention(run, people):
    def chart_of(region):
        rows = _where(run.curves, curve="retention", region=region, measure=RANKED, pooling="patient_mean")
        if rows.empty:
            return None
        rows = _in_order(rows, "measure", RANKED)
        start = rows[(rows["measure"] == "entropy") & (rows["x"] == 0)]
        area = _final(run.metrics, region=region, metric="retention_area_normalised", measure="entropy")
        said = [f"Dice {number(value, 2)} with nothing replaced" for value in start["y"]]
        said += [f"normalised area {number(value, 2)}" for value in area["value"].dropna()]
        counts = rows.groupby("measure", sort=False)["n"].max()
        said += [f"{measure} of {n:,} patients alone" for measure, n in counts.items() if n < counts.max()]
        return charts.retention(rows[["measure", "x", "y", "low", "high"]], region), ", ".join(said)

    caption = (
        "Dice when the most uncertain voxels of the brain are handed to a reader and replaced by the reference, mean "
        "over patients; the band is the 95 % interval of entropy. Good: a line that rises steeply at the left, so that "
        f"little reading repairs much. {BASELINES} {people:,} patients."
    )
    panels = _panels(run, "retention", chart_of, "no patient has a curve")
    return Figure("retention", "How much reading would repair the segmentation?", caption, panels)


# --- patients ---


def stratum_groups(strata, patients, region):
    """Return the strata of one region, a list of dicts in the order of the axis.

    Keys: `label`, `patients` (DataFrame with `patient`, `dice`), `median`, `low`, `high` (NaN where there is none) and
    `apart` (True for patients without a score). Quartiles where they exist, else halves; the patients without a
    predicted region follow, apart. Patients are put into strata by the score ranges of the table.
    """
    rows = _where(strata, region=region, measure=SCORE_MEASURE, aggregation=SCORE_AGGREGATION)
    schemes = [scheme for scheme in ("quartiles", "halves") if (rows["scheme"] == scheme).any()]
    rows = rows[rows["scheme"] == schemes[0]] if schemes else rows.iloc[:0]
    people = patients[patients["region"] == region]
    score = people[SCORE]
    groups = []
    for row in rows.itertuples():
        if row.stratum == "missing_region":
            continue  # its two halves are shown instead
        apart = row.stratum in UNSCORED
        if apart:
            both_empty = people["both_empty"].astype(bool)
            inside = score.isna() & (both_empty if row.stratum == "missing_region_absent" else ~both_empty)
        else:
            inside = score.between(row.score_low, row.score_high)
        groups.append(
            {
                "label": UNSCORED.get(row.stratum, row.stratum),
                "patients": people.loc[inside, ["patient", "dice"]].dropna(),
                "median": _float(row.median_dice),
                "low": _float(row.ci_low),
                "high": _float(row.ci_high),
                "apart": apart,
            }
        )
    return sorted(groups, key=lambda group: group["apart"])


def _float(value):
    return np.nan if pd.isna(value) else float(value)


def cutoff_source(strata):
    """Say in words where the cut-offs of the strata come from."""
    words = {"calibration": "the calibration split", "in_sample": "these same patients (in sample)"}
    sources = sorted(strata["cutoff_source"].dropna().unique())
    return " and ".join(words.get(source, source) for source in sources) or "nowhere"


def _strata(run, pages):
    def chart_of(region):
        groups = stratum_groups(run.strata, run.patients, region)
        groups = [group for group in groups if len(group["patients"]) or not group["apart"]]
        if not any(len(group["patients"]) for group in groups):
            return None
        people = pd.concat(
            [group["patients"].assign(stratum=group["label"], apart=group["apart"]) for group in groups]
        ).rename(columns={"dice": "y"})
        people = people.assign(href=people["patient"].map(pages))
        medians = pd.DataFrame(
            [
                {"stratum": group["label"], "y": group["median"], "n": len(group["patients"])}
                | {name: group[name] for name in ("low", "high")}
                for group in groups
            ]
        )
        said = "; ".join(
            f"{row.stratum}: n = {row.n}, median {number(row.y if np.isfinite(row.y) else None, 2)}"
            for row in medians.itertuples()
        )
        return charts.strata(people.astype({"apart": bool}), medians, region), said

    caption = (
        "Every point is a patient; the bar is the median Dice of the stratum and the thin line its 95 % interval (none "
        "with too few patients). Strata run from certain (left) to uncertain, by the mean entropy in `predicted_5mm`: "
        "Q1 to Q4 are quartiles, H1 and H2 halves (fewer than 8 patients). Good: Dice falls from left to right, so the "
        f"uncertain stratum is the one to look at. Cut-offs come from {cutoff_source(run.strata)}. Patients whose "
        "prediction of the region is empty have no score and stand apart: missed (the reference has it, Dice 0) or "
        "absent (neither has it, Dice 1 by convention)."
    )
    panels = _panels(run, "strata", chart_of, "no patient has a Dice, so there are no strata")
    return Figure("strata", "Are uncertain patients the bad ones?", caption, panels)


def _scatter(run, pages):
    threshold = run.provenance.get("cohort", {}).get("failure_dice", 0.8)

    def chart_of(region):
        people = run.patients[run.patients["region"] == region]
        columns = {SCORE: "x", "dice": "y"}
        points = people.rename(columns=columns)[["patient", "x", "y", "volume_ml"]].dropna()
        if points.empty:
            return None
        points = points.assign(href=points["patient"].map(pages))
        spearman = _final(run.metrics, region=region, metric="spearman", measure=SCORE_MEASURE)
        spearman = spearman[spearman["aggregation"] == SCORE_AGGREGATION]
        rho = [
            f", Spearman ρ {number(row.value, 2)} {interval_text(plain(row.ci_low), plain(row.ci_high), 2)}".rstrip()
            for row in spearman.dropna(subset="value").itertuples()
        ]
        return charts.scatter(points, region, threshold), f"{len(points)} patients" + "".join(rho)

    caption = (
        "Every point is a patient, as large as its predicted volume: mean entropy in `predicted_5mm` against Dice. "
        f"Dotted: a Dice of {number(threshold, 2)}, below which a segmentation counts as failed. Good: points fall "
        "from upper left to lower right. Points at the lower left are failures that the score does not see. Small "
        "tumours often have both low Dice and high entropy, so look whether the trend holds among points of one size. "
        "Patients without a predicted region have no score and are not drawn."
    )
    panels = _panels(run, "scatter", chart_of, "no patient has both a score and a Dice")
    return Figure("scatter", "Does a patient’s uncertainty tell its Dice?", caption, panels)


def _risk_coverage(run, people):
    def chart_of(region):
        rows = _where(run.curves, curve="risk_coverage", region=region, measure=TRIAGED)
        rows = rows[rows["mask"].isna() | (rows["mask"] == "predicted_5mm")]
        if rows.empty:
            return None
        rows = _in_order(rows, "measure", TRIAGED)
        entropy = _final(run.metrics, region=region, metric="aurc", measure=SCORE_MEASURE)
        entropy = entropy[entropy["aggregation"] == SCORE_AGGREGATION]["value"].dropna()
        said = [f"AURC of entropy {number(value)}" for value in entropy]
        return charts.risk_coverage(rows[["measure", "x", "y", "n"]], region), ", ".join(said)

    caption = (
        "Mean risk, 1 − Dice, of the patients kept when the most uncertain are set aside; the dotted line is the risk "
        "of all. Good: a line that rises from left to right, and lies below the grey ones: `deterministic_entropy`, "
        "`boundary_proximity`, and `predicted_volume`, which asks for no uncertainty at all. Patients without a "
        f"predicted region have no score and are not counted. At most {people:,} patients."
    )
    panels = _panels(run, "risk_coverage", chart_of, "no patient has a score")
    return Figure("risk_coverage", "What is gained by setting uncertain patients aside?", caption, panels)


# --- the passes as a whole ---


def _qu_brats(run, people):
    def chart_of(region):
        rows = _where(run.curves, curve=tuple(PARTS_OF_QU_BRATS), region=region, measure="entropy")
        if rows.empty:
            return None
        rows = rows.assign(part=rows["curve"].map(PARTS_OF_QU_BRATS))
        said = [
            f"{label} {number(value, 2)}"
            for metric, label in (
                ("qu_brats", "score"),
                ("qu_brats_zero", "all-zero map"),
                ("qu_brats_oracle", "oracle"),
            )
            for value in _final(run.metrics, region=region, metric=metric, pooling="patient_mean")["value"].dropna()
        ]
        return charts.qu_brats(rows[["part", "x", "y", "low", "high"]], region), ", ".join(said)

    caption = (
        "The three curves of the QU-BraTS score (Mehta 2022): voxels with more than τ of 100 × entropy are dropped. "
        "Good: the Dice of what is kept (solid) rises towards small τ, while few true positives (dashed) and true "
        "negatives (dotted) are dropped. The score is the mean of the area under the first and of one minus the areas "
        "under the others. Two references on the same segmentation stand beside it under each chart: a map that is "
        "zero everywhere, which can outscore entropy, and an oracle that marks exactly the errors. Mean over "
        f"{people:,} patients with 95 % bands."
    )
    panels = _panels(run, "qu_brats", chart_of, "no patient has a curve")
    return Figure("qu_brats", "QU-BraTS: what is lost when uncertain voxels are dropped?", caption, panels)


def convergence_points(metrics, n_bins):
    """Return lines of the main table at every number of passes, a DataFrame with a row per number that exists.

    Columns are `quantity` (one of `CONVERGING`), `region`, `passes`, `value`, `low`, `high`. Quantities that are known
    for all passes alone are left out.
    """
    lines = {line.key: line for lines in MAIN_TABLE.values() for line in lines}
    points = []
    for key in CONVERGING:
        rows = [
            {"quantity": key, "region": region, **row}
            for region in REGIONS
            for passes in sorted(metrics["passes"].dropna().unique())
            if (row := find_row(metrics, lines[key], region, n_bins, passes)) and row["value"] is not None
        ]
        points += rows if len({row["passes"] for row in rows}) > 1 else []
    columns = ["quantity", "region", "passes", "value", "ci_low", "ci_high"]
    table = pd.DataFrame(points, columns=columns).rename(columns={"ci_low": "low", "ci_high": "high"})
    return table.astype(dict.fromkeys(("value", "low", "high"), float))


def _convergence(run, n_bins, people):
    lines = {line.key: line for lines in MAIN_TABLE.values() for line in lines}
    panels = []
    for key, table in convergence_points(run.metrics, n_bins).groupby("quantity", sort=False):
        line = lines[key]
        said = "; ".join(
            f"{region}: " + ", ".join(f"{number(row.value)} after {int(row.passes)}" for row in part.itertuples())
            for region, part in table.groupby("region", sort=False)
        )
        chart = charts.convergence(table, line.label, line.mask, line.binned)
        panels.append(Panel(f"{run.name}_convergence_{key}", line.label, chart, said))
    caption = (
        "The same metrics after the first passes of every source, on a logarithmic axis; the last point is the number "
        "in the table above. Good: every line is level well before its end, so that more passes would change nothing "
        "(and fewer would have done). A line that still rises or falls at its end asks for more passes. Vertical lines "
        f"are 95 % intervals over patients (none with too few). Each point has the same {people:,} patients, so an "
        "interval tells how well the height of a line is known, not whether it is level. AUROC: 1 is perfect, 0.5 is "
        f"chance; calibration errors, in {n_bins} bins: 0 is perfect."
    )
    return Figure("convergence", "Were there enough passes?", caption, panels)
