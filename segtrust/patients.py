"""The patient sheet: who is in the study, where the files are, and what can be seen wrong before anything runs."""

import difflib
import os
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
from jsonschema import Draft202012Validator

from segtrust.config import schema
from segtrust.errors import PatientError, Problems, raise_if_any
from segtrust.preprocess import MODALITIES, check_shape, grid_problem
from segtrust.volumes import geometry_of, load_image

# columns of cohort/patients.parquet: how prediction and reference agree, and what else is known of a case and region
AGREEMENT_COLUMNS = (
    *("dice", "dice_deterministic", "delta_dice", "sensitivity", "precision"),
    *("hd95", "hd95_brats", "nsd_1mm"),
)
CASE_COLUMNS = (
    *AGREEMENT_COLUMNS,
    *("volume_ml", "volume_error_ml", "volume_median_ml", "volume_low_ml", "volume_high_ml", "pairwise_dice"),
)
# the sheet's further columns stand beside them under their own names
RESERVED_COLUMNS = frozenset(["model", "region", *CASE_COLUMNS, "both_empty", "missing_region"])
SAMPLED_SPLITS = ("calibration", "test")


@dataclass(frozen=True)
class Patient:
    """One row of the sheet.

    patient : checked identifier; subject : joins sessions of one person; split : train, validation, calibration, test
    scan : dict from each modality to a path, or {"image": path} of one 4-D file; seg : path, or None
    coding : a key of `segtrust.regions.CODINGS`; extra : the sheet's further columns
    """

    patient: str
    subject: str
    split: str
    coding: str
    scan: dict
    seg: str | None
    extra: dict = field(default_factory=dict)

    @property
    def files(self):
        """Return all files the sheet names for this patient, a dict from column to path."""
        return {**self.scan, **({"seg": self.seg} if self.seg else {})}


def read_sheet(path):
    """Return the patients of a sheet, in its order.

    path : tab-separated file; relative paths in it are relative to the sheet

    Raises Problems naming every row that cannot be used: bad or repeated ids, missing modalities, unknown codings.
    """
    path = Path(path)
    if not path.is_file():
        raise_if_any([f"no patient sheet {path}; write one with `segtrust init FOLDER`."])
    rows = _table(path)
    problems = _column_problems(rows, path)
    raise_if_any(problems)
    records = [{key: value.strip() for key, value in row.items()} for row in rows.to_dict("records")]
    validator = Draft202012Validator(schema("patients"))
    for number, record in enumerate(records, start=2):
        problems += [f"{path}, line {number}: {message}" for message in _row_problems(record, validator)]
    problems += _repeated(records, path)
    raise_if_any(problems)
    return [_patient(record, path.parent) for record in records]


def _table(path):
    """Return a sheet's cells as text, a DataFrame; a cell that a line leaves out is empty."""
    try:
        # with its first line as names pandas renames a repeated column, and shifts all of them where lines are longer
        cells = pd.read_csv(path, sep="\t", header=None, dtype=str, keep_default_na=False, encoding="utf-8").fillna("")
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        raise Problems(
            [f"{path}: no table of tab-separated UTF-8 text ({str(error).strip()}); save it again as such."]
        ) from error
    cells = cells.loc[:, (cells != "").any()]
    names = [name.strip() for name in cells.iloc[0]]
    return cells.iloc[1:].set_axis(names, axis="columns")


def _column_problems(rows, path):
    named = set(rows.columns)
    known = schema("patients")["properties"]
    problems = []
    if rows.columns.has_duplicates:
        problems.append(f"{path}: a column name is there twice: {', '.join(rows.columns)}.")
    if "patient" not in named:
        problems.append(
            f"{path}: no column `patient` among {', '.join(map(repr, rows.columns))}; columns are separated by tabs."
        )
    taken = [name for name in rows.columns if name in RESERVED_COLUMNS or name.startswith("score_")]
    if taken:
        problems.append(
            f"{path}: a column of the tables of results has the name {', '.join(map(repr, taken))}; call it otherwise."
        )
    if "image" not in named:
        for modality in (modality for modality in MODALITIES if modality not in named):
            close = difflib.get_close_matches(modality, named - set(known), n=1)
            hint = f" (is it {close[0]!r}?)" if close else ""
            problems.append(f"{path}: no column {modality!r}{hint}.")
    if not problems and rows.empty:
        problems.append(f"{path}: the sheet has no patients.")
    return problems


def _row_problems(record, validator):
    name = record["patient"]
    for error in validator.iter_errors(record):
        column = error.path[0] if error.path else "row"
        if column == "patient":
            yield (
                f"{name!r} is no usable patient id: expected letters, digits, '_', '.' and '-', beginning with a "
                "letter or digit, at most 100 of them (ids become parts of paths)."
            )
        elif error.validator == "enum":
            allowed = ", ".join(value for value in error.validator_value if value)
            yield f"{name}: {column} is {error.instance!r}, expected one of {allowed}."
        else:
            yield f"{name}: {column}: {error.message}."
    if not record.get("image"):
        missing = [modality for modality in MODALITIES if not record.get(modality)]
        if missing:
            yield f"{name}: no file is given for {', '.join(missing)}; all four modalities are needed."


def _repeated(records, path):
    lines = {}
    for number, record in enumerate(records, start=2):
        lines.setdefault(record["patient"].casefold(), []).append((number, record["patient"]))
    return [
        f"{path}: the patient id {rows[0][1]!r} is there {len(rows)} times, in lines "
        f"{', '.join(str(number) for number, _ in rows)} (upper and lower case count as one)."
        for rows in lines.values()
        if len(rows) > 1
    ]


def _patient(record, folder):
    columns = ("image",) if record.get("image") else MODALITIES
    properties = schema("patients")["properties"]
    return Patient(
        patient=record["patient"],
        subject=record.get("subject") or record["patient"],
        split=record.get("split") or properties["split"]["default"],
        coding=record.get("coding") or properties["coding"]["default"],
        scan={column: _path(record[column], folder) for column in columns},
        seg=_path(record["seg"], folder) if record.get("seg") else None,
        extra={column: value for column, value in record.items() if column not in properties},
    )


def _path(value, folder):
    return value if os.path.isabs(value) else os.path.normpath(os.path.join(folder, value))


def header_problems(patients):
    """Return what the headers of the patients' files show to be wrong, a dict from patient id to messages.

    Checks that every file is there and is an image, and that the files of a patient have the dimensions they should and
    lie on one grid. Voxels are not read.
    """
    problems = {patient.patient: _patient_problems(patient) for patient in patients}
    return {name: messages for name, messages in problems.items() if messages}


def _patient_problems(patient):
    problems, geometries = [], {}
    for column, path in patient.files.items():
        try:
            image = load_image(path, f"{patient.patient}, {column}")
            check_shape(image.shape, column, patient.patient, path)
            geometries[column] = geometry_of(image)
        except PatientError as error:
            problems.append(str(error))
    if len(geometries) > 1:
        problem = grid_problem(geometries, patient.patient)
        problems += [problem] if problem else []
    return problems
