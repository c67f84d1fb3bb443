import hashlib

import numpy as np
import pytest
import torch

from segtrust.errors import SegtrustError
from segtrust.networks import build, load_checkpoint
from segtrust.train import curve_table, region_dice, train

SHAPE = (20, 18, 16)
SETTINGS = {
    "iterations": 6,
    "batch": 2,
    "patch": [16, 16, 16],
    "positive": 0.7,
    "loss": "dice_ce",
    "learning_rate": 3e-3,
    "weight_decay": 1e-5,
    "validate_every": 2,
    "precision": "float32",
}
REGIONS = ["TC", "WT", "ET"]
CLASSES = {"softmax": ["background", "NCR", "ED", "ET"]}


def patients(n, seed=0):
    """Return scans whose labels are boxes one in another, each brighter in one modality."""
    generator = np.random.default_rng(seed)
    found = []
    for _ in range(n):
        labels = np.zeros(SHAPE, np.uint8)
        first = generator.integers(1, 6, 3)
        for margin, label in ((0, 2), (2, 3), (4, 1)):
            box = tuple(slice(start + margin, start + 11 - margin) for start in first)
            labels[box] = label
        image = generator.normal(0, 0.3, (4, *SHAPE)).astype(np.float32)
        image[3] += 2 * (labels > 0)
        image[1] += 2 * (labels == 3)
        found.append((image, labels))
    return found


def network(outputs=REGIONS, seed=0, dropout=0.1):
    n_outputs = 4 if outputs is CLASSES else 3
    return build(
        {"name": "UNet-Res", "channels": [4, 8], "strides": [2], "out_channels": n_outputs, "dropout": dropout}, seed
    )


def run(folder, model=None, outputs=REGIONS, training=None, validation=None, log=lambda line: None, **changes):
    seed, code = changes.pop("seed", 0), changes.pop("code", "")
    return train(
        network(outputs) if model is None else model,
        patients(3) if training is None else training,
        patients(1, seed=9) if validation is None else validation,
        channels=["t1ce", "t1", "t2", "flair"],
        outputs=outputs,
        window=None,
        overlap=0.5,
        settings={**SETTINGS, **changes},
        seed=seed,
        device="cpu",
        checkpoint=folder / "checkpoint.pt",
        state=folder / "state.pt",
        code=code,
        log=log,
    )


def same(folder, other):
    weights, others = (load_checkpoint(path / "checkpoint.pt") for path in (folder, other))
    return all(torch.equal(weights[name], others[name]) for name in others)


def folders(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    return tmp_path / "one", tmp_path / "two"


class Killed(BaseException):
    pass


def killer(words):
    def log(line):
        if line.startswith(words):
            raise Killed

    return log


@pytest.mark.parametrize("outputs", [REGIONS, CLASSES], ids=["sigmoid", "softmax"])
def test_a_network_learns_boxes(tmp_path, outputs):
    curve = run(tmp_path, outputs=outputs, iterations=40, validate_every=20, learning_rate=2e-2)
    assert curve.loss.iloc[-1] < curve.loss.iloc[0]
    assert curve.dice_wt.max() > 0.7


def test_the_curve_has_a_row_per_validation(tmp_path):
    curve = run(tmp_path, iterations=5)
    assert list(curve.iteration) == [2, 4, 5]
    assert list(curve.columns) == ["iteration", "loss", "learning_rate", "dice_wt", "dice_tc", "dice_et"]


def test_the_table_of_a_curve_has_its_columns_and_rows(tmp_path):
    curve = run(tmp_path, iterations=4)
    assert curve_table(curve).to_pylist() == curve.to_dict("records")


@pytest.mark.parametrize("moment", ["iterations: 3 of 6", "validation after 4 of 6", "going on"])
def test_a_training_that_was_killed_goes_on_to_the_same_result(tmp_path, moment):
    whole, stopped = folders(tmp_path)
    expected = run(whole)
    for words in ("iterations: 3 of 6", moment):
        with pytest.raises(Killed):
            run(stopped, log=killer(words))
    assert not (stopped / "checkpoint.pt").exists()
    lines = []
    curve = run(stopped, log=lines.append)
    assert any(line.startswith("going on after iteration") for line in lines)
    assert curve.equals(expected)
    assert (stopped / "checkpoint.sha256").read_text() == (whole / "checkpoint.sha256").read_text()


def test_the_state_holds_nothing_that_must_be_unpickled(tmp_path):
    with pytest.raises(Killed):
        run(tmp_path, log=killer("iterations: 3 of 6"))
    assert torch.load(tmp_path / "state.pt", weights_only=True)["done"] == 2


@pytest.mark.parametrize(
    "change", [{"learning_rate": 1e-2}, {"training": patients(3, seed=1)}, {"seed": 1}, {"code": "b"}]
)
def test_the_state_of_another_training_is_not_used(tmp_path, change):
    with pytest.raises(Killed):
        run(tmp_path, log=killer("iterations: 3 of 6"), **change)
    lines = []
    curve = run(tmp_path, iterations=6, log=lines.append)
    assert any("belongs to another training" in line for line in lines)
    assert list(curve.iteration) == [2, 4, 6]


def test_a_training_that_ended_leaves_no_state(tmp_path):
    run(tmp_path, iterations=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint.pt", "checkpoint.sha256"]


def test_the_same_seed_trains_the_same_network_whatever_ran_before(tmp_path):
    one, two = folders(tmp_path)
    run(one)
    torch.manual_seed(3)
    run(two)
    assert same(one, two)


def test_another_seed_trains_another_network(tmp_path):
    one, two = folders(tmp_path)
    run(one)
    run(two, seed=1)
    assert not same(one, two)


def test_training_leaves_torchs_random_numbers_alone(tmp_path):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    run(tmp_path, iterations=1)
    assert torch.equal(torch.rand(3), expected)


def test_the_checkpoint_is_the_best_and_not_the_last(tmp_path, monkeypatch):
    model, scores, weights = network(), [[0.5, 0.5, 0.5], [0.8, 0.9, 0.7], [0.9, 0.7, 0.7]], []

    def validate(trained, *_):
        weights.append({name: tensor.clone() for name, tensor in trained.state_dict().items()})
        return scores[len(weights) - 1]

    monkeypatch.setattr("segtrust.train._validate", validate)
    run(tmp_path, model=model)
    best = load_checkpoint(tmp_path / "checkpoint.pt")
    assert all(torch.equal(best[name], tensor) for name, tensor in weights[1].items())
    assert not all(torch.equal(best[name], tensor) for name, tensor in weights[2].items())


def test_the_digest_beside_the_checkpoint_is_its_sha256(tmp_path):
    run(tmp_path, iterations=1)
    digest = hashlib.sha256((tmp_path / "checkpoint.pt").read_bytes()).hexdigest()
    assert (tmp_path / "checkpoint.sha256").read_text() == f"{digest}  checkpoint.pt\n"


def test_without_validation_patients_a_fifth_of_the_training_patients_validates(tmp_path):
    lines = []
    run(tmp_path, training=patients(5), validation=[], iterations=1, log=lines.append)
    assert lines[0].startswith("4 patients train, 1 validate")


def test_too_few_patients_are_refused(tmp_path):
    with pytest.raises(SegtrustError, match="1 patients have split train"):
        run(tmp_path, training=patients(1), validation=[])


def test_a_patch_the_network_does_not_take_is_refused(tmp_path):
    with pytest.raises(SegtrustError, match=r"patch \[16, 15, 16\]: the sides must be multiples of 2"):
        run(tmp_path, patch=[16, 15, 16])


def test_patients_smaller_than_the_patch_are_padded(tmp_path):
    assert len(run(tmp_path, iterations=1, patch=[24, 24, 24])) == 1


def test_dice_of_an_empty_region_is_one_where_both_are_empty_and_zero_where_one_is():
    labels = np.zeros((2, 2, 2), np.uint8)
    labels[0] = 2
    prediction = np.zeros((3, 2, 2, 2), bool)
    prediction[0, 0, 0], prediction[2, 0, 0, 0] = True, True
    # WT: 2 of 4 voxels found: 2·2 / (2 + 4); TC: both empty; ET: empty in the reference alone
    np.testing.assert_allclose(region_dice(prediction, labels), [4 / 6, 1, 0])
