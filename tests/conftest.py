"""Small patients, drawn by code, that tests write to disk."""

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

LPS = np.array([[-1.0, 0, 0, 0], [0, -1.0, 0, 20], [0, 0, 1.0, 0], [0, 0, 0, 1]])
SHAPE = (20, 22, 18)
MODALITIES = ("t1", "t1ce", "t2", "flair")


def save(path, array, affine=LPS):
    """Write an array as NIfTI and return its path as text."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, affine), path)
    return str(path)


def draw_scan(seed, shape=SHAPE):
    """Return (scan int16 (4, x, y, z), codes uint8 with 0, 1, 2, 4): a brain box with a nested tumour."""
    generator = np.random.default_rng(seed)
    scan = np.zeros((4, *shape), np.int16)
    inside = tuple(slice(2, size - 3) for size in shape)
    scan[(slice(None), *inside)] = generator.integers(100, 900, scan[(slice(None), *inside)].shape)
    codes = np.zeros(shape, np.uint8)
    codes[5:14, 6:15, 4:12] = 2
    codes[7:12, 8:13, 5:10] = 1
    codes[8:11, 9:12, 6:9] = 4
    return scan, codes


def write_patient(folder, patient, seed, affine=LPS, seg=True, shape=SHAPE):
    """Write one patient in BraTS 2021 layout; return a dict from column to path."""
    scan, codes = draw_scan(seed, shape)
    folder = Path(folder) / patient
    paths = {m: save(folder / f"{patient}_{m}.nii.gz", scan[i], affine) for i, m in enumerate(MODALITIES)}
    if seg:
        paths["seg"] = save(folder / f"{patient}_seg.nii.gz", codes, affine)
    return paths


def write_sheet(path, rows):
    """Write rows (dicts) as a patient sheet; return its path."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    lines = ["\t".join(columns), *("\t".join(str(row.get(column, "")) for column in columns) for row in rows)]
    Path(path).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return Path(path)


@pytest.fixture
def cohort(tmp_path):
    """A folder with three patients and their sheet."""
    rows = [{"patient": f"p{i}", **write_patient(tmp_path / "data", f"p{i}", i)} for i in range(3)]
    write_sheet(tmp_path / "patients.tsv", rows)
    return tmp_path


def pytest_collection_modifyitems(items):
    """Call tests in a browser slow."""
    for item in items:
        if "chromium" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def chromium():
    """A headless Chromium, as `browser.opened` takes it."""
    import browser

    with browser.started() as started:
        yield started
