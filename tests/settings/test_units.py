from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ingestd.config.network import split_address
from ingestd.config.units import (
    NotUnderstoodError,
    parse_count,
    parse_seconds,
    parse_size,
    parse_words,
    show_seconds,
    show_size,
    show_words,
)


@pytest.mark.parametrize(
    ("written", "size"),
    [
        ("512", 512),
        (512, 512),
        (512.0, 512),
        ("512B", 512),
        ("4kB", 4000),
        ("4KB", 4000),
        ("4KiB", 4096),
        ("64MB", 64_000_000),
        ("64MiB", 64 * 2**20),
        ("64 mib", 64 * 2**20),
        ("1.5GiB", 3 * 2**29),
        ("2TiB", 2**41),
        ("0.1kB", 100),
    ],
)
def test_sizes_read_as_people_write_them(written: object, size: int) -> None:
    parsed = parse_size(written)
    assert parsed == size
    assert type(parsed) is int


@pytest.mark.parametrize(
    "written",
    ["", "MiB", "4k", "4M", "-4kB", "1.5B", "1e3", "4 x", "4KiB4", "٣kB", 1.5, -0.5, math.inf,
     math.nan, True, None, [], "9" * 50],
)  # fmt: skip
def test_a_size_that_is_none_names_what_was_written_and_what_is_understood(written: object) -> None:
    with pytest.raises(NotUnderstoodError) as caught:
        parse_size(written)
    assert str(caught.value).startswith(repr(written))
    assert ("KiB" if written == "4k" else "MiB") in str(caught.value)


@pytest.mark.parametrize(
    ("written", "seconds"),
    [
        ("250ms", 0.25),
        ("1.5s", 1.5),
        ("30", 30.0),
        (30, 30.0),
        (0.5, 0.5),
        ("5m", 300.0),
        ("1h", 3600.0),
        ("2d", 172800.0),
        ("1h30m", 5400.0),
        ("1h 30m", 5400.0),
        ("1m0.5s", 60.5),
        ("100us", 0.0001),
        ("0.1ms", 0.0001),
    ],
)
def test_times_read_as_people_write_them(written: object, seconds: float) -> None:
    parsed = parse_seconds(written)
    assert parsed == seconds
    assert type(parsed) is float


@pytest.mark.parametrize(
    "written",
    ["", "s", "1 parsec", "-1s", "1h1h", "30m1h", "1s30", "5M", "1e3", "inf", math.inf, math.nan,
     10**400, True, None, {}],
)  # fmt: skip
def test_a_time_that_is_none_names_what_was_written_and_what_is_understood(written: object) -> None:
    with pytest.raises(NotUnderstoodError) as caught:
        parse_seconds(written)
    assert str(caught.value).startswith(repr(written)[:60])
    assert "ms" in str(caught.value)


@pytest.mark.parametrize("written", [True, 1.0, "1.0", "-1", "many", "", None, "1 000"])
def test_a_count_is_a_whole_number(written: object) -> None:
    with pytest.raises(NotUnderstoodError):
        parse_count(written)


@pytest.mark.parametrize(
    ("written", "words"),
    [
        ("", ()),
        (" , ", ()),
        ([], ()),
        ("[]", ()),
        ("a", ("a",)),
        ("a b", ("a", "b")),
        ("a,b", ("a", "b")),
        (" a ,\n b,", ("a", "b")),
        (["a", "b"], ("a", "b")),
        (("a",), ("a",)),
        (' ["a", "b"] ', ("a", "b")),
        ('["http://h/?a,b"]', ("http://h/?a,b",)),
    ],
)
def test_lists_read_as_people_write_them(written: object, words: tuple[str, ...]) -> None:
    assert parse_words(written) == words


@pytest.mark.parametrize(
    "written", ["[a", '["a", 1]', "[" * 10_000, [""], ["a b"], [" a"], [1], 1, None, {}]
)
def test_what_is_no_list_of_words_says_what_is_one(written: object) -> None:
    with pytest.raises(NotUnderstoodError, match="white space between them"):
        parse_words(written)


@given(st.lists(st.text(min_size=1).filter(lambda word: word.split() == [word])))
def test_a_list_that_was_shown_is_read_back(words: list[str]) -> None:
    assert show_words(parse_words(words)) == words


@given(st.integers(min_value=0, max_value=2**60))
def test_a_size_that_was_shown_is_read_back(size: int) -> None:
    assert parse_size(show_size(size)) == size


@given(
    st.floats(min_value=0, max_value=1e7, allow_subnormal=False).filter(
        lambda x: x == 0 or x > 1e-9
    )
)
def test_a_time_that_was_shown_is_read_back(seconds: float) -> None:
    assert parse_seconds(show_seconds(seconds)) == seconds


@given(st.text(max_size=60))
def test_any_text_is_a_number_or_is_refused(text: str) -> None:
    for parse in (parse_size, parse_seconds, parse_count):
        try:
            parsed = parse(text)
        except NotUnderstoodError:
            continue
        assert parsed >= 0
        assert math.isfinite(parsed)


@given(st.integers(0, 400), st.integers(0, 23), st.integers(0, 59), st.integers(0, 59))
def test_parts_of_a_time_add_up(d: int, h: int, m: int, s: int) -> None:
    assert parse_seconds(f"{d}d{h}h{m}m{s}s") == d * 86400 + h * 3600 + m * 60 + s


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0.0, "0s"), (0.5, "500ms"), (1.0, "1s"), (60.0, "60s"), (120.0, "2m"), (3600.0, "1h"),
     (1.5, "1.5s"), (90.0, "90s"), (1e-05, "0.00001s")],
)  # fmt: skip
def test_times_are_shown_as_people_write_them(seconds: float, shown: str) -> None:
    assert show_seconds(seconds) == shown


@pytest.mark.parametrize(
    ("address", "split"),
    [
        ("127.0.0.1:8080", ("127.0.0.1", 8080)),
        ("localhost:0", ("localhost", 0)),
        ("[::1]:65535", ("::1", 65535)),
        ("0.0.0.0:80", ("0.0.0.0", 80)),
        (":80", ("", 80)),
    ],
)
def test_addresses(address: str, split: tuple[str, int]) -> None:
    assert split_address(address) == split


@pytest.mark.parametrize(
    "address",
    ["", "8080", ":", "[]:1", "host", "host:", "host:http", "host:65536", "host:-1", "::1:80",
     "[h]:1", "a b:80", "http://h:80", "host:٣", "[::1:80", "host:000001"],
)  # fmt: skip
def test_what_is_no_address_is_refused_with_an_example(address: str) -> None:
    with pytest.raises(ValueError, match="HOST:PORT"):
        split_address(address)
