"""Injected dropout: where it is put, which rate is taken, and the scale of its uncertainty."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import LPS, draw_scan, write_patient
from scipy.spatial.distance import cdist
from sklearn.metrics import log_loss
from torch import nn

from segtrust.backends import TorchBackend, rate_of
from segtrust.draws import Layer, draw_masks, multipliers
from segtrust.dropout import Stochastic, inject, matching, silence
from segtrust.errors import PatientError, SegtrustError
from segtrust.files import canonical_json, write_json
from segtrust.inject import RATES, Calibration, choose, fit, point, scale_of
from segtrust.masks import predicted_5mm
from segtrust.networks import build, with_dropout
from segtrust.preprocess import MODALITIES, Preprocessed, preprocess, read_modalities, write_preprocessed
from segtrust.regions import REGIONS, canonical_labels
from segtrust.sample import sample
from segtrust.sources import Source
from segtrust.volumes import Geometry

# --- where dropout is put ---


def a_network(dropout=0.0):
    return build(
        {"name": "UNet-Res", "channels": [4, 8], "strides": [2], "dropout": dropout, "out_channels": 3}, seed=2
    )


def an_image(n=1):
    return torch.randn(n, 4, 8, 8, 8, generator=torch.Generator().manual_seed(0))


NAMES = ["down", "down.0", "down.0.conv1", "down.0.conv1.conv", "down.1", "downs.0", "up.0.conv1"]


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (["down.0"], ["down.0"]),
        (["down.*"], ["down.0", "down.1"]),
        (["down.**"], ["down.0", "down.0.conv1", "down.0.conv1.conv", "down.1"]),
        (["**.conv1"], ["down.0.conv1", "up.0.conv1"]),
        (["*.0"], ["down.0", "downs.0"]),
        (["down*.0"], ["down.0", "downs.0"]),
        (["**"], NAMES),
        (["up.**", "down"], ["down", "up.0.conv1"]),
        (["dow"], []),
    ],
)
def test_one_star_stays_within_a_part_of_a_name_and_two_cross_dots(patterns, expected):
    assert matching(NAMES, patterns) == expected


def test_a_dot_and_a_bracket_in_a_pattern_mean_themselves():
    assert matching(["a.b", "axb", "a[0]", "a0"], ["a.b", "a[0]"]) == ["a.b", "a[0]"]


def test_the_layers_followed_are_told_and_become_the_active_layers():
    network = a_network()
    assert inject(network, ["model.0", "model.2.*"], 0.3, "channel") == ["model.0", "model.2.0", "model.2.1"]
    assert Stochastic(network).layers == [
        Layer(f"{name}.injected", "channel", 0.3) for name in ("model.0", "model.2.0", "model.2.1")
    ]


def test_a_layer_and_one_inside_it_are_both_followed():
    network = a_network()
    inject(network, ["model.0", "model.0.conv.unit0"], 0.2, "element")
    names = {layer.name for layer in Stochastic(network).layers}
    assert names == {"model.0.layer.conv.unit0.injected", "model.0.injected"}


def test_a_layer_with_two_names_is_followed_once_and_dropped_at_each_call():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Identity()
            self.second = self.first

        def forward(self, image):
            return self.second(self.first(image))

    network = Twice()
    assert inject(network, ["*"], 0.5, "channel") == ["first", "second"]
    stochastic = Stochastic(network)
    assert stochastic.mask_shapes((2, 4, 4, 4)) == {"first.injected": [(1, 2, 1, 1, 1)] * 2}
    halves = [torch.tensor([keep, 2.0]).reshape(1, 2, 1, 1, 1) for keep in (2.0, 0.0)]
    out = stochastic(torch.ones(1, 2, 4, 4, 4), {"first.injected": halves})
    assert out[0, :, 0, 0, 0].tolist() == [0.0, 4.0]


def test_patterns_that_match_nothing_are_named():
    with pytest.raises(SegtrustError, match=r"no layer of UNet is named model\.9, up\.\*; `segtrust layers MODEL`"):
        inject(a_network(), ["model.9", "model.0", "up.*"], 0.1, "channel")


def test_injection_touches_no_weight():
    network = a_network()
    before = [tensor.clone() for tensor in network.state_dict().values()]
    inject(network, ["**.conv"], 0.3, "channel")
    after = list(network.state_dict().values())
    assert all(torch.equal(old, new) for old, new in zip(before, after, strict=True))


@torch.inference_mode()
def test_without_masks_an_injected_network_gives_the_bits_of_the_original():
    expected = a_network().eval()(an_image())
    network = a_network()
    inject(network, ["model.0", "model.1.**.adn"], 0.5, "element")
    assert torch.equal(Stochastic(network)(an_image()), expected)


@pytest.mark.parametrize("kind", ["channel", "element"])
@torch.inference_mode()
def test_masks_multiply_the_features_of_the_layer_they_follow(kind):
    network = nn.Sequential(nn.Conv3d(4, 6, 3, padding=1), nn.Conv3d(6, 2, 1))
    first, second = network
    inject(network, ["0"], 0.25, kind)
    stochastic = Stochastic(network)
    shapes = stochastic.mask_shapes((4, 8, 8, 8))
    assert shapes == {"0.injected": [(1, 6, 1, 1, 1) if kind == "channel" else (1, 6, 8, 8, 8)]}
    mask = draw_masks(stochastic.layers, shapes, 0, "a", "member0", 0)
    held = {
        name: [torch.from_numpy(call) for call in calls]
        for name, calls in multipliers(stochastic.layers, [mask]).items()
    }
    factor = torch.from_numpy(mask["0.injected"][0]).float() * np.float32(1 / 0.75)
    assert 0 < (factor == 0).sum() < factor.numel()
    assert torch.equal(stochastic(an_image(), held), second(first(an_image()) * factor))


def test_dropout_of_the_network_stays_unless_it_is_switched_off():
    asked = {"inject": {"after": ["model.0"], "kind": "channel"}}
    both = Stochastic(with_dropout(a_network(0.2), {"dropout": True, **asked}, 0.1)).layers
    only = Stochastic(with_dropout(a_network(0.2), {"dropout": False, **asked}, 0.1)).layers
    assert {layer.rate for layer in both} == {0.1, 0.2}
    assert only == [Layer("model.0.injected", "channel", 0.1)]


def test_silence_leaves_no_active_layer():
    network = a_network(0.2)
    silence(network)
    assert Stochastic(network).layers == []


# --- the rate of a job ---


def test_a_rate_is_none_as_given_or_that_of_the_file(tmp_path):
    write_json(tmp_path / "rate.json", {"rate": 0.05})
    asked = {"after": ["a"], "kind": "channel"}
    assert rate_of(None, None) is None
    assert rate_of({**asked, "rate": 0.3}, None) == 0.3
    assert rate_of({**asked, "rate": "auto"}, tmp_path / "rate.json") == 0.05


def test_asking_for_a_rate_imports_neither_pytorch_nor_monai():
    heavy = ["torch", "monai", "segtrust.inject"]
    code = f"import sys, segtrust.backends, segtrust.sample; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# --- choosing among rates ---


def a_point(rate, nll, delta=0.0, admissible=True, varies=True, by_patient=None):
    delta_dice = dict.fromkeys(REGIONS, delta)
    told = {"rate": rate, "nll": nll, "delta_dice": delta_dice, "admissible": admissible, "varies": varies}
    return {**told, "nll_by_patient": by_patient or [nll]}


def of_patients(rate, *nll):
    return a_point(rate, float(np.mean(nll)), by_patient=list(nll))


def test_the_rate_of_least_nll_is_taken():
    assert choose([a_point(0.1, 0.30), a_point(0.2, 0.20), a_point(0.3, 0.25)])["rate"] == 0.2


def test_of_rates_within_a_thousandth_of_the_least_nll_the_largest_is_taken():
    curve = [a_point(0.1, 0.2), a_point(0.2, 0.20019), a_point(0.3, 0.20021)]
    assert choose(curve)["rate"] == 0.2


def test_with_several_patients_a_larger_rate_is_taken_unless_they_show_that_it_is_worse():
    least = of_patients(0.1, 0.10, 0.20, 0.30)
    # an excess of 0.001 on average, with a standard error of 0.0058
    assert choose([least, of_patients(0.2, 0.11, 0.19, 0.303)])["rate"] == 0.2
    # an excess of 0.001 in every patient: worse, however much patients differ
    assert choose([least, of_patients(0.2, 0.101, 0.201, 0.3011)])["rate"] == 0.1


def test_patients_without_a_prediction_do_not_count_for_the_choice():
    curve = [a_point(0.1, 0.2, by_patient=[0.2, None]), a_point(0.2, 0.3, by_patient=[0.3, None])]
    assert choose(curve)["rate"] == 0.1


def test_a_rate_that_changes_dice_is_not_taken_whatever_its_nll():
    curve = [a_point(0.1, 0.3), a_point(0.2, 0.2, delta=-0.02, admissible=False)]
    assert choose(curve)["rate"] == 0.1


def test_without_an_admissible_rate_the_error_shows_the_curve_and_what_to_do():
    curve = [a_point(0.1, 0.3, -0.0123, False), a_point(0.2, 0.2, 0.5, False), a_point(0.3, 0.2, 0.0, False, False)]
    with pytest.raises(SegtrustError) as told:
        choose(curve)
    lines = str(told.value).splitlines()
    assert lines[1].split() == ["rate", "ΔDice", "WT", "ΔDice", "TC", "ΔDice", "ET", "NLL"]
    assert lines[2].split() == ["0.1", *["-0.0123"] * 3, "0.30000", "ΔDice", "too", "large"]
    assert lines[4].split() == ["0.3", *["+0.0000"] * 3, "0.20000", "passes", "do", "not", "differ"]
    assert "`segtrust layers MODEL` lists them" in lines[5]
    assert "give a rate" in lines[5]


def test_a_network_that_predicts_nothing_gets_no_rate():
    with pytest.raises(SegtrustError, match="predicts no voxel of any region"):
        choose([a_point(0.1, None)])


def measured(*delta_dice):
    """Return what `measure` might: Dice of WT, TC, ET that differ from 0.8 of the deterministic pass by so much."""
    some = {name: np.full(3, 0.1) for name in ("nll", "squared_error", "variance")}
    return {"dice": 0.8 + np.array(delta_dice), "dice_deterministic": np.full(3, 0.8), **some}


@pytest.mark.parametrize(
    ("found", "admissible"),
    [
        ([measured(0.0099, -0.0099, 0.0)], True),
        ([measured(0.0, 0.0, -0.0101)], False),
        ([measured(0.0101, 0.0, 0.0)], False),
        ([measured(0.03, 0.0, 0.0), measured(-0.03, 0.0, 0.0)], True),
        ([measured(0.03, 0.0, 0.0), measured(0.0, -0.03, 0.0)], False),
    ],
)
def test_a_rate_is_admissible_where_the_mean_change_of_dice_is_below_a_hundredth_in_every_region(found, admissible):
    assert point(0.1, found)["admissible"] is admissible


# --- on patients ---

SHAPE = (6, 7, 5)
SAMPLING = {
    "seed": 0,
    "channels": list(MODALITIES),
    "outputs": list(REGIONS),
    "crop": "foreground",
    "window": None,
    "overlap": 0.5,
    "orientation": "RAS",
    "masks": "independent",
}


class Planted:
    """A network whose logits are the first three modalities, and in a pass those plus `shift` (where `dropped`)."""

    name, device, precision, out_of_memory = "planted", "cpu", "float32", ()

    def __init__(self, rate=0.5, shift=0.0, dropped=False):
        self.layers = [Layer("a", "channel", rate)]
        self.shift, self.dropped = shift, dropped

    def divisor(self, n_channels):
        return 1

    def mask_shapes(self, shape):
        return {"a": [(1, 1, 1, 1, 1)]}

    def to_device(self, image):
        return image

    def batch(self, predict_one, voxels):
        return 1

    def predict(self, images, held):
        logits = images[:, :3].astype(np.float32)
        if held is None:
            return logits
        return logits + np.float32(self.shift) * ((held["a"][0] == 0) if self.dropped else np.float32(1))


def a_case(patient, logits, labels, affine=LPS):
    """Return a case whose network logits on the patient's own grid are given, (x, y, z), for all three regions."""
    geometry = Geometry(labels.shape, affine)
    image = geometry.to_canonical(np.stack([logits] * 4).astype(np.float32))
    return patient, Preprocessed(image, np.ones(image.shape[1:], np.uint8), (0, 0, 0), geometry), labels


def a_tumour(shape=SHAPE, size=2):
    """Return labels with an enhancing tumour of size³ voxels in a corner that no flip leaves in place."""
    labels = np.zeros(shape, np.uint8)
    labels[1 : 1 + size, 1 : 1 + size, 1 : 1 + size] = 3
    return labels


def fitted(cases, backend, rate=0.5, passes=4, log=None, **sampling):
    return fit(
        cases,
        backend if callable(backend) else lambda rate: backend,
        inject={"rate": rate},
        passes=passes,
        batch=1,
        sampling={**SAMPLING, **sampling},
        log=log or (lambda line: None),
    )


def sigmoid(x):
    return 1 / (1 + np.exp(-float(x)))


def n_dropped(patient, passes, rate=0.5):
    """Return in how many passes the one channel of `Planted` is dropped."""
    planted = Planted(rate)
    shapes = planted.mask_shapes(None)
    masks = [draw_masks(planted.layers, shapes, 0, patient, Source(0).name, number) for number in range(passes)]
    return sum(int(not mask["a"][0].item()) for mask in masks)


def test_a_perfect_prediction_has_dice_one_on_the_patients_own_grid():
    labels = a_tumour()
    curve = fitted([a_case("a", np.where(labels > 0, 4.0, -4.0), labels)], Planted())["curve"]
    assert curve[0]["dice"] == curve[0]["dice_deterministic"] == dict.fromkeys(REGIONS, 1.0)


def test_the_nll_is_in_nats_over_the_voxels_near_the_deterministic_prediction():
    labels = a_tumour()
    logits = np.where(labels > 0, 3.0, -2.0)
    near = predicted_5mm(labels > 0, (1, 1, 1))
    assert 8 < near.sum() < near.size
    expected = -(8 * np.log(sigmoid(3.0)) + (near.sum() - 8) * np.log(1 - sigmoid(-2.0))) / near.sum()
    assert fitted([a_case("a", logits, labels)], Planted())["curve"][0]["nll"] == pytest.approx(expected, rel=1e-6)


def test_the_voxels_stay_those_of_the_deterministic_pass_when_the_passes_predict_nothing():
    labels = a_tumour()
    logits = np.where(labels > 0, 3.0, -2.0)
    near = predicted_5mm(labels > 0, (1, 1, 1)).sum()
    found = fitted([a_case("a", logits, labels)], Planted(shift=-8.0))
    expected = -(8 * np.log(sigmoid(-5.0)) + (near - 8) * np.log(1 - sigmoid(-10.0))) / near
    assert found["curve"][0]["nll"] == pytest.approx(expected, rel=1e-6)
    assert found["curve"][0]["dice"] == dict.fromkeys(REGIONS, 0.0)
    assert found["curve"][0]["delta_dice"] == dict.fromkeys(REGIONS, -1.0)
    assert found["n_empty_prediction"] == dict.fromkeys(REGIONS, 0)


def test_probabilities_are_clipped_before_the_logarithm():
    labels = a_tumour()
    found = fitted([a_case("a", np.where(labels > 0, -200.0, 200.0), labels)], Planted())
    assert found["curve"][0]["nll"] == pytest.approx(-np.log(1e-7), rel=1e-9)


def test_a_patient_without_a_prediction_is_left_out_of_the_nll_and_counted():
    labels = a_tumour()
    seen = a_case("a", np.where(labels > 0, 3.0, -2.0), labels)
    missed = a_case("b", np.full(SHAPE, -3.0), labels)
    alone, both = fitted([seen], Planted()), fitted([seen, missed], Planted())
    assert both["curve"][0]["nll"] == alone["curve"][0]["nll"]
    assert both["n_empty_prediction"] == dict.fromkeys(REGIONS, 1)
    assert both["curve"][0]["dice"] == dict.fromkeys(REGIONS, 0.5)
    assert both["n_patients"] == 2


def test_a_region_absent_from_prediction_and_reference_has_dice_one_and_no_scale():
    labels = np.where(a_tumour() > 0, 2, 0).astype(np.uint8)  # oedema alone: WT, no TC, no ET
    patient, scan, _ = a_case("a", np.where(labels > 0, 3.0, -2.0), labels)
    scan.image[1:] = -3
    found = fitted([(patient, scan, labels)], Planted(shift=-1.0, dropped=True))
    assert found["curve"][0]["dice"] == dict.fromkeys(REGIONS, 1.0)
    assert found["scale"]["WT"] > 0
    assert found["scale"]["TC"] is found["scale"]["ET"] is None
    assert found["curve"][0]["nll_by_region"]["ET"] is None
    assert found["curve"][0]["nll"] == found["curve"][0]["nll_by_region"]["WT"]


def test_reference_outside_the_crop_is_missed():
    labels = a_tumour()
    logits = np.where(labels > 0, 4.0, -4.0)
    labels[4, 5, 3] = 3
    logits[4, 5, 3] = 4
    found = fitted([a_case("a", logits, labels)], Planted(), crop={"center": [4, 3, 3]})
    inside = np.zeros(SHAPE, bool)
    canonical = Geometry(SHAPE, LPS).to_canonical(labels)
    inside[1:5, 2:5, 1:4] = True
    overlap, total = (canonical[inside] > 0).sum(), (labels > 0).sum()
    assert 0 < overlap < total
    assert found["curve"][0]["dice_deterministic"]["WT"] == pytest.approx(2 * overlap / (overlap + total))


def test_the_scale_makes_the_mean_variance_the_mean_squared_error():
    passes, shift = 10, -3.0
    small, large = a_tumour(), a_tumour((16, 16, 15), size=6)
    errors, variances = [], []
    cases = []
    for patient, labels in (("a", small), ("b", large)):
        logits = np.where(labels > 0, 2.0, -1.0)
        cases.append(a_case(patient, logits, labels))
        near = predicted_5mm(labels > 0, (1, 1, 1))
        k, inside = n_dropped(patient, passes), (labels > 0).sum()
        assert 0 < k < passes
        error = variance = 0
        for logit, y, n in ((2.0, 1, inside), (-1.0, 0, near.sum() - inside)):
            kept, dropped = sigmoid(logit), sigmoid(logit + shift)
            mean = (k * dropped + (passes - k) * kept) / passes
            error += n * (y - mean) ** 2
            variance += n * k * (passes - k) / (passes * (passes - 1)) * (kept - dropped) ** 2
        errors.append(error / near.sum())
        variances.append(variance / near.sum())
    found = fitted(cases, Planted(shift=shift, dropped=True), passes=passes)
    # moments are kept in steps of 2^-24
    assert found["scale"] == pytest.approx(dict.fromkeys(REGIONS, sum(errors) / sum(variances)), rel=1e-5)


def test_the_scale_is_a_ratio_of_sums_over_the_patients_with_a_prediction():
    squared_error, variance = np.array([0.1, np.nan, 0.3]), np.array([0.1, np.nan, 0.05])
    assert scale_of(squared_error, variance) == pytest.approx(0.4 / 0.15)
    assert scale_of(squared_error[1:2], variance[1:2]) is None


def test_without_spread_there_is_no_scale():
    labels = a_tumour()
    case = a_case("a", np.where(labels > 0, 3.0, -2.0), labels)
    assert fitted([case], Planted(shift=0.1))["scale"] == dict.fromkeys(REGIONS)
    assert fitted([case], Planted(shift=-1.0, dropped=True), passes=1)["scale"] == dict.fromkeys(REGIONS)


def test_a_given_rate_is_taken_as_it_is():
    labels = a_tumour()
    found = fitted([a_case("a", np.where(labels > 0, 3.0, -2.0), labels)], Planted(shift=-8.0), rate=0.2)
    assert (found["rate"], found["chosen"]) == (0.2, "given")
    assert [each["rate"] for each in found["curve"]] == [0.2]
    assert not found["curve"][0]["admissible"]


def test_the_largest_rate_that_costs_nothing_is_chosen_and_each_is_opened_once():
    labels = a_tumour()
    case = a_case("a", np.where(labels > 0, 3.0, -2.0), labels)
    opened, lines = [], []

    def open_at(rate):
        opened.append(rate)
        return Planted(shift=-0.1 if rate <= 0.1 else 8.0, dropped=True)

    found = fitted([case, case], open_at, rate="auto", log=lines.append)
    assert opened == [each["rate"] for each in found["curve"]] == list(RATES)
    assert (found["rate"], found["chosen"]) == (0.1, "auto")
    assert len(lines) == 2 * len(RATES) + 1
    assert lines[0].startswith("patients at each rate: 1 of 18, ")
    assert "; rate 0.01, a: Dice WT 1.000 (+0.000)" in lines[0]


def test_a_rate_at_which_passes_do_not_differ_is_not_chosen():
    labels = a_tumour()
    case = a_case("a", np.where(labels > 0, 3.0, -2.0), labels)
    assert n_dropped("a", 4) > 0

    def open_at(rate):
        return Planted(shift=0.1, dropped=True) if rate == 0.05 else Planted(shift=-0.1)

    found = fitted([case], open_at, rate="auto")
    assert found["rate"] == 0.05
    assert [each["rate"] for each in found["curve"] if each["varies"]] == [0.05]
    assert found["curve"][RATES.index(0.05)]["nll"] > 1.01 * found["curve"][0]["nll"]


def test_rates_that_all_change_dice_stop_the_fit():
    labels = a_tumour()
    case = a_case("a", np.where(labels > 0, 3.0, -2.0), labels)
    with pytest.raises(SegtrustError, match=r"keeps \|ΔDice\| below 0\.01 in every region"):
        fitted([case], Planted(shift=-8.0), rate="auto")


def test_the_result_is_valid_json_when_everything_is_undefined():
    found = fitted([a_case("a", np.full(SHAPE, -3.0), a_tumour())], Planted())
    assert '"nll":null' in canonical_json(found)
    assert found["scale"] == dict.fromkeys(REGIONS)


@pytest.mark.parametrize("spacing_mm", [(1.0, 1.0, 1.0), (1.0, 2.5, 3.0)])
def test_the_mask_holds_every_voxel_within_5_mm_of_a_predicted_one(spacing_mm):
    predicted = np.zeros((14, 9, 8), bool)
    predicted[0, 2, 1] = predicted[2:4, 5, 6] = True
    places = np.argwhere(np.ones(predicted.shape)) * spacing_mm
    distance = cdist(places, places[predicted.ravel()]).min(axis=1).reshape(predicted.shape)
    assert np.array_equal(predicted_5mm(predicted, spacing_mm), distance <= 5 + 1e-9)


def test_the_mask_of_a_full_prediction_is_full_and_of_an_empty_one_empty():
    assert predicted_5mm(np.ones(SHAPE, bool), (1, 1, 1)).all()
    assert not predicted_5mm(np.zeros(SHAPE, bool), (1, 1, 1)).any()


def test_a_network_is_fitted_on_the_passes_that_sampling_would_draw():
    geometry = Geometry((12, 10, 8), LPS)
    volumes = np.random.default_rng(0).gamma(2.0, size=(4, *geometry.shape)).astype(np.float32)
    scan, labels = preprocess(volumes, geometry), a_tumour(geometry.shape)

    def open_at(rate):
        network = a_network()
        inject(network, ["model.0"], rate, "channel")
        return TorchBackend(Stochastic(network), "cpu", "float32", 1)

    found = fitted([("a", scan, labels)], open_at, rate=0.4, passes=5)
    moments = sample(scan, open_at(0.4), passes=range(5), patient="a", source=Source(0), batch=1, **SAMPLING)
    summary = moments.summary(5).on(moments.place)
    for position, region in enumerate(REGIONS):
        near = predicted_5mm(summary.deterministic[position] >= 0.5, (1, 1, 1))
        p, y = summary.probability[position][near], labels[near] > 0
        scale = ((y - p) ** 2).sum() / summary.variance[position][near].sum()
        assert found["scale"][region] == pytest.approx(scale, rel=1e-5)
        assert found["curve"][0]["nll_by_region"][region] == pytest.approx(log_loss(y, p), rel=1e-5)


def test_regions_are_kept_apart():
    labels = np.zeros(SHAPE, np.uint8)
    labels[1:5, 1:5, 1:4], labels[1:4, 1:4, 1:4], labels[1:3, 1:3, 1:3] = 2, 1, 3
    whole, core, enhancing = (np.isin(labels, codes) for codes in ((1, 2, 3), (1, 3), (3,)))
    patient, scan, _ = a_case("a", np.zeros(SHAPE), labels)
    for channel, (member, miss) in enumerate(((whole, 0), (core, 1), (enhancing, 2))):
        logits = np.where(member, 3.0, -3.0)
        logits[1, 1, 1 : 1 + miss] = -3
        scan.image[channel] = scan.geometry.to_canonical(logits)
    dice = fitted([(patient, scan, labels)], Planted())["curve"][0]["dice"]
    assert dice == pytest.approx({"WT": 1, "TC": 2 * 26 / (26 + 27), "ET": 2 * 6 / (6 + 8)})


# --- reading ---


def test_calibration_patients_are_read_with_their_labels(tmp_path):
    paths = write_patient(tmp_path, "p", 0)
    scan = preprocess(*read_modalities({name: paths[name] for name in MODALITIES}, "p"))
    write_preprocessed(tmp_path / "p.safetensors", scan, {})
    cases = Calibration([tmp_path / "p.safetensors"], [paths["seg"]], ["p"], ["brats2021"])
    assert len(cases) == 1
    for _ in range(2):
        ((patient, found, labels),) = cases
        assert patient == "p"
        assert np.array_equal(found.image, scan.image)
        assert np.array_equal(labels, canonical_labels(draw_scan(0)[1], "brats2021", "p", "f"))


def test_a_reference_that_cannot_be_used_is_told_with_its_patient(tmp_path):
    paths = write_patient(tmp_path, "p", 0)
    scan = preprocess(*read_modalities({name: paths[name] for name in MODALITIES}, "p"))
    write_preprocessed(tmp_path / "p.safetensors", scan, {})
    cases = Calibration([tmp_path / "p.safetensors"], [paths["seg"]], ["p"], ["brats2023"])
    with pytest.raises(PatientError, match=r"p: seg has code 4 .* is this coding: brats2021"):
        list(cases)
