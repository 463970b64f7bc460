"""The other verbs, the script copied alone, and shells that use it."""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import unittest
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import agent_vm
from tests.quick import Result
from tests.support import BASE
from tests.support import BASE_NAME
from tests.support import SCRIPT
from tests.support import TOKEN
from tests.support import WorldTest
from tests.support import executable
from tests.support import live
from tests.support import wait_for

CLONE = "agent-vm-p-0a1b2c"


class ListTest(WorldTest):
    def rows(self) -> dict[str, dict[str, Any]]:
        result = self.box.run("list", "--json")
        self.assertEqual(result.status, 0, result.err)
        lines = [json.loads(line) for line in result.out.splitlines()]
        return {line["name"]: line for line in lines}

    def test_json_has_the_documented_keys(self) -> None:
        keys = ["name", "status", "role", "project", "age_seconds", "disk_bytes"]
        row = self.rows()[BASE]
        self.assertEqual(list(row), keys)
        self.assertEqual((row["status"], row["role"]), ("Stopped", "base"))

    def test_roles(self) -> None:
        leases: dict[str, dict[str, Any]] = {
            "agent-vm-a-aaaaaa": live(),
            "agent-vm-c-cccccc": {"keep": True},
        }
        for name, lease in leases.items():
            self.box.make_instance(name, running=True)
            self.box.make_lease(name, **lease)
        previous, unused = f"{BASE_NAME}.eeeeee", f"{BASE_NAME}.ffffff"
        for name in ("agent-vm-d-dddddd", previous, unused, "default"):
            self.box.make_instance(name)
        self.box.name_base(BASE, previous)
        roles = {name: row["role"] for name, row in self.rows().items()}
        expected = {
            BASE: "base",
            previous: "previous",
            unused: "unused",
            "agent-vm-a-aaaaaa": "running",
            "agent-vm-c-cccccc": "kept",
            "agent-vm-d-dddddd": "unused",
        }
        self.assertEqual(roles, expected)

    def test_the_table_names_the_project_without_moving_the_cursor(self) -> None:
        self.box.make_instance(CLONE)
        self.box.make_lease(CLONE, **live(), project="/p\x1b[2J/ü")
        lines = self.box.run("list").out.splitlines()
        self.assertEqual(lines[0].split(), ["NAME", "STATUS", "ROLE", "AGE", "DISK", "PROJECT"])
        self.assertIn("/p?[2J/ü", lines[2])

    def test_no_instances_are_a_header(self) -> None:
        shutil.rmtree(self.box.lima / BASE)
        self.assertEqual(len(self.box.run("list").out.splitlines()), 1)

    def test_a_broken_instance_is_listed_as_such(self) -> None:
        (self.box.lima / CLONE).mkdir()
        self.assertEqual(self.rows()[CLONE]["status"], "Broken")


class InstanceTest(WorldTest):
    def test_stop_stops_a_running_instance_and_leaves_others(self) -> None:
        self.box.make_instance(CLONE, running=True)
        for _ in range(2):  # twice is as good as once
            self.assertEqual(self.box.run("stop", CLONE).status, 0)
        self.assertFalse((self.box.lima / CLONE / "ha.pid").exists())
        self.assertEqual(self.box.clones(), [CLONE])

    def test_stop_of_a_vm_in_use_wants_force(self) -> None:
        self.box.make_instance(CLONE, running=True)
        self.box.make_lease(CLONE, **live())
        refused = self.box.run("stop", CLONE)
        self.assert_refused(refused, "in use by process", "stop --force", status=1)
        self.assertTrue((self.box.lima / CLONE / "ha.pid").exists())
        self.assertEqual(self.box.run("stop", "--force", CLONE).status, 0)
        self.assertFalse((self.box.lima / CLONE / "ha.pid").exists())

    def test_rm_removes_a_clone_with_its_lease(self) -> None:
        self.box.make_instance(CLONE, running=True)
        self.box.make_lease(CLONE, keep=True)
        self.assertEqual(self.box.run("rm", CLONE).status, 0)
        self.assert_nothing_left()

    def test_rm_of_a_vm_in_use_or_a_base_instance_wants_force(self) -> None:
        self.box.make_instance(CLONE, running=True)
        self.box.make_lease(CLONE, **live())
        for name, word in ((CLONE, "in use by process"), (BASE, "is a base instance")):
            self.assert_refused(self.box.run("rm", name), word, "--force", status=1)
            self.assertIn(name, self.box.instances())
            self.assertEqual(self.box.run("rm", "--force", name).status, 0)
            self.assertNotIn(name, self.box.instances())

    def test_rm_of_the_base_instance_is_not_undone_by_the_next_run(self) -> None:
        previous = f"{BASE_NAME}.eeeeee"
        self.box.make_instance(previous)
        self.box.name_base(BASE, previous)
        self.assertEqual(self.box.run("rm", "--force", BASE).status, 0)
        self.assert_refused(self.box.run("run"), "no base instance", "setup")
        self.assertEqual(self.box.instances(), [previous])
        self.assertEqual(self.box.run("setup", "--rollback").status, 0)
        self.assertEqual(self.box.run("run").status, 0)

    def test_gc_says_that_there_is_nothing(self) -> None:
        for words in (["gc"], ["gc", "--dry-run"]):
            result = self.box.run(*words)
            self.assertEqual((result.status, result.out), (0, ""))
            self.assertIn("nothing to remove", result.err)

    def test_stop_of_what_cannot_be_stopped_fails(self) -> None:
        (self.box.lima / CLONE).mkdir()
        self.assert_refused(self.box.run("stop", CLONE), "limactl stop failed", status=1)

    def test_rm_of_a_half_made_clone(self) -> None:
        (self.box.lima / CLONE).mkdir()
        self.assertEqual(self.box.run("rm", CLONE).status, 0)
        self.assert_nothing_left()

    def test_instances_that_are_not_ours_are_not_touched(self) -> None:
        self.box.make_instance("default", running=True)
        for verb, name in (("rm", "default"), ("stop", "default"), ("rm", "../x"), ("rm", "")):
            result = self.box.run(verb, name)
            self.assert_refused(result, "not an instance of agent-vm", status=1)
        self.assertTrue((self.box.lima / "default/ha.pid").exists())

    def test_an_instance_that_does_not_exist(self) -> None:
        for verb in ("rm", "stop"):
            result = self.box.run(verb, CLONE)
            self.assert_refused(result, f"{CLONE} does not exist", "agent-vm list", status=1)


class AuthTest(WorldTest):
    def credential(self) -> Path:
        return self.box.config / "credential"

    def test_set_stores_what_stdin_holds_for_the_user_alone(self) -> None:
        key = "sk-ant-api03-0123_x-y".ljust(108, "z")
        for value, name in ((TOKEN, "CLAUDE_CODE_OAUTH_TOKEN"), (key, "ANTHROPIC_API_KEY")):
            result = self.box.run("auth", "set", text=f"{value}\n")
            self.assertEqual((result.status, result.out), (0, ""), result.err)
            self.assertEqual(self.credential().read_text(), f"{name}={value}\n")
            self.assertEqual(self.credential().stat().st_mode & 0o777, 0o600)
            self.assertNotIn(value, result.err)
        self.assertEqual([path.name for path in self.box.config.iterdir()], ["credential"])

    def test_set_refuses_what_is_no_credential_without_showing_it(self) -> None:
        for text in ("", "\n", "my password\n", "sk-ant-oat01-a b\n", "sk-ant-oat01-a$(id)\n"):
            result = self.box.run("auth", "set", text=text)
            self.assert_refused(result, "claude setup-token", status=1)
            self.assertNotIn("password", result.err)
        self.assertFalse(self.credential().exists())

    def test_set_with_stdin_closed(self) -> None:
        prefix = ("bash", "-c", 'exec "$0" "$@" <&-')
        self.assert_refused(self.box.run("auth", "set", prefix=prefix), status=1)

    def test_set_on_a_terminal_asks_without_echo(self) -> None:
        terminal = self.box.terminal("auth", "set")
        terminal.expect("not shown")
        terminal.type(f"{TOKEN}\n")
        self.assertEqual(terminal.wait(), 0, terminal.seen)
        self.assertNotIn(TOKEN, terminal.seen)
        self.assertIn(TOKEN, self.credential().read_text())

    def test_a_token_that_the_terminal_has_wrapped_is_stored_whole(self) -> None:
        long = "sk-ant-oat01-" + "x1_-" * 24
        terminal = self.box.terminal("auth", "set")
        terminal.expect("not shown")
        terminal.type(f"{long[:79]}\n{long[79:]}\n")
        self.assertEqual(terminal.wait(), 0, terminal.seen)
        self.assertEqual(self.credential().read_text(), f"CLAUDE_CODE_OAUTH_TOKEN={long}\n")
        self.assertNotIn(long[79:], terminal.seen)

    def test_ctrl_c_at_the_question(self) -> None:
        terminal = self.box.terminal("auth", "set")
        terminal.expect("not shown")
        terminal.type("\x03")
        self.assertEqual(terminal.wait(), 130)

    def test_status_says_which_and_whether_it_enters_the_guest_and_never_shows_it(self) -> None:
        self.assertEqual(self.box.run("auth", "status").status, 1)
        self.box.run("auth", "set", text=TOKEN)
        stored = self.box.run("auth", "status")
        self.assertIn(f"CLAUDE_CODE_OAUTH_TOKEN from {self.credential()}", stored.out)
        environment = self.box.run("auth", "status", ANTHROPIC_API_KEY="sk-ant-api03-x")
        self.assertIn("ANTHROPIC_API_KEY from the environment", environment.out)
        for result in (stored, environment):
            self.assertEqual(result.status, 0)
            self.assertIn("enters the guest", result.out)
            self.assertNotIn("sk-ant", result.out + result.err)
        brokered = self.box.run("auth", "status", AGENT_VM_CREDENTIAL="broker")
        self.assertIn("stays on the host", brokered.out)

    def test_clear_forgets_it(self) -> None:
        self.box.run("auth", "set", text=TOKEN)
        for _ in range(2):
            self.assertEqual(self.box.run("auth", "clear").status, 0)
        self.assertFalse(self.credential().exists())

    def test_a_config_folder_that_cannot_be_written(self) -> None:
        locked = self.box.home / "locked"
        locked.mkdir(0o500)
        result = self.box.run("auth", "set", text=TOKEN, XDG_CONFIG_HOME=str(locked))
        self.assert_refused(result, "locked", "ermission denied", status=1)
        self.assertNotIn(TOKEN, result.err)


class SettingsShownTest(WorldTest):
    def rows(self, **env: str) -> dict[str, list[str]]:
        result = self.box.run("doctor", "-v", **env)
        return {words[0]: words[1:] for line in result.out.splitlines() if (words := line.split())}

    def test_it_shows_every_setting_and_where_it_is_from(self) -> None:
        self.box.write_config("memory = 12\ncpus = 3")
        rows = self.rows(AGENT_VM_CPUS="2")
        self.assertEqual(rows["memory"], ["12", "config"])
        self.assertEqual(rows["cpus"], ["2", "environment"])
        self.assertEqual(rows["disk"], ["20", "default"])
        self.assertEqual(set(agent_vm.SETTINGS) - set(rows), set())

    def test_it_shows_the_folders_and_the_template(self) -> None:
        out = self.box.run("doctor", "-v").out
        for path in (self.box.state, self.box.config, self.box.lima, SCRIPT.parent / "lima"):
            self.assertIn(str(path), out)

    def test_it_shows_no_value_of_a_variable(self) -> None:
        self.box.write_config("env = 'API=a secret'")
        result = self.box.run("doctor", "-v")
        self.assertIn("API", result.out)
        self.assertNotIn("secret", result.out)


class ForgetTest(WorldTest):
    def test_what_an_agent_made_hard_to_remove_is_removed(self) -> None:
        """Nested deeper than Python recurses and than a path may be long, closed, or linked."""
        nest = "import os\nfor _ in range(2500): os.mkdir('deep'); os.chdir('deep')"
        script = (
            f"sh:cd ~/.claude/projects && python3.9 -c {shlex.quote(nest)} || /usr/bin/python3 -c "
            f"{shlex.quote(nest)}; mkdir closed; touch closed/f; chmod 500 closed; "
            "ln -s /usr linked; mkfifo pipe; mkdir none; chmod 000 none"
        )
        self.assertEqual(self.box.run("run", "--", script).status, 0)
        result = self.box.run("forget")
        self.assertEqual((result.status, result.err), (0, ""))
        key = agent_vm.session_key(str(self.box.project))
        self.assertFalse((self.box.state / "sessions" / key).exists())
        self.assertTrue(Path("/usr/bin").is_dir())
        self.assertEqual(self.box.leases(), [])

    def test_not_under_a_kept_vm(self) -> None:
        self.box.run("run", "--keep", "--", "sh:true")
        (clone,) = self.box.clones()
        self.assert_refused(self.box.run("forget"), clone, f"agent-vm rm {clone}", status=1)
        lease = self.box.state / f"leases/{clone}.json"
        lease.write_text(lease.read_text().replace('"keep": true', '"keep": false'))
        refused = self.box.run("forget", FAKE_LIMA_FAIL="delete")  # of an orphan that still runs
        self.assert_refused(refused, clone, status=1)

    def test_nothing_is_left_of_the_project_and_others_stay(self) -> None:
        other = self.box.home / "other"
        other.mkdir()
        write = "sh:mkdir -p ~/.claude/projects/x; echo words > ~/.claude/projects/x/memory.md"
        for folder in (self.box.project, other):
            self.assertEqual(self.box.run("run", "--", write, cwd=folder).status, 0)
            key = agent_vm.session_key(str(folder))
            self.box.write(self.box.state / "github" / key, "octo/widget\n")
        self.box.make_lease("agent-vm-p-0a1b2c", **live())
        self.assert_refused(self.box.run("forget"), "an agent works on this project", status=1)
        (self.box.state / "leases/agent-vm-p-0a1b2c.json").unlink()
        self.assertEqual(self.box.run("forget").status, 0)
        self.assert_refused(self.box.run("forget"), "nothing is kept", status=1)
        kept = [path.name for path in self.box.state.glob("[sg]*/*") if path.is_dir()]
        self.assertEqual(kept, [agent_vm.session_key(str(other))])
        self.assertEqual(len(list((self.box.state / "github").iterdir())), 1)
        self.assertIn("memory.md", str(list((self.box.state / "sessions").rglob("*"))))


class DoctorTest(WorldTest):
    def checks(self, **env: str) -> dict[str, dict[str, str]]:
        result = self.box.run("doctor", "--json", **env)
        lines = [json.loads(line) for line in result.out.splitlines()]
        self.assertTrue(lines, result.err)
        return {line["name"]: line for line in lines}

    def assert_found(self, name: str, level: str, *words: str, **env: str) -> None:
        check = self.checks(**env)[name]
        self.assertEqual(check["level"], level, check)
        for word in words:
            self.assertIn(word, check["message"] + check["fix"])

    def test_all_is_well(self) -> None:
        result = self.box.run("doctor", ANTHROPIC_API_KEY=TOKEN)
        self.assertEqual(result.status, 0, result.out)
        self.assertIn(f"ok    base instance: {BASE}", result.out)
        self.assertNotIn(TOKEN, result.out)

    def test_json_has_the_documented_keys(self) -> None:
        for check in self.checks().values():
            self.assertEqual(list(check), ["name", "level", "message", "fix"])
            self.assertIn(check["level"], ("ok", "warn", "fail"))

    def test_no_base_instance(self) -> None:
        shutil.rmtree(self.box.lima / BASE)
        self.assert_found("base instance", "fail", "agent-vm setup")
        self.assertEqual(self.box.run("doctor").status, 1)

    def test_broken_settings_do_not_end_it(self) -> None:
        for text, env, word in (
            ("[agent-vm]\nmemory = 1\nmemory = 2\n", {}, "each key once"),
            ("[agent-vm]\nmemory = much\n", {}, "memory"),
            ("[agent-vm]\ntimeout = long\n", {}, "timeout"),
            ("", {"AGENT_VM_READ_ONLY": "1"}, "AGENT_VM_READ_ONLY is not a setting"),
        ):
            with self.subTest(text=text, env=env):
                self.box.write(self.box.config / "config.ini", text or "[agent-vm]\n")
                self.assert_found("settings", "fail", word, **env)
                self.assertEqual(self.checks(**env)["base instance"]["level"], "ok")
                self.assertEqual(self.box.run("doctor", "-v", **env).status, 1)

    def test_a_base_instance_that_runs(self) -> None:
        (self.box.lima / BASE / "ha.pid").touch()
        self.assert_found("base instance", "fail", f"agent-vm stop {BASE}")

    def test_leftovers(self) -> None:
        self.box.make_instance(CLONE)
        self.box.make_lease(CLONE)
        self.assert_found("leftovers", "warn", CLONE, "agent-vm gc")
        self.assertEqual(self.box.clones(), [CLONE])

    def test_an_instance_that_nothing_names(self) -> None:
        for name in (CLONE, "agent-vm-base.ffffff"):
            self.box.make_instance(name)
            self.assert_found("leftovers", "warn", name, f"agent-vm rm --force {name}")
            self.assertEqual(self.box.run("rm", "--force", name).status, 0)
        self.assertEqual(self.box.instances(), [BASE])

    def test_lima_missing_or_garbage(self) -> None:
        self.assert_found("lima", "ok", "limactl version 2.2.0", str(self.box.bin / "limactl"))
        self.assert_found("base instance", "fail", "limactl list", FAKE_LIMA_GARBAGE="list")
        (self.box.bin / "limactl").unlink()
        self.assert_found("lima", "fail", "not installed", "agent-vm setup")

    @unittest.skipUnless(platform.system() == "Linux", "QEMU is needed on Linux")
    def test_qemu_missing(self) -> None:
        (self.box.bin / "qemu-img").unlink()
        self.assert_found("host", "fail", "qemu-img is not installed", "nstall")

    def test_ssh_missing(self) -> None:
        (self.box.bin / "ssh").unlink()
        self.assert_found("host", "fail", "ssh is not installed")


def contents(folder: Path) -> dict[str, str]:
    files = [path for path in folder.rglob("*") if path.suffix in (".yaml", ".sh", ".py")]
    return {str(path.relative_to(folder)): path.read_text() for path in files}


class CopiedAloneTest(WorldTest):
    """agent_vm.py and nothing else, in a folder with an awkward name."""

    def setUp(self) -> None:
        super().setUp()
        folder = self.box.root / "it's alone"
        folder.mkdir()
        self.script = Path(shutil.copy(SCRIPT, folder))

    def run_copy(self, *args: str, **more: Any) -> Result:
        return self.box.run(*args, script=self.script, **more)

    def test_it_knows_its_version(self) -> None:
        result = self.run_copy("--version")
        self.assertRegex(result.out, rf"^agent-vm {agent_vm.__version__}, Python 3\.\d+\.\d+")

    def test_it_carries_the_template(self) -> None:
        """Written out when it is wanted: doctor -v names the folder, which can be copied."""
        rows = [line.split() for line in self.run_copy("doctor", "-v").out.splitlines()]
        (folder,) = [Path(words[1]) for words in rows if words[:1] == ["template"]][1:]
        self.assertEqual(contents(folder), contents(SCRIPT.parent / "lima"))

    def test_it_sets_up_and_runs(self) -> None:
        result = self.run_copy("setup", "--minimal")
        self.assertEqual(result.status, 0, result.err)
        result = self.run_copy("run", "--", "sh:echo alone")
        self.assertEqual((result.status, result.out), (0, "alone\n"), result.err)
        self.assertEqual([path.name for path in self.script.parent.iterdir()], ["agent_vm.py"])
        self.assertEqual(list((self.box.root / "tmp").iterdir()), [])

    def test_a_link_to_a_checkout_finds_the_checkout(self) -> None:
        self.script.unlink()
        self.script.symlink_to(SCRIPT)
        self.assertIn(str(SCRIPT.parent / "lima"), self.run_copy("doctor", "-v").out)


class ShellInitTest(WorldTest):
    def setUp(self) -> None:
        super().setUp()
        folder = self.box.root / "a 'path' with $odd parts"
        folder.mkdir()
        self.script = Path(shutil.copy(SCRIPT, folder))

    def shell(self, name: str, *flags: str, text: str) -> subprocess.CompletedProcess[str]:
        program = shutil.which(name)
        if not program:
            self.skipTest(f"{name} is not installed")
        return subprocess.run(
            [program, *flags, "-c", text], env=self.box.env, cwd=self.box.project, text=True,
            capture_output=True, stdin=subprocess.DEVNULL,
        )  # fmt: skip

    def check_functions(self, name: str, *flags: str) -> None:
        init = self.box.run("shell-init", name, script=self.script)
        self.assertEqual((init.status, init.err), (0, ""))
        calls = "claude-vm --keep '' 'a b' '$x' -- -p; echo status: $status"
        text = f"{init.out}\nclaude-vm-shell -- printf '%s|' 'one two' \"it's\"; {calls}\n"
        text += "agent-vm list --json; type claude-vm-setup > /dev/null; echo found: $status"
        if name != "fish":
            text = text.replace("$status", "$?")
        result = self.shell(name, *flags, text=text)
        self.assertEqual(result.stderr, "")
        lines = result.stdout.splitlines()
        self.assertEqual((lines[0], lines[2]), ("one two|it's|status: 0", "found: 0"))
        self.assertEqual(json.loads(lines[1])["name"], BASE)
        self.assertIn(f"{os.path.realpath(sys.executable)} -I ", init.out.replace("'", ""))
        words = ["--dangerously-skip-permissions", "--keep", "", "a b", "$x", "--", "-p"]
        self.assertEqual(self.box.agent_calls()[0]["argv"], words)
        self.assert_nothing_left()

    def test_bash(self) -> None:
        self.check_functions("bash", "--norc")

    def test_zsh(self) -> None:
        self.check_functions("zsh", "-f")

    def test_fish(self) -> None:
        self.check_functions("fish", "--no-config")

    def test_it_works_as_the_readme_says(self) -> None:
        script = shlex.quote(str(self.script))
        command = f'eval "$({sys.executable} {script} shell-init)"; agent-vm --version'
        self.assertRegex(self.shell("bash", "--norc", text=command).stdout, "^agent-vm ")

    def test_modules_of_the_project_are_not_loaded(self) -> None:
        (self.box.project / "argparse.py").write_text("raise SystemExit(9)")
        init = self.box.run("shell-init", script=self.script).out
        text = f"export PYTHONPATH=. PYTHONSTARTUP=argparse.py\n{init}\nagent-vm --version"
        self.assertEqual(self.shell("bash", "--norc", text=text).returncode, 0)

    def test_it_is_quick_because_it_starts_nothing(self) -> None:
        self.box.run("shell-init")
        self.assertEqual(self.box.calls(), [])


class CompletionTest(WorldTest):
    def setUp(self) -> None:
        super().setUp()
        result = self.box.run("completion")
        self.assertEqual((result.status, result.err), (0, ""))
        self.text = result.out
        command = shlex.join([sys.executable, str(SCRIPT)])
        self.env = {**self.box.env, "PATH": f"{self.box.bin}:/usr/bin:/bin"}
        executable(self.box.bin / "agent-vm", f'exec {command} "$@"')

    def completed(self, shell: Sequence[str], text: str) -> list[str]:
        program = shutil.which(shell[0])
        if not program:
            self.skipTest(f"{shell[0]} is not installed")
        result = subprocess.run(
            [program, *shell[1:], "-c", text], env=self.env, cwd=self.box.project, text=True,
            capture_output=True,
        )  # fmt: skip
        self.assertEqual(result.stderr, "")
        return result.stdout.split()

    def test_every_verb_and_option_is_offered(self) -> None:
        verbs = {name[4:].replace("_", "-") for name in vars(agent_vm) if name.startswith("cmd_")}
        words = re.search(r"-W '(.*)'", self.text)
        assert words
        offered = set(words[1].split())
        self.assertEqual({word for word in offered if not word.startswith("--")}, verbs)
        self.assertLess({"--memory", "--no-readonly", "--rollback", "--force", "--json"}, offered)

    def test_bash_completes(self) -> None:
        script = f"{self.text}\nwords=$(complete -p agent-vm | sed \"s/.*-W '\\(.*\\)'.*/\\1/\")\n"
        script += 'compgen -W "$words" -- --me; compgen -W "$words" -- se'
        self.assertEqual(self.completed(["bash"], script), ["--memory", "setup"])

    def test_zsh_completes_through_bashcompinit(self) -> None:
        script = f"{self.text}\nprint -r -- ${{_comps[agent-vm]}}"
        offered = self.completed(["zsh", "-f"], script)
        self.assertIn("_bash_complete", offered)
        self.assertIn("--memory", " ".join(offered))

    def test_it_passes_shellcheck(self) -> None:
        if not shutil.which("shellcheck"):
            self.skipTest("shellcheck is not installed")
        check = subprocess.run(
            ["shellcheck", "-s", "bash", "-"], input=self.text, stdout=subprocess.PIPE, text=True
        )
        self.assertEqual((check.returncode, check.stdout), (0, ""))


class OutputTest(WorldTest):
    def test_help_is_the_manual_page(self) -> None:
        result = self.box.run("--help")
        self.assertEqual((result.status, result.err), (0, ""))
        for heading in ("Starts:", "Writes:", "examples:", "environment:", "exit status:"):
            self.assertIn(heading, result.out)

    def test_a_closed_pipe_is_no_traceback(self) -> None:
        process = self.box.start("completion")
        assert process.stdout
        process.stdout.close()
        process.stdout = None
        wait_for(lambda: process.poll() is not None, "the command ends")
        self.assertNotIn("Traceback", self.box.finish(process).err)


if __name__ == "__main__":
    unittest.main()
