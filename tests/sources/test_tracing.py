"""`traceparent`: what is one, and where it is seen again."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

import pytest
import structlog

from ingestd.base import envelope
from ingestd.base.append import AppendCounts
from ingestd.sources.http.headers import read_trace
from tests.daemon.harness import daemon
from tests.sources.source_tools import MemoryIntake, connected, serving

if TYPE_CHECKING:
    from pathlib import Path

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
VALUE = f"00-{TRACE}-{PARENT}-01"
SPAN = f"00-{TRACE}-{'c' * 16}-01"
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


class Tracer:
    """Gives each request that it is asked about a span, and notes what it is told."""

    counts = AppendCounts

    def __init__(self) -> None:
        self.told: list[tuple[object, ...]] = []
        self.wanted = False

    def wants(self) -> bool:
        self.told.append(("wants",))
        return self.wanted

    def begin(self, *facts: object) -> str:
        self.told.append(facts)
        return SPAN

    def end(self, *facts: object) -> None:
        self.told.append(facts)


async def test_a_request_is_part_of_the_span_that_it_gets() -> None:
    class Noting(MemoryIntake):
        async def accept(self, append):
            facts = envelope.facts_of(append.envelope or b"")
            seen.append((facts.get("traceparent"), structlog.contextvars.get_contextvars()))

    seen: list[tuple[object, dict[str, object]]] = []
    tracer = Tracer()
    async with serving(Noting(), tracer=tracer) as source, connected(source) as client:
        client.post(b"1", traceparent=VALUE, tracestate="a=b")
        assert (await client.reply()).status == 202
        client.post(b"nonsense", traceparent="nonsense")
        assert (await client.reply()).status == 400
        client.post(b"1", "/v1/records/none")
        assert (await client.reply()).status == 404
    begun = ("POST", "/v1/records", "default")
    assert tracer.told == [
        (*begun, {"traceparent": VALUE, "tracestate": "a=b"}),
        (202, ""),
        (*begun, {}),
        (400, "malformed"),
        (404, "unknown-pipeline"),
    ]
    ((traceparent, fields),) = seen
    assert traceparent == SPAN
    assert {"trace_id": TRACE, "parent_id": "c" * 16}.items() <= fields.items()


async def test_a_quick_request_that_is_to_have_a_span_goes_the_ordinary_way() -> None:
    tracer = Tracer()
    async with serving(MemoryIntake(), tracer=tracer) as source, connected(source) as client:

        async def told() -> list[tuple[object, ...]]:
            tracer.told.clear()
            client.post(b"1")
            assert (await client.reply()).status == 202
            return tracer.told[:]

        tracer.begin = lambda *_: ""  # type: ignore[method-assign]
        assert ("wants",) not in await told()  # its head is not known yet
        assert await told() == [("wants",)]
        tracer.wanted = True
        assert await told() == [("wants",), (202, "")]


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
