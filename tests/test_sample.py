import numpy as np
import pytest
import torch
from monai.inferers import sliding_window_inference
from monai.transforms import CenterSpatialCrop, DivisiblePad, ResizeWithPadOrCrop

from segtrust.backends import TorchBackend
from segtrust.draws import draw_masks, multipliers
from segtrust.dropout import Stochastic
from segtrust.errors import SegtrustError
from segtrust.moments import merge
from segtrust.networks import build
from segtrust.outputs import region_probability
from segtrust.preprocess import MODALITIES, preprocess
from segtrust.sample import predict_passes, sample
from segtrust.sources import Source
from segtrust.volumes import Geometry
from segtrust.windows import view

GRID = (26, 22, 19)
LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
SETTINGS = {
    "patient": "a",
    "seed": 0,
    "source": Source(0),
    "channels": ["t1ce", "t1", "t2", "flair"],
    "outputs": ["TC", "WT", "ET"],
    "crop": "foreground",
    "window": None,
    "overlap": 0.5,
    "orientation": "RAS",
    "masks": "independent",
    "batch": 1,
}
VIEW = {"channels": list(MODALITIES), "crop": "foreground", "divisor": 1, "orientation": "RAS", "flip": ()}


def a_scan(affine=LPS, shape=GRID):
    volumes = np.random.default_rng(0).gamma(2.0, size=(4, *shape)).astype(np.float32)
    for side in (slice(0, 4), slice(-3, None)):
        volumes[:, side], volumes[:, :, side] = 0, 0
    return preprocess(volumes, Geometry(shape, affine))


def a_network(kind="unet", rate=0.3):
    if kind == "unet":
        return build(
            {"name": "UNet-Res", "channels": [4, 8], "strides": [2], "dropout": rate, "out_channels": 3}, seed=2
        )
    return build(
        {"name": "SegResNet-BraTS", "init_filters": 8, "blocks_down": [1, 1], "blocks_up": [1], "dropout_prob": rate},
        seed=2,
    )


def on_torch(network, precision="float32"):
    network = network if isinstance(network, Stochastic) else Stochastic(network)
    return TorchBackend(network, "cpu", precision, 1)


def draw(passes, kind="unet", **changes):
    quiet = {**SETTINGS, "log": lambda line: None, **changes}
    scan = quiet.pop("scan", None) or a_scan()
    backend = quiet.pop("backend", None) or on_torch(a_network(kind))
    return sample(scan, backend, passes=passes, **quiet)


def equal(moments, others):
    return (
        moments.volumes.keys() == others.volumes.keys()
        and np.array_equal(moments.deterministic, others.deterministic)
        and all(
            np.array_equal(array, others.sums[block][name])
            for block, sums in moments.sums.items()
            for name, array in sums.items()
        )
    )


def first_block(moments):
    """Return the probabilities summed over the first block of the only source."""
    (source,) = moments.sources
    return moments.sums[source, (0, 5)]["probability"]


def tensors(held):
    return {name: [torch.from_numpy(call) for call in calls] for name, calls in held.items()}


def full_grid(array, scan):
    whole = np.zeros((*array.shape[:-3], *scan.geometry.canonical_shape), array.dtype)
    whole[(..., *scan.box)] = array
    return whole


@pytest.mark.parametrize("kind", ["unet", "segresnet"])
def test_the_deterministic_pass_is_the_plain_network_in_evaluation_mode(kind):
    scan, settings = a_scan(), SETTINGS
    image = scan.image[[MODALITIES.index(name) for name in settings["channels"]]]
    larger = DivisiblePad(2)(image).as_tensor()
    with torch.inference_mode():
        expected = region_probability(a_network(kind).eval()(larger[None]), settings["outputs"])[0]
    low = [(big - side) // 2 for big, side in zip(larger.shape[1:], image.shape[1:], strict=True)]
    inside = tuple(slice(first, first + side) for first, side in zip(low, image.shape[1:], strict=True))
    found = draw(range(1), kind).deterministic
    # convolutions in another memory layout add in another order
    np.testing.assert_allclose(found, expected[(slice(None), *inside)], atol=1e-5)


def test_a_pass_is_the_network_under_the_masks_of_its_number():
    scan, network = a_scan(), Stochastic(a_network())
    seen = view(scan, **{**VIEW, "channels": SETTINGS["channels"], "divisor": 2})
    masks = draw_masks(network.layers, network.mask_shapes(seen.image.shape), 0, "a", "member0", 3)
    with torch.inference_mode():
        logits = network(torch.from_numpy(seen.image)[None], tensors(multipliers(network.layers, [masks])))
    expected = seen.back(region_probability(logits, SETTINGS["outputs"])[0].numpy())
    found = first_block(draw(range(3, 4))) * 2.0**-24
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("kind", ["unet", "segresnet"])
def test_probabilities_do_not_depend_on_the_batch_size(kind):
    single, several = draw(range(4), kind).summary(4), draw(range(4), kind, batch=3).summary(4)
    np.testing.assert_allclose(single.probability, several.probability, atol=1e-5)
    np.testing.assert_allclose(single.variance, several.variance, atol=1e-5)


@pytest.mark.parametrize("batch", [1, 2])
def test_any_split_of_the_passes_gives_the_same_bits(batch):
    whole = draw(range(7), batch=batch)
    parts = [draw(part, batch=batch) for part in (range(3, 7), range(1, 3), range(1))]
    assert equal(merge(parts), whole)


def test_what_ran_before_does_not_matter():
    backend = on_torch(a_network())
    draw(range(2), backend=backend, patient="another")
    torch.manual_seed(7)
    assert equal(draw(range(3), backend=backend), draw(range(3)))


def test_patients_seeds_and_sources_draw_different_passes():
    found = [draw(range(2), **change) for change in ({}, {"patient": "b"}, {"seed": 1}, {"source": Source(1)})]
    sums = {first_block(moments).tobytes() for moments in found}
    assert len(sums) == 4


def test_passes_differ_from_each_other_and_the_deterministic_pass_does_not_change():
    summary = draw(range(4)).summary(4)
    assert summary.variance.max() > 1e-4
    assert np.array_equal(summary.deterministic, draw(range(1)).deterministic)


def test_only_the_chunk_that_holds_pass_zero_has_the_deterministic_pass():
    assert draw(range(2, 4)).deterministic is None


def test_one_set_of_masks_holds_for_all_windows():
    seen = []

    class Spy(Stochastic):
        def forward(self, image, masks=None):
            if masks is not None:
                seen.append({name: calls[0].clone() for name, calls in masks.items()})
            return super().forward(image, masks)

    draw(range(1, 3), backend=on_torch(Spy(a_network())), window=[8, 8, 8])
    n_windows = len(seen) // 2
    assert n_windows > 8
    for name in seen[0]:
        assert all(torch.equal(masks[name], seen[0][name]) for masks in seen[:n_windows])
        assert all(torch.equal(masks[name], seen[-1][name]) for masks in seen[n_windows:])
    assert not torch.equal(seen[0][name], seen[-1][name])


@pytest.mark.parametrize("at_once", [1, 4])
@pytest.mark.parametrize("shape", [(20, 18, 12), (8, 6, 11)])
def test_windows_average_logits_as_monai_does(at_once, shape):
    network = Stochastic(a_network())
    image = torch.randn(1, 4, *shape)
    masks = draw_masks(network.layers, network.mask_shapes((4, 8, 8, 8)), 0, "a", "dropout", 0)
    with torch.inference_mode():
        backend = on_torch(network)
        found = predict_passes(backend, image[0].numpy(), lambda window: [masks, masks], [8, 8, 8], 0.5, at_once)
        stacked = tensors(multipliers(network.layers, [masks]))
        expected = sliding_window_inference(image, [8, 8, 8], 1, lambda part: network(part, stacked), overlap=0.5)
    np.testing.assert_allclose(found, expected.expand(2, -1, -1, -1, -1), atol=1e-4, rtol=1e-4)


def test_a_network_without_dropout_is_refused_for_several_passes():
    for passes in (range(2), range(3, 4)):
        with pytest.raises(SegtrustError, match="no dropout layer with a rate above 0 is active"):
            draw(passes, backend=on_torch(a_network(rate=0.0)))


def test_a_network_without_dropout_may_be_asked_for_one_pass():
    moments = draw(range(1), backend=on_torch(a_network(rate=0.0)))
    np.testing.assert_allclose(moments.summary(1).probability, moments.deterministic, atol=2**-24)


def test_a_window_the_network_does_not_take_is_named():
    with pytest.raises(SegtrustError, match="UNet does not take images of 9×8×8 voxels"):
        draw(range(1), window=[9, 8, 8])


def test_bfloat16_is_close_to_float32_and_not_the_same():
    exact, rough = draw(range(1)).deterministic, draw(range(1), backend=on_torch(a_network(), "bfloat16")).deterministic
    assert 0 < np.abs(exact - rough).max() < 0.05


def test_progress_is_one_line_a_batch():
    lines = []
    draw(range(2, 6), batch=2, log=lines.append)
    told = [line.partition(", ")[0] for line in lines if line.startswith("passes of ")]
    assert told == ["passes of a: 2 of 4", "passes of a: 4 of 4"]


def test_a_network_that_sees_the_scan_flipped_gives_its_map_in_place():
    scan = a_scan()
    seen = view(scan, **{**VIEW, "flip": (0, 2)})
    assert np.array_equal(seen.image, scan.image[:, ::-1, :, ::-1])
    assert np.array_equal(seen.back(seen.image), scan.image)


@pytest.mark.parametrize("codes", ["RAS", "LPS", "SAR", "PLI"])
@pytest.mark.parametrize("crop", ["foreground", "none", {"center": [16, 12, 24]}])
def test_any_view_brings_voxels_back_to_where_they_were(codes, crop):
    scan = a_scan()
    seen = view(scan, **{**VIEW, "orientation": codes, "crop": crop, "divisor": 8, "flip": (1,)})
    assert all(side % 8 == 0 for side in seen.image.shape[1:])
    box = tuple(slice(first, first + side) for first, side in zip(seen.start, seen.shape, strict=True))
    assert np.array_equal(seen.back(seen.image), full_grid(scan.image, scan)[(slice(None), *box)])


def test_the_stored_orientation_is_that_of_the_files():
    affine = np.array([[0, -1, 0, 0], [0, 0, 1, 0], [-1, 0, 0, 0], [0, 0, 0, 1.0]])
    scan = a_scan(affine)
    seen = view(scan, **{**VIEW, "crop": "none", "orientation": "stored"})
    assert np.array_equal(seen.image, scan.place(scan.image))


@pytest.mark.parametrize("size", [[16, 12, 10], [15, 11, 9]])
def test_a_center_crop_is_that_of_monai(size):
    scan = a_scan()
    seen = view(scan, **{**VIEW, "crop": {"center": size}})
    expected = CenterSpatialCrop(size)(full_grid(scan.image, scan))
    assert np.array_equal(seen.image, np.asarray(expected))


def test_a_center_crop_beyond_the_grid_is_filled_with_zeros_as_by_monai():
    scan = a_scan()
    seen = view(scan, **{**VIEW, "crop": {"center": [32, 25, 12]}})
    expected = ResizeWithPadOrCrop([32, 25, 12])(full_grid(scan.image, scan))
    assert np.array_equal(seen.image, np.asarray(expected))
    assert seen.shape == (26, 22, 12)
    assert seen.start == (0, 0, 3)


def test_padding_is_that_of_monai():
    scan = a_scan()
    seen = view(scan, **{**VIEW, "divisor": 16})
    assert np.array_equal(seen.image, np.asarray(DivisiblePad(16)(scan.image)))


def test_moments_lie_where_the_crop_was():
    moments = draw(range(1), crop={"center": [10, 10, 10]})
    assert moments.start == (8, 6, 4)
    assert np.count_nonzero(moments.place(moments.deterministic)) == 3 * 1000


def test_channels_are_given_in_the_networks_order():
    scan = a_scan()
    seen = view(scan, **{**VIEW, "channels": ["flair", "t1"]})
    assert np.array_equal(seen.image, scan.image[[3, 0]])
