"""Messages to a worker: whole, in any number of pieces, with the payload beside them or in them."""

from __future__ import annotations

import os
import socket
import threading
from typing import TYPE_CHECKING

import pytest

from ingestd.base.record import Records, Span
from ingestd.handlers import wire
from ingestd.handlers.outcome import Job, Result

if TYPE_CHECKING:
    from collections.abc import Iterator

Pair = tuple[socket.socket, socket.socket]


@pytest.fixture
def pair() -> Iterator[Pair]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, theirs


@pytest.fixture
def slots() -> Iterator[tuple[wire.SharedBuffer, wire.SharedBuffer]]:
    """The worker's and the child's, on the same memory."""
    fd = wire.SharedBuffer.make()
    if fd < 0:
        pytest.skip("there is no memfd_create here")
    ours, theirs = wire.SharedBuffer(fd, ours=True), wire.SharedBuffer(fd, ours=False)
    os.close(fd)
    yield ours, theirs
    ours.close()
    theirs.close()


ME = {"worker": 4711, "number": 5}


def receive(sock: socket.socket, limit: int = 1 << 30) -> bytes | bytearray | None:
    message = wire.receive(sock, worker=4711, limit=limit)
    assert message is None or message.number == 5
    return None if message is None else message.body


def job(records: Records) -> Job:
    spans, lineage = [Span(3, 0, records.count)], ["abc-3", "abc-5"]
    return Job("abc-7", 2, records, spans, "abc", 1234.5, lineage)


RUNS = [
    pytest.param(Records.lines([b'{"a":1}', b"2"]), id="lines"),
    pytest.param(Records.sized([b"\n", b"", b"\0" * 1000]), id="sized"),
    pytest.param(Records.lines([b"1"])._replace(envelopes=b"\x90"), id="with an envelope"),
    pytest.param(Records.lines([b"1" * (wire.SLOT_BYTES - 1)]), id="as large as the slot"),
]


@pytest.mark.parametrize("records", RUNS)
def test_a_payload_goes_through_the_slot(
    slots: tuple[wire.SharedBuffer, wire.SharedBuffer], records: Records
) -> None:
    ours, theirs = slots
    message = ours.pack(job(records))
    assert len(message) < 300 + len(records.sizes)
    assert theirs.unpack(message) == job(records)


def test_a_payload_that_was_taken_is_not_changed_by_the_next_one(
    slots: tuple[wire.SharedBuffer, wire.SharedBuffer],
) -> None:
    ours, theirs = slots
    first = theirs.unpack(ours.pack(job(Records.lines([b"1111"]))))
    second = theirs.unpack(ours.pack(job(Records.lines([b"22"]))))
    assert first.records.items() == [b"1111"]
    assert second.records.items() == [b"22"]


def test_what_does_not_fit_goes_over_the_socket(
    slots: tuple[wire.SharedBuffer, wire.SharedBuffer], pair: Pair
) -> None:
    large = job(Records.lines([b"1" * 3 * wire.SLOT_BYTES, b"2"]))
    sender = threading.Thread(target=wire.send, args=(pair[0], slots[0].pack(large)), kwargs=ME)
    sender.start()
    message = receive(pair[1])
    sender.join()
    assert message is not None
    assert slots[1].unpack(message) == large


def test_without_shared_memory_everything_does() -> None:
    none = wire.SharedBuffer(-1, ours=True)
    assert none.unpack(none.pack(job(Records.lines([b"1"])))) == job(Records.lines([b"1"]))
    none.close()


def test_a_message_comes_in_any_pieces(pair: Pair) -> None:
    result = wire.encode(Result(seconds=0.5))
    wire.send(pair[0], result, **ME)
    whole = pair[1].recv(1000)
    for piece in range(1, len(whole) + 1):
        sender = threading.Thread(target=_send_in, args=(pair[0], whole, piece))
        sender.start()
        assert receive(pair[1]) == result
        sender.join()


def _send_in(sock: socket.socket, whole: bytes, size: int) -> None:
    for start in range(0, len(whole), size):
        sock.sendall(whole[start : start + size])


@pytest.mark.parametrize("size", [0, 3, 8, 24, 50])
def test_the_end_in_the_middle_is_the_end(pair: Pair, size: int) -> None:
    wire.send(pair[0], b"x" * 100, **ME)
    whole = pair[1].recv(1000)
    pair[0].sendall(whole[:size])
    pair[0].close()
    assert receive(pair[1]) is None


@pytest.mark.parametrize("seconds", [0.05, 1e-9])
def test_waits_end(pair: Pair, seconds: float) -> None:
    wire.set_timeout(pair[0], seconds)
    with pytest.raises(BlockingIOError):
        receive(pair[0])
    with pytest.raises(BlockingIOError):  # nobody reads
        wire.send(pair[0], bytes(64 << 20), **ME)


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (b"g", "does not begin"),
        (b"garbage", "does not begin"),
        (b"igd\0" + bytes(20), "does not begin"),
        (wire._HEAD.pack(b"igd\x01", 4712, 5, 1) + b"x", "from process 4712"),
        (wire._HEAD.pack(b"igd\x01", 4711, 5, 1 << 60), f"said to be {1 << 60} bytes"),
        (wire._HEAD.pack(b"igd\x01", 4711, 5, 101), "said to be 101 bytes"),
        (wire._HEAD.pack(b"igd\x01", 4711, 5, 1) + b"xx", "bytes behind"),
    ],
)
def test_what_is_no_message_of_this_worker_is_a_misfit(pair: Pair, raw: bytes, says: str) -> None:
    pair[0].sendall(raw)
    with pytest.raises(wire.MessageMismatch, match=says):
        receive(pair[1], limit=100)


def test_a_child_can_neither_write_to_the_memory_nor_make_it_shorter() -> None:
    fd = wire.SharedBuffer.make()
    if fd < 0:
        pytest.skip("there is no memfd_create here")
    ours = wire.SharedBuffer(fd, ours=True)
    with pytest.raises(PermissionError):
        os.ftruncate(fd, 0)
    with pytest.raises(PermissionError):
        os.pwrite(fd, b"spoilt", 0)
    theirs = wire.SharedBuffer(fd, ours=False)
    assert theirs.unpack(ours.pack(job(Records.lines([b"1"])))) == job(Records.lines([b"1"]))
    os.close(fd)
    ours.close()
    theirs.close()


@pytest.mark.parametrize("split", [0, 1, 6, 10, 29, 30])
def test_an_answer_and_what_follows_it_may_come_in_one_piece(pair: Pair, split: int) -> None:
    for body in (b"the answer", b"closed"):
        wire.send(pair[0], body, **ME)
    whole = pair[1].recv(1000)
    pair[0].sendall(whole[: len(whole) - split])
    first = wire.receive(pair[1], worker=ME["worker"], limit=100, may_follow=True)
    assert first is not None
    pair[0].sendall(whole[len(whole) - split :])
    second = wire.receive(pair[1], worker=ME["worker"], limit=100, begun=first.rest)
    assert second is not None
    assert (first.body, second.body, second.rest) == (b"the answer", b"closed", b"")
