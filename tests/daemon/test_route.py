"""`[route]` with whole daemons: HTTP, standard input, restarts, `check`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from tests.daemon.harness import daemon
from tests.daemon.test_validate import command

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.slow

SETTINGS = """\
batch.age_max = "10ms"
handler.target = "store:ours"
executor.kind = "thread"
[route]
field = "/type"
to = { click = "clicks", "order.*" = "orders" }
[pipelines.clicks]
handler = { target = "store:clicks", validate = "accept" }
[pipelines.orders]
handler.target = "store:orders"
"""
HANDLER = """\
import msgspec

class Click(msgspec.Struct):
    page: str

def keep(name, batch):
    with open(name, "a") as file:
        file.writelines(f"{one}\\n" for one in batch)

def ours(batch: list[dict]): keep("ours", [one["n"] for one in batch])
def clicks(batch: list[Click]): keep("clicks", [one.page for one in batch])
def orders(batch: list[dict]): keep("orders", [one["n"] for one in batch])
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "store.py").write_text(HANDLER)
    (tmp_path / "ingestd.toml").write_text(SETTINGS)
    return tmp_path


def lines(*records: dict[str, object]) -> bytes:
    return b"".join(json.dumps(one).encode() + b"\n" for one in records)


BODY = lines(
    {"type": "click", "page": "a"}, {"type": "order.new", "n": 1}, {"type": "click", "page": 2},
    {"type": "gone", "n": 2}, {"type": "order.old", "n": 3},
)  # fmt: skip


def test_one_request_feeds_several_pipelines_once(folder: Path) -> None:
    for _ in range(2):  # the second life knows the key
        with daemon(cwd=folder) as one:
            status, answer = one.post(BODY, Idempotency_Key="k")
            assert (status, answer["accepted"], answer["invalid"]) == (202, 3, 2)
            one.terminate()
            assert one.wait() == 0
    assert (folder / "clicks").read_text().split() == ["a"]
    assert (folder / "orders").read_text().split() == ["1", "3"]
    assert not (folder / "ours").exists()
    listed = command(folder, "dead", "list", "--json").stdout.splitlines()
    letters = {(one["pipeline"], one["reason"]) for one in map(json.loads, listed)}
    assert letters == {("clicks", "schema"), ("default", "unrouted")}


def test_standard_input_is_routed_and_its_end_is_that_of_all_pipelines(folder: Path) -> None:
    records = lines(*({"type": "order.x", "n": n} for n in range(3000)))
    done = command(folder, "run", "--source", "stdin", "--admin.listen", "", stdin=records)
    assert done.returncode == 0, done.stderr
    assert len((folder / "orders").read_text().split()) == 3000
    done = command(
        folder, "run", "--source", "stdin", "--admin.listen", "", stdin=lines({"type": 1})
    )
    assert done.returncode == 65, done.stderr


def test_check_refuses_a_route_to_nowhere(folder: Path) -> None:
    assert command(folder, "check").returncode == 0
    done = command(folder, "check", "--route.default", "nowhere")
    assert done.returncode == 78
    assert b"there is no pipeline 'nowhere'" in done.stderr
