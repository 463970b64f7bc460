"""python3 -m tests [--vm | MODULE …]: run the tests and close with one line of counts."""

from __future__ import annotations

import sys
import unittest
from pathlib import Path

FOLDER = Path(__file__).resolve().parent


def main(argv: list[str]) -> int:
    sys.path.insert(0, str(FOLDER))
    loader = unittest.TestLoader()
    if argv == ["--vm"]:
        suite = loader.loadTestsFromName("vm_test")
    elif argv:
        suite = loader.loadTestsFromNames(argv)
    else:
        suite = loader.discover(str(FOLDER))
    result = unittest.TextTestRunner(stream=sys.stdout, verbosity=1).run(suite)
    for test, reason in result.skipped:
        print(f"SKIP {test}: {reason}")
    failed = len(result.failures) + len(result.errors) + len(result.unexpectedSuccesses)
    passed = result.testsRun - failed - len(result.skipped)
    print(f"{passed} passed, {failed} failed, {len(result.skipped)} skipped")
    if passed + failed == 0:
        print("no test ran", file=sys.stderr)
        return 1
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
