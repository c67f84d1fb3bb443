"""Moments: what a set of stochastic passes leaves behind, as sums that merge exactly.

Per voxel and region: sums over passes of p, p² and H(p), the votes 1[p ≥ ½], and the deterministic probability; per
pass: region volumes. The sums are fixed-point integers in units of 2^-24, so that any split and any order of the same
passes gives the same bits. They are kept in doubling blocks of passes (0–4, 5–9, 10–19, 20–39, …), so that
every quantity can be had after 5, 10, 20, … passes too (definitions, section 10).

Arrays lie in the canonical orientation, cropped to the box that the model saw, and have the regions WT, TC, ET first.
"""

import json
from dataclasses import dataclass, replace

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from segtrust.errors import SegtrustError
from segtrust.files import canonical_json, replacing
from segtrust.measures import binary_entropy
from segtrust.volumes import Geometry

UNIT = 2.0**-24
# the mean of p² and the square of the mean are each off by at most half a unit (and a whole one, for p = 1)
RESOLUTION = 1.5 * UNIT
FIRST_BLOCK = 5
_SUMS = ("probability", "probability_squared", "entropy", "votes")


def block_of(pass_index):
    """Return (start, stop) of the block that a pass belongs to: [0, 5), then [5, 10), [10, 20), [20, 40), …"""
    if pass_index < FIRST_BLOCK:
        return (0, FIRST_BLOCK)
    start = FIRST_BLOCK
    while pass_index >= 2 * start:
        start *= 2
    return (start, 2 * start)


def block_ends(passes):
    """Return the numbers of passes at which blocks end, up to and including `passes`: [5, 10, 20] for 20."""
    ends, end = [], FIRST_BLOCK
    while end < passes:
        ends.append(end)
        end *= 2
    return [*ends, passes]


@dataclass(frozen=True)
class Moments:
    """Sums over passes for one patient under one model.

    sums : dict from block (start, stop) to a dict of integer arrays (3, x, y, z): `probability`,
        `probability_squared` and `entropy` (bits) in units of 2^-24, `votes` as counts
    volumes : dict from pass number to the number of voxels with p ≥ ½ per region, int64 (3,)
    deterministic : float32 (3, x, y, z), probabilities with dropout off, or None
    start : (3,) offset of the box in the canonical grid, voxels
    geometry : the patient's own grid
    """

    sums: dict
    volumes: dict
    deterministic: np.ndarray | None
    start: tuple
    geometry: Geometry

    @property
    def passes(self):
        """Return the sorted numbers of the passes summed here."""
        return sorted(self.volumes)

    def summary(self, passes):
        """Return the means over passes 0 … passes - 1 as a `Summary`.

        passes : a number of passes at which a block ends, or the number of all passes

        Raises SegtrustError when these passes are not exactly what some blocks hold.
        """
        blocks = [block for block in self.sums if block[0] < passes]
        held = [index for index in self.passes if any(start <= index < stop for start, stop in blocks)]
        if held != list(range(passes)):
            raise SegtrustError(
                f"moments hold passes {_ranges(self.passes)}, but passes 0–{passes - 1} are asked for, and sums "
                f"end at {', '.join(str(stop) for _, stop in sorted(self.sums))}"
            )
        total = {name: sum(self.sums[block][name].astype(np.int64) for block in blocks) for name in _SUMS}
        mean = total["probability"] * (UNIT / passes)
        variance = None
        if passes > 1:
            spread = total["probability_squared"] * (UNIT / passes) - mean**2
            spread[spread <= RESOLUTION] = 0
            variance = (spread * (passes / (passes - 1))).astype(np.float32)
        return Summary(
            passes=passes,
            probability=mean.astype(np.float32),
            deterministic=self.deterministic,
            expected_entropy=(total["entropy"] * (UNIT / passes)).astype(np.float32),
            variance=variance,
            votes=total["votes"],
            volumes=np.array([self.volumes[index] for index in range(passes)], np.int64),
        )

    def crop(self, box):
        """Return the moments of a part of the box, given as three slices."""
        part = (slice(None), *box)
        return Moments(
            {block: {name: array[part] for name, array in sums.items()} for block, sums in self.sums.items()},
            self.volumes,
            None if self.deterministic is None else self.deterministic[part],
            tuple(first + side.start for first, side in zip(self.start, box, strict=True)),
            self.geometry,
        )

    def place(self, array):
        """Return an array of the box, (c, x, y, z) canonical, on the patient's own grid; zero outside the box."""
        return self.geometry.place(array, self.start)


@dataclass(frozen=True)
class Summary:
    """Means over T passes, float32 arrays (3, …) in the order WT, TC, ET.

    passes : T
    probability, expected_entropy : in [0, 1]; entropy in bits
    variance : unbiased, over passes; None for T = 1
    deterministic : probability with dropout off, or None
    votes : int64, passes with p ≥ ½
    volumes : int64 (T, 3), voxels with p ≥ ½ of each pass
    """

    passes: int
    probability: np.ndarray
    deterministic: np.ndarray | None
    expected_entropy: np.ndarray
    variance: np.ndarray | None
    votes: np.ndarray
    volumes: np.ndarray

    def on(self, place):
        """Return the summary with `place` applied to each of its volumes."""

        def placed(array):
            return None if array is None else place(array)

        return replace(
            self,
            probability=place(self.probability),
            deterministic=placed(self.deterministic),
            expected_entropy=place(self.expected_entropy),
            variance=placed(self.variance),
            votes=place(self.votes),
        )


class Accumulator:
    """Add passes one by one; memory does not depend on their number beyond one set of sums per block.

    shape : (x, y, z) of the box
    """

    def __init__(self, shape):
        self._shape = (3, *shape)
        self._sums = {}
        self._volumes = {}
        self._deterministic = None

    def add(self, pass_index, probability):
        """Add the probabilities of one pass, float (3, x, y, z), values in [0, 1]."""
        if pass_index in self._volumes:
            raise SegtrustError(f"pass {pass_index} was added twice")
        _check_probability(probability, self._shape)
        block = block_of(pass_index)
        if block not in self._sums:
            self._sums[block] = _zeros(block, self._shape)
        sums = self._sums[block]
        vote = probability >= 0.5
        value = probability.astype(np.float64)
        sums["probability"] += _fixed(value, sums["probability"].dtype)
        sums["entropy"] += _fixed(binary_entropy(value), sums["entropy"].dtype)
        sums["probability_squared"] += _fixed(value**2, sums["probability_squared"].dtype)
        sums["votes"] += vote
        self._volumes[pass_index] = vote.sum(axis=(1, 2, 3), dtype=np.int64)

    def set_deterministic(self, probability):
        """Keep the probabilities of the pass with dropout off, float (3, x, y, z), values in [0, 1]."""
        _check_probability(probability, self._shape)
        self._deterministic = probability.astype(np.float32)

    def moments(self, start, geometry):
        """Return what was added as `Moments` of a box that begins at `start` of the canonical grid."""
        return Moments(self._sums, self._volumes, self._deterministic, tuple(int(first) for first in start), geometry)


def merge(parts):
    """Return the moments of all passes of several `Moments`; exact, in any order.

    Raises SegtrustError when boxes or grids differ, or a pass is in two parts.
    """
    first = parts[0]
    volumes, sums, deterministic = {}, {}, None
    for part in parts:
        if part.start != first.start or not part.geometry.agrees_with(first.geometry):
            raise SegtrustError("moments of different boxes or grids cannot be merged")
        twice = sorted(set(volumes) & set(part.volumes))
        if twice:
            raise SegtrustError(f"passes {_ranges(twice)} are in two of the files to merge")
        volumes.update(part.volumes)
        if part.deterministic is not None:
            deterministic = part.deterministic
        for block, added in part.sums.items():
            held = sums.get(block)
            sums[block] = added if held is None else {name: held[name] + added[name] for name in _SUMS}
    return Moments(sums, volumes, deterministic, first.start, first.geometry)


def write_moments(path, moments, provenance):
    """Write moments and their provenance as a safetensors file."""
    tensors = {
        f"{name}_{start}-{stop}": np.ascontiguousarray(array)
        for (start, stop), sums in moments.sums.items()
        for name, array in sums.items()
    }
    tensors["volumes"] = np.array([moments.volumes[index] for index in moments.passes], np.int64).reshape(-1, 3)
    if moments.deterministic is not None:
        tensors["deterministic"] = np.ascontiguousarray(moments.deterministic)
    metadata = {
        "start": list(moments.start),
        "passes": moments.passes,
        "geometry": moments.geometry.to_json(),
        "provenance": provenance,
    }
    with replacing(path) as partial:
        save_file(tensors, partial, {"segtrust": canonical_json(metadata)})


def read_moments(path):
    """Return (Moments, provenance) of a file written by `write_moments`."""
    with safe_open(path, "numpy") as file:
        metadata = json.loads(file.metadata()["segtrust"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - a safe_open is no dict
    volumes = dict(zip(metadata["passes"], tensors.pop("volumes"), strict=True))
    deterministic = tensors.pop("deterministic", None)
    sums = {}
    for name, array in tensors.items():
        kind, block = name.rsplit("_", 1)
        sums.setdefault(tuple(int(end) for end in block.split("-")), {})[kind] = array
    geometry = Geometry.from_json(metadata["geometry"])
    return Moments(sums, volumes, deterministic, tuple(metadata["start"]), geometry), metadata["provenance"]


def read_and_merge(paths):
    """Return (Moments, provenance) of the chunks of one patient, merged.

    Raises SegtrustError when the chunks were made with different weights, settings or code.
    """
    parts, provenances = zip(*(read_moments(path) for path in paths), strict=True)
    for path, provenance in zip(paths, provenances, strict=True):
        if provenance["model"] != provenances[0]["model"]:
            differing = [key for key, value in provenance["model"].items() if value != provenances[0]["model"][key]]
            raise SegtrustError(f"{paths[0]} and {path} differ in {', '.join(differing)}; remove the older one.")
    return merge(parts), provenances[0]


def _zeros(block, shape):
    # a sum of n probabilities needs n·2^24 steps: 32 bits hold 255 passes, one byte holds their votes
    small = block[1] - block[0] <= 255
    wide, narrow = (np.uint32, np.uint8) if small else (np.uint64, np.uint32)
    return {name: np.zeros(shape, narrow if name == "votes" else wide) for name in _SUMS}


def _fixed(value, dtype):
    return np.rint(value * 2.0**24).astype(dtype)


def _check_probability(probability, shape):
    if probability.shape != shape:
        raise SegtrustError(f"probabilities have shape {probability.shape}, expected {shape}")
    low, high = float(probability.min()), float(probability.max())
    if not (low >= 0 and high <= 1):  # NaN fails both comparisons
        bad = int((~((probability >= 0) & (probability <= 1))).sum())
        raise SegtrustError(
            f"{bad:,} probabilities are outside [0, 1] or NaN (smallest {low:g}, largest {high:g}); "
            "are these logits, or percentages?"
        )


def _ranges(numbers):
    numbers = sorted(numbers)
    parts, first = [], None
    for position, number in enumerate(numbers):
        first = number if first is None else first
        if position + 1 == len(numbers) or numbers[position + 1] != number + 1:
            parts.append(str(first) if first == number else f"{first}–{number}")
            first = None
    return ", ".join(parts) or "none"
