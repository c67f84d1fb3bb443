"""A source is a member under a flip."""

import itertools
import re

import pytest

from segtrust.sources import PATTERN, PREDICTIONS, Source, block_ends, block_of, member_of, source_named, sources_of


def test_flips_are_all_combinations_of_the_axes_none_included():
    assert [source.flip for source in sources_of(1, (2, 0))] == [(), (0,), (2,), (0, 2)]


def test_sources_are_every_member_under_every_flip():
    names = [source.name for source in sources_of(2, (1,))]
    assert names == ["member0", "member0-flip1", "member1", "member1-flip1"]


@pytest.mark.parametrize("source", [Source(0), Source(11), Source(0, (0,)), Source(3, (0, 1, 2))])
def test_a_source_is_found_again_by_its_name(source):
    assert source_named(source.name) == source
    assert re.fullmatch(PATTERN, source.name)
    assert member_of(source.name) == f"member{source.member}"


def test_other_words_are_no_sources():
    with pytest.raises(ValueError, match="no source"):
        source_named(PREDICTIONS)


def test_only_the_first_member_unflipped_gives_the_deterministic_pass():
    with_it = [source.name for source in sources_of(2, (0,)) if source.has_deterministic]
    assert with_it == ["member0"]


def test_blocks_double():
    blocks = [block_of(index) for index in range(45)]
    assert [block for block, _ in itertools.groupby(blocks)] == [(0, 5), (5, 10), (10, 20), (20, 40), (40, 80)]
    assert all(start <= index < stop for index, (start, stop) in enumerate(blocks))


def test_block_ends_finish_with_the_number_of_passes():
    assert block_ends(20) == [5, 10, 20]
    assert block_ends(23) == [5, 10, 20, 23]
    assert block_ends(3) == [3]
