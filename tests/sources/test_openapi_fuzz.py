"""`/openapi.json` is true: schemathesis asks a real daemon for all that it says, and all it denies.

All of its checks are on. Three of them have nothing to look at yet: `ignored_auth` and
`object_level_authorization` while no security scheme is described, `use_after_free` and
`ensure_resource_availability` because no operation makes or deletes a resource with a path.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from typing import TYPE_CHECKING, Any

from tests.daemon.harness import ROOT, daemon

if TYPE_CHECKING:
    from pathlib import Path

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


def test_what_is_described_is_what_is_answered(tmp_path: Path) -> None:
    report = tmp_path / "report.ndjson"
    pipelines = ["--pipelines.logs.format", "text", "--pipelines.blobs.format", "bytes"]
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
            ],
            cwd=tmp_path,
            env={
                **os.environ,
                "PYTHONPATH": str(ROOT),
                "SCHEMATHESIS_HOOKS": "tests.sources.fuzz_hooks",
            },
            capture_output=True,
            text=True,
            timeout=120,
        )  # fmt: skip
        assert run.returncode == 0, run.stdout + run.stderr
        ledger = one.status()["pipelines"]
    operations = {(m.upper(), path) for path, item in described["paths"].items() for m in item}
    seen = requests_in(report)
    assert len(operations) == 6
    for method, path in operations:
        answers = {status for m, p, status in seen if (m, p) == (method, path)}
        assert answers & {200, 202}, (method, path, answers)
    assert {status for _, _, status in seen} >= {200, 202, 204, 400, 405, 415}
    assert all(ledger[name]["accepted"] for name in ("default", "logs", "blobs"))
