"""Hooks: what they tell, how often, and that their messages arrive signed, once, whatever fails."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from ingestd.admin import hooks
from ingestd.admin.hooks import HookEvent, Hooks, HookWatch
from ingestd.admin.status import (
    BatchesStatus,
    DeadLettersStatus,
    HandlerStatus,
    JournalUsage,
    PipelineStatus,
    QueueStatus,
    Status,
)
from ingestd.base.errors import ConfigError
from ingestd.config.layers import Flag
from ingestd.config.loader import load
from ingestd.settings import HOOK_KINDS, HookSettings, Settings
from tests.daemon.harness import ROOT, daemon
from tests.sources.source_tools import until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

KEY = b"k" * 24
SECRET = f"whsec_{base64.b64encode(KEY).decode()}"
WELL = PipelineStatus(
    accepted=0, processed=0, dead=0, pending=7, invalid=0, balanced=True,
    journal=JournalUsage(bytes=0, bytes_max=10, poisoned=False),
    queue=QueueStatus(chunks=0, bytes=0, bytes_max=10),
    batches=BatchesStatus(sealed=0, running=0, waiting_retry=0),
    oldest_pending_seconds=0.0, bounds_near=[],
)  # fmt: skip
DOWN = HandlerStatus("down", "1970-01-01T00:01:30Z", "ConnectionError: x", 90.0)


def status(**facts: Any) -> PipelineStatus:
    return msgspec.structs.replace(WELL, **facts)


class Told:
    """A watch, and what it has told, by kind."""

    def __init__(self, *kinds: str, every: float = 10.0, paused_after: float = 60.0) -> None:
        self.watch = HookWatch(frozenset(kinds or HOOK_KINDS), every, paused_after)
        self.look(100.0)

    def look(self, now: float, **facts: Any) -> list[HookEvent]:
        return self.watch.look({"p": status(**facts)}, now)

    def kinds(self, now: float, **facts: Any) -> list[str]:
        return [one.kind for one in self.look(now, **facts)]


def test_dead_letters_that_were_there_before_are_not_told_of() -> None:
    watch = HookWatch(frozenset(HOOK_KINDS), 10.0, 60.0)
    assert watch.look({"p": status(dead=5, invalid=2)}, 100.0) == []
    assert watch.look({"p": status(dead=5, invalid=2)}, 200.0) == []


def test_new_dead_letters_are_counted_together_between_two_messages() -> None:
    told = Told()
    (event,) = told.look(101.0, dead=2, dead_letters=DeadLettersStatus(kept=2))
    assert event == HookEvent("dead_letters", "p", {"new": 2, "kept": 2})
    assert told.look(105.0, dead=3) == told.look(110.0, dead=3, invalid=1) == []
    (event,) = told.look(111.0, dead=3, invalid=1)
    assert event.data["new"] == 2
    assert told.look(150.0, dead=3, invalid=1) == []


def test_a_sink_is_told_of_when_it_goes_down_and_when_it_is_back() -> None:
    told = Told()
    (event,) = told.look(101.0, handler=DOWN)
    assert (event.kind, event.data["state"], event.data["pending"]) == ("sink_down", "down", 7)
    assert event.data["error"] == "ConnectionError: x"
    assert told.look(102.0, handler=DOWN) == []
    (event,) = told.look(105.0)
    assert (event.kind, event.data["down_seconds"]) == ("sink_back", 15.0)


def test_a_sink_that_flaps_is_told_of_once_in_a_while() -> None:
    told = Told()
    seen = [told.kinds(101.0 + n, handler=DOWN if n % 2 else HandlerStatus()) for n in range(40)]
    flat = [kind for kinds in seen for kind in kinds]
    assert flat == ["sink_down", "sink_back"] * 4
    assert told.kinds(200.0, handler=DOWN) == ["sink_down"]


def test_a_clock_that_is_put_back_silences_nothing() -> None:
    told = Told()
    assert told.kinds(1_000_000.0, dead=1) == ["dead_letters"]
    assert told.kinds(200.0, dead=2) == ["dead_letters"]
    assert told.kinds(205.0, dead=3) == []
    assert told.kinds(210.0, dead=3) == ["dead_letters"]


def test_a_bound_that_is_near_is_told_of_once_until_there_is_room_again() -> None:
    told = Told()
    near = {"bounds_near": ["journal.bytes_max", "queue.bytes_max"], "bounds_used": {}}
    (event,) = told.look(101.0, **near)
    assert (event.kind, event.data["bounds"]) == ("journal_near", {"journal.bytes_max": 1.0})
    assert told.look(150.0, **near) == told.look(160.0) == []
    assert told.kinds(161.0, **near) == ["journal_near"]
    assert told.kinds(180.0, bounds_near=["journal.free_min"]) == ["journal_near"]


def test_a_pause_is_told_of_once_when_it_is_too_long() -> None:
    told = Told()
    pause = {"paused": True, "paused_since": "1970-01-01T00:02:00Z"}
    assert told.look(179.0, **pause) == []
    assert told.kinds(180.0, **pause) == ["paused"]
    assert told.look(500.0, **pause) == told.look(501.0) == []
    assert told.kinds(700.0, paused=True, paused_since="1970-01-01T00:09:00Z") == ["paused"]


def test_the_page_has_every_kind() -> None:
    page = (ROOT / "docs/DEPLOYMENT.md").read_text()
    table = page.partition("\n## Hooks\n")[2].partition("\n## ")[0]
    assert re.findall(r"^\| `(\w+)` \| (?!when)", table, re.MULTILINE) == list(HOOK_KINDS)


def test_only_what_is_asked_for_is_told() -> None:
    assert Told("sink_back").kinds(101.0, handler=DOWN, dead=1) == []


# -- delivery --------------------------------------------------------------------------------------


class Receiver(BaseHTTPRequestHandler):
    answers: list[int]
    seen: list[tuple[str, dict[str, Any]]]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        name, at = self.headers["webhook-id"], self.headers["webhook-timestamp"]
        mac = hmac.new(KEY, f"{name}.{at}.".encode() + body, hashlib.sha256).digest()
        assert self.headers["webhook-signature"] == f"v1,{base64.b64encode(mac).decode()}"
        self.seen.append((name, json.loads(body)))
        self.send_response(self.answers.pop(0) if self.answers else 204)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def receiver(*answers: int) -> Iterator[str]:
    Receiver.answers, Receiver.seen = list(answers), []
    with ThreadingHTTPServer(("127.0.0.1", 0), Receiver) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}/hook?x=1"
        server.shutdown()
        thread.join()


class View:
    def __init__(self) -> None:
        self.now = WELL

    def status(self) -> Status:
        return Status("running", "1", 1.0, {"p": self.now})


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hooks, "LOOK_SECONDS", 0.005)
    monkeypatch.setattr(hooks, "BACKOFF_SECONDS", 0.005)
    monkeypatch.setattr(hooks, "TRIES_MAX", 3)


@pytest.mark.usefixtures("quick")
async def test_a_message_is_tried_again_under_one_id_and_later_ones_follow() -> None:
    view: Any = View()
    with receiver(500, 404) as url:
        made = Hooks({"ops": HookSettings(url=url, secret=SECRET, every=1)}, view)
        try:
            await asyncio.sleep(0.02)
            view.now = status(handler=DOWN)
            await until(lambda: len(Receiver.seen) == 3)
            assert len({name for name, _ in Receiver.seen}) == 1
            message = Receiver.seen[0][1]
            assert (message["type"], message["data"]["pipeline"]) == ("sink_down", "p")
            assert message["timestamp"].endswith("Z")
            assert message["data"]["host"]
            view.now = WELL
            await until(lambda: len(Receiver.seen) == 4)
            assert Receiver.seen[3][1]["type"] == "sink_back"
        finally:
            made.close()


@pytest.mark.usefixtures("quick")
async def test_a_receiver_that_is_gone_keeps_nothing_and_is_given_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(hooks, "QUEUED_MAX", 2)
    view: Any = View()
    settings = HookSettings(url="http://127.0.0.1:1/", secret=SECRET, every=1)
    made = Hooks({"ops": settings}, view)
    hook = made._hooks[0]
    try:
        for n in range(10):
            hook.look({f"p{n}": WELL}, 1.0)
            hook.look({f"p{n}": status(handler=DOWN)}, 2.0)
        assert len(hook._queue) == 2  # the oldest went, and nothing waited
        await until(lambda: not hook._queue)
        assert not hook._task.done()
    finally:
        made.close()


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("url", "ftp://x", "it has to be an http or https URL"),
        ("secret", "whsec_abc", "should be whsec_ and base64"),
        ("secret", "whsec_YWJj", "has fewer than 16 bytes: it could be guessed"),
        ("on", "sink_down, fire", "'fire' is none of dead_letters, "),
    ],
)
def test_what_is_no_hook_is_an_error(tmp_path: Path, key: str, value: str, says: str) -> None:
    right = {"url": "https://x.example/", "secret": SECRET, key: value}
    flags = [Flag(f"hooks.ops.{name}", text, f"--{name}") for name, text in right.items()]
    with pytest.raises(ConfigError, match=says) as caught:
        load(Settings, flags, environ={}, cwd=tmp_path, secrets=tmp_path / "none")
    assert f"--{key}" in str(caught.value)
    assert KEY.decode() not in str(caught.value)


@pytest.mark.slow
def test_a_daemon_tells_of_dead_letters(tmp_path: Path) -> None:
    (tmp_path / "no.py").write_text(
        "from ingestd import Reject\ndef store(batch):\n    raise Reject('no')\n"
    )
    with receiver() as url:
        flags = ("--hooks.ops.url", url, "--hooks.ops.secret", SECRET)
        with daemon("no:store", *flags, cwd=tmp_path) as one:
            one.post(b'{"a":1}\n')
            assert one.event("hook_told")["hook"] == "ops"
            ((_, message),) = Receiver.seen
            assert message["type"] == "dead_letters"
            assert message["data"]["new"] == 1
