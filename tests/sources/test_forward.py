"""The forward protocol: modes, acknowledgements, handshake, bounds; a codec alone, and over TCP."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import hashlib
import json
import re
import sys
from typing import TYPE_CHECKING, Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ingestd.base.clock import SystemClock
from ingestd.base.envelope import Envelope, EnvelopeRuns, pack
from ingestd.base.errors import ConfigError, Overloaded
from ingestd.config.loader import load
from ingestd.http import problem
from ingestd.http.problem import Problem
from ingestd.settings import Settings
from ingestd.sources.base import SourceContext
from ingestd.sources.forward import ForwardSettings, ForwardSourceKind
from ingestd.sources.forward.codec import APPEND_BYTES, GROWN_BYTES, ForwardCodec
from ingestd.sources.forward.handshake import Secrets
from ingestd.sources.tcp import Frames, Peer
from ingestd.sources.tcp import connection as connection_module
from tests.daemon.harness import ROOT
from tests.sources.source_tools import MemoryIntake
from tests.sources.test_tcp import KeyedIntake

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

NOW = msgpack.ExtType(0, (1_764_412_619).to_bytes(4, "big") + (7).to_bytes(4, "big"))
PEER = Peer("10.0.0.1", "10.0.0.1", "", "anonymous", False, pack(Envelope("forward")))
EVENTS = [[NOW, {"n": 0}], [5, {"n": 1}], [[NOW, {}], {"n": 2}]]
PACKED = b"".join(map(msgpack.packb, EVENTS))
TIMES = [1764412619.000000007, 5, 1764412619.000000007]
RECORDS = [{"tag": "app", "time": t, "record": {"n": n}} for n, t in enumerate(TIMES)]
BOMB = gzip.compress(msgpack.packb([5, {"n": 0}]) * 2_000_000)
NONE = Secrets("", [], {})
SECRETS = Secrets("ingestd", ["old key", "a shared key"], {"shop": ["its password"]})


def make(secrets: Secrets = NONE, **settings: Any) -> ForwardCodec:
    return ForwardCodec(PEER, ForwardSettings(**settings), MemoryIntake(), secrets)


def records_of(frames: Frames) -> list[Any]:
    return [json.loads(item) for one in frames.received for item in one.parsed.records.items()]


def replies_of(frames: Frames) -> list[Any]:
    return [msgpack.unpackb(one.reply) for one in frames.received if one.reply]


def refused_in(frames: Frames) -> list[str]:
    return [one.detail for r in frames.received for one in r.parsed.refused]


def message(*parts: Any) -> bytes:
    return msgpack.packb(["app", *parts])


MODES = {
    "message": message(*EVENTS[0]) + message(*EVENTS[1]) + message(NOW, {"n": 2}),
    "forward": message(EVENTS),
    "packed forward": message(PACKED),
    "packed forward in a str": b"\x92\xa3app\xd9" + bytes([len(PACKED)]) + PACKED,
    "compressed": message(gzip.compress(PACKED), {"compressed": "gzip"}),
    "compressed in two members": message(
        gzip.compress(PACKED[:16]) + gzip.compress(PACKED[16:]), {"compressed": "gzip", "size": 3}
    ),
}  # fmt: skip


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("step", [1, 7, 10_000])
def test_each_mode_is_read_however_its_bytes_come(mode, step):
    wire, codec, found = MODES[mode] * 2 + b"\xc0", make(), []
    for at in range(0, len(wire), step):
        frames = codec.feed(wire[at : at + step])
        assert not frames.fault
        found += records_of(frames)
    assert found == RECORDS * 2
    assert (codec.held, codec.end(None)) == (0, Frames())


@pytest.mark.parametrize("encoding", ["gzip", "zstd"])
def test_equal_lines_of_an_error_storm_are_taken(encoding):
    """Their times are whole seconds where an agent read them from a log with such times."""
    record = {"log": "ERROR connection to db-1:5432 refused, retrying", "container": "a" * 64}
    events = b"".join([msgpack.packb([1_764_412_619 + n // 1000, record]) for n in range(20_000)])
    packed = gzip.compress(events) if encoding == "gzip" else zstd.compress(events)
    frames = make().feed(message(packed, {"compressed": encoding, "chunk": "a"}))
    assert frames.fault == ""
    assert len(records_of(frames)) == 20_000
    limited = make(inflate_ratio_max=100).feed(message(packed, {"compressed": encoding}))
    assert "more than 100 times" in limited.fault


def test_an_option_that_is_nil_is_not_there():
    options = {"chunk": None, "compressed": None, "fluent_signal": None, "size": None}
    frames = make().feed(message(PACKED, options))
    assert (records_of(frames), replies_of(frames)) == (RECORDS, [])


@pytest.mark.parametrize("encoding", ["gzip", "zstd"])
def test_each_event_of_a_chunk_may_be_compressed_alone(encoding):
    """As Fluentd does with `compress` in out_forward, where events reach it one by one."""
    compress = gzip.compress if encoding == "gzip" else zstd.compress
    events = b"".join([compress(msgpack.packb([5, {"n": n}])) for n in range(5000)])
    frames = make().feed(message(events, {"compressed": encoding, "chunk": "a"}))
    assert frames.fault == ""
    assert [one["record"]["n"] for one in records_of(frames)] == list(range(5000))
    frames = make(records_max=100).feed(message(events, {"compressed": encoding}))
    assert "members" in frames.fault


@pytest.mark.parametrize(
    "chunk", ["p8n9gmxTQVC8/nh2wlKKeQ==", b"p8n9\xff\x00", "x" * 40, "x" * 60_000]
)
@pytest.mark.parametrize("parts", [(5, {"n": 1}), (EVENTS,), (PACKED,)])
def test_the_id_of_a_chunk_comes_back_as_it_came(chunk, parts):
    sent = message(*parts, {"chunk": chunk, "size": 3, "fluent_signal": 0})
    frames = make().feed(sent + message(6, {}) + sent)
    first, between, second = frames.received
    assert replies_of(frames) == [{"ack": chunk}] * 2
    assert (first.key, first.fingerprint) == (second.key, second.fingerprint) != ("", b"")
    assert (between.key, between.reply) == ("", b"")
    other = make().feed(message(7, {}, {"chunk": chunk})).received[0]
    assert other.key == first.key
    assert other.fingerprint != first.fingerprint


def test_an_id_in_a_str_that_is_no_utf_8_comes_back_too():
    sent = b"\x94\xa3app\x05\x80\x81\xa5chunk\xa2\xff\xfe"
    (one,) = make().feed(sent).received
    assert one.reply == b"\x81\xa3ack\xa2\xff\xfe"


def test_messages_without_an_id_share_an_append():
    frames = make().feed(MODES["message"] * 100)
    assert len(frames.received) == 1
    assert len(records_of(frames)) == 300


@pytest.mark.parametrize(
    ("sent", "good", "why"),
    [
        (message([[1, {}], [1, 2], "x", [2, {}]]), 2, "the record of an event is not a map"),
        (message([[None, {}], [1, {}]]), 1, "the time of an event is no number"),
        (message(PACKED + b"\xc1\x00"), 3, "malformed MessagePack"),
        (message(PACKED[:-2]), 2, "a length goes beyond"),
        (message(b"\xa1t"), 0, "an event is an array of time and record"),
        (
            message(gzip.compress(PACKED, mtime=0)[:-9], {"compressed": "gzip"}),
            0,
            "the gzip body is not",
        ),
        (
            message(gzip.compress(gzip.compress(PACKED, mtime=0), mtime=0), {"compressed": "gzip"}),
            0,
            "",
        ),
        (message(PACKED, {"compressed": "lzma"}), 0, "events are compressed as 'lzma'"),
        (message(b"\x80", {"fluent_signal": 1}), 0, "only logs are records"),
        (message([[1, {"x": "y" * 2_000_000}], [2, {}]]), 1, "more than record_bytes_max"),
    ],
)
def test_events_that_are_none_are_invalid_records_and_the_chunk_is_acknowledged(sent, good, why):
    unpacked = msgpack.unpackb(sent)
    options = unpacked.pop() if isinstance(unpacked[-1], dict) and len(unpacked) == 3 else {}
    frames = make().feed(msgpack.packb([*unpacked, {**options, "chunk": "id"}]))
    assert not frames.fault
    assert replies_of(frames) == [{"ack": "id"}]
    assert len(records_of(frames)) == good
    assert why in refused_in(frames)[0]


@pytest.mark.parametrize(
    ("wire", "why"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", "malformed"),
        (b'["app", 5, {}]', "malformed"),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc", "malformed"),
        (b"\xc1", "malformed"),
        (b"\x90", "malformed"),
        (b"\x91\xa1a", "malformed"),
        (b"\x92\xa1a\x05", "malformed"),
        (b"\x92\x01\x90", "malformed"),
        (b"\x93\xa1a\x90\x05", "malformed"),
        (b"\x94\xa1a\x90\x80\x80", "malformed"),
        (msgpack.packb(["a" * 2000, 5, {}]), "malformed"),
        (message(b"", {"x": "y" * 70_000}), "malformed"),
        (b"\x91" * 700, "malformed"),
        (b"\xdd\xff\xff\xff\xff", "beyond 9437184"),
        (b"\x92\xa1a\xc6\x00\xb0\x00\x00", "beyond 9437184"),
        (message(BOMB, {"compressed": "gzip"}), "beyond its bounds"),
    ],
)
def test_what_is_no_message_or_beyond_a_bound_ends_the_connection(wire, why):
    frames = make().feed(MODES["forward"] + wire)
    assert records_of(frames) == RECORDS
    assert why in frames.fault
    assert not replies_of(frames)


def test_bounds_hold_for_each_message():
    codec = make(records_max=3, message_bytes_max=1024, decompressed_bytes_max=1024)
    frames = codec.feed(MODES["forward"] * 20)
    assert (len(records_of(frames)), frames.fault) == (60, "")
    over = codec.feed(MODES["forward"] + message(EVENTS * 2))
    assert "more than 3 records" in over.fault
    assert records_of(over) == RECORDS
    assert "more than message_bytes_max" in codec.feed(message(5, {"x": "y" * 1020})).fault
    assert "1024 bytes of JSON" in codec.feed(message(5, {"x": "\0" * 400})).fault
    few = make().feed(message([1] * 1000))
    assert (len(refused_in(few)), few.received[0].parsed.unlisted) == (10, 990)


def test_what_a_message_becomes_is_taken_from_the_account_before_it_is_there():
    codec, grown = make(), []
    codec.grow = grown.append
    codec.feed(message(PACKED, {"chunk": "x"}))
    assert not grown
    several = message(PACKED, {"chunk": "x"}) * 10
    assert codec.cost(several) == 2 * len(several) + 10 * APPEND_BYTES
    codec.feed(several)
    assert not grown  # what the cost counts is not taken again
    begun = message(5, {"x": "y" * 50_000})
    codec.feed(begun[:49_000])
    assert codec.cost(b"y") == 2
    assert codec.cost(begun[49_000:]) == 2 * len(begun[49_000:]) + 49_000
    codec.feed(begun[49_000:])
    assert not grown
    codec.feed(message(5, {"x": "\0" * 4000}))
    assert sum(grown) == GROWN_BYTES
    codec.feed(message(gzip.compress(PACKED * 20_000), {"compressed": "gzip"}))
    assert sum(grown) > 2 * len(PACKED) * 20_000

    def refuse(_: int) -> None:
        raise Problem(problem.BUSY, "full")

    codec.grow = refuse
    assert not codec.feed(message(5, {"x": "\0" * 500}, {"chunk": "small"})).fault
    frames = codec.feed(MODES["forward"] + message(BOMB, {"compressed": "gzip"}))
    assert records_of(frames) == RECORDS
    assert "no room" in frames.fault


def test_a_little_that_is_compressed_is_not_quick():
    codec, wire = make(), MODES["compressed"]
    assert codec.is_quick(MODES["packed forward"])
    assert not codec.is_quick(wire)
    cut = wire.index(b"\x1f\x8b") + 1
    codec.feed(wire[:cut])
    assert not codec.is_quick(wire[cut:])


def test_a_message_that_was_begun_is_kept_as_unfinished():
    codec = make()
    codec.feed(MODES["forward"] + MODES["forward"][:-3])
    assert codec.held
    frames = codec.end("nothing came")
    assert [one.reason for one in frames.received[0].parsed.refused] == ["unfinished"]
    assert refused_in(frames) == ["the message was not complete: nothing came"]
    assert codec.held == 0


@given(st.binary(max_size=300))
def test_any_bytes_are_records_or_a_fault(data):
    codec = make()
    frames = codec.feed(data)
    assert frames.fault or codec.held == 0 or codec.held <= len(data)
    records_of(frames)
    codec.end(None)


texts = st.text(max_size=5)
anything = st.recursive(
    st.none() | st.integers(-5, 2**40) | st.binary(max_size=20) | texts | st.just(NOW),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)
options = st.fixed_dictionaries(
    {},
    optional={
        "chunk": anything,
        "compressed": st.sampled_from(["gzip", "zstd", "text"]) | anything,
        "fluent_signal": st.integers(0, 2) | anything,
    },
)


@given(parts=st.lists(anything, max_size=3), last=options | anything)
def test_any_message_is_records_or_invalid_or_a_fault(parts, last):
    frames = make().feed(message(*parts, last))
    for record in records_of(frames):
        assert set(record) <= {"tag", "time", "record", "metadata", "group"}
    for reply in replies_of(frames):
        assert reply == {"ack": last["chunk"]}


# -- the handshake ---------------------------------------------------------------------------------


def digest(*parts: Any) -> str:
    joined = b"".join(part if isinstance(part, bytes) else part.encode() for part in parts)
    return hashlib.sha512(joined).hexdigest()


def ping(helo: bytes, key: str, user: str = "", password: str = "") -> bytes:
    salt = b"\xff\x00s"
    kind, options = msgpack.unpackb(helo)
    assert kind == "HELO"
    assert options["keepalive"] is True
    shown = digest(salt, "client", options["nonce"], key)
    proof = digest(options["auth"], user, password)
    packer = msgpack.Packer(use_bin_type=False)  # the salt is a str that is no UTF-8
    return packer.pack(["PING", "client", salt, shown, user, proof])


@pytest.mark.parametrize("key", SECRETS.keys)
def test_a_client_with_key_and_password_is_let_in_and_the_server_proves_its_key(key):
    codec = make(SECRETS)
    helo = codec.greet()
    frames = codec.feed(ping(helo, key, "shop", "its password") + message(5, {}, {"chunk": "a"}))
    assert not frames.fault
    (kind, ok, why, host, proof), ack = replies_of(frames)
    assert (kind, ok, why, host, ack) == ("PONG", True, "", "ingestd", {"ack": "a"})
    assert proof == digest(b"\xff\x00s", "ingestd", msgpack.unpackb(helo)[1]["nonce"], key)
    last = frames.received[-1]
    assert last.principal == "user shop"
    assert EnvelopeRuns(last.parsed.records.envelopes, 1).of(0).client == "shop"


def test_users_are_not_asked_for_where_there_are_none():
    codec = make(SECRETS._replace(users={}))
    helo = codec.greet()
    assert msgpack.unpackb(helo)[1]["auth"] == ""
    frames = codec.feed(ping(helo, "a shared key"))
    assert (replies_of(frames)[0][1], frames.fault) == (True, "")


@pytest.mark.parametrize(
    ("key", "user", "password", "why"),
    [
        ("another key", "shop", "its password", "shared_key mismatch"),
        ("a shared key", "shop", "guessed", "username/password mismatch"),
        ("a shared key", "nobody", "its password", "username/password mismatch"),
    ],
)
def test_a_client_without_them_is_refused_and_told(key, user, password, why):
    codec = make(SECRETS)
    frames = codec.feed(ping(codec.greet(), key, user, password) + MODES["forward"])
    assert replies_of(frames) == [["PONG", False, why, "", ""]]
    assert why in frames.fault
    assert records_of(frames) == []


@pytest.mark.parametrize(
    "wire",
    [MODES["forward"], b"\xc0", msgpack.packb(["PING"]), msgpack.packb(["PING", *[{}] * 5])],
)
def test_what_comes_before_a_ping_is_refused(wire):
    codec = make(SECRETS)
    codec.greet()
    frames = codec.feed(wire)
    assert "no PING" in frames.fault
    assert records_of(frames) == []
    long = make(SECRETS).feed(message(5, {"x": "y" * 5000}))
    assert "beyond 4096" in long.fault


# -- over TCP --------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def serving(intake: MemoryIntake, **settings: Any) -> AsyncIterator[Any]:
    context = SourceContext(
        "forward", {"default": intake}, "default", SystemClock(), 0, None, (),
        lambda: False, lambda *_: None,
    )  # type: ignore[arg-type]  # fmt: skip
    settings = {"listen": ("127.0.0.1:0",), **settings}
    source = ForwardSourceKind().build(ForwardSettings(**settings), context)
    await source.start()
    try:
        yield source
    finally:
        await source.close()


@contextlib.asynccontextmanager
async def connected(source: Any) -> AsyncIterator[Any]:
    host, _, port = source.addresses[0].rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    unpacker = msgpack.Unpacker()

    async def read() -> Any:
        async with asyncio.timeout(10):
            while True:
                for value in unpacker:
                    return value
                data = await reader.read(1000)
                if not data:
                    raise EOFError
                unpacker.feed(data)

    try:
        yield writer, read
    finally:
        # Python's TLS transport has no protocol any more once it was closed twice.
        with contextlib.suppress(AttributeError):
            writer.transport.abort()


async def test_an_acknowledgement_comes_after_the_commit_and_a_retried_chunk_is_accepted_once():
    intake = KeyedIntake()
    intake.gate.clear()
    sent = message(PACKED, {"chunk": "one", "size": 3})
    async with serving(intake) as source:
        async with connected(source) as (writer, read):
            writer.write(sent)
            await intake.asked.wait()
            reply = asyncio.ensure_future(read())
            await asyncio.sleep(0.02)
            assert not reply.done()
            intake.gate.set()
            assert await reply == {"ack": "one"}
        async with connected(source) as (writer, read):
            writer.write(sent + message(5, {}, {"chunk": b"two"}))
            assert await read() == {"ack": "one"}
            assert await read() == {"ack": b"two"}
    assert len(intake.items) == 4


async def test_thousands_of_tiny_messages_with_ids_are_accepted_a_few_at_a_time():
    class Counting(KeyedIntake):
        running = most = 0

        async def accept(self, append):
            self.running += 1
            self.most = max(self.most, self.running)
            await asyncio.sleep(0)
            await super().accept(append)
            self.running -= 1

    intake, count = Counting(), 8_000
    async with serving(intake) as source, connected(source) as (writer, read):
        writer.write(b"".join([message(1, {}, {"chunk": str(one)}) for one in range(count)]))
        assert [await read() for _ in range(count)] == [{"ack": str(one)} for one in range(count)]
    assert len(intake.items) == count
    assert intake.most < 1000


async def test_an_overloaded_pipeline_is_waited_for_and_nothing_acknowledged_meanwhile(monkeypatch):
    monkeypatch.setattr(connection_module, "AGAIN_SECONDS", 0.01)
    intake = KeyedIntake()
    intake.errors = [Overloaded(what="the journal", retry_after=0.01) for _ in range(3)]
    async with serving(intake) as source, connected(source) as (writer, read):
        writer.write(message(EVENTS, {"chunk": "x"}))
        assert await read() == {"ack": "x"}
    assert (len(intake.items), intake.errors) == (3, [])


async def test_a_drain_finishes_and_acknowledges_what_was_taken():
    intake = KeyedIntake()
    intake.gate.clear()
    async with serving(intake) as source, connected(source) as (writer, read):
        writer.write(message(EVENTS, {"chunk": "x"}))
        await intake.asked.wait()
        loop = asyncio.get_running_loop()
        leaving = asyncio.ensure_future(source.stop_taking(loop.time() + 60))
        intake.gate.set()
        assert await read() == {"ack": "x"}
        with pytest.raises(EOFError):
            await read()
        await leaving


async def test_the_handshake_goes_over_the_connection():
    intake = KeyedIntake()
    async with serving(intake, shared_key="a shared key") as source:
        async with connected(source) as (writer, read):
            helo = msgpack.packb(await read())
            writer.write(ping(helo, "a shared key"))
            assert (await read())[:2] == ["PONG", True]
            writer.write(message(5, {}, {"chunk": "x"}))
            assert await read() == {"ack": "x"}
        async with connected(source) as (writer, read):
            writer.write(ping(msgpack.packb(await read()), "another key"))
            assert (await read())[:2] == ["PONG", False]
            with pytest.raises(EOFError):
                await read()
    assert len(intake.items) == 1


async def test_many_connections_in_little_room_all_get_through():
    class Slow(KeyedIntake):
        async def accept(self, append):
            await asyncio.sleep(0.002)
            await super().accept(append)

    intake, count = Slow(), 5
    bounds = {"message_bytes_max": 20_000, "decompressed_bytes_max": 20_000}

    async def send(source: Any, one: int) -> None:
        async with connected(source) as (writer, read):
            for number in range(count):
                writer.write(message(5, {"x": "y" * 12_000}, {"chunk": f"{one}-{number}"}))
            for number in range(count):
                assert await read() == {"ack": f"{one}-{number}"}

    async with serving(intake, inflight_bytes_max=4_000_000, **bounds) as source:
        await asyncio.gather(*[send(source, one) for one in range(200)])
        assert source.numbers()["connections_cut"] == 0
    assert len(intake.items) == 200 * count


async def test_bombs_on_many_connections_stay_within_the_account():
    intake = KeyedIntake()
    intake.gate.clear()
    bomb = message(gzip.compress(msgpack.packb([5, {"n": 0}]) * 9000), {"compressed": "gzip"})
    async with (
        serving(intake, inflight_bytes_max="1MiB") as source,
        contextlib.AsyncExitStack() as stack,
    ):
        for _ in range(12):
            writer, _ = await stack.enter_async_context(connected(source))
            writer.write(bomb)
        async with asyncio.timeout(60):
            while source.totals.cut < 9:
                await asyncio.sleep(0.01)
        assert source.admission.bytes <= 1024**2
        intake.gate.set()


# -- settings --------------------------------------------------------------------------------------


def problems(**settings: Any) -> list[str]:
    found = ForwardSourceKind().problems(
        ForwardSettings(**settings), formats={"default": "json"}, default="default", runs=True
    )
    return [f"{key}: {text}" for key, text in found]


def test_settings_that_cannot_work_are_refused(tmp_path: Path):
    assert problems() == problems(listen=("0.0.0.0:24224",), shared_key="a key") == []
    assert "set forward.shared_key, require certificates" in problems(listen=("0.0.0.0:24224",))[0]
    assert "users need a shared key" in problems(users={"shop": {"password": "x"}})[0]
    assert "neither a password nor" in problems(users={"shop": {}}, shared_key="x")[0]
    assert "has no room for one message" in problems(inflight_bytes_max="1MiB")[0]
    kind, keys = ForwardSourceKind(), tmp_path / "keys"
    with pytest.raises(ConfigError, match="shared_key_file: cannot read"):
        kind.check(ForwardSettings(shared_key_file=str(keys)), {}, "default")
    keys.write_text("one\ntwo\n")
    kind.check(ForwardSettings(shared_key_file=str(keys)), {}, "default")


def test_the_settings_on_the_page_can_be_used(tmp_path: Path):
    page = (ROOT / "docs" / "clients" / "fluent.md").read_text()
    blocks = re.findall(r"```toml\n(.*?)```", page, re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        (tmp_path / "ingestd.toml").write_text(block)
        settings = load(Settings, environ={}, cwd=tmp_path, secrets=tmp_path / "none").settings
        (one,) = settings.running_sources()
        assert (one.name, one.kind, one.pipeline) == ("fluent", "forward", "default")
    assert one.settings.demands_proof
    assert set(one.settings.users) == {"shop"}
