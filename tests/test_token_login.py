"""A user's token: the device flow, what it is checked for, its refresh, its end."""

from __future__ import annotations

import hashlib
import signal
import time
import unittest

import github_app_token as g
from tests.fakes.github import Reply
from tests.fakes.github import error
from tests.token_case import FULL
from tests.token_case import NO_PAUSE
from tests.token_case import POLL
from tests.token_case import REVOKE
from tests.token_case import LoginCase

INSTALLATIONS = "/api/v3/user/installations"


class LoginTest(LoginCase):
    def test_a_login(self) -> None:
        self.github.pending = 2
        done = self.login()
        self.assertEqual((done.status, done.out), (0, ""), done.err)
        self.assertIn("ABCD-1234", done.err)
        self.assertEqual(done.err.count("sleep 6.0"), 3)
        polls = [x.body for x in self.github.seen if x.path == POLL]
        self.assertEqual(polls[0]["repository_id"], "11")
        token = self.passes(self.run_it("token"))
        self.assertTrue(token.startswith("ghu_"))
        self.assertNotIn(token, done.err)
        self.assertEqual(self.passes(self.run_it("token")), token)

    def test_slow_down(self) -> None:
        slow = {"error": "slow_down"}
        grant = self.github.login(POLL, {"grant_type": ""})
        self.github.on(POLL, Reply(200, slow), Reply(200, slow), grant)
        said = self.login().err
        for seconds in ("6.0", "12.0", "18.0"):
            self.assertIn(f"sleep {seconds}\n", said)

    def test_answers_that_end_it(self) -> None:
        for name, status in (
            ("access_denied", g.LOGIN),
            ("expired_token", g.LOGIN),
            ("device_flow_disabled", g.MEND),
        ):  # fmt: skip
            with self.subTest(name):
                before = self.github.paths().count(POLL)
                self.github.on(POLL, Reply(200, {"error": name, "error_description": "because"}))
                self.assertEqual(self.login().status, status)
                self.assertEqual(self.github.paths().count(POLL), before + 1)
                self.assertTrue(self.logged_out())

    def test_a_code_that_nobody_enters(self) -> None:
        self.github.pending = 1000
        setup = (
            "t = [0.0]\ng.time.monotonic = lambda: t[0]\n"
            "def sleep(s): t[0] += s + 200\ng.time.sleep = sleep\n"
        )
        done = self.run_it("login", setup=setup)
        self.assertEqual(done.status, g.LOGIN, done.err)
        self.assertIn("expired", done.err)

    def test_what_cannot_be_limited_is_refused_and_revoked(self) -> None:
        for scope in ({11, 12}, {12}, set()):
            self.github.device_scope = scope
            done = self.login()
            self.assertEqual(done.status, g.MEND)
            self.assertIn(f"reaches {len(scope)} repositories", done.err)
            self.assertIn("it is revoked", done.err)
            self.assertEqual((self.github.tokens, self.github.refresh_tokens), ({}, set()))
        self.github.device_scope = {11}
        grant = self.github.login(POLL, {"grant_type": ""}).value
        del grant["expires_in"]
        self.github.on(POLL, Reply(200, grant))
        done = self.login()
        self.assertEqual((done.status, self.github.tokens), (g.MEND, {}), done.err)
        self.github.on(REVOKE, error(404, "Not Found"))
        self.assertIn("did not revoke it", self.login().err)
        self.assertTrue(self.logged_out())

    def test_more_than_one_page_is_too_much(self) -> None:
        many = {"total_count": 101, "installations": [{"id": 7}]}
        self.github.on(INSTALLATIONS, Reply(200, many))
        self.assertEqual(self.login().status, g.MEND)
        self.github.replies.clear()
        page = {"total_count": 2, "repositories": [{"id": 11, "full_name": "octo/widgets"}]}
        self.github.on(f"{INSTALLATIONS}/7/repositories", Reply(200, page))
        self.assertEqual(self.login().status, g.MEND)
        self.assertEqual(self.github.tokens, {})

    def test_a_code_for_another_site_is_not_shown(self) -> None:
        data = {**self.github.login("/login/device/code", {}).value, "user_code": "EVIL-1234"}
        for change, word in (
            ({"verification_uri": "https://evil.example/x"}, "evil.example"),
            ({"interval": -1}, "not as documented"),
            ({"expires_in": None}, "not as documented"),
        ):  # fmt: skip
            self.github.on("/login/device/code", Reply(200, {**data, **change}))
            done = self.run_it("login")
            self.assertIn(done.status, (g.FAILED, g.LATER))
            self.assertIn(word, done.err)
            self.assertEqual("EVIL-1234" in done.err, "interval" in change)
        self.assertTrue(self.logged_out())

    def test_a_private_repository_needs_its_id(self) -> None:
        self.github.public = False
        self.fails(self.login(), g.USAGE, "--repo-id")
        self.assertEqual(self.login("--repo-id", "11").status, 0)
        self.fails(self.login("--repo-id", "11", "--app-id", "1234"), g.MEND, "client id")

    def test_a_renamed_repository(self) -> None:
        self.github.repos = {"octo/gadgets": 11}
        self.github.renamed = {"octo/widgets": "octo/gadgets"}
        self.fails(self.login(), g.MEND, "GitHub calls this repository octo/gadgets now")
        done = self.login("--repo-id", "11")
        self.assertEqual(done.status, g.MEND)
        self.assertIn("--repo octo/gadgets", done.err)
        self.assertEqual(self.github.tokens, {})

    def test_nothing_but_login_starts_a_device_flow(self) -> None:
        self.fails(self.run_it("token"), g.LOGIN, "login --repo octo/widgets")
        asked = f"protocol=http\nhost=localhost:{self.github.server_port}\npath=octo/widgets\n\n"
        done = self.run_it("git-credential", "get", data=asked.encode())
        self.assertEqual((done.status, done.out), (g.LOGIN, "quit=1\n"))
        self.assertEqual(self.run_it("status").status, g.LOGIN)
        self.assertEqual(self.github.seen, [])

    def test_permissions_are_not_ignored_by_a_login(self) -> None:
        self.fails(self.login("--permissions", "read"), g.USAGE, "only with --key")
        both = ("--permissions", "read", "--key", str(self.key))
        self.fails(self.login(*both), g.USAGE, "only with --key")
        self.fails(self.run_it("token", "--permissions", "read"), g.USAGE, "only with --key")

    def test_a_login_that_cannot_be_checked_does_not_live_on(self) -> None:
        for path, reply in (
            (INSTALLATIONS, Reply(200, {"installations": [7]})),
            (INSTALLATIONS, error(500, "")),
            ("/api/v3/user", Reply(200, b"<html>")),
        ):  # fmt: skip
            self.github.replies.clear()
            self.github.on(path, reply)
            done = self.login(setup=NO_PAUSE)
            self.assertNotEqual(done.status, 0)
            self.assertEqual(self.github.tokens, {}, (path, done.err))
            self.assertTrue(self.logged_out())

    def test_a_login_that_cannot_be_stored_does_not_live_on(self) -> None:
        done = self.login("--repo-id", "11", setup=FULL)
        self.assertEqual(done.status, g.MEND)
        self.assertIn("No space left on device", done.err)
        self.assertIn("it is revoked", done.err)
        self.assertEqual(self.github.tokens, {})

    def test_a_new_login_ends_the_one_before(self) -> None:
        self.assertEqual(self.login().status, 0)
        before = self.stored()["token"]
        self.assertEqual(self.login().status, 0)
        self.assertNotIn(before, self.github.tokens)
        self.assertIn(self.passes(self.run_it("token")), self.github.tokens)

    def test_the_one_before_cannot_be_revoked(self) -> None:
        """The new one is stored all the same, and it is said that the old one lives on."""
        for reply in (error(429, "slow"), error(404, "Not Found")):
            self.login("--repo-id", "11")
            before = self.stored()["token"]
            self.github.on(REVOKE, reply)
            done = self.login(setup=NO_PAUSE)
            self.assertEqual(done.status, 0, done.err)
            self.assertIn("did not revoke the login before", done.err)
            given = self.passes(self.run_it("token"))
            self.assertNotEqual(given, before)
            self.assertIn(given, self.github.tokens)
            self.github.replies.clear()

    def test_the_one_before_is_not_given_out_when_the_new_one_cannot_be_stored(self) -> None:
        self.login()
        before = self.stored()["token"]
        self.fails_login(FULL, "No space left on device")
        self.assertIn(before, self.github.tokens, "noticed before anything was revoked")
        second = (
            "replace = os.replace\ncount = [0]\ndef full(*a):\n count[0] += 1\n"
            " if count[0] == 2: raise OSError(28, 'No space left on device')\n return replace(*a)\n"
            "os.replace = full\n"
        )
        self.fails_login(second, "No space left on device")
        self.assertTrue(self.stored()["withheld"])
        done = self.run_it("token")
        self.assertEqual((done.status, done.out), (g.LOGIN, ""))

    def fails_login(self, setup: str, word: str) -> None:
        done = self.login("--repo-id", "11", setup=setup)
        self.assertEqual(done.status, g.MEND, done.err)
        self.assertIn(word, done.err)
        self.assertIn("it is revoked", done.err)


class LoginIsForOneTest(LoginCase):
    """A login is for the repository that it was made for, and for no other by the same name."""

    def test_another_id_is_asked_for(self) -> None:
        self.login()
        self.fails(self.run_it("token", "--repo-id", "99"), g.MEND, "the login is for")
        self.fails(self.run_it("token", "--accept-new-repo"), g.MEND, "the login is for")
        self.passes(self.run_it("token", "--repo-id", "11"))

    def test_an_id_of_another_name(self) -> None:
        self.github.device_scope = {12}
        done = self.login("--repo-id", "12")
        self.assertEqual(done.status, g.MEND, done.err)
        self.assertIn("octo/other", done.err)
        self.assertEqual(self.github.tokens, {})
        self.assertTrue(self.logged_out())


class RefreshTest(LoginCase):
    def test_a_login_from_when_the_clock_was_wrong(self) -> None:
        """It was ahead by half an hour: when it has been set, the token is no longer alive."""
        self.github.clock = -1800
        self.login()
        first = self.passes(self.run_it("token"))
        self.github.clock = 0
        self.store(expires_at=time.time() - 1)
        self.github.tokens.clear()
        self.assertNotEqual(self.passes(self.run_it("token")), first)

    def test_status_after_the_clock_was_set_right(self) -> None:
        """Fault 36: what is over can be refreshed; what is not, and yet refused, cannot."""
        for ahead, left, status, word in (
            (-7200, -600, 0, "hubot"), (7200, 3000, g.LOGIN, "does not accept"),
        ):  # fmt: skip
            self.github.clock = ahead
            self.login()
            self.github.clock = 0
            self.store(expires_at=time.time() + left)
            self.github.tokens.clear()
            done = self.run_it("status")
            self.assertEqual(done.status, status, done.out)
            self.assertIn(word, done.out)

    def old_login(self, seconds: float = -1) -> None:
        """A login whose token lives for so many seconds."""
        self.login()
        self.store(expires_at=time.time() + seconds)

    def test_ten_at_once_refresh_once(self) -> None:
        self.old_login(10)
        children = [self.start("token") for _ in range(10)]
        tokens = {self.passes(child.wait()) for child in children}
        self.assertEqual(len(tokens), 1)
        grants = [x.body["grant_type"] for x in self.github.seen if x.path == POLL]
        self.assertEqual(grants.count("refresh_token"), 1)

    def test_refreshes_that_fail(self) -> None:
        self.old_login(100)
        self.github.on(POLL, error(500, ""))
        self.fails(self.run_it("token"), g.LATER, "500")
        self.assertEqual(self.github.paths().count(POLL), 2, "a refresh is not tried again")
        self.github.replies.clear()
        token = self.passes(self.run_it("token"))
        refused = hashlib.sha256(token.encode()).hexdigest()
        self.assertNotEqual(self.passes(self.run_it("token", GITHUB_TOKEN_REFUSED=refused)), token)
        self.store(expires_at=time.time() - 100)
        self.github.on(POLL, Reply(200, {"error": "bad_refresh_token"}))
        self.fails(self.run_it("token"), g.LOGIN, "login")
        self.assertTrue(self.logged_out())

    def test_only_a_refresh_token_that_github_does_not_know_ends_the_login(self) -> None:
        self.old_login()
        self.github.on(POLL, Reply(200, {"error": "server_error"}))
        self.fails(self.run_it("token"), g.MEND, "server_error")
        self.github.replies.clear()
        self.assertIn(self.passes(self.run_it("token")), self.github.tokens)

    def test_the_repository_has_another_name_by_now(self) -> None:
        """Its number is the same; but what has the old name now is not what the token reaches."""
        self.old_login()
        self.github.repos = {"octo/gadgets": 11, "octo/widgets": 99}
        self.fails(self.run_it("token"), g.MEND, "calls this one octo/gadgets", "it is revoked")
        self.assertEqual(self.github.tokens, {})

    def test_a_refresh_that_was_killed_is_recognised(self) -> None:
        self.old_login()
        kill = "def killed(*a): os.kill(os.getpid(), 9)\ng.parse_login_token = killed\n"
        self.assertEqual(self.run_it("token", setup=kill).status, -signal.SIGKILL)
        self.fails(self.run_it("token"), g.LOGIN, "does not know the login any more")
        self.assertTrue(self.logged_out())

    def test_a_refreshed_token_is_not_given_out_before_its_scope_is_checked(self) -> None:
        self.old_login()
        self.github.on(INSTALLATIONS, error(404, "Not Found"))
        for _ in range(2):
            done = self.run_it("token")
            self.assertEqual((done.status, done.out), (g.FAILED, ""))
        self.github.on(POLL, error(502, ""))
        done = self.run_it("token")
        self.assertEqual((done.status, done.out), (g.LATER, ""))
        self.github.replies.clear()
        self.assertIn(self.passes(self.run_it("token")), self.github.tokens)
        self.github.device_scope = {11, 12}
        self.store(expires_at=time.time() - 1)
        self.fails(self.run_it("token"), g.MEND, "reaches 2 repositories", "it is revoked")
        self.assertEqual(self.github.tokens, {})
        self.fails(self.run_it("token"), g.LOGIN, "does not know the login any more")

    def test_without_a_place_to_store_it_no_refresh_is_begun(self) -> None:
        self.old_login()
        before = len(self.github.seen)
        self.fails(self.run_it("token", setup=FULL), g.MEND, "No space")
        self.assertEqual(len(self.github.seen), before)

    def test_a_refresh_that_cannot_be_stored_does_not_live_on(self) -> None:
        self.old_login()
        setup = (
            "replace = os.replace\ncount = [0]\ndef full(*a):\n count[0] += 1\n"
            " if count[0] == 2: raise OSError(28, 'No space left on device')\n return replace(*a)\n"
            "os.replace = full\n"
        )
        self.fails(self.run_it("token", setup=setup), g.MEND, "it is revoked")
        self.assertEqual((self.github.tokens, self.github.refresh_tokens), ({}, set()))

    def test_git_was_refused_with_it(self) -> None:
        self.login()
        token = self.passes(self.run_it("token"))
        host = self.github.url.partition("//")[2]
        asked = f"protocol=http\nhost={host}\npath=octo/widgets.git\n"
        given = f"{asked}username=x\npassword={token}\n".encode()
        self.assertEqual(self.run_it("git-credential", "erase", data=given).status, 0)
        self.assertNotEqual(self.passes(self.run_it("token")), token)

    def test_git_was_refused_with_it_while_it_is_refreshed(self) -> None:
        """What git knows of the one before does not touch the new one (a slow disk shows it)."""
        self.old_login(10)
        before = self.stored()["token"]
        grant = self.github.login(POLL, {"grant_type": ""})
        self.github.on(POLL, grant._replace(then="hang"))
        refresh = self.start("token")
        self.assertTrue(self.github.hangs.wait(20))
        host = self.github.url.partition("//")[2]
        given = f"protocol=http\nhost={host}\npath=octo/widgets.git\npassword={before}\n"
        slow = "real = g.Cache.withhold\ndef slow(*a): g.time.sleep(1); real(*a)\n"
        slow += "g.Cache.withhold = slow\n"
        erase = self.start("git-credential", "erase", data=given.encode(), setup=slow)
        time.sleep(0.3)
        self.github.go.set()
        token = self.passes(refresh.wait())
        self.assertEqual(erase.wait().status, 0)
        self.assertEqual((self.stored()["token"], self.stored()["withheld"]), (token, False))


class LogoutTest(LoginCase):
    def test_logout(self) -> None:
        self.login()
        token, refresh = self.stored()["token"], self.stored()["refresh_token"]
        self.github.on(REVOKE, error(503, ""))
        self.assertEqual(self.run_it("logout", setup=NO_PAUSE).status, g.LATER)
        self.assertFalse(self.logged_out(), "it is to be done again")
        self.github.replies.clear()
        self.assertEqual(self.run_it("logout").status, 0)
        self.assertEqual(self.github.seen[-1].body, {"credentials": [token, refresh]})
        self.assertTrue(self.logged_out())
        self.assertEqual(self.run_it("logout").status, 0)

    def test_a_login_of_an_earlier_version_can_be_ended(self) -> None:
        self.login()
        self.store(refresh_expires_at=1.0)
        self.passes(self.run_it("logout"))
        self.assertEqual((self.github.tokens, self.github.refresh_tokens), ({}, set()))

    def test_files_that_others_can_read_or_that_are_damaged(self) -> None:
        self.login()
        self.file().chmod(0o644)
        self.passes(self.run_it("logout"))
        self.assertEqual((self.github.tokens, self.github.refresh_tokens), ({}, set()))
        self.login()
        good = self.file().read_text()
        for text, mode, word in ((good, 0o622, "chmod go-rwx"), (good[:50], 0o600, "is damaged")):
            self.file().write_text(text)
            self.file().chmod(mode)
            self.fails(self.run_it("logout"), g.MEND, str(self.file()), word)
            self.assertIn(str(self.file()), self.run_it("status").out)

    def test_what_is_revoked_is_not_given_out_when_its_file_cannot_be_removed(self) -> None:
        self.login()
        stays = (
            "def no(path): raise PermissionError(13, 'Permission denied', path)\nos.unlink = no\n"
        )
        done = self.run_it("logout", setup=stays)
        self.assertNotEqual(done.status, 0)
        self.assertIn("Permission denied", done.err)
        self.assertEqual(self.github.tokens, {})
        done = self.run_it("token")
        self.assertEqual((done.status, done.out), (g.LOGIN, ""))

    def test_a_full_disk_keeps_no_token_alive(self) -> None:
        self.login()
        self.passes(self.run_it("logout", setup=FULL))
        self.assertEqual(self.github.tokens, {})

    def test_a_github_that_does_not_revoke(self) -> None:
        self.login()
        self.github.on(REVOKE, error(404, "Not Found"))
        self.fails(
            self.run_it("revoke"), g.FAILED, "did not revoke it", "settings/apps/authorizations"
        )
        self.assertTrue(self.logged_out())


if __name__ == "__main__":
    unittest.main()
