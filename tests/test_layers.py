"""The table of a network's layers: what to inject dropout after."""

import json

import pytest
import yaml
from torch import nn

from segtrust.errors import Problems, SegtrustError
from segtrust.layers import LEGEND, layer_table, layers_of
from segtrust.networks import build

UNET = {"name": "UNet-Res", "channels": [4, 8], "strides": [2], "dropout": 0.3}
PLAIN = {"dropout": True}


def rows_of(table):
    """Return {layer name: (output, class, dropout)} of a table."""
    lines = table.splitlines()
    head = next(line for line in lines if line.startswith("output"))
    starts = [head.index(word) for word in ("class", "dropout", "layer")]
    rows = lines[lines.index(head) + 1 : lines.index(LEGEND[0]) - 1]
    cells = [
        [row[first:last].strip() for first, last in zip([0, *starts], [*starts, None], strict=True)] for row in rows
    ]
    return {name: tuple(others) for *others, name in cells}


def a_study(folder, **models):
    (folder / "config.yaml").write_text(yaml.safe_dump({"models": models}))
    return folder


def test_every_named_layer_has_a_row_with_its_class_in_the_order_of_the_network():
    network = build(UNET, seed=0)
    expected = {name: type(layer).__name__ for name, layer in network.named_modules(remove_duplicate=False) if name}
    rows = rows_of(layer_table(network, None, PLAIN))
    assert list(rows) == list(expected)
    assert {name: row[1] for name, row in rows.items()} == expected


def test_outputs_have_the_shapes_of_a_small_image():
    table = layer_table(build(UNET, seed=0), None, PLAIN)
    assert table.startswith("UNet, given an image of 4×32×32×32\n")
    assert rows_of(table)["model.0"][0] == "4×16×16×16"
    assert rows_of(table)["model.2"][0] == "4×32×32×32"


def test_the_small_image_is_one_that_the_network_takes():
    deep = build({**UNET, "channels": [2] * 7, "strides": [2] * 6}, seed=0)
    assert "given an image of 4×192×192×192" in layer_table(deep, None, PLAIN)


def test_a_window_is_what_the_network_is_shown():
    assert "given an image of 4×8×16×24" in layer_table(build(UNET, seed=0), [8, 16, 24], PLAIN)


def test_a_window_that_the_network_does_not_take_is_told():
    deeper = build({**UNET, "channels": [4, 8, 16], "strides": [2, 2]}, seed=0)
    with pytest.raises(SegtrustError, match="UNet does not take an image of 4×9×8×8"):
        layer_table(deeper, [9, 8, 8], PLAIN)


def test_active_dropout_is_marked_with_what_it_drops_and_its_rate():
    unet = rows_of(layer_table(build(UNET, seed=0), None, PLAIN))
    marked = {row[1]: row[2] for row in unet.values() if row[2]}
    assert marked == {"Dropout": "element 0.3"}
    assert unet["model.0.conv.unit0.adn.D"][2] == "element 0.3"
    segresnet = rows_of(layer_table(build({"name": "SegResNet-BraTS"}, seed=0), None, PLAIN))
    assert segresnet["dropout"] == ("16×32×32×32", "Dropout3d", "channel 0.2")


def test_dropout_that_is_switched_off_is_not_marked():
    assert not any(row[2] for row in rows_of(layer_table(build(UNET, seed=0), None, {"dropout": False})).values())
    never = build({**UNET, "dropout": 0.0}, seed=0)
    assert not any(row[2] for row in rows_of(layer_table(never, None, PLAIN)).values())


def test_layers_that_the_model_injects_after_are_marked():
    inject = {"after": ["model.0", "model.2.*", "model.0.conv.unit0.adn.D"], "rate": "auto", "kind": "channel"}
    rows = rows_of(layer_table(build(UNET, seed=0), None, {"dropout": True, "inject": inject}))
    assert {name for name, row in rows.items() if row[2] == "+ channel auto"} == {"model.0", "model.2.0", "model.2.1"}
    assert rows["model.0.conv.unit0.adn.D"][2] == "element 0.3 + channel auto"


def test_patterns_that_match_no_layer_are_told():
    inject = {"after": ["model.0", "up.*"], "rate": 0.1, "kind": "element"}
    table = layer_table(build(UNET, seed=0), None, {"dropout": False, "inject": inject})
    assert table.splitlines()[-1] == "stochastic.inject.after: no layer is named up.*"


def test_a_list_of_layers_gives_no_output_and_several_outputs_are_told_by_their_first():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = nn.ModuleList([nn.Conv3d(4, 2, 1)])
            self.both = nn.Identity()

        def forward(self, image):
            return self.both((self.parts[0](image), image))[0]

    rows = rows_of(layer_table(Two(), [8, 8, 8], PLAIN))
    assert [rows[name][0] for name in ("parts", "parts.0", "both")] == ["–", "2×8×8×8", "2×8×8×8"]


def test_the_tables_of_the_stock_networks_fit_a_terminal_of_120_columns():
    for name in ("SegResNet-BraTS", "UNet-Res"):
        inject = {"after": ["**"], "rate": "auto", "kind": "channel"}
        table = layer_table(build({"name": name}, seed=0), None, {"dropout": False, "inject": inject})
        assert max(map(len, table.splitlines())) <= 120


def test_a_model_is_shown_before_its_weights_exist(tmp_path):
    study = a_study(tmp_path, m={"network": UNET, "checkpoint": "nowhere.pt", "stochastic": {"passes": 3}})
    assert "element 0.3" in layers_of("m", study)


def test_an_unknown_model_is_told_with_those_there_are(tmp_path):
    study = a_study(tmp_path, a={"network": UNET, "train": {}}, b={"network": UNET, "train": {}})
    with pytest.raises(SegtrustError, match=r"config\.yaml has no model c; it has a, b"):
        layers_of("c", study)


def test_predictions_have_no_network(tmp_path):
    study = a_study(tmp_path, given={"predictions": "given/{patient}.nii.gz"})
    with pytest.raises(SegtrustError, match="given has no network: its predictions were made elsewhere"):
        layers_of("given", study)


def test_a_configuration_with_problems_is_told_in_words(tmp_path):
    study = a_study(tmp_path, m={"network": UNET, "train": {}, "colour": "red"})
    with pytest.raises(Problems, match="unknown key 'colour'"):
        layers_of("m", study)
    (tmp_path / "config.yaml").write_text("models: [")
    with pytest.raises(SegtrustError, match=r"config\.yaml is no YAML"):
        layers_of("m", tmp_path)


def test_a_bundle_is_shown_by_its_own_network_and_window(tmp_path):
    config = {
        "network_def": {
            "_target_": "SegResNet",
            "in_channels": 4,
            "out_channels": 3,
            "init_filters": 8,
            "dropout_prob": 0.1,
        },
        "preprocessing": {
            "_target_": "Compose",
            "transforms": [{"_target_": "NormalizeIntensityd", "nonzero": True, "channel_wise": True}],
        },
        "inferer": {"_target_": "SlidingWindowInferer", "roi_size": [16, 16, 24], "overlap": 0.5},
    }
    (tmp_path / "bundle/configs").mkdir(parents=True)
    (tmp_path / "bundle/configs/inference.json").write_text(json.dumps(config))
    table = layers_of("m", a_study(tmp_path, m={"bundle": "bundle"}))
    assert table.startswith("SegResNet, given an image of 4×16×16×24")
    assert rows_of(table)["dropout"][2] == "channel 0.1"
    wider = layers_of("m", a_study(tmp_path, m={"bundle": "bundle", "window": [32, 32, 32]}))
    assert wider.startswith("SegResNet, given an image of 4×32×32×32")
