"""Clients of Fluentd's protocol, and Fluent Bit's http output, as `docs/clients/fluent*.md` say."""

from __future__ import annotations

import re
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from ingestd.prove.servers import free_port
from tests.access.tools import Files
from tests.clients.harness import (
    PROGRAMS,
    TABLE,
    Client,
    Receiver,
    check,
    found_client,
    npm_client,
    python_client,
    report,
)

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.slow


def receiver(cwd: Path) -> tuple[Receiver, str]:
    address = f"127.0.0.1:{free_port()}"
    args = ("--source", "forward", "--forward.listen", f"tcp://{address}")
    return Receiver(cwd, *args, listens=False), address


def fluent_bit() -> Client:
    program = str(PROGRAMS / "fluent_bit_client.py")
    return found_client("fluent-bit", ["--version"], [sys.executable, program, "fluent-bit"])


def test_fluent_logger_of_python(tmp_path: Path) -> None:
    client = python_client("fluent-logger", "fluent_logger_client.py")
    daemon, address = receiver(tmp_path)
    with daemon:
        records = daemon.deliver(client, address=address)
    check([one["record"]["n"] for one in records if one["record"]], once=False)
    assert {one["tag"] for one in records} == {"app.web"}
    report("forward", client, "1,000 events, Message mode, without acknowledgements")


MODES = ("Message", "Forward", "PackedForward", "CompressedPackedForward")


@pytest.mark.parametrize("mode", MODES)
def test_fluent_logger_of_node(tmp_path: Path, mode: str) -> None:
    client = npm_client("@fluent-org/logger", "fluent_logger_client.mjs")
    daemon, address = receiver(tmp_path)
    with daemon:
        records = daemon.deliver(client, mode, address=address)
    check([one["record"]["n"] for one in records], once=False)
    if mode == MODES[-1]:
        what = "1,000 events in each of the four modes, acknowledged; its retries have new ids"
        report("forward", client, what)


@pytest.mark.parametrize("compress", ["text", "gzip"])
def test_fluent_bit_forward(tmp_path: Path, compress: str) -> None:
    client = fluent_bit()
    daemon, address = receiver(tmp_path)
    with daemon:
        more = ("forward", "require_ack_response=true", f"compress={compress}")
        records = daemon.deliver(client, *more, address=address)
    check([one["record"]["n"] for one in records], once=True)
    if compress == "gzip":
        report("forward", client, "1,000 events, gzip and not, acknowledged; exactly once")


SECURE = """
[source]
kind = "forward"

[forward]
listen = ["tls://{address}"]
shared_key_file = "keys"
tls.certificate = "{certificate}"

[forward.users.shop]
password = "its password"
"""


def test_fluent_bit_forward_with_tls_key_and_password(tmp_path: Path) -> None:
    client = fluent_bit()
    files = Files(tmp_path / "tls")
    address = f"127.0.0.1:{free_port()}"
    (tmp_path / "keys").write_text("an old key\na shared key\n")
    text = SECURE.format(address=address, certificate=files.server())
    (tmp_path / "ingestd.toml").write_text(text)
    with Receiver(tmp_path, listens=False) as daemon:
        records = daemon.deliver(
            client, "forward", "require_ack_response=true", "shared_key=a shared key",
            "self_hostname=web-1", "username=shop", "password=its password",
            "tls=on", "tls.verify=on", f"tls.ca_file={files.ca}", "compress=gzip",
            address=address,
        )  # fmt: skip
    check([one["record"]["n"] for one in records], once=True)


FORMATS = [
    ("msgpack", "gzip"),
    ("msgpack", "zstd"),
    ("msgpack", "snappy"),
    ("json", "gzip"),
    ("json_lines", "zstd"),
]


@pytest.mark.parametrize(("form", "compress"), FORMATS)
def test_fluent_bit_http(tmp_path: Path, form: str, compress: str) -> None:
    client = fluent_bit()
    with Receiver(tmp_path) as daemon:
        more = ("http", "uri=/v1/records", f"format={form}", f"compress={compress}")
        records = daemon.deliver(client, *more)
    check([one["n"] for one in records], once=False)
    assert all(1.7e9 < one["date"] < 5e9 for one in records)
    if (form, compress) == FORMATS[-1]:
        what = "1,000 events as msgpack, json and json_lines, with gzip, zstd and snappy"
        report("records", client, what)


def test_fluent_bit_http_gelf(tmp_path: Path) -> None:
    client = fluent_bit()
    lines = ("header=Content-Type application/x-ndjson", "allow_duplicated_headers=off")
    with Receiver(tmp_path) as daemon:
        more = ("http", "uri=/v1/records", "format=gelf", "gelf_short_message_key=text", *lines)
        records = daemon.deliver(client, *more)
    check([one["_n"] for one in records], once=False)
    assert {one["short_message"] for one in records} == {"an event"}


@pytest.mark.parametrize("page", ["fluent.md", "fluent-bit.md", "loki.md", "datadog.md"])
def test_fluent_bit_reads_the_configuration_on_the_page(tmp_path: Path, page: str) -> None:
    program = fluent_bit().command[-1]
    (output,) = re.findall(r"```yaml\n(.*?)```", (TABLE.parent / page).read_text(), re.DOTALL)
    config = tmp_path / "fluent-bit.yaml"
    inputs = "pipeline:\n  inputs:\n    - name: stdin\n"
    config.write_text(output.replace("pipeline:\n", inputs))
    command = [program, "-c", str(config), "--dry-run"]
    said = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "configuration test is successful" in said.stdout + said.stderr
