#!/usr/bin/env python3
"""lima/guest/wake.py in the fake guest: its own code, but for what would change this machine.

usage: waker.py FOLDERS-AS-JSON     as `agent-vm start` has it, in the instance FAKE_GUEST_INSTANCE
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).resolve().parents[2] / "lima" / "guest" / "wake.py"


def waker(folder: str, paths: dict[str, str]) -> dict[str, Any]:
    """The names of wake.py in an instance's folder. It changes files of the guest there; mounting
    makes a link, or an empty folder is "the same path". FAKE_GUEST_FAIL: "mount", or "network".
    """
    asked_to_fail = os.environ.get("FAKE_GUEST_FAIL", "").split()

    def note(words: str) -> None:
        with open(os.environ["FAKE_GUEST_TOOLS"], "a") as file:
            file.write(f"{words}\n")

    def mount(source: str, target: str, kind: str = "", flags: int = 0, data: str = "") -> None:
        note(f"mount {'ro' if flags & names['RDONLY'] else 'rw'} {data or '-'} {source} {target}")
        source = source.replace("agent-vm-", f"{folder}/slots/", 1) if kind == "9p" else source
        if "mount" in asked_to_fail or not os.path.exists(source):
            raise OSError(2, "no such device", target)
        if not os.path.samefile(source, target):
            os.rmdir(target)
            os.symlink(os.path.realpath(source), target)

    def run(*words: str, **_: Any) -> None:
        note(" ".join(words))  # and no more: it is this machine that has the routes and services
        if words[0] == "ln":
            subprocess.run(words, check=True)

    def probe(mode: str, port: int) -> Any:
        note(f"wake.py {port} {mode}")
        is_open = "network" in asked_to_fail and mode != "open"
        return types.SimpleNamespace(found=lambda: "192.168.5.2 port 4711 answers" * is_open)

    def moved(text: str) -> str:
        for guest, real in paths.items():
            text = text.replace(guest, real)
        return text

    names: dict[str, Any] = {"__name__": "wake"}
    exec(compile(moved(SOURCE.read_text()), str(SOURCE), "exec"), names)
    loads = lambda line: json.loads(moved(line.decode() if isinstance(line, bytes) else line))  # noqa: E731
    names["json"] = types.SimpleNamespace(loads=loads, dumps=json.dumps)
    nothing = lambda *_: None  # noqa: E731
    names.update(run=run, mount=mount, begin_probe=probe, set_clock=nothing, lead=nothing,
                 show_the_way_out=nothing,
                 wait_for_scripts=nothing)  # fmt: skip
    names["os"] = types.SimpleNamespace(**vars(os))
    names["os"].path = types.SimpleNamespace(**vars(os.path))
    names["os"].path.ismount = os.path.islink
    return names


def serve(path: str, folder: str, paths: dict[str, str], environment: dict[str, str]) -> None:
    """At a socket of the host's, for one run; then live on as ssh does."""
    os.environ.clear()
    os.environ.update(environment)
    names = waker(folder, paths)
    home = environment["HOME"]
    user = types.SimpleNamespace(pw_dir=home, pw_uid=os.getuid(), pw_gid=os.getgid())
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path)
        server.listen()
        print("ready", flush=True)  # what a VM that boots says when sessions last
        with server.accept()[0] as client:
            names["serve"](client, user)


if __name__ == "__main__":
    folder = os.environ["FAKE_GUEST_INSTANCE"]
    waker(folder, {"/mnt/agent-vm": f"{folder}/mnt"})["mount_folders"](json.loads(sys.argv[1]))
