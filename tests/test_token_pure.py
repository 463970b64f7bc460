"""What github_app_token.py decides without touching anything: tables."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import time
import unittest
from typing import Any

import github_app_token as g

FAST = True

NOW = 1_800_000_000.0
IN_AN_HOUR = "2027-01-15T09:00:00Z"
TOKEN = "ghs_" + "x" * 36


def config(**changes: Any) -> g.Config:
    asked = g.Config(
        api_url="https://api.github.com", app_id="Iv1", repo="octo/widgets", repo_id=0,
        permissions={"contents": "write"}, key="app.pem", ca_file="",
    )  # fmt: skip
    return asked._replace(**changes)


def grant(**changes: Any) -> dict[str, Any]:
    return {
        "token": TOKEN,
        "expires_at": IN_AN_HOUR,
        "permissions": {"contents": "write", "metadata": "read"},
        "repository_selection": "selected",
        "repositories": [{"id": 11, "full_name": "octo/widgets"}],
        **changes,
    }


class Table(unittest.TestCase):
    def refuses(self, status: int, word: str, function: Any, *argv: Any) -> None:
        with self.subTest(word, argv=str(argv)[:200]), self.assertRaises(g.Failure) as caught:
            function(*argv)
        failure = caught.exception
        self.assertEqual(failure.status, status, failure)
        self.assertIn(word, f"{failure} {failure.hint}")


class AskedTest(Table):
    def test_addresses(self) -> None:
        for text, api, oauth in (
            ("github.com", "https://api.github.com", "https://github.com"),
            ("https://api.github.com/", "https://api.github.com", "https://github.com"),
            ("sub.ghe.com", "https://api.sub.ghe.com", "https://sub.ghe.com"),
            ("https://api.sub.ghe.com", "https://api.sub.ghe.com", "https://sub.ghe.com"),
            ("ghe.example", "https://ghe.example/api/v3", "https://ghe.example"),
            ("api.ghe.example", "https://api.ghe.example/api/v3", "https://api.ghe.example"),
            ("https://ghe.example:8443/api/v3", "https://ghe.example:8443/api/v3", "https://ghe.example:8443"),
        ):  # fmt: skip
            given = g.parse_api_url(text)
            self.assertEqual((given, g.oauth_url_of(given)), (api, oauth))
        self.refuses(g.USAGE, "https", g.parse_api_url, "http://github.com")
        for text in ("ftp://x", "a b", "https://u@github.com", "github.com/x"):
            self.refuses(g.USAGE, "not an address", g.parse_api_url, text)

    def test_permissions(self) -> None:
        self.assertEqual(g.parse_permissions(""), {})
        self.assertEqual(
            g.parse_permissions("read, checks:read"),
            {"contents": "read", "issues": "read", "pull_requests": "read", "checks": "read"},
        )
        for text in ("contents:all", "inherit", "all", "contents", "Contents:read", ":read"):
            self.refuses(g.USAGE, "is not a permission", g.parse_permissions, text)

    def test_neither_more_nor_less_is_granted(self) -> None:
        asked = {"contents": "write", "issues": "read"}
        g.check_permissions(asked, {**asked, "metadata": "read"})
        for word, granted in (
            ("more than asked (issues:write)", {**asked, "issues": "write"}),
            ("more than asked (new:read)", {**asked, "new": "read"}),
            ("more than asked (contents:root)", {**asked, "contents": "root"}),
            ("more than asked (metadata:write)", {**asked, "metadata": "write"}),
            ("did not grant issues:read", {"contents": "write"}),
            ("did not grant contents:write", {**asked, "contents": "read"}),
        ):  # fmt: skip
            self.refuses(g.MEND, word, g.check_permissions, asked, granted)


class GrantedTest(Table):
    def test_what_was_asked_for_is_taken(self) -> None:
        for pinned in (0, 11):
            token = g.parse_installation_token(grant(), config(), pinned, NOW)
            self.assertEqual((token.token, token.repo_id, token.withheld), (TOKEN, 11, False))
            self.assertEqual(token.expires_at, NOW + 3600)
        other_case = config(repo="Octo/Widgets")
        self.assertEqual(g.parse_installation_token(grant(), other_case, 0, NOW).repo_id, 11)

    def test_what_was_not_is_refused(self) -> None:
        one, two = grant()["repositories"][0], {"id": 12, "full_name": "octo/other"}
        for status, word, pinned, change in (
            (g.MEND, "octo/other, octo/widgets", 0, {"repositories": [one, two]}),
            (g.MEND, "octo/other, octo/widgets", 11, {"repositories": [one, two]}),
            (g.MEND, "a token for octo/widgets", 0, {"repository_selection": "all"}),
            (g.MEND, "all of the installation", 0, {"repositories": []}),
            (g.MEND, "all of the installation", 0, {"repositories": None}),
            (g.MEND, "calls this one octo/other now", 0, {"repositories": [two]}),
            (g.MEND, "number 12 and not 11", 11, {"repositories": [two]}),
            (g.MEND, "--repo octo/gadgets", 11, {"repositories": [{"id": 11, "full_name": "octo/gadgets"}]}),
            (g.MEND, "workflows:write", 0, {"permissions": {"contents": "write", "workflows": "write"}}),
            (g.MEND, "did not grant contents:write", 0, {"permissions": {"metadata": "read"}}),
            (g.FAILED, "does not live an hour", 0, {"expires_at": "2027-01-15T07:59:00Z"}),
            (g.FAILED, "does not live an hour", 0, {"expires_at": "2027-01-15T10:00:00Z"}),
            (g.FAILED, "no usable token", 0, {"expires_at": 7}),
            (g.FAILED, "no usable token", 0, {"expires_at": "soon"}),
            (g.FAILED, "no usable token", 0, {"permissions": None}),
            (g.FAILED, "no usable token", 0, {"repositories": 7}),
            (g.FAILED, "no usable token", 0, {"repositories": [{"id": 11}]}),
            (g.FAILED, "no usable token", 0, {"repositories": [7]}),
            (g.FAILED, "no usable token", 0, {"repositories": [{**one, "id": 1e400}]}),
            (g.FAILED, "no usable token", 0, {"token": "short"}),
            (g.FAILED, "no usable token", 0, {"token": "a b" * 10}),
            (g.FAILED, "no usable token", 0, {"token": "x" * 5000}),
            (g.FAILED, "no usable token", 0, {"token": 7}),
            (g.FAILED, "no usable token", 0, {"token": None}),
        ):  # fmt: skip
            self.refuses(
                status, word, g.parse_installation_token, grant(**change), config(), pinned, NOW
            )

    def test_a_login_is_limited_and_ends(self) -> None:
        good = {"access_token": "ghu_" + "x" * 36, "expires_in": 28800,
                "refresh_token": "ghr_" + "x" * 36}  # fmt: skip
        token = g.parse_login_token(good, NOW)
        self.assertEqual((token.withheld, token.expires_at), (True, NOW + 28800))
        for status, word, change in (
            (g.MEND, "never expire", {"expires_in": None}),
            (g.MEND, "never expire", {"refresh_token": ""}),
            (g.FAILED, "no usable token", {"expires_in": "soon"}),
            (g.FAILED, "no usable token", {"expires_in": 1e400}),
            (g.FAILED, "no usable token", {"expires_in": -1}),
            (g.FAILED, "no usable token", {"refresh_token": 7}),
            (g.FAILED, "no usable token", {"access_token": None}),
        ):  # fmt: skip
            self.refuses(status, word, g.parse_login_token, {**good, **change}, NOW)

    def test_a_login_reaches_one_repository(self) -> None:
        self.assertEqual(g.check_reach({11: "octo/widgets"}, 11, config()), "octo/widgets")
        for word, found in (
            ("calls this one octo/gadgets now", {11: "octo/gadgets"}),
            ("reaches 0 repositories", {}),
            ("reaches 1 repositories", {12: "octo/other"}),
            ("reaches 2 repositories", {11: "octo/widgets", 12: "octo/other"}),
            ("reaches 2 repositories", {11: "octo/widgets", 0: "the next page"}),
        ):  # fmt: skip
            self.refuses(g.MEND, word, g.check_reach, found, 11, config())

    def test_polls(self) -> None:
        self.assertEqual(g.device_step({"access_token": "x"}, 5), ("done", 0))
        self.assertEqual(g.device_step({"error": "authorization_pending"}, 5), ("wait", 5))
        for interval, wait in ((5, 10), (10, 15), (1e9, 300)):  # RFC 8628, 3.5: 5 s more
            self.assertEqual(g.device_step({"error": "slow_down"}, interval), ("wait", wait))
        for status, word, name in (
            (g.LOGIN, "denied", "access_denied"),
            (g.LOGIN, "expired", "expired_token"),
            (g.LOGIN, "expired", "token_expired"),
            (g.MEND, "Device Flow enabled", "device_flow_disabled"),
            (g.MEND, "must be the client id", "incorrect_client_credentials"),
            (g.MEND, "unheard_of", "unheard_of"),
        ):  # fmt: skip
            self.refuses(status, word, g.device_step, {"error": name}, 5)

    def test_rate_limits(self) -> None:
        def reply(status: int, message: str = "", **headers: str) -> g.Reply:
            data = {"message": message}
            named = {name.replace("_", "-"): value for name, value in headers.items()}
            return g.Reply(status, named, data)

        for limited, given in (
            (False, reply(200)), (False, reply(403, "no")), (False, reply(404, "rate limit")),
            (True, reply(429)), (True, reply(403, "You have exceeded a secondary rate limit")),
            (True, reply(403, x_ratelimit_remaining="0")),
            (False, reply(200, x_ratelimit_remaining="0")),
        ):  # fmt: skip
            self.assertEqual(g.rate_limited(given), limited, given)

    def test_what_is_cached_is_used_while_it_is_good(self) -> None:
        token = g.parse_installation_token(grant(), config(), 0, NOW)
        dead = hashlib.sha256(TOKEN.encode()).hexdigest()
        self.assertFalse(g.usable(token, config(), 11, dead, NOW), "GitHub refused it")
        self.assertTrue(g.usable(token, config(), 11, dead[::-1], NOW), "it refused another")
        self.assertTrue(g.usable(token, config(), 0, "", NOW + 3600 - g.MIN_LIFE - 1))
        for why, changed, asked, pinned, now in (
            ("ends soon", token, config(), 11, NOW + 3600 - g.MIN_LIFE),
            ("ends soon by GitHub's clock", token._replace(clock_offset=3500), config(), 11, NOW),
            ("of another repository", token, config(), 12, NOW),
            ("another one is meant now", token, config(accept_new_repo=True), 0, NOW),
            ("being refreshed", token._replace(withheld=True), config(), 11, NOW),
            ("from when the clock was wrong", token, config(), 11, NOW - 700),
            ("it would never end", token._replace(expires_at=1e400), config(key=""), 11, NOW),
        ):  # fmt: skip
            self.assertFalse(g.usable(changed, asked, pinned, "", now), why)

    def test_what_a_file_holds(self) -> None:
        good = g.parse_installation_token(grant(), config(), 0, NOW)._asdict()
        self.assertEqual(g.parse_cached(good).token, TOKEN)
        changes: list[dict[str, Any]] = [
            {"token": "ghs x"}, {"token": None}, {"unknown": 1}, {"expires_at": "x"},
            {"clock_offset": None}, {"refresh_token": 1}, {"expires_at": 10**400},
            {"permissions": []}, {"repo": 5}, {"login": None}, {"withheld": 0}, {"repo_id": "11"},
        ]  # fmt: skip
        for change in changes:
            with self.subTest(change), self.assertRaises((TypeError, ValueError)):
                g.parse_cached({**good, **change})


class TextTest(Table):
    def test_no_secret_survives_the_redactor(self) -> None:
        for secret in (
            "ghp_" + "aB3" * 12, "gho_" + "x" * 36, "ghu_" + "y" * 36, "ghr_" + "z" * 76, "ghs_1_eyJ-._" + "-a_b.c" * 80,
            "github_pat_" + "A1_" * 27, "eyJhbGciOi.eyJpc3MiOi-_x.sig-_natureXX",
            "-----BEGIN RSA PRIVATE KEY-----\nMIIEow\nIBAAKC\n-----END RSA PRIVATE KEY-----",
            "-----BEGIN PRIVATE KEY-----\ncut off here",
        ):  # fmt: skip
            shown = g.redact(f"before {secret} after")
            rest = shown.replace("before ", "").replace(" after", "")
            for at in range(len(secret) - 8):
                self.assertNotIn(secret[at : at + 8], rest)
        self.assertEqual(g.redact("https://u:p@host/ x\x1b[2J"), "https://[redacted]host/ x [2J")
        token = g.parse_installation_token(grant(), config(), 0, NOW)
        self.assertEqual(repr(token), "<token ghs_…xxxx>")

    def test_a_megabyte_of_anything_is_redacted_at_once(self) -> None:
        for text in (
            "eyJ",
            "://",
            "gh",
            "ghp_",
            "-----BEGIN PRIVATE KEY-----",
            "-----END",
            "github_pat_",
            "a",
        ):
            began = time.process_time()
            g.redact(text * (1_000_000 // len(text)))
            self.assertLess(time.process_time() - began, 0.1, text)


class KeyTextTest(Table):
    block = "-----BEGIN RSA PRIVATE KEY-----\nMIIE\nabcd\n-----END RSA PRIVATE KEY-----\n"

    def test_what_is_mended(self) -> None:
        for text in (
            self.block, self.block.replace("\n", "\r\n"), "\ufeff" + self.block, self.block.strip(),
            self.block.replace("\n", "\\n"), self.block.replace("\n", "\\r\\n"),
            f"Bag Attributes\n  x: y\n{self.block}trailing\n",
        ):  # fmt: skip
            self.assertEqual(g.pem_of(text.encode()), self.block.encode(), text)

    def test_what_is_no_key_is_named(self) -> None:
        for word, text in (
            ("OpenSSH's format", self.block.replace("RSA", "OPENSSH")),
            ("--key agent", self.block.replace("RSA", "ENCRYPTED")),
            ("--key agent", self.block.replace("MIIE", "Proc-Type: 4,ENCRYPTED\n\nMIIE")),
            ("no PEM file", self.block[:40]),
            ("no PEM file", ""),
            ("no PEM file", "SHA256:abcdef="),
            ("no PEM file", self.block.replace("\n", " ")),
        ):  # fmt: skip
            self.refuses(g.MEND, word, g.pem_of, text.encode())

    def test_what_is_signed(self) -> None:
        header, claims = g.signing_input("Iv1", NOW).split(b".")
        self.assertEqual(
            json.loads(base64.urlsafe_b64decode(header + b"==")), {"alg": "RS256", "typ": "JWT"}
        )
        told = json.loads(base64.urlsafe_b64decode(claims + b"=="))
        self.assertEqual(told, {"iat": NOW - 60, "exp": NOW + 300, "iss": "Iv1"})

    def test_strings_of_the_ssh_agent(self) -> None:
        self.assertEqual(g.strings(g.packed(b"ab") + g.packed(b"")), [b"ab", b""])
        for data in (b"\x00", g.packed(b"abc")[:-1], b"\xff" * 8):
            self.refuses(g.MEND, "cut off", g.strings, data)


class ContractTest(unittest.TestCase):
    def test_the_statuses_are_documented(self) -> None:
        for status in (g.FAILED, g.USAGE, g.MEND, g.LATER, g.LOGIN, 130, 143):
            self.assertRegex(g.EPILOG, rf"(?m)\b{status}\b")

    def test_what_starts_is_in_the_docstring(self) -> None:
        named = re.search(r"(?m)^Starts: +(.*)$", g.__doc__ or "")
        assert named
        self.assertEqual(set(named[1].split(", ")), g.STARTS)
        with self.assertRaises(ValueError):
            g.run_child(["true"])


if __name__ == "__main__":
    unittest.main()
