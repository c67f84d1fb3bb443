"""Find the patients of a data folder by the way its files are named.

Known layouts: BraTS 2017–2021 (`ID_t1ce.nii.gz`), BraTS 2023 and later (`ID-t1c.nii.gz`), Medical Segmentation
Decathlon (dataset.json, 4-D images) and nnU-Net raw (dataset.json, `ID_0000.nii.gz`).
"""

import os
import re
from collections import defaultdict
from pathlib import Path

from segtrust.errors import SegtrustError, raise_if_any
from segtrust.files import read_json
from segtrust.preprocess import MODALITIES, MSD_CHANNELS

NIFTI = (".nii.gz", ".nii")

# layout -> (separator, ending in the file name -> column of the sheet, coding)
NAMED_LAYOUTS = {
    "BraTS 2017–2021": (
        "_",
        {"t1": "t1", "t1ce": "t1ce", "t2": "t2", "flair": "flair", "seg": "seg"},
        "brats2021",
    ),
    "BraTS 2023": (
        "-",
        {"t1n": "t1", "t1c": "t1ce", "t2w": "t2", "t2f": "flair", "seg": "seg"},
        "brats2023",
    ),
}

CHANNEL_NAMES = {
    "t1": "t1",
    "t1w": "t1",
    "t1n": "t1",
    "t1ce": "t1ce",
    "t1gd": "t1ce",
    "t1c": "t1ce",
    "t2": "t2",
    "t2w": "t2",
    "flair": "flair",
    "t2f": "flair",
}


def find_patients(folder):
    """Return the patients of a folder.

    folder : path of a cohort in one of the known layouts

    Returns (name of the layout, list of dicts with the columns of the sheet; paths are absolute). Raises SegtrustError
    when no layout fits, and Problems naming every patient with missing or doubled files.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise SegtrustError(f"no such folder: {folder}")
    if (folder / "dataset.json").is_file():
        return _from_dataset(folder.resolve(), read_json(folder / "dataset.json"))
    files = sorted(_nifti_files(folder.resolve()))
    found = {layout: _by_patient(files, *rule[:2]) for layout, rule in NAMED_LAYOUTS.items()}
    found = {layout: patients for layout, patients in found.items() if patients}
    if not found:
        raise SegtrustError(
            f"no scan in a known layout under {folder} ({len(files):,} NIfTI files seen); expected names such as "
            "ID_t1ce.nii.gz (BraTS 2017–2021), ID-t1c.nii.gz (BraTS 2023), or a dataset.json (Medical Segmentation "
            "Decathlon, nnU-Net). Other names: write patients.tsv by hand."
        )
    rows, problems = [], []
    for layout, patients in found.items():
        layout_rows, layout_problems = _rows(patients, NAMED_LAYOUTS[layout][2])
        rows += layout_rows
        problems += layout_problems
    raise_if_any(problems)
    return " and ".join(found), sorted(rows, key=lambda row: row["patient"])


def _nifti_files(folder):
    """Yield the NIfTI files at any depth, links to folders followed, hidden files (macOS leaves `._` ones) left out."""
    seen = set()
    for place, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:
            folders.clear()  # a link that leads back
            continue
        seen.add(real)
        yield from (
            Path(place, name)
            for name in names
            if name.endswith(NIFTI) and name[0] != "." and Path(place, name).is_file()
        )


def _by_patient(files, separator, endings):
    """Group files by patient: id -> column -> list of paths."""
    pattern = re.compile(rf"(.+){re.escape(separator)}({'|'.join(endings)})\.nii(?:\.gz)?", re.IGNORECASE)
    patients = defaultdict(lambda: defaultdict(list))
    for path in files:
        match = pattern.fullmatch(path.name)
        if match:
            patients[match[1]][endings[match[2].lower()]].append(path)
    return patients


def _rows(patients, coding):
    rows, problems = [], []
    for name, columns in patients.items():
        missing = [modality for modality in MODALITIES if modality not in columns]
        doubled = [column for column, paths in columns.items() if len(paths) > 1]
        if missing:
            seen = sorted(str(path.name) for paths in columns.values() for path in paths)
            problems.append(f"{name}: no file for {', '.join(missing)}; found only {', '.join(seen)}.")
        problems += [
            f"{name}: {len(columns[column])} files for {column}: {', '.join(map(str, columns[column]))}."
            for column in doubled
        ]
        if not missing and not doubled:
            rows.append(
                {"patient": name, **{column: str(paths[0]) for column, paths in columns.items()}, "coding": coding}
            )
    return rows, problems


def _from_dataset(folder, dataset):
    coding = _coding(dataset.get("labels", {}))
    channels = dataset.get("channel_names") or dataset.get("modality")
    if not channels:
        raise SegtrustError(f"{folder / 'dataset.json'} has neither channel_names nor modality")
    columns = {int(number): CHANNEL_NAMES.get(str(name).casefold()) for number, name in channels.items()}
    if sorted(filter(None, columns.values())) != sorted(MODALITIES):
        raise SegtrustError(
            f"{folder / 'dataset.json'}: channels are {', '.join(map(str, channels.values()))}; expected T1, T1ce "
            "(T1gd), T2 and FLAIR."
        )
    images = sorted(
        path for path in (folder / "imagesTr").glob("*") if path.name.endswith(NIFTI) and path.name[0] != "."
    )
    numbered = re.compile(r"(.+)_(\d{4})\.nii(?:\.gz)?")
    if any(numbered.fullmatch(path.name) for path in images):
        patients = defaultdict(lambda: defaultdict(list))
        for path in images:
            match = numbered.fullmatch(path.name)
            if match and int(match[2]) in columns:
                patients[match[1]][columns[int(match[2])]].append(path)
        layout = "nnU-Net raw"
    else:
        order = tuple(columns[number] for number in sorted(columns))
        if order != MSD_CHANNELS:
            raise SegtrustError(
                f"{folder / 'dataset.json'}: channels of 4-D files are read as FLAIR, T1, T1gd, T2; found {order}"
            )
        patients = {_stem(path): {"image": [path]} for path in images}
        layout = "Medical Segmentation Decathlon"
    for name, found in patients.items():
        labels = _labels(folder, name)
        if labels:
            found["seg"] = labels
    if layout == "nnU-Net raw":
        rows, problems = _rows(patients, coding)
        raise_if_any(problems)
    else:
        rows = [
            {"patient": name, **{column: str(paths[0]) for column, paths in found.items()}, "coding": coding}
            for name, found in patients.items()
        ]
    if not rows:
        raise SegtrustError(f"{folder / 'imagesTr'} holds no NIfTI file")
    return layout, rows


def _coding(labels):
    """Return the coding that the labels of a dataset.json describe; the Decathlon's where they do not say.

    labels : {"1": "edema", …} as the Decathlon has it, or {"edema": 1, "whole tumor": [1, 2, 3], …} as nnU-Net has it
    """
    codes = {}
    for key, value in labels.items():
        name, code = (value, key) if str(key).isdigit() else (key, value)
        codes[str(name).casefold()] = {int(each) for each in (code if isinstance(code, list) else [code])}
    for name, found in codes.items():
        # oedema is what is tumour and not core
        if "dema" in name and found in ({1}, {2}):
            return "msd" if found == {1} else "brats2023"
        if "core" in name and found in ({2, 3}, {1, 3}):
            return "msd" if found == {2, 3} else "brats2023"
    return "msd"


def _labels(folder, name):
    return [path for ending in NIFTI if (path := folder / "labelsTr" / f"{name}{ending}").is_file()][:1]


def _stem(path):
    return path.name.removesuffix(".gz").removesuffix(".nii")


def sheet_path(path, folder):
    """Return a path as it should stand in a sheet in `folder`: relative where both share a folder below the root."""
    folder = os.path.abspath(folder)
    shared = os.path.commonpath([path, folder])
    return os.path.relpath(path, folder) if len(Path(shared).parts) > 1 else str(path)
