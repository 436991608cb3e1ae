"""A real browser: Debian's Chromium, driven over the WebDriver protocol (W3C) with plain HTTP."""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import os
import re
import shutil
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

DEADLINE = 60.0
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"
KEYS = {"tab": "\ue004", "enter": "\ue007", "escape": "\ue00c", "space": " ", "shift": "\ue008"}

needs_browser = pytest.mark.skipif(
    not (shutil.which("chromedriver") and shutil.which("chromium")),
    reason="chromium and chromium-driver are not here",
)


class BrowserError(Exception):
    """The browser refused a command."""


class Browser:
    """One browser with one window.

    Args:
        folder: for its profile and what it downloads.
        width: of the window.
        height: of the window.
        dark: what `prefers-color-scheme` says.
    """

    def __init__(
        self, folder: Path, *, width: int = 1280, height: int = 900, dark: bool = False
    ) -> None:
        self.downloads = folder / "downloads"
        self.downloads.mkdir(parents=True)
        self._driver = subprocess.Popen(
            ["chromedriver", "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            stdin=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        assert self._driver.stdout is not None
        for line in self._driver.stdout:
            if found := re.search(r"started successfully on port (\d+)", line):
                self._port = int(found[1])
                break
        options = {
            "binary": shutil.which("chromium"),
            "args": [
                "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
                "--no-first-run", "--disable-background-networking", "--disable-sync",
                "--disable-component-update", "--hide-scrollbars",
                f"--user-data-dir={folder / 'profile'}",
            ],
            "prefs": {"download.default_directory": str(self.downloads)},
        }  # fmt: skip
        wanted = {"browserName": "chrome", "goog:chromeOptions": options}
        wanted["goog:loggingPrefs"] = {"browser": "ALL"}
        made = self._ask("POST", "/session", {"capabilities": {"alwaysMatch": wanted}})
        self._session = f"/session/{made['sessionId']}"
        self.cdp(
            "Emulation.setDeviceMetricsOverride",
            {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600},
        )
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.cdp("Emulation.setEmulatedMedia", {"features": scheme})

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(BrowserError, OSError):
            self._ask("DELETE", self._session)
        self._driver.terminate()
        self._driver.wait(60)
        assert self._driver.stdout is not None
        self._driver.stdout.close()

    def _ask(self, method: str, path: str, body: Any = None) -> Any:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=60)
        try:
            sent = None if method != "POST" else json.dumps(body or {})
            connection.request(method, path, sent, {"Content-Type": "application/json"})
            value = json.loads(connection.getresponse().read())["value"]
        finally:
            connection.close()
        if isinstance(value, dict) and "error" in value:
            raise BrowserError(f"{value['error']}: {value['message']}")
        return value

    def do(self, path: str, body: Any = None, method: str = "POST") -> Any:
        """One command of the session."""
        return self._ask(method, f"{self._session}{path}", body)

    def cdp(self, command: str, parameters: dict[str, Any]) -> Any:
        """One command of Chromium's own protocol."""
        return self.do("/goog/cdp/execute", {"cmd": command, "params": parameters})

    def open(self, url: str) -> None:
        self.do("/url", {"url": url})

    def run(self, script: str, *arguments: Any) -> Any:
        """The value of a script in the page."""
        return self.do("/execute/sync", {"script": script, "args": list(arguments)})

    def text(self, selector: str) -> str:
        """The text of an element as a person sees it; empty if it is not there."""
        return str(
            self.run("return document.querySelector(arguments[0])?.innerText ?? ''", selector)
        )

    def click(self, selector: str) -> None:
        element = self.do("/element", {"using": "css selector", "value": selector})[ELEMENT]
        self.do(f"/element/{element}/click")

    def type(self, *keys: str) -> None:
        """Presses keys, by their names in `KEYS` or as text, where the focus is."""
        actions: list[dict[str, str]] = []
        for key in keys:
            shifted = key.startswith("shift+")
            name = key.removeprefix("shift+")
            pressed = [KEYS[name]] if name in KEYS else list(name)
            if shifted:
                actions.append({"type": "keyDown", "value": KEYS["shift"]})
            for one in pressed:
                actions += [{"type": kind, "value": one} for kind in ("keyDown", "keyUp")]
            if shifted:
                actions.append({"type": "keyUp", "value": KEYS["shift"]})
        self.do("/actions", {"actions": [{"type": "key", "id": "keys", "actions": actions}]})

    def until(self, true: Callable[[], Any], seconds: float = DEADLINE) -> Any:
        """Waits for something that is true, and gives it."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            with contextlib.suppress(BrowserError):
                if found := true():
                    return found
            time.sleep(0.05)
        self.shoot("failed")
        raise AssertionError(f"it did not come true; the page says {self.text('body')[:3000]}")

    def errors(self) -> list[str]:
        """What the page complained about since it was asked last."""
        entries = self.do("/se/log", {"type": "browser"})
        return [one["message"] for one in entries if one["level"] == "SEVERE"]

    def shoot(self, name: str) -> None:
        """Keeps a picture of the whole page, where `TEST_SCREENSHOTS` says."""
        folder = os.environ.get("TEST_SCREENSHOTS")
        if not folder:
            return
        taken = self.cdp("Page.captureScreenshot", {"captureBeyondViewport": True})
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / f"{name}.png").write_bytes(base64.b64decode(taken["data"]))

    @property
    def scrolls_sideways(self) -> bool:
        return bool(
            self.run(
                "const d = document.documentElement; return d.scrollWidth > window.innerWidth"
                " || [...document.querySelectorAll('main *')].some(e => e.clientWidth > 0 &&"
                " e.scrollWidth > e.clientWidth + 1 && getComputedStyle(e).overflowX === 'auto')"
            )
        )
