import numpy as np
import pandas as pd

from segtrust import slices


def test_best_median_and_worst_are_different_patients_with_maps():
    patients = pd.DataFrame({"patient": list("abcd"), "region": "WT", "dice": [0.9, 0.2, 0.5, 0.7]})
    assert [patient for _, patient in slices.showcase(patients, list("abcd"))] == ["a", "c", "b"]
    assert [patient for _, patient in slices.showcase(patients, ["a", "b"])] == ["a", "b"]
    assert [patient for _, patient in slices.showcase(patients, [])] == []
    assert [patient for _, patient in slices.showcase(None, list("dcba"))] == ["a", "b", "c"]


def test_a_slice_shows_the_right_of_the_patient_on_the_left():
    plane = np.zeros((4, 3))  # columns towards the right of the patient, rows towards anterior
    plane[3, 2] = 1
    assert slices._radiological(plane)[0, 0] == 1


def test_a_mask_without_voxels_draws_no_contour():
    scan = np.arange(1.0, 21).reshape(4, 5)
    nothing = np.zeros((3, 4, 5), bool)
    figure = slices.scan_panel(scan, nothing, nothing, (1, 1), "t1ce")
    assert not figure.axes[0].collections
