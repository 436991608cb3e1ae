"""Requests that two servers in a row could read differently, and others that are not HTTP/1.1."""

from __future__ import annotations

HOST = b"Host: localhost\r\n"
CHUNKED = b"Transfer-Encoding: chunked\r\n"
LINE = b"POST /v1/records HTTP/1.1\r\n"
SMUGGLED = (
    b"POST /v1/records HTTP/1.1\r\nHost: localhost\r\nContent-Length: 10\r\n\r\n"
    b'"smuggled"'
)  # fmt: skip


def head(more: bytes, body: bytes = b"1") -> bytes:
    return LINE + HOST + more + b"\r\n" + body


def coding(value: bytes, body: bytes = b"1\r\n1\r\n0\r\n\r\n") -> bytes:
    return head(b"Transfer-Encoding:" + value + b"\r\n", body)


def length(value: bytes, body: bytes = b"1") -> bytes:
    return head(b"Content-Length:" + value + b"\r\n", body)


def chunks(body: bytes) -> bytes:
    return head(CHUNKED, body)


def with_length(before: bytes, after: bytes = b"") -> bytes:
    """Another request line or header, and a body of one byte."""
    return before + after + b"Content-Length: 1\r\n\r\n1"


REFUSED: dict[str, bytes] = {
    # -- two lengths
    "length and coding": head(b"Content-Length: 5\r\n" + CHUNKED, b"0\r\n\r\n"),
    "coding and length": head(CHUNKED + b"Content-Length: 5\r\n", b"0\r\n\r\n"),
    "the same length twice": head(b"Content-Length: 1\r\n" * 2),
    "two lengths": head(b"Content-Length: 1\r\nContent-Length: 2\r\n"),
    "coding twice": head(CHUNKED * 2, b"0\r\n\r\n"),
    "coding and identity": head(CHUNKED + b"Transfer-Encoding: identity\r\n", b"0\r\n\r\n"),
    "coding in HTTP/1.0": b"POST /v1/records HTTP/1.0\r\n" + CHUNKED + b"\r\n0\r\n\r\n",
    "coding in HTTP/1.0, kept alive": (
        b"POST /v1/records HTTP/1.0\r\nConnection: keep-alive\r\n"
        + CHUNKED
        + b"\r\n1\r\n1\r\n0\r\n\r\n"
    ),
    # -- Content-Length
    **{
        f"length {value!r}": length(value)
        for value in (b" +1", b" -1", b" 1,1", b" 1, 1", b" 1 1", b"", b" 0x1", b" 1.0", b" 1_0",
                      b" \xd9\xa1", b" 99999999999999999999", b" 18446744073709551617", b" 1;a",
                      b' "1"', b" 1\x0b", b" \xa01")
    },
    # -- Transfer-Encoding
    **{
        f"coding {value!r}": coding(value)
        for value in (b" xchunked", b" chunkedx", b" chunked, identity", b" identity, chunked",
                      b" gzip, chunked", b" chunked, chunked", b" identity", b" gzip", b"",
                      b" \x0bchunked", b" \x0cchunked", b" \xa0chunked", b" chunked\x0b",
                      b' "chunked"', b" chunked;a=b", b" ,chunked", b" chunked,", b" chun ked",
                      b" chunk\xc3\xa9d", b"\r\n chunked", b" chunked\r\n ,identity")
    },
    # -- Host
    "no host": with_length(LINE),
    "two hosts": head(b"Host: y\r\nContent-Length: 1\r\n"),
    **{
        f"host {value!r}": with_length(LINE + b"Host: " + value + b"\r\n")
        for value in (b"a b", b"a, b", b"a/b", b"u@a", b"a?b", b"a#b", b"a\\b", b"\xc3\xa9", b"<a>")
    },
    # -- line ends
    "bare LF, everywhere": head(b"Content-Length: 1\r\n").replace(b"\r\n", b"\n"),
    "bare LF after a header": with_length(LINE, b"Host: localhost\n"),
    "bare LF after the request line": with_length(LINE.replace(b"\r\n", b"\n"), HOST),
    "bare LF at the end": LINE + HOST + b"Content-Length: 1\r\n\n1",
    "bare CR in a value": head(b"X: a\rb\r\nContent-Length: 1\r\n"),
    "bare CR as a line end": head(b"X: a\rContent-Length: 5\r\nContent-Length: 1\r\n"),
    "bare CR at the end": LINE + HOST + b"Content-Length: 1\r\n\r1",
    "a folded line": head(b"X: a\r\n b\r\nContent-Length: 1\r\n"),
    "a folded line, with a tab": head(b"X: a\r\n\tb\r\nContent-Length: 1\r\n"),
    "a folded length": head(b"Content-Length:\r\n 1\r\n"),
    # -- chunks
    **{
        f"chunk size {value!r}": chunks(value + b"\r\n1\r\n0\r\n\r\n")
        for value in (b"0x1", b"+1", b"-1", b"1_0", b" 1", b"1 ", b"\t1", b"1\t", b"", b";a",
                      b"1 ;a", b"g", b"1,1", b"1.", b"\xd9\xa1", b"f" * 17,
                      b"10000000000000001", b"1\n", b"1\r", b"1;a\nb", b"1;a\rb", b"1;a\0b",
                      b'1;a="\nb"')
    },
    "chunk ended by LF": chunks(b"1\r\n1\n0\r\n\r\n"),
    "chunk without an end": chunks(b"1\r\n10\r\n\r\n"),
    "chunk that is longer than its size": chunks(b"1\r\n12\r\n0\r\n\r\n"),
    "last chunk ended by LF": chunks(b"1\r\n1\r\n0\n\n"),
    "trailers ended by LF": chunks(b"1\r\n1\r\n0\r\n\n"),
    "trailer with a length": chunks(b"1\r\n1\r\n0\r\nContent-Length: 5\r\n\r\n"),
    "trailer with a coding": chunks(b"1\r\n1\r\n0\r\nTransfer-Encoding: chunked\r\n\r\n"),
    # -- header names and values
    "space before the colon": head(b"Content-Length : 1\r\n"),
    "space before the other colon": head(b"Transfer-Encoding : chunked\r\nContent-Length: 1\r\n"),
    "tab before the colon": head(b"Transfer-Encoding\t: chunked\r\nContent-Length: 1\r\n"),
    "space before the first header": with_length(LINE + b" X: a\r\n", HOST),
    "space before the host": with_length(LINE, b" Host: localhost\r\n"),
    **{
        f"header {value!r}": head(value + b"\r\nContent-Length: 1\r\n")
        for value in (b"X\0: 1", b"X\xff: 1", b"X(: 1", b": 1", b"X", b"X: a\0b", b"X: a\x01b",
                      b"X: a\x7fb", b"X\x0b: 1", b'"X": 1')
    },
    # -- request lines
    "white space before the request": b" \r\n" + head(b"Content-Length: 1\r\n"),
    "HTTP/0.9": b"GET /v1/records\r\n\r\n",
    "HTTP/0.9 with POST": b"POST /v1/records\r\n\r\n",
    **{
        f"version {value!r}": with_length(LINE.replace(b"HTTP/1.1", value), HOST)
        for value in (b"HTTP/0.9", b"HTTP/1.2", b"HTTP/2.0", b"HTTP/3", b"HTTP/1.10", b"HTTP/1.",
                      b"http/1.1", b"HTTP/1.1 ", b"HTTP/+1.1", b"ICAP/1.0", b"HTTPS/1.1")
    },
    **{
        f"method {value!r}": with_length(LINE.replace(b"POST", value), HOST)
        for value in (b"post", b"P\xffST", b"P(ST", b"A" * 5000, b"\0POST", b"POST\t")
    },
    **{
        f"target {value!r}": with_length(LINE.replace(b"/v1/records", value), HOST)
        for value in (b"/v1/rec\0ords", b"/v1/rec\xff", b"/v1/rec\xc3\xa9", b"x:80", b"http://[",
                      b"http://x:99999/v1/records", b"*", b"v1/records", b"\\v1\\records", b"http:")
    },
    # -- not HTTP/1.1 at all
    "the preface of HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "a TLS hello": b"\x16\x03\x01\x00\xa5\x01\x00\x00\xa1\x03\x03" + b"a" * 100,
    "SMTP": b"EHLO x\r\n",
    "NULs": b"\0" * 100,
    "noise": bytes(range(256)),
}  # fmt: skip
"""Each is answered 400, and its connection is closed."""

REFUSED_OTHERWISE: dict[str, tuple[int, bytes]] = {
    "CONNECT": (404, b"CONNECT x:80 HTTP/1.1\r\nHost: localhost:80\r\n\r\n"),
    "CONNECT with a path": (405, b"CONNECT /v1/records HTTP/1.1\r\n" + HOST + b"\r\n"),
    "Upgrade": (
        405,
        b"GET /v1/records HTTP/1.1\r\nConnection: upgrade\r\nUpgrade: websocket\r\n"
        + HOST
        + b"\r\n",
    ),
    "a length that is too large": (413, length(b" 18446744073709551615")),
    "another expectation": (417, head(b"Expect: x\r\nContent-Length: 1\r\n")),
    "a long target": (431, b"POST /" + b"x" * 9000 + b" HTTP/1.1\r\n" + HOST + b"\r\n"),
    "a long header": (431, head(b"X: " + b"x" * 9000 + b"\r\nContent-Length: 1\r\n")),
    "a long name": (431, head(b"X" * 9000 + b": x\r\nContent-Length: 1\r\n")),
    "many headers": (431, head(b"X: 1\r\n" * 200 + b"Content-Length: 1\r\n")),
    "many trailers": (431, chunks(b"1\r\n1\r\n0\r\n" + b"X: 1\r\n" * 200 + b"\r\n")),
    "a long trailer": (431, chunks(b"1\r\n1\r\n0\r\nX: " + b"x" * 9000 + b"\r\n\r\n")),
}
"""The same with another answer."""

TAKEN_ALONE: dict[str, bytes] = {
    "trailers": chunks(b"1\r\n1\r\n0\r\nX-Request-Id: leaked\r\n\r\n"),
    "a trailer with a key": chunks(b"1\r\n1\r\n0\r\nIdempotency-Key: leaked\r\n\r\n"),
    "an extension at the end": chunks(b"1\r\n1\r\n0;a=b\r\n\r\n"),
    "an Upgrade with a body": head(
        b"Connection: upgrade\r\nUpgrade: websocket\r\nContent-Length: 1\r\n"
    ),
    "an Upgrade to HTTP/2": head(
        b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: A\r\n"
        b"Content-Length: 1\r\n"
    ),
}
"""Answered 202; what stands behind them is not read, and the connection is closed."""
