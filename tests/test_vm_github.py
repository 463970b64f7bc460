"""`run --github`: which repository, whose token, what the guest gets, and what is left."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
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
GITHUB = GitHub("octo/widget", 4711, "s3cret-" + "x" * 30, False, "git@github.com:Octo/Widget.git")
# A guest's git that finds the host: the name is resolved as Lima's DNS does it.
GUEST_GIT = """
port=$(sed -n 's/.*internal:\\([0-9]*\\)\\/"\\]/\\1/p' ~/.agent-vm/gitconfig)
g() { GIT_TERMINAL_PROMPT=0 git -c http.curloptResolve=host.lima.internal:$port:127.0.0.1 "$@"; }
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

    def test_the_remote_that_the_branch_tracks_else_origin(self) -> None:
        settings = [
            ("remote.upstream.url", "up"), ("remote.origin.url", "one"),
            ("remote.origin.url", "two"), ("remote.mine.url", "mine"),
            ("branch.fix.remote", "mine"), ("branch.old.remote", "gone"), ("branch.x/y.remote", "."),
        ]  # fmt: skip
        for head, url in (
            ("ref: refs/heads/fix", "mine"), ("ref: refs/heads/main", "one"), ("a" * 40, "one"),
            ("ref: refs/heads/old", "one"), ("ref: refs/heads/x/y", "one"), ("", "one"),
        ):  # fmt: skip
            self.assertEqual(agent_vm.git_remote(settings, head), url, head)
        self.assertEqual(agent_vm.git_remote(settings[:1], "ref: refs/heads/main"), "")

    def test_instead_of_as_git_does_it(self) -> None:
        settings = [
            ("url.https://github.com/.insteadof", "gh:"), ("url.git@github.com:me/.insteadof", "gh:m/"),
            ("url.https://github.com/.pushinsteadof", "p:"),
        ]  # fmt: skip
        for url in ("gh:octo/widget", "gh:m/tool", "p:x/y", "https://github.com/a/b"):
            config = [f"{key}={value}" for key, value in settings]
            argv = ["git", *(word for pair in config for word in ("-c", pair))]
            done = subprocess.run([*argv, "ls-remote", "--get-url", url], capture_output=True,
                                  text=True, check=True, cwd="/")  # fmt: skip
            self.assertEqual(agent_vm.instead_of(url, settings) + "\n", done.stdout)

    def test_the_guests_git_goes_to_the_proxy_for_this_repository_alone(self) -> None:
        served = "http://host.lima.internal:4711/git/octo/widget.git"
        for url, expected in (
            ("https://github.com/octo/widget", served), ("https://github.com/octo/widget.git", served),
            ("git@github.com:octo/widget.git", served), ("ssh://git@github.com/octo/widget", served),
            ("git@github.com:Octo/Widget.git", served),
            ("https://github.com/octo/widget-docs", ""), ("git@github.com:octo/widget2.git", ""),
            ("https://github.com/octo/widget.github.io", ""), ("https://github.com/octo/Widget_x", ""),
            ("https://github.com/octo/other", ""), ("https://github.com/evil/secret.git", ""),
        ):  # fmt: skip
            self.assertEqual(self.get_url(url), expected or url)

    def get_url(self, url: str) -> str:
        import tempfile

        with tempfile.NamedTemporaryFile("w") as file:
            file.write(agent_vm.guest_git_config(GITHUB))
            file.flush()
            env = {**os.environ, "GIT_CONFIG_GLOBAL": file.name, "GIT_CONFIG_NOSYSTEM": "1"}
            done = subprocess.run(["git", "ls-remote", "--get-url", url], env=env, cwd="/",
                                  capture_output=True, text=True, check=True)  # fmt: skip
        return done.stdout.strip()

    def test_a_secret_is_in_no_repr(self) -> None:
        choice = agent_vm.GitHubChoice("octo/widget", "", {"GITHUB_MCP_TOKEN": TOKEN}, ())
        self.assertNotIn(TOKEN, repr(choice))
        self.assertNotIn(GITHUB.secret, repr(GITHUB))


class ReceiptTest(unittest.TestCase):
    def line(self, tool: str, verdict: str = "forward", **more: Any) -> dict[str, Any]:
        return {"time": "t", "method": "tools/call", "tool": tool, "verdict": verdict,
                "reason": "", "target": {}, **more}  # fmt: skip

    def test_what_was_sent_and_what_was_not(self) -> None:
        refused = self.line("create_branch", "refuse", reason="read-only", target={"branch": "x"})
        lines = [
            self.line("issue_read"), self.line("get_me"), self.line("search_code"),
            self.line("git-upload-pack", method="git"), self.line("git-receive-pack", method="git"),
            self.line("pull_request_read", target={"pullNumber": 3}),
            self.line("git-receive-pack", method="git", target={"ref": "refs/heads/fix"}),
            self.line("create_pull_request", target={"base": "main"}),
            self.line("create_branch", target={"branch": "b"}),
            self.line("issue_write", target={"issue_number": 7}), refused, refused,
            {**self.line(""), "method": "tools/list"},
            self.line("git-receive-pack", "done", method="git", target={"ref": "refs/heads/fix"}),
            self.line("create_pull_request", "done",
                      target={"base": "main", "url": "https://github.com/octo/widget/pull/12"}),
            self.line("issue_write", "failed", reason="HTTP 500", target={"issue_number": 7}),
        ]  # fmt: skip
        self.assertEqual(
            agent_vm.github_receipt(lines),
            [
                "6 reads, 4 writes, 2 refused",
                "done: git push ref=refs/heads/fix",
                "done: create_pull_request base=main https://github.com/octo/widget/pull/12",
                "not known what became of it: create_branch branch=b",
                "refused: create_branch branch=x: read-only (2 times)",
                "failed: issue_write issue_number=7: HTTP 500",
            ],
        )

    def test_words_of_the_guest_do_not_read_like_ours(self) -> None:
        target = {"branch": "x: done: create_pull_request\n\x1b[2J"}
        (_, told) = agent_vm.github_receipt([self.line("create_branch", "refuse", target=target)])
        self.assertEqual(
            told, r'refused: create_branch branch="x: done: create_pull_request\n\u001b[2J": '
        )

    def test_a_flood_does_not_bury_what_was_done(self) -> None:
        lines = [self.line("create_branch", "forward"), self.line("create_branch", "done")]
        lines += [self.line("x", "refuse", reason=str(n)) for n in range(1000)]
        told = agent_vm.github_receipt(lines)
        self.assertEqual(told[:2], ["0 reads, 1 write, 1000 refused", "done: create_branch"])
        self.assertEqual(told[-1], "and 981 more: agent-vm log")
        self.assertLess(len(told), 25)

    def test_what_is_shown_is_what_it_says(self) -> None:
        for text, shown in (
            ("a\x1b[2Jb", "a?[2Jb"), ("a\u202eb", "a?b"), ("a\u0301", "a?"), ("\u05d0", "?"),
            ("\u3164\u2800", "??"), ("ünïcode 漢字", "ünïcode 漢字"), ("\x00\x7f\x9b", "???"),
        ):  # fmt: skip
            self.assertEqual(agent_vm.printable(text), shown)


class GitHubWorld(WorldTest):
    """A project with a remote on GitHub, an upstream on loopback, a guest that finds the host."""

    def setUp(self) -> None:
        super().setUp()
        self.upstream = mcp_upstream.Upstream()
        self.upstream.__enter__()
        self.addCleanup(self.upstream.__exit__)
        self.box.env.update(GITHUB_MCP_UPSTREAM=self.upstream.url, GITHUB_MCP_TOKEN=TOKEN)
        curl = shutil.which("curl")
        if not curl:
            self.skipTest("curl is not on PATH")
        (self.box.guest_bin / "curl").unlink()
        executable(
            self.box.guest_bin / "curl",
            f'exec {curl} --connect-to host.lima.internal::127.0.0.1: "$@"',
        )
        self.git("init", "-q", "-b", "work")
        self.remote("https://github.com/octo/widget.git")

    def git(self, *argv: str) -> str:
        done = subprocess.run(["git", "-C", self.box.project, *argv], env=self.box.env,
                              capture_output=True, text=True, check=True)  # fmt: skip
        return done.stdout

    def remote(self, url: str, name: str = "origin") -> None:
        self.git("config", f"remote.{name}.url", url)

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


LOOK = """sh:cp ~/.claude.json claude.json; cp ~/.agent-vm/gitconfig gitconfig
cp ~/.claude/CLAUDE.md briefing; git config --list --global > global
stat -c '%a %n' ~/.claude.json ~/.agent-vm/* > modes
grep -rl TOKEN_IS ~ /proc/self/environ > found || true
"""


class GitHubRunTest(GitHubWorld):
    def run_and_look(self, *args: str, script: str = "", **env: str) -> Any:
        look = LOOK.replace("TOKEN_IS", TOKEN[:20] + '""' + TOKEN[20:]) + script
        result = self.box.run("run", *args, "--", "-p", look, **env)
        self.assertEqual(result.status, 0, result.err)
        server = json.loads(self.guest_file("claude.json"))["mcpServers"]["github"]
        self.port = int(server["url"].rpartition(":")[2].partition("/")[0])
        self.secret = server["headers"]["Authorization"].partition(" ")[2]
        return result

    def test_what_the_guest_gets(self) -> None:
        result = self.run_and_look("--github")
        self.assertIn("GitHub: octo/widget\n", result.err)
        self.assertIn("0 reads, 0 writes, 0 refused (", result.err)
        self.assertIn(self.secret, self.guest_file("gitconfig"))
        self.assertIn("octo/widget", self.guest_file("briefing"))
        modes = self.guest_file("modes")
        for name in (".claude.json", "gitconfig", "github-header", "credential"):
            self.assertRegex(modes, rf"600 \S*{name}\n")
        self.assertIn("include.path=~/.agent-vm/gitconfig", self.guest_file("global"))

    def test_the_token_stays_on_the_host(self) -> None:
        result = self.run_and_look("--github")
        self.assertEqual(self.guest_file("found"), "")
        for secret in (TOKEN, self.secret):
            self.assertNotIn(secret, json.dumps(self.box.calls()) + result.out + result.err)
        found = subprocess.run(["grep", "-rlE", f"{TOKEN}|{self.secret}", self.box.state],
                               capture_output=True, text=True, check=False)  # fmt: skip
        self.assertEqual(found.stdout, "")

    def test_the_proxy_has_its_token_and_no_other_secret(self) -> None:
        if not Path("/proc/self/environ").exists():
            self.skipTest("no /proc")
        others: dict[str, Any] = {
            "GH_TOKEN": "gho_" + "x" * 30,
            "ANTHROPIC_API_KEY": "sk-ant-" + "x" * 30,
        }
        process = self.box.start("run", "--github", "--", "sh:touch up; sleep 60", **others)
        self.box.wait_for_file("up")
        (proxy,) = [
            entry for entry in Path("/proc").glob("[0-9]*")
            if b"github_mcp_proxy" in read(entry / "cmdline") and str(self.box.state).encode() in read(entry / "cmdline")
        ]  # fmt: skip
        environ = read(proxy / "environ").decode()
        self.box.kill(process)
        self.assertIn("GITHUB_MCP_OWNER=octo", environ)
        for secret in others.values():
            self.assertNotIn(secret, environ)

    def test_the_proxy_ends_with_the_run(self) -> None:
        self.run_and_look("--github")
        self.assert_the_proxy_is_gone(self.port)
        self.assert_nothing_left()

    def test_each_run_has_a_secret_of_its_own(self) -> None:
        self.run_and_look("--github")
        first = self.secret
        self.run_and_look("--github")
        self.assertNotEqual(self.secret, first)

    def test_an_agent_uses_a_tool_and_the_log_has_it(self) -> None:
        call = {"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": {
            "name": "create_branch", "arguments": {"branch": "fix"}}}  # fmt: skip
        script = f"""
        curl -s -H @$HOME/.agent-vm/github-header -H 'Content-Type: application/json' \
          -H 'Accept: application/json, text/event-stream' \
          -d '{json.dumps(call)}' "$(jq -r .mcpServers.github.url ~/.claude.json)" > answer
        """
        result = self.run_and_look("--github", script=script)
        name = self.audits()[0].stem
        self.assertIn(f"0 reads, 1 write, 0 refused (agent-vm log {name})", result.err)
        self.assertRegex(result.err, r"done: create_branch .*branch=fix")
        shown = self.box.run("log")
        self.assertIn("create_branch", shown.out)
        lines = [json.loads(line) for line in self.box.run("log", "--json").out.splitlines()]
        forwarded = [line for line in lines if line["verdict"] == "forward"]
        self.assertEqual([line["tool"] for line in forwarded], ["create_branch"])
        name = self.audits()[0].stem
        self.assertEqual(self.box.run("log", name, "--json").out.count("\n"), len(lines))
        self.assert_refused(self.box.run("log", "no-such-run"), "no-such-run", name, status=1)

    def test_readonly_is_proved_too(self) -> None:
        result = self.box.run("run", "--github", "--readonly", "--", "sh:cat ~/.claude/CLAUDE.md")
        self.assertEqual(result.status, 0, result.err)
        self.assertIn("read-only", result.out)
        self.assertIn("GitHub: octo/widget, read-only", result.err)

    def test_a_named_repository_needs_no_remote(self) -> None:
        self.git("config", "--unset", "remote.origin.url")
        result = self.run_and_look("--github=other/thing")
        self.assertIn("GitHub: other/thing", result.err)

    def test_off_by_default(self) -> None:
        result = self.box.run("run", "--", "sh:cat ~/.claude.json ~/.agent-vm/*")
        self.assertEqual((result.status, result.err), (0, ""))
        self.assertNotIn("mcp", result.out)
        self.assertNotIn("host.lima.internal", result.out)
        self.assertNotIn(TOKEN, json.dumps([call["env"] for call in self.box.calls()]))

    def test_auto_goes_on_without(self) -> None:
        self.box.write_config("github = auto")
        self.assertIn("GitHub: octo/widget", self.run_and_look().err)
        result = self.box.run("run", GITHUB_MCP_TOKEN="")
        self.assertEqual(result.status, 0, result.err)
        self.remote("https://gitlab.com/octo/widget.git")
        result = self.box.run("run")
        self.assertEqual((result.status, result.err), (0, ""))

    def test_what_is_missing_is_said(self) -> None:
        for env, remote, words in (
            ({"GITHUB_MCP_TOKEN": ""}, "git@github.com:octo/widget", ("no GitHub token", "GITHUB_MCP_TOKEN")),
            ({}, "git@gitlab.com:octo/widget", ("git@gitlab.com:octo/widget is not on github.com", "--github=OWNER/REPO")),
        ):  # fmt: skip
            self.remote(remote)
            self.assert_refused(self.box.run("run", "--github", **env), *words)
        self.assertEqual(self.box.limactl("clone"), [])

    def test_wrong_values(self) -> None:
        for value in (
            "octo",
            "octo/",
            "a/b/c",
            "yes",
            "",
            "-x/y",
            "octo/wid get",
            "a/..",
            "https://x",
        ):
            result = self.box.run("run", f"--github={value}")
            self.assert_refused(result, "off, auto or OWNER/REPO", status=2)

    def test_a_remote_that_an_agent_may_have_written_is_asked_about(self) -> None:
        self.assertEqual(self.box.run("run").status, 0)
        self.remote("https://github.com/victim/private")
        refused = ("victim/private", "an agent was here before", "--github=victim/private")
        self.assert_refused(self.box.run("run", "--github"), *refused)
        nested = self.box.project / "nested"
        nested.mkdir()
        subprocess.run(["git", "init", "-q", nested], check=True, env=self.box.env)
        url = ("config", "remote.origin.url", "https://github.com/victim/other")
        subprocess.run(["git", "-C", nested, *url], check=True, env=self.box.env)
        result = self.box.run("run", "--github", cwd=nested)
        self.assert_refused(result, "victim/other", "an agent was here before")
        moved = self.box.home / "moved"
        self.box.project.rename(moved)
        result = self.box.run("run", "--github", cwd=moved)
        self.assert_refused(result, "victim/private", "an agent was here before")
        moved.rename(self.box.project)
        self.remote("https://github.com/octo/widget")
        self.assertEqual(self.box.run("run", "--github=octo/widget").status, 0)
        self.assertEqual(self.box.run("run", "--github").status, 0)

    def test_a_worktree_shares_what_an_agent_may_have_written(self) -> None:
        self.git(
            "-c", "user.name=a", "-c", "user.email=a@b", "commit", "-q", "--allow-empty", "-m", "x"
        )
        trees = [self.box.home / name for name in ("one", "two")]
        for tree in trees:
            self.git("worktree", "add", "-q", "-b", tree.name, str(tree))
        self.assertEqual(self.box.run("run", cwd=trees[0]).status, 0)
        self.remote("https://github.com/victim/private")
        for folder in (self.box.project, trees[1]):
            result = self.box.run("run", "--github", cwd=folder)
            self.assert_refused(result, "an agent was here before")
        self.remote("https://github.com/octo/widget")
        self.assertEqual(self.box.run("run", "--github=octo/widget", cwd=trees[0]).status, 0)
        self.assertEqual(self.box.run("run", "--github", cwd=trees[1]).status, 0)
        self.assertEqual(self.box.run("run", "--github").status, 0, "the main one")
        new = self.box.home / "new"
        self.git("worktree", "add", "-q", "-b", "new", str(new))
        self.assertEqual(self.box.run("run", "--github", cwd=new).status, 0)

    def test_a_git_file_that_leads_elsewhere_brings_no_acceptance(self) -> None:
        """An agent in `other` leads its .git to the repository of another project."""
        self.git(
            "-c", "user.name=a", "-c", "user.email=a@b", "commit", "-q", "--allow-empty", "-m", "x"
        )
        self.assertEqual(self.box.run("run", "--github").status, 0)
        for argv in ((), ("--github",)):  # never accepted there, and accepted
            other = self.box.home / f"other{len(argv)}"
            subprocess.run(["git", "init", "-q", other], check=True, env=self.box.env)
            url = ("config", "remote.origin.url", "https://github.com/me/mine")
            subprocess.run(["git", "-C", other, *url], check=True, env=self.box.env)
            self.assertEqual(self.box.run("run", *argv, cwd=other).status, 0)
            evil = self.box.project / f".git/worktrees/evil{len(argv)}"
            evil.mkdir(parents=True)
            (evil / "gitdir").write_text(f"{other}/.git\n")
            (evil / "commondir").write_text("../..\n")
            (evil / "HEAD").write_text("ref: refs/heads/work\n")
            shutil.rmtree(other / ".git")
            (other / ".git").write_text(f"gitdir: {evil}\n")
            self.assert_refused(self.box.run("run", "--github", cwd=other), "octo/widget")

    def test_a_disk_that_is_mounted_anew_and_a_folder_that_is_renamed(self) -> None:
        self.assertEqual(self.box.run("run", "--github").status, 0)
        moved = self.box.home / "moved"
        self.box.project.rename(moved)
        self.assertEqual(self.box.run("run", "--github", cwd=moved).status, 0)
        for mark in (self.box.state / "written").glob("[0-9]*-[0-9]*"):
            if mark.name.replace("-", "").isdigit():
                mark.unlink()  # as if all of it had other numbers now
        subprocess.run(["git", "-C", moved, "config", "remote.origin.url",
                        "https://github.com/victim/private"], check=True, env=self.box.env)  # fmt: skip
        self.assert_refused(self.box.run("run", "--github", cwd=moved), "victim/private")

    def test_a_folder_that_no_vm_could_write_may_change_its_remote(self) -> None:
        for url in ("https://github.com/octo/widget", "https://github.com/octo/gadget"):
            self.remote(url)
            self.assertEqual(self.box.run("run", "--github", "--readonly").status, 0)

    def test_another_folder_that_an_agent_could_write(self) -> None:
        other = self.box.home / "other"
        subprocess.run(["git", "init", "-q", other], check=True, env=self.box.env)
        self.assertEqual(self.box.run("run", "--mount", f"{other}:rw").status, 0)
        url = ("config", "remote.origin.url", "https://github.com/victim/other")
        subprocess.run(["git", "-C", other, *url], check=True, env=self.box.env)
        self.assert_refused(self.box.run("run", "--github", cwd=other), "an agent was here before")

    def test_remotes_that_were_accepted_may_take_turns(self) -> None:
        other = "https://github.com/me/widget"
        self.assertEqual(self.box.run("run", "--github").status, 0)
        self.remote(other)
        self.assertEqual(self.box.run("run", "--github=me/widget").status, 0)
        for url in ("https://github.com/octo/widget", other):
            self.remote(url)
            self.assertEqual(self.box.run("run", "--github").status, 0, url)
        self.assertEqual(self.box.run("run", "--github=third/one").status, 0)
        self.assertEqual(self.box.run("run", "--github").status, 0, "a name by hand is no remote")

    def test_a_word_after_the_flag_is_not_lost(self) -> None:
        for word in ("other/thing", "auto", "off"):
            result = self.box.run("run", "--github", word, "--", "-p", "x")
            self.assert_refused(result, f"--github={word}", status=2)

    def test_a_policy_that_an_agent_can_write(self) -> None:
        text = "[policy]\nallow = default-branch\n"
        mine = self.box.write(self.box.home / "policy.ini", text)
        planted = self.box.write(self.box.project / "policy.ini", text)
        link = self.box.home / "link.ini"
        link.symlink_to(planted)
        out = self.box.project / "out.ini"
        out.symlink_to(mine)
        for path in (planted, link, "policy.ini", out):
            result = self.box.run("run", "--github", f"--github-policy={path}")
            self.assert_refused(result, "which an agent can write")
        top, mid = self.box.home / "top.ini", self.box.project / "mid.ini"
        mid.symlink_to(mine)
        top.symlink_to(mid)
        result = self.box.run("run", "--github", f"--github-policy={top}")
        self.assert_refused(result, "which an agent can write")
        folder = self.box.home / "folder"
        shared = self.box.write(folder / "policy.ini", text)
        result = self.box.run(
            "run", "--github", "--mount", f"{folder}:rw", "--github-policy", str(shared)
        )
        self.assert_refused(result, "which an agent can write")
        self.assertEqual(self.box.run("run", "--mount", f"{folder}:rw").status, 0)
        result = self.box.run("run", "--github", "--github-policy", str(shared))
        self.assert_refused(result, "which an agent can write")
        result = self.box.run("run", "--github=octo/widget", f"--github-policy={mine}")
        self.assertEqual(result.status, 0, result.err)

    def test_readonly_is_told_by_the_proxy(self) -> None:
        policy = self.box.write(self.box.home / "policy.ini", "[policy]\nreadonly = yes\n")
        for argv, env in (
            ([f"--github-policy={policy}"], {}), ([], {"GITHUB_MCP_READONLY": "true"}),
        ):  # fmt: skip
            result = self.box.run(
                "run", "--github", *argv, "--", "sh:cat ~/.claude/CLAUDE.md", **env
            )
            self.assertIn("GitHub: octo/widget, read-only\n", result.err)
            self.assertIn("Everything there is read-only", result.out)
        result = self.box.run("run", "--github", "--no-readonly", GITHUB_MCP_READONLY="1")
        self.assertIn("GitHub: octo/widget\n", result.err)

    def test_a_profile_that_does_not_work_stops_the_run(self) -> None:
        env = {"GITHUB_MCP_TOKEN": ""}
        result = self.box.run("run", "--github", "--github-profile=nope", **env)
        self.assert_refused(result, "the GitHub proxy did not start", "github-app-token.ini")
        self.assertEqual(self.box.limactl("start"), [])
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
        self.assertIn("1 write, 0 refused", result.err)
        (token,) = github.tokens
        sent = {x.headers["authorization"] for x in self.upstream.seen}
        self.assertEqual(sent, {f"Bearer {token}"})
        self.assertNotIn(token, json.dumps(self.box.calls()) + result.err)

    def test_gh_is_asked_for_only_after_a_yes(self) -> None:
        calls = self.box.root / "gh-calls"
        executable(self.box.bin / "gh", f'echo "$*" >> {calls}; echo {TOKEN}')
        self.box.env.pop("GITHUB_MCP_TOKEN")
        self.assert_refused(
            self.box.run("run", "--github"), "no GitHub token", "gh's at a terminal"
        )
        for answer, status in (("n\r", 125), ("y\r", 0)):
            self.assertFalse(calls.exists())
            terminal = self.box.terminal("run", "--github")
            terminal.expect("all your repositories")
            terminal.type(answer)
            self.assertEqual(terminal.wait(), status, terminal.seen)
        self.assertEqual(self.box.run("run", "--github").status, 0)
        self.assertEqual(calls.read_text(), "auth token --hostname github.com\n" * 2)
        self.assertEqual(
            {x.headers["authorization"] for x in self.upstream.seen}, {f"Bearer {TOKEN}"}
        )

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

    def test_the_probe_is_not_in_the_log_of_the_agent(self) -> None:
        self.box.run("run", "--github")
        self.assertEqual(self.box.run("log").out, "")
        self.assertIn("agent-vm-probe", self.audits()[0].read_text())

    def test_hooks_are_asked_about_too(self) -> None:
        self.box.write(self.box.project / ".claude-vm.runtime.sh", BRANCH.replace("'$name'", "h"))
        terminal = self.box.terminal("run", "--github", "--confirm-writes", "--", "-p", "x")
        terminal.expect('create_branch {"branch": "h"}')
        terminal.type("y\r")
        self.assertEqual(terminal.wait(), 0, terminal.seen)
        self.assertIn("done: create_branch branch=h", terminal.seen)

    def test_a_remote_that_has_changed_is_asked_about(self) -> None:
        self.assertEqual(self.box.run("run", "--github").status, 0)
        self.remote("https://github.com/evil/secret.git")
        self.assert_refused(self.box.run("run", "--github"), "evil/secret", "octo/widget")
        self.box.write_config("github = auto")
        self.assert_refused(self.box.run("run"), "evil/secret")
        self.assertEqual(self.box.run("run", "--github=evil/secret").status, 0)
        self.assertEqual(self.box.run("run", "--github").status, 0)

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
        self.assert_refused(self.box.run("run", "--github"), "no remote on github.com")

    def test_a_probe_that_is_not_refused_stops_the_run(self) -> None:
        executable(self.box.guest_bin / "curl", "echo '{}'")
        result = self.box.run("run", "--github", "--", "-p", "x")
        self.assert_refused(result, "does not protect", "another repository over MCP")
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
        self.assert_refused(result, "github_mcp_proxy.py is missing", str(alone))
        self.assertEqual(self.box.run("run", script=alone).status, 0)

    def test_kill_9_ends_the_proxy(self) -> None:
        process = self.box.start("run", "--github", "--", "-p", LOOK + "touch ready; sleep 60")
        self.box.wait_for_file("ready")
        server = json.loads(self.guest_file("claude.json"))["mcpServers"]["github"]
        port = int(server["url"].rpartition(":")[2].partition("/")[0])
        with socket.create_connection(("127.0.0.1", port)):
            self.box.kill(process)
        self.assert_the_proxy_is_gone(port)

    def test_doctor_looks_at_it_where_it_is_asked_for(self) -> None:
        def line() -> str:
            found = [x for x in self.box.run("doctor").out.splitlines() if " GitHub: " in x]
            return found[0] if found else ""

        self.assertEqual(line(), "")
        for config, words in (
            ("github = auto", "ok    GitHub: auto, with the token of GITHUB_MCP_TOKEN"),
            ("github = sometimes", "fail  GitHub: config.ini: github: 'sometimes' is not"),
            ("github = auto\ngithub-policy = /nope", "fail  GitHub: config.ini: github-policy"),
        ):
            self.box.write_config(config)
            self.assertIn(words, line())
        self.box.write_config("github = auto")
        self.box.env.pop("GITHUB_MCP_TOKEN")
        self.assertIn("warn  GitHub: there is no token", line())

    def test_the_agents_words_are_its_own(self) -> None:
        self.box.run("run", "--github", "--", "--github", "-p", "x")
        self.assertEqual(
            self.box.agent_calls()[0]["argv"],
            ["--dangerously-skip-permissions", "--github", "-p", "x"],
        )


BRANCH = """
curl -s -H @$HOME/.agent-vm/github-header -H 'Content-Type: application/json' \\
  -H 'Accept: application/json, text/event-stream' -d '{"jsonrpc": "2.0", "id": 1, "method":
  "tools/call", "params": {"name": "create_branch", "arguments": {"branch": "'$name'"}}}' \\
  "$(jq -r .mcpServers.github.url ~/.claude.json)"
"""


def expect_again(terminal: Any) -> None:
    """The question once more."""
    terminal.seen = ""
    terminal.expect("allow? y/n ")


class ConfirmTest(GitHubWorld):
    """--confirm-writes: what the person at the terminal says."""

    def ask(self, script: str) -> Any:
        return self.box.terminal("run", "--github", "--confirm-writes", "--", f"sh:{script}")

    def created(self) -> list[str]:
        return [x.arguments["branch"] for x in self.upstream.calls("create_branch")]

    def test_yes_and_no(self) -> None:
        script = "".join(f"name={name}; ({BRANCH}) > {name}; " for name in ("one", "two", "three"))
        terminal = self.ask(script + "read line; echo read=$line > typed")
        terminal.expect('create_branch {"branch": "one"')
        terminal.expect("allow? y/n ")
        self.assertEqual(self.created(), [])
        terminal.type("perhaps\r")
        expect_again(terminal)
        terminal.type("y\r")
        terminal.expect('"two"')
        self.assertEqual(self.created(), ["one"])
        time.sleep(0.5)
        terminal.type("n\r")
        terminal.expect('"three"')
        time.sleep(0.5)
        terminal.type("\x04")
        wait_for(lambda: "said no" in self.text_of("three"), "the answer to the agent")
        terminal.type("to the agent\r")
        self.assertEqual(terminal.wait(), 0, terminal.seen)
        self.assertEqual(self.created(), ["one"])
        self.assertIn("the user said no", self.text_of("two"))
        self.assertEqual(self.guest_file("typed"), "read=to the agent\n")
        self.assertIn("1 write, 2 refused", terminal.seen)
        self.assert_nothing_left()

    def text_of(self, name: str) -> str:
        path = self.box.project / name
        return path.read_text() if path.exists() else ""

    def test_a_word_that_was_typed_before_the_question_is_no_answer(self) -> None:
        terminal = self.ask(
            f"echo wait; while [ ! -e typed ]; do sleep 0.1; done; name=b; {BRANCH}"
        )
        terminal.expect("wait")
        terminal.type("y")
        (self.box.project / "typed").touch()
        terminal.expect("allow? y/n ")
        terminal.type("\r")
        expect_again(terminal)
        self.assertEqual(self.created(), [])
        terminal.type("n\r")
        self.assertEqual(terminal.wait(), 0, terminal.seen)

    def test_ctrl_c_at_the_question_ends_the_run(self) -> None:
        terminal = self.ask(f"name=b; {BRANCH}; sleep 60")
        terminal.expect("allow? y/n ")
        terminal.type("\x03")
        self.assertEqual(terminal.wait(), 130, terminal.seen)
        self.assertEqual(self.created(), [])
        self.assert_nothing_left()

    def test_what_the_guest_left_of_the_screen_does_not_matter(self) -> None:
        terminal = self.ask(f"printf '\\033[23;24r\\033[?7l\\033(0\\033P'; name=b; {BRANCH}")
        terminal.expect("allow? y/n ")
        before, _, asked = terminal.seen.rpartition("\x18")
        self.assertIn("\x1b[23;24r", before)
        for reset in ("\x1b\\", "\x1b[r", "\x1b[?7h", "\x1b(B", "\x1b[0m", "\x1b[2J\x1b[H"):
            self.assertIn(reset, asked.partition("The agent")[0])
        terminal.type("n\r")
        self.assertEqual(terminal.wait(), 0, terminal.seen)

    def test_a_question_that_does_not_fit_is_not_asked(self) -> None:
        terminal = self.ask(f"touch up; while [ ! -e small ]; do sleep 0.1; done; name=b\n{BRANCH}")
        self.box.wait_for_file("up")
        terminal.resize(5, 20)
        (self.box.project / "small").touch()
        terminal.expect("does not fit")
        self.assertEqual(terminal.wait(), 0, terminal.seen)
        self.assertEqual(self.created(), [])

    def test_the_terminal_is_as_it_was_before(self) -> None:
        terminal = self.ask(f"name=b\n{BRANCH}")
        before = terminal.mode()
        terminal.expect("allow? y/n ")
        self.assertNotEqual(terminal.mode(), before)
        terminal.type("n\r")
        terminal.wait()
        self.assertEqual(terminal.mode(), before)

    def test_an_ssh_that_is_killed_leaves_no_raw_terminal(self) -> None:
        if not Path("/proc/self/cmdline").exists():
            self.skipTest("no /proc")
        terminal = self.ask("touch up; sleep 60")
        before = terminal.mode()
        self.box.wait_for_file("up")
        self.assertNotEqual(terminal.mode(), before)
        pid = terminal.process.pid
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        (ssh,) = [int(x) for x in children if b"-S\0none" in read(Path(f"/proc/{x}/cmdline"))]
        os.kill(ssh, signal.SIGKILL)
        terminal.wait()
        self.assertEqual(terminal.mode(), before)

    def test_an_end_during_the_question(self) -> None:
        terminal = self.ask(f"name=b; {BRANCH}")
        terminal.expect("allow? y/n ")
        terminal.process.terminate()
        self.assertEqual(terminal.wait(), 143, terminal.seen)
        self.assertEqual(self.created(), [])
        self.assert_nothing_left()

    def test_nobody_to_ask(self) -> None:
        result = self.box.run("run", "--github", "--confirm-writes", new_session=True)
        self.assert_refused(result, "no terminal to ask at")
        self.assert_nothing_left()


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
        self.git("push", "-q", str(self.bare), "main")

    def test_fetch_push_and_refusals(self) -> None:
        self.remote("git@github.com:octo/widget.git")
        script = f"""sh:{GUEST_GIT}
        exec > said 2>&1
        g fetch origin main && echo fetched
        g clone -q https://github.com/octo/widget cloned && echo cloned
        git commit -q --allow-empty -m second
        g push origin HEAD:fix && echo pushed
        g push origin HEAD:main
        g ls-remote http://host.lima.internal:$port/git/evil/secret.git
        g push origin :fix
        true"""
        result = self.box.run("run", "--github", "--", script)
        self.assertEqual(result.status, 0, result.err)
        said = self.guest_file("said")
        for words in ("fetched", "cloned", "pushed", "remote: refused: refs/heads/main",
                      "only octo/widget is served here", "remote: refused: refs/heads/fix"):  # fmt: skip
            self.assertIn(words, said)
        refs = subprocess.run(["git", "-C", self.bare, "for-each-ref", "--format=%(subject) %(refname)"],
                              capture_output=True, text=True, check=True)  # fmt: skip
        self.assertEqual(refs.stdout, "second refs/heads/fix\nfirst refs/heads/main\n")
        self.assertIn("done: git push ref=refs/heads/fix\n", result.err)
        self.assertIn("1 write, 3 refused", result.err)
        self.assertIn("refs/heads/main", result.err)


if __name__ == "__main__":
    unittest.main()
