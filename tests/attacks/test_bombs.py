"""Small bodies that become large ones: refused early, and memory stays flat."""

from __future__ import annotations

import gzip
import sys
import zlib
from typing import TYPE_CHECKING

import pytest

from ingestd.codecs import compression
from ingestd.codecs.compression import RATIO_FREE_BYTES, Corrupt, Inflater, TooDense, TooMuch
from ingestd.http.problem import Problem
from ingestd.sources.http.decode import DocumentCodec, LinesCodec
from ingestd.sources.http.endpoints.base import BodyLimits
from tests.daemon.harness import daemon
from tests.peak import peak
from tests.sources.source_tools import MemoryIntake, ask, serving

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.slow

MIB = 1024**2
LINES = b'{"a":1}\n' * (4 * MIB)  # 32 MiB


def repeated(pack, times: int) -> bytes:
    """Members or frames, one behind the other."""
    return pack(bytes(MIB)) * times


BOMBS = {
    "gzip": ("gzip", gzip.compress(bytes(200 * MIB))),
    "deflate": ("deflate", zlib.compress(bytes(200 * MIB))),
    "zstd": ("zstd", zstd.compress(bytes(1024 * MIB))),
    "gzip, of lines": ("gzip", gzip.compress(LINES)),
    "zstd, of lines": ("zstd", zstd.compress(LINES)),
    "gzip, many members": ("gzip", repeated(gzip.compress, 1000)),
    "zstd, many frames": ("zstd", repeated(zstd.compress, 1000)),
    "gzip, empty members": ("gzip", gzip.compress(b"") * 100_000),
    "zstd, empty frames": ("zstd", zstd.compress(b"") * 100_000),
    "zstd, frames to skip": ("zstd", b"\x50\x2a\x4d\x18\0\0\0\0" * 100_000),
}


@pytest.mark.parametrize("name", BOMBS)
async def test_a_bomb(name):
    """Refused with 413 after a MiB or two, whatever it would become."""
    encoding, wire = BOMBS[name]
    intake = MemoryIntake()
    async with serving(intake) as source:
        with peak() as most:
            reply = await ask(source, wire, Content_Encoding=encoding)
        assert (reply.status, reply.slug) == (413, "inflate-ratio")
        # The body as it came, in three hands, and what came out.
        assert most.bytes < 4 * len(wire) + 6 * MIB
        assert source._handler.ingestion.admission.bytes == 0
        assert (await ask(source, b"1")).status == 202
    assert intake.items == [b"1"]


@pytest.mark.parametrize(("encoding", "pack"), [("gzip", gzip.compress), ("zstd", zstd.compress)])
async def test_a_bomb_in_a_bomb(encoding, pack):
    """Only one layer is taken off: what is in it is no record."""
    intake = MemoryIntake()
    async with serving(intake) as source:
        reply = await ask(source, pack(pack(bytes(100 * MIB))), Content_Encoding=encoding)
        assert (reply.status, reply.slug) == (400, "malformed")
    assert not intake.asked.is_set()


async def test_the_ratio_can_be_switched_off():
    intake = MemoryIntake("text")
    async with serving(intake, inflate_ratio_max=0, decompressed_bytes_max=8 * MIB) as source:
        wire = gzip.compress(b"x" * 1000 * 1000 + b"\n" + bytes(6 * MIB))
        reply = await ask(source, wire, Content_Encoding="gzip")
        assert reply.json == {"accepted": 1, "invalid": 1, "errors": reply.json["errors"]}
        reply = await ask(source, gzip.compress(bytes(9 * MIB)), Content_Encoding="gzip")
        assert (reply.status, reply.slug) == (413, "payload-too-large")


def run(inflater: Inflater, wire: bytes) -> int:
    return sum(map(len, inflater.feed(wire)))


@pytest.mark.parametrize(("encoding", "pack"), [("gzip", gzip.compress), ("zstd", zstd.compress)])
def test_the_first_mib_is_free(encoding, pack):
    fits, too_much = pack(bytes(RATIO_FREE_BYTES)), pack(bytes(RATIO_FREE_BYTES + 1))
    assert run(Inflater(encoding, 10**9, 2), fits) == RATIO_FREE_BYTES
    with pytest.raises(TooDense, match="2 times"):
        run(Inflater(encoding, 10**9, 2), too_much)
    assert run(Inflater(encoding, 10**9), too_much) == RATIO_FREE_BYTES + 1


def test_the_ratio_is_that_of_the_whole_stream_so_far():
    """A long stream that was dull may have a dense part; a dense one does not become dull."""
    noise = bytes(range(256)) * 8192  # 2 MiB, stored as they are
    wire = gzip.compress(noise, 0)
    assert run(Inflater("gzip", 10**9, 3), wire + gzip.compress(bytes(MIB))) == 3 * MIB
    with pytest.raises(TooDense):
        run(Inflater("gzip", 10**9, 3), wire + gzip.compress(bytes(5 * MIB)))


def test_members_may_be_many_if_there_is_something_in_them():
    lines = [b'{"n":%d,"text":"%b"}\n' % (n, b"x" * 600) for n in range(3000)]
    assert run(Inflater("gzip", 10**9, 200), b"".join(map(gzip.compress, lines))) == sum(
        map(len, lines)
    )
    few = gzip.compress(b"1\n") * compression.MEMBERS_FREE
    assert run(Inflater("gzip", 10**9, 200), few) == 2 * compression.MEMBERS_FREE
    with pytest.raises(TooDense, match="members"):
        run(Inflater("gzip", 10**9), few + gzip.compress(b"1\n") * 100)


def test_too_dense_is_a_kind_of_too_much():
    assert issubclass(TooDense, TooMuch)
    assert not issubclass(TooMuch, Corrupt)


@pytest.mark.parametrize(
    ("body", "mib"),
    [
        (b"[" + b"1," * 8_000_000 + b"1]", 8),
        (b"[" + b"[]," * 5_000_000 + b"[]]", 8),
        (b"[" + b'"",' * 5_000_000 + b'""]', 8),
        (b"[" + b"1," * 199_990 + b"1]", 24),
        (b"[" * 1_000_000, 8),
    ],
)
def test_arrays_that_would_be_large_lists(body, mib):
    """A list takes 40 times the size of `[1,1,1,…]`: it is not made."""
    with peak() as most, pytest.raises(Problem):
        DocumentCodec().decode(body, BodyLimits(100_000, 1024))
    assert most.bytes < mib * MIB


@pytest.mark.parametrize("line", [b"x\n", b"1\n", b"[]\n", b" \n", b"\r\n", b"{\n"])
def test_lines_that_are_very_many(line):
    """Nor are millions of lines taken apart before it is known that there are too many."""
    body = line * (16 * MIB // len(line))
    with peak() as most, pytest.raises(Problem):
        LinesCodec("json").decode(body, BodyLimits(100_000, 1024))
    assert most.bytes < 2.2 * len(body) + 24 * MIB


def test_a_body_of_good_json_that_fits_no_handler_leaves_little(tmp_path: Path) -> None:
    """Its dead letters lie together; once each of them was a row with a text of its own."""
    (tmp_path / "app.py").write_text(
        "import msgspec\n"
        "class Click(msgspec.Struct):\n"
        "    user: str\n"
        "def store(batch: list[Click]) -> None:\n"
        "    pass\n"
    )
    body = gzip.compress(b"1\n" * 20_000)
    with daemon("app:store", cwd=tmp_path) as one:
        headers = {"Content-Type": "application/x-ndjson", "Content-Encoding": "gzip"}
        assert one.request("POST", "/v1/records", body, headers)[0] == 202
        settled = one.until_settled(timeout=120)
        assert settled["dead"] == settled["dead_letters"]["kept"] == 20_000
        batches = len([line for line in one.events if line["event"] == "records_given_up"])
        assert settled["dead_letters"]["bytes"] <= 2 * 20_000 + batches * (64 << 10)
        one.terminate()
        assert one.wait() == 0
