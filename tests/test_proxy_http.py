"""The GitHub proxy as a process: what crosses its sockets, and its command line."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import json
import os
import resource
import select
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
import unittest
import unittest.mock
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import github_mcp_proxy as proxy
from tests.fakes import mcp_upstream as fake
from tests.support import ROOT
from tests.support import wait_for

SCRIPT = ROOT / "github_mcp_proxy.py"
TOKEN = "ghp_" + "t" * 36
SECRET = "secret-of-this-vm-0123456789"
INITIALIZE = {
    "protocolVersion": "2025-11-25",
    "capabilities": {},
    "clientInfo": {"name": "c", "version": "1"},
}
TIMEOUT = 20.0
# All that a child gets of this environment; the second is for a Python that lies elsewhere.
BARE = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH") if name in os.environ}


class CompanyProxy:
    """An HTTP proxy that wants a user, and connects to where CONNECT says."""

    def __init__(self, user: bytes) -> None:
        self.heads: list[str] = []
        self.more = b""  # in clear text, behind its answer
        self.login = base64.b64encode(user).decode()
        self.socket = socket.create_server(("127.0.0.1", 0))
        threading.Thread(target=self.serve, daemon=True).start()

    def __enter__(self) -> CompanyProxy:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def url(self, user: str) -> str:
        return f"http://{user}127.0.0.1:{self.socket.getsockname()[1]}"

    def serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(
                    target=self.relay, args=self.socket.accept()[:1], daemon=True
                ).start()

    def relay(self, client: socket.socket) -> None:
        with client, contextlib.suppress(OSError):
            head = b""
            while b"\r\n\r\n" not in head:
                head += client.recv(65536)
            self.heads.append(head.decode())
            if f"Proxy-Authorization: Basic {self.login}\r\n" not in self.heads[-1]:
                client.sendall(b"HTTP/1.1 407 Who?\r\nContent-Length: 0\r\n\r\n")
                return
            host, _, port = head.split()[1].decode().rpartition(":")
            with socket.create_connection((host, int(port))) as server:
                client.sendall(b"HTTP/1.1 200 Connected\r\nVia: x\r\n\r\n" + self.more)
                ends = {client: server, server: client}
                while True:
                    for end in select.select(list(ends), [], [])[0]:
                        data = end.recv(65536)
                        if not data:
                            return
                        ends[end].sendall(data)


class Proxy:
    """A running proxy; `lines` are those of its stdout that have been waited for."""

    def __init__(
        self, upstream: str, *argv: str, script: Path = SCRIPT, lines: int = 2,
        pass_fds: tuple[int, ...] = (), **env: str,
    ) -> None:  # fmt: skip
        environment = {
            **BARE,
            "GITHUB_MCP_TOKEN": TOKEN,
            "GITHUB_MCP_OWNER": "good",
            "GITHUB_MCP_REPO": "r",
            "GITHUB_MCP_SECRET": SECRET,
            "GITHUB_MCP_UPSTREAM": upstream,
            **env,
        }
        self.errors = tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(
            [sys.executable, str(script), *argv],
            env={key: value for key, value in environment.items() if value},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            pass_fds=pass_fds,
            text=True,
        )
        assert self.process.stdout
        self.lines = [self.process.stdout.readline().strip() for _ in range(lines)]
        self.port = int(self.lines[0] or 0)

    def stderr(self) -> str:
        """All of it; afterwards still there when the process and its file are gone."""
        if not self.errors.closed:
            self.errors.seek(0)
            self.said = self.errors.read()
        return self.said

    def stop(self, signum: int = signal.SIGTERM) -> int:
        if self.process.poll() is None:
            self.process.send_signal(signum)
        status = self.process.wait(TIMEOUT)
        self.stderr()
        for file in (self.process.stdin, self.process.stdout, self.errors):
            assert file
            file.close()
        return status

    def descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))


class Client:
    """A raw socket that speaks HTTP/1.1, one exchange at a time."""

    def __init__(self, port: int, secret: str = SECRET) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), TIMEOUT)
        self.file = self.socket.makefile("rb")
        self.secret = secret

    def head(
        self, method: str = "POST", target: str = "/mcp", *lines: str, length: int = 0
    ) -> bytes:
        first = [f"{method} {target} HTTP/1.1", "Host: 127.0.0.1"]
        if self.secret:
            first.append(f"Authorization: Bearer {self.secret}")
        if method == "POST":
            first += ["Content-Type: application/json", f"Content-Length: {length}"]
        return "\r\n".join([*first, *lines, "", ""]).encode("latin-1")

    def send(self, message: Any, *lines: str, target: str = "/mcp") -> None:
        body = message if isinstance(message, bytes) else json.dumps(message).encode()
        self.socket.sendall(self.head("POST", target, *lines, length=len(body)) + body)

    def read_head(self) -> tuple[int, dict[str, str]]:
        first = self.file.readline().decode()
        if not first:
            raise ConnectionResetError("closed")
        headers = {}
        while line := self.file.readline().decode().strip():
            name, _, value = line.partition(":")
            headers[name.lower()] = value.strip()
        return int(first.split()[1]), headers

    def chunk(self) -> bytes:
        size = int(self.file.readline(), 16)
        return self.file.read(size + 2)[:-2]

    def read(self) -> tuple[int, dict[str, str], bytes]:
        status, headers = self.read_head()
        if "chunked" in headers.get("transfer-encoding", ""):
            return status, headers, b"".join(iter(self.chunk, b""))
        return status, headers, self.file.read(int(headers["content-length"]))

    def ask(self, message: Any, *lines: str) -> Any:
        """The JSON of the answer, or of the last event of a stream."""
        self.send(message, *lines)
        _, headers, body = self.read()
        if headers.get("content-type") == "text/event-stream":
            body = body.rpartition(b"data: ")[2]
        return json.loads(body) if body else None

    def raw(self, data: bytes) -> tuple[int, dict[str, str], bytes]:
        self.socket.sendall(data)
        return self.read()

    def is_closed(self) -> bool:
        try:
            return self.file.read(1) == b""
        except OSError:
            return True

    def close(self) -> None:
        self.file.close()
        self.socket.close()


def request(method: str, id: Any = 1, **params: Any) -> dict[str, Any]:
    return {"jsonrpc": "2.0", "id": id, "method": method, "params": params}


def call(
    path: str = "README.md", id: Any = 1, name: str = "get_file_contents", **more: Any
) -> dict[str, Any]:
    arguments = {"path": path, **more} if path else more
    return request("tools/call", id, name=name, arguments=arguments)


def text_of(answer: Any) -> str:
    text: str = answer["result"]["content"][0]["text"]
    return text


class Pipe:
    """In place of a transport: nothing is written, and nothing waits."""

    def pause_reading(self) -> None: ...

    def resume_reading(self) -> None: ...


class FramingTest(unittest.TestCase):
    """Heads and bodies, without a socket: the same bytes whole, one at a time, and with a tail."""

    def receive(
        self, *parts: bytes, is_request: bool = True, closed: bool = False
    ) -> tuple[bytes, bytes]:
        """(the body, what is left)."""

        async def read() -> tuple[bytes, bytes]:
            wire = proxy.Wire(set(), 1)
            wire.story = is_request
            wire.transport = Pipe()  # type: ignore[assignment]

            async def feed() -> None:
                for part in parts:
                    wire.data_received(part)
                    await asyncio.sleep(0)
                if closed:
                    wire.eof_received()

            feeding = asyncio.ensure_future(feed())
            await asyncio.wait_for(wire.read_head(1000), 1)
            data = await asyncio.wait_for(wire.whole(), 1)
            await feeding
            return bytes(data), bytes(wire.buffer)

        return asyncio.run(read())

    def test_messages(self) -> None:
        post = b"POST /mcp HTTP/1.1\r\nHost: a\r\n"
        answer = b"HTTP/1.1 200 OK\r\n"
        for request, data, body in (
            (True, post + b"Content-Length: 3\r\n\r\nabc", b"abc"),
            (True, post + b"\r\n", b""),
            (
                True,
                post + b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n2;x=y\r\nde\r\n0\r\n\r\n",
                b"abcde",
            ),
            (
                True,
                post + b"Transfer-Encoding: chunked\r\n\r\n1\r\na\r\n0\r\nTrailer: x\r\n\r\n",
                b"a",
            ),
            (False, answer + b"Content-Length: 3\r\n\r\nabc", b"abc"),
            (False, b"HTTP/1.1 204 No Content\r\n\r\n", b""),
        ):
            with self.subTest(data):
                for parts in ([data], [data[i : i + 1] for i in range(len(data))]):
                    self.assertEqual(self.receive(*parts, is_request=request), (body, b""))
                tailed = self.receive(data + b"POST /next", is_request=request)
                self.assertEqual(tailed, (body, b"POST /next"))

    def test_half_of_an_answer_is_none(self) -> None:
        for cut, reason in (
            (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nabc", "closed"),
            (b"HTTP/1.1 200", "closed"),
            (b"HTTP/1.1 200 OK\r\n\r\nabc", "without a length"),
        ):
            with self.subTest(cut), self.assertRaisesRegex(proxy.AnswerLost, reason):
                self.receive(cut, is_request=False, closed=True)

    def test_what_could_be_read_in_two_ways(self) -> None:
        post = b"POST /mcp HTTP/1.1\r\nHost: a\r\n"
        chunked = post + b"Transfer-Encoding: chunked\r\n\r\n"
        for reason, messages in {
            "a body with an unknown or a double length": [
                post + b"Content-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n",
                post + b"Transfer-Encoding: gzip, chunked\r\n\r\n",
                post + b"Transfer-Encoding: xchunked\r\n\r\n",
            ],
            "the header content-length is given twice": [
                post + b"Content-Length: 1\r\nContent-Length: 1\r\n\r\n"
            ],
            "the header transfer-encoding is given twice": [
                post + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n"
            ],
            "a malformed header": [
                post + b"Transfer-Encoding:\x0bchunked\r\n\r\n",
                post + b"Content-Length : 1\r\n\r\n",
                post + b"X: a\r\n folded\r\n\r\n",
                post + b"X: a\nY: b\r\n\r\n",
                post + b"X: a\rY: b\r\n\r\n",
                post + b"X: \0\r\n\r\n",
                post + b"no colon\r\n\r\n",
                post + b": empty\r\n\r\n",
            ],
            "a Content-Length that is not a number": [
                post + b"Content-Length: +1\r\n\r\n",
                post + b"Content-Length: 1, 1\r\n\r\n",
                post + b"Content-Length: 0x1\r\n\r\n",
                post + b"Content-Length: -1\r\n\r\n",
                post + b"Content-Length: \xb2\r\n\r\n",
            ],
            "the header host is given twice": [post + b"Host: b\r\n\r\n"],
            "a head of more than 32768 bytes": [post + b"X" * 40_000],
            "not an HTTP request": [b"GET\r\n\r\n", b"POST /mcp\tHTTP/1.1\r\n\r\n"],
            "a malformed chunk": [
                chunked + b"g\r\n",
                chunked + b"-1\r\n",
                chunked + b"1\r\nab\r\n",
                chunked + b"1\nab\r\n" + b"x" * 64,
                chunked + b"0x1\r\n",
                chunked + b"fffffffff\r\n",
            ],
            "a body of more than 1000 bytes": [
                chunked + b"3e9\r\n",
                post + b"Content-Length: 1001\r\n\r\n",
            ],
        }.items():
            for data in messages:
                caught = self.assertRaisesRegex(proxy.ProtocolError, reason)
                with self.subTest(data[:120]), caught:
                    self.receive(data)

    def test_events(self) -> None:
        stream = b": hi\n\nevent: message\ndata: {}\n\nid: 1\r\ndata: a\r\ndata: b\r\n\r\ndata\n\n"
        body = b"".join(map(proxy.chunk_of, [stream[:7], stream[7:30], stream[30:]])) + b"0\r\n\r\n"
        head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
        whole = head + b"Transfer-Encoding: chunked\r\n\r\n" + body

        async def read(size: int) -> list[bytes]:
            address = urlsplit("http://127.0.0.1/")
            token = proxy.Token(TOKEN, "")
            exchange = proxy.Exchange(proxy.Upstream(address, token, {}, None, 1))
            exchange.transport = Pipe()  # type: ignore[assignment]

            async def feed() -> None:
                for at in range(0, len(whole), size):
                    exchange.data_received(whole[at : at + size])
                    await asyncio.sleep(0)

            feeding = asyncio.ensure_future(feed())
            await exchange.begin()
            found = []
            while length := await exchange.is_coming():
                found.append(bytes(exchange.events[:length]))
                del exchange.events[:length]
                exchange.scanned = 0
            await feeding
            return found

        for size in (1, len(whole)):
            events = asyncio.run(read(size))
            self.assertEqual(b"".join(events), stream)
            self.assertEqual([proxy.event_data(e) for e in events], [b"", b"{}", b"a b", b""])


class LiveTest(unittest.TestCase):
    """One proxy and one upstream for the whole class."""

    upstream: fake.Upstream
    proxy: Proxy
    folder: tempfile.TemporaryDirectory[str]

    @classmethod
    def setUpClass(cls) -> None:
        cls.folder = tempfile.TemporaryDirectory()
        cls.upstream = fake.Upstream()
        cls.upstream.__enter__()
        cls.audit = Path(cls.folder.name, "audit.jsonl")
        cls.proxy = Proxy(cls.upstream.url, "--audit", str(cls.audit), "--timeout", "0.5")

    audit: Path

    @classmethod
    def tearDownClass(cls) -> None:
        cls.proxy.stop()
        cls.upstream.__exit__()
        cls.folder.cleanup()
        if "Traceback" in cls.proxy.stderr():
            raise AssertionError(cls.proxy.stderr())

    def setUp(self) -> None:
        self.upstream.reset()
        self.client = self.connect()

    def tearDown(self) -> None:
        self.assertIsNone(self.proxy.process.poll(), "the proxy lives")

    def connect(self, secret: str = SECRET) -> Client:
        client = Client(self.proxy.port, secret)
        self.addCleanup(client.close)
        return client


class GateTest(LiveTest):
    """Who may speak to it, and how."""

    def status(self, data: bytes) -> int:
        return self.connect().raw(data)[0]

    def test_requests_that_are_refused(self) -> None:
        body = json.dumps(request("ping")).encode()
        good = self.client.head(length=len(body)) + body
        bearer = f"Authorization: Bearer {SECRET}".encode()
        for status, data in (
            (403, good.replace(b"Host: 127.0.0.1", b"Host: evil.example")),
            (403, good.replace(b"Host: 127.0.0.1\r\n", b"")),
            (403, good.replace(b"Host: 127.0.0.1", b"Host: 127.0.0.1.evil.example")),
            (403, good.replace(b"Host:", b"Origin: https://evil.example\r\nHost:")),
            (403, good.replace(b"Host:", b"Origin: null\r\nHost:")),
            (403, good.replace(bearer + b"\r\n", b"")),
            (403, good.replace(bearer, bearer[:-1])),
            (403, good.replace(bearer, bearer + b"x")),
            (403, good.replace(bearer, b"Authorization: Bearer \xe9\xff")),
            (403, good.replace(bearer, b"Authorization: Basic " + SECRET.encode())),
            (400, good.replace(bearer, bearer + b"\r\n" + bearer)),
            (404, good.replace(b"/mcp", b"//mcp")),
            (404, good.replace(b"/mcp", b"/mcp?features=all")),
            (404, good.replace(b"/mcp", b"/%6dcp")),
            (404, good.replace(b"/mcp", b"/x/all")),
            (404, good.replace(b"/mcp", b"http://127.0.0.1/mcp")),
            (404, good.replace(b"/mcp", b"/.well-known/oauth-protected-resource")),
            (505, good.replace(b"HTTP/1.1", b"HTTP/1.0")),
            (405, good.replace(b"POST", b"PUT")),
            (405, good.replace(b"POST", b"OPTIONS")),
            (405, good.replace(b"POST", b"post")),
            (415, good.replace(b"application/json", b"text/plain")),
            (413, good.replace(b"Content-Length: ", b"Content-Length: 99999999")),
            (400, good.replace(b"Host:", b"Mcp-Session-Id: a b\r\nHost:")),
            (400, good.replace(b"Host:", b"Mcp-Session-Id: " + b"s" * 257 + b"\r\nHost:")),
            (400, good.replace(b"POST", b"DELETE")),
            (400, good.replace(b'"ping"', b'"pi\xffg"')),
        ):
            with self.subTest(data[:200]):
                got, headers, _ = self.connect().raw(data)
                self.assertEqual(got, status)
                if status == 405:
                    self.assertEqual(headers["allow"], "POST, DELETE")
        self.assertEqual(self.upstream.calls(), [])

    def test_names_that_are_its_own(self) -> None:
        body = json.dumps(request("ping")).encode()
        good = self.client.head(length=len(body)) + body
        for name in (b"localhost:80", b"[::1]:1", b"host.lima.internal:5", b"LOCALHOST"):
            self.assertEqual(self.status(good.replace(b"Host: 127.0.0.1", b"Host: " + name)), 200)
        origin = b"Origin: http://localhost:3000\r\nHost:"
        self.assertEqual(self.status(good.replace(b"Host:", origin)), 200)
        for path in (b"/", b"/mcp/"):
            self.assertEqual(self.status(good.replace(b"/mcp", path)), 200)

    def test_a_client_that_begins_anew_with_an_old_session(self) -> None:
        answer = self.client.ask(request("initialize", **INITIALIZE), "Mcp-Session-Id: long-gone")
        self.assertIn("result", answer)
        (seen,) = self.upstream.calls()
        self.assertNotIn("mcp-session-id", seen.headers)

    def test_the_second_request_of_a_connection_is_checked_anew(self) -> None:
        self.assertEqual(self.client.ask(request("ping", 1))["result"], {})
        self.client.secret = ""
        self.client.send(request("ping", 2))
        self.assertEqual(self.client.read()[0], 403)
        self.assertTrue(self.client.is_closed())

    def test_pipelined_requests_are_answered_in_order(self) -> None:
        for number in range(5):
            self.client.send(call(id=number))
        self.assertEqual(
            [json.loads(self.client.read()[2])["id"] for _ in range(5)], [0, 1, 2, 3, 4]
        )

    def test_refusals_are_where_the_client_shows_them(self) -> None:
        self.client.send(call("../x"))
        status, _, body = self.client.read()
        answer = json.loads(body)
        self.assertEqual((status, answer["id"], answer["result"]["isError"]), (200, 1, True))
        self.assertIn("path", text_of(answer))
        answer = self.client.ask(request("completion/complete", "x"))
        self.assertEqual((answer["id"], answer["error"]["code"]), ("x", -32601))
        self.assertEqual(self.upstream.calls(), [])


class UpstreamTest(LiveTest):
    """What the upstream gets and what comes of its answers."""

    def test_the_headers_are_made_here(self) -> None:
        extra = ("Cookie: a=b", "X-MCP-Toolsets: all", "X-MCP-Insiders: 1", "X-Forwarded-Host: evil",
                 "Forwarded: for=x", "X-MCP-Readonly: false", "Mcp-Param-owner: evil", "Accept: */*")  # fmt: skip
        self.client.ask(call(), *extra)
        (seen,) = self.upstream.calls()
        self.assertEqual(seen.target, "/mcp/")
        body = seen.body.decode()
        expected = {
            "host": f"localhost:{self.upstream.port}",
            "user-agent": "agent-vm-github-mcp-proxy/0.1.0",
            "accept-encoding": "identity",
            "accept": "application/json, text/event-stream",
            "x-mcp-toolsets": "repos,issues,pull_requests,git,labels",
            "x-mcp-lockdown": "true",
            "authorization": f"Bearer {TOKEN}",
            "content-type": "application/json",
            "content-length": str(len(body)),
        }
        self.assertEqual(seen.headers, expected)
        self.assertEqual(len(seen.header_lines), len(expected))

    def test_the_body_is_made_here(self) -> None:
        message = b'{ "params": {"arguments": {"path":"\\u0061"}, "name": "get_file_contents"}, "method":"tools/call" ,"id":7, "jsonrpc":"2.0"}'
        self.client.ask(message)
        (seen,) = self.upstream.calls()
        self.assertEqual(
            seen.body,
            b'{"jsonrpc":"2.0","method":"tools/call","id":7,"params":{"name":"get_file_contents",'
            b'"arguments":{"owner":"good","repo":"r","path":"a"}}}',
        )

    def test_mirrored_headers(self) -> None:
        message = call("a")
        message["params"]["_meta"] = {fake.MODERN_META: fake.MODERN}
        lines = (
            f"MCP-Protocol-Version: {fake.MODERN}",
            "Mcp-Method: tools/call",
            "Mcp-Name: get_file_contents",
        )
        self.assertEqual(text_of(self.client.ask(message, *lines)), "ok get_file_contents")
        (seen,) = self.upstream.calls()
        self.assertEqual(
            (seen.headers["mcp-param-owner"], seen.headers["mcp-param-repo"]), ("good", "r")
        )
        self.client.send(message, *lines[:2], "Mcp-Name: get_me")
        status, _, body = self.client.read()
        self.assertEqual((status, json.loads(body)["error"]["code"]), (400, -32020))

    def test_the_client_gets_no_header_of_the_upstream(self) -> None:
        self.client.send(call())
        _, headers, _ = self.client.read()
        self.assertEqual(set(headers), {"content-type", "content-length"})

    def test_failures_are_errors_of_json_rpc(self) -> None:
        for name, handler, words in (
            ("401", fake.status(401, b"", "WWW-Authenticate: Bearer resource_metadata=x"), "token"),
            ("403", fake.status(403), "token"),
            ("302", fake.status(302, b"", "Location: http://evil/"), "redirect"),
            ("429", fake.status(429), "rate limit"),
            ("500", fake.status(500), "500"),
            ("closed", fake.bytes_of(b""), "closed"),
            ("reset", fake.bytes_of(b"", then="reset"), "closed"),
            ("cut head", fake.bytes_of(b"HTTP/1.1 200 O"), "closed"),
            ("rubbish", fake.rubbish, "not JSON"),
            ("endless head", fake.endless_head, "malformed"),
            ("gzip", fake.gzipped, "not JSON"),
            ("wrong id", fake.wrong_id, ""),
            ("silent", fake.hang, "in time"),
            ("no answer", fake.without_answer, "without an answer"),
        ):
            with self.subTest(name):
                self.upstream.on("README.md", handler)
                self.client.send(call(id=name))
                status, headers, body = self.client.read()
                answer = json.loads(body.rpartition(b"data: ")[2])
                self.assertEqual((status, answer["id"]), (200, name))
                self.assertIn(words, answer["error"]["message"])
                self.assertNotIn("www-authenticate", headers)
                self.upstream.reset()
                self.assertEqual(text_of(self.client.ask(call())), "ok get_file_contents")

    def test_a_stream_that_breaks_off_ends_in_an_error(self) -> None:
        for handler in (fake.cut_in_event, fake.cut_after_event):
            self.upstream.on("README.md", handler)
            self.assertEqual(self.client.ask(call(id=3))["id"], 3)

    def test_a_write_is_not_repeated_and_a_read_is(self) -> None:
        comment = call("", name="add_issue_comment", issue_number=1, body="b")
        self.client.ask(call())
        self.upstream.on("add_issue_comment", fake.bytes_of(b"", then="reset"))
        self.assertIn("error", self.client.ask(comment))
        self.assertEqual(len(self.upstream.calls("add_issue_comment")), 1)
        self.client.ask(call())
        dropped: list[int] = []

        def once(x: fake.Exchange) -> None:
            dropped.append(1)
            if len(dropped) == 1:
                return x.reset()
            return x.answer(x.text("second"))

        self.upstream.on("README.md", once)
        self.assertEqual(text_of(self.client.ask(call())), "second")

    def test_secrets_in_answers_are_redacted(self) -> None:
        signed = "https://x/y?token=" + "A" * 29 + "&b=c"
        self.upstream.on("README.md", fake.text(f"{TOKEN} {signed} ghs_{'s' * 40}"))
        shown = text_of(self.client.ask(call()))
        words = [word.rstrip("*") for word in shown.split()]
        self.assertEqual(words, ["[redacted]", "https://x/y?[redacted]", "[redacted]"])

    def test_what_is_opted_in_to_is_asked_for(self) -> None:
        policy = Path(self.folder.name, "opted-in.ini")
        policy.write_text("[policy]\nallow = merge, alerts, actions\n")
        more = ",actions,code_security,code_quality,dependabot"
        running = Proxy(self.upstream.url, "--policy", str(policy))
        self.addCleanup(running.stop)
        client = Client(running.port)
        self.addCleanup(client.close)
        self.assertEqual(text_of(client.ask(call())), "ok get_file_contents")
        sent = self.upstream.calls("get_file_contents")[-1]
        asked = "repos,issues,pull_requests,git,labels" + more
        self.assertEqual(sent.headers["x-mcp-toolsets"], asked)

    def test_the_list_of_tools_is_narrowed_and_kept(self) -> None:
        schema = {
            "type": "object",
            "properties": {"owner": {}, "repo": {}, "tag": {}},
            "required": ["owner", "tag"],
        }
        self.upstream.tools = [
            {"name": "get_me", "inputSchema": {}},
            {"name": "get_tag", "inputSchema": schema},
        ]
        for id in (1, "one", 0, 2):
            answer = self.client.ask(request("tools/list", id))
            self.assertEqual(answer["id"], id)
            (tool,) = answer["result"]["tools"]
            self.assertEqual((tool["name"], tool["inputSchema"]["required"]), ("get_tag", ["tag"]))

    def test_the_default_branch_is_learnt_and_kept_from_writes(self) -> None:
        answer = self.client.ask(call("", name="create_branch", branch="main"))
        self.assertIn("default", text_of(answer))
        self.assertEqual(
            text_of(self.client.ask(call("", name="create_branch", branch="b"))), "ok create_branch"
        )
        self.assertEqual([x.arguments["branch"] for x in self.upstream.calls()], ["b"])

    def test_nothing_is_written_while_the_default_branch_cannot_be_asked_for(self) -> None:
        policy = Path(self.folder.name, "given.ini")
        policy.write_text("[policy]\ndefault_branch = main\n")
        self.upstream.on("own", fake.status(503))
        running = Proxy(self.upstream.url, "--policy", str(policy))
        self.addCleanup(running.stop)
        client = Client(running.port)
        self.addCleanup(client.close)
        for branch in ("master", "b"):
            said = text_of(client.ask(call("", name="create_branch", branch=branch)))
            self.assertIn("did not tell the default branch", said)
        self.assertEqual(self.upstream.calls("create_branch"), [])
        limited = {"content": [{"type": "text", "text": "failed to search: 403 API rate limit"}]}
        self.upstream.on("own", lambda x: x.answer(x.result({**limited, "isError": True})))
        other = Proxy(self.upstream.url, "--policy", str(policy))
        self.addCleanup(other.stop)
        client = Client(other.port)
        self.addCleanup(client.close)
        said = text_of(client.ask(call("", name="create_branch", branch="master")))
        self.assertIn("did not tell the default branch", said)

    def test_a_default_branch_that_is_renamed_is_noticed(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            policy, script = Path(folder, "policy.ini"), Path(folder, "quick.py")
            policy.write_text("[policy]\ndefault_branch = main\n")
            script.write_text(
                f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
                "import github_mcp_proxy as p\np.KNOWN_SECONDS = 0\nsys.exit(p.main())\n"
            )
            running = Proxy(self.upstream.url, "--policy", str(policy), script=script)
            self.addCleanup(running.stop)
            client = Client(running.port)
            self.addCleanup(client.close)
            for learnt in ("master", "trunk"):
                self.upstream.default_branch = learnt
                for branch in ("main", learnt):
                    answer = text_of(client.ask(call("", name="create_branch", branch=branch)))
                    self.assertIn("other than the default one", answer)
            self.upstream.default_branch = "main"

    def test_a_repository_that_has_another_name_now(self) -> None:
        self.upstream.renamed = "good/new"
        running = Proxy(self.upstream.url)
        self.addCleanup(running.stop)
        client = Client(running.port)
        self.addCleanup(client.close)
        client.ask(call("", name="create_branch", branch="b"))  # waits until it is known
        for name in ("get_file_contents", "list_commits"):
            said = text_of(client.ask(call("x", name=name)))
            self.assertIn("GitHub calls this repository good/new now", said)
        self.assertEqual(self.upstream.calls(), [])

    def test_a_fork_is_found_by_the_search(self) -> None:
        """GitHub's search leaves forks out unless it is told not to."""
        self.upstream.found = "as a fork"
        answer = self.client.ask(call("", name="create_branch", branch="b"))
        self.assertEqual(text_of(answer), "ok create_branch")


class StreamTest(LiveTest):
    def test_events_pass_one_by_one(self) -> None:
        gate = fake.Gate(2)
        self.upstream.on("README.md", gate)
        self.client.send(call())
        gate.step()
        status, headers = self.client.read_head()
        self.assertEqual((status, headers["content-type"]), (200, "text/event-stream"))
        self.assertIn(b'"progress":1', self.client.chunk())
        gate.step()
        self.assertIn(b'"progress":2', self.client.chunk())
        gate.step()
        self.assertIn(b"done", self.client.chunk())
        self.assertEqual(self.client.chunk(), b"")

    def test_comments_ids_and_unknown_messages(self) -> None:
        """Ids would invite a client to come back for the rest; unknown notes are dropped."""
        prime = b"id: 1\ndata: \n\n"
        note = fake.event(fake.note(1), "id: 2")
        unknown = fake.event({"jsonrpc": "2.0", "method": "notifications/unknown"})
        self.upstream.on("README.md", fake.events(prime, note, b": alive\n\n", unknown))
        self.client.send(call())
        self.client.read_head()
        got = list(iter(self.client.chunk, b""))
        self.assertEqual(got[:1], [fake.event(fake.note(1))])
        self.assertEqual(len(got), 2)
        self.assertIn(b"done", got[1])

    def test_who_asks_questions_has_lost_the_call(self) -> None:
        """It was told that nobody here takes any; a ping is not worth an answer of ours."""
        question: Any = {"jsonrpc": "2.0", "id": "q", "method": "ping", "params": {}}
        self.upstream.on("README.md", fake.events(fake.event(question)))
        self.assertEqual(text_of(self.client.ask(call(id=5))), "done")
        question["method"] = "elicitation/create"
        of_2026 = {"jsonrpc": "2.0", "id": 6, "result": {"resultType": "input_required"}}
        for asked in (question, of_2026):
            self.upstream.on("README.md", fake.events(fake.event(asked)))
            failed = self.client.ask(call(id=6))
            self.assertIn("it asks what nobody here answers", failed["error"]["message"])
        self.assertEqual(self.upstream.calls("answer"), [])
        self.client.send({"jsonrpc": "2.0", "id": "q", "result": {"action": "accept"}})
        self.assertEqual(self.client.read()[0], 400, "a client answers nothing")

    def test_large_answers_come_as_json(self) -> None:
        for sse in (True, False):
            self.upstream.on("README.md", fake.big(10_000_000, sse=sse))
            self.client.send(call())
            status, headers, body = self.client.read()
            self.assertEqual((status, headers["content-type"]), (200, "application/json"))
            self.assertGreaterEqual(len(text_of(json.loads(body))), 10_000_000)

    def test_secrets_in_large_answers_are_redacted_wherever_they_are(self) -> None:
        signed = "https://x/y?token=" + "A" * 29
        for place, sse in (
            (0, 0),
            (262_144 - 70, 0),
            (1_500_000, 0),
            (2_999_990, 0),
            (1_500_000, 1),
        ):
            self.upstream.sse = bool(sse)
            with self.subTest(place, sse=sse):
                text = "x " * (place // 2) + f"{TOKEN} {signed}" + " x" * ((3_000_000 - place) // 2)
                self.upstream.on("README.md", fake.text(text))
                self.client.send(call())
                status, _, body = self.client.read()
                self.assertEqual(status, 200)
                for secret in (TOKEN, signed[12:]):
                    text = text.replace(secret, "[redacted]".ljust(len(secret), "*"))
                self.assertEqual(text_of(json.loads(body)), text)

    def test_half_of_a_large_answer_is_none(self) -> None:
        def cut(x: fake.Exchange) -> None:
            body = fake.dumps(x.text("x" * 5_000_000))
            x.send(x.head_of(200, "Content-Type: application/json", f"Content-Length: {len(body)}"))
            x.send(body[:3_000_000])
            x.close()

        self.upstream.on("README.md", cut)
        answer = self.client.ask(call(id=8))
        self.assertEqual(answer["id"], 8)
        self.assertIn("closed the connection", answer["error"]["message"])

    def test_an_answer_that_is_too_large(self) -> None:
        for sse in (True, False):
            self.upstream.on("README.md", fake.big(17 << 20, sse=sse))
            self.assertIn("more than", self.client.ask(call())["error"]["message"])

    def test_a_client_that_goes_away_ends_the_upstreams_stream(self) -> None:
        self.upstream.on("README.md", fake.hang_in_stream)
        clients = [self.connect() for _ in range(50)]
        for client in clients:
            client.send(call())
        for client in clients:
            client.read_head()
        self.assertEqual(len(self.upstream.busy()), 50)
        for client in clients:
            client.close()
        self.upstream.wait_until_free()

    def test_a_session(self) -> None:
        self.upstream.stateful = True
        self.client.send(request("initialize", **INITIALIZE))
        _, headers, _ = self.client.read()
        session = f"Mcp-Session-Id: {headers['mcp-session-id']}"
        other = self.connect()
        self.assertEqual(text_of(other.ask(call(), session)), "ok get_file_contents")
        self.assertEqual(self.upstream.calls()[-1].session, headers["mcp-session-id"])
        other.send(request("ping"), "Mcp-Session-Id: stolen")
        self.assertEqual(other.read()[0], 404, "the upstream knows its sessions")

    def test_there_is_no_stream_to_get(self) -> None:
        status, headers, _ = self.connect().raw(self.client.head("GET"))
        self.assertEqual((status, headers["allow"]), (405, "POST, DELETE"))

    def test_the_end_of_a_session(self) -> None:
        status, _, body = self.connect().raw(self.client.head("DELETE"))
        self.assertEqual((status, b"no session" in body), (400, True))
        self.upstream.stateful = True
        self.client.send(request("initialize", **INITIALIZE))
        session = self.client.read()[1]["mcp-session-id"]
        ended = self.client.head("DELETE", "/mcp", f"Mcp-Session-Id: {session}")
        self.assertEqual(self.connect().raw(ended)[0], 200)
        self.assertNotIn(session, self.upstream.sessions)
        self.upstream.stateful = False
        self.assertEqual(self.connect().raw(ended)[0], 405, "what the upstream answers")
        headers = (f"Mcp-Session-Id: {session}", "Content-Length: 5000000")
        large = self.client.head("DELETE", "/mcp", *headers)
        self.assertEqual(self.connect().raw(large)[0], 400, "nobody waits for a body of no use")

    def test_many_clients_at_once_and_nothing_is_left(self) -> None:
        if not Path("/proc/self/fd").exists():
            self.skipTest("no /proc")
        self.client.ask(request("ping"))
        clients = [self.connect() for _ in range(200)]
        for client in clients:
            client.send(request("ping"))
        self.assertEqual({client.read()[0] for client in clients}, {200})
        before = 25
        for client in clients:
            client.close()
        self.upstream.drop_connections()
        deadline = time.monotonic() + TIMEOUT
        while self.proxy.descriptors() > before and time.monotonic() < deadline:
            time.sleep(0.02)
        self.assertLessEqual(self.proxy.descriptors(), before)


class AuditTest(LiveTest):
    def test_every_decision_without_bodies_and_secrets(self) -> None:
        self.client.ask(
            call("", name="add_issue_comment", issue_number=5, body="words of the agent")
        )
        self.client.ask(call("", name="get_me"))
        self.client.ask(call("../up"))
        self.connect("wrong-secret").send(request("ping"))
        self.connect().ask(b"{")
        lines = [json.loads(line) for line in self.audit.read_text().splitlines()]
        self.assertEqual(lines[0]["target"], {"issue_number": 5})
        verdicts = [line["verdict"] for line in lines[:4]]
        self.assertEqual(verdicts, ["forward", "done", "refuse", "refuse"])
        self.assertTrue(all(line["reason"] for line in lines[2:]))
        self.assertRegex(lines[0]["time"], r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z$")
        self.assertEqual(stat.S_IMODE(self.audit.stat().st_mode), 0o600)
        everything = self.audit.read_text() + self.proxy.stderr()
        for word in (TOKEN, SECRET, "wrong-secret", "words of the agent"):
            self.assertNotIn(word, everything)

    def test_what_is_refused_does_not_fill_the_disk(self) -> None:
        before = self.audit.stat().st_size if self.audit.exists() else 0
        self.client.ask({"jsonrpc": "2.0", "id": 1, "method": "a" * 1_000_000})
        files = [{"path": "\U0001f600" * 300, "content": ""}] * 100
        self.client.ask(call("", name="push_files", branch="main", message="m", files=files))
        self.assertLess(self.audit.stat().st_size - before, 100_000)

    def test_refusals_without_end_do_not_fill_the_disk(self) -> None:
        with tempfile.TemporaryFile() as file, unittest.mock.patch.object(proxy, "MAX_REFUSED", 5):
            audit = proxy.Audit(file.fileno())
            with contextlib.redirect_stderr(io.StringIO()):
                for number in range(20):
                    audit.record(audit.about("tools/call", f"t{number}", {}), "refuse", "no")
            file.seek(0)
            self.assertEqual((len(file.readlines()), audit.counts["refused"]), (5, 20))
            lines = [json.loads(line) for line in audit.receipt().splitlines()[1:]]
            self.assertEqual([line["what"] for line in lines][-2:], ["t4", "others"])
            self.assertEqual(lines[-1]["count"], 15)

    def test_what_is_written_by_half_does_not_pass(self) -> None:
        read, write = os.pipe()
        audit = proxy.Audit(write)
        deed = audit.about("tools/call", "get_commit", {})
        with unittest.mock.patch("os.write", lambda fd, data: os.writev(fd, [data[:9]])):
            self.assertFalse(audit.record(deed, "forward"))
        os.close(read)
        os.close(write)

    def test_what_the_guest_calls_a_tool_is_no_word_of_ours(self) -> None:
        self.client.ask(call("", name="done: create_branch\nx"))
        self.client.ask(call("", name="create_branch", branch="main", from_branch=["x"]))
        lines = [json.loads(line) for line in self.audit.read_text().splitlines()]
        self.assertEqual(lines[-2]["tool"], "?")
        self.assertEqual(lines[-1]["target"], {"branch": "main"})

    def test_what_became_of_a_write(self) -> None:
        made = '{"id":"1","url":"https://github.com/good/r/pull/12"}'
        failed = {"content": [{"type": "text", "text": "words of GitHub"}], "isError": True}
        large = fake.text(json.dumps({"url": "https://github.com/good/r/x", "more": "m" * 300_000}))
        for handler, verdict, target in (
            (fake.text(made), "done", {"url": "https://github.com/good/r/pull/12"}),
            (large, "done", {"url": "https://github.com/good/r/x"}),
            (fake.text("made it"), "done", {}),
            (lambda x: x.answer({"jsonrpc": "2.0", "id": x.id, "result": failed}), "failed", {}),
            (fake.status(500), "unknown", {}), (fake.status(400), "failed", {}),
            (fake.bytes_of(b"HTTP/1.1 200 OK\r\n"), "unknown", {}), (fake.status(403), "failed", {}),
        ):  # fmt: skip
            self.upstream.on("create_branch", handler)
            self.client.ask(call("", name="create_branch", branch="b"))
            lines = [json.loads(line) for line in self.audit.read_text().splitlines()]
            self.assertEqual([line["verdict"] for line in lines[-2:]], ["forward", verdict])
            self.assertEqual(lines[-1]["target"], {"branch": "b", **target})
            self.assertEqual(bool(lines[-1]["reason"]), verdict != "done")
        self.assertNotIn("words of GitHub", self.audit.read_text())


class OwnProxyTest(unittest.TestCase):
    """A test that starts a proxy of its own."""

    def start(
        self, *argv: str, setup: str = "", pass_fds: tuple[int, ...] = (), **env: str
    ) -> Proxy:
        """`setup` is run before its main()."""
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        script = Path(folder.name, "prepared.py")
        script.write_text(
            f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
            f"import github_mcp_proxy as p\n{setup}\nsys.exit(p.main())\n"
        )
        more: Any = env
        running = Proxy(self.upstream.url, *argv, script=script, pass_fds=pass_fds, **more)
        self.addCleanup(running.stop)
        return running

    def setUp(self) -> None:
        self.upstream = fake.Upstream()
        self.upstream.__enter__()
        self.addCleanup(self.upstream.__exit__)


class ReceiptTest(OwnProxyTest):
    """What is printed when stdin closes, and what a probe leaves behind: nothing."""

    PROBE = "the-probe-of-this-run-0123456789"

    def setUp(self) -> None:
        super().setUp()
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.audit = Path(folder.name, "audit.jsonl")
        self.running = Proxy(
            self.upstream.url, "--exit-with-stdin", "--audit", str(self.audit),
            GITHUB_MCP_PROBE_SECRET=self.PROBE,
        )  # fmt: skip
        self.addCleanup(self.running.stop)
        self.client = self.connect()

    def connect(self, secret: str = SECRET) -> Client:
        client = Client(self.running.port, secret)
        self.addCleanup(client.close)
        return client

    def receipt(self) -> list[Any]:
        assert self.running.process.stdin and self.running.process.stdout
        self.running.process.stdin.close()
        lines = [json.loads(line) for line in self.running.process.stdout]
        self.assertEqual(self.running.process.wait(TIMEOUT), 0)
        return lines

    def test_what_was_done_and_refused(self) -> None:
        self.assertEqual(self.running.lines[1], "read-write")
        url = "https://github.com/good/r/pull/12"
        self.upstream.on("create_pull_request", fake.text(json.dumps({"url": url})))
        self.upstream.on("create_branch", fake.status(500))
        self.upstream.on("add_issue_comment", fake.status(400))
        self.upstream.on("issue_read", fake.text('{"number": 1, "title": "of another"}'))
        for message in (
            request("initialize", **INITIALIZE),
            call(),
            call("", name="create_branch", branch="a b; done: x"),
            call("", name="create_branch", branch="fix"),
            call("", name="create_branch", branch="main"),
            call("", name="create_branch", branch="main"),
            call("", name="create_pull_request", head="fix", base="main", title="t"),
            call("", name="add_issue_comment", issue_number=5, body="b"),
            call("", name="issue_read", method="get", issue_number=1),
            call("", name="create_branch", branch="x\ny"),
        ):
            self.client.ask(message)
        counts, *lines = self.receipt()
        self.assertEqual(counts, {"reads": 2, "writes": 3, "refused": 5})
        told = [(line["verdict"], line["what"], line["url"], line["count"]) for line in lines]
        self.assertEqual(
            told,
            [
                ("unknown", "create_branch branch=fix", "", 1),
                ("done", "create_pull_request head=fix base=main", url, 1),
                ("failed", "add_issue_comment issue_number=5", "", 1),
                ("refused", 'create_branch branch="a b; done: x"', "", 1),
                ("refused", "create_branch branch=main", "", 2),
                ("withheld", "issue_read method=get issue_number=1", "", 1),
                ("refused", 'create_branch branch="x\\ny"', "", 1),
            ],
        )
        self.assertIn("default branch", lines[4]["reason"])
        self.assertEqual([line["verdict"] for line in lines if not line["reason"]], ["done"])

    def test_no_refusals_hide_a_write(self) -> None:
        for number in range(30):
            self.client.ask(call("", name=f"no_such_tool_{number}"))
        self.client.ask(call("", name="create_branch", branch="last"))
        counts, *lines = self.receipt()
        self.assertEqual(counts, {"reads": 0, "writes": 1, "refused": 30})
        self.assertEqual(len(lines), 21)
        self.assertEqual(lines[0]["what"], "create_branch branch=last")
        self.assertEqual(lines[-1], {"more": 11})

    def test_a_write_that_is_under_way_is_unknown(self) -> None:
        self.upstream.on("create_branch", fake.hang)
        self.client.send(call("", name="create_branch", branch="fix"))
        self.upstream.wait_for_calls(1, "create_branch")
        counts, line = self.receipt()
        self.assertEqual((counts["writes"], line["verdict"]), (1, "unknown"))
        self.assertTrue(self.client.is_closed())

    def test_a_probe_is_judged_and_leaves_nothing(self) -> None:
        probe = self.connect(self.PROBE)
        for word, message in (
            ("only good/r is served", call(owner="evil")),
            ("a probe is not passed on", call()),
            ("a probe is not passed on", call("", name="create_branch", branch="fix")),
            ("main is the default branch", call("", name="create_branch", branch="main")),
        ):
            self.assertIn(word, text_of(probe.ask(message)))
        self.assertIn("not passed on", probe.ask(request("tools/list"))["error"]["message"])
        wrong = self.connect(self.PROBE + "-and-more")
        wrong.send(call())
        self.assertEqual(wrong.read()[0], 403)
        self.assertEqual(self.upstream.calls(), [])
        self.assertEqual(self.audit.read_text(), "")
        self.assertEqual(self.receipt(), [{"reads": 0, "writes": 0, "refused": 0}])


class ApproveTest(OwnProxyTest):
    """The policy's command is asked before each write."""

    def ask(self, command: str, message: Any, setup: str = "", **env: str) -> str:
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        policy = Path(folder.name, "policy.ini")
        policy.write_text(f"[policy]\napprove = {command}\n")
        more: Any = env
        running = self.start("--policy", str(policy), setup=setup, **more)
        self.client = Client(running.port)
        self.addCleanup(self.client.close)
        return text_of(self.client.ask(message))

    def test_what_it_is_asked_and_with_what_around_it(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            command = f"cat > {folder}/asked; env > {folder}/env; pwd > {folder}/pwd"
            message = call("", name="add_issue_comment", issue_number=5, body="all of it " * 100)
            secrets = {"GH_TOKEN": "gh-token-of-the-host", "npm_token": "npm-of-the-host",
                       "SSH_PASSPHRASE": "words-of-the-host", "AWS_ACCESS_KEY_ID": "key-of-the-host"}  # fmt: skip
            kept = {"DISPLAY": ":7", **secrets}
            answer = self.ask(command, message, GITHUB_MCP_PROBE_SECRET="p" * 20, **kept)
            self.assertEqual(answer, "ok add_issue_comment")
            asked = json.loads(Path(folder, "asked").read_text())
            self.assertEqual((asked["tool"], asked["repository"]), ("add_issue_comment", "good/r"))
            self.assertEqual(asked["target"], {"issue_number": 5})
            self.assertEqual(asked["arguments"]["body"], "all of it " * 100)
            self.assertEqual(Path(folder, "pwd").read_text(), "/\n")
            environment = Path(folder, "env").read_text()
            self.assertIn("DISPLAY=:7", environment)
            for word in (TOKEN, SECRET, "GITHUB_MCP_", *secrets, "of-the-host", "p" * 20):
                self.assertNotIn(word, environment)
            Path(folder, "asked").unlink()
            self.assertEqual(text_of(self.client.ask(call())), "ok get_file_contents")
            self.assertIn(
                "default", text_of(self.client.ask(call("", name="create_branch", branch="main")))
            )
            self.assertFalse(Path(folder, "asked").exists(), "neither is a question")

    def test_sh_is_not_looked_for_in_the_path(self) -> None:
        message = call("", name="create_branch", branch="fix")
        self.assertEqual(self.ask("exit 0", message, PATH="/nonexistent"), "ok create_branch")

    def test_what_a_command_leaves_behind_does_not_hold_up_the_end(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            pid = Path(folder, "pid")
            # It keeps the command's stdout open, from a session of its own.
            leaves = f"setsid sh -c 'echo $$ > {pid}; exec sleep 60' & exit 0"
            policy = Path(folder, "policy.ini")
            policy.write_text(f"[policy]\napprove = {leaves}\n")
            running = self.start("--policy", str(policy))
            client = Client(running.port)
            self.addCleanup(client.close)
            client.send(call("", name="create_branch", branch="fix"))
            wait_for(lambda: pid.exists() and pid.read_text(), "the command leaves something")
            try:
                began = time.monotonic()
                self.assertEqual(running.stop(), 0)
                self.assertLess(time.monotonic() - began, 20)
            finally:
                os.kill(int(pid.read_text()), signal.SIGKILL)

    def test_no_is_a_reason_and_silence_is_a_no(self) -> None:
        message = call("", name="create_branch", branch="fix")
        for command, reason in (
            ("echo not now; false", "not now"),
            ("printf 'a\\033[2Jb'; exit 3", "a [2Jb"),
            ("exit 1", "did not allow it"),
            ("no-such-command-at-all", "did not allow it"),
        ):
            with self.subTest(command):
                self.assertIn(reason, self.ask(command, message))
        self.assertIn(
            "within 1 s", self.ask("sleep 60 & sleep 60", message, "p.APPROVE_SECONDS = 1")
        )
        self.assertEqual(self.upstream.calls("create_branch"), [])


class CrowdTest(OwnProxyTest):
    def test_more_clients_than_files_are_no_traceback(self) -> None:
        running = self.start(
            setup="import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (40, 60))"
        )
        clients = [socket.create_connection(("127.0.0.1", running.port)) for _ in range(80)]
        wait_for(lambda: "out of system resource" in running.stderr(), "it says so")
        for client in clients:
            client.close()
        self.assertEqual(running.stop(), 0)
        self.assertIn("out of system resource", running.stderr())
        self.assertNotIn("Traceback", running.stderr())

    """More at once than have a place."""

    def connect(self, running: Proxy, count: int) -> list[Client]:
        clients = [Client(running.port) for _ in range(count)]
        for client in clients:
            self.addCleanup(client.close)
        return clients

    def test_writes_that_wait_for_the_default_branch_do_not_wait_for_each_other(self) -> None:
        running = self.start()
        clients = self.connect(running, 30)
        for number, client in enumerate(clients):
            client.send(call("", name="create_branch", branch=f"b{number}"))
        answers = {text_of(json.loads(client.read()[2])) for client in clients}
        self.assertEqual(answers, {"ok create_branch"})

    def test_reads_pass_while_the_user_is_asked_and_other_writes_do_not_wait(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            policy, yes = Path(folder, "policy.ini"), Path(folder, "yes")
            policy.write_text(f"[policy]\napprove = while ! test -e {yes}; do sleep 0.05; done\n")
            running = self.start("--policy", str(policy))
            clients = self.connect(running, 12)
            for number, client in enumerate(clients):
                client.send(call("", name="create_branch", branch=f"b{number}"))
            (reader,) = self.connect(running, 1)
            self.assertEqual(text_of(reader.ask(call())), "ok get_file_contents")
            yes.touch()
            answers = [text_of(json.loads(client.read()[2])) for client in clients]
            self.assertEqual(answers.count("ok create_branch"), 1)
            self.assertEqual(sum("one after the other" in answer for answer in answers), 11)


class FaultTest(OwnProxyTest):
    """What would fill its memory or confuse it: it is refused, and the next client is served."""

    def connect(self, running: Proxy) -> Client:
        client = Client(running.port)
        self.addCleanup(client.close)
        return client

    def peak(self, running: Proxy) -> int:
        """The most that it ever had resident, in MB."""
        try:
            status = Path(f"/proc/{running.process.pid}/status").read_text()
        except FileNotFoundError:
            self.skipTest("no /proc")
        return int(status.partition("VmHWM:")[2].split()[0]) // 1024

    def served(self, running: Proxy) -> None:
        self.assertEqual(text_of(self.connect(running).ask(call())), "ok get_file_contents")
        self.assertNotIn("Traceback", running.stderr())

    def test_a_client_that_asks_on_and_on_and_does_not_read(self) -> None:
        running = self.start()
        self.upstream.on("README.md", fake.text("x" * 100_000))
        client = self.connect(running)
        client.socket.setblocking(False)
        body = json.dumps(call()).encode()
        one = client.head(length=len(body)) + body
        refused = 0
        while refused < 20:  # its buffers are full, and stay so
            try:
                client.socket.send(one * 50)
                refused = 0
            except BlockingIOError:
                refused += 1
                time.sleep(0.05)
            except ConnectionError:
                break  # more than a megabyte waits for its turn
        self.assertLess(self.peak(running), 60)
        self.upstream.reset()
        self.served(running)

    def test_small_requests_that_are_large_as_trees(self) -> None:
        """Hundreds of them, while all wait to be told which branch is the default one."""
        told = threading.Event()

        def wait(x: fake.Exchange) -> None:
            told.wait(TIMEOUT)
            x.fail(500, -32603, "not now")

        self.upstream.on("own", wait)
        running = self.start()
        message = call("", name="push_files", branch="b", files=[{"": 0}] * 15_000)
        clients = [self.connect(running) for _ in range(40)]
        for client in clients:
            client.send(message)
        time.sleep(0.5)
        peak = self.peak(running)
        told.set()
        self.assertEqual({client.read()[0] for client in clients}, {200})
        self.assertLess(peak, 90)
        self.served(running)

    def test_a_client_that_sends_on_and_leaves_is_noticed(self) -> None:
        self.upstream.on("README.md", fake.hang_in_stream)
        running = self.start()
        before = running.descriptors()
        clients = [self.connect(running) for _ in range(10)]
        for client in clients:
            client.send(call())
            client.read_head()
            client.socket.sendall(client.head(length=500_000) + b"x" * 200_000)
            client.close()
        self.upstream.wait_until_free()
        deadline = time.monotonic() + TIMEOUT
        while running.descriptors() > before and time.monotonic() < deadline:
            time.sleep(0.02)
        self.assertLessEqual(running.descriptors(), before + 2)

    def test_a_stream_that_is_broken_off_is_not_waited_for(self) -> None:
        """A newer client cancels so: the upstream is to know at once."""
        self.upstream.on("README.md", fake.hang_in_stream)
        running = self.start(setup="p.LINGER_SECONDS = 60")
        client = self.connect(running)
        client.send(call())
        client.read_head()
        client.close()
        self.upstream.wait_until_free()

    def test_a_stderr_that_nobody_reads_stops_nothing(self) -> None:
        read_end, write_end = os.pipe()
        self.addCleanup(os.close, read_end)
        running = self.start(setup=f"import os; os.dup2({write_end}, 2)", pass_fds=(write_end,))
        os.close(write_end)
        client = self.connect(running)
        for number in range(700):
            self.assertIn("Refused", text_of(client.ask(call("../" + "x" * 200, number))))
        self.assertEqual(text_of(client.ask(call())), "ok get_file_contents")

    def test_what_comes_while_the_client_does_not_read_is_not_lost(self) -> None:
        def burst(x: fake.Exchange) -> None:
            x.stream()
            for number in range(100):
                x.event({**fake.note(number), "x": "y" * 50_000})
            x.hang()

        running = self.start()
        for _ in range(3):
            self.upstream.on("README.md", fake.big(10_000_000, sse=False))
            client = self.connect(running)
            client.send(call())
            time.sleep(0.1)
            self.assertEqual(len(text_of(json.loads(client.read()[2]))), 10_000_000)
            self.upstream.on("README.md", burst)
            client = self.connect(running)
            client.send(call())
            time.sleep(0.1)
            client.read_head()
            for number in range(100):
                self.assertIn(f'"progress":{number}}}'.encode(), client.chunk()[:200])

    def test_large_requests_that_are_never_finished(self) -> None:
        running = self.start(setup="p.REQUEST_SECONDS = 1")
        size = 5 * 1024 * 1024
        clients = [self.connect(running) for _ in range(12)]
        for client in clients:
            client.socket.sendall(client.head(length=size))
            client.socket.settimeout(0.1)
            with contextlib.suppress(socket.timeout, ConnectionError):
                client.socket.sendall(b"x" * (size - 1))
        self.assertLess(self.peak(running), 120)
        for client in clients:
            self.assertTrue(client.is_closed())
        self.served(running)

    def test_what_an_upstream_can_make_of_an_answer(self) -> None:
        running = self.start()
        deep = "[" * 3000 + "]" * 3000
        null = {"name": "get_tag", "inputSchema": {"properties": {"tag": 1}, "required": None}}
        self.upstream.on("search_issues", fake.text(deep))
        self.upstream.on("issue_read", fake.text('{"number":1,"html_url":[],"repository":7}'))
        self.upstream.on("tools/list", lambda x: x.answer(x.result({"tools": [null]})))
        info = {"serverInfo": "github", "capabilities": "tools"}
        self.upstream.on("initialize", lambda x: x.answer(x.result(info)))
        self.upstream.on("own", lambda x: x.answer(x.text('{"items":[{"full_name":null}]}')))
        for message in (
            call("", name="search_issues", query="x"),
            call("", name="issue_read", method="get", issue_number=1),
            request("tools/list"),
            request("initialize", **INITIALIZE),
            call("", name="create_branch", branch="b"),
        ):
            with self.subTest(message):
                answer = self.connect(running).ask(message)
                self.assertEqual(answer["id"], 1)
                self.assertTrue("error" in answer or answer["result"]["isError"], answer)
        self.assertNotIn("a fault of the proxy", running.stderr())
        self.served(running)

    def test_a_log_line_stays_a_line(self) -> None:
        running = self.start()
        forged = "x\ngithub_mcp_proxy: listening\x1b[2J\x85\u2028"
        self.connect(running).ask(request(forged))
        self.connect(running).ask(call("", name=forged))
        lines = running.stderr().splitlines()
        self.assertEqual(len(lines), 2, lines)
        self.assertTrue(all(line.isprintable() and " refuse: " in line for line in lines), lines)

    def test_what_cannot_be_recorded_does_not_pass(self) -> None:
        if not sys.platform.startswith("linux"):
            self.skipTest("no prlimit")
        with tempfile.TemporaryDirectory() as folder:
            audit = Path(folder, "audit.jsonl")
            limit = (
                "import resource, signal\n"
                "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
                "resource.setrlimit(resource.RLIMIT_FSIZE, (400, resource.RLIM_INFINITY))"
            )
            running = self.start("--audit", str(audit), setup=limit)
            client = self.connect(running)
            answers = [text_of(client.ask(call(id=n))) for n in range(9)]
            passed = answers.index(answers[-1])
            self.assertIn("audit", answers[-1])
            self.assertEqual(len(self.upstream.calls()), passed)
            self.assertEqual(audit.read_text().count("\n"), passed)
            resource.prlimit(running.process.pid, resource.RLIMIT_FSIZE, (10**6, 10**6))
            self.assertEqual(text_of(client.ask(call("last"))), "ok get_file_contents")
            self.assertIn('{"path":"last"}}\n', audit.read_text())


class LimitsTest(unittest.TestCase):
    """Limits of time, with shorter ones than the program's."""

    def test_clients_that_do_not_finish_their_request_are_closed(self) -> None:
        with tempfile.TemporaryDirectory() as folder, fake.Upstream() as upstream:
            script = Path(folder, "quick.py")
            script.write_text(
                f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
                "import github_mcp_proxy as p\n"
                "p.REQUEST_SECONDS, p.IDLE_SECONDS = 0.3, 0.6\n"
                "sys.exit(p.main())\n"
            )
            running = Proxy(upstream.url, script=script)
            try:
                slow, idle = Client(running.port), Client(running.port)
                with self.assertRaises(OSError):  # while it goes on, however little it sends
                    for _ in range(50):
                        slow.socket.sendall(b"P")
                        time.sleep(0.05)
                self.assertTrue(idle.is_closed())
                trickle = Client(running.port)
                with self.assertRaises(OSError):
                    trickle.socket.sendall(trickle.head("POST", "/mcp", "Content-Length: 99"))
                    for _ in range(50):
                        trickle.socket.sendall(b" ")
                        time.sleep(0.05)
                for client in (slow, idle, trickle):
                    client.close()
            finally:
                running.stop()


class TokenTest(unittest.TestCase):
    COMMAND = """\
import json, os, pathlib, sys, time
count = pathlib.Path(sys.argv[1])
number = int(count.read_text() or 0) + 1 if count.exists() else 1
count.write_text(str(number))
pathlib.Path(sys.argv[1] + ".env").write_text(repr(dict(os.environ)))
if sys.argv[2] == "fail": sys.exit(3)
print(json.dumps({"token": f"token-number-{number}-0123456789", "expires_at": time.time() + float(sys.argv[2])}))
"""

    def run_with(
        self, seconds: str, tokens: set[str] | None, count: int
    ) -> tuple[list[Any], int, str]:
        """(answers, how often the command was run, its environment)."""
        with tempfile.TemporaryDirectory() as folder, fake.Upstream() as upstream:
            script, counter = Path(folder, "command.py"), Path(folder, "count")
            script.write_text(self.COMMAND)
            upstream.tokens = tokens
            command = f"{sys.executable} {script} {counter} {seconds}"
            running = Proxy(upstream.url, "--token-command", command)
            try:
                answers: list[Any] = []
                client = Client(running.port)
                for _ in range(count):
                    answers.append(client.ask(call()))
                client.close()
            finally:
                running.stop()
            return answers, int(counter.read_text()), Path(f"{counter}.env").read_text()

    def test_it_is_asked_once_for_all(self) -> None:
        answers, runs, environment = self.run_with("3600", {"token-number-1-0123456789"}, 5)
        self.assertEqual({text_of(answer) for answer in answers}, {"ok get_file_contents"})
        self.assertEqual(runs, 1)
        self.assertNotIn(TOKEN, environment)
        self.assertNotIn(SECRET, environment)

    def test_it_is_asked_again_when_the_token_is_refused(self) -> None:
        answers, runs, _ = self.run_with("3600", {"token-number-2-0123456789"}, 3)
        self.assertEqual({text_of(answer) for answer in answers}, {"ok get_file_contents"})
        self.assertEqual(runs, 2)

    def test_it_is_asked_again_before_the_token_expires(self) -> None:
        answers, runs, _ = self.run_with("0", None, 3)
        self.assertEqual({text_of(answer) for answer in answers}, {"ok get_file_contents"})
        self.assertGreaterEqual(runs, 3)

    def test_its_failure_is_said(self) -> None:
        with tempfile.TemporaryDirectory() as folder, fake.Upstream() as upstream:
            script = Path(folder, "command.py")
            script.write_text(self.COMMAND)
            command = f"{sys.executable} {script} {folder}/count fail"
            running = Proxy(upstream.url, "--token-command", command)
            self.assertEqual(running.process.wait(TIMEOUT), 1)
            running.stop()
        self.assertEqual(running.port, 0)
        self.assertIn("error: ", running.stderr())
        self.assertIn("the host's token command failed", running.stderr())

    def test_it_does_not_outlive_the_proxy(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            script, mark = Path(folder, "command.py"), Path(folder, "pid")
            text = (
                f"import os, time\nopen({str(mark)!r}, 'w').write(str(os.getpid()))\ntime.sleep(60)"
            )
            script.write_text(text)
            process = subprocess.Popen(
                [sys.executable, str(SCRIPT), "--exit-with-stdin", "--token-command",
                 f"{sys.executable} {script}"],
                env={**BARE, "GITHUB_MCP_OWNER": "o", "GITHUB_MCP_REPO": "r"},
                stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            )  # fmt: skip
            deadline = time.monotonic() + TIMEOUT
            while not (mark.exists() and mark.read_text()) and time.monotonic() < deadline:
                time.sleep(0.02)
            assert process.stdin
            process.stdin.close()
            self.assertEqual(process.wait(10), 0)
            stat = Path(f"/proc/{mark.read_text()}/stat")

            def is_over() -> bool:
                try:
                    return ") Z " in stat.read_text()  # ended, where nobody reaps
                except (FileNotFoundError, ProcessLookupError):
                    return True

            wait_for(is_over, "the command is ended")


class CommandLineTest(unittest.TestCase):
    def run_script(
        self, *argv: str, script: Path = SCRIPT, **env: str
    ) -> subprocess.CompletedProcess[str]:
        environment = {**BARE, "GITHUB_MCP_TOKEN": TOKEN, "GITHUB_MCP_OWNER": "o",
                       "GITHUB_MCP_REPO": "r", "GITHUB_MCP_UPSTREAM": "http://127.0.0.1:9/", **env}  # fmt: skip
        return subprocess.run(
            [sys.executable, str(script), *argv],
            env={key: value for key, value in environment.items() if value},
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
            stdin=subprocess.DEVNULL,
        )

    def failure(self, *argv: str, **env: str) -> tuple[int, str]:
        """(status, what it says on stderr) of a start that fails, without a process."""
        environment = {"GITHUB_MCP_TOKEN": TOKEN, "GITHUB_MCP_OWNER": "o", "GITHUB_MCP_REPO": "r",
                       "GITHUB_MCP_UPSTREAM": "http://127.0.0.1:9/", **env}  # fmt: skip
        said: list[str] = []
        caught = unittest.mock.patch.object(proxy, "log", said.append)
        with unittest.mock.patch.dict(os.environ, environment, clear=True), caught:
            status = proxy.main(list(argv))
        return status, "\n".join(said)

    def test_what_is_wrong_is_said_in_one_line_and_the_status_is_2(self) -> None:
        bad_token = "ghp_with blank"
        for word, argv, env in (
            ("GITHUB_MCP_TOKEN is not set", (), {"GITHUB_MCP_TOKEN": ""}),
            ("characters that no token has", (), {"GITHUB_MCP_TOKEN": bad_token}),
            ("GITHUB_MCP_OWNER is not set", (), {"GITHUB_MCP_OWNER": ""}),
            ("not a user or an organization", (), {"GITHUB_MCP_OWNER": "a/b"}),
            ("GITHUB_MCP_REPO is not set", (), {"GITHUB_MCP_REPO": ""}),
            ("not a repository's name", (), {"GITHUB_MCP_REPO": ".."}),
            ("GITHUB_MCP_READONLY is not 0 or 1", (), {"GITHUB_MCP_READONLY": "perhaps"}),
            ("HTTPS_PROXY is not", ("--upstream", "https://a"), {"HTTPS_PROXY": "https://u:p@b"}),
            ("HTTPS_PROXY is not", ("--upstream", "https://a"), {"https_proxy": "socks5://b"}),
            ("HTTPS_PROXY is not", ("--upstream", "https://a"), {"https_proxy": "http://[::1"}),
            ("HTTPS_PROXY is not", ("--upstream", "https://a"), {"https_proxy": "http://a:99999"}),
            ("HTTPS_PROXY is not", ("--upstream", "https://a"), {"https_proxy": "http://u:p#w@a"}),
            ("GITHUB_MCP_SECRET must have 16", (), {"GITHUB_MCP_SECRET": "short"}),
            ("GITHUB_MCP_PROBE_SECRET must have", (), {"GITHUB_MCP_PROBE_SECRET": "short"}),
            ("--upstream must be https", ("--upstream", "http://example.com/"), {}),
            ("--upstream is not an address", ("--upstream", "https://user@example.com/"), {}),
            ("--upstream is not an address", ("--upstream", "https://example.com/?x"), {}),
            ("cannot read the policy file", ("--policy", "/nonexistent"), {}),
            ("cannot read the policy file", ("--policy", ""), {}),
            ("cannot write the audit file", ("--audit", ""), {}),
            ("cannot read certificates", ("--ca-file", "/nonexistent"), {}),
            ("cannot read certificates", ("--ca-file", "/"), {}),
            ("cannot read certificates", ("--ca-file", "/dev/null"), {}),
            ("--git must be https", ("--git", "http://example.com"), {}),
            ("--git is not an address", ("--git", "ftp://x"), {}),
            ("cannot write the audit file", ("--audit", "/nonexistent/x"), {}),
        ):
            with self.subTest(f"{argv} {env}"):
                status, said = self.failure(*argv, **env)
                self.assertEqual(status, 2)
                self.assertIn("error: ", said.splitlines()[0])
                self.assertIn(word, said.splitlines()[0])
                self.assertLessEqual(len(said.splitlines()), 2)
                self.assertNotIn(bad_token, said)
                self.assertNotIn(TOKEN, said)
        done = self.run_script(GITHUB_MCP_TOKEN=bad_token)
        self.assertEqual((done.returncode, done.stdout), (2, ""))
        self.assertIn("error: the GitHub token has characters", done.stderr)

    def test_wrong_flags(self) -> None:
        for word, argv in (
            ("unrecognized", ["--nonsense"]),
            ("not ADDRESS:PORT", ["--listen", "x"]),
            ("not a number of seconds", ["--timeout", "-1"]),
            ("not a number of seconds", ["--timeout", "0"]),
        ):
            said = io.StringIO()
            with contextlib.redirect_stderr(said), self.assertRaises(SystemExit) as caught:
                proxy.build_parser().parse_args(argv)
            self.assertEqual(caught.exception.code, 2)
            self.assertIn(word, said.getvalue())

    def test_what_is_wrong_in_a_policy_is_named(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            policy = Path(folder, "policy.ini")
            for text, words in (
                ("", "has no section [policy]"), ("[policy]\nwrites_per_hour = -1", "not a value"),
                ("[policy]\nwrites_per_hour = " + "9" * 5000, "not a value"),
                ("[policy]\nreadonly = maybe", "not a value"), ("[policy]\nx = y", "known: "),
            ):  # fmt: skip
                policy.write_text(text)
                status, said = self.failure("--policy", str(policy))
                self.assertEqual(status, 2)
                self.assertIn(words, said)
            policy.write_text("[policy]\nreadonly = yes\n", encoding="utf-8-sig")
            running = Proxy("http://127.0.0.1:9/", "--policy", str(policy))
            self.assertEqual(running.lines[1], "read-only")
            running.stop()

    def test_a_stdout_that_takes_nothing(self) -> None:
        env = {**BARE, "GITHUB_MCP_TOKEN": TOKEN, "GITHUB_MCP_OWNER": "o", "GITHUB_MCP_REPO": "r"}
        with open("/dev/full", "w") as full:
            done = subprocess.run([sys.executable, str(SCRIPT)], env=env, stdout=full,
                                  stderr=subprocess.PIPE, text=True, timeout=TIMEOUT)  # fmt: skip
        self.assertEqual(done.returncode, 1, done.stderr)
        self.assertIn("cannot write to stdout: No space left", done.stderr)

    def test_version_and_help(self) -> None:
        self.assertIn(proxy.__version__, self.run_script("--version").stdout)
        text = self.run_script("--help").stdout
        for word in ("GITHUB_MCP_LOCKDOWN", "--token-command", "130"):
            self.assertIn(word, text)

    def test_a_port_that_is_taken(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            done = self.run_script("--listen", f"127.0.0.1:{taken.getsockname()[1]}")
        self.assertEqual((done.returncode, done.stdout), (1, ""))
        self.assertIn("cannot listen", done.stderr)

    def test_it_ends_with_stdin_and_signals(self) -> None:
        for argv, end, status in (
            (["--exit-with-stdin"], 0, 0),
            ([], signal.SIGTERM, 0),
            ([], signal.SIGINT, 130),
        ):
            running = Proxy("http://127.0.0.1:9/", *argv)
            assert running.process.stdin
            if end:
                running.process.send_signal(end)
            else:
                running.process.stdin.close()
            self.assertEqual(running.process.wait(TIMEOUT), status)
            with self.assertRaises(OSError):
                socket.create_connection(("127.0.0.1", running.port))
            self.assertNotIn("Traceback", running.stderr())
            running.stop()

    def test_without_a_secret_it_warns(self) -> None:
        running = Proxy("http://127.0.0.1:9/", GITHUB_MCP_SECRET="")
        running.stop()
        self.assertIn("no secret", running.stderr())

    def test_copied_alone(self) -> None:
        with tempfile.TemporaryDirectory() as folder, fake.Upstream() as upstream:
            script = Path(shutil.copy(SCRIPT, folder))
            running = Proxy(upstream.url, script=script)
            try:
                client = Client(running.port)
                self.assertEqual(text_of(client.ask(call())), "ok get_file_contents")
                client.close()
            finally:
                running.stop()
            self.assertEqual(os.listdir(folder), [script.name])

    def test_tools_that_differ_from_the_table(self) -> None:
        script = ROOT / "tests/tools/check_upstream.py"
        with fake.Upstream() as upstream:
            schema: Any = {"properties": {"owner": {}, "repo": {}, "tag": {}, "namespace": {}}}
            upstream.tools = [
                {"name": "get_tag", "inputSchema": schema},
                {"name": "new", "inputSchema": {}},
            ]
            done = self.run_script(script=script, GITHUB_MCP_UPSTREAM=upstream.url)
        self.assertEqual(done.stderr, "")
        self.assertIn("not in the table: new", done.stdout)
        self.assertEqual(
            (done.returncode, done.stdout.splitlines()[-1]), (1, "+ get_tag: namespace")
        )

    def through_a_companys_proxy(self, upstream: fake.Upstream, ca: str) -> None:
        """By CONNECT, with the proxy's password for the proxy alone; not where NO_PROXY says so."""
        with CompanyProxy(b"user:w@rd") as company:
            rows: list[tuple[dict[str, Any], int, str]] = [
                ({"HTTPS_PROXY": company.url("user:w%40rd@")}, 1, "ok get_file_contents"),
                (
                    {"https_proxy": company.url("user:w%40rd@"), "no_proxy": "localhost"},
                    0,
                    "ok get",
                ),
                ({"HTTPS_PROXY": company.url("user:wrong@")}, 1, "407': its address needs"),
                ({"HTTPS_PROXY": company.url("")}, 1, "407': its address needs"),
                ({"HTTPS_PROXY": "http://127.0.0.1:1"}, 0, "cannot be reached"),
            ]
            for env, seen, word in rows:
                company.heads.clear()
                running = Proxy(upstream.url, "--ca-file", ca, **env)
                try:
                    client = Client(running.port)
                    answer = json.dumps([client.ask(call()), client.ask(call())])
                    client.close()
                finally:
                    running.stop()
                self.assertIn(word, answer, env)
                self.assertGreaterEqual(len(company.heads), seen, env)
                self.assertEqual(bool(company.heads), bool(seen), env)
                for head in company.heads:
                    port = urlsplit(upstream.url).port
                    self.assertTrue(head.startswith(f"CONNECT localhost:{port} HTTP/1.1\r\n"), head)
                    self.assertNotIn(TOKEN, head)
                self.assertNotIn("w@rd", running.stderr())
                self.assertNotIn("wrong", running.stderr())

    def forged_behind_connect(self, upstream: fake.Upstream, ca: str) -> None:
        """What a company's proxy adds in clear text is not taken for GitHub's answer."""
        with CompanyProxy(b"u:p") as company:
            text = {"content": [{"type": "text", "text": "forged"}]}
            forged = json.dumps({"jsonrpc": "2.0", "id": 1, "result": text}).encode()
            company.more = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
            company.more += b"Content-Length: %d\r\n\r\n%b" % (len(forged), forged)
            running = Proxy(upstream.url, "--ca-file", ca, HTTPS_PROXY=company.url("u:p@"))
            try:
                client = Client(running.port)
                said = json.dumps(client.ask(call()))
                client.close()
            finally:
                running.stop()
        self.assertIn("says more than it was asked", said)

    def test_tls(self) -> None:
        if not shutil.which("openssl"):
            self.skipTest("openssl is not on PATH")
        import ssl

        with tempfile.TemporaryDirectory() as folder:
            # A CA as companies make them: not critical, and so none for Python 3.13's strict flag.
            form = "[req]\ndistinguished_name=dn\nx509_extensions=ca\n[dn]\n[ca]\nbasicConstraints=CA:TRUE\n"
            Path(folder, "form").write_text(form)
            Path(folder, "names").write_text("subjectAltName=DNS:localhost\n")
            ca, key, cert = f"{folder}/ca.pem", f"{folder}/key.pem", f"{folder}/cert.pem"
            for command in (
                f"req -x509 -newkey rsa:2048 -nodes -keyout {folder}/ca.key -out {ca} -subj /CN=ca -config {folder}/form",
                f"req -newkey rsa:2048 -nodes -keyout {key} -out {folder}/csr -subj /CN=localhost -config {folder}/form",
                f"x509 -req -in {folder}/csr -CA {ca} -CAkey {folder}/ca.key -CAcreateserial -out {cert} -extfile {folder}/names",
            ):  # fmt: skip
                subprocess.run(["openssl", *command.split()], check=True, capture_output=True)
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(cert, key)
            with fake.Upstream(context) as upstream:
                self.through_a_companys_proxy(upstream, ca)
                self.forged_behind_connect(upstream, ca)
                for argv in ([], ["--ca-file", ca]):
                    running = Proxy(upstream.url, *argv)
                    try:
                        client = Client(running.port)
                        answer = client.ask(call())
                        client.close()
                    finally:
                        running.stop()
                    if argv:
                        self.assertEqual(text_of(answer), "ok get_file_contents")
                    else:
                        self.assertIn("(--ca-file): unable to get", answer["error"]["message"])


if __name__ == "__main__":
    unittest.main()
