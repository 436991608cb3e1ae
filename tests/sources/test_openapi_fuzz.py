"""`/openapi.json` is true: schemathesis asks a real daemon for all that it says, and all it denies.

All of its checks are on, for a daemon that everybody may send to and for one that wants a token.
Two of them have nothing to look at: `use_after_free` and `ensure_resource_availability`, because no
operation makes or deletes a resource with a path.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest

from tests.daemon.harness import ROOT, daemon

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.slow

SEED = "20260101"
EXAMPLES = "30"


def requests_in(report: Path) -> Counter[tuple[str, str, int]]:
    """How often which method of which path got which status."""
    seen: Counter[tuple[str, str, int]] = Counter()

    def look(value: Any) -> None:
        if isinstance(value, dict):
            request, response = value.get("request"), value.get("response")
            if isinstance(request, dict) and isinstance(response, dict) and "uri" in request:
                path = "/" + request["uri"].split("/", 3)[3]
                seen[request["method"], path, response["status_code"]] += 1
            for inner in value.values():
                look(inner)
        elif isinstance(value, list):
            for inner in value:
                look(inner)

    for line in report.read_text().splitlines():
        look(json.loads(line))
    return seen


TOKEN = "an-example-of-a-token-0123456789"


@pytest.mark.parametrize(("protected", "operations"), [(False, 9), (True, 7)])
def test_what_is_described_is_what_is_answered(
    tmp_path: Path, protected: bool, operations: int
) -> None:
    report = tmp_path / "report.ndjson"
    pipelines = ["--pipelines.logs.format", "text", "--pipelines.blobs.format", "bytes"]
    pipelines += ["--http.endpoints.otlp.pipeline", "default"]
    shown = []
    if protected:
        pipelines += ["--http.tokens.shop.token", TOKEN]
        shown = ["--header", f"Authorization: Bearer {TOKEN}"]
        # Which pipeline takes which body is not told to strangers, so what is described is what any
        # of them may take, and one that takes something else says 415.
        shown += ["--exclude-checks", "positive_data_acceptance"]
    pipelines += ["--batch.age_max", "5ms"]  # some of the requests wait
    with daemon(*pipelines, cwd=tmp_path) as one:
        status, _, described = one.request("GET", "/openapi.json")
        assert status == 200
        # From a file: what it loads from an address it does not ask for again.
        (tmp_path / "openapi.json").write_text(json.dumps(described))
        run = subprocess.run(
            [
                sys.executable, "-m", "schemathesis.cli", "run", "openapi.json",
                "--url", f"http://127.0.0.1:{one.port}", "--checks", "all", "--seed", SEED,
                "--max-examples", EXAMPLES, "--continue-on-failure", "--generation-database",
                "none", "--report", "ndjson", "--report-ndjson-path", str(report), "--no-color",
                *shown,
            ],
            cwd=tmp_path,
            env={
                **os.environ,
                "PYTHONPATH": str(ROOT),
                "SCHEMATHESIS_HOOKS": "tests.sources.fuzz_hooks",
            },
            capture_output=True,
            text=True,
            timeout=300,
        )  # fmt: skip
        assert run.returncode == 0, run.stdout + run.stderr
        ledger = one.status()["pipelines"]
    described_ones = {(m, path) for path, item in described["paths"].items() for m in item}
    described_ones -= {("parameters", path) for path in described["paths"]}
    assert len(described_ones) == operations
    seen = requests_in(report)
    for method, path in described_ones:
        if "{" not in path:
            answers = {status for m, p, status in seen if (m, p) == (method.upper(), path)}
            assert answers & {200, 202}, (method, path, answers)
    statuses = {status for _, _, status in seen}
    assert statuses >= {200, 202, 204, 400, 405, 415}
    assert (401 in statuses) == protected
    tried = ("default",) if protected else ("default", "logs", "blobs")
    assert all(ledger[name]["accepted"] for name in tried)
