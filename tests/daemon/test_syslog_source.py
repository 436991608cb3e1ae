"""A daemon with the sources http and syslog; real processes."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import ssl
import time
from typing import TYPE_CHECKING

from tests.access.tools import Files
from tests.daemon.harness import Daemon, written

if TYPE_CHECKING:
    from pathlib import Path


def send(port: int, text: bytes, context: ssl.SSLContext | None = None) -> None:
    with socket.create_connection(("127.0.0.1", port), timeout=60) as raw:
        if context is None:
            raw.sendall(text)
            return
        with context.wrap_socket(raw, server_hostname="127.0.0.1") as secure:
            secure.sendall(text)


def test_messages_beside_http_through_a_reload_of_certificates(tmp_path: Path) -> None:
    old, new = Files(tmp_path / "old"), Files(tmp_path / "new")
    shutil.copy(old.server(), tmp_path / "server.pem")
    (tmp_path / "ingestd.toml").write_text(
        "batch.age_max = '20ms'\n[sources.web]\nkind = 'http'\nlisten = '127.0.0.1:0'\n"
        "[sources.logs]\nkind = 'syslog'\npipeline = 'logs'\n"
        "listen = ['tcp://127.0.0.1:0', 'tls://127.0.0.1:0', 'udp://127.0.0.1:0']\n"
        "[sources.logs.tls]\ncertificate = 'server.pem'\n"
        "[pipelines.logs]\nformat = 'json'\n"
    )
    with Daemon(cwd=tmp_path) as one:
        listening = one.event("daemon_started")["sources"]["logs"]["listening"]
        plain, secure, datagrams = (int(at.rpartition(":")[2]) for at in listening)
        send(plain, b"<13>plain\n")
        send(secure, b"9 <13>first", ssl.create_default_context(cafile=old.ca))
        shutil.copy(new.server(), tmp_path / "server.pem")
        one.terminate(signal.SIGHUP)
        one.event("reloaded")
        send(secure, b"10 <13>second", ssl.create_default_context(cafile=new.ca))
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            sender.sendto(b"<13>datagram", ("127.0.0.1", datagrams))
        deadline = time.monotonic() + 60
        while one.status()["pipelines"]["logs"]["accepted"] < 4:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        _, _, page = one.request("GET", "/metrics", admin=True)
        labels = '{kind="syslog",source="logs"}'
        for line in (
            f"ingestd_source_datagrams_total{labels} 1.0",
            f"ingestd_source_datagrams_dropped_total{labels} 0.0",
            f"ingestd_source_connections_refused_total{labels} 0.0",
            f"ingestd_source_running{labels} 1.0",
        ):
            assert line in page.decode()
        one.terminate()
        assert one.wait() == 0
        assert not [e for e in one.events if e["level"] in {"error", "critical"}]
    messages = {json.loads(line)["message"] for line in written(tmp_path)}
    assert messages == {"plain", "first", "second", "datagram"}
