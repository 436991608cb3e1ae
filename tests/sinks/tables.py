"""The tables of options on the pages of the sinks, made from the code.

`python -m tests.sinks.tables` writes them anew; `test_sink_pages.py` holds the pages to them.
"""

from __future__ import annotations

import re
from pathlib import Path

from ingestd.handlers.options import options_of
from ingestd.registry import SINKS

PAGES = Path(__file__).parents[2] / "docs" / "sinks"


def table(sink: str) -> str:
    """The table of a sink's options."""
    struct = options_of(SINKS.load(sink))
    assert struct is not None
    lines = ["| option | kind | default | |", "| --- | --- | --- | --- |"]
    for one in struct.help():
        kind = one.kind.replace(" | ", ", ")
        default = "required" if one.default is None else f"`{one.default}`" if one.default else ""
        lines.append(f"| `{one.name}` | {kind} | {default} | {one.text} |")
    return "\n".join(lines)


def marked(page: str, sink: str) -> str:
    """A page with the table of a sink between its marks."""
    marks = re.compile(rf"(<!-- options of {sink} -->\n).*?(<!-- end -->)", re.DOTALL)
    assert len(marks.findall(page)) == 1, f"{sink} has no place on its page"
    return marks.sub(lambda found: f"{found[1]}{table(sink)}\n{found[2]}", page)


if __name__ == "__main__":
    for name in SINKS.own:
        file = PAGES / f"{name}.md"
        file.write_text(marked(file.read_text(), name))
