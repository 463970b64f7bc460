"""What lies in ~/.local/state/github-app-token: whose it is, what is spoiled, who locks it."""

from __future__ import annotations

import fcntl
import json
import os
import re
import time
import unittest
from pathlib import Path

import github_app_token as g
from tests.token_case import MINT
from tests.token_case import Case


class CacheTest(Case):
    def test_a_signal_between_writing_and_its_end(self) -> None:
        """What is on the disk is alive; a token that is revoked is not on it."""
        setup = (
            "import signal\nreplace = os.replace\ndef cut(old, new):\n replace(old, new)\n"
            " if 'installation-' in new: os.kill(os.getpid(), signal.SIGINT); g.time.sleep(0.5)\n"
            "os.replace = cut\n"
        )
        done = self.token(setup=setup)
        self.assertEqual((done.status, done.out, done.err), (130, "", ""))
        self.assertIn(self.passes(self.token()), self.github.tokens)

    def file(self) -> Path:
        (path,) = self.cache.glob("installation-*.json")
        return path

    def test_a_lock_that_cannot_be_had_costs_no_token(self) -> None:
        self.passes(self.token())
        lock = Path(f"{self.file()}.lock")
        with open(lock, "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            for _ in range(2):  # a cached one, and one that is none any more
                done = self.token(setup="g.LOCK_SECONDS = 0.1\n")
                self.passes(done)
                self.assertIn("another process holds", done.err)
                self.expire()
        lock.unlink()
        lock.symlink_to(self.home / "elsewhere")
        self.file().write_text("{")
        self.passes(self.token())
        self.assertFalse((self.home / "elsewhere").exists())
        self.expire()
        no_locks = "def no(*a): raise OSError(37, 'No locks available')\ng.fcntl.flock = no\n"
        self.passes(self.token(setup=no_locks))

    def test_what_a_killed_process_left_is_removed(self) -> None:
        self.cache.mkdir(parents=True, mode=0o700)
        old, new = self.cache / ".new-old", self.cache / ".new-new"
        for path in (old, new):
            path.write_text("x")
        os.utime(old, (time.time() - 7200,) * 2)
        self.passes(self.token())
        self.assertEqual((old.exists(), new.exists()), (False, True))

    def test_a_token_in_the_place_of_another_is_not_given_out(self) -> None:
        self.github.selected = {11, 12}
        self.passes(self.token())
        mine = self.file()
        self.passes(self.token("--repo", "octo/other"))
        (other,) = set(self.cache.glob("installation-*.json")) - {mine}
        mine.write_text(other.read_text())
        shown = json.loads(self.passes(self.token("--format", "json")))
        self.assertEqual([item["id"] for item in shown["repositories"]], [11])

    def test_a_folder_that_is_another_users(self) -> None:
        """After a run under sudo it is root's, or what lies above it: nobody drops a pin for that."""
        self.passes(self.token())
        denied = (
            "made = g.Cache.__init__\n"
            "def begun(self): os.geteuid = lambda: 4242; made(self)\n"
            "g.Cache.__init__ = begun\nreal = os.open\n"
            "def no(path, *_, **__): raise PermissionError(13, 'Permission denied', path)\n"
            "os.open = lambda path, *a, **k: (no if '/.local/' in path else real)(path, *a, **k)\n"
        )
        above = self.home / ".local"
        cannot = "os.makedirs = lambda *_, **__: no({!r})\n"
        for where, setup in (
            (self.cache, denied),
            (above, denied + cannot.format(str(above / "state"))),
        ):
            for argv in (("login", "--repo-id", "11"), ("revoke",), ("token",)):
                done = self.run_it(*argv, setup=setup)
                fix = f"sudo chown -R 4242 {where}\n"
                self.fails(done, g.MEND, f"{where} belongs to user {os.getuid()}", fix)
                self.assertNotIn("--accept-new-repo", done.err)
        done = self.run_it("revoke", setup=denied + cannot.format(str(self.home / "x")))
        self.fails(done, g.MEND, f"{self.home} belongs to user")
        self.assertNotIn("chown", done.err, "nothing else is to be given away")

    def test_no_home(self) -> None:
        here = self.home / "here"
        here.mkdir()
        argv = ("token", "--key", "k", "--permissions", "dev", "--repo", "o/r", "--app-id", "x")
        env = {**self.env, "HOME": "there", "GITHUB_APP_PROFILE": ""}
        done = self.as_users_do(*argv, env=env, cwd=here)
        self.assertEqual(done.returncode, g.USAGE)
        self.assertIn("HOME", done.stderr)
        self.assertEqual(list(here.iterdir()), [])

    def test_what_is_spoiled_is_ignored(self) -> None:
        first = self.passes(self.token())
        good = self.file().read_text()
        for spoil in (
            "",
            "[]",
            good[:50],
            good.replace("ghs_", "g s_"),
            good.replace('_at": 1', '_at": "x", "y": 1'),
            re.sub('"expires_at": [0-9.]+', f'"expires_at": {10**400}', good),
            "[" * 50_000,
        ):
            with self.subTest(spoil[:20]):
                self.file().write_text(spoil)
                done = self.token()
                self.assertNotEqual(self.passes(done), first)
                self.assertIn("ignoring", done.err)
                self.assertIn(str(self.file()), done.err)
        self.file().write_text(good)
        self.file().chmod(0o644)
        done = self.token()
        self.assertNotEqual(self.passes(done), first)
        self.assertIn("is open to others", done.err)
        target = self.write("target", good.encode())
        path = self.file()
        path.unlink()
        path.symlink_to(target)
        self.assertNotEqual(self.passes(self.token()), first)
        self.assertEqual(target.read_text(), good, "what a link points to is not written")

    def test_other_settings_have_other_tokens(self) -> None:
        self.github.selected = {11, 12}
        tokens = {
            self.passes(self.token(*argv))
            for argv in ([], ["--permissions", "read"], ["--repo", "octo/other"], ["--app-id", "1"])
        }
        self.assertEqual(len(tokens), 4)
        same = ("--repo", "Octo/Widgets")
        self.assertEqual(self.passes(self.token(*same)), self.passes(self.token()))

    def test_ten_at_once_make_one_token(self) -> None:
        argv = ("token", "--key", str(self.key), "--permissions", "dev")
        for spoiled in (False, True):
            if spoiled:
                self.file().write_text("{")
            before = self.github.paths().count(MINT)
            children = [self.start(*argv) for _ in range(10)]
            tokens = {self.passes(child.wait()) for child in children}
            self.assertEqual(len(tokens), 1)
            self.assertEqual(self.github.paths().count(MINT) - before, 1)


if __name__ == "__main__":
    unittest.main()
