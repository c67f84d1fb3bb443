"""Region probabilities, of arrays and of tensors."""

import numpy as np
import pytest
import torch

from segtrust.outputs import region_probability

KINDS = [lambda logits: np.asarray(logits, np.float32), torch.tensor]
CLASSES = ["background", "NCR", "ED", "ET"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("order", [["TC", "WT", "ET"], ["ET", "TC", "WT"], ["WT", "TC", "ET"]])
def test_sigmoid_regions_come_out_as_wt_tc_et_whatever_their_order(kind, order):
    logits = {"WT": 2.0, "TC": 0.0, "ET": -1.0}
    found = region_probability(kind([[[logits[region]] for region in order]]), order)
    assert np.allclose(found, torch.sigmoid(torch.tensor([[[2.0], [0.0], [-1.0]]])), atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("order", [CLASSES, ["ET", "background", "ED", "NCR"]])
def test_softmax_classes_add_up_to_nested_regions(kind, order):
    probability = {"background": 0.1, "NCR": 0.2, "ED": 0.3, "ET": 0.4}
    logits = np.log([[[probability[name]] for name in order]]).tolist()
    assert np.allclose(region_probability(kind(logits), {"softmax": order}), [[[0.9], [0.6], [0.4]]], atol=1e-6)


@pytest.mark.parametrize("scale", [1, 30, 300])
@pytest.mark.parametrize("outputs", [["TC", "WT", "ET"], {"softmax": CLASSES}])
def test_arrays_and_tensors_agree_and_stay_probabilities(scale, outputs):
    logits = scale * np.random.default_rng(0).normal(size=(2, len(outputs) if outputs == CLASSES else 4, 5, 4, 3))
    logits = logits[:, :3] if isinstance(outputs, list) else logits
    found = region_probability(logits.astype(np.float32), outputs)
    assert found.dtype == np.float32
    assert found.min() >= 0
    assert found.max() <= 1
    assert np.abs(found - region_probability(torch.tensor(logits), outputs).numpy()).max() < 1e-6
