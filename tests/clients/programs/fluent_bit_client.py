"""Sends with an output of Fluent Bit: FLUENT_BIT ADDRESS COUNT OUTPUT [KEY=VALUE …]."""

import json
import subprocess
import sys
import time

binary, address, count, output, *options = sys.argv[1:]
host, _, port = address.removeprefix("http://").rpartition(":")
command = [binary, "-f", "0.2", "-i", "stdin", "-o", output, "-m", "*"]
for option in (f"host={host}", f"port={port}", "retry_limit=no_limits", *options):
    command += ["-p", option]
with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=sys.stderr) as process:
    for n in range(int(count)):
        process.stdin.write(json.dumps({"n": n, "text": "an event"}).encode() + b"\n")
        process.stdin.flush()
        time.sleep(0.002)
        if n == int(count) // 2:
            print("half", flush=True)
    process.stdin.close()
    sys.exit(process.wait())
