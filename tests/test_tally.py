"""Tallies: counts agree with counting voxels one by one, and add up."""

import copy

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_voxels import draw_patient, summary_of, table_of

from segtrust.bins import CONFIDENCE_BINS, FN, FP, PROBABILITY_BINS, SCORE_BINS, TN, TP
from segtrust.errors import SegtrustError
from segtrust.masks import BANDS, MASKS, band_index
from segtrust.measures import binary_entropy, entropy_4class
from segtrust.regions import CLASSES, REGIONS, four_class, overlay, region_masks
from segtrust.tally import (
    ALL,
    CASE_KEY,
    CLASS_KINDS,
    DETERMINISTIC,
    JOINT_MASKS,
    PROBABILITY,
    REST_KEY,
    Columns,
    Tally,
    pooled,
    tally_columns,
)

TABLES = ("scores", "score_sums", "probabilities", "class_probabilities", "confidences", "joint", "classes")


@pytest.fixture(scope="module")
def table():
    return table_of(*draw_patient(0))


@pytest.fixture(scope="module")
def tally(table):
    return Tally.of(table)


def without_rest(table):
    return table.replace_schema_metadata({CASE_KEY: table.schema.metadata[CASE_KEY]})


def assert_same(a, b):
    """Counts are equal; sums to rounding: the order of adding moves a sum of n terms by less than n · 1e-16."""
    for name in TABLES:
        left, right = a._tables[name], b._tables[name]
        assert np.array_equal(left.key, right.key), name
        assert np.array_equal(left.n, right.n), name
        assert np.allclose(left.sums, right.sums, rtol=1e-9, atol=1e-12), name
    for name, value in a.counts.items():
        assert np.array_equal(value, b.counts[name]), name


# bins


def adversarial(edges, seed=0):
    generator = np.random.default_rng(seed)
    values = np.concatenate(
        [
            edges,
            np.nextafter(edges, 0),
            np.nextafter(edges, 1),
            generator.random(5000),
            10 ** generator.uniform(-40, 0, 5000),
            1 - 10 ** generator.uniform(-16, 0, 5000),
            [0, 1, 5e-324, 1e-310, 1e-300],
        ]
    )
    return values[(values >= 0) & (values <= 1)]


@pytest.mark.parametrize("bins", [PROBABILITY_BINS, CONFIDENCE_BINS, SCORE_BINS], ids=["p", "c", "u"])
def test_every_number_falls_into_the_bin_that_a_search_finds(bins):
    # below 1e-310 a number may count as zero
    values = adversarial(bins.edges)
    expected = np.searchsorted(bins.edges, values, side="right") - 1
    found = bins.index(values)
    assert np.array_equal(found[(values == 0) | (values > 1e-300)], expected[(values == 0) | (values > 1e-300)])


def test_every_half_precision_number_falls_into_the_bin_that_a_search_finds():
    values = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    values = values[(values >= 0) & (values <= 1) & ~np.signbit(values)]
    expected = np.searchsorted(SCORE_BINS.edges, values.astype(np.float64), side="right") - 1
    assert np.array_equal(SCORE_BINS.index_half(values), expected)


@pytest.mark.parametrize("n_bins", [10, 15, 20, 60])
def test_edges_of_equal_bins_are_edges_of_the_tally(n_bins):
    edges = np.arange(n_bins + 1) / n_bins
    assert np.isin(edges, PROBABILITY_BINS.edges).all()
    assert np.isin(edges[edges >= 0.25], CONFIDENCE_BINS.edges).all()


def test_thresholds_of_qu_brats_have_bins_of_their_own():
    thresholds = np.arange(41) / 40
    index = SCORE_BINS.index(thresholds)
    assert np.array_equal(SCORE_BINS.edges[index], thresholds)
    assert np.array_equal(SCORE_BINS.edges[index[:-1] + 1], np.nextafter(thresholds[:-1], 1))


@pytest.mark.parametrize("passes", [5, 10, 20, 25, 30, 50])
def test_votes_of_all_usual_numbers_of_passes_stay_apart(passes):
    votes = (np.arange(passes + 1) / passes).astype(np.float32).astype(np.float64)
    entropy = np.unique(binary_entropy(votes))
    # values closer than 1e-12 differ by the rounding of the logarithm alone
    distinct = 1 + (np.diff(entropy) > 1e-12).sum()
    assert len(np.unique(SCORE_BINS.index(entropy))) == distinct
    assert len(np.unique(PROBABILITY_BINS.index(votes))) == passes + 1


# agreement with counting the rows of the table


def test_parts_of_members_are_differences_of_entropies_and_add_up():
    table = table_of(*draw_patient(12, n_passes=6, n_members=3))
    tally = Tally.of(without_rest(table))
    for region in REGIONS:
        p, expected, member = (
            table[f"{name}_{region}"].to_numpy().astype(float)
            for name in ("probability", "expected_entropy", "member_entropy")
        )
        direct = {
            "mutual_information_between_members": np.maximum(binary_entropy(p) - member, 0),
            "mutual_information_within_members": np.maximum(member - expected, 0),
        }
        inside = rows_in(table, region, "predicted_5mm")
        for measure, u in direct.items():
            counts = np.zeros(len(SCORE_BINS), int)
            np.add.at(counts, np.searchsorted(SCORE_BINS.edges, u[inside], side="right") - 1, 1)
            assert np.array_equal(tally.scores(region, "predicted_5mm", measure).sum(axis=1), counts), measure
            total = tally.score_sums(region, "predicted_5mm", measure)[0].sum()
            assert total == pytest.approx(u[inside].sum(), rel=1e-9)
        # rounding to half precision makes a part negative in a few voxels, where it is clipped at 0
        whole = tally.score_sums(region, "predicted_5mm", "mutual_information")[0].sum()
        assert sum(u[inside].sum() for u in direct.values()) == pytest.approx(whole, abs=1e-3 * inside.sum())


def test_a_model_of_one_member_has_no_parts(tally):
    for measure in ("mutual_information_between_members", "mutual_information_within_members"):
        assert measure not in tally.available
        assert tally.scores("WT", "brain", measure) is None


def test_parts_of_members_are_counted_in_the_rest_of_the_volume():
    summary, labels, brain = draw_patient(6, (30, 28, 26), n_passes=6, n_members=2)
    few, all_rows = (Tally.of(table_of(summary, labels, b)) for b in (brain, np.ones_like(brain)))
    for measure in ("mutual_information_between_members", "mutual_information_within_members"):
        a, b = (tally.scores("TC", "volume", measure) for tally in (few, all_rows))
        assert np.array_equal(a, b), measure
        assert a.sum() == labels.size


def test_a_brief_tally_has_the_same_bins_and_sums_over_bins(table, tally):
    brief = tally_columns(Columns.of_table(table), {}, {"entropy", PROBABILITY}, brief=True)
    assert np.array_equal(brief.scores("TC", "brain", "entropy"), tally.scores("TC", "brain", "entropy"))
    a, b = (each.probabilities("TC", "brain", PROBABILITY) for each in (brief, tally))
    assert np.array_equal(a["n"], b["n"])
    assert np.allclose(a["sum_p"], b["sum_p"], rtol=1e-12)
    for name in ("sum_p2", "sum_log_p", "sum_log_1mp"):
        assert np.allclose(a[name].sum(axis=0), b[name].sum(axis=0), rtol=1e-12)
    assert brief.scores("TC", "brain", "variance") is None
    assert brief.confidences(ALL, "brain", PROBABILITY) is None


def outcome_of(truth, predicted):
    return np.where(truth, np.where(predicted, TP, FN), np.where(predicted, FP, TN))


def direct_measures(table, region):
    """Return (measures, outcome, own outcome, loss, own loss) of a region, float64, from the stored columns."""
    column = {name: table[name].to_numpy() for name in table.column_names}
    position = REGIONS.index(region)
    truth = region_masks(column["reference"])[position]
    p = column[f"probability_{region}"].astype(float)
    p0 = column[f"deterministic_probability_{region}"].astype(float)
    expected = column[f"expected_entropy_{region}"].astype(float)
    measures = {
        "entropy": binary_entropy(p),
        "expected_entropy": expected,
        "mutual_information": np.maximum(binary_entropy(p) - expected, 0),
        "variance": column[f"variance_{region}"].astype(float),
        "deterministic_entropy": binary_entropy(p0),
        "deterministic_entropy_own": binary_entropy(p0),
        "boundary_proximity": -np.abs(column[f"distance_predicted_{region}"].astype(float)),
    }

    def loss(probability):
        clipped = np.clip(probability, 1e-7, 1 - 1e-7)
        return -np.where(truth, np.log(clipped), np.log1p(-clipped))

    return measures, outcome_of(truth, p >= 0.5), outcome_of(truth, p0 >= 0.5), loss(p), loss(p0)


def rows_in(table, region, mask):
    region = "WT" if region == ALL else region
    if mask in BANDS:
        return band_index(table[f"distance_reference_{region}"].to_numpy()) == BANDS.index(mask)
    return (table[f"masks_{region}"].to_numpy() >> MASKS.index(mask) & 1).astype(bool)


@pytest.mark.parametrize("region", REGIONS)
def test_outcomes_and_sums_of_every_measure_agree_with_the_rows(table, region):
    tally = Tally.of(without_rest(table))
    measures, outcome, own, loss, own_loss = direct_measures(table, region)
    for mask in (*MASKS, *BANDS):
        inside = rows_in(table, region, mask)
        for measure, u in measures.items():
            o, ell = (own, own_loss) if measure.endswith("own") else (outcome, loss)
            n = [(inside & (o == k)).sum() for k in range(4)]
            assert np.array_equal(tally.scores(region, mask, measure).sum(axis=0), n), (mask, measure)
            direct = [[term[inside & (o == k)].sum() for k in range(4)] for term in (u, u**2, ell, ell**2, u * ell)]
            assert np.allclose(tally.score_sums(region, mask, measure), direct, rtol=1e-9, atol=1e-12), (mask, measure)


@pytest.mark.parametrize("measure", ["entropy", "mutual_information", "variance"])
def test_scores_lie_in_their_bins(table, measure):
    u, outcome = direct_measures(table, "TC")[0][measure], direct_measures(table, "TC")[1]
    expected = np.zeros((len(SCORE_BINS), 4), int)
    np.add.at(expected, (np.searchsorted(SCORE_BINS.edges, u, side="right") - 1, outcome), 1)
    assert np.array_equal(Tally.of(without_rest(table)).scores("TC", "volume", measure), expected)


def test_nearer_voxels_are_in_later_bins_of_boundary_proximity(table):
    near = np.abs(table["distance_predicted_WT"].to_numpy()) < 2
    counts = Tally.of(without_rest(table)).scores("WT", "volume", "boundary_proximity").sum(axis=1)
    assert counts[np.cumsum(counts[::-1])[::-1] <= near.sum()].sum() == near.sum()


@pytest.mark.parametrize("kind", [PROBABILITY, DETERMINISTIC])
def test_probabilities_and_confidences_agree_with_the_rows(table, kind):
    tally = Tally.of(without_rest(table))
    name = "deterministic_probability" if kind == DETERMINISTIC else "probability"
    for region in REGIONS:
        p = table[f"{name}_{region}"].to_numpy().astype(float)
        truth = region_masks(table["reference"].to_numpy())[REGIONS.index(region)]
        clipped = np.clip(p, 1e-7, 1 - 1e-7)
        terms = {
            "sum_p": p,
            "sum_p2": p**2,
            "sum_log_p": np.log(clipped),
            "sum_log_1mp": np.log1p(-clipped),
            "sum_logit": np.log(clipped) - np.log1p(-clipped),
        }
        c = np.maximum(p, 1 - p)
        for mask in MASKS:
            inside = rows_in(table, region, mask)
            counts = tally.probabilities(region, mask, kind)
            key = np.searchsorted(PROBABILITY_BINS.edges, p[inside], side="right") - 1, truth[inside].astype(int)
            for term, values in terms.items():
                direct = np.zeros(counts["n"].shape)
                np.add.at(direct, key, values[inside])
                assert np.allclose(counts[term], direct, rtol=1e-9, atol=1e-11), (region, mask, term)
            n = np.zeros(counts["n"].shape, int)
            np.add.at(n, key, 1)
            assert np.array_equal(counts["n"], n)
            held = tally.confidences(region, mask, kind)
            correct = (truth == (p >= 0.5)).astype(int)[inside]
            key = np.searchsorted(CONFIDENCE_BINS.edges, c[inside], side="right") - 1, correct
            n, sums = np.zeros(held["n"].shape, int), np.zeros(held["n"].shape)
            np.add.at(n, key, 1)
            np.add.at(sums, key, c[inside])
            assert np.array_equal(held["n"], n)
            assert np.allclose(held["sum_c"], sums, rtol=1e-9)


def test_the_four_class_view_agrees_with_the_rows(table):
    tally = Tally.of(without_rest(table))
    labels = table["reference"].to_numpy()
    p = np.stack([table[f"probability_{region}"].to_numpy() for region in REGIONS]).astype(float)
    distribution = four_class(p)
    argmax = distribution.argmax(axis=0)
    for mask in ("brain", "tumour_5mm", "predicted"):
        inside = rows_in(table, ALL, mask)
        scores = tally.scores(ALL, mask, "entropy_4class")
        wrong, right = (argmax != labels)[inside], (argmax == labels)[inside]
        assert scores.sum(axis=0).tolist() == [0, wrong.sum(), 0, right.sum()]
        total = tally.score_sums(ALL, mask, "entropy_4class")[0].sum()
        assert total == pytest.approx(entropy_4class(distribution)[inside].sum(), rel=1e-9)
        confusion = np.zeros((4, 5), int)
        np.add.at(confusion, (argmax[inside], labels[inside]), 1)
        assert np.array_equal(tally.classes(mask), confusion)
        for label, kind in enumerate(CLASS_KINDS):
            part = tally.probabilities(ALL, mask, kind)
            assert part["n"].sum(axis=0).tolist() == [(labels != label)[inside].sum(), (labels == label)[inside].sum()]
            assert part["sum_p"].sum() == pytest.approx(distribution[label][inside].sum(), rel=1e-9)
        held = tally.confidences(ALL, mask, PROBABILITY)
        assert held["n"].sum(axis=0).tolist() == [wrong.sum(), right.sum()]
        assert held["sum_c"].sum() == pytest.approx(distribution.max(axis=0)[inside].sum(), rel=1e-9)
    assert tally.counts["n_argmax_differs"] == (argmax != overlay(p >= 0.5)).sum()
    assert len(CLASS_KINDS) == len(CLASSES)


def test_overlaps_and_volumes_agree_with_the_volumes():
    summary, labels, brain = draw_patient(1)
    tally = Tally.of(table_of(summary, labels, brain))
    reference = region_masks(labels)
    for found, predicted in (
        (tally.overlap, summary.probability >= 0.5),
        (tally.overlap_deterministic, summary.deterministic >= 0.5),
    ):
        assert np.array_equal(found, [[(a & b).sum() for b in reference] for a in predicted])
    assert np.array_equal(tally.counts["n_reference"], reference.sum(axis=(1, 2, 3)))
    assert np.array_equal(tally.counts["n_predicted"], (summary.probability >= 0.5).sum(axis=(1, 2, 3)))


def test_breaks_of_nesting_are_counted():
    passes = np.zeros((1, 3, 4, 4, 4))
    passes[0, 2, 0, 0, :3] = 1  # enhancing tumour outside of everything
    passes[0, 0, 1] = 1
    tally = Tally.of(table_of(summary_of(passes), np.zeros((4, 4, 4), np.uint8), np.ones((4, 4, 4), bool)))
    assert tally.counts["n_nesting_breaks"] == 3


def test_joint_histograms_hold_the_voxels_of_their_mask(tally):
    for mask in JOINT_MASKS:
        joint = tally.joint("TC", mask, "entropy")
        assert joint.sum() == tally.scores("TC", mask, "entropy").sum()
    with pytest.raises(KeyError, match="brain, predicted_5mm"):
        tally.joint("TC", "box", "entropy")


# adding


@settings(deadline=None, max_examples=8)
@given(st.integers(0, 2**32 - 1), st.integers(2, 5))
def test_any_split_of_the_rows_merged_in_any_order_is_the_whole(seed, n_parts):
    table = _small_table()
    generator = np.random.default_rng(seed)
    part = generator.integers(0, n_parts, table.num_rows)
    pieces = [Tally.of(table.filter(part == k)) for k in range(n_parts)]
    generator.shuffle(pieces)
    merged = pieces[0]
    for piece in pieces[1:]:
        merged = merged + piece
    assert_same(merged, Tally.of(table))


@settings(deadline=None, max_examples=8)
@given(st.integers(0, 2**32 - 1))
def test_the_order_of_voxels_changes_nothing(seed):
    table = _small_table()
    order = np.random.default_rng(seed).permutation(table.num_rows)
    assert_same(Tally.of(table.take(order)), Tally.of(table))


def _small_table(kept=[]):  # noqa: B006 - drawn once
    if not kept:
        kept.append(without_rest(table_of(*draw_patient(2, (10, 9, 8)))))
    return kept[0]


def test_adding_is_the_same_in_both_directions(tally):
    other = Tally.of(table_of(*draw_patient(3)))
    one, two = tally + other, other + tally
    for name in TABLES:
        assert np.array_equal(one._tables[name].sums, two._tables[name].sums)
    assert_same(one, two)


def test_a_cohort_of_copies_is_one_patient_times_their_number(tally):
    assert_same(pooled([tally] * 5), tally.repeated(5))


def test_pooling_keeps_the_numbers_of_every_case(tally):
    assert (tally + tally).cases == tally.cases * 2
    assert "hd95" not in (tally + tally).scalars


def test_counts_beyond_two_to_the_24_stay_exact(tally):
    # a float32 count stops at 16,777,216
    many = 50_000_001
    counts = tally.repeated(many).scores("WT", "brain", "entropy") + tally.scores("WT", "brain", "entropy")
    assert np.array_equal(counts, tally.scores("WT", "brain", "entropy") * (many + 1))
    assert counts.max() > 2**24


def test_tallies_with_other_bins_are_refused(tally):
    other = copy.copy(tally)
    other.settings = {**tally.settings, "scores": 7}
    with pytest.raises(SegtrustError, match="different bins"):
        tally + other


def test_tallies_of_which_only_some_have_a_deterministic_pass_are_refused(tally):
    other = Tally.of(table_of(*draw_patient(4, with_deterministic=False)))
    with pytest.raises(SegtrustError, match="deterministic_entropy"):
        tally + other


# what does not exist


def test_without_a_deterministic_pass_what_depends_on_it_is_none():
    tally = Tally.of(table_of(*draw_patient(5, with_deterministic=False)))
    assert tally.scores("WT", "brain", "deterministic_entropy") is None
    assert tally.score_sums("WT", "brain", "deterministic_entropy_own") is None
    assert tally.probabilities("WT", "brain", DETERMINISTIC) is None
    assert tally.confidences(ALL, "brain", DETERMINISTIC) is None
    assert tally.overlap_deterministic is None
    assert tally.scalars["deterministic_ml"] is None


def test_one_pass_has_no_variance_and_no_mutual_information():
    tally = Tally.of(table_of(*draw_patient(6, n_passes=1)))
    assert tally.scores("WT", "brain", "variance") is None
    assert tally.scores("WT", "brain", "mutual_information") is None
    assert tally.scalars["pairwise_dice"] is None
    assert tally.scores("WT", "brain", "entropy").sum() > 0


def test_an_empty_prediction_has_no_boundary_and_says_so():
    summary, labels, brain = draw_patient(7)
    summary.probability[2] = np.minimum(summary.probability[2], 0.4)
    tally = Tally.of(table_of(summary, labels, brain))
    assert tally.scores("ET", "volume", "boundary_proximity").sum() == 0
    assert tally.scores("WT", "volume", "boundary_proximity").sum() == labels.size
    assert tally.scalars["no_boundary"].tolist() == [False, False, True]
    assert np.isnan(tally.scalars["hd95"][2])


def test_an_empty_mask_has_zero_counts():
    summary, labels, brain = draw_patient(8)
    tally = Tally.of(table_of(summary, np.where(labels == 3, 1, labels).astype(np.uint8), brain))
    assert tally.scores("ET", "reference", "entropy").sum() == 0
    assert tally.probabilities("ET", "reference_5mm", PROBABILITY)["n"].sum() == 0


def test_four_class_series_belong_to_all_alone(tally):
    assert tally.scores(ALL, "brain", "entropy") is None
    assert tally.scores("WT", "brain", "entropy_4class") is None
    assert tally.probabilities(ALL, "brain", PROBABILITY) is None


def test_a_table_without_rows_has_an_empty_tally():
    nothing = np.zeros((3, 3, 3), bool)
    tally = Tally.of(table_of(summary_of(np.zeros((2, 3, 3, 3, 3))), nothing.astype(np.uint8), nothing))
    assert tally.scores("WT", "brain", "entropy").sum() == 0
    assert tally.scores("WT", "volume", "entropy")[0].tolist() == [0, 0, 0, 27]


# files


def test_a_file_holds_the_tally_to_the_last_bit(tmp_path, tally):
    tally.write(tmp_path / "t.parquet", {"model": {"weights": "abc"}})
    read, provenance = Tally.read(tmp_path / "t.parquet")
    assert provenance == {"model": {"weights": "abc"}}
    for name in TABLES:
        for field in ("key", "n", "sums"):
            assert np.array_equal(getattr(read._tables[name], field), getattr(tally._tables[name], field))
    assert read.cases == tally.cases
    assert_same(read, tally)


def test_a_file_with_other_bins_is_refused_by_name(tmp_path, tally):
    other = copy.copy(tally)
    other.settings = {**tally.settings, "format": 0}
    other.write(tmp_path / "old.parquet", {})
    with pytest.raises(SegtrustError, match=r"old\.parquet: this tally has bins and format"):
        Tally.read(tmp_path / "old.parquet")


def test_the_rest_of_the_volume_is_part_of_the_tally():
    table = table_of(*draw_patient(9, (30, 28, 26)))
    assert REST_KEY in table.schema.metadata
    whole, rows = Tally.of(table), Tally.of(without_rest(table))
    assert whole.counts["n_voxels"] == 30 * 28 * 26
    assert rows.counts["n_voxels"] == table.num_rows
    assert np.array_equal(whole.scores("WT", "brain", "entropy"), rows.scores("WT", "brain", "entropy"))
