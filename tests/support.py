"""A world for a test: folders, an environment built from nothing, fakes on PATH, real processes."""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import json
import os
import select
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import termios
import time
import unittest
from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import agent_vm
from tests import quick
from tests.quick import Result

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
SCRIPT = ROOT / "agent_vm.py"
FAKES = TESTS / "fakes"
CACHED = FAKES / "cached.py"  # runs SCRIPT, quicker
BASE_NAME = "agent-vm-base"
BASE = f"{BASE_NAME}.0b0b0b"  # the instance that the name means
TOKEN = "sk-ant-oat01-not-a-real-token-".ljust(108, "0")
GUEST_TOOLS = (
    "chromium", "curl", "date", "docker", "fd", "gcc", "gh", "journalctl", "modinfo",
    "node", "npm", "python3", "rg", "sg", "sudo", "sync",
)  # fmt: skip


@cache
def quick_python() -> str:
    """For the fakes: the system's Python, when new enough, may start in a third of the time."""
    check = "import sys; sys.exit(sys.version_info < (3, 9))"
    with contextlib.suppress(OSError):
        if subprocess.run(["/usr/bin/python3", "-c", check], check=False).returncode == 0:
            return "/usr/bin/python3"
    return sys.executable


def executable(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


@cache
def compiled(source: Path) -> str:
    """Its bytecode, of `quick_python`: to compile it at each start takes longer than to run it."""
    folder = tempfile.mkdtemp(prefix="avm-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    target = f"{folder}/{source.name}.pyc"
    make = "import py_compile, sys; py_compile.compile(sys.argv[1], sys.argv[2], doraise=True)"
    subprocess.run([quick_python(), "-c", make, source, target], check=True)
    return target


def fake(path: Path, source: Path) -> None:
    """A fake written in Python, without the cost of `site`."""
    command = shlex.join([quick_python(), "-IS", compiled(source)])
    executable(path, f'exec {command} "$@"')


def wait_for(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + quick.PATIENCE
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"{what}: not within {quick.PATIENCE:.0f} s")
        time.sleep(0.01)


class Terminal:
    """A process with a terminal of its own, and the person in front of it."""

    def __init__(self, argv: Sequence[str], env: Mapping[str, str], cwd: Path, stdout: Any) -> None:
        self.master, slave = os.openpty()
        self.resize(24, 80)
        self.seen = ""
        self.process = subprocess.Popen(
            argv, env=env, cwd=cwd, stdin=slave, stdout=stdout or slave, stderr=slave,
            start_new_session=True, preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )  # fmt: skip
        os.close(slave)

    def resize(self, rows: int, columns: int) -> None:
        size = struct.pack("HHHH", rows, columns, 0, 0)
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, size)

    def mode(self) -> Any:
        return termios.tcgetattr(self.master)[:4]

    def read(self) -> bool:
        """Take what has been written; False when nobody writes any more."""
        if select.select([self.master], [], [], 0.05)[0]:
            try:
                data = os.read(self.master, 65536)
            except OSError:  # Linux: the other side is closed
                return False
            self.seen += data.decode(errors="replace")
            return bool(data)
        return self.process.poll() is None

    def expect(self, text: str) -> None:
        deadline = time.monotonic() + quick.PATIENCE
        while text not in self.seen:
            if not self.read() or time.monotonic() > deadline:
                raise AssertionError(f"{text!r} did not appear in {self.seen!r}")

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def stop_then_answer(self, pause: float) -> int:
        """Three times Ctrl-Z, then the line an agent waits for and repeats: its exit status."""
        for _ in range(3):
            self.type("\x1a")
            time.sleep(pause)
        self.type("words\n")
        self.expect("got words")
        return self.wait()

    def close(self) -> None:
        if self.master >= 0:
            os.close(self.master)
            self.master = -1

    def wait(self) -> int:
        """The exit status, once all output is read."""
        deadline = time.monotonic() + quick.PATIENCE
        while self.master >= 0 and self.read():
            if time.monotonic() > deadline:
                break
        return self.process.wait(quick.PATIENCE)


class Sandbox:
    """A home with a project, a Lima home, and a PATH with fakes and little else."""

    def __init__(self) -> None:
        # Short, because the path of Lima's sockets is part of what is tested; not /tmp, which may
        # lie in memory and be smaller than setup wants.
        self.root = Path(tempfile.mkdtemp(prefix="avm-", dir="/var/tmp")).resolve()
        self.home = self.root / "home"
        self.lima = self.root / "lima"
        self.bin = self.root / "bin"
        self.guest_bin = self.root / "guest-bin"
        self.project = self.home / "project"
        self.state = self.home / ".local/state/agent-vm"
        self.config = self.home / ".config/agent-vm"
        for folder in (self.project, self.lima, self.bin, self.guest_bin, self.root / "tmp"):
            folder.mkdir(parents=True)
        self.processes: list[subprocess.Popen[Any]] = []
        self.terminals: list[Terminal] = []
        self.fill_path()
        self.env = {
            "PATH": str(self.bin),
            "HOME": str(self.home),
            "TMPDIR": str(self.root / "tmp"),
            "LIMA_HOME": str(self.lima),
            "LANG": "C.UTF-8",
            # What a run starts beside its VM is for the tests of that (test_vm_sides.py).
            "AGENT_VM_NETWORK": "open",
            "AGENT_VM_CREDENTIAL": "guest",
            "FAKE_LIMA_CALLS": str(self.root / "calls"),
            "FAKE_GUEST_CALLS": str(self.root / "agent-calls"),
            "FAKE_GUEST_TOOLS": str(self.root / "tool-calls"),
            "FAKE_GUEST_PATH": f"{self.guest_bin}:/usr/bin:/bin",
            "FAKE_GUEST_WAKER": str(FAKES / "waker.py"),
        }
        for name in ("LD_LIBRARY_PATH", "PYTHONPYCACHEPREFIX"):  # of this Python
            if name in os.environ:
                self.env[name] = os.environ[name]

    def fill_path(self) -> None:
        fake(self.bin / "limactl", FAKES / "limactl")
        fake(self.bin / "ssh", FAKES / "ssh")
        fake(self.guest_bin / "claude", FAKES / "guest/claude")
        for name in GUEST_TOOLS:
            (self.guest_bin / name).symlink_to(FAKES / "guest/tool")
        if not shutil.which("jq", path="/usr/bin:/bin"):
            (self.guest_bin / "jq").symlink_to(FAKES / "guest/tool")
        for name in ("qemu-img", "qemu-system-x86_64", "qemu-system-aarch64"):
            executable(self.bin / name, "exit 1")
        for name in ("git", "bash", "ps", "sysctl", "openssl", "tar", "gzip"):
            found = shutil.which(name)
            if found:
                (self.bin / name).symlink_to(found)

    def close(self) -> None:
        for process in self.processes:
            self.kill(process)
        for terminal in self.terminals:
            terminal.close()
        for file in self.lima.glob("*/guest.*"):  # what runs "in" a VM that a test left
            with contextlib.suppress(ProcessLookupError):
                os.killpg(int(file.name.rpartition(".")[2]), signal.SIGKILL)
        # A folder that a test made unwritable, and a fake that still hangs, end with this.
        subprocess.run(["chmod", "-R", "u+rwX", self.root], check=False, stderr=subprocess.DEVNULL)
        shutil.rmtree(self.root, ignore_errors=True)

    # Starting things

    def start(
        self,
        *args: str,
        cwd: Path | None = None,
        stdin: Any = subprocess.DEVNULL,
        script: Path = CACHED,
        prefix: Sequence[str] = (),
        new_session: bool = False,
        **env: str,
    ) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [*prefix, sys.executable, str(script), *args],
            env={**self.env, **env}, cwd=cwd or self.project, stdin=stdin,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8",
            start_new_session=new_session,
        )  # fmt: skip
        self.processes.append(process)
        return process

    def finish(self, process: subprocess.Popen[str], text: str | None = None) -> Result:
        out, err = process.communicate(text, timeout=quick.PATIENCE)
        return Result(process.returncode, out, err)

    def kill(self, process: subprocess.Popen[Any]) -> None:
        """kill -9; what it started goes on and holds its pipes, so they are not read to the end."""
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout, process.stderr):
            if pipe:
                with contextlib.suppress(OSError):
                    pipe.close()

    def run(self, *args: str, text: str | None = None, **more: Any) -> Result:
        """Start it and wait; the quick way, but where Python itself has to start in a new way."""
        if more.keys() & {"stdin", "script", "prefix", "new_session", "LANG", "LC_ALL"}:
            if text is not None:
                more["stdin"] = subprocess.PIPE
            return self.finish(self.start(*args, **more), text)
        cwd = more.pop("cwd", self.project)
        data = None if text is None else text.encode()
        return quick.start("agent_vm", args, {**self.env, **more}, cwd, data=data).wait()

    def terminal(self, *args: str, stdout: Any = None, **env: str) -> Terminal:
        argv = [sys.executable, str(CACHED), *args]
        terminal = Terminal(argv, {**self.env, "TERM": "xterm", **env}, self.project, stdout)
        self.processes.append(terminal.process)
        self.terminals.append(terminal)
        return terminal

    # Arranging the world

    def make_instance(self, name: str = BASE, running: bool = False, disk: str = "disk") -> Path:
        folder = self.lima / name
        folder.mkdir(parents=True)
        user = {"name": "agent", "home": "/home/agent.guest"}
        config = {"vmType": "qemu", "mountType": "9p", "mounts": [], "user": user, "cpus": 4}
        config.update(memory=4, disk=20, ssh={"forwardAgent": False})
        (folder / "lima.yaml").write_text(json.dumps(config))
        (folder / "disk").write_text(disk)
        (folder / "lima-version").write_text("2.2.0")
        (folder / "ssh.config").write_text("Host a-host\n")
        if running:
            (folder / "ha.pid").write_text("1")
        if name.startswith(BASE_NAME):
            (folder / "protected").touch()
        return folder

    def name_base(self, current: str, previous: str = "", name: str = BASE_NAME) -> None:
        """Let a base name mean these instances, as setup does."""
        (self.state / "bases").mkdir(parents=True, exist_ok=True)
        self.state.chmod(0o700)
        (self.state / "bases" / name).write_text(f"{current} {previous or '-'}\n")

    def read_names(self, name: str = BASE_NAME) -> list[str]:
        """The instances that a base name means: the current one, then the previous one."""
        with contextlib.suppress(FileNotFoundError):
            return [
                word for word in (self.state / "bases" / name).read_text().split() if word != "-"
            ]
        return []

    def make_base(self, name: str = BASE_NAME, **more: Any) -> str:
        """A base instance that its name means; the instance."""
        instance = f"{name}.0b0b0b"
        self.make_instance(instance, **more)
        self.name_base(instance, name=name)
        return instance

    def make_lease(self, name: str, **fields: Any) -> None:
        """A lease whose process is gone, unless `fields` say otherwise."""
        lease = {"name": name, "pid": 2**22 + 1, "start": "1", "boot_id": "another boot"}
        lease.update(project=str(self.project), created=time.time(), keep=False)
        lease.update(fields)
        path = self.state / "leases" / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(lease))

    def write_config(self, text: str) -> None:
        self.write(self.config / "config.ini", f"[agent-vm]\n{text}\n")

    def write(self, path: Path, text: str, mode: int = 0o644) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(mode)
        return path

    # Looking at the world afterwards

    def instances(self) -> list[str]:
        return sorted(path.name for path in self.lima.glob("[!_.]*"))

    def clones(self) -> list[str]:
        return [name for name in self.instances() if not name.startswith(BASE_NAME)]

    def leases(self) -> list[str]:
        return sorted(path.stem for path in (self.state / "leases").glob("*.json"))

    def read_calls(self, name: str) -> list[dict[str, Any]]:
        lines: list[str] = []
        with contextlib.suppress(FileNotFoundError):
            lines = (self.root / name).read_text().splitlines(keepends=True)
        # The last may be half there: its program is just writing it.
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def calls(self, *tools: str) -> list[dict[str, Any]]:
        return [call for call in self.read_calls("calls") if not tools or call["tool"] in tools]

    def limactl(self, verb: str) -> list[list[str]]:
        """The argument lists of one verb of limactl."""
        return [call["argv"] for call in self.calls("limactl") if call["argv"][0] == verb]

    def started_config(self) -> dict[str, Any]:
        """The configuration of the instance that was started last."""
        configs = [call["config"] for call in self.calls("limactl") if "config" in call]
        return dict(configs[-1])

    def slots(self) -> list[tuple[str, bool]]:
        """(path, writable) of the folders of the VM that was started last, without empty ones."""
        environs = [call["env"] for call in self.calls("limactl") if "config" in call]
        asked = json.loads(environs[-1]["AGENT_VM_QEMU"])
        empty = str(self.state / "empty")
        return [(path, writable) for path, writable in asked["mounts"] if path != empty]

    def agent_calls(self) -> list[dict[str, Any]]:
        return self.read_calls("agent-calls")

    def tool_calls(self) -> list[str]:
        with contextlib.suppress(FileNotFoundError):
            return (self.root / "tool-calls").read_text().splitlines()
        return []

    def wait_for_limactl(self, verb: str, count: int = 1) -> None:
        wait_for(lambda: len(self.limactl(verb)) >= count, f"limactl {verb} is called")

    def wait_for_file(self, name: str) -> Path:
        path = self.project / name
        wait_for(path.exists, f"{name} appears")
        return path


def live() -> dict[str, Any]:
    """What a lease of this test's own process has."""
    pid = os.getpid()
    return {"pid": pid, "start": agent_vm.process_start(pid), "boot_id": agent_vm.boot_id()}


def open_sandbox() -> Sandbox:
    if os.geteuid() == 0:
        raise unittest.SkipTest("limactl refuses root; `python3 -m tests` goes on as nobody")
    return Sandbox()


class WorldTest(unittest.TestCase):
    """A test with a world of its own, in which there is a base instance."""

    base = True

    def setUp(self) -> None:
        self.box = open_sandbox()
        self.addCleanup(self.box.close)
        if self.base:
            self.box.make_base()

    def assert_nothing_left(self) -> None:
        """No instance but the base, no lease, no temporary file."""
        self.assertEqual(self.box.instances(), [BASE] if self.base else [])
        self.assertEqual(self.box.leases(), [])
        self.assertEqual(list((self.box.root / "tmp").iterdir()), [])

    def assert_refused(self, result: Result, *words: str, status: int = 125) -> None:
        """An error of ours with its words, on stderr alone, without a traceback."""
        self.assertEqual((result.status, result.out), (status, ""), result.err)
        self.assertNotIn("Traceback", result.err)
        for word in words:
            self.assertIn(word, result.err)
