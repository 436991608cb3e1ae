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
def slots() -> Iterator[tuple[wire.Slot, wire.Slot]]:
    """The lane's and the child's, on the same memory."""
    fd = wire.Slot.make()
    if fd < 0:
        pytest.skip("there is no memfd_create here")
    ours, theirs = wire.Slot(fd), wire.Slot(fd)
    os.close(fd)
    yield ours, theirs
    ours.close()
    theirs.close()


def job(records: Records) -> Job:
    return Job("abc-7", 2, records, [Span(3, 0, records.count)], "abc")


RUNS = [
    pytest.param(Records.lines([b'{"a":1}', b"2"]), id="lines"),
    pytest.param(Records.sized([b"\n", b"", b"\0" * 1000]), id="sized"),
    pytest.param(Records.lines([b"1" * (wire.SLOT_BYTES - 1)]), id="as large as the slot"),
]


@pytest.mark.parametrize("records", RUNS)
def test_a_payload_goes_through_the_slot(
    slots: tuple[wire.Slot, wire.Slot], records: Records
) -> None:
    ours, theirs = slots
    message = ours.pack(job(records))
    assert len(message) < 300 + len(records.sizes)
    assert theirs.unpack(message) == job(records)


def test_a_payload_that_was_taken_is_not_changed_by_the_next_one(
    slots: tuple[wire.Slot, wire.Slot],
) -> None:
    ours, theirs = slots
    first = theirs.unpack(ours.pack(job(Records.lines([b"1111"]))))
    second = theirs.unpack(ours.pack(job(Records.lines([b"22"]))))
    assert first.records.items() == [b"1111"]
    assert second.records.items() == [b"22"]


def test_what_does_not_fit_goes_over_the_socket(
    slots: tuple[wire.Slot, wire.Slot], pair: Pair
) -> None:
    large = job(Records.lines([b"1" * 3 * wire.SLOT_BYTES, b"2"]))
    sender = threading.Thread(target=wire.send, args=(pair[0], slots[0].pack(large)))
    sender.start()
    message = wire.receive(pair[1])
    sender.join()
    assert message is not None
    assert slots[1].unpack(message) == large


def test_without_shared_memory_everything_does() -> None:
    none = wire.Slot(-1)
    assert none.unpack(none.pack(job(Records.lines([b"1"])))) == job(Records.lines([b"1"]))
    none.close()


def test_a_message_comes_in_any_pieces(pair: Pair) -> None:
    result = wire.encode(Result(seconds=0.5))
    wire.send(pair[0], result)
    whole = pair[1].recv(1000)
    for piece in range(1, len(whole) + 1):
        sender = threading.Thread(target=_send_in, args=(pair[0], whole, piece))
        sender.start()
        assert wire.receive(pair[1]) == result
        sender.join()


def _send_in(sock: socket.socket, whole: bytes, size: int) -> None:
    for start in range(0, len(whole), size):
        sock.sendall(whole[start : start + size])


@pytest.mark.parametrize("size", [0, 3, 8, 20])
def test_the_end_in_the_middle_is_the_end(pair: Pair, size: int) -> None:
    whole = len(b"x" * 100).to_bytes(8, "little") + b"x" * 100
    pair[0].sendall(whole[:size])
    pair[0].close()
    assert wire.receive(pair[1]) is None


@pytest.mark.parametrize("seconds", [0.05, 1e-9])
def test_waits_end(pair: Pair, seconds: float) -> None:
    wire.set_timeout(pair[0], seconds)
    with pytest.raises(BlockingIOError):
        wire.receive(pair[0])
    with pytest.raises(BlockingIOError):  # nobody reads
        wire.send(pair[0], bytes(64 << 20))
