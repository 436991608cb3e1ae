"""`llms.txt` names every page of the documentation, in the form of llmstxt.org."""

from __future__ import annotations

import re

from tests.daemon.harness import ROOT

TEXT = (ROOT / "llms.txt").read_text()
LINK = re.compile(r"- \[([^\]]+)\]\(([^)]+)\): (\S.*)")


def test_its_form_is_title_summary_text_and_lists_of_links() -> None:
    title, summary, text, *rest = TEXT.strip().split("\n\n")
    assert title == "# ingestd"
    assert summary.startswith("> ingestd is a daemon")
    assert not text.startswith(("#", "-", ">"))
    headings, lists = rest[::2], rest[1::2]
    assert all(re.fullmatch(r"## \w[\w ]+", one) for one in headings)
    assert headings[-1] == "## Optional"
    assert all(LINK.fullmatch(line) for one in lists for line in one.splitlines())


def test_every_page_is_listed_once_under_its_title() -> None:
    links = {path: title for title, path, _ in LINK.findall(TEXT)}
    assert len(LINK.findall(TEXT)) == len(links)
    pages = {str(path.relative_to(ROOT)): path for path in (ROOT / "docs").rglob("*.md")}
    assert pages.keys() <= links.keys(), "a page is missing in llms.txt"
    for path, title in links.items():
        assert (ROOT / path).is_file(), path
        if path in pages:
            assert f"# {title}" == pages[path].read_text().split("\n", 1)[0].replace("`", "")
