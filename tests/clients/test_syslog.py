"""The source `syslog` with real clients, configured as `docs/clients/syslog.md` says.

Over TCP nothing tells a client that a message was accepted. What is tested with a restart is what
these clients do when the daemon leaves in order: see the page.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from ingestd.prove.servers import free_port
from tests.access.tools import Files
from tests.clients.harness import (
    COUNT,
    PROGRAMS,
    Client,
    Receiver,
    check,
    found_client,
    report,
)
from tests.daemon.harness import ROOT

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.slow

PAGE = (ROOT / "docs" / "clients" / "syslog.md").read_text()

RSYSLOG = """
global(workDirectory="{folder}")
module(load="imptcp")
input(type="imptcp" path="{folder}/in" unlink="on")
template(name="seen" type="string" string="%msg%\\n")
{page}
action(type="omfile" file="{folder}/seen" template="seen" flushOnTXEnd="on")
"""
SYSLOG_NG = """@version: {version}
options {{ stats-freq(0); keep-hostname(yes); }};
source s_in {{
  unix-stream("{folder}/in" flags(expect-hostname) log-fetch-limit(1000) log-iw-size(10000));
}};
destination d_seen {{ file("{folder}/seen" template("$MSG\\n")); }};
{page}
log {{ source(s_in); destination(d_seen); destination({name}); flags(flow-control); }};
"""


def example(client: str, number: int = 0) -> str:
    """A configuration of the page."""
    section = PAGE.partition(f"\n### {client}\n")[2].partition("\n### ")[0]
    return re.findall(r"```\w*\n(.*?)```", section, re.DOTALL)[number]


def numbers(records: list[Any]) -> list[int]:
    return [json.loads(record["message"])["n"] for record in records]


def receiver(
    folder: Path, port: int, *transports: str, flaky: bool = True, **more: Any
) -> Receiver:
    listen = ",".join(f"{one}://127.0.0.1:{port}" for one in transports)
    flags = [f"--{key}={value}" for key, value in more.items()]
    args = ("--source", "syslog", "--syslog.listen", listen, *flags)
    return Receiver(folder, *args, listens=False, flaky=flaky)


# -- relays ----------------------------------------------------------------------------------------


def relay(name: str, version: str) -> Client:
    command = (sys.executable, str(PROGRAMS / "syslog_relay.py"), name)
    return found_client(name, (version,), command)


def relayed(folder: Path, client: Client, config: str, receiver: Receiver) -> list[Any]:
    (folder / "relay").mkdir()
    file = folder / "relay" / "conf"
    file.write_text(config)
    with receiver:
        return receiver.deliver(client, str(file))


def test_rsyslog_with_octet_counting(tmp_path: Path) -> None:
    client, port = relay("rsyslogd", "-v"), free_port()
    page = example("rsyslog").replace("5514", str(port))
    config = RSYSLOG.format(folder=tmp_path / "relay", page=page)
    records = relayed(tmp_path, client, config, receiver(tmp_path, port, "tcp"))
    check(numbers(records), once=True)
    assert {(one["format"], one["hostname"], one["appname"]) for one in records} == {
        ("rfc5424", "there", "app")
    }
    report("syslog", client, "1,000 messages each, TCP and TLS, octet counting; none lost")


def test_rsyslog_with_tls(tmp_path: Path) -> None:
    client, port = relay("rsyslogd", "-v"), free_port()
    files = Files(tmp_path / "tls")
    page = example("rsyslog", 1).replace("6514", str(port))
    page = page.replace("/etc/ssl/ingestd-ca.pem", files.ca)
    config = RSYSLOG.format(folder=tmp_path / "relay", page=page)
    secure = receiver(tmp_path, port, "tls", **{"syslog.tls.certificate": files.server()})
    check(numbers(relayed(tmp_path, client, config, secure)), once=True)


@pytest.mark.parametrize("name", ["d_ingestd", "d_ingestd_bsd"])
def test_syslog_ng(tmp_path: Path, name: str) -> None:
    client, port = relay("syslog-ng", "--version"), free_port()
    page = example("syslog-ng").replace("5514", str(port))
    said = subprocess.run([client.command[-1], "--version"], capture_output=True, text=True).stdout
    client = client._replace(version=re.findall(r"\(([\d.]+)\)", said)[0])
    version = re.findall(r"Config version: (\S+)", said)[0]
    config = SYSLOG_NG.format(folder=tmp_path / "relay", page=page, version=version, name=name)
    records = relayed(tmp_path, client, config, receiver(tmp_path, port, "tcp"))
    check(numbers(records), once=True)
    form = "rfc5424" if name == "d_ingestd" else "rfc3164"
    assert {(one["format"], one["hostname"], one["appname"]) for one in records} == {
        (form, "there", "app")
    }
    report("syslog", client, "1,000 messages each, syslog() and network(); none lost")


# -- clients that do not look before they write: no restart amid them ------------------------------


@pytest.mark.parametrize("line", [0, 1])
def test_logger(tmp_path: Path, line: int) -> None:
    client = found_client("logger", ("--version",), ("logger",))
    port = free_port()
    words = example("logger").splitlines()[line].replace("5514", str(port)).split()[1:-1]
    (tmp_path / "lines").write_text("".join(f'{{"n": {n}}}\n' for n in range(COUNT)))
    with receiver(tmp_path, port, "tcp", "udp") as daemon:
        # In parts: a client of datagrams that does not pause can overrun any buffer, and does so
        # if nothing is read for a moment.
        for first in range(0, COUNT, 250):
            part = tmp_path / "part"
            lines = (tmp_path / "lines").read_text().splitlines(keepends=True)
            part.write_text("".join(lines[first : first + 250]))
            command = [*client.command, *words, "-t", "app", "-f", str(part)]
            subprocess.run(command, check=True, timeout=120)
            daemon.until_accepted(first + 250)
        records = daemon.finish()
    check(numbers(records), once=True)
    form = "rfc5424" if "--rfc5424" in words else "rfc3164"
    assert {(one["format"], one["appname"]) for one in records} == {(form, "app")}
    report("syslog", client, "1,000 messages each, UDP, RFC 5424 and TCP, RFC 3164; no restart")


@pytest.mark.parametrize("transport", ["tcp", "udp"])
def test_the_handler_of_python(tmp_path: Path, transport: str) -> None:
    client = Client("SysLogHandler", f"{sys.version_info[0]}.{sys.version_info[1]}", (), False)
    port = free_port()
    code = example("Python").replace("5514", str(port))
    if transport == "udp":
        code = code.replace("SOCK_STREAM", "SOCK_DGRAM")
    code += (
        "import sys\n"
        f"for n in range({COUNT}):\n"
        "    logging.getLogger().error('{\"n\": %d}', n)\n"
        "    if n % 100 == 99:\n"
        "        print('part', flush=True)\n"
        "        sys.stdin.readline()\n"
        "handler.close()\n"
    )
    with receiver(tmp_path, port, transport) as daemon, subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    ) as sender:  # fmt: skip
        assert sender.stdin is not None
        assert sender.stdout is not None
        for first in range(0, COUNT, 100):
            assert sender.stdout.readline() == b"part\n"
            daemon.until_accepted(first + 100)
            sender.stdin.write(b"\n")
            sender.stdin.flush()
        assert sender.wait(60) == 0
        records = daemon.finish()
    check(numbers(records), once=True)
    assert {(one["appname"], one["severity"]) for one in records} == {("shop", "err")}
    report("syslog", client, "1,000 messages each, TCP and UDP; no restart")


def test_what_a_restart_costs_a_client_that_does_not_look(tmp_path: Path) -> None:
    """It never connects again: what came before is whole, what comes after is lost."""
    port = free_port()
    code = example("Python").replace("5514", str(port)) + (
        "import sys\n"
        "for n in range(1000):\n"
        "    logging.getLogger().error('{\"n\": %d}', n)\n"
        "    if n == 500:\n"
        "        print('half', flush=True)\n"
        "        sys.stdin.readline()\n"
    )
    with (
        receiver(tmp_path, port, "tcp", flaky=False) as daemon,
        subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        ) as sender,
    ):  # fmt: skip
        assert sender.stdout is not None
        assert sender.stdout.readline() == b"half\n"
        daemon.restart()
        sender.communicate(b"\n", timeout=120)
        found = numbers(daemon.finish())
    assert found == list(range(501))


def test_the_tools_are_here() -> None:
    """A missing client skips its tests; this one says what is missing in the summary."""
    missing = [name for name in ("logger",) if shutil.which(name) is None]
    if missing:
        pytest.skip(f"not installed: {missing}")
