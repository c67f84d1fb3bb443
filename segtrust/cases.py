"""Training cases: preprocessed scans with their labels in the same box."""

import os
from functools import cached_property

from segtrust.errors import PatientError, Problems, of_patient
from segtrust.preprocess import read_preprocessed
from segtrust.volumes import read_reference

CACHED_BYTES = 6 * 2**30


class Cases:
    """A sequence of (image float32 (4, x, y, z), canonical labels uint8 (x, y, z)) read from files.

    scans, references : lists of paths of preprocessed scans and of label files
    patients, codings : lists as long

    Cases are kept in memory while all of them fit into `CACHED_BYTES`, and read at every access otherwise.
    """

    def __init__(self, scans, references, patients, codings):
        self._rows = list(zip(scans, references, patients, codings, strict=True))
        self._held = {}

    def __len__(self):
        return len(self._rows)

    def __getitem__(self, index):
        if index in self._held:
            return self._held[index]
        case = read_case(*self._rows[index])
        if self._fits:
            self._held[index] = case
        return case

    @cached_property
    def _fits(self):
        # preprocessed scans are not compressed, and labels are small beside them
        return sum(os.path.getsize(scan) for scan, *_ in self._rows) < CACHED_BYTES


def read_case(scan_path, reference_path, patient, coding):
    """Return (image float32 (4, x, y, z), canonical labels uint8 (x, y, z)) in the brain box."""
    scan, labels = read_with_reference(scan_path, reference_path, patient, coding)
    return scan.image, scan.geometry.to_canonical(labels)[scan.box]


def read_with_reference(scan_path, reference_path, patient, coding):
    """Return (Preprocessed, canonical labels uint8 (x, y, z) on the patient's own grid).

    Raises PatientError, which names the patient and the files, where the reference cannot be used.
    """
    scan, _ = read_preprocessed(scan_path)
    with of_patient(patient, [scan_path, reference_path], coding):
        return scan, read_reference(reference_path, coding, patient, scan.geometry).labels


def checked(*sequences):
    """Return sequences of cases after reading every one; Problems names all that cannot be used."""
    bad = []
    for cases in sequences:
        for index in range(len(cases)):
            try:
                cases[index]
            except PatientError as error:
                bad.append(error)
    if bad:
        raise Problems(bad)
    return sequences
