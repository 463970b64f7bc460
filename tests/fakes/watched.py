"""watched.py LOG SCRIPT ARGUMENT…: run a script, and write down what it starts, writes and reads.

A line of JSON an event, by the interpreter's own audit events (sys.addaudithook): nothing that the
script does in Python can pass them by.
"""

from __future__ import annotations

import json
import os
import runpy
import sys

MOVES = {"os.rename", "os.link", "os.symlink"}  # the second argument is the new name
CHANGES = {"os.mkdir", "os.remove", "os.rmdir", "os.chmod", "os.truncate", "shutil.rmtree"}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_TRUNC


def main(log: str, script: str, *argv: str) -> None:
    target = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def note(kind: str, what: object) -> None:
        if isinstance(what, (str, bytes, os.PathLike)):
            line = json.dumps({"kind": kind, "what": os.path.abspath(os.fsdecode(what))})
            os.write(target, line.encode() + b"\n")

    def hook(event: str, args: tuple[object, ...]) -> None:
        if event == "open":
            path, _, flags = args
            note("write" if isinstance(flags, int) and flags & WRITING else "read", path)
        elif event in MOVES:
            note("write", args[1])
        elif event in CHANGES:
            note("write", args[0])
        elif event == "subprocess.Popen":
            argv0 = args[1][0] if isinstance(args[1], list) else args[0]
            note("start", argv0)
        elif event == "socket.connect":
            note("connect", str(args[1]))

    sys.dont_write_bytecode = True  # Python's own, not the script's
    sys.argv = [script, *argv]
    sys.addaudithook(hook)
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main(*sys.argv[1:])
