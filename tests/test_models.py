"""Models, and the chunks their passes are drawn in."""

import pytest

from segtrust.config import checked_config
from segtrust.errors import Problems, raise_if_any
from segtrust.models import Weights, passes_of, plan_chunks, read_models


def models(entries, **sections):
    found, problems = read_models(checked_config({"models": entries, **sections}))
    raise_if_any(problems)
    return found


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
    assert set(model.settings) == {"network", "stochastic", "backend", "precision", "sample"}
    assert set(model.settings["sample"]) == {
        *("channels", "outputs", "crop", "orientation", "window", "overlap"),
        *("seed", "masks"),
    }
    assert model.members == (Weights(trained_as="m"),)


def test_missing_checkpoints_of_all_models_are_named(tmp_path):
    entries = {name: {"network": {"name": "UNet-Res"}, "checkpoint": f"{tmp_path}/{name}.pt"} for name in ("a", "b")}
    with pytest.raises(Problems, match=r"(?s)2 problems.*a\.pt.*b\.pt"):
        models(entries)


def test_weights_trained_for_one_model_serve_another():
    network = {"name": "UNet-Res"}
    found = models({"a": {"network": network, "train": {}}, "b": {"network": network, "checkpoint": {"model": "a"}}})
    assert found["b"].members[0].file == "results/a/train/checkpoint.pt"


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


NETWORK = {"name": "UNet-Res"}


def stochastic(tmp_path, n_files=1, **given):
    """Return the model `m` with checkpoints that exist and what is given as stochastic."""
    for number in range(n_files):
        (tmp_path / f"{number}.pt").write_bytes(bytes([number]))
    further = [str(tmp_path / f"{number}.pt") for number in range(1, n_files)]
    given |= {"ensemble": further} if further else {}
    entry = {"network": NETWORK, "checkpoint": str(tmp_path / "0.pt"), "stochastic": given}
    return models({"m": entry})["m"]


def test_sources_are_checkpoints_times_flips(tmp_path):
    assert stochastic(tmp_path).sources == ["member0"]
    model = stochastic(tmp_path, n_files=2, flips=[2])
    assert model.sources == ["member0", "member0-flip2", "member1", "member1-flip2"]
    assert model.weights_of("member1-flip2").path == str(tmp_path / "1.pt")


def test_a_source_without_dropout_has_one_pass(tmp_path):
    assert passes_of(stochastic(tmp_path, n_files=3, dropout=False), [], 20) == 1
    assert passes_of(stochastic(tmp_path, n_files=3), [], 20) == 20
    assert passes_of(stochastic(tmp_path, n_files=3, passes=4), [], 20) == 4
    injected = {"after": ["model.0"], "rate": 0.1}
    assert passes_of(stochastic(tmp_path, dropout=False, inject=injected), [], 20) == 20


def test_where_passes_come_from_is_said_in_words(tmp_path):
    assert stochastic(tmp_path).described(20) == "20 dropout passes"
    assert stochastic(tmp_path, n_files=2, flips=[0, 1]).described(5) == (
        "40 passes: 2 checkpoints × 4 flips × 5 dropout passes"
    )
    assert stochastic(tmp_path, n_files=3, dropout=False).described(1) == "3 passes: 3 checkpoints"
    assert stochastic(tmp_path, dropout=False, passes=1).described(1) == "one deterministic pass"


def test_settings_of_a_source_do_not_know_the_other_sources(tmp_path):
    alone, among = stochastic(tmp_path), stochastic(tmp_path, n_files=3, flips=[0], passes=7)
    assert alone.settings == among.settings


def test_nothing_that_varies_is_refused_for_several_passes(tmp_path):
    with pytest.raises(Problems, match=r"models\.m: nothing varies between passes"):
        stochastic(tmp_path, dropout=False)
    with pytest.raises(Problems, match="without dropout each checkpoint and flip gives one pass"):
        stochastic(tmp_path, dropout=False, flips=[0], passes=3)


def test_an_ensemble_of_the_same_weights_is_refused(tmp_path):
    for name in ("a.pt", "b.pt"):
        (tmp_path / name).write_bytes(b"same")
    entry = {"network": NETWORK, "checkpoint": f"{tmp_path}/a.pt", "stochastic": {"ensemble": [f"{tmp_path}/b.pt"]}}
    with pytest.raises(Problems, match=r"a\.pt and .*b\.pt are the same weights"):
        models({"m": entry})
    trained = {"network": NETWORK, "train": {}}
    twice = {"network": NETWORK, "checkpoint": {"model": "t"}, "stochastic": {"ensemble": [{"model": "t"}]}}
    with pytest.raises(Problems, match="the weights of t are in the ensemble twice"):
        models({"t": trained, "m": twice})


def test_members_trained_here_are_of_the_same_network():
    entries = {
        "t": {"network": {"name": "SegResNet-BraTS"}, "train": {}},
        "m": {"network": NETWORK, "train": {}, "stochastic": {"ensemble": [{"model": "t"}]}},
    }
    with pytest.raises(Problems, match="the checkpoint of 't' was trained with another network"):
        models(entries)


def test_a_training_may_have_a_seed_of_its_own():
    entries = {name: {"network": NETWORK, "train": {"seed": seed}} for name, seed in (("a", 1), ("b", 2))}
    found = models(entries)
    assert [found[name].train_settings["seed"] for name in "ab"] == [1, 2]
    assert found["a"].train_settings["train"] == found["b"].train_settings["train"]
    assert found["a"].settings["sample"]["seed"] == found["b"].settings["sample"]["seed"]


@pytest.mark.parametrize(
    "other",
    [{"channels": ["t1", "t1ce", "t2", "flair"]}, {"outputs": ["WT", "TC", "ET"]}],
    ids=lambda other: next(iter(other)),
)
def test_members_trained_here_see_and_return_the_same(other):
    entries = {
        "t": {"network": NETWORK, "train": {}, **other},
        "m": {"network": NETWORK, "checkpoint": {"model": "t"}},
    }
    with pytest.raises(Problems, match=f"trained with another {next(iter(other))}"):
        models(entries)


def test_the_same_training_twice_is_no_ensemble():
    trained = {"network": NETWORK, "train": {}}
    entries = {"t": trained, "m": {**trained, "stochastic": {"ensemble": [{"model": "t"}]}}}
    with pytest.raises(Problems, match="are the same training"):
        models(entries)
    entries["m"]["train"] = {"seed": 1}
    assert len(models(entries)["m"].members) == 2


def test_masks_of_windows_need_a_window(tmp_path):
    with pytest.raises(Problems, match="per_window needs a window"):
        stochastic(tmp_path, masks="per_window")


def test_a_rate_is_not_chosen_on_passes_too_few_to_vary(tmp_path):
    with pytest.raises(Problems, match=r"inject\.rate auto needs at least 5 passes"):
        stochastic(tmp_path, inject={"after": ["model.0"], "rate": "auto"}, passes=2)
