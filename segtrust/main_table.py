"""The table a paper would print: which rows of `metrics.parquet` it shows, and how.

Every number is that of a row; none is computed here. The one exception is nats beside bits.
"""

import math
from dataclasses import dataclass

import pandas as pd

from segtrust.errors import SegtrustError
from segtrust.measures import BETWEEN_MEMBERS, WITHIN_MEMBERS
from segtrust.numerals import interval_text, number
from segtrust.regions import REGIONS

BITS_TO_NATS = math.log(2)

CALIBRATION_MASKS = ("predicted_5mm", "brain")
KINDS = ("class_probability", "top_label")


@dataclass(frozen=True)
class Line:
    """A line of the main table: what is shown, and which row of `metrics.parquet` it is."""

    key: str
    label: str
    metric: str
    pooling: str
    measure: str | None = None
    mask: str | None = None
    binned: bool = False
    form: str = "as it is"  # or "absolute", or "nats"
    hint: str = ""

    @property
    def where(self):
        """Return mask and pooling in words."""
        pooling = {"pooled": "pooled over patients", "patient_mean": "mean over patients"}[self.pooling]
        return f"{self.mask}, {pooling}" if self.mask else pooling


# shown where passes come from several members
PARTS_OF_ENTROPY = "Where does the entropy come from?"

MAIN_TABLE = {
    "Segmentation": (
        Line("dice", "Dice, Monte Carlo mean", "dice", "patient_mean", hint="1 is perfect overlap"),
        Line("dice_deterministic", "Dice, deterministic pass", "dice_deterministic", "patient_mean"),
        Line("delta_dice", "ΔDice, Monte Carlo − deterministic", "delta_dice", "patient_mean"),
        Line(
            "delta_dice_absolute",
            "|ΔDice|",
            "delta_dice",
            "patient_mean",
            form="absolute",
            hint="absolute value of the mean above",
        ),
        Line("absolute_delta_dice", "mean of |ΔDice|", "absolute_delta_dice", "patient_mean"),
    ),
    "Does uncertainty rank errors?": (
        Line(
            "auroc",
            "AUROC of entropy",
            "auroc",
            "pooled",
            "entropy",
            "brain",
            hint="1 is perfect, 0.5 is chance; means nothing without its two baselines",
        ),
        Line(
            "auroc_deterministic",
            "baseline: deterministic_entropy",
            "auroc",
            "pooled",
            "deterministic_entropy",
            "brain",
            hint="entropy of one ordinary forward pass",
        ),
        Line(
            "auroc_boundary",
            "baseline: boundary_proximity",
            "auroc",
            "pooled",
            "boundary_proximity",
            "brain",
            hint="distance to the predicted boundary, no probability at all",
        ),
    ),
    "How much uncertainty is there?": (
        Line("entropy", "Mean entropy, bits", "mean_uncertainty", "pooled", "entropy", "predicted_5mm"),
        Line(
            "entropy_nats", "Mean entropy, nats", "mean_uncertainty", "pooled", "entropy", "predicted_5mm", form="nats"
        ),
        Line("entropy_brain", "Mean entropy, bits", "mean_uncertainty", "pooled", "entropy", "brain"),
        Line("entropy_brain_nats", "Mean entropy, nats", "mean_uncertainty", "pooled", "entropy", "brain", form="nats"),
    ),
    PARTS_OF_ENTROPY: (
        Line(
            "expected_entropy",
            "Single passes are unsure, bits",
            "mean_uncertainty",
            "pooled",
            "expected_entropy",
            "predicted_5mm",
            hint="expected_entropy; the three parts add up to the mean entropy of this mask",
        ),
        Line(
            "within_members",
            "Passes of one member differ, bits",
            "mean_uncertainty",
            "pooled",
            WITHIN_MEMBERS,
            "predicted_5mm",
            hint="mutual information within members",
        ),
        Line(
            "between_members",
            "Members differ, bits",
            "mean_uncertainty",
            "pooled",
            BETWEEN_MEMBERS,
            "predicted_5mm",
            hint="mutual information between members",
        ),
    ),
    "Is confidence calibrated?": (
        *(
            Line(
                f"ece_{kind}" + ("" if mask == "predicted_5mm" else "_brain"),
                f"ece_{kind}",
                f"ece_{kind}",
                "pooled",
                "probability",
                mask,
                binned=True,
                hint="0 is perfect",
            )
            for mask in CALIBRATION_MASKS
            for kind in KINDS
        ),
        Line(
            "mce_class_probability",
            "mce_class_probability",
            "mce_class_probability",
            "pooled",
            "probability",
            "predicted_5mm",
            binned=True,
            hint="the bin that is furthest off; bins of few voxels count as much as others",
        ),
        Line(
            "gap",
            "gap, mean confidence − accuracy",
            "gap",
            "pooled",
            "probability",
            "predicted_5mm",
            hint="positive is over-confident",
        ),
    ),
}


# lines of the main table that are also drawn against the number of passes
CONVERGING = ("auroc", "ece_top_label", "ece_class_probability")


@dataclass(frozen=True)
class Cell:
    """A number with its interval, or the reason why there is none. Unrounded; None where not applicable."""

    value: float | None
    low: float | None = None
    high: float | None = None
    interval: str | None = None
    n_cases: int | None = None
    n_voxels: int | None = None
    reason: str = ""

    @property
    def text(self):
        """Return the rounded value, or a dash."""
        return number(self.value)

    @property
    def bounds(self):
        """Return the rounded interval in brackets, or nothing."""
        return interval_text(self.low, self.high)

    @property
    def note(self):
        """Return what a reader can know of this number beyond its value."""
        if self.value is None:
            return self.reason
        parts = [f"95 % interval: {self.interval}" if self.low is not None else self.reason]
        parts += [f"{self.n_cases:,} patients"] if self.n_cases is not None else []
        parts += [f"{self.n_voxels:,} voxels"] if self.n_voxels is not None else []
        return "; ".join(part for part in parts if part)


def _plain(value):
    """Return a Python number, or None for null and NaN."""
    return None if pd.isna(value) else value.item() if hasattr(value, "item") else value


def find_row(metrics, line, region, n_bins, passes=None):
    """Return the one row of `metrics` (as a dict) that a line of the main table shows, or None.

    The row is the default configuration's: no group, no second model, no recalibration, no aggregation, and all passes
    where no smaller number of passes is given. Raises SegtrustError when several rows fit, because then the number is
    not defined.
    """
    wanted = (metrics["region"] == region) & (metrics["metric"] == line.metric) & (metrics["pooling"] == line.pooling)
    wanted &= metrics["passes"].isna() | (metrics["passes"] == (passes or metrics["passes"].max()))
    wanted &= metrics["recalibration"].isna() | (metrics["recalibration"] == "none")
    for column, value in (("measure", line.measure), ("mask", line.mask)):
        wanted &= metrics[column].isna() if value is None else metrics[column] == value
    for column in ("group", "group_value", "reference_model", "aggregation"):
        wanted &= metrics[column].isna()
    if line.binned:
        wanted &= metrics["n_bins"] == n_bins
    rows = metrics[wanted]
    if len(rows) > 1:
        raise SegtrustError(
            f"metrics.parquet has {len(rows)} rows for {region} {line.metric} ({line.where}), expected one; "
            "remake the cohort tables"
        )
    return None if rows.empty else {name: _plain(value) for name, value in rows.iloc[0].items()}


def cell(row, form):
    """Return the Cell of a row of `metrics` (a dict, or None)."""
    if row is None:
        return Cell(None, reason="not computed in this run")
    if row["value"] is None:
        return Cell(None, n_cases=row["n_cases"], n_voxels=row["n_voxels"], reason=_why_null(row))
    values = [row["value"], row["ci_low"], row["ci_high"]]
    if form == "nats":
        values = [None if value is None else value * BITS_TO_NATS for value in values]
    if form == "absolute":
        values = [abs(row["value"]), None, None]
    has_interval = row["ci_low"] is not None and row["ci_high"] is not None
    reason = "" if has_interval else _why_no_interval(row)
    return Cell(*values, row["interval"], row["n_cases"], row["n_voxels"], reason)


def _why_null(row):
    if row["n_voxels"] == 0:
        return f"no voxel of {row['mask']} has a value in any patient"
    if row["n_cases"] == 0:
        needs_it = row["metric"] in ("dice_deterministic", "delta_dice", "absolute_delta_dice")
        needs_it |= row["measure"] == "deterministic_entropy"
        return "there is no deterministic pass" if needs_it else "no patient has a value"
    if row["metric"] == "auroc":
        return f"undefined: {row['mask']} has no wrong voxel, or no right one"
    return "undefined for these patients"


def _why_no_interval(row):
    label = row["interval"] or ""
    return f"no interval: {label.removeprefix('none: ')}" if label.startswith("none: ") else "no interval was computed"


def main_table(metrics, n_bins):
    """Return {heading: [(Line, [Cell per region])]}: the table a paper would print."""
    has_parts = (metrics["measure"] == BETWEEN_MEMBERS).any()
    return {
        heading: [
            (line, [cell(find_row(metrics, line, region, n_bins), line.form) for region in REGIONS]) for line in lines
        ]
        for heading, lines in MAIN_TABLE.items()
        if has_parts or heading != PARTS_OF_ENTROPY
    }


def cells_of(table, region):
    """Return {key of the line: Cell} of one region."""
    column = REGIONS.index(region)
    return {line.key: cells[column] for lines in table.values() for line, cells in lines}
