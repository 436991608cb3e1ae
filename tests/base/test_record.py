"""Records in both layouts against plain lists, and spans against plain indices."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ingestd.base.record import Layout, Records, Span, join, select, without

plain = st.lists(st.binary(max_size=10), max_size=30)
no_lf = st.lists(st.binary(max_size=10).map(lambda b: b.replace(b"\n", b" ")), max_size=30)


@given(items=no_lf)
def test_lines_give_back_what_they_got(items: list[bytes]) -> None:
    records = Records.lines(items)
    assert records.items() == items
    assert records.count == len(items) == records.payload.count(b"\n")
    assert records.as_sized().items() == items
    assert [records.payload[:end].count(b"\n") for end in records.ends()] == list(
        range(1, len(items) + 1)
    )


@given(items=plain)
def test_sized_give_back_what_they_got(items: list[bytes]) -> None:
    records = Records.sized(items)
    assert records.items() == items
    assert len(records.sizes) == 4 * len(items)
    assert records.as_sized() is records


@given(items=no_lf.filter(bool), sized=st.booleans(), data=st.data())
def test_a_part_is_a_slice(items: list[bytes], sized: bool, data: st.DataObject) -> None:
    records = Records.sized(items) if sized else Records.lines(items)
    first = data.draw(st.integers(0, len(items) - 1))
    count = data.draw(st.integers(1, len(items) - first))
    part = records.part(first, count)
    assert part.count == count
    assert part.layout is records.layout
    assert part.items() == items[first : first + count]


lengths = st.sampled_from([b"", b"1", b"2" * 50, b"3" * 5000])
runs_of_one_length = st.lists(st.tuples(lengths, st.integers(1, 60)), min_size=1, max_size=6)
uneven = runs_of_one_length.map(lambda runs: [line for line, n in runs for _ in range(n)])


@given(items=uneven, data=st.data())
def test_skipping_comes_to_the_same_ends(items: list[bytes], data: st.DataObject) -> None:
    records = Records.lines(items)
    ends = [0, *records.ends()]
    first = data.draw(st.integers(0, len(items) - 1))
    count = data.draw(st.integers(1, len(items) - first))
    assert records.skip(ends[first], count) == ends[first + count]
    with pytest.raises(ValueError, match="fewer"):
        records.skip(ends[first], len(items) - first + 1)


@given(runs=st.lists(st.tuples(st.booleans(), no_lf), min_size=1, max_size=5))
def test_joined_runs_hold_all_records_in_order(runs: list[tuple[bool, list[bytes]]]) -> None:
    made = [Records.sized(items) if sized else Records.lines(items) for sized, items in runs]
    joined = join(made)
    assert joined.items() == [item for _, items in runs for item in items]
    assert (joined.layout is Layout.SIZED) == any(sized for sized, _ in runs)


spans = st.lists(st.tuples(st.integers(0, 3), st.integers(1, 6)), min_size=1, max_size=6).map(
    lambda raw: tuple(Span(n, gap, count) for n, (gap, count) in enumerate(raw))
)


def places(spans: tuple[Span, ...]) -> list[tuple[int, int]]:
    return [(span.chunk, span.first + i) for span in spans for i in range(span.count)]


@given(spans=spans, data=st.data())
def test_selected_and_remaining_spans_divide_the_batch(
    spans: tuple[Span, ...], data: st.DataObject
) -> None:
    every = places(spans)
    indices = sorted(data.draw(st.sets(st.integers(0, len(every) - 1))))
    chosen = select(spans, indices)
    assert places(chosen) == [every[i] for i in indices]
    assert places(without(spans, chosen)) == [
        place for i, place in enumerate(every) if i not in indices
    ]
    assert len(chosen) <= len(indices)
