"""Training cases: preprocessed scans with their labels in the same box."""

from functools import cached_property

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
        image, labels = read_case(*self._rows[0])
        return len(self._rows) * (image.nbytes + labels.nbytes) < CACHED_BYTES


def read_case(scan_path, reference_path, patient, coding):
    """Return (image float32 (4, x, y, z), canonical labels uint8 (x, y, z)) in the brain box."""
    scan, _ = read_preprocessed(scan_path)
    labels = read_reference(reference_path, coding, patient, scan.geometry).labels
    return scan.image, scan.geometry.to_canonical(labels)[scan.box]
