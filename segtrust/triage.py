"""Triage: the test patients of one model in a table to sort and filter, and their order, which all pages share.

Patients with a reference come from the table `patients` of the cohort, those without from their scores.
"""

import pandas as pd

from segtrust.files import read_json, read_parquet
from segtrust.html import environment
from segtrust.order import SCORE, with_page
from segtrust.regions import REGIONS

MEASURED = {"dice": "Dice", SCORE: "Entropy, bits", "volume_ml": "Predicted, ml"}
DIGITS = {"dice": 3, SCORE: 3, "volume_ml": 1}
NO_REFERENCE = "no reference"


def cases_of_patients(people, patients, scores):
    """Return what is known of each patient, a list of dicts in the order of `people`.

    people : list of Patient
    patients : DataFrame, the cohort's table `patients` (a row per patient and region); or None
    scores : dict from the id of a patient without a reference to its numbers, of `segtrust.score`

    Keys: `patient`, `person`, `notes` (list of text), and for each name of `MEASURED` a dict from region, and `mean`
    over the regions that have one, to a number; None for null.
    """
    held = {}
    if patients is not None:
        names = [*MEASURED, "missing_region", "both_empty"]
        rows = patients[["patient", "region", *names]].astype(object).where(patients.notna(), None)
        for row in rows.to_dict("records"):
            held.setdefault(row["patient"], {})[row["region"]] = row
    cases = []
    for person in people:
        numbers = held.get(person.patient) or scores.get(person.patient) or {region: {} for region in REGIONS}
        case = {"patient": person.patient, "person": person, "notes": _notes(numbers, person.patient in held)}
        for name in MEASURED:
            found = {region: numbers[region].get(name) for region in REGIONS}
            known = [value for value in found.values() if value is not None]
            case[name] = {**found, "mean": sum(known) / len(known) if known else None}
        cases.append(case)
    return cases


def _notes(numbers, has_reference):
    notes = [] if has_reference else [NO_REFERENCE]
    for region in REGIONS:
        if numbers[region].get("missing_region"):
            absent = "absent" if numbers[region].get("both_empty") else "missed"
            notes.append(f"{region} {absent if has_reference else 'not predicted'}")
    return notes


def triage(cases, order, *, model):
    """Return the list of patients, as HTML text.

    cases : of `cases_of_patients`; order : of `order_of`; model : name
    """
    columns, table = table_of(cases)
    linked = set(with_page(order))
    content = {
        "columns": columns,
        "rows": table,
        "pages": [case["patient"] in linked for case in cases],
        "folder": f"../patients/{model}/",
    }
    return (
        environment()
        .get_template("triage.html")
        .render(
            model=model,
            content=content,
            n_patients=len(cases),
            n_pages=len(linked),
            n_without=sum(NO_REFERENCE in case["notes"] for case in cases),
            n_further=sum(column["further"] for column in columns),
        )
    )


def table_of(cases):
    """Return (columns, rows) of the list.

    columns : list of dicts: `name`, `group`, `kind` (text or number), `further` (whether it is the sheet's)
    rows : list of lists; a number is text as it is shown, "" for null
    """
    columns = [_column("Patient", "", "text"), _column("Notes", "", "text")]
    rows = [[case["patient"], ", ".join(case["notes"])] for case in cases]
    for name, label in MEASURED.items():
        parts = REGIONS if name == "volume_ml" else ("mean", *REGIONS)
        if all(case[name]["mean"] is None for case in cases):
            continue
        for part in parts:
            columns.append(_column(part, label, "number"))
            for row, case in zip(rows, cases, strict=True):
                row.append("" if case[name][part] is None else f"{case[name][part]:.{DIGITS[name]}f}")
    sheets = [_of_sheet(case["person"]) for case in cases]
    for name in dict.fromkeys(name for sheet in sheets for name in sheet):
        values = [sheet.get(name, "") for sheet in sheets]
        columns.append(_column(name, "Patient sheet", "number" if _are_numbers(values) else "text", further=True))
        for row, value in zip(rows, values, strict=True):
            row.append(value)
    return columns, rows


def _column(name, group, kind, further=False):
    return {"name": name, "group": group, "kind": kind, "further": further}


def _of_sheet(person):
    own = {"subject": person.subject} if person.subject != person.patient else {}
    return own | {name: str(value) for name, value in person.extra.items()}


def _are_numbers(values):
    known = pd.Series([value for value in values if value != ""], dtype=object)
    return bool(len(known)) and bool(pd.to_numeric(known, errors="coerce").notna().all())


def read_patients(path):
    """Return the cohort's table `patients`, a DataFrame; None without a path."""
    return read_parquet(path)[0].to_pandas() if path else None


def read_scores(paths, patients):
    """Return the numbers of patients without a reference, a dict from id; paths, patients : lists as long."""
    return {patient: read_json(path)["regions"] for patient, path in zip(patients, paths, strict=True)}
