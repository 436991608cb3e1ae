"""Real input, where it lies beside the checkout; the project keeps no copy."""

from __future__ import annotations

import functools
import json
import tempfile
from pathlib import Path

import pytest

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


def real_input(name: str) -> Path:
    """Where one file of it is; without it the test is skipped."""
    path = DATA / name
    if not path.is_file():
        pytest.skip(f"the real input {name} is not here")
    return path


@functools.cache
def nginx_log() -> Path:
    """500 JSON objects of about 5.5 KB, one a line: real ones, or made ones where those are not."""
    real = DATA / "nginxplus.ndjson"
    if real.is_file():
        return real
    made = Path(tempfile.gettempdir()) / "ingestd-made.ndjson"
    zones = {f"zone-{zone}": {"processing": zone, "sent": "9" * 40} for zone in range(64)}
    lines = (json.dumps({"number": number, "zones": zones}) + "\n" for number in range(500))
    made.write_text("".join(lines))
    return made
