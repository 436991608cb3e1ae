"""client.py file FILE [PORT] [TOKEN]: posts a file's lines; prints the statuses that were answered.

client.py loop FILE: posts numbers, each on a connection of its own, until standard input ends; the
file grows with each that is accepted. Prints how often each outcome came, as JSON.

client.py times N: the same with the numbers from 1 to N, and without a file.
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


def outcome(number: int) -> str:
    try:
        return str(post(b"%d\n" % number))
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def post_on(path: str) -> None:
    seen: collections.Counter[str] = collections.Counter()
    while not select.select([sys.stdin], [], [], 0)[0]:
        came = outcome(seen.total() + 1)
        seen[came] += 1
        if came == "202":
            with pathlib.Path(path).open("ab") as accepted:
                accepted.write(b".")
    print(json.dumps(seen))


def post_times(count: str) -> None:
    print(json.dumps(collections.Counter(outcome(number + 1) for number in range(int(count)))))


if __name__ == "__main__":
    {"file": post_file, "loop": post_on, "times": post_times}[sys.argv[1]](*sys.argv[2:])
