"""Text of strangers takes time in proportion to its length, whatever it is made of."""

from __future__ import annotations

import time
import unittest
from collections.abc import Callable
from functools import partial
from typing import Any

import github_mcp_proxy as proxy

FAST = True
MEGABYTE = 1 << 20
SIGNED = b'"?token=AAAAAAAAAAAAAAAAAAAA '


def seconds(work: Callable[[Any], object], given: Any) -> float:
    """The quicker of two, so that a busy machine is not taken for a slow pattern."""
    times = []
    for _ in range(2):
        began = time.process_time()
        work(given)
        times.append(time.process_time() - began)
    return min(times)


class PatternTest(unittest.TestCase):
    def in_proportion(
        self, what: object, work: Callable[[Any], object], once: Any, twice: Any
    ) -> float:
        """Twice the text takes at most three times as long."""
        for _ in range(3):  # a busy machine is no reason
            short, long = seconds(work, once), seconds(work, twice)
            if long <= max(3 * short, 0.02):
                break
        self.assertLessEqual(long, max(3 * short, 0.02), what)
        return long

    def test_redact(self) -> None:
        for text in (
            b":///" * 50 + SIGNED,
            b":///",
            SIGNED,
            b"://a?token=AAAAAAAAAAAAAAAAAAAA",
            b"://a?token=AAAAAAAAAAAAAAAAAAAA)",
            b"://" + b"\\" * 1000,
            b"\\u0026",
            b"\\",
            b"://\\\\u0026sig=",
            b"ghp_",
            b"ghp_" + b"a" * 29 + b" ",
            b"ghp_" + b"a" * 36,
            b"xghp_" + b"a" * 36 + b" ",
            b"github_pat_",
            b"?",
            b"6x-amz-a",
            b"?x-amz-" + b"-" * 39,
            b"=",
            b"?sig=AAAAAAAAAAAAAAAAAAA",
            b"://= ",
            b"x://a=1 ",
            b"://a=666666",
            b"://?sig=AAAAAAAAAAAAAAAAAAAA ",
            b"&t",
        ):
            whole = text * (MEGABYTE // len(text))
            with self.subTest(text[:40]):
                long = self.in_proportion(text[:40], proxy.redact, whole[: len(whole) // 2], whole)
                self.assertLess(long, 0.3)

    def test_names_of_many_marks(self) -> None:
        """To sort the marks on one letter takes time by their square."""
        bounds = proxy.Bounds(proxy.Scope("o", "r"), proxy.Policy(default_branch="main"))
        for name in ("a" + "\u0301" * 16 + "\u0327" * 16, "a" + "\u0301\u0327" * 2000):
            with self.assertRaises(proxy.Refusal):
                proxy.check_written_file(name, bounds)
        few = "a" + "\u0301" * 30
        self.assertEqual(proxy.check_file(few, bounds), few)

    def test_queries_of_many_marks(self) -> None:
        bounds = proxy.Bounds(proxy.Scope("o", "r"), proxy.Policy())
        began = time.process_time()
        with self.assertRaises(proxy.Refusal):
            proxy.narrow_query("a" + "\u0315\u0300\u0316" * 100_000, bounds)
        self.assertLess(time.process_time() - began, 0.3)

    def test_globs(self) -> None:
        for glob, name in (
            ("*a*a*a*a*", "a" * 254 + "b"),
            ("**a**a**a**a**b", "a" * 254),
            ("**/a/**/a/**/a/**/b", "a/" * 2000),
            ("?*?*?*?*?*x", "a" * 4096),
            ("*" * 100, "a" * 4096 + "/"),
        ):
            with self.subTest(glob):
                match = partial(proxy.glob_match, glob)
                self.in_proportion(glob, match, name[: len(name) // 2], name)


if __name__ == "__main__":
    unittest.main()
