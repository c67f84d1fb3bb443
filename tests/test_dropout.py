import numpy as np
import pytest
import torch
from torch import nn

from segtrust.draws import draw_masks, multipliers
from segtrust.dropout import Stochastic
from segtrust.errors import SegtrustError
from segtrust.networks import build

SHAPE = (4, 16, 16, 24)


def small_segresnet(rate=0.3):
    return build({"name": "SegResNet-BraTS", "init_filters": 8, "blocks_down": [1, 1], "blocks_up": [1],
                  "dropout_prob": rate}, seed=1)  # fmt: skip


def small_unet(rate=0.3):
    return build({"name": "UNet-Res", "channels": [4, 8, 16], "strides": [2, 2], "dropout": rate}, seed=1)


def an_image(n=1):
    return torch.randn(n, *SHAPE, generator=torch.Generator().manual_seed(0))


def masks_of(stochastic, pass_index=0, seed=0, patient="a"):
    return draw_masks(stochastic.layers, stochastic.mask_shapes(SHAPE), seed, patient, "dropout", pass_index)


def one(stochastic, masks):
    held = multipliers(stochastic.layers, [masks])
    return {name: [torch.from_numpy(call) for call in calls] for name, calls in held.items()}


def same(masks, others):
    return all(np.array_equal(a, b) for name in masks for a, b in zip(masks[name], others[name], strict=True))


@pytest.mark.parametrize("make", [small_segresnet, small_unet])
@torch.inference_mode()
def test_without_masks_the_network_is_what_it_was_in_evaluation_mode(make):
    expected = make().eval()(an_image())
    assert torch.equal(Stochastic(make())(an_image()), expected)


def test_segresnet_drops_channels_and_the_unet_drops_elements():
    assert {layer.kind for layer in Stochastic(small_segresnet()).layers} == {"channel"}
    assert {layer.kind for layer in Stochastic(small_unet()).layers} == {"element"}


def test_masks_have_one_value_per_channel_or_one_per_element():
    segresnet, unet = Stochastic(small_segresnet()), Stochastic(small_unet())
    assert segresnet.mask_shapes(SHAPE) == {"dropout": [(1, 8, 1, 1, 1)]}
    assert unet.mask_shapes(SHAPE)["model.0.conv.unit0.adn.D"] == [(1, 4, 8, 8, 12)]


@pytest.mark.parametrize("make", [small_segresnet, small_unet])
@torch.inference_mode()
def test_masks_do_what_torch_dropout_does_when_it_draws_the_same(make, monkeypatch):
    stochastic = Stochastic(make())
    masks = masks_of(stochastic)
    plain = make().eval()
    queue = [(layer.rate, mask) for layer in stochastic.layers for mask in masks[layer.name]]

    def drop(features, p=0.5, training=False, inplace=False):
        rate, mask = queue.pop(0)
        assert (p, training) == (rate, True)
        return features * torch.from_numpy(mask) / (1 - p)

    for module in plain.modules():
        if isinstance(module, nn.Dropout | nn.Dropout3d):
            module.train()
    monkeypatch.setattr(nn.functional, "dropout", drop)
    monkeypatch.setattr(nn.functional, "dropout3d", drop)
    expected = plain(an_image())
    assert not queue
    # rounding of x·(m·s) against x·m/s, in float32, through a dozen layers
    torch.testing.assert_close(stochastic(an_image(), one(stochastic, masks)), expected, atol=2e-4, rtol=1e-4)


def test_a_mask_depends_on_seed_patient_source_pass_and_layer():
    layers = Stochastic(small_unet()).layers[:2]
    shapes = {layer.name: [(1, 1000)] for layer in layers}
    drawn = [
        draw_masks(layers, shapes, *key)
        for key in [(0, "a", "s", 0), (1, "a", "s", 0), (0, "b", "s", 0), (0, "a", "t", 0), (0, "a", "s", 1)]
    ]
    distinct = {mask.tobytes() for masks in drawn for calls in masks.values() for mask in calls}
    assert len(distinct) == 5 * 2


def test_a_mask_is_the_same_whatever_was_drawn_before():
    stochastic = Stochastic(small_unet())
    first = masks_of(stochastic, 3)
    torch.manual_seed(99)
    masks_of(stochastic, 0)
    assert same(masks_of(stochastic, 3), first)


def test_the_generator_keeps_giving_the_masks_it_gave_when_this_was_written():
    layers = Stochastic(small_segresnet()).layers
    mask = draw_masks(layers, {"dropout": [(1, 16)]}, 0, "BraTS2021_00000", "dropout", 0)["dropout"][0]
    assert "".join(str(int(kept)) for kept in mask[0]) == "1011101111111111"


@pytest.mark.parametrize("rate", [0.05, 0.2, 0.5])
def test_a_layer_drops_the_share_its_rate_says(rate):
    layers = Stochastic(nn.Sequential(nn.Dropout(rate))).layers
    n = 1_000_000
    mask = draw_masks(layers, {"0": [(n,)]}, 0, "a", "s", 0)["0"][0]
    assert abs(1 - mask.mean() - rate) < 5 * (rate * (1 - rate) / n) ** 0.5


def test_dropout_preserves_the_mean():
    stochastic = Stochastic(nn.Sequential(nn.Dropout3d(0.3)))
    image = torch.ones(1, 4000, 1, 1, 1)
    masks = draw_masks(stochastic.layers, stochastic.mask_shapes(image.shape[1:]), 0, "a", "s", 0)
    spread = (0.3 / 0.7 / 4000) ** 0.5
    assert abs(stochastic(image, one(stochastic, masks)).mean().item() - 1) < 5 * spread


@pytest.mark.parametrize("norm", ["BATCH", "INSTANCE", ["GROUP", {"num_groups": 2}]])
@torch.inference_mode()
def test_the_statistics_of_normalisation_layers_never_change(norm):
    network = build({"name": "UNet-Res", "channels": [4, 8], "strides": [2], "norm": norm, "dropout": 0.3}, seed=0)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    stochastic = Stochastic(network)
    stochastic.train()
    for pass_index in range(3):
        stochastic(5 + an_image(), one(stochastic, masks_of(stochastic, pass_index)))
    after = network.state_dict()
    assert not any(module.training for module in stochastic.modules())
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_making_a_network_stochastic_twice_keeps_its_layers():
    network = small_unet()
    assert Stochastic(network).layers == Stochastic(network).layers != []


@torch.inference_mode()
def test_a_network_with_masks_as_inputs_can_be_exported():
    stochastic = Stochastic(small_segresnet())
    exported = torch.export.export(stochastic, (an_image(), one(stochastic, masks_of(stochastic, 0)))).module()
    masks = one(stochastic, masks_of(stochastic, 1))
    assert torch.equal(exported(an_image(), masks), stochastic(an_image(), masks))


def test_the_names_of_the_weights_stay():
    names = list(small_unet().state_dict())
    network = small_unet()
    Stochastic(network)
    assert list(network.state_dict()) == names


@torch.inference_mode()
def test_a_layer_that_is_used_twice_gets_a_mask_for_each_use():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Dropout(0.5)
            self.second = self.first

        def forward(self, image):
            return self.second(torch.cat([self.first(image), image], dim=1))

    stochastic = Stochastic(Twice())
    shapes = stochastic.mask_shapes((1, 4, 4, 4))
    assert shapes == {"first": [(1, 1, 4, 4, 4), (1, 2, 4, 4, 4)]}
    held = one(stochastic, draw_masks(stochastic.layers, shapes, 0, "a", "s", 0))
    out = stochastic(torch.ones(1, 1, 4, 4, 4), held)
    first, second = held["first"]
    assert torch.equal(out, second * torch.cat([first, torch.ones(1, 1, 4, 4, 4)], dim=1))


def test_a_rate_of_zero_is_no_stochastic_layer():
    assert Stochastic(small_unet(rate=0.0)).layers == []


def test_alpha_dropout_is_refused_by_name():
    with pytest.raises(SegtrustError, match="layer 1 is AlphaDropout"):
        Stochastic(nn.Sequential(nn.Identity(), nn.AlphaDropout(0.1)))


def test_a_rate_of_one_is_refused():
    with pytest.raises(SegtrustError, match="drops everything"):
        Stochastic(nn.Sequential(nn.Dropout(1.0)))
