"""client.py file FILE [PORT] [TOKEN]: posts a file's lines; prints the statuses that were answered.

client.py loop FILE: posts numbers, each on a connection of its own, until standard input ends; the
file grows with each that is accepted. Prints how often each outcome came, as JSON.
"""

import collections
import http.client
import json
import pathlib
import select
import sys


def post(body: bytes, port: int = 8080, token: str = "") -> int:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        connection.request("POST", "/v1/records", body, headers)
        return connection.getresponse().status
    finally:
        connection.close()


def post_file(path: str, port: str = "8080", token: str = "") -> None:
    lines = pathlib.Path(path).read_bytes().splitlines(keepends=True)
    bodies = [b"".join(lines[first : first + 100]) for first in range(0, len(lines), 100)]
    print(*sorted({post(body, int(port), token) for body in bodies}))


def post_on(path: str) -> None:
    seen: collections.Counter[str] = collections.Counter()
    number = 0
    while not select.select([sys.stdin], [], [], 0)[0]:
        number += 1
        try:
            status = post(b"%d\n" % number)
            seen[str(status)] += 1
            if status == 202:
                with pathlib.Path(path).open("ab") as accepted:
                    accepted.write(b".")
        except Exception as error:
            seen[f"{type(error).__name__}: {error}"] += 1
    print(json.dumps(seen))


if __name__ == "__main__":
    {"file": post_file, "loop": post_on}[sys.argv[1]](*sys.argv[2:])
