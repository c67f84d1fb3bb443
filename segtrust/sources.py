"""Sources of passes: a pass is (checkpoint, dropout draw, flip).

A source is one checkpoint (a member) seen under one flip; its passes are numbered from 0. All sources of a model have
equally many passes: with dropout as many as are asked for, without exactly one. Passes are kept in doubling blocks.
"""

import re
from dataclasses import dataclass
from itertools import combinations

PATTERN = r"member\d+(?:-flip[012]+)?"
PREDICTIONS = "predictions"
FIRST_BLOCK = 5


@dataclass(frozen=True)
class Source:
    """member : position of the checkpoint; flip : axes of the network's orientation that are reversed, ascending"""

    member: int
    flip: tuple = ()

    @property
    def name(self):
        """Return the word that begins the names of files in samples/ and that masks are drawn from."""
        return f"member{self.member}" + (f"-flip{''.join(map(str, self.flip))}" if self.flip else "")

    @property
    def has_deterministic(self):
        """Say whether this source gives the deterministic pass: the first member, unflipped."""
        return self.member == 0 and not self.flip


def sources_of(n_members, axes):
    """Return all sources of a model: each member under every combination of the flipped axes, none included."""
    flips = [flip for size in range(len(axes) + 1) for flip in combinations(sorted(axes), size)]
    return [Source(member, flip) for member in range(n_members) for flip in flips]


def source_named(name):
    """Return the Source with a name. Raises ValueError where no source has such a name."""
    match = re.fullmatch(r"member(\d+)(?:-flip([012]+))?", name)
    if not match:
        raise ValueError(f"{name!r} is no source")
    return Source(int(match[1]), tuple(map(int, match[2] or "")))


def member_of(name):
    """Return the word of the member in the name of a source; predictions made elsewhere are one member."""
    return name.partition("-flip")[0]


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
