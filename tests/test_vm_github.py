"""`run --github`: which repository, whose token, what the guest gets, and what is left."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import unittest
from pathlib import Path
from typing import Any

import agent_vm
from agent_vm import GitHub
from tests.fakes import mcp_upstream
from tests.fakes.git_server import GitServer
from tests.fakes.github import GitHub as FakeGitHub
from tests.support import ROOT
from tests.support import WorldTest
from tests.support import executable
from tests.support import wait_for

TOKEN = "github_pat_11NOTREAL0_abcdefghijklmnopqrstuvwxyz0123456789"
GITHUB = GitHub(
    repo="octo/widget", secret="s3cret-" + "x" * 30,
    remote="git@github.com:Octo/Widget.git",
)  # fmt: skip
# A guest's git that finds the side: the guest's port of it is none of this machine's.
GUEST_GIT = """
end=$(sed -n 's/^47104 //p' "$FAKE_GUEST_INSTANCE/sides")
sed -i "s/127.0.0.1:47104/$end/" ~/.agent-vm/gitconfig
g() { GIT_TERMINAL_PROMPT=0 git "$@"; }
"""


class RepositoryTest(unittest.TestCase):
    def test_urls_of_github(self) -> None:
        for url in (
            "https://github.com/octo/widget", "https://github.com/octo/widget.git",
            "https://github.com/octo/widget/", "https://user@github.com/octo/widget.git",
            "https://x-access-token:tok@github.com/octo/widget", "https://www.github.com/octo/widget",
            "HTTPS://GitHub.com:443/octo/widget", "git@github.com:octo/widget.git",
            "git@github.com:/octo/widget", "ssh://git@github.com/octo/widget.git",
            "ssh://git@ssh.github.com:443/octo/widget.git",
        ):  # fmt: skip
            self.assertEqual(agent_vm.github_repository(url), "octo/widget", url)
        self.assertEqual(agent_vm.github_repository("https://github.com/a/b.c.git"), "a/b.c")

    def test_urls_of_others(self) -> None:
        for url in (
            "", "https://gitlab.com/octo/widget", "https://github.com.evil.org/octo/widget",
            "https://evil.org/github.com/octo/widget", "https://github.com@evil.org/octo/widget",
            "https://a@b@github.com/x", "https://evil.org/@github.com/octo/widget",
            "https://github.com/octo", "https://github.com/octo/widget/tree/main",
            "https://gist.github.com/octo/abc", "git@github.com:octo", "/srv/github.com/octo/widget",
            "git@github.com:octo/widget\nx", "https://github.com/../widget", "ext::sh -c x",
            "https://github.com/octo/..", "https://github.com/octo/.", "https://github.com/octo/.git",
            "https://github.com/octo/widget.wiki.git",
        ):  # fmt: skip
            self.assertEqual(agent_vm.github_repository(url), "", url)

    def test_the_guests_git_goes_to_the_proxy_by_the_usual_addresses(self) -> None:
        served = "http://127.0.0.1:47104/git/octo/widget.git"
        for url, expected in (
            ("https://github.com/octo/widget", served), ("https://github.com/octo/widget.git", served),
            ("git@github.com:octo/widget.git", served), ("ssh://git@github.com/octo/widget", served),
            ("git@github.com:Octo/Widget.git", served),
            # A prefix leads these there, too; the proxy refuses them and says why.
            ("https://github.com/octo/widget-docs", f"{served}-docs"),
            ("https://github.com/octo/widget.github.io", f"{served}hub.io"),
            ("https://github.com/octo/Widget_x", ""),
            ("https://github.com/octo/other", ""), ("https://github.com/evil/secret.git", ""),
        ):  # fmt: skip
            self.assertEqual(self.get_url(url), expected or url)

    def get_url(self, url: str) -> str:
        import tempfile

        with tempfile.NamedTemporaryFile("w") as file:
            file.write(agent_vm.guest_git_config({}, GITHUB))
            file.flush()
            env = {**os.environ, "GIT_CONFIG_GLOBAL": file.name, "GIT_CONFIG_NOSYSTEM": "1"}
            done = subprocess.run(["git", "ls-remote", "--get-url", url], env=env, cwd="/",
                                  capture_output=True, text=True, check=True)  # fmt: skip
        return done.stdout.strip()

    def test_a_secret_is_in_no_repr(self) -> None:
        environ = {"GITHUB_MCP_TOKEN": TOKEN}
        self.assertNotIn(TOKEN, repr(GitHub(repo="o/r", environ=environ)))
        self.assertNotIn(GITHUB.secret, repr(GITHUB))


class ReceiptTest(unittest.TestCase):
    def entry(self, verdict: str, what: str, **more: Any) -> dict[str, Any]:
        return {"verdict": verdict, "what": what, "reason": "", "url": "", "count": 1, **more}

    def test_what_the_proxy_counted_in_words(self) -> None:
        receipt = [
            {"reads": 6, "writes": 3, "refused": 2},
            self.entry("done", "git push ref=refs/heads/fix"),
            self.entry("done", "create_pull_request base=main", url="https://github.com/o/r/pull/12"),
            self.entry("refused", "create_branch branch=x", reason="read-only", count=2),
            {"more": 5},
        ]  # fmt: skip
        expected = [
            "GitHub: 6 reads, 3 writes, 2 refused",
            "GitHub: done: git push ref=refs/heads/fix",
            "GitHub: done: create_pull_request base=main https://github.com/o/r/pull/12",
            "GitHub: refused: create_branch branch=x read-only (2 times)",
            "GitHub: and 5 more: agent-vm log",
        ]
        self.assertEqual(agent_vm.receipt_lines(receipt), expected)

    def test_a_proxy_that_died_said_nothing(self) -> None:
        self.assertEqual(agent_vm.receipt_lines([]), ["GitHub: ? reads, ? writes, ? refused"])

    def test_words_of_the_guest_do_not_move_the_cursor(self) -> None:
        receipt = [
            {"reads": 0, "writes": 1, "refused": 0},
            self.entry("done", "x\n\x1b[2J" + "y" * 999),
        ]
        (_, told) = agent_vm.receipt_lines(receipt)
        self.assertEqual(told[:22], "GitHub: done: x??[2Jyy")
        self.assertEqual(len(told), 308)

    def test_what_is_shown_is_what_it_says(self) -> None:
        for text, shown in (
            ("a\x1b[2Jb", "a?[2Jb"), ("a\u202eb", "a?b"), ("a\u0301", "a?"), ("\u05d0", "?"),
            ("\u3164\u2800", "??"), ("ünïcode 漢字", "ünïcode 漢字"), ("\x00\x7f\x9b", "???"),
        ):  # fmt: skip
            self.assertEqual(agent_vm.printable(text), shown)


LOOK = """sh:cp ~/.claude.json claude.json; cp ~/.agent-vm/gitconfig gitconfig
cp ~/.claude/CLAUDE.md briefing; cp "$FAKE_GUEST_INSTANCE/sides" sides; git config --list --global > global
stat -c '%a %n' ~/.claude.json ~/.agent-vm/* > modes
grep -rl TOKEN_IS ~ /proc/self/environ > found || true
"""

BRANCH = """
curl -s -H "Authorization: $(jq -r .mcpServers.github.headers.Authorization ~/.claude.json)" \\
  -H 'Content-Type: application/json' \\
  -H 'Accept: application/json, text/event-stream' -d '{"jsonrpc": "2.0", "id": 1, "method":
  "tools/call", "params": {"name": "create_branch", "arguments": {"branch": "'$name'"}}}' \\
  "$(jq -r .mcpServers.github.url ~/.claude.json)"
"""


class GitHubWorld(WorldTest):
    """A project with a remote on GitHub, an upstream on loopback, a guest that finds the host."""

    def setUp(self) -> None:
        super().setUp()
        self.upstream = mcp_upstream.Upstream()
        self.upstream.__enter__()
        self.addCleanup(self.upstream.__exit__)
        self.box.env.update(GITHUB_MCP_UPSTREAM=self.upstream.url, GITHUB_MCP_TOKEN=TOKEN)
        if not shutil.which("curl", path="/usr/bin:/bin"):
            self.skipTest("curl is not on PATH")
        self.git("init", "-q", "-b", "work")
        self.remote("https://github.com/octo/widget.git")
        self.choose("octo/widget")

    def choose(self, repo: str, project: Path | None = None) -> None:
        """As if the user had chosen it in an earlier run."""
        key = agent_vm.session_key(str(project or self.box.project))
        self.box.write(self.box.state / "github" / key, f"{repo}\n")

    def forget(self) -> None:
        shutil.rmtree(self.box.state / "github")

    def git(self, *argv: str) -> str:
        done = subprocess.run(["git", "-C", self.box.project, *argv], env=self.box.env,
                              capture_output=True, text=True, check=True)  # fmt: skip
        return done.stdout

    def remote(self, url: str, name: str = "origin") -> None:
        self.git("config", f"remote.{name}.url", url)

    def run_and_look(self, *args: str, script: str = "", **env: str) -> Any:
        look = LOOK.replace("TOKEN_IS", TOKEN[:20] + '""' + TOKEN[20:]) + script
        result = self.box.run("run", *args, "--", "-p", look, **env)
        self.assertEqual(result.status, 0, result.err)
        server = json.loads(self.guest_file("claude.json"))["mcpServers"]["github"]
        self.assertEqual(server["url"], "http://127.0.0.1:47104/mcp")
        self.port = int(self.guest_file("sides").rpartition(":")[2])
        self.secret = server["headers"]["Authorization"].partition(" ")[2]
        return result

    def guest_file(self, name: str) -> str:
        """A file of the clone's home that the agent copied to the project."""
        return (self.box.project / name).read_text()

    def audits(self) -> list[Path]:
        return sorted((self.box.state / "audit").glob("*"))

    def assert_the_proxy_is_gone(self, port: int) -> None:
        def refused() -> bool:
            with socket.socket() as sock:
                return sock.connect_ex(("127.0.0.1", port)) != 0

        wait_for(refused, "the proxy's port is closed")


def read(path: Path) -> bytes:
    """A file of /proc, b"" when its process has gone or is another user's."""
    try:
        return path.read_bytes()
    except OSError:
        return b""


class GitHubRunTest(GitHubWorld):
    COST = 12

    def test_what_the_guest_gets_and_what_is_left(self) -> None:
        result = self.run_and_look("--github")
        self.assertIn("GitHub: octo/widget\n", result.err)
        self.assertIn(self.secret, self.guest_file("gitconfig"))
        self.assertIn("octo/widget", self.guest_file("briefing"))
        self.assertIn("--no-github-lockdown", self.guest_file("briefing"))
        modes = self.guest_file("modes")
        for name in (".claude.json", "gitconfig", "probe-header", "credential"):
            self.assertRegex(modes, rf"600 \S*{name}\n")
        self.assertIn("include.path=~/.agent-vm/gitconfig", self.guest_file("global"))
        with self.subTest("the probe is neither counted nor in the log nor passed on"):
            self.assertIn("0 reads, 0 writes, 0 refused\n", result.err)
            self.assertEqual(self.box.run("log").out, "")
            self.assertEqual(self.upstream.calls("get_file_contents"), [])
        with self.subTest("the token stays on the host, and the secret in the VM"):
            self.assertEqual(self.guest_file("found"), "")
            for secret in (TOKEN, self.secret):
                self.assertNotIn(secret, json.dumps(self.box.calls()) + result.out + result.err)
            found = subprocess.run(["grep", "-rlE", f"{TOKEN}|{self.secret}", self.box.state],
                                   capture_output=True, text=True, check=False)  # fmt: skip
            self.assertEqual(found.stdout, "")
        with self.subTest("the proxy ends with the run"):
            self.assert_the_proxy_is_gone(self.port)
            self.assert_nothing_left()
        with self.subTest("each run has a secret of its own"):
            first = self.secret
            self.run_and_look("--github")
            self.assertNotEqual(self.secret, first)

    def test_the_proxy_has_its_token_and_no_other_secret(self) -> None:
        if not Path("/proc/self/environ").exists():
            self.skipTest("no /proc")
        others: dict[str, Any] = {
            "GH_TOKEN": "gho_" + "x" * 30,
            "ANTHROPIC_API_KEY": "sk-ant-" + "x" * 30,
        }
        options = ("--github", "--no-github-lockdown")
        process = self.box.start("run", *options, "--", "sh:touch up; sleep 60", **others)
        self.box.wait_for_file("up")
        (proxy,) = [
            entry for entry in Path("/proc").glob("[0-9]*")
            if b"github_mcp_proxy" in read(entry / "cmdline") and str(self.box.state).encode() in read(entry / "cmdline")
        ]  # fmt: skip
        environ = read(proxy / "environ").decode()
        self.box.kill(process)
        self.assertIn("GITHUB_MCP_OWNER=octo", environ)
        self.assertIn("GITHUB_MCP_LOCKDOWN=0", environ)
        for secret in others.values():
            self.assertNotIn(secret, environ)

    def test_an_agent_uses_a_tool_and_the_log_has_it(self) -> None:
        result = self.run_and_look("--github", script=f"name=fix\n({BRANCH}) > answer")
        name = self.audits()[0].stem
        self.assertIn("GitHub: 0 reads, 1 writes, 0 refused\n", result.err)
        self.assertRegex(result.err, r"done: create_branch .*branch=fix")
        shown = self.box.run("log")
        self.assertIn(name, shown.err)
        lines = [json.loads(line) for line in shown.out.splitlines()]
        forwarded = [line for line in lines if line["verdict"] == "forward"]
        self.assertEqual([line["tool"] for line in forwarded], ["create_branch"])
        self.assertEqual(self.box.run("log", name).out, shown.out)
        self.assert_refused(self.box.run("log", "no-such-run"), "no-such-run", name, status=1)

    def test_readonly_is_proved_too(self) -> None:
        result = self.box.run("run", "--github", "--readonly", "--", "sh:cat ~/.claude/CLAUDE.md")
        self.assertEqual(result.status, 0, result.err)
        self.assertIn("read-only", result.out)
        self.assertIn("GitHub: octo/widget, read-only", result.err)

    def test_a_named_repository_needs_no_remote_and_is_kept_for_the_project(self) -> None:
        self.forget()
        self.git("config", "--unset", "remote.origin.url")
        self.assertIn("GitHub: other/thing", self.run_and_look("--repo", "other/thing").err)
        self.assertIn("GitHub: other/thing", self.run_and_look("--github").err)
        elsewhere = self.box.home / "elsewhere"
        elsewhere.mkdir()
        result = self.box.run("run", "--github", cwd=elsewhere)
        self.assert_refused(result, "no GitHub repository was chosen", "--repo OWNER/REPO")

    def test_without_a_choice_the_exact_words_to_type_are_said(self) -> None:
        self.forget()
        result = self.box.run("run", "--github")
        self.assert_refused(result, "no GitHub repository was chosen", "--repo octo/widget")
        self.assertEqual(self.box.limactl("clone"), [])

    def test_at_a_terminal_what_the_remote_says_is_asked_about_once(self) -> None:
        self.forget()
        for answer, status in (("n\r", 125), ("y\r", 0)):
            terminal = self.box.terminal("run", "--github")
            terminal.expect("give the agent the GitHub repository octo/widget")
            terminal.type(answer)
            self.assertEqual(terminal.wait(), status, terminal.seen)
        self.assertEqual(self.box.run("run", "--github").status, 0)

    def test_what_the_remote_says_later_changes_nothing(self) -> None:
        self.remote("https://github.com/victim/private")
        result = self.run_and_look("--github")
        self.assertIn("the agent gets octo/widget", result.err)
        self.assertIn("GitHub: octo/widget\n", result.err)
        self.assertNotIn("victim", self.guest_file("gitconfig"))
        self.assertIn("GitHub: victim/private", self.run_and_look("--repo", "victim/private").err)

    def test_off_by_default(self) -> None:
        result = self.box.run("run", "--", "sh:cat ~/.claude.json ~/.agent-vm/*")
        self.assertEqual((result.status, result.err), (0, ""))
        self.assertNotIn("mcpServers", result.out)
        self.assertNotIn("127.0.0.1:47104", result.out)
        self.assertNotIn(TOKEN, json.dumps([call["env"] for call in self.box.calls()]))

    def test_auto_goes_on_without(self) -> None:
        self.box.write_config("github = auto")
        self.assertIn("GitHub: octo/widget", self.run_and_look().err)
        result = self.box.run("run", GITHUB_MCP_TOKEN="")
        self.assertEqual((result.status, result.err), (0, ""))
        self.forget()
        result = self.box.run("run")
        self.assertEqual((result.status, result.err), (0, ""))

    def test_the_probe_goes_the_agents_way(self) -> None:
        """A company's proxy gets neither the probe's secret nor, later, the agent's."""
        proxy = ("--env", "http_proxy=http://127.0.0.1:9")
        result = self.box.run("run", "--github", *proxy, "--", "sh:true")
        self.assertEqual(result.status, 0, result.err)
        away = ("--env", "no_proxy=", "--env", "NO_PROXY=corp.example")
        result = self.box.run("run", "--github", *proxy, *away, "--", "sh:true")
        self.assertEqual(result.status, 0, "what is on the host stays direct, whatever is given")

    def test_a_missing_token_is_said(self) -> None:
        result = self.box.run("run", "--github", GITHUB_MCP_TOKEN="")
        self.assert_refused(result, "no GitHub token", "GITHUB_MCP_TOKEN", "--github-profile")
        self.assertEqual(self.box.limactl("clone"), [])

    def test_wrong_values(self) -> None:
        for value in ("octo", "octo/", "a/b/c", "", "-x/y", "octo/wid get", "a/..", "https://x"):
            result = self.box.run("run", f"--repo={value}")
            self.assert_refused(result, "is not OWNER/REPO", status=2)
        self.assert_refused(self.box.run("run", "--github=octo/widget"), "--github", status=2)


class GitHubTroubleTest(GitHubWorld):
    COST = 12

    def test_a_policy_that_an_agent_can_write(self) -> None:
        text = "[policy]\nallow = default-branch\n"
        mine = self.box.write(self.box.home / "policy.ini", text)
        planted = self.box.write(self.box.project / "policy.ini", text)
        link = self.box.home / "link.ini"
        link.symlink_to(planted)
        out = self.box.project / "out.ini"
        out.symlink_to(mine)
        middle = self.box.home / "middle.ini"
        middle.symlink_to(out)
        earlier = self.box.home / "earlier"
        earlier.mkdir()
        self.assertEqual(self.box.run("run", cwd=earlier).status, 0)
        left = self.box.write(earlier / "sub/policy.ini", text)
        for path in (planted, link, "policy.ini", out, middle, left):
            result = self.box.run("run", "--github", f"--github-policy={path}")
            self.assert_refused(result, "which an agent can write", str(self.box.config))
        folder = self.box.home / "folder"
        shared = self.box.write(folder / "policy.ini", text)
        argv = ("--mount", str(folder), "--github-policy", str(shared))
        self.assert_refused(self.box.run("run", "--github", *argv), "which an agent can write")
        result = self.box.run("run", "--github", f"--github-policy={mine}")
        self.assertEqual(result.status, 0, result.err)

    def test_readonly_is_told_by_the_proxy(self) -> None:
        policy = self.box.write(self.box.home / "policy.ini", "[policy]\nreadonly = yes\n")
        for argv, env in (
            ([f"--github-policy={policy}"], {}), ([], {"GITHUB_MCP_READONLY": "true"}),
        ):  # fmt: skip
            result = self.box.run("run", "--github", *argv, "--", "sh:true", **env)
            self.assertIn("GitHub: octo/widget, read-only\n", result.err)
        result = self.box.run("run", "--github", "--no-readonly", GITHUB_MCP_READONLY="1")
        self.assertIn("GitHub: octo/widget\n", result.err)

    def test_a_profile_that_does_not_work_stops_the_run(self) -> None:
        env = {"GITHUB_MCP_TOKEN": ""}
        result = self.box.run("run", "--github", "--github-profile=nope", **env)
        self.assert_refused(result, "the GitHub proxy did not start", "github-app-token.ini")
        self.assertEqual(self.box.agent_calls(), [])
        self.assert_nothing_left()

    def test_a_profile_gives_the_token(self) -> None:
        with FakeGitHub() as github:
            github.repos = {"octo/widget": 11}
            key = self.box.root / "app.pem"
            argv = ["openssl", "genpkey", "-algorithm", "RSA", "-pkeyopt", "rsa_keygen_bits:2048"]
            subprocess.run([*argv, "-out", key], check=True, stderr=subprocess.DEVNULL)
            key.chmod(0o600)
            ini = self.box.home / ".config/github-app-token.ini"
            text = f"[w]\napp_id = Iv1.x\nkey = {key}\npermissions = dev\napi_url = {github.url}\n"
            self.box.write(ini, text, 0o600)
            env = {"GITHUB_MCP_TOKEN": ""}
            result = self.run_and_look(
                "--github", "--github-profile=w", script=f"name=b\n({BRANCH})", **env
            )
        self.assertIn("1 writes, 0 refused", result.err)
        (token,) = github.tokens
        sent = {x.headers["authorization"] for x in self.upstream.seen}
        self.assertEqual(sent, {f"Bearer {token}"})
        self.assertNotIn(token, json.dumps(self.box.calls()) + result.err)

    def test_no_module_of_the_projects_runs_on_the_host(self) -> None:
        trap = self.box.root / "trapped"
        for name in ("hmac", "argparse", "json", "github_mcp_proxy"):
            text = f"open({str(trap)!r}, 'a').write({name!r})\nraise ImportError\n"
            self.box.write(self.box.project / f"src/{name}.py", text)
        env = {"PYTHONPATH": str(self.box.project / "src")}
        for argv, more in (
            (["--github"], {}), (["--github", "--github-profile=nope"], {"GITHUB_MCP_TOKEN": ""}),
        ):  # fmt: skip
            script = self.box.root / "isolated"
            executable(script, f'exec {sys.executable} -I {ROOT}/agent_vm.py "$@"')
            done = subprocess.run([script, "run", *argv], env={**self.box.env, **env, **more},
                                  cwd=self.box.project, capture_output=True, stdin=subprocess.DEVNULL)  # fmt: skip
            self.assertIn(b"GitHub", done.stderr)
        self.assertFalse(trap.exists())

    def test_owners_with_an_underscore_and_urls_with_other_letters(self) -> None:
        self.remote("https://usér@github.com/octo_acme/widget.git")
        self.choose("octo_acme/widget")
        result = self.box.run(
            "run", "--github", "--", "sh:git config --list > /dev/null && echo ok"
        )
        self.assertEqual((result.status, result.out), (0, "ok\n"), result.err)
        self.assertIn("GitHub: octo_acme/widget\n", result.err)

    def test_the_logs_of_failures_outlive_good_runs(self) -> None:
        self.box.run("run", "--github", FAKE_LIMA_FAIL="start")
        logs = self.box.state / "logs"
        before = [path for path in logs.iterdir() if "github" not in path.name]
        self.assertTrue(before)
        self.box.run("run", "--github")
        self.assertEqual(list(logs.glob("*.github.log")), [])
        self.assertEqual([path for path in before if not path.exists()], [])

    def test_each_write_is_put_to_the_command_of_the_policy(self) -> None:
        asked = self.box.root / "asked"
        executable(
            self.box.home / "approve",
            f"PATH=/usr/bin:/bin; tee -a {asked} | grep -q good && exit 0; echo no good; exit 1",
        )
        policy = f"[policy]\napprove = {self.box.home}/approve\n"
        path = self.box.write(self.box.home / "policy.ini", policy)
        script = "".join(f"name={name}; ({BRANCH}) > {name}; " for name in ("good", "bad"))
        result = self.run_and_look("--github", "--github-policy", str(path), script=script)
        self.assertEqual(
            [x.arguments["branch"] for x in self.upstream.calls("create_branch")], ["good"]
        )
        self.assertIn("no good", self.guest_file("bad"))
        self.assertIn("done: create_branch branch=good", result.err)
        self.assertIn('"bad"', asked.read_text())

    def test_a_config_that_an_agent_wrote_runs_and_reads_nothing(self) -> None:
        trap = self.box.root / "trapped"
        self.git("config", "core.fsmonitor", f"touch {trap}")
        self.git("config", "core.sshCommand", f"touch {trap}")
        self.git("config", "include.path", str(self.box.home / "other"))
        self.box.write(
            self.box.home / "other", '[remote "origin"]\nurl=git@github.com:evil/secret\n'
        )
        self.assertIn("GitHub: octo/widget", self.run_and_look("--github").err)
        self.assertFalse(trap.exists())
        config = self.box.project / ".git/config"
        config.rename(self.box.home / "config")
        config.symlink_to(self.box.home / "config")
        self.forget()
        self.assert_refused(self.box.run("run", "--github"), "--repo OWNER/REPO")

    def test_a_probe_that_is_not_refused_stops_the_run(self) -> None:
        (self.box.guest_bin / "curl").unlink()
        executable(self.box.guest_bin / "curl", "echo '{}'")
        result = self.box.run("run", "--github", "--", "-p", "x")
        self.assert_refused(result, "is not confined", "another repository over MCP")
        self.assertEqual(self.box.agent_calls(), [])
        self.assert_nothing_left()

    def test_a_proxy_that_does_not_start(self) -> None:
        result = self.box.run("run", "--github", GITHUB_MCP_UPSTREAM="http://evil.example/")
        self.assert_refused(result, "the GitHub proxy did not start", "must be https")
        self.assert_nothing_left()

    def test_copied_alone_it_says_what_is_missing(self) -> None:
        alone = self.box.home / "alone/agent_vm.py"
        alone.parent.mkdir()
        shutil.copy(ROOT / "agent_vm.py", alone)
        result = self.box.run("run", "--github", script=alone)
        self.assert_refused(result, "github_mcp_proxy.py is missing", str(alone.parent))
        self.assertEqual(self.box.run("run", script=alone).status, 0)

    def test_kill_9_ends_the_proxy(self) -> None:
        process = self.box.start("run", "--github", "--", "-p", LOOK + "touch ready; sleep 60")
        self.box.wait_for_file("ready")
        port = int(self.guest_file("sides").rpartition(":")[2])
        with socket.create_connection(("127.0.0.1", port)):
            self.box.kill(process)
        self.assert_the_proxy_is_gone(port)

    def test_the_agents_words_are_its_own(self) -> None:
        self.box.run("run", "--github", "--", "--github", "-p", "x")
        self.assertEqual(
            self.box.agent_calls()[0]["argv"],
            ["--dangerously-skip-permissions", "--github", "-p", "x"],
        )


class KilledSshTest(WorldTest):
    def test_an_ssh_that_is_killed_leaves_no_raw_terminal(self) -> None:
        if not Path("/proc/self/cmdline").exists():
            self.skipTest("no /proc")
        terminal = self.box.terminal("run", "--", "sh:touch up; sleep 60")
        before = terminal.mode()
        self.box.wait_for_file("up")
        self.assertNotEqual(terminal.mode(), before)
        pid = terminal.process.pid
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        (ssh,) = [int(x) for x in children if b"launch.sh" in read(Path(f"/proc/{x}/cmdline"))]
        os.kill(ssh, signal.SIGKILL)
        terminal.wait()
        self.assertEqual(terminal.mode(), before)


class GitOverTheProxyTest(GitHubWorld):
    """The guest's git, with the configuration that `run` gives it."""

    def setUp(self) -> None:
        super().setUp()
        served = self.box.root / "served"
        self.bare = served / "octo/widget.git"
        self.server = GitServer(str(served), TOKEN)
        self.addCleanup(self.server.__exit__)
        self.box.env.update(GITHUB_MCP_GIT=self.server.url)
        self.box.write(self.box.home / ".gitconfig", "[user]\nname = A\nemail = a@example.org\n")
        for bare in (self.bare, served / "evil/secret.git"):
            subprocess.run(["git", "init", "-q", "--bare", "-b", "main", bare], check=True)
        self.git("checkout", "-q", "-b", "main")
        self.git("commit", "-q", "--allow-empty", "-m", "first")
        self.git("push", "-q", str(self.bare), "main", "main:old")

    def test_fetch_push_and_refusals(self) -> None:
        self.remote("git@github.com:octo/widget.git")
        script = f"""sh:{GUEST_GIT}
        exec > said 2>&1
        g fetch origin main && echo fetched
        g clone -q https://github.com/octo/widget cloned && echo cloned
        git commit -q --allow-empty -m second
        g push origin HEAD:fix && echo pushed
        g push origin HEAD:main
        g ls-remote http://$end/git/evil/secret.git
        g push origin :old
        true"""
        result = self.box.run("run", "--github", "--", script)
        self.assertEqual(result.status, 0, result.err)
        said = self.guest_file("said")
        for words in ("fetched", "cloned", "pushed", "(refused: main is the default branch",
                      "only octo/widget is served here", "branches are not deleted"):  # fmt: skip
            self.assertIn(words, said)
        refs = subprocess.run(["git", "-C", self.bare, "for-each-ref", "--format=%(subject) %(refname)"],
                              capture_output=True, text=True, check=True)  # fmt: skip
        self.assertEqual(
            refs.stdout, "second refs/heads/fix\nfirst refs/heads/main\nfirst refs/heads/old\n"
        )
        self.assertIn("done: git push ref=refs/heads/fix\n", result.err)
        self.assertIn("1 writes, 3 refused", result.err)
        self.assertIn("refs/heads/main", result.err)


if __name__ == "__main__":
    unittest.main()
