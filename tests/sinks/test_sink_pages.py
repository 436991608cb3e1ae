"""The pages of the sinks say what the code does."""

from __future__ import annotations

import re
import tomllib
from importlib.util import find_spec

import pytest

from ingestd.handlers.options import OptionError, options_of
from ingestd.registry import SINKS
from ingestd.sinks.base import TlsOptions
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


@pytest.mark.parametrize("sink", ["clickhouse", "elasticsearch", "http", "kafka", "nats"])
def test_sinks_share_the_options_of_tls(sink: str) -> None:
    options = options_of(SINKS.load(sink))
    assert options is not None
    assert issubclass(options, TlsOptions)
    names = [one.name for one in options.help()]
    last = [name for name in names if name in TlsOptions.LISTED_LAST]
    assert last[:3] == ["tls_ca", "tls_certificate", "tls_key"]
    assert names[-len(last) :] == last
    values = {"url": "http://h", "servers": "nats://h:1"}
    needed = {one.name: values.get(one.name, "a") for one in options.help() if one.default is None}
    made = options.of(**needed, tls_ca="/a", tls_certificate="/c")
    assert isinstance(made, TlsOptions)
    assert made.tls_files == ("/a", "/c", None)
    with pytest.raises(OptionError, match="tls_key: it needs tls_certificate"):
        options.of(**needed, tls_key="/k")
