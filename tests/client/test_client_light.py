"""Importing the client is light: modules are counted in a fresh interpreter, not milliseconds."""

from __future__ import annotations

import subprocess
import sys

from tests.daemon.harness import ROOT

LIST = "import sys; before = set(sys.modules); {}; print(*sorted(set(sys.modules) - before))"
OWN = {
    "ingestd",
    "ingestd.base",
    "ingestd.base.rate",
    "ingestd.base.errors",
    "ingestd.client",
    "ingestd.client.clients",
    "ingestd.client.exchange",
    "ingestd.client.log_handler",
    "ingestd.client.sender",
}
OWN_STANDARD_MAX = 15
"""Modules of the standard library beside those that an HTTP client in it needs anyway."""


def imported(statement: str) -> set[str]:
    command = [sys.executable, "-c", LIST.format(statement)]
    return set(subprocess.check_output(command, cwd=ROOT, text=True).split())


def test_the_client_imports_the_standard_library_alone() -> None:
    modules = imported("import ingestd.client")
    roots = {name.partition(".")[0] for name in modules}
    assert {root for root in roots if root not in sys.stdlib_module_names} == {"ingestd"}
    assert {name for name in modules if name.partition(".")[0] == "ingestd"} == OWN
    assert not {"asyncio", "multiprocessing", "uuid"} & modules
    usual = imported("import gzip, http.client, json, logging")
    assert len(modules - usual - OWN) <= OWN_STANDARD_MAX, sorted(modules - usual - OWN)


def test_the_names_are_public() -> None:
    import ingestd.client

    assert {"AsyncClient", "Client", "LogHandler"} < set(ingestd.client.__all__)
    assert all(hasattr(ingestd.client, name) for name in ingestd.client.__all__)
