"""Snappy bodies: one block or framed, bounded by what they say, refused where that is not true."""

from __future__ import annotations

import json

import cramjam
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ingestd.codecs import compression
from ingestd.codecs.compression import (
    RATIO_FREE_BYTES,
    Corrupt,
    TooDense,
    TooMuch,
    inflate_snappy,
    measure_snappy,
)
from ingestd.http import body as http_body
from ingestd.http.body import inflate, inflate_short
from ingestd.http.problem import Problem
from tests.peak import peak
from tests.real_input import real_input
from tests.sources.source_tools import MemoryIntake, ask, connected, serving

SNAPPY = {"Content-Encoding": "snappy"}
MARK = b"\xff\x06\x00\x00sNaPpY"


def block(data: bytes) -> bytes:
    return bytes(cramjam.snappy.compress_raw(data))


def framed(data: bytes) -> bytes:
    return bytes(cramjam.snappy.compress(data))


def unpack(wire: bytes, bytes_max: int = 10**9) -> bytes:
    return inflate_snappy(wire, measure_snappy(wire, bytes_max))


def varint(number: int) -> bytes:
    out = b""
    while number > 0x7F:
        out, number = out + bytes([number & 0x7F | 0x80]), number >> 7
    return out + bytes([number])


@pytest.mark.parametrize("pack", [block, framed])
@given(
    data=st.binary(min_size=1, max_size=300)
    | st.binary(min_size=1, max_size=20).map(lambda data: data * 9000)
)
def test_what_was_packed_comes_out(pack, data):
    assert unpack(pack(data)) == data
    assert inflate("snappy", pack(data), 10**6, 200, lambda _: None) == data


@pytest.mark.parametrize("name", ["apache.log", "nginxplus.ndjson"])
def test_real_data(name):
    data = real_input(name).read_bytes()
    assert unpack(block(data)) == unpack(framed(data)) == data


@pytest.mark.parametrize(
    ("wire", "why"),
    [
        (block(b"a" * 1000)[:-1], "it can't be decompressed"),
        (block(b"a" * 1000) + b"x", "it can't be decompressed"),
        (b"", "it has no length"),
        (b"\xff" * 20, "it has no length"),
        (varint(1001) + block(b"a" * 1000)[2:], "it can't be decompressed"),
        (varint(999) + block(b"a" * 1000)[2:], "it can't be decompressed"),
        (varint(2**32 - 1) + block(b"a" * 1000)[2:], "its length is not that of its content"),
        (b'{"a":1}\n', "it can't be decompressed"),
        (framed(b"a" * 1000)[:-1], "it is cut off"),
        (framed(b"a" * 1000) + b"x", "it is cut off"),
        (framed(b"a" * 1000)[:12], "it is cut off"),
        (MARK + b"\x00\x03\x00\x00abc", "it has no length"),
        (MARK + b"\x01\x03\x00\x00abc", "a chunk has more than 64 KiB"),
        (MARK + b"\x01\x05\x00\x00abcde", "it can't be decompressed"),  # a wrong checksum
        (MARK + b"\x02\x00\x00\x00", "it can't be decompressed"),  # a kind that may not be skipped
        (MARK + b"\x01\x05\x00\x01" + bytes(65541), "a chunk has more than 64 KiB"),
    ],
)
def test_what_is_not_valid_is_corrupt(wire, why):
    with pytest.raises(Corrupt, match=why):
        unpack(wire)
    assert inflate_short("snappy", wire, 10**6) is None
    with pytest.raises(Problem) as caught:
        inflate("snappy", wire, 10**6, 200, lambda _: None)
    assert caught.value.kind.slug == "corrupt-encoding"


@given(st.binary(max_size=200) | st.binary(max_size=200).map(MARK.__add__))
@example(MARK + b"\xfe\x00\x00\x00")
def test_any_bytes_are_valid_or_corrupt(wire):
    try:
        body = unpack(wire, 10**6)
    except (Corrupt, TooMuch):
        return
    assert len(body) == measure_snappy(wire, 10**6)


@pytest.mark.parametrize("pack", [block, framed])
@given(data=st.binary(min_size=1, max_size=99), at=st.integers(0, 10**6), to=st.integers(0, 255))
def test_a_byte_that_was_changed_gives_bytes_or_corrupt(pack, data, at, to):
    wire = bytearray(pack(data * 20))
    wire[at % len(wire)] = to
    try:
        unpack(bytes(wire), 10**6)
    except (Corrupt, TooMuch):
        pass


@pytest.mark.parametrize("pack", [block, framed])
def test_the_bound_holds_before_anything_is_allocated(pack):
    bomb = pack(bytes(20 * 1024**2))
    assert len(bomb) < 1024**2
    taken: list[int] = []
    with peak() as most, pytest.raises(Problem) as caught:
        inflate("snappy", bomb, 10**6, 200, taken.append)
    assert caught.value.kind.slug == "payload-too-large"
    assert (taken, most.bytes < 10**5) == ([], True)
    with pytest.raises(TooDense):
        measure_snappy(bomb, 10**9, 10)
    assert measure_snappy(pack(bytes(RATIO_FREE_BYTES)), 10**9, 10) == RATIO_FREE_BYTES
    assert unpack(pack(bytes(1000)), 1000) == bytes(1000)
    with pytest.raises(TooMuch):
        unpack(pack(bytes(1001)), 1000)


def test_chunks_with_next_to_nothing_in_them_are_bounded():
    one = framed(b"a")[len(MARK) :]
    assert unpack(MARK + one * 999) == b"a" * 999
    with pytest.raises(TooDense):
        unpack(MARK + one * 10_000)
    with pytest.raises(TooDense):
        unpack(MARK + b"\xfe\x00\x00\x00" * 10_000)


async def test_records_of_every_size_and_a_body_without_a_length():
    intake = MemoryIntake()
    async with serving(intake) as source:
        for count in (1, 1000, 100_000):
            lines = [json.dumps({"n": n, "text": "x" * 20}).encode() for n in range(count)]
            wire = block(b"\n".join(lines))
            reply = await ask(source, wire, **SNAPPY)
            assert reply.json["accepted"] == count
            assert intake.items[-count:] == lines
        accepted = len(intake.items)
        async with connected(source) as client:
            wire = framed(b'{"n":1}\n{"n":2}\n')
            head = "POST /v1/records HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n"
            client.send(head.encode() + b"Content-Encoding: x-snappy-framed\r\n\r\n")
            for piece in (wire[:20], wire[20:]):
                client.send(b"%x\r\n%b\r\n" % (len(piece), piece))
            client.send(b"0\r\n\r\n")
            assert (await client.reply()).json["accepted"] == 2
        assert len(intake.items) == accepted + 2
        reply = await ask(source, block(b"a" * 1000)[:-1], **SNAPPY)
        assert (reply.status, reply.slug) == (400, "corrupt-encoding")
        reply = await ask(source, block(b" " * 40 * 1024**2), **SNAPPY)
        assert (reply.status, reply.slug) == (413, "payload-too-large")


async def test_without_its_package_it_is_415_and_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(http_body, "has_snappy", lambda: False)
    async with serving(MemoryIntake()) as source:
        reply = await ask(source, block(b"{}"), **SNAPPY)
        assert (reply.status, reply.slug) == (415, "unsupported-encoding")
        assert "pip install 'ingestd[snappy]'" in reply.json["detail"]
        assert reply.headers["accept-encoding"] == "gzip, deflate, zstd, identity"
    monkeypatch.setattr(compression, "find_spec", lambda _: None)
    assert not compression.has_snappy.__wrapped__()
