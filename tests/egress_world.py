"""lima/egress.py as a process, in a made-up internet: names, addresses and servers on loopback.

As a program this is the process: it runs egress.py's main with two doors replaced, which the
product has no switch for. `resolve` answers from a table, one answer after the other; `dial` leads
the addresses of the table EGRESS_WORLD to ports of loopback, and every other one nowhere.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "lima/egress.py"
BARE = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH") if name in os.environ}
TIMEOUT = 10.0


# --- the process ---


def run_in_the_world() -> int:
    sys.path.insert(0, str(ROOT))
    from lima import egress

    world = json.loads(os.environ["EGRESS_WORLD"])
    asked: dict[str, int] = {}
    connect = egress.dial

    async def resolve(name: str, has_to: bool = True) -> tuple[str, ...]:
        if name in ("127.0.0.1", "localhost"):
            return ("127.0.0.1",)
        answers = world["names"].get(name)
        if not answers and not has_to:
            return ()
        if not answers:
            raise egress.Failure(f"the host knows no address of {name}", 502)
        asked[name] = asked.get(name, -1) + 1
        return tuple(answers[min(asked[name], len(answers) - 1)].split())

    async def dial(addresses: tuple[str, ...], port: int) -> Any:
        for address in addresses:
            print(f"dial {address} {port}", file=sys.stderr, flush=True)
            if address in ("127.0.0.1", "::1"):  # judged so: a port of the host, or its proxy
                return await connect(("127.0.0.1",), port)
            if address in world["ports"]:
                return await connect(("127.0.0.1",), world["ports"][address])
        raise egress.Failure(f"no connection to port {port}: no route", 502)

    egress.resolve, egress.dial = resolve, dial
    for name, value in world["constants"].items():
        assert hasattr(egress, name), name
        setattr(egress, name, value)
    return egress.main(sys.argv[1:])


# --- the test's side of it ---


class Egress:
    """A running egress.py; `world`: it lives in the made-up internet."""

    def __init__(
        self, *argv: str, names: dict[str, list[str]] | None = None,
        ports: dict[str, int] | None = None, line: str = "", dns: bool = False,
        real: bool = False, env: dict[str, str] | None = None, **constants: float,
    ) -> None:  # fmt: skip
        world = {"names": names or {}, "ports": ports or {}, "constants": constants}
        script = SCRIPT if real else Path(__file__)
        more = ["--dns", "127.0.0.1:0"] if dns else []
        self.errors = tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(
            [sys.executable, str(script), "--listen", "127.0.0.1:0", *more, *argv],
            env={**BARE, "EGRESS_WORLD": json.dumps(world), **(env or {})},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True,
        )  # fmt: skip
        assert self.process.stdin and self.process.stdout
        if line:
            self.process.stdin.write(line + "\n")
            self.process.stdin.flush()
        self.port = int(self.process.stdout.readline() or 0)
        self.dns = int(self.process.stdout.readline() or 0) if dns else 0

    def stderr(self) -> str:
        self.errors.seek(0)
        return self.errors.read()

    def dialled(self) -> list[str]:
        return [line[5:] for line in self.stderr().splitlines() if line.startswith("dial ")]

    def end(self) -> list[dict[str, Any]]:
        """Close its stdin: what it says was refused."""
        assert self.process.stdin and self.process.stdout
        self.process.stdin.close()
        said = self.process.stdout.read()
        self.status = self.process.wait(TIMEOUT)
        return [json.loads(line) for line in said.splitlines()]

    def __enter__(self) -> Egress:
        return self

    def __exit__(self, *args: object) -> None:
        self.stop()

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        for file in (self.process.stdin, self.process.stdout):
            if file:
                with contextlib.suppress(OSError):
                    file.close()
        said = self.stderr()
        self.errors.close()
        if "Traceback" in said or "never retrieved" in said:
            raise AssertionError(said)

    def connect(self, port: int = 0) -> socket.socket:
        return socket.create_connection(("127.0.0.1", port or self.port), TIMEOUT)

    def ask(self, data: bytes) -> bytes:
        """All that is answered, until the connection ends."""
        with self.connect() as client:
            client.sendall(data)
            return read_all(client)

    def head(self, text: str) -> str:
        """The first line of the answer."""
        return self.ask(text.encode("latin-1")).partition(b"\r\n")[0].decode()

    def tunnel(self, place: str) -> socket.socket:
        client = self.connect()
        client.sendall(f"CONNECT {place} HTTP/1.1\r\n\r\n".encode())
        answer = client.recv(4096)
        assert answer == b"HTTP/1.1 200 OK\r\n\r\n", answer
        return client

    def memory(self) -> float:
        """MB that are resident; 0 without /proc."""
        with contextlib.suppress(OSError), open(f"/proc/{self.process.pid}/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6
        return 0.0

    def descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))


def read_all(client: socket.socket) -> bytes:
    found = bytearray()
    with contextlib.suppress(ConnectionResetError):
        while data := client.recv(65536):
            found += data
    return bytes(found)


class Server:
    """A server on loopback: `story` serves each connection; what came first is in `heads`."""

    def __init__(self, story: Callable[[socket.socket, bytes], None]) -> None:
        self.story = story
        self.heads: list[bytes] = []
        self.socket = socket.create_server(("127.0.0.1", 0), backlog=512)
        self.port = self.socket.getsockname()[1]
        self.thread = threading.Thread(target=self.accept, daemon=True)
        self.thread.start()

    def accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self.socket.accept()
                threading.Thread(target=self.serve, args=[client], daemon=True).start()

    def serve(self, client: socket.socket) -> None:
        client.settimeout(TIMEOUT)
        with client, contextlib.suppress(OSError):
            first = client.recv(65536)
            if first:
                self.heads.append(first)
            self.story(client, first)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)
        self.socket.close()


def echo(client: socket.socket, first: bytes) -> None:
    """Send back what comes; the end, too."""
    data = first
    while data:
        client.sendall(data)
        data = client.recv(65536)


def web(client: socket.socket, first: bytes) -> None:
    """An answer that shows the request, with headers that are for one hop."""
    head, _, body = first.partition(b"\r\n\r\n")
    size = int(head.lower().partition(b"content-length: ")[2].partition(b"\r")[0] or 0)
    while len(body) < size:
        body += client.recv(65536)
    client.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n" % len(first))
    client.sendall(b"Set-Cookie: a=1\r\nKeep-Alive: timeout=9\r\nConnection: Keep-Alive, X-Hop\r\n")
    client.sendall(b"X-Hop: 1\r\n\r\n" + first)


if __name__ == "__main__":
    sys.exit(run_in_the_world())
