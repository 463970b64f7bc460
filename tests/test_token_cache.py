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
from tests.quick import Result
from tests.token_case import MINT
from tests.token_case import Case
from tests.token_case import key

# `setup`: from the cache on this is another user, as the files' owner is to who ran it under sudo.
STRANGER = (
    "made = g.Cache.__init__\n"
    "def begun(self): os.geteuid = lambda: 4242; made(self)\n"
    "g.Cache.__init__ = begun\n"
)


def denied(part: str) -> str:
    """`setup`: what has this in its path, $ is its end, cannot be opened or made."""
    return (
        "opened, made_dirs = os.open, os.makedirs\n"
        "def looked(call):\n"
        " def of(path, *a, **k):\n"
        f"  if {part!r} in f'{{path}}$': raise PermissionError(13, 'Permission denied', path)\n"
        "  return call(path, *a, **k)\n"
        " return of\n"
        "os.open, os.makedirs = looked(opened), looked(made_dirs)\n"
    )


class CacheTest(Case):
    def test_what_a_killed_process_left_is_removed(self) -> None:
        self.cache.mkdir(parents=True, mode=0o700)
        old, new = self.cache / ".new-old", self.cache / ".new-new"
        for path in (old, new):
            path.write_text("x")
        os.utime(old, (time.time() - 7200,) * 2)
        self.passes(self.token())
        self.assertEqual((old.exists(), new.exists()), (False, True))

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
        setup = STRANGER + denied("/.local/")
        self.cache.mkdir(parents=True)
        for where in (self.cache, self.cache.parent, self.home / ".local"):
            for argv in (("login", "--repo-id", "11"), ("revoke",), ("token",)):
                done = self.run_it(*argv, setup=setup)
                fix = f"sudo chown -R 4242 {where}\n"
                self.fails(done, g.MEND, f"{where} belongs to user {os.getuid()}", fix)
                self.assertNotIn("--accept-new-repo", done.err)
            where.rmdir()
        done = self.run_it("revoke", setup=setup)
        self.fails(done, g.MEND, f"{self.home} belongs to user")
        self.assertNotIn("chown", done.err, "nothing else is to be given away")

    def bare(self, *verb: str, setup: str) -> Result:
        """Without a profile, which would be another user's as well; the key is on stdin."""
        argv = [*verb, "--repo", "octo/widgets", "--app-id", "1", "--api-url", self.github.url]
        return self.run_it(*argv, setup=setup, data=key(), GITHUB_APP_PROFILE="")

    def test_under_sudo_nothing_is_made_in_the_users_home(self) -> None:
        """Fault 35: ~/.local would be root's, 0700, and no program of the user's could enter it."""
        if os.getuid() == 0:
            os.chown(self.home, 4242, 4242)
        user, root = self.home.stat().st_uid, "os.geteuid = lambda: 0\n"
        done = self.bare("token", "--key", "-", "--permissions", "dev", setup=root)
        self.passes(done)
        self.assertIn(f"{self.home} belongs to user {user}", done.err)
        self.assertIn("run this as that user", done.err)
        self.fails(self.bare("login", setup=root), g.MEND, "run this as that user")
        self.assertFalse((self.home / ".local").exists())

    def test_a_folder_above_that_is_roots(self) -> None:
        """Fault 35: what costs the cache only says what gives it back, too."""
        above = self.home / ".local/state"
        above.mkdir(parents=True)
        setup = f"os.geteuid = lambda: 4242\n{denied('/.local/')}os.open = opened\n"
        done = self.bare("token", "--key", "-", "--permissions", "dev", setup=setup)
        self.passes(done)
        self.assertIn(f"sudo chown -R 4242 {above})", done.err)

    def test_files_that_are_another_users(self) -> None:
        """Fault 35: each file that root made says whose it is, and what gives it back."""
        self.passes(self.token())
        (pin,) = self.cache.glob("repository-*.json")
        fix = "run this as that user" if os.getuid() == 0 else f"sudo chown -R {os.getuid()}"
        for verb, path in (("token", self.ini), ("token", pin), ("revoke", self.file()),
                           ("token", self.key)):  # fmt: skip
            owned = (
                "seen = os.stat\n"
                "def owned(path, *a, **k):\n"
                f" info, its = seen(path, *a, **k), str(path).endswith({path.name!r})\n"
                " return os.stat_result(info[:4] + (4242,) + info[5:]) if its else info\n"
                "os.stat = owned\n"
            )
            argv = (verb, "--key", str(self.key), "--permissions", "dev")
            self.expire()
            done = self.run_it(*argv, setup=owned + denied(f"{path.name}$"))
            with self.subTest(path):
                self.fails(done, g.MEND, f"{path} belongs to user 4242 (0 is root)", fix)

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
