"""The configuration: defaults, and errors in the user's words."""

import pytest
import yaml

from segtrust.config import ROOT, checked_config, schema
from segtrust.errors import Problems

MODEL = {"network": {"name": "UNet-Res"}, "checkpoint": "model.pt"}


def problems(config):
    with pytest.raises(Problems) as caught:
        checked_config(config)
    return caught.value.problems


def test_defaults_come_from_the_schema_at_every_depth():
    config = checked_config({"models": {"m": MODEL}, "sample": {"device": "cpu"}})
    assert config["sample"]["passes"] == 20
    assert config["sample"]["device"] == "cpu"
    assert config["models"]["m"]["channels"] == ["t1ce", "t1", "t2", "flair"]
    assert config["cohort"]["resamples"] == 2000


def test_training_settings_have_defaults_too():
    config = checked_config({"models": {"m": {"network": {"name": "UNet-Res"}, "train": {"iterations": 5}}}})
    assert config["models"]["m"]["train"]["iterations"] == 5
    assert config["models"]["m"]["train"]["loss"] == "dice_ce"


def test_what_was_given_is_not_changed():
    given = {"models": {"m": dict(MODEL)}}
    checked_config(given)
    assert given == {"models": {"m": MODEL}}


def test_every_default_fits_its_own_schema():
    checked_config(checked_config({"models": {"m": MODEL}}))


@pytest.mark.parametrize("name", ["config", "patients"])
def test_every_key_of_a_schema_says_what_it_does(name):
    def keys(part, path):
        for key, child in part.get("properties", {}).items():
            yield f"{path}.{key}", child
            yield from keys(child, f"{path}.{key}")

    whole = schema(name)
    parts = [("", whole), *((f"$defs.{key}", part) for key, part in whole.get("$defs", {}).items())]
    silent = [
        path
        for start, part in parts
        for path, child in keys(part, start)
        if "description" not in child and "$ref" not in child and not path.endswith((".model", ".center", ".softmax"))
    ]
    assert not silent


@pytest.mark.parametrize(
    "path", [*sorted(ROOT.glob("studies/*.yaml")), ROOT / "config.yaml"], ids=lambda path: path.name
)
def test_the_configs_in_the_repository_are_valid(path):
    checked_config(yaml.safe_load(path.read_text(encoding="utf-8")))


def test_an_unknown_key_is_named_with_the_one_that_was_meant():
    assert problems({"models": {"m": MODEL}, "sample": {"pases": 3}}) == [
        "config.yaml: sample: unknown key 'pases'; did you mean 'passes'?"
    ]


def test_all_problems_are_reported_together():
    found = problems({"models": {"m": {**MODEL, "croop": 1}}, "seed": -1, "sample": {"device": "gpu", "passes": 0}})
    assert len(found) == 4


def test_a_wrong_choice_lists_the_right_ones():
    assert problems({"models": {"m": MODEL}, "sample": {"device": "gpu"}}) == [
        "config.yaml: sample.device: found 'gpu', expected one of auto, cuda, cpu."
    ]


@pytest.mark.parametrize("name", ["report", "comparison", "preprocessed", "failed", "gate"])
def test_a_model_cannot_have_the_name_of_a_folder_beside_it(name):
    assert "name of a folder beside the models" in problems({"models": {name: MODEL}})[0]


@pytest.mark.parametrize("name", ["../m", "a/b", "", ".hidden", "a b"])
def test_a_model_name_cannot_lead_out_of_results(name):
    assert "names become parts of paths" in problems({"models": {name: MODEL}})[0]


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({}, "found none of them"),
        ({**MODEL, "train": {}}, "found checkpoint and train"),
        ({"checkpoint": "m.pt"}, "checkpoint needs a network"),
        ({"predictions": "{patient}.nii.gz", "network": {"name": "UNet"}}, "network does not go with predictions"),
        ({"network": {"name": "UNet"}, "checkpoint": {"model": "other"}}, "'other', which is not trained here"),
        ({"predictions": "all.nii.gz"}, "a path that contains {patient}"),
    ],
)
def test_a_model_is_of_exactly_one_kind(model, message):
    assert message in problems({"models": {"m": model}})[0]


def test_a_bundle_may_name_another_checkpoint():
    checked_config({"models": {"m": {"bundle": "folder", "checkpoint": "other.pt"}}})


@pytest.mark.parametrize("name", [2024, True])
def test_a_name_that_yaml_reads_as_no_text_is_refused(name):
    assert "write it in quotes" in problems({"models": {name: MODEL}})[0]


def test_an_unknown_key_that_yaml_reads_as_no_text_is_named():
    assert "unknown key 'True'" in problems({"models": {"m": MODEL}, True: 1})[0]
