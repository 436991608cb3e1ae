"""Sends with rsyslog's omelasticsearch: ADDRESS COUNT TOKEN RSYSLOGD; see `harness.py`."""

import json
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

address, count, token, rsyslogd = sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4]
folder = Path(tempfile.mkdtemp())
with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    port = probe.getsockname()[1]
CONFIG = f"""
global(workDirectory="{folder}")
main_queue(queue.timeoutShutdown="60000" queue.dequeueBatchSize="50")
module(load="imtcp")
module(load="impstats" interval="1" format="json" log.syslog="off" log.file="{folder}/stats")
module(load="omelasticsearch")
input(type="imtcp" address="127.0.0.1" port="{port}")
template(name="document" type="string" string="{{\\"n\\":%msg%}}")
action(
    type="omelasticsearch"
    server=["{address}/elastic"]
    uid="shop"
    pwd="{token}"
    searchIndex="logs"
    searchType=""
    template="document"
    bulkmode="on"
    action.resumeRetryCount="-1"
    action.resumeInterval="1"
)
"""
(folder / "rsyslog.conf").write_text(CONFIG)


def waiting() -> bool:
    """Tells if messages wait, as far as rsyslog's last statistics know."""
    stats = (folder / "stats").read_text().splitlines() if (folder / "stats").exists() else []
    last = [json.loads(line[line.index("{") :]) for line in stats]
    queue = [one for one in last if one["name"] == "main Q"][-1:]
    return not queue or queue[0]["enqueued"] < count or queue[0]["size"] > 0


arguments = ["-n", "-f", folder / "rsyslog.conf", "-i", folder / "pid"]
with subprocess.Popen([rsyslogd, *arguments], stdin=subprocess.DEVNULL) as process:
    deadline = time.monotonic() + 60
    while True:
        try:
            sender = socket.create_connection(("127.0.0.1", port), 5)
            break
        except OSError:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
    with sender:
        for n in range(count):
            sender.sendall(b"<14>1 2026-01-01T00:00:00Z host shop - - - %d\n" % n)
            if n == count // 2:
                print("half", flush=True)
            if n % 20 == 0:
                time.sleep(0.01)
    deadline = time.monotonic() + 90
    while waiting() and time.monotonic() < deadline:
        time.sleep(0.2)
    process.terminate()
    sys.exit(process.wait(90))
