"""`run` and `shell` from the outside: what the agent gets, what comes back, what is left."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import unittest
from pathlib import Path
from typing import Any
from typing import ClassVar

import agent_vm
from tests import quick
from tests.quick import Result
from tests.support import BASE
from tests.support import BASE_NAME
from tests.support import TOKEN
from tests.support import Sandbox
from tests.support import WorldTest
from tests.support import executable
from tests.support import live
from tests.support import open_sandbox
from tests.support import wait_for

AWKWARD = 'it\'s a project, $HOME: "ünïcode" 日本'
WORDS = [
    "-p", "fix 'all' \"$errors\"", "", "two\nlines", "ünïcode", "--", "--resume", "-c", "--keep",
    "--memory", "0", "a\\b", "*", "`id`", "!x", " ", "-", "~", "\t", "&& exit 3",
]  # fmt: skip
LOOK_AROUND = """sh:cat; echo oops >&2
exec > seen
git config user.name; git config user.email
git status --short > /dev/null 2>&1 && echo git-works
echo
ls -A ~/.ssh 2>&1
cp ~/.claude.json claude.json; cp ~/.claude/settings.json settings.json
echo turn > ~/.claude/projects/transcript
find ~/.agent-vm/credential ~/.agent-vm/env -perm 600
"""


class WholeRunTest(unittest.TestCase):
    """One run with everything awkward in it, seen from all sides."""

    box: ClassVar[Sandbox]
    result: ClassVar[Result]
    project: ClassVar[Path]
    call: ClassVar[dict[str, Any]]
    seen: ClassVar[list[str]]

    @classmethod
    def setUpClass(cls) -> None:
        cls.box = open_sandbox()
        cls.addClassCleanup(cls.box.close)
        cls.box.make_base()
        cls.box.write(cls.box.home / ".gitconfig", "[user]\nname = Ada L.\nemail = a@example.org\n")
        cls.box.write(cls.box.home / ".ssh/id_ed25519", "a key of the host", 0o600)
        cls.project = cls.box.home / AWKWARD
        cls.project.mkdir()
        subprocess.run(["git", "init", "-q", cls.project], env=cls.box.env, check=True)
        cls.result = cls.box.run(
            "run", "--", *WORDS, LOOK_AROUND, cwd=cls.project, text="from stdin\n",
            CLAUDE_CODE_OAUTH_TOKEN=TOKEN, TZ="Europe/Berlin", COLORTERM="truecolor",
            SSH_AUTH_SOCK="/run/agent.sock", GITHUB_TOKEN="of the host", ANTHROPIC_MODEL="a-model",
        )  # fmt: skip
        cls.call = (cls.box.agent_calls() or [{}])[0]
        cls.seen = (cls.project / "seen").read_text().splitlines() if cls.call else []

    def test_the_agents_status_comes_back(self) -> None:
        self.assertEqual(self.result.status, 0, self.result.err)

    def test_stdin_and_stdout_are_the_agents_byte_for_byte(self) -> None:
        self.assertEqual(self.result.out, "from stdin\n")

    def test_stderr_is_the_agents_and_we_are_quiet(self) -> None:
        self.assertEqual(self.result.err, "oops\n")

    def test_arguments_arrive_untouched(self) -> None:
        expected = ["--dangerously-skip-permissions", *WORDS, LOOK_AROUND]
        self.assertEqual(self.call["argv"], expected)

    def test_the_agent_works_at_the_same_path(self) -> None:
        self.assertEqual(self.call["cwd"], str(self.project))

    def test_without_a_terminal_the_agent_has_none(self) -> None:
        self.assertEqual(self.call["tty"], [False, False, False])

    def test_git_knows_its_user_and_works(self) -> None:
        self.assertEqual(self.seen[:3], ["Ada L.", "a@example.org", "git-works"])

    @unittest.skipUnless(os.path.exists("/usr/share/zoneinfo/Europe/Berlin"), "no time zones here")
    def test_the_time_zone_follows_the_host(self) -> None:
        zone = "/usr/share/zoneinfo/Europe/Berlin"
        if not os.path.isfile(zone):  # the fake guest has those of this machine
            self.skipTest(f"no {zone}")
        (linked,) = [call for call in self.box.tool_calls() if call.startswith("ln ")]
        self.assertRegex(linked, f"^ln -sf {zone} /.*localtime$")

    def test_the_guests_secrets_are_its_users_alone(self) -> None:
        names = [os.path.basename(path) for path in self.seen[-2:]]
        self.assertEqual(names, ["credential", "env"])

    def test_variables_of_the_terminal_and_the_model_are_passed_and_no_others(self) -> None:
        env = self.call["env"]
        self.assertEqual((env["COLORTERM"], env["ANTHROPIC_MODEL"]), ("truecolor", "a-model"))
        self.assertEqual((env["DISABLE_AUTOUPDATER"], env["LANG"]), ("1", "C.UTF-8"))
        self.assertEqual({"SSH_AUTH_SOCK", "GITHUB_TOKEN", "LIMA_HOME"} & set(env), set())

    def test_no_dialog_will_appear(self) -> None:
        config = json.loads((self.project / "claude.json").read_text())
        self.assertTrue(config["hasCompletedOnboarding"])
        self.assertTrue(config["projects"]["/"]["hasTrustDialogAccepted"])
        settings = json.loads((self.project / "settings.json").read_text())
        self.assertTrue(settings["skipDangerousModePermissionPrompt"])

    def test_the_credential_reaches_the_agent(self) -> None:
        self.assertEqual(self.call["env"]["CLAUDE_CODE_OAUTH_TOKEN"], TOKEN)

    def test_no_child_has_a_token_of_githubs_in_its_environment(self) -> None:
        self.assertNotIn("of the host", json.dumps([call["env"] for call in self.box.calls()]))

    def test_the_credential_is_in_no_argument_environment_or_output_of_the_host(self) -> None:
        self.assertGreater(len(self.box.calls("limactl", "ssh")), 5)
        self.assertNotIn(TOKEN, json.dumps(self.box.calls()))
        self.assertNotIn(TOKEN, self.result.out + self.result.err)

    def test_no_file_of_the_host_keeps_the_credential(self) -> None:
        found = subprocess.run(
            ["grep", "-rl", TOKEN, self.box.home, self.box.lima], stdout=subprocess.PIPE, text=True
        )
        self.assertEqual(found.stdout, "")

    def test_only_the_project_and_its_transcripts_are_mounted(self) -> None:
        (project, transcripts), config = self.box.slots(), self.box.started_config()
        self.assertEqual(project, (str(self.project), True))
        self.assertEqual(os.path.dirname(transcripts[0]), str(self.box.state / "sessions"))
        self.assertEqual((config["mounts"], config["mountType"]), ([], "9p"))

    def test_ports_are_forwarded_as_lima_does_it(self) -> None:
        self.assertNotIn("portForwards", self.box.started_config())

    def test_the_transcript_is_kept_on_the_host(self) -> None:
        (session,) = (self.box.state / "sessions").iterdir()
        self.assertEqual((session / "transcript").read_text(), "turn\n")

    def test_the_guest_is_synced_before_the_clone_is_deleted(self) -> None:
        self.assertIn("sync ", self.box.tool_calls())

    def test_nothing_is_left_and_the_base_instance_is_as_before(self) -> None:
        self.assertEqual(self.box.instances(), [BASE])
        self.assertEqual(self.box.leases(), [])
        files = sorted(path.name for path in (self.box.lima / BASE).iterdir())
        self.assertEqual(files, ["disk", "lima-version", "lima.yaml", "protected", "ssh.config"])

    def test_our_folders_are_the_users_alone(self) -> None:
        for folder in (self.box.state, self.box.state / "leases", self.box.state / "sessions"):
            self.assertEqual(folder.stat().st_mode & 0o777, 0o700)


class StatusTest(WorldTest):
    def test_the_status_of_the_agent_is_ours(self) -> None:
        self.assertEqual(self.box.run("run", "--", "sh:exit 7").status, 7)
        self.assert_nothing_left()

    def test_an_agent_that_dies_by_a_signal_has_the_shells_status(self) -> None:
        self.assertEqual(self.box.run("run", "--", "sh:kill -9 $$").status, 137)
        self.assertEqual(self.box.run("shell", "--", "bash", "-c", "kill -TERM $$").status, 143)
        self.assert_nothing_left()

    def test_signals_to_a_whole_group_are_the_agents_own(self) -> None:
        """As `trap 'kill 0' EXIT` in a script does; the shell around it lives on."""
        for signal_name in ("INT", "HUP", "TERM"):
            script = f"trap 'exit 6' {signal_name}; kill -{signal_name} 0; sleep 5"
            self.assertEqual(self.box.run("shell", "--", "bash", "-c", script).status, 6)

    def test_what_is_no_status_is_a_broken_connection(self) -> None:
        self.break_the_agents_ssh("exit 255")
        write = "mkdir -p ~/.agent-vm; echo ² > ~/.agent-vm/status\n"
        self.box.write(self.box.config / "runtime.sh", write)
        self.assertIn("the connection to the VM broke", self.box.run("run").err)

    def test_255_is_a_status_like_any_other(self) -> None:
        result = self.box.run("shell", "--", "bash", "-c", "exit 255")
        self.assertEqual((result.status, result.err), (255, ""))

    def test_an_ssh_that_is_killed_is_a_failure_of_ours(self) -> None:
        self.break_the_agents_ssh("kill -9 $$")
        self.assert_connection_broke(self.box.run("run"))

    def test_a_connection_that_breaks_keeps_the_vm(self) -> None:
        """ssh answers 255, as an agent may; only the guest knows whether its agent has ended."""
        self.break_the_agents_ssh("exit 255")
        self.assert_connection_broke(self.box.run("run"))

    def break_the_agents_ssh(self, how: str) -> None:
        """The ssh that launches the agent ends so at once; every other works."""
        (self.box.bin / "ssh").rename(self.box.bin / "real-ssh")
        script = f'case "$*" in *launch*) {how};; esac\nexec {self.box.bin}/real-ssh "$@"'
        executable(self.box.bin / "ssh", script)

    def assert_connection_broke(self, result: Result) -> None:
        (clone,) = self.box.clones()
        self.assert_refused(result, "the connection to the VM broke", f"kept {clone}", "--continue")
        self.assertFalse((self.box.lima / clone / "ha.pid").exists(), "its agent does not work on")
        self.assertEqual((self.box.run("gc").out, self.box.clones()), ("", [clone]))
        self.assertEqual(self.box.run("rm", clone).status, 0)
        self.assert_nothing_left()

    def test_the_runs_connection_is_its_own_and_watched(self) -> None:
        self.box.run("run")
        calls = [call["argv"] for call in self.box.calls("ssh")]
        (first,) = [argv for argv in calls if "-oControlMaster=yes" in argv]
        (agent,) = [argv for argv in calls if "launch" in argv[-1]]
        (path,) = [word for word in first if word.startswith("-oControlPath=")]
        self.assertRegex(path, r"/agent-vm-project-[0-9a-f]{6}/run\.sock$")
        for argv in (first, agent):
            self.assertIn(path, argv)
            self.assertIn("-oServerAliveInterval=15", argv)

    def test_a_lost_vm_is_said_to_be_lost(self) -> None:
        lose = 'sh:rm "$FAKE_GUEST_INSTANCE/ha.pid"'
        result = self.box.run("run", "--", lose)
        self.assert_refused(result, "lost", "host agent", "Linux version 6.12")
        self.assert_nothing_left()

    def test_a_command_that_is_not_there_has_the_shells_status(self) -> None:
        self.assertEqual(self.box.run("shell", "--", "no-such-command").status, 127)

    def test_shell_runs_a_command_untouched(self) -> None:
        result = self.box.run("shell", "--", "printf", "%s|", *WORDS)
        self.assertEqual((result.status, result.out), (0, "".join(f"{word}|" for word in WORDS)))

    def test_shell_without_a_command_is_a_shell(self) -> None:
        result = self.box.run("shell", text="echo $((20 + 3)); exit 5\n")
        self.assertEqual((result.status, result.out), (5, "23\n"), result.err)

    def test_large_output_and_binary_input_pass_through(self) -> None:
        script = f"cat > copy; head -c {1 << 20} /dev/zero"
        result = self.box.run("shell", "--", "bash", "-c", script, text="\x00\x01\x7f" * 9999)
        self.assertEqual(len(result.out), 1 << 20)
        self.assertEqual((self.box.project / "copy").read_text(), "\x00\x01\x7f" * 9999)

    def test_verbose_shows_the_commands_on_stderr(self) -> None:
        result = self.box.run("run", "-v", "--", "sh:echo out")
        self.assertEqual(result.out, "out\n")
        self.assertIn("+ limactl clone --tty=false", result.err)
        self.assertIn("+ limactl delete -f agent-vm-project-", result.err)


class SessionTest(WorldTest):
    def test_a_transcript_is_found_by_the_next_run_of_the_project_only(self) -> None:
        other = self.box.home / "other"
        other.mkdir()
        self.box.run("run", "--", "sh:echo turn > ~/.claude/projects/t")
        same = self.box.run("run", "--", "--resume", "sh:cat ~/.claude/projects/t")
        self.assertEqual(same.out, "turn\n")
        self.box.run("shell", "--", "true", cwd=other)
        self.assertEqual(len(list((self.box.state / "sessions").iterdir())), 2)

    def test_three_runs_at_once_do_not_disturb_each_other(self) -> None:
        script = "sh:touch up-$$; while [ $(ls up-* | wc -l) -lt 3 ]; do sleep 0.02; done"
        runs = [self.box.start("run", "--", script) for _ in range(3)]
        results = [self.box.finish(run) for run in runs]
        self.assertEqual([result.status for result in results], [0, 0, 0], results)
        self.assertEqual(len({argv[-1] for argv in self.box.limactl("start")}), 3)
        self.assert_nothing_left()


class OptionTest(WorldTest):
    def config_of(self, *options: str) -> dict[str, object]:
        result = self.box.run("run", *options)
        self.assertEqual(result.status, 0, result.err)
        return self.box.started_config()

    def test_memory_and_cpus_are_for_this_run(self) -> None:
        config = self.config_of("--memory", "3", "--cpus", "2")
        self.assertEqual((config["memory"], config["cpus"]), (3, 2))

    def test_git_does_not_hash_all_files_anew_in_the_guest(self) -> None:
        script = "sh:git config core.checkStat; git config core.trustctime"
        self.assertEqual(self.box.run("run", "--", script).out, "minimal\nfalse\n")

    def test_without_options_the_clone_is_as_large_as_the_base_instance(self) -> None:
        config = self.config_of()
        self.assertEqual((config["memory"], config["cpus"], config["disk"]), (4, 4, 20))

    def test_settings_also_come_from_the_environment_and_the_config_file(self) -> None:
        self.box.write_config("memory = 2\ncpus = 1\nforward = no")
        result = self.box.run("run", "--cpus", "3", AGENT_VM_MEMORY="5")
        self.assertEqual(result.status, 0, result.err)
        config = self.box.started_config()
        self.assertEqual((config["memory"], config["cpus"]), (5, 3))
        self.assertIn("portForwards", config)

    def test_readonly_is_told_to_lima(self) -> None:
        self.config_of("--readonly")
        self.assertEqual([writable for _, writable in self.box.slots()], [False, False])

    def test_a_read_only_run_works_on_a_copy_of_the_transcripts(self) -> None:
        kept = self.box.state / "sessions" / agent_vm.session_key(str(self.box.project))
        note = self.box.write(kept / "x/memory.md", "as it was\n")
        os.mkfifo(kept / "x/pipe")  # an agent may have left one
        plant = "sh:cat ~/.claude/projects/x/memory.md; echo mine > ~/.claude/projects/x/memory.md"
        result = self.box.run("run", "--readonly", "--", plant)
        self.assertEqual((result.status, result.out), (0, "as it was\n"), result.err)
        self.assertEqual(note.read_text(), "as it was\n")
        self.assert_nothing_left()

    def test_a_read_only_mount_shows_what_the_host_writes(self) -> None:
        # Lima's default for these, 9p's fscache, goes on showing the old contents for minutes.
        more = self.box.root / "more"
        more.mkdir()
        self.config_of("--readonly", "--mount", str(more))
        mounts = [call.split() for call in self.box.tool_calls() if call.startswith("mount ")]
        self.assertEqual([call[1] for call in mounts], ["ro"] * 3)
        self.assertEqual([call[2].endswith(",cache=mmap") for call in mounts], [True] * 3)

    def test_no_forward_turns_every_forwarding_off(self) -> None:
        rules = self.config_of("--no-forward")["portForwards"]
        expected = {"guestIP": "0.0.0.0", "proto": "any", "ignore": True}
        self.assertEqual(rules, [{**expected, "guestIPMustBeZero": False}])

    def test_env_passes_a_value_or_the_hosts(self) -> None:
        value = "a b'$\n`é"
        result = self.box.run(
            "run", "--env", f"ONE={value}", "--env", "TWO", "--env", "NONE=",
            "--", 'sh:printf "%s|" "$ONE" "$TWO" "${NONE-unset}"', TWO="from the host",
        )  # fmt: skip
        self.assertEqual(result.out, f"{value}|from the host||")

    def test_env_of_a_variable_that_is_not_set_is_an_error(self) -> None:
        self.assert_refused(self.box.run("run", "--env", "NOT_SET"), "NOT_SET", "not set")
        self.assert_nothing_left()

    def test_name_chooses_the_base_instance(self) -> None:
        self.box.make_base(f"{BASE_NAME}-web", disk="the other disk")
        result = self.box.run("run", "--name", "web", "--", 'sh:cat "$FAKE_GUEST_INSTANCE/disk"')
        self.assertEqual((result.status, result.out), (0, "the other disk"), result.err)

    def test_keep_keeps_the_vm_and_says_how_to_reach_and_remove_it(self) -> None:
        result = self.box.run("run", "--keep", "--", "sh:exit 3")
        (clone,) = self.box.clones()
        self.assertEqual(result.status, 3)
        self.assertIn(f"limactl shell {clone}", result.err)
        self.assertIn(f"agent-vm rm {clone}", result.err)
        self.assertEqual(self.box.run("gc").status, 0)
        self.assertEqual(self.box.clones(), [clone])
        self.assertEqual(self.box.run("rm", clone).status, 0)
        self.assert_nothing_left()

    def test_a_kept_vm_is_started_again_with_its_folders_and_its_age(self) -> None:
        odd = self.box.home / "a b"
        odd.mkdir()
        clone = self.kept_and_stopped(odd)
        lease = self.box.state / f"leases/{clone}.json"
        before = lease.read_text()
        (self.box.root / "tool-calls").unlink()
        result = self.box.run("start", clone)
        self.assertEqual(result.status, 0, result.err)
        self.assertIn(f"limactl shell {clone}", result.err)
        self.assertTrue((self.box.lima / clone / "ha.pid").exists())
        self.assertIn(f"agent-vm-0 {odd}", self.bound())
        self.assertEqual(lease.read_text(), before)

    def kept_and_stopped(self, project: Path | None = None) -> str:
        """The name of a VM that was kept after a run, and stopped."""
        self.box.run("run", "--keep", "--", "sh:true", cwd=project or self.box.project)
        (clone,) = self.box.clones()
        self.assertEqual(self.box.run("stop", clone).status, 0)
        return clone

    def bound(self) -> str:
        return "\n".join(self.box.tool_calls()).replace("'", "")

    def test_a_kept_vm_is_not_started_with_more_mounts(self) -> None:
        clone = self.kept_and_stopped()
        home = {"location": str(self.box.home), "mountPoint": "/h", "writable": True}
        self.box.write(self.box.lima / "_config/default.yaml", json.dumps({"mounts": [home]}))
        refused = self.box.run("start", clone)
        self.assert_refused(refused, "would not be confined", str(self.box.home), status=1)
        self.assertFalse((self.box.lima / clone / "ha.pid").exists())

    def test_a_kept_vm_is_not_started_below_a_running_agent(self) -> None:
        below = self.box.project / "below"
        below.mkdir()
        clone = self.kept_and_stopped(below)
        self.box.make_lease("agent-vm-p-0a1b2c", **live(), folders=[str(self.box.project)])
        refused = self.box.run("start", clone)
        self.assert_refused(refused, "agent-vm-p-0a1b2c is running", status=1)

    def test_a_kept_vm_that_is_stopped_is_nobodys_danger(self) -> None:
        self.box.run("run", "--keep", "--", "sh:true")
        (clone,) = self.box.clones()
        below = self.box.project / "below"
        below.mkdir()
        self.assert_refused(self.box.run("run", cwd=below), "is running")
        self.box.run("stop", clone)
        self.assertEqual(self.box.run("run", cwd=below).status, 0)

    def test_a_kept_vm_whose_folder_is_a_link_now_is_not_started(self) -> None:
        project = self.box.home / "p"
        project.mkdir()
        clone = self.kept_and_stopped(project)
        project.rmdir()
        project.symlink_to(self.box.home)
        self.assert_refused(
            self.box.run("start", clone), f"{project}, which leads elsewhere", status=1
        )
        self.assertFalse((self.box.lima / clone / "ha.pid").exists())

    def test_base_instances_and_vms_in_use_are_not_started(self) -> None:
        self.assert_refused(self.box.run("start", BASE), "is a base instance", status=1)
        self.box.make_instance("agent-vm-a-aaaaaa")
        self.box.make_lease("agent-vm-a-aaaaaa", **live())
        refused = self.box.run("start", "agent-vm-a-aaaaaa")
        self.assert_refused(refused, "in use by process", status=1)

    def test_a_vm_that_stands_still_is_said_with_the_way_out(self) -> None:
        agent = "sh:echo x > began; while [ ! -e end ]; do sleep 0.1; done"
        run = self.box.start("run", "--", agent)
        self.box.wait_for_file("began")
        (clone,) = self.box.clones()
        with contextlib.closing(socket.socket(socket.AF_UNIX)) as server:
            (self.box.lima / clone / "qmp.sock").unlink()
            server.bind(str(self.box.lima / clone / "qmp.sock"))
            server.listen()
            server.settimeout(quick.PATIENCE)
            peer, _ = server.accept()
            with peer, peer.makefile("rw") as qmp:
                qmp.write('{"QMP": {}}\n{"event": "STOP"}\n{"return": {}}\n{"event": "STOP"}\n')
                qmp.write('{"return": {"running": false, "status": "paused"}}\n')
                qmp.flush()
                asked = ""
                while '"query-status"' not in asked:
                    asked += peer.recv(4096).decode()
        self.box.write(self.box.project / "end", "")
        result = self.box.finish(run)
        self.assertEqual(result.status, 0)
        self.assertIn("stands still (paused)", result.err)
        self.assertIn(f"agent-vm rm --force {clone}, in another terminal", result.err)

    def test_keep_of_a_vm_that_did_not_start_keeps_nothing(self) -> None:
        self.assert_refused(self.box.run("run", "--keep", FAKE_LIMA_FAIL="start"), "start failed")
        self.assert_nothing_left()


class MountTest(WorldTest):
    def mounts_of(self, *options: str) -> list[tuple[str, str, bool]]:
        """(folder of the host, place in the guest, writable), in the order of the slots."""
        result = self.box.run("run", *options)
        self.assertEqual(result.status, 0, result.err)
        calls = [call.split(" ", 4) for call in self.box.tool_calls() if call.startswith("mount ")]
        places = {tag: (target, flag == "rw") for _, flag, _, tag, target in calls}
        slots = self.box.slots()
        for slot, (_, writable) in enumerate(slots):  # the guest asks for what the host enforces
            self.assertEqual(places[f"agent-vm-{slot}"][1], writable)
        return [(path, places[f"agent-vm-{slot}"][0], writable)
                for slot, (path, writable) in enumerate(slots)]  # fmt: skip

    def folder(self, *parts: str) -> str:
        path = self.box.home.joinpath(*parts)
        path.mkdir(parents=True)
        return str(path)

    def test_the_current_directory_is_mounted_writable_at_the_same_path(self) -> None:
        project = str(self.box.project)
        self.assertEqual(self.mounts_of()[0], (project, project, True))

    def test_more_mounts_are_read_only_unless_said(self) -> None:
        one, two, three = (self.folder(name) for name in ("one", "two", "a three"))
        self.box.write(Path(three, "file"), "in three")
        target = str(self.box.root / "elsewhere")
        mounts = self.mounts_of(
            "--mount", one, "--mount", f"{two}:rw", "--mount", f"{three}:ro:{target}",
            "--", f"sh:cat {target}/file > got",
        )  # fmt: skip
        self.assertEqual(mounts[1:3], [(one, one, False), (two, two, True)])
        self.assertEqual(mounts[3], (three, target, False))
        self.assertEqual((self.box.project / "got").read_text(), "in three")
        self.assert_nothing_left()

    def test_a_folder_that_is_not_there_is_a_usage_error(self) -> None:
        result = self.box.run("run", "--mount", "/no/such/folder:rw")
        self.assert_refused(result, "usage:", "/no/such/folder is not a directory", status=2)
        self.assertEqual(self.box.calls(), [])

    def test_odd_project_paths_work(self) -> None:
        # Quotes, `$`, spaces and unicode are in the path of WholeRunTest.
        for name in ("a,b:c=d", "x" * 200, "-p", "~#\\{{.}}%h[x]*?!;&|<>()`"):
            folder = self.box.home / name
            folder.mkdir()
            with self.subTest(folder=name):
                result = self.box.run("run", "--", "sh:pwd > where", cwd=folder)
                self.assertEqual((result.status, result.err), (0, ""))
                self.assertEqual((folder / "where").read_text(), f"{folder}\n")
        self.assert_nothing_left()

    def test_a_newline_in_the_path_is_refused(self) -> None:
        folder = Path(self.folder("two\nlines"))
        self.assert_refused(self.box.run("run", cwd=folder), "control character")
        self.assert_nothing_left()

    def test_a_path_that_is_not_utf_8_is_refused(self) -> None:
        folder = self.box.home / os.fsdecode(b"latin-\xe4")
        try:
            folder.mkdir()
        except OSError:
            self.skipTest("this file system takes UTF-8 only")
        self.assert_refused(self.box.run("run", cwd=folder), "not UTF-8")

    def test_private_folders_are_not_mounted(self) -> None:
        keys = Path(self.folder(".ssh"))
        self.assert_refused(self.box.run("run", cwd=Path("/")), "the guest needs its own")
        self.assert_refused(self.box.run("run", "--mount", "/usr:/"), "the guest needs its own")
        for folder in (self.box.home, keys, self.box.lima, self.box.state.parent):
            with self.subTest(folder=folder):
                self.assert_refused(self.box.run("run", cwd=folder), "not given to an agent")
        self.assertEqual(self.box.limactl("clone"), [])

    def test_private_folders_are_not_mounted_by_an_option_or_through_a_link_either(self) -> None:
        self.folder(".ssh")
        link = self.box.project / "link"
        link.symlink_to(self.box.home)
        for spec in (str(self.box.home), f"{self.box.home}/.ssh:ro:/data"):
            with self.subTest(spec=spec):
                result = self.box.run("run", "--mount", spec)
                self.assert_refused(result, "not given to an agent", "--force-mount")
        self.assert_refused(self.box.run("run", "--mount", str(link)), "--force-mount")
        self.assertEqual(self.box.limactl("clone"), [])

    def test_folders_that_the_guest_has_of_its_own_are_not_mounted(self) -> None:
        for folder in ("/usr", "/etc", "/proc/self"):
            self.assert_refused(self.box.run("run", cwd=Path(folder)), "the guest needs its own")
        spec = f"{self.folder('other')}:/etc"
        self.assert_refused(self.box.run("run", "--mount", spec), "the guest needs its own")
        self.assertEqual(self.box.limactl("clone"), [])

    def test_nor_by_another_way_to_it(self) -> None:
        """Through the user's own links, a doubled slash, and a folder that was mounted writable."""
        other, more = self.folder("other", "sub"), self.folder("more")
        self.box.run("run", "--mount", f"{more}:rw")
        for folder in (self.box.project, Path(more)):
            (folder / "data").symlink_to(self.box.home / "other")
        (self.box.home / "w").symlink_to(self.box.project)
        (self.box.home / "cur").symlink_to(self.box.project / "data")
        home, project = self.box.home, self.box.project
        for typed in (f"{home}/w/data", f"{home}/cur/sub", f"/{project}/data", f"{more}/data",
                      f"{project}/data/sub"):  # fmt: skip
            with self.subTest(typed=typed):
                result = self.box.run("run", cwd=Path(typed), PWD=typed)
                self.assert_refused(result, "an agent may have made it")
                self.assert_refused(
                    self.box.run("run", "--mount", f"{typed}:rw"), "may have made it"
                )
        self.assertEqual(self.box.run("run", cwd=Path(other), PWD=str(self.box.project)).status, 0)

    def test_a_link_that_an_earlier_agent_made_is_not_followed(self) -> None:
        other = self.folder("other")
        link = self.box.project / "data"
        script = f"sh:ln -s {other} data"
        self.assertEqual(self.box.run("run", "--", script).status, 0)
        own = self.box.home / "own"
        own.symlink_to(link)
        for argv in (("--readonly", "--mount", str(link)), ("--mount", str(own))):
            result = self.box.run("run", *argv)
            self.assert_refused(result, f"{link} leads out of {self.box.project}")
        elsewhere = Path(self.folder("elsewhere"))
        self.assert_refused(self.box.run("run", "--mount", str(link), cwd=elsewhere), "leads out")
        # A shell that followed it has a working directory that is not what it seems.
        result = self.box.run("run", cwd=link, PWD=str(link))
        self.assert_refused(result, f"{link} leads out of {self.box.project}")
        self.assertEqual(self.box.run("run", "--mount", other).status, 0)

    def test_a_link_in_the_project_is_not_followed_out_of_it(self) -> None:
        secret = self.folder("secret")
        (self.box.project / "link").symlink_to(secret)
        result = self.box.run("run", "--mount", str(self.box.project / "link"))
        self.assert_refused(result, "leads out of", "--force-mount")

    def test_a_folder_below_the_project_of_a_running_agent_is_refused(self) -> None:
        self.box.make_instance("agent-vm-p-0a1b2c", running=True)
        data, other = self.folder("data"), self.folder("other")
        folders = [str(self.box.project), data]
        self.box.make_lease("agent-vm-p-0a1b2c", **live(), folders=folders)
        for folder in (f"{self.box.project}/below", f"{data}/below"):
            os.mkdir(folder)
            words = ("agent-vm-p-0a1b2c is running", "--force-mount")
            self.assert_refused(self.box.run("run", cwd=folder), *words)
            argv = ("--mount", folder)
            self.assert_refused(self.box.run("run", *argv, cwd=other), *words)
        self.assertEqual(self.box.run("run", "--mount", f"{data}:rw").status, 0)

    def test_a_worktree_of_a_checkout_in_which_an_agent_runs_is_refused(self) -> None:
        # That agent could put a link in the place of its .git while the second VM boots.
        author = ("-c", "user.name=a", "-c", "user.email=a@b")
        tree = self.box.home / "tree"
        for argv in (("init", "-q"), (*author, "commit", "-q", "--allow-empty", "-m", "x"),
                     ("worktree", "add", "-q", str(tree))):  # fmt: skip
            command = ["git", "-C", str(self.box.project), *argv]
            subprocess.run(command, check=True, env=self.box.env)
        self.box.make_instance("agent-vm-p-0a1b2c", running=True)
        self.box.make_lease("agent-vm-p-0a1b2c", **live(), folders=[str(self.box.project)])
        self.assert_refused(self.box.run("run", cwd=tree), "/.git lies in", "is running")
        self.box.make_lease("agent-vm-p-0a1b2c", **live(), folders=[str(tree)])
        self.assertEqual(self.box.run("run", cwd=tree).status, 0)

    def test_force_mount_mounts_what_is_refused_otherwise(self) -> None:
        result = self.box.run("run", "--force-mount", "--", "sh:pwd", cwd=self.box.home)
        self.assertEqual((result.status, result.out), (0, f"{self.box.home}\n"), result.err)

    def test_one_place_in_the_guest_is_one_mount(self) -> None:
        one, two = self.folder("one"), self.folder("two")
        result = self.box.run("run", "--mount", f"{one}:ro:/x", "--mount", f"{two}:ro:/x")
        self.assert_refused(result, "twice")

    def test_limas_defaults_cannot_widen_the_mounts(self) -> None:
        secret = {"location": str(self.box.home), "mountPoint": "/h", "writable": True}
        self.box.write(self.box.lima / "_config/default.yaml", json.dumps({"mounts": [secret]}))
        result = self.box.run("run")
        self.assert_refused(result, "would not be confined", str(self.box.home), "default.yaml")
        self.assertEqual((self.box.limactl("start"), self.box.agent_calls()), ([], []))
        self.assert_nothing_left()

    def test_an_agent_is_not_started_in_a_folder_that_is_not_mounted(self) -> None:
        result = self.box.run("run", FAKE_GUEST_FAIL="mount")
        self.assert_refused(result, "could not be prepared", "no such device")
        self.assertEqual(self.box.agent_calls(), [])
        self.assert_nothing_left()


class WorktreeTest(WorldTest):
    def setUp(self) -> None:
        super().setUp()
        self.main = self.box.home / "main"
        self.tree = self.box.home / "tree"
        self.git("init", "-q", str(self.main), cwd=self.box.home)
        self.git("-c", "user.name=a", "-c", "user.email=b", "commit", "-q", "--allow-empty", "-mx")
        self.git("worktree", "add", "-q", str(self.tree))

    def git(self, *args: str, cwd: Path | None = None) -> None:
        subprocess.run(["git", *args], cwd=cwd or self.main, env=self.box.env, check=True)

    def mounts(self, folder: Path, *options: str) -> list[str]:
        result = self.box.run("run", *options, "--", "sh:git log > log 2>&1; true", cwd=folder)
        self.assertEqual(result.status, 0, result.err)
        return [f"{path}:{writable}" for path, writable in self.box.slots()[:-1]]

    def test_a_worktree_brings_its_repository(self) -> None:
        self.assertEqual(self.mounts(self.tree), [f"{self.tree}:True", f"{self.main}/.git:True"])

    def test_a_read_only_worktree_brings_it_read_only(self) -> None:
        mounts = self.mounts(self.tree, "--readonly", "--force-mount")
        self.assertEqual(mounts, [f"{self.tree}:False", f"{self.main}/.git:False"])

    def test_an_ordinary_repository_is_mounted_alone(self) -> None:
        self.assertEqual(self.mounts(self.main), [f"{self.main}:True"])

    def test_a_git_file_of_the_agents_mounts_nothing(self) -> None:
        foreign = self.main / ".git/worktrees/tree"  # a real one, of another folder
        self.box.write(self.box.project / ".git", f"gitdir: {foreign}\n")
        self.assertEqual(self.mounts(self.box.project), [f"{self.box.project}:True"])
        for pointer in (self.main / ".git", self.main, "/", "/etc/worktrees/x", "", "\0"):
            with self.subTest(pointer=pointer):
                self.box.write(self.box.project / ".git", f"gitdir: {pointer}\n")
                self.assertEqual(agent_vm.worktree_git_dir(str(self.box.project)), "")

    def test_a_git_dir_that_the_agent_made_to_point_back_mounts_nothing_private(self) -> None:
        # The agent has the project only; the foreign folder is prepared by links inside it.
        inside = self.box.project / "worktrees/x"
        inside.mkdir(parents=True)
        (inside / "gitdir").write_text(f"{self.box.project}/.git\n")
        (self.box.project / "HEAD").write_text("ref: refs/heads/main\n")
        self.box.write(self.box.project / ".git", f"gitdir: {inside}\n")
        self.assertEqual(self.mounts(self.box.project), [f"{self.box.project}:True"])

    def test_a_git_folder_that_is_a_link_to_a_worktree_mounts_nothing(self) -> None:
        (self.box.project / ".git").symlink_to(self.tree / ".git")
        self.assertEqual(self.mounts(self.box.project), [f"{self.box.project}:True"])

    def test_a_git_file_that_is_a_pipe_does_not_hang(self) -> None:
        os.mkfifo(self.box.project / ".git")
        self.assertEqual(self.mounts(self.box.project), [f"{self.box.project}:True"])


class LargeOutputTest(WorldTest):
    def test_what_a_guest_prints_does_not_fill_the_hosts_memory(self) -> None:
        hook = "head -c 300000000 /dev/zero; echo; echo the end; exit 3"
        self.box.write(self.box.project / ".claude-vm.runtime.sh", hook)
        limited = ("bash", "-c", 'ulimit -v 400000; exec "$0" "$@"')
        result = self.box.run("run", prefix=limited)
        self.assert_refused(result, "status 3", "the end")

    def test_no_escape_sequence_of_a_guest_reaches_the_terminal(self) -> None:
        hook = "printf '\\033]0;title\\a\\033[2J\\342\\200\\256evil'; exit 3"
        self.box.write(self.box.project / ".claude-vm.runtime.sh", hook)
        result = self.box.run("run")
        self.assert_refused(result, "status 3", "evil")
        self.assertNotIn("\x1b", result.err)
        self.assertNotIn("\u202e", result.err)


class HookTest(WorldTest):
    def hook(self, text: str, mode: int = 0o644) -> Path:
        return self.box.write(self.box.project / ".claude-vm.runtime.sh", text, mode)

    def test_the_users_hook_runs_before_the_projects_and_both_before_the_agent(self) -> None:
        self.box.write(self.box.config / "runtime.sh", "echo user >> order; touch ~/installed")
        self.hook("echo project >> order")
        result = self.box.run("run", "--", "sh:echo agent >> order; ls ~/installed > /dev/null")
        self.assertEqual((result.status, result.out, result.err), (0, "", ""))
        self.assertEqual((self.box.project / "order").read_text(), "user\nproject\nagent\n")

    def test_what_a_hook_leaves_in_the_background_holds_nothing_up(self) -> None:
        self.box.write(self.box.project / ".claude-vm.runtime.sh", "sleep 600 & echo $! > pid")
        result = self.box.run("run", "--", "sh:echo works")
        self.assertEqual((result.status, result.out), (0, "works\n"), result.err)

    def test_hooks_see_the_passed_variables_and_not_our_stdin(self) -> None:
        self.hook('echo "$WHO" > who; cat > stdin')
        result = self.box.run("run", "--env", "WHO=me", "--", "sh:cat", text="for the agent")
        self.assertEqual(result.out, "for the agent")
        self.assertEqual((self.box.project / "who").read_text(), "me\n")
        self.assertEqual((self.box.project / "stdin").read_text(), "")

    def test_a_hook_that_fails_ends_the_run_with_its_status_and_tail(self) -> None:
        self.hook("echo first; echo the reason >&2; exit 9")
        result = self.box.run("run")
        self.assert_refused(result, "runtime.sh", "status 9", "the reason")
        self.assertEqual(self.box.agent_calls(), [])
        self.assert_nothing_left()

    def test_a_hook_that_cannot_be_read_is_an_error_before_anything_is_created(self) -> None:
        self.hook("true", 0o000)
        self.assert_refused(self.box.run("run"), "not a readable file", "chmod")
        self.box.project.joinpath(".claude-vm.runtime.sh").unlink()
        self.box.config.joinpath("runtime.sh").mkdir(parents=True)
        self.assert_refused(self.box.run("run"), "not a readable file")
        self.assertEqual(self.box.limactl("clone"), [])

    def test_a_hook_that_is_a_link_to_a_secret_of_the_host_is_not_read_on_the_host(self) -> None:
        # Here the guest shares the host's files; in a VM the link leads nowhere. What counts:
        # the secret's text is not sent, and not shown.
        secret = self.box.write(self.box.home / ".ssh/id", "SECRET-OF-THE-HOST", 0o600)
        self.box.project.joinpath(".claude-vm.runtime.sh").symlink_to(secret)
        self.box.run("run", "-v")
        commands = [call["argv"][-1] for call in self.box.calls("ssh")]
        self.assertFalse(any("cat > ~/.agent-vm/hook" in command for command in commands))

    def test_the_hooks_of_the_project_are_run_where_they_are(self) -> None:
        self.hook('cd "$(dirname "$0")" && pwd > place')
        self.assertEqual(self.box.run("run").status, 0)
        self.assertEqual((self.box.project / "place").read_text(), f"{self.box.project}\n")


class CredentialTest(WorldTest):
    def store(self, text: str, mode: int = 0o600) -> None:
        self.box.write(self.box.config / "credential", text, mode)

    def agent_env(self, **env: str) -> dict[str, str]:
        result = self.box.run("run", **env)
        self.assertEqual(result.status, 0, result.err)
        return dict(self.box.agent_calls()[-1]["env"])

    def test_the_stored_credential_is_used(self) -> None:
        self.store(f"CLAUDE_CODE_OAUTH_TOKEN={TOKEN}\n")
        self.assertEqual(self.agent_env()["CLAUDE_CODE_OAUTH_TOKEN"], TOKEN)
        self.assertNotIn(TOKEN, json.dumps(self.box.calls()))

    def test_the_environments_comes_first(self) -> None:
        self.store(f"CLAUDE_CODE_OAUTH_TOKEN={TOKEN}\n")
        env = self.agent_env(ANTHROPIC_API_KEY="sk-ant-api03-other")
        self.assertEqual(env["ANTHROPIC_API_KEY"], "sk-ant-api03-other")
        self.assertNotIn("CLAUDE_CODE_OAUTH_TOKEN", env)

    def test_a_gateways_token_goes_before_the_keys_of_others(self) -> None:
        env = self.agent_env(ANTHROPIC_AUTH_TOKEN="gateway-key", ANTHROPIC_API_KEY="sk-ant-x")
        self.assertEqual(env["ANTHROPIC_AUTH_TOKEN"], "gateway-key")
        self.assertNotIn("ANTHROPIC_API_KEY", env)

    def test_without_a_broker_a_gateway_is_what_the_guest_is_told(self) -> None:
        url = "http://gateway.example:4000/v1"
        env = self.agent_env(ANTHROPIC_AUTH_TOKEN=" gateway-key\r\n", ANTHROPIC_BASE_URL=url)
        self.assertEqual(env["ANTHROPIC_BASE_URL"], url)
        self.assertEqual(env["ANTHROPIC_AUTH_TOKEN"], "gateway-key")
        self.assertNotIn("gateway-key", json.dumps(self.box.calls()))

    def test_all_that_is_direct_stays_so(self) -> None:
        """`*` counts only alone."""
        self.assertEqual(self.agent_env(NO_PROXY="*")["no_proxy"], "*")

    def test_a_locale_that_the_guest_lacks_is_not_its(self) -> None:
        script = 'sh:echo "$LC_ALL $LANG"; bash -c true'
        result = self.box.run("run", "--", script, LC_ALL="xx_XX.UTF-8", LC_CTYPE="UTF-8")
        self.assertEqual((result.out.split()[0], result.err), ("C.UTF-8", ""))
        self.box.write(self.box.project / ".claude-vm.runtime.sh", "echo $LC_ALL > hook-locale\n")
        executable(self.box.guest_bin / "locale", "exit 1")  # a small image has none
        self.assertEqual(self.box.run("run", LC_ALL="xx_XX.UTF-8").err, "")
        self.assertEqual((self.box.project / "hook-locale").read_text(), "C.UTF-8\n")

    def test_tags_are_not_signed_either(self) -> None:
        script = "sh:git init -q t; cd t; git config tag.gpgSign true; git config user.name A;"
        script += "git config user.email a@b; git commit -q --allow-empty -m x; git tag -a v1 -m v1"
        self.assertEqual(self.box.run("run", "--", script).status, 0)

    def test_what_git_in_the_vm_cannot_do_is_said_before_it_starts(self) -> None:
        config = self.box.project / ".git/config"
        for text, said in (
            ("[extensions]\n\trelativeWorktrees = true\n", "extensions.relativeWorktrees"),
            ("[commit]\n\tgpgsign = true\n", "not signed"),
            ("[core]\n", ""),
        ):
            self.box.write(config, text)
            err = self.box.run("run").err
            self.assertIn(said, err)
            self.assertEqual(bool(err), bool(said), err)
        shutil.rmtree(config.parent)
        self.box.write(self.box.project / ".bare/config", "")
        self.box.write(self.box.project / ".git", "gitdir: ./.bare\n")
        self.assertEqual(self.box.run("run").err, "", "it is mounted")

    def test_commits_are_not_signed_where_there_is_no_key(self) -> None:
        """A repository's own configuration comes after the user's, and before the environment."""
        script = "sh:git init -q r; cd r; git config commit.gpgSign true; git config user.name A;"
        script += "git config user.email a@b; git commit -q --allow-empty -m x && git log --oneline"
        result = self.box.run("run", "--", script)
        self.assertRegex(result.out, r"^[0-9a-f]+ x\n$", result.err)

    def test_a_git_folder_that_is_not_mounted_is_said(self) -> None:
        self.box.write(self.box.project / ".git", "gitdir: ../elsewhere/.git/modules/project\n")
        self.assertIn("git cannot work in the VM", self.box.run("run").err)

    def test_what_is_on_the_host_is_not_asked_of_a_companys_proxy(self) -> None:
        env = self.agent_env(no_proxy="intra.example", https_proxy="http://proxy.example:8080")
        direct = "localhost,127.0.0.1,host.lima.internal"
        self.assertEqual(env["no_proxy"], f"intra.example,{direct}")
        self.assertEqual(env["NO_PROXY"], env["no_proxy"])

    def test_a_credential_that_others_can_read_is_refused(self) -> None:
        self.store(f"CLAUDE_CODE_OAUTH_TOKEN={TOKEN}\n", 0o644)
        self.assert_refused(self.box.run("run"), "can be read by others", "chmod 600")
        self.assert_nothing_left()

    def test_a_file_that_is_no_credential_is_refused_without_showing_it(self) -> None:
        for text in ("", "some secret\n", "PATH=/secret\n", "CLAUDE_CODE_OAUTH_TOKEN=\n"):
            self.store(text)
            result = self.box.run("run")
            self.assert_refused(result, "not what auth set writes")
            self.assertNotIn("secret", result.err)

    def test_a_failing_vm_shows_no_credential(self) -> None:
        for trouble in ("start", "clone"):
            result = self.box.run("run", "-v", FAKE_LIMA_FAIL=trouble, ANTHROPIC_API_KEY=TOKEN)
            self.assertEqual(result.status, 125)
            self.assertNotIn(TOKEN, result.err)

    @unittest.skipUnless(os.path.exists("/proc/self/cmdline"), "needs /proc")
    def test_no_process_of_the_host_has_the_credential_in_its_arguments(self) -> None:
        process = self.box.start(
            "run", "-v", "--", "sh:touch up; while [ ! -e go ]; do sleep 0.02; done",
            CLAUDE_CODE_OAUTH_TOKEN=TOKEN,
        )  # fmt: skip
        self.box.wait_for_file("up")
        argvs = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                argvs.append(path.read_bytes())
            except OSError:
                continue
        (self.box.project / "go").touch()
        result = self.box.finish(process)
        self.assertTrue(any(b"ssh.pyc" in argv for argv in argvs))
        self.assertFalse([argv for argv in argvs if TOKEN.encode() in argv])
        self.assertNotIn(TOKEN, result.err)


class OddEnvironmentTest(WorldTest):
    def test_term_unset(self) -> None:
        result = self.box.run("run", "--", "sh:echo fine")
        self.assertNotIn("TERM", self.box.env)
        self.assertEqual((result.status, result.out, result.err), (0, "fine\n", ""))

    def test_standard_streams_closed(self) -> None:
        prefix = ("bash", "-c", 'exec "$0" "$@" <&- >&- 2>&-')
        result = self.box.run("run", "--", "sh:echo fine > file", prefix=prefix)
        self.assertEqual((result.status, result.out, result.err), (0, "", ""))
        self.assertEqual((self.box.project / "file").read_text(), "fine\n")
        self.assert_nothing_left()

    def test_messages_do_not_move_to_stdout_when_stderr_is_closed(self) -> None:
        prefix = ("bash", "-c", 'exec "$0" "$@" 2>&-')
        result = self.box.run("run", "-v", "--", "sh:echo answer", prefix=prefix)
        self.assertEqual((result.status, result.out), (0, "answer\n"))

    def test_the_reader_of_our_output_goes_away(self) -> None:
        process = self.box.start("run", "--", "sh:yes")
        assert process.stdout
        process.stdout.close()
        process.stdout = None
        self.assertNotEqual(self.box.finish(process).status, 0)
        self.assert_nothing_left()

    def test_the_current_directory_is_deleted(self) -> None:
        prefix = ("bash", "-c", f'{shutil.which("rmdir")} "$PWD" && exec "$0" "$@"')
        self.assert_refused(self.box.run("run", prefix=prefix), "does not exist any more")
        self.assertEqual(self.box.limactl("clone"), [])

    def test_the_state_folder_cannot_be_written(self) -> None:
        locked = self.box.home / "locked"
        locked.mkdir(0o500)
        result = self.box.run("run", XDG_STATE_HOME=str(locked))
        self.assert_refused(result, "locked/agent-vm", "ermission denied")
        self.assertEqual(self.box.limactl("clone"), [])

    def test_leases_that_cannot_be_written(self) -> None:
        self.box.run("gc")
        leases = self.box.state / "leases"
        leases.chmod(0o500)
        self.assert_refused(self.box.run("run"), "leases", "ermission denied")
        self.assertEqual(self.box.instances(), [BASE])

    def test_xdg_folders_are_respected(self) -> None:
        self.box.write(self.box.root / "c/agent-vm/config.ini", "[agent-vm]\nmemory = 7\n")
        folders = {f"XDG_{name}_HOME": str(self.box.root / name[0].lower())
                   for name in ("CONFIG", "STATE", "DATA")}  # fmt: skip
        shutil.move(self.box.state, self.box.root / "s/agent-vm")
        self.assertEqual(self.box.run("run", **folders).status, 0)
        self.assertEqual(self.box.started_config()["memory"], 7)
        self.assertTrue((self.box.root / "s/agent-vm/sessions").is_dir())
        self.assertFalse(self.box.state.exists())

    def test_no_program_of_the_project_is_run_on_the_host(self) -> None:
        programs = self.box.project / ".venv/bin"
        programs.mkdir(parents=True)
        for name in ("limactl", "ssh", "git", "npm"):
            (programs / name).write_text(f"#!/bin/sh\ntouch {self.box.root}/was-run\n")
            (programs / name).chmod(0o755)
        (self.box.project / "json.py").write_text("raise SystemExit(9)")
        path = f"{programs}::.:.venv/bin:{self.box.bin}"
        self.assertEqual(self.box.run("run", PATH=path).status, 0)
        self.assertFalse((self.box.root / "was-run").exists())

    def test_no_program_that_an_agent_left_anywhere_is_run_on_the_host(self) -> None:
        planted = 'printf "#!/bin/sh\\ntouch $PWD/was-run\\n"'
        script = f"""sh:mkdir -p ~/.claude/projects/bin .venv
        for name in limactl git; do {planted} > ~/.claude/projects/bin/$name
        chmod +x ~/.claude/projects/bin/$name; done"""
        self.assertEqual(self.box.run("run", "--", script).status, 0)
        (kept,) = (self.box.state / "sessions").iterdir()
        (self.box.project / ".venv/bin").symlink_to(kept / "bin")
        self.assertTrue((kept / "bin/limactl").exists())
        elsewhere = self.box.home / "elsewhere"
        elsewhere.mkdir()
        for cwd in (self.box.project, elsewhere):
            path = f"{self.box.project}/.venv/bin:{self.box.bin}"
            self.assertEqual(self.box.run("run", PATH=path, cwd=cwd).status, 0)
        self.assertEqual(list(self.box.home.rglob("was-run")), [])

    def test_git_missing(self) -> None:
        (self.box.bin / "git").unlink()
        self.assertEqual(self.box.run("run").status, 0)

    def test_ssh_missing(self) -> None:
        (self.box.bin / "ssh").unlink()
        self.assert_refused(self.box.run("run"), "ssh")
        self.assert_nothing_left()


class UsageTest(WorldTest):
    def test_unknown_options_and_values_are_usage_errors(self) -> None:
        for argv in (("run", "--bogus"), ("run", "--memory", "0"), ("setup", "--disk", "abc")):
            self.assert_refused(self.box.run(*argv), "usage: ", argv[1], status=2)
        self.assertEqual(self.box.calls(), [])

    def test_a_variable_that_is_no_setting_is_named(self) -> None:
        """AGENT_VM_READ_ONLY=1 must not mean a writable project."""
        result = self.box.run("run", AGENT_VM_READ_ONLY="1")
        self.assert_refused(result, "AGENT_VM_READ_ONLY is not a setting", "readonly")
        self.assertEqual(self.box.calls(), [])

    def test_a_host_without_room_for_a_vms_disk_is_said_before_there_is_one(self) -> None:
        full = (
            "import types\ng.shutil.disk_usage = lambda path: types.SimpleNamespace(free=1 << 30)"
        )
        started = quick.start("agent_vm", ["run"], self.box.env, self.box.project, setup=full)
        self.assert_refused(started.wait(), "1.0 GiB free in Lima's home")
        self.assertEqual(self.box.limactl("clone"), [])

    def test_verbose_may_stand_before_the_verb(self) -> None:
        result = self.box.run("-v", "list")
        self.assertEqual(result.status, 0, result.err)
        self.assertIn("+ limactl list", result.err)
        self.assert_refused(self.box.run("-v"), "usage:", status=2)

    def test_during_a_setup_a_run_is_told_to_wait(self) -> None:
        (self.box.state / "bases" / BASE_NAME).unlink()
        building = f"{BASE_NAME}.abcdef"
        self.box.make_lease(building, **live())
        self.assert_refused(self.box.run("run"), "no base instance", "wait", building)

    def test_a_bad_configuration_file_is_named(self) -> None:
        rows = [
            ("[agent-vm]\nmemroy = 8\n", "memroy"),
            ("[agent-vm]\nmount = /no/such/folder\n", "/no/such/folder"),
            ("[agent-vm]\nmemory = 1\nmemory = 2\n", "memory"),
            ("memory = 8\n", "[agent-vm]"),
            ("[agent-vm]\nmemory = 8\n[other]\n", "other"),
        ]
        for text, word in rows:
            with self.subTest(text=text):
                self.box.write(self.box.config / "config.ini", text)
                self.assert_refused(self.box.run("run"), "config.ini", word)
        self.assertEqual(self.box.limactl("clone"), [])

    def test_an_unreadable_configuration_file_is_an_error(self) -> None:
        self.box.write(self.box.config / "config.ini", "[agent-vm]\n", 0o000)
        self.assert_refused(self.box.run("run"), "config.ini", "ermission")


class BaseInstanceTest(WorldTest):
    base = False

    def test_no_base_instance(self) -> None:
        result = self.box.run("run")
        self.assert_refused(result, f"no base instance {BASE_NAME}", "agent-vm setup")
        self.assert_nothing_left()

    def test_no_base_instance_of_that_name(self) -> None:
        self.assert_refused(self.box.run("run", "--name", "web"), f"{BASE_NAME}-web")

    def test_a_base_instance_that_runs(self) -> None:
        self.box.make_base(running=True)
        self.assert_refused(self.box.run("run"), "is running", f"agent-vm stop {BASE}")
        self.assertEqual(self.box.instances(), [BASE])
        self.assertEqual(self.box.leases(), [])

    def test_a_base_instance_that_is_broken(self) -> None:
        (self.box.lima / BASE).mkdir()
        self.box.name_base(BASE)
        self.assert_refused(self.box.run("run"), "is broken", "agent-vm setup")
        self.assertEqual(self.box.clones(), [])


class LimaTroubleTest(WorldTest):
    def test_a_clone_that_fails_leaves_no_half_made_folder(self) -> None:
        result = self.box.run("run", FAKE_LIMA_FAIL="clone")
        self.assert_refused(result, "limactl clone failed", "no space left on device")
        self.assert_nothing_left()

    def test_a_start_that_fails_shows_and_keeps_limas_logs(self) -> None:
        result = self.box.run("run", FAKE_LIMA_FAIL="start")
        cause = 'error: limactl start failed: exec: "qemu": could not boot\n'
        self.assert_refused(result, cause, "Kernel panic red")
        self.assert_nothing_left()
        kept = sorted(path.name for path in (self.box.state / "logs").iterdir())
        self.assertEqual([name.partition(".")[2] for name in kept], ["ha.stderr.log", "serial.log"])
        self.assertIn(str(self.box.state / "logs" / kept[0]), result.err)

    def test_a_delete_that_fails_keeps_the_agents_status_and_is_tried_again(self) -> None:
        result = self.box.run("run", "--", "sh:exit 4", FAKE_LIMA_FAIL="delete")
        self.assertEqual(result.status, 4)
        self.assertIn("could not be deleted", result.err)
        self.assertEqual(self.box.leases(), self.box.clones())
        self.assertEqual(self.box.run("gc").status, 0)
        self.assert_nothing_left()

    def test_garbage_from_limactl_is_an_error(self) -> None:
        result = self.box.run("run", FAKE_LIMA_GARBAGE="list")
        self.assert_refused(result, "limactl list printed something")
        self.assert_nothing_left()

    def test_garbage_after_the_clone_leaves_nothing(self) -> None:
        result = self.box.run("run", FAKE_LIMA_GARBAGE="list:2")
        self.assert_refused(result, "limactl list printed something")
        self.assert_nothing_left()

    def test_a_limactl_that_hangs_is_given_up(self) -> None:
        for verb in ("list", "clone", "start"):
            with self.subTest(verb=verb):
                result = self.box.run("run", FAKE_LIMA_HANG=verb, AGENT_VM_TIMEOUT="1")
                if verb == "start":
                    self.assert_refused(result, "QEMU does not answer", "Kernel panic")
                else:
                    self.assert_refused(result, f"limactl {verb} failed: no answer within 1 s")
                self.assert_nothing_left()

    def test_the_hint_names_the_base_instance_that_is_missing(self) -> None:
        result = self.box.run("run", "--name", "a-b")
        self.assert_refused(result, "no base instance agent-vm-base-a-b", "setup --name a-b")

    def test_a_mount_that_cannot_be_read(self) -> None:
        closed = self.box.home / "closed"
        closed.mkdir(mode=0o000)
        if os.access(closed, os.R_OK):
            self.skipTest("root reads everything")
        result = self.box.run("run", "--mount", str(closed))
        self.assert_refused(result, f"{closed} is not a directory that can be read", status=2)

    def test_limactl_missing(self) -> None:
        (self.box.bin / "limactl").unlink()
        self.assert_refused(self.box.run("run"), "no base instance", "agent-vm setup")
        self.assert_refused(self.box.run("list"), "not installed", "agent-vm setup", status=1)

    def test_limactl_that_cannot_be_started(self) -> None:
        (self.box.bin / "limactl").write_bytes(b"\x7fELF nonsense")
        self.assert_refused(self.box.run("run"), "limactl cannot be started")

    def test_a_name_that_is_taken_is_an_error_and_the_other_vm_is_not_harmed(self) -> None:
        # The clone's name is random: take all of them, by a limactl that makes one beforehand.
        real = self.box.bin / "limactl"
        shutil.move(real, self.box.bin / "limactl.real")
        script = f"""[ "$1" != clone ] || "{real}.real" clone --tty=false {BASE} "$4"
exec "{real}.real" "$@\""""
        self.box.write(real, f"#!/bin/sh\n{script}\n", 0o755)
        self.assert_refused(self.box.run("run"), "already exists")

    def test_start_is_never_called_for_an_instance_that_is_not_there(self) -> None:
        process = self.box.start("run", FAKE_LIMA_SLEEP="clone:0.3")
        self.box.wait_for_limactl("clone")
        wait_for(lambda: process.poll() is not None, "the run ends")
        self.assertEqual([argv for argv in self.box.calls() if "template:default" in str(argv)], [])


if __name__ == "__main__":
    unittest.main()
