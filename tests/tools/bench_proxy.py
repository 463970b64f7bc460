#!/usr/bin/env python3
"""What github_mcp_proxy.py adds to a call, beside the bare upstream, nginx and mitmproxy.

usage: bench_proxy.py [--rounds N] [--calls N]      prints a table, asserts nothing

All rounds are interleaved. nginx and mitmdump are taken from PATH and left out when they are not
there. The upstream is a small fake in this file; everything stays on loopback.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

SCRIPT = Path(__file__).resolve().parents[2] / "github_mcp_proxy.py"
TOKEN = "ghp_" + "0" * 36
BIG = 10_000_000
EVENTS = 5


# --- the upstream ---


class Upstream(asyncio.Protocol):
    """Answers tools/call by its `path`: "big", "events", "hang", or anything else shortly."""

    open_streams = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self.buffer = bytearray()
        self.streaming = False

    def connection_lost(self, exc: Exception | None) -> None:
        self.stream_ends()

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        while True:
            end = self.buffer.find(b"\r\n\r\n")
            if end < 0:
                return
            head = bytes(self.buffer[:end]).lower()
            _, _, after = head.partition(b"\r\ncontent-length:")
            size = end + 4 + int(after.split(b"\r\n")[0] or 0)
            if len(self.buffer) < size:
                return
            body = bytes(self.buffer[end + 4 : size])
            del self.buffer[:size]
            self.respond(head, json.loads(body) if body else {})

    def respond(self, head: bytes, message: dict[str, object]) -> None:
        if head.startswith(b"get /streams"):
            self.answer(str(Upstream.open_streams).encode())
            return
        params = message.get("params")
        arguments = params.get("arguments", {}) if isinstance(params, dict) else {}
        path = arguments.get("path", "")
        if path == "big":
            self.answer(self.result(message, "0123456789abcdef" * (BIG // 16)))
            return
        self.transport.write(
            b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n"
        )
        if path in ("events", "hang"):
            Upstream.open_streams += 1
            self.streaming = True
            self.task = asyncio.ensure_future(self.stream(message, path))
        else:
            self.event(self.result(message, "ok"))
            self.transport.write(b"0\r\n\r\n")

    async def stream(self, message: dict[str, object], path: str) -> None:
        for _ in range(EVENTS):
            note = {"progressToken": 1, "progress": 1, "message": str(time.monotonic_ns())}
            method = "notifications/progress"
            self.event(json.dumps({"jsonrpc": "2.0", "method": method, "params": note}).encode())
            if path == "hang":
                return
            await asyncio.sleep(0.02)
        self.event(self.result(message, "ok"))
        self.transport.write(b"0\r\n\r\n")
        self.stream_ends()

    def stream_ends(self) -> None:
        Upstream.open_streams -= self.streaming
        self.streaming = False

    def result(self, message: dict[str, object], text: str) -> bytes:
        result = {"content": [{"type": "text", "text": text}]}
        answer = {"jsonrpc": "2.0", "id": message.get("id"), "result": result}
        return json.dumps(answer, separators=(",", ":")).encode()

    def answer(self, body: bytes) -> None:
        head = "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
        self.transport.write((head % len(body)).encode())
        self.transport.write(body)

    def event(self, data: bytes) -> None:
        event = b"event: message\ndata: " + data + b"\n\n"
        self.transport.write(b"%x\r\n" % len(event) + event + b"\r\n")


async def run_upstream() -> None:
    server = await asyncio.get_running_loop().create_server(Upstream, "127.0.0.1", 0, backlog=512)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


# --- the targets ---


class Target(NamedTuple):
    name: str
    port: int
    pid: int
    ready: float  # seconds from exec to listening


def started(name: str, argv: list[str], env: dict[str, str], port: int = 0) -> Iterator[Target]:
    """Start a server; its port is the first line of its stdout, or `port`."""
    begin = time.perf_counter()
    process = subprocess.Popen(
        argv, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    try:
        assert process.stdout
        if port:
            wait_for_port(port)
        else:
            port = int(process.stdout.readline())
        yield Target(name, port, process.pid, time.perf_counter() - begin)
    finally:
        process.terminate()
        process.wait()


start = contextlib.contextmanager(started)


def wait_for_port(port: int) -> None:
    import socket

    deadline = time.monotonic() + 60
    while True:
        try:
            socket.create_connection(("127.0.0.1", port)).close()
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.005)


def free_port() -> int:
    import socket

    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


NGINX = """
daemon off; worker_processes 1; pid {dir}/pid; error_log /dev/null;
events {{ worker_connections 1024; }}
http {{
  access_log off; keepalive_requests 1000000; client_body_temp_path {dir}/b; proxy_temp_path {dir}/p;
  fastcgi_temp_path {dir}/f; uwsgi_temp_path {dir}/u; scgi_temp_path {dir}/s;
  upstream up {{ server 127.0.0.1:{upstream}; keepalive 64; keepalive_requests 1000000; }}
  server {{ listen 127.0.0.1:{port} backlog=512; client_max_body_size 8m;
    location / {{ proxy_pass http://up; proxy_http_version 1.1; proxy_buffering off;
      proxy_set_header Connection ""; proxy_read_timeout 1h; }} }}
}}
"""


def targets(stack: contextlib.ExitStack, upstream: Target, folder: Path) -> list[Target]:
    env = {
        "PATH": os.environ["PATH"],
        "HOME": str(folder),
        "GITHUB_MCP_TOKEN": TOKEN,
        "GITHUB_MCP_OWNER": "acme",
        "GITHUB_MCP_REPO": "widget",
        "GITHUB_MCP_UPSTREAM": f"http://127.0.0.1:{upstream.port}/mcp",
    }
    found = [upstream]
    found.append(stack.enter_context(start("ours", [sys.executable, str(SCRIPT)], env)))
    nginx = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
    if nginx:
        port = free_port()
        config = folder / "nginx.conf"
        config.write_text(NGINX.format(dir=folder, upstream=upstream.port, port=port))
        argv = [nginx, "-c", str(config), "-p", str(folder)]
        found.append(stack.enter_context(start("nginx", argv, env, port)))
    mitmdump = shutil.which("mitmdump")
    if mitmdump:
        port = free_port()
        mode = f"reverse:http://127.0.0.1:{upstream.port}"
        argv = [mitmdump, "-q", "--mode", mode, "--listen-host", "127.0.0.1", "-p", str(port),
                "--set", "stream_large_bodies=1", "--set", f"confdir={folder}"]  # fmt: skip
        found.append(stack.enter_context(start("mitmproxy", argv, env, port)))
    for name, path in (("nginx", nginx), ("mitmdump", mitmdump)):
        if not path:
            print(f"left out: {name} is not on PATH")
    return found


# --- the client ---


class Client:
    """One keep-alive connection, one request at a time."""

    async def connect(self, port: int) -> Client:
        limit = 2 * BIG
        self.reader, self.writer = await asyncio.open_connection("127.0.0.1", port, limit=limit)
        return self

    def send(self, path: str) -> None:
        call = {"name": "get_file_contents",
                "arguments": {"owner": "acme", "repo": "widget", "path": path}}  # fmt: skip
        message = {"jsonrpc": "2.0", "id": 7, "method": "tools/call", "params": call}
        body = json.dumps(message).encode()
        head = (
            "POST /mcp HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
            f"Accept: application/json, text/event-stream\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        self.writer.write(head.encode() + body)

    async def head(self) -> bytes:
        return (await self.reader.readuntil(b"\r\n\r\n")).lower()

    async def chunk(self) -> bytes:
        size = int(await self.reader.readuntil(b"\r\n"), 16)
        return (await self.reader.readexactly(size + 2))[:-2]

    async def call(self, path: str) -> bytes:
        self.send(path)
        head = await self.head()
        if b"content-length:" in head:
            size = int(head.split(b"content-length:")[1].split(b"\r\n")[0])
            return await self.reader.readexactly(size)
        parts = []
        while part := await self.chunk():
            parts.append(part)
        return b"".join(parts)

    def close(self) -> None:
        self.writer.transport.abort()


async def latency(port: int, calls: int) -> list[float]:
    client = await Client().connect(port)
    times = []
    for _ in range(calls):
        begin = time.perf_counter()
        answer = await client.call("README.md")
        times.append((time.perf_counter() - begin) * 1e3)
        if b'"result"' not in answer:
            raise RuntimeError(answer[:200].decode())
    client.close()
    return times


async def throughput(port: int, seconds: float = 2, clients: int = 32) -> float:
    stop = time.perf_counter() + seconds
    done = 0

    async def loop() -> None:
        nonlocal done
        client = await Client().connect(port)
        while time.perf_counter() < stop:
            await client.call("README.md")
            done += 1
        client.close()

    await asyncio.gather(*(loop() for _ in range(clients)))
    return done / seconds


async def big(port: int) -> float:
    client = await Client().connect(port)
    begin = time.perf_counter()
    answer = await client.call("big")
    if len(answer) < BIG:
        raise RuntimeError(answer[:200].decode())
    client.close()
    return (time.perf_counter() - begin) * 1e3


async def first_event(port: int) -> float:
    """Milliseconds from the upstream's writing of an event to its arrival, the median of some."""
    client = await Client().connect(port)
    client.send("events")
    await client.head()
    delays = []
    for _ in range(EVENTS):
        event = await client.chunk()
        sent = int(json.loads(event.split(b"data: ")[1])["params"]["message"])
        delays.append((time.monotonic_ns() - sent) / 1e6)
    client.close()
    return delays[0]


async def leaked(port: int, upstream: int) -> int:
    """Streams that the upstream still has after 50 clients went away in the middle of one."""
    clients = [await Client().connect(port) for _ in range(50)]
    for client in clients:
        client.send("hang")
    for client in clients:
        await client.head()
    for client in clients:
        client.close()
    await asyncio.sleep(2)
    reader, writer = await asyncio.open_connection("127.0.0.1", upstream)
    writer.write(b"GET /streams HTTP/1.1\r\n\r\n")
    await reader.readuntil(b"\r\n\r\n")
    streams = int(await reader.read(10))
    writer.close()
    return streams


async def idle(target: Target, streams: int = 200) -> float:
    """Megabytes that many open streams cost."""
    before = resident(target.pid)
    clients = [await Client().connect(target.port) for _ in range(streams)]
    for client in clients:
        client.send("hang")
    for client in clients:
        await client.head()
    await asyncio.sleep(0.5)
    cost = resident(target.pid) - before
    for client in clients:
        client.close()
    return cost


def resident(pid: int) -> float:
    """Megabytes of a process and its children, shared pages counted once; 0 without /proc."""
    total = 0
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            if pid in (int(folder.name), parent):
                rollup = (folder / "smaps_rollup").read_text()
                total += int(rollup.split("Pss:")[1].split()[0])
    return total / 1024


# --- the table ---


async def measure(found: list[Target], rounds: int, calls: int) -> None:
    upstream = found[0].port
    rows: dict[str, dict[str, list[float]]] = {target.name: {} for target in found}

    def add(target: Target, key: str, *values: float) -> None:
        rows[target.name].setdefault(key, []).extend(values)

    for _ in range(rounds):
        for target in found:
            times = await latency(target.port, calls // rounds)
            add(target, "call p50 ms", statistics.median(times))
            add(target, "p99 ms", sorted(times)[int(len(times) * 0.99)])
            add(target, "first event ms", await first_event(target.port))
    for _ in range(rounds):
        for target in found:
            add(target, "10 MB ms", await big(target.port))
            add(target, "calls/s at 32", await throughput(target.port))
    for target in found:
        add(target, "MB under load", resident(target.pid))
        add(target, "200 streams MB", await idle(target))
        add(target, "left of 50", await leaked(target.port, upstream))
        add(target, "ready ms", target.ready * 1e3)
    keys = list(next(iter(rows.values())))
    print(" ".join(["target".ljust(10), *(key.rjust(15) for key in keys)]))
    for name, row in rows.items():
        medians = (f"{statistics.median(row[key]):15.2f}" for key in keys)
        print(" ".join([name.ljust(10), *medians]))
    base, ours = rows["direct"], rows["ours"]
    added = (
        statistics.median(ours[k]) - statistics.median(base[k])
        for k in ("call p50 ms", "first event ms")
    )
    print("ours adds to a call {:.2f} ms, to the first event {:.2f} ms".format(*added))
    for key in ("10 MB ms", "calls/s at 32"):
        ratio = statistics.median(ours[key]) / statistics.median(base[key])
        print(f"ours / direct, {key}: {ratio:.2f}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--calls", type=int, default=2000)
    parser.add_argument("--upstream", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.upstream:
        asyncio.run(run_upstream())
        return 0
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        argv = [sys.executable, __file__, "--upstream"]
        upstream = stack.enter_context(start("direct", argv, dict(os.environ)))
        found = targets(stack, upstream, Path(folder))
        asyncio.run(measure(found, options.rounds, options.calls))
    return 0


if __name__ == "__main__":
    sys.exit(main())
