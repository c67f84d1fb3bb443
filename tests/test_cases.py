"""Training cases: image and labels in one box."""

import numpy as np
from conftest import LPS, draw_scan, write_patient

from segtrust.cases import Cases
from segtrust.preprocess import preprocess, read_modalities, write_preprocessed
from segtrust.regions import canonical_labels


def test_labels_lie_where_the_image_has_them(tmp_path):
    paths = write_patient(tmp_path, "p", 0, affine=LPS)
    scan = preprocess(*read_modalities({name: paths[name] for name in paths if name != "seg"}, "p"))
    write_preprocessed(tmp_path / "p.safetensors", scan, {})
    cases = Cases([tmp_path / "p.safetensors"], [paths["seg"]], ["p"], ["brats2021"])
    image, labels = cases[0]
    assert len(cases) == 1
    assert image.shape[1:] == labels.shape
    expected = canonical_labels(draw_scan(0)[1], "brats2021", "p", "f")
    assert np.array_equal(scan.place(labels), expected)


def test_a_case_is_read_once_while_all_fit_into_memory(tmp_path):
    paths = write_patient(tmp_path, "p", 0)
    scan = preprocess(*read_modalities({name: paths[name] for name in paths if name != "seg"}, "p"))
    write_preprocessed(tmp_path / "p.safetensors", scan, {})
    cases = Cases([tmp_path / "p.safetensors"], [paths["seg"]], ["p"], ["brats2021"])
    assert cases[0][0] is cases[0][0]
