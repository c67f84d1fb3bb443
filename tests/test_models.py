"""Models, and the chunks their passes are drawn in."""

import pytest

from segtrust.config import checked_config
from segtrust.errors import Problems
from segtrust.models import passes_of, plan_chunks, read_models


def models(entries, **sections):
    return read_models(checked_config({"models": entries, **sections}))


def test_all_passes_are_one_chunk_unless_asked():
    assert plan_chunks([], 20, None) == [(0, 19)]


def test_chunks_end_before_multiples_of_passes_per_job():
    assert plan_chunks([], 20, 8) == [(0, 7), (8, 15), (16, 19)]


def test_more_passes_add_chunks_and_keep_those_there():
    assert plan_chunks([(0, 19)], 50, None) == [(0, 19), (20, 49)]
    assert plan_chunks([(0, 7), (8, 15), (16, 19)], 24, 8) == [(0, 7), (8, 15), (16, 19), (20, 23)]


def test_another_number_of_passes_per_job_draws_nothing_anew():
    assert plan_chunks([(0, 19)], 20, 5) == [(0, 19)]
    assert plan_chunks([(0, 4), (5, 9), (10, 14), (15, 19)], 20, None) == [(0, 4), (5, 9), (10, 14), (15, 19)]


def test_fewer_passes_use_the_blocks_that_are_there():
    assert plan_chunks([(0, 19)], 10, None) == [(0, 19)]


def test_fewer_passes_that_end_no_block_are_drawn_in_a_chunk_of_their_own():
    assert plan_chunks([(0, 19)], 12, None) == [(0, 11)]


def test_chunks_of_another_start_are_not_used():
    assert plan_chunks([(3, 19)], 20, None) == [(0, 19)]


def test_settings_hold_what_changes_numbers_and_nothing_else():
    network = {"name": "UNet-Res"}
    (model,) = models({"m": {"network": network, "train": {}}}, sample={"device": "cpu", "batch": 4}).values()
    assert set(model.settings) == {"network", "backend", "sample"}
    assert set(model.settings["sample"]) == {
        *("channels", "outputs", "crop", "orientation", "window", "overlap"),
        *("precision", "seed"),
    }
    assert model.trained_as == "m"


def test_missing_checkpoints_of_all_models_are_named(tmp_path):
    entries = {name: {"network": {"name": "UNet-Res"}, "checkpoint": f"{tmp_path}/{name}.pt"} for name in ("a", "b")}
    with pytest.raises(Problems, match=r"(?s)2 problems.*a\.pt.*b\.pt"):
        models(entries)


def test_weights_trained_for_one_model_serve_another():
    network = {"name": "UNet-Res"}
    found = models({"a": {"network": network, "train": {}}, "b": {"network": network, "checkpoint": {"model": "a"}}})
    assert found["b"].trained_as == "a"


def test_patients_with_another_number_of_predictions_are_named(tmp_path):
    for patient, count in (("a", 3), ("b", 2), ("c", 3)):
        for number in range(count):
            (tmp_path / f"{patient}_{number}.nii.gz").touch()
    (model,) = models({"m": {"predictions": f"{tmp_path}/{{patient}}_{{pass}}.nii.gz"}}).values()
    assert passes_of(model, ["a", "c"], 20) == 3
    with pytest.raises(Problems, match="b has 2 passes, the others have 3"):
        passes_of(model, ["a", "b", "c"], 20)
    with pytest.raises(Problems, match=r"(?s)2 problems.*d: no file matches.*e: no file matches"):
        passes_of(model, ["a", "d", "e"], 20)
