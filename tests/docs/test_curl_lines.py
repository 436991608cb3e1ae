"""Every curl line of the docs does what it says, against a real daemon.

A line is a command of a fenced `sh` block with `curl` in it. Comments directly above the block say
what it assumes; they do not show where the page is read:

    <!-- with: --pipelines.logs.format=text -->    flags of the daemon, as a shell reads them
    <!-- expect: 401 -->                           the status; one a line if there are several
    <!-- skip: why it can't be run -->             not run; the reason is shown

Without `expect` it is 2xx. Every line has to leave with 0. The usual addresses become those of the
daemon, which is started for each block in a folder with `SAMPLES` and certificates. Lines that set
variables are run before each.
"""

from __future__ import annotations

import html
import re
import shlex
import shutil
import subprocess
from typing import TYPE_CHECKING, NamedTuple

import pytest
import trustme

from tests.daemon.harness import ROOT, daemon

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

PAGES = [
    page
    for page in (
        ROOT / "README.md",
        *sorted((ROOT / "docs").glob("*.md")),
        *sorted((ROOT / "docs" / "clients").glob("*.md")),
    )
    # The blocks of these need what stands before them: tests/deploy, test_operations.py and
    # test_scaling.py run them in order.
    if "curl" in page.read_text() and page.stem not in {"DEPLOYMENT", "OPERATIONS", "SCALING"}
]
SAMPLES = {
    "events.ndjson": b'{"user": 7, "event": "signup"}\n{"user": 8, "event": "login"}\n' * 50,
    "access.log": b'192.0.2.1 - - [01/Jan/2026:00:00:00 +0000] "GET / HTTP/1.1" 200 512\n' * 20,
    "picture.png": b"\x89PNG\r\n\x1a\n\0\n\xff",
}
TOOLS = ("curl", "zstd")
_BLOCK = re.compile(r"((?:^<!--.*?-->\n)*)^```sh\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_NOTE = re.compile(r"^<!-- *(with|expect|skip): *(.*?) *-->$", re.MULTILINE)
_STATUS = re.compile(r"^status=(\d{3})$", re.MULTILINE)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not all(map(shutil.which, TOOLS)), reason=f"needs {' and '.join(TOOLS)}"),
]


class Block(NamedTuple):
    """One block with curl in it.

    Attributes:
        lines: its commands, one with a backslash at its end joined with the next.
        flags: of the daemon.
        statuses: what each line is answered with; empty for any 2xx.
        skip: why it is not run.
        made: what sets variables for them.
    """

    lines: list[str]
    flags: list[str]
    statuses: list[int]
    skip: str
    made: Sequence[str] = ()


def blocks_in(text: str) -> list[Block]:
    found = []
    for notes, code in _BLOCK.findall(text):
        commands = code.replace("\\\n", " ").splitlines()
        lines = [one for one in commands if re.search(r"\bcurl\b", one.partition("#")[0])]
        made = [one for one in commands if re.match(r"\w+=", one)]
        said = dict(_NOTE.findall(notes))
        assert said.get("skip") != "", "a skip needs a reason"
        if lines:
            statuses = [int(number) for number in said.get("expect", "").split()]
            assert len(statuses) in (0, 1, len(lines)), "one status, or one a line"
            statuses = statuses * len(lines) if len(statuses) == 1 else statuses
            flags = shlex.split(said.get("with", ""))
            found.append(Block(lines, flags, statuses, said.get("skip", ""), made))
    return found


def run(block: Block, folder: Path) -> list[tuple[str, list[int], str]]:
    """Each line with the statuses that it got and with what it wrote to stderr."""
    for name, content in SAMPLES.items():
        (folder / name).write_bytes(content)
    authority = trustme.CA()
    authority.cert_pem.write_to_path(folder / "ca.pem")
    for name, holder in (("server", "localhost"), ("client", "shop.example")):
        issued = authority.issue_cert(holder)
        issued.private_key_pem.write_to_path(folder / f"{name}.key")
        for part in issued.cert_chain_pems:
            part.write_to_path(folder / f"{name}.pem", append=True)
    # %{stderr}: it must not get into the next program of a pipe.
    (folder / ".curlrc").write_text(
        'write-out = "%{stderr}\\nstatus=%{http_code}\\n"\nmax-time = 60'
    )
    results = []
    with daemon(*block.flags, cwd=folder) as one:
        places = {"8080": one.port, "8081": one.admin_port}
        for line in block.lines:
            command = re.sub(
                r"(//(?:127\.0\.0\.1|localhost)):(8080|8081)\b",
                lambda match: f"{match[1]}:{places[match[2]]}",
                line,
            )
            done = subprocess.run(
                ["bash", "-euo", "pipefail", "-c", "\n".join([*block.made, command])],
                cwd=folder,
                env={"PATH": "/usr/local/bin:/usr/bin:/bin", "HOME": str(folder), "LC_ALL": "C"},
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=90,
            )
            assert done.returncode == 0, (line, done.stdout, done.stderr)
            results.append((line, [int(s) for s in _STATUS.findall(done.stderr)], done.stdout))
    return results


def check(block: Block, results: list[tuple[str, list[int], str]]) -> None:
    assert len(results) == len(block.lines)
    for at, (line, statuses, out) in enumerate(results):
        assert statuses, f"no curl was run by {line}"
        for status in statuses:
            expected = status == block.statuses[at] if block.statuses else 200 <= status < 300
            assert expected, (line, status, out)


CASES = [
    pytest.param(block, id=f"{page.stem}-{number}")
    for page in PAGES
    for number, block in enumerate(blocks_in(page.read_text()), start=1)
]


@pytest.mark.parametrize("block", CASES)
def test_a_block_of_the_docs(block: Block, tmp_path: Path) -> None:
    if block.skip:
        pytest.skip(block.skip)
    check(block, run(block, tmp_path))


def test_no_line_is_left_out() -> None:
    """A line of curl in a fence that is not read would never be run."""
    for page in PAGES:
        in_fences = re.findall(r"^```.*?\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)
        lines = [
            line
            for text in in_fences
            for line in text.replace("\\\n", " ").splitlines()
            if re.match(r"[^#]*\bcurl (-|http)", line)
        ]
        read = [line for block in blocks_in(page.read_text()) for line in block.lines]
        assert read == lines, page.name
    assert sum(len(blocks_in(page.read_text())) for page in PAGES) >= 3


def test_the_lines_of_the_page(tmp_path: Path) -> None:
    """The page at / shows lines too, with its own address."""
    with daemon(cwd=tmp_path) as one:
        _, _, page = one.request("GET", "/")
    (code, _) = re.findall(r"<pre[^>]*><code>(.*?)</code></pre>", page.decode(), re.DOTALL)
    text = re.sub(r"127\.0\.0\.1:\d+", "127.0.0.1:8080", html.unescape(code))
    (block,) = blocks_in(f"```sh\n{text}\n```\n")
    assert len(block.lines) == 3
    check(block, run(block, tmp_path))


def test_what_the_comments_mean() -> None:
    text = """
<!-- with: --a.b=c --d 'e f' -->
<!-- expect: 401 202 -->
```sh
# curl in a comment
curl -d 1 \\
  http://127.0.0.1:8080/v1/records
cat x | curl -T - http://127.0.0.1:8080/
echo hello
```

<!-- skip: needs the network -->
```sh
curl http://example.org/
```

```sh
ls
```
"""
    first, second = blocks_in(text)
    assert first.flags == ["--a.b=c", "--d", "e f"]
    assert first.statuses == [401, 202]
    assert [line.split() for line in first.lines] == [
        ["curl", "-d", "1", "http://127.0.0.1:8080/v1/records"],
        ["cat", "x", "|", "curl", "-T", "-", "http://127.0.0.1:8080/"],
    ]
    assert second.skip == "needs the network"
    with pytest.raises(AssertionError, match="reason"):
        blocks_in("<!-- skip: -->\n```sh\ncurl x\n```\n")


@pytest.mark.parametrize(
    ("code", "statuses"),
    [
        ("curl -d x http://127.0.0.1:8080/v1/records", []),
        ("curl -d 1 http://127.0.0.1:8080/v1/records", [400]),
        ("curl -d 1 http://127.0.0.1:1/v1/records", []),
        ("true || curl http://127.0.0.1:8080/", []),
    ],
)
def test_a_line_that_does_not_do_what_it_says_is_found(
    code: str, statuses: list[int], tmp_path: Path
) -> None:
    block = Block([code], [], statuses, "")
    with pytest.raises(AssertionError):
        check(block, run(block, tmp_path))
