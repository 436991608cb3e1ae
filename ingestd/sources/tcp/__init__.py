"""Sources over TCP: what their protocols have in common, and the contract of one protocol.

A protocol is a `StreamCodec`, one for each connection: bytes in, `Frames` out. `TcpSource`
(`source.py`) has the rest: listeners, TLS and its reload, bounds, deadlines, the drain, metrics.
`TcpConnection` (`connection.py`) is the way of the bytes of one connection:

    bytes ──feed──▶ Frames ──Intake.accept──▶ durable ──reply──▶ peer

Invariants:

1. `feed` gets each byte once and in order, in pieces of any size. It returns what they complete and
   keeps the rest, whose size `held` tells. Only one method of a codec runs at a time. With many
   bytes `feed` and `end` run in a thread: they touch nothing that another codec changes.
2. What one `feed` returns is appended before what the next one returns. Its `Received` without a
   key are one append; each one with a key is an append of its own, which stores the key with its
   records. All of them are submitted together, and share a commit.
3. A reply is sent after the commit of its records, in the order of the frames. So a codec that says
   yes in a reply says it for what is durable. One that is repeated under its key is not appended
   again, and gets the same reply.
4. An overload is no error: nothing more is read until the pipeline takes what was read. Bytes that
   were read, frames that are incomplete and records that wait count in one account for all
   connections of the source, with a share for each client, and at its bound nothing more is read.
5. A `fault` ends the connection: what came before it in the same `Frames` is accepted and answered
   first. An exception of a codec is a defect; it ends the connection and is logged.
6. `end(None)` comes when the peer sends nothing more, `end(why)` when the connection is ended or
   broken: then what is held is no complete frame. It is the last call. A drain reads what has
   arrived for a moment more, and ends with it.

A source of this kind is a package: its `TcpSourceKind` with its settings (`settings.py`), its
codec, a line in `registry.py`, its table in `config/ingestd.toml` and a page in `docs/clients`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ingestd.codecs.lines import Parsed

UNFINISHED = "unfinished"
"""The reason of an invalid record that is the beginning of a frame."""


class Received(NamedTuple):
    """Records that are accepted, and answered, together.

    Attributes:
        parsed: the records, and what came in their place and can be none; there may be neither.
        reply: sent once they are durable; at once, and in order, if there are none.
        key: the peer's own name for them; empty if it has none.
        fingerprint: the same when they are sent again under that key.
        principal: the sender that the key belongs to, if the protocol knows; else that of the peer.
    """

    parsed: Parsed
    reply: bytes = b""
    key: str = ""
    fingerprint: bytes = b""
    principal: str = ""


class Frames(NamedTuple):
    """All that some bytes complete.

    Attributes:
        received: in the order in which it came.
        fault: a reason, in a line, to end the connection after that; empty if it goes on.
    """

    received: Sequence[Received] = ()
    fault: str = ""


class Peer(NamedTuple):
    """The other side of a connection, or of a datagram.

    Attributes:
        address: IP address, or `uid N` of a unix socket.
        client: the address as a client, to which its share belongs (`client_of`).
        name: in its certificate; empty if it showed none.
        principal: to which its keys belong.
        is_encrypted: the connection has TLS.
        envelope: packed, of records that have none of their own: source, name, address.
    """

    address: str
    client: str
    name: str
    principal: str
    is_encrypted: bool
    envelope: bytes


class StreamCodec(Protocol):
    """One protocol on one connection; see the invariants above. A subclass inherits the defaults.

    Attributes:
        held: bytes of frames that were begun, kept until the next call.
        replies: it may reply, so its direction stays open to the end.
        grow: the connection's; takes bytes from the account for what `feed` makes beyond the size
            of its bytes, before it is there. Raises a `Problem` where there is no room, which is a
            fault. They are given back when the records of that `feed` are counted.
    """

    held: int = 0
    replies: bool = False
    grow: Callable[[int], None] = staticmethod(lambda _: None)

    def greet(self) -> bytes:
        """Returns bytes that are sent before anything is read."""
        return b""

    def is_quick(self, data: bytes) -> bool:  # noqa: ARG002 - see the docstring
        """Tells if `feed` takes a few milliseconds at most; asked while it and `held` are few."""
        return True

    def cost(self, data: bytes) -> int:
        """The most bytes that `feed` makes of bytes, about; counted before it is called."""
        return 2 * len(data)

    def feed(self, data: bytes) -> Frames:
        """Returns what bytes complete.

        Args:
            data: at least one byte, the next ones of the connection.
        """
        ...

    def end(self, why: str | None) -> Frames:
        """Returns what is still held, as complete or invalid records; no reply can be sent.

        Args:
            why: the connection was ended before the peer's end, and the reason; else `None`.
        """
        ...
