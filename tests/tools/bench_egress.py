#!/usr/bin/env python3
"""What lima/egress.py adds to a direct connection: throughput, latency, memory, start.

usage: bench_egress.py [--rounds N] [--many N]      prints a table, asserts nothing

All rounds are interleaved with direct ones. Everything stays on loopback; with an sshd on this
machine, the same goes through `ssh -R` too, as a VM reaches it. --many counts what is left of so
many connections.
"""

from __future__ import annotations

import argparse
import contextlib
import getpass
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "lima/egress.py"
SIZE = 512 * 1024 * 1024
PIECE = bytes(1024 * 1024)
TUNNELS = 500


# --- what is reached: a process of its own, as both ends work at the same time ---


def serve() -> None:
    server = socket.create_server(("127.0.0.1", 0), backlog=1024)
    print(server.getsockname()[1], flush=True)
    while True:
        client, _ = server.accept()
        threading.Thread(target=answer, args=[client], daemon=True).start()


def answer(client: socket.socket) -> None:
    """b"d": a download; anything else comes back."""
    with client, contextlib.suppress(OSError):
        while word := client.recv(65536):
            if word != b"d":
                client.sendall(word)
                continue
            for _ in range(SIZE // len(PIECE)):
                client.sendall(PIECE)
            return


# --- one way to it ---


class Way:
    """A way to the server: its port, and by what proxy."""

    def __init__(self, name: str, port: int, proxy: int = 0) -> None:
        self.name, self.port, self.proxy = name, port, proxy
        self.rates: list[float] = []
        self.delays: list[float] = []

    def connect(self) -> socket.socket:
        client = socket.create_connection(("127.0.0.1", self.proxy or self.port), 30)
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if self.proxy:
            client.sendall(f"CONNECT host.lima.internal:{self.port} HTTP/1.1\r\n\r\n".encode())
            answer = client.recv(4096)
            if not answer.startswith(b"HTTP/1.1 200"):
                raise RuntimeError(answer.decode())
        return client

    def download(self) -> None:
        with self.connect() as client:
            client.sendall(b"d")
            begin, found, buffer = time.perf_counter(), 0, bytearray(len(PIECE))
            while size := client.recv_into(buffer):
                found += size
            if found != SIZE:
                raise RuntimeError(f"{found} bytes of {SIZE}")
            self.rates.append(SIZE / (time.perf_counter() - begin) / 1e6)

    def delay(self) -> None:
        """Milliseconds until the first byte has come back on a new connection."""
        begin = time.perf_counter()
        with self.connect() as client:
            client.sendall(b"e")
            client.recv(1)
        self.delays.append((time.perf_counter() - begin) * 1e3)


@contextlib.contextmanager
def running(*argv: str) -> Iterator[tuple[int, int]]:
    """(port, pid) of a process that prints its port first."""
    with subprocess.Popen(
        argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout
        try:
            yield int(process.stdout.readline()), process.pid
        finally:
            process.kill()


@contextlib.contextmanager
def through_ssh(proxy: int) -> Iterator[int]:
    """A port that leads to the proxy by `ssh -R`, with the cipher that runs use; 0 without sshd."""
    sshd = shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
    if not sshd:
        yield 0
        return
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        for name in ("host", "user"):
            key = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", f"{folder}/{name}"]
            subprocess.run(key, check=True)
        port, back = free_port(), free_port()
        # No -N: without a session, sshd leaves Nagle's algorithm on, which costs a tunnel 40 ms.
        for argv in (
            [sshd, "-D", "-f", "/dev/null", "-p", str(port), "-h", f"{folder}/host", "-o",
             f"AuthorizedKeysFile={folder}/user.pub", "-o", "StrictModes=no", "-o", "PidFile=none"],
            ["ssh", "-F", "/dev/null", "-p", str(port), "-i", f"{folder}/user", "-c",
             "aes128-gcm@openssh.com", "-o", "StrictHostKeyChecking=no", "-o",
             "UserKnownHostsFile=/dev/null", "-o", "LogLevel=ERROR", "-o", "ExitOnForwardFailure=yes",
             "-R", f"127.0.0.1:{back}:127.0.0.1:{proxy}", f"{getpass.getuser()}@127.0.0.1", "cat"],
        ):  # fmt: skip
            process = subprocess.Popen(argv, stdin=subprocess.PIPE)
            stack.callback(process.wait)
            stack.callback(process.kill)
            wait_for_port(port if argv[0] == sshd else back)
        yield back


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def wait_for_port(port: int) -> None:
    for _ in range(200):
        with contextlib.suppress(OSError):
            return socket.create_connection(("127.0.0.1", port)).close()
        time.sleep(0.05)
    raise RuntimeError("no ssh: does this user's login work?")


# --- what is measured ---


def memory(pid: int) -> tuple[float, float]:
    """(resident megabytes, descriptors) of a process; Linux."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6, len(os.listdir(f"/proc/{pid}/fd"))


def start_time() -> float:
    """Milliseconds until it has said its port."""
    begin = time.perf_counter()
    with running(sys.executable, "-IS", str(SCRIPT), "--listen", "127.0.0.1:0"):
        return (time.perf_counter() - begin) * 1e3


def hold_tunnels(way: Way, pid: int) -> None:
    before, _ = memory(pid)
    tunnels = [way.connect() for _ in range(TUNNELS)]
    for tunnel in tunnels:
        tunnel.sendall(b"e" * 1000)
        tunnel.recv(1)
    held, _ = memory(pid)
    for tunnel in tunnels:
        tunnel.close()
    print(f"memory: {before:.1f} MB at first, {held:.1f} MB with {TUNNELS} tunnels")


def leave_many(way: Way, pid: int, many: int) -> None:
    before, begin = memory(pid), time.perf_counter()
    for _ in range(many):
        way.delay()
    rate = many / (time.perf_counter() - begin)
    time.sleep(1)
    after = memory(pid)
    print(f"{many} connections, {rate:.0f} a second: {before[0]:.1f} -> {after[0]:.1f} MB, "
          f"{before[1]:.0f} -> {after[1]:.0f} descriptors")  # fmt: skip


def report(ways: list[Way]) -> None:
    print(f"{'':24}{'MB/s':>8}{'of direct':>11}{'ms':>8}{'more':>8}")
    for way in ways:
        rate, delay = statistics.median(way.rates), statistics.median(way.delays)
        share = statistics.median(mine / first for mine, first in zip(way.rates, ways[0].rates))
        more = delay - statistics.median(ways[0].delays)
        print(f"{way.name:24}{rate:8.0f}{share:10.0%} {delay:8.2f}{more:8.2f}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--many", type=int, default=10_000)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve()
    with contextlib.ExitStack() as stack:
        port, _ = stack.enter_context(running(sys.executable, __file__, "--serve"))
        argv = [sys.executable, "-IS", str(SCRIPT), "--listen", "127.0.0.1:0"]
        proxy, pid = stack.enter_context(running(*argv, "--host-port", str(port)))
        ways = [Way("direct", port), Way("egress", port, proxy)]
        ssh = stack.enter_context(through_ssh(proxy))
        plain = stack.enter_context(through_ssh(port)) if ssh else 0
        if ssh:
            ways += [Way("ssh -R", plain), Way("ssh -R and egress", port, ssh)]
        starts = [start_time() for _ in range(options.rounds)]
        for _ in range(options.rounds):
            for way in ways:
                way.download()
        for _ in range(options.rounds * 30):
            for way in ways:
                way.delay()
        print(
            f"Python {sys.version.split()[0]}, {os.cpu_count()} processors, load {os.getloadavg()[0]:.1f}"
        )
        report(ways)
        print(f"start: {statistics.median(starts):.0f} ms (best {min(starts):.0f})")
        hold_tunnels(ways[1], pid)
        leave_many(ways[1], pid, options.many)
    return 0


if __name__ == "__main__":
    sys.exit(main())
