import itertools
import json

import numpy as np
import pytest

from segtrust import alarms
from segtrust.regions import CLASSES, REGIONS


def volumes(n_cases=5, seed=0):
    """Return nested region sizes in voxels, int64 (n_cases, 3)."""
    generator = np.random.default_rng(seed)
    return np.sort(generator.integers(500, 20_000, size=(n_cases, 3)), axis=1)[:, ::-1]


def overlap_of(predicted, reference):
    """Return |a ∩ b| of concentric regions: the smaller of the two sizes."""
    return np.minimum(predicted[:, :, np.newaxis], reference[:, np.newaxis, :])


@pytest.mark.parametrize("channels", list(itertools.permutations(range(3)))[1:])
def test_every_wrong_channel_order_is_found_and_named(channels):
    reference = volumes()
    predicted = reference[:, channels]
    found = alarms.channel_order(overlap_of(predicted, reference), predicted, reference, "m")
    assert found[0]["severity"] == "error"
    # Channel a, read as REGIONS[a], holds REGIONS[channels[a]].
    assert found[0]["value"]["order"] == [REGIONS[b] for b in channels]
    assert found[0]["value"]["dice"] == 1


def test_the_right_channel_order_raises_no_alarm():
    reference = volumes()
    assert alarms.channel_order(overlap_of(reference, reference), reference, reference, "m") == []


def test_an_order_that_is_little_better_raises_no_alarm():
    reference = np.array([[1000, 960, 920]])
    predicted = reference[:, [1, 0, 2]]
    assert alarms.channel_order(overlap_of(predicted, reference), predicted, reference, "m") == []


def classes_of(labels_read_as):
    """Return class counts of a perfect prediction whose reference label k was read as labels_read_as[k]."""
    table = np.zeros((1, 4, 5), np.int64)
    for label, (read, n) in enumerate(zip(labels_read_as, (9000, 300, 4000, 1200), strict=True)):
        table[0, label, read] += n
    return table


def test_a_swapped_coding_is_found_and_named():
    # Written by the decathlon (1 ED, 2 NCR), read as BraTS 2023 (1 NCR, 2 ED).
    found = alarms.coding(classes_of((0, 2, 1, 3)), ["brats2023"], "m")
    assert found[0]["value"]["coding"] == "msd"
    assert "coding" in found[0]["message"]


def test_an_enhancing_tumour_read_as_a_cavity_is_found():
    found = alarms.coding(classes_of((0, 1, 2, 4)), ["brats2024"], "m")
    assert found[0]["value"]["coding"] == "brats2021"


def test_the_right_coding_raises_no_alarm():
    assert alarms.coding(classes_of((0, 1, 2, 3)), ["brats2021"], "m") == []


@pytest.mark.parametrize("order", [(0, 1, 3, 2), (0, 3, 2, 1), (1, 2, 3, 0)])
def test_a_wrong_order_of_softmax_classes_is_found_and_named(order):
    # A perfect prediction whose class k is called number k, but is order[k].
    found = alarms.class_order(classes_of((0, 1, 2, 3))[:, list(order)], "m")
    assert found[0]["value"]["order"] == [CLASSES[label] for label in order]
    assert found[0]["value"]["dice"] == 1


def test_the_right_order_of_classes_raises_no_alarm():
    assert alarms.class_order(classes_of((0, 1, 2, 3)), "m") == []


def test_a_region_empty_in_every_reference_is_found():
    reference = volumes()
    reference[:, 2] = 0
    found = alarms.empty_regions(volumes(), reference, "m")
    assert [(alarm["alarm"], alarm["region"]) for alarm in found] == [("reference_always_empty", "ET")]


def test_a_region_never_predicted_is_found():
    predicted = volumes()
    predicted[:, 2] = 0
    found = alarms.empty_regions(predicted, volumes(), "m")
    assert [(alarm["alarm"], alarm["region"]) for alarm in found] == [("prediction_always_empty", "ET")]


def test_a_region_empty_in_one_patient_raises_no_alarm():
    reference = volumes()
    reference[0, 2] = 0
    assert alarms.empty_regions(volumes(), reference, "m") == []


def test_passes_without_any_variance_are_an_error():
    found = alarms.zero_variance(np.zeros((4, 3)), "m")
    assert {alarm["severity"] for alarm in found} == {"error"}


def test_a_single_patient_without_variance_is_a_warning():
    variance = np.ones((4, 3))
    variance[1, 0] = 0
    found = alarms.zero_variance(variance, "m")
    assert [(alarm["severity"], alarm["region"], alarm["value"]) for alarm in found] == [("warning", "WT", 1)]


def test_a_single_pass_has_no_variance_and_no_alarm():
    assert alarms.zero_variance(np.full((4, 3), np.nan), "m") == []


def test_the_patient_with_another_number_of_passes_is_named():
    found = alarms.unequal_passes(np.array([20, 20, 15]), ["a", "b", "c"], "m")
    assert "c (15)" in found[0]["message"]


def test_equal_passes_raise_no_alarm():
    assert alarms.unequal_passes(np.array([20, 20]), ["a", "b"], "m") == []


def test_a_measure_that_only_some_patients_have_names_the_others():
    found = alarms.differing_measures([{"entropy", "variance"}, {"entropy"}], ["a", "b"], "m")
    assert [(alarm["value"]["measure"], alarm["value"]["without"]) for alarm in found] == [("variance", ["b"])]


def test_the_same_measures_for_all_raise_no_alarm():
    assert alarms.differing_measures([{"entropy"}, {"entropy"}], ["a", "b"], "m") == []


def test_nine_patients_are_a_warning_and_ten_are_not():
    assert alarms.few_patients(9, "m")[0]["severity"] == "warning"
    assert alarms.few_patients(10, "m") == []


def test_nesting_breaks_name_the_worst_patient():
    found = alarms.nesting_breaks(np.array([0, 7, 3]), volumes(3), ["a", "b", "c"], "m")
    assert found[0]["severity"] == "note"
    assert "b (7), c (3)" in found[0]["message"]


def inside_of(dice, accuracy, confidence, ece):
    numbers = {"true_positives": 100, "accuracy": accuracy, "mean_confidence": confidence, "ece_top_label": ece}
    inside = {name: np.array([value], float) for name, value in numbers.items()}
    return alarms.infeasible(
        np.array([dice]), np.array([100]), inside, "ET", "predicted_5mm", "probability", ["a"], "m"
    )


def test_a_calibration_error_above_its_bound_is_an_error():
    # Accuracy 0.7 and confidence 0.98 allow at most 0.3 + 0.02.
    assert inside_of(0.8, 0.7, 0.98, 0.915)[0]["value"]["metric"] == "ece_top_label"
    assert inside_of(0.8, 0.7, 0.98, 0.315) == []


def test_an_accuracy_below_what_dice_implies_is_an_error():
    # Dice 0.8 implies an accuracy of at least 0.8 / 1.2.
    assert inside_of(0.8, 0.66, 0.98, 0.0)[0]["value"]["metric"] == "accuracy"
    assert inside_of(0.8, 0.67, 0.98, 0.0) == []


def test_dice_that_differs_between_tables_names_the_patient():
    found = alarms.differing_dice(np.array([0.5, 0.7]), np.array([0.5, 0.6]), "ET", ["a", "b"], "m")
    assert found[0]["value"] == ["b"]


def test_every_alarm_can_be_written_as_json():
    reference = volumes()
    found = alarms.channel_order(overlap_of(reference[:, ::-1], reference), reference[:, ::-1], reference, "m")
    found += alarms.unequal_passes(np.array([20, 15]), ["a", "b"], "m")
    found += alarms.nesting_breaks(np.array([7]), volumes(1), ["a"], "m")
    found += alarms.zero_variance(np.zeros((2, 3)), "m")
    found += alarms.few_patients(np.int64(3), "m")
    assert all(
        {"alarm", "severity", "model", "region", "message"} <= set(alarm) for alarm in json.loads(json.dumps(found))
    )
