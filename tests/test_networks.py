import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from segtrust.errors import SegtrustError
from segtrust.networks import (
    arithmetic,
    build,
    divisor,
    load_checkpoint,
    load_weights,
    torch_device,
)

SMALL = {"name": "UNet-Res", "channels": [4, 8, 16], "strides": [2, 2]}


def same(state, other):
    return list(state) == list(other) and all(torch.equal(state[name], other[name]) for name in state)


def test_the_stock_segresnet_has_the_weights_of_the_published_bundle():
    state = build({"name": "SegResNet-BraTS"}, seed=0).state_dict()
    assert sum(tensor.numel() for tensor in state.values()) == 4_702_227
    assert state["convInit.conv.weight"].shape == (16, 4, 3, 3, 3)
    assert state["conv_final.2.conv.bias"].shape == (3,)


def test_a_seed_decides_the_initial_weights():
    first, again, other = (build(SMALL, seed=seed).state_dict() for seed in (0, 0, 1))
    assert same(first, again)
    assert not same(first, other)


def test_building_a_network_leaves_torchs_random_numbers_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    build(SMALL, seed=0)
    assert torch.equal(torch.rand(3), expected)


def test_an_unknown_network_is_refused_with_a_list_of_the_known():
    with pytest.raises(SegtrustError, match=r"no network SegRessNet.*SegResNet.*UNet"):
        build({"name": "SegRessNet"}, seed=0)


def test_an_unknown_argument_is_refused_with_a_list_of_the_known():
    with pytest.raises(SegtrustError, match=r"unknown filters; it takes .*init_filters"):
        build({"name": "SegResNet", "filters": 8}, seed=0)


def test_a_missing_argument_is_named():
    with pytest.raises(SegtrustError, match=r"UNet: arguments missing channels, strides"):
        build({"name": "UNet", "spatial_dims": 3, "in_channels": 4, "out_channels": 3}, seed=0)


def test_an_argument_the_class_refuses_is_told_in_its_words():
    with pytest.raises(SegtrustError, match="spatial_dims"):
        build({"name": "SegResNet", "spatial_dims": 5}, seed=0)


@pytest.mark.parametrize("key", [None, "model", "state_dict", "network"])
def test_a_checkpoint_is_a_state_dict_or_holds_one(tmp_path, key):
    state = build(SMALL, seed=0).state_dict()
    torch.save(state if key is None else {"epoch": 3, key: state}, tmp_path / "model.pt")
    assert same(load_checkpoint(tmp_path / "model.pt"), state)


def test_safetensors_are_checkpoints_too(tmp_path):
    state = dict(build(SMALL, seed=0).state_dict())
    save_file(state, tmp_path / "model.safetensors")
    loaded = load_checkpoint(tmp_path / "model.safetensors")
    assert same({name: loaded[name] for name in state}, state)


def test_a_checkpoint_with_python_objects_is_not_unpickled(tmp_path):
    torch.save(build(SMALL, seed=0), tmp_path / "model.pt")
    with pytest.raises(SegtrustError, match="could run code"):
        load_checkpoint(tmp_path / "model.pt")


def test_a_missing_checkpoint_is_named(tmp_path):
    with pytest.raises(SegtrustError, match=r"no checkpoint .*absent\.pt"):
        load_checkpoint(tmp_path / "absent.pt")


@pytest.mark.parametrize("name", ["model.pt", "model.safetensors"])
def test_a_damaged_checkpoint_is_named(tmp_path, name):
    (tmp_path / name).write_bytes(b"PK\x03\x04 half a file")
    with pytest.raises(SegtrustError, match=name):
        load_checkpoint(tmp_path / name)


def test_a_checkpoint_without_weights_says_what_it_holds(tmp_path):
    torch.save({"epoch": 3}, tmp_path / "model.pt")
    with pytest.raises(SegtrustError, match="dict with 'epoch'"):
        load_checkpoint(tmp_path / "model.pt")


def test_weights_that_do_not_fit_are_listed_with_both_shapes():
    state = build({**SMALL, "channels": [4, 8, 32]}, seed=0).state_dict()
    with pytest.raises(SegtrustError, match=r"(?s)given.pt does not fit .*expected \(16,.*found \(32,"):
        load_weights(build(SMALL, seed=0), state, "given.pt")


def test_a_missing_and_a_superfluous_layer_are_named():
    network = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(SegtrustError, match=r"0.bias: expected \(2,\), found no such layer\n  1.bias: found \(2,\)"):
        load_weights(network, {"0.weight": torch.zeros(2, 2), "1.bias": torch.zeros(2)}, "given.pt")


def test_the_prefix_of_parallel_training_is_removed():
    state = build(SMALL, seed=0).state_dict()
    network = build(SMALL, seed=1)
    load_weights(network, {f"module.{name}": tensor for name, tensor in state.items()}, "given.pt")
    assert same(network.state_dict(), state)


@pytest.mark.parametrize(
    ("network", "expected"),
    [
        ({"name": "SegResNet-BraTS", "init_filters": 8}, 8),
        ({"name": "SegResNet-BraTS", "init_filters": 8, "blocks_down": [1, 1], "blocks_up": [1]}, 2),
        ({"name": "UNet-Res", "channels": [4, 4, 4, 4, 4]}, 16),
        (SMALL, 4),
        ({"name": "BasicUNet", "in_channels": 4, "out_channels": 3, "features": [4] * 6}, 1),
    ],
)
def test_the_divisor_of_a_network_is_found_by_trying(network, expected):
    assert divisor(build(network, seed=0), 4) == expected


def test_cuda_without_a_gpu_never_falls_back(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SegtrustError, match="finds no GPU"):
        torch_device("cuda")
    assert torch_device("auto").type == "cpu"


def test_tf32_is_off_inside_and_as_before_outside():
    before = torch.backends.cudnn.allow_tf32
    with arithmetic(torch.device("cpu"), "float32"):
        assert not torch.backends.cudnn.allow_tf32
    assert torch.backends.cudnn.allow_tf32 == before
