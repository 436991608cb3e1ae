"""Sends logs through rotel, an agent: ADDRESS COUNT; see `tests/clients/harness.py`.

rotel is started with the arguments of `docs/clients/opentelemetry.md`, gets log records over OTLP
as a program beside it would send them, and is ended once it has delivered them.
"""

import http.client
import json
import shlex
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import rotel

RETRY_SECONDS = 1
address, count = sys.argv[1], int(sys.argv[2])
page = Path(__file__).resolve().parents[3] / "docs" / "clients" / "opentelemetry.md"
shown = page.read_text().partition("<!-- client: rotel -->\n```sh\n")[2].partition("```")[0]
with socket.socket() as one, socket.socket() as two:
    for each in (one, two):
        each.bind(("127.0.0.1", 0))
    port, grpc = one.getsockname()[1], two.getsockname()[1]
command = shlex.split(shown.replace("\\\n", " ").replace("127.0.0.1:4318", f"127.0.0.1:{port}"))
command = [part.replace("http://127.0.0.1:8080", address) for part in command]
command[0] = str(Path(rotel.__file__).parent / "rotel-agent")
command += ["--otlp-grpc-endpoint", f"127.0.0.1:{grpc}", "--logs-batch-max-size", "20"]
command += ["--otlp-exporter-retry-initial-backoff", "500ms"]
command += ["--otlp-exporter-retry-max-backoff", f"{RETRY_SECONDS}s"]


def send(numbers: list[int]) -> None:
    records = [
        {
            "body": {"stringValue": f"order {n}"},
            "attributes": [{"key": "n", "value": {"intValue": n}}],
        }
        for n in numbers
    ]
    body = json.dumps({"resourceLogs": [{"scopeLogs": [{"logRecords": records}]}]})
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("POST", "/v1/logs", body, {"Content-Type": "application/json"})
    answer = connection.getresponse()
    assert answer.status == 200, (answer.status, answer.read())
    connection.close()


with subprocess.Popen(
    command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
) as agent:
    said = [time.monotonic()]

    def read() -> None:
        """It says nothing of what it has delivered; each try that failed is a line."""
        for line in agent.stdout:
            said.append(time.monotonic())
            print(line, end="", flush=True)

    reader = threading.Thread(target=read)
    reader.start()
    try:
        for _ in range(1200):
            try:
                send([0])
                break
            except ConnectionRefusedError:
                time.sleep(0.05)
        for first in range(0, count, 20):
            send(list(range(first, first + 20)))
            if first == count // 2:
                print("half", flush=True)
        # It drops what it has not delivered when it is ended.
        while time.monotonic() - said[-1] < 6 * RETRY_SECONDS:
            time.sleep(0.1)
    finally:
        agent.terminate()
        agent.wait(60)
        reader.join(60)
