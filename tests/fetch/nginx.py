"""A real nginx, as a server that is not ours: ranges, validators, compression, redirects."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from typing import TYPE_CHECKING

import pytest

from ingestd.prove.servers import free_port

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

NGINX = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/usr/local/sbin")
needs_nginx = pytest.mark.skipif(NGINX is None, reason="nginx is not installed")

_CONFIG = """
daemon off;
worker_processes 1;
pid {folder}/nginx.pid;
error_log {folder}/error.log;
events {{ worker_connections 64; }}
http {{
  log_format asked '$status $uri "$http_range" "$http_if_range" "$sent_http_content_encoding"';
  access_log {folder}/access.log asked;
  client_body_temp_path {folder}/t1; proxy_temp_path {folder}/t2; fastcgi_temp_path {folder}/t3;
  uwsgi_temp_path {folder}/t4; scgi_temp_path {folder}/t5;
  types {{ application/x-ndjson ndjson; application/gzip gz; }}
  server {{
    listen 127.0.0.1:{port};
    root {folder}/www;
    location /slow/ {{ alias {folder}/www/; limit_rate {rate}; }}
    location /packed/ {{ alias {folder}/www/; gzip on; gzip_types *; gzip_min_length 1; }}
    location /moved/ {{ return 302 /slow/; }}
    location /old.ndjson {{ return 301 /new.ndjson; }}
    location /loop {{ return 302 /loop; }}
  }}
}}
"""


class Nginx:
    """One nginx that runs until it is stopped; serves `www`."""

    def __init__(self, folder: Path, rate: str = "400k") -> None:
        self.folder = folder
        self.www = folder / "www"
        self.www.mkdir(exist_ok=True)
        self.port = free_port()
        self.rate = rate
        self.url = f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        config = self.folder / "nginx.conf"
        text = _CONFIG.format(folder=self.folder, port=self.port, rate=self.rate)
        config.write_text(("user root;" if os.getuid() == 0 else "") + text)
        self._process = subprocess.Popen(
            [str(NGINX), "-p", str(self.folder), "-c", str(config)],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        deadline = time.monotonic() + 60
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port)):
                return
            assert self._process.poll() is None, (self.folder / "error.log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def kill(self) -> None:
        """Ends it with its worker, at once: connections break."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    @property
    def asked(self) -> list[list[str]]:
        """A line a request that has ended: status, path, range, condition, encoding."""
        lines = (self.folder / "access.log").read_text().splitlines()
        return [[part.strip('"') for part in line.split(" ", 4)] for line in lines]


@contextlib.contextmanager
def serving_files(folder: Path, **more: str) -> Iterator[Nginx]:
    folder.mkdir()
    nginx = Nginx(folder, **more)
    nginx.start()
    try:
        yield nginx
    finally:
        nginx.kill()
