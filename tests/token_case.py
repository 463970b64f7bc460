"""What the tests of github_app_token.py share: a key, a fake GitHub, and ways to start it."""

from __future__ import annotations

import functools
import json
import shutil
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path
from typing import Any

import github_app_token as g
from tests import quick
from tests.fakes.github import GitHub
from tests.quick import BARE
from tests.quick import Result
from tests.quick import Run
from tests.support import ROOT

SCRIPT = ROOT / "github_app_token.py"
TIMEOUT = 30.0
MINT = "/api/v3/app/installations/7/access_tokens"
FOUND = "/api/v3/repos/octo/widgets/installation"
REVOKE = "/api/v3/credentials/revoke"
TAKE_BACK = "/api/v3/installation/token"
POLL = "/login/oauth/access_token"
NO_PAUSE = "g.PAUSE = 0.001\n"
NO_SLEEP = "g.time.sleep = lambda s: print(f'sleep {s:.1f}', file=sys.stderr)\n"
FULL = (
    "import tempfile\n"
    "def full(**k): raise OSError(28, 'No space left on device')\n"
    "tempfile.mkstemp = full\n"
)


def openssl(*argv: str, data: bytes = b"") -> bytes:
    return subprocess.run(["openssl", *argv], input=data, capture_output=True, check=True).stdout


@functools.cache
def key() -> bytes:
    """A private key as GitHub makes them, one for all tests of a process."""
    if not shutil.which("openssl"):
        raise unittest.SkipTest("openssl is not on PATH")
    pem = openssl("genpkey", "-algorithm", "RSA", "-pkeyopt", "rsa_keygen_bits:2048")
    try:
        return openssl("rsa", "-traditional", data=pem)
    except subprocess.CalledProcessError:  # those before OpenSSL 3 know no other form
        return openssl("rsa", data=pem)


def minted(github: GitHub, **changes: Any) -> dict[str, Any]:
    """GitHub's answer to a mint, changed."""
    wanted = {"repositories": ["widgets"], "permissions": g.PRESETS["dev"]}
    return {**github.grant(wanted).value, **changes}


def ctrl_c_at(request: int) -> str:
    """`setup`: Ctrl-C while the answer to that request of the program arrives."""
    return (
        "import signal\nsend = g.GitHub.send\ncount = [0]\n"
        "def cut(*a):\n reply = send(*a); count[0] += 1\n"
        f" if count[0] == {request}: os.kill(os.getpid(), signal.SIGINT)\n"
        " return reply\ng.GitHub.send = cut\n"
    )


def ctrl_c_in(function: str) -> str:
    """`setup`: Ctrl-C as soon as that function is called."""
    return (
        f"import signal\ncalled = g.{function}\n"
        "def cut(*a):\n os.kill(os.getpid(), signal.SIGINT)\n return called(*a)\n"
        f"g.{function} = cut\n"
    )


class Case(unittest.TestCase):
    """A fake GitHub, an empty HOME with a key and a profile `w` in it, and the program."""

    github: GitHub

    @classmethod
    def setUpClass(cls) -> None:
        key()
        cls.github = GitHub()
        cls.addClassCleanup(cls.github.__exit__)

    def setUp(self) -> None:
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.home = Path(folder.name)
        self.github.reset()
        self.key = self.write("app.pem", key())
        self.cache = self.home / ".local/state/github-app-token"
        self.env = {**BARE, "HOME": str(self.home), "GITHUB_APP_PROFILE": "w"}
        self.ini = self.home / ".config/github-app-token.ini"
        self.ini.parent.mkdir()
        self.profile()

    def profile(self, **settings: str) -> None:
        """Write the profile `w`: the fake GitHub, an App, a repository, and `settings`."""
        values = {
            "repo": "octo/widgets", "app_id": "Iv23liEXAMPLE", "api_url": self.github.url, **settings,
        }  # fmt: skip
        self.ini.write_text(
            "[w]\n" + "".join(f"{name} = {value}\n" for name, value in values.items())
        )
        self.ini.chmod(0o600)

    def write(self, name: str, data: bytes, mode: int = 0o600) -> Path:
        path = self.home / name
        path.write_bytes(data)
        path.chmod(mode)
        return path

    def start(self, *argv: str, setup: str = "", data: bytes = b"", **env: str) -> Run:
        given = {**self.env, **env}
        return quick.start("github_app_token", argv, given, self.home, setup=setup, data=data)

    def run_it(self, *argv: str, setup: str = "", data: bytes = b"", **env: str) -> Result:
        done = self.start(*argv, setup=setup, data=data, **env).wait()
        self.assertNotIn("Traceback", done.err)
        return done

    def as_users_do(self, *argv: str, **more: Any) -> subprocess.CompletedProcess[str]:
        """`python3 github_app_token.py …`, as it is started outside of the tests."""
        given: dict[str, Any] = {
            "env": self.env, "capture_output": True, "timeout": TIMEOUT, "text": True, **more,
        }  # fmt: skip
        command = [sys.executable, "-I", str(SCRIPT), *argv]
        done: subprocess.CompletedProcess[str] = subprocess.run(command, check=False, **given)
        return done

    def token(self, *argv: str, key: str = "", **more: Any) -> Result:
        permissions = () if "--permissions" in argv else ("--permissions", "dev")
        return self.run_it("token", "--key", key or str(self.key), *permissions, *argv, **more)

    def expire(self) -> None:
        """What is cached will not live long enough to be given out."""
        for path in self.cache.glob("*-*.json"):
            value = json.loads(path.read_text())
            if "expires_at" in value:
                path.write_text(json.dumps({**value, "expires_at": value["expires_at"] - 3500}))

    def passes(self, done: Result) -> str:
        self.assertEqual(done.status, 0, done.err)
        return done.out.strip()

    def fails(self, done: Result, status: int, *words: str) -> None:
        """It said what and what to do, in two lines at most, and nothing on stdout."""
        self.assertEqual((done.status, done.out), (status, ""), done.err)
        errors = [line for line in done.err.splitlines() if "warning:" not in line]
        self.assertRegex(errors[0], "^github_app_token: error: .")
        self.assertLessEqual(len(errors), 2, errors)
        for word in words:
            self.assertIn(word, done.err)


class LoginCase(Case):
    """Logins that do not wait."""

    def login(self, *argv: str, setup: str = "", **more: Any) -> Result:
        return self.run_it("login", *argv, setup=NO_SLEEP + setup, **more)

    def file(self) -> Path:
        (path,) = self.cache.glob("user-*.json")
        return path

    def stored(self) -> dict[str, Any]:
        value: dict[str, Any] = json.loads(self.file().read_text())
        return value

    def store(self, **changes: Any) -> None:
        self.file().write_text(json.dumps({**self.stored(), **changes}))

    def logged_out(self) -> bool:
        return not list(self.cache.glob("user-*.json"))
