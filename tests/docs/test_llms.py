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


def test_every_page_is_listed_once_and_every_link_leads_somewhere() -> None:
    links = [path for _, path, _ in LINK.findall(TEXT)]
    assert len(links) == len(set(links))
    pages = {str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md")}
    assert sorted(pages - set(links)) == [], "add these pages to llms.txt"
    assert [path for path in links if not (ROOT / path).is_file()] == []
