"""The source `nats`: a message is acknowledged when its record is settled; with a real server."""

from __future__ import annotations

import asyncio
import json
import random
import sqlite3
import subprocess
import sys
import time
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

from ingestd.host.nats import NatsAccess, close_nats, connect_nats
from ingestd.sources.nats import NatsSettings, NatsSourceKind
from tests.daemon.harness import ROOT, Daemon, daemon
from tests.nats import Cluster, Refuser, running

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator
    from pathlib import Path

pytestmark = pytest.mark.slow

HANDLER = """
import time
from pathlib import Path
import ingestd

def store(batch: ingestd.Batch[dict]) -> None:
    for i, one in enumerate(batch):
        while one.get("waits") and not Path("go").exists():
            time.sleep(0.02)
        if one.get("bad"):
            batch.reject(i, "it is bad")
    with open("seen", "a") as file:
        file.writelines(f"{one['n']} {batch.envelope(i)}\\n" for i, one in enumerate(batch))
"""
MEMORY = '[journal]\nkind = "memory"'


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    with running(tmp_path, sync="2m", payload_max=8 << 20) as one:
        yield one


def config(
    folder: Path, cluster: Cluster, *nats: str, handler: str = "app:store", batch: int = 1000,
    more: str = "",
) -> None:  # fmt: skip
    (folder / "app.py").write_text(HANDLER)
    (folder / "ingestd.toml").write_text(
        "\n".join([
            'source.kind = "nats"', "executor.workers = 2",
            f'batch = {{ age_max = "50ms", records_max = {batch} }}',
            f'[handler]\ntarget = "{handler}"',
            f'[nats]\nservers = ["{cluster.urls[0]}"]\nstream = "S"', *nats, more,
        ])
    )  # fmt: skip


def do(cluster: Cluster, what: Callable[[Any, Any], Coroutine[Any, Any, Any]]) -> Any:
    async def run() -> Any:
        import nats

        client = await nats.connect(cluster.urls[0])
        try:
            return await what(client, client.jetstream())
        finally:
            await client.close()

    return asyncio.run(run())


def publish(cluster: Cluster, *records: object, **headers: str) -> None:
    async def send(_: Any, stream: Any) -> None:
        from nats.js.errors import NotFoundError

        try:
            await stream.stream_info("S")
        except NotFoundError:
            await stream.add_stream(name="S", subjects=["s.>"])
        sent = []
        for number, one in enumerate(records):
            data = one if isinstance(one, bytes) else json.dumps(one).encode()
            sent.append(await stream.publish_async(f"s.{number % 3}", data, headers=headers))
        for one in sent:
            await one

    do(cluster, send)


def consumer(cluster: Cluster) -> Any:
    async def ask(_: Any, stream: Any) -> Any:
        return await stream.consumer_info("S", "ingestd")

    return do(cluster, ask)


def until(condition: Callable[[], Any], what: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what()
        time.sleep(0.05)


def seen(folder: Path) -> list[int]:
    file = folder / "seen"
    return [int(line.split()[0]) for line in file.read_text().splitlines()] if file.exists() else []


def test_what_is_not_settled_is_delivered_again_and_nothing_else(
    cluster: Cluster, tmp_path: Path
) -> None:
    """And what takes longer than `ack_wait` is delivered once, as long as the daemon lives."""
    # Half of it is over, at most, when a message is told to be in progress: a daemon that stands
    # still for so long keeps what it holds.
    config(tmp_path, cluster, 'ack_wait = "6s"', batch=1, more=MEMORY)
    publish(cluster, {"n": 0}, b"{", {"n": 2, "bad": 1}, {"n": 3, "waits": 1}, {"n": 4}, Trace="t1")
    with daemon(cwd=tmp_path) as one:
        until(lambda: 4 in seen(tmp_path), lambda: one.events)
        until(lambda: consumer(cluster).num_ack_pending == 1, lambda: one.events)
        held = time.monotonic()
        until(lambda: time.monotonic() - held > 7, lambda: "")
        info = consumer(cluster)
        assert (info.num_redelivered, info.num_ack_pending, info.ack_floor.stream_seq) == (0, 1, 3)
        numbers = one.status()["pipelines"]["default"]
        assert (numbers["invalid"], numbers["dead"], numbers["pending"]) == (1, 1, 1)
        one.process.kill()
    first = next(one for one in (tmp_path / "seen").read_text().splitlines() if one[0] == "0")
    for fact in ("source='nats'", "'trace': 't1'", "'stream': 'S'", "'subject': 's.0'",
                 "'sequence': 1"):  # fmt: skip
        assert fact in first
    (tmp_path / "go").touch()
    with daemon(cwd=tmp_path) as one:
        until(lambda: consumer(cluster).num_ack_pending == 0, lambda: one.events)
        page = one.request("GET", "/metrics", admin=True)[2].decode()
        assert 'ingestd_source_messages_total{kind="nats",source="nats"} 1.0' in page
        one.terminate()
        assert one.wait() == 0
    assert sorted(seen(tmp_path)) == [0, 2, 3, 4]


def accepted_more(one: Daemon, before: int) -> bool:
    return bool(one.status()["pipelines"]["default"]["accepted"] > before)


def all_acknowledged(cluster: Cluster, sent: int) -> bool:
    return bool(consumer(cluster).ack_floor.stream_seq == sent)


def test_kills_of_daemon_and_server_lose_nothing_and_double_nothing(
    cluster: Cluster, tmp_path: Path
) -> None:
    config(tmp_path, cluster, 'ack_wait = "1s"', handler="sqlite")
    sent, lives = 0, 3
    for life in range(lives):
        with daemon(cwd=tmp_path) as one:
            publish(cluster, *({"n": n} for n in range(sent, sent + 500)))
            sent += 500
            before = one.status()["pipelines"]["default"]["accepted"]
            if life < lives - 1:
                # As soon as some are accepted, when their acknowledgements hardly can be sent.
                until(partial(accepted_more, one, before), lambda: one.events)
                if life == 1:
                    cluster.servers[0].stop()
                    cluster.servers[0].start()
                    publish(cluster, *({"n": n} for n in range(sent, sent + 100)))
                    sent += 100
                one.process.kill()
                continue
            until(partial(all_acknowledged, cluster, sent), lambda: one.events)
            one.terminate()
            assert one.wait() == 0
    with sqlite3.connect(tmp_path / "ingestd-data" / "out.db") as db:
        rows = [n for (n,) in db.execute("SELECT n FROM records")]
    db.close()
    assert sorted(rows) == list(range(sent))


def test_bounds_hold_messages_back_and_a_large_one_comes_alone(
    cluster: Cluster, tmp_path: Path
) -> None:
    bounds = 'inflight_messages_max = 20\ninflight_bytes_max = "1MiB"'
    config(tmp_path, cluster, bounds, batch=10, more='record_bytes_max = "8MiB"\n' + MEMORY)
    text = (tmp_path / "ingestd.toml").read_text()
    text = text.replace('record_bytes_max = "8MiB"\n', "")
    (tmp_path / "ingestd.toml").write_text('record_bytes_max = "8MiB"\n' + text)
    large = {"n": 200, "text": "x" * (3 << 20)}
    publish(cluster, {"n": 0, "waits": 1}, *({"n": n} for n in range(1, 200)), large, {"n": 201})
    with daemon(cwd=tmp_path) as one:
        until(lambda: one.status()["pipelines"]["default"]["accepted"] >= 15, lambda: one.events)
        held = time.monotonic()
        until(lambda: time.monotonic() - held > 1, lambda: "")
        numbers = one.status()["pipelines"]["default"]
        assert numbers["pending"] <= 20
        (tmp_path / "go").touch()
        until(lambda: len(seen(tmp_path)) == 202, lambda: (len(seen(tmp_path)), one.events))
        until(lambda: consumer(cluster).num_ack_pending == 0, lambda: one.events)
        one.terminate()
        assert one.wait() == 0
    assert sorted(seen(tmp_path)) == list(range(202))


def test_a_stream_that_is_made_anew_is_read_from_its_beginning(
    cluster: Cluster, tmp_path: Path
) -> None:
    """Its sequences are those of before; and a header can name a message for ever."""
    config(tmp_path, cluster, 'id_header = "Relay-Id"')

    async def delete(_: Any, stream: Any) -> None:
        await stream.delete_stream("S")

    with daemon(cwd=tmp_path) as one:
        event = one.event("broker_error")
        assert event["error"] == "there is no stream S"
        publish(cluster, {"n": 1})
        publish(cluster, {"n": 2}, **{"Relay-Id": "a"})
        until(lambda: len(seen(tmp_path)) == 2, lambda: one.events)
        do(cluster, delete)
        publish(cluster, {"n": 3})
        publish(cluster, {"n": 2}, **{"Relay-Id": "a"})
        publish(cluster, {"n": 4})
        until(lambda: len(seen(tmp_path)) == 4, lambda: one.events)
        one.terminate()
        assert one.wait() == 0
    assert sorted(seen(tmp_path)) == [1, 2, 3, 4]


def test_a_stream_that_is_made_anew_gets_no_acknowledgement_of_what_is_held(
    cluster: Cluster, tmp_path: Path
) -> None:
    """The acknowledgement of a message is that of any message with its sequence."""
    config(tmp_path, cluster, batch=1, more=MEMORY)

    async def delete(_: Any, stream: Any) -> None:
        await stream.delete_stream("S")

    publish(cluster, {"n": 1}, {"n": 2, "waits": 1}, {"n": 3, "waits": 1})
    with daemon(cwd=tmp_path) as one:
        until(lambda: len(seen(tmp_path)) == 1, lambda: one.events)
        until(lambda: one.status()["pipelines"]["default"]["pending"] == 2, lambda: one.events)
        do(cluster, delete)
        publish(cluster, *({"n": n} for n in range(11, 15)))
        assert one.event("consumer_replaced")["unsettled"] == 2
        until(lambda: accepted_more(one, 6), lambda: (seen(tmp_path), one.events))
        (tmp_path / "go").touch()
        until(lambda: all_acknowledged(cluster, 4), lambda: (seen(tmp_path), one.events))
        one.terminate()
        assert one.wait() == 0
    assert sorted(seen(tmp_path)) == [1, 2, 3, 11, 12, 13, 14]


def test_a_message_larger_than_any_estimate_comes_alone(cluster: Cluster, tmp_path: Path) -> None:
    """Its subject counts, too, where a request says how many bytes may come."""
    config(tmp_path, cluster, 'inflight_bytes_max = "1MiB"', batch=1)
    payload = b'{"n":2,"x":"%b"}' % (b"x" * ((8 << 20) - 15))

    async def send(_: Any, stream: Any) -> None:
        await stream.publish("s." + "x" * 3000, payload)

    publish(cluster, {"n": 1})
    do(cluster, send)
    publish(cluster, {"n": 3})
    with daemon("--record_bytes_max", "9MiB", cwd=tmp_path) as one:
        until(lambda: len(seen(tmp_path)) == 3, lambda: (seen(tmp_path), one.events))
        until(lambda: all_acknowledged(cluster, 3), lambda: one.events)
        one.terminate()
        assert one.wait() == 0
    assert sorted(seen(tmp_path)) == [1, 2, 3]


@pytest.mark.parametrize(
    "limit", [{"max_batch": 3}, {"max_expires": 3_000_000_000}, {"max_bytes": 10_000}]
)
def test_the_limits_of_a_consumer_are_kept(
    cluster: Cluster, tmp_path: Path, limit: dict[str, int]
) -> None:
    config(tmp_path, cluster)
    publish(cluster, *({"n": n} for n in range(20)))
    about = {"durable_name": "ingestd", "ack_policy": "explicit", "deliver_policy": "all"}

    async def make(client: Any, _: Any) -> None:
        body = json.dumps({"stream_name": "S", "config": about | limit}).encode()
        await client.request("$JS.API.CONSUMER.DURABLE.CREATE.S.ingestd", body)

    do(cluster, make)
    with daemon(cwd=tmp_path) as one:
        until(lambda: all_acknowledged(cluster, 20), lambda: (seen(tmp_path), one.events))
        assert not [event for event in one.events if event["event"] == "broker_error"]
        one.terminate()
        assert one.wait() == 0
    assert sorted(seen(tmp_path)) == list(range(20))


def test_check_connect_asks_for_stream_and_consumer(cluster: Cluster, tmp_path: Path) -> None:
    config(tmp_path, cluster, handler="jsonl")

    def check() -> str:
        done = subprocess.run(
            [sys.executable, "-m", "ingestd", "check", "--connect"], cwd=tmp_path,
            capture_output=True, text=True, timeout=120,
            env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        return done.stdout + done.stderr

    publish(cluster, {"n": 1})
    text = check()
    assert "# nats: info: stream S: file, 1 replicas" in text
    assert "there is no consumer ingestd; the source makes it" in text
    settings = NatsSettings(servers=cluster.urls, stream="OTHER")
    assert [one.level for one in NatsSourceKind().findings(settings)] == ["info", "error"]
    cluster.servers[0].stop()
    (down,) = NatsSourceKind().findings(settings)
    assert down.text.startswith("servers: ")


async def test_a_connection_whose_end_was_given_up_once_is_left(tmp_path: Path) -> None:
    """The first one is cancelled where it waits for the stream, which stays so for later ones."""
    with running(tmp_path) as cluster:
        client = await connect_nats(NatsAccess(cluster.urls), "test")
        closed = client._transport._io_writer._protocol._get_close_waiter(None)
        closed.cancel()
        await close_nats(client)
        own = asyncio.ensure_future(close_nats(Endless()))
        await asyncio.sleep(0)
        own.cancel()
        with pytest.raises(asyncio.CancelledError):
            await own


class Endless:
    async def close(self) -> None:
        await asyncio.Event().wait()


async def test_refusals_amid_acknowledgements_leave_no_source_without_a_connection(
    cluster: Cluster, tmp_path: Path
) -> None:
    """Also where nothing more is asked for until something is acknowledged."""
    count = 6_000
    await asyncio.to_thread(publish, cluster, *({"n": n} for n in range(count)))
    refuser, random_ = Refuser(), random.Random(5)
    async with refuser.before(cluster) as refused:
        config(tmp_path, refused, "inflight_messages_max = 40", batch=10, more=MEMORY)
        with daemon(cwd=tmp_path) as one:
            until_ = time.monotonic() + 120
            while len(set(seen(tmp_path))) < count:
                assert time.monotonic() < until_, (one.status(), one.events[-5:])
                await asyncio.sleep(random_.uniform(0.05, 0.3))
                refuser.refuse(is_reset=random_.random() < 0.7)
            one.terminate()
            assert await asyncio.to_thread(one.wait) == 0
