"""GitHub's MCP server as the tests need it: a server on loopback that does what it is told.

Each connection has a thread, so a test can hold one in the middle of an answer. Every request is
kept as it came (`seen`): tests assert on those bytes. What is answered depends on the method of
the message, and for tools/call on the argument `path` or else the tool: `on(key, handler)` puts
a handler in place of the usual answer; those in FAULTS break the rules one by one.
"""

from __future__ import annotations

import base64
import contextlib
import json
import queue
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable
from collections.abc import Sequence
from typing import Any

PATIENCE = 20.0
LEGACY = ("2025-11-25", "2025-06-18", "2025-03-26", "2024-11-05")
MODERN = "2026-07-28"
MODERN_META = "io.modelcontextprotocol/protocolVersion"
REPOSITORY_ID = 4711
REASONS = {200: "OK", 202: "Accepted", 204: "No Content", 302: "Found", 401: "Unauthorized"}
# What an answer of GitHub's has besides, and no client may get.
CHATTER = (
    "X-OAuth-Scopes: repo, admin:org",
    "X-RateLimit-Remaining: 4999",
    "Set-Cookie: _gh_sess=abc; path=/; secure",
    "X-GitHub-Request-Id: AB12:3456",
)
OWN_CLIENT = "agent-vm-github-mcp-proxy"

Message = dict[str, Any]


def dumps(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def event(message: Any, *fields: str) -> bytes:
    lines = ["event: message", *fields, "data: " + dumps(message).decode(), "", ""]
    return "\n".join(lines).encode()


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def note(number: int, token: Any = "p") -> Message:
    params = {"progressToken": token, "progress": number}
    return {"jsonrpc": "2.0", "method": "notifications/progress", "params": params}


class Exchange:
    """One request, and the means to answer it. All that it sends goes out at once."""

    def __init__(self, upstream: Upstream, sock: socket.socket, head: bytes, body: bytes) -> None:
        self.upstream = upstream
        self.sock = sock
        self.head = head
        self.body = body
        first, *lines = head.decode("latin-1").split("\r\n")
        self.method, self.target, self.version = first.split(" ")
        self.header_lines = lines
        self.headers = {
            name.lower(): value.strip()
            for name, _, value in (line.partition(":") for line in lines)
        }
        try:
            self.message: Message = json.loads(body)
        except ValueError:
            self.message = {}
        self.params: Message = self.message.get("params") or {}
        self.arguments: Message = self.params.get("arguments") or {}
        self.id = self.message.get("id")
        self.session = self.headers.get("mcp-session-id", "")
        self.modern = MODERN_META in (self.params.get("_meta") or {})
        # The proxy's own question, which repository this is, in a session of its own.
        client = (self.params.get("clientInfo") or {}).get("name")
        self.own = client == OWN_CLIENT or self.params.get("name") == "search_repositories"

    def send(self, data: bytes) -> None:
        self.sock.sendall(data)

    def head_of(self, status: int, *headers: str) -> bytes:
        first = f"HTTP/1.1 {status} {REASONS.get(status, 'Status')}"
        return "\r\n".join([first, *headers, *CHATTER, "", ""]).encode("latin-1")

    def body_of(self, status: int, body: bytes, *headers: str) -> None:
        kind = ("Content-Type: application/json",) if body else ()
        self.send(self.head_of(status, *kind, f"Content-Length: {len(body)}", *headers) + body)

    def json(self, message: Any, *headers: str, status: int = 200) -> None:
        self.body_of(status, dumps(message), *headers)

    def stream(self, *headers: str) -> None:
        """Begin an event stream."""
        kind = ("Content-Type: text/event-stream", "Transfer-Encoding: chunked")
        self.send(self.head_of(200, *kind, *headers))

    def event(self, message: Any, *fields: str) -> None:
        self.send(chunk(event(message, *fields)))

    def end(self) -> None:
        self.send(b"0\r\n\r\n")

    def result(self, result: Message) -> Message:
        if self.modern:
            result = {"resultType": "complete", **result}
        return {"jsonrpc": "2.0", "id": self.id, "result": result}

    def text(self, text: str) -> Message:
        return self.result({"content": [{"type": "text", "text": text}]})

    def answer(self, message: Message, *headers: str) -> None:
        """As JSON or as a stream of one event, as the server is set."""
        if self.upstream.sse:
            self.stream(*headers)
            self.send(chunk(event(message)) + b"0\r\n\r\n")
        else:
            self.json(message, *headers)

    def fail(self, status: int, code: int, text: str) -> None:
        error = {"jsonrpc": "2.0", "id": self.id, "error": {"code": code, "message": text}}
        self.json(error, status=status)

    def close(self) -> None:
        """Half-close, then close: what was sent arrives."""
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)
        self.sock.close()

    def reset(self) -> None:
        """Close with RST."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.sock.close()

    def hang(self) -> None:
        """Until the peer closes."""
        with contextlib.suppress(OSError):
            while self.sock.recv(65536):
                pass
        self.close()


Handler = Callable[[Exchange], None]


class Upstream:
    """The server. `with Upstream() as upstream:`; its settings may be changed at any time."""

    def __init__(self, tls: ssl.SSLContext | None = None) -> None:
        self.tls = tls
        self.stateful = False
        self.sse = False
        self.tokens: set[str] | None = None  # those that are accepted; None: any
        self.tools: list[Message] = []
        self.default_branch = "main"
        self.renamed = ""  # what the search calls the repository
        self.found = "always"  # by a search; "as a fork": only with fork:true; "never"
        self.handlers: dict[str, Handler] = {}
        self.seen: list[Exchange] = []
        self.sessions: set[str] = set()
        self.open: set[socket.socket] = set()
        self.accepted = 0
        self.changed = threading.Condition()
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
        self.port = self.listener.getsockname()[1]

    @property
    def url(self) -> str:
        return f"http{'s' if self.tls else ''}://localhost:{self.port}/mcp/"

    def __enter__(self) -> Upstream:
        threading.Thread(target=self.accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        # close() alone does not wake the accepting thread on every system.
        with contextlib.suppress(OSError):
            self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        self.drop_connections()

    def reset(self) -> None:
        """As new, for the next test; open connections stay."""
        with self.changed:
            self.handlers.clear()
            self.seen.clear()
        self.stateful = self.sse = False
        self.tokens = None
        self.tools = []

    def drop_connections(self) -> None:
        """Close what is open, as a server does that restarts."""
        with self.changed:
            sockets = list(self.open)
        for sock in sockets:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def on(self, key: str, handler: Handler) -> None:
        self.handlers[key] = handler

    # What a test waits for and asserts on

    def wait(self, condition: Callable[[], object], what: str) -> None:
        with self.changed:
            if not self.changed.wait_for(condition, PATIENCE):
                raise AssertionError(f"upstream: {what}: not within {PATIENCE:.0f} s")

    def calls(self, key: str = "") -> list[Exchange]:
        """The requests that clients caused, without the proxy's own; of one key, if it is given."""
        return [x for x in list(self.seen) if not x.own and (not key or key in self.keys(x))]

    def wait_for_calls(self, count: int, key: str = "") -> list[Exchange]:
        self.wait(lambda: len(self.calls(key)) >= count, f"{count} calls of {key or 'anything'}")
        return self.calls(key)

    def wait_until_free(self) -> None:
        """No connection is in the middle of an exchange or a stream."""
        self.wait(lambda: not self.busy(), "every exchange has ended")

    def busy(self) -> list[str]:
        return [t.name for t in threading.enumerate() if t.name == f"busy-{self.port}"]

    # Connections

    def accept(self) -> None:
        while True:
            try:
                sock, _ = self.listener.accept()
            except OSError:
                return
            threading.Thread(target=self.serve, args=(sock,), daemon=True).start()

    def serve(self, sock: socket.socket) -> None:
        thread = threading.current_thread()
        raw = sock
        with self.changed:
            self.open.add(raw)
            self.accepted += 1
            self.changed.notify_all()
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self.tls:
                sock = self.tls.wrap_socket(sock, server_side=True)
            rest = b""
            while True:
                exchange, rest = self.read(sock, rest)
                thread.name = f"busy-{self.port}"
                with self.changed:
                    self.seen.append(exchange)
                    self.changed.notify_all()
                self.dispatch(exchange)
                thread.name = "idle"
                with self.changed:
                    self.changed.notify_all()
        except (OSError, EOFError):
            pass
        finally:
            thread.name = "over"
            with contextlib.suppress(OSError):
                sock.close()
            with self.changed:
                self.open.discard(raw)
                self.changed.notify_all()

    def read(self, sock: socket.socket, data: bytes) -> tuple[Exchange, bytes]:
        """One request, and what came after it."""

        def more() -> bytes:
            received = sock.recv(1 << 18)
            if not received:
                raise EOFError
            return received

        while b"\r\n\r\n" not in data:
            data += more()
        head, _, data = data.partition(b"\r\n\r\n")
        exchange = Exchange(self, sock, head, b"")
        parts, size = [data], int(exchange.headers.get("content-length", 0))
        while sum(map(len, parts)) < size:
            parts.append(more())
        data = b"".join(parts)
        return Exchange(self, sock, head, data[:size]), data[size:]

    # Answers

    def keys(self, x: Exchange) -> list[str]:
        """What a handler may be put on, the most precise first."""
        if x.own:
            return ["own"]  # the proxy's question which repository this is
        if not x.message:
            return [x.method]
        method = x.message.get("method", "answer")
        return [str(x.arguments.get("path", "")), str(x.params.get("name", "")), method]

    def dispatch(self, x: Exchange) -> None:
        handlers = [self.handlers[key] for key in self.keys(x) if key in self.handlers]
        if handlers:
            return handlers[0](x)
        if self.tokens is not None and x.headers.get("authorization") not in self.accepted_lines():
            resource = 'Bearer resource_metadata="http://127.0.0.1/.well-known/oauth"'
            return x.body_of(401, b"bad credentials", f"WWW-Authenticate: {resource}")
        if self.stateful and x.session and x.session not in self.sessions:
            return x.fail(404, -32001, "session not found")
        if x.method != "POST":
            return self.delete(x)
        if x.modern and self.mismatch(x):
            return x.fail(400, -32020, f"header mismatch: {self.mismatch(x)}")
        return self.post(x)

    def accepted_lines(self) -> set[str]:
        return {f"Bearer {token}" for token in self.tokens or ()}

    def post(self, x: Exchange) -> None:
        method = x.message.get("method")
        if method is None:  # an answer to a question of ours
            return x.body_of(202, b"")
        if "id" not in x.message:
            return x.body_of(202, b"")
        if method == "initialize":
            return self.initialize(x)
        if method == "tools/list":
            more = {"ttlMs": 0, "cacheScope": "public"} if x.modern else {}
            return x.answer(x.result({"tools": self.tools, **more}))
        if method == "tools/call":
            return self.call(x)
        if method == "server/discover":
            return x.answer(x.result({"supportedVersions": [MODERN, *LEGACY], "capabilities": {}}))
        if method in ("ping", "logging/setLevel"):
            return x.answer(x.result({}))
        return x.fail(404 if x.modern else 200, -32601, "method not found")

    def initialize(self, x: Exchange) -> None:
        version = x.params.get("protocolVersion")
        result = {
            "protocolVersion": version if version in LEGACY else LEGACY[0],
            "capabilities": {"tools": {"listChanged": True}, "prompts": {}},
            "serverInfo": {"name": "github-mcp-server", "version": "v1.10.1"},
            "instructions": "call get_me first",
        }
        headers = []
        if self.stateful:
            session = f"session-{len(self.sessions) + 1}"
            self.sessions.add(session)
            headers = [f"Mcp-Session-Id: {session}"]
        x.answer(x.result(result), *headers)

    def call(self, x: Exchange) -> None:
        if x.params["name"] == "search_repositories":
            name, _, rest = x.arguments["query"].partition(" ")
            item = {"id": REPOSITORY_ID, "full_name": self.renamed or name.partition(":")[2]}
            found = self.found == "always" or (self.found == "as a fork" and "fork:true" in rest)
            hits = {"items": [{**item, "default_branch": self.default_branch}] * found}
            return x.answer(x.text(json.dumps(hits)))
        return x.answer(x.text(f"ok {x.params['name']}"))

    def mismatch(self, x: Exchange) -> str:
        """The first mirrored header that differs from the body, as the real server checks them."""
        expected = {
            "mcp-protocol-version": x.params["_meta"][MODERN_META],
            "mcp-method": x.message["method"],
        }
        if "name" in x.params:
            expected["mcp-name"] = x.params["name"]
        for key in ("owner", "repo"):
            if key in x.arguments or f"mcp-param-{key}" in x.headers:
                expected[f"mcp-param-{key}"] = x.arguments.get(key)
        differs = (k for k, value in expected.items() if decoded(x.headers.get(k, "")) != value)
        return next(differs, "")

    def delete(self, x: Exchange) -> None:
        if not (self.stateful and x.session):
            return x.body_of(405, b"", "Allow: POST")
        self.sessions.discard(x.session)
        return x.body_of(204, b"")


def decoded(value: str) -> str:
    if value.startswith("=?base64?") and value.endswith("?="):
        return base64.b64decode(value[9:-2]).decode()
    return value


# --- handlers: what a test puts in place of an answer ---


def text(value: str) -> Handler:
    return lambda x: x.answer(x.text(value))


def bytes_of(data: bytes, *, then: str = "close") -> Handler:
    """Just these bytes, and then `close`, `reset` or `hang`."""

    def handler(x: Exchange) -> None:
        x.send(data)
        getattr(x, then)()

    return handler


def status(code: int, body: bytes = b"<html>no</html>", *headers: str) -> Handler:
    return lambda x: x.body_of(code, body, *headers)


def events(*parts: bytes) -> Handler:
    """A stream of these bytes, and the answer at its end."""

    def handler(x: Exchange) -> None:
        x.stream()
        for part in parts:
            x.send(chunk(part))
        x.event(x.text("done"))
        x.end()

    return handler


class Gate:
    """A stream of notes, each sent when the test says so; then the answer."""

    def __init__(self, notes: int) -> None:
        self.notes = notes
        self.steps: queue.Queue[float] = queue.Queue()

    def step(self) -> float:
        """Let the next thing be sent; returns the time."""
        now = time.monotonic()
        self.steps.put(now)
        return now

    def __call__(self, x: Exchange) -> None:
        x.stream()
        for number in range(self.notes):
            self.steps.get(timeout=PATIENCE)
            x.event(note(number + 1))
        self.steps.get(timeout=PATIENCE)
        x.event(x.text("done"))
        x.end()


def hang(x: Exchange) -> None:
    x.hang()


def hang_in_stream(x: Exchange) -> None:
    """One note, then nothing until the peer closes."""
    x.stream()
    x.event(note(1))
    x.hang()


def big(size: int, *, sse: bool) -> Handler:
    """A large answer, made beforehand: the proxy waits half a second for its first byte."""
    text = b"0123456789abcdef" * (size // 16)

    def handler(x: Exchange) -> None:
        body = dumps(x.text("@")).replace(b'"@"', b'"%b"' % text)
        if sse:
            x.stream()
            x.send(chunk(b"event: message\ndata: %b\n\n" % body))
            x.end()
        else:
            x.body_of(200, body)

    return handler


def slowly(pieces: Sequence[bytes], pause: float) -> Handler:
    def handler(x: Exchange) -> None:
        for piece in pieces:
            x.send(piece)
            time.sleep(pause)

    return handler


def endless_head(x: Exchange) -> None:
    x.send(b"HTTP/1.1 200 OK\r\n")
    for number in range(100_000):
        x.send(b"X-Header-%d: %s\r\n" % (number, b"x" * 100))


def wrong_id(x: Exchange) -> None:
    x.json({**x.text("for another"), "id": 987654})


def gzipped(x: Exchange) -> None:
    import gzip

    x.body_of(200, gzip.compress(dumps(x.text("zipped"))), "Content-Encoding: gzip")


def cut_in_event(x: Exchange) -> None:
    """The first half of an event, then RST."""
    x.stream()
    data = event(x.text("half of this"))
    x.send(chunk(data)[: len(data) // 2])
    time.sleep(0.05)  # RST discards what the peer has not read
    x.reset()


def cut_after_event(x: Exchange) -> None:
    x.stream()
    x.event(note(1))
    time.sleep(0.05)
    x.reset()


def without_answer(x: Exchange) -> None:
    x.stream()
    x.event(note(1))
    x.end()


def rubbish(x: Exchange) -> None:
    x.stream()
    x.send(chunk(b"data: {\n\n"))
    x.end()


HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
EMPTY = b"Content-Length: 2\r\n\r\n{}"
# Each of these must end in an error that the client understands, or in a closed connection.
FAULTS: dict[str, Handler] = {
    "closed before the head": lambda x: x.close(),
    "reset before the head": lambda x: x.reset(),
    "closed in the head": bytes_of(HEAD),
    "closed after the head": bytes_of(HEAD + b"Content-Length: 100\r\n\r\n"),
    "closed in the body": bytes_of(HEAD + b'Content-Length: 100\r\n\r\n{"json'),
    "closed in a chunk": bytes_of(HEAD + b'Transfer-Encoding: chunked\r\n\r\n10\r\n{"js'),
    "reset in an event": cut_in_event,
    "reset after an event": cut_after_event,
    "garbage": bytes_of(b"\x16\x03\x01 what is this?\r\n\r\n"),
    "no status": bytes_of(b"HTTP/1.1 OK\r\n\r\n"),
    "an odd status": bytes_of(b"HTTP/1.1 0x0 OK\r\nContent-Length: 0\r\n\r\n"),
    "switching protocols": bytes_of(b"HTTP/1.1 101 Switching\r\nUpgrade: h2c\r\n\r\n"),
    "JSON cut short": status(200, b'{"jsonrpc":"2.0","id"'),
    "JSON of another kind": status(200, b"[1,2]"),
    "JSON too deep": status(200, b"[" * 200_000),
    "not UTF-8": status(200, b'{"jsonrpc":"2.0","id":1,"result":{"x":"\xff"}}'),
    "an empty body": status(200, b""),
    "HTML": status(200, b"<html>hello</html>"),
    "another id": wrong_id,
    "gzip": gzipped,
    "a length twice": bytes_of(HEAD + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}"),
    "two lengths": bytes_of(HEAD + b"Transfer-Encoding: chunked\r\n" + EMPTY),
    "a negative length": bytes_of(HEAD + b"Content-Length: -1\r\n\r\n"),
    "a folded header": bytes_of(HEAD + b"X-A: b\r\n c\r\n" + EMPTY),
    "a space before the colon": bytes_of(HEAD + b"X-A : b\r\n" + EMPTY),
    "NUL in a header": bytes_of(HEAD + b"X-A: \0\r\n" + EMPTY),
    "a bad chunk": bytes_of(HEAD + b"Transfer-Encoding: chunked\r\n\r\nxyz\r\n"),
    "a body that is too large": bytes_of(HEAD + b"Content-Length: 99999999999\r\n\r\n{"),
    "an endless head": endless_head,
    "a stream without an answer": without_answer,
    "a stream with rubbish": rubbish,
    "HTTP 302": status(302, b"", "Location: http://127.0.0.1:9/elsewhere"),
    "HTTP 401": status(401, b"no", 'WWW-Authenticate: Bearer resource_metadata="http://x/"'),
    "HTTP 403": status(403),
    "HTTP 404": status(404),
    "HTTP 405": status(405, b"", "Allow: GET"),
    "HTTP 413": status(413),
    "HTTP 429": status(429, b"", "Retry-After: 60"),
    "HTTP 500": status(500),
    "HTTP 503": status(503),
}
