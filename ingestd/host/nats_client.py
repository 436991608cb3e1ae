"""A client of nats-py that reads every message a server delivers; imported where nats-py is there.

Servers take any bytes but blanks and line ends as a subject, and any bytes as headers. nats-py
reads only some of them: at others its read loop ends or the connection breaks, again at each
delivery, so one such message would block all that come behind it.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from nats.aio.client import Client
from nats.errors import ProtocolError
from nats.protocol.parser import AWAITING_CONTROL_LINE, AWAITING_MSG_PAYLOAD, Parser

_END = b"\r\n"
_FIRST_LETTERS = (b"M", b"H")  # of `MSG` and `HMSG`, and of nothing else that a server sends


class NatsClient(Client):  # type: ignore[misc]  # nats-py has no types here
    """See the module. Bytes of a subject that are no UTF-8 are surrogates."""

    def __init__(self) -> None:
        super().__init__()
        self._ps = _MessageParser(self)

    async def deliver(
        self, sid: int, subject: bytes, reply: bytes, payload: bytes, headers: bytes | None
    ) -> None:
        """Hands a message on to its subscription."""
        await self._process_msg(sid, subject, reply, payload, headers)

    async def _process_headers(self, headers: Any) -> Any:
        with suppress(IndexError, UnicodeDecodeError):
            return await super()._process_headers(headers)
        return None

    def _build_message(
        self, sid: int, subject: bytes, reply: bytes, data: bytes, headers: Any
    ) -> Any:
        return self.msg_class(
            subject=subject.decode("utf-8", "surrogateescape"),
            reply=reply.decode("utf-8", "surrogateescape"),
            data=data,
            headers=headers,
            _client=self,
            _sid=sid,
        )


class _MessageParser(Parser):  # type: ignore[misc]
    """Reads the lines of messages as servers write them: one space between two arguments."""

    def __init__(self, client: NatsClient) -> None:
        super().__init__(client)
        self._client = client
        self._about = 0, b"", b""

    async def parse(self, data: bytes = b"") -> None:
        """Parses what has come, and hands on the messages that are whole.

        Raises:
            ProtocolError: it is not what a server sends.
        """
        self.buf += data
        while self.buf:
            if self.state == AWAITING_MSG_PAYLOAD:
                if not await self._hand_on():
                    return
                continue
            end = self.buf.find(_END) + len(_END)
            if end < len(_END):
                return
            if self.buf[:1] in _FIRST_LETTERS:
                self._begin(bytes(self.buf[: end - len(_END)]))
                del self.buf[:end]
                continue
            rest = self.buf[end:]
            del self.buf[end:]
            await super().parse()
            self.buf += rest

    def _begin(self, line: bytes) -> None:
        """Reads `MSG SUBJECT SID [REPLY] BYTES` or `HMSG SUBJECT SID [REPLY] HEADERS BYTES`."""
        try:
            operation, subject, sid, *reply, size = line.split(b" ")
            self.header_needed = int(reply.pop()) if operation == b"HMSG" else 0
            self._about = int(sid), subject, b"".join(reply)
            self.needed = int(size)
        except (ValueError, IndexError):
            raise ProtocolError from None
        self.state = AWAITING_MSG_PAYLOAD

    async def _hand_on(self) -> bool:
        """Hands on the message that was begun; False if it is not whole."""
        buffer, head, size = self.buf, self.header_needed, self.needed
        if len(buffer) < size + len(_END):
            return False
        headers, payload = bytes(buffer[:head]), bytes(buffer[head:size])
        del buffer[: size + len(_END)]
        self.header_needed = 0
        self.state = AWAITING_CONTROL_LINE
        await self._client.deliver(*self._about, payload, headers or None)
        return True
