"""The console in a real browser, with a real daemon under load behind it."""

from __future__ import annotations

import json
import threading
from typing import TYPE_CHECKING, Any

import pytest

from tests.admin.browser import Browser, needs_browser
from tests.daemon.harness import daemon

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.daemon.harness import Daemon

pytestmark = [pytest.mark.slow, needs_browser]

ADMIN = "admin-token-of-the-tests-9876543210"
XSS = '<img src=x onerror="window.pwned=1"><script>window.pwned=1</script>'
SETTINGS = f"""
[admin.tokens.ops]
token = "{ADMIN}"
role = "admin"
[http]
keep_headers = ["X-From"]
[batch]
age_max = "20ms"
[retry]
attempts_max = 1
backoff = "1ms"
[handler]
target = "tests.admin.poison:Store"
options = {{ mended = "MENDED" }}
[executor]
kind = "thread"
[pipelines.clicks]
format = "json"
"""


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    folder = tmp_path_factory.mktemp("daemon")
    (folder / "ingestd.toml").write_text(SETTINGS.replace("MENDED", str(folder / "mended")))
    with daemon(cwd=folder) as started:
        started.folder = folder  # type: ignore[attr-defined]
        headers = {"Content-Type": "application/json", "X-From": XSS}
        body = json.dumps([{"n": 1}, {"poison": XSS}, {"n": 2}, {"refused": XSS}, {"n": 3}])
        assert started.request("POST", "/v1/records", body, headers)[0] == 202
        started.until_settled()
        yield started


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("browser")) as started:
        yield started


@pytest.fixture
def page(chromium: Browser, one: Daemon) -> Browser:
    """The console, live."""
    chromium.open("about:blank")
    chromium.open(f"http://127.0.0.1:{one.admin_port}/")
    chromium.until(lambda: chromium.text("#link") == "live")
    return chromium


@pytest.fixture
def load(one: Daemon) -> Iterator[None]:
    stop = threading.Event()
    body = b'{"n": 1}\n' * 100

    def send() -> None:
        while not stop.wait(0.02):
            one.post(body, Content_Type="application/x-ndjson")

    sender = threading.Thread(target=send)
    sender.start()
    yield
    stop.set()
    sender.join()


def shown(page: Browser, word: str) -> int:
    """The number before a word in the way of a record."""
    lines = page.text("#stations").replace(",", "").splitlines()
    [line] = [line for line in lines if line.endswith(word)]
    return int(line.split()[0])


def picked(page: Browser, text: str) -> None:
    """Opens the dead letter with a text in its error."""
    script = (
        "const row = [...document.querySelectorAll('#dead-table tbody tr')]"
        ".find(r => r.textContent.includes(arguments[0])); row?.querySelector('button').click();"
        "return Boolean(row)"
    )
    page.until(lambda: page.run(script, text))
    page.until(lambda: page.run("return document.getElementById('letter').open"))


@pytest.mark.usefixtures("load")
def test_numbers_agree_with_the_status_under_load(page: Browser, one: Daemon) -> None:
    for _ in range(3):
        before = one.status()["pipelines"]["default"]
        # More than there were: what the page shows is newer, also in its other numbers.
        page.until(lambda b=before: shown(page, "accepted in all") > b["accepted"])
        accepted, processed = shown(page, "accepted in all"), shown(page, "processed in all")
        after = one.status()["pipelines"]["default"]
        assert accepted <= after["accepted"]
        assert before["processed"] <= processed <= after["processed"]
    page.until(lambda: int(page.text("[data-number=in]").split()[0].replace(",", "")) > 100)
    page.until(lambda: page.run("return document.querySelectorAll('#chart-grid path').length >= 3"))
    page.until(lambda: "done" in page.text("#batches-table"))
    assert "default-worker-0" in page.text("#workers-table")
    page.shoot("load-light")


def test_numbers_are_those_of_the_status_when_it_rests(page: Browser, one: Daemon) -> None:
    rest = one.until_settled()
    page.until(lambda: shown(page, "processed in all") == rest["processed"])
    assert shown(page, "accepted in all") == rest["accepted"]
    assert shown(page, "dead") == rest["dead"]
    assert page.text("[data-number=pending]").split()[0] == "0"
    other = "return document.querySelector('[data-pipeline=clicks]').click()"
    page.run(other)
    page.until(lambda: page.text("#pipeline-name") == "clicks")
    assert shown(page, "accepted in all") == 0
    assert "pipeline=clicks" in page.run("return location.hash")
    page.run(other.replace("clicks", "default"))
    assert page.errors() == []


def test_what_records_say_stays_text(page: Browser) -> None:
    picked(page, "ValueError: cannot take <img")
    page.run("document.getElementById('dead-summary').open = true")
    page.until(lambda: XSS in page.text("#dead-errors"))
    body = page.text("#letter-body")
    assert body.count(XSS) >= 2  # the error, the header
    assert "<script>" in page.text("#payload")
    page.shoot("letter-light")
    assert page.run("return window.pwned ?? null") is None
    assert (
        page.run("return document.querySelectorAll('main img, dialog img, main script').length")
        == 0
    )
    assert page.errors() == []


def test_a_poison_record_is_found_read_and_retried(page: Browser, one: Daemon) -> None:
    before = one.until_settled()
    page.run("document.getElementById('dead-reason').value = 'failed'")
    page.click("#dead-filter button")
    picked(page, "failed")
    assert "Traceback" in page.text("#letter-body")
    assert "poison" in page.text("#payload")
    one.folder.joinpath("mended").touch()  # type: ignore[attr-defined]
    page.click("#letter-retry")
    page.until(lambda: page.run("return document.getElementById('token').open"))
    page.shoot("token-light")
    assert one.status()["pipelines"]["default"]["dead"] == before["dead"]
    page.type(ADMIN, "enter")
    page.until(lambda: not page.run("return document.getElementById('token').open"))
    page.click("#letter-retry")

    def processed() -> bool:
        return bool(one.status()["pipelines"]["default"]["processed"] == before["processed"] + 1)

    page.until(processed)
    page.until(lambda: "no dead letters here" in page.text("#dead-table"))
    page.until(lambda: shown(page, "dead") == before["dead"] - 1)


def test_the_keyboard_is_enough(page: Browser) -> None:
    page.until(lambda: page.run("return document.querySelectorAll('#dead-table button').length"))
    focused = "const e = document.activeElement; return e.getAttribute('aria-label') || e.innerText"
    seen: list[str] = []
    for _ in range(40):
        page.type("tab")
        seen.append(page.run(focused) or "")
        if seen[-1].startswith("Open dead letter"):
            break
    assert seen[0] == "Skip to the numbers"
    assert {"Pause", "Filter", "Retry these", "Purge these"} <= set(seen)
    page.type("enter")
    page.until(lambda: page.run("return document.getElementById('letter').open"))
    inside = "return document.getElementById('letter').contains(document.activeElement)"
    assert page.run(inside)
    page.type("tab")
    assert page.run(inside)
    page.type("escape")
    page.until(lambda: not page.run("return document.getElementById('letter').open"))
    assert str(page.run(focused)).startswith("Open dead letter")
    unnamed = page.run(
        "return [...document.querySelectorAll('button, input, select')].filter(e =>"
        " !(e.innerText.trim() || e.getAttribute('aria-label') || e.labels?.length)).length"
    )
    assert unnamed == 0


def test_a_pipeline_is_paused_and_resumed(page: Browser, one: Daemon) -> None:
    page.run("sessionStorage.setItem('token', arguments[0]); location.reload()", ADMIN)
    page.until(lambda: page.text("#link") == "live")
    page.click("#pause")
    page.until(lambda: "Paused" in page.text("#alerts"))
    assert one.status()["pipelines"]["default"]["paused"] is True
    one.post(b'{"n": 1}')
    page.until(lambda: page.text("[data-number=pending]").split()[0] == "1")
    page.shoot("paused-light")
    page.click("#pause")
    page.until(lambda: page.text("#alerts") == "")
    one.until_settled()


@pytest.mark.usefixtures("load")
def test_it_polls_while_the_stream_is_cut(page: Browser, one: Daemon) -> None:
    page.cdp("Network.enable", {})
    page.cdp("Network.setBlockedURLs", {"urls": ["*v1/watch*"]})
    try:
        page.run("location.reload()")
        page.until(lambda: page.text("#link") == "polling")
        now = one.status()["pipelines"]["default"]["accepted"]
        page.until(lambda: shown(page, "accepted in all") > now)
    finally:
        page.cdp("Network.setBlockedURLs", {"urls": []})
    page.until(lambda: page.text("#link") == "live")


def test_it_fits_and_reads_well_in_each_width_and_scheme(page: Browser) -> None:
    page.run("document.getElementById('settings-key').value = 'handler'")  # long ones, too
    page.run("document.getElementById('settings-set').click()")
    page.until(lambda: "pipelines.clicks.handler.target" in page.text("#settings-table"))
    for width in (360, 1280):
        size: dict[str, Any] = {"width": width, "height": 800, "deviceScaleFactor": 1}
        page.cdp("Emulation.setDeviceMetricsOverride", {**size, "mobile": width < 600})
        for scheme in ("dark", "light"):
            features = [{"name": "prefers-color-scheme", "value": scheme}]
            page.cdp("Emulation.setEmulatedMedia", {"features": features})
            dark = "return matchMedia('(prefers-color-scheme: dark)').matches"
            page.until(lambda s=scheme, d=dark: page.run(d) == (s == "dark"))
            page.until(lambda w=width: page.run("return innerWidth") == w)
            page.shoot(f"{scheme}-{width}")
            assert not page.scrolls_sideways
            faint = page.run(CONTRAST)
            assert faint == [], faint


CONTRAST = """
const channel = (v) => (v /= 255) <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
const parse = (c) => c.match(/[\\d.]+/g).map(Number);
const light = ([r, g, b]) => 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
const back = (e) => { for (; e; e = e.parentElement) {
  const c = parse(getComputedStyle(e).backgroundColor); if (c.length < 4 || c[3] > 0) return c; }
  return [255, 255, 255]; };
const found = new Set();
for (const e of document.querySelectorAll('body *')) {
  if (![...e.childNodes].some(n => n.nodeType === 3 && n.data.trim())) continue;
  const box = e.getBoundingClientRect();
  if (!box.width || e.disabled || e.closest('svg') || e.closest('caption, thead')) continue;
  const [a, b] = [light(parse(getComputedStyle(e).color)), light(back(e))];
  const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  if (ratio < 4.5) found.add(`${e.tagName}.${e.className} ${ratio.toFixed(2)}`);
}
return [...found];
"""


def test_a_token_is_asked_for_where_reading_needs_one(chromium: Browser, tmp_path: Path) -> None:
    settings = SETTINGS.replace("MENDED", "m").replace(
        "[admin.tokens", "[admin]\ntoken_required = true\n[admin.tokens"
    )
    (tmp_path / "ingestd.toml").write_text(settings)
    with daemon(cwd=tmp_path) as one:
        chromium.open(f"http://127.0.0.1:{one.admin_port}/console/")
        chromium.until(lambda: chromium.run("return document.getElementById('token').open"))
        assert chromium.text("#stations") == ""
        chromium.type("wrong-token-of-the-tests-000000", "enter")
        chromium.until(lambda: "not known" in chromium.text("#token-why"))
        chromium.type(ADMIN, "enter")
        chromium.until(lambda: chromium.text("#link") == "live")
        chromium.until(lambda: "0 accepted in all" in chromium.text("#stations"))
        chromium.until(lambda: "admin.token_required" in chromium.text("#settings-table"))
        assert ADMIN not in chromium.text("body")
        one.terminate()
        assert one.wait() == 0
        chromium.until(lambda: chromium.text("#link") == "no connection")


def test_a_pipeline_may_have_the_name_of_a_member_of_every_object(
    chromium: Browser, tmp_path: Path
) -> None:
    (tmp_path / "ingestd.toml").write_text('[pipelines.constructor]\nformat = "json"\n')
    with daemon(cwd=tmp_path) as started:
        assert started.request("POST", "/v1/records/constructor", "{}", {})[0] == 202
        chromium.open("about:blank")
        chromium.open(f"http://127.0.0.1:{started.admin_port}/#pipeline=constructor")
        chromium.until(lambda: "done" in chromium.text("#batches-table"))
        assert chromium.text("#pipeline-name") == "constructor"
        assert chromium.text("#link") == "live"
