"""Tokens of an App's installation: real openssl, a fake GitHub on loopback."""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
import ssl
import stat
import sys
import time
import unittest
from datetime import datetime
from typing import Any

import github_app_token as g
from tests.fakes.github import GitHub
from tests.fakes.github import Reply
from tests.fakes.github import error
from tests.token_case import FOUND
from tests.token_case import FULL
from tests.token_case import MINT
from tests.token_case import NO_PAUSE
from tests.token_case import Case
from tests.token_case import minted
from tests.token_case import openssl


class InstallationTest(Case):
    def test_a_token_for_one_repository(self) -> None:
        token = self.passes(self.token())
        self.assertIn(token, self.github.tokens)
        self.assertEqual(self.github.paths(), [FOUND, MINT])
        rights = {"contents": "write", "issues": "write", "pull_requests": "write"}
        self.assertEqual(
            self.github.seen[1].body, {"repositories": ["widgets"], "permissions": rights}
        )
        self.assertEqual(stat.S_IMODE(self.cache.stat().st_mode), 0o700)
        for path in self.cache.iterdir():
            self.assertEqual(stat.S_IMODE(path.stat().st_mode), 0o600, path)
        self.assertEqual(self.passes(self.token()), token, "it is cached")
        self.assertEqual(len(self.github.seen), 2)
        data = json.loads(self.passes(self.token("--format", "json")))
        self.assertEqual(
            (data["token"], data["cached"], data["type"]), (token, True, "installation")
        )
        self.assertEqual(data["repositories"], [{"id": 11, "full_name": "octo/widgets"}])
        self.assertRegex(data["expires_at"], r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ$")

    def test_the_jwt_is_rs256_of_openssl(self) -> None:
        self.token()
        jwt = self.github.seen[0].authorization.partition(" ")[2]
        data, _, signature = jwt.rpartition(".")
        signed = self.write("signature", base64.urlsafe_b64decode(signature + "=="))
        public = self.write("public.pem", openssl("rsa", "-in", str(self.key), "-pubout"))
        verify = ("-verify", str(public), "-signature", str(signed))
        said = openssl("dgst", "-sha256", *verify, data=data.encode())
        self.assertIn(b"Verified OK", said)
        claims = json.loads(base64.urlsafe_b64decode(data.split(".")[1] + "=="))
        self.assertEqual(claims["exp"] - claims["iat"], 360)
        self.assertEqual(claims["iss"], "Iv23liEXAMPLE")

    def test_scope_is_mandatory(self) -> None:
        self.fails(self.run_it("token", "--key", str(self.key)), g.USAGE, "--permissions")
        self.fails(self.token("--permissions", "contents:all"), g.USAGE, "contents:all")
        self.fails(self.token("--repo", ""), g.USAGE, "--repo")
        self.assertEqual(self.github.seen, [])

    def test_what_is_wider_than_asked_is_revoked_and_refused(self) -> None:
        both = [{"id": 11, "full_name": "octo/widgets"}, {"id": 12, "full_name": "octo/other"}]
        for word, change in (
            ("octo/other, octo/widgets", {"repositories": both}),
            ("workflows:write", {"permissions": {**g.PRESETS["dev"], "workflows": "write"}}),
        ):  # fmt: skip
            wide = minted(self.github, **change)
            self.github.on(MINT, Reply(201, wide))
            self.fails(self.token(), g.MEND, word, "it is revoked")
            self.assertEqual(self.github.paths()[-1], "/api/v3/installation/token")
            self.assertNotIn(wide["token"], self.github.tokens)
        self.github.on("/api/v3/installation/token", error(502, ""), error(401, "Bad credentials"))
        self.fails(self.token(setup=NO_PAUSE), g.MEND, "it is revoked")  # by the first try
        self.github.on("/api/v3/installation/token", error(403, "no"))
        self.fails(self.token(), g.MEND, "GitHub did not revoke it: it lives on")
        self.assertEqual(list(self.cache.glob("installation-*.json")), [])

    def test_why_there_is_none(self) -> None:
        for status, word, path, reply in (
            (g.MEND, "SHA256:", FOUND, error(401, "A JSON web token could not be decoded")),
            (g.MEND, "set the clock", FOUND, error(401, "'Issued at' claim ('iat') must be …")),
            (g.MEND, "the App's numeric id (or the client id)", FOUND,
             error(401, "'Issuer' claim ('iss') must be an Integer")),
            (g.MEND, "among the keys", FOUND, error(401, "a claim of another kind")),
            (g.MEND, "SSO", FOUND, error(403, "Resource protected", X_GitHub_SSO="required")),
            (g.MEND, "suspended", MINT, error(403, "This installation has been suspended")),
            (g.LATER, "503", FOUND, error(503, "")),
            (g.LATER, "3600 s", FOUND, error(429, "slow", Retry_After="3600")),
            (g.LATER, "60 s", FOUND, error(403, "You have exceeded a secondary rate limit")),
            (g.LATER, "captive portal", FOUND, Reply(200, b"<html>log in to the hotel</html>")),
            (g.LATER, "portal.example", FOUND, Reply(302, {}, (("Location", "http://portal.example/x?y"),))),
            (g.LATER, "redirects to [", FOUND, Reply(302, {}, (("Location", "http://["),))),
            (g.LATER, "redirects to /api/v3/x", MINT, Reply(307, {}, (("Location", "/api/v3/x"),))),
            (g.FAILED, "418", FOUND, error(418, "teapot")),
        ):  # fmt: skip
            with self.subTest(word):
                self.github.replies.clear()
                self.github.on(path, reply)
                self.fails(self.token(setup=NO_PAUSE), status, word)
        self.assertEqual(self.github.tokens, {})

    def test_an_app_that_github_does_not_know(self) -> None:
        """Fault 34: an id of none is not an App that has to be installed."""
        self.github.on(".*", error(404, "Integration not found"))
        words = ("Iv23liEXAMPLE is not known to GitHub", "--app-id")
        done = self.token()
        self.fails(done, g.MEND, *words)
        self.assertNotIn("nstall", done.err)
        done = self.run_it("status", "--key", str(self.key), "--permissions", "dev")
        self.assertEqual(done.status, g.MEND)
        for word in words:
            self.assertIn(word, done.out)

    def test_not_installed_and_suspended(self) -> None:
        self.fails(self.token("--repo", "octo/other"), g.MEND, "not installed", "Install App")
        self.github.suspended = True
        self.fails(self.token(), g.MEND, "suspended")
        self.assertNotIn("POST", [x.method for x in self.github.seen])

    def test_permissions_that_the_app_lacks(self) -> None:
        done = self.token("--permissions", "dev,workflows:write")
        self.fails(done, g.MEND, "workflows:write", "accept")

    def test_a_server_that_is_down_for_a_moment(self) -> None:
        good = Reply(201, minted(self.github))
        self.github.on(MINT, error(502, ""), error(503, ""), good)
        self.passes(self.token(setup=NO_PAUSE))
        self.assertEqual(len(self.github.paths("POST")), 3)

    def test_clocks(self) -> None:
        for ahead in (-3600.0, 30.0, 3600.0):
            with self.subTest(ahead):
                self.github.clock = ahead
                shutil.rmtree(self.cache, ignore_errors=True)
                done = self.token("--format", "json")
                data = json.loads(self.passes(done))
                self.assertEqual("clock is off" in done.err, abs(ahead) > 300)
                again = json.loads(self.passes(self.token("--format", "json")))
                self.assertTrue(again["cached"])
                # The time that is printed is by this machine's clock: its readers compare with that.
                ends = datetime.fromisoformat(data["expires_at"].replace("Z", "+00:00"))
                self.assertAlmostEqual(ends.timestamp() - time.time(), 3600, delta=20)

    def test_a_clock_that_is_set_right(self) -> None:
        """What was cached before is judged by GitHub's Date: dead or alive, whatever we believed."""
        for ahead in (-1800.0, -400.0, 1800.0):
            with self.subTest(ahead):
                self.github.clock = ahead
                shutil.rmtree(self.cache, ignore_errors=True)
                first = self.passes(self.token())
                self.github.clock = 0
                (path,) = self.cache.glob("installation-*.json")
                value = json.loads(path.read_text())
                for left, alive in ((600, True), (-60, False)):
                    path.write_text(json.dumps({**value, "expires_at": time.time() + left}))
                    data = json.loads(self.passes(self.token("--format", "json")))
                    self.assertEqual(data["token"] == first, alive)
                    ends = datetime.fromisoformat(data["expires_at"].replace("Z", "+00:00"))
                    self.assertAlmostEqual(
                        ends.timestamp() - time.time(), left if alive else 3600, delta=20
                    )

    def test_when_a_rate_limit_ends(self) -> None:
        """By GitHub's clock; nothing waits for it."""
        self.github.clock = -5000
        reset = str(int(self.github.now()) + 1200)
        spent = {"X_RateLimit_Remaining": "0", "X_RateLimit_Reset": reset}
        began = time.monotonic()
        self.github.on(FOUND, error(403, "API rate limit exceeded", **spent))
        done = self.token()
        self.fails(done, g.LATER)
        self.assertRegex(done.err, "try again in (1200|119[0-9]) s")
        date = "Wed, 21 Oct 2026 07:28:00 GMT"  # as RFC 9110 allows it (fault 36)
        self.github.on(FOUND, error(429, "slow", Retry_After=date))
        self.fails(self.token(), g.LATER, f"try again at {date}, or later")
        self.github.on(FOUND, error(403, "secondary rate limit", X_RateLimit_Reset=reset))
        self.fails(self.token(), g.LATER, "try again in 60 s")
        self.assertLess(time.monotonic() - began, 5)

    def test_a_token_must_live_long_enough(self) -> None:
        first = self.passes(self.token())
        self.expire()  # in 100 seconds
        self.assertNotEqual(self.passes(self.token()), first)

    def test_a_token_that_was_refused_is_not_given_again(self) -> None:
        first = self.passes(self.token())
        dead = hashlib.sha256(first.encode()).hexdigest()
        self.assertNotEqual(self.passes(self.token(GITHUB_TOKEN_REFUSED=dead.upper())), first)

    def test_answers_of_another_form(self) -> None:
        """Whatever GitHub, or what stands in its place, makes of them: a line, and no traceback."""
        installation = {"id": 7, "permissions": {}, "html_url": "x"}
        odd: list[Any] = [b"null", "x", {"id": None}, {"id": "x"}, {**installation, "id": 1e400},
                          {**installation, "suspended_at": 1}, [[]] * 1000]  # fmt: skip
        for value in odd:
            with self.subTest(installation=str(value)[:50]):
                self.github.on(FOUND, Reply(200, value))
                self.assertIn(self.token().status, (g.FAILED, g.MEND))
        self.github.on(FOUND, Reply(200, {**installation, "permissions": 7}))
        status = ("status", "--key", str(self.key), "--permissions", "dev")
        self.assertEqual(self.run_it(*status).status, g.FAILED)
        self.github.replies.clear()
        self.github.on(MINT, Reply(201, minted(self.github, token=None)))
        self.fails(self.token(), g.FAILED, "no usable token")


class PinTest(Case):
    """A repository's name means what it meant when it was first used."""

    def test_a_renamed_repository(self) -> None:
        """GitHub leads from the old name to the number: nobody follows, and it is said."""
        self.passes(self.token())
        self.expire()
        self.github.repos = {"octo/gadgets": 11}
        self.github.renamed = {"octo/widgets": "octo/gadgets"}
        before = len(self.github.seen)
        self.fails(self.token(), g.MEND, "GitHub calls this repository octo/gadgets now",
                   "--repo octo/gadgets")  # fmt: skip
        self.assertEqual(len(self.github.seen), before + 2)
        self.passes(self.token("--repo", "octo/gadgets"))

    def test_another_repository_under_the_old_name(self) -> None:
        self.passes(self.token())
        self.expire()
        self.github.repos = {"octo/gadgets": 11, "octo/widgets": 99}
        self.github.selected = {11, 99}
        self.fails(self.token(), g.MEND, "another repository", "octo/gadgets", "--accept-new-repo")
        self.assertEqual(self.github.seen[-1].method, "DELETE")
        self.assertEqual(self.github.seen[-2].body["repository_ids"], [11])
        self.passes(self.token("--accept-new-repo"))
        data = json.loads(self.passes(self.token("--format", "json")))
        self.assertEqual(data["repositories"][0]["id"], 99)

    def test_what_is_known_but_damaged_is_not_forgotten(self) -> None:
        self.passes(self.token())
        self.expire()
        (pin,) = self.cache.glob("repository-*.json")
        for spoil in (
            "", "[]", '{"id": "11"}', '{"id": true}', '{"id": 0}', "[" * 50_000,
            '{"id": 1' + "0" * 18 + "}",
        ):  # fmt: skip
            pin.write_text(spoil)
            self.fails(self.token(), g.MEND, str(pin), "--accept-new-repo")
        pin.chmod(0o644)
        self.fails(self.token(), g.MEND, str(pin))
        pin.unlink()
        pin.symlink_to("/nonexistent/pin")
        self.fails(self.token(), g.MEND, str(pin))
        pin.unlink()
        pin.mkdir()
        self.fails(self.token(), g.MEND, str(pin))
        pin.rmdir()
        setup = (
            "real = os.open\n"
            "def no(path, *a, **k):\n"
            " if 'repository-' in str(path): raise PermissionError(13, 'Permission denied')\n"
            " return real(path, *a, **k)\nos.open = no\n"
        )
        done = self.token(setup=setup)
        self.fails(done, g.MEND, "cannot read", "Permission denied")
        self.assertNotIn("--accept-new-repo", done.err, "it says nothing about the repository")
        self.passes(self.token("--accept-new-repo"))
        self.expire()
        self.passes(self.token())


class NetworkTest(Case):
    def test_no_network(self) -> None:
        for address, word in (
            ("http://127.0.0.1:9", "127.0.0.1:9"),
            ("ghe.invalid", "ghe.invalid"),
        ):
            self.fails(self.token("--api-url", address, setup=NO_PAUSE), g.LATER, word)
        self.fails(self.token("--api-url", "http://github.com"), g.USAGE, "https")
        self.fails(
            self.token("--api-url", "ghe.invalid", "--ca-file", "/nonexistent"),
            g.MEND, "/nonexistent",
        )  # fmt: skip

    def test_no_redirect_takes_the_jwt_elsewhere(self) -> None:
        with GitHub() as elsewhere:
            target = f"{elsewhere.url}/api/v3/repos/octo/widgets/installation"
            self.github.on(FOUND, Reply(301, {}, (("Location", target),)))
            self.fails(self.token(), g.LATER, f"redirects to localhost:{elsewhere.server_port}")
            self.assertEqual(elsewhere.seen, [])

    def test_answers_that_do_not_end_well(self) -> None:
        quick = NO_PAUSE + "g.REPLY_SECONDS = 0.3\n"
        for status, word, reply in (
            (g.LATER, "too slow", Reply(200, {"id": 7}, (), "slow")),
            (g.LATER, "sent no JSON", Reply(200, {"id": 7}, (), "cut")),
            (g.LATER, "sent no JSON", Reply(200, {"id": "x" * 1_100_000})),
        ):  # fmt: skip
            with self.subTest(word):
                self.github.on(FOUND, reply)
                self.fails(self.token(setup=quick), status, word)

    def test_tls(self) -> None:
        certificate = self.home / "cert.pem"
        openssl("req", "-x509", "-new", "-key", str(self.key), "-days", "2", "-out", str(certificate),
                "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost")  # fmt: skip
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate, self.key)
        nowhere = "http://user:pr0xy-secret@127.0.0.1:9"
        keys = self.home / "keys.log"
        with GitHub(context) as secure:
            self.profile(api_url=secure.url)
            began = time.monotonic()
            self.fails(self.token(setup="g.PAUSE = 9\n"), g.MEND, "--ca-file", "signed certificate")
            self.assertLess(time.monotonic() - began, 9, "it is not tried again")
            self.assertEqual(secure.seen, [])
            self.profile(api_url=secure.url, ca_file="~/cert.pem")  # as for `key` (fault 38)
            listed = {"NO_PROXY": "localhost", "SSLKEYLOGFILE": str(keys)}
            self.passes(self.token(HTTPS_PROXY=nowhere, **listed))
            self.assertFalse(keys.exists(), "who reads it reads the token")
            self.expire()
            done = self.token(setup=NO_PAUSE, HTTPS_PROXY=nowhere)
            self.fails(done, g.LATER)
            self.assertNotIn("pr0xy-secret", done.err)
            for mistyped in ("http:/u:pr0xy-secret@p:3128", "http://u:pr0xy-secret/x@127.0.0.1:9"):
                done = self.token(setup=NO_PAUSE, HTTPS_PROXY=mistyped)
                self.fails(done, g.LATER, "cannot reach")
                self.assertNotIn("pr0xy", done.err)

    def test_a_companys_ca_that_python_is_too_strict_for(self) -> None:
        """Its certificates lack what RFC 5280 wants of them, as many do."""
        ca, signed = str(self.home / "ca.pem"), str(self.home / "signed.pem")
        for name, subject, issuer, extension in (
            (ca, "/CN=company", (), "basicConstraints=CA:TRUE"),
            (signed, "/CN=localhost", ("-CA", ca, "-CAkey", str(self.key)),
             "subjectAltName=DNS:localhost"),
        ):  # fmt: skip
            text = f"[req]\ndistinguished_name=n\n[n]\n[x]\n{extension}\n".encode()
            config = str(self.write("x.cnf", text))
            asked = str(self.home / "asked.pem")
            openssl("req", "-new", "-key", str(self.key), "-subj", subject, "-config", config,
                    "-out", asked)  # fmt: skip
            by = issuer or ("-signkey", str(self.key))
            openssl("x509", "-req", "-in", asked, "-days", "2", "-set_serial", "7", *by,
                    "-extfile", config, "-extensions", "x", "-out", name)  # fmt: skip
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(signed, self.key)
        with GitHub(context) as secure:
            self.profile(api_url=secure.url)
            done = self.token(SSL_CERT_FILE=ca)
            if sys.version_info >= (3, 13):
                self.fails(done, g.MEND, "Missing Authority Key Identifier", "--ca-file")
            else:
                self.passes(done)
                self.expire()
            self.profile(api_url=secure.url, ca_file=ca)
            self.passes(self.token())
            self.expire()
            self.profile(api_url=secure.url.replace("localhost", "127.0.0.1"), ca_file=ca)
            self.fails(self.token(), g.MEND, "certificate is not valid for '127.0.0.1'")

    def test_a_proxy_that_wants_a_login(self) -> None:
        asked: list[bytes] = []
        refusal = b"HTTP/1.1 407 Proxy Authentication Required\r\nContent-Length: 0\r\n\r\n"
        with listening(asked, refusal) as port:
            proxy = f"http://user:pr0xy-secret@127.0.0.1:{port}"
            done = self.token("--api-url", "ghe.invalid", HTTPS_PROXY=proxy)
        self.fails(done, g.MEND, "407 Proxy Authentication Required", "user and password")
        self.assertNotIn("pr0xy-secret", done.err)
        self.assertEqual(len(asked), 1, "it is not tried again")

    def test_through_a_proxy(self) -> None:
        """CONNECT, with the proxy's password for the proxy alone."""
        asked: list[bytes] = []
        with listening(asked) as port:
            proxy = f"http://user:word@127.0.0.1:{port}"
            self.token("--api-url", "ghe.invalid", setup=NO_PAUSE, HTTPS_PROXY=proxy)
        self.assertTrue(asked[0].startswith(b"CONNECT ghe.invalid:443 "), asked[0])
        login = base64.b64encode(b"user:word")
        self.assertIn(b"Proxy-Authorization: Basic " + login, asked[0].replace(b"\r", b""))
        self.assertNotIn(b"Bearer", asked[0])


class NotStoredTest(Case):
    def test_a_folder_that_cannot_be_used_costs_the_cache_only(self) -> None:
        self.cache.mkdir(parents=True)
        self.cache.chmod(0o755)
        done = self.token()
        self.passes(done)
        self.assertIn("is not yours alone: not cached, so nobody has it but who", done.err)
        self.assertEqual(list(self.cache.iterdir()), [])

    def test_a_full_disk_costs_the_cache_only(self) -> None:
        done = self.token(setup=FULL)
        self.assertIn(self.passes(done), self.github.tokens)
        self.assertIn("No space left on device: not cached", done.err)

    def test_neither_stored_nor_printed_it_is_revoked(self) -> None:
        """Ctrl-C, and a disk that is full."""
        signalled = FULL.replace("raise", "os.kill(os.getpid(), 2); raise")
        done = self.token(setup=signalled)
        self.assertEqual((done.status, done.out), (130, ""))
        self.assertEqual(self.github.tokens, {})


def listening(asked: list[bytes], answer: bytes = b"") -> Any:
    """A server that keeps what it is asked, says `answer` and hangs up; it gives its port."""
    import contextlib
    import socket
    import threading

    @contextlib.contextmanager
    def server() -> Any:
        listener = socket.create_server(("127.0.0.1", 0))

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    client, _ = listener.accept()
                    asked.append(client.recv(65536))
                    client.sendall(answer)
                    client.close()

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            listener.close()
            thread.join()

    return server()


if __name__ == "__main__":
    unittest.main()
