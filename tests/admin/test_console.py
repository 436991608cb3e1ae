"""The files of the console: open, held to a strict policy, and in the wheel."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from ingestd.admin import console
from ingestd.admin.operations import OPERATIONS
from ingestd.journal.dead_letters import REASONS
from tests.admin.test_admin_server import Admin

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "ingestd" / "admin" / "console"
HTML = {"Accept": "text/html,application/xhtml+xml;q=0.9"}


@pytest.fixture
async def admin() -> AsyncIterator[Admin]:
    made = Admin()
    await made.server.start()
    yield made
    await made.server.close()


async def test_browsers_are_led_to_the_console_and_programs_are_not(admin: Admin) -> None:
    status, body, headers = await admin.ask("/", **HTML)
    assert (status, headers["Content-Type"]) == (200, "text/html; charset=utf-8")
    assert body == (FOLDER / "index.html").read_bytes()
    status, body, headers = await admin.ask("/")
    assert (status, headers["Content-Type"]) == (200, "text/plain; charset=utf-8")
    lines = body.decode().splitlines()
    for one in OPERATIONS.values():
        assert any(line.split()[:2] == [one.method, one.path] for line in lines)
    assert "console/" in lines[-1]
    assert (await admin.ask("/nothing"))[0] == 404
    assert (await admin.ask("/console/app.js/x"))[0] == 404
    assert (await admin.ask("/console/../server.py"))[0] == 404


@pytest.mark.parametrize("name", console.FILES)
async def test_a_file_has_the_policy_and_is_kept_by_browsers(admin: Admin, name: str) -> None:
    path = console.PLACE + name.replace("index.html", "")
    status, body, headers = await admin.ask(path)
    assert (status, body) == (200, (FOLDER / name).read_bytes())
    assert headers["Content-Type"].encode() == console.FILES[name]
    policy = headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self';")
    assert "unsafe" not in policy
    assert "frame-ancestors 'none'" in policy
    assert headers["X-Frame-Options"] == "DENY"
    assert headers["X-Content-Type-Options"] == "nosniff"
    known = {"If-None-Match": headers["ETag"]}
    assert (await admin.ask(path, **known))[0] == 304
    assert (await admin.ask(path, "HEAD"))[0] == 200


def test_the_page_sets_texts_only_as_texts() -> None:
    script = (FOLDER / "app.js").read_text()
    ways = "innerHTML|outerHTML|insertAdjacentHTML|document.write|eval\\(|new Function|srcdoc"
    assert not re.search(ways, script)
    page = (FOLDER / "index.html").read_text()
    assert not re.search(r"\bon[a-z]+=|\bstyle=|<script>|<style", page)
    assert not re.search(r"(?:src|href)=\"(?:https?:)?//", page)
    used = set(re.findall(r"\$\(\"([a-z-]+)\"\)", script))
    assert used <= set(re.findall(r"id=\"([a-z-]+)\"", page + script))


def test_the_page_knows_every_reason() -> None:
    [listed] = re.findall(r"const REASONS = (\[[^\]]*\]);", (FOLDER / "app.js").read_text())
    assert tuple(json.loads(listed)) == REASONS


@pytest.mark.slow
def test_the_wheel_has_the_files(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    [wheel] = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {f"ingestd/admin/console/{name}" for name in console.FILES} <= names
