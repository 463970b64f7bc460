"""Run the tests, and close with one line of counts.

usage: python3 -m tests [-v] [--fast | --vm] [WORD …]

WORD runs the tests whose name, tests.MODULE.CLASS.TEST, contains it. --fast runs the modules with
`FAST = True`: tables, no processes. --vm boots real VMs. -v shows the ten slowest classes.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import unittest
from collections.abc import Iterable
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures import as_completed
from dataclasses import dataclass
from dataclasses import replace
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
NOBODY = 65534
SECONDS_PER_TEST = 0.3  # of a class that declares no COST


@dataclass(frozen=True)
class TestClass:
    """A class of tests; it runs in one process, as its tests may share what setUpClass made."""

    name: str
    tests: tuple[str, ...]
    cost: float  # seconds, about, of the whole class


@dataclass(frozen=True)
class Outcome:
    """What came of one class of tests; plain data, because it crosses processes."""

    name: str
    passed: int
    failed: int
    skipped: int
    reasons: tuple[str, ...]
    text: str
    seconds: float


class Result(unittest.TextTestResult):
    """Counts tests: one whose subtests fail in ten ways is one test that failed."""

    passed = 0

    def addSuccess(self, test: unittest.TestCase) -> None:
        super().addSuccess(test)
        self.passed += 1


def run_class(one: TestClass) -> Outcome:
    stream = io.StringIO()
    names = [f"{one.name}.{test}" for test in one.tests]
    suite = unittest.defaultTestLoader.loadTestsFromNames(names)
    total = suite.countTestCases()
    start = time.monotonic()
    runner = unittest.TextTestRunner(
        stream=stream, verbosity=0, resultclass=lambda *args: Result(*args)
    )
    result = runner.run(suite)
    assert isinstance(result, Result)
    passed = result.passed + len(result.expectedFailures)
    skipped = len({getattr(test, "test_case", test).id() for test, _ in result.skipped})
    if any(not isinstance(test, unittest.TestCase) for test, _ in result.skipped):
        skipped = total - passed  # setUpClass did
    failed = total - passed - skipped
    if not result.wasSuccessful():
        failed = max(failed, 1)  # of tearDownClass, no test is short
    return Outcome(
        name=one.name,
        passed=passed,
        failed=failed,
        skipped=skipped,
        reasons=tuple(f"{test}: {reason}" for test, reason in result.skipped),
        text=stream.getvalue() if failed else "",
        seconds=time.monotonic() - start,
    )


def test_classes(module: str) -> Iterator[TestClass]:
    """Those of one module; that it cannot be imported is a traceback."""
    for value in vars(importlib.import_module(module)).values():
        if isinstance(value, type) and issubclass(value, unittest.TestCase):
            tests = tuple(unittest.defaultTestLoader.getTestCaseNames(value))
            if tests and value.__module__ == module:
                cost = getattr(value, "COST", len(tests) * SECONDS_PER_TEST)
                yield TestClass(f"{module}.{value.__qualname__}", tests, cost)


def modules(fast: bool) -> list[str]:
    """A module says `FAST = True`; it is not imported to find out, as that takes a second."""
    return [
        f"tests.{path.stem}"
        for path in sorted(FOLDER.glob("test_*.py"))
        if not fast or re.search(r"^FAST = True$", path.read_text(), re.MULTILINE)
    ]


def only(one: TestClass, words: Iterable[str]) -> TestClass:
    tests = [test for test in one.tests if any(word in f"{one.name}.{test}" for word in words)]
    return replace(one, tests=tuple(tests))


def chosen(options: argparse.Namespace) -> list[TestClass]:
    """Longest first: none of those is left for the end, when the other workers are idle."""
    names = ["tests.vm_test"] if options.vm else modules(options.fast)
    found = [one for module in names for one in test_classes(module)]
    if options.words:
        found = [only(one, options.words) for one in found]
    if not any(one.tests for one in found):
        raise SystemExit(f"no test has {' or '.join(options.words)} in its name")
    found = [one for one in found if one.tests]
    return sorted(found, key=lambda one: -one.cost)


def outcomes_here(classes: Iterable[TestClass]) -> Iterator[Outcome]:
    return (run_class(one) for one in classes)


def outcomes_of_workers(classes: Iterable[TestClass]) -> Iterator[Outcome]:
    """A few processes more than processors: tests wait for theirs a good part of the time.

    A fork has all modules already; elsewhere than on Linux, system libraries do not bear it.
    """
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    with ProcessPoolExecutor((os.cpu_count() or 1) + 2, context) as pool:
        for done in as_completed([pool.submit(run_class, one) for one in classes]):
            yield done.result()


def report(outcome: Outcome) -> None:
    counts = [f"{outcome.passed} passed"]
    if outcome.failed:
        counts.append(f"{outcome.failed} FAILED")
    if outcome.skipped:
        counts.append(f"{outcome.skipped} skipped")
    print(f"{outcome.name}: {', '.join(counts)}", flush=True)
    sys.stdout.write(outcome.text)


def report_slowest(outcomes: Iterable[Outcome], classes: Iterable[TestClass]) -> None:
    costs = {one.name: one.cost for one in classes}
    print("slowest classes, seconds taken and COST:")
    for outcome in sorted(outcomes, key=lambda outcome: -outcome.seconds)[:10]:
        print(f"{outcome.seconds:8.2f} {costs[outcome.name]:6.1f}  {outcome.name}")


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python3 -m tests", usage=argparse.SUPPRESS)
    parser.description = __doc__
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("words", nargs="*", help=argparse.SUPPRESS)
    for option in ("-v", "--fast", "--vm"):
        parser.add_argument(option, action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    # A VM's tests are stopped by what stops this process, and tables need no other one.
    here = options.vm or options.fast
    if os.geteuid() == 0 and not here:
        return as_nobody(argv)
    classes = chosen(options)
    outcomes = []
    for outcome in outcomes_here(classes) if here else outcomes_of_workers(classes):
        report(outcome)
        outcomes.append(outcome)
    # Four at once on two processors are a busy machine: what failed is run again, alone, and has
    # failed if it does so then. The first failure has been shown.
    names = {outcome.name for outcome in outcomes if outcome.failed and not here}
    outcomes = [outcome for outcome in outcomes if outcome.name not in names]
    for outcome in outcomes_here(one for one in classes if one.name in names):
        print("again, alone: ", end="")
        report(outcome)
        outcomes.append(outcome)
    if options.v:
        report_slowest(outcomes, classes)
    for outcome in outcomes:
        for reason in outcome.reasons:
            print(f"SKIP {reason}")
    passed, failed, skipped = (
        sum(getattr(outcome, field) for outcome in outcomes)
        for field in ("passed", "failed", "skipped")
    )
    print(f"{passed} passed, {failed} failed, {skipped} skipped")
    return 1 if failed or not passed else 0


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
