"""python3 -m tests [--vm | MODULE …]: run the tests and close with one line of counts."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import subprocess
import sys
import tempfile
import unittest
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
NOBODY = 65534


@dataclass(frozen=True)
class Outcome:
    """What came of one class of tests; plain data, because it crosses processes."""

    ran: int
    failed: int
    text: str
    skipped: tuple[str, ...]


def run_class(name: str) -> Outcome:
    stream = io.StringIO()
    suite = unittest.defaultTestLoader.loadTestsFromName(name)
    result = unittest.TextTestRunner(stream=stream, verbosity=0).run(suite)
    failed = len(result.failures) + len(result.errors) + len(result.unexpectedSuccesses)
    skipped = tuple(f"{test}: {reason}" for test, reason in result.skipped)
    return Outcome(result.testsRun, failed, stream.getvalue() if failed else "", skipped)


def class_names(suite: unittest.TestSuite) -> Iterator[str]:
    for item in suite:
        if isinstance(item, unittest.TestSuite):
            yield from class_names(item)
        else:
            yield f"{type(item).__module__}.{type(item).__qualname__}"


def run(names: list[str]) -> list[Outcome]:
    """Each class is run in one of a few processes: the tests wait for theirs most of the time."""
    with ProcessPoolExecutor((os.cpu_count() or 1) + 1) as pool:
        outcomes = []
        for name, outcome in zip(names, pool.map(run_class, names)):
            report(name, outcome)
            outcomes.append(outcome)
    return outcomes


def report(name: str, outcome: Outcome) -> None:
    print(f"{name}: {outcome.ran} run" + f", {outcome.failed} FAILED" * bool(outcome.failed))
    sys.stdout.write(outcome.text)


def main(argv: list[str]) -> int:
    if os.geteuid() == 0 and argv != ["--vm"]:
        return as_nobody(argv)
    loader = unittest.defaultTestLoader
    if argv:
        modules = ["vm_test"] if argv == ["--vm"] else argv
        suite = loader.loadTestsFromNames([f"tests.{module}" for module in modules])
    else:
        suite = loader.discover(str(FOLDER), top_level_dir=str(FOLDER.parent))
    # The largest classes first: none of them is left for the end, when other workers are idle.
    names = [name for name, _ in Counter(class_names(suite)).most_common()]
    if argv == ["--vm"]:  # in this process: what stops it is for the tests as well
        outcomes = [run_class(names[0])]
        report(names[0], outcomes[0])
    else:
        outcomes = run(names)
    for outcome in outcomes:
        for reason in outcome.skipped:
            print(f"SKIP {reason}")
    ran, failed = (sum(getattr(o, field) for o in outcomes) for field in ("ran", "failed"))
    skipped = sum(len(outcome.skipped) for outcome in outcomes)
    print(f"{ran - failed - skipped} passed, {failed} failed, {skipped} skipped")
    return 1 if failed or ran == skipped else 0


# limactl refuses root, and root may read everything: root's tests go on as nobody.


def as_nobody(argv: list[str]) -> int:
    with tempfile.TemporaryDirectory(prefix="avm-tests-") as name:
        folder = Path(name)
        folder.chmod(0o755)
        home = folder / "home"
        home.mkdir()
        os.chown(home, NOBODY, NOBODY)
        python = python_for_nobody(folder / "python")
        root = FOLDER.parent
        if not nobody_can("test", "-r", str(root / "agent_vm.py")):
            root = folder / "repository"
            ignored = shutil.ignore_patterns(".git", ".venv", ".*_cache", "__pycache__")
            shutil.copytree(FOLDER.parent, root, symlinks=True, ignore=ignored)
        env = {**os.environ, "HOME": str(home), "PYTHONPYCACHEPREFIX": str(home / "bytecode")}
        env.pop("PYTHONDONTWRITEBYTECODE", None)
        command = [python, "-m", "tests", *argv]
        return subprocess.run(
            command, cwd=root, env=env, user=NOBODY, group=NOBODY, extra_groups=[], check=False
        ).returncode


def nobody_can(*command: str) -> bool:
    with contextlib.suppress(OSError):
        return subprocess.run(
            command, cwd="/", user=NOBODY, group=NOBODY, extra_groups=[], check=False,
            stderr=subprocess.DEVNULL,
        ).returncode == 0  # fmt: skip
    return False


def python_for_nobody(target: Path) -> str:
    """This Python, or a copy of it when it lies in a folder of root's own."""
    if nobody_can(sys.executable, "-c", "import json"):
        return sys.executable
    version = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    base = Path(sys.base_prefix)
    ignored = shutil.ignore_patterns("test", "tests", "site-packages", "config-*", "ensurepip")
    (target / "bin").mkdir(parents=True)
    link_or_copy(str(Path(sys.executable).resolve()), str(target / "bin" / version))
    lib = target / "lib"
    shutil.copytree(
        base / "lib" / version, lib / version, ignore=ignored, copy_function=link_or_copy
    )
    for library in base.glob("lib/libpython*"):
        link_or_copy(str(library.resolve()), str(lib / library.name))
    os.environ["LD_LIBRARY_PATH"] = str(lib)  # the Sandbox passes it on
    return str(target / "bin" / version)


def link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
