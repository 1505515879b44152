"""An nginx with a throw-away certificate, as the server that no client of ours was made for."""

from __future__ import annotations

import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.unit.https import make_certificate

CONFIGURATION = """
daemon off;
worker_processes auto;
pid {folder}/pid;
error_log {folder}/error.log;
user root;
events {{}}
http {{
  access_log off;
  sendfile on;
  client_body_temp_path {folder}/t1; proxy_temp_path {folder}/t2; fastcgi_temp_path {folder}/t3;
  uwsgi_temp_path {folder}/t4; scgi_temp_path {folder}/t5;
  server {{
    listen 127.0.0.1:{port} ssl;
    ssl_certificate {certificate};
    ssl_certificate_key {key};
    root {root};
  }}
}}
"""
START_TIMEOUT_S = 10.0


@contextmanager
def serving(root: Path, folder: Path) -> Iterator[tuple[str, Path]]:
    """Serve `root` for the block, with what nginx needs in `folder`; yield its address and the certificate."""
    certificate, key = make_certificate(folder)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    configuration = folder / "nginx.conf"
    configuration.write_text(
        CONFIGURATION.format(folder=folder, port=port, certificate=certificate, key=key, root=root)
    )
    argv = ["setpriv", "--pdeathsig", "TERM", "nginx", "-c", str(configuration), "-e", str(folder / "error.log")]
    process = subprocess.Popen(argv)
    try:
        _wait_for(port, process)
        yield f"127.0.0.1:{port}", certificate
    finally:
        process.terminate()
        process.wait(20)


def _wait_for(port: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            socket.create_connection(("127.0.0.1", port)).close()
        except ConnectionRefusedError:
            time.sleep(0.05)
        else:
            return
    raise RuntimeError("nginx does not listen")
