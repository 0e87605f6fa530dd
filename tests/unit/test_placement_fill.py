"""Pages that the chain lacks, taken from another image directory: against a dictionary of pages."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from images_spec.placement import SOURCE_REMOTE
from tests.support.examples import examples
from tests.unit.test_placement import Entries, as_pages, chains, continues, table


@pytest.mark.slow
@settings(max_examples=examples(600))
@given(chains, chains, st.booleans())
def test_agrees_with_page_dict(
    levels: list[Entries | None], others: list[Entries | None], remote: bool
) -> None:
    top, other = table(levels, remote=remote), table(others)
    expected = as_pages(list(top))
    there = as_pages(list(other))
    for page, place in expected.items():
        found = there.get(page)
        if place.lazy and place.source >= SOURCE_REMOTE and found and found.source < SOURCE_REMOTE:
            expected[page] = found._replace(source=found.source + len(levels), lazy=True)
    filled = top.filled_from(other)
    assert filled.nr_levels == len(levels) + len(others)
    assert as_pages(list(filled)) == expected
    for first, second in pairwise(list(filled)):
        assert first.end <= second.start
        assert not continues(first, second)
