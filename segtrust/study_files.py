"""Start a study from a data folder: the patient sheet, a commented configuration, and a table of what was found."""

from collections import Counter
from pathlib import Path

from segtrust.config import ROOT
from segtrust.errors import SegtrustError, raise_if_any
from segtrust.files import replacing
from segtrust.layouts import find_patients, sheet_path
from segtrust.patients import header_problems, read_sheet
from segtrust.preprocess import MODALITIES
from segtrust.progress import progress
from segtrust.regions import CODINGS
from segtrust.volumes import geometry_of, load_image

TEMPLATE = ROOT / "studies" / "template.yaml"


def start_study(folder, study, coding, replace):
    """Write `patients.tsv` and `config.yaml` into a study folder, from the patients of a data folder.

    coding : overrides what the file names suggest, or None
    replace : whether files that are there may be replaced

    Returns a table of what was found, as text. Raises SegtrustError when files are there already, and Problems naming
    every patient whose files are incomplete, unreadable or on different grids; nothing is written then.
    """
    # as jobs see it: relative paths that go up from a linked folder would end elsewhere
    study = Path(study).resolve()
    sheet, config = study / "patients.tsv", study / "config.yaml"
    there = [str(path) for path in (sheet, config) if path.exists()]
    if there and not replace:
        raise SegtrustError(f"{' and '.join(there)} exist already; give another folder, or --force to replace them")
    if coding is not None and coding not in CODINGS:
        raise SegtrustError(f"unknown coding {coding!r}; expected one of {', '.join(CODINGS)}")
    layout, rows = find_patients(folder)
    study.mkdir(parents=True, exist_ok=True)
    columns = ["patient", *_scan_columns(rows), "seg", "coding", "split"]
    lines = ["\t".join(columns)]
    for row in rows:
        cells = {**row, "coding": coding or row["coding"], "split": "test"}
        paths = {column: sheet_path(row[column], study) for column in (*MODALITIES, "image", "seg") if column in row}
        lines.append("\t".join({**cells, **paths}.get(column, "") for column in columns))
    with replacing(sheet) as partial:
        partial.write_text("\n".join(lines) + "\n", encoding="utf-8")
        patients = read_sheet(partial)
        problems = header_problems(progress(patients, "patients checked"))
        raise_if_any([message for messages in problems.values() for message in messages])
    with replacing(config) as partial:
        partial.write_text(TEMPLATE.read_text(encoding="utf-8"), encoding="utf-8")
    return _found(folder, layout, patients, sheet, config)


def _scan_columns(rows):
    columns = [*MODALITIES, "image"]
    return [column for column in columns if any(column in row for row in rows)]


def _found(folder, layout, patients, sheet, config):
    grids = Counter(
        geometry_of(load_image(next(iter(patient.scan.values())), patient.patient)).describe() for patient in patients
    )
    codings = Counter(patient.coding for patient in patients)
    without = [patient.patient for patient in patients if not patient.seg]
    lines = [
        f"layout      {layout}, in {folder}",
        f"patients    {len(patients):,}, {len(patients) - len(without):,} with reference labels",
        f"coding      {', '.join(f'{name} ({count:,})' for name, count in codings.items())}",
        *(f"grid        {grid} ({count:,})" for grid, count in grids.most_common()),
        f"written     {sheet}, {config}",
    ]
    if without:
        shown = ", ".join(without[:10]) + (", …" if len(without) > 10 else "")
        lines.append(f"note        without reference, so maps only: {shown}")
    lines.append("next        name your model in config.yaml, then: segtrust run -n (what would be done), segtrust run")
    return "\n".join(lines)
