"""Bins: where a tally's counts lie; left-closed, fine, and such that the bins of a metric are unions of them.

Probability bins refine every k/10, k/15, k/20 and k/60, with bins of their own for the votes of usual numbers of
passes; score bins are dense towards 0 and 1 (definitions, section 4).
"""

from functools import cache, cached_property

import numpy as np

from segtrust.measures import binary_entropy

TP, FP, FN, TN = range(4)
JOINT_BINS = 256
CLIP = 1e-7  # of p, in every logarithm
_LOSS_BINS_BELOW = 60  # bins of a loss below 0.1
_STRETCH = 2**15  # numbers added one by one


def _with_atoms(edges, atoms):
    """Return sorted edges in which each atom has a bin of its own."""
    atoms = np.asarray(atoms, np.float64)
    edges = np.unique(np.concatenate([edges, atoms, np.nextafter(atoms, np.inf)]))
    return edges[edges <= 1]


def _votes():
    """Return the probabilities that votes of T passes give, for each T that divides 60 or 100, as stored."""
    shares = np.unique(np.concatenate([np.arange(61) / 60, np.arange(101) / 100]))
    return shares.astype(np.float32).astype(np.float64)


def _probability_edges():
    # every k/10, k/15, k/20 and k/60 is a j/960; steps of 0.1 in the logit serve recalibration
    logit_spaced = 1 / (1 + np.exp(-np.linspace(-16, 16, 321)))
    return _with_atoms(np.concatenate([np.arange(961) / 960, logit_spaced]), _votes())


def _confidence_edges():
    # of one class in two the confidence is at least 1/2, of one in four at least 1/4
    logit_spaced = 1 - 1 / (1 + np.exp(np.linspace(0, 16, 161)))
    edges = np.concatenate([[0.0], np.arange(240, 961) / 960, logit_spaced])
    votes = _votes()
    return _with_atoms(edges, np.concatenate([votes[votes >= 0.5], 1 - votes[votes <= 0.5]]))


def _score_edges():
    # steps of 1/960; towards 0, 48 bins an octave where variance and mutual information lie, then 16 down to 6e-11
    # and, for rank correlation alone, 1 down to 3e-39; towards 1, where entropy is flat and the most uncertain
    # voxels crowd, 12 bins an octave up to 1 - 1e-8 and 4 up to 1 - 1e-14
    octaves = (np.arange(-128, -34), np.arange(-34 * 16, -8 * 16) / 16, np.arange(-8 * 48, -2 * 48) / 48)
    near_0 = 2.0 ** np.concatenate(octaves)
    near_1 = 1 - 2.0 ** -np.concatenate([np.arange(5 * 12, 26 * 12) / 12, np.arange(26 * 4, 46 * 4) / 4])
    edges = np.concatenate([near_0, np.arange(961) / 960, near_1, _between_votes()])
    return _with_atoms(edges, np.arange(41) / 40)


def _between_votes():
    """Return edges between the entropies of votes k/T and 1 - k/T, which differ where float32 rounds the shares.

    A direct computation ranks the two; many voxels have them. Whether an edge is needed does not hang on the last
    bit of a logarithm, so that the number of bins is the same on every machine.
    """
    votes = _votes()
    low, high = (binary_entropy(share) for share in (votes, votes[::-1]))
    return ((low + high) / 2)[(votes < 0.5) & (np.abs(low - high) > 1e-12)]


class Bins:
    """Left-closed bins of numbers in [0, 1], the last one from 1 on.

    edges : float64, increasing, from 0 to 1; bin i holds edges[i] ≤ x < edges[i + 1]
    mirrored : whether most numbers are near 1, not near 0 (a matter of speed alone)
    """

    # numbers are located by the first 22 bits of their binary form: sign, exponent, ten bits of the fraction
    _SHIFT = 42

    def __init__(self, edges, mirrored=False):
        self.edges = np.asarray(edges, np.float64)
        self._mirrored = mirrored

    def __len__(self):
        return len(self.edges)

    def index(self, values):
        """Return the bin of each value, as an integer array; exact comparisons in float64.

        values : float64 array, values ≥ 0 without NaN
        """
        key = (1 - values if self._mirrored else values).view(np.int64) >> self._SHIFT
        index = self._located.take(np.maximum(key, 0, out=key))
        split = np.flatnonzero(index < 0)
        index[split] = self._search(values[split])
        return index

    def index_half(self, values):
        """Return the bin of each float16 value ≥ 0."""
        return self._located_half.take(values.view(np.uint16))

    def _search(self, values):
        return np.searchsorted(self.edges, values, side="right") - 1

    @cached_property
    def _located(self):
        # per cell of the binary form: the bin that holds all of it, or -1 where edges fall into it
        start = (np.arange((1024 << 10) + 1) << self._SHIFT).view(np.float64)
        if self._mirrored:
            edges = np.sort(1 - self.edges)
            first = np.searchsorted(edges, start[:-1] * (1 - 1e-15), side="left")
            last = np.searchsorted(edges, start[1:] * (1 + 1e-15), side="right")
            bins = self._search(np.clip(1 - (start[:-1] + start[1:]) / 2, 0, 1))
            last[start[:-1] < 1e-15] += 1  # so close to 1 that the middle of a cell rounds to it
        else:
            first = np.searchsorted(self.edges, start[:-1], side="right")
            last = np.searchsorted(self.edges, start[1:], side="left")
            bins = first - 1
        located = np.where(first == last, bins, -1).astype(np.int16)
        located[0] = len(self) - 1 if self._mirrored else 0  # exactly 1, or exactly 0
        return located

    @cached_property
    def _located_half(self):
        values = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float64)
        return self._search(np.nan_to_num(values, nan=0.0, posinf=1.0, neginf=0.0)).astype(np.int16)


PROBABILITY_BINS = Bins(_probability_edges())
CONFIDENCE_BINS = Bins(_confidence_edges(), mirrored=True)
SCORE_BINS = Bins(_score_edges())

# the float16 forms of a distance, without their last three bits: 128 bins an octave, from 1/16 to 512 mm
_NEAREST = int(np.float16(1 / 16).view(np.uint16)) >> 3
_FARTHEST = int(np.float16(512).view(np.uint16)) >> 3


@cache
def distance_bins():
    # the last bin is the nearest, so that bins ascend with uncertainty as everywhere
    distance = np.clip((np.arange(1 << 16) & 0x7FFF) >> 3, _NEAREST, _FARTHEST)
    return (len(SCORE_BINS) - 1 - (distance - _NEAREST)).astype(np.int16)


@cache
def joint_groups():
    """Return the joint-histogram bin, 0–255, of each score bin of a measure in [0, 1]: int array."""
    # zero, half a bin an octave from 3e-39 to 6e-11, four up to 1/8, and steps of 1/91 from there on
    octaves = 2.0 ** np.concatenate([np.arange(-128, -34, 2), np.arange(-34 * 4, -3 * 4) / 4])
    edges = np.concatenate([[0.0, 5e-324], octaves, np.arange(12, 92) / 91])
    return np.minimum(np.searchsorted(edges, SCORE_BINS.edges, side="right") - 1, JOINT_BINS - 1)


def score_of_coarse(position, step, measure):
    """Return the lowest score of a coarse bin, counted from the most uncertain.

    position : of the bin; step : fine score bins in a coarse one; measure : `boundary_proximity` is in mm, negative
    """
    lowest = ((len(SCORE_BINS) - 1) // step - position) * step
    if measure != "boundary_proximity":
        return float(SCORE_BINS.edges[lowest])
    place = np.flatnonzero(distance_bins() >= lowest).astype(np.uint16)
    distance = place.view(np.float16).astype(np.float64)
    return -float(np.max(distance[np.isfinite(distance)], initial=0.0))


def loss_index(loss):
    """Return the joint-histogram bin, 0–255, of each negative log-likelihood of clipped probabilities.

    The first bin is for probabilities at the clip, often half of all voxels; then up to 0.1 by equal ratios, and by
    smaller ones up to -log 1e-7, where errors lie.
    """
    logarithm = np.log(loss.astype(np.float32))
    low, middle, high = (np.float32(np.log(value)) for value in (CLIP, 0.1, -np.log(CLIP)))
    below = (logarithm - low) * np.float32(_LOSS_BINS_BELOW / (middle - low))
    above = (logarithm - middle) * np.float32((JOINT_BINS - 1 - _LOSS_BINS_BELOW) / (high - middle))
    coarse = np.where(logarithm < middle, below, above + _LOSS_BINS_BELOW).astype(np.int64)
    coarse = coarse.clip(0, JOINT_BINS - 2) + 1
    coarse[loss < CLIP * (1 + 1e-6)] = 0
    return coarse


def sums_by(key, values, size):
    """Return sums of values by key, (size,).

    Equal numbers added one by one all round to the same side: a million ties are off by 1e-8 of their sum. Sums of
    stretches, added up, are not.

    key : int array, small differences within stretches make it faster
    """
    total = np.zeros(size)
    for first in range(0, len(key), _STRETCH):
        part = slice(first, first + _STRETCH)
        lowest = key[part].min()
        sums = np.bincount(key[part] - lowest, values[part])
        total[lowest : lowest + len(sums)] += sums
    return total
