"""Compressed bodies: in any division, bounded as they grow, and refused when they are broken."""

from __future__ import annotations

import gzip
import itertools
import sys
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ingestd.codecs.compression import Corrupt, Inflater, TooMuch, WindowTooLarge
from ingestd.http.body import name_encoding
from ingestd.http.problem import Problem
from tests.peak import peak
from tests.real_input import real_input

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd


def raw_deflate(data):
    stream = zlib.compressobj(wbits=-15)
    return stream.compress(data) + stream.flush()


PACK = {
    "gzip": [gzip.compress],
    "deflate": [zlib.compress, raw_deflate],
    "zstd": [zstd.compress],
}
WAYS = [(name, pack) for name, packs in PACK.items() for pack in packs]


def unpack(encoding, pieces, bytes_max=10**9):
    inflater = Inflater(encoding, bytes_max)
    out = b"".join(out for piece in pieces for out in inflater.feed(piece))
    inflater.finish()
    return out


def refusal(encoding, pieces, bytes_max=10**9):
    with pytest.raises((Corrupt, TooMuch)) as caught:
        unpack(encoding, pieces, bytes_max)
    return type(caught.value)


def divide(data, cuts):
    cuts = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})
    return [data[a:b] for a, b in itertools.pairwise(cuts)]


@given(
    st.sampled_from(WAYS),
    st.binary(max_size=300) | st.binary(max_size=20).map(lambda data: data * 3000),
    st.lists(st.integers(0, 10**6), max_size=8),
)
def test_any_division_gives_the_same(way, data, cuts):
    encoding, pack = way
    assert unpack(encoding, divide(pack(data), cuts)) == data


@given(
    st.sampled_from(["gzip", "zstd"]),
    st.lists(st.binary(max_size=50), min_size=1, max_size=4),
    st.lists(st.integers(0, 10**6), max_size=8),
)
def test_members_and_frames_follow_each_other(encoding, parts, cuts):
    wire = b"".join(PACK[encoding][0](part) for part in parts)
    assert unpack(encoding, divide(wire, cuts)) == b"".join(parts)


@given(st.sampled_from(WAYS), st.binary(max_size=99), st.integers(0, 10**6), st.integers(0, 10**6))
def test_what_is_cut_off_is_refused(way, data, end, cut):
    encoding, pack = way
    wire = pack(data)
    wire = wire[: end % len(wire)]
    assert refusal(encoding, divide(wire, [cut])) is Corrupt


@given(st.sampled_from(WAYS), st.binary(max_size=99), st.integers(0, 10**6))
def test_what_follows_the_end_is_refused(way, data, cut):
    encoding, pack = way
    wire = pack(data) + b"garbage"
    assert refusal(encoding, divide(wire, [cut])) is Corrupt


def checked_zstd(data):
    return zstd.compress(data, options={zstd.CompressionParameter.checksum_flag: 1})


@pytest.mark.parametrize(
    ("encoding", "pack"),
    [("gzip", gzip.compress), ("deflate", zlib.compress), ("zstd", checked_zstd)],
)
def test_a_checksum_that_does_not_fit_is_refused(encoding, pack):
    wire = pack(bytes(range(256)) * 50)
    broken = wire[:20] + bytes([wire[20] ^ 0xFF]) + wire[21:]
    assert refusal(encoding, [broken]) is Corrupt


@pytest.mark.parametrize("encoding", PACK)
def test_what_is_not_compressed_at_all_is_refused(encoding):
    assert refusal(encoding, [b'{"a":1}\n']) is Corrupt


@pytest.mark.parametrize(("encoding", "pack"), WAYS)
def test_the_bound_holds_while_it_grows(encoding, pack):
    bomb = pack(bytes(64 * 1024**2))
    assert len(bomb) < 100_000
    with peak() as most:
        assert refusal(encoding, [bomb], 10**6) is TooMuch
    assert most.bytes < 4 * 10**6
    assert unpack(encoding, [pack(bytes(1000))], 1000) == bytes(1000)
    assert refusal(encoding, [pack(bytes(1001))], 1000) is TooMuch


def test_a_zstd_window_beyond_the_rfc_is_refused():
    options = {zstd.CompressionParameter.window_log: 27}
    stream = zstd.ZstdCompressor(options=options)  # not knowing the size, it declares the window
    wire = stream.compress(bytes(1000)) + stream.flush()
    assert refusal("zstd", [wire]) is WindowTooLarge


@pytest.mark.parametrize("name", ["apache.log", "nginxplus.ndjson"])
@pytest.mark.parametrize(("encoding", "pack"), WAYS)
def test_real_data(name, encoding, pack):
    data = real_input(name).read_bytes()
    assert unpack(encoding, [pack(data)]) == data


@pytest.mark.parametrize(
    ("headers", "name"),
    [
        ((), "identity"),
        (("",), "identity"),
        (("identity",), "identity"),
        ((" GZip ",), "gzip"),
        (("x-gzip",), "gzip"),
        (("deflate",), "deflate"),
        (("zstd",), "zstd"),
        (("Snappy",), "snappy"),
        (("x-snappy-framed",), "snappy"),
    ],
)
def test_encodings_by_name(headers, name):
    assert name_encoding(headers) == name


@pytest.mark.parametrize(
    "headers",
    [
        ("br",),
        ("{0.__class__} {}{9}",),
        ("gzip, gzip",),
        ("gzip", "gzip"),
        ("identity, gzip",),
        ("\udcff",),
    ],
)
def test_other_encodings_are_415_and_say_which_are_read(headers):
    with pytest.raises(Problem) as caught:
        name_encoding(headers)
    assert caught.value.kind.status == 415
    assert caught.value.headers["Accept-Encoding"] == "gzip, deflate, zstd, snappy, identity"
    assert caught.value.body()
