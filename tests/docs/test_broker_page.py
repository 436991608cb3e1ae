"""The examples on the page about brokers are settings that load."""

from __future__ import annotations

import re
import tomllib

import pytest

from ingestd.settings import Settings
from tests.daemon.harness import ROOT

PAGE = (ROOT / "docs" / "BROKERS.md").read_text()
EXAMPLES = re.findall(r"```toml\n(.*?)```", PAGE, re.DOTALL)


@pytest.mark.parametrize("example", EXAMPLES, ids=range(len(EXAMPLES)))
def test_an_example_is_a_configuration_whose_source_runs(example: str) -> None:
    settings = Settings(**tomllib.loads(example))
    assert {one.kind for one in settings.running_sources()} & {"kafka", "nats"}
