"""`ingestd healthcheck` asks the daemon on this machine if it is ready or alive, without curl."""

from __future__ import annotations

import argparse
import http.client
import ipaddress
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

from ingestd.base.errors import ConfigError, DaemonError, Exit
from ingestd.base.files import read_file
from ingestd.cli.arguments import add_admin
from ingestd.cli.configured import here
from ingestd.cli.output import add_json, fail, say_json
from ingestd.config.loader import peek
from ingestd.config.network import split_address
from ingestd.config.units import parse_seconds
from ingestd.settings import AdminSettings, Settings

if TYPE_CHECKING:
    from collections.abc import Sequence

DESCRIPTION = """\
Asks the daemon at the configured admin.listen if it is ready (/readyz), or with --live if it is
alive (/livez). Prints nothing if it is, and one line if it is not; --json prints both.

exit codes: 0 it is; 1 it is not, or does not answer in time; 2 usage"""

_ANSWER_BYTES = 64 * 1024
CLIENT_SECONDS = 5.0
"""How long a command waits for an answer."""
STREAM_SECONDS = 30.0
"""Longest silence of a stream: a daemon with nothing to tell sends a blank line every 5 s."""


def add_arguments(parser: argparse.ArgumentParser, _argv: Sequence[str]) -> None:
    """Adds the flags."""
    parser.set_defaults(leaf=parser)
    parser.add_argument(
        "--live", action="store_true", help="check that it is alive, not that it is ready"
    )
    parser.add_argument(
        "--timeout", metavar="TIME", type=_time, default=3.0, help="longest wait for an answer [3s]"
    )
    add_json(parser, "print one JSON object, whatever the answer is")
    add_admin(parser)


def _time(text: str) -> float:
    try:
        seconds = parse_seconds(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    if seconds <= 0:
        raise argparse.ArgumentTypeError("should be more than 0s")
    return seconds


def execute(arguments: argparse.Namespace) -> int:
    """Asks the daemon; the exit code is the answer."""
    problem = _ask(arguments)
    problem = " ".join(problem.split())
    if arguments.json:
        asked = "alive" if arguments.live else "ready"
        say_json({"asked": asked, "ok": not problem, "problem": problem})
    elif problem:
        fail(problem)
    return int(Exit.UNEXPECTED if problem else Exit.OK)


def _ask(arguments: argparse.Namespace) -> str:
    """Asks the daemon; returns the problem, or an empty text."""
    try:
        listen, host, port = admin_address(arguments)
    except ValueError as error:
        return f"admin.listen: {error}"
    page = "/livez" if arguments.live else "/readyz"
    connection = http.client.HTTPConnection(host, port, timeout=arguments.timeout)
    try:
        connection.request("GET", page)
        answer = connection.getresponse()
        said = answer.read(_ANSWER_BYTES)
    except (OSError, http.client.HTTPException) as error:
        return f"no answer from {listen}: {_why(error)}"
    finally:
        connection.close()
    return "" if answer.status == 200 else f"{page} is {answer.status}: {_detail(said)}"


def admin_address(arguments: argparse.Namespace) -> tuple[str, str, int]:
    """Finds the admin server: what `admin.listen` says, and the host and port to reach it at.

    Raises:
        ValueError: it is off, or its port is unknown.
    """
    # Only this setting counts: a file that is being edited does not make a daemon unhealthy.
    written = peek(
        Settings,
        ("admin", "listen"),
        arguments.flags,
        environ=os.environ,
        cwd=here(),
        config=arguments.config,
    )
    listen = AdminSettings().listen if written is None else str(written)
    return listen, *reachable(listen)


class AdminClient:
    """The admin server of a daemon, for commands that ask it.

    Args:
        arguments: of the command, with those of `add_admin_client`.

    Raises:
        ConfigError: the address or the token is not as it should be.
    """

    def __init__(self, arguments: argparse.Namespace) -> None:
        try:
            self.listen, self._host, self._port = admin_address(arguments)
        except ValueError as error:
            raise ConfigError(problem=f"admin.listen: {error}") from None
        self._headers: dict[str, str] = {}
        if arguments.token_file:
            try:
                token = read_file(Path(arguments.token_file), may_wait=True).decode("ascii").strip()
            except (OSError, UnicodeDecodeError) as error:
                raise ConfigError(problem=f"{arguments.token_file}: {_why(error)}") from error
            self._headers["Authorization"] = f"Bearer {token}"

    def get(self, page: str, *, streams: bool = False) -> http.client.HTTPResponse:
        """Asks for a page; the answer is a good one, to be read.

        Args:
            page: its path, with a query.
            streams: the answer may pause for `STREAM_SECONDS`.

        Raises:
            DaemonError: there is no answer, or not a good one.
        """
        connection = http.client.HTTPConnection(self._host, self._port, timeout=CLIENT_SECONDS)
        try:
            connection.request("GET", page, headers=self._headers)
            if streams and connection.sock is not None:
                connection.sock.settimeout(STREAM_SECONDS)
            answer = connection.getresponse()
            said = b"" if answer.status == 200 else answer.read(_ANSWER_BYTES)
        except (OSError, ValueError, http.client.HTTPException) as error:  # `ValueError`: the token
            connection.close()
            problem = f"no answer from {self.listen}: {_why(error)}"
            raise DaemonError(problem=problem) from error
        if answer.status != 200:
            connection.close()
            path = page.partition("?")[0]
            raise DaemonError(problem=f"{path} is {answer.status}: {_detail(said)}")
        return answer


def add_admin_client(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of a command that asks the admin server."""
    parser.add_argument(
        "--token-file", metavar="FILE", help="file with a token of admin.tokens, where one is asked"
    )
    add_admin(parser)


def _why(error: Exception) -> str:
    problem = getattr(error, "strerror", None) or str(error) or type(error).__name__
    if isinstance(error, ConnectionRefusedError):
        problem += "; start the daemon, or name its admin address with --admin.listen"
    return problem


def reachable(listen: str) -> tuple[str, int]:
    """Host and port at which a server on this machine is reached.

    Raises:
        ValueError: it is off, or its port is unknown.
    """
    if not listen:
        raise ValueError("is switched off")
    host, port = split_address(listen)
    if port == 0:
        raise ValueError("the kernel chose its port; write one down")
    try:
        everywhere = ipaddress.ip_address(host or "0.0.0.0")  # noqa: S104  it is compared
    except ValueError:
        return host, port
    if everywhere.is_unspecified:
        return ("127.0.0.1" if everywhere.version == 4 else "::1"), port
    return host, port


def _detail(said: bytes) -> str:
    try:
        problem = json.loads(said)
        return str(problem["detail"])[:200]
    except (ValueError, KeyError, TypeError):
        return said[:200].decode(errors="replace")
