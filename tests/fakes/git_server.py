"""GitHub's side of git for the tests: `git http-backend` behind HTTP, packs streamed both ways."""

from __future__ import annotations

import base64
import contextlib
import os
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from http.server import ThreadingHTTPServer
from typing import Any
from typing import NamedTuple


class Seen(NamedTuple):
    method: str
    path: str
    headers: dict[str, str]


class GitServer(ThreadingHTTPServer):
    """`with GitServer(root, token)`: the bare repositories below `root`, for who has the token."""

    daemon_threads = True

    def __init__(self, root: str, token: str) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://localhost:{self.server_port}"
        self.root = root
        self.right_token = token
        self.open: list[socket.socket] = []
        self.reset()
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def reset(self) -> None:
        """As new, for the next test."""
        self.token = self.right_token
        self.seen: list[Seen] = []
        self.cut = False  # the connection, in place of an answer to a push
        self.redirect = ""  # where every request is sent instead
        self.delay = 0.0  # seconds from a request to its answer

    def process_request(self, request: Any, client_address: Any) -> None:
        self.open.append(request)
        super().process_request(request, client_address)

    def drop_connections(self) -> None:
        """Close what is open, as a server does after a while."""
        while self.open:
            with contextlib.suppress(OSError):
                self.open.pop().shutdown(socket.SHUT_RDWR)

    def handle_error(self, *_: object) -> None:
        """A client that has gone is no error here."""

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: GitServer

    def log_message(self, *_: object) -> None:
        pass

    def body(self) -> Iterator[bytes]:
        if self.headers.get("Transfer-Encoding") != "chunked":
            left = int(self.headers.get("Content-Length") or 0)
            while left:
                data = self.rfile.read(min(left, 1 << 16))
                left -= len(data)
                yield data
            return
        while size := int(self.rfile.readline(), 16):
            yield self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()

    def handle_any(self) -> None:
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.server.seen.append(Seen(self.command, self.path, headers))
        user = base64.b64encode(f"x-access-token:{self.server.token}".encode()).decode()
        if headers.get("authorization") != f"Basic {user}":
            self.send_response(401)
            self.send_header("Content-Length", "0")
            return self.end_headers()
        if self.server.redirect:
            self.send_response(301)
            self.send_header("Location", self.server.redirect)
            self.send_header("Content-Length", "0")
            return self.end_headers()
        path, _, query = self.path.partition("?")
        env = {**os.environ, "GIT_PROJECT_ROOT": self.server.root, "GIT_HTTP_EXPORT_ALL": "1",
               "PATH_INFO": path, "QUERY_STRING": query, "REQUEST_METHOD": self.command,
               "REMOTE_USER": "x", "CONTENT_TYPE": headers.get("content-type", ""),
               "GIT_PROTOCOL": headers.get("git-protocol", ""),
               "HTTP_CONTENT_ENCODING": headers.get("content-encoding", "")}  # fmt: skip
        with subprocess.Popen(
            ["git", "http-backend"],
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        ) as child:
            assert child.stdin and child.stdout
            for data in self.body():
                child.stdin.write(data)
            child.stdin.close()
            time.sleep(self.server.delay)
            if self.server.cut and path.endswith("/git-receive-pack"):
                self.close_connection = True
                return None
            status, lines = "200", []
            while line := child.stdout.readline().decode().strip():
                name, _, value = line.partition(": ")
                if name == "Status":
                    status = value.split()[0]
                else:
                    lines.append((name, value))
            self.send_response(int(status))
            for name, value in lines:
                self.send_header(name, value)
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            while data := child.stdout.read(1 << 16):
                self.wfile.write(b"%x\r\n%b\r\n" % (len(data), data))
            self.wfile.write(b"0\r\n\r\n")
        return None

    do_GET = do_POST = handle_any
