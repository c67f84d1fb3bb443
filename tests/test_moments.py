"""Moments merge exactly and mean what they say."""

import numpy as np
import pytest
import torch
from conftest import LPS
from hypothesis import given, settings
from hypothesis import strategies as st

from segtrust.errors import SegtrustError
from segtrust.measures import binary_entropy
from segtrust.moments import (
    Accumulator,
    TensorAccumulator,
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


def moments_of(passes, numbers, deterministic=None, source="member0", kind=Accumulator):
    accumulator = kind(SHAPE, source)
    for number in numbers:
        accumulator.add(number, passes[number])
    if deterministic is not None:
        accumulator.set_deterministic(deterministic)
    return accumulator.moments((1, 2, 3), GEOMETRY)


def equal(first, second):
    return (
        first.volumes.keys() == second.volumes.keys()
        and first.sums.keys() == second.sums.keys()
        and all(
            np.array_equal(first.sums[block][name], second.sums[block][name])
            for block in first.sums
            for name in first.sums[block]
        )
    )


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
    # the square is that of a rounded probability: p·2^-24, besides half a unit
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
    with pytest.raises(SegtrustError, match="passes 2 of member0 are in two"):
        merge([moments_of(passes, range(3)), moments_of(passes, range(2, 6))])


@pytest.mark.parametrize("value", [0.0, 1e-7, 0.3, 0.5, 1 - 1e-7, 1.0])
def test_equal_passes_have_exactly_no_variance(value):
    passes = np.full((20, 3, *SHAPE), value, np.float32)
    assert not moments_of(passes, range(20)).summary(20).variance.any()


def test_a_single_pass_has_no_variance_to_speak_of():
    assert moments_of(draw_passes(1), [0]).summary(1).variance is None


def test_sums_of_many_certain_passes_do_not_overflow():
    passes = np.ones((1, 3, *SHAPE), np.float32)
    accumulator = Accumulator(SHAPE, "member0")
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


def test_sums_of_tensors_are_those_of_arrays():
    passes = draw_passes(12)
    tensors = [torch.from_numpy(one) for one in passes]
    on_tensors = moments_of(tensors, range(12), tensors[0], kind=TensorAccumulator)
    on_arrays = moments_of(passes, range(12), passes[0])
    assert np.array_equal(on_tensors.deterministic, on_arrays.deterministic)
    for key, sums in on_arrays.sums.items():
        for name, array in sums.items():
            found = on_tensors.sums[key][name]
            assert found.dtype == array.dtype
            # logarithms of two libraries round differently, by a unit a pass
            within = 12 if name == "entropy" else 0
            assert np.abs(found.astype(np.int64) - array.astype(np.int64)).max() <= within
    assert all(np.array_equal(on_tensors.volumes[key], counts) for key, counts in on_arrays.volumes.items())


@pytest.mark.parametrize("value", [0.0, 1e-30, 1e-9, 1e-7, 1e-4, 0.1, 0.5, 0.9, 1 - 6e-8, 1.0])
def test_the_entropy_that_is_summed_is_the_binary_entropy(value):
    passes = np.full((5, 3, *SHAPE), value, np.float32)
    found = moments_of(passes, range(5)).summary(5).expected_entropy
    assert np.abs(found - binary_entropy(np.float32(value))).max() <= 2 * 2.0**-24


def two_members(n_each):
    """Return (passes by source, moments) of two members, one of them seen under a flip too."""
    sources = ("member0", "member0-flip0", "member1", "member1-flip0")
    passes = {source: draw_passes(n_each, seed) ** (1 + seed % 3) for seed, source in enumerate(sources)}
    parts = [moments_of(passes[source], range(n_each), source=source) for source in sources]
    return passes, merge(parts)


def test_passes_of_all_sources_make_one_mean():
    passes, moments = two_members(6)
    summary = moments.summary(6)
    stacked = np.concatenate(list(passes.values())).astype(np.float64)
    assert summary.passes == 24
    assert np.abs(summary.probability - stacked.mean(axis=0)).max() < 2.0**-24
    assert np.abs(summary.variance - stacked.var(axis=0, ddof=1)).max() < 4 * 2.0**-24
    assert np.array_equal(summary.volumes, (stacked >= 0.5).sum(axis=(2, 3, 4)))


def test_entropy_splits_into_expected_within_and_between_members():
    passes, moments = two_members(6)
    summary = moments.summary(6)
    of_members = [
        np.concatenate([passes[source] for source in passes if source.startswith(member)]).astype(np.float64)
        for member in ("member0", "member1")
    ]
    expected = np.mean([binary_entropy(member.mean(axis=0)) for member in of_members], axis=0)
    assert np.abs(summary.member_entropy - expected).max() < 1e-6
    assert (summary.expected_entropy <= summary.member_entropy + 1e-6).all()
    assert (summary.member_entropy <= binary_entropy(summary.probability) + 1e-6).all()


def test_a_single_member_and_members_of_one_pass_have_no_parts():
    assert moments_of(draw_passes(6), range(6)).summary(6).member_entropy is None
    parts = [moments_of(draw_passes(1, seed), [0], source=f"member{seed}") for seed in range(3)]
    summary = merge(parts).summary(1)
    assert summary.member_entropy is None
    assert summary.variance is not None


def test_every_source_must_have_the_passes_asked_for():
    passes = draw_passes(6)
    parts = [moments_of(passes, range(6)), moments_of(passes, range(5), source="member1")]
    with pytest.raises(SegtrustError, match="hold passes 0–4 of member1, but passes 0–5"):
        merge(parts).summary(6)


def test_chunks_of_members_keep_the_weights_of_each(tmp_path):
    passes = draw_passes(2)
    paths = []
    for source, weights in (("member0", "a"), ("member1", "b"), ("member1-flip2", "b")):
        paths.append(tmp_path / f"{source}_0-1.safetensors")
        provenance = {"model": {"weights": weights, "code": "c"}}
        write_moments(paths[-1], moments_of(passes, range(2), source=source), provenance)
    assert read_and_merge(paths)[1]["model"] == {"weights": {"member0": "a", "member1": "b"}, "code": "c"}
    write_moments(
        paths[2], moments_of(passes, range(2), source="member1-flip2"), {"model": {"weights": "x", "code": "c"}}
    )
    with pytest.raises(SegtrustError, match="differ in weights"):
        read_and_merge(paths)


def test_placing_fills_the_patients_grid_with_zeros_outside_the_box():
    moments = moments_of(draw_passes(1), [0])
    placed = moments.place(np.ones((3, *SHAPE), np.float32))
    assert placed.shape == (3, 8, 9, 7)
    assert placed.sum() == 3 * np.prod(SHAPE)
    canonical = moments.geometry.to_canonical(placed)
    assert canonical[:, 1:5, 2:7, 3:6].all()
