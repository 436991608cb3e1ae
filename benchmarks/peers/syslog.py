"""syslog-ng and rsyslog, as Debian packages them, from a pipe into a file.

Debian installs only one of the two on a machine; the other one can be unpacked beside it
(`README.md` has the commands), and then finds its modules relative to itself.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.peers.base import Command, Counts, Program, in_one_line

if TYPE_CHECKING:
    from collections.abc import Iterable

_LINES_READ_BYTES = 1 << 20

SYSLOG_NG = """\
@version: {version}
options {{ stats-freq(0); }};
source lines {{ stdin(flags(no-parse) log-fetch-limit(1000) log-iw-size(10000)); }};
destination file {{ file("{out}" template("$MSG\\n")); }};
log {{ source(lines); destination(file); flags(flow-control); }};
"""

RSYSLOG = """\
global(workDirectory="{folder}")
module(load="imptcp")
template(name="line" type="string" string="%rawmsg%\\n")
ruleset(name="all" queue.type="FixedArray" queue.size="100000" queue.dequeueBatchSize="1000"
        queue.timeoutEnqueue="60000") {{
  action(type="omfile" file="{out}" template="line")
}}
input(type="imptcp" path="{socket}" ruleset="all" unlink="on")
"""
"""What does not fit into the queue waits for up to a minute instead of being dropped after two
seconds: the plain loop does not drop either."""


class _Syslog(Program):
    """Lines go to a file as they came; the records are what lies in it at the end."""

    scenarios = ("stdin-pipe",)
    accepted = "written to a file, not synced"
    modules: str
    """Where its modules are, below the prefix it is unpacked to."""

    def _modules(self) -> str | None:
        """Where they are if it was unpacked to a place of its own; none if it was installed."""
        for prefix in Path(self.executable).resolve().parents:
            found = sorted(prefix.glob(self.modules))
            if found and prefix != Path("/"):
                return str(found[-1])
        return None

    def counted(self, folder: Path) -> Counts:
        """The lines of its file: it has no other way to say what it did."""
        lines = _count_lines(folder / "out")
        return Counts(lines, lines)


class SyslogNg(_Syslog):
    """Reads standard input itself, if it is no regular file (it can't wait for one)."""

    name = "syslog-ng"
    program = "syslog-ng"
    modules = "usr/lib/syslog-ng/[0-9]*"

    def environment(self) -> dict[str, str]:
        """See `Program`."""
        modules = self._modules()
        return {"LD_LIBRARY_PATH": str(Path(modules).parent)} if modules else {}

    def settings(self, age: float) -> str:  # noqa: ARG002  makes no batches
        """See `Peer`."""
        configuration = SYSLOG_NG.format(version="ITS", out="FILE")
        return f"`syslog-ng -F` with `{in_one_line(configuration)}`"

    def reader(self, folder: Path, age: float) -> Command:  # noqa: ARG002
        """See `Peer`."""
        version = ".".join(self.version().split(".")[:2])
        file = folder / "syslog-ng.conf"
        file.write_text(SYSLOG_NG.format(version=version, out=folder / "out"))
        argv = [self.executable, "-F", "--no-caps", "-f", str(file)]
        for option, name in (("-R", "persist"), ("-c", "control"), ("-p", "pid")):
            argv += [option, str(folder / name)]
        if modules := self._modules():
            argv += ["--module-path", modules]
        return Command(argv, folder, self.environment())


class Rsyslog(_Syslog):
    """Debian's has no input for standard input (imstdin).

    The nearest it has is a stream of lines on a Unix socket (imptcp), which is faster than a file
    that it follows (imfile); `rsyslog_stdin.py` moves the pipe into it without looking at it.
    """

    name = "rsyslog"
    program = "rsyslogd"
    modules = "usr/lib/*/rsyslog"
    version_option = "-v"

    def settings(self, age: float) -> str:  # noqa: ARG002  makes no batches
        """See `Peer`."""
        configuration = RSYSLOG.format(folder="FOLDER", out="FILE", socket="SOCKET")
        return f"`rsyslogd -n` with `{in_one_line(configuration)}`"

    def reader(self, folder: Path, age: float) -> Command:  # noqa: ARG002
        """See `Peer`."""
        # The path of a Unix socket is bounded to about a hundred characters, so it is relative, and
        # -C keeps the daemon in this folder.
        names = {"folder": folder, "out": folder / "out", "socket": "in.sock"}
        file = folder / "rsyslog.conf"
        file.write_text(RSYSLOG.format(**names))
        daemon = [self.executable, "-n", "-C", "-f", str(file), "-i", str(folder / "pid")]
        if modules := self._modules():
            daemon += ["-M", modules]
        feeder = [sys.executable, "-m", "benchmarks.peers.rsyslog_stdin", "in.sock", "out"]
        return Command([*feeder, *daemon], folder)


def _count_lines(path: Path) -> int:
    if not path.exists():
        return 0
    with path.open("rb") as file:
        blocks: Iterable[bytes] = iter(lambda: file.read(_LINES_READ_BYTES), b"")
        return sum(block.count(b"\n") for block in blocks)
