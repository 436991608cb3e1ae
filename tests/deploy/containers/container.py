"""A daemon in a container, as its users start it and speak to it."""

from __future__ import annotations

import http.client
import json
from typing import TYPE_CHECKING, Any, Self

from ingestd.prove.servers import free_port
from tests.deploy.containers.engine import IMAGE, RUN, Engine, wait

if TYPE_CHECKING:
    from collections.abc import Mapping

TOKEN = "an-example-of-a-token-0123456789"

# As docs/DEPLOYMENT.md has it.
CONFINED = (
    "--read-only", "--tmpfs", "/tmp", "--cap-drop", "all",
    "--security-opt", "no-new-privileges",
)  # fmt: skip


class Spoken:
    """Ports of this machine behind which a daemon listens."""

    port: int
    admin_port: int

    def request(
        self, method: str, path: str, body: bytes | None = None, *, admin: bool = False,
        token: str = TOKEN,
    ) -> tuple[int, Any]:  # fmt: skip
        """One request on a connection of its own: status and decoded body."""
        port = self.admin_port if admin else self.port
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        headers = {"Authorization": f"Bearer {token}"} if token and not admin else {}
        try:
            connection.request(method, path, body, headers)
            answer = connection.getresponse()
            raw = answer.read()
        except http.client.HTTPException as error:
            raise ConnectionError(str(error)) from error
        finally:
            connection.close()
        return answer.status, json.loads(raw) if b"json" in _type(answer) else raw

    def post(self, body: bytes) -> int:
        """How many records were accepted; all of them have to be."""
        status, answer = self.request("POST", "/v1/records", body)
        assert status == 202, answer
        assert not answer["invalid"]
        return int(answer["accepted"])

    def ready(self) -> bool:
        return self.request("GET", "/readyz", admin=True)[0] == 200

    def numbers(self) -> dict[str, Any]:
        found: dict[str, Any] = self.request("GET", "/v1/status", admin=True)[1]["pipelines"]
        return found["default"]

    def until_ready(self) -> None:
        wait(self.ready, what="ready")

    def until_settled(self) -> dict[str, Any]:
        wait(lambda: self.numbers()["pending"] == 0, what="settled")
        return self.numbers()


def _type(answer: http.client.HTTPResponse) -> bytes:
    return str(answer.headers.get("Content-Type", "")).encode()


class Container(Spoken):
    """One container. Use as a context manager; it is removed by its name.

    Args:
        engine: whose.
        name: short, unique within the run.
        options: of `podman run`, besides those that every container gets.
        command: behind the image.
        image: which.
        environ: variables.
        token: whether the daemon knows one.
    """

    def __init__(
        self, engine: Engine, name: str, *options: str, command: tuple[str, ...] = (),
        image: str = IMAGE, environ: Mapping[str, str] | None = None, token: bool = True,
    ) -> None:  # fmt: skip
        self.engine = engine
        self.name = f"{RUN}-{name}"
        self.port, self.admin_port = free_port(), free_port()
        variables = dict(environ or {})
        if token:
            variables["INGESTD_HTTP__TOKENS__SHOP__TOKEN"] = TOKEN
        engine(
            "run", "--detach", "--name", self.name, *CONFINED,
            "--publish", f"127.0.0.1:{self.port}:8080",
            "--publish", f"127.0.0.1:{self.admin_port}:8081",
            *(part for name, value in variables.items() for part in ("--env", f"{name}={value}")),
            *options, image, *command,
        )  # fmt: skip

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.engine("rm", "--force", "--volumes", "--time", "0", self.name)

    def exec(self, *command: str) -> str:
        return self.engine("exec", self.name, *command)

    def stop(self) -> int:
        """As `docker stop` does it; the exit code."""
        self.engine("stop", "--time", "60", self.name)
        return self.code()

    def kill(self) -> None:
        """Without a word, and then it is started again on what it left behind."""
        self.engine("kill", "--signal", "KILL", self.name)
        self.code()
        self.engine("start", self.name)
        self.until_ready()

    def code(self) -> int:
        """The exit code, once it has ended."""
        return int(self.engine("wait", self.name))

    def log(self) -> str:
        return self.engine("logs", self.name)

    def events(self, name: str) -> list[dict[str, Any]]:
        """The log's lines of that name."""
        lines = [line for line in self.log().splitlines() if line.startswith("{")]
        return [event for event in map(json.loads, lines) if event.get("event") == name]
