"""Masks drawn evenly, and masks of windows."""

import numpy as np
import pytest

from segtrust.draws import Layer, draw_masks, multipliers

N = 4000


def dropped(rate, pass_index, balanced=True, **more):
    layer = Layer("layer", "channel", rate)
    (mask,) = draw_masks([layer], {"layer": [(1, N)]}, 0, "a", "member0", pass_index, balanced=balanced, **more)[
        "layer"
    ]
    return ~mask[0]


@pytest.mark.parametrize(("block", "rate"), [((0, 5), 0.2), ((5, 10), 0.2), ((10, 20), 0.25), ((10, 20), 0.03)])
def test_balanced_masks_drop_everything_equally_often_within_a_block(block, rate):
    times = sum(dropped(rate, index).astype(int) for index in range(*block))
    expected = (block[1] - block[0]) * rate
    assert set(np.unique(times)) <= {int(np.floor(expected)), int(np.ceil(expected))}
    spread = np.sqrt(expected % 1 * (1 - expected % 1) / N)
    assert abs(times.mean() - expected) <= 5 * spread + 1e-3


@pytest.mark.parametrize("index", [0, 4, 5, 13, 19])
def test_a_balanced_pass_drops_the_share_its_rate_says(index):
    rate = 0.25
    assert abs(dropped(rate, index).mean() - rate) < 5 * np.sqrt(rate * (1 - rate) / N)


def test_balanced_passes_of_a_block_are_negatively_correlated_and_every_pair_alike():
    first = [dropped(0.4, index) for index in range(5)]
    both = [(first[i] & first[j]).mean() for i in range(5) for j in range(i)]
    # of 5 passes 2 are dropped: a pair with probability 2/5 · 1/4
    assert np.allclose(both, 0.1, atol=5 * np.sqrt(0.1 * 0.9 / N))


def test_a_balanced_pass_is_a_function_of_its_number():
    assert np.array_equal(dropped(0.3, 17), dropped(0.3, 17))
    assert not np.array_equal(dropped(0.3, 17), dropped(0.3, 18))


def test_independent_masks_drop_some_channels_more_often_than_others():
    times = sum(dropped(0.2, index, balanced=False).astype(int) for index in range(5))
    assert times.max() > 2


def test_every_window_may_have_masks_of_its_own():
    drawn = [dropped(0.3, 2, balanced=False, window=window).tobytes() for window in (None, 0, 1)]
    assert len(set(drawn)) == 3


def test_what_is_kept_is_scaled_so_that_the_mean_stays():
    layer = Layer("layer", "channel", 0.2)
    masks = [{"layer": [np.array([[True, False]])]}, {"layer": [np.array([[True, True]])]}]
    (held,) = multipliers([layer], masks)["layer"]
    assert np.array_equal(held, np.float32([[1.25, 0], [1.25, 1.25]]))
