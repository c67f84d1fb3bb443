"""Moments: what a set of stochastic passes leaves behind, as sums that merge exactly.

Per voxel and region: sums over passes of p, p² and H(p), the votes 1[p ≥ ½], and the deterministic probability; per
pass: region volumes. The sums are fixed-point integers in units of 2^-24, so that any split and any order of the same
passes gives the same bits. They are kept by source and in doubling blocks of its passes (0–4, 5–9, 10–19, 20–39, …),
so that every quantity can be had after 5, 10, 20, … passes of each source too (definitions, section 10).

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
from segtrust.sources import block_of, member_of
from segtrust.volumes import Geometry

UNIT = 2.0**-24
# the mean of p² is off by at most half a unit: less than that is no spread
RESOLUTION = UNIT
_SUMS = ("probability", "probability_squared", "entropy", "votes")


@dataclass(frozen=True)
class Moments:
    """Sums over passes for one patient under one model.

    sums : dict from (source, block), block being (start, stop), to a dict of integer arrays (3, x, y, z):
        `probability`, `probability_squared` and `entropy` (bits) in units of 2^-24, `votes` as counts
    volumes : dict from (source, pass number) to the number of voxels with p ≥ ½ per region, int64 (3,)
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
    def sources(self):
        """Return the sorted names of the sources that passes come from."""
        return sorted({source for source, _ in self.volumes})

    def passes_of(self, source):
        """Return the sorted numbers of the passes of one source."""
        return sorted(number for name, number in self.volumes if name == source)

    def summary(self, passes):
        """Return the means over passes 0 … passes - 1 of every source as a `Summary`.

        passes : a number of passes at which a block ends, or the number of all passes of each source

        Raises SegtrustError when these passes are not exactly what some blocks of each source hold.
        """
        members = {}
        for source in self.sources:
            member = members.setdefault(member_of(source), {})
            for name, total in self._totals(source, passes).items():
                member[name] = member[name] + total if name in member else total
        total = {name: sum(member[name] for member in members.values()) for name in _SUMS}
        n_passes = passes * len(self.sources)
        mean = total["probability"] * (UNIT / n_passes)
        variance = None
        if n_passes > 1:
            spread = total["probability_squared"] * (UNIT / n_passes) - mean**2
            spread[spread <= RESOLUTION] = 0
            variance = (spread * (n_passes / (n_passes - 1))).astype(np.float32)
        member_entropy = None
        if 1 < len(members) < n_passes:
            n_each = n_passes // len(members)
            entropies = [binary_entropy(member["probability"] * (UNIT / n_each)) for member in members.values()]
            member_entropy = (sum(entropies) / len(members)).astype(np.float32)
        order = [(source, number) for source in self.sources for number in range(passes)]
        return Summary(
            passes=n_passes,
            probability=mean.astype(np.float32),
            deterministic=self.deterministic,
            expected_entropy=(total["entropy"] * (UNIT / n_passes)).astype(np.float32),
            member_entropy=member_entropy,
            variance=variance,
            votes=total["votes"],
            volumes=np.array([self.volumes[key] for key in order], np.int64),
        )

    def _totals(self, source, passes):
        """Return the sums over the first passes of a source, a dict of int64 arrays."""
        blocks = [block for name, block in self.sums if name == source and block[0] < passes]
        held = [index for index in self.passes_of(source) if any(start <= index < stop for start, stop in blocks)]
        if held != list(range(passes)):
            ends = sorted(stop for name, (_, stop) in self.sums if name == source)
            raise SegtrustError(
                f"moments hold passes {_ranges(self.passes_of(source))} of {source}, but passes 0–{passes - 1} are "
                f"asked for, and sums end at {', '.join(map(str, ends))}"
            )
        return {name: sum(self.sums[source, block][name].astype(np.int64) for block in blocks) for name in _SUMS}

    def crop(self, box):
        """Return the moments of a part of the box, given as three slices."""
        part = (slice(None), *box)
        return Moments(
            {key: {name: array[part] for name, array in sums.items()} for key, sums in self.sums.items()},
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

    passes : T, of all sources together
    probability, expected_entropy : in [0, 1]; entropy in bits
    member_entropy : mean over members of the entropy of a member's own mean, bits, float32; None where there is one
        member, or each has a single pass
    variance : unbiased, over passes; None for T = 1
    deterministic : probability with dropout off, or None
    votes : int64, passes with p ≥ ½
    volumes : int64 (T, 3), voxels with p ≥ ½ of each pass
    """

    passes: int
    probability: np.ndarray
    deterministic: np.ndarray | None
    expected_entropy: np.ndarray
    member_entropy: np.ndarray | None
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
            member_entropy=placed(self.member_entropy),
            variance=placed(self.variance),
            votes=place(self.votes),
        )


class Accumulator:
    """Add the passes of one source one by one; memory grows by one set of sums per block alone.

    shape : (x, y, z) of the box
    source : name of the source
    keep : three slices of the box whose voxels count for volumes; all by default
    """

    def __init__(self, shape, source, keep=(slice(None),) * 3):
        self._shape = (3, *shape)
        self._source = source
        self._keep = (slice(None), *keep)
        self._sums = {}
        self._volumes = {}
        self._deterministic = None

    def add(self, pass_index, probability):
        """Add the probabilities of one pass, float32 (3, x, y, z), values in [0, 1].

        Single precision is enough: a probability is known to 2^-24, and so is what is added. The square is that of the
        rounded probability, in integers, so that equal passes have a variance of zero.
        """
        key = self._source, pass_index
        if key in self._volumes:
            raise SegtrustError(f"pass {pass_index} was added twice")
        _check_probability(probability, self._shape)
        block = self._source, block_of(pass_index)
        if block not in self._sums:
            self._sums[block] = self._zeros(block[1])
        self._add(self._sums[block], probability)
        self._volumes[key] = self._counts((probability >= 0.5)[self._keep])

    def _zeros(self, block):
        return {name: np.zeros(self._shape, dtype) for name, dtype in _dtypes(block).items()}

    def _add(self, sums, probability):
        flat = np.ascontiguousarray(probability, np.float32).reshape(-1)
        sums = {name: array.reshape(-1) for name, array in sums.items()}
        for first in range(0, flat.size, _CHUNK):
            part = slice(first, first + _CHUNK)
            for name, term in _terms(flat[part]).items():
                sums[name][part] += term.astype(sums[name].dtype)

    def _counts(self, votes):
        return np.array([np.count_nonzero(region) for region in votes], np.int64)

    def set_deterministic(self, probability):
        """Keep the probabilities of the pass with dropout off, float (3, x, y, z), values in [0, 1]."""
        _check_probability(probability, self._shape)
        self._deterministic = self._host(probability).astype(np.float32)

    def _host(self, array):
        return array

    def moments(self, start, geometry, back=lambda array: array):
        """Return what was added as `Moments` of a box that begins at `start` of the canonical grid.

        back : function from arrays (3, x, y, z) of the box to the canonical orientation
        """
        sums = {
            (source, block): {
                name: back(self._host(sums[name]).astype(dtype, copy=False)) for name, dtype in _dtypes(block).items()
            }
            for (source, block), sums in self._sums.items()
        }
        deterministic = None if self._deterministic is None else back(self._deterministic)
        return Moments(sums, self._volumes, deterministic, tuple(int(first) for first in start), geometry)


class TensorAccumulator(Accumulator):
    """An Accumulator of tensors, which sums where they are: 20 passes of a GPU need not travel."""

    def _zeros(self, block):
        # 32 bits with a sign hold the sums of 127 passes
        return {"wide": "int32" if block[1] - block[0] <= 127 else "int64", **dict.fromkeys(_SUMS)}

    def _add(self, sums, probability):
        import torch

        wide = getattr(torch, sums["wide"])

        probability = probability.float()
        steps = (probability * 2**24).round().to(torch.int64)
        opposite, least = 1 - probability, torch.finfo(torch.float32).tiny
        entropy = probability * probability.clamp(min=least).log2() + opposite * opposite.clamp(min=least).log2()
        terms = {
            "probability": steps,
            "probability_squared": (steps * steps + 2**23) >> 24,
            "entropy": ((-entropy).clamp(max=1) * 2**24).round().to(torch.int64),
            "votes": (probability >= 0.5).to(torch.int64),
        }
        for name, term in terms.items():
            term = term.to(wide)
            sums[name] = term if sums[name] is None else sums[name].add_(term)

    def _counts(self, votes):
        return votes.sum(dim=(1, 2, 3)).cpu().numpy().astype(np.int64)

    def _host(self, array):
        return array.cpu().numpy()


_CHUNK = 2**15  # values that fit a processor's cache, several times over


def _terms(probability):
    """Return what a pass adds to the sums, for a flat float32 array; integers, or whole float32 numbers."""
    rounded = np.rint(probability * np.float32(2**24))
    steps = rounded.astype(np.uint64)
    return {
        "probability": rounded,
        "probability_squared": (steps * steps + 2**23) >> 24,
        "entropy": np.rint(_entropy(probability) * np.float32(2**24)),
        "votes": probability >= np.float32(0.5),
    }


def _entropy(probability):
    """Return the binary entropy in bits of float32 probabilities, float32; within 2^-23 of `binary_entropy`."""
    opposite = np.float32(1) - probability
    least = np.float32(np.finfo(np.float32).tiny)
    entropy = probability * np.log2(np.maximum(probability, least))
    entropy += opposite * np.log2(np.maximum(opposite, least))
    return np.minimum(-entropy, np.float32(1))


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
            numbers = _ranges(number for _, number in twice)
            raise SegtrustError(f"passes {numbers} of {twice[0][0]} are in two of the files to merge")
        volumes.update(part.volumes)
        if part.deterministic is not None:
            deterministic = part.deterministic
        for key, added in part.sums.items():
            held = sums.get(key)
            sums[key] = added if held is None else {name: held[name] + added[name] for name in _SUMS}
    return Moments(sums, volumes, deterministic, first.start, first.geometry)


def write_moments(path, moments, provenance):
    """Write the moments of one source and their provenance as a safetensors file."""
    (source,) = moments.sources
    tensors = {
        f"{name}_{start}-{stop}": np.ascontiguousarray(array)
        for (_, (start, stop)), sums in moments.sums.items()
        for name, array in sums.items()
    }
    passes = moments.passes_of(source)
    tensors["volumes"] = np.array([moments.volumes[source, index] for index in passes], np.int64).reshape(-1, 3)
    if moments.deterministic is not None:
        tensors["deterministic"] = np.ascontiguousarray(moments.deterministic)
    metadata = {
        "source": source,
        "start": list(moments.start),
        "passes": passes,
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
    source = metadata["source"]
    numbers = [(source, number) for number in metadata["passes"]]
    volumes = dict(zip(numbers, tensors.pop("volumes"), strict=True))
    deterministic = tensors.pop("deterministic", None)
    sums = {}
    for name, array in tensors.items():
        kind, block = name.rsplit("_", 1)
        start, stop = map(int, block.split("-"))
        sums.setdefault((source, (start, stop)), {})[kind] = array
    geometry = Geometry.from_json(metadata["geometry"])
    return Moments(sums, volumes, deterministic, tuple(metadata["start"]), geometry), metadata["provenance"]


def read_and_merge(paths):
    """Return (Moments, provenance) of the chunks of one patient, merged.

    Where there are several members, `weights` of the provenance is a dict from member to digest. Raises SegtrustError
    when the chunks were made with different settings or code, or those of one member with different weights.
    """
    parts, weights, first = [], {}, None
    for path in paths:
        part, provenance = read_moments(path)
        first = first or provenance
        _check_same(path, provenance["model"], paths[0], first["model"], {"weights"})
        for member in {member_of(source) for source in part.sources}:
            given = weights.setdefault(member, (path, provenance["model"]))
            _check_same(path, provenance["model"], *given, set())
        parts.append(part)
    digests = {member: model["weights"] for member, (_, model) in weights.items()}
    if len(digests) > 1:
        first = {**first, "model": {**first["model"], "weights": digests}}
    return merge(parts), first


def _check_same(path, model, other_path, other, apart):
    differing = [key for key, value in model.items() if key not in apart and value != other[key]]
    if differing:
        raise SegtrustError(f"{other_path} and {path} differ in {', '.join(differing)}; remove the older one.")


def _dtypes(block):
    # a sum of n probabilities needs n·2^24 steps: 32 bits hold 255 passes, one byte holds their votes
    small = block[1] - block[0] <= 255
    wide, narrow = (np.uint32, np.uint8) if small else (np.uint64, np.uint32)
    return {name: narrow if name == "votes" else wide for name in _SUMS}


def _check_probability(probability, shape):
    if tuple(probability.shape) != shape:
        raise SegtrustError(f"probabilities have shape {tuple(probability.shape)}, expected {shape}")
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
