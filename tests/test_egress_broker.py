"""The broker of the model's credential, as a process between a client and an upstream."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import unittest
from pathlib import Path
from typing import Any

from lima import egress
from tests.egress_world import Egress
from tests.egress_world import Server
from tests.egress_world import read_all
from tests.support import ROOT
from tests.support import wait_for

PLACEHOLDER = "sk-ant-oat01-placeholder-0123456789"
SECRET = "sk-ant-oat01-the-real-one-abcdefghij"


def line(header: str = "authorization", **more: str) -> str:
    return json.dumps({"placeholder": PLACEHOLDER, "credential": SECRET, "header": header, **more})


def request(
    method: str = "POST", path: str = "/v1/messages?beta=true", *headers: str, body: str = "{}"
) -> bytes:
    given = headers or (f"Authorization: Bearer {PLACEHOLDER}",)
    lines = [f"{method} {path} HTTP/1.1", "Host: 127.0.0.1", *given, f"Content-Length: {len(body)}"]
    return "\r\n".join([*lines, "", body]).encode()


def answer(client: socket.socket, first: bytes) -> None:
    client.sendall(
        b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\nRequest-Id: r\r\n"
        b"anthropic-ratelimit-requests-limit: 4\r\nSet-Cookie: s=1\r\nConnection: keep-alive\r\n\r\n{}"
    )


class BrokerTest(unittest.TestCase):
    def start(self, story: Any = answer, given: str = "", prefix: str = "", **more: Any) -> Egress:
        self.server = Server(story)
        self.addCleanup(self.server.close)
        url = f"http://127.0.0.1:{self.server.port}{prefix}"
        argv = ("--broker", "anthropic", "--upstream", url)
        running = Egress(*argv, line=given or line(), **more)
        self.addCleanup(running.stop)
        return running

    def test_the_credential_is_put_in(self) -> None:
        for header, name, value in (
            ("authorization", "Authorization", f"Bearer {PLACEHOLDER}"),
            ("x-api-key", "x-api-key", PLACEHOLDER),
        ):
            running = self.start(given=line(header), prefix="/gateway/")
            others = ["Cookie: c=1", "Proxy-Authorization: Basic eA==", "anthropic-beta: a,b"]
            others += [
                "X-HTTP-Method-Override: DELETE",
                "X-Original-URL: /v1/o",
                "Forwarded: for=x",
            ]
            others += ["X-Rewrite-URL: /v1/o", "X-Forwarded-Host: evil.example", "X-Method: GET"]
            others.append(
                "x-api-key: other" if header == "authorization" else "Authorization: Bearer o"
            )
            said = running.ask(
                request("POST", "/v1/messages?beta=true", f"{name}: {value}", *others)
            )
            head = self.server.heads[0].decode().lower()
            self.assertTrue(head.startswith("post /gateway/v1/messages?beta=true http/1.1\r\n"))
            self.assertIn(
                f"\r\n{header}: {'bearer ' if header == 'authorization' else ''}{SECRET}\r\n", head
            )
            self.assertIn("\r\nanthropic-beta: a,b\r\n", head)
            for word in (PLACEHOLDER, "other", "bearer o\r", "cookie", "basic", "/v1/o\r", "evil"):
                self.assertNotIn(word, head)
            self.assertIn(b"\r\nRequest-Id: r\r\n", said)
            self.assertIn(b"anthropic-ratelimit-requests-limit: 4", said)
            self.assertTrue(
                said.startswith(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n")
            )

    def test_what_is_refused_has_the_apis_own_form(self) -> None:
        running = self.start()
        bearer = f"Authorization: Bearer {PLACEHOLDER}"
        good = request()
        cases = [
            (request("POST", "/v1/messages", other), 401, "authentication_error")
            for other in (
                "X: 1", f"Authorization: Bearer {PLACEHOLDER}x", f"Authorization: Bearer {PLACEHOLDER[:-1]}",
                f"Authorization: {PLACEHOLDER}", f"authorization: bearer {PLACEHOLDER}",
                f"x-api-key: {PLACEHOLDER}", "Authorization: Bearer ", f"Authorization: Bearer {SECRET}",
                "Authorization: Bearer é",
            )
        ]  # fmt: skip
        cases += [
            (request(method, path), 404, "not_found_error")
            for method, path in (
                ("POST", "/v1/complete"), ("POST", "/v1/messages/"), ("POST", "//v1/messages"),
                ("POST", "/v1/messages/../organizations"), ("GET", "/v1/models/.."), ("GET", "/v1/models/a/b"),
                ("GET", "/v1/models/%2e%2e"), ("DELETE", "/v1/files/a"), ("GET", "/v1/messages"),
                ("PUT", "/v1/messages"), ("POST", "/v1/messages#x"), ("GET", "/v1/models?a=\\"),
                ("GET", "/v1/organizations"), ("POST", "/v1/messages/batches"), ("GET", "/api/oauth/usage"),
                ("GET", "http://evil.example/v1/models"), ("POST", "/V1/messages"), ("GET", "*"),
                ("POST", "/v1/messages;x"), ("CONNECT", "evil.example:443"), ("GET", "/v1/files/.x"),
            )
        ]  # fmt: skip
        cases += [
            (
                good.replace(b"{}", b"{}").replace(
                    b"Content-Length: 2", b"Transfer-Encoding: chunked"
                ),
                411,
                "invalid",
            ),
            (good.replace(b"Host", f"{bearer}\r\nHost".encode()), 400, "invalid_request_error"),
            (b"hello\r\n\r\n", 400, "invalid_request_error"),
        ]
        for data, status, kind in cases:
            with self.subTest(data[:80]):
                head, _, body = running.ask(data).partition(b"\r\n\r\n")
                self.assertTrue(head.startswith(b"HTTP/1.1 %d " % status), head)
                error = json.loads(body)
                self.assertEqual(error["type"], "error")
                self.assertTrue(error["error"]["type"].startswith(kind))
                self.assertNotIn(SECRET, head.decode() + body.decode())
        self.assertEqual(self.server.heads, [])

    def test_the_paths_that_claude_code_asks_for(self) -> None:
        running = self.start()
        for method, path in (
            ("POST", "/v1/messages"), ("POST", "/v1/messages/count_tokens?beta=true"),
            ("GET", "/v1/models?limit=1000"), ("GET", "/v1/models/claude-opus-5-5"), ("POST", "/v1/files"),
            ("GET", "/v1/files/file_01A/content"), ("GET", "/v1/files?after_id=a"),
        ):  # fmt: skip
            with self.subTest(path):
                self.assertIn(b"HTTP/1.1 200 OK", running.ask(request(method, path)))
        self.assertTrue(all(SECRET.encode() in head for head in self.server.heads))
        self.assertIn(b" 200 ", running.ask(request("HEAD", "/api/hello", "X: 1", body="")))
        self.assertNotIn(SECRET.encode(), self.server.heads[-1])

    def test_events_come_one_by_one(self) -> None:
        go = threading.Event()

        def stream(client: socket.socket, first: bytes) -> None:
            while not first.endswith(b"{}"):  # what is left unread would reset the connection
                first += client.recv(65536)
            client.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
            for number in range(3):
                client.sendall(b"7\r\nevent:%d\r\n" % number)
                self.assertTrue(go.wait(5))
                go.clear()
            client.sendall(b"0\r\n\r\n")

        running = self.start(stream)
        with running.connect() as client:
            client.sendall(request())
            seen = b""
            for number in range(3):
                while b"event:%d" % number not in seen:
                    seen += client.recv(4096)
                self.assertNotIn(b"event:%d" % (number + 1), seen)
                go.set()
            self.assertTrue((seen + read_all(client)).endswith(b"0\r\n\r\n"))

    def test_an_agent_that_leaves_ends_the_request(self) -> None:
        left = threading.Event()

        def wait(client: socket.socket, first: bytes) -> None:
            with contextlib.suppress(ConnectionResetError):
                while client.recv(4096):
                    pass
            left.set()

        running = self.start(wait)
        with running.connect() as client:
            client.sendall(request())
            wait_for(lambda: self.server.heads, "the request is there")
        self.assertTrue(left.wait(5))

    def test_a_second_request_is_not_passed_on(self) -> None:
        running = self.start()
        evil = request("DELETE", "/v1/files/a")
        self.assertEqual(running.ask(request() + evil).count(b"HTTP/1.1"), 1)
        self.assertNotIn(b"DELETE", b"".join(self.server.heads))

    def test_a_big_body_and_an_early_answer(self) -> None:
        def count(client: socket.socket, first: bytes) -> None:
            size = len(first.partition(b"\r\n\r\n")[2])
            while size < 3_000_000:
                size += len(client.recv(65536))
            answer(client, first)

        running = self.start(count)
        self.assertIn(b" 200 OK", running.ask(request(body="x" * 3_000_000)))

        def early(client: socket.socket, first: bytes) -> None:
            client.sendall(b"HTTP/1.1 413 Too Large\r\nContent-Length: 0\r\n\r\n")
            client.shutdown(socket.SHUT_WR)
            read_all(client)

        self.server.story = early
        with running.connect() as client:
            client.sendall(request(body="x" * 3_000_000)[:1_000_000])
            self.assertIn(b" 413 Too Large", client.recv(4096))

    def test_an_upstream_that_is_not_there(self) -> None:
        running = self.start()
        self.server.close()
        said = running.ask(request())
        self.assertIn(b"HTTP/1.1 502 ", said)
        self.assertEqual(json.loads(said.partition(b"\r\n\r\n")[2])["error"]["type"], "api_error")

    def test_the_secret_is_nowhere_to_be_seen(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            audit = Path(folder, "audit")
            self.server = Server(answer)
            self.addCleanup(self.server.close)
            url = f"http://127.0.0.1:{self.server.port}"
            argv = ("--broker", "anthropic", "--upstream", url, "--audit", str(audit))
            with Egress(*argv, line=line(), real=True) as running:
                for name in ("cmdline", "environ"):
                    path = Path(f"/proc/{running.process.pid}/{name}")
                    if path.exists():
                        self.assertNotIn(SECRET.encode(), path.read_bytes())
                running.ask(request())
                running.ask(request("GET", "/v1/nothing"))
                rows = running.end()
                said = running.stderr()
            self.assertEqual((rows, said), ([], ""))
            self.assertNotIn(SECRET, audit.read_text())
            self.assertIn('"allowed"', audit.read_text())

    def test_what_the_hosts_proxy_adds_in_clear_is_not_the_apis_answer(self) -> None:
        forged = b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nforged"

        def lies(client: socket.socket, first: bytes) -> None:
            client.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n" + forged)
            client.recv(65536)

        server = Server(lies)
        self.addCleanup(server.close)
        env = {"HTTPS_PROXY": f"http://127.0.0.1:{server.port}"}
        argv = ("--broker", "anthropic", "--upstream", "https://api.example/v")
        with Egress(*argv, line=line(), env=env) as running:
            said = running.ask(request())
        self.assertIn(b" 502 no TLS with api.example", said)
        self.assertNotIn(b"forged", said)

    def test_tls_also_through_the_hosts_proxy(self) -> None:
        if not shutil.which("openssl"):
            self.skipTest("openssl is not on PATH")
        with tempfile.TemporaryDirectory() as folder:
            key, cert = f"{folder}/key.pem", f"{folder}/cert.pem"
            command = "req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=api.example"
            names = ["-addext", "subjectAltName=DNS:api.example", "-keyout", key, "-out", cert]
            subprocess.run(["openssl", *command.split(), *names], check=True, capture_output=True)
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(cert, key)
            heads: list[bytes] = []

            def secure(client: socket.socket, first: bytes) -> None:
                client.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
                with context.wrap_socket(client, server_side=True) as wrapped:
                    heads.append(wrapped.recv(65536))
                    while not heads[-1].endswith(b"{}"):
                        heads[-1] += wrapped.recv(65536)
                    answer(wrapped, b"")

            server = Server(secure)
            self.addCleanup(server.close)
            env = {"HTTPS_PROXY": f"http://127.0.0.1:{server.port}"}
            argv = ("--broker", "anthropic", "--upstream", "https://api.example/v")
            for extra, word in ((cert, b" 200 OK"), ("", b"502 no TLS with api.example")):
                with Egress(
                    *argv, line=line(), env={**env, "NODE_EXTRA_CA_CERTS": extra}
                ) as running:
                    self.assertIn(word, running.ask(request()))
            self.assertIn(b"CONNECT api.example:443 HTTP/1.1", server.heads[0])
            self.assertIn(f"Bearer {SECRET}".encode(), heads[0])
            self.assertIn(b"host: api.example\r\n", heads[0])

    def test_what_comes_on_stdin(self) -> None:
        for given in (
            "{}", "[]", "no", "", line(header="cookie"), line(credential="a\r\nb: c"),
            line(credential=""), line(placeholder=""), line(placeholder="é" * 20),
        ):  # fmt: skip
            with self.subTest(given), self.assertRaises(egress.Failure) as caught:
                egress.Broker(given.encode(), "anthropic", "")
            self.assertNotIn(SECRET, str(caught.exception))
        with Egress("--broker", "anthropic", line="{}") as running:
            self.assertEqual((running.port, running.process.wait(10)), (0, 1))
            self.assertIn("egress: error: stdin holds no", running.stderr())

    def test_the_upstream(self) -> None:
        for url, found in (
            ("", ("https", "api.anthropic.com", 443)),
            ("http://localhost:4000/x/", ("http", "localhost", 4000)),
            ("http://[::1]/", ("http", "::1", 80)),
        ):
            broker = egress.Broker(line().encode(), "anthropic", url)
            self.assertEqual(tuple(broker.place.values()), found)
            self.assertNotIn(SECRET, repr(broker))
        for url in (
            "http://a.example",
            "ftp://localhost",
            "https://u@a",
            "a.example",
            "http://127.0.0.2",
        ):
            with self.subTest(url), self.assertRaises(egress.Failure):
                egress.Broker(line().encode(), "anthropic", url)


class RealClaudeTest(unittest.TestCase):
    """A whole turn of the program itself, where it is on PATH."""

    def test_a_turn(self) -> None:
        claude = shutil.which("claude")
        if not claude:
            self.skipTest("claude is not on PATH")
        with tempfile.TemporaryDirectory() as home, subprocess.Popen(
            [sys.executable, str(ROOT / "tests/fakes/model_api.py"), f"{home}/log"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        ) as model:  # fmt: skip
            assert model.stdin and model.stdout
            url = f"http://127.0.0.1:{model.stdout.readline().strip()}"
            with Egress("--broker", "anthropic", "--upstream", url, line=line()) as running:
                env = {"HOME": home, "PATH": os.environ["PATH"],
                       "CLAUDE_CODE_OAUTH_TOKEN": PLACEHOLDER,
                       "ANTHROPIC_BASE_URL": f"http://127.0.0.1:{running.port}"}  # fmt: skip
                done = subprocess.run([claude, "-p", "write a file"], env=env, cwd=home, text=True,
                                      stdin=subprocess.DEVNULL, capture_output=True, timeout=120)  # fmt: skip
            asked = [json.loads(row) for row in Path(home, "log").read_text().splitlines()]
            model.stdin.close()
        self.assertIn("all done", done.stdout, done.stderr)
        self.assertNotIn(PLACEHOLDER, str(asked))
        self.assertIn(SECRET, str(asked))


if __name__ == "__main__":
    unittest.main()
