"""Patients drawn by code with all that a page is made of."""

from dataclasses import dataclass, replace

import numpy as np
from conftest import LPS, draw_scan
from scipy.ndimage import gaussian_filter

from segtrust.moments import Accumulator
from segtrust.page import page
from segtrust.patients import Patient
from segtrust.pool import HeldTally
from segtrust.preprocess import preprocess
from segtrust.regions import canonical_labels, region_masks
from segtrust.score import numbers_of, score
from segtrust.tally import Tally
from segtrust.volumes import Geometry
from segtrust.voxels import voxels

SHAPE = (20, 22, 18)
N_PASSES = 3


@dataclass(frozen=True)
class Drawn:
    """A patient: `scan` (Preprocessed), `summary` of the passes and `labels`, both on the patient's own grid."""

    scan: object
    summary: object
    labels: np.ndarray | None
    person: Patient
    numbers: dict

    def page(self, **changes):
        known = {"model": "a-model", "background": "t1ce", "provenance": {"model": {"weights": "0123"}}}
        return page(self.scan, self.summary.probability, self.labels, self.person, self.numbers, **{**known, **changes})

    def written(self, folder, **changes):
        """Write the page and return its path."""
        path = folder / f"{self.person.patient}.html"
        path.write_text(self.page(**changes), encoding="utf-8")
        return path


def drawn(patient="p0", seed=0, reference=True, without=(), empty=(), noise=0.7, **extra):
    """Return a Drawn patient on an LPS grid.

    without : places of regions that no voxel of the prediction is in; empty : labels that the reference lacks
    """
    geometry = Geometry(SHAPE, LPS)
    image, codes = draw_scan(seed, SHAPE)
    labels = canonical_labels(codes, "brats2021", patient, "drawn")
    labels[np.isin(labels, empty)] = 0
    scan = preprocess(image.astype(np.float32), geometry)
    truth = region_masks(canonical_labels(codes, "brats2021", patient, "drawn"))
    smooth = np.stack([gaussian_filter(part.astype(np.float32), 1) for part in truth]).clip(1e-4, 1 - 1e-4)
    generator = np.random.default_rng(seed)
    passes = Accumulator(SHAPE, "drawn")
    for number in range(N_PASSES):
        logit = np.log(smooth / (1 - smooth)) + noise * generator.normal(size=smooth.shape)
        probability = 1 / (1 + np.exp(-logit))
        for place in without:
            probability[place] *= 0.4
        passes.add(number, probability.astype(np.float32))
    # the box of these moments is the whole grid, already canonical in its turned form
    summary = passes.moments((0, 0, 0), geometry).summary(N_PASSES)
    places = {"spacing_mm": geometry.spacing_mm, "patient": patient}
    if reference:
        numbers = numbers_of(HeldTally(Tally.of(voxels(summary, labels, scan.brain, scan.brain_t1, **places))))
    else:
        numbers = score(summary, scan.brain, scan.brain_t1, **places)
    person = Patient(patient, patient, "test", "brats2021", {}, "seg.nii.gz" if reference else None, extra)
    return Drawn(scan, summary, labels if reference else None, person, numbers)


def renamed(patient, name):
    """Return a Drawn patient under another id, which need not be one that a sheet may have."""
    return replace(patient, person=replace(patient.person, patient=name, subject=name))
