"""github_app_token.py as a process: real openssl, ssh-agent and git, a fake GitHub on loopback."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import pty
import shlex
import shutil
import signal
import ssl
import stat
import subprocess
import sys
import tempfile
import time
import unittest
from pathlib import Path
from typing import Any

import github_app_token as g
from tests.fakes import mcp_upstream
from tests.fakes.github import GitHub
from tests.fakes.github import Reply
from tests.fakes.github import error
from tests.support import ROOT
from tests.test_proxy_http import Client
from tests.test_proxy_http import Proxy
from tests.test_proxy_http import call
from tests.test_proxy_http import text_of

SCRIPT = ROOT / "github_app_token.py"
TIMEOUT = 30.0
PASSPHRASE = "correct-horse-battery"
BARE = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH") if name in os.environ}
KEYS: dict[str, bytes] = {}


def openssl(*argv: str, data: bytes = b"") -> bytes:
    if argv[:2] == ("rsa", "-traditional") and b"OpenSSL 3" not in openssl("version"):
        argv = ("rsa", *argv[2:])  # others know no other form
    return subprocess.run(["openssl", *argv], input=data, capture_output=True, check=True).stdout


def setUpModule() -> None:
    if not shutil.which("openssl"):
        raise unittest.SkipTest("openssl is not on PATH")
    KEYS["pkcs8"] = openssl("genpkey", "-algorithm", "RSA", "-pkeyopt", "rsa_keygen_bits:2048")
    KEYS["pkcs1"] = openssl("rsa", "-traditional", data=KEYS["pkcs8"])
    KEYS["encrypted"] = openssl(
        "pkcs8",
        "-topk8",
        "-v2",
        "aes-256-cbc",
        "-passout",
        f"pass:{PASSPHRASE}",
        data=KEYS["pkcs8"],
    )
    KEYS["encrypted pkcs1"] = openssl(
        "rsa", "-traditional", "-aes128", "-passout", f"pass:{PASSPHRASE}", data=KEYS["pkcs8"]
    )
    KEYS["public"] = openssl("rsa", "-pubout", data=KEYS["pkcs8"])
    KEYS["der"] = openssl("rsa", "-outform", "DER", data=KEYS["pkcs8"])
    KEYS["small"] = openssl("genpkey", "-algorithm", "RSA", "-pkeyopt", "rsa_keygen_bits:1024")
    KEYS["ec"] = openssl("genpkey", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256")
    KEYS["ed25519"] = openssl("genpkey", "-algorithm", "ED25519")
    KEYS["pss"] = openssl("genpkey", "-algorithm", "RSA-PSS", "-pkeyopt", "rsa_keygen_bits:2048")


class Case(unittest.TestCase):
    """A fake GitHub, an empty HOME with a key in it, and the program."""

    def setUp(self) -> None:
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.home = Path(folder.name)
        self.github = GitHub()
        self.addCleanup(self.github.__exit__)
        self.key = self.write("app.pem", KEYS["pkcs8"])
        self.cache = self.home / ".local/state/github-app-token"
        self.env = {**BARE, "HOME": str(self.home), "GITHUB_APP_API_URL": self.github.url,
                    "GITHUB_APP_ID": "Iv23liEXAMPLE", "GITHUB_APP_REPO": "octo/widgets"}  # fmt: skip

    def write(self, name: str, data: bytes, mode: int = 0o600) -> Path:
        path = self.home / name
        path.write_bytes(data)
        path.chmod(mode)
        return path

    def command(self, *argv: str, setup: str = "") -> list[str]:
        if not setup:
            return [sys.executable, str(SCRIPT), *argv]
        script = self.write(
            "prepared.py",
            f"import sys; sys.path.insert(0, {str(ROOT)!r})\nimport github_app_token as g\n"
            f"{setup}\nsys.exit(g.main())\n".encode(),
        )
        return [sys.executable, str(script), *argv]

    def run_it(
        self,
        *argv: str,
        setup: str = "",
        data: bytes = b"",
        pass_fds: tuple[int, ...] = (),
        **env: str,
    ) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            self.command(*argv, setup=setup), env={**self.env, **env}, input=data,
            capture_output=True, timeout=TIMEOUT, pass_fds=pass_fds,
        )  # fmt: skip
        self.assertNotIn(b"Traceback", done.stderr)
        return subprocess.CompletedProcess(
            argv, done.returncode, done.stdout.decode(), done.stderr.decode()
        )

    def token(self, *argv: str, key: str = "", **more: Any) -> subprocess.CompletedProcess[str]:
        permissions = () if "--permissions" in argv else ("--permissions", "dev")
        return self.run_it("token", "--key", key or str(self.key), *permissions, *argv, **more)

    def passes(self, done: subprocess.CompletedProcess[str]) -> str:
        self.assertEqual(done.returncode, 0, done.stderr)
        return done.stdout.strip()

    def fails(self, done: subprocess.CompletedProcess[str], status: int, *words: str) -> None:
        """It said what and what to do, in two lines at most, and nothing on stdout."""
        self.assertEqual((done.returncode, done.stdout), (status, ""), done.stderr)
        errors = [line for line in done.stderr.splitlines() if "warning:" not in line]
        self.assertRegex(errors[0], "^github_app_token: error: .")
        self.assertLessEqual(len(errors), 2, errors)
        for word in words:
            self.assertIn(word, done.stderr)


class InstallationTest(Case):
    def test_a_token_for_one_repository(self) -> None:
        token = self.passes(self.token())
        self.assertIn(token, self.github.tokens)
        self.assertEqual(self.github.paths(), [
            "/api/v3/repos/octo/widgets/installation", "/api/v3/app/installations/7/access_tokens"])  # fmt: skip
        rights = {"contents": "write", "issues": "write", "pull_requests": "write"}
        self.assertEqual(
            self.github.seen[1].body, {"repositories": ["widgets"], "permissions": rights}
        )
        self.assertEqual(stat.S_IMODE(self.cache.stat().st_mode), 0o700)
        for path in self.cache.iterdir():
            self.assertEqual(stat.S_IMODE(path.stat().st_mode), 0o600, path)
        self.assertEqual(self.passes(self.token()), token, "it is cached")
        self.assertEqual(len(self.github.seen), 2)

    def test_the_jwt_is_rs256_of_openssl(self) -> None:
        self.token()
        jwt = self.github.seen[0].authorization.partition(" ")[2]
        data, _, signature = jwt.rpartition(".")
        self.write("signature", base64.urlsafe_b64decode(signature + "=="))
        self.write("public.pem", KEYS["public"])
        said = openssl(
            "dgst",
            "-sha256",
            "-verify",
            str(self.home / "public.pem"),
            "-signature",
            str(self.home / "signature"),
            data=data.encode(),
        )
        self.assertIn(b"Verified OK", said)
        claims = json.loads(base64.urlsafe_b64decode(data.split(".")[1] + "=="))
        self.assertEqual(claims["exp"] - claims["iat"], 360)
        self.assertEqual(claims["iss"], "Iv23liEXAMPLE")

    def test_formats(self) -> None:
        token = self.passes(self.token())
        self.assertEqual(self.passes(self.token("--format", "env")), f"GH_TOKEN={token}")
        self.assertEqual(
            self.passes(self.token("--format", "header")), f"Authorization: Bearer {token}"
        )
        data = json.loads(self.passes(self.token("--format", "json")))
        self.assertEqual(
            (data["token"], data["cached"], data["type"]), (token, True, "installation")
        )
        self.assertEqual(data["repositories"], [{"id": 11, "full_name": "octo/widgets"}])
        self.assertRegex(data["expires_at"], r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ$")

    def test_on_a_terminal_it_is_masked(self) -> None:
        token = self.passes(self.token())
        for argv, shown in (([], False), (["--show"], True)):
            primary, secondary = pty.openpty()
            subprocess.run(self.command("token", "--key", str(self.key), "--permissions", "dev", *argv),
                           env=self.env, stdout=secondary, stderr=subprocess.DEVNULL, timeout=TIMEOUT)  # fmt: skip
            os.close(secondary)
            said = os.read(primary, 10_000).decode()
            os.close(primary)
            self.assertEqual(token in said, shown, said)
            self.assertEqual("octo/widgets" in said, not shown)

    def test_scope_is_mandatory(self) -> None:
        self.fails(self.run_it("token", "--key", str(self.key)), g.USAGE, "--permissions")
        self.fails(self.token(GITHUB_APP_REPO=""), g.USAGE, "--repo")
        self.fails(self.token("--repo", "octo/a", "--repo", "other/b"), g.USAGE, "one owner")
        self.fails(self.token("--permissions", "contents:all"), g.USAGE, "contents:all")
        self.passes(self.token("--permissions", "inherit"))
        self.assertNotIn("permissions", self.github.seen[-1].body)

    def test_what_is_wider_than_asked_is_revoked_and_refused(self) -> None:
        good = self.github.grant(
            {"repositories": ["widgets"], "permissions": dict(g.parse_permissions("dev") or ())}
        ).value
        both = [{"id": 11, "full_name": "octo/widgets"}, {"id": 12, "full_name": "octo/other"}]
        changes: list[dict[str, Any]] = [
            {"repositories": both},
            {"repository_selection": "all"},
            {"repositories": []},
            {"permissions": {**good["permissions"], "workflows": "write"}},
            {"permissions": {**good["permissions"], "metadata": "write"}},
        ]
        for change in changes:
            with self.subTest(change):
                self.github.on(
                    "/api/v3/app/installations/7/access_tokens", Reply(201, {**good, **change})
                )
                self.fails(self.token(), g.TOO_WIDE)
                revoked = self.github.seen[-1]
                self.assertEqual(
                    (revoked.method, revoked.path), ("DELETE", "/api/v3/installation/token")
                )
                self.assertEqual(revoked.authorization, f"Bearer {good['token']}")
        narrow = {**good, "permissions": {"metadata": "read", "contents": "write"}}
        self.github.on("/api/v3/app/installations/7/access_tokens", Reply(201, narrow))
        self.fails(self.token(), g.PERMISSION, "issues:write")
        for token in ("short", "a b" * 10, "x" * 5000, 7, None):
            self.github.on(
                "/api/v3/app/installations/7/access_tokens", Reply(201, {**good, "token": token})
            )
            self.fails(self.token(), 1)
        self.assertEqual([p.name for p in self.cache.glob("installation-*.json")], [])

    def test_why_there_is_none(self) -> None:
        where = "/api/v3/repos/octo/widgets/installation"
        for status, word, path, reply in (
            (g.REJECTED, "SHA256:", where, error(401, "A JSON web token could not be decoded")),
            (g.BLOCKED, "SSO", where, error(403, "Resource protected", X_GitHub_SSO="required")),
            (
                g.BLOCKED,
                "suspended",
                "/api/v3/app/.*",
                error(403, "This installation has been suspended"),
            ),
            (g.SERVER, "503", where, error(503, "")),
            (g.RATE, "3600 s", where, error(429, "slow", Retry_After="3600")),
            (g.RATE, "", where, error(403, "You have exceeded a secondary rate limit")),
            (g.NETWORK, "captive portal", where, Reply(200, b"<html>log in to the hotel</html>")),
            (
                g.NETWORK,
                "portal.example",
                where,
                Reply(302, {}, (("Location", "http://portal.example/"),)),
            ),
            (
                g.NETWORK,
                "redirects",
                "/api/v3/app/.*",
                Reply(307, {}, (("Location", "/api/v3/x"),)),
            ),
            (g.NETWORK, "circle", where, Reply(301, {}, (("Location", where),))),
            (1, "418", where, error(418, "teapot")),
        ):
            with self.subTest(reply):
                self.github.replies.clear()
                self.github.on(path, reply)
                self.fails(self.token(setup="g.time.sleep = lambda s: None"), status, word)

    def test_not_installed_and_not_selected(self) -> None:
        self.fails(
            self.token("--repo", "octo/other"),
            g.NOT_INSTALLED,
            "add the repository",
            "installations/7",
        )
        self.fails(
            self.token("--repo", "nobody/x"), g.NOT_INSTALLED, "/apps/our-app/installations/new"
        )
        self.github.suspended = True
        self.fails(self.token(), g.BLOCKED, "suspended")
        self.assertNotIn("POST", [x.method for x in self.github.seen])

    def test_permissions_that_the_app_lacks(self) -> None:
        self.fails(
            self.token("--permissions", "dev,workflows:write"),
            g.PERMISSION,
            "workflows:write",
            "accept",
        )
        self.fails(self.token("--permissions", "checks:write"), g.PERMISSION, "checks:write")

    def test_a_server_that_is_down_for_a_moment(self) -> None:
        self.github.on(
            "/api/v3/app/.*",
            error(502, ""),
            error(503, ""),
            self.github.grant(
                {"repositories": ["widgets"], "permissions": dict(g.parse_permissions("dev") or ())}
            ),
        )
        self.passes(self.token(setup="g.time.sleep = lambda s: None"))
        self.assertEqual(len(self.github.paths("POST")), 3)

    def test_clocks(self) -> None:
        for ahead in (-3600.0, -200.0, 30.0, 3600.0):
            with self.subTest(ahead):
                self.github.clock = ahead
                shutil.rmtree(self.cache, ignore_errors=True)
                done = self.token("--format", "json")
                data = json.loads(self.passes(done))
                self.assertEqual("clock" in done.stderr, ahead < -60 or ahead > 300)
                self.assertEqual(
                    json.loads(self.passes(self.token("--format", "json")))["cached"], True
                )
                # The time that is printed is by this machine's clock: its readers compare with that.
                left = g.parse_time(data["expires_at"]) - time.time()
                self.assertAlmostEqual(left, 3600, delta=20)
        self.github.on("/api/v3/repos/.*", error(401, "'Issued at' claim ('iat') must be …"))
        shutil.rmtree(self.cache)
        self.fails(self.token(), g.REJECTED, "clock")
        self.assertEqual(self.github.paths()[-2:], ["/api/v3/repos/octo/widgets/installation"] * 2)

    def test_a_token_must_live_long_enough(self) -> None:
        first = self.passes(self.token())
        self.assertEqual(self.passes(self.token("--min-ttl", "59m")), first)
        self.assertNotEqual(self.passes(self.token("--min-ttl", "61m")), first)
        self.fails(self.token("--min-ttl", "soon"), g.USAGE)

    def test_a_token_that_was_refused_is_not_given_again(self) -> None:
        import hashlib

        first = self.passes(self.token())
        dead = hashlib.sha256(first.encode()).hexdigest()
        self.assertNotEqual(self.passes(self.token(GITHUB_TOKEN_REFUSED=dead)), first)

    def test_renamed_repositories(self) -> None:
        self.passes(self.token())
        self.assertEqual(self.github.paths("POST"), ["/api/v3/app/installations/7/access_tokens"])
        self.github.repos = {"octo/gadgets": 11}
        self.github.renamed = {"octo/widgets": "octo/gadgets"}
        done = self.token("--min-ttl", "61m")
        self.passes(done)
        self.assertIn("octo/gadgets", done.stderr)
        self.assertEqual(self.github.seen[-1].body["repository_ids"], [11])
        self.assertTrue(
            self.github.seen[-2].authorization, "a redirect within GitHub keeps the JWT"
        )

    def test_another_repository_under_the_old_name(self) -> None:
        self.passes(self.token())
        self.github.repos = {"octo/gadgets": 11, "octo/widgets": 99}
        self.github.selected = {11, 99}
        self.fails(
            self.token("--min-ttl", "61m"), g.OTHER_REPO, "octo/gadgets", "--accept-new-repo"
        )
        self.assertEqual(self.github.seen[-1].method, "DELETE")
        self.passes(self.token("--accept-new-repo"))
        self.assertEqual(
            json.loads(self.passes(self.token("--format", "json")))["repositories"][0]["id"], 99
        )

    def test_no_redirect_takes_the_jwt_elsewhere(self) -> None:
        with GitHub() as elsewhere:
            target = f"{elsewhere.url}/api/v3/x"
            self.github.on("/api/v3/repos/.*", Reply(301, {}, (("Location", target),)))
            self.fails(self.token(), g.NETWORK, f"localhost:{elsewhere.server_port}")
            self.assertEqual(elsewhere.seen, [])

    def test_no_network(self) -> None:
        quick = "g.time.sleep = lambda s: None"
        self.fails(
            self.token(setup=quick, GITHUB_APP_API_URL="http://127.0.0.1:9"),
            g.NETWORK,
            "127.0.0.1:9",
        )
        self.fails(
            self.token(setup=quick, GITHUB_APP_API_URL="ghe.invalid"), g.NETWORK, "ghe.invalid"
        )
        self.fails(self.token(GITHUB_APP_API_URL="http://github.com"), g.USAGE, "https")
        self.fails(self.token("--ca-file", "/nonexistent"), g.USAGE, "/nonexistent")

    def test_answers_of_another_form(self) -> None:
        """Whatever GitHub, or what stands in its place, makes of them: a line, and no traceback."""
        installation = {"id": 7, "permissions": {}, "html_url": "x"}
        grant = {
            "token": "ghs_" + "x" * 36,
            "expires_at": "2099-01-01T00:00:00Z",
            "permissions": {},
            "repositories": [],
        }
        odd: list[Any] = [None, [], {}, "x", 7, {"id": None}, {"id": "x"}, {**installation, "suspended_at": 1},
                          {**installation, "id": 1e400}, [[]] * 1000]  # fmt: skip
        for value in odd:
            with self.subTest(installation=str(value)[:50]):
                self.github.on("/api/v3/repos/.*", Reply(200, value))
                self.assertNotEqual(self.token().returncode, 0)
                self.assertNotEqual(
                    self.run_it(
                        "status", "--key", str(self.key), "--permissions", "dev"
                    ).returncode,
                    0,
                )
        self.github.replies.clear()
        for change in ({"expires_at": 7}, {"expires_at": "soon"}, {"permissions": None}, {"repositories": 7},
                       {"repositories": [{"id": 11}]}, {"repositories": [7]}, {"token": None}):  # fmt: skip
            with self.subTest(change):
                self.github.on("/api/v3/app/.*", Reply(201, {**grant, **change}))
                self.assertNotEqual(self.token().returncode, 0)
        for header in ("inf", "nan", "-5", "soon", "1e400"):
            self.github.on("/api/v3/app/.*", error(429, "slow", Retry_After=header))
            self.fails(self.token(setup="g.time.sleep = lambda s: None"), g.RATE)

    def test_closed_streams(self) -> None:
        for closed in ("<&-", ">&-", "2>&-"):
            command = shlex.join(
                self.command("token", "--key", str(self.key), "--permissions", "dev")
            )
            done = subprocess.run(
                ["sh", "-c", f"{command} {closed}"],
                env=self.env,
                capture_output=True,
                timeout=TIMEOUT,
            )
            self.assertEqual((done.returncode, done.stdout, done.stderr), (2, b"", b""), closed)
        self.assertEqual(self.github.seen, [])

    def test_answers_that_do_not_end_well(self) -> None:
        quick = "g.time.sleep = lambda s: None\ng.REPLY_SECONDS = 1"
        where = "/api/v3/repos/octo/widgets/installation"
        for status, word, reply in (
            (g.NETWORK, "too slow", Reply(200, {"id": 7}, (), "slow")),
            (g.NETWORK, "sent no JSON", Reply(200, {"id": 7}, (), "cut")),
            (1, "more than", Reply(200, {"id": "x" * 3_000_000})),
        ):
            with self.subTest(word):
                self.github.on(where, reply)
                self.fails(self.token(setup=quick), status, word)

    def test_tls(self) -> None:
        certificate = self.home / "cert.pem"
        openssl("req", "-x509", "-new", "-key", str(self.key), "-days", "2", "-out", str(certificate),
                "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost")  # fmt: skip
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate, self.key)
        with GitHub(context) as secure:
            quick = "g.time.sleep = lambda s: None"
            done = self.token(setup=quick, GITHUB_APP_API_URL=secure.url)
            self.fails(done, g.NETWORK, "--ca-file")
            self.assertEqual(secure.seen, [])
            self.passes(
                self.token(
                    "--ca-file",
                    str(certificate),
                    GITHUB_APP_API_URL=secure.url,
                    HTTPS_PROXY="http://127.0.0.1:9",
                    NO_PROXY="localhost",
                )
            )
            done = self.token(
                "--ca-file",
                str(certificate),
                "--min-ttl",
                "61m",
                setup=quick,
                GITHUB_APP_API_URL=secure.url,
                HTTPS_PROXY="http://127.0.0.1:9",
            )
            self.fails(done, g.NETWORK)

    def test_a_proxy_password_is_not_shown(self) -> None:
        done = self.token(setup="g.time.sleep = lambda s: None", GITHUB_APP_API_URL="ghe.invalid",
                          HTTPS_PROXY="http://user:pr0xy-secret@127.0.0.1:9")  # fmt: skip
        self.fails(done, g.NETWORK)
        self.assertNotIn("pr0xy-secret", done.stderr)


class KeyTest(Case):
    def test_kinds_and_spoiled_lines(self) -> None:
        pem = KEYS["pkcs8"].decode()
        for name, data in {
            "PKCS#1": KEYS["pkcs1"],
            "CRLF": pem.replace("\n", "\r\n").encode(),
            "BOM": b"\xef\xbb\xbf" + KEYS["pkcs8"],
            "indented": ("  " + pem.replace("\n", "\n  ")).encode(),
            "one line": pem.replace("\n", " ").encode(),
            "literal": pem.replace("\n", "\\n").encode(),
            "literal CRLF": pem.replace("\n", "\\r\\n").encode(),
            "base64": base64.b64encode(KEYS["pkcs8"]),
            "wrapped base64": base64.encodebytes(KEYS["pkcs1"]),
            "no newline": pem.strip().encode(),
            "junk": b"Bag Attributes\n  x: y\n" + KEYS["pkcs8"] + b"trailing\n",
        }.items():
            with self.subTest(name):
                shutil.rmtree(self.cache, ignore_errors=True)
                self.passes(self.token(key=str(self.write("k", data))))

    def test_what_is_no_key_is_named(self) -> None:
        ssh = self.home / "ssh"
        subprocess.run(["ssh-keygen", "-q", "-t", "rsa", "-N", "", "-f", str(ssh)], check=True)
        certificate = openssl("req", "-x509", "-new", "-key", str(self.key), "-subj", "/CN=x")
        for word, data in (
            ("EC", KEYS["ec"]), ("Ed25519", KEYS["ed25519"]), ("RSA-PSS", KEYS["pss"]), ("1024", KEYS["small"]),
            ("public key", KEYS["public"]), ("certificate", certificate), ("OpenSSH", ssh.read_bytes()),
            ("DER", KEYS["der"]), ("fingerprint", b"SHA256:abcdef="), ("client secret", b"0123456789" * 4 + b"\n"),
            ("END", KEYS["pkcs8"][:600]), ("empty", b""), ("PEM", b"junk" * 2000),
            ("damaged", KEYS["pkcs8"].replace(b"MII", b"AAA")), ("encrypted", KEYS["encrypted"]),
        ):  # fmt: skip
            with self.subTest(word):
                self.fails(self.token(key=str(self.write("k", data))), g.KEY, word)
        self.assertEqual(self.github.seen, [])

    def test_a_passphrase_of_the_environment_is_not_the_key_commands(self) -> None:
        key = self.write("encrypted.pem", KEYS["encrypted"])
        seen = self.home / "seen"
        command = f"command:sh -c 'env > {seen}; cat {key}'"
        self.passes(self.token("--passphrase", "env:PW", key=command, PW=PASSPHRASE))
        self.assertNotIn(PASSPHRASE, seen.read_text())

    def test_passphrases(self) -> None:
        secret = str(self.write("pass", PASSPHRASE.encode() + b"\n"))
        for kind in ("encrypted", "encrypted pkcs1"):
            key = str(self.write("k", KEYS[kind]))
            with self.subTest(kind):
                shutil.rmtree(self.cache, ignore_errors=True)
                self.passes(self.token("--passphrase", secret, key=key))
                done = self.token(
                    "--min-ttl", "61m", "--passphrase", "env:WORD", key=key, WORD="wrong-horse"
                )
                self.fails(done, g.KEY, "passphrase")
                self.assertNotIn("wrong-horse", done.stderr)

    def test_sources(self) -> None:
        def again(key: str, **more: Any) -> None:
            self.passes(self.token("--min-ttl", "61m", key=key, **more))

        again("-", data=KEYS["pkcs8"])
        again("env:THE_KEY", THE_KEY=KEYS["pkcs8"].decode())
        again(f"command:cat {self.key}")
        read_end, write_end = os.pipe()
        os.write(write_end, KEYS["pkcs8"])
        os.close(write_end)
        again(f"fd:{read_end}", pass_fds=(read_end,))
        os.close(read_end)
        again("~/app.pem")
        self.fails(
            self.token("--min-ttl", "61m", key=KEYS["pkcs8"].decode()), g.USAGE, "where it is"
        )
        self.fails(self.token("--min-ttl", "61m", key="command:false"), g.KEY, "status 1")
        self.fails(self.token("--min-ttl", "61m", key="fd:77"), g.KEY)

    def test_files_that_others_can_read(self) -> None:
        for mode in (0o644, 0o640, 0o604):
            self.fails(
                self.token(key=str(self.write("k", KEYS["pkcs8"], mode))), g.KEY, "chmod 600"
            )
        os.mkfifo(self.home / "fifo")
        self.fails(self.token(key=str(self.home / "fifo")), g.KEY, "not a file")
        self.fails(self.token(key=str(self.home)), g.KEY, "Is a directory")
        self.fails(self.token(key="/nonexistent"), g.KEY, "No such file")

    def fake_openssl(self, text: str) -> str:
        folder = self.home / "bin"
        folder.mkdir(exist_ok=True)
        self.write("fake.py", text.encode())
        libraries = f"LD_LIBRARY_PATH={shlex.quote(BARE.get('LD_LIBRARY_PATH', ''))}"
        command = f'{libraries} exec {shlex.quote(sys.executable)} {self.home}/fake.py "$@"'
        self.write("bin/openssl", f"#!/bin/sh\n{command}\n".encode(), 0o700)
        return f"{folder}:{self.env['PATH']}"

    def test_an_openssl_that_does_not_do_its_work(self) -> None:
        for word, text in (
            ("not one of this key", "print('x' * 256, end='')"),
            ("status 1", "import sys; sys.exit(1)"),
            ("did not end", "import time; time.sleep(60)"),
        ):
            with self.subTest(word):
                done = self.token(setup="g.CHILD_SECONDS = 1", PATH=self.fake_openssl(text))
                self.fails(done, g.SIGNER, word)
        (self.home / "empty").mkdir()
        self.fails(self.token(PATH=str(self.home / "empty")), g.SIGNER, "openssl is not on PATH")

    def test_no_secret_is_in_argv_environment_or_files(self) -> None:
        text = f"""
import glob, os, subprocess, sys
mine = [open(f"/proc/{{pid}}/{{what}}", "rb").read() for pid in (os.getpid(), os.getppid()) for what in ("cmdline", "environ")]
with open({str(self.home / "seen")!r}, "ab") as file:
    file.write(b"\\n".join(mine))
os.execv({shutil.which("openssl")!r}, ["openssl", *sys.argv[1:]])
"""
        if not Path("/proc/self/environ").exists():
            self.skipTest("no /proc")
        self.write("pass", PASSPHRASE.encode())
        key = str(self.write("k", KEYS["encrypted"]))
        token = self.passes(self.token("--passphrase", str(self.home / "pass"), key=key, PATH=self.fake_openssl(text),
                                       OPENSSL_CONF="/nonexistent", LD_PRELOAD=""))  # fmt: skip
        seen = (self.home / "seen").read_bytes()
        jwt = self.github.seen[0].authorization.partition(" ")[2]
        self.assertIn(b"dgst", seen)
        secrets = [
            PASSPHRASE,
            token,
            jwt,
            KEYS["encrypted"].decode().splitlines()[3],
            KEYS["pkcs8"].decode().splitlines()[3],
        ]
        for secret in secrets:
            self.assertNotIn(secret.encode(), seen)
        self.assertNotIn(b"OPENSSL_CONF=", seen.partition(b"dgst")[2].partition(b"PATH")[0])
        for path in self.cache.iterdir():
            for secret in (PASSPHRASE, jwt, *secrets[3:]):
                self.assertNotIn(secret, path.read_text())

    def test_an_ssh_agent_signs(self) -> None:
        if not shutil.which("ssh-agent"):
            self.skipTest("ssh-agent is not on PATH")
        sock = str(self.home / "agent")
        agent = subprocess.Popen(["ssh-agent", "-D", "-a", sock], stdout=subprocess.DEVNULL)
        self.addCleanup(agent.wait)
        self.addCleanup(agent.kill)
        while not os.path.exists(sock):
            time.sleep(0.01)
        self.fails(self.token(key="agent", SSH_AUTH_SOCK=sock), g.KEY, "0 such keys")
        other = self.write("other", openssl("genrsa", "2048"))
        for name in (str(self.key), str(other)):
            subprocess.run(
                ["ssh-add", "-q", name],
                env={**self.env, "SSH_AUTH_SOCK": sock},
                check=True,
                stderr=subprocess.DEVNULL,
            )
        shown = g.fingerprint(g.OpensslKey(KEYS["pkcs8"], bytes).public)
        self.fails(self.token(key="agent", SSH_AUTH_SOCK=sock), g.KEY, "2 such keys", shown)
        self.passes(self.token(key=f"agent:{shown}", SSH_AUTH_SOCK=sock))
        by_agent = self.github.seen[0].authorization.partition(" ")[2]
        data, _, signature = by_agent.rpartition(".")
        key = g.OpensslKey(KEYS["pkcs8"], bytes).public
        self.assertTrue(
            g.is_signature(base64.urlsafe_b64decode(signature + "=="), data.encode(), key)
        )
        self.fails(
            self.token("--min-ttl", "61m", key="agent:SHA256:none", SSH_AUTH_SOCK=sock), g.KEY
        )
        self.fails(
            self.token("--min-ttl", "61m", key="agent", SSH_AUTH_SOCK="/nonexistent"),
            g.KEY,
            "SSH_AUTH_SOCK",
        )

    def test_the_fingerprint_is_githubs(self) -> None:
        spki = openssl("rsa", "-pubin", "-outform", "DER", data=KEYS["public"])
        digest = base64.b64encode(openssl("dgst", "-sha256", "-binary", data=spki)).decode()
        self.assertEqual(g.fingerprint(g.rsa_numbers(spki)), f"SHA256:{digest}")


def ctrl_c_at(request: int) -> str:
    """`setup`: Ctrl-C while the answer to that request of the program arrives."""
    return (
        "\nimport signal, os\nsend = g.GitHub.send\ncount = [0]\n"
        "def cut(*a):\n reply = send(*a); count[0] += 1\n"
        f" if count[0] == {request}: os.kill(os.getpid(), signal.SIGINT)\n"
        " return reply\ng.GitHub.send = cut"
    )


class LoginCase(Case):
    """Logins that do not wait."""

    quick = "g.time.sleep = lambda s: print(f'sleep {s:.1f}', file=sys.stderr)"
    poll = "/login/oauth/access_token"

    def login(self, *argv: str, setup: str = "", **more: Any) -> subprocess.CompletedProcess[str]:
        return self.run_it("login", *argv, setup=self.quick + setup, **more)

    def stored(self) -> dict[str, Any]:
        (path,) = self.cache.glob("user-*.json")
        value: dict[str, Any] = json.loads(path.read_text())
        return value

    def store(self, **changes: Any) -> None:
        (path,) = self.cache.glob("user-*.json")
        path.write_text(json.dumps({**self.stored(), **changes}))


class PinTest(Case):
    """A repository's name means what it meant when it was first used."""

    both = ("--repo", "octo/widgets", "--repo", "octo/other")

    def test_one_of_several_has_come_to_mean_another(self) -> None:
        self.passes(self.token())  # octo/widgets is known, octo/other is not
        self.github.repos = {"octo/widgets": 99, "octo/other": 12}
        self.github.selected = {12, 99}
        self.fails(self.token(*self.both), g.OTHER_REPO, "octo/widgets", "--accept-new-repo")
        self.assertEqual(len(self.github.tokens), 1, "the first one")
        self.fails(self.token(*self.both), g.OTHER_REPO)
        self.passes(self.token(*self.both, "--accept-new-repo"))
        self.passes(self.token("--min-ttl", "61m"))

    def test_the_redirect_of_one_does_not_excuse_another(self) -> None:
        self.github.selected = {11, 12}
        self.passes(self.token(*self.both))
        self.github.repos = {"octo/w2": 11, "octo/moved": 12, "octo/other": 44}
        self.github.renamed = {"octo/widgets": "octo/w2"}
        self.github.selected = {11, 12, 44}
        self.fails(self.token(*self.both, "--min-ttl", "61m"), g.OTHER_REPO)

    def test_a_name_written_twice_is_one(self) -> None:
        self.passes(self.token("--repo", "octo/widgets", "--repo", "Octo/Widgets"))
        self.github.repos = {"octo/gadgets": 11, "octo/widgets": 99}
        self.github.selected = {11, 99}
        twice = ("--repo", "octo/widgets", "--repo", "OCTO/widgets")
        self.fails(self.token(*twice, "--min-ttl", "61m"), g.OTHER_REPO)

    def test_what_cannot_be_looked_at_is_not_forgotten(self) -> None:
        self.passes(self.token())
        setup = (
            "import os\nreal = os.lstat, os.open\n"
            "def no(path, *a, **k):\n"
            " if 'repository-' in str(path): raise PermissionError(13, 'Permission denied')\n"
            " return real[len(a) > 0](path, *a, **k)\nos.lstat = os.open = no"
        )
        self.fails(self.token("--min-ttl", "61m", setup=setup), g.CACHE, "--accept-new-repo")

    def test_what_is_known_but_damaged_is_not_forgotten(self) -> None:
        self.passes(self.token())
        (pin,) = self.cache.glob("repository-*.json")
        for spoil in ("", "{", "[]", '{"id": "11"}', '{"id": true}', '{"id": 0}'):
            pin.write_text(spoil)
            self.fails(self.token("--min-ttl", "61m"), g.CACHE, str(pin), "--accept-new-repo")
        pin.chmod(0o644)
        self.fails(self.token("--min-ttl", "61m"), g.CACHE)
        pin.chmod(0o600)
        self.passes(self.token("--accept-new-repo"))
        self.passes(self.token("--min-ttl", "61m"))


class RevokedTest(LoginCase):
    """ "revoked" is said of what GitHub has taken back, and of nothing else."""

    def test_an_installation_token_that_is_too_wide(self) -> None:
        self.github.on("/api/v3/installation/token", error(403, "no"))
        wide = {**self.github.grant({"repositories": ["widgets"]}).value}
        wide["repository_selection"] = "all"
        path = "/api/v3/app/installations/7/access_tokens"
        self.github.on(path, Reply(201, wide))
        done = self.token()
        self.fails(done, g.TOO_WIDE, "did not revoke it")
        del self.github.replies["/api/v3/installation/token"]
        self.fails(self.token(), g.TOO_WIDE, "it is revoked")
        self.assertNotIn(wide["token"], self.github.tokens)

    def test_ctrl_c_when_it_is_granted(self) -> None:
        for at in (2, 3):
            self.github.tokens.clear()
            shutil.rmtree(self.cache, ignore_errors=True)
            self.assertIn(self.token(setup=ctrl_c_at(at)).returncode, (0, 130))
            stored = [
                json.loads(path.read_text())["token"]
                for path in self.cache.glob("installation-*.json")
            ]
            self.assertEqual(list(self.github.tokens), stored)

    def test_revoke_says_what_github_said(self) -> None:
        argv = ("revoke", "--key", str(self.key), "--permissions", "dev")
        self.passes(self.token())
        self.github.on("/api/v3/installation/token", error(404, "Not Found"))
        self.fails(self.run_it(*argv), 1, "HTTP 404")
        self.github.on("/api/v3/installation/token", error(401, "Bad credentials"))
        done = self.run_it(*argv)
        self.assertEqual(done.returncode, 0)
        self.assertIn("was not valid any more", done.stderr)

    def test_a_users_token_that_is_too_wide(self) -> None:
        self.github.device_scope = {11, 12}
        self.assertIn("it is revoked", self.login().stderr)
        self.github.on("/api/v3/credentials/revoke", error(404, "Not Found"))
        self.assertIn("did not revoke it", self.login().stderr)
        self.github.device_scope = {11}
        self.assertEqual(self.login().returncode, 0)
        self.fails(self.run_it("revoke"), 1, "did not revoke it", "settings/apps/authorizations")
        self.assertEqual(list(self.cache.glob("user-*.json")), [])

    def test_a_login_of_an_odd_form_does_not_live_on(self) -> None:
        odd: dict[str, Any]
        for odd in (
            {"expires_in": "soon"},
            {"expires_in": 1e400},
            {"refresh_token": 7},
            {"refresh_token_expires_in": ["x"]},
        ):
            grant = {**self.github.login(self.poll, {"grant_type": ""}).value, **odd}
            self.github.on(self.poll, Reply(200, grant))
            done = self.login()
            self.assertNotEqual(done.returncode, 0)
            self.assertNotIn(grant["access_token"], self.github.tokens, odd)
            self.assertEqual(list(self.cache.glob("user-*.json")), [])

    def test_a_login_that_cannot_be_stored_does_not_live_on(self) -> None:
        self.github.on("/api/v3/repos/octo/widgets", error(404, "Not Found"))
        setup = (
            "\nimport tempfile\ndef full(**k): raise OSError(28, 'No space left on device')"
            "\ntempfile.mkstemp = full"
        )
        done = self.login("--repo-id", "11", setup=setup)
        self.assertEqual(done.returncode, g.CACHE, done.stderr)
        self.assertIn("it is revoked", done.stderr)
        self.assertEqual(self.github.tokens, {})

    def test_a_new_login_ends_the_one_before(self) -> None:
        self.assertEqual(self.login().returncode, 0)
        before = self.stored()["token"]
        self.assertEqual(self.login().returncode, 0)
        self.assertNotIn(before, self.github.tokens)
        self.assertIn(self.passes(self.run_it("token")), self.github.tokens)

    def test_a_user_of_more_installations_than_one_page(self) -> None:
        many = {"total_count": 101, "installations": [{"id": 7}]}
        self.github.on("/api/v3/user/installations", Reply(200, many))
        self.assertEqual(self.login().returncode, g.TOO_WIDE)
        self.github.replies.clear()
        path = "/api/v3/user/installations/7/repositories"
        self.github.on(path, Reply(200, {"total_count": 2, "repositories": [{"id": 11}]}))
        self.assertEqual(self.login().returncode, g.TOO_WIDE)
        self.assertEqual(self.github.tokens, {})


class LoginIsForOneTest(LoginCase):
    """A login is for the repository that it was made for, and for no other by the same name."""

    def test_several_repositories(self) -> None:
        self.github.selected = {11, 12}
        self.passes(self.token("--repo", "octo/other"))  # is known by its id, octo/widgets is not
        both = ("--repo", "octo/widgets", "--repo", "octo/other")
        self.assertEqual(self.login(*both).returncode, g.USAGE)
        self.assertEqual(self.login().returncode, 0)
        self.fails(self.run_it("token", *both), g.USAGE, "one repository")

    def test_another_id_is_asked_for(self) -> None:
        self.login()
        self.fails(self.run_it("token", "--repo-id", "99"), g.OTHER_REPO, "login")
        self.fails(self.run_it("token", "--accept-new-repo"), g.OTHER_REPO, "login")
        self.passes(self.run_it("token", "--repo-id", "11"))

    def test_an_id_of_another_name(self) -> None:
        self.github.device_scope = {12}
        done = self.login("--repo-id", "12")
        self.assertEqual(done.returncode, g.OTHER_REPO, done.stderr)
        self.assertIn("octo/other", done.stderr)
        self.assertEqual(self.github.tokens, {})
        self.assertEqual(list(self.cache.glob("user-*.json")), [])

    def test_ctrl_c_when_it_is_granted(self) -> None:
        """Whichever request it comes at: stored and alive, or neither; the one before is over."""
        for at in range(1, 9):
            shutil.rmtree(self.cache, ignore_errors=True)
            self.github.tokens.clear()
            self.login()
            done = self.login(setup=ctrl_c_at(at))
            self.assertIn(done.returncode, (0, 130), done.stderr)
            self.assertEqual(list(self.github.tokens), [self.stored()["token"]], at)

    def test_a_refresh_that_cannot_be_stored_does_not_live_on(self) -> None:
        self.login()
        self.store(expires_at=time.time() - 1)
        setup = (
            "import os\nreplace = os.replace\ncount = [0]\ndef full(*a):\n count[0] += 1\n"
            " if count[0] == 2: raise OSError(28, 'No space left on device')\n return replace(*a)\n"
            "os.replace = full"
        )
        self.fails(self.run_it("token", setup=setup), g.CACHE, "it is revoked")
        self.assertEqual((self.github.tokens, self.github.refresh_tokens), ({}, set()))

    def test_logout_while_github_is_down_can_be_repeated(self) -> None:
        self.login()
        self.github.on("/api/v3/credentials/revoke", error(503, ""))
        done = self.run_it("logout", setup="g.time.sleep = lambda s: None")
        self.assertEqual(done.returncode, g.SERVER, done.stderr)
        self.assertEqual(len(list(self.cache.glob("user-*.json"))), 1)
        self.github.replies.clear()
        self.assertEqual(self.run_it("logout").returncode, 0)
        self.assertEqual(self.github.tokens, {})

    def test_git_was_refused_with_it(self) -> None:
        self.login()
        token = self.passes(self.run_it("token"))
        host = self.github.url.partition("//")[2]
        asked = f"protocol=http\nhost={host}\npath=octo/widgets.git\n"
        given = f"{asked}username=x\npassword={token}\n".encode()
        self.assertEqual(self.run_it("git-credential", "erase", data=given).returncode, 0)
        self.assertNotEqual(self.passes(self.run_it("token")), token)


class CacheTest(Case):
    def test_a_lock_that_cannot_be_had_costs_no_token(self) -> None:
        self.passes(self.token())
        lock = Path(f"{self.file()}.lock")
        lock.unlink()
        lock.mkdir()
        done = self.token("--min-ttl", "59m")
        self.passes(done)
        self.fails(self.token("--min-ttl", "x"), g.USAGE)
        lock.rmdir()
        lock.symlink_to(self.home / "elsewhere")
        self.file().write_text("{")
        self.passes(self.token())
        self.assertFalse((self.home / "elsewhere").exists())

    def test_what_a_killed_process_left_is_removed(self) -> None:
        self.passes(self.token())
        old, new = self.cache / ".new-old", self.cache / ".new-new"
        for path in (old, new):
            path.write_text("x")
        os.utime(old, (time.time() - 7200,) * 2)
        self.passes(self.token("--min-ttl", "61m"))
        self.assertEqual((old.exists(), new.exists()), (False, True))

    def test_a_token_in_the_place_of_another_is_not_given_out(self) -> None:
        self.github.selected = {11, 12}
        self.passes(self.token())
        (mine,) = self.cache.glob("installation-*.json")
        self.passes(self.token("--repo", "octo/other"))
        (other,) = set(self.cache.glob("installation-*.json")) - {mine}
        mine.write_text(other.read_text())
        shown = json.loads(self.passes(self.token("--format", "json")))
        self.assertEqual([item["id"] for item in shown["repositories"]], [11])

    def test_a_lock_that_the_file_system_does_not_have(self) -> None:
        setup = "def no(*a): raise OSError(37, 'No locks available')\ng.fcntl.flock = no"
        self.passes(self.token(setup=setup))

    def test_times_that_none_has(self) -> None:
        self.passes(self.token())
        good = self.file().read_text()
        for odd in (1e300, float("inf"), float("nan"), -1e300):
            for name in ("expires_at", "clock_offset"):
                self.file().write_text(json.dumps({**json.loads(good), name: odd}))
                self.passes(self.token("--format", "json"))

    def test_no_home(self) -> None:
        here = self.home / "here"
        here.mkdir()
        command = self.command("token", "--key", str(self.key), "--permissions", "dev")
        done = subprocess.run(command, env={**self.env, "HOME": "there"}, cwd=here,
                              capture_output=True, text=True, timeout=TIMEOUT)  # fmt: skip
        self.fails(done, g.USAGE, "HOME")
        self.assertEqual(list(here.iterdir()), [])

    def file(self) -> Path:
        (path,) = self.cache.glob("installation-*.json")
        return path

    def test_what_is_spoiled_is_ignored(self) -> None:
        first = self.passes(self.token())
        good = self.file().read_text()
        for spoil in (
            "",
            "{",
            "[]",
            '{"token":"x"}',
            good[:50],
            good.replace("ghs_", "g s_"),
            good.replace(', "expires_at": ', ', "expires_at": "x", "y": '),
        ):
            with self.subTest(spoil[:20]):
                self.file().write_text(spoil)
                self.assertNotEqual(self.passes(self.token()), first)
        self.file().write_text(good)
        self.file().chmod(0o644)
        done = self.token()
        self.assertNotEqual(self.passes(done), first)
        self.assertIn("ignoring", done.stderr)
        target = self.write("target", good.encode())
        path = self.file()
        path.unlink()
        path.symlink_to(target)
        self.assertNotEqual(self.passes(self.token()), first)
        self.assertEqual(target.read_text(), good, "what a link points to is not written")

    def test_a_folder_that_cannot_be_used_costs_the_cache_only(self) -> None:
        self.cache.mkdir(parents=True)
        self.cache.chmod(0o755)
        done = self.token()
        self.passes(done)
        self.assertIn(
            "chmod 700", done.stderr + "chmod 700" if "for this user alone" in done.stderr else ""
        )
        self.assertEqual(list(self.cache.iterdir()), [])

    def test_other_settings_have_other_tokens(self) -> None:
        self.github.selected = {11, 12}
        tokens = {self.passes(self.token(*argv)) for argv in (
            [], ["--permissions", "read"], ["--repo", "octo/other"], ["--app-id", "123"], ["--repo", "octo/widgets", "--repo", "octo/other"])}  # fmt: skip
        self.assertEqual(len(tokens), 5)
        self.assertEqual(
            self.passes(self.token("--repo", "Octo/Widgets")), self.passes(self.token())
        )

    def test_25_at_once_make_one_token(self) -> None:
        for spoiled in (False, True):
            if spoiled:
                self.file().write_text("{")
            before = len(self.github.paths("POST"))
            command = self.command("token", "--key", str(self.key), "--permissions", "dev")
            children = [
                subprocess.Popen(
                    command, env=self.env, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
                )
                for _ in range(25)
            ]
            tokens = {child.communicate(timeout=60)[0] for child in children}
            self.assertEqual(len(tokens), 1)
            self.assertEqual(len(self.github.paths("POST")) - before, 1)

    def test_a_lock_that_is_held(self) -> None:
        import fcntl

        self.passes(self.token())
        with open(f"{self.file()}.lock", "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            self.passes(self.token())  # a cached one needs no lock
            done = self.token("--min-ttl", "61m", setup="g.LOCK_SECONDS = 0.2")
            self.passes(done)
            self.assertIn("another process holds", done.stderr)


class LoginTest(LoginCase):
    def test_a_login(self) -> None:
        self.github.pending = 2
        done = self.login()
        self.assertEqual((done.returncode, done.stdout), (0, ""), done.stderr)
        self.assertIn("ABCD-1234", done.stderr)
        self.assertEqual(done.stderr.count("sleep 6.0"), 3)
        polls = [x.body for x in self.github.seen if x.path == self.poll]
        self.assertEqual(polls[0]["repository_id"], "11")
        token = self.passes(self.run_it("token"))
        self.assertTrue(token.startswith("ghu_"))
        self.assertNotIn(token, done.stderr)
        self.assertEqual(self.passes(self.run_it("token")), token)

    def test_slow_down(self) -> None:
        self.github.on(self.poll, Reply(200, {"error": "slow_down", "interval": 12}), Reply(200, {"error": "slow_down"}),
                       self.github.login(self.poll, {"grant_type": "x"}))  # fmt: skip
        self.assertEqual(self.login().stderr.count("sleep"), 3)
        again = self.login().stderr
        self.assertIn("sleep 6.0", again)

    def test_answers_that_end_it(self) -> None:
        for name, status in (
            ("access_denied", g.DENIED), ("expired_token", g.EXPIRED), ("token_expired", g.EXPIRED),
            ("device_flow_disabled", g.DEVICE_FLOW), ("incorrect_client_credentials", g.DEVICE_FLOW),
            ("unauthorized_client", g.DEVICE_FLOW), ("incorrect_device_code", 1), ("unheard_of", 1),
        ):  # fmt: skip
            with self.subTest(name):
                before = len(self.github.seen)
                self.github.on(
                    self.poll, Reply(200, {"error": name, "error_description": "because"})
                )
                done = self.login()
                self.assertEqual(done.returncode, status, done.stderr)
                polls = [x for x in self.github.seen[before:] if x.path == self.poll]
                self.assertEqual(len(polls), 1)
                self.assertEqual(list(self.cache.glob("user-*.json")), [])

    def test_a_code_that_nobody_enters(self) -> None:
        self.github.pending = 1000
        setup = "t = [0.0]\ng.time.monotonic = lambda: t[0]\ndef sleep(s): t[0] += s\ng.time.sleep = sleep"
        done = self.run_it("login", setup=setup)
        self.assertEqual(done.returncode, g.EXPIRED, done.stderr)

    def test_what_cannot_be_limited_is_refused_and_revoked(self) -> None:
        for scope, status in (({11, 12}, g.TOO_WIDE), ({12}, g.TOO_WIDE), (set(), g.NOT_INSTALLED)):
            self.github.device_scope = scope
            done = self.login()
            self.assertEqual(done.returncode, status, done.stderr)
            self.assertEqual(self.github.seen[-1].path, "/api/v3/credentials/revoke")
            self.assertEqual(self.github.tokens, {})
        for code in (
            {"interval": -1},
            {"interval": "x"},
            {"expires_in": None},
            {"expires_in": "nan"},
        ):
            self.github.device_scope = {11}
            data = {**self.github.login("/login/device/code", {}).value, **code}
            self.github.on("/login/device/code", Reply(200, data))
            self.assertNotIn("Traceback", self.login().stderr)
            shutil.rmtree(self.cache)
        self.github.replies.clear()
        for grant in ({"access_token": "gho_" + "x" * 36, "expires_in": 1, "refresh_token": "ghr_" + "x" * 36},
                      {"access_token": "ghu_" + "x" * 36}):  # fmt: skip
            self.github.on(self.poll, Reply(200, grant))
            self.assertEqual(self.login().returncode, g.TOO_WIDE)
        self.github.on(
            "/login/device/code",
            Reply(
                200,
                {
                    "device_code": "d",
                    "user_code": "EVIL-1234",
                    "verification_uri": "https://evil.example/x",
                },
            ),
        )
        done = self.login()
        self.assertEqual(done.returncode, g.NETWORK)
        self.assertNotIn("EVIL-1234", done.stderr)
        self.assertEqual(list(self.cache.glob("user-*.json")), [])

    def test_a_private_repository_needs_its_id(self) -> None:
        self.github.on("/api/v3/repos/octo/widgets", error(404, "Not Found"))
        self.fails(self.login(), g.USAGE, "--repo-id")
        self.assertEqual(self.login("--repo-id", "11").returncode, 0)
        self.fails(self.login("--app-id", "1234"), g.DEVICE_FLOW, "client id")

    def test_nothing_but_login_starts_a_device_flow(self) -> None:
        self.fails(self.run_it("token"), g.LOGIN, "login --repo octo/widgets")
        asked = f"protocol=http\nhost=localhost:{self.github.server_port}\npath=octo/widgets\n\n"
        done = self.run_it("git-credential", "get", data=asked.encode())
        self.assertEqual((done.returncode, done.stdout), (g.LOGIN, "quit=1\n"))
        self.assertEqual(self.run_it("status").returncode, g.LOGIN)
        self.assertEqual(self.github.seen, [])

    def test_secrets_given_in_the_wrong_place_are_not_shown(self) -> None:
        key = "LS0tLS1CRUdJTiBQUklWQVRF" * 40
        done = self.run_it("token", "--permissions", "dev", GITHUB_APP_KEY=key)
        self.fails(done, g.KEY, "cannot read the file that it names")
        self.assertNotIn(key[:24], done.stderr)
        done = self.token(GITHUB_APP_PASSPHRASE="hunter2-horse")
        self.assertNotIn("hunter2", done.stderr)
        config = Path(self.env["HOME"]) / ".config/github-app-token.ini"
        config.parent.mkdir(exist_ok=True)
        config.write_text("[w]\nkey = -----BEGIN\nMIIEowIBAAKC\n")
        config.chmod(0o600)
        done = self.run_it("token", "--profile", "w")
        self.fails(done, g.USAGE, "line 3")
        self.assertNotIn("MIIE", done.stderr)

    def test_an_unchecked_token_is_not_given_out_when_the_next_refresh_fails(self) -> None:
        self.login()
        self.store(expires_at=time.time() - 1)
        self.github.on("/api/v3/user/installations", error(404, "Not Found"))
        self.assertEqual(self.run_it("token").returncode, 1)
        self.github.on(self.poll, error(502, ""))
        done = self.run_it("token")
        self.assertEqual((done.returncode, done.stdout), (g.SERVER, ""))

    def test_a_refused_token_is_not_given_out_when_its_refresh_fails(self) -> None:
        self.login()
        refused = hashlib.sha256(self.stored()["token"].encode()).hexdigest()
        self.github.on(self.poll, error(502, ""))
        done = self.run_it("token", GITHUB_TOKEN_REFUSED=refused)
        self.assertEqual((done.returncode, done.stdout), (g.SERVER, ""))

    def test_permissions_are_not_ignored_by_a_login(self) -> None:
        self.fails(self.login("--permissions", "read"), g.USAGE, "only with --key")
        self.assertEqual(self.login().returncode, 0)
        self.fails(self.run_it("token", "--permissions", "read"), g.USAGE, "only with --key")
        self.fails(self.run_it("token", GITHUB_APP_KEY=""), g.USAGE, "GITHUB_APP_KEY")
        self.passes(self.run_it("token", "--permissions", "inherit"))

    def test_25_at_once_refresh_once(self) -> None:
        self.login()
        self.store(expires_at=time.time() + 10)
        children = [
            subprocess.Popen(
                self.command("token"), env=self.env, stdout=subprocess.PIPE, stderr=subprocess.PIPE
            )
            for _ in range(25)
        ]
        answers = [child.communicate(timeout=60) for child in children]
        tokens = {out for out, _ in answers}
        self.assertEqual(len(tokens), 1, answers)
        refreshes = [
            x
            for x in self.github.seen
            if x.path == self.poll and x.body["grant_type"] == "refresh_token"
        ]
        self.assertEqual(len(refreshes), 1)

    def test_refreshes_that_fail(self) -> None:
        self.login()
        self.store(expires_at=time.time() + 100)
        self.github.on(self.poll, error(500, ""))
        done = self.run_it("token")
        self.passes(done)
        self.assertIn("not renewed yet", done.stderr)
        self.store(expires_at=time.time() - 100)
        self.fails(self.run_it("token"), g.SERVER)
        self.github.on(self.poll, Reply(200, {"error": "bad_refresh_token"}))
        self.fails(self.run_it("token"), g.LOGIN, "login")
        self.assertEqual(list(self.cache.glob("user-*.json")), [])

    def test_a_refresh_that_was_killed_is_recognised(self) -> None:
        self.login()
        self.store(expires_at=time.time() - 1)
        kill = "def killed(*a): g.os.kill(g.os.getpid(), 9)\ng.user_token = killed"
        done = self.run_it("token", setup=kill)
        self.assertEqual(done.returncode, -signal.SIGKILL)
        self.fails(self.run_it("token"), g.LOGIN, "answer was lost")

    def test_ctrl_c_waits_for_the_end_of_a_refresh(self) -> None:
        self.login()
        self.store(expires_at=time.time() - 1)
        setup = "old = g.user_token\ndef slow(*a):\n    g.os.kill(g.os.getpid(), 2)\n    return old(*a)\ng.user_token = slow"
        self.assertEqual(self.run_it("token", setup=setup).returncode, 130)
        self.assertIn(self.stored()["token"], self.github.tokens)
        self.passes(self.run_it("token"))
        self.assertFalse(self.stored()["refreshing"])

    def test_a_refreshed_token_is_not_given_out_before_its_scope_is_checked(self) -> None:
        self.login()
        self.store(expires_at=time.time() - 1)
        self.github.on("/api/v3/user/installations", error(404, "Not Found"))
        self.assertEqual(self.run_it("token").returncode, 1)
        self.assertEqual(self.run_it("token").returncode, 1)
        self.github.replies.clear()
        self.assertIn(self.passes(self.run_it("token")), self.github.tokens)
        self.github.device_scope = {11, 12}
        self.store(expires_at=time.time() - 1)
        self.fails(self.run_it("token"), g.TOO_WIDE)
        self.assertEqual(self.github.tokens, {})

    def test_a_login_that_cannot_be_checked_does_not_live_on(self) -> None:
        for path in ("/api/v3/user/installations", "/api/v3/user"):
            for reply in (
                Reply(200, {"installations": [7], "login": 7}),
                error(500, ""),
                Reply(200, b"<html>"),
            ):
                self.github.replies.clear()
                self.github.tokens.clear()
                shutil.rmtree(self.cache, ignore_errors=True)
                self.github.on(path, reply)
                done = self.login()
                if done.returncode:
                    self.assertEqual(self.github.tokens, {}, (path, done.stderr))
                    self.assertEqual(list(self.cache.glob("user-*.json")), [])

    def test_without_a_place_to_store_it_no_refresh_is_begun(self) -> None:
        self.login()
        self.store(expires_at=time.time() - 1)
        before = len(self.github.seen)
        setup = "import tempfile\ndef full(**k): raise OSError(28, 'No space left on device')\ntempfile.mkstemp = full"
        self.fails(self.run_it("token", setup=setup), g.CACHE, "No space")
        self.assertEqual(len(self.github.seen), before)

    def test_ctrl_c_while_waiting(self) -> None:
        self.github.pending = 1000
        child = subprocess.Popen(
            self.command("login"), env=self.env, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL
        )
        assert child.stderr
        self.assertIn(b"ABCD-1234", child.stderr.readline())
        child.send_signal(signal.SIGINT)
        self.assertEqual(child.wait(TIMEOUT), 130)
        self.assertNotIn(b"Traceback", child.stderr.read())
        child.stderr.close()
        self.assertEqual(list(self.cache.glob("user-*.json")), [])

    def test_logout(self) -> None:
        self.login()
        token, refresh = self.stored()["token"], self.stored()["refresh_token"]
        self.assertEqual(self.run_it("logout").returncode, 0)
        self.assertEqual(self.github.seen[-1].body, {"credentials": [token, refresh]})
        self.assertEqual(list(self.cache.glob("user-*.json")), [])
        self.assertEqual(self.run_it("logout").returncode, 0)


class CommandTest(Case):
    def test_revoke(self) -> None:
        argv = ("revoke", "--key", str(self.key), "--permissions", "dev")
        token = self.passes(self.token())
        self.assertEqual(self.run_it(*argv).returncode, 0)
        self.assertNotIn(token, self.github.tokens)
        self.passes(self.token())
        self.github.tokens.clear()
        self.assertEqual(self.run_it(*argv).returncode, 0, "an expired token is none")
        self.assertEqual(self.run_it(*argv).returncode, 0)

    def test_status(self) -> None:
        self.github.clock = 100
        token = self.passes(self.token())
        argv = ("status", "--key", str(self.key), "--permissions")
        done = self.run_it(*argv, "dev")
        self.assertEqual(done.returncode, 0, done.stdout)
        for word in (
            "RSA 2048, SHA256:",
            "our-app",
            "clock offset ",
            "octo/widgets",
            "contents:write",
        ):
            self.assertIn(word, done.stdout)
        self.assertNotIn(token, done.stdout)
        done = self.run_it(*argv, "workflows:write", "--format", "json")
        findings = json.loads(done.stdout)["findings"]
        self.assertEqual((done.returncode, findings[-1]["ok"]), (g.PERMISSION, False))
        self.assertIn("accept", findings[-1]["hint"])
        done = self.run_it("status", "--key", "/nonexistent", "--permissions", "dev")
        self.assertEqual(done.returncode, g.KEY)
        self.assertIn("FAIL", done.stdout)

    def test_git_asks_and_gets(self) -> None:
        host = f"localhost:{self.github.server_port}"
        ours = f"protocol=http\nhost={host}\npath=octo/widgets"
        key = ("--key", str(self.key), "--permissions", "dev")

        def ask(action: str, text: str) -> str:
            return self.passes(
                self.run_it("git-credential", *key, action, data=text.encode() + b"\n\n")
            )

        for text in (
            ours.replace(host, "evil.example"), ours.replace("http", "https"), ours.replace("widgets", "other"),
            ours.replace("widgets", "widgets2"), f"protocol=http\nhost={host}", "",
        ):  # fmt: skip
            self.assertEqual(ask("get", text), "", text)
        self.assertEqual(self.github.seen, [])
        for suffix in ("", ".git", "/", ".git/info/lfs", ".wiki.git"):
            answer = dict(
                line.split("=")
                for line in ask("get", ours.replace("octo", "OCTO") + suffix).splitlines()
            )
            self.assertEqual(answer["username"], "x-access-token")
            self.assertIn(answer["password"], self.github.tokens)
            self.assertGreater(int(answer["password_expiry_utc"]), time.time())
        self.assertEqual(ask("store", ours + "\npassword=x"), "")
        ask("erase", ours + "\npassword=another")
        self.assertEqual(len(list(self.cache.glob("installation-*.json"))), 1)
        ask("erase", ours + f"\npassword={answer['password']}")
        self.assertEqual(list(self.cache.glob("installation-*.json")), [])
        done = self.run_it("git-credential", *key, "get", data=(ours + "\r\n\n").encode())
        self.assertEqual(done.returncode, g.USAGE)

    def test_git_itself(self) -> None:
        """git fill asks the helper for this repository, and is told to quit when there is no token."""
        if not shutil.which("git"):
            self.skipTest("git is not on PATH")
        url = f"{self.github.url}/octo/widgets.git"
        helper = f"!{sys.executable} {SCRIPT} git-credential --key {self.key} --permissions dev"
        config = [
            "-c",
            f"credential.{self.github.url}.useHttpPath=true",
            "-c",
            f"credential.{self.github.url}.helper={helper}",
        ]
        asked = f"url={url}\n\n".encode()
        env = {**self.env, "GIT_TERMINAL_PROMPT": "0", "GIT_CONFIG_NOSYSTEM": "1"}
        done = subprocess.run(
            ["git", *config, "credential", "fill"],
            env=env,
            input=asked,
            capture_output=True,
            timeout=TIMEOUT,
        )
        self.assertIn(b"username=x-access-token", done.stdout)
        shutil.rmtree(self.cache)
        self.github.suspended = True
        done = subprocess.run(
            ["git", *config, "credential", "fill"],
            env=env,
            input=asked,
            capture_output=True,
            timeout=TIMEOUT,
        )
        self.assertEqual(done.returncode, 128)
        self.assertIn(b"suspended", done.stderr)

    def test_a_clone(self) -> None:
        """401, get, 200; with a token that has died meanwhile: 401, erase, and get again."""
        if not shutil.which("git"):
            self.skipTest("git is not on PATH")
        bare = self.home / "served/octo/widgets.git"
        env = {**self.env, "GIT_TERMINAL_PROMPT": "0", "GIT_CONFIG_NOSYSTEM": "1"}

        def git(*argv: str) -> subprocess.CompletedProcess[bytes]:
            return subprocess.run(["git", *argv], env=env, capture_output=True, timeout=TIMEOUT)

        git("init", "-q", "--bare", str(bare))
        self.github.git_root = str(self.home / "served")
        url = f"{self.github.url}/octo/widgets.git"
        helper = f"!{sys.executable} {SCRIPT} git-credential --key {self.key} --permissions dev"
        git("config", "--global", f"credential.{self.github.url}.useHttpPath", "true")
        git("config", "--global", f"credential.{url}.helper", helper)
        done = git("clone", url, str(self.home / "one"))
        self.assertEqual(done.returncode, 0, done.stderr)
        self.github.tokens.clear()
        self.assertEqual(git("clone", url, str(self.home / "two")).returncode, 128)
        done = git("clone", url, str(self.home / "two"))
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertEqual(len(self.github.paths("POST")), 2, "two tokens")

    def test_profiles(self) -> None:
        folder = self.home / ".config"
        folder.mkdir()
        ini = folder / "github-app-token.ini"
        ini.write_text(
            f"[w]\nrepo = octo/widgets\napp_id = Iv1.x\nkey = {self.key}\npermissions = read\napi_url = {self.github.url}\n"
        )
        env: Any = {"GITHUB_APP_API_URL": "", "GITHUB_APP_ID": "", "GITHUB_APP_REPO": ""}
        self.passes(self.run_it("token", "--profile", "w", **env))
        self.assertEqual(self.github.seen[-1].body["permissions"]["contents"], "read")
        self.passes(
            self.run_it("token", GITHUB_APP_PROFILE="w", GITHUB_APP_PERMISSIONS="dev", **env)
        )
        self.assertEqual(self.github.seen[-1].body["permissions"]["contents"], "write")
        self.fails(self.run_it("token", "--profile", "x", **env), g.USAGE, "[x]")
        ini.write_text("[w]\ntoken = x\n")
        self.fails(self.run_it("token", "--profile", "w", **env), g.USAGE, "token is not a setting")
        ini.write_text("[w]\nMIIEvQIBADANBgkqhkiG9w0BAQ = x\n")
        done = self.run_it("token", "--profile", "w", **env)
        self.fails(done, g.USAGE, "a line is not a setting")
        ini.chmod(0o666)
        self.fails(self.run_it("token", "--profile", "w", **env), g.USAGE, "chmod go-w")
        ini.unlink()
        os.mkfifo(ini, 0o600)
        self.fails(self.run_it("token", "--profile", "w", **env), g.USAGE, "is not a file")

    def test_settings_of_the_folder_it_is_run_in_do_not_count(self) -> None:
        here = self.home / "project"
        (here / "conf").mkdir(parents=True)
        (here / "conf/github-app-token.ini").write_text("[w]\nkey = command:touch pwned\n")
        env = {
            **self.env,
            "XDG_CONFIG_HOME": "conf",
            "XDG_STATE_HOME": "state",
            "PATH": f".:{self.env['PATH']}",
        }
        self.write("project/openssl", b"#!/bin/sh\ntouch pwned\n", 0o700)
        for argv in (["--profile", "w"], []):
            command = self.command("token", "--key", str(self.key), "--permissions", "dev", *argv)
            done = subprocess.run(command, env=env, cwd=here, capture_output=True, timeout=TIMEOUT)
            self.assertIn(done.returncode, (g.USAGE, g.SIGNER), done.stderr)
        self.assertEqual(sorted(os.listdir(here)), ["conf", "openssl"])

    def test_wrong_flags_and_help(self) -> None:
        self.assertEqual(self.run_it("--nonsense").returncode, 2)
        self.assertEqual(self.run_it("token", "--token", "x").returncode, 2)
        pasted = "ghp_" + "x1" * 18
        self.assertNotIn(pasted, self.run_it("token", pasted).stderr)
        self.fails(self.token("--repo", "https://ghe.example/octo/widgets"), g.USAGE, "ghe.example")
        self.fails(self.token("--permissions", ""), g.USAGE, "--permissions")
        with open("/dev/full", "w") as full:
            argv = self.command("token", "--key", str(self.key), "--permissions", "dev")
            done = subprocess.run(
                argv, env=self.env, stdout=full, stderr=subprocess.PIPE, text=True
            )
        self.assertEqual((done.returncode, done.stderr.count("\n")), (1, 1), done.stderr)
        for id in ("0", "9" * 5000, "-1", "\u0663"):
            self.fails(self.token(f"--repo-id={id}"), g.USAGE, "--repo-id is a number")
        self.fails(self.token("--repo", "o/\xfc", PYTHONIOENCODING="ascii"), g.USAGE)
        done = self.run_it("git-credential", "get", data=b"host=\xff\n", PYTHONIOENCODING="utf-8")
        self.assertIn(done.returncode, (0, 1, 2))
        self.assertEqual(self.run_it().returncode, 2)
        self.assertIn(g.__version__, self.run_it("--version").stdout)
        for verb in ("token", "login", "logout", "status", "revoke", "git-credential"):
            self.assertIn("--repo", self.run_it(verb, "--help").stdout)

    def test_copied_alone(self) -> None:
        folder = self.home / "alone"
        folder.mkdir()
        script = Path(shutil.copy(SCRIPT, folder))
        done = subprocess.run([sys.executable, str(script), "token", "--key", str(self.key), "--permissions", "dev"],
                              env=self.env, capture_output=True, timeout=TIMEOUT)  # fmt: skip
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertEqual(os.listdir(folder), [script.name])


class ProxyTest(Case):
    """With github_mcp_proxy.py, whose --token-command it is; the upstream takes live tokens only."""

    def accept(self, upstream: mcp_upstream.Upstream) -> set[str]:
        """The headers that have been accepted so far."""
        used: set[str] = set()

        def live() -> set[str]:
            lines = {
                f"Bearer {one}"
                for one, end in list(self.github.tokens.items())
                if end > time.time()
            }
            used.update(lines)
            return lines

        upstream.tokens = set()
        upstream.accepted_lines = live  # type: ignore[method-assign]
        return used

    def started(
        self,
        upstream: mcp_upstream.Upstream,
        *argv: str,
        script: Path = ROOT / "github_mcp_proxy.py",
    ) -> tuple[Client, Proxy]:
        command = f"{sys.executable} {SCRIPT} token --key {self.key} --permissions dev --format json {' '.join(argv)}"
        env: Any = self.env
        running = Proxy(upstream.url, "--token-command", command, script=script, **env)
        self.addCleanup(running.stop)
        client = Client(running.port)
        self.addCleanup(client.close)
        return client, running

    def test_the_vm_does_not_notice_that_a_token_expires(self) -> None:
        """Tokens that live two seconds, for an hour's; each is dead when it has expired."""
        self.github.life = 2.0
        quick = self.write(
            "proxy.py",
            f"import sys; sys.path.insert(0, {str(ROOT)!r})\nimport github_mcp_proxy as p\n"
            "p.TOKEN_MARGIN = 1\nsys.exit(p.main())\n".encode(),
        )
        with mcp_upstream.Upstream() as upstream:
            used = self.accept(upstream)
            client, running = self.started(upstream, "--min-ttl 1s", script=quick)
            until = time.monotonic() + 6
            while time.monotonic() < until:
                self.assertEqual(text_of(client.ask(call())), "ok get_file_contents")
                time.sleep(0.05)
            self.assertGreater(len(used), 3)
            self.assertNotIn("failed", running.stderr())

    def test_a_token_that_github_revoked_is_replaced(self) -> None:
        """The cache still has it; the proxy says that it is dead."""
        with mcp_upstream.Upstream() as upstream:
            self.accept(upstream)
            client, _ = self.started(upstream)
            self.assertEqual(text_of(client.ask(call())), "ok get_file_contents")
            self.github.tokens.clear()
            self.assertEqual(text_of(client.ask(call())), "ok get_file_contents")
            self.assertEqual(len(self.github.paths("POST")), 2)


class PureTest(unittest.TestCase):
    def test_addresses(self) -> None:
        for text, api, oauth in (
            ("github.com", "https://api.github.com", "https://github.com"),
            ("https://api.github.com/", "https://api.github.com", "https://github.com"),
            ("sub.ghe.com", "https://api.sub.ghe.com", "https://sub.ghe.com"),
            ("https://api.sub.ghe.com", "https://api.sub.ghe.com", "https://sub.ghe.com"),
            ("ghe.example", "https://ghe.example/api/v3", "https://ghe.example"),
            ("api.ghe.example", "https://api.ghe.example/api/v3", "https://api.ghe.example"),
            (
                "https://ghe.example:8443/api/v3",
                "https://ghe.example:8443/api/v3",
                "https://ghe.example:8443",
            ),
        ):
            config = g.Config(g.parse_api_url(text), "x", ("o/r",), 0, None, "", "", "", 1)
            self.assertEqual((config.api_url, config.oauth_url), (api, oauth))
        for text in ("http://github.com", "ftp://x", "a b", "https://u@github.com", "github.com/x"):
            with self.subTest(text), self.assertRaises(g.Failure):
                g.parse_api_url(text)

    def test_repositories(self) -> None:
        for text in ("o/r", "https://github.com/o/r", "https://github.com/o/r.git", "o/r/"):
            self.assertEqual(g.parse_repo(text), "o/r")
        for text in ("o", "o/", "/r", "o/..", "o/r/x", "o/r%2fx", "-o/r", "o/r x"):
            with self.subTest(text), self.assertRaises(g.Failure):
                g.parse_repo(text)

    def test_permissions(self) -> None:
        self.assertEqual(g.parse_permissions(""), None)
        self.assertEqual(g.parse_permissions("inherit"), ())
        self.assertEqual(g.parse_permissions("read, checks:read"), (
            ("checks", "read"), ("contents", "read"), ("issues", "read"), ("pull_requests", "read")))  # fmt: skip
        asked = {"contents": "write", "issues": "read"}
        g.check_permissions(asked, {**asked, "metadata": "read"})
        g.check_permissions({}, {"anything": "admin"})
        for granted, status in (
            ({**asked, "issues": "write"}, g.TOO_WIDE), ({**asked, "new": "read"}, g.TOO_WIDE),
            ({**asked, "contents": "root"}, g.TOO_WIDE), ({"contents": "write"}, g.PERMISSION),
            ({**asked, "contents": "read"}, g.PERMISSION),
        ):  # fmt: skip
            with self.subTest(granted), self.assertRaises(g.Failure) as caught:
                g.check_permissions(asked, granted)
            self.assertEqual(caught.exception.status, status)

    def test_no_secret_survives_the_redactor(self) -> None:
        for secret in (
            "ghp_" + "aB3" * 12, "gho_" + "x" * 36, "ghu_" + "y" * 36, "ghr_" + "z" * 76, "ghs_1_eyJ-._" + "-a_b.c" * 80,
            "github_pat_" + "A1_" * 27, "eyJhbGciOi.eyJpc3MiOi-_x.sig-_natureXX",
            "-----BEGIN RSA PRIVATE KEY-----\nMIIEow\nIBAAKC\n-----END RSA PRIVATE KEY-----",
            "-----BEGIN PRIVATE KEY-----\ncut off here",
        ):  # fmt: skip
            shown = g.redact(f"before {secret} after")
            for at in range(len(secret) - 8):
                self.assertNotIn(
                    secret[at : at + 8], shown.replace("before ", "").replace(" after", "")
                )
        self.assertEqual(g.redact("https://u:p@host/ x\x1b[2J"), "https://[redacted]host/ x [2J")
        self.assertEqual(
            repr(g.Token("ghs_" + "x" * 36, "installation", 0, 0, "", [], {})), "<token ghs_…xxxx>"
        )


if __name__ == "__main__":
    unittest.main()
