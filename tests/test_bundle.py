import copy
import json

import numpy as np
import pytest
import torch

from segtrust.backends import TorchBackend
from segtrust.bundle import read_bundle
from segtrust.config import checked_config
from segtrust.dropout import Stochastic
from segtrust.errors import SegtrustError
from segtrust.models import read_models
from segtrust.networks import build, load_checkpoint, load_weights
from segtrust.preprocess import preprocess
from segtrust.sample import sample
from segtrust.sources import Source
from segtrust.volumes import Geometry

# the keys of the published brats_mri_segmentation, with its expressions
INFERENCE = {
    "imports": ["$import glob", "$import os"],
    "bundle_root": ".",
    "ckpt_dir": "$@bundle_root + '/models'",
    "device": "$torch.device('cuda:0' if torch.cuda.is_available() else 'cpu')",
    "network_def": {
        "_target_": "SegResNet",
        "blocks_down": [1, 2, 2, 4],
        "blocks_up": [1, 1, 1],
        "init_filters": 16,
        "in_channels": 4,
        "out_channels": 3,
        "dropout_prob": 0.2,
    },
    "network": "$@network_def.to(@device)",
    "preprocessing": {
        "_target_": "Compose",
        "transforms": [
            {"_target_": "LoadImaged", "keys": "image"},
            {"_target_": "NormalizeIntensityd", "keys": "image", "nonzero": True, "channel_wise": True},
        ],
    },
    "inferer": {"_target_": "SlidingWindowInferer", "roi_size": [240, 240, 160], "sw_batch_size": 1, "overlap": 0.5},
    "postprocessing": {
        "_target_": "Compose",
        "transforms": [
            {"_target_": "Activationsd", "keys": "pred", "sigmoid": True},
            {"_target_": "Lambdad", "keys": "pred", "func": "$lambda x: torch.where(x[[2]] > 0, 4, 0)"},
        ],
    },
    "evaluating": ["$@evaluator.run()"],
}
METADATA = {
    "network_data_format": {
        "inputs": {"image": {"channel_def": {"0": "T1c", "1": "T1", "2": "T2", "3": "FLAIR"}}},
        "outputs": {"pred": {"channel_def": {"0": "Tumor core", "1": "Whole tumor", "2": "Enhancing tumor"}}},
    }
}


def write(folder, inference=INFERENCE, metadata=METADATA):
    (folder / "configs").mkdir(exist_ok=True)
    (folder / "configs" / "inference.json").write_text(json.dumps(inference))
    (folder / "configs" / "metadata.json").write_text(json.dumps(metadata))
    return folder


def changed(*keys, value):
    inference = copy.deepcopy(INFERENCE)
    part = inference
    for key in keys[:-1]:
        part = part[key]
    part[keys[-1]] = value
    return inference


def test_the_published_bundle_is_read_as_published(tmp_path):
    found = read_bundle(write(tmp_path))
    assert found == {
        "network": {"name": "SegResNet", **{k: v for k, v in INFERENCE["network_def"].items() if k != "_target_"}},
        "channels": ["t1ce", "t1", "t2", "flair"],
        "outputs": ["TC", "WT", "ET"],
        "crop": "none",
        "orientation": "stored",
        "window": [240, 240, 160],
        "overlap": 0.5,
        "checkpoint": tmp_path / "models" / "model.pt",
    }


def test_a_bundle_samples_like_its_network_on_the_stored_scan(tmp_path):
    write(tmp_path, changed("inferer", "roi_size", value=[16, 16, 16]))
    (tmp_path / "models").mkdir()
    published = build({"name": "SegResNet-BraTS"}, seed=4).eval()
    torch.save({"model": published.state_dict()}, tmp_path / "models" / "model.pt")
    bundle = read_bundle(tmp_path)
    network = build(bundle["network"], seed=0)
    load_weights(network, load_checkpoint(bundle["checkpoint"]), bundle["checkpoint"])
    volumes = np.random.default_rng(0).gamma(2.0, size=(4, 14, 16, 13)).astype(np.float32)
    volumes[:, :3] = 0
    geometry = Geometry((14, 16, 13), np.diag([-1.0, -1.0, 1.0, 1.0]))
    moments = sample(
        preprocess(volumes, geometry), TorchBackend(Stochastic(network), "cpu", "float32", 1), passes=range(1),
        patient="a", seed=0, source=Source(0), channels=bundle["channels"], outputs=bundle["outputs"],
        crop=bundle["crop"], window=bundle["window"], overlap=bundle["overlap"], orientation=bundle["orientation"],
        masks="independent", batch=1,
    )  # fmt: skip
    t1, t1ce, t2, flair = (
        np.where(volume != 0, (volume - volume[3:].mean()) / volume[3:].std(), 0) for volume in volumes
    )
    image = torch.from_numpy(np.pad(np.stack([t1ce, t1, t2, flair]), [(0, 0), (1, 1), (0, 0), (1, 2)])).float()
    with torch.inference_mode():
        core, whole, enhancing = torch.sigmoid(published(image[None]))[0, :, 1:-1, :, 1:-2].numpy()
    np.testing.assert_allclose(
        moments.place(moments.deterministic),
        [whole, core, enhancing],
        atol=1e-5,  # float32 network
    )


@pytest.mark.parametrize(
    "target", ["SegResNet", "monai.networks.nets.SegResNet", "monai.networks.nets.segresnet.SegResNet"]
)
def test_a_network_of_monai_is_found_by_any_of_its_names(tmp_path, target):
    inference = changed("network_def", "_target_", value=target)
    assert read_bundle(write(tmp_path, inference))["network"]["name"] == "SegResNet"


def test_a_network_from_elsewhere_is_refused(tmp_path):
    inference = changed("network_def", "_target_", value="scripts.networks.Special")
    with pytest.raises(SegtrustError, match=r"network_def#_target_ is scripts\.networks\.Special"):
        read_bundle(write(tmp_path, inference))


def test_a_plain_reference_is_followed(tmp_path):
    inference = {**changed("network_def", "init_filters", value="@sizes#filters"), "sizes": {"filters": 24}}
    assert read_bundle(write(tmp_path, inference))["network"]["init_filters"] == 24


@pytest.mark.parametrize("value", ["$8 * 2", "@width"])
def test_an_expression_that_is_needed_is_refused_by_its_key(tmp_path, value):
    inference = {**changed("network_def", "init_filters", value=value), "width": "$4 * 4"}
    with pytest.raises(SegtrustError, match=r"network_def#init_filters.* is the expression '\$"):
        read_bundle(write(tmp_path, inference))


def test_a_reference_in_a_circle_is_refused(tmp_path):
    inference = {**changed("network_def", "init_filters", value="@a"), "a": "@b", "b": "@a"}
    with pytest.raises(SegtrustError, match="refers to itself"):
        read_bundle(write(tmp_path, inference))


def test_a_reference_to_nothing_is_refused(tmp_path):
    with pytest.raises(SegtrustError, match="@nowhere, which is not there"):
        read_bundle(write(tmp_path, changed("network_def", "init_filters", value="@nowhere")))


@pytest.mark.parametrize(
    ("step", "message"),
    [
        ({"_target_": "ScaleIntensityd", "keys": "image"}, "ScaleIntensityd"),
        ({"_target_": "Spacingd", "keys": "image", "pixdim": [2, 2, 2]}, "Spacingd"),
        ({"_target_": "NormalizeIntensityd", "keys": "image", "nonzero": True}, "channel_wise False"),
        ({"_target_": "NormalizeIntensityd", "keys": "image", "nonzero": True, "channel_wise": True, "divisor": [1]},
         "fixed divisor"),
    ],
)  # fmt: skip
def test_preprocessing_that_differs_from_ours_is_refused_by_name(tmp_path, step, message):
    with pytest.raises(SegtrustError, match=message):
        read_bundle(write(tmp_path, changed("preprocessing", "transforms", 1, value=step)))


def test_a_bundle_that_does_not_normalise_is_refused(tmp_path):
    inference = changed("preprocessing", "transforms", value=INFERENCE["preprocessing"]["transforms"][:1])
    with pytest.raises(SegtrustError, match="no NormalizeIntensityd"):
        read_bundle(write(tmp_path, inference))


def test_an_activation_that_contradicts_the_metadata_is_refused(tmp_path):
    step = {"_target_": "Activationsd", "keys": "pred", "softmax": True}
    with pytest.raises(SegtrustError, match="without sigmoid"):
        read_bundle(write(tmp_path, changed("postprocessing", "transforms", 0, value=step)))


def test_four_classes_in_the_metadata_mean_softmax(tmp_path):
    metadata = copy.deepcopy(METADATA)
    metadata["network_data_format"]["outputs"]["pred"]["channel_def"] = {
        "0": "background", "1": "edema", "2": "necrotic core", "3": "enhancing tumor",
    }  # fmt: skip
    inference = changed("postprocessing", "transforms", 0, value={"_target_": "Activationsd", "softmax": True})
    assert read_bundle(write(tmp_path, inference, metadata))["outputs"] == {
        "softmax": ["background", "ED", "NCR", "ET"]
    }


def test_names_that_are_not_understood_are_left_to_the_config(tmp_path):
    found = read_bundle(write(tmp_path, metadata={}))
    assert (found["channels"], found["outputs"]) == (None, None)


def test_a_folder_that_is_no_bundle_is_named(tmp_path):
    with pytest.raises(SegtrustError, match="is no MONAI bundle"):
        read_bundle(tmp_path)


def test_what_the_config_gives_comes_before_what_the_bundle_says(tmp_path):
    (tmp_path / "models").mkdir()
    (tmp_path / "models/model.pt").touch()
    entry = {"bundle": str(write(tmp_path)), "crop": "foreground"}
    models, problems = read_models(checked_config({"models": {"m": entry}}))
    assert not problems
    view = models["m"].settings["sample"]
    assert view["crop"] == "foreground"
    assert (view["orientation"], view["window"]) == ("stored", [240, 240, 160])


@pytest.mark.parametrize(
    ("step", "key"),
    [
        ({"_target_": "CenterSpatialCropd", "roi_size": "$@size"}, "transforms#0#roi_size"),
        ({"_target_": "Orientationd", "axcodes": "$'RAS'"}, "transforms#0#axcodes"),
        ({"keys": "image"}, "has no _target_"),
    ],
)
def test_an_expression_in_a_step_that_is_read_is_refused(tmp_path, step, key):
    with pytest.raises(SegtrustError, match=key):
        read_bundle(write(tmp_path, changed("preprocessing", "transforms", 0, value=step)))


@pytest.mark.parametrize("change", [{"mode": "gaussian"}, {"_target_": "PatchInferer"}])
def test_an_inferer_that_works_otherwise_is_refused(tmp_path, change):
    with pytest.raises(SegtrustError, match="only SimpleInferer and SlidingWindowInferer"):
        read_bundle(write(tmp_path, changed("inferer", value={**INFERENCE["inferer"], **change})))
