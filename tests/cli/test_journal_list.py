"""`ingestd journal list`: the table of logs."""

from __future__ import annotations

from ingestd.cli.journal import _columns


def test_control_characters_of_an_owner_do_not_reach_the_terminal() -> None:
    log = {
        "log": "shop", "pipeline": "default", "owner": "\x1b[31mred\n", "state": "owned",
        "accepted": 1, "processed": 1, "dead": 0, "pending": 0,
    }  # fmt: skip
    lines = _columns([log]).splitlines()
    assert len(lines) == 3
    assert all(line.isprintable() for line in lines)
