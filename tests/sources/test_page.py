"""The page at `/`: one plain document that says what this is, and nothing that is secret."""

from __future__ import annotations

import base64
import hashlib
import re
from html.parser import HTMLParser

import pytest

from ingestd.sources.http.openapi import make_page
from tests.sources.source_tools import MemoryIntake, connected, serving
from tests.sources.test_openapi import built

FORMATS = {"default": "json", "logs": "text", "blobs": "bytes"}
VOID = {"meta", "link", "br"}


class Outline(HTMLParser):
    """Checks that what is opened is closed, and collects what there is."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def page(*, public_names: bool = True, default: str = "default", address: str = "127.0.0.1:8080"):
    return make_page(
        "1.2",
        built(default),
        FORMATS,
        public_names=public_names,
        address=address,  # type: ignore[arg-type]
    )


@pytest.mark.parametrize("public_names", [True, False])
def test_it_is_plain_html_that_stands_alone(public_names: bool) -> None:
    html = page(public_names=public_names).html.decode()
    outline = Outline(html)
    tags = [tag for tag, _ in outline.tags]
    assert outline.tags[0] == ("html", {"lang": "en"})
    assert not {"script", "img", "iframe", "form", "link", "object", "base"} & set(tags)
    headings = [tag for tag in tags if re.fullmatch(r"h\d", tag)]
    assert headings[0] == "h1"
    assert set(headings[1:]) == {"h2"}
    for _, attributes in outline.tags:
        assert not [
            name for name in attributes if name.startswith("on") or name in ("src", "style")
        ]
    # Everything it links to is beside it, and every label is the id of something.
    assert [a["href"] for tag, a in outline.tags if tag == "a"] == ["openapi.json"]
    ids = [a["id"] for _, a in outline.tags if "id" in a]
    assert len(set(ids)) == len(ids)
    assert {a["aria-labelledby"] for _, a in outline.tags if "aria-labelledby" in a} <= set(ids)
    assert not re.search(r"@import|url\(", html)


def test_its_policy_lets_nothing_in_but_its_own_style() -> None:
    html, headers = page()
    (style,) = re.findall(rb"<style>(.*?)</style>", html, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(style).digest()).decode()
    policy = dict(part.split(" ", 1) for part in headers["Content-Security-Policy"].split("; "))
    assert policy == {
        "default-src": "'none'",
        "style-src": f"'sha256-{digest}'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    assert headers["Referrer-Policy"] == "no-referrer"


def luminance(color: str) -> float:
    digits = color.lstrip("#")
    digits = "".join(d * 2 for d in digits) if len(digits) == 3 else digits
    parts = [int(digits[at : at + 2], 16) / 255 for at in (0, 2, 4)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_its_contrast_is_good_in_light_and_in_dark() -> None:
    """At least 7:1, the higher of the two levels of WCAG 2.2."""
    roots = re.findall(r":root \{(.*?)\}", page().html.decode(), re.DOTALL)
    assert len(roots) == 2
    for root in roots:
        colors = dict(re.findall(r"--(\w+): (#\w+)", root))
        for front in ("text", "quiet", "link"):
            for back in ("ground", "raised") if front == "text" else ("ground",):
                one, two = sorted([luminance(colors[front]), luminance(colors[back])])
                assert (two + 0.05) / (one + 0.05) >= 7, (front, back)


def test_it_lists_the_pipelines_where_everybody_may_know_them() -> None:
    html = page(default="logs").html.decode()
    rows = re.findall(r"<code>(/v1/records[^<]*)</code></th><td>(\w+)</td>", html)
    assert rows == [
        ("/v1/records", "text"),
        ("/v1/records/default", "json"),
        ("/v1/records/logs", "text"),
        ("/v1/records/blobs", "bytes"),
    ]
    assert "access.log" in html
    hidden = page(public_names=False).html.decode()
    assert not re.search("logs|blobs|Pipelines", hidden)


def test_an_address_that_is_not_this_machines_own_is_not_shown() -> None:
    for address in ("127.0.0.1:8080", "[::1]:8080"):
        assert "curl --json" in (html := page(address=address).html.decode())
        assert f" http://{address}/v1/records" in html
    for address in ("10.1.2.3:8080", "0.0.0.0:8080", "[::]:8080"):
        html = page(address=address).html.decode()
        assert address not in html
        assert " $url/v1/records" in html


async def test_the_real_one() -> None:
    async with serving(MemoryIntake(), MemoryIntake("text", "logs")) as source:
        async with connected(source) as client:
            client.send(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
            reply = await client.reply()
        assert reply.headers["content-type"] == "text/html; charset=utf-8"
        assert reply.headers["x-content-type-options"] == "nosniff"
        assert "default-src 'none'" in reply.headers["content-security-policy"]
        html = reply.body.decode()
        assert f"http://{source.addresses[0]}/v1/records" in html
        assert "/v1/records/logs" in html
        assert "$" not in html
