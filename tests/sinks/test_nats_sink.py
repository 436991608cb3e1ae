"""The sink `nats`: options and subjects; with a real server messages, errors and a relay."""

from __future__ import annotations

import asyncio
import json
import re
import time
from typing import TYPE_CHECKING, Any

import pytest

from ingestd.base.record import Records, Span
from ingestd.handlers.options import OptionError
from ingestd.handlers.outcome import Job
from ingestd.handlers.runner import HandlerConfig
from ingestd.sinks.nats import NatsSinkOptions, is_subject
from tests.daemon.harness import daemon
from tests.nats import Cluster, running
from tests.sinks.contract.adapter import Worker, job

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator
    from pathlib import Path


@pytest.mark.parametrize(
    ("text", "fits"),
    [
        ("a", True), ("a.b-c_d", True), ("clicks.é", True), ("a.$b", True),
        ("", False), (".a", False), ("a.", False), ("a..b", False), ("a b", False),
        ("a.*", False), ("a.>", False), ("$JS.API.STREAM.DELETE.S", False),
        ("_INBOX.x", False), ("a\r\nPUB b", False), ("a" * 513, False),
    ],
)  # fmt: skip
def test_subjects(text: str, fits: bool) -> None:
    assert is_subject(text) == fits


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ({"servers": ""}, "servers"),
        ({"servers": "127.0.0.1:4222"}, "servers"),
        ({"servers": "nats://me:secret@host:4222"}, "servers: nats://… has credentials"),
        ({"subject": "a.{x}.>"}, "subject"),
        ({"subject": "$SYS.{x}"}, "subject"),
        ({"username": "me"}, "username"),
        ({"headers": {"Nats-Msg-Id": "1"}}, "headers"),
        ({"headers": {"a b": "1"}}, "headers"),
        ({"timeout": "100ms"}, "timeout"),
    ],
)
def test_options_that_cannot_be(more: dict[str, Any], why: str) -> None:
    with pytest.raises(OptionError, match=why) as told:
        NatsSinkOptions.of(**{"servers": "nats://h:1, tls://i:2", **more})
    assert "secret" not in str(told.value)


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    with running(tmp_path, sync="2m") as one:
        yield one


def do(cluster: Cluster, what: Callable[[Any], Coroutine[Any, Any, Any]]) -> Any:
    async def run() -> Any:
        import nats

        client = await nats.connect(cluster.urls[0])
        try:
            return await what(client.jetstream())
        finally:
            await client.close()

    return asyncio.run(run())


def make(cluster: Cluster, **stream: Any) -> None:
    do(cluster, lambda jetstream: jetstream.add_stream(name="S", **stream))


def read(cluster: Cluster) -> list[Any]:
    async def messages(stream: Any) -> list[Any]:
        state = (await stream.stream_info("S")).state
        return [await stream.get_msg("S", n) for n in range(1, state.last_seq + 1)]

    found: list[Any] = do(cluster, messages)
    return found


def worker(cluster: Cluster, **options: Any) -> Worker:
    all_options = {"servers": cluster.urls[0], "timeout": "30s"} | options
    return Worker(HandlerConfig("nats", all_options, "json", "async", "web", b"/x"))


@pytest.mark.slow
def test_messages_and_records_that_can_be_none(cluster: Cluster) -> None:
    make(cluster, subjects=["ingestd.web", "clicks.*"], max_msg_size=1000)
    with worker(cluster) as one:
        result = one.run(job(range(3), bad=b'{"n":7,"text":"%b"}' % (b"x" * 2000)))
        assert [one.index for one in result.rejections] == [1]
        assert "maximum" in result.rejections[0].error
    first = read(cluster)[0]
    assert (first.subject, json.loads(first.data)["n"]) == ("ingestd.web", 0)
    assert first.headers["ingestd-batch"] == "j-1"
    assert first.headers["ingestd-id"] == first.headers["Nats-Msg-Id"]
    options = {"subject": "{kind}", "headers": {"n": "{n}", "none": "{none}"}, "message_id": ""}
    with worker(cluster, **options) as one:
        for kind, why in (('"clicks.a"', ""), ('"other.b"', "no stream takes"), ("7", "no stream"),
                          ('"clicks.*"', "no subject"), ("null", "no value")):  # fmt: skip
            result = one.run(job([], bad=b'{"n":9,"kind":%b}' % kind.encode()))
            assert result.failure is None
            assert (
                [one.error for one in result.rejections] == []
                if not why
                else (why in result.rejections[0].error)
            )
    last = read(cluster)[-1]
    assert (last.subject, last.headers) == ("clicks.a", {"n": "9"})


@pytest.mark.slow
def test_ids_that_are_no_header_stay_different(cluster: Cluster) -> None:
    make(cluster, subjects=["ingestd.>"])
    ids = ["a b", "a  b\n", "a\nb", " a b", "é", "\x85", "\u2028", "\r\nX: 1", "a\0b"]
    items = [json.dumps({"k": one}).encode() for one in ids]
    with worker(cluster, message_id="{k}") as one:
        for batch in (1, 2):
            records = Records.lines(items)
            made = Job(f"j-{batch}", 1, records, [Span(batch, 0, len(items))], "j", 0.0, [])
            assert one.run(made).failure is None
    assert [json.loads(one.data)["k"] for one in read(cluster)] == ids


@pytest.mark.slow
def test_what_is_the_sinks_is_no_records_fault(cluster: Cluster) -> None:
    with worker(cluster) as one:
        for _ in range(2):
            result = one.run(job(range(10)))
            assert result.failure is not None
            assert result.failure.reason == "blocked"
            assert "no stream takes the subject ingestd.web" in result.failure.error
        make(cluster, subjects=["ingestd.>"], max_msgs=15, discard="new")
        assert one.run(job(range(10))).failure is None
        full = one.run(job(range(10, 20), 2)).failure
        assert full is not None
        assert full.reason == "unavailable"
        assert "maximum messages" in full.error
        do(cluster, lambda stream: stream.purge_stream("S"))
        assert one.run(job(range(10, 20), 2)).failure is None
        assert any("duplicate_window 120 s" in found.text for found in one.check())
    with worker(cluster, stream="OTHER") as one:
        failed = one.run(job(range(3))).failure
        assert failed is not None
        assert failed.reason == "blocked"
        assert any(found.level == "error" for found in one.check())


@pytest.mark.slow
def test_a_relay_keeps_the_names_of_batches_and_records(cluster: Cluster, tmp_path: Path) -> None:
    make(cluster, subjects=["ingestd.>"])
    (tmp_path / "app.py").write_text(
        "import json, ingestd\n"
        "def store(batch: ingestd.Batch[dict]) -> None:\n"
        "    with open('seen', 'a') as file:\n"
        "        for i, one in enumerate(batch):\n"
        "            told = batch.envelope(i)\n"
        "            file.write(json.dumps([one['n'], told.headers, told.attributes]) + '\\n')\n"
    )
    (tmp_path / "ingestd.toml").write_text(
        f"""
        batch.age_max = "50ms"
        [handler]
        target = "nats"
        options = {{ servers = "{cluster.urls[0]}" }}
        [sources.web]
        kind = "http"
        listen = "127.0.0.1:0"
        [sources.relayed]
        kind = "nats"
        servers = ["{cluster.urls[0]}"]
        stream = "S"
        id_header = "Nats-Msg-Id"
        pipeline = "relayed"
        [pipelines.relayed]
        journal.kind = "memory"
        handler.target = "app:store"
        executor.kind = "process"
        """
    )
    with daemon(cwd=tmp_path) as one:
        port = one.event("daemon_started")["sources"]["web"]["listening"][0].rpartition(":")[2]
        import http.client

        client = http.client.HTTPConnection("127.0.0.1", int(port), timeout=60)
        client.request("POST", "/v1/records", b"".join(b'{"n":%d}\n' % n for n in range(50)))
        assert client.getresponse().status == 202
        client.close()
        assert one.until_settled("relayed")["accepted"]
        deadline = time.monotonic() + 60
        while one.until_settled("relayed")["processed"] < 50:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        one.terminate()
        assert one.wait() == 0
    seen = [json.loads(line) for line in (tmp_path / "seen").read_text().splitlines()]
    assert sorted(n for n, _, _ in seen) == list(range(50))
    assert {told["stream"] for _, _, told in seen} == {"S"}
    for _, headers, _ in seen:
        assert headers["ingestd-id"] == headers["nats-msg-id"]
        assert re.fullmatch(r"[0-9a-f]+-[0-9]+", headers["ingestd-batch"])


@pytest.mark.slow
def test_certificates_are_demanded_and_shown(tmp_path: Path) -> None:
    import trustme

    authority = trustme.CA()
    files = {}
    for name in ("server", "client"):
        own = authority.issue_cert("127.0.0.1", common_name=name)
        files[name] = str(tmp_path / f"{name}.pem")
        own.private_key_and_cert_chain_pem.write_to_path(files[name])
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    tls = (
        f'tls {{ cert_file: "{files["server"]}", key_file: "{files["server"]}",'
        f' ca_file: "{tmp_path / "ca.pem"}", verify: true }}'
    )
    with running(tmp_path, sync="2m", config=tls) as cluster:
        address = cluster.urls[0].replace("nats://", "tls://")
        mine = {"tls_ca": str(tmp_path / "ca.pem"), "tls_certificate": files["client"]}
        for options, said in ((mine, "blocked"), ({}, "unavailable")):
            with worker(cluster, servers=address, **options) as one:
                failed = one.run(job(range(3))).failure
                assert failed is not None
                assert failed.reason == said, failed
                # With a certificate it is let in, and there is no stream.
                assert ("no stream takes" in failed.error) == (said == "blocked")
