"""A plain `ingestd run` imports what it needs: modules are counted, not milliseconds."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ingestd.registry import ENDPOINTS
from tests.daemon.harness import daemon

if TYPE_CHECKING:
    from pathlib import Path

THREAD = ("--executor.kind", "thread", "--executor.workers", "1")
HANDLER = """
import sys
from pathlib import Path

class Notes:
    def __call__(self, batch: list) -> None: ...
    def close(self):
        Path("modules").write_text("\\n".join(sorted(sys.modules)))
"""
NOT_NEEDED = (
    "aiohttp",
    "duckdb",
    "email.policy",
    "http.server",
    "ingestd.admin.traces",
    "ingestd.cli.check",
    "ingestd.cli.dead",
    "ingestd.cli.prove",
    "ingestd.execution.concurrency",
    "ingestd.execution.event_loops",
    "ingestd.execution.external",
    "ingestd.execution.process",
    "ingestd.http.schemes",
    "ingestd.journal.memory",
    "ingestd.journal.sqlite.check",
    "ingestd.prove",
    "ingestd.sinks",
    "ingestd.sources.fetch.client",
    "ingestd.sources.fetch.download",
    "ingestd.sources.fetch.source",
    "ingestd.sources.stdin.source",
    "opentelemetry",
    "prometheus_client",
    "psycopg",
    "pydantic.v1",
    "tomllib",
    "urllib.request",
    "xml",
    "yarl",
    *(place.partition(":")[0] for name, place in ENDPOINTS.own.items() if name != "records"),
)
"""With everything below them."""
OWN_MODULES_MAX = 145
"""Of ingestd itself."""


def test_a_plain_run_imports_no_module_that_it_does_not_need(tmp_path: Path) -> None:
    (tmp_path / "app.py").write_text(HANDLER)
    with daemon("app:Notes", *THREAD, cwd=tmp_path) as one:
        kind = {"Content-Type": "application/x-ndjson"}
        assert one.request("POST", "/v1/records", b"1\n2\n", kind)[0] == 202
        assert one.status()["pipelines"]
        one.until_settled()
        one.terminate()
        assert one.wait() == 0
    modules = (tmp_path / "modules").read_text().split()
    unneeded = [
        name
        for name in modules
        if any(name == one or name.startswith(f"{one}.") for one in NOT_NEEDED)
    ]
    assert unneeded == []
    assert sum(name.partition(".")[0] == "ingestd" for name in modules) <= OWN_MODULES_MAX
