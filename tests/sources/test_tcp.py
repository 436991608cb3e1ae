"""The base of sources over TCP, with a small protocol: lines, with keys and replies.

`+TEXT` is a record, `KEY=TEXT` one under a key; each is answered with `ok LINE`. `!WHY` is a fault.
A line without its LF is a begun frame.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import socket
import ssl
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

from ingestd.base.append import IdempotencyClaim
from ingestd.base.clock import SystemClock
from ingestd.base.envelope import EnvelopeRuns
from ingestd.base.errors import (
    ConfigError,
    KeyInFlight,
    KeyReused,
    KeysFull,
    KeyTaken,
    NeverFits,
    Overloaded,
)
from ingestd.base.record import InvalidRecord, Records
from ingestd.codecs.lines import Parsed
from ingestd.http import deadlines
from ingestd.http.settings import TlsSettings
from ingestd.sources.base import SourceContext
from ingestd.sources.tcp import UNFINISHED, Frames, Peer, Received, StreamCodec
from ingestd.sources.tcp import connection as module
from ingestd.sources.tcp.settings import TcpSettings, TcpSourceKind
from ingestd.sources.tcp.source import TcpSource
from tests.access.tools import Files, on_both_loops
from tests.sources.source_tools import MemoryIntake

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

    from ingestd.base.append import Append

NONE = Parsed(Records.lines([]), [])


class LinesCodec(StreamCodec):
    replies = True

    def __init__(self, peer: Peer) -> None:
        self.peer = peer
        self._tail = b""

    @property
    def held(self) -> int:  # type: ignore[override]
        return len(self._tail)

    def greet(self) -> bytes:
        return b"hello\n"

    def feed(self, data: bytes) -> Frames:
        *lines, self._tail = (self._tail + data).split(b"\n")
        received = []
        for line in lines:
            if line[:1] == b"!":
                return Frames(received, line[1:].decode())
            if line == b"crash":
                raise RuntimeError(line)
            key, mark, text = line.partition(b"=")
            parsed = Parsed(Records.lines([text if mark else line[1:]]), [])
            received.append(Received(parsed, b"ok %b\n" % line, key.decode() if mark else "", text))
        return Frames(received)

    def end(self, why: str | None) -> Frames:
        tail, self._tail = self._tail, b""
        if not tail:
            return Frames()
        if why is None:
            return Frames([Received(Parsed(Records.lines([tail[1:]]), []))])
        return Frames([Received(NONE._replace(refused=[InvalidRecord(0, UNFINISHED, why, tail)]))])


class Silent(LinesCodec):
    replies = False

    def greet(self) -> bytes:
        return b""

    def feed(self, data: bytes) -> Frames:
        found = super().feed(data)
        return found._replace(received=[one._replace(reply=b"") for one in found.received])


class KeyedIntake(MemoryIntake):
    """Knows keys, and keeps whole appends."""

    def __init__(self, **more: Any) -> None:
        super().__init__("text", **more)
        self.appends: list[Append] = []
        self.keys: dict[str, bytes] = {}
        self.begin_errors: list[Exception] = []
        self.forgotten = 0

    async def begin(self, key: str, fingerprint: bytes) -> Any:
        if self.begin_errors:
            raise self.begin_errors.pop(0)
        return self.keys.get(key) or IdempotencyClaim(key, fingerprint)

    def forget(self, claim: Any) -> None:
        self.forgotten += 1

    async def accept(self, append: Append) -> None:
        await super().accept(append)
        self.appends.append(append)
        if append.claim is not None:
            self.keys[append.claim.key] = append.claim.answer

    async def until(self, count: int) -> list[bytes]:
        async with asyncio.timeout(60):
            while len(self.items) < count:
                await asyncio.sleep(0.002)
        return self.items


@contextlib.asynccontextmanager
async def serving(
    intake: MemoryIntake,
    codec: Callable[[Peer], StreamCodec] = LinesCodec,
    sockets: tuple[socket.socket, ...] = (),
    **settings: Any,
) -> AsyncIterator[TcpSource]:
    settings.setdefault("listen", ("127.0.0.1:0",))
    context = SourceContext(
        "lines", {"default": intake}, "default", SystemClock(), 0, None, sockets,
        lambda: False, lambda *_: None,
    )  # type: ignore[arg-type]  # fmt: skip
    source = TcpSource(TcpSettings(**settings), context, codec, table="lines")
    await source.start()
    try:
        yield source
    finally:
        await source.close()


@contextlib.asynccontextmanager
async def connected(source: TcpSource, at: int = 0, **more: Any) -> AsyncIterator[Any]:
    host, _, port = source.addresses[at].rpartition(":")
    more.setdefault("limit", 2**20)
    reader, writer = await asyncio.open_connection(host.strip("[]"), int(port), **more)
    try:
        yield reader, writer
    finally:
        # Python's TLS transport has no protocol any more once it was closed twice.
        with contextlib.suppress(AttributeError):
            writer.transport.abort()


async def line(reader: asyncio.StreamReader) -> bytes:
    async with asyncio.timeout(60):
        return await reader.readline()


async def closes(reader: asyncio.StreamReader) -> bytes:
    """All that comes until the source closes."""
    async with asyncio.timeout(60):
        try:
            return await reader.read()
        except (ConnectionResetError, ssl.SSLError):
            return b""


async def eventually(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.002)


# -- the way of bytes ------------------------------------------------------------------------------


async def exchange(intake: KeyedIntake, files: Files | None) -> None:
    """Frames in pieces of any size, replies after the commit, in order; then the peer's end."""
    more: dict[str, Any] = {}
    if files is not None:
        settings = TlsSettings(certificate=files.server())
        more = {"tls": settings, "listen": ("tls://127.0.0.1:0",)}
    async with serving(intake, **more) as source:
        secure = {"ssl": ssl.create_default_context(cafile=files.ca)} if files else {}
        async with connected(source, **secure) as (reader, writer):
            assert await line(reader) == b"hello\n"
            writer.write(b"+a\n+b")
            assert await line(reader) == b"ok +a\n"
            intake.gate.clear()
            writer.write(b"\nk=c\n+d\n")
            await intake.asked.wait()
            writer.write(b"+e\n" * 3 + b"+last")
            intake.gate.set()
            for expected in (b"+b", b"k=c", b"+d", b"+e", b"+e", b"+e"):
                assert await line(reader) == b"ok %b\n" % expected
            writer.write(b"+" + b"x" * 300_000 + b"\n")
            assert (await line(reader)).startswith(b"ok +last+xxx")
            if files is None:
                writer.write(b"+end")
                writer.write_eof()
                assert await closes(reader) == b""
            else:
                writer.close()
        assert (await intake.until(8))[:3] == [b"a", b"b", b"c"]
        await eventually(lambda: not source.numbers()["connections"])
        assert source.admission.bytes == source.admission.requests == 0
        assert source.numbers()["received_bytes"] > 300_000
    (envelope,) = {append.envelope for append in intake.appends}
    assert EnvelopeRuns(envelope, 1).of(0).attributes == {"peer": "127.0.0.1"}


@pytest.mark.parametrize("secure", [False, True])
@on_both_loops
async def test_frames_are_accepted_and_answered(secure: bool, tmp_path: Path) -> None:
    await exchange(KeyedIntake(), Files(tmp_path) if secure else None)


@on_both_loops
async def test_a_tls_client_that_closes_at_once_loses_nothing(tmp_path: Path) -> None:
    """It reads nothing and sends no `close_notify`: nothing unread may make a reset of its end."""
    files, intake = Files(tmp_path), KeyedIntake()
    tls = TlsSettings(certificate=files.server())
    async with serving(intake, Silent, listen=("tls://127.0.0.1:0",), tls=tls) as source:

        def send() -> None:
            host, port = source.addresses[0].split(":")
            context = ssl.create_default_context(cafile=files.ca)
            with context.wrap_socket(
                socket.create_connection((host, int(port))), server_hostname=host
            ) as one:
                for number in range(500):
                    one.sendall(b"+%d\n" % number)

        await asyncio.to_thread(send)
        assert await intake.until(500) == [b"%d" % number for number in range(500)]


@on_both_loops
async def test_tls_that_sends_nothing_or_half_a_packet_holds_no_room(tmp_path: Path) -> None:
    files, intake = Files(tmp_path), KeyedIntake()
    tls = TlsSettings(certificate=files.server())
    context = ssl.create_default_context(cafile=files.ca)
    async with serving(intake, Silent, listen=("tls://127.0.0.1:0",), tls=tls) as source:
        async with connected(source, ssl=context):
            await asyncio.sleep(0.1)
            assert source.admission.bytes == 0
        async with connected(source) as (reader, writer):
            got, put = ssl.MemoryBIO(), ssl.MemoryBIO()
            client = context.wrap_bio(got, put, server_hostname="127.0.0.1")
            while True:
                with contextlib.suppress(ssl.SSLWantReadError):
                    client.do_handshake()
                    break
                writer.write(put.read())
                got.write(await reader.read(2**16))
            client.write(b"+a\n")
            writer.write(put.read())
            await intake.until(1)
            client.write(b"+b\n" * 1000)
            wire = put.read()
            writer.write(wire[:1000])
            await asyncio.sleep(0.1)
            assert source.admission.bytes == 0
            writer.write(wire[1000:])
            await intake.until(1001)


async def test_a_connection_waits_for_an_overloaded_pipeline_and_loses_nothing() -> None:
    intake = KeyedIntake()
    intake.errors = [Overloaded(what="it", retry_after=0.01) for _ in range(3)]
    async with serving(intake) as source, connected(source) as (reader, writer):
        writer.write(b"+a\n")
        assert await line(reader) == b"hello\n"
        assert await line(reader) == b"ok +a\n"
        assert intake.items == [b"a"]


async def test_what_comes_during_a_commit_is_one_append() -> None:
    intake = KeyedIntake()
    intake.gate.clear()
    async with serving(intake) as source, connected(source) as (_, writer):
        writer.write(b"+0\n")
        await intake.asked.wait()
        for number in range(1, 100):
            writer.write(b"+%d\n" % number)
            await writer.drain()
        await eventually(lambda: source.totals.received == 390)
        intake.gate.set()
        assert len(await intake.until(100)) == 100
        assert len(intake.appends) <= 3


async def test_a_key_is_accepted_once_and_its_reply_is_repeated() -> None:
    intake = KeyedIntake()
    intake.begin_errors = [Overloaded(what="keys", retry_after=0.01)]
    async with serving(intake) as source:
        for _ in range(2):
            async with connected(source) as (reader, writer):
                writer.write(b"one=a\ntwo=b\n+c\n")
                for expected in (b"hello\n", b"ok one=a\n", b"ok two=b\n", b"ok +c\n"):
                    assert await line(reader) == expected
    assert sorted(intake.items) == [b"a", b"b", b"c", b"c"]
    assert set(intake.keys) == {"anonymous one", "anonymous two"}
    assert intake.forgotten == 2


async def test_a_key_of_other_records_is_no_reason_to_lose_these(monkeypatch) -> None:
    monkeypatch.setattr(module, "AGAIN_SECONDS", 0.01)
    intake = KeyedIntake()
    intake.begin_errors = [KeyInFlight(), KeyReused()]
    async with serving(intake) as source, connected(source) as (reader, writer):
        writer.write(b"one=a\n")
        assert await line(reader) == b"hello\n"
        assert await line(reader) == b"ok one=a\n"
        assert not intake.keys


async def test_a_key_that_cannot_be_looked_up_or_was_taken_meanwhile_is_claimed_again() -> None:
    intake = KeyedIntake()
    intake.begin_errors = [Overloaded(what="engine", retry_after=0.01) for _ in range(5)]
    intake.errors = [Overloaded(what="it", retry_after=0.01), KeyTaken(), KeyTaken()]
    async with serving(intake) as source, connected(source) as (reader, writer):
        writer.write(b"one=a\n")
        assert await line(reader) == b"hello\n"
        assert await line(reader) == b"ok one=a\n"
    assert set(intake.keys) == {"anonymous one"}
    assert (intake.items, intake.forgotten) == ([b"a"], 3)


async def test_a_table_of_keys_that_stays_full_keeps_no_record_out() -> None:
    intake = KeyedIntake()
    intake.begin_errors = [KeysFull(what="keys", retry_after=0.01) for _ in range(3)]
    async with serving(intake) as source, connected(source) as (reader, writer):
        writer.write(b"one=a\n")
        assert await line(reader) == b"hello\n"
        assert await line(reader) == b"ok one=a\n"
        writer.write(b"two=b\n")
        assert await line(reader) == b"ok two=b\n"
    assert (intake.items, intake.keys, len(intake.begin_errors)) == ([b"a", b"b"], {}, 1)


@pytest.mark.parametrize("bad", [b"!it is bad\n", b"crash\n"])
async def test_a_fault_ends_the_connection_after_what_was_good(bad: bytes) -> None:
    intake = KeyedIntake()
    async with serving(intake) as source, connected(source) as (reader, writer):
        writer.write(b"+a\n")
        assert [await line(reader), await line(reader)] == [b"hello\n", b"ok +a\n"]
        writer.write(b"+b\n" + bad + b"+never\n")
        answer = await closes(reader)
        assert answer == (b"ok +b\n" if bad[:1] == b"!" else b"")
        await eventually(lambda: source.totals.cut == 1)
    assert b"never" not in intake.items


async def test_records_that_never_fit_end_the_connection() -> None:
    intake = KeyedIntake()
    intake.errors = [NeverFits(size=1, what="x", bound=0)]
    async with serving(intake) as source, connected(source) as (reader, writer):
        writer.write(b"+a\n")
        assert await closes(reader) == b"hello\n"
        assert source.admission.bytes == 0


# -- bounds and deadlines --------------------------------------------------------------------------


async def test_a_peer_that_says_nothing_is_let_go() -> None:
    async with serving(KeyedIntake(), idle_timeout=0.05) as source:
        async with connected(source) as (reader, _):
            assert await closes(reader) == b"hello\n"
        assert source.totals.cut == 1


async def test_a_frame_has_a_deadline_and_its_beginning_is_kept() -> None:
    intake = KeyedIntake()
    async with (
        serving(intake, frame_timeout=0.05, frame_rate_min=0) as source,
        connected(source) as (reader, writer),
    ):
        writer.write(b"+whole\n+begun")
        assert await closes(reader) == b"hello\nok +whole\n"
    (letter,) = intake.refused
    assert (letter.reason, letter.payload) == (UNFINISHED, b"+begun")
    assert "frame_timeout" in letter.detail


async def test_a_frame_that_trickles_is_too_slow(monkeypatch) -> None:
    monkeypatch.setattr("ingestd.http.deadlines.GRACE_SECONDS", 0.1)
    intake = KeyedIntake()
    async with (
        serving(intake, frame_rate_min=10_000) as source,
        connected(source) as (reader, writer),
    ):

        async def trickle() -> None:
            while True:
                writer.write(b".")
                await asyncio.sleep(0.01)

        task = asyncio.create_task(trickle())
        assert await closes(reader) == b"hello\n"
        task.cancel()
    assert "frame_rate_min" in intake.refused[0].detail


async def test_no_deadline_runs_while_the_pipeline_is_full(monkeypatch) -> None:
    # Where this process had no time for a moment, that is not the peer's.
    monkeypatch.setattr(deadlines, "LATE_SECONDS", 0.01)
    intake = KeyedIntake()
    intake.gate.clear()
    async with (
        serving(intake, idle_timeout=0.05, frame_timeout=0.05) as source,
        connected(source) as (reader, writer),
    ):
        writer.write(b"+a\n+beg")
        await intake.asked.wait()
        writer.write(b"un\n")
        await asyncio.sleep(0.2)
        intake.gate.set()
        assert [await line(reader) for _ in range(3)] == [b"hello\n", b"ok +a\n", b"ok +begun\n"]


async def test_the_account_bounds_what_all_connections_hold() -> None:
    """While nothing is committed little more than the bound is read; in the end all of it is."""
    intake = KeyedIntake()
    intake.gate.clear()
    payload = (b"+" + b"x" * 998 + b"\n") * 1000
    async with serving(intake, Silent, inflight_bytes_max=512 * 1024) as source:
        writers = []
        async with contextlib.AsyncExitStack() as stack:
            for _ in range(4):
                _, writer = await stack.enter_async_context(connected(source))
                writer.write(payload)
                writers.append(writer)
            await eventually(lambda: source.admission.bytes >= 256 * 1024)
            await asyncio.sleep(0.1)
            assert source.totals.received < 1024**2
            assert source.admission.bytes <= 512 * 1024
            intake.gate.set()
            assert len(await intake.until(4000)) == 4000
        await eventually(lambda: not source.numbers()["connections"])
        assert source.admission.bytes == 0


async def test_a_codec_is_asked_if_it_is_quick_only_while_it_holds_little() -> None:
    asked = []

    class Asked(Silent):
        def is_quick(self, data: bytes) -> bool:
            asked.append(self.held + len(data))
            return True

    intake = KeyedIntake()
    async with serving(intake, Asked) as source, connected(source) as (_, writer):
        for _ in range(100):
            writer.write(b"x" * 4000)
            await asyncio.sleep(0)
        writer.write(b"\n-end\n")
        await intake.until(2)
    assert max(asked, default=0) < module.THREAD_BYTES


async def test_begun_frames_may_not_hold_everything() -> None:
    async with (
        serving(KeyedIntake(), inflight_bytes_max=64 * 1024) as source,
        connected(source) as (first, one),
        connected(source) as (second, two),
    ):
        one.write(b"+" + b"x" * 10_000)
        await eventually(lambda: source.admission.bytes >= 10_000)
        two.write(b"+" + b"y" * 30_000)
        await closes(second)
        one.write(b"\n")
        await line(first)
        assert (await line(first)).startswith(b"ok +xxx")


async def test_connections_are_bounded() -> None:
    async with serving(KeyedIntake(), connections_max=2, client_share=1) as source:
        async with connected(source) as (first, _), connected(source) as (second, _):
            assert [await line(first), await line(second)] == [b"hello\n"] * 2
            async with connected(source) as (third, _):
                assert await closes(third) == b""
            assert source.numbers()["connections_refused"] == 1
        await eventually(lambda: not source.numbers()["connections"])
        async with connected(source) as (fourth, _):
            assert await line(fourth) == b"hello\n"


async def test_a_peer_that_does_not_read_its_replies_is_cut(monkeypatch) -> None:
    monkeypatch.setattr(module, "WRITE_SECONDS", 0.05)
    monkeypatch.setattr(module, "LINGER_SECONDS", 0.05)
    async with serving(KeyedIntake()) as source, connected(source, limit=1) as (reader, writer):
        reader._transport.pause_reading()
        with contextlib.suppress(ConnectionError):
            for _ in range(200):
                writer.write(b"+" + b"x" * 99_998 + b"\n")
                await writer.drain()
        await eventually(lambda: source.totals.cut == 1)


# -- the drain -------------------------------------------------------------------------------------


async def drain(source: TcpSource, seconds: float = 60.0) -> None:
    await source.stop_taking(asyncio.get_running_loop().time() + seconds)


@pytest.mark.parametrize("secure", [False, True])
@on_both_loops
async def test_a_drain_accepts_what_has_arrived_and_keeps_what_was_begun(
    secure: bool, tmp_path: Path, monkeypatch
) -> None:
    """A client that looks sees at once that nothing more is read."""
    quiet = module.QUIET_SECONDS
    for name in ("LEAVE_SECONDS", "QUIET_SECONDS"):  # until all is there
        monkeypatch.setattr(module, name, 60.0)
    intake, files = KeyedIntake(), Files(tmp_path)
    tls = TlsSettings(certificate=files.server())
    scheme = "tls" if secure else "tcp"
    async with serving(intake, Silent, listen=(f"{scheme}://127.0.0.1:0",), tls=tls) as source:
        raw = socket.create_connection(source.addresses[0].split(":"), timeout=60)
        if secure:
            context = ssl.create_default_context(cafile=files.ca)
            shake = partial(context.wrap_socket, raw, server_hostname="127.0.0.1")
        with await asyncio.to_thread(shake) if secure else raw as writer:
            writer.sendall(b"+a\n")
            await intake.until(1)
            draining = asyncio.create_task(drain(source))
            with socket.socket(fileno=os.dup(writer.fileno())) as same:
                await asyncio.to_thread(select.select, [same], [], [], 60)
                assert same.recv(1, socket.MSG_PEEK) == b""
            writer.sendall(b"+b\n+beg")
            await intake.until(2)
            writer.sendall(b"un\n+c")
            await eventually(lambda: source.totals.received == len(b"+a\n+b\n+begun\n+c"))
            assert not draining.done()
            monkeypatch.setattr(module, "QUIET_SECONDS", quiet)
            for connection in source._connections:
                connection._wake()
            await draining
            assert intake.items == [b"a", b"b", b"begun"]
            assert [one.payload for one in intake.refused] == [b"+c"]
            assert source.totals.cut == 0
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection(source.addresses[0].split(":"))


@pytest.mark.slow
async def test_a_drain_does_not_wait_for_a_peer_that_goes_on_sending() -> None:
    intake = KeyedIntake()
    async with serving(intake, Silent) as source:
        with socket.create_connection(source.addresses[0].split(":"), timeout=30) as peer:

            def send() -> int:
                with contextlib.suppress(OSError):
                    for sent in range(10**9):
                        peer.sendall(b"+%07d\n" % sent * 100)
                return sent

            sending = asyncio.get_running_loop().run_in_executor(None, send)
            await intake.until(1)
            async with asyncio.timeout(90):
                await drain(source, 120)
            assert await sending > 0
    numbers = [int(item) for item in intake.items]
    assert numbers == sorted(numbers)
    assert source.totals.cut == 0


@pytest.mark.parametrize("goes_on", [True, False])
async def test_a_drain_ends_although_what_came_last_took_long(goes_on: bool, monkeypatch) -> None:
    """Longer than a connection has to leave, and than a deadline may be looked at late."""
    monkeypatch.setattr(module, "LEAVE_SECONDS", 0.05)
    monkeypatch.setattr(deadlines, "LATE_SECONDS", 0.05)
    intake = KeyedIntake()
    intake.gate.clear()
    async with serving(intake, Silent) as source, connected(source) as (_, writer):
        writer.write(b"+a\n")
        await intake.asked.wait()
        draining = asyncio.create_task(drain(source, 60))
        for number in range(20 if goes_on else 0):
            writer.write(b"+%d\n" % number)
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.3)
        intake.gate.set()
        async with asyncio.timeout(50):  # its deadline is later
            await draining


async def test_a_drain_sends_the_replies() -> None:
    intake = KeyedIntake()
    intake.gate.clear()
    async with serving(intake) as source, connected(source) as (reader, writer):
        writer.write(b"+a\n")
        await intake.asked.wait()
        draining = asyncio.create_task(drain(source))
        await asyncio.sleep(0.01)
        intake.gate.set()
        assert await closes(reader) == b"hello\nok +a\n"
        await draining


async def test_a_drain_ends_at_its_deadline(caplog) -> None:
    intake = KeyedIntake()
    intake.gate.clear()
    async with serving(intake) as source, connected(source) as (_, writer):
        writer.write(b"+a\n")
        await intake.asked.wait()
        await drain(source, 0.05)
        assert source.numbers()["connections"] == 1
        await source.close()
        assert source.admission.bytes == source.numbers()["connections"] == 0


# -- addresses, sockets, certificates --------------------------------------------------------------


async def test_several_addresses_and_passed_sockets(tmp_path: Path) -> None:
    intake = KeyedIntake()
    async with serving(intake, listen=("127.0.0.1:0", "tcp://[::1]:0")) as source:
        assert len(source.addresses) == 2
        for at in (0, 1):
            async with connected(source, at) as (reader, _):
                assert await line(reader) == b"hello\n"
    passed = socket.socket(socket.AF_UNIX)
    passed.bind(str(tmp_path / "in"))
    passed.listen()
    passed.setblocking(False)
    async with serving(intake, sockets=(passed,)) as source:
        assert source.addresses == [f"unix:{tmp_path}/in"]
        reader, writer = await asyncio.open_unix_connection(tmp_path / "in")
        writer.write(b"+a\n")
        assert [await line(reader), await line(reader)] == [b"hello\n", b"ok +a\n"]
        writer.close()
    assert intake.principals[-1].startswith("uid ")


async def test_a_reload_changes_certificates_and_who_is_known(tmp_path: Path) -> None:
    files, other = Files(tmp_path / "a"), Files(tmp_path / "b")
    intake = KeyedIntake()
    tls = TlsSettings(certificate=files.server(), client_ca=files.ca, client_required=True)
    async with serving(intake, listen=("tls://127.0.0.1:0",), tls=tls) as source:
        context = ssl.create_default_context(cafile=files.ca)
        context.load_cert_chain(files.issue("shop", "shop.example"))
        async with connected(source, ssl=context) as (reader, writer):
            writer.write(b"k=a\n")
            assert [await line(reader), await line(reader)] == [b"hello\n", b"ok k=a\n"]
            assert EnvelopeRuns(intake.appends[0].envelope, 1).of(0).client == "shop.example"
            assert next(iter(intake.keys)).startswith("certificate ")
            stranger = ssl.create_default_context(cafile=files.ca)
            async with connected(source, ssl=stranger) as (unknown, _):
                assert await closes(unknown) == b""
            new = source.settings.model_copy(
                update={"tls": TlsSettings(certificate=other.server(), client_ca=other.ca)}
            )
            (await source.prepare(new))()
            assert await closes(reader) == b""
        async with connected(source, ssl=ssl.create_default_context(cafile=other.ca)) as (
            reader,
            _,
        ):
            assert await line(reader) == b"hello\n"
        bad = new.model_copy(update={"tls": TlsSettings(certificate="lost")})
        with pytest.raises(ConfigError, match=r"lines\.tls\.certificate: cannot read lost"):
            await source.prepare(bad)


# -- settings --------------------------------------------------------------------------------------


class Kind(TcpSourceKind):
    table = "lines"
    formats = ("json",)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"listen": "udp://127.0.0.1:1"}, "lines has no udp://"),
        ({"listen": "tls://127.0.0.1:1"}, "needs lines.tls.certificate"),
        ({"listen": "0.0.0.0:1"}, "0.0.0.0:1 is reachable from other machines"),
        ({"listen": "0.0.0.0:1", "allow_anonymous": True}, ""),
        ({"listen": "127.0.0.1:1, [::1]:1"}, ""),
        ({"listen": "a.example:1"}, "is reachable"),
        ({"listen": "127.0.0.1:1", "tls": {"client_ca": "x"}}, "needs lines.tls.certificate"),
    ],
)
def test_settings_that_cannot_work(settings: dict[str, Any], problem: str) -> None:
    own = TcpSettings(**settings)
    found = list(Kind().problems(own, formats={"default": "json"}, default="default", runs=True))
    assert (not found and not problem) or problem in found[0][1]


def test_the_format_of_the_pipeline() -> None:
    own = TcpSettings(listen=("127.0.0.1:1",))
    find = partial(Kind().problems, own, default="default", runs=True)
    ((key, problem),) = find(formats={"default": "bytes"})
    assert (key, "records of lines are json" in problem) == ("pipeline", True)


@pytest.mark.parametrize("listen", ["", "x", "http://127.0.0.1:1", "127.0.0.1:99999"])
def test_addresses_that_are_none(listen: str) -> None:
    with pytest.raises(ValueError):
        TcpSettings(listen=listen)
