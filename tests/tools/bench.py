#!/usr/bin/env python3
"""What agent-vm adds to limactl alone, side by side in one interleaved run.

usage: bench.py [ROUNDS=3]     needs a base instance; prints medians and the spread, asserts nothing
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "agent_vm.py"
CLONE = "agent-vm-bench-0bench"


def quiet(*argv: str) -> None:
    subprocess.run(
        argv,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        check=True,
    )


def script(*argv: str) -> Callable[[], None]:
    return lambda: quiet(sys.executable, str(SCRIPT), *argv)


def lines_of(*argv: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in subprocess.check_output(argv, text=True).splitlines()]


def base_name() -> str:
    listed = lines_of(sys.executable, str(SCRIPT), "list", "--json")
    names = [one["name"] for one in listed if one["role"] == "base"]
    if not names:
        raise SystemExit("no base instance: agent-vm setup")
    return names[0]


def by_hand(base: str) -> None:
    """The same VM with limactl and ssh only, mounting the same directory."""
    folder = next(
        one["dir"] for one in lines_of("limactl", "list", "--format", "json") if one["name"] == base
    )
    mounts = json.dumps([{"location": os.getcwd(), "writable": True}])
    expression = f'.mountTypesUnsupported=[] | .mountType="9p" | .mounts={mounts}'
    quiet("limactl", "clone", "--tty=false", base, CLONE, "--set", expression)
    try:
        quiet("limactl", "start", "--tty=false", CLONE)
        config = Path(folder).parent / CLONE / "ssh.config"
        quiet("ssh", "-F", str(config), f"lima-{CLONE}", "claude --version && sync")
    finally:
        quiet("limactl", "stop", "-f", CLONE)
        quiet("limactl", "delete", "-f", CLONE)


def measure(cases: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(rounds):
        for name, case in cases.items():
            start = time.perf_counter()
            case()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def report(seconds: dict[str, list[float]]) -> None:
    for name, values in seconds.items():
        low, middle, high = min(values), statistics.median(values), max(values)
        print(f"{name:28} {middle:8.3f} s   ({low:.3f} to {high:.3f}, {len(values)} rounds)")


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    small = {
        "python3 -c pass": lambda: quiet(sys.executable, "-c", "pass"),
        "--help": script("--help"),
        "shell-init": script("shell-init"),
        "limactl list": lambda: quiet("limactl", "list", "--format", "json"),
        "list": script("list"),
    }
    report(measure(small, 10 * rounds))
    base = base_name()
    with tempfile.TemporaryDirectory() as project:
        os.chdir(project)
        whole = measure(
            {
                "by hand": lambda: by_hand(base),
                "run -- --version": script("run", "--", "--version"),
            },
            rounds,
        )
        os.chdir("/")
    report(whole)
    added = statistics.median(whole["run -- --version"]) - statistics.median(whole["by hand"])
    print(f"{'difference of the medians':28} {added:8.3f} s")


if __name__ == "__main__":
    main()
