"""What is decided without a server: waits, positions, heads of answers, lists of URLs."""

from __future__ import annotations

import os
import zlib
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from msgspec.structs import replace
from multidict import CIMultiDict

from ingestd.base.append import STATE_BYTES_MAX, SourceOffset
from ingestd.base.envelope import Envelope, EnvelopeRuns, pack
from ingestd.base.errors import ConfigError
from ingestd.base.rate import backoff
from ingestd.codecs.compression import Inflater
from ingestd.config.network import show_url, split_urls
from ingestd.sources.fetch import FetchSettings, concurrency
from ingestd.sources.fetch.decoders import LineDecoder
from ingestd.sources.fetch.failure import DownloadFailed, ResourceChanged, TryAgain
from ingestd.sources.fetch.position import (
    BodyToRead,
    Finished,
    Position,
    encoding_of,
    ends_by_itself,
    from_offset,
    headers_for,
    interpret,
    start_of,
    to_offset,
)
from ingestd.sources.fetch.urls import as_url, read_links
from tests.fetch.tools import lines, packed

if TYPE_CHECKING:
    from pathlib import Path

    from ingestd.base.record import Format
    from ingestd.codecs.lines import Parsed

# -- waits -----------------------------------------------------------------------------------------


def test_the_backoff_doubles_with_full_jitter_and_a_bound() -> None:
    assert [backoff(n, 0.5, 6.0, lambda: 1.0) for n in (1, 2, 3, 4, 5, 10**6)] == [
        0.5, 1.0, 2.0, 4.0, 6.0, 6.0]  # fmt: skip
    assert backoff(3, 0.5, 6.0, lambda: 0.0) == 0.0


@pytest.mark.parametrize(
    ("text", "date", "seconds"),
    [
        ("7", None, 7),
        (" 7 ", None, 7),
        ("9999", None, 300),
        ("9" * 400, None, 300),
        ("Thu, 01 Jan 1970 00:16:50 GMT", None, 10),
        ("Thu, 01 Jan 1970 00:10:10 GMT", "Thu, 01 Jan 1970 00:10:00 GMT", 10),
        ("Thu, 01 Jan 1970 00:00:00 GMT", None, 0),
        ("Thu, 01 Jan 2970 00:00:00 GMT", None, 300),
        (None, None, None),
        ("", None, None),
        ("-1", None, None),
        ("soon", None, None),
        ("1.5", None, None),
    ],
)
def test_retry_after(text: str | None, date: str | None, seconds: float | None) -> None:
    assert concurrency.retry_after(text, date, 1000.0, 300.0) == seconds


@pytest.mark.parametrize(("asked", "seconds"), [(None, 0.5), (0.0, 0.1), (2.0, 2.0), (1e9, 60.0)])
def test_a_stream_says_when_to_come_back_within_bounds(asked: float | None, seconds: float) -> None:
    assert concurrency.reconnect(asked, 0.5, 60.0) == seconds


# -- positions -------------------------------------------------------------------------------------

OLD = {"Last-Modified": "Thu, 01 Jan 2026 00:00:00 GMT", "Date": "Thu, 01 Jan 2026 01:00:00 GMT"}
JUST = {**OLD, "Date": OLD["Last-Modified"]}


def test_a_position_comes_back_as_it_was() -> None:
    position = Position(
        etag="é" * 0 + "x" * 1024, modified="y" * 1024, strong="x" * 1024, encoding="gzip",
        offset=2**62, crc=2**32 - 1, records=2**50, event_id="→" * 1024,
    )  # fmt: skip
    offset = to_offset("k", position)
    assert from_offset(offset) == position
    assert len(offset.state) <= STATE_BYTES_MAX
    assert from_offset(None) == Position()
    with pytest.raises(ValueError, match="offset"):
        from_offset(SourceOffset("k", b'{"offset": "x"}'))


@pytest.mark.parametrize(
    ("headers", "strong"),
    [
        ({"ETag": '"a"'}, '"a"'),
        ({"ETag": 'W/"a"'}, ""),
        ({"ETag": 'W/"a"', **OLD}, ""),
        ({"ETag": '"a"', **OLD}, '"a"'),
        (OLD, OLD["Last-Modified"]),
        (JUST, ""),
        ({"Last-Modified": "nonsense", "Date": OLD["Date"]}, ""),
        ({"Last-Modified": "Mon, 01 Jan 99999999999 00:00:00 GMT", "Date": OLD["Date"]}, ""),
        ({**OLD, "Date": f"Mon, 01 Jan 2024 00:00:00 +{'9' * 30}"}, ""),
        ({"ETag": '"' + "a" * 2000 + '"'}, ""),
        ({}, ""),
    ],
)
def test_what_if_range_may_say(headers: dict[str, str], strong: str) -> None:
    assert start_of(headers, "identity").strong == strong


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ({"ETag": '"a"'}, {"ETag": '"a"'}, True),
        ({"ETag": '"a"'}, {"ETag": 'W/"a"'}, True),
        ({"ETag": '"a"'}, {"ETag": '"b"'}, False),
        ({"ETag": '"a"', **OLD}, {"ETag": '"b"', **OLD}, False),
        ({"ETag": '"a"', **OLD}, OLD, True),
        ({"ETag": '"a"'}, OLD, None),
        ({}, {}, None),
    ],
)
def test_which_versions_are_the_same(one: Any, other: Any, same: bool | None) -> None:
    assert start_of(one, "gzip").same_version(start_of(other, "identity")) is same


# -- heads of answers ------------------------------------------------------------------------------

URL = as_url("http://a/x")
BEGUN = Position(etag='"a"', strong='"a"', offset=100, crc=5, records=3)
DONE = Position(etag='"a"', modified="m", offset=100, crc=5, records=3, done=True)


def test_what_is_asked_for() -> None:
    def ask(position: Position, url: str = "http://a/x", ranges: bool = True) -> dict[str, str]:
        return headers_for(position, url=as_url(url), ranges=ranges)

    packed = {"Accept-Encoding": "gzip, zstd"}
    assert ask(Position()) == packed
    assert ask(Position(), "http://a/x.ndjson.GZ") == {"Accept-Encoding": "identity"}
    assert ask(BEGUN) == {
        "Accept-Encoding": "identity", "Range": "bytes=100-", "If-Range": '"a"'}  # fmt: skip
    assert ask(BEGUN, ranges=False) == packed
    assert ask(Position(etag='W/"a"', offset=100)) == packed
    assert ask(Position(etag='"a"', strong='"a"', offset=100, encoding="gzip")) == packed
    assert ask(DONE) == {**packed, "If-None-Match": '"a"', "If-Modified-Since": "m"}
    assert headers_for(Position(), url=URL, ranges=True, endless=True) == {
        "Accept-Encoding": "gzip"}  # fmt: skip
    assert ask(Position(event_id="7")) == {**packed, "Last-Event-ID": "7"}


def judged(status: int, position: Position, **headers: str) -> BodyToRead | Finished:
    named = CIMultiDict((name.replace("_", "-"), value) for name, value in headers.items())
    asked = headers_for(position, url=URL, ranges=True)
    encoding = encoding_of(named, URL)
    return interpret(status, named, asked=asked, position=position, encoding=encoding)


def test_a_whole_body() -> None:
    new = start_of({"ETag": '"b"'}, "identity")
    assert judged(200, Position(), ETag='"b"') == BodyToRead(new)
    assert judged(200, BEGUN, ETag='"b"') == BodyToRead(new, changed=True)
    same = judged(200, BEGUN, ETag='W/"a"', Content_Encoding="gzip")
    assert isinstance(same, BodyToRead)
    assert (same.skip, same.changed, same.position.offset) == (100, False, 100)
    assert (same.position.crc, same.position.encoding) == (5, "gzip")
    unknown = judged(200, BEGUN)
    assert isinstance(unknown, BodyToRead)
    assert unknown.skip == 100


def test_something_that_was_done() -> None:
    assert judged(304, DONE) == Finished(DONE)
    assert judged(200, DONE, ETag='"a"') == Finished(DONE)
    assert judged(200, DONE, ETag='"b"') == BodyToRead(
        start_of({"ETag": '"b"'}, "identity"), changed=True
    )
    assert judged(200, DONE) == BodyToRead(Position())
    with pytest.raises(DownloadFailed, match="304"):
        judged(304, BEGUN)


def test_no_content_writes_nothing_down() -> None:
    for position in (Position(), Position(event_id="7"), DONE):
        assert judged(204, position) == Finished(position)


@pytest.mark.parametrize("status", [204, 205])
def test_no_content_is_not_the_rest(status: int) -> None:
    with pytest.raises(TryAgain, match=f"{status} in place of the rest"):
        judged(status, BEGUN)


def test_a_part() -> None:
    def part(place: str, position: Position = BEGUN, tag: str = '"a"', **more: str) -> Any:
        return judged(206, position, Content_Range=place, ETag=tag, **more)

    assert part("bytes 100-199/200") == BodyToRead(BEGUN, length=100)
    assert part("bytes 100-199/200", Content_Length="100") == BodyToRead(BEGUN, length=100)
    assert part("bytes 100-149/200") == BodyToRead(BEGUN, length=50, whole=False)
    # Whether anything follows is not said, and not taken for a no.
    assert part("bytes 100-199/*") == BodyToRead(BEGUN, length=100, whole=False)


SIZED = replace(BEGUN, size=200)


@pytest.mark.parametrize(
    "head",
    [
        {"Content_Range": "bytes 99-199/200"},
        {"Content_Range": "bytes 101-199/200"},
        {"Content_Range": "bytes 100-99/200"},
        {"Content_Range": "bytes 100-200/200"},
        {"Content_Range": "bytes 100-199/200", "Content_Length": "99"},
        {"Content_Range": "bytes 100-199/200", "Content_Length": "101"},
        {"Content_Range": "bytes 100-199/200", "ETag": '"b"'},
        {"Content_Range": "bytes 100-199/200", "ETag": 'W/"a"'},
        {"Content_Range": "bytes 100-199/200", "Content_Encoding": "gzip"},
        {"Content_Range": "bytes 100-199/200", "Content_Type": "multipart/byteranges; boundary=x"},
        {"Content_Range": "bytes 100-249/250"},
        {"Content_Range": "bytes 100-149/150", "ETag": ""},
        {"Content_Range": "bytes 100-199/*", "ETag": ""},
        {"Content_Range": "lines 100-199/200"},
        {"Content_Range": "bytes 100-199"},
        {},
    ],
)
def test_a_part_that_is_not_the_rest_that_was_asked_for(head: dict[str, str]) -> None:
    with pytest.raises(ResourceChanged):
        judged(206, SIZED, **{"ETag": '"a"', **head})


def test_a_part_without_validators_is_told_by_the_size() -> None:
    """RFC 9110 wants the tag to be repeated; a server that forgot it may have forgotten more."""
    place = "bytes 100-199/200"
    assert judged(206, SIZED, Content_Range=place) == BodyToRead(SIZED, length=100)
    with pytest.raises(ResourceChanged):
        judged(206, BEGUN, Content_Range=place)
    dated = Position(modified="m", strong="m", offset=100)
    assert judged(206, dated, Content_Range=place, Last_Modified="m") == BodyToRead(
        dated, length=100
    )


def test_a_whole_that_says_it_is_a_part() -> None:
    for place in ("bytes 0-99/200", "bytes 1-199/200", "bytes 0-99/*"):
        for position in (Position(), BEGUN, DONE):
            with pytest.raises(TryAgain, match="200 with a Content-Range"):
                judged(200, position, Content_Range=place)
    assert judged(200, Position(), Content_Range="bytes 0-199/200") == BodyToRead(Position())


def test_a_part_that_nobody_asked_for() -> None:
    with pytest.raises(DownloadFailed, match="206"):
        judged(206, Position(), Content_Range="bytes 0-1/2")


def test_the_length_that_a_body_has_to_have() -> None:
    for length, headers in (
        (7, {"Content_Length": "7"}),
        (0, {"Content_Length": "0"}),
        (None, {}),
        (None, {"Content_Length": "7", "Transfer_Encoding": "chunked"}),
        (7, {"Content_Length": "7", "Content_Encoding": "gzip"}),
    ):
        taken = judged(200, Position(), **headers)  # type: ignore[arg-type]
        assert isinstance(taken, BodyToRead)
        assert (taken.length, taken.whole) == (length, True)
        is_plain = "Content_Encoding" not in headers
        assert taken.position.size == (length or 0 if is_plain else 0)


def test_nothing_behind_what_was_accepted() -> None:
    finished = judged(416, BEGUN, Content_Range="bytes */100")
    assert isinstance(finished, Finished)
    assert finished.position.done
    for wrong in ({"Content_Range": "bytes */99"}, {}, {"Content_Range": "bytes */100",
                                                        "ETag": '"b"'}):  # fmt: skip
        with pytest.raises(ResourceChanged):
            judged(416, BEGUN, **wrong)
    with pytest.raises(ResourceChanged):  # it was longer when it was begun
        judged(416, SIZED, Content_Range="bytes */100")
    with pytest.raises(DownloadFailed):
        judged(416, Position())


@pytest.mark.parametrize("status", [408, 425, 429, 500, 502, 503, 504, 599])
def test_what_may_pass(status: int) -> None:
    with pytest.raises(TryAgain, match=str(status)):
        judged(status, Position())


@pytest.mark.parametrize("status", [300, 302, 400, 401, 403, 404, 410, 451, 501, 505, 999 - 550])
def test_what_does_not_pass(status: int) -> None:
    with pytest.raises(DownloadFailed, match=str(status)):
        judged(status, Position())


@pytest.mark.parametrize(
    ("headers", "url", "encoding"),
    [
        ({}, "http://a/x", "identity"),
        ({"Content-Encoding": "x-gzip"}, "http://a/x", "gzip"),
        ({"Content-Encoding": "ZSTD"}, "http://a/x.gz", "zstd"),
        ({"Content-Encoding": "gzip"}, "http://a/x.gz", "gzip"),
        ({"Content-Encoding": "identity"}, "http://a/x.gz?y", "gzip"),
        ({}, "http://a/x.ndjson.ZST", "zstd"),
        ({}, "http://a/x?name=y.gz", "identity"),
        ({"Content-Type": "application/gzip; x=y"}, "http://a/x", "gzip"),
        ({"Content-Type": "application/zstd"}, "http://a/x", "zstd"),
    ],
)
def test_how_a_body_is_compressed(headers: dict[str, str], url: str, encoding: str) -> None:
    assert encoding_of(CIMultiDict(headers), as_url(url)) == encoding


@pytest.mark.parametrize("coding", ["br", "gzip, gzip", "compress"])
def test_what_is_not_decompressed(coding: str) -> None:
    with pytest.raises(DownloadFailed):
        encoding_of({"Content-Encoding": coding}, URL)


def test_whether_an_end_can_be_told() -> None:
    assert ends_by_itself(CIMultiDict({"Content-Length": "0"}))
    assert ends_by_itself(CIMultiDict({"Transfer-Encoding": "Chunked"}))
    assert ends_by_itself(CIMultiDict({"Transfer-Encoding": "gzip, chunked"}))
    assert not ends_by_itself(CIMultiDict({"Transfer-Encoding": "xchunked"}))
    assert not ends_by_itself(CIMultiDict({}))


# -- bodies, in any division -----------------------------------------------------------------------

MAX = 60
body_parts = st.sampled_from(
    [b'{"a":1}', b"17", b"x", b" ", b"\r", b"\n", b"\r\n", b'"%s"' % (b"y" * 70), b'"\xc3\xa4"',
     b"\xff", b"z" * 200, b"\n\xef\xbb\xbf1\n"]
)  # fmt: skip
bodies = st.builds(
    lambda mark, parts: mark + b"".join(parts),
    st.sampled_from([b"", b"\xef\xbb\xbf"]),
    st.lists(body_parts, max_size=40),
)
cuts = st.lists(st.integers(0, 600), max_size=20)
forms = st.sampled_from(["json", "text", "bytes"])


def divided(wire: bytes, places: list[int]) -> list[bytes]:
    ends = sorted({place for place in places if place < len(wire)})
    return [wire[a:b] for a, b in zip([0, *ends], [*ends, len(wire)], strict=True)]


class Kept:
    """What an intake would have, with the position in the same append."""

    def __init__(self) -> None:
        self.items: list[bytes] = []
        self.refused: list[tuple[int, str, bytes]] = []
        self.position = Position()

    def take(self, decoder: LineDecoder, parsed: Any) -> None:
        if parsed:
            self.items += parsed.records.items()
            self.refused += [(one.index, one.reason, one.payload) for one in parsed.refused]
            self.position = decoder.position


def run(kept: Kept, wire: list[bytes], encoding: str, form: Any, *, skip: int, whole: bool) -> None:
    decoder = LineDecoder(form, MAX, kept.position, skip)
    inflater = None if encoding == "identity" else Inflater(encoding, 1 << 40)
    for part in wire:
        for piece in [part] if inflater is None else inflater.feed(part):
            kept.take(decoder, decoder.feed(piece))
    if whole:
        kept.take(decoder, decoder.end(certain=True))
        kept.position = decoder.position


@pytest.mark.parametrize("encoding", ["identity", "gzip", "zstd"])
@given(body=bodies, places=cuts, form=forms, stop=st.integers(0, 20))
@example(body=b"1\n\xef\xbb\xbf2\n3\n", places=[2], form="text", stop=1)
def test_any_division_and_any_break_give_the_records_of_the_whole(
    encoding: str, body: bytes, places: list[int], form: Any, stop: int
) -> None:
    whole = Kept()
    run(whole, [body], "identity", form, skip=0, whole=True)
    assert whole.position.done
    assert whole.position.offset == len(body)
    assert whole.position.crc == zlib.crc32(body)

    wire = body if encoding == "identity" else packed(body, encoding)
    parts = divided(wire, places)
    broken = Kept()
    run(broken, parts[:stop], encoding, form, skip=0, whole=False)
    assert not broken.position.done
    if encoding == "identity" and stop % 2:  # the rest alone, as a range
        rest = [body[broken.position.offset :]]
        run(broken, rest, encoding, form, skip=0, whole=True)
    else:
        run(broken, parts, encoding, form, skip=broken.position.offset, whole=True)
    assert broken.items == whole.items
    assert broken.refused == whole.refused
    assert broken.position.offset == len(body)
    assert broken.position.crc == whole.position.crc
    assert broken.position.records == whole.position.records


@given(st.integers(1, 900), st.integers(0, 900), st.binary(min_size=1, max_size=1))
def test_another_beginning_is_seen(offset: int, place: int, byte: bytes) -> None:
    body = lines(0, 40)
    begun = Position(offset=min(offset, len(body)), crc=zlib.crc32(body[:offset]), records=1)
    other = bytearray(body)
    other[place : place + 1] = byte
    decoder = LineDecoder("json", MAX, begun, begun.offset)
    if other[: begun.offset] == body[: begun.offset]:
        decoder.feed(bytes(other))
    else:
        with pytest.raises(ResourceChanged):
            decoder.feed(bytes(other))


def test_something_shorter_than_what_was_accepted_is_another_version() -> None:
    decoder = LineDecoder("json", MAX, Position(offset=50, crc=1, records=1), 50)
    decoder.feed(b"x" * 20)
    with pytest.raises(TryAgain):
        decoder.end(certain=False)  # which may be a connection that broke
    with pytest.raises(ResourceChanged):
        decoder.end(certain=True)


def test_a_line_whose_end_may_be_missing_is_not_taken_for_a_whole_one() -> None:
    decoder = LineDecoder("json", MAX, Position())
    assert decoder.feed(b"1\n12").records.items() == [b"1"]  # type: ignore[union-attr]
    last = decoder.end(certain=False)
    assert last is not None
    assert last.records.count == 0
    assert [(one.reason, one.payload) for one in last.refused] == [("unfinished", b"12")]


@pytest.mark.parametrize("encoding", ["gzip", "zstd"])
def test_what_nobody_said_is_compressed(encoding: str) -> None:
    with pytest.raises(DownloadFailed, match="compressed"):
        LineDecoder("text", MAX, Position()).feed(packed(lines(0, 9), encoding))
    decoder = LineDecoder("text", MAX, Position())
    first, rest = packed(lines(0, 9), encoding)[:1], packed(lines(0, 9), encoding)[1:]
    assert decoder.feed(first) is None
    with pytest.raises(DownloadFailed, match=rf"compressed \({encoding}\)"):
        decoder.feed(rest)
    LineDecoder("bytes", MAX, Position()).feed(packed(lines(0, 9), encoding))


@pytest.mark.parametrize("encoding", ["UTF-16", "UTF-32"])
def test_what_is_not_utf_8_by_its_mark(encoding: str) -> None:
    with pytest.raises(DownloadFailed, match=f"it is {encoding} text, not UTF-8"):
        LineDecoder("json", MAX, Position()).feed(lines(0, 9).decode().encode(encoding))


# -- lists of URLs ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "urls"),
    [
        ("http://a", ["http://a"]),
        ("  http://a \n https://b\t", ["http://a", "https://b"]),
        ("http://a,https://b", ["http://a", "https://b"]),
        ("http://a, https://b ,http://c", ["http://a", "https://b", "http://c"]),
        ("http://a/x,y;z", ["http://a/x,y;z"]),
        (["http://a/x,https"], ["http://a/x,https"]),
        ("", []),
        ([], []),
    ],
)
def test_a_list_as_people_write_it(written: object, urls: list[str]) -> None:
    assert split_urls(written) == tuple(urls)


@pytest.mark.parametrize(
    ("written", "says"),
    [
        ("ftp://u:hunter2@a/x?hunter2", "'ftp://a/x' is not http or https"),
        ("a/x", "'a/x' is not a URL: it begins with http:// or https://"),
        ("u:hunter2@a", "'a' is not a URL"),
        ("http://", "has no host"),
        ("http://:80/", "has no host"),
        ("http://a:port/", "is not a URL"),
        ("http://u:hun/ter2@a:b/", "'http://a:b/' is not a URL"),
        ("http://[::1", "is not a URL"),
        (["http://a b"], "white space"),
        (["http://a/\x07"], "control characters"),
        (["http://a/" + "x" * 9000], "more than 8192 characters"),
        ([1], "a list of URLs"),
        (5, "a list of URLs"),
    ],
)
def test_what_is_no_list_of_urls(written: object, says: str) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        split_urls(written)
    assert says in str(caught.value)
    assert "hunter2" not in str(caught.value)


def test_a_url_is_shown_without_its_secrets() -> None:
    assert show_url("https://u:p@a:8/x/@y?token=t#f") == "https://a:8/x/@y?…"
    assert show_url("https://a/x") == "https://a/x"
    assert show_url("http://[::1]:80/") == "http://[::1]:80/"


def test_signed_urls_are_sent_as_they_were_written() -> None:
    assert as_url("http://a/x%2Fy?sig=a%2Fb+c").raw_path_qs == "/x%2Fy?sig=a%2Fb+c"
    assert as_url("http://a/ä b").raw_path_qs == "/%C3%A4%20b"


LIST = """\ufeff# comment
http://a/1

  https://u:p@b/2?x=1#frag   # why
http://a/1
"""


async def test_a_file_of_urls(tmp_path: Path) -> None:
    path = tmp_path / "urls.txt"
    path.write_text(LIST)
    settings = FetchSettings(urls="http://c/", file=str(path), headers={"X-Key": "k"})
    links = await read_links(settings)
    assert [str(link.url) for link in links] == ["http://c/", "http://a/1", "https://b/2?x=1"]
    assert [link.shown for link in links] == ["http://c/", "http://a/1", "https://b/2?…"]
    assert links[0].headers == {"X-Key": "k"}
    assert links[2].headers == {"X-Key": "k", "Authorization": "Basic dTpw"}
    assert len({link.key for link in links}) == 3
    assert all("?" not in link.key and "b/2" not in link.key for link in links)


async def test_urls_from_standard_input() -> None:
    reading, writing = os.pipe()
    os.write(writing, LIST.encode())
    os.close(writing)
    links = await read_links(FetchSettings(file="-"), fd=reading)
    os.close(reading)
    assert len(links) == 2


async def test_credentials_that_are_set_go_before_those_of_a_url() -> None:
    settings = FetchSettings(urls="http://u:p@a/", headers={"authorization": "Bearer x"})
    (link,) = await read_links(settings)
    assert link.headers == {"authorization": "Bearer x"}
    (link,) = await read_links(FetchSettings(urls="http://u%40x:p%2F@a/"))
    assert link.headers == {"Authorization": "Basic dUB4OnAv"}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"http://a\nftp://u:hunter2@b/\n", "line 2: 'ftp://b/' is not http or https"),
        (b"# none\n\n", "there is no URL in"),
        (b"http://\xff\n", "is not UTF-8 text"),
        (b"x" * (16 * 1024**2 + 1), "is larger than"),
        (b"".join(b"http://a/%d\n" % n for n in range(10_001)), "more than 10000"),
    ],
)
async def test_a_file_that_is_no_list(content: bytes, says: str, tmp_path: Path) -> None:
    path = tmp_path / "urls.txt"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        await read_links(FetchSettings(file=str(path)))
    assert says in str(caught.value)
    assert "hunter2" not in str(caught.value)


def test_a_file_that_can_have_no_name() -> None:
    with pytest.raises(ValueError, match="should be the path"):
        FetchSettings(file="a\0b")


@pytest.mark.parametrize("name", ["nowhere.txt", "."])
async def test_a_file_that_is_not_there(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"fetch\.file: cannot read"):
        await read_links(FetchSettings(file=str(tmp_path / name)))


@pytest.mark.parametrize(
    ("headers", "says"),
    [
        ({"Host": "x"}, "Host is a header that ingestd sets itself"),
        ({"range": "bytes=0-"}, "range is a header"),
        ({"a b": "x"}, "is not the name of a header"),
        ({"X": "a\r\nhunter2: b"}, "control characters"),
        ({"X": ["hunter2"]}, "should be text"),
        ("hunter2", "should be a table"),
    ],
)
def test_headers_that_can_not_be_sent(headers: Any, says: str) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        FetchSettings(headers=headers)
    assert says in str(caught.value)


# -- numbers of lines ------------------------------------------------------------------------------

LINES = pack(Envelope("fetch", attributes={"url": "u"}, numbered="line"))


def lines_of(parsed: Parsed) -> tuple[list[object], list[object]]:
    """The number of the line of each good and of each refused record."""
    records = parsed.records
    known = EnvelopeRuns(records.envelopes, records.count)
    good = [known.of(i).attributes.get("line") for i in range(records.count)]
    bad = [EnvelopeRuns(one.envelope, 1).of(0).attributes.get("line") for one in parsed.refused]
    return good, bad


@given(st.data())
@pytest.mark.parametrize("form", ["json", "text", "bytes"])
def test_each_record_knows_the_number_of_its_line(form: Format, data: st.DataObject) -> None:
    """However the body is cut, and whatever else is in it."""
    kinds = [b'"%d"', b"", b"\r", b'"%d"\r', b"{%d"] + ([b" \t"] if form == "json" else [])
    lines = data.draw(st.lists(st.sampled_from(kinds), max_size=12))
    made = [line % n if b"%d" in line else line for n, line in enumerate(lines, 1)]
    body = b"\n".join(made)
    if data.draw(st.booleans()):
        body += b"\n"
    cuts = sorted(data.draw(st.sets(st.integers(0, len(body)))))
    at = data.draw(st.integers(0, 3))
    decoder, found = LineDecoder(form, 8, Position(), envelope=LINES), []
    for number, (start, end) in enumerate(pairwise([0, *cuts, len(body)])):
        if number == at and decoder.position.offset == start:  # a restart, where a line has ended
            decoder = LineDecoder(form, 8, decoder.position, envelope=LINES)
        found += [parsed] if (parsed := decoder.feed(body[start:end])) else []
    found += [parsed] if (parsed := decoder.end(certain=True)) else []
    good, bad = [], []
    for parsed in found:
        more, refused = lines_of(parsed)
        for item, line in zip(parsed.records.items(), more, strict=True):
            assert item.strip(b"\r") == body.split(b"\n")[line - 1].strip(b"\r")
        good += more
        bad += refused
    there = body.split(b"\n")[: -1 if body.endswith(b"\n") or not body else None]
    assert sorted([*good, *bad]) == [
        n for n, line in enumerate(there, 1) if form == "bytes" or line.strip(b" \t\r")
    ]


def test_where_lines_were_not_counted_records_have_no_numbers() -> None:
    """A position that an earlier version stored."""
    decoder = LineDecoder("json", 99, Position(offset=2, records=1), envelope=LINES)
    parsed = decoder.feed(b"2\n3\n")
    assert parsed is not None
    assert lines_of(parsed) == ([None, None], [])
    assert decoder.position.lines == 0
