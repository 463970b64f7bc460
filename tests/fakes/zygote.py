"""A script of ours, named by argv[1], many times: see tests/quick.py.

Each line on the socket asks for one run, with three descriptors for its stdin, stdout and stderr,
and a fourth that gets its process id and, at its end, its exit status. A run is a process of its
own: a copy of this one, which has done nothing but import.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

# What the scripts import only when they need it.
import base64  # noqa: F401
import configparser  # noqa: F401
import email.utils  # noqa: F401
import hashlib  # noqa: F401
import http.client  # noqa: F401
import importlib
import platform  # noqa: F401
import secrets  # noqa: F401
import select  # noqa: F401
import shutil  # noqa: F401
import ssl  # noqa: F401
import subprocess  # noqa: F401
import tempfile  # noqa: F401
import termios  # noqa: F401
import threading  # noqa: F401
import unicodedata  # noqa: F401
import urllib.error
import urllib.request
from datetime import datetime  # noqa: F401

g = importlib.import_module(sys.argv[1])
urllib.request.Request("http://localhost", headers={"A": "b"})
b"".decode("utf-8-sig")


def run(wanted: dict[str, Any], fds: list[int]) -> None:
    """In the new process: as `python3 SCRIPT` would begin."""
    for number in range(3):
        os.dup2(fds[number], number)
    for fd in fds:
        os.close(fd)
    sys.stdin, sys.stdout = open(0, newline="\n", closefd=False), open(1, "w", closefd=False)
    sys.stderr = open(2, "w", buffering=1, errors="backslashreplace", closefd=False)
    os.environ.clear()
    os.environ.update(wanted["env"])
    os.chdir(wanted["cwd"])
    sys.argv[:] = [f"{g.__name__}.py", *wanted["argv"]]
    status: Any = 1
    try:
        exec(wanted["setup"], {"g": g, "sys": sys, "os": os})
        status = g.main(wanted["argv"])
    except SystemExit as end:
        status = end.code
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status or 0)


def main() -> None:
    asked = socket.socket(fileno=0)
    while True:
        line, fds, _, _ = socket.recv_fds(asked, 1 << 20, 4)
        while line and not line.endswith(b"\n"):
            line += asked.recv(1 << 20)
        if not line:
            return
        if os.fork() == 0:
            asked.close()
            child = os.fork()
            if child == 0:
                run(json.loads(line), fds[:3])
            os.write(fds[3], b"%d\n" % child)
            _, ended = os.waitpid(child, 0)
            os.write(fds[3], b"%d\n" % os.waitstatus_to_exitcode(ended))
            os._exit(0)
        for fd in fds:
            os.close(fd)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass


main()
