"""A script of ours many times, without starting Python and importing its modules each time."""

from __future__ import annotations

import atexit
import functools
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from collections.abc import Sequence
from pathlib import Path
from typing import IO
from typing import NamedTuple

ZYGOTE = Path(__file__).resolve().parent / "fakes/zygote.py"
BARE = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH") if name in os.environ}
PATIENCE = 60.0  # seconds until a test gives up; nothing waits that long when all is well


class Result(NamedTuple):
    """What came of a process."""

    status: int
    out: str
    err: str


class Run:
    """A process of `start`: its output is complete when it has ended."""

    def __init__(self, pid: int, news: IO[str], files: tuple[IO[bytes], IO[bytes]]) -> None:
        self.pid = pid
        self.news = news
        self.files = files

    def wait(self) -> Result:
        if not select.select([self.news], [], [], PATIENCE)[0]:
            os.kill(self.pid, signal.SIGKILL)
            raise AssertionError(f"it does not end: not within {PATIENCE:.0f} s")
        status = int(self.news.readline())
        self.news.close()
        said = []
        for file in self.files:
            file.seek(0)
            said.append(file.read().decode())
            file.close()
        return Result(status, *said)


@functools.cache
def zygote(module: str) -> socket.socket:
    ours, theirs = socket.socketpair()
    child = subprocess.Popen(
        [sys.executable, str(ZYGOTE), module], stdin=theirs.fileno(),
        env={**BARE, "LANG": "C.UTF-8"}, start_new_session=True,
    )  # fmt: skip
    theirs.close()

    def end() -> None:
        ours.close()
        child.wait()

    atexit.register(end)
    return ours


def start(
    module: str,
    argv: Sequence[str],
    env: Mapping[str, str],
    cwd: Path,
    *,
    setup: str = "",
    data: bytes | None = None,
) -> Run:
    """Start the module's `main`; `setup` is run before it. `data`: its stdin, None: /dev/null."""
    files = tempfile.TemporaryFile(), tempfile.TemporaryFile()
    read_end, write_end = os.pipe()
    wanted = {"argv": argv, "env": dict(env), "cwd": str(cwd), "setup": setup}
    line = json.dumps(wanted).encode() + b"\n"
    with open(os.devnull, "rb") if data is None else tempfile.TemporaryFile() as stdin:
        if data is not None:
            stdin.write(data)
            stdin.seek(0)
        fds = [stdin.fileno(), *(file.fileno() for file in files), write_end]
        asked = zygote(module)
        sent = socket.send_fds(asked, [line], fds)
        asked.sendall(line[sent:])
    os.close(write_end)
    news = open(read_end, encoding="ascii")
    return Run(int(news.readline()), news, files)
