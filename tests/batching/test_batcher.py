"""The batcher against a plain model: exact to the record, in order, within its bounds."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from ingestd.base.record import Layout, Records, Span
from ingestd.batching.batcher import BatchDraft, Batcher, part_by_key

AGE = 10.0


def feed(batcher: Batcher, chunk: int, records: Records, first: int = 0) -> list[BatchDraft]:
    batcher.add(chunk, records, first=first, accepted_at=float(chunk))
    cuts = []
    while cut := batcher.take():
        cuts.append(cut)
    return cuts


def test_a_chunk_of_100_000_records_makes_100_batches_of_1_000() -> None:
    batcher = Batcher(records_max=1000, bytes_max=4 << 20, age_max=AGE)
    records = Records.lines([b"%d" % n for n in range(100_000)])
    cuts = feed(batcher, 7, records)
    assert len(cuts) == 100
    assert all(cut.records.count == 1000 for cut in cuts)
    assert b"".join(cut.records.payload for cut in cuts) == records.payload
    assert [cut.spans for cut in cuts[:2]] == [(Span(7, 0, 1000),), (Span(7, 1000, 1000),)]
    assert cuts[0].cursor == (7, 1000)
    assert cuts[-1].cursor == (8, 0)
    assert not batcher.open


def test_a_whole_chunk_goes_without_a_copy() -> None:
    batcher = Batcher(records_max=3, bytes_max=100, age_max=AGE)
    records = Records.lines([b"1", b"2", b"3"])
    (cut,) = feed(batcher, 1, records)
    assert cut.records.payload is records.payload


def test_a_record_larger_than_the_bound_stands_alone() -> None:
    batcher = Batcher(records_max=10, bytes_max=10, age_max=AGE)
    cuts = feed(batcher, 1, Records.lines([b"1", b"x" * 50, b"2"]))
    last = batcher.close()
    assert [cut.records.items() for cut in [*cuts, last]] == [[b"1"], [b"x" * 50], [b"2"]]


def test_an_open_batch_that_is_beyond_new_bounds_goes_as_it_is() -> None:
    batcher = Batcher(records_max=100, bytes_max=100, age_max=AGE)
    assert feed(batcher, 1, Records.lines([b"%d" % n for n in range(9)])) == []
    batcher.bound(records_max=4, bytes_max=100, age_max=AGE)
    cuts = feed(batcher, 2, Records.lines([b"a", b"b", b"c", b"d", b"e"]))
    assert [cut.records.count for cut in cuts] == [9, 4]
    assert batcher.close().records.items() == [b"e"]


def test_an_open_batch_goes_on_within_larger_bounds() -> None:
    batcher = Batcher(records_max=3, bytes_max=100, age_max=AGE)
    assert feed(batcher, 1, Records.lines([b"1", b"2"])) == []
    batcher.bound(records_max=4, bytes_max=6, age_max=AGE)
    (cut,) = feed(batcher, 2, Records.lines([b"3", b"4"]))
    assert cut.records.items() == [b"1", b"2", b"3"]


def test_the_rest_of_a_recovered_chunk_starts_at_its_cursor() -> None:
    batcher = Batcher(records_max=10, bytes_max=100, age_max=AGE)
    assert feed(batcher, 3, Records.lines([b"0", b"1", b"2"]), first=2) == []
    cut = batcher.close()
    assert cut.spans == (Span(3, 2, 1),)
    assert cut.records.items() == [b"2"]
    assert cut.cursor == (4, 0)


def test_the_age_is_the_oldest_records() -> None:
    batcher = Batcher(records_max=3, bytes_max=100, age_max=AGE)
    feed(batcher, 1, Records.lines([b"a"]))
    feed(batcher, 2, Records.lines([b"b"]))
    assert batcher.due_in(1.0, busy=False) == AGE
    assert batcher.due_in(3.0, busy=False) == AGE - 2
    (cut,) = feed(batcher, 3, Records.lines([b"c", b"d"]))
    assert cut.accepted_at == 1.0
    assert batcher.due_in(3.0, busy=False) == AGE


chunks = st.lists(
    st.tuples(st.booleans(), st.lists(st.binary(max_size=12), min_size=1, max_size=40)),
    max_size=12,
)


@given(chunks=chunks, records_max=st.integers(1, 15), bytes_max=st.integers(1, 60))
def test_any_chunks_give_the_same_records_in_order(chunks, records_max, bytes_max) -> None:
    batcher = Batcher(records_max=records_max, bytes_max=bytes_max, age_max=AGE)
    cuts, expected, held = [], [], {}
    for number, (as_lines, raw) in enumerate(chunks, 1):
        items = [item.replace(b"\n", b" ") for item in raw] if as_lines else raw
        records = Records.lines(items) if as_lines else Records.sized(items)
        held[number] = items
        expected += items
        cuts += feed(batcher, number, records)
    full = len(cuts)
    if last := batcher.close():
        cuts.append(last)
    assert [item for cut in cuts for item in cut.records.items()] == expected
    for i, cut in enumerate(cuts):
        assert cut.records.count == sum(span.count for span in cut.spans) <= records_max
        assert cut.size <= bytes_max or cut.records.count == 1
        by_span = [held[s.chunk][s.first + n] for s in cut.spans for n in range(s.count)]
        assert by_span == cut.records.items()
        following = cuts[i + 1].spans[0] if i + 1 < len(cuts) else None
        if following is not None:
            assert cut.cursor == (following.chunk, following.first)
        if i < full and cut.records.count < records_max and following is not None:
            chunk = held[following.chunk]
            terminator = 1 if chunks[following.chunk - 1][0] else 0
            next_size = len(chunk[following.first]) + terminator
            assert cut.size >= bytes_max or cut.size + next_size > bytes_max


def test_layouts_may_mix() -> None:
    batcher = Batcher(records_max=4, bytes_max=100, age_max=AGE)
    feed(batcher, 1, Records.lines([b"1", b"2"]))
    (cut,) = feed(batcher, 2, Records.sized([b"a\nb", b""]))
    assert cut.records.layout is Layout.SIZED
    assert cut.records.items() == [b"1", b"2", b"a\nb", b""]


def test_without_an_open_batch_nothing_is_due() -> None:
    batcher = Batcher(records_max=2, bytes_max=100, age_max=AGE)
    assert batcher.due_in(0.0, busy=False) is None
    (_,) = feed(batcher, 1, Records.lines([b"1", b"2"]))
    batcher.draining = True
    assert batcher.due_in(99.0, busy=False) is None


def test_the_oldest_record_says_when_the_open_batch_is_due() -> None:
    batcher = Batcher(records_max=9, bytes_max=100, age_max=AGE)
    feed(batcher, 5, Records.lines([b"1"]))
    feed(batcher, 9, Records.lines([b"2"]))
    assert batcher.due_in(9.0, busy=False) == AGE - 4
    assert batcher.due_in(5.0 + AGE, busy=False) == 0.0
    assert batcher.due_in(500.0, busy=False) == 0.0
    batcher.bound(records_max=9, bytes_max=100, age_max=2.0)
    assert batcher.due_in(6.0, busy=False) == 1.0


def test_each_look_after_the_clock_was_set_back_counts_from_the_first() -> None:
    batcher = Batcher(records_max=9, bytes_max=100, age_max=AGE)
    feed(batcher, 5, Records.lines([b"1"]))
    assert batcher.due_in(-500.0, busy=False) == AGE
    feed(batcher, 6, Records.lines([b"2"]))
    assert batcher.due_in(-500.0 + AGE - 1, busy=False) == 1.0
    assert batcher.close() is not None
    feed(batcher, 7, Records.lines([b"3"]))
    assert batcher.due_in(7.0, busy=False) == AGE


def test_a_batch_that_would_have_to_wait_keeps_filling_but_in_a_drain() -> None:
    batcher = Batcher(records_max=9, bytes_max=100, age_max=AGE)
    feed(batcher, 5, Records.lines([b"1"]))
    assert batcher.due_in(500.0, busy=True) is None
    batcher.draining = True
    assert batcher.due_in(5.0, busy=True) == 0.0


# -- batches by key --------------------------------------------------------------------------------


def test_a_window_is_filled_as_one_and_goes_when_one_batch_is_full_and_a_worker_free() -> None:
    batcher = Batcher(records_max=2, bytes_max=100, age_max=5.0, window=4, window_bytes_max=1000)
    batcher.add(1, Records.lines([b"1"]), first=0, accepted_at=0.0)
    assert batcher.take() is None
    assert batcher.due_in(1.0, busy=False) == 4.0
    batcher.add(2, Records.lines([b"1"] * 2), first=0, accepted_at=0.0)
    assert batcher.take() is None
    assert (batcher.due_in(1.0, busy=False), batcher.due_in(1.0, busy=True)) == (0.0, None)
    batcher.add(3, Records.lines([b"1"] * 6), first=0, accepted_at=0.0)
    draft = batcher.take()
    assert draft is not None
    assert sum(span.count for span in draft.spans) == 6  # parts of it are not equally large
    assert draft.cursor == (3, 3)
    assert batcher.take() is None


@given(
    chunks=st.lists(st.lists(st.sampled_from([None, *range(-3, 9)]), min_size=1), min_size=1),
    records_max=st.integers(1, 6),
    bytes_max=st.integers(1, 60),
    parts=st.sampled_from([1, 2, 8]),
    sized=st.booleans(),
)
def test_parts_by_key_are_whole_in_order_and_within_the_bounds(
    chunks, records_max, bytes_max, parts, sized
) -> None:
    keys = [key for chunk in chunks for key in chunk]
    items = [b"x" * (n % 9) for n in range(len(keys))]
    records = Records.sized(items) if sized else Records.lines(items)
    spans = tuple(Span(n, 2, len(chunk)) for n, chunk in enumerate(chunks, 1))
    draft = BatchDraft(spans, records, len(records.payload) + 7, 5.0, (9, 0))
    bounds = {"records_max": records_max, "bytes_max": bytes_max}
    made = part_by_key(draft, keys, parts=parts, **bounds)
    assert sum(part.size for part, _ in made) == draft.size
    by_place = {}
    order: dict[int, list[tuple[int, int]]] = {}
    holders: dict[int, set[int]] = {}
    for number, (part, its_keys) in enumerate(made):
        assert part.records is not None
        places = [(s.chunk, s.first + i) for s in part.spans for i in range(s.count)]
        assert places == sorted(places)
        assert len(places) == part.records.count <= records_max
        assert len(part.records.payload) <= bytes_max or part.records.count == 1
        found = set()
        for place, item in zip(places, part.records.items(), strict=True):
            index = sum(map(len, chunks[: place[0] - 1])) + place[1] - 2
            by_place[place] = item
            assert item == items[index]
            if (key := keys[index]) is not None:
                found.add(key)
                order.setdefault(key, []).append(place)
                holders.setdefault(key % parts, set()).add(number)
        assert its_keys == found
    assert len(by_place) == len(keys)
    assert all(places == sorted(places) for places in order.values())
    if len(keys) > parts * records_max and len(records.payload) > parts * bytes_max:
        for one in holders.values():  # as many parts as there may be: none shares a key
            assert all(one.isdisjoint(other) for other in holders.values() if other is not one)
