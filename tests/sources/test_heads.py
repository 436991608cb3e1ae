"""Heads and chunked bodies in any pieces, and where one request ends and the next one begins."""

from __future__ import annotations

import itertools
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ingestd.http.heads import ChunkDecoder, HeadParser
from ingestd.http.problem import Problem
from ingestd.http.request import Request
from tests.attacks.smuggling import REFUSED
from tests.sources.source_tools import MemoryIntake, connected, serving

NOBODY = cast("Any", None)
LINES = st.lists(
    st.sampled_from(
        [
            b"Host: a",
            b"Host: a",
            b"Content-Length: 5",
            b"content-length: 5",
            b"Content-Length: 05",
            b"Transfer-Encoding: chunked",
            b"transfer-encoding:chunked",
            b"Connection: close",
            b"Connection: keep-alive",
            b"Upgrade: x",
            b"X: \xff \t",
            b"X:",
            b"X: a: b",
            b" folded: 1",
            b"Y\r",
        ]
    ),
    max_size=6,
)
FIRST = st.sampled_from(
    [b"POST / HTTP/1.1", b"GET /a?b HTTP/1.0", b"CONNECT a:1 HTTP/1.1", b"GET  / HTTP/1.1", b"x"]
)


def cut(data: bytes, cuts: list[int]) -> list[bytes]:
    places = sorted({0, len(data), *(place % (len(data) + 1) for place in cuts)})
    return [data[start:end] for start, end in itertools.pairwise(places)]


def read(pieces: list[bytes]) -> tuple[object, ...] | str:
    parser = HeadParser()
    try:
        for piece in pieces:
            parser.feed(piece)
        one = parser.finish(b"".join(pieces), NOBODY)
    except Problem as found:
        return found.kind.slug
    plain = one.method, one.raw_path, one.version, one.close, one.content_length, one.is_chunked
    return (*plain, tuple(one.headers.items()), one.raw_headers)


@settings(max_examples=300)
@given(FIRST, LINES, st.lists(st.integers(0, 1000), max_size=5))
def test_a_head_in_pieces_is_the_same_head(first: bytes, lines: list[bytes], cuts: list[int]):
    head = b"\r\n".join([first, *lines, b"", b""])
    head = head[: head.index(b"\r\n\r\n") + 4]
    assert read(cut(head, cuts)) == read([head])


@pytest.mark.parametrize("name", ["bare LF at the end", "bare CR at the end", "a folded line"])
def test_a_head_that_ends_elsewhere_for_the_parser_is_refused(name: str):
    assert read([REFUSED[name]]) == "bad-request"


def test_no_byte_behind_a_head_is_part_of_it():
    assert read([b"GET / HTTP/1.1\r\nHost: a\r\n\r\nGET / HTTP/1.1\r\nHost: a\r\n\r\n"]) == (
        "bad-request"
    )
    assert read([b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\nab"]) == "bad-request"


CHUNKS = st.lists(st.binary(min_size=1, max_size=40), max_size=5)
BEHIND = st.sampled_from([b"", b"G", b"GET / HTTP/1.1\r\nHost: a\r\n\r\n", b"0\r\n\r\n", b"\r\n"])
TRAILERS = st.sampled_from([b"", b"X: 1\r\n", b"Content-Length: 5\r\n"])


@settings(max_examples=300)
@given(CHUNKS, TRAILERS, BEHIND, st.lists(st.integers(0, 1000), max_size=5))
def test_a_chunked_body_in_pieces_is_the_same_body(
    chunks: list[bytes], trailers: bytes, behind: bytes, cuts: list[int]
):
    wire = b"".join(b"%x\r\n%b\r\n" % (len(one), one) for one in chunks) + b"0\r\n" + trailers
    decoder, body = ChunkDecoder(), b""
    try:
        for piece in cut(wire + b"\r\n" + behind, cuts):
            body += decoder.feed(piece)
            if decoder.ended:
                break
    except Problem:
        assert trailers.startswith(b"Content-Length")
        return
    assert decoder.ended
    assert body == b"".join(chunks)
    if trailers:
        assert decoder.is_followed


async def test_what_stands_behind_a_chunked_body_in_the_same_piece_is_not_read():
    intake = MemoryIntake()
    body = b"Transfer-Encoding: chunked\r\n\r\n1\r\n1\r\n0\r\n\r\n"
    head = b"POST /v1/records HTTP/1.1\r\nHost: localhost\r\n"
    async with serving(intake) as source:
        async with connected(source) as client:
            client.send((head + body) * 2)
            reply = await client.reply()
            assert (reply.status, reply.headers["connection"]) == (202, "close")
            assert await client.closed()
        async with connected(source) as client:
            for _ in range(2):
                client.send(head + body)
                assert (await client.reply()).status == 202
    assert len(intake.items) == 3


def test_a_request_frees_its_parser():
    """The parser and its callbacks hold one another: no collection of cycles is needed."""
    parser = HeadParser()
    parser.feed(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
    assert isinstance(parser.finish(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n", NOBODY), Request)
    assert parser._parser is None
    broken = HeadParser()
    with pytest.raises(Problem):
        broken.feed(b"\0")
    assert broken._parser is None
