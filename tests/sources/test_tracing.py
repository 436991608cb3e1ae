"""`traceparent`: what is one, and where it is seen again."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

import pytest
import structlog

from ingestd.sources.http.headers import read_trace
from tests.daemon.harness import daemon
from tests.sources.source_tools import MemoryIntake, connected, serving

if TYPE_CHECKING:
    from pathlib import Path

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
VALUE = f"00-{TRACE}-{PARENT}-01"
FIELDS = {"trace_id": TRACE, "parent_id": PARENT}


@pytest.mark.parametrize(
    "value",
    [VALUE, f"00-{TRACE}-{PARENT}-00", f"cc-{TRACE}-{PARENT}-ff", f"cc-{TRACE}-{PARENT}-01-x"],
)
def test_valid(value: str) -> None:
    assert read_trace([value]) == FIELDS


@pytest.mark.parametrize(
    "values",
    [
        [""],
        ["nonsense"],
        [VALUE.upper()],
        [f"{VALUE}-more"],
        [f"{VALUE}0"],
        [f"{VALUE}\n"],
        [f" {VALUE}"],
        [f"ff-{TRACE}-{PARENT}-01"],
        [f"cc-{TRACE}-{PARENT}-01x"],
        [f"00-{'0' * 32}-{PARENT}-01"],
        [f"00-{TRACE}-{'0' * 16}-01"],
        [f"00-{TRACE[1:]}-{PARENT}-01"],
        [f"00-{TRACE}-{PARENT}"],
        [VALUE, VALUE],
        ["x" * 100_000],
    ],
)
def test_invalid(values: list[str]) -> None:
    assert read_trace(values) == {}


async def test_it_belongs_to_one_request_of_a_connection() -> None:
    class Noting(MemoryIntake):
        async def accept(self, append):
            seen.append(structlog.contextvars.get_contextvars())

    seen: list[dict[str, object]] = []
    async with serving(Noting()) as source, connected(source) as client:
        for value in (VALUE, None, VALUE, "nonsense"):
            client.post(b"1", **({"traceparent": value} if value else {}))
            assert (await client.reply()).status == 202
    assert [FIELDS.items() <= one.items() for one in seen] == [True, False, True, False]
    assert ["trace_id" in one for one in seen] == [True, False, True, False]
    assert len({one["request_id"] for one in seen}) == 4


def test_the_logs_lines_carry_it(tmp_path: Path) -> None:
    with daemon("--log.level", "debug", cwd=tmp_path) as one:
        head = "POST /v1/records HTTP/1.1\r\nHost: localhost\r\n"
        head += f"traceparent: {VALUE}\r\nX-Request-Id: r-1\r\n"
        with socket.create_connection(("127.0.0.1", one.port), 10) as client:
            client.sendall(f"{head}Content-Length: 100\r\n\r\n{{}}".encode())
        line = one.event("request_abandoned")
        assert FIELDS.items() <= line.items()
        assert line["request_id"] == "r-1"
        status, _ = one.post(b"bad", traceparent=VALUE, X_Request_Id="r-2")
        assert status == 400
        line = one.event("request_refused")
        assert FIELDS.items() <= line.items()
        assert (line["request_id"], line["problem"]) == ("r-2", "malformed")
