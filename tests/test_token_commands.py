"""status, revoke, git's helper, profiles and flags of github_app_token.py."""

from __future__ import annotations

import json
import os
import pty
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
import time
import unittest
from pathlib import Path

import github_app_token as g
from tests.fakes.github import error
from tests.support import ROOT
from tests.token_case import NO_PAUSE
from tests.token_case import NO_SLEEP
from tests.token_case import SCRIPT
from tests.token_case import TIMEOUT
from tests.token_case import Case


class CommandCase(Case):
    def command(self, *argv: str, where: Path | None = None) -> None:
        subprocess.run(argv, env=self.env, cwd=where or self.home, timeout=TIMEOUT, check=True)


class CommandTest(Case):
    def argv(self, verb: str, *more: str) -> tuple[str, ...]:
        return (verb, "--key", str(self.key), "--permissions", "dev", *more)

    def test_revoke(self) -> None:
        argv = self.argv("revoke")
        token = self.passes(self.token())
        self.github.on("/api/v3/installation/token", error(404, "Not Found"))
        self.fails(self.run_it(*argv), g.FAILED, "GitHub did not revoke it")
        self.github.replies.clear()
        token = self.passes(self.token())
        self.assertEqual(self.run_it(*argv).status, 0)
        self.assertNotIn(token, self.github.tokens)
        self.passes(self.token())
        self.github.tokens.clear()
        done = self.run_it(*argv)
        self.assertEqual(done.status, 0, "an expired token is none")
        self.assertIn("not valid any more", done.err)
        self.assertIn("nothing is cached", self.run_it(*argv).err)

    def test_a_token_that_revoke_could_not_reach_is_taken_back_by_the_next_mint(self) -> None:
        self.passes(self.token())
        self.github.on("/api/v3/installation/token", error(502, ""))
        self.fails(self.run_it(*self.argv("revoke"), setup=NO_PAUSE), g.LATER, "HTTP 502")
        self.github.replies.clear()
        token = self.passes(self.token())
        self.assertEqual(list(self.github.tokens), [token])

    def test_status(self) -> None:
        self.github.clock = 100
        token = self.passes(self.token())
        done = self.run_it(*self.argv("status"))
        self.assertEqual(done.status, 0, done.out)
        for word in (
            "key: SHA256:",
            "our-app",
            "offset ",
            "octo/widgets",
            "contents:write",
            "7, selected",
        ):
            self.assertIn(word, done.out)
        self.assertNotIn(token, done.out)
        wide = ("status", "--key", str(self.key), "--permissions", "workflows:write")
        done = self.run_it(*wide)
        self.assertEqual(done.status, g.MEND)
        self.assertRegex(done.out, r"FAIL .* workflows:write\n     fix: .*accept")
        done = self.run_it("status", "--key", "/nonexistent", "--permissions", "dev")
        self.assertEqual(done.status, g.MEND)
        self.assertIn("FAIL", done.out)
        self.cache.chmod(0o755)
        done = self.run_it(*self.argv("status"))
        self.assertEqual(done.status, g.MEND)
        self.assertIn("fix: chmod 700", done.out)

    def test_status_after_the_clock_was_set_right(self) -> None:
        """Fault 36: how long a token lives on is told by GitHub's clock of now."""
        for ahead, left, word in ((7200, 3000, "expires in 50 min"), (-7200, -600, "expired")):
            self.github.clock = ahead
            self.passes(self.token())
            self.github.clock = 0
            (path,) = self.cache.glob("installation-*.json")
            value = json.loads(path.read_text())
            path.write_text(json.dumps({**value, "expires_at": time.time() + left}))
            done = self.run_it(*self.argv("status"))
            self.assertEqual(done.status, 0)
            self.assertIn(word, done.out)
            path.unlink()

    def test_git_asks_and_gets(self) -> None:
        host = f"localhost:{self.github.server_port}"
        ours = f"protocol=http\nhost={host}\npath=octo/widgets"

        def ask(action: str, text: str) -> str:
            argv = self.argv("git-credential", action)
            return self.passes(self.run_it(*argv, data=text.encode() + b"\n\n"))

        for text in (
            ours.replace(host, "evil.example"), ours.replace("http", "https"), ours.replace("widgets", "other"),
            ours.replace("widgets", "widgets2"), f"protocol=http\nhost={host}", "",
        ):  # fmt: skip
            self.assertEqual(ask("get", text), "", text)
        self.assertEqual(self.github.seen, [])
        for suffix in ("", ".git", "/", ".git/info/lfs", ".wiki.git"):
            said = ask("get", ours.replace("octo", "OCTO") + suffix)
            answer = dict(line.split("=") for line in said.splitlines())
            self.assertEqual(answer["username"], "x-access-token")
            self.assertIn(answer["password"], self.github.tokens)
            self.assertGreater(int(answer["password_expiry_utc"]), time.time())
        self.assertEqual(ask("store", ours + "\npassword=x"), "")
        ask("erase", ours + "\npassword=another")
        self.assertIn(answer["password"], ask("get", ours))
        ask("erase", ours + f"\npassword={answer['password']}")
        self.assertNotIn(answer["password"], ask("get", ours))
        for odd in (f"{ours}\r\n\n", f"{ours}\0\n\n", f"{ours}\rx\n\n"):
            done = self.run_it(*self.argv("git-credential", "get"), data=odd.encode())
            self.assertEqual((done.status, done.out), (0, ""), odd)

    def test_git_is_told_to_quit_whatever_fails(self) -> None:
        ours = f"protocol=http\nhost=localhost:{self.github.server_port}\npath=octo/widgets\n\n"
        many = "def no(*a): raise OSError(24, 'Too many open files')\ng.token_for = no\n"
        argv = self.argv("git-credential", "get")
        done = self.run_it(*argv, data=ours.encode(), setup=many)
        self.assertEqual((done.status, done.out), (g.FAILED, "quit=1\n"), done.err)

    def test_profiles(self) -> None:
        """What is said in the profile holds, but for what a flag says."""
        self.profile(key=str(self.key), permissions="read")
        self.passes(self.run_it("token", GITHUB_APP_ID="Iv-of-another", GITHUB_APP_REPO="evil/x"))
        self.assertEqual(self.github.seen[-1].body["permissions"]["contents"], "read")
        jwt = self.github.seen[0].authorization.partition(" ")[2]
        self.assertIn(b"Iv23liEXAMPLE", claims_of(jwt))
        flags = (
            "--profile",
            "w",
            "--permissions",
            "dev",
            "--repo",
            "octo/widgets",
            "--app-id",
            "9",
        )
        self.passes(self.run_it("token", *flags, GITHUB_APP_PROFILE=""))
        self.assertEqual(self.github.seen[-1].body["permissions"]["contents"], "write")
        self.fails(self.run_it("token", GITHUB_APP_PROFILE=""), g.USAGE, "--repo OWNER/NAME")

    def test_profiles_as_other_programs_have_them(self) -> None:
        """A BOM, quotes and notes; a command's are the shell's."""
        text = (
            "\ufeff[w]\nrepo = octo/widgets ; the one\napp_id='Iv23liEXAMPLE'\n"
            f'api_url = {self.github.url}\nkey = "{self.key}"  # mine\npermissions = dev ; note\n'
        )
        self.ini.write_text(text)
        self.passes(self.run_it("token"))
        command = f"""command:echo 'no ; note' "# none" >{self.home}/said ; cat {self.key}"""
        self.ini.write_text(text.replace(f'"{self.key}"  # mine', command))
        self.expire()
        self.passes(self.run_it("token"))
        self.assertEqual((self.home / "said").read_text(), "no ; note # none\n")
        for value in ('"octo/widgets', "octo/widgets;x", 'octo/"widgets"'):
            self.ini.write_text(f"[w]\nrepo = {value}\n")
            self.fails(self.run_it("token"), g.USAGE, "not a repository")

    def test_profiles_that_are_none(self) -> None:
        self.fails(self.run_it("token", "--profile", "x"), g.USAGE, "[x]")
        for text, word in (
            ("[w]\ntoken = x\n", "token is not a setting"),
            ("[w]\nmin_ttl = 5m\n", "min_ttl is not a setting"),
            ("[w]\nMIIEvQIBADANBgkqhkiG9w0BAQ = x\n", "a line is not a setting"),
            ("[w]\nkey = -----BEGIN\nMIIEowIBAAKC\n", "not an INI file"),
            ("\xff", "not in UTF-8"),
            ("\xff\xfe[\0w\0]\0", "save it as UTF-8"),  # as editors on Windows do (fault 38)
            ("[w]\nrepo = o/r\nrepo = o/s\n", "DuplicateOptionError repo"),
            ("[w]\n[w]\n", "DuplicateSectionError"),
            ("[w]\nMIIEvQIBADANBgkqhkiG9w0BAQ = x\nMIIEvQIBADANBgkqhkiG9w0BAQ = x\n", "DuplicateOptionError"),
        ):  # fmt: skip
            self.ini.write_text(text, encoding="latin-1")
            done = self.run_it("token")
            self.fails(done, g.USAGE, word)
            self.assertNotIn("miie", done.err.lower())
        self.ini.chmod(0o622)
        self.fails(self.run_it("token"), g.MEND, "chmod go-rwx")
        self.ini.unlink()
        self.fails(self.run_it("token"), g.USAGE, f"there is no {self.ini}")
        os.mkfifo(self.ini, 0o600)
        self.fails(self.run_it("token"), g.MEND, "is not a file")

    def test_wrong_flags(self) -> None:
        pasted = "ghp_" + "x1" * 18
        for argv in (["--nonsense"], ["token", "--token", "x"], ["token", pasted], []):
            done = self.run_it(*argv)
            self.assertEqual(done.status, g.USAGE)
            self.assertNotIn(pasted, done.err)
        self.fails(self.token("--permissions", ""), g.USAGE, "--permissions")
        for repo in ("o", "o/", "/r", "o/..", "o/r/x", "o/r%2fx", "-o/r", "o/r x", "o/\xfc"):
            self.fails(self.token(f"--repo={repo}"), g.USAGE, "not a repository")
        for number in ("x", "9" * 5000, "-1", "\u0663"):
            self.fails(self.token(f"--repo-id={number}"), g.USAGE, "--repo-id is a number")
        self.fails(self.token("--app-id", "a/b"), g.USAGE, "--app-id")
        for verb in ("token", "login", "logout", "status", "revoke", "git-credential"):
            self.assertIn("--repo", self.run_it(verb, "--help").out)


class WalkTest(CommandCase):
    """docs/tokens.md, from nothing to the first token, and the login."""

    def setUp(self) -> None:
        super().setUp()
        self.text = (ROOT / "docs/tokens.md").read_text()
        self.ini.unlink()

    def blocks(self, title: str, kind: str) -> list[str]:
        part = self.text.partition(f"## {title}\n")[2].partition("\n## ")[0]
        found = re.findall(rf"(?s)```{kind}\n(.*?)```", part)
        return [textwrap.dedent(block) for block in found]

    def say(self, title: str) -> None:
        (profile,) = self.blocks(title, "ini")
        with self.ini.open("a") as file:
            file.write(f"{profile}api_url = {self.github.url}\n")

    def test_the_first_token(self) -> None:
        title = "From nothing to the first token"
        (self.home / "Downloads").mkdir()
        shutil.copy(self.key, self.home / "Downloads/our-app.2026-01-01.private-key.pem")
        place = self.blocks(title, "sh")[0]
        self.addCleanup(os.umask, os.umask(0o002))  # as many distributions have it
        self.command("sh", "-ec", place)
        self.say(title)
        for verb in ("status", "token"):
            done = self.run_it(verb, "--profile", "widgets")
            self.assertEqual(done.status, 0, done.out + done.err)
        for page in ("tokens.md", "github.md"):
            text = (ROOT / "docs" / page).read_text()
            (command,) = re.findall(r'--token-command[\s\\]+"(.*?)"', text)
            self.assertIn("$PWD/", command, "the proxy runs it in /")
        self.assertIn("/organizations/ORG/settings/apps/new", self.text)
        self.assertNotIn("shred", self.text)

    def test_a_login(self) -> None:
        title = "Without a key: the device flow"
        self.ini.touch(0o600)
        self.say(title)
        for line in self.blocks(title, "sh")[0].splitlines():
            done = self.run_it(*line.split()[2:], setup=NO_SLEEP)
            self.assertEqual(done.status, 0, done.err)
        self.assertTrue(done.out.startswith("ghu_"))


class AsUsersDoTest(Case):
    """Started as it is outside of the tests."""

    def setUp(self) -> None:
        super().setUp()
        self.profile(key=str(self.key), permissions="dev")

    def test_copied_alone(self) -> None:
        folder = self.home / "alone"
        folder.mkdir()
        script = Path(shutil.copy(SCRIPT, folder))
        argv = [sys.executable, str(script), "token"]
        done = subprocess.run(argv, env=self.env, capture_output=True, timeout=TIMEOUT)
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertEqual(os.listdir(folder), [script.name])
        self.assertIn(g.__version__, self.as_users_do("--version").stdout)

    def test_on_a_terminal_it_is_masked(self) -> None:
        token = self.passes(self.run_it("token"))
        for argv, shown in (([], False), (["--show"], True)):
            primary, secondary = pty.openpty()
            self.as_users_do(
                "token", *argv, capture_output=False, stdout=secondary, stderr=subprocess.DEVNULL
            )
            os.close(secondary)
            said = os.read(primary, 10_000).decode()
            os.close(primary)
            self.assertEqual(token in said, shown, said)
            self.assertEqual("octo/widgets" in said, not shown)

    def test_streams_that_are_closed_or_full(self) -> None:
        command = shlex.join([sys.executable, "-I", str(SCRIPT), "token"])
        for closed in ("<&-", ">&-", "2>&-"):
            done = subprocess.run(
                ["sh", "-c", f"{command} {closed}"],
                env=self.env,
                capture_output=True,
                timeout=TIMEOUT,
            )
            self.assertEqual((done.returncode, done.stdout, done.stderr), (2, b"", b""), closed)
        self.assertEqual(self.github.seen, [])
        with open("/dev/full", "w") as full:
            said = self.as_users_do(
                "token", capture_output=False, stdout=full, stderr=subprocess.PIPE
            )
        self.assertEqual((said.returncode, said.stderr.count("\n")), (1, 1), said.stderr)

    def test_settings_of_the_folder_it_is_run_in_do_not_count(self) -> None:
        here = self.home / "project"
        (here / "conf").mkdir(parents=True)
        (here / "conf/github-app-token.ini").write_text("[v]\nkey = command:touch pwned\n")
        self.write("project/openssl", b"#!/bin/sh\ntouch pwned\n", 0o700)
        folders = {"XDG_CONFIG_HOME": "conf", "XDG_STATE_HOME": "state"}
        env = {**self.env, **folders, "PATH": f".:{self.env['PATH']}"}
        for argv in (["--profile", "v"], []):
            done = self.as_users_do("token", *argv, env=env, cwd=here)
            self.assertIn(done.returncode, (g.USAGE, g.MEND), done.stderr)
        self.assertEqual(sorted(os.listdir(here)), ["conf", "openssl"])

    def test_what_is_no_text(self) -> None:
        env = {**self.env, "PYTHONIOENCODING": "ascii"}
        command = [sys.executable, str(SCRIPT), "token", "--repo", "o/\xfc"]
        done = subprocess.run(command, env=env, capture_output=True, timeout=TIMEOUT)
        self.assertEqual(done.returncode, g.USAGE, done.stderr)
        command[2:] = ["git-credential", "get"]
        done = subprocess.run(
            command, env={**env, "PYTHONIOENCODING": "utf-8"}, input=b"host=\xff\n",
            capture_output=True, timeout=TIMEOUT,
        )  # fmt: skip
        self.assertNotIn(b"Traceback", done.stderr)
        self.assertEqual(done.stdout, b"quit=1\n")

    def test_a_terminal_that_does_not_know_each_letter(self) -> None:
        env = {**self.env, "PYTHONIOENCODING": "latin-1"}
        self.passes(self.run_it("token"))
        for argv, word in ((["--help"], b"Iv23"), (["status"], b"cached: ghs_?")):
            command = [sys.executable, str(SCRIPT), *argv]
            done = subprocess.run(command, env=env, capture_output=True, timeout=TIMEOUT)
            self.assertEqual((done.returncode, done.stderr), (0, b""))
            self.assertIn(word, done.stdout)


class GitTest(CommandCase):
    """git itself, set up in a clone as docs/tokens.md says."""

    def setUp(self) -> None:
        super().setUp()
        if not shutil.which("git"):
            self.skipTest("git is not on PATH")
        self.profile(key=str(self.key), permissions="dev")
        self.url = f"{self.github.url}/octo/widgets.git"
        text = (ROOT / "docs/tokens.md").read_text().partition("## git on the host")[2]
        text = text.partition("```sh\n")[2].partition("```")[0]
        script = shlex.join([sys.executable, "-I", str(SCRIPT)])
        text = text.replace("python3 /path/to/github_app_token.py", script)
        self.recipe = text.replace("--profile widgets", "--profile w")
        self.clone = self.home / "clone"

    def set_up(self, site: str) -> None:
        """The recipe, twice, in a repository that is made here."""
        self.git("init", "-q", str(self.clone))
        recipe = self.recipe.replace("https://github.com", site)
        for _ in range(2):
            self.command("sh", "-ec", recipe, where=self.clone)

    def git(
        self, *argv: str, data: bytes = b"", where: Path | None = None
    ) -> subprocess.CompletedProcess[bytes]:
        env = {**self.env, "GIT_TERMINAL_PROMPT": "0", "GIT_CONFIG_NOSYSTEM": "1"}
        return subprocess.run(
            ["git", *argv], env=env, input=data, capture_output=True, timeout=TIMEOUT,
            cwd=where or self.home,
        )  # fmt: skip

    def password(self, url: str, where: Path) -> str:
        said = self.git("credential", "fill", data=f"url={url}\n\n".encode(), where=where)
        return said.stdout.decode().partition("password=")[2].partition("\n")[0]

    def test_other_repositories_keep_their_helpers(self) -> None:
        """`store`, and what `gh auth setup-git` writes, before the recipe and after it."""
        site = self.github.url
        other, elsewhere = f"{site}/octo/other.git", site.replace("//", "//gitlab.")
        lines = (x.replace("//", "//me:STORED@") for x in (site, elsewhere))
        self.write(".git-credentials", "\n".join(lines).encode())
        gh = self.write("gh", b"#!/bin/sh\necho username=me\necho password=OF-GH\n", 0o700)

        def gh_sets_up() -> None:
            self.git("config", "--global", f"credential.{site}.helper", "")
            self.git("config", "--global", "--add", f"credential.{site}.helper", f"!{gh}")

        def look(usual: str) -> None:
            for url in (self.url, self.url[:-4], self.url.replace("octo", "OCTO"), f"{self.url}/"):
                self.assertIn(self.password(url, self.clone), self.github.tokens, url)
                self.assertEqual(self.password(url, self.home), usual)
            self.assertEqual(self.password(other, self.home), usual)
            self.assertEqual(self.password(other, self.clone), "", "no other is asked here")
            self.assertEqual(self.password(f"{elsewhere}/octo/widgets", self.clone), "STORED")

        self.git("config", "--global", "credential.helper", "store")
        before = (self.home / ".gitconfig").read_text()
        self.set_up(site)
        self.assertEqual((self.home / ".gitconfig").read_text(), before)
        look("STORED")
        gh_sets_up()
        look("OF-GH")
        shutil.rmtree(self.clone)
        self.set_up(site)
        look("OF-GH")
        self.github.suspended = True
        self.command("rm", "-r", str(self.cache))
        self.assertEqual(self.password(self.url, self.clone), "", "nor when there is no token")

    def test_it_is_told_to_quit_when_there_is_no_token(self) -> None:
        self.set_up(self.github.url)
        self.github.suspended = True
        asked = f"url={self.url}\n\n".encode()
        done = self.git("credential", "fill", data=asked, where=self.clone)
        self.assertEqual(done.returncode, 128)
        self.assertIn(b"suspended", done.stderr)

    def test_a_clone(self) -> None:
        """401, get, 200; with a token that has died meanwhile: 401, erase, and get again."""
        self.git("init", "-q", "--bare", str(self.home / "served/octo/widgets.git"))
        self.github.git_root = str(self.home / "served")
        self.set_up(self.github.url)
        listed = self.git("config", "--local", "--get-regexp", "^credential", where=self.clone)
        settings = [
            f"-c{name}={value}"
            for name, _, value in (x.partition(" ") for x in listed.stdout.decode().splitlines())
        ]
        self.assertEqual(len(settings), 3)

        def cloned(name: str) -> subprocess.CompletedProcess[bytes]:
            return self.git("clone", *settings, self.url, name)

        done = cloned("one")
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertEqual(self.git("fetch", where=self.home / "one").returncode, 0)
        self.github.tokens.clear()
        self.assertEqual(cloned("two").returncode, 128)
        done = cloned("two")
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertEqual(len(self.github.paths("POST")), 2, "two tokens")


def claims_of(jwt: str) -> bytes:
    import base64

    return base64.urlsafe_b64decode(jwt.split(".")[1] + "==")


if __name__ == "__main__":
    unittest.main()
