"""Write the report of a run: one HTML page, its figures and its tables, from result files alone.

Every number comes from a row of `metrics.parquet` or `strata.parquet`; this module rounds and words them, and computes
none. The one exception is nats beside bits. The same files always give the same bytes: there is no date inside.
"""

import math
import re
from dataclasses import dataclass, field
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pyarrow as pa

from segtrust import figures
from segtrust.errors import SegtrustError, raise_if_any
from segtrust.files import read_json, read_parquet, write_csv
from segtrust.html import environment, flatten, write_html
from segtrust.measures import BETWEEN_MEMBERS, WITHIN_MEMBERS
from segtrust.methods import methods
from segtrust.preprocess import MODALITIES, read_preprocessed
from segtrust.regions import REGIONS, region_masks
from segtrust.volumes import read_reference

ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")

BITS_TO_NATS = math.log(2)

CALIBRATION_MASKS = ("predicted_5mm", "brain")
KINDS = ("class_probability", "top_label")

# the score of a patient that strata are cut by (definitions, section 8)
SCORE_MEASURE = "entropy"
SCORE_AGGREGATION = "predicted_5mm_mean"

# cases whose prediction is empty have no score and stand apart
UNSCORED = {"missing_region_missed": "missed", "missing_region_absent": "absent"}

SEVERITIES = ("error", "warning", "note")


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


@dataclass(frozen=True)
class Finding:
    """A sentence of a verdict. level : good, caution, bad or unknown."""

    level: str
    text: str


@dataclass
class ModelFiles:
    """What the run left of one model; tables are None where no patient had a reference."""

    name: str
    metrics: pd.DataFrame | None = None
    patients: pd.DataFrame | None = None
    strata: pd.DataFrame | None = None
    curves: pd.DataFrame | None = None
    alarms: list = field(default_factory=list)
    provenance: dict = field(default_factory=dict)
    mapped: list = field(default_factory=list)

    @property
    def evaluated(self):
        """Say whether cohort tables exist."""
        return self.metrics is not None


def report(models, results, folder, settings, sheet, excluded=None, sources=None):
    """Write `index.html`, `figures/` and `tables/` into a folder.

    models : names, in the order they are shown
    results : the results folder
    folder : where the report goes, such as `results/report`
    settings : dict with `title`, `background` (modality under the contours, one of
        `segtrust.preprocess.MODALITIES`) and `n_bins` (bins of the calibration rows and diagrams that are shown)
    sheet : list of `segtrust.patients.Patient`, whose `seg` is the path as the working folder sees it
    excluded : dict from patient to the reason why the run left it out, also of patients that are not in `sheet`
    sources : dict from model to a sentence that says where its passes come from

    Raises SegtrustError for model names that cannot be folder names, for a model without any result, and when a
    number of the main table is given by more than one row.
    """
    results, folder = Path(results), Path(folder)
    raise_if_any(
        [
            f"{name!r} cannot be the name of a model: letters, digits, _ . - only, beginning with a letter or digit"
            for name in models
            if not ID.fullmatch(name)
        ]
    )
    runs = [_read_model(results, name, sheet) for name in models]
    raise_if_any(
        [
            f"{run.name}: neither cohort tables nor maps in {results / run.name}; run the workflow first"
            for run in runs
            if not run.evaluated and not run.mapped
        ]
    )
    people = {person.patient for person in sheet}
    failures = {name: found for name, found in read_failures(results).items() if name in people}
    reasons = {name: "failed in " + "; ".join(found) for name, found in failures.items()}
    reasons |= excluded or {}
    said = sources or {}
    sections = [
        {**_section(run, results, folder, settings, sheet, reasons), "sources": said.get(run.name)} for run in runs
    ]
    evaluated = [run for run in runs if run.evaluated]
    paragraphs, works = methods(evaluated, sheet, said, settings["n_bins"])
    page = (
        environment()
        .get_template("index.html")
        .render(
            models=models,
            sections=sections,
            alarms=sort_alarms([alarm for run in runs for alarm in run.alarms]),
            settings=settings,
            rules=verdict_rules(),
            methods=paragraphs,
            works=works,
            colours=figures.REGION_COLOURS,
            regions=REGIONS,
            shown_from=figures.ENTROPY_SHOWN_FROM,
        )
    )
    write_html(folder / "index.html", page)


def _section(run, results, folder, settings, sheet, reasons):
    """Write figures and tables of one model, and return what the template says about it."""
    section = {
        "name": run.name,
        "evaluated": run.evaluated,
        "provenance": flatten(run.provenance),
        "mapped": len(run.mapped),
        "triage": f"triage/{run.name}.html" if (folder / "triage" / f"{run.name}.html").exists() else None,
        "left_out": left_out(sheet, [] if run.patients is None else run.patients["patient"], reasons),
    }
    if run.evaluated:
        table = main_table(run.metrics, settings["n_bins"])
        section["table"] = table
        section["notes"] = sorted(
            {cell.reason for lines in table.values() for _, cells in lines for cell in cells if cell.reason}
        )
        section["n_patients"] = run.patients["patient"].nunique()
        section["passes"] = int(run.metrics["passes"].max())
        groups = {region: stratum_groups(run.strata, run.patients, region) for region in REGIONS}
        section["verdicts"] = {region: verdict(region, cells_of(table, region), groups[region]) for region in REGIONS}
        section["reliability"] = _write_reliability(run, folder, settings["n_bins"])
        section["strata"] = _write_strata(run, folder, groups)
        section["cutoff_source"] = cutoff_source(run.strata)
        points = convergence_points(run.metrics, settings["n_bins"])
        section["convergence"] = _write_convergence(run, folder, points)
        section["tables"] = _write_tables(run, folder, table, points)
    section["slices"] = _write_slices(run, results, folder, settings, sheet)
    return section


# --- reading ---


def _read_model(results, name, sheet):
    """Read what the run left of one model; what earlier runs left of patients no longer in the sheet is not shown."""
    run = ModelFiles(name)
    cohort = results / name / "cohort"
    evaluable = any(person.split == "test" and person.seg for person in sheet)
    if evaluable and (cohort / "metrics.parquet").exists():
        for table in ("metrics", "patients", "strata", "curves"):
            rows, provenance = read_parquet(cohort / f"{table}.parquet")
            rows = rows.to_pandas()
            setattr(run, table, rows[rows["group"].isna()] if "group" in rows else rows)  # the whole cohort
            run.provenance = run.provenance or provenance
        run.alarms = read_json(cohort / "alarms.json")
    ending = "_segmentation.nii.gz"
    mapped = {path.name.removesuffix(ending) for path in (results / name / "maps").glob(f"*{ending}")}
    run.mapped = sorted(mapped & {person.patient for person in sheet})
    return run


def read_failures(results):
    """Return a dict from patient to the reasons of its failures, from the records under `failed/`."""
    failures = {}
    for path in sorted((Path(results) / "failed").rglob("*.json")):
        record = read_json(path)
        of_model = f" of {record['model']}" if record.get("model") else ""
        failures.setdefault(record["patient"], []).append(f"{record['stage']}{of_model}: {record['reason']}")
    return failures


def left_out(sheet, evaluated, reasons):
    """Return [(patient, reason)] of the patients that the cohort tables should count and do not.

    sheet : list of Patient; those of the split test should count
    evaluated : ids that count
    reasons : dict from patient to the known reason; ids that are not in the sheet come last
    """
    evaluated = set(evaluated)
    rows = []
    for person in sheet:
        if person.split == "test" and person.patient not in evaluated:
            unknown = "no result of this patient in the cohort tables" if person.seg else "no reference in the sheet"
            rows.append((person.patient, reasons.get(person.patient, unknown)))
    others = set(reasons) - evaluated - {person.patient for person in sheet}
    return rows + [(patient, reasons[patient]) for patient in sorted(others)]


def sort_alarms(alarms):
    """Return alarms ordered by severity (unknown ones first), then model, region and name."""

    def place(alarm):
        severity = alarm.get("severity")
        rank = SEVERITIES.index(severity) if severity in SEVERITIES else -1
        return rank, *(str(alarm.get(key) or "") for key in ("model", "region", "alarm", "message"))

    return sorted(alarms, key=place)


# --- numbers ---


def number(value, decimals=3):
    """Return a number as text with a true minus sign; a dash for None.

    Decimals are added (up to 6) as long as rounding would turn the value into 0 or 1 that it is not.
    """
    if value is None:
        return "–"
    while decimals < 6 and round(value, decimals) in (-1, 0, 1) and value not in (-1, 0, 1):
        decimals += 1
    if round(value, decimals) == 0 != value:
        return f"{value:.1e}".replace("-", "−")
    return f"{round(value, decimals) + 0.0:.{decimals}f}".replace("-", "−")


def interval_text(low, high, decimals=3):
    """Return `[low–high]`, with `to` between negative bounds; empty where there is no interval."""
    if low is None or high is None:
        return ""
    between = " to " if low < 0 else "–"
    return f"[{number(low, decimals)}{between}{number(high, decimals)}]"


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


# --- verdicts ---

AUROC_WELL = 0.90
AUROC_MODERATE = 0.75
BASELINE_MARGIN = 0.01
ERROR_SMALL = 0.05
ERROR_LARGE = 0.10
GAP_SHARE = 0.5


def verdict_rules():
    """Return the rules of `verdict` in words, for the page."""
    return [
        "Without an interval nothing is called good or bad, only to be read with care.",
        f"Ranking: AUROC of entropy on brain, pooled. From {AUROC_WELL:.2f} it ranks errors well, from "
        f"{AUROC_MODERATE:.2f} moderately, below poorly. A baseline that comes within {BASELINE_MARGIN:.2f} of it, or "
        "above, is named: then Monte Carlo passes add nothing to the ranking.",
        "Calibration: the larger of ece_class_probability and ece_top_label on predicted_5mm. "
        f"Up to {ERROR_SMALL:.2f}, with an interval that also ends there, probabilities can be read as probabilities; "
        f"up to {ERROR_LARGE:.2f} with care; above, they cannot. Confidence is called too high or too low when the gap "
        f"is at least {GAP_SHARE * 100:.0f} % of that error and its interval excludes 0.",
        "Triage: patients in the most uncertain stratum are called worse when the interval of their median Dice lies "
        "wholly below that of the most certain stratum.",
    ]


def verdict(region, cells, groups):
    """Say in plain words what the numbers of one region mean.

    region : WT, TC or ET
    cells : dict with the Cells `auroc`, `auroc_deterministic`, `auroc_boundary`, `ece_class_probability`,
        `ece_top_label` and `gap`
    groups : strata of the region as `stratum_groups` returns them

    Returns a list of Findings: ranking, calibration, triage. The rules are those of `verdict_rules`.
    """
    return [_ranking(cells), _calibration(region, cells), _triage(groups)]


def _ranking(cells):
    auroc = cells["auroc"]
    if auroc.value is None:
        return Finding("unknown", f"Whether uncertainty ranks errors cannot be told ({auroc.reason}).")
    quality, level = (
        ("well", "good")
        if auroc.value >= AUROC_WELL
        else ("only moderately", "caution")
        if auroc.value >= AUROC_MODERATE
        else ("poorly", "bad")
    )
    if auroc.low is None:
        level = "caution"
    head = f"Uncertainty ranks errors {quality} (AUROC {number(auroc.value, 2)})"
    baselines = [
        (name, cells[key].value)
        for name, key in (
            ("distance to the predicted boundary", "auroc_boundary"),
            ("the entropy of one ordinary pass", "auroc_deterministic"),
        )
        if cells[key].value is not None
    ]
    if not baselines:
        return Finding("caution", f"{head}; without a baseline beside it, that number cannot be judged.")
    rivals = [(name, value) for name, value in baselines if value >= auroc.value - BASELINE_MARGIN]
    if not rivals:
        return Finding(level, f"{head}, better than {_listed(baselines)}.")
    if quality != "well":
        return Finding(level, f"{head}, and no better than {_listed(rivals)}.")
    return Finding("caution", f"{head}, but so {'do' if len(rivals) > 1 else 'does'} {_listed(rivals)}.")


def _listed(baselines):
    return " and ".join(f"{name} ({number(value, 2)})" for name, value in baselines)


def _calibration(region, cells):
    errors = {f"ece_{kind}": cells[f"ece_{kind}"] for kind in KINDS if cells[f"ece_{kind}"].value is not None}
    if not errors:
        return Finding("unknown", f"Calibration on {region} cannot be told ({cells['ece_top_label'].reason}).")
    name, error = max(errors.items(), key=lambda item: item[1].value)
    size = f"{number(error.value, 2)} {_bounds(error)} ({name})"
    if error.value > ERROR_SMALL:
        large = error.value > ERROR_LARGE
        advice = (
            f"do not read {region} probabilities as probabilities"
            if large
            else f"read {region} probabilities with care"
        )
        gap = cells["gap"]
        if _one_sided(gap, error):
            direction = "high" if gap.value > 0 else "low"
            amount = f"{number(abs(gap.value), 2)} {_bounds(gap)}"
            text = f"Confidence on {region} is too {direction} by {amount}: {advice}."
        else:
            text = f"Probabilities on {region} are off by {size} on average: {advice}."
        return Finding("bad" if large and error.low is not None else "caution", text)
    if error.high is None:
        return Finding(
            "caution",
            f"Probabilities on {region} are off by {size}; without an interval this is an impression, no proof.",
        )
    if error.high > ERROR_SMALL:
        return Finding("caution", f"Probabilities on {region} are off by {size}: small, but the interval is wide.")
    return Finding("good", f"{region} probabilities can be read as probabilities near the tumour: off by {size}.")


def _one_sided(gap, error):
    if gap.value is None or abs(gap.value) < GAP_SHARE * error.value:
        return False
    return gap.low is None or gap.high is None or gap.low > 0 or gap.high < 0


def _bounds(quantity):
    """Return the interval of a Cell; of its absolute value where it lies wholly below zero."""
    if quantity.low is None or quantity.high is None:
        return "(no interval)"
    if quantity.high < 0:
        return interval_text(-quantity.high, -quantity.low, 2)
    return interval_text(quantity.low, quantity.high, 2)


def _triage(groups):
    scored = [group for group in groups if not group["apart"]]
    if len(scored) < 2 or not all(math.isfinite(group["median"]) for group in (scored[0], scored[-1])):
        return Finding("unknown", "Whether uncertain patients are worse cannot be told (too few patients).")
    certain, uncertain = scored[0], scored[-1]
    compared = f"{_median_text(uncertain)} against {_median_text(certain)}"
    if uncertain["high"] < certain["low"]:
        return Finding("good", f"Uncertain patients are worse: median Dice {compared}.")
    if certain["high"] < uncertain["low"]:
        return Finding("bad", f"Uncertain patients are better, so uncertainty misleads: median Dice {compared}.")
    return Finding("caution", f"It is not shown that uncertain patients are worse: median Dice {compared}.")


def _median_text(group):
    bounds = [value if math.isfinite(value) else None for value in (group["low"], group["high"])]
    return " ".join(
        part for part in (number(group["median"], 2), interval_text(*bounds, 2), f"in {group['label']}") if part
    )


# --- strata ---


def stratum_groups(strata, patients, region):
    """Return the strata of one region as `segtrust.figures.strata` draws them.

    Quartiles where they exist, else halves; the patients without a predicted region follow, apart. Patients are put
    into strata by the score ranges of the table.
    """
    rows = strata[
        (strata["region"] == region)
        & (strata["measure"] == SCORE_MEASURE)
        & (strata["aggregation"] == SCORE_AGGREGATION)
    ]
    schemes = [scheme for scheme in ("quartiles", "halves") if (rows["scheme"] == scheme).any()]
    rows = rows[rows["scheme"] == schemes[0]] if schemes else rows.iloc[:0]
    people = patients[patients["region"] == region]
    score = people[f"score_{SCORE_AGGREGATION}_{SCORE_MEASURE}"]
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
                "dice": people.loc[inside, "dice"].dropna().to_numpy(float),
                "median": _float(row.median_dice),
                "low": _float(row.ci_low),
                "high": _float(row.ci_high),
                "apart": apart,
            }
        )
    return sorted(groups, key=lambda group: group["apart"])


def cutoff_source(strata):
    """Say in words where the cut-offs of the strata come from."""
    words = {"calibration": "the calibration split", "in_sample": "these same patients (in sample)"}
    sources = sorted(strata["cutoff_source"].dropna().unique())
    return " and ".join(words.get(source, source) for source in sources) or "nowhere"


def _float(value):
    return math.nan if pd.isna(value) else float(value)


# --- figures and tables ---


def _write_reliability(run, folder, n_bins):
    drawn = {}
    for kind in KINDS:
        drawn[kind] = []
        for region in REGIONS:
            curves = {mask: reliability_points(run.curves, kind, region, mask, n_bins) for mask in CALIBRATION_MASKS}
            curves = {mask: points for mask, points in curves.items() if len(points[0])}
            if not curves:
                drawn[kind].append({"region": region, "path": None})
                continue
            name = f"{run.name}_reliability_{kind}_{region}"
            figures.save_chart(figures.reliability(curves, region, kind, n_bins), folder / "figures", name)
            alt = "; ".join(
                f"{mask}: {len(points[0])} bins, {int(points[4].sum()):,} voxels" for mask, points in curves.items()
            )
            drawn[kind].append({"region": region, "path": f"figures/{name}", "alt": alt})
    return drawn


def reliability_points(curves, kind, region, mask, n_bins):
    """Return (x, y, low, high, n) of one pooled reliability diagram, over its non-empty bins."""
    rows = curves[
        (curves["curve"] == f"reliability_{kind}")
        & (curves["region"] == region)
        & (curves["mask"] == mask)
        & (curves["measure"] == "probability")
        & (curves["pooling"] == "pooled")
        & (curves["n_bins"] == n_bins)
        & (curves["n"] > 0)
    ].sort_values("x")
    return tuple(rows[column].to_numpy(float) for column in ("x", "y", "low", "high", "n"))


def convergence_points(metrics, n_bins):
    """Return a line of the main table at every number of passes, a DataFrame with a row per number that exists.

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


def _write_convergence(run, folder, points):
    lines = {line.key: line for lines in MAIN_TABLE.values() for line in lines}
    drawn = []
    for key, table in points.groupby("quantity", sort=False):
        line, name = lines[key], f"{run.name}_convergence_{key}"
        by_region = dict(list(table.groupby("region", sort=False)))
        figure = figures.convergence(by_region, line.label, line.mask, from_zero=line.binned)
        figures.save_chart(figure, folder / "figures", name)
        alt = "; ".join(
            f"{region}: " + ", ".join(f"{number(row.value)} after {row.passes}" for row in part.itertuples())
            for region, part in by_region.items()
        )
        drawn.append({"path": f"figures/{name}", "label": line.label, "mask": line.mask, "alt": alt})
    return drawn


def _write_strata(run, folder, groups):
    drawn = []
    for region in REGIONS:
        shown = [group for group in groups[region] if len(group["dice"]) or not group["apart"]]
        if not any(len(group["dice"]) for group in shown):
            drawn.append({"region": region, "path": None})
            continue
        name = f"{run.name}_strata_{region}"
        figures.save_chart(figures.strata(shown, region), folder / "figures", name)
        alt = "; ".join(
            f"{group['label']}: {len(group['dice'])} patients, median {number(_finite(group['median']), 2)}"
            for group in shown
        )
        drawn.append({"region": region, "path": f"figures/{name}", "alt": alt})
    return drawn


def _finite(value):
    return value if math.isfinite(value) else None


def _write_tables(run, folder, table, points):
    lines = [
        {
            "model": run.name,
            "region": region,
            "quantity": line.key,
            "metric": line.metric,
            "measure": line.measure,
            "mask": line.mask,
            "pooling": line.pooling,
            "form": line.form,
            **{
                name: getattr(entry, name)
                for name in ("value", "low", "high", "interval", "n_cases", "n_voxels", "reason")
            },
        }
        for lines in table.values()
        for line, cells in lines
        for region, entry in zip(REGIONS, cells, strict=True)
    ]
    curves = run.curves[run.curves["curve"].isin([f"reliability_{kind}" for kind in KINDS])]
    tables = {"main": pd.DataFrame(lines), "reliability": curves, "strata": run.strata, "patients": run.patients}
    if len(points):
        tables["convergence"] = points
    written = []
    for name, frame in tables.items():
        path = f"tables/{run.name}_{name}.csv"
        write_csv(folder / path, pa.Table.from_pandas(frame, preserve_index=False))
        written.append((name, path))
    return written


# --- slices ---


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


def _write_slices(run, results, folder, settings, sheet):
    people = {person.patient: person for person in sheet}
    shown = []
    for caption, patient in showcase(run.patients, [patient for patient in run.mapped if patient in people]):
        entry = {"caption": caption, "patient": patient, "panels": [], "problem": ""}
        shown.append(entry)
        if not ID.fullmatch(patient):
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
        entry.update(_draw_slices(run.name, people[patient], maps, scan, folder, settings["background"]))
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
    drawn = {"scan": figures.scan_panel(image, predicted[..., level], _at(reference, level), spacing, background)}
    for index, region in enumerate(REGIONS):
        known = None if reference is None else reference[index, ..., level]
        drawn[f"entropy_{region}"] = figures.entropy_panel(
            image, entropy[index, ..., level], predicted[index, ..., level], known, spacing, region
        )
    panels = []
    for name, figure in drawn.items():
        path = f"figures/{model}_slice_{person.patient}_{name}.png"
        figures.save_slice(figure, folder / path)
        panels.append({"name": name, "path": path})
    return {"panels": panels, "has_reference": reference is not None, "level": level + preprocessed.start[2]}


def _at(volume, level):
    return None if volume is None else volume[..., level]


def busiest_slice(membership):
    """Return the axial slice with most voxels of a membership (x, y, z), the middle one when there are none."""
    voxels = membership.sum(axis=(0, 1))
    return int(voxels.argmax()) if voxels.any() else membership.shape[2] // 2
