"""`rsyslogd` or `syslog-ng` as a relay: PROGRAM ADDRESS COUNT CONFIG, see `tests.clients.harness`.

It gets messages over a unix socket, and forwards them as the configuration says; it is asked to
leave once it has read all, and waits for its queues before it does.
"""

import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

program, _, count, config = sys.argv[1:5]
folder = Path(config).parent
entrance, seen = folder / "in", folder / "seen"
if program.endswith("rsyslogd"):
    command = [program, "-n", "-f", config, "-i", str(folder / "pid")]
else:
    files = [f"--{one}={folder / one}" for one in ("pidfile", "persist-file", "control")]
    command = [program, "-F", "--no-caps", "-f", config, *files]
daemon = subprocess.Popen(command, cwd=folder)
deadline = time.monotonic() + 60


def wait_for(what: str, is_there: object) -> None:
    while not is_there():  # type: ignore[operator]
        if time.monotonic() > deadline or daemon.poll() is not None:
            daemon.kill()
            sys.exit(f"{program}: {what} in vain, {daemon.wait()}")
        time.sleep(0.02)


wait_for("waited for its socket", entrance.exists)
with socket.socket(socket.AF_UNIX) as sender:
    sender.connect(str(entrance))
    for number in range(int(count)):
        stamp = time.strftime("%b %e %H:%M:%S")
        sender.sendall(b'<13>%b there app[7]: {"n": %d}\n' % (stamp.encode(), number))
        if number == int(count) // 2:
            print("half", flush=True)
        time.sleep(0.002)
wait_for("read all", lambda: seen.exists() and seen.read_bytes().count(b"\n") >= int(count))
time.sleep(2)  # a relay may look for its other side but once a second
daemon.send_signal(signal.SIGTERM)
sys.exit(daemon.wait(90))
