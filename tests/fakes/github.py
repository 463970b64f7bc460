"""GitHub's API and login as the tests of github_app_token.py need them, on loopback.

An App is installed for one owner; its tokens, the user's and their refreshes are kept as GitHub
keeps them: a refresh token works once. `on(path, reply…)` answers a path otherwise: one reply a
request, the last one again and again. Every request is kept in `seen`.
"""

from __future__ import annotations

import base64
import json
import os
import re
import ssl
import subprocess
import threading
import time
import urllib.parse
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler
from http.server import ThreadingHTTPServer
from typing import Any
from typing import NamedTuple

LEVELS = {"read": 0, "write": 1, "admin": 2}


class Reply(NamedTuple):
    status: int
    value: Any = None
    headers: tuple[tuple[str, str], ...] = ()
    then: str = ""  # "hang" before the head; after it "slow" (a byte at a time) or "cut"


class Seen(NamedTuple):
    method: str
    path: str
    authorization: str
    body: Any


def error(status: int, message: str, **headers: str) -> Reply:
    pairs = tuple((name.replace("_", "-"), value) for name, value in headers.items())
    return Reply(status, {"message": message}, pairs)


class GitHub(ThreadingHTTPServer):
    """`with GitHub() as github:`; its settings may be changed at any time."""

    daemon_threads = True

    def __init__(self, tls: ssl.SSLContext | None = None) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        if tls:
            self.socket = tls.wrap_socket(self.socket, server_side=True)
        self.url = f"http{'s' if tls else ''}://localhost:{self.server_port}"
        self.go = threading.Event()
        self.reset()
        self.changed = threading.Lock()
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def reset(self) -> None:
        """As it is at the beginning: for the next test."""
        self.repos = {"octo/widgets": 11, "octo/other": 12}
        self.selected = {11}
        self.permissions = {"contents": "write", "issues": "write", "pull_requests": "write",
                            "checks": "read", "metadata": "read"}  # fmt: skip
        self.clock = 0.0  # ahead of ours by
        self.life = 3600.0
        self.suspended = False
        self.renamed: dict[str, str] = {}
        self.seen: list[Seen] = []
        self.replies: dict[str, list[Reply]] = {}
        self.tokens: dict[str, float] = {}  # live ones, and until when
        self.refresh_tokens: set[str] = set()
        self.device_scope = {11}
        self.git_root = ""  # bare repositories, served at OWNER/NAME.git
        self.pending = 0  # polls before the code is entered
        self.count = 0
        self.public = True  # who is nobody can read of a repository
        self.go.set()  # what hangs still belongs to another test
        self.hangs, self.go = threading.Event(), threading.Event()

    def handle_error(self, *_: object) -> None:
        """A client that has gone is no error here."""

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()

    def on(self, path: str, *replies: Reply) -> None:
        self.replies[path] = list(replies)

    def paths(self, method: str = "") -> list[str]:
        return [x.path for x in self.seen if not method or x.method == method]

    def now(self) -> float:
        return time.time() + self.clock

    def new_token(self, prefix: str) -> str:
        self.count += 1
        return f"{prefix}{self.count:04d}.eyJ-_{'x' * 480}-{self.count:04d}"

    def answer(self, method: str, path: str, token: str, body: Any) -> Reply:
        for pattern, replies in self.replies.items():
            if re.fullmatch(pattern, path.partition("?")[0]):
                return replies.pop(0) if len(replies) > 1 else replies[0]
        path = path.partition("?")[0]
        if path.startswith("/login/"):
            return self.login(path, body)
        path = path.replace("/api/v3", "", 1)
        if path == "/credentials/revoke":
            for one in body["credentials"]:
                self.tokens.pop(one, None)
                self.refresh_tokens.discard(one)
            return Reply(202, {})
        if path.startswith("/repos") and path.count("/") in (2, 3) and not token:
            return self.read(path)
        if token.startswith("eyJ"):
            return self.app(path, token, body)
        if self.tokens.get(token, 0) < self.now():
            return error(401, "Bad credentials")
        return self.with_token(method, path, token)

    def read(self, path: str) -> Reply:
        """A repository, by its name or its number; a name that was changed leads to the number."""
        old = self.renamed.get(path[7:])
        if old:
            target = f"{self.url}/api/v3/repositories/{self.repos[old]}"
            return Reply(301, {}, (("Location", target),))
        for name, number in self.repos.items():
            if self.public and path in (f"/repos/{name}", f"/repositories/{number}"):
                return Reply(200, {"id": number, "full_name": name})
        return error(404, "Not Found")

    def app(self, path: str, jwt: str, body: Any) -> Reply:
        claims = json.loads(base64.urlsafe_b64decode(jwt.split(".")[1] + "=="))
        if claims["iat"] > self.now():
            return error(
                401,
                "'Issued at' claim ('iat') must be an Integer representing the time that the assertion was issued",
            )
        if not self.now() < claims["exp"] <= self.now() + 600:
            return error(401, "'Expiration time' claim ('exp') is too far in the future")
        suspended = "2026-01-01T00:00:00Z" if self.suspended else None
        installation = {"id": 7, "app_slug": "our-app", "permissions": self.permissions,
                        "repository_selection": "selected", "suspended_at": suspended,
                        "html_url": "https://github.com/settings/installations/7"}  # fmt: skip
        if path == "/app":
            return Reply(200, {"slug": "our-app"})
        if path == "/users/octo/installation":
            return Reply(200, installation)
        match = re.fullmatch(r"/repos/([^/]+/[^/]+)/installation", path)
        if match and match[1] in self.renamed:
            number = self.repos[self.renamed[match[1]]]
            target = f"{self.url}/api/v3/repositories/{number}/installation"
            return Reply(301, {}, (("Location", target),))
        if match:
            known = self.repos.get(match[1]) in self.selected
            return Reply(200, installation) if known else error(404, "Not Found")
        if path == "/app/installations/7/access_tokens":
            return self.grant(body)
        return error(404, "Not Found")

    def grant(self, body: Any) -> Reply:
        by_name = {name.split("/")[1]: id for name, id in self.repos.items()}
        ids = set(
            body.get("repository_ids") or [by_name.get(n) for n in body.get("repositories", [])]
        )
        if not ids <= self.selected:
            return error(
                422,
                "There is at least one repository that does not exist or is not accessible to the parent installation.",
            )
        asked = body.get("permissions", self.permissions)
        if any(
            LEVELS[level] > LEVELS.get(self.permissions.get(name, ""), -1)
            for name, level in asked.items()
        ):
            return error(422, "The permissions requested are not granted to this installation.")
        token = self.new_token("ghs_")
        self.tokens[token] = self.now() + self.life
        stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self.tokens[token]))
        repositories = [
            {"id": id, "full_name": name} for name, id in self.repos.items() if id in ids
        ]
        return Reply(201, {"token": token, "expires_at": stamp, "permissions": {**asked, "metadata": "read"},
                           "repository_selection": "selected", "repositories": repositories})  # fmt: skip

    def with_token(self, method: str, path: str, token: str) -> Reply:
        if (method, path) == ("DELETE", "/installation/token"):
            del self.tokens[token]
            return Reply(204)
        if path == "/user":
            return Reply(200, {"login": "hubot"})
        if path == "/user/installations":
            return Reply(200, {"installations": [{"id": 7}]})
        if path == "/user/installations/7/repositories":
            names = {id: name for name, id in self.repos.items()}
            found = [{"id": id, "full_name": names.get(id, f"o/{id}")} for id in self.device_scope]
            return Reply(200, {"repositories": found})
        return error(404, "Not Found")

    def login(self, path: str, form: dict[str, str]) -> Reply:
        if path == "/login/device/code" and form.get("client_id", "Iv").isdecimal():
            return Reply(404, {"error": "Not Found"})
        if path == "/login/device/code":
            return Reply(200, {"device_code": "d" * 40, "user_code": "ABCD-1234", "expires_in": 900,
                               "interval": 5, "verification_uri": f"{self.url}/login/device"})  # fmt: skip
        if form["grant_type"] == "refresh_token":
            if form["refresh_token"] not in self.refresh_tokens:
                return Reply(200, {"error": "bad_refresh_token"})
            self.refresh_tokens.clear()
            self.tokens.clear()  # the old access token dies with it
        elif self.pending:
            self.pending -= 1
            return Reply(200, {"error": "authorization_pending"})
        token, refresh = self.new_token("ghu_"), self.new_token("ghr_")
        self.tokens[token] = self.now() + 28800
        self.refresh_tokens.add(refresh)
        return Reply(200, {"access_token": token, "expires_in": 28800, "refresh_token": refresh,
                           "refresh_token_expires_in": 15897600, "token_type": "bearer", "scope": ""})  # fmt: skip


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: GitHub

    def log_message(self, *_: object) -> None:
        pass

    def date_time_string(self, timestamp: float | None = None) -> str:
        return formatdate(self.server.now(), usegmt=True)

    def git(self) -> None:
        """git's own server for a repository, to who has a live token."""
        _, _, encoded = self.headers.get("Authorization", "").partition(" ")
        password = base64.b64decode(encoded).decode().partition(":")[2]
        self.server.seen.append(Seen(self.command, self.path, password, None))
        if self.server.tokens.get(password, 0) < self.server.now():
            self.send_response(401)
            self.send_header("WWW-Authenticate", 'Basic realm="GitHub"')
            self.send_header("Content-Length", "0")
            return self.end_headers()
        path, _, query = self.path.partition("?")
        env = {**os.environ, "GIT_PROJECT_ROOT": self.server.git_root, "GIT_HTTP_EXPORT_ALL": "1",
               "PATH_INFO": path, "QUERY_STRING": query, "REQUEST_METHOD": self.command, "REMOTE_USER": "x",
               "CONTENT_TYPE": self.headers.get("Content-Type", "")}  # fmt: skip
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        done = subprocess.run(
            ["git", "http-backend"], env=env, input=body, capture_output=True, check=True
        )
        head, _, data = done.stdout.partition(b"\r\n\r\n")
        self.send_response(200)
        for line in head.decode().split("\r\n"):
            self.send_header(*line.split(": ", 1))
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
        return None

    def handle_any(self) -> None:
        if self.server.git_root and ".git/" in self.path:
            return self.git()
        raw = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        kind = self.headers.get("Content-Type", "")
        body: Any = (
            dict(urllib.parse.parse_qsl(raw.decode()))
            if "form" in kind
            else json.loads(raw or b"null")
        )
        authorization = self.headers.get("Authorization", "")
        with self.server.changed:
            self.server.seen.append(Seen(self.command, self.path, authorization, body))
            reply = self.server.answer(
                self.command, self.path, authorization.partition(" ")[2], body
            )
        data = reply.value if isinstance(reply.value, bytes) else json.dumps(reply.value).encode()
        data = b"" if reply.value is None else data
        if reply.then == "hang":
            self.server.hangs.set()
            self.server.go.wait(30)
        self.send_response(reply.status)
        for name, value in reply.headers:
            self.send_header(name, value)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if reply.then == "cut":
            self.close_connection = True
            data = data[:5]
        for byte in data if reply.then == "slow" else b"":
            self.wfile.write(bytes([byte]))
            time.sleep(0.3)
        self.wfile.write(b"" if reply.then == "slow" else data)
        return None

    do_GET = do_POST = do_DELETE = handle_any
