"""Moments merge exactly and mean what they say."""

import itertools

import numpy as np
import pytest
from conftest import LPS
from hypothesis import given, settings
from hypothesis import strategies as st

from segtrust.errors import SegtrustError
from segtrust.measures import binary_entropy
from segtrust.moments import (
    Accumulator,
    block_ends,
    block_of,
    merge,
    read_and_merge,
    read_moments,
    write_moments,
)
from segtrust.volumes import Geometry

SHAPE = (4, 5, 3)
GEOMETRY = Geometry((8, 9, 7), LPS)


def draw_passes(n_passes, seed=0):
    return np.random.default_rng(seed).random((n_passes, 3, *SHAPE)).astype(np.float32)


def moments_of(passes, numbers, deterministic=None):
    accumulator = Accumulator(SHAPE)
    for number in numbers:
        accumulator.add(number, passes[number])
    if deterministic is not None:
        accumulator.set_deterministic(deterministic)
    return accumulator.moments((1, 2, 3), GEOMETRY)


def equal(first, second):
    return (
        first.passes == second.passes
        and first.sums.keys() == second.sums.keys()
        and all(
            np.array_equal(first.sums[block][name], second.sums[block][name])
            for block in first.sums
            for name in first.sums[block]
        )
    )


def test_blocks_double():
    blocks = [block_of(index) for index in range(45)]
    assert [block for block, _ in itertools.groupby(blocks)] == [(0, 5), (5, 10), (10, 20), (20, 40), (40, 80)]
    assert all(start <= index < stop for index, (start, stop) in enumerate(blocks))


def test_block_ends_finish_with_the_number_of_passes():
    assert block_ends(20) == [5, 10, 20]
    assert block_ends(23) == [5, 10, 20, 23]
    assert block_ends(3) == [3]


@settings(max_examples=30, deadline=None)
@given(st.permutations(range(12)), st.integers(1, 11))
def test_any_split_and_order_of_passes_gives_the_same_bits(order, cut):
    passes = draw_passes(12)
    whole = moments_of(passes, range(12))
    assert equal(merge([moments_of(passes, order[:cut]), moments_of(passes, order[cut:])]), whole)


def test_the_summary_is_that_of_the_stacked_passes():
    passes = draw_passes(20)
    summary = moments_of(passes, range(20)).summary(20)
    stacked = passes.astype(np.float64)
    unit = 2.0**-24
    assert np.abs(summary.probability - stacked.mean(axis=0)).max() < unit
    assert np.abs(summary.variance - stacked.var(axis=0, ddof=1)).max() < 4 * unit
    assert np.abs(summary.expected_entropy - binary_entropy(stacked).mean(axis=0)).max() < 2 * unit
    assert np.array_equal(summary.votes, (passes >= 0.5).sum(axis=0))
    assert np.array_equal(summary.volumes, (passes >= 0.5).sum(axis=(2, 3, 4)))


@pytest.mark.parametrize("passes", [5, 10, 20])
def test_earlier_blocks_give_the_summary_after_fewer_passes(passes):
    drawn = draw_passes(20)
    early = moments_of(drawn, range(20)).summary(passes)
    alone = moments_of(drawn, range(passes)).summary(passes)
    assert np.array_equal(early.probability, alone.probability)
    assert np.array_equal(early.variance, alone.variance)


def test_passes_that_no_block_ends_at_are_refused():
    with pytest.raises(SegtrustError, match=r"passes 0–6 are asked for"):
        moments_of(draw_passes(20), range(20)).summary(7)


def test_a_missing_pass_is_named():
    with pytest.raises(SegtrustError, match=r"hold passes 0–3, 5–9"):
        moments_of(draw_passes(10), [0, 1, 2, 3, 5, 6, 7, 8, 9]).summary(10)


def test_a_pass_in_two_files_is_refused():
    passes = draw_passes(6)
    with pytest.raises(SegtrustError, match="passes 2 are in two"):
        merge([moments_of(passes, range(3)), moments_of(passes, range(2, 6))])


@pytest.mark.parametrize("value", [0.0, 1e-7, 0.3, 0.5, 1 - 1e-7, 1.0])
def test_equal_passes_have_exactly_no_variance(value):
    passes = np.full((20, 3, *SHAPE), value, np.float32)
    assert not moments_of(passes, range(20)).summary(20).variance.any()


def test_a_single_pass_has_no_variance_to_speak_of():
    assert moments_of(draw_passes(1), [0]).summary(1).variance is None


def test_sums_of_many_certain_passes_do_not_overflow():
    passes = np.ones((1, 3, *SHAPE), np.float32)
    accumulator = Accumulator(SHAPE)
    for number in range(640):
        accumulator.add(number, passes[0])
    assert (accumulator.moments((0, 0, 0), GEOMETRY).summary(640).probability == 1).all()


@pytest.mark.parametrize("value", [-0.1, 1.1, np.nan])
def test_values_that_are_no_probabilities_are_refused(value):
    passes = draw_passes(1)
    passes[0, 0, 0, 0, 0] = value
    with pytest.raises(SegtrustError, match="1 probabilities are outside"):
        moments_of(passes, [0])


def test_a_file_gives_back_what_was_written(tmp_path):
    passes = draw_passes(7)
    moments = moments_of(passes, range(7), deterministic=passes[0])
    write_moments(tmp_path / "m.safetensors", moments, {"seed": 1})
    read, provenance = read_moments(tmp_path / "m.safetensors")
    assert equal(read, moments)
    assert np.array_equal(read.deterministic, passes[0])
    assert (read.start, read.geometry.shape, provenance) == ((1, 2, 3), (8, 9, 7), {"seed": 1})


def test_chunks_of_different_weights_are_not_merged(tmp_path):
    passes = draw_passes(10)
    for first, weights in ((0, "a"), (5, "b")):
        part = moments_of(passes, range(first, first + 5))
        write_moments(tmp_path / f"{first}.safetensors", part, {"model": {"weights": weights}})
    with pytest.raises(SegtrustError, match=r"0\.safetensors and .*5\.safetensors differ in weights"):
        read_and_merge([tmp_path / "0.safetensors", tmp_path / "5.safetensors"])


def test_placing_fills_the_patients_grid_with_zeros_outside_the_box():
    moments = moments_of(draw_passes(1), [0])
    placed = moments.place(np.ones((3, *SHAPE), np.float32))
    assert placed.shape == (3, 8, 9, 7)
    assert placed.sum() == 3 * np.prod(SHAPE)
    canonical = moments.geometry.to_canonical(placed)
    assert canonical[:, 1:5, 2:7, 3:6].all()
