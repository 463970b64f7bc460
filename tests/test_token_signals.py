"""Ctrl-C ends it within a second at any moment, and leaves no live token that nobody has."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import time
import unittest

from tests.fakes.github import Reply
from tests.fakes.github import error
from tests.quick import Result
from tests.quick import Run
from tests.token_case import FOUND
from tests.token_case import MINT
from tests.token_case import NO_SLEEP
from tests.token_case import POLL
from tests.token_case import REVOKE
from tests.token_case import TAKE_BACK
from tests.token_case import LoginCase
from tests.token_case import ctrl_c_at
from tests.token_case import ctrl_c_in
from tests.token_case import minted

AT_ONCE = 2.0  # seconds: one, and as much again on a busy machine


class SignalTest(LoginCase):
    def mint(self, setup: str = "") -> Run:
        return self.start("token", "--key", str(self.key), "--permissions", "dev", setup=setup)

    def stopped(self, run: Run, number: int = signal.SIGINT, status: int = 130) -> Result:
        began = time.monotonic()
        os.kill(run.pid, number)
        done = run.wait()
        self.assertLess(time.monotonic() - began, AT_ONCE)
        self.assertEqual((done.status, done.out), (status, ""), done.err)
        self.assertNotIn("Traceback", done.err)
        return done

    def while_it_hangs(self, run: Run) -> Result:
        self.assertTrue(self.github.hangs.wait(20), "no request hangs")
        return self.stopped(run)

    def stored_tokens(self) -> list[str]:
        files = [*self.cache.glob("installation-*.json"), *self.cache.glob("user-*.json")]
        return [json.loads(path.read_text())["token"] for path in files]

    def test_github_hangs_before_anything_is_given(self) -> None:
        self.github.on(FOUND, Reply(200, {"id": 7}, (), "hang"))
        self.while_it_hangs(self.mint())
        self.github.reset()
        self.github.on(FOUND, Reply(200, {"id": 7}, (), "hang"))
        run = self.mint()
        self.assertTrue(self.github.hangs.wait(20))
        self.stopped(run, signal.SIGTERM, 143)
        self.assertEqual(self.github.paths("POST"), [])

    def test_it_strikes_where_the_library_makes_a_response(self) -> None:
        """What is half made then is deleted without a word about it."""
        setup = (
            "import http.client, signal\nmade = http.client.HTTPResponse.__init__\n"
            "def cut(*a, **k):\n os.kill(os.getpid(), signal.SIGTERM)\n made(*a, **k)\n"
            "http.client.HTTPResponse.__init__ = cut\n"
        )
        done = self.mint(setup).wait()
        self.assertEqual((done.status, done.out, done.err), (143, "", ""))

    def test_the_token_comes_just_after(self) -> None:
        """Within the moment that it has, the answer is waited for: it is stored, and known."""
        self.github.on(MINT, Reply(201, minted(self.github), (), "hang"))
        run = self.mint()
        self.assertTrue(self.github.hangs.wait(20))
        threading.Timer(0.1, self.github.go.set).start()
        self.stopped(run)
        self.assertEqual(list(self.github.tokens), self.stored_tokens())

    def test_the_token_does_not_come(self) -> None:
        """Nobody can take back what nobody has: it says so, and the next run begins anew."""
        self.github.on(MINT, Reply(201, minted(self.github), (), "hang"))
        done = self.while_it_hangs(self.mint())
        self.assertIn("nobody has it, and it expires", done.err)
        self.assertEqual(self.stored_tokens(), [])

    def test_when_the_token_is_granted(self) -> None:
        for at in (1, 2):
            self.github.tokens.clear()
            shutil.rmtree(self.cache, ignore_errors=True)
            self.assertEqual(self.mint(ctrl_c_at(at)).wait().status, 130)
            self.assertEqual(list(self.github.tokens), self.stored_tokens())

    def test_when_a_login_is_granted(self) -> None:
        """Whichever request it comes at: stored and alive, or neither; the one before is over."""
        for at in range(1, 7):
            shutil.rmtree(self.cache, ignore_errors=True)
            self.github.tokens.clear()
            self.login()
            done = self.login(setup=ctrl_c_at(at))
            self.assertEqual(done.status, 130, done.err)
            self.assertEqual(list(self.github.tokens), self.stored_tokens(), at)
        self.assertEqual(self.login(setup=ctrl_c_at(7)).status, 0)

    def test_a_token_that_is_too_wide_is_taken_back_all_the_same(self) -> None:
        wide = minted(self.github, repository_selection="all")
        self.github.on(MINT, Reply(201, wide))
        done = self.mint(ctrl_c_in("taken_back")).wait()
        self.assertEqual((done.status, done.out), (130, ""), done.err)
        self.assertEqual(self.github.paths("DELETE"), [TAKE_BACK])
        self.assertNotIn(wide["token"], self.github.tokens)
        self.assertIn("it is revoked", done.err)

    def test_what_is_not_taken_back_is_said(self) -> None:
        """GitHub hangs, or fails again and again: within the second there is a line about it."""
        for reply in (Reply(204, None, (), "hang"), error(502, "")):
            self.github.reset()
            self.github.on(MINT, Reply(201, minted(self.github, repository_selection="all")))
            self.github.on(TAKE_BACK, reply)
            if reply.then:
                done = self.while_it_hangs(self.mint())
            else:
                began = time.monotonic()
                done = self.mint(ctrl_c_in("taken_back")).wait()
                self.assertLess(time.monotonic() - began, AT_ONCE)
                self.assertEqual(self.github.paths("DELETE"), [TAKE_BACK], "no second try")
            self.assertEqual(done.status, 130, done.err)
            self.assertIn("did not revoke it: it lives on", done.err)

    def test_between_two_tries(self) -> None:
        """The pause before the next one is not waited for, and neither is that begun."""
        self.github.on(MINT, error(502, ""))
        run = self.mint("g.PAUSE = 5\n")
        while MINT not in self.github.paths():
            time.sleep(0.01)
        time.sleep(0.1)
        self.assertEqual(self.stopped(run).err, "")
        self.assertEqual(self.github.paths("POST"), [MINT])

    def test_github_hangs_while_a_login_is_checked(self) -> None:
        path = "/api/v3/user/installations"
        self.github.on(path, Reply(200, {"installations": []}, (), "hang"))
        self.while_it_hangs(self.start("login", setup=NO_SLEEP))
        self.assertEqual((self.github.tokens, self.stored_tokens()), ({}, []))

    def test_github_hangs_while_the_login_before_is_taken_back(self) -> None:
        """The new one is stored, and what is not known to be over is said."""
        self.login()
        self.github.on(REVOKE, Reply(202, {}, (), "hang"))
        done = self.while_it_hangs(self.start("login", setup=NO_SLEEP))
        self.assertIn("did not revoke the login before", done.err)
        self.github.replies.clear()
        self.assertIn(self.passes(self.run_it("token")), self.github.tokens)
        self.assertEqual(self.github.paths().count(REVOKE), 1, "the new one was not")

    def test_github_hangs_while_a_login_is_asked_for(self) -> None:
        self.github.on(POLL, Reply(200, {"error": "authorization_pending"}, (), "hang"))
        self.while_it_hangs(self.start("login", setup=NO_SLEEP))
        self.assertEqual(self.stored_tokens(), [])

    def test_github_hangs_while_a_token_is_taken_back(self) -> None:
        self.login()
        self.github.on(REVOKE, Reply(202, {}, (), "hang"))
        self.while_it_hangs(self.start("logout"))
        self.assertEqual(len(self.stored_tokens()), 1, "it is to be done again")

    def test_a_refresh_is_finished(self) -> None:
        self.login()
        self.store(expires_at=time.time() - 1)
        for at in (1, 2):
            done = self.run_it("token", setup=ctrl_c_at(at))
            self.assertEqual((done.status, done.out), (130, ""), done.err)
            self.assertEqual(list(self.github.tokens), self.stored_tokens())
        self.passes(self.run_it("token"))
        self.assertFalse(self.stored()["withheld"])

    def test_github_hangs_in_a_refresh(self) -> None:
        self.login()
        self.store(expires_at=time.time() - 1)
        self.github.on(POLL, Reply(200, {}, (), "hang"))
        self.while_it_hangs(self.start("token"))
        self.assertTrue(self.stored()["withheld"], "the next run knows")

    def test_while_nobody_enters_the_code(self) -> None:
        self.github.pending = 1000
        run = self.start("login", setup="real = g.time.sleep\ng.time.sleep = lambda s: real(99)\n")
        while not self.github.paths("POST"):
            time.sleep(0.01)
        self.stopped(run)
        self.assertEqual(self.stored_tokens(), [])

    def test_a_command_that_prints_no_key(self) -> None:
        command = f"echo $$ > {self.home / 'pid'}; exec sleep 60"
        run = self.start("token", "--key", f"command:{command}", "--permissions", "dev")
        pid = self.home / "pid"
        while not (pid.exists() and pid.read_text().strip()):
            time.sleep(0.01)
        self.stopped(run)
        with self.assertRaises(ProcessLookupError):
            os.kill(int(pid.read_text()), 0)

    def test_a_name_server_that_is_silent(self) -> None:
        """Python calls no handler in there, whatever comes."""
        setup = (
            "import hashlib, socket\ng.LAST = 0.3\ndef silent(*a, **k):\n"
            f" open({str(self.home / 'asked')!r}, 'w').close()\n"
            " hashlib.pbkdf2_hmac('sha256', b'', b'', 10**9)\nsocket.getaddrinfo = silent\n"
        )
        run = self.mint(setup)
        while not (self.home / "asked").exists():
            time.sleep(0.01)
        self.assertEqual(self.stopped(run).err, "")

    def test_a_name_server_that_is_silent_while_a_token_is_taken_back(self) -> None:
        self.github.on(MINT, Reply(201, minted(self.github, repository_selection="all")))
        setup = (
            "import hashlib, socket\ng.LAST = 0.3\nreal = g.taken_back\ndef silent(*a, **k):\n"
            f" open({str(self.home / 'asked')!r}, 'w').close()\n"
            " hashlib.pbkdf2_hmac('sha256', b'', b'', 10**9)\n"
            "def taken(*a):\n socket.getaddrinfo = silent\n return real(*a)\n"
            "g.taken_back = taken\n"
        )
        run = self.mint(setup)
        while not (self.home / "asked").exists():
            time.sleep(0.01)
        self.assertIn("it may live on", self.stopped(run).err)


if __name__ == "__main__":
    unittest.main()
