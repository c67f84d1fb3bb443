"""Write the report of a run: one HTML page, its figures and its tables, from result files alone.

Every number comes from a row of a result table; this module rounds and words them, and computes none. The same files
always give the same bytes, but for the order of a PDF's parts: there is no date inside.
"""

import json
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path

import pandas as pd
import vl_convert

from segtrust.colours import ENTROPY_SHOWN_FROM, REGION_COLOURS
from segtrust.differences import MOST_PAIRS_DRAWN, disagreements, family_rows, figures_of_pair, sentences
from segtrust.drawing import VEGA_LITE, save_chart, specification
from segtrust.errors import raise_if_any
from segtrust.figures import (
    SCORE,
    SCORE_AGGREGATION,
    SCORE_MEASURE,
    convergence_points,
    figures_of,
    stratum_groups,
)
from segtrust.files import read_json, read_parquet, replacing
from segtrust.html import environment, flatten, write_html
from segtrust.latex import write_table
from segtrust.main_table import KINDS, cells_of, main_table
from segtrust.methods import methods
from segtrust.numerals import interval_text, number, plain
from segtrust.order import read_order, with_page
from segtrust.regions import REGIONS
from segtrust.slices import PATTERN, write_slices
from segtrust.verdict import headlines, verdict, verdict_rules

SEVERITIES = ("error", "warning", "note")

# columns of the first screen: key of a line of the main table, heading
OVERVIEW = {
    "dice": "Dice",
    "auroc": "AUROC of entropy",
    "ece_class_probability": "ece_class_probability",
    "ece_top_label": "ece_top_label",
    "entropy": "Mean entropy, bits",
}


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
    """Write `index.html`, `assets/`, `figures/` and `tables/` into a folder, and remove what is no longer theirs.

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
            if not PATTERN.fullmatch(name)
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
    written = _Written(folder)
    sections = [
        {**_section(run, results, written, settings, sheet, reasons), "sources": said.get(run.name)} for run in runs
    ]
    evaluated = [run for run in runs if run.evaluated]
    pairs = _pairs(evaluated, results, written)
    if written.charts:
        written.text("assets/vega.js", f"(() => {{{vl_convert.javascript_bundle(vl_version=VEGA_LITE)}}})();\n")
    paragraphs, works = methods(evaluated, sheet, said, settings["n_bins"])
    page = (
        environment()
        .get_template("index.html")
        .render(
            models=models,
            sections=sections,
            overview=_overview([section for section in sections if section["evaluated"]]),
            columns=OVERVIEW,
            pairs=pairs,
            alarms=sort_alarms([alarm for run in runs for alarm in run.alarms]),
            settings=settings,
            rules=verdict_rules(),
            methods=paragraphs,
            works=works,
            colours=REGION_COLOURS,
            regions=REGIONS,
            shown_from=ENTROPY_SHOWN_FROM,
        )
    )
    write_html(folder / "index.html", page)
    written.remove_others()


class _Written:
    """What a report has written beside its page, so that what earlier ones left can go."""

    FOLDERS = ("assets", "figures", "tables")

    def __init__(self, folder):
        self.folder = folder
        self.charts = 0
        self._names = set()

    def text(self, name, content):
        self._names.add(name)
        with replacing(self.folder / name) as partial:
            partial.write_text(content, encoding="utf-8")

    def table(self, name, rows, shown, caption):
        """Write a table; return [(kind, address)]."""
        files = write_table(rows, shown, self.folder / "tables", name, caption)
        self._names |= {f"tables/{file}" for file in files}
        return [({"csv": "CSV", "tex": "LaTeX"}[file.rpartition(".")[2]], f"tables/{file}") for file in files]

    def figures(self, key, figures):
        """Write charts, and `assets/charts_<key>.js` with what a browser draws them from; return what a page shows."""
        shown, specifications = [], {}
        for figure in figures:
            panels = []
            for panel in figure.panels:
                entry = {"label": panel.label, "path": None, "reason": panel.reason, "alt": panel.alt}
                entry["masks"] = panel.masks
                panels.append(entry)
                if panel.chart is None:
                    continue
                specifications[panel.name] = specification(panel.chart)
                caption = f"{figure.heading} {panel.label}. {figure.caption} {panel.alt}".replace("`", "").strip()
                size, files = save_chart(specifications[panel.name], self.folder / "figures", panel.name, caption)
                self._names |= {f"figures/{file}" for file in files}
                entry |= {"path": f"figures/{panel.name}", "name": panel.name, "width": size[0], "height": size[1]}
            shown.append({"figure": figure, "panels": panels, "charts": f"assets/charts_{key}.js"})
        if specifications:
            self.charts += len(specifications)
            text = json.dumps(specifications, ensure_ascii=True, separators=(",", ":"))
            self.text(f"assets/charts_{key}.js", f"segtrustCharts({text});\n")
        return shown

    def slices(self, shown):
        self._names |= {panel["path"] for entry in shown for panel in entry["panels"]}
        return shown

    def remove_others(self):
        """Remove files of earlier reports from the folders that belong to the report alone."""
        for name in self.FOLDERS:
            for path in (self.folder / name).glob("*"):
                if f"{name}/{path.name}" not in self._names:
                    path.unlink()


def _section(run, results, written, settings, sheet, reasons):
    """Write figures and tables of one model, and return what the template says about it."""
    folder, pages = written.folder, _pages(written.folder, run.name)
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
        section["verdicts"] = {
            region: verdict(region, cells_of(table, region), stratum_groups(run.strata, run.patients, region))
            for region in REGIONS
        }
        section["figures"] = written.figures(run.name, figures_of(run, settings["n_bins"], pages))
        section["tables"] = _write_tables(run, written, table, settings["n_bins"])
    slices = write_slices(run, results, folder, settings["background"], sheet, pages)
    section["slices"] = written.slices(slices)
    return section


def _pages(folder, model):
    """Return {patient: address of its page} of a model, of those that have one."""
    order = folder / "patients" / model / "order.js"
    patients = with_page(read_order(order)) if order.exists() else []
    return {patient: f"patients/{model}/{patient}.html" for patient in patients}


def _overview(sections):
    """Return what the first screen says: [(region, headlines, [(model, {key: Cell}, findings)])]."""
    shown = []
    for region in REGIONS if sections else ():
        rows = [
            {
                "model": section["name"],
                "cells": cells_of(section["table"], region),
                "findings": [(finding, _anchor(section, finding)) for finding in section["verdicts"][region]],
            }
            for section in sections
        ]
        findings = {section["name"]: section["verdicts"][region] for section in sections}
        shown.append({"region": region, "headlines": headlines(findings), "rows": rows})
    return shown


def _anchor(section, finding):
    """Return the address of the figure that shows a finding; that of the model where it was not drawn."""
    drawn = {entry["figure"].key for entry in section["figures"]}
    return f"#{section['name']}-{finding.figure}" if finding.figure in drawn else f"#model-{section['name']}"


def _pairs(runs, results, written):
    """Write figures and tables of the differences of models, and return what the template says about each pair."""
    path = results / "comparison" / "metrics.parquet"
    if len(runs) < 2 or not path.exists():
        return []
    metrics, _ = read_parquet(path)
    rows = family_rows(metrics.to_pandas())
    if rows.empty:
        return []
    names = {run.name for run in runs}
    rows = rows[rows["model"].isin(names) & rows["reference_model"].isin(names)]
    caption = (
        "Paired differences between models, one family of tests: value of the first model minus that of the second, "
        "95 % interval, p after Holm's correction over all rows."
    )
    shown = rows.assign(
        difference=[f"{number(plain(row.value))} {_interval(row)}".strip() for row in rows.itertuples()],
        p=[number(plain(value)) for value in rows["p_value_holm"]],
    )[["model", "reference_model", "quantity", "region", "difference", "p", "n_cases"]]
    tables = written.table("comparison", rows, shown, caption)
    patients = {run.name: run.patients for run in runs}
    pairs = []
    for first, second in combinations([run.name for run in runs], 2):
        of_pair = rows[(rows["model"] == first) & (rows["reference_model"] == second)]
        if of_pair.empty:
            continue
        pages = {name: _pages(written.folder, name) for name in (first, second)}
        key = f"{first}_against_{second}"
        drawn = figures_of_pair(of_pair, patients, first, second, pages[first]) if len(pairs) < MOST_PAIRS_DRAWN else []
        apart = disagreements(patients, first, second)
        pairs.append(
            {
                "first": first,
                "second": second,
                "sentences": sentences(of_pair),
                "figures": written.figures(key, drawn),
                "tables": tables,
                "apart": [
                    {
                        **row,
                        "pages": [pages[name].get(row["patient"]) for name in (first, second)],
                        "shown": [number(row[name]) for name in ("first", "second", "difference")],
                    }
                    for row in apart.to_dict("records")
                ],
            }
        )
    return pairs


def _interval(row):
    return interval_text(plain(row.low), plain(row.high))


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


# --- tables ---


def _write_tables(run, written, table, n_bins):
    """Write the tables of one model; return [(name, [(kind, address)])]."""
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
    main = pd.DataFrame(
        [
            {"quantity": f"{line.label} ({line.where})"}
            | {region: f"{entry.text} {entry.bounds}".strip() for region, entry in zip(REGIONS, cells, strict=True)}
            for lines in table.values()
            for line, cells in lines
        ]
    )
    people = f"{run.patients['patient'].nunique():,} patients, {int(run.metrics['passes'].max())} passes"
    made = {
        "main": (
            pd.DataFrame(lines),
            main,
            f"{run.name}: segmentation, ranking of errors and calibration, with 95 % intervals over subjects; "
            f"{people}, {n_bins} bins.",
        ),
        "strata": (
            run.strata,
            _strata_shown(run.strata),
            f"{run.name}: median Dice by stratum of the mean entropy in predicted_5mm, with 95 % intervals; {people}.",
        ),
        "patients": (run.patients, _patients_shown(run.patients), f"{run.name}: all patients; {people}."),
        "reliability": (run.curves[run.curves["curve"].isin([f"reliability_{kind}" for kind in KINDS])], None, ""),
    }
    points = convergence_points(run.metrics, n_bins)
    if len(points):
        made["convergence"] = (
            points,
            _convergence_shown(points),
            f"{run.name}: metrics after the first passes, with 95 % intervals; {people}.",
        )
    return [(name, written.table(f"{run.name}_{name}", *parts)) for name, parts in made.items()]


def _strata_shown(strata):
    rows = strata[(strata["measure"] == SCORE_MEASURE) & (strata["aggregation"] == SCORE_AGGREGATION)]
    return pd.DataFrame(
        {
            "region": rows["region"],
            "scheme": rows["scheme"],
            "stratum": rows["stratum"],
            "patients": rows["n_cases"],
            "median Dice": [
                f"{number(plain(median))} {interval_text(plain(low), plain(high))}".strip()
                for median, low, high in zip(rows["median_dice"], rows["ci_low"], rows["ci_high"], strict=True)
            ],
        }
    )


def _patients_shown(patients):
    names = {"dice": "Dice", "hd95": "HD95, mm", "volume_ml": "volume, ml", SCORE: "entropy, bits"}
    held = {label: patients[name] for name, label in names.items() if name in patients}
    shown = {label: [number(plain(value)) for value in values] for label, values in held.items()}
    return pd.DataFrame({"patient": patients["patient"], "region": patients["region"], **shown})


def _convergence_shown(points):
    values = [f"{number(row.value)} {_interval(row)}".strip() for row in points.itertuples()]
    return points[["quantity", "region", "passes"]].assign(value=values)
