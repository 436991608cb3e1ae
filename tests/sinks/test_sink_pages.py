"""The pages of the sinks say what the code does."""

from __future__ import annotations

import re
import tomllib
from importlib.util import find_spec

import pytest

from ingestd.handlers.options import options_of
from ingestd.registry import SINKS
from tests.sinks.tables import PAGES, marked


@pytest.mark.parametrize("sink", SINKS.own)
def test_the_table_of_options_is_the_codes(sink: str) -> None:
    page = (PAGES / f"{sink}.md").read_text()
    assert page == marked(page, sink), "run python -m tests.sinks.tables"
    for example in re.findall(r"```toml\n(.*?)```", page, re.DOTALL):
        handler = tomllib.loads(example)["handler"]
        # Without `load`, which wants the packages of the sink's extra.
        if handler["options"].get("format") == "parquet" and find_spec("pyarrow") is None:
            continue  # it is answered with the pip line
        options = options_of(SINKS.load(handler["target"]))
        assert options is not None
        options.of(**handler["options"])
    assert (PAGES / "README.md").read_text().count(f"[`{sink}`]({sink}.md)") == 1
