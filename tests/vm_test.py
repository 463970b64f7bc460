"""The promises on the real limactl: boots many VMs, some minutes with KVM (make vm-test)."""

from __future__ import annotations

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
import unittest
from pathlib import Path

import agent_vm
from tests.support import Terminal
from tests.vm_case import GITHUB_TOKEN
from tests.vm_case import SCRIPT
from tests.vm_case import TOKEN
from tests.vm_case import processes_of
from tests.vm_case import wait_for
from tests.vm_network import NetworkTests
from tests.vm_resume import ResumeTests

AWKWARD = "it's a project, $HOME: ünïcode"

# Written just before the end: a large file, and pages that only a memory map has made dirty.
WRITE_AND_DIE = """
import mmap, os
with open("large", "wb") as file:
    for _ in range(64):
        file.write(os.urandom(1 << 20))
with open("mapped", "wb+") as file:
    file.truncate(1 << 20)
    memory = mmap.mmap(file.fileno(), 1 << 20)
    memory[:] = b"m" * (1 << 20)
os._exit(37)
"""

LOOK_AROUND = r"""
exec 2>&1
pwd
git config user.name; git config user.email
git status --short > /dev/null && echo git-works
date +%Z
ls ~/.ssh
env | grep -c -i ssh_auth
sudo mount -o remount,rw "$1"; sudo touch "$1/sneaked" || echo read-only-holds
ls -d "$2" || echo no-host-home
"""


# In the guest of a run with GitHub; TOKEN comes in two parts, or the search would find itself.
USE_GITHUB = r"""
exec > guest.log 2>&1
base=$(sed -n 's/^\[http "\(.*\)"\]/\1/p' ~/.agent-vm/gitconfig)git
cd ~
git clone -q https://github.com/good/r one && echo cloned by https
git clone -q --depth 1 ssh://git@github.com/good/r.git two && echo cloned by ssh
cd one
git commit -q --allow-empty -m "from the guest"
git fetch -q origin && echo fetched
git push -q origin HEAD:fix && echo pushed
git push -q origin HEAD:main || echo main is refused
git push -q origin HEAD:refs/tags/v1 || echo tags are refused
for path in evil/secret.git good/r.wiki.git good/r.git/../../evil/secret.git; do
  git ls-remote "$base/$path" || echo "no $path"
done
git -c protocol.allow=always submodule add "$base/evil/secret.git" sub || echo no submodule
claude mcp list
sudo cat /proc/[0-9]*/environ /proc/[0-9]*/cmdline 2> /dev/null | tr '\0' '\n' > ~/processes
grep -c -e "$1$2" ~/processes
sync
cd "$3"
touch looked
while [ -e looked ]; do sleep 0.2; done
"""


class VMTest(ResumeTests, NetworkTests):
    def test_a_whole_turn_of_claude_code_and_then_continue_it(self) -> None:
        project = self.project(AWKWARD)
        log = self.root / "model.log"
        earlier = len(log.read_text().splitlines()) if log.exists() else 0
        first = self.agent_vm("run", "--", "-p", "write a file", cwd=project)
        self.assertEqual((first.returncode, first.stdout), (0, "all done\n"), first.stderr)
        self.assertEqual((project / "agent.txt").read_text(), "written by the agent\n")
        self.assert_nothing_left()
        before = [json.loads(line) for line in log.read_text().splitlines()[earlier:]]
        second = self.agent_vm("run", "--", "-c", "-p", "and again", cwd=project)
        self.assertEqual((second.returncode, second.stdout), (0, "all done\n"), second.stderr)
        after = [json.loads(line) for line in log.read_text().splitlines()][earlier + len(before) :]
        longest = [max(entry["messages"] for entry in entries) for entries in (before, after)]
        self.assertGreater(longest[1], longest[0])
        self.assertEqual({entry["x-api-key"] for entry in after}, {TOKEN})

    def test_what_is_written_last_is_kept_and_the_status_comes_back(self) -> None:
        project = self.project()
        result = self.agent_vm("shell", "--", "python3", "-c", WRITE_AND_DIE, cwd=project)
        self.assertEqual(result.returncode, 37, result.stderr)
        self.assertEqual((project / "large").stat().st_size, 64 << 20)
        self.assertEqual((project / "mapped").read_bytes(), b"m" * (1 << 20))
        self.assert_nothing_left()

    def test_the_guest_is_a_place_to_work_and_holds_nothing_of_the_host(self) -> None:
        project, other = self.project(), self.project("other")
        subprocess.run(["git", "init", "-q", project], check=True, env=self.env)
        argv = ("bash", "-c", LOOK_AROUND, "look", str(other), self.env["HOME"])
        result = self.agent_vm("shell", "--mount", str(other), "--", *argv, cwd=project)
        lines = result.stdout.splitlines()
        self.assertEqual(lines[:4], [str(project), "Ada L.", "ada@example.org", "git-works"])
        self.assertIn(lines[4], ("CET", "CEST"))
        self.assertIn("authorized_keys", lines)
        self.assertNotIn("id_", result.stdout)
        self.assertIn("read-only-holds", lines)
        self.assertIn("no-host-home", lines)
        self.assertEqual(list(other.iterdir()), [])

    def test_readonly_holds_against_root_in_the_guest(self) -> None:
        project = self.project()
        script = "sudo mount -o remount,rw .; sudo touch sneaked; sudo mount -t 9p"
        self.agent_vm("shell", "--readonly", "--", "bash", "-c", script, cwd=project)
        self.assertEqual(list(project.iterdir()), [])

    def test_arguments_reach_the_guest_untouched(self) -> None:
        words = ["fix 'all' $errors", "", "two\nlines", "ünïcode", "--", "-p", "a\\b", "*", "`id`"]
        result = self.agent_vm("shell", "--", "printf", "%s\\0", *words, cwd=self.project())
        self.assertEqual(result.stdout.split("\0")[:-1], words, result.stderr)

    def test_a_signal_in_the_guest_is_a_status(self) -> None:
        result = self.agent_vm("shell", "--", "bash", "-c", "kill -9 $$", cwd=self.project())
        self.assertEqual(result.returncode, 137, result.stderr)

    def test_ctrl_c_at_any_moment_of_the_start(self) -> None:
        for delay in (0.0, 0.7, 2.0, 3.0, 12.0):
            with (
                self.subTest(delay=delay),
                self.start("shell", "--", "sleep", "60", cwd=self.project()) as process,
            ):
                name = self.started_clone(process)
                time.sleep(delay)
                process.send_signal(signal.SIGINT)
                process.send_signal(signal.SIGINT)
                process.communicate()
                self.assertEqual(process.returncode, 130)
                self.assert_nothing_left()
                self.assert_processes_end(name)

    def test_kill_9_and_the_next_command_cleans_up(self) -> None:
        project = self.project()
        process = self.start("shell", "--", "bash", "-c", "touch up; sleep 600", cwd=project)
        name = self.started_clone(process)
        self.wait_until_up(process, project)
        live = self.agent_vm("gc")
        self.assertEqual((live.stdout, self.clones()), ("", [name]))
        self.assertEqual(len(self.sides(name)), 2)
        process.kill()
        process.wait()
        wait_for(lambda: not self.sides(name), 10, "the end of its sides")
        gc = self.agent_vm("gc")
        process.communicate()  # its ssh held the pipes until the VM was gone
        self.assertIn(f"removed {name}", gc.stderr)
        self.assert_nothing_left()
        self.assert_processes_end(name)

    def test_sigterm_keeps_what_was_written(self) -> None:
        project = self.project()
        script = "dd if=/dev/zero of=zeros bs=1M count=32 status=none; touch up; sleep 600"
        with self.start("shell", "--", "bash", "-c", script, cwd=project) as process:
            self.started_clone(process)
            self.wait_until_up(process, project)
            process.terminate()
            process.communicate()
        self.assertEqual(process.returncode, 143)
        self.assertEqual((project / "zeros").stat().st_size, 32 << 20)
        self.assert_nothing_left()

    def test_a_connection_that_breaks_keeps_the_vm(self) -> None:
        project = self.project()
        process = self.start("shell", "--", "bash", "-c", "touch up; sleep 600", cwd=project)
        name = self.started_clone(process)
        self.wait_until_up(process, project)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(children[-1]), signal.SIGKILL)
        _, err = process.communicate()
        self.assertIn("the connection to the VM broke", err)
        self.assertIn(f"kept {name}", err)
        self.assertEqual((process.returncode, self.agent_vm("gc").stdout), (125, ""))
        there = self.agent_vm("list", "--json").stdout.splitlines()
        self.assertIn((name, "Stopped", "kept"), [
            (row["name"], row["status"], row["role"]) for row in map(json.loads, there)
        ])  # fmt: skip
        self.assertEqual(self.agent_vm("rm", name).returncode, 0)
        self.assert_nothing_left()

    def test_what_an_agent_leaves_does_not_hold_the_run(self) -> None:
        script = "sleep 1000 & echo hi; exit 3"
        result = self.agent_vm("shell", "--", "bash", "-c", script, cwd=self.project())
        self.assertEqual((result.returncode, result.stdout), (3, "hi\n"), result.stderr)

    def test_ctrl_z_does_not_stop_the_agent_for_good(self) -> None:
        project = self.project()
        script = "touch up; read -r line; echo got $line; exit 4"
        argv = [sys.executable, str(SCRIPT), "shell", "--", "bash", "-c", script]
        terminal = Terminal(argv, {**self.env, "TERM": "xterm"}, project, None)
        wait_for((project / "up").exists, 900, "the agent runs")
        self.assertEqual(terminal.stop_then_answer(pause=1), 4)
        terminal.close()
        self.assert_nothing_left()

    def with_env(self, **more: str) -> None:
        before = {name: self.env.get(name) for name in more}
        self.addCleanup(
            lambda: [
                self.env.pop(k) if v is None else self.env.update({k: v}) for k, v in before.items()
            ]
        )
        self.env.update(more)

    def test_a_worktree_a_gateway_and_a_companys_proxy(self) -> None:
        """Items 11, 16, 17, 18: what the agent needs of the host is direct, and git commits."""
        main, project = self.project("main"), self.project("tree")
        project.rmdir()
        for argv in (("init", "-q", "-b", "main"), ("commit", "-q", "--allow-empty", "-m", "first"),
                     ("worktree", "add", "-q", "-b", "tree", str(project)),
                     ("config", "commit.gpgSign", "true")):  # fmt: skip
            subprocess.run(["git", "-C", main, *argv], env=self.env, check=True)
        (project / ".claude").mkdir()
        allowed = json.dumps({"permissions": {"allow": ["Write", "Bash(*)", "Edit"]}})
        (project / ".claude/settings.json").write_text(allowed)
        port = self.env["ANTHROPIC_BASE_URL"].rpartition(":")[2]
        self.with_env(ANTHROPIC_BASE_URL=f"http://LOCALHOST:{port}", http_proxy="http://127.0.0.1:9",
                      https_proxy="http://127.0.0.1:9", LC_ALL="xx_XX.UTF-8")  # fmt: skip
        script = (
            "claude -p 'write a file' && git add -A && git commit -q -m by-the-agent && echo ok"
        )
        result = self.agent_vm("shell", "--", "bash", "-c", script, cwd=project)
        self.assertEqual((result.returncode, result.stdout), (0, "all done\nok\n"), result.stderr)
        self.assertIn("commits are not signed", result.stderr)
        self.assertNotIn("setlocale", result.stderr)
        log = ("git", "-C", str(main), "log", "--format=%s", "tree")
        said = subprocess.run(log, stdout=subprocess.PIPE, text=True, check=True).stdout
        self.assertEqual(said.splitlines()[0], "by-the-agent")
        self.assert_nothing_left()

    def test_a_kept_vm_is_started_again(self) -> None:
        """Items 25, 26, 29: its folders are there, and what is read is fresh."""
        project, other = self.project(AWKWARD), self.project("other")
        (other / "note").write_text("old\n")
        result = self.agent_vm("shell", "--keep", "--mount", str(other), "--", "true", cwd=project)
        self.assertEqual(result.returncode, 0, result.stderr)
        (name,) = self.clones()
        self.assertEqual(self.agent_vm("stop", name).returncode, 0)
        started = self.agent_vm("start", name)
        self.assertEqual(started.returncode, 0, started.stderr)
        config = str(self.root / "l" / name / "ssh.config")
        inside = ("ssh", "-F", config, f"lima-{name}")
        look = f"cat {other}/note; git config core.checkStat; ls -d {shlex.quote(str(project))}"
        for text in ("old\n", "new\n"):
            (other / "note").write_text(text)
            said = subprocess.run([*inside, look], stdout=subprocess.PIPE, text=True).stdout
            self.assertEqual(said, f"{text}minimal\n{project}\n")
        self.assertEqual(self.agent_vm("rm", name).returncode, 0)
        self.assert_nothing_left()

    def test_a_vm_that_stands_still_is_said_and_a_read_only_one_keeps_nothing(self) -> None:
        """Items 19, 28."""
        project = self.project()
        key = agent_vm.session_key(str(project))
        note = self.root / "state/agent-vm/sessions" / key / "p/memory/MEMORY.md"
        note.parent.mkdir(parents=True, exist_ok=True)
        note.write_text("as it was\n")
        up = self.project("up")
        script = "cat ~/.claude/projects/p/memory/MEMORY.md; echo mine > ~/.claude/projects/p/new; "
        script += f"touch {up}/up; while [ -e {up}/up ]; do sleep 0.2; done"
        mount = ("--readonly", "--mount", f"{up}:rw")
        with self.start("shell", *mount, "--", "bash", "-c", script, cwd=project) as process:
            name = self.started_clone(process)
            self.wait_until_up(process, up)
            self.qmp(name, "stop")
            time.sleep(12)
            self.qmp(name, "cont")
            (up / "up").unlink()
            out, err = process.communicate()
        self.assertEqual((process.returncode, out), (0, "as it was\n"), err)
        self.assertIn("the VM stands still (paused)", err)
        self.assertIn(f"agent-vm rm --force {name}", err)
        self.assertEqual(sorted(path.name for path in note.parents[1].iterdir()), ["memory"])
        self.assert_nothing_left()

    def qmp(self, name: str, command: str) -> None:
        with socket.socket(socket.AF_UNIX) as qemu:
            qemu.connect(str(self.root / "l" / name / "qmp.sock"))
            with qemu.makefile("rw") as lines:
                for wanted in ("qmp_capabilities", command):
                    lines.readline()
                    lines.write(json.dumps({"execute": wanted}))
                    lines.flush()
                lines.readline()

    def test_three_at_once_in_one_project(self) -> None:
        project = self.project()
        command = ("shell", "--", "bash", "-c", "hostname >> $(hostname)")
        processes = [self.start(*command, cwd=project) for _ in range(3)]
        outputs = [process.communicate() for process in processes]
        self.assertEqual([process.returncode for process in processes], [0, 0, 0], outputs)
        self.assertEqual(len(list(project.iterdir())), 3)
        self.assert_nothing_left()

    def test_claude_code_uses_github(self) -> None:
        self.serve_github()
        argv = ("--repo", "good/r", "--", "-p", "use mcp__github__list_issues")
        result = self.agent_vm("run", *argv, cwd=self.project())
        self.assertEqual((result.returncode, result.stdout), (0, "all done\n"), result.stderr)
        self.assertIn("1 reads, 0 writes, 0 refused", result.stderr)

    def test_git_in_the_guest_reaches_one_repository_and_no_token(self) -> None:
        bare, project = self.serve_github(), self.project()
        middle = len(GITHUB_TOKEN) // 2
        parts = (GITHUB_TOKEN[:middle], GITHUB_TOKEN[middle:], str(project))
        argv = ("shell", "--repo", "good/r", "--", "bash", "-c", USE_GITHUB, "use", *parts)
        with self.start(*argv, cwd=project) as process:
            name = self.started_clone(process)
            wait_for(
                lambda: (project / "looked").exists() or process.poll() is not None, 900, "git"
            )
            found = subprocess.run(
                ["grep", "-rlaF", GITHUB_TOKEN, str(self.root / "l" / name), str(project)],
                stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
            )  # fmt: skip
            (project / "looked").unlink()
            _, err = process.communicate()
        said = (project / "guest.log").read_text()
        self.assertEqual((process.returncode, found.stdout), (0, ""), err)
        for words in (
            "cloned by https", "cloned by ssh", "fetched", "pushed", "main is refused",
            "(refused: main is the default branch",
            "tags are refused", "no evil/secret.git", "no good/r.wiki.git", "no submodule",
            "no good/r.git/../../evil/secret.git", "only good/r is served here", "Connected",
        ):  # fmt: skip
            self.assertIn(words, said)
        self.assertRegex(said, r"(?m)^0$")
        self.assertNotIn("no good/r.git\n", said)
        refs = subprocess.run(
            ["git", "-C", bare, "for-each-ref", "--format=%(subject) %(refname)"],
            stdout=subprocess.PIPE, text=True, check=True,
        )  # fmt: skip
        self.assertEqual(refs.stdout, "from the guest refs/heads/fix\nfirst refs/heads/main\n")
        self.assertIn("done: git push ref=refs/heads/fix", err)
        self.assertIn("refused: git push ref=refs/heads/main", err)
        self.assert_nothing_left()

    def test_each_push_is_put_to_the_users_own_command(self) -> None:
        bare, project = self.serve_github(), self.project()
        asked, approve = self.root / "asked", self.root / "approve"
        approve.write_text(
            f"#!/bin/sh\ncat > {asked}; grep -q refs/heads/a {asked} && exit 0\n"
            "echo not this one; exit 1\n"
        )
        approve.chmod(0o755)
        policy = self.root / "policy.ini"
        policy.write_text(f"[policy]\napprove = {approve}\n")
        script = (
            "git clone -q https://github.com/good/r ~/r; cd ~/r; git push -q origin HEAD:a;"
            " git push origin HEAD:b; exit 7"
        )
        argv = ("--repo", "good/r", "--github-policy", str(policy), "--", "bash", "-c", script)
        result = self.agent_vm("shell", *argv, cwd=project)
        self.assertEqual(result.returncode, 7, result.stderr)
        self.assertIn("not this one", result.stderr)
        refs = subprocess.run(
            ["git", "-C", bare, "for-each-ref", "--format=%(refname)"],
            stdout=subprocess.PIPE, text=True, check=True,
        )  # fmt: skip
        self.assertEqual(refs.stdout, "refs/heads/a\nrefs/heads/main\n")
        self.assertIn("done: git push ref=refs/heads/a", result.stderr)
        self.assert_nothing_left()

    def test_github_readonly_and_kill_9(self) -> None:
        self.serve_github()
        project = self.project()
        script = "git clone https://github.com/good/r ~/r; cd ~/r; git push origin HEAD:fix; cat"
        argv = ("shell", "--repo", "good/r", "--readonly", "--", "bash", "-c", script)
        errors = self.root / "readonly.log"
        with open(errors, "w") as file:
            process = subprocess.Popen(
                [sys.executable, SCRIPT, *argv], env=self.env, cwd=project, text=True,
                stdin=subprocess.PIPE, stdout=file, stderr=file,
            )  # fmt: skip
        name = self.started_clone(process)
        wait_for(lambda: "the policy is read-only" in errors.read_text(), 900, "a refused push")
        self.assertEqual(len([p for p in processes_of(name) if "github_mcp_proxy" in p]), 1)
        process.kill()
        process.wait()
        assert process.stdin
        process.stdin.close()
        wait_for(
            lambda: not [p for p in processes_of(name) if "github_mcp_proxy" in p], 10, "its end"
        )
        self.assertIn(f"removed {name}", self.agent_vm("gc").stderr)
        self.assert_nothing_left()

    def test_the_mounts_of_limas_defaults_are_refused(self) -> None:
        project, defaults = self.project(), self.root / "l/_config/default.yaml"
        defaults.write_text(f"mounts: [{{location: {self.env['HOME']}, writable: true}}]\n")
        self.addCleanup(defaults.unlink)
        result = self.agent_vm("shell", "--", "true", cwd=project)
        self.assertEqual(result.returncode, 125)
        self.assertIn("would not be confined", result.stderr)
        self.assert_nothing_left()


if __name__ == "__main__":
    unittest.main()
