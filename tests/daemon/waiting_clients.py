"""waiting_clients.py PORT COUNT: connects so often and sends a request on each connection; says
`sent`, waits for the end of standard input, then prints how often each outcome came, as JSON.
"""

import collections
import json
import socket
import sys

HEAD = b"POST /v1/records HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
REQUEST = HEAD + b"Content-Length: %d\r\n\r\n%s"


def send(port: int, number: int) -> socket.socket:
    sock = socket.create_connection(("127.0.0.1", port), 60)
    body = b"%d" % number
    sock.sendall(REQUEST % (len(body), body))
    return sock


def outcome(sock: socket.socket) -> str:
    try:
        return sock.recv(65536).split(b" ", 2)[1].decode()
    except OSError as error:
        return type(error).__name__
    finally:
        sock.close()


if __name__ == "__main__":
    socks = [send(int(sys.argv[1]), number) for number in range(int(sys.argv[2]))]
    print("sent", flush=True)
    sys.stdin.read()
    print(json.dumps(collections.Counter(map(outcome, socks))))
