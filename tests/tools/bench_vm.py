#!/usr/bin/env python3
"""A VM of agent-vm beside the same VM by limactl alone: times, CPU, memory.

usage: bench_vm.py [ROUNDS] [--at-once N …]      prints a table and a line of JSON, asserts nothing

Each round has, by turns: raw, an instance with one whole disk, cloned, started and deleted by
limactl alone; a booted and a resumed run; clones that do not start; resumed runs at once, and on
Linux their memory. Needs a base instance with a saved state, limactl and qemu-img. What it makes is
deleted at the end; what agent-vm keeps of runs goes to a folder that is deleted, too.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import os
import re
import select
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "agent_vm.py"
sys.path.insert(0, str(SCRIPT.parent))

import agent_vm  # noqa: E402

PREFIX = f"bench-{os.urandom(3).hex()}"
FAT, RAW, COPY = f"{PREFIX}-fat", f"{PREFIX}-raw", f"{PREFIX}-copy"
# agent_vm.py as python3 runs it: an import would be spared the compiling. What its clock began at,
# and its CPU time without its children's, are noted at its end.
WRAPPER = """
import json, resource, sys
note, __file__ = sys.argv[1:3]
sys.argv = sys.argv[2:]
try:
    exec(compile(open(__file__, encoding="utf-8").read(), __file__, "exec"))
finally:
    used = resource.getrusage(resource.RUSAGE_SELF)
    with open(note, "w") as file:
        json.dump({"began": log.started, "cpu": used.ru_utime + used.ru_stime}, file)
"""


class Program:
    """A program that was started; `first` is when its first byte of output came."""

    def __init__(self, argv: list[str], cwd: str) -> None:
        self.argv, self.first = argv, 0.0
        self.errors = tempfile.TemporaryFile()  # what Lima leaves behind would hold a pipe open
        self.begin, pipe = time.monotonic(), subprocess.PIPE
        process = subprocess.Popen(argv, cwd=cwd, stdin=pipe, stdout=pipe, stderr=self.errors)
        assert process.stdin and process.stdout
        self.process, self.stdin, self.stdout = process, process.stdin, process.stdout

    def end(self) -> float:
        """When it has ended, for which some wait until their stdin does."""
        self.stdin.close()
        status, now = self.process.wait(), time.monotonic()
        if status:
            words = [os.path.basename(word) for word in self.argv if word != WRAPPER]
            raise agent_vm.AgentVMError(f"{' '.join(words)}: status {status}", details=self.said())
        return now

    def said(self) -> str:
        self.errors.seek(0)
        return self.errors.read().decode(errors="replace").strip()


def hear(*programs: Program) -> None:
    """Wait for the first byte of each."""
    silent = {program.stdout: program for program in programs}
    while silent:
        for pipe in select.select(list(silent), [], [])[0]:
            program = silent.pop(pipe)
            program.first = time.monotonic()
            if not pipe.read(1):
                program.end()


def memory(pid: int) -> dict[str, float]:
    """Megabytes of a QEMU, those of the saved memory's file apart."""
    sizes, place = collections.Counter[str](), ""
    for line in Path(f"/proc/{pid}/smaps").read_text(errors="replace").splitlines():
        key, size, *_ = line.split()
        if not key.endswith(":"):  # the head of a mapping, which ends with its file
            place = "saved" if "/_agent-vm/" in line and line.endswith("/memory") else "else"
        elif key in ("Pss:", "Rss:"):
            sizes[f"MB {place}, {key[:3].upper()}"] += int(size)
    shown = ("MB saved, PSS", "MB saved, RSS", "MB else, PSS")
    return {name: sizes[name] * 1024 / 1e6 for name in shown}


class Bench:
    """All that is measured, by name, a number each round; and what has to be gone at the end."""

    def __init__(self, folder: str) -> None:
        """Raises when something is missing; `folder` gets the projects, and agent-vm's state."""
        self.folder, self.programs = os.path.realpath(folder), list[Program]()
        self.figures: dict[str, list[float]] = collections.defaultdict(list)
        if os.getuid() == 0:
            raise agent_vm.AgentVMError("limactl refuses to run as root")
        self.host, settings = agent_vm.open_host(argparse.Namespace(secrets={}))
        if not shutil.which("qemu-img"):
            raise agent_vm.AgentVMError("qemu-img is not installed")
        name, self.home = agent_vm.base_name(settings), self.host.folders.lima_home
        self.base = agent_vm.usable_base(self.host, name)
        if not (agent_vm.saved_folder(self.host.folders, self.base.name) / "saved.json").exists():
            raise agent_vm.AgentVMError("the base instance has no saved state", "agent-vm doctor")
        os.environ["XDG_STATE_HOME"] = f"{self.folder}/state"
        self.host, _ = agent_vm.open_host(argparse.Namespace(secrets={}))
        agent_vm.write_base(self.host.folders, name, self.base.name, "")

    def note(self, kind: str, **found: float) -> None:
        for name, value in found.items():
            self.figures[f"{kind}: {name.replace('_', ' ')}"].append(round(value, 4))

    def start(self, *argv: str, cwd: str = "") -> Program:
        self.programs.append(Program(list(argv), cwd or self.folder))
        return self.programs[-1]

    def limactl(self, *words: str) -> float:
        program = self.start(self.host.lima.binary, *words)
        return program.end() - program.begin

    def shell(self, *words: str) -> tuple[Program, Path]:
        """`agent-vm shell` in a new project, and where the wrapper's note will be."""
        project = tempfile.mkdtemp(prefix=f"{PREFIX}-", dir=self.folder)
        python = (sys.executable, "-I", "-c", WRAPPER, f"{project}.json", str(SCRIPT))
        return self.start(*python, "shell", *words, cwd=project), Path(f"{project}.json")

    def make_fat(self) -> None:
        self.limactl("clone", "--tty=false", self.base.name, FAT)
        thin, disk = self.base.dir / "disk", self.home / FAT / "disk"
        self.start("qemu-img", "convert", "-Oqcow2", str(thin), f"{disk}.whole").end()
        disk.with_name("disk.whole").replace(disk)

    def raw(self) -> None:
        mounts = [{"location": self.folder, "writable": True}]
        kind = agent_vm.CONFINED_MOUNT_TYPE[self.base.vm_type]
        change = agent_vm.clone_expression(mounts, kind, forward=True)
        begin = time.monotonic()
        clone = self.limactl("clone", "--tty=false", FAT, RAW, "--set", change)
        self.note("raw", clone=clone, start=self.limactl("start", "--tty=false", RAW))
        shell = self.start(self.host.lima.binary, "shell", RAW, "echo")
        hear(shell)
        self.note("raw", shell=shell.end() - shell.begin, first_output=shell.first - begin)
        self.note("raw", stop=self.limactl("stop", RAW), delete=self.limactl("delete", "-f", RAW))
        self.note("raw", whole=time.monotonic() - begin)

    def run(self, kind: str, *options: str) -> None:
        """A run whose agent prints a line."""
        program, path = self.shell("--timing", *options, "--", "echo")
        hear(program)
        end, said = program.end(), program.said()
        phases, own = json.loads(said.partition(" timing: ")[2]), json.loads(path.read_text())
        # One that could not be resumed is cloned again, and booted.
        if "--boot" not in options and phases["cloned"] > phases.get("resumed", 0):
            why = re.search("it is not resumed: .*|it could not be resumed: .*", said)
            raise agent_vm.AgentVMError(why[0] if why else "a VM was booted, not resumed")
        self.note(f"{kind}, --timing", **phases)
        self.note(kind, first_output=program.first - program.begin, whole=end - program.begin)
        self.note(kind, agent_to_prompt=end - own["began"] - phases["ended"], own_CPU=own["cpu"])

    def clones(self) -> None:
        for kind, source in (("thin clone", self.base.name), ("fat clone", FAT)):
            self.note(kind, clone=self.limactl("clone", "--tty=false", source, COPY))
            self.note(kind, delete=self.limactl("delete", "-f", COPY))

    def at_once(self, count: int) -> None:
        """Runs whose agents wait for the end of their stdin."""
        programs = [self.shell("--", "sh", "-c", "echo; exec cat")[0] for _ in range(count)]
        hear(*programs)
        kind, took = f"{count} at once", [program.first - program.begin for program in programs]
        self.note(kind, first_output=statistics.median(took), worst_first_output=max(took))
        if sys.platform == "linux":
            leases = self.host.leases.all()  # of this folder's state: of these runs alone
            files = [self.home / lease.name / "qemu.pid" for lease in leases]
            sizes = [memory(int(path.read_text())) for path in files]
            self.note(kind, **{name: sum(one[name] for one in sizes) for name in sizes[0]})
        for program in programs:
            program.end()

    def close(self) -> None:
        for signum in agent_vm.STOP_SIGNALS:  # the end is on its way already
            signal.signal(signum, lambda *_: None)
        running = [one.process for one in self.programs if one.process.poll() is None]
        for process in running:
            process.terminate()
        for process in running:
            process.wait()
        if running:
            time.sleep(1)  # a host agent that has just been started makes files yet
        for folder in self.home.glob(f"*{PREFIX}*"):
            agent_vm.remove_instance(self.host, folder.name)

    def report(self) -> None:
        """The table, and a line of JSON that has the figures of each round."""
        for kind in ("booted", "resumed"):
            pairs = zip(self.figures[f"{kind}: first output"], self.figures["raw: first output"])
            self.figures[f"{kind} / raw: first output"] = [mine / raw for mine, raw in pairs]
        for name, values in self.figures.items():
            low, middle, high = min(values), statistics.median(values), max(values)
            unit = " " if "MB" in name or " / " in name else "s"
            print(f"{name:32}{middle:10.3f} {unit} ({low:.3f} to {high:.3f})")
        about = {"python": sys.version.split()[0], "processors": os.cpu_count()}
        print(json.dumps({**about, "load": os.getloadavg()[0], "figures": self.figures}))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("rounds", nargs="?", type=int, default=3)
    parser.add_argument("--at-once", nargs="+", type=int, default=(1, 3, 5), metavar="N")
    options = parser.parse_args()
    sys.argv[0] = str(SCRIPT)  # which a hint names
    for signum in agent_vm.STOP_SIGNALS:
        signal.signal(signum, lambda number, _: sys.exit(128 + number))
    try:
        with tempfile.TemporaryDirectory() as new, contextlib.closing(Bench(new)) as bench:
            bench.run("not counted", "-v")  # which says why when it is not resumed
            bench.figures.clear()
            bench.make_fat()
            for number in range(options.rounds):
                print(f"round {number + 1} of {options.rounds}", file=sys.stderr)
                bench.raw()
                bench.run("booted", "--boot")
                bench.run("resumed")
                bench.clones()
                for count in options.at_once:
                    bench.at_once(count)
            bench.report()
    except agent_vm.AgentVMError as error:
        agent_vm.report(error)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
