"""The voxels table: rows, columns, masks, distances, and numbers of the case."""

from itertools import combinations, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from scipy.spatial import KDTree

from segtrust.errors import PatientError
from segtrust.files import read_parquet, write_parquet
from segtrust.masks import MASKS
from segtrust.measures import binary_entropy
from segtrust.moments import Summary
from segtrust.regions import REGIONS, region_masks
from segtrust.tally import Tally
from segtrust.voxels import lesionwise_dice, signed_distance, surface_agreement, voxels, write_voxels

SHAPE = (18, 16, 14)


def member_entropy(passes, n_members):
    """Return the mean over members, which have equally many passes in turn, of the entropy of a member's mean."""
    if n_members is None:
        return None
    means = passes.reshape(n_members, -1, *passes.shape[1:]).mean(axis=1)
    return binary_entropy(means).mean(axis=0).astype(np.float32)


def summary_of(passes, deterministic=None, n_members=None):
    """Return the summary of passes, float (T, 3, x, y, z)."""
    n = len(passes)
    votes = passes >= 0.5
    return Summary(
        passes=n,
        probability=passes.mean(axis=0).astype(np.float32),
        deterministic=deterministic,
        expected_entropy=binary_entropy(passes).mean(axis=0).astype(np.float32),
        member_entropy=member_entropy(passes, n_members),
        variance=passes.var(axis=0, ddof=1).astype(np.float32) if n > 1 else None,
        votes=votes.sum(axis=0),
        volumes=votes.sum(axis=(2, 3, 4)),
    )


def draw_patient(seed, shape=SHAPE, n_passes=4, with_deterministic=True, n_members=None):
    """Return (summary, labels, brain): a nested tumour of smooth noise, and passes that follow it loosely."""
    generator = np.random.default_rng(seed)
    axes = np.meshgrid(*(np.linspace(-1, 1, size) for size in shape), indexing="ij")
    radius = np.sqrt(sum(axis**2 for axis in axes))
    brain = radius < 0.95

    def noise():
        return ndimage.gaussian_filter(generator.normal(size=(3, *shape)), (0, 1, 1, 1)) * 3

    level = np.array([0.55, 0.4, 0.25]).reshape(3, 1, 1, 1)
    depth = 12 * (level - radius)
    member = (depth + noise() > 0) & brain
    labels = np.zeros(shape, np.uint8)
    for region, label in zip(member, (2, 1, 3), strict=True):
        labels[region] = label
    logit = depth + noise()
    draws = logit + generator.normal(size=(n_passes, 3, *shape))
    passes = np.where(brain, 1 / (1 + np.exp(-draws)), 0)
    own = np.where(brain, 1 / (1 + np.exp(-logit)), 0).astype(np.float32)
    return summary_of(passes, own if with_deterministic else None, n_members), labels, brain


def table_of(summary, labels, brain, spacing_mm=(1, 1, 1), **options):
    return voxels(summary, labels, brain, brain, spacing_mm=spacing_mm, patient="p", **options)


def on_grid(table, name, shape=SHAPE):
    """Return a column on the whole grid, zero where there is no row."""
    grid = np.zeros(np.prod(shape), table[name].to_numpy().dtype)
    grid[table["index"].to_numpy()] = table[name].to_numpy()
    return grid.reshape(shape)


# distances


def distance_by_search(member, spacing_mm):
    """Return the signed distance by looking for the nearest voxel centre of the other class."""
    centres = np.stack(np.meshgrid(*map(np.arange, member.shape), indexing="ij"), axis=-1) * np.array(spacing_mm)
    to_members = KDTree(centres[member]).query(centres)[0]
    to_others = KDTree(centres[~member]).query(centres)[0]
    half = min(spacing_mm) / 2
    return np.where(member, half - to_others, to_members - half)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**32 - 1), st.tuples(*[st.sampled_from([0.5, 1.0, 1.2, 3.0])] * 3), st.floats(0.02, 0.98))
def test_signed_distances_are_those_of_an_exhaustive_search(seed, spacing_mm, share):
    member = np.random.default_rng(seed).random((9, 7, 8)) < share
    if member.any() and not member.all():
        expected = distance_by_search(member, spacing_mm)
        assert signed_distance(member, spacing_mm) == pytest.approx(expected, rel=1e-5)  # kept in float32


def test_the_axes_of_the_spacing_are_those_of_the_array():
    member = np.zeros((5, 5, 5), bool)
    member[2, 2, 2] = True
    distance = signed_distance(member, (1, 2, 4))
    assert [distance[4, 2, 2], distance[2, 4, 2], distance[2, 2, 4]] == pytest.approx([1.5, 3.5, 7.5])


@pytest.mark.parametrize("full", [False, True])
def test_an_empty_or_full_mask_has_no_distance(full):
    assert np.isnan(signed_distance(np.full((3, 3, 3), full), (1, 1, 1))).all()


def test_the_edge_of_the_grid_is_no_boundary():
    member = np.zeros((9, 3, 3), bool)
    member[:5] = True
    assert signed_distance(member, (1, 1, 1))[:, 1, 1] == pytest.approx(
        [-4.5, -3.5, -2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 3.5]
    )


# masks


@pytest.mark.parametrize("spacing_mm", [(1, 1, 1), (1, 1.25, 2.5)])
def test_every_mask_agrees_with_its_definition(spacing_mm):
    summary, labels, brain = draw_patient(0)
    t1 = brain & (np.random.default_rng(0).random(SHAPE) < 0.9)
    table = voxels(summary, labels, brain, t1, spacing_mm=spacing_mm, patient="p")
    reference, predicted = region_masks(labels), summary.probability >= 0.5

    def near(member, limit):
        return ndimage.distance_transform_edt(~member, spacing_mm) <= limit + 1e-6

    for position, region in enumerate(REGIONS):
        ref, pred = reference[position], predicted[position]
        box = np.zeros(SHAPE, bool)
        where = np.argwhere(ref)
        box[tuple(slice(max(a - 5, 0), b + 6) for a, b in zip(where.min(axis=0), where.max(axis=0), strict=True))] = (
            True
        )
        expected = {
            "brain": brain,
            "brain_t1": t1,
            "predicted": pred,
            "predicted_5mm": near(pred, 5),
            "plausible": summary.probability[position] > np.float32(0.02),
            "tumour_5mm": near(reference[0] | predicted[0], 5),
            "union": ref | pred,
            "reference": ref,
            "reference_5mm": near(ref, 5),
            "box": box,
            "boundary_3mm": (np.abs(distance_by_search(ref, spacing_mm)) <= 3 + 1e-6)
            | (np.abs(distance_by_search(pred, spacing_mm)) <= 3 + 1e-6),
        }
        bits = on_grid(table, f"masks_{region}")
        for mask, member in expected.items():
            assert np.array_equal(bits >> MASKS.index(mask) & 1, member), (region, mask)


def test_a_voxel_exactly_five_millimetres_away_is_in_the_dilation():
    passes = np.zeros((1, 3, 12, 3, 3))
    passes[:, :, 2, 1, 1] = 1
    brain = np.ones((12, 3, 3), bool)
    labels = np.zeros((12, 3, 3), np.uint8)
    table = table_of(summary_of(passes), labels, brain, (1.25, 1, 1))  # four voxels of 1.25 mm
    near = on_grid(table, "masks_WT", (12, 3, 3))[:, 1, 1] >> MASKS.index("predicted_5mm") & 1
    assert np.array_equal(np.flatnonzero(near), np.arange(0, 7))


# rows and columns


def test_rows_are_the_brain_and_every_mask_and_the_rest_is_counted_beside_them():
    summary, labels, brain = draw_patient(1, (30, 28, 26))
    table = table_of(summary, labels, brain)
    rows = table["index"].to_numpy()
    bits = np.bitwise_or.reduce([table[f"masks_{region}"].to_numpy() for region in REGIONS])
    assert np.all(bits > 1)
    assert np.isin(np.flatnonzero(brain), rows).all()
    assert len(rows) < labels.size
    assert Tally.of(table).scores("WT", "volume", "entropy").sum() == labels.size


def test_rows_ascend_and_index_the_grid_in_c_order():
    summary, labels, brain = draw_patient(2)
    table = table_of(summary, labels, brain)
    index = table["index"].to_numpy()
    assert np.all(np.diff(index.astype(np.int64)) > 0)
    assert np.array_equal(table["reference"].to_numpy(), labels.reshape(-1)[index])
    assert np.array_equal(table["probability_ET"].to_numpy(), summary.probability[2].reshape(-1)[index])


def test_columns_are_those_of_the_contract():
    table = table_of(*draw_patient(3))
    kinds = {
        "probability": "float",
        "deterministic_probability": "float",
        "expected_entropy": "halffloat",
        "variance": "halffloat",
        "distance_predicted": "halffloat",
        "distance_reference": "halffloat",
        "masks": "uint16",
    }
    expected = {"index": "uint32", "reference": "uint8", "prediction": "uint8", "in_brain": "bool"}
    expected |= {f"{name}_{region}": kind for region, (name, kind) in product(REGIONS, kinds.items())}
    assert {field.name: str(field.type) for field in table.schema} == expected


def test_several_members_have_a_column_of_their_entropy():
    summary, labels, brain = draw_patient(3, n_passes=6, n_members=3)
    table = table_of(summary, labels, brain)
    assert str(table.schema.field("member_entropy_TC").type) == "halffloat"
    column = summary.member_entropy[1].reshape(-1)[table["index"].to_numpy()]
    assert np.array_equal(table["member_entropy_TC"].to_numpy(), column.astype(np.float16))


def test_one_pass_has_no_variance_column_and_no_deterministic_one_unless_given():
    names = table_of(*draw_patient(4, n_passes=1, with_deterministic=False)).column_names
    assert not [name for name in names if name.startswith(("variance", "deterministic"))]


def test_a_table_read_from_its_file_has_the_same_tally(tmp_path):
    table = table_of(*draw_patient(5))
    write_parquet(tmp_path / "v.parquet", table, {"seed": 1})
    read, _ = read_parquet(tmp_path / "v.parquet")
    assert Tally.of(read).to_table().equals(Tally.of(table).to_table(), check_metadata=True)


def test_a_wider_set_of_rows_changes_nothing_in_the_volume():
    summary, labels, brain = draw_patient(6, (30, 28, 26))
    few, all_rows = (Tally.of(table_of(summary, labels, b)) for b in (brain, np.ones_like(brain)))
    for measure in ("entropy", "variance", "boundary_proximity", "deterministic_entropy"):
        a, b = (tally.scores("TC", "volume", measure) for tally in (few, all_rows))
        assert np.array_equal(a, b), measure
        a, b = (tally.score_sums("TC", "volume", measure) for tally in (few, all_rows))
        assert np.allclose(a, b, rtol=1e-9), measure
    for name, value in few.counts.items():
        assert np.array_equal(value, all_rows.counts[name]), name


def test_a_model_that_predicts_outside_the_brain_is_counted_there():
    summary, labels, brain = draw_patient(7, (30, 28, 26))
    summary.probability[:, 0, 0, 0] = 0.01
    tally = Tally.of(table_of(summary, labels, brain))
    inside = Tally.of(table_of(summary, labels, np.ones_like(brain)))
    a, b = (t.probabilities("WT", "volume", "probability")["sum_p"].sum() for t in (tally, inside))
    assert a == pytest.approx(b, rel=1e-12)


def test_a_cavity_keeps_its_own_code():
    summary, labels, brain = draw_patient(8)
    cavity = (labels == 0) & brain & (np.arange(SHAPE[0])[:, None, None] < 6)
    table = table_of(summary, labels, brain, cavity=cavity)
    assert np.array_equal(on_grid(table, "reference_code") == 4, cavity)
    assert Tally.of(table).classes("brain")[:, 4].sum() == cavity.sum()


# errors


@pytest.mark.parametrize(("bad", "shown"), [(1.5, "largest 1.5"), (-0.25, "smallest -0.25"), (np.nan, "nan")])
def test_probabilities_out_of_range_are_named(bad, shown):
    summary, labels, brain = draw_patient(9)
    summary.probability[1, 3, 3, 3] = bad
    with pytest.raises(PatientError, match=rf"p: probability has 1 values outside \[0, 1\] or NaN .*{shown}"):
        table_of(summary, labels, brain)


def test_a_mask_of_another_shape_is_an_error():
    summary, labels, brain = draw_patient(10)
    with pytest.raises(PatientError, match="brain is bool"):
        table_of(summary, labels, brain[1:])


# numbers of the case


@pytest.mark.parametrize("spacing_mm", [(1.0, 1.0, 1.0), (1.0, 1.0, 2.5)])
def test_surface_metrics_agree_with_monai(spacing_mm):
    torch = pytest.importorskip("torch")
    metrics = pytest.importorskip("monai.metrics")
    summary, labels, _ = draw_patient(11)
    pair = summary.probability[0] >= 0.5, region_masks(labels)[0]
    tensors = [torch.from_numpy(np.ascontiguousarray(member[None, None])) for member in pair]
    found = surface_agreement(*pair, spacing_mm)
    hd95 = metrics.compute_hausdorff_distance(*tensors, include_background=True, percentile=95, spacing=spacing_mm)
    nsd = metrics.compute_surface_dice(*tensors, [1.0], include_background=True, spacing=spacing_mm)
    assert found["hd95"] == pytest.approx(float(hd95), rel=1e-5)  # both use float32 distances
    assert found["nsd_1mm"] == pytest.approx(float(nsd), rel=1e-6)


def test_surfaces_of_empty_masks_follow_the_brats_rule():
    empty, full = np.zeros((4, 4, 4), bool), np.ones((4, 4, 4), bool)
    assert surface_agreement(empty, empty, (1, 1, 1)) == {"hd95": None, "hd95_brats": 0.0, "nsd_1mm": None}
    assert surface_agreement(full, empty, (1, 1, 1)) == {"hd95": None, "hd95_brats": 373.13, "nsd_1mm": 0.0}


def lesionwise_by_loops(predicted, reference):
    """The scorer of BraTS 2023, lesion by lesion, for voxels of 1 mm³."""
    structure, all_neighbours = ndimage.generate_binary_structure(3, 2), np.ones((3, 3, 3))
    grown, n_lesions = ndimage.label(ndimage.binary_dilation(reference, structure, iterations=3), all_neighbours)
    part, n_parts = ndimage.label(predicted, all_neighbours)
    dices, touched = [], set()
    for lesion in range(1, n_lesions + 1):
        own = reference & (grown == lesion)
        around = ndimage.binary_dilation(own, structure, iterations=3)
        parts = set(np.unique(part[around])) - {0}
        touched |= parts
        mine = np.isin(part, list(parts))
        if own.sum() > 50:
            dices.append(2 * (own & mine).sum() / (own.sum() + mine.sum()))
    n = len(dices) + n_parts - len(touched)
    return sum(dices) / n if n else 1.0


@pytest.mark.parametrize("seed", range(8))
def test_lesionwise_dice_agrees_with_a_loop_over_lesions(seed):
    generator = np.random.default_rng(seed)
    fields = [ndimage.gaussian_filter(generator.normal(size=(40, 40, 40)), 2.5) for _ in range(2)]
    reference = fields[0] > 0.085
    predicted = (fields[0] + 0.6 * fields[1]) > 0.1
    assert lesionwise_dice(predicted, reference, (1, 1, 1)) == pytest.approx(lesionwise_by_loops(predicted, reference))


def test_lesionwise_dice_of_nothing_is_one_and_of_a_false_alarm_zero():
    empty = np.zeros((9, 9, 9), bool)
    assert lesionwise_dice(empty, empty, (1, 1, 1)) == 1
    assert lesionwise_dice(~empty, empty, (1, 1, 1)) == 0


def test_pairwise_dice_is_the_agreement_of_passes_weighted_by_volume():
    generator = np.random.default_rng(12)
    votes = generator.random((5, 3, *SHAPE)) < np.array([0.6, 0.2, 0.0]).reshape(3, 1, 1, 1)
    summary = summary_of(votes.astype(float))
    tally = Tally.of(table_of(summary, np.zeros(SHAPE, np.uint8), np.ones(SHAPE, bool)))
    for region in (0, 1):
        pairs = list(combinations(votes[:, region], 2))
        both, sizes = sum((a & b).sum() for a, b in pairs), sum(a.sum() + b.sum() for a, b in pairs)
        assert tally.scalars["pairwise_dice"][region] == pytest.approx(2 * both / sizes)
    assert tally.scalars["pairwise_dice"][2] == 1  # no pass votes anywhere: all agree


def test_volumes_are_in_millilitres():
    summary, labels, brain = draw_patient(13)
    scalars = Tally.of(table_of(summary, labels, brain, (1, 2, 3))).scalars
    assert scalars["reference_ml"] == pytest.approx(region_masks(labels).sum(axis=(1, 2, 3)) * 0.006)
    assert scalars["pass_ml"] == pytest.approx(summary.volumes * 0.006)


def test_a_written_table_is_read_as_it_was(tmp_path):
    summary, labels, brain = draw_patient(0)
    table = table_of(summary, labels, brain)
    write_voxels(tmp_path / "v.parquet", table, {"seed": 1})
    read, provenance = read_parquet(tmp_path / "v.parquet")
    assert provenance == {"seed": 1}
    for name in table.column_names:
        assert np.array_equal(read[name].to_numpy(), table[name].to_numpy(), equal_nan=True), name
