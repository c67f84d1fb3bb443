"""Uncertainty measures of one voxel."""

import numpy as np
import pytest
from scipy import stats

from segtrust import measures


def test_a_coin_has_one_bit():
    assert measures.binary_entropy(0.5) == 1


def test_certainty_has_exactly_no_entropy():
    entropy = measures.binary_entropy(np.array([0.0, 1.0]))
    assert np.array_equal(entropy, [0, 0])
    assert not np.signbit(entropy).any()


def test_binary_entropy_agrees_with_scipy():
    p = np.random.default_rng(0).random(1000)
    assert measures.binary_entropy(p) == pytest.approx(stats.entropy([p, 1 - p], base=2), rel=1e-12)


def test_binary_entropy_keeps_its_precision_near_zero():
    # for small p: p log2(1/p) + p / ln 2, off by less than p²
    p = 1e-12
    assert measures.binary_entropy(p) == pytest.approx(p * (np.log2(1 / p) + 1 / np.log(2)), rel=1e-9)


def test_single_precision_input_is_computed_in_double():
    assert measures.binary_entropy(np.float32([0.25])).dtype == np.float64


def test_four_equal_classes_have_entropy_one_and_a_certain_class_none():
    assert measures.entropy_4class(np.full((4, 1), 0.25)) == pytest.approx([1], abs=1e-15)
    assert measures.entropy_4class(np.array([[0.0], [1], [0], [0]])) == 0


def test_four_class_entropy_agrees_with_scipy():
    distribution = np.random.default_rng(1).dirichlet(np.ones(4), 500).T
    assert measures.entropy_4class(distribution) == pytest.approx(stats.entropy(distribution, base=4), rel=1e-12)


def test_mutual_information_is_never_negative():
    p = np.array([0.1, 0.5])
    expected = np.array([0.9, 0.25])
    assert measures.mutual_information(p, expected) == pytest.approx([0, 0.75])


def test_boundary_proximity_grows_towards_the_boundary_from_both_sides():
    proximity = measures.boundary_proximity(np.array([-9.5, -0.5, 0.5, 9.5]))
    assert np.array_equal(proximity, [-9.5, -0.5, -0.5, -9.5])


def test_boundary_proximity_without_a_boundary_is_undefined():
    assert np.isnan(measures.boundary_proximity(np.array([np.nan]))).all()
