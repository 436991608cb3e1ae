"""`rsyslogd` or `syslog-ng` as a relay: PROGRAM ADDRESS COUNT CONFIG, see `tests.clients.harness`.

It gets messages over a unix socket, and forwards them as the configuration says; it is asked to
leave once it has read all, and waits for its queues before it does.
"""

import contextlib
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

program, _, count, config = sys.argv[1:5]
folder = Path(config).parent
entrance, seen = folder / "in", folder / "seen"
if program.endswith("rsyslogd"):
    command = [program, "-n", "-f", config, "-i", str(folder / "pid")]
else:
    files = [f"--{one}={folder / one}" for one in ("pidfile", "persist-file", "control")]
    command = [program, "-F", "--no-caps", "-f", config, *files]
deadline = time.monotonic() + 120


def is_there_within(seconds: float, is_there: Callable[[], bool]) -> bool:
    end = time.monotonic() + seconds
    while not is_there():
        if time.monotonic() > min(end, deadline) or daemon.poll() is not None:
            return False
        time.sleep(0.02)
    return True


def wait_for(what: str, is_there: Callable[[], bool]) -> None:
    if not is_there_within(60, is_there):
        daemon.kill()
        sys.exit(f"{program}: {what} in vain, {daemon.wait()}")


def seen_lines() -> int:
    return seen.read_bytes().count(b"\n") if seen.exists() else 0


def message(number: int) -> bytes:
    stamp = time.strftime("%b %e %H:%M:%S")
    return b'<13>%b there app[7]: {"n": %d}\n' % (stamp.encode(), number)


with contextlib.ExitStack() as stack:
    while True:
        daemon = subprocess.Popen(command, cwd=folder)
        wait_for("waited for its socket", entrance.exists)
        sender = stack.enter_context(socket.socket(socket.AF_UNIX))
        sender.connect(str(entrance))
        sender.sendall(message(0))
        # On a busy machine a relay hangs in its start now and then, and reads nothing for ever.
        if is_there_within(20, seen_lines):
            break
        daemon.kill()
        daemon.wait()
        entrance.unlink(missing_ok=True)
    for number in range(1, int(count)):
        sender.sendall(message(number))
        if number == int(count) // 2:
            print("half", flush=True)
        time.sleep(0.002)
wait_for("read all", lambda: seen_lines() >= int(count))
time.sleep(2)  # a relay may look for its other side but once a second
daemon.send_signal(signal.SIGTERM)
sys.exit(daemon.wait(90))
